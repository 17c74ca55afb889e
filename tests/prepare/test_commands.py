"""prepare/commands.py: packing, showing, and what the command line refuses."""

import json
import pickle

import numpy as np
import pytest
import torch
from handmade import one_line_of, put, random_set, run
from PIL import Image

from augment import TwoViews
from ct import organs
from ct.slices import DataError
from data import SegmentationDataset, SliceDataset


def test_pack(phantom, tmp_path, capsys):
    name = tmp_path / "sub/packed"
    code, output, _ = run(capsys, "pack", "--root", phantom, "--list", "train.txt", "--out", name)
    assert code == 0 and "18 slices of 48 x 48 px; cases: 3" in output
    slices = SliceDataset(phantom, "train.txt")
    array = np.load(tmp_path / "sub/packed.npy")
    assert array.shape == (18, 48, 48) and array.dtype == np.int16
    about = json.loads((tmp_path / "sub/packed.json").read_text())
    assert about["names"] == slices.names and {*about["spacing"]} >= {*about["cases"]}
    for root in (name, f"{name}.npy", f"{name}.json"):
        packed = pickle.loads(pickle.dumps(SliceDataset(root, "any.txt")))
        assert packed.names == slices.names and packed.cases == slices.cases and packed.kind == "hu"
        assert all(torch.equal(packed[index], slices[index]) for index in range(18))
        assert torch.equal(packed[-1], slices[17])
    with pytest.raises(DataError, match="holds no masks"):
        SegmentationDataset(name, "train.txt")
    (tmp_path / "sub/packed.json").write_text(json.dumps(about | {"names": about["names"][1:]}))
    with pytest.raises(DataError, match="names: a list of 18"):
        SliceDataset(name)
    (tmp_path / "sub/packed.json").write_text(json.dumps(about | {"cases": [*range(18)]}))
    with pytest.raises(DataError, match="cases: a list of 18"):
        SliceDataset(name)
    (tmp_path / "sub/packed.json").unlink()
    with pytest.raises(DataError, match="packed.json"):
        SliceDataset(name)


def test_show(phantom, tmp_path, capsys):
    code, _, error = run(
        capsys, "show", "--root", phantom, "--list", "train.txt", "--out", tmp_path / "a.png"
    )
    assert code == 0, error
    page = np.array(Image.open(tmp_path / "a.png"))
    assert (page == organs.ORGAN_COLORS[6]).all(2).sum() > 200  # the outlines of the liver
    code, _, error = run(
        capsys,
        "show",
        "--root",
        phantom,
        "--list",
        "train.txt",
        "--views",
        "--count",
        2,
        "--out",
        tmp_path / "b.png",
    )
    assert code == 0 and Image.open(tmp_path / "b.png").width > 800, error


def test_show_outlines_what_a_turned_view_shows(tmp_path, capsys):
    """The middles of its four sides, from its box and its matrix by hand, are cyan or under orange."""
    random_set(tmp_path, shape=(40, 40))
    strengths = {"rotate": 30.0, "shear": 0.2, "translate": 0.1}
    show = ("show", "--root", tmp_path, "--list", "train.txt", "--out", tmp_path / "a.png", "--views")
    words = [word for name, value in strengths.items() for word in (f"--{name}", value)]
    code, _, error = run(capsys, *show, "--count", 3, *words)
    assert code == 0, error
    page = np.array(Image.open(tmp_path / "a.png")).astype(int)
    box = TwoViews(40, flip=0.5, **strengths)(torch.zeros(3, 1, 40, 40), torch.Generator().manual_seed(0))[2]
    seen = 0
    for row, (x0, y0, x1, y1, _, a, b, c, d) in enumerate(box.tolist()):
        for u, v in ((0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5)):
            place = x0 + (x1 - x0) * (0.5 + a * u + b * v), y0 + (y1 - y0) * (0.5 + c * u + d * v)
            if min(place) > 0.02 and max(place) < 0.98:
                x, y = (round(8 + 287 * share) for share in place)
                near = page[y - 3 + 312 * row : y + 4 + 312 * row, x - 3 : x + 4].reshape(-1, 3)
                assert (np.abs(near - (70, 240, 240)).max(1) < 30).sum() > 5, (row, u, v)
                seen += 1
    assert seen > 5
    code, _, error = run(capsys, *show, "--rotate", 200)
    assert code == 2 and one_line_of(error) and "--rotate" in error


def test_show_names_what_it_cannot_read_and_goes_on(tmp_path, capsys):
    names = random_set(tmp_path)
    (tmp_path / "images" / names[0]).write_bytes(b"damaged")
    (tmp_path / "masks" / names[1]).write_bytes(b"damaged")
    (tmp_path / "images" / names[2]).unlink()
    show = ("show", "--root", tmp_path, "--list", "train.txt", "--out", tmp_path / "page.png")
    code, output, error = run(capsys, *show)
    assert code == 0 and "6 of 8 slices" in output and (tmp_path / "page.png").exists()
    said = [line for line in error.splitlines() if "passed over" in line]
    assert len(said) == 2 and names[0] in said[0] and f"masks/{names[1]}" in said[1]
    for name in names:
        (tmp_path / "images" / name).unlink(missing_ok=True)
    put(tmp_path / "images" / names[0], b"damaged")
    code, _, error = run(capsys, *show)
    assert code == 2 and "not a PNG, JPEG, TIFF or BMP image" in error


def test_show_draws_values_as_stored(tmp_path, capsys):
    random_set(tmp_path)
    show = ("show", "--root", tmp_path, "--hu-offset", 0, "--out", tmp_path / "page.png")
    assert run(capsys, *show)[0] == 0
    assert np.ptp(np.array(Image.open(tmp_path / "page.png"))[20:100, 20:100]) > 200


def test_command_line_errors_are_one_line(tmp_path, capsys):
    random_set(tmp_path / "set")
    (tmp_path / "file").write_text("")
    wrong = [
        ("phantom", "--out", tmp_path / "file"),
        ("phantom", "--out", tmp_path / "p", "--cases", 1),
        ("phantom", "--out", tmp_path / "p", "--cases", "many"),
        ("phantom",),
        ("packk",),
        (),
        ("pack", "--root", tmp_path / "set", "--list", "nope.txt", "--out", tmp_path / "p"),
        ("check", "--root", tmp_path / "nowhere"),
        ("show", "--root", tmp_path / "set", "--list", "train.txt", "--out", tmp_path / "file/page.png"),
        ("slice", "--images", tmp_path / "nope.nii", "--out", tmp_path / "s"),
        ("show", "--root", tmp_path / "set", "--list", "train.txt", "--out", tmp_path),
    ]
    for argv in wrong:
        code, _, error = run(capsys, *argv)
        assert code == 2 and one_line_of(error), (argv, error)
