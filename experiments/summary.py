"""The demo's picture: slices, their truth and what each encoder makes of them; the curves of training.

Drawn with Pillow alone, which is there after a plain installation; matplotlib is not.
"""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ct.organs import class_colors
from ct.pictures import BACKGROUND, MARGIN, TEXT, contact_sheet, font, gray_tile
from ct.properties import class_names
from ct.slices import read_stored
from data import Intensity, default_window
from evaluation.metrics import mean_or_none
from evaluation.report import painted
from evaluation.results import percent

SIDE = 184  # px of a slice
DIM = (150, 150, 150)
COLORS = {"random": (170, 170, 170), "moco": (245, 150, 60), "full": (80, 190, 255)}
SHARP = 3  # lines are drawn this much larger, then made smaller


def page(out: Path, runs: dict[str, dict[str, dict]], names: dict[str, str], shown: list[str]) -> Image.Image:
    """The picture of the demo in `out`; runs: {mode: {encoder: results}}."""
    slices = slices_page(out, runs, names, shown)
    lines = curves_of(out, runs)
    width = (slices.width - 2 * MARGIN) // len(lines)
    panels = [panel(title, own, names, (width, 190)) for title, own in lines.items()]
    whole = Image.new("RGB", (slices.width, 44 + slices.height + 190 + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(whole)
    draw.text(
        (MARGIN, 8), "Organs found from frozen features, by a linear decoder on each encoder", TEXT, font(17)
    )
    whole.paste(slices, (0, 34))
    for index, one in enumerate(panels):
        whole.paste(one, (MARGIN + index * width, 44 + slices.height))
    return whole


def slices_page(out: Path, runs: dict, names: dict[str, str], shown: list[str]) -> Image.Image:
    """A row for each slice: itself, truth, and what was found on each encoder's features."""
    data, tiles, captions = out / "data", [], []
    classes = class_names(data, None)
    colors = class_colors(classes)
    for name in shown:
        stored, _ = read_stored(data / "images" / name, 1024)
        unit = Intensity(default_window("hu")).to_unit(torch.from_numpy(stored)).numpy()
        case = Path(name).parts[0]
        tiles.append(gray_tile(unit, SIDE))
        captions.append(f"test case {case}")
        files = {"truth": data / "masks" / name}
        files |= {encoder: out / "shown" / encoder / name for encoder in runs["linear"]}
        for encoder, file in files.items():
            with Image.open(file) as mask:
                tiles.append(painted(unit, np.asarray(mask), colors, SIDE))
            dice = dice_text(runs, encoder, case)
            captions.append(names.get(encoder, encoder) + dice)
    return contact_sheet(tiles, captions, classes, columns=2 + len(runs["linear"]))


def dice_text(runs: dict, encoder: str, case: str) -> str:
    """The Dice of a case on an encoder's features, as a caption says it."""
    if encoder not in runs["linear"]:
        return ""
    return f": Dice {percent(mean_or_none(runs['linear'][encoder]['cases'][case].values()))} %"


# ---- Curves --------------------------------------------------------------------------------------


def curves_of(out: Path, runs: dict) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """{title: {encoder: points}}"""
    pretrained = [name for name in runs["linear"] if (out / name).is_dir()]

    def of(folder: str, column: str) -> list[tuple[float, float]]:
        lines = (out / folder / "metrics.jsonl").read_text().splitlines()
        rows = (json.loads(line) for line in lines)
        return [(row["step"], row[column]) for row in rows if row.get(column) is not None]

    return {
        "pretraining: contrastive loss": {name: of(name, "global") for name in pretrained},
        "pretraining: cosine of different slices' keys": {
            name: of(name, "similarity") for name in pretrained
        },
        "fine-tuning: loss": {name: of(f"{name}-finetune", "loss") for name in runs["finetune"]},
    }


def panel(title: str, lines: dict, names: dict[str, str], size: tuple[int, int]) -> Image.Image:
    """Lines over steps, each with its name at the right of the panel's head."""
    width, height = size
    left, top, right, bottom = 34, 40, width - 12, height - 22
    points = [point for own in lines.values() for point in own]
    last, low, high = max(x for x, _ in points), min(y for _, y in points), max(y for _, y in points)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (right - left) * x / last, bottom - (bottom - top) * (y - low) / (high - low)

    large = Image.new("RGB", (SHARP * width, SHARP * height), BACKGROUND)
    draw = ImageDraw.Draw(large)
    for a, b in ((place(0, low), place(last, low)), (place(0, low), place(0, high))):
        draw.line([SHARP * value for value in (*a, *b)], DIM, SHARP)
    for name, own in lines.items():
        corners = [tuple(SHARP * value for value in place(*point)) for point in own]
        for a, b in pairwise(corners):
            draw.line([*a, *b], COLORS[name], 2 * SHARP)
        for x, y in corners if len(corners) < 12 else ():
            draw.circle((x, y), 3 * SHARP, COLORS[name])
    drawn = large.resize(size, Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(drawn)
    draw.text((0, 2), title, TEXT, font(13))
    x = 0
    for name in lines:
        draw.text((x, 20), names[name], COLORS[name], font(12))
        x += font(12).getlength(names[name]) + 12
    for value in (low, high):
        draw.text((left - 4, place(0, value)[1]), f"{value:.3g}", DIM, font(11), "rm")
    draw.text((right, bottom + 4), f"step {last:g}", DIM, font(11), "rt")
    return drawn
