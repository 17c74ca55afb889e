"""Benchmarks, run by hand; ratios within one run, medians of interleaved steps.

    python tests/bench.py method [--arch resnet50 --size 224 --batch 32]    # cost of each part of the method

Prints one readable line and one JSON line.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from models import Encoder, MoCo

METHODS = {
    "moco": {},
    "local, overlap": {"local": {}},
    "zca at output": {"decorrelation": {"method": "zca"}},
    "zca at bn3": {"whitening": "zca"},
    "iternorm at bn3": {"whitening": "iternorm"},
    "full": {"local": {}, "decorrelation": {"method": "zca"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=["method"])
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output-stride", type=int, default=32)
    parser.add_argument("--queue", type=int, default=512)
    parser.add_argument("--split", type=int, default=8, help="model.bn_split")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    row = method(args)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    row |= {"settings": vars(args), "device": device, "threads": torch.get_num_threads()}
    print(", ".join(f"{name} {cost:.3f}" for name, cost in row["ratios"].items()), "of moco's step")
    print(json.dumps(row | {"torch": torch.__version__, "cores": os.cpu_count()}))


def method(args) -> dict:
    """The step (losses, gradients, SGD, momentum encoder, queue) of each method over that of MoCo v2."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = {name: make_step(options, args, device) for name, options in METHODS.items()}
    times = {name: [] for name in steps}
    for round_ in range(args.rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_ >= 2:
                times[name].append(time.perf_counter() - start)
    base = times["moco"]
    ratios = {name: [a / b for a, b in zip(own, base)] for name, own in times.items()}
    return {
        "ratios": {name: round(median(own), 4) for name, own in ratios.items()},
        "quartiles": {
            name: [round(sorted(own)[len(own) * q // 4], 4) for q in (1, 3)] for name, own in ratios.items()
        },
        "milliseconds": {name: round(1000 * median(own), 2) for name, own in times.items()},
    }


def make_step(options: dict, args, device: torch.device):
    options = dict(options)
    encoder = Encoder(args.arch, whitening=options.pop("whitening", "none"), output_stride=args.output_stride)
    moco = MoCo(encoder, queue_size=args.queue, bn_split=args.split, **options)
    moco = moco.to(device, memory_format=torch.channels_last)
    parameters = [p for p in moco.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.01, 0.9, weight_decay=1e-4, fused=True)
    views = torch.randn(2, args.batch, 1, args.size, args.size, device=device)
    box = torch.tensor([[0.1, 0.1, 0.8, 0.9, 0.0]], device=device).expand(args.batch, 5)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = moco(views[0], views[1], box, box)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
