"""The phantom: what its users rely on, and the anatomy that every case must have."""

import functools
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from handmade import one_line_of, run

from ct.layout import case_of, read_list
from ct.organs import BTCV_ORGANS
from ct.properties import class_names
from ct.slices import read_mask, read_slice
from data import SegmentationDataset
from prepare.phantom import phantom_case, phantom_spacing

SEEDS = range(8)
SPINE_HU = 250  # above soft tissue and most contrast


@functools.cache
def case(seed, slices=24, size=96):
    return phantom_case(seed, slices, size)


def centre(mask):
    """Mean (slice, row, column) of a mask in mm from the first voxel's corner."""
    index = np.argwhere(mask) + 0.5
    return index.mean(0) * phantom_spacing(*mask.shape[:2])


def organ(seed, name):
    return case(seed)[1] == BTCV_ORGANS.index(name)


def test_types_shapes_and_ranges():
    hu, labels = case(0)
    assert hu.shape == labels.shape == (24, 96, 96)
    assert hu.dtype == np.int16 and labels.dtype == np.uint8
    assert hu.min() >= -1024 and hu.max() <= 3071
    assert hu[:, :3].mean() == pytest.approx(-1000, abs=15)  # air above the patient
    assert hu.max() > 300  # bone
    assert set(np.unique(labels)) <= set(range(len(BTCV_ORGANS))) and len(BTCV_ORGANS) == 14


def test_a_seed_is_a_case_and_another_seed_is_another():
    hu, labels = case(3)
    again_hu, again_labels = phantom_case(3, 24, 96)
    assert np.array_equal(hu, again_hu) and np.array_equal(labels, again_labels)
    assert not np.array_equal(hu, case(4)[0]) and not np.array_equal(labels, case(4)[1])


@pytest.mark.parametrize("slices, size", [(1, 64), (5, 97), (3, 128)])
def test_any_number_of_slices_and_any_size(slices, size):
    hu, labels = phantom_case(1, slices, size)
    assert hu.shape == labels.shape == (slices, size, size)
    assert (labels > 0).any()


def test_the_same_patient_at_another_size_and_slice_count():
    _, coarse = case(2)
    _, fine = phantom_case(2, 48, 192)
    coarse_spacing, fine_spacing = phantom_spacing(24, 96), phantom_spacing(48, 192)
    assert np.allclose(np.array(coarse_spacing) / fine_spacing, 2)
    for name in ("liver", "spleen", "right kidney", "left kidney", "aorta"):
        k = BTCV_ORGANS.index(name)
        assert np.allclose(centre(coarse == k), centre(fine == k), atol=4), name
        volume = (coarse == k).sum() * 8 / (fine == k).sum()
        assert 0.85 < volume < 1.15, name


# Millilitres in at least 7 of 8 patients: wide, but a missing, doubled or misplaced organ falls outside.
VOLUMES = {
    "spleen": (60, 400),
    "right kidney": (60, 300),
    "left kidney": (60, 300),
    "gallbladder": (4, 150),
    "esophagus": (3, 45),
    "liver": (800, 2800),
    "stomach": (80, 700),
    "aorta": (30, 160),
    "inferior vena cava": (30, 200),
    "portal and splenic veins": (6, 50),
    "pancreas": (20, 130),
    "right adrenal gland": (1, 20),
    "left adrenal gland": (1, 20),
}


@pytest.mark.parametrize("name", BTCV_ORGANS[1:])
def test_every_organ_has_a_plausible_volume(name):
    low, high = VOLUMES[name]
    millilitres = [organ(seed, name).sum() * np.prod(phantom_spacing(24, 96)) / 1000 for seed in SEEDS]
    assert sum(low < volume < high for volume in millilitres) >= len(SEEDS) - 1, millilitres


@pytest.mark.parametrize("seed", SEEDS)
def test_radiological_view(seed):
    hu, labels = case(seed)
    at = {name: centre(labels == index) for index, name in enumerate(BTCV_ORGANS) if (labels == index).any()}
    z, y, x = range(3)
    assert at["liver"][x] < at["spleen"][x]
    assert at["right kidney"][x] < at["inferior vena cava"][x] < at["aorta"][x] < at["left kidney"][x]
    assert at["right adrenal gland"][x] < at["left adrenal gland"][x]
    assert at["right kidney"][z] < at["right adrenal gland"][z]  # slices run from inferior to superior
    middle = slice(36, 60)  # columns around the midline: bone there is the spine
    assert centre(np.pad(hu[:, :, middle] > SPINE_HU, ((0, 0), (0, 0), (36, 36))))[y] > at["aorta"][y]
    assert at["stomach"][y] < at["aorta"][y]


def test_labels_are_where_the_organ_was_drawn():
    hu, labels = phantom_case(0, 24, 128)
    liver = labels == BTCV_ORGANS.index("liver")
    inside = liver.copy()
    for axis in (1, 2):
        inside &= np.roll(liver, 1, axis) & np.roll(liver, -1, axis)
    assert (
        np.abs(hu[inside] - np.median(hu[inside])).mean() < 30
    )  # HU: noise, texture and vessels, no fat or gas
    edge = liver & ~inside
    assert abs(np.median(hu[edge]) - np.median(hu[inside])) < 60


def test_intensity_alone_does_not_tell_the_organs():
    """One organ's HU in one patient is another's in another: the ranges of their medians overlap."""
    medians = {name: [np.median(case(seed)[0][organ(seed, name)]) for seed in SEEDS] for name in VOLUMES}
    for one, other in (("liver", "spleen"), ("liver", "pancreas"), ("aorta", "inferior vena cava")):
        assert max(min(medians[one]), min(medians[other])) < min(max(medians[one]), max(medians[other]))


def test_slices_change_smoothly_and_patients_differ_more():
    window = [np.clip(case(seed)[0].astype(float), -160, 240) for seed in SEEDS]
    between_slices = np.mean([np.abs(np.diff(hu[4:18], axis=0)).mean() for hu in window])
    between_patients = np.mean([np.abs(a[4:18] - b[4:18]).mean() for a, b in zip(window, window[1:])])
    assert between_slices < 0.75 * between_patients


def test_slices_of_different_patients_are_alike_as_in_real_ct():
    window = [np.clip(case(seed)[0].astype(float), -160, 240) for seed in SEEDS]
    correlation = [np.corrcoef(a[12].ravel(), b[12].ravel())[0, 1] for a, b in zip(window, window[1:])]
    assert np.mean(correlation) > 0.6


def test_organs_are_not_at_a_constant_place():
    for name in ("liver", "spleen", "left kidney"):
        centres = np.array([centre(organ(seed, name)) for seed in SEEDS])
        assert (centres.std(0) > 3).all(), name  # mm
        common = np.mean([organ(seed, name) for seed in SEEDS], axis=0)
        assert (common > 0).sum() > 1.5 * np.mean([organ(seed, name).sum() for seed in SEEDS]), name


def test_noise_is_correlated_and_its_dose_varies():
    """In air the noise is all there is."""
    air = [case(seed)[0][:, 2:10, 2:].astype(float) for seed in SEEDS]
    strength = [patch.std() for patch in air]
    assert max(strength) > 1.5 * min(strength)
    fine = case(0, 4, 256)[0][:, 4:20, 2:].astype(float)
    assert np.corrcoef(fine[:, :, :-1].ravel(), fine[:, :, 1:].ravel())[0, 1] > 0.3


def test_threads_do_not_change_a_case():
    with ThreadPoolExecutor(3) as pool:
        for hu, labels in pool.map(lambda _: phantom_case(3, 24, 96), range(3)):
            assert np.array_equal(hu, case(3)[0]) and np.array_equal(labels, case(3)[1])


# ---- As a data set on disk ----


def test_phantom_set(phantom):
    lists = {split: read_list(phantom / f"{split}.txt") for split in ("train", "val", "test", "unlabelled")}
    cases = {split: {*map(case_of, names)} for split, names in lists.items()}
    assert [len(cases[split]) for split in ("train", "val", "test")] == [3, 1, 1]
    assert not cases["train"] & cases["val"] and not cases["test"] & (cases["train"] | cases["val"])
    assert cases["unlabelled"] == cases["train"]
    hu, labels = phantom_case(7 * 100_003, 6, 48)
    index = 3
    assert np.array_equal(read_slice(phantom / f"images/phantom000/{index:03d}.png"), hu[index])
    assert np.array_equal(read_mask(phantom / f"masks/phantom000/{index:03d}.png"), labels[index])
    assert class_names(phantom) == BTCV_ORGANS
    dataset = SegmentationDataset(phantom, "val.txt", num_classes=14)
    assert dataset.spacing(dataset.cases[0]) == pytest.approx(phantom_spacing(6, 48))


def test_phantom_is_reused_redone_or_refused(phantom, tmp_path, capsys):
    own = shutil.copytree(phantom, tmp_path / "own")
    same = ("phantom", "--out", own, "--cases", 5, "--slices", 6, "--size", 48, "--seed", 7)
    image = own / "images/phantom000/000.png"
    written = image.stat().st_mtime_ns
    code, output, _ = run(capsys, *same)
    assert code == 0 and "there already" in output and image.stat().st_mtime_ns == written
    code, _, error = run(capsys, *same[:-1], 8)
    assert code == 2 and one_line_of(error) and "other arguments" in error
    content = image.read_bytes()
    shutil.rmtree(own / "images/phantom000")
    (own / "masks/phantom001/005.png").unlink()
    assert run(capsys, *same)[0] == 0 and image.read_bytes() == content
    assert (own / "masks/phantom001/005.png").exists()
    about = json.loads((own / "phantom.json").read_text())
    (own / "phantom.json").write_text(json.dumps(about | {"complete": False}))  # as an interruption leaves it
    image.write_bytes(b"")
    code, output, _ = run(capsys, *same)
    assert code == 0 and image.read_bytes() == content
    code, _, error = run(capsys, "phantom", "--out", own / "images")
    assert code == 2 and one_line_of(error) and "not empty" in error
