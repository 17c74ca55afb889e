"""NIfTI volumes: reading them in radiological view, writing labels back on their own grid, and `data.py
slice`.

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
    MAX_SPACING,
    DataError,
    class_names,
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

# Where slices, rows and columns run to, by slice axis: Left, Posterior, Superior or Inferior of the patient.
# Axial slices lie as a radiologist sees them: the patient's right at the left, anterior at the top.
VIEWS = {0: "LIP", 1: "PIL", 2: "SPL"}


@dataclass
class Volume:
    """array (S, H, W) in radiological view whatever the file's affine; spacing (slice, row, column) in mm.

    The array is a view of the file's voxels, so its strides may be negative.
    """

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


@np.errstate(all="ignore")  # of scales and affines; what comes of them is checked
def read_volume(path, axis=2):
    """A .nii or .nii.gz as a Volume whose slices lie across `axis` (0 sagittal, 1 coronal, 2 axial).

    Raises DataError for anything that is not a readable volume of numbers with an affine.
    """
    nibabel = import_nibabel()
    path = Path(path)
    try:
        image = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Image):
            raise DataError(f"{path}: not NIfTI (.nii or .nii.gz)")
        check_header(image, path)
        array = np.asanyarray(image.dataobj)
        from_file = nibabel.io_orientation(image.affine)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (DataError, PermissionError):
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
    if not all(0 < mm < MAX_SPACING for mm in spacing):
        raise DataError(f"{path}: its affine says that voxels have {spacing} mm")
    return Volume(view, spacing, path, image, nibabel.orientations.ornt_transform(wanted, from_file))


def check_header(image, path):
    """Before any voxel is read: three dimensions of real numbers, no more of them than the file can hold."""
    shape = image.shape
    if len(shape) < 3 or any(side != 1 for side in shape[3:]):
        raise DataError(f"{path}: a volume of three dimensions is expected, this one has shape {shape}")
    if min(shape) < 1 or max(shape) > MAX_SIDE:
        raise DataError(f"{path}: {shape} voxels; 1 to {MAX_SIDE} along each axis can be read")
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        raise DataError(f"{path}: voxels of numbers are expected, not {dtype}")
    inflation = 1032 if path.suffix == ".gz" else 1  # the most that deflate can do
    if np.prod(shape, dtype=float) * dtype.itemsize > os.path.getsize(path) * inflation:
        raise DataError(f"{path}: damaged, too short for the {shape} voxels its header claims")


def write_labels(path, labels, volume):
    """labels (S, H, W) uint8 in the view of `volume` -> a NIfTI on its file's grid, affine and header
    kept."""
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
    nibabel.imageglobals.logger.setLevel("CRITICAL")  # what is wrong with a header is raised anyway
    return nibabel


# ---- data.py slice -------------------------------------------------------------------------------


def slice_volumes(args):
    """The slice command: volumes and labels -> 16-bit PNG slices (HU + 1024), 8-bit masks, spacing, lists.

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
        cases[case] = write_case(out, case, volume, labels, f"{case} ({number} of {len(pairs)})")
        spacing[case] = volume.spacing
        del volume, labels  # before the next ones are read
    write_text(out / "spacing.json", json.dumps(spacing, indent=1))
    print(f"{out}: {sum(len(names) for names, _ in cases.values())} slices; cases: {len(cases)}")
    if args.labels:
        write_classes(out, label_map, seen, given_names)
    lists = make_lists(cases)
    for split, names in lists.items():
        print(f"{split}.txt: {len(names)} slices; cases: {len({name.rpartition('/')[0] for name in names})}")
    write_lists(out, lists)
    return 0


def pair_volumes(images, labels):
    """[(case, image path, label path or None)] of two files or two folders.

    In folders an image and its labels have the same stem (a trailing _0000, nnU-Net's channel, aside), or
    else the same last number: img0001 and label0001. What has no partner is printed; two candidates for
    one number are an error.
    """
    image_files = volume_files(images)
    label_files = volume_files(labels) if labels else []
    if Path(images).is_file() and len(label_files) == 1:
        return [(stem_of(image_files[0]), image_files[0], label_files[0])]
    same_stems = {*map(without_channel, label_files)} & {*map(without_channel, image_files)}
    key = without_channel if same_stems else last_number
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
    given = read_json(path, dict)
    try:
        label_map = {int(source): int(str(target)) for source, target in given.items()}  # 1.5 is not 1
    except ValueError:
        raise DataError(f'{path}: {{"source id": target id}} with whole numbers is expected') from None
    for source, target in label_map.items():
        if not (0 <= source <= 65535 and 0 <= target <= IGNORE):
            raise DataError(f"{path}: {source} -> {target}: ids from 0 to 65535 can become 0 to {IGNORE}")
    return label_map


def read_labels(path, volume, label_map, axis, seen):
    """Labels (S, H, W) uint8 of an image volume, mapped; the source ids that occur are added to `seen`."""
    label_volume = read_volume(path, axis)
    labels = label_volume.array
    if labels.shape != volume.array.shape:
        raise DataError(
            f"{path}: labels of {labels.shape} voxels, its image {volume.path} has {volume.array.shape}"
        )
    if not np.array_equal(labels, np.rint(labels)):  # a NaN is unequal too
        raise DataError(f"{path}: labels must be whole numbers")
    low, high = labels.min(), labels.max()
    if low < 0 or high > (65535 if label_map else IGNORE):
        reason = "--label-map chooses among more" if label_map is None else "at most 65535 can be mapped"
        raise DataError(f"{path}: labels from {low:g} to {high:g}; a mask holds 0 to {IGNORE}, {reason}")
    labels = labels.astype(np.uint16)
    seen.update(np.flatnonzero(np.bincount(labels.ravel(order="K"))).tolist())
    if label_map is None:
        return labels.astype(np.uint8)
    targets = np.zeros(65536, np.uint8)  # ids that the map does not list become background
    for source, target in label_map.items():
        targets[source] = target
    return targets[labels]


def write_case(out, case, volume, labels, desc):
    """images/CASE/0000.png ... and the masks -> the names of the slices, and of those with labels (or
    None)."""
    (out / "images" / case).mkdir(parents=True, exist_ok=True)
    names = [f"{case}/{index:04d}.png" for index in range(len(volume.array))]
    if labels is not None:
        (out / "masks" / case).mkdir(parents=True, exist_ok=True)

    def write(index):
        hu = np.nan_to_num(volume.array[index], nan=-1024)
        write_png(out / "images" / names[index], np.clip(np.rint(hu + 1024.0), 0, 65535).astype(np.uint16))
        if labels is not None:
            write_png(out / "masks" / names[index], np.ascontiguousarray(labels[index]))

    list(in_threads(write, range(len(names)), desc))
    return names, None if labels is None else [name for name, mask in zip(names, labels) if mask.any()]


def write_classes(out, label_map, seen, given_names):
    """classes.json: the names given, or BTCV's if the map leads to its 13 organs, or class 1, class 2 ..."""
    count = max(({*label_map.values()} if label_map else seen) - {IGNORE}, default=0) + 1
    default = BTCV_ORGANS if label_map and count <= len(BTCV_ORGANS) else max(count, 2)
    names = class_names(out, given_names or default)
    if len(names) < count:
        raise DataError(f"{len(names)} class names (background first), but labels up to {count - 1}")
    write_text(out / "classes.json", json.dumps(names, indent=1))
    print(f"class names: {', '.join(names)}")
    named = dict(enumerate(names)) | {IGNORE: "ignored"}
    absent = [f"{id} ({named[label]})" for id, label in (label_map or {}).items() if id not in seen]
    print_names("ids of the label map that no volume holds", absent)


def make_lists(cases):
    """{case: (names, names with labels or None)} -> {"train": names ...}: 60/20/20 by labelled case, or
    blocks of the only one. "unlabelled" has every slice outside val and test, for pretraining."""
    labelled = [case for case, (_, with_labels) in cases.items() if with_labels is not None]
    if len(labelled) == 1:
        lists, dropped = blocks(labelled[0], *cases[labelled[0]])
    else:
        splits = zip(("train", "val", "test"), split_cases(labelled))
        lists = {split: [name for case in part for name in cases[case][0]] for split, part in splits}
        dropped = []
    held_out = {*lists["val"], *lists["test"], *dropped}
    everything = (name for names, _ in cases.values() for name in names)
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
