"""Weights as files: ours and other people's, read and recognised without running anything from them.

    weights_file, initial_weights    the file that a name in a setting stands for
    read_resnet                      the ResNet in a file, whatever else the file holds
    read_weights                     all of a checkpoint
    is_sound, fits                   whether what was read can be used

`models.load_encoder_weights` puts into an encoder what is read here. This file needs torch only.
"""

import pickle
import re
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor


class WeightsError(ValueError):
    """A weights file that cannot be used; the message is one line that names it."""


# ---- Which file ----------------------------------------------------------------------------------


def weights_file(name: str | Path) -> Path:
    """The file that a name of weights stands for: of a run's folder its encoder.pth; a path may begin with ~
    or with "torchvision:".

    Raises:
        WeightsError: a folder without an encoder; the message says what is there.
    """
    path = Path(str(name).removeprefix("torchvision:"))
    with suppress(RuntimeError):  # no such user
        path = path.expanduser()
    file = path / "encoder.pth" if path.is_dir() else path
    if file.exists() or not file.parent.is_dir():
        return file
    weights = sorted(one.name for one in file.parent.iterdir() if one.suffix in (".pth", ".pt", ".ckpt"))
    there = f"there are {', '.join(weights[:5])}" if weights else "there are no weights in its folder"
    if "checkpoint.pth" in weights:
        there += ", so that run is not finished"
    found = "no such file" if file == path else "a folder without encoder.pth"
    raise WeightsError(f"{path}: {found}; {there}")


def initial_weights(name: str) -> Path | None:
    """The file that a setting of weights names, as `weights_file` takes it; None for "random"."""
    return None if name == "random" else weights_file(name)


# ---- The ResNet in it ----------------------------------------------------------------------------


MARK = "layer1.0.conv1.weight"  # every ResNet checkpoint has it, whatever stands before it
FAMILIES = {  # of other networks, and what names of their weights hold in the usual libraries
    "a U-Net of nnU-Net": r"stages\.\d+\.\d+\.convs\.|conv_blocks_context\.|decoder\.seg_layers\.",
    "a Swin transformer": r"relative_position_bias_table|\.cpb_mlp\.|swinViT\.",
    "a vision transformer (ViT)": r"\b(cls_token|class_token|pos_embed|pos_embedding|position_embeddings)$|"
    r"\.attn\.qkv\.|visual\.transformer\.",
    "a ConvNeXt": r"\.dwconv\.|stages\.\d+\.blocks\.\d+\.conv_dw|layer_scale|downsample_layers\.",
    "a DenseNet": r"denseblock\d|denselayer\d",
    "an EfficientNet or a MobileNet": r"_depthwise_conv|\bblocks\.\d+\.\d+\.(conv_pw|conv_dw|se)\b|"
    r"features\.\d+\.(\d+\.block\.\d+\.\d|conv\.\d|block\.\d+\.\d)",
    "a ResNet under Detectron2's names": r"\bres[2-5]\.0\.conv1\.",
    "a ResNet under the names of Hugging Face": r"encoder\.stages\.0\.layers\.0\.layer\.",
    "a U-Net": r"double_conv|\b(down|up)_?\d\.|upcat_\d|\.conv\.unit\d|submodule\.1\.",
    "a VGG or an AlexNet": r"\bfeatures\.\d+\.weight$",
}
OURS = {  # what of this project a file is that holds these two
    "a model of eval_seg.py": ("about", "state"),
    "a checkpoint of train_moco.py": ("model", "running_statistics"),
    "a checkpoint of eval_seg.py": ("trained", "encoder_sha256"),
}
NUMBERS = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)
FOLLOWERS = (
    "encoder_k.",
    "momentum",
    "teacher",
    "target",
    "ema",
    "key.",
)  # copies that follow the trained one


def read_resnet(path: Path) -> tuple[dict[str, Tensor], str, list[str], str]:
    """The ResNet in a file, sound and of our kind: its state dict, what stands before its names in the file,
    the names of all tensors there, and what to say of the file."""
    content = read_weights(path)
    kind = next((kind for kind, keys in OURS.items() if set(keys) <= content.keys()), "")
    tensors = find_tensors(content)
    prefixes = [name.removesuffix(MARK) for name in tensors if name.endswith(MARK)]
    prefixes.sort(key=lambda prefix: any(word in prefix for word in FOLLOWERS))
    if not prefixes:
        raise WeightsError(f"{path}: holds {kind or other_network(content)}, not the weights of a ResNet")
    prefix = prefixes[0]
    own = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
    if any(name.startswith(("stem.", "conv1.0.")) for name in own):
        raise WeightsError(f"{path}: has a deep stem (ResNetV1c or -D); only the 7x7 stem can be loaded")
    if unsound := [name for name, value in own.items() if not is_sound(value)]:
        raise WeightsError(f"{path}: {unsound[0]} is not a tensor of finite numbers")
    if negative := [name for name, value in own.items() if is_negative(name, value)]:
        raise WeightsError(f"{path}: damaged, {negative[0]} is negative")
    if own[MARK].dim() == 5:
        raise WeightsError(f"{path}: holds a ResNet of 3D convolutions; ours see slices, in 2D")
    kernel = tuple(own.get("conv1.weight", torch.zeros(0, 0, 7, 7)).shape[2:])
    if len(kernel) == 2 and kernel != (7, 7):
        found = f"its first convolution is {kernel[0]} x {kernel[1]}"
        raise WeightsError(f"{path}: {found}; only the 7x7 stem can be loaded")
    return own, prefix, list(tensors), f", from {kind}" if kind else ""


def find_tensors(content: dict) -> dict[str, Tensor]:
    """The innermost dict of tensors that looks like a ResNet's, else an empty one."""
    if any(isinstance(name, str) and name.endswith(MARK) for name in content):
        return {name: v for name, v in content.items() if isinstance(name, str) and isinstance(v, Tensor)}
    for value in content.values():
        if isinstance(value, dict) and (found := find_tensors(value)):
            return found
    return {}


def other_network(content: dict) -> str:
    """What a file without a ResNet holds, as far as the names in it tell."""
    names = list(names_of_tensors(content))
    for family, pattern in FAMILIES.items():
        if known := next((name for name in names if re.search(pattern, name)), None):
            return f"{family} ({known})"
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"tensors called {shown}" if names else "no tensors"


def names_of_tensors(content: dict):
    for name, value in content.items():
        if isinstance(value, dict):
            yield from names_of_tensors(value)
        elif isinstance(value, Tensor) and isinstance(name, str):
            yield name


# ---- A checkpoint's content ----------------------------------------------------------------------


def read_weights(path: str | Path) -> dict:
    """A checkpoint's content, on the CPU, read without running code from it."""
    if not Path(path).is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        check_intact(path)
        with warnings.catch_warnings(action="ignore"):  # of old or sparse storage: is_sound decides
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if other := other_format(path):
            raise WeightsError(f"{path}: {other}") from None
        advice = "docs/COMPATIBILITY.md has how to keep only those"
        raise WeightsError(
            f"{path}: not a weights file, or it holds more than tensors: refused; {advice}"
        ) from None
    except Exception as e:  # zipfile, pickle and torch.load raise many kinds on damaged files
        if other := other_format(path):
            raise WeightsError(f"{path}: {other}") from None
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise WeightsError(f"{path}: cannot be read as weights ({reason})") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a state dict")
    return content


def other_format(path: str | Path) -> str:
    """What a file that torch.load does not know is, if its first bytes tell, and what to do; else nothing."""
    with open(path, "rb") as file:
        start = file.read(32)
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS in place of the file; git lfs pull fetches the file itself"
    if start.lstrip()[:1] == b"<":
        return "a web page in place of the file; download it again"
    if start[8:9] == b"{":
        return (
            "a file of safetensors; torch.save(safetensors.torch.load_file(FILE), NEW) makes one that is read"
        )
    if start.startswith(b"\x89HDF"):
        return "an HDF5 file, as Keras writes them; only files of PyTorch are read"
    return ""


def check_intact(path: str | Path) -> None:
    """Raise BadZipFile if bytes of the file have changed, which torch.load does not look at, or if it claims
    to hold more of them than it has."""
    if not zipfile.is_zipfile(path):  # written before PyTorch 1.6: without checksums
        return
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > Path(path).stat().st_size:
            raise zipfile.BadZipFile("damaged: it holds less than it says")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"damaged: wrong checksum of {damaged}")


# ---- What can be used ----------------------------------------------------------------------------


def is_sound(value) -> bool:
    """Whether a value of a checkpoint is a tensor of finite real numbers, all of which the file holds."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in NUMBERS
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()  # not expanded
        and bool(value.isfinite().all())
    )


def is_negative(name: str, value: Tensor) -> bool:
    """Whether a variance or a count is."""
    return name.endswith(("running_var", "num_batches_tracked")) and bool((value < 0).any())


def fits(state, own: dict) -> bool:
    """Whether a state dict from a checkpoint can be one of the same network as `own`: its names, shapes and
    types, finite numbers, no negative variance or count. What is no tensor in `own` is not looked at."""
    if not isinstance(state, dict) or state.keys() != own.keys():
        return False
    tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    return all(
        is_sound(state[name])
        and (state[name].shape, state[name].dtype) == (value.shape, value.dtype)
        and not is_negative(name, state[name])
        for name, value in tensors.items()
    )
