"""What surrounds a run, for both scripts: configuration, processes and devices, logs, checkpoints, exits.

Nothing here knows the method. A script does

    cfg = load_config(DEFAULTS, args.config, args.overrides, NULLABLE)
    process = start_process(cfg.run)

and is started by `run_script(main)`, which turns errors of the user's making into one line and exit code 2.
"""

import argparse
import difflib
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
import yaml
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------------------
# Configuration: YAML over commented defaults, then section.key=value
# ---------------------------------------------------------------------------------------------------------


class ConfigError(ValueError):
    """A configuration that cannot work; the message is one line that names the key."""


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


class Config(dict):
    """A nested dict whose keys are attributes: cfg.optim.lr."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def flat(self) -> dict:
        """{"optim.lr": 0.03, ...}"""
        rows = {}
        for name, value in self.items():
            if isinstance(value, Config):
                rows |= {f"{name}.{inner}": v for inner, v in value.flat().items()}
            else:
                rows[name] = value
        return rows

    def plain(self) -> dict:
        """The same in ordinary dicts."""
        return {name: v.plain() if isinstance(v, Config) else v for name, v in self.items()}

    def save(self, path: Path) -> None:
        write_whole(path, yaml.safe_dump(self.plain(), sort_keys=False))

    def first_difference(self, other: "Config", ignore: tuple[str, ...] = ()) -> str | None:
        """The first key whose value differs, of those that do not start with one of `ignore`."""
        mine, theirs = self.flat(), other.flat()
        for name in mine | theirs:
            if not name.startswith(ignore) and mine.get(name) != theirs.get(name):
                return name
        return None


def load_config(
    defaults: str, path: str | Path | None, overrides: list[str], nullable: dict[str, type | tuple]
) -> Config:
    """Defaults (YAML text), then the file, then the overrides; every value has its default's type.

    Args:
        overrides: "section.key=value" each.
        nullable: keys that may be null, and the type (or types) that they otherwise have.

    Raises:
        ConfigError: an unknown key (the nearest valid one is named), a wrong type, an unreadable file.
    """
    cfg = to_config(yaml.safe_load(defaults))
    given = {}
    if path is not None:
        given |= flatten(read_yaml(path), cfg)
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r}: expected section.key=value")
        try:
            given |= flatten_one(name, yaml.safe_load(value), cfg)
        except yaml.YAMLError:
            raise ConfigError(f"{name}: {value!r} is not a YAML value") from None
    for name, value in given.items():
        *sections, last = name.split(".")
        place = cfg
        for section in sections:
            place = place[section]
        place[last] = fit_type(name, value, place[last], nullable)
    return cfg


def to_config(content: dict) -> Config:
    return Config({name: to_config(v) if isinstance(v, dict) else v for name, v in content.items()})


def read_yaml(path: str | Path) -> dict:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"{path}: not a YAML file ({' '.join(str(error).split())[:160]})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected sections with keys, found a {type(content).__name__}")
    return content


def flatten(content: dict, schema: Config) -> dict:
    """Nested sections -> {"section.key": value}, each checked against the schema's names."""
    rows = {}
    for name, value in content.items():
        rows |= flatten_one(str(name), value, schema)
    return rows


def flatten_one(name: str, value, schema: Config) -> dict:
    valid = schema.flat()
    sections = {key.rsplit(".", 1)[0] for key in valid if "." in key}
    if name in sections:
        if not isinstance(value, dict):
            raise ConfigError(f"{name}: is a section and needs keys, not {value!r}")
        return flatten({f"{name}.{inner}": v for inner, v in value.items()}, schema)
    if name not in valid:
        near = difflib.get_close_matches(name, [*valid, *sections], n=1, cutoff=0.0)
        raise ConfigError(f"unknown key {name!r}; the nearest valid one is {near[0]!r}")
    return {name: value}


def fit_type(name: str, value, default, nullable: dict):
    """The value as the type that the default has; "1e-4", which YAML reads as text, counts as a float."""
    if name in nullable:
        if value is None:
            return None
        wanted = nullable[name] if isinstance(nullable[name], tuple) else (nullable[name],)
    else:
        wanted = (type(default),)
    if float in wanted and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    right_kind = isinstance(value, wanted) and (bool in wanted or not isinstance(value, bool))
    if not right_kind:
        kinds = " or ".join(kind.__name__ for kind in wanted)
        raise ConfigError(f"{name}: {value!r} is not a {kinds}")
    return value


def check(cfg: Config, name: str, holds: bool, wanted: str) -> None:
    """Raise a ConfigError that names the key and says what is wanted, unless the condition holds."""
    if not holds:
        raise ConfigError(f"{name}: {cfg.flat()[name]!r} is impossible; wanted {wanted}")


def check_choice(cfg: Config, name: str, choices: tuple[str, ...]) -> None:
    value = cfg.flat()[name]
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name}: {value!r} is not one of {', '.join(choices)}{hint}")


def check_positive(cfg: Config, *names: str) -> None:
    for name in names:
        check(cfg, name, 0 < cfg.flat()[name] < float("inf"), "a value above 0")


def check_not_negative(cfg: Config, *names: str) -> None:
    for name in names:
        check(cfg, name, 0 <= cfg.flat()[name] < float("inf"), "0 or a value above it")


def check_fraction(cfg: Config, *names: str) -> None:
    for name in names:
        check(cfg, name, 0 <= cfg.flat()[name] <= 1, "a value from 0 to 1")


def check_range(cfg: Config, *names: str) -> None:
    """Two finite numbers, the first below the second."""
    for name in names:
        value = cfg.flat()[name]
        numbers = isinstance(value, list) and all(type(v) in (int, float) for v in value)
        check(cfg, name, numbers and len(value) == 2 and value[0] < value[1], "[low, high], low < high")


@contextmanager
def config_errors():
    """What a library call finds wrong with its arguments is the configuration's fault."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(str(error)) from None


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
