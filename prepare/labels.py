"""Label volumes: which ids they hold, where they lie, what becomes of them; and how classes are called."""

from collections import Counter
from dataclasses import replace

import numpy as np

from ct.channels import dataset_json
from ct.geometry import is_same_grid, judge_geometry, resampled, share_inside
from ct.organs import BTCV_ORGANS
from ct.plausible import Doubt, heed
from ct.properties import checked_names, class_names, read_json
from ct.slices import IGNORE, DataError
from ct.volumes import read_geometry, read_volume
from prepare.pairing import organ_files, print_names

NEARLY = 0.01  # labels that are off a whole number by less, as a scaled header leaves them, are rounded
HIGHEST = 65535  # id that a label map may name

# ---- One volume ----------------------------------------------------------------------------------


def scan_labels(pair, options):
    """The sorted ids in the labels of a `Pair`. Raises DataError for whatever makes them useless."""
    image = read_geometry(pair.image, options.axis)
    volume, doubts = read_labels(pair.labels, image, options)
    ids = ids_of(volume.array, pair.labels, options.label_map)
    heed_geometry(doubts, image, volume, lambda text: None)
    return ids


def read_labels(path, image, options):
    """The labels as a Volume, and what is doubtful about where they lie. image: the Geometry of the image."""
    volume = read_joined(path, options)
    doubts = judge_geometry(image, volume.geometry)
    if not doubts:
        return volume, []
    if options.ignore_geometry and volume.geometry.file_shape == image.file_shape:
        doubts = [Doubt(f"{doubt.text}; taken voxel by voxel all the same") for doubt in doubts]
        return read_joined(path, options, like=image), doubts
    return volume, judge_geometry(image, volume.geometry, share_inside(volume.array, volume.geometry, image))


def read_joined(path, options, like=None):
    """Labels as a Volume: of a file, or of a folder with a file for each organ, in which a voxel has the
    number of its class, the lowest where organs overlap."""
    if not path.is_dir():
        return read_volume(path, options.axis, like)
    joined = None
    for name, file in reversed(organ_files(path, options.organs).items()):
        volume = read_volume(file, options.axis, like)
        if joined is None:
            joined = replace(volume, array=np.zeros(volume.array.shape, np.uint8))
        elif not is_same_grid(joined.geometry, volume.geometry):
            raise DataError(f"{file}: on another grid than {joined.path.name} beside it")
        for here, one in zip(joined.array, volume.array):
            inside = one > 0.5
            if not (np.abs(one - inside) <= NEARLY).all():  # also where it is NaN
                raise DataError(f"{file}: the file of one organ must hold 0 and 1 only")
            here[inside] = options.organs.index(name)
    return joined


def heed_geometry(doubts, image, volume, say):
    if volume.geometry.file_shape == image.file_shape:
        heed(doubts, False, "--ignore-geometry", say)
        return
    mend = "; their shape is not the image's: they need the affine that says where in it they lie"
    heed([Doubt(one.text + (mend if one.fatal else ""), one.fatal) for one in doubts], False, "", say)


def ids_of(array, path, label_map):
    """The sorted ids in labels (S, H, W); values that are nearly whole are taken for these."""
    voxels, odd = np.zeros(HIGHEST + 1, np.int64), Counter()
    low, high, count = 0, 0, 0
    with np.errstate(invalid="ignore"):  # of what is infinite
        for one in array:
            whole = to_whole(one)
            fits = np.abs(one - whole) < NEARLY
            if not fits.all():
                count += np.count_nonzero(~fits)
                values, counts = np.unique(one[~fits], return_counts=True)
                most = np.argsort(-counts)[:100]
                odd.update(dict(zip(values[most].tolist(), counts[most].tolist())))
            whole = whole[fits]
            low, high = min(low, whole.min(initial=0)), max(high, whole.max(initial=0))
            if low >= 0 and high <= HIGHEST:
                voxels += np.bincount(whole.astype(np.int64).ravel(), minlength=HIGHEST + 1)
    if count:
        some = ", ".join(f"{value:.7g} ({times} voxels)" for value, times in odd.most_common(3))
        raise DataError(
            f"{path}: labels must be whole numbers; {count} voxels are not: {some}; if they "
            "were resampled: again, by the nearest voxel"
        )
    if low < 0 or high > (HIGHEST if label_map else IGNORE):
        reason = "--label-map chooses among more" if label_map is None else f"at most {HIGHEST} can be mapped"
        reason = "negative ones have to be set to 0 in the volume" if low < 0 else reason
        beyond = f"{high:g} in {voxels[int(high)]} voxels; " if low >= 0 and high <= HIGHEST else ""
        raise DataError(
            f"{path}: labels from {low:g} to {high:g}; {beyond}a mask holds 0 to {IGNORE}, {reason}"
        )
    return np.flatnonzero(voxels).tolist()


def to_whole(labels):
    """The nearest whole numbers, int64 for integers and float64 for other ones."""
    return labels.astype(np.int64) if labels.dtype.kind in "iu" else np.rint(labels.astype(np.float64))


def mask_slices(volume, image, label_map):
    """Yields the masks (H, W) uint8 of an image with this Geometry: labels on its grid, mapped."""
    targets = np.zeros(HIGHEST + 1, np.uint8)  # ids that the map does not list become background
    for source, target in ({id: id for id in range(256)} if label_map is None else label_map).items():
        targets[source] = target
    same = is_same_grid(image, volume.geometry)
    for one in volume.array if same else resampled(volume.array, volume.geometry, image):
        yield np.ascontiguousarray(targets[to_whole(one).astype(np.int64)])


# ---- Class names and label maps ------------------------------------------------------------------


def names_and_map(args):
    """Class names (or None) and label map {source id: target} (or None) as the arguments say; without any
    those of nnU-Net's dataset.json above the images folder, if there is one."""
    names = BTCV_ORGANS if args.classes == "btcv" else None
    if args.classes and names is None:
        names = checked_names(read_json(args.classes, list), args.classes)
    label_map = read_label_map(args.label_map) if args.label_map else None
    about = dataset_json(args.images)
    if args.labels and names is None and label_map is None and about:
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
    if len(label_map) < len(given):
        raise DataError(f"{path}: two entries for one id, such as 1 and 01")
    for source, target in label_map.items():
        if not (0 <= source <= 65535 and 0 <= target <= IGNORE):
            raise DataError(f"{path}: {source} -> {target}: ids from 0 to 65535 can become 0 to {IGNORE}")
    return label_map


def choose_classes(out, label_map, ids, given_names):
    """The class names: those given, or BTCV's if a map leads to just its 13 organs, or class 1, class 2 ...

    ids: {label file: its ids}. Raises DataError if there are more classes than names, or none at all.
    """
    seen = {id for own in ids.values() for id in own}
    targets = {*label_map.values()} if label_map else seen
    count = max(targets - {IGNORE}, default=0) + 1
    refuse_nothing(label_map, seen, [*ids])
    how = "given"
    if given_names is None and label_map and targets - {0, IGNORE} == {*range(1, len(BTCV_ORGANS))}:
        given_names, how = BTCV_ORGANS, "BTCV's, as the label map leads to 1 to 13; --classes says otherwise"
    elif given_names is None:
        given_names, how = count, "by number; --classes gives names"
    names = class_names(out, given_names)
    if len(names) < count and label_map:
        raise DataError(f"{len(names)} class names (background first), but a label map to {count - 1}")
    if len(names) < count:
        path = next(path for path, own in ids.items() if {*range(len(names), IGNORE)} & {*own})
        high = max({*ids[path]} - {IGNORE})
        text = f"labels up to {high}, but {len(names)} class names (background first)"
        raise DataError(f"{path}: {text}; --classes names all, --label-map leaves ids out")
    shown = names if given_names != count or count < 5 else [*names[:2], "...", names[-1]]
    print(f"class names ({how}): {', '.join(shown)}")
    if IGNORE in seen and not label_map:
        print(f"the label {IGNORE} means to ignore; --label-map makes a class of it")
    named = dict(enumerate(names)) | {IGNORE: "ignored"}
    if label_map:
        absent = [f"{id} ({named[label]})" for id, label in label_map.items() if id not in seen]
        print_names("ids of the label map that no volume holds", absent)
        unlisted = [str(id) for id in sorted(seen - {0, *label_map})]
        print_names("ids that the label map does not list (background now)", unlisted)
    else:
        absent = [f"{id} ({name})" for id, name in enumerate(names) if id not in seen]
        print_names("classes that no volume holds", absent)
    return names


def targets_of(ids, label_map):
    """What these ids become in a mask."""
    return {label_map.get(id, 0) for id in ids} if label_map else {*ids}


def refuse_nothing(label_map, seen, paths):
    """DataError if none of the ids that were seen in these files means a class."""
    if targets_of(seen, label_map) - {0, IGNORE}:
        return
    if label_map:
        mend = "the label map makes classes of none of them"
    elif IGNORE in seen:
        mend = '255 is ignored; if it means a class: --label-map with {"255": 1}'
    else:
        mend = "all is background; leave out --labels to slice for pretraining"
    where = paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
    some = ", ".join(map(str, sorted(seen)[:10]))
    raise DataError(f"{where}: no other labels than {some}: nothing to learn; {mend}")
