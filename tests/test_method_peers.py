"""The losses and heads of methods.py beside lightly's, on the same tensors, in float64.

lightly is no requirement of this project: in an environment of its own,

    pip install -r requirements.txt pytest lightly
    python -m pytest -q tests/test_method_peers.py

Its definitions differ from ours in four places: it divides Barlow Twins' features by sqrt(variance + 1e-5),
has biases in the last layers of Barlow Twins and VICReg (their authors have none), gives SimCLR's projector
norms by default, and its sinkhorn does not subtract the largest score, which may overflow.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import methods
from losses import (
    barlow_twins,
    cell_centres,
    cosine_distance,
    nearest_pairs,
    nt_xent,
    positions_at,
    queue_nce,
    sinkhorn,
    swapped_prediction,
    vicreg,
)
from methods import METHODS, BarlowTwins, SwAV, VICRegL
from models import Encoder

lightly_loss = pytest.importorskip("lightly.loss", reason="lightly is not installed; see the top of the file")
heads = pytest.importorskip("lightly.models.modules.heads")
swav_loss = pytest.importorskip("lightly.loss.swav_loss")
scheduler = pytest.importorskip("lightly.utils.scheduler")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_views(*shape, seed=0):
    """Features that agree in part, with a mean and scales that are not trivial."""
    shared, scale = randn(*shape, seed=seed), 0.3 + randn(shape[-1], seed=seed + 1).square()
    return [1.5 + scale * (shared + 0.7 * randn(*shape, seed=seed + 2 + view)) for view in range(2)]


def value_and_gradients(loss, *tensors):
    leaves = [x.clone().requires_grad_() for x in tensors]
    value = loss(*leaves).squeeze()
    return value.detach(), *torch.autograd.grad(value, leaves)


def assert_same(ours, theirs, *tensors, precision=1e-12):
    """Two losses have the same value and gradients."""
    for own, other in zip(value_and_gradients(ours, *tensors), value_and_gradients(theirs, *tensors)):
        torch.testing.assert_close(own, other, rtol=precision, atol=precision * float(other.abs().max()))


# ---- Losses of vectors ----


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent(temperature):
    theirs = lightly_loss.NTXentLoss(temperature=temperature)
    assert_same(partial(nt_xent, temperature=temperature), theirs, *two_views(6, 5))


def test_queue_nce_is_nt_xent_with_a_memory_bank():
    query, key = two_views(6, 5)
    bank = lightly_loss.NTXentLoss(temperature=0.2, memory_bank_size=(50, 5))
    queue, key = F.normalize(randn(5, 50, seed=9), dim=0), F.normalize(key, dim=1)
    bank.memory_bank.bank = queue.T.clone()  # loses its oldest vectors at each call
    assert_same(lambda q: queue_nce(q, key, queue, 0.2)[0].mean(), lambda q: bank(q, key), query)


def test_cosine_distance_is_one_more_than_the_negative_cosine():
    theirs = lightly_loss.NegativeCosineSimilarity()
    assert_same(cosine_distance, lambda p, z: 1 + theirs(p, z), *two_views(6, 5))


def test_barlow_twins_but_for_epsilon():
    """Their batch normalisation has an epsilon of 1e-5, as the authors' has; ours has none, so that the
    diagonal of equal views is 1 exactly. It matters where a feature's variance is not far above it."""
    theirs = lightly_loss.BarlowTwinsLoss(lambda_param=0.0051)
    assert_same(barlow_twins, theirs, *(1e4 * z for z in two_views(8, 5)))
    close = [float(loss(*two_views(8, 5))) for loss in (barlow_twins, theirs)]
    assert close[0] == pytest.approx(close[1], rel=1e-3) and close[0] != close[1]


def test_vicreg():
    assert_same(vicreg, lightly_loss.VICRegLoss(), *two_views(8, 5))


def test_vicreg_of_several_batches():
    """Ours has the samples next to last, theirs first."""
    theirs = lightly_loss.VICRegLoss()
    z1, z2 = two_views(8, 3, 5)
    assert_same(lambda x, y: vicreg(x.transpose(0, 1), y.transpose(0, 1)), theirs, z1, z2)


# ---- SwAV ----


@pytest.mark.parametrize(("samples", "prototypes"), [(12, 4), (6, 30)])
def test_sinkhorn(samples, prototypes):
    scores = F.normalize(randn(samples, 8), dim=1) @ F.normalize(randn(prototypes, 8, seed=1), dim=1).T
    for iterations in (1, 3, 20):
        expected = swav_loss.sinkhorn(scores, iterations, 0.05)
        torch.testing.assert_close(sinkhorn(scores, 0.05, iterations), expected, rtol=1e-12, atol=1e-15)


def test_the_swapped_prediction_of_large_and_small_views():
    scores = [
        F.normalize(randn(12, 8, seed=view), dim=1) @ F.normalize(randn(20, 8, seed=9), dim=1).T
        for view in range(4)
    ]

    def ours(*views):
        codes = [sinkhorn(view.detach()) for view in views[:2]]
        pairs = [(s, code) for i, code in enumerate(codes) for v, s in enumerate(views) if v != i]
        return sum(swapped_prediction(*pair) for pair in pairs) / len(pairs)

    theirs = lightly_loss.SwaVLoss()
    assert_same(ours, lambda *views: theirs(views[:2], views[2:]), *scores)


def test_the_whole_step_of_swav():
    """With the same encoder, head and prototypes, in evaluation mode."""
    torch.manual_seed(0)
    method = SwAV(Encoder("resnet18"), dim=16, hidden=32, prototypes=20).double().eval()
    views = [randn(4, 1, 64, 64, seed=1), randn(4, 1, 64, 64, seed=2), randn(4, 1, 32, 32, seed=3)]
    scores = [F.normalize(method.query(view)[0], dim=1) @ method.prototypes.T for view in views]
    expected = lightly_loss.SwaVLoss()(scores[:2], scores[2:])
    torch.testing.assert_close(method(views)["loss"], expected.squeeze(), rtol=1e-12, atol=0)


# ---- VICRegL ----


BOXES = [
    torch.tensor([[0.1, 0.2, 0.7, 0.9, 0], [0.0, 0.0, 0.5, 0.5, 1], [0.3, 0.1, 0.95, 0.8, 0]]).double(),
    torch.tensor([[0.3, 0.25, 0.9, 1.0, 1], [0.2, 0.1, 0.8, 0.7, 0], [0.31, 0.0, 0.9, 0.9, 1]]).double(),
]


def pairs_nearest_first(distances, count):
    """`nearest_pairs` in lightly's order; the authors' code and ours have the order of positions. The
    statistics over the batch are those of the first pairs of all images, of the second ones, and so on."""
    chosen, partner = nearest_pairs(distances, count)
    order = distances.amin(dim=2).gather(1, chosen).argsort(dim=1)
    return chosen.gather(1, order), partner.gather(1, order)


def test_pairs_of_nearest_positions():
    nearest_neighbors = pytest.importorskip("lightly.models.utils").nearest_neighbors
    x1, x2 = randn(3, 12, 5), randn(3, 9, 5, seed=1)
    distances = torch.cdist(x1, x2)
    chosen, partner = pairs_nearest_first(distances, 4)
    for own, other in zip(
        (positions_at(x1, chosen), positions_at(x2, partner)), nearest_neighbors(x1, x2, distances, 4)
    ):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


@pytest.mark.parametrize("matches", [5, 20, 49])
def test_the_loss_of_vicregl(matches, monkeypatch):
    """Theirs takes the crops' grids of positions, and as many matches of either view if told so."""
    monkeypatch.setattr(methods, "nearest_pairs", pairs_nearest_first)
    torch.manual_seed(0)
    method = VICRegL(Encoder("resnet18"), dim=16, hidden=32, local_dim=24, matches=matches).double().eval()
    with torch.no_grad():  # so that the covariances count
        for last in (method.query.projector.whole[-1], method.query.projector.dense[-1]):
            last.weight.mul_(20)
    views = [randn(3, 1, 224, 224, seed=view) for view in (1, 2)]
    features = [(z, maps.permute(0, 2, 3, 1)) for (z, maps), _ in map(method.query, views)]
    grids = [cell_centres(box, (224, 224), 32).unflatten(1, (7, 7)) for box in BOXES]
    theirs = lightly_loss.VICRegLLoss(alpha=0.75, num_matches=(matches, matches))
    expected, loss = theirs(features, grids).squeeze(), method(views, BOXES)["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    trained = list(method.parameters())
    for own, other in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained)):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-9 * float(other.abs().max()))


# ---- Heads, and the momentum's way to 1 ----


def layers_of(head):
    """Its layers by kind, and whether it has a bias or an affine map, if it can have one."""
    found = []
    for module in head.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            found.append(("linear", module.weight.shape[1], module.weight.shape[0]))
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            found.append(("norm", module.num_features, module.affine))
        elif isinstance(module, nn.ReLU):
            found.append(("relu",))
    return found


def copied(ours, theirs):
    """Their head with our weights; biases that ours does not have are 0."""
    theirs = copy.deepcopy(theirs).double()
    own = [m for m in ours.modules() if isinstance(m, nn.Linear | nn.BatchNorm1d | nn.BatchNorm2d)]
    other = [m for m in theirs.modules() if isinstance(m, nn.Linear | nn.BatchNorm1d)]
    assert len(own) == len(other)
    with torch.no_grad():
        for mine, their in zip(own, other):
            for name in ("weight", "bias"):
                if getattr(their, name) is not None:
                    value = getattr(mine, name)
                    getattr(their, name).copy_(0 if value is None else value)
    return theirs


CHANNELS = 512  # of a ResNet-18
HEADS = {
    "byol": lambda: (heads.BYOLProjectionHead(CHANNELS, 64, 16), heads.BYOLPredictionHead(16, 64, 16)),
    "simsiam": lambda: (
        heads.SimSiamProjectionHead(CHANNELS, 16, 16),
        heads.SimSiamPredictionHead(16, 64, 16),
    ),
    "swav": lambda: (heads.SwaVProjectionHead(CHANNELS, 64, 16), None),
    "barlow": lambda: (heads.BarlowTwinsProjectionHead(CHANNELS, 64, 16), None),
    "vicreg": lambda: (heads.VICRegProjectionHead(CHANNELS, 64, 16), None),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    """The same layers, and with the same weights the same outputs in training mode."""
    torch.manual_seed(0)
    method = METHODS[name](Encoder("resnet18"), dim=16, hidden=64, bn_split=0).double()
    projector, predictor = HEADS[name]()
    pairs = [(method.query.projector, projector, randn(8, CHANNELS))]
    if predictor is not None:
        pairs.append((method.predictor, predictor, randn(8, 16, seed=1)))
    for ours, theirs, vectors in pairs:
        assert layers_of(ours) == layers_of(theirs)
        maps = vectors[:, :, None, None] if ours is method.query.projector else vectors
        expected = copied(ours, theirs)(vectors)
        torch.testing.assert_close(ours(maps), expected, rtol=1e-10, atol=1e-12)


def test_simclr_and_densecl_have_heads_without_norms():
    torch.manual_seed(0)
    simclr = METHODS["simclr"](Encoder("resnet18"), dim=16).query.projector
    theirs = heads.SimCLRProjectionHead(CHANNELS, CHANNELS, 16, batch_norm=False)  # with norms by default
    assert layers_of(simclr) == layers_of(theirs)
    densecl = METHODS["densecl"](Encoder("resnet18"), dim=16, hidden=64, queue_size=32).query.projector
    theirs = heads.DenseCLProjectionHead(CHANNELS, 64, 16)
    assert layers_of(densecl.whole) == layers_of(densecl.dense) == layers_of(theirs)


def test_no_biases_in_the_last_layer_of_barlow_twins():
    """As in the authors' code; lightly's has them, and there they change nothing but the mean."""
    last = BarlowTwins(Encoder("resnet18"), dim=16, hidden=64).query.projector[-1]
    assert last.bias is None


def test_the_momentum_goes_to_one_on_a_cosine():
    torch.manual_seed(0)
    method = METHODS["byol"](Encoder("resnet18"), dim=16, hidden=64, momentum=0.99)
    name = "projector.0.weight"
    for step in (0, 10, 50, 99):
        query, key = method.query.get_parameter(name), method.key.get_parameter(name)
        with torch.no_grad():
            query.fill_(1), key.fill_(0)
        method.progress = step / 100
        method.after_step(method.targets([torch.zeros(2, 1, 64, 64)] * 2))
        expected = 1 - scheduler.cosine_schedule(step, 101, 0.99, 1.0)  # theirs ends at max_steps - 1
        torch.testing.assert_close(key, torch.full_like(key, expected), rtol=1e-4, atol=1e-9)
