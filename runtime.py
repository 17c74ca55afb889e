"""What surrounds a run, for both scripts: processes and devices, logs, checkpoints, exits.

Nothing here knows the method. A script does

    process = start_process(cfg.run)

and is started by `run_script(main)`, which turns errors of the user's making into one line and exit code 2.
"""

import errno
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import sys
import warnings
import zipfile
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import Config, ConfigError

# ---------------------------------------------------------------------------------------------------------
# Processes, device and precision
# ---------------------------------------------------------------------------------------------------------


@dataclass
class Process:
    """This process among those of the run."""

    rank: int
    world: int
    device: torch.device
    precision: str  # "fp32" or "bf16"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def from_main(self, function):
        """What function() returns on the main process, given to all: only one of them reads files then."""
        result = [function() if self.is_main else None]
        if self.world > 1:
            dist.broadcast_object_list(result)
        return result[0]

    def everyone(self, value) -> list:
        """The values of all processes, in order of rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def say(self, text: str) -> None:
        """Print a line, from the main process only, without breaking a progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def start_process(run: Config) -> Process:
    """Device, precision and, under torchrun with several processes, the process group (NCCL or gloo).

    Uses run.device (auto, cpu, cuda), run.precision (auto, fp32, bf16), run.deterministic and
    run.timeout_minutes, after which a process that waits in vain for another gives up.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    kind = run.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device: 'cuda' is asked for, but PyTorch finds no usable GPU")
    if kind == "cuda" and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"run.device: local rank {local_rank}, but there are {torch.cuda.device_count()} GPUs"
        )
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not run.deterministic
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    precision = run.precision
    if precision == "auto":
        precision = "bf16" if kind == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if world > 1:
        backend = "nccl" if kind == "cuda" else "gloo"
        device_id = device if kind == "cuda" else None
        timeout = timedelta(minutes=run.timeout_minutes)
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        if int(os.environ.get("LOCAL_WORLD_SIZE", 0)) == world:
            # torchrun keeps its store when it restarts processes, with all that those before them left
            # there. (The counts of several nodes differ; there launch.sh has torchrun make a new one.)
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=device_id
        )
    process = Process(rank, world, device, precision)
    if run.deterministic:
        cost = "costs speed, see images_per_second" if kind == "cuda" else "costs nothing on a CPU"
        process.say(f"run.deterministic: repeatable algorithms only; {cost}")
    return process


def seeded(*key) -> torch.Generator:
    """A CPU generator whose state is a hash of the key: independent streams for independent purposes."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def progress(process: Process, desc: str, iterable=None, total: int | None = None, initial: int = 0) -> tqdm:
    """A progress bar, on the main process of a run on a terminal only."""
    hidden = not (process.is_main and sys.stderr.isatty())
    return tqdm(
        iterable, desc=desc, total=total, initial=initial, disable=hidden, dynamic_ncols=True, leave=False
    )


class Readback:
    """Small tensors on their way from the device to the host, in order.

    On a GPU `push` hands out what was pushed one call before: it has been computed by then, or is about to
    be while the GPU has the next step's work already, so neither of the two waits for the other.
    """

    def __init__(self, device: torch.device):
        self.lag = 1 if device.type == "cuda" else 0
        self.waiting = deque()

    def push(self, label, values: Tensor) -> list[tuple]:
        """Returns the (label, list of floats) that have arrived."""
        event = None
        if self.lag:
            values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.waiting.append((label, values, event))
        return self.arrived(self.lag)

    def arrived(self, behind: int = 0) -> list[tuple]:
        """All but the last `behind`."""
        found = []
        while len(self.waiting) > behind:
            label, values, event = self.waiting.popleft()
            if event:
                event.synchronize()
            found.append((label, values.tolist()))
        return found


# ---------------------------------------------------------------------------------------------------------
# Stopping: signals, lost processes, and what the shell is told
# ---------------------------------------------------------------------------------------------------------

STOPPED = 75  # EX_TEMPFAIL: stopped on request, everything is saved, the same command goes on


class StopRequest:
    """True once somebody wants this process to stop: SIGTERM, SIGUSR1 (SLURM's warning before a preemption),
    SIGINT (Ctrl-C), or the death of the torchrun that started it. Within a `with` block; `reason` says which.

    A second SIGINT ends the process at once.
    """

    def __init__(self, rank: int = 0):
        self.rank, self.reason, self.before = rank, "", {}
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> "StopRequest":
        for name in STOP_SIGNALS:
            self.before[name] = signal.signal(name, self.note)
            signal.siginterrupt(name, False)  # or system calls under way would fail
        return self

    def __exit__(self, *error) -> None:
        for name, handler in self.before.items():
            signal.signal(name, handler)

    def note(self, number: int, frame) -> None:
        self.reason = self.reason or signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if self.rank == 0:
                os.write(2, b"\nfinishing this step, then saving; Ctrl-C again: at once\n")

    def __bool__(self) -> bool:
        if self.launcher not in (None, os.getppid()):
            self.reason = self.reason or f"the launcher of rank {self.rank} is gone"
        return bool(self.reason)


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


STOP_MARKER = "stopped.json"  # in run.out after a stop on request, until the next start


def leave(folder: Path, step: int, reasons: list[str], process: Process) -> int:
    """Say why a run that has been saved stops, on the screen and in the marker; returns the exit code.

    reasons: of all processes, "" for those that nobody asked to stop.
    """
    reason = next(filter(None, reasons))
    if process.is_main:
        write_whole(folder / STOP_MARKER, json.dumps({"step": step, "reason": reason}) + "\n")
    process.say(f"stopped after step {step} ({reason}); the same command goes on from there")
    process.barrier()  # nobody leaves, and is missed by torchrun, before all is on disk
    return stopped_code(reason)


def stopped_code(reason: str) -> int:
    """The exit code after a stop.

    torchrun starts processes that fail again while it has restarts left, which nobody wants after a signal,
    and swallows the code in any case. launch.sh, which reads the marker, asks for 0 (STOPPED_CODE).
    """
    if not reason.startswith("SIG"):
        return STOPPED
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    used = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return 0 if used < restarts else int(os.environ.get("STOPPED_CODE", STOPPED))


@contextmanager
def naming_lost_workers(reader):
    """Within, the death of a reading process is reported with the file that it was reading.

    reader: see `reading.BatchReader`.
    """
    try:
        yield
    except RuntimeError as error:
        text = one_line(error)
        if "DataLoader" not in text:
            raise
        named = re.findall(r"pid\(?s?\)? ([\d, ]+)", text)  # none if all are too slow
        pids = [int(pid) for pid in re.findall(r"\d+", " ".join(named))] or reader.reading[:, 0].tolist()
        files = [file for pid in pids if (file := reader.being_read(pid))]
        where = f"; being read: {', '.join(files)}" if files else ""
        raise RuntimeError(text.rstrip(".") + where) from None


def batch_loader(reader, batches, workers: int, process: Process, timeout_minutes: float) -> DataLoader:
    """reader[batch] for every batch of indices, by worker processes that leave signals to the main one."""
    return DataLoader(
        reader,
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        pin_memory=process.device.type == "cuda",
        worker_init_fn=ignore_stop_signals,
        timeout=60 * timeout_minutes if workers else 0,
    )


def ignore_stop_signals(worker: int) -> None:
    for name in STOP_SIGNALS:
        signal.signal(name, signal.SIG_IGN)


def run_script(main, expected: tuple[type[Exception], ...] = ()) -> None:
    """Run main(); errors that the user can mend become one line on stderr and exit code 2."""
    try:
        code = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except (ConfigError, OSError, *expected) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        code = 2
    except RuntimeError as error:
        if (reason := outside_cause(error)) is None:
            raise
        print(f"error: {reason}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    readers = multiprocessing.active_children()
    for reader in readers:
        reader.kill()
    if code and (readers or dist.is_initialized()):
        os._exit(code)  # do not wait for processes that wait in a collective, or for a file
    sys.exit(code)


NO_MEMORY = re.compile("can't allocate memory|Storage size calculation overflowed")
LOST_PEER = re.compile(r"gloo|nccl|closed by peer|reset by peer|timed out|rendezvous|TCPStore", re.IGNORECASE)


def outside_cause(error: RuntimeError) -> str | None:
    """What to say of an error that other processes, the system or the hardware have caused; else None."""
    text = one_line(error)
    if isinstance(error, torch.OutOfMemoryError) or NO_MEMORY.search(text):
        return f"out of memory; a smaller optim.batch_size or data.size, or optim.accumulate ({text[:160]})"
    if isinstance(error, dist.DistError) or ("RANK" in os.environ and LOST_PEER.search(text)):
        rank = os.environ.get("RANK", "0")
        advice = "the same command goes on from the last checkpoint"
        return f"rank {rank} has lost another process; {advice} ({text[:160]})"
    if "DataLoader" in text:
        return text
    return None


def one_line(error: Exception) -> str:
    """The message, not endless; of an error raised in a DataLoader worker, that which it was raised with."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "Original Traceback" in str(error):
        lines = [lines[-1].split(": ", 1)[-1]]
    text = " ".join(line.strip() for line in lines)
    return text if len(text) <= 900 else f"{text[:600]} ... {text[-200:]}"


# ---------------------------------------------------------------------------------------------------------
# Files of a run
# ---------------------------------------------------------------------------------------------------------


def make_run_folder(path: str | Path, process: Process) -> Path:
    """The run's folder, made if needed.

    Raises:
        ConfigError: it cannot be made or written.
    """
    folder = Path(path)
    if process.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"run.out: cannot write into {folder} ({error.strerror})") from None
    process.barrier()
    return folder


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that nobody ever sees a part of it."""
    with written_whole(path) as file:
        file.write(text.encode())


@contextmanager
def written_whole(path: Path):
    """A binary file to write to, which appears under its name, synced to disk, when all went well.

    Raises OSError, on a full disk for example; nothing is left then of what was written.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):  # as torch.save does
            raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from None
        raise


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


class MetricsLog:
    """metrics.jsonl, one JSON object a line. A run that goes on after `done` steps drops later lines.

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
        row = {name: None if is_odd(value) else value for name, value in row.items()}
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


def is_odd(value) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def warn(text: str) -> None:
    tqdm.write(f"warning: {text}", file=sys.stderr)


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
        if isinstance(step, int) and step <= done:
            kept.append(line)
    return kept
