"""losses.py against double loops, closed forms and finite differences."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from losses import (
    IterNorm,
    ZCAWhitening,
    cell_centres,
    dice_loss,
    effective_rank,
    info_nce,
    inverse_sqrt,
    local_info_nce,
    matched_points,
    queue_nce,
    sample_regions,
    segmentation_loss,
    singular_values,
)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- Contrastive losses ----


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def test_info_nce_equals_a_double_loop():
    query, key, queue = randn(5, 7), randn(5, 7, seed=1), randn(7, 11, seed=2)
    losses = []
    for i in range(5):
        scores = [cosine(query[i], key[i]) / 0.3] + [cosine(query[i], queue[:, j]) / 0.3 for j in range(11)]
        losses.append(-scores[0] + math.log(sum(math.exp(s) for s in scores)))
    assert float(info_nce(query, key, queue, 0.3)) == pytest.approx(sum(losses) / 5, rel=1e-12)


def test_info_nce_does_not_depend_on_scale():
    query, key, queue = randn(4, 6), randn(4, 6, seed=1), randn(6, 9, seed=2)
    torch.testing.assert_close(info_nce(query, key, queue), info_nce(3 * query, key / 7, 100 * queue))


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_the_loss_against_a_queue_of_unit_vectors_is_info_nce(dtype, precision):
    """Value and gradient, also if the queue moves on before the backward pass."""
    query = [(5 * randn(6, 16, dtype=dtype)).requires_grad_() for _ in range(2)]
    key = F.normalize(randn(6, 16, seed=1, dtype=dtype), dim=1)
    queue = F.normalize(randn(16, 500, seed=2, dtype=dtype), dim=0)
    expected = info_nce(query[0], key, queue, 0.07)
    expected.backward()
    losses, nearest = queue_nce(query[1], key, queue, 0.07)
    queue[:, :100] = 7
    losses.mean().backward()
    torch.testing.assert_close(losses.mean(), expected, rtol=precision, atol=0)
    torch.testing.assert_close(query[1].grad, query[0].grad, rtol=0, atol=precision)
    assert not nearest.any()  # by chance, one of 501
    assert queue_nce(key, key, F.normalize(randn(16, 500, dtype=dtype), dim=0))[1].all()


@pytest.mark.parametrize("keep", [None, [True, False, True, False], [False] * 4])
def test_local_info_nce_equals_a_loop_over_images_and_regions(keep):
    query, key = randn(4, 5, 6), randn(4, 5, 6, seed=1)
    kept = [n for n in range(4) if keep is None or keep[n]]
    expected = 0.0
    for n in kept:
        for r in range(5):
            scores = [cosine(query[n, r], key[n, s]) / 0.2 for s in range(5)]
            expected += (-scores[r] + math.log(sum(math.exp(s) for s in scores))) / (5 * len(kept))
    query.requires_grad_()
    loss = local_info_nce(query, key, 0.2, None if keep is None else torch.tensor(keep))
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    touched = query.grad.abs().amax(dim=(1, 2)) > 0
    assert touched.tolist() == [n in kept for n in range(4)]


def test_local_negatives_may_come_from_all_images():
    query, key = randn(2, 3, 6), randn(2, 3, 6, seed=1)
    everyone = torch.cat([randn(1, 3, 6, seed=2), key])
    expected = 0.0
    for n in range(2):
        for r in range(3):
            scores = [cosine(query[n, r], other) / 0.2 for image in everyone for other in image]
            positive = cosine(query[n, r], key[n, r]) / 0.2
            expected += (-positive + math.log(sum(math.exp(s) for s in scores))) / 6
    assert local_info_nce(query, key, everyone=everyone).item() == pytest.approx(expected, rel=1e-12)
    alone = [local_info_nce(query[n : n + 1], key[n : n + 1], everyone=key[n : n + 1]) for n in range(2)]
    torch.testing.assert_close(sum(alone) / 2, local_info_nce(query, key))


def test_losses_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        query, key, queue = (x.bfloat16() for x in (randn(4, 8), randn(4, 8), randn(8, 16)))
        assert info_nce(query, key, queue).dtype == torch.float32
        assert local_info_nce(query[None], key[None]).dtype == torch.float32


# ---- Matched regions ----


def crop(box, size):
    """A slow crop (1, 2, size, size): pixels show the x and y, in [0, 1] of the slice, that they lie at."""
    x0, y0, x1, y1, flip = box.tolist()
    view = torch.empty(1, 2, size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            u = (j + 0.5) / size
            u = 1 - u if flip else u
            view[0, 0, i, j] = x0 + u * (x1 - x0)
            view[0, 1, i, j] = y0 + (i + 0.5) / size * (y1 - y0)
    return view


@pytest.mark.parametrize("flips", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_overlap_points_show_the_same_place_in_both_views(flips):
    query_box = torch.tensor([[0.1, 0.2, 0.7, 0.9, flips[0]]], dtype=torch.float64)
    key_box = torch.tensor([[0.3, 0.0, 0.95, 0.6, flips[1]]], dtype=torch.float64)
    query_points, key_points, keep = matched_points(query_box, key_box, (32, 32), 1, grid=3)
    query = sample_regions(crop(query_box[0], 32), query_points, (32, 32), 1)  # (1, 9, 2)
    key = sample_regions(crop(key_box[0], 32), key_points, (32, 32), 1)
    left, right = 0.3 + 0.65 / 64, 0.7 - 0.6 / 64  # half a pixel from the crops' borders
    top, bottom = 0.2 + 0.7 / 64, 0.6 - 0.6 / 64
    cells = [(i + 0.5) / 3 for i in range(3)]
    expected = [(left + x * (right - left), top + y * (bottom - top)) for y in cells for x in cells]
    assert keep.tolist() == [True]
    torch.testing.assert_close(query[0], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(key, query)


def test_grid_points_are_the_same_cell_mirrored_under_a_flip():
    boxes = torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
    boxes[:, 4] = 0
    flipped = boxes.clone()
    flipped[1, 4] = 1
    query, key, keep = matched_points(boxes, flipped, (4096, 4096), 1, grid=2, match="grid")
    assert keep.all()
    torch.testing.assert_close(query[0], key[0])
    torch.testing.assert_close(key[1, :, 0], 1 - query[1, :, 0])
    torch.testing.assert_close(
        query[0], torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]), rtol=0, atol=1e-4
    )


def test_images_with_too_little_overlap_are_left_out():
    query = torch.tensor([[0.0, 0.0, 0.5, 0.5, 0.0]]).expand(4, 5)
    key = torch.tensor(
        [
            [0.40, 0.0, 0.90, 0.5, 0.0],  # 0.10 of 0.5: 20 % of the side
            [0.45, 0.0, 0.95, 0.5, 0.0],  # 10 %
            [0.60, 0.6, 1.00, 1.0, 0.0],  # apart
            [0.42, 0.0, 1.00, 0.5, 0.0],  # 16 % of the query's side, but 14 % of the key's
        ]
    )
    query_points, key_points, keep = matched_points(query, key, (512, 512), 1, min_overlap=0.15)
    assert keep.tolist() == [True, False, False, False]
    assert query_points.isfinite().all() and key_points.isfinite().all()


def test_a_grid_finer_than_the_map_is_legal():
    box = torch.tensor([[0.0, 0, 1, 1, 0]])
    points, _, _ = matched_points(box, box, (32, 32), 16, grid=5)
    assert sample_regions(torch.rand(1, 3, 2, 2), points, (32, 32), 16).shape == (1, 25, 3)


def turned_boxes(n=6):
    """(n, 9): crops that were turned, sheared and some of them mirrored."""
    low, side = 0.5 * torch.rand(n, 2), 0.3 + 0.2 * torch.rand(n, 2)
    matrix = torch.tensor([1.0, 0.2, -0.3, 0.9]) + 0.1 * torch.rand(n, 4)
    return torch.cat([low, low + side, (torch.arange(n) % 2)[:, None], matrix], dim=1)


@pytest.mark.parametrize("columns", [5, 9])
def test_places_are_float32_under_autocast(columns):
    """In bfloat16 a place is wrong by up to 1/512 of the view: by half a pixel of a view of 224 px."""
    torch.manual_seed(0)
    boxes = [turned_boxes()[:, :columns] for _ in range(2)]
    maps = torch.randn(6, 8, 7, 7).bfloat16()

    def computed():
        *points, keep = matched_points(*boxes, (224, 224), 32)
        samples = [sample_regions(maps, of_view, (224, 224), 32) for of_view in points]
        return [*points, keep, *samples, cell_centres(boxes[0], (224, 224), 32)]

    with torch.autocast("cpu", torch.bfloat16):
        found = computed()
    for one, expected in zip(found, computed(), strict=True):
        assert one.dtype == expected.dtype != torch.bfloat16
        assert torch.equal(one, expected)
    torch.testing.assert_close(found[3], sample_regions(maps.double(), found[0], (224, 224), 32).float())


# ---- Whitening ----


def symmetric(eigenvalues, seed=0):
    """A symmetric matrix with these eigenvalues."""
    n = len(eigenvalues)
    basis, _ = torch.linalg.qr(randn(n, n, seed=seed))
    return basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


def test_inverse_sqrt_squares_back_to_the_inverse():
    cov = torch.stack([symmetric([0.5, 1.0, 3.0]), symmetric([2.0, 2.0, 2.0]), symmetric([0.0, 0.0, 1.0])])
    root = inverse_sqrt(cov, 0.01)
    regular = cov + 0.01 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(root @ root @ regular, torch.eye(3, dtype=torch.float64).expand(3, 3, 3))


@pytest.mark.parametrize("eigenvalues", [[0.3, 1.0, 2.0, 5.0], [1.0, 1.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]])
def test_inverse_sqrt_gradient_equals_finite_differences(eigenvalues):
    cov = symmetric(eigenvalues).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: inverse_sqrt(s, 1e-2), (cov,), eps=1e-6, atol=1e-6)


def test_whitening_gradient_equals_finite_differences_for_rank_deficient_input():
    x = torch.cat([randn(3, 6), randn(3, 6)]).requires_grad_()  # six samples, rank 2 after centring
    layer = ZCAWhitening(6, group_size=0, eps=0.1).double()
    weight = randn(6, 6, seed=5)
    assert torch.autograd.gradcheck(lambda x: (layer(x) * weight).sum(), (x,), eps=1e-6, atol=1e-6)


def test_inverse_sqrt_passes_on_non_finite_matrices_only():
    cov = torch.eye(3).repeat(2, 1, 1)
    cov[0, 1, 1] = torch.nan
    root = inverse_sqrt(cov, 0.0)
    assert root[0].isnan().all()
    torch.testing.assert_close(root[1], torch.eye(3))


def grouped_covariance(y, groups):
    y = y.transpose(0, 1).flatten(1).reshape(groups, -1, y.numel() // y.shape[1]).double()
    y = y - y.mean(dim=2, keepdim=True)
    return y @ y.mT / y.shape[2]


def test_zca_output_covariance_is_the_documented_one():
    x = randn(50, 12, 3, 3)
    x[:, 6:] = x[:, :6] @ torch.ones(3, 3, dtype=torch.float64) * 1e-3 + x[:, 6:7]  # the second group: rank 2
    cov = grouped_covariance(x, 2)
    y = ZCAWhitening(12, group_size=6, eps=1e-3, affine=False).double()(x)
    identity = torch.eye(6, dtype=torch.float64)
    expected = cov @ torch.linalg.inv(cov + 1e-3 * identity)
    torch.testing.assert_close(grouped_covariance(y, 2), expected, atol=1e-8, rtol=0)
    torch.testing.assert_close(grouped_covariance(y, 2)[0], identity, atol=2e-3, rtol=0)
    torch.testing.assert_close(
        y.mean(dim=(0, 2, 3)), torch.zeros(12, dtype=torch.float64), atol=1e-10, rtol=0
    )


def test_zca_of_single_channels_is_batchnorm():
    x = randn(8, 4, 5, 5, dtype=torch.float32) * 3 + 2
    ours, theirs = ZCAWhitening(4, group_size=1, eps=1e-5), torch.nn.BatchNorm2d(4, eps=1e-5)
    torch.testing.assert_close(ours(x), theirs(x))
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("layer", [ZCAWhitening, IterNorm])
@pytest.mark.parametrize(
    "make",
    [
        lambda: randn(4, 16, dtype=torch.float32),  # fewer samples than channels
        lambda: torch.ones(8, 16, 2, 2),  # constant channels
        lambda: torch.eye(16),  # repeated eigenvalues
        lambda: 1e4 + randn(64, 16, dtype=torch.float32),  # a mean much larger than the spread
    ],
)
def test_whitening_is_finite_in_degenerate_cases(layer, make):
    x = make().requires_grad_()
    y = layer(16, group_size=8)(x)
    (y * randn(*y.shape, seed=3, dtype=torch.float32)).sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("layer", [ZCAWhitening, IterNorm])
def test_whitening_computes_in_float32_under_autocast(layer):
    x = randn(64, 8, 2, 2, dtype=torch.float32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(8, group_size=4)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(8, group_size=4)(x.float()), atol=0.02, rtol=0.01)


@pytest.mark.parametrize("layer", [ZCAWhitening, IterNorm])
def test_non_finite_input_gives_non_finite_output(layer):
    x = randn(8, 4, dtype=torch.float32)
    x[3, 1] = torch.inf
    assert not layer(4)(x).isfinite().all()


def test_running_statistics_converge_to_the_batch_ones():
    x = randn(200, 8, dtype=torch.float32) @ randn(8, 8, seed=1, dtype=torch.float32)
    for layer in (ZCAWhitening(8, 4), IterNorm(8, 4)):
        for _ in range(200):
            trained = layer(x)
        torch.testing.assert_close(layer.eval()(x), trained, atol=0.02, rtol=0.01)


def test_iternorm_equals_its_paper_step_by_step():
    x = randn(40, 6)
    centred = x - x.mean(dim=0)
    sigma = centred.T @ centred / 40 + 1e-5 * torch.eye(6, dtype=torch.float64)
    p = torch.eye(6, dtype=torch.float64)
    for _ in range(5):
        p = 0.5 * (3 * p - torch.linalg.matrix_power(p, 3) @ (sigma / sigma.trace()))
    expected = centred @ (p / sigma.trace().sqrt())
    layer = IterNorm(6, group_size=0).double()
    torch.testing.assert_close(layer(x), expected)
    many = IterNorm(6, group_size=0, iterations=40).double()
    zca = ZCAWhitening(6, group_size=0, eps=1e-5).double()
    torch.testing.assert_close(many(x), zca(x))


def test_layouts_and_channel_groups_agree():
    x = randn(16, 8, 3, 3, dtype=torch.float32)
    layer = ZCAWhitening(8, group_size=4)
    contiguous = layer(x)
    channels_last = layer(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(contiguous, channels_last)
    torch.testing.assert_close(contiguous[:, :4], ZCAWhitening(4)(x[:, :4]), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="groups of 3"):
        ZCAWhitening(8, group_size=3)


# ---- Collapse, segmentation loss ----


def test_effective_rank_of_known_spectra():
    orthogonal, _ = torch.linalg.qr(randn(50, 8) - randn(50, 8).mean(dim=0))
    centred = orthogonal - orthogonal.mean(dim=0)
    centred, _ = torch.linalg.qr(centred)
    assert effective_rank(centred) == pytest.approx(8, rel=1e-6)
    assert effective_rank(torch.ones(20, 5) * 0.1) == 0
    line = torch.arange(10.0)[:, None] * torch.tensor([[1.0, 2.0, 3.0]]) + 100
    assert effective_rank(line) == pytest.approx(1, abs=1e-5)
    spectrum = torch.tensor([3.0, 1.0], dtype=torch.float64)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(centred[:, :2] * spectrum) == pytest.approx(math.exp(entropy), rel=1e-6)
    torch.testing.assert_close(singular_values(centred[:, :2] * spectrum), spectrum)
    assert math.isnan(effective_rank(torch.full((4, 3), torch.nan)))


def test_segmentation_loss_ignores_255():
    logits = randn(2, 3, 4, 4)
    target = torch.randint(3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    target[0] = 255
    expected = F.cross_entropy(logits[1:].float(), target[1:])
    torch.testing.assert_close(segmentation_loss(logits, target), expected)
    assert segmentation_loss(logits, torch.full_like(target, 255)) == 0


def some_masks(num_classes, *shape):
    """Class indices, with every class."""
    masks = torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(1))
    masks.flatten()[:num_classes] = torch.arange(num_classes)
    return masks


def test_dice_loss_equals_a_loop_over_classes_and_pixels():
    logits, target = randn(2, 5, 3, 4), some_masks(4, 2, 3, 4)  # class 4 is not there
    target[0, 2], target[1, 0, 0] = 255, 255
    p = logits.softmax(dim=1)
    losses = []
    for label in (1, 2, 3):
        both = total = pixels = 0.0
        for n, y, x in np.ndindex(*target.shape):
            if target[n, y, x] != 255:
                total += p[n, label, y, x].item()
                if target[n, y, x] == label:
                    both, pixels = both + p[n, label, y, x].item(), pixels + 1
        losses.append(1 - 2 * both / (total + pixels))
    assert dice_loss(logits, target).item() == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert dice_loss(logits, target.to(torch.uint8)) == dice_loss(logits, target)


def test_dice_loss_is_0_of_the_truth_1_of_the_opposite_and_0_where_there_is_nothing_to_find():
    target = some_masks(3, 2, 4, 4)
    truth = 1000 * F.one_hot(target, 3).movedim(-1, 1).float()
    assert dice_loss(truth, target) == 0
    assert dice_loss(truth.roll(1, dims=1), target) == 1
    logits = randn(2, 3, 4, 4).float().requires_grad_()
    for nothing in (torch.zeros_like(target), torch.full_like(target, 255)):
        loss = dice_loss(logits, nothing)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss == 0 and gradient.count_nonzero() == 0


def test_dice_loss_gradient_is_that_of_the_definition_and_leaves_ignored_pixels_alone():
    logits, target = randn(1, 3, 2, 3).float().requires_grad_(), some_masks(3, 1, 2, 3)
    target[0, 1, 2] = 255
    (gradient,) = torch.autograd.grad(dice_loss(logits, target), logits)
    assert gradient[0, :, 1, 2].count_nonzero() == 0
    for index in np.ndindex(*logits.shape):
        moved = torch.zeros_like(logits)
        moved[index] = 0.01
        slope = (dice_loss(logits + moved, target) - dice_loss(logits - moved, target)) / 0.02
        assert gradient[index].item() == pytest.approx(slope.item(), abs=1e-4)


def test_dice_loss_of_bfloat16_logits_is_computed_in_float32():
    logits, target = randn(2, 3, 64, 64).bfloat16(), some_masks(3, 2, 64, 64)
    loss = dice_loss(logits, target)
    assert loss.dtype == torch.float32 and loss == dice_loss(logits.float(), target)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3, 14, 16, 16)])
def test_dice_and_cross_entropy_equal_monai(shape):
    losses = pytest.importorskip("monai.losses", reason="pip install monai to compare with it")
    logits, target = randn(*shape).float(), some_masks(shape[1], shape[0], *shape[2:])
    how = {"to_onehot_y": True, "softmax": True, "include_background": False, "batch": True}
    expected = losses.DiceCELoss(**how, smooth_nr=0, smooth_dr=0)(logits, target[:, None])
    torch.testing.assert_close(segmentation_loss(logits, target) + dice_loss(logits, target), expected)
