"""ct/volumes.py: NIfTI of any orientation, against nibabel, and damaged ones."""

import gzip
import struct
import sys

import numpy as np
import pytest
from handmade import affines, one_line_of, png_bytes, run

from ct import volumes
from ct.slices import DataError


def test_radiological_view_against_nibabel(tmp_path, nibabel):
    """Whatever the affine: the array is nibabel's closest canonical (RAS) one, as slices from below, rows
    from anterior, columns from the patient's right. Labels return to the file's own grid."""
    rng = np.random.default_rng(0)
    for codes, affine in affines(nibabel):
        voxels = rng.integers(-1000, 1000, (5, 6, 7)).astype(np.int16)
        original = nibabel.Nifti1Image(voxels, affine)
        original.header["descrip"] = b"kept"
        nibabel.save(original, tmp_path / "v.nii.gz")
        canonical = nibabel.as_closest_canonical(original)
        ras = np.asarray(canonical.dataobj)
        zooms = canonical.header.get_zooms()
        axial = volumes.read_volume(tmp_path / "v.nii.gz")
        assert np.array_equal(axial.array, ras[::-1, ::-1].transpose(2, 1, 0)), codes
        assert axial.spacing == pytest.approx(zooms[::-1], rel=1e-5)
        coronal = volumes.read_volume(
            tmp_path / "v.nii.gz", axis=1
        )  # rows from superior, columns from the right
        assert np.array_equal(coronal.array, ras[::-1, ::-1, ::-1].transpose(1, 2, 0))
        sagittal = volumes.read_volume(
            tmp_path / "v.nii.gz", axis=0
        )  # rows from superior, columns from anterior
        assert np.array_equal(sagittal.array, ras[::-1, ::-1, ::-1].transpose(0, 2, 1))
        assert sagittal.spacing == pytest.approx((zooms[0], zooms[2], zooms[1]), rel=1e-5)
        for volume in (axial, coronal, sagittal):
            labels = ((volume.array > 0) * 3 + (volume.array > 500)).astype(np.uint8)
            volumes.write_labels(tmp_path / "out.nii.gz", labels, volume)
            written = nibabel.load(tmp_path / "out.nii.gz")
            assert np.array_equal(np.asarray(written.dataobj), (voxels > 0) * 3 + (voxels > 500))
            assert written.get_data_dtype() == np.uint8 and np.allclose(written.affine, affine, atol=1e-4)
            assert bytes(written.header["descrip"]).startswith(b"kept")


def test_volume_with_slope_and_a_fourth_axis(tmp_path, nibabel):
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4, 1)
    image = nibabel.Nifti1Image(voxels, np.eye(4))
    image.header.set_slope_inter(2, -100)
    nibabel.save(image, tmp_path / "v.nii")
    volume = volumes.read_volume(tmp_path / "v.nii")
    saved = np.asarray(nibabel.load(tmp_path / "v.nii").dataobj)[..., 0]
    assert np.allclose(volume.array, saved[::-1, ::-1].transpose(2, 1, 0))
    volumes.write_labels(tmp_path / "l.nii", (volume.array > saved.mean()).astype(np.uint8), volume)
    assert np.array_equal(np.asarray(nibabel.load(tmp_path / "l.nii").dataobj)[..., 0], saved > saved.mean())


@pytest.mark.parametrize("name", ["v.NII", "v.Nii", "v.NII.GZ", "v.nii.Gz", "plain.nii.gz", "packed.nii"])
@pytest.mark.parametrize("kind", ["Nifti1Image", "Nifti2Image"])
def test_suffixes_of_any_case_and_wrong_ones(tmp_path, nibabel, name, kind):
    voxels = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7)).astype(np.int16)
    nibabel.save(getattr(nibabel, kind)(voxels, np.diag([-1, -1, 2, 1.0])), tmp_path / "whole.nii")
    packed = name in ("v.NII.GZ", "v.nii.Gz", "packed.nii")
    content = (tmp_path / "whole.nii").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    assert np.array_equal(volumes.read_volume(tmp_path / name).array, voxels.transpose(2, 1, 0))


def test_bad_volumes_are_named(tmp_path, nibabel, capsys):
    whole = nibabel.Nifti1Image(
        np.random.default_rng(0).integers(0, 9, (9, 9, 9)).astype(np.int16), np.eye(4)
    )
    nibabel.save(whole, tmp_path / "v.nii")
    content = (tmp_path / "v.nii").read_bytes()
    huge = bytearray(content)
    struct.pack_into("<8h", huge, 40, 3, 9000, 9000, 9000, 1, 1, 1, 1)
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 3, 3, 2), np.int16), np.eye(4)), tmp_path / "4d.nii")
    files = {
        "text.nii": b"hello",
        "empty.nii.gz": b"",
        "short.nii": content[:700],
        "huge.nii": bytes(huge),
        "4d.nii": (tmp_path / "4d.nii").read_bytes(),
        "image.png": png_bytes(np.zeros((4, 4), np.uint8)),
    }
    for name, bad in files.items():
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(DataError, match=name) as error:
            volumes.read_volume(tmp_path / name)
        assert "\n" not in str(error.value)
        code, _, error = run(capsys, "slice", "--images", tmp_path / name, "--out", tmp_path / "out")
        assert code == 2 and one_line_of(error) and not list((tmp_path / "out").glob("*.txt")), (name, error)


def test_missing_nibabel_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nibabel", None)
    (tmp_path / "v.nii").write_bytes(b"")
    code, _, error = run(capsys, "slice", "--images", tmp_path / "v.nii", "--out", tmp_path / "out")
    assert code == 2 and one_line_of(error) and "pip install nibabel" in error
