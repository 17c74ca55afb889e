"""data.py slice on what could go wrong without a word: geometry, values, names, label ids."""

import json

import numpy as np
import pytest
from handmade import one_line_of, run, save_volume

from ct.properties import class_names, read_properties
from ct.slices import read_mask, read_slice

SIDE = 20


def scan(seed=0):
    """HU (20, 20, 20) with air around and tissue inside, no two slices alike."""
    rng = np.random.default_rng(seed)
    hu = np.full((SIDE,) * 3, -1000, np.int16) + rng.integers(-9, 9, (SIDE,) * 3, np.int16)
    hu[4:-4, 4:-4] = rng.integers(-20, 200, (SIDE - 8, SIDE - 8, SIDE))
    return hu


def organs():
    """Label 1 at the patient's one side, 2 at the other, in slices 4 to 15."""
    labels = np.zeros((SIDE,) * 3, np.uint8)
    labels[5:8, 6:12, 4:16], labels[12:15, 6:12, 4:16] = 1, 2
    return labels


def affine(spacing=2.0, flip=(1, 1, 1), origin=(0, 0, 0)):
    matrix = np.diag([*(np.array(flip) * spacing), 1.0])
    matrix[:3, 3] = origin
    return matrix


def slice_one(capsys, tmp_path, *options, out="out"):
    argv = ["slice", "--images", tmp_path / "ct.nii.gz", "--labels", tmp_path / "seg.nii.gz"]
    return run(capsys, *argv, "--out", tmp_path / out, *options)


def masks_in(root):
    return np.stack([read_mask(path) for path in sorted(root.glob("masks/*/*.png"))])


def expected(labels, flip=(1, 1, 1)):
    """(S, H, W) in radiological view of voxels (x, y, z) whose axes run to the right, front and head times
    `flip`: rows run to the back, columns to the patient's left, slices upwards, by hand."""
    x, y, z = (slice(None, None, step) for step in (-flip[0], -flip[1], flip[2]))
    return labels[x, y, z].transpose(2, 1, 0)


# ---- Geometry ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", ((1, 1, 1), (-1, -1, 1), (-1, 1, -1)))
def test_labels_on_the_images_grid_are_taken_as_they_are(tmp_path, nibabel, capsys, flip):
    for name, voxels in (("ct", scan()), ("seg", organs())):
        save_volume(nibabel, tmp_path / f"{name}.nii.gz", voxels, affine(flip=flip, origin=(9, 8, 7)))
    code, output, error = slice_one(capsys, tmp_path)
    assert code == 0 and "warning" not in output, error
    assert np.array_equal(masks_in(tmp_path / "out"), expected(organs(), flip))


def test_labels_flipped_in_the_file_but_not_in_the_patient_are_reoriented(tmp_path, nibabel, capsys):
    save_volume(nibabel, tmp_path / "ct.nii.gz", scan(), affine(flip=(-1, -1, 1), origin=(38, 38, 0)))
    swapped = organs()[::-1, ::-1].transpose(2, 1, 0)  # axes: up, front, right
    matrix = np.zeros((4, 4))
    matrix[2, 0] = matrix[1, 1] = matrix[0, 2] = 2
    matrix[3, 3] = 1
    save_volume(nibabel, tmp_path / "seg.nii.gz", swapped, matrix)
    code, output, error = slice_one(capsys, tmp_path)
    assert code == 0 and "warning" not in output, error
    assert np.array_equal(masks_in(tmp_path / "out"), expected(organs(), (-1, -1, 1)))


def test_labels_without_an_affine_beside_a_mirrored_image_are_refused(tmp_path, nibabel, capsys):
    save_volume(nibabel, tmp_path / "ct.nii.gz", scan(), affine(flip=(-1, -1, 1), origin=(38, 38, 0)))
    nibabel.save(nibabel.Nifti1Image(organs(), None), tmp_path / "seg.nii.gz")
    code, _, error = slice_one(capsys, tmp_path)
    assert code == 2 and one_line_of(error)
    for word in ("seg.nii.gz", "ct.nii.gz", " mm", "--ignore-geometry"):
        assert word in error
    assert not (tmp_path / "out").exists()
    assert slice_one(capsys, tmp_path, "--ignore-geometry")[0] == 0
    assert np.array_equal(masks_in(tmp_path / "out"), expected(organs(), (-1, -1, 1)))


def test_labels_mirrored_in_place_or_apart_are_refused_with_the_distance(tmp_path, nibabel, capsys):
    save_volume(nibabel, tmp_path / "ct.nii.gz", scan(), affine(flip=(-1, 1, 1), origin=(19, 0, 0)))
    save_volume(nibabel, tmp_path / "seg.nii.gz", organs(), affine(origin=(19, 0, 0)))  # x runs the other way
    code, _, error = slice_one(capsys, tmp_path)
    assert code == 2 and one_line_of(error) and "38.0 mm" in error and "left-right" in error
    save_volume(nibabel, tmp_path / "seg.nii.gz", organs(), affine(origin=(500, 0, 0)))
    code, _, error = slice_one(capsys, tmp_path)
    assert code == 2 and one_line_of(error) and "--ignore-geometry" in error


def test_labels_with_another_origin_are_resampled_or_refused_by_what_is_lost(tmp_path, nibabel, capsys):
    save_volume(nibabel, tmp_path / "ct.nii.gz", scan(), affine())
    save_volume(nibabel, tmp_path / "seg.nii.gz", organs(), affine(origin=(0, 4, 0)))  # 4 mm: two voxels
    code, output, error = slice_one(capsys, tmp_path)
    assert code == 0 and output.count("warning: ") == 1 and "on another grid" in output, error
    moved = np.zeros_like(organs())
    moved[:, 2:] = organs()[:, :-2]
    assert np.array_equal(masks_in(tmp_path / "out"), expected(moved))
    save_volume(nibabel, tmp_path / "seg.nii.gz", organs(), affine(origin=(0, 24, 0)))  # most of them outside
    code, _, error = slice_one(capsys, tmp_path, out="other")
    assert code == 2 and one_line_of(error) and "outside" in error and not (tmp_path / "other").exists()


def test_labels_of_another_spacing_and_a_crop_are_resampled(tmp_path, nibabel, capsys):
    save_volume(nibabel, tmp_path / "ct.nii.gz", scan(), affine())
    fine = organs().repeat(2, 0).repeat(2, 1).repeat(2, 2)
    save_volume(nibabel, tmp_path / "seg.nii.gz", fine, affine(1.0, origin=(-0.5, -0.5, -0.5)))
    assert slice_one(capsys, tmp_path)[0] == 0
    assert np.array_equal(masks_in(tmp_path / "out"), expected(organs()))
    crop = organs()[4:, 5:14, 3:17]
    save_volume(nibabel, tmp_path / "seg.nii.gz", crop, affine(origin=(8, 10, 6)))
    assert slice_one(capsys, tmp_path, out="crop")[0] == 0
    assert np.array_equal(masks_in(tmp_path / "crop"), expected(organs()))


# ---- Values --------------------------------------------------------------------------------------


def slice_values(nibabel, tmp_path, capsys, voxels, *options, out="out"):
    save_volume(nibabel, tmp_path / "ct.nii.gz", voxels, affine())
    return run(capsys, "slice", "--images", tmp_path / "ct.nii.gz", "--out", tmp_path / out, *options)


def test_hu_plus_1024_is_refused_with_the_offset_that_mends_it(tmp_path, nibabel, capsys):
    shifted = (scan() + 1024).clip(0).astype(np.int16)
    shifted[0, 0, 0] = 0
    code, _, error = slice_values(nibabel, tmp_path, capsys, shifted)
    assert code == 2 and one_line_of(error) and "--hu-offset 1024" in error and "--ignore-values" in error
    code, output, error = slice_values(nibabel, tmp_path, capsys, shifted, "--hu-offset", 1024, out="mended")
    assert code == 0 and "warning" not in output, error
    first = read_slice(tmp_path / "mended/images/ct/0000.png")
    assert np.array_equal(first, expected(shifted - 1024)[0])
    assert slice_values(nibabel, tmp_path, capsys, shifted, "--ignore-values", out="insisted")[0] == 0


def test_values_of_32_bits_that_no_png_holds_are_refused(tmp_path, nibabel, capsys):
    wide = np.linspace(-180_000, 180_000, SIDE**3).reshape((SIDE,) * 3).astype(np.int32)
    code, _, error = slice_values(nibabel, tmp_path, capsys, wide)
    assert code == 2 and one_line_of(error) and "from -180000 to 180000" in error


def test_nan_is_counted_and_padding_is_air(tmp_path, nibabel, capsys):
    voxels = scan().astype(np.float32)
    voxels[:2, 0, 0], voxels[0, 1] = np.nan, -3024
    code, output, error = slice_values(nibabel, tmp_path, capsys, voxels)
    assert code == 0 and "2 values" in output and "taken as air" in output, error
    first = read_slice(tmp_path / "out/images/ct/0000.png")
    assert first.min() == -1024 and (first == -1024).sum() == 3


# ---- Names ---------------------------------------------------------------------------------------


def volumes(nibabel, folder, names):
    for seed, name in enumerate(names):
        save_volume(nibabel, folder / name, scan(seed), affine())


def test_four_cases_are_not_taken_for_channels(tmp_path, nibabel, capsys):
    volumes(nibabel, tmp_path / "img", [f"liver_{n:04d}.nii.gz" for n in range(4)])
    argv = ("slice", "--images", tmp_path / "img", "--out", tmp_path / "out")
    code, _, error = run(capsys, *argv)
    assert code == 2 and one_line_of(error) and "--channels 4" in error and "--channels 1" in error
    code, output, error = run(capsys, *argv, "--channels", 1)
    assert code == 0 and "cases: 4" in output, error


def test_channels_follow_from_several_cases_or_dataset_json(tmp_path, nibabel, capsys):
    volumes(nibabel, tmp_path / "img", [f"{c}_{n:04d}.nii.gz" for c in "ab" for n in range(2)])
    argv = ("slice", "--images", tmp_path / "img", "--out")
    code, output, _ = run(capsys, *argv, tmp_path / "two")
    assert code == 0 and "the same in 2 cases" in output
    assert "other channels (left out): 2" in output and "cases: 2" in output
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}}))
    code, output, _ = run(capsys, *argv, tmp_path / "four")
    assert code == 0 and "dataset.json" in output and "cases: 4" in output


def test_a_folder_for_each_case(tmp_path, nibabel, capsys):
    for case in ("case_00002", "case_00010"):
        save_volume(nibabel, tmp_path / f"kits/{case}/imaging.nii.gz", scan(), affine())
        save_volume(nibabel, tmp_path / f"kits/{case}/segmentation.nii.gz", organs(), affine())
    for out, images, labels in (
        ("plain", tmp_path / "kits", tmp_path / "kits"),
        ("pattern", f"{tmp_path}/kits/*/imaging.nii.gz", f"{tmp_path}/kits/*/segmentation.nii.gz"),
    ):
        argv = ("slice", "--images", images, "--labels", labels, "--out", tmp_path / out)
        code, output, error = run(capsys, *argv)
        assert code == 0 and "paired 2 of 2 images with labels, by name" in output, error
        assert {*read_properties(tmp_path / out).spacing} == {"case_00002", "case_00010"}
        assert masks_in(tmp_path / out).any()


def test_pairs_by_number_are_printed_and_can_be_refused(tmp_path, nibabel, capsys):
    volumes(nibabel, tmp_path / "img", ["scan_1.nii.gz", "scan_2.NII.GZ"])
    for number in (1, 2):
        save_volume(nibabel, tmp_path / f"seg/part_{number}.nii", organs(), affine())
    argv = ("slice", "--images", tmp_path / "img", "--labels", tmp_path / "seg", "--out")
    code, output, error = run(capsys, *argv, tmp_path / "out")
    assert code == 0 and "by number: scan_1.nii.gz with part_1.nii" in output, error
    code, _, error = run(capsys, *argv, tmp_path / "other", "--pair", "name")
    assert code == 2 and "no image has" in error


def test_two_targets_are_not_given_btcvs_names(tmp_path, nibabel, capsys):
    for name, voxels in (("ct", scan()), ("seg", organs())):
        save_volume(nibabel, tmp_path / f"{name}.nii.gz", voxels, affine())
    (tmp_path / "map.json").write_text('{"1": 1, "2": 2}')
    code, output, _ = slice_one(capsys, tmp_path, "--label-map", tmp_path / "map.json")
    assert code == 0 and class_names(tmp_path / "out") == ["background", "class 1", "class 2"]
    (tmp_path / "all.json").write_text(json.dumps({str(n): n for n in range(1, 14)}))
    code, output, _ = slice_one(capsys, tmp_path, "--label-map", tmp_path / "all.json", out="btcv")
    assert code == 0 and "BTCV's, as the label map leads to 1 to 13" in output
    assert class_names(tmp_path / "btcv")[6] == "liver"


# ---- Label ids -----------------------------------------------------------------------------------


def test_nearly_whole_labels_are_rounded_and_others_named(tmp_path, nibabel, capsys):
    save_volume(nibabel, tmp_path / "ct.nii.gz", scan(), affine())
    near = organs().astype(np.float32)
    near[near == 1], near[near == 2] = 0.9999998, 2.0000153
    save_volume(nibabel, tmp_path / "seg.nii.gz", near, affine())
    assert slice_one(capsys, tmp_path)[0] == 0
    assert np.array_equal(masks_in(tmp_path / "out"), expected(organs()))
    near[5, 6, 4] = 1.5
    save_volume(nibabel, tmp_path / "seg.nii.gz", near, affine())
    code, _, error = slice_one(capsys, tmp_path, out="other")
    assert code == 2 and one_line_of(error) and "1.5 (1 voxels)" in error


def test_labels_above_the_class_names_name_the_case_before_anything_is_sliced(tmp_path, nibabel, capsys):
    for number in range(1, 4):
        save_volume(nibabel, tmp_path / f"img/c{number}.nii.gz", scan(number), affine())
        labels = organs() + (organs() == 2) * 5 * (number == 3)
        save_volume(nibabel, tmp_path / f"seg/c{number}.nii.gz", labels.astype(np.uint8), affine())
    (tmp_path / "names.json").write_text('["background", "left", "right"]')
    argv = ("slice", "--images", tmp_path / "img", "--labels", tmp_path / "seg", "--out", tmp_path / "out")
    code, _, error = run(capsys, *argv, "--classes", tmp_path / "names.json")
    assert code == 2 and one_line_of(error) and "seg/c3.nii.gz: labels up to 7" in error
    assert not (tmp_path / "out").exists()
