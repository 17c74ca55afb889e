"""Augmentation of whole batches of slices, on any device: two views for pretraining, one for segmentation training.

Every image has its own parameters. They are columns of one table of uniform numbers, drawn on the CPU by the caller's
generator for all samples of the global batch; a process uses the rows of its own samples. So what happens to a sample
depends on the generator's seed and the sample's global index, never on the rank or the number of processes. Everything
that decides about shapes is known on the CPU: a GPU is never waited for.

Crop boxes: (N, 5) float, x0 y0 x1 y1 in [0, 1] of the source slice (pixel edges), then flip 0 or 1.

Grey values are HU windows scaled to [0, 1], so brightness is a shift of the window's level and contrast (around
mid-window) a change of its width. A strength of 0 leaves that change out entirely.
"""

import math

import torch
import torch.nn.functional as F

# The columns of the table of uniform numbers; all are always drawn, so switching one change off moves no other.
COLUMNS = (
    *("area", "ratio", "x", "y", "flip"),
    *("brightness", "contrast", "gamma", "blur", "autocontrast", "equalize"),
    *("noise", "noise_row", "noise_column"),
)


class TwoViews:
    """Two independently cropped and changed views of each slice (SimCLR, arXiv 2002.05709; MoCo v2, 2003.04297).

    size          side of the views, px
    scale, ratio  area of the crop as a fraction of the slice's, and its aspect ratio (log-uniform), as in
                  torchvision's RandomResizedCrop; a side that does not fit is cut to the slice's
    flip          probability of a left-right flip; 0, because organs have sides
    brightness    shift by up to this much of the window
    contrast      factor 1 - contrast to 1 + contrast around mid-window
    gamma         exponent exp(-gamma) to exp(gamma)
    blur          up to this sigma in px of a Gaussian, or up to this amount of unsharp masking
    noise         Gaussian noise of up to this sigma
    autocontrast, equalize    the paper's: probabilities
    value_range   the values that count as 0 and 1 where the batch is not windowed (data.window: null)
    """

    def __init__(self, size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=0.0, brightness=0.2, contrast=0.2, gamma=0.2,
                 blur=1.0, noise=0.05, autocontrast=0.0, equalize=0.0, value_range=(0.0, 1.0)):  # fmt: skip
        self.size = size
        self.scale = scale
        self.ratio = ratio
        self.flip = flip
        self.photometric = Photometric(
            brightness, contrast, gamma, blur, noise, autocontrast, equalize, value_range=value_range
        )

    def __call__(self, batch, generator, offset=0, total=None):
        """batch (N, 1, H, W), rows offset ... offset + N of a global batch of `total` (default N) -> two views
        (N, 1, size, size) and their boxes (N, 5). `generator`: a CPU generator, seeded from (seed, step)."""
        tables = draw_tables(2, len(batch), generator, offset, total)
        fields = [self.photometric.noise_field((self.size, self.size), generator) for _ in tables]
        view1, box1 = self.view(batch, tables[0], fields[0])
        view2, box2 = self.view(batch, tables[1], fields[1])
        return view1, view2, box1, box2

    def view(self, batch, table, field):
        boxes = self.boxes(table, *batch.shape[-2:])
        view = crop(batch, boxes, (self.size, self.size))
        return self.photometric(view, table, field), to_device(boxes, batch.device)

    def boxes(self, table, height, width):
        """One box a row of the table, (N, 5), for slices of height x width px."""
        area = between(table["area"], *self.scale) * height * width
        ratio = torch.exp(between(table["ratio"], math.log(self.ratio[0]), math.log(self.ratio[1])))
        w = (area * ratio).sqrt().clamp(max=width) / width
        h = (area / ratio).sqrt().clamp(max=height) / height
        x0 = table["x"] * (1 - w)
        y0 = table["y"] * (1 - h)
        flip = (table["flip"] < self.flip).float()
        return torch.stack([x0, y0, x0 + w, y0 + h, flip], dim=1)


class SegmentationAugment:
    """Random scale, crop and grey values for images and masks together.

    size          (height, width) or side of the output, px
    scale         the slice is enlarged by this factor (log-uniform), then a window of `size` is cut out; where the window
                  exceeds the slice the image is 0 (air) and the mask 255 (ignored)
    flip          probability of a left-right flip. It swaps the sides of the body, which turns a left kidney into a
                  right one without changing its label; leave it at 0 where organs have sides.
    brightness, contrast, gamma, noise    as in TwoViews
    """

    def __init__(self, size, scale=(0.5, 2.0), flip=0.0, brightness=0.1, contrast=0.1, gamma=0.1, noise=0.02):
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.scale = scale
        self.flip = flip
        self.photometric = Photometric(brightness, contrast, gamma, 0.0, noise, 0.0, 0.0)

    def __call__(self, images, masks, generator, offset=0, total=None):
        """images (N, 1, H, W) in [0, 1], masks (N, H, W) -> images (N, 1, *size), masks (N, *size) int64."""
        (table,) = draw_tables(1, len(images), generator, offset, total)
        field = self.photometric.noise_field(self.size, generator)
        boxes = self.boxes(table, *images.shape[-2:])
        shifted = masks.unsqueeze(1).float() + 1  # outside is 0 here, then -1, then 255
        mask = crop(shifted, boxes, self.size, mode="nearest", padding="zeros").squeeze(1).long() - 1
        image = self.photometric(crop(images, boxes, self.size, padding="zeros"), table, field)
        return image, torch.where(mask < 0, 255, mask)

    def boxes(self, table, height, width):
        factor = torch.exp(between(table["area"], math.log(self.scale[0]), math.log(self.scale[1])))
        h = self.size[0] / factor / height
        w = self.size[1] / factor / width
        x0 = table["x"] * (1 - w)  # a window wider than the slice: the slice lies anywhere inside it
        y0 = table["y"] * (1 - h)
        flip = (table["flip"] < self.flip).float()
        return torch.stack([x0, y0, x0 + w, y0 + h, flip], dim=1)


# ---- Random numbers ------------------------------------------------------------------------------


def draw_tables(views, count, generator, offset, total):
    """`views` dictionaries column -> (count,) uniform numbers in [0, 1): rows offset ... offset + count of `total`."""
    total = offset + count if total is None else total
    table = torch.rand(total, views, len(COLUMNS), generator=generator)[offset : offset + count]
    return [dict(zip(COLUMNS, table[:, view].unbind(1))) for view in range(views)]


def between(uniform, low, high):
    return low + (high - low) * uniform


def to_device(tensor, device):
    """A copy that the CPU does not wait for: from pinned memory if it goes to a GPU."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# ---- Geometry ------------------------------------------------------------------------------------


def crop(batch, boxes, size, mode="bilinear", padding="border"):
    """The boxes (N, 5, on the CPU) of a batch (N, 1, H, W), resampled to `size`, flipped where the box says so.

    A crop that shrinks by 2 or more is read from the batch averaged over 2 x 2 px, one by 4 or more over 4 x 4, so
    that fine texture does not alias; masks (mode "nearest") are always read from the full resolution.
    """
    height, width = batch.shape[-2:]
    grid = to_device(sampling_grid(boxes, size), batch.device)
    shrinks = torch.minimum(
        (boxes[:, 2] - boxes[:, 0]) * width / size[1], (boxes[:, 3] - boxes[:, 1]) * height / size[0]
    )
    levels = (
        2 ** torch.log2(shrinks + 1e-4).floor().clamp(0, 2) if mode == "bilinear" else torch.ones(len(boxes))
    )
    out = None
    for pool in levels.unique().int().tolist():  # on the CPU: nothing to wait for
        rows = (levels == pool).nonzero().squeeze(1)
        everything = len(rows) == len(boxes)
        rows = to_device(rows, batch.device)
        source, coordinates = (batch, grid) if everything else (batch[rows], grid[rows])
        if pool > 1:  # pooling drops the last px of an odd size: stretch the coordinates accordingly
            source = F.avg_pool2d(source, pool)
            covered = torch.tensor([source.shape[-1] * pool / width, source.shape[-2] * pool / height])
            coordinates = (coordinates + 1) / to_device(covered, batch.device) - 1
        sampled = F.grid_sample(source, coordinates.to(source.dtype), mode, padding, align_corners=False)
        if everything:
            return sampled
        out = sampled.new_empty(len(boxes), *sampled.shape[1:]) if out is None else out
        out[rows] = sampled
    return out


def sampling_grid(boxes, size):
    """Where the pixel centres of the views lie in the source, (N, h, w, 2) in grid_sample's [-1, 1] (pixel edges)."""
    x0, y0, x1, y1, flip = boxes.unsqueeze(2).unbind(1)  # each (N, 1)
    u = (torch.arange(size[1]) + 0.5) / size[1]
    v = (torch.arange(size[0]) + 0.5) / size[0]
    u = torch.where(flip > 0, 1 - u, u)  # (N, w)
    x = (x0 + (x1 - x0) * u) * 2 - 1
    y = (y0 + (y1 - y0) * v) * 2 - 1
    return torch.stack([x[:, None, :].expand(-1, size[0], -1), y[:, :, None].expand(-1, -1, size[1])], dim=3)


# ---- Grey values ---------------------------------------------------------------------------------


class Photometric:
    """Changes of the grey values of (N, 1, h, w), each image by its own row of the table; see TwoViews."""

    def __init__(
        self, brightness, contrast, gamma, blur, noise, autocontrast, equalize, value_range=(0.0, 1.0)
    ):
        self.brightness = brightness
        self.contrast = contrast
        self.gamma = gamma
        self.blur = blur
        self.noise = noise
        self.autocontrast = autocontrast
        self.equalize = equalize
        self.low, self.high = value_range
        self.on = any((brightness, contrast, gamma, blur, noise, autocontrast, equalize))

    def noise_field(self, size, generator):
        """One field of standard normal numbers a step, twice the view's size; each image reads it at its own place."""
        return torch.randn(2 * size[0], 2 * size[1], generator=generator) if self.noise else None

    def __call__(self, x, table, field):
        if not self.on:
            return x
        columns = to_device(torch.stack([table[name] for name in COLUMNS], dim=1), x.device)
        uniform = {
            name: columns[:, i, None, None, None] for i, name in enumerate(COLUMNS)
        }  # each (N, 1, 1, 1)
        x = ((x - self.low) / (self.high - self.low)).clamp(0, 1)
        if self.autocontrast:
            x = torch.where(uniform["autocontrast"] < self.autocontrast, autocontrast(x), x)
        if self.equalize:
            x = torch.where(uniform["equalize"] < self.equalize, equalize(x), x)
        if self.gamma:
            x = x ** torch.exp(between(uniform["gamma"], -self.gamma, self.gamma))
        if self.contrast:
            x = (x - 0.5) * between(uniform["contrast"], 1 - self.contrast, 1 + self.contrast) + 0.5
        if self.brightness:
            x = x + between(uniform["brightness"], -self.brightness, self.brightness)
        if self.blur:
            x = blur_or_sharpen(x, between(uniform["blur"], -self.blur, self.blur), self.blur)
        if self.noise:
            x = x + self.noise * uniform["noise"] * read_noise(field, table, x)
        return x.clamp(0, 1) * (self.high - self.low) + self.low


def blur_or_sharpen(x, amount, largest):
    """x (N, 1, h, w), amount (N, 1, 1, 1) in px: positive: Gaussian blur of that sigma; negative: unsharp masking, the
    difference to a Gaussian of 1 px added that many times. Both vanish continuously at 0."""
    sigma = torch.where(amount > 0, amount, 1.0).clamp(min=1e-3)
    weight = torch.where(amount > 0, 1.0, amount)
    radius = math.ceil(2.5 * max(largest, 1.0))
    taps = [torch.exp(-0.5 * (k / sigma) ** 2) for k in range(radius + 1)]
    total = taps[0] + 2 * sum(taps[1:])
    blurred = x
    for dim in (2, 3):  # sums of shifted images: the same bits for an image whatever the batch it is in
        n = x.shape[dim]
        padded = F.pad(
            blurred, (radius, radius, 0, 0) if dim == 3 else (0, 0, radius, radius), mode="replicate"
        )
        blurred = padded.narrow(dim, radius, n) * (taps[0] / total)
        for k in range(1, radius + 1):
            pair = padded.narrow(dim, radius - k, n) + padded.narrow(dim, radius + k, n)
            blurred = blurred + pair * (taps[k] / total)
    return x + weight * (blurred - x)


def read_noise(field, table, x):
    """(N, 1, h, w) out of the field (2h, 2w), each image from its own corner."""
    h, w = x.shape[-2:]
    top = (table["noise_row"] * (h + 1)).long()
    left = (table["noise_column"] * (w + 1)).long()
    rows, columns = top[:, None] + torch.arange(h), left[:, None].expand(-1, h)
    windows = to_device(field, x.device).unfold(1, w, 1)  # (2h, w + 1, w), a view
    return windows[to_device(rows, x.device), to_device(columns, x.device)].unsqueeze(1)


def autocontrast(x):
    """Each image stretched to [0, 1]; a constant one stays."""
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-6), x)


def equalize(x, bins=256):
    """Histogram equalisation: each grey level (of 256 in [0, 1]) of an image becomes the share of pixels that are
    darker or equal, the darkest level becomes 0; a constant image stays."""
    level = (x * (bins - 1)).round().long().flatten(1)  # (N, h w)
    counts = torch.zeros(len(x), bins, device=x.device).scatter_add_(
        1, level, torch.ones_like(level, dtype=x.dtype)
    )
    share = counts.cumsum(1)
    darkest = share.gather(1, level.amin(1, keepdim=True))
    brighter = level.shape[1] - darkest  # (N, 1) pixels above the darkest level
    curve = (share - darkest).clamp(min=0) / brighter.clamp(min=1)
    return torch.where(brighter[:, :, None, None] > 0, curve.gather(1, level).view_as(x), x)
