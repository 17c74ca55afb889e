"""Pictures of slices: mask outlines, legends, contact sheets, and augmented pairs.

Pictures are uint8 arrays, grey (H, W) or colour (H, W, 3).
"""

import colorsys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ct.organs import ORGAN_COLORS, class_colors

BACKGROUND = (24, 24, 24)
TEXT = (235, 235, 235)
MARGIN = 8  # px between tiles


def gray_tile(unit, side):
    """A slice (H, W) in [0, 1] -> RGB (h, w, 3), its longer side `side` px."""
    picture = Image.fromarray((np.clip(unit, 0, 1) * 255).round().astype(np.uint8))
    return np.asarray(picture.resize(tile_size(unit.shape, side), Image.Resampling.BICUBIC).convert("RGB"))


def outlined(unit, mask, side, colors=ORGAN_COLORS):
    """A slice (H, W) in [0, 1] with the outline of each class of its mask (H, W), its longer side `side`
    px."""
    picture = gray_tile(unit, side).copy()
    large = Image.fromarray(mask.astype(np.uint8)).resize(
        tile_size(mask.shape, side), Image.Resampling.NEAREST
    )
    edge, labels = outline(np.asarray(large))
    picture[edge] = colors[labels[edge]]
    return picture


def boxed(unit, boxes, labels, side, colors=ORGAN_COLORS):
    """A slice (H, W) in [0, 1] with the boxes (n, 4), x0 y0 x1 y1 in px, of classes `labels` (n,)."""
    picture = Image.fromarray(gray_tile(unit, side))
    scale, pen = side / max(unit.shape), ImageDraw.Draw(picture)
    for (x0, y0, x1, y1), label in zip(np.round(np.asarray(boxes) * scale).tolist(), labels):
        corners = [x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)]
        pen.rectangle(corners, outline=tuple(colors[label].tolist()), width=2)
    return np.asarray(picture)


def outline(mask):
    """Where a class of mask (H, W) ends, on its inner side: bool (H, W); and the mask."""
    padded = np.pad(mask, 1, mode="edge")
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    edge = np.any([mask != neighbour for neighbour in neighbours], axis=0)
    return edge & (mask > 0), mask


def tile_size(shape, side):
    """(width, height) for PIL of an image (H, W) whose longer side becomes `side` px."""
    scale = side / max(shape)
    return max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))


def contact_sheet(tiles, captions, names=(), columns=6):
    """RGB tiles in rows of `columns` with a caption under each and a legend of class names (background
    first)."""
    columns = min(columns, len(tiles))
    width = max(tile.shape[1] for tile in tiles) + MARGIN
    height = max(tile.shape[0] for tile in tiles) + 16 + MARGIN
    rows = -(-len(tiles) // columns)
    colors, legend = class_colors(names), legend_rows(names, columns * width - MARGIN)
    page = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN + 22 * len(legend)), BACKGROUND)
    draw = ImageDraw.Draw(page)
    for index, (tile, caption) in enumerate(zip(tiles, captions)):
        x, y = MARGIN + index % columns * width, MARGIN + index // columns * height
        page.paste(Image.fromarray(tile), (x, y))
        draw.text((x, y + tile.shape[0] + 1), shortened(caption, tile.shape[1], 11), TEXT, font(11))
    for row, entries in enumerate(legend):
        for x, index, name in entries:
            y = rows * height + MARGIN + 22 * row
            draw.rectangle((x, y + 2, x + 12, y + 14), tuple(colors[index].tolist()))
            draw.text((x + 17, y), name, TEXT, font(13))
    return page


def legend_rows(names, width):
    """Where the entries of a legend go: rows of (x in px, class, name) that are not wider than `width`."""
    rows, x = [], width
    for index, name in list(enumerate(names))[1:]:
        needed = 17 + font(13).getlength(name) + 14
        if x + needed > width:
            rows.append([])
            x = MARGIN
        rows[-1].append((x, index, name))
        x += needed
    return rows


def shortened(caption, width, size):
    """The end of a caption that fits into `width` px."""
    if font(size).getlength(caption) <= width:
        return caption
    while caption and font(size).getlength("…" + caption) > width:
        caption = caption[1:]
    return "…" + caption


def font(size):
    return ImageFont.load_default(size)


# ---- Augmented pairs -----------------------------------------------------------------------------


def views_page(slices, views, outlines, flips, points, keep, captions, side=288):
    """One row a slice: it with the outlines of both views, and the views with the matched regions, numbered.

    slices (N, H, W), views two of (N, h, w), in [0, 1]; outlines two of (N, 4, 2), the views' corners, x and
    y in [0, 1] of the slice; flips two of N, whether a view is mirrored; points two of (N, R, 2), x and y in
    [0, 1] of the view, R = grid * grid, row-major; keep (N,) False where the crops overlap too little to be
    matched.
    """
    tiles, labels = [], []
    for row in range(len(slices)):
        source = Image.fromarray(gray_tile(slices[row], side))
        for corners, color in zip(outlines, ((70, 240, 240), (245, 130, 48))):
            draw_outline(source, corners[row], color)
        tiles += [np.asarray(source)]
        tiles += [regions_drawn(view[row], place[row], keep[row], side) for view, place in zip(views, points)]
        flipped = ["flipped" if flip[row] else "" for flip in flips]
        matched = "" if keep[row] else "no match: the crops overlap too little"
        labels += [
            captions[row],
            f"view 1 (cyan) {flipped[0]} {matched}",
            f"view 2 (orange) {flipped[1]} {matched}",
        ]
    return contact_sheet(tiles, labels, columns=3)


def draw_outline(picture, corners, color):
    """Corners (4, 2) in [0, 1] of the picture; of those at its edge the line is still seen."""
    places = np.round(np.asarray(corners) * (np.array(picture.size) - 1)).tolist()
    ImageDraw.Draw(picture).polygon([*map(tuple, places)], outline=color, width=2)


def regions_drawn(view, points, keep, side):
    """A view with one numbered, coloured cell around each of its points (R, 2), 2 x 2 or more."""
    picture = Image.fromarray(gray_tile(view, side))
    if not keep:
        return np.asarray(picture)
    grid = round(len(points) ** 0.5)
    place = np.asarray(points).reshape(grid, grid, 2) * picture.size
    right, down = (place[0, 1] - place[0, 0]) * 0.47, (place[1, 0] - place[0, 0]) * 0.47
    draw = ImageDraw.Draw(picture)
    for index, (x, y) in enumerate(place.reshape(-1, 2)):
        color = tuple(round(255 * value) for value in colorsys.hsv_to_rgb(index / len(points), 0.7, 1.0))
        cell = [np.array([x, y]) + i * right + j * down for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        draw.polygon([tuple(corner) for corner in cell], outline=color)
        draw.text((x, y), str(index + 1), color, font(13), "mm", stroke_width=2, stroke_fill=BACKGROUND)
    return np.asarray(picture)
