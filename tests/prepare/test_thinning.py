"""prepare/thinning.py: the greedy choice beside a slow loop, near-duplicates made by hand, the page."""

import shutil

import numpy as np
import pytest
import torch
from handmade import one_line_of, put, run
from PIL import Image

from models import Encoder
from prepare import thinning
from prepare.thinning import farthest_first


def slow_farthest_first(points, count):
    """One by one, with every distance from every point to every chosen one."""
    chosen = [int(((points - points.mean(0)) ** 2).sum(1).argmin())]
    while len(chosen) < count:
        apart = np.linalg.norm(points[:, None] - points[chosen], axis=2)
        chosen.append(int(apart.min(1).argmax()))
    apart = np.linalg.norm(points[:, None] - points[chosen], axis=2)
    return chosen, apart.min(1), np.array(chosen)[apart.argmin(1)]


@pytest.mark.parametrize("pool", (1, 5, 1024))
@pytest.mark.parametrize("dimensions", (1, 2, 40))
def test_the_choice_is_that_of_a_slow_loop(monkeypatch, pool, dimensions):
    monkeypatch.setattr(thinning, "POOL", pool)
    monkeypatch.setattr(thinning, "ROWS", 50)
    points = np.random.default_rng(dimensions).normal(3, 1, (230, dimensions))
    chosen, distance, nearest = farthest_first(points, 60)
    expected, apart, by = slow_farthest_first(points, 60)
    assert chosen == expected and np.array_equal(nearest, by)
    assert np.allclose(distance, apart, atol=1e-6)


def test_copies_are_chosen_last_and_once(monkeypatch):
    monkeypatch.setattr(thinning, "POOL", 4)
    points = np.repeat(np.random.default_rng(0).normal(size=(6, 3)), 5, axis=0)
    for count in (6, 20, 30):
        chosen, distance, _ = farthest_first(points, count)
        assert len({*chosen}) == count and {index // 5 for index in chosen[:6]} == {*range(6)}
        assert distance.max() < 1e-6


@pytest.fixture
def near_duplicates(tmp_path):
    """Twelve slices that differ, in three cases; and of each two copies with noise, in other cases."""
    rng = np.random.default_rng(0)
    names = []
    for number in range(12):
        blocks = rng.integers(900, 1200, (4, 4)).repeat(16, 0).repeat(16, 1)
        for copy in ("a", "b", "c"):
            names.append(f"case{number % 3}{copy}/{number:02d}.png")
            noisy = blocks + rng.integers(-15, 16, blocks.shape) * (copy != "a")
            put(tmp_path / "images" / names[-1], noisy.astype(np.uint16))
    (tmp_path / "unlabelled.txt").write_text("\n".join(sorted(names)) + "\n")
    return tmp_path


def thin(capsys, root, *more):
    return run(capsys, "thin", "--root", root, "--list", "unlabelled.txt", *more)


def test_near_duplicates_are_what_is_left_out(near_duplicates, capsys):
    code, out, err = thin(capsys, near_duplicates, "--keep", str(1 / 3))
    assert code == 0 and err == "" and "12 of 36 slices" in out
    kept = (near_duplicates / "thinned.txt").read_text().split()
    assert sorted(name[-6:-4] for name in kept) == [f"{number:02d}" for number in range(12)]
    assert kept == [n for n in (near_duplicates / "unlabelled.txt").read_text().split() if n in kept]
    most = float(out.split(" in the middle, ")[1].split()[0])
    assert 0 < most < 15 / 400  # of the window, by noise of 15 HU that averages out
    with Image.open(near_duplicates / "thinned.png") as page:
        assert page.width > 6 * 192 and page.height > 4 * 192
    assert thin(capsys, near_duplicates, "--keep", "0.5")[0] == 0  # its own list is written anew
    assert len((near_duplicates / "thinned.txt").read_text().split()) == 18


def test_distances_are_shares_of_the_window(tmp_path, capsys):
    """Two slices 40 HU apart, of a window of 400 HU; a third one far away."""
    for name, hu in (("a", 0), ("b", 40), ("c", 240)):
        put(tmp_path / f"images/{name}/0.png", np.full((32, 32), hu + 1024, np.uint16))
    (tmp_path / "unlabelled.txt").write_text("a/0\nb/0\nc/0\n")
    assert "0.1000 at most" in thin(capsys, tmp_path, "--keep", "0.7")[1]
    assert thin(capsys, tmp_path, "--keep", "1", "--out", "all.txt")[0] == 0
    assert (tmp_path / "all.txt").read_text().split() == ["a/0.png", "b/0.png", "c/0.png"]


def test_the_features_of_an_encoder(near_duplicates, capsys):
    torch.manual_seed(0)
    encoder = Encoder("resnet18")
    weights = near_duplicates / "encoder.pth"
    torch.save(encoder.export_state_dict(), weights)
    code, out, err = thin(capsys, near_duplicates, "--keep", "0.3333", "--encoder", weights)
    assert code == 0 and "12 of 36 slices" in out and "of unit vectors" in out
    weights.write_bytes(b"no weights")
    code, _, err = thin(capsys, near_duplicates, "--keep", "0.5", "--encoder", weights)
    assert code == 2 and one_line_of(err) and "encoder.pth" in err


def test_what_is_not_its_own_stays(near_duplicates, capsys):
    before = (near_duplicates / "unlabelled.txt").read_bytes()
    for out in ("unlabelled.txt", "mine.txt"):
        shutil.copy(near_duplicates / "unlabelled.txt", near_duplicates / "mine.txt")
        code, _, err = thin(capsys, near_duplicates, "--keep", "0.5", "--out", out)
        assert code == 2 and one_line_of(err) and (near_duplicates / out).read_bytes() == before
    code, _, err = thin(capsys, near_duplicates, "--keep", "0.5", "--out", "page.png")
    assert code == 2 and one_line_of(err) and not (near_duplicates / "page.png").exists()
    for keep in ("0", "1.5", "nan", "x"):
        code, _, err = thin(capsys, near_duplicates, "--keep", keep)
        assert code == 2 and one_line_of(err) and "--keep" in err
