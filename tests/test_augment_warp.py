"""Views that are turned, sheared, moved and partly erased: against Pillow and torchvision; their regions."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from test_augment import GEOMETRY_ONLY, coordinate_images, seeded

from augment import COLUMNS, TwoViews, crop
from losses import cell_centres, map_box, matched_points, to_slice, to_view

WARPS = {"rotate": 25.0, "shear": 0.2, "translate": 0.15}
WHOLE = {"scale": (1, 1), "ratio": (1, 1), **GEOMETRY_ONLY}


def read(view, points):
    """A view (N, 1, h, w) at points (N, R, 2) -> (N, R)."""
    return torch.nn.functional.grid_sample(view, points[:, None] * 2 - 1, align_corners=False)[:, 0, 0]


def inside(points, margin=0.0):
    return ((points >= margin) & (points <= 1 - margin)).all(-1)


def smooth_slices(count, side):
    """Random ones that interpolation does not change much."""
    x = torch.rand(count, 1, side // 4, side // 4, generator=seeded())
    return torch.nn.functional.interpolate(x, (side, side), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize(
    "changes", ({"rotate": 40.0}, {"translate": 0.3}, {"rotate": 180.0, "translate": 0.1})
)
def test_rotation_and_translation_against_torchvision(changes):
    """Of whole slices, which are black outside: to the last pixel of the border."""
    x = torch.rand(6, 1, 40, 40, generator=seeded())
    view, _, box, _ = TwoViews(40, **WHOLE, **changes)(x, seeded(1))
    for index in range(6):
        degrees = math.degrees(math.atan2(box[index, 7], box[index, 5]))
        shift = box[index, :2] @ box[index, 5:].view(2, 2)  # torchvision turns first, then moves
        moved = [-40 * part for part in shift.tolist()]
        expected = tv.affine(x[index], -degrees, moved, 1.0, [0.0, 0.0], tv.InterpolationMode.BILINEAR)
        assert torch.allclose(view[index], expected, atol=1e-4)
    assert (box[:, 5:] - torch.eye(2).flatten()).abs().max() > (0.3 if "rotate" in changes else -1)


def test_shear_against_torchvision():
    """Along one axis, by boxes made by hand; and how those of views are composed."""
    x = torch.rand(1, 1, 40, 40, generator=seeded())
    for k in (0.3, -0.2):
        degrees = math.degrees(math.atan(k))
        for matrix, shear in (((1, k, 0, 1), [degrees, 0.0]), ((1, 0, k, 1), [0.0, degrees])):
            view = crop(x, torch.tensor([[0, 0, 1, 1, 0, *matrix]]), (40, 40), padding="zeros")
            expected = tv.affine(x, 0.0, [0, 0], 1.0, shear, tv.InterpolationMode.BILINEAR)
            assert torch.allclose(view, expected, atol=1e-4)
    box = TwoViews(8, **WHOLE, shear=0.4)(x.expand(9, 1, 40, 40), seeded(1))[2]
    a, b, c, d = box[:, 5:].unbind(1)
    assert torch.allclose(a, 1 + b * c) and (d == 1).all()
    assert 0.2 < b.abs().max() < 0.4 and 0.2 < c.abs().max() < 0.4
    a, b, c, d = TwoViews(8, rotate=90, shear=0.4)(x.expand(9, 1, 40, 40), seeded(1))[2][:, 5:].unbind(1)
    assert torch.allclose(a * d - b * c, torch.ones(9), atol=1e-5)


@pytest.mark.parametrize("shape", ((48, 48), (64, 40)))
def test_any_view_against_pillow(shape):
    """Crop, flip and all three changes as one matrix of Image.transform, worked out here for each view."""
    height, width = shape
    x = torch.nn.functional.interpolate(smooth_slices(12, 64), shape, mode="bilinear")
    size = 32
    view, _, boxes, _ = TwoViews(size, scale=(0.2, 0.8), flip=0.5, **GEOMETRY_ONLY, **WARPS)(x, seeded(2))
    compared = 0
    for index, (x0, y0, x1, y1, flip, a, b, c, d) in enumerate(boxes.tolist()):
        if min((x1 - x0) * width, (y1 - y0) * height) > 2 * size:
            continue  # read from averages
        # px of the view -> offset from its centre in sides -> in the box -> px of the slice
        to_offset = np.array([[(-1) ** flip / size, 0, -((-1) ** flip) / 2], [0, 1 / size, -0.5], [0, 0, 1]])
        in_box = np.array([[a, b, 0.5], [c, d, 0.5], [0, 0, 1]])
        to_px = np.array(
            [[(x1 - x0) * width, 0, x0 * width], [0, (y1 - y0) * height, y0 * height], [0, 0, 1]]
        )
        matrix = (to_px @ in_box @ to_offset)[:2]
        picture = Image.fromarray(x[index, 0].numpy())
        numbers = tuple(matrix.flatten())
        expected = picture.transform((size, size), Image.Transform.AFFINE, numbers, Image.Resampling.BILINEAR)
        row, column = np.indices((size, size)).reshape(2, -1) + 0.5
        place = matrix @ np.stack([column, row, np.ones_like(row)])
        sure = ((place > 1) & (place < [[width - 1], [height - 1]])).all(0).reshape(size, size)
        beyond = ((place < -1) | (place > [[width + 1], [height + 1]])).any(0).reshape(size, size)
        found = view[index, 0].numpy()
        assert np.abs(found - np.asarray(expected))[sure].max() < 1e-3
        assert not found[beyond].any()
        compared += sure.sum()
    assert compared > 6000


def test_a_marked_pixel_is_where_its_point_is():
    """A bright pixel of each slice, carried through the map of its view."""
    marks = torch.randint(12, 52, (24, 2), generator=seeded())  # column, row
    x = torch.zeros(24, 1, 64, 64)
    x[torch.arange(24), 0, marks[:, 1], marks[:, 0]] = 1
    views = TwoViews(128, scale=(0.5, 1), flip=0.5, **GEOMETRY_ONLY, **WARPS)
    seen = 0
    for view, box in zip(views(x, seeded(3))[:2], views(x, seeded(3))[2:]):
        points = to_view((marks[:, None] + 0.5) / 64, box)
        for index in range(24):
            if inside(points[index], 0.05).all():
                row, column = divmod(int(view[index].argmax()), 128)
                apart = points[index, 0] * 128 - torch.tensor([column + 0.5, row + 0.5])
                assert apart.abs().max() < 1.5
                seen += 1
    assert seen > 30


def test_every_pixel_shows_the_place_that_its_box_says():
    images_x, images_y = coordinate_images(16, 64, 48)
    views = TwoViews(24, flip=0.5, scale=(0.1, 0.5), **GEOMETRY_ONLY, **WARPS)
    view_x, view_y = views(images_x, seeded()), views(images_y, seeded())
    for k in (0, 1):
        box = view_x[2 + k]
        assert box.shape == (16, 9) and torch.equal(box, view_y[2 + k])
        centres = cell_centres(box, (24, 24), stride=1)
        shown = torch.stack([view_x[k].flatten(1), view_y[k].flatten(1)], 2)
        sure = inside(centres, 0.03)
        assert sure.float().mean() > 0.5
        assert (shown - centres)[sure].abs().max() < 1e-4
        assert torch.allclose(
            to_view(centres, box), to_view(to_slice(to_view(centres, box), box), box), atol=1e-4
        )


def test_matched_regions_are_the_same_tissue_and_in_both_views():
    images_x, images_y = coordinate_images(64, 64, 64)
    views = TwoViews(48, flip=0.5, **GEOMETRY_ONLY, **WARPS)
    x1, x2, box1, box2 = views(images_x, seeded(1))
    y1, y2, _, _ = views(images_y, seeded(1))
    points1, points2, keep = matched_points(box1, box2, (48, 48), 1)
    assert keep.sum() > 30
    assert inside(points1)[keep].all() and inside(points2)[keep].all()
    within = inside(to_slice(points1, box1), 0.02) & keep[:, None]  # half a pixel from the border is darker
    for view1, view2 in ((x1, x2), (y1, y2)):
        assert (read(view1, points1) - read(view2, points2))[within].abs().max() < 0.02
    ignored1, ignored2, _ = matched_points(box1[:, :5], box2[:, :5], (48, 48), 1)  # by the boxes alone: wrong
    assert (read(x1, ignored1) - read(x2, ignored2))[within].abs().mean() > 0.02
    cells, same_cells, every = matched_points(box1, box2, (48, 48), 1, match="grid")
    plain, same_plain, _ = matched_points(box1[:, :5], box2[:, :5], (48, 48), 1, match="grid")
    assert torch.equal(cells, plain) and torch.equal(same_cells, same_plain) and every.all()


@pytest.mark.parametrize("stride", [1, 16])
def test_the_box_of_a_map_is_the_largest_inside(stride):
    """About the middle of its positions: of view px 0 to 39, or to 32."""
    box = TwoViews(8, scale=(0.05, 0.1), rotate=70.0, shear=0.4)(torch.zeros(40, 1, 32, 40), seeded())[2]
    inner = map_box(box, (40, 40), stride)
    last = (40 - 1) // stride * stride
    middle = to_slice(torch.full((40, 1, 2), (last / 2 + 0.5) / 40), box)[:, 0]
    assert torch.allclose((inner[:, :2] + inner[:, 2:]) / 2, middle, atol=1e-5)
    corners = torch.stack([inner[:, [i, j]] for i in (0, 2) for j in (1, 3)], 1)  # (N, 4, 2)
    pixels = to_view(corners, box) * 40 - 0.5
    assert torch.allclose((pixels - last / 2).abs().amax((1, 2)), torch.full((40,), last / 2), atol=1e-2)


def test_what_is_drawn_otherwise_stays():
    """Switching these on moves neither the boxes nor the grey values of before."""
    batch = torch.full((8, 1, 32, 32), 0.5)
    off, on = TwoViews(16, flip=0.5), TwoViews(16, flip=0.5, rotate=10, shear=0.1)
    before, after = off(batch, seeded(4)), on(batch, seeded(4))
    assert torch.equal(before[2], after[2][:, :5]) and torch.equal(before[3], after[3][:, :5])
    middle = (..., slice(6, 10), slice(6, 10))  # inside, however it is turned
    assert torch.allclose(before[0][middle], after[0][middle], atol=0.1)
    erased = TwoViews(16, flip=0.5, erase=1.0)(batch, seeded(4))
    left = erased[0] != 0
    assert torch.equal(erased[2], before[2]) and torch.equal(erased[0][left], before[0][left])


def test_ranks_share_a_batch_without_changing_it():
    batch = torch.rand(20, 1, 48, 40, generator=seeded())
    views = TwoViews(32, flip=0.5, erase=0.5, **WARPS)
    whole = views(batch, seeded(3))
    parts = [views(batch[i:j], seeded(3), offset=i, total=20) for i, j in ((0, 7), (7, 8), (8, 20))]
    for of_whole, *of_parts in zip(whole, *parts):
        assert torch.equal(of_whole, torch.cat(of_parts))


@pytest.mark.parametrize(("area", "black"), (((0.02, 0.2), 0.0), ((0.5, 0.9), -1024.0)))
def test_erasing_fills_its_value_and_share(area, black):
    batch = torch.full((400, 1, 40, 40), 700.0)
    changes = GEOMETRY_ONLY | {"value_range": (black, 3071.0)}
    view = TwoViews(64, erase=0.6, erase_area=area, **changes)(batch, seeded())[0][:, 0]
    gone = view == black
    assert (view[~gone] - 700).abs().max() < 1e-3
    erased = gone.any((1, 2))
    assert abs(erased.float().mean() - 0.6) < 0.08
    share = gone[erased].float().mean((1, 2))
    assert share.min() > area[0] - 0.02 and share.max() < area[1] + 0.03
    assert abs(share.mean() - sum(area) / 2) < 0.03
    rows, columns = gone.any(2).sum(1), gone.any(1).sum(1)
    assert torch.equal(rows * columns, gone.sum((1, 2)))  # a rectangle each
    assert gone[:, 8:-8, 8:-8].any(0).all() and gone[:, [0, -1]].any(0).any(1).all()  # and anywhere


def test_beyond_the_slice_values_that_are_not_windowed_are_black():
    batch = torch.full((20, 1, 24, 24), 500.0)
    still = {"scale": (1, 1), "ratio": (1, 1), **GEOMETRY_ONLY}
    view = TwoViews(24, **still, rotate=45.0, value_range=(-1024.0, 3071.0))(batch, seeded())[0]
    assert view.min() == -1024 and abs(view.max() - 500) < 1e-2


def test_columns_of_before_are_where_they_were():
    assert COLUMNS.index("noise_column") == len(COLUMNS) - 1 == 13


@pytest.mark.parametrize("method", ("moco", "pixpro", "vicregl"))
def test_training_on_such_views(train, method):
    changes = [f"augment.{name}={value}" for name, value in (WARPS | {"erase": 0.5}).items()]
    rows = train(method, f"method={method}", "optim.max_steps=2", *changes)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize(
    "wrong", ("rotate=200", "rotate=-1", "shear=1", "translate=1.5", "erase=2", "erase_area=[0,0.1]")
)
def test_impossible_strengths_are_one_line(wrong):
    import train_moco
    from engine.config import ConfigError, load_config

    cfg = load_config(train_moco.DEFAULTS, [], ["data.root=x", f"augment.{wrong}"], train_moco.NULLABLE)
    with pytest.raises(ConfigError, match=f"augment.{wrong.partition('=')[0]}"):
        train_moco.check_config(cfg)
