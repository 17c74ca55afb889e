"""The collapse monitor: how far the features of the encoder have collapsed while it is trained.

CollapseMonitor     measures it, on slices of the validation list
feature_colors      dense features to look at
draw, show          pictures in the run's folder, and on a TensorBoard
"""

import heapq
import importlib.util
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from collapse import SLICES, STRUCTURED, FeatureSample, dense_structure, grey_readout, some_positions
from ct.pictures import contact_sheet, gray_tile, tile_size
from data import Intensity, SliceDataset, middle, network_input
from engine.config import Config
from engine.files import written_whole
from engine.process import Process, progress
from losses import effective_rank_of, seeded
from moco import Method
from models import Encoder

KINDS = {  # of features, as their columns in metrics.jsonl end
    "": "pooled",
    "_dense": "dense",
    "_whitened": "pooled, whitened",
    "_whitened_dense": "dense, whitened",
}
BESIDE_LOSSES = ("step", "epoch", "loss", "lr", "gradient_norm", "images_per_second")
BESIDE_LOSSES += ("skipped_steps", "unreadable_slices")  # columns of a line of metrics with a loss
PANEL = 8  # slices whose features are drawn
TILE = 256  # px, longer side of a slice there


class CollapseMonitor:
    """Effective rank, spectrum and dense structure of the encoder's features, without augmentation or labels.

    The slices are those of data.val, without such a list the first of the training list by case, at most
    collapse.SLICES; the rank is bounded by their number. Their structure (collapse.dense_structure) is
    measured at output stride 8, as a decoder will see them. Only the main process measures.
    """

    def __init__(self, cfg: Config, dataset: SliceDataset, intensity: Intensity, process: Process):
        self.intensity, self.process, self.size = intensity, process, cfg.data.size
        self.channels = cfg.model.in_channels
        dataset = validation_slices(cfg, dataset.size) or dataset
        by_case = heapq.nsmallest(SLICES, zip(dataset.cases, dataset.names, range(len(dataset))))
        self.slices = Subset(dataset, [index for _, _, index in by_case])

    @torch.no_grad()
    def measure(self, model: Method) -> dict:
        """Effective ranks (after the whitening between trunk and heads, too, if there is one) and spectra."""
        if not self.process.is_main:
            return {}
        encoder, whitening = model.query.encoder, model.query.decorrelation
        sides = [""] if isinstance(whitening, nn.Identity) else ["", "_whitened"]
        samples = {side: FeatureSample(len(self.slices), seeded("positions")) for side in sides}
        model.eval()
        try:
            loader = DataLoader(self.slices, batch_size=32)
            for stored in progress(self.process, "measuring collapse", loader):
                maps = self.maps(encoder, stored)
                for side, sample in samples.items():
                    sample.add(whitening(maps) if side else maps)
            structure = self.structure(encoder)
        finally:  # as below
            model.train()
        spectra = {}
        for side, sample in samples.items():
            spectra[side], spectra[f"{side}_dense"] = sample.spectra()
        row = {f"effective_rank{name}": round(effective_rank_of(s), 3) for name, s in spectra.items()}
        row |= {name: round(value, 5) for name, value in structure.items()}
        return row | {f"spectrum{name}": [float(f"{v:.5g}") for v in s] for name, s in spectra.items()}

    def structure(self, encoder: Encoder) -> dict[str, float]:
        """DSE, its three terms, the share of variance between images, and the grey readout."""
        features, grey = [], []
        with at_output_stride_8(encoder):
            for stored in self.stored(range(0, len(self.slices), -(-len(self.slices) // STRUCTURED))):
                maps = self.maps(encoder, stored)
                around = self.neighbourhoods(stored, encoder.output_stride)
                features.append(some_positions(maps, seeded("readout")))
                grey.append(some_positions(around, seeded("readout")))  # the same positions
        features = torch.cat(features)  # (n, P, C)
        return dense_structure(features) | {"grey_readout": grey_readout(features, torch.cat(grey))}

    @torch.no_grad()
    def features_page(self, model: Method) -> Image.Image:
        """A panel of slices and their dense features at output stride 8 as colours (feature_colors)."""
        encoder, training = model.query.encoder, model.training
        count = min(PANEL, len(self.slices))
        chosen = [len(self.slices) * (2 * i + 1) // (2 * count) for i in range(count)]
        encoder.eval()
        try:
            with at_output_stride_8(encoder):
                maps = torch.cat([self.maps(encoder, stored) for stored in self.stored(chosen)])
                stride = encoder.output_stride
        finally:
            encoder.train(training)
        tiles, captions = [], []
        for i, colors in zip(chosen, at_pixels(feature_colors(maps), self.size, stride)):
            unit = self.intensity.to_unit(middle(self.slices[i])[0])
            shown = (unit - unit.min()) / (unit.max() - unit.min()).clamp(min=1e-6)
            tiles.append(gray_tile(shown.numpy(), TILE))
            picture = Image.fromarray((255 * colors).round().byte().numpy())
            tiles.append(np.asarray(picture.resize(tile_size(unit.shape, TILE), Image.Resampling.NEAREST)))
            captions += [self.slices.dataset.names[self.slices.indices[i]], "features"]
        return contact_sheet(tiles, captions, columns=4)

    def stored(self, rows) -> DataLoader:
        """Stored values (n, 1 or 3, H, W) of the slices `rows`, in batches."""
        return DataLoader(Subset(self.slices, rows), batch_size=32)

    def maps(self, encoder: Encoder, stored: Tensor) -> Tensor:
        """layer4 (n, C, h, w) of whole slices in stored values, scaled to the views' size."""
        return encoder(network_input(self.scaled(stored), self.intensity, self.channels))["layer4"]

    def scaled(self, stored: Tensor) -> Tensor:
        """Whole slices in stored values, windowed and scaled to the views' size (n, 1 or 3, size, size)."""
        unit = self.intensity.to_unit(stored.to(self.process.device))
        return F.interpolate(unit, (self.size, self.size), mode="bilinear", antialias=True)

    def neighbourhoods(self, stored: Tensor, stride: int) -> Tensor:
        """Mean grey values of the 3 x 3 cells around each position of a map (h, w): (n, 9, h w). A cell is
        centred on its position's pixel (losses.cell_centres), and so it has stride + 1 px a side."""
        scaled = self.scaled(middle(stored))
        cells = F.avg_pool2d(scaled, stride + 1, stride, stride // 2, count_include_pad=False)
        return F.unfold(F.pad(cells, (1, 1, 1, 1), mode="replicate"), 3)


@contextmanager
def at_output_stride_8(encoder: Encoder):
    """Within, the encoder's maps are those that a decoder will see."""
    pretraining_stride = encoder.output_stride
    encoder.set_output_stride(8)
    try:
        yield
    finally:  # or training would continue at the wrong stride where a missing picture is only warned of
        encoder.set_output_stride(pretraining_stride)


def validation_slices(cfg: Config, size: tuple[int, int] | None = None) -> SliceDataset | None:
    """Those of data.val, if there is such a list."""
    if not cfg.data.val or not (Path(cfg.data.root) / cfg.data.val).is_file():
        return None
    place = (cfg.data.root, cfg.data.val, cfg.data.images, cfg.data.hu_offset)
    return SliceDataset(*place, size, cfg.run.skip_bad, cfg.data.neighbours)


def feature_colors(maps: Tensor) -> Tensor:
    """Dense features (N, C, h, w) as colours (N, h, w, 3) in [0, 1]; like features have like colours.

    The first three principal components, one projection for all maps, each from its 1st to 99th percentile.
    """
    vectors = maps.movedim(1, -1).flatten(0, 2).double().cpu()
    centred = vectors - vectors.mean(dim=0)
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:3]
    axes *= axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()  # svd leaves the sign open
    components = centred @ axes.T
    low, high = (components.quantile(q, dim=0) for q in (0.01, 0.99))
    colors = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return colors.view(len(maps), *maps.shape[2:], -1)


def at_pixels(colors: Tensor, size: int, stride: int) -> Tensor:
    """Positions (N, h, h, 3) -> pixels (N, size, size, 3), each in the colour of the nearest position, which
    is number pixel / stride (losses.cell_centres)."""
    nearest = ((torch.arange(size) + stride // 2) // stride).clamp(max=colors.shape[1] - 1)
    return colors[:, nearest][:, :, nearest]


def describe_collapse(measured: dict) -> str:
    whitened = measured.get("effective_rank_whitened")
    rest = f"; after whitening {whitened:.1f}" if whitened is not None else ""
    score = f", label-free score {measured['score']:.3f}" if "score" in measured else ""
    return (
        f"effective rank of pooled features {measured['effective_rank']:.1f}, "
        f"of dense features {measured['effective_rank_dense']:.1f}{rest}; DSE {measured['dse']:.3f}, "
        f"grey readout {measured['grey_readout']:.3f}{score}"
    )


def show(board, step: int, measured: dict, page: Image.Image) -> None:
    """The panel of features and the spectrum (if matplotlib is installed) as pictures on a TensorBoard."""
    board.add_image("features", np.asarray(page), step, dataformats="HWC")
    if importlib.util.find_spec("matplotlib"):
        board.add_figure("spectrum", spectrum_figure({"step": step, **measured}), step)


def draw(folder: Path, process: Process) -> None:
    """curves.png and spectrum.png from metrics.jsonl."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        process.say("no curves.png and spectrum.png: pip install matplotlib")
        return

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ranks = [row for row in rows if "effective_rank" in row]
    kinds = {f"effective_rank{name}": label for name, label in KINDS.items()}
    alike = {"accuracy": "queries nearest to their own key", "similarity": "cosine of different images"}
    terms = [name for row in rows if "loss" in row for name in row if name not in (*BESIDE_LOSSES, *alike)]
    panels = {"loss terms": {name: name for name in terms}, "accuracy and similarity": alike}
    panels["effective rank"] = kinds
    curves = {}  # {title: {label: points}} of what there is: not every method has all of it
    for title, columns in panels.items():
        for column, label in columns.items():
            points = [(row["step"], row[column]) for row in rows if row.get(column) is not None]
            if points and (column != "local" or any(value for _, value in points)):
                curves.setdefault(title, {})[label] = points
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0] if curves else []
    for axis, (title, lines) in zip(axes, curves.items(), strict=True):
        for label, points in lines.items():
            axis.plot(*zip(*points), "o-" if title == "effective rank" else "-", label=label)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    figures = {"curves.png": figure}
    if ranks:
        figures["spectrum.png"] = spectrum_figure(ranks[0], ranks[-1])
    for name, one in figures.items():
        with written_whole(folder / name) as file:
            one.savefig(file, dpi=110, format="png")
    process.say(f"pictures: {' '.join(str(folder / name) for name in figures)}")


def spectrum_figure(*rows: dict):
    """The singular values of one measurement, or of the first (dotted) and the last: a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for row, style in zip(rows, (":", "-") if len(rows) > 1 else ("-",), strict=True):
        for i, (name, label) in enumerate(KINDS.items()):
            if f"spectrum{name}" in row:
                values = torch.tensor(row[f"spectrum{name}"])
                values = values / values[0].clamp(min=1e-12)
                numbers, label = range(1, 1 + len(values)), f"{label}, step {row['step']}"
                axis.plot(numbers, values, style, color=f"C{i}", label=label)
    axis.set(xscale="log", yscale="log", ylim=(1e-5, 1.5), title="Spectrum")
    axis.set(xlabel="number", ylabel="singular value / largest")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="lower left")
    return figure
