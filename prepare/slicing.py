"""data.py slice: CT volumes, with labels or without, to 16-bit PNG slices, 8-bit masks, set.json and lists.

Which image has which labels: prepare/pairing.py. What their numbers mean: prepare/labels.py. Lists and
splits: prepare/lists.py.
"""

import json
import signal
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ct.geometry import is_same_grid, judge_geometry, resampled, share_inside
from ct.plausible import Doubt, Values, heed, judge_values
from ct.properties import HU_OFFSET, Properties, read_json, write_properties
from ct.slices import DataError, whole_hu, write_png
from ct.volumes import import_nibabel, read_geometry, read_volume
from engine.config import ConfigError
from engine.files import write_whole
from engine.ownership import claim, contents, refuse_foreign, refuse_other_folder, remove_own
from prepare.labels import check_ids, choose_classes, ids_in, masks_of, names_and_map, whole_numbers
from prepare.lists import files_beside_images, make_lists, read_split, remove_lists, write_lists
from prepare.pairing import pair_volumes, print_names

SLICE = "data.py slice"  # by which its files are known, see engine/ownership.py
PARTS = ("images", "masks")
MEND = "if they are HU + {offset}, --hu-offset {offset}"


@dataclass(frozen=True)
class Rules:
    """How volumes become slices: across which axis, HU = voxel - hu_offset, {source id: target} or None, and
    what is taken whatever it looks like."""

    out: Path
    axis: int
    hu_offset: float
    label_map: dict | None
    ignore_geometry: bool
    ignore_values: bool


def slice_volumes(args):
    """The slice command. Cases are independent: several processes at a time, one volume in each; a case whose
    record (OUT/sliced/CASE.json) says that it was made from these files in this way is not made again.

    All labels are looked at before anything is sliced. The lists are written last: without them nobody takes
    the set for complete.
    """
    import_nibabel()
    pairs = pair_volumes(args.images, args.labels, args.channels, args.pair)
    names, label_map = names_and_map(args)
    split = read_split(args.split, [pair.case for pair in pairs if pair.labels])
    out = Path(args.out)
    rules = Rules(out, args.axis, args.hu_offset, label_map, args.ignore_geometry, args.ignore_values)
    check_out(args, pairs, rules)
    look_at_labels(pairs, names, rules, args.workers)
    out.mkdir(parents=True, exist_ok=True)
    claim(out, SLICE)
    remove_lists(out, SLICE)
    for folder in ("images", "masks", "sliced") if args.labels else ("images", "sliced"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    records = all_cases(pairs, rules, args.workers)

    print(f"{out}: {sum(record['slices'] for record in records.values())} slices; cases: {len(records)}")
    known = {"kind": "hu", "hu_offset": HU_OFFSET, "axis": args.axis, "size": common_size(records)}
    known |= {"spacing": {case: record["spacing"] for case, record in records.items()}}
    if args.labels:
        seen = {label for record in records.values() for label in record["ids"]}
        known["classes"] = choose_classes(label_map, seen, names)
    write_properties(out, Properties(**known, source=str(args.images), made_by=SLICE))
    lists = make_lists(records, split)
    for name, slices in lists.items():
        cases = len({one.rpartition("/")[0] for one in slices})
        print(f"{name}.txt: " + (f"{len(slices)} slices; cases: {cases}" if slices else "none"))
    write_lists(out, lists, SLICE)
    return 0


def check_out(args, pairs, rules):
    """ConfigError if the set would be written over, or into, what the command has not written; before
    anything is written. What is in the folder of a case that has to be made again goes, all of it."""
    out = rules.out
    refuse_other_folder(out, SLICE)
    for given in filter(None, (args.images, args.labels)):
        folder = Path(given).resolve()
        if folder.is_relative_to(out.resolve()) and folder.is_dir():
            raise ConfigError(f"{given}: is read, and lies in the set's own folder; choose another --out")
    volumes = [path for pair in pairs for path in (pair.image, pair.labels) if path]
    sources = [*volumes, *filter(None, (args.label_map, args.classes, args.split))]
    refuse_foreign(files_beside_images(out), sources, SLICE)
    for pair in pairs:
        if up_to_date(pair, rules) is None:
            targets = [path for part in PARTS for path in contents(out / part / pair.case)]
            refuse_foreign(targets, sources, SLICE, record=record_folder(out, pair.case))
            refuse_foreign([out / "sliced" / f"{pair.case}.json"], sources, SLICE)


def common_size(records):
    """The most frequent (rows, columns) of the cases."""
    return Counter(tuple(record["size"]) for record in records.values()).most_common(1)[0][0]


# ---- Labels, before anything is sliced -----------------------------------------------------------


def look_at_labels(pairs, names, rules, workers):
    """Whether all labels lie where their images do and hold what a mask can hold; a DataError names the first
    case that does not, and says what is odd. Files that cannot be read are left to the slicing."""
    new = [pair for pair in pairs if pair.labels and up_to_date(pair, rules) is None]
    found, _ = in_processes(doubts_of_labels, new, (rules, names), workers, "labels")
    doubts = [doubt for pair in new for doubt in found.get(pair.case, ())]
    wrong = [doubt for doubt in doubts if doubt.fatal]
    if len(wrong) > 1:
        wrong = [replace(wrong[0], text=f"{wrong[0].text}; and {len(wrong) - 1} more of {len(pairs)} cases")]
    heed([*(doubt for doubt in doubts if not doubt.fatal), *wrong], insist=False, say=say)


def say(text):
    print(f"warning: {text}")


def doubts_of_labels(pair, rules, names):
    """[Doubt] about the labels of a case."""
    try:
        image, labels = (read_geometry(path, rules.axis) for path in (pair.image, pair.labels))
        doubts = doubts_of_place(image, labels, rules)
        if any(doubt.fatal for doubt in doubts):
            return doubts
        volume = read_volume(pair.labels, rules.axis, image if rules.ignore_geometry else None)
    except DataError:
        return []
    try:
        whole = whole_numbers(volume.array, pair.labels)
        check_ids(ids_in(whole), rules.label_map, names, pair.labels)
    except DataError as error:
        return [*doubts, Doubt(str(error), fatal=True)]
    if doubts and not rules.ignore_geometry:
        doubts = judge_geometry(image, labels, share_inside(whole, labels, image))
    return doubts


def doubts_of_place(image, labels, rules):
    """[Doubt] about where the labels lie; with --ignore-geometry only whether the files have one shape."""
    if not rules.ignore_geometry:
        doubts = judge_geometry(image, labels)
        mend = "; --ignore-geometry takes voxel for voxel" if labels.file_shape == image.file_shape else ""
        return [replace(doubt, text=doubt.text + mend) if doubt.fatal else doubt for doubt in doubts]
    if labels.file_shape == image.file_shape:
        return []
    text = f"{labels.path}: {labels.file_shape} voxels, its image {image.file_shape}"
    return [Doubt(f"{text}; --ignore-geometry takes voxel for voxel", fatal=True)]


# ---- Cases ---------------------------------------------------------------------------------------


def all_cases(pairs, rules, workers):
    """{case: record} of all pairs. A case that fails is named and does not stop the others."""
    records, failed = in_processes(slice_case, pairs, (rules,), workers, "slicing")
    for pair in pairs:
        for text in records.get(pair.case, {}).get("doubts", ()):
            say(text)
    print_names("failed", failed[1:])
    if failed and len(pairs) > 1:
        failed[0] += f"; cases that failed: {len(failed)} of {len(pairs)}, the others are done"
    if failed:
        raise DataError(failed[0])
    return {pair.case: records[pair.case] for pair in pairs}


def in_processes(function, pairs, arguments, workers, desc):
    """{case: function(pair, *arguments)}, and the messages of those that raised a DataError."""
    results, failed = {}, []
    if not pairs:
        return results, failed
    with (
        ProcessPoolExecutor(min(workers, len(pairs)), initializer=leave_signals_to_parent) as pool,
        tqdm(total=len(pairs), desc=desc, unit="case", disable=None) as bar,
    ):
        tasks = {pool.submit(function, pair, *arguments): pair.case for pair in pairs}
        try:
            for task in as_completed(tasks):
                try:
                    results[tasks[task]] = task.result()
                except DataError as error:
                    failed.append(str(error))
                except BrokenProcessPool:
                    raise DataError("a process died, of too little memory? --workers 1 needs least") from None
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    return results, failed


def leave_signals_to_parent():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def slice_case(pair, rules):
    """Write one case, image first, then labels -> its record: spacing in mm, number and size of slices, which
    of them have labels, the ids in the label file, and what is odd."""
    if record := up_to_date(pair, rules):
        return record
    path = rules.out / "sliced" / f"{pair.case}.json"
    path.unlink(missing_ok=True)
    volume = read_volume(pair.image, rules.axis)
    place, doubts = volume.geometry, doubts_of_values(volume, rules)
    slices = (stored_slice(one, rules.hu_offset) for one in volume.array)
    write_slices(rules.out, "images", pair.case, slices)
    record = {"made_of": made_of(pair, rules), "spacing": volume.spacing, "slices": place.shape[0]}
    record |= {"size": place.shape[1:], "labelled": None, "ids": [], "doubts": doubts}
    del volume, slices
    if pair.labels:
        record["ids"], masks = read_masks(pair, rules, place)
        record["labelled"] = write_slices(rules.out, "masks", pair.case, masks)
    else:
        remove_own(contents(rules.out / "masks" / pair.case), SLICE, record_folder(rules.out, pair.case))
    write_whole(path, json.dumps(record), SLICE)
    return record


def doubts_of_values(volume, rules):
    """What is odd about a volume, as texts; DataError if it cannot be HU, unless --ignore-values."""
    values = Values()
    for one in volume.array:
        values.add(one - rules.hu_offset if rules.hu_offset else one)
    doubts = judge_values(values, volume.path, MEND)
    if not volume.geometry.placed:
        text = f"{volume.path}: has no affine, or the identity: which way the patient lies is unknown"
        doubts.append(Doubt(text))
    said = []
    heed(doubts, rules.ignore_values, "--ignore-values", said.append)
    return said


def up_to_date(pair, rules):
    """The record of a case that is there, made from these files in this way; else None."""
    path = rules.out / "sliced" / f"{pair.case}.json"
    if not path.is_file() or not (rules.out / "images" / pair.case).is_dir():
        return None
    record = read_json(path, dict)
    return record if record.get("made_of") == made_of(pair, rules) else None


def made_of(pair, rules):
    return {
        "axis": rules.axis,
        "hu_offset": rules.hu_offset,
        "label_map": rules.label_map and {str(id): to for id, to in rules.label_map.items()},
        "ignore_geometry": rules.ignore_geometry,
        "image": file_identity(pair.image),
        "labels": pair.labels and file_identity(pair.labels),
    }


def file_identity(path):
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def stored_slice(values, hu_offset=0):
    """Voxels (H, W) -> the uint16 values of a PNG."""
    return (whole_hu(values - hu_offset if hu_offset else values) + HU_OFFSET).astype(np.uint16)


def write_slices(out, part, case, slices):
    """Returns the numbers of those that are not all 0."""
    folder, record, filled = out / part / case, record_folder(out, case), []
    for needed in (folder, record):
        needed.mkdir(parents=True, exist_ok=True)
    remove_own(contents(folder), SLICE, record)  # of a former image, which may have had more of them
    for index, one in enumerate(slices):
        write_png(folder / f"{index:04d}.png", one, SLICE, record)
        filled += [index] if one.any() else []
    return filled


def record_folder(out, case):
    """Whose .med-moco lists the slices and masks of a case: their own folders hold nothing else."""
    return out / "sliced" / case


def read_masks(pair, rules, image):
    """The sorted source ids of a label file, and its masks on the image's grid, uint8 (H, W) each, mapped."""
    labels = read_geometry(pair.labels, rules.axis)
    for doubt in doubts_of_place(image, labels, rules):
        if doubt.fatal:
            raise DataError(doubt.text)
    volume = read_volume(pair.labels, rules.axis, image if rules.ignore_geometry else None)
    whole = whole_numbers(volume.array, pair.labels)
    ids = ids_in(whole)
    check_ids(ids, rules.label_map, None, pair.labels)
    same = rules.ignore_geometry or is_same_grid(image, labels)
    slices = whole if same else resampled(whole, labels, image)
    return ids, (np.ascontiguousarray(masks_of(one, rules.label_map)) for one in slices)
