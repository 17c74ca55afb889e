"""A procedural abdominal CT with the 13 organs of BTCV: data that everybody has, for demos and tests.

    hu, labels = phantom_case(seed=0, slices=24, size=128)    # both (24, 128, 128), int16 HU and uint8

A case is made in three steps. `Patient` draws every random number of one patient: build, contrast phase, tissue
densities, position and size of each part, bowel loops, a smooth deformation of space. The `draw_*` functions paint
that patient from the outside in, as implicit shapes on the deformed coordinates of the voxels. `reconstruct` adds
the resolution and the noise of a scanner. The patient knows nothing of the voxels, so one seed is one patient at
any number of slices and any size.

Coordinates are mm in the reference patient: x to the patient's left (column), y to posterior (row), z to superior
(slice), the origin in the middle of the body at the renal hila. A shape is a field f in mm, negative inside. Only
element-wise NumPy and its FFT are used, so a case does not depend on the number of threads.
"""

from typing import NamedTuple

import numpy as np

# fmt: off
BTCV_ORGANS = [
    "background", "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
    "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland",
]
# fmt: on

FIELD_OF_VIEW = 400.0  # mm, side of the square slice
SCAN_BOTTOM, SCAN_TOP = -98.0, 118.0  # mm, from below the kidneys to the domes of the diaphragm
MAX_WARP = 11.0  # mm, largest displacement along each axis by the smooth deformation


def phantom_spacing(slices: int, size: int) -> tuple[float, float, float]:
    """Voxel spacing (slice, row, column) in mm of a case of that many slices and that size."""
    return (SCAN_TOP - SCAN_BOTTOM) / slices, FIELD_OF_VIEW / size, FIELD_OF_VIEW / size


def phantom_case(seed: int, slices: int = 24, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """One patient's scan: hu (slices, size, size) int16 in HU; labels, same shape, uint8 index into BTCV_ORGANS.

    Radiological view: the patient's right at image left, row 0 anterior; slices run from inferior to superior and
    cover the same 216 mm whatever their number. One seed is one patient.
    """
    patient = Patient(seed)
    canvas = Canvas(patient, slices, size)
    draw_table(canvas)
    draw_body(canvas)
    draw_ribs(canvas)
    draw_chest(canvas)
    draw_bowel(canvas)
    draw_liver(canvas)
    draw_organs(canvas)
    draw_vessels(canvas)
    draw_muscles(canvas)
    draw_spine(canvas)
    return reconstruct(canvas), canvas.labels


# ------------------------------------------------------------------------------------- the reference patient

# HU without contrast, in the arterial and in the portal venous phase; standard deviation between patients.
TISSUES = {
    "fat": (-104, -103, -102, 5),
    "skin": (10, 12, 15, 8),
    "muscle": (50, 56, 62, 6),
    "lung": (-860, -855, -850, 20),
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
    "cartilage": (105, 105, 105, 15),
    "disc": (85, 88, 92, 8),
    "canal": (25, 27, 30, 4),
}


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
    """A vessel, a long muscle or a hollow organ: a spline through points of x, y, z, radius in mm."""

    tissue: str
    path: tuple[tuple[float, float, float, float], ...]
    wall: float = 0.0  # mm; 0: solid
    gas: tuple[float, float] = (-99.0, -99.0)  # mm, range of the level of gas over contents, see draw_hollow
    flat: float = 1.0  # the section's y extent is the radius divided by this
    rough: float = 0.0
    halo: float = 0.0
    shift: float = 2.0
    growth: float = 0.1
    clip: bool = True


# Every part but the liver, whose shape is what its neighbours leave (draw_liver), and the body wall.
# fmt: off
PARTS = {
    "ascending colon": Tube("bowel", ((-104, 16, -120, 23), (-108, 8, -75, 25), (-98, -14, -42, 23)),
                            2.5, (-20, 14), rough=2, halo=2, shift=6),
    "transverse colon": Tube("bowel", ((-92, -40, -38, 21), (-58, -78, -40, 20), (0, -88, -52, 18),
                                       (52, -80, -30, 20), (92, -48, 6, 20), (106, -4, 32, 18)),
                             2.5, (-4, 20), rough=2, halo=2, shift=7),
    "descending colon": Tube("bowel", ((110, 6, 28, 16), (118, 22, -20, 15), (115, 24, -70, 14), (108, 18, -120, 15)),
                             3.0, (-20, 10), rough=2, halo=2, shift=5),
    "duodenum": Tube("bowel", ((-30, -46, 4, 11), (-48, -22, 2, 12), (-48, -4, -24, 13), (-30, 2, -46, 12),
                               (8, -4, -48, 11), (36, -14, -22, 11)), 3.0, (-20, -4), rough=1, halo=1.5),
    "spleen": Ellipsoid("spleen", (108, 40, 48), (30, 52, 56), (-0.10, -0.12), -24, -12, 2, 2, 5, 0.13),
    "stomach": Tube("stomach", ((62, 20, 84, 20), (66, -2, 66, 27), (64, -34, 40, 25), (48, -62, 12, 21),
                                (12, -68, 0, 16), (-20, -54, 4, 11)),
                    4.0, (-100, -52), rough=3, halo=2, shift=5, growth=0.16),
    "gallbladder": Tube("gallbladder", ((-68, -62, -18, 13), (-60, -50, 0, 15), (-46, -32, 18, 6)),
                        halo=0.5, shift=5, growth=0.22),
    "right kidney": Ellipsoid("renal cortex", (-72, 46, -14), (26, 31, 54), (0.16, 0.16), 35, 5, 1.5, 4),
    "left kidney": Ellipsoid("renal cortex", (74, 48, 0), (26, 31, 55), (-0.16, 0.16), -35, -5, 1.5, 4),
    "pancreas": Tube("pancreas", ((-26, -14, -18, 12), (-22, -18, 0, 14), (-2, -34, 14, 10), (28, -28, 22, 11),
                                  (56, -6, 30, 11), (84, 18, 40, 9)), rough=4, halo=2, shift=3),
    "right adrenal gland": Ellipsoid("adrenal", (-35, 23, 46), (4.2, 16, 16), (0, 0), 35, 6, 1, 3, 2, 0.12),
    "left adrenal gland": Ellipsoid("adrenal", (40, 21, 42), (4.2, 16, 17), (0, 0), -30, -8, 1, 3, 2, 0.12),
    "right renal artery": Tube("artery", ((12, 20, 2, 3), (-20, 28, -4, 3), (-56, 38, -10, 3))),
    "left renal artery": Tube("artery", ((12, 20, 2, 3), (34, 28, 0, 3), (58, 40, -2, 3))),
    "right renal vein": Tube("vein", ((-18, 9, -8, 5), (-38, 24, -10, 5), (-58, 36, -12, 4.5))),
    "left renal vein": Tube("vein", ((-12, 5, 2, 5), (12, 0, 2, 4), (32, 13, 2, 5), (58, 36, 0, 4.5))),
    "superior mesenteric vein": Tube("portal vein", ((-4, -24, -90, 4), (0, -24, -40, 5.5), (2, -22, 10, 6)), halo=1),
    "superior mesenteric artery": Tube("artery", ((13, 5, 18, 4), (12, -16, 2, 4), (11, -22, -50, 3.5),
                                                  (0, -26, -100, 3)), halo=3),
    "coeliac trunk": Tube("artery", ((12, 5, 32, 4), (10, -14, 34, 3.5), (-14, -20, 36, 3))),
    "inferior vena cava": Tube("vein", ((-15, 20, -130, 12), (-16, 15, -50, 13), (-17, 6, 10, 14), (-22, -4, 60, 15),
                                        (-20, -14, 98, 15), (-12, -22, 124, 14)), flat=1.3, halo=1, growth=0.14,
                               clip=False),
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
    "crus of the diaphragm": Tube("muscle", ((15, 34, -10, 3), (19, 24, 30, 4.5), (20, 10, 75, 4)), halo=1, clip=False),
    "psoas": Tube("muscle", ((50, 44, -140, 25), (42, 46, -60, 20), (34, 48, 0, 11), (29, 48, 30, 4)), clip=False),
    "quadratus lumborum": Tube("muscle", ((82, 66, -130, 10), (72, 68, -60, 10), (58, 70, 20, 7)), clip=False),
}
# fmt: on


# ------------------------------------------------------------------------------------------------ one patient


class Patient:
    """Every random choice about one patient, in a fixed order and independent of the voxels."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.seed = seed

        # Build, and how the patient lies in the scanner.
        build = rng.normal()
        self.scale = np.clip(1 + 0.05 * build + rng.normal(0, (0.03, 0.04, 0.04)), 0.86, 1.12)  # x, y, z
        self.subcutaneous = float(
            np.clip(14 + 8 * build + rng.normal(0, 4), 4, 36)
        )  # mm of fat at the flanks
        self.muscle = float(np.clip(rng.normal(1, 0.12), 0.75, 1.3))
        self.turn = np.deg2rad(rng.normal(0, 2.5))
        self.origin = rng.normal(0, (7, 6, 9))  # mm, of the reference patient in the scanner

        # Contrast phase: 0 native, 1 arterial, 2 portal venous. A quarter native, the others late rather than early.
        self.phase = 0.0 if rng.random() < 0.25 else 2 - 1.3 * rng.random() ** 2
        self.oral_contrast = (
            rng.uniform(60, 220) if rng.random() < 0.3 else 0.0
        )  # HU, added to what was drunk
        self.hu = {
            tissue: float(np.interp(self.phase, (0, 1, 2), means) + rng.normal(0, sd))
            for tissue, (*means, sd) in TISSUES.items()
        }
        self.noise = rng.uniform(7, 20)  # HU, standard deviation: the dose

        # Anatomy.
        self.dome = (
            116 + float(rng.normal(0, 5)),
            102 + float(rng.normal(0, 6)),
        )  # mm, right and left diaphragm
        self.liver_edge = float(rng.normal(0, 6)), float(rng.normal(0, 14))  # mm to the left, downwards
        self.medulla_depth = rng.uniform(0.62, 0.75)
        self.disc_phase, self.rib_phase = rng.random(2, dtype=np.float32)
        self.warp = [Lattice(rng, 85.0) for _ in range(3)]
        self.lumps, self.grain = Lattice(rng, 24.0), Lattice(rng, 8.0)
        self.parts = {name: vary(part, rng) for name, part in PARTS.items()}
        self.loops = [bowel_loop(rng) for _ in range(rng.integers(20, 30))]
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
    return part._replace(path=path, gas=rng.uniform(*part.gas))


def bowel_loop(rng):
    """A loop of small bowel, a random walk through the lower abdomen -> tube, HU of its contents."""
    start = np.array((8, -42, -60)) + rng.uniform(-1, 1, 3) * (78, 38, 64)
    points = np.clip(
        start + np.cumsum(rng.normal(0, (18, 12, 8), (4, 3)), axis=0), (-84, -88, -135), (94, -6, 6)
    )
    radius = rng.uniform(9, 15) * np.exp(rng.normal(0, 0.12, (4, 1)))
    path, wall = np.concatenate([points, radius], axis=1), rng.uniform(2, 4)
    return Tube("bowel", path, wall, gas=rng.uniform(-40, 6), rough=2.5, halo=1.5), rng.uniform(5, 50)


def mesenteric_vessel(rng):
    """A branch from the root of the mesentery to somewhere among the bowel loops."""
    root, end = rng.normal((4, -26, -20), (3, 3, 20)), rng.uniform((-80, -85, -125), (85, -15, 0))
    middle = (root + end) / 2 + rng.normal(0, 8, 3)
    tissue = "artery" if rng.random() < 0.4 else "portal vein"
    return Tube(tissue, np.column_stack([(root, middle, end), (2.4, 2.0, 1.4)]))


class Lattice:
    """A smooth random field in the scanner's space: uniform values in [-1, 1] at points `spacing` mm apart."""

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
            values = below + weight * (values.take(index + 1, axis) - below)
        return values


# ---------------------------------------------------------------------------------------------------- drawing


class Canvas:
    """The voxels of one case: HU and labels, the reference coordinates X, Y, Z of each, and shapes upon them.

    Volumes are (S, H, W) float32. A box is a tuple of three slices; a shape is its box and f in mm on that box.
    """

    def __init__(self, patient: Patient, slices: int, size: int):
        self.patient = patient
        self.pixel = np.float32(FIELD_OF_VIEW / size)
        self.z = SCAN_BOTTOM + (np.arange(slices) + 0.5) * (SCAN_TOP - SCAN_BOTTOM) / slices
        self.y = self.x = (np.arange(size) + 0.5) * self.pixel - FIELD_OF_VIEW / 2

        # From the scanner to the reference patient: position, rotation and scale, then the smooth deformation.
        cos, sin = np.cos(patient.turn), np.sin(patient.turn)
        grid = self.z, self.y, self.x
        z, y, x = (mm - at for mm, at in zip(grid, patient.origin[::-1]))
        x, y = cos * x + sin * y[:, None], cos * y[:, None] - sin * x
        rigid = (mm / scale for mm, scale in zip((x, y, z[:, None, None]), patient.scale))
        self.X, self.Y, self.Z = (
            np.float32(MAX_WARP) * warp(*grid) + mm.astype(np.float32)
            for mm, warp in zip(rigid, patient.warp)
        )
        self.lumps, self.grain = patient.lumps(*grid), patient.grain(*grid)
        self.hu = np.full(self.X.shape, -1000, np.float32)
        self.labels = np.zeros(self.X.shape, np.uint8)

    def boxes(self, low, high):
        """The voxels that may lie between the reference points low and high, (N, 3) in mm -> N boxes."""
        patient = self.patient
        centre, half = (low + high) / 2, (high - low) / 2 + MAX_WARP
        turn = np.array(
            [[np.cos(patient.turn), -np.sin(patient.turn)], [np.sin(patient.turn), np.cos(patient.turn)]]
        )
        centre, half = centre * patient.scale, half * patient.scale
        for mm, matrix in ((centre, turn), (half, np.abs(turn))):
            mm[:, :2] = (matrix * mm[:, None, :2]).sum(-1)
        centre += patient.origin
        edges = [
            np.searchsorted(grid, (centre[:, axis] - half[:, axis], centre[:, axis] + half[:, axis])).T
            for grid, axis in ((self.z, 2), (self.y, 1), (self.x, 0))
        ]
        return [tuple(slice(*edge) for edge in box) for box in zip(*(e.tolist() for e in edges))]

    def box(self, low, high):
        """The voxels that may lie between two reference points."""
        return self.boxes(np.array([low], float), np.array([high], float))[0]

    def tube(self, part: Tube):
        """A tube -> box, f, and how far below (posterior to) its centre line a voxel is, in mm."""
        path = spline(np.asarray(part.path, float))
        reach = np.maximum(path[:-1, 3:], path[1:, 3:]) + part.halo + part.rough + self.pixel
        low, high = (
            np.minimum(path[:-1], path[1:])[:, :3] - reach,
            np.maximum(path[:-1], path[1:])[:, :3] + reach,
        )
        box, *segments = self.boxes(np.vstack([low.min(0), low]), np.vstack([high.max(0), high]))
        f = np.full(self.X[box].shape, 1e3, np.float32)
        below = np.zeros_like(f)
        path[:, 1] *= part.flat
        path = path.astype(np.float32)
        for a, axis, segment in zip(path, np.diff(path, axis=0), segments):
            inner = tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(segment, box))
            if f[inner].size == 0:
                continue
            x, y, z = (
                self.X[segment] - a[0],
                self.Y[segment] * np.float32(part.flat) - a[1],
                self.Z[segment] - a[2],
            )
            dot = x * axis[0] + y * axis[1] + z * axis[2]
            length = axis[0] ** 2 + axis[1] ** 2 + axis[2] ** 2
            along = np.minimum(np.maximum(dot / length, 0), 1)
            square = x * x + y * y + z * z - along * (2 * dot - along * length)
            distance = np.sqrt(np.maximum(square, 0)) - a[3] - along * axis[3]
            if part.wall:
                np.copyto(below[inner], y - along * axis[1], where=distance < f[inner])
            np.minimum(f[inner], distance, out=f[inner])
        return box, self.surface(part, box, f), below

    def ellipsoid(self, part: Ellipsoid):
        """An ellipsoid -> box, f, and the local coordinates (u, v, w) in units of the radii."""
        centre, radii = np.asarray(part.centre, np.float32), np.asarray(part.radii, np.float32)
        reach = 1.1 * max(part.radii) + part.halo + part.rough + abs(part.bend)
        box = self.box(centre - reach, centre + reach)
        z = self.Z[box] - centre[2]
        x, y = self.X[box] - centre[0] - part.lean[0] * z, self.Y[box] - centre[1] - part.lean[1] * z
        cos, sin = float(np.cos(np.deg2rad(part.turn))), float(np.sin(np.deg2rad(part.turn)))
        v, w = (cos * y - sin * x) / radii[1], z / radii[2]
        u = (cos * x + sin * y - part.bend * (v * v - 0.4)) / radii[0]
        f = (np.sqrt(u * u + v * v + w * w) - 1) * radii.min()
        return box, self.surface(part, box, f), (u, v, w)

    def surface(self, part, box, f):
        """f with the part's roughness, ended at the diaphragm and at the abdominal wall."""
        if part.rough:
            f += part.rough * self.lumps[box]
        return np.maximum(f, self.outside[box]) if part.clip else f

    def paint(self, box, f, hu, label=None):
        """Fill f < 0 with hu (a number or a field on the box), edges by partial volume. Label None: as it was."""
        share = np.minimum(np.maximum(0.5 - f / self.pixel, 0), 1)
        self.hu[box] += share * (hu - self.hu[box])
        if label is not None:
            self.labels[box][f < 0] = label

    def solid(self, name: str):
        """Paint a part of uniform tissue in its layer of fat, labelled if BTCV has a label for it -> its shape."""
        part, hu = self.patient.parts[name], self.patient.hu
        box, f, inside = self.ellipsoid(part) if isinstance(part, Ellipsoid) else self.tube(part)
        self.paint(box, f - part.halo, hu["fat"], 0)
        label = BTCV_ORGANS.index(name) if name in BTCV_ORGANS else 0
        self.paint(box, f, hu[part.tissue] + 5 * self.grain[box], label)
        return box, f, inside

    def hollow(self, part: Tube, contents, label=0):
        """Paint a tube with a wall, contents (HU) and gas: above its level in mm, seen from the centre line."""
        box, f, below = self.tube(part)
        self.paint(box, f - part.halo, self.patient.hu["fat"], 0)
        self.paint(box, f, self.patient.hu[part.tissue], label)
        self.paint(box, f + part.wall, contents[box] if np.ndim(contents) else contents)
        self.paint(box, np.maximum(f + part.wall, below - part.gas), -960)
        return box, f


WHOLE = (slice(None),) * 3  # the box of all voxels


def spline(path, steps: int = 2):
    """Catmull-Rom spline through the rows of path (P, 4) -> ((P - 1) * steps + 1, 4)."""
    p = np.concatenate([2 * path[:1] - path[1:2], path, 2 * path[-1:] - path[-2:-1]])[:, None]
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    t = (np.arange(steps) / steps)[None, :, None]
    curve = b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return np.concatenate([curve.reshape(-1, path.shape[1]), path[-1:]])


def smooth_max(a, b, k: float):
    """The larger of a and b, the edge between them rounded over k mm."""
    blend = np.maximum(k - np.abs(a - b), 0)
    return np.maximum(a, b) + blend * blend / (4 * k)


def oval(x, y, rx, ry, square: float = 0.0):
    """Radius of (x, y) in units of an oval with half axes rx, ry: 1 on it; `square` 0 is an ellipse."""
    u, v = (x / rx) ** 2, (y / ry) ** 2
    radius = np.sqrt(u + v)
    return radius if square == 0 else (1 - square) * radius + square * np.sqrt(np.sqrt(u * u + v * v))


def draw_table(canvas):
    """The table top: a shallow trough, a shell around foam. It is the scanner's and not deformed."""
    patient = canvas.patient
    y, x = canvas.y[:, None], canvas.x[None]
    back = patient.origin[1] + patient.scale[1] * (118 + 0.6 * patient.subcutaneous)
    depth = (y - back - 10 + 26 * (x / 200) ** 2).astype(np.float32)
    canvas.hu += np.where(np.abs(depth - 16) < 16, 40, 0).astype(np.float32)
    canvas.paint(WHOLE, (np.abs(np.abs(depth - 16) - 16) - 1)[None], 40)


def draw_body(canvas):
    """Skin, subcutaneous fat, the muscles of the wall, and the fat that fills the cavity."""
    X, Y, Z, hu, fat = canvas.X, canvas.Y, canvas.Z, canvas.patient.hu, canvas.patient.subcutaneous
    up = np.clip(Z / 100, -1, 1)
    canvas.cavity = cavity = (oval(X, Y + 7, 140 - 3 * up, 97 + 5 * up, 0.35) - 1) * 110
    groove = 8 * np.exp(-((X / 15) ** 2)) * (Y > 0)
    skin = (oval(X, Y + 0.1 * fat, 151 + fat, 115 + 0.6 * fat, 0.2) - 1) * 130 + groove
    canvas.paint(WHOLE, skin, hu["skin"])
    canvas.paint(WHOLE, skin + 2, hu["fat"] + 10 * canvas.grain)

    # Three flat muscles at the flanks below the ribs, the rectus at the front on each side of the linea alba.
    flank = np.clip(np.abs(X) / 60 - 1, 0, 1) * np.clip(0.6 - Z / 90, 0, 1)
    rectus = np.exp(-((np.abs(X) / 24 - 1.35) ** 4)) * (Y < 0)
    thick = (5 + 10 * flank + 5 * rectus) * canvas.patient.muscle
    layers = 45 * flank * np.maximum(np.cos(cavity * (19 / (thick + 1))), 0) ** 4
    canvas.paint(WHOLE, np.maximum(cavity - thick, skin + 3), hu["muscle"] + 10 * canvas.grain - layers)
    canvas.paint(WHOLE, cavity, hu["fat"] + 14 * canvas.grain)


def draw_ribs(canvas):
    """Ribs: bands in the wall that fall from the spine to the front, where they are cartilage, above the costal arch."""
    hu = canvas.patient.hu
    near = np.flatnonzero((np.abs(canvas.cavity - 4) < 4 + canvas.pixel).ravel())
    X, Y, Z, depth = (volume.ravel()[near] for volume in (canvas.X, canvas.Y, canvas.Z, canvas.cavity))
    fallen = 105 * np.clip((95 - Y) / 190, 0, 1.1)  # mm from the height at the spine
    turns = (Z + fallen) / 34 + canvas.patient.rib_phase
    across = (turns - np.floor(turns) - 0.5) * 34 * 0.75
    arch = -40 + 100 * np.clip((30 - Y) / 120, 0, 1)  # mm, below this there are none
    f = np.sqrt(across * across + (1.4 * (depth - 4)) ** 2) - 5.5
    f = np.maximum(np.maximum(f, arch - Z), 50 - np.abs(X))
    fill = np.where(Y < -66, hu["cartilage"], np.where(f > -2, hu["cortical bone"], hu["bone"]))
    voxels = canvas.hu.reshape(-1)
    voxels[near] += np.clip(0.5 - f / canvas.pixel, 0, 1) * (fill - voxels[near])


def draw_chest(canvas):
    """Diaphragm, lung bases and heart. Sets canvas.outside, positive outside of what the diaphragm and wall enclose."""
    X, Y, Z, hu = canvas.X, canvas.Y, canvas.Z, canvas.patient.hu
    right, left = canvas.patient.dome
    dome = smooth_max(
        right - 55 * oval(X + 62, Y + 24, 80, 112) ** 3, left - 55 * oval(X - 68, Y + 24, 74, 112) ** 3, 20.0
    )
    above = (Z - dome) * 0.6
    canvas.outside = np.maximum(above + 1, canvas.cavity + 2)
    mediastinum = (oval(X - 4, Y - 26, 32, 46) - 1) * 32
    lung = np.maximum(np.maximum(-above, canvas.cavity + 3), -mediastinum)
    canvas.paint(WHOLE, np.maximum(np.maximum(np.abs(above) - 2, canvas.cavity), -mediastinum), hu["muscle"])
    canvas.paint(WHOLE, lung, hu["lung"] + 60 * canvas.grain + 500 * (canvas.grain > 0.7))

    box, f, _ = canvas.ellipsoid(HEART)
    f = np.maximum(f, canvas.cavity[box] + 6)
    canvas.paint(box, np.maximum(f - HEART.halo, -above[box] - 2), hu["fat"])
    canvas.paint(box, np.maximum(f, 1 - above[box]), hu[HEART.tissue])


def draw_bowel(canvas):
    """Vessels of the mesentery, small bowel, colon with stool, duodenum."""
    patient = canvas.patient
    for vessel in patient.mesentery:
        canvas.paint(*canvas.tube(vessel)[:2], patient.hu[vessel.tissue])
    for loop, contents in patient.loops:
        canvas.hollow(loop, contents + patient.oral_contrast)
    stool = 30 + 60 * canvas.lumps - 500 * np.maximum(canvas.grain - 0.3, 0)
    for name in ("ascending colon", "descending colon", "transverse colon"):
        canvas.hollow(patient.parts[name], stool)
    canvas.hollow(patient.parts["duodenum"], 25 + 0.5 * patient.oral_contrast)


def draw_liver(canvas):
    """Liver: under the right dome, as far left as a visceral surface that recedes towards the lower edge."""
    patient, hu = canvas.patient, canvas.patient.hu
    box = canvas.box((-150, -115, -100), (90, 100, 130))
    X, Y, Z = canvas.X[box], canvas.Y[box], canvas.Z[box]
    left, down = patient.liver_edge
    depth = np.maximum(46 - down - Z, 0)
    hilum = 16 * np.exp(-(((X + 28) / 34) ** 2) - ((Y + 8) / 34) ** 2)
    visceral = 0.85 * X + 0.53 * Y - 8 - left + 0.0125 * depth * depth + 6 * canvas.lumps[box] + hilum
    lateral = 0.9 * (X - 70 + 0.25 * (100 - Z))  # end of the left lobe
    f = smooth_max(smooth_max(canvas.outside[box] + 1, visceral, 10.0), lateral, 20.0)
    canvas.paint(box, f - 2, hu["fat"], 0)
    canvas.paint(box, f, hu["liver"] + 5 * canvas.grain[box], BTCV_ORGANS.index("liver"))

    liver = np.full(canvas.X.shape, 1e3, np.float32)
    liver[box] = f
    for vessel in patient.liver_vessels:
        box, f, _ = canvas.tube(vessel)
        canvas.paint(box, np.maximum(f, liver[box] + 2), hu[vessel.tissue])
    canvas.paint(*canvas.tube(patient.liver_fissure)[:2], hu["fat"], 0)


def draw_organs(canvas):
    """Spleen, stomach, gallbladder, kidneys, pancreas and adrenal glands, each in a layer of fat."""
    patient, hu = canvas.patient, canvas.patient.hu
    canvas.solid("spleen")
    stomach = patient.parts["stomach"]
    box, f = canvas.hollow(
        stomach._replace(gas=-99),
        20 + 25 * canvas.lumps + patient.oral_contrast,
        BTCV_ORGANS.index("stomach"),
    )
    canvas.paint(
        box, np.maximum(f + stomach.wall, canvas.Y[box] - stomach.gas), -960
    )  # one level for all of it
    canvas.solid("gallbladder")
    for medial, name in ((1, "right kidney"), (-1, "left kidney")):
        box, f, (u, v, w) = canvas.solid(name)
        medulla = (np.sqrt(u * u + v * v + w * w) - patient.medulla_depth + 0.18 * canvas.grain[box]) * 25
        canvas.paint(box, medulla, hu["renal medulla"])
        sinus = (
            np.sqrt(2.6 * (u - 0.55 * medial) ** 2 + 5.8 * v * v + 4 * w * w) * 12
            - 12
            + 3 * canvas.lumps[box]
        )
        canvas.paint(box, sinus, hu["fat"] + 40, 0)
        canvas.paint(box, sinus + 6, 12)  # the renal pelvis
    for name in ("pancreas", "right adrenal gland", "left adrenal gland"):
        canvas.solid(name)


def draw_vessels(canvas):
    """The vessels outside the liver, small ones first, and the esophagus: in the order of the table."""
    names = list(PARTS)
    for name in names[names.index("right renal artery") :]:
        canvas.solid(name)


def draw_muscles(canvas):
    """Crura of the diaphragm, psoas, quadratus lumborum, and the muscles of the back."""
    hu, size = canvas.patient.hu, canvas.patient.muscle
    for muscle in MUSCLES.values():
        for side in (-1, 1):
            box, f, _ = canvas.tube(muscle._replace(path=np.array(muscle.path) * (side, 1, 1, size)))
            canvas.paint(box, f - muscle.halo, hu["fat"], 0)
            canvas.paint(box, f, hu["muscle"] + 14 * canvas.grain[box], 0)
    box = canvas.box((-85, 45, -140), (85, 125, 140))
    x, y = np.abs(canvas.X[box]), canvas.Y[box]
    back = (oval(x - 37, y - 88, 36 * size, 21 * size, 0.4) - 1) * 24 + 2 * canvas.lumps[box]
    septum = 70 * np.exp(-(((x - 46 - 0.3 * (y - 88)) / 2.5) ** 2)) * (y > 84)
    canvas.paint(box, back - 1.5, hu["fat"], 0)
    canvas.paint(box, back, hu["muscle"] + 16 * canvas.grain[box] - septum, 0)


def draw_spine(canvas):
    """Vertebrae with discs, canal, arch, and the spinous and transverse processes."""
    hu, period = canvas.patient.hu, 34.0
    box = canvas.box((-56, 12, -200), (56, 120, 200))
    x, y, z = np.abs(canvas.X[box]), canvas.Y[box] - 46, canvas.Z[box] / period + canvas.patient.disc_phase
    z = (z - np.floor(z)) * period  # mm above the lower face of the disc
    marrow = hu["bone"] + 45 * canvas.grain[box]

    def within(low, high):
        return np.maximum(low - z, z - high)

    waist = 1 - 0.1 * np.clip(1 - np.abs(z - 21) / 12, 0, 1)
    body = (oval(x, y, 23 * waist, 17 * waist, 0.2) - 1) * 19
    canvas.paint(box, body, hu["cortical bone"], 0)
    canvas.paint(box, body + 2.2, marrow)
    canvas.paint(box, np.maximum(body - 1, within(0, 8)), hu["disc"], 0)

    arch = np.maximum(np.abs(oval(x, y - 25, 14, 14) - 1) * 14 - 3, within(9, 27))
    pedicle = np.maximum(np.maximum(np.abs(x - 14) - 4, np.abs(y - 16) - 7), within(18, 30))
    facet = np.maximum((oval(x - 17, y - 30, 7, 7) - 1) * 7, -2 - within(10, 24))
    spinous = np.maximum(np.maximum(x - 3, np.abs(y - 48) - 13), within(4, 22))
    transverse = np.maximum(np.maximum(np.abs(x - 30) - 17, np.abs(y - 25 - 0.1 * x) - 3.5), within(18, 27))
    bone = np.minimum(np.minimum(np.minimum(arch, pedicle), np.minimum(facet, spinous)), transverse)
    canvas.paint(box, bone, hu["cortical bone"] - 80)
    canvas.paint(box, bone + 2.5, marrow)
    canal = (oval(x, y - 24, 10.5, 9) - 1) * 10
    canvas.paint(box, canal, hu["fat"] + 70)
    canvas.paint(box, canal + 2, hu["canal"])


# ----------------------------------------------------------------------------------------------- the scanner


def reconstruct(canvas) -> np.ndarray:
    """HU as scanned, int16: resolution of about 1.5 mm, and noise with the ramp spectrum of filtered back-projection."""
    slices, *shape = canvas.hu.shape
    rng = np.random.default_rng([canvas.patient.seed, 1])
    frequency = np.hypot(
        np.fft.fftfreq(shape[0], canvas.pixel)[:, None], np.fft.rfftfreq(shape[1], canvas.pixel)
    )
    ramp = (frequency + 0.01) * np.exp(-((frequency / 0.22) ** 2))  # per (cycle / mm)
    ramp *= canvas.patient.noise * np.sqrt(np.prod(shape) / 2 / np.mean(ramp**2))
    noise = rng.standard_normal((slices, *frequency.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
    spectrum = np.fft.rfft2(canvas.hu) * np.exp(-((frequency / 0.28) ** 2)).astype(np.float32)
    hu = np.fft.irfft2(spectrum + noise * ramp.astype(np.float32), s=shape)
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
