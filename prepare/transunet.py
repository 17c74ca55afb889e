"""data.py transunet: TransUNet's files of Synapse (BTCV) to 16-bit PNG slices (HU + 1024), masks and lists.

As its code reads them (github.com/Beckschen/TransUNet, datasets/dataset_synapse.py):

    train_npz/case0005_slice000.npz    image (H, W), float: HU cut to -125 to 275, then 0 to 1; label (H, W)
    test_vol_h5/case0001.npy.h5        the same two as volumes (S, H, W)
    train.txt, test_vol.txt            the names, without suffix; here or in lists/lists_Synapse

They say neither which organ a label is, nor how large a voxel is, nor which side is left.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ct.layout import read_list
from ct.listing import natural_order
from ct.properties import HU_OFFSET, Properties, checked_names, class_names, read_json, write_properties
from ct.slices import IGNORE, MAX_SIDE, DataError, check_side, in_threads, write_png
from engine.config import ConfigError, one_line
from engine.files import write_whole
from engine.ownership import claim, contents, refuse_foreign, refuse_other_folder, remove_own
from prepare.lists import files_beside_images, remove_lists, write_lists
from prepare.npz import opened
from prepare.pairing import print_names
from prepare.slicing import file_identity, stored_slice

TRANSUNET = "data.py transunet"  # by which its files are known, see engine/ownership.py
LOW, HIGH = -125, 275  # HU, 0 and 1 of an image
ROUNDING = 1e-4  # by which an image may exceed 0 to 1
WHOLE = 0.01  # HU; cut values that were neither resampled nor scaled otherwise are whole numbers to this
NAME = r"\w[\w.-]*"  # of a case
FLIPS = {None: np.s_[:], "rows": np.s_[::-1], "columns": np.s_[:, ::-1], "both": np.s_[::-1, ::-1]}
UNPACKED = 1032  # bytes that deflate makes of one, at most
SOURCES = {"train": ("train.txt", "train_npz", ".npz"), "test": ("test_vol.txt", "test_vol_h5", ".npy.h5")}
WHY_NUMBERS = (
    "public sources disagree about the order of its organs; look at them (data.py show), "
    "then give --classes in this order"
)


@dataclass(frozen=True)
class Case:
    """files: of its slices, in order, for training; of the volume for testing. numbers: of those slices.
    turn: whether rows and columns are exchanged, and then a key of FLIPS."""

    name: str
    split: str
    turn: tuple
    files: list
    numbers: list


def make_from_transunet(args):
    """The transunet command. A case whose record (OUT/transunet/CASE.json) says that it was made from these
    files in this way is not made again.

    The lists are written last: without them nobody takes the set for complete.
    """
    source, out = Path(args.folder), Path(args.out)
    cases = find_cases(source, (args.transpose, args.flip))
    if any(case.split == "test" for case in cases):
        import_h5py()
    check_out(source, cases, out)
    for part in ("images", "masks", "transunet"):
        (out / part).mkdir(parents=True, exist_ok=True)
    claim(out, TRANSUNET)
    remove_lists(out, TRANSUNET)
    made = in_threads(lambda case: write_case(case, out), cases, "transunet")
    records = {case.name: record for case, record in zip(cases, made)}
    classes = classes_of(records, args.classes)
    sizes = {tuple(record["size"]) for record in records.values()}
    known = {"kind": "hu", "hu_offset": HU_OFFSET, "axis": 2, "classes": classes}
    known |= {"size": sizes.pop()} if len(sizes) == 1 else {}
    write_properties(out, Properties(**known, source=str(args.folder), made_by=TRANSUNET))
    lists = {split: slices_of(cases, records, split) for split in SOURCES}
    write_lists(out, lists | {"unlabelled": lists["train"]}, TRANSUNET)
    report(out, cases, records, lists)
    if not args.classes:
        print(f"classes are called by number, up to {classes[-1]}: {WHY_NUMBERS}")
    return 0


def report(out, cases, records, lists):
    former = [path.name for path in contents(out / "images") if path.name not in records]
    print_names("in images, but of former calls and in no list (delete them in images and masks)", former)
    odd = [name for name, record in records.items() if not record["whole"]]
    if odd:
        text = f"values are no whole HU if 0 to 1 is {LOW} to {HIGH}: resampled, or scaled otherwise"
        print(f"warning: {odd[0]} ({len(odd)} of {len(records)} cases): {text}")
    parts = (
        f"{split} {len(names)} slices of {sum(case.split == split for case in cases)} cases"
        for split, names in lists.items()
    )
    print(f"{out}: {', '.join(parts)}; no validation cases: evaluate with data.val=null")


def check_out(source, cases, out):
    """ConfigError if the set would be written over, or into, what the command has not written."""
    refuse_other_folder(out, TRANSUNET)
    if source.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"{source}: is read, and lies in the set's own folder; choose another --out")
    files = [file for case in cases for file in case.files]
    refuse_foreign(files_beside_images(out), files, TRANSUNET)
    for case in cases:
        if up_to_date(case, out) is None:
            targets = [path for part in ("images", "masks") for path in contents(out / part / case.name)]
            refuse_foreign(targets, files, TRANSUNET, record=out / "transunet" / case.name)
            refuse_foreign([out / "transunet" / f"{case.name}.json"], files, TRANSUNET)


# ---- Which cases there are -----------------------------------------------------------------------


def find_cases(folder, turn):
    """The cases of both lists. DataError if there are none, one is in both, or a file is missing."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    cases = [case for split in SOURCES for case in cases_of(folder, split, turn)]
    if not cases:
        raise DataError(f"{folder}: neither train_npz nor test_vol_h5 is there, with files in it")
    splits = {}
    for case in cases:
        if splits.setdefault(case.name, case.split) != case.split:
            raise DataError(f"{folder}: {case.name} is for training and for testing; take it out of a list")
    return cases


def cases_of(folder, split, turn):
    """[Case] of one list, or without it of all files."""
    listed, part, suffix = SOURCES[split]
    if not contents(folder / part):
        print(f"{folder / part}: not there, or empty; the set has no {split}.txt")
        return []
    names = listed_names(folder, listed, suffix)
    if names is None:
        print(f"{folder}: no {listed}, nor in lists/lists_Synapse: all files of {part} are taken")
        names = [path.name.removesuffix(suffix) for path in contents(folder / part)]
    pattern = f"({NAME})_slice([0-9]+)" if split == "train" else f"({NAME})()"
    cases = {}
    for name in sorted(dict.fromkeys(names), key=natural_order):
        found = re.fullmatch(pattern, name)
        if not found:
            wanted = "CASE_slice000" if split == "train" else "case0001"
            raise DataError(f"{folder / part}: {one_line(name)}: a name like {wanted} is expected")
        path = folder / part / (name + suffix)
        if not path.is_file():
            raise DataError(f"{path}: not a file, but in {listed}")
        case = cases.setdefault(found[1], Case(found[1], split, turn, [], []))
        case.files.append(path)
        case.numbers.append(found[2])
    return [*cases.values()]


def listed_names(folder, listed, suffix):
    for path in (folder / listed, folder / "lists/lists_Synapse" / listed):
        if path.is_file():
            return [name.removesuffix(suffix) for name in read_list(path)]
    return None


def slices_of(cases, records, split):
    """The names of all slices of a split, as in a list."""
    chosen = [case.name for case in cases if case.split == split]
    return [f"{case}/{name}" for case in chosen for name in records[case]["slices"]]


# ---- One case ------------------------------------------------------------------------------------


def write_case(case, out):
    """Write a case's slices and masks -> its record: their names, size in px, highest label, and whether its
    values are whole HU."""
    if record := up_to_date(case, out):
        return record
    about, notes = out / "transunet" / f"{case.name}.json", out / "transunet" / case.name
    about.unlink(missing_ok=True)
    notes.mkdir(exist_ok=True)
    for part in ("images", "masks"):
        (out / part / case.name).mkdir(exist_ok=True)
        remove_own(contents(out / part / case.name), TRANSUNET, notes)
    record = {"made_of": made_of(case), "slices": [], "size": None, "highest": 0, "whole": True}
    pairs = train_slices(case) if case.split == "train" else volume_slices(case.files[0])
    for number, where, image, label in pairs:
        hu, mask = (turned(part, *case.turn) for part in (to_hu(image, where), to_mask(label, where)))
        if hu.shape != mask.shape:
            raise DataError(f"{where}: image of {hu.shape} px (rows, columns), label of {mask.shape}")
        if record["size"] not in (None, hu.shape):
            raise DataError(f"{where}: {hu.shape} px, but {record['size']} in other slices of its case")
        name = f"{number}.png"
        write_png(out / "images" / case.name / name, stored_slice(hu), TRANSUNET, notes)
        write_png(out / "masks" / case.name / name, mask, TRANSUNET, notes)
        record["slices"].append(name)
        record["size"] = hu.shape
        record["highest"] = max(record["highest"], int(mask.max()))
        record["whole"] = record["whole"] and bool((np.abs(hu - np.rint(hu)) < WHOLE).all())
    write_whole(about, json.dumps(record), TRANSUNET)
    return record


def up_to_date(case, out):
    """The record of a case that is there, all of it, made from these files; else None."""
    path = out / "transunet" / f"{case.name}.json"
    record = read_json(path, dict) if path.is_file() else {}
    if record.get("made_of") != made_of(case):
        return None
    for part in ("images", "masks"):
        there = {path.name for path in contents(out / part / case.name) if path.stat().st_size}
        if not {*record["slices"]} <= there:
            return None
    return record


def made_of(case):
    text = json.dumps([case.turn, *map(file_identity, case.files)])
    return hashlib.sha256(text.encode()).hexdigest()


def train_slices(case):
    """Yields (number, where, image, label) of a case's .npz files."""
    for number, path in zip(case.numbers, case.files):
        with opened(path, "a slice of TransUNet's") as archive:
            yield number, path, archive.image("image"), archive.image("label")


def turned(array, transpose, flip):
    return (array.T if transpose else array)[FLIPS[flip]]


def to_hu(image, where):
    """An image in 0 to 1 -> HU, float64, not yet rounded."""
    if image.dtype.kind != "f":
        raise DataError(f"{where}: image: {image.dtype}, where floats in 0 to 1 are expected")
    if not ((image >= -ROUNDING) & (image <= 1 + ROUNDING)).all():  # also where they are NaN
        found = f"from {image.min():.4g} to {image.max():.4g}"
        raise DataError(f"{where}: image: values {found}, where 0 to 1 is expected ({LOW} to {HIGH} HU)")
    return LOW + (HIGH - LOW) * image.astype(np.float64)


def to_mask(label, where):
    """Labels, also as floats -> uint8."""
    with np.errstate(invalid="ignore"):  # of NaN, which is refused below
        whole = np.rint(label.astype(np.float64))
    wrong = label[(whole != label) | (whole < 0) | (whole >= IGNORE)]
    if wrong.size:
        text = f"where whole numbers 0 to {IGNORE - 1} are expected"
        raise DataError(f"{where}: label: {wrong.flat[0]:g}, {text}")
    return whole.astype(np.uint8)


def classes_of(records, given):
    """Names of the classes, background first: those of --classes, or numbers."""
    highest = max(record["highest"] for record in records.values())
    if not highest:
        raise DataError("no slice has any label")
    if given is None:
        return class_names("", highest + 1)
    names = [name.strip() for name in given.split(",")]
    names = names if names[0] == "background" else ["background", *names]
    if len(names) <= highest:
        raise DataError(f"--classes: names of {len(names) - 1} classes, but labels go up to {highest}")
    return checked_names(names, "--classes")


# ---- Volumes -------------------------------------------------------------------------------------


def import_h5py():
    try:
        import h5py
    except ImportError:
        raise DataError("TransUNet's test volumes need h5py: pip install h5py") from None
    return h5py


def volume_slices(path):
    """Yields (number, where, image, label) of the slices of an .h5 file, which are read one by one."""
    h5py = import_h5py()
    try:
        with h5py.File(path, "r") as file:
            image, label = (volume_in(file, name, path) for name in ("image", "label"))
            if image.shape != label.shape:
                raise DataError(f"{path}: image {image.shape}, but label {label.shape}")
            for index in range(len(image)):
                yield f"{index:03d}", f"{path}: slice {index}", image[index], label[index]
    except DataError:
        raise
    except Exception as error:  # whatever HDF5 finds damaged: many kinds
        raise DataError(f"{path}: not an HDF5 file, or damaged ({one_line(error)})") from None


def volume_in(file, name, path):
    """A dataset (S, H, W) of numbers that lies in the file itself; HDF5 can also point to others."""
    h5py = import_h5py()
    if name not in file:
        raise DataError(f"{path}: no {name} in it; is it a volume of TransUNet's?")
    found = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(found, h5py.Dataset) or found.is_virtual or found.external:
        raise DataError(f"{path}: {name}: an array in the file itself is expected")
    if found.ndim != 3 or found.dtype.kind not in "iufb" or not 0 < len(found) <= MAX_SIDE:
        raise DataError(f"{path}: {name}: {found.dtype} {found.shape}, where numbers (S, H, W) are expected")
    check_side(path, found.shape[1:])
    stored = found.id.get_storage_size()
    if found.size * found.dtype.itemsize > stored * UNPACKED:
        raise DataError(f"{path}: {name}: damaged, {stored} bytes are too few for {found.shape}")
    return found
