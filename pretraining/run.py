"""What a pretraining run does around its steps: resume, read, log, measure, save, stop.

train_moco.py trains; everything here exists so that a run can be watched, killed, and resumed with the same
result.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data import BatchReader, DataError, Intensity, SliceDataset
from engine.config import Config
from engine.files import make_run_folder, refuse_other_run, written_whole
from engine.process import Process, Readback, only_warning
from engine.stopping import StopRequest, batch_loader, begin, check_shared_memory, leave
from moco import Method, whole_slices
from pretraining.guard import Guard, NotFinite, bad_steps_text
from pretraining.journal import Journal
from pretraining.judgement import heed_data
from pretraining.method_settings import check_norms
from pretraining.monitor import CollapseMonitor, draw, show
from pretraining.run_state import average_running_statistics, averaged_statistics, export, resume, save, tidy
from pretraining.schedule import Due, StepBatches, count_steps, learning_rate
from weights import WeightsError, initial_weights

SCRIPT = "train_moco.py"  # whose folders these are, see engine/ownership.py
FAILURES = (DataError, WeightsError, NotFinite)  # that end a run with one line


def check_folder(cfg: Config) -> None:
    """Raise a ConfigError if run.out is not a folder that this run may write into."""
    refuse_other_run(cfg, SCRIPT, initial_weights(cfg.model.init))


def open_run(
    cfg: Config,
    process: Process,
    reader: BatchReader,
    intensity: Intensity,
    model: Method,
    optimizer: torch.optim.Optimizer,
    stop: StopRequest,
) -> "Run":
    """Check the data, claim the run's folder, and resume from its checkpoint if there is one."""
    dataset = reader.dataset
    heed_data(cfg, process, dataset, intensity)
    steps_per_epoch, total_steps = count_steps(cfg, len(dataset), process)
    check_norms(cfg, model, process)
    guard = Guard(model, optimizer, cfg.run.max_bad_steps)
    folder = make_run_folder(cfg, process, SCRIPT, initial_weights(cfg.model.init))
    run = Run(
        cfg, process, reader, intensity, model, optimizer, stop, guard, folder, steps_per_epoch, total_steps
    )
    run.step, complete = resume(run)
    run.finished = run.step >= total_steps and complete
    if run.finished:
        process.say(f"{folder} holds this run, finished after {run.step} steps; nothing to do")
    else:
        run.begin()
    return run


@dataclass
class Run:
    """One pretraining run, opened by `open_run`.

    step      optimiser steps done
    finished  the folder holds all results already; then no method may be called
    guard     see pretraining/guard.py
    """

    cfg: Config
    process: Process
    reader: BatchReader
    intensity: Intensity
    model: Method
    optimizer: torch.optim.Optimizer
    stop: StopRequest
    guard: Guard
    folder: Path
    steps_per_epoch: int
    total_steps: int
    step: int = 0
    finished: bool = False

    @property
    def dataset(self) -> SliceDataset:
        return self.reader.dataset

    def begin(self) -> None:
        """Say what is to be done, and set up what watches it."""
        cfg, process = self.cfg, self.process
        batch_bytes = self.reader.batch_bytes(cfg.optim.batch_size // process.world)
        check_shared_memory(cfg.data.workers, batch_bytes, self.total_steps - self.step)
        begin(self.folder, cfg, process, SCRIPT)
        self.monitor = CollapseMonitor(cfg, self.dataset, self.intensity, process)
        process.say(
            f"{len(self.dataset)} slices of {self.dataset.size[0]} x {self.dataset.size[1]} px; "
            f"{self.total_steps} steps, {self.steps_per_epoch} an epoch; "
            f"{process.world} x {process.device.type}, {process.precision}; "
            f"collapse measured on {len(self.monitor.slices)} slices"
            + (f"; resuming from step {self.step}" if self.step else "")
        )
        self.journal = Journal(cfg, process, self.steps_per_epoch, self.total_steps, self.step)
        self.due = Due(cfg, self.steps_per_epoch, process)
        self.readback = Readback(process.device)

    def warm_up(self, network: nn.Module) -> None:
        """A pass over views of zeros, whose effects are undone.

        DistributedDataParallel rebuilds its gradient buckets after its first backward pass, and with more
        than two processes that changes how sums are rounded: without this, a resumed run would diverge from
        one that was never stopped.
        """
        model, process, cfg = self.model, self.process, self.cfg
        samples = cfg.optim.batch_size // process.world // cfg.optim.accumulate
        shape = (samples, cfg.model.in_channels, cfg.data.size, cfg.data.size)
        views = [torch.zeros(shape, device=process.device)] * 2
        boxes = [whole_slices(views[0])] * 2
        self.guard.remember()
        with process.autocast():
            loss = network(views, boxes, model.train().targets(views, boxes))["loss"]
        loss.backward()
        model.zero_grad()
        self.guard.restore_unless(torch.zeros((), dtype=torch.bool, device=process.device))

    def batches(self) -> Iterator[tuple[Tensor, int]]:
        """For each step that is left: this process's slices (n, C, H, W) as stored, on the device, and how
        many of them were unreadable and replaced. First measures the encoder, if that is due."""
        cfg, process = self.cfg, self.process
        size, batch = len(self.dataset), cfg.optim.batch_size
        self.order = StepBatches(size, batch, cfg.seed, process, self.step, self.total_steps)
        how = {"sampler": self.order, "batch_size": None}  # the reader takes whole batches
        loader = batch_loader(self.reader, cfg.data.workers, process, cfg.run.timeout_minutes, **how)
        if self.due.measuring(self.step) and not process.from_main(
            lambda: self.journal.knows_collapse(self.step)
        ):
            self.measure_collapse()
        self.model.train()
        for stored, unreadable in loader:
            yield stored.to(process.device, non_blocking=True), unreadable

    def set_schedule(self) -> None:
        """The step's learning rate, and the share of the run that is done, on which momenta depend."""
        rate = learning_rate(self.step, self.steps_per_epoch, self.total_steps, self.cfg.optim)
        for group in self.optimizer.param_groups:
            if not group["constant"]:
                group["lr"] = rate
        self.model.progress = self.step / self.total_steps

    def over_processes(self, terms: dict[str, Tensor], unreadable: int) -> dict[str, Tensor]:
        """Means of a step's terms over all processes, and sums of what else they have to tell each other:
        scalars on the device, and no host waits for them."""
        events = {"unreadable": unreadable, "stop": bool(self.stop), "save": self.due.by_time()}
        row = torch.zeros(len(terms) + len(events), device=self.process.device)
        row[: len(terms)] = torch.stack(list(terms.values())) / self.process.world
        for place, value in enumerate(events.values(), len(terms)):
            if value:
                row[place] = float(value)
        if self.process.world > 1:
            dist.all_reduce(row)
        return dict(zip((*terms, *events), row))

    def after_step(self, row: dict[str, Tensor]) -> bool:
        """Count a step; log, measure and save what is due. Whether the run has to stop: all is saved then.

        row: of `over_processes`. The host learns of a step when the device has done it: on a GPU, during the
        next one. Raises NotFinite after too many bad steps, with a checkpoint from before them.
        """
        self.step += 1
        last = self.step == self.total_steps
        measuring = last or self.due.measuring(self.step)
        row = row | self.guard.counts()
        arrived = self.readback.push(self.step, torch.stack(list(row.values())))
        arrived += self.readback.arrived() if measuring else []
        news = [self.journal.note(done, dict(zip(row, values))) for done, values in arrived]
        if any(found["bad_in_row"] >= self.cfg.run.max_bad_steps for found in news):
            self.give_up()
        stopping = any(found["stop"] for found in news) and not last
        if measuring and not stopping:
            self.measure_collapse()
        asked = any(found["save"] for found in news)
        kept = last and self.cfg.run.keep_checkpoint  # else `finish` would remove it at once
        if stopping or kept or self.due.by_step(self.step) or (asked and not last):
            with self.due.saving():
                save(self)
        return stopping

    def measure_collapse(self) -> None:
        """Measure, log, and keep the encoder if it is the best so far."""
        step = self.step
        with averaged_statistics(self.model, self.process):
            measured = {}
            # What cannot be measured at the start never will be: that ends the run before it costs anything.
            with only_warning(f"step {step}: collapse not measured") if step else nullcontext():
                measured = self.journal.scored(step, self.monitor.measure(self.model))
            for name in self.journal.names_to_keep(step, measured):
                with only_warning(f"step {step}: no {name}.pth written, training continues"):
                    export(self, name, measured)
        self.journal.collapse(step, measured)
        if (board := self.journal.log.board) and measured:
            with only_warning(f"step {step}: no pictures for TensorBoard"):
                show(board, step, measured, self.monitor.features_page(self.model))

    def give_up(self) -> None:
        """Save the state from before the bad steps, and raise NotFinite."""
        bad = self.journal.bad
        self.step = self.model.step = min(bad) - 1
        self.guard.forget_row()
        save(self)

        def slices_of(step: int) -> list[str]:
            return [self.dataset.names[i] for i in self.order.global_batch(step)]

        raise NotFinite(bad_steps_text(bad, slices_of, self.folder, self.process.is_main))

    def leave(self) -> int:
        """After a stop: say why, leave a marker; returns the exit code."""
        return leave(self.folder, self.step, self.process.gather(self.stop.reason), self.process)

    def finish(self) -> None:
        """Write the encoder; then the pictures, without which the run is as good. The checkpoints go."""
        average_running_statistics(self.model)
        if self.process.is_main:
            export(self, "encoder", self.journal.latest)
        with only_warning("the log was not closed"):
            self.journal.close()
        if self.process.is_main:
            with only_warning("no curves.png and spectrum.png"):
                draw(self.folder, self.process)
            with only_warning("no features.png"), written_whole(self.folder / "features.png") as file:
                self.monitor.features_page(self.model).save(file, format="PNG")
            with only_warning("not all that is not needed any more was removed"):
                tidy(self.folder, self.cfg.run.keep_checkpoint)
        self.process.say(f"encoder: {self.folder / 'encoder.pth'}")
        self.process.barrier()
