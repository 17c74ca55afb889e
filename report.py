"""What an evaluation shows: the table of organs, the list of cases, the picture, and runs side by side.

`results` is the content of results.json: Dice from 0 to 1 (shown in percent), HD95 in mm, None where
undefined.
"""

import csv
import io
import json
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from PIL import Image

from pictures import ORGAN_COLORS, contact_sheet, gray_tile, tile_size
from runtime import ConfigError

TILE = 288  # px, longer side of a slice in the picture


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def millimetres(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def organ_table(results: dict) -> str:
    """One line per organ: Dice in percent and HD95 in mm, means over cases; the mean over organs last."""
    rows = [("organ", "Dice %", "HD95 mm", "cases")]
    for organ, dice in results["dice"].items():
        cases = sum(case[organ] is not None for case in results["cases"].values())
        rows.append((organ, percent(dice), millimetres(results["hd95_organs"][organ]), str(cases)))
    rows.append(
        ("mean", percent(results["mean_dice"]), millimetres(results["hd95"]), str(len(results["cases"])))
    )
    whole = results["dataset_dice"]
    below = f"all slices as one image (mmseg): {percent(whole['mean'])} %"
    below += f", with background {percent(whole['mean_with_background'])} %"
    return f"{aligned(rows)}\n{below}"


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Columns, the first to the left, the others to the right; lines under the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:])])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def cases_csv(results: dict) -> str:
    """case, organ, dice (0 to 1), hd95_mm; an empty field is an undefined value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "organ", "dice", "hd95_mm"])
    for case, organs in results["cases"].items():
        for organ, dice in organs.items():
            writer.writerow([case, organ, dice, results["hd95_cases"][case][organ]])  # None becomes an empty
            field
    return text.getvalue()


def prediction_page(rows: list[tuple], classes: list[str]) -> Image.Image:
    """Rows of image | truth | prediction with a legend; a row is (caption, unit image, truth, prediction),
    (H, W)."""
    tiles, captions = [], []
    for caption, unit, truth, prediction in rows:
        tiles += [gray_tile(unit, TILE), painted(unit, truth), painted(unit, prediction)]
        captions += [caption, "truth", "prediction"]
    return contact_sheet(tiles, captions, classes, columns=3)


def painted(unit: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The slice (H, W) in [0, 1] with its organs in their colours, 255 (ignored) in grey; RGB."""
    picture = gray_tile(unit, TILE)
    large = Image.fromarray(mask.astype(np.uint8)).resize(
        tile_size(mask.shape, TILE), Image.Resampling.NEAREST
    )
    labels = np.asarray(large)
    mixed = 0.35 * picture + 0.65 * ORGAN_COLORS[labels]
    return np.where(labels[..., None] > 0, mixed, picture).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------
# Several runs
# ---------------------------------------------------------------------------------------------------------


def read_results(folder: str | Path) -> dict:
    path = Path(folder) / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        return {"mean_dice": results["mean_dice"]} | results
    except FileNotFoundError:
        raise ConfigError(f"{folder}: holds no results.json; evaluate there first") from None
    except (ValueError, KeyError, TypeError, NotADirectoryError):
        raise ConfigError(f"{path}: not the results of an evaluation") from None


def compare(folders: list[str]) -> str:
    """One line per encoder: linear and fine-tuned mean Dice and the frozen encoder's effective rank.

    Runs of one encoder, mode and label fraction that differ in anything else (the seed) are averaged, with
    their standard deviation. Raises ConfigError for folders without results and for mixed data sets.
    """
    runs = [read_results(folder) for folder in folders]
    roots = list(dict.fromkeys(run["config"]["data"]["root"] for run in runs))
    if len(roots) > 1:
        raise ConfigError(f"results on different data sets ({', '.join(roots)}) do not compare")
    rows = [("encoder", "linear Dice %", "fine-tuned Dice %", "effective rank (pooled / dense)")]
    for label in dict.fromkeys(encoder_label(run) for run in runs):
        own = [run for run in runs if encoder_label(run) == label]
        scores = [[run["mean_dice"] for run in own if run["mode"] == mode] for mode in ("linear", "finetune")]
        ranks = [mean(run["effective_rank"][kind] for run in own) for kind in ("pooled", "dense")]
        rows.append((label, *map(spread, scores), " / ".join(f"{rank:.1f}" for rank in ranks)))
    pictures = [f"{folder}/predictions.png" for folder in folders]
    return "\n".join([aligned(rows), "", "pictures (image | truth | prediction):", *pictures])


def encoder_label(run: dict) -> str:
    """ "random", or the folder of the encoder's run, or its file; with the share of labels if it is not
    all."""
    path = Path(run["encoder"])
    label = path.parent.as_posix() if path.name == "encoder.pth" else run["encoder"]
    share = run["label_fraction"]
    return label if share == 1 else f"{label}, {100 * share:g} % of the labels"


def spread(scores: list[float | None]) -> str:
    scores = [100 * score for score in scores if score is not None]
    if not scores:
        return "-"
    return f"{mean(scores):.1f}" + (f" +- {stdev(scores):.1f} (n={len(scores)})" if len(scores) > 1 else "")
