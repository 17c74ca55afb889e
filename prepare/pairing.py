"""Which volumes are images, which labels, and which belong together: never guessed without saying so.

pairs = pair_volumes("cts", "labels")           folders, whose names or numbers agree
pairs = pair_volumes("kits", "kits")            a folder for each case, with the same names in all
pairs = pair_volumes("kits/*/imaging.nii.gz", "kits/*/segmentation.nii.gz")
"""

import glob
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from ct.cases import File, no_volumes, refuse_namesakes, volumes_below
from ct.channels import first_channels, without_channel, without_channels
from ct.listing import VOLUMES, bare_name, files_below, is_named, listed, natural_order, stem_of
from ct.slices import SUFFIXES, DataError
from engine.config import one_line


@dataclass
class Pair:
    """file: of the image, with its place and patient."""

    case: str
    image: Path
    labels: Path | None
    file: File


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
        own = pair_of(image_files[0], label_files[0].path, without_channel(image_files[0].name))
        if not all(given):
            only = labels if given[0] else images
            name = own.image.name if given[0] else own.case
            print(f"paired {name} with {own.labels.name}, the only volume of {only}")
        return [refuse_itself(own)]
    names = {file.name for file in image_files}
    image_files, why, left_out = first_channels(image_files, label_files, images, channels)
    if why:
        print(f"{why}; --channels says otherwise")
    print_names("other channels (left out)", left_out)
    if {file.name for file in image_files} - names:
        label_files = without_channels(label_files)
    refuse_namesakes(image_files)
    if not labels:
        return [pair_of(file) for file in image_files]
    label_files = [named_after_image(file, image_files) for file in label_files]
    key, how = pairing_key(image_files, label_files, by)
    labels_of = unique_by(key, label_files)
    pairs = []
    for value, image in unique_by(key, image_files).items():
        own = labels_of.pop(value, None)
        pairs.append(refuse_itself(pair_of(image, own and own.path)))
    paired = [pair for pair in pairs if pair.labels]
    if not paired:
        raise DataError(
            f"{images}, {labels}: no image has the {how} of a label file, the first are "
            f"{image_files[0].shown} and {label_files[0].shown}; patterns can say which are meant"
        )
    example = f"{paired[0].file.shown} with {paired[0].labels.name}"
    print(f"paired {len(paired)} of {len(pairs)} images with labels, by {how}: {example}")
    alone = [pair.file.shown for pair in pairs if not pair.labels]
    print_names("images without labels (for pretraining only)", alone)
    print_names("labels without an image (left out)", [file.shown for file in labels_of.values()])
    return pairs


def pair_of(image, labels=None, case=None):
    return Pair(case or image.name, image.path, labels, image)


def refuse_itself(pair):
    if pair.labels and pair.labels.samefile(pair.image):
        raise DataError(
            f"{pair.image}: would be its own labels; say which files are meant, such as "
            "--images 'DIR/*_ct.nii.gz' --labels 'DIR/*_seg.nii.gz'"
        )
    return pair


def named_after_image(file, image_files):
    """Labels that are called after a folder, as the only image in there. DataError if there are several."""
    beside = [image for image in image_files if image.folder == file.name]
    if not beside or any(image.name == file.name for image in image_files):
        return file
    if len(beside) > 1:
        both = " and ".join(image.shown for image in beside[:2])
        raise DataError(
            f"{file.shown}: could be the labels of {both}; give them the name of one of these, or say "
            "which are meant, such as --images 'DIR/*/arterial.nii.gz'"
        )
    return replace(file, name=beside[0].name)


def unique_by(key, files):
    found = {}
    for file in files:
        value = key(file)
        if value in found:
            shown = ", ".join(map(str, value)) if isinstance(value, tuple) else value
            raise DataError(
                f"{found[value].shown} and {file.shown} both count as {shown}; "
                "--pair and patterns for --images and --labels say which are meant"
            )
        found[value] = file
    return found


def print_names(what, names):
    if names:
        print(listed(what, names))


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


# ---- Files, folders and patterns -----------------------------------------------------------------


def image_and_label_files(images, labels, organs):
    """The Files that --images and --labels name; where both are one folder, by what files are called."""
    of_organs = organ_folders(labels, organs)
    image_files, masks = volume_files(images)
    if not labels:
        return image_files, []
    if of_organs:
        folders = [file.path for file in of_organs]
        return [file for file in image_files if file.path.parent not in folders], of_organs
    if Path(images).is_dir() and Path(labels).is_dir() and Path(images).samefile(labels):
        label_files = masks or image_files  # of which each is refused as its own labels
    else:
        label_files, called_so = volume_files(labels, "--labels")
        if called_so:
            print_names(f"{labels}: not called labels (left out)", [file.shown for file in label_files])
        label_files = called_so or label_files
    inner, outer = Path(labels).resolve(), Path(images).resolve()
    if inner.is_dir() and outer in inner.parents:  # they are no images, whatever the folder is called
        image_files = [file for file in image_files if inner not in file.path.resolve().parents]
    return image_files, label_files


def volume_files(given, option="--images"):
    """The Files that a file, a pattern or a folder means, and those that are masks by their names; what was
    left out is printed."""
    path = Path(given)
    if not path.exists() and re.search(r"[*?\[]", str(given)):
        return files_of_pattern(str(given)), []
    found = volumes_below(path)
    for text in found.left_out:
        print(f"{path}: left out: {text}")
    if not found.images + found.masks:
        raise no_volumes(path, found.left_out)
    if pictures := files_below(path, SUFFIXES) if path.is_dir() else []:
        print_names(f"{path}: slices, which this command does not take", pictures)
    if option == "--images" and found.masks:
        print_names(f"{path}: masks by their names", [file.shown for file in found.masks])
    series = [file for file in found.images if file.slices]
    if series:
        some = ", ".join(f"{file.name} ({file.slices} slices)" for file in series[:5])
        print(f"{path}: {len(series)} CT series: {some}{' ...' if len(series) > 5 else ''}")
    return found.images, found.masks


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
        name = parts[0][places[0]] if "**" not in pattern else parts[0][-1]
        return [File(paths[0], name, name)]
    shared = max(index for index in range(min(map(len, parts))) if len({p[:index] for p in parts}) == 1)
    places = ["/".join(own[shared:]) for own in parts]
    if len({*map(len, parts)}) > 1:
        return [File(path, place.replace("/", "_"), place) for path, place in zip(paths, places)]
    differing = [index for index, column in enumerate(zip(*parts)) if len({*column}) > 1]
    for count in range(1, len(differing) + 1):
        names = ["_".join(own[index] for index in differing[:count]) for own in parts]
        if len({*names}) == len(names):
            break
    return [File(*one) for one in zip(paths, names, places)]
