"""data.py slice: which image has which labels.

Folders as they are published: BTCV (img/img0001.nii.gz, label/label0001.nii.gz), AbdomenCT-1K
(Case_00001_0000.nii.gz, Case_00001.nii.gz), nnU-Net's raw ones (imagesTr, labelsTr, dataset.json), KiTS
(CASE/imaging.nii.gz, CASE/segmentation.nii.gz). What is concluded from names is printed, and has an option
that decides otherwise.
"""

import glob
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from ct.listing import VOLUMES, files_below, natural_order
from ct.properties import read_json
from ct.slices import DataError

IMAGE_WORDS = {"imaging", "image", "img", "ct", "volume", "vol", "scan"}
LABEL_WORDS = {"segmentation", "seg", "label", "labels", "mask", "masks"}
CHANNEL = re.compile(r"(.+)_(\d{4})")  # nnU-Net's: CASE_0000, CASE_0001
MOST_CHANNELS = 9


@dataclass
class Pair:
    case: str
    image: Path
    labels: Path | None


def pair_volumes(images, labels, channels=None, pair=None):
    """The `Pair`s of two files, two folders or two patterns such as 'kits/*/imaging.nii.gz'.

    channels: how many files a case has, of which the first is taken; None: see first_channels.
    pair: "name" or "number" (the last one in it), by which an image and its labels agree; None: by name, if
    any do, else by number. What has no partner is printed; two candidates for one are an error.
    """
    found = cases_of(images, IMAGE_WORDS)
    label_files = cases_of(labels, LABEL_WORDS) if labels else {}
    image_files = first_channels(found, label_files, channels, images)
    if len(image_files) == len(label_files) == 1 and Path(images).is_file():
        (case, image), *_ = image_files.items()
        return [Pair(case, image, *label_files.values())]
    same = {*map(case_name, label_files)} & {*map(case_name, image_files)}
    key = case_name if (pair or ("name" if same else "number")) == "name" else number_in
    by_key = unique_by(key, label_files, labels)
    unique_by(key if labels else case_name, image_files, images)
    pairs = [Pair(case_name(case), path, by_key.pop(key(case), None)) for case, path in image_files.items()]
    with_labels = [pair for pair in pairs if pair.labels]
    if labels and not with_labels:
        raise DataError(f"{images}, {labels}: no image has the number or the name of a label file")
    if labels:
        first = f"{with_labels[0].image.name} with {with_labels[0].labels.name}"
        how = "name" if key is case_name else "last number"
        print(f"paired {len(with_labels)} of {len(pairs)} images with labels, by {how}: {first}")
        print_names(
            "images without labels (for pretraining only)", [p.image.name for p in pairs if not p.labels]
        )
        print_names("labels without an image (left out)", [path.name for path in by_key.values()])
    return pairs


def cases_of(given, words):
    """{case: volume} in natural order, of a file, a folder (of volumes, or of one a case), or a pattern."""
    path = Path(given)
    if path.is_file():
        return {stem_of(path): path}
    if not path.exists() and glob.has_magic(str(given)):
        return cases_of_pattern(str(given))
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    if names := files_below(path, VOLUMES, deep=False):
        return unique_cases((stem_of(path / name), path / name) for name in names)
    names = [name for name in files_below(path, VOLUMES) if name.count("/") == 1]
    if names:
        return cases_of_folders(path, names, words)
    dicom = any(path.rglob("*.dcm"))
    text = "; DICOM has to be converted first, see docs/COMPATIBILITY.md" if dicom else ""
    raise DataError(f"{path}: no .nii or .nii.gz files there{text}")


def cases_of_folders(path, names, words):
    """Of one folder a case: in each the file whose name is one of the words, the same in all."""
    folders = defaultdict(set)
    for name in names:
        folder, _, file = name.rpartition("/")
        folders[folder].add(file)
    everywhere = Counter(file for files in folders.values() for file in files)
    common = [file for file, count in everywhere.items() if count == len(folders)]
    fitting = [file for file in common if words & {*re.split(r"[^a-z]+", file.lower())}]
    chosen = common if len(common) == 1 else fitting
    if len(chosen) != 1:
        there = ", ".join(sorted(everywhere, key=natural_order)[:5])
        raise DataError(
            f"{path}: which file of each folder ({there}) is meant? Give a pattern: '{path}/*/NAME'"
        )
    print(f"{path}: one folder a case, {chosen[0]} in each: {len(folders)} cases")
    return {folder: path / folder / chosen[0] for folder in folders}


def cases_of_pattern(pattern):
    """A case is called by the folder or file that the pattern's first wildcard stands for."""
    parts = Path(pattern).parts
    varying = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    files = sorted((p for p in glob.glob(pattern) if p.lower().endswith(VOLUMES)), key=natural_order)
    if not files:
        raise DataError(f"{pattern}: no .nii or .nii.gz files there")
    last = varying == len(parts) - 1
    return unique_cases((stem_of(Path(p)) if last else Path(p).parts[varying], Path(p)) for p in files)


def unique_cases(pairs):
    cases = {}
    for case, path in pairs:
        if case in cases:
            raise DataError(f"{path}: a second file of the case {case}, beside {cases[case].name}")
        cases[case] = path
    return cases


def stem_of(path):
    return re.sub(r"\.nii(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def case_name(case):
    return case.removesuffix("_0000")


def number_in(name):
    numbers = re.findall(r"\d+", case_name(name))
    return int(numbers[-1]) if numbers else name


# ---- Channels ------------------------------------------------------------------------------------


def first_channels(files, labels, channels, images):
    """Of files CASE_0000, CASE_0001 ..., if these are channels of one case, the first of each.

    That they are say `channels`, dataset.json, the names of the labels, or two cases or more that all have
    the same numbers; without any of these nobody can know, and the user is asked.
    """
    split = {case: CHANNEL.fullmatch(case) for case in files}
    if not all(split.values()) or {match[2] for match in split.values()} == {"0000"}:
        if channels not in (None, 1):
            raise DataError(
                f"{images}: --channels {channels}, but the files are not called CASE_0000, CASE_0001"
            )
        return files
    cases = defaultdict(list)
    for match in split.values():
        cases[match[1]].append(match[2])
    count, why = evidence(cases, files, labels, channels, images)
    if count == 1:
        print(f"every file is a case of its own ({why})")
        return files
    if wrong := [case for case, numbers in cases.items() if len(numbers) != count]:
        raise DataError(
            f"{images}: {wrong[0]} has {len(cases[wrong[0]])} files, not {count} channels ({why})"
        )
    chosen = {f"{case}_{numbers[0]}": files[f"{case}_{numbers[0]}"] for case, numbers in cases.items()}
    print(f"{count} channels a case ({why}): {len(cases)} cases")
    print_names(
        "other channels (left out)", [path.name for case, path in files.items() if case not in chosen]
    )
    return chosen


def evidence(cases, files, labels, channels, images):
    """How many channels a case has, and who says so. cases: {name: its four-digit numbers}."""
    about = Path(images).parent / "dataset.json"
    numbers = next(iter(cases.values()))
    constant = all(own == numbers for own in cases.values()) and numbers[0] == "0000"
    if channels:
        return channels, f"--channels {channels}"
    if labels and {*labels} <= {*files}:
        return 1, "labels have the same names"
    if labels and {*labels} & {*cases} and constant:
        return len(numbers), "labels are called so without the number"
    if about.is_file():
        content = read_json(about, dict)
        named = content.get("channel_names", content.get("modality"))
        if isinstance(named, dict) and named:
            return len(named), str(about)
    if len(cases) > 1 and constant:
        return len(numbers), "all cases have the same numbers"
    if all(own[0] != "0000" or len(own) > MOST_CHANNELS for own in cases.values()):
        return 1, "no channel numbers from 0000 on"
    first = next(case for case, own in cases.items() if own[0] == "0000")
    several = f"{first}_{cases[first][0]} ... {first}_{cases[first][-1]}"
    raise DataError(
        f"{images}: {several}: are these channels of one case, or {len(files)} cases? "
        f"--channels {len(cases[first])} or --channels 1 says"
    )


def unique_by(key, files, given):
    found = {}
    for case, path in files.items():
        if key(case) in found:
            raise DataError(
                f"{given}: {found[key(case)].name} and {path.name} both count as {key(case)!r}; "
                "--pair name or --pair number decides"
            )
        found[key(case)] = path
    return found


def print_names(what, names):
    if names:
        print(f"{what}: {len(names)}: {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}")
