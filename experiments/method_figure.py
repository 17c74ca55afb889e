"""The figure of the method, docs/method.png: one slice, its two views, and where the two losses are.

    python -m experiments.method_figure docs/method.png

The slice is the phantom's; views and matched regions are made as in training. Needs matplotlib.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from augment import TwoViews
from data import Intensity
from losses import matched_points, to_slice
from prepare.phantom import phantom_case

QUERY, KEY, GREY = "#1f77b4", "#d95f02", "#555555"
SIZE, VIEW, GRID = 192, 96, 3  # px of the slice, px of a view, regions a side
SEED = 7  # of views that overlap in part


def draw(out: Path) -> None:
    """Write the figure as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    hu, _ = phantom_case(3, 16, SIZE)
    unit = Intensity().to_unit(torch.from_numpy(hu[8]).float())  # (H, W)
    views = TwoViews(VIEW, scale=(0.25, 0.5), blur=0)(unit[None, None], torch.Generator().manual_seed(SEED))
    pair, boxes = [view[0, 0].numpy() for view in views[:2]], views[2:]
    *points, keep = matched_points(*boxes, grid=GRID)
    if not keep.all():
        raise ValueError(f"the views of seed {SEED} do not overlap")

    figure = plt.figure(figsize=(13, 5.4), dpi=100)
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, 13), ylim=(0, 5.4))
    page.axis("off")

    def picture(image, x, y, side, title, color):
        axes = figure.add_axes((x / 13, y / 5.4, side / 13, side / 5.4))
        axes.imshow(image, cmap="gray", vmin=0, vmax=1, extent=(0, 1, 1, 0), interpolation="bicubic")
        axes.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0))
        for spine in axes.spines.values():
            spine.set(color=color, linewidth=2)
        say(x + side / 2, y + side + 0.15, title, color, "center", 11)
        return axes

    def block(x, y, width, text, color, height=0.8):
        box = plt.Rectangle((x, y - height / 2), width, height, facecolor="white", edgecolor=color, lw=1.6)
        page.add_patch(box)
        say(x + width / 2, y, text, "black", "center", 10)

    def say(x, y, text, color=GREY, ha="left", size=9, **more):
        page.text(x, y, text, color=color, ha=ha, va="center", fontsize=size, **more)

    def arrow(start, end, color, style="-|>", **more):
        page.annotate("", end, start, arrowprops={"arrowstyle": style, "color": color, "lw": 1.4, **more})

    top, bottom = 4.0, 1.3  # the rows of query and key
    axes = picture(unit.numpy(), 0.25, 1.45, 2.5, "one slice, two crops", GREY)
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])[None]
    for box, color in zip(boxes, (QUERY, KEY)):
        axes.add_patch(plt.Polygon(to_slice(corners, box)[0].numpy(), fill=False, edgecolor=color, lw=2.2))
    places = to_slice(points[0], boxes[0])[0].numpy()
    axes.plot(*places.T, "o", color="white", markeredgecolor="black", markersize=4)

    names = ("view 1, the query", "view 2, the key")
    for image, own, y, title, color in zip(pair, points, (top, bottom), names, (QUERY, KEY)):
        axes = picture(image, 3.3, y - 0.8, 1.6, title, color)
        for number, (px, py) in enumerate(own[0].numpy(), start=1):
            circle = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": color}
            axes.text(px, py, str(number), fontsize=7, ha="center", va="center", bbox=circle)
        arrow((2.8, 2.7 + (y - 2.65) / 3), (3.25, y), color)

    outer, inner = 0.62, -0.62  # of a row's heads, away from the other row and towards it
    rows = ((top, 1, QUERY, "encoder"), (bottom, -1, KEY, "momentum\nencoder"))
    for y, side, color, name in rows:
        arrow((4.95, y), (5.3, y), color)
        block(5.3, y, 1.1, name, color)
        arrow((6.4, y), (6.7, y), color)
        block(6.7, y, 1.05, "whitening", color)
        for head, offset in (("head", side * outer), ("local head", side * inner)):
            arrow((7.75, y), (8.1, y + offset), color)
            block(8.1, y + offset, 1.1, head, color, height=0.6)
    arrow((5.85, top - 0.42), (5.85, bottom + 0.42), GREY, linestyle="--")
    say(5.95, 2.65, "slow average\n(momentum)")

    # Regions: each against the same region of the other view, and the others of that view.
    block(7.95, 2.65, 1.4, "local InfoNCE", "black", height=0.5)
    arrow((8.65, top + inner - 0.3), (8.65, 2.92), QUERY)
    arrow((8.65, bottom - inner + 0.3), (8.65, 2.38), KEY)
    say(9.45, 2.65, "region 5 of the query\nagainst regions 1 to 9\nof the key")

    # Slices: a query against its own key, and the keys of earlier slices.
    block(11.45, top + outer, 1.3, "InfoNCE", "black", height=0.6)
    arrow((9.2, top + outer), (11.45, top + outer), QUERY)
    say(10.3, top + outer + 0.12, "query", QUERY, "center")
    own = bottom - outer
    page.plot([9.2, 12.45], [own, own], color=KEY, lw=1.4)
    arrow((12.45, own), (12.45, top + outer - 0.3), KEY)
    say(10.3, own + 0.12, "its key", KEY, "center")
    left, low, width, height = 11.2, 1.5, 0.8, 1.5
    page.add_patch(plt.Rectangle((left, low), width, height, facecolor="white", edgecolor=KEY, lw=1.6))
    for y in np.linspace(low, low + height, 8)[1:-1]:
        page.plot([left, left + width], [y, y], color=KEY, lw=0.8)
    arrow((left + width / 2, own), (left + width / 2, low), KEY)
    arrow((left + width / 2, low + height), (left + width / 2, top + outer - 0.3), KEY)
    white = {"facecolor": "white", "edgecolor": "none", "pad": 2}
    say(left + width / 2, low + height / 2, "queue", "black", "center", 10, bbox=white)
    say(left + width / 2 - 0.08, 3.75, "keys of\nearlier slices", KEY, "right")
    figure.savefig(out)
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
