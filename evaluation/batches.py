"""Batches of labelled slices, or of their frozen features computed once; and how far those have collapsed."""

import math
import mmap
import os
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from collapse import SLICES, STRUCTURE, STRUCTURED, FeatureSample, dense_structure, some_positions
from engine.config import Config
from engine.ownership import LEFT_OVER
from engine.process import Process, only_warning, progress
from engine.stopping import batch_loader
from losses import effective_rank_of, seeded
from weights import WeightsError

MASKS_KEPT = 2**30  # bytes of masks that `Batches.truth` keeps at most


class Batches:
    """Batches of the chosen slices of a data set, as the trained part of the model takes them.

    Args:
        dataset: a SegmentationDataset, or what has its items, `image` and `reading_once`.
        positions: the slices that take part; slice i below is dataset[positions[i]].
        prepare: turns images (n, 1, H, W), stored values on the device, into that: windowed or normalised
            images, or frozen features.
    """

    def __init__(self, dataset, positions: list[int], prepare, cfg: Config, process: Process):
        self.dataset, self.positions, self.prepare, self.process = dataset, positions, prepare, process
        self.workers, self.batch_size = cfg.data.workers, cfg.optim.batch_size
        self.timeout_minutes = cfg.run.timeout_minutes
        self.inputs = self.masks = None  # of all slices, where `keep` holds them
        self.truths, self.room = {}, MASKS_KEPT

    def __len__(self) -> int:
        return len(self.positions)

    def of(self, plan: list[list[int]]):
        """For each list of slices in the plan: inputs, and masks (n, H, W) on the device."""
        if self.masks is not None:
            for rows in plan:
                yield self.on_device(self.inputs[rows]), self.on_device(self.masks[rows])
            return
        for images, masks in self.loader(self.dataset, plan):
            yield self.prepare(self.on_device(images)), self.on_device(masks)

    def inputs_of(self, plan: list[list[int]]):
        """The inputs alone; masks are not read for them."""
        if self.inputs is not None:
            for rows in plan:
                yield self.on_device(self.inputs[rows])
            return
        for images in self.loader(Images(self.dataset), plan):
            yield self.prepare(self.on_device(images))

    def loader(self, dataset, plan: list[list[int]]) -> DataLoader:
        slices = [[self.positions[i] for i in rows] for rows in plan]
        workers = min(self.workers, len(plan))
        return batch_loader(dataset, workers, self.process, self.timeout_minutes, batch_sampler=slices)

    def on_device(self, some: Tensor) -> Tensor:
        return some.to(self.process.device, non_blocking=True)

    def in_order(self) -> list[list[int]]:
        """The plan of all slices, one after the other."""
        return chunks(list(range(len(self))), self.batch_size)

    def truth(self, i: int, keep: bool) -> np.ndarray:
        """The mask of a slice on its own grid, uint8 (h, w). With `keep` it is read from disk only once, as
        long as there is room.

        Raises DataError if it cannot be used, or is of another size than the slice.
        """
        if i in self.truths:
            return self.truths[i]
        position = self.positions[i]
        mask = self.dataset.own_mask(position)
        self.dataset.check_mask(position, mask, self.dataset.header(position)[0])
        if keep and mask.nbytes <= self.room:
            self.truths[i] = mask
            self.room -= mask.nbytes
        return mask

    def bytes(self) -> int:
        """The memory that the inputs of all slices would take, in bytes."""
        return len(self) * next(self.inputs_of([[0]])).nbytes

    def keep(self, desc: str, folder: Path | None = None, masks: bool = True) -> None:
        """Compute the inputs of all slices once and hold them, and what is trained on also with its masks: in
        memory, or in files in `folder`, which the processes of a node fill together and share.

        Raises OSError, on all processes, if there is no room for them; nothing is kept then.
        """
        here, processes = within_node(self.process)
        plan = self.in_order()[here::processes]
        found = self.of(plan) if masks else ((some,) for some in self.inputs_of(plan))
        found = zip(plan, progress(self.process, desc, found, len(plan)))
        with ExitStack() as stack:
            stores = [
                Rows(len(self)) if folder is None else stack.enter_context(RowFile(folder, self.process))
                for _ in range(1 + masks)
            ]
            for rows, (some, *mask) in found:
                stores[0].write(rows[0], some)
                for one in mask:
                    stores[1].write(rows[0], one.to(torch.uint8))
            kept = [store.all() for store in stores]
        self.inputs, self.masks = kept if masks else (*kept, None)


class Images(Dataset):
    """The slices of a data set without their masks."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        read = self.dataset.reading_once()
        return [self.dataset.image(index, read) for index in indices]


class Rows:
    """So many rows of one shape in memory, on the device that they come from."""

    def __init__(self, count: int):
        self.count, self.rows = count, None

    def write(self, first: int, rows: Tensor) -> None:
        """Rows number `first` and following."""
        if self.rows is None:
            self.rows = rows.new_empty(self.count, *rows.shape[1:])
        self.rows[first : first + len(rows)] = rows

    def all(self) -> Tensor:
        return self.rows


class RowFile:
    """The same in a file, which the processes of a node write together and then read.

    It has no name while it is used, so it ends with the processes, however they end. What goes wrong on one
    of them is an OSError of `all` on each.
    """

    def __init__(self, folder: Path, process: Process):
        self.process, self.file, self.like, self.error = process, None, None, None
        path, here = None, within_node(process)[0]
        with self.noting():
            if here == 0:
                handle, path = tempfile.mkstemp(LEFT_OVER, "features-", folder)
                os.close(handle)
        path = process.gather(path)[process.rank - here]
        with self.noting():
            self.file = open(path, "r+b", buffering=0) if path else None  # noqa: SIM115 (closed in __exit__)
        process.barrier()
        if here == 0 and path:
            os.unlink(path)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        if self.file:
            self.file.close()

    @contextmanager
    def noting(self):
        """Within, an OSError waits for `all`, in which all processes learn of it."""
        try:
            yield
        except OSError as error:
            self.error = self.error or error

    def write(self, first: int, rows: Tensor) -> None:
        self.like = rows.dtype, rows.shape[1:]
        with self.noting():
            if self.file and not self.error:
                self.file.seek(first * rows[:1].nbytes)
                write_all(self.file, rows)

    def all(self) -> Tensor:
        found = self.process.gather((self.like, self.error))
        if failed := [error for _, error in found if error]:
            raise failed[0]
        dtype, shape = next(like for like, _ in found if like)  # there may be fewer batches than processes
        # Shared: not counted as memory of this process.
        return torch.frombuffer(mmap.mmap(self.file.fileno(), 0), dtype=dtype).view(-1, *shape)


def write_all(file, rows: Tensor) -> None:
    rest = memoryview(rows.cpu().contiguous().flatten().view(torch.uint8).numpy())
    while rest:
        rest = rest[file.write(rest) :]


def within_node(process: Process) -> tuple[int, int]:
    """The number of this process among those on the same machine, which torchrun counts, and how many."""
    if process.world == 1:
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def chunks(rows: list, size: int) -> list[list]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@torch.no_grad()
def frozen_collapse(batches: Batches) -> dict[str, dict]:
    """How far the frozen encoder's features have collapsed, from batches of (n, D, h, w).

    effective_rank: pooled: of the slices' mean vectors; dense: of single positions. structure: of some
    slices, see collapse.dense_structure. What cannot be measured is a warning, and None.

    Raises:
        WeightsError: features that are not finite, of which nothing can be learnt.
    """
    count = min(len(batches), SLICES)
    ranks = {"pooled": None, "dense": None, "slices": count}
    measured = {"effective_rank": ranks, "structure": dict.fromkeys(STRUCTURE)}
    with only_warning("collapse not measured"):
        rows = [len(batches) * i // count for i in range(count)]
        structured = set(rows[:: -(-count // STRUCTURED)])
        sample, structure = FeatureSample(count, seeded("positions"), 2 * SLICES), []
        plan = chunks(rows, batches.batch_size)
        found = progress(batches.process, "effective rank", batches.inputs_of(plan), len(plan))
        for some, features in zip(plan, found):
            sample.add(features)
            mine = [i for i, row in enumerate(some) if row in structured]
            structure.append(some_positions(features[mine], seeded("readout")).cpu())
        ranks["pooled"], ranks["dense"] = map(effective_rank_of, sample.spectra())
        measured["structure"] = dense_structure(torch.cat(structure))
    if ranks["pooled"] is not None and not math.isfinite(ranks["pooled"]):
        raise WeightsError("encoder: its features are not finite numbers; are its weights sound?")
    return measured
