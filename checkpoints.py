"""Checkpoints that survive: written beside the last one, read back, and only then put in its place."""

import errno
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch

from config import ConfigError
from files import written_whole
from runtime import warn
from stopping import one_line


def save_checkpoint(folder: Path, state: dict, name: str = "checkpoint.pth") -> None:
    """Save the state and read it back; only then does it take the place of the one before, which is kept
    beside it as NAME.previous.

    Raises:
        OSError: it could not be written whole, on a full disk for example; the one before is in place.
    """
    path = folder / name
    fresh = folder / (name + ".new")
    with written_whole(fresh) as file:
        torch.save(state, file)
    try:
        check_intact(fresh)
    except zipfile.BadZipFile as error:
        fresh.unlink()
        raise OSError(errno.EIO, f"not as written ({error})", str(fresh)) from None
    if path.exists():
        os.replace(path, path.with_name(name + ".previous"))
    os.replace(fresh, path)
    sync_folder(folder)


def check_intact(path: Path) -> None:
    """Raise BadZipFile or OSError unless a checkpoint's bytes are as written: torch.load does not look."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} is damaged")


def sync_folder(folder: Path) -> None:
    """Names given by os.replace reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# What damaged files have made zipfile, pickle and torch.load raise.
UNREADABLE = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


def load_checkpoint(folder: Path, name: str = "checkpoint.pth") -> dict | None:
    """The newest readable checkpoint on the CPU, None if there never was one.

    Raises:
        ConfigError: there are files, but none can be read.
    """
    failures = []
    for path in (folder / name, folder / (name + ".previous")):
        if not path.exists():
            continue
        try:
            check_intact(path)
            with warnings.catch_warnings(action="ignore"):  # of odd tensors, which will not fit anyway
                state = torch.load(path, map_location="cpu", weights_only=True)
        except UNREADABLE as error:
            failures.append(f"{path} ({one_line(error)[:100]})")
            continue
        if failures:
            warn(f"cannot read {failures[0]}; going on from {path}")
        return state
    if failures:
        raise ConfigError(f"run.out: cannot read {failures[0]}; remove it to start anew")
    return None


def load_optimizer(optimizer: torch.optim.SGD, state: dict) -> None:
    """optimizer.load_state_dict(state), which by itself takes momentum of any shape.

    Raises ValueError, KeyError, TypeError or AttributeError for a state of something else.
    """
    optimizer.load_state_dict(state)
    for parameter, own in optimizer.state.items():
        momentum = own["momentum_buffer"]
        same = (momentum.shape, momentum.layout, momentum.dtype, momentum.device)
        if same != (parameter.shape, parameter.layout, parameter.dtype, parameter.device):
            raise ValueError("the optimiser's momentum does not fit")
