"""What a data set knows of itself: set.json in its root, written by every command that makes a set.

{"kind": "hu", "hu_offset": 1024, "axis": 2, "size": [512, 512], "spacing": {"case": [2.5, 0.8, 0.8]},
 "patients": {"case": "patient"}, "classes": ["background", "liver"], "source": "...",
 "made_by": "data.py slice"}

Each entry may be missing, and so may the file. patients.json, which `data.py list` writes, and classes.json
and spacing.json, which sets had before, are read where set.json does not say.
"""

import difflib
import json
import os
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from ct.slices import IGNORE, MAX_SIDE, DataError, is_npy, read_stored, slice_header
from engine.config import one_line
from engine.files import write_whole
from engine.text import read_text

NAME = "set.json"
MAX_JSON = 2**29  # bytes
MAX_SPACING = 1000  # mm between voxels
HU_OFFSET = 1024  # of 16-bit pictures, if nobody says
AXES = ("sagittal", "coronal", "axial")
KINDS = {"hu": "HU", "uint8": "8-bit values", "stored": "values as stored"}


@dataclass(frozen=True)
class Properties:
    """What set.json says; None or {} where it does not.

    kind       of the values: "hu"; "uint8", 8-bit pictures; or "stored", no HU and taken as they are
    hu_offset  HU = value of a 16-bit picture - this
    axis       that the slices lie across: 0 sagittal, 1 coronal, 2 axial
    size       (rows, columns) in px that all slices are brought to
    spacing    {case: (slice, row, column) in mm}
    patients   {case, or slice without suffix: patient} of the patients with several cases
    classes    their names, background first
    source     what the set was made of;  made_by: the command
    """

    kind: str | None = None
    hu_offset: float | None = None
    axis: int | None = None
    size: tuple | None = None
    spacing: dict = field(default_factory=dict)
    patients: dict = field(default_factory=dict)
    classes: list | None = None
    source: str | None = None
    made_by: str | None = None

    def missing(self):
        """The names of what nobody says, of what decides how slices are read and predictions are made."""
        said = {"kind": self.kind, "axis": self.axis, "size": self.size, "spacing": self.spacing or None}
        return [name for name, value in said.items() if value is None]

    def as_dict(self):
        """For JSON; what is not known is left out."""
        return {name: value for name, value in vars(self).items() if value not in (None, {})}


def assumed(properties, kind, size, root):
    """What is taken for granted of slices of this kind and size where set.json says nothing, as a line; "" if
    it says all."""
    meant = {
        "kind": KINDS[kind] + (" + 1024 in 16-bit pictures" if kind == "hu" else ""),
        "axis": "unknown",
        "size": f"{size[0]} x {size[1]} px",
        "spacing": "unknown",
    }
    said = "; ".join(f"{name}: {meant[name]}" for name in properties.missing())
    return said and f"{root}: set.json does not say, and is taken for granted: {said}"


def read_properties(root):
    """The Properties of the set in a folder. Raises DataError for a damaged file."""
    root = Path(root)
    path = root / NAME
    content = read_json(path, dict) if path.exists() else {}
    known = [one.name for one in fields(Properties)]
    for name in content.keys() - {*known}:
        if near := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
            raise DataError(f"{path}: no entry is called {one_line(name)}; {near[0]} is meant?")
    found = parse_properties(content, path)
    for name, kind in (("classes", list), ("spacing", dict), ("patients", dict)):
        beside = root / f"{name}.json"
        if beside.exists():
            alone = getattr(parse_properties({name: read_json(beside, kind)}, beside), name)
            if (own := getattr(found, name)) and own != alone:
                raise DataError(f"{path}: its {name} are not those in {beside.name}; remove one of them")
            found = replace(found, **{name: alone})
    return found


def write_properties(root, properties):
    """Write set.json, for the command that the properties name."""
    write_whole(Path(root) / NAME, json.dumps(properties.as_dict(), indent=1) + "\n", properties.made_by)


def parse_properties(content, path):
    """Properties of the JSON object that was read from `path`; entries of other names are left alone."""

    def take(name, holds, wanted):
        value = content.get(name)
        if value is not None and not holds(value):
            raise DataError(f"{path}: {name}: {wanted} is expected, not {one_line(str(value))}")
        return value

    spacing = (
        take("spacing", lambda value: isinstance(value, dict), "{case: [slice, row, column] in mm}") or {}
    )
    for case, three in spacing.items():
        whole = isinstance(three, list) and len(three) == 3
        if not whole or not all(is_number(mm) and 0 < mm < MAX_SPACING for mm in three):
            wanted = "[slice, row, column] in mm is expected"
            raise DataError(f"{path}: spacing: {one_line(case)}: {wanted}, not {one_line(three)}")
    patients = take("patients", is_names, "{case: patient}, both texts,")
    size = take("size", is_size, "[rows, columns] in px")
    classes = take("classes", lambda value: isinstance(value, list), "a list of names")
    return Properties(
        kind=take("kind", lambda value: value in KINDS, " or ".join(KINDS)),
        hu_offset=take("hu_offset", lambda value: is_number(value) and abs(value) < 2**16, "a number"),
        axis=take("axis", lambda value: type(value) is int and 0 <= value <= 2, "0, 1 or 2"),
        size=size and tuple(size),
        spacing={case: tuple(map(float, three)) for case, three in spacing.items()},
        patients=patients or {},
        classes=classes and checked_names(classes, path),
        source=take("source", lambda value: isinstance(value, str), "a text"),
        made_by=take("made_by", lambda value: isinstance(value, str), "a text"),
    )


def is_number(value):
    return type(value) in (int, float)


def is_names(value):
    return isinstance(value, dict) and all(isinstance(name, str) and name for name in value.values())


def is_size(value):
    two = isinstance(value, list) and len(value) == 2
    return two and all(type(px) is int and 0 < px <= MAX_SIDE for px in value)


# ---- How its slices are read ---------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """16-bit pictures' values minus hu_offset are of `kind`, "hu" or "stored", those of .npy of `arrays`."""

    kind: str = "hu"
    hu_offset: float = HU_OFFSET
    arrays: str = "hu"

    def header(self, path):
        """(height, width) in px and the kind of values, without reading the pixels."""
        size, stored = slice_header(path)
        return size, self.kind_of(stored, path)

    def slice(self, path):
        """A slice, float32 (H, W), and the kind of its values."""
        values, stored = read_stored(path, self.hu_offset)
        return values, self.kind_of(stored, path)

    def kind_of(self, stored, path):
        if stored == "uint8":
            return stored
        return self.arrays if is_npy(path) else self.kind


def reading_of(properties, hu_offset=None):
    """How slices of a set are read. hu_offset: data.hu_offset; None: the set's, else 1024.

    With 0, where the set does not say the same, 16-bit values are taken as stored. Raises DataError for
    another one than the set's.
    """
    own = properties.hu_offset
    if properties.kind == "stored":
        if hu_offset:
            raise DataError(
                f"data.hu_offset: {hu_offset:g}, but set.json says that values are no HU; leave it out"
            )
        return Reading("stored", 0, "stored")
    if hu_offset in (None, own):
        return Reading("hu", HU_OFFSET if own is None else own)
    if hu_offset == 0:
        return Reading("stored", 0)
    if own is not None:
        raise DataError(f"data.hu_offset: {hu_offset:g}, but set.json says {own:g}; correct either")
    return Reading("hu", hu_offset)


# ---- What travels with an encoder or a model -----------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What is known of the slices that an encoder or a model was trained on; None: unknown.

    kind      of their values, "hu", "uint8" or "stored"
    hu_offset     by which values of that set's 16-bit pictures exceed HU
    axis, size    that they lie across; (H, W) in px that they were brought to
    pixel_mm  how many mm apart rows and columns are then, ((least, most), (least, most))
    source    of the set
    neighbours    slices below and above that were further channels
    """

    kind: str | None = None
    hu_offset: float | None = None
    axis: int | None = None
    size: tuple | None = None
    pixel_mm: tuple | None = None
    source: str | None = None
    neighbours: int = 0


def parse_facts(content, path):
    """Facts from a JSON object; other entries are left alone. Raises DataError."""
    known = parse_properties(
        {name: content.get(name) for name in ("kind", "hu_offset", "axis", "source")}, path
    )
    size, mm = content.get("size"), content.get("pixel_mm")
    size = None if size is None else [*size]
    if size is not None and not is_size(size):
        raise DataError(f"{path}: size: [rows, columns] in px is expected, not {one_line(size)}")
    try:
        mm = mm and tuple((least + 0.0, most + 0.0) for least, most in mm)
        sound = mm is None or (len(mm) == 2 and all(0 < least <= most for least, most in mm))
    except (TypeError, ValueError):
        sound = False
    if not sound:
        raise DataError(f"{path}: pixel_mm: [[least, most], [least, most]] is expected, not {one_line(mm)}")
    neighbours = content.get("neighbours", 0)
    if type(neighbours) is not int or neighbours not in (0, 1):
        raise DataError(f"{path}: neighbours: 0 or 1 is expected, not {one_line(neighbours)}")
    return Facts(known.kind, known.hu_offset, known.axis, size and tuple(size), mm, known.source, neighbours)


# ---- Class names ---------------------------------------------------------------------------------


def class_names(root, classes=None):
    """The names of the classes, background first. `classes` is a list of them, or their number K
    (background, class 1 ... class K - 1), or None: the set in `root` has them."""
    path = Path(root) / NAME
    if isinstance(classes, int):
        classes = ["background"] + [f"class {index}" for index in range(1, classes)]
    if classes is None:
        classes = read_properties(root).classes
    if classes is None:
        raise DataError(
            f"{path}: no class names there; give the classes (a number, or names from background on)"
        )
    return checked_names(classes, path)


def checked_names(classes, path):
    texts = all(isinstance(name, str) and name.isprintable() for name in classes)
    if not texts or not 2 <= len(set(classes)) == len(classes) <= IGNORE:
        raise DataError(
            f"{path}: 2 to {IGNORE} different class names are expected, background first, "
            f"not {one_line(str(classes))}"
        )
    return list(classes)


def once_each(entries):
    """A JSON object as a dict; ValueError where json alone would take the last of two entries of one name."""
    content = dict(entries)
    if len(content) < len(entries):
        twice, _ = Counter(name for name, _ in entries).most_common(1)[0]
        raise ValueError(f"{twice!r} stands there twice")
    return content


def read_json(path, kind):
    """The content of a JSON file, which must be of type `kind` (dict or list)."""
    if os.path.exists(path) and os.path.getsize(path) > MAX_JSON:
        raise DataError(f"{path}: too large, {os.path.getsize(path) >> 20} MB")
    try:
        content = json.loads(read_text(path), object_pairs_hook=once_each)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({one_line(error)})") from None
    if not isinstance(content, kind):
        raise DataError(f"{path}: a JSON {'object' if kind is dict else 'list'} is expected")
    return content
