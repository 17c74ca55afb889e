"""Benchmarks, run by hand: every number is a ratio of things done in turn in one run.

    python tests/bench.py step      # the bare compute over our MoCo v2 step
    python tests/bench.py method    # cost of each part of the method
    python tests/bench.py methods   # time and memory of a step of each of methods.METHODS
    python tests/bench.py run       # train_moco.py on a packed set over the step on data in memory
    python tests/bench.py peers --moco DIR --solo DIR    # other implementations, as shipped and at their best
    python tests/bench.py augment   # two views against torchvision.transforms.v2
    python tests/bench.py read      # a packed set against 16-bit PNG
    python tests/bench.py linear    # linear evaluation, cached features against none
    python tests/bench.py startup   # train_moco.py --help, and its first step
    python tests/bench.py memory    # peak of a step against that of the bare compute

Each takes --arch, --size, --batch and more, and prints one readable line and one JSON line. On a GPU
the compute is in bf16, on a CPU in fp32 unless --bf16 is given. docs/PERFORMANCE.md has what they gave.
"""

import argparse
import copy
import json
import multiprocessing
import re
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from statistics import median
from unittest import mock

import torch
import torch.nn.functional as F

PROJECT = Path(__file__).parent.parent
sys.path[:0] = [str(PROJECT), str(Path(__file__).parent)]
import bench_data  # noqa: E402
import bench_peers  # noqa: E402
from bench_timing import WARM_UP, device, interleaved, machine, over, synchronise  # noqa: E402

from methods import METHODS  # noqa: E402
from moco import Branch, MoCo  # noqa: E402
from models import Encoder  # noqa: E402
from pretraining.method_settings import defaults_of  # noqa: E402

PARTS = {
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
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=64, help="of the views, px")
    parser.add_argument("--source", type=int, default=512, help="of the slices, px")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--output-stride", type=int, default=32)
    parser.add_argument("--queue", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--split", type=int, default=32, help="model.bn_split")
    parser.add_argument("--bf16", action="store_true", help="on a CPU too")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--busy", action="store_true", help="what a busy machine spares (CPU only)")
    parser.add_argument("--only", nargs="+", help="of the parts of the method")
    parser.add_argument("--moco", help="a checkout of facebookresearch/moco")
    parser.add_argument("--solo", help="a checkout of vturrisi/solo-learn")
    args = parser.parse_args()
    line, row = BENCHMARKS[args.benchmark](args)
    print(f"{args.benchmark}: {line}")
    print(json.dumps({"benchmark": args.benchmark, **row, "settings": vars(args), **machine()}))


# ---------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------


def make_moco(args, local=None, decorrelation=None, whitening="none") -> MoCo:
    if decorrelation:
        decorrelation = decorrelation | {"group_size": args.group_size}
    encoder = Encoder(args.arch, 1, whitening, args.group_size, args.output_stride)
    moco = MoCo(encoder, queue_size=args.queue, bn_split=args.split, local=local, decorrelation=decorrelation)
    return moco.to(device(), memory_format=torch.channels_last)


def make_optimizer(model) -> torch.optim.SGD:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, 0.01, 0.9, weight_decay=1e-4, fused=True)


def make_views(args) -> torch.Tensor:
    return torch.randn(2, args.batch, 1, args.size, args.size, device=device())


def precision(args):
    return torch.autocast(device().type, torch.bfloat16, enabled=args.bf16 or device().type == "cuda")


def moco_step(args, **method):
    """One step of training: momentum encoder, losses, gradients, SGD, queue."""
    moco = make_moco(args, **method)
    optimizer = make_optimizer(moco)
    views = make_views(args)
    box = torch.tensor([[0.1, 0.1, 0.8, 0.9, 0.0]], device=device()).expand(args.batch, 5)

    def step() -> None:
        with precision(args):
            targets = moco.targets(views, [box, box])
            loss = moco(views, [box, box], targets)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        moco.after_step(targets)

    return step


def bare_step(args):
    """The compute that no implementation can leave out: query forward and backward, key forward, SGD."""
    query: Branch = make_moco(args).query
    key = copy.deepcopy(query).requires_grad_(False)
    optimizer = make_optimizer(query)
    views = make_views(args)

    def step() -> None:
        with precision(args):
            with torch.no_grad():
                key(views[1])
            projection, _ = query(views[0])
        F.normalize(projection.float(), dim=1).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def step(args) -> tuple[str, dict]:
    row = over(
        interleaved({"bare": bare_step(args), "ours": moco_step(args)}, args.rounds, args.busy), "bare"
    )
    reached = round(1 / row["ratios"]["ours"], 3)
    row["bare_over_ours"] = reached
    cost = row["milliseconds"]
    return f"bare compute {cost['bare']} ms, ours {cost['ours']} ms: {reached} of it reached", row


def method(args) -> tuple[str, dict]:
    """The step of each method over that of MoCo v2."""
    chosen = {name: options for name, options in PARTS.items() if name in (args.only or PARTS)}
    steps = {name: moco_step(args, **options) for name, options in ({"moco": {}} | chosen).items()}
    row = over(interleaved(steps, args.rounds, args.busy), "moco")
    return ", ".join(f"{name} {cost:.3f}" for name, cost in row["ratios"].items()) + " of moco's step", row


def method_step(args):
    """One step of train_moco.py's loop with args.method, with its class's own values."""
    encoder = Encoder(args.arch, 1, output_stride=args.output_stride)
    own = {"queue_size": args.queue} if "queue_size" in defaults_of(METHODS[args.method]) else {}
    model = METHODS[args.method](encoder, bn_split=args.split, **own)
    model.to(device(), memory_format=torch.channels_last)
    optimizer = make_optimizer(model)
    views = list(make_views(args))
    boxes = [torch.tensor([[0.1, 0.1, 0.8, 0.9, 0.0]], device=device()).expand(args.batch, 5)] * 2

    def step() -> None:
        with precision(args):
            targets = model.targets(views, boxes)
            loss = model(views, boxes, targets)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.after_step(targets)

    return step


def methods(args) -> tuple[str, dict]:
    """The steps of all methods over that of MoCo v2, and their peaks of memory."""
    names = ["moco", *(name for name in METHODS if name != "moco" and name in (args.only or METHODS))]
    each = {name: argparse.Namespace(**{**vars(args), "method": name}) for name in names}
    row = over(
        interleaved({name: method_step(own) for name, own in each.items()}, args.rounds, args.busy), "moco"
    )
    mib = {name: peak_of(method_step, own) for name, own in each.items()}
    row |= {
        "mebibytes": mib,
        "memory_ratios": {name: round(own / mib["moco"], 3) for name, own in mib.items()},
    }
    shown = (f"{name} {cost:.2f} ({row['memory_ratios'][name]:.2f})" for name, cost in row["ratios"].items())
    return ", ".join(shown) + " of moco's time (memory)", row


# ---------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------


def settings(root: Path, out: Path, args, *more: str) -> list[str]:
    return [
        *(f"data.root={root}", f"run.out={out}", f"data.size={args.size}", f"model.arch={args.arch}"),
        *(f"optim.batch_size={args.batch}", f"model.queue_size={args.queue}", "log.tensorboard=false"),
        *(f"model.output_stride={args.output_stride}", f"model.bn_split={args.split}", "data.workers=0"),
        *("local.weight=0", "decorrelation.method=none", "run.save_minutes=0", "log.every=1"),
        f"run.precision={'bf16' if args.bf16 or device().type == 'cuda' else 'fp32'}",
        *("log.rank_every=0", "optim.epochs=100000", "run.save_steps=100000"),
        *more,
    ]


def run(args) -> tuple[str, dict]:
    """train_moco.py, started here, against steps on data in memory that are done between its own.

    They take turns: one step each on a CPU, ten on a GPU, where the run reads ahead while the last step is
    still being computed.
    """
    import train_moco  # here, because it takes seconds

    resident, turn = moco_step(args), 10 if device().type == "cuda" else 1
    times, steps, since = {"run": [], "resident": []}, 0, 0.0
    enqueue = MoCo.enqueue

    def enqueue_and_take_turns(moco, keys, ok=None) -> None:
        """The last call of a step of the run (in the resident step it has no `ok`)."""
        nonlocal steps, since
        enqueue(moco, keys, ok)
        if ok is None or (steps := steps + 1) % turn:
            return
        synchronise()
        between = time.perf_counter()
        for _ in range(turn):
            resident()
        synchronise()
        now = time.perf_counter()
        if steps > WARM_UP * turn:
            times["run"].append(between - since)
            times["resident"].append(now - between)
        since = now

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        root = bench_data.write_packed(Path(folder), 4 * args.batch, args.source)
        last = f"optim.max_steps={(args.rounds + WARM_UP) * turn}"
        with mock.patch.object(MoCo, "enqueue", enqueue_and_take_turns):
            train_moco.main(settings(root, Path(folder) / "run", args, last))
    row = over(times, "run") | {"steps_in_a_turn": turn}
    cost = row["milliseconds"]
    text = f"{turn} resident {cost['resident']} ms, in a run {cost['run']} ms"
    return f"{text}: {row['ratios']['resident']} of its speed reached", row


def startup(args) -> tuple[str, dict]:
    """Seconds until --help is printed, until torch is imported, and until train_moco.py has done a step."""
    seconds = {"help": [], "import torch": [], "first step": []}
    with tempfile.TemporaryDirectory() as folder:
        root = bench_data.write_packed(Path(folder), 4 * args.batch, args.source)
        for number in range(min(args.rounds, 3)):
            out = Path(folder) / f"run{number}"
            script = [sys.executable, str(PROJECT / "train_moco.py")]
            first = [*script, *settings(root, out, args, "optim.max_steps=10")]
            seconds["help"].append(seconds_until([*script, "--help"]))
            seconds["import torch"].append(seconds_until([sys.executable, "-c", "import torch"]))
            seconds["first step"].append(seconds_until(first, "step 1/"))
    row = {name: {"median": round(median(own), 2), "all": own} for name, own in seconds.items()}
    return ", ".join(f"{name} {times['median']} s" for name, times in row.items()), {"seconds": row}


def seconds_until(command: list[str], text: str | None = None) -> float:
    """Until a process prints the text, or ends."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if text and text in line:
            break
    process.kill() if text else process.wait()
    elapsed = time.perf_counter() - start
    process.stdout.close()
    process.wait()
    return round(elapsed, 2)


# ---------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------


def memory(args) -> tuple[str, dict]:
    """The peak of two steps in a process of their own, above what it held before the model was made."""
    makers = {"bare": bare_step, "moco": moco_step, "full": full_step}
    mib = {name: peak_of(make, args) for name, make in makers.items()}
    ratios = {name: round(own / mib["bare"], 3) for name, own in mib.items()}
    text = f"bare {mib['bare']} MiB, MoCo v2 {ratios['moco']} of it, full method {ratios['full']} of it"
    return text, {"mebibytes": mib, "ratios": ratios}


def full_step(args):
    return moco_step(args, **PARTS["full"])


def peak_of(make, args) -> float:
    """MiB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return round(pool.apply(peak, (make, args)) / 2**20, 1)


def peak(make, args) -> int:
    before = 0 if torch.cuda.is_available() else peak_resident()
    step = make(args)
    for _ in range(2):
        step()
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident() - before


def peak_resident() -> int:
    """Bytes. (ru_maxrss of a new process would begin with its parent's.)"""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status).group(1))
    except (OSError, AttributeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


BENCHMARKS = {
    "step": step,
    "method": method,
    "methods": methods,
    "run": run,
    "peers": lambda args: bench_peers.peers(args, moco_step),
    "augment": bench_data.augment,
    "read": bench_data.read,
    "linear": bench_data.linear,
    "startup": startup,
    "memory": memory,
}

if __name__ == "__main__":
    main()
