"""Evaluate an encoder on detection: boxes of organs, by Faster R-CNN with a feature pyramid.

    python eval_det.py --config configs/detect.yaml encoder=runs/x/encoder.pth                # frozen encoder
    python eval_det.py --config configs/detect.yaml mode=finetune encoder=... run.out=...     # all trained
    python eval_det.py --config configs/detect.yaml --predict ct.nii.gz --out found
    python eval_det.py --compare runs/x-detect runs/random-detect                             # one table

The boxes are those of the connected components of the masks, see evaluation/boxes.py. Beside the detector
stands what boxes of mean position and size reach without looking at the slice.

An evaluation leaves in run.out: config.yaml, metrics.jsonl, model.pth (the best on the validation cases),
results.json, table.md and predictions.png. The same command again prints its table, or resumes after a stop.
Needs pycocotools and scipy. Under torchrun a batch is divided among the processes.
"""

from evaluation.settings import COMMON, parse_arguments

DEFAULTS = f"""
mode: frozen                # frozen encoder | finetune: all trained
boxes:
  min_pixels: 20            # smaller components are neither learnt nor demanded
model:
  arch: null                # resnet18 | 26 | 26_half | 34 | 50 | 101; null: the encoder's
  in_channels: 1            # 3: the slice three times; with data.neighbours always 3
  output_stride: 32         # 8 | 16 | 32
  width: 256                # channels of the feature pyramid; its box head has four times as many
optim:                      # SGD, momentum 0.9, lr times (1 - step / steps) ** 0.9
  steps: 2000
  batch_size: 8             # slices a step, over all processes
  lr: null                  # null: 0.05 for frozen, 0.02 for finetune
  encoder_lr_factor: 1.0    # finetune: the encoder's lr over that of the rest
  weight_decay: 0.0001
eval:
  every: 200                # steps between validations
{COMMON}"""

if __name__ == "__main__":
    parse_arguments(__doc__, DEFAULTS)  # answers --help before the imports

from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ct.organs import class_colors
from ct.pictures import boxed, contact_sheet, gray_tile
from ct.properties import class_names
from ct.slices import in_threads
from data import DataError, encoder_card, network_input
from engine.config import Config, load_config
from engine.files import write_whole, written_whole
from engine.process import Process, only_warning
from engine.stopping import StopRequest, run_script
from evaluation import encoder_file, results
from evaluation.batches import Batches
from evaluation.boxes import Boxes, Found, boxes_of, coco_metrics, mean_boxes, packages
from evaluation.detector import BoxPredictor, build_detector, detect, shown, targets_of
from evaluation.judgement import heed_evaluation
from evaluation.prediction import predict
from evaluation.report import shown_slice
from evaluation.script import (
    begin_run,
    check_batch,
    crop_augmentation,
    earlier_results,
    labelled_positions,
    open_sets,
    run,
    write_results,
)
from evaluation.settings import COMMON_NULLABLE, FREE_KEYS, check_common
from evaluation.supervised import train
from evaluation.trained import Description, load_model, save_model
from weights import WeightsError

NULLABLE = COMMON_NULLABLE | {"optim.lr": float}
SCRIPT = "eval_det.py"  # whose folders these are, see engine/ownership.py
PICTURE_CASES = 4
PICTURE_SCORE = 0.5  # of the boxes in the picture, at least
TILE = 288  # px


def check_config(cfg: Config) -> None:
    """Everything that is impossible whatever the data is; raises ConfigError."""
    cfg.check_choice("mode", "frozen", "finetune")
    if cfg.optim.lr is None:
        cfg.optim["lr"] = 0.05 if cfg.mode == "frozen" else 0.02
    check_common(cfg)
    cfg.check_positive("boxes.min_pixels", "model.width")


# ---- An evaluation -------------------------------------------------------------------------------


def evaluate(cfg: Config, process: Process, stop: StopRequest) -> None:
    """Train on the labelled cases, keep the best detector on the validation cases, score the test cases."""
    if found := earlier_results(cfg, process, SCRIPT, DEFAULTS, NULLABLE, read_results):
        process.say(f"{cfg.run.out}: finished already\n{tables(found)}")
        return
    packages()
    torch.manual_seed(cfg.seed)
    classes = class_names(cfg.data.root, cfg.data.classes)
    sets = open_sets(cfg, len(classes))
    positions = labelled_positions(cfg, sets)
    check_batch(cfg, process, slices=len(positions["train"]))
    weights = encoder_file.path_of(cfg)
    card = encoder_card(weights)
    intensity = encoder_file.normalisation(cfg, card, sets["train"].kind)
    warnings = heed_evaluation(cfg, weights, card, sets, positions["train"], classes, intensity, process)
    truth = {split: true_boxes(cfg, sets[split], positions[split], classes, process) for split in sets}
    encoder = encoder_file.build_encoder(cfg, card, sets["train"].neighbours, process)
    shape = (encoder.arch, encoder.in_channels, encoder.output_stride)
    facts = sets["train"].facts()
    about = Description(cfg.mode, *shape, classes, intensity.as_dict(), facts, cfg.model.width)
    model = build_detector(about, encoder).to(process.device, memory_format=torch.channels_last)
    folder = begin_run(cfg, process, SCRIPT)

    def to_images(stored: Tensor) -> Tensor:
        return network_input(intensity.to_unit(stored), intensity, encoder.in_channels)

    def batches_of(split: str, prepare) -> Batches:
        return Batches(sets[split], positions[split], prepare, cfg, process)

    def loss_of(network, images: Tensor, masks: Tensor) -> Tensor:
        with process.autocast():
            losses = network(images, targets_of(masks, len(classes), cfg.boxes.min_pixels))
        return sum(losses.values())

    def validate() -> dict:
        if "val" not in sets:
            return {"val_AP50": None}
        found = detect(model, batches_of("val", to_images), process, "validation")
        metrics = coco_metrics(truth["val"], found, classes)
        return {f"val_{name}": metrics[name]["value"] for name in ("AP50", "AP")}

    def keep() -> None:
        if process.is_main:
            save_model(folder / "model.pth", model, about)

    def kept():
        return load_model(folder / "model.pth", process, build_detector)[0]

    augment = crop_augmentation(cfg, sets["train"].size, intensity, encoder.in_channels, process)
    training = batches_of("train", intensity.to_unit)
    best = train(cfg, process, model, training, augment, loss_of, validate, keep, kept, stop)
    process.barrier()
    found = detect(kept(), batches_of("test", to_images), process, "test slices")
    if process.is_main:
        about = {"val_AP50": best, "data": asdict(facts), "warnings": warnings}
        table = write_detection(cfg, truth, found, classes, [*sets["test"].cases], about)
        print(table, flush=True)
        with only_warning("no table.md"):
            write_whole(folder / "table.md", table + "\n")
        with only_warning("no predictions.png"):
            draw(folder / "predictions.png", sets["test"], truth["test"], found, intensity, classes)
        process.say(f"{folder}: results.json, table.md, predictions.png, model.pth")
    process.barrier()


def write_detection(
    cfg: Config, truth: dict, found: list[Found], classes: list, cases: list, about: dict
) -> str:
    """results.json, with what boxes of mean place and size reach; returns the table.

    truth: {split: boxes of its slices}; found, cases: of the test slices.
    """
    guess = [mean_boxes(truth["train"])] * len(found)
    content = {"metrics": coco_metrics(truth["test"], found, classes, cases)}
    content |= {"mean_boxes": coco_metrics(truth["test"], guess, classes, cases)}
    content |= {"boxes": {split: counted(boxes, classes) for split, boxes in truth.items()}}
    return tables(write_results(cfg, SCRIPT, content | about))


def true_boxes(
    cfg: Config, dataset, positions: list[int], classes: list[str], process: Process
) -> list[Boxes]:
    """Those of the masks of these slices, which are divided among the processes.

    Raises DataError if there are none: nothing to learn, or to judge by.
    """

    def own(position: int) -> Boxes:
        mask = dataset.on_grid(dataset.own_mask(position), position)
        return boxes_of(mask.numpy(), len(classes), cfg.boxes.min_pixels)

    def mine() -> list[Boxes] | DataError:
        try:
            return [*in_threads(own, positions[process.rank :: process.world], "boxes of masks")]
        except DataError as error:
            return error

    parts = process.gather(mine())
    for part in parts:
        if isinstance(part, DataError):
            raise part
    found = [parts[i % process.world][i // process.world] for i in range(len(positions))]
    if all(one.crowd.all() for one in found):
        where = (
            f"{dataset.mask_folder}: masks of {len(found)} slices, the first {dataset.names[positions[0]]}"
        )
        raise DataError(f"{where}: no component of boxes.min_pixels={cfg.boxes.min_pixels} pixels or more")
    return found


# ---- What is shown -------------------------------------------------------------------------------


def read_results(folder: Path) -> dict:
    def holds(found: dict) -> bool:
        return results.has_metrics(found) and results.has_metrics({"metrics": found["mean_boxes"]})

    return results.read_results(folder, holds)


def tables(found: dict) -> str:
    """AP by organ; then all metrics, beside those of boxes of mean position and size."""
    metrics, baseline = found["metrics"], found["mean_boxes"]
    rows = [("organ", "boxes in test", "AP50 %", "AP %", "AP75 %", "mean boxes: AP50 %")]
    for name, count in found["boxes"]["test"].items():
        values = [metrics[one]["classes"][name] for one in ("AP50", "AP", "AP75")]
        values.append(baseline["AP50"]["classes"][name])
        rows.append((name, str(count), *map(results.percent, values)))
    both = [("mean", results.encoder_label(found), "mean boxes")]
    for name in metrics:
        own = (metrics[name], baseline[name])
        values = (results.with_interval(one["value"], one["interval"]) for one in own)
        both.append((f"{name} %", *values))
    return f"{results.table(rows)}\n\n{results.table(both)}"


def counted(slices: list[Boxes], classes: list[str]) -> dict[str, int]:
    """Boxes of each class, crowd left out."""
    labels = np.concatenate([one.labels[~one.crowd] for one in slices])
    return dict(zip(classes[1:], np.bincount(labels, minlength=len(classes)).tolist()[1:]))


def draw(path: Path, dataset, truth: list[Boxes], found: list[Found], intensity, classes: list[str]) -> None:
    """Of each of the first PICTURE_CASES cases the middle one of the slices with boxes: the slice, its boxes,
    and those that were found with a score of PICTURE_SCORE or more."""
    by_case, colors = {}, class_colors(classes)
    for position, one in enumerate(truth):
        if not one.crowd.all():
            by_case.setdefault(dataset.cases[position], []).append(position)
    tiles, captions = [], []
    for positions in list(by_case.values())[:PICTURE_CASES]:
        position = positions[len(positions) // 2]
        unit = shown_slice(dataset[position][0], intensity)
        real, sure = truth[position], shown(found[position], PICTURE_SCORE)
        tiles += [gray_tile(unit, TILE)]
        tiles += [boxed(unit, one.boxes, one.labels, TILE, colors) for one in (real, sure)]
        captions += [dataset.names[position], "truth", f"found, score {PICTURE_SCORE} or more"]
    with written_whole(path) as file:
        contact_sheet(tiles, captions, classes, columns=3).save(file, format="PNG")


# ---- Command line --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(__doc__, DEFAULTS, argv)
    if args.compare:
        print(results.compare(args.compare, FREE_KEYS))
        return 0
    cfg = load_config(DEFAULTS, args.config, args.overrides, NULLABLE)
    check_config(cfg)
    return run(SCRIPT, args, cfg, evaluate, partial(predict, BoxPredictor))


if __name__ == "__main__":
    run_script(main, (DataError, WeightsError))
