"""data.py openkbp, on small files in the layout of OpenKBP's repository, and on its own where they are."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
import torch
from handmade import ROOT, one_line_of, run
from PIL import Image

from ct.layout import read_list
from ct.properties import read_properties
from data import SegmentationDataset
from losses import segmentation_loss
from prepare.openkbp import ORGANS, SURROUNDINGS, Patient, longest_run, read_case

CONVERTED = ROOT.parent / "shared/openkbp"
CLONE = os.environ.get("OPEN_KBP") or ROOT.parent / "shared/open-kbp"
FOUR = ("Brainstem", "SpinalCord", "RightParotid", "LeftParotid")
SLICES = range(40, 66)  # that are to be kept


def patient_files(folder, organs=FOUR, seed=0, ct=True, slices=SLICES):
    """A patient's CSV files -> stored values and {organ: its voxels}, arrays (128, 128, 128) as they count.

    The slice before those to be kept has a pixel too few outside the organs, and many inside; another run,
    apart, is shorter.
    """
    rng = np.random.default_rng(seed)
    stored = np.zeros((128, 128, 128), int)
    voxels = {organ: np.zeros(stored.shape, bool) for organ in organs}
    side = slice(50, 50 + 30)
    for index in (*slices, *range(100, 103)):
        stored[side, 40:70, index] = rng.integers(1, 4096, (30, 30))
    stored[side, 40:70, slices[0] - 1] = 0
    stored.transpose(2, 0, 1)[slices[0] - 1].flat[: SURROUNDINGS - 1] = 1000
    for number, organ in enumerate(organs):
        voxels[organ][52 + 3 * number : 56 + 3 * number, 45:48, slices[0] + number - 1 : slices[-1]] = True
        stored[voxels[organ]] = np.maximum(stored[voxels[organ]], 1)
    folder.mkdir(parents=True)
    for organ, where in voxels.items():
        (folder / f"{organ}.csv").write_text(",data\n" + "".join(f"{i},\n" for i in np.flatnonzero(where)))
    flat = stored.ravel()
    text = "".join(f"{i},{flat[i]:.1f}\n" for i in np.flatnonzero(flat))
    if ct:
        (folder / "ct.csv").write_text(",data\n" + text)
    (folder / "voxel_dimensions.csv").write_text("3.906e+00\n4.0e+00\n2.5e+00\n")
    return stored, voxels


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The folder, and what its patients are made of: pt_2 lacks the left parotid, pt_242 the brainstem, pt_3
    a CT; of pt_4 too few slices can be kept."""
    root = tmp_path_factory.mktemp("openkbp")
    data = root / "open-kbp/provided-data"
    more = (*FOUR, "Mandible")
    made = {
        "pt_1": patient_files(data / "train-pats/pt_1", more),
        "pt_2": patient_files(data / "train-pats/pt_2", FOUR[:3], seed=2),
        "pt_10": patient_files(data / "train-pats/pt_10", seed=10),
        "pt_201": patient_files(data / "validation-pats/pt_201", more, seed=201),
        "pt_241": patient_files(data / "test-pats/pt_241", more, seed=241),
    }
    patient_files(data / "train-pats/pt_3", ct=False)
    patient_files(data / "train-pats/pt_4", slices=range(40, 63))
    patient_files(data / "test-pats/pt_242", FOUR[1:])
    (data / "train-pats/.ipynb_checkpoints").mkdir()
    return root / "open-kbp", made


def images_of(root, case, part="images"):
    return np.stack([np.asarray(Image.open(path)) for path in sorted((root / part / case).glob("*.png"))])


def expected(stored, voxels, organs):
    """Slices as they are to be written, voxel by voxel's rule: from the feet up, rows to posterior, columns
    to the patient's left; a voxel drawn twice is the later organ of the repository."""
    hu, masks = [], []
    for index in reversed(SLICES):
        mask = np.zeros((128, 128), np.uint8)
        for organ, file in ORGANS.items():
            if file in voxels:
                mask[voxels[file][:, :, index]] = organs.index(organ) + 1 if organ in organs else 0
        hu.append(np.minimum(stored[:, :, index] - 1000, 3071))
        masks.append(mask)
    return np.stack(hu), np.stack(masks)


def test_slices_masks_and_the_repositorys_split(clone, tmp_path, capsys):
    source, made = clone
    out = tmp_path / "set"
    code, said, error = run(capsys, "openkbp", "--source", source, "--out", out)
    assert code == 0, error
    lines = [line for line in said.splitlines() if line.startswith("left out")]
    assert [line.rpartition(": ")[2] for line in lines] == ["pt_3", "pt_2, pt_242", "pt_4"]
    assert "no ct.csv" in lines[0] and "left parotid" in lines[1] and "24 slices with 800 px" in lines[2]
    organs = [*ORGANS][:4]
    for case in ("pt_1", "pt_10", "pt_201", "pt_241"):
        hu, masks = expected(*made[case], organs)
        assert (images_of(out, case).astype(int) - 1024 == hu).all(), case
        assert (images_of(out, case, "masks") == masks).all() and {*range(5)} == {*masks.flat}, case
    lists = {path.stem: read_list(path) for path in out.glob("*.txt")}
    cases = {name: [*dict.fromkeys(one.split("/")[0] for one in own)] for name, own in lists.items()}
    assert cases == {
        "train": ["pt_1", "pt_10"],
        "val": ["pt_201"],
        "test": ["pt_241"],
        "unlabelled": ["pt_1", "pt_10"],
    }
    assert lists["test"] == [f"pt_241/{i:04d}.png" for i in range(len(SLICES))]
    known = read_properties(out)
    assert known.classes == ["background", *organs] and (known.kind, known.hu_offset) == ("hu", 1024)
    assert {*known.spacing} == {"pt_1", "pt_10", "pt_201", "pt_241"}
    assert known.spacing["pt_1"] == (2.5, 3.906, 4.0) and (known.axis, known.size) == (2, (128, 128))
    assert "MIT" in known.source and "10.1002/mp.14845" in known.source
    code, said, _ = run(capsys, "check", "--root", out)
    assert code == 0, said


def test_no_slice_gives_its_labels_away(clone, tmp_path):
    """Each has SURROUNDINGS px outside of what was drawn; the organs reach into one that has a pixel less."""
    source, made = clone
    stored, voxels = made["pt_1"]
    before = SLICES[0] - 1
    drawn = np.any([*voxels.values()], axis=0)
    outside = ((stored > 0) & ~drawn).sum((0, 1))
    assert drawn[:, :, before].any() and outside[before] == SURROUNDINGS - 1
    patient = Patient("pt_1", "train", source / "provided-data/train-pats/pt_1", complete=True)
    kept, masks, _ = read_case(patient, [*ORGANS])
    assert len(kept) == len(masks) == len(SLICES)
    assert (((kept > 0) & (masks == 0)).sum((1, 2)) >= SURROUNDINGS).all()


@pytest.mark.parametrize("seed", range(5))
def test_the_longest_run(seed):
    true = np.random.default_rng(seed).random(12) < 0.6
    runs = [range(a, b) for a in range(13) for b in range(a, 13) if true[a:b].all()]
    longest = max(runs, key=len)  # the first of several
    found = longest_run(true)
    assert (found.start, found.stop) == (longest.start, longest.stop) or not len(longest)
    assert longest_run(np.zeros(5, bool)) == slice(0, 0)


def test_an_organ_that_was_not_drawn_is_unknown(clone, tmp_path, capsys):
    source, made = clone
    organs = ["mandible", "left parotid", "spinal cord"]
    words = ("openkbp", "--source", source / "provided-data", "--out", tmp_path / "set")
    code, said, error = run(capsys, *words, "--organs", "Mandible,parotid_left,spinal_cord")
    assert code == 0, error
    out = tmp_path / "set"
    assert read_properties(out).classes == ["background", *organs]
    lists = {path.stem: read_list(path) for path in out.glob("*.txt")}
    cases = {name: {one.split("/")[0] for one in own} for name, own in lists.items()}
    partial = {"train_partial": {"pt_1", "pt_2", "pt_10"}, "unlabelled": {"pt_1", "pt_2", "pt_10"}}
    assert cases == {"train": {"pt_1"}, "val": {"pt_201"}, "test": {"pt_241"}} | partial
    assert (images_of(out, "pt_1", "masks") == expected(*made["pt_1"], organs)[1]).all()
    truth = expected(*made["pt_2"], organs)[1]
    masks = images_of(out, "pt_2", "masks")
    assert (masks == np.where(truth == 0, 255, truth)).all() and {*masks.flat} == {3, 255}
    shown = {f"pt_2/{i:04d}.png" for i in np.flatnonzero(truth.any((1, 2)))}
    assert 0 < len(shown) < len(truth)
    assert {name for name in lists["train_partial"] if name.startswith("pt_2/")} == shown
    assert {*lists["train"]} < {*lists["train_partial"]}
    dataset = SegmentationDataset(out, "train_partial.txt", num_classes=4)
    mask = dataset[dataset.names.index(min(shown))][1]
    logits = torch.zeros(1, 4, *mask.shape, requires_grad=True)
    segmentation_loss(logits, mask[None]).backward()
    assert ((logits.grad != 0).any(1)[0] == (mask == 3)).all()  # nothing is learnt where an organ may be
    for wrong in ("liver", "mandible,mandible", "", "mandible,"):
        code, _, error = run(capsys, *words, "--organs", wrong)
        assert code == 2 and one_line_of(error) and "brainstem" in error, wrong


def test_again_and_after_an_interruption(clone, tmp_path, capsys):
    source, _ = clone
    words = ("openkbp", "--source", source, "--out", tmp_path / "set")
    assert run(capsys, *words, "--organs", "mandible,brainstem")[0] == 0
    assert (tmp_path / "set/train_partial.txt").exists()
    assert run(capsys, *words)[0] == 0
    whole = {path: path.read_bytes() for path in (tmp_path / "set").rglob("*.[pjt]*") if path.is_file()}
    assert tmp_path / "set/train_partial.txt" not in whole and not [*(tmp_path / "set/images/pt_2").glob("*")]
    (tmp_path / "set/train.txt").unlink()  # as after a kill
    (tmp_path / "set/masks/pt_10/0003.png").unlink()
    (tmp_path / "set/images/pt_10/0003.png.med-moco.part").write_bytes(b"half")
    assert run(capsys, *words)[0] == 0
    assert {path: path.read_bytes() for path in whole} == whole
    edited = tmp_path / "set/masks/pt_1/0001.png"
    edited.write_bytes(b"edited")
    code, _, error = run(capsys, *words)
    assert code == 2 and one_line_of(error) and str(edited) in error and edited.read_bytes() == b"edited"
    assert all((tmp_path / "set" / f"{split}.txt").exists() for split in ("train", "val", "test"))


def test_wrong_folders(clone, tmp_path, capsys):
    source, _ = clone
    (tmp_path / "open-kbp.zip").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    data = source / "provided-data"
    for given, out, said in (
        (tmp_path / "none", "set", "no such folder"),
        (tmp_path / "open-kbp.zip", "set", "unpack"),
        (tmp_path / "empty", "set", "a clone of github.com/ababier/open-kbp"),
        (source.parent, "set", "a clone of github.com/ababier/open-kbp"),
        (data / "train-pats", "set", "a clone of github.com/ababier/open-kbp"),
        (source, source / "set", "choose a folder elsewhere"),
        (data, data / "train-pats/set", "choose a folder elsewhere"),
        (source, source, "choose"),
        (source, tmp_path / "full", "choose"),
    ):
        code, _, error = run(capsys, "openkbp", "--source", given, "--out", tmp_path / out)
        assert code == 2 and one_line_of(error) and said in error, (given, out, error)
    assert not (tmp_path / "set").exists() and not (source / "set").exists()


def damaged(name, change):
    def apply(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(change(content))

    return name, apply


@pytest.mark.parametrize(
    "name, damage",
    [
        damaged("ct.csv", lambda content: b""),
        damaged("ct.csv", lambda content: content[: len(content) // 2].rstrip(b"\n")),
        damaged("ct.csv", lambda content: content[100:]),
        damaged("ct.csv", lambda content: content.replace(b",1000.0\n", b",1000.5\n", 1)),
        damaged("ct.csv", lambda content: content.replace(b",1000.0\n", b",-1.0\n", 1)),
        damaged("ct.csv", lambda content: content.replace(b",1000.0\n", b",nan\n", 1)),
        damaged("ct.csv", lambda content: content.replace(b",1000.0\n", b",\n", 1)),
        damaged("ct.csv", lambda content: content.replace(b",1000.0\n", b",1e9\n", 1)),
        damaged("ct.csv", lambda content: content + b"2097152,5.0\n"),
        damaged("ct.csv", lambda content: content + content[-10:].partition(b"\n")[2] + b"7,5.0\n"),
        damaged("ct.csv", lambda content: b"\x89PNG" + content),
        damaged("Brainstem.csv", lambda content: content[:5000] + b"\xff\x00" + content[5000:]),
        damaged("Brainstem.csv", lambda content: content + b"-3,\n"),
        damaged("SpinalCord.csv", lambda content: content + content.split(b"\n")[-2] + b"\n"),
        damaged("voxel_dimensions.csv", lambda content: b"3.9\n3.9\n"),
        damaged("voxel_dimensions.csv", lambda content: b"3.9\n3.9\n0\n"),
        damaged("voxel_dimensions.csv", lambda content: b"three\n"),
    ],
)
def test_damaged_files_are_named(clone, tmp_path, name, damage):
    folder = shutil.copytree(clone[0] / "provided-data/train-pats/pt_10", tmp_path / "pt_10")
    damage(folder)
    with pytest.raises(ValueError, match=rf"{folder}/{name}: .*(damaged|cut short)") as found:
        read_case(Patient("pt_10", "train", folder, complete=True), [*ORGANS][:4])
    assert "\n" not in str(found.value)


def test_a_damaged_case_ends_in_a_line_and_without_lists(clone, tmp_path, capsys):
    source = shutil.copytree(clone[0], tmp_path / "in")
    (source / "provided-data/test-pats/pt_241/ct.csv").write_text(",data\n5")
    words = ("openkbp", "--source", source, "--out", tmp_path / "set")
    code, _, error = run(capsys, *words)
    assert code == 2 and one_line_of(error) and "pt_241/ct.csv" in error
    assert not [*(tmp_path / "set").glob("*.txt")]
    shutil.copytree(source / "provided-data/train-pats/pt_1", source / "provided-data/test-pats/pt_1")
    code, _, error = run(capsys, *words)
    assert code == 2 and one_line_of(error) and "pt_1 is in two" in error


@pytest.mark.skipif(not (CONVERTED / "cases.csv").is_file(), reason="no ../shared/openkbp")
@pytest.mark.skipif(
    not os.path.isdir(CLONE), reason="no clone of ababier/open-kbp; OPEN_KBP=FOLDER names one"
)
def test_slicing_files_that_another_program_converted_makes_the_same_set(tmp_path, capsys):
    """Voxel for voxel, of the first patient of each split of whom all organs were drawn."""
    pytest.importorskip("nibabel")
    with open(CONVERTED / "cases.csv") as file:
        rows = [row for row in csv.DictReader(file) if all(row[organ] == "1" for organ in [*row][6:])]
    chosen = {row["split"]: row["case"] for row in reversed(rows)}
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
        for case in chosen.values():
            os.symlink(CONVERTED / name / f"{case}.nii.gz", tmp_path / name / f"{case}.nii.gz")
    for split, case in chosen.items():
        folder = f"provided-data/{split}-pats"
        (tmp_path / folder).mkdir(parents=True)
        name = case.removeprefix(f"{split}_")
        os.symlink(os.path.join(CLONE, folder, name), tmp_path / folder / name)
    (tmp_path / "names.json").write_text(json.dumps(["background", *ORGANS]))
    words = ("--images", tmp_path / "images", "--labels", tmp_path / "labels", "--out", tmp_path / "sliced")
    code, _, error = run(capsys, "slice", *words, "--classes", tmp_path / "names.json", "--pair", "name")
    assert code == 0, error
    words = ("--source", tmp_path, "--out", tmp_path / "set/own", "--organs", ",".join(ORGANS))
    shutil.move(tmp_path / "provided-data", tmp_path / "clone/provided-data")
    code, _, error = run(capsys, "openkbp", "--source", tmp_path / "clone", *words[2:])
    assert code == 0, error
    for split, case in chosen.items():
        own = case.removeprefix(f"{split}_")
        for part in ("images", "masks"):
            found = images_of(tmp_path / "set/own", own, part)
            assert (found == images_of(tmp_path / "sliced", case, part)).all(), (case, part)
        spacing = read_properties(tmp_path / "sliced").spacing[case]
        assert read_properties(tmp_path / "set/own").spacing[own] == pytest.approx(spacing)
