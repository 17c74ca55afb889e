"""The networks: a ResNet encoder, and the two decoders that judge it.

    Encoder             torchvision's ResNet trunk, with split BatchNorm, dilation and optional whitening
    LinearDecoder, DeepLabV3Plus

Copy this file together with losses.py; it needs torch and torchvision only. moco.py pretrains an encoder,
weights.py loads files of weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from losses import IterNorm, SumOverRanks, Whitening, ZCAWhitening, at_least_float32, world_size

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


def split_batch_norms(module: nn.Module, split: int) -> None:
    for one in module.modules():
        if isinstance(one, SplitBatchNorm2d):
            one.split = split


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
