"""`data.py check`: reads a whole data set and says what is in it, what to put into a config, and which
files are bad."""

import hashlib
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ct import layout
from ct.listing import files_below
from ct.patients import patients_of_slices
from ct.plausible import (
    AS_STORED,
    LIMIT,
    PADDING,
    Doubt,
    Values,
    histogram,
    judge_copies,
    judge_gaps_of_labels,
    judge_kinds,
    judge_known_spacing,
    judge_lists,
    judge_masks,
    judge_ranges,
    judge_spacings,
    judge_values,
    judge_window,
)
from ct.properties import assumed, class_names, read_properties, reading_of
from ct.slices import AIR, IGNORE, DataError, in_threads, mask_mapping, read_mask
from data import default_window
from engine.config import one_line

SPLITS = ("train", "val", "test")
BODY = -500  # HU; what lies above counts as body
MAP = "--mask-map (data.mask_map) gives a pixel value another class"
MEND = "if they are HU + {offset}, add that to data.hu_offset"


@dataclass
class Slice:
    """One file to read: its list decides where its mask is and whether it must have one."""

    name: str
    image: Path
    mask: Path
    needs_mask: bool
    splits: set  # names of the lists that it is in

    def held_out(self):
        """In val or test: not used for the statistics that go into a config."""
        return bool(self.splits & {"val", "test"})

    def trains(self):
        """In train, or in lists of other names only: its mask counts for what can be learned."""
        return "train" in self.splits or not self.splits & {"val", "test", "unlabelled"}


@dataclass
class Found:
    """What one file holds; `problem` if it cannot be used."""

    slice: Slice
    problem: str = ""
    size: tuple = ()
    kind: str = ""
    counted: tuple = ()  # ct.plausible.histogram of the values
    digest: bytes = b""  # of the values; b"" if they are all the same
    labels: np.ndarray = None  # histogram of the mask, (256,)


@dataclass
class Summary:
    """Sums over all usable files."""

    sizes: Counter = field(default_factory=Counter)
    kinds: Counter = field(default_factory=Counter)
    values: Values = field(default_factory=Values)  # not of val, test
    held_out: Values = field(default_factory=Values)  # of these
    ranges: dict = field(default_factory=dict)  # {case: (lowest, highest value)}
    first: dict = field(default_factory=dict)  # {digest: Slice}
    copies: list = field(default_factory=list)  # [(name, name)] in two lists, val or test one of them
    training: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))  # mask pixels
    voxels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    slices: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    cases: dict = field(default_factory=lambda: defaultdict(set))

    def add(self, found):
        self.sizes[found.size] += 1
        self.kinds[found.kind] += 1
        (self.held_out if found.slice.held_out() else self.values).merge(found.counted)
        case, (_, _, *ends, _) = layout.case_of(found.slice.name), found.counted
        lowest, highest = self.ranges.get(case, ends)
        self.ranges[case] = min(lowest, ends[0]), max(highest, ends[1])
        one, first = found.slice, self.first.setdefault(found.digest or found.slice.image, found.slice)
        if (one.held_out() or first.held_out()) and not one.splits & first.splits:
            self.copies.append((first.name, one.name))
        if found.labels is not None:
            self.training += found.labels * found.slice.trains()
            self.voxels += found.labels
            self.slices += found.labels > 0
            for label in np.flatnonzero(found.labels):
                self.cases[int(label)].add(case)

    def most(self):
        """The size and the kind of most slices."""
        return self.sizes.most_common(1)[0][0], self.kinds.most_common(1)[0][0]


def check_set(args):
    """The check command; returns the exit code: 1 if any file is bad."""
    root = Path(args.root)
    properties = read_properties(root)
    names, reading = properties.classes, reading_of(properties, args.hu_offset)
    lists = list_files(root, args.list)
    mapping = mask_mapping(read_mask_map(args.mask_map))
    to_read, bad = collect(root, lists, args)
    summary = Summary()
    for found in in_threads(lambda slice: inspect(slice, reading, names, mapping), to_read, "reading"):
        if found.problem:
            bad.append(found.problem)
        else:
            summary.add(found)
    print_sizes(summary)
    print_values(summary, any(slice.held_out() for slice in to_read))
    print_labels(summary, names)
    for doubt in doubts_of(root, properties, to_read, summary, names):
        if doubt.fatal:
            bad.append(doubt.text)
        else:
            print(f"warning: {one_line(doubt.text, 1000)}")
    if summary.sizes and properties.missing():
        size, kind = summary.most()
        print(f"note: {assumed(properties, kind, size, root)} (docs/DATA.md)")
    for problem in bad:
        print(f"bad: {one_line(problem, 1000)}")
    print(f"{len(to_read)} files read, {len(bad)} bad")
    return 1 if bad else 0


def read_mask_map(text):
    """--mask-map, JSON, as a dict."""
    try:
        content = json.loads(text) if text else {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise DataError(f'--mask-map {text}: JSON such as {{"255": 1}} is expected')
    return content


def doubts_of(root, properties, slices, summary, names):
    """What is odd about the whole set."""
    if not summary.sizes:
        return []
    (height, width), kind = summary.most()
    doubts = judge_kinds(summary.kinds, properties.kind, root)
    if not doubts:
        for values, where in ((summary.values, root), (summary.held_out, f"{root}, val and test")):
            own = judge_values(values, where, MEND, AS_STORED) if kind == "hu" else []
            if kind != "stored" and not any(doubt.fatal for doubt in own):
                own += judge_window(values, default_window(kind), where)
            doubts += own
    if kind == "hu" and not any(doubt.fatal for doubt in doubts):
        doubts += judge_ranges(summary.ranges, root)
    if summary.training.any():
        where = f"{root}: masks for training"
        if not names:
            highest = max({1, *np.flatnonzero(summary.training).tolist()} - {IGNORE})
            names = class_names("", 1 + highest)
            doubts += judge_gaps_of_labels(summary.training, where)
        doubts += judge_masks(summary.training, names, where)
    if properties.size and properties.size not in summary.sizes:
        said = "{} x {} px, which no slice has; all are scaled to that".format(*properties.size)
        doubts.append(Doubt(f"{root}: set.json says {said}"))
    if len(summary.sizes) > 1 and not properties.size:
        text = f"slices of different sizes; all are scaled to that of most, {height} x {width} px"
        doubts.append(Doubt(f"{root}: {text}"))
    doubts += judge_spacings(properties.spacing, root)
    doubts += judge_known_spacing(properties.spacing, [layout.case_of(one.name) for one in slices], root)
    patients, how = patients_of_slices([one.name for one in slices], properties)
    whose = {split: set() for split in SPLITS}
    for one in slices:
        for split in one.splits & whose.keys():
            whose[split].add(layout.patient_of(one.name, layout.case_of(one.name), patients))
    what = f"patients ({how})" if patients else "cases"
    return doubts + judge_lists(whose, what) + judge_copies(summary.copies)


def list_files(root, given):
    """The lists to check: those given; or train, val, test, unlabelled; or every .txt; or [None], all
    slices."""
    if given:
        return given
    if layout.packed_at(root):
        raise DataError(f"{root}: a packed set; check the folder that it was made of")
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    there = files_below(root, ".txt", deep=False)
    usual = [name for split in (*SPLITS, "unlabelled") if (name := f"{split}.txt") in there]
    if others := [name for name in there if name not in usual]:
        named = one_line(", ".join(others))
        what = f"not looked at: {named}; --list LIST ... checks it" if usual else f"taken for lists: {named}"
        print(f"note: {root}: {what}")
    return usual or others or [None]


def collect(root, lists, args):
    """Every file of the lists once -> [Slice], and a line for each that is missing. Prints a line a list."""
    slices, bad = {}, []
    for list_name in lists:
        split = Path(list_name or "").stem
        images, masks = (layout.split_folder(root, list_name, folder) for folder in (args.images, args.masks))
        names = layout.read_list(root / list_name, images) if list_name else layout.all_slices(images)
        found = layout.find_slices(images, names)
        missing = [name for name, file in zip(names, found) if file is None]
        bad += [f"{images / name}: in {list_name}, but missing" for name in missing]
        if repeated := len(names) - len(missing) - len({*found} - {None}):
            text = "slices are listed more than once; pretraining takes them as often, evaluation once"
            print(f"warning: {list_name}: {repeated} {text}")
        needs_mask = masks.is_dir() and split != "unlabelled"
        there = [*filter(None, found)]
        for name, mask in zip(there, layout.mask_paths(masks, there)):
            new = Slice(name, images / name, mask, needs_mask, set())
            known = slices.setdefault(new.image, new)
            known.needs_mask |= needs_mask
            known.splits.add(split)
        masks_too = "with masks" if needs_mask else "masks not needed"
        cases = len({*map(layout.case_of, there)})
        print(f"{list_name or images}: {len(names)} slices, {masks_too}; cases: {cases}")
    twice = [one for one in slices.values() if one.held_out() and len(one.splits) > 1]
    if twice:
        first = one_line(twice[0].image)
        print(f"warning: {len(twice)} slices of val or test are in other lists too, the first: {first}")
    return list(slices.values()), bad


def inspect(slice, reading, names, mapping):
    """Reads one slice and its mask."""
    try:
        image, kind = reading.slice(slice.image)
        if not np.isfinite(image).all():
            raise DataError(f"{slice.image}: values that are not finite")
        labels = None
        if slice.needs_mask or slice.mask.exists():
            labels = inspect_mask(slice, image.shape, names, mapping)
    except (DataError, OSError) as error:
        return Found(slice, problem=str(error))
    digest = b"" if (image == image[0, 0]).all() else hashlib.blake2b(image.tobytes(), digest_size=8).digest()
    return Found(slice, "", image.shape, kind, histogram(image), digest, labels)


def inspect_mask(slice, size, names, mapping):
    if not slice.mask.exists():
        raise DataError(f"{slice.image}: its mask {slice.mask} is missing")
    mask = read_mask(slice.mask, mapping)
    if mask.shape != size:
        raise DataError(f"{slice.mask}: {mask.shape} px (rows, columns), its image {size}")
    labels = np.bincount(mask.ravel(), minlength=256)
    highest = np.flatnonzero(labels[:IGNORE]).max(initial=0)
    if names and highest >= len(names):
        raise DataError(
            f"{slice.mask}: label {highest}, but the set has {len(names)} classes, from 0 on; {MAP}"
        )
    return labels


# ---- What is printed -----------------------------------------------------------------------------


def print_sizes(summary):
    for (height, width), count in summary.sizes.most_common(5):
        print(f"size: {height} x {width} px: {count} slices")
    if len(summary.sizes) > 5:
        print(f"size: {len(summary.sizes) - 5} more sizes")


def print_values(summary, some_held_out):
    """Statistics of the values; those after the window are what data.mean and data.std are meant to be."""
    _, kind = summary.most() if summary.sizes else (None, None)
    counts = padding_as_air(summary.values.counts) if kind == "hu" else summary.values.counts
    if not counts.any():
        return
    unit = "HU" if kind == "hu" else "value"
    values = np.arange(-LIMIT, LIMIT + 1)
    mean, std = mean_std(values, counts)
    low, high = values[counts > 0][[0, -1]]
    where = " (slices outside val and test)" if some_held_out else ""
    print(f"{unit}{where}: from {low} to {high}, mean {mean:.1f}, std {std:.1f}")
    least = BODY if kind == "hu" else 0
    body = np.where(values > least, counts, 0)
    if body.any():
        mean, std = mean_std(values, body)
        shares = np.searchsorted(body.cumsum(), body.sum() * np.array([0.01, 0.5, 0.99]))
        print(
            f"{unit} inside the body (above {least}): mean {mean:.1f}, std {std:.1f}, "
            "1 % {}, median {}, 99 % {}".format(*values[shares])
        )
    if kind == "stored":
        return
    window = default_window(kind)
    unit_values = ((values - window[0]) / (window[1] - window[0])).clip(0, 1)
    mean, std = mean_std(unit_values, counts)
    print(f"for a config: data.window=[{window[0]:g},{window[1]:g}] data.mean={mean:.4f} data.std={std:.4f}")


def padding_as_air(counts):
    """The histogram of Values with what scanners write outside their field of view counted as air; said."""
    first, air = PADDING + LIMIT, int(AIR["hu"]) + LIMIT
    padding = counts[:first].sum()
    if not padding or padding == counts.sum():
        return counts
    print(f"{100 * padding / counts.sum():.2g} % of the values are below {PADDING}, padding: counted as air")
    counts = counts.copy()
    counts[:first] = 0
    counts[air] += padding
    return counts


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
