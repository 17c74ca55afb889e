"""2.5D, data.neighbours: the slices below and above as further channels."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade import put, random_set
from PIL import Image
from test_eval import TINY, slow_dice
from test_eval import run as evaluate

import eval_cls
from augment import SegmentationAugment, TwoViews
from ct.slices import DataError, read_slice
from data import BatchReader, SegmentationDataset, SliceDataset, encoder_card, middle
from models import Encoder
from prepare import commands
from weights import load_encoder_weights


def stack_by_hand(root, name):
    """HU (3, H, W) of a slice CASE/N.png with those that come before and after it in its folder."""
    path = root / "images" / name
    there = sorted(path.parent.iterdir(), key=lambda file: int(file.stem))
    at = there.index(path)
    chosen = [max(at - 1, 0), at, min(at + 1, len(there) - 1)]
    return np.stack([np.asarray(Image.open(there[i])).astype(np.float32) - 1024 for i in chosen])


def test_neighbours_are_those_of_the_folder_listed_or_not(tmp_path):
    random_set(tmp_path, slices=4)
    for number in (4, 10, 100):  # after 9, and far away
        put(tmp_path / f"images/b/{number}.png", np.full((12, 10), number, np.uint16))
    put(tmp_path / "images/a/01.tif", tiff(np.zeros((12, 10), np.uint8)))  # a copy in another format
    names = ["b/10.png", "a/00.png", "b/4.png", "b/4.png", "a/01.png", "b/100.png"]
    (tmp_path / "some.txt").write_text("\n".join(names))
    dataset = SliceDataset(tmp_path, "some.txt", neighbours=1)
    (tmp_path / "images/a/01.tif").unlink()
    assert len(dataset) == 6 and [*dataset.names] == names
    for index, name in enumerate(names):
        assert np.array_equal(dataset[index].numpy(), stack_by_hand(tmp_path, name))
    assert torch.equal(dataset[-1], dataset[5])
    assert torch.equal(middle(dataset[0]), SliceDataset(tmp_path, "some.txt")[0])
    assert dataset.facts().neighbours == 1


def tiff(array):
    from io import BytesIO

    file = BytesIO()
    Image.fromarray(array).save(file, "TIFF")
    return file.getvalue()


def test_cases_of_a_flat_folder_are_not_neighbours(tmp_path):
    for number, name in enumerate(["p1_1.png", "p1_2.png", "p2_1.png", "p2_2.png"]):
        put(tmp_path / "images/train" / name, np.full((8, 8), 1024 + number, np.uint16))
    (tmp_path / "train.txt").write_text("train/p1_2.png\ntrain/p2_1.png")
    stacks = SliceDataset(tmp_path, neighbours=1)
    assert [[*map(float, slice.mean((1, 2)))] for slice in stacks] == [[0, 1, 1], [2, 2, 3]]


def test_a_batch_reads_each_file_once(tmp_path, monkeypatch):
    names = random_set(tmp_path, cases=("a",), slices=9)
    plain, dataset = SliceDataset(tmp_path), SliceDataset(tmp_path, neighbours=1)
    labelled, pairs = SegmentationDataset(tmp_path, neighbours=1), SegmentationDataset(tmp_path)
    wanted = torch.stack([dataset[i] for i in range(2, 7)])
    files, read = [], SliceDataset.read
    monkeypatch.setattr(SliceDataset, "read", lambda self, index: files.append(index) or read(self, index))
    batch, replaced = BatchReader(dataset, 0)[[2, 3, 4, 5, 6]]
    assert torch.equal(batch, wanted) and replaced == 0 and sorted(files) == [*range(1, 8)]
    files.clear()
    items = labelled.__getitems__([2, 3, 4, 5, 6])
    assert torch.equal(torch.stack([image for image, _ in items]), wanted)
    assert sorted(files) == [*range(1, 8)]
    mask = np.asarray(Image.open(tmp_path / "masks" / names[2]))
    assert np.array_equal(items[0][1].numpy(), mask)
    for once in (lambda: BatchReader(plain, 0)[[2, 3]], lambda: pairs.__getitems__([2, 3])):
        files.clear()
        once()
        assert files == [2, 3]


def test_an_unreadable_neighbour_is_named_or_skipped(tmp_path):
    names = random_set(tmp_path, cases=("a",), slices=9)
    (tmp_path / "images" / names[4]).write_bytes(b"no picture")
    with pytest.raises(DataError, match=names[4]):
        SliceDataset(tmp_path, neighbours=1)[3]
    dataset = SliceDataset(tmp_path, neighbours=1, skip_bad=True)
    batch, replaced = BatchReader(dataset, 0)[[2, 3]]
    assert replaced == 1 and torch.equal(batch[1], dataset[6])


def test_packed_slices_have_the_same_neighbours(tmp_path):
    names = random_set(tmp_path, slices=12)
    (tmp_path / "train.txt").write_text("\n".join(names[::-1]))
    commands.main(["pack", "--root", str(tmp_path), "--list", "train.txt", "--out", str(tmp_path / "whole")])
    folder, packed = (SliceDataset(root, neighbours=1) for root in (tmp_path, tmp_path / "whole"))
    assert all(torch.equal(folder[i], packed[i]) for i in range(len(names)))
    assert torch.equal(BatchReader(folder, 0)[[5, 0, 11]][0], BatchReader(packed, 0)[[5, 0, 11]][0])

    (tmp_path / "half.txt").write_text("\n".join(names[::2]))
    half = ["--root", str(tmp_path), "--list", "half.txt", "--out", str(tmp_path / "half")]
    commands.main(["pack", *half])
    assert SliceDataset(tmp_path / "half")[3].shape == (1, 12, 10)
    with pytest.raises(DataError, match=r"half\.npy: was packed without some of its slices' neighbours"):
        SliceDataset(tmp_path / "half", neighbours=1)


def test_channels_are_cropped_and_changed_alike_but_for_their_noise():
    seeded = torch.Generator().manual_seed
    stacks = torch.rand(4, 3, 40, 48, generator=seeded(1))
    options = {"size": 32, "noise": 0.0, "rotate": 20.0, "erase": 0.5}
    views = TwoViews(**options)(stacks, seeded(2))
    for channel in range(3):
        alone = TwoViews(**options)(stacks[:, channel : channel + 1], seeded(2))
        assert torch.equal(views[0][:, channel : channel + 1], alone[0])
        assert torch.equal(views[2], alone[2])
    crops = SegmentationAugment(32, noise=0.0)
    masks = torch.zeros(4, 40, 48, dtype=torch.long)
    whole = crops(stacks, masks, seeded(3))[0]
    assert torch.equal(whole[:, 2:], crops(stacks[:, 2:], masks, seeded(3))[0])

    flat = torch.full((6, 3, 32, 32), 0.5)
    only_noise = dict.fromkeys(("brightness", "contrast", "gamma", "blur"), 0.0)
    noise = TwoViews(32, noise=0.05, **only_noise)(flat, seeded(4))[0] - 0.5
    correlation = torch.corrcoef(noise.transpose(0, 1).flatten(1))
    assert (correlation - torch.eye(3)).abs().max() < 0.1
    assert torch.equal(noise[:, :1] + 0.5, TwoViews(32, noise=0.05, **only_noise)(flat[:, :1], seeded(4))[0])


@pytest.fixture
def pretrained(train, tmp_path):
    train("pre", "data.neighbours=1")
    return tmp_path / "pre" / "encoder.pth"


def test_from_pretraining_to_predicted_masks(pretrained, phantom, tmp_path, capsys):
    """The encoder says that it takes neighbours; what scores test cases is what --predict writes."""
    kernel = torch.load(pretrained, weights_only=True)["conv1.weight"]
    assert kernel.shape[1] == 3 and encoder_card(pretrained)["facts"].neighbours == 1
    assert json.loads(pretrained.with_suffix(".json").read_text())["config"]["model"]["in_channels"] == 3

    out, masks = tmp_path / "linear", tmp_path / "masks"
    evaluate(*TINY, f"data.root={phantom}", f"run.out={out}", f"encoder={pretrained}")
    assert torch.load(out / "model.pth", weights_only=True)["about"]["facts"]["neighbours"] == 1
    evaluate(*TINY, f"run.out={out}", "--predict", phantom / "images", "--out", masks)
    results = json.loads((out / "results.json").read_text())
    assert slow_dice(masks, phantom) == results["cases"]
    assert results["data"]["neighbours"] == 1 and not results["warnings"]
    case = sorted((phantom / "images").iterdir())[0]
    for source in (case, case / "003.png"):  # from the same neighbours
        evaluate(*TINY, f"run.out={out}", "--predict", source, "--out", tmp_path / source.name)
        assert (tmp_path / source.name / "003.png").read_bytes() == (
            masks / case.name / "003.png"
        ).read_bytes()

    capsys.readouterr()
    plain = ["data.neighbours=0", f"run.out={tmp_path}/plain", f"encoder={pretrained}"]
    evaluate(*TINY, f"data.root={phantom}", *plain)
    assert "was trained with data.neighbours=1, here it is 0" in capsys.readouterr().err


def test_a_volume_is_predicted_as_its_slices(nibabel, phantom, tmp_path):
    out = tmp_path / "linear"
    evaluate(
        *TINY,
        f"data.root={phantom}",
        f"run.out={out}",
        "encoder=random",
        "data.neighbours=1",
        "optim.steps=40",
    )
    case = sorted((phantom / "images").iterdir())[0]
    files = sorted(case.iterdir())
    spacing = (1.0, 1.0, 1.0)
    voxels = np.stack([read_slice(path)[::-1, ::-1].T for path in files], axis=2).astype(np.int16)
    affine = np.diag([*spacing, 1.0])
    nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "ct.nii.gz")
    sliced = tmp_path / "sliced"
    commands.main(["slice", "--images", str(tmp_path / "ct.nii.gz"), "--out", str(sliced)])
    insist = "data.insist=true"
    evaluate(*TINY, f"run.out={out}", insist, "--predict", tmp_path / "ct.nii.gz", "--out", tmp_path / "v")
    evaluate(*TINY, f"run.out={out}", insist, "--predict", sliced, "--out", tmp_path / "s")
    volume = np.asarray(nibabel.load(tmp_path / "v/ct.nii.gz").dataobj)
    slices = [np.asarray(Image.open(path)) for path in sorted(Path(tmp_path / "s").rglob("*.png"))]
    assert np.array_equal(np.stack([mask[::-1, ::-1].T for mask in slices], axis=2), volume)
    assert len(np.unique(volume)) > 1


def test_a_classification_takes_neighbours(pretrained, phantom, tmp_path):
    pytest.importorskip("sklearn")
    arguments = [f"data.root={phantom}", f"encoder={pretrained}", f"run.out={tmp_path}/knn", "mode=knn"]
    arguments += ["labels.columns=[liver,stomach]", "labels.min_pixels=5", "references=[random,raw]"]
    assert eval_cls.main([*arguments, "run.device=cpu", "data.workers=0"]) == 0
    assert json.loads((tmp_path / "knn/results.json").read_text())["data"]["neighbours"] == 1


def test_weights_of_three_channels_load_as_they_are(tmp_path):
    colour = Encoder("tiny", 3)
    torch.save(colour.export_state_dict(), tmp_path / "colour.pth")
    encoder = Encoder("tiny", 3)
    said = str(load_encoder_weights(encoder, tmp_path / "colour.pth"))
    assert torch.equal(encoder.conv1.weight, colour.conv1.weight) and "summed" not in said


def test_more_than_one_neighbour_is_refused(train, tmp_path):
    from engine.config import ConfigError

    with pytest.raises(ConfigError, match=r"data\.neighbours: .*0 or 1"):
        train("pre", "data.neighbours=2")
