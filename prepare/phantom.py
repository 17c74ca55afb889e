"""A procedural abdominal CT with the 13 organs of BTCV: data that everybody has, for demos and tests.

    hu, labels = phantom_case(seed=0, slices=24, size=128)    # both (24, 128, 128), int16 HU and uint8

A case is made in three steps. `anatomy.Patient` draws every random number of one patient: build, contrast
phase, densities, position and size of each part, bowel loops, a smooth deformation of space. The `draw_*`
functions here paint that patient from the outside in, as implicit shapes on the deformed coordinates of the
voxels. `reconstruct` adds the resolution and the noise of a scanner. One seed is one patient at any number of
slices and any size.

Coordinates are those of `anatomy`: mm, x to the patient's left, y to posterior, z to superior. A shape is a
field f in mm, negative inside, on a region of voxels: a box (three slices) or three index arrays. Only
element-wise NumPy and its FFT are used, so a case does not depend on the number of threads.
"""

import numpy as np

from ct.organs import BTCV_ORGANS
from prepare import anatomy
from prepare.anatomy import FIELD_OF_VIEW, MAX_WARP, SCAN_BOTTOM, SCAN_TOP, Ellipsoid, Patient, Tube


def phantom_spacing(slices: int, size: int) -> tuple[float, float, float]:
    """Voxel spacing (slice, row, column) in mm of a case of that many slices and that size."""
    return (SCAN_TOP - SCAN_BOTTOM) / slices, FIELD_OF_VIEW / size, FIELD_OF_VIEW / size


def phantom_case(seed: int, slices: int = 24, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """One patient's scan: hu (slices, size, size) int16 in HU, labels uint8, index into BTCV_ORGANS.

    Radiological view: the patient's right at image left, row 0 anterior; slices run from inferior to superior
    and cover the same 216 mm whatever their number. One seed is one patient.
    """
    # glibc hands freed memory back to the kernel unless a larger block was freed before. One block of 31 MiB,
    # never touched, spares paging in every temporary volume anew: a third of the time.
    np.empty(31 << 20, np.uint8)
    canvas = Canvas(Patient(seed), slices, size)
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


class Canvas:
    """The voxels of one case: HU and labels, the reference coordinates X, Y, Z of each, and shapes upon them.

    Volumes are (S, H, W) float32. Each shape returns its region, f there, and coordinates inside of it.
    """

    def __init__(self, patient: Patient, slices: int, size: int):
        self.patient = patient
        self.pixel = np.float32(FIELD_OF_VIEW / size)
        self.z = SCAN_BOTTOM + (np.arange(slices) + 0.5) * (SCAN_TOP - SCAN_BOTTOM) / slices
        self.y = self.x = (np.arange(size) + 0.5) * self.pixel - FIELD_OF_VIEW / 2

        # From the scanner to the reference patient: position, rotation and scale, then the deformation.
        grid = self.z, self.y, self.x
        z, y, x = np.meshgrid(
            *(mm - at for mm, at in zip(grid, patient.origin[::-1])), indexing="ij", sparse=True
        )
        rigid = (a * x + b * y + c * z for a, b, c in np.linalg.inv(patient.axes))
        self.X, self.Y, self.Z = (
            np.float32(MAX_WARP) * warp(*grid) + mm.astype(np.float32)
            for mm, warp in zip(rigid, patient.warp)
        )
        self.lumps, self.grain = patient.lumps(*grid), patient.grain(*grid)
        self.hu = np.full(self.X.shape, -1000, np.float32)
        self.labels = np.zeros(self.X.shape, np.uint8)

    def boxes(self, low, high):
        """The voxels that may lie between the reference points low and high, (N, 3) in mm -> N boxes."""
        axes, centre, half = self.patient.axes, (low + high) / 2, (high - low) / 2 + MAX_WARP
        centre = np.einsum("ij,nj->in", axes, centre) + self.patient.origin[:, None]
        half = np.einsum("ij,nj->in", np.abs(axes), half)
        grids = (self.z, 2), (self.y, 1), (self.x, 0)
        first = [np.searchsorted(grid, centre[axis] - half[axis]).tolist() for grid, axis in grids]
        last = [np.searchsorted(grid, centre[axis] + half[axis]).tolist() for grid, axis in grids]
        return [tuple(map(slice, *edges)) for edges in zip(zip(*first), zip(*last))]

    def box(self, low, high):
        """The voxels that may lie between two reference points."""
        return self.boxes(np.array([low], float), np.array([high], float))[0]

    def tube(self, part: Tube):
        """A tube -> region, f, and how far below (posterior to) its centre line each voxel is, in mm."""
        path = np.array(part.path, float)
        reach = np.maximum(path[:-1, 3:], path[1:, 3:]) + part.halo + part.rough + self.pixel
        low = np.minimum(path[:-1], path[1:])[:, :3] - reach
        high = np.maximum(path[:-1], path[1:])[:, :3] + reach
        box, *segments = self.boxes(np.vstack([low.min(0), low]), np.vstack([high.max(0), high]))
        f = np.full(self.X[box].shape, 1e3, np.float32)
        below = np.zeros_like(f)
        path[:, 1] *= part.flat
        path = path.astype(np.float32)
        for a, axis, segment in zip(path, np.diff(path, axis=0), segments):
            inner = tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(segment, box))
            if f[inner].size == 0:
                continue
            x, z = self.X[segment] - a[0], self.Z[segment] - a[2]
            y = self.Y[segment] * np.float32(part.flat) - a[1]
            dot = x * axis[0] + y * axis[1] + z * axis[2]
            length = axis[0] ** 2 + axis[1] ** 2 + axis[2] ** 2 + np.float32(1e-6)
            along = np.minimum(np.maximum(dot / length, 0), 1)
            square = x * x + y * y + z * z - along * (2 * dot - along * length)
            distance = np.sqrt(np.maximum(square, 0)) - a[3] - along * axis[3]
            if part.wall:
                np.copyto(below[inner], y - along * axis[1], where=distance < f[inner])
            np.minimum(f[inner], distance, out=f[inner])
        near = np.nonzero(f < part.halo + part.rough + self.pixel)
        region = tuple(index + edge.start for index, edge in zip(near, box))
        return region, self.surface(part, region, f[near]), below[near]

    def ellipsoid(self, part: Ellipsoid):
        """An ellipsoid -> region, f, and the local coordinates (u, v, w) in units of the radii."""
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

    def surface(self, part, region, f):
        """f with the part's roughness, ended at the diaphragm and at the abdominal wall."""
        f += part.rough * self.lumps[region]
        return np.maximum(f, self.outside[region]) if part.clip else f

    def paint(self, region, f, hu, label=None):
        """Fill f < 0 with hu (a number, or one a voxel), edges by partial volume. Label None: as it was."""
        share = np.minimum(np.maximum(0.5 - f / self.pixel, 0), 1)
        self.hu[region] += share * (hu - self.hu[region])
        if label is not None:
            self.labels[region] = np.where(f < 0, np.uint8(label), self.labels[region])

    def solid(self, name: str):
        """Paint a part of one tissue in its layer of fat, with its label if BTCV has one -> its shape."""
        part, hu = self.patient.parts[name], self.patient.hu
        region, f, inside = self.ellipsoid(part) if isinstance(part, Ellipsoid) else self.tube(part)
        self.paint(region, f - part.halo, hu["fat"], 0)
        label = BTCV_ORGANS.index(name) if name in BTCV_ORGANS else 0
        self.paint(region, f, hu[part.tissue] + 5 * self.grain[region], label)
        return region, f, inside

    def hollow(self, part: Tube, contents, label=0, pooled=False):
        """Paint a tube with a wall, contents (HU, a number or a volume), and gas where it rises to.

        The level of the gas is part.gas mm posterior to the centre line, or, pooled, to the origin: one level
        for the whole organ.
        """
        region, f, below = self.tube(part)
        self.paint(region, f - part.halo, self.patient.hu["fat"], 0)
        self.paint(region, f, self.patient.hu[part.tissue], label)
        self.paint(region, f + part.wall, contents[region] if np.ndim(contents) else contents)
        depth = (self.Y[region] if pooled else below) - part.gas
        self.paint(region, np.maximum(f + part.wall, depth), -960)


WHOLE = (slice(None),) * 3  # the box of all voxels


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
    back = patient.origin[1] + patient.axes[1, 1] * (118 + 0.6 * patient.subcutaneous)
    depth = (y - back - 10 + 26 * (x / 200) ** 2).astype(np.float32)
    canvas.hu += np.where(np.abs(depth - 16) < 16, 40, 0).astype(np.float32)
    canvas.paint(WHOLE, (np.abs(np.abs(depth - 16) - 16) - 1.5)[None], 120)


def draw_body(canvas):
    """Skin, subcutaneous fat, the muscles of the wall, and the fat that fills the cavity."""
    X, Y, Z, hu, fat = canvas.X, canvas.Y, canvas.Z, canvas.patient.hu, canvas.patient.subcutaneous
    up = np.clip(Z / 100, -1, 1)
    canvas.cavity = cavity = (oval(X, Y + 7, 140 - 3 * up, 97 + 5 * up, 0.35) - 1) * 110
    groove = 8 * np.exp(-np.square(X / 15)) * (Y > 0)
    skin = (oval(X, Y + 0.1 * fat, 151 + fat, 115 + 0.6 * fat, 0.2) - 1) * 130 + groove
    canvas.paint(WHOLE, skin, np.where(skin > -2, hu["skin"], hu["fat"] + 12 * canvas.grain))

    # Three flat muscles at the flanks below the ribs, the rectus at the front on each side of the linea alba.
    wall = np.nonzero(np.abs(cavity - 10) < 10 + canvas.pixel)
    X, Y, Z, cavity, skin = X[wall], Y[wall], Z[wall], cavity[wall], skin[wall]
    flank = np.clip(np.abs(X) / 60 - 1, 0, 1) * np.clip(0.6 - Z / 90, 0, 1)
    rectus = np.exp(-np.square(np.square(np.abs(X) / 24 - 1.35))) * (Y < 0)
    thick = (5 + 7 * flank + 5 * rectus) * canvas.patient.muscle
    planes = np.square(np.maximum(np.cos(cavity * (19 / (thick + 1))), 0))  # of fat, between the layers
    f = np.maximum(np.maximum(cavity - thick, skin + 3), -cavity)
    canvas.paint(wall, f, hu["muscle"] + 10 * canvas.grain[wall] - 60 * flank * planes)


def draw_ribs(canvas):
    """Ribs: bands in the wall that fall from the spine to the front, where they are cartilage."""
    hu = canvas.patient.hu
    wall = np.nonzero(np.abs(canvas.cavity - 4) < 4 + canvas.pixel)
    X, Y, Z, depth = canvas.X[wall], canvas.Y[wall], canvas.Z[wall], canvas.cavity[wall]
    fallen = 105 * np.clip((95 - Y) / 190, 0, 1.1)  # mm from the height at the spine
    turns = (Z + fallen) / 34 + canvas.patient.rib_phase
    across = (turns - np.floor(turns) - 0.5) * 34 * 0.9
    arch = -40 + 100 * np.clip((30 - Y) / 120, 0, 1)  # mm, below this there are none
    f = np.sqrt(across * across + (1.4 * (depth - 4)) ** 2) - 4.8
    f = np.maximum(np.maximum(f, arch - Z), 50 - np.abs(X))
    fill = np.where(Y < -66, hu["cartilage"], np.where(f > -2, hu["cortical bone"], hu["bone"]))
    canvas.paint(wall, f, fill)


def draw_chest(canvas):
    """Diaphragm, lung bases, heart. Sets canvas.outside, positive beyond what diaphragm and wall enclose."""
    X, Y, Z, hu = canvas.X, canvas.Y, canvas.Z, canvas.patient.hu
    right, left = canvas.patient.dome
    domes = right * np.exp(-np.square((X + 64) / 48)) + left * np.exp(-np.square((X - 70) / 42))
    dome = 96 + domes - 50 * np.square(np.square(oval(X, Y + 22, 148, 120)))
    above = (Z - dome) * 0.6
    canvas.outside = np.maximum(above + 1, canvas.cavity + 2)
    mediastinum = (oval(X - 4, Y - 26, 32, 46) - 1) * 32
    lung = np.maximum(np.maximum(-above, canvas.cavity + 3), -mediastinum)
    canvas.paint(WHOLE, np.maximum(np.maximum(np.abs(above) - 2, canvas.cavity), -mediastinum), hu["muscle"])
    canvas.paint(WHOLE, lung, hu["lung"] + 60 * canvas.grain + 500 * (canvas.grain > 0.7))

    box, f, _ = canvas.ellipsoid(anatomy.HEART)
    f = np.maximum(f, canvas.cavity[box] + 6)
    canvas.paint(box, np.maximum(f - anatomy.HEART.halo, -above[box] - 2), hu["fat"])
    canvas.paint(box, np.maximum(f, 1 - above[box]), hu[anatomy.HEART.tissue])


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
    visceral = 0.85 * X + 0.53 * Y + 12 - left + 0.0125 * depth * depth + 6 * canvas.lumps[box] + hilum
    lateral = 0.9 * (X - 70 + 0.25 * (100 - Z))  # end of the left lobe
    f = smooth_max(smooth_max(canvas.outside[box] + 1, visceral, 10.0), lateral, 20.0)
    canvas.paint(box, f - 2, hu["fat"], 0)
    canvas.paint(box, f, hu["liver"] + 5 * canvas.grain[box], BTCV_ORGANS.index("liver"))

    liver = np.full(canvas.X.shape, 1e3, np.float32)
    liver[box] = f
    for vessel in patient.liver_vessels:
        region, f, _ = canvas.tube(vessel)
        canvas.paint(region, np.maximum(f, liver[region] + 2), hu[vessel.tissue])
    canvas.paint(*canvas.tube(patient.liver_fissure)[:2], hu["fat"], 0)


def draw_organs(canvas):
    """Spleen, stomach, gallbladder, kidneys, pancreas and adrenal glands, each in a layer of fat."""
    patient, hu = canvas.patient, canvas.patient.hu
    canvas.solid("spleen")
    contents = 20 + 25 * canvas.lumps + patient.oral_contrast
    canvas.hollow(patient.parts["stomach"], contents, BTCV_ORGANS.index("stomach"), pooled=True)
    canvas.solid("gallbladder")
    for medial, name in ((1, "right kidney"), (-1, "left kidney")):
        box, f, (u, v, w) = canvas.solid(name)
        medulla = (np.sqrt(u * u + v * v + w * w) - patient.medulla_depth + 0.18 * canvas.grain[box]) * 25
        canvas.paint(box, medulla, hu["renal medulla"])
        sinus = np.sqrt(2.6 * (u - 0.55 * medial) ** 2 + 5.8 * v * v + 4 * w * w) - 1
        sinus = 12 * sinus + 3 * canvas.lumps[box]
        canvas.paint(box, sinus, hu["fat"] + 40, 0)
        canvas.paint(box, sinus + 6, 12)  # the renal pelvis
    for name in ("pancreas", "right adrenal gland", "left adrenal gland"):
        canvas.solid(name)


def draw_vessels(canvas):
    """The vessels outside the liver, small ones first, and the esophagus: in the order of the table."""
    names = list(canvas.patient.parts)
    for name in names[names.index("right renal artery") :]:
        canvas.solid(name)


def draw_muscles(canvas):
    """Crura of the diaphragm, psoas, quadratus lumborum, and the muscles of the back."""
    hu, size = canvas.patient.hu, canvas.patient.muscle
    for muscle in anatomy.MUSCLES.values():
        for side in (-1, 1):
            region, f, _ = canvas.tube(muscle._replace(path=np.array(muscle.path) * (side, 1, 1, size)))
            canvas.paint(region, f - muscle.halo, hu["fat"], 0)
            canvas.paint(region, f, hu["muscle"] + 14 * canvas.grain[region], 0)
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
    canvas.paint(box, bone, hu["cortical bone"] - 80, 0)
    canvas.paint(box, bone + 2.5, marrow)
    canal = (oval(x, y - 24, 10.5, 9) - 1) * 10
    canvas.paint(box, canal, hu["fat"] + 70)
    canvas.paint(box, canal + 2, hu["canal"])


# ---- the scanner ---------------------------------------------------------------------------------


def reconstruct(canvas) -> np.ndarray:
    """HU as scanned, int16: the resolution, and noise with the ramp spectrum of filtered back-projection."""
    slices, *shape = canvas.hu.shape
    rng = np.random.default_rng([canvas.patient.seed, 1])
    fy, fx = np.fft.fftfreq(shape[0], canvas.pixel)[:, None], np.fft.rfftfreq(shape[1], canvas.pixel)
    frequency = np.hypot(fy, fx)  # cycles per mm
    ramp = (frequency + 0.01) * np.exp(-((frequency / 0.14) ** 2))
    ramp *= canvas.patient.noise * np.sqrt(np.prod(shape) / 2 / np.mean(ramp**2))
    noise = rng.standard_normal((slices, *frequency.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
    spectrum = np.fft.rfft2(canvas.hu) * np.exp(-((frequency / 0.28) ** 2)).astype(np.float32)
    hu = np.fft.irfft2(spectrum + noise * ramp.astype(np.float32), s=shape)
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
