"""How far features have collapsed, and what they are good for, without labels.

    FeatureSample       singular values of pooled and of dense features of many slices
    dense_structure     the DSE of arXiv 2510.17299
    image_share         how much of the variance of dense features lies between images
    grey_readout        what a linear map reads off dense features
    label_free_score    the score that picks a run's best encoder

The effective rank of pooled features (RankMe, losses.effective_rank) describes whole images. Segmentation
needs features of single positions that fall into groups (dense_structure), differ within an image
(image_share), and tell a linear decoder what is there (grey_readout). Needs torch and losses.py only.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from losses import effective_rank_of, singular_values

SLICES = 2048  # measured at most; also the number of position vectors
STRUCTURED = 128  # slices at most whose dense structure is estimated
POSITIONS = 64  # per slice, for that
STRUCTURE = ("dse", "inter", "intra", "dimension", "image_share")  # what is said of it, see dense_structure

GROUP = 8  # images whose positions are clustered together
CLUSTERS = 24  # per group
IMAGE_CLUSTERS = 3  # per image
RECENT = 8  # log lines over which the cosine of keys is averaged


class FeatureSample:
    """What is measured of the features of many slices: one mean vector of each, and vectors of positions.

    Args:
        slices: how many there will be, over all calls of `add`.
        generator: draws the positions, the same number in each slice.
        vectors: number of position vectors.
    """

    def __init__(self, slices: int, generator: torch.Generator, vectors: int = SLICES):
        self.positions, self.generator, self.vectors = -(-vectors // slices), generator, vectors
        self.pooled, self.dense = [], []

    def add(self, maps: Tensor) -> None:
        """Maps (n, C, h, w) of the next slices."""
        places = maps.shape[2:].numel()
        chosen = torch.randint(places, (len(maps), self.positions), generator=self.generator)
        columns = chosen[:, None].expand(-1, maps.shape[1], -1).to(maps.device)
        dense = maps.flatten(2).gather(2, columns)  # (n, C, positions)
        self.pooled.append(maps.mean(dim=(2, 3)).float())
        self.dense.append(dense.mT.flatten(0, 1).float())

    def spectra(self) -> tuple[Tensor, Tensor]:
        """Singular values of the pooled and of the dense features, see losses.singular_values."""
        return singular_values(torch.cat(self.pooled)), singular_values(torch.cat(self.dense)[: self.vectors])


def some_positions(maps: Tensor, generator: torch.Generator) -> Tensor:
    """64 positions of maps (n, C, h, w), the same in all of them, or all if there are fewer: (n, P, C). There
    may be no map: n = 0."""
    chosen = torch.randperm(maps.shape[2:].numel(), generator=generator)[:POSITIONS]
    return maps.flatten(2)[:, :, chosen].mT.float()


@torch.no_grad()
def dense_structure(features: Tensor, seed: int = 0) -> dict[str, float]:
    """Dense representation Structure Estimator: "dse" = "inter" - "intra" + "dimension"; and "image_share".

    Follows the authors' own code: distances are in units of the features' mean distance to their common
    mean, so the measure does not change with the scale of the features.

    inter: mean distance of a vector to the nearest centre of a cluster that is not its own, the positions
        of 8 images being clustered into 24.
    intra: radius of those clusters, and of 3 clusters within each image, the mean of both. The radius of n
        vectors is the sum of the singular values of their centred matrix over sqrt(max(n - 1, C)).
    dimension: effective rank (not centred) of one random position of every image, over min(B, C); the mean
        over as many draws as there are positions.

    One change: k-means++ draws its first centres by squared distances, as published, and reproducibly.

    Args:
        features: (B, P, C), P positions of B images; at least 2 images.
    """
    features = features.double().cpu()
    if not features.isfinite().all():
        return dict.fromkeys(STRUCTURE, float("nan"))
    images, positions, channels = features.shape
    generator = torch.Generator().manual_seed(seed)
    everything = features.flatten(0, 1)
    scale = (everything - everything.mean(dim=0)).norm(dim=1).mean().clamp(min=1e-12)

    inter, group_radii = [], []
    for group in features.split(GROUP):
        points = group.flatten(0, 1)
        centres, labels = kmeans(points, min(CLUSTERS, len(points)), generator)
        distances = torch.cdist(points, centres)
        distances[torch.arange(len(points)), labels] = torch.inf
        inter.append(distances.amin(dim=1).mean())
        group_radii += cluster_radii(points, labels)
    image_radii = []
    for image in features:
        _, labels = kmeans(image, min(IMAGE_CLUSTERS, positions), generator)
        image_radii += [torch.stack(radii).mean()] if (radii := cluster_radii(image, labels)) else []

    order = torch.rand(images, positions, generator=generator).argsort(dim=1)
    shuffled = features.gather(1, order[..., None].expand_as(features)).transpose(0, 1)  # (P, B, C)
    ranks = [effective_rank_of(values) for values in torch.linalg.svdvals(shuffled)]
    terms = {
        "inter": float(torch.stack(inter).mean() / scale),
        "intra": float((mean_or_one(group_radii) + mean_or_one(image_radii)) / 2 / scale),
        "dimension": sum(ranks) / len(ranks) / min(images, channels),
        "image_share": image_share(features),
    }
    return {"dse": terms["inter"] - terms["intra"] + terms["dimension"], **terms}


@torch.no_grad()
def image_share(features: Tensor) -> float:
    """Share of the variance of dense features (B, P, C) that lies between images.

    0 if all images have the same mean (and for constants); 1 if the positions of an image do not differ, in
    which case nothing can be segmented.
    """
    features = features.double()
    centred = features - features.mean(dim=(0, 1))
    between = features.mean(dim=1) - features.mean(dim=(0, 1))
    total = centred.square().sum(dim=2).mean()
    return float(between.square().sum(dim=1).mean() / total) if total > 0 else 0.0


@torch.no_grad()
def grey_readout(features: Tensor, grey: Tensor, ridge: float = 0.01) -> float:
    """How well a linear map reads the slice off its dense features: a linear probe that needs no labels.

    Ridge regression from the features of a position to the grey values around it, fitted to the first half of
    the images and judged by the second: the share of the values' variance that it explains (R^2, at most 1,
    negative if it is worse than their mean). A trunk that has forgotten what is where, as one that gives all
    images the same key has, cannot tell. It does not change with the scale of features or values.

    Args:
        features: (B, P, C), P positions of B images.
        grey: (B, P, V), V values around each of them.
        ridge: penalty, in units of the mean variance of a feature.
    """
    features, grey = features.double().cpu(), grey.double().cpu()
    half = len(features) // 2
    if not half or not features.isfinite().all():
        return float("nan")
    x, y = features[:half].flatten(0, 1), grey[:half].flatten(0, 1)
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x_mean, y - y_mean
    covariance = x.mT @ x / len(x)
    covariance.diagonal().add_((ridge * covariance.diagonal().mean()).clamp(min=1e-12))
    weights = torch.linalg.solve(covariance, x.mT @ y / len(x))
    truth = grey[half:].flatten(0, 1) - y_mean
    error = truth - (features[half:].flatten(0, 1) - x_mean) @ weights
    total = truth.square().sum()
    return float(1 - error.square().sum() / total) if total > 0 else 0.0


def recent_similarity(logged: Iterable[float | None]) -> float:
    """Mean of the last 8 logged cosines of keys ("similarity" of moco.MoCo), those of steps that were not
    finite (None in metrics.jsonl) left out; not a number if there are none."""
    recent = [value for value in logged if value is not None and math.isfinite(value)][-RECENT:]
    return sum(recent) / len(recent) if recent else math.nan


def label_free_score(readout: float, similarity: float) -> float:
    """How good a pretrained encoder is for segmentation, as far as can be told without labels.

    It can fail in two ways: forget what is where, which grey_readout shows, or give all images the same key,
    which recent_similarity shows (of projections if there are no keys; 0 if the loss compares no cosines).
    The score is the readout less a tenth of that (docs/ABLATION.md: any weight from 0.02 to 0.5 orders
    encoders nearly alike).
    """
    return readout - 0.1 * similarity


def kmeans(points: Tensor, count: int, generator: torch.Generator, iterations: int = 20):
    """Centres (K, C) and labels (N,) of points (N, C): Lloyd's algorithm from k-means++ centres."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = (points - points[chosen[0]]).square().sum(dim=1)
    for _ in range(count - 1):
        weights = nearest if nearest.sum() > 0 else torch.ones_like(nearest)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(dim=1))
    centres = points[chosen]
    for _ in range(iterations):
        labels = torch.cdist(points, centres).argmin(dim=1)
        member = torch.nn.functional.one_hot(labels, count).to(points.dtype)  # (N, K)
        sizes = member.sum(dim=0)[:, None]
        moved = torch.where(sizes > 0, member.T @ points / sizes.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres, torch.cdist(points, centres).argmin(dim=1)


def cluster_radii(points: Tensor, labels: Tensor) -> list[Tensor]:
    """The radius of every cluster of two points and more."""
    clusters = [points[labels == label] for label in labels.unique()]
    return [
        torch.linalg.svdvals(own - own.mean(dim=0)).sum() / max(len(own) - 1, own.shape[1]) ** 0.5
        for own in clusters
        if len(own) > 1
    ]


def mean_or_one(values: list[Tensor]) -> Tensor:
    """As the authors' code, 1 (0 would be the best value) if there is no cluster to measure."""
    return torch.stack(values).mean() if values else torch.ones((), dtype=torch.float64)
