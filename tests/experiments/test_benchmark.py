"""One command, one table: which scripts are run and which are not again, what the table says, kills."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from engine import config
from engine.config import ConfigError
from experiments import benchmark
from experiments.benchmark import Cell, columns_of
from experiments.jobs import Jobs, as_yaml
from experiments.side_by_side import correlations, table
from weights import WeightsError

ROOT = Path(__file__).parents[2]
CONFIG = """
seeds: [0, 1]
common:
  data: {root: data/x, workers: 0}
random:
  model: {arch: resnet18}
benchmarks:
  one: {script: eval_seg.py, config: seg.yaml, optim.steps: 5}
  two: {script: eval_cls.py, mode: knn}
"""
VALUES = {("one", "random"): 0.2, ("one", "moco"): 0.4, ("two", "random"): 0.7, ("two", "moco"): 0.5}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A config, and encoders of two seeds, in the user's folder."""
    (tmp_path / "bench.yaml").write_text(CONFIG)
    (tmp_path / "seg.yaml").write_text(
        "mode: linear\nrun: {out: runs/y, device: cpu}\noptim: {steps: 9, lr: 1}\n"
    )
    for seed in (0, 1):
        (tmp_path / f"moco{seed}").mkdir()
        (tmp_path / f"moco{seed}/encoder.pth").write_text(str(seed))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def run(files, monkeypatch):
    """Run the benchmark with a stand-in for the scripts; returns exit code and [(script, settings)]."""
    calls, broken = [], {}

    def call(self, log, script, *words):
        settings = dict(word.split("=", 1) for word in words)
        calls.append((script, settings))
        folder = Path(settings["run.out"])
        name = folder.parent.parent.name
        if name in broken:
            raise ConfigError(broken[name])
        folder.mkdir(parents=True)
        label = "random" if settings["encoder"] == "random" else "moco"
        value = VALUES[name, label] + 0.01 * int(settings["seed"])
        results = results_of(settings, "Dice" if name == "one" else "mAP", value)
        (folder / "results.json").write_text(json.dumps(results))

    def run(*arguments, fails=None):
        calls.clear()
        broken.clear()
        broken.update(fails or {})
        code = benchmark.main(["bench.yaml", *arguments, "--jobs", "1"])
        return code, list(calls)

    monkeypatch.setattr(Jobs, "call", call)
    return run


def squeezed(text):
    return re.sub(" +", " ", text)


def results_of(settings, name, value):
    from engine.ownership import sha256

    path = Path(settings["encoder"])
    metric = {"value": value, "interval": [value - 0.1, value + 0.1], "classes": {"liver": value}}
    return {
        "mode": "x",
        "encoder": settings["encoder"],
        "encoder_sha256": sha256(path) if path.is_file() else None,
        "label_fraction": 1.0,
        "config": {"data": {"root": "data/x"}},
        "metrics": {name: metric, "other": metric},
    }


def test_every_benchmark_of_every_encoder_and_seed_once(run, files, capsys):
    code, calls = run("random", "moco{seed}/encoder.pth")
    assert code == 0 and len(calls) == 2 * 2 * 2
    assert [settings["seed"] for _, settings in calls] == ["0"] * 4 + ["1"] * 4
    script, settings = calls[0]
    assert script == "eval_seg.py" and settings == {
        "mode": "linear",
        "run.device": "cpu",
        "optim.steps": "5",
        "optim.lr": "1",
        "data.root": "data/x",
        "data.workers": "0",
        "model.arch": "resnet18",
        "encoder": "random",
        "seed": "0",
        "run.out": "runs/benchmark/one/random/seed0",
    }
    last = calls[-1][1]
    assert last["encoder"] == "moco1/encoder.pth" and "model.arch" not in last
    assert last["run.out"] == "runs/benchmark/two/moco_seed/seed1"
    said = capsys.readouterr().out
    assert "one: random, seed 0: Dice 20.0 %" in said
    assert "| random | 20.5 ± 0.7 | **70.5 ± 0.7** |" in squeezed(said)
    assert "| moco{seed} | **40.5 ± 0.7** | 50.5 ± 0.7 |" in squeezed(said)
    out = files / "runs/benchmark"
    assert (out / "table.md").read_text() in said
    rows = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    assert len(rows) == 16 and rows[0] == {
        "encoder": "random",
        "benchmark": "one",
        "seed": "0",
        "metric": "Dice",
        "value": "0.2",
        "low": "0.1",
        "high": "0.30000000000000004",
    }
    assert (out / "table.png").stat().st_size > 1000

    assert run("random", "moco{seed}/encoder.pth") == (0, [])  # nothing again
    (out / "two/random/seed1/results.json").unlink()
    (out / "two/random/seed1").rmdir()
    assert [s["run.out"] for _, s in run("random")[1]] == ["runs/benchmark/two/random/seed1"]
    assert run("random", "--table") == (0, [])


def test_a_benchmark_that_fails_stops_itself_alone(run, files, capsys):
    code, calls = run("random", fails={"one": "eval_seg.py ended with code 2 and said: no packages"})
    assert code == 2
    assert [settings["run.out"].split("/")[2] for _, settings in calls] == ["one", "two", "two"]  # not again
    said = capsys.readouterr()
    assert said.err.endswith("error: one: random: eval_seg.py ended with code 2 and said: no packages\n")
    assert "| random | 70.5 ± 0.7 |" in squeezed(said.out) and "one:" not in said.out
    assert run("random")[0] == 0  # once that is mended


def test_parts_and_changes(run):
    assert [s for s, _ in run("random", "--only", "two", "--seeds", "3")[1]] == ["eval_cls.py"]
    _, calls = run("random", "common.data.root=data/y", "one.optim.steps=7", "--out", "other")
    assert {s["data.root"] for _, s in calls} == {"data/y"}
    assert [s["optim.steps"] for script, s in calls if script == "eval_seg.py"] == ["7", "7"]
    with pytest.raises(ConfigError, match="one: its settings are not those of other/protocol.yaml"):
        run("random", "common.data.root=data/y", "--out", "other")
    with pytest.raises(ConfigError, match="its settings are not those of other/protocol.yaml"):
        run("random", "one.optim.steps=7", "--out", "other")
    assert (
        run(
            "random", "common.data.root=data/y", "one.optim.steps=7", "one.run.device=cuda", "--out", "other"
        )[0]
        == 0
    )


def test_a_benchmarks_own_settings_win(run, files):
    """Over `random`, that over `common`, that over the benchmark's config."""
    own = "{script: eval_cls.py, config: seg.yaml, model.arch: resnet50, data.workers: 3, seed: 7}"
    (files / "bench.yaml").write_text(CONFIG.replace("{script: eval_cls.py, mode: knn}", own))
    words = ("common.optim.steps=6", "common.mode=knn", "random.mode=svm", "random.data.workers=1")
    _, calls = run("random", "moco{seed}/encoder.pth", *words, "two.optim.steps=8", "--seeds", "0")
    names = ("model.arch", "data.workers", "mode", "optim.steps", "optim.lr", "seed")
    assert [[settings.get(name) for name in names] for _, settings in calls] == [
        ["resnet18", "1", "svm", "5", "1", "0"],
        [None, "0", "knn", "5", "1", "0"],
        ["resnet50", "3", "svm", "8", "1", "0"],
        ["resnet50", "3", "knn", "8", "1", "0"],
    ]


def test_a_new_benchmark_may_join(run, files):
    run("random")
    (files / "bench.yaml").write_text(CONFIG + "  three: {script: eval_cls.py, mode: svm}\n")
    VALUES["three", "random"] = 0.1
    assert [s["mode"] for _, s in run("random")[1]] == ["svm", "svm"]
    assert {"one", "two", "three"} == {
        *yaml.safe_load(Path("runs/benchmark/protocol.yaml").read_text())["benchmarks"]
    }


def test_what_is_refused_in_one_line(run, files):
    def refused(message, *arguments):
        with pytest.raises((ConfigError, WeightsError), match=message) as raised:
            run(*arguments)
        assert "\n" not in str(raised.value)

    refused("which encoders", "--out", "x")
    refused("nowhere", "nowhere/encoder.pth")
    refused("moco7", "moco{seed}", "--seeds", "7")
    refused("--only three: not one of one, two", "random", "--only", "three")
    (files / "moco0/encoder_best.pth").write_text("")
    (files / "moco0_encoder_best.pth").write_text("")
    refused("would share the name", "moco0/encoder_best.pth", "moco0_encoder_best.pth")
    refused("nothing is finished", "random", "--table")
    run("moco{seed}/encoder.pth")
    (files / "moco1/encoder.pth").write_text("another")
    refused("moco1/encoder.pth has changed since the run in .*; remove that run", "moco{seed}/encoder.pth")
    (files / "runs/benchmark/one/moco_seed/seed0/results.json").write_text("{")
    refused("not the results of an evaluation, or damaged", "moco{seed}/encoder.pth")
    for text in (
        "a: 1",
        CONFIG.replace("seeds: [0, 1]", "seeds: []"),
        CONFIG.replace("seeds: [0, 1]", "seeds: [x]"),
        CONFIG.replace("common:", "commn:"),
        CONFIG.replace("two: {script: eval_cls.py, mode: knn}", "two: 3"),
        CONFIG.replace("two: {script: eval_cls.py, mode: knn}", "two: {mode: knn}"),
    ):
        (files / "bench.yaml").write_text(text)
        refused("not a file like configs/benchmark.yaml", "random")
    for script in ("eval_x.py", "../eval_seg.py", "train_moco.py", "3"):
        (files / "bench.yaml").write_text(CONFIG.replace("eval_cls.py", script))
        refused("two: no script", "random")
    (files / "bench.yaml").write_text(CONFIG.replace("seg.yaml", "none.yaml"))
    refused("none.yaml: no such config file", "random")
    (files / "full").mkdir()
    (files / "full/notes.txt").write_text("")
    (files / "bench.yaml").write_text(CONFIG)
    refused("is not empty", "random", "--out", "full")


# ---- The table -----------------------------------------------------------------------------------


def found_of(**columns):
    """{benchmark: {encoder: [values]}} -> what `columns_of` takes."""
    found = {}
    for name, column in columns.items():
        for encoder, values in column.items():
            for seed, value in enumerate(values):
                found[Cell(name, encoder, seed)] = {"metrics": {"M": {"value": value, "interval": None}}}
    return found


def test_means_deviations_and_missing_cells():
    found = found_of(a={"x": [0.1, 0.3], "y": [0.5]}, b={"x": [0.2, None], "z": [0.1, 0.1]})
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table(columns_of(found)).splitlines()
    ]
    assert rows[0] == ["encoder", "a: M %", "b: M %"]
    assert rows[2:] == [
        ["x", "20.0 ± 14.1", "**20.0** (n=1)"],
        ["y", "**50.0** (n=1)", "-"],
        ["z", "-", "10.0 ± 0.0"],
    ]


def test_rank_correlations():
    orders = {"a": "xyz", "b": "xyz", "c": "zyx", "d": "xzy"}
    found = found_of(**{name: {e: [0.1 * i] for i, e in enumerate(order)} for name, order in orders.items()})
    text = "\n".join(correlations(columns_of(found)))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert rows[0] == ["Kendall's tau", "a", "b", "c", "d"]
    assert rows[2] == ["a", "+1.00", "+1.00", "-1.00", "+0.33"]
    assert "Of 3 encoders" in text
    assert "need three encoders" in correlations(columns_of(found_of(a={"x": [1]}, b={"x": [1]})))[1]


# ---- Real scripts --------------------------------------------------------------------------------


def test_settings_of_the_projects_config_are_valid():
    import importlib

    protocol = benchmark.read_protocol(str(ROOT / "configs/benchmark.yaml"), [])
    one = benchmark.Benchmark(protocol, Path("out"), 1)
    for name in protocol["benchmarks"]:
        script, settings = one.command(Cell(name, "random", 0))
        module = importlib.import_module(script.removesuffix(".py"))
        words = [f"{key}={as_yaml(value)}" for key, value in settings.items()]
        cfg = config.load_config(module.DEFAULTS, None, words, module.NULLABLE)
        module.check_config(cfg)
        assert cfg.model.arch == "resnet18" and cfg.encoder == "random"


def test_killed_at_any_moment_it_goes_on(phantom, tmp_path):
    """SIGKILL to all of it, then to it alone, whose script goes on, then to the end; SIGTERM saves."""
    (tmp_path / "bench.yaml").write_text(
        f"seeds: [0, 1]\ncommon: {{data: {{root: {phantom}, workers: 0}}, run: {{device: cpu}}}}\n"
        "random: {model: {arch: resnet18}}\nbenchmarks:\n"
        "  seg: {script: eval_seg.py, mode: linear, optim.steps: 40, eval.every: 10}\n"
    )
    command = [sys.executable, "-m", "experiments.benchmark", str(tmp_path / "bench.yaml"), "random"]
    command += ["--out", str(tmp_path / "out"), "--jobs", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def started():
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        deadline = time.monotonic() + 300
        while not (tmp_path / "out/seg/random/seed0.log").is_file() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return process

    process = started()
    time.sleep(1)
    process.kill()
    process.wait()
    process = started()  # waits for the script that is still there
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[0]
    assert process.returncode in (0, 75, -signal.SIGTERM), said  # before or after its imports
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "| random |" in squeezed(done.stdout)
    whole = [
        json.loads((tmp_path / f"out/seg/random/seed{seed}/results.json").read_text()) for seed in (0, 1)
    ]
    steps = (tmp_path / "out/seg/random/seed0/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps][-1] == 40
    assert whole[0]["metrics"] != whole[1]["metrics"]
