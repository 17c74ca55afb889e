"""data.py medmnist, on small files in the documented layout."""

import csv

import numpy as np
import pytest
from handmade import one_line_of, run
from PIL import Image

from ct.layout import read_list
from ct.properties import read_properties

SIZES = {"train": 5, "val": 2, "test": 3}


def write(path, labels=None, **changed):
    """A file of MedMNIST: 12 px images, 11 classes; returns what is in it."""
    rng = np.random.default_rng(0)
    content = {}
    for part, count in SIZES.items():
        content[f"{part}_images"] = rng.integers(0, 256, (count, 12, 12), dtype=np.uint8)
        content[f"{part}_labels"] = rng.integers(0, 11, (count, 1), dtype=np.uint8)
    content["train_labels"][0] = 10
    content |= changed
    np.savez_compressed(path, **{name: array for name, array in content.items() if array is not None})
    return content


def rows_of(root):
    return list(csv.reader((root / "labels.csv").read_text().splitlines()))


def test_images_labels_and_the_published_split(tmp_path, capsys):
    content = write(tmp_path / "organ.npz")
    out = tmp_path / "set"
    code, said, _ = run(capsys, "medmnist", tmp_path / "organ.npz", "--out", out)
    assert code == 0 and "5 train, 2 val, 3 test" in said and "one of 11 classes" in said
    rows = rows_of(out)
    assert rows[0] == ["slice", "label"] and len(rows) == 11
    for part in SIZES:
        names = read_list(out / f"{part}.txt")
        for index, name in enumerate(names):
            image = np.asarray(Image.open(out / "images" / name))
            assert image.dtype == np.uint8 and (image == content[f"{part}_images"][index]).all()
            assert [name, str(content[f"{part}_labels"][index, 0])] in rows
    assert read_list(out / "unlabelled.txt") == read_list(out / "train.txt")
    assert read_properties(out).kind == "uint8" and read_properties(out).size == (12, 12)
    code, said, _ = run(capsys, "medmnist", tmp_path / "organ.npz", "--out", out)
    assert code == 0 and "already" in said
    (out / "labels.csv").unlink()  # as after a kill
    assert run(capsys, "medmnist", tmp_path / "organ.npz", "--out", out)[0] == 0
    assert rows_of(out) == rows


def test_several_labels_and_names(tmp_path, capsys):
    labels = {f"{part}_labels": np.eye(3, dtype=np.int64)[np.arange(n) % 3] for part, n in SIZES.items()}
    write(tmp_path / "chest.npz", **labels)
    arguments = ("medmnist", tmp_path / "chest.npz", "--out", tmp_path / "set", "--names", "a,b,c")
    assert run(capsys, *arguments)[0] == 0
    assert rows_of(tmp_path / "set")[:3] == [
        ["slice", "a", "b", "c"],
        ["train/00000.png", "1", "0", "0"],
        ["train/00001.png", "0", "1", "0"],
    ]


@pytest.mark.parametrize("equal", (True, False))
def test_three_channels(tmp_path, capsys, equal):
    rng = np.random.default_rng(1)
    images = {
        f"{part}_images": rng.integers(0, 256, (n, 12, 12, 3), dtype=np.uint8) for part, n in SIZES.items()
    }
    if equal:
        images = {name: np.repeat(array[..., :1], 3, axis=3) for name, array in images.items()}
    write(tmp_path / "path.npz", **images)
    code, said, _ = run(capsys, "medmnist", tmp_path / "path.npz", "--out", tmp_path / "set")
    assert code == 0 and ("in colour" in said) == (not equal)
    image = np.asarray(Image.open(tmp_path / "set/images/train/00000.png")).astype(float)
    luminance = images["train_images"][0] @ np.array([0.299, 0.587, 0.114])
    assert np.abs(image - luminance).max() <= 1


def test_what_cannot_be_used_is_one_line(tmp_path, capsys):
    write(tmp_path / "sound.npz")
    whole = (tmp_path / "sound.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("no archive")
    bad = {
        "missing": {"val_images": None},
        "volumes": {"train_images": np.zeros((5, 12, 12, 12), np.uint8)},
        "float": {"train_images": np.zeros((5, 12, 12), np.float32)},
        "fewer": {"test_labels": np.zeros((2, 1), np.uint8)},
        "flat": {"test_labels": np.zeros(3, np.uint8)},
        "empty": {"val_images": np.zeros((0, 12, 12), np.uint8), "val_labels": np.zeros((0, 1), np.uint8)},
        "pickle": {"train_labels": np.array([[{}]] * 5, object)},
        "range": {"test_labels": np.array([[1], [2], [200]], np.uint8)},
        "sizes": {"val_images": np.zeros((2, 9, 12), np.uint8)},
    }
    for name, changed in bad.items():
        write(tmp_path / f"{name}.npz", **changed)
    for name in ("cut", "text", "none", *bad):
        code, _, error = run(capsys, "medmnist", tmp_path / f"{name}.npz", "--out", tmp_path / "set")
        assert code == 2 and one_line_of(error), name
        assert not (tmp_path / "set").exists(), name
