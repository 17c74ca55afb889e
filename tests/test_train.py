"""train_moco.py: whole runs on a tiny phantom, going on after a stop, and what it refuses."""

import importlib.util
import json

import pytest
import torch
import torchvision
from PIL import Image

import train_moco
from ct.slices import DataError
from engine import config, files, stopping
from engine import process as process_module
from engine.config import ConfigError
from engine.process import seeded
from models import Encoder, WeightsError
from prepare import commands
from pretraining import journal
from pretraining.monitor import CollapseMonitor
from pretraining.schedule import StepBatches, learning_rate
from train_moco import DEFAULTS, NULLABLE


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom")
    commands.main(["phantom", "--out", str(root), "--cases", "5", "--slices", "6", "--size", "48"])
    return root


TINY = """
model: {arch: resnet18, output_stride: 16, queue_size: 9, bn_split: 0, momentum: 0.9}
data: {size: 32, workers: 0}
local: {grid: 2}
decorrelation: {group_size: 32}
optim: {epochs: 2, batch_size: 6, warmup_epochs: 1}
log: {every: 1, rank_every: 0, tensorboard: false}
"""


@pytest.fixture
def train(phantom, tmp_path):
    """Run the script with the tiny settings; returns its metrics."""
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)

    def run(name, *overrides):
        out = tmp_path / name
        arguments = [f"data.root={phantom}", f"run.out={out}", *overrides]
        assert train_moco.main(["--config", str(config), *arguments]) == 0
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    return run


def losses_of(rows):
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_a_collapse_to_one_point_is_said_once(train, capsys, monkeypatch):
    monkeypatch.setattr(journal, "ONE_POINT", -1)
    train("run")
    said = [line for line in capsys.readouterr().out.splitlines() if "all images are one point" in line]
    assert len(said) == 1 and said[0].startswith("step 4: ")  # the first one after the warm-up


def test_a_run_leaves_what_it_promises(train, tmp_path, capsys):
    rows = train("run", "log.rank_every=1")
    steps = losses_of(rows)
    assert sorted(steps) == list(range(1, 7))  # 18 slices: three steps an epoch
    names = {"step", "epoch", "loss", "global", "local", "accuracy", "similarity", "lr", "images_per_second"}
    assert set(rows[1]) == names | {"gradient_norm", "skipped_steps", "unreadable_slices"}
    ranks = [row["effective_rank"] for row in rows if "effective_rank" in row]
    assert len(ranks) == 3 and all(0 < rank <= 5 for rank in ranks)  # at the start and after each epoch
    keys, scores = [], {}
    for row in rows:
        keys += [row["similarity"]] if "similarity" in row else []
        if "dse" in row and row["step"]:
            scores[row["step"]] = row["score"]
            assert row["score"] == pytest.approx(row["grey_readout"] - 0.1 * sum(keys) / len(keys), abs=2e-5)
    assert [row.get("score") for row in rows if row["step"] == 0] == [None]
    best = max(scores, key=scores.get)
    assert json.loads((tmp_path / "run/encoder_best.json").read_text())["steps"] == best

    model = torchvision.models.resnet18(weights=None)
    model.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    model.fc = torch.nn.Identity()
    model.load_state_dict(torch.load(tmp_path / "run/encoder.pth", weights_only=True), strict=True)
    card = json.loads((tmp_path / "run/encoder.json").read_text())
    assert card["arch"] == "resnet18" and card["steps"] == 6
    assert card["normalisation"] == {"window": [-160.0, 240.0], "mean": 0.5, "std": 0.25}
    assert "configuration" not in capsys.readouterr().err
    pictures = ["features.png"]
    pictures += ["curves.png", "spectrum.png"] if importlib.util.find_spec("matplotlib") else []
    for name in pictures:
        with Image.open(tmp_path / "run" / name) as picture:
            assert picture.width >= 600

    train("run", "log.rank_every=1")  # once more: finished
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="optim.lr"):
        train("run", "optim.lr=0.5")


@pytest.mark.parametrize(
    "setting",
    [
        "decorrelation.position=bn3",
        "decorrelation.method=iternorm",
        "local.match=grid",
        "local.negatives=batch",
    ],
)
def test_the_variants_run(train, setting):
    losses = losses_of(train("run", setting, "optim.max_steps=2"))
    assert len(losses) == 2 and torch.tensor(list(losses.values())).isfinite().all()


def test_a_stopped_run_goes_on_with_the_same_losses(train, monkeypatch):
    whole = losses_of(train("whole"))

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    step = train_moco.learning_rate
    monkeypatch.setattr(train_moco, "learning_rate", lambda i, *rest: stop() if i == 4 else step(i, *rest))
    with pytest.raises(KeyboardInterrupt):
        train("stopped", "run.save_steps=3")
    monkeypatch.undo()
    assert losses_of(train("stopped")) == whole


def test_the_best_encoder_survives_a_stop(train, tmp_path, monkeypatch):
    found = iter([0.1, 0.9, 0.5, 0.7])  # at steps 0, 3, and 6; then again at 6
    measure = CollapseMonitor.structure
    monkeypatch.setattr(journal, "label_free_score", lambda readout, similarities: readout)
    monkeypatch.setattr(
        CollapseMonitor,
        "structure",
        lambda self, encoder: measure(self, encoder) | {"grey_readout": next(found)},
    )
    train("run", "log.encoders=true", "log.rank_every=1")
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


def test_accumulation_changes_memory_only(train):
    settings = ("model.bn_split=3", "decorrelation.method=none", "optim.max_steps=3")
    whole, parts = (losses_of(train(f"run{n}", f"optim.accumulate={n}", *settings)) for n in (1, 2))
    assert list(parts.values()) == pytest.approx(list(whole.values()), rel=1e-3)


def test_order_of_reading_is_every_slice_once_an_epoch_whatever_the_ranks():
    def reads(world, first=0):
        ranks = [process_module.Process(rank, world, torch.device("cpu"), "fp32") for rank in range(world)]
        batches = [list(StepBatches(13, 4, 7, process, first, 6)) for process in ranks]
        return [sum(shares, []) for shares in zip(*batches)]

    one = reads(1)
    assert one == reads(2) == reads(4)
    assert one[4:] == reads(2, first=4)
    for epoch in (one[:3], one[3:]):
        assert len(set(sum(epoch, []))) == 12
    assert one[:3] != one[3:]


def test_learning_rate_warms_up_and_falls_to_zero():
    optim = config.to_config({"lr": 2.0, "warmup_epochs": 1.0})
    rates = [learning_rate(step, 4, 20, optim) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0 and rates[12] == pytest.approx(1.0)
    assert all(a > b for a, b in zip(rates[4:], rates[5:])) and 0 < rates[-1] < 0.05


def test_streams_of_random_numbers_differ():
    keys = [("views", 0, 0), ("views", 0, 1), ("views", 1, 0), ("epoch", 0, 0)]
    assert len({float(torch.rand(1, generator=seeded(*key))) for key in keys}) == 4
    assert torch.equal(torch.rand(3, generator=seeded("a", 1)), torch.rand(3, generator=seeded("a", 1)))


# ---- Bad input ----


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "'optim.lrr'.*'optim.lr'"),
        ("optimm.lr=1", "'optimm.lr'.*'optim.lr'"),
        ("optim=3", "optim: is a section"),
        ("optim.lr=fast", "optim.lr: 'fast' is not a float"),
        ("optim.lr=-1", "optim.lr: -1.0 is impossible"),
        ("optim.lr=.nan", "optim.lr: nan is impossible"),
        ("optim.batch_size=2.5", "optim.batch_size: 2.5 is not a int"),
        ("run.compile=1", "run.compile: 1 is not a bool"),
        ("model.arch=resnet19", "model.arch: 'resnet19'.*did you mean 'resnet18'"),
        ("model.weight=0 local.weight=0", "local.weight: 0.0 is impossible; wanted above 0 if model.weight"),
        ("local.match=overlab", "did you mean 'overlap'"),
        ("augment.scale=[0.5, 0.2]", "augment.scale"),
        ("data.window=[1]", "data.window"),
        ("model.output_stride=4", "model.output_stride: 4 is impossible; wanted 8, 16 or 32"),
        ("model.queue_size=5", "model.queue_size: 5 is below optim.batch_size 6"),
        ("optim.batch_size=9", "model.queue_size|lists only|optim.batch_size"),
        ("optim.accumulate=4", "does not divide by 1 processes x 4 accumulation steps"),
        ("model.bn_split=4", "model.bn_split: 4 does not divide the 6 samples"),
        ("run.device=cuda", "run.device"),
        ("seed", "expected section.key=value"),
        ("data.root=null", "data.root: is missing"),
        ("decorrelation.position=bn3 decorrelation.group_size=0 model.arch=resnet50", "iternorm"),
    ],
)
def test_impossible_settings_name_the_key(train, override, message):
    if override == "run.device=cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    if override == "optim.batch_size=9":
        override += " model.queue_size=30 optim.accumulate=2"
    with pytest.raises(ConfigError, match=message) as error:
        train("run", *override.replace("[0.5, 0.2]", "[0.5,0.2]").split())
    assert "\n" not in str(error.value)


def test_too_few_slices_for_a_batch(train):
    with pytest.raises(ConfigError, match="100, but unlabelled.txt lists only 18 slices"):
        train("run", "optim.batch_size=100", "model.queue_size=200")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not a YAML file"),
        ("- 1\n- 2\n", "expected sections"),
        ("optim:\n  lr: {a: 1}\n", "optim.lr"),
    ],
)
def test_unreadable_configs(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        config.load_config(DEFAULTS, path, [], NULLABLE)
    with pytest.raises(ConfigError, match="no such config file"):
        config.load_config(DEFAULTS, tmp_path / "none.yaml", [], NULLABLE)


def test_yaml_numbers_are_floats_where_floats_are_meant():
    cfg = config.load_config(
        DEFAULTS, None, ["optim.lr=1e-4", "optim.weight_decay=1", "data.window=null"], NULLABLE
    )
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.data.window) == (1e-4, 1.0, None)
    assert isinstance(cfg.optim.weight_decay, float)


def test_missing_data_and_bad_starting_weights(train, tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        train("run", f"data.root={tmp_path / 'nowhere'}")
    torch.save(Encoder("resnet34").export_state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="other.pth"):
        train("run", f"model.init={tmp_path / 'other.pth'}")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="run.out"):
        train("run", f"run.out={tmp_path / 'file' / 'folder'}")


def test_errors_become_one_line_and_exit_code_2(train, tmp_path, capsys):
    def main():
        return train("run", "optim.lrr=1")

    with pytest.raises(SystemExit) as stop:
        stopping.run_script(main)
    captured = capsys.readouterr().err
    assert stop.value.code == 2 and captured.count("\n") == 1 and captured.startswith("error: ")


# ---- Files of a run ----


def test_a_torn_checkpoint_falls_back_to_the_previous_one(tmp_path, capsys):
    for step in (1, 2):
        files.save_checkpoint(tmp_path, {"step": step})
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(path.read_bytes()[:100])
    assert files.load_checkpoint(tmp_path)["step"] == 1
    assert "cannot read" in capsys.readouterr().err
    (tmp_path / "checkpoint.pth.previous").unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        files.load_checkpoint(tmp_path)


def test_bf16_where_the_processor_has_no_instructions_for_it(monkeypatch, capsys):
    overrides = ["data.root=x", "run.device=cpu", "run.precision=bf16"]
    run = config.load_config(DEFAULTS, None, overrides, NULLABLE).run
    for capability, lines in (("AVX2", 1), ("AVX512", 0)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        process_module.start_process(run)
        assert capsys.readouterr().out.count("fp32 is ten times as fast") == lines


def test_metrics_are_cut_back(tmp_path):
    process = process_module.Process(0, 1, torch.device("cpu"), "fp32")
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "old": true}\n{"st')
    files.MetricsLog(tmp_path, process, done=2).write({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
