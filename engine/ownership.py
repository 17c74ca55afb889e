"""Whose files these are: nothing is written over that this project did not write there itself.

Beside what a command writes, or in the folder that is its own, stands .med-moco, one JSON object a line:

    {"file": "ct.nii.gz", "made_by": "eval_seg.py --predict", "sha256": "..."}
    {"folder_of": "train_moco.py"}

which is written before the file appears, or anything else in the folder: a kill at any moment does no harm.
A command replaces a file only if it wrote it itself, in this folder, and nobody has changed it since; and it
takes a folder for one of its own only if it is new, or empty, or says so. Copying or editing a file makes it
the user's.

    refuse_foreign(targets, sources, made_by)      a command that writes single files, before it writes any
    refuse_other_folder(folder, made_by)           one that fills a folder; then claim(folder, made_by)
    remove_own(paths, made_by)                     those of which all that is true
    enter(path, content, made_by)                  called by engine.files.written_whole
"""

import errno
import hashlib
import json
import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from engine.config import ConfigError, one_line
from engine.process import Process

RECORD = ".med-moco"
LEFT_OVER = ".med-moco.part"  # the ending of files under way, of which a killed process leaves one
LOGS = (".log", ".out", ".err")  # of a scheduler or a shell; they may be in a folder before its run


def enter(path: Path, content: Path, made_by: str, record: Path | None = None) -> None:
    """Note in the record of its folder, or of the folder `record`, that `path` is about to become what the
    file `content` holds now."""
    folder = record or path.parent
    add_line(folder, {"file": os.path.relpath(path, folder), "made_by": made_by, "sha256": sha256(content)})


def claim(folder: Path, made_by: str) -> None:
    """Note that the folder, which `refuse_other_folder` has let through, belongs to this command."""
    if not is_folder_of(folder, made_by):
        add_line(folder, {"folder_of": made_by})


def add_line(folder: Path, content: dict) -> None:
    """In one piece, since several processes may write into one folder. After a line that a full disk has cut
    off a new one begins."""
    path = folder / RECORD
    line = json.dumps(content).encode() + b"\n"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        line = line if ends_a_line(path) else b"\n" + line
        if os.write(handle, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(handle)


def ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
        return file.read(1) in (b"", b"\n")


def lines_of(folder: Path) -> list[dict]:
    """The folder's record; lines that cannot be read are left out, so that what they speak of is foreign."""
    try:
        text = (folder / RECORD).read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for line in text.splitlines():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        found += [content] if isinstance(content, dict) else []
    return found


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- Files ---------------------------------------------------------------------------------------


def refuse_foreign(
    targets: Iterable[Path],
    sources: Iterable[str | Path],
    made_by: str,
    setting: str = "--out",
    record: Path | None = None,
) -> None:
    """Raise a ConfigError unless all targets can be written without loss.

    That is, none of them is one of the sources, which the command reads, also under another name; no two are
    the same; and what exists of them this very command wrote there. record: as for `enter`.
    """
    targets = [Path(target) for target in targets]
    if twice := [target for target, count in Counter(targets).items() if count > 1]:
        raise ConfigError(f"{one_line(twice[0])}: two files would become this one; rename one of them")
    there = [target for target in targets if os.path.lexists(target)]
    if not there:
        return
    identities = {identity for source in sources if (identity := identity_of(source))}
    for target in there:
        if target.is_dir():
            raise ConfigError(
                f"{one_line(target)}: is a folder, and a file is meant; choose another {setting}"
            )
        if identity_of(target) in identities:
            text = "is read by this command, which would write over it; choose another"
            raise ConfigError(f"{one_line(target)}: {text} {setting}")
    if foreign := foreign_files(there, made_by, record):
        more = f" ({len(foreign)} such files)" if len(foreign) > 1 else ""
        raise ConfigError(
            f"{one_line(foreign[0])}: would be written over, and is not as {made_by} wrote it there{more}; "
            f"move it away or choose another {setting}"
        )


def identity_of(path: str | Path) -> tuple | None:
    """The same for all names of a file, through whatever links; None if it does not exist."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def foreign_files(paths: Iterable[Path], made_by: str, record: Path | None = None) -> list[Path]:
    """Those of these existing files that `made_by` did not write there, or that have changed since."""
    records = {}

    def is_own(path: Path) -> bool:
        folder = record or path.parent
        if folder not in records:
            records[folder] = written_in(folder, made_by)
        known = records[folder].get(os.path.relpath(path, folder))
        if not known or path.is_symlink() or not path.is_file():
            return False
        return path.stat().st_size == 0 or sha256(path) in known  # empty: the power went while it was written

    return [path for path in paths if not is_own(path)]


def written_in(folder: Path, made_by: str) -> dict[str, set]:
    """{name: the sha256 of everything that `made_by` ever wrote under it in this folder}"""
    written = defaultdict(set)
    for line in lines_of(folder):
        if line.get("made_by") == made_by:
            written[str(line.get("file"))].add(str(line.get("sha256")))
    return written


def remove_own(paths: Iterable[Path], made_by: str, record: Path | None = None) -> None:
    """Delete the files that exist and are as `made_by` wrote them there; all others stay."""
    there = [path for path in paths if os.path.lexists(path)]
    for path in {*there} - {*foreign_files(there, made_by, record)}:
        path.unlink()


def contents(folder: Path) -> list[Path]:
    """What is in a folder, sorted; [] without it. Hidden files and what a killed process has left do not
    count."""
    if not folder.is_dir():
        return []
    names = sorted(path.name for path in folder.iterdir())
    return [folder / name for name in names if name[0] != "." and not name.endswith(LEFT_OVER)]


# ---- Folders -------------------------------------------------------------------------------------


def refuse_other_folder(
    folder: str | Path, made_by: str, setting: str = "--out", sign: str | None = None
) -> None:
    """Raise a ConfigError unless the folder is new, empty, or one of `made_by`'s.

    Logs and what a killed process has left do not count. `sign`: a file by which a folder of an older
    version, which left no record, can be known; the message then says how it can be kept.
    """
    folder = Path(folder)
    if not os.path.lexists(folder) or is_folder_of(folder, made_by):
        return
    if not folder.is_dir():
        raise ConfigError(f"{setting}: {folder} is a file; choose another folder")
    names = [path.name for path in contents(folder) if not path.name.endswith(LOGS)]
    owners = [line["folder_of"] for line in lines_of(folder) if "folder_of" in line]
    if owners:
        text = f"belongs to {one_line(owners[0])}, not to {made_by}; choose another folder"
    elif names:
        text = f"is not empty ({one_line(names[0])}) and not a folder of {made_by}; choose a new or empty one"
    else:
        return
    if sign in names and not owners:
        line = shlex.quote(json.dumps({"folder_of": made_by}))
        text += f" (or, if an older version made it: echo {line} >> {shlex.quote(str(folder / RECORD))})"
    raise ConfigError(f"{setting}: {folder} {text}")


def is_folder_of(folder: Path, made_by: str) -> bool:
    return any(line.get("folder_of") == made_by for line in lines_of(folder))


def all_refuse(process: Process, check, *arguments) -> None:
    """check(*arguments) on the main process only; the ConfigError that it raises is raised on all."""

    def reason() -> str | None:
        try:
            check(*arguments)
        except (ConfigError, OSError) as error:
            return str(error)
        return None

    if text := process.from_main(reason):
        raise ConfigError(text)
