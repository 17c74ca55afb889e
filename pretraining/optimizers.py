"""The optimisers: SGD, AdamW, LARS, LARC, all fused: only those skip a step by `found_inf` (guard.py)."""

import torch

from engine.config import Config
from engine.files import first_averages
from moco import Method


class LARS(torch.optim.SGD):
    """SGD with layer-wise adaptive rates (arXiv 1708.03888), as SimCLR, BYOL, Barlow Twins, VICReg and PixPro
    use it: the gradient of each tensor, weight decay included, gets the length `trust` times that of the
    weights. Groups with "adaptive": False (biases and norms) take plain steps, which grow with the loss."""

    trust = 0.001

    @torch.no_grad()
    def step(self, closure=None):
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            if group["adaptive"]:
                self.adapt([p for p in group["params"] if p.grad is not None], group["weight_decay"])
                group["weight_decay"] = 0.0  # it is in the gradients
        super().step(closure)
        for group, decay in zip(self.param_groups, decays):
            group["weight_decay"] = decay

    def adapt(self, weights: list[torch.Tensor], decay: float) -> None:
        gradients, lengths = [p.grad for p in weights], torch._foreach_norm(weights)
        slopes = self.decayed(gradients, weights, lengths, decay)
        rates = [
            torch.where((length > 0) & (slope > 0), self.trust * length / slope, 1.0)
            for length, slope in zip(lengths, slopes)
        ]
        torch._foreach_mul_(gradients, rates)

    def decayed(self, gradients, weights, lengths, decay: float) -> list[torch.Tensor]:
        """Adds the decay to the gradients; the length of each by which it is divided."""
        torch._foreach_add_(gradients, weights, alpha=decay)
        return torch._foreach_norm(gradients)


class LARC(LARS):
    """As SwAV uses it, from apex: all tensors are adapted, and the lengths of gradient and decay are added
    up, as in equation 6 of the paper."""

    def decayed(self, gradients, weights, lengths, decay: float) -> list[torch.Tensor]:
        slopes = torch._foreach_norm(gradients)
        torch._foreach_add_(gradients, weights, alpha=decay)
        return [slope + decay * length for slope, length in zip(slopes, lengths)]


def make_optimizer(cfg: Config, model: Method) -> torch.optim.Optimizer:
    """optim.name over the trained parameters. With LARS and AdamW biases and norms have no weight decay, with
    SGD and LARC they have.

    A group's "constant": its rate stays optim.lr (Method.at_constant_rate).
    """
    optim, groups = cfg.optim, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            constant = name.split(".")[0] in model.at_constant_rate
            plain = optim.name in ("lars", "adamw") and parameter.dim() < 2
            groups.setdefault((constant, plain), []).append(parameter)
    named = [
        {
            "params": parameters,
            "constant": constant,
            "weight_decay": 0.0 if plain else optim.weight_decay,
            "adaptive": not plain,
        }
        for (constant, plain), parameters in groups.items()
    ]
    if optim.name == "adamw":
        optimizer = torch.optim.AdamW(named, optim.lr, fused=True)
    else:
        kind = {"sgd": torch.optim.SGD, "lars": LARS, "larc": LARC}[optim.name]
        optimizer = kind(named, optim.lr, optim.momentum, fused=True)
    for parameter in (p for group in named for p in group["params"]):
        # From the start: a first step that is skipped would leave them undefined.
        optimizer.state[parameter] = first_averages(optimizer, parameter)
    return optimizer
