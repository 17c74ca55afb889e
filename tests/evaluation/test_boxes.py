"""Boxes of hand-made masks; COCO's metrics by hand, and against pycocotools on files of a random set."""

import json

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("pycocotools")
from ct.grid import Grid
from evaluation import boxes
from evaluation.boxes import Boxes, Found, boxes_of, coco_metrics, mean_boxes


def drawn(*rows):
    """A mask of digits, 0 written as a dot, 255 as #."""
    return np.array([[{".": 0, "#": 255}.get(c) or int(c.replace(".", "0")) for c in row] for row in rows])


def test_a_box_a_component_of_eight_neighbours():
    found = boxes_of(drawn("11..2", "11...", "..1..", "....."), 3, min_pixels=1)
    assert found.boxes.tolist() == [[0, 0, 3, 3], [4, 0, 5, 1]]  # the diagonal neighbour belongs to it
    assert found.labels.tolist() == [1, 2] and found.areas.tolist() == [5, 1]
    assert not found.crowd.any()
    found = boxes_of(drawn("11.11", "11.11"), 2, min_pixels=1)
    assert found.boxes.tolist() == [[0, 0, 2, 2], [3, 0, 5, 2]]


def test_components_that_are_crowd():
    found = boxes_of(drawn("11.1.", "11...", ".....", "2222#", "....."), 3, min_pixels=2)
    assert found.boxes.tolist() == [[0, 0, 2, 2], [3, 0, 4, 1], [0, 3, 4, 4]]
    assert found.crowd.tolist() == [False, True, True]  # one is small, one touches ignored pixels
    assert boxes_of(drawn("11.#", "11.."), 2, min_pixels=2).crowd.tolist() == [False]
    assert boxes_of(drawn("11..", "11#."), 2, min_pixels=2).crowd.tolist() == [True]
    assert boxes_of(drawn("11..", "11..", "..#."), 2, min_pixels=2).crowd.tolist() == [True]  # diagonally


@pytest.mark.parametrize("mask", (np.zeros((3, 5), int), np.full((3, 5), 255)))
def test_masks_without_boxes(mask):
    found = boxes_of(mask, 3)
    assert found.boxes.shape == (0, 4) and len(found.labels) == len(found.areas) == len(found.crowd) == 0


def test_a_mask_of_one_class_everywhere():
    assert boxes_of(np.ones((3, 5), int), 2, 1).boxes.tolist() == [[0, 0, 5, 3]]


def truth_of(*rows):
    """(x0, y0, x1, y1, label[, crowd]) of one slice."""
    table = np.array([(*row, 0)[:6] for row in rows], float).reshape(-1, 6)
    areas = (table[:, 2] - table[:, 0]) * (table[:, 3] - table[:, 1])
    return Boxes(table[:, :4], table[:, 4].astype(int), areas, table[:, 5] > 0)


def found_of(*rows):
    """(x0, y0, x1, y1, label, score) of one slice."""
    table = np.array(rows, float).reshape(-1, 6)
    return Found(table[:, :4], table[:, 4].astype(int), table[:, 5])


def test_average_precision_by_hand():
    """Three true boxes; by falling score: right, wrong, right, and one box is never found. Precision at
    recall 1/3 is 1, at 2/3 it is 2/3, beyond it 0. Of COCO's 101 recalls 34 are up to 1/3 (0 to 0.33), 33 up
    to 2/3 (0.34 to 0.66) and 34 beyond."""
    truth = [truth_of((0, 0, 10, 10, 1), (20, 20, 30, 30, 1)), truth_of((0, 0, 10, 10, 1))]
    found = [
        found_of((0, 0, 10, 10, 1, 0.9), (40, 40, 50, 50, 1, 0.8), (20, 20, 30, 30, 1, 0.7)),
        found_of(),
    ]
    metrics = coco_metrics(truth, found, ["background", "liver"])
    expected = (34 * 1 + 33 * 2 / 3) / 101
    for name in ("AP50", "AP", "AP75", "AP50 small"):
        assert metrics[name]["value"] == pytest.approx(expected)
        assert metrics[name]["classes"]["liver"] == pytest.approx(expected)
    assert metrics["AP50 large"]["value"] is None and metrics["AP50"]["interval"] is None


def test_the_overlap_decides_at_which_thresholds_a_box_counts():
    """10 x 10 px and the same box 2 px further: IoU 80 / 120 = 0.667, enough up to 0.65."""
    truth, found = [truth_of((0, 0, 10, 10, 1))], [found_of((2, 0, 12, 10, 1, 0.5))]
    metrics = coco_metrics(truth, found, ["background", "liver"])
    values = [metrics[name]["value"] for name in ("AP50", "AP75", "AP")]
    assert values == [pytest.approx(1), 0, pytest.approx(0.4)]  # 0.50, 0.55, 0.60, 0.65 of ten


def test_crowd_counts_neither_way():
    truth = [truth_of((0, 0, 10, 10, 1), (20, 20, 22, 22, 1, True))]
    on_crowd = found_of((0, 0, 10, 10, 1, 0.5), (20, 20, 22, 22, 1, 0.9))
    assert coco_metrics(truth, [on_crowd], ["background", "liver"])["AP"]["value"] == pytest.approx(1)
    without = found_of((0, 0, 10, 10, 1, 0.5))
    assert coco_metrics(truth, [without], ["background", "liver"])["AP"]["value"] == pytest.approx(1)


def test_classes_without_boxes_are_left_out_of_the_mean():
    truth, found = [truth_of((0, 0, 10, 10, 1))], [found_of((0, 0, 10, 10, 1, 0.5), (0, 0, 9, 9, 2, 0.9))]
    metrics = coco_metrics(truth, found, ["background", "liver", "spleen"])["AP50"]
    assert metrics["classes"] == {"liver": pytest.approx(1), "spleen": None}
    assert metrics["value"] == pytest.approx(1)


def random_set(slices=30, seed=0):
    rng, truth, found = np.random.default_rng(seed), [], []
    for _ in range(slices):
        count = rng.integers(0, 6)
        corner, size = rng.uniform(0, 80, (count, 2)), rng.uniform(3, 120, (count, 2))
        boxes_ = np.hstack([corner, corner + size])
        labels = rng.integers(1, 4, count)
        truth.append(Boxes(boxes_, labels, size.prod(1) * 0.8, rng.random(count) < 0.2))
        more = rng.uniform(0, 80, (4, 2))
        near = boxes_ + rng.normal(0, 3, boxes_.shape)
        some = np.vstack([near, np.hstack([more, more + 20])])
        found.append(Found(some, np.r_[labels, rng.integers(1, 4, 4)], rng.random(len(some))))
    return truth, found


def test_against_pycocotools_from_files(tmp_path):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = random_set()
    annotations, detections = [], []
    for image, (real, one) in enumerate(zip(truth, found)):
        for box, label, area, crowd in zip(real.boxes, real.labels, real.areas, real.crowd):
            row = {"image_id": image, "category_id": int(label), "bbox": [*box[:2], *(box[2:] - box[:2])]}
            row |= {"id": len(annotations) + 1, "area": area, "iscrowd": int(crowd)}
            annotations.append(row)
        for box, label, score in zip(one.boxes, one.labels, one.scores):
            row = {"image_id": image, "category_id": int(label), "bbox": [*box[:2], *(box[2:] - box[:2])]}
            detections.append(row | {"score": score})
    content = {"images": [{"id": i} for i in range(len(truth))], "annotations": annotations}
    content["categories"] = [{"id": k, "name": str(k)} for k in (1, 2, 3)]
    for name, rows in (("truth", content), ("found", detections)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    coco = COCO(tmp_path / "truth.json")
    judged = COCOeval(coco, coco.loadRes(str(tmp_path / "found.json")), "bbox")
    judged.evaluate()
    judged.accumulate()
    judged.summarize()
    metrics = coco_metrics(truth, found, ["background", "a", "b", "c"])
    names = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")
    for name, expected in zip(names, judged.stats):
        assert metrics[name]["value"] == pytest.approx(expected, abs=1e-12), name
    assert 0.1 < metrics["AP"]["value"] < 0.9


def test_intervals_are_those_of_cases_drawn_anew(monkeypatch):
    """A drawn case counts as often as it was drawn: as if its slices stood in the set so often."""
    truth, found = random_set()
    cases = [f"case{i // 5}" for i in range(30)]
    classes = ["background", "a", "b", "c"]
    interval = coco_metrics(truth, found, classes, cases)["AP50"]["interval"]
    rng, values = np.random.default_rng(0), []
    for _ in range(boxes.DRAWS):
        rows = [5 * case + i for case in rng.integers(6, size=6) for i in range(5)]
        some = [truth[row] for row in rows], [found[row] for row in rows]
        values.append(coco_metrics(*some, classes)["AP50"]["value"])
    assert interval == pytest.approx(np.quantile(values, (0.025, 0.975)).tolist())


def test_boxes_of_mean_place_and_size():
    slices = [
        truth_of((0, 0, 10, 10, 1), (50, 50, 52, 52, 1), (5, 5, 9, 9, 2)),
        truth_of((2, 4, 12, 20, 1)),
        truth_of((0, 0, 99, 99, 1, True)),
        truth_of(),
    ]
    found = mean_boxes(slices)
    assert found.labels.tolist() == [1, 2] and found.scores.tolist() == [0.5, 0.25]
    assert found.boxes.tolist() == [[1, 2, 11, 15], [5, 5, 9, 9]]  # of the largest component a slice


@pytest.mark.parametrize("own", ((50, 80), (96, 96), (31, 200)))
def test_boxes_on_the_way_to_the_common_grid_and_back(own):
    grid = Grid((64, 48))
    height, width, top, left = grid.placement(own)
    x, y = width / own[1], height / own[0]
    boxes_ = np.array([[0, 0, own[1], own[0]], [3, 4, 20, 9.5]])
    on_grid = boxes_ * [x, y, x, y] + [left, top, left, top]
    assert grid.boxes_back(on_grid, own) == pytest.approx(boxes_)
    assert grid.boxes_back(np.array([[-5.0, -5, 99, 99]]), own).tolist() == [[0, 0, own[1], own[0]]]
