"""From a trained model to figures: scores per case and organ, the table, the picture, and runs side by side.

`results` is the content of results.json: Dice from 0 to 1 (shown in percent), HD95 in mm, None where
undefined.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from ct.listing import natural_order
from ct.organs import ORGAN_COLORS, class_colors
from ct.pictures import contact_sheet, gray_tile, tile_size
from data import Intensity, middle
from engine.config import ConfigError
from engine.files import written_whole
from engine.process import Process, progress
from evaluation import metrics, results
from evaluation.batches import Batches, chunks
from evaluation.metrics import mean_or_none
from evaluation.results import (
    averaged_over_settings,
    by_encoder,
    defined,
    deviation,
    encoder_label,
    is_score,
    is_text,
    percent,
    refuse_twice,
    spread,
    table,
)
from evaluation.segmenter import segmentation_logits

PICTURE_CASES = 4
TILE = 288  # px, longer side of a slice in the picture


@dataclass
class CaseScore:
    """What is known of one case: counts (K, 3) as metrics.dice_counts gives them, HD95 in mm per class."""

    counts: Tensor
    hd95: list[float | None]
    shown: tuple[int, np.ndarray] | None  # the slice for the picture and its prediction, common size


@torch.no_grad()
def score(
    model, batches: Batches, window: tuple, process: Process, desc: str, full=False
) -> dict[str, CaseScore]:
    """Segment all slices of all cases and compare with the masks, each on its own grid.

    Cases are divided among the processes; every process gets all results. window: side and overlap, see
    segmenter.segmentation_logits. `full`: HD95 and pictures too, and masks are not kept for another time.
    """
    dataset = batches.dataset
    own = sorted(set(dataset.cases), key=natural_order)[process.rank :: process.world]
    slices = {case: [] for case in own}
    for i, position in enumerate(batches.positions):
        if (case := dataset.cases[position]) in slices:
            slices[case].append(i)
    model.eval()
    scores = {}
    total = sum(len(rows) for rows in slices.values())
    with progress(process, desc, total=total) as bar:
        for case, rows in slices.items():
            rows.sort(key=lambda i: natural_order(dataset.names[batches.positions[i]]))
            plan = chunks(rows, batches.batch_size)
            predictions = []
            for inputs in batches.inputs_of(plan):
                with process.autocast():
                    logits = segmentation_logits(model, inputs, dataset.size, *window)
                predictions.append(logits.argmax(1).to(torch.uint8).cpu())
                bar.update(len(inputs))
            truths = [batches.truth(i, keep=not full) for i in rows]
            positions = [batches.positions[i] for i in rows]
            scores[case] = score_case(dataset, case, positions, truths, torch.cat(predictions), full)
    if process.world > 1:
        parts = [None] * process.world
        dist.all_gather_object(parts, scores)
        scores = {case: part[case] for part in parts for case in part}
    return {case: scores[case] for case in sorted(scores, key=natural_order)}


def score_case(
    dataset, case: str, positions: list[int], truths: list, predictions: Tensor, full: bool
) -> CaseScore:
    """One case from the masks (h, w) and the predictions (n, H, W) of its slices, given from the first to the
    last slice."""
    classes, truths = dataset.num_classes, [torch.from_numpy(truth) for truth in truths]
    placed = zip(predictions, positions, truths)
    own = [torch.as_tensor(dataset.to_own_grid(p.numpy(), at, tuple(t.shape))) for p, at, t in placed]
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


def mean_dice(scores: dict[str, CaseScore]) -> dict:
    """{"val_dice": mean over cases, then over organs, without background; "val_organs": how many organs}"""
    cases = {case: dict(enumerate(metrics.case_dice(one.counts)[1:])) for case, one in scores.items()}
    organs = metrics.mean_over_cases(cases).values()
    return {"val_dice": mean_or_none(organs), "val_organs": len(defined(organs))}


def summary(scores: dict[str, CaseScore], classes: list[str]) -> dict:
    """The figures of results.json."""
    organs = classes[1:]
    cases = {case: dict(zip(organs, metrics.case_dice(one.counts)[1:])) for case, one in scores.items()}
    distances = {case: dict(zip(organs, one.hd95[1:])) for case, one in scores.items()}
    dice, hd95 = metrics.mean_over_cases(cases), metrics.mean_over_cases(distances)
    whole = metrics.dataset_dice(sum(one.counts for one in scores.values()))
    interval = metrics.interval_over_cases(cases)
    metric = {"value": mean_or_none(dice.values()), "interval": interval, "classes": dice}
    return {
        "metrics": {"Dice": metric},
        "mean_dice": metric["value"],
        "dice": dice,
        "cases": cases,
        "dataset_dice": whole | {"classes": dict(zip(classes, whole["classes"]))},
        "hd95": mean_or_none(hd95.values()),
        "hd95_organs": hd95,
        "hd95_cases": distances,
        "measured": {"dice": measured(cases), "hd95": measured(distances)},
    }


def measured(cases: dict[str, dict]) -> dict[str, list[int]]:
    """Over what a mean of {case: {organ: value or None}} goes: [measured, all] organs, and cases."""
    organs = [defined(case[organ] for case in cases.values()) for organ in next(iter(cases.values()), ())]
    found = [defined(case.values()) for case in cases.values()]
    return {"organs": [sum(map(bool, organs)), len(organs)], "cases": [sum(map(bool, found)), len(found)]}


def measured_text(counts: dict[str, list[int]]) -> str:
    return "{} of {} organs in {} of {} cases".format(*counts["organs"], *counts["cases"])


# ---- What is shown of them -----------------------------------------------------------------------


def one_digit(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def organ_table(results: dict) -> str:
    """One line per organ: Dice in percent and HD95 in mm, each the mean +- standard deviation over the cases
    with a value, and their number; below the mean over organs, its deviation that of the cases' own means,
    and over how many organs and cases it goes."""
    cases, distances = results["cases"], results["hd95_cases"]
    rows = [("organ", "Dice %", "+-", "cases", "HD95 mm", "+-", "cases")]
    for organ, dice in results["dice"].items():
        found = defined(case[organ] for case in cases.values())
        apart = defined(case[organ] for case in distances.values())
        hd95 = results["hd95_organs"][organ]
        row = (organ, percent(dice), percent(deviation(found)), str(len(found)))
        rows.append((*row, one_digit(hd95), one_digit(deviation(apart)), str(len(apart))))
    means = [[mean_or_none(case.values()) for case in kind.values()] for kind in (cases, distances)]
    means = [deviation(defined(values)) for values in means]
    over = [measured(kind) for kind in (cases, distances)]
    row = ("mean", percent(results["mean_dice"]), percent(means[0]), str(over[0]["cases"][0]))
    row += (one_digit(results["hd95"]), one_digit(means[1]), str(over[1]["cases"][0]))
    rows.append(row)
    whole = results["dataset_dice"]
    below = "mean Dice over {}; mean HD95 over {}; ".format(*map(measured_text, over))
    below += f"all slices as one image (mmseg): {percent(whole['mean'])} %"
    below += f", with background {percent(whole['mean_with_background'])} %"
    return f"{table(rows)}\n\n{below}"


def cases_csv(results: dict) -> str:
    """case, organ, dice (0 to 1), hd95_mm; an empty field is an undefined value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "organ", "dice", "hd95_mm"])
    for case, organs in results["cases"].items():
        for organ, dice in organs.items():
            writer.writerow([case, organ, dice, results["hd95_cases"][case][organ]])
    return text.getvalue()


def draw_predictions(
    path: Path, dataset, scores: dict[str, CaseScore], intensity: Intensity, classes
) -> None:
    """The middle one of the labelled slices of each of the first PICTURE_CASES cases by name."""
    rows = []
    for one in list(scores.values())[:PICTURE_CASES]:
        position, prediction = one.shown
        image, truth = dataset[position]
        rows.append((dataset.names[position], shown_slice(image, intensity), truth.numpy(), prediction))
    with written_whole(path) as file:
        prediction_page(rows, classes).save(file, format="PNG")


def shown_slice(stored: Tensor, intensity: Intensity) -> np.ndarray:
    """A slice (1, H, W), or between its neighbours (3, H, W), in stored values as pictures show it, (H, W) in
    [0, 1]."""
    unit = intensity.to_unit(middle(stored)[0])
    if intensity.window is None:
        unit = (unit - unit.min()) / (unit.max() - unit.min()).clamp(min=1e-6)
    return unit.numpy()


def prediction_page(rows: list[tuple], classes: list[str]) -> Image.Image:
    """Rows of image | truth | prediction with a legend.

    A row is a caption, the slice in [0, 1], the true and the predicted mask, each (H, W).
    """
    tiles, captions, colors = [], [], class_colors(classes)
    for caption, unit, truth, prediction in rows:
        tiles += [gray_tile(unit, TILE), painted(unit, truth, colors), painted(unit, prediction, colors)]
        captions += [caption, "truth", "prediction"]
    return contact_sheet(tiles, captions, classes, columns=3)


def painted(
    unit: np.ndarray, mask: np.ndarray, colors: np.ndarray = ORGAN_COLORS, side: int = TILE
) -> np.ndarray:
    """The slice (H, W) in [0, 1] with its organs in their colours, 255 (ignored) in grey; RGB,
    its longer side `side` px."""
    picture = gray_tile(unit, side)
    large = Image.fromarray(mask.astype(np.uint8)).resize(
        tile_size(mask.shape, side), Image.Resampling.NEAREST
    )
    labels = np.asarray(large)
    mixed = 0.35 * picture + 0.65 * colors[labels]
    return np.where(labels[..., None] > 0, mixed, picture).astype(np.uint8)


# ---- Several runs --------------------------------------------------------------------------------


def read_results(folder: str | Path, whole: bool = True) -> dict:
    """The content of results.json, in which all that organ_table needs is there and of its kind; with `whole`
    false only what `compare` needs. Raises ConfigError."""
    return results.read_results(folder, has_organs if whole else is_comparable)


def is_comparable(found: dict) -> bool:
    texts = [*found["cases"], *(organ for case in found["cases"].values() for organ in case)]
    scores = [found["mean_dice"], *(found["effective_rank"][kind] for kind in ("pooled", "dense"))]
    scores += [dice for case in found["cases"].values() for dice in case.values()]
    return all(map(is_text, texts)) and all(map(is_score, scores))


def has_organs(found: dict) -> bool:
    organs = found["dice"]
    cases = [*found["cases"].values(), *found["hd95_cases"].values()]
    columns = [organs, found["hd95_organs"], *cases]
    if not is_comparable(found) or not all(isinstance(column, dict) for column in columns):
        return False
    scores = [column[organ] for column in columns for organ in organs]
    scores += [value for case in cases for value in case.values()]
    scores += [found["hd95"], *(found["dataset_dice"][kind] for kind in ("mean", "mean_with_background"))]
    return all(map(is_text, organs)) and all(map(is_score, scores))


def compare(folders: list[str], without_effect: tuple[str, ...]) -> str:
    """Means: one line per encoder, linear and fine-tuned mean Dice and the frozen encoder's effective rank.
    Organs: one line per organ, mean Dice of each mode and encoder.
    Differences: of each mode against the first encoder given, over the test cases.

    Runs of one encoder, mode and label fraction are averaged, with their standard deviation; a line says in
    which settings but the seed they differ. Raises ConfigError for folders without results or given twice,
    and for results on other data sets, test cases or organs.
    """
    runs = [read_results(folder, whole=False) for folder in folders]
    refuse_other_tests(folders, runs)
    rows = [("encoder", "linear Dice %", "fine-tuned Dice %", "effective rank (pooled / dense)")]
    for label, own in by_encoder(runs).items():
        scores = [[run["mean_dice"] for run in own if run["mode"] == mode] for mode in ("linear", "finetune")]
        ranks = [mean_or_none(run["effective_rank"][kind] for run in own) for kind in ("pooled", "dense")]
        rows.append((label, *map(spread, scores), " / ".join(map(one_digit, ranks))))
    pictures = [
        "\npictures (image | truth | prediction):",
        *(f"{folder}/predictions.png" for folder in folders),
    ]
    parts = [table(rows), organs_side_by_side(runs), differences(runs)]
    parts += [*incomplete(folders, runs), *averaged_over_settings(runs, without_effect), *pictures]
    return "\n".join(part for part in parts if part)


def refuse_other_tests(folders: list[str], runs: list[dict]) -> None:
    """ConfigError for a folder given twice, and for results whose means are not over the same."""
    refuse_twice(folders)
    roots = list(dict.fromkeys(run["config"]["data"]["root"] for run in runs))
    if len(roots) > 1:
        raise ConfigError(f"results on different data sets ({', '.join(roots)}) do not compare")
    for folder, run in zip(folders, runs):
        if run["cases"].keys() != runs[0]["cases"].keys():
            raise ConfigError(f"results on different test cases ({folders[0]}, {folder}) do not compare")
        if organs_of(run) != organs_of(runs[0]):
            raise ConfigError(f"results with different organs ({folders[0]}, {folder}) do not compare")


def organs_of(run: dict) -> set[str]:
    return {organ for case in run["cases"].values() for organ in case}


def incomplete(folders: list[str], runs: list[dict]) -> list[str]:
    """A line for each run whose mean does not go over all organs and cases."""
    lines = []
    for folder, run in zip(folders, runs):
        counts = measured(run["cases"])
        if any(found < all_there for found, all_there in counts.values()):
            lines.append(f"{folder}: mean Dice over {measured_text(counts)}")
    return ["", *lines] if lines else []


def organs_side_by_side(runs: list[dict]) -> str:
    """The table of organs; a value is the mean over cases, then over seeds."""
    columns = {}  # {"mode: encoder": [the cases of each seed]}
    for mode in ("linear", "finetune"):
        for run in runs:
            if run["mode"] == mode:
                columns.setdefault(f"{mode}: {encoder_label(run)}", []).append(run["cases"].values())
    rows = [("Dice %", *columns)]
    every_case = (case for run in runs for case in run["cases"].values())
    for organ in dict.fromkeys(organ for case in every_case for organ in case):
        means = [
            mean_or_none(mean_or_none(case.get(organ) for case in cases) for cases in seeds)
            for seeds in columns.values()
        ]
        rows.append((organ, *map(percent, means)))
    return f"\n{table(rows)}"


def differences(runs: list[dict]) -> str:
    """The table of paired comparisons; empty if there is nothing to compare.

    A case counts with its mean Dice over organs, averaged over seeds; p is metrics.sign_flip_test's.
    """
    rows = [("Dice, percentage points", "difference", "+- over cases", "cases better", "p")]
    for mode in ("linear", "finetune"):
        encoders = by_encoder([run for run in runs if run["mode"] == mode])
        base = next(iter(encoders), None)
        for label in list(encoders)[1:]:
            if found := gains(encoders[label], encoders[base]):
                better = f"{sum(gain > 0 for gain in found)} of {len(found)}"
                row = (f"{mode}: {label} - {base}", f"{100 * mean(found):+.1f}", percent(deviation(found)))
                rows.append((*row, better, f"{metrics.sign_flip_test(found):.2g}"))
    return f"\n{table(rows)}" if len(rows) > 1 else ""


def gains(runs: list[dict], base: list[dict]) -> list[float]:
    """What one encoder's runs, of some seeds, have more than another's: a value for each test case."""
    pairs = zip(dice_of_cases(runs).values(), dice_of_cases(base, like=runs[0]).values())
    return [mine - other for mine, other in pairs if mine is not None and other is not None]


def dice_of_cases(runs: list[dict], like: dict | None = None) -> dict[str, float | None]:
    """{case: mean Dice over organs, averaged over seeds}, in the order of `like`."""
    return {
        case: mean_or_none(mean_or_none(run["cases"][case].values()) for run in runs)
        for case in (like or runs[0])["cases"]
    }
