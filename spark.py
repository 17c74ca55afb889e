"""SparK: masked reconstruction with a convolutional network (arXiv 2301.03580).

Cells of a view, as large as a position of layer4, are hidden, and a light decoder fills them in. The ResNet
computes what a sparse one would, so that nothing leaks from the hidden area: each norm, which follows each
convolution, takes its statistics from visible positions only and leaves 0 at the others. Needs losses.py,
models.py and moco.py.
"""

from contextlib import contextmanager

import torch
from torch import Tensor, nn

from losses import own_rows, patch_reconstruction, seeded, world_size
from moco import Method, Targets
from models import LAYERS, Encoder, SplitBatchNorm2d, split_batch_norms


class SparK(Method):
    """Reconstructs the hidden cells of the first view (section 3); has no projections, and no second view.

    Args:
        encoder: without whitening; its output stride is the side of a cell, 32 px in the publication.
        mask: share of the cells that are hidden.
        hidden: channels of the decoder's first stage, halved in each further one. Theirs has 512, and takes
            more time than the encoder.
        common: as Method's; neither `local` nor `decorrelation` has a meaning here.

    Raises:
        ValueError: an addition that cannot be combined.
    """

    hides_cells = True

    def __init__(self, encoder: Encoder, mask: float = 0.6, hidden: int = 128, **common):
        if common.get("local") is not None:
            raise ValueError(
                "local.weight: masked reconstruction sees one view, so no regions can be matched"
            )
        plain = isinstance(encoder.get_submodule(encoder.last_norm), nn.BatchNorm2d)
        if common.get("decorrelation") is not None or not plain:
            raise ValueError(
                "decorrelation.method: whitening would count the hidden positions; spark needs none"
            )
        see_only_what_is_visible(encoder)
        super().__init__(encoder, nn.Identity(), **common)
        self.mask, self.cell = mask, encoder.output_stride
        self.decoder = Decoder(encoder, hidden)
        split_batch_norms(self.decoder, self.bn_split)

    @torch.no_grad()
    def targets(self, views, boxes=None, parts=1) -> Targets:
        """Under "visible" (n, k) the numbers of an image's visible cells, ascending; the same for a sample of
        the global batch in whatever process it is."""
        n, _, height, width = views[0].shape
        cells = (height // self.cell) * (width // self.cell)
        count = min(max(round(cells * (1 - self.mask)), 1), cells if self.mask == 0 else cells - 1)
        draw = torch.rand(n * world_size(), cells, generator=seeded("mask", self.seed, self.step))
        visible = draw[own_rows(n)].argsort(dim=1)[:, :count].sort(dim=1).values
        return Targets(visible=visible.to(views[0].device))

    def losses(self, views, boxes, targets) -> dict[str, Tensor]:
        view = views[0]  # (n, C, H, W)
        seen = Visible(targets.visible, view.shape[2] // self.cell, view.shape[3] // self.cell)
        with only_visible(self, seen):
            maps = self.query.encoder(seen.only(view), LAYERS)
            prediction = self.decoder(maps, seen)  # (n, C, H, W)
        own = patch_reconstruction(prediction, view, seen.hidden())
        return self.terms(own, own.new_zeros(()))


class Visible:
    """The visible cells of images: (n, k) numbers in a grid of rows x columns cells."""

    def __init__(self, cells: Tensor, rows: int, columns: int):
        self.cells, self.grid = cells, (rows, columns)
        self.places = {}  # of each size of map, on which layers share them

    def hidden(self) -> Tensor:
        """(n, rows, columns) bool."""
        mask = torch.ones(
            len(self.cells), self.grid[0] * self.grid[1], dtype=torch.bool, device=self.cells.device
        )
        return mask.scatter_(1, self.cells, False).view(-1, *self.grid)

    def only(self, x: Tensor) -> Tensor:
        """x (n, C, h, w) with 0 at the hidden positions, whatever is there."""
        return x.masked_fill(self.hidden_at(x), 0)

    def hidden_at(self, x: Tensor) -> Tensor:
        """Which positions of a map (n, C, h, w) are hidden: (n, 1, h, w) bool."""
        rows, columns = (side // cells for side, cells in zip(x.shape[2:], self.grid))
        return self.hidden().repeat_interleave(rows, 1).repeat_interleave(columns, 2)[:, None]

    def positions(self, height: int, width: int) -> Tensor:
        """Of maps (n, C, height, width) the visible positions, counted through all images: (n k p,) for p
        positions a cell."""
        if (height, width) not in self.places:
            rows, columns = height // self.grid[0], width // self.grid[1]  # of a cell
            y = self.cells // self.grid[1] * rows
            x = self.cells % self.grid[1] * columns
            dy, dx = (torch.arange(side, device=y.device) for side in (rows, columns))
            image = torch.arange(len(y), device=y.device)[:, None, None, None] * (height * width)
            places = image + (y[..., None, None] + dy[:, None]) * width + x[..., None, None] + dx
            self.places[height, width] = places.flatten()  # (n, k, rows, columns) before
        return self.places[height, width]


class VisibleBatchNorm2d(SplitBatchNorm2d):
    """BatchNorm of the visible positions alone, with 0 elsewhere; without `visible` an ordinary one."""

    visible: Visible | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.visible is None:
            return super().forward(x)
        places = self.visible.positions(*x.shape[2:])
        seen = rows(x).index_select(0, places)  # (n k p, C)
        samples = seen.view(len(x), -1, 1, x.shape[1]).permute(0, 3, 1, 2)  # (n, C, k p, 1)
        return InPlace.apply(rows(super().forward(samples)), places, x.shape)


def rows(x: Tensor) -> Tensor:
    """(N, C, h, w) -> (N h w, C), a view of a channels_last tensor."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class InPlace(torch.autograd.Function):
    """Vectors (M, C) at places (M,) of empty maps (N, C, h, w); no view, which ReLU in place would copy."""

    @staticmethod
    def forward(ctx, vectors: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(places)
        maps = torch.zeros_like(vectors.new_empty(1).expand(shape), memory_format=torch.channels_last)
        rows(maps).index_copy_(0, places, vectors)
        return maps

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return rows(grad).index_select(0, ctx.saved_tensors[0]), None, None


class VisibleMaxPool2d(nn.MaxPool2d):
    """Max pooling that carries nothing into the hidden positions."""

    visible: Visible | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x if self.visible is None else self.visible.only(x)


def see_only_what_is_visible(encoder: Encoder) -> None:
    """Give an encoder norms and a pooling that can; names and values of its tensors stay."""
    for module in encoder.modules():
        if type(module) is SplitBatchNorm2d:
            module.__class__ = VisibleBatchNorm2d
    encoder.maxpool.__class__ = VisibleMaxPool2d


@contextmanager
def only_visible(network: nn.Module, visible: Visible):
    """Within, the norms and the pooling know what is visible."""
    aware = [m for m in network.modules() if isinstance(m, VisibleBatchNorm2d | VisibleMaxPool2d)]
    for module in aware:
        module.visible = visible
    try:
        yield
    finally:
        for module in aware:
            module.visible = None


class Decoder(nn.Module):
    """A light U-Net from the maps of all layers to the image (section 3.2): in each map the hidden positions
    get a learnt vector, then from layer4 on it is enlarged and the next finer map added."""

    def __init__(self, encoder: Encoder, hidden: int):
        super().__init__()
        self.layers = LAYERS[::-1]
        strides = encoder.strides()
        widths = [max(hidden // 2**stage, 8) for stage in range(6)]
        self.norms, self.tokens = nn.ModuleDict(), nn.ParameterDict()
        self.inward, self.stages = nn.ModuleDict(), nn.ModuleList()
        for stage, name in enumerate(self.layers):
            channels = encoder.channels[name]
            self.norms[name] = VisibleBatchNorm2d(channels)
            self.tokens[name] = nn.Parameter(0.02 * torch.randn(channels))
            kernel = 1 if name == "layer4" else 3
            self.inward[name] = nn.Conv2d(channels, widths[stage], kernel, padding=kernel // 2)
        after = [strides[name] for name in self.layers[1:]] + [2, 1]  # the stride after each stage
        for stage, (before, stride) in enumerate(zip([strides["layer4"], *after], after)):
            self.stages.append(enlarging(widths[stage], widths[stage + 1], before // stride))
        self.image = nn.Conv2d(widths[5], encoder.in_channels, 1)

    def forward(self, maps: dict[str, Tensor], seen: Visible) -> Tensor:
        x = 0
        for stage, enlarge in enumerate(self.stages):
            if stage < len(self.layers):
                name = self.layers[stage]
                x = x + self.inward[name](self.filled(name, maps[name], seen))
            x = enlarge(x)
        return self.image(x)

    def filled(self, name: str, features: Tensor, seen: Visible) -> Tensor:
        """A map (n, C, h, w), normed, with the learnt vector at its hidden positions."""
        features = self.norms[name](features)
        token = self.tokens[name][:, None, None].to(features.dtype)
        return torch.where(seen.hidden_at(features), token, features)


def enlarging(inputs: int, outputs: int, factor: int) -> nn.Sequential:
    """Twice as large (or as large, for a factor of 1), then two convolutions with norms."""
    up = nn.ConvTranspose2d(inputs, inputs, 4, stride=2, padding=1) if factor == 2 else nn.Identity()
    return nn.Sequential(
        up,
        nn.Conv2d(inputs, inputs, 3, padding=1, bias=False),
        SplitBatchNorm2d(inputs),
        nn.ReLU6(inplace=True),
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        SplitBatchNorm2d(outputs),
    )
