"""pretraining/run_state.py: what stays of a finished run."""

import json
import os

import pytest
import torch

from engine.config import ConfigError
from methods import METHODS, SimSiam
from pretraining.run_state import tidy


def write(folder, **contents):
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.pth").write_text(content)
    (folder / "checkpoint.pth").touch()
    (folder / "checkpoint.pth.previous").touch()
    return folder


def test_equal_encoders_take_the_room_of_one(tmp_path, monkeypatch):
    same, other = (write(tmp_path / best, encoder="same", encoder_best=best) for best in ("same", "other"))
    tidy(same, keep_checkpoint=False)
    tidy(other, keep_checkpoint=True)
    assert sorted(path.name for path in same.iterdir()) == ["encoder.pth", "encoder_best.pth"]
    assert (same / "encoder_best.pth").samefile(same / "encoder.pth")
    assert (other / "encoder_best.pth").read_text() == "other" and (
        other / "encoder.pth"
    ).read_text() == "same"
    assert (other / "checkpoint.pth").exists() and not (other / "checkpoint.pth.previous").exists()

    def no_links(*paths):
        raise PermissionError

    monkeypatch.setattr(os, "link", no_links)
    copies = write(tmp_path / "same", encoder="same")
    tidy(copies, keep_checkpoint=False)
    assert (copies / "encoder_best.pth").read_text() == "same"


def test_a_run_whose_checkpoint_is_gone_is_known_by_its_encoder(train, tmp_path, capsys):
    before = train("run", "optim.max_steps=2")
    assert not list((tmp_path / "run").glob("checkpoint*"))
    capsys.readouterr()
    assert train("run", "optim.max_steps=2", "run.save_steps=1", "run.keep_checkpoint=true") == before
    assert "finished after 2 steps; nothing to do" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="optim.max_steps: is 3, but the run in .* was started with 2"):
        train("run", "optim.max_steps=3")
    card = json.loads((tmp_path / "run/encoder.json").read_text())
    card["data"]["slices"] = 17
    (tmp_path / "run/encoder.json").write_text(json.dumps(card))
    with pytest.raises(ConfigError, match="has 18 slices, but the run in .* was started with 17"):
        train("run", "optim.max_steps=2")
    (tmp_path / "run/encoder.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"encoder.json does not describe a finished run .*; remove it, or"):
        train("run", "optim.max_steps=2")


class Counting(SimSiam):
    """A new method, with state that looks like a queue by its name."""

    def __init__(self, encoder, dim=8, hidden=8, **common):
        super().__init__(encoder, dim, hidden, **common)
        self.register_buffer("my_queue", torch.zeros(2, 3))

    def after_step(self, targets, ok=None):
        super().after_step(targets, ok)
        self.my_queue += 2


def test_a_new_method_goes_on_with_whatever_state_it_has(train, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "counting", Counting)
    settings, path = ("method=counting", "run.keep_checkpoint=true"), tmp_path / "run/checkpoint.pth"
    train("run", *settings, "optim.max_steps=2")
    state = torch.load(path, weights_only=True)
    state["config"]["optim"]["max_steps"] = 3
    torch.save(state, path)
    assert train("run", *settings, "optim.max_steps=3")[-1]["step"] == 3
    assert (torch.load(path, weights_only=True)["model"]["my_queue"] == 6).all()
    assert (tmp_path / "run/encoder.pth").is_file()
