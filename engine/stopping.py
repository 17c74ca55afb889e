"""How a script ends: on request with everything saved, or with one line that says what is wrong.

`run_script(main)` starts a script and turns errors of the user's making into one line and exit code 2; no
process that reads for it outlives it. Within `StopRequest` signals ask the run to stop, which it does with
`leave`.
"""

import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from engine.config import Config, ConfigError
from engine.files import save_settings, write_whole
from engine.process import Process, cause_of

STOPPED = 75  # EX_TEMPFAIL: stopped on request, everything is saved, the same command resumes


class StopRequest:
    """True once somebody wants this process to stop: SIGTERM, SIGUSR1 (SLURM's warning before a preemption),
    SIGINT (Ctrl-C), or the death of the torchrun that started it. Within a `with` block; `reason` says which.
    One within another tells that one, too.

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
        around = getattr(self.before[number], "__self__", None)
        if isinstance(around, StopRequest):  # of a program of which this script is a step
            around.reason = around.reason or self.reason
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


def begin(folder: Path, cfg: Config, process: Process, script: str) -> None:
    """Take away the marker of an earlier stop, and write the settings to config.yaml."""
    if process.is_main:
        (folder / STOP_MARKER).unlink(missing_ok=True)
        save_settings(cfg, folder, script)


def leave(folder: Path, step: int, reasons: list[str], process: Process) -> int:
    """Say why a run that has been saved stops, on the screen and in the marker; returns the exit code.

    reasons: of all processes, "" for those that nobody asked to stop.
    """
    reason = next(filter(None, reasons))
    if process.is_main:
        write_whole(folder / STOP_MARKER, json.dumps({"step": step, "reason": reason}) + "\n")
    process.say(f"stopped after step {step} ({reason}); the same command resumes the run")
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

    reader: see `data.BatchReader`.
    """
    try:
        yield
    except RuntimeError as error:
        text = cause_of(error)
        if "DataLoader" not in text:
            raise
        named = re.findall(r"pid\(?s?\)? ([\d, ]+)", text)  # none if all are too slow
        pids = [int(pid) for pid in re.findall(r"\d+", " ".join(named))] or reader.reading[:, 0].tolist()
        files = [file for pid in pids if (file := reader.being_read(pid))]
        where = f"; being read: {', '.join(files)}" if files else ""
        raise RuntimeError(text.rstrip(".") + where) from None


def batch_loader(dataset, workers: int, process: Process, timeout_minutes: float, **batches) -> DataLoader:
    """What the dataset gives for each of the batches, by worker processes that leave signals to the main one.

    batches: `sampler` or `batch_sampler`, as DataLoader takes them.
    """
    return DataLoader(
        dataset,
        num_workers=workers,
        pin_memory=process.device.type == "cuda",
        worker_init_fn=ignore_stop_signals,
        timeout=60 * timeout_minutes if workers else 0,
        **batches,
    )


def ignore_stop_signals(worker: int) -> None:
    for name in STOP_SIGNALS:
        signal.signal(name, signal.SIG_IGN)


def check_shared_memory(workers: int, batch_bytes: int, batches: int) -> None:
    """Raise a ConfigError if /dev/shm, through which workers hand over batches, has no room for all of those
    that this machine's training processes have there at a time."""
    if not workers or not os.path.isdir("/dev/shm"):
        return
    free = shutil.disk_usage("/dev/shm").free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # Two of each worker, which DataLoader has made in advance, the one in training, and the one after it.
    needed = min(2 * workers + 2, batches) * batch_bytes
    if needed > free:
        fitting = max(0, free // batch_bytes - 2) // 2
        raise ConfigError(
            f"data.workers: {workers} of them hold {needed / 1e6:,.0f} MB of batches in /dev/shm, which has "
            f"room for {free / 1e6:,.0f} MB; {LARGER_SHM.format(fitting)}"
        )


LARGER_SHM = "enlarge it (docker run --shm-size=8g), or data.workers={}"


def run_script(main, expected: tuple[type[Exception], ...] = ()) -> None:
    """Run main() and end the process, and with it those that read for it: with its exit code; after an error
    that the user can mend with one line on stderr and 2; after any other, a bug, with a traceback and 1."""
    try:
        try:
            code = main()
        finally:  # first of all: they ignore what Python would end them with, and it would wait for ever
            readers = kill_readers()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        if isinstance(error, (ConfigError, OSError, *expected)):
            reason = cause_of(error)
        else:
            reason = outside_cause(error)
        if reason is None:
            traceback.print_exc()
        else:
            print(f"error: {reason}", file=sys.stderr)
        code = 1 if reason is None else 2
    sys.stdout.flush()
    if code and (readers or dist.is_initialized()):
        os._exit(code)  # do not wait for processes that wait in a collective, or for a file
    sys.exit(code)


def kill_readers() -> list:
    """Kill the processes that this one has started to read for it; returns them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise an error for each
    readers = multiprocessing.active_children()
    for reader in readers:
        reader.kill()
    return readers


NO_MEMORY = re.compile("can't allocate memory|Cannot allocate memory|Storage size calculation overflowed")
NO_SHARED_MEMORY = re.compile(r"shared memory|</torch_|/dev/shm|Bus error")
LOST_PEER = re.compile(r"gloo|nccl|closed by peer|reset by peer|timed out|rendezvous|TCPStore", re.IGNORECASE)


def outside_cause(error: Exception) -> str | None:
    """What to say of an error that other processes, the system or the hardware have caused; else None."""
    text = cause_of(error)
    if not isinstance(error, RuntimeError | MemoryError):
        return None
    if NO_SHARED_MEMORY.search(text):
        return f"no room in /dev/shm for batches; {LARGER_SHM.format(0)} ({text})"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or NO_MEMORY.search(text):
        return f"out of memory; a smaller optim.batch_size or data.size, or optim.accumulate ({text[:160]})"
    if isinstance(error, dist.DistError) or ("RANK" in os.environ and LOST_PEER.search(text)):
        rank = os.environ.get("RANK", "0")
        advice = "the same command resumes from the last checkpoint"
        return f"rank {rank} has lost another process; {advice} ({text[:160]})"
    if "DataLoader" in text:
        if "Killed" in text:
            text += "; the system kills processes when memory runs out: a smaller data.workers needs less"
        return text
    return None
