"""A million slices: what start-up touches, what a reading process holds. Batches for any length and ranks."""

import builtins
import gc
import json
import os
import pickle
import random
import signal
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from ct import properties
from ct.layout import Strings
from ct.slices import DataError, write_png
from data import BatchReader, SliceDataset

ROLLUP = Path("/proc/self/smaps_rollup")
needs_proc = pytest.mark.skipif(not ROLLUP.exists(), reason="needs Linux, which tells a process's own memory")


def linked_set(root, folders, slices):
    """images/FOLDER/0000.png ... in each of the folders, hard links to a few files; and train.txt."""
    (root / "images").mkdir(parents=True)
    names = []
    for folder in folders:
        path = root / "images" / folder
        path.mkdir(parents=True)
        for index in range(slices):
            if len(names) % 50_000 == 0:  # a file system allows some 65,000 links to one file
                source = root / f"{len(names)}.png"
                write_png(source, np.random.default_rng(0).integers(0, 3000, (8, 8)).astype(np.uint16))
            os.link(source, path / f"{index:04d}.png")
            names.append(f"{folder}/{index:04d}.png")
    (root / "train.txt").write_text("\n".join(names) + "\n")
    return names


def packed_set(path, count, shape=(8, 8)):
    """A packed set of tiny slices, slice i full of i % 1000."""
    array = np.lib.format.open_memmap(path.with_name(path.name + ".npy"), "w+", np.int16, (count, *shape))
    array[:] = (np.arange(count) % 1000)[:, None, None]
    array.flush()
    names = [f"case{index // 500:04d}/{index % 500:03d}.png" for index in range(count)]
    about = {"names": names, "cases": [name[:8] for name in names], "stored": "hu"}
    path.with_name(path.name + ".json").write_text(json.dumps(about))
    return path


def loader_of(reader, batches, workers=1):
    context = "fork" if workers else None
    return DataLoader(
        reader, sampler=batches, batch_size=None, num_workers=workers, multiprocessing_context=context
    )


# ---- Memory and start-up -------------------------------------------------------------------------


def test_strings_are_a_sequence():
    rng = random.Random(0)
    texts = ["", "a", "ä/€ 𝄞.png", "\udcff", "x\ny"] + [chr(rng.randrange(32, 50_000)) * 3 for _ in range(99)]
    strings = Strings(iter(texts))
    for same in (strings, pickle.loads(pickle.dumps(strings))):
        assert len(same) == len(texts) and [*same] == texts and same == texts and same == strings
        assert [same[index] for index in range(-len(texts), len(texts))] == texts * 2
        assert same[3:9:2] == texts[3:9:2] and same[np.int64(2)] == texts[2] and "a" in same
        assert same != texts[1:] and same != texts[::-1]
        with pytest.raises(IndexError):
            same[len(texts)]
    assert not Strings([]) and Strings([]) == []


def calls_of_start_up(root, monkeypatch):
    """How often opening a data set asks the file system: {function: calls}."""
    calls = {}

    def count(owner, name):
        function = getattr(owner, name)

        def counted(*args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    with monkeypatch.context() as monkeypatch:
        for name in ("stat", "lstat", "access", "scandir", "listdir", "open"):
            count(os, name)
        count(builtins, "open")
        SliceDataset(root)
    return calls


def test_start_up_lists_folders_and_asks_for_no_file(tmp_path, monkeypatch):
    folders = [f"case{index:02d}" for index in range(40)]
    linked_set(tmp_path / "small", folders, slices=1)
    names = linked_set(tmp_path / "large", folders, slices=500)
    random.Random(0).shuffle(names)
    (tmp_path / "large/train.txt").write_text("\n".join(names))
    calls = calls_of_start_up(tmp_path / "large", monkeypatch)
    assert calls == calls_of_start_up(tmp_path / "small", monkeypatch)
    assert calls["listdir"] == 40 and sum(calls.values()) < 120
    assert SliceDataset(tmp_path / "large").names == names


def own_memory(pid):
    """MB that belong to this process alone: what it did not share or has written to."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def growth_of_worker(dataset, batches):
    """MB by which a worker process grows from its first batch to the last."""
    reader = BatchReader(dataset, workers=1)
    gc.freeze()  # a full collection, in either process, would copy what both have of torch and pytest
    try:
        arriving = iter(loader_of(reader, batches))
        next(arriving)
        worker = int(reader.reading[0, 0])
        before = own_memory(worker)
        for _ in islice(arriving, len(batches) - 2):
            pass
        return own_memory(worker) - before
    finally:
        gc.unfreeze()


def spread(dataset, reads):
    """20 batches of slices, in all `reads` of them, evenly spread over the list."""
    order = np.arange(reads) * max(1, len(dataset) // reads) % len(dataset)
    return [rows.tolist() for rows in np.split(order, 20)]


@needs_proc
def test_worker_does_not_grow_with_the_list(tmp_path):
    """20,000 names of 1,000 characters: of a list of str a worker would copy half the pages, 10 MB."""
    long = "/".join(letter * 245 for letter in "abcd")
    linked_set(tmp_path / "small", [long], slices=20)
    linked_set(tmp_path / "large", [long], slices=20_000)
    small, large = (SliceDataset(tmp_path / size) for size in ("small", "large"))
    usual = growth_of_worker(small, spread(small, 2500))
    assert growth_of_worker(large, spread(large, 2500)) < usual + 4
    large.files = [*large.files]  # does the measurement see what it is meant to see?
    assert growth_of_worker(large, spread(large, 2500)) > usual + 7


@needs_proc
def test_worker_does_not_grow_with_the_steps(tmp_path):
    """100 batches of 2.4 MB; made in the worker's own memory first they would leave 150 MB of holes there."""
    dataset = SliceDataset(packed_set(tmp_path / "packed", 200, shape=(112, 112)))
    assert growth_of_worker(dataset, [[*range(48)]] * 100) < 40


@pytest.fixture
def scratch():
    """A folder that does not stay, as pytest's own does for some runs."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.long
@needs_proc
def test_a_million_slices(scratch, monkeypatch):
    folders = [f"case{index:04d}" for index in range(2000)]
    names = linked_set(scratch / "large", folders, slices=500)
    linked_set(scratch / "small", folders[:2], slices=500)
    packed_set(scratch / "packed", 1_000_000)
    assert calls_of_start_up(scratch / "large", monkeypatch)["listdir"] == 2000
    small, large = SliceDataset(scratch / "small"), SliceDataset(scratch / "large")
    packed = SliceDataset(scratch / "packed")
    assert len(large) == len(packed) == 1_000_000
    assert large.names[-1] == names[-1] and len(set(large.cases)) == 2000
    usual = growth_of_worker(small, spread(small, 20_000))
    assert growth_of_worker(large, spread(large, 20_000)) < usual + 10  # a list of str: about 80 MB
    assert growth_of_worker(packed, spread(packed, 20_000)) < usual + 10  # a map of the file: about 80 MB
    for name in names[7::200_000]:
        (scratch / "large/images" / name).unlink()
    with pytest.raises(DataError, match="train.txt: 5 of 1000000 files are missing"):
        SliceDataset(scratch / "large")


# ---- Whole batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_slices(tmp_path, workers):
    linked_set(tmp_path / "set", ["a", "b"], slices=4)
    write_png(tmp_path / "set/images/a/0002.png.new", np.full((16, 8), 1064, np.uint16))  # another size
    os.replace(tmp_path / "set/images/a/0002.png.new", tmp_path / "set/images/a/0002.png")
    batches = [[0, 5, 2], [7], [3, 3, 6, 1]]
    for dataset in (SliceDataset(tmp_path / "set"), SliceDataset(packed_set(tmp_path / "packed", 8))):
        arrived = [*loader_of(BatchReader(dataset, workers), batches, workers)]
        assert [replaced for _, replaced in arrived] == [0, 0, 0]
        for (batch, _), indices in zip(arrived, batches):
            assert batch.dtype == torch.float32
            assert torch.equal(batch, torch.stack([dataset[index] for index in indices]))
    assert dataset[5].unique().tolist() == [5]


def test_replaced_slices_are_counted(tmp_path, caplog):
    names = linked_set(tmp_path, ["a", "b"], slices=4)
    for name in (names[2], names[3], names[7]):
        (tmp_path / "images" / name).unlink()
        (tmp_path / "images" / name).write_bytes(b"not a PNG")
    dataset = SliceDataset(tmp_path, skip_bad=True)
    arrived = [*loader_of(BatchReader(dataset, 1), [[0, 1, 4], [2, 3, 1], [7, 2]])]
    assert [replaced for _, replaced in arrived] == [0, 2, 2]
    batch, _ = BatchReader(dataset, 0)[[7, 2]]
    assert torch.equal(batch, torch.stack([dataset[0], dataset[4]]))
    plain = BatchReader(SliceDataset(tmp_path), 1)
    with pytest.raises(DataError, match=f"{names[2]}: not a PNG"):
        [*loader_of(plain, [[0, 2]])]


def test_dead_worker_is_reported_with_its_file(tmp_path, monkeypatch):
    names = linked_set(tmp_path, ["a"], slices=9)

    def read_stored(path, hu_offset):
        if path.name == "0005.png":
            os.kill(os.getpid(), signal.SIGKILL)
        return stored(path, hu_offset)

    stored = properties.read_stored
    monkeypatch.setattr(properties, "read_stored", read_stored)
    # PyTorch's handler would raise wherever this process is by then; the loader notices by itself, too.
    monkeypatch.setattr(signal_handling, "_set_SIGCHLD_handler", lambda: None)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    reader = BatchReader(SliceDataset(tmp_path), workers=2)
    arriving = iter(loader_of(reader, [[0, 1], [2, 3, 4], [6, 5, 7], [8]] * 3, workers=2))
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(arriving)
    del arriving
    signal.signal(signal.SIGCHLD, before)
    dead = [str(reader.being_read(pid)) for pid in reader.reading[:, 0].tolist()]
    assert str(tmp_path / "images" / names[5]) in dead
    assert reader.being_read(1) is None


def test_packed_file_cut_short_while_in_use(tmp_path):
    dataset = SliceDataset(packed_set(tmp_path / "packed", 20))
    os.truncate(tmp_path / "packed.npy", 128 + 10 * 128 + 1)
    assert dataset[9].unique().tolist() == [9]
    for read in (lambda: dataset[10], lambda: BatchReader(dataset, 0)[[3, 15]]):
        with pytest.raises(DataError, match=r"packed.npy: too short, slice 1[05]"):
            read()


# ---- Any length, any ranks -----------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_rank_gets_the_same_number_of_equal_batches(world):
    """Together they read what one process alone reads, and no slice twice in an epoch."""
    from engine.process import Process
    from pretraining.schedule import StepBatches

    for batch in (world, 3 * world, 12):
        for size in sorted({batch, batch + 1, 2 * batch - 1, 2 * batch, 13, 17, 97, 101} - {*range(batch)}):
            last = 3 * (size // batch) + 1
            ranks = [Process(rank, world, torch.device("cpu"), "fp32") for rank in range(world)]
            plans = [[*StepBatches(size, batch, 7, process, 0, last)] for process in ranks]
            alone = [*StepBatches(size, batch, 7, Process(0, 1, torch.device("cpu"), "fp32"), 0, last)]
            assert {len(plan) for plan in plans} == {last}
            assert {len(rows) for plan in plans for rows in plan} == {batch // world}
            assert [sum(rows, []) for rows in zip(*plans)] == alone
            for epoch in range(3):
                rows = sum(alone[epoch * (size // batch) : (epoch + 1) * (size // batch)], [])
                assert len({*rows}) == len(rows) and {*rows} <= {*range(size)}
            later = StepBatches(size, batch, 7, ranks[-1], 2, last)
            assert [*later] == plans[-1][2:] and len(later) == last - 2


def test_lists_of_one_two_and_three_slices():
    from engine.process import Process
    from pretraining.schedule import StepBatches

    process = Process(0, 1, torch.device("cpu"), "fp32")
    for size in (1, 2, 3):
        for batch in range(1, size + 1):
            plan = [*StepBatches(size, batch, 0, process, 0, 5)]
            assert len(plan) == 5 and {len({*rows}) for rows in plan} == {batch}
