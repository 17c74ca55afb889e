"""data.py slice: CT volumes, with labels or without, to 16-bit PNG slices, 8-bit masks, names and lists.

Folders as they are published: BTCV (img/img0001.nii.gz, label/label0001.nii.gz), AbdomenCT-1K
(Case_00001_0000.nii.gz, Case_00001.nii.gz), nnU-Net's raw ones (imagesTr, labelsTr, dataset.json).
"""

import json
import re
import signal
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ct.organs import BTCV_ORGANS
from ct.properties import Properties, class_names, read_json, write_properties
from ct.slices import IGNORE, DataError, write_png
from ct.volumes import import_nibabel, read_volume
from engine.config import ConfigError
from engine.files import write_whole
from engine.ownership import claim, contents, refuse_foreign, refuse_other_folder, remove_own
from prepare.lists import files_beside_images, remove_lists, split_cases, write_lists

SLICE = "data.py slice"  # by which its files are known, see engine/ownership.py
PARTS = ("images", "masks")


def slice_volumes(args):
    """The slice command. Cases are independent: several processes at a time, one volume in each; a case whose
    record (OUT/sliced/CASE.json) says that it was made from these files in this way is not made again.

    The lists are written last: without them nobody takes the set for complete.
    """
    import_nibabel()
    pairs = pair_volumes(args.images, args.labels)
    names, label_map = names_and_map(args)
    split = read_split(args.split, [pair.case for pair in pairs if pair.labels])
    out = Path(args.out)
    check_out(args, pairs, label_map, out)
    out.mkdir(parents=True, exist_ok=True)
    claim(out, SLICE)
    remove_lists(out, SLICE)
    for folder in ("images", "masks", "sliced") if args.labels else ("images", "sliced"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    records = all_cases(pairs, args.axis, label_map, out, args.workers)

    print(f"{out}: {sum(record['slices'] for record in records.values())} slices; cases: {len(records)}")
    known = {"kind": "hu", "hu_offset": 1024, "axis": args.axis, "size": common_size(records)}
    known |= {"spacing": {case: record["spacing"] for case, record in records.items()}}
    if args.labels:
        seen = {label for record in records.values() for label in record["ids"]}
        known["classes"] = choose_classes(out, label_map, seen, names)
    write_properties(out, Properties(**known, source=str(args.images), made_by=SLICE))
    lists = make_lists(records, split)
    for name, slices in lists.items():
        cases = len({one.rpartition("/")[0] for one in slices})
        print(f"{name}.txt: " + (f"{len(slices)} slices; cases: {cases}" if slices else "none"))
    write_lists(out, lists, SLICE)
    return 0


def check_out(args, pairs, label_map, out):
    """ConfigError if the set would be written over, or into, what the command has not written; before
    anything is written. What is in the folder of a case that has to be made again goes, all of it."""
    refuse_other_folder(out, SLICE)
    for given in filter(None, (args.images, args.labels)):
        folder = Path(given).resolve()
        if folder.is_relative_to(out.resolve()) and folder.is_dir():
            raise ConfigError(f"{given}: is read, and lies in the set's own folder; choose another --out")
    volumes = [path for pair in pairs for path in (pair.image, pair.labels) if path]
    sources = [*volumes, *filter(None, (args.label_map, args.classes, args.split))]
    refuse_foreign(files_beside_images(out), sources, SLICE)
    for pair in pairs:
        if up_to_date(pair, args.axis, label_map, out) is None:
            targets = [path for part in PARTS for path in contents(out / part / pair.case)]
            refuse_foreign(targets, sources, SLICE, record=record_folder(out, pair.case))
            refuse_foreign([out / "sliced" / f"{pair.case}.json"], sources, SLICE)


# ---- Which image has which labels ----------------------------------------------------------------


@dataclass
class Pair:
    case: str
    image: Path
    labels: Path | None


def pair_volumes(images, labels):
    """The `Pair`s of two files or two folders.

    A case is called as its image, without nnU-Net's channel number (_0000; other channels are left out). In
    folders an image and its labels have the same name, or else the same last number: img0001 and label0001.
    What has no partner is printed; two candidates for one number are an error.
    """
    image_files = first_channels(volume_files(images))
    label_files = volume_files(labels) if labels else []
    if Path(images).is_file() and len(label_files) == 1:
        return [Pair(case_name(image_files[0]), image_files[0], label_files[0])]
    same_names = {*map(case_name, label_files)} & {*map(case_name, image_files)}
    key = case_name if same_names else last_number
    by_key = unique_by(key, label_files)
    pairs = [
        Pair(case_name(path), path, by_key.pop(key(path), None))
        for path in unique_by(key, image_files).values()
    ]
    unlabelled = [pair.image.name for pair in pairs if pair.labels is None]
    if label_files and len(unlabelled) == len(pairs):
        raise DataError(f"{images}, {labels}: no image has the number or the name of a label file")
    if label_files:
        print(f"paired {len(pairs) - len(unlabelled)} of {len(pairs)} images with labels")
        print_names("images without labels (for pretraining only)", unlabelled)
        print_names("labels without an image (left out)", [path.name for path in by_key.values()])
    return pairs


def volume_files(path):
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    files = sorted(
        file for file in path.iterdir() if re.search(r"\.nii(\.gz)?$", file.name) and file.name[0] != "."
    )
    if not files:
        dicom = (
            "; DICOM has to be converted first, see docs/COMPATIBILITY.md" if any(path.rglob("*.dcm")) else ""
        )
        raise DataError(f"{path}: no .nii or .nii.gz files there{dicom}")
    return files


def first_channels(files):
    """Without CASE_0001, CASE_0002 ... where there is a CASE_0000."""
    first = {case_name(path) for path in files if stem_of(path).endswith("_0000")}
    others = {p for p in files if re.fullmatch(r"(.*)_0\d\d[1-9]", stem_of(p)) and stem_of(p)[:-5] in first}
    print_names("other channels (left out)", sorted(path.name for path in others))
    return [path for path in files if path not in others]


def stem_of(path):
    return re.sub(r"\.nii(\.gz)?$", "", path.name)


def case_name(path):
    return re.sub(r"_0000$", "", stem_of(path))


def last_number(path):
    return number_in(case_name(path))


def number_in(name):
    numbers = re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else name


def unique_by(key, paths):
    found = {}
    for path in paths:
        if key(path) in found:
            raise DataError(
                f"{path.parent}: {found[key(path)].name} and {path.name} both count as {key(path)!r}"
            )
        found[key(path)] = path
    return found


def print_names(what, names):
    if names:
        print(f"{what}: {len(names)}: {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}")


# ---- Class names and label maps ------------------------------------------------------------------


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


def choose_classes(out, label_map, seen, given_names):
    """The class names: those given, or BTCV's if the map leads to its 13 organs, or class 1, class 2 ..."""
    count = max(({*label_map.values()} if label_map else seen) - {IGNORE}, default=0) + 1
    default = BTCV_ORGANS if label_map and count <= len(BTCV_ORGANS) else max(count, 2)
    names = class_names(out, given_names or default)
    if len(names) < count:
        raise DataError(f"{len(names)} class names (background first), but labels up to {count - 1}")
    print(f"class names: {', '.join(names)}")
    named = dict(enumerate(names)) | {IGNORE: "ignored"}
    absent = [f"{id} ({named[label]})" for id, label in (label_map or {}).items() if id not in seen]
    print_names("ids of the label map that no volume holds", absent)
    return names


def common_size(records):
    """The most frequent (rows, columns) of the cases."""
    return Counter(tuple(record["size"]) for record in records.values()).most_common(1)[0][0]


# ---- Cases ---------------------------------------------------------------------------------------


def all_cases(pairs, axis, label_map, out, workers):
    """{case: record} of all pairs. A case that fails is named and does not stop the others."""
    records, failed = {}, []
    with (
        ProcessPoolExecutor(min(workers, len(pairs)), initializer=leave_signals_to_parent) as pool,
        tqdm(total=len(pairs), desc="slicing", unit="case", disable=None) as bar,
    ):
        tasks = {pool.submit(slice_case, pair, axis, label_map, out): pair.case for pair in pairs}
        try:
            for task in as_completed(tasks):
                try:
                    records[tasks[task]] = task.result()
                except DataError as error:
                    failed.append(str(error))
                except BrokenProcessPool:
                    raise DataError("a process died, of too little memory? --workers 1 needs least") from None
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    print_names("failed", failed[1:])
    if failed and len(pairs) > 1:
        failed[0] += f"; cases that failed: {len(failed)} of {len(pairs)}, the others are done"
    if failed:
        raise DataError(failed[0])
    return {pair.case: records[pair.case] for pair in pairs}


def leave_signals_to_parent():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def slice_case(pair, axis, label_map, out):
    """Write one case, image first, then labels -> its record: spacing in mm, number of slices, which of them
    have labels, and the ids in the label file."""
    if record := up_to_date(pair, axis, label_map, out):
        return record
    path = out / "sliced" / f"{pair.case}.json"
    path.unlink(missing_ok=True)
    volume = read_volume(pair.image, axis)
    shape, spacing = volume.array.shape, volume.spacing
    write_slices(out, "images", pair.case, (stored_slice(one) for one in volume.array))
    del volume
    record = {"made_of": made_of(pair, axis, label_map), "spacing": spacing}
    record |= {"slices": shape[0], "size": shape[1:], "labelled": None, "ids": []}
    if pair.labels:
        masks, record["ids"] = read_masks(pair.labels, axis, shape, pair.image, label_map)
        write_slices(out, "masks", pair.case, map(np.ascontiguousarray, masks))
        record["labelled"] = np.flatnonzero(masks.any(axis=(1, 2))).tolist()
    else:
        remove_own(contents(out / "masks" / pair.case), SLICE, record_folder(out, pair.case))
    write_whole(path, json.dumps(record), SLICE)
    return record


def up_to_date(pair, axis, label_map, out):
    """The record of a case that is there, made from these files in this way; else None."""
    path = out / "sliced" / f"{pair.case}.json"
    if not path.is_file() or not (out / "images" / pair.case).is_dir():
        return None
    record = read_json(path, dict)
    return record if record.get("made_of") == made_of(pair, axis, label_map) else None


def made_of(pair, axis, label_map):
    return {
        "axis": axis,
        "label_map": label_map and {str(id): to for id, to in label_map.items()},
        "image": file_identity(pair.image),
        "labels": pair.labels and file_identity(pair.labels),
    }


def file_identity(path):
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def stored_slice(hu):
    """HU (H, W) -> the uint16 values of a PNG."""
    return np.clip(np.rint(np.nan_to_num(hu, nan=-1024) + 1024.0), 0, 65535).astype(np.uint16)


def write_slices(out, part, case, slices):
    folder, record = out / part / case, record_folder(out, case)
    for needed in (folder, record):
        needed.mkdir(parents=True, exist_ok=True)
    remove_own(contents(folder), SLICE, record)  # of a former image, which may have had more of them
    for index, one in enumerate(slices):
        write_png(folder / f"{index:04d}.png", one, SLICE, record)


def record_folder(out, case):
    """Whose .med-moco lists the slices and masks of a case: their own folders hold nothing else."""
    return out / "sliced" / case


def read_masks(path, axis, shape, image, label_map):
    """Labels (S, H, W) uint8, mapped, of an image of that shape; and the sorted source ids that occur."""
    labels = read_volume(path, axis).array
    if labels.shape != shape:
        raise DataError(f"{path}: labels of {labels.shape} voxels, its image {image} has {shape}")
    if not np.array_equal(labels, np.rint(labels)):  # a NaN is unequal too
        raise DataError(f"{path}: labels must be whole numbers")
    low, high = labels.min(), labels.max()
    if low < 0 or high > (65535 if label_map else IGNORE):
        reason = "--label-map chooses among more" if label_map is None else "at most 65535 can be mapped"
        raise DataError(f"{path}: labels from {low:g} to {high:g}; a mask holds 0 to {IGNORE}, {reason}")
    labels = labels.astype(np.uint16)
    ids = np.flatnonzero(np.bincount(labels.ravel(order="K"))).tolist()
    if label_map is None:
        return labels.astype(np.uint8), ids
    targets = np.zeros(65536, np.uint8)  # ids that the map does not list become background
    for source, target in label_map.items():
        targets[source] = target
    return targets[labels], ids


# ---- Lists ---------------------------------------------------------------------------------------


def read_split(given, cases):
    """{"train": cases, "val": cases, "test": cases} of labelled cases, as --split says; None without it.

    Fractions, "0.7,0.1,0.2", or a JSON file with these three (val may be missing): names of cases, or their
    numbers. Labelled cases that it does not name are for pretraining.
    """
    if given is None:
        return None
    if re.fullmatch(r"[\d.,\s]+", given):
        return split_by_fractions(given, cases)
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
    return split


def split_by_fractions(given, cases):
    try:
        train, val, test = (float(part) for part in given.split(","))
    except ValueError:
        raise DataError(f"--split {given}: three fractions are expected, such as 0.7,0.1,0.2") from None
    counts = [round(part * len(cases)) for part in (val, test)]
    if not 0 < train <= 1 or abs(train + val + test - 1) > 1e-6 or test <= 0 or sum(counts) >= len(cases):
        raise DataError(
            f"--split {given}: fractions of {len(cases)} labelled cases that sum to 1 are expected"
        )
    return split_cases(cases, *(max(count, part > 0) for count, part in zip(counts, (val, test))))


def find_case(entry, cases, path):
    """The case of that name, or the only one with that last number (8 and "case0008" are img0008, too)."""
    if entry in cases:
        return entry
    number = entry if isinstance(entry, int) else number_in(entry)
    found = [case for case in cases if number_in(case) == number]
    if len(found) != 1:
        raise DataError(f"{path}: {entry}: {len(found) or 'no'} labelled cases of that name or number")
    return found[0]


def make_lists(records, split):
    """{"train": names of slices ...} of the split, without one 60/20/20 by labelled case, or blocks of the
    only one. "unlabelled" has every slice outside val and test, for pretraining."""
    names = {case: [f"{case}/{i:04d}.png" for i in range(r["slices"])] for case, r in records.items()}
    labelled = [case for case, record in records.items() if record["labelled"] is not None]
    dropped = []
    if split is None and len(labelled) == 1:
        case = labelled[0]
        lists, dropped = blocks(case, names[case], [names[case][i] for i in records[case]["labelled"]])
    else:
        split = split or split_cases(labelled)
        lists = {part: [name for case in cases for name in names[case]] for part, cases in split.items()}
    held_out = {*lists["val"], *lists["test"], *dropped}
    everything = (name for own in names.values() for name in own)
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
