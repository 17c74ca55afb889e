"""What surrounds a run, for both scripts: processes and devices, the run's folder and its log.

Nothing here knows the method. How a script ends is in stopping.py, its checkpoints are in checkpoints.py.
"""

import hashlib
import json
import math
import os
import sys
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from config import Config, ConfigError
from files import write_whole

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
    if precision == "bf16" and kind == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        process.say("run.precision: this CPU has no instructions for bf16, fp32 is ten times as fast on it")
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
# The run's folder and its log
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
