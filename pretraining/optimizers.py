"""The optimisers: SGD, AdamW and LARS, all fused, since only those skip a step by `found_inf` (guard.py)."""

import torch

from engine.config import Config
from engine.files import first_averages
from models import Method


class LARS(torch.optim.SGD):
    """SGD with layer-wise adaptive rates (arXiv 1708.03888), as SimCLR, BYOL and Barlow Twins use it: the
    gradient of each tensor, weight decay included, gets the length `trust` times that of the weights. Groups
    with "adaptive": False (biases and norms) take plain steps."""

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
        gradients = [p.grad for p in weights]
        torch._foreach_add_(gradients, weights, alpha=decay)
        lengths, slopes = torch._foreach_norm(weights), torch._foreach_norm(gradients)
        rates = [
            torch.where((length > 0) & (slope > 0), self.trust * length / slope, 1.0)
            for length, slope in zip(lengths, slopes)
        ]
        torch._foreach_mul_(gradients, rates)


def make_optimizer(cfg: Config, model: Method) -> torch.optim.Optimizer:
    """optim.name over the trained parameters. With LARS and AdamW biases and norms have no weight decay.

    A group's "constant": its rate stays optim.lr (Method.at_constant_rate).
    """
    optim, groups = cfg.optim, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            constant = name.split(".")[0] in model.at_constant_rate
            plain = optim.name != "sgd" and parameter.dim() < 2
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
        kind = LARS if optim.name == "lars" else torch.optim.SGD
        optimizer = kind(named, optim.lr, optim.momentum, fused=True)
    for parameter in (p for group in named for p in group["params"]):
        # From the start: a first step that is skipped would leave them undefined.
        optimizer.state[parameter] = first_averages(optimizer, parameter)
    return optimizer
