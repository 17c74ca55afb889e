"""The segmentation model as an evaluation uses it: its parts, its logits, and the masks that it predicts.

LinearProbe             frozen encoder and linear decoder; its rival, DeepLabV3Plus, is in models.py
segmentation_logits     of whole slices, or of windows of them
MaskPredictor           eval_seg.py --predict
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ct.grid import Grid
from ct.listing import stem_of
from ct.scans import is_named_scan
from ct.slices import MAX_SIDE, DataError, write_png
from ct.volumes import Volume, write_labels
from engine.process import Process
from evaluation.prediction import Predictor
from evaluation.trained import Description, load_model
from models import DeepLabV3Plus, Encoder, LinearDecoder, upsample

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


def build_model(about: Description, encoder: Encoder) -> nn.Module:
    build = LinearProbe if about.mode == "linear" else DeepLabV3Plus
    return build(encoder, len(about.classes))


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


class MaskPredictor(Predictor):
    """Slices become 8-bit PNGs of labels, volumes NIfTI on their own grid."""

    command, what = "eval_seg.py --predict", "masks"

    @staticmethod
    def load(path: Path, process: Process) -> tuple[nn.Module, Description]:
        return load_model(path, process, build_model)

    @staticmethod
    def name_of(path: Path, is_volume: bool) -> Path:
        if not is_volume:
            return path.with_suffix(".png")
        return path.with_name(stem_of(path.name) + ".nii.gz") if is_named_scan(path) else path

    def find(self, images: Tensor, grid: Grid, own: tuple, mm: tuple | None) -> list[np.ndarray]:
        """Labels (H, W) uint8 of each slice, on its own grid."""
        window = self.cfg.eval.window, self.cfg.eval.overlap
        labels = segmentation_logits(self.model, images, grid.size, *window).argmax(1).to(torch.uint8)
        return [*grid.back(labels.cpu(), own, mm).numpy()]

    def write(self, target: Path, found: list[np.ndarray], volume: Volume | None) -> None:
        if volume is None:
            write_png(target, found[0], self.command)
        else:
            write_labels(target, np.stack(found), volume, self.command)
