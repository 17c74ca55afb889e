"""train_moco.py: whole runs on a tiny phantom, going on after a stop, and what it refuses."""

import importlib.util
import json

import pytest
import torch
import torchvision
from every_method import ALONE, small_settings
from PIL import Image
from tiny import tiny_resnet

from ct.slices import DataError
from engine.config import ConfigError
from methods import METHODS
from models import Encoder
from pretraining.run import Run
from weights import WeightsError


def losses_of(rows):
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_a_run_leaves_what_it_promises(train, tmp_path, capsys):
    settings = ("model.arch=resnet18", "log.rank_every=1")
    rows = train("run", *settings)
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

    train("run", *settings)  # once more: finished
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="optim.lr"):
        train("run", "model.arch=resnet18", "optim.lr=0.5")


@pytest.mark.parametrize(
    ("method", "optimizer"), [*((name, "sgd") for name in METHODS), ("byol", "lars"), ("spark", "adamw")]
)
def test_every_method_trains_and_goes_on_after_a_stop_with_the_same_losses(
    train, monkeypatch, tmp_path, capsys, method, optimizer
):
    """Three steps, and the same three with a stop after the second: all metrics, and the encoder, which goes
    into torchvision's ResNet. With regions and whitening where the method takes them."""
    monkeypatch.setattr("pretraining.run.draw", lambda *_: None)  # curves take longer than the steps
    settings = (*small_settings(method), f"optim.name={optimizer}", "optim.max_steps=3")
    whole = train("whole", *settings)
    losses = losses_of(whole)
    assert sorted(losses) == [1, 2, 3] and torch.tensor(list(losses.values())).isfinite().all()
    assert losses[1] != losses[2] != losses[3]
    assert (whole[1]["local"] > 0) == (method not in ALONE)

    stop_before(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train("stopped", "run.save_steps=2", *settings)
    monkeypatch.undo()
    monkeypatch.setattr("pretraining.run.draw", lambda *_: None)
    capsys.readouterr()
    stopped = train("stopped", *settings)
    assert "resuming from step 2" in capsys.readouterr().out
    assert [without_times(row) for row in stopped] == [without_times(row) for row in whole]
    encoders = [
        torch.load(tmp_path / f"{run}/encoder.pth", weights_only=True) for run in ("whole", "stopped")
    ]
    assert all(torch.equal(encoders[1][name], value) for name, value in encoders[0].items())
    tiny_resnet().load_state_dict(encoders[0], strict=True)


def without_times(row):
    return {name: value for name, value in row.items() if name != "images_per_second"}


def stop_before(step, monkeypatch):
    """The next run is interrupted where it would begin the step after so many."""
    set_schedule = Run.set_schedule

    def stop_or_go_on(run):
        if run.step == step:
            raise KeyboardInterrupt
        set_schedule(run)

    monkeypatch.setattr(Run, "set_schedule", stop_or_go_on)


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
    stop_before(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train("stopped", "run.save_steps=3")
    monkeypatch.undo()
    assert losses_of(train("stopped")) == whole


def test_accumulation_changes_memory_only(train):
    settings = ("model.bn_split=3", "decorrelation.method=none", "optim.max_steps=3")
    whole, parts = (losses_of(train(f"run{n}", f"optim.accumulate={n}", *settings)) for n in (1, 2))
    assert list(parts.values()) == pytest.approx(list(whole.values()), rel=5e-3)


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
        ("model.queue_size=5", "model.queue_size: 5 is impossible; wanted optim.batch_size, 6, or more"),
        ("optim.batch_size=9", "model.queue_size|lists only|optim.batch_size"),
        ("optim.accumulate=4", "does not divide by 1 processes x 4 accumulation steps"),
        ("optim.accumulate=2 model.bn_split=0", "accumulate: 2 would leave BatchNorm 3 .* the global batch"),
        ("optim.accumulate=3 model.bn_split=3", "accumulate: 3 would leave BatchNorm 2 .*model.bn_split=2"),
        ("model.bn_split=4", "model.bn_split: 4 does not divide the 6 samples"),
        ("run.device=cuda", "run.device"),
        ("seed", "expected section.key=value"),
        ("data.root=null", "data.root: is missing"),
        ("method=bylo", "method: 'bylo' is not one of.*did you mean 'byol'"),
        (
            "method=byol model.queue_size=9",
            "model.queue_size: byol has no such setting; it has model.weight, model.dim",
        ),
        ("method=simclr optim.batch_size=1", "optim.batch_size: 1 is impossible; wanted 2 or more: simclr"),
        (
            "method=simclr optim.accumulate=2",
            "optim.accumulate: 2 is impossible; wanted 1: the loss",
        ),
        ("method=byol optim.batch_size=1", "optim.batch_size: 1 leaves one sample to BatchNorm, but byol"),
        ("method=spark data.size=40", "data.size: 40 is impossible; wanted a multiple of 16, 32 or more"),
        ("method=spark data.size=64 local.weight=1", "local.weight: masked reconstruction sees one view"),
        ("method=densecl model.output_stride=32", "data.size: views of 32 px have one position in layer4"),
        ("optim.name=adam", "optim.name: 'adam' is not one of.*did you mean 'adamw'"),
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


def test_missing_data_and_bad_starting_weights(train, tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        train("run", f"data.root={tmp_path / 'nowhere'}")
    torch.save(Encoder("resnet34").export_state_dict(), tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="other.pth"):
        train("run", f"model.init={tmp_path / 'other.pth'}")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="run.out"):
        train("run", f"run.out={tmp_path / 'file' / 'folder'}")
