"""Pretrain an encoder on unlabelled slices: MoCo v2 + local features + feature decorrelation.

    python train_moco.py --config configs/phantom.yaml                                  # CPU or one GPU
    torchrun --nproc_per_node=8 train_moco.py --config configs/abdomen1k.yaml           # one node
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train_moco.py --config configs/abdomen1k.yaml optim.batch_size=2048             # many nodes

Any setting below can stand in the config file or behind the command as section.key=value. A run that was
stopped goes on when the same command is given again. Results, in run.out: encoder.pth (a torchvision ResNet
without fc), encoder.json, metrics.jsonl, config.yaml, checkpoint.pth; curves.png and spectrum.png if
matplotlib is installed, TensorBoard files if tensorboard is.
"""

import argparse
import hashlib
import json
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

import config
import runtime
from config import (
    Config,
    ConfigError,
    check,
    check_choice,
    check_fraction,
    check_not_negative,
    check_positive,
    check_range,
)
from data import DataError, Intensity, SliceDataset, TwoViews, default_window
from losses import effective_rank_of, singular_values
from models import ARCHITECTURES, LAYERS, Encoder, MoCo, WeightsError, load_encoder_weights, slices
from runtime import Process

DEFAULTS = """
seed: 0
run:
  out: runs/pretrain        # folder of the results
  device: auto              # auto | cpu | cuda
  precision: auto           # auto | fp32 | bf16; auto: bf16 where a GPU has it
  compile: false            # torch.compile the encoders: minutes at the start, some percent faster then
  save_steps: 0             # checkpoint every so many steps; 0: at the end of every epoch
  deterministic: false      # the same bits on the same GPU, slower; a CPU run always gives the same bits
data:
  root: null                # a data set's folder, or a packed set
  images: images            # folder of the slices below root; {split} is the list's name
  list: unlabelled.txt      # the slices to learn from
  val: val.txt              # the slices that the collapse monitor looks at; without this file those of list
  size: 224                 # side of the views, px
  window: auto              # [low, high] HU; auto: [-160, 240], or [0, 255] for 8-bit slices; null: unscaled
  hu_offset: 1024           # HU = 16-bit value - hu_offset
  mean: 0.5                 # of the windowed values; `data.py check` measures both
  std: 0.25
  workers: 4                # reading processes for each training process
augment:
  scale: [0.2, 1.0]         # area of a crop as a fraction of the slice
  flip: 0.0                 # probability; 0 because organs have sides
  brightness: 0.2           # strengths, 0 = off; see augment.TwoViews
  contrast: 0.2
  gamma: 0.2
  blur: 1.0                 # px
  noise: 0.05
  autocontrast: 0.0         # probabilities
  equalize: 0.0
model:
  arch: resnet50            # resnet18 | resnet34 | resnet50 | resnet101
  in_channels: 1
  output_stride: 32         # 32 | 16 | 8, during pretraining
  dim: 128
  queue_size: 65536         # negatives; keep it at half the training set or less
  momentum: 0.999           # of the momentum encoder
  temperature: 0.2
  init: random              # or a weights file to start from
  bn_split: 32              # samples normalised together; divides each process's part of the batch
local:
  weight: 0.5               # loss = global + weight * local; 0: off
  match: overlap            # overlap: the same anatomy in both views | grid: the same cell (the paper's)
  layer: layer4
  grid: 4                   # grid x grid regions
  temperature: 0.2
  min_overlap: 0.15         # of a crop's side; images whose views overlap less are left out
decorrelation:
  method: zca               # zca | iternorm | none
  position: output          # output: between trunk and heads | bn3: the trunk's last norm (the paper's)
  group_size: 64            # channels whitened together; 0: all
  eps: null                 # null: the method's own, 1e-3 for zca, 1e-5 for iternorm
  sync: true                # statistics over all processes
optim:
  epochs: 200
  batch_size: 256           # global: over all processes and accumulation steps
  accumulate: 1             # parts that each process's share of a batch is worked off in
  lr: 0.03                  # SGD with momentum, warm-up, then half a cosine to 0
  momentum: 0.9
  weight_decay: 1.0e-4
  warmup_epochs: 10.0
  max_steps: 0              # stop the schedule after so many steps; 0: after `epochs`
log:
  every: 10                 # steps between lines of metrics.jsonl
  tensorboard: true         # event files in run.out, if tensorboard is installed
  rank_every: 10            # epochs between measurements of collapse; 0: only at the start and the end
"""

NULLABLE = {"data.root": str, "data.window": (str, list), "data.val": str, "decorrelation.eps": float}

# Keys that may change between the parts of an interrupted run: they do not touch what is computed.
FREE = ("run.", "data.workers", "log.")

MONITORED = 2048  # slices (at most) and dense feature vectors that the collapse monitor measures


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    cfg = config.load_config(DEFAULTS, args.config, args.overrides, NULLABLE)
    check_config(cfg)
    process = runtime.start_process(cfg.run)
    torch.manual_seed(cfg.seed)

    dataset = SliceDataset(cfg.data.root, cfg.data.list, cfg.data.images, cfg.data.hu_offset)
    window = default_window(dataset.stored) if cfg.data.window == "auto" else cfg.data.window
    intensity = Intensity(window, cfg.data.mean, cfg.data.std)
    steps_per_epoch, total_steps = count_steps(cfg, len(dataset), process)
    model = build_model(cfg, process).to(process.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=cfg.optim.lr,
        momentum=cfg.optim.momentum,
        weight_decay=cfg.optim.weight_decay,
    )
    views = TwoViews(cfg.data.size, **cfg.augment, value_range=value_range(cfg, intensity, dataset.stored))

    folder = runtime.make_run_folder(cfg.run.out, process)
    step = resume(folder, cfg, model, optimizer)
    if step >= total_steps and (folder / "encoder.pth").exists():
        process.say(f"{folder} holds this run, finished after {step} steps; nothing to do")
        process.close()
        return 0
    process.barrier()  # nobody writes before all have read
    if process.is_main:
        runtime.write_whole(folder / "config.yaml", cfg.as_yaml())
    log = runtime.MetricsLog(folder, process, done=step, tensorboard=cfg.log.tensorboard)
    monitor = CollapseMonitor(cfg, dataset, intensity, process)
    process.say(
        f"{len(dataset)} slices of {dataset.size[0]} x {dataset.size[1]} px; {total_steps} steps, "
        f"{steps_per_epoch} an epoch; {process.world} x {process.device.type}, {process.precision}; "
        f"collapse measured on {len(monitor.slices)} slices"
        + (f"; going on from step {step}" if step else "")
    )

    if cfg.run.compile:
        model.query.encoder.compile()
        model.key.encoder.compile()
    trained = model
    if process.world > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions rename broadcast_buffers
            trained = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    local_batch = cfg.optim.batch_size // process.world
    offset = process.rank * local_batch  # global index of this process's first sample
    loader = DataLoader(
        dataset,
        batch_sampler=StepBatches(len(dataset), cfg.optim.batch_size, cfg.seed, process, step, total_steps),
        num_workers=cfg.data.workers,
        pin_memory=process.device.type == "cuda",
    )

    collapse = monitor.measure(model) if step == 0 else {}
    if collapse:
        log.write({"step": 0, "epoch": 0, **collapse})
    bar = runtime.progress(process, "pretrain", total=total_steps, initial=step)
    since, clock = step, time.perf_counter()
    model.train()
    for stored in loader:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps_per_epoch, total_steps, cfg.optim)

        unit = intensity.to_unit(stored.to(process.device, non_blocking=True))  # (n, 1, H, W) in [0, 1]
        generator = seeded("views", cfg.seed, step)
        query_view, key_view, query_box, key_box = views(unit, generator, offset, cfg.optim.batch_size)
        query_view, key_view = (
            intensity.normalise(view).expand(-1, cfg.model.in_channels, -1, -1)
            for view in (query_view, key_view)
        )

        with process.autocast():
            keys = model.encode_keys(key_view, query_box, key_box, parts=cfg.optim.accumulate)
        parts = slices(local_batch, cfg.optim.accumulate)
        terms = {}
        for i, rows in enumerate(parts):
            last = i == len(parts) - 1
            wait = nullcontext() if last or process.world == 1 else trained.no_sync()
            with wait:
                with process.autocast():
                    found = trained(query_view[rows], keys=keys.part(rows))
                (found["loss"] / len(parts)).backward()
            terms = {name: terms.get(name, 0) + value.detach() / len(parts) for name, value in found.items()}
        model.enqueue(keys)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.update()

        if step % cfg.log.every == 0 or step == total_steps:
            values = mean_over_ranks(torch.stack(list(terms.values())), process)  # waits for the device
            now = time.perf_counter()
            rate = (step - since) * cfg.optim.batch_size / (now - clock)
            since, clock = step, now
            row = {"step": step, "epoch": round(step / steps_per_epoch, 4)}
            row |= dict(zip(terms, values, strict=True)) | {"lr": optimizer.param_groups[0]["lr"]}
            log.write(row | {"images_per_second": round(rate, 1)})
            bar.set_postfix_str(status_line(row, rate, collapse))
            if bar.disable:
                process.say(f"step {step}/{total_steps}  {status_line(row, rate, collapse)}")

        measured = cfg.log.rank_every * steps_per_epoch
        if step == total_steps or (measured and step % measured == 0):
            model.average_running_statistics()
            collapse = monitor.measure(model)
            if collapse:
                log.write({"step": step, "epoch": round(step / steps_per_epoch, 4), **collapse})
                process.say(monitor.describe(collapse, step))
            clock, since = time.perf_counter(), step
        if step == total_steps or step % (cfg.run.save_steps or steps_per_epoch) == 0:
            save(folder, cfg, model, optimizer, step, process)
    bar.close()
    log.close()

    if process.is_main:
        export(folder, cfg, model, intensity, dataset, step)
        draw(folder, process)
    process.say(f"encoder: {folder / 'encoder.pth'}")
    process.barrier()
    process.close()
    return 0


# ---------------------------------------------------------------------------------------------------------
# Setting up
# ---------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = config.OneLineParser(
        description=__doc__.split("\n\n")[0],
        epilog="settings and their defaults:\n" + DEFAULTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", help="YAML file of settings")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that go before it"
    )
    return parser.parse_intermixed_args(argv)


def check_config(cfg: Config) -> None:
    """Raise a ConfigError for the first value that cannot work."""
    if cfg.data.root is None:
        raise ConfigError("data.root: is missing; the folder of the data set")
    check_choice(cfg, "run.device", ("auto", "cpu", "cuda"))
    check_choice(cfg, "run.precision", ("auto", "fp32", "bf16"))
    check_choice(cfg, "model.arch", ARCHITECTURES)
    check_choice(cfg, "local.match", ("overlap", "grid"))
    check_choice(cfg, "local.layer", LAYERS)
    check_choice(cfg, "decorrelation.method", ("zca", "iternorm", "none"))
    check_choice(cfg, "decorrelation.position", ("output", "bn3"))
    check(cfg, "model.output_stride", cfg.model.output_stride in (8, 16, 32), "8, 16 or 32")
    check(cfg, "model.in_channels", cfg.model.in_channels in (1, 3), "1 or 3")
    check_positive(cfg, "data.size", "data.std", "model.dim", "model.queue_size", "model.temperature")
    check_positive(cfg, "local.grid", "local.temperature")
    if cfg.decorrelation.eps is not None:
        check_positive(cfg, "decorrelation.eps")
    check_positive(cfg, "optim.epochs", "optim.batch_size", "optim.accumulate", "optim.lr", "log.every")
    check_fraction(cfg, "augment.flip", "augment.autocontrast", "augment.equalize", "augment.contrast")
    check_fraction(cfg, "model.momentum", "optim.momentum", "local.min_overlap")
    check_range(cfg, "augment.scale")
    low, high = cfg.augment.scale
    check(cfg, "augment.scale", low > 0 and high <= 1, "two fractions of the slice's area")
    check_not_negative(
        cfg, "seed", "run.save_steps", "data.workers", "augment.brightness", "augment.gamma", "augment.blur"
    )
    check_not_negative(cfg, "augment.noise", "local.weight", "decorrelation.group_size", "model.bn_split")
    check_not_negative(cfg, "optim.weight_decay", "optim.warmup_epochs", "optim.max_steps", "log.rank_every")
    if cfg.data.window is not None and cfg.data.window != "auto":
        check_range(cfg, "data.window")
    if cfg.model.queue_size < cfg.optim.batch_size:
        raise ConfigError(
            f"model.queue_size: {cfg.model.queue_size} is below optim.batch_size {cfg.optim.batch_size}"
        )


def count_steps(cfg: Config, size: int, process: Process) -> tuple[int, int]:
    """Steps an epoch and in all, for a training set of `size` slices; checks what depends on both."""
    batch, shares = cfg.optim.batch_size, process.world * cfg.optim.accumulate
    if size < batch:
        raise ConfigError(f"optim.batch_size: {batch}, but {cfg.data.list} lists only {size} slices")
    if batch % shares:
        raise ConfigError(
            f"optim.batch_size: {batch} does not divide by {process.world} processes x "
            f"{cfg.optim.accumulate} accumulation steps"
        )
    share, split = batch // shares, cfg.model.bn_split
    if split and share % split and share > split:
        raise ConfigError(f"model.bn_split: {split} does not divide the {share} samples of a forward pass")
    if split and share < split and shares > 1:
        process.say(f"note: BatchNorm sees {share} samples at a time, fewer than model.bn_split = {split}")
    if cfg.model.queue_size > size:
        process.say(
            f"note: model.queue_size {cfg.model.queue_size} is above the {size} slices: a slice's own older "
            "keys are among its negatives; half the slices or less is better"
        )
    steps_per_epoch = size // batch
    return steps_per_epoch, cfg.optim.max_steps or cfg.optim.epochs * steps_per_epoch


def build_model(cfg: Config, process: Process) -> MoCo:
    plan = cfg.decorrelation
    options = {"group_size": plan.group_size, "sync": plan.sync}
    if plan.eps is not None:
        options["eps"] = plan.eps
    in_trunk = in_moco = None
    if plan.method != "none" and plan.position == "bn3":
        in_trunk = {"whitening": plan.method, **options}
    elif plan.method != "none":
        in_moco = {"method": plan.method, **options}
    with config.config_errors():
        encoder = Encoder(
            cfg.model.arch, cfg.model.in_channels, output_stride=cfg.model.output_stride, **in_trunk or {}
        )
    if cfg.model.init != "random":
        process.say(str(load_encoder_weights(encoder, cfg.model.init)))
    with config.config_errors():
        return MoCo(
            encoder,
            cfg.model.dim,
            cfg.model.queue_size,
            cfg.model.momentum,
            cfg.model.temperature,
            local=dict(cfg.local) if cfg.local.weight else None,
            decorrelation=in_moco,
            bn_split=cfg.model.bn_split,
            seed=cfg.seed,
        )


def value_range(cfg: Config, intensity: Intensity, stored: str) -> tuple[float, float]:
    """The values that augmentation takes as black and white: the window's, else the whole range of CT."""
    if intensity.window is not None:
        return 0.0, 1.0
    return (0.0, 255.0) if stored == "uint8" else (-cfg.data.hu_offset, 4095.0 - cfg.data.hu_offset)


class StepBatches:
    """The indices that this process reads in each step: a share of a batch out of the epoch's permutation.

    The order of an epoch depends on (seed, epoch) only. What is left of an epoch after its last whole batch
    is not read in that epoch.
    """

    def __init__(self, size: int, batch: int, seed: int, process: Process, first: int, last: int):
        self.size, self.batch, self.seed, self.first, self.last = size, batch, seed, first, last
        share = batch // process.world
        self.mine = slice(process.rank * share, (process.rank + 1) * share)

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        order, known = None, None
        for step in range(self.first, self.last):
            epoch, place = divmod(step, self.size // self.batch)
            if epoch != known:
                order = torch.randperm(self.size, generator=seeded("epoch", self.seed, epoch))
                known = epoch
            yield order[place * self.batch : (place + 1) * self.batch][self.mine].tolist()


def seeded(*key) -> torch.Generator:
    """A CPU generator whose state is a hash of the key: independent streams for independent purposes."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def learning_rate(step: int, steps_per_epoch: int, total_steps: int, optim: Config) -> float:
    """Linear warm-up over the first epochs, then half a cosine down to 0 at the last step."""
    warmup = min(round(optim.warmup_epochs * steps_per_epoch), total_steps - 1)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    return optim.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))


def mean_over_ranks(values: Tensor, process: Process) -> list[float]:
    if process.world > 1:
        dist.all_reduce(values)
        values /= process.world
    return values.tolist()


def status_line(row: dict, rate: float, collapse: dict) -> str:
    local = f" local {row['local']:.3f}" if row["local"] else ""
    rank = f" rank {collapse['effective_rank']:.1f}" if collapse else ""
    return f"loss {row['loss']:.3f}{local}{rank} {rate:.0f} images/s"


# ---------------------------------------------------------------------------------------------------------
# Collapse monitor
# ---------------------------------------------------------------------------------------------------------


class CollapseMonitor:
    """Effective rank and spectrum of the encoder's features on a fixed set of slices, without augmentation.

    The slices are those of data.val, without such a list the first of the training list by case, at most
    MONITORED; the rank is bounded by their number. Pooled features are one vector a slice, dense ones
    MONITORED positions of the maps, drawn once and for all. The main process measures, the others go on.
    """

    def __init__(self, cfg: Config, dataset: SliceDataset, intensity: Intensity, process: Process):
        self.intensity, self.process, self.size = intensity, process, cfg.data.size
        self.channels = cfg.model.in_channels
        if cfg.data.val and (Path(cfg.data.root) / cfg.data.val).is_file():
            dataset = SliceDataset(
                cfg.data.root, cfg.data.val, cfg.data.images, cfg.data.hu_offset, dataset.size
            )
        by_case = sorted(range(len(dataset)), key=lambda i: (dataset.cases[i], dataset.names[i]))
        self.slices = Subset(dataset, by_case[:MONITORED])

    @torch.no_grad()
    def measure(self, model: MoCo) -> dict:
        """Effective ranks (after the whitening between trunk and heads, too, if there is one) and spectra."""
        if not self.process.is_main:
            return {}
        whitened = not isinstance(model.query.decorrelation, nn.Identity)
        found = {"": [], "_dense": []} | ({"_whitened": [], "_whitened_dense": []} if whitened else {})
        positions = -(-MONITORED // len(self.slices))  # of each slice's map
        generator = seeded("positions")
        model.eval()
        loader = DataLoader(self.slices, batch_size=32)
        for stored in runtime.progress(self.process, "measuring collapse", loader):
            x = self.intensity.normalise(self.intensity.to_unit(stored.to(self.process.device)))
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
            maps = model.query.encoder(x.expand(-1, self.channels, -1, -1))["layer4"]
            chosen = torch.randint(maps[0, 0].numel(), (len(x), positions), generator=generator)
            sides = {"": maps} | ({"_whitened": model.query.decorrelation(maps)} if whitened else {})
            for side, features in sides.items():
                columns = chosen[:, None].expand(-1, features.shape[1], -1).to(features.device)
                dense = features.flatten(2).gather(2, columns)  # (n, C, positions)
                found[side].append(features.mean(dim=(2, 3)).float())
                found[side + "_dense"].append(dense.transpose(1, 2).flatten(0, 1).float())
        model.train()
        spectra = {name: singular_values(torch.cat(rows)[:MONITORED]) for name, rows in found.items()}
        row = {f"effective_rank{name}": round(effective_rank_of(s), 3) for name, s in spectra.items()}
        return row | {f"spectrum{name}": [float(f"{v:.5g}") for v in s] for name, s in spectra.items()}

    def describe(self, collapse: dict, step: int) -> str:
        whitened = collapse.get("effective_rank_whitened")
        rest = f"; after whitening {whitened:.1f}" if whitened is not None else ""
        return (
            f"step {step}: effective rank of pooled features {collapse['effective_rank']:.1f}, "
            f"of dense features {collapse['effective_rank_dense']:.1f}{rest} ({len(self.slices)} slices)"
        )


# ---------------------------------------------------------------------------------------------------------
# Stopping, going on, and results
# ---------------------------------------------------------------------------------------------------------


def resume(folder: Path, cfg: Config, model: MoCo, optimizer: torch.optim.Optimizer) -> int:
    """Load the folder's checkpoint, if there is one, and return the number of steps done."""
    state = runtime.load_checkpoint(folder)
    if state is None:
        return 0
    before = config.to_config(state["config"])
    if changed := cfg.first_difference(before, ignore=FREE):
        old, new = before.flat().get(changed), cfg.flat().get(changed)
        raise ConfigError(
            f"{changed}: is {new!r}, but the run in {folder} was started with {old!r}; choose another run.out"
        )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def save(folder: Path, cfg: Config, model: MoCo, optimizer, step: int, process: Process) -> None:
    model.average_running_statistics()
    if process.is_main:
        state = {
            "config": cfg.plain(),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
        }
        runtime.save_checkpoint(folder, state)


def export(folder: Path, cfg: Config, model: MoCo, intensity: Intensity, dataset: SliceDataset, step: int):
    """encoder.pth, a torchvision ResNet's weights without fc, and encoder.json, which says what they are."""
    with runtime.written_whole(folder / "encoder.pth") as file:
        torch.save(model.query.encoder.export_state_dict(), file)
    last = {}
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        last |= {name: v for name, v in json.loads(line).items() if not isinstance(v, list)}
    card = {
        "arch": cfg.model.arch,
        "in_channels": cfg.model.in_channels,
        "normalisation": intensity.as_dict(),
        "data": {"slices": len(dataset), "cases": len(set(dataset.cases)), "size": list(dataset.size)},
        "steps": step,
        "metrics": last,
        "config": cfg.plain(),
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
        "sha256": hashlib.sha256((folder / "encoder.pth").read_bytes()).hexdigest(),
    }
    runtime.write_whole(folder / "encoder.json", json.dumps(card, indent=2) + "\n")


def draw(folder: Path, process: Process) -> None:
    """curves.png and spectrum.png from metrics.jsonl."""
    try:
        import matplotlib
    except ImportError:
        process.say("no curves.png and spectrum.png: pip install matplotlib")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row for row in rows if "loss" in row]
    ranks = [row for row in rows if "effective_rank" in row]
    names = {
        "": "pooled",
        "_dense": "dense",
        "_whitened": "pooled, whitened",
        "_whitened_dense": "dense, whitened",
    }

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    steps = [row["step"] for row in losses]
    for name in ("global", "local") if any(row["local"] for row in losses) else ("global",):
        axes[0].plot(steps, [row[name] for row in losses], label=name)
    axes[1].plot(steps, [row["accuracy"] for row in losses])
    for name, label in names.items():
        if f"effective_rank{name}" in ranks[0]:
            axes[2].plot(
                [r["step"] for r in ranks], [r[f"effective_rank{name}"] for r in ranks], "o-", label=label
            )
    titles = ("InfoNCE", "queries nearest to their own key", "effective rank")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[2].legend()
    figure.savefig(folder / "curves.png", dpi=110)
    plt.close(figure)

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for row, style in ((ranks[0], ":"), (ranks[-1], "-")):
        for i, (name, label) in enumerate(names.items()):
            if f"spectrum{name}" in row:
                values = torch.tensor(row[f"spectrum{name}"])
                axis.plot(
                    values / values[0].clamp(min=1e-12),
                    style,
                    color=f"C{i}",
                    label=f"{label}, step {row['step']}",
                )
    axis.set(
        yscale="log", ylim=(1e-5, 1.5), xlabel="index", ylabel="singular value / largest", title="Spectrum"
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(folder / "spectrum.png", dpi=110)
    plt.close(figure)
    process.say(f"pictures: {folder / 'curves.png'} {folder / 'spectrum.png'}")


if __name__ == "__main__":
    runtime.run_script(main, expected=(DataError, WeightsError))
