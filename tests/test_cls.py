"""eval_cls.py from the settings to the results, on a small phantom and a tiny network."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade import put

pytest.importorskip("sklearn")
import eval_cls
from ct.properties import class_names
from ct.slices import read_mask
from data import DataError
from engine.config import ConfigError
from models import Encoder

PROJECT = Path(eval_cls.__file__).parent
CHOSEN = "labels.columns=[liver,stomach]"
TINY = ["encoder=random", "model.arch=tiny", "data.workers=0", "labels.min_pixels=5", "optim.batch_size=4"]
TINY += ["optim.steps=4", "eval.every=2", "log.every=1"]


def evaluate(root, out, *overrides):
    assert eval_cls.main([*TINY, f"data.root={root}", f"run.out={out}", *overrides]) == 0
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("mode", ("knn", "logistic", "finetune"))
def test_organs_in_masks(phantom, tmp_path, capsys, mode):
    out = tmp_path / "run"
    found = evaluate(phantom, out, f"mode={mode}", CHOSEN)
    assert list(found["metrics"]) == ["mAP", "AUROC"] and list(found["references"]) == ["raw"]
    for one in (found, *found["references"].values()):
        for metric in one["metrics"].values():
            assert list(metric["classes"]) == ["liver", "stomach"]
            assert 0 <= metric["value"] <= 1 and metric["interval"] is None  # of one test case
    assert found["references"]["raw"]["gain"]["mAP"]["value"] == pytest.approx(
        found["metrics"]["mAP"]["value"] - found["references"]["raw"]["metrics"]["mAP"]["value"]
    )
    kinds = (
        ["all trained"]
        if mode == "finetune"
        else [f"layer{i} {how}" for i in range(1, 5) for how in ("mean", "grid")]
    )
    assert list(found["features"]) == [kind for kind in kinds if kind in found["features"]]
    rows = list(csv.reader((out / "scores.csv").read_text().splitlines()))
    assert rows[0] == ["slice", "case", "liver", "stomach"] and len(rows) == 7
    assert found["slices"]["train"] == {"slices": 18, "cases": 3}
    printed = (out / "table.md").read_text()
    capsys.readouterr()
    evaluate(phantom, out, f"mode={mode}", CHOSEN)
    assert "finished already" in (said := capsys.readouterr().out) and printed in said
    with pytest.raises(ConfigError, match="seed: .* holds a run with 0, not 1"):
        evaluate(phantom, out, f"mode={mode}", CHOSEN, "seed=1")
    assert eval_cls.main(["--compare", str(out)]) == 0
    assert f"{mode}: mAP %" in capsys.readouterr().out


def test_fine_tuning_resumes_to_the_same_scores(phantom, tmp_path):
    evaluate(phantom, tmp_path / "whole", "mode=finetune", CHOSEN, "references=[]")
    before = eval_cls.scores_of

    def stop(model, batches, process, desc):
        if desc == "test slices":
            raise KeyboardInterrupt
        return before(model, batches, process, desc)

    eval_cls.scores_of = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            evaluate(phantom, tmp_path / "cut", "mode=finetune", CHOSEN, "references=[]")
    finally:
        eval_cls.scores_of = before
    assert (tmp_path / "cut/checkpoint.pth").is_file()
    evaluate(phantom, tmp_path / "cut", "mode=finetune", CHOSEN, "references=[]")
    assert (tmp_path / "cut/scores.csv").read_text() == (tmp_path / "whole/scores.csv").read_text()


@pytest.fixture
def encoder_file(tmp_path):
    """encoder.pth of 8-bit slices, and its card."""
    torch.manual_seed(5)
    torch.save(Encoder("tiny").export_state_dict(), tmp_path / "encoder.pth")
    normalisation = {"window": [0.0, 255.0], "mean": 0.5, "std": 0.25}
    card = {"arch": "tiny", "in_channels": 1, "normalisation": normalisation}
    (tmp_path / "encoder.json").write_text(json.dumps(card))
    return tmp_path / "encoder.pth"


@pytest.fixture
def table_set(tmp_path):
    """Eight cases of four slices, without lists; odd cases are brighter, and labels.csv says so."""
    root, rng = tmp_path / "set", np.random.default_rng(0)
    lines = ["case,contrast"]
    for case in range(8):
        lines.append(f"c{case},{'no' if case % 2 else 'yes'}")
        for index in range(4):
            image = rng.integers(1000, 1100, (32, 32)) + 80 * (case % 2)
            put(root / f"images/c{case}/{index}.png", image.astype(np.uint16))
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("mode", ("knn", "svm", "lowshot"))
def test_a_table_by_folds_of_cases(table_set, tmp_path, mode):
    found = evaluate(table_set, tmp_path / "run", f"mode={mode}", "labels.table=labels.csv", "labels.folds=4")
    assert list(found["metrics"])[:2] == ["accuracy", "AUROC"]
    low, high = found["metrics"]["AUROC"]["interval"]
    assert found["feature"] == "by fold" and 0.9 < low <= found["metrics"]["AUROC"]["value"] <= high
    assert list(found["metrics"]["accuracy"]["classes"]) == ["no", "yes"]
    rows = list(csv.reader((tmp_path / "run/scores.csv").read_text().splitlines()))
    assert len(rows) == 33 and rows[0] == ["slice", "case", "no", "yes"]


def test_a_set_without_cases_says_so_once(table_set, tmp_path, capsys):
    names = []
    for index, path in enumerate(sorted(table_set.glob("images/*/*.png"))):
        for split in ("train", "test"):
            put(table_set / f"images/{split}/{index}.png", path.read_bytes())
        names.append((index, "yes" if path.parent.name[1:] in "0246" else "no"))
    for split in ("train", "test"):
        (table_set / f"{split}.txt").write_text("".join(f"{split}/{index}.png\n" for index, _ in names))
    rows = [f"{split}/{index},{label}\n" for split in ("train", "test") for index, label in names]
    (table_set / "labels.csv").write_text("slice,contrast\n" + "".join(rows))
    found = evaluate(table_set, tmp_path / "run", "mode=knn", "labels.table=labels.csv", "data.val=null")
    assert capsys.readouterr().out.count("no list has more than one case") == 1
    assert found["slices"]["test"] == {"slices": 32, "cases": None}
    assert found["metrics"]["AUROC"]["interval"] is not None  # over slices


@pytest.mark.parametrize("mode", ("knn", "svm", "finetune"))
def test_organs_that_no_training_slice_shows_are_left_out(phantom, tmp_path, capsys, mode):
    """As of a small field of view, and an organ that all of them show; the others are judged as if there were
    none such."""
    root = tmp_path / "set"
    shutil.copytree(phantom, root)
    organs = class_names(root, None)
    everywhere, nowhere = organs.index("gallbladder"), organs.index("left adrenal gland")
    for split in ("train", "val", "test"):
        for name in (root / f"{split}.txt").read_text().split():
            mask = read_mask(root / "masks" / name).copy()
            mask[mask == nowhere] = 0
            mask[:2] = everywhere
            put(root / "masks" / name, mask.astype(np.uint8))
    names = "labels.columns=[liver,gallbladder,stomach,left adrenal gland]"
    found = evaluate(root, tmp_path / "run", f"mode={mode}", names, "references=[raw]")
    warned = capsys.readouterr().err
    for one in (found, *found["references"].values()):
        for metric in one["metrics"].values():
            classes = metric["classes"]
            assert classes["gallbladder"] is classes["left adrenal gland"] is None
            assert metric["value"] == pytest.approx((classes["liver"] + classes["stomach"]) / 2)
    named = [text for text in found["warnings"] if "gallbladder" in text or "adrenal" in text]
    assert len(named) == 1 and warned.count("gallbladder") == warned.count("adrenal") == 1
    assert named[0] == (
        "train.txt: none or all training slices have: gallbladder, left adrenal gland; "
        "no value there, left out of means"
    )
    rows = list(csv.reader((tmp_path / "run/scores.csv").read_text().splitlines()))
    assert all(row[3] == row[5] == "" and row[2] and row[4] for row in rows[1:])
    if mode != "finetune":
        rest = evaluate(root, tmp_path / "rest", f"mode={mode}", CHOSEN, "references=[]")
        for metric in ("mAP", "AUROC"):
            assert rest["metrics"][metric]["value"] == found["metrics"][metric]["value"]
    with pytest.raises(DataError) as raised:
        only = "labels.columns=[gallbladder,left adrenal gland]"
        evaluate(root, tmp_path / "none", f"mode={mode}", only)
    assert str(raised.value) == (
        "train.txt: none or all 18 training slices have each organ (labels.min_pixels=5): nothing to learn"
    )


@pytest.mark.parametrize("mode", ("knn", "lowshot"))
def test_a_class_of_one_case_is_left_out_of_folds_and_named(table_set, tmp_path, capsys, mode):
    text = (table_set / "labels.csv").read_text()
    (table_set / "labels.csv").write_text(text.replace("c0,yes", "c0,rare"))
    found = evaluate(table_set, tmp_path / "run", f"mode={mode}", "labels.table=labels.csv", "labels.folds=4")
    for metric in found["metrics"].values():
        assert metric["classes"]["rare"] is None and None not in (metric["value"], metric["classes"]["no"])
    models = "1 of 4 folds" if mode == "knn" else "10 of 25 draws"
    named = f"labels.folds: none or all training slices have: rare (in {models}); no value there"
    assert [text.startswith(named) for text in found["warnings"]].count(True) == 1
    printed = capsys.readouterr()
    assert printed.err.count("rare (in") == 1 and "| rare |" in " ".join(printed.out.split())


def test_fine_tuning_without_a_value_on_validation_cases_keeps_the_last_model(table_set, tmp_path):
    rows = [f"c{case}/{index}.png" for case in range(8) for index in range(4)]
    for split, cases in (("train", "2345"), ("val", "1"), ("test", "067")):
        own = [row for row in rows if row[1] in cases]
        (table_set / f"{split}.txt").write_text("\n".join(own) + "\n")
    table = ["case,a,b", *(f"c{case},{int(case % 2 == 0)},{int(case < 4)}" for case in range(8))]
    (table_set / "labels.csv").write_text("\n".join(table) + "\n")
    found = evaluate(table_set, tmp_path / "run", "mode=finetune", "labels.table=labels.csv", "references=[]")
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {row["val_mAP"] for row in log if "val_mAP" in row} == {None}
    assert "val.txt: none or all slices have: a, b; left out of means there" in found["warnings"]
    assert found["metrics"]["AUROC"]["value"] is not None


def test_what_cannot_be_judged_is_one_line(phantom, table_set, tmp_path):
    def refused(root, message, *overrides, error=DataError):
        with pytest.raises(error, match=message) as raised:
            evaluate(root, tmp_path / "refused", *overrides)
        assert "\n" not in str(raised.value)

    refused(
        phantom,
        r"none or all 18 training slices have each organ \(labels.min_pixels=4000\): nothing to learn$",
        "labels.min_pixels=4000",
        CHOSEN,
    )
    refused(
        phantom,
        "labels.columns: no organ heart; there are spleen",
        "labels.columns=[heart]",
        error=ConfigError,
    )
    refused(phantom, "no such table", "labels.table=none.csv")
    table = ("labels.table=labels.csv", "labels.folds=4")
    refused(table_set, "has no age; it has contrast", *table, "labels.columns=[age]", error=ConfigError)
    refused(
        table_set,
        "20 folds of cases are needed, and there are 8",
        *table[:1],
        "labels.folds=20",
        error=ConfigError,
    )
    refused(phantom, "a path", "encoder=null", CHOSEN, error=ConfigError)
    refused(phantom, "raw is for references", "encoder=raw", CHOSEN, error=ConfigError)
    refused(phantom, "references", "references=[3]", CHOSEN, error=ConfigError)
    refused(phantom, "0 with mode=finetune", "mode=finetune", "labels.folds=3", error=ConfigError)
    (table_set / "labels.csv").write_text("case,contrast\nc0,yes\nc1,no\nc99,no\n")
    refused(table_set, "1 of 3 cases do not exist, the first c99", *table)
    (table_set / "labels.csv").write_text("case,contrast\n" + "".join(f"c{i},no\n" for i in range(8)))
    refused(table_set, "all slices have the label no", *table)
    rows = "".join(f"c{i},{'no' if i < 5 else 'yes'},{int(i > 5)}\n" for i in range(8))
    (table_set / "labels.csv").write_text("case,x,y\n" + rows)
    for split, cases in (("train", "01234"), ("test", "567")):
        names = [f"c{case}/{index}.png\n" for case in cases for index in range(4)]
        (table_set / f"{split}.txt").write_text("".join(names))
    lists = ("labels.table=labels.csv", "data.val=null")
    refused(
        table_set,
        "none or all 20 training slices have each class: nothing to learn",
        *lists,
        "labels.columns=[x]",
    )
    (table_set / "train.txt").write_text("".join(f"c{case}/0.png\n" for case in "456"))
    (table_set / "test.txt").write_text("".join(f"c{case}/0.png\n" for case in "013"))
    refused(table_set, "none or all test slices have each class that can be learnt", *lists)


def test_a_case_on_both_sides_is_refused(phantom, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(phantom, root)
    names = (root / "train.txt").read_text().splitlines()
    (root / "test.txt").write_text(names[0] + "\n" + names[-1] + "\n")
    (root / "train.txt").write_text("\n".join(names[1:-1]) + "\n")
    with pytest.raises(DataError, match="2 cases or patients are in the test and training lists"):
        evaluate(root, tmp_path / "run", "mode=knn", CHOSEN)


def test_a_missing_extra_is_named(phantom, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ConfigError, match="pip install scikit-learn"):
        evaluate(phantom, tmp_path / "run", "mode=knn", CHOSEN)


def test_two_processes_fine_tune_one_model(phantom, tmp_path, free_port):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [f"--master_port={free_port}", "tests/tiny.py", "eval_cls.py", *TINY, f"data.root={phantom}"]
    command += [f"run.out={tmp_path}/run", "mode=finetune", "references=[raw]", CHOSEN]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("results.json") == 1
    rows = list(csv.reader((tmp_path / "run/scores.csv").read_text().splitlines()))
    assert len(rows) == 7 and all(np.isfinite(float(score)) for row in rows[1:] for score in row[2:])


def test_smaller_shares_of_the_labels_are_parts_of_larger_ones(phantom, tmp_path):
    for fraction, cases in ((0.01, None), (0.67, 2), (1.0, 3)):
        found = evaluate(phantom, tmp_path / str(cases), "mode=knn", f"label_fraction={fraction}", CHOSEN)
        assert found["slices"]["train"]["cases"] == cases
    # of one case, as the test list has here, nothing can be divided by case


def test_from_a_file_of_medmnist_to_metrics(tmp_path, encoder_file):
    """Slices of one of two brightnesses, as labels say; three channels, and an encoder with a card."""
    from prepare import commands

    rng, content = np.random.default_rng(0), {}
    for part, count in (("train", 24), ("val", 8), ("test", 12)):
        labels = rng.integers(0, 2, (count, 1), dtype=np.uint8)
        labels[:2, 0] = 0, 1
        noise = rng.integers(0, 60, (count, 32, 32), dtype=np.uint8)
        content |= {f"{part}_images": noise + 120 * labels[:, :, None], f"{part}_labels": labels}
    np.savez(tmp_path / "organ.npz", **content)
    root = tmp_path / "set"
    assert commands.main(["medmnist", str(tmp_path / "organ.npz"), "--out", str(root)]) == 0
    for mode in ("knn", "logistic", "finetune"):
        settings = [f"mode={mode}", "labels.table=labels.csv", f"encoder={encoder_file}", "model.arch=null"]
        found = evaluate(root, tmp_path / mode, *settings, "optim.steps=60", "eval.every=10")
        assert list(found["references"]) == ["random", "raw"]
        assert found["metrics"]["accuracy"]["value"] > 0.8
        assert found["slices"]["test"] == {"slices": 12, "cases": None}
