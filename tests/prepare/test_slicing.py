"""prepare/slicing.py: volumes and labels as others lay them out, to slices, lists and class names."""

import json
import shutil

import numpy as np
import pytest
from handmade import ROOT, affines, nnunet_folder, one_line_of, put, run, save_volume

from ct import organs, volumes
from ct.layout import case_of, read_list
from ct.properties import class_names, read_properties
from ct.slices import DataError, read_mask, read_slice
from data import SegmentationDataset
from prepare.pairing import pair_volumes
from prepare.slicing import read_split

CT = ROOT.parent / "shared" / "ct"
needs_ct = pytest.mark.skipif(not CT.is_dir(), reason=f"needs the real CT in {CT}")


def random_hu(shape, seed=0):
    return np.random.default_rng(seed).integers(-1024, 1500, shape).astype(np.int16)


def test_slice_folders(tmp_path, nibabel, capsys):
    """BTCV's names, a label map, one image without labels; read back and compared with nibabel's canonical
    voxels."""
    rng = np.random.default_rng(0)
    affine = dict(affines(nibabel))["SRP"]
    written = {}
    for number in range(1, 7):
        hu = rng.integers(-1200, 3000, (5, 8, 6)).astype(np.int16)
        labels = rng.choice([0, 5, 52, 77], (5, 8, 6)).astype(np.int16)
        save_volume(nibabel, tmp_path / f"img/img{number:04d}.nii.gz", hu, affine)
        if number < 6:
            save_volume(nibabel, tmp_path / f"label/label{number:04d}.nii.gz", labels, affine)
        written[f"img{number:04d}"] = hu, labels
    save_volume(nibabel, tmp_path / "label/label0099.nii.gz", labels, affine)
    (tmp_path / "map.json").write_text('{"5": 6, "52": 8, "15": 5}')
    out = tmp_path / "out"
    argv = ("slice", "--images", tmp_path / "img", "--labels", tmp_path / "label", "--out", out)
    code, output, error = run(capsys, *argv, "--label-map", tmp_path / "map.json", "--classes", "btcv")
    assert code == 0, error
    for line in ("paired 5 of 6", "img0006.nii.gz", "label0099.nii.gz", "15 (esophagus)"):
        assert line in output
    lists = {split: read_list(out / f"{split}.txt") for split in ("train", "val", "test", "unlabelled")}
    cases = {split: {*map(case_of, names)} for split, names in lists.items()}
    assert [len(cases[split]) for split in ("train", "val", "test")] == [3, 1, 1]
    assert cases["unlabelled"] == cases["train"] | {"img0006"}
    assert class_names(out) == organs.BTCV_ORGANS
    assert read_properties(out).spacing["img0001"] == pytest.approx(
        volumes.read_volume(tmp_path / "img/img0001.nii.gz").spacing
    )
    for case, (hu, labels) in written.items():
        canonical = [nibabel.as_closest_canonical(nibabel.Nifti1Image(a, affine)) for a in (hu, labels)]
        view, truth = (np.asarray(image.dataobj)[::-1, ::-1].transpose(2, 1, 0) for image in canonical)
        names = [f"{case}/{index:04d}.png" for index in range(len(view))]
        read = np.stack([read_slice(out / "images" / name) for name in names])
        assert np.array_equal(read, view.clip(-1024))
        if case != "img0006":
            masks = np.stack([read_mask(out / "masks" / name) for name in names])
            assert np.array_equal(masks, (truth == 5) * 6 + (truth == 52) * 8)
    assert run(capsys, "check", "--root", out)[0] == 0


@pytest.mark.parametrize(
    "images, labels",
    [
        ("Case_00001_0000 Case_00002_0000", "Case_00001 Case_00002"),  # AbdomenCT-1K
        ("img0001 img0002", "label0001 label0002"),  # BTCV
        ("liver_01_0000 liver_12_0000", "liver_01 liver_12"),  # nnU-Net
        ("siteA_1 siteB_1", "siteA_1 siteB_1"),
    ],
)
def test_pairing(tmp_path, images, labels):
    for folder, names in (("images", images), ("labels", labels)):
        for name in names.split():
            put(tmp_path / folder / f"{name}.nii.gz", b"")
    pairs = pair_volumes(tmp_path / "images", tmp_path / "labels")
    assert [pair.image.name for pair in pairs] == [f"{name}.nii.gz" for name in images.split()]
    assert [pair.case for pair in pairs] == [name.removesuffix("_0000") for name in images.split()]
    assert [pair.labels.name for pair in pairs] == [f"{name}.nii.gz" for name in labels.split()]


def test_ambiguous_or_hopeless_pairing_is_refused(tmp_path):
    for name in ("images/a_1", "images/b_1", "labels/c_1", "other/c_7"):
        put(tmp_path / f"{name}.nii.gz", b"")
    with pytest.raises(DataError, match="a_1.nii.gz and b_1.nii.gz"):
        pair_volumes(tmp_path / "images", tmp_path / "labels")
    (tmp_path / "images/b_1.nii.gz").unlink()
    with pytest.raises(DataError, match="no image has the number"):
        pair_volumes(tmp_path / "images", tmp_path / "other")


@pytest.mark.parametrize(
    ("labels", "ignored"),
    [
        ({"background": 0, "liver": 1, "spleen": 2, "aorta": 3}, False),
        ({"0": "background", "1": "liver", "2": "spleen", "3": "aorta"}, False),
        ({"background": 0, "liver": 1, "spleen": 2, "ignore": 3}, True),
    ],
)
def test_nnunet_folders_bring_their_class_names(tmp_path, nibabel, capsys, labels, ignored):
    code, output, error = run(capsys, *nnunet_folder(nibabel, tmp_path, labels))
    assert code == 0, error
    assert "other channels (left out): 5" in output and "paired 5 of 5" in output
    names = ["background", "liver", "spleen", "aorta"]
    assert class_names(tmp_path / "out") == names[: 3 if ignored else 4]
    volume = volumes.read_volume(tmp_path / "labelsTr/ct_002.nii.gz").array
    masks = [read_mask(tmp_path / f"out/masks/ct_002/{index:04d}.png") for index in range(len(volume))]
    assert np.array_equal(np.stack(masks), np.where(volume == 3, 255 if ignored else 3, volume))


def test_a_dataset_json_that_cannot_be_used_is_refused(tmp_path, nibabel, capsys):
    for labels in ({"background": 0, "organs": [1, 2]}, {"background": 0, "liver": 5}, ["liver"]):
        code, _, error = run(capsys, *nnunet_folder(nibabel, tmp_path, labels, cases=2))
        assert code == 2 and one_line_of(error) and "dataset.json" in error


def test_a_split_is_a_file_of_names_or_numbers_or_three_fractions(tmp_path, nibabel, capsys):
    labels = {"background": 0, "liver": 1, "spleen": 2, "aorta": 3}
    argv = nnunet_folder(nibabel, tmp_path, labels, cases=10)
    split = tmp_path / "split.json"

    def cases_of(split):
        return sorted({*map(case_of, read_list(tmp_path / f"out/{split}.txt"))})

    split.write_text('{"train": ["ct_001", 2, "case0003"], "test": [10]}')
    code, _, error = run(capsys, *argv, "--split", split)
    assert code == 0, error
    assert cases_of("train") == ["ct_001", "ct_002", "ct_003"] and cases_of("test") == ["ct_010"]
    assert not (tmp_path / "out/val.txt").exists() and len(cases_of("unlabelled")) == 9
    assert run(capsys, *argv, "--split", "0.5,0.2,0.3")[0] == 0
    assert [len(cases_of(part)) for part in ("train", "val", "test")] == [5, 2, 3]
    for bad in (
        '{"train": [1], "test": [1]}',
        '{"train": [1]}',
        '{"train": [99], "test": [1]}',
        '{"tset": [1]}',
    ):
        split.write_text(bad)
        code, _, error = run(capsys, *argv, "--split", split)
        assert code == 2 and one_line_of(error) and "split.json" in error, error
    for bad in ("0.5,0.5", "0.5,0.2,0.2", "0,0.5,0.5", "1,0,0"):
        code, _, error = run(capsys, *argv, "--split", bad)
        assert code == 2 and one_line_of(error) and bad in error, error


def test_the_published_btcv_split():
    """Test cases as listed by TransUNet and those who follow it."""
    numbers = [*range(1, 11), *range(21, 41)]
    split = read_split(str(ROOT / "configs/btcv_split.json"), [f"img{number:04d}" for number in numbers])
    test = [1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38]
    assert split["test"] == [f"img{number:04d}" for number in test]
    assert len(split["train"]) == 18 and not split["val"] and not {*split["train"]} & {*split["test"]}


def test_slicing_goes_on_where_it_was_and_past_a_bad_volume(tmp_path, nibabel, capsys):
    argv = nnunet_folder(nibabel, tmp_path, {"background": 0, "liver": 1, "spleen": 2, "aorta": 3})
    bad = tmp_path / "imagesTr/ct_003_0000.nii.gz"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:50])
    code, _, error = run(capsys, *argv)
    assert code == 2 and one_line_of(error) and "ct_003_0000" in error and "1 of 5" in error
    assert not list((tmp_path / "out").glob("*.txt"))
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/images").rglob("*.png")}
    assert {path.parent.name for path in made} == {f"ct_{number:03d}" for number in (1, 2, 4, 5)}
    bad.write_bytes(whole)
    assert run(capsys, *argv)[0] == 0
    assert all(path.stat().st_mtime_ns == at for path, at in made.items())
    assert (tmp_path / "out/images/ct_003/0000.png").exists()
    save_volume(nibabel, tmp_path / "labelsTr/ct_001.nii.gz", np.zeros((6, 5, 4), np.int16))
    assert run(capsys, *argv)[0] == 0
    assert not read_mask(tmp_path / "out/masks/ct_001/0000.png").any()


def small_volumes(nibabel, folder, names):
    rng = np.random.default_rng(0)
    for name in names:
        save_volume(nibabel, folder / "img" / name, rng.normal(-300, 400, (6, 5, 4)).astype(np.int16))
        save_volume(nibabel, folder / "lab" / name, rng.integers(0, 3, (6, 5, 4)).astype(np.uint8))
    return ("slice", "--images", folder / "img", "--labels", folder / "lab", "--out", folder / "out")


@pytest.mark.parametrize(
    "gone", ["masks", "images", "masks/a", "images/b", "masks/b/0001.png", "images/c/0003.png"]
)
def test_slices_and_masks_that_are_gone_are_made_again(tmp_path, nibabel, capsys, gone):
    argv, out = small_volumes(nibabel, tmp_path, ("a.nii", "b.nii", "c.nii")), tmp_path / "out"
    assert run(capsys, *argv)[0] == 0
    there = {path: path.read_bytes() for path in out.rglob("*.png")}
    assert len(there) == 24
    if (out / gone).is_dir():
        shutil.rmtree(out / gone)
    else:
        (out / gone).unlink()
    code, _, error = run(capsys, *argv)
    assert code == 0 and {path: path.read_bytes() for path in out.rglob("*.png")} == there, error


def test_an_empty_slice_is_made_again_and_an_edited_mask_is_never_written_over(tmp_path, nibabel, capsys):
    argv, out = small_volumes(nibabel, tmp_path, ("a.nii", "b.nii", "c.nii")), tmp_path / "out"
    assert run(capsys, *argv)[0] == 0
    before = (out / "images/b/0002.png").read_bytes()
    (out / "images/b/0002.png").write_bytes(b"")  # as the power can leave it
    assert run(capsys, *argv)[0] == 0 and (out / "images/b/0002.png").read_bytes() == before
    (out / "masks/a/0000.png").unlink()
    put(out / "masks/a/0001.png", np.ones((5, 6), np.uint8))
    edited = (out / "masks/a/0001.png").read_bytes()
    code, _, error = run(capsys, *argv)
    assert code == 2 and one_line_of(error) and "masks/a/0001.png: would be written over" in error
    assert (out / "masks/a/0001.png").read_bytes() == edited and not (out / "masks/a/0000.png").exists()


def test_cases_of_former_calls_are_named(tmp_path, nibabel, capsys):
    argv = small_volumes(nibabel, tmp_path, ("a.nii", "b.nii", "c.nii", "d.nii"))
    assert "of former calls" not in run(capsys, *argv)[1]
    for folder in ("img", "lab"):
        (tmp_path / folder / "d.nii").unlink()
    code, output, error = run(capsys, *argv)
    assert code == 0 and "of former calls and in no list (delete them in images and masks): 1: d" in output, (
        error
    )
    for folder in ("images", "masks"):
        shutil.rmtree(tmp_path / "out" / folder / "d")
    assert "of former calls" not in run(capsys, *argv)[1]


def test_one_case_is_divided_into_blocks(tmp_path, nibabel, capsys):
    """Slices 3 to 26 of 30 have labels: 60/20/20 of the 20 that two gaps of 2 leave."""
    hu = random_hu((4, 4, 30))
    labels = np.zeros((4, 4, 30), np.uint8)
    labels[1, 1, 3:27] = 2
    save_volume(nibabel, tmp_path / "ct.nii.gz", hu)
    save_volume(nibabel, tmp_path / "seg.nii.gz", labels)
    argv = (
        "slice",
        "--images",
        tmp_path / "ct.nii.gz",
        "--labels",
        tmp_path / "seg.nii.gz",
        "--out",
        tmp_path / "out",
    )
    code, output, error = run(capsys, *argv)
    assert code == 0 and "one labelled case" in output and "2 slices dropped" in output, error

    def numbers(split):
        return [int(name[3:7]) for name in read_list(tmp_path / f"out/{split}.txt")]

    assert numbers("train") == [*range(3, 15)]
    assert numbers("val") == [*range(17, 21)]
    assert numbers("test") == [*range(23, 27)]
    assert numbers("unlabelled") == [*range(15), 27, 28, 29]
    assert class_names(tmp_path / "out") == ["background", "class 1", "class 2"]
    labels[:, :, 8:] = 0
    save_volume(nibabel, tmp_path / "seg.nii.gz", labels)
    code, _, error = run(capsys, *argv)
    assert code == 2 and one_line_of(error) and "too few" in error
    assert not (tmp_path / "out/train.txt").exists()


def test_images_alone_are_for_pretraining(tmp_path, nibabel, capsys):
    save_volume(nibabel, tmp_path / "in/a_1.nii", random_hu((4, 5, 6)).astype(np.float32))
    save_volume(nibabel, tmp_path / "in/a_2.nii", random_hu((4, 5, 3)))
    code, _, error = run(capsys, "slice", "--images", tmp_path / "in", "--out", tmp_path / "out")
    assert code == 0, error
    assert len(read_list(tmp_path / "out/unlabelled.txt")) == 9 and not (tmp_path / "out/train.txt").exists()


def test_bad_labels_and_maps(tmp_path, nibabel, capsys):
    zeros = np.zeros((4, 4, 20), np.int16)
    save_volume(nibabel, tmp_path / "ct.nii", random_hu((4, 4, 20)))
    bad_labels = {
        "empty": zeros,
        "negative": zeros - 1,
        "high": zeros + 300,
        "half": zeros.astype(np.float32) + 0.5,
        "infinite": zeros.astype(np.float32) + np.inf,
    }
    good = np.ones_like(zeros)
    argv = ("slice", "--images", tmp_path / "ct.nii", "--out", tmp_path / "out", "--labels")
    for name, labels in bad_labels.items():
        save_volume(nibabel, tmp_path / f"{name}.nii", labels)
        code, _, error = run(capsys, *argv, tmp_path / f"{name}.nii")
        assert code == 2 and one_line_of(error) and f"{name}.nii" in error, (name, error)
    save_volume(nibabel, tmp_path / "good.nii", good)
    for name, content in (
        ("a", "{"),
        ("b", '{"x": 1}'),
        ("c", '{"1": 300}'),
        ("d", "[1]"),
        ("e", '{"1": null}'),
    ):
        (tmp_path / f"{name}.json").write_text(content)
        code, _, error = run(capsys, *argv, tmp_path / "good.nii", "--label-map", tmp_path / f"{name}.json")
        assert code == 2 and one_line_of(error) and f"{name}.json" in error, (name, error)
    assert not list((tmp_path / "out").glob("*.txt"))


@needs_ct
def test_real_ct(tmp_path, nibabel, capsys):
    """The scan of ../shared/ct: sizes, blocks, and organs on the side of the image where a radiologist
    expects them."""
    ids = (1, 2, 3, 4, 15, 5, 6, 52, 63, 64, 7, 8, 9)
    (tmp_path / "map.json").write_text(json.dumps({str(id): index for index, id in enumerate(ids, 1)}))
    volumes = ("--images", CT / "ct.nii.gz", "--labels", CT / "totalseg.nii.gz")
    code, output, error = run(
        capsys, "slice", *volumes, "--label-map", tmp_path / "map.json", "--out", tmp_path / "ct"
    )
    assert code == 0 and "15 (esophagus)" in output, error
    code, output, _ = run(capsys, "check", "--root", tmp_path / "ct")
    assert code == 0 and "101 x 122 px: 108 slices" in output and "0 bad" in output
    dataset = SegmentationDataset(tmp_path / "ct", "test.txt", num_classes=14)
    assert dataset.spacing("ct") == (3, 3, 3)
    places = {}
    for index in range(len(dataset)):
        for label in np.unique(dataset.own_mask(index)):
            places.setdefault(int(label), []).append(np.argwhere(dataset.own_mask(index) == label).mean(0))
    row, column = 0, 1
    centre = {label: np.mean(at, axis=0) for label, at in places.items()}
    assert centre[6][column] < 61 < centre[1][column]  # liver at image left, spleen at image right
    assert centre[7][row] < centre[8][row]  # the stomach lies before the aorta


@needs_ct
def test_real_labels_without_their_affine_or_moved(tmp_path, nibabel, capsys):
    """Refused, and with --ignore-geometry the masks of the original; moved by 3 slices of 3 mm: moved."""
    original = nibabel.load(CT / "totalseg.nii.gz")
    voxels, label_map = np.asarray(original.dataobj), tmp_path / "map.json"
    label_map.write_text('{"1": 1, "5": 2, "52": 3}')
    raised = original.affine.copy()
    raised[2, 3] += 9
    for name, affine in (("same", original.affine), ("bare", None), ("moved", raised)):
        nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / f"{name}.nii.gz")

    def sliced(labels, *options):
        out = tmp_path / f"out-{labels}"
        words = ("--images", CT / "ct.nii.gz", "--labels", tmp_path / f"{labels}.nii.gz", "--out", out)
        code, output, error = run(capsys, "slice", *words, "--label-map", label_map, *options)
        return code, output + error, [read_mask(path) for path in sorted(out.glob("masks/ct/*.png"))]

    code, text, right = sliced("same")
    assert code == 0 and "another grid" not in text and np.any(right)
    code, text, _ = sliced("bare")
    assert code == 2 and "bare.nii.gz does not say where it lies" in text and "mm apart" in text
    code, _, masks = sliced("bare", "--ignore-geometry")
    assert code == 0 and np.array_equal(masks, right)
    code, text, masks = sliced("moved")
    assert code == 0 and "first voxel 0, 0, 9 mm off" in text
    assert np.array_equal(masks[3:], right[:-3]) and not np.any(masks[:3])


@pytest.mark.parametrize("spacing", (0.5, 0.8, 1.9))
def test_slices_on_another_spacing_are_those_of_simpleitk(tmp_path, nibabel, capsys, spacing):
    """Its linear interpolation where pixels become finer, and nearest labels; where they become coarser, the
    smooth slice is the same up to what both do at edges."""
    sitk = pytest.importorskip("SimpleITK")
    x, y, _ = np.meshgrid(np.linspace(0, 1, 40), np.linspace(0, 1, 30), np.arange(12), indexing="ij")
    hu = (-300 + 600 * np.sin(3 * x) * np.cos(2 * y)).astype(np.int16)
    labels = (np.hypot(x - 0.5, y - 0.4) < 0.3).astype(np.uint8)
    affine = np.diag([-0.8, -1.1, 3, 1])
    for name, array in (("ct", hu), ("seg", labels)):
        save_volume(nibabel, tmp_path / f"{name}.nii.gz", array, affine)
    options = ("--images", tmp_path / "ct.nii.gz", "--labels", tmp_path / "seg.nii.gz", "--spacing", spacing)
    code, _, error = run(capsys, "slice", *options, "--out", tmp_path / "out", "--ignore-values")
    assert code == 0, error
    about = json.loads((tmp_path / "out/set.json").read_text())
    height, width = about["size"]
    assert (height, width) == (round(30 * 1.1 / spacing), round(40 * 0.8 / spacing))
    mm = about["spacing"]["ct"]
    assert mm == pytest.approx([3, 33 / height, 32 / width], rel=1e-5)
    for part, array, how in (("images", hu, sitk.sitkLinear), ("masks", labels, sitk.sitkNearestNeighbor)):
        image = sitk.GetImageFromArray(array[:, :, 5].T.astype(np.float32))
        image.SetSpacing((0.8, 1.1))
        origin = [(mm[2] - 0.8) / 2, (mm[1] - 1.1) / 2]  # edges stay where they are
        new = sitk.Resample(
            image, (width, height), sitk.Transform(), how, origin, (mm[2], mm[1]), (1, 0, 0, 1), 0
        )
        expected = sitk.GetArrayFromImage(new)[2:-2, 2:-2]
        path = tmp_path / f"out/{part}/ct/0005.png"
        found = read_slice(path) if part == "images" else read_mask(path)
        difference = np.abs(found[2:-2, 2:-2] - expected)
        if part == "masks":
            assert (difference > 0).mean() < 0.01  # half-way between two pixels either is nearest
        else:
            assert difference.max() <= (1 if spacing < 0.8 else 15)


def test_a_spacing_that_is_none_is_refused(tmp_path, capsys):
    code, _, error = run(capsys, "slice", "--images", tmp_path, "--out", tmp_path / "out", "--spacing", "0")
    assert code == 2 and "0 is not above 0" in error


def test_splits_are_by_patient_and_a_split_of_ones_own_that_is_not_is_said(tmp_path, nibabel, capsys):
    for number in range(5):
        for scan in ("arterial", "venous"):
            save_volume(nibabel, tmp_path / f"ct/p{number}/{scan}.nii.gz", random_hu((4, 4, 3), number))
            if scan == "arterial" or number < 3:
                labels = np.ones((4, 4, 3), np.uint8)
                save_volume(nibabel, tmp_path / f"seg/p{number}/{scan}.nii.gz", labels)
    argv = ("slice", "--images", tmp_path / "ct", "--labels", tmp_path / "seg", "--out", tmp_path / "out")

    def whose(split):
        return {name[:2] for name in read_list(tmp_path / f"out/{split}.txt")}

    code, output, error = run(capsys, *argv)
    assert code == 0, error
    assert (
        "case: p0_arterial, of patient p0 (2 scans, by the folder; --patient REGEX says otherwise)" in output
    )
    assert read_properties(tmp_path / "out").patients["p4_venous"] == "p4"
    assert [len(whose(split)) for split in ("train", "val", "test")] == [3, 1, 1]
    assert not whose("train") & (whose("val") | whose("test")) and whose("unlabelled") == whose("train")
    (tmp_path / "split.json").write_text('{"train": ["p0_arterial", "p1_arterial"], "test": ["p1_venous"]}')
    code, output, _ = run(capsys, *argv, "--split", tmp_path / "split.json")
    assert code == 0 and "warning: patients in several of train, val, test: 1, the first: p1" in output
    assert whose("train") == {"p0", "p1"} and "p1_arterial/0000.png" in read_list(tmp_path / "out/train.txt")
    code, output, _ = run(capsys, *argv, "--patient", "[^/]+$")
    assert code == 0 and len({*read_properties(tmp_path / "out").patients.values()}) == 2
    code, _, error = run(capsys, *argv, "--patient", "(")
    assert code == 2 and "no regular expression" in error and one_line_of(error)
