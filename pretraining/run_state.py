"""What a pretraining run keeps on disk: its checkpoint, to resume from, and the encoders it is for."""

import hashlib
import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from data import Intensity, SliceDataset
from engine.config import Config, ConfigError, to_config
from engine.files import load_checkpoint, load_optimizer, save_checkpoint, write_whole, written_whole
from engine.process import Process, warn
from models import MoCo, gather
from pretraining.guard import Guard, running_statistics

# Keys that may change between the parts of an interrupted run: they do not touch what is computed.
RUN_FREE = ("out", "device", "compile", "save", "max_bad", "skip", "timeout", "deterministic")
FREE = (*(f"run.{name}" for name in RUN_FREE), "data.workers", "log.")


@dataclass
class RunState:
    """All that takes part in a run and must be the same after a stop, with the folder that keeps it."""

    folder: Path
    cfg: Config
    process: Process
    dataset: SliceDataset
    intensity: Intensity
    model: MoCo
    optimizer: torch.optim.SGD
    guard: Guard

    def resume(self) -> tuple[int, bool]:
        """Load the folder's checkpoint, if there is one: the steps done, and whether results are there.

        The main process reads, and tells the others. Raises ConfigError if the run was another one.
        """
        folder, cfg, process = self.folder, self.cfg, self.process
        state, complete = process.from_main(
            lambda: (load_checkpoint(folder), (folder / "encoder.json").exists())
        )
        if state is None:
            return 0, False
        try:
            before = to_config(state["config"])
            changed = cfg.first_difference(before, ignore=FREE)
            if changed is None:
                self.model.load_state_dict(state["model"])
                load_optimizer(self.optimizer, state["optimizer"])
                statistics = state["running_statistics"]
                if len(statistics) == process.world:  # else the model's, which are the mean, have to do
                    set_running_statistics(self.model, statistics[process.rank])
                counts = (self.guard.in_row, self.guard.skipped)
                for count, value in zip(counts, state["bad_steps"], strict=True):
                    count.fill_(value)
                step, slices = state["step"], state["slices"]
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            raise ConfigError(f"run.out: the checkpoint in {folder} is not one of this program") from None
        if changed:
            old, new = before.flat().get(changed), cfg.flat().get(changed)
            other = f"the run in {folder} was started with {old!r}"
            raise ConfigError(f"{changed}: is {new!r}, but {other}; choose another run.out")
        if slices != (here := len(self.dataset)):
            raise ConfigError(
                f"data.list: has {here} slices, but the run in {folder} was started with {slices}"
            )
        return step, complete

    def save(self, step: int) -> None:
        """Write the checkpoint. For all processes; the main one writes; if it cannot, training goes on."""
        with averaged_statistics(self.model, self.process) as statistics:
            if not self.process.is_main:
                return
            state = {
                "config": self.cfg.plain(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "running_statistics": statistics,
                "step": step,
                "bad_steps": [int(self.guard.in_row), int(self.guard.skipped)],
                "slices": len(self.dataset),
            }
            try:
                save_checkpoint(self.folder, state)
            except OSError as error:
                warn(f"step {step}: no checkpoint written ({error}); the last one stays, training goes on")

    def export(self, name: str, step: int, metrics: dict) -> None:
        """NAME.pth, a torchvision ResNet's weights without fc, and NAME.json, which says what they are."""
        cfg, dataset, path = self.cfg, self.dataset, self.folder / f"{name}.pth"
        with written_whole(path) as file:
            torch.save(self.model.query.encoder.export_state_dict(), file)
        card = {
            "arch": cfg.model.arch,
            "in_channels": cfg.model.in_channels,
            "normalisation": self.intensity.as_dict(),
            "data": {"slices": len(dataset), "cases": len(set(dataset.cases)), "size": list(dataset.size)},
            "steps": step,
            "metrics": {key: value for key, value in metrics.items() if not isinstance(value, list)},
            "config": cfg.plain(),
            "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        write_whole(path.with_suffix(".json"), json.dumps(card, indent=2) + "\n")


@contextmanager
def averaged_statistics(model: MoCo, process: Process):
    """Within, all processes have the mean of their running statistics; afterwards each its own again, so that
    looking at them changes nothing. Gives what each had, (world, n)."""
    everyone = average_running_statistics(model)
    yield everyone
    set_running_statistics(model, everyone[process.rank])


@torch.no_grad()
def average_running_statistics(model: MoCo) -> Tensor:
    """Give all processes the mean of their running statistics: what one process would have.

    Moving averages are linear in the batch statistics, so doing this before they are read (evaluation,
    checkpoint) equals doing it at every step. Call it on all processes. Returns what each process had,
    (world, n), for `set_running_statistics`.
    """
    own = torch.cat([average.flatten() for average in running_statistics(model)])
    everyone = gather(own[None])
    set_running_statistics(model, everyone.mean(dim=0))
    return everyone


@torch.no_grad()
def set_running_statistics(model: MoCo, values: Tensor) -> None:
    """From one vector (n,) that holds them all, in order."""
    averages = running_statistics(model)
    for average, value in zip(averages, values.split([a.numel() for a in averages]), strict=True):
        average.copy_(value.view_as(average))
