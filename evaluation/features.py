"""What a probe sees of a slice: each stage of a frozen encoder pooled, as a mean and as a small grid; or the
slice itself, scaled to 16 x 16 px."""

from collections.abc import Mapping
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from data import middle
from models import Encoder

STAGES = ("layer1", "layer2", "layer3", "layer4")
GRID_VALUES = 9216  # of a pooled grid at most, about as in Goyal et al., arXiv 1905.01235
RAW_SIDE = 16  # px


def pooled_stages(encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
    """Normalised images (n, C, H, W) -> {"layer4 mean": (n, D), "layer4 grid": (n, D * side * side), ...}.

    A grid has the largest side with at most GRID_VALUES values that the map allows; with side 1 it is the
    mean, and left out.
    """
    found = {}
    for stage, maps in encoder(images, STAGES).items():
        maps = maps.float()  # else means are rounded to bfloat16 under autocast
        found[f"{stage} mean"] = maps.mean((2, 3))
        side = min(int((GRID_VALUES / maps.shape[1]) ** 0.5), *maps.shape[2:])
        if side > 1:
            found[f"{stage} grid"] = adaptive_avg_pool2d(maps, side).flatten(1)
    return found


def raw_pixels(images: Tensor) -> dict[str, Tensor]:
    """Images (n, C, H, W) -> {"16 x 16 px": (n, 256)} of the middle channel."""
    return {f"{RAW_SIDE} x {RAW_SIDE} px": adaptive_avg_pool2d(middle(images), RAW_SIDE).flatten(1)}


class Features:
    """`parts` (images -> {name: (n, D)}) as one tensor (n, sum of D), for Batches, and apart again."""

    def __init__(self, parts):
        self.parts, self.widths = parts, {}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        found = self.parts(images)
        self.widths = {name: part.shape[1] for name, part in found.items()}
        return torch.cat([part.float() for part in found.values()], dim=1)

    def apart(self, splits: list[Tensor]) -> "Kinds":
        """Of such tensors, one for each split."""
        return Kinds(self.widths, splits)


class Kinds(Mapping):
    """{name: (N, D)} of the slices of all splits, one after the other. Each kind is put together when it is
    asked for: memory holds one of them at a time, beside the tensors that it is taken from."""

    def __init__(self, widths: dict[str, int], splits: list[Tensor]):
        ends = [*accumulate(widths.values())]
        self.columns = {name: slice(end - widths[name], end) for name, end in zip(widths, ends)}
        self.splits = splits

    def __getitem__(self, name: str) -> np.ndarray:
        return torch.cat([rows[:, self.columns[name]].cpu() for rows in self.splits]).numpy()

    def __iter__(self):
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    def finite(self) -> bool:
        return all(some.isfinite().all() for rows in self.splits for some in rows.split(1024))
