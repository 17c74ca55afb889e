"""Which files are in a folder: one rule for all commands.

Links are followed, suffixes may be written in any case, hidden files (.DS_Store, ._0001.png) do not count,
and the order is the natural one: slice10 after slice9.
"""

import os
import re
from pathlib import Path

from ct.slices import SUFFIXES, DataError

SCANS = (".nrrd", ".mha", ".mhd")  # read by SimpleITK
VOLUMES = (".nii.gz", ".nii", *SCANS)
MASKS = re.compile(r"masks?|labels?(tr|ts)?|segmentations?|seg|annotations?|ann_dir")
# What files are called: kits/CASE/imaging.nii.gz, volume-0.nii and segmentation-0.nii, p1_ct and p1_seg.
IMAGE_WORDS = {"image", "images", "imaging", "img", "ct", "volume", "vol", "scan"}
LABEL_WORDS = {"label", "labels", "seg", "segmentation", "segmentations", "mask", "masks", "gt"}


def files_below(folder, endings, deep=True):
    """The files with one of these endings in a folder and, if `deep`, below it: names relative to it, in
    natural order. A link to a folder that it lies in is not followed.

    Raises DataError for a folder that cannot be read: its files would be missing without a word.
    """
    names, to_visit = [], [("", frozenset())]
    while to_visit:
        relative, above = to_visit.pop()
        place = os.path.join(folder, relative)
        try:
            about = os.stat(place)
            with os.scandir(place) as entries:
                there = [(entry.name, entry.is_dir()) for entry in entries]
        except OSError as error:
            raise DataError(f"{place}: {error.strerror}") from None
        if (this := (about.st_dev, about.st_ino)) in above:
            continue
        names += [relative + name for name, inner in there if not inner and is_named(name, endings)]
        inside = [name for name, inner in there if deep and inner and name[0] != "."]
        to_visit += [(f"{relative}{name}/", above | {this}) for name in inside]
    return sorted(names, key=natural_order)


def stem_of(name):
    """The name of a volume without its suffix."""
    return re.sub(r"\.(nii(\.gz)?|nrrd|mh[ad])$", "", name, flags=re.IGNORECASE)


def is_named(name, endings):
    return name[0] != "." and name.lower().endswith(endings)


def natural_order(name):
    """A key by which slice10 comes after slice9, folder by folder."""
    parts = (re.split(r"(\d+)", part) for part in name.split("/"))
    return [[(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in part if p] for part in parts]


def slices_and_volumes(source):
    """The slices, and the volumes, by their suffixes, anywhere below a folder; or the one file: two lists of
    paths. DICOM files, which may be called anything, are found by ct/scans.py.

    Raises DataError if there is no such file or folder.
    """
    source = Path(source)
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    folder, names = (source, None) if source.is_dir() else (source.parent, [source.name])
    return [
        [folder / name for name in names or files_below(folder, endings) if name.lower().endswith(endings)]
        for endings in (SUFFIXES, VOLUMES)
    ]


def without_masks(paths, source, masks):
    """The paths without those that a file's or a folder's name below `source` says to be masks, or that lie
    in its folder `masks`, in which "{split}" may stand for a list's name. Beside p1, p1_ct or p1_0000 also
    p1_seg is one."""
    own = masks.partition("{split}")[0].strip("/")
    names = [path.relative_to(source).as_posix() for path in paths]
    stems = (re.sub(r"(\.nii)?\.\w+$", "", name.lower()) for name in names)
    places = [stem.rpartition("/")[::2] for stem in stems]  # folder, what the file is called
    images = {(folder, case_in(file)) for folder, file in places if not is_called_mask(file)}

    def is_mask(name, folder, file):
        beside = is_called_mask(file) and (folder, case_in(file)) in images
        in_own = own and name.startswith(f"{own}/")
        return beside or in_own or any(map(MASKS.fullmatch, [*folder.split("/"), file]))

    return [path for path, name, place in zip(paths, names, places) if not is_mask(name, *place)]


def is_called_mask(name):
    return bool({*words_in(name)} & LABEL_WORDS)


def case_in(name):
    return bare_name(name.removesuffix("_0000"))


def bare_name(name):
    """A name without words for images and labels: p1_ct and p1_seg are p1."""
    return "_".join(word for word in words_in(name) if word not in IMAGE_WORDS | LABEL_WORDS) or name


def words_in(name):
    return re.split("[-_. ]+", name.lower())
