"""A set with more slices than any sample of them takes: whole evaluations, and what they have in memory."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval_seg
from ct.properties import Properties, write_properties
from ct.slices import write_png

TINY = ["model.arch=tiny", "model.output_stride=8", "data.workers=0", "run.device=cpu", "optim.steps=20"]
TINY += ["eval.every=20", "log.every=1", "optim.batch_size=32"]
CASES = {"train": {"a": 64}, "val": {"c": 1049}, "test": {"d": 2000, "e": 49}, "few": {"f": 9}}


@pytest.fixture(scope="module")
def large_set(tmp_path_factory):
    """Slices of 16 px with a bright square, class 1, in one of 8 places; a few files under many names."""
    root, rng = tmp_path_factory.mktemp("set") / "large", np.random.default_rng(0)
    (root / "files").mkdir(parents=True)
    for place in range(8):
        mask = np.zeros((16, 16), np.uint8)
        mask[place : place + 8, 8 - place : 16 - place] = 1
        hu = np.where(mask == 1, 100, -600) + rng.normal(0, 10, mask.shape)
        write_png(root / "files" / f"image{place}.png", (1024 + hu).astype(np.uint16))
        write_png(root / "files" / f"mask{place}.png", mask)
    for split, cases in CASES.items():
        names = [f"{case}/{index:04d}.png" for case, count in cases.items() for index in range(count)]
        for part in ("image", "mask"):
            for case in cases:
                (root / f"{part}s" / case).mkdir(parents=True)
            for index, name in enumerate(names):
                os.link(root / "files" / f"{part}{index % 8}.png", root / f"{part}s" / name)
        (root / f"{split}.txt").write_text("\n".join(names))
    classes = ["background", "square"]
    write_properties(root, Properties(kind="hu", axis=2, size=(16, 16), classes=classes, made_by="a test"))
    return root


def evaluate(root, out, *overrides):
    eval_seg.main([*TINY, f"data.root={root}", f"run.out={out}", "encoder=random", *overrides])
    return json.loads((Path(out) / "results.json").read_text())


def test_linear_evaluation_and_prediction_of_more_than_2048_slices(large_set, tmp_path, capsys):
    """Features in memory, in a file or computed at each step: the same; so are the masks of --predict."""
    kept = evaluate(large_set, tmp_path / "kept")
    assert kept["effective_rank"]["slices"] == 1049 and kept["structure"]["dse"] is not None
    assert list(kept["cases"]) == ["d", "e"] and kept["mean_dice"] > 0.1
    for name, cache in (("file", "cache_gb=0.0001"), ("computed", "cache=off")):
        other = evaluate(large_set, tmp_path / name, cache, "data.test=few.txt")
        for key in ("val_dice", "effective_rank", "structure"):
            assert other[key] == kept[key], (name, key)
        logs = ((tmp_path / one / "metrics.jsonl").read_text() for one in ("kept", name))
        assert next(logs) == next(logs)
    assert "warning" not in capsys.readouterr().err
    source, out = str(large_set / "images" / "e"), str(tmp_path / "masks")
    assert eval_seg.main([*TINY, f"run.out={tmp_path}/kept", "--predict", source, "--out", out]) == 0
    counts = np.zeros(3)
    for path in Path(out).glob("*.png"):
        found, truth = (np.asarray(Image.open(one)) == 1 for one in (path, large_set / "masks/e" / path.name))
        counts += (found & truth).sum(), found.sum(), truth.sum()
    assert 2 * counts[0] / (counts[1] + counts[2]) == kept["cases"]["e"]["square"]


def test_finetuning_of_more_than_2048_slices_in_batches_of_8(large_set, tmp_path, capsys):
    settings = ["mode=finetune", "data.size=16", "optim.batch_size=8", "optim.steps=3", "eval.every=3"]
    found = evaluate(large_set, tmp_path, *settings, "data.val=test.txt", "data.test=few.txt")
    assert found["effective_rank"]["slices"] == 2048 and found["structure"]["dse"] is not None
    assert found["val_dice"] is not None and (tmp_path / "model.pth").is_file()
    assert "warning" not in capsys.readouterr().err
