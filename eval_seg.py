"""Evaluate an encoder on multi-organ segmentation, and predict masks with the model trained for that.

    python eval_seg.py --config configs/linear.yaml encoder=runs/x/encoder.pth       # frozen, linear decoder
    python eval_seg.py --config configs/finetune.yaml encoder=runs/x/encoder.pth     # all trained, DeepLabv3+
    torchrun --nproc_per_node=8 eval_seg.py --config configs/btcv_finetune.yaml encoder=runs/x/encoder.pth
    python eval_seg.py --config configs/linear.yaml --predict ct.nii.gz --out pred   # by the model in run.out
    python eval_seg.py --compare runs/x-linear runs/x-finetune runs/random-linear    # one table

An evaluation leaves in run.out: config.yaml, metrics.jsonl, model.pth (the best on the validation cases, with
all that --predict needs), results.json, cases.csv, table.md and predictions.png. The same command again
prints its table; after a stop it goes on from the last validation or, if it was asked to stop (SIGTERM,
SIGUSR1, Ctrl-C; exit code 75), from the last step.

Under torchrun a batch is divided among the processes and gradients are averaged; BatchNorm normalises each
process's share (no SyncBatchNorm: shares of 4 crops and more do without). Cases are divided for scoring.
"""

import argparse
import hashlib
import json
import math
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import report
from config import (
    Config,
    ConfigError,
    OneLineParser,
    check,
    check_choice,
    check_fraction,
    check_positive,
    check_range,
    config_errors,
    load_config,
)
from data import DataError, Intensity, SegmentationAugment, SegmentationDataset, class_names, default_window
from losses import effective_rank, segmentation_loss
from models import Encoder, WeightsError, load_encoder_weights, read_weights
from runtime import (
    STOP_MARKER,
    MetricsLog,
    Process,
    StopRequest,
    leave,
    load_checkpoint,
    load_optimizer,
    make_run_folder,
    progress,
    run_script,
    save_checkpoint,
    start_process,
    warn,
    write_whole,
)
from segmenter import (
    Batches,
    Description,
    at_size,
    build_model,
    chunks,
    frozen_features,
    network_input,
    predict,
    save_model,
)
from structure import dense_structure

DEFAULTS = """
seed: 0
mode: linear                # linear: frozen encoder, linear decoder | finetune: DeepLabv3+, all trained
encoder: null               # path of encoder.pth or another checkpoint, torchvision:PATH, or random
label_fraction: 1.0         # share of the training cases; smaller ones are subsets of larger ones
cache: auto                 # linear: compute the features once: on | off | auto: beyond cache_gb in a file
cache_gb: 4.0               # GiB of memory for features; the file is in run.out, and gone at the end
run:
  out: runs/eval            # folder of the results
  device: auto              # auto | cpu | cuda
  precision: auto           # auto | fp32 | bf16; auto: bf16 where a GPU has it
  compile: false            # torch.compile: minutes at the start, some percent faster then
  timeout_minutes: 10.0     # how long a process waits for another one before giving up
  deterministic: false      # the same bits on the same GPU, slower; a CPU run always gives the same bits
data:
  root: null                # the data set's folder
  images: images            # folders below root; {split} is the list's name
  masks: masks
  train: train.txt
  val: val.txt              # chooses the best model; null: the last one is taken
  test: test.txt
  classes: null             # number of classes, or names, background first; null: classes.json below root
  size: null                # finetune: side of the training crops, px; null: the slices' size
  window: auto              # [low, high] HU; null: unscaled; auto: the encoder's, else [-160, 240]
  hu_offset: 1024           # HU = 16-bit value - hu_offset
  mean: null                # of the windowed values; null: the encoder's, else 0.5
  std: null                 # null: the encoder's, else 0.25
  workers: 2                # reading processes for each training process
augment:                    # finetune; see augment.SegmentationAugment
  scale: [0.5, 2.0]
  flip: 0.0                 # probability; 0 because organs have sides
  brightness: 0.1
  contrast: 0.1
  gamma: 0.1
  noise: 0.02
model:
  arch: null                # resnet18 | 26 | 34 | 50 | 101; null: the encoder's, else resnet50
  in_channels: 1            # 3: the slice three times
  output_stride: 8          # 8 | 16 | 32
optim:                      # SGD, momentum 0.9, lr times (1 - step / steps) ** 0.9
  steps: 2000
  batch_size: 16            # slices a step, over all processes
  lr: null                  # null: 0.5 for linear, 0.05 for finetune
  encoder_lr_factor: 1.0    # finetune: the encoder's lr over the decoder's
  weight_decay: 0.0001
eval:
  every: 200                # steps between validations
  window: null              # px; slices are segmented in windows of this side; null: whole
  overlap: 0.5              # of neighbouring windows, share of their side
log:
  every: 20                 # steps between lines of metrics.jsonl
"""

NULLABLE = {
    "cache": (str, bool),
    "encoder": str,
    "data.root": str,
    "data.val": str,
    "data.classes": (int, list),
    "data.size": int,
    "data.window": (list, str),
    "data.mean": float,
    "data.std": float,
    "model.arch": str,
    "optim.lr": float,
    "eval.window": int,
}
# What may differ when a run is repeated in its folder: none of it decides what is computed.
FREE_KEYS = ("run.out", "run.device", "run.compile", "run.timeout", "data.workers", "cache", "log.")
PHOTOMETRIC = ("brightness", "contrast", "gamma", "noise")
RANK_SLICES, RANK_POSITIONS = 2048, 4096  # the effective rank looks at no more slices and feature vectors
STRUCTURE_SLICES, STRUCTURE_POSITIONS = 128, 64  # the dense structure: slices, and positions of each


def check_config(cfg: Config) -> None:
    """Everything that is impossible whatever the data is; raises ConfigError."""
    check_choice(cfg, "mode", ("linear", "finetune"))
    if cfg.optim.lr is None:
        cfg.optim["lr"] = 0.5 if cfg.mode == "linear" else 0.05
    if isinstance(cfg.cache, bool):  # YAML reads on and off as true and false
        cfg["cache"] = "on" if cfg.cache else "off"
    check_choice(cfg, "cache", ("auto", "on", "off"))
    check_choice(cfg, "run.device", ("auto", "cpu", "cuda"))
    check_choice(cfg, "run.precision", ("auto", "fp32", "bf16"))
    check_positive(cfg, "label_fraction", "cache_gb", "eval.every", "log.every")
    check_positive(cfg, "run.timeout_minutes")
    check_positive(cfg, "optim.steps", "optim.batch_size", "optim.lr", "optim.encoder_lr_factor")
    check_fraction(cfg, "label_fraction", "augment.flip", "eval.overlap")
    check(cfg, "eval.overlap", cfg.eval.overlap < 1, "0 or more, below 1")
    check(cfg, "eval.window", cfg.eval.window is None or cfg.eval.window >= 32, "32 px or more, or null")
    check(cfg, "seed", 0 <= cfg.seed < 2**31, "0 to 2147483647")
    for name in ("data.workers", "optim.weight_decay", *(f"augment.{n}" for n in PHOTOMETRIC)):
        check(cfg, name, cfg.flat()[name] >= 0, "0 or more")
    check_range(cfg, "augment.scale")
    check(cfg, "augment.scale", cfg.augment.scale[0] > 0, "[low, high], both above 0")
    check(cfg, "data.size", cfg.data.size is None or 0 < cfg.data.size <= 8192, "1 to 8192 px, or null")
    check(cfg, "model.in_channels", cfg.model.in_channels in (1, 3), "1 or 3")
    for name in ("data.train", "data.test"):
        check(cfg, name, cfg.flat()[name] != "", "a list file")
    check(cfg, "data.std", cfg.data.std is None or cfg.data.std > 0, "a value above 0, or null")
    if isinstance(cfg.data.window, list):
        check_range(cfg, "data.window")
    else:
        check(cfg, "data.window", cfg.data.window in (None, "auto"), "[low, high], auto or null")
    if isinstance(cfg.data.classes, int):
        check(cfg, "data.classes", 2 <= cfg.data.classes <= 255, "2 to 255, the background included")


# ---------------------------------------------------------------------------------------------------------
# The encoder, and the normalisation that travels with it
# ---------------------------------------------------------------------------------------------------------


def encoder_path(cfg: Config) -> Path | None:
    """The weights file; None for a random encoder."""
    return None if cfg.encoder == "random" else Path(cfg.encoder.removeprefix("torchvision:")).expanduser()


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
    left_open = "auto" if key == "window" else None
    if given not in (left_open, facts[key]):
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


def training_rows(step: int, count: int, cfg: Config, process: Process) -> list[int]:
    """This process's share of the slices of a step: the global batch depends on (seed, step) only.

    Epochs are permutations of range(count), put end to end and cut into batches.
    """
    size = cfg.optim.batch_size
    share = size // process.world
    first = step * size + process.rank * share
    return [epoch_order(cfg.seed, at // count, count)[at % count] for at in range(first, first + share)]


def generator(seed: int, number: int) -> torch.Generator:
    """A CPU generator for a pair of numbers, such as seed and step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    return torch.randperm(count, generator=generator(seed, epoch)).tolist()


def training_positions(dataset, fraction: float, seed: int) -> list[int]:
    """The slices of a share of the cases, at least one: the first of a seeded order, so that shares nest."""
    cases = sorted(set(dataset.cases))
    order = torch.randperm(len(cases), generator=generator(seed, 0)).tolist()
    chosen = {cases[i] for i in order[: max(1, round(fraction * len(cases)))]}
    return [i for i, case in enumerate(dataset.cases) if case in chosen]


# ---------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Asked to stop; everything is saved. Holds the exit code."""


def train(
    cfg: Config,
    process: Process,
    trained: nn.Module,
    batches: Batches,
    augment,
    validate,
    keep,
    stop: StopRequest,
):
    """Train the decoder of a LinearProbe, or a whole DeepLabV3Plus; returns the best validation Dice.

    Args:
        augment: (inputs, masks, step) -> inputs, masks.
        validate: () -> mean Dice of the validation cases, None without any.
        keep: () -> None, called when the model is the best so far.

    Raises Stopped.
    """
    folder = Path(cfg.run.out)
    optimizer = torch.optim.SGD(
        parameter_groups(cfg, trained), momentum=0.9, weight_decay=cfg.optim.weight_decay
    )
    start, best = 0, None
    if state := process.from_main(lambda: load_checkpoint(folder)):
        try:
            trained.load_state_dict(state["trained"])
            load_optimizer(optimizer, state["optimizer"])
            start, best, encoder = state["step"], state["best"], state["encoder_sha256"]
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            raise ConfigError(f"run.out: the checkpoint in {folder} is not one of this program") from None
        check_same_encoder(cfg, encoder)
        process.say(f"going on from step {start}")
    log = MetricsLog(folder, process, done=start)
    network = torch.compile(trained) if cfg.run.compile else trained
    if process.world > 1:
        network = DistributedDataParallel(network)

    trained.train()
    losses = []
    steps = range(start, cfg.optim.steps)
    plan = [training_rows(step, len(batches), cfg, process) for step in steps]
    bar = progress(process, f"training ({cfg.mode})", steps, cfg.optim.steps, start)
    for step, (inputs, masks) in zip(bar, batches.of(plan)):
        torch.manual_seed(cfg.seed * 1_000_003 + step * process.world + process.rank)  # for dropout
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
        last = done == cfg.optim.steps
        if last or done % cfg.log.every == 0:
            row = {"step": done, "loss": mean_loss(losses, done), "lr": optimizer.param_groups[-1]["lr"]}
            losses = []
            bar.set_postfix(loss=f"{row['loss']:.3f}", val_dice=report.percent(best))
        if last or done % cfg.eval.every == 0:
            dice = validate()
            trained.train()
            row |= {"step": done, "val_dice": dice}
        if row:
            log.write(row)
        if "val_dice" in row and (dice is None or best is None or dice > best):
            best = dice
            keep()
        looking = process.world == 1 or done % cfg.log.every == 0  # asking all processes takes time
        stopping = not last and looking and any(process.everyone(bool(stop)))
        if process.is_main and not last and ("val_dice" in row or stopping):
            state = {"trained": trained.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": done, "best": best, "encoder_sha256": sha256(encoder_path(cfg))}
            try:
                save_checkpoint(folder, state)
            except OSError as error:
                warn(f"step {done}: no checkpoint written ({error}); training goes on")
        if stopping:
            raise Stopped(leave(folder, done, process.everyone(stop.reason), process))
    return best


def parameter_groups(cfg: Config, trained: nn.Module) -> list[dict]:
    """The encoder, if it is trained, at its own rate; then everything else."""
    encoder = [p for name, p in trained.named_parameters() if name.startswith("encoder.")]
    others = [p for name, p in trained.named_parameters() if not name.startswith("encoder.")]
    groups = [(encoder, cfg.optim.lr * cfg.optim.encoder_lr_factor), (others, cfg.optim.lr)]
    return [{"params": params, "lr": lr, "initial_lr": lr} for params, lr in groups if params]


def mean_loss(losses: list[Tensor], step: int) -> float:
    """Mean since the last log line (waits for the device); ConfigError if training has diverged."""
    value = float(torch.stack(losses).mean())
    if not math.isfinite(value):
        raise ConfigError(f"optim.lr: the loss is {value} at step {step}; a lower rate may help")
    return value


# ---------------------------------------------------------------------------------------------------------
# An evaluation
# ---------------------------------------------------------------------------------------------------------


def evaluate(cfg: Config, process: Process, stop: StopRequest) -> None:
    """Train on the labelled cases, keep the best model on the validation cases, score the test cases."""
    for name in ("encoder", "data.root"):
        check(cfg, name, cfg.flat()[name], "a path (for the encoder also: random)")
    wanted = f"a multiple of the {process.world} processes"
    check(cfg, "optim.batch_size", cfg.optim.batch_size % process.world == 0, wanted)
    if cfg.mode == "finetune":
        # Image pooling leaves one value a slice, which BatchNorm cannot normalise alone.
        enough = cfg.optim.batch_size >= 2 * process.world
        check(cfg, "optim.batch_size", enough, "2 slices a process or more")
    folder = Path(cfg.run.out)
    if results := finished(cfg, folder):
        process.say(f"{folder}: finished already\n{report.organ_table(results)}")
        return

    torch.manual_seed(cfg.seed)
    classes = class_names(cfg.data.root, cfg.data.classes)
    sets = open_sets(cfg, len(classes))
    facts = encoder_facts(encoder_path(cfg))
    intensity = normalisation(cfg, facts, sets["train"].stored)
    encoder = build_encoder(cfg, facts, process)
    about = Description(
        mode=cfg.mode,
        arch=encoder.arch,
        in_channels=encoder.in_channels,
        output_stride=encoder.output_stride,
        classes=classes,
        normalisation=intensity.as_dict(),
        stored=sets["train"].stored,
    )
    model = build_model(about, encoder, process).eval()
    positions = {split: list(range(len(dataset))) for split, dataset in sets.items()}
    positions["train"] = training_positions(sets["train"], cfg.label_fraction, cfg.seed)
    wanted = f"at most the {len(positions['train'])} training slices"
    check(cfg, "optim.batch_size", cfg.optim.batch_size <= len(positions["train"]), wanted)
    make_run_folder(folder, process)
    if process.is_main:
        (folder / STOP_MARKER).unlink(missing_ok=True)
        write_whole(folder / "config.yaml", cfg.as_yaml())

    def to_images(stored: Tensor) -> Tensor:
        return network_input(intensity.to_unit(stored), intensity, encoder.in_channels)

    def to_features(stored: Tensor) -> Tensor:
        with process.autocast():
            return frozen_features(encoder, to_images(stored))

    def batches_of(split: str, prepare) -> Batches:
        return Batches(sets[split], positions[split], prepare, cfg, process)

    # The linear decoder takes frozen features of whole slices, the fine-tuned model images: augmented, then
    # normalised. What is cut into windows is images, so the whole model is scored then.
    scored_features = cfg.mode == "linear" and cfg.eval.window is None
    batches = {split: batches_of(split, to_features if scored_features else to_images) for split in sets}
    if cfg.mode == "linear":
        trained, augment = model.decoder, no_augmentation
        batches["train"] = batches_of("train", to_features)
        kept = ("train", "val") if scored_features else ("train",)
        keep_features(cfg, [batches[split] for split in kept if split in sets], process)
    else:
        trained, augment = model, crop_augmentation(cfg, sets["train"].size, intensity, encoder, process)
        batches["train"] = batches_of("train", intensity.to_unit)
    scored = trained if scored_features else model
    if process.is_main:
        split = "val" if "val" in sets else "train"
        collapse = collapse_measures(batches[split] if scored_features else batches_of(split, to_features))

    def validate() -> float | None:
        if "val" not in sets:
            return None
        return report.mean_dice(report.score(scored, batches["val"], process, "validation"))

    def keep() -> None:
        if process.is_main:
            save_model(folder / "model.pth", model, about)

    best = train(cfg, process, trained, batches["train"], augment, validate, keep, stop)
    process.barrier()
    model.load_state_dict(read_weights(folder / "model.pth")["state"])
    scores = report.score(scored, batches["test"], process, "test cases", full=True)
    if process.is_main:
        results = report.summary(scores, classes) | {
            "val_dice": best,
            **collapse,
            "encoder": cfg.encoder,
            "encoder_sha256": sha256(encoder_path(cfg)),
            "mode": cfg.mode,
            "seed": cfg.seed,
            "label_fraction": cfg.label_fraction,
            "config": cfg.plain(),
        }
        report.draw_predictions(folder / "predictions.png", sets["test"], scores, intensity, classes)
        write_whole(folder / "cases.csv", report.cases_csv(results))
        write_whole(folder / "table.md", report.organ_table(results) + "\n")
        # results.json comes last: it marks the run as finished.
        write_whole(folder / "results.json", json.dumps(results, indent=1))
        for name in ("checkpoint.pth", "checkpoint.pth.previous"):
            (folder / name).unlink(missing_ok=True)
        process.say(report.organ_table(results))
        process.say(f"{folder}: results.json, cases.csv, table.md, predictions.png, model.pth")
    process.barrier()


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
        raise ConfigError(f"{name}: {folder} holds a run with {there!r}, not {here!r}; change run.out")
    if not results.is_file():
        return None
    content = report.read_results(folder)
    check_same_encoder(cfg, content["encoder_sha256"])
    return content


def check_same_encoder(cfg: Config, before: str | None) -> None:
    if before != sha256(encoder_path(cfg)):
        raise ConfigError(
            f"encoder: {cfg.encoder} has changed since the run in {cfg.run.out}; remove that run"
        )


def sha256(path: Path | None) -> str | None:
    if path is None:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_sets(cfg: Config, num_classes: int) -> dict[str, SegmentationDataset]:
    """The train, val (if there is one) and test slices with their masks."""
    data = cfg.data
    lists = {"train": data.train, "val": data.val, "test": data.test}
    folders = (data.images, data.masks, data.hu_offset, num_classes)
    sets = {split: SegmentationDataset(data.root, file, *folders) for split, file in lists.items() if file}
    for split, dataset in sets.items():
        if dataset.stored != sets["train"].stored:
            raise DataError(
                f"{lists[split]}: {dataset.stored} slices, but {sets['train'].stored} in {data.train}"
            )
    return sets


def keep_features(cfg: Config, all_batches: list[Batches], process: Process) -> None:
    """Compute frozen features once, unless the config forbids it; with cache: auto what exceeds cache_gb is
    held in a file, if there is room for it."""
    if cfg.cache == "off":
        return
    needed, folder = sum(batches.bytes() for batches in all_batches) / 2**30, None
    if cfg.cache == "auto" and needed > cfg.cache_gb:
        folder = Path(cfg.run.out)
        process.say(f"features need {needed:.1f} GiB, more than cache_gb: held in a file in {folder}")
    try:
        for batches in all_batches:
            batches.keep("frozen features", folder)
    except OSError as error:
        if folder is None:
            raise
        warn(f"no file of features in {folder} ({error.strerror}): computed again at every step")


def no_augmentation(inputs: Tensor, masks: Tensor, step: int) -> tuple[Tensor, Tensor]:
    return inputs, masks


def crop_augmentation(
    cfg: Config, size: tuple[int, int], intensity: Intensity, encoder: Encoder, process: Process
):
    """Augmented crops of windowed images, as the network takes them: a function of (seed, step)."""
    if intensity.window is None:
        for name in PHOTOMETRIC:
            check(cfg, f"augment.{name}", cfg.augment[name] == 0, "0, since data.window is null")
    crops = SegmentationAugment(cfg.data.size or size, **cfg.augment)

    def augment(unit: Tensor, masks: Tensor, step: int) -> tuple[Tensor, Tensor]:
        share = len(unit)
        first, total = process.rank * share, process.world * share
        unit, masks = crops(unit, masks, generator(cfg.seed, step), first, total)
        return network_input(unit, intensity, encoder.in_channels), masks

    return augment


@torch.no_grad()
def collapse_measures(batches: Batches) -> dict[str, dict]:
    """How far the frozen encoder's features have collapsed, from batches of (n, D, h, w).

    effective_rank: pooled: of the slices' mean vectors; dense: of single positions, the same number of each
    slice by chance. structure: structure.py's measures, also of some positions by chance.
    """
    count = min(len(batches), RANK_SLICES)
    rows = [len(batches) * i // count for i in range(count)]
    structured = set(rows[:: -(-count // STRUCTURE_SLICES)])
    pooled, dense, structure = [], [], []
    plan = chunks(rows, batches.batch_size)
    for some, (features, _) in zip(
        plan, progress(batches.process, "effective rank", batches.of(plan), len(plan))
    ):
        vectors = features.float().flatten(2).mT.cpu()  # (n, h w, D)
        chosen = torch.randperm(vectors.shape[1], generator=generator(0, len(dense)))
        pooled.append(vectors.mean(dim=1))
        dense.append(vectors[:, chosen[: max(1, RANK_POSITIONS // count)]].flatten(0, 1))
        mine = [i for i, row in enumerate(some) if row in structured]
        structure.append(vectors[mine][:, chosen[:STRUCTURE_POSITIONS]])
    ranks = {"pooled": effective_rank(torch.cat(pooled)), "dense": effective_rank(torch.cat(dense))}
    return {
        "effective_rank": ranks | {"slices": count},
        "structure": dense_structure(torch.cat(structure)),
    }


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(
        description=__doc__,
        epilog=f"settings:\n{DEFAULTS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML over the settings below")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--predict", metavar="INPUT", help="a slice, a NIfTI volume, or a folder of such")
    parser.add_argument("--out", metavar="DIR", help="where --predict writes masks")
    parser.add_argument("--compare", metavar="DIR", nargs="+", help="print several runs in one table")
    parser.add_argument("--folder", action="store_true", help="check the settings, print run.out, and stop")
    args = parser.parse_intermixed_args(argv)
    if args.compare:
        print(report.compare(args.compare))
        return 0
    if (args.predict is None) != (args.out is None):
        raise ConfigError("--predict INPUT and --out DIR belong together")
    cfg = load_config(DEFAULTS, args.config, args.overrides, NULLABLE)
    check_config(cfg)
    if args.folder:
        print(cfg.run.out)
        return 0
    process = start_process(cfg.run)
    try:
        if args.predict:
            predict(cfg, process, Path(args.predict), Path(args.out))
        else:
            with StopRequest(process.rank) as stop:
                evaluate(cfg, process, stop)
    except Stopped as stopped:
        return stopped.args[0]
    finally:
        process.close()
    return 0


if __name__ == "__main__":
    run_script(main, (DataError, WeightsError))
