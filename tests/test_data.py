"""data.py: datasets on files written by hand, what they say of bad ones, intensities."""

import json

import numpy as np
import pytest
import torch
from handmade import put, random_set
from PIL import Image

from ct.slices import DataError
from data import Intensity, SegmentationDataset, SliceDataset


def test_datasets_read_what_was_written(tmp_path):
    names = random_set(tmp_path)
    slices = SliceDataset(tmp_path, "train.txt")
    pairs = SegmentationDataset(tmp_path, "train.txt", num_classes=4)
    assert len(slices) == 9 and slices.names == names and slices.cases == [name[0] for name in names]
    assert slices.cases[2:5] == ["a", "b", "b"] and slices.cases[-1] == "c"
    assert slices.kind == "hu" and slices.size == pairs.size == (12, 10)
    for index, name in enumerate(names):
        with Image.open(tmp_path / "images" / name) as image:
            hu = np.array(image).astype(float) - 1024
        with Image.open(tmp_path / "masks" / name) as image:
            labels = np.array(image)
        image, mask = pairs[index]
        assert slices[index].shape == (1, 12, 10) and slices[index].dtype == torch.float32
        assert np.array_equal(slices[index][0], hu) and torch.equal(image, slices[index])
        assert np.array_equal(mask, labels) and mask.dtype == torch.int64
        assert np.array_equal(pairs.own_mask(index), labels)
        assert np.array_equal(pairs.to_own_grid(labels, index, labels.shape), labels)
    assert pairs.spacing("a") is None


def test_mmseg_layout(tmp_path):
    """img_dir/train, ann_dir/train, a list without suffixes; `{split}` is the list's name."""
    gray = np.full((6, 6), 7, np.uint8)
    for split in ("train", "val"):
        for index in range(2):
            put(tmp_path / f"img_dir/{split}/img0001_slice00{index}.png", gray)
            put(tmp_path / f"ann_dir/{split}/img0001_slice00{index}.png", gray)
        (tmp_path / f"{split}.txt").write_text("img0001_slice000\nimg0001_slice001\n")
    dataset = SegmentationDataset(tmp_path, "val.txt", "img_dir/{split}", "ann_dir/{split}")
    assert (
        dataset.kind == "uint8"
        and dataset[1][0].unique().tolist() == [7]
        and dataset.cases[0] == "img0001_slice"
    )
    assert dataset.mask_path(0) == tmp_path / "ann_dir/val/img0001_slice000.png"


def test_missing_files_are_counted(tmp_path):
    names = random_set(tmp_path)
    for name in names[1:6]:
        (tmp_path / "images" / name).unlink()
    with pytest.raises(
        DataError, match=r"train.txt: 5 of 9 files are missing .*: a/01.png, a/02.png, b/00.png \.\.\."
    ):
        SliceDataset(tmp_path, "train.txt")
    random_set(tmp_path)
    (tmp_path / "masks" / names[0]).unlink()
    with pytest.raises(DataError, match=r"1 of 9 files are missing .*masks: a/00.png"):
        SegmentationDataset(tmp_path, "train.txt")
    with pytest.raises(DataError, match="no such data set"):
        SliceDataset(tmp_path / "nowhere", "train.txt")


def test_skip_bad_leaves_out_and_replaces(tmp_path, caplog):
    names = random_set(tmp_path)
    slices = [*SliceDataset(tmp_path)]
    (tmp_path / "images" / names[1]).unlink()
    for bad in (names[0], names[4], names[5]):
        put(tmp_path / "images" / bad, b"not a PNG")
    put(tmp_path / "images" / names[8], np.zeros((12, 10), np.uint8))  # of another kind: no HU
    with pytest.raises(DataError, match="1 of 9 files are missing"):
        SliceDataset(tmp_path)
    dataset = SliceDataset(tmp_path, skip_bad=True)
    assert dataset.names == [names[0], *names[2:]] and dataset.size == (12, 10)
    given = [2, 2, 3, 6, 6, 6, 7, 2]  # of the whole list, for 0, 2, 3, 4, 5, 6, 7 and 8
    assert all(torch.equal(dataset[index], slices[number]) for index, number in enumerate(given))
    left_out, skipped = caplog.messages
    assert left_out.startswith("warning: train.txt: 1 of 9 files are missing") and names[1] in left_out
    assert skipped.startswith("warning: skipped unreadable slice: ") and names[0] in skipped
    with pytest.raises(IndexError):
        dataset[8]
    for name in names:
        (tmp_path / "images" / name).unlink(missing_ok=True)
    with pytest.raises(DataError, match="9 of 9 files are missing"):
        SliceDataset(tmp_path, skip_bad=True)


def test_too_many_bad_slices_are_an_error(tmp_path):
    names = random_set(tmp_path, cases=["a"], slices=130, shape=(2, 2))
    dataset = SliceDataset(tmp_path, skip_bad=True)
    for name in names[10:115]:
        put(tmp_path / "images" / name, b"")
    assert torch.equal(dataset[16], dataset[115])
    with pytest.raises(
        DataError, match="114.png: not a PNG, JPEG, TIFF or BMP image; 100 unreadable slices in a row"
    ):
        dataset[15]


def test_bad_masks_are_named(tmp_path):
    names = random_set(tmp_path)
    put(tmp_path / "masks" / names[0], np.zeros((12, 11), np.uint8))
    put(tmp_path / "masks" / names[1], np.full((12, 10), 9, np.uint8))
    put(tmp_path / "masks" / names[2], np.full((12, 10), 255, np.uint8))
    put(tmp_path / "images" / names[3], np.zeros((12, 10), np.uint8))
    dataset = SegmentationDataset(tmp_path, "train.txt", num_classes=9)
    with pytest.raises(DataError, match=rf"{names[0]}.*\(12, 11\).*\(12, 10\)"):
        dataset[0]
    with pytest.raises(DataError, match=rf"{names[1]}: label 9, .* 9 classes"):
        dataset[1]
    assert dataset[2][1].unique().tolist() == [255]
    with pytest.raises(DataError, match=f"{names[3]}: 8-bit values"):
        dataset[3]


def test_slices_of_other_sizes_are_scaled_to_fit(tmp_path, caplog):
    """Twice the size: halved and whole. Wide: bars of air and 255 above and below. Said once."""
    images, masks = tmp_path / "images/a", tmp_path / "masks/a"
    flat = {"1": (8, 8), "2": (16, 16), "3": (4, 16)}
    for name, shape in flat.items():
        put(images / f"{name}.png", np.full(shape, 1064, np.uint16))
        put(masks / f"{name}.png", np.full(shape, 3, np.uint8))
    (tmp_path / "train.txt").write_text("a/1\na/2\na/3\n")
    dataset = SegmentationDataset(tmp_path, "train.txt")
    assert dataset.size == (8, 8)
    pairs = [dataset[index] for index in range(3)]
    for image, mask in pairs[:2]:
        assert torch.allclose(image, torch.full((1, 8, 8), 40.0)) and (mask == 3).all()
    image, mask = pairs[2]
    assert (image[0, 3:5] == 40).all() and (image[0, :3] == -1024).all() and (image[0, 5:] == -1024).all()
    assert (mask[3:5] == 3).all() and (mask[:3] == 255).all() and (mask[5:] == 255).all()
    assert sum("different sizes" in message for message in caplog.messages) == 1
    restored = dataset.to_own_grid(mask.numpy().astype(np.uint8), 2, (4, 16))
    assert restored.shape == (4, 16) and (restored == 3).all()
    assert SliceDataset(tmp_path, "train.txt", size=(5, 9))[0].shape == (1, 5, 9)


def test_dataset_in_worker_processes(tmp_path):
    random_set(tmp_path)
    dataset = SegmentationDataset(tmp_path, "train.txt")
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=1)
    images = torch.cat([images for images, _ in loader])
    assert torch.equal(images, torch.stack([dataset[index][0] for index in range(9)]))


def test_all_slices_without_a_list(tmp_path):
    names = random_set(tmp_path)
    put(tmp_path / "images/a/notes.txt", b"")
    assert SliceDataset(tmp_path, None).names == sorted(names)


def test_intensity():
    windowed = Intensity([-160, 240], 0.5, 0.25)
    hu = torch.tensor([-1000.0, -160, 40, 240, 3000])
    assert windowed.to_unit(hu).tolist() == [0, 0, 0.5, 1, 1]
    assert windowed(hu).tolist() == [-2, -2, 0, 2, 2]
    assert np.array_equal(windowed(hu.numpy()), windowed(hu).numpy())
    unscaled = Intensity(None, 884.5, 983.7)
    assert torch.allclose(unscaled(hu), (hu - 884.5) / 983.7)
    for intensity in (windowed, unscaled):
        assert Intensity(**json.loads(json.dumps(intensity.as_dict()))) == intensity
    assert windowed != Intensity([-160, 241], 0.5, 0.25)
    for wrong in ({"window": (240, -160)}, {"window": (1, 2, 3)}, {"std": 0}):
        with pytest.raises(DataError):
            Intensity(**wrong)


def test_a_list_of_folders_is_an_error(tmp_path):
    put(tmp_path / "images/a/1.png", np.full((4, 4), 1000, np.uint16))
    (tmp_path / "train.txt").write_text("a\n")
    with pytest.raises(DataError, match="images/a"):
        SliceDataset(tmp_path)


def test_a_labelled_slice_that_is_listed_twice_counts_once(tmp_path, caplog):
    names = random_set(tmp_path, cases=("a",))
    (tmp_path / "train.txt").write_text("\n".join([*names, names[0], names[0]]))
    dataset = SegmentationDataset(tmp_path, "train.txt")
    assert [*dataset.names] == names and len(dataset.cases) == len(names)
    assert "2 slices are listed again" in caplog.text
