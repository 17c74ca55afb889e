"""Which files of a DICOM series make a volume: those on one grid and of one acquisition, sorted by place.

volumes_of    the files of a series as Series, in none of which acquisitions are mixed
TELLING       what tells acquisitions apart

Headers are dicts of texts, see read_header in scans.py.
"""

import hashlib
import math
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from ct.plausible import Doubt

FEWEST = 3  # slices; less is a localizer or a single picture
LARGEST_GAP = 3.5  # times the usual distance of slices; two of them may be missing in a row
UNEVEN = 0.02  # of the usual distance; what positions may be off without a word
ALTERNATING = 0.75  # a distance this much smaller than the next, again and again, is that of two series mixed
SAME_PLACE = 0.01  # mm
SAME_TURN = 0.01  # between cosines, half a degree
SAME_SPACING = 0.0005  # mm between the distances of pixels; a quarter of one over 512 of them
TILT = 0.5  # degrees between the way the slices go and the normal of their plane, worth a word
MIXED = (
    "acquisitions are mixed, and neither their numbers nor times nor anything else in the files tell which "
    "belong together: give each a folder of its own, or convert the series with dcm2niix"
)
# What tells acquisitions apart, the surest first: tags, whose texts are joined.
TELLING = {
    "acquisition": ("0020|0012",),
    "temporal position": ("0020|0100",),
    "phase of the heart": ("0020|9241", "0018|1060"),
    "time": ("0008|002a", "0008|0022", "0008|0032"),
    "kind of image": ("0008|0008",),
    "contrast medium": ("0018|0010", "0018|1042"),
    "kernel": ("0018|1210",),
    "kV": ("0018|0060",),
    "thickness": ("0018|0050",),
    "series": ("0020|0011", "0008|103e"),
    "time of the series": ("0008|0021", "0008|0031"),
    "time of the content": ("0008|0023", "0008|0033"),
    "time of writing": ("0008|0012", "0008|0013"),
}


@dataclass(frozen=True)
class Slice:
    """One DICOM file: where it lies, the cosines of a row and of a column (6,), row and column in mm as files
    count them; place: mm along the normal of its plane; told: the texts of TELLING."""

    path: Path
    size: tuple  # (columns, rows)
    spacing: tuple = ()  # mm between columns, between rows
    turned: tuple = ()
    position: tuple = ()  # mm of the first pixel
    place: float = 0
    number: int = 0
    told: tuple = ()

    def order(self):
        return self.place, self.number, str(self.path)


@dataclass(frozen=True)
class Series:
    """Files of one volume in the order of their places. uid: of a series and its part, hashed; patient: their
    ID, hashed, "" if the files name none."""

    folder: Path
    uid: str
    patient: str
    slices: tuple
    doubts: tuple = ()
    failure: str | None = None  # why it cannot be taken

    @property
    def path(self):
        """The file that stands for all of them."""
        return self.slices[0].path

    def where(self):
        return f"{self.folder}: series {self.uid}"


def volumes_of(members, are_copies):
    """[Series] of the files of one series, [(path, header)]. Each file of many frames is one; the others
    come apart by size, directions and distance of pixels, and by acquisition where acquisitions cover the
    same range. are_copies(path, path): whether two files that lie and tell the same hold the same."""
    found, headers = [], dict(members)
    for part in on_one_grid(members):
        slices, copies = without_copies(slices_of(part), are_copies)
        parts = untangled(slices)
        lists = parts or [slices]
        uids = [uid_of(one, headers) for one in lists]
        if len({*uids}) < len(uids):  # what tells them apart is no acquisition number
            uids = [hashed(uid, *one[0].told) for uid, one in zip(uids, lists)]
        for uid, one in zip(uids, lists):
            path = one[0].path
            series = Series(path.parent, uid, headers[path]["patient"], tuple(one))
            if parts is None:
                series = replace(series, failure=f"{series.where()}: {MIXED}")
            elif len(by_place(one)) >= FEWEST:
                series = judged(series, copies)
            found.append(series)
    return found


def hashed(*content):
    return hashlib.sha256("".join(map(str, content)).encode()).hexdigest()[:8]


def numbers(text, count):
    """count finite numbers, written 1\\2\\3; None for anything else."""
    try:
        values = tuple(float(part) for part in text.split("\\"))
    except ValueError:
        return None
    return values if len(values) == count and all(map(math.isfinite, values)) else None


def whole(text, otherwise):
    """A whole number of the 12 digits that DICOM allows; something else for any other text."""
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,12}", text) else otherwise


# ---- Apart by grid -------------------------------------------------------------------------------


def on_one_grid(members):
    """[[(path, header)]] of one size, directions and distance of pixels each, as in the first file of each;
    files of many frames alone."""
    alike = defaultdict(list)
    for path, header in members:
        alone = path if header["frames"] > 1 else None
        alike[header["size"], alone, header["orientation"], header["spacing"]].append((path, header))
    grids = []  # (what has to be equal, what has to be close, members)
    for (size, alone, orientation, spacing), part in alike.items():
        turned, apart = numbers(orientation, 6) or (), numbers(spacing, 2) or ()
        close = np.concatenate([np.divide(turned, SAME_TURN), np.divide(apart, SAME_SPACING)])
        for equal, first, own in grids:
            if equal == (size, alone) and np.abs(first - close).max(initial=0) < 1:
                own += part
                break
        else:
            grids.append(((size, alone), close, part))
    return [own for *_, own in grids]


def slices_of(part):
    """The Slices of files on one grid, sorted. Directions and distances of pixels, which may wobble, are
    those in the middle."""
    if part[0][1]["frames"] > 1:
        return [Slice(path, header["size"]) for path, header in part]
    turned = np.median([numbers(header["orientation"], 6) for _, header in part], 0)
    spacing = np.median([numbers(header["spacing"], 2) for _, header in part], 0)[::-1]
    normal = np.cross(turned[:3], turned[3:])
    slices = []
    for path, header in part:
        position, number = numbers(header["position"], 3), whole(header["number"], 0)
        place = float(normal @ position)
        grid = path, header["size"], tuple(spacing.tolist()), tuple(turned.tolist())
        slices.append(Slice(*grid, position, place, number, header["told"]))
    return sorted(slices, key=Slice.order)


# ---- Apart by acquisition ------------------------------------------------------------------------


def by_place(slices):
    """Sorted slices as lists of those that lie at the same place."""
    places = [[slices[0]]]
    for before, one in pairwise(slices):
        if one.place - before.place > SAME_PLACE:
            places.append([])
        places[-1].append(one)
    return places


def without_copies(slices, are_copies):
    """Sorted slices without those whose files are copies of others; and how many those are."""
    kept = []
    for there in by_place(slices):
        own = []
        for one in there:
            if not any(one.told == other.told and are_copies(one.path, other.path) for other in own):
                own.append(one)
        kept += own
    return kept, len(slices) - len(kept)


def untangled(slices):
    """Sorted slices as lists, in each of which no two acquisitions cover the same range; one picture at most
    may have been taken again. None if nothing tells them apart."""
    places = by_place(slices)
    if len(places) < FEWEST:
        return [slices]
    repeated = len(slices) - len(places)
    for index in range(len(TELLING)):
        parts = sweeps(slices, index)
        if len(parts) > 1 and (are_whole(parts) if repeated > 1 else are_interleaved(parts)):
            inner = [untangled(part) for part in parts]
            if all(inner):
                return [one for several in inner for one in several]
    return [slices] if repeated < 2 else None


def sweeps(slices, index):
    """Sorted slices as lists, by the texts of TELLING at `index`. What was scanned in steps stays together:
    in the order of the texts, a sweep goes on while what has the next text lies beside what has the one
    before, outside of all that the sweep covers."""
    groups = defaultdict(list)
    for one in slices:
        groups[one.told[index]].append(one)
    groups = [groups[text] for text in sorted(groups, key=lambda text: (numbers(text, 1) or (0,), text))]
    apart = [max(b[0].place - a[-1].place, a[0].place - b[-1].place) for a, b in pairwise(groups)]
    usual = usual_of([mm for mm in apart if mm > SAME_PLACE])
    found = [groups[0]]
    for group, mm in zip(groups[1:], apart):
        sweep = found[-1]
        outside = (
            group[0].place > sweep[-1].place + SAME_PLACE or group[-1].place < sweep[0].place - SAME_PLACE
        )
        if outside and are_steps([mm], usual):
            found[-1] = sweep + group if group[0].place > sweep[0].place else group + sweep
        else:
            found.append(group)
    return found


def are_whole(parts):
    """Whether these are volumes; what is too short for one, such as pictures that time the contrast medium,
    has to lie where a volume does."""
    ends, short = [], []
    for part in parts:
        if len(by_place(part)) < FEWEST:
            short += part
        else:
            ends.append((part[0].place - SAME_PLACE, part[-1].place + SAME_PLACE))
    return bool(ends) and all(any(low <= one.place <= high for low, high in ends) for one in short)


def are_interleaved(parts):
    """Whether these are volumes of evenly spaced slices each, of which two cover the same range."""
    for part in parts:
        apart = np.diff([there[0].place for there in by_place(part)])
        if len(apart) < FEWEST - 1 or not are_steps(apart, usual_of(apart)):
            return False
    parts = sorted(parts, key=lambda part: part[0].place)
    return any(b[1].place < a[-1].place for a, b in pairwise(parts))


def usual_of(apart):
    """A distance that a quarter does not exceed: longer ones may be those over missing slices."""
    return np.quantile(apart, 0.25, method="lower") if len(apart) else np.inf


def are_steps(apart, usual):
    """Whether distances are the usual one, or those over missing slices."""
    steps = np.divide(apart, usual)
    return steps.max() <= LARGEST_GAP and np.abs(steps - np.rint(steps).clip(1)).max() < 0.25


# ---- The places of a volume ----------------------------------------------------------------------


def uid_of(slices, headers):
    """Of the first of their files, in the order of the headers, hashed."""
    paths = {one.path for one in slices}
    path, header = next((path, header) for path, header in headers.items() if path in paths)
    content = [header[name] for name in ("series", "orientation", "acquisition", "size", "spacing")]
    return hashed(*content, path.name if header["frames"] > 1 else "")


def judged(series, copies):
    """A Series with one file a place, and what is odd about the places as its doubts, or its failure."""
    slices = [there[0] for there in by_place(series.slices)]
    odd, failure = odd_places(slices)
    if repeated := len(series.slices) - len(slices):
        odd.insert(0, f"{repeated} files lie where others do: of each place the first is taken")
    if copies:
        odd.insert(0, f"{copies} files are copies of others: left out")
    doubts = tuple(Doubt(f"{series.where()}: {text}") for text in odd)
    return replace(
        series, slices=tuple(slices), doubts=doubts, failure=failure and f"{series.where()}: {failure}"
    )


def odd_places(slices):
    """What is odd about the places of sorted slices, in words; and why they cannot be taken, or None."""
    along = np.array([one.place for one in slices])
    apart, odd = np.diff(along), []
    usual = float(np.median(apart))
    if alternate(apart):
        text = f"slices lie {apart.min():.4g} and {apart.max():.4g} mm apart in turns"
        return [], f"{text}: {MIXED}"
    gaps = sorted((i for i in range(len(apart)) if apart[i] > 1.5 * usual), key=lambda i: -apart[i])
    shown = "; ".join(f"{along[i]:.5g} and {along[i + 1]:.5g}" for i in gaps[:5])
    shown += " ..." if len(gaps) > 5 else ""
    if gaps and apart.max() > LARGEST_GAP * usual:
        text = f"slices are {usual:.4g} mm apart, but up to {apart.max():.4g} mm between {shown} mm"
        return [], f"{text}: more than {LARGEST_GAP:g} times as much; are files missing?"
    if gaps:
        odd.append(f"slices are missing (usually {usual:.4g} mm apart): between {shown} mm")
    elif np.abs(apart - usual).max() > UNEVEN * usual:
        span = f"{apart.min():.4g} to {apart.max():.4g} mm"
        odd.append(f"slices are unevenly spaced, {span}: {usual:.4g} mm is taken")
    way = np.subtract(slices[-1].position, slices[0].position)
    cosine = (along[-1] - along[0]) / max(np.linalg.norm(way), 1e-9)
    if (degrees := np.degrees(np.arccos(np.clip(cosine, -1, 1)))) > TILT:
        odd.append(f"the gantry was tilted by {degrees:.1f} degrees: each slice is taken as it lies")
    return odd, None


def alternate(apart):
    """Whether distances are short and long in turns, as where the slices of two acquisitions are mixed."""
    short = apart < ALTERNATING * np.quantile(apart, 0.9, method="lower")
    return len(apart) > FEWEST and np.mean(short[1:] != short[:-1]) > 0.6
