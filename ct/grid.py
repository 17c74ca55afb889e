"""The one grid that all slices of a set are brought to, later those to be predicted too, and the way back."""

from dataclasses import dataclass

import torch.nn.functional as F

from ct.plausible import SPACING_TOLERANCE, Doubt


@dataclass(frozen=True)
class Grid:
    """What slices are brought to: `size` (H, W) in px and, if known, how many mm apart rows and columns of
    the training slices are on it, ((least, most), (least, most)).

    A slice is scaled to fit inside with its aspect ratio kept, centred, the rest filled. One whose pixels are
    much finer than those of training (SPACING_TOLERANCE) is scaled further down, to theirs.
    """

    size: tuple
    pixel_mm: tuple | None = None

    def placement(self, own, mm=None):
        """Where a slice of `own` px whose rows and columns are `mm` apart comes to lie: (height, width, top,
        left) in px."""
        scale = min(self.size[0] / own[0], self.size[1] / own[1])
        zooms = [1.0, 1.0]
        for axis in (0, 1) if mm and self.pixel_mm else ():
            share = mm[axis] / scale / self.pixel_mm[axis][0]
            zooms[axis] = share if share * SPACING_TOLERANCE < 1 else 1.0
        height, width = (max(1, round(side * scale * zoom)) for side, zoom in zip(own, zooms))
        return height, width, (self.size[0] - height) // 2, (self.size[1] - width) // 2

    def bring(self, image, fill, mm=None, nearest=False):
        """An image (h, w), or a stack (S, h, w), on the grid: (H, W), or (S, H, W). Bilinear (antialiased
        where it shrinks), or nearest for masks. The dtype is kept."""
        own = tuple(image.shape[-2:])
        height, width, top, left = self.placement(own, mm)
        if (height, width) == own == self.size:
            return image
        out = image.new_full((*image.shape[:-2], *self.size), fill)
        out[..., top : top + height, left : left + width] = scaled(image, (height, width), nearest)
        return out

    def back(self, labels, own, mm=None):
        """Labels uint8 (H, W) or (S, H, W) on the grid -> on a slice's own one, (h, w) or (S, h, w)."""
        height, width, top, left = self.placement(own, mm)
        inside = labels[..., top : top + height, left : left + width]
        if tuple(inside.shape[-2:]) == tuple(own):
            return inside
        return scaled(inside, tuple(own), nearest=True).to(labels.dtype)

    def boxes_back(self, boxes, own, mm=None):
        """Boxes (n, 4), x0 y0 x1 y1 in px on the grid -> on a slice's own one, cut off at its
        edges."""
        height, width, top, left = self.placement(own, mm)
        down, right = own[0] / height, own[1] / width
        moved = (boxes - [left, top, left, top]) * [right, down, right, down]
        return moved.clip(0, [own[1], own[0], own[1], own[0]])

    def judge(self, own, mm, where):
        """Whether a slice's pixels, rows and columns `mm` apart, are as large as in training: [Doubt]."""
        if mm is None or self.pixel_mm is None:
            return []
        scale = min(self.size[0] / own[0], self.size[1] / own[1])
        doubts = []
        for name, apart, (least, most) in zip(("rows", "columns"), mm, self.pixel_mm):
            found = f"{where}: {name} {apart / scale:.3g} mm apart at the size of the training slices"
            training = f"whose own are {least:.3g}" + (f" to {most:.3g}" if most > least else "")
            if apart / scale * SPACING_TOLERANCE < least:
                doubts.append(Doubt(f"{found}, {training}: scaled down to these, and back"))
            elif apart / scale > most * SPACING_TOLERANCE:
                doubts.append(Doubt(f"{found}, {training}: organs look smaller than in training"))
        return doubts

    def judge_cases(self, cases):
        """The same of whole cases, {case: (own, mm)}, in one line: the first such case, and how many."""
        found = {case: doubts for case, slice in cases.items() if (doubts := self.judge(*slice, case))}
        others = f"; and {len(found) - 1} cases more" if len(found) > 1 else ""
        return [Doubt(doubts[0].text + others) for doubts in [*found.values()][:1]]

    def spacing_on(self, own, mm):
        """How many mm apart rows and columns of a slice are once it fits into the grid."""
        height, width, *_ = self.placement(own)
        return mm[0] * own[0] / height, mm[1] * own[1] / width


def scaled(image, size, nearest=False):
    """An image (h, w), or a stack (S, h, w), at another size, float32: edges stay where they are. Bilinear,
    over a wider range where it shrinks, or the nearest pixel."""
    pixels = image.reshape(1, -1, *image.shape[-2:]).float()
    if nearest:
        found = F.interpolate(pixels, size, mode="nearest-exact")
    else:
        found = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    return found.view(*image.shape[:-2], *size)
