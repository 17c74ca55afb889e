"""A procedural abdominal CT with the 13 organs of BTCV: data that everybody has, for demos, tests and measurements.

    hu, labels = phantom_case(seed=0, slices=24, size=128)      # (24, 128, 128) int16 HU and uint8 labels

A case is drawn in three steps. `Patient` draws every random number of one patient: build, contrast phase, tissue densities,
position and size of each organ, bowel loops, and a smooth deformation of space. The `draw_*` functions paint that patient
from the outside in (body wall, lungs, bowel, organs, vessels, skeleton) as implicit shapes on the voxels' deformed
coordinates. `reconstruct` blurs the picture and adds the noise of a scanner. Only the last two know the grid, so one seed is
one patient at any number of slices and any size.

Coordinates are mm in the reference patient: x to the patient's left (column), y to posterior (row), z to superior (slice),
with the origin in the middle of the body at the renal hila. A shape is a field f in mm, negative inside. Only NumPy is used,
without BLAS, so a case does not depend on the number of threads.
"""

from typing import NamedTuple

import numpy as np

BTCV_ORGANS = [
    "background",
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal and splenic veins",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
]

FIELD_OF_VIEW = 400.0  # mm, side of the square slice
SCAN_BOTTOM, SCAN_TOP = -98.0, 118.0  # mm, from below the kidneys to the domes of the diaphragm
MAX_WARP = 11.0  # mm, largest displacement of the smooth deformation along each axis

# Tissue: HU without contrast, in the arterial and in the portal venous phase; standard deviation between patients.
TISSUES = {
    "fat": (-104, -103, -102, 5),
    "skin": (10, 12, 15, 8),
    "muscle": (50, 56, 62, 6),
    "lung": (-850, -845, -840, 25),
    "liver": (56, 66, 106, 9),
    "spleen": (48, 112, 116, 8),
    "renal cortex": (32, 165, 168, 10),
    "renal medulla": (30, 72, 150, 10),
    "gallbladder": (8, 9, 10, 6),
    "esophagus": (38, 52, 62, 6),
    "stomach": (40, 66, 80, 8),
    "bowel": (40, 72, 84, 8),
    "pancreas": (38, 92, 90, 8),
    "adrenal": (24, 66, 74, 7),
    "artery": (42, 285, 150, 12),
    "vein": (40, 70, 142, 10),
    "portal vein": (40, 120, 164, 10),
    "bone": (160, 165, 170, 35),
    "cortical bone": (480, 480, 480, 60),
    "disc": (85, 88, 92, 8),
    "canal": (25, 27, 30, 4),
    "cartilage": (105, 105, 105, 15),
}


class Ellipsoid(NamedTuple):
    """A solid organ. Its axis may lean (mm sideways per mm up) and its section turn (degrees) and bend like a crescent."""

    tissue: str
    centre: tuple[float, float, float]  # x, y, z in mm
    radii: tuple[float, float, float]  # mm
    lean: tuple[float, float] = (0.0, 0.0)  # dx/dz, dy/dz
    turn: float = 0.0  # degrees, in the axial plane
    bend: float = 0.0  # mm by which the two ends of the y axis are bent towards -x
    rough: float = 1.0  # mm, irregularity of the surface
    halo: float = 1.5  # mm of fat around it
    shift: float = 4.0  # mm, standard deviation of its position
    growth: float = 0.08  # standard deviation of the logarithm of its size


class Tube(NamedTuple):
    """A vessel or a hollow organ: a spline through (x, y, z, radius) points in mm; `wall` in mm if it has contents."""

    tissue: str
    path: tuple[tuple[float, float, float, float], ...]
    wall: float = 0.0
    flat: float = 1.0  # y extent of the section is the radius divided by this
    rough: float = 0.0
    halo: float = 0.0
    shift: float = 2.0
    growth: float = 0.10
    clip: bool = True  # ends at the diaphragm and the abdominal wall


# The reference patient. BTCV's names are labelled, the other parts are background. The liver is drawn by `draw_liver`.
PARTS = {
    "ascending colon": Tube("bowel", ((-104, 12, -115, 22), (-108, 6, -75, 24), (-98, -12, -48, 22)), 2.5, halo=2, shift=6),
    "transverse colon": Tube(
        "bowel",
        ((-92, -32, -40, 20), (-58, -72, -42, 19), (0, -80, -52, 18), (52, -74, -30, 19), (92, -40, 8, 18), (104, -2, 30, 16)),
        2.5,
        halo=2,
        shift=7,
    ),
    "descending colon": Tube("bowel", ((108, 6, 26, 15), (117, 22, -20, 14), (114, 22, -70, 13), (108, 15, -115, 14)), 3, halo=2, shift=5),
    "duodenum": Tube(
        "bowel",
        ((-30, -44, 4, 10), (-48, -22, 2, 12), (-48, -4, -24, 12), (-30, 0, -46, 11), (8, -2, -48, 10), (34, -12, -22, 10)),
        3,
        halo=1.5,
    ),
    "spleen": Ellipsoid("spleen", (104, 44, 50), (27, 47, 52), (-0.10, -0.12), turn=-24, bend=10, rough=2, halo=2, shift=5, growth=0.12),
    "stomach": Tube(
        "stomach",
        ((60, 26, 78, 24), (66, 2, 62, 30), (62, -30, 38, 27), (46, -56, 12, 22), (12, -62, 0, 17), (-20, -50, 4, 11)),
        4,
        rough=2.5,
        halo=2,
        shift=5,
        growth=0.16,
    ),
    "pancreas": Tube(
        "pancreas",
        ((-26, -12, -16, 12), (-22, -16, 0, 13), (-2, -32, 14, 9), (28, -26, 22, 10), (56, -4, 30, 10), (82, 18, 40, 8)),
        rough=3.5,
        halo=2,
        shift=3,
    ),
    "right kidney": Ellipsoid("renal cortex", (-70, 42, -14), (26, 31, 54), (0.16, 0.16), turn=35, bend=5, halo=4),
    "left kidney": Ellipsoid("renal cortex", (72, 44, 0), (26, 31, 55), (-0.16, 0.16), turn=-35, bend=-5, halo=4),
    "gallbladder": Tube("gallbladder", ((-66, -56, -16, 13), (-58, -46, 0, 15), (-46, -30, 18, 6)), halo=0.5, shift=5, growth=0.22),
    "right adrenal gland": Ellipsoid("adrenal", (-34, 22, 46), (4.0, 15, 15), turn=35, bend=4, rough=1, halo=3, shift=2, growth=0.12),
    "left adrenal gland": Ellipsoid("adrenal", (40, 20, 42), (4.0, 15, 16), turn=-30, bend=-6, rough=1, halo=3, shift=2, growth=0.12),
    "aorta": Tube("artery", ((9, 20, -125, 9), (12, 18, -50, 10), (13, 15, 20, 10.5), (10, 14, 70, 11.5), (12, 20, 135, 12)), halo=2, clip=False),
    "inferior vena cava": Tube(
        "vein",
        ((-15, 17, -125, 12), (-16, 13, -50, 13), (-17, 5, 10, 14), (-22, -4, 60, 15), (-20, -14, 98, 15), (-12, -22, 122, 14)),
        flat=1.25,
        halo=1,
        growth=0.14,
        clip=False,
    ),
    "superior mesenteric artery": Tube("artery", ((13, 4, 18, 4), (12, -16, 2, 4), (10, -20, -50, 3.5), (0, -22, -100, 3)), halo=3),
    "superior mesenteric vein": Tube("portal vein", ((-4, -21, -90, 4), (0, -22, -40, 5.5), (2, -20, 10, 6)), halo=1),
    "coeliac trunk": Tube("artery", ((12, 4, 32, 4), (10, -14, 34, 3.5), (-14, -18, 36, 3))),
    "right renal vein": Tube("vein", ((-18, 8, -8, 5), (-38, 22, -10, 5), (-56, 34, -12, 4.5))),
    "left renal vein": Tube("vein", ((-12, 4, 2, 5), (12, -1, 2, 4), (30, 12, 2, 5), (56, 34, 0, 4.5))),
    "right renal artery": Tube("artery", ((12, 18, 2, 3), (-20, 26, -4, 3), (-54, 36, -10, 3))),
    "left renal artery": Tube("artery", ((12, 18, 2, 3), (34, 26, 0, 3), (56, 38, -2, 3))),
    "portal and splenic veins": Tube(
        "portal vein",
        ((86, 28, 46, 4.5), (56, 8, 34, 5), (28, -12, 26, 5.5), (2, -18, 14, 7), (-20, -15, 28, 7.5), (-44, -14, 40, 7)),
        halo=0.8,
        shift=1.5,
        growth=0.12,
    ),
    "esophagus": Tube("esophagus", ((-1, -1, 130, 9), (5, -3, 100, 9), (18, -4, 80, 9), (36, 2, 70, 9)), halo=1, clip=False),
}
ARTERIAL_PARTS = ()
