"""What an evaluation says before it begins, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from handmade import put, random_set
from PIL import Image

import eval_seg
from ct.properties import Properties, write_properties
from ct.slices import DataError, mask_mapping, read_mask
from models import Encoder

TINY = ["model.arch=tiny", "model.output_stride=16", "data.workers=0", "run.device=cpu", "data.val=null"]
TINY += ["optim.steps=2", "optim.batch_size=2", "data.test=test.txt"]


def labelled_set(root, masks=(0, 1), shape=(32, 32), **known):
    """Two training cases and one test case; the masks have a square of the second value on the first."""
    names = random_set(root, shape=shape)
    for name in names:
        mask = np.full(shape, masks[0], np.uint8)
        mask[8:20, 8:20] = masks[1]
        put(root / "masks" / name, mask)
    (root / "train.txt").write_text("\n".join(names[:6]))
    (root / "test.txt").write_text("\n".join(names[6:]))
    write_properties(root, Properties(**{"classes": ["background", "liver"], **known}))
    return root


def evaluate(root, *overrides):
    out = root.parent / "run"
    arguments = [*TINY, f"data.root={root}", f"run.out={out}", "encoder=random", *overrides]
    assert eval_seg.main([str(argument) for argument in arguments]) == 0
    return json.loads((out / "results.json").read_text())


def encoder_file(folder, **data):
    folder.mkdir()
    torch.save(Encoder("tiny").export_state_dict(), folder / "encoder.pth")
    normalisation = {"window": [-160, 240], "mean": 0.5, "std": 0.25}
    card = {"arch": "tiny", "normalisation": normalisation, "data": data}
    (folder / "encoder.json").write_text(json.dumps(card))
    return folder / "encoder.pth"


def test_cases_without_a_spacing_are_said_where_others_have_one(tmp_path):
    known = {"a": (5, 1, 1), "b": (5, 1, 1)}
    [warning] = evaluate(labelled_set(tmp_path / "set", spacing=known))["warnings"]
    assert "1 of 3 cases have no spacing in set.json, the first: c" in warning


def test_masks_of_0_and_255_are_refused_and_mapped(tmp_path):
    root = labelled_set(tmp_path / "set", masks=(0, 255))
    with pytest.raises(DataError, match=r"nothing to learn; .*data\.mask_map=\{255: 1\}"):
        evaluate(root)
    assert not (tmp_path / "run").exists()
    found = evaluate(root, "data.mask_map={255: 1}")
    assert found["dice"]["liver"] is not None and found["warnings"] == []


def test_masks_without_any_class_are_refused_and_a_missing_class_is_said(tmp_path, capsys):
    with pytest.raises(DataError, match="only background"):
        evaluate(labelled_set(tmp_path / "set", masks=(0, 0)))
    named = labelled_set(tmp_path / "named", classes=["background", "liver", "spleen"])
    found = evaluate(named)
    [said] = found["warnings"]
    assert "no pixel of spleen (1 of 2 classes)" in said and f"warning: {said}" in capsys.readouterr().err


def test_colours_and_palettes_are_mapped(tmp_path):
    pixels = np.zeros((6, 5, 3), np.uint8)
    pixels[1], pixels[2], pixels[3] = (255, 0, 0), (0, 255, 0), (7, 7, 7)
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    Image.fromarray(pixels).quantize(8).save(tmp_path / "palette.png")
    mapping = mask_mapping({"255,0,0": 1, "#00ff00": 2, 7: 255})
    for name in ("rgb.png", "palette.png"):
        mask = read_mask(tmp_path / name, mapping)
        assert mask.dtype == np.uint8 and mask[:, 0].tolist() == [0, 1, 2, 255, 0, 0]
    with pytest.raises(DataError, match=r"rgb\.png: .*RGB PNG; data\.mask_map="):
        read_mask(tmp_path / "rgb.png")
    with pytest.raises(DataError, match=r"the colour \(0, 255, 0\)"):
        read_mask(tmp_path / "rgb.png", mask_mapping({"255,0,0": 1}))
    for wrong in ({"a": 1}, {300: 1}, {"1,2": 1}, {1: 256}, {1: "liver"}, {"#12": 1}, {1: True}):
        with pytest.raises(DataError, match="data.mask_map"):
            mask_mapping(wrong)


def test_an_encoder_of_other_values_is_refused_until_somebody_insists(tmp_path):
    root = labelled_set(tmp_path / "set")
    encoder = encoder_file(tmp_path / "bytes", kind="uint8")
    with pytest.raises(DataError, match="was trained on 8-bit values, these slices hold HU"):
        evaluate(root, f"encoder={encoder}")
    assert evaluate(root, f"encoder={encoder}", "data.insist=true")["warnings"]


def test_an_encoder_of_another_axis_or_spacing_is_said(tmp_path):
    spacing = dict.fromkeys("abc", (5, 0.8, 0.8))
    root = labelled_set(tmp_path / "set", axis=2, spacing=spacing)
    encoder = encoder_file(tmp_path / "other", kind="hu", axis=1, pixel_mm=[[2, 2], [0.7, 0.9]])
    axis, rows = evaluate(root, f"encoder={encoder}")["warnings"]
    assert "trained on coronal slices, these are axial" in axis
    assert "rows 2 to 2 mm apart, here 0.8 to 0.8 mm" in rows


def test_an_encoder_without_a_card_is_said_with_what_is_assumed(tmp_path):
    root = labelled_set(tmp_path / "set")
    encoder = encoder_file(tmp_path / "bare")
    encoder.with_suffix(".json").unlink()
    [said] = evaluate(root, f"encoder={encoder}")["warnings"]
    assert "no encoder.json beside" in said and "window (-160.0, 240.0), mean 0.5, std 0.25" in said


def test_cases_in_several_lists_are_said(tmp_path):
    root = labelled_set(tmp_path / "set")
    (root / "test.txt").write_text("b/02.png\nc/00.png\n")
    [said] = evaluate(root)["warnings"]
    assert "cases in several of train, test: 1, the first: b (in train and test)" in said


def test_values_that_are_no_hu_and_windows_that_show_nothing_are_refused(tmp_path):
    root = labelled_set(tmp_path / "set")
    for path in root.glob("images/*/*.png"):
        put(path, np.random.default_rng(0).integers(1024, 5000, (32, 32)).astype(np.uint16))
    with pytest.raises(DataError, match="none below -200 .* no HU"):
        evaluate(root)
    with pytest.raises(DataError, match=r"black in the window \[5000, 6000\]; .* data\.window=\["):
        evaluate(root, "data.window=[5000, 6000]")
    evaluate(root, "data.window=[0, 4000]")
    with pytest.raises(DataError, match="auto knows none for values as stored"):
        evaluate(root, "data.hu_offset=0", "run.out=" + str(tmp_path / "stored"))


def test_what_set_json_does_not_say_is_said_once(tmp_path, capsys):
    root = labelled_set(tmp_path / "set", axis=2)
    evaluate(root)
    said = capsys.readouterr().out
    assert said.count("set.json does not say") == 1 and "kind: HU + 1024" in said
    assert "axis" not in said.split("set.json does not say")[1].splitlines()[0]


def test_a_test_case_of_finer_pixels_is_said(tmp_path):
    spacing = {case: (5, mm, mm) for case, mm in (("a", 0.8), ("b", 0.9), ("c", 0.4))}
    [said] = evaluate(labelled_set(tmp_path / "set", spacing=spacing))["warnings"]
    assert said.startswith("c: rows 0.4 mm apart") and "0.8 to 0.9: scaled down to these" in said


def test_training_cases_whose_pixels_differ_are_one_note(tmp_path):
    spacing = {case: (5, mm, mm) for case, mm in (("a", 0.8), ("b", 1.0), ("c", 0.9))}
    [said] = evaluate(labelled_set(tmp_path / "set", spacing=spacing))["warnings"]
    assert "rows from 0.8 mm (a) to 1 mm (b) apart: organs differ in size by that" in said
    assert "data.py slice --spacing MM" in said


def test_a_test_case_with_gaps_between_its_slices_is_said(tmp_path):
    root = labelled_set(tmp_path / "set", spacing={case: (5, 1, 1) for case in "abc"})
    for name in ("images", "masks"):
        (root / name / "c/05.png").write_bytes((root / name / "c/00.png").read_bytes())
    (root / "test.txt").write_text("c/00.png\nc/01.png\nc/05.png\n")
    [said] = evaluate(root)["warnings"]
    assert "c: its slices are not numbered evenly (1 such cases)" in said


def test_a_card_of_another_file_is_said(tmp_path, capsys):
    root = labelled_set(tmp_path / "set")
    encoder = encoder_file(tmp_path / "other")
    card = json.loads(encoder.with_suffix(".json").read_text())
    encoder.with_suffix(".json").write_text(json.dumps(card | {"sha256": "0" * 64}))
    evaluate(root, f"encoder={encoder}")
    assert "describes another file: its sha256 differs" in capsys.readouterr().err
