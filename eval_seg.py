"""Evaluate an encoder on multi-organ segmentation, and predict masks with the model trained for that.

    python eval_seg.py --config configs/linear.yaml encoder=runs/x/encoder.pth       # frozen, linear decoder
    python eval_seg.py --config configs/finetune.yaml encoder=runs/x/encoder.pth     # all trained, DeepLabv3+
    torchrun --nproc_per_node=8 eval_seg.py --config configs/btcv_finetune.yaml encoder=runs/x/encoder.pth
    python eval_seg.py --config configs/linear.yaml --predict ct.nii.gz --out pred   # by the model in run.out
    python eval_seg.py --compare runs/x-linear runs/x-finetune runs/random-linear    # one table of several
    runs

An evaluation leaves in run.out: config.yaml, metrics.jsonl, model.pth (the best on the validation cases, with
all that --predict needs), results.json, cases.csv and predictions.png. The same command again prints its
table.
One started again after a stop goes on from the last validation.

Under torchrun a batch is divided among the processes and gradients are averaged; BatchNorm normalises each
process's share (no SyncBatchNorm: a share of 4 or more crops is enough for it), cases are divided for
scoring.
"""

import argparse
import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import metrics
import report
from data import (
    DataError,
    Intensity,
    SegmentationAugment,
    SegmentationDataset,
    class_names,
    default_window,
    read_volume,
    write_labels,
)
from losses import effective_rank, segmentation_loss
from layout import read_stored, write_png
from models import (
    DeepLabV3Plus,
    Encoder,
    LinearDecoder,
    WeightsError,
    load_encoder_weights,
    read_weights,
    upsample,
)
from runtime import (
    Config,
    ConfigError,
    MetricsLog,
    Process,
    check,
    check_choice,
    check_positive,
    check_range,
    config_errors,
    load_checkpoint,
    load_config,
    make_run_folder,
    progress,
    run_script,
    save_checkpoint,
    start_process,
    write_whole,
    written_whole,
)

DEFAULTS = """
seed: 0
mode: linear                # linear: frozen encoder, linear decoder | finetune: DeepLabv3+, everything
trained encoder: null               # path of encoder.pth or another checkpoint, torchvision:PATH, or random
label_fraction: 1.0         # share of the training cases; smaller ones are subsets of larger ones (same seed)
cache: auto                 # linear: keep the frozen features in memory: on, off, auto = if they fit cache_gb
cache_gb: 4.0               # GiB run:
  out: runs/eval            # folder of this run
  device: auto              # auto | cpu | cuda
  precision: auto           # auto (bf16 on GPUs that have it) | fp32 | bf16
  compile: false            # torch.compile
  deterministic: false      # deterministic algorithms on GPUs, slower
data:
  root: null                # folder of the data set
  images: images            # folders below root; {split} stands for the list's name without .txt
  masks: masks
  train: train.txt
  val: val.txt              # null: the last model is used instead of the best one
  test: test.txt
  classes: null             # number of classes or their names, background first; null: classes.json beside
  the lists size: null                # px, side of the training crops of finetune; null: the slices' own;
  linear: whole slices window: auto              # HU, [low, high]; null = stored values unscaled; auto = the
  encoder's own, else -160..240 hu_offset: 1024           # HU = value of a 16-bit PNG minus this mean: null
  # of windowed values; null = the encoder's own, else 0.5 std: null                 # null = the encoder's
  own, else 0.25 workers: 2                # reading processes per training process
augment:                    # finetune only, see augment.SegmentationAugment
  scale: [0.5, 2.0]
  flip: 0.0                 # organs have sides
  brightness: 0.1
  contrast: 0.1
  gamma: 0.1
  noise: 0.02
model:
  arch: null                # resnet18 | resnet34 | resnet50 | resnet101; null = the encoder's own, else
  resnet50 in_channels: 1            # 3: the slice three times; a checkpoint with the other number is
  converted output_stride: 8          # 8 | 16 | 32
optim:                      # SGD with momentum 0.9, lr falls as (1 - step / steps) ** 0.9
  steps: 2000
  batch_size: 16            # slices per step, over all processes
  lr: 0.05
  encoder_lr_factor: 1.0    # finetune: the encoder's lr relative to the decoder's
  weight_decay: 1e-4
eval:
  every: 200                # steps between validations
log:
  every: 20                 # steps between lines of metrics.jsonl
"""

NULLABLE = {
    "encoder": str,
    "data.root": str,
    "data.val": str,
    "data.classes": (int, list),
    "data.size": int,
    "data.window": (list, str),
    "data.mean": float,
    "data.std": float,
    "model.arch": str,
}
# Keys that may differ between a run and its repetition, since they do not decide what is computed.
FREE_KEYS = ("run.out", "run.device", "run.compile", "data.workers", "cache", "log.")
PICTURE_CASES = 4
RANK_SLICES = 2048  # at most so many validation slices for the effective rank
RANK_POSITIONS = 8192  # at most so many dense feature vectors


def check_config(cfg: Config) -> None:
    """Everything that is impossible whatever the data; raises ConfigError."""
    for name in ("encoder", "data.root"):
        check(cfg, name, cfg.flat()[name] is not None, "a path" + " or random" * (name == "encoder"))
    check_choice(cfg, "mode", ("linear", "finetune"))
    check_choice(cfg, "cache", ("auto", "on", "off"))
    check_choice(cfg, "run.device", ("auto", "cpu", "cuda"))
    check_choice(cfg, "run.precision", ("auto", "fp32", "bf16"))
    check_positive(cfg, "label_fraction", "cache_gb", "model.in_channels", "eval.every", "log.every")
    check_positive(cfg, "optim.steps", "optim.batch_size", "optim.lr", "optim.encoder_lr_factor")
    check(cfg, "label_fraction", cfg.label_fraction <= 1, "a value above 0, up to 1")
    check(cfg, "seed", cfg.seed >= 0, "0 or more")
    check(cfg, "data.workers", cfg.data.workers >= 0, "0 or more")
    check(cfg, "data.size", cfg.data.size is None or cfg.data.size > 0, "px or null")
    check(cfg, "data.std", cfg.data.std is None or cfg.data.std > 0, "a value above 0 or null")
    check(cfg, "optim.weight_decay", cfg.optim.weight_decay >= 0, "0 or more")
    check(cfg, "augment.scale", cfg.augment.scale[:1] > [0], "[low, high], both above 0")
    check_range(cfg, "augment.scale")
    if isinstance(cfg.data.window, list):
        check_range(cfg, "data.window")
    else:
        check(cfg, "data.window", cfg.data.window in (None, "auto"), "[low, high], auto or null")
    if isinstance(cfg.data.classes, int):
        check(cfg, "data.classes", 2 <= cfg.data.classes <= 255, "2 to 255 classes, background included")


# ---------------------------------------------------------------------------------------------------------
# The encoder, and the normalisation that travels with it
# ---------------------------------------------------------------------------------------------------------


def encoder_path(cfg: Config) -> Path | None:
    """The weights file; None for a random encoder."""
    return None if cfg.encoder == "random" else Path(cfg.encoder.removeprefix("torchvision:"))


def encoder_facts(path: Path | None) -> dict:
    """What encoder.json beside our encoder.pth says: {"arch", "normalisation": {...}}; {} without one."""
    sidecar = path and path.with_suffix(".json")
    if sidecar is None or not sidecar.is_file():
        return {}
    try:
        facts = json.loads(sidecar.read_text(encoding="utf-8"))
        window, mean, std = (facts["normalisation"][name] for name in ("window", "mean", "std"))
        Intensity(window, mean + 0.0, std + 0.0)
        return {"arch": str(facts["arch"]), "window": window, "mean": mean, "std": std}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise WeightsError(f"{sidecar}: does not describe an encoder; restore it or remove it") from None


def agreed(cfg: Config, name: str, facts: dict):
    """A value that config and encoder may both give, in which case they must agree; None if neither does.

    Raises ConfigError with both values.
    """
    section, key = name.split(".")
    given = cfg[section][key]
    if key not in facts:
        return given
    if given not in (None, "auto") or (given is None and key == "window"):
        if given != facts[key]:
            raise ConfigError(f"{name}: {given!r} contradicts {facts[key]!r} of {encoder_path(cfg)}")
    return facts[key]


def normalisation(cfg: Config, facts: dict, stored: str) -> Intensity:
    """The encoder's own normalisation, else the config's, else the default for the kind of stored values."""
    window = agreed(cfg, "data.window", facts)
    if window == "auto":
        window = default_window(stored)
    values = {name: agreed(cfg, f"data.{name}", facts) for name in ("mean", "std")}
    return Intensity(window, **{name: value for name, value in values.items() if value is not None})


def build_encoder(cfg: Config, facts: dict, process: Process) -> Encoder:
    """The encoder with its initial weights, at the evaluation's output stride."""
    path = encoder_path(cfg)
    arch = agreed(cfg, "model.arch", facts) or "resnet50"
    with config_errors():
        encoder = Encoder(arch, cfg.model.in_channels)
        encoder.set_output_stride(cfg.model.output_stride)
    if path:
        process.say(str(load_encoder_weights(encoder, path)))
    return encoder


# ---------------------------------------------------------------------------------------------------------
# The models
# ---------------------------------------------------------------------------------------------------------


class LinearProbe(nn.Module):
    """A frozen encoder, always in evaluation mode, and a linear decoder on its layer4."""

    def __init__(self, encoder: Encoder, num_classes: int):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.decoder = LinearDecoder(encoder.channels["layer4"], num_classes)

    def train(self, mode: bool = True):
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) -> logits (N, K, h, w) at the encoder's output stride."""
        return self.decoder(frozen_features(self.encoder, images))


@torch.no_grad()
def frozen_features(encoder: Encoder, images: Tensor) -> Tensor:
    """layer4 (N, D, h, w) of normalised images (N, C, H, W)."""
    return encoder(images)["layer4"].contiguous()


@dataclass
class Description:
    """What it takes to rebuild and use a trained model; stands in model.pth beside the weights."""

    mode: str
    arch: str
    in_channels: int
    output_stride: int
    classes: list[str]
    normalisation: dict
    stored: str  # "hu" or "uint8", the values that it takes


def build_model(about: Description, encoder: Encoder, process: Process) -> nn.Module:
    build = LinearProbe if about.mode == "linear" else DeepLabV3Plus
    model = build(encoder, len(about.classes))
    return model.to(process.device, memory_format=torch.channels_last)


def save_model(path: Path, model: nn.Module, about: Description) -> None:
    with written_whole(path) as file:
        torch.save({"about": asdict(about), "state": model.state_dict()}, file)


def load_model(path: Path, process: Process) -> tuple[nn.Module, Description]:
    """Raises ConfigError if there is none, WeightsError if the file is damaged."""
    if not path.is_file():
        raise ConfigError(f"run.out: no trained model in {path.parent} (model.pth); evaluate there first")
    content = read_weights(path)
    try:
        about = Description(**content["about"])
        encoder = Encoder(about.arch, about.in_channels, output_stride=about.output_stride)
        model = build_model(about, encoder, process)
        model.load_state_dict(content["state"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        raise WeightsError(f"{path}: not a model of this program, or damaged") from None
    return model.eval(), about


def network_input(unit: Tensor, intensity: Intensity, in_channels: int) -> Tensor:
    """Windowed images (N, 1, H, W) -> what the network sees, (N, in_channels, H, W) channels_last."""
    images = intensity.normalise(unit).expand(-1, in_channels, -1, -1)
    return images.contiguous(memory_format=torch.channels_last)


def at_size(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (N, K, h, w) upsampled bilinearly to (N, K, H, W) in float32."""
    return logits.float() if logits.shape[2:] == size else upsample(logits.float(), size)


# ---------------------------------------------------------------------------------------------------------
# Batches of slices, or of their frozen features
# ---------------------------------------------------------------------------------------------------------


class Batches:
    """Batches of the chosen slices of a data set, as the trained part of the model takes them.

    Args:
        positions: the slices that take part; slice i below is dataset[positions[i]].
        prepare: turns images (n, 1, H, W), stored values on the device, into that: windowed or normalised
            images, or frozen features.
    """

    def __init__(self, dataset, positions: list[int], prepare, cfg: Config, process: Process):
        self.dataset, self.positions, self.prepare, self.process = dataset, positions, prepare, process
        self.workers, self.batch_size = cfg.data.workers, cfg.optim.batch_size
        self.inputs = self.masks = None

    def __len__(self) -> int:
        return len(self.positions)

    def of(self, plan: list[list[int]]):
        """For each list of slices in the plan: inputs, and masks (n, H, W) on the device."""
        if self.inputs is not None:
            for rows in plan:
                yield self.inputs[rows], self.masks[rows]
            return
        loader = DataLoader(
            self.dataset,
            batch_sampler=[[self.positions[i] for i in rows] for rows in plan],
            num_workers=min(self.workers, len(plan)),
            pin_memory=self.process.device.type == "cuda",
        )
        for images, masks in loader:
            device = self.process.device
            yield self.prepare(images.to(device, non_blocking=True)), masks.to(device, non_blocking=True)

    def in_order(self) -> list[list[int]]:
        """The plan of all slices, one after the other."""
        return chunks(list(range(len(self))), self.batch_size)

    def bytes(self) -> int:
        """The memory that `keep` would take, in bytes."""
        one, mask = next(self.of([[0]]))
        return len(self) * (one.nbytes + mask.numel())

    def keep(self, desc: str) -> None:
        """Compute the inputs of all slices once and hold them in memory."""
        inputs = masks = None
        plan = self.in_order()
        for rows, (some, mask) in zip(plan, progress(self.process, desc, self.of(plan), len(plan))):
            if inputs is None:
                inputs = some.new_empty(len(self), *some.shape[1:])
                masks = mask.new_empty(len(self), *mask.shape[1:], dtype=torch.uint8)
            inputs[rows], masks[rows] = some, mask.to(torch.uint8)
        self.inputs, self.masks = inputs, masks


def chunks(rows: list, size: int) -> list[list]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def training_rows(step: int, count: int, cfg: Config, process: Process) -> list[int]:
    """This process's share of the slices of a step: the global batch depends on (seed, step) only.

    Epochs are permutations of range(count), put end to end and cut into batches.
    """
    size = cfg.optim.batch_size
    share = size // process.world
    first = step * size + process.rank * share
    return [epoch_order(cfg.seed, at // count, count)[at % count] for at in range(first, first + share)]


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    return torch.randperm(count, generator=generator(seed, epoch)).tolist()


def generator(seed: int, number: int) -> torch.Generator:
    """A CPU generator for the pair, e.g. of seed and step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def training_positions(dataset, fraction: float, seed: int) -> list[int]:
    """The slices of a share of the cases (at least one): the first ones of a seeded order, so subsets
    nest."""
    cases = sorted(set(dataset.cases))
    order = torch.randperm(len(cases), generator=generator(seed, 0)).tolist()
    chosen = {cases[i] for i in order[: max(1, round(fraction * len(cases)))]}
    return [i for i, case in enumerate(dataset.cases) if case in chosen]


# ---------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------


def train(cfg: Config, process: Process, model: nn.Module, batches: Batches, augment, validate, keep):
    """Train the decoder of a LinearProbe, or all of a DeepLabV3Plus; returns the best validation Dice.

    Args:
        augment: (inputs, masks, step) -> inputs, masks.
        validate: () -> mean Dice of the validation cases, None without any.
        keep: () -> None, called when the model is the best so far.
    """
    folder = Path(cfg.run.out)
    trained = model.decoder if cfg.mode == "linear" else model
    optimizer = torch.optim.SGD(
        parameter_groups(cfg, model), momentum=0.9, weight_decay=cfg.optim.weight_decay
    )
    start, best = 0, None
    if state := load_checkpoint(folder):
        trained.load_state_dict(state["trained"])
        optimizer.load_state_dict(state["optimizer"])
        start, best = state["step"], state["best"]
        process.say(f"going on from step {start}")
    log = MetricsLog(folder, process, first_step=start + 1)
    network = torch.compile(trained) if cfg.run.compile else trained
    if process.world > 1:
        network = DistributedDataParallel(network)

    model.train()
    losses = []
    steps = range(start, cfg.optim.steps)
    plan = [training_rows(step, len(batches), cfg, process) for step in steps]
    bar = progress(process, f"training ({cfg.mode})", steps, cfg.optim.steps, start)
    for step, (inputs, masks) in zip(bar, batches.of(plan)):
        inputs, masks = augment(inputs, masks, step)
        with process.autocast():
            logits = network(inputs)  # (n, K, h, w)
        loss = segmentation_loss(at_size(logits, masks.shape[1:]), masks)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - step / cfg.optim.steps) ** 0.9
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

        done, row = step + 1, {}
        if done % cfg.log.every == 0 or done == cfg.optim.steps:
            row = {"step": done, "loss": mean_loss(losses, done), "lr": optimizer.param_groups[-1]["lr"]}
            losses = []
            bar.set_postfix(loss=f"{row['loss']:.3f}", dice=f"{100 * best:.1f}" if best else "-")
        if done % cfg.eval.every == 0 or done == cfg.optim.steps:
            row |= {"step": done, "val_dice": (dice := validate())}
            if dice is None or best is None or dice > best:
                best = dice
                keep()
            if process.is_main and done < cfg.optim.steps:
                state = {"trained": trained.state_dict(), "optimizer": optimizer.state_dict()}
                save_checkpoint(folder, state | {"step": done, "best": best})
            model.train()
        if row:
            log.write(row)
    return best


def parameter_groups(cfg: Config, model: nn.Module) -> list[dict]:
    """Linear: the decoder. Finetune: the encoder at its own rate, then the rest."""
    if cfg.mode == "linear":
        groups = [(model.decoder.parameters(), 1.0)]
    else:
        rest = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
        groups = [(model.encoder.parameters(), cfg.optim.encoder_lr_factor), (rest, 1.0)]
    rates = [(list(parameters), cfg.optim.lr * factor) for parameters, factor in groups]
    return [{"params": parameters, "lr": lr, "initial_lr": lr} for parameters, lr in rates]


def mean_loss(losses: list[Tensor], step: int) -> float:
    """Raises ConfigError if training has diverged. (The copy to the CPU waits for the device; once a log
    line.)"""
    value = float(torch.stack(losses).mean())
    if not np.isfinite(value):
        raise ConfigError(f"optim.lr: the loss is {value} at step {step}; a lower rate may help")
    return value


# ---------------------------------------------------------------------------------------------------------
# Scoring
# ---------------------------------------------------------------------------------------------------------


@dataclass
class CaseScore:
    """What is known of one case: counts (K, 3) as metrics.dice_counts gives them, HD95 in mm per class."""

    counts: Tensor
    hd95: list[float | None]
    shown: tuple[int, np.ndarray] | None  # the slice for the picture and its prediction, common size


@torch.no_grad()
def score(model, batches: Batches, classes, process: Process, desc: str, full=False) -> dict[str, CaseScore]:
    """Segment all slices of all cases and compare with the masks, each on its own grid.

    Cases are divided among the processes; every process gets all results. `full`: HD95 and pictures too.
    """
    dataset = batches.dataset
    own = sorted(set(dataset.cases))[process.rank :: process.world]
    slices = {case: [] for case in own}
    for i, position in enumerate(batches.positions):
        if dataset.cases[position] in slices:
            slices[dataset.cases[position]].append(i)
    model.eval()
    scores = {}
    total = sum(len(rows) for rows in slices.values())
    with progress(process, desc, total=total) as bar:
        for case, rows in slices.items():
            rows.sort(key=lambda i: natural_order(dataset.names[batches.positions[i]]))
            plan = chunks(rows, batches.batch_size)
            predictions = []
            for inputs, masks in batches.of(plan):
                with process.autocast():
                    logits = model(inputs)
                predictions.append(at_size(logits, masks.shape[1:]).argmax(1).to(torch.uint8).cpu())
                bar.update(len(inputs))
            positions = [batches.positions[i] for i in rows]
            scores[case] = score_case(dataset, case, positions, torch.cat(predictions), len(classes), full)
    if process.world > 1:
        parts = [None] * process.world
        dist.all_gather_object(parts, scores)
        scores = {case: part[case] for part in parts for case in part}
    return dict(sorted(scores.items()))


def score_case(
    dataset, case: str, positions: list[int], predictions: Tensor, classes: int, full: bool
) -> CaseScore:
    """One case from the predictions (n, H, W) of its slices, given from the first to the last slice."""
    truths = [torch.from_numpy(dataset.own_mask(position)) for position in positions]
    own = [torch.as_tensor(dataset.to_own_grid(p.numpy(), at)) for p, at in zip(predictions, positions)]
    counts = sum(metrics.dice_counts(p, truth, classes) for p, truth in zip(own, truths))
    distances, shown = [None] * classes, None
    if full:
        spacing = dataset.spacing(case)
        if spacing and len({truth.shape for truth in truths}) == 1:
            distances = organ_distances(torch.stack(own), torch.stack(truths), spacing, classes)
        labelled = [i for i, truth in enumerate(truths) if ((truth > 0) & (truth != metrics.IGNORE)).any()]
        middle = labelled[len(labelled) // 2] if labelled else len(truths) // 2
        shown = positions[middle], predictions[middle].numpy()
    return CaseScore(counts, distances, shown)


def organ_distances(prediction: Tensor, truth: Tensor, spacing, classes: int) -> list[float | None]:
    """HD95 in mm of each class of two volumes (S, H, W); background, which nobody asks for, stays None."""
    counted = truth != metrics.IGNORE
    pairs = ((counted & (prediction == organ), truth == organ) for organ in range(1, classes))
    return [None] + [metrics.hd95(*pair, spacing) for pair in pairs]


def natural_order(name: str) -> list:
    """Sorts slice10 after slice9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def mean_dice(scores: dict[str, CaseScore]) -> float | None:
    """Over cases, then over organs, without background."""
    cases = {case: dict(enumerate(metrics.case_dice(one.counts)[1:])) for case, one in scores.items()}
    return metrics.mean_or_none(metrics.mean_over_cases(cases).values())


def summary(scores: dict[str, CaseScore], classes: list[str]) -> dict:
    """The figures of results.json."""
    organs = classes[1:]
    cases = {case: dict(zip(organs, metrics.case_dice(one.counts)[1:])) for case, one in scores.items()}
    distances = {case: dict(zip(organs, one.hd95[1:])) for case, one in scores.items()}
    dice, hd95 = metrics.mean_over_cases(cases), metrics.mean_over_cases(distances)
    whole = metrics.dataset_dice(sum(one.counts for one in scores.values()))
    return {
        "mean_dice": metrics.mean_or_none(dice.values()),
        "dice": dice,
        "cases": cases,
        "dataset_dice": whole | {"classes": dict(zip(classes, whole["classes"]))},
        "hd95": metrics.mean_or_none(hd95.values()),
        "hd95_organs": hd95,
        "hd95_cases": distances,
    }


@torch.no_grad()
def effective_ranks(batches: Batches) -> dict[str, float | int]:
    """Effective rank of the frozen encoder's features, one process's work, from batches of (n, D, h, w).

    pooled: of the slices' mean vectors; dense: of single positions, a seeded sample, the same number a slice.
    """
    count = len(batches)
    rows = [count * i // min(count, RANK_SLICES) for i in range(min(count, RANK_SLICES))]
    pooled, dense = [], []
    plan = chunks(rows, batches.batch_size)
    for features, _ in progress(batches.process, "effective rank", batches.of(plan), len(plan)):
        vectors = features.float().flatten(2).mT.cpu()  # (n, h w, D)
        pooled.append(vectors.mean(dim=1))
        per_slice = max(1, RANK_POSITIONS // len(rows))
        chosen = torch.randperm(vectors.shape[1], generator=generator(0, len(dense)))[:per_slice]
        dense.append(vectors[:, chosen].flatten(0, 1))
    return {
        "pooled": effective_rank(torch.cat(pooled)),
        "dense": effective_rank(torch.cat(dense)),
        "slices": len(rows),
    }


# ---------------------------------------------------------------------------------------------------------
# An evaluation
# ---------------------------------------------------------------------------------------------------------


def evaluate(cfg: Config, process: Process) -> None:
    """Train on the labelled cases, keep the best model on the validation cases, score the test cases."""
    check_config(cfg)
    check_batch(cfg, process)
    folder = Path(cfg.run.out)
    if results := finished(cfg, folder):
        process.say(f"{folder}: finished already\n{report.organ_table(results)}")
        return
    torch.manual_seed(cfg.seed)
    facts = encoder_facts(encoder_path(cfg))
    classes = class_names(cfg.data.root, cfg.data.classes)
    sets = {
        split: open_set(cfg, split, len(classes)) for split in ("train", "val", "test") if cfg.data[split]
    }
    intensity = normalisation(cfg, facts, sets["train"].stored)
    encoder = build_encoder(cfg, facts, process)
    about = Description(
        cfg.mode, encoder.arch, encoder.in_channels, encoder.output_stride, classes, intensity.as_dict(),
        sets["train"].stored,
    )  # fmt: skip
    model = build_model(about, encoder, process)
    positions = training_positions(sets["train"], cfg.label_fraction, cfg.seed)
    slices = f"at most the {len(positions)} training slices"
    check(cfg, "optim.batch_size", cfg.optim.batch_size <= len(positions), slices)
    folder = make_run_folder(folder, process)
    if process.is_main:
        cfg.save(folder / "config.yaml")

    # What the trained part of the model takes: frozen features, or images (augmented before normalisation).
    linear = cfg.mode == "linear"
    trained = model.decoder if linear else model

    def to_images(stored: Tensor) -> Tensor:
        return network_input(intensity.to_unit(stored), intensity, encoder.in_channels)

    def to_features(stored: Tensor) -> Tensor:
        with process.autocast():
            return frozen_features(encoder, to_images(stored))

    def augment(inputs: Tensor, masks: Tensor, step: int) -> tuple[Tensor, Tensor]:
        if linear:
            return inputs, masks
        numbers, share = generator(cfg.seed, step), len(inputs)
        inputs, masks = crops(inputs, masks, numbers, process.rank * share, process.world * share)
        return network_input(inputs, intensity, encoder.in_channels), masks

    crops = SegmentationAugment(cfg.data.size or sets["train"].size, **cfg.augment)
    everything = {split: list(range(len(dataset))) for split, dataset in sets.items()} | {"train": positions}
    prepared = {"train": to_features if linear else intensity.to_unit}
    batches = {
        split: Batches(
            dataset,
            everything[split],
            prepared.get(split, to_features if linear else to_images),
            cfg,
            process,
        )
        for split, dataset in sets.items()
    }
    model.eval()
    if linear:
        keep_features(cfg, [batches[split] for split in ("train", "val") if split in batches], process)
    if process.is_main:
        split = "val" if "val" in sets else "train"
        frozen = (
            batches[split] if linear else Batches(sets[split], everything[split], to_features, cfg, process)
        )
        ranks = effective_ranks(frozen)

    def validate() -> float | None:
        if "val" not in batches:
            return None
        return mean_dice(score(trained, batches["val"], classes, process, "validation"))

    def keep_best() -> None:
        if process.is_main:
            save_model(folder / "model.pth", model, about)

    best = train(cfg, process, model, batches["train"], augment, validate, keep_best)
    process.barrier()
    model.load_state_dict(read_weights(folder / "model.pth")["state"])
    scores = score(trained, batches["test"], classes, process, "test cases", full=True)
    if process.is_main:
        results = summary(scores, classes) | {
            "val_dice": best,
            "effective_rank": ranks,
            "encoder": cfg.encoder,
            "encoder_sha256": sha256(encoder_path(cfg)),
            "mode": cfg.mode,
            "seed": cfg.seed,
            "label_fraction": cfg.label_fraction,
            "config": cfg.plain(),
        }
        draw_predictions(folder / "predictions.png", sets["test"], scores, intensity, classes)
        write_whole(folder / "cases.csv", report.cases_csv(results))
        write_whole(folder / "results.json", json.dumps(results, indent=1))
        for name in ("checkpoint.pth", "checkpoint.pth.previous"):
            (folder / name).unlink(missing_ok=True)
        process.say(
            f"{report.organ_table(results)}\n{folder}/results.json, cases.csv, predictions.png, model.pth"
        )
    process.barrier()


def check_batch(cfg: Config, process: Process) -> None:
    wanted = f"a multiple of the {process.world} processes"
    check(cfg, "optim.batch_size", cfg.optim.batch_size % process.world == 0, wanted)


def finished(cfg: Config, folder: Path) -> dict | None:
    """The results of this very evaluation if the folder holds them.

    Raises ConfigError if it holds another evaluation, done or under way, or one of an encoder file of
    the same name but other content.
    """
    results, saved = folder / "results.json", folder / "config.yaml"
    if not saved.is_file() or not (results.is_file() or (folder / "checkpoint.pth").is_file()):
        return None
    try:
        before = load_config(DEFAULTS, saved, [], NULLABLE)
    except ConfigError as error:
        raise ConfigError(f"run.out: {folder} holds another kind of run ({error})") from None
    if name := cfg.first_difference(before, FREE_KEYS):
        there, here = before.flat()[name], cfg.flat()[name]
        raise ConfigError(
            f"{name}: {folder} holds a run with {there!r}, not {here!r}; choose another run.out"
        )
    if not results.is_file():
        return None
    content = report.read_results(folder)
    if content["encoder_sha256"] != sha256(encoder_path(cfg)):
        raise ConfigError(
            f"encoder: {cfg.encoder} has changed since the run in {folder}; choose another run.out"
        )
    return content


def sha256(path: Path | None) -> str | None:
    if path is None:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_set(cfg: Config, split: str, num_classes: int) -> SegmentationDataset:
    data = cfg.data
    return SegmentationDataset(data.root, data[split], data.images, data.masks, data.hu_offset, num_classes)


def keep_features(cfg: Config, all_batches: list[Batches], process: Process) -> None:
    """Compute frozen features once, if the config or (cache: auto) their size allows to keep them all."""
    needed = sum(batches.bytes() for batches in all_batches) / 2**30
    if cfg.cache == "off" or (cfg.cache == "auto" and needed > cfg.cache_gb):
        if cfg.cache == "auto":
            process.say(f"features need {needed:.1f} GiB, more than cache_gb: computed again at every step")
        return
    for batches in all_batches:
        batches.keep("frozen features")


def draw_predictions(
    path: Path, dataset, scores: dict[str, CaseScore], intensity: Intensity, classes
) -> None:
    """The middle one of the labelled slices of each of the first PICTURE_CASES cases by name."""
    rows = []
    for one in list(scores.values())[:PICTURE_CASES]:
        position, prediction = one.shown
        image, truth = dataset[position]
        unit = intensity.to_unit(image[0])
        if intensity.window is None:
            unit = (unit - unit.min()) / (unit.max() - unit.min()).clamp(min=1e-6)
        rows.append((dataset.names[position], unit.numpy(), truth.numpy(), prediction))
    with written_whole(path) as file:
        report.prediction_page(rows, classes).save(file, format="PNG")


# ---------------------------------------------------------------------------------------------------------
# Prediction
# ---------------------------------------------------------------------------------------------------------


def predict(cfg: Config, process: Process, source: Path, out: Path) -> None:
    """Masks for a slice, a volume, or all slices and volumes below a folder, by the model in run.out.

    Slices become 8-bit PNGs of the same relative names; NIfTI volumes become NIfTI on their own grid.
    Raises ConfigError without a trained model, DataError for an input that cannot be used.
    """
    model, about = load_model(Path(cfg.run.out) / "model.pth", process)
    slices, volumes = slices_and_volumes(source)
    base = source if source.is_dir() else source.parent
    make_run_folder(out, process)
    own = (slices + volumes)[process.rank :: process.world]
    for path in progress(process, "predicting", own):
        target = out / path.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path in volumes:
            volume = read_volume(path)
            stored = torch.from_numpy(volume.array.astype(np.float32))
            write_labels(target, segment(model, about, stored, "hu", path, cfg, process), volume)
        else:
            array, kind = read_stored(path, cfg.data.hu_offset)
            labels = segment(model, about, torch.from_numpy(array)[None], kind, path, cfg, process)
            write_png(target.with_suffix(".png"), labels[0])
    process.say(f"{out}: masks of {len(slices)} slices and {len(volumes)} volumes")


def slices_and_volumes(source: Path) -> tuple[list[Path], list[Path]]:
    """The .png and .npy files, and the .nii and .nii.gz files, of a folder (with folders in it) or of one
    file."""
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    slices = [path for path in files if path.suffix.lower() in (".png", ".npy")]
    volumes = [path for path in files if path.name.lower().endswith((".nii", ".nii.gz"))]
    if not slices and not volumes:
        raise DataError(f"{source}: neither slices (.png, .npy) nor volumes (.nii, .nii.gz)")
    return slices, volumes


@torch.no_grad()
def segment(model, about: Description, stored: Tensor, kind: str, path: Path, cfg: Config, process: Process):
    """Labels (S, H, W) uint8 of slices (S, H, W) in stored values, each slice whole."""
    if kind != about.stored:
        raise DataError(f"{path}: holds {kind} values, the model was trained on {about.stored} ones")
    intensity = Intensity(**about.normalisation)
    labels = []
    for some in stored.split(cfg.optim.batch_size):
        unit = intensity.to_unit(some[:, None].to(process.device))
        with process.autocast():
            logits = model(network_input(unit, intensity, about.in_channels))
        labels.append(at_size(logits, some.shape[1:]).argmax(1).to(torch.uint8).cpu())
    return torch.cat(labels).numpy()


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"settings:\n{DEFAULTS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML over the settings below")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--predict", metavar="INPUT", help="a slice, a NIfTI volume, or a folder of such")
    parser.add_argument("--out", metavar="DIR", help="where --predict writes masks")
    parser.add_argument(
        "--compare", metavar="DIR", nargs="+", help="print the results of several runs in one table"
    )
    args = parser.parse_intermixed_args(argv)
    if args.compare:
        print(report.compare(args.compare))
        return 0
    if (args.predict is None) != (args.out is None):
        raise ConfigError("--predict INPUT and --out DIR belong together")
    cfg = load_config(DEFAULTS, args.config, args.overrides, NULLABLE)
    process = start_process(cfg.run)
    try:
        if args.predict:
            predict(cfg, process, Path(args.predict), Path(args.out))
        else:
            evaluate(cfg, process)
    finally:
        process.close()
    return 0


if __name__ == "__main__":
    run_script(main, (DataError, WeightsError))
