"""NIfTI volumes: reading them in radiological view, and writing labels back on their own grid.

nibabel is needed here and nowhere else (pip install nibabel).
"""

import gzip
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ct.properties import MAX_SPACING
from ct.slices import MAX_SIDE, DataError
from engine.config import one_line
from engine.files import written_whole

# Where slices, rows and columns run to, by slice axis: Left, Posterior, Superior or Inferior of the patient.
# Axial slices lie as a radiologist sees them: the patient's right at the left, anterior at the top.
VIEWS = {0: "LIP", 1: "PIL", 2: "SPL"}


@dataclass
class Volume:
    """array (S, H, W) in radiological view whatever the file's affine; spacing (slice, row, column) in mm.

    The array is a view of the file's voxels, so its strides may be negative.
    """

    array: np.ndarray
    spacing: tuple
    path: Path
    image: object = field(repr=False)  # nibabel's, for its affine, header and shape
    to_file: np.ndarray = field(repr=False)  # orientation of the view's axes on the file's grid

    def restore(self, labels):
        """labels (S, H, W) in the view -> the same voxels on the file's own grid."""
        from nibabel.orientations import apply_orientation

        if labels.shape != self.array.shape:
            raise DataError(f"{self.path}: {self.array.shape} voxels, but the labels have {labels.shape}")
        return apply_orientation(labels, self.to_file).reshape(self.image.shape)


@np.errstate(all="ignore")  # of scales and affines; what comes of them is checked
def read_volume(path, axis=2):
    """A .nii or .nii.gz as a Volume whose slices lie across `axis` (0 sagittal, 1 coronal, 2 axial).

    Raises DataError for anything that is not a readable volume of numbers with an affine.
    """
    nibabel = import_nibabel()
    path = Path(path)
    try:
        image = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Image):
            raise DataError(f"{path}: not NIfTI (.nii or .nii.gz)")
        check_header(image, path)
        array = np.asanyarray(image.dataobj)
        from_file = nibabel.io_orientation(image.affine)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (DataError, PermissionError):
        raise
    except Exception as error:  # nibabel and zlib raise many kinds on damaged files
        raise DataError(f"{path}: not a readable NIfTI volume ({one_line(error)})") from None
    if np.isnan(from_file).any():
        raise DataError(f"{path}: its affine does not say which way the axes run")
    wanted = nibabel.orientations.axcodes2ornt(VIEWS[axis])
    to_view = nibabel.orientations.ornt_transform(from_file, wanted)
    shape = image.shape[:3]
    view = nibabel.orientations.apply_orientation(array.reshape(shape), to_view)
    affine = image.affine @ nibabel.orientations.inv_ornt_aff(to_view, shape)
    spacing = tuple(round(float(mm), 6) for mm in nibabel.affines.voxel_sizes(affine))
    if not all(0 < mm < MAX_SPACING for mm in spacing):
        raise DataError(f"{path}: its affine says that voxels have {spacing} mm")
    return Volume(view, spacing, path, image, nibabel.orientations.ornt_transform(wanted, from_file))


def check_header(image, path):
    """Before any voxel is read: three dimensions of real numbers, no more of them than the file can hold."""
    shape = image.shape
    if len(shape) < 3 or any(side != 1 for side in shape[3:]):
        raise DataError(f"{path}: a volume of three dimensions is expected, this one has shape {shape}")
    if min(shape) < 1 or max(shape) > MAX_SIDE:
        raise DataError(f"{path}: {shape} voxels; 1 to {MAX_SIDE} along each axis can be read")
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        raise DataError(f"{path}: voxels of numbers are expected, not {dtype}")
    inflation = 1032 if path.suffix.lower() == ".gz" else 1  # the most that deflate can do
    if np.prod(shape, dtype=float) * dtype.itemsize > os.path.getsize(path) * inflation:
        raise DataError(f"{path}: damaged, too short for the {shape} voxels its header claims")


def write_labels(path, labels, volume, made_by=None):
    """labels (S, H, W) uint8 in the view of `volume` -> a NIfTI on its file's grid, affine and header
    kept; made_by: see written_whole."""
    path = Path(path)
    header = volume.image.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header["cal_min"], header["cal_max"] = 0, 0
    voxels = np.ascontiguousarray(volume.restore(np.asarray(labels)).astype(np.uint8))
    image = volume.image.__class__(voxels, volume.image.affine, header)
    with written_whole(path, made_by=made_by) as file:
        if path.suffix.lower() == ".gz":
            with gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed:
                image.to_stream(packed)
        else:
            image.to_stream(file)


def import_nibabel():
    try:
        import nibabel
    except ImportError:
        raise DataError("NIfTI files need nibabel: pip install nibabel") from None
    nibabel.imageglobals.logger.setLevel("CRITICAL")  # what is wrong with a header is raised anyway
    return nibabel
