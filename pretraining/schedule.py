"""How many steps there are, and what belongs to each: the slices, the learning rate, saving, measuring."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.config import Config, ConfigError
from engine.process import Process
from losses import seeded


def count_steps(cfg: Config, size: int, process: Process) -> tuple[int, int]:
    """Steps an epoch and in all, for a training set of `size` slices; checks what depends on both."""
    batch, shares = cfg.optim.batch_size, process.world * cfg.optim.accumulate
    if size < batch:
        raise ConfigError(f"optim.batch_size: {batch}, but {cfg.data.list} lists only {size} slices")
    if batch % shares:
        raise ConfigError(
            f"optim.batch_size: {batch} does not divide by {process.world} processes x "
            f"{cfg.optim.accumulate} accumulation steps"
        )
    check_statistics(cfg, process, batch // shares)
    if cfg.model.queue_size and cfg.model.queue_size > size:
        process.say(
            f"note: model.queue_size {cfg.model.queue_size} is above the {size} slices: a slice's own older "
            "keys are among its negatives; half the slices or less is better"
        )
    steps_per_epoch = size // batch
    return steps_per_epoch, cfg.optim.max_steps or cfg.optim.epochs * steps_per_epoch


def check_statistics(cfg: Config, process: Process, share: int) -> None:
    """Of a batch whose forward passes have `share` samples each: BatchNorm's statistics have to be those of
    the undivided batch, else a ConfigError says so; whitening's may be others, which is said."""
    batch, split, plan = cfg.optim.batch_size, cfg.model.bn_split, cfg.decorrelation
    if split and share % split and share > split:
        raise ConfigError(f"model.bn_split: {split} does not divide the {share} samples of a forward pass")
    if cfg.optim.accumulate > 1 and (split == 0 or share < split):
        wanted = f"model.bn_split={split}" if split else "the global batch, model.bn_split=0"
        raise ConfigError(
            f"optim.accumulate: {cfg.optim.accumulate} would leave BatchNorm {share} samples at a time in "
            f"place of {wanted}; model.bn_split={share}, or what divides it, is possible"
        )
    if split and share < split and process.world > 1:
        process.say(f"note: BatchNorm sees {share} samples at a time, fewer than model.bn_split = {split}")
    together = share * process.world if plan.sync else share
    if plan.method != "none" and together < batch:
        process.say(
            f"note: whitening takes its statistics from {together} samples at a time, not from the {batch} "
            "of the global batch (optim.accumulate, decorrelation.sync)"
        )


class StepBatches:
    """The indices that this process reads in each step: a share of a batch out of the epoch's permutation.

    The order of an epoch depends on (seed, epoch) only. What is left of an epoch after its last whole batch
    is not read in that epoch.
    """

    def __init__(self, size: int, batch: int, seed: int, process: Process, first: int, last: int):
        self.size, self.batch, self.seed, self.first, self.last = size, batch, seed, first, last
        share = batch // process.world
        self.mine = slice(process.rank * share, (process.rank + 1) * share)
        self.epoch = self.order = None  # of the step asked for last

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            yield self.global_batch(step)[self.mine]

    def global_batch(self, step: int) -> list[int]:
        """The global batch of a step."""
        epoch, place = divmod(step, self.size // self.batch)
        if epoch != self.epoch:
            self.order = torch.randperm(self.size, generator=seeded("epoch", self.seed, epoch))
            self.epoch = epoch
        return self.order[place * self.batch : (place + 1) * self.batch].tolist()


def learning_rate(step: int, steps_per_epoch: int, total_steps: int, optim: Config) -> float:
    """Linear warm-up over the first epochs, then half a cosine down to 0 at the last step."""
    warmup = min(round(optim.warmup_epochs * steps_per_epoch), total_steps - 1)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    return optim.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))


SHARE = 0.01  # of the time may go into saving, if run.save_steps does not say when
SHORTEST = 120.0  # seconds from one checkpoint to the next then


class Due:
    """When to save and to measure: after so many steps; and, as the main process's clock says, by time."""

    def __init__(self, cfg: Config, steps_per_epoch: int, process: Process):
        self.every = cfg.run.save_steps
        self.measured = round(cfg.log.rank_every * steps_per_epoch)
        self.has_clock = process.is_main
        self.longest = 60 * cfg.run.save_minutes or math.inf
        self.pause = math.inf if self.every else SHORTEST  # seconds
        self.saved = time.monotonic()

    def by_step(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def by_time(self) -> bool:
        due = self.has_clock and time.monotonic() - self.saved > min(self.pause, self.longest)
        if due:
            self.saved = time.monotonic()  # not once more before it is done
        return due

    @contextmanager
    def saving(self):
        """Around a save: the time that it takes says how long to wait for the next one."""
        begun = time.monotonic()
        yield
        self.saved = time.monotonic()
        if not self.every:
            self.pause = max((self.saved - begun) / SHARE, SHORTEST)

    def measuring(self, step: int) -> bool:
        return step == 0 or (self.measured > 0 and step % self.measured == 0)
