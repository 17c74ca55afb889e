"""data.py slice: image and labels that do not fit together, values that are no HU, labels without a meaning.

What would be wrong without an error is an error, or is said; each with the option that mends it.
"""

import json

import numpy as np
import pytest
from handmade import one_line_of, run, save_volume

from ct.properties import class_names, read_properties
from ct.slices import read_mask, read_slice
from prepare.labels import ids_of

SHAPE = (10, 12, 14)  # x, y, z of the file
NEGATIVE = np.array([[-0.8, 0, 0, 150], [0, -0.8, 0, 140], [0, 0, 2.5, -300], [0, 0, 0, 1]])


def random_hu(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).integers(-1024, 1500, shape).astype(np.int16)


def two_organs(shape=SHAPE):
    """1 at low x, 2 at high x; not symmetrical in any axis."""
    labels = np.zeros(shape, np.uint8)
    labels[1:4, 2:7, 3:9] = 1
    labels[7:9, 3:8, 4:11] = 2
    return labels


class Bench:
    def __init__(self, root, nibabel, capsys):
        self.root, self.nibabel, self.capsys = root, nibabel, capsys
        self.image(random_hu())

    def image(self, voxels, affine=NEGATIVE):
        self.voxels = voxels
        save_volume(self.nibabel, self.root / "ct.nii.gz", voxels, affine)

    def labels(self, labels, affine=NEGATIVE):
        self.nibabel.save(self.nibabel.Nifti1Image(labels, affine), self.root / "seg.nii.gz")

    def slice(self, *options, labels=True):
        words = ["--images", self.root / "ct.nii.gz", "--out", self.root / "out", "--workers", 1]
        words += ["--labels", self.root / "seg.nii.gz"] if labels else []
        return run(self.capsys, "slice", *words, *options)

    def succeeds(self, *options, labels=True):
        code, output, error = self.slice(*options, labels=labels)
        assert code == 0, error
        return output

    def refuses(self, *options, labels=True):
        code, _, error = self.slice(*options, labels=labels)
        assert code == 2 and one_line_of(error), error
        assert not list((self.root / "out").rglob("*.png"))
        return error

    def masks(self):
        """On the file's own axes, of an image with the affine NEGATIVE."""
        paths = sorted((self.root / "out/masks/ct").glob("*.png"))
        return np.stack([read_mask(path) for path in paths]).transpose(2, 1, 0)

    def images(self):
        paths = sorted((self.root / "out/images/ct").glob("*.png"))
        return np.stack([read_slice(path) for path in paths]).transpose(2, 1, 0)


@pytest.fixture
def bench(tmp_path, nibabel, capsys):
    return Bench(tmp_path, nibabel, capsys)


def moved(*mm):
    affine = NEGATIVE.copy()
    affine[:3, 3] += mm
    return affine


# ---- Geometry ----


def test_labels_on_the_images_grid(bench):
    bench.labels(two_organs(), moved(0.01, 0, 0))
    assert "warning" not in bench.succeeds()
    assert np.array_equal(bench.masks(), two_organs()) and np.array_equal(bench.images(), bench.voxels)


@pytest.mark.parametrize("axes", [[[0, -1], [1, -1], [2, 1]], [[2, -1], [0, 1], [1, -1]]])
def test_labels_stored_along_other_axes_are_reoriented(bench, axes):
    image = bench.nibabel.Nifti1Image(two_organs(), NEGATIVE).as_reoriented(np.array(axes))
    bench.nibabel.save(image, bench.root / "seg.nii.gz")
    assert "warning" not in bench.succeeds()
    assert np.array_equal(bench.masks(), two_organs())


@pytest.mark.parametrize("affine", [None, np.eye(4), np.diag([0.8, 0.8, 2.5, 1])])
def test_labels_without_the_images_affine_are_not_mirrored(bench, affine):
    """Left and right organs would change places."""
    bench.labels(two_organs(), affine)
    error = bench.refuses()
    for word in ("ct.nii.gz", "seg.nii.gz", "mm apart", "--ignore-geometry insists"):
        assert word in error
    assert "voxel by voxel" in bench.succeeds("--ignore-geometry")
    assert np.array_equal(bench.masks(), two_organs())


def test_an_origin_that_is_off_moves_the_labels(bench):
    """By 2 voxels along x (whose axis is negative), and by one along z."""
    bench.labels(two_organs(), moved(1.6, 0, 2.5))
    output = bench.succeeds()
    assert "first voxel 1.6, 0, 2.5 mm off" in output and "seg.nii.gz" in output
    right = np.zeros(SHAPE, np.uint8)
    right[:-2, :, 1:] = two_organs()[2:, :, :-1]
    assert np.array_equal(bench.masks(), right)
    bench.succeeds("--ignore-geometry")
    assert np.array_equal(bench.masks(), two_organs())


@pytest.mark.parametrize("mm", [(40, 0, 0), (0, -40, 0), (0, 0, 40)])
def test_an_origin_that_is_40_mm_off(bench, mm):
    """The image is 8 x 9.6 x 35 mm large."""
    bench.labels(two_organs(), moved(*mm))
    error = bench.refuses()
    assert "lie apart" in error and "40.0 mm apart" in error
    bench.succeeds("--ignore-geometry")
    assert np.array_equal(bench.masks(), two_organs())


def test_labels_most_of_which_lie_outside(bench):
    bench.labels(two_organs(), moved(4.8, 0, 0))  # by 6 of 10 columns
    assert "% of the labelled voxels lie outside" in bench.refuses()


def test_labels_of_a_crop_or_with_other_spacing_are_resampled(bench):
    affine = NEGATIVE.copy()
    affine[:3, 3] = NEGATIVE[:3, :3] @ (0, 2, 3) + NEGATIVE[:3, 3]
    bench.labels(two_organs()[:, 2:, 3:], affine)
    assert "14 x 12 x 10" in bench.succeeds()
    assert np.array_equal(bench.masks(), two_organs())
    fine = NEGATIVE @ np.diag([0.5, 0.5, 0.5, 1])
    fine[:3, 3] = NEGATIVE[:3, :3] @ (-0.25, -0.25, -0.25) + NEGATIVE[:3, 3]
    bench.labels(two_organs().repeat(2, 0).repeat(2, 1).repeat(2, 2), fine)
    assert "1.25 x 0.4 x 0.4 mm for 2.5 x 0.8 x 0.8" in bench.succeeds()
    assert np.array_equal(bench.masks(), two_organs())
    error = bench.slice("--ignore-geometry")[2]  # there is no other way to take them
    assert not error and np.array_equal(bench.masks(), two_organs())


def test_a_background_that_is_nearly_0_is_no_label_outside_the_image(bench):
    """As a scaled header leaves it, in labels of twice the image's extent along each axis."""
    sides = 2 * np.array(SHAPE)
    large = np.full(sides, 1e-6, np.float32)
    x, y, z = SHAPE
    large[x // 2 :, y // 2 :, z // 2 :][:x, :y, :z] += two_organs()
    affine = NEGATIVE.copy()
    affine[:3, 3] -= NEGATIVE[:3, :3] @ (np.array(SHAPE) // 2)
    bench.labels(large, affine)
    assert "on another grid" in bench.succeeds()
    assert np.array_equal(bench.masks(), two_organs())


def test_labels_of_another_shape_that_lie_nowhere_near_are_told_what_they_lack(bench):
    for affine in (None, moved(900, 0, 0)):
        bench.labels(two_organs()[:, :, :9], affine)
        error = bench.refuses()
        assert "mm apart" in error and "they need the affine" in error and "--ignore" not in error
        assert bench.refuses("--ignore-geometry") == error


def test_labels_that_no_voxel_of_the_image_meets_are_refused(tmp_path, nibabel, capsys):
    """A header in metres: the whole label volume lies between two voxels of the image."""
    small = np.diag([0.001, 0.001, 0.001, 1]) @ NEGATIVE
    small[:3, 3] = NEGATIVE[:3, 3] + (-0.3, -0.3, 1)
    for case in "abc":
        save_volume(nibabel, tmp_path / f"img/{case}.nii.gz", random_hu(), NEGATIVE)
        labels = two_organs() * np.uint8(case != "b")  # all background is no mistake
        save_volume(nibabel, tmp_path / f"lab/{case}.nii.gz", labels, small if case == "c" else NEGATIVE)
    argv = ("slice", "--images", tmp_path / "img", "--labels", tmp_path / "lab", "--out", tmp_path / "out")
    for _ in range(2):  # what failed is not taken as done
        code, output, error = run(capsys, *argv)
        assert code == 2 and "c.nii.gz: none of its labelled voxels is the nearest" in error, error
        assert "cases that failed: 1 of 3" in error and not list((tmp_path / "out").glob("*.txt"))


def test_an_image_without_affine_is_said_to_have_none(bench):
    bench.nibabel.save(bench.nibabel.Nifti1Image(random_hu(), None), bench.root / "ct.nii.gz")
    assert "which side is left is taken for granted" in bench.succeeds(labels=False)


def test_sform_and_qform_that_disagree_are_said(bench):
    image = bench.nibabel.Nifti1Image(random_hu(), NEGATIVE)
    image.set_sform(NEGATIVE, code=1)
    image.set_qform(NEGATIVE, code=1)
    bench.nibabel.save(image, bench.root / "ct.nii.gz")
    assert "warning" not in bench.succeeds(labels=False)
    image.set_qform(NEGATIVE @ np.diag([-1, 1, 1, 1]), code=1)
    bench.nibabel.save(image, bench.root / "ct.nii.gz")
    assert "sform and its qform put voxels up to 14.4 mm apart" in bench.succeeds(labels=False)


@pytest.mark.parametrize("factor", [0.001, 100])
def test_a_spacing_in_other_units_is_said(bench, factor):
    bench.image(random_hu(), NEGATIVE @ np.diag([factor, factor, factor, 1]))
    assert "which is no spacing of a CT" in bench.succeeds(labels=False)


# ---- Values ----


@pytest.mark.parametrize("padding", [None, -2000])
def test_hu_with_an_offset_are_not_taken_for_hu(bench, padding):
    shifted = (random_hu().astype(np.int32) + 1024).astype(np.int16)
    if padding:
        shifted[:2] = padding
    bench.image(shifted)
    assert "--hu-offset 1024" in bench.refuses(labels=False)
    bench.succeeds("--hu-offset", 1024, labels=False)
    assert np.array_equal(bench.images(), (shifted.astype(int) - 1024).clip(-1024))
    assert "hu_offset" in (bench.root / "out/sliced/ct.json").read_text()
    assert read_properties(bench.root / "out").hu_offset == 1024  # of the PNGs


def test_a_few_values_below_air_do_not_hide_an_offset(bench):
    """As interpolation leaves them."""
    shifted = random_hu((40, 40, 20)) + np.int16(1024)
    shifted[0, 0, :5] = -300
    bench.image(shifted)
    assert "--hu-offset 1024" in bench.refuses(labels=False)


@pytest.mark.parametrize(
    "voxels, words",
    [
        (np.linspace(-180_000, 180_000, 1680).astype(np.int32), ["-180000 to 180000", "no HU"]),
        (np.linspace(0, 1, 1680).astype(np.float32), ["from 0 to 1"]),
        (np.arange(1680).astype(np.uint16) * 39, ["no HU"]),
        (np.full(1680, np.nan, np.float32), ["1680 values (100 %) are not finite"]),
    ],
)
def test_what_cannot_be_hu_is_refused(bench, voxels, words):
    bench.image(voxels.reshape(SHAPE))
    error = bench.refuses(labels=False)
    assert "--hu-offset" not in error  # none would mend it
    for word in (*words, "ct.nii.gz", "--ignore-values insists"):
        assert word in error
    assert "warning" in bench.succeeds("--ignore-values", labels=False)
    assert "ct.nii.gz" in bench.slice(labels=False)[2]  # what was insisted on is not taken as done


@pytest.mark.parametrize(
    "voxels, words",
    [
        (np.full(1680, 7, np.int16), "all values are 7, an empty image"),
        (np.arange(1680).astype(np.uint8), "from 0 to 255, none below -200"),
    ],
)
def test_what_does_not_look_like_hu_is_said(bench, voxels, words):
    bench.image(voxels.reshape(SHAPE))
    said = [line for line in bench.succeeds(labels=False).splitlines() if line.startswith("warning: ")]
    assert any(words in line for line in said)


def test_voxels_that_are_no_numbers_become_air_and_are_counted(bench):
    voxels = random_hu().astype(np.float32)
    voxels[0, 0, 0], voxels[1, 0, 0], voxels[2, 0, 0] = np.nan, np.inf, -np.inf
    bench.image(voxels)
    output = bench.succeeds(labels=False)
    assert "3 values (0.179 %) are not finite numbers: taken as air" in output
    assert np.array_equal(bench.images(), np.where(np.isfinite(voxels), voxels, -1024))
    assert "3 values" in bench.succeeds(labels=False)  # said again


def test_an_offset_that_is_no_number_or_leaves_no_tissue_is_refused(bench):
    bench.image(random_hu())
    for offset in ("nan", "inf"):
        assert f"{offset} is no number" in bench.refuses("--hu-offset", offset, labels=False)
    for offset in (5000, -5000, 1e9):
        assert "no HU" in bench.refuses("--hu-offset", offset, labels=False)


@pytest.mark.filterwarnings("error")
def test_values_that_no_float32_holds_are_counted(bench):
    voxels = random_hu().astype(np.float64)
    voxels[0, 0, 0] = 1e300
    bench.image(voxels)
    assert "1 values" in bench.succeeds("--workers", 1, labels=False)


def test_padding_is_air_and_is_said(bench):
    voxels = random_hu()
    voxels[0], voxels[1] = -2000, -3024
    bench.image(voxels)
    assert "values below -1024 HU, down to -3024, are air; cases: 1" in bench.succeeds(labels=False)
    assert np.array_equal(bench.images(), voxels.clip(-1024))


def test_metal_beyond_what_a_png_holds_is_not_clipped_silently(bench):
    voxels = random_hu((20, 20, 20)).astype(np.int32)
    voxels[0, 0, 0] = 100_000
    bench.image(voxels)
    assert "above 64511 and stored as that" in bench.succeeds(labels=False)
    assert bench.images().max() == 64511


def test_a_refused_case_is_named_and_the_others_are_done(tmp_path, nibabel, capsys):
    for case in "abc":
        voxels = random_hu() + np.int16(1024 if case == "b" else 0)
        save_volume(nibabel, tmp_path / f"cts/{case}.nii.gz", voxels, NEGATIVE)
        bad = np.eye(4) if case == "c" else NEGATIVE
        save_volume(nibabel, tmp_path / f"labels/{case}.nii.gz", two_organs(), bad)
    words = ("--images", tmp_path / "cts", "--labels", tmp_path / "labels", "--out", tmp_path / "out")
    code, output, error = run(capsys, "slice", *words)
    assert code == 2 and one_line_of(error) and "cases that failed: 2 of 3, the others are done" in error
    assert output.index("failed: ") < output.rindex("failed: ")
    assert "c.nii.gz: labels of" in output and "b.nii.gz: values from 0" in output
    assert [path.name for path in sorted((tmp_path / "out/images").iterdir())] == ["a"]


# ---- Labels ----


@pytest.mark.parametrize("off", [0.9999998, 1.0000153])
def test_labels_that_are_nearly_whole_are_rounded(bench, off):
    bench.labels(two_organs().astype(np.float32) * np.float32(off))
    bench.succeeds()
    assert np.array_equal(bench.masks(), two_organs())


def test_labels_of_a_scaled_header_are_whole(bench):
    labels = bench.nibabel.Nifti1Image(two_organs().astype(np.float32) * 100, NEGATIVE)
    labels.header.set_data_dtype(np.int16)  # nibabel scales to the whole range
    bench.nibabel.save(labels, bench.root / "seg.nii.gz")
    array = bench.nibabel.load(bench.root / "seg.nii.gz").get_fdata()
    assert not np.array_equal(array, np.rint(array))
    bench.succeeds()
    assert np.array_equal(bench.masks(), two_organs() * 100)


@pytest.mark.parametrize(
    "value, words",
    [
        (0.5, "1 voxels are not: 0.5 (1 voxels); if they were resampled: again, by the nearest voxel"),
        (np.nan, "nan (1 voxels)"),
        (np.inf, "inf (1"),
        (-1, "labels from -1 to 2; a mask holds 0 to 255, negative ones have to be set to 0"),
    ],
)
def test_other_labels_are_named_with_their_number(bench, value, words):
    labels = two_organs().astype(np.float32)
    labels[0, 0, 0] = value
    bench.labels(labels)
    assert words in bench.refuses()


def test_ids_beyond_a_mask_are_named_before_anything_is_sliced(bench):
    labels = two_organs().astype(np.int16) * 150
    bench.labels(labels)
    error = bench.refuses()
    assert "labels from 0 to 300; 300 in 70 voxels" in error and "--label-map" in error
    (bench.root / "map.json").write_text('{"150": 1, "300": 2}')
    bench.succeeds("--label-map", bench.root / "map.json")
    assert np.array_equal(bench.masks(), two_organs())


def test_ids_against_numpy():
    labels = np.random.default_rng(0).choice([0, 3, 9, 70], (4, 5, 6))
    for dtype in (np.uint8, np.int64, np.float32, np.float64, np.uint16, np.int8):
        assert ids_of(labels.astype(dtype), "x", None) == np.unique(labels).tolist()


def test_labels_above_the_class_names_name_the_case(tmp_path, nibabel, capsys):
    for number in range(1, 4):
        save_volume(nibabel, tmp_path / f"cts/{number}.nii.gz", random_hu(), NEGATIVE)
        labels = two_organs() * (3 if number == 2 else 1)
        save_volume(nibabel, tmp_path / f"labels/{number}.nii.gz", labels.astype(np.uint8), NEGATIVE)
    (tmp_path / "names.json").write_text('["background", "liver", "spleen"]')
    words = ("--images", tmp_path / "cts", "--labels", tmp_path / "labels", "--out", tmp_path / "out")
    code, _, error = run(capsys, "slice", *words, "--classes", tmp_path / "names.json")
    assert code == 2 and "labels/2.nii.gz: labels up to 6, but 3 class names" in error and one_line_of(error)
    assert "--classes" in error and "--label-map" in error
    assert not (tmp_path / "out").exists()


def test_a_second_call_does_not_look_at_the_labels_again(bench, monkeypatch):
    bench.labels(two_organs())
    bench.succeeds()
    record = json.loads((bench.root / "out/sliced/ct.json").read_text())
    assert record["ids"] == [0, 1, 2]
    monkeypatch.setattr("prepare.slicing.scan_labels", None)
    monkeypatch.setattr("prepare.slicing.read_volume", None)
    assert "class 1, class 2" in bench.succeeds()


# ---- Class names ----


@pytest.mark.parametrize(
    "targets, names",
    [
        ((1, 2), ["background", "class 1", "class 2"]),
        ((1, 4), ["background", "class 1", "class 2", "class 3", "class 4"]),
        (range(1, 13), ["background"] + [f"class {number}" for number in range(1, 13)]),
    ],
)
def test_a_label_map_to_other_classes_than_btcvs_gets_no_names_of_btcv(bench, targets, names):
    bench.labels(two_organs())
    (bench.root / "map.json").write_text(json.dumps({str(id): to for id, to in enumerate(targets, 1)}))
    assert "class names (by number; --classes gives names)" in bench.succeeds(
        "--label-map", bench.root / "map.json"
    )
    assert class_names(bench.root / "out") == names


def test_a_label_map_to_btcvs_13_organs_gets_their_names_and_says_so(bench):
    bench.labels(two_organs())
    (bench.root / "map.json").write_text(json.dumps({str(id): id for id in range(1, 14)} | {"77": 255}))
    assert "class names (BTCV's" in bench.succeeds("--label-map", bench.root / "map.json")
    assert class_names(bench.root / "out")[1] == "spleen"


@pytest.mark.parametrize(
    "labels, label_map, words",
    [
        (two_organs() * 0, None, "all is background"),
        ((two_organs() > 0) * np.uint8(255), None, '--label-map with {"255": 1}'),
        (two_organs(), {"7": 1}, "makes classes of none"),
        (two_organs(), {"1": 255}, "makes classes of none"),
    ],
)
def test_labels_without_any_class_are_refused(bench, labels, label_map, words):
    bench.labels(labels.astype(np.uint8))
    (bench.root / "map.json").write_text(json.dumps(label_map))
    error = bench.refuses(*(["--label-map", bench.root / "map.json"] if label_map else []))
    assert words in error and "seg.nii.gz" in error


@pytest.mark.parametrize("twice", ['{"1": 1, "1": 2}', '{"1": 1, "01": 2}'])
def test_a_label_map_with_two_entries_for_one_id_is_refused(bench, twice):
    bench.labels(two_organs())
    (bench.root / "map.json").write_text(twice)
    assert "map.json: " in (error := bench.refuses("--label-map", bench.root / "map.json"))
    assert "twice" in error or "two entries" in error


def test_ids_that_a_label_map_leaves_out_are_said(bench):
    bench.labels(two_organs())
    (bench.root / "map.json").write_text('{"2": 1}')
    output = bench.succeeds("--label-map", bench.root / "map.json")
    assert "ids that the label map does not list (background now): 1: 1\n" in output
    assert np.array_equal(bench.masks(), two_organs() == 2)


@pytest.mark.parametrize("names", ['["background", "a", "a"]', '["background"]', '["background", 1]'])
def test_class_names_that_cannot_be_meant_name_their_file(bench, names):
    bench.labels(two_organs())
    (bench.root / "names.json").write_text(names)
    assert "names.json: 2 to 255 different class names" in bench.refuses(
        "--classes", bench.root / "names.json"
    )


def test_binary_masks_of_0_and_255_can_be_mapped(bench):
    bench.labels(((two_organs() > 0) * 255).astype(np.uint8))
    (bench.root / "map.json").write_text('{"255": 1}')
    bench.succeeds("--label-map", bench.root / "map.json")
    assert np.array_equal(bench.masks(), two_organs() > 0)


def test_a_label_of_255_is_said_to_be_ignored(bench):
    labels = two_organs()
    labels[labels == 2] = 255
    bench.labels(labels)
    assert "the label 255 means to ignore" in bench.succeeds()


def test_classes_that_no_volume_holds_are_said(bench):
    bench.labels(two_organs() * np.uint8(2))
    assert "classes that no volume holds: 2: 1 (class 1), 3 (class 3)" in bench.succeeds()


# ---- A file for each organ -----------------------------------------------------------------------


def organs_of_cases(nibabel, root, below="segmentations", kind=np.uint8):
    """TotalSegmentator's layout of two cases; the label volume (X, Y, Z) that BTCV's names should give."""
    rng = np.random.default_rng(0)
    found = {}
    for case in ("s1", "s2"):
        ct = rng.integers(-1000, 500, (8, 9, 12)).astype(np.int16)
        save_volume(nibabel, root / case / "ct.nii.gz", ct)
        spleen, kidney, vein = (rng.random((8, 9, 12)) < 0.3 for _ in range(3))
        for name, mask in (
            ("spleen", spleen),
            ("kidney_left", kidney),
            ("portal_vein_and_splenic_vein", vein),
        ):
            save_volume(nibabel, root / case / below / f"{name}.nii.gz", mask.astype(kind))
        save_volume(nibabel, root / case / below / "rib_left_1.nii.gz", spleen.astype(kind))
        found[case] = np.where(spleen, 1, np.where(kidney, 3, np.where(vein, 10, 0)))
    return found


@pytest.mark.parametrize("kind", (np.uint8, np.float64))
def test_a_file_for_each_organ_is_joined(tmp_path, nibabel, capsys, kind):
    truth = organs_of_cases(nibabel, tmp_path / "in", kind=kind)
    where = ("slice", "--images", tmp_path / "in", "--labels", tmp_path / "in", "--out", tmp_path / "out")
    code, said, error = run(capsys, *where, "--classes", "btcv", "--ignore-values")
    assert code == 0, error
    assert "where they overlap the first class counts" in said
    assert "files that no class is called by (background): 1: rib_left_1.nii.gz" in said
    assert "classes without a file: 10: right kidney, gallbladder" in said
    for case, expected in truth.items():
        masks = sorted((tmp_path / "out/masks" / case).glob("*.png"))
        stack = np.stack([read_mask(path) for path in masks])  # (Z, Y, X), turned
        assert sorted(np.bincount(stack.ravel(), minlength=14)) == sorted(
            np.bincount(expected.ravel(), minlength=14)
        )
        assert stack.tolist() == [one.T[::-1, ::-1].tolist() for one in np.moveaxis(expected, 2, 0)]
    code, said, _ = run(capsys, *where, "--classes", "btcv", "--ignore-values")
    assert code == 0


def test_organ_files_that_do_not_fit(tmp_path, nibabel, capsys):
    organs_of_cases(nibabel, tmp_path / "in")
    where = ("slice", "--images", tmp_path / "in", "--labels", tmp_path / "in", "--out", tmp_path / "out")
    code, _, error = run(capsys, *where, "--ignore-values")
    assert code == 2 and one_line_of(error)
    one = tmp_path / "in/s1/segmentations/spleen.nii.gz"
    for array, message in (
        (np.full((8, 9, 12), 2, np.uint8), "must hold 0 and 1 only"),
        (np.full((8, 9, 12), np.nan, np.float32), "must hold 0 and 1 only"),
        (np.ones((8, 9, 11), np.uint8), "on another grid"),
    ):
        save_volume(nibabel, one, array)
        code, _, error = run(capsys, *where, "--classes", "btcv", "--ignore-values")
        assert code == 2 and message in error
    save_volume(nibabel, one.with_name("left_kidney.nii"), np.ones((8, 9, 12), np.uint8))
    code, _, error = run(capsys, *where, "--classes", "btcv", "--ignore-values")
    assert code == 2 and one_line_of(error)
    assert "kidney_left.nii.gz: like left_kidney.nii the file of left kidney" in error
