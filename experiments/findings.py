"""What an ablation has found: tables and figures from the small files of its cells (see ablation.py).

A cell's folder, METHOD/lrRATE-seedN, holds linear.json and finetune-PERCENT.json (results.json of each
evaluation), linear-STEP.json (of earlier encoders of the same run), metrics.jsonl and masks/ (predictions for
the figure).
"""

import itertools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from PIL import Image

from collapse import label_free_score, recent_similarity
from ct.layout import class_names
from ct.organs import class_colors
from ct.pictures import contact_sheet, gray_tile
from ct.slices import read_stored
from data import Intensity, SegmentationDataset
from engine.config import ConfigError
from evaluation.metrics import mean_or_none
from evaluation.report import TILE, painted, percent, table

GROUPS = {  # of the organs of BTCV
    "large organs": ("spleen", "right kidney", "left kidney", "liver", "stomach"),
    "vessels": ("aorta", "inferior vena cava", "portal and splenic veins"),
    "small organs": ("gallbladder", "esophagus", "pancreas", "right adrenal gland", "left adrenal gland"),
}
MEASURES = {  # of collapse, in the results of an evaluation and what the monitor said of the same encoder
    "effective rank, pooled": lambda results: results["effective_rank"]["pooled"],
    "effective rank, dense": lambda results: results["effective_rank"]["dense"],
    "DSE": lambda results: results["structure"]["dse"],
    "label-free score": lambda results: results["monitor"].get("score"),  # None before a readout was measured
    "grey readout": lambda results: results["monitor"].get("grey_readout"),
    "cosine of keys (negative)": lambda results: negative(results["monitor"].get("similarity")),
    "DSE, between clusters": lambda results: results["structure"]["inter"],
    "DSE, within clusters (negative)": lambda results: -results["structure"]["intra"],
    "DSE, dimension": lambda results: results["structure"]["dimension"],
    "variance between images (negative)": lambda results: -results["structure"]["image_share"],
}
PICKING = {"score": "by label-free score", "grey_readout": "by grey readout", "dse": "by DSE"}  # columns
PAIRS = ("slices", "slices, reflected", "noise", "noise, reflected")  # see position.py
SHOWN_CASES = 3  # in the figure of segmentations

# ---------------------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------------------


def shortened(results: dict) -> dict:
    """results.json with numbers of five digits and without the distances of every case."""
    kept = {name: value for name, value in results.items() if name != "hd95_cases"}
    return json.loads(json.dumps(kept), parse_float=lambda text: round(float(text), 5))


def describe(results: dict) -> str:
    return f"validation Dice {percent(results['val_dice'])}, test Dice {percent(results['mean_dice'])}"


def metrics(cell: Path) -> list[dict]:
    """The rows of metrics.jsonl; none for an encoder that was not pretrained."""
    path = cell / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def results_of(cell: Path, name: str = "linear") -> dict | None:
    path = cell / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def rate_of(cell: Path) -> float | None:
    found = re.fullmatch(r"lr(.+)-seed\d+", cell.name)
    return float(found[1]) if found else None


def seed_of(cell: Path) -> int:
    return int(cell.name.rsplit("seed", 1)[1])


def cells_of(method: Path) -> list[Path]:
    return sorted((cell for cell in method.glob("*seed*") if cell.is_dir()), key=seed_of)


def tuning_of(method: Path) -> dict[float, float]:
    """{learning rate: validation Dice} of the cells with the lowest seed."""
    cells = [cell for cell in cells_of(method) if rate_of(cell) and results_of(cell)]
    first = min(map(seed_of, cells), default=0)
    return {rate_of(c): results_of(c)["val_dice"] for c in cells if seed_of(c) == first}


def best_rate(method: Path) -> float:
    tuning = tuning_of(method)
    if not tuning:
        raise ConfigError(f"{method}: no finished cell to take the learning rate from; run that method first")
    return max(tuning, key=tuning.get)


def chosen_cells(method: Path) -> list[Path]:
    """One for each seed, at the chosen learning rate."""
    cells = [cell for cell in cells_of(method) if results_of(cell)]
    if not any(rate_of(cell) for cell in cells):
        return cells
    rate = best_rate(method)
    return [cell for cell in cells if rate_of(cell) == rate]


# ---------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------


def tables(cells: Path, protocol: dict) -> str:
    """All tables in Markdown; methods without a finished cell are left out."""
    parts = [main_table(cells, protocol), organ_table(cells, protocol), tuning_table(cells, protocol)]
    parts += [variant_table(cells, protocol), position_table(cells)]
    found = checkpoints(cells)
    parts += [measure_table(found), picked_table(found)]
    return "\n\n".join(part for part in parts if part)


def markdown(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]], title: str) -> str:
    rows = [heading, *rows]
    return f"**{title}**\n\n{table(rows)}" if len(rows) > 1 else ""


def spread(values: list[float | None]) -> str:
    """Mean and standard deviation in percent, of those that are defined."""
    values = [100 * value for value in values if value is not None]
    if not values:
        return "-"
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def main_table(cells: Path, protocol: dict) -> str:
    tuned = (f"fine-tuned, {100 * fraction:g} %" for fraction in protocol["fractions"])
    heading = ("method", "seeds", "linear", *GROUPS, *tuned)
    heading += ("rank pooled / dense", "DSE", "variance between images")
    rows = []
    for method in protocol["methods"]:
        chosen = chosen_cells(cells / method)
        if not chosen:
            continue
        linear = [results_of(cell) for cell in chosen]
        row = [method, str(len(chosen)), spread([r["mean_dice"] for r in linear])]
        row += [spread([group_dice(r, group) for r in linear]) for group in GROUPS]
        row += [spread(tuned_dice(chosen, fraction)) for fraction in protocol["fractions"]]
        ranks = [mean(r["effective_rank"][kind] for r in linear) for kind in ("pooled", "dense")]
        row += [f"{ranks[0]:.0f} / {ranks[1]:.0f}", f"{mean(r['structure']['dse'] for r in linear):.3f}"]
        row.append(f"{mean(r['structure']['image_share'] for r in linear):.2f}")
        rows.append(tuple(row))
    return markdown(heading, rows, "Test Dice in %, mean ± standard deviation over seeds")


def group_dice(results: dict, group: str) -> float | None:
    """None if none of its organs is there or was found."""
    return mean_or_none(results["dice"].get(organ) for organ in GROUPS[group])


def tuned_dice(cells: list[Path], fraction: float) -> list[float]:
    """Test Dice after fine-tuning with this fraction of the labels, of the cells where that is finished."""
    tuned = [results_of(cell, f"finetune-{100 * fraction:g}") for cell in cells]
    return [results["mean_dice"] for results in tuned if results]


def organ_table(cells: Path, protocol: dict) -> str:
    names = [name for name in protocol["methods"] if chosen_cells(cells / name)]
    found = {name: [results_of(cell)["dice"] for cell in chosen_cells(cells / name)] for name in names}
    rows = [
        (organ, *(spread([dice[organ] for dice in found[name]]) for name in names))
        for organ in (found[names[0]][0] if names else ())
    ]
    return markdown(("organ", *names), rows, "Linear Dice in % of each organ")


def tuning_table(cells: Path, protocol: dict) -> str:
    rows = []
    for method in protocol["methods"]:
        if tuning := tuning_of(cells / method):
            rows.append((method, *(percent(tuning.get(rate)) for rate in protocol["rates"])))
    heading = ("method", *(f"lr {rate:g}" for rate in protocol["rates"]))
    return markdown(heading, rows, "Validation Dice in % at each learning rate, first seed")


def variant_table(cells: Path, protocol: dict) -> str:
    rows = []
    for variant, changes in protocol["variants"].items():
        for cell in chosen_cells(cells / variant)[:1]:
            results, last = results_of(cell), merged(metrics(cell))
            base = [c for c in chosen_cells(cells / changes["like"]) if seed_of(c) == seed_of(cell)]
            gain = results["mean_dice"] - results_of(base[0])["mean_dice"] if base else None
            rows.append(
                (
                    variant,
                    changes["like"],
                    percent(results["val_dice"]),
                    percent(results["mean_dice"]),
                    "-" if gain is None else f"{100 * gain:+.1f}",
                    *(f"{results['effective_rank'][kind]:.0f}" for kind in ("pooled", "dense")),
                    f"{results['structure']['dse']:.3f}",
                    f"{last['local']:.2f}" if last.get("local") else "-",
                )
            )
    heading = (
        "variant",
        "of",
        "validation",
        "test",
        "gain",
        "rank pooled",
        "rank dense",
        "DSE",
        "local loss",
    )
    return markdown(heading, rows, "Variants, one seed: linear Dice in %")


def position_table(cells: Path) -> str:
    rows = []
    for path in sorted(cells.glob("*/*/position.json")):
        cues, last = json.loads(path.read_text()), merged(metrics(path.parent))
        row = [path.parent.parent.name, f"{last['local']:.2f}"]
        rows.append((*row, *(percent(cues[name]["accuracy"]) for name in PAIRS)))
    return markdown(("method", "local loss", *PAIRS), rows, "Regions matched rightly, in %")


def merged(rows: list[dict]) -> dict:
    """The newest value of every column."""
    return {name: value for row in rows for name, value in row.items()}


# ---------------------------------------------------------------------------------------------------------
# Do label-free measures predict Dice?
# ---------------------------------------------------------------------------------------------------------


def checkpoints(cells: Path) -> list[tuple[Path, str, dict]]:
    """(cell, name, results) of every linear evaluation, of final and earlier encoders. results["monitor"] is
    the row of metrics.jsonl that was measured of the same encoder, with the cosine of keys and the label-free
    score of that time; {} if it was not pretrained."""
    found = []
    for path in sorted(cells.glob("*/*/linear*.json")):
        rows = metrics(path.parent)
        measured = {row["step"]: row for row in rows if "dse" in row}
        step = int(path.stem.split("-")[1]) if "-" in path.stem else max(measured, default=None)
        monitor = measured.get(step, {})
        if monitor:
            keys = recent_similarity(row.get("similarity") for row in rows if row["step"] <= step)
            monitor = {"similarity": keys} | monitor
            if "grey_readout" in monitor:  # older runs have no score of their own
                monitor = {"score": label_free_score(monitor["grey_readout"], keys)} | monitor
        found.append((path.parent, path.stem, json.loads(path.read_text()) | {"monitor": monitor}))
    return found


def by_cell(found: list) -> dict[Path, list]:
    """The checkpoints of each cell."""
    return {cell: list(run) for cell, run in itertools.groupby(found, key=lambda one: one[0])}


def kendall_tau(x: list[float], y: list[float]) -> float:
    """Kendall's tau-b: concordant less discordant pairs over the pairs that are not tied."""
    pairs = list(itertools.combinations(zip(x, y), 2))
    signs = [(np.sign(a[0] - b[0]), np.sign(a[1] - b[1])) for a, b in pairs]
    agreement = sum(first * second for first, second in signs)
    untied = [sum(sign[side] != 0 for sign in signs) for side in (0, 1)]
    return float(agreement / (untied[0] * untied[1]) ** 0.5) if all(untied) else float("nan")


def measure_table(found: list) -> str:
    if len(found) < 3:
        return ""
    trained = [one for one in found if rate_of(one[0]) is not None]
    read = [one for one in trained if MEASURES["label-free score"](one[2]) is not None]
    runs = [run for run in by_cell(trained).values() if len(run) > 2]
    rows = []
    for name, measure in MEASURES.items():
        within = [tau for run in runs if not math.isnan(tau := tau_of(measure, run))]
        taus = [tau_of(measure, some) for some in (found, trained, read)]
        taus.append(mean(within) if within else math.nan)
        rows.append((name, *("-" if math.isnan(tau) else f"{tau:+.2f}" for tau in taus)))
    heading = ("measure", f"all {len(found)}", f"{len(trained)} pretrained", f"{len(read)} with a readout")
    title = "Kendall's tau of each measure with linear Dice, over checkpoints"
    return markdown((*heading, "within one run, mean"), rows, title)


def negative(value: float | None) -> float | None:
    return None if value is None else -value


def tau_of(measure, found: list) -> float:
    """Not a number if the measure is not known of all of them."""
    values = [measure(results) for _, _, results in found]
    if None in values:
        return math.nan
    return kendall_tau(values, [results["mean_dice"] for _, _, results in found])


def picked_table(found: list) -> str:
    """The checkpoint of each run that a measure picks, against the last and the best one."""
    rows = []
    for cell, run in by_cell(found).items():
        if all(name == "linear" for _, name, _ in run):
            continue
        steps = {results["monitor"]["step"]: results for _, _, results in run if results["monitor"]}
        dice = {step: results["mean_dice"] for step, results in steps.items()}
        best = max(dice, key=dice.get)
        row = ["/".join(cell.parts[-2:])]
        for name in PICKING:
            values = {step: results["monitor"].get(name) for step, results in steps.items()}
            known = None not in values.values()
            row.append(of_step(dice, max(values, key=values.get), best) if known else "-")
        rows.append((*row, of_step(dice, max(dice), best), f"{percent(dice[best])} ({best})"))
    heading = ("cell", *PICKING.values(), "last", "best")
    title = "Linear Dice in % of the checkpoint picked without labels (step; difference from the best one)"
    return markdown(heading, rows, title)


def of_step(dice: dict[int, float], step: int, best: int) -> str:
    return f"{percent(dice[step])} ({step}; {100 * (dice[step] - dice[best]):+.1f})"


# ---------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------


def shown_slices(root: Path) -> list[str]:
    """The slice with the most labelled organs of each of the first test cases."""
    dataset = SegmentationDataset(root, "test.txt", "images", "masks", 1024, len(class_names(root, None)))
    best = {}
    for i, case in enumerate(dataset.cases):
        organs = len(np.unique(dataset.own_mask(i)))
        if organs > best.get(case, (0, 0))[0]:
            best[case] = (organs, i)
    return [dataset.names[best[case][1]] for case in sorted(best)[:SHOWN_CASES]]


def draw(cells: Path, protocol: dict, root: Path, out: Path) -> None:
    """dice.png, spectra.png, training.png and measures.png; labels.png and segmentations.png if there is what
    they show.

    Raises:
        ConfigError: no matplotlib, or no pretraining is finished.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--figures needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    methods = [name for name in protocol["methods"] if chosen_cells(cells / name)]
    colors = {name: f"C{i}" for i, name in enumerate(methods)}
    runs = {name: [metrics(cell) for cell in chosen_cells(cells / name)] for name in methods}
    runs = {name: [rows for rows in own if rows] for name, own in runs.items() if any(own)}
    if not runs:
        raise ConfigError(f"{cells}: no finished pretraining to draw")

    def page(columns: int, height: float = 3.8):
        return plt.subplots(1, columns, figsize=(4.4 * columns, height), layout="constrained", squeeze=False)

    def legend(figure, axes, columns: int = 5) -> None:
        """Below the panels, where it hides nothing; all of them show the same."""
        figure.legend(
            *axes[0][0].get_legend_handles_labels(),
            loc="outside lower center",
            ncols=columns,
            fontsize="small",
        )

    def save(figure, name: str) -> None:
        figure.savefig(out / name, dpi=110)
        plt.close(figure)

    figure, axes = page(2)
    for axis, kind, title in zip(axes[0], ("", "_dense"), ("pooled features", "dense features")):
        start = next(iter(runs.values()))[0][0]
        lines = {"random": start} | {name: own[0][-1] for name, own in runs.items()}
        for name, row in lines.items():
            values = np.array(next(r for r in (row, start) if f"spectrum{kind}" in r)[f"spectrum{kind}"])
            axis.plot(values / values[0], color=colors.get(name, "grey"), label=name)
        axis.set(yscale="log", ylim=(1e-5, 1.5), xlabel="index", title=f"{title}, last step")
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel="singular value / largest")
    legend(figure, axes)
    save(figure, "spectra.png")

    figure, axes = page(3)
    columns = ("effective_rank", "effective_rank_dense", "dse")
    titles = ("effective rank, pooled", "effective rank, dense", "DSE")
    for axis, column, title in zip(axes[0], columns, titles):
        for name, own in runs.items():
            curves = [[(r["step"], r[column]) for r in rows if column in r] for rows in own]
            steps = [step for step, _ in curves[0]]
            values = np.array([[value for _, value in curve] for curve in curves])
            axis.plot(steps, values.mean(0), "o-", color=colors[name], label=name, markersize=3)
            axis.fill_between(steps, values.min(0), values.max(0), color=colors[name], alpha=0.15)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    legend(figure, axes)
    save(figure, "training.png")

    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.34 * len(methods)), layout="constrained")
    for y, name in enumerate(methods):
        dice = [100 * results_of(cell)["mean_dice"] for cell in chosen_cells(cells / name)]
        axis.plot(dice, [y] * len(dice), "o", color=colors[name], markersize=5)  # one for each seed
        axis.plot([mean(dice)] * 2, [y - 0.35, y + 0.35], color=colors[name], linewidth=2.5)
    axis.set(
        xlabel="linear test Dice, %: seeds and their mean", yticks=range(len(methods)), yticklabels=methods
    )
    axis.invert_yaxis()
    axis.grid(alpha=0.3)
    save(figure, "dice.png")

    fractions, tuned = protocol["fractions"], {}
    for name in methods:
        if points := {f: own for f in fractions if (own := tuned_dice(chosen_cells(cells / name), f))}:
            tuned[name] = points
    if tuned:
        figure, axes = page(1)
        axis = axes[0][0]
        for i, (name, points) in enumerate(tuned.items()):
            x = [100 * fraction * (1 + 0.03 * i) for fraction in points]
            means = [100 * mean(own) for own in points.values()]
            error = [100 * stdev(own) if len(own) > 1 else 0 for own in points.values()]
            axis.errorbar(x, means, error, marker="o", color=colors[name], label=name, capsize=3)
        axis.set(xscale="log", xlabel="labelled cases, %", ylabel="test Dice, %", title="fine-tuned")
        axis.set_xticks([100 * f for f in fractions], [f"{100 * f:g}" for f in fractions])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        legend(figure, axes, columns=3)
        save(figure, "labels.png")

    found = checkpoints(cells)
    shown = list(MEASURES.items())[:4]
    figure, axes = page(len(shown))
    for axis, (name, measure) in zip(axes[0], shown):
        known = [one for one in found if measure(one[2]) is not None]
        for method in (*methods, None):
            own = [one for one in known if one[0].parent.name == method]
            style = {"marker": "o", "color": colors.get(method), "label": method}
            if method is None:
                own = [one for one in known if one[0].parent.name not in methods]
                style = {"marker": "x", "color": "grey", "label": "variants"}
            dice = [100 * results["mean_dice"] for _, _, results in own]
            axis.plot([measure(r) for _, _, r in own], dice, linestyle="", markersize=4, **style)
        axis.set(title=f"tau {tau_of(measure, known):+.2f}", xlabel=name, ylabel="linear test Dice, %")
        axis.grid(alpha=0.3)
    legend(figure, axes)
    save(figure, "measures.png")
    draw_segmentations(cells, methods, root, out)


def draw_segmentations(cells: Path, methods: list[str], root: Path, out: Path) -> None:
    """Rows: the shown slices. Columns: image, truth, and what each method's linear decoder says."""
    masks = {name: chosen_cells(cells / name)[0] / "masks" for name in methods}
    masks = {name: folder for name, folder in masks.items() if folder.is_dir()}
    if not masks or not (root / "images").is_dir():
        return
    tiles, captions, names = [], [], class_names(root)
    colors = class_colors(names)
    for slice_name in shown_slices(root):
        stored, _ = read_stored(root / "images" / slice_name, 1024)
        unit = Intensity((-160, 240)).to_unit(torch.from_numpy(stored)).numpy()
        sources = {"truth": root / "masks"} | masks
        tiles += [gray_tile(unit, TILE)]
        shown = (np.asarray(Image.open(folder / slice_name)) for folder in sources.values())
        tiles += [painted(unit, mask, colors) for mask in shown]
        captions += [slice_name, *sources]
    contact_sheet(tiles, captions, names, columns=2 + len(masks)).save(out / "segmentations.png")
