"""Evaluate an encoder on classification of slices: which organs a slice shows, or what a table says of it.

    python eval_cls.py --config configs/probe.yaml encoder=runs/x/encoder.pth             # nearest neighbours
    python eval_cls.py --config configs/probe.yaml mode=logistic encoder=... run.out=...  # or svm, lowshot
    python eval_cls.py --config configs/probe.yaml mode=finetune label_fraction=0.1 encoder=... run.out=...
    python eval_cls.py --config configs/probe.yaml labels.table=contrast.csv encoder=...  # slice,contrast
    python eval_cls.py --compare runs/x-knn runs/x-svm runs/random-knn                        # one table

knn, logistic, svm and lowshot probe frozen features of each stage; what a probe leaves open, the stage
included, is chosen on the validation cases. finetune trains everything. Beside the encoder stand random
weights and the slice scaled to 16 x 16 px: which organs a slice shows follows from its height in the body,
and is known to some degree without any learning.

An evaluation leaves in run.out: config.yaml, results.json, table.md; finetune also metrics.jsonl and
model.pth. Needs scikit-learn. Frozen features are computed in one process, also under torchrun.
"""

from evaluation.settings import COMMON, parse_arguments

DEFAULTS = f"""
mode: knn                   # knn | logistic | svm | lowshot: frozen features | finetune: all trained
references: [random, raw]   # judged beside it: random; raw: 16 x 16 px; files, as torchvision:resnet50.pth
cache: auto                 # of the features, computed once: on: memory | auto: beyond cache_gb a file
cache_gb: 4.0               # GiB of memory for features; the file is in run.out, and gone at the end
labels:
  table: null               # of the set, as labels.csv: slice,NAME or case,NAME; null: organs in the masks
  columns: null             # of the table, or organs: [NAME, ...]; null: all
  min_pixels: 20            # an organ is there from so many pixels on
  folds: 0                  # K: cross-validation by case over all labelled slices; 0: by the lists
model:
  arch: null                # resnet18 | 26 | 26_half | 34 | 50 | 101; null: the encoder's
  in_channels: 1            # 3: the slice three times; with data.neighbours always 3
  output_stride: 32         # 8 | 16 | 32
optim:                      # finetune: SGD, momentum 0.9, lr times (1 - step / steps) ** 0.9
  steps: 1000
  batch_size: 32            # slices a step, over all processes
  lr: 0.1                   # of the head
  encoder_lr_factor: 0.1    # the encoder's lr over the head's
  weight_decay: 0.0001
eval:
  every: 100                # steps between validations
{COMMON}"""

if __name__ == "__main__":
    parse_arguments(__doc__, DEFAULTS, predicts=False)  # answers --help before the imports

import csv
import io
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import DataError, Intensity, encoder_card, network_input
from engine.config import Config, ConfigError, load_config, to_config
from engine.files import write_whole
from engine.process import Process, only_warning, progress
from engine.stopping import StopRequest, run_script
from evaluation import encoder_file, results
from evaluation.batches import Batches, chunks
from evaluation.classifier import (
    Classifier,
    classification_loss,
    load_classifier,
    save_classifier,
    scores_of,
)
from evaluation.features import Features, Kinds, pooled_stages, raw_pixels
from evaluation.labelled import LabelledSlices, labelled_slices
from evaluation.probes import PROBES, Probed, Task, best_kind, logistic
from evaluation.scores import (
    NAMES,
    interval,
    main_value,
    mean,
    measure,
    one_hot,
    over_draws,
    scikit_learn,
    told_apart,
)
from evaluation.script import (
    begin_run,
    check_batch,
    crop_augmentation,
    earlier_results,
    keep_features,
    run,
    write_results,
)
from evaluation.settings import COMMON_NULLABLE, FREE_KEYS, check_cache, check_common
from evaluation.supervised import train
from models import Encoder
from weights import WeightsError

NULLABLE = COMMON_NULLABLE | {"cache": (str, bool), "labels.table": str, "labels.columns": list}
SCRIPT = "eval_cls.py"  # whose folders these are, see engine/ownership.py
RAW, BY_FOLD = "raw", "by fold"
SHOWN = ("value", "interval")


def check_config(cfg: Config) -> None:
    """Everything that is impossible whatever the data is; raises ConfigError."""
    cfg.check_choice("mode", *PROBES, "finetune")
    check_common(cfg)
    check_cache(cfg)
    cfg.check("cache", cfg.cache != "off", "auto or on: a probe needs all features")
    cfg.check_positive("labels.min_pixels")
    cfg.check("labels.folds", cfg.labels.folds == 0 or cfg.labels.folds >= 2, "0, or 2 and more")
    if cfg.mode == "finetune":
        cfg.check("labels.folds", cfg.labels.folds == 0, "0 with mode=finetune, which takes the lists")
    for name in ("references", "labels.columns"):
        texts = all(isinstance(one, str) and one for one in cfg.flat()[name] or [])
        cfg.check(name, texts, "a list of names")
    cfg.check("encoder", cfg.encoder != RAW, "weights; raw is for references")


# ---- An evaluation -------------------------------------------------------------------------------


def evaluate(cfg: Config, process: Process, stop: StopRequest) -> None:
    """Judge the encoder and its references on the test cases."""
    if found := earlier_results(cfg, process, SCRIPT, DEFAULTS, NULLABLE, read_results):
        process.say(f"{cfg.run.out}: finished already\n{tables(found)}")
        return
    scikit_learn()
    torch.manual_seed(cfg.seed)
    slices = labelled_slices(cfg, process)
    folder = begin_run(cfg, process, SCRIPT)
    task, judged = slices.task(cfg.seed), {}
    references = [name for name in dict.fromkeys(cfg.references) if name != cfg.encoder]
    if cfg.mode == "finetune":
        check_batch(cfg, process, least=2, slices=len(slices.train))
        judged = {name: judge_reference(cfg, name, slices, task, process, stop) for name in references}
        scores = finetuned(cfg, folder, slices, process, stop)
        judged[cfg.encoder] = judged_as(task, {"all trained": Probed({"": [scores]}, {}, None)})
    elif process.is_main:
        for name in [*references, cfg.encoder]:
            judged[name] = judge_frozen(cfg, name, slices, task, process)
    if process.is_main:
        write_all(cfg, folder, slices, task, judged)
        process.say(f"{folder}: results.json, table.md, scores.csv")


def write_all(cfg: Config, folder: Path, slices: LabelledSlices, task: Task, judged: dict) -> None:
    """results.json, with the encoder's gain over each reference, the table and the scores of the slices."""
    found = judged.pop(cfg.encoder)
    scores, drawn = found.pop("scores"), found.pop("drawn")
    for one in judged.values():
        one.pop("scores")
        one["gain"] = gain(found["metrics"], drawn, one["metrics"], one.pop("drawn"))
    about = {"slices": slices.counts(), "data": asdict(slices.train.dataset.facts())}
    write_scores(folder / "scores.csv", slices, scores)
    found |= {"references": judged, **about, "warnings": slices.warnings}
    table = tables(write_results(cfg, SCRIPT, found))
    print(table, flush=True)
    with only_warning("no table.md"):
        write_whole(folder / "table.md", table + "\n")


def encoder_of(cfg: Config, slices: LabelledSlices, process: Process) -> tuple[Encoder, Intensity]:
    """The encoder, in evaluation mode, and how it takes slices."""
    card = encoder_card(encoder_file.path_of(cfg))
    intensity = encoder_file.normalisation(cfg, card, slices.train.dataset.kind)
    torch.manual_seed(cfg.seed)  # of random weights
    encoder = encoder_file.build_encoder(cfg, card, slices.train.dataset.neighbours, process)
    return encoder.to(process.device, memory_format=torch.channels_last).eval(), intensity


def reference_settings(cfg: Config, name: str, slices: LabelledSlices) -> Config:
    """Those of another encoder: without a normalisation of its own it has the encoder's, and random weights
    have its architecture, too."""
    own = to_config(cfg.plain() | {"encoder": name})
    card = encoder_card(encoder_file.path_of(cfg))
    if not encoder_card(encoder_file.path_of(own)):
        own.data.update(encoder_file.normalisation(cfg, card, slices.train.dataset.kind).as_dict())
    if encoder_file.path_of(own) is None:
        own.model["arch"] = encoder_file.architecture(cfg, card)
    return own


# ---- Frozen features -----------------------------------------------------------------------------


def judge_frozen(cfg: Config, name: str, slices: LabelledSlices, task: Task, process: Process) -> dict:
    """By the lists, or by folds over all slices: each is judged by a probe that has not seen its case."""
    features = features_of(cfg, name, slices, process)
    tasks = slices.tasks(cfg)
    pairs = [(each, kind) for each in tasks for kind in features]
    bar = progress(process, f"{cfg.mode}: {name}", pairs, len(pairs))
    found = [PROBES[cfg.mode](each, features[kind]) for each, kind in bar]
    by_fold = [dict(zip(features, some)) for some in chunks(found, len(features))]
    if not cfg.labels.folds:
        return judged_as(task, by_fold[0])
    kinds = {kind: joined(tasks, [fold[kind] for fold in by_fold]) for kind in features}
    if len(kinds) == 1:
        return judged_as(task, kinds)
    # Nested: the kind of feature is chosen in each fold, from its training cases alone.
    chosen = [best_kind(fold) for fold in by_fold]
    best = joined(tasks, [fold[kind] for fold, kind in zip(by_fold, chosen)])
    best.chosen["features"] = chosen
    return judged_as(task, kinds | {BY_FOLD: best}, BY_FOLD)


def joined(tasks: list[Task], found: list[Probed]) -> Probed:
    """What the folds' probes found, of all their test slices in order."""
    order = np.argsort(np.concatenate([task.test for task in tasks]))
    scores = {}
    for count in set.intersection(*(set(one.scores) for one in found)):
        draws = zip(*(one.scores[count] for one in found))
        scores[count] = [np.concatenate(parts)[order] for parts in draws]
    return Probed(scores, {"folds": [one.chosen for one in found]}, mean([one.value for one in found]))


def judged_as(task: Task, found: dict[str, Probed], best: str | None = None) -> dict:
    """What is reported of an encoder: the metrics of the kind of feature that was chosen, and all kinds."""
    best = best or best_kind(found)
    scores = [one for draws in found[best].scores.values() for one in draws]
    truth = (task.kind, task.classes, task.targets[task.test])
    groups = task.groups[task.test]
    metrics, drawn = measure(*truth, scores, groups)
    if len(found[best].scores) > 1:
        for count, draws in found[best].scores.items():
            some, _ = measure(*truth, draws, groups, draws=100)
            metrics |= {f"{name} at {count}": one for name, one in some.items()}
    kinds = {kind: summary_of(task, probed) for kind, probed in found.items()}
    return {
        "metrics": metrics,
        "feature": best,
        "features": kinds,
        "drawn": drawn,
        "scores": mean_scores(np.stack(scores)),
    }


def mean_scores(scores: np.ndarray) -> np.ndarray:
    """(N, K) of (draws, N, K); NaN where no draw has one."""
    counts = (~np.isnan(scores)).sum(0)
    return np.where(counts > 0, np.nansum(scores, 0) / np.maximum(counts, 1), np.nan)


def summary_of(task: Task, probed: Probed) -> dict:
    """One kind of feature: its value on the validation cases, on the test cases, and what was chosen."""
    scores = [one for draws in probed.scores.values() for one in draws]
    found = over_draws(task.kind, task.targets[task.test], scores)
    values = {name: value for name, (value, *_) in found.items()}
    return {"validation": probed.value, **values, "chosen": probed.chosen, **probed.details}


def gain(metrics: dict, drawn: dict, other: dict, other_drawn: dict) -> dict:
    """By how much the encoder is above a reference: the same draws of cases for both."""
    return {
        name: {
            "value": difference(metrics[name]["value"], other[name]["value"]),
            "interval": interval(drawn[name] - other_drawn[name]),
        }
        for name in drawn
    }


def difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def features_of(cfg: Config, name: str, slices: LabelledSlices, process: Process) -> Kinds:
    """{kind of feature: (N, D)} of all slices, training, validation and test."""
    own = cfg if name in (cfg.encoder, RAW) else reference_settings(cfg, name, slices)
    encoder, intensity = encoder_of(own, slices, process)
    features = Features(raw_pixels if name == RAW else partial(pooled_stages, encoder))

    def prepare(stored: Tensor) -> Tensor:
        with process.autocast():
            return features(network_input(intensity.to_unit(stored), intensity, encoder.in_channels))

    alone = replace(process, world=1)  # others do not compute these
    batches = [Batches(part, [*range(len(part))], prepare, cfg, alone) for part in slices.parts.values()]
    keep_features(cfg, batches, alone)
    if any(part.inputs is None for part in batches):
        raise ConfigError("cache: no room for the features in run.out; cache=on holds them in memory")
    kinds = features.apart([part.inputs for part in batches])
    if not kinds.finite():
        raise WeightsError(f"{name}: its features are not finite numbers; are its weights sound?")
    return kinds


# ---- Fine-tuning ---------------------------------------------------------------------------------


def finetuned(
    cfg: Config, folder: Path, slices: LabelledSlices, process: Process, stop: StopRequest
) -> np.ndarray:
    """Train encoder and head, the best on the validation cases; its scores (N, K) of the test slices."""
    encoder, intensity = encoder_of(cfg, slices, process)
    model = Classifier(encoder, len(slices.classes)).to(process.device, memory_format=torch.channels_last)
    crops = crop_augmentation(cfg, slices.train.dataset.size, intensity, encoder.in_channels, process)

    def to_images(stored: Tensor) -> Tensor:
        return network_input(intensity.to_unit(stored), intensity, encoder.in_channels)

    def augment(unit: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        no_masks = torch.zeros_like(unit[:, 0], dtype=torch.long)
        return crops(unit, no_masks, step)[0], targets

    def loss_of(network, images: Tensor, targets: Tensor) -> Tensor:
        with process.autocast():
            logits = network(images)
        return classification_loss(slices.kind, logits, targets)

    def batches_of(split: str, prepare) -> Batches:
        return Batches(slices.parts[split], [*range(len(slices.parts[split]))], prepare, cfg, process)

    learnt = told_apart(one_hot(slices.kind, slices.train.targets, len(slices.classes)))

    def scores_on(split: str, desc: str) -> np.ndarray:
        return np.where(learnt, scores_of(model, batches_of(split, to_images), process, desc), np.nan)

    def validate() -> dict:
        value = None
        if "val" in slices.parts:
            found = scores_on("val", "validation")
            value = main_value(slices.kind, slices.parts["val"].targets, found)
        return {f"val_{NAMES[slices.kind][0]}": value}

    def keep() -> None:
        if process.is_main:
            save_classifier(folder / "model.pth", model)

    def kept() -> None:
        load_classifier(folder / "model.pth", model)

    training = batches_of("train", intensity.to_unit)
    train(cfg, process, model, training, augment, loss_of, validate, keep, kept, stop)
    process.barrier()
    kept()
    return scores_on("test", "test slices")


def judge_reference(
    cfg: Config, name: str, slices: LabelledSlices, task: Task, process: Process, stop: StopRequest
) -> dict:
    """Another encoder fine-tuned in the same way, in a folder inside of run.out; of raw pixels a logistic
    regression of the same slices."""
    if name == RAW:
        features = features_of(cfg, RAW, slices, process)
        return judged_as(task, {kind: logistic(task, some) for kind, some in features.items()})
    own = reference_settings(cfg, name, slices)
    own.run["out"] = str(Path(cfg.run.out) / Path(name.replace(":", "/")).stem)
    own["references"] = []
    evaluate(own, process, stop)
    scores = process.from_main(lambda: read_scores(Path(own.run.out) / "scores.csv"))
    return judged_as(task, {"all trained": Probed({"": [scores]}, {}, None)})


# ---- What is shown -------------------------------------------------------------------------------


def read_results(folder: Path) -> dict:
    def holds(found: dict) -> bool:
        return results.has_metrics(found) and all(map(results.has_metrics, found["references"].values()))

    return results.read_results(folder, holds)


def tables(found: dict) -> str:
    """The encoder and its references; every class; every kind of feature."""
    label = results.encoder_label(found)
    everyone = {label: found} | found["references"]
    metrics = [name for name in found["metrics"] if " at " not in name]
    first = metrics[0]
    rows = [("encoder", *(f"{name} %" for name in metrics), "feature", f"gain over it, {first}")]
    for name, one in everyone.items():
        values = [results.with_interval(*map(one["metrics"][own].get, SHOWN)) for own in metrics]
        above = one.get("gain", {}).get(first)
        rows.append((name, *values, one["feature"], results.with_interval(*above.values()) if above else ""))
    parts = [results.table(rows)]

    rows = [(f"{first} %", *everyone)]
    for name in found["metrics"][first]["classes"]:
        rows.append(
            (name, *(results.percent(one["metrics"][first]["classes"][name]) for one in everyone.values()))
        )
    parts.append(results.table(rows))

    rows = [(f"{first} %, +- over draws of cases", *everyone)]
    for name in found["metrics"]:
        if name.startswith(f"{first} at "):
            own = [one["metrics"].get(name, {}) for one in everyone.values()]
            cells = (
                f"{results.percent(one.get('value'))} +- {results.percent(one.get('deviation'))}"
                for one in own
            )
            rows.append((name.removeprefix(f"{first} at ") + " cases", *cells))
    if len(rows) > 1:
        parts.append(results.table(rows))

    rows = [(f"feature, {first} % (validation)", label)]
    for name, kind in found["features"].items():
        rows.append((name, f"{results.percent(kind[first])} ({results.percent(kind['validation'])})"))
    return "\n\n".join([*parts, results.table(rows)] if len(rows) > 2 else parts)


def write_scores(path: Path, slices: LabelledSlices, scores: np.ndarray) -> None:
    """slice, case, then one column a class: the scores of the test slices, not scaled to anything; empty
    where the training slices taught nothing of a class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["slice", "case", *slices.classes])
    part = slices.parts.get("test", slices.train)
    for name, case, row in zip(part.names, part.cases, scores):
        writer.writerow([name, case, *("" if np.isnan(score) else float(score) for score in row)])
    write_whole(path, text.getvalue())


def read_scores(path: Path) -> np.ndarray:
    with open(path, encoding="utf-8", newline="") as file:
        return np.array([[float(score or "nan") for score in row[2:]] for row in [*csv.reader(file)][1:]])


# ---- Command line --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(__doc__, DEFAULTS, argv, predicts=False)
    if args.compare:
        print(results.compare(args.compare, FREE_KEYS))
        return 0
    cfg = load_config(DEFAULTS, args.config, args.overrides, NULLABLE)
    check_config(cfg)
    return run(SCRIPT, args, cfg, evaluate)


if __name__ == "__main__":
    run_script(main, (DataError, WeightsError))
