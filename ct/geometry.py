"""Where the voxels of an image and of its labels lie in the patient, and the labels on the image's grid.

Geometry             of a volume: its grid, in mm
judge_geometry       what is doubtful about an image and its labels: [Doubt]
share_inside         how many labelled voxels lie in the image
resampled            labels on the image's grid, slice by slice
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ct.plausible import Doubt

SAME = 0.1  # voxels; grids that are nowhere further apart are the same up to rounding
COINCIDING = 1.0  # voxels; boxes that are nowhere further apart are the same, with an offset of one
BELOW_HALF = 1e-4  # voxels; half-way between two of them the lower one is nearest, also after rounding errors
DIRECTIONS = ("left-right", "posterior-anterior", "inferior-superior")


@dataclass(frozen=True)
class Geometry:
    """The grid of a volume. Positions are in mm as in NIfTI: towards the patient's right, front and head.

    shape, affine    of the radiological view: (S, H, W), and 4 x 4, (slice, row, column, 1) -> (x, y, z, 1)
    file_shape, file_affine    the same of the file's own axes
    placed           whether the file says where it lies: it has a sform or qform, which is not the identity
    doubts           [Doubt] about the files of a series
    disagreement     how many mm its sform and its qform put a voxel apart, at most; the sform is taken
    """

    path: Path
    shape: tuple
    affine: np.ndarray
    file_shape: tuple
    file_affine: np.ndarray
    placed: bool = True
    disagreement: float = 0.0
    doubts: tuple = ()

    def positions(self, indices):
        """Voxel indices (..., 3) of the view -> mm (..., 3)."""
        return np.asarray(indices) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def corners(self):
        """The mm of the eight outermost voxels, (8, 3)."""
        return self.positions(np.argwhere(np.ones((2, 2, 2))) * (np.array(self.shape) - 1))

    def spacing(self):
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def apart(one, other):
    """How far the outermost voxels of two grids of the same shape are apart, in voxels of the first; infinite
    for other shapes."""
    if one.shape != other.shape:
        return np.inf
    return np.abs(one.corners() - other.corners()).max() / one.spacing().min()


def is_same_grid(image, labels):
    """Whether voxel i of one view is voxel i of the other: flips and exchanges of axes in the files do not
    matter. Where the labels do not say where they lie, the files' own axes have to be the same."""
    same = apart(image, labels) <= SAME
    if same and image.placed != labels.placed:
        return bool(np.abs(image.file_affine - labels.file_affine).max() <= SAME * image.spacing().min())
    return bool(same)


def judge_geometry(image, labels, inside=None):
    """What is doubtful about an image and its labels, [] for the same grid. Where nothing is fatal the labels
    can be resampled. `inside`: see share_inside."""
    if is_same_grid(image, labels):
        return []
    pair = f"{labels.path}: labels of {image.path}"
    distance = np.linalg.norm(image.corners().mean(0) - labels.corners().mean(0))
    centres = f"their centres are {distance:.1f} mm apart"
    if image.placed != labels.placed:
        silent = labels.path if image.placed else image.path
        text = f"{silent} does not say where it lies (no affine, or the identity) and the other does"
        return [Doubt(f"{pair}: {text}; read like this {centres}", fatal=True)]
    mirrored = mirrored_axes(image, labels)
    if mirrored and apart(image, labels) > COINCIDING:
        text = f"run the other way ({' and '.join(mirrored)}) and do not cover it: {centres}"
        return [Doubt(f"{pair} {text}", fatal=True)]
    if not overlap(image, labels):
        return [Doubt(f"{pair} lie apart from it: {centres}", fatal=True)]
    if inside is not None and inside < 0.5:
        text = f"{100 * (1 - inside):.0f} % of the labelled voxels lie outside it"
        return [Doubt(f"{pair}: {text}, {centres}", fatal=True)]
    outside = (
        "" if inside in (None, 1) else f"; {100 * (1 - inside):.2g} % of the labelled voxels lie outside"
    )
    grids = "; ".join(differences(image, labels))
    return [Doubt(f"{pair} are on another grid ({grids}): nearest voxels taken{outside}")]


def mirrored_axes(image, labels):
    """The directions in which an axis of one file runs against the same axis of the other, if both files
    have the same shape."""
    if image.file_shape != labels.file_shape:
        return []
    ours, theirs = image.file_affine[:3, :3], labels.file_affine[:3, :3]
    cosines = (ours * theirs).sum(0) / np.linalg.norm(ours, axis=0) / np.linalg.norm(theirs, axis=0)
    return [DIRECTIONS[np.abs(ours[:, axis]).argmax()] for axis in np.flatnonzero(cosines < -0.5)]


def overlap(image, labels):
    """Whether any of 17 x 17 x 17 places of one lies inside the other."""
    for one, other in ((image, labels), (labels, image)):
        axes = np.meshgrid(*(np.linspace(0, side - 1, 17) for side in one.shape), indexing="ij")
        between = index_map(one, other)
        places = np.stack(axes, -1) @ between[:3, :3].T + between[:3, 3]
        if is_inside(places, other.shape).any():
            return True
    return False


def differences(image, labels):
    """What the labels' grid has other than the image's, in words."""
    if labels.shape != image.shape:
        yield "{} x {} x {} voxels for {} x {} x {}".format(*labels.shape, *image.shape)
    mm, own = (np.round(geometry.spacing(), 3) for geometry in (labels, image))
    if not np.allclose(mm, own, rtol=1e-3):
        yield "{:g} x {:g} x {:g} mm for {:g} x {:g} x {:g}".format(*mm, *own)
    cosine = (image.affine[:3, :3] * labels.affine[:3, :3]).sum(0) / image.spacing() / labels.spacing()
    if (degrees := np.degrees(np.arccos(cosine.clip(-1, 1))).max()) > 0.1:
        yield f"turned by {degrees:.1f} degrees"
    offset = labels.affine[:3, 3] - image.affine[:3, 3]
    if np.abs(offset).max() > 1e-3:
        yield "first voxel {:.4g}, {:.4g}, {:.4g} mm off".format(*offset)


# ---- From one grid to the other ------------------------------------------------------------------


def index_map(one, other):
    """4 x 4: voxel indices of one view -> those of the other, not whole ones."""
    return np.linalg.inv(other.affine) @ one.affine


def nearest(places):
    return np.floor(places + (0.5 - BELOW_HALF))


def is_inside(places, shape):
    """Of voxel indices (..., 3), not whole ones: whether the nearest voxel exists."""
    whole = nearest(places)
    return ((whole >= 0) & (whole < shape)).all(-1)


def share_inside(array, labels, image):
    """The share of the labelled voxels (not 0) that lie in the image; None without any.

    array (S, H, W): the labels, on the grid `labels`
    """
    between = index_map(labels, image)
    count = inside = 0
    for index, one in enumerate(array):
        places = np.argwhere(np.abs(one) > 0.5)  # a scaled header can leave the background not quite 0
        places = places @ between[:3, 1:3].T + (between[:3, 0] * index + between[:3, 3])
        count += len(places)
        inside += int(is_inside(places, image.shape).sum())
    return inside / count if count else None


def resampled(array, labels, image):
    """Yields the labels (H, W) on the slices of the image: of each voxel the nearest one, 0 outside.

    array (S', H', W'): the labels, on the grid `labels`
    """
    between = index_map(image, labels)
    size = image.shape[1:]
    plane = np.indices(size).transpose(1, 2, 0) @ between[:3, 1:3].T  # (H, W, 3)
    for index in range(image.shape[0]):
        places = plane + (between[:3, 0] * index + between[:3, 3])
        inside = is_inside(places, labels.shape)
        found = np.zeros(size, array.dtype)
        found[inside] = array[tuple(nearest(places[inside]).astype(np.int64).T)]
        yield found
