"""Volumes: reading them in radiological view, and writing labels back on their own grid, as NIfTI.

nibabel is needed for all of them (pip install nibabel), SimpleITK for what is not NIfTI, see scans.py.
"""

import gzip
import os
import struct
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ct.geometry import Geometry
from ct.properties import MAX_SPACING
from ct.scans import is_dicom, is_named_scan, open_scan
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
    geometry: Geometry = field(repr=False)

    def restore(self, labels):
        """labels (S, H, W) in the view -> the same voxels on the file's own grid."""
        from nibabel.orientations import apply_orientation

        if labels.shape != self.array.shape:
            raise DataError(f"{self.path}: {self.array.shape} voxels, but the labels have {labels.shape}")
        return apply_orientation(labels, self.to_file).reshape(self.image.shape)


def read_volume(path, axis=2, like=None):
    """A NIfTI, NRRD or MetaImage file, or the series of a DICOM file, as a Volume whose slices lie across
    `axis` (0 sagittal, 1 coronal, 2 axial).

    like: a Geometry of the same file_shape, by whose affine the file is read instead of its own.

    Raises DataError for anything that is not a readable volume of numbers with an affine.
    """
    nibabel = import_nibabel()
    image, geometry, to_view = open_volume(path, axis, like)
    try:
        with np.errstate(all="ignore"):  # of scales; what comes of them is checked
            array = np.asanyarray(image.dataobj)
    except DataError:
        raise
    except Exception as error:  # nibabel and zlib raise many kinds on damaged files
        raise unreadable(path, error) from None
    view = nibabel.orientations.apply_orientation(array.reshape(geometry.file_shape), to_view)
    spacing = tuple(round(float(mm), 6) for mm in geometry.spacing())
    wanted = nibabel.orientations.axcodes2ornt(VIEWS[axis])
    to_file = nibabel.orientations.ornt_transform(wanted, nibabel.io_orientation(geometry.file_affine))
    return Volume(view, spacing, geometry.path, image, to_file, geometry)


def read_geometry(path, axis=2):
    """The Geometry of a volume, without reading its voxels; raises DataError as read_volume does."""
    return open_volume(path, axis)[1]


@np.errstate(all="ignore")  # of affines; what comes of them is checked
def open_volume(path, axis, like=None):
    """nibabel's image, its Geometry, and the orientation from the file's grid to the view."""
    nibabel = import_nibabel()
    path = Path(path)
    try:
        doubts = []
        if is_named_scan(path) or is_dicom(path):
            image, doubts = open_scan(nibabel, path)
        else:
            image = load(nibabel, path)
            check_header(image, path)
        affine = image.affine if like is None else like.file_affine
        from_file = nibabel.io_orientation(affine)
        placed = image.header["sform_code"] > 0 or image.header["qform_code"] > 0
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (DataError, PermissionError):
        raise
    except Exception as error:
        raise unreadable(path, error) from None
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if np.isnan(from_file).any() or not abs(np.linalg.det(axes)) > 1e-3:
        raise DataError(f"{path}: its affine does not say which way the axes run")
    to_view = nibabel.orientations.ornt_transform(from_file, nibabel.orientations.axcodes2ornt(VIEWS[axis]))
    shape = image.shape[:3]
    of_view = affine @ nibabel.orientations.inv_ornt_aff(to_view, shape)
    view_shape = tuple(shape[axis] for axis in np.argsort(to_view[:, 0]))
    placed = bool(placed) and not np.array_equal(affine, np.eye(4))
    geometry = Geometry(path, view_shape, of_view, shape, affine, placed, disagreement(image), tuple(doubts))
    mm = tuple(round(float(mm), 6) for mm in geometry.spacing())
    if not all(0 < one < MAX_SPACING for one in mm):
        raise DataError(f"{path}: its affine says that voxels have {mm} mm")
    if not np.isfinite(affine).all():
        raise DataError(f"{path}: its affine does not say where the voxels lie")
    return image, geometry, to_view


def disagreement(image):
    """How many mm the sform and the qform put the same voxel apart, at most; 0 where only one is there."""
    with suppress(Exception):  # of a damaged qform, which is not needed
        qform = image.get_qform(coded=True)[0]
        if qform is not None and image.header["sform_code"] > 0:
            corners = np.argwhere(np.ones((2, 2, 2))) * (np.array(image.shape[:3]) - 1)
            off = (qform - image.affine) @ np.column_stack([corners, np.ones(8)]).T
            return float(np.abs(off).max())
    return 0.0


def load(nibabel, path):
    """nibabel's image of a file, which may be called .NII.GZ or .Nii as well, and packed or not whatever its
    suffix says."""
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise DataError(f"{path}: not a volume that can be read (.nii, .nii.gz, .nrrd, .mha, .mhd, DICOM)")
    packed = is_packed(path)
    open_file = gzip.open if packed else open
    with open_file(path, "rb") as file:
        second = struct.pack("<i", 540), struct.pack(">i", 540)  # bytes in a header of NIfTI-2
        kind = nibabel.Nifti2Image if file.read(4) in second else nibabel.Nifti1Image
    if packed == path.name.lower().endswith(".gz"):
        holder = nibabel.FileHolder(str(path))
    else:
        holder = nibabel.FileHolder(fileobj=open_file(path, "rb"))
    return kind.from_file_map({"header": holder, "image": holder})


def is_packed(path):
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def unreadable(path, error):
    return DataError(f"{path}: not a readable NIfTI volume ({one_line(error)})")


def check_header(image, path):
    """Before any voxel is read: three dimensions of real numbers, no more of them than the file can hold."""
    shape = image.shape
    if len(shape) < 3 or any(side != 1 for side in shape[3:]):
        text = f"a volume of three dimensions is expected, this one has shape {shape}"
        raise DataError(f"{path}: {text}; save the one that is meant alone")
    if min(shape) < 1 or max(shape) > MAX_SIDE:
        raise DataError(f"{path}: {shape} voxels; 1 to {MAX_SIDE} along each axis can be read")
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        raise DataError(f"{path}: voxels of numbers are expected, not {dtype}")
    inflation = 1032 if is_packed(path) else 1  # the most that deflate can do
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
