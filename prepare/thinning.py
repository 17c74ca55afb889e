"""data.py thin: a shorter list, of the slices of a list that differ most from each other.

Neighbouring slices are nearly the same picture; so are series that were reconstructed twice. Of N slices the
share `--keep` is chosen by farthest-point selection (greedy k-centre; Gonzalez, 1985): each slice is the one
that is farthest from all chosen before, whatever its case. What is left out then lies near to something kept:
no slice farther than the distance at which the selection ended, which is printed.

Slices are compared by features, in Euclidean distance:
- their windowed values, averaged to 16 x 16 px and divided by 16: the distance is the root mean square
  difference, in shares of the window. Not of unit length, which would enlarge the noise of dark slices.
- with --encoder: the mean of its last stage, of unit length, as contrastive learning compares.
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, normalize

from ct.pictures import contact_sheet, gray_tile
from ct.plausible import Values
from ct.slices import DataError, in_threads
from data import Intensity, SliceDataset, default_window, encoder_card, network_input
from engine.files import write_whole, written_whole
from engine.ownership import refuse_foreign

THIN = "data.py thin"  # by which its files are known, see engine/ownership.py
SIDE = 16  # px, that a slice is averaged to
BATCH = 16  # slices that an encoder sees at once
POOL = 1024  # candidates that are compared with each other at once
ROWS = 8192  # slices whose distances are computed at once
SHOWN = 12  # pairs on the page


def thin(args):
    """The thin command: the new list, and a page of what it leaves out beside the nearest slice kept."""
    dataset = SliceDataset(args.root, args.list, args.images, args.hu_offset)
    if dataset.packed:
        raise DataError(f"{args.root}: a packed set has no lists; thin the folder that it was made of")
    count, total = max(1, round(args.keep * len(dataset))), len(dataset)
    out = Path(args.root) / args.out
    page = out.with_suffix(".png")
    if out == page:
        raise DataError(f"--out {args.out}: the list is a text; the page beside it ends in .png")
    sources = [Path(args.root) / args.list, *map(dataset.path, range(total))]
    refuse_foreign([out, page], sources, THIN)
    intensity, features = encoder_features(dataset, args) if args.encoder else pixel_features(dataset)
    kept, distance, nearest = farthest_first(features, count)
    chosen = {*kept}
    write_whole(out, "".join(f"{dataset.names[i]}\n" for i in range(total) if i in chosen), THIN)
    left_out = np.array([i for i in range(total) if i not in chosen], int)
    cases = len({dataset.cases[i] for i in kept}), len({*dataset.cases})
    print(f"{out}: {count} of {total} slices; cases: {cases[0]} of {cases[1]}")
    if len(left_out):
        order = left_out[np.argsort(distance[left_out], kind="stable")]
        middle, most = distance[order[len(order) // 2]], distance[order[-1]]
        what = "of unit vectors" if args.encoder else "RMS difference, as a share of the window"
        print(f"left out: to the nearest kept slice {middle:.4f} in the middle, {most:.4f} at most ({what})")
        shown = order[np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int)]
        picture = left_out_page(dataset, intensity, [(i, nearest[i], distance[i]) for i in shown])
        with written_whole(page, made_by=THIN) as file:
            picture.save(file, format="PNG")
        print(f"{page}: {len(shown)} of them, from the nearest to the farthest, each beside the slice kept")
    return 0


def left_out_page(dataset, intensity, rows):
    """A contact sheet of (slice left out, its nearest kept, their distance)."""
    tiles, captions = [], []
    for index, kept, distance in rows:
        for one, text in ((index, f"left out, {distance:.4f}"), (kept, "kept")):
            unit = intensity.to_unit(dataset[one][0]).numpy()
            tiles.append(gray_tile(unit, 192))
            captions.append(f"{dataset.names[one]}: {text}")
    return contact_sheet(tiles, captions)


# ---- Features ------------------------------------------------------------------------------------


def pixel_features(dataset):
    """The window, and the slices averaged to SIDE x SIDE px, float32 (N, SIDE * SIDE), scaled so that a
    distance is a root mean square difference."""
    intensity = Intensity(window_of(dataset))

    def pooled(index):
        unit = intensity.to_unit(dataset[index])
        return adaptive_avg_pool2d(unit, SIDE).flatten() / SIDE

    features = np.empty((len(dataset), SIDE * SIDE), np.float32)
    for row, values in zip(features, in_threads(pooled, range(len(dataset)), "reading")):
        row[:] = values
    return intensity, features


def window_of(dataset):
    """The default one; of values as stored, what lies between their 1 % and 99 % quantiles."""
    if dataset.kind != "stored":
        return default_window(dataset.kind)
    values = Values()
    for slice in dataset.look(dataset.read):
        values.add(slice)
    low = values.quantile(0.01)
    return low, max(values.quantile(0.99), low + 1)


@torch.no_grad()
def encoder_features(dataset, args):
    """The encoder's normalisation, and the mean of its last stage for each slice, float32 (N, C), of unit
    length. On a GPU if there is one."""
    # torchvision, on which models.py builds, would double the time in which every command starts.
    from models import Encoder
    from weights import WeightsError, architecture_of, load_encoder_weights

    card = encoder_card(args.encoder)
    names = ("window", "mean", "std")
    intensity = Intensity(*(card[name] for name in names)) if card else Intensity(window_of(dataset))
    try:
        encoder = Encoder(card.get("arch") or architecture_of(args.encoder) or "resnet50")
        print(load_encoder_weights(encoder, args.encoder))
    except WeightsError as error:
        raise DataError(str(error)) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder.eval().to(device, memory_format=torch.channels_last)
    slices = in_threads(lambda index: intensity.to_unit(dataset[index]), range(len(dataset)), "encoding")
    features, batch = np.empty((len(dataset), encoder.channels["layer4"]), np.float32), []
    for index, slice in enumerate(slices):
        batch.append(slice)
        if len(batch) == BATCH or index == len(dataset) - 1:
            images = network_input(torch.stack(batch), intensity, 1).to(device)
            means = encoder(images)["layer4"].mean((2, 3))
            features[index + 1 - len(batch) : index + 1] = normalize(means).cpu()
            batch = []
    return intensity, features


# ---- Selection -----------------------------------------------------------------------------------


def farthest_first(features, count):
    """Greedy k-centre: `count` of N points, features (N, D), each the farthest from those before it.

    The first is the one nearest to the mean. Returns their indices in the order of choice, and of every point
    the distance (N,) to its nearest chosen one, and its index (N,).

    The next choices are among the POOL farthest points: there the greedy choice is made one by one, as long
    as its distance is not below that of all other points, which can only shrink. The choice is therefore that
    of the whole, and distances of all N points are computed for many choices at once: as products of
    matrices, without ever holding N x count of them.
    """
    points = torch.from_numpy(np.ascontiguousarray(features))
    points = points - points.mean(0)  # near to zero less is lost to rounding
    squares = points.square().sum(1)
    square, nearest = torch.full_like(squares, torch.inf), torch.zeros(len(points), dtype=torch.long)
    chosen, new = [], [int(squares.argmin())]
    while True:
        update(points, squares, torch.tensor(new), square, nearest)
        chosen += new
        if len(chosen) == count:
            return chosen, square.clamp(min=0).sqrt().numpy(), nearest.numpy()
        new = next_choices(points, squares, square, count - len(chosen))


def update(points, squares, new, square, nearest):
    """Take the points `new` (n,) into account, in place: of each point the squared distance to the nearest,
    -1 of those chosen themselves, and its index (N,)."""
    for start in range(0, len(points), ROWS):
        rows = slice(start, start + ROWS)
        apart, which = square_distances(points[rows], squares[rows], points[new], squares[new]).min(1)
        closer = apart < square[rows]
        square[rows][closer] = apart[closer]
        nearest[rows][closer] = new[which[closer]]
    square[new], nearest[new] = -1, new


def next_choices(points, squares, square, count):
    """The next at most `count` choices, at least one."""
    order = square.argsort(descending=True, stable=True)[: POOL + 1]
    outside = square[order[POOL]] if len(order) > POOL else -1  # that of all others, at most
    pool = order[:POOL].sort().values
    among = square_distances(points[pool], squares[pool], points[pool], squares[pool])
    own, found = square[pool].clone(), []
    while len(found) < min(count, len(pool)):
        best = int(own.argmax())
        if found and own[best] < outside:
            break
        found.append(best)
        own = torch.minimum(own, among[best])
        own[best] = -1
    return pool[found].tolist()


def square_distances(a, a_squares, b, b_squares):
    return torch.addmm(b_squares, a, b.T, alpha=-2).add_(a_squares[:, None]).clamp_(min=0)
