"""data.py slice: what the numbers in label volumes mean, and how they become masks."""

from pathlib import Path

import numpy as np

from ct.organs import BTCV_ORGANS
from ct.properties import class_names, read_json
from ct.slices import IGNORE, DataError
from engine.config import one_line
from prepare.pairing import print_names

LARGEST_ID = 65535
ROUNDING = 0.01  # a scaled header makes 0.9999998 or 1.0000153 of 1


def names_and_map(args):
    """Class names (or None) and label map {source id: target} (or None) as the arguments say; without any
    those of nnU-Net's dataset.json above the images folder, if there is one."""
    names = BTCV_ORGANS if args.classes == "btcv" else read_json(args.classes, list) if args.classes else None
    label_map = read_label_map(args.label_map) if args.label_map else None
    about = Path(args.images).parent / "dataset.json"
    if args.labels and names is None and label_map is None and about.is_file():
        print(f"class names from {about}")
        return read_nnunet_labels(about)
    return names, label_map


def read_nnunet_labels(path):
    """Names, and a map if there is an ignore label. Both styles: {"liver": 1}, and the old {"1": "liver"}."""
    labels = read_json(path, dict).get("labels")
    if not isinstance(labels, dict):
        raise DataError(f"{path}: labels: a JSON object is expected")
    if all(name.isdigit() for name in labels):
        labels = {name: int(number) for number, name in labels.items() if isinstance(name, str)}
    if not all(type(number) is int for number in labels.values()):
        raise DataError(f"{path}: labels: some are regions of several ids; name the ids with --classes")
    ignored = labels.pop("ignore", None)
    by_number = {number: name for name, number in labels.items()}
    if sorted(by_number) != [*range(len(labels))]:
        raise DataError(f"{path}: labels: ids from 0 on are expected; choose with --label-map and --classes")
    names = [by_number[number] for number in range(len(labels))]
    return names, None if ignored is None else {n: n for n in by_number} | {ignored: IGNORE}


def read_label_map(path):
    """{"source id": target id} from JSON, as {int: int}."""
    given = read_json(path, dict)
    try:
        label_map = {int(source): int(str(target)) for source, target in given.items()}  # 1.5 is not 1
    except ValueError:
        raise DataError(f'{path}: {{"source id": target id}} with whole numbers is expected') from None
    for source, target in label_map.items():
        if not (0 <= source <= 65535 and 0 <= target <= IGNORE):
            raise DataError(f"{path}: {source} -> {target}: ids from 0 to 65535 can become 0 to {IGNORE}")
    return label_map


def choose_classes(label_map, seen, given_names):
    """The class names: those given; BTCV's if a map leads to 1 ... 13, its organs; else class 1, class 2 ...

    seen: the ids in the label files.
    """
    targets = ({*label_map.values()} if label_map else {*seen}) - {0, IGNORE}
    if given_names:
        names = class_names("--classes", given_names)
    elif label_map and targets == {*range(1, len(BTCV_ORGANS))}:
        names = list(BTCV_ORGANS)
        print("class names: BTCV's, since the label map leads to 1 ... 13; --classes decides otherwise")
    else:
        names = class_names("", max(targets, default=1) + 1)
    if len(names) <= max(targets, default=0):
        raise DataError(f"{len(names)} class names (background first), but labels up to {max(targets)}")
    print(f"class names: {', '.join(names)}")
    named = dict(enumerate(names)) | {IGNORE: "ignored"}
    absent = [f"{id} ({named[label]})" for id, label in (label_map or {}).items() if id not in seen]
    print_names("ids of the label map that no volume holds", absent)
    return names


# ---- From voxels to masks ------------------------------------------------------------------------


def whole_numbers(labels, path):
    """Labels (S, H, W) of any type as uint16; what is nearly a whole number is rounded, anything else a
    DataError that says how much of it there is."""
    out = np.zeros(labels.shape, np.uint16)
    for one, target in zip(labels, out):  # a slice at a time: a volume in float64 is large
        near = np.rint(one)
        with np.errstate(invalid="ignore"):
            odd = ~(np.abs(one - near) <= ROUNDING)  # a NaN too
            odd |= (near < 0) | (near > LARGEST_ID)
        if odd.any():
            found = f"{one[odd][0]:g} in {odd.sum()} voxels of a slice"
            raise DataError(
                f"{path}: labels are whole numbers from 0 to {LARGEST_ID}, these are not: {found}"
            )
        target[...] = near
    return out


def ids_in(labels):
    """The sorted ids of labels uint16."""
    return np.flatnonzero(np.bincount(labels.ravel(order="K"))).tolist()


def check_ids(ids, label_map, names, path):
    """DataError if ids cannot become a mask with these class names, or None."""
    if label_map is None and max(ids) > IGNORE:
        text = f"a mask holds 0 to {IGNORE}, --label-map chooses among more"
        raise DataError(f"{path}: labels up to {max(ids)}; {text}")
    targets = {label_map.get(id, 0) for id in ids} if label_map else {*ids}
    if names and (above := sorted(targets - {*range(len(names)), IGNORE})):
        text = f"there are {len(names)} class names, background first; --label-map or --classes mends it"
        raise DataError(f"{path}: label {one_line(above[-1])}, but {text}")


def masks_of(labels, label_map):
    """Labels uint16 (S, H, W) as masks uint8, mapped; ids that the map does not list become background."""
    if label_map is None:
        return labels.astype(np.uint8)
    targets = np.zeros(LARGEST_ID + 1, np.uint8)
    for source, target in label_map.items():
        targets[source] = target
    return targets[labels]
