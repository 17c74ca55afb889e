"""Where the positions of a feature map lie: in a ResNet, in views, and for all that matches or draws them."""

import pytest
import torch
from every_method import small
from test_augment import seeded
from torch import nn

import models
from augment import crop
from losses import cell_centres, map_box, matched_points, sample_regions, to_view
from methods import centre_distances
from models import ARCHITECTURES, LAYERS, Encoder, HalfResNet
from pretraining.monitor import CollapseMonitor, at_pixels

# ---- In a ResNet ----


class NarrowResNet(HalfResNet):
    """A sixteenth of the channels."""

    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, planes // 8, *args, **kwargs)


def weighs_all_alike(arch, output_stride, monkeypatch):
    """A network of this architecture, few channels and equal weights: it only adds up what it sees."""
    _, block, depths = ARCHITECTURES[arch]
    monkeypatch.setitem(models.ARCHITECTURES, "narrow", (NarrowResNet, block, depths))
    encoder = Encoder("narrow", output_stride=output_stride).double().eval()
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    return encoder


@pytest.mark.parametrize(
    ("output_stride", "size"), [(32, (20, 448)), (16, (445, 17)), (8, (448, 16)), (8, (19, 451))]
)
@pytest.mark.parametrize("arch", ["resnet18", "resnet26", "resnet50"])
def test_position_i_looks_at_pixel_stride_times_i(arch, output_stride, size, monkeypatch):
    """The centroid of its gradient, along the longer side, away from the borders; and how many there are."""
    encoder = weighs_all_alike(arch, output_stride, monkeypatch)
    image = torch.rand(4, 1, *size, generator=seeded(), dtype=torch.float64).requires_grad_()
    axis, strides = (2 if size[0] > size[1] else 3), encoder.strides()
    for layer, maps in encoder(image, LAYERS).items():
        stride = strides[layer]
        assert maps.shape[2:] == tuple(-(-side // stride) for side in size)
        position = 208 // stride
        one = maps.select(axis, position).sum()
        (gradient,) = torch.autograd.grad(one, image, retain_graph=True)
        seen = gradient.abs().sum((0, 1, 5 - axis))
        centroid = (seen * torch.arange(len(seen))).sum() / seen.sum()
        assert abs(centroid - stride * position) < 0.5 + stride / 16  # half a stride is what other rules say


# ---- In views: an encoder that shows at position i what lies at pixel stride * i ----

TURNED = [[0.9, -0.3, 0.35, 1.0], [1.0, 0.2, -0.1, 1.1], [0.8, 0.5, -0.5, 0.8]]


def some_boxes(warped):
    """16 pairs of crops (N, 5 or 9), mirrored or not, that overlap and lie inside the slice."""
    generator = seeded(2)
    uniform = torch.rand(2, 16, 4, generator=generator, dtype=torch.float64)
    low, side = 0.2 + 0.15 * uniform[..., :2], 0.3 + 0.1 * uniform[..., 2:]
    flip = torch.tensor([[0.0, 0, 1, 1], [0, 1, 0, 1]]).double().repeat(1, 4)[..., None]
    boxes = torch.cat([low, low + side, flip], dim=2)
    if warped:
        matrices = torch.tensor([[*TURNED, TURNED[0]], [TURNED[1], *TURNED]]).double().repeat(1, 4, 1)
        boxes = torch.cat([boxes, matrices], dim=2)
    return boxes.unbind(0)


def shown(box, size):
    """Views (N, 2, *size) whose pixels show the x and y, in [0, 1] of the slice, that they lie at."""
    centres = (torch.arange(32, dtype=torch.float64) + 0.5) / 32
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return crop(torch.stack([x, y]).expand(len(box), 2, 32, 32), box, size)


class Sliced(nn.Module):
    """Shows of each view its pixels stride * i."""

    output_stride = 16
    channels = {"layer3": 2, "layer4": 2}

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def strides(self):
        return {"layer3": 8, "layer4": 16}

    def forward(self, x, layers=("layer4",)):
        return {layer: x[:, :, :: self.strides()[layer], :: self.strides()[layer]] for layer in layers}


@pytest.mark.parametrize("size", [(48, 48), (49, 49), (63, 57), (80, 50)])
@pytest.mark.parametrize("warped", [False, True])
def test_matched_regions_of_two_maps_show_the_same_place(warped, size):
    """Mirrored, turned, sheared or not, of even and odd sizes; none lies beyond the outermost positions."""
    query_box, key_box = some_boxes(warped)
    stride = 16
    query_points, key_points, keep = matched_points(query_box, key_box, size, stride, grid=4)
    places = []
    for box, points in ((query_box, query_points), (key_box, key_points)):
        places.append(sample_regions(shown(box, size)[:, :, ::stride, ::stride], points, size, stride)[keep])
        pixels = points[keep] * torch.tensor(size[::-1]) - 0.5
        last = torch.tensor([(side - 1) // stride * stride for side in size[::-1]])
        assert (pixels > -1e-6).all() and (pixels < last + 1e-6).all()
    assert keep.sum() >= 8 and {0, 1} == set((query_box - key_box)[keep, 4].abs().tolist())
    torch.testing.assert_close(*places, rtol=0, atol=1e-5)
    torch.testing.assert_close(to_view(places[0], query_box[keep]), query_points[keep], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(48, 48), (33, 50)])
@pytest.mark.parametrize("warped", [False, True])
def test_cell_centres_are_the_places_that_a_map_shows(warped, size):
    for box in some_boxes(warped):
        maps = shown(box, size)[:, :, ::8, ::8]
        torch.testing.assert_close(cell_centres(box, size, 8), maps.flatten(2).mT, rtol=0, atol=1e-5)
        if not warped:
            ends = torch.cat([maps.amin((2, 3)), maps.amax((2, 3))], dim=1)
            torch.testing.assert_close(map_box(box, size, 8), ends, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layer", ["layer3", "layer4"])
@pytest.mark.parametrize("match", ["overlap", "grid"])
def test_methods_compare_regions_of_the_same_place(layer, match):
    """Of whichever layer; "grid" of two crops of the same place."""
    method = small("simclr", local={"layer": layer, "match": match})
    method.query.encoder = Sliced()
    method.query.projector = method.query.local_projector = nn.Identity()
    boxes = some_boxes(False)
    if match == "grid":
        boxes = [torch.cat([boxes[0][:, :4], box[:, 4:]], dim=1) for box in boxes]
    views = [shown(box, (48, 48)) for box in boxes]
    targets = method.targets(views, boxes)
    keep = targets.local_weight > 0
    (_, query), (_, key) = (
        method.query(view, points) for view, points in zip(views, (targets.query_points, targets.key_points))
    )
    assert query.shape == (16, 16, 2) and keep.sum() >= 8
    torch.testing.assert_close(query[keep], key[keep], rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(48, 48), (33, 50)])
def test_pixpro_and_vicregl_measure_between_the_places_that_maps_show(size):
    """PixPro in diagonals of a bin, from one position to the next but one, of the larger crop."""
    boxes = some_boxes(False)
    maps = [shown(box, size)[:, :, ::16, ::16] for box in boxes]
    first, second = (one.flatten(2).mT for one in maps)  # (N, P, 2) each
    expected = torch.linalg.vector_norm(first[:, :, None] - second[:, None], dim=3)  # (N, P, P)
    torch.testing.assert_close(centre_distances(boxes, size, 16), expected, rtol=0, atol=1e-5)
    method = small("pixpro")
    method.query.encoder = Sliced()
    bins = [torch.linalg.vector_norm(one[:, :, 1, 1] - one[:, :, 0, 0], dim=1) for one in maps]
    near = expected / torch.maximum(*bins)[:, None, None]
    assert ((near - 0.7).abs() > 1e-4).all() and near.min() < 0.7 < near.max()
    assert torch.equal(method.near(boxes, size), near < 0.7)


# ---- In the monitor ----


def test_the_grey_values_around_a_position_are_those_around_its_pixel():
    """Of a slice that rises evenly the mean of a cell is the value in its middle."""
    ramp = torch.arange(48.0) + 100 * torch.arange(48.0)[:, None]
    monitor = object.__new__(CollapseMonitor)
    monitor.scaled = lambda stored: stored
    around = monitor.neighbourhoods(ramp[None, None], 8).view(3, 3, 6, 6)
    for row in range(3):
        for column in range(3):
            expected = ramp[8 * row + 8 :: 8, 8 * column + 8 :: 8][:3, :3]
            torch.testing.assert_close(around[row, column, 2:5, 2:5], expected)


def test_features_are_drawn_where_their_positions_look():
    """Each pixel in the colour of the nearest position."""
    colors = torch.rand(1, 6, 6, 3, generator=seeded())
    drawn = at_pixels(colors, 46, 8)
    assert drawn.shape == (1, 46, 46, 3)
    nearest = [min(range(6), key=lambda i: (abs(8 * i - pixel), -i)) for pixel in range(46)]
    for y in range(46):
        for x in range(46):
            assert torch.equal(drawn[0, y, x], colors[0, nearest[y], nearest[x]])
