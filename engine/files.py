"""What a run keeps on disk: files that appear whole or not at all, metrics.jsonl, lasting checkpoints."""

import errno
import json
import math
import os
import pickle
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch

from engine.config import Config, ConfigError, one_line, read_yaml
from engine.ownership import LEFT_OVER, all_refuse, claim, enter, refuse_foreign, refuse_other_folder
from engine.process import Process, warn

# ---- Whole files ---------------------------------------------------------------------------------


def write_whole(path: Path, text: str, made_by: str | None = None) -> None:
    """Write a text file so that nobody ever sees a part of it."""
    with written_whole(path, made_by=made_by) as file:
        file.write(text.encode())


@contextmanager
def written_whole(path: Path, sync: bool = True, made_by: str | None = None, record: Path | None = None):
    """A binary file to write to, which appears under its name, `sync`ed to disk, when all went well.

    made_by: the command that may replace it another time, see engine/ownership.py; None where the folder
    tells whose it is. record: the folder in which that is noted; None: the file's own.

    Raises OSError, on a full disk for example; nothing is left then of what was written.
    """
    temporary = path.with_name(path.name + LEFT_OVER)
    try:
        with open(temporary, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if made_by:
            enter(path, temporary, made_by, record)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):  # as torch.save does
            raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from None
        raise


# ---- The run's folder and its log ----------------------------------------------------------------


def make_run_folder(cfg: Config, process: Process, script: str, weights: Path | None) -> Path:
    """The folder run.out, made if needed.

    Raises:
        ConfigError: it cannot be made or written; or see `refuse_other_run`.
    """
    folder = Path(cfg.run.out)
    all_refuse(process, refuse_other_run, cfg, script, weights)
    make_folder(folder, process, "run.out")
    if process.is_main:
        claim(folder, script)
    process.barrier()
    return folder


def refuse_other_run(cfg: Config, script: str, weights: Path | None) -> None:
    """Raise a ConfigError if run.out holds something else than a run of this script, settings that somebody
    has written into its config.yaml, or the `weights` that the run would start from."""
    folder = Path(cfg.run.out)
    refuse_other_folder(folder, script, "run.out", sign="config.yaml")
    if not same_settings(cfg, folder):
        refuse_foreign([folder / "config.yaml"], [], script, "run.out")
    if weights and weights.is_file() and weights.resolve().parent == folder.resolve():
        raise ConfigError(f"run.out: the run starts from {weights} and would write over it; choose another")


def same_settings(cfg: Config, folder: Path) -> bool:
    """Whether the folder's config.yaml says the same already; comments in it may be the user's."""
    try:
        return read_yaml(folder / "config.yaml") == cfg.plain()
    except (ConfigError, OSError):
        return False


def save_settings(cfg: Config, folder: Path, script: str) -> None:
    """The folder's config.yaml, which `refuse_other_run` has let through."""
    if not same_settings(cfg, folder):
        write_whole(folder / "config.yaml", cfg.as_yaml(), made_by=script)


def make_folder(folder: Path, process: Process, setting: str) -> None:
    """Make a folder to write into; ConfigError if that cannot be done."""
    if process.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ("writable" + LEFT_OVER)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"{setting}: cannot write into {folder} ({error.strerror})") from None
    process.barrier()


class MetricsLog:
    """metrics.jsonl, one JSON object a line. A run that is resumed after `done` steps drops later lines.

    On a full disk lines wait in memory for the next one. With `tensorboard`, the numbers also go to event
    files in the folder, if tensorboard is installed.
    """

    def __init__(self, folder: Path, process: Process, done: int = 0, tensorboard: bool = False):
        self.file = self.board = None
        self.waiting = b""  # not on disk yet
        if not process.is_main:
            return
        path = folder / "metrics.jsonl"
        kept = whole_lines(path, done) if path.exists() and done else []
        self.before = [json.loads(line) for line in kept]
        write_whole(path, "".join(f"{line}\n" for line in kept))
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 (open for the whole run)
        self.board = tensorboard_writer(folder, done) if tensorboard else None

    def write(self, row: dict) -> None:
        """Numbers that are not finite, which JSON does not have, are written as null."""
        if self.file is None:
            return
        odd = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        row = row | dict.fromkeys(odd)
        complaining = not self.waiting
        self.waiting += json.dumps(row).encode() + b"\n"
        try:
            while self.waiting:
                self.waiting = self.waiting[self.file.write(self.waiting) :]
        except OSError as error:
            if complaining:
                warn(f"{self.file.name}: {error.strerror}; lines wait for the next one")
        if self.board:
            try:
                for name, value in row.items():
                    if isinstance(value, int | float) and name not in ("step", "epoch"):
                        self.board.add_scalar(name, value, row["step"])
            except OSError as error:
                warn(f"TensorBoard files end here: {error.strerror}")
                self.board = None

    def close(self) -> None:
        if self.file:
            self.file.close()
        if self.board:
            self.board.close()


def tensorboard_writer(folder: Path, done: int):
    """A SummaryWriter, or None with a note if tensorboard is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("note: no TensorBoard files: pip install tensorboard")
        return None
    return SummaryWriter(folder, purge_step=done + 1)


def whole_lines(path: Path, done: int) -> list[str]:
    """The lines of a metrics file that are complete and of the first `done` steps."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        step = row.get("step") if isinstance(row, dict) else None
        if type(step) is int and 0 <= step <= done and all(map(is_measurement, row.values())):
            kept.append(line)
    return kept


def is_measurement(value) -> bool:
    """Whether a line of metrics may hold it: a number that a float can be, none, or a list of such."""
    if isinstance(value, list):
        return bool(value) and all(type(one) in (int, float) and abs(one) < 1e300 for one in value)
    return value is None or (type(value) in (int, float) and abs(value) < 1e300)


# ---- Checkpoints ---------------------------------------------------------------------------------


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
        read_back(fresh)
    except zipfile.BadZipFile as error:
        fresh.unlink()
        raise OSError(errno.EIO, f"not as written ({error})", str(fresh)) from None
    if path.exists():
        os.replace(path, path.with_name(name + ".previous"))
    os.replace(fresh, path)
    sync_folder(folder)


def read_back(path: Path) -> None:
    """Read all of a checkpoint; BadZipFile or OSError unless its bytes are as written: torch.load does not
    look."""
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


# What damaged files have made zipfile, pickle and torch.load raise,
UNREADABLE = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    MemoryError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)
# and content that is not what it should be those who look at it.
UNFIT = (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError)
ANEW = "remove it, or choose another run.out, to start anew"


def load_checkpoint(folder: Path, checked, name: str = "checkpoint.pth"):
    """`checked(content)` of the newest checkpoint that can be read and passes, None if there never was one.

    checked: takes the content, on the CPU, and returns what of it will be used, or raises: any of UNFIT for
        what this program would not have written, ConfigError for a checkpoint of another run.

    Raises:
        ConfigError: there are files, but none can be used.
    """
    failures = []
    for path in (folder / name, folder / (name + ".previous")):
        if not path.exists():
            continue
        try:
            read_back(path)
            with warnings.catch_warnings(action="ignore"):  # of odd tensors, which will not fit anyway
                content = torch.load(path, map_location="cpu", weights_only=True)
        except UNREADABLE as error:
            reason = f"cannot read {path} ({one_line(error, 100)})"
            failures.append(ConfigError(f"run.out: {reason}; {ANEW}"))
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                content = checked(content)
        except ConfigError as error:
            reason = str(error)
            failures.append(error)
            continue
        except UNFIT:
            reason = f"{path} is not a checkpoint of this program, or damaged"
            failures.append(ConfigError(f"run.out: {reason}; {ANEW}"))
            continue
        if failures:
            warn(f"{reason}; continuing from {path}")
        return content
    if failures:
        raise failures[0]
    return None


def checked_number(value, low, high, kind: type = int):
    """The value if it is a number of this kind in [low, high]; ValueError otherwise."""
    if type(value) is not kind or not low <= value <= high:
        raise ValueError(f"{value!r} is not from {low} to {high}")
    return value


def is_plain(value) -> bool:
    """Whether it is a setting, or a list of such: tensors, compared with one, may take all memory."""
    if isinstance(value, list | tuple):  # AdamW's betas are a tuple
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def checked_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """What optimizer.load_state_dict takes: the averages in a checkpoint's `state`, and the optimiser's own
    settings, which those in `state` must equal. (All but the rate, which is set anew before each step.)

    Raises any of UNFIT for a state of something else; load_state_dict itself takes everything.
    """
    own = optimizer.state_dict()["param_groups"]
    for mine, theirs in zip(own, state["param_groups"], strict=True):
        common = (mine.keys() & theirs.keys()) - {"lr"}
        if any(not is_plain(theirs[name]) or mine[name] != theirs[name] for name in common):
            raise ValueError("the optimiser's settings are others")
    averages = {}
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        averages[number] = {}
        for name, first in first_averages(optimizer, parameter).items():
            value = state["state"][number][name]
            same = (value.shape, value.dtype) == (first.shape, first.dtype)
            if not same or value.layout != torch.strided or not value.isfinite().all():
                raise ValueError("the optimiser's averages do not fit")
            averages[number][name] = value.clone()  # with memory for all of its elements
    return {"state": averages, "param_groups": own}


def first_averages(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """What an optimiser, SGD or AdamW, keeps of a parameter, before the first step."""
    if isinstance(optimizer, torch.optim.AdamW):
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"step": step} | {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    return {"momentum_buffer": torch.zeros_like(parameter)}
