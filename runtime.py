"""What surrounds a run, for both scripts: processes and devices, logs, checkpoints, exits.

Nothing here knows the method. A script does

    process = start_process(cfg.run)

and is started by `run_script(main)`, which turns errors of the user's making into one line and exit code 2.
"""

import json
import os
import pickle
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
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

    def say(self, text: str) -> None:
        """Print a line, from the main process only, without breaking a progress bar."""
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def start_process(run: Config, timeout_minutes: float = 10) -> Process:
    """Device, precision and, under torchrun with several processes, the process group (NCCL or gloo).

    Uses run.device (auto, cpu, cuda), run.precision (auto, fp32, bf16) and run.deterministic.
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
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes), device_id=device_id)
    return Process(rank, world, device, precision)


def progress(process: Process, desc: str, iterable=None, total: int | None = None, initial: int = 0) -> tqdm:
    """A progress bar, on the main process of a run on a terminal only."""
    hidden = not (process.is_main and sys.stderr.isatty())
    return tqdm(
        iterable, desc=desc, total=total, initial=initial, disable=hidden, dynamic_ncols=True, leave=False
    )


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
    sys.stdout.flush()
    if dist.is_initialized() and code:
        os._exit(code)  # the other processes may be waiting in a collective: do not wait for them
    sys.exit(code)


def one_line(error: Exception) -> str:
    """The message; of an error raised in a DataLoader worker, the message that it was raised with."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "Original Traceback" in str(error):
        return lines[-1].split(": ", 1)[-1]
    return " ".join(line.strip() for line in lines)


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
    """A binary file to write to, which appears under its name, synced to disk, when all went well."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(folder: Path, state: dict, name: str = "checkpoint.pth") -> None:
    """Save the state, keeping the previous one beside it as NAME.previous."""
    path = folder / name
    fresh = folder / (name + ".new")
    with written_whole(fresh) as file:
        torch.save(state, file)
    if path.exists():
        os.replace(path, path.with_name(name + ".previous"))
    os.replace(fresh, path)


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
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
            failures.append(f"{path} ({one_line(error)[:100]})")
            continue
        if failures:
            print(f"warning: cannot read {failures[0]}; going on from {path}", file=sys.stderr)
        return state
    if failures:
        raise ConfigError(f"run.out: cannot read {failures[0]}; remove it to start anew")
    return None


class MetricsLog:
    """metrics.jsonl, one JSON object a line. A run that goes on after `done` steps drops later lines.

    With `tensorboard`, the numbers also go to event files in the folder, if tensorboard is installed.
    """

    def __init__(self, folder: Path, process: Process, done: int = 0, tensorboard: bool = False):
        self.file = self.board = None
        if not process.is_main:
            return
        path = folder / "metrics.jsonl"
        kept = whole_lines(path, done) if path.exists() and done else []
        write_whole(path, "".join(f"{line}\n" for line in kept))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
        self.board = tensorboard_writer(folder, done) if tensorboard else None

    def write(self, row: dict) -> None:
        if self.file is None:
            return
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.board:
            for name, value in row.items():
                if isinstance(value, int | float) and name not in ("step", "epoch"):
                    self.board.add_scalar(name, value, row["step"])

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
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and row.get("step", done + 1) <= done:
            kept.append(line)
    return kept
