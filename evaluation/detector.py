"""Faster R-CNN with a feature pyramid on an encoder: torchvision's, for slices as they are.

build_detector   Pyramid as backbone, anchors and levels to the slices' size
targets_of       what it learns from
detect           the boxes that it finds in the slices of a split
BoxPredictor     eval_det.py --predict
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper, MultiScaleRoIAlign

from ct.grid import Grid
from ct.listing import stem_of
from ct.volumes import Volume
from engine.files import write_whole
from engine.process import Process, progress
from evaluation.batches import Batches
from evaluation.boxes import Found, boxes_of
from evaluation.prediction import Predictor
from evaluation.trained import Description, load_model
from models import Encoder

STAGES = ("layer1", "layer2", "layer3", "layer4")
POOLED = 7  # cells of a side of what the box head takes
PROPOSALS = 200  # a slice; it has some ten organs
SAMPLED = 64  # of them in the loss of the box head
SMALLEST_ANCHOR = 1 / 12  # of the slice's side, at layer1; twice as large from level to level
ASPECTS = (0.5, 1.0, 2.0)


class Pyramid(nn.Module):
    """Images (N, C, H, W) -> {"0": (N, width, h, w) at layer1's stride, ... "3" at layer4's, "pool"}.

    BatchNorm after each of its convolutions: without, random weights need a tenth of the rate. A frozen
    encoder stays in evaluation mode; one that is trained normalises by its batches.
    """

    def __init__(self, encoder: Encoder, width: int, frozen: bool):
        super().__init__()
        self.encoder, self.frozen = encoder.requires_grad_(not frozen), frozen
        channels = [encoder.channels[stage] for stage in STAGES]
        self.fpn = FeaturePyramidNetwork(channels, width, LastLevelMaxPool(), nn.BatchNorm2d)
        self.out_channels = width

    def train(self, mode: bool = True):
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.encoder(images, STAGES)
        levels = self.fpn({str(level): maps[stage] for level, stage in enumerate(STAGES)})
        return {name: level.float() for name, level in levels.items()}


# Anchors have the type of the pyramid's maps, boxes that of the changes found for them. Under autocast this
# would be bfloat16, which knows a place between 256 and 512 px to 2 px.


class Proposals(RPNHead):
    """torchvision's, its output in float32."""

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, changes = super().forward(maps)
        return [x.float() for x in logits], [x.float() for x in changes]


class Predictions(FastRCNNPredictor):
    """torchvision's, its output in float32."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, changes = super().forward(x)
        return logits.float(), changes.float()


class AsTheyAre(GeneralizedRCNNTransform):
    """Images are of one size and normalised already: they are stacked, nothing else."""

    def __init__(self, in_channels: int):
        super().__init__(1, 1, [0.0] * in_channels, [1.0] * in_channels, size_divisible=1)

    def resize(self, image: Tensor, target=None):
        return image, target


def build_detector(about: Description, encoder: Encoder) -> FasterRCNN:
    """Its box head has four times the channels of the pyramid, as torchvision's with 256."""
    width, smallest = about.width, max(about.facts.size) * SMALLEST_ANCHOR
    sizes = tuple((smallest * 2**level,) for level in range(len(STAGES) + 1))
    model = FasterRCNN(
        Pyramid(encoder, width, frozen=about.mode == "frozen"),
        rpn_anchor_generator=AnchorGenerator(sizes, (ASPECTS,) * len(sizes)),
        rpn_head=Proposals(width, len(ASPECTS)),
        rpn_post_nms_top_n_train=PROPOSALS,
        rpn_post_nms_top_n_test=PROPOSALS,
        box_head=TwoMLPHead(width * POOLED**2, 4 * width),
        box_roi_pool=pooling(about.facts.size, encoder),
        box_predictor=Predictions(4 * width, len(about.classes)),
        box_batch_size_per_image=SAMPLED,
    )
    model.transform = AsTheyAre(encoder.in_channels)
    return model


def pooling(size: tuple[int, int], encoder: Encoder) -> MultiScaleRoIAlign:
    """Of boxes from the level for their size, in slices of `size` px (arXiv 1612.03144, equation 1): a box as
    large as an image of the encoder's pretraining, there 224 px, here the whole slice, belongs to layer3, one
    of half its side to layer2, smaller ones to layer1. torchvision by itself takes 224 px for any slice, and
    guesses strides and levels from the maps, wrongly for dilated encoders and for some small slices."""
    pool = MultiScaleRoIAlign([str(level) for level in range(len(STAGES))], POOLED, sampling_ratio=2)
    pool.scales = [1 / stride for stride in encoder.strides().values()]
    pool.map_levels = LevelMapper(2, 5, canonical_scale=math.sqrt(math.prod(size)), canonical_level=4)
    return pool


def targets_of(masks: Tensor, num_classes: int, min_pixels: int) -> list[dict[str, Tensor]]:
    """Masks (N, H, W) -> what Faster R-CNN learns from, on the masks' device; crowd boxes are left out."""
    targets = []
    for mask in masks.cpu().numpy():
        found = boxes_of(mask, num_classes, min_pixels)
        kept = {"boxes": found.boxes[~found.crowd], "labels": found.labels[~found.crowd]}
        targets.append({name: torch.from_numpy(rows).to(masks.device) for name, rows in kept.items()})
    return targets


@torch.no_grad()
def found_in(model: FasterRCNN, images: Tensor, process: Process) -> list[Found]:
    """In normalised images (N, C, H, W), by a model in evaluation mode; scores from 0.05 on."""
    with process.autocast():
        found = model(images)
    rows = [[one[name].float().cpu().numpy() for name in ("boxes", "labels", "scores")] for one in found]
    return [Found(boxes, labels.astype(np.int64), scores) for boxes, labels, scores in rows]


def detect(model: FasterRCNN, batches: Batches, process: Process, desc: str) -> list[Found]:
    """In all slices in order, which are divided among the processes."""
    model.eval()
    plan = batches.in_order()[process.rank :: process.world]
    own = []
    for rows, images in zip(plan, progress(process, desc, batches.inputs_of(plan), len(plan))):
        own += zip(rows, found_in(model, images, process))
    return [found for _, found in sorted(sum(process.gather(own), []), key=lambda row: row[0])]


def shown(found: Found, score: float) -> Found:
    """The boxes with at least this score."""
    kept = found.scores >= score
    return Found(found.boxes[kept], found.labels[kept], found.scores[kept])


class BoxPredictor(Predictor):
    """Slices and volumes become JSON: {"slices": 40, "boxes": [{"slice": 0, "class": "liver", "box":
    [x0, y0, x1, y1], "score": 0.93}, ...]}, boxes in px of the slice, edges of pixels. Slices of a volume are
    counted and turned as `data.py slice` does it."""

    command, what = "eval_det.py --predict", "boxes"

    @staticmethod
    def load(path: Path, process: Process) -> tuple[FasterRCNN, Description]:
        return load_model(path, process, build_detector)

    @staticmethod
    def name_of(path: Path, is_volume: bool) -> Path:
        return path.with_name((stem_of(path.name) if is_volume else path.stem) + ".json")

    def find(self, images: Tensor, grid: Grid, own: tuple, mm: tuple | None) -> list[Found]:
        found = found_in(self.model, images, self.process)
        return [Found(grid.boxes_back(one.boxes, own, mm), one.labels, one.scores) for one in found]

    def write(self, target: Path, found: list[Found], volume: Volume | None) -> None:
        names, rows = self.about.classes, []
        for index, one in enumerate(found):
            for box, label, score in zip(one.boxes.tolist(), one.labels, one.scores.tolist()):
                box = [round(side, 2) for side in box]
                rows.append({"slice": index, "class": names[label], "box": box, "score": round(score, 4)})
        lines = ",\n".join(map(json.dumps, rows))
        text = f'{{"slices": {len(found)}, "boxes": [\n{lines}\n]}}\n'
        write_whole(target, text, made_by=self.command)
