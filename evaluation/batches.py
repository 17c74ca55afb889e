"""Batches of labelled slices, or of their frozen features computed once; and how far those have collapsed."""

import math
import mmap
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from collapse import SLICES, STRUCTURE, STRUCTURED, FeatureSample, dense_structure, some_positions
from engine.config import Config
from engine.process import Process, only_warning, progress
from engine.stopping import ignore_stop_signals
from losses import effective_rank_of
from models import seeded
from weights import WeightsError


class Batches:
    """Batches of the chosen slices of a data set, as the trained part of the model takes them.

    Args:
        positions: the slices that take part; slice i below is dataset[positions[i]].
        prepare: turns images (n, 1, H, W), stored values on the device, into that: windowed or normalised
            images, or frozen features.
    """

    def __init__(self, dataset, positions: list[int], prepare, cfg: Config, process: Process):
        self.dataset, self.positions, self.prepare, self.process = dataset, positions, prepare, process
        self.workers, self.batch_size = cfg.data.workers, cfg.optim.batch_size
        self.inputs = self.masks = None

    def __len__(self) -> int:
        return len(self.positions)

    def of(self, plan: list[list[int]]):
        """For each list of slices in the plan: inputs, and masks (n, H, W) on the device."""
        if self.inputs is not None:
            for rows in plan:
                kept = self.inputs[rows], self.masks[rows]
                yield tuple(some.to(self.process.device, non_blocking=True) for some in kept)
            return
        loader = DataLoader(
            self.dataset,
            batch_sampler=[[self.positions[i] for i in rows] for rows in plan],
            num_workers=min(self.workers, len(plan)),
            pin_memory=self.process.device.type == "cuda",
            worker_init_fn=ignore_stop_signals,
        )
        for images, masks in loader:
            device = self.process.device
            yield self.prepare(images.to(device, non_blocking=True)), masks.to(device, non_blocking=True)

    def in_order(self) -> list[list[int]]:
        """The plan of all slices, one after the other."""
        return chunks(list(range(len(self))), self.batch_size)

    def bytes(self) -> int:
        """The memory that `keep` would take, in bytes."""
        one, mask = next(self.of([[0]]))
        return len(self) * (one.nbytes + mask.numel())

    def keep(self, desc: str, folder: Path | None = None) -> None:
        """Compute the inputs of all slices once and hold them in memory, or in files in `folder`.

        The files have no name and end with the process, however that ends. Raises OSError if there is no
        room for them; nothing is kept then.
        """
        plan = self.in_order()
        batches = progress(self.process, desc, self.of(plan), len(plan))
        if folder is not None:
            with TemporaryFile(dir=folder) as inputs, TemporaryFile(dir=folder) as masks:
                for some, mask in batches:
                    append(inputs, some)
                    append(masks, mask.to(torch.uint8))
                self.inputs = mapped(inputs, some)
                self.masks = mapped(masks, mask.to(torch.uint8))
            return
        inputs = masks = None
        for rows, (some, mask) in zip(plan, batches):
            if inputs is None:
                inputs = some.new_empty(len(self), *some.shape[1:])
                masks = mask.new_empty(len(self), *mask.shape[1:], dtype=torch.uint8)
            inputs[rows], masks[rows] = some, mask.to(torch.uint8)
        self.inputs, self.masks = inputs, masks


def append(file, rows: Tensor) -> None:
    file.write(rows.cpu().contiguous().flatten().view(torch.uint8).numpy())


def mapped(file, like: Tensor) -> Tensor:
    """All rows in a file as a tensor of rows `like` those given, read when they are used."""
    file.flush()
    shared = mmap.mmap(file.fileno(), 0)  # shared: not counted as memory of this process
    return torch.frombuffer(shared, dtype=like.dtype).view(-1, *like.shape[1:])


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
        found = progress(batches.process, "effective rank", batches.of(plan), len(plan))
        for some, (features, _) in zip(plan, found):
            sample.add(features)
            mine = [i for i, row in enumerate(some) if row in structured]
            structure.append(some_positions(features[mine], seeded("readout")).cpu())
        ranks["pooled"], ranks["dense"] = map(effective_rank_of, sample.spectra())
        measured["structure"] = dense_structure(torch.cat(structure))
    if ranks["pooled"] is not None and not math.isfinite(ranks["pooled"]):
        raise WeightsError("encoder: its features are not finite numbers; are its weights sound?")
    return measured
