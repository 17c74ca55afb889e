"""Files of one image: CASE_0000.nii.gz, CASE_0001.nii.gz ..., as nnU-Net calls the channels of a case."""

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from ct.properties import read_json
from ct.slices import DataError


def without_channel(name):
    return name.removesuffix("_0000")


def without_channels(files):
    """Files that are all called CASE_0000, called CASE; others as they are. Series of DICOM do not count."""
    if not all(file.name.endswith("_0000") for file in files if not file.slices):
        return files
    return [replace(file, name=without_channel(file.name)) for file in files]


def first_channels(files, label_files, images, channels):
    """The Files that are images, of CASE_0000, CASE_0001 ... the first, called CASE, if these are channels of
    one image, else all of them; what was concluded, in words; and the names of the files left out.

    label_files: evidence, where there are any; images: the folder; channels: how many an image has, None: by
    what is evidence for it. Raises DataError without any.
    """
    numbered = [(file, re.fullmatch(r"(.+)_(\d{4})", file.name)) for file in files]
    channels_of = defaultdict(set)
    for _, match in numbered:
        if match:
            channels_of[match[1]].add(int(match[2]))
    several = {prefix: found for prefix, found in channels_of.items() if len(found) > 1 and 0 in found}
    why = ""
    if channels is None and several:
        channels, why = count_channels(files, label_files, channels_of, several, images)
    elif channels and channels > 1 and not several:
        raise DataError(f"{images}: --channels {channels}, but no CASE_0000 with CASE_0001 is there")
    if channels in (None, 1):
        return without_channels(files), why, []
    first, left_out = [], []
    for file, match in numbered:
        if match and int(match[2]) >= channels:
            raise DataError(f"{file.path}: channel {int(match[2])} of an image of {channels} (from 0 on)")
        if match and match[2] != "0000":
            if 0 not in channels_of[match[1]]:
                raise DataError(f"{file.path}: of its image {match[1]}_0000 is missing")
            left_out.append(file.path.name)
        else:
            first.append(replace(file, name=match[1]) if match else file)
    return first, why, left_out


def count_channels(files, label_files, channels_of, several, images):
    """How many channels an image has, by what is evidence for it; in words. DataError without any."""
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
    return found, f"{meant} ({reason})"


def dataset_json(images):
    """nnU-Net's description above its folder of images, or None."""
    path = Path(images).parent / "dataset.json"
    return path if Path(images).is_dir() and path.is_file() else None
