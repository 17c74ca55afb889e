"""What is odd about data, and what cannot be right: every command and script asks here.

Values       a histogram of HU or other stored values
judge_...    what is doubtful about values, a window, masks, lists, pixel spacing: [Doubt]
heed         says it, and raises DataError where nothing right can come out, unless somebody insists
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from ct.organs import BTCV_ORGANS, words
from ct.properties import AXES, KINDS
from ct.slices import IGNORE, DataError
from engine.config import one_line

LIMIT = 70_000  # values beyond this are counted as this
PADDING = -1500  # HU; what lies below is no air, but what scanners write outside their field of view
OUTSIDE = -200  # HU; every scan has air or lung, which is below
DENSE = 300  # HU; soft tissue is below
BONE = 800  # HU; only thick bone and metal are above
SCALED = 20  # HU; no scan stays below, but values scaled to [0, 1], or to mean 0 and deviation 1, and ids do
AIR = (-1200, -900)  # HU
CUT = 0.05  # the share of air, at least, in slices of a body
METAL = 10_000  # HU; nothing in a patient is beyond, metal on scanners with an extended range is
AS_STORED = '"kind": "stored" in set.json with data.window=[low,high] takes them as they are'
NAMED = 13  # so many absent classes are named, the organs of BTCV
SPACING_TOLERANCE = 1.2  # pixels that are finer or coarser than in training by this factor are worth a word


@dataclass(frozen=True)
class Doubt:
    """Something odd; `fatal`: from which nothing right can come. The text says where, and what to do."""

    text: str
    fatal: bool = False


def heed(doubts, insist, how, say):
    """Say the doubts, each in one line; returns them as said. `how` insists, as "--ignore-values" does;
    "" if nothing does.

    Raises DataError for the first fatal one, unless `insist`.
    """
    said = [one_line(doubt.text, 1000) for doubt in doubts]
    for doubt, text in zip(doubts, said):
        if doubt.fatal and not insist:
            raise DataError(text + (f" ({how} insists)" if how else ""))
        say(text)
    return said


# ---- Values --------------------------------------------------------------------------------------


class Values:
    """A histogram of whole values, of slices or volumes: counts[value + LIMIT].

    lowest and highest are the true ones; `unfit` counts what is no finite number.
    """

    def __init__(self):
        self.counts = np.zeros(2 * LIMIT + 1, np.int64)
        self.lowest, self.highest, self.unfit = np.inf, -np.inf, 0

    def add(self, values):
        """Count an array of any shape."""
        return self.merge(histogram(values))

    def merge(self, counted):
        """Add what `histogram` has counted."""
        first, counts, lowest, highest, unfit = counted
        self.unfit += unfit
        if len(counts):
            self.lowest, self.highest = min(self.lowest, lowest), max(self.highest, highest)
            self.counts[first + LIMIT : first + LIMIT + len(counts)] += counts
        return self

    def total(self):
        return int(self.counts.sum())

    def share(self, low, high):
        """Of the values from `low` to `high` (whole numbers, both included)."""
        low, high = (int(np.clip(value, -LIMIT, LIMIT)) + LIMIT for value in (low, high))
        return self.counts[low : high + 1].sum() / max(1, self.total())

    def lowest_above(self, limit):
        """The lowest value from a limit on; the limit without any."""
        above = np.flatnonzero(self.counts[limit + LIMIT :])
        return limit + int(above[0]) if len(above) else limit

    def quantile(self, share):
        return int(np.searchsorted(self.counts.cumsum(), share * self.total())) - LIMIT


def histogram(values):
    """Of an array: the first whole value (those beyond LIMIT counted as LIMIT), counts from there on, the
    lowest and the highest value, and how many are no finite number."""
    values = np.asarray(values).ravel()
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    if not finite.size:
        return 0, (), np.inf, -np.inf, values.size
    whole = np.rint(finite.clip(-LIMIT, LIMIT)).astype(np.int64)
    first = int(whole.min())
    counts = np.bincount(whole - first)
    return first, counts, finite.min().item(), finite.max().item(), values.size - finite.size


def judge_values(values, where, mend, otherwise=""):
    """Whether values taken for HU can be HU. `mend` is what to do if not, "{offset}" in it being the value
    that would have to be subtracted from them; `otherwise`, where subtracting does not make them so."""
    doubts = []
    if values.unfit:
        share = 100 * values.unfit / (values.unfit + values.total())
        text = f"{where}: {values.unfit} values ({share:.3g} %) are not finite numbers: taken as air"
        doubts.append(Doubt(text, fatal=not values.total()))
    if not values.total():
        return doubts
    if values.lowest == values.highest:
        return [*doubts, Doubt(f"{where}: all values are {values.lowest:g}, an empty image")]
    found = f"{where}: values from {values.lowest:g} to {values.highest:g}"
    offset = fitting_offset(values)
    otherwise = otherwise and f"; {otherwise}"
    proposal = otherwise if offset is None else f"; {mend.format(offset=f'{offset:g}')}"
    beyond = values.share(METAL + 1, LIMIT) + values.share(-LIMIT, -METAL - 1)
    if beyond:
        text = f"{found}, {100 * beyond:.3g} % of them beyond +-{METAL:,}: no HU"
        far = proposal if (offset or 0) > METAL else otherwise
        doubts.append(Doubt(text + far, fatal=beyond > 0.001))
    if values.lowest > -SCALED and values.highest < SCALED:
        text = f"{found}: no HU, which are whole numbers; scaled to that, or labels?{otherwise}"
        return [*doubts, Doubt(text, fatal=True)]
    if values.share(OUTSIDE + 1, LIMIT) < 0.001:
        text = f"{found}, hardly any above {OUTSIDE} as tissue would be: no HU"
        if values.share(-2300, -1700) > 0.05:
            return [*doubts, Doubt(f"{text}; {mend.format(offset='-1024')}", fatal=True)]
        if values.share(*AIR) <= 0.5 * values.share(PADDING, LIMIT):  # else a slice of air
            return [*doubts, Doubt(f"{text}; an offset too large?", fatal=True)]
    air = values.share(PADDING, OUTSIDE)
    if not air or (air < 0.001 and values.share(BONE, LIMIT) > 0.1):  # interpolation can leave a little
        text = f"{found}, {'hardly any' if air else 'none'} below {OUTSIDE} as air would be: no HU" + proposal
        cut = values.share(values.lowest, values.lowest)
        if offset is None and values.lowest > OUTSIDE and cut > CUT:
            text = f"{found}, {100 * cut:.0f} % of them the lowest: HU that were cut there, air with them"
        doubts.append(Doubt(text, fatal=offset is not None))
    return doubts


def fitting_offset(values):
    """What would have to be subtracted from values for them to be HU; None if that would not make them so.

    The usual 1024 or 32768 if the lowest value is one of air then, which reconstruction can put far below
    -1024; else the lowest becomes -1024.
    """
    air = values.share(PADDING, OUTSIDE)
    lowest = values.lowest_above(PADDING)
    usual = (offset for offset in (1024, 32768) if air or PADDING <= lowest - offset <= -900)
    offset = next(usual, lowest + 1024)
    tissue = values.share(offset + OUTSIDE, offset + DENSE) if offset < 2**16 else 0
    return offset if tissue > 0.05 else None


def judge_ranges(ranges, where):
    """Whether some cases of a set hold other values than the rest. ranges: {case: (lowest, highest) HU}."""
    odd = [case for case, (lowest, highest) in ranges.items() if lowest >= OUTSIDE or highest <= OUTSIDE]
    if not 0 < len(odd) < len(ranges):
        return []
    first = odd[0]
    text = f"{len(odd)} of {len(ranges)} cases, unlike the rest, have no air (below {OUTSIDE}) or no tissue"
    low, high = ranges[first]
    return [Doubt(f"{where}: {text}; the first: {one_line(first)}, from {low:g} to {high:g}")]


def judge_kinds(counts, said, where):
    """Whether slices are of one kind, that in set.json. counts: {kind: slices}; said: the kind, or None."""
    if len(counts) > 1:
        kinds = " and ".join(f"{count} slices of {KINDS[kind]}" for kind, count in counts.items())
        return [Doubt(f"{where}: {kinds}: one set cannot mix them", fatal=True)]
    kind = next(iter(counts), None)
    if kind and said and (said == "uint8") != (kind == "uint8"):
        return [Doubt(f"{where}: holds {KINDS[kind]}, but its set.json says {KINDS[said]}", fatal=True)]
    return []


def judge_window(values, window, where):
    """Whether a window shows anything of the values: (low, high), None for all."""
    if window is None or not values.total() or values.lowest == values.highest:
        return []
    low, high = window
    black, white = values.share(-LIMIT, low), values.share(high, LIMIT)
    inner = [values.quantile(share) for share in (0.005, 0.995)]
    if max(black, white) < 0.995:
        if inner[1] - inner[0] >= 0.01 * (high - low):
            return []
        text = f"values of {inner[0]:g} to {inner[1]:g} have no contrast in the window [{low:g}, {high:g}]"
        return [Doubt(f"{where}: {text}; data.window=[low,high] chooses another", fatal=True)]
    fitting = f"[{values.quantile(0.01):g},{values.quantile(0.99):g}]"
    shown = f"{100 * max(black, white):.1f} % of the values are {'black' if black > white else 'white'}"
    text = f"{where}: {shown} in the window [{low:g}, {high:g}]; 98 % of them lie in data.window={fitting}"
    return [Doubt(text, fatal=True)]


def judge_spacings(spacing, where):
    """Whether pixels of a set's cases differ in size: one [Doubt] or []. spacing: {case: (slice, row,
    column) mm}."""
    for name, axis in (("rows", 1), ("columns", 2)):
        sizes = {case: mm[axis] for case, mm in spacing.items()}
        small, large = (end(sizes, key=sizes.get, default=None) for end in (min, max))
        if sizes and sizes[large] > SPACING_TOLERANCE * sizes[small]:
            text = f"{name} from {sizes[small]:.3g} mm ({small}) to {sizes[large]:.3g} mm ({large}) apart"
            mend = "data.py slice --spacing MM brings them to one"
            return [Doubt(f"{where}: {text}: organs differ in size by that; {mend}")]
    return []


def judge_known_spacing(spacing, cases, where):
    """Whether a set that knows the spacing of some of its cases knows that of all."""
    unknown = [case for case in dict.fromkeys(cases) if case not in spacing]
    if not spacing or not unknown:
        return []
    found = f"{len(unknown)} of {len({*cases})} cases have no spacing in set.json, the first: {unknown[0]}"
    return [Doubt(f"{where}: {found}: no Hausdorff distance there, and their pixels count as large as all")]


# ---- What an encoder or a model was trained on ---------------------------------------------------


def judge_facts(theirs, ours, where):
    """Whether slices are like those that an encoder or a model was trained on. Both are Facts."""
    doubts = []
    if theirs.kind and ours.kind and theirs.kind != ours.kind:
        kinds = f"{KINDS[theirs.kind]}, these slices hold {KINDS[ours.kind]}"
        doubts.append(Doubt(f"{where}: was trained on {kinds}", fatal=True))
    known = None not in (theirs.hu_offset, ours.hu_offset)
    if theirs.kind == ours.kind == "stored" and known and theirs.hu_offset != ours.hu_offset:
        offsets = f"HU + {theirs.hu_offset:g}, these slices hold HU + {ours.hu_offset:g}"
        doubts.append(Doubt(f"{where}: was trained on {offsets}", fatal=True))
    if None not in (theirs.axis, ours.axis) and theirs.axis != ours.axis:
        axes = f"{AXES[theirs.axis]} slices, these are {AXES[ours.axis]}"
        doubts.append(Doubt(f"{where}: was trained on {axes}"))
    if theirs.neighbours != ours.neighbours:
        channels = f"data.neighbours={theirs.neighbours}, here it is {ours.neighbours}"
        doubts.append(Doubt(f"{where}: was trained with {channels}"))
    for name, mine, other in zip(("rows", "columns"), theirs.pixel_mm or (), ours.pixel_mm or ()):
        if mine[1] * SPACING_TOLERANCE < other[0] or other[1] * SPACING_TOLERANCE < mine[0]:
            apart = (
                f"{name} {mine[0]:.3g} to {mine[1]:.3g} mm apart, here {other[0]:.3g} to {other[1]:.3g} mm"
            )
            doubts.append(Doubt(f"{where}: was trained on {apart}"))
    return doubts


# ---- Masks ---------------------------------------------------------------------------------------


def judge_masks(pixels, names, where):
    """Whether masks hold something to learn. pixels: of each of the 256 values; names: of the classes."""
    seen = np.flatnonzero(pixels).tolist()
    doubts = []
    if words(names[0]) in map(words, BTCV_ORGANS[1:]):
        text = f"{where}: {names[0]} is the name of class 0, the background, which is not scored"
        doubts.append(Doubt(f"{text}; names are given from the background on"))
    if not pixels[0]:
        doubts.append(Doubt(f"{where}: no pixel of class 0, {names[0]}; class 0 is the background"))
    absent = [name for label, name in enumerate(names) if label and not pixels[label]]
    if len(absent) < len(names) - 1:
        some = ", ".join(absent[:NAMED]) + (", ..." if len(absent) > NAMED else "")
        text = f"{where}: no pixel of {some} ({len(absent)} of {len(names) - 1} classes)"
        return [*doubts, Doubt(text)] if absent else doubts
    if IGNORE in seen:
        mend = "if 255 means a class, data.mask_map={255: 1}"
        return [Doubt(f"{where}: only the values {seen}, and 255 is ignored: nothing to learn; {mend}", True)]
    return [Doubt(f"{where}: only background, no pixel of any class: nothing to learn", True)]


def judge_gaps_of_labels(pixels, where):
    """Whether masks without class names number their classes one by one."""
    seen = [label for label in np.flatnonzero(pixels).tolist() if label not in (0, IGNORE)]
    if len(seen) == max(seen, default=0):
        return []
    numbered = ", ".join(f"{label}: {number}" for number, label in enumerate(seen, 1))
    text = f"{where}: labels {one_line(', '.join(map(str, seen)))} leave classes without a pixel"
    return [Doubt(f"{text}; data.mask_map={{{numbered}}} numbers them one by one")]


# ---- Lists ---------------------------------------------------------------------------------------


def judge_lists(cases, what="cases"):
    """Whether lists share cases or patients. cases: {"train": those of its slices, ...}; what they are."""
    counts = Counter(case for own in cases.values() for case in set(own))
    shared = sorted(case for case, count in counts.items() if count > 1)
    if not shared:
        return []
    several = " and ".join(split for split, own in cases.items() if {*shared} & {*own})
    first = f"{len(shared)}, the first: {one_line(shared[0])} (in {several})"
    return [Doubt(f"{what} in several of {', '.join(cases)}: {first}; their scores flatter")]


def judge_copies(copies):
    """Whether val or test hold slices of another list under other names. copies: [(name, other name)]."""
    if not copies:
        return []
    first = " and ".join(map(one_line, copies[0]))
    text = f"{len(copies)} slices of val or test have the very pixels of slices in another list"
    return [Doubt(f"{text}, the first: {first}; their scores flatter")]
