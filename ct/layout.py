"""A data set on disk: its lists and cases, and packed sets (what it knows of itself: ct/properties.py).

root/images/CASE/SLICE.png    8- or 16-bit grey PNG, TIFF, BMP or JPEG, or .npy (H, W) int16 in HU
root/masks/CASE/SLICE.png     8-bit PNG, TIFF or BMP, pixel = class index, 255 = ignore
root/train.txt ...            one path per line, relative to images/
"""

import os
import re
import shlex
from array import array
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np

from ct.listing import PATIENT, files_below, natural_order
from ct.properties import parse_properties, read_json
from ct.slices import PICTURES, SUFFIXES, DataError, open_npy
from engine.config import one_line
from engine.text import encoding_of

LONGEST_LINE = 8192  # characters of a list
SPLITS = ("train", "val", "test", "unlabelled")  # what lists are called
SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test", "testing"}
SPLIT_FOLDERS |= {"unlabelled", "unlabeled", "imagestr", "imagesva", "imagests"}


def find_masks(folder, names):
    """The masks of slices as they are on disk, pictures of the slices' names: NAME.png, else of another
    suffix; None where there is none."""
    return find_slices(folder, map(without_suffix, names), PICTURES)


def mask_paths(folder, names):
    """Where the masks of slices lie in the masks folder; NAME.png where there is none."""
    found = find_masks(folder, names)
    return [Path(folder) / (there or f"{without_suffix(name)}.png") for there, name in zip(found, names)]


# ---- Lists and cases -----------------------------------------------------------------------------


class Strings(Sequence):
    """Many strings, immutable, in one block of memory that forked processes share.

    Of a list of a million str each makes a copy, page by page: reading a str writes its reference count.
    """

    def __init__(self, strings):
        text, ends = bytearray(), array("q", [0])
        for string in strings:
            text += string.encode("utf-8", "surrogatepass")
            ends.append(len(text))
        self.text, self.ends = bytes(text), ends

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        chosen = range(len(self))[index]
        if isinstance(chosen, range):
            return [self[i] for i in chosen]
        return self.text[self.ends[chosen] : self.ends[chosen + 1]].decode("utf-8", "surrogatepass")

    def __iter__(self):
        for start, end in pairwise(self.ends):
            yield self.text[start:end].decode("utf-8", "surrogatepass")

    def __eq__(self, other):
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other))


def checked(line, path):
    if len(line) > LONGEST_LINE:
        raise DataError(f"{path}: not a list, it has a line of more than {LONGEST_LINE} characters")
    return line


def read_list(path, folder=None):
    """The slice names of a list file, relative to the images `folder`, in which absolute paths may lie.

    A name ends at a suffix of slices, and a second column goes. In a line without one a last column, which
    may be a part of the name, is left: find_slices knows. A path that leaves the folder is a DataError;
    whether the files exist is not looked at.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            encoding = encoding_of(file.read(4))
        with open(path, encoding=encoding) as file:
            lines = iter(lambda: file.readline(LONGEST_LINE + 1), "")
            names = [name_in(checked(line, path)) for line in lines if not line.isspace()]
    except FileNotFoundError:
        raise DataError(f"{path}: no such list file ({mend_missing(path, folder)})") from None
    except UnicodeError:
        raise DataError(f"{path}: not a text in UTF-8 or UTF-16; save it as UTF-8") from None
    except DataError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise DataError(f"{path}: {getattr(error, 'strerror', error)}") from None
    if not names:
        raise DataError(f"{path}: the list is empty")
    places = [f"{place}/" for place in (Path(folder).absolute(), Path(folder).resolve())] if folder else []
    for index, name in enumerate(names):
        if name.startswith("/") and folder:
            names[index] = name = relative_to(folder, name, places)
        if name.startswith("/") or (".." in name and ".." in name.split("/")):
            raise DataError(
                f"{path}: {one_line(name)} leaves the data root; paths are relative to the images folder"
            )
        if "\\" in name or "\0" in name:
            raise DataError(f"{path}: {one_line(name)} has a backslash or a NUL; folders are separated by /")
    return names


def mend_missing(path, folder):
    """Which lists there are; for a set of slices without any, the command that writes them."""
    root = path.parent
    there = files_below(root, ".txt", deep=False) if root.is_dir() else []
    images = os.path.relpath(folder, root) if folder and os.path.isdir(folder) else ".."
    own = {f"{split}.txt" for split in SPLITS} & {*there} or images.startswith("..")
    if own or path.stem in images.split("/") or not files_below(folder, SUFFIXES):
        return f"there: {', '.join(there[:8]) or 'none'}"
    option = "" if images == "images" else f" --images {shlex.quote(images)}"
    command = f"python data.py list --root {shlex.quote(str(root))}{option}"
    return f"{command} writes train.txt, val.txt, test.txt and unlabelled.txt"


def relative_to(folder, name, places):
    """An absolute path inside the folder, relative to it; others as they are. places: how lists call the
    folder, each ending in /; a link that leads there is added to them."""
    if not any(map(name.startswith, places)):
        with suppress(OSError, ValueError):  # ValueError: a NUL in the name
            above = (place for place in Path(name).parents if place.exists())
            places += [f"{place}/" for place in above if place.samefile(folder)]
    return name.removeprefix(next(filter(name.startswith, places), ""))


def name_in(line):
    columns = line.split()
    if len(columns) == 1:  # as in most lists of a million lines
        return columns[0].removeprefix("./")
    line = line.strip().removeprefix("./")
    with_suffix = re.match(rf".+?({'|'.join(map(re.escape, SUFFIXES))})(?=\s|$)", line, re.IGNORECASE)
    return with_suffix.group() if with_suffix else line


def without_suffix(name):
    """The name of a slice without .png, .npy ...; other endings stay."""
    stem, _, ending = name.rpartition(".")
    return stem if f".{ending.lower()}" in SUFFIXES else name


def case_of(name):
    """The case of a slice: its parent folder, unless that is a split folder (train, val, test ...) or
    there is none: then the file name up to its last number ("train/img0001_slice012" -> "img0001_slice"), or
    the patient whose number that is ("IM003_patient05" -> "patient05")."""
    folder, _, file = name.rpartition("/")
    if folder and folder.rpartition("/")[2].lower() not in SPLIT_FOLDERS:
        return folder
    stem = without_suffix(file)
    before_number = re.match(r"(.*?)\d+\D*$", stem)
    patient = before_number and PATIENT.search(stem)
    if patient and patient.end() > before_number.end(1):  # that number is the patient's: IM003_patient05
        return patient.group()
    if before_number is None:  # no number: a case of its own
        return stem
    return before_number.group(1).rstrip("_-. ") or folder or "case"


def patient_of(name, case, patients):
    """The patient of a slice, by Properties.patients: that of its case, or its own; else its case."""
    return patients and (patients.get(case) or patients.get(without_suffix(name))) or case


class Cases(Strings):
    """The cases of named slices, worked out when they are asked for."""

    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        chosen = self.names[index]
        return case_of(chosen) if isinstance(chosen, str) else [*map(case_of, chosen)]

    def __iter__(self):
        return map(case_of, self.names)


def find_slices(folder, names, suffixes=(*SUFFIXES, "")):
    """The names as they are on disk, where suffixes may be written in capitals; a name that is not there
    becomes None.

    A name of several words is also tried without the last one, a second column, and any name without what
    leads to the folder, as in images/CASE/SLICE and data/set/images/CASE/SLICE. Each folder is listed once: a
    million names cost seconds, not a million look-ups.
    """
    listed = {}
    parts = Path(folder).absolute().parts
    leading = ["/".join(parts[start:]) + "/" for start in range(len(parts) - 1, 0, -1)]

    def find(name):
        parent, _, file = name.rpartition("/")
        there = listed.get(parent)
        if there is None:
            there = listed[parent] = files_in(os.path.join(folder, parent))
        stem = without_suffix(file)
        ending = file[len(stem) :].lower()
        if ending and file in there:
            return name
        endings = (ending,) if ending else suffixes
        forms = (stem + form for ending in endings for form in (ending, ending.upper(), ending.title()))
        spelled = next((form for form in forms if form in there), None)
        return spelled and name[: len(name) - len(file)] + spelled

    found = []
    for name in names:
        found.append(find(name))
        if found[-1] is None:
            names_of_it = [name] + [name.removeprefix(above) for above in leading if name.startswith(above)]
            one_less = [other.rsplit(maxsplit=1)[0] for other in names_of_it if len(other.split()) > 1]
            found[-1] = next(filter(None, map(find, names_of_it[1:] + one_less)), None)
    return found


def files_in(folder):
    try:
        return set(os.listdir(folder))
    except (OSError, ValueError):  # no such folder; ValueError: a name that cannot be one
        return set()


def all_slices(folder):
    """Every slice below a folder, as names relative to it in natural order."""
    if not os.path.isdir(folder):
        raise DataError(
            f"{folder}: no such folder; data.root (--root) holds it, data.images (--images) names it"
        )
    if not (names := files_below(folder, SUFFIXES)):
        raise DataError(f"{folder}: no slices ({', '.join(SUFFIXES)}) there")
    return names


def split_folder(root, list, folder):
    """The images or masks folder of a list: "{split}" in it is the list's name without suffix."""
    return Path(root) / folder.replace("{split}", Path(list).stem if list else "")


# ---- Neighbours ----------------------------------------------------------------------------------


def stacks_in(folder, names, reach):
    """Slices with their neighbours in the images folder, `reach` below and as many above, listed or not.

    Returns the names with those of further files behind them, and (N, 1 + 2 reach) int64: where in there the
    stack of a slice is, from below to above. Beyond the ends of a case its last slice is repeated.
    """
    cases = {}
    for parent in dict.fromkeys(name.rpartition("/")[0] for name in names):
        for file in files_below(os.path.join(folder, parent), SUFFIXES, deep=False):
            suffix = os.path.splitext(file)[1].lower()  # a copy in another format is no neighbour
            name = os.path.join(parent, file)
            cases.setdefault((case_of(name), suffix), []).append(name)
    return stacks(names, cases.values(), reach)


def stacks(names, cases, reach):
    """As stacks_in, of slices that lie in cases: lists of names from below to above."""
    listed, further = {}, {}
    for row, name in enumerate(names):
        listed.setdefault(name, row)
    rows = np.arange(len(names))[:, None].repeat(1 + 2 * reach, axis=1)
    for case in cases:
        for at, name in enumerate(case):
            for column in range(1 + 2 * reach) if name in listed else ():
                other = case[min(max(at + column - reach, 0), len(case) - 1)]
                if other not in listed:
                    further.setdefault(other, len(names) + len(further))
                rows[listed[name], column] = listed.get(other, further.get(other))
    return Strings([*names, *further]), rows[[listed[name] for name in names]]


# ---- Packed sets ---------------------------------------------------------------------------------


class PackedSlices:
    """NAME.npy (N, H, W) int16, and NAME.json with the names and cases of the slices, whether all neighbours
    of them are among them, and the set's properties, spacing being that on the common size."""

    def __init__(self, path):
        self.path = path.with_name(path.name + ".npy")
        array = open_npy(self.path, ndim=3)
        if array.dtype != np.int16 or not array.flags.c_contiguous:
            raise DataError(f"{self.path}: a packed set is int16 in C order, this is {array.dtype}")
        self.shape, self.start = array.shape, array.offset
        about = path.with_name(path.name + ".json")
        content = read_json(about, dict)
        for key in ("names", "cases"):
            strings = content.get(key)
            if not isinstance(strings, list) or len(strings) != len(array) or {*map(type, strings)} - {str}:
                raise DataError(f"{about}: {key}: a list of {len(array)}, one for each slice, is expected")
        self.names, self.cases = Strings(content["names"]), Strings(content["cases"])
        kind = content.get("kind", content.get("stored"))  # as it was called before
        self.properties = parse_properties(content | {"kind": kind}, about)
        if self.properties.kind is None:
            raise DataError(f"{about}: kind: says nothing of what the values are")
        self.complete = content.get("complete", True)

    def stacks(self, reach):
        """Of each slice its row with those below and above, (N, 1 + 2 reach) int64, as in stacks_in."""
        if not self.complete:
            text = "was packed without some of its slices' neighbours"
            raise DataError(f"{self.path}: {text}; pack a list of whole cases, or give the set's folder")
        cases = {}
        for case, name in sorted(zip(self.cases, self.names), key=lambda both: natural_order(both[1])):
            cases.setdefault(case, []).append(name)
        return stacks(self.names, cases.values(), reach)[1]

    def read(self, indices):
        """Yields the slices, float32 (H, W).

        They are read, not mapped: a process does not grow with the set, and a file that has become too
        short is an error with its name, not the end of the process.
        """
        slice = np.empty(self.shape[1:], np.int16)
        try:
            with open(self.path, "rb", buffering=0) as file:
                for index in indices:
                    file.seek(self.start + range(len(self.names))[index] * slice.nbytes)
                    if file.readinto(slice) < slice.nbytes:
                        raise DataError(f"{self.path}: too short, slice {index} is not there")
                    yield slice.astype(np.float32)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}") from None


def packed_at(root):
    """The packed set that `root` names (with or without .npy or .json), or None."""
    path = Path(root)
    if path.is_dir():
        return None
    path = path.with_suffix("") if path.suffix in (".npy", ".json") else path
    return PackedSlices(path) if path.with_name(path.name + ".npy").is_file() else None
