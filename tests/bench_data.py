"""Benchmarks of augmentation, reading and cached features, for bench.py."""

import json
import re
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2 as v2
from bench_timing import device, interleaved, over
from PIL import Image

from augment import TwoViews
from data import BatchReader, SliceDataset


def noise_slice(rng: np.random.Generator, size: int) -> np.ndarray:
    """HU, int16: a disc of smooth structure with the noise of a CT, which PNG has as much to do with."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    inside = x**2 + y**2 < 0.7
    tissue = 60 * np.sin(9 * x + rng.random()) * np.cos(7 * y) + rng.normal(0, 20, (size, size))
    return np.where(inside, tissue, -1000).astype(np.int16)


def write_packed(folder: Path, count: int, size: int) -> Path:
    """A packed set of `count` slices, of which a few are different."""
    rng = np.random.default_rng(0)
    some = [noise_slice(rng, size) for _ in range(4)]
    array = np.lib.format.open_memmap(folder / "set.npy", "w+", np.int16, (count, size, size))
    for row in range(count):
        array[row] = some[row % 4]
    array.flush()
    names = [f"case{i // 8}/{i % 8:04d}.png" for i in range(count)]
    about = {"stored": "hu", "names": names, "cases": [name.split("/")[0] for name in names]}
    (folder / "set.json").write_text(json.dumps(about))
    return folder / "set"


# ---------------------------------------------------------------------------------------------------------
# Augmentation
# ---------------------------------------------------------------------------------------------------------


def augment(args) -> tuple[str, dict]:
    """Two views of each slice of a batch against two passes of torchvision's transforms of the same kind.

    On a CPU with one thread, so that it is per core, and the fastest round counts; torchvision works slice by
    slice, as in a worker, and on half of the batch, so that rounds of both last about as long: a long one is
    hardly ever left alone on a busy machine.
    """
    batch = torch.rand(args.batch, 1, args.source, args.source, device=device())
    views = TwoViews(args.size)
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(args.size, scale=(0.2, 1.0)),
            v2.ColorJitter(brightness=0.2, contrast=0.2),
            RandomGamma(0.2),
            v2.RandomChoice([v2.GaussianBlur(5, (0.1, 1.0)), v2.RandomAdjustSharpness(2, p=1)], p=[0.5, 0.5]),
            v2.GaussianNoise(sigma=0.025),
        ]
    )
    step = iter(range(10**9))
    actions = {
        "ours": lambda: views(batch, torch.Generator().manual_seed(next(step))),
        "torchvision": lambda: [theirs(image) for image in batch[::2] for _ in range(2)],
    }
    slices = {"ours": len(batch), "torchvision": len(batch[::2])}
    torch.set_num_threads(1)
    row = over(interleaved(actions, args.rounds), "ours")
    each = {name: round(ms / slices[name], 3) for name, ms in row["fastest_milliseconds"].items()}
    row["milliseconds_per_slice"] = each
    text = f"two views of a slice {each['ours']} ms, torchvision {each['torchvision']} ms"
    return f"{text}: {each['torchvision'] / each['ours']:.2f} times as long", row


class RandomGamma(v2.Transform):
    def __init__(self, strength: float):
        super().__init__()
        self.strength = strength

    def make_params(self, inputs):
        return {"gamma": float(torch.empty(1).uniform_(-self.strength, self.strength).exp())}

    def transform(self, image, params):
        return v2.functional.adjust_gamma(image, params["gamma"])


# ---------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------


def read(args) -> tuple[str, dict]:
    """A worker's slices per second from a packed set and from 16-bit PNGs of the same slices (files in the
    page cache, one thread, the fastest round), and what reading a set of 1 and of 8 times as many leaves in
    memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        packed = write_packed(folder, args.batch, args.source)
        slices = SliceDataset(packed)
        (folder / "set" / "images" / "case").mkdir(parents=True)
        names = [f"case/{i:04d}.png" for i in range(args.batch)]
        for index, file in enumerate(names):
            stored = (slices[index][0].numpy() + 1024).astype(np.uint16)
            Image.fromarray(stored).save(folder / "set" / "images" / file)
        (folder / "set" / "train.txt").write_text("\n".join(names) + "\n")
        readers = {
            "packed": BatchReader(SliceDataset(folder / "set.npy"), 0),
            "png": BatchReader(SliceDataset(folder / "set"), 0),
        }
        rows = list(range(args.batch))
        assert torch.equal(readers["packed"][rows][0], readers["png"][rows][0])
        actions = {name: lambda reader=reader: reader[rows] for name, reader in readers.items()}
        torch.set_num_threads(1)
        row = over(interleaved(actions, args.rounds), "packed")
        memory = [resident_after(folder, count, args) for count in (8 * args.batch, 64 * args.batch)]
    rate = {name: round(1000 * args.batch / ms, 1) for name, ms in row["fastest_milliseconds"].items()}
    row |= {"slices_per_second": rate, "resident_mebibytes_of_8_and_64_batches": memory}
    text = f"packed {rate['packed']}, PNG {rate['png']} slices/s: {rate['packed'] / rate['png']:.1f} times"
    return f"{text}; memory after 8 and 64 batches {memory[0]} and {memory[1]} MiB", row


def resident_after(folder: Path, count: int, args) -> float:
    """MiB of this process's own memory after it has read a packed set of `count` slices."""
    other = folder / str(count)
    other.mkdir()
    reader = BatchReader(SliceDataset(write_packed(other, count, args.source)), 0)
    for start in range(0, count, args.batch):
        reader[list(range(start, start + args.batch))]
    status = Path("/proc/self/status").read_text()
    return round(int(re.search(r"RssAnon:\s+(\d+)", status).group(1)) / 1024, 1)


# ---------------------------------------------------------------------------------------------------------
# Linear evaluation
# ---------------------------------------------------------------------------------------------------------


def linear(args) -> tuple[str, dict]:
    """Seconds of a whole linear evaluation, scoring included, with features in memory, in a file, and
    computed at every step; one after the other."""
    import eval_seg  # here, because it takes seconds
    from prepare import commands

    seconds, dice = {}, {}
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        root = Path(folder) / "phantom"
        commands.main(["phantom", "--out", str(root), "--cases", "5", "--slices", "8", f"--size={args.size}"])
        caches = {"memory": ["cache=on"], "file": ["cache=auto", "cache_gb=1e-6"], "none": ["cache=off"]}
        for name, cache in caches.items():
            out = Path(folder) / name
            overrides = ["encoder=random", f"data.root={root}", f"run.out={out}", "data.workers=0"]
            overrides += [f"model.arch={args.arch}", f"optim.steps={args.rounds}", "optim.batch_size=8"]
            overrides += [f"eval.every={args.rounds}", "run.device=auto", *cache]
            start = time.perf_counter()
            eval_seg.main(overrides)
            seconds[name] = round(time.perf_counter() - start, 2)
            dice[name] = json.loads((out / "results.json").read_text())["mean_dice"]
    ratios = {name: round(seconds["none"] / own, 2) for name, own in seconds.items()}
    text = ", ".join(f"{name} {own} s" for name, own in seconds.items())
    same = len(set(dice.values())) == 1
    text = f"{args.rounds} steps: {text}: {ratios['memory']} times; Dice {'identical' if same else dice}"
    return text, {"seconds": seconds, "ratios": ratios, "mean_dice": dice}
