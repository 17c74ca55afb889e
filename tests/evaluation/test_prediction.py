"""What travels with a set and a model: size, axis, spacing, kind. Predictions go the way of the scores."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade import put, save_volume
from PIL import Image

import eval_seg
from ct.grid import Grid
from ct.properties import Properties, class_names, read_properties, write_properties
from ct.slices import DataError, read_mask, read_slice
from evaluation import metrics

TINY = ["model.arch=tiny", "model.output_stride=8", "data.workers=0", "run.device=cpu", "optim.steps=30"]
TINY += ["optim.batch_size=6", "eval.every=30", "log.every=30", "encoder=random", "data.val=null"]


def run(*arguments):
    return eval_seg.main([str(argument) for argument in arguments])


def results_of(out):
    return json.loads((out / "results.json").read_text())


def dice_of_files(root, masks, names, case):
    """Dice of each class but the background from mask files, each on its own grid."""
    classes = len(class_names(root))
    counts = sum(
        metrics.dice_counts(
            torch.tensor(read_mask(masks / name)), torch.tensor(read_mask(root / "masks" / name)), classes
        )
        for name in names
        if name.startswith(f"{case}/")
    )
    return metrics.case_dice(counts)[1:]


def resized(array, factor, image):
    size = tuple(round(side * factor) for side in reversed(array.shape))
    how = Image.Resampling.BILINEAR if image else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(array.astype(np.float32) if image else array).resize(size, how))


@pytest.fixture(scope="module")
def mixed(phantom, tmp_path_factory):
    """The phantom's slices, those of its test case and one more at half the size; and a model for them."""
    root = tmp_path_factory.mktemp("mixed") / "set"
    train = (phantom / "train.txt").read_text().split()
    small, large = train[-1].split("/")[0], (phantom / "test.txt").read_text().split()
    test = [name for name in train if name.startswith(f"{small}/")] + large
    for name in train + large:
        hu, mask = read_slice(phantom / "images" / name), read_mask(phantom / "masks" / name)
        factor = 0.5 if name.startswith(f"{small}/") else 1
        stored = (resized(hu, factor, True) + 1024).round().astype(np.uint16)
        put(root / "images" / name, stored)
        put(root / "masks" / name, resized(mask, factor, False))
    (root / "train.txt").write_text("\n".join(name for name in train if name not in test))
    (root / "test.txt").write_text("\n".join(test))
    (root / "tset.txt").write_text("\n".join(reversed(test)))
    write_properties(root, Properties(classes=class_names(phantom)))
    for out, name in (("forth", "test.txt"), ("back", "tset.txt")):
        run(*TINY, f"data.root={root}", f"run.out={root.parent / out}", f"data.test={name}")
    return root


def test_the_order_of_a_list_changes_no_score(mixed):
    forth, back = (results_of(mixed.parent / name)["cases"] for name in ("forth", "back"))
    assert len(forth) == 2 and forth == back


def test_masks_of_mixed_sizes_score_as_the_results_say(mixed, tmp_path):
    results = results_of(mixed.parent / "forth")
    run(f"run.out={mixed.parent / 'forth'}", "--predict", mixed, "--out", tmp_path / "masks")
    names = (mixed / "test.txt").read_text().split()
    for case, expected in results["cases"].items():
        found = dice_of_files(mixed, tmp_path / "masks", names, case)
        assert found == pytest.approx([*expected.values()], nan_ok=True)
    assert {read_mask(tmp_path / "masks" / name).shape for name in names} == {(24, 24), (48, 48)}
    everything = {path.relative_to(tmp_path / "masks").as_posix() for path in tmp_path.rglob("*.png")}
    assert everything == {p.relative_to(mixed / "images").as_posix() for p in mixed.glob("images/*/*.png")}


def test_all_lists_have_the_training_sets_size(mixed):
    from data import SegmentationDataset, SliceDataset

    train = SegmentationDataset(mixed, "train.txt")
    assert train.size == (48, 48) and SliceDataset(mixed, "test.txt").size == (24, 24)
    test = SegmentationDataset(mixed, "test.txt", like=train)
    assert test.size == (48, 48) and test[0][0].shape == (1, 48, 48)


def volume_set(tmp_path, nibabel, axis, capsys):
    """A set of three labelled volumes made by `data.py slice`, with a bright block in each."""
    from handmade import run as data_py

    rng = np.random.default_rng(0)
    for case in "abc":
        hu = np.full((32, 32, 32), -1000, np.int16) + rng.integers(-20, 20, (32, 32, 32), np.int16)
        hu[4:-4, 4:-4, :] = rng.integers(-20, 60, (24, 24, 32))
        low, high = sorted(rng.choice(np.arange(6, 26), 2, replace=False))
        labels = np.zeros(hu.shape, np.uint8)
        labels[8:22, low : high + 2, 6:26] = 1
        hu[labels == 1] += 150
        affine = np.diag([-1.5, -1.5, 1.5, 1.0])
        save_volume(nibabel, tmp_path / f"ct/{case}.nii.gz", hu, affine)
        save_volume(nibabel, tmp_path / f"seg/{case}.nii.gz", labels, affine)
    argv = ["slice", "--images", tmp_path / "ct", "--labels", tmp_path / "seg", "--axis", axis]
    code, _, error = data_py(capsys, *argv, "--out", tmp_path / "set")
    assert code == 0, error
    return tmp_path / "set"


def dice_of_volume(nibabel, found, truth):
    counts = [np.asarray(nibabel.load(path).dataobj) == 1 for path in (found, truth)]
    return 2 * (counts[0] & counts[1]).sum() / (counts[0].sum() + counts[1].sum())


@pytest.mark.parametrize("axis", (1, 2))
def test_a_volume_is_segmented_across_the_models_axis_at_its_spacing(tmp_path, nibabel, capsys, axis):
    """Dice of the predicted volume is that of results.json; and nearly so at half the spacing."""
    root = volume_set(tmp_path, nibabel, axis, capsys)
    out = tmp_path / "run"
    run(*TINY, "optim.lr=2", "optim.steps=120", f"data.root={root}", f"run.out={out}")
    results = results_of(out)
    assert results["data"]["axis"] == axis and results["data"]["pixel_mm"] == [[1.5, 1.5], [1.5, 1.5]]
    [(case, dice)] = results["cases"].items()
    run(f"run.out={out}", "--predict", tmp_path / f"ct/{case}.nii.gz", "--out", tmp_path / "same")
    same = dice_of_volume(nibabel, tmp_path / f"same/{case}.nii.gz", tmp_path / f"seg/{case}.nii.gz")
    assert same == pytest.approx(dice["class 1"], abs=1e-3) and same > 0.5
    capsys.readouterr()

    for folder in ("ct", "seg"):  # each voxel eight times, at half the spacing
        voxels = np.asarray(nibabel.load(tmp_path / f"{folder}/{case}.nii.gz").dataobj)
        for side in range(3):
            voxels = voxels.repeat(2, axis=side)
        save_volume(nibabel, tmp_path / f"fine/{folder}.nii.gz", voxels, np.diag([-0.75, -0.75, 0.75, 1.0]))
    # A part of the body at that spacing: as large in pixels as the training slices.
    part = np.asarray(nibabel.load(tmp_path / "fine/ct.nii.gz").dataobj)[8:40, 8:40, 8:40]
    save_volume(nibabel, tmp_path / "fine/part.nii.gz", part, np.diag([-0.75, -0.75, 0.75, 1.0]))
    for name in ("ct", "part"):
        source = tmp_path / f"fine/{name}.nii.gz"  # the part holds no air
        run(f"run.out={out}", "data.insist=true", "--predict", source, "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert "part.nii.gz: rows 0.75 mm apart" in said and "ct.nii.gz: rows" not in said
    fine = dice_of_volume(nibabel, tmp_path / "out/ct.nii.gz", tmp_path / "fine/seg.nii.gz")
    assert fine > same - 0.05


def test_a_dicom_series_is_segmented_like_the_same_volume_as_nifti(tmp_path, nibabel, capsys):
    """By its folder, by a tree, and by one of its files; the mask is called after the case and lies where
    SimpleITK's own reader says that the series lies."""
    sitk = pytest.importorskip("SimpleITK")
    from handmade import SECRET, write_series

    out = tmp_path / "run"
    run(*TINY, "optim.lr=2", f"data.root={volume_set(tmp_path, nibabel, 2, capsys)}", f"run.out={out}")
    hu = np.asarray(nibabel.load(tmp_path / "ct/a.nii.gz").dataobj).T
    series = write_series(tmp_path / "dicom/p1", hu, spacing=1.5, mm=1.5)
    (tmp_path / "dicom/report").write_bytes(bytes(128) + b"DICM" + b"nothing")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series)))
    theirs = reader.Execute()
    (tmp_path / "nifti").mkdir()
    sitk.WriteImage(theirs, str(tmp_path / "nifti/p1.nii.gz"))
    capsys.readouterr()
    sources = ["dicom", "dicom/p1", "dicom/p1/IM0007", "nifti"]
    for index, source in enumerate(sources):
        run(f"run.out={out}", "--predict", tmp_path / source, "--out", tmp_path / f"out{index}")
    said = capsys.readouterr()
    assert "left out: 1 file: no picture" in said.out and SECRET not in said.out + said.err
    masks = [sitk.ReadImage(str(tmp_path / f"out{index}/p1.nii.gz")) for index in range(len(sources))]
    arrays = [sitk.GetArrayFromImage(mask) for mask in masks]
    assert arrays[0].any() and all((array == arrays[0]).all() for array in arrays)
    for corner in ((0, 0, 0), (31, 31, 31)):
        own, other = (image.TransformIndexToPhysicalPoint(corner) for image in (masks[0], theirs))
        assert own == pytest.approx(other)


def test_a_folder_of_all_kinds_gives_slicing_and_prediction_the_same_cases(mixed, tmp_path, nibabel, capsys):
    """Several formats, nested, several series in a folder; what is no case is named by both."""
    sitk = pytest.importorskip("SimpleITK")
    from handmade import run as data_py
    from handmade import write_series

    root, hu = tmp_path / "in", np.random.default_rng(0).integers(-1000, 300, (3, 24, 24)).astype(np.int16)
    for name in ("flat", "p2/old", "p3/imaging", "a_0000", "a_0001", "b_0000", "b_0001"):
        save_volume(nibabel, root / f"{name}.nii.gz", hu.T)
    for name in ("p1/seg.nii.gz", "p4/p4_seg.nii.gz", "labelsTr/flat.nii.gz", "p3/segmentation.nii.gz"):
        save_volume(nibabel, root / name, (hu.T > 0).astype(np.uint8))
    sitk.WriteImage(sitk.GetImageFromArray(hu), str(root / "q.nrrd"))
    sitk.WriteImage(sitk.GetImageFromArray(hu), str(root / "p2/new.mha"))
    write_series(root / "p1", hu)
    write_series(root / "p4/study", hu, "1.2.4", "a{:d}")
    write_series(root / "p4/study", hu, "1.2.5", "b{:d}")
    write_series(root / "p4/drawn", hu, "1.2.6", **{"0008|0060": "SEG"})
    put(root / "r.mgz", b"")
    code, sliced, error = data_py(
        capsys, "slice", "--images", root, "--out", tmp_path / "set", "--ignore-values"
    )
    assert code == 0, error
    source = ["data.insist=true", "--predict", root, "--out", tmp_path / "out"]
    run(f"run.out={mixed.parent / 'forth'}", *source)
    cases = {path.name for path in (tmp_path / "set/images").iterdir() if path.is_dir()}
    assert {
        path.name.split(".")[0] for path in (tmp_path / "out").rglob("*.*") if path.name[0] != "."
    } == cases
    several = {case for case in cases if case.startswith("p4_study_")}
    assert len(several) == 2 and cases - several == {"flat", "p2_old", "p2_new", "p3", "q", "p1", "a", "b"}
    for said in (sliced, capsys.readouterr().out):
        assert "3 files: SEG, not CT" in said and "r.mgz" in said and "a_0001" in said
        assert "masks by their names" in said or "files are masks by their names" in said
    put(root / "p3.nii", b"")
    both = f"{root}/p3/imaging.nii.gz and {root}/p3.nii would both be the case p3"
    code, _, error = data_py(capsys, "slice", "--images", root, "--out", tmp_path / "set2")
    assert code == 2 and both in error
    with pytest.raises(DataError, match=both):
        run(f"run.out={mixed.parent / 'forth'}", *source)


def test_dicom_files_that_are_no_series_are_one_line(mixed, tmp_path):
    pytest.importorskip("SimpleITK")
    from handmade import write_series

    write_series(tmp_path / "in", np.zeros((2, 8, 8), np.int16))
    with pytest.raises(DataError, match=r"neither slices .* \(left out: 2 files: in series of fewer than 3"):
        run(f"run.out={mixed.parent / 'forth'}", "--predict", tmp_path / "in", "--out", tmp_path / "out")


def test_finer_pixels_are_scaled_down_to_those_of_training_and_labels_back():
    grid = Grid((64, 64), ((0.8, 1.0), (0.8, 1.0)))
    assert grid.placement((64, 64), (0.9, 0.9)) == (64, 64, 0, 0)
    assert grid.placement((64, 64), (0.75, 0.75)) == (64, 64, 0, 0)  # not worth it
    assert grid.placement((64, 64), (0.4, 0.4)) == (32, 32, 16, 16)
    assert grid.placement((128, 128), (0.4, 0.4)) == (64, 64, 0, 0)
    assert grid.placement((64, 64), (0.4, 0.9)) == (32, 64, 16, 0)
    assert Grid((64, 64)).placement((64, 64), (0.4, 0.4)) == (64, 64, 0, 0)
    for own in ((64, 64), (128, 128), (40, 56)):
        labels = torch.zeros(own, dtype=torch.uint8)
        labels[own[0] // 4 : own[0] // 2, own[1] // 4 :] = 3
        on_grid = grid.bring(labels, 255, (0.4, 0.4), nearest=True)
        assert on_grid.shape == (64, 64)
        back = grid.back(on_grid, own, (0.4, 0.4))
        assert back.shape == own and (back == labels).float().mean() > 0.95
    assert grid.judge((64, 64), (0.9, 0.9), "here") == [] == Grid((64, 64)).judge((64, 64), (9, 9), "here")
    assert len(grid.judge((64, 64), (0.4, 0.4), "here")) == 2
    assert "organs look smaller" in grid.judge((64, 64), (1.0, 2.0), "here")[0].text


def test_a_model_of_stored_values_takes_volumes_and_slices_as_it_was_trained(phantom, tmp_path, nibabel):
    """hu_offset=0 trains on HU + 1024; a volume of HU, and slices read by default, give the same masks."""
    out = tmp_path / "run"
    settings = [f"data.root={phantom}", f"run.out={out}", "data.hu_offset=0", "data.window=[864,1264]"]
    run(*TINY, *settings)
    facts = results_of(out)["data"]
    assert (facts["kind"], facts["hu_offset"]) == ("stored", 1024)
    case = (phantom / "test.txt").read_text().split("/")[0]
    names = sorted((phantom / "images" / case).iterdir())
    run(f"run.out={out}", "--predict", phantom / "images" / case, "--out", tmp_path / "slices")
    expected = np.stack([read_mask(tmp_path / "slices" / name.name) for name in names])
    hu = np.stack([read_slice(name) for name in names])
    between, row, column = read_properties(phantom).spacing[case]
    affine = np.diag([column, row, between, 1.0]) @ np.diag([-1, -1, 1, 1])
    save_volume(nibabel, tmp_path / "ct.nii.gz", hu.transpose(2, 1, 0).astype(np.int16), affine)
    run(f"run.out={out}", "--predict", tmp_path / "ct.nii.gz", "--out", tmp_path / "volume")
    found = np.asarray(nibabel.load(tmp_path / "volume/ct.nii.gz").dataobj).transpose(2, 1, 0)
    assert expected.any() and np.array_equal(found, expected)


def test_slices_of_finer_pixels_than_in_training_are_said(phantom, tmp_path, capsys):
    """The set around them knows the spacing; the model was trained on twice of that."""
    for root, factor in ((tmp_path / "train", 1), (tmp_path / "finer", 0.5)):
        root.mkdir()
        for folder in ("images", "masks"):
            (root / folder).symlink_to(phantom / folder)
        for split in ("train.txt", "test.txt"):
            (root / split).write_text((phantom / split).read_text())
        known = read_properties(phantom)
        spacing = {case: tuple(factor * mm for mm in three) for case, three in known.spacing.items()}
        write_properties(root, replace(known, spacing=spacing))
    run(*TINY, f"data.root={tmp_path / 'train'}", f"run.out={tmp_path / 'run'}")
    for root, said in ((tmp_path / "train", False), (tmp_path / "finer", True)):
        capsys.readouterr()
        run(f"run.out={tmp_path / 'run'}", "--predict", root, "--out", tmp_path / f"{root.name}-masks")
        assert ("scaled down to these, and back" in capsys.readouterr().err) == said


def test_what_is_damaged_is_named_and_passed_over(mixed, tmp_path, capsys):
    folder = tmp_path / "in"
    name = (mixed / "test.txt").read_text().split()[-1]
    for index in range(3):
        put(folder / f"{index}.png", (mixed / "images" / name).read_bytes())
    put(folder / "1.png", b"no picture")
    with pytest.raises(DataError, match=r"no masks for 1 of 3 files, the first: .*1\.png"):
        run(f"run.out={mixed.parent / 'forth'}", "--predict", folder, "--out", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["0.png", "2.png"]
    assert "1.png: not a PNG, JPEG, TIFF or BMP image; passed over" in capsys.readouterr().err


def test_a_volume_that_is_no_hu_is_refused_until_somebody_insists(mixed, tmp_path, nibabel):
    name = (mixed / "test.txt").read_text().split()[-1]
    hu = read_slice(mixed / "images" / name)[..., None] + 1024
    save_volume(nibabel, tmp_path / "mr.nii.gz", hu.astype(np.int16).repeat(3, 2), np.diag([-8, -8, 8, 1]))
    model = f"run.out={mixed.parent / 'forth'}"
    with pytest.raises(DataError, match=r"mr\.nii\.gz: values from 0 to .*data\.insist=true insists"):
        run(model, "--predict", tmp_path / "mr.nii.gz", "--out", tmp_path / "out")
    assert run(model, "data.insist=true", "--predict", tmp_path / "mr.nii.gz", "--out", tmp_path / "out") == 0
    assert Path(tmp_path / "out/mr.nii.gz").exists()


def test_masks_are_never_taken_for_images(mixed, tmp_path, capsys):
    """Of a set in another layout than that of the model's, and of one in which every case has a folder."""
    root, out = mixed, mixed.parent / "forth"
    slice, mask = next((root / "images").rglob("*.png")), next((root / "masks").rglob("*.png"))
    files = {"img/1.PNG": slice, "labelsTr/1.png": mask, "case/image.png": slice, "case/mask.png": mask}
    files |= {"b.png": slice, "b_seg.png": mask}
    for name, source in files.items():
        put(tmp_path / "set" / name, source.read_bytes())
    run(f"run.out={out}", "--predict", tmp_path / "set", "--out", tmp_path / "pred")
    written = sorted(p.relative_to(tmp_path / "pred").as_posix() for p in (tmp_path / "pred").rglob("*.png"))
    assert written == ["b.png", "case/image.png", "img/1.png"]
    assert "3 files are masks by their names" in capsys.readouterr().out
    put(tmp_path / "whole/images/1.png", slice.read_bytes())
    put(tmp_path / "whole/masks/1.png", mask.read_bytes())
    put(tmp_path / "whole/more/1.png", slice.read_bytes())
    run(f"run.out={out}", "--predict", tmp_path / "whole", "--out", tmp_path / "one")
    assert "a data set; what lies in its images is taken" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "one").rglob("*.png")] == ["1.png"]
    put(tmp_path / "only/masks/1.png", mask.read_bytes())
    with pytest.raises(DataError, match="only masks there"):
        run(f"run.out={out}", "--predict", tmp_path / "only", "--out", tmp_path / "other")


def test_a_slice_of_air_is_nothing_wrong(mixed, tmp_path, capsys):
    put(tmp_path / "air.png", np.random.default_rng(0).integers(0, 30, (48, 48)).astype(np.uint16))
    model = f"run.out={mixed.parent / 'forth'}"
    assert run(model, "--predict", tmp_path / "air.png", "--out", tmp_path / "out") == 0
    assert "black" in capsys.readouterr().err


def test_values_of_16_bits_do_not_overflow_where_they_are_judged(mixed, tmp_path, nibabel, recwarn):
    wide = np.random.default_rng(0).integers(-32768, 32767, (8, 8, 4)).astype(np.int16)
    save_volume(nibabel, tmp_path / "wide.nii", wide, np.diag([-8, -8, 8, 1]))
    with pytest.raises(DataError, match="beyond .*10,000: no HU"):
        run(
            f"run.out={mixed.parent / 'forth'}", "--predict", tmp_path / "wide.nii", "--out", tmp_path / "out"
        )
    assert not [one for one in recwarn if issubclass(one.category, RuntimeWarning)]


def test_a_folder_called_images_makes_no_data_set(mixed, tmp_path):
    name = (mixed / "test.txt").read_text().split()[-1]
    for place in ("images/a.png", "more/b.png"):
        put(tmp_path / "in" / place, (mixed / "images" / name).read_bytes())
    model = f"run.out={mixed.parent / 'forth'}"
    run(model, "--predict", tmp_path / "in", "--out", tmp_path / "out")
    assert {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")} == {
        "images/a.png",
        "more/b.png",
    }
