"""MoCo and its peers under the same setting: one class per method, in the order a reader learns them.

    SimCLR, BYOL, SimSiam, SwAV, BarlowTwins, VICReg     compare one vector per image
    VICRegL, DenseCL, PixPro                                     also compare positions of feature maps
    SparK                                                        reconstructs what is masked (spark.py)

All have the face of `moco.Method` and its two additions: whitening before the heads, and the local loss
between matched regions. Heads are by default as wide as the encoder's features (`hidden` None).
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses import (
    at_least_float32,
    barlow_twins,
    cell_centres,
    cosine_distance,
    cosines,
    gather,
    nearest_pairs,
    nt_xent,
    own_rows,
    pixel_agreement,
    positions_at,
    propagate,
    queue_nce,
    sinkhorn,
    swapped_prediction,
    vicreg,
    vicreg_terms,
)
from moco import GlobalHead, Method, MoCo, Targets, follow, mean_cosine, mlp, push, row_ranges
from models import Encoder, SplitBatchNorm1d, SplitBatchNorm2d, split_batch_norms
from spark import SparK


def normed_mlp(
    *widths: int, last_norm: bool = False, dense: bool = False, bias: bool = True
) -> list[nn.Module]:
    """Linear layers from one width to the next with BatchNorm and ReLU between them; `last_norm`: a BatchNorm
    without affine map at the end, too; `dense`: the same for every position of a map (N, C, h, w)."""
    layers = []
    for inputs, outputs in zip(widths, widths[1:]):
        last = len(layers) == 3 * (len(widths) - 2)
        with_bias = bias and last and not last_norm  # before a BatchNorm it would change nothing
        shape = (inputs, outputs, 1) if dense else (inputs, outputs)
        layers.append((nn.Conv2d if dense else nn.Linear)(*shape, bias=with_bias))
        if not last or last_norm:
            norm = SplitBatchNorm2d if dense else SplitBatchNorm1d
            layers.append(norm(outputs, affine=not last))
        if not last:
            layers.append(nn.ReLU(inplace=True))
    return layers


# ---- Contrast with a queue, contrast within the batch --------------------------------------------


class SimCLR(Method):
    """SimCLR (arXiv 2002.05709): NT-Xent over the global batch, equation 1; projector of section 2.1."""

    whole_batch = True

    def __init__(self, encoder: Encoder, dim: int = 128, temperature: float = 0.1, **common):
        channels = encoder.channels["layer4"]
        super().__init__(encoder, GlobalHead(*mlp(channels, channels, dim)), **common)
        self.temperature = temperature

    def losses(self, views, boxes, targets) -> dict[str, Tensor]:
        z1, z2, local = self.both_views(views, targets)  # (n, D) each
        return self.terms(nt_xent(gather(z1), gather(z2), self.temperature), local, z1)


# ---- No negatives: a predictor, or codes ---------------------------------------------------------


class WithMomentumEncoder(Method):
    """A method whose two views are both compared with those of a momentum encoder, `key`, whose momentum goes
    from its value to 1 on a cosine (BYOL, section 3.2)."""

    def __init__(self, encoder: Encoder, projector: nn.Module, momentum: float, **common):
        super().__init__(encoder, projector, **common)
        self.momentum = momentum
        self.key = copy.deepcopy(self.query).requires_grad_(False)

    @torch.no_grad()
    def targets(self, views, boxes=None, parts=1) -> Targets:
        """Of each view "z1" and "z2", the momentum encoder's projections, and regions."""
        targets = super().targets(views, boxes)
        for number, points in enumerate((targets.query_points, targets.key_points)):
            pieces = [
                self.key(views[number][rows], points if points is None else points[rows])
                for rows in row_ranges(len(views[0]), parts)
            ]
            z, regions = zip(*pieces)
            targets[f"z{number + 1}"] = at_least_float32(torch.cat(z))
            targets[f"regions{number + 1}"] = None if self.local is None else torch.cat(regions)
            targets[f"all_regions{number + 1}"] = self.regions_of_batch(targets[f"regions{number + 1}"])
        return targets

    def query_views(self, views, targets) -> tuple[Tensor, Tensor, Tensor]:
        """The trained branch's projections of both views, and their local loss with each other's keys."""
        z1, regions1 = self.query(views[0], targets.query_points)
        z2, regions2 = self.query(views[1], targets.key_points)
        weight = targets.local_weight
        local = self.local_loss(regions1, targets.regions2, weight, targets.all_regions2)
        return z1, z2, (local + self.local_loss(regions2, targets.regions1, weight, targets.all_regions1)) / 2

    def after_step(self, targets, ok=None) -> None:
        super().after_step(targets, ok)
        if self.training:
            momentum = 1 - (1 - self.momentum) * (math.cos(math.pi * self.progress) + 1) / 2
            follow(self.key, self.query, momentum, ok)


class BYOL(WithMomentumEncoder):
    """BYOL (arXiv 2006.07733): predict the momentum encoder's projection of the other view, equation 2, from
    both. Theirs: heads of 4096, and a momentum of 0.99 for 300 epochs, 0.996 for 1000."""

    def __init__(
        self, encoder: Encoder, dim: int = 256, hidden: int | None = None, momentum: float = 0.99, **common
    ):
        channels = encoder.channels["layer4"]
        hidden = hidden or channels
        head = GlobalHead(*normed_mlp(channels, hidden, dim))
        super().__init__(encoder, head, momentum, **common)
        self.predictor = nn.Sequential(*normed_mlp(dim, hidden, dim))
        split_batch_norms(self.predictor, self.bn_split)

    def losses(self, views, boxes, targets) -> dict[str, Tensor]:
        z1, z2, local = self.query_views(views, targets)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        own = 2 * (cosine_distance(p1, targets.z2) + cosine_distance(p2, targets.z1))
        return self.terms(own, local, targets.z1)


class SimSiam(Method):
    """SimSiam (arXiv 2011.10566): BYOL without a momentum encoder, equation 2 (plus 1, so that 0 is the
    best); the targets are the other view's projections without gradient. The predictor's rate stays.
    By default projections are as long as the encoder's features, and the predictor's inside a quarter."""

    at_constant_rate = ("predictor",)

    def __init__(self, encoder: Encoder, dim: int | None = None, hidden: int | None = None, **common):
        dim = dim or encoder.channels["layer4"]
        hidden = hidden or dim // 4
        widths = (encoder.channels["layer4"], dim, dim, dim)
        super().__init__(encoder, GlobalHead(*normed_mlp(*widths, last_norm=True)), **common)
        self.predictor = nn.Sequential(*normed_mlp(dim, hidden, dim))
        split_batch_norms(self.predictor, self.bn_split)

    def losses(self, views, boxes, targets) -> dict[str, Tensor]:
        z1, z2, local = self.both_views(views, targets)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        own = (cosine_distance(p1, z2.detach()) + cosine_distance(p2, z1.detach())) / 2
        return self.terms(own, local, z1)


class SwAV(Method):
    """SwAV (arXiv 2006.09882): predict the code of one view, its Sinkhorn assignment to prototypes, from the
    other views, equation 1. Views after the first two are small crops, which are never the source of a code.
    The prototypes rest during the first hundredth of the run. Theirs: 3000 of them, for ImageNet."""

    whole_batch = True
    small_crops = True
    epsilon, iterations = 0.05, 3  # of Sinkhorn
    resting = 0.01  # of the run

    def __init__(
        self,
        encoder: Encoder,
        dim: int = 128,
        hidden: int | None = None,
        prototypes: int = 300,
        temperature: float = 0.1,
        **common,
    ):
        channels = encoder.channels["layer4"]
        super().__init__(encoder, GlobalHead(*normed_mlp(channels, hidden or channels, dim)), **common)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(prototypes, dim), dim=1))
        self.temperature = temperature

    def losses(self, views, boxes, targets) -> dict[str, Tensor]:
        z1, z2, local = self.both_views(views, targets)
        projections = [z1, z2, *(self.query(view)[0] for view in views[2:])]  # (n, D) each
        held = self.prototypes.detach()  # (K, D)
        moving = float(self.progress >= self.resting)  # else they get no gradient
        prototypes = held + moving * (self.prototypes - held)
        scores = [cosines(z, prototypes) for z in projections]  # (n, K) each
        own = own_rows(len(z1))
        codes = [sinkhorn(gather(s.detach()), self.epsilon, self.iterations)[own] for s in scores[:2]]
        swapped = [
            swapped_prediction(score, code, self.temperature)
            for source, code in enumerate(codes)
            for view, score in enumerate(scores)
            if view != source
        ]
        return self.terms(sum(swapped) / len(swapped), local, z1)

    @torch.no_grad()
    def after_step(self, targets, ok=None) -> None:
        """Prototypes are unit vectors."""
        super().after_step(targets, ok)
        units = F.normalize(self.prototypes, dim=1)
        self.prototypes.copy_(units if ok is None else torch.where(ok, units, self.prototypes))


# ---- No negatives: statistics of the batch -------------------------------------------------------


class BarlowTwins(Method):
    """Barlow Twins (arXiv 2103.03230): the cross-correlation of the views' features is the identity.

    It is a sum over dim features: `weight` is by default 1 / dim, so that SGD takes steps as with other
    losses. Theirs: heads of 8192, and LARS, which sees the scale of a loss in norms and biases alone; 0.024
    there, the rate of these over that of the weights.
    """

    whole_batch = True
    off_diagonal = 0.0051

    def __init__(
        self, encoder: Encoder, dim: int | None = None, hidden: int | None = None, weight=None, **common
    ):
        channels = encoder.channels["layer4"]
        dim, hidden = dim or channels, hidden or channels
        head = GlobalHead(*normed_mlp(channels, hidden, hidden, dim, bias=False))
        super().__init__(encoder, head, weight=1 / dim if weight is None else weight, **common)

    def losses(self, views, boxes, targets) -> dict[str, Tensor]:
        z1, z2, local = self.both_views(views, targets)
        return self.terms(barlow_twins(gather(z1), gather(z2), self.off_diagonal), local)


class VICReg(Method):
    """VICReg (arXiv 2105.04906): invariance, variance and covariance, equation 6. `weight` is by default
    one over their 25, so that SGD takes steps as with other losses. Theirs: heads of 8192, LARS, a weight
    of 1."""

    whole_batch = True
    coefficients = (25.0, 25.0, 1.0)

    def __init__(
        self,
        encoder: Encoder,
        dim: int | None = None,
        hidden: int | None = None,
        weight: float = 0.04,
        **common,
    ):
        channels = encoder.channels["layer4"]
        dim, hidden = dim or channels, hidden or channels
        head = GlobalHead(*normed_mlp(channels, hidden, hidden, dim, bias=False))
        super().__init__(encoder, head, weight=weight, **common)

    def losses(self, views, boxes, targets) -> dict[str, Tensor]:
        z1, z2, local = self.both_views(views, targets)
        terms = vicreg_terms(gather(z1), gather(z2))
        own = sum(weight * term for weight, term in zip(self.coefficients, terms))
        logged = {name: term.detach() for name, term in zip(("invariance", "variance", "covariance"), terms)}
        return self.terms(own, local, **logged)


# ---- Dense: positions of feature maps ------------------------------------------------------------


class TwoHeads(nn.Module):
    """A head on the mean vector, one on every position, and the map: (N, D), (N, D, h, w), (N, C, h, w)."""

    def __init__(self, whole: GlobalHead, dense: nn.Sequential):
        super().__init__()
        self.whole, self.dense = whole, dense

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.whole(maps), self.dense(maps), maps


def rows_of(maps: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, h w, C), in float32."""
    return at_least_float32(maps.flatten(2).mT)


def centre_distances(boxes: list[Tensor] | None, size: tuple[int, int], stride: int) -> Tensor:
    """Between the positions of two views (H, W), in the slice: (n, P, P), in units of its sides."""
    if boxes is None:
        raise ValueError("where the views lie in the slice is needed: the crop boxes of both")
    centres1, centres2 = (cell_centres(box, size, stride) for box in boxes)
    return torch.cdist(centres1, centres2, compute_mode="donot_use_mm_for_euclid_dist")


class VICRegL(Method):
    """VICRegL (arXiv 2210.01571): VICReg of whole images, and of pairs of positions nearest to each other in
    the slice, or in feature space; equations 3 to 5, `matches` pairs of each kind and direction.
    Covariances are the mean of both views, where VICReg's code has the sum."""

    whole_batch = True
    dense = True
    alpha = 0.75

    def __init__(
        self,
        encoder: Encoder,
        dim: int | None = None,
        hidden: int | None = None,
        local_dim: int = 512,
        matches: int = 20,
        weight: float = 0.04,
        **common,
    ):
        channels = encoder.channels["layer4"]
        dim, hidden = dim or channels, hidden or channels
        whole = GlobalHead(*normed_mlp(channels, hidden, hidden, dim, bias=False))
        dense = nn.Sequential(*normed_mlp(channels, local_dim, local_dim, local_dim, dense=True, bias=False))
        super().__init__(encoder, TwoHeads(whole, dense), weight=weight, **common)
        self.matches = matches

    def losses(self, views, boxes, targets) -> dict[str, Tensor]:
        (z1, maps1, _), (z2, maps2, _), local = self.both_views(views, targets)
        whole = vicreg(gather(z1), gather(z2), covariance=0.5)
        x1, x2 = rows_of(maps1), rows_of(maps2)  # (n, P, D)
        size, stride = views[0].shape[2:], self.query.encoder.output_stride
        by_place = self.matched(x1, x2, centre_distances(boxes, size, stride))
        by_feature = self.matched(x1, x2, torch.cdist(x1.detach(), x2.detach()))
        own = self.alpha * whole + (1 - self.alpha) * (by_place + by_feature)
        return self.terms(
            own, local, whole=whole.detach(), by_place=by_place.detach(), by_feature=by_feature.detach()
        )

    def matched(self, x1: Tensor, x2: Tensor, distances: Tensor) -> Tensor:
        """VICReg of the nearest pairs of positions, in both directions, statistics over the batch."""
        losses = []
        for own, other, from_own in ((x1, x2, distances), (x2, x1, distances.mT)):
            chosen, partner = nearest_pairs(from_own, self.matches)  # (n, K) each
            pairs = positions_at(own, chosen), positions_at(other, partner)  # (n, K, D) each
            losses.append(vicreg(*(gather(x).transpose(0, 1) for x in pairs), covariance=0.5))  # (K, N, D)
        return sum(losses) / 2


class DenseCL(MoCo):
    """DenseCL (arXiv 2011.09157): MoCo v2, and the same for every position of the map: its positive is the
    key's position with the most similar backbone features, its negatives are a second queue of the keys' mean
    dense vectors; equations 2 and 3, the two weighted 1 - `balance` and `balance`."""

    dense = True
    queues = ("queue", "dense_queue")

    def __init__(
        self,
        encoder: Encoder,
        dim: int = 128,
        hidden: int | None = None,
        queue_size: int = 65536,
        balance: float = 0.5,
        **more,
    ):
        channels = encoder.channels["layer4"]
        hidden = hidden or channels
        dense = [nn.Conv2d(channels, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, dim, 1)]
        heads = TwoHeads(GlobalHead(*mlp(channels, hidden, dim)), nn.Sequential(*dense))
        super().__init__(encoder, dim, queue_size, projector=heads, **more)
        self.balance = balance
        self.register_buffer("dense_queue", F.normalize(torch.randn(dim, queue_size), dim=0))
        self.register_buffer("dense_queue_pointer", torch.tensor(0))

    def key_outputs(self, view, points) -> dict[str, Tensor | None]:
        (projection, dense, features), regions = self.key(view, points)
        return {"projection": projection, "regions": regions, "dense": dense, "features": features}

    @torch.no_grad()
    def targets(self, views, boxes=None, parts=1) -> Targets:
        """Also "dense" (n, P, D) and "features" (n, P, C), unit vectors; "all_dense" (N, D) for the queue."""
        keys = super().targets(views, boxes, parts)
        dense = rows_of(keys.pop("dense"))
        keys["all_dense"] = gather(F.normalize(dense.mean(dim=1), dim=1))  # the mean before it is normalised
        keys["dense"] = F.normalize(dense, dim=2)
        keys["features"] = F.normalize(rows_of(keys.features), dim=2)
        return keys

    def losses(self, views, boxes, targets) -> dict[str, Tensor]:
        (projection, dense, features), regions = self.query(views[0], targets.query_points)
        per_query, nearest = queue_nce(projection, targets.projection, self.queue, self.temperature)
        partner = cosines(rows_of(features.detach()), targets.features).argmax(dim=2)  # (n, P)
        positive = positions_at(targets.dense, partner)  # (n, P, D)
        per_position, _ = queue_nce(
            rows_of(dense).flatten(0, 1), positive.flatten(0, 1), self.dense_queue, self.temperature
        )
        whole, positions = per_query.mean(), per_position.mean()
        own = (1 - self.balance) * whole + self.balance * positions
        local = self.local_loss(regions, targets.regions, targets.local_weight, targets.all_regions)
        more = {"whole": whole.detach(), "dense": positions.detach(), "accuracy": nearest.float().mean()}
        return self.terms(own, local, **more) | {"similarity": mean_cosine(targets.all_projections)}

    def enqueue(self, keys, ok=None) -> None:
        super().enqueue(keys, ok)
        push(self.dense_queue, self.dense_queue_pointer, keys.all_dense, ok)


class PixPro(WithMomentumEncoder):
    """PixPro (arXiv 2011.10043): the pixels of a map, each smoothed over the pixels like it (equations 2, 3),
    agree with the momentum encoder's of the other view (equation 4) that lie within `radius` of the diagonal
    of the larger bin, in the slice; both directions. Where no two pixels are so near, an image counts 0."""

    dense = True
    radius, sharpness = 0.7, 2.0

    def __init__(
        self, encoder: Encoder, dim: int = 256, hidden: int | None = None, momentum: float = 0.99, **common
    ):
        channels = encoder.channels["layer4"]
        head = nn.Sequential(*normed_mlp(channels, hidden or channels, dim, dense=True))
        super().__init__(encoder, head, momentum, **common)
        self.transform = nn.Conv2d(dim, dim, 1)

    def losses(self, views, boxes, targets) -> dict[str, Tensor]:
        maps1, maps2, local = self.query_views(views, targets)
        positive = self.near(boxes, views[0].shape[2:])  # (n, P, P)
        keys1, keys2 = rows_of(targets.z1), rows_of(targets.z2)  # (n, P, D)
        own = pixel_agreement(self.propagate(maps1), keys2, positive)
        own = own + pixel_agreement(self.propagate(maps2), keys1, positive.mT)
        return self.terms(own, local, keys1.mean(dim=1))

    def propagate(self, maps: Tensor) -> Tensor:
        """Each pixel smoothed over the pixels like it: (n, D, h, w) -> (n, P, D)."""
        return propagate(rows_of(maps), rows_of(self.transform(maps)), self.sharpness)

    def near(self, boxes: list[Tensor] | None, size: tuple[int, int]) -> Tensor:
        """Which pixels of the maps of two views (H, W) are positive pairs, (n, P, P)."""
        stride = self.query.encoder.output_stride
        distances = centre_distances(boxes, size, stride)
        width, height = (stride / side for side in size[::-1])  # of a bin, in sides of the view
        x0, y0, x1, y1 = torch.stack(boxes)[:, :, :4].unbind(dim=2)  # (2, n) each
        diagonal = torch.hypot((x1 - x0) * width, (y1 - y0) * height).amax(dim=0)
        return distances < self.radius * diagonal[:, None, None]


METHODS = {
    "moco": MoCo,
    "simclr": SimCLR,
    "byol": BYOL,
    "simsiam": SimSiam,
    "swav": SwAV,
    "barlow": BarlowTwins,
    "vicreg": VICReg,
    "vicregl": VICRegL,
    "densecl": DenseCL,
    "pixpro": PixPro,
    "spark": SparK,
}
