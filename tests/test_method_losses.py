"""The losses of MoCo's peers, in losses.py and in their classes, against slow, obvious loops in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from every_method import small, training_batches
from torch import nn

from losses import (
    barlow_twins,
    cell_centres,
    cosine_distance,
    cosines,
    nearest_pairs,
    nt_xent,
    patch_reconstruction,
    pixel_agreement,
    positions_at,
    propagate,
    sinkhorn,
    swapped_prediction,
    vicreg,
    vicreg_terms,
)
from methods import centre_distances
from moco import GlobalHead


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def deviation(values, correction):
    """Standard deviation of a list of numbers."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - correction))


# ---- One vector per image ----


@pytest.mark.parametrize("n", [1, 2, 5])
def test_nt_xent_equals_a_double_loop(n):
    z1, z2 = 3 * randn(n, 7), randn(n, 7, seed=1)
    z, losses = [*z1, *z2], []
    for i in range(2 * n):
        positive = (i + n) % (2 * n)
        others = sum(math.exp(cosine(z[i], z[k]) / 0.3) for k in range(2 * n) if k != i)
        losses.append(-math.log(math.exp(cosine(z[i], z[positive]) / 0.3) / others))
    assert float(nt_xent(z1, z2, 0.3)) == pytest.approx(sum(losses) / len(losses), rel=1e-12, abs=1e-12)


def test_nt_xent_of_constant_features_is_the_logarithm_of_their_number():
    z = torch.ones(4, 6, dtype=torch.float64, requires_grad=True)
    loss = nt_xent(z, z)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(7)) and z.grad.isfinite().all()


def test_cosine_distance_equals_a_loop():
    prediction, target = 2 * randn(5, 7), randn(5, 7, seed=1)
    expected = sum(1 - cosine(prediction[i], target[i]) for i in range(5)) / 5
    assert float(cosine_distance(prediction, target)) == pytest.approx(expected, rel=1e-12)
    units = F.normalize(prediction, dim=1) - F.normalize(target, dim=1)
    assert units.square().sum(dim=1).mean().item() == pytest.approx(2 * expected, rel=1e-12)  # BYOL's
    assert float(cosine_distance(prediction, 5 * prediction)) == pytest.approx(0, abs=1e-12)


def test_cosines_are_those_of_all_pairs():
    x, units = 3 * randn(2, 4, 6), F.normalize(randn(2, 5, 6, seed=1), dim=2)
    found = cosines(x, units)
    pairs = [(n, p, q) for n in range(2) for p in range(4) for q in range(5)]
    assert all(float(found[n, p, q]) == pytest.approx(cosine(x[n, p], units[n, q])) for n, p, q in pairs)


def slow_sinkhorn(scores, epsilon, iterations):
    """Algorithm 1 of the paper's appendix: prototypes in rows, sums of a row 1 / K and of a column 1 / N."""
    n, k = scores.shape
    q = [[math.exp(float(scores[i, j]) / epsilon) for i in range(n)] for j in range(k)]
    total = sum(map(sum, q))
    q = [[v / total for v in row] for row in q]
    for _ in range(iterations):
        q = [[v / sum(row) / k for v in row] for row in q]
        sums = [sum(q[j][i] for j in range(k)) for i in range(n)]
        q = [[q[j][i] / sums[i] / n for i in range(n)] for j in range(k)]
    return torch.tensor([[q[j][i] * n for j in range(k)] for i in range(n)], dtype=torch.float64)


@pytest.mark.parametrize(("n", "k", "iterations"), [(6, 4, 3), (2, 5, 3), (1, 3, 3), (6, 4, 1)])
def test_sinkhorn_equals_the_published_algorithm(n, k, iterations):
    scores = randn(n, k).tanh()
    codes = sinkhorn(scores, 0.05, iterations)
    torch.testing.assert_close(codes, slow_sinkhorn(scores, 0.05, iterations), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(n, dtype=torch.float64))


def test_sinkhorn_uses_all_prototypes_alike():
    codes = sinkhorn(randn(12, 4).tanh(), 0.5, 200)
    torch.testing.assert_close(codes.sum(dim=0), torch.full((4,), 3.0, dtype=torch.float64))


def test_sinkhorn_of_extreme_scores_is_finite():
    """Cosines of -1 and 1 in float32, prototypes that no sample is near; and constant ones."""
    scores = torch.full((5, 3), -1.0)
    scores[:, 0] = 1.0
    for codes in (sinkhorn(scores, 0.005), sinkhorn(torch.zeros(4, 3))):
        assert codes.isfinite().all()
        torch.testing.assert_close(codes.sum(dim=1), torch.ones(len(codes)))
    torch.testing.assert_close(sinkhorn(torch.zeros(4, 3)), torch.full((4, 3), 1 / 3))


def test_sinkhorn_gives_no_gradient():
    scores = randn(4, 3).requires_grad_()
    assert not sinkhorn(scores).requires_grad


def test_swapped_prediction_equals_a_double_loop():
    scores, codes = randn(5, 4), F.softmax(randn(5, 4, seed=1), dim=1)
    losses = []
    for i in range(5):
        total = sum(math.exp(float(scores[i, j]) / 0.2) for j in range(4))
        losses.append(
            -sum(float(codes[i, j]) * math.log(math.exp(float(scores[i, j]) / 0.2) / total) for j in range(4))
        )
    assert float(swapped_prediction(scores, codes, 0.2)) == pytest.approx(sum(losses) / 5, rel=1e-12)


def slow_barlow_twins(z1, z2, weight):
    (n, d), loss = z1.shape, 0.0
    columns = [[z[:, i].tolist() for i in range(d)] for z in (z1, z2)]
    for i in range(d):
        for j in range(d):
            a, b = columns[0][i], columns[1][j]
            mean_a, mean_b = sum(a) / n, sum(b) / n
            covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b)) / n
            c = covariance / (deviation(a, 0) * deviation(b, 0))
            loss += (1 - c) ** 2 if i == j else weight * c**2
    return loss


@pytest.mark.parametrize("n", [2, 6])
def test_barlow_twins_equals_a_double_loop(n):
    z1, z2 = 3 * randn(n, 4) + 5, randn(n, 4, seed=1) - 2
    assert float(barlow_twins(z1, z2, 0.01)) == pytest.approx(slow_barlow_twins(z1, z2, 0.01), rel=1e-9)
    assert float(barlow_twins(z1, 7 * z1 + 3, 0)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("value", [0.1, 0.3, 1.7, -4.0])
def test_barlow_twins_of_a_constant_feature_counts_it_as_uncorrelated(value):
    """Also where its mean is not exactly its value, in float32."""
    for n in (2, 6, 96, 256):
        z = 10 * randn(n, 3, dtype=torch.float32)
        z[:, 1] = value
        z.requires_grad_()
        loss = barlow_twins(z, z.detach().clone(), 0.0)
        loss.backward()
        assert loss.item() == pytest.approx(1, abs=1e-4) and z.grad.abs().max() < 10


def slow_vicreg(z1, z2):
    """The three terms, one number after the other."""
    n, d = z1.shape
    invariance = sum((float(z1[i, k]) - float(z2[i, k])) ** 2 for i in range(n) for k in range(d)) / (n * d)
    variance = covariance = 0.0
    for z in (z1, z2):
        columns = [z[:, k].tolist() for k in range(d)]
        for a in columns:
            variance += max(0.0, 1 - math.sqrt(deviation(a, 1) ** 2 + 1e-4)) / d / 2
        for j, a in enumerate(columns):
            for k, b in enumerate(columns):
                mean_a, mean_b = sum(a) / n, sum(b) / n
                c = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b)) / (n - 1)
                covariance += c**2 / d if j != k else 0.0
    return invariance, variance, covariance


@pytest.mark.parametrize("n", [2, 6])
def test_vicreg_equals_a_double_loop(n):
    z1, z2 = 0.7 * randn(n, 4) + 5, 1.2 * randn(n, 4, seed=1)
    expected = slow_vicreg(z1, z2)
    assert [float(term) for term in vicreg_terms(z1, z2)] == pytest.approx(list(expected), rel=1e-9)
    loss = 25 * expected[0] + 25 * expected[1] + expected[2]
    assert float(vicreg(z1, z2)) == pytest.approx(loss, rel=1e-9)
    assert float(vicreg(z1, z2, 2, 3, 4)) == pytest.approx(
        2 * expected[0] + 3 * expected[1] + 4 * expected[2], rel=1e-9
    )


def test_vicreg_of_several_batches_is_their_mean():
    z1, z2 = 0.7 * randn(3, 2, 5, 4), randn(3, 2, 5, 4, seed=1)
    one_by_one = [float(vicreg(z1[i, j], z2[i, j])) for i in range(3) for j in range(2)]
    assert float(vicreg(z1, z2)) == pytest.approx(sum(one_by_one) / 6, rel=1e-12)


def test_vicreg_of_constant_features_has_a_finite_gradient():
    z = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    loss = vicreg(z, z)
    loss.backward()
    assert loss.item() == pytest.approx(25 * 0.99) and z.grad.isfinite().all()


# ---- Positions of maps ----


def test_nearest_pairs_equals_a_loop():
    distances = randn(3, 6, 5).abs()
    chosen, partner = nearest_pairs(distances, 4)
    for n in range(3):
        pairs = []
        for p in range(6):
            q = min(range(5), key=lambda q: float(distances[n, p, q]))
            pairs.append((float(distances[n, p, q]), p, q))
        expected = sorted((p, q) for _, p, q in sorted(pairs)[:4])  # in the order of positions
        assert list(zip(chosen[n].tolist(), partner[n].tolist())) == expected
    assert nearest_pairs(distances, 20)[0].shape == (3, 6)  # not more than there are


def test_positions_at_takes_vectors():
    x, indices = randn(2, 5, 3), torch.tensor([[4, 0], [1, 1]])
    taken = positions_at(x, indices)
    assert all(torch.equal(taken[n, k], x[n, indices[n, k]]) for n in range(2) for k in range(2))


def test_pixel_agreement_equals_a_loop_over_positive_pairs():
    y, x = randn(3, 4, 6), randn(3, 5, 6, seed=1)
    positive = randn(3, 4, 5, seed=2) > 0.5
    positive[1] = False  # an image without positive pairs counts 0
    expected = 0.0
    for n in range(3):
        pairs = [(p, q) for p in range(4) for q in range(5) if positive[n, p, q]]
        if pairs:
            expected += sum(1 - cosine(y[n, p], x[n, q]) for p, q in pairs) / len(pairs) / 3
    y.requires_grad_()
    loss = pixel_agreement(y, x, positive)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert not y.grad[1].any() and y.grad[0].any()


def test_pixel_agreement_without_any_positive_pair_is_0():
    y = randn(2, 4, 6).requires_grad_()
    loss = pixel_agreement(y, randn(2, 4, 6, seed=1), torch.zeros(2, 4, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and not y.grad.any()


def test_pixpro_propagates_over_similar_pixels():
    """Equations 2 and 3, pixel by pixel."""
    model = small("pixpro").double()
    maps = randn(2, 8, 2, 3)
    propagated = model.propagate(maps)  # (2, 6, 8)
    weight, bias = model.transform.weight[:, :, 0, 0], model.transform.bias
    for n in range(2):
        pixels = maps[n].flatten(1).T  # (6, 8)
        for i in range(6):
            expected = sum(
                max(cosine(pixels[i], x), 0) ** 2 * F.normalize(weight @ x + bias, dim=0) for x in pixels
            )
            torch.testing.assert_close(propagated[n, i], expected)


def test_pixpro_propagates_in_float32_under_autocast():
    """Sums over positions: of the same numbers as without it."""
    pixels, transformed = (randn(2, 49, 8, seed=seed).bfloat16() for seed in (0, 1))
    expected = propagate(pixels.double(), transformed.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = propagate(pixels, transformed)
    torch.testing.assert_close(found, expected.float())


@pytest.mark.parametrize("turned", [False, True])
def test_distances_in_the_slice_are_float32_under_autocast(turned):
    """Which pixels are near each other, and which positions are matched, does not depend on it."""
    (_, _, *boxes) = next(training_batches(1, 12))
    matrix = torch.tensor([[0.9, 0.3, -0.2, 1.1]]).expand(12, 4)
    boxes = [torch.cat([box.float(), matrix], dim=1) if turned else box.float() for box in boxes]
    model = small("pixpro")
    expected = centre_distances(boxes, (224, 224), 32), model.near(boxes, (224, 224))
    with torch.autocast("cpu", torch.bfloat16):
        found = centre_distances(boxes, (224, 224), 32), model.near(boxes, (224, 224))
    assert all(map(torch.equal, found, expected)) and found[0].dtype == torch.float32


class Maps(nn.Module):
    """An encoder whose maps are its input."""

    output_stride = 1

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x, layers):
        return {"layer4": x}


def test_vicregl_equals_a_loop_over_pairs_of_positions():
    """Positions of given maps, matched by place and by features, VICReg of each rank of pairs over images."""
    model = small("vicregl", bn_split=0).double()
    model.query.encoder, model.query.projector = Maps(), IdentityHeads()
    views = [0.6 * randn(4, 5, 2, 3), 0.6 * randn(4, 5, 2, 3, seed=1)]
    _, _, *boxes = next(training_batches(1, 4))
    terms = model(views, boxes)
    x1, x2 = (view.flatten(2).mT for view in views)  # (4, 6, 5)
    centres = [cell_centres(box, (2, 3), 1) for box in boxes]
    for name, (a, b) in {"by_place": centres, "by_feature": (x1, x2)}.items():
        directions = []
        for own, other, own_x, other_x in ((a, b, x1, x2), (b, a, x2, x1)):
            of_images = []
            for n in range(4):
                pairs = []
                for p in range(6):
                    distances = [math.dist(own[n, p].tolist(), other[n, q].tolist()) for q in range(6)]
                    q = min(range(6), key=distances.__getitem__)
                    pairs.append((distances[q], p, q))
                nearest = sorted((p, q) for _, p, q in sorted(pairs)[:3])
                of_images.append([(own_x[n, p], other_x[n, q]) for p, q in nearest])
            losses = []
            for rank in range(3):
                z1, z2 = (torch.stack([pairs[rank][side] for pairs in of_images]) for side in (0, 1))
                invariance, variance, covariance = slow_vicreg(z1, z2)
                losses.append(25 * invariance + 25 * variance + covariance / 2)
            directions.append(sum(losses) / 3)
        assert terms[name].item() == pytest.approx(sum(directions) / 2, rel=1e-9), name
    whole = vicreg(x1.mean(1), x2.mean(1), covariance=0.5).item()
    expected = 0.75 * whole + 0.25 * (terms["by_place"] + terms["by_feature"]).item()
    assert terms["global"].item() == pytest.approx(expected, rel=1e-12)


class IdentityHeads(nn.Module):
    """Mean vector and map, as they are, and the map of features."""

    def forward(self, maps):
        return maps.mean(dim=(2, 3)), maps, maps


def test_densecl_equals_a_loop_over_positions():
    """Partner by the features' similarity; negatives from the second queue; the mean of both contrasts."""
    model = small("densecl", bn_split=0, temperature=0.3).double()
    for branch in (model.query, model.key):
        branch.encoder, branch.projector = Maps(), IdentityHeads()
    model.queue, model.dense_queue = (F.normalize(randn(8, 20, seed=s), dim=0) for s in (5, 6))
    query, key = randn(3, 8, 2, 3), randn(3, 8, 2, 3, seed=1)
    queues = [model.queue.clone(), model.dense_queue.clone()]
    targets = model.targets([query, key])
    terms = model([query, key], targets=targets)
    whole, dense = [], []
    for n in range(3):
        q, k = query[n].flatten(1).T, key[n].flatten(1).T  # (6, 8)
        whole.append(nce(q.mean(0), k.mean(0), queues[0]))
        for i in range(6):
            partner = max(range(6), key=lambda j: cosine(q[i], k[j]))
            dense.append(nce(q[i], k[partner], queues[1]))
    assert terms["whole"].item() == pytest.approx(sum(whole) / 3, rel=1e-9)
    assert terms["dense"].item() == pytest.approx(sum(dense) / 18, rel=1e-9)
    assert terms["loss"].item() == pytest.approx((sum(whole) / 3 + sum(dense) / 18) / 2, rel=1e-9)
    model.after_step(targets)
    assert (model.queue_pointer, model.dense_queue_pointer) == (3, 3)
    entered = F.normalize(key.flatten(2).mean(2), dim=1).T
    torch.testing.assert_close(model.dense_queue[:, :3], entered)
    torch.testing.assert_close(model.queue[:, :3], entered)
    assert torch.equal(model.dense_queue[:, 3:], queues[1][:, 3:])


@pytest.mark.parametrize("name", ["swav", "densecl"])
def test_cosines_that_decide_are_float32_under_autocast(name):
    """Codes and partners: bfloat16 has three digits, and positions of an image differ in the fourth."""
    model = small(name, bn_split=0)
    branches = [model.query, model.key] if name == "densecl" else [model.query]
    for branch in branches:
        branch.encoder = Maps()
        branch.projector = IdentityHeads() if name == "densecl" else GlobalHead()
    views = [1 + 0.02 * randn(6, 8, 4, 4, seed=seed, dtype=torch.float32) for seed in range(3)]
    targets = model.targets(views)
    expected = model(views, targets=targets)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        found = model(views, targets=targets)["loss"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def nce(query, key, queue):
    scores = [cosine(query, key) / 0.3] + [cosine(query, queue[:, j]) / 0.3 for j in range(queue.shape[1])]
    return -scores[0] + math.log(sum(math.exp(s) for s in scores))


# ---- Reconstruction ----


def test_patch_reconstruction_equals_a_loop_over_masked_cells():
    """Every cell normalised by its own mean and (unbiased) variance, all its channels together."""
    prediction, image = randn(2, 2, 6, 8), 3 * randn(2, 2, 6, 8, seed=1) + 4
    masked = torch.tensor([[[1, 0], [0, 1], [1, 1]], [[0, 0], [1, 0], [0, 0]]], dtype=torch.bool)
    errors = []
    for n in range(2):
        for row in range(3):
            for column in range(2):
                if masked[n, row, column]:
                    place = slice(2 * row, 2 * row + 2), slice(4 * column, 4 * column + 4)
                    values = image[n][:, *place].flatten().tolist()
                    mean, sigma = sum(values) / 16, math.sqrt(deviation(values, 1) ** 2 + 1e-6)
                    pairs = zip(prediction[n][:, *place].flatten().tolist(), values)
                    errors.append(sum((p - (v - mean) / sigma) ** 2 for p, v in pairs) / 16)
    loss = patch_reconstruction(prediction, image, masked).item()
    assert loss == pytest.approx(sum(errors) / len(errors), rel=1e-12)


def test_patch_reconstruction_of_air_is_finite():
    """A cell of constant values is 0 wherever it is."""
    prediction = randn(1, 1, 4, 4).requires_grad_()
    loss = patch_reconstruction(prediction, torch.full((1, 1, 4, 4), -3.2).double(), torch.ones(1, 1, 1) > 0)
    loss.backward()
    assert loss.item() == pytest.approx(prediction.square().mean().item(), rel=1e-6)
    assert prediction.grad.isfinite().all()


def test_what_lies_in_visible_cells_does_not_count():
    masked = torch.tensor([[[True, False]]])
    prediction, image = randn(1, 1, 4, 8), randn(1, 1, 4, 8, seed=1)
    loss = patch_reconstruction(prediction, image, masked)
    prediction[..., 4:], image[..., 4:] = 7.0, torch.nan
    assert patch_reconstruction(prediction, image, masked) == loss


# ---- All of them ----


@pytest.mark.parametrize(
    "loss", [nt_xent, cosine_distance, swapped_prediction, barlow_twins, vicreg, sinkhorn]
)
def test_losses_compute_in_float32_under_autocast(loss):
    """As they do without it of the same numbers."""
    tensors = [randn(6, 8).bfloat16()] + (
        [randn(6, 8, seed=1).softmax(1).bfloat16()] * (loss is not sinkhorn)
    )
    expected = loss(*(x.float() for x in tensors))
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(*tensors)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    assert loss(*(x.double() for x in tensors)).dtype == torch.float64


@pytest.mark.parametrize("loss", [nt_xent, cosine_distance, swapped_prediction, barlow_twins, vicreg])
def test_gradients_of_losses_are_those_of_finite_differences(loss):
    other = randn(3, 4, seed=1).softmax(1)
    assert torch.autograd.gradcheck(lambda x: loss(x, other), 0.5 * randn(3, 4).requires_grad_())
