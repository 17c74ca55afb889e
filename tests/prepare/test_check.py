"""prepare/check.py: what it counts, and that it names every bad file."""

import numpy as np
import pytest
from handmade import png_bytes, put, random_set, run

from ct.properties import Properties, write_properties
from ct.slices import read_mask, read_slice


def test_check_counts_by_hand(tmp_path, capsys):
    names = random_set(tmp_path, cases=("a", "b"), slices=2)
    (tmp_path / "val.txt").write_text("\n".join(names[2:]))
    (tmp_path / "train.txt").write_text("\n".join(names[:2]))
    code, output, _ = run(capsys, "check", "--root", tmp_path)
    train = np.stack([read_slice(tmp_path / "images" / name) for name in names[:2]])
    unit = np.clip((train + 160) / 400, 0, 1)
    masks = np.stack([read_mask(tmp_path / "masks" / name) for name in names])
    body = train[train > -500]
    assert code == 0 and "4 files read, 0 bad" in output and "12 x 10 px: 4 slices" in output
    assert f"mean {train.mean():.1f}, std {train.std():.1f}" in output
    assert f"mean {body.mean():.1f}, std {body.std():.1f}" in output
    assert f"data.mean={unit.mean():.4f} data.std={unit.std():.4f}" in output
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line[:5].strip().isdigit()}
    for label in range(4):
        assert rows[str(label)][-3:] == [str((masks == label).sum()), "4", "2"]


def test_check_names_every_bad_file(tmp_path, capsys):
    names = random_set(tmp_path)
    (tmp_path / "classes.json").write_text('["background", "x", "y", "z"]')
    put(tmp_path / "images" / names[0], png_bytes(np.zeros((12, 10), np.uint16))[:45])
    (tmp_path / "images" / names[1]).unlink()
    (tmp_path / "masks" / names[2]).unlink()
    put(tmp_path / "masks" / names[3], np.zeros((10, 12), np.uint8))
    put(tmp_path / "masks" / names[4], np.full((12, 10), 4, np.uint8))
    code, output, _ = run(capsys, "check", "--root", tmp_path)
    bad = [line for line in output.splitlines() if line.startswith("bad: ")]
    assert code == 1 and len(bad) == 5 and "5 bad" in output
    reasons = ("damaged", "missing", "mask", "(10, 12)", "label 4")
    for name, reason in zip(names, reasons):
        assert any(name in line and reason in line for line in bad), (name, bad)


def test_check_without_masks_and_with_leaks(tmp_path, capsys):
    for index in range(3):
        put(tmp_path / f"images/a/{index}.png", np.full((4, 4), 50 * index, np.uint8))
    (tmp_path / "train_abdomen.txt").write_text("a/0.png 0\na/1.png 0\na/2.png 0\n")
    code, output, _ = run(capsys, "check", "--root", tmp_path)
    assert code == 0 and "masks not needed" in output and "data.window=[0,255]" in output
    (tmp_path / "train.txt").write_text("a/0\na/1\n")
    (tmp_path / "test.txt").write_text("a/1\na/2\n")
    code, output, _ = run(capsys, "check", "--root", tmp_path)
    assert code == 0 and "1 slices of val or test are in other lists" in output and "the first: a" in output


def checked(capsys, root, *arguments):
    code, output, _ = run(capsys, "check", "--root", root, *arguments)
    return code, [line for line in output.splitlines() if line.startswith(("bad:", "warning:", "note:"))]


def labelled(root, pixel=1):
    names = random_set(root)
    for name in names:
        mask = np.zeros((12, 10), np.uint8)
        mask[3:6, 3:6] = pixel
        put(root / "masks" / name, mask)
    return names


def test_check_proposes_a_mask_map_for_masks_of_0_and_255(tmp_path, capsys):
    labelled(tmp_path, pixel=255)
    code, said = checked(capsys, tmp_path)
    assert code == 1 and any("data.mask_map={255: 1}" in line for line in said)
    code, said = checked(capsys, tmp_path, "--mask-map", '{"255": 1}')
    assert code == 0 and not any("data.mask_map" in line for line in said)
    code, _, error = run(capsys, "check", "--root", tmp_path, "--mask-map", "255=1")
    assert code == 2 and "JSON" in error


def test_check_proposes_the_offset_of_values_that_are_no_hu(tmp_path, capsys):
    names = labelled(tmp_path)
    rng = np.random.default_rng(0)
    for name in names:  # HU + 2048
        tissue = np.where(rng.random((12, 10)) < 0.5, 1024, rng.integers(1900, 2200, (12, 10)))
        put(tmp_path / "images" / name, tissue.astype(np.uint16))
    code, said = checked(capsys, tmp_path)
    assert code == 1 and any("HU + 1024, add that to data.hu_offset" in line for line in said)
    assert checked(capsys, tmp_path, "--hu-offset", "2048")[0] == 0


def test_check_says_what_is_odd(tmp_path, capsys):
    names = labelled(tmp_path)
    known = Properties(
        "hu", 1024, 2, classes=["background", "x", "y"], spacing={"a": (5, 0.6, 0.6), "b": (5, 0.9, 0.9)}
    )
    write_properties(tmp_path, known)
    put(tmp_path / "images" / names[0], np.zeros((24, 20), np.uint16))
    put(tmp_path / "masks" / names[0], np.ones((24, 20), np.uint8))
    (tmp_path / "test.txt").write_text(names[0])
    code, said = checked(capsys, tmp_path)
    text = "\n".join(said)
    assert code == 0
    assert "no pixel of y (1 of 2 classes)" in text and "slices of different sizes" in text
    assert "rows from 0.6 mm (a) to 0.9 mm (b) apart" in text
    assert "1, the first: a (in train and test)" in text and "granted: size: 12 x 10 px" in text


def air_and_tissue(rng, offset=1024):
    """HU + offset, half of it air."""
    return (np.where(rng.random((12, 10)) < 0.5, -1000, rng.integers(-100, 200, (12, 10))) + offset).astype(
        np.uint16
    )


def test_check_finds_a_case_and_a_test_list_of_another_offset(tmp_path, capsys):
    names, rng = labelled(tmp_path), np.random.default_rng(0)
    for name in names:
        put(tmp_path / "images" / name, air_and_tissue(rng, 2048 if name[0] == "c" else 1024))
    code, said = checked(capsys, tmp_path)
    odd = [line for line in said if "1 of 3 cases, unlike the rest, have no air" in line]
    assert code == 0 and len(odd) == 1 and "the first: c, from 24 to" in odd[0]
    (tmp_path / "train.txt").write_text("\n".join(names[:6]))
    (tmp_path / "test.txt").write_text("\n".join(names[6:]))
    code, said = checked(capsys, tmp_path)
    assert code == 1 and any("val and test: values from 24" in line for line in said)


def test_check_finds_a_case_without_tissue(tmp_path, capsys):
    names, rng = labelled(tmp_path), np.random.default_rng(0)
    for name in names:
        air = rng.integers(0, 30, (12, 10)).astype(np.uint16)
        put(tmp_path / "images" / name, air if name[0] == "b" else air_and_tissue(rng))
    code, said = checked(capsys, tmp_path)
    [odd] = [line for line in said if "1 of 3 cases, unlike the rest, have no air (below -200) or no" in line]
    assert code == 0 and "the first: b, from -1024 to -99" in odd


@pytest.mark.parametrize("size, said", [((12, 10), False), ((10, 12), True), ((24, 20), True)])
def test_check_says_a_size_that_no_slice_has(tmp_path, capsys, size, said):
    labelled(tmp_path)
    write_properties(tmp_path, Properties(size=size))
    code, lines = checked(capsys, tmp_path)
    found = f"set.json says {size[0]} x {size[1]} px, which no slice has; all are scaled to that"
    assert code == 0 and any(found in line for line in lines) == said


def test_check_judges_masks_without_a_train_list(tmp_path, capsys):
    names = labelled(tmp_path, pixel=255)
    for lists in ((), ("mine.txt",)):
        (tmp_path / "train.txt").unlink(missing_ok=True)
        for name in lists:
            (tmp_path / name).write_text("\n".join(names))
        code, said = checked(capsys, tmp_path)
        assert code == 1 and any("data.mask_map={255: 1}" in line for line in said)


def test_check_counts_slices_of_two_kinds_as_bad(tmp_path, capsys):
    names = labelled(tmp_path)
    put(tmp_path / "images" / names[0], np.zeros((12, 10), np.uint8))
    code, said = checked(capsys, tmp_path)
    assert code == 1 and any(line.startswith("bad:") and "cannot mix" in line for line in said)
    for name in names:
        put(tmp_path / "images" / name, np.full((12, 10), 7, np.uint8))
    write_properties(tmp_path, Properties("hu"))
    code, said = checked(capsys, tmp_path)
    assert code == 1 and any("holds 8-bit values, but its set.json says HU" in line for line in said)


def test_check_says_what_a_list_repeats_and_which_it_leaves_out(tmp_path, capsys):
    names = labelled(tmp_path)
    (tmp_path / "train.txt").write_text("\n".join(names + names[:2]))
    (tmp_path / "extra.txt").write_text(names[0])
    _, said = checked(capsys, tmp_path)
    assert any("train.txt: 2 slices are listed more than once" in line for line in said)
    assert any("not looked at: extra.txt; --list" in line for line in said)


def test_check_finds_a_test_case_that_is_a_copy_of_a_training_case(tmp_path, capsys):
    names = labelled(tmp_path)
    (tmp_path / "train.txt").write_text("\n".join(names[:6]))
    (tmp_path / "test.txt").write_text("\n".join(names[6:]))
    assert not any("very pixels" in line for line in checked(capsys, tmp_path)[1])
    for name, copy in zip(names[:2], names[6:]):
        put(tmp_path / "images" / copy, (tmp_path / "images" / name).read_bytes())
    _, said = checked(capsys, tmp_path)
    [line] = [line for line in said if "very pixels" in line]
    assert "2 slices of val or test" in line and f"the first: {names[0]} and {names[6]}" in line


def test_check_looks_at_rows_and_columns_and_at_cases_without_spacing(tmp_path, capsys):
    labelled(tmp_path)
    write_properties(tmp_path, Properties(spacing={"a": (5, 0.6, 0.6), "b": (5, 0.6, 0.9)}))
    _, said = checked(capsys, tmp_path)
    assert any("columns from 0.6 mm (a) to 0.9 mm (b) apart" in line for line in said)
    assert any("1 of 3 cases have no spacing in set.json, the first: c" in line for line in said)
    assert not any("rows from" in line for line in said)


def test_check_numbers_labels_without_names(tmp_path, capsys):
    names = labelled(tmp_path, pixel=38)
    mask = np.zeros((12, 10), np.uint8)
    mask[4] = 200
    put(tmp_path / "masks" / names[0], mask)
    code, said = checked(capsys, tmp_path)
    assert code == 0 and any("data.mask_map={38: 1, 200: 2}" in line for line in said)
    assert any("class 13, ... (198 of 200 classes)" in line for line in said)


def test_check_says_how_values_that_are_no_hu_can_be_taken(tmp_path, capsys):
    names, rng = labelled(tmp_path), np.random.default_rng(0)
    for name in names:
        put(tmp_path / "images" / name, rng.integers(0, 65536, (12, 10)).astype(np.uint16))
    code, said = checked(capsys, tmp_path)
    assert code == 1 and any('no HU; "kind": "stored" in set.json' in line for line in said)
    write_properties(tmp_path, Properties("stored"))
    assert checked(capsys, tmp_path)[0] == 0


def test_check_of_what_is_no_folder_of_a_set(tmp_path, capsys):
    labelled(tmp_path / "set")
    packed = "pack", "--root", tmp_path / "set", "--list", "train.txt", "--out", tmp_path / "packed"
    assert run(capsys, *packed)[0] == 0
    code, _, error = run(capsys, "check", "--root", tmp_path / "packed")
    assert code == 2 and "a packed set; check the folder that it was made of" in error
    code, _, error = run(capsys, "check", "--root", tmp_path / "set/images")
    assert code == 2 and "images/images: no such folder; data.root (--root) holds it" in error


def test_hidden_files_are_no_lists(tmp_path, capsys):
    names = labelled(tmp_path)
    (tmp_path / "train.txt").rename(tmp_path / "mine.txt")
    (tmp_path / "._mine.txt").write_bytes(b"\0\5\x16\7\xff")
    code, output, _ = run(capsys, "check", "--root", tmp_path)
    assert code == 0 and f"mine.txt: {len(names)} slices" in output


def test_padding_counts_as_air(tmp_path, capsys):
    """-3024 outside of the scanner's circle, as .npy keeps it: the same statistics as with air there."""
    rng, said = np.random.default_rng(0), []
    for padding in (-3024, -1024):
        root = tmp_path / str(padding)
        for index in range(3):
            hu = rng.integers(-1000, 400, (20, 20)).astype(np.int16)
            hu[:5] = padding
            (root / "images/c").mkdir(parents=True, exist_ok=True)
            np.save(root / f"images/c/{index}.npy", hu)
        rng = np.random.default_rng(0)
        code, output, _ = run(capsys, "check", "--root", root)
        said.append([line for line in output.splitlines() if line.startswith(("HU", "for a config"))])
        assert ("25 % of the values are below -1500, padding: counted as air" in output) == (padding < -1500)
    assert said[0] == said[1] and "from -1024 to" in said[0][0]
