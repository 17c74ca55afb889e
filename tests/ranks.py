"""Steps of methods on one rank's share of some global batches, for test_methods.py.

python tests/ranks.py FOLDER WORLD PORT torch.float64 STEPS SAMPLES SPLITS RANK      one of WORLD processes
"""

import sys
from pathlib import Path

import torch
from every_method import batches_for, small_with_additions, take_step, trained_parameters
from torch.nn.parallel import DistributedDataParallel

from losses import gather
from methods import METHODS
from moco import permuted_rows
from pretraining.run_state import average_running_statistics


def train_on_rank(name, rank, world, dtype, steps, split, samples):
    """Some steps of a method on this rank's share of the same global batches of `samples`, BatchNorm over
    `split` of them -> the terms of each step, means over ranks; all state, with mean running statistics; the
    gradients of the last step."""
    model = small_with_additions(name, bn_split=split).to(dtype)
    trained = DistributedDataParallel(model, broadcast_buffers=False) if world > 1 else model
    optimizer = torch.optim.SGD(trained_parameters(model).values(), lr=1e-3, momentum=0.9)
    mine = slice(samples // world * rank, samples // world * (rank + 1))
    history = []
    for step, (views, boxes) in enumerate(batches_for(name, steps, samples, dtype)):
        model.progress = step / steps
        own = [view[mine] for view in views], [box[mine] for box in boxes]
        terms, _ = take_step(model, optimizer, *own, trained=trained)
        values = torch.stack([value.double() for value in terms.values()])
        if world > 1:
            torch.distributed.all_reduce(values)
        history.append(dict(zip(terms, (values / world).tolist())))
    average_running_statistics(model)
    gradients = {name: p.grad for name, p in trained_parameters(model).items()}
    return history, model.state_dict(), gradients


def train_all(rank, world, dtype, steps, samples, splits):
    """{(name, split): what train_on_rank returns}, every method after the other in the same processes."""
    torch.set_num_threads(1)
    return {
        (name, split): train_on_rank(name, rank, world, dtype, steps, split, samples)
        for name in METHODS
        for split in splits
    }


if __name__ == "__main__":
    folder, world, port, dtype, steps, samples, splits, rank = sys.argv[1:]
    splits = [int(split) for split in splits.split(",")]
    rank, world, dtype = int(rank), int(world), getattr(torch, dtype.removeprefix("torch."))
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    own = torch.randn(3, 2, 5, dtype=dtype, generator=torch.Generator().manual_seed(rank))
    order = torch.randperm(3 * world, generator=torch.Generator().manual_seed(world))
    assert torch.equal(permuted_rows(own, order), gather(own)[order][3 * rank : 3 * rank + 3])
    torch.save(train_all(rank, world, dtype, int(steps), int(samples), splits), Path(folder) / f"{rank}.pth")
    torch.distributed.destroy_process_group()
