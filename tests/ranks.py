"""Steps of the full method on one rank's share of some global batches, for test_models.py.

python tests/ranks.py FOLDER WORLD PORT torch.float64 STEPS RANK      one of WORLD processes
"""

import sys
from pathlib import Path

import torch
from torch import nn

from losses import gather
from models import Encoder, MoCo, permuted_rows
from pretraining.run_state import average_running_statistics


def random_boxes(n, generator):
    low = torch.rand(n, 2, generator=generator, dtype=torch.float64) * 0.5
    side = 0.3 + 0.2 * torch.rand(n, 2, generator=generator, dtype=torch.float64)
    flip = torch.randint(2, (n, 1), generator=generator).double()
    return torch.cat([low, low + side, flip], dim=1)


def training_batches(steps, n=8, size=64):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        views = torch.randn(2, n, 1, size, size, generator=generator, dtype=torch.float64)
        yield views[0], views[1], random_boxes(n, generator), random_boxes(n, generator)


def train_on_rank(rank, world, port, results, dtype, steps):
    """Steps of the full method on this rank's share of the same global batches."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
        )
    own = torch.randn(3, 2, 5, dtype=dtype, generator=torch.Generator().manual_seed(rank))
    order = torch.randperm(3 * world, generator=torch.Generator().manual_seed(steps))
    assert torch.equal(permuted_rows(own, order), gather(own)[order][3 * rank : 3 * rank + 3])
    moco = MoCo(
        Encoder("tiny", whitening="zca", group_size=4),
        dim=8,
        queue_size=20,
        momentum=0.9,
        local={"grid": 2, "negatives": "batch"},
        decorrelation={"method": "zca", "group_size": 4},
        bn_split=2,
    ).to(dtype)
    trained = moco
    if world > 1:
        trained = nn.parallel.DistributedDataParallel(moco, broadcast_buffers=False)
    optimizer = torch.optim.SGD(moco.query.parameters(), lr=0.01)
    mine = slice(8 // world * rank, 8 // world * (rank + 1))
    losses = []
    for batch in training_batches(steps):
        terms = trained(*(x[mine].to(dtype) for x in batch))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        loss = terms["loss"].detach()
        if world > 1:
            torch.distributed.all_reduce(loss)
        losses.append(loss.item() / world)
    average_running_statistics(moco)
    torch.save(
        (losses, moco.state_dict(), [p.grad for p in moco.query.parameters()]), results / f"{rank}.pth"
    )
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    folder, world, port, dtype, steps, rank = sys.argv[1:]
    dtype = getattr(torch, dtype.removeprefix("torch."))
    train_on_rank(int(rank), int(world), int(port), Path(folder), dtype, int(steps))
