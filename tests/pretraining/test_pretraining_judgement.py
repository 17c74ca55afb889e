"""What pretraining says of its slices before it begins, what it refuses, what travels with its encoder."""

import json

import numpy as np
import pytest
import torch
from handmade import put, random_set

from ct.properties import Properties, write_properties
from ct.slices import DataError
from models import Encoder


def unlabelled_set(root, **known):
    names = random_set(root, cases=("a", "b", "c", "d"), shape=(32, 32))
    (root / "unlabelled.txt").write_text("\n".join(names[:9]))
    (root / "test.txt").write_text("\n".join(names[9:]))
    write_properties(root, Properties(**known))
    return root, names


def test_what_the_set_knows_travels_into_encoder_json(train, phantom, tmp_path):
    train("run", "optim.max_steps=1")
    data = json.loads((tmp_path / "run/encoder.json").read_text())["data"]
    assert (data["kind"], data["hu_offset"], data["axis"], data["size"]) == ("hu", 1024, 2, [48, 48])
    assert data["pixel_mm"] == [[pytest.approx(400 / 48)] * 2] * 2 and data["source"].startswith("procedural")


def test_slices_and_cases_of_the_test_list_are_said(train, tmp_path, capsys):
    root, names = unlabelled_set(tmp_path / "set")
    arguments = (f"data.root={root}", "optim.max_steps=1")
    train("clean", *arguments)
    assert "warning" not in capsys.readouterr().err
    (root / "test.txt").write_text("\n".join(names[8:]))
    train("slices", *arguments)
    assert "unlabelled.txt: 1 of its slices stand in test.txt, too" in capsys.readouterr().err
    (root / "unlabelled.txt").write_text("\n".join(names[:8]))
    train("cases", *arguments)
    assert "unlabelled.txt: has other slices of 1 cases of test.txt (c)" in capsys.readouterr().err


def test_values_that_are_no_hu_are_refused_before_the_folder_is_made(train, tmp_path):
    root, _ = unlabelled_set(tmp_path / "set", hu_offset=0)
    with pytest.raises(DataError, match=r"values from 0 to \d+, none below -200 .*data\.hu_offset"):
        train("run", f"data.root={root}")
    assert not (tmp_path / "run").exists()
    train("given", f"data.root={root}", "data.window=[0,3000]", "optim.max_steps=1")
    train("insisted", f"data.root={root}", "data.insist=true", "optim.max_steps=1")


def test_weights_to_start_from_are_compared(train, tmp_path, capsys):
    (tmp_path / "old").mkdir()
    torch.save(Encoder("tiny").export_state_dict(), tmp_path / "old/encoder.pth")
    card = {"arch": "tiny", "normalisation": {"window": [-160, 240], "mean": 0.4, "std": 0.25}}
    for kind, message in (("hu", None), ("uint8", "was trained on 8-bit values, these slices hold HU")):
        (tmp_path / "old/encoder.json").write_text(json.dumps(card | {"data": {"kind": kind}}))
        arguments = (kind, f"model.init={tmp_path}/old/encoder.pth", "optim.max_steps=1")
        if message:
            with pytest.raises(DataError, match=message):
                train(*arguments)
        else:
            train(*arguments)
            assert "mean=0.4" in capsys.readouterr().err


def test_the_order_of_a_list_does_not_choose_the_size(train, tmp_path):
    root, names = unlabelled_set(tmp_path / "set")
    put(root / "images" / names[0], np.full((64, 64), 1000, np.uint16))
    for order in (1, -1):
        (root / "unlabelled.txt").write_text("\n".join(names[:9][::order]))
        train(f"run{order}", f"data.root={root}", "optim.max_steps=1")
        assert json.loads((tmp_path / f"run{order}/encoder.json").read_text())["data"]["size"] == [32, 32]


def test_slices_without_any_contrast_are_refused(train, tmp_path):
    root, names = unlabelled_set(tmp_path / "set")
    for name in names:
        put(root / "images" / name, np.full((32, 32), 1100, np.uint16))
    with pytest.raises(DataError, match="all values are 76: nothing to learn"):
        train("run", f"data.root={root}")
