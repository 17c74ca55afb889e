"""collapse.py: DSE against loops that follow the paper's definition, and on features of known structure."""

import math

import numpy as np
import pytest
import torch

from collapse import (
    cluster_radii,
    dense_structure,
    grey_readout,
    image_share,
    kmeans,
    label_free_score,
    recent_similarity,
)


def blobs(images=16, positions=24, channels=32, kinds=6, noise=0.1, seed=0):
    """Positions that belong to a few kinds of tissue: (B, P, C) and their kinds (B, P)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(kinds, channels, generator=generator)
    kind = torch.randint(kinds, (images, positions), generator=generator)
    spread = noise * torch.randn(images, positions, channels, generator=generator)
    return centres[kind] + spread, kind


def test_kmeans_finds_separate_groups():
    features, kind = blobs(noise=0.01)
    points, truth = features.flatten(0, 1).double(), kind.flatten()
    centres, labels = kmeans(points, 6, torch.Generator().manual_seed(0))
    for label in range(6):
        own = labels == label
        assert own.any() and len(truth[own].unique()) == 1
        torch.testing.assert_close(centres[label], points[own].mean(dim=0))


def test_kmeans_of_equal_points():
    centres, labels = kmeans(torch.ones(5, 3), 2, torch.Generator().manual_seed(0))
    assert centres.equal(torch.ones(2, 3)) and labels.tolist() == [0] * 5


def test_radius_is_the_sum_of_singular_values_over_the_size():
    points = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2])
    expected = []
    for label in (0, 1):  # the third cluster is a single point
        own = points[labels == label]
        centred = own - own.mean(dim=0)
        eigenvalues = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0)
        expected.append(eigenvalues.sqrt().sum() / math.sqrt(max(len(own) - 1, 4)))
    torch.testing.assert_close(torch.stack(cluster_radii(points, labels)), torch.stack(expected))


def test_terms_equal_loops_over_positions():
    features = blobs(images=8, noise=0.5)[0].double()
    found = dense_structure(features, seed=3)
    everything = features.reshape(-1, 32)
    scale = sum(float((x - everything.mean(0)).norm()) for x in everything) / len(everything)

    generator = torch.Generator().manual_seed(3)  # k-means is a random choice: make the same one
    centres, labels = kmeans(everything, 24, generator)
    nearest = [
        min(float((x - centre).norm()) for k, centre in enumerate(centres) if k != label)
        for x, label in zip(everything, labels)
    ]
    assert found["inter"] == pytest.approx(sum(nearest) / len(nearest) / scale, rel=1e-6)
    assert found["dse"] == pytest.approx(found["inter"] - found["intra"] + found["dimension"])
    assert 1 / 8 <= found["dimension"] <= 1


def test_structured_features_score_higher_than_collapsed_ones():
    clear, blurred = (dense_structure(blobs(noise=noise)[0]) for noise in (0.05, 3.0))
    assert clear["intra"] < 0.3 < 0.5 < blurred["intra"]
    flat = blobs(noise=3.0)[0] * torch.tensor([1.0] + [1e-3] * 31)  # one direction is all there is
    assert dense_structure(flat)["dimension"] < 0.2 < blurred["dimension"]


def test_scale_and_shift_do_not_matter_but_seed_is_all_the_chance():
    features = blobs(noise=0.3)[0].double()
    one = dense_structure(features)
    assert dense_structure(features) == one
    assert dense_structure(7 * features) == pytest.approx(one, rel=1e-9)
    shifted = dense_structure(features + 1)
    assert shifted["intra"] == pytest.approx(one["intra"]) and shifted["inter"] == pytest.approx(one["inter"])


def test_image_share_is_the_variance_of_the_image_means():
    features = blobs(noise=0.3)[0].double()
    total = sum(features[..., c].var(correction=0) for c in range(32))
    between = sum(features[..., c].mean(dim=1).var(correction=0) for c in range(32))
    assert image_share(features) == pytest.approx(float(between / total))
    assert image_share(features[:, :1].expand(-1, 24, -1)) == pytest.approx(1)
    assert image_share(torch.cat([features, features.flip(1)], dim=1)[:1]) == pytest.approx(0, abs=1e-12)


def test_readout_is_the_r2_of_ridge_regression():
    """Against the solution of one stacked least-squares problem, penalty and all."""
    features, grey = (
        blobs(images=9, positions=20, channels=6, noise=0.5)[0].double(),
        torch.rand(9, 20, 4).double(),
    )
    grey += features[..., :4] ** 2
    x, y = features[:4].flatten(0, 1).numpy(), grey[:4].flatten(0, 1).numpy()
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    penalty = 0.3 * x.var(axis=0).mean() * len(x)
    stacked = np.concatenate([x - mean_x, penalty**0.5 * np.eye(6)])
    weights = np.linalg.lstsq(stacked, np.concatenate([y - mean_y, np.zeros((6, 4))]), rcond=None)[0]
    new_x, new_y = features[4:].flatten(0, 1).numpy(), grey[4:].flatten(0, 1).numpy()
    error = ((new_x - mean_x) @ weights + mean_y - new_y) ** 2
    expected = 1 - error.sum() / ((new_y - mean_y) ** 2).sum()
    assert grey_readout(features, grey, ridge=0.3) == pytest.approx(expected, rel=1e-9)


def test_what_was_forgotten_cannot_be_read():
    grey = torch.rand(8, 30, 3)
    known = torch.cat([grey @ torch.randn(3, 16), torch.randn(8, 30, 16)], dim=2)
    assert grey_readout(known, grey, ridge=1e-6) == pytest.approx(1, abs=1e-3)
    assert grey_readout(5 * known, 3 * grey + 1) == pytest.approx(grey_readout(known, grey), rel=1e-5)
    assert grey_readout(torch.randn(8, 30, 16), grey) < 0.1
    assert grey_readout(torch.ones(8, 30, 16), grey) <= 1e-6  # all positions alike
    assert grey_readout(known, torch.ones(8, 30, 3)) == 0  # nothing to read
    assert math.isnan(grey_readout(known[:1], grey[:1]))
    assert math.isnan(grey_readout(torch.full((2, 3, 4), torch.nan), torch.rand(2, 3, 1)))


def test_odd_features():
    assert image_share(torch.ones(4, 6, 3)) == 0
    constant = dense_structure(torch.ones(4, 6, 3))
    assert all(math.isfinite(value) for value in constant.values())
    assert all(math.isfinite(v) for v in dense_structure(torch.randn(2, 1, 5)).values())
    assert math.isnan(dense_structure(torch.full((2, 3, 4), torch.nan))["dse"])


def test_the_score_is_the_readout_less_a_tenth_of_the_recent_cosines():
    assert label_free_score(0.9, recent_similarity([1.0] * 5 + [0.25, 0.75] * 4)) == pytest.approx(0.85)
    for odd in (None, math.nan):  # of a step that was not finite: as metrics.jsonl has it, and as the run has
        assert label_free_score(0.9, recent_similarity([0.5] * 8 + [odd])) == pytest.approx(0.85)
    assert math.isnan(label_free_score(0.9, recent_similarity([])))
