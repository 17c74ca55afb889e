"""ct/geometry.py: an image and its labels in the patient, against a slow double loop."""

from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
from handmade import affines, save_volume

from ct.geometry import Geometry, judge_geometry, resampled, share_inside
from ct.volumes import read_geometry, read_volume

SHAPE = (7, 8, 9)


def saved(nibabel, path, affine, shape=SHAPE, seed=0):
    voxels = np.random.default_rng(seed).integers(0, 5, shape).astype(np.int16)
    save_volume(nibabel, path, voxels, affine)
    return read_volume(path)


def slow(array, labels, image):
    """Each voxel of the image by itself: to mm, to the other grid, to the nearest voxel there."""
    found = np.zeros(image.shape, array.dtype)
    back = np.linalg.inv(labels.affine)
    for index in np.ndindex(*image.shape):
        mm = image.affine @ [*index, 1]
        place = [int(np.floor(value + 0.5 - 1e-4)) for value in (back @ mm)[:3]]
        if all(0 <= value < side for value, side in zip(place, labels.shape)):
            found[index] = array[tuple(place)]
    return found


@pytest.mark.parametrize("seed", range(6))
def test_resampling_against_a_slow_double_loop(tmp_path, nibabel, seed):
    """Grids of any orientation, spacing and offset."""
    rng = np.random.default_rng(seed)
    choices = dict(affines(nibabel))
    one, other = rng.choice([*choices], 2)
    moved = choices[other].copy()
    moved[:3, :3] *= rng.uniform(0.5, 2)
    moved[:3, 3] = choices[one][:3, 3] + rng.normal(0, 3, 3)
    image = saved(nibabel, tmp_path / "image.nii", choices[one])
    labels = saved(nibabel, tmp_path / "labels.nii", moved, tuple(rng.integers(5, 12, 3)), seed)
    found = np.stack([*resampled(labels.array, labels.geometry, image.geometry)])
    assert np.array_equal(found, slow(labels.array, labels.geometry, image.geometry))
    inside = 0
    to_image = np.linalg.inv(image.geometry.affine) @ labels.geometry.affine
    for index in np.argwhere(labels.array):
        place = np.floor((to_image @ [*index, 1])[:3] + 0.5 - 1e-4)
        inside += all(0 <= value < side for value, side in zip(place, image.geometry.shape))
    share = share_inside(labels.array, labels.geometry, image.geometry)
    assert share == inside / np.count_nonzero(labels.array)


def test_voxels_of_double_size_each_stand_for_eight():
    """Also where a voxel of the image lies half-way between two."""
    path = Path("x")
    fine = Geometry(path, (4, 6, 8), np.eye(4), (4, 6, 8), np.eye(4))
    coarse = np.diag([2, 2, 2, 1.0])
    coarse[:3, 3] = 0.5
    labels = np.random.default_rng(0).integers(0, 9, (2, 3, 4))
    found = np.stack([*resampled(labels, Geometry(path, (2, 3, 4), coarse, (2, 3, 4), coarse), fine)])
    assert np.array_equal(found, labels.repeat(2, 0).repeat(2, 1).repeat(2, 2))
    coarse[:3, 3] = 0  # every second voxel lies half-way
    found = np.stack([*resampled(labels, Geometry(path, (2, 3, 4), coarse, (2, 3, 4), coarse), fine)])
    assert np.array_equal(found, labels.repeat(2, 0).repeat(2, 1).repeat(2, 2))


def test_flips_and_exchanges_of_axes_are_one_grid(tmp_path, nibabel):
    """All 48 ways to store the same voxels: the same view, nothing to say."""
    affine = np.diag([-0.8, -0.8, 2.5, 1])
    affine[:3, 3] = (120, 90, -300)
    image = saved(nibabel, tmp_path / "image.nii", affine)
    original = nibabel.load(tmp_path / "image.nii")
    for axes, flips in product(permutations(range(3)), product((1, -1), repeat=3)):
        turned = original.as_reoriented(np.stack([axes, flips], 1))
        nibabel.save(turned, tmp_path / "labels.nii")
        labels = read_volume(tmp_path / "labels.nii")
        assert judge_geometry(image.geometry, labels.geometry) == []
        assert np.array_equal(labels.array, image.array)


def judged(nibabel, folder, image_affine, labels_affine, shape=SHAPE, inside=None):
    save_volume(nibabel, folder / "ct.nii", np.zeros(SHAPE, np.int16), image_affine)
    labels = nibabel.Nifti1Image(np.ones(shape, np.int16), labels_affine)
    nibabel.save(labels, folder / "seg.nii")
    image, labels = (read_geometry(folder / name) for name in ("ct.nii", "seg.nii"))
    return judge_geometry(image, labels, inside)


NEGATIVE = np.array([[-0.8, 0, 0, 150], [0, -0.8, 0, 140], [0, 0, 2.5, -300], [0, 0, 0, 1]])


def shifted(*mm, scale=(1, 1, 1)):
    affine = NEGATIVE.copy()
    affine[:3, :3] *= scale
    affine[:3, 3] += mm
    return affine


def test_rounding_of_an_affine_is_nothing_to_speak_of(tmp_path, nibabel):
    assert judged(nibabel, tmp_path, NEGATIVE, shifted(0.01, -0.02, 0.04)) == []
    assert judged(nibabel, tmp_path, NEGATIVE, shifted(0, 0, 0, scale=1.0005)) == []


@pytest.mark.parametrize(
    "affine, shape, words",
    [
        (shifted(3, 0, 0), SHAPE, ["first voxel 3, 0, 0 mm off"]),
        (shifted(0, 0, 5), (7, 8, 6), ["6 x 8 x 7 voxels for 9 x 8 x 7", "0, 0, 5 mm off"]),
        (shifted(0, 0, 0, scale=0.5), (14, 16, 18), ["1.25 x 0.4 x 0.4 mm for 2.5 x 0.8 x 0.8"]),
        (shifted(0, 0, 0, scale=(1, 1, 2)), (7, 8, 5), ["5 x 0.8 x 0.8 mm for 2.5 x 0.8 x 0.8"]),
    ],
)
def test_other_grids_that_overlap_are_resampled_with_a_note(tmp_path, nibabel, affine, shape, words):
    (doubt,) = judged(nibabel, tmp_path, NEGATIVE, affine, shape)
    assert not doubt.fatal and "nearest voxels taken" in doubt.text
    for word in [*words, "ct.nii", "seg.nii"]:
        assert word in doubt.text


def mirrored(axis):
    affine = NEGATIVE.copy()
    affine[:, axis] *= -1  # and the origin stays
    return affine


@pytest.mark.parametrize(
    "affine, words",
    [
        (None, ["seg.nii does not say where it lies"]),
        (np.eye(4), ["seg.nii does not say where it lies"]),
        (shifted(400, 0, 0), ["lie apart", "400.0 mm apart"]),
        (shifted(0, 0, 40), ["lie apart", "40.0 mm apart"]),  # the image is 22.5 mm high
        (mirrored(0), ["left-right", "4.8 mm apart"]),
        (mirrored(1), ["posterior-anterior"]),
        (mirrored(2), ["inferior-superior", "20.0 mm apart"]),
        (mirrored(0) @ np.diag([1, -1, 1, 1]), ["left-right and posterior-anterior"]),
        (np.diag([0.8, 0.8, 2.5, 1]), ["left-right and posterior-anterior"]),
    ],
)
def test_what_cannot_belong_together_is_refused(tmp_path, nibabel, affine, words):
    (doubt,) = judged(nibabel, tmp_path, NEGATIVE, affine)
    assert doubt.fatal
    for word in [*words, "ct.nii", "seg.nii", "mm apart"]:
        assert word in doubt.text


def test_an_image_without_affine_is_no_better(tmp_path, nibabel):
    nibabel.save(nibabel.Nifti1Image(np.zeros(SHAPE, np.int16), None), tmp_path / "ct.nii")
    save_volume(nibabel, tmp_path / "seg.nii", np.ones(SHAPE, np.int16), NEGATIVE)
    image, labels = (read_geometry(tmp_path / name) for name in ("ct.nii", "seg.nii"))
    (doubt,) = judge_geometry(image, labels)
    assert doubt.fatal and "ct.nii does not say where it lies" in doubt.text
    assert judge_geometry(image, image) == []


def test_labels_that_lie_mostly_outside_are_refused(tmp_path, nibabel):
    for inside, fatal in ((0.3, True), (0.9, False), (1.0, False), (None, False)):
        (doubt,) = judged(nibabel, tmp_path, NEGATIVE, shifted(3, 0, 0), inside=inside)
        assert doubt.fatal == fatal
        assert ("70 % of the labelled" in doubt.text) == (inside == 0.3)
        assert ("10 % of the labelled" in doubt.text) == (inside == 0.9)
