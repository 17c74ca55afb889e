"""Bad steps of pretraining, whose loss or gradient is not finite: found, undone, and given an account of."""

import json
from pathlib import Path

import torch
from torch import Tensor

from engine.files import write_whole
from moco import Method


class NotFinite(ArithmeticError):
    """Too many steps in a row whose loss or gradient was not finite; the message is one line."""


class Guard:
    """A step whose loss or gradient is not finite changes nothing, on all processes alike.

    Nobody waits for the device to know: fused optimisers skip a step by themselves (`found_inf`, as for
    GradScaler), momentum encoder and queue take `ok`, and the running statistics, which the forward passes
    have moved by then, are put back. After `most` such steps in a row every further one counts as bad, so
    that a host that learns of it late finds the state from before them.
    """

    def __init__(self, model: Method, optimizer: torch.optim.Optimizer, most: int):
        self.optimizer, self.most = optimizer, most
        counters = [b for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
        self.moved = [running_statistics(model), counters]  # by a forward pass
        device = next(model.parameters()).device
        self.in_row, self.skipped = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))

    def remember(self) -> None:
        """Call before the forward passes of a step."""
        self.before = [joined(tensors) for tensors in self.moved]

    def judge(self, loss: Tensor) -> Tensor:
        """Whether the step counts, a bool scalar, from its loss (mean over processes) and its gradients."""
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        self.norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        ok = torch.isfinite(loss) & torch.isfinite(self.norm) & (self.in_row < self.most)
        self.in_row = torch.where(ok, 0, self.in_row + 1)
        self.skipped += ~ok
        self.optimizer.found_inf = (~ok).float()
        return ok

    def restore_unless(self, ok: Tensor) -> None:
        """Call after the step."""
        for tensors, before in zip(self.moved, self.before):
            kept = torch.where(ok, joined(tensors), before).split([t.numel() for t in tensors])
            torch._foreach_copy_(tensors, [value.view_as(t) for value, t in zip(kept, tensors)])

    def forget_row(self) -> None:
        self.skipped -= self.in_row
        self.in_row.zero_()

    def counts(self) -> dict[str, Tensor]:
        return {"gradient_norm": self.norm, "bad_in_row": self.in_row, "skipped_steps": self.skipped}


def running_statistics(model: Method) -> list[Tensor]:
    """The running averages of all norms, which a forward pass in training moves."""
    return [b for name, b in model.named_buffers() if name.rpartition(".")[2].startswith("running_")]


def joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def bad_steps_text(bad: dict[int, dict], slices_of, folder: Path, write: bool) -> str:
    """One line about the bad steps in a row that end a run; with `write`, all of it in bad_steps.json.

    bad: {step: its terms}. slices_of: step (from 0) -> names of the slices of its global batch.
    """
    rows = [
        {
            "step": step,
            "terms": {name: str(terms[name]) for name in (*losses_of(terms), "gradient_norm")},
            "slices": slices_of(step - 1),
        }
        for step, terms in bad.items()
    ]
    if write:
        write_whole(folder / "bad_steps.json", json.dumps(rows, indent=1) + "\n")
    slices = ", ".join(rows[-1]["slices"][:4]) + (" ..." if len(rows[-1]["slices"]) > 4 else "")
    first, last = rows[0]["step"], rows[-1]["step"]
    return (
        f"run.max_bad_steps: steps {first} to {last} were not finite, the last one with "
        f"{terms_text(bad[last])}; its slices: {slices}; all in {folder / 'bad_steps.json'}; "
        "the checkpoint is from before them"
    )


# What a step's row holds besides the terms of Method.forward.
EVENTS = ("unreadable", "stop", "save", "gradient_norm", "bad_in_row", "skipped_steps")


def losses_of(row: dict[str, float]) -> dict[str, float]:
    """The terms of Method.forward in a step's row: "loss", "global", "local", and what else a method says."""
    named = {name: value for name, value in row.items() if name not in EVENTS}
    return {"loss": named.pop("loss")} | named


def terms_text(terms: dict[str, float]) -> str:
    named = {name: terms[name] for name in ("loss", "global", "local")} | {"gradient": terms["gradient_norm"]}
    return ", ".join(f"{name} {value:.3g}" for name, value in named.items())
