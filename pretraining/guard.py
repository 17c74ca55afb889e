"""Bad steps of pretraining, whose loss or gradient is not finite: how they are found and undone."""

import torch
from torch import Tensor

from models import MoCo


class NotFinite(ArithmeticError):
    """Too many steps in a row whose loss or gradient was not finite; the message is one line."""


class Guard:
    """A step whose loss or gradient is not finite changes nothing, on all processes alike.

    Nobody waits for the device to know: fused SGD skips a step by itself (`found_inf`, as for GradScaler),
    momentum encoder and queue take `ok`, and the running statistics, which the forward passes have
    moved by then, are put back. After `most` such steps in a row every further one counts as bad, so
    that a host that learns of it late finds the state from before them.
    """

    def __init__(self, model: MoCo, optimizer: torch.optim.SGD, most: int):
        self.optimizer, self.most = optimizer, most
        counters = [b for b in model.buffers() if b.dtype == torch.int64 and b is not model.queue_pointer]
        self.moved = [model.running_statistics(), counters]  # by a forward pass
        device = model.queue.device
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

    def put_back(self, ok: Tensor) -> None:
        """Call after the step."""
        for tensors, before in zip(self.moved, self.before):
            kept = torch.where(ok, joined(tensors), before).split([t.numel() for t in tensors])
            torch._foreach_copy_(tensors, [value.view_as(t) for value, t in zip(kept, tensors)])

    def forget_row(self) -> None:
        self.skipped -= self.in_row
        self.in_row.zero_()

    def counts(self) -> dict[str, Tensor]:
        return {"gradient_norm": self.norm, "bad_in_row": self.in_row, "skipped_steps": self.skipped}


def joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
