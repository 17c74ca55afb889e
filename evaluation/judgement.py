"""What is odd about an evaluation before it begins: its encoder, its slices, its masks, its lists."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np

from ct.plausible import Doubt, heed, judge_facts, judge_known_spacing, judge_lists, judge_masks
from ct.slices import DataError, in_threads
from data import Intensity, SegmentationDataset, judge
from engine.config import Config
from engine.process import Process


def heed_evaluation(
    cfg: Config,
    path: Path | None,
    card: dict,
    sets: dict[str, SegmentationDataset],
    positions: list[int],
    classes: list[str],
    intensity: Intensity,
    process: Process,
) -> list[str]:
    """Say it all; returns what was said. Raises DataError where nothing right can come out, unless
    data.insist.

    Args:
        path: of the encoder's weights, None for random ones; card: data.encoder_card of it.
        positions: the training slices that take part.
    """
    doubts = judge_encoder(path, card, sets["train"], intensity)
    doubts += judge(sets["train"], cfg.data.window, intensity)
    doubts += judge_lists({split: dataset.patients for split, dataset in sets.items()}, sets["train"].whose)
    for dataset in sets.values():
        doubts += judge_spacing(dataset)
    train, cases = sets["train"], [case for dataset in sets.values() for case in dataset.cases]
    doubts += judge_known_spacing(train.properties.spacing, cases, train.root)
    doubts += judge_gaps(sets["test"])
    doubts += judge_training_masks(sets["train"], positions, classes, process)
    if note := sets["train"].assumed():
        process.say(f"note: {note}")
    return heed(doubts, cfg.data.insist, "data.insist=true", process.warn)


def judge_encoder(path, card: dict, train: SegmentationDataset, intensity: Intensity) -> list[Doubt]:
    """Whether the encoder was trained on such slices; without a card nobody knows."""
    if path and not card:
        assumed = f"window {intensity.window}, mean {intensity.mean:g}, std {intensity.std:g}"
        text = f"encoder: no {path.stem}.json beside {path}: its normalisation is unknown; assumed: {assumed}"
        return [Doubt(text)]
    return judge_facts(card["facts"], train.facts(), f"encoder: {path}") if card else []


def judge_spacing(dataset: SegmentationDataset) -> list[Doubt]:
    """Cases whose pixels are finer or coarser than those of training."""
    first = dataset.first_of_cases() if dataset.grid.pixel_mm else {}
    return dataset.grid.judge_cases(
        {case: (dataset.header(index)[0], dataset.mm_of(index)) for case, index in first.items()}
    )


def judge_gaps(dataset: SegmentationDataset) -> list[Doubt]:
    """Cases with known spacing whose slices are not all listed: they are taken for neighbours."""
    numbers = {}
    for name, case in zip(dataset.names, dataset.cases):
        if dataset.spacing(case) and (found := re.findall(r"\d+", name.rpartition("/")[2])):
            numbers.setdefault(case, set()).add(int(found[-1]))
    gaps = [case for case, own in numbers.items() if len({b - a for a, b in pairwise(sorted(own))}) > 1]
    if not gaps:
        return []
    text = f"{gaps[0]}: its slices are not numbered evenly ({len(gaps)} such cases)"
    return [Doubt(f"{text}: Hausdorff distances take those that are listed for neighbours")]


def judge_training_masks(
    dataset: SegmentationDataset, positions: list[int], classes: list[str], process: Process
) -> list[Doubt]:
    """Whether there is something to learn in the masks of these slices, all of which the main process reads.

    Raises DataError for a mask that cannot be used.
    """

    def count():
        pixels = np.zeros(256, np.int64)
        try:
            for mask in in_threads(dataset.own_mask, positions, "training masks"):
                pixels += np.bincount(mask.ravel(), minlength=256)
        except DataError as error:
            return error
        return pixels

    pixels = process.from_main(count)
    if isinstance(pixels, DataError):
        raise pixels
    return judge_masks(pixels, classes, f"masks of {len(positions)} training slices")
