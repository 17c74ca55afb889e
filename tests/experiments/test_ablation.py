"""ablation.py and findings.py: what is run, what is not run again, and what the tables say of it."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

import eval_seg
import train_moco
from engine import config
from engine.config import ConfigError
from experiments import ablation, findings
from experiments.position import local_task, noise, set_borders
from models import Encoder, MoCo

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "experiments" / "configs"
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


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run ablation.py with stand-ins for the scripts: they leave what they should, and note the call."""
    (tmp_path / "protocol.yaml").write_text(PROTOCOL)
    calls, machine = [], ["one"]

    def call(self, log, script, *words):
        settings = dict(word.split("=", 1) for word in words if "=" in word)
        calls.append((script, settings))
        if script == "data.py":
            Path(words[2]).mkdir(parents=True)
            (Path(words[2]) / "classes.json").write_text("[]")
        elif script == "train_moco.py":
            folder = Path(settings["run.out"])
            folder.mkdir(parents=True)
            rows = [
                {"step": s, "dse": s / 10, "grey_readout": s, "similarity": 0.5, "local": 0.5, "loss": 5.0}
                | SPECTRUM
                for s in (0, 3, 6)
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (folder / "encoder.json").write_text(json.dumps({"sha256": machine[0]}))
        elif script == "eval_seg.py" and "mode" in settings:
            folder = Path(settings["run.out"])
            folder.mkdir(parents=True)
            method, rate = folder.parent.parent.name, folder.parent.name
            rate = float(rate[2:].split("-")[0]) if rate.startswith("lr") else None
            dice = DICE.get((method, rate), 0.3)
            (folder / "results.json").write_text(json.dumps(results(dice) | {"encoder_sha256": machine[0]}))
            (folder / "model.pth").write_text("")
        elif script == "-m":
            cues = {name: {"accuracy": 0.25, "loss": 1.0} for name in findings.PAIRS}
            (Path(words[1]) / "position.json").write_text(json.dumps(cues))
        else:
            Path(words[words.index("--out") + 1]).mkdir(parents=True)

    monkeypatch.setattr(ablation.Ablation, "call", call)
    monkeypatch.setattr(findings, "shown_slices", lambda root: [])

    def run(*arguments, on="one"):
        calls.clear()
        machine[0] = on
        place = ["--protocol", str(tmp_path / "protocol.yaml"), "--out", str(tmp_path / "out"), "--jobs", "1"]
        code = ablation.main([*place, *arguments])
        return code, list(calls)

    yield run
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def results(dice):
    organs = [organ for group in findings.GROUPS.values() for organ in group]
    return {
        "mean_dice": dice,
        "val_dice": dice,
        "dice": dict.fromkeys(organs, dice) | {"left adrenal gland": None},
        "hd95_cases": {"case": {}},
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
    (tmp_path / "out/cells/full/lr0.01-seed1/finetune-50.json").unlink()
    assert [s["mode"] for _, s in run()[1]] == ["finetune"]


def test_a_cell_speaks_of_one_encoder(run, tmp_path):
    run()
    cell = tmp_path / "out/cells/full/lr0.01-seed1"
    kept = {path: path.read_text() for path in cell.iterdir()}
    shutil.rmtree(tmp_path / "out/work")
    assert [script for script, _ in run()[1]] == ["data.py"]  # all is measured
    (cell / "finetune-50.json").unlink()
    for _ in range(2):  # nor does it use what the refused run made
        with pytest.raises(ConfigError, match="full/lr0.01-seed1: pretrained again, it is another encoder"):
            run(on="another")
    assert {path: path.read_text() for path in cell.iterdir()} == {
        path: text for path, text in kept.items() if path.name != "finetune-50.json"
    }
    assert [script for script, _ in run()[1] if script != "data.py"] == ["train_moco.py", "eval_seg.py"]
    assert {path: path.read_text() for path in cell.iterdir()} == kept
    shutil.rmtree(tmp_path / "out/cells/full/lr0.01-seed0/masks")  # what needs the decoder measures it again
    shutil.rmtree(tmp_path / "out/work")
    with pytest.raises(ConfigError, match="full/lr0.01-seed0: pretrained again"):
        run(on="another")
    assert (tmp_path / "out/cells/full/lr0.01-seed0/linear.json").is_file()
    assert [script for script, _ in run()[1]].count("eval_seg.py") == 2  # evaluation, prediction


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


def test_figures_of_what_is_there(run, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "figures"
    run("--only", "random")
    with pytest.raises(ConfigError, match="no finished pretraining"):
        run("--figures", str(out))
    run()
    always = {"dice.png", "spectra.png", "training.png", "measures.png"}
    assert run("--figures", str(out)) == (0, [])
    assert {f.name for f in out.iterdir()} == always | {"labels.png"}
    for file in [*(tmp_path / "out/cells").glob("*/*/finetune-*.json"), *out.iterdir()]:
        file.unlink()
    run("--figures", str(out))
    assert {f.name for f in out.iterdir()} == always


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


def test_a_failing_script_is_named_with_its_last_line(tmp_path):
    protocol = yaml.safe_load(PROTOCOL)
    one = ablation.Ablation(protocol, tmp_path, 1)
    with pytest.raises(
        ConfigError, match="train_moco.py ended with code 2 and said: error: unknown key 'a.b'"
    ):
        one.call(tmp_path / "log.txt", str(ROOT / "train_moco.py"), "a.b=1")


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
        words = [f"{key}={ablation.as_yaml(value)}" for key, value in settings.items()]
        cfg = config.load_config(script.DEFAULTS, None, [*words, "data.root=x"], script.NULLABLE)
        script.check_config(cfg)


def test_organs_that_are_not_there_leave_a_gap():
    dice = {"liver": 0.5, "aorta": None}
    assert findings.group_dice({"dice": dice}, "large organs") == 0.5
    assert findings.group_dice({"dice": dice}, "vessels") is None
    assert findings.spread([0.5, None, 0.7]) == "60.0 ± 14.1" and findings.spread([None]) == "-"


def test_kendall_tau():
    assert findings.kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert findings.kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert findings.kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert findings.kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / 6**0.5)  # tau-b with one tie


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
