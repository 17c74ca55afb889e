"""The anatomy of the phantom: a reference patient as tables, and `Patient`, one random patient made from it.

Coordinates are mm in the reference patient: x to the patient's left (column), y to posterior (row), z to
superior (slice), the origin in the middle of the body at the renal hila. Nothing here knows of voxels.
"""

from typing import NamedTuple

import numpy as np

FIELD_OF_VIEW = 400.0  # mm, side of the square slice
SCAN_BOTTOM, SCAN_TOP = -98.0, 118.0  # mm, from below the kidneys to the domes of the diaphragm
MAX_WARP = 11.0  # mm, largest displacement along each axis by the smooth deformation

# fmt: off
TISSUES = {  # HU without contrast, in the arterial and in the portal venous phase; standard deviation
    "fat": (-104, -103, -102, 5),         "skin": (10, 12, 15, 8),              "muscle": (50, 56, 62, 6),
    "liver": (56, 66, 106, 9),            "spleen": (48, 112, 116, 8),          "pancreas": (38, 92, 90, 8),
    "renal cortex": (32, 165, 168, 10),   "renal medulla": (30, 72, 150, 10),   "adrenal": (24, 66, 74, 7),
    "esophagus": (38, 52, 62, 6),         "stomach": (40, 66, 80, 8),           "bowel": (40, 72, 84, 8),
    "gallbladder": (8, 9, 10, 6),         "lung": (-860, -855, -850, 20),       "canal": (25, 27, 30, 4),
    "portal vein": (40, 120, 164, 10),    "vein": (40, 70, 142, 10),            "artery": (42, 285, 150, 12),
    "bone": (160, 165, 170, 35),          "cortical bone": (480, 480, 480, 60), "disc": (85, 88, 92, 8),
    "cartilage": (105, 105, 105, 15),
}
# fmt: on


class Ellipsoid(NamedTuple):
    """A solid organ whose axis may lean, and whose axial section may turn and bend like a bean."""

    tissue: str
    centre: tuple[float, float, float]  # x, y, z in mm
    radii: tuple[float, float, float]  # mm
    lean: tuple[float, float] = (0.0, 0.0)  # dx/dz, dy/dz
    turn: float = 0.0  # degrees
    bend: float = 0.0  # mm by which both ends of the y axis are bent towards +x
    rough: float = 1.0  # mm, irregularity of the surface
    halo: float = 1.5  # mm of fat around it
    shift: float = 4.0  # mm, standard deviation of the position
    growth: float = 0.08  # standard deviation of the logarithm of the size
    clip: bool = True  # ends at the diaphragm and at the abdominal wall


class Tube(NamedTuple):
    """A vessel, a long muscle or a hollow organ: x, y, z and radius in mm along its centre line."""

    tissue: str
    path: tuple[tuple[float, float, float, float], ...]
    wall: float = 0.0  # mm; 0: solid
    gas: tuple[float, float] = (-99.0, -99.0)  # mm, range of the level of gas over contents
    flat: float = 1.0  # the section's y extent is the radius divided by this
    rough: float = 0.0
    halo: float = 0.0
    shift: float = 2.0
    growth: float = 0.1
    clip: bool = True


# fmt: off
# Every part but the wall, and the liver, which fills what the diaphragm, the wall and others leave.
PARTS = {
    "ascending colon": Tube("bowel", ((-104, 16, -120, 23), (-108, 8, -75, 25), (-98, -14, -42, 23)),
                            2.5, (-20, 14), rough=2, halo=2, shift=6),
    "transverse colon": Tube("bowel", ((-92, -40, -38, 21), (-58, -78, -40, 20), (0, -88, -52, 18),
                                       (52, -80, -30, 20), (92, -48, 6, 20), (106, -4, 32, 18)),
                             2.5, (-4, 20), rough=2, halo=2, shift=7),
    "descending colon": Tube("bowel", ((110, 6, 28, 16), (118, 22, -20, 15), (115, 24, -70, 14),
                                       (108, 18, -120, 15)), 3.0, (-20, 10), rough=2, halo=2, shift=5),
    "duodenum": Tube("bowel", ((-30, -46, 4, 11), (-48, -22, 2, 12), (-48, -4, -24, 13), (-30, 2, -46, 12),
                               (8, -4, -48, 11), (36, -14, -22, 11)), 3.0, (-20, -4), rough=1, halo=1.5),
    "spleen": Ellipsoid("spleen", (105, 42, 38), (33, 55, 60), (-0.10, -0.12), -24, -12, 2, 2, 5, 0.13),
    "stomach": Tube("stomach", ((58, 18, 84, 19), (60, -2, 66, 25), (60, -34, 40, 23), (48, -62, 12, 19),
                                (12, -68, 0, 16), (-20, -54, 4, 11)),
                    4.0, (-100, -52), rough=3, halo=2, shift=5, growth=0.16),
    "gallbladder": Tube("gallbladder", ((-68, -62, -18, 13), (-60, -50, 0, 15), (-46, -32, 18, 6)),
                        halo=0.5, shift=5, growth=0.22),
    "right kidney": Ellipsoid("renal cortex", (-72, 46, -14), (26, 31, 54), (0.16, 0.16), 35, 5, 1.5, 4,
                              growth=0.06),
    "left kidney": Ellipsoid("renal cortex", (74, 48, 0), (26, 31, 55), (-0.16, 0.16), -35, -5, 1.5, 4,
                             growth=0.06),
    "pancreas": Tube("pancreas", ((-26, -14, -18, 12), (-22, -18, 0, 14), (-2, -34, 14, 10),
                                  (28, -28, 22, 11), (56, -6, 30, 11), (84, 18, 40, 9)),
                     rough=4, halo=2, shift=3),
    "right adrenal gland": Ellipsoid("adrenal", (-35, 23, 46), (4.8, 17, 17), (0, 0), 35, 6, 1, 3, 2, 0.12),
    "left adrenal gland": Ellipsoid("adrenal", (40, 21, 42), (4.8, 17, 18), (0, 0), -30, -8, 1, 3, 2, 0.12),
    "right renal artery": Tube("artery", ((12, 20, 2, 3), (-20, 28, -4, 3), (-56, 38, -10, 3))),
    "left renal artery": Tube("artery", ((12, 20, 2, 3), (34, 28, 0, 3), (58, 40, -2, 3))),
    "right renal vein": Tube("vein", ((-18, 9, -8, 5), (-38, 24, -10, 5), (-58, 36, -12, 4.5))),
    "left renal vein": Tube("vein", ((-12, 5, 2, 5), (12, 0, 2, 4), (32, 13, 2, 5), (58, 36, 0, 4.5))),
    "superior mesenteric vein": Tube("portal vein", ((-4, -24, -90, 4), (0, -24, -40, 5.5), (2, -22, 10, 6)),
                                     halo=1),
    "superior mesenteric artery": Tube("artery", ((13, 5, 18, 4), (12, -16, 2, 4), (11, -22, -50, 3.5),
                                                  (0, -26, -100, 3)), halo=3),
    "coeliac trunk": Tube("artery", ((12, 5, 32, 4), (10, -14, 34, 3.5), (-14, -20, 36, 3))),
    "inferior vena cava": Tube("vein", ((-15, 20, -130, 11), (-16, 15, -50, 12), (-17, 6, 10, 13),
                                        (-22, -4, 60, 14), (-20, -14, 98, 14), (-12, -22, 124, 13)),
                               flat=1.3, halo=1, growth=0.12, clip=False),
    "portal and splenic veins": Tube("portal vein", ((88, 28, 46, 4.5), (58, 8, 34, 5), (28, -14, 26, 5.5),
                                                     (2, -20, 14, 7), (-20, -16, 28, 7.5), (-44, -16, 40, 7)),
                                     halo=0.8, shift=1.5, growth=0.12),
    "aorta": Tube("artery", ((9, 23, -130, 9), (12, 20, -50, 10), (13, 17, 20, 10.5), (11, 16, 70, 11.5),
                             (12, 22, 140, 12)), halo=2, clip=False),
    "esophagus": Tube("esophagus", ((0, 0, 135, 9), (6, -3, 102, 9), (20, -4, 84, 9), (40, 4, 76, 9)),
                      halo=1, clip=False),
}
LIVER_VESSELS = [
    Tube("portal vein", ((-40, -16, 40, 6), (-66, -14, 46, 5), (-98, -8, 50, 3))),
    Tube("portal vein", ((-66, -14, 46, 5), (-84, 24, 44, 3.5), (-100, 44, 38, 2.5))),
    Tube("portal vein", ((-44, -18, 40, 5), (-24, -38, 52, 4), (10, -58, 58, 3))),
    Tube("portal vein", ((-70, -12, 46, 4), (-84, -42, 40, 3), (-96, -62, 30, 2))),
    Tube("vein", ((-24, -16, 92, 6), (-62, 2, 84, 4.5), (-104, 12, 66, 2.5))),
    Tube("vein", ((-24, -18, 92, 5), (-48, -44, 80, 4), (-70, -66, 60, 2.5))),
    Tube("vein", ((-22, -20, 94, 5), (0, -44, 88, 4), (30, -62, 80, 2.5))),
]
LIVER_FISSURE = Tube("fat", ((-2, -98, 8, 4), (-8, -74, 22, 5), (-14, -46, 36, 3)), shift=4)
HEART = Ellipsoid("vein", (26, -46, 134), (62, 48, 38), turn=20, rough=2, halo=4, clip=False)
MUSCLES = {  # on the patient's left; the right ones are their mirror images
    "crus of the diaphragm": Tube("muscle", ((15, 34, -10, 3), (19, 24, 30, 4.5), (20, 10, 75, 4)),
                                  halo=1, clip=False),
    "psoas": Tube("muscle", ((50, 44, -140, 25), (42, 46, -60, 20), (34, 48, 0, 11), (29, 48, 30, 4)),
                  clip=False),
    "quadratus lumborum": Tube("muscle", ((82, 66, -130, 10), (72, 68, -60, 10), (58, 70, 20, 7)),
                               clip=False),
}
# fmt: on


class Patient:
    """Every random choice about one patient, in a fixed order and independent of the voxels."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.seed = seed

        # Build, and how the patient lies in the scanner.
        build = rng.normal()
        scale = np.clip(1 + 0.05 * build + rng.normal(0, (0.03, 0.04, 0.04)), 0.86, 1.12)  # x, y, z
        self.subcutaneous = float(np.clip(14 + 8 * build + rng.normal(0, 4), 4, 36))  # mm at the flanks
        self.muscle = float(np.clip(rng.normal(1, 0.12), 0.75, 1.3))
        turn = np.deg2rad(rng.normal(0, 2.5))
        cos, sin = np.cos(turn), np.sin(turn)
        self.axes = np.array(((cos, -sin, 0), (sin, cos, 0), (0, 0, 1))) * scale
        self.origin = rng.normal(0, (7, 6, 9))  # in the scanner: axes @ (x, y, z) + origin, mm

        # Contrast phase: 0 native (a quarter of the patients), 1 arterial, 2 portal venous, and between.
        self.phase = 0.0 if rng.random() < 0.25 else 2 - 1.3 * rng.random() ** 2
        self.oral_contrast = rng.uniform(60, 220) if rng.random() < 0.3 else 0.0  # HU, in what was drunk
        self.hu = {
            tissue: float(np.interp(self.phase, (0, 1, 2), means) + rng.normal(0, sd))
            for tissue, (*means, sd) in TISSUES.items()
        }
        self.noise = rng.uniform(6, 17)  # HU, standard deviation: the dose

        # Anatomy.
        self.dome = 20 + float(rng.normal(0, 5)), 8 + float(rng.normal(0, 5))  # mm, bulges: right, left
        self.liver_edge = float(rng.normal(0, 6)), float(rng.normal(0, 14))  # mm to the left, downwards
        self.medulla_depth = rng.uniform(0.62, 0.75)
        self.disc_phase, self.rib_phase = rng.random(2, dtype=np.float32)
        self.warp = [Lattice(rng, 85.0) for _ in range(3)]  # x, y, z displacements, in units of MAX_WARP
        self.lumps, self.grain = Lattice(rng, 24.0), Lattice(rng, 8.0)  # roughness of surfaces, texture
        self.parts = {name: vary(part, rng) for name, part in PARTS.items()}
        self.loops = [bowel_loop(rng) for _ in range(rng.integers(26, 36))]
        self.mesentery = [mesenteric_vessel(rng) for _ in range(18)]
        self.liver_vessels = [vary(vessel, rng) for vessel in LIVER_VESSELS]
        self.liver_fissure = vary(LIVER_FISSURE, rng)


def vary(part, rng):
    """The same part in another patient: moved, grown, and for a tube with another course and level of gas."""
    move, grow = rng.normal(0, part.shift, 3), np.exp(rng.normal(0, part.growth))
    if isinstance(part, Ellipsoid):
        radii = np.array(part.radii) * grow * np.exp(rng.normal(0, 0.05, 3))
        return part._replace(centre=part.centre + move, radii=radii, turn=part.turn + rng.normal(0, 6))
    path = np.array(part.path, float)
    path[:, :3] += move + rng.normal(0, 0.4 * part.shift, (len(path), 3))
    path[:, 3] *= grow * np.exp(rng.normal(0, 0.5 * part.growth, len(path)))
    return part._replace(path=spline(path), gas=rng.uniform(*part.gas))


def bowel_loop(rng):
    """A loop of small bowel, a random walk through the lower abdomen -> tube, HU of its contents."""
    start = np.array((8, -42, -60)) + rng.uniform(-1, 1, 3) * (78, 38, 64)
    steps = np.cumsum(rng.normal(0, (18, 12, 8), (4, 3)), axis=0)
    points = np.clip(start + steps, (-84, -88, -135), (94, -6, 6))
    radius = rng.uniform(10, 16) * np.exp(rng.normal(0, 0.12, (4, 1)))
    path, wall = np.concatenate([points, radius], axis=1), rng.uniform(2, 4)
    return Tube("bowel", path, wall, gas=rng.uniform(-40, 6), rough=2.5, halo=1.5), rng.uniform(5, 50)


def mesenteric_vessel(rng):
    """A branch from the root of the mesentery to somewhere among the bowel loops."""
    root, end = rng.normal((4, -26, -20), (3, 3, 20)), rng.uniform((-80, -85, -125), (85, -15, 0))
    middle = (root + end) / 2 + rng.normal(0, 8, 3)
    tissue = "artery" if rng.random() < 0.4 else "portal vein"
    return Tube(tissue, np.column_stack([(root, middle, end), (2.4, 2.0, 1.4)]))


def spline(path, steps: int = 2):
    """Catmull-Rom spline through the rows of path (P, 4) -> ((P - 1) * steps + 1, 4)."""
    p = np.concatenate([2 * path[:1] - path[1:2], path, 2 * path[-1:] - path[-2:-1]])[:, None]
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    t = (np.arange(steps) / steps)[None, :, None]
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return np.concatenate([curve.reshape(-1, path.shape[1]), path[-1:]])


class Lattice:
    """A smooth random field in the scanner's space: values in [-1, 1] at points `spacing` mm apart."""

    def __init__(self, rng, spacing: float):
        self.spacing = spacing
        depth, side = (int(np.ceil(mm / spacing)) + 2 for mm in (SCAN_TOP - SCAN_BOTTOM, FIELD_OF_VIEW))
        self.values = rng.uniform(-1, 1, (depth, side, side)).astype(np.float32)

    def __call__(self, z, y, x) -> np.ndarray:
        """The field at the scanner coordinates z (S), y (H), x (W) in mm -> (S, H, W)."""
        values, start = self.values, (SCAN_BOTTOM, -FIELD_OF_VIEW / 2, -FIELD_OF_VIEW / 2)
        for axis, mm in enumerate((z, y, x)):
            position = (mm - start[axis]) / self.spacing
            index = position.astype(int)
            weight = position - index
            weight = (weight * weight * (3 - 2 * weight)).astype(np.float32)  # smooth step between the points
            weight = weight.reshape([-1 if a == axis else 1 for a in range(3)])
            below = values.take(index, axis)
            values = below + weight * np.diff(values, axis=axis).take(index, axis)
        return values
