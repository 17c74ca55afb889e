"""MoCo v2 with local features and feature decorrelation, and the face that all methods share.

    Method      a trained branch, whitening, matched regions, and the four calls of a step
    MoCo        momentum encoder, keys in shuffled order, queue

Copy this file together with losses.py and models.py. The other methods are in methods.py.
"""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from losses import (
    Whitening,
    at_least_float32,
    gather,
    local_nce_per_image,
    matched_points,
    queue_nce,
    sample_regions,
    seeded,
    world_size,
)
from models import Encoder, make_whitening, split_batch_norms

# ---- What all methods have -----------------------------------------------------------------------


class Branch(nn.Module):
    """Encoder, whitening and heads; with a momentum encoder there are two of them.

    projector: takes layer4's map, whitened, as GlobalHead does.
    """

    def __init__(
        self, encoder: Encoder, projector: nn.Module, local_layer: str | None, decorrelation: Whitening | None
    ):
        super().__init__()
        self.encoder = encoder
        self.decorrelation = decorrelation or nn.Identity()
        self.projector = projector
        self.local_layer = local_layer
        self.local_projector = mlp(encoder.channels[local_layer], 512, 128) if local_layer else None

    def forward(self, view: Tensor, points: Tensor | None = None) -> tuple:
        """View (N, C, H, W) and region points (N, R, 2) -> what the projector makes of it, (N, D) for MoCo,
        and regions (N, R, 128), or None without points or without a local loss."""
        maps = self.encoder(view, ("layer4", self.local_layer or "layer4"))
        maps["layer4"] = self.decorrelation(maps["layer4"])
        projection = self.projector(maps["layer4"])
        if self.local_projector is None or points is None:
            return projection, None
        stride = self.encoder.strides()[self.local_layer]
        regions = sample_regions(maps[self.local_layer], points, view.shape[2:], stride)
        return projection, self.local_projector(regions)


class GlobalHead(nn.Sequential):
    """Layers on the mean vector of a map: (N, C, h, w) -> (N, D)."""

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.mean(dim=(2, 3)))


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, outputs))


class Targets(dict):
    """What a step's losses need besides the views, without gradient: tensors by name, or None.

    Rows are this process's samples, in order; names that begin with "all_" hold the global batch.
    """

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def part(self, rows: slice) -> "Targets":
        """The same for some of this process's samples, for gradient accumulation."""
        own = {n: v[rows] for n, v in self.items() if v is not None and not n.startswith("all_")}
        return Targets(self | own)


class Method(nn.Module):
    """A method of pretraining: a trained branch, `query`, and the paper's two additions to any method.

    A step of train_moco.py is, for all methods,

        targets = model.targets(views, boxes)                   once per global batch, without gradient
        model(views, boxes, targets)["loss"].backward()         for all of it, or for each part of it
        optimizer.step()
        model.after_step(targets)                               momentum encoder, queue

    views: two of (n, C, H, W), this process's share of the global batch, in its order; boxes: (n, 5 or 9)
    each, see `losses.matched_points`. `progress`, set before the step, is the share of the run that is done.

    Args:
        encoder: the network to train.
        projector: see Branch.
        local: None, or any of LOCAL_DEFAULTS to change: local InfoNCE between matched regions of the two
            views (arXiv 2402.14611).
        decorrelation: None, or dict(method="zca" | "iternorm", ...) with group_size, eps, sync: whitening
            between the trunk and all heads ("output"). For whitening inside the trunk ("bn3") build the
            encoder with it.
        bn_split: samples that BatchNorm normalises together, 0: the global batch.
        seed: of what the method draws.
        weight: of the method's own loss; that of the local one is among LOCAL_DEFAULTS.
    """

    LOCAL_DEFAULTS = dict(
        match="overlap",
        layer="layer4",
        grid=4,
        negatives="image",
        weight=0.5,
        temperature=0.2,
        min_overlap=0.15,
    )
    whole_batch = False  # whether the loss compares samples of a batch, so that its parts do not add up to it
    dense = False  # whether it compares positions of a map, which needs more than one of them
    small_crops = False  # whether it uses views after the first two
    hides_cells = (
        False  # whether it hides cells as large as a position of layer4; such a method sees one view
    )
    at_constant_rate = ()  # modules by name whose learning rate stays as it is given
    queues = ()  # buffers by name, (D, K) of unit vectors; the buffer NAME_pointer is the next column

    def __init__(
        self,
        encoder: Encoder,
        projector: nn.Module,
        local: dict | None = None,
        decorrelation: dict | None = None,
        bn_split: int = 32,
        seed: int = 0,
        weight: float = 1.0,
    ):
        super().__init__()
        self.seed, self.weight, self.bn_split = seed, weight, bn_split
        self.local = None if local is None else {**self.LOCAL_DEFAULTS, **local}
        if unknown := set(self.local or {}) - set(self.LOCAL_DEFAULTS):
            raise ValueError(f"unknown local option {sorted(unknown)[0]!r}: {', '.join(self.LOCAL_DEFAULTS)}")
        if self.local and self.local["negatives"] not in ("image", "batch"):
            raise ValueError(f"negatives must be 'image' or 'batch', not {self.local['negatives']!r}")
        whitening = None
        if decorrelation is not None:
            options = {name: value for name, value in decorrelation.items() if name != "position"}
            if decorrelation.get("position", "output") != "output":
                raise ValueError("whitening at bn3 is part of the encoder: Encoder(whitening=...)")
            whitening = make_whitening(channels=encoder.channels["layer4"], **options)
        self.query = Branch(encoder, projector, self.local and self.local["layer"], whitening)
        self.step = 0  # global batches seen
        self.progress = 0.0
        split_batch_norms(self, bn_split)

    def forward(
        self, views: list[Tensor], boxes: list[Tensor] | None = None, targets: Targets | None = None
    ) -> dict[str, Tensor]:
        """The terms of a step, see `terms`; without `targets` they are computed here."""
        return self.losses(views, boxes, self.targets(views, boxes) if targets is None else targets)

    def losses(self, views: list[Tensor], boxes: list[Tensor] | None, targets: Targets) -> dict[str, Tensor]:
        """What makes a method: the terms of these samples."""
        raise NotImplementedError

    @torch.no_grad()
    def targets(self, views: list[Tensor], boxes: list[Tensor] | None = None, parts: int = 1) -> Targets:
        """What the losses need besides the views; `parts`: encode so many parts in turn, to save memory."""
        return self.match_regions(views[0], *(boxes or (None, None)))

    def both_views(self, views: list[Tensor], targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """The trained branch's projections of both views, and the local loss between them."""
        z1, regions1 = self.query(views[0], targets.query_points)
        z2, regions2 = self.query(views[1], targets.key_points)
        return z1, z2, self.local_loss(regions1, regions2, targets.local_weight)

    def terms(
        self, own: Tensor, local: Tensor, projections: Tensor | None = None, **more
    ) -> dict[str, Tensor]:
        """What forward returns, all scalars: "global", the method's own loss, and "local", which make up
        "loss"; `more`, which is only logged; and of projections (n, D) "similarity", the mean cosine of
        different images (near 1: all images are one point)."""
        terms = {"global": own, "local": local, "loss": self.weight * own}
        if self.local is not None:
            terms["loss"] = terms["loss"] + self.local["weight"] * local
        terms |= more
        if projections is not None:
            units = F.normalize(at_least_float32(projections.detach()), dim=1)
            terms["similarity"] = mean_cosine(gather(units))
        return terms

    def match_regions(self, view: Tensor, query_box: Tensor | None, key_box: Tensor | None) -> Targets:
        """Points (n, R, 2) of the regions in both views, and each image's weight in the local loss (n,): the
        mean over the global batch is 1; 0 = left out."""
        if self.local is None:
            return Targets(query_points=None, key_points=None, local_weight=None)
        if query_box is None or key_box is None:
            if self.local["match"] == "overlap":
                raise ValueError("local.match = overlap needs the crop boxes of both views")
            query_box = key_box = whole_slices(view)
        stride = self.query.encoder.strides()[self.local["layer"]]
        options = {name: self.local[name] for name in ("grid", "match", "min_overlap")}
        size = view.shape[2:]
        query_points, key_points, keep = matched_points(query_box, key_box, size, stride, **options)
        keep = keep.to(query_box.dtype)
        kept = gather(keep).mean()  # of the whole global batch, so that every kept image counts alike
        weight = keep / kept.clamp(min=1e-12)
        return Targets(query_points=query_points, key_points=key_points, local_weight=weight)

    def local_loss(
        self, query: Tensor | None, key: Tensor | None, weight: Tensor | None, everyone: Tensor | None = None
    ) -> Tensor:
        """The local InfoNCE of regions (n, R, 128), mean over the images whose views overlap enough.

        everyone: (N, R, 128), the key regions of the global batch, if they are known; else gathered, if
            local.negatives = batch.
        """
        if self.local is None:
            return next(self.parameters()).new_zeros(())
        everyone = self.regions_of_batch(key) if everyone is None else everyone
        per_image = local_nce_per_image(query, key, self.local["temperature"], everyone)  # (n,)
        return torch.where(weight > 0, per_image * weight, 0).mean()

    def regions_of_batch(self, regions: Tensor | None) -> Tensor | None:
        """Those of the global batch, (N, R, 128), if the regions of other images are negatives."""
        return gather(regions) if self.local is not None and self.local["negatives"] == "batch" else None

    def after_step(self, targets: Targets, ok: Tensor | None = None) -> None:
        """What changes once per global batch, after the optimiser (training only).

        ok: a bool scalar on the model's device; where it is false nothing changes. The host need not know it.
        """
        if self.training:
            self.step += 1

    def get_extra_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def whole_slices(view: Tensor) -> Tensor:
    """Boxes (n, 5) of views that are not cropped."""
    return view.new_tensor([[0, 0, 1, 1, 0]], dtype=torch.float32).expand(len(view), 5)


@torch.no_grad()
def follow(key: nn.Module, query: nn.Module, momentum: float, ok: Tensor | None = None) -> None:
    """key <- momentum * key + (1 - momentum) * query, all parameters; not where `ok` is false."""
    keys, weight = list(key.parameters()), 1 - momentum
    if ok is not None:
        weight = [weight * ok.to(keys[0].dtype)] * len(keys)
    torch._foreach_lerp_(keys, list(query.parameters()), weight)


def mean_cosine(x: Tensor) -> Tensor:
    """Of all pairs of different rows of x (N, D), unit vectors; 0 if there is one row."""
    pairs = len(x) * (len(x) - 1)
    return (x.sum(dim=0).square().sum() - len(x)) / max(pairs, 1)


def row_ranges(length: int, parts: int) -> list[slice]:
    """`parts` nearly equal slices of range(length)."""
    return [slice(length * i // parts, length * (i + 1) // parts) for i in range(parts)]


# ---- MoCo ----------------------------------------------------------------------------------------


class MoCo(Method):
    """MoCo v2 (arXiv 1911.05722, 2003.04297) with local features and feature decorrelation (2402.14611).

    If the samples of a query batch were normalised together in the key batch too, the positive could be
    recognised by the shared batch statistics instead of by its content. MoCo's answer is shuffling BN; here
    BatchNorm uses sub-batches of `bn_split` samples and the key batch is permuted, over all processes, by a
    permutation that depends on (seed, step) only. One process and many compute the same.

    Args:
        encoder: becomes the query encoder; the momentum encoder is a copy.
        dim: length of the compared vectors.
        queue_size: number of negatives; at least the global batch.
        momentum: of the momentum encoder's moving average, per step.
        temperature: of the softmax.
        common: as Method's.
    """

    queues = ("queue",)

    def __init__(
        self,
        encoder: Encoder,
        dim: int = 128,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.2,
        projector: nn.Module | None = None,
        **common,
    ):
        channels = encoder.channels["layer4"]
        super().__init__(encoder, projector or GlobalHead(*mlp(channels, channels, dim)), **common)
        self.momentum, self.temperature = momentum, temperature
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, queue_size), dim=0))
        self.register_buffer("queue_pointer", torch.tensor(0))  # the column that the next key goes to

    @torch.no_grad()
    def targets(self, views, boxes=None, parts=1) -> Targets:
        """The momentum encoder's keys of the second view: "projection" (n, D), unit vectors,
        "all_projections" (N, D) for the queue, "regions" (n, R, 128), "all_regions" (N, R, 128) if those of
        other images are negatives; and `match_regions`."""
        keys = super().targets(views, boxes)
        keys |= self.shuffled(views[1], keys.key_points, parts)
        keys["projection"] = F.normalize(keys.projection, dim=1)
        keys["all_projections"] = gather(keys.projection)
        keys["all_regions"] = self.regions_of_batch(keys.regions)
        return keys

    def losses(self, views, boxes, targets) -> dict[str, Tensor]:
        """Also "accuracy": the share of queries that are nearer to their own key than to any of the queue;
        "similarity": the mean cosine of the keys of different images. Near 1 all images have the same key;
        accuracy can still be high then, since older keys, in the queue, lie elsewhere."""
        query, regions = self.query(views[0], targets.query_points)  # (n, D), (n, R, 128)
        per_query, nearest = queue_nce(query, targets.projection, self.queue, self.temperature)  # (n,) each
        local = self.local_loss(regions, targets.regions, targets.local_weight, targets.all_regions)
        accuracy, similarity = nearest.float().mean(), mean_cosine(targets.all_projections)
        return self.terms(per_query.mean(), local, accuracy=accuracy, similarity=similarity)

    def after_step(self, targets, ok=None) -> None:
        """The momentum encoder follows, then the keys enter the queue."""
        super().after_step(targets, ok)
        if self.training:
            follow(self.key, self.query, self.momentum, ok)  # running statistics are its own
            self.enqueue(targets, ok)

    def enqueue(self, keys: Targets, ok: Tensor | None = None) -> None:
        """Overwrite the oldest columns of the queue with the keys of the global batch; not where `ok` is
        false."""
        push(self.queue, self.queue_pointer, keys.all_projections, ok)

    def shuffled(self, view: Tensor, points: Tensor | None, parts: int) -> dict[str, Tensor | None]:
        """The momentum encoder's outputs, in order, of views that it sees in another order, shuffled over the
        global batch."""
        order = self._key_order(len(view) * world_size())
        view, points = permuted_rows(view, order), permuted_rows(points, order)
        pieces = [
            self.key_outputs(view[rows], None if points is None else points[rows])
            for rows in row_ranges(len(view), parts)
        ]
        back = torch.argsort(order)
        joined = {name: [piece[name] for piece in pieces] for name in pieces[0]}
        return {
            name: None if some[0] is None else permuted_rows(at_least_float32(torch.cat(some)), back)
            for name, some in joined.items()
        }

    def key_outputs(self, view: Tensor, points: Tensor | None) -> dict[str, Tensor | None]:
        projection, regions = self.key(view, points)
        return {"projection": projection, "regions": regions}

    def _key_order(self, batch: int) -> Tensor:
        """The permutation of the global batch (N,) in which keys are encoded; in order in evaluation."""
        if not self.training:
            return torch.arange(batch)
        return torch.randperm(batch, generator=seeded("keys", self.seed, self.step))


@torch.no_grad()
def push(queue: Tensor, pointer: Tensor, keys: Tensor, ok: Tensor | None = None) -> None:
    """Overwrite the columns of a queue (D, K) from `pointer` on with keys (N, D); not where `ok` is false."""
    size, batch = queue.shape[1], len(keys)
    if batch > size:
        raise ValueError(f"a batch of {batch} does not fit into a queue of {size}")
    columns = (pointer + torch.arange(batch, device=queue.device)) % size
    entering = keys.T.to(queue.dtype)  # (D, N)
    if ok is not None:
        entering, batch = torch.where(ok, entering, queue[:, columns]), batch * ok
    queue[:, columns] = entering
    pointer.copy_((pointer + batch) % size)


def permuted_rows(x: Tensor | None, order: Tensor) -> Tensor | None:
    """This process's rows of gather(x)[order], each sent only to the process that takes it. No gradient.

    Args:
        x: (n, ...), this process's share; None stays None.
        order: (N,), on the CPU, a permutation of the rows of all processes, the same on each of them.
    """
    if x is None:
        return None
    if world_size() == 1:
        return x[order.to(x.device)]
    rank, count = dist.get_rank(), len(x)
    takers = order.view(world_size(), count)  # [r]: the rows that process r takes
    givers = takers // count
    own = givers == rank
    sent = takers[own] - rank * count  # sorted by taker, then by place there
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    incoming = givers[rank].bincount(minlength=world_size()).tolist()
    outgoing = own.sum(dim=1).tolist()
    dist.all_to_all_single(received, x[sent.to(x.device)].contiguous(), incoming, outgoing)
    places = torch.argsort(torch.argsort(givers[rank], stable=True))  # of each row among those received
    return received[places.to(x.device)]
