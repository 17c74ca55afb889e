"""eval_det.py: the detector beside torchvision's own, whole evaluations on a small phantom, prediction."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade import save_volume
from PIL import Image

pytest.importorskip("pycocotools")
pytest.importorskip("scipy")
import eval_det
from ct.properties import Facts, read_properties
from ct.slices import DataError, read_mask, read_slice
from engine import stopping
from engine.config import ConfigError
from evaluation.boxes import boxes_of, coco_metrics, mean_boxes
from evaluation.detector import Found, build_detector, targets_of
from evaluation.trained import Description
from models import Encoder
from weights import WeightsError

PROJECT = Path(eval_det.__file__).parent
TINY = ["model.arch=tiny", "model.width=16", "data.workers=0", "run.device=cpu", "boxes.min_pixels=5"]
TINY += ["optim.steps=4", "optim.batch_size=4", "optim.lr=0.01", "eval.every=2", "log.every=1", "seed=3"]


def run(*arguments) -> int:
    return eval_det.main([str(argument) for argument in arguments])


def evaluate(root, out, *overrides):
    run(*TINY, f"data.root={root}", f"run.out={out}", "encoder=random", *overrides)
    return json.loads((Path(out) / "results.json").read_text())


@pytest.fixture(scope="module")
def frozen(phantom, tmp_path_factory):
    """The folder and the results of an evaluation."""
    out = tmp_path_factory.mktemp("frozen")
    return out, evaluate(phantom, out)


# ---- The detector --------------------------------------------------------------------------------


def described(arch, width, size, classes=3, mode="finetune", channels=3):
    names = ["background", *map(str, range(1, classes))]
    facts = Facts(kind="uint8", size=size)
    intensity = {"window": None, "mean": 0.0, "std": 1.0}
    return Description(mode, arch, channels, 32, names, intensity, facts, width)


def test_it_is_torchvisions_detector():
    """The same weights in torchvision's own ResNet-50 with FPN of its second version: the same losses and
    boxes, its resizing and normalisation, anchors and numbers of proposals set to ours."""
    from torchvision.models import resnet50
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.ops import MultiScaleRoIAlign

    torch.manual_seed(0)
    size = (96, 128)  # multiples of 32, which torchvision pads to
    ours = build_detector(described("resnet50", 256, size), Encoder("resnet50", 3))
    backbone = _resnet_fpn_extractor(resnet50(), 5, norm_layer=torch.nn.BatchNorm2d)
    sizes = tuple((128 / 12 * 2**level,) for level in range(5))
    theirs = FasterRCNN(
        backbone,
        3,
        min_size=96,
        max_size=128,
        image_mean=[0, 0, 0],
        image_std=[1, 1, 1],
        rpn_anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=200,
        box_batch_size_per_image=64,
    )
    canonical = (96 * 128) ** 0.5
    theirs.roi_heads.box_roi_pool = MultiScaleRoIAlign([*"0123"], 7, 2, canonical_scale=canonical)
    renamed = {
        name.replace("backbone.encoder.", "backbone.body."): rows for name, rows in ours.state_dict().items()
    }
    theirs.load_state_dict(renamed)
    theirs.transform.torch_choice = min  # or it would draw one of its one sizes
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == sum(parameter.numel() for parameter in theirs.parameters())
    images = torch.rand(2, 3, *size)
    mask = torch.zeros(2, *size, dtype=torch.long)
    mask[0, 10:50, 20:60], mask[1, 30:90, 5:80] = 1, 2
    targets = targets_of(mask, 3, 20)
    losses = []
    for model in (ours, theirs):
        torch.manual_seed(1)  # of the sampled proposals
        losses.append(model.train()([*images], targets))
    assert losses[0].keys() == losses[1].keys()
    for name, value in losses[0].items():
        assert value.item() == pytest.approx(losses[1][name].item(), rel=1e-6), name
    with torch.no_grad():
        own, other = (model.eval()([*images]) for model in (ours, theirs))
    for one, expected in zip(own, other):
        assert len(one["boxes"]) > 10
        for name in ("boxes", "labels", "scores"):
            assert torch.allclose(one[name].float(), expected[name].float(), atol=1e-5), name


@pytest.mark.parametrize("stride", [32, 8])
@pytest.mark.parametrize("size", [33, 80, 224, 512])
def test_a_box_is_pooled_from_the_level_of_its_share_of_the_slice(size, stride):
    """The whole slice from layer3, half its side from layer2, less from layer1; each from its own place."""
    encoder = Encoder("tiny", output_stride=stride)
    pool = build_detector(described("tiny", 16, (size, size)), encoder).roi_heads.box_roi_pool
    maps = {}
    for level, step in enumerate(encoder.strides().values()):
        x = torch.arange(-(-size // step), dtype=torch.float32) * step  # where a position looks at
        maps[str(level)] = torch.stack([x.expand(len(x), -1), level + 0 * x.expand(len(x), -1)])[None]
    shares = torch.tensor([1, 0.8, 0.51, 0.5, 0.3, 0.26, 0.24, 0.1])
    left = 0.2 * size * (1 - shares)
    boxes = torch.stack([left, left, left + shares * size, left + shares * size], dim=1)
    found = pool(maps, [boxes], [(size, size)])
    levels = found[:, 1].mean(dim=(1, 2))
    assert levels.tolist() == [2, 1, 1, 1, 0, 0, 0, 0]
    if size >= 80:  # else most of a box lies beyond the last position
        small = levels == 0
        centre = (left + shares * size / 2)[small]
        torch.testing.assert_close(found[small, 0].mean(dim=(1, 2)), centre)


@pytest.mark.parametrize("size", [80, 224, 512])
def test_anchors_are_a_share_of_the_slice(size):
    """A twelfth at layer1 to two thirds at layer4, which lie inside the slice whatever their aspect; those of
    the coarsest level hold all of it."""
    generator = build_detector(described("tiny", 16, (size, size)), Encoder("tiny")).rpn.anchor_generator
    sides = [(one[:, 2:] - one[:, :2]) / size for one in generator.cell_anchors]  # (3, 2) for each level
    for level, side in enumerate(sides):
        share = torch.full((3,), 2**level / 12)
        torch.testing.assert_close(side.prod(dim=1).sqrt(), share, rtol=0.03, atol=1.5 / size)
        assert (side.max() < 1) == (level < 4)


def test_boxes_are_float32_under_autocast():
    """Of a detector that finds its anchors, unchanged."""
    torch.manual_seed(0)
    model = build_detector(described("tiny", 16, (300, 500)), Encoder("tiny", 3)).eval()
    predictor = model.roi_heads.box_predictor
    for layer in (
        model.rpn.head.cls_logits,
        model.rpn.head.bbox_pred,
        predictor.cls_score,
        predictor.bbox_pred,
    ):
        torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(predictor.bbox_pred.bias)
    predictor.cls_score.bias.data = torch.tensor([0.0, 3.0, -3.0])
    image = torch.rand(1, 3, 300, 500)
    (expected,) = model(image)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = model(image)
    assert len(found["boxes"]) > 10 and found["boxes"].dtype == torch.float32
    assert torch.equal(found["boxes"], expected["boxes"])
    assert not torch.equal(found["boxes"], found["boxes"].bfloat16().float())


def test_targets_leave_crowd_out():
    mask = torch.zeros(1, 20, 20, dtype=torch.long)
    mask[0, 2:8, 3:9], mask[0, 0, 0], mask[0, 15:, 15:], mask[0, 14, 14] = 1, 1, 2, 255
    (target,) = targets_of(mask, 3, 5)
    assert target["boxes"].tolist() == [[3, 2, 9, 8]] and target["labels"].tolist() == [1]
    (empty,) = targets_of(torch.zeros(1, 20, 20, dtype=torch.long), 3, 5)
    assert empty["boxes"].shape == (0, 4) and empty["labels"].shape == (0,)


@pytest.mark.parametrize("mode", ("frozen", "finetune"))
@pytest.mark.parametrize("size, channels", (((50, 70), 1), ((33, 32), 3)))
def test_odd_sizes_and_slices_without_boxes(mode, size, channels):
    about = described("tiny", 16, size, mode=mode, channels=channels)
    model = build_detector(about, Encoder("tiny", channels))
    masks = torch.zeros(2, *size, dtype=torch.long)
    masks[0, 4:20, 5:25] = 1
    for some in (masks, torch.zeros_like(masks)):
        losses = model.train()(torch.rand(2, channels, *size), targets_of(some, 3, 5))
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
    gradients = [p.grad is not None for p in model.backbone.encoder.parameters()]
    assert all(gradients) if mode == "finetune" else not any(gradients)
    found = model.eval()(torch.rand(2, channels, *size))
    for one in found:
        assert (one["boxes"] >= 0).all() and (one["boxes"] <= torch.tensor([*size[::-1]] * 2)).all()


# ---- Whole evaluations ---------------------------------------------------------------------------


def test_an_evaluation_leaves_results_and_prints_them_again(frozen, phantom, capsys):
    out, found = frozen
    assert found["benchmark"] == "eval_det.py" and found["mode"] == "frozen"
    assert list(found["metrics"])[:3] == ["AP50", "AP", "AP75"]
    for part in (found["metrics"], found["mean_boxes"]):
        for one in part.values():
            assert one["interval"] is None and len(one["classes"]) == 13  # of one test case
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and {"val_AP50", "val_AP"} <= rows[1].keys()
    assert Image.open(out / "predictions.png").size[0] > 800
    assert not (out / "checkpoint.pth").exists()
    evaluate(phantom, out)
    said = capsys.readouterr().out
    assert "finished already" in said and (out / "table.md").read_text() in said
    assert run("--compare", out) == 0 and "frozen: AP50 %" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="seed: .* holds a run with 3, not 1"):
        evaluate(phantom, out, "seed=1")


def boxes_in(root, split, min_pixels=5):
    names = (root / f"{split}.txt").read_text().split()
    return [boxes_of(read_mask(root / "masks" / name), 14, min_pixels) for name in names]


def test_mean_boxes_are_those_of_the_training_slices(frozen, phantom):
    train, test = boxes_in(phantom, "train"), boxes_in(phantom, "test")
    classes = ["background", *frozen[1]["boxes"]["test"]]
    assert coco_metrics(test, [mean_boxes(train)] * len(test), classes) == frozen[1]["mean_boxes"]
    count = sum(int((~one.crowd).sum()) for one in test)
    assert sum(frozen[1]["boxes"]["test"].values()) == count > 10


def test_results_equal_those_of_the_predicted_boxes(frozen, phantom, tmp_path):
    out, found = frozen
    run(*TINY, f"run.out={out}", "--predict", phantom / "images", "--out", tmp_path / "found")
    classes = ["background", *found["boxes"]["test"]]
    predicted = []
    for name in (phantom / "test.txt").read_text().split():
        content = json.loads((tmp_path / "found" / name).with_suffix(".json").read_text())
        assert content["slices"] == 1 and all(row["slice"] == 0 for row in content["boxes"])
        rows = [(*row["box"], classes.index(row["class"]), row["score"]) for row in content["boxes"]]
        table = np.array(rows).reshape(-1, 6)
        predicted.append(Found(table[:, :4], table[:, 4].astype(int), table[:, 5]))
    metrics = coco_metrics(boxes_in(phantom, "test"), predicted, classes)
    for name, one in metrics.items():  # boxes in the files are rounded to 0.01 px
        assert one["value"] == pytest.approx(found["metrics"][name]["value"], abs=1e-3), name


def test_boxes_of_a_volume_are_those_of_its_slices(frozen, phantom, tmp_path, nibabel):
    names = (phantom / "test.txt").read_text().split()
    hu = np.stack([read_slice(phantom / "images" / name) for name in names])  # (S, H, W), radiological
    between, row, column = read_properties(phantom).spacing[names[0].split("/")[0]]
    on_disk = hu.transpose(2, 1, 0)  # x to the patient's left, y to posterior, z to superior or inferior
    affine = np.diag([-column, -row, between, 1])
    save_volume(nibabel, tmp_path / "in/ct.nii.gz", on_disk.astype(np.int16), affine)
    run(*TINY, f"run.out={frozen[0]}", "--predict", tmp_path / "in", "--out", tmp_path / "out")
    content = json.loads((tmp_path / "out/ct.json").read_text())
    assert content["slices"] == len(names)
    run(*TINY, f"run.out={frozen[0]}", "--predict", phantom / "images", "--out", tmp_path / "slices")
    expected = []
    for index, name in enumerate(names):
        rows = json.loads((tmp_path / "slices" / name).with_suffix(".json").read_text())["boxes"]
        expected += [row | {"slice": index} for row in rows]
    own, expected = (sorted(tuple(row.values()) for row in rows) for rows in (content["boxes"], expected))
    assert len(own) == len(expected) > 10  # of equal scores the order is free
    for (*own_name, box, score), (*name, other_box, other_score) in zip(own, expected):
        assert own_name == name and box == pytest.approx(other_box, abs=0.02)
        assert score == pytest.approx(other_score, abs=2e-4)


@pytest.mark.parametrize("mode", ("frozen", "finetune"))
def test_it_goes_on_where_it_was_stopped(phantom, tmp_path, monkeypatch, mode):
    settings = [f"mode={mode}", "optim.steps=6", "eval.every=4"]
    whole = evaluate(phantom, tmp_path / "whole", *settings)
    out, steps = tmp_path / "run", iter(range(6))

    def asked(self):
        self.reason = "SIGTERM" if next(steps) == 2 else ""
        return bool(self.reason)

    monkeypatch.setattr(stopping.StopRequest, "__bool__", asked)
    assert run(*TINY, f"data.root={phantom}", f"run.out={out}", "encoder=random", *settings) == 75
    monkeypatch.undo()
    again = evaluate(phantom, out, *settings)
    assert again["metrics"] == whole["metrics"]
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "whole", out)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_two_processes_write_one_result(phantom, tmp_path, free_port):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [f"--master_port={free_port}", "tests/tiny.py", "eval_det.py", *TINY, f"data.root={phantom}"]
    command += [f"run.out={tmp_path}/run", "encoder=random"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "run/results.json").read_text())
    run(*TINY, f"run.out={tmp_path}/run", "--predict", phantom / "images", "--out", tmp_path / "found")
    assert len(list((tmp_path / "found").rglob("*.json"))) == 30
    assert 0 <= found["metrics"]["AP50"]["value"] <= 1


def test_the_encoders_rate_is_its_own(phantom, tmp_path):
    """With a factor of 1e-9 the trained encoder stays the random one, and everything else learns."""
    evaluate(
        phantom, tmp_path / "run", "mode=finetune", "optim.encoder_lr_factor=1e-9", "optim.weight_decay=0"
    )
    state = torch.load(tmp_path / "run/model.pth", weights_only=True)["state"]
    torch.manual_seed(3)
    start = Encoder("tiny", 1, output_stride=32).state_dict()
    weights = [name for name in start if "running" not in name and "batches" not in name]
    assert all(torch.allclose(start[name], state[f"backbone.encoder.{name}"], atol=1e-6) for name in weights)
    assert not torch.equal(start["bn1.running_mean"], state["backbone.encoder.bn1.running_mean"])


# ---- What it refuses -----------------------------------------------------------------------------


def refused(root, out, message, *overrides, error=ConfigError):
    with pytest.raises(error, match=message) as raised:
        evaluate(root, out, *overrides)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_evaluated_is_one_line(phantom, tmp_path, frozen):
    out = tmp_path / "run"
    refused(
        phantom,
        out,
        "masks of 18 slices, the first .*: no component of boxes.min_pixels=4000",
        "boxes.min_pixels=4000",
        error=DataError,
    )
    refused(phantom, out, "boxes.min_pixels", "boxes.min_pixels=0")
    refused(phantom, out, "model.width", "model.width=0")
    refused(phantom, out, "mode", "mode=linear")
    refused(phantom, out, "optim.lr: the loss is", "optim.lr=1e9", "mode=finetune")
    refused(phantom, frozen[0], "model.width: .* holds a run with 16, not 8", "model.width=8")
    with pytest.raises(ConfigError, match=r"no trained model in .*\(model.pth\)"):
        run(*TINY, f"run.out={tmp_path}/none", "--predict", phantom / "images", "--out", tmp_path / "out")
    (tmp_path / "bad").mkdir()
    torch.save({"state": {}}, tmp_path / "bad/model.pth")
    with pytest.raises(WeightsError, match="not a model of this program"):
        run(*TINY, f"run.out={tmp_path}/bad", "--predict", phantom / "images", "--out", tmp_path / "out")


@pytest.mark.parametrize("package, module", (("pycocotools", "pycocotools.coco"), ("scipy", "scipy")))
def test_a_missing_extra_is_named_before_anything_is_trained(phantom, tmp_path, monkeypatch, package, module):
    monkeypatch.setitem(sys.modules, module, None)
    refused(phantom, tmp_path / "run", f"pip install {package}")
    assert not (tmp_path / "run").exists()
