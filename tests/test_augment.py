"""The augmentations: boxes recovered from images of coordinates, independence of ranks, strengths of 0."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv

from augment import (
    Photometric,
    SegmentationAugment,
    TwoViews,
    autocontrast,
    blur_or_sharpen,
    blur_weights,
    crop,
    equalize,
    pooling,
    read_lines,
)
from losses import matched_points

GEOMETRY_ONLY = {"brightness": 0, "contrast": 0, "gamma": 0, "blur": 0, "noise": 0}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def coordinate_images(count, height, width):
    """Two batches (N, 1, H, W): x and y of each pixel's centre, in [0, 1] of the image (pixel edges)."""
    x = (torch.arange(width) + 0.5) / width
    y = (torch.arange(height) + 0.5) / height
    return x.expand(count, 1, height, width).contiguous(), y[:, None].expand(
        count, 1, height, width
    ).contiguous()


def expected_coordinates(boxes, size):
    """What a view of a coordinate image shows, pixel by pixel in a plain loop: x and y (N, size, size)."""
    x, y = torch.zeros(len(boxes), size, size), torch.zeros(len(boxes), size, size)
    for n, (x0, y0, x1, y1, flip) in enumerate(boxes.tolist()):
        for i in range(size):
            for j in range(size):
                column = size - 1 - j if flip else j
                x[n, i, j] = x0 + (x1 - x0) * (column + 0.5) / size
                y[n, i, j] = y0 + (y1 - y0) * (i + 0.5) / size
    return x, y


@pytest.mark.parametrize("shape", [(64, 64), (37, 90), (151, 133)])
def test_boxes_say_what_was_cropped(shape):
    """The last shape is read from averaged levels of odd sides, too. The extrapolated border is left out."""
    size = 16
    images_x, images_y = coordinate_images(24, *shape)
    views = TwoViews(size, flip=0.5, scale=(0.005, 1.0), **GEOMETRY_ONLY)
    view_x = views(images_x, seeded())
    view_y = views(images_y, seeded())
    assert {0.0, 1.0} == set(view_x[2][:, 4].tolist())
    used = pooling(view_x[2], shape, (size, size))
    if shape == (151, 133):
        assert {1.0, 2.0, 4.0} == set(used.tolist())
    for k in (0, 1):
        boxes = view_x[2 + k]
        assert torch.equal(boxes, view_y[2 + k])
        x, y = expected_coordinates(boxes, size)
        border = 6 / min(shape) if used.max() > 1 else 0.5 / min(shape)
        inside = (x > border) & (x < 1 - border) & (y > border) & (y < 1 - border)
        assert inside.any()
        assert (view_x[k].squeeze(1) - x)[inside].abs().max() < 1e-5
        assert (view_y[k].squeeze(1) - y)[inside].abs().max() < 1e-5


def test_matched_points_of_two_views_show_the_same_place():
    images_x, images_y = coordinate_images(16, 64, 64)
    views = TwoViews(48, flip=0.5, **GEOMETRY_ONLY)
    x1, x2, box1, box2 = views(images_x, seeded(1))
    y1, y2, _, _ = views(images_y, seeded(1))
    points1, points2, keep = matched_points(box1, box2, (48, 48), stride=1)

    def read(view, points):
        grid = points[:, None] * 2 - 1
        return torch.nn.functional.grid_sample(view, grid, align_corners=False, padding_mode="border")[
            :, 0, 0
        ]

    assert keep.sum() > 8
    for view1, view2 in ((x1, x2), (y1, y2)):
        assert (read(view1, points1) - read(view2, points2))[keep].abs().max() < 0.02


def test_box_statistics():
    """Area and aspect ratio cover the ranges that were asked for, positions the whole slice."""
    batch = torch.zeros(2000, 1, 20, 40)
    views = TwoViews(2, scale=(0.2, 0.3), ratio=(0.5, 2.0), **GEOMETRY_ONLY)
    _, _, box, other = views(batch, seeded())
    w, h = (box[:, 2] - box[:, 0]) * 40, (box[:, 3] - box[:, 1]) * 20
    uncut = h < 19.999
    area, ratio = (w * h / 800)[uncut], (w / h)[uncut]
    assert area.min() >= 0.2 - 1e-5 and area.max() <= 0.3 + 1e-5 and abs(area.mean() - 0.25) < 0.01
    assert ratio.min() >= 0.5 - 1e-4 and ratio.max() <= 2 + 1e-4 and ratio.log().mean().abs() < 0.1
    assert box[:, :4].min() >= 0 and box[:, :4].max() <= 1 + 1e-6
    assert box[:, 0].min() < 0.02 and box[:, 2].max() > 0.98
    assert not torch.equal(box, other)


@pytest.mark.parametrize("size", [32, 31])
def test_ranks_share_a_batch_without_changing_it(size):
    """Rows of a global batch give bitwise the same views wherever they are computed; of an odd size but for
    the last bit of the power in the last pixels of a piece, which are not worked on together."""

    def same(a, b):
        return torch.equal(a, b) if size % 8 == 0 else torch.allclose(a, b, rtol=0, atol=1e-6)

    batch = torch.rand(20, 1, 48, 40, generator=seeded())
    views = TwoViews(size, flip=0.5, autocontrast=0.5, equalize=0.5)
    whole = views(batch, seeded(3))
    parts = [views(batch[i:j], seeded(3), offset=i, total=20) for i, j in ((0, 7), (7, 8), (8, 20))]
    for of_whole, *of_parts in zip(whole, *parts):
        assert same(of_whole, torch.cat(of_parts))
    masks = torch.randint(0, 5, (20, 48, 40), generator=seeded())
    augment = SegmentationAugment(size, flip=0.5)
    whole = augment(batch, masks, seeded(4))
    parts = [augment(batch[i:j], masks[i:j], seeded(4), i, 20) for i, j in ((0, 13), (13, 20))]
    for of_whole, *of_parts in zip(whole, *parts):
        assert same(of_whole, torch.cat(of_parts))


def test_seed_decides_and_images_differ():
    batch = torch.rand(1, 1, 32, 32, generator=seeded()).expand(4, 1, 32, 32)
    views = TwoViews(24)
    first, again, other = views(batch, seeded(5)), views(batch, seeded(5)), views(batch, seeded(6))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], other[0])
    assert all(not torch.equal(first[0][i], first[0][j]) for i in range(4) for j in range(i))
    assert not torch.equal(first[0], first[1])


def test_strengths_of_zero_change_nothing():
    """Not even values outside [0, 1] are clamped, and one change does not move the numbers of another."""
    batch = torch.randn(4, 1, 24, 24, generator=seeded()) * 3
    still = TwoViews(24, scale=(1, 1), ratio=(1, 1), **GEOMETRY_ONLY)
    view1, view2, box1, _ = still(batch, seeded())
    assert torch.allclose(view1, batch, atol=1e-5) and torch.allclose(view2, batch, atol=1e-5)
    assert box1.tolist() == [[0, 0, 1, 1, 0]] * 4
    box_of_all = TwoViews(24)(batch, seeded())[2]
    box_of_none = TwoViews(24, **GEOMETRY_ONLY)(batch, seeded())[2]
    assert torch.equal(box_of_all, box_of_none)


def test_changed_values_stay_in_the_window():
    batch = torch.rand(8, 1, 24, 24, generator=seeded())
    strong = TwoViews(24, brightness=0.8, contrast=0.8, gamma=1, blur=2, noise=0.5)
    for view in strong(batch, seeded())[:2]:
        assert view.min() >= 0 and view.max() <= 1 and view.std() > 0
    stored = batch * 4000  # without a window: the same changes in units of the value range
    scaled = TwoViews(24, value_range=(0, 4000))(stored, seeded())
    plain = TwoViews(24)(batch, seeded())
    assert torch.allclose(scaled[0] / 4000, plain[0], atol=1e-5)


def rows(**columns):
    """A table with 0.5 (no change) everywhere but in the given columns."""
    from augment import COLUMNS

    table = torch.full((1, len(COLUMNS)), 0.5)
    for name, value in columns.items():
        table[:, COLUMNS.index(name)] = value
    return table


def test_photometric_changes_by_hand():
    x = torch.linspace(0.3, 0.6, 64).view(1, 1, 8, 8)
    cases = [
        (Photometric(brightness=0.2), {"brightness": 1.0}, x + 0.2),
        (Photometric(brightness=0.2), {"brightness": 0.0}, x - 0.2),
        (Photometric(contrast=0.4), {"contrast": 1.0}, (x - 0.5) * 1.4 + 0.5),
        (Photometric(gamma=0.3), {"gamma": 0.0}, x ** math.exp(-0.3)),
        (Photometric(gamma=0.3), {}, x),
    ]
    for photometric, columns, expected in cases:
        assert torch.allclose(photometric(x.clone(), rows(**columns), None), expected, atol=1e-6)


def test_blur_and_sharpening_against_torchvision():
    def changed(x, *amounts):
        weights = blur_weights(torch.tensor(amounts), 1.0)
        return blur_or_sharpen(x.clone(), [weight.view(-1, 1, 1, 1) for weight in weights])

    x = torch.rand(2, 1, 20, 24, generator=seeded())
    for amount, sigma in ((0.9, 0.9), (0.4, 0.4)):
        expected = tv.gaussian_blur(x, [5, 5], [sigma, sigma])
        blurred = changed(x, amount, amount)
        assert torch.allclose(blurred[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-5)
    sharpened = changed(x, -0.7, -0.7)
    expected = x + 0.7 * (x - tv.gaussian_blur(x, [5, 5], [1.0, 1.0]))
    assert torch.allclose(sharpened[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-5)
    unchanged = changed(x, 1e-4, -1e-6)
    assert torch.allclose(unchanged, x, atol=1e-4)


def test_noise_has_the_drawn_sigma_and_differs_between_images():
    x = torch.full((64, 1, 32, 32), 0.5)
    noisy = TwoViews(32, **(GEOMETRY_ONLY | {"noise": 0.05}))(x, seeded())[0] - 0.5
    sigmas = noisy.flatten(1).std(1)
    assert sigmas.max() < 0.055 and sigmas.min() < 0.01 and abs(sigmas.mean() - 0.025) < 0.006
    correlation = torch.corrcoef(noisy[sigmas > 0.01].flatten(1))
    correlation.fill_diagonal_(0)
    assert (
        correlation.abs() > 0.2
    ).float().mean() < 0.01  # a few of 64 images share their corner of the field


def test_autocontrast_and_equalize():
    """Autocontrast against torchvision's on float images; equalize against ranks counted one by one."""
    x = torch.rand(3, 1, 12, 10, generator=seeded()) * 0.4 + 0.2
    assert torch.allclose(autocontrast(x), tv.autocontrast(x), atol=1e-5)
    constant = torch.full((1, 1, 4, 4), 0.3)
    assert torch.equal(autocontrast(constant), constant) and torch.equal(equalize(constant), constant)
    level = (x[0] * 255).round().flatten()
    darkest = (level == level.min()).sum()
    expected = [((level <= v).sum() - darkest) / (len(level) - darkest) for v in level]
    assert torch.allclose(equalize(x)[0].flatten(), torch.stack(expected), atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 2, 40, 56), (2, 1, 31, 17), (4, 1, 1, 1), (1, 3, 2, 90)])
def test_rows_and_columns_read_one_after_the_other_are_what_grid_sample_reads(shape):
    """Also beyond the slice's outer pixel centres, and to the rounding of its double-precision result."""
    batch = torch.rand(shape, generator=seeded())
    x = torch.rand(shape[0], 24, generator=seeded(1)) * 2.4 - 1.2
    y = torch.rand(shape[0], 33, generator=seeded(2)) * 2.4 - 1.2
    grid = torch.stack([x[:, None].expand(-1, 33, -1), y[:, :, None].expand(-1, -1, 24)], 3).double()
    expected = F.grid_sample(batch.double(), grid, padding_mode="border", align_corners=False)
    assert torch.allclose(read_lines(batch, x, y).double(), expected, atol=1e-5)


def test_shrinking_crops_are_averaged_first():
    """A checkerboard of single pixels becomes grey, not stripes; a mask is never averaged."""
    board = ((torch.arange(64)[:, None] + torch.arange(64)) % 2).float().expand(2, 1, 64, 64).contiguous()
    whole = torch.tensor([[0.0, 0, 1, 1, 0], [0, 0, 0.4, 0.4, 0]])
    assert pooling(whole, (64, 64), (16, 16)).tolist() == [4, 1]
    view = crop(board, whole, (16, 16))
    assert torch.allclose(view[0], torch.full((1, 16, 16), 0.5))
    assert view[1].std() > 0.1
    assert set(crop(board, whole, (16, 16), mode="nearest")[0].unique().tolist()) <= {0.0, 1.0}


def test_segmentation_crop_keeps_image_and_mask_together():
    """The image is its mask's label / 10 on blocks of 8 px: away from block borders both say the same."""
    labels = torch.randint(0, 10, (16, 8, 8), generator=seeded())
    masks = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    images = masks[:, None].float() / 10
    augment = SegmentationAugment(
        (40, 56), scale=(0.5, 2.0), flip=0.5, brightness=0, contrast=0, gamma=0, noise=0
    )
    image, mask = augment(images, masks, seeded(2))
    assert image.shape == (16, 1, 40, 56) and mask.shape == (16, 40, 56) and mask.dtype == torch.int64
    outside = mask == 255
    assert outside.any() and (~outside).any()
    inside = ~outside & (image[:, 0] > 0)
    same = (image[:, 0] * 10 - mask).abs() < 1e-3
    assert same[inside].float().mean() > 0.6
    deep_outside = torch.nn.functional.max_pool2d((~outside).float()[:, None], 3, 1, 1)[:, 0] == 0
    assert image[:, 0][deep_outside].abs().max() == 0
    assert set(mask.unique().tolist()) <= {*range(10), 255}


def test_segmentation_augment_at_its_mildest_is_the_identity():
    images = torch.rand(2, 1, 24, 30, generator=seeded())
    masks = torch.randint(0, 256, (2, 24, 30), generator=seeded(), dtype=torch.uint8)
    augment = SegmentationAugment((24, 30), scale=(1, 1), brightness=0, contrast=0, gamma=0, noise=0)
    image, mask = augment(images, masks, seeded())
    assert torch.allclose(image, images, atol=1e-5) and torch.equal(mask, masks.long())
    x = coordinate_images(2, 24, 30)[0]
    flipped, _ = SegmentationAugment((24, 30), (1, 1), 1.0, 0, 0, 0, 0)(x, masks, seeded())
    assert torch.allclose(flipped, x.flip(3), atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_same_without_being_waited_for():
    batch = torch.rand(32, 1, 96, 96, generator=seeded())
    masks = torch.randint(0, 14, (32, 96, 96), generator=seeded())
    views = TwoViews(40, flip=0.5, autocontrast=0.3, equalize=0.3)
    augment = SegmentationAugment(64)
    on_gpu, masks_on_gpu = batch.cuda(), masks.cuda()
    views(on_gpu, seeded())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there = [*views(on_gpu, seeded()), *augment(on_gpu, masks_on_gpu, seeded())]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    here = [*views(batch, seeded()), *augment(batch, masks, seeded())]
    for a, b in zip(there, here):
        assert ((a.cpu() - b).abs() > 1e-3).float().mean() < 1e-3
