"""A small instance of each of methods.METHODS, batches for it, and a step as train_moco.py takes it."""

import torch

from methods import METHODS
from models import Encoder
from pretraining.method_settings import SETTINGS, defaults_of

# Whatever of these a class has as an argument, its small instance gets.
SMALL = dict(dim=8, hidden=16, local_dim=8, queue_size=20, momentum=0.9, prototypes=12, matches=3)
ALONE = {"spark"}  # those that neither the local loss nor whitening can be added to
LOCAL, ZCA = {"grid": 2}, {"method": "zca", "group_size": 4}


def small(name, encoder=None, **common):
    """A method by name, its heads a few numbers wide, seeded; common: see moco.Method."""
    torch.manual_seed(0)
    own = defaults_of(METHODS[name])
    return METHODS[name](encoder or Encoder("tiny"), **{k: v for k, v in SMALL.items() if k in own}, **common)


def small_with_additions(name, **common):
    """The same with the paper's additions where the method takes them: regions, whitening."""
    if name in ALONE:
        return small(name, **common)
    return small(name, local={**LOCAL, "negatives": "batch"}, decorrelation=ZCA, **common)


def small_settings(name):
    """Overrides for train_moco.py that make the same of a run on the tiny phantom."""
    own = defaults_of(METHODS[name])
    settings = [f"model.{k}={v}" for k, v in SMALL.items() if k in own and k in SETTINGS]
    if name not in ALONE:
        settings += ["local.weight=0.5", "decorrelation.method=zca"]
    if METHODS[name].small_crops:
        settings += ["augment.small_crops=1", "augment.small_size=32"]
    return [f"method={name}", "data.size=64", *settings]


def random_boxes(n, generator):
    low = torch.rand(n, 2, generator=generator, dtype=torch.float64) * 0.1
    side = 0.6 + 0.2 * torch.rand(n, 2, generator=generator, dtype=torch.float64)
    flip = torch.randint(2, (n, 1), generator=generator).double()
    return torch.cat([low, low + side, flip], dim=1)


def training_batches(steps, n=8, size=64):
    """For each step two views (n, 1, size, size) and a box (n, 5) of each. Images differ in more than noise:
    networks made of norms over few of them magnify small differences, and those of rounding with them."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(steps):
        coarse = torch.randn(2, n, 1, 4, 4, generator=generator, dtype=torch.float64)
        coarse = coarse.repeat_interleave(size // 4, 3).repeat_interleave(size // 4, 4)
        fine = torch.randn(2, n, 1, size, size, generator=generator, dtype=torch.float64)
        views = coarse + 0.5 * fine
        yield views[0], views[1], random_boxes(n, generator), random_boxes(n, generator)


def batches_for(name, steps, n=8, dtype=torch.float32):
    """(views, boxes) for each step, in the type; with a small crop for those that use it."""
    for first, second, *boxes in training_batches(steps, n):
        small_crop = [first[..., :32, 16:48]] if METHODS[name].small_crops else []
        yield [x.to(dtype) for x in (first, second, *small_crop)], [box.to(dtype) for box in boxes]


def take_step(model, optimizer, views, boxes, trained=None, guard=None):
    """A step of train_moco.py without accumulation -> its terms, and whether it counts. `trained`: the model
    inside DistributedDataParallel. Gradients stay, for who wants to see them."""
    optimizer.zero_grad()
    if guard is not None:
        guard.remember()
    targets = model.targets(views, boxes)
    terms = (trained or model)(views, boxes, targets)
    terms["loss"].backward()
    ok = None if guard is None else guard.judge(terms["loss"].detach())
    optimizer.step()
    model.after_step(targets, ok)
    if guard is not None:
        guard.restore_unless(ok)
    return {name: value.detach() for name, value in terms.items()}, ok is None or bool(ok)


def trained_parameters(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def optim_settings(name, **changes):
    """The section `optim` of a config, of an optimiser that turns every gradient into a visible step."""
    lr = {"sgd": 0.05, "lars": 0.5, "larc": 0.5, "adamw": 1e-3}[name]
    return {"optim": {"name": name, "lr": lr, "momentum": 0.9, "weight_decay": 1e-3, **changes}}
