"""The figures of an ablation, from the records of its cells (see cells.py). They need matplotlib.

spectra       singular values of the features of each method, and of random weights
training      effective ranks and DSE while the methods are trained
dice          linear Dice of every seed
benchmarks    every benchmark of the protocol: seeds of each method, and random weights
labels        Dice after fine-tuning, over the share of labelled cases
measures      label-free measures against Dice, a point for each encoder
segmentations what each method's linear decoder says of some slices
"""

import base64
import io
from colorsys import hsv_to_rgb
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from PIL import Image

from ct.organs import class_colors
from ct.pictures import contact_sheet, gray_tile
from ct.properties import class_names
from ct.slices import read_stored
from data import Intensity, SegmentationDataset
from engine.config import ConfigError
from engine.files import written_whole
from engine.ownership import refuse_foreign
from evaluation.report import TILE, painted
from experiments.cells import chosen
from experiments.findings import MEASURES, benchmark_values, checkpoints, monitored_alike, tau_of, tuned_dice

FIGURES = "experiments.ablation --figures"  # by which they are known, see engine/ownership.py
SHOWN_CASES = 3  # in the figure of segmentations


def draw(records: list[dict], protocol: dict, root: Path, out: Path) -> None:
    """dice.png, training.png and measures.png; spectra.png, benchmarks.png, labels.png and segmentations.png
    if there is what they show. `root`: the data set, for segmentations.

    Raises:
        ConfigError: no matplotlib, or no pretraining is finished.
    """
    methods = {name: own for name in protocol["methods"] if (own := chosen(records, name))}
    many = len(methods) > 10  # than matplotlib's usual colors
    colors = {
        name: hsv_to_rgb(i / len(methods), 0.9, 0.8) if many else f"C{i}" for i, name in enumerate(methods)
    }
    runs = {
        name: [record["pretraining"] for record in own]
        for name, own in methods.items()
        if own[0]["rate"] is not None
    }
    if not runs:
        raise ConfigError("no finished pretraining to draw")
    figures = {
        "spectra": spectra(runs, colors),
        "training": training(runs, colors),
        "dice": linear_dice(methods, colors),
        "benchmarks": benchmarks(benchmark_values(records, protocol), colors),
        "labels": labels(methods, colors, protocol["fractions"]),
        "measures": measures(monitored_alike(records, protocol), methods, colors),
    }
    figures = {name: figure for name, figure in figures.items() if figure}
    masks = {name: own[0]["masks"] for name, own in methods.items() if own[0].get("masks")}
    shown = ["segmentations"] if masks and (root / "images").is_dir() else []
    refuse_foreign([out / f"{name}.png" for name in [*figures, *shown]], [], FIGURES, "--figures")
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        with written_whole(out / f"{name}.png", made_by=FIGURES) as file:
            figure.savefig(file, format="png", dpi=110)
    if shown:
        with written_whole(out / "segmentations.png", made_by=FIGURES) as file:
            segmentations(masks, root).save(file, format="PNG")


def page(columns: int, size: tuple[float, float] | None = None):
    """A figure and its panels in a row; inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--figures needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=size or (4.4 * columns, 3.8), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def legend(figure, axes, columns: int = 5) -> None:
    """Below the panels, where it hides nothing; all of them show the same."""
    names = axes[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=columns, fontsize="small")


def spectra(runs: dict[str, list[dict]], colors: dict[str, str]):
    """None if none was kept."""
    runs = {name: own for name, own in runs.items() if "spectra" in own[0]}
    if not runs:
        return None
    figure, axes = page(2)
    for axis, kind in zip(axes, ("pooled", "dense")):
        shown = {name: own[0]["spectra"][kind] for name, own in runs.items()}
        lines = {"random": next(iter(shown.values()))["first"]}
        lines |= {name: spectrum["last"] for name, spectrum in shown.items()}
        for name, line in lines.items():
            values = np.array(line["value"]) / line["value"][0]
            axis.plot(line["index"], values, color=colors.get(name, "grey"), label=name)
        title = f"{kind} features, last step"
        axis.set(yscale="log", ylim=(1e-5, 1.5), xlabel="index", title=title)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="singular value / largest")
    legend(figure, axes)
    return figure


def training(runs: dict[str, list[dict]], colors: dict[str, str]):
    """Means over seeds, and from the lowest to the highest."""
    figure, axes = page(3)
    columns = {
        "effective_rank": "effective rank, pooled",
        "effective_rank_dense": "effective rank, dense",
        "dse": "DSE",
    }
    for axis, (column, title) in zip(axes, columns.items()):
        for name, own in runs.items():
            steps = [row["step"] for row in own[0]["monitor"]]
            values = np.array([[row[column] for row in run["monitor"]] for run in own])
            axis.plot(steps, values.mean(0), "o-", color=colors[name], label=name, markersize=3)
            axis.fill_between(steps, values.min(0), values.max(0), color=colors[name], alpha=0.15)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    legend(figure, axes)
    return figure


def linear_dice(methods: dict[str, list[dict]], colors: dict[str, str]):
    figure, (axis,) = page(1, size=(7, 0.8 + 0.34 * len(methods)))
    for y, (name, own) in enumerate(methods.items()):
        dice = [100 * record["linear"]["mean_dice"] for record in own]
        axis.plot(dice, [y] * len(dice), "o", color=colors[name], markersize=5)  # one for each seed
        axis.plot([mean(dice)] * 2, [y - 0.35, y + 0.35], color=colors[name], linewidth=2.5)
    title = "linear test Dice, %: seeds and their mean"
    axis.set(xlabel=title, yticks=range(len(methods)), yticklabels=methods)
    axis.invert_yaxis()
    axis.grid(alpha=0.3)
    return figure


def benchmarks(values: dict[str, dict[str, list[float]]], colors: dict[str, str]):
    """Panels of one list of methods, by the first benchmark; None without benchmarks."""
    if not values:
        return None
    first = next(iter(values.values()))
    order = sorted(first, key=lambda method: -mean(first[method]))
    figure, axes = page(len(values), size=(1.6 + 1.7 * len(values), 0.9 + 0.27 * len(order)))
    for axis, (name, own) in zip(axes, values.items()):
        for method, dots in own.items():
            y, color = order.index(method), colors[method]
            axis.plot(dots, [y] * len(dots), "o", color=color, markersize=3.5)
            axis.plot([mean(dots)] * 2, [y - 0.35, y + 0.35], color=color, linewidth=2)
        if "random" in own:
            axis.axvline(mean(own["random"]), color="grey", linewidth=1, linestyle=":")
        axis.set(title=name, yticks=range(len(order)), ylim=(len(order) - 0.4, -0.6))
        axis.set_yticklabels(order if axis is axes[0] else [])
        axis.grid(alpha=0.3)
    figure.supxlabel("%: seeds, their mean, and that of random weights (dotted)", fontsize="small")
    return figure


def labels(methods: dict[str, list[dict]], colors: dict[str, str], fractions: list[float]):
    """None if nothing was fine-tuned."""
    tuned = {}
    for name, own in methods.items():
        if points := {fraction: dice for fraction in fractions if (dice := tuned_dice(own, fraction))}:
            tuned[name] = points
    if not tuned:
        return None
    figure, axes = page(1)
    axis = axes[0]
    for i, (name, points) in enumerate(tuned.items()):
        x = [100 * fraction * (1 + 0.03 * i) for fraction in points]
        means = [100 * mean(dice) for dice in points.values()]
        error = [100 * stdev(dice) if len(dice) > 1 else 0 for dice in points.values()]
        axis.errorbar(x, means, error, marker="o", color=colors[name], label=name, capsize=3)
    axis.set(xscale="log", xlabel="labelled cases, %", ylabel="test Dice, %", title="fine-tuned")
    axis.set_xticks([100 * f for f in fractions], [f"{100 * f:g}" for f in fractions])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    legend(figure, axes, columns=3)
    return figure


def measures(records: list[dict], methods: dict[str, list[dict]], colors: dict[str, str]):
    found = checkpoints(records)
    shown = list(MEASURES.items())[:4]
    figure, axes = page(len(shown))
    for axis, (name, measure) in zip(axes, shown):
        known = [one for one in found if measure(one[2]) is not None]
        for method in (*methods, None):
            own = [one for one in known if one[0].method == method]
            style = {"marker": "o", "color": colors.get(method), "label": method}
            if method is None:
                own = [one for one in known if one[0].method not in methods]
                style = {"marker": "x", "color": "grey", "label": "variants"}
            dice = [100 * results["mean_dice"] for _, _, results in own]
            axis.plot([measure(r) for _, _, r in own], dice, linestyle="", markersize=4, **style)
        axis.set(title=f"tau {tau_of(measure, known):+.2f}", xlabel=name, ylabel="linear test Dice, %")
        axis.grid(alpha=0.3)
    legend(figure, axes)
    return figure


def segmentations(masks: dict[str, dict[str, str]], root: Path) -> Image.Image:
    """Rows: the shown slices. Columns: image, truth, and what each method's linear decoder says."""
    tiles, captions, names = [], [], class_names(root)
    colors = class_colors(names)
    for slice_name in shown_slices(root):
        stored, _ = read_stored(root / "images" / slice_name, 1024)
        unit = Intensity((-160, 240)).to_unit(torch.from_numpy(stored)).numpy()
        files = {"truth": root / "masks" / slice_name}
        files |= {name: io.BytesIO(base64.b64decode(own[slice_name])) for name, own in masks.items()}
        tiles.append(gray_tile(unit, TILE))
        tiles += [painted(unit, np.asarray(Image.open(file)), colors) for file in files.values()]
        captions += [slice_name, *files]
    return contact_sheet(tiles, captions, names, columns=2 + len(masks))


def shown_slices(root: Path) -> list[str]:
    """The slice with the most labelled organs of each of the first test cases."""
    dataset = SegmentationDataset(root, "test.txt", num_classes=len(class_names(root, None)))
    best = {}
    for i, case in enumerate(dataset.cases):
        organs = len(np.unique(dataset.own_mask(i)))
        if organs > best.get(case, (0, 0))[0]:
            best[case] = (organs, i)
    return [dataset.names[best[case][1]] for case in sorted(best)[:SHOWN_CASES]]
