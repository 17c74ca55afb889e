"""prepare/lists.py: cases divided into lists."""

import json
import re
import shlex

import numpy as np
import pytest
from handmade import one_line_of, put, random_set, run

from ct.slices import DataError
from data import SegmentationDataset, SliceDataset
from prepare.lists import read_split, split_cases


def test_cases_that_a_split_leaves_out_are_said(tmp_path, capsys):
    (tmp_path / "split.json").write_text('{"train": ["a"], "test": ["b"]}')
    read_split(str(tmp_path / "split.json"), ["a", "b", "c"])
    assert capsys.readouterr().out.endswith("split.json (for pretraining only): 1: c\n")


def test_split_cases():
    for count, sizes in ((2, (1, 0, 1)), (3, (1, 1, 1)), (5, (3, 1, 1)), (40, (24, 8, 8))):
        cases = [f"case{index}" for index in range(count)]
        parts = split_cases(cases)
        assert tuple(map(len, parts.values())) == sizes
        assert sorted(sum(parts.values(), [])) == sorted(cases)


# ---- data.py list ----


def lists_in(root):
    return {path.stem: path.read_text().split() for path in root.glob("*.txt")}


def test_a_missing_list_is_written_by_the_command_that_the_message_shows(tmp_path, capsys):
    names = random_set(tmp_path / "my set", cases=[f"case{index}" for index in range(10)])
    (tmp_path / "my set/train.txt").unlink()
    with pytest.raises(DataError) as error:
        SliceDataset(tmp_path / "my set", "unlabelled.txt")
    command = re.search(r"\(python data.py (.*) writes train.txt", str(error.value)).group(1)
    assert "\n" not in str(error.value)
    code, out, _ = run(capsys, *shlex.split(command))
    assert code == 0 and "test.txt: 6 slices; cases: 2" in out
    lists = lists_in(tmp_path / "my set")
    cases = {split: {name.split("/")[0] for name in own} for split, own in lists.items()}
    assert {split: len(own) for split, own in cases.items()} == {
        "train": 6,
        "val": 2,
        "test": 2,
        "unlabelled": 6,
    }
    assert not (
        cases["train"] & cases["val"] or cases["train"] & cases["test"] or cases["val"] & cases["test"]
    )
    assert sorted(lists["train"] + lists["val"] + lists["test"]) == sorted(names)
    assert sorted(lists["unlabelled"]) == sorted(lists["train"])
    before = lists
    assert (
        run(capsys, *shlex.split(command))[0] == 0 and lists_in(tmp_path / "my set") == before
    )  # the same again
    code, out, _ = run(capsys, "check", "--root", tmp_path / "my set")
    assert code == 0 and "30 files read, 0 bad" in out


def test_a_list_of_ones_own_is_never_written_over(tmp_path, capsys):
    random_set(tmp_path)
    before = lists_in(tmp_path)
    code, _, err = run(capsys, "list", "--root", tmp_path)
    assert code == 2 and one_line_of(err) and "train.txt: would be written over" in err
    assert lists_in(tmp_path) == before
    with pytest.raises(DataError, match=r"no such list file \(there: train.txt\)$"):
        SliceDataset(tmp_path, "val.txt")


def test_only_slices_with_masks_are_for_evaluation(tmp_path, capsys):
    names = random_set(tmp_path, cases=[f"case{index}" for index in range(8)], slices=4)
    (tmp_path / "train.txt").unlink()
    for name in names:  # three cases without masks, and the others' last slices
        if name[4] in "012" or name.endswith("03.png"):
            (tmp_path / "masks" / name).unlink()
    assert run(capsys, "list", "--root", tmp_path)[0] == 0
    lists = lists_in(tmp_path)
    labelled = lists["train"] + lists["val"] + lists["test"]
    assert len(labelled) == 15 and all((tmp_path / "masks" / name).exists() for name in labelled)
    held_out = {name.split("/")[0] for name in lists["val"] + lists["test"]}
    assert lists["unlabelled"] == [name for name in names if name.split("/")[0] not in held_out]
    assert len(SegmentationDataset(tmp_path, "val.txt")) == 3


def test_a_split_into_folders_is_kept(tmp_path, capsys):
    for split in ("train", "valid", "test"):
        put(tmp_path / f"images/{split}/p{len(split)}_1.png", np.zeros((4, 4), np.uint8))
    code, out, _ = run(capsys, "list", "--root", tmp_path)
    assert code == 0 and "which is kept" in out
    expected = {"train": ["train/p5_1.png"], "val": ["valid/p5_1.png"], "test": ["test/p4_1.png"]}
    assert lists_in(tmp_path) == expected | {"unlabelled": ["train/p5_1.png"]}


def test_one_case_becomes_blocks_and_other_folders_are_named(tmp_path, capsys):
    for index in range(20):
        put(tmp_path / f"pictures/scan_{index}.png", np.full((4, 4), index, np.uint8))
    with pytest.raises(DataError, match="list --root .* --images pictures writes"):
        SliceDataset(tmp_path, images="pictures")
    assert run(capsys, "list", "--root", tmp_path, "--images", "pictures")[0] == 0
    lists = lists_in(tmp_path)
    assert [len(lists[split]) for split in ("train", "val", "test")] == [10, 3, 3]
    code, _, err = run(capsys, "list", "--root", tmp_path, "--images", "pictures/{split}")
    assert code == 2 and one_line_of(err) and "without {split}" in err


def test_sparse_annotation(tmp_path, capsys):
    """One slice in six is for training, and no test slice touches one."""
    random_set(tmp_path, cases=("a", "b", "c"), slices=20)
    for number in range(20):  # no masks of this volume, and none of the first slices of another one
        (tmp_path / f"masks/c/{number:02d}.png").unlink()
        if number < 3:
            (tmp_path / f"masks/b/{number:02d}.png").unlink()
    code, out, _ = run(capsys, "list", "--root", tmp_path, "--every", 6)
    assert code == 0 and "sparse_train.txt: 7 slices; cases: 2" in out
    lists = lists_in(tmp_path)
    of_a = {
        split: [int(name[2:4]) for name in own if name.startswith("a/")]
        for split, own in lists.items()
        if split.startswith("sparse")
    }
    assert of_a["sparse_train"] == [0, 6, 12, 18] == of_a["sparse_unlabelled"]
    assert of_a["sparse_val"] == [3, 9, 15] and of_a["sparse_test"] == [2, 4, 8, 10, 14, 16]
    assert [name for name in lists["sparse_train"] if name[0] == "b"] == ["b/03.png", "b/09.png", "b/15.png"]
    assert sum(name.startswith("c/") for name in lists["sparse_unlabelled"]) == 20
    assert "train" in lists  # that was there before
    assert run(capsys, "list", "--root", tmp_path, "--every", 6)[0] == 0
    code, _, error = run(capsys, "list", "--root", tmp_path, "--every", 4)
    assert code == 2 and one_line_of(error)


# ---- Patients ----


def patients_in(lists, patient_of):
    return {split: {patient_of(name) for name in names} for split, names in lists.items()}


@pytest.mark.parametrize(
    "name, options, patient",
    [
        ("patient{:02d}/{}/0.png", (), r"patient\d+"),  # two scans each
        ("{1}/case{0:02d}/0.png", (), r"case\d+"),
        ("IM{1}_patient{0:02d}.png", (), r"patient\d+"),
        ("IM{1}_P{0:02d}.png", ("--patient", "P[0-9]+"), r"P\d+"),
        ("all/P{0:02d}_{1}.png", ("--patient", "(P[0-9]+)_"), r"P\d+"),
    ],
)
def test_the_lists_of_slices_are_by_patient(tmp_path, capsys, name, options, patient):
    names = [name.format(number, scan) for number in range(10) for scan in ("arterial", "venous")]
    if "IM" in name:
        names = [name.format(number, f"{scan + 2 * number:03d}") for number in range(10) for scan in (1, 2)]
    for one in names:
        put(tmp_path / "images" / one, np.zeros((4, 4), np.uint8))
    code, out, error = run(capsys, "list", "--root", tmp_path, *options)
    assert code == 0, error
    lists = lists_in(tmp_path)
    found = patients_in(lists, lambda one: re.search(patient, one)[0])
    assert [len(lists[split]) for split in ("train", "val", "test")] == [12, 4, 4]
    assert not found["train"] & found["val"] and not (found["train"] | found["val"]) & found["test"]
    assert "case: " in out and found["unlabelled"] == found["train"]
    if name.startswith("patient"):
        assert "case: patient00/arterial, of patient patient00 (2 scans, by the name" in out
    dataset = SliceDataset(tmp_path, "train.txt")
    assert len({*dataset.patients}) == 6
    again = run(capsys, "list", "--root", tmp_path, *options)
    assert again[0] == 0 and lists_in(tmp_path) == lists


def test_patients_of_the_users_own_are_not_written_over(tmp_path, capsys):
    for number in range(10):
        for scan in ("arterial", "venous"):
            put(tmp_path / f"images/patient{number:02d}/{scan}/000.png", np.zeros((4, 4), np.uint8))
    (tmp_path / "patients.json").write_text("{}\n")
    code, _, error = run(capsys, "list", "--root", tmp_path)
    assert code == 2 and "patients.json" in error
    assert (tmp_path / "patients.json").read_text() == "{}\n" and not (tmp_path / "train.txt").exists()


def test_a_patient_in_two_lists_is_said(tmp_path, capsys):
    random_set(tmp_path, cases=("p1/a", "p1/b", "p2/a", "p2/b"), slices=1)
    (tmp_path / "train.txt").write_text("p1/a/00.png\np2/a/00.png\n")
    (tmp_path / "test.txt").write_text("p2/b/00.png\n")
    code, out, _ = run(capsys, "check", "--root", tmp_path)
    assert (
        "patients (by the folder) in several of train, val, test: 1, the first: p2 (in train and test)" in out
    )


def test_shares_of_labels_are_of_patients(tmp_path):
    from evaluation.supervised import training_positions

    random_set(tmp_path, cases=[f"p{number}_{scan}" for number in range(4) for scan in "ab"], slices=2)
    patients = {f"p{number}_{scan}": f"p{number}" for number in range(4) for scan in "ab"}
    (tmp_path / "patients.json").write_text(json.dumps(patients))
    dataset, before = SliceDataset(tmp_path, "train.txt"), set()
    for share in (0.25, 0.5, 1.0):
        positions = {*training_positions(dataset, share, 0)}
        assert before <= positions and len(positions) == 16 * share
        assert len({dataset.patients[i] for i in positions}) == 4 * share
        before = positions


def test_of_a_single_patient_cases_are_divided_and_fractions_count_patients():
    assert split_cases(["a", "b"], patients={"a": "p", "b": "p"}) == {
        "train": ["a"],
        "val": [],
        "test": ["b"],
    }
    cases = [f"p{number}_{scan}" for number in range(10) for scan in "ab"]
    split = read_split("0.5,0.2,0.3", cases, {case: case[:2] for case in cases})
    assert [len(own) for own in split.values()] == [10, 4, 6]
    assert not {case[:2] for case in split["train"]} & {case[:2] for case in split["test"]}
