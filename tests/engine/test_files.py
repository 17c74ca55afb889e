"""engine/files.py: checkpoints and metrics after a run that was cut off."""

import pytest
import torch

from engine import files
from engine.config import ConfigError
from engine.process import Process


def test_a_torn_checkpoint_falls_back_to_the_previous_one(tmp_path, capsys):
    for step in (1, 2):
        files.save_checkpoint(tmp_path, {"step": step})
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(path.read_bytes()[:100])
    assert files.load_checkpoint(tmp_path, dict)["step"] == 1
    assert "cannot read" in capsys.readouterr().err
    (tmp_path / "checkpoint.pth.previous").unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        files.load_checkpoint(tmp_path, dict)


def test_metrics_are_cut_back(tmp_path):
    process = Process(0, 1, torch.device("cpu"), "fp32")
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "old": true}\n{"st')
    files.MetricsLog(tmp_path, process, done=2).write({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
