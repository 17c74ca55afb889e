"""data.py openkbp: a clone of OpenKBP's repository to 16-bit PNG slices (HU + 1024), masks and lists.

CT of head and neck of 340 patients, with organs drawn for radiotherapy (github.com/ababier/open-kbp, MIT
licence; Babier et al., Medical Physics 48, 2021, doi 10.1002/mp.14845):

    provided-data/train-pats/pt_1/ct.csv           index and value, HU + 1000, of each stored voxel
                                  Brainstem.csv    the indices of an organ's voxels; no file: it was not drawn
                                  voxel_dimensions.csv    mm between rows, columns and slices

An index counts voxels of a 128 x 128 x 128 array in C order: rows run to the patient's posterior, columns to
the left, slices to the feet. Nothing names the offset: with 1000 fat lies at -100 HU and muscle at +40.

The leak: a value is stored only where the plan's dose can be or a structure was drawn. In many slices that is
the organs alone, and the picture gives its labels away. So of each patient only the longest run of slices is
kept in which SURROUNDINGS px or more are stored outside of all seven organs, if it has FEWEST or more.
"""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ct.layout import case_of
from ct.listing import natural_order
from ct.organs import words
from ct.properties import HU_OFFSET, Properties, write_properties
from ct.slices import IGNORE, DataError, in_threads, write_png
from engine.config import ConfigError, one_line
from engine.ownership import claim, contents, refuse_foreign, refuse_other_folder, remove_own
from prepare.lists import files_beside_images, remove_lists, write_lists
from prepare.slicing import PARTS, slice_name

OPENKBP = "data.py openkbp"  # by which its files are known, see engine/ownership.py
ORGANS = {  # name: file; a voxel that was drawn as two of them is the later one
    "brainstem": "Brainstem",
    "spinal cord": "SpinalCord",
    "right parotid": "RightParotid",
    "left parotid": "LeftParotid",
    "esophagus": "Esophagus",
    "larynx": "Larynx",
    "mandible": "Mandible",
}
DRAWN_IN_MOST = [*ORGANS][:4]
FOLDERS = {"train": "train-pats", "val": "validation-pats", "test": "test-pats"}
PARTIAL = "train_partial"  # a list
SIDE = 128  # voxels along each axis
OFFSET, HIGHEST_HU = 1000, 3071  # of 12 bits; metal is stored up to 32,743
SURROUNDINGS, FEWEST = 800, 24  # px, slices
SOURCE = (
    "OpenKBP, github.com/ababier/open-kbp, MIT licence, Copyright (c) 2021 Aaron Babier; "
    "cite Babier et al., Medical Physics 48, 5549 (2021), doi 10.1002/mp.14845"
)


@dataclass(frozen=True)
class Patient:
    """complete: all organs that are asked for were drawn."""

    case: str
    split: str
    folder: Path
    complete: bool


def make_from_openkbp(args):
    """The openkbp command. It makes all of the set, also where a former call was interrupted; the lists are
    written last: without them nobody takes the set for complete."""
    out, organs = Path(args.out), wanted_organs(args.organs)
    patients = find_patients(Path(args.source), organs, partial=args.organs is not None)
    refuse_other_folder(out, OPENKBP)
    places = out.resolve(), Path(args.source).resolve()
    if places[0].is_relative_to(places[1]) or places[1].is_relative_to(places[0]):
        raise ConfigError(f"--out {out}: lies in the clone, or the clone in it; choose a folder elsewhere")
    former = [path for part in PARTS for case in contents(out / part) for path in contents(case)]
    refuse_foreign(former, [], OPENKBP, record=out)
    refuse_foreign([*files_beside_images(out), out / f"{PARTIAL}.txt"], [], OPENKBP)
    out.mkdir(parents=True, exist_ok=True)
    claim(out, OPENKBP)
    remove_lists(out, OPENKBP)
    remove_own([out / f"{PARTIAL}.txt"], OPENKBP)
    remove_own(former, OPENKBP, record=out)

    made = in_threads(lambda patient: write_case(patient, organs, out), patients, "openkbp")
    records = {patient.case: record for patient, record in zip(patients, made)}
    short = [case for case, record in records.items() if not record["slices"]]
    print_left_out(f"fewer than {FEWEST} slices with {SURROUNDINGS} px outside of their organs", short)
    patients = [patient for patient in patients if patient.case not in short]
    spacing = {patient.case: records[patient.case]["spacing"] for patient in patients}
    known = {"kind": "hu", "hu_offset": HU_OFFSET, "axis": 2, "size": (SIDE, SIDE), "spacing": spacing}
    known |= {"classes": ["background", *organs], "source": SOURCE, "made_by": OPENKBP}
    write_properties(out, Properties(**known))
    lists = lists_of(patients, records)
    write_lists(out, lists, OPENKBP)
    for split, names in lists.items():
        print(f"{split}.txt: {len(names)} slices; cases: {len({*map(case_of, names)})}")
    return 0


def wanted_organs(given):
    """brainstem,parotid_right,... or None -> their names here. Raises DataError."""
    if given is None:
        return DRAWN_IN_MOST
    known = {words(organ): organ for organ in ORGANS}
    organs = [known.get(words(name)) for name in given.split(",")]
    if None in organs or len({*organs}) < len(organs):
        raise DataError(f"--organs {one_line(given)}: different ones of {', '.join(ORGANS)} are expected")
    return organs


def find_patients(source, organs, partial):
    """[Patient] of the clone. Those without a CT, or without one of the organs, are named and left out;
    with `partial` one of the organs is enough for training."""
    if not source.is_dir():
        problem = "is a file; unpack it and give the folder" if source.exists() else "no such folder"
        raise DataError(f"{source}: {problem}")
    data = source / "provided-data" if (source / "provided-data").is_dir() else source
    if missing := [name for name in FOLDERS.values() if not (data / name).is_dir()]:
        text = "a clone of github.com/ababier/open-kbp, or its folder provided-data, is expected"
        raise DataError(f"{data}: no folder {missing[0]} in it; {text}")
    found, without_ct, undrawn = [], [], []
    for split, name in FOLDERS.items():
        folders = (path for path in (data / name).iterdir() if re.fullmatch(r"pt_\d+", path.name))
        for folder in sorted(folders, key=lambda path: natural_order(path.name)):
            drawn = [(folder / f"{ORGANS[organ]}.csv").is_file() for organ in organs]
            if not (folder / "ct.csv").is_file():
                without_ct.append(folder.name)
            elif all(drawn) or (partial and split == "train" and any(drawn)):
                found.append(Patient(folder.name, split, folder, all(drawn)))
            else:
                undrawn.append(folder.name)
    print_left_out("no ct.csv", without_ct)
    none = "for training none, otherwise " if partial else ""
    print_left_out(f"{none}not all drawn of {', '.join(organs)}", undrawn)
    cases = [patient.case for patient in found]
    if not found:
        raise DataError(f"{data}: no patient with a ct.csv and these organs")
    if twice := {case for case in cases if cases.count(case) > 1}:
        raise DataError(f"{data}: {min(twice)} is in two of its folders; clone it anew")
    return found


def print_left_out(why, cases):
    if cases:
        print(f"left out, {why}: {len(cases)}: {', '.join(cases)}")


def lists_of(patients, records):
    """{"train": names of slices ...}: the repository's split of the patients of whom all organs were drawn;
    in "train_partial" also the slices of others that show a drawn one."""
    lists = {name: [] for name in (*FOLDERS, PARTIAL, "unlabelled")}
    for patient in patients:
        record = records[patient.case]
        names = [f"{patient.case}/{slice_name(index)}" for index in range(record["slices"])]
        if patient.complete:
            lists[patient.split] += names
        if patient.split == "train":
            lists["unlabelled"] += names
            lists[PARTIAL] += names if patient.complete else [names[index] for index in record["labelled"]]
    if all(patient.complete for patient in patients):
        del lists[PARTIAL]
    return lists


# ---- One case ------------------------------------------------------------------------------------


def write_case(patient, organs, out):
    """Write a case's slices and masks, from the feet up -> its record: number of slices, which of them show
    an organ, and (slice, row, column) in mm."""
    stored, mask, spacing = read_case(patient, organs)
    hu = (stored - OFFSET).clip(max=HIGHEST_HU)
    for part, volume in zip(PARTS, ((hu + HU_OFFSET).astype(np.uint16), mask)):
        for index, one in enumerate(volume):
            path = out / part / patient.case / slice_name(index)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_png(path, one, OPENKBP, record=out)
    labelled = np.flatnonzero(((mask > 0) & (mask != IGNORE)).any((1, 2)))
    return {"slices": len(mask), "labelled": labelled.tolist(), "spacing": spacing}


def read_case(patient, organs):
    """Stored values int32 and masks uint8, (S, 128, 128) from the feet up, of the slices that are kept; the
    spacing in mm. Where not all organs were drawn, what is not drawn is to be ignored: it may be one."""
    values = read_csv(patient.folder / "ct.csv", columns=2)
    stored = np.zeros(SIDE**3, np.int32)
    stored[values[:, 0]] = values[:, 1]
    drawn, mask = np.zeros(SIDE**3, bool), np.zeros(SIDE**3, np.uint8)
    for organ, file in ORGANS.items():
        path = patient.folder / f"{file}.csv"
        if path.is_file():
            voxels = read_csv(path, columns=1)[:, 0]
            drawn[voxels] = True
            mask[voxels] = organs.index(organ) + 1 if organ in organs else 0
    if not patient.complete:
        mask[mask == 0] = IGNORE
    around = np.count_nonzero(((stored > 0) & ~drawn).reshape(SIDE**2, SIDE), axis=0)  # (slices,)
    run = longest_run(around >= SURROUNDINGS)
    run = run if run.stop - run.start >= FEWEST else slice(0)
    view = [np.moveaxis(array.reshape(SIDE, SIDE, SIDE), 2, 0)[run][::-1] for array in (stored, mask)]
    return *view, read_spacing(patient.folder / "voxel_dimensions.csv")


def longest_run(true):
    """The slice of the longest run in a boolean array (n,), the first of several; empty if there is none."""
    edges = np.flatnonzero(np.diff(true, prepend=False, append=False)).reshape(-1, 2)  # begin, end
    begin, end = max(edges.tolist(), key=lambda edge: edge[1] - edge[0], default=(0, 0))
    return slice(begin, end)


def read_csv(path, columns):
    """The rows of a file of voxels, int64 (n, columns): an index, which increases, and perhaps a value."""
    content = path.read_bytes() if path.is_file() else b""
    if not content.startswith(b",data") or not content.endswith(b"\n"):
        raise DataError(f"{path}: missing, damaged or cut short: a line ,data and whole lines are expected")
    rows = read_numbers(path, skiprows=1, usecols=range(columns)).reshape(-1, columns)
    if not ((rows >= 0) & (rows == np.rint(rows)) & (rows < [SIDE**3, 2**16][:columns])).all():
        raise DataError(f"{path}: damaged: whole numbers are expected, an index below {SIDE}^3 and a value")
    if (np.diff(rows[:, 0]) <= 0).any():
        raise DataError(f"{path}: damaged: indices in increasing order are expected")
    return rows.astype(np.int64)


def read_spacing(path):
    """(slice, row, column) in mm."""
    mm = read_numbers(path).ravel()
    if len(mm) != 3 or not ((mm > 0.1) & (mm < 100)).all():
        raise DataError(f"{path}: damaged: three distances in mm are expected, not {one_line(mm.tolist())}")
    return tuple(mm[[2, 0, 1]].round(6).tolist())


def read_numbers(path, **how):
    try:
        with warnings.catch_warnings(action="ignore"):  # of a file without numbers
            return np.loadtxt(path, delimiter=",", **how)
    except (OSError, ValueError) as error:  # ValueError: also of bytes that are no text
        raise DataError(f"{path}: missing or damaged ({one_line(error)})") from None
