"""Damaged and hostile input: every command on files with flipped bits, cut short, of wrong types and sizes.

A case is a kind (a command, and which file of its input is mutated) and a number, which seeds the mutation.
Its command may succeed, or end with exit code 2 and one line (`data.py check` with 1 after naming bad files).
A traceback, more than 30 s or 2 GB, or results that a failed command leaves as if complete, fail the test.

    python tests/test_corruption.py "png: check" 17        # one case again, with all that it prints
"""

import argparse
import gzip
import io
import os
import random
import shlex
import shutil
import struct
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import PROJECT, Server
from handmade import write_series
from mutations import (
    BMP,
    DICOM,
    FOREIGN,
    ITK,
    JPEG,
    JSON,
    LIST,
    NIFTI,
    NPY,
    PNG,
    SMALL,
    TIFF,
    TORCH,
    YAML,
    png_chunk,
)
from PIL import Image

CASES = 50  # of a kind
LONGEST = 1200  # characters of a line on stderr
TOLERATED = ("warning: ", "note: ", "slices of different sizes")  # lines that say what goes on

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")

TINY = """
model: {arch: tiny, output_stride: 16, queue_size: 6, bn_split: 0, momentum: 0.9}
data: {root: set, list: few.txt, val: few.txt, size: 32, workers: 0}
local: {grid: 2}
decorrelation: {group_size: 32}
optim: {epochs: 2, batch_size: 6, warmup_epochs: 1}
log: {every: 1, rank_every: 0, tensorboard: false}
"""
TINY_EVAL = """
encoder: random
model: {arch: tiny, output_stride: 32}
data: {root: set, train: few.txt, val: few.txt, test: few.txt, workers: 0}
optim: {steps: 2, batch_size: 4}
eval: {every: 1}
"""

# ---- Kinds of cases ----


@dataclass
class Kind:
    command: str  # {target} is the mutated file
    target: str  # a pattern; which of several files is mutated is random too
    mutations: list
    results: tuple = ()  # what a failed command must not leave
    fast: int = 10  # cases in the fast part, of the CASES


TRAIN = "train_moco.py --config tiny.yaml run.out=fresh"
STEP = f"{TRAIN} optim.max_steps=1"
EVAL = "eval_seg.py --config eval.yaml run.out=fresh"
PART = f"{EVAL} run.out=part data.test=numpy.txt"
PREDICT = "eval_seg.py --config eval.yaml run.out=done --out fresh --predict"
CHECK = "data.py check --root set --list few.txt numpy.txt"
PACK = "data.py pack --root set --out fresh --list"
SHOW = "data.py show --root set --list few.txt --out page.png"
SLICE = "data.py slice --labels volumes/seg.nii.gz --out fresh --images volumes/ct.nii.gz"
ALONE = "data.py slice --out fresh --images"
PHANTOM = "data.py phantom --out set --cases 5 --slices 6 --size 48"
FEW, MASKS, ARRAYS = "set/images/phantom000/*.png", "set/masks/phantom000/*.png", "set/images/numpy/*.npy"
COLLECT = "data.py check --root other --list"
LISTS = tuple(f"fresh/{split}.txt" for split in ("train", "val", "test", "unlabelled"))
ENCODER, SCORES, PACKED, PAGE = (
    ("fresh/encoder.pth",),
    ("fresh/results.json",),
    ("fresh.json",),
    ("page.png",),
)

# fmt: off
KINDS = {
    # settings
    "config: train_moco": Kind("train_moco.py --folder --config {target}", "configs/train/*", YAML, fast=40),
    "config: eval_seg": Kind("eval_seg.py --folder --config {target}", "configs/eval/*", YAML, fast=40),
    "config: pretrain": Kind(STEP, "tiny.yaml", SMALL, ENCODER, 3),
    "config: evaluate": Kind(EVAL, "eval.yaml", SMALL, SCORES, 4),
    # slices, masks and what stands beside them
    "png: check": Kind(CHECK, FEW, PNG, fast=20),
    "npy: check": Kind(CHECK, ARRAYS, NPY, fast=20),
    "jpeg: check": Kind(f"{COLLECT} jpg.txt", "other/images/jpg/*", JPEG, fast=8),
    "tiff: check": Kind(f"{COLLECT} tif.txt", "other/images/tif/*", TIFF, fast=12),
    "bmp: check": Kind(f"{COLLECT} bmp.txt", "other/images/bmp/*", BMP, fast=6),
    "tiff mask: check": Kind(f"{COLLECT} tif.txt", "other/masks/tif/*", TIFF, fast=4),
    "tiff: pack": Kind("data.py pack --root other --out fresh --list tif.txt", "other/images/tif/*", TIFF,
                       PACKED, 3),
    "mask: check": Kind(CHECK, MASKS, PNG, fast=20),
    "list: check": Kind("data.py check --root set --list few.txt", "set/few.txt", LIST, fast=20),
    "set.json: check": Kind(CHECK, "set/set.json", JSON),
    "png: pack": Kind(f"{PACK} few.txt", FEW, PNG, PACKED),
    "npy: pack": Kind(f"{PACK} numpy.txt", ARRAYS, NPY, PACKED),
    "list: pack": Kind(f"{PACK} few.txt", "set/few.txt", LIST, PACKED),
    "mask: show": Kind(SHOW, MASKS, PNG, PAGE),
    "set.json: show": Kind(SHOW, "set/set.json", JSON, PAGE),
    "png: show views": Kind(f"{SHOW} --views", FEW, PNG, PAGE),
    "phantom.json": Kind(PHANTOM, "set/phantom.json", JSON),
    # volumes
    "nii: slice": Kind(f"{SLICE} --images {{target}}", "volumes/ct.nii*", NIFTI, LISTS, 30),
    "dicom: slice": Kind(f"{ALONE} dicom", "dicom/p1/*", DICOM, LISTS, 30),
    "nrrd: slice": Kind(f"{ALONE} volumes/ct.nrrd", "volumes/ct.nrrd", ITK, LISTS, 15),
    "mha: slice": Kind(f"{ALONE} volumes/ct.mha", "volumes/ct.mha", ITK, LISTS, 15),
    "labels: slice": Kind(SLICE, "volumes/seg.nii.gz", NIFTI, LISTS, 20),
    "map: slice": Kind(f"{SLICE} --label-map map.json", "map.json", JSON, LISTS),
    "classes: slice": Kind(f"{SLICE} --classes names.json", "names.json", JSON, LISTS),
    # pretraining
    "png: pretrain": Kind(STEP, FEW, PNG, ENCODER, 3),
    "list: pretrain": Kind(STEP, "set/few.txt", LIST, ENCODER, 4),
    "packed npy: pretrain": Kind(f"{STEP} data.root=pack", "pack.npy", NPY, ENCODER),
    "packed json: pretrain": Kind(f"{STEP} data.root=pack", "pack.json", JSON, ENCODER, 3),
    "init: pretrain": Kind(f"{STEP} model.init={{target}}", "run/encoder.pth", TORCH, ENCODER, 5),
    "checkpoint: pretrain": Kind(f"{TRAIN} run.out=stopped", "stopped/checkpoint.pth", TORCH,
                                 ("stopped/encoder.pth",), 4),
    "newest: pretrain": Kind(f"{TRAIN} run.out=two", "two/checkpoint.pth", TORCH, ("two/encoder.pth",), 2),
    "encoder.json: pretrain": Kind(f"{TRAIN} run.out=run", "run/encoder.json", JSON),
    "metrics: pretrain": Kind(f"{TRAIN} run.out=stopped", "stopped/metrics.jsonl", JSON,
                              ("stopped/encoder.pth",), 2),
    # evaluation
    "encoder.pth: evaluate": Kind(f"{EVAL} encoder={{target}}", "run/encoder.pth", TORCH, SCORES, 5),
    "foreign.pth: evaluate": Kind(f"{EVAL} encoder={{target}}", "foreign.pth", FOREIGN, SCORES, 5),
    "encoder.json: evaluate": Kind(f"{EVAL} encoder=run/encoder.pth", "run/encoder.json", JSON, SCORES, 4),
    "mask: evaluate": Kind(EVAL, MASKS, PNG, SCORES, 4),
    "set.json: evaluate": Kind(EVAL, "set/set.json", JSON, SCORES, 4),
    "checkpoint: evaluate": Kind(PART, "part/checkpoint.pth", TORCH, ("part/results.json",), 5),
    "config.yaml: evaluate": Kind(f"{EVAL} run.out=done", "done/config.yaml", YAML),
    "results.json: evaluate": Kind(f"{EVAL} run.out=done", "done/results.json", JSON),
    "results.json: compare": Kind("eval_seg.py --compare done done2", "done2/results.json", JSON, fast=15),
    # prediction
    "model.pth: predict": Kind(f"{PREDICT} one", "done/model.pth", TORCH, fast=8),
    "png: predict": Kind(f"{PREDICT} one/a.png", "one/a.png", PNG, ("fresh/a.png",), 5),
    "npy: predict": Kind(f"{PREDICT} one/b.npy", "one/b.npy", NPY, ("fresh/b.png",), 5),
    "nii: predict": Kind(f"{PREDICT} {{target}}", "volumes/ct.nii*", NIFTI, fast=6),
}
# fmt: on

# ---- Cases by name ----


class Code:
    """Where it is unpickled it makes a folder called owned."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


def torch_file(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def npy_file(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def png_of(height, width, size=0):
    """No more than the header of a 16-bit PNG."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0))
    return (b"\x89PNG\r\n\x1a\n" + header).ljust(size)


def second_header(side):
    return lambda png: png[:33] + png_of(side, side)[8:] + png[33:]


def claim_size(volume, size=8000):
    data = bytearray(gzip.decompress(volume))
    data[42:48] = struct.pack("<3h", size, size, size)
    return gzip.compress(data)


def flip(weights):
    changed = bytearray(weights)
    changed[len(changed) // 2] ^= 1
    return bytes(changed)


def deflate(weights):
    """The same archive, packed, with a megabyte more in it than the file has."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(weights)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr(name.split("/")[0] + "/zeros", bytes(len(weights)))
    return file.getvalue()


def bomb(first, brackets):
    """Nine times nine times ... as much as the first."""
    lines = (f"{b}: &{b} {brackets % ', '.join([f'*{a}'] * 9)}\n" for a, b in pairwise("abcdefghi"))
    return f"a: &a {first}\n" + "".join(lines)


SETTINGS = "train_moco.py --folder --config bad.yaml"
SLICE_0, ARRAY_0, GB = FEW.replace("*", "000"), ARRAYS.replace("*", "000"), 2**30
ODD = os.fsdecode(b"odd/images/\xff\xfe.png")
STOPPED, TWO, WEIGHTS = "stopped/checkpoint.pth", "two/checkpoint.pth", "run/encoder.pth"

# What it is: the command, a file and its content (or a function of what it was, or a size), the exit code and
# what is said.
# fmt: off
NASTY = {
    "a PNG of 100 bytes claims 60000 x 60000 px": (STEP, SLICE_0, png_of(60000, 60000, 100), 2, "1 to 8192"),
    "a PNG of 100 bytes claims 8000 x 8000 px": (STEP, SLICE_0, png_of(8000, 8000, 100), 2, "too short"),
    "a PNG has two headers": (CHECK, SLICE_0, second_header(99), 1, "two headers"),
    "the second header of a PNG is large": (CHECK, SLICE_0, second_header(12000), 1, "damaged PNG"),
    "a .npy has code": (CHECK, ARRAY_0, npy_file(np.array([Code()])), 1, "damaged .npy"),
    "a volume claims 8000 x 8000 x 8000": (SLICE, "volumes/ct.nii.gz", claim_size, 2, "too short"),
    "aliases in YAML": (SETTINGS, "bad.yaml", bomb("[x, x]", "[%s]"), 2, "aliases"),
    "merged aliases in YAML": (SETTINGS, "bad.yaml", bomb("{x: 1}", "{<<: [%s]}"), 2, "aliases"),
    "an alias of itself": (SETTINGS, "bad.yaml", "a: &a [*a]", 2, "aliases"),
    "no date": (SETTINGS, "bad.yaml", "optim: {lr: 2001-99-99}", 2, "not a YAML file"),
    "5000 digits": (SETTINGS, "bad.yaml", "seed: " + "9" * 5000, 2, "not a YAML file"),
    "5000 hexadecimal digits": (SETTINGS, "bad.yaml", "seed: 0x" + "f" * 5000, 2, "seed: a number"),
    "no float is that large": (SETTINGS, "bad.yaml", "optim: {lr: 1" + "0" * 400 + "}", 2, "optim.lr"),
    "a NUL in a path": (SETTINGS, "bad.yaml", 'run: {out: "a\\0b"}', 2, "run.out"),
    "YAML nested deeply": (SETTINGS, "bad.yaml", "[" * 100_000, 2, "nested too deeply"),
    "code in YAML": (SETTINGS, "bad.yaml", "run: !!python/object/apply:os.mkdir [owned]", 2, "not a YAML"),
    "gigabytes of YAML": (SETTINGS, "bad.yaml", 3 * GB, 2, "too large"),
    "gigabytes of JSON": (CHECK, "set/set.json", 3 * GB, 2, "too large"),
    "gigabytes of list": (CHECK, "set/few.txt", 3 * GB, 2, "few.txt"),
    "JSON nested deeply": (CHECK, "set/set.json", "[" * 100_000, 2, "not valid JSON"),
    "a list climbs": (CHECK, "set/few.txt", "a/0.png\na/../../../../etc/passwd", 2, "leaves the data root"),
    "a list begins at the top": (STEP, "set/few.txt", "/etc/passwd", 2, "leaves the data root"),
    "a list has a NUL": (STEP, "set/few.txt", "phantom000/\0.png", 2, "few.txt"),
    "a list speaks to the terminal": (STEP, "set/few.txt", "\x1b[2J\x07\x85\u2028.png", 2, "few.txt"),
    "a name is not UTF-8": ("data.py check --root odd", ODD, b"", 1, "not a PNG"),
    "a name is too long": (f"{STEP} data.root={'x' * 5000}", "set/few.txt", "x", 2, ""),
    "a flipped bit in a checkpoint": (f"{TRAIN} run.out=stopped", STOPPED, flip, 2, "cannot read"),
    "a flipped bit in the newest": (f"{TRAIN} run.out=two", TWO, flip, 0, "continuing from"),
    "a flipped bit in encoder.pth": (f"{EVAL} encoder={WEIGHTS}", WEIGHTS, flip, 2, "damaged"),
    "a flipped bit in model.pth": (f"{PREDICT} one", "done/model.pth", flip, 2, "damaged"),
    "code in a checkpoint": (f"{TRAIN} run.out=stopped", STOPPED, torch_file(Code()), 2, "cannot read"),
    "code in weights": (f"{EVAL} encoder=x.pth", "x.pth", torch_file(Code()), 2, "holds an object of"),
    "an archive unpacks to more": (f"{STEP} model.init={WEIGHTS}", WEIGHTS, deflate, 2, "less"),
}
# fmt: on

# ---- What the cases begin with ----


@pytest.fixture(scope="module")
def bench(tmp_path_factory, server):
    pytest.importorskip("nibabel")
    pytest.importorskip("SimpleITK")
    return Bench(tmp_path_factory.mktemp("corruption"), server)


class Bench:
    """A server, and a folder with sound input for every kind of case."""

    def __init__(self, folder, server):
        self.server, self.sound, self.work = server, folder / "sound", folder / "work"
        self.sound.mkdir()
        write_sound_files(self.sound, self.command)

    def command(self, arguments, code=0):
        end = self.server.run(self.sound, arguments.split())
        assert end["code"] == code, (arguments, end)

    def fresh(self):
        """A new copy of the sound files (hard links; nothing writes into a file that is there)."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.sound, self.work, copy_function=os.link)
        return self.work

    def case(self, name, number):
        """Run one case -> (what was done, how it ended, what is wrong with that or None)."""
        kind, rng, work = KINDS[name], random.Random(f"{name} {number}"), self.fresh()
        target = rng.choice(sorted(work.glob(kind.target)))
        mutate = kind.mutations[number % len(kind.mutations)]
        data = target.read_bytes()
        target.unlink()  # a hard link: the copy is what is mutated
        target.write_bytes(data)
        mutate(rng, target, work)
        end = self.server.run(work, kind.command.format(target=target.relative_to(work)).split())
        what = f"{name!r} {number}: {mutate.__name__} of {target.relative_to(work)}"
        return what, end, complaint(end, [file for file in kind.results if (work / file).exists()])

    def complaints(self, name, numbers):
        found = [self.case(name, number) for number in numbers]
        return [f"{what}: {wrong}" for what, _, wrong in found if wrong]


def write_sound_files(root, command):
    import nibabel
    import SimpleITK

    (root / "tiny.yaml").write_text(TINY)
    (root / "eval.yaml").write_text(TINY_EVAL)
    for path in (PROJECT / "configs").glob("*.yaml"):
        script = "eval" if "eval:" in path.read_text() else "train"
        (root / "configs" / script).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / "configs" / script)
    command("data.py phantom --out set --cases 5 --slices 6 --size 48")
    names = [f"phantom000/{number:03d}" for number in range(6)]
    (root / "set/few.txt").write_text("".join(f"{name}.png\n" for name in names))
    (root / "set/numpy.txt").write_text("numpy/000\nnumpy/001\n")
    shutil.copytree(root / "set/masks/phantom000", root / "set/masks/numpy")
    (root / "set/images/numpy").mkdir()
    for name in ("000", "001"):
        np.save(root / f"set/images/numpy/{name}.npy", np.full((48, 48), 40, np.int16))
    write_pictures(root / "other")
    (root / "names.json").write_text('["background", "bright"]')
    (root / "map.json").write_text('{"1": 1, "2": 2, "7": 3, "255": 255}')
    (root / "one").mkdir()
    shutil.copy(root / "set/images/phantom000/002.png", root / "one/a.png")
    shutil.copy(root / "set/images/numpy/000.npy", root / "one/b.npy")
    (root / "volumes").mkdir()
    voxels = np.random.default_rng(0).integers(-1000, 1000, (12, 12, 10)).astype(np.int16)
    for file, array in (
        ("ct.nii", voxels),
        ("ct.nii.gz", voxels),
        ("seg.nii.gz", (voxels > 0).astype(np.uint8)),
    ):
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), root / "volumes" / file)
    write_series(root / "dicom/p1", np.moveaxis(voxels, 2, 0)[:5])
    for file in ("ct.nrrd", "ct.mha"):
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels), str(root / "volumes" / file))
    command("data.py pack --root set --list few.txt --out pack")

    command(f"{TRAIN} run.out=run")
    # One that ends after its two steps, since encoder.pth cannot be written: with a checkpoint of each.
    (root / "two/encoder.pth.med-moco.part").mkdir(parents=True)
    command(f"{TRAIN} run.out=two run.save_steps=1", code=2)
    (root / "two/encoder.pth.med-moco.part").rmdir()
    shutil.copytree(root / "two", root / "stopped")
    (root / "stopped/checkpoint.pth.previous").rename(root / "stopped/checkpoint.pth")
    state = torch.load(root / "run/encoder.pth", weights_only=True)
    beside = {"meta": argparse.Namespace(lr=0.1), "best": np.float64(3), "path": Path("x"), "kinds": {1, 2}}
    torch.save({"state_dict": state, **beside}, root / "foreign.pth")
    command(f"{EVAL} run.out=done")
    shutil.copytree(root / "done", root / "done2")
    # An evaluation that ends after its training, at a damaged mask: with the checkpoint of its first step.
    mask = root / "set/masks/numpy/000.png"
    data = mask.read_bytes()
    mask.write_bytes(data[: len(data) // 2])
    command(PART, code=2)
    mask.write_bytes(data)


def write_pictures(root):
    """Slices as other programs save them: 8-bit JPEG and BMP, grey and RGB; 16-bit TIFF, plain and packed."""
    deep = np.random.default_rng(0).integers(0, 3000, (48, 48)).astype(np.uint16)
    grey = Image.fromarray((deep // 12).astype(np.uint8))
    labels = Image.fromarray((deep % 14).astype(np.uint8))
    for suffix, images in (("jpg", [grey] * 2), ("tif", [Image.fromarray(deep)] * 2), ("bmp", [grey] * 2)):
        for number, image in enumerate(images):
            (root / "images" / suffix).mkdir(parents=True, exist_ok=True)
            image = image.convert("RGB") if number and suffix != "tif" else image
            options = {"compression": "tiff_lzw"} if number and suffix == "tif" else {}
            image.save(root / f"images/{suffix}/{number}.{suffix}", **options)
        (root / f"{suffix}.txt").write_text(f"{suffix}/0\n{suffix}/1\n")
        (root / "masks" / suffix).mkdir(parents=True)
        for number in range(2):
            labels.save(root / f"masks/{suffix}/{number}.tif")


def complaint(end, left):
    """What is wrong with the end of a case, or None."""
    lines = [line for line in end["err"].splitlines() if not line.startswith(TOLERATED)]
    reported = end["code"] == 1 and "bad: " in end["out"]
    if end["killed"]:
        return end["killed"]
    if (end["code"] == 0 or reported) and not lines:
        return None
    if end["code"] != 2 or len(lines) != 1:
        return f"exit code {end['code']}, {len(lines)} lines: {' / '.join(lines[-3:])[-300:]}"
    if len(lines[0]) > LONGEST:
        return f"a line of {len(lines[0])} characters: {lines[0][:200]}"
    return f"exit code 2, but {left[0]} is left" if left else None


@pytest.mark.parametrize("name", NASTY)
def test_nasty(bench, name):
    command, file, content, code, text = NASTY[name]
    path = bench.fresh() / file
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_bytes() if callable(content) else b""
    path.unlink(missing_ok=True)  # a hard link: others keep the content
    if isinstance(content, int):
        path.touch()
        os.truncate(path, content)  # takes no room on the disk
    else:
        content = content(old) if callable(content) else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    end = bench.server.run(bench.work, shlex.split(command))
    assert complaint(end, []) is None, end
    assert end["code"] == code and text in end["out"] + end["err"], end
    assert not (bench.work / "owned").exists()


@pytest.mark.parametrize("name", KINDS)
def test_mutations(bench, name):
    found = bench.complaints(name, range(KINDS[name].fast))
    assert not found, "\n".join(found)


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_many_mutations(bench, name):
    found = bench.complaints(name, range(KINDS[name].fast, CASES))
    assert not found, "\n".join(found)


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_sound_input(bench, name):
    """Without a mutation every command succeeds, or the tests above would say nothing."""
    target = sorted(bench.fresh().glob(KINDS[name].target))[0].relative_to(bench.work)
    end = bench.server.run(bench.work, KINDS[name].command.format(target=target).split())
    assert end["code"] == 0 and complaint(end, []) is None, end


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), Server())
        what, end, wrong = bench.case(sys.argv[1], int(sys.argv[2]))
        print(what, f"exit code {end['code']}", end["out"], end["err"], wrong or "as it should be", sep="\n")
        bench.server.close()
