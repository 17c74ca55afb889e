"""Steps of other implementations of MoCo v2 beside ours, for bench.py; what cannot be run is named.

    facebookresearch/moco  a checkout given with --moco: its builder, and its loop's loss, accuracy and SGD
    lightly                installed: the modules that its MoCo example puts together
    vturrisi/solo-learn    a checkout given with --solo: MoCoV2Plus.training_step. Its loss is symmetric (both
                           views are queries and keys), so it computes twice as much; halved time is given too

Each as shipped (three channels, fp32 where its default is that) and at its best setting here:
channels_last, and bf16. Without a GPU `.cuda()` is made to do nothing, and moco's collectives run in a gloo
group of one process; nothing else of theirs is changed.
"""

import copy
import importlib
import socket
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torchvision
from bench_timing import device, interleaved, over
from torch import nn


def peers(args, moco_step) -> tuple[str, dict]:
    """ours: one channel, channels_last, as train_moco.py has it."""
    steps, skipped = {}, {}
    with one_process():
        for best in (False, True):
            theirs = {"moco": moco_peer, "lightly": lightly_peer, "solo-learn": solo_peer}
            steps[label("ours", best)] = moco_step(with_bf16(args, best))
            for name, make in theirs.items():
                try:
                    step = make(args, best)
                    step()
                    steps[label(name, best)] = step
                except Exception as error:  # of a package that is missing, or does not fit this PyTorch
                    skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        times = interleaved(steps, args.rounds, args.busy)
    shipped = over({name: own for name, own in times.items() if "best" not in name}, "ours")
    best = over({name: own for name, own in times.items() if "best" in name}, label("ours", True))
    ratios = shipped["ratios"] | best["ratios"]
    text = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items() if not name.startswith("ours"))
    for name, reason in skipped.items():
        text += f"; skipped {name} ({reason})"
    return f"over our step: {text}", {"shipped": shipped, "best": best, "skipped": skipped}


def label(name: str, best: bool) -> str:
    return f"{name} at best" if best else name


def with_bf16(args, best: bool):
    args = copy.copy(args)
    args.bf16 = best
    return args


@contextmanager
def one_process():
    """A process group of this process alone, and `.cuda()` that stays on the CPU if there is no GPU."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    originals = torch.Tensor.cuda, nn.Module.cuda
    if not torch.cuda.is_available():
        torch.Tensor.cuda = nn.Module.cuda = lambda self, *args, **kwargs: self
    try:
        yield
    finally:
        torch.Tensor.cuda, nn.Module.cuda = originals
        dist.destroy_process_group()


def placed(model: nn.Module, args, best: bool) -> tuple[nn.Module, torch.Tensor, torch.autocast]:
    """The model, two views of three channels (2, N, 3, H, W), and the precision of a setting."""
    layout = torch.channels_last if best else torch.contiguous_format
    views = torch.randn(2, args.batch, 3, args.size, args.size, device=device())
    views = torch.stack([view.contiguous(memory_format=layout) for view in views])
    autocast = torch.autocast(device().type, torch.bfloat16, enabled=best)
    return model.to(device(), memory_format=layout).train(), views, autocast


def sgd(parameters) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=1e-4)


@contextmanager
def importable(folder: str | None, name: str):
    if folder is None:
        raise FileNotFoundError(f"no checkout given with --{name}")
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def moco_peer(args, best: bool):
    with importable(args.moco, "moco"):
        builder = importlib.import_module("moco.builder")
    network = getattr(torchvision.models, args.arch)
    model, views, autocast = placed(builder.MoCo(network, 128, args.queue, 0.999, 0.2, mlp=True), args, best)
    optimizer = sgd([p for p in model.parameters() if p.requires_grad])

    def step() -> None:
        with autocast:
            output, target = model(im_q=views[0], im_k=views[1])
            loss = nn.functional.cross_entropy(output, target)
        with torch.no_grad():  # its loop's accuracy and loss.item()
            (output.topk(5, 1).indices == target[:, None]).float().sum().item(), loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def lightly_peer(args, best: bool):
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            network = getattr(torchvision.models, args.arch)()
            width = network.fc.in_features
            self.backbone = nn.Sequential(*list(network.children())[:-1])
            self.projection_head = MoCoProjectionHead(width, width, 128)
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            deactivate_requires_grad(self.backbone_momentum)
            deactivate_requires_grad(self.projection_head_momentum)

    model, views, autocast = placed(Model(), args, best)
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(args.queue, 128)).to(device())
    optimizer = sgd([p for p in model.parameters() if p.requires_grad])

    def step() -> None:
        update_momentum(model.backbone, model.backbone_momentum, m=0.999)
        update_momentum(model.projection_head, model.projection_head_momentum, m=0.999)
        with autocast:
            query = model.projection_head(model.backbone(views[0]).flatten(start_dim=1))
            with torch.no_grad():
                key = model.projection_head_momentum(model.backbone_momentum(views[1]).flatten(start_dim=1))
            loss = criterion(query, key)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def solo_peer(args, best: bool):
    with importable(args.solo, "solo"):
        from omegaconf import OmegaConf
        from solo.methods.mocov2plus import MoCoV2Plus

    settings = {
        "method": "mocov2plus",
        "backbone": {"name": args.arch, "kwargs": {}},
        "data": {"dataset": "imagenet100", "num_classes": 100, "num_large_crops": 2, "num_small_crops": 0},
        "max_epochs": 1,
        "optimizer": {"name": "sgd", "batch_size": args.batch, "lr": 0.01, "weight_decay": 1e-4},
        "scheduler": {"name": "none"},
        "momentum": {"base_tau": 0.999, "final_tau": 0.999},
        "method_kwargs": {"proj_hidden_dim": 2048, "proj_output_dim": 128, "temperature": 0.2},
    }
    settings["optimizer"]["classifier_lr"] = 0.01
    settings["method_kwargs"]["queue_size"] = args.queue
    model, views, autocast = placed(MoCoV2Plus(OmegaConf.create(settings)), args, best)
    model.log = model.log_dict = lambda *args, **kwargs: None  # there is no trainer
    optimizer = sgd([p for group in model.learnable_params for p in group["params"]])
    labels = torch.zeros(args.batch, dtype=torch.long, device=device())

    def step() -> None:
        with autocast:
            loss = model.training_step([labels, [views[0], views[1]], labels], 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for online, momentum in model.momentum_pairs:
            model.momentum_updater.update(online, momentum)

    return step
