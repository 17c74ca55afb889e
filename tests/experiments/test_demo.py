"""The demo on tiny settings: all of it, stopped in the middle, called again. And the real settings."""

import os
import signal
import time

import pytest
import yaml
from PIL import Image

import eval_seg
import train_moco
from engine.config import ConfigError, load_config, read_yaml, to_config
from experiments import demo
from pretraining.journal import Journal
from pretraining.method_settings import settle

TINY = """
phantom: {cases: 6, slices: 4, size: 48, seed: 7}
pretrain:
  data: {size: 32, workers: 0}
  model: {arch: tiny, output_stride: 16, queue_size: 8, bn_split: 0, momentum: 0.9}
  local: {grid: 2}
  decorrelation: {group_size: 32}
  optim: {epochs: 2, batch_size: 4, warmup_epochs: 1}
  log: {every: 1, rank_every: 0, tensorboard: false}
linear: {label_fraction: 0.5, data: {workers: 0}, optim: {steps: 4, batch_size: 4}, eval: {every: 2}}
finetune:
  data: {size: 32, workers: 0}
  model: {output_stride: 16}
  optim: {steps: 2, batch_size: 4}
  eval: {every: 1}
encoders: {random: null, moco: {local.weight: 0, decorrelation.method: none}, full: {}}
"""


@pytest.fixture
def run(tmp_path, capsys):
    """run(*arguments) -> exit code and what was printed."""
    (tmp_path / "tiny.yaml").write_text(TINY)

    def call(*arguments):
        words = ["--settings", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out"), *arguments]
        return demo.main(words), capsys.readouterr().out

    return call


def test_stopped_in_the_middle_it_goes_on_and_a_second_call_does_nothing(run, tmp_path, monkeypatch):
    note = Journal.note

    def stopping_at(last):
        def stopping(self, step, found):
            if step == last:
                os.kill(os.getpid(), signal.SIGTERM)
            return note(self, step, found)

        monkeypatch.setattr(Journal, "note", stopping)

    stopping_at(3)
    code, said = run()
    assert code == 75 and "the same command resumes the run" in said
    assert "== 1/9 data" in said and "== 2/9 pretraining: MoCo v2 (about" in said and "== 3/9" not in said
    stopping_at(8)  # the last step, after which this script is finished
    code, said = run()
    assert code == 75 and "resuming from step" in said and "== 1/9" not in said and "== 3/9" not in said
    assert said.endswith("stopped; the same command goes on\n")
    monkeypatch.setattr(Journal, "note", note)

    code, said = run()
    assert code == 0 and "== 2/9" not in said and "== 3/9 pretraining: full method" in said
    assert "== 9/9 fine-tuned: full method" in said
    table = said[said.index("| test Dice in %") :]
    names = [line.split("|")[1].strip() for line in table.splitlines()[2:5]]
    assert names == ["random weights", "MoCo v2", "full method"]
    assert "full method over MoCo v2: linear" in table and "all of it took" in table
    assert "train_moco.py data.root=data/mine" in said.splitlines()[-2]
    picture = tmp_path / "out/summary.png"
    with Image.open(picture) as image:
        assert image.width > image.height > 400

    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    began = time.process_time()
    code, said = run()
    assert code == 0 and "==" not in said and said.startswith(f"\n{table[:60]}")
    assert time.process_time() - began < 15
    assert files == {path: path.stat().st_mtime_ns for path in files}

    with pytest.raises(ConfigError, match="seed: is 1, but the run in .* was started with 0"):
        run("--seed", "1")


def test_another_folder_is_refused(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        run()


def test_gains_and_their_p():
    def results(*dice):
        cases = {f"case{i}": {"liver": value, "spleen": value} for i, value in enumerate(dice)}
        return {"cases": cases, "mean_dice": sum(dice) / len(dice), "dice": {"liver": 0.5, "spleen": 0.0}}

    runs = {mode: {"random": results(0.1, 0.2, 0.3), "full": results(0.2, 0.4, 0.6)} for mode in demo.MODES}
    text = demo.results_table(runs)
    row = [cell.strip() for cell in text.splitlines()[3].split("|")[1:-1]]
    assert row == ["full method", "40.0", "+20.0", "0.2", "40.0", "+20.0", "0.2"]  # p: 2 of 2^3 signs
    assert "not found after fine-tuning, full method: spleen" in text


def test_settings_of_the_project_are_valid(tmp_path):
    settings = to_config(read_yaml(demo.SETTINGS))
    steps = demo.steps_of(settings, tmp_path / "out", 0)
    assert len(steps) == 9
    for step in steps[1:]:
        script = train_moco if step.main is train_moco.main else eval_seg
        cfg = load_config(script.DEFAULTS, None, step.words, script.NULLABLE)
        if script is train_moco:
            assert settle(cfg, train_moco.METHODS, step.words) == []
        script.check_config(cfg)
    assert yaml.safe_load(demo.SETTINGS.read_text())["phantom"]["cases"] >= 60  # 12 test cases: a small p
