"""evaluation/batches.py: features that processes share; what is measured of any number of slices."""

import errno
import math
import os
import threading
from dataclasses import dataclass

import pytest
import torch

import eval_seg
from collapse import SLICES, FeatureSample, some_positions
from engine.process import Process
from evaluation import batches
from evaluation.batches import Batches, frozen_collapse
from losses import seeded

ALONE = Process(0, 1, torch.device("cpu"), "fp32")


class Slices(torch.utils.data.Dataset):
    """Noise, and masks of background."""

    def __init__(self, count):
        self.maps = torch.randn(count, 4, 2, 2, generator=torch.Generator().manual_seed(0))

        self.read = []

    def __getitem__(self, index):
        return self.image(index), torch.full((2, 2), index % 7)

    def reading_once(self):
        return None

    def image(self, index, read=None):
        self.read.append(index)
        return self.maps[index]


def batches_of(count, size, process=ALONE):
    settings = ["data.workers=0", f"optim.batch_size={size}"]
    cfg = eval_seg.load_config(eval_seg.DEFAULTS, None, settings, eval_seg.NULLABLE)
    return Batches(Slices(count), [*range(count)], lambda images: images, cfg, process)


@pytest.mark.parametrize("count", [1, 2, 127, 128, 129, 1024, 1025, 2048, 2049, 13_726])
def test_collapse_is_measured_on_any_number_of_slices_in_batches_of_any_size(count, monkeypatch, capsys):
    taken = []

    def structure_of(features):
        taken.append(features)
        return {"dse": 0.0}

    monkeypatch.setattr(batches, "dense_structure", structure_of)
    found = [frozen_collapse(batches_of(count, size)) for size in (1, 8, 16)]
    assert found[0] == found[1] == found[2]
    ranks = found[0]["effective_rank"]
    assert ranks["slices"] == min(count, SLICES) and 0 <= ranks["pooled"] <= 4 and 0 < ranks["dense"] <= 4
    assert min(count, 64) <= len(taken[0]) <= 128 and taken[0].shape[1:] == (4, 4)
    assert torch.equal(taken[0], taken[1]) and torch.equal(taken[0], taken[2])
    places = torch.randperm(4, generator=seeded("readout"))
    assert torch.equal(taken[0][0], Slices(count).maps[0].flatten(1).mT[places])
    assert not capsys.readouterr().err


def test_structure_of_one_slice_and_of_two():
    for count in (1, 2):
        terms = frozen_collapse(batches_of(count, 8))["structure"]
        assert all(map(math.isfinite, terms.values()))


def test_no_map_has_no_positions():
    none = torch.zeros(0, 4, 3, 3)
    assert some_positions(none, seeded("readout")).shape == (0, 9, 4)
    sample = FeatureSample(2, seeded("positions"), vectors=2)
    for maps in (torch.ones(1, 4, 3, 3), none, torch.zeros(1, 4, 3, 3)):
        sample.add(maps)
    assert sample.spectra()[1][0] == pytest.approx(math.sqrt(2))


def test_what_cannot_be_measured_is_a_warning(monkeypatch, capsys):
    def fails(features):
        raise ValueError("did not converge")

    monkeypatch.setattr(batches, "dense_structure", fails)
    found = frozen_collapse(batches_of(9, 4))
    assert "warning: collapse not measured (ValueError: did not converge)" in capsys.readouterr().err
    assert found["effective_rank"]["slices"] == 9 and set(found["structure"].values()) == {None}


# ---- Under several processes ---------------------------------------------------------------------


@dataclass
class Thread(Process):
    """A thread that takes part as a process would."""

    said: list = None
    meeting: threading.Barrier = None

    def gather(self, value):
        self.said[self.rank] = value
        self.meeting.wait()
        found = [*self.said]
        self.meeting.wait()
        return found

    def barrier(self):
        self.meeting.wait()


def in_threads(world, monkeypatch, work):
    """work(thread) of each, or the error that it ended with."""
    said, meeting, found = [None] * world, threading.Barrier(world), [None] * world
    monkeypatch.setattr(batches, "within_node", lambda thread: (thread.rank, thread.world))

    def run(rank):
        try:
            found[rank] = work(Thread(rank, world, torch.device("cpu"), "fp32", said, meeting))
        except OSError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


@pytest.mark.parametrize("count, world", [(21, 2), (21, 3), (3, 2)])
def test_processes_compute_a_share_each_and_hold_all_in_one_file(tmp_path, monkeypatch, count, world):
    def work(process):
        own = batches_of(count, 4, process)
        own.keep("features", tmp_path)
        return own

    alone = batches_of(count, 4)
    alone.keep("features")
    found = in_threads(world, monkeypatch, work)
    assert sorted(index for one in found for index in one.dataset.read) == [*range(count)]
    assert not list(tmp_path.iterdir())
    for one in found:
        assert torch.equal(one.inputs, alone.inputs) and torch.equal(one.masks, alone.masks)


@pytest.mark.parametrize("fails", ["write_all", "mkstemp"])
def test_a_full_disk_is_known_to_all_processes(tmp_path, monkeypatch, fails):
    def full(*given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def work(process):
        own = batches_of(21, 4, process)
        try:
            own.keep("features", tmp_path)
        finally:
            assert own.inputs is None and own.masks is None

    monkeypatch.setattr(batches if fails == "write_all" else batches.tempfile, fails, full)
    assert [error.errno for error in in_threads(2, monkeypatch, work)] == [errno.ENOSPC] * 2
    assert not list(tmp_path.iterdir())
