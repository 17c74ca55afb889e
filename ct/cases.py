"""Which volumes lie below a folder and what their cases are called: one rule for all commands.

A volume of any kind, however deep it lies, is a case, called after its path: patient3/venous.nrrd is
patient3_venous. What tells nothing goes: p1/imaging.nii.gz and p1/p1_ct.nii.gz are p1. A DICOM series is
called after its folder, and by a hash of its UID where the folder holds several.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ct.listing import (
    PATIENT,
    VOLUMES,
    files_below,
    is_nameless,
    listed,
    stem_of,
    without_masks,
)
from ct.scans import FEWEST, find_series, is_dicom, series_of
from ct.slices import SUFFIXES, DataError

OTHER_VOLUMES = (".nhdr", ".hdr", ".mgz", ".mgh", ".dcm")


@dataclass(frozen=True)
class File:
    """A volume, and what its case is called.

    path     of a DICOM series the file that stands for it
    place    where it lies below the folder that was given, without suffix
    patient  DICOM's PatientID, hashed; "" if nothing says it
    slices   how many files of DICOM it consists of
    """

    path: Path
    name: str
    place: str = ""
    patient: str = ""
    slices: int = 0

    @property
    def shown(self):
        """Its path below the folder; of a series that of its folder."""
        if self.slices or not self.place:
            return self.place or self.path.name
        return Path(self.place).with_name(self.path.name).as_posix()

    @property
    def folder(self):
        """What a case is called whose folder this is; "" in no folder."""
        return "_".join(self.place.split("/")[:-1])


@dataclass
class Found:
    """Files of images; files that are masks, by their names; and in words what was left out."""

    images: list[File]
    masks: list[File] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def volumes_below(source, masks="masks"):
    """All volumes below a folder, or the one file. masks: the folder of a set's masks, see without_masks."""
    source = Path(source)
    if source.is_file():
        dicom = is_dicom(source)
        if not dicom and not source.name.lower().endswith(VOLUMES):
            return Found([])
        own = series_of(source) if dicom else None
        name = own.folder.resolve().name if own else stem_of(source.name)
        return Found([File(source, name, name, own.patient if own else "")])
    if not source.is_dir():
        raise DataError(f"{source}: no such file or folder")
    names = files_below(source, "")
    volumes = [source / name for name in names if name.lower().endswith(VOLUMES)]
    others = [source / name for name in names if not name.lower().endswith((*SUFFIXES, *VOLUMES))]
    series, left_out = find_series(filter(is_dicom, others))
    series = {file: file.path.with_name("ct") for file in series_files(series, source)}
    images = {*without_masks([*volumes, *series.values()], source, masks)}
    found = Found([], [], left_out)
    for files, wanted in ((found.images, True), (found.masks, False)):
        files += named([path for path in volumes if (path in images) == wanted], source)
        files += [file for file, path in series.items() if (path in images) == wanted]
    if unread := [
        path for path in others if path.name.lower().endswith(OTHER_VOLUMES) and not is_dicom(path)
    ]:
        unread = [path.relative_to(source).as_posix() for path in unread]
        found.left_out.append(listed("volumes of other kinds, or damaged", unread))
    return found


def series_files(series, root):
    """The Files of DICOM series."""
    several, files = Counter(one.folder for one in series), []
    for one in series:
        parts = [*one.folder.relative_to(root).parts] or [root.resolve().name]
        if several[one.folder] > 1:
            name, place = f"{'_'.join(parts)}_{one.uid}", "/".join([*parts, one.uid])
        else:
            name, place = "_".join(parts), "/".join(parts)
        files.append(File(one.path, name, place, one.patient, len(one.slices)))
    return files


def named(paths, root):
    """The Files of volumes below a folder."""
    places = [path.relative_to(root).with_name(stem_of(path.name)).as_posix() for path in paths]
    parts = [place.split("/") for place in places]
    ends = {without_folder(own) for own in parts}
    same = len(parts) > 1 and len(ends) == 1 and all(len(own) > 1 for own in parts)
    same = same and not PATIENT.search(*ends)
    files = []
    for path, place, (*folders, stem) in zip(paths, places, parts):
        if folders and (same or is_nameless("/".join(folders).lower(), stem)):
            words = folders
        elif folders and stem.startswith(folders[-1]) and without_folder([*folders, stem]) != stem:
            words = [*folders[:-1], stem]
        else:
            words = [*folders, stem]
        files.append(File(path, "_".join(words), place))
    return files


def without_folder(parts):
    """What a file is called, CASE for its folder's name: p1_seg in p1 is CASE_seg, imaging in a stays."""
    folder, stem = ([None, *parts])[-2:]
    return re.sub(rf"(?<![a-zA-Z0-9]){re.escape(folder)}(?![a-zA-Z0-9])", "CASE", stem) if folder else stem


def refuse_namesakes(files):
    """DataError where two files would be the same case."""
    of = {}
    for file in files:
        if (other := of.setdefault(file.name, file)) is not file:
            text = f"{other.path} and {file.path} would both be the case {file.name}"
            raise DataError(f"{text}; rename one of them, or take one away")


def no_volumes(source, left_out):
    """The DataError of a folder without any."""
    found = f" (left out: {'; '.join(left_out)})" if left_out else ""
    kinds = f"{', '.join(VOLUMES)}, DICOM series of {FEWEST} slices or more"
    return DataError(f"{source}: no volumes there: {kinds}{found}")
