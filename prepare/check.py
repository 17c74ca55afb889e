"""`data.py check`: reads a whole data set and says what is in it, what to put into a config, and which
files are bad."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ct import layout
from ct.properties import class_names, read_properties, reading_of
from ct.slices import IGNORE, DataError, in_threads, read_mask
from data import default_window
from engine.config import one_line

SPLITS = ("train", "val", "test")
BODY = -500  # HU; what lies above counts as body
LIMIT = 70_000  # values beyond this are counted as this


@dataclass
class Slice:
    """One file to read: its list decides where its mask is and whether it must have one."""

    name: str
    image: Path
    mask: Path
    needs_mask: bool
    held_out: bool  # in val or test: not used for the statistics that go into a config


@dataclass
class Found:
    """What one file holds; `problem` if it cannot be used."""

    slice: Slice
    problem: str = ""
    size: tuple = ()
    stored: str = ""
    counts: np.ndarray = None  # histogram of the values from `lowest` on
    lowest: int = 0
    labels: np.ndarray = None  # histogram of the mask, (256,)


@dataclass
class Summary:
    """Sums over all usable files."""

    sizes: Counter = field(default_factory=Counter)
    stored: Counter = field(default_factory=Counter)
    values: np.ndarray = field(default_factory=lambda: np.zeros(2 * LIMIT + 1, np.int64))  # not of val, test
    voxels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    slices: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    cases: dict = field(default_factory=lambda: defaultdict(set))

    def add(self, found):
        self.sizes[found.size] += 1
        self.stored[found.stored] += 1
        if not found.slice.held_out:
            start = found.lowest + LIMIT
            self.values[start : start + len(found.counts)] += found.counts
        if found.labels is not None:
            self.voxels += found.labels
            self.slices += found.labels > 0
            for label in np.flatnonzero(found.labels):
                self.cases[int(label)].add(layout.case_of(found.slice.name))


def check_set(args):
    """The check command; returns the exit code: 1 if any file is bad."""
    root = Path(args.root)
    properties = read_properties(root)
    names, reading = properties.classes, reading_of(properties, args.hu_offset)
    lists = list_files(root, args.list)
    to_read, bad = collect(root, lists, args)
    summary = Summary()
    for found in in_threads(lambda slice: inspect(slice, reading, names), to_read, "reading"):
        if found.problem:
            bad.append(found.problem)
        else:
            summary.add(found)
    print_sizes(summary)
    print_values(summary, any(slice.held_out for slice in to_read))
    print_labels(summary, names)
    for problem in bad:
        print(f"bad: {one_line(problem, 1000)}")
    print(f"{len(to_read)} files read, {len(bad)} bad")
    return 1 if bad else 0


def list_files(root, given):
    """The lists to check: those given; or train, val, test, unlabelled; or every .txt; or [None], all
    slices."""
    if given:
        return given
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    usual = [f"{split}.txt" for split in (*SPLITS, "unlabelled") if (root / f"{split}.txt").exists()]
    return usual or sorted(path.name for path in root.glob("*.txt")) or [None]


def collect(root, lists, args):
    """Every file of the lists once -> [Slice], and a line for each that is missing. Prints a line a list."""
    slices, bad, splits_of = {}, [], defaultdict(list)
    for list_name in lists:
        split = Path(list_name or "").stem
        images, masks = (layout.split_folder(root, list_name, folder) for folder in (args.images, args.masks))
        names = layout.read_list(root / list_name, images) if list_name else layout.all_slices(images)
        found = layout.find_slices(images, names)
        missing = [name for name, there in zip(names, found) if there is None]
        bad += [f"{images / name}: in {list_name}, but missing" for name in missing]
        needs_mask = masks.is_dir() and split != "unlabelled"
        for name in filter(None, found):
            mask = layout.mask_path(masks, name)
            new = Slice(name, images / name, mask, needs_mask, split in ("val", "test"))
            known = slices.setdefault(new.image, new)
            known.needs_mask |= needs_mask
            known.held_out |= new.held_out
            splits_of[new.image].append(split)
        masks_too = "with masks" if needs_mask else "masks not needed"
        cases = len({*map(layout.case_of, names)})
        print(f"{list_name or images}: {len(names)} slices, {masks_too}; cases: {cases}")
    warn_of_leaks(slices, splits_of)
    return list(slices.values()), bad


def warn_of_leaks(slices, splits_of):
    """Slices or cases that stand in val or test and in another list too."""
    several = (image for image, splits in splits_of.items() if len({*splits}) > 1)
    twice = [image for image in several if {"val", "test"} & {*splits_of[image]}]
    if twice:
        first = one_line(twice[0])
        print(f"warning: {len(twice)} slices of val or test are in other lists too, the first: {first}")
    splits_of_case = defaultdict(set)
    for image, splits in splits_of.items():
        splits_of_case[layout.case_of(slices[image].name)] |= {*splits} & {*SPLITS}
    shared = sorted(case for case, splits in splits_of_case.items() if len(splits) > 1)
    if shared:
        first = one_line(shared[0])
        print(f"warning: cases in several of train, val and test: {len(shared)}, the first: {first}")


def inspect(slice, reading, names):
    """Reads one slice and its mask."""
    try:
        image, stored = reading.slice(slice.image)
        if not np.isfinite(image).all():
            raise DataError(f"{slice.image}: values that are not finite")
        labels = None
        if slice.needs_mask or slice.mask.exists():
            labels = inspect_mask(slice, image.shape, names)
    except (DataError, OSError) as error:
        return Found(slice, problem=str(error))
    values = np.rint(image).clip(-LIMIT, LIMIT).astype(np.int64).ravel()
    lowest = int(values.min())
    return Found(slice, "", image.shape, stored, np.bincount(values - lowest), lowest, labels)


def inspect_mask(slice, size, names):
    if not slice.mask.exists():
        raise DataError(f"{slice.image}: its mask {slice.mask} is missing")
    mask = read_mask(slice.mask)
    if mask.shape != size:
        raise DataError(f"{slice.mask}: {mask.shape} px (rows, columns), its image {size}")
    labels = np.bincount(mask.ravel(), minlength=256)
    highest = np.flatnonzero(labels[:IGNORE]).max(initial=0)
    if names and highest >= len(names):
        raise DataError(f"{slice.mask}: label {highest}, but the set has {len(names)} classes, from 0 on")
    return labels


# ---- What is printed -----------------------------------------------------------------------------


def print_sizes(summary):
    for (height, width), count in summary.sizes.most_common(5):
        print(f"size: {height} x {width} px: {count} slices")
    if len(summary.sizes) > 5:
        print(f"size: {len(summary.sizes) - 5} more sizes")
    if len(summary.stored) > 1:
        uint8 = summary.stored["uint8"]
        hu = summary.stored.total() - uint8
        print(f"warning: {uint8} 8-bit slices beside {hu} of HU: one set cannot mix them")


def print_values(summary, some_held_out):
    """Statistics of the values; those after the window are what data.mean and data.std are meant to be."""
    if not summary.values.any():
        return
    stored = summary.stored.most_common(1)[0][0]
    unit = "HU" if stored == "hu" else "value"
    values = np.arange(-LIMIT, LIMIT + 1)
    mean, std = mean_std(values, summary.values)
    low, high = values[summary.values > 0][[0, -1]]
    where = " (slices outside val and test)" if some_held_out else ""
    print(f"{unit}{where}: from {low} to {high}, mean {mean:.1f}, std {std:.1f}")
    least = BODY if stored == "hu" else 0
    body = np.where(values > least, summary.values, 0)
    if body.any():
        mean, std = mean_std(values, body)
        shares = np.searchsorted(body.cumsum(), body.sum() * np.array([0.01, 0.5, 0.99]))
        print(
            f"{unit} inside the body (above {least}): mean {mean:.1f}, std {std:.1f}, "
            "1 % {}, median {}, 99 % {}".format(*values[shares])
        )
    window = default_window(stored)
    unit_values = ((values - window[0]) / (window[1] - window[0])).clip(0, 1)
    mean, std = mean_std(unit_values, summary.values)
    print(f"for a config: data.window=[{window[0]:g},{window[1]:g}] data.mean={mean:.4f} data.std={std:.4f}")


def mean_std(values, counts):
    mean = np.average(values, weights=counts)
    return mean, np.sqrt(np.average((values - mean) ** 2, weights=counts))


def print_labels(summary, names):
    """One line a label: name, voxels, slices and cases that hold it."""
    if not summary.voxels.any():
        return
    seen = np.flatnonzero(summary.voxels).tolist()
    known = {*range(len(names or ())), *seen}
    names = names or class_names("", 1 + max({0, 1, *seen} - {IGNORE}))
    print(f"{'label':>5}  {'name':26}{'voxels':>12}{'slices':>8}{'cases':>7}")
    for label in sorted(known):
        name = "ignored" if label == IGNORE else names[label]
        voxels, slices = summary.voxels[label], summary.slices[label]
        print(f"{label:5}  {name[:25]:26}{voxels:12}{slices:8}{len(summary.cases[label]):7}")
