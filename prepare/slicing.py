"""data.py slice: CT volumes, with labels or without, to 16-bit PNG slices, 8-bit masks, names and lists.

Folders as they are published: BTCV (img/img0001.nii.gz, label/label0001.nii.gz), AbdomenCT-1K
(Case_00001_0000.nii.gz, Case_00001.nii.gz), nnU-Net's raw ones (imagesTr, labelsTr, dataset.json), KiTS
(CASE/imaging.nii.gz, CASE/segmentation.nii.gz). Which belong together: pairing.py; labels: labels.py.
"""

import json
import signal
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ct.grid import scaled
from ct.patients import in_words, patients_of
from ct.plausible import Doubt, Values, heed, judge_values
from ct.properties import HU_OFFSET, Properties, read_json, write_properties
from ct.scans import is_dicom
from ct.slices import MAX_SIDE, DataError, whole_hu, write_png
from ct.volumes import import_nibabel, read_volume
from data import most_frequent
from engine.config import ConfigError
from engine.files import write_whole
from engine.ownership import claim, contents, refuse_foreign, refuse_other_folder, remove_own
from prepare.labels import (
    choose_classes,
    heed_geometry,
    mask_slices,
    names_and_map,
    read_labels,
    scan_labels,
    targets_of,
)
from prepare.lists import files_beside_images, make_lists, print_lists, read_split, remove_lists, write_lists
from prepare.pairing import pair_volumes, print_names

SLICE = "data.py slice"  # by which its files are known, see engine/ownership.py
PARTS = ("images", "masks")
HIGHEST_HU = 65535 - HU_OFFSET  # that a 16-bit PNG holds


@dataclass(frozen=True)
class Options:
    """How a case is sliced: across `axis`; HU = voxel - hu_offset; label_map {source id: target} or None.

    organs: class names, where labels are folders with a file for each; spacing: mm between rows and columns,
    to which slices are resampled; None: as they are.
    """

    axis: int
    label_map: dict | None
    hu_offset: float
    ignore_values: bool
    ignore_geometry: bool
    organs: list | None = None
    spacing: float | None = None


def slice_volumes(args):
    """The slice command. Cases are independent: several processes at a time, one volume in each; a case whose
    record (OUT/sliced/CASE.json) says that it was made from these files in this way is not made again.

    All labels are looked at before anything is written. The lists are written last: without them nobody
    takes the set for complete.
    """
    import_nibabel()
    names, label_map = names_and_map(args)
    organs = names if label_map is None else None
    pairs = pair_volumes(args.images, args.labels, args.pair, args.channels, organs)
    places, known = ({pair.case: getattr(pair.file, what) for pair in pairs} for what in ("place", "patient"))
    patients, how = patients_of(places, args.patient, known)
    print(in_words(places, patients, how))
    split = read_split(args.split, [pair.case for pair in pairs if pair.labels], patients)
    organs = names if any(pair.labels and pair.labels.is_dir() for pair in pairs) else None
    insisting = (args.ignore_values, args.ignore_geometry)
    options = Options(args.axis, label_map, args.hu_offset, *insisting, organs, args.spacing)
    out = Path(args.out)
    check_out(args, pairs, options, out)
    ids, failed = all_ids(pairs, options, out, args.workers)
    classes = choose_classes(out, label_map, ids, names) if ids else None
    out.mkdir(parents=True, exist_ok=True)
    claim(out, SLICE)
    remove_lists(out, SLICE)
    for folder in ("images", "masks", "sliced") if args.labels else ("images", "sliced"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    records = all_cases(pairs, failed, ids, options, out, args.workers)

    print(f"{out}: {sum(record['slices'] for record in records.values())} slices; cases: {len(records)}")
    former = [path.name for path in contents(out / "images") if path.name not in records]
    print_names("in images, but of former calls and in no list (delete them in images and masks)", former)
    size = most_frequent(tuple(record["size"]) for record in records.values())
    known = {"kind": "hu", "hu_offset": HU_OFFSET, "axis": args.axis, "size": size}
    known |= {"spacing": {case: record["spacing"] for case, record in records.items()}, "classes": classes}
    known |= {"patients": patients, "source": str(args.images), "made_by": SLICE}
    write_properties(out, Properties(**known))
    lists = make_lists(records, split, patients)
    print_lists(lists, patients)
    write_lists(out, lists, SLICE)
    return 0


def check_out(args, pairs, options, out):
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
        if up_to_date(pair, options, out) is None:
            targets = [path for part in PARTS for path in contents(out / part / pair.case)]
            refuse_foreign(targets, sources, SLICE, record=record_folder(out, pair.case))
            refuse_foreign([out / "sliced" / f"{pair.case}.json"], sources, SLICE)


# ---- Cases ---------------------------------------------------------------------------------------


def all_ids(pairs, options, out, workers):
    """{label file: its ids}, from the records of cases that are there already or from the volumes themselves;
    and {case: what is wrong with its labels}, which is printed as soon as all have been looked at."""
    labelled = [pair for pair in pairs if pair.labels]
    there = {pair.case: up_to_date(pair, options, out) for pair in labelled}
    tasks = {pair.case: (pair, options) for pair in labelled if not there[pair.case]}
    found, failed = in_processes(scan_labels, tasks, workers, "looking at labels")
    print_failed(failed, pairs)
    if failed and len(failed) == len(pairs):
        raise failure(failed, pairs)
    ids = {case: record["ids"] for case, record in there.items() if record} | found
    return {str(pair.labels): ids[pair.case] for pair in labelled if pair.case in ids}, failed


def all_cases(pairs, failed, ids, options, out, workers):
    """{case: record} of all pairs. A case that fails, or has failed before, is named and does not stop the
    others."""
    tasks = {
        pair.case: (pair, ids.get(str(pair.labels)), options, out)
        for pair in pairs
        if pair.case not in failed
    }
    records, failed_now = in_processes(slice_case, tasks, workers, "slicing")
    records = {pair.case: records[pair.case] for pair in pairs if pair.case in records}
    for record in records.values():
        for note in record["notes"]:
            print(f"warning: {note}")
    below = [record["lowest"] for record in records.values() if record["lowest"] < -1024]
    if below:
        print(f"values below -1024 HU, down to {min(below):g}, are air; cases: {len(below)}")
    print_failed(failed_now, pairs)
    if failed or failed_now:
        raise failure(failed | failed_now, pairs)
    return records


def print_failed(failed, pairs):
    for text in failed.values() if len(pairs) > 1 else ():  # the only one is the error with which we end
        print(f"failed: {text}")


def failure(failed, pairs):
    text = next(iter(failed.values()))
    if len(pairs) > 1:
        others = ", the others are done" if len(failed) < len(pairs) else ""
        text += f"; cases that failed: {len(failed)} of {len(pairs)}{others}"
    return DataError(text)


def in_processes(function, tasks, workers, desc):
    """function(*arguments) for each {case: arguments} -> {case: result}; {case: text of its DataError}."""
    results, failed = {}, {}
    if not tasks:
        return results, failed
    with (
        ProcessPoolExecutor(min(workers, len(tasks)), initializer=leave_signals_to_parent) as pool,
        tqdm(total=len(tasks), desc=desc, unit="case", disable=None) as bar,
    ):
        futures = {pool.submit(function, *arguments): case for case, arguments in tasks.items()}
        try:
            for future in as_completed(futures):
                try:
                    results[futures[future]] = future.result()
                except DataError as error:
                    failed[futures[future]] = str(error)
                except BrokenProcessPool:
                    raise DataError("a process died, of too little memory? --workers 1 needs least") from None
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    return results, {case: failed[case] for case in tasks if case in failed}


def leave_signals_to_parent():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def slice_case(pair, ids, options, out):
    """Write one case, image first, then labels -> its record: spacing in mm, number of slices, which of them
    have labels, the ids in the label file, and what is odd."""
    if record := up_to_date(pair, options, out):
        return record
    path = out / "sliced" / f"{pair.case}.json"
    path.unlink(missing_ok=True)
    volume = read_volume(pair.image, options.axis)
    geometry, notes = volume.geometry, []
    values = Values()
    for one in volume.array:
        values.add(to_hu(one, options))
    heed(judge_image(volume, values, options), options.ignore_values, "--ignore-values", notes.append)
    labels, doubts = read_labels(pair.labels, geometry, options) if pair.labels else (None, [])
    if labels:
        heed_geometry(doubts, geometry, labels, notes.append)
    size, spacing = target_grid(geometry.shape[1:], volume.spacing, options)
    slices = (resampled(whole_hu(to_hu(one, options)), size) for one in volume.array)
    write_slices(out, "images", pair.case, map(stored_slice, slices))
    record = {"made_of": made_of(pair, options), "spacing": spacing, "slices": geometry.shape[0]}
    record |= {"size": size, "labelled": None, "ids": ids or [], "notes": notes}
    record |= {"lowest": float(values.lowest)}
    del volume
    if labels:
        record["labelled"] = []
        masks = mask_slices(labels, geometry, options.label_map)
        masks = noting((resampled(mask, size, nearest=True) for mask in masks), record["labelled"])
        write_slices(out, "masks", pair.case, masks)
        if not record["labelled"] and targets_of(ids, options.label_map) - {0}:
            text = f"none of its labelled voxels is the nearest one of a voxel of {pair.image}"
            raise DataError(f"{pair.labels}: {text}; is the spacing in its header wrong?")
    else:
        remove_own(contents(out / "masks" / pair.case), SLICE, record_folder(out, pair.case))
    write_whole(path, json.dumps(record), SLICE)
    return record


def target_grid(size, spacing, options):
    """The (H, W) px of a case's slices as they are written, and their (slice, row, column) mm."""
    if options.spacing is None:
        return size, spacing
    new = tuple(max(1, round(side * mm / options.spacing)) for side, mm in zip(size, spacing[1:]))
    if max(new) > MAX_SIDE:
        raise DataError(
            f"--spacing {options.spacing:g}: slices of {new} px; at most {MAX_SIDE} px can be read"
        )
    mm = (side * apart / side_now for side, apart, side_now in zip(size, spacing[1:], new))
    return new, (spacing[0], *(round(one, 6) for one in mm))


def resampled(image, size, nearest=False):
    """A slice or mask (H, W) at another size, in its own dtype."""
    if image.shape == size:
        return image
    return scaled(torch.from_numpy(image), size, nearest).numpy().astype(image.dtype)


def judge_image(volume, values, options):
    """What is doubtful about an image: [Doubt]."""
    mend = "if they are HU + {offset}: --hu-offset {offset}"
    if options.hu_offset:
        mend = f"after --hu-offset {options.hu_offset:g}; {{offset}} more would fit"
    doubts = judge_values(values, volume.path, mend)
    if (share := values.share(HIGHEST_HU + 1, HIGHEST_HU * 2)) > 0:
        text = f"{100 * share:.2g} % of the values are above {HIGHEST_HU} and stored as that"
        doubts.append(Doubt(f"{volume.path}: {text}"))
    geometry, odd = volume.geometry, []
    doubts += geometry.doubts
    if not geometry.placed:
        odd.append("no affine, or the identity: which side is left is taken for granted")
    if geometry.disagreement > min(volume.spacing):
        apart = f"{geometry.disagreement:.1f} mm apart"
        odd.append(f"its sform and its qform put voxels up to {apart}: the sform is taken")
    if min(volume.spacing) < 0.05 or max(volume.spacing) > 25:
        size = "{:g} x {:g} x {:g} mm".format(*volume.spacing)
        odd.append(f"voxels of {size}, which is no spacing of a CT")
    return doubts + [Doubt(f"{volume.path}: {text}") for text in odd]


def noting(masks, labelled):
    """The masks; `labelled` gets the indices of those that are not empty."""
    for index, mask in enumerate(masks):
        if mask.any():
            labelled.append(index)
        yield mask


def up_to_date(pair, options, out):
    """The record of a case that is there, all of it, made from these files in this way; else None."""
    path = out / "sliced" / f"{pair.case}.json"
    record = read_json(path, dict) if path.is_file() else {}
    if record.get("made_of") != made_of(pair, options):
        return None
    for part in PARTS if pair.labels else PARTS[:1]:
        there = {path.name for path in contents(out / part / pair.case) if path.stat().st_size}
        if not {slice_name(index) for index in range(record["slices"])} <= there:
            return None
    return record


def made_of(pair, options):
    label_map = options.label_map and {str(id): to for id, to in options.label_map.items()}
    return asdict(options) | {
        "label_map": label_map,
        "image": file_identity(pair.image),
        "labels": pair.labels and file_identity(pair.labels),
    }


def file_identity(path):
    """By its size and time; what is in several files (DICOM, .mhd, organs) by those of all beside it."""
    folder = path.parent if path.suffix.lower() == ".mhd" or is_dicom(path) else path
    together = folder.iterdir() if folder.is_dir() else [path]
    files = [one.stat() for one in together if one.is_file()]
    return [str(path), sum(one.st_size for one in files), max(one.st_mtime_ns for one in files)]


def to_hu(voxels, options):
    """(H, W) of a volume -> float32 HU, not finite where they were not, or are too large for float32."""
    with np.errstate(over="ignore"):
        return np.asarray(voxels, np.float32) - np.float32(options.hu_offset)


def stored_slice(hu):
    """HU (H, W) -> the uint16 values of a PNG; what is not finite, or below, is air."""
    return (whole_hu(hu) + HU_OFFSET).astype(np.uint16)


def write_slices(out, part, case, slices):
    folder, record = out / part / case, record_folder(out, case)
    for needed in (folder, record):
        needed.mkdir(parents=True, exist_ok=True)
    remove_own(contents(folder), SLICE, record)  # of a former image, which may have had more of them
    for index, one in enumerate(slices):
        write_png(folder / slice_name(index), one, SLICE, record)


def slice_name(index):
    return f"{index:04d}.png"


def record_folder(out, case):
    """Whose .med-moco lists the slices and masks of a case: their own folders hold nothing else."""
    return out / "sliced" / case
