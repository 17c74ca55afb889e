"""Pretrain an encoder on unlabelled slices: MoCo v2 + local features + feature decorrelation, or a peer.

    python train_moco.py --config configs/phantom.yaml                                  # CPU or one GPU
    torchrun --nproc_per_node=8 train_moco.py --config configs/abdomen1k.yaml           # one node
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train_moco.py --config configs/abdomen1k.yaml optim.batch_size=2048             # many nodes
    python train_moco.py --config configs/phantom.yaml method=byol                      # see methods.py
    python train_moco.py --config configs/abdomen1k.yaml --config configs/methods/byol.yaml

Any setting below can be given in a config file (in several: the later ones win) or behind the command as
section.key=value. The same command resumes a run that was stopped. Results, in run.out: encoder.pth (a
torchvision ResNet without fc) and encoder.json, both also for encoder_best (the highest label-free score, see
collapse.py), metrics.jsonl, config.yaml, checkpoint.pth, features.png (dense features as colours); curves.png
and spectrum.png if matplotlib is installed, TensorBoard files if tensorboard is.
"""

import argparse

from engine.config import Config, ConfigError, config_errors, load_config, settings_parser

DEFAULTS = """
seed: 0
method: moco                # MoCo v2, by default with local and decorrelation; or one of its peers: simclr |
                            # byol | simsiam | swav | barlow | vicreg | vicregl | densecl | pixpro | spark
run:
  out: runs/pretrain        # folder of the results
  device: auto              # auto | cpu | cuda
  precision: auto           # auto | fp32 | bf16; auto: bf16 where a GPU has it
  compile: false            # torch.compile the encoders: minutes at the start, some percent faster then
  save_steps: 0             # checkpoint every N steps; 0: every 2 minutes, or less often, so that it takes 1%
                            # of the time
  save_minutes: 30.0        # and when the last checkpoint is this many minutes old; 0: never for that reason
  keep_checkpoint: false    # of a finished run, which needs none: to look into it
  max_bad_steps: 10         # this many steps in a row whose loss or gradient is not finite end the run
  skip_bad: false           # unreadable slices: false: end the run | true: the next one is read instead
  timeout_minutes: 10.0     # how long to wait for another process, or for a DataLoader worker
  deterministic: false      # the same bits on the same GPU, slower; a CPU run always gives the same bits
data:
  root: null                # a data set's folder, or a packed set
  images: images            # folder of the slices below root; {split} is the list's name
  list: unlabelled.txt      # the slices to learn from
  val: val.txt              # the slices that the collapse monitor looks at; without this file those of list
  size: 224                 # side of the views, px
  window: auto              # [low, high] HU; auto: [-160, 240], or [0, 255] for 8-bit slices; null: unscaled
  neighbours: 0             # 1: the slices below and above are further channels, 3 in all
  hu_offset: null           # HU = 16-bit value - hu_offset; null: the set's, or 1024; 0: values as stored
  mean: 0.5                 # of the windowed values; `data.py check` measures both
  std: 0.25
  workers: 4                # DataLoader workers of each training process
  insist: false             # go on, with a warning, where the data look impossible
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
  rotate: 0.0               # degrees
  shear: 0.0                # x by this times y, and y by this times x
  translate: 0.0            # share of the crop's sides
  erase: 0.0                # probability of a black rectangle,
  erase_area: [0.02, 0.2]   # this share of the view
  small_crops: 0            # further views of each slice, for swav
  small_size: 96            # their side, px
  small_scale: [0.05, 0.2]  # and area
model:
  arch: resnet50            # resnet18 | resnet26 | resnet26_half | resnet34 | resnet50 | resnet101
  in_channels: 1            # 3: the slice three times; with data.neighbours always 3
  output_stride: 32         # 32 | 16 | 8, during pretraining
  init: random              # or weights to start from: a file, or the folder of a run
  bn_split: 32              # samples that BatchNorm normalises together; divides a process's share; 0: the
                            # global batch
  # From here on null is the method's own value, see methods.py; not all of them have all of these.
  weight: null              # loss = model.weight * the method's own + local.weight * local; moco: 1
  dim: null                 # length of the projections; moco: 128
  hidden: null              # width of the heads
  queue_size: null          # negatives; moco: 65536; keep it at half the training set or less
  momentum: null            # of the momentum encoder; moco: 0.999
  temperature: null         # moco: 0.2
  prototypes: null          # of swav
  mask: null                # share of a view that spark hides
local:
  weight: null              # 0: off; null: 0.5 with moco, 0 with the others
  match: overlap            # overlap: the same anatomy in both views | grid: the same cell (the paper's)
  layer: layer4
  grid: 4                   # grid x grid regions
  negatives: image          # image: the other regions of the same image | batch: those of all images, too
  temperature: 0.2
  min_overlap: 0.15         # of a crop's side; images whose views overlap less are left out
decorrelation:
  method: null              # zca | iternorm | none; null: zca with moco, none with the others
  position: output          # output: between trunk and heads | bn3: the trunk's last norm (the paper's)
  group_size: 64            # channels whitened together; 0: all
  eps: null                 # null: the method's own, 1e-3 for zca, 1e-5 for iternorm
  sync: true                # statistics over all processes
optim:
  epochs: 200
  batch_size: 256           # global: over all processes and accumulation steps
  accumulate: 1             # parts of a process's share of a batch, one after the other: less memory, the
                            # same gradients; refused where they would be others, and said with whitening
  name: sgd                 # sgd | lars | larc | adamw
  lr: 0.03                  # warm-up, then half a cosine to 0
  momentum: 0.9             # of sgd, lars and larc
  weight_decay: 1.0e-4
  warmup_epochs: 10.0
  max_steps: 0              # length of the whole schedule in steps; 0: `epochs` decides
log:
  every: 10                 # steps between lines of metrics.jsonl
  tensorboard: true         # event files in run.out, if tensorboard is installed
  rank_every: 10            # epochs between measurements of collapse; 0: only at the start and the end
  encoders: false           # keep the encoder of each measurement, as encoder_STEP.pth
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    return settings_parser(__doc__.split("\n\n")[0], DEFAULTS).parse_intermixed_args(argv)


if __name__ == "__main__":
    parse_arguments()  # answers --help before the imports, which take seconds

from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel

from augment import SmallCrops, TwoViews
from data import BatchReader, DataError, Intensity, SliceDataset, default_window, network_input
from engine.process import Process, start_process
from engine.stopping import StopRequest, naming_lost_workers, run_script
from losses import seeded
from methods import METHODS
from moco import Method, row_ranges
from models import ARCHITECTURES, LAYERS, Encoder
from pretraining.method_settings import check_method, own_settings, settle
from pretraining.optimizers import make_optimizer
from pretraining.run import FAILURES, check_folder, open_run
from weights import load_encoder_weights

# Settings that may be null, and their type otherwise.
NULLABLE = {"data.root": str, "data.window": (str, list), "data.val": str, "data.hu_offset": float}
NULLABLE |= {"decorrelation.eps": float, "decorrelation.method": str, "local.weight": float}
NULLABLE |= {f"model.{name}": int for name in ("dim", "hidden", "queue_size", "prototypes")}
NULLABLE |= {f"model.{name}": float for name in ("weight", "momentum", "temperature", "mask")}


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    cfg = load_config(DEFAULTS, args.config, args.overrides, NULLABLE)
    unused = settle(cfg, METHODS, args.overrides)
    check_config(cfg)
    if args.folder:  # launch.sh asks
        check_folder(cfg)
        print(cfg.run.out)
        return 0
    process = start_process(cfg.run)
    if unused:
        process.say(f"note: {cfg.method} has no use for {', '.join(unused)}")
    source = (cfg.data.root, cfg.data.list, cfg.data.images, cfg.data.hu_offset)
    dataset = SliceDataset(*source, skip_bad=cfg.run.skip_bad, neighbours=cfg.data.neighbours)
    if len(counts := set(process.gather(len(dataset)))) > 1:
        raise DataError(f"{cfg.data.list}: not the same for all processes, {sorted(counts)} slices")
    reader = BatchReader(dataset, cfg.data.workers)
    with StopRequest(process.rank) as stop, naming_lost_workers(reader):
        code = pretrain(cfg, process, reader, stop)
    process.close()
    return code


def pretrain(cfg: Config, process: Process, reader: BatchReader, stop: StopRequest) -> int:
    """The whole run, from where its folder says it is; returns the exit code."""
    torch.manual_seed(cfg.seed)
    intensity = make_intensity(cfg, reader.dataset)
    views_of = make_views(cfg, reader.dataset, intensity)
    model = build_model(cfg, process)
    optimizer = make_optimizer(cfg, model)
    run = open_run(cfg, process, reader, intensity, model, optimizer, stop)  # resumes from its checkpoint
    if run.finished:
        return 0

    network, guard = model, run.guard
    if process.world > 1:  # gradients are averaged over processes; each keeps its own running statistics
        network = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        run.warm_up(network)
    share = cfg.optim.batch_size // process.world  # of each global batch
    parts = row_ranges(share, cfg.optim.accumulate)
    for stored, unreadable in run.batches():  # (n, 1, H, W), HU or 8-bit values; with neighbours (n, 3, H, W)
        run.set_schedule()  # the learning rate, and how much of the run is done
        guard.remember()

        # Two views of each slice, cropped and changed at random, and the boxes that they were cropped from.
        unit = intensity.to_unit(stored)  # in [0, 1]
        generator = seeded("views", cfg.seed, run.step)
        cropped, boxes = views_of(unit, generator, process.rank * share, cfg.optim.batch_size)
        views = [network_input(view, intensity, cfg.model.in_channels) for view in cropped]

        # What the losses compare with, without gradient. MoCo: the momentum encoder's keys of slices and
        # regions, encoded in an order that is shuffled over all processes (its shuffling BN).
        with process.autocast():
            targets = model.targets(views, boxes, parts=cfg.optim.accumulate)

        # The trained encoder's features, whitened, and the losses. MoCo: global InfoNCE of queries against
        # their keys and the queue, local InfoNCE against the other regions of the same slice.
        terms = {}
        for rows in parts:
            last = rows is parts[-1]  # only its backward pass averages gradients over processes
            with nullcontext() if last or process.world == 1 else network.no_sync():
                with process.autocast():
                    some = [view[rows] for view in views], [box[rows] for box in boxes]
                    losses = network(*some, targets.part(rows))
                (losses["loss"] / len(parts)).backward()
            terms = {name: terms.get(name, 0) + value.detach() / len(parts) for name, value in losses.items()}

        # The encoder takes its step. MoCo: the momentum encoder follows, the keys enter the queue. Where the
        # loss or a gradient is not finite (ok is false), none of this changes anything.
        terms = run.over_processes(terms, unreadable)
        ok = guard.judge(terms["loss"])  # also sets optimizer.found_inf, with which fused optimisers skip it
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.after_step(targets, ok)
        guard.restore_unless(ok)

        stopping = run.after_step(terms)  # logs; measures and saves where that is due
        if stopping:
            return run.leave()
    run.finish()
    return 0


# ---- Setting up ----------------------------------------------------------------------------------


def check_config(cfg: Config) -> None:
    """Raise a ConfigError for the first value that cannot work."""
    if cfg.data.root is None:
        raise ConfigError("data.root: is missing; the folder of the data set")
    cfg.check_choice("run.device", "auto", "cpu", "cuda")
    cfg.check_choice("run.precision", "auto", "fp32", "bf16")
    cfg.check_choice("model.arch", *ARCHITECTURES)
    cfg.check_choice("optim.name", "sgd", "lars", "larc", "adamw")
    cfg.check_choice("local.match", "overlap", "grid")
    cfg.check_choice("local.layer", *LAYERS)
    cfg.check_choice("local.negatives", "image", "batch")
    if cfg.decorrelation.method is not None:
        cfg.check_choice("decorrelation.method", "zca", "iternorm", "none")
    cfg.check_choice("decorrelation.position", "output", "bn3")
    cfg.check("model.output_stride", cfg.model.output_stride in (8, 16, 32), "8, 16 or 32")
    cfg.check("model.in_channels", cfg.model.in_channels in (1, 3), "1 or 3")
    cfg.check("data.neighbours", cfg.data.neighbours in (0, 1), "0 or 1")
    cfg.check_positive("data.size", "data.std")
    cfg.check_positive("local.grid", "local.temperature", "run.max_bad_steps", "run.timeout_minutes")
    cfg.check("data.size", cfg.data.size <= 8192, "1 to 8192 px")
    if cfg.decorrelation.eps is not None:
        cfg.check_positive("decorrelation.eps")
    cfg.check_positive("optim.epochs", "optim.batch_size", "optim.accumulate", "optim.lr", "log.every")
    cfg.check_fraction("augment.flip", "augment.autocontrast", "augment.equalize", "augment.contrast")
    cfg.check_fraction("augment.translate", "augment.erase", "optim.momentum", "local.min_overlap")
    cfg.check("augment.rotate", 0 <= cfg.augment.rotate <= 180, "0 to 180 degrees")
    cfg.check("augment.shear", 0 <= cfg.augment.shear < 1, "0 or more, below 1")
    cfg.check_range("augment.scale")
    low, high = cfg.augment.scale
    cfg.check("augment.scale", low > 0 and high <= 1, "two fractions of the slice's area")
    cfg.check_range("augment.small_scale")
    low, high = cfg.augment.small_scale
    cfg.check("augment.small_scale", low > 0 and high <= 1, "two fractions of the slice's area")
    cfg.check_range("augment.erase_area")
    low, high = cfg.augment.erase_area
    cfg.check("augment.erase_area", low > 0 and high <= 1, "two fractions of the view's area")
    cfg.check_not_negative("augment.small_crops")
    cfg.check("augment.small_size", 1 <= cfg.augment.small_size <= 8192, "1 to 8192 px")
    cfg.check_not_negative("seed", "data.workers", "log.rank_every", "model.bn_split")
    cfg.check_not_negative("run.save_steps", "run.save_minutes", "decorrelation.group_size")
    if cfg.local.weight is not None:
        cfg.check_not_negative("local.weight")
        cfg.check(
            "local.weight", cfg.model.weight != 0 or cfg.local.weight > 0, "above 0 if model.weight is 0"
        )
    cfg.check_not_negative("augment.brightness", "augment.gamma", "augment.blur", "augment.noise")
    cfg.check_not_negative("optim.weight_decay", "optim.warmup_epochs", "optim.max_steps")
    if cfg.data.window is not None and cfg.data.window != "auto":
        cfg.check_range("data.window")
    check_method(cfg, METHODS[cfg.method])


def build_model(cfg: Config, process: Process) -> Method:
    plan, at_output, in_trunk = cfg.decorrelation, None, {}
    options = {"group_size": plan.group_size, "sync": plan.sync} | ({"eps": plan.eps} if plan.eps else {})
    if plan.method != "none" and plan.position == "bn3":
        in_trunk = {"whitening": plan.method, **options}
    elif plan.method != "none":
        at_output = {"method": plan.method, **options}
    stride = cfg.model.output_stride
    with config_errors():
        encoder = Encoder(cfg.model.arch, cfg.model.in_channels, output_stride=stride, **in_trunk)
    if cfg.model.init != "random":
        process.say(str(load_encoder_weights(encoder, cfg.model.init)))
    with config_errors():
        model = METHODS[cfg.method](
            encoder,
            **own_settings(cfg),
            local=dict(cfg.local) if cfg.local.weight else None,
            decorrelation=at_output,
            bn_split=cfg.model.bn_split,
            seed=cfg.seed,
        )
    for module in model.modules():
        if hasattr(module, "running_mean"):  # of norms and whitening: it moves for each part of a batch
            module.momentum /= cfg.optim.accumulate
        if isinstance(module, Encoder) and cfg.run.compile:
            module.compile()
    return model.to(process.device, memory_format=torch.channels_last)


def make_intensity(cfg: Config, dataset: SliceDataset) -> Intensity:
    window = default_window(dataset.kind) if cfg.data.window == "auto" else cfg.data.window
    return Intensity(window, cfg.data.mean, cfg.data.std)


def make_views(cfg: Config, dataset: SliceDataset, intensity: Intensity):
    """(batch, generator, offset, total) -> two views and more if there are small crops, and the two boxes.

    Where values are not windowed, black and white are the ends of CT's whole range.
    """
    black_white = (0.0, 1.0)
    if intensity.window is None:
        black_white = {"hu": (-1024.0, 3071.0), "uint8": (0.0, 255.0), "stored": (0.0, 4095.0)}[dataset.kind]
    changes = {name: value for name, value in cfg.augment.items() if not name.startswith("small_")}
    two_views = TwoViews(cfg.data.size, **changes, value_range=black_white)
    changes["scale"] = cfg.augment.small_scale
    small = SmallCrops(cfg.augment.small_crops, cfg.augment.small_size, **changes, value_range=black_white)

    def views_of(batch, generator, offset, total):
        *views, box1, box2 = two_views(batch, generator, offset, total)
        return views + small(batch, generator, offset, total), [box1, box2]

    return views_of


if __name__ == "__main__":
    run_script(main, expected=FAILURES)
