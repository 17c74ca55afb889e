"""The networks: ResNet encoder, MoCo around it, and the two decoders that judge it.

    Encoder             torchvision's ResNet trunk, with split BatchNorm, dilation and optional whitening
    Method              what all methods of pretraining have: whitening, regions, the face for train_moco.py
    MoCo                query and momentum encoder, projection heads, queue, and the losses of one step
    LinearDecoder, DeepLabV3Plus
    load_encoder_weights    from our own files and most published checkpoints, which weights.py reads
    architecture_of         the architecture that a file of weights shows

Copy this file together with losses.py, and with weights.py where weights are loaded; it needs torch and
torchvision only.
"""

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet as published
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from losses import (
    IterNorm,
    SumOverRanks,
    Whitening,
    ZCAWhitening,
    at_least_float32,
    gather,
    inverse_sqrt,
    local_nce_per_image,
    matched_points,
    queue_nce,
    sample_regions,
    world_size,
)

LAYERS = ("layer1", "layer2", "layer3", "layer4")


def layer_strides(output_stride: int) -> dict[str, int]:
    """Input pixels per pixel of each layer's map, of an encoder of this output stride."""
    return {layer: min(stride, output_stride) for layer, stride in zip(LAYERS, (4, 8, 16, 32))}


# ---- Encoder -------------------------------------------------------------------------------------


class HalfResNet(ResNet):
    """Half the channels in each layer: a quarter of the work."""

    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, planes // 2, *args, **kwargs)


ARCHITECTURES = {  # network, its blocks, and how many of them each layer has
    "resnet18": (ResNet, BasicBlock, [2, 2, 2, 2]),
    "resnet26": (ResNet, Bottleneck, [2, 2, 2, 2]),  # timm's; a ResNet-50 in small
    "resnet26_half": (HalfResNet, Bottleneck, [2, 2, 2, 2]),  # for experiments on a CPU
    "resnet34": (ResNet, BasicBlock, [3, 4, 6, 3]),
    "resnet50": (ResNet, Bottleneck, [3, 4, 6, 3]),
    "resnet101": (ResNet, Bottleneck, [3, 4, 23, 3]),
}


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with the training statistics of sub-batches of `split` samples (0: of the global batch, over
    all processes).

    A large batch in one process then behaves as many small ones on many GPUs, which MoCo needs (see MoCo).
    A batch that `split` does not divide is cut into nearly equal parts of at least `split` samples. The
    running statistics move once per batch, towards the mean over the sub-batches.
    """

    split = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.split and world_size() > 1:
            return self.over_processes(x)
        parts = len(x) // self.split if self.split else 1
        if not self.training or parts < 2:
            return super().forward(x)
        mean = self.running_mean.new_zeros(parts, self.num_features)
        var = self.running_var.new_zeros(parts, self.num_features)
        normalised = [  # momentum 1 writes each sub-batch's own statistics into its row
            F.batch_norm(part, mean[i], var[i], self.weight, self.bias, True, 1.0, self.eps)
            for i, part in enumerate(x.tensor_split(parts))
        ]
        self.move_running(mean.mean(dim=0), var.mean(dim=0))
        return torch.cat(normalised)

    def over_processes(self, x: Tensor) -> Tensor:
        """As torch's SyncBatchNorm, which has no CPU version; each process has as many samples."""
        with torch.autocast(x.device.type, enabled=False):
            values = at_least_float32(x.movedim(1, -1))  # (..., C)
            dims, count = tuple(range(values.dim() - 1)), world_size() * (x.numel() // x.shape[1])
            mean = SumOverRanks.apply(values.mean(dims)) / world_size()
            centred = values - mean
            var = SumOverRanks.apply(centred.square().mean(dims)) / world_size()
            normalised = centred * (var + self.eps).rsqrt()
            if self.affine:
                normalised = normalised * self.weight + self.bias
        self.move_running(mean.detach(), var.detach() * count / max(count - 1, 1))
        return normalised.to(x.dtype).movedim(-1, 1)

    @torch.no_grad()
    def move_running(self, mean: Tensor, var: Tensor) -> None:
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)
        self.num_batches_tracked.add_(1)


class SplitBatchNorm1d(SplitBatchNorm2d):
    """The same for vectors (N, C)."""

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() != 2:
            raise ValueError(f"expected vectors (N, C), not {tuple(x.shape)}")


class Encoder(nn.Module):
    """A torchvision ResNet without its classifier; parameter names are torchvision's.

    Args:
        arch: one of ARCHITECTURES.
        in_channels: 1 for slices, 3 for pictures.
        whitening: "none", or "zca" or "iternorm" in place of the last norm of layer4's last block
            (arXiv 2402.14611). Evaluated, it is linear: `export_state_dict` folds it away.
        group_size: channels whitened together, 0 for all.
        output_stride: input pixels per layer4 pixel: 32, or 16 or 8 by dilation.
        whitening_options: more arguments of the whitening layer, as eps and sync.

    Raises:
        ValueError: an unknown value, or ZCA groups that are singular by construction.
    """

    def __init__(
        self,
        arch: str = "resnet50",
        in_channels: int = 1,
        whitening: str = "none",
        group_size: int = 64,
        output_stride: int = 32,
        **whitening_options,
    ):
        super().__init__()
        if arch not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {arch!r}: one of {', '.join(ARCHITECTURES)}")
        network, block, depths = ARCHITECTURES[arch]
        trunk = network(block, depths, norm_layer=SplitBatchNorm2d)
        self.conv1, self.bn1, self.relu, self.maxpool = trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = (getattr(trunk, name) for name in LAYERS)
        if in_channels != 3:
            self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

        self.arch, self.in_channels = arch, in_channels
        self.channels = {name: getattr(trunk, name)[-1].conv1.in_channels for name in LAYERS}
        last = 3 if isinstance(self.layer4[-1], Bottleneck) else 2
        self.last_conv = f"layer4.{len(self.layer4) - 1}.conv{last}"  # the convolution before the whitening
        self.last_norm = f"layer4.{len(self.layer4) - 1}.bn{last}"
        if whitening != "none":
            self._set_whitening(whitening, group_size, whitening_options)
        self.set_output_stride(output_stride)

    def _set_whitening(self, whitening: str, group_size: int, options: dict) -> None:
        channels = self.channels["layer4"]
        inputs = self.get_submodule(self.last_conv).weight[0].numel()  # rank of what the convolution can give
        if whitening == "zca" and (group := group_size or channels) > inputs:
            raise ValueError(
                f"zca groups of {group} channels are singular: {self.last_conv} of {self.arch} has {inputs} "
                f"inputs; use groups of at most {inputs}, or iternorm"
            )
        norm = make_whitening(whitening, channels, group_size, **options)
        setattr(self.layer4[-1], self.last_norm.split(".")[-1], norm)

    def set_output_stride(self, output_stride: int) -> None:
        """Trade strides for dilation, or back; the weights stay valid.

        As in torchvision, the strided convolution of a dilated layer's first block keeps the dilation of the
        layer before, so that the map at stride 8 taken at [::4, ::4] equals the one at stride 32.
        """
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output stride must be 8, 16 or 32, not {output_stride}")
        dilation = 1
        for layer, natural_stride in ((self.layer3, 16), (self.layer4, 32)):
            stride = 2 if natural_stride <= output_stride else 1
            before, dilation = dilation, dilation * (2 if stride == 1 else 1)
            for index, block in enumerate(layer):
                spatial = [conv for conv in (block.conv1, block.conv2) if conv.kernel_size == (3, 3)]
                for conv in spatial:
                    strided = index == 0 and conv is spatial[0]
                    rate = before if strided else dilation
                    conv.dilation = conv.padding = (rate, rate)
                    if strided:
                        conv.stride = block.downsample[0].stride = (stride, stride)
        self.output_stride = output_stride

    def strides(self) -> dict[str, int]:
        return layer_strides(self.output_stride)

    def forward(self, x: Tensor, layers: tuple[str, ...] = ("layer4",)) -> dict[str, Tensor]:
        """Images (N, in_channels, H, W) -> the maps of `layers` by name, each (N, C, h, w)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = {}
        for name in LAYERS[: 1 + max(LAYERS.index(name) for name in layers)]:
            x = getattr(self, name)(x)
            if name in layers:
                maps[name] = x
        return maps

    @torch.no_grad()
    def export_state_dict(self) -> dict[str, Tensor]:
        """The encoder's function in evaluation mode as the state dict of a torchvision ResNet without fc."""
        state = {name: value.detach().cpu().clone() for name, value in self.state_dict().items()}
        norm = self.get_submodule(self.last_norm)
        if isinstance(norm, Whitening):
            fold_whitening(state, self.last_conv, self.last_norm, norm.running_matrix().cpu())
        return state


def make_whitening(method: str, channels: int, group_size: int = 64, **options) -> Whitening:
    """The whitening layer called "zca" or "iternorm"."""
    layers = {"zca": ZCAWhitening, "iternorm": IterNorm}
    if method not in layers:
        raise ValueError(f"unknown whitening {method!r}: one of none, {', '.join(layers)}")
    return layers[method](channels, group_size, **options)


# ---- What all methods of pretraining have --------------------------------------------------------


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


def split_batch_norms(module: nn.Module, split: int) -> None:
    for one in module.modules():
        if isinstance(one, SplitBatchNorm2d):
            one.split = split


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


# ---- MoCo ----------------------------------------------------------------------------------------


class MoCo(Method):
    """MoCo v2 (arXiv 1911.05722, 2003.04297) with local features and feature decorrelation (2402.14611).

    One step of training is `forward(query_view, key_view, ...)["loss"].backward()` and an optimiser step.
    For gradient accumulation, or to skip bad steps, call what forward consists of: `encode_keys` once per
    global batch, `forward` with each part of the keys, `enqueue` once, and `update_momentum_encoder` after
    the optimiser (equivalent to updating before the next keys). In evaluation mode neither the momentum
    encoder nor the queue moves. (methods.MoCoV2 has the same in the order of Method.)

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

    def forward(
        self,
        query_view: Tensor,
        key_view: Tensor | None = None,
        query_box: Tensor | None = None,
        key_box: Tensor | None = None,
        keys: Targets | None = None,
    ) -> dict[str, Tensor]:
        """The losses of one step, and the step's changes to momentum encoder and queue.

        Args:
            query_view, key_view: (n, C, H, W), this process's share of the global batch, in its order.
            query_box, key_box: (n, 5 or 9), see `losses.matched_points`; needed for local.match = overlap.
            keys: what `encode_keys` returned, in place of key_view and the boxes. Then only the losses are
                computed: neither momentum encoder nor queue moves.

        Returns:
            "loss", the weighted sum of "global" and "local"; "accuracy": the share of queries that are
            nearer to their own key than to any of the queue; "similarity": the mean cosine of the keys of
            different images. Scalars. With a similarity near 1 all images have the same key; accuracy can
            still be high then, since older keys, in the queue, lie elsewhere.
        """
        whole_step = keys is None
        if whole_step:
            self.update_momentum_encoder()
            keys = self.encode_keys(key_view, query_box, key_box)

        query, regions = self.query(query_view, keys.query_points)  # (n, D), (n, R, 128)
        terms = self.contrast(query, regions, keys)
        if whole_step:
            self.enqueue(keys)
        return terms

    def contrast(self, query: Tensor, regions: Tensor | None, keys: Targets) -> dict[str, Tensor]:
        """Of queries (n, D) and regions (n, R, 128): what forward returns."""
        per_query, nearest = queue_nce(query, keys.projection, self.queue, self.temperature)  # (n,) each
        local = self.local_loss(regions, keys.regions, keys.local_weight, keys.all_regions)
        accuracy, similarity = nearest.float().mean(), mean_cosine(keys.all_projections)
        return self.terms(per_query.mean(), local, accuracy=accuracy, similarity=similarity)

    @torch.no_grad()
    def encode_keys(
        self, key_view: Tensor, query_box: Tensor | None = None, key_box: Tensor | None = None, parts: int = 1
    ) -> Targets:
        """The momentum encoder's keys: "projection" (n, D), unit vectors, "all_projections" (N, D) for the
        queue, "regions" (n, R, 128), "all_regions" (N, R, 128) if those of other images are negatives, and
        `match_regions`. Each process encodes its share, in `parts` parts, which saves memory."""
        keys = self.match_regions(key_view, query_box, key_box)
        keys |= self.shuffled(key_view, keys.key_points, parts)
        keys["projection"] = F.normalize(keys.projection, dim=1)
        keys["all_projections"] = gather(keys.projection)
        keys["all_regions"] = self.regions_of_batch(keys.regions)
        return keys

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

    def update_momentum_encoder(self, ok: Tensor | None = None) -> None:
        """key <- m * key + (1 - m) * query, all parameters (training only; running statistics are its own).

        ok: a bool scalar on their device; where it is false nothing changes. The host need not know it.
        """
        if self.training:
            follow(self.key, self.query, self.momentum, ok)

    def enqueue(self, keys: Targets, ok: Tensor | None = None) -> None:
        """Overwrite the oldest columns of the queue with the keys of the global batch (training only).

        ok: as in `update_momentum_encoder`.
        """
        if self.training:
            push(self.queue, self.queue_pointer, keys.all_projections, ok)
            self.step += 1

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


def seeded(*key) -> torch.Generator:
    """A CPU generator whose state is a hash of the key: independent streams for independent purposes."""
    return torch.Generator().manual_seed(seed_of(*key))


def seed_of(*key) -> int:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def mean_cosine(x: Tensor) -> Tensor:
    """Of all pairs of different rows of x (N, D), unit vectors; 0 if there is one row."""
    pairs = len(x) * (len(x) - 1)
    return (x.sum(dim=0).square().sum() - len(x)) / max(pairs, 1)


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


def row_ranges(length: int, parts: int) -> list[slice]:
    """`parts` nearly equal slices of range(length)."""
    return [slice(length * i // parts, length * (i + 1) // parts) for i in range(parts)]


# ---- Decoders ------------------------------------------------------------------------------------


class LinearDecoder(nn.Module):
    """A parameter-free BatchNorm and one 1x1 convolution on a frozen encoder's map."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels, affine=False)
        self.classifier = nn.Conv2d(in_channels, num_classes, kernel_size=1)

    def forward(self, features: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Map (N, C, h, w) -> logits (N, K, H, W), upsampled bilinearly to `size` = (H, W) if given."""
        logits = self.classifier(self.norm(features))
        return logits if size is None else upsample(logits, size)


class DeepLabV3Plus(nn.Module):
    """DeepLabv3+ (arXiv 1802.02611) with ordinary convolutions: ASPP on layer4, a skip from layer1.

    Atrous rates are 12, 24, 36 at the encoder's output stride 8 and 6, 12, 18 at 16.
    """

    def __init__(self, encoder: Encoder, num_classes: int):
        super().__init__()
        self.encoder = encoder
        rates = [96 // encoder.output_stride * i for i in (1, 2, 3)]
        self.aspp = ASPP(encoder.channels["layer4"], 256, rates)
        self.skip = conv_norm_relu(encoder.channels["layer1"], 48, 1)
        self.decoder = nn.Sequential(conv_norm_relu(256 + 48, 256, 3), conv_norm_relu(256, 256, 3))
        self.classifier = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(256, num_classes, kernel_size=1))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) of any size -> logits (N, K, H, W)."""
        maps = self.encoder(x, ("layer1", "layer4"))
        skip = self.skip(maps["layer1"])
        context = upsample(self.aspp(maps["layer4"]), skip.shape[2:])
        logits = self.classifier(self.decoder(torch.cat([context, skip], dim=1)))
        return upsample(logits, x.shape[2:])


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1, three dilated 3x3 convolutions and the image's mean, joined."""

    def __init__(self, inputs: int, outputs: int, rates: list[int]):
        super().__init__()
        self.branches = nn.ModuleList(
            [
                conv_norm_relu(inputs, outputs, 1),
                *(conv_norm_relu(inputs, outputs, 3, rate) for rate in rates),
            ]
        )
        self.pool = conv_norm_relu(inputs, outputs, 1)
        self.project = conv_norm_relu((len(rates) + 2) * outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(x.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], dim=1))


def conv_norm_relu(inputs: int, outputs: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def upsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


# ---- Weights out and in --------------------------------------------------------------------------


def fold_whitening(state: dict[str, Tensor], conv: str, norm: str, matrix: Tensor) -> None:
    """Turn the whitening layer `norm` of a state dict into a BatchNorm that computes the same in evaluation.

    Whitening there is weight * W (x - mean) + bias of the output x of a convolution without bias. W, given
    as `matrix` (G, C / G, C / G), moves into that convolution; the rest becomes a BatchNorm of variance 1.
    """
    whole = torch.block_diag(*matrix.double())  # (C, C)
    kernel = state[f"{conv}.weight"]
    plain = nn.BatchNorm2d(len(whole))
    plain.running_mean.copy_(whole @ state[f"{norm}.running_mean"].double().flatten())
    plain.running_var.fill_(1 - plain.eps)
    with torch.no_grad():
        for name in ("weight", "bias"):
            if f"{norm}.{name}" in state:
                getattr(plain, name).copy_(state[f"{norm}.{name}"].flatten())
    for name in [name for name in state if name.startswith(f"{norm}.")]:
        del state[name]
    state[f"{conv}.weight"] = torch.einsum("oc,c...->o...", whole, kernel.double()).to(kernel.dtype)
    state.update({f"{norm}.{name}": value for name, value in plain.state_dict().items()})


PUBLISHED = (  # torchvision's, that are none of ours
    *("resnet152", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)


@dataclass
class LoadReport:
    """What `load_encoder_weights` did; str() is one line."""

    path: str
    prefix: str  # before the ResNet's own names in the file
    loaded: int  # tensors
    left_out: list[str]  # names in the file that have no place in the encoder
    note: str = ""

    def __str__(self) -> str:
        where = f" under {self.prefix!r}" if self.prefix else ""
        rest = f", left out {len(self.left_out)} ({self.left_out[0]}, ...)" if self.left_out else ""
        return f"{self.path}: loaded {self.loaded} tensors{where}{rest}{self.note}"


def load_encoder_weights(encoder: Encoder, path: str | Path) -> LoadReport:
    """Load a ResNet's weights from our own or most published files, and say what was done.

    The file may nest the tensors in dicts and put any prefix before the names (MoCo's `module.encoder_q.`,
    mmselfsup's and mmseg's `backbone.`, our checkpoint's `query.encoder.`), number the network's parts as
    nn.Sequential does, and name wrappers in between (`_orig_mod.`); heads are left out. A stem of
    another number of channels is summed (or spread) so that it answers the same to a slice repeated in
    every channel. Into a whitened encoder the last norm goes as a diagonal covariance; a file's IterNorm is
    folded into the convolution before it, unless the encoder has the same.

    Args:
        path: as `weights.weights_file` takes it.

    Raises:
        WeightsError: unreadable, not a ResNet, or one of another architecture. The encoder is then unchanged.
    """
    from weights import WeightsError, read_resnet, weights_file  # here: all else in this file does without

    path = weights_file(path)
    state, prefix, names, note = read_resnet(path)
    own = encoder.state_dict()
    if (shape := block_shape(state)) not in (None, block_shape(own)):
        found = architecture(shape)
        advice = f"; model.arch={found}" if found in ARCHITECTURES else ""
        raise WeightsError(f"{path}: holds {a_resnet(found, shape)}, not a {encoder.arch}{advice}")

    note += fit_stem(state, encoder.in_channels)
    note += fit_last_norm(state, encoder)
    required = [name for name in own if not name.endswith("num_batches_tracked")]
    missing = [name for name in required if name not in state]
    unfit = [name for name in required if name in state and state[name].shape != own[name].shape]
    in_layers = tuple(f"{part}." for part in ("conv1", "bn1", *LAYERS))
    own_norm = f"{encoder.last_norm}."
    more = [n for n in state if n.startswith(in_layers) and n not in own and not n.startswith(own_norm)]
    more = [name for name in more if not name.endswith("num_batches_tracked")]
    if missing or unfit or more:
        found = (
            f"{missing[0]} is missing"
            if missing
            else f"{unfit[0]} is {tuple(state[unfit[0]].shape)} instead of {tuple(own[unfit[0]].shape)}"
            if unfit
            else f"{more[0]} has no place"
        )
        raise WeightsError(f"{path}: not a {encoder.arch} with this norm: {found}")
    fitting = {name: state[name] for name in own if name in state}
    encoder.load_state_dict(fitting, strict=False)
    used = {prefix + name for name in fitting}
    rest = [n for n in names if n not in used and not n.startswith(f"{prefix}{own_norm}")]
    return LoadReport(str(path), prefix, len(fitting), rest, note)


def architecture_of(path: str | Path) -> str | None:
    """The one of ARCHITECTURES that a file of weights holds (see `weights.weights_file`); None for
    another ResNet.

    Raises:
        WeightsError: unreadable, or not a ResNet.
    """
    from weights import read_resnet, weights_file

    state, _, _, _ = read_resnet(weights_file(path))
    found = architecture(block_shape(state))
    return found if found in ARCHITECTURES else None


def block_shape(state: dict[str, Tensor]) -> tuple | None:
    """What tells one ResNet from another: whether its blocks are bottlenecks, how many each layer
    has, and the output channels and group size of the first block's first and second convolution."""
    first, second = (state.get(f"layer1.0.conv{i}.weight") for i in (1, 2))
    if first is None or second is None or not first.dim() == second.dim() == 4:
        return None
    blocks = [{name.split(".")[1] for name in state if name.startswith(f"{layer}.")} for layer in LAYERS]
    return "layer1.0.conv3.weight" in state, tuple(map(len, blocks)), len(first), second.shape[1]


def architecture(wanted: tuple | None) -> str | None:
    """The name of the ResNet, ours or torchvision's, of this `block_shape`; None if it is none of them."""
    with torch.device("meta"):
        for name, (network, block, depths) in ARCHITECTURES.items():
            if block_shape(network(block, depths).state_dict()) == wanted:
                return name
        for name in PUBLISHED:
            if block_shape(getattr(published, name)().state_dict()) == wanted:
                return name
    return None


def a_resnet(name: str | None, shape: tuple) -> str:
    if name is not None:
        return f"a {name}"
    bottleneck, depths, channels, _ = shape
    kind = "bottleneck" if bottleneck else "basic"
    return f"a ResNet of {'-'.join(map(str, depths))} {kind} blocks, the first with {channels} channels"


def fit_stem(state: dict[str, Tensor], in_channels: int) -> str:
    """Change conv1 in `state` to `in_channels`; returns what to say of it."""
    kernel = state.get("conv1.weight")
    if kernel is None or kernel.dim() != 4 or kernel.shape[1] == in_channels:
        return ""
    summed = kernel.sum(dim=1, keepdim=True)
    state["conv1.weight"] = summed.expand(-1, in_channels, -1, -1) / in_channels
    return f", stem of {kernel.shape[1]} channels summed to {in_channels}"


def fit_last_norm(state: dict[str, Tensor], encoder: Encoder) -> str:
    """Change the last norm in `state`, BatchNorm or IterNorm, to the encoder's; returns what to say of it.

    IterNorm may have the shapes of its authors' code: an affine of (1, C, 1, 1), a mean of (G, C / G, 1).
    """
    name, note = encoder.last_norm, ""
    norm = encoder.get_submodule(name)
    own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    channels = encoder.channels["layer4"]
    if "running_wm" in own and "running_mean" in own:
        matrix, mean = own["running_wm"], own["running_mean"]
        square = matrix.dim() == 3 and matrix.shape[1] == matrix.shape[2]
        if not square or not len(matrix) * matrix.shape[1] == mean.numel() == channels:
            return ""
        state.update({f"{name}.{key}": own[key].flatten() for key in ("weight", "bias") if key in own})
        if isinstance(norm, IterNorm) and matrix.shape == norm.running_wm.shape:
            state[f"{name}.running_mean"] = mean.view(matrix.shape[:2])
        elif f"{encoder.last_conv}.weight" in state:
            fold_whitening(state, encoder.last_conv, name, matrix)
            note = f", whitening of {name} folded into {encoder.last_conv}"
    if not isinstance(norm, Whitening) or f"{name}.running_var" not in state:
        return note
    mean, variance = state.get(f"{name}.running_mean"), state.pop(f"{name}.running_var")
    if mean is not None and mean.numel() == variance.numel() == channels:
        shape = (norm.num_groups, norm.group_size)
        state[f"{name}.running_mean"] = mean.reshape(shape)
        covariance = torch.diag_embed(variance.reshape(shape))
        if isinstance(norm, ZCAWhitening):
            state[f"{name}.running_cov"] = covariance
        else:
            state[f"{name}.running_wm"] = inverse_sqrt(covariance, norm.eps)
    return note + f", {name} turned into whitening of its variances"
