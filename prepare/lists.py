"""The lists of a set: which cases are for training, validation and test.

Those of new sets; and `data.py list`, for slices that did not come through a command.
"""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from ct.layout import SPLITS, all_slices, case_of, find_masks, packed_at, patient_of, without_suffix
from ct.listing import natural_order
from ct.patients import in_words, patients_of_slices
from ct.plausible import judge_lists
from ct.properties import read_json, read_properties
from ct.slices import DataError
from engine.files import write_whole
from engine.ownership import refuse_foreign, remove_own
from prepare.pairing import number_in, print_names

LIST = "data.py list"  # by which its files are known, see engine/ownership.py
PATIENTS = "patients.json"  # of `list`, which leaves set.json alone
ABOUT = ("set.json",)  # what else lies beside the lists
FOLDER_OF = {"train": "train", "training": "train", "imagestr": "train", "val": "val", "valid": "val"}
FOLDER_OF |= {"validation": "val", "imagesva": "val", "test": "test", "testing": "test", "imagests": "test"}


def split_cases(cases, val=None, test=None, patients=None):
    """{"train", "val", "test"}: cases, all of a patient together, drawn in a fixed random order. Without
    numbers of patients for val and test 20 %, at least one; of two none is for val. The cases of a single
    patient are divided like those of several.

    patients: see ct.properties.Properties.
    """
    groups = by_patient(cases, patients)
    count = len(groups)
    order = [groups[i] for i in np.random.default_rng(0).permutation(count)]
    held_out = max(1, round(0.2 * count)) if count > 1 else 0
    test = held_out if test is None else test
    val = (held_out if count > 2 else 0) if val is None else val
    train = count - test - val
    return {
        "train": sorted(sum(order[:train], []), key=natural_order),
        "val": sorted(sum(order[train : train + val], []), key=natural_order),
        "test": sorted(sum(order[train + val :], []), key=natural_order),
    }


def by_patient(cases, patients):
    """[the cases of a patient], or if all are of one, [[case]]."""
    groups = defaultdict(list)
    for case in cases:
        groups[(patients or {}).get(case, case)].append(case)
    return [*groups.values()] if len(groups) > 1 else [[case] for case in cases]


def files_beside_images(root):
    """All that a command may write into the root of a set."""
    return [root / name for name in (*(f"{split}.txt" for split in SPLITS), *ABOUT)]


def write_lists(root, lists, made_by, prefix=""):
    """{"train": names, ...} to root/train.txt ...; an empty list is not written."""
    for split, names in lists.items():
        if names:
            write_whole(root / f"{prefix}{split}.txt", "\n".join(names) + "\n", made_by)


def remove_lists(root, made_by, prefix=""):
    """What follows rewrites the set: without its lists nobody takes it for complete. The user's own stay."""
    remove_own([root / f"{prefix}{split}.txt" for split in SPLITS], made_by)


# ---- As the slice command is asked to -------------------------------------------------------------


def read_split(given, cases, patients=None):
    """{"train": cases, "val": cases, "test": cases} of labelled cases, as --split says; None without it.

    Fractions, "0.7,0.1,0.2", or a JSON file with these three (val may be missing): names of cases, or their
    numbers. Labelled cases that it does not name are for pretraining.
    """
    if given is None:
        return None
    if re.fullmatch(r"[\d.,\s]+", given):
        return split_by_fractions(given, cases, patients)
    content = read_json(given, dict)
    if unknown := content.keys() - {"train", "val", "test"}:
        raise DataError(f"{given}: train, val and test are expected, not {sorted(unknown)[0]}")
    split, taken = {}, {}
    for name in ("train", "val", "test"):
        entries = content.get(name, [])
        if not isinstance(entries, list) or not all(type(entry) in (str, int) for entry in entries):
            raise DataError(f"{given}: {name}: a list of names or numbers of cases is expected")
        split[name] = [find_case(entry, cases, given) for entry in entries]
        for case in split[name]:
            if case in taken:
                raise DataError(f"{given}: {case} is named twice, in {taken[case]} and {name}")
            taken[case] = name
    if not split["train"] or not split["test"]:
        raise DataError(f"{given}: train and test must name a case each")
    print_names(f"not in {given} (for pretraining only)", [case for case in cases if case not in taken])
    return split


def split_by_fractions(given, cases, patients=None):
    try:
        train, val, test = (float(part) for part in given.split(","))
    except ValueError:
        raise DataError(f"--split {given}: three fractions are expected, such as 0.7,0.1,0.2") from None
    number = len(by_patient(cases, patients))
    counts = [round(part * number) for part in (val, test)]
    if not 0 < train <= 1 or abs(train + val + test - 1) > 1e-6 or test <= 0 or sum(counts) >= number:
        raise DataError(
            f"--split {given}: fractions of {number} labelled cases or patients that sum to 1 are expected"
        )
    return split_cases(cases, *(max(count, part > 0) for count, part in zip(counts, (val, test))), patients)


def find_case(entry, cases, path):
    """The case of that name, or the only one with that last number (8 and "case0008" are img0008, too)."""
    if entry in cases:
        return entry
    number = entry if isinstance(entry, int) else number_in(entry)
    found = [case for case in cases if number_in(case) == number]
    if len(found) != 1:
        raise DataError(f"{path}: {entry}: {len(found) or 'no'} labelled cases of that name or number")
    return found[0]


def make_lists(records, split, patients=None):
    """{"train": names of slices ...} of the split of sliced cases, see `divide`."""
    names = {case: [f"{case}/{i:04d}.png" for i in range(r["slices"])] for case, r in records.items()}
    labelled = {
        case: [names[case][i] for i in record["labelled"]]
        for case, record in records.items()
        if record["labelled"] is not None
    }
    return divide(names, labelled, split, patients)


def divide(names, labelled, split=None, patients=None):
    """{"train": names of slices ...} of the split, without one 60/20/20 by the patients of labelled cases, or
    blocks of the only case. "unlabelled" has every slice of patients outside val and test, for pretraining.

    names, labelled: {case: its slices}, of all cases, and those with labels of the labelled ones.
    """
    dropped, patients, split_by_case = [], patients or {}, {}
    if split is None and len(labelled) == 1:
        [(case, own)] = labelled.items()
        lists, dropped = blocks(case, names[case], own)
    else:
        split = split_by_case = split or split_cases([*labelled], patients=patients)
        lists = {part: [name for case in cases for name in names[case]] for part, cases in split.items()}
    held_out = {*lists["val"], *lists["test"], *dropped}
    theirs = {patients.get(case, case) for part in ("val", "test") for case in split_by_case.get(part, [])}
    known = {case for cases in split_by_case.values() for case in cases}
    others = [case for case in names if case not in known and patients.get(case, case) in theirs]
    print_names("other scans of patients of val and test (in no list)", others)
    everything = (name for case, own in names.items() if case not in others for name in own)
    return lists | {"unlabelled": [name for name in everything if name not in held_out]}


def blocks(case, names, labelled, gap=2):
    """Contiguous 60/20/20 blocks inside the labelled range of the only labelled case, `gap` slices dropped
    between them -> the lists, and the dropped names."""
    first, last = (names.index(labelled[0]), names.index(labelled[-1])) if labelled else (0, -1)
    inside = names[first : last + 1]
    held_out = max(1, round(0.2 * (len(inside) - 2 * gap)))
    train = len(inside) - 2 * (held_out + gap)
    if train < 1:
        raise DataError(
            f"{case}: {len(inside)} slices with labels are too few for train, val and test blocks"
        )
    val, test = train + gap, train + gap + held_out + gap  # where these blocks begin
    lists = {"train": inside[:train], "val": inside[val : val + held_out], "test": inside[test:]}
    print(f"one labelled case: train, val and test are blocks of its slices with labels, {first} to {last}:")
    ranges = [
        f"{first + at}-{first + at + len(lists[split]) - 1}" for split, at in zip(lists, (0, val, test))
    ]
    print(f"train {ranges[0]}, val {ranges[1]}, test {ranges[2]}; {gap} slices dropped between two blocks")
    return lists, inside[train:val] + inside[val + held_out : test]


# ---- The list command ----------------------------------------------------------------------------


def list_set(args):
    """The list command: train.txt, val.txt, test.txt and unlabelled.txt of the slices in a folder.

    By patient, 60/20/20; slices that lie in folders called train, val or test stay in these. If there are
    masks only slices with a mask are in the first three. With --every N it is sparse_train.txt ..., see
    `sparse`. patients.json says whose the cases are, where several are of one.
    Lists that it did not write are never written over.
    """
    root = Path(args.root)
    if packed_at(root):
        raise DataError(f"{root}: a packed set, whose list is its own; list the folder it was made of")
    if "{split}" in args.images + args.masks:
        raise DataError("--images, --masks: name folders without {split}, also as data.images, data.masks")
    slices = all_slices(root / args.images)
    prefix = "sparse_" if args.every else ""
    refuse_foreign([root / f"{prefix}{split}.txt" for split in SPLITS], [], LIST, "--root")
    found = find_masks(root / args.masks, slices)
    masked = {name for name, mask in zip(slices, found) if mask}
    if not args.every:
        remove_own([root / PATIENTS], LIST)
    properties = read_properties(root)
    if properties.patients and args.patient:
        raise DataError(f"{root}: the set says which patients it has; take --patient away, or its patients")
    patients, how = patients_of_slices(slices, properties, args.patient)
    lists = sparse(slices, masked, args.every) if args.every else lists_of(slices, masked, patients)
    if patients and not properties.patients:
        refuse_foreign([root / PATIENTS], [], LIST, "--root")
        write_whole(root / PATIENTS, json.dumps(patients, indent=1) + "\n", LIST)
    remove_lists(root, LIST, prefix)
    write_lists(root, lists, LIST, prefix)
    print(f"{root}: {len(slices)} slices, {len(masked)} with masks; cases: {len({*map(case_of, slices)})}")
    print(in_words([*cases_by_patient(slices, patients)], patients, how))
    print_lists(lists, patients, prefix, not args.every)
    return 0


def sparse(slices, masked, every):
    """The lists of somebody who annotates one slice in `every` of each volume: those (train); those midway
    between two of them (val); the others that are two slices or more away from any annotated one (test).
    "unlabelled" has the annotated slices and all without a mask."""
    lists, seen = {split: [] for split in SPLITS}, Counter()
    for name in slices:
        place = seen[case_of(name)] % every
        if name not in masked:
            lists["unlabelled"].append(name)
            continue
        seen[case_of(name)] += 1
        if place == 0:
            lists["train"].append(name)
            lists["unlabelled"].append(name)
        elif place == every // 2:
            lists["val"].append(name)
        elif 2 <= place <= every - 2:
            lists["test"].append(name)
    if not lists["test"]:
        raise DataError(f"--every {every}: no slice with a mask is left for the test")
    return lists


def cases_by_patient(slices, patients):
    """{case: its slices}; a case with slices of several patients, by its name, becomes {slice: [itself]}."""
    cases = defaultdict(list)
    for name in slices:
        own = without_suffix(name)
        cases[own if own in patients else case_of(name)].append(name)
    return cases


def print_lists(lists, patients, prefix="", judged=True):
    """A line for each list, and a warning where two share a patient."""
    found = {}
    for split, names in lists.items():
        found[split] = {patient_of(name, case_of(name), patients) for name in names}
        cases = len({*map(case_of, names)})
        whose = f"; patients: {len(found[split])}" if patients else ""
        count = f"{len(names)} slices; cases: {cases}{whose}" if names else "none"
        print(f"{prefix}{split}.txt: {count}")
    found.pop("unlabelled")
    for doubt in judge_lists(found, "patients") if judged and patients else ():
        print(f"warning: {doubt.text}")


def lists_of(slices, masked, patients):
    """The lists of named slices; masked: those with a mask, without any all count as labelled."""
    cases, folders = cases_by_patient(slices, patients), defaultdict(list)
    labelled = cases_by_patient([name for name in slices if name in masked or not masked], patients)
    for name in slices:
        folders[folder_split(name)].append(name)
    if len(folders.keys() - {None}) > 1:
        lists = {split: folders[split] for split in ("train", "val", "test")}
        lists["unlabelled"] = [name for name in slices if folder_split(name) in ("train", None)]
        print("the slices lie in folders of a split, which is kept")
    else:
        lists = divide(cases, labelled, patients=patients)
    lists |= {
        split: [n for n in lists[split] if n in masked or not masked] for split in ("train", "val", "test")
    }
    return lists


def folder_split(name):
    """The list that a folder above a slice means, as in train/case1_000.png; None: no such folder."""
    parts = name.lower().split("/")[:-1]
    return next((FOLDER_OF[part] for part in parts if part in FOLDER_OF), None)
