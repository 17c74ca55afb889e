"""Which files are in a folder: one rule for all commands.

Links are followed, suffixes may be written in any case, hidden files (.DS_Store, ._0001.png) do not count,
and the order is the natural one: slice10 after slice9.
"""

import os
import re
from pathlib import Path

from ct.slices import SUFFIXES, DataError

VOLUMES = (".nii.gz", ".nii")


def files_below(folder, endings, deep=True):
    """The files with one of these endings in a folder and, if `deep`, below it: names relative to it, in
    natural order. A folder that a link leads back to is not entered again."""
    names, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        identity = os.stat(parent)
        if (identity.st_dev, identity.st_ino) in seen:
            folders.clear()
            continue
        seen.add((identity.st_dev, identity.st_ino))
        folders[:] = [name for name in folders if name[0] != "."] if deep else []
        relative = Path(parent).relative_to(folder)
        names += [(relative / name).as_posix() for name in files if is_named(name, endings)]
    return sorted(names, key=natural_order)


def is_named(name, endings):
    return name[0] != "." and name.lower().endswith(endings)


def natural_order(name):
    """A key by which slice10 comes after slice9, folder by folder."""
    parts = (re.split(r"(\d+)", part) for part in name.split("/"))
    return [[(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in part if p] for part in parts]


def slices_and_volumes(source):
    """The slices, and the NIfTI volumes, anywhere below a folder; or the one file: two lists of paths.

    Raises DataError if there is none.
    """
    source = Path(source)
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    folder, names = (source, None) if source.is_dir() else (source.parent, [source.name])
    found = [
        [folder / name for name in names or files_below(folder, endings) if name.lower().endswith(endings)]
        for endings in (SUFFIXES, VOLUMES)
    ]
    if not any(found):
        raise DataError(f"{source}: neither slices (.png, .npy) nor volumes (.nii, .nii.gz)")
    return found
