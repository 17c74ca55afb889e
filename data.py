"""Slices as training reads them: intensities, datasets, and whole batches for a DataLoader.

    SliceDataset, SegmentationDataset   the slices of a list, with or without masks, at one size
    Intensity, network_input            from stored values to what a network sees
    BatchReader                         whole batches, for a DataLoader

Files on disk are read by ct/. Run as a script it makes, packs, checks and shows data sets (prepare/):

    python data.py phantom --out data/phantom --cases 40 --slices 24 --size 128 --seed 0
    python data.py slice --images ct.nii.gz|DIR --labels seg.nii.gz|DIR --out data/ct --label-map MAP.json
    python data.py pack --root data/ct --list train.txt --out data/ct-train
    python data.py check --root data/ct
    python data.py show --root data/ct --list train.txt --out page.png --views
"""

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from augment import SegmentationAugment, TwoViews  # noqa: F401 (can be imported from here, too)
from ct.layout import (
    Cases,
    Strings,
    all_slices,
    find_slices,
    mask_path,
    packed_at,
    read_list,
    read_spacing,
    split_folder,
    without_suffix,
)
from ct.slices import AIR, IGNORE, DataError, mask_size, read_mask, read_stored, slice_header
from engine.config import one_line

BAD_IN_A_ROW = 100  # consecutive unreadable slices that end a run even with skip_bad
log = logging.getLogger("med-moco")

# ---- Intensities ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Intensity:
    """Stored values -> what a network sees: the window to [0, 1], then minus `mean` and over `std`.

    window None: stored values stay unscaled. Takes tensors and arrays of any shape. Two compare by value.
    """

    window: tuple | None = (-160.0, 240.0)
    mean: float = 0.5
    std: float = 0.25

    def __post_init__(self):
        if self.window is not None:
            if len(self.window) != 2 or not self.window[0] < self.window[1]:
                raise DataError(f"window: two increasing values are expected, not {self.window}")
            object.__setattr__(self, "window", (float(self.window[0]), float(self.window[1])))
        if not self.std > 0:
            raise DataError(f"std: a positive value is expected, not {self.std}")

    def to_unit(self, stored):
        if self.window is None:
            return stored
        low, high = self.window
        return ((stored - low) / (high - low)).clip(0, 1)

    def normalise(self, unit):
        return (unit - self.mean) / self.std

    def __call__(self, stored):
        return self.normalise(self.to_unit(stored))

    def as_dict(self):
        """For JSON; Intensity(**as_dict()) is the same again."""
        window = None if self.window is None else list(self.window)
        return {"window": window, "mean": self.mean, "std": self.std}


def default_window(stored):
    """The window meant by `auto`: soft tissue for HU, everything for 8-bit slices."""
    return (-160.0, 240.0) if stored == "hu" else (0.0, 255.0)


def network_input(unit: Tensor, intensity: Intensity, in_channels: int) -> Tensor:
    """Windowed images (N, 1, H, W) -> what the network sees, (N, in_channels, H, W) channels_last."""
    images = intensity.normalise(unit).expand(-1, in_channels, -1, -1)
    return images.contiguous(memory_format=torch.channels_last)


# ---- One size for all slices ---------------------------------------------------------------------


def fit(image, size, fill, nearest=False):
    """An image (H, W) brought to `size` (h, w): scaled to fit inside with its aspect ratio kept, centred, the
    rest filled. Bilinear (antialiased where it shrinks), or nearest for masks. The dtype is kept."""
    if tuple(image.shape) == tuple(size):
        return image
    height, width, top, left = placement(image.shape, size)
    pixels = image[None, None].float()
    if nearest:
        scaled = F.interpolate(pixels, (height, width), mode="nearest-exact")
    else:
        scaled = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    out = image.new_full(size, fill)
    out[top : top + height, left : left + width] = scaled[0, 0]
    return out


def placement(own, size):
    """Where an image of size `own` lies on the common size: (height, width, top, left) in px."""
    scale = min(size[0] / own[0], size[1] / own[1])
    height, width = max(1, round(own[0] * scale)), max(1, round(own[1] * scale))
    return height, width, (size[0] - height) // 2, (size[1] - width) // 2


# ---- Datasets ------------------------------------------------------------------------------------


class SliceDataset(Dataset):
    """The slices of a list, as FloatTensor (1, H, W) in HU (8-bit sets: the stored value).

    root      the data set's folder, or a packed set (NAME, NAME.npy or NAME.json; it is its own list then)
    list      list file below root; None: every slice in the images folder
    images    folder below root; "{split}" in it stands for the list's name without .txt
    size      (H, W) of all slices; None: that of the first one. Slices of another size are scaled to fit
              (see `fit`).
    skip_bad  leave out listed files that are missing, and give the next readable slice of the list for an
              unreadable one, both with a warning; without it they are a DataError
    names, cases    one per slice;  stored: "hu" or "uint8" (8-bit PNGs)
    """

    def __init__(self, root, list="train.txt", images="images", hu_offset=1024, size=None, skip_bad=False):
        self.hu_offset, self.skip_bad = hu_offset, skip_bad
        # Shared, so that all workers together say each of these once.
        self.said = {about: torch.zeros(1, dtype=torch.bool).share_memory_() for about in ("size", "bad")}
        self.packed = packed_at(root)
        if self.packed:
            self.names, self.cases, self.stored = self.packed.names, self.packed.cases, self.packed.stored
            first = self.packed.shape[1:]
        else:
            self.folder, self.names = listed_slices(root, list, images, skip_bad)
            self.cases = Cases(self.names)
            first, self.stored = self.read_or_next(lambda index: slice_header(self.path(index)), 0)
        self.size = tuple(size) if size else tuple(first)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return self.on_common_size(self.read_or_next(self.read, index))[None]

    def read_or_next(self, read, index):
        """read(index), or with skip_bad read(i) of the first slice from there on that can be read."""
        index = range(len(self))[index]
        for tried in range(min(BAD_IN_A_ROW, len(self))):
            try:
                return read((index + tried) % len(self))
            except DataError as error:
                if not self.skip_bad:
                    raise
                reason = error
            self.say_once("bad", f"warning: skipped unreadable slice: {reason} (later ones are only counted)")
        raise DataError(f"{reason}; {tried + 1} unreadable slices in a row are too many to skip")

    def path(self, index):
        return self.packed.path if self.packed else self.folder / self.names[index]

    def read(self, index):
        """One slice as it is on disk, float32 (H, W)."""
        if self.packed:
            return next(self.packed.read([index]))
        path = self.path(index)
        slice, stored = read_stored(path, self.hu_offset)
        if stored != self.stored:
            kinds = {"hu": "16-bit or HU", "uint8": "8-bit"}
            raise DataError(
                f"{path}: {kinds[stored]} values, but the set begins with {kinds[self.stored]} ones"
            )
        return slice

    def on_common_size(self, slice):
        """A slice float32 (h, w) as it is on disk -> FloatTensor (H, W) on the common size."""
        return self.to_size(torch.from_numpy(slice), AIR[self.stored])

    def to_size(self, image, fill, nearest=False):
        if tuple(image.shape) != self.size:
            rule = "slices of different sizes: scaled to fit %d x %d px, centred, the rest filled with air"
            self.say_once("size", rule % self.size)
        return fit(image, self.size, fill, nearest)

    def say_once(self, about, text):
        if not self.said[about]:
            self.said[about][0] = True
            log.warning(text)


class SegmentationDataset(SliceDataset):
    """Slices with their masks: FloatTensor (1, H, W) as in SliceDataset, and LongTensor (H, W), 255 = ignore.

    masks        folder below root, with the slice's name and the suffix .png
    num_classes  a mask with a label outside 0 ... num_classes - 1 and 255 is an error; None: not checked
    """

    def __init__(
        self,
        root,
        list="train.txt",
        images="images",
        masks="masks",
        hu_offset=1024,
        num_classes=None,
        size=None,
    ):
        if packed_at(root):
            raise DataError(f"{root}: a packed set holds no masks; give the data set's folder")
        super().__init__(root, list, images, hu_offset, size)
        self.num_classes = num_classes
        self.mask_folder = split_folder(root, list, masks)
        wanted = [without_suffix(name) + ".png" for name in self.names]
        present(wanted, self.mask_folder, f"masks of {list}")
        self.spacings = read_spacing(root)

    def __getitem__(self, index):
        slice, mask = self.read(index), self.own_mask(index)
        if slice.shape != mask.shape:
            raise DataError(
                f"{self.mask_path(index)}: {mask.shape} px (rows, columns), its image {slice.shape}"
            )
        image = self.on_common_size(slice)
        mask = self.to_size(torch.from_numpy(mask), IGNORE, nearest=True)
        return image[None], mask.long()

    def mask_path(self, index):
        return mask_path(self.mask_folder, self.names[index])

    def own_mask(self, index):
        """The mask on its own grid, uint8 (h, w)."""
        mask = read_mask(self.mask_path(index))
        check_labels(mask, self.num_classes, self.mask_path(index))
        return mask

    def to_own_grid(self, prediction, index):
        """A prediction uint8 (H, W) on the common size -> uint8 (h, w) on the mask's own grid (nearest)."""
        own = mask_size(self.mask_path(index))
        height, width, top, left = placement(own, self.size)
        inside = torch.as_tensor(prediction)[top : top + height, left : left + width]
        on_own = F.interpolate(inside[None, None].float(), own, mode="nearest-exact")[0, 0]
        return on_own.to(torch.uint8).numpy()

    def spacing(self, case):
        """(slice, row, column) distances in mm, or None if the set does not say."""
        return self.spacings.get(case)


def check_labels(mask, num_classes, path):
    """DataError if a mask (uint8) has a label that is neither below num_classes nor 255."""
    if num_classes is None:
        return
    wrong = mask[(mask >= num_classes) & (mask != IGNORE)]
    if wrong.size:
        raise DataError(
            f"{path}: label {wrong.max()}, but there are {num_classes} classes, 0 to {num_classes - 1}"
        )


def listed_slices(root, list, images, skip_bad):
    """The folder and the names, with suffix, of a list's slices."""
    if not Path(root).is_dir():
        raise DataError(f"{root}: no such data set (neither a folder nor a packed set)")
    folder = split_folder(root, list, images)
    if list is None:
        return folder, Strings(all_slices(folder))
    return folder, present(read_list(Path(root) / list), folder, list, skip_bad)


def present(names, folder, what, skip_bad=False):
    """The names of existing files, with suffix. If any is missing: DataError, with skip_bad a warning."""
    found = find_slices(folder, names)
    missing = [name for name, there in zip(names, found) if there is None]
    if missing:
        first = ", ".join(map(one_line, missing[:3])) + (" ..." if len(missing) > 3 else "")
        message = f"{what}: {len(missing)} of {len(names)} files are missing in {folder}"
        if not skip_bad or len(missing) == len(names):
            raise DataError(f"{message}: {first}")
        log.warning(f"warning: {message} and left out: {first}")
    return Strings(filter(None, found))


# ---- Whole batches -------------------------------------------------------------------------------


class BatchReader(Dataset):
    """Batches of a SliceDataset, for DataLoader(BatchReader(...), sampler=lists of indices, batch_size=None).

    An item is a FloatTensor (n, 1, H, W) and the number of its slices that were unreadable and replaced
    (`skip_bad`). `workers` is the loader's num_workers.
    """

    def __init__(self, dataset, workers):
        self.dataset = dataset
        # Of each worker: its process id, and the slice that it is reading, -1 between batches.
        self.reading = torch.full((workers, 2), -1).share_memory_()

    def __getitem__(self, indices):
        worker = get_worker_info()
        batch = empty((len(indices), 1, *self.dataset.size), shared=worker is not None)
        note = self.reading[worker.id].numpy() if worker else [0, 0]
        note[0] = os.getpid()

        def read(index):
            note[1] = index
            return index, self.dataset.read(index)

        if self.dataset.packed:
            note[1] = indices[0]
            slices = zip(indices, self.dataset.packed.read(indices))
        else:
            slices = (self.dataset.read_or_next(read, index) for index in indices)
        replaced = 0
        for row, index, (found, slice) in zip(batch, indices, slices):
            row[0] = self.dataset.on_common_size(slice)
            replaced += found != index
        note[1] = -1
        return batch, replaced

    def being_read(self, pid):
        """The file that the worker process `pid` is reading, or was when it died; None if it was not."""
        for worker, index in self.reading.tolist():
            if worker == pid and index >= 0:
                return str(self.dataset.path(index))
        return None


def empty(shape, shared):
    """An uninitialised FloatTensor, `shared`: in the memory through which a worker hands it over.

    Batches moved there only afterwards would fragment the worker's heap.
    """
    if not shared:
        return torch.empty(shape)
    storage = torch.UntypedStorage._new_shared(4 * math.prod(shape))  # as in PyTorch's default_collate
    return torch.empty(0).set_(storage, 0, shape)


if __name__ == "__main__":
    import sys

    from prepare.commands import main

    sys.exit(main())
