"""Which volumes are images, which labels, and which belong together: never guessed without saying so.

pairs = pair_volumes("cts", "labels")           folders, whose names or numbers agree
pairs = pair_volumes("kits", "kits")            a folder for each case, with the same names in all
pairs = pair_volumes("kits/*/imaging.nii.gz", "kits/*/segmentation.nii.gz")
"""

import glob
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from ct.listing import (
    IMAGE_WORDS,
    LABEL_WORDS,
    VOLUMES,
    bare_name,
    files_below,
    is_named,
    natural_order,
    stem_of,
)
from ct.properties import read_json
from ct.scans import FEWEST, case_names, dicom_files, find_series, is_dicom, series_of
from ct.slices import DataError
from engine.config import one_line

OTHER_VOLUMES = (".nhdr", ".hdr", ".mgz", ".mgh", ".dcm")


@dataclass
class Pair:
    case: str
    image: Path
    labels: Path | None


@dataclass(frozen=True)
class File:
    """A volume, and what it is called by: its own name without suffix, or that of its case's folder."""

    path: Path
    name: str


def pair_volumes(images, labels, by=None, channels=None, organs=None):
    """The `Pair`s of two files, folders or patterns; what was concluded from names is printed.

    by        "name" or "number", the last one in a name; None: by name where any two are the same
    channels  how many files an image has, CASE_0000, CASE_0001 ..., of which the first is taken; 1: every
              file is an image; None: what dataset.json, the labels or several such cases say
    organs    names of classes: a folder with a file for two of them or more is the labels of a case

    Raises DataError where nothing, or more than one thing, can be meant.
    """
    image_files, label_files = image_and_label_files(images, labels, organs)
    given = [labels and Path(one).is_file() for one in (images, labels)]
    if any(given) and len(image_files) == len(label_files) == 1:
        own = Pair(without_channel(image_files[0].name), image_files[0].path, label_files[0].path)
        if not all(given):
            only = labels if given[0] else images
            name = own.image.name if given[0] else own.case
            print(f"paired {name} with {own.labels.name}, the only volume of {only}")
        return [refuse_itself(own)]
    names = {file.name for file in image_files}
    image_files = first_channels(image_files, label_files, images, channels)
    if {file.name for file in image_files} - names:
        label_files = without_channels(label_files)
    if not labels:
        return [Pair(name, file.path, None) for name, file in unique_by(by_name, image_files).items()]
    key, how = pairing_key(image_files, label_files, by)
    labels_of = unique_by(key, label_files)
    pairs = []
    for value, image in unique_by(key, image_files).items():
        own = labels_of.pop(value, None)
        pairs.append(refuse_itself(Pair(image.name, image.path, own and own.path)))
    paired = [pair for pair in pairs if pair.labels]
    if not paired:
        raise DataError(
            f"{images}, {labels}: no image has the {how} of a label file, the first are "
            f"{image_files[0].path.name} and {label_files[0].path.name}; patterns can say which are meant"
        )
    unique_by(by_name, image_files)  # folders are called by it
    example = f"{paired[0].image.name} with {paired[0].labels.name}"
    print(f"paired {len(paired)} of {len(pairs)} images with labels, by {how}: {example}")
    print_names("images without labels (for pretraining only)", [p.image.name for p in pairs if not p.labels])
    print_names("labels without an image (left out)", [file.path.name for file in labels_of.values()])
    return pairs


def refuse_itself(pair):
    if pair.labels and pair.labels.samefile(pair.image):
        raise DataError(
            f"{pair.image}: would be its own labels; say which files are meant, such as "
            "--images 'DIR/*_ct.nii.gz' --labels 'DIR/*_seg.nii.gz'"
        )
    return pair


def unique_by(key, files):
    found = {}
    for file in files:
        value = key(file)
        if value in found:
            shown = ", ".join(map(str, value)) if isinstance(value, tuple) else value
            raise DataError(
                f"{file.path.parent}: {found[value].path.name} and {file.path.name} both count as "
                f"{shown}; --pair and patterns for --images and --labels say which are meant"
            )
        found[value] = file
    return found


def print_names(what, names):
    if names:
        print(f"{what}: {len(names)}: {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}")


# ---- By which key --------------------------------------------------------------------------------


def pairing_key(image_files, label_files, by):
    """What an image and its labels have in common, as a function of a File, and in words: of several such
    things the first of which any two are the same."""
    keys = {None: KEYS, "name": KEYS[:2], "number": KEYS[2:]}[by]
    for key, how in keys:
        if {*map(key, image_files)} & {*map(key, label_files)}:
            return key, how
    return keys[-1]


def by_name(file):
    return file.name


def by_bare_name(file):
    return bare_name(file.name)


def by_numbers(file):
    return tuple(map(int, re.findall(r"\d+", file.name))) or file.name


def by_last_number(file):
    return number_in(file.name)


def number_in(name):
    """The last number in a name, or the name if it has none."""
    numbers = re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else name


KEYS = [(by_name, "name"), (by_bare_name, "name"), (by_numbers, "number"), (by_last_number, "number")]


# ---- Channels ------------------------------------------------------------------------------------


def without_channel(name):
    return name.removesuffix("_0000")


def without_channels(files):
    """Files that are all called CASE_0000, called CASE; others as they are."""
    if not all(file.name.endswith("_0000") for file in files):
        return files
    return [File(file.path, without_channel(file.name)) for file in files]


def first_channels(files, label_files, images, channels):
    """The Files that are images: of CASE_0000, CASE_0001 ... the first, called CASE, if these are channels of
    one image; else all of them."""
    numbered = [(file, re.fullmatch(r"(.+)_(\d{4})", file.name)) for file in files]
    channels_of = defaultdict(set)
    for _, match in numbered:
        if match:
            channels_of[match[1]].add(int(match[2]))
    several = {prefix: found for prefix, found in channels_of.items() if len(found) > 1 and 0 in found}
    if channels is None:
        channels = count_channels(files, label_files, channels_of, several, images) if several else 1
    elif channels > 1 and not several:
        raise DataError(f"{images}: --channels {channels}, but no CASE_0000 with CASE_0001 is there")
    if channels == 1:
        return without_channels(files)
    first, left_out = [], []
    for file, match in numbered:
        if match and int(match[2]) >= channels:
            raise DataError(f"{file.path}: channel {int(match[2])} of an image of {channels} (from 0 on)")
        if match and match[2] != "0000":
            if 0 not in channels_of[match[1]]:
                raise DataError(f"{file.path}: of its image {match[1]}_0000 is missing")
            left_out.append(file.path.name)
        else:
            first.append(File(file.path, match[1] if match else file.name))
    print_names("other channels (left out)", left_out)
    return first


def count_channels(files, label_files, channels_of, several, images):
    """How many channels an image has, by what is evidence for it; printed. DataError without any."""
    names, labels = {file.name for file in files}, {file.name for file in label_files}
    most = 1 + max(max(found) for found in several.values())
    about = dataset_json(images)
    content = read_json(about, dict) if about else {}
    said = content.get("channel_names", content.get("modality"))
    sets = {frozenset(found) for found in channels_of.values()}
    if labels & names:
        found, reason = 1, "labels have these names"
    elif labels & {*channels_of}:
        found, reason = most, "labels have the names without it"
    elif isinstance(said, dict) and said:
        found, reason = most if len(said) > 1 else 1, f"{about}: {len(said)} channels"
    elif len(label_files) == len(files):
        found, reason = 1, "there are as many labels"
    elif len(sets) == 1 and len(channels_of) > 1:
        found, reason = most, f"the same in {len(channels_of)} cases"
    else:
        prefix, numbers = next(iter(several.items()))
        some = f"{prefix}_0000 to {prefix}_{max(numbers):04d}"
        raise DataError(
            f"{images}: {some}: channels of one image, or images? --channels {most}: the first of them "
            "is taken; --channels 1: every file is an image"
        )
    meant = "every file is an image" if found == 1 else f"_0000 to _{most - 1:04d} are channels of one image"
    print(f"{meant} ({reason}; --channels says otherwise)")
    return found


def dataset_json(images):
    """nnU-Net's description above its folder of images, or None."""
    path = Path(images).parent / "dataset.json"
    return path if Path(images).is_dir() and path.is_file() else None


# ---- Files, folders and patterns -----------------------------------------------------------------


def image_and_label_files(images, labels, organs):
    """The Files that --images and --labels name; where both are one folder, by what files are called."""
    if found := organ_folders(labels, organs):
        return volume_files(images, IMAGE_WORDS), found
    if labels and is_flat(images) and Path(images).resolve() == Path(labels).resolve():
        files = volume_files(images)
        are_labels = [bool(words_of(file.name) & LABEL_WORDS) for file in files]
        if len({*are_labels}) == 2:
            chosen = [[f for f, is_label in zip(files, are_labels) if is_label == want] for want in (0, 1)]
            print(f"{images}: of {len(files)} files {len(chosen[1])} are called labels")
            return chosen
    return volume_files(images, IMAGE_WORDS), volume_files(labels, LABEL_WORDS) if labels else []


def words_of(name):
    return {*re.findall("[a-z]+", name.lower())}


def volume_files(given, words=IMAGE_WORDS):
    """The Files that are meant: one file, a pattern, a folder of files; or one with a folder for each case,
    of which the file is taken that is called by one of `words`."""
    path = Path(given)
    if path.is_file():
        name = series_of(path).folder.resolve().name if is_dicom(path) else stem_of(path.name)
        return [File(path, name)]
    if not path.exists() and re.search(r"[*?\[]", str(given)):
        return files_of_pattern(str(given))
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    if names := files_below(path, VOLUMES, deep=False):
        print_names(
            f"volumes in folders below {path} (left out)", sorted({*files_below(path, VOLUMES)} - {*names})
        )
        print_names("volumes of other kinds (left out)", files_below(path, OTHER_VOLUMES, deep=False))
        return [File(path / name, stem_of(name)) for name in names]
    if found := files_of_cases(path, words):
        further = [name for name in files_below(path, VOLUMES) if name.count("/") > 1]
        print_names(f"volumes further below {path} (left out)", further)
        return found
    if deep := files_below(path, VOLUMES):
        likely = "/".join(["*"] * deep[0].count("/") + [Path(deep[0]).name])
        organs = "; a file for each organ needs --classes" if words is LABEL_WORDS else ""
        raise DataError(
            f"{path}: volumes only far below, such as {deep[0]}; give a pattern: '{path}/{likely}'{organs}"
        )
    if dicom := dicom_files(path):
        return files_of_series(path, dicom)
    raise DataError(f"{path}: no volumes there ({', '.join(VOLUMES)}, DICOM)")


def files_of_series(root, dicom):
    """One File for each CT series among DICOM files; what was left out is printed."""
    series, left_out = find_series(dicom)
    for text in left_out:
        print(f"{root}: left out: {text}")
    if not series:
        raise DataError(f"{root}: {len(dicom)} DICOM files, but no CT series of {FEWEST} slices or more")
    names = case_names(series, root)
    some = ", ".join(f"{name} ({len(one.slices)} slices)" for name, one in zip(names[:5], series))
    print(f"{root}: {len(series)} CT series: {some}{' ...' if len(series) > 5 else ''}")
    return [File(one.path, name) for name, one in zip(names, series)]


def organ_folders(labels, organs):
    """The folders, at most two below --labels, with a file for each organ, as the Files of their cases."""
    if not organs or not labels or not Path(labels).is_dir():
        return []
    root, found = Path(labels), []
    for depth in ("", "*", "*/*"):
        for folder in sorted(root.glob(depth) if depth else [root], key=lambda one: natural_order(str(one))):
            if folder.is_dir() and len(organ_files(folder, organs)) > 1:
                inside = folder.relative_to(root).parts
                found.append(File(folder, inside[0] if inside else root.resolve().name))
    if found:
        files = organ_files(found[0].path, organs)
        example = ", ".join(path.name for path in [*files.values()][:3])
        print(f"{root}: a file for each organ ({example}, ...); where they overlap the first class counts")
        others = [path.name for path in volumes_in(found[0].path) if path not in files.values()]
        print_names("files that no class is called by (background)", others)
        print_names("classes without a file", [name for name in organs[1:] if name not in files])
    return found


def organ_files(folder, organs):
    """{class: its file}, by the words of both names, in any order: kidney_left is left kidney."""
    by_words = defaultdict(list)
    for path in volumes_in(folder):
        by_words[words_of_organ(stem_of(path.name))].append(path)
    found = {name: by_words[words_of_organ(name)] for name in organs[1:]}
    for name, paths in found.items():
        if len(paths) > 1:
            raise DataError(f"{paths[0]}: like {paths[1].name} the file of {one_line(name)}; take one away")
    return {name: paths[0] for name, paths in found.items() if paths}


def volumes_in(folder):
    return [folder / name for name in files_below(folder, VOLUMES, deep=False)]


def words_of_organ(name):
    return frozenset(word.removesuffix("s") for word in re.findall("[a-z0-9]+", name.lower()))


def is_flat(path):
    return Path(path).is_dir() and bool(files_below(path, VOLUMES, deep=False))


def files_of_pattern(pattern):
    """The case is what the first folder or name says in which the files differ, and the next ones, if it is
    not enough."""
    paths = sorted(
        filter(lambda path: is_named(Path(path).name, VOLUMES), glob.glob(pattern, recursive=True))
    )
    paths = [Path(path) for path in sorted(paths, key=natural_order)]
    if not paths:
        raise DataError(f"{pattern}: no volume ({', '.join(VOLUMES)}) is called so")
    parts = [(*path.parts[:-1], stem_of(path.name)) for path in paths]
    if len(paths) == 1:
        places = [index for index, part in enumerate(Path(pattern).parts) if re.search(r"[*?\[]", part)]
        return [File(paths[0], parts[0][places[0]] if "**" not in pattern else parts[0][-1])]
    if len({*map(len, parts)}) > 1:
        shared = max(index for index in range(min(map(len, parts))) if len({p[:index] for p in parts}) == 1)
        return [File(path, "_".join(own[shared:])) for path, own in zip(paths, parts)]
    differing = [index for index, column in enumerate(zip(*parts)) if len({*column}) > 1]
    for count in range(1, len(differing) + 1):
        names = ["_".join(own[index] for index in differing[:count]) for own in parts]
        if len({*names}) == len(names):
            break
    return [File(path, name) for path, name in zip(paths, names)]


def files_of_cases(root, words):
    """CASE/imaging.nii.gz and the like: of each folder the file of the name that is called by one of `words`,
    or the only one left. [] if no folder holds a volume; DataError where it is not clear which is meant."""
    folders = [path for path in root.iterdir() if path.is_dir() and path.name[0] != "."]
    folders.sort(key=lambda path: natural_order(path.name))
    found = {}  # folder -> {name with CASE for the folder's own: path}
    for folder in folders:
        names = files_below(folder, VOLUMES, deep=False)
        if names:
            found[folder.name] = {without_case(stem_of(n), folder.name): folder / n for n in names}
    if not found:
        return []
    everywhere = set.intersection(*({*files} for files in found.values()))
    anywhere = set.union(*({*files} for files in found.values()))
    image = the_one(everywhere, IMAGE_WORDS, LABEL_WORDS)
    name = image if words is IMAGE_WORDS else the_one(anywhere - {image}, LABEL_WORDS, IMAGE_WORDS)
    if name is None:
        what = "--images" if words is IMAGE_WORDS else "--labels"
        likely = min([one for one in anywhere if words_of(one) & words] or anywhere).replace("CASE", "*")
        example = f"{what} '{root}/*/{likely}.nii.gz'"
        raise DataError(
            f"{root}: its folders hold {one_line(', '.join(sorted(anywhere)))}; say which is meant: {example}"
        )
    chosen = [File(files[name], case) for case, files in found.items() if name in files]
    what = "image" if words is IMAGE_WORDS else "labels"
    example = without_case(chosen[0].path.name, chosen[0].name)
    print(f"{root}: a folder for each case, {what}: CASE/{example}")
    print_names("folders without volumes", [path.name for path in folders if path.name not in found])
    return chosen


def without_case(name, case):
    """p1_seg in the folder p1 is CASE_seg; imaging in the folder a stays imaging."""
    return re.sub(rf"(?<![a-zA-Z0-9]){re.escape(case)}(?![a-zA-Z0-9])", "CASE", name)


def the_one(names, words, other_words):
    """The only name with one of the words, or the only one without the other's; None if there is none."""
    for wanted in (
        [name for name in names if words_of(name) & words and not words_of(name) & other_words],
        [name for name in names if not words_of(name) & other_words],
    ):
        if len(wanted) == 1:
            return wanted[0]
    return None
