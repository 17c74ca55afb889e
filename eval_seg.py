"""Evaluate an encoder on multi-organ segmentation, and predict masks with the model trained for that.

    python eval_seg.py --config configs/linear.yaml encoder=runs/x/encoder.pth       # frozen, linear decoder
    python eval_seg.py --config configs/finetune.yaml encoder=runs/x/encoder.pth     # all trained, DeepLabv3+
    torchrun --nproc_per_node=8 eval_seg.py --config configs/btcv_finetune.yaml encoder=runs/x/encoder.pth
    python eval_seg.py --config configs/linear.yaml --predict ct.nii.gz --out pred   # by the model in run.out
    python eval_seg.py --compare runs/x-linear runs/x-finetune runs/random-linear    # one table

An evaluation leaves in run.out: config.yaml, metrics.jsonl, model.pth (the best on the validation cases, with
all that --predict needs), results.json, cases.csv, table.md and predictions.png. The same command again
prints its table; after a stop it resumes from the last validation or, if it was asked to stop (SIGTERM,
SIGUSR1, Ctrl-C; exit code 75), from the last step.

Under torchrun a batch is divided among the processes and gradients are averaged; BatchNorm normalises each
process's share (no SyncBatchNorm: not needed for 4 or more crops per process). Cases are divided for scoring.
"""

import argparse

from engine.config import Config, ConfigError, load_config, settings_parser

DEFAULTS = """
seed: 0
mode: linear                # linear: frozen encoder, linear decoder | finetune: DeepLabv3+, all trained
encoder: null               # encoder.pth or another file of weights, the folder of a run, or random
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
  classes: null             # number of classes, or names, background first; null: those of set.json
  size: null                # finetune: side of the training crops, px; null: the slices' size
  window: auto              # [low, high] HU; null: unscaled; auto: the encoder's, else [-160, 240]
  mask_map: null            # {pixel value or "r,g,b": class}, as {255: 1}; other grey values stay
  hu_offset: null           # HU = 16-bit value - hu_offset; null: the set's, or 1024; 0: values as stored
  mean: null                # of the windowed values; null: the encoder's, else 0.5
  std: null                 # null: the encoder's, else 0.25
  workers: 2                # reading processes for each training process
  insist: false             # go on, with a warning, where the data look impossible
augment:                    # finetune; see augment.SegmentationAugment
  scale: [0.5, 2.0]
  flip: 0.0                 # probability; 0 because organs have sides
  brightness: 0.1
  contrast: 0.1
  gamma: 0.1
  noise: 0.02
model:
  arch: null                # resnet18 | 26 | 26_half | 34 | 50 | 101; null: the encoder's
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


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = settings_parser(__doc__, DEFAULTS)
    parser.add_argument("--predict", metavar="INPUT", help="a slice, a NIfTI volume, or a folder of such")
    parser.add_argument("--out", metavar="DIR", help="where --predict writes masks")
    parser.add_argument("--compare", metavar="DIR", nargs="+", help="print several runs in one table")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    parse_arguments()  # answers --help before the imports, which take seconds

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from augment import SegmentationAugment
from ct.properties import KINDS, class_names
from ct.slices import mask_mapping
from data import DataError, Intensity, SegmentationDataset, encoder_card, network_input
from engine.files import make_run_folder, refuse_other_run, write_whole
from engine.ownership import all_refuse
from engine.process import Process, only_warning, start_process, warn
from engine.stopping import StopRequest, begin, run_script
from evaluation import encoder_file, report
from evaluation.batches import Batches, frozen_collapse
from evaluation.judgement import heed_evaluation
from evaluation.prediction import predict
from evaluation.segmenter import Description, build_model, frozen_features, load_model, save_model
from evaluation.supervised import Stopped, train, training_positions
from models import Encoder, WeightsError, seeded

NULLABLE = {
    "cache": (str, bool),
    "encoder": str,
    "data.root": str,
    "data.val": str,
    "data.classes": (int, list),
    "data.size": int,
    "data.mask_map": dict,
    "data.hu_offset": float,
    "data.window": (list, str),
    "data.mean": float,
    "data.std": float,
    "model.arch": str,
    "optim.lr": float,
    "eval.window": int,
}
# What may differ when a run is repeated in its folder: none of it decides what is computed.
FREE_KEYS = ("run.out", "run.device", "run.compile", "run.timeout", "cache", "log.")
FREE_KEYS += ("data.workers", "data.insist")
SCRIPT = "eval_seg.py"  # whose folders these are, see engine/ownership.py
PHOTOMETRIC = ("brightness", "contrast", "gamma", "noise")


def check_config(cfg: Config) -> None:
    """Everything that is impossible whatever the data is; raises ConfigError."""
    cfg.check_choice("mode", "linear", "finetune")
    if cfg.optim.lr is None:
        cfg.optim["lr"] = 0.5 if cfg.mode == "linear" else 0.05
    if isinstance(cfg.cache, bool):  # YAML reads on and off as true and false
        cfg["cache"] = "on" if cfg.cache else "off"
    cfg.check_choice("cache", "auto", "on", "off")
    cfg.check_choice("run.device", "auto", "cpu", "cuda")
    cfg.check_choice("run.precision", "auto", "fp32", "bf16")
    cfg.check_positive("label_fraction", "cache_gb", "run.timeout_minutes", "eval.every", "log.every")
    cfg.check_positive("optim.steps", "optim.batch_size", "optim.lr", "optim.encoder_lr_factor")
    cfg.check_fraction("label_fraction", "augment.flip", "eval.overlap")
    cfg.check("eval.overlap", cfg.eval.overlap < 1, "0 or more, below 1")
    cfg.check("eval.window", cfg.eval.window is None or cfg.eval.window >= 32, "32 px or more, or null")
    cfg.check("seed", 0 <= cfg.seed < 2**31, "0 to 2147483647")
    cfg.check_not_negative("data.workers", "optim.weight_decay", *(f"augment.{n}" for n in PHOTOMETRIC))
    cfg.check_range("augment.scale")
    cfg.check("augment.scale", cfg.augment.scale[0] > 0, "[low, high], both above 0")
    cfg.check("data.size", cfg.data.size is None or 0 < cfg.data.size <= 8192, "1 to 8192 px, or null")
    cfg.check("model.in_channels", cfg.model.in_channels in (1, 3), "1 or 3")
    for name in ("data.train", "data.test"):
        cfg.check(name, cfg.flat()[name] != "", "a list file")
    cfg.check("data.std", cfg.data.std is None or cfg.data.std > 0, "a value above 0, or null")
    if isinstance(cfg.data.window, list):
        cfg.check_range("data.window")
    else:
        cfg.check("data.window", cfg.data.window in (None, "auto"), "[low, high], auto or null")
    if isinstance(cfg.data.classes, int):
        cfg.check("data.classes", 2 <= cfg.data.classes <= 255, "2 to 255, the background included")


# ---- An evaluation -------------------------------------------------------------------------------


def evaluate(cfg: Config, process: Process, stop: StopRequest) -> None:
    """Train on the labelled cases, keep the best model on the validation cases, score the test cases."""
    check_batch(cfg, process)
    folder, weights = Path(cfg.run.out), encoder_file.path_of(cfg)
    all_refuse(process, refuse_other_run, cfg, SCRIPT, weights)
    if results := finished(cfg, folder):
        process.say(f"{folder}: finished already\n{report.organ_table(results)}")
        return

    torch.manual_seed(cfg.seed)
    classes = class_names(cfg.data.root, cfg.data.classes)
    sets = open_sets(cfg, len(classes))
    positions = labelled_positions(cfg, sets)
    card = encoder_card(weights)
    intensity = encoder_file.normalisation(cfg, card, sets["train"].kind)
    warnings = heed_evaluation(cfg, weights, card, sets, positions["train"], classes, intensity, process)
    encoder = encoder_file.build_encoder(cfg, card, process)
    shape = (encoder.arch, encoder.in_channels, encoder.output_stride)
    facts = sets["train"].facts()
    about = Description(cfg.mode, *shape, classes, intensity.as_dict(), facts)
    model = build_model(about, encoder, process).eval()
    begin(make_run_folder(cfg, process, SCRIPT, weights), cfg, process, SCRIPT)

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
        collapse = frozen_collapse(batches[split] if scored_features else batches_of(split, to_features))

    def validate() -> dict:
        if "val" not in sets:
            return {"val_dice": None}
        return report.mean_dice(report.score(scored, batches["val"], process, "validation"))

    def keep() -> None:
        if process.is_main:
            save_model(folder / "model.pth", model, about)

    best = train(cfg, process, trained, batches["train"], augment, validate, keep, stop)
    process.barrier()
    model.load_state_dict(load_model(folder / "model.pth", process)[0].state_dict())
    scores = report.score(scored, batches["test"], process, "test cases", full=True)
    if process.is_main:
        found = report.summary(scores, classes) | {"val_dice": best, **collapse}
        write_results(cfg, folder, found | {"data": asdict(facts), "warnings": warnings})
        with only_warning("no predictions.png"):
            report.draw_predictions(folder / "predictions.png", sets["test"], scores, intensity, classes)
        process.say(f"{folder}: results.json, cases.csv, table.md, predictions.png, model.pth")
    process.barrier()


def check_batch(cfg: Config, process: Process) -> None:
    """What must be given, and what the batch must be for this number of processes; raises ConfigError."""
    for name in ("encoder", "data.root"):
        cfg.check(name, cfg.flat()[name], "a path (for the encoder also: random)")
    wanted = f"a multiple of the {process.world} processes"
    cfg.check("optim.batch_size", cfg.optim.batch_size % process.world == 0, wanted)
    if cfg.mode == "finetune":
        # Image pooling leaves one value a slice, which BatchNorm cannot normalise alone.
        enough = cfg.optim.batch_size >= 2 * process.world
        cfg.check("optim.batch_size", enough, "2 slices a process or more")


def labelled_positions(cfg: Config, sets: dict[str, SegmentationDataset]) -> dict[str, list[int]]:
    """The slices of each split that take part: for training those of label_fraction of the cases."""
    positions = {split: list(range(len(dataset))) for split, dataset in sets.items()}
    positions["train"] = training_positions(sets["train"], cfg.label_fraction, cfg.seed)
    wanted = f"at most the {len(positions['train'])} training slices"
    cfg.check("optim.batch_size", cfg.optim.batch_size <= len(positions["train"]), wanted)
    return positions


def write_results(cfg: Config, folder: Path, results: dict) -> None:
    """results.json, which marks the run as finished, and the tables made of it."""
    results = results | {
        "encoder": cfg.encoder,
        "encoder_sha256": encoder_file.sha256_of(cfg),
        "mode": cfg.mode,
        "seed": cfg.seed,
        "label_fraction": cfg.label_fraction,
        "config": cfg.plain(),
    }
    write_whole(folder / "results.json", json.dumps(results, indent=1))
    for name in ("checkpoint.pth", "checkpoint.pth.previous"):
        (folder / name).unlink(missing_ok=True)
    with only_warning("no cases.csv"):
        write_whole(folder / "cases.csv", report.cases_csv(results))
    with only_warning("no table.md"):
        table = report.organ_table(results)
        print(table, flush=True)
        write_whole(folder / "table.md", table + "\n")


def finished(cfg: Config, folder: Path) -> dict | None:
    """The results of this very evaluation if the folder holds them.

    Raises ConfigError if it holds another evaluation, done or under way, or one of an encoder file of
    the same name but other content.
    """
    results, saved = folder / "results.json", folder / "config.yaml"
    checkpoint = folder / "checkpoint.pth"
    if not saved.is_file() and checkpoint.is_file():
        raise ConfigError(f"run.out: {checkpoint} is there without config.yaml; choose another run.out")
    if not saved.is_file() or not (results.is_file() or checkpoint.is_file()):
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
    encoder_file.check_same_encoder(cfg, content["encoder_sha256"])
    return content


def open_sets(cfg: Config, num_classes: int) -> dict[str, SegmentationDataset]:
    """The train, val (if there is one) and test slices with their masks."""
    data = cfg.data
    lists = {"train": data.train, "val": data.val, "test": data.test}
    folders = (data.images, data.masks, data.hu_offset, num_classes)
    sets = {}
    for split, file in lists.items():
        if file:
            how = {"like": sets.get("train"), "mask_map": mask_mapping(data.mask_map)}
            sets[split] = SegmentationDataset(data.root, file, *folders, **how)
            if (kind := sets[split].kind) != sets["train"].kind:
                raise DataError(f"{file}: {KINDS[kind]}, but {KINDS[sets['train'].kind]} in {data.train}")
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
            cfg.check(f"augment.{name}", cfg.augment[name] == 0, "0, since data.window is null")
    crops = SegmentationAugment(cfg.data.size or size, **cfg.augment)

    def augment(unit: Tensor, masks: Tensor, step: int) -> tuple[Tensor, Tensor]:
        share = len(unit)
        first, total = process.rank * share, process.world * share
        unit, masks = crops(unit, masks, seeded("crops", cfg.seed, step), first, total)
        return network_input(unit, intensity, encoder.in_channels), masks

    return augment


# ---- Command line --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.compare:
        print(report.compare(args.compare, FREE_KEYS))
        return 0
    if (args.predict is None) != (args.out is None):
        raise ConfigError("--predict INPUT and --out DIR belong together")
    cfg = load_config(DEFAULTS, args.config, args.overrides, NULLABLE)
    check_config(cfg)
    if args.folder:  # launch.sh asks
        refuse_other_run(cfg, SCRIPT, cfg.encoder and encoder_file.path_of(cfg))
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
