"""What a pretraining run keeps on disk: its checkpoint, to resume from, and the encoders it is for."""

import json
import os
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from ct.properties import read_json
from engine.config import ConfigError, shown, to_config
from engine.files import (
    ANEW,
    UNFIT,
    checked_number,
    checked_optimizer,
    is_plain,
    load_checkpoint,
    save_checkpoint,
    write_whole,
    written_whole,
)
from engine.ownership import LEFT_OVER, sha256
from engine.process import Process, warn
from losses import gather
from moco import Method
from pretraining.card import model_card
from pretraining.guard import running_statistics
from weights import fits, is_sound

# What the names of settings begin with that a resumed run may change: the method does not depend on them.
RUN_FREE = ("out", "device", "compile", "save", "keep", "max_bad", "skip", "timeout", "deterministic")
FREE = (*(f"run.{name}" for name in RUN_FREE), "data.workers", "data.insist", "log.")


def resume(run) -> tuple[int, bool]:
    """Load the checkpoint of a run.Run, if there is one: the steps done, and whether its results are there.

    The main process reads, and tells the others. Raises ConfigError if the folder holds a different run.
    """
    folder, process = run.folder, run.process

    def read() -> tuple[dict | None, bool]:
        state = load_checkpoint(folder, lambda content: checked(content, run))
        complete = all((folder / name).exists() for name in ("encoder.pth", "encoder.json"))
        if complete and state is None:  # a finished run, whose checkpoint `tidy` has removed
            card = read_json(folder / "encoder.json", dict)
            try:
                refuse_other_settings(card["config"], card["data"]["slices"], run)
            except ConfigError:
                raise
            except UNFIT:
                text = f"{folder / 'encoder.json'} does not describe a finished run of this program"
                raise ConfigError(f"run.out: {text}; {ANEW}") from None
        return state, complete

    state, complete = process.from_main(read)
    if state is None:
        return (run.total_steps, True) if complete else (0, False)
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    statistics = state["running_statistics"]
    if len(statistics) == process.world:  # else the model's, which are the mean, have to do
        set_running_statistics(run.model, statistics[process.rank])
    for count, value in zip((run.guard.in_row, run.guard.skipped), state["bad_steps"]):
        count.fill_(value)
    return state["step"], complete


def checked(state: dict, run) -> dict:
    """A checkpoint's content, every part of it, for `load_checkpoint`: whether `save` can have written it for
    this run."""
    refuse_other_settings(state["config"], state["slices"], run)
    step = checked_number(state["step"], 0, run.total_steps)
    in_row, skipped = state["bad_steps"]
    checked_number(in_row, 0, checked_number(skipped, 0, step))
    model, statistics = state["model"], state["running_statistics"]
    checked_number(model["_extra_state"]["step"], step, step)
    per_process = sum(average.numel() for average in running_statistics(run.model))
    sound = (
        fits(model, run.model.state_dict())
        and all(queue_is_sound(model, name) for name in run.model.queues)
        and is_sound(statistics)
        and (statistics.dim(), statistics.dtype) == (2, torch.float32)
        and statistics.shape[1] == per_process
    )
    if not sound:
        raise ValueError
    return state | {"optimizer": checked_optimizer(run.optimizer, state["optimizer"])}


def refuse_other_settings(settings: dict, slices: int, run) -> None:
    """Raise a ConfigError if these, and a list of so many slices, would make another run; any of UNFIT for
    what is no such thing."""
    folder, cfg, before = run.folder, run.cfg, to_config(settings)
    if not all(map(is_plain, before.flat().values())):
        raise ValueError
    if changed := cfg.first_difference(before, ignore=FREE):
        old, new = before.flat().get(changed), cfg.flat().get(changed)
        other = f"the run in {folder} was started with {shown(old)}"
        raise ConfigError(f"{changed}: is {new!r}, but {other}; choose another run.out")
    if checked_number(slices, 1, 2**62) != (here := len(run.dataset)):
        raise ConfigError(f"data.list: has {here} slices, but the run in {folder} was started with {slices}")


def queue_is_sound(model: dict, name: str) -> bool:
    """Whether keys are unit vectors, and the next one's column is there."""
    queue, pointer = model[name], model[f"{name}_pointer"]
    return bool(0 <= pointer < queue.shape[1] and (queue.norm(dim=0) < 1.01).all())


def save(run) -> None:
    """Write the checkpoint. For all processes; the main one writes; if it cannot, training continues."""
    with averaged_statistics(run.model, run.process) as statistics:
        if not run.process.is_main:
            return
        state = {
            "config": run.cfg.plain(),
            "model": run.model.state_dict(),  # both encoders, their heads, the queue and its pointer
            "optimizer": run.optimizer.state_dict(),
            "running_statistics": statistics,  # of each process
            "step": run.step,
            "bad_steps": [int(run.guard.in_row), int(run.guard.skipped)],
            "slices": len(run.dataset),
        }
        try:
            save_checkpoint(run.folder, state)
        except OSError as error:
            warn(f"step {run.step}: no checkpoint written ({error}); the last one stays, training continues")


def export(run, name: str, metrics: dict) -> None:
    """NAME.pth, a torchvision ResNet's weights without fc, with what they are in NAME.json and NAME.md."""
    cfg, dataset, path = run.cfg, run.dataset, run.folder / f"{name}.pth"
    weights = run.model.query.encoder.export_state_dict()
    if odd := [key for key, value in weights.items() if not value.isfinite().all()]:
        warn(f"{path}: {odd[0]} is not finite, so nothing can load it; a lower optim.lr may help")
    with written_whole(path) as file:
        torch.save(weights, file)
    card = {
        "arch": cfg.model.arch,
        "in_channels": cfg.model.in_channels,
        "normalisation": run.intensity.as_dict(),
        "data": {"slices": len(dataset), "cases": len(set(dataset.cases)), **asdict(dataset.facts())},
        "steps": run.step,
        "metrics": {key: value for key, value in metrics.items() if not isinstance(value, list)},
        "config": cfg.plain(),
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
        "sha256": sha256(path),
    }
    write_whole(path.with_suffix(".md"), model_card(name, card))
    write_whole(path.with_suffix(".json"), json.dumps(card, indent=2) + "\n")


def tidy(folder: Path, keep_checkpoint: bool) -> None:
    """Give back the room that nothing in a finished run needs: that of its checkpoints, and of
    encoder_best.pth if it is encoder.pth."""
    (folder / "checkpoint.pth.previous").unlink(missing_ok=True)  # first: it would be taken for the newest
    if not keep_checkpoint:
        (folder / "checkpoint.pth").unlink(missing_ok=True)
    encoder, best, link = (folder / name for name in ("encoder.pth", "encoder_best.pth", "best" + LEFT_OVER))
    if best.exists() and sha256(best) == sha256(encoder):
        with suppress(OSError):  # a file system without hard links
            os.link(encoder, link)
            os.replace(link, best)


@contextmanager
def averaged_statistics(model: Method, process: Process):
    """Within, all processes have the mean of their running statistics; afterwards each has its own again, so
    that looking at them changes nothing. Yields what each had, (world, n)."""
    before = average_running_statistics(model)
    yield before
    set_running_statistics(model, before[process.rank])


@torch.no_grad()
def average_running_statistics(model: Method) -> Tensor:
    """Give all processes the mean of their running statistics: what one process would have.

    Moving averages are linear in the batch statistics, so doing this before they are read (evaluation,
    checkpoint) equals doing it at every step. Call it on all processes. Returns what each process had,
    (world, n), for `set_running_statistics`.
    """
    own = torch.cat([average.flatten() for average in running_statistics(model)])
    before = gather(own[None])
    set_running_statistics(model, before.mean(dim=0))
    return before


@torch.no_grad()
def set_running_statistics(model: Method, values: Tensor) -> None:
    """From one vector (n,) that holds them all, in order."""
    averages = running_statistics(model)
    for average, value in zip(averages, values.split([a.numel() for a in averages]), strict=True):
        average.copy_(value.view_as(average))
