"""Boxes of organs: from masks, at their mean place, and how well boxes are found (COCO's metrics).

A box belongs to a connected component (8 neighbours) of a class. Components of fewer than min_pixels pixels,
and those that touch ignored pixels (255), whose extent nobody knows, are COCO's "crowd": not learnt, not
demanded, and a detection of one counts neither way. Ignored pixels themselves make no box.

boxes_of       a mask's
mean_boxes     what can be said of a slice without looking at it
coco_metrics   of true and found boxes
"""

import contextlib
import io
from dataclasses import dataclass

import numpy as np

from ct.slices import IGNORE
from engine.config import ConfigError
from evaluation.scores import mean


@dataclass
class Boxes:
    """Of one slice. boxes (n, 4): x0 y0 x1 y1 in px, edges of pixels; labels (n,), from 1 on."""

    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray  # (n,) pixels of the components
    crowd: np.ndarray  # (n,) bool


@dataclass
class Found:
    """What a detector says of one slice."""

    boxes: np.ndarray  # (n, 4), as above
    labels: np.ndarray  # (n,)
    scores: np.ndarray  # (n,)


def packages() -> tuple:
    """scipy.ndimage, COCO and COCOeval; both packages are extras. Raises ConfigError without them."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
        from scipy import ndimage
    except ImportError as error:
        name = error.name.partition(".")[0]
        raise ConfigError(f"detection needs {name}: pip install {name}") from None
    return ndimage, COCO, COCOeval


def boxes_of(mask: np.ndarray, num_classes: int, min_pixels: int = 20) -> Boxes:
    """The boxes of a mask (H, W). Raises ConfigError as `packages`."""
    ndimage, *_ = packages()
    neighbours = np.ones((3, 3), bool)
    unknown = ndimage.binary_dilation(mask == IGNORE, neighbours)
    rows = []
    for label in np.unique(mask):
        if not 0 < label < num_classes:
            continue
        parts, _ = ndimage.label(mask == label, neighbours)
        for number, (y, x) in enumerate(ndimage.find_objects(parts), 1):
            own = parts[y, x] == number
            area = int(own.sum())
            crowd = area < min_pixels or bool(unknown[y, x][own].any())
            rows.append((x.start, y.start, x.stop, y.stop, label, area, crowd))
    table = np.array(rows, np.float32).reshape(-1, 7)
    return Boxes(table[:, :4], table[:, 4].astype(np.int64), table[:, 5], table[:, 6] > 0)


def mean_boxes(slices: list[Boxes]) -> Found:
    """What can be said of a slice without looking at it: of each class the mean place and size of its
    largest component a slice, with the share of slices that have it as the score."""
    found = []
    for label in sorted({int(label) for one in slices for label in one.labels[~one.crowd]}):
        largest = []
        for one in slices:
            own = np.flatnonzero((one.labels == label) & ~one.crowd)
            if len(own):
                largest.append(one.boxes[own[one.areas[own].argmax()]])
        found.append((np.mean(largest, axis=0), label, len(largest) / len(slices)))
    boxes, labels, scores = zip(*found)
    return Found(np.stack(boxes), np.array(labels), np.array(scores))


# ---- COCO's metrics ------------------------------------------------------------------------------

THRESHOLDS = {"AP50": slice(0, 1), "AP": slice(0, 10), "AP75": slice(5, 6)}  # of IoU 0.50, 0.55 ... 0.95
AREAS = {"": 0, " small": 1, " medium": 2, " large": 3}  # of components: from 32^2 and 96^2 px on
DRAWS = 200  # of cases, for an interval


def coco_metrics(truth: list[Boxes], found: list[Found], classes: list[str], cases: list[str] = ()) -> dict:
    """AP50, AP (mean over IoU 0.50 to 0.95), AP75, and the first two by size, as results.json has metrics;
    None where there is nothing to find.

    Args:
        classes: names, background first.
        cases: of the slices; with two and more of them the means have 95 % intervals.

    Raises ConfigError as `packages`.
    """
    judged = evaluated(truth, found, len(classes))
    precision = precision_of(judged)  # (IoU, recall, class, area)
    intervals, metrics = intervals_of(judged, precision, cases), {}
    for name, area in [(name, "") for name in THRESHOLDS] + [
        (name, area) for name in ("AP50", "AP") for area in (" small", " medium", " large")
    ]:
        by_class = class_means(precision[THRESHOLDS[name], :, :, AREAS[area]])
        values = [None if np.isnan(value) else float(value) for value in by_class]
        metrics[name + area] = {
            "value": mean(values),
            "interval": None if area else intervals[name],
            "classes": dict(zip(classes[1:], values)),
        }
    return metrics


def evaluated(truth: list[Boxes], found: list[Found], num_classes: int):
    """pycocotools' COCOeval after `evaluate`; image i is slice i."""
    _, COCO, COCOeval = packages()
    annotations, results = [], []
    for image, one in enumerate(truth):
        for box, label, area, crowd in zip(one.boxes, one.labels, one.areas, one.crowd):
            about = {"id": len(annotations) + 1, "image_id": image, "category_id": int(label)}
            annotations.append(about | {"bbox": x_y_w_h(box), "area": float(area), "iscrowd": int(crowd)})
    for image, one in enumerate(found):
        for box, label, score in zip(one.boxes, one.labels, one.scores):
            about = {"id": len(results) + 1, "image_id": image, "category_id": int(label), "iscrowd": 0}
            area = float((box[2] - box[0]) * (box[3] - box[1]))
            results.append(about | {"bbox": x_y_w_h(box), "area": area, "score": float(score)})
    images = [{"id": image} for image in range(len(truth))]
    categories = [{"id": label} for label in range(1, num_classes)]
    both = []
    with contextlib.redirect_stdout(io.StringIO()):
        for rows in (annotations, results):
            both.append(COCO())
            both[-1].dataset = {"images": images, "categories": categories, "annotations": rows}
            both[-1].createIndex()
        judged = COCOeval(*both, "bbox")
        judged.params.maxDets = [100]
        judged.evaluate()
    return judged


def x_y_w_h(box: np.ndarray) -> list[float]:
    x0, y0, x1, y1 = map(float, box)
    return [x0, y0, x1 - x0, y1 - y0]


def precision_of(judged) -> np.ndarray:
    """(IoU, recall, class, area); -1 where there is nothing to find."""
    with contextlib.redirect_stdout(io.StringIO()):
        judged.accumulate()
    return judged.eval["precision"][..., 0]


def class_means(precision: np.ndarray) -> np.ndarray:
    """(IoU, recall, class) -> the mean of each class; nan where there is nothing to find."""
    means = precision.mean((0, 1))
    return np.where(means < 0, np.nan, means)


def intervals_of(judged, precision: np.ndarray, cases: list[str]) -> dict[str, list[float] | None]:
    """95 % of AP50, AP and AP75 if cases are drawn anew; a class that a draw leaves without boxes has its
    value over all cases there. None of one case."""
    names, members = np.unique(cases, return_inverse=True)
    whole = {name: class_means(precision[some, :, :, 0]) for name, some in THRESHOLDS.items()}
    if len(names) < 2 or np.isnan(whole["AP50"]).all():
        return dict.fromkeys(THRESHOLDS)
    areas = len(judged.params.areaRng)
    matched = np.array(judged.evalImgs, object).reshape(-1, areas, len(members))[:, 0]  # (class, slice)
    only_all = judged.params.areaRng[:1]
    judged.params.areaRng = judged._paramsEval.areaRng = only_all
    rng, drawn = np.random.default_rng(0), {name: [] for name in THRESHOLDS}
    for _ in range(DRAWS):
        chosen = rng.integers(len(names), size=len(names))
        slices = np.concatenate([np.flatnonzero(members == case) for case in chosen])
        judged.evalImgs = [*matched[:, slices].ravel()]
        judged.params.imgIds = judged._paramsEval.imgIds = [*range(len(slices))]
        own = precision_of(judged)[..., 0]
        for name, some in THRESHOLDS.items():
            means = class_means(own[some])
            drawn[name].append(np.nanmean(np.where(np.isnan(means), whole[name], means)))
    return {name: [float(end) for end in np.quantile(own, (0.025, 0.975))] for name, own in drawn.items()}
