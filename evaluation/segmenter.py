"""The segmentation model as an evaluation uses it: what it is, its file, and its logits.

LinearProbe             frozen encoder and linear decoder; its rival, DeepLabV3Plus, is in models.py
save_model, load_model  model.pth: the weights with all that is needed to use them
segmentation_logits     of whole slices, or of windows of them
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ct.properties import Facts, parse_facts
from ct.slices import IGNORE, MAX_SIDE, DataError
from data import Intensity
from engine.config import ConfigError
from engine.files import written_whole
from engine.process import Process
from models import DeepLabV3Plus, Encoder, LinearDecoder, WeightsError, fits, read_weights, upsample

SMALLEST_WINDOW = 64  # px


class LinearProbe(nn.Module):
    """A frozen encoder, always in evaluation mode, and a linear decoder on its layer4."""

    def __init__(self, encoder: Encoder, num_classes: int):
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.decoder = LinearDecoder(encoder.channels["layer4"], num_classes)

    def train(self, mode: bool = True):
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) -> logits (N, K, h, w) at the encoder's output stride."""
        return self.decoder(frozen_features(self.encoder, images))


@torch.no_grad()
def frozen_features(encoder: Encoder, images: Tensor) -> Tensor:
    """layer4 (N, D, h, w) of normalised images (N, C, H, W)."""
    return encoder(images)["layer4"].contiguous()


@dataclass
class Description:
    """What it takes to rebuild and use a trained model; in model.pth beside the weights."""

    mode: str
    arch: str
    in_channels: int
    output_stride: int
    classes: list[str]
    normalisation: dict
    facts: Facts  # of the slices that it was trained on


def build_model(about: Description, encoder: Encoder, process: Process) -> nn.Module:
    build = LinearProbe if about.mode == "linear" else DeepLabV3Plus
    model = build(encoder, len(about.classes))
    return model.to(process.device, memory_format=torch.channels_last)


def save_model(path: Path, model: nn.Module, about: Description) -> None:
    with written_whole(path) as file:
        torch.save({"about": asdict(about), "state": model.state_dict()}, file)


def load_model(path: Path, process: Process) -> tuple[nn.Module, Description]:
    """Raises ConfigError if there is none, WeightsError if the file is damaged."""
    if not path.is_file():
        raise ConfigError(f"run.out: no trained model in {path.parent} (model.pth); evaluate there first")
    content = read_weights(path)
    try:
        about, state = description_of(content["about"]), content["state"]
        sound = isinstance(state, dict) and 1 < len(about.classes) <= IGNORE
        sound = sound and about.in_channels == state["encoder.conv1.weight"].shape[1]
        if not sound or not Intensity(**about.normalisation)(torch.zeros(1)).isfinite():
            raise ValueError
        encoder = Encoder(about.arch, about.in_channels, output_stride=about.output_stride)
        model = build_model(about, encoder, process)
        if not fits(state, model.state_dict()):
            raise ValueError
        model.load_state_dict(state)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RuntimeError, AttributeError):
        raise WeightsError(f"{path}: not a model of this program, or damaged") from None
    return model.eval(), about


def description_of(saved: dict) -> Description:
    """From a file; models from before 26 November 2026 know of their slices whether they hold HU."""
    facts = saved.get("facts", {"kind": saved.get("stored")})
    rest = {name: value for name, value in saved.items() if name not in ("facts", "stored")}
    return Description(**rest, facts=parse_facts(facts, "model.pth"))


def at_size(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (N, K, h, w) upsampled bilinearly to (N, K, H, W) in float32."""
    return logits.float() if logits.shape[2:] == size else upsample(logits.float(), size)


def segmentation_logits(
    model: nn.Module, inputs: Tensor, size: tuple[int, int], window: int | None, overlap: float
) -> Tensor:
    """Logits (N, K, H, W) at `size`, of whole slices or, with a window (px), the mean over such windows.

    What a device has no memory for is tried again in smaller batches, then in smaller windows. Only images
    can be divided into windows: of features the window must be None.
    """
    try:
        if window is None or window >= max(inputs.shape[2:]):
            return at_size(model(inputs), size)
        return windowed_logits(model, inputs, window, overlap)
    except torch.OutOfMemoryError:
        pass  # what follows must not happen in here: the error holds on to the memory
    if len(inputs) > 1:
        halves = [segmentation_logits(model, half, size, window, overlap) for half in inputs.tensor_split(2)]
        return torch.cat(halves)
    smaller = min(window or MAX_SIDE, *inputs.shape[2:]) // 2
    if smaller < SMALLEST_WINDOW or inputs.shape[2:] != size:
        raise DataError(f"no memory for a slice of {size[0]} x {size[1]} px")
    return segmentation_logits(model, inputs, size, smaller, overlap)


def windowed_logits(model: nn.Module, images: Tensor, window: int, overlap: float) -> Tensor:
    """Logits (N, K, H, W) of images (N, C, H, W): the mean over all windows that hold a pixel."""
    height, width = images.shape[2:]
    total, count = None, images.new_zeros(height, width)
    for top in window_starts(height, window, overlap):
        for left in window_starts(width, window, overlap):
            place = (..., slice(top, top + window), slice(left, left + window))
            view = images[place]
            part = at_size(model(view), view.shape[2:])
            if total is None:
                total = part.new_zeros(*part.shape[:2], height, width)
            total[place] += part
            count[place] += 1
    return total / count


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Where windows begin that cover `length` px evenly, neighbours sharing `overlap` of a window or more."""
    if window >= length:
        return [0]
    gaps = math.ceil((length - window) / max(1, window * (1 - overlap)))
    return [round(i * (length - window) / gaps) for i in range(gaps + 1)]
