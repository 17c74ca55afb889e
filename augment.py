"""Augmentation of whole batches of slices, on any device: two views for pretraining, one for segmentation.

Every image has its own parameters. They are the row of a table of uniform numbers, drawn on the CPU by the
caller's generator for all samples of the global batch; a process uses the rows of its own samples. So what
happens to a sample depends on the generator's seed and the sample's global index, never on the rank or the
number of processes. Everything that decides about shapes is known on the CPU: no GPU is ever waited for.

Crop boxes: (N, 5) float, x0 y0 x1 y1 in [0, 1] of the source slice (pixel edges), then flip 0 or 1. Of views
that are rotated, sheared or moved (N, 9): then the matrix a b c d, by which the view's offset (u, v) from its
centre, in sides of the view and before the flip, is the offset (a u + b v, c u + d v) in sides of the box.

Grey values are HU windows scaled to [0, 1], so brightness shifts the level of the window and contrast (around
mid-window) changes its width. A strength of 0 leaves that change out entirely.
"""

import math
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F


class TwoViews:
    """Two independently cropped and changed views of each slice (MoCo v2, arXiv 2003.04297).

    size          side of the views, px
    scale, ratio  area of the crop as a fraction of the slice's, and its aspect ratio (log-uniform), as in
                  torchvision's RandomResizedCrop; a side that does not fit is cut to the slice's
    flip          probability of a left-right flip; 0, because organs have sides
    brightness    shift by up to this much of the window
    contrast      factor 1 - contrast to 1 + contrast around mid-window
    gamma         exponent exp(-gamma) to exp(gamma)
    blur          Gaussian of up to this sigma in px, or unsharp masking of up to this amount
    noise         Gaussian noise of up to this sigma
    autocontrast, equalize    probabilities; the paper's changes
    value_range   the values that count as 0 and 1 where the batch is not windowed (data.window: null)
    rotate        the view turned about its centre by up to so many degrees, either way
    shear         x moved by up to this times y, and y by up to this times x, from the centre
    translate     the crop moved by up to this share of its sides, even beyond the slice
    erase         probability that a rectangle of the view becomes black (arXiv 1708.04896, with a constant)
    erase_area    its share of the view, least and most; its aspect ratio is 0.3 to 3.3 where that fits

    A turned, sheared or moved view shows the tissue that lies there, also beside its box; only beyond the
    slice it is black. The matched regions of losses.py follow it exactly.
    """

    def __init__(
        self,
        size,
        scale=(0.2, 1.0),
        ratio=(3 / 4, 4 / 3),
        flip=0.0,
        brightness=0.2,
        contrast=0.2,
        gamma=0.2,
        blur=1.0,
        noise=0.05,
        autocontrast=0.0,
        equalize=0.0,
        value_range=(0.0, 1.0),
        rotate=0.0,
        shear=0.0,
        translate=0.0,
        erase=0.0,
        erase_area=(0.02, 0.2),
    ):
        self.size = (size, size)
        self.scale = scale
        self.ratio = ratio
        self.flip = flip
        self.warp = Warp(rotate, shear, translate)
        self.erasing = Erasing(erase, erase_area, black=value_range[0])
        self.photometric = Photometric(
            brightness, contrast, gamma, blur, noise, autocontrast, equalize, value_range
        )

    def __call__(self, batch, generator, offset=0, total=None):
        """batch (N, C, H, W), rows offset to offset + N of a global batch of `total` (default: N) slices
        -> two views (N, C, size, size) and their boxes (N, 5), or (N, 9) of warped ones.

        generator: a CPU generator that the caller seeds from (seed, step). A slice's views are the same
        bits in whatever part of the batch it is computed, but for the last one of gamma where a thread
        has a number of pixels that is no multiple of 32.
        """
        (view1, view2), boxes = self.views(2, batch, generator, offset, total)
        return view1, view2, *(to_device(box, batch.device) for box in boxes)

    def views(self, count, batch, generator, offset, total):
        """`count` views and, on the CPU, their boxes."""
        tables = draw_tables(count, len(batch), generator, offset, total)
        field = self.photometric.noise_field(self.size, generator, batch.device)
        boxes = [self.boxes(table, *batch.shape[-2:]) for table in tables]
        if self.warp or self.erasing:
            more = draw_tables(count, len(batch), generator, offset, total, LATER_COLUMNS)
            tables = [torch.cat(both, 1) for both in zip(tables, more)]
            boxes = [self.warp(box, table) for box, table in zip(boxes, tables)]
        cropped = (self.cropped(batch, box) for box in boxes)
        changed = (self.photometric(view, table, field) for view, table in zip(cropped, tables))
        return [self.erasing(view, table) for view, table in zip(changed, tables)], boxes

    def cropped(self, batch, boxes):
        if not self.warp:
            return crop(batch, boxes, self.size)
        black = self.erasing.black  # what lies beyond the slice
        return crop(batch - black, boxes, self.size, padding="zeros") + black

    def boxes(self, table, height, width):
        """One box for each row of the table, (N, 5), in slices of height x width px."""
        area = between(column(table, "area"), *self.scale) * height * width
        log_ratio = between(column(table, "ratio"), math.log(self.ratio[0]), math.log(self.ratio[1]))
        w = (area * log_ratio.exp()).sqrt().clamp(max=width) / width
        h = (area / log_ratio.exp()).sqrt().clamp(max=height) / height
        return placed(w, h, table, self.flip)


class SmallCrops(TwoViews):
    """`count` further views of each slice, smaller and of smaller crops (multi-crop, arXiv 2006.09882)."""

    def __init__(self, count, size, **changes):
        super().__init__(size, **changes)
        self.count = count

    def __call__(self, batch, generator, offset=0, total=None):
        """As TwoViews, called after it with the same generator -> a list of `count` views."""
        return self.views(self.count, batch, generator, offset, total)[0] if self.count else []


class SegmentationAugment:
    """Random scale, crop and grey values, for images and masks together.

    size          side or (height, width) of the output, px
    scale         the slice is enlarged by this factor (log-uniform) before a window of `size` is cut out;
                  where the window exceeds the slice, the image is 0 (air) and the mask 255 (ignored)
    flip          probability of a left-right flip. It turns a left kidney into a right one without changing
                  its label: leave it at 0 where organs have sides.
    brightness, contrast, gamma, noise    as in TwoViews
    """

    def __init__(self, size, scale=(0.5, 2.0), flip=0.0, brightness=0.1, contrast=0.1, gamma=0.1, noise=0.02):
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.scale = scale
        self.flip = flip
        self.photometric = Photometric(brightness, contrast, gamma, noise=noise)

    def __call__(self, images, masks, generator, offset=0, total=None):
        """images (N, C, H, W) in [0, 1], masks (N, H, W) -> (N, C, *size), and (N, *size) int64."""
        (table,) = draw_tables(1, len(images), generator, offset, total)
        field = self.photometric.noise_field(self.size, generator, images.device)
        boxes = self.boxes(table, *images.shape[-2:])
        image = self.photometric(crop(images, boxes, self.size, padding="zeros"), table, field)
        shifted = masks.unsqueeze(1).float() + 1  # outside becomes 0, then -1, then 255
        mask = crop(shifted, boxes, self.size, mode="nearest", padding="zeros").squeeze(1).long() - 1
        return image, torch.where(mask < 0, 255, mask)

    def boxes(self, table, height, width):
        factor = between(column(table, "area"), math.log(self.scale[0]), math.log(self.scale[1])).exp()
        return placed(self.size[1] / factor / width, self.size[0] / factor / height, table, self.flip)


# ---- Random numbers ------------------------------------------------------------------------------

# The columns of the table. All are always drawn, so that switching one change off does not move another.
COLUMNS = ("area", "ratio", "x", "y", "flip", "brightness", "contrast", "gamma", "blur")
COLUMNS += ("autocontrast", "equalize", "noise", "noise_row", "noise_column")
# Further ones, drawn after all of these and only where one of them is used.
LATER_COLUMNS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
LATER_COLUMNS += ("erase", "erase_area", "erase_ratio", "erase_x", "erase_y")


def draw_tables(views, count, generator, offset, total, columns=COLUMNS):
    """`views` tables (count, columns), uniform in [0, 1): rows offset to offset + count of `total`."""
    total = offset + count if total is None else total
    return torch.rand(total, views, len(columns), generator=generator)[offset : offset + count].unbind(1)


def column(table, name):
    return table[:, (COLUMNS + LATER_COLUMNS).index(name)]


def between(uniform, low, high):
    return low + (high - low) * uniform


PIECE = 2**17  # px: half a megabyte for each intermediate result, several of which fit a core's cache


def pieces(count, size, device):
    """Slices of `count` images of `size`: all of them on a GPU; on a CPU so few at a time that they stay in
    its cache: out of it an addition takes four times as long."""
    rows = max(1, PIECE // (size[0] * size[1])) if device.type == "cpu" else count
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def to_device(tensor, device):
    """A copy that the CPU does not wait for: from pinned memory if it goes to a GPU."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# ---- Geometry ------------------------------------------------------------------------------------


def placed(w, h, table, flip):
    """Boxes (N, 5) of width w and height h (fractions of the slice) anywhere inside it; one that is larger
    than the slice lies so that the slice is anywhere inside the box."""
    x0, y0 = column(table, "x") * (1 - w), column(table, "y") * (1 - h)
    return torch.stack([x0, y0, x0 + w, y0 + h, (column(table, "flip") < flip).float()], dim=1)


@dataclass
class Warp:
    """Boxes (N, 5) -> (N, 9), each by its own row of the table; see TwoViews."""

    rotate: float = 0.0
    shear: float = 0.0
    translate: float = 0.0

    def __bool__(self):
        return any(vars(self).values())

    def __call__(self, boxes, table):
        if not self:
            return boxes
        angle = torch.deg2rad(between(column(table, "rotate"), -self.rotate, self.rotate))
        kx, ky = (between(column(table, f"shear_{axis}"), -self.shear, self.shear) for axis in "xy")
        cos, sin = angle.cos(), angle.sin()
        # a rotation, after a shear along x, after one along y
        matrix = [
            cos * (1 + kx * ky) - sin * ky,
            cos * kx - sin,
            sin * (1 + kx * ky) + cos * ky,
            sin * kx + cos,
        ]
        shares = [column(table, f"translate_{axis}") for axis in "xy"]
        shift = between(torch.stack(shares, 1), -self.translate, self.translate)
        shift = shift * (boxes[:, 2:4] - boxes[:, :2])
        corners = boxes[:, :4] + torch.cat([shift, shift], 1)
        return torch.cat([corners, boxes[:, 4:], torch.stack(matrix, 1)], 1)


def crop(batch, boxes, size, mode="bilinear", padding="border"):
    """The boxes (N, 5 or 9, on the CPU) of a batch (N, C, H, W), resampled to `size`, flipped where they say
    so.

    A crop that shrinks by 2 or more is read from the batch averaged over 2 x 2 px, one that shrinks by 4 or
    more over 4 x 4, so that fine texture does not alias. Masks (mode "nearest") are read at full resolution.
    """
    pools = pooling(boxes, batch.shape[-2:], size) if mode == "bilinear" else torch.ones(len(boxes))
    x, y = sampling_points(to_device(boxes, batch.device), size)
    out = batch.new_empty(len(batch), batch.shape[1], *size)
    for rows, pool in alike(pools.int(), size, batch.device):
        out[rows] = read_averaged(batch[rows], x[rows], y[rows], pool, mode, padding)
    return out


def alike(pools, size, device):
    """Which images are read together, and the px to average for them: all of a kind on a GPU; on a CPU
    neighbours of a kind, since to gather whole slices costs more than to read them one by one."""
    if device.type != "cpu":
        used = pools.unique().tolist()  # on the CPU: nothing to wait for
        if len(used) == 1:
            return [(slice(None), used[0])]
        return [(to_device((pools == pool).nonzero().squeeze(1), device), pool) for pool in used]
    found = []
    for piece in pieces(len(pools), size, device):
        start = piece.start
        for pool, neighbours in groupby(pools[piece].tolist()):
            end = start + len(list(neighbours))
            found.append((slice(start, end), pool))
            start = end
    return found


def read_averaged(batch, x, y, pool, mode, padding):
    """The batch averaged over pool x pool px (1, 2 or 4), read at columns x (N, w) and rows y (N, h)."""
    if pool > 1:
        h, w = batch.shape[2:]
        for _ in range(pool // 2):
            batch = halved(batch)
        # averaging drops the last px of an odd side: stretch the points, from pixel edge -1, accordingly
        y = (y + 1) * (h / (batch.shape[2] * pool)) - 1
        x = (x + 1) * (w / (batch.shape[3] * pool)) - 1
    if (mode, padding) == ("bilinear", "border") and x.dim() == 2:
        return read_lines(batch, x, y)
    return F.grid_sample(batch, sampling_grid(x, y), mode, padding, align_corners=False)


def read_lines(batch, x, y):
    """Bilinear interpolation at columns x (N, w) and rows y (N, h), first between rows, then between columns:
    what grid_sample computes, and faster on a CPU, which takes whole rows from memory."""
    n, channels, height, width = batch.shape
    (upper, lower, down), (left, right, across) = around(y, height), around(x, width)
    stack = batch.reshape(-1, width)  # all images, one below the other
    first = torch.arange(0, len(stack), height, device=batch.device).view(n, channels, 1)
    upper, lower = (stack.index_select(0, (first + at[:, None]).flatten()) for at in (upper, lower))
    upper, lower = (rows.view(n, channels, -1, width) for rows in (upper, lower))
    rows = upper.lerp_(lower, down[:, None, :, None])
    left, right = (at[:, None, None].expand(*rows.shape[:3], -1) for at in (left, right))
    return rows.gather(3, left).lerp_(rows.gather(3, right), across[:, None, None])


def around(points, count):
    """The two of `count` px between whose centres each point, from edge -1 to edge 1, lies; and how far it is
    from the first to the second. Beyond the outer centres it is at them."""
    place = ((points + 1) * (0.5 * count) - 0.5).clamp_(0, count - 1)
    first = place.long()
    return first, (first + 1).clamp_(max=count - 1), place - first


def halved(x):
    """Means of 2 x 2 px (on a CPU five times as fast as avg_pool2d)."""
    h, w = (side // 2 * 2 for side in x.shape[2:])
    rows = x[:, :, 0:h:2] + x[:, :, 1:h:2]
    return (rows[..., 0:w:2] + rows[..., 1:w:2]).mul_(0.25)


def pooling(boxes, own, size):
    """1, 2 or 4 for each box (N, 5) of slices of size `own` read at `size` (h, w): what to average first."""
    shrink_x = (boxes[:, 2] - boxes[:, 0]) * own[1] / size[1]
    shrink_y = (boxes[:, 3] - boxes[:, 1]) * own[0] / size[0]
    return 2 ** torch.minimum(shrink_x, shrink_y).add(1e-4).log2().floor().clamp(0, 2)


def sampling_points(boxes, size):
    """Where the pixel centres of the views lie in the source, from edge -1 to edge 1: x of the columns (N, w)
    and y of the rows (N, h); of warped views (N, h, w) both."""
    u = (torch.arange(size[1], device=boxes.device) + 0.5) / size[1]
    v = (torch.arange(size[0], device=boxes.device) + 0.5) / size[0]
    if boxes.shape[1] > 5:
        x0, y0, x1, y1, flip, a, b, c, d = boxes[:, :, None, None].unbind(1)  # each (N, 1, 1)
        u, v = torch.where(flip > 0, 0.5 - u, u - 0.5), v[:, None] - 0.5  # (N, 1, w), (h, 1)
        x, y = 0.5 + a * u + b * v, 0.5 + c * u + d * v
        return (x0 + (x1 - x0) * x) * 2 - 1, (y0 + (y1 - y0) * y) * 2 - 1
    x0, y0, x1, y1, flip = boxes.unsqueeze(2).unbind(1)  # each (N, 1)
    x = (x0 + (x1 - x0) * torch.where(flip > 0, 1 - u, u)) * 2 - 1
    return x, (y0 + (y1 - y0) * v) * 2 - 1


def sampling_grid(x, y):
    """(N, w) and (N, h), or (N, h, w) twice -> (N, h, w, 2), x before y."""
    if x.dim() == 2:
        x, y = torch.broadcast_tensors(x[:, None], y[:, :, None])
    return torch.stack([x, y], 3)


# ---- Grey values ---------------------------------------------------------------------------------


@dataclass
class Photometric:
    """Changes of the grey values of (N, C, h, w), each image by its own row of the table; see TwoViews. Its
    channels are changed alike, but for the noise, which is another one in each."""

    brightness: float = 0.0
    contrast: float = 0.0
    gamma: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    autocontrast: float = 0.0
    equalize: float = 0.0
    value_range: tuple = (0.0, 1.0)

    def noise_field(self, size, generator, device):
        """One field of standard normal numbers a step, (2h, 2w); each view reads it from its own corner."""
        if not self.noise:
            return None
        return to_device(torch.randn(2 * size[0], 2 * size[1], generator=generator), device)

    def __call__(self, x, table, field):
        """Changes x in place, and returns it."""
        *strengths, _ = vars(self).values()  # the last one is value_range
        if not any(strengths):
            return x
        numbers = self.numbers(to_device(table, x.device))
        corners = noise_corners(table, x.shape[1:])
        for rows in pieces(len(x), x.shape[-2:], x.device):
            self.change(x[rows], numbers[rows].unbind(1), field, corners[rows])
        return x

    def numbers(self, table):
        """What `change` needs of the rows of a table, in its order: (N, numbers, 1, 1, 1)."""
        uniform = {name: column(table, name) for name in COLUMNS}
        factor = between(uniform["contrast"], 1 - self.contrast, 1 + self.contrast)
        shift = between(uniform["brightness"], -self.brightness, self.brightness)
        numbers = [
            uniform["autocontrast"] - self.autocontrast,
            uniform["equalize"] - self.equalize,
            between(uniform["gamma"], -self.gamma, self.gamma).exp(),
            factor,
            0.5 - 0.5 * factor + shift,
            self.noise * uniform["noise"],
            *blur_weights(between(uniform["blur"], -self.blur, self.blur), self.blur),
        ]
        return torch.stack(numbers, 1)[:, :, None, None, None]

    def change(self, x, numbers, field, corners):
        """The changes of images that fit the cache together, in place."""
        stretch, level, exponent, factor, shift, sigma, *weights = numbers
        (low, high), scaled = self.value_range, tuple(self.value_range) != (0, 1)
        if scaled:
            x.sub_(low).div_(high - low)
        x.clamp_(0, 1)
        if self.autocontrast:
            x.copy_(torch.where(stretch < 0, autocontrast(x), x))
        if self.equalize:
            x.copy_(torch.where(level < 0, equalize(x), x))
        if self.gamma:
            # A power; on a CPU faster than log and exp, and both take five times as long where x is 0.
            x.clamp_(min=1e-9).log2_().mul_(exponent).exp2_()
        if self.contrast or self.brightness:
            x.mul_(factor).add_(shift)
        if self.blur:
            blur_or_sharpen(x, weights)
        if self.noise:
            x.addcmul_(read_noise(field, corners, x.shape[-2:]), sigma)
        x.clamp_(0, 1)
        if scaled:
            x.mul_(high - low).add_(low)


@dataclass
class Erasing:
    """Black rectangles in views (N, C, h, w), each by its own row of the table; see TwoViews."""

    probability: float = 0.0
    area: tuple = (0.02, 0.2)
    black: float = 0.0

    def __bool__(self):
        return self.probability > 0

    def __call__(self, x, table):
        if not self:
            return x
        area = between(column(table, "erase_area"), *self.area)
        ratio = between(column(table, "erase_ratio"), math.log(3 / 10), math.log(10 / 3)).exp()
        h = torch.maximum((area * ratio).sqrt().clamp(max=1), area)  # so that the width fits, too
        sides = {"y": h, "x": area / h}
        erased = (column(table, "erase") < self.probability)[:, None]
        inside = {}
        for axis, pixels in zip("yx", x.shape[2:]):
            start = (column(table, f"erase_{axis}") * (1 - sides[axis]))[:, None]
            centre = (torch.arange(pixels) + 0.5) / pixels
            inside[axis] = (centre >= start) & (centre < start + sides[axis][:, None]) & erased
        inside = {axis: to_device(part, x.device) for axis, part in inside.items()}
        return x.masked_fill_(inside["y"][:, None, :, None] & inside["x"][:, None, None, :], self.black)


def blur_weights(amount, largest):
    """amount (N) in px: positive: Gaussian blur of that sigma; negative: unsharp masking, the difference to a
    Gaussian of 1 px added that many times. Both vanish continuously at 0.

    The share of the Gaussian in the result, and its values at 0, 1, ... px, which sum to 1: each (N)."""
    sigma = torch.where(amount > 0, amount, 1.0).clamp(min=1e-3)
    taps = [torch.exp(-0.5 * (k / sigma) ** 2) for k in range(math.ceil(2 * max(largest, 1.0)) + 1)]
    total = taps[0] + 2 * sum(taps[1:])
    return [torch.where(amount > 0, 1.0, amount), *(tap / total for tap in taps)]


def blur_or_sharpen(x, weights):
    """x (N, C, h, w) in place, by weights (N, 1, 1, 1) of blur_weights."""
    share, centre, *sides = weights
    radius = len(sides)
    blurred = F.pad(x, (radius, radius, radius, radius), mode="replicate")
    for dim in (2, 3):  # sums of shifted images: the same bits for an image whatever the batch it is in
        n = x.shape[dim]
        padded, blurred = blurred, blurred.narrow(dim, radius, n) * centre
        for k, side in enumerate(sides, 1):
            blurred.addcmul_(padded.narrow(dim, radius - k, n), side)
            blurred.addcmul_(padded.narrow(dim, radius + k, n), side)
    return x.lerp_(blurred, share)


def noise_corners(table, shape):
    """Top row and left column of each channel's part of the field of noise, (N, C, 2), on the CPU."""
    channels, *size = shape
    size = torch.tensor(size)
    shares = torch.stack([column(table, name) for name in ("noise_row", "noise_column")], 1)
    first = (shares * (size + 1)).long()[:, None]
    return (first + torch.arange(channels)[:, None] * (size // channels)) % (size + 1)


def read_noise(field, corners, size):
    """(N, C, h, w) out of the field (2h, 2w), each channel from its own corner (N, C, 2)."""
    h, w = size
    if field.device.type == "cpu":  # one by one: twice as fast as to gather
        parts = [field[top : top + h, left : left + w] for top, left in corners.flatten(0, 1).tolist()]
        return torch.stack(parts).unflatten(0, corners.shape[:2])
    rows, columns = corners[..., :1] + torch.arange(h), corners[..., 1:].expand(-1, -1, h)
    windows = field.unfold(1, w, 1)  # (2h, w + 1, w), a view
    return windows[to_device(rows, field.device), to_device(columns, field.device)]


def autocontrast(x):
    """Each image stretched to [0, 1]; a constant one stays."""
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-6), x)


def equalize(x, bins=256):
    """Histogram equalisation: each grey level (of 256 in [0, 1]) of an image becomes the share of pixels
    that are darker or equal, the darkest level becomes 0; a constant image stays."""
    level = (x * (bins - 1)).round().long().flatten(1)  # (N, h w)
    counts = torch.zeros(len(x), bins, device=x.device).scatter_add_(
        1, level, torch.ones_like(level, dtype=x.dtype)
    )
    share = counts.cumsum(1)
    darkest = share.gather(1, level.amin(1, keepdim=True))
    brighter = level.shape[1] - darkest  # (N, 1) pixels above the darkest level
    curve = (share - darkest).clamp(min=0) / brighter.clamp(min=1)
    return torch.where(brighter[:, :, None, None] > 0, curve.gather(1, level).view_as(x), x)
