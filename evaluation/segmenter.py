"""The segmentation model as an evaluation uses it: what it is, what it takes, its file, and its predictions.

LinearProbe             frozen encoder and linear decoder; its rival, DeepLabV3Plus, is in models.py
Batches                 slices, or their frozen features computed once, in any order
save_model, load_model  model.pth: the weights with all that is needed to use them
segmentation_logits     of whole slices, or of windows of them
segment, predict        labels of slices and volumes
"""

import math
import mmap
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from collapse import dense_structure
from ct.slices import IGNORE, MAX_SIDE, DataError, read_stored, write_png
from ct.volumes import read_volume, write_labels
from data import Intensity, network_input
from engine.config import Config, ConfigError
from engine.files import make_run_folder, written_whole
from engine.process import Process, progress
from engine.stopping import ignore_stop_signals
from losses import effective_rank
from models import DeepLabV3Plus, Encoder, LinearDecoder, WeightsError, is_sound, read_weights, upsample

SMALLEST_WINDOW = 64  # px


class LinearProbe(nn.Module):
    """A frozen encoder, always in evaluation mode, and a linear decoder on its layer4."""

    def __init__(self, encoder: Encoder, num_classes: int):
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()
        self.decoder = LinearDecoder(encoder.channels["layer4"], num_classes)

    def train(self, mode: bool = True):
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) -> logits (N, K, h, w) at the encoder's output stride."""
        return self.decoder(frozen_features(self.encoder, images))


@torch.no_grad()
def frozen_features(encoder: Encoder, images: Tensor) -> Tensor:
    """layer4 (N, D, h, w) of normalised images (N, C, H, W)."""
    return encoder(images)["layer4"].contiguous()


@dataclass
class Description:
    """What it takes to rebuild and use a trained model; stands in model.pth beside the weights."""

    mode: str
    arch: str
    in_channels: int
    output_stride: int
    classes: list[str]
    normalisation: dict
    stored: str  # "hu" or "uint8", the values that it takes


def build_model(about: Description, encoder: Encoder, process: Process) -> nn.Module:
    build = LinearProbe if about.mode == "linear" else DeepLabV3Plus
    model = build(encoder, len(about.classes))
    return model.to(process.device, memory_format=torch.channels_last)


def save_model(path: Path, model: nn.Module, about: Description) -> None:
    with written_whole(path) as file:
        torch.save({"about": asdict(about), "state": model.state_dict()}, file)


def load_model(path: Path, process: Process) -> tuple[nn.Module, Description]:
    """Raises ConfigError if there is none, WeightsError if the file is damaged."""
    if not path.is_file():
        raise ConfigError(f"run.out: no trained model in {path.parent} (model.pth); evaluate there first")
    content = read_weights(path)
    try:
        about, state = Description(**content["about"]), content["state"]
        sound = all(map(is_sound, state.values())) and 1 < len(about.classes) <= IGNORE
        sound = sound and about.in_channels == state["encoder.conv1.weight"].shape[1]
        if not sound or not Intensity(**about.normalisation)(torch.zeros(1)).isfinite():
            raise ValueError
        encoder = Encoder(about.arch, about.in_channels, output_stride=about.output_stride)
        model = build_model(about, encoder, process)
        model.load_state_dict(state)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RuntimeError, AttributeError):
        raise WeightsError(f"{path}: not a model of this program, or damaged") from None
    return model.eval(), about


def at_size(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits (N, K, h, w) upsampled bilinearly to (N, K, H, W) in float32."""
    return logits.float() if logits.shape[2:] == size else upsample(logits.float(), size)


def segmentation_logits(
    model: nn.Module, inputs: Tensor, size: tuple[int, int], window: int | None, overlap: float
) -> Tensor:
    """Logits (N, K, H, W) at `size`, of whole slices or, with a window (px), the mean over such windows.

    What a device has no memory for is tried again in smaller batches, then in smaller windows. Only images
    can be divided into windows: of features the window must be None.
    """
    try:
        if window is None or window >= max(inputs.shape[2:]):
            return at_size(model(inputs), size)
        return windowed_logits(model, inputs, window, overlap)
    except torch.OutOfMemoryError:
        pass  # what follows must not happen in here: the error holds on to the memory
    if len(inputs) > 1:
        halves = [segmentation_logits(model, half, size, window, overlap) for half in inputs.tensor_split(2)]
        return torch.cat(halves)
    smaller = min(window or MAX_SIDE, *inputs.shape[2:]) // 2
    if smaller < SMALLEST_WINDOW or inputs.shape[2:] != size:
        raise DataError(f"no memory for a slice of {size[0]} x {size[1]} px")
    return segmentation_logits(model, inputs, size, smaller, overlap)


def windowed_logits(model: nn.Module, images: Tensor, window: int, overlap: float) -> Tensor:
    """Logits (N, K, H, W) of images (N, C, H, W): the mean over all windows that hold a pixel."""
    height, width = images.shape[2:]
    total, count = None, images.new_zeros(height, width)
    for top in window_starts(height, window, overlap):
        for left in window_starts(width, window, overlap):
            place = (..., slice(top, top + window), slice(left, left + window))
            view = images[place]
            part = at_size(model(view), view.shape[2:])
            if total is None:
                total = part.new_zeros(*part.shape[:2], height, width)
            total[place] += part
            count[place] += 1
    return total / count


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Where windows begin that cover `length` px evenly, neighbours sharing `overlap` of a window or more."""
    if window >= length:
        return [0]
    gaps = math.ceil((length - window) / max(1, window * (1 - overlap)))
    return [round(i * (length - window) / gaps) for i in range(gaps + 1)]


# ---------------------------------------------------------------------------------------------------------
# Batches of slices, or of their frozen features
# ---------------------------------------------------------------------------------------------------------


class Batches:
    """Batches of the chosen slices of a data set, as the trained part of the model takes them.

    Args:
        positions: the slices that take part; slice i below is dataset[positions[i]].
        prepare: turns images (n, 1, H, W), stored values on the device, into that: windowed or normalised
            images, or frozen features.
    """

    def __init__(self, dataset, positions: list[int], prepare, cfg: Config, process: Process):
        self.dataset, self.positions, self.prepare, self.process = dataset, positions, prepare, process
        self.workers, self.batch_size = cfg.data.workers, cfg.optim.batch_size
        self.window, self.overlap = cfg.eval.window, cfg.eval.overlap
        self.inputs = self.masks = None

    def __len__(self) -> int:
        return len(self.positions)

    def of(self, plan: list[list[int]]):
        """For each list of slices in the plan: inputs, and masks (n, H, W) on the device."""
        if self.inputs is not None:
            for rows in plan:
                kept = self.inputs[rows], self.masks[rows]
                yield tuple(some.to(self.process.device, non_blocking=True) for some in kept)
            return
        loader = DataLoader(
            self.dataset,
            batch_sampler=[[self.positions[i] for i in rows] for rows in plan],
            num_workers=min(self.workers, len(plan)),
            pin_memory=self.process.device.type == "cuda",
            worker_init_fn=ignore_stop_signals,
        )
        for images, masks in loader:
            device = self.process.device
            yield self.prepare(images.to(device, non_blocking=True)), masks.to(device, non_blocking=True)

    def in_order(self) -> list[list[int]]:
        """The plan of all slices, one after the other."""
        return chunks(list(range(len(self))), self.batch_size)

    def bytes(self) -> int:
        """The memory that `keep` would take, in bytes."""
        one, mask = next(self.of([[0]]))
        return len(self) * (one.nbytes + mask.numel())

    def keep(self, desc: str, folder: Path | None = None) -> None:
        """Compute the inputs of all slices once and hold them in memory, or in files in `folder`.

        The files have no name and end with the process, however that ends. Raises OSError if there is no
        room for them; nothing is kept then.
        """
        plan = self.in_order()
        batches = progress(self.process, desc, self.of(plan), len(plan))
        if folder is not None:
            with TemporaryFile(dir=folder) as inputs, TemporaryFile(dir=folder) as masks:
                for some, mask in batches:
                    append(inputs, some)
                    append(masks, mask.to(torch.uint8))
                self.inputs = mapped(inputs, some)
                self.masks = mapped(masks, mask.to(torch.uint8))
            return
        inputs = masks = None
        for rows, (some, mask) in zip(plan, batches):
            if inputs is None:
                inputs = some.new_empty(len(self), *some.shape[1:])
                masks = mask.new_empty(len(self), *mask.shape[1:], dtype=torch.uint8)
            inputs[rows], masks[rows] = some, mask.to(torch.uint8)
        self.inputs, self.masks = inputs, masks


def append(file, rows: Tensor) -> None:
    file.write(rows.cpu().contiguous().flatten().view(torch.uint8).numpy())


def mapped(file, like: Tensor) -> Tensor:
    """All rows in a file as a tensor of rows `like` those given, read when they are used."""
    file.flush()
    shared = mmap.mmap(file.fileno(), 0)  # shared: not counted as memory of this process
    return torch.frombuffer(shared, dtype=like.dtype).view(-1, *like.shape[1:])


def chunks(rows: list, size: int) -> list[list]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


MONITORED = 2048
STRUCTURED = 128
STRUCTURE_POSITIONS = 64
FROZEN_POSITIONS = 4096  # dense vectors of a frozen encoder for its effective rank


@torch.no_grad()
def frozen_collapse(batches: Batches) -> dict[str, dict]:
    """How far the frozen encoder's features have collapsed, from batches of (n, D, h, w).

    effective_rank: pooled: of the slices' mean vectors; dense: of single positions, the same number of each
    slice by chance. structure: structure.py's measures, also of some positions by chance.
    """
    count = min(len(batches), MONITORED)
    rows = [len(batches) * i // count for i in range(count)]
    structured = set(rows[:: -(-count // STRUCTURED)])
    pooled, dense, structure = [], [], []
    plan = chunks(rows, batches.batch_size)
    for some, (features, _) in zip(
        plan, progress(batches.process, "effective rank", batches.of(plan), len(plan))
    ):
        vectors = features.float().flatten(2).mT.cpu()  # (n, h w, D)
        chosen = torch.randperm(vectors.shape[1], generator=torch.Generator().manual_seed(len(dense)))
        pooled.append(vectors.mean(dim=1))
        dense.append(vectors[:, chosen[: max(1, FROZEN_POSITIONS // count)]].flatten(0, 1))
        mine = [i for i, row in enumerate(some) if row in structured]
        structure.append(vectors[mine][:, chosen[:STRUCTURE_POSITIONS]])
    ranks = {"pooled": effective_rank(torch.cat(pooled)), "dense": effective_rank(torch.cat(dense))}
    return {
        "effective_rank": ranks | {"slices": count},
        "structure": dense_structure(torch.cat(structure)),
    }


# ---------------------------------------------------------------------------------------------------------
# Prediction
# ---------------------------------------------------------------------------------------------------------


def predict(cfg: Config, process: Process, source: Path, out: Path) -> None:
    """Masks for a slice, a volume, or all slices and volumes below a folder, by the model in run.out.

    Slices become 8-bit PNGs of the same relative names; NIfTI volumes become NIfTI on their own grid.
    Raises ConfigError without a trained model, DataError for an input that cannot be used.
    """
    model, about = load_model(Path(cfg.run.out) / "model.pth", process)
    slices, volumes = slices_and_volumes(source)
    base = source if source.is_dir() else source.parent
    make_run_folder(out, process)
    own = (slices + volumes)[process.rank :: process.world]
    for path in progress(process, "predicting", own):
        target = out / path.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".nii", ".gz"):
            volume = read_volume(path)
            stored = torch.from_numpy(np.nan_to_num(volume.array.astype(np.float32), nan=-1024))
            write_labels(target, segment(model, about, stored, "hu", path, cfg, process), volume)
        else:
            array, kind = read_stored(path, cfg.data.hu_offset)
            labels = segment(model, about, torch.from_numpy(array)[None], kind, path, cfg, process)
            write_png(target.with_suffix(".png"), labels[0])
    process.say(f"{out}: masks of {len(slices)} slices and {len(volumes)} volumes")


def slices_and_volumes(source: Path) -> tuple[list[Path], list[Path]]:
    """The .png and .npy files, and the .nii and .nii.gz files, anywhere below a folder; or the one file."""
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    slices = [path for path in files if path.suffix.lower() in (".png", ".npy")]
    volumes = [path for path in files if path.name.lower().endswith((".nii", ".nii.gz"))]
    if not slices and not volumes:
        raise DataError(f"{source}: neither slices (.png, .npy) nor volumes (.nii, .nii.gz)")
    return slices, volumes


@torch.no_grad()
def segment(model, about: Description, stored: Tensor, kind: str, path: Path, cfg: Config, process: Process):
    """Labels (S, H, W) uint8 of slices (S, H, W) in stored values."""
    if kind != about.stored:
        raise DataError(f"{path}: holds {kind} values, the model was trained on {about.stored} ones")
    intensity = Intensity(**about.normalisation)
    labels = []
    for some in stored.split(cfg.optim.batch_size):
        unit = intensity.to_unit(some[:, None].to(process.device))
        with process.autocast():
            images = network_input(unit, intensity, about.in_channels)
            logits = segmentation_logits(model, images, some.shape[1:], cfg.eval.window, cfg.eval.overlap)
        labels.append(logits.argmax(1).to(torch.uint8).cpu())
    return torch.cat(labels).numpy()
