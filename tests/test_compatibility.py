"""Data sets and weights as others lay them out: docs/COMPATIBILITY.md, line by line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import eval_seg
import train_moco
from ct.slices import write_png
from models import LAYERS, Encoder
from weights import load_encoder_weights

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL = ["run.device=cpu", "data.workers=0", "model.arch=tiny"]


def draw(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, values)


@pytest.fixture(scope="module")
def abdomen1k(tmp_path_factory):
    """16-bit PNGs of HU + 1024 and one list with a second column, as mmcls has it."""
    root, rng = tmp_path_factory.mktemp("abdomen1k"), np.random.default_rng(0)
    names = [f"Case_{case:05d}_0000/{index:03d}.png" for case in (1, 2) for index in range(6)]
    for name in names:
        draw(root / "images" / name, rng.integers(0, 2500, (48, 48)).astype(np.uint16))
    (root / "train_abdomen.txt").write_text("".join(f"{name} 0\n" for name in names))
    return root


@pytest.fixture(scope="module")
def btcv(tmp_path_factory):
    """mmseg's layout: img_dir and ann_dir with a folder for each split, lists of names without suffix."""
    root, rng = tmp_path_factory.mktemp("btcv"), np.random.default_rng(0)
    for split, cases in (("train", (5, 6, 7)), ("val", (9,)), ("test", (1, 2))):
        names = [f"img{case:04d}_slice{index:03d}" for case in cases for index in range(4)]
        for name in names:
            draw(root / f"img_dir/{split}/{name}.png", rng.integers(0, 2500, (48, 48)).astype(np.uint16))
            draw(root / f"ann_dir/{split}/{name}.png", rng.integers(0, 14, (48, 48)).astype(np.uint8))
        (root / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


def call(script, root, out, config, *settings):
    given = ["--config", CONFIGS / config, f"data.root={root}", f"run.out={out}", *SMALL, *settings]
    assert script.main([str(one) for one in given]) == 0


def pretrain(root, out, config, *settings):
    tiny = [
        "data.size=64",
        "optim.batch_size=4",
        "optim.max_steps=2",
        "model.queue_size=8",
        "model.bn_split=4",
    ]
    call(train_moco, root, out, config, *tiny, *settings)


def evaluate(root, out, config, *settings):
    tiny = ["optim.steps=2", "optim.batch_size=4", "eval.every=2", "model.output_stride=16"]
    call(eval_seg, root, out, config, *tiny, *settings)
    return json.loads((out / "results.json").read_text())


def test_abdomen1k_then_btcv_as_they_come(abdomen1k, btcv, tmp_path):
    pretrain(abdomen1k, tmp_path / "pretrain", "abdomen1k.yaml")
    card = json.loads((tmp_path / "pretrain/encoder.json").read_text())
    assert {"slices": 12, "cases": 2, "size": [48, 48], "kind": "hu"}.items() <= card["data"].items()
    encoder = f"encoder={tmp_path / 'pretrain/encoder.pth'}"
    linear = evaluate(btcv, tmp_path / "linear", "btcv_linear.yaml", encoder)
    assert sorted(linear["cases"]) == ["img0001_slice", "img0002_slice"]
    assert list(linear["dice"])[0] == "spleen" and len(linear["dice"]) == 13
    half = evaluate(btcv, tmp_path / "half", "btcv_linear_50.yaml", encoder)
    assert half["mode"] == "linear" and half["label_fraction"] == 0.5
    for config, fraction in (("btcv_finetune.yaml", 1), ("btcv_50.yaml", 0.5)):
        tuned = evaluate(btcv, tmp_path / config, config, encoder, "data.size=32")
        assert tuned["mode"] == "finetune" and tuned["label_fraction"] == fraction


@pytest.mark.parametrize("config", ("paper.yaml", "released_code.yaml"))
def test_the_papers_settings_run(abdomen1k, tmp_path, config):
    pretrain(abdomen1k, tmp_path, config, "model.init=random")
    assert (tmp_path / "encoder.pth").is_file()
    with Image.open(tmp_path / "features.png") as page:
        assert page.width > 1000 and page.height > 1000  # eight slices and their features


def test_tensorboard_gets_numbers_and_pictures(abdomen1k, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("matplotlib")
    pretrain(abdomen1k, tmp_path, "abdomen1k.yaml")
    board = accumulator.EventAccumulator(str(tmp_path))
    board.Reload()
    assert {"features", "spectrum"} <= {*board.Tags()["images"]}
    assert {"loss", "local", "lr", "effective_rank", "dse"} <= {*board.Tags()["scalars"]}
    assert [event.step for event in board.Images("spectrum")] == [0, 2]


def test_imagenet_weights_are_a_baseline(btcv, tmp_path, monkeypatch):
    torch.manual_seed(0)
    weights = tmp_path / "home/.cache/torch/hub/checkpoints/resnet50-0676ba61.pth"
    weights.parent.mkdir(parents=True)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), weights)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    settings = ("model.arch=resnet18", "data.size=32")
    results = evaluate(btcv, tmp_path / "out", "btcv_imagenet.yaml", *settings)
    assert results["mode"] == "finetune" and results["encoder"].startswith("torchvision:~")


# ---- Weights out ----


@pytest.fixture(scope="module", params=["resnet18", "resnet50"])
def exported(request):
    """An encoder with the paper's whitening, and what it is exported as."""
    torch.manual_seed(0)
    encoder = Encoder(request.param, whitening="iternorm", group_size=0)
    encoder(torch.randn(8, 1, 32, 32))
    return encoder.eval(), encoder.export_state_dict()


def same_function(encoder, trunk):
    x = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(trunk(x), encoder(x)["layer4"], atol=1e-4, rtol=1e-4)


def test_weights_go_strictly_into_torchvision(exported):
    encoder, state = exported
    model = getattr(torchvision.models, encoder.arch)(weights=None)
    model.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    model.fc = torch.nn.Identity()
    assert model.load_state_dict(state, strict=True) == ([], [])  # nothing missing, nothing left over
    model.avgpool = torch.nn.Identity()
    shape = (2, encoder.channels["layer4"], 2, 2)
    same_function(encoder, lambda x: model.eval()(x).view(shape))


def test_weights_go_strictly_into_timm_and_come_back(exported, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    encoder, state = exported
    model = timm.create_model(encoder.arch, in_chans=1, num_classes=0)
    model.load_state_dict(state)
    same_function(encoder, model.eval().forward_features)
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    again = Encoder(encoder.arch).eval()
    assert load_encoder_weights(again, tmp_path / "timm.pth").left_out == []
    same_function(again, model.forward_features)


def torchvision_detector(state):
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, image_mean=[0.0], image_std=[1.0], min_size=64, max_size=64
    )
    model.backbone.body.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    model.backbone.body.load_state_dict(state)
    with torch.no_grad():
        assert len(model.eval()([torch.rand(1, 64, 64)])) == 1
    return lambda x: list(model.backbone.body(x).values())


def timm_features(state):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model = timm.create_model("resnet50", features_only=True, in_chans=1)
    model.load_state_dict(state)
    return model.eval()


def smp_unet(state):
    smp = pytest.importorskip("segmentation_models_pytorch", reason="it is not installed")
    model = smp.Unet("resnet50", encoder_weights=None, in_channels=1, classes=14)
    model.encoder.load_state_dict(state)
    return model.eval().encoder


def monai_unet(state):
    nets = pytest.importorskip("monai.networks.nets", reason="monai is not installed")
    model = nets.FlexibleUNet(1, 14, "resnet50", spatial_dims=2)
    model.encoder.load_state_dict(state)
    return model.eval().encoder


@pytest.mark.parametrize("exported", ["resnet50"], indirect=True, scope="module")
@pytest.mark.parametrize("build", [torchvision_detector, timm_features, smp_unet, monai_unet])
def test_other_tools_make_the_same_maps(exported, build):
    """Of all four layers, as docs/COMPATIBILITY.md has them."""
    encoder, state = exported
    maps_of, x = build(state), torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        last_four, own = maps_of(x)[-4:], encoder(x, LAYERS).values()
        for found, wanted in zip(last_four, own, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_weights_go_into_mmseg_under_a_prefix(exported, tmp_path):
    """Its ResNet (depth 18 or 50, no deep stem) has torchvision's names below `backbone.`."""
    encoder, state = exported
    torch.save({"state_dict": {f"backbone.{name}": v for name, v in state.items()}}, tmp_path / "mmseg.pth")
    again = Encoder(encoder.arch).eval()
    assert load_encoder_weights(again, tmp_path / "mmseg.pth").prefix == "backbone."
    same_function(again, lambda x: encoder(x)["layer4"])


def detectron2_name(name: str) -> str:
    """As docs/COMPATIBILITY.md gives it."""
    for number in range(1, 5):
        name = name.replace(f"layer{number}.", f"res{number + 1}.")
    for number in range(1, 4):
        name = name.replace(f"bn{number}.", f"conv{number}.norm.")
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    return name if name.startswith("res") else f"stem.{name}"


def test_weights_get_detectron2s_names(exported):
    encoder, state = exported
    names = {detectron2_name(name) for name in state if not name.endswith("num_batches_tracked")}
    norm = ("weight", "bias", "running_mean", "running_var")
    convolutions = ["stem.conv1"]
    for stage, layer in enumerate((encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4), 2):
        for index, block in enumerate(layer):
            parts = ["conv1", "conv2"] + ["conv3"] * hasattr(block, "conv3")
            parts += ["shortcut"] * (block.downsample is not None)
            convolutions += [f"res{stage}.{index}.{part}" for part in parts]
    wanted = {f"{conv}.weight" for conv in convolutions}
    wanted |= {f"{conv}.norm.{value}" for conv in convolutions for value in norm}
    assert names == wanted
