"""Weights by whatever name and of whatever network: taken, or refused with what the file holds."""

import json
from copy import deepcopy as copy_of

import pytest
import torch
import torchvision
from tiny import tiny_resnet
from torch import nn

import eval_seg
import weights
from models import ARCHITECTURES, Encoder
from weights import WeightsError, architecture_of, load_encoder_weights, weights_file

EVALUATE = ["data.workers=0", "run.device=cpu", "model.output_stride=16"]
EVALUATE += ["optim.steps=1", "optim.batch_size=4"]

# ---- By whatever name ---------------------------------------------------------------------------


@pytest.fixture
def pretrained(tmp_path):
    """A run's folder, with encoder.pth and nothing else."""
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save(Encoder("tiny").export_state_dict(), folder / "encoder.pth")
    return folder


def test_a_name_of_weights_is_a_file_or_a_runs_folder(pretrained, monkeypatch):
    file = pretrained / "encoder.pth"
    monkeypatch.setenv("HOME", str(pretrained.parent))
    for start in ("", "torchvision:"):
        for name in (pretrained, f"{pretrained}/", file, "~/run", "~/run/encoder.pth"):
            assert weights_file(f"{start}{name}") == file
    assert load_encoder_weights(Encoder("tiny"), "torchvision:~/run").path == str(file)
    assert architecture_of(pretrained) == "tiny"


def test_a_folder_without_an_encoder_says_what_it_has(tmp_path):
    with pytest.raises(
        WeightsError, match="a folder without encoder.pth; there are no weights in its folder"
    ):
        weights_file(tmp_path)
    (tmp_path / "model.pth").touch()
    with pytest.raises(WeightsError, match="without encoder.pth; there are model.pth$"):
        weights_file(tmp_path)
    with pytest.raises(WeightsError, match="encodr.pth: no such file; there are model.pth$"):
        weights_file(tmp_path / "encodr.pth")
    (tmp_path / "checkpoint.pth").touch()
    with pytest.raises(
        WeightsError, match="there are checkpoint.pth, model.pth, so that run is not finished"
    ):
        weights_file(tmp_path / "encoder.pth")
    with pytest.raises(WeightsError, match="~nobody-of-that-name/x.pth: no such file"):
        load_encoder_weights(Encoder("tiny"), "~nobody-of-that-name/x.pth")


def test_both_scripts_take_a_runs_folder(train, phantom, tmp_path, capsys):
    train("first", "optim.max_steps=1")
    train("second", "optim.max_steps=1", f"model.init=torchvision:{tmp_path / 'first'}")
    assert f"{tmp_path / 'first/encoder.pth'}: loaded" in capsys.readouterr().out
    out = tmp_path / "linear"
    arguments = [*EVALUATE, f"data.root={phantom}", f"run.out={out}", f"encoder={tmp_path / 'second'}"]
    assert eval_seg.main(arguments) == 0
    results = json.loads((out / "results.json").read_text())
    card = json.loads((tmp_path / "second/encoder.json").read_text())
    assert results["encoder_sha256"] == card["sha256"]
    capsys.readouterr()
    eval_seg.main(["--compare", str(out)])
    assert f"| {tmp_path / 'second'} |" in capsys.readouterr().out


def test_the_architecture_is_that_of_the_file_where_nothing_says_it(phantom, pretrained, tmp_path, capsys):
    arguments = [*EVALUATE, f"data.root={phantom}", f"run.out={tmp_path / 'out'}", f"encoder={pretrained}"]
    assert eval_seg.main(arguments) == 0
    file = pretrained / "encoder.pth"
    assert f"model.arch: tiny, as the weights in {file} show" in capsys.readouterr().out
    with pytest.raises(WeightsError, match="holds a tiny, not a resnet18; model.arch=tiny"):
        eval_seg.main([*arguments, "model.arch=resnet18", f"run.out={tmp_path / 'other'}"])


# ---- Under whatever names in the file -----------------------------------------------------------


class Wrapped(nn.Module):
    """A network of somebody's, with a ResNet's parts under these names."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def compiled(module):
    """Under the name that torch.compile gives it, without the seconds that it takes to import."""
    return Wrapped(_orig_mod=module)


def compiled_inside(resnet):
    resnet.layer1, resnet.layer3[1] = compiled(resnet.layer1), compiled(resnet.layer3[1])
    return nn.DataParallel(resnet)


def with_a_momentum_copy(parts):
    copy = copy_of(nn.Sequential(*parts[:-1]))
    for value in copy.parameters():
        value.data.zero_()
    return Wrapped(backbone_momentum=copy, backbone=nn.Sequential(*parts[:-1]))


NETWORKS = {  # from a ResNet and its parts, of which the last two are the pooling and fc: what is saved
    "all but fc": lambda resnet, parts: nn.Sequential(*parts[:-1]),
    "RadImageNet": lambda resnet, parts: Wrapped(backbone=nn.Sequential(*parts[:9])),
    "on several GPUs": lambda resnet, parts: nn.DataParallel(Wrapped(backbone=nn.Sequential(*parts[:9]))),
    "no pooling": lambda resnet, parts: nn.Sequential(*parts[:-2]),
    "only parts with weights": lambda resnet, parts: nn.Sequential(*parts[:2], *parts[4:8]),
    "a convolution at the end": lambda resnet, parts: nn.Sequential(*parts[:8], nn.Conv2d(128, 32, 1)),
    "body and head": lambda resnet, parts: nn.Sequential(nn.Sequential(*parts[:8]), nn.Linear(128, 3)),
    "the stem as one part": lambda resnet, parts: nn.Sequential(nn.Sequential(*parts[:4]), *parts[4:8]),
    "layer0": lambda resnet, parts: Wrapped(
        layer0=nn.Sequential(*parts[:4]), **{f"layer{i}": parts[3 + i] for i in range(1, 5)}
    ),
    "momentum": lambda resnet, parts: with_a_momentum_copy(parts),
    "compiled": lambda resnet, parts: compiled(nn.Sequential(*parts[:-1])),
    "compiled inside": lambda resnet, parts: Wrapped(model=compiled_inside(resnet)),
    "compiled parts": lambda resnet, parts: nn.Sequential(*map(compiled, parts[:-1])),
}


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    network = tiny_resnet()
    network(torch.randn(4, 1, 64, 64))  # norms get statistics of their own
    return network.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_numbered_and_wrapped_parts_load_bit_for_bit(resnet, tmp_path, name):
    network = copy_of(resnet)
    torch.save(
        {"state_dict": NETWORKS[name](network, [*network.children()]).state_dict()}, tmp_path / "x.pth"
    )
    encoder = Encoder("tiny").eval()
    assert load_encoder_weights(encoder, tmp_path / "x.pth").loaded == len(encoder.state_dict())
    x = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(encoder(x)["layer4"], nn.Sequential(*[*resnet.children()][:-2])(x))


def test_a_numbered_resnet50_is_read(holding):
    with torch.device("meta"):
        parts = [*torchvision.models.resnet50().children()]
    file = holding(Wrapped(backbone=nn.Sequential(*parts[:9])).state_dict())
    assert architecture_of(file) == "resnet50"
    state, prefix, names, _ = weights.read_resnet(file)
    wanted = on_meta(lambda: Encoder("resnet50", in_channels=3)).state_dict()
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in wanted.items()}
    assert prefix == "backbone." and len(names) == 318


SEQUENTIALS = {  # of such a ResNet's parts and others; what is said of them
    "a norm before": (lambda own: [nn.BatchNorm2d(1), *own[:8]], "other parts than a convolution and a norm"),
    "without conv1": (lambda own: own[1:8], "other parts than a convolution and a norm"),
    "without a stem": (lambda own: own[4:8], "tensors called 0.0.conv1.weight.*not the weights of a ResNet"),
    "one between": (lambda own: [*own[:5], nn.Conv2d(16, 16, 1), *own[5:8]], "layer2.0.conv1.weight is"),
    "a bias": (lambda own: [nn.Conv2d(1, 64, 7), *own[1:8]], "conv1.bias has no place"),
    "a small stem": (lambda own: [nn.Conv2d(1, 64, 3, bias=False), *own[1:8]], "only the 7x7 stem"),
    "other layers": (lambda own: [nn.Conv2d(3, 8, 3), nn.Linear(8, 2)], "tensors called 0.weight, 0.bias"),
}


@pytest.mark.parametrize("name", SEQUENTIALS)
def test_a_sequential_of_something_else_is_one_line(resnet, tmp_path, name):
    build, found = SEQUENTIALS[name]
    torch.save(nn.Sequential(*build([*copy_of(resnet).children()])).state_dict(), tmp_path / "x.pth")
    encoder = Encoder("tiny")
    before = copy_of(encoder.state_dict())
    with pytest.raises(WeightsError, match=f"x.pth: .*{found}") as error:
        load_encoder_weights(encoder, tmp_path / "x.pth")
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())


# ---- Of whatever network ------------------------------------------------------------------------


def on_meta(build):
    with torch.device("meta"):
        return build()


@pytest.fixture
def holding(monkeypatch, tmp_path):
    """A file that holds the weights of a network, without the gigabytes: all that is read is their shapes."""

    def hold(state):
        small = {
            name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in state.items()
        }
        monkeypatch.setattr(weights, "read_weights", lambda path: {"state_dict": small})
        monkeypatch.setattr(weights, "is_sound", lambda value: True)
        (tmp_path / "x.pth").touch()
        return tmp_path / "x.pth"

    return hold


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_our_architectures_are_recognised_and_named(holding, arch):
    file = holding(on_meta(lambda: Encoder(arch)).state_dict())
    assert architecture_of(file) == arch
    other = "resnet50" if arch != "resnet50" else "resnet34"
    with pytest.raises(WeightsError) as error:
        load_encoder_weights(on_meta(lambda: Encoder(other)), file)
    assert str(error.value) == f"{file}: holds a {arch}, not a {other}; model.arch={arch}"


@pytest.mark.parametrize("name", weights.PUBLISHED)
def test_other_resnets_are_named(holding, name):
    file = holding(on_meta(getattr(torchvision.models, name)).state_dict())
    assert architecture_of(file) is None
    for arch in ("resnet50", "resnet101"):
        with pytest.raises(WeightsError) as error:
            load_encoder_weights(on_meta(lambda arch=arch: Encoder(arch)), file)
        assert str(error.value) == f"{file}: holds a {name}, not a {arch}"


def test_a_resnet_that_nobody_knows_is_described(holding):
    block, depths = torchvision.models.resnet.Bottleneck, [3, 3, 3, 3]
    file = holding(on_meta(lambda: torchvision.models.ResNet(block, depths)).state_dict())
    with pytest.raises(
        WeightsError, match="a ResNet of 3-3-3-3 bottleneck blocks, the first with 64 channels"
    ):
        load_encoder_weights(Encoder("tiny"), file)


TORCHVISIONS = {
    "vit_b_16": "a vision transformer",
    "swin_t": "a Swin transformer",
    "swin_v2_t": "a Swin transformer",
    "convnext_tiny": "a ConvNeXt",
    "densenet121": "a DenseNet",
    "efficientnet_b0": "an EfficientNet",
    "efficientnet_v2_s": "an EfficientNet",
    "mobilenet_v2": "an EfficientNet or a MobileNet",
    "mobilenet_v3_small": "an EfficientNet or a MobileNet",
    "vgg16": "a VGG or an AlexNet",
    "vgg11_bn": "a VGG or an AlexNet",
    "alexnet": "a VGG or an AlexNet",
}


@pytest.mark.parametrize("name", TORCHVISIONS)
def test_networks_of_torchvision_that_are_no_resnets(holding, name):
    file = holding(on_meta(getattr(torchvision.models, name)).state_dict())
    with pytest.raises(
        WeightsError, match=rf"x.pth: holds {TORCHVISIONS[name]}.*, not the weights of a ResNet"
    ):
        load_encoder_weights(Encoder("tiny"), file)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("encoder.stages.0.0.convs.0.conv.weight", "a U-Net of nnU-Net"),
        ("conv_blocks_context.0.blocks.0.conv.weight", "a U-Net of nnU-Net"),
        ("inc.double_conv.0.weight", "a U-Net"),
        ("down1.maxpool_conv.1.double_conv.0.weight", "a U-Net"),
        ("model.0.conv.unit0.conv.weight", "a U-Net"),
        ("upcat_4.upsample.deconv.weight", "a U-Net"),
        ("blocks.0.attn.qkv.weight", "a vision transformer"),
        ("module.backbone.cls_token", "a vision transformer"),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", "a vision transformer"),
        ("swinViT.layers1.0.blocks.0.attn.proj.weight", "a Swin transformer"),
        ("layers.0.blocks.0.attn.relative_position_bias_table", "a Swin transformer"),
        ("stages.0.0.dwconv.weight", "a ConvNeXt"),
        ("stages.0.blocks.0.conv_dw.weight", "a ConvNeXt"),
        ("blocks.0.0.conv_dw.weight", "an EfficientNet"),
        ("_blocks.0._depthwise_conv.weight", "an EfficientNet"),
        ("features.denseblock1.denselayer1.conv1.weight", "a DenseNet"),
        ("backbone.bottom_up.res2.0.conv1.weight", "a ResNet under Detectron2's names"),
        (
            "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight",
            "a ResNet under the names of Hugging",
        ),
        ("decoder.weight", r"tensors called decoder.weight, not"),
    ],
)
def test_networks_of_other_libraries_by_their_names(tmp_path, name, found):
    torch.save({"epoch": 3, "state_dict": {name: torch.zeros(2, 2)}}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=f"x.pth: holds {found}"):
        load_encoder_weights(Encoder("tiny"), tmp_path / "x.pth")


def test_files_of_this_project_that_are_no_encoder_are_named(tmp_path):
    weights = Encoder("tiny").state_dict()
    decoder = {"trained": {"classifier.weight": torch.zeros(3)}, "encoder_sha256": None}
    torch.save(decoder, tmp_path / "checkpoint.pth")
    with pytest.raises(WeightsError, match="holds a checkpoint of eval_seg.py, not the weights of a ResNet"):
        load_encoder_weights(Encoder("tiny"), tmp_path / "checkpoint.pth")
    model = {"about": {}, "state": {f"encoder.{name}": value for name, value in weights.items()}}
    torch.save(model, tmp_path / "model.pth")
    report = load_encoder_weights(Encoder("tiny"), tmp_path / "model.pth")
    assert str(report).endswith("from a model of eval_seg.py")


@pytest.mark.parametrize(
    ("start", "found"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n <?xml version", "a web page"),
        (b'\x40\0\0\0\0\0\0\0{"conv1.weight": {}}', "a file of safetensors"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"weights: none", "not a weights file"),
    ],
)
def test_files_of_other_formats_are_named(tmp_path, start, found):
    (tmp_path / "x.pth").write_bytes(start)
    with pytest.raises(WeightsError, match=f"x.pth: {found}") as error:
        load_encoder_weights(Encoder("tiny"), tmp_path / "x.pth")
    assert "\n" not in str(error.value)


def changed(changes):
    state = Encoder("tiny").export_state_dict()
    for name, value in changes.items():
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"layer1.0.se.fc1.weight": torch.zeros(4, 16)}, "layer1.0.se.fc1.weight has no place"),
        ({"layer4.1.conv2.weight": None}, "layer4.1.conv2.weight is missing"),
        ({"conv1.weight": torch.zeros(64, 1, 3, 3)}, "its first convolution is 3 x 3; only the 7x7 stem"),
        ({"conv1.weight": torch.zeros(64, 1, 7, 7, 7)}, "conv1.weight is"),
        ({"layer1.0.conv1.weight": torch.zeros(16, 16, 3, 3, 3)}, "a ResNet of 3D convolutions"),
        ({"bn1.running_var": -torch.ones(64)}, "damaged, bn1.running_var is negative"),
        ({"bn1.running_var": torch.full((64,), torch.nan)}, "bn1.running_var is not a tensor of finite"),
        ({"layer2.0.conv1.weight": torch.zeros(())}, "layer2.0.conv1.weight is"),
    ],
)
def test_what_is_wrong_with_a_resnet_is_said(tmp_path, changes, found):
    torch.save(changed(changes), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=found) as error:
        load_encoder_weights(Encoder("tiny"), tmp_path / "x.pth")
    assert "\n" not in str(error.value)
