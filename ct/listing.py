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
MASKS = re.compile(r"masks?|labels?(tr|va|ts)?|segmentations?|seg|annotations?|ann_dir")
# What files are called: kits/CASE/imaging.nii.gz, volume-0.nii and segmentation-0.nii, p1_ct and p1_seg.
IMAGE_WORDS = {"image", "images", "imaging", "img", "ct", "volume", "vol", "scan"}
LABEL_WORDS = {"label", "labels", "seg", "segmentation", "segmentations", "mask", "masks", "gt"}
# patient05, sub-01: a name that says itself whose it is.
PATIENT = re.compile(
    r"(?<![a-z])((?:patient|subject|pat|sub)[-_ ]?(?:\d+|(?!s)[a-z](?![a-z]))|sub-[a-z]*\d[a-z\d]*)",
    re.IGNORECASE,
)


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


def listed(what, names):
    """A line that counts names and has the first of them."""
    return f"{what}: {len(names)}: {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}"


def stem_of(name):
    """The name of a volume without its suffix."""
    return re.sub(r"\.(nii(\.gz)?|nrrd|mh[ad])$", "", name, flags=re.IGNORECASE)


def is_named(name, endings):
    return name[0] != "." and name.lower().endswith(endings)


def natural_order(name):
    """A key by which slice10 comes after slice9, folder by folder."""
    parts = (re.split(r"(\d+)", part) for part in name.split("/"))
    return [[(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in part if p] for part in parts]


def slices_below(source):
    """The slices, by their suffixes, anywhere below a folder; or the one file: paths. Volumes: ct/cases.py.

    Raises DataError if there is no such file or folder.
    """
    source = Path(source)
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if source.is_file():
        return [source] if source.name.lower().endswith(SUFFIXES) else []
    return [source / name for name in files_below(source, SUFFIXES)]


def without_masks(paths, source, masks):
    """The paths without those that a file's or a folder's name below `source` says to be masks, or that lie
    in its folder `masks`, in which "{split}" may stand for a list's name. Beside p1, p1_ct or p1_0000 also
    p1_seg is one, beside an image without a name of its own (ct, imaging) any that is called one."""
    own = masks.partition("{split}")[0].strip("/")
    names = [path.relative_to(source).as_posix() for path in paths]
    stems = (re.sub(r"(\.nii)?\.\w+$", "", name.lower()) for name in names)
    places = [stem.rpartition("/")[::2] for stem in stems]  # folder, what the file is called
    others = [(folder, file) for folder, file in places if not is_called_mask(file)]
    images = {(folder, "" if is_nameless(folder, file) else case_in(file)) for folder, file in others}

    def is_mask(name, folder, file):
        beside = is_called_mask(file) and {(folder, case_in(file)), (folder, "")} & images
        in_own = own and name.startswith(f"{own}/")
        alone = folder and is_called_mask(file) and is_nameless(folder, file)
        return beside or alone or in_own or any(map(MASKS.fullmatch, [*folder.split("/"), file]))

    return [path for path, name, place in zip(paths, names, places) if not is_mask(name, *place)]


def is_nameless(folder, name):
    """Whether a name says only what kind of file it is: imaging, ct, seg, or p1_ct in the folder p1."""
    words = {*words_in(name)}
    return bool(words & (IMAGE_WORDS | LABEL_WORDS)) and words <= IMAGE_WORDS | LABEL_WORDS | {
        *words_in(folder.rpartition("/")[2])
    }


def is_called_mask(name):
    return bool({*words_in(name)} & LABEL_WORDS)


def case_in(name):
    return bare_name(name.removesuffix("_0000"))


def bare_name(name):
    """A name without words for images and labels: p1_ct and p1_seg are p1."""
    return "_".join(word for word in words_in(name) if word not in IMAGE_WORDS | LABEL_WORDS) or name


def words_in(name):
    return re.split("[-_. ]+", name.lower())
