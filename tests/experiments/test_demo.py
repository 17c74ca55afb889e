"""The demo on tiny settings: all of it, stopped in the middle, called again. And the real settings."""

import os
import signal
import threading
import time

import pytest
import yaml
from PIL import Image

import eval_seg
import train_moco
from engine.config import ConfigError, load_config, read_yaml, to_config
from experiments import demo
from pretraining.method_settings import settle

TINY = """
phantom: {cases: 6, slices: 4, size: 48, seed: 7}
pretrain:
  data: {size: 32, workers: 0}
  model: {arch: resnet18, output_stride: 16, queue_size: 8, bn_split: 0, momentum: 0.9}
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

    yield call
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def stop_when_there_is(path):
    """SIGTERM for this process, once."""

    def wait():
        while not path.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def test_stopped_in_the_middle_it_goes_on_and_a_second_call_does_nothing(run, tmp_path):
    stop_when_there_is(tmp_path / "out/full/metrics.jsonl")
    code, said = run()
    assert code == 75 and said.endswith("stopped; the same command goes on\n")
    assert said.startswith("a phantom: done\n") and "full method, linear" not in said

    code, said = run()
    assert code == 0 and "a phantom" not in said, said
    assert "full method, fine-tuned: test Dice" in said and " % (00:" in said
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
    assert code == 0 and said.startswith(f"\n{table[:60]}")
    assert time.process_time() - began < 15
    assert files == {path: path.stat().st_mtime_ns for path in files}

    with pytest.raises(ConfigError, match="seed: .* holds a run with 0, not 1"):
        run("--seed", "1")


def test_how_much_of_a_step_is_done(tmp_path):
    step = demo.Step("", 60, "eval_seg.py", [], tmp_path / "results.json", tmp_path / "log")
    assert step.share() == 0
    step.log.write_text("step 0: effective rank 3\nstep 60/600  loss 1 (00:01 gone)\nstep 120/600  loss")
    assert step.share() == 0.2
    step.result.touch()
    assert step.share() == 1


def test_another_folder_is_refused(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        run()


def test_gains_and_their_p():
    def results(*dice):
        cases = {f"case{i}": {"liver": value, "spleen": value} for i, value in enumerate(dice)}
        return {"cases": cases, "mean_dice": sum(dice) / len(dice), "dice": {"liver": 0.5, "spleen": 0.0}}

    encoders = {
        "random": results(0.1, 0.2, 0.3),
        "moco": results(0.1, 0.2, 0.4),
        "full": results(0.2, 0.4, 0.6),
    }
    text = demo.results_table(dict.fromkeys(demo.MODES, encoders))
    row = [cell.strip() for cell in text.splitlines()[4].split("|")[1:-1]]
    assert row == ["full method", "40.0", "+20.0", "0.2", "40.0", "+20.0", "0.2"]  # p: 2 of 2^3 signs
    assert "full method over MoCo v2: linear +16.7 (p = 0.2), fine-tuned +16.7 (p = 0.2)" in text
    assert "not found after fine-tuning, full method: spleen" in text


def test_settings_of_the_project_are_valid(tmp_path):
    settings = to_config(read_yaml(demo.SETTINGS))
    data, *encoders = demo.steps_of(settings, tmp_path / "out", 0).values()
    steps = sum(encoders, [])
    assert len(data) == 1 and len(steps) == 8
    for step in steps:
        script = train_moco if step.script == "train_moco.py" else eval_seg
        cfg = load_config(script.DEFAULTS, None, step.words, script.NULLABLE)
        if script is train_moco:
            assert settle(cfg, train_moco.METHODS, step.words) == []
        script.check_config(cfg)
    assert yaml.safe_load(demo.SETTINGS.read_text())["phantom"]["cases"] >= 60  # 12 test cases: a small p
