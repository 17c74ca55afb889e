"""eval_seg.py: whole evaluations on a tiny phantom, going on after a stop, prediction, what it refuses."""

import csv
import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval_seg
from ct import organs, slices
from ct.properties import class_names, read_properties
from ct.slices import DataError
from engine import stopping
from engine.config import ConfigError
from engine.files import write_whole
from evaluation import batches, report, supervised
from models import Encoder
from weights import WeightsError

PROJECT = Path(eval_seg.__file__).parent
TINY = ["model.arch=tiny", "model.output_stride=16", "data.workers=0", "run.device=cpu"]
TINY += ["optim.steps=4", "optim.batch_size=4", "eval.every=2", "log.every=1", "seed=3"]
FINETUNE = ["mode=finetune", "data.size=32", "optim.batch_size=2"]


def run(*arguments) -> int:
    return eval_seg.main([str(argument) for argument in arguments])


def evaluate(root, out, *overrides, encoder="random"):
    """A tiny evaluation; its results."""
    run(*TINY, f"data.root={root}", f"run.out={out}", f"encoder={encoder}", *overrides)
    return json.loads((Path(out) / "results.json").read_text())


@pytest.fixture(scope="module")
def linear(phantom, tmp_path_factory):
    """The folder and the results of a linear evaluation."""
    out = tmp_path_factory.mktemp("linear")
    return out, evaluate(phantom, out)


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory):
    """encoder.pth and encoder.json as train_moco.py leaves them, with a normalisation of its own."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(5)
    torch.save(Encoder("tiny").export_state_dict(), folder / "encoder.pth")
    normalisation = {"window": [-200.0, 300.0], "mean": 0.4, "std": 0.3}
    facts = {"arch": "tiny", "in_channels": 1, "normalisation": normalisation}
    (folder / "encoder.json").write_text(json.dumps(facts))
    return folder / "encoder.pth"


def slow_dice(prediction_folder, root):
    """Dice per case and organ from PNG masks on disk, by sets of pixels; None where both are empty."""
    names = (root / "test.txt").read_text().split()
    organs = class_names(root)
    cases = {}
    for case in {name.split("/")[0] for name in names}:
        own = [name for name in names if name.startswith(case + "/")]
        true = np.stack([np.asarray(Image.open(root / "masks" / name)) for name in own])
        found = np.stack([np.asarray(Image.open(prediction_folder / name)) for name in own])
        cases[case] = {}
        for label, organ in enumerate(organs[1:], 1):
            both, either = (
                ((true == label) & (found == label)).sum(),
                (true == label).sum() + (found == label).sum(),
            )
            cases[case][organ] = 2 * both / either if either else None
    return cases


# ---- A whole evaluation ---------------------------------------------------------------------------------


def test_linear_evaluation_leaves_consistent_results(linear, phantom):
    out, results = linear
    names = organs.BTCV_ORGANS[1:]
    assert list(results["dice"]) == names and list(next(iter(results["cases"].values()))) == names
    defined = [value for value in results["dice"].values() if value is not None]
    assert results["mean_dice"] == pytest.approx(sum(defined) / len(defined))
    assert {"mean", "mean_with_background", "classes"} == set(results["dataset_dice"])
    assert results["config"]["data"]["root"] == str(phantom) and results["encoder"] == "random"
    assert results["mode"] == "linear" and results["effective_rank"]["pooled"] > 0
    assert 0 <= results["val_dice"] <= 1
    rows = list(csv.DictReader((out / "cases.csv").open()))
    assert len(rows) == len(names) * len(results["cases"]) and rows[0]["organ"] == "spleen"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all(
        math.isfinite(line["loss"]) for line in lines
    )
    assert ["val_dice" in line for line in lines] == [False, True, False, True]
    assert results["val_dice"] == max(line["val_dice"] for line in lines if "val_dice" in line)
    assert not (out / "checkpoint.pth").exists()
    assert Image.open(out / "predictions.png").size[0] > 800


def test_results_equal_dice_counted_on_the_predicted_masks(linear, phantom, tmp_path):
    out, results = linear
    run(*TINY, f"run.out={out}", "--predict", phantom / "images", "--out", tmp_path)
    assert slow_dice(tmp_path, phantom) == results["cases"]


def test_repeating_prints_the_table_and_another_config_is_refused(linear, phantom, capsys):
    out, results = linear
    before = (out / "results.json").stat().st_mtime_ns
    evaluate(phantom, out, "data.workers=1")  # does not decide what is computed
    printed = capsys.readouterr().out
    assert "finished already" in printed and all(organ in printed for organ in organs.BTCV_ORGANS[1:])
    assert printed.splitlines()[-3].split()[1:4:2] == ["mean", f"{100 * results['mean_dice']:.1f}"]
    assert (out / "table.md").read_text() in printed
    assert (out / "results.json").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"optim\.steps: .* holds a run with 4, not 5"):
        evaluate(phantom, out, "optim.steps=5")


def test_folders_from_before_there_was_optim_loss(linear, phantom, tmp_path, monkeypatch, capsys):
    """A linear evaluation is the same as it was then; fine-tuning is not, and does not go on half way."""

    def age(folder):
        lines = (folder / "config.yaml").read_text().splitlines()
        kept = [line for line in lines if line.split(":")[0] not in ("  loss", "  name")]
        assert len(kept) == len(lines) - 2
        write_whole(folder / "config.yaml", "\n".join(kept), eval_seg.SCRIPT)

    def asked(self):
        self.reason = "SIGTERM"
        return True

    shutil.copytree(linear[0], tmp_path / "linear")
    age(tmp_path / "linear")
    evaluate(phantom, tmp_path / "linear")
    assert "finished already" in capsys.readouterr().out
    monkeypatch.setattr(stopping.StopRequest, "__bool__", asked)
    sgd = [*FINETUNE, "optim.name=sgd", "optim.loss=ce"]
    run(*TINY, f"data.root={phantom}", f"run.out={tmp_path}/finetune", "encoder=random", *sgd)
    age(tmp_path / "finetune")
    for settings in (FINETUNE, sgd):
        with pytest.raises(ConfigError, match=r"optim\.loss: .* holds a run with None, not '.*ce'"):
            evaluate(phantom, tmp_path / "finetune", *settings)


def test_dice_is_added_to_the_cross_entropy(phantom, tmp_path):
    def first_loss(loss):
        evaluate(phantom, tmp_path / loss, *FINETUNE, f"optim.loss={loss}", "optim.steps=1")
        return json.loads((tmp_path / loss / "metrics.jsonl").read_text().splitlines()[0])["loss"]

    added = first_loss("dice_ce") - first_loss("ce")
    assert 0.5 < added < 1  # of 14 classes, untrained: each has about 1 - 1/14 or more


def test_cached_features_change_nothing(linear, phantom, tmp_path):
    out, cached = linear
    computed = evaluate(phantom, tmp_path, "cache=off")
    for key in ("dice", "val_dice", "effective_rank", "dataset_dice", "hd95"):
        assert computed[key] == cached[key]
    assert (tmp_path / "metrics.jsonl").read_text() == (out / "metrics.jsonl").read_text()


@pytest.mark.parametrize("full", [False, True])
def test_features_beyond_cache_gb_are_held_in_a_file(linear, phantom, tmp_path, capsys, monkeypatch, full):
    """With the same results, and nothing left of it; on a full disk they are computed at every step."""
    out, cached = linear

    def no_room(file, rows):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if full:
        monkeypatch.setattr(batches, "write_all", no_room)
    in_file = evaluate(phantom, tmp_path, "cache_gb=0.0001")
    assert in_file["cases"] == cached["cases"]
    assert (tmp_path / "metrics.jsonl").read_text() == (out / "metrics.jsonl").read_text()
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in out.iterdir())
    captured = capsys.readouterr()
    assert "more than cache_gb: held in a file" in captured.out
    assert ("no file of features" in captured.err) == full


@pytest.mark.parametrize("mode", [[], ["cache=off"], FINETUNE], ids=["linear", "computed", "finetune"])
def test_masks_of_validation_cases_are_read_once(phantom, tmp_path, monkeypatch, mode):
    read = []
    monkeypatch.setattr(
        data, "read_mask", lambda path, *rest: read.append(path) or slices.read_mask(path, *rest)
    )
    evaluate(phantom, tmp_path, *mode, "eval.every=1")
    names = (phantom / "val.txt").read_text().split()
    assert [read.count(phantom / "masks" / name) for name in names] == [1] * len(names)


def test_a_frozen_encoder_stays_as_it_was(linear, encoder_file, phantom, tmp_path):
    evaluate(phantom, tmp_path, encoder=encoder_file)
    state = torch.load(tmp_path / "model.pth", weights_only=True)["state"]
    for name, value in torch.load(encoder_file, weights_only=True).items():
        assert torch.equal(state[f"encoder.{name}"], value), name


def test_linear_training_fits_what_it_is_given(phantom, tmp_path):
    """The liver of the training cases is learned: images, labels and upsampled logits lie on one another."""
    lists = ["data.test=train.txt", "data.val=null", "eval.every=100"]
    model = ["model.arch=resnet18", "model.output_stride=8"]
    results = evaluate(phantom, tmp_path, *lists, *model, "optim.steps=100", "optim.lr=0.2")
    assert results["val_dice"] is None
    assert results["dice"]["liver"] > 0.8


def test_finetuning_goes_on_after_a_stop_with_the_same_losses(phantom, tmp_path, monkeypatch):
    whole = evaluate(phantom, tmp_path / "whole", *FINETUNE)
    save = supervised.save_checkpoint

    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(supervised, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(phantom, tmp_path / "stopped", *FINETUNE)
    monkeypatch.undo()
    resumed = evaluate(phantom, tmp_path / "stopped", *FINETUNE)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "stopped")
    ]
    assert len(losses[0]) == 4 and losses[0] == losses[1]
    assert resumed["dice"] == whole["dice"] and resumed["mode"] == "finetune"


def test_two_processes_write_one_result_of_their_common_model(phantom, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_port=29517",
        "eval_seg.py",
    ]
    overrides = [f"data.root={phantom}", f"run.out={tmp_path}/run", "encoder=random", "data.test=train.txt"]
    overrides += ["model.arch=resnet18"]
    done = subprocess.run(
        [*command, *TINY, *overrides], cwd=PROJECT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results.json") == 1 and "shared by the processes" in done.stdout
    assert not list((tmp_path / "run").glob("features*"))
    results = report.read_results(tmp_path / "run")
    assert len(results["cases"]) == 3
    run(*TINY, f"run.out={tmp_path}/run", "--predict", phantom / "images", "--out", tmp_path / "masks")
    (tmp_path / "set").mkdir()
    for name in ("masks", "set.json"):
        (tmp_path / "set" / name).symlink_to(phantom / name)
    (tmp_path / "set" / "test.txt").write_text((phantom / "train.txt").read_text())
    assert slow_dice(tmp_path / "masks", tmp_path / "set") == results["cases"]


# ---- Encoder and normalisation --------------------------------------------------------------------------


def test_normalisation_travels_with_the_encoder(phantom, encoder_file, tmp_path):
    evaluate(phantom, tmp_path, "data.mean=0.4", encoder=f"torchvision:{encoder_file}")
    about = torch.load(tmp_path / "model.pth", weights_only=True)["about"]
    assert about["normalisation"] == {"window": [-200.0, 300.0], "mean": 0.4, "std": 0.3}


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.mean=0.5", r"data.mean: 0.5 contradicts 0.4 of .*encoder\.pth"),
        ("data.window=[-160, 240]", r"data.window: \[-160, 240\] contradicts \[-200.0, 300.0\]"),
        ("data.window=null", r"data.window: None contradicts \[-200.0, 300.0\]"),
        ("model.arch=resnet50", "model.arch: 'resnet50' contradicts 'tiny'"),
    ],
)
def test_a_config_that_contradicts_the_encoder_is_refused(phantom, encoder_file, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(phantom, tmp_path / "out", override, encoder=encoder_file)
    assert not (tmp_path / "out").exists()


def test_an_encoder_file_that_changed_is_noticed(phantom, encoder_file, tmp_path):
    own = tmp_path / "encoder.pth"
    own.write_bytes(encoder_file.read_bytes())
    evaluate(phantom, tmp_path / "out", "optim.steps=1", encoder=own)
    torch.save(Encoder("tiny").export_state_dict(), own)
    with pytest.raises(ConfigError, match="has changed since"):
        evaluate(phantom, tmp_path / "out", "optim.steps=1", encoder=own)


# ---- Prediction -----------------------------------------------------------------------------------------


def test_predicting_a_volume_of_any_orientation_equals_predicting_its_slices(linear, phantom, tmp_path):
    nibabel = pytest.importorskip("nibabel")
    folder = next((phantom / "images").iterdir())
    hu = np.stack(
        [slices.read_slice(path) for path in sorted(folder.glob("*.png"))]
    )  # (S, H, W), radiological
    run(*TINY, f"run.out={linear[0]}", "--predict", folder, "--out", tmp_path / "slices")
    expected = np.stack(
        [np.asarray(Image.open(tmp_path / "slices" / p.name)) for p in sorted(folder.glob("*.png"))]
    )
    # On disk: axis 0 runs to inferior, axis 1 to the patient's left, axis 2 to anterior.
    between, row, column = read_properties(phantom).spacing[folder.name]
    rows = [[0, -column, 0, 50], [0, 0, row, -70], [-between, 0, 0, 20], [0, 0, 0, 1]]
    affine = np.array(rows, np.float32)
    on_disk = hu[::-1].transpose(0, 2, 1)[:, :, ::-1]
    image = nibabel.Nifti1Image(on_disk.astype(np.int16), affine)
    (tmp_path / "in" / "sub").mkdir(parents=True)
    nibabel.save(image, tmp_path / "in" / "sub" / "ct.nii.gz")
    run(*TINY, f"run.out={linear[0]}", "--predict", tmp_path / "in", "--out", tmp_path / "out")
    result = nibabel.load(tmp_path / "out" / "sub.nii.gz")
    assert np.array_equal(result.affine, image.affine) and result.get_data_dtype() == np.uint8
    back = np.asarray(result.dataobj)[:, :, ::-1].transpose(0, 2, 1)[::-1]
    assert expected.any() and np.array_equal(back, expected)


def test_a_single_slice_npy_and_tiff_are_predicted(linear, phantom, tmp_path):
    name = (phantom / "test.txt").read_text().split()[0]
    run(*TINY, f"run.out={linear[0]}", "--predict", phantom / "images" / name, "--out", tmp_path / "png")
    np.save(tmp_path / "slice.npy", slices.read_slice(phantom / "images" / name).astype(np.int16))
    run(*TINY, f"run.out={linear[0]}", "--predict", tmp_path / "slice.npy", "--out", tmp_path / "npy")
    with Image.open(phantom / "images" / name) as image:
        image.save(tmp_path / "slice.tiff", compression="tiff_lzw")
    run(*TINY, f"run.out={linear[0]}", "--predict", tmp_path / "slice.tiff", "--out", tmp_path / "tiff")
    found = (tmp_path / "png" / Path(name).name, tmp_path / "npy/slice.png", tmp_path / "tiff/slice.png")
    first, second, third = (np.asarray(Image.open(path)) for path in found)
    assert first.dtype == np.uint8 and first.shape == (48, 48)
    assert np.array_equal(first, second) and np.array_equal(first, third)


def test_predicting_without_a_model_or_without_images_is_refused(linear, tmp_path):
    with pytest.raises(ConfigError, match="no trained model"):
        run(*TINY, f"run.out={tmp_path}", "--predict", linear[0], "--out", tmp_path / "out")
    (tmp_path / "notes.txt").write_text("neither")
    for source in (tmp_path / "notes.txt", tmp_path):
        with pytest.raises(DataError, match="neither slices"):
            run(*TINY, f"run.out={linear[0]}", "--predict", source, "--out", tmp_path / "out")
    with pytest.raises(DataError, match="no such file"):
        run(*TINY, f"run.out={linear[0]}", "--predict", tmp_path / "missing", "--out", tmp_path / "out")
    (tmp_path / "model.pth").write_bytes((linear[0] / "model.pth").read_bytes()[:100_000])
    with pytest.raises(WeightsError, match=r"model\.pth"):
        run(*TINY, f"run.out={tmp_path}", "--predict", linear[0], "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_of_another_kind_than_trained_on_are_refused(linear, tmp_path):
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(tmp_path / "eight_bit.png")
    with pytest.raises(DataError, match=r"eight_bit\.png: 8-bit values, but the model"):
        run(*TINY, f"run.out={linear[0]}", "--predict", tmp_path / "eight_bit.png", "--out", tmp_path / "out")


# ---- Windows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [[], FINETUNE], ids=["linear", "finetune"])
def test_a_window_as_large_as_the_slice_changes_nothing(phantom, tmp_path, mode):
    whole = evaluate(phantom, tmp_path / "whole", *mode)
    windowed = evaluate(phantom, tmp_path / "windowed", *mode, "eval.window=48")
    assert windowed["dice"] == whole["dice"]


def test_a_smaller_window_is_used(linear, phantom, tmp_path):
    smaller = evaluate(phantom, tmp_path / "smaller", "eval.window=32")
    assert smaller["dataset_dice"] != linear[1]["dataset_dice"]


# ---- Bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, error, message",
    [
        (["optim.stepss=3"], ConfigError, "nearest valid one is 'optim.steps'"),
        (["mode=linaer"], ConfigError, "mode: 'linaer' is not one of .*did you mean 'linear'"),
        (["optim.lr=fast"], ConfigError, "optim.lr: 'fast' is not a float"),
        (["optim.steps=0"], ConfigError, "optim.steps: 0 is impossible"),
        (["optim.loss=dice"], ConfigError, "optim.loss: 'dice' is not one of ce, dice_ce; did you mean"),
        (["optim.name=lars", "mode=finetune"], ConfigError, "optim.name: 'lars' is not one of sgd, adamw"),
        (["optim.lr=0.1", "mode=finetune"], ConfigError, "optim.lr: 0.1 .* for optim.name=sgd"),
        (["label_fraction=1.5"], ConfigError, "label_fraction: 1.5 is impossible"),
        (["optim.batch_size=1", "mode=finetune"], ConfigError, "batch_size: 1 .* 2 slices a process"),
        (
            ["optim.batch_size=500"],
            ConfigError,
            "optim.batch_size: 500 is impossible; wanted at most the 18 training",
        ),
        (["model.output_stride=4"], ConfigError, "output stride must be 8, 16 or 32"),
        (["model.arch=resnet19"], ConfigError, "resnet19"),
        (["data.classes=1"], ConfigError, "data.classes: 1 is impossible"),
        (["augment.scale=[2, 1]"], ConfigError, "augment.scale"),
        (["data.window=[5]"], ConfigError, "data.window"),
        (["encoder=null"], ConfigError, "encoder: None is impossible"),
        (["data.classes=3"], DataError, "label [0-9]+, but there are 3 classes"),
        (["data.train=missing.txt"], DataError, "no such list file"),
        (["data.root=/nowhere"], DataError, "/nowhere"),
        (["encoder=/nowhere/encoder.pth"], WeightsError, "no such file"),
        (["run.out=/proc/run"], ConfigError, "run.out: cannot write into /proc/run"),
    ],
)
def test_bad_input_is_one_clear_error(phantom, tmp_path, overrides, error, message):
    with pytest.raises(error, match=message) as caught:
        evaluate(phantom, tmp_path / "out", *overrides)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "results.json").exists() and not (tmp_path / "out" / "model.pth").exists()


def test_damaged_and_malicious_encoder_files_are_refused(phantom, encoder_file, tmp_path):
    torch.save({"state_dict": torch.nn.Linear(1, 1)}, tmp_path / "code.pth")  # a pickled class: code
    (tmp_path / "short.pth").write_bytes(encoder_file.read_bytes()[:50_000])
    (tmp_path / "other.pth").write_bytes(encoder_file.read_bytes())
    (tmp_path / "other.json").write_text('{"arch": "tiny"}')
    for name in ("code.pth", "short.pth"):
        with pytest.raises(WeightsError, match=name):
            evaluate(phantom, tmp_path / "out", encoder=tmp_path / name)
    with pytest.raises(DataError, match=r"other\.json: does not describe an encoder"):
        evaluate(phantom, tmp_path / "out", encoder=tmp_path / "other.pth")
    assert not (tmp_path / "out").exists()


def test_the_script_ends_with_one_line_and_code_2(tmp_path):
    (tmp_path / "config.yaml").write_text("mode: linear\nencoder: random\noptim: {lr: -1}\n")
    command = [sys.executable, "eval_seg.py", "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert done.stderr == "error: optim.lr: -1.0 is impossible; wanted a value above 0\n"


def test_diverging_training_names_the_learning_rate(phantom, tmp_path):
    with pytest.raises(ConfigError, match="optim.lr: the loss is nan at step"):
        evaluate(phantom, tmp_path, *FINETUNE, "optim.name=sgd", "optim.lr=1e9", "optim.steps=6")


def test_a_step_is_no_longer_than_clipping_allows(phantom, tmp_path):
    """SGD at a rate of 1 moves the decoder by the clipped gradient: one step by 1e-3 at most."""
    moved, step = [], torch.optim.SGD.step

    def measured(self, *rest, **more):
        before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        found = step(self, *rest, **more)
        after = [p for group in self.param_groups for p in group["params"]]
        moved.append(sum((a - b).square().sum() for a, b in zip(after, before)).sqrt().item())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", measured)
        settings = ["optim.lr=1.0", "optim.clip=0.001", "optim.steps=1", "optim.weight_decay=0.0"]
        evaluate(phantom, tmp_path, *settings)
    assert moved == [pytest.approx(1e-3, rel=1e-3)]


@pytest.mark.parametrize("mode", [[], FINETUNE, [*FINETUNE, "optim.name=sgd", "optim.loss=ce"]])
def test_an_evaluation_that_is_stopped_goes_on_where_it_was(phantom, tmp_path, monkeypatch, mode):
    settings = [*mode, "optim.steps=6", "eval.every=4"]
    whole = evaluate(phantom, tmp_path / "whole", *settings)
    out, steps = tmp_path / "run", iter(range(6))

    def asked(self):
        self.reason = "SIGTERM" if next(steps) == 2 else ""
        return bool(self.reason)

    monkeypatch.setattr(stopping.StopRequest, "__bool__", asked)
    arguments = [*TINY, f"data.root={phantom}", f"run.out={out}", "encoder=random", *settings]
    assert eval_seg.main(arguments) == 75
    assert json.loads((out / "stopped.json").read_text()) == {"step": 3, "reason": "SIGTERM"}
    monkeypatch.undo()
    again = evaluate(phantom, out, *settings)
    assert again["cases"] == whole["cases"] and again["val_dice"] == whole["val_dice"]
    assert not (out / "stopped.json").exists()
    models = [torch.load(folder / "model.pth")["state"] for folder in (out, tmp_path / "whole")]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
