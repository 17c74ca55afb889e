"""pretraining/journal.py: what a run says of a collapse, and which encoder it keeps as the best."""

import torch

from pretraining import journal
from pretraining.monitor import CollapseMonitor


def test_a_collapse_to_one_point_is_said_once(train, capsys, monkeypatch):
    monkeypatch.setattr(journal, "ONE_POINT", -1)
    train("run")
    said = [line for line in capsys.readouterr().out.splitlines() if "all images are one point" in line]
    assert len(said) == 1 and said[0].startswith("step 4: ")  # the first one after the warm-up


def test_the_best_encoder_survives_a_stop(train, tmp_path, monkeypatch):
    found = iter([0.1, 0.9, 0.5, 0.7])  # at steps 0, 3, and 6; then again at 6
    measure = CollapseMonitor.structure
    monkeypatch.setattr(journal, "label_free_score", lambda readout, similarities: readout)
    monkeypatch.setattr(
        CollapseMonitor,
        "structure",
        lambda self, encoder: measure(self, encoder) | {"grey_readout": next(found)},
    )
    train("run", "log.encoders=true", "log.rank_every=1", "run.keep_checkpoint=true")
    run = tmp_path / "run"
    assert [path.name for path in sorted(run.glob("encoder_*.pth"))] == [
        "encoder_0.pth",
        "encoder_3.pth",
        "encoder_6.pth",
        "encoder_best.pth",
    ]
    best = (run / "encoder_best.pth").read_bytes()
    assert torch.load(run / "encoder_best.pth")["conv1.weight"].equal(
        torch.load(run / "encoder_3.pth")["conv1.weight"]
    )
    (run / "encoder.json").unlink()  # as if it had been stopped before the end
    train("run", "log.rank_every=1")
    assert (run / "encoder_best.pth").read_bytes() == best
