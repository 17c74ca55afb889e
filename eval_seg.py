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

from evaluation.settings import COMMON, parse_arguments

DEFAULTS = f"""
mode: linear                # linear: frozen encoder, linear decoder | finetune: DeepLabv3+, all trained
cache: auto                 # linear: compute the features once: on | off | auto: beyond cache_gb in a file
cache_gb: 4.0               # GiB of memory for features; the file is in run.out, and gone at the end
model:
  arch: null                # resnet18 | 26 | 26_half | 34 | 50 | 101; null: the encoder's
  in_channels: 1            # 3: the slice three times; with data.neighbours always 3
  output_stride: 8          # 8 | 16 | 32
optim:                      # lr times (1 - step / steps) ** 0.9
  steps: 2000
  batch_size: 16            # slices a step, over all processes
  loss: null                # ce | dice_ce: cross entropy, plus soft Dice; null: dice_ce for finetune, else ce
  name: null                # sgd (momentum 0.9) | adamw; null: adamw for finetune, else sgd
  lr: null                  # null: 0.5 for linear, else 0.001 for adamw, 0.05 for sgd
  clip: null                # the most that the norm of a gradient may be; null: 1 for adamw, else no limit
  encoder_lr_factor: 1.0    # finetune: the encoder's lr over the decoder's
  weight_decay: 0.0001
eval:
  every: 200                # steps between validations
  window: null              # px; slices are segmented in windows of this side; null: whole
  overlap: 0.5              # of neighbouring windows, share of their side
{COMMON}"""

if __name__ == "__main__":
    parse_arguments(__doc__, DEFAULTS)  # answers --help before the imports, which take seconds

from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ct.properties import class_names
from data import DataError, encoder_card, network_input
from engine.config import Config, load_config
from engine.files import write_whole
from engine.process import Process, only_warning
from engine.stopping import StopRequest, run_script
from evaluation import encoder_file, report
from evaluation.batches import Batches, frozen_collapse
from evaluation.judgement import heed_evaluation
from evaluation.prediction import predict
from evaluation.script import (
    begin_run,
    check_batch,
    crop_augmentation,
    earlier_results,
    keep_features,
    labelled_positions,
    no_augmentation,
    open_sets,
    run,
    write_results,
)
from evaluation.segmenter import MaskPredictor, at_size, build_model, frozen_features
from evaluation.settings import COMMON_NULLABLE, FREE_KEYS, check_cache, check_common
from evaluation.supervised import train
from evaluation.trained import Description, load_model, save_model
from losses import dice_loss, segmentation_loss
from weights import WeightsError

NULLABLE = COMMON_NULLABLE | {"cache": (str, bool), "eval.window": int}
NULLABLE |= {"optim.loss": str, "optim.name": str, "optim.lr": float, "optim.clip": float}
SCRIPT = "eval_seg.py"  # whose folders these are, see engine/ownership.py


def check_config(cfg: Config) -> None:
    """Everything that is impossible whatever the data is; raises ConfigError."""
    cfg.check_choice("mode", "linear", "finetune")
    if cfg.optim.loss is not None:
        cfg.check_choice("optim.loss", "ce", "dice_ce")
    if cfg.optim.name is not None:
        cfg.check_choice("optim.name", "sgd", "adamw")
    if cfg.mode == "finetune":  # for linear null stays: what an earlier version left is still the same run
        cfg.optim["loss"] = cfg.optim.loss or "dice_ce"
        cfg.optim["name"] = cfg.optim.name or "adamw"
    if cfg.optim.lr is None:
        sgd = 0.5 if cfg.mode == "linear" else 0.05
        cfg.optim["lr"] = 0.001 if cfg.optim.name == "adamw" else sgd
    if cfg.optim.clip is None and cfg.optim.name == "adamw":
        cfg.optim["clip"] = 1.0
    cfg.check("optim.clip", cfg.optim.clip is None or cfg.optim.clip > 0, "a value above 0, or null")
    suits = cfg.mode == "linear" or cfg.optim.name == "sgd" or cfg.optim.lr <= 0.01
    cfg.check("optim.lr", suits, "0.01 or less with adamw; larger ones are for optim.name=sgd")
    check_common(cfg)
    check_cache(cfg)
    cfg.check_fraction("eval.overlap")
    cfg.check("eval.overlap", cfg.eval.overlap < 1, "0 or more, below 1")
    cfg.check("eval.window", cfg.eval.window is None or cfg.eval.window >= 32, "32 px or more, or null")


# ---- An evaluation -------------------------------------------------------------------------------


def evaluate(cfg: Config, process: Process, stop: StopRequest) -> None:
    """Train on the labelled cases, keep the best model on the validation cases, score the test cases."""
    # Image pooling leaves one value a slice, which BatchNorm cannot normalise alone.
    least = 2 if cfg.mode == "finetune" else 1
    if results := earlier_results(cfg, process, SCRIPT, DEFAULTS, NULLABLE, report.read_results):
        process.say(f"{cfg.run.out}: finished already\n{report.organ_table(results)}")
        return

    torch.manual_seed(cfg.seed)
    classes = class_names(cfg.data.root, cfg.data.classes)
    sets = open_sets(cfg, len(classes))
    positions = labelled_positions(cfg, sets)
    check_batch(cfg, process, least, slices=len(positions["train"]))
    weights = encoder_file.path_of(cfg)
    card = encoder_card(weights)
    intensity = encoder_file.normalisation(cfg, card, sets["train"].kind)
    warnings = heed_evaluation(cfg, weights, card, sets, positions["train"], classes, intensity, process)
    encoder = encoder_file.build_encoder(cfg, card, sets["train"].neighbours, process)
    shape = (encoder.arch, encoder.in_channels, encoder.output_stride)
    facts = sets["train"].facts()
    about = Description(cfg.mode, *shape, classes, intensity.as_dict(), facts)
    model = build_model(about, encoder).to(process.device, memory_format=torch.channels_last).eval()
    folder = begin_run(cfg, process, SCRIPT)

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
        held = ("train", "val") if scored_features else ("train",)
        kept = [batches[split] for split in held if split in sets]
        keep_features(cfg, kept, process, trained=batches["train"])
    else:
        how = (sets["train"].size, intensity, encoder.in_channels, process)
        trained, augment = model, crop_augmentation(cfg, *how)
        batches["train"] = batches_of("train", intensity.to_unit)
    scored = trained if scored_features else model
    if process.is_main:
        split = "val" if "val" in sets else "train"
        collapse = frozen_collapse(batches[split] if scored_features else batches_of(split, to_features))

    window = (None, 0.0) if scored_features else (cfg.eval.window, cfg.eval.overlap)

    def loss_of(network, inputs: Tensor, masks: Tensor) -> Tensor:
        with process.autocast():
            logits = network(inputs)  # (n, K, h, w)
        logits = at_size(logits, masks.shape[1:])
        loss = segmentation_loss(logits, masks)
        return loss + dice_loss(logits, masks) if cfg.optim.loss == "dice_ce" else loss

    def validate() -> dict:
        if "val" not in sets:
            return {"val_dice": None}
        return report.mean_dice(report.score(scored, batches["val"], window, process, "validation"))

    def keep() -> None:
        if process.is_main:
            save_model(folder / "model.pth", model, about)

    def kept():
        return load_model(folder / "model.pth", process, build_model)[0]

    best = train(cfg, process, trained, batches["train"], augment, loss_of, validate, keep, kept, stop)
    process.barrier()
    model.load_state_dict(kept().state_dict())
    scores = report.score(scored, batches["test"], window, process, "test cases", full=True)
    if process.is_main:
        found = report.summary(scores, classes) | {"val_dice": best, **collapse}
        found |= {"data": asdict(facts), "warnings": warnings}
        results = write_results(cfg, SCRIPT, found)
        write_tables(folder, results)
        with only_warning("no predictions.png"):
            report.draw_predictions(folder / "predictions.png", sets["test"], scores, intensity, classes)
        process.say(f"{folder}: results.json, cases.csv, table.md, predictions.png, model.pth")
    process.barrier()


def write_tables(folder: Path, results: dict) -> None:
    with only_warning("no cases.csv"):
        write_whole(folder / "cases.csv", report.cases_csv(results))
    with only_warning("no table.md"):
        table = report.organ_table(results)
        print(table, flush=True)
        write_whole(folder / "table.md", table + "\n")


# ---- Command line --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(__doc__, DEFAULTS, argv)
    if args.compare:
        print(report.compare(args.compare, FREE_KEYS))
        return 0
    cfg = load_config(DEFAULTS, args.config, args.overrides, NULLABLE)
    check_config(cfg)
    return run(SCRIPT, args, cfg, evaluate, partial(predict, MaskPredictor))


if __name__ == "__main__":
    run_script(main, (DataError, WeightsError))
