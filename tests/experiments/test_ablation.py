"""The ablation: what is run, what is not run again, what is kept of it, and what the tables say of it."""

import base64
import json
import re
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import eval_seg
import train_moco
from engine import config
from engine.config import ConfigError
from engine.ownership import foreign_files
from experiments import ablation, figures, findings
from experiments.cells import Cell, Cells, cell_of, evaluation_record, pretraining_record, thinned
from experiments.jobs import as_yaml
from experiments.position import local_task, noise, set_borders
from experiments.side_by_side import kendall_tau
from moco import MoCo
from models import Encoder

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "experiments" / "configs"
RESULTS = ROOT / "experiments" / "results"
PROTOCOL = """
phantom: {cases: 10, slices: 6, size: 64, seed: 0}
seeds: [0, 1]
rates: [0.01, 0.04]
fractions: [0.5, 1.0]
pretrain:
  data: {size: 32, workers: 0}
  model: {arch: resnet18, output_stride: 16, queue_size: 16, bn_split: 4}
  optim: {epochs: 2, batch_size: 8, warmup_epochs: 1}
  log: {every: 2, rank_every: 1, encoders: true, tensorboard: false}
linear:
  data: {workers: 0}
  optim: {steps: 4, batch_size: 8}
  eval: {every: 4}
finetune:
  data: {size: 32, workers: 0}
  model: {output_stride: 16}
  optim: {steps: 2, batch_size: 4}
  eval: {every: 2}
methods:
  random: null
  moco: {local.weight: 0, decorrelation.method: none}
  full: {}
variants:
  "full, grid": {like: full, local.match: grid}
  "of a variant": {like: "full, grid", local.grid: 2}
"""
DICE = {("moco", 0.01): 0.1, ("moco", 0.04): 0.2, ("full", 0.01): 0.5, ("full", 0.04): 0.4}
SPECTRUM = {"spectrum": [1.0, 0.5], "spectrum_dense": [1.0, 0.1]}
SPECTRUM |= {"effective_rank": 1.9, "effective_rank_dense": 1.4}
SHOWN = "case/000.png"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run ablation.py with stand-ins for the scripts: they leave what they should, and note the call."""
    (tmp_path / "protocol.yaml").write_text(PROTOCOL)
    calls, machine = [], ["one"]

    def call(self, log, script, *words):
        settings = dict(word.split("=", 1) for word in words if "=" in word)
        calls.append((script, settings))
        if script == "data.py":
            for name, kind in (("images", np.uint16), ("masks", np.uint8)):
                (Path(words[2]) / name / "case").mkdir(parents=True)
                Image.fromarray(np.ones((8, 8), kind)).save(Path(words[2]) / name / SHOWN)
            (Path(words[2]) / "test.txt").write_text(SHOWN + "\n")
            (Path(words[2]) / "phantom.json").write_text("{}")
            (Path(words[2]) / "set.json").write_text('{"classes": ["background", "liver"]}')
        elif script == "train_moco.py":
            folder = Path(settings["run.out"])
            folder.mkdir(parents=True)
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics()))
            (folder / "encoder.json").write_text(json.dumps({"sha256": machine[0]}))
        elif script == "eval_seg.py" and "mode" in settings:
            folder = Path(settings["run.out"])
            folder.mkdir(parents=True)
            method, rate = folder.parent.parent.name, folder.parent.name
            rate = float(rate[2:].split("-")[0]) if rate.startswith("lr") else None
            dice = DICE.get((method, rate), 0.3)
            (folder / "results.json").write_text(json.dumps(results(dice) | {"encoder_sha256": machine[0]}))
            (folder / "model.pth").write_text("")
        elif script == "eval_cls.py":
            folder = Path(settings["run.out"])
            folder.mkdir(parents=True)
            (folder / "results.json").write_text(json.dumps(probe_results(settings)))
        elif script == "-m":
            cues = {name: {"accuracy": 0.25, "loss": 1.0} for name in findings.PAIRS}
            (Path(words[1]) / "position.json").write_text(json.dumps(cues))
        else:
            mask = Path(words[words.index("--out") + 1]) / SHOWN
            mask.parent.mkdir(parents=True)
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(mask)

    monkeypatch.setattr(ablation.Ablation, "call", call)

    def run(*arguments, on="one"):
        calls.clear()
        machine[0] = on
        place = ["--protocol", str(tmp_path / "protocol.yaml"), "--out", str(tmp_path / "out"), "--jobs", "1"]
        code = ablation.main([*place, *arguments])
        return code, list(calls)

    yield run
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def probe_results(settings):
    value = 0.25 if settings["encoder"].endswith("encoder.pth") else 0.5
    metrics = {"mAP": {"value": value, "interval": None, "classes": {"liver": value}}}
    about = {"mode": "knn", "encoder": "x", "encoder_sha256": "one", "label_fraction": 1.0}
    return about | {"config": {"data": {"root": "x"}}, "metrics": metrics}


def metrics():
    """Rows of metrics.jsonl, the monitor's by themselves."""
    rows = []
    for step in (0, 3, 6):
        if step:
            rows.append({"step": step, "loss": 5.0, "local": 0.5678, "similarity": 0.5, "lr": 0.1})
        rows.append({"step": step, "dse": step / 10, "grey_readout": 0.6123456} | SPECTRUM)
    return rows


def results(dice):
    organs = [organ for group in findings.GROUPS.values() for organ in group]
    found = dict.fromkeys(organs, dice) | {"left adrenal gland": None}
    return {
        "mean_dice": dice,
        "val_dice": dice,
        "dice": found,
        "cases": {"case": found},
        "hd95": 12.3456789,
        "hd95_cases": {"case": {}},
        "label_fraction": 1.0,
        "effective_rank": {"pooled": 10 * dice, "dense": -dice, "slices": 5},
        "structure": {"dse": dice, "inter": 0.5, "intra": 0.5, "dimension": 0.5, "image_share": dice},
    }


def test_everything_runs_once_and_the_best_rate_goes_on(run, tmp_path, capsys):
    code, calls = run()
    assert code == 0
    pretrained = [s["run.out"].split("work/")[1] for script, s in calls if script == "train_moco.py"]
    assert sorted(pretrained) == sorted(
        [f"{method}/lr{rate}-seed0/pretrain" for method in ("moco", "full") for rate in (0.01, 0.04)]
        + ["moco/lr0.04-seed1/pretrain", "full/lr0.01-seed1/pretrain", "full, grid/lr0.01-seed0/pretrain"]
        + ["of a variant/lr0.01-seed0/pretrain"]
    )
    variant = next(s for script, s in calls if script == "train_moco.py" and "grid" in s["run.out"])
    assert variant["local.match"] == "grid" and variant["optim.lr"] == "0.01" and "like" not in variant
    second = next(s for script, s in calls if "of a variant" in s.get("run.out", ""))
    assert (second["local.match"], second["local.grid"], second["optim.lr"]) == ("grid", "2", "0.01")
    tuned = [s for script, s in calls if s.get("mode") == "finetune"]
    assert len(tuned) == 3 * 2 * 2  # methods, seeds, fractions
    snapshots = [s["encoder"] for _, s in calls if "encoder_3.pth" in s.get("encoder", "")]
    assert len(snapshots) == 2  # of the first seed
    text = re.sub(" +", " ", capsys.readouterr().out)
    assert "| full | 2 | 50.0 ± 0.0 | 50.0 ± 0.0 |" in text
    assert "| random | 2 | 30.0 ± 0.0 |" in text
    assert "| moco | 10.0 | 20.0 |" in text

    assert run() == (0, [])  # nothing is run again
    forget(tmp_path / "out", Cell("full", 0.01, 1), "finetune-50")
    assert [s["mode"] for _, s in run()[1]] == ["finetune"]


COMPARED = """
in_depth: false
benchmarks:
  knn: {script: eval_cls.py, mode: knn}
"""


def test_a_comparison_goes_method_by_method_through_its_benchmarks(run, tmp_path, capsys):
    """Every rate once, the best one with every seed and benchmark; encoders go when they are measured."""
    protocol = tmp_path / "protocol.yaml"
    protocol.write_text(PROTOCOL.split("variants:")[0] + COMPARED)
    code, calls = run()
    assert code == 0
    pretrained = [s["run.out"].split("work/")[1] for script, s in calls if script == "train_moco.py"]
    assert sorted(pretrained) == sorted(
        [f"{method}/lr{rate}-seed0/pretrain" for method in ("moco", "full") for rate in (0.01, 0.04)]
        + ["moco/lr0.04-seed1/pretrain", "full/lr0.01-seed1/pretrain"]
    )
    measured = [settings for script, settings in calls if script == "eval_cls.py"]
    assert len(measured) == 3 * 2 and all(one["model.arch"] == "resnet18" for one in measured)
    assert not any(script == "-m" or "encoder_3.pth" in str(s) for script, s in calls)
    assert not any((tmp_path / "out/work" / method).exists() for method in ("random", "moco", "full"))
    text = re.sub(" +", " ", capsys.readouterr().out)
    assert "| encoder | linear | finetune-50 | finetune-100 | knn |" in text
    assert "| full | **50.0 ± 0.0** | **50.0 ± 0.0** | **50.0 ± 0.0** | 25.0 ± 0.0 |" in text
    assert "| full | + | + | + | - |" in text.split("than random")[1]
    assert "need three encoders" in text  # to order those that are pretrained
    protocol.write_text(protocol.read_text().replace("  full: {}", "  full: {}\n  more: {local.grid: 2}"))
    run()
    assert "| knn |" in re.sub(" +", " ", capsys.readouterr().out).split("Kendall's tau")[1]
    assert [script for script, _ in run()[1] if script != "data.py"] == []
    protocol.write_text(protocol.read_text().replace("mode: knn", "mode: svm"))
    with pytest.raises(ConfigError, match=r"benchmarks\.knn: not that of"):
        run()


def forget(out, cell, name):
    """Take what has that name out of the cell's record."""
    cells = Cells(out)
    records = cells.read()
    del next(record for record in records if cells.record(cell) == record)[name]
    cells.path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_cell_speaks_of_one_encoder(run, tmp_path):
    run()
    cells, cell = Cells(tmp_path / "out"), Cell("full", 0.01, 1)
    kept = cells.read()
    shutil.rmtree(tmp_path / "out/work")
    assert [script for script, _ in run()[1]] == ["data.py"]  # all is measured
    forget(tmp_path / "out", cell, "finetune-50")
    rest = cells.read()
    for _ in range(2):  # nor does it use what the refused run made
        with pytest.raises(ConfigError, match="full/lr0.01-seed1: pretrained again, it is another encoder"):
            run(on="another")
    assert cells.read() == rest
    assert [script for script, _ in run()[1] if script != "data.py"] == ["train_moco.py", "eval_seg.py"]
    assert cells.read() == kept
    cell = Cell("full", 0.01, 0)
    forget(tmp_path / "out", cell, "masks")  # what needs the decoder measures it again
    shutil.rmtree(tmp_path / "out/work")
    with pytest.raises(ConfigError, match="full/lr0.01-seed0: pretrained again"):
        run(on="another")
    assert "linear" in cells.record(cell) and "masks" not in cells.record(cell)
    assert [script for script, _ in run()[1]].count("eval_seg.py") == 2  # evaluation, prediction
    assert cells.read() == kept


def test_an_encoder_that_was_left_unchecked_is_checked(run, tmp_path):
    """The machine went down between pretraining it again and comparing it."""
    run()
    forget(tmp_path / "out", Cell("full", 0.01, 1), "finetune-50")
    card = tmp_path / "out/work/full/lr0.01-seed1/pretrain/encoder.json"
    card.write_text('{"sha256": "another"}')
    with pytest.raises(ConfigError, match="full/lr0.01-seed1: pretrained again"):
        run()
    assert not card.parent.exists()


def test_what_is_kept(run, tmp_path):
    run("pretrain.run.precision=bf16")
    cells = Cells(tmp_path / "out")
    record = cells.record(Cell("full", 0.01, 0))
    assert [row["step"] for row in record["pretraining"]["monitor"]] == [0, 3, 6]
    assert record["pretraining"]["precision"] == "bf16" and record["linear"]["precision"] == "fp32"
    assert {record[name]["machine"] for name in ("pretraining", "linear", "linear-3", "finetune-100")} == {
        torch.backends.cpu.get_cpu_capability()
    }
    assert base64.b64decode(record["masks"][SHOWN]).startswith(b"\x89PNG")
    assert "pretraining" not in cells.record(Cell("random", None, 0))
    lines = cells.path.read_text().splitlines()
    assert len(lines) == 10 and lines == sorted(lines)  # by method, rate and seed


# ---- Records ----


def test_threads_and_processes_lose_nothing(tmp_path):
    cells = [Cell("full", rate, seed) for rate in (None, 0.1) for seed in range(8)]

    def measure(cell):
        for name in ("linear", "position"):
            Cells(tmp_path).keep(cell, **{name: cell.seed})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(measure, cells))
    assert Cells(tmp_path).read() == [
        vars(cell) | {"linear": cell.seed, "position": cell.seed} for cell in cells
    ]


def test_a_line_that_is_no_record_is_named(tmp_path):
    Cells(tmp_path).keep(Cell("full", 0.1, 0), linear={})
    with open(tmp_path / "cells.jsonl", "a") as file:
        file.write('{"method": "full"\n')
    with pytest.raises(ConfigError, match="cells.jsonl: line 2 is not the record of a cell"):
        Cells(tmp_path).keep(Cell("full", 0.1, 1), linear={})


def test_label_free_measures_are_not_rounded():
    rows = metrics()
    rows[1]["similarity"] = 0.51234567
    kept = pretraining_record(rows)
    first, _, last = kept["monitor"]
    assert "similarity" not in first and "score" not in first
    assert last["similarity"] == (0.51234567 + 0.5) / 2
    assert last["score"] == 0.6123456 - 0.1 * last["similarity"]
    assert kept["curves"] == {
        "step": [3, 6],
        "loss": [5.0, 5.0],
        "local": [0.568, 0.568],
        "similarity": [0.512, 0.5],
    }
    rows[-1]["score"] = 0.5  # of the run itself
    assert pretraining_record(rows)["monitor"][-1]["score"] == 0.5
    assert set(kept) - set(pretraining_record(rows, in_depth=False)) == {"spectra"}


def test_evaluations_keep_their_cases():
    kept = evaluation_record(results(0.123456) | {"encoder_sha256": "x"})
    assert kept["mean_dice"] == kept["dice"]["liver"] == 0.12346 and kept["hd95"] == 12.34568
    assert kept["cases"] == {"case": [0.123] * 12 + [None]} and "hd95_cases" not in kept


def test_lines_of_a_thinned_spectrum_pass_all_its_values():
    rank_deficient = [(1 + i) ** -0.7 + 0.01 * ((7 * i) % 5 == 0) / (1 + i) for i in range(500)] + [1e-9] * 50
    for spectrum in (rank_deficient, [3.0, 1.0], [2.0]):
        thin = thinned(spectrum)
        assert thin["index"][0] == 0 and thin["index"][-1] == len(spectrum) - 1
        heights = np.log10(np.maximum(thin["value"], 1e-6 * spectrum[0]))
        lines = np.interp(range(len(spectrum)), thin["index"], heights)
        exact = np.log10(np.maximum(spectrum, 1e-6 * spectrum[0]))
        assert np.abs(lines - exact).max() < np.log10(1.011)  # two roundings
    assert len(thinned(rank_deficient)["index"]) < 100
    assert thinned([0.0, 0.0])["value"] == [0.0, 0.0]  # collapsed


# ---- The committed results ----


def test_committed_results_are_small_and_give_the_tables_of_the_readme():
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    files = [path for path in files if "work" not in path.relative_to(RESULTS).parts]
    assert {path.name for path in files} == {"cells.jsonl", "protocol.yaml"}
    assert sum(path.stat().st_size for path in files) < 3e6
    for folder in RESULTS.iterdir():
        protocol = ablation.read_protocol(str(folder / "protocol.yaml"), [])
        records = Cells(folder).read()
        assert {"machine", "precision"} <= set(records[0]["linear"])
        text = findings.tables(records, protocol)
        assert "Test Dice in %" in text and "Kendall's tau" in text
        if folder.name == "ablation":
            table = re.sub(" +", " ", text)
            assert "| full-queue512 | 3 | 46.8 ± 1.0 |" in table
            assert "| moco-queue512 | 3 | 29.6 ± 8.3 |" in table


def test_committed_figures_may_be_drawn_again():
    docs = RESULTS.parents[1] / "docs"
    drawn = ("spectra", "training", "dice", "labels", "measures", "segmentations", "benchmarks")
    assert foreign_files([docs / f"{name}.png" for name in drawn], figures.FIGURES) == []


# ---- Options and protocols ----


def test_a_part_of_it(run, capsys):
    _, calls = run("--only", "full", "--seeds", "1")
    assert {s["run.out"].split("work/")[1].split("/")[0] for _, s in calls if "run.out" in s} == {"full"}
    assert "moco" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match="fulll"):
        run("--only", "fulll")


def test_another_protocol_needs_another_folder(run, tmp_path):
    run("--only", "random")
    with pytest.raises(ConfigError, match="phantom"):
        run("phantom.seed=7")
    with pytest.raises(ConfigError, match="section.key=value"):
        run("seeds=7")
    text = PROTOCOL.replace("random: null", "random: null\n  more: {local.grid: 2}")
    (tmp_path / "protocol.yaml").write_text(text)
    assert run("--only", "random")[0] == 0  # a new method may join


def test_better_is_with_every_seed_and_by_two_points():
    assert findings.better([42.0, 44.0], [40.0, 42.0])
    assert not findings.better([42.0, 43.9], [40.0, 42.0])  # by 1.95 points
    assert not findings.better([50.0, 41.9], [40.0, 42.0])  # not with the second seed
    assert not findings.better([], [40.0])
    protocol = {"methods": {"random": None, "moco": {}, "short": {"like": "moco"}}}
    linear = {"random": [30.0, 30.0], "moco": [20.0, 20.0], "short": [40.0, 40.0]}
    knn = {"random": [80.0, 80.0], "moco": [81.0, 81.0], "short": [90.0]}  # one seed is missing
    first, second = findings.verdicts({"linear": linear, "knn": knn}, protocol)
    assert "than random" in first and "| moco    |      - |   = |" in first
    assert "| short   |      + |     |" in first
    assert "than moco" in second and "| short   |      + |     |" in second


def test_rows_of_another_processor_are_named():
    def record(method, seed, machine):
        return vars(Cell(method, None, seed)) | {"linear": {"machine": machine, "val_dice": 0.3}}

    records = [record(name, seed, "AVX512") for name in ("moco", "full", "byol") for seed in (0, 1)]
    records += [record("spark", 0, "AVX512"), record("spark", 1, "AVX2"), record("swav", 0, "AVX2")]
    protocol = {"methods": dict.fromkeys(("moco", "full", "byol", "spark", "swav"))}
    text = "Measured on AVX2, the others on AVX512: spark (seeds 1), swav"
    assert findings.other_machines(records, protocol) == text
    assert findings.other_machines(records[:6], protocol) == ""


def test_what_a_measure_picks_among_methods_and_rates():
    def record(method, rate, seed, dice, score):
        monitor = [{"step": 6, "score": score, "grey_readout": 1 - score, "dse": None}]
        linear = {"mean_dice": dice, "val_dice": dice}
        return vars(Cell(method, rate, seed)) | {"linear": linear, "pretraining": {"monitor": monitor}}

    records = [record("moco", 0.1, 0, 0.20, 0.5), record("moco", 0.2, 0, 0.30, 0.4)]
    records += [record("moco", 0.2, 1, 0.32, 0.4), record("full", 0.1, 0, 0.40, 0.6)]
    records += [record("full", 0.2, 0, 0.39, 0.5), record("full", 0.1, 1, 0.42, 0.6)]
    text = re.sub(" +", " ", findings.picked_methods(records, {"methods": {"moco": {}, "full": {}}}))
    assert "best of 2 methods: full, 41.0" in text
    assert "| by label-free score | full | 41.0 | 5.0 (10.0) |" in text  # of moco's rates 20 instead of 30
    assert "| by grey readout | moco | 31.0 | 0.5 (1.0) |" in text
    assert "| by DSE | - | - | - |" in text  # not known of all
    assert findings.picked_methods(records, {"methods": {"moco": {}, "random": None}}) == ""


def test_scores_of_other_slices_do_not_count():
    methods = {"full": {}, "thinned": {"like": "full", "data.list": "thinned.txt"}, "random": None}
    protocol = {"methods": methods, "variants": {}}
    records = [{"method": name} for name in methods]
    assert findings.monitored_alike(records, protocol) == [{"method": "full"}, {"method": "random"}]


def test_benchmarks_are_drawn_and_ordered_by_the_first():
    pytest.importorskip("matplotlib")
    values = {"linear": {"random": [30.0], "full": [40.0, 42.0]}, "knn": {"full": [80.0]}}
    figure = figures.benchmarks(values, {"random": "C0", "full": "C1"})
    first, second = figure.axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["full", "random"]
    assert (first.get_title(), second.get_title()) == ("linear", "knn")
    dots = [line.get_xdata().tolist() for line in first.lines if line.get_marker() == "o"]
    assert sorted(dots) == [[30.0], [40.0, 42.0]]
    assert figures.spectra({"full": [{"monitor": []}]}, {}) is None  # of a comparison, which keeps none


def test_figures_of_what_is_there(run, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "figures"
    run("--only", "random")
    with pytest.raises(ConfigError, match="no finished pretraining"):
        run("--figures", str(out))
    run()
    always = {"dice.png", "spectra.png", "training.png", "measures.png"}
    assert run("--figures", str(out)) == (0, [])
    assert {f.name for f in out.glob("*.png")} == always | {"labels.png", "segmentations.png"}
    assert run("--figures", str(out)) == (0, [])  # again
    (out / "labels.png").write_bytes(b"of the user's")
    with pytest.raises(ConfigError, match=r"labels\.png: would be written over"):
        run("--figures", str(out))
    shutil.rmtree(out)
    for record in Cells(tmp_path / "out").read():
        for name in record.keys() & {"finetune-50", "finetune-100", "masks"}:
            forget(tmp_path / "out", cell_of(record), name)
    run("--figures", str(out))
    assert {f.name for f in out.glob("*.png")} == always


def test_protocols_that_are_none(tmp_path):
    path = tmp_path / "p.yaml"
    for text in (
        "a: 1",
        PROTOCOL.replace("seeds: [0, 1]", "seeds: []"),
        PROTOCOL.replace("linear:", "liner:"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match="not a protocol"):
            ablation.read_protocol(str(path), [])


def test_a_failing_script_is_named_with_its_last_line(tmp_path, monkeypatch):
    """Whatever folder the user is in, and whatever modules are there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.py").write_text("raise SystemExit('not that of the project')")
    protocol = yaml.safe_load(PROTOCOL)
    one = ablation.Ablation(protocol, tmp_path, 1)
    with pytest.raises(
        ConfigError, match="train_moco.py ended with code 2 and said: error: unknown key 'a.b'"
    ):
        one.call(tmp_path / "log.txt", "train_moco.py", "a.b=1")
    with pytest.raises(ConfigError, match=r"experiments.position ended with code 2 and said: error: .*RUN"):
        one.call(tmp_path / "log.txt", "-m", "experiments.position")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("ablation*.yaml")), ids=lambda path: path.name)
def test_settings_of_the_projects_protocols_are_valid(path):
    protocol = ablation.read_protocol(str(path), [])
    assert {"random", "moco", "full"} <= set(protocol["methods"])
    for changes in protocol["variants"].values():
        assert changes["like"] in protocol["methods"] | protocol["variants"]
    one = ablation.Ablation(protocol, Path("out"), 1)
    trained = [name for name, own in one.methods.items() if own is not None]
    pretraining = [(train_moco, protocol["pretrain"] | one.changes(name)) for name in trained]
    for script, settings in [*pretraining, (eval_seg, protocol["linear"]), (eval_seg, protocol["finetune"])]:
        words = [f"{key}={as_yaml(value)}" for key, value in settings.items()]
        cfg = config.load_config(script.DEFAULTS, None, [*words, "data.root=x"], script.NULLABLE)
        script.check_config(cfg)


def test_organs_that_are_not_there_leave_a_gap():
    dice = {"liver": 0.5, "aorta": None}
    assert findings.group_dice({"dice": dice}, "large organs") == 0.5
    assert findings.group_dice({"dice": dice}, "vessels") is None
    assert findings.spread([0.5, None, 0.7]) == "60.0 ± 14.1" and findings.spread([None]) == "-"


def test_kendall_tau():
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / 6**0.5)  # tau-b with one tie


# ---- Position cues ----


def test_local_task_of_equal_views_is_easy_and_of_noise_is_chance():
    torch.manual_seed(0)
    moco = MoCo(Encoder("resnet18", output_stride=16), queue_size=16, local={}).eval()
    query, key = (4 * (view - 0.5) for view in noise((32, 1, 64, 64), torch.Generator().manual_seed(0)))
    box = torch.tensor([[0.1, 0.1, 0.9, 0.9, 0.0]]).expand(32, 5)
    assert local_task(moco, query, query, box, box)["accuracy"] == 1
    moco.query.local_projector = moco.key.local_projector = torch.nn.Identity()
    set_borders(moco, "reflect")
    assert local_task(moco, query, key, box, box)["accuracy"] < 0.3
