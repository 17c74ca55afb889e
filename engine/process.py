"""The processes of a run and their devices, progress bars, and values on their way to the host."""

import os
import sys
import time
import warnings
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from engine.config import Config, ConfigError, one_line


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

    def gather(self, value) -> list:
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

    def warn(self, text: str) -> None:
        """The same of a warning, on stderr."""
        if self.is_main:
            warn(text)

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
        # Of DistributedDataParallel's argument, which has no other name in earlier versions of torch.
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
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


def progress(process: Process, desc: str, iterable=None, total: int | None = None, initial: int = 0) -> tqdm:
    """A progress bar, on the main process of a run on a terminal only."""
    hidden = not (process.is_main and sys.stderr.isatty())
    return tqdm(
        iterable, desc=desc, total=total, initial=initial, disable=hidden, dynamic_ncols=True, leave=False
    )


class Tenths:
    """What a loop of `total` steps says where no progress bar is shown: a line after each tenth of them, and
    whenever the last line is ten minutes old."""

    def __init__(self, total: int, done: int = 0):
        self.total, self.start, self.said = total, done, done
        self.began = self.clock = time.monotonic()

    def line(self, done: int, text: str) -> str | None:
        """ "step 60/600  loss 5.3 (00:24 gone, 03:36 left)" if a line is due after so many steps."""
        now = time.monotonic()
        if done - self.said < self.total // 10 and now - self.clock < 600 and done < self.total:
            return None
        self.said, self.clock = done, now
        gone = now - self.began
        left = gone / max(1, done - self.start) * (self.total - done)
        gone, left = map(tqdm.format_interval, (gone, left))
        return f"step {done}/{self.total}  {text} ({gone} gone, {left} left)"


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


def warn(text: str) -> None:
    tqdm.write(f"warning: {text}", file=sys.stderr)


@contextmanager
def only_warning(text: str):
    """Within, whatever goes wrong is a warning, `text` and the reason: for pictures and measurements, which
    must not cost the run that they are of."""
    try:
        yield
    except Exception as error:  # of drawing libraries, of linear algebra, of a full disk or memory
        reason = one_line(cause_of(error), 160)
        named = reason if isinstance(error, OSError | ConfigError) else f"{type(error).__name__}: {reason}"
        warn(f"{text} ({named})")


def cause_of(error: Exception) -> str:
    """The message as one line; of an error raised in a DataLoader worker, that which it was raised with."""
    text = str(error)
    if "exited unexpectedly" in text:  # and by which signal, the error before it says
        text = str(error.__cause__ or error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].split(": ", 1)[-1]
    return one_line(text or error, 900)
