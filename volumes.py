"""NIfTI volumes: reading them in radiological view, writing labels back on their own grid, and `data.py slice`.

nibabel is needed here and nowhere else (pip install nibabel).
"""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from layout import (
    IGNORE,
    MAX_SIDE,
    DataError,
    in_threads,
    one_line,
    read_json,
    remove_lists,
    split_cases,
    write_lists,
    write_png,
    write_text,
)
from phantom import BTCV_ORGANS

# Where slices, rows and columns run to, by slice axis: Left, Posterior, Superior or Inferior of the patient. Axial slices
# lie as a radiologist sees them: the patient's right at the left, anterior at the top.
VIEWS = {0: "LIP", 1: "PIL", 2: "SPL"}


@dataclass
class Volume:
    """array (S, H, W) in radiological view whatever the file's affine; spacing (slice, row, column) in mm."""

    array: np.ndarray
    spacing: tuple
    path: Path
    image: object = field(repr=False)  # nibabel's, for its affine, header and shape
    to_file: np.ndarray = field(repr=False)  # orientation of the view's axes on the file's grid

    def restore(self, labels):
        """labels (S, H, W) in the view -> the same voxels on the file's own grid."""
        from nibabel.orientations import apply_orientation

        if labels.shape != self.array.shape:
            raise DataError(f"{self.path}: {self.array.shape} voxels, but the labels have {labels.shape}")
        return apply_orientation(labels, self.to_file).reshape(self.image.shape)


def read_volume(path, axis=2):
    """A .nii or .nii.gz as a Volume whose slices lie across `axis` (0 sagittal, 1 coronal, 2 axial).

    Raises DataError for anything that is not a readable volume of numbers with an affine.
    """
    nibabel = import_nibabel()
    path = Path(path)
    try:
        image = nibabel.load(path)
        check_header(image, path)
        array = np.asanyarray(image.dataobj)
        from_file = nibabel.io_orientation(image.affine)
    except (DataError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # nibabel and zlib raise many kinds on damaged files
        raise DataError(f"{path}: not a readable NIfTI volume ({one_line(error)})") from None
    if np.isnan(from_file).any():
        raise DataError(f"{path}: its affine does not say which way the axes run")
    wanted = nibabel.orientations.axcodes2ornt(VIEWS[axis])
    to_view = nibabel.orientations.ornt_transform(from_file, wanted)
    shape = image.shape[:3]
    view = nibabel.orientations.apply_orientation(array.reshape(shape), to_view)
    affine = image.affine @ nibabel.orientations.inv_ornt_aff(to_view, shape)
    spacing = tuple(round(float(mm), 6) for mm in nibabel.affines.voxel_sizes(affine))
    return Volume(view, spacing, path, image, nibabel.orientations.ornt_transform(wanted, from_file))


def check_header(image, path):
    """Before any voxel is read: three dimensions, real numbers, and no more of them than the file can hold."""
    shape = image.shape
    if len(shape) < 3 or any(side != 1 for side in shape[3:]):
        raise DataError(f"{path}: a volume of three dimensions is expected, this one has shape {shape}")
    if min(shape) < 1 or max(shape) > MAX_SIDE:
        raise DataError(f"{path}: {shape} voxels; 1 to {MAX_SIDE} along each axis can be read")
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        raise DataError(f"{path}: voxels of numbers are expected, not {dtype}")
    most = os.path.getsize(path) * (
        1032 if path.suffix == ".gz" else 1
    )  # deflate shrinks by at most 1032 to 1
    if np.prod(shape, dtype=float) * dtype.itemsize > most:
        raise DataError(f"{path}: damaged, too short for the {shape} voxels its header claims")


def write_labels(path, labels, volume):
    """labels (S, H, W) uint8 in the view of `volume` -> a NIfTI on that volume's grid, with its affine and header."""
    nibabel = import_nibabel()
    path = Path(path)
    header = volume.image.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["cal_min"], header["cal_max"] = 0, 0
    voxels = np.ascontiguousarray(volume.restore(np.asarray(labels)).astype(np.uint8))
    part = path.with_name("part-" + path.name)
    nibabel.save(volume.image.__class__(voxels, volume.image.affine, header), part)
    os.replace(part, path)


def import_nibabel():
    try:
        import nibabel
    except ImportError:
        raise DataError("NIfTI files need nibabel: pip install nibabel") from None
    return nibabel


# ---- data.py slice -------------------------------------------------------------------------------


def slice_volumes(args):
    """The slice command: volumes (and labels) -> 16-bit PNG slices (HU + 1024), 8-bit masks, spacing and lists.

    The lists are written last: without them nobody takes the set for complete.
    """
    pairs = pair_volumes(args.images, args.labels)
    label_map = read_label_map(args.label_map) if args.label_map else None
    given_names = read_json(args.classes, list) if args.classes else None
    out = Path(args.out)
    remove_lists(out)
    cases, spacing, seen = {}, {}, set()
    for number, (case, image_path, label_path) in enumerate(pairs, 1):
        volume = read_volume(image_path, args.axis)
        labels = read_labels(label_path, volume, label_map, args.axis, seen) if label_path else None
        names = write_case(out, case, volume, labels, f"{case} ({number} of {len(pairs)})")
        labelled = None if labels is None else [name for name, mask in zip(names, labels) if mask.any()]
        cases[case] = {"names": names, "labelled": labelled}
        spacing[case] = volume.spacing
    write_text(out / "spacing.json", json.dumps(spacing, indent=1))
    print(f"{out}: {sum(len(case['names']) for case in cases.values())} slices of {len(cases)} cases")
    if args.labels:
        report_labels(out, label_map, seen, given_names)
    write_lists(out, print_lists(make_lists(cases)))
    return 0


def pair_volumes(images, labels):
    """[(case, image path, label path or None)] of two files or two folders.

    In folders an image and its labels have the same stem (a trailing _0000, nnU-Net's channel, aside), or else the same
    last number: img0001 and label0001. What has no partner is printed; two candidates for one number are an error.
    """
    image_files = volume_files(images)
    label_files = volume_files(labels) if labels else []
    if Path(images).is_file() and len(label_files) == 1:
        return [(stem_of(image_files[0]), image_files[0], label_files[0])]
    key = (
        without_channel
        if {*map(without_channel, label_files)} <= {*map(without_channel, image_files)}
        else last_number
    )
    by_key = unique_by(key, label_files)
    pairs = [
        (stem_of(path), path, by_key.pop(key(path), None)) for path in unique_by(key, image_files).values()
    ]
    lonely = [path.name for path in by_key.values()]
    unlabelled = [path.name for _, path, label in pairs if label is None]
    if label_files and len(unlabelled) == len(pairs):
        raise DataError(f"{images}, {labels}: no image has the number or the name of a label file")
    if label_files:
        print(f"paired {len(pairs) - len(unlabelled)} of {len(pairs)} images with labels")
        print_names("images without labels (for pretraining only)", unlabelled)
        print_names("labels without an image (left out)", lonely)
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
        raise DataError(f"{path}: no .nii or .nii.gz files there")
    return files


def stem_of(path):
    return re.sub(r"\.nii(\.gz)?$", "", path.name)


def without_channel(path):
    return re.sub(r"_0000$", "", stem_of(path))


def last_number(path):
    numbers = re.findall(r"\d+", without_channel(path))
    return int(numbers[-1]) if numbers else without_channel(path)


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


def read_label_map(path):
    """{"source id": target id} from JSON, as {int: int}."""
    try:
        label_map = {int(source): int(target) for source, target in read_json(path, dict).items()}
    except (ValueError, TypeError):
        raise DataError(f'{path}: {{"source id": target id}} with whole numbers is expected') from None
    wrong = [target for target in label_map.values() if not 0 <= target <= IGNORE]
    if wrong or not label_map:
        raise DataError(
            f"{path}: target ids from 0 to {IGNORE} are expected, not {wrong[0] if wrong else 'none'}"
        )
    return label_map


def read_labels(path, volume, label_map, axis, seen):
    """Labels (S, H, W) uint8 of an image volume, mapped; the source ids that occur are added to `seen`."""
    label_volume = read_volume(path, axis)
    labels = label_volume.array
    if labels.shape != volume.array.shape:
        raise DataError(
            f"{path}: labels of {labels.shape} voxels, its image {volume.path} has {volume.array.shape}"
        )
    if labels.dtype.kind == "f":
        if not np.array_equal(labels, np.rint(labels)):  # unequal too if there is a NaN
            raise DataError(f"{path}: labels must be whole numbers")
        labels = labels.astype(np.int64)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > (65535 if label_map else IGNORE):
        raise DataError(
            f"{path}: labels from {low} to {high}; 0 to {IGNORE} fit a mask (--label-map chooses among more)"
        )
    counts = np.bincount(labels.ravel(order="K"), minlength=high + 1)
    seen.update(np.flatnonzero(counts).tolist())
    if label_map is None:
        return labels.astype(np.uint8)
    targets = np.zeros(high + 1, np.uint8)  # ids that the map does not list become background
    for source, target in label_map.items():
        if 0 <= source <= high:
            targets[source] = target
    return targets[labels]


def write_case(out, case, volume, labels, desc):
    """images/CASE/0000.png ... and the masks; returns the names of the slices."""
    (out / "images" / case).mkdir(parents=True, exist_ok=True)
    names = [f"{case}/{index:04d}.png" for index in range(len(volume.array))]
    if labels is not None:
        (out / "masks" / case).mkdir(parents=True, exist_ok=True)

    def write(index):
        hu = np.nan_to_num(volume.array[index], nan=-1024)
        write_png(out / "images" / names[index], np.clip(np.rint(hu + 1024.0), 0, 65535).astype(np.uint16))
        if labels is not None:
            write_png(out / "masks" / names[index], np.ascontiguousarray(labels[index]))

    for _ in in_threads(write, range(len(names)), desc):
        pass
    return names


def report_labels(out, label_map, seen, given_names):
    """classes.json: the names given, or BTCV's if the map leads to its 13 organs, or class 1, class 2 ..."""
    targets = set(label_map.values()) if label_map else seen
    count = max(targets - {IGNORE}, default=0) + 1
    if given_names:
        names = given_names
    elif label_map and count <= len(BTCV_ORGANS):
        names = BTCV_ORGANS
    else:
        names = ["background"] + [f"class {index}" for index in range(1, count)]
    if len(names) < count:
        raise DataError(f"{len(names)} class names (background first) for labels up to {count - 1}")
    write_text(out / "classes.json", json.dumps(names, indent=1))
    absent = [
        f"{source} ({names[target]})" for source, target in (label_map or {}).items() if source not in seen
    ]
    print_names("ids of the label map that no volume holds", absent)
    print(f"class names: {', '.join(names)}")


def make_lists(cases):
    """{case: {"names", "labelled": names with a label, or None}} -> {"train": names ...}, split by case.

    One labelled case only: contiguous blocks of it, see `blocks`. unlabelled: all outside val and test.
    """
    labelled = [case for case, content in cases.items() if content["labelled"] is not None]
    everything = [name for content in cases.values() for name in content["names"]]
    if len(labelled) == 1:
        lists, dropped = blocks(labelled[0], **cases[labelled[0]])
    else:
        splits = zip(("train", "val", "test"), split_cases(labelled))
        lists = {split: [name for case in part for name in cases[case]["names"]] for split, part in splits}
        dropped = []
    held_out = {*lists["val"], *lists["test"], *dropped}
    return lists | {"unlabelled": [name for name in everything if name not in held_out]}


def blocks(case, names, labelled, gap=2):
    """Contiguous 60/20/20 blocks inside the labelled range of the only labelled case, `gap` slices dropped between."""
    first, last = (names.index(labelled[0]), names.index(labelled[-1])) if labelled else (0, -1)
    usable = last - first + 1 - 2 * gap
    if usable < 3:
        raise DataError(
            f"{case}: {last - first + 1} labelled slices are too few for train, val and test blocks"
        )
    held_out = max(1, round(0.2 * usable))
    val = first + usable - 2 * held_out + gap
    test = val + held_out + gap
    print(
        f"one labelled case: train, val and test are contiguous blocks of its labelled slices {first} to {last}: "
        f"{first}-{val - gap - 1}, {val}-{test - gap - 1}, {test}-{last}, {gap} slices dropped between them"
    )
    lists = {
        "train": names[first : val - gap],
        "val": names[val : test - gap],
        "test": names[test : last + 1],
    }
    return lists, names[val - gap : val] + names[test - gap : test]


def print_lists(lists):
    for split, names in lists.items():
        cases = len({name.rpartition("/")[0] for name in names})
        print(f"{split + '.txt':15}{len(names):7} slices {cases:5} cases" if names else f"{split}.txt: none")
    return lists
