"""Slices as training reads them: intensities, datasets, and whole batches for a DataLoader.

    SliceDataset, SegmentationDataset   the slices of a list, with or without masks, at one size
    Intensity, network_input            from stored values to what a network sees
    BatchReader                         whole batches, for a DataLoader

Files on disk are read by ct/. Run as a script it makes, packs, checks and shows data sets (prepare/):

    python data.py phantom --out data/phantom --cases 40 --slices 24 --size 128 --seed 0
    python data.py slice --images ct.nii.gz|DIR --labels seg.nii.gz|DIR --out data/ct --label-map MAP.json
    python data.py medmnist organamnist_64.npz --out data/organ
    python data.py transunet Synapse --out data/synapse
    python data.py openkbp --source open-kbp --out data/openkbp
    python data.py list --root data/ct
    python data.py thin --root data/ct --list unlabelled.txt --keep 0.25
    python data.py pack --root data/ct --list train.txt --out data/ct-train
    python data.py check --root data/ct
    python data.py show --root data/ct --list train.txt --out page.png --views
"""

import logging
import math
import os
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from augment import SegmentationAugment, TwoViews  # noqa: F401 (can be imported from here, too)
from ct.grid import Grid
from ct.layout import (
    Cases,
    Strings,
    all_slices,
    find_masks,
    find_slices,
    packed_at,
    patient_of,
    read_list,
    split_folder,
    stacks_in,
)
from ct.plausible import AS_STORED, Doubt, Values, judge_spacings, judge_values, judge_window
from ct.properties import (
    HU_OFFSET,
    KINDS,
    Facts,
    assumed,
    parse_facts,
    read_json,
    read_properties,
    reading_of,
)
from ct.slices import AIR, IGNORE, DataError, read_mask
from engine.config import one_line

LOOKED_AT = 32  # slices of a list, for its size and kind, and for what is odd about it
RECENT = 8  # slices that are kept for others of a batch whose neighbours they are
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


def default_window(kind):
    """The window meant by `auto`: soft tissue for HU, everything for 8-bit slices. Raises DataError for
    values as stored, of which nobody knows what they mean."""
    if kind == "stored":
        raise DataError(
            "data.window: auto knows none for values as stored; give [low, high], or null for all"
        )
    return (-160.0, 240.0) if kind == "hu" else (0.0, 255.0)


def network_input(unit: Tensor, intensity: Intensity, in_channels: int) -> Tensor:
    """Windowed images (N, 1 or in_channels, H, W) -> what the network sees, (N, in_channels, H, W)
    channels_last."""
    images = intensity.normalise(unit).expand(-1, in_channels, -1, -1)
    return images.contiguous(memory_format=torch.channels_last)


def middle(channels):
    """Slices (..., C, H, W), which may lie between their neighbours -> they alone, (..., 1, H, W)."""
    return channels.narrow(-3, channels.shape[-3] // 2, 1)


# ---- What travels with an encoder ----------------------------------------------------------------


def encoder_card(path):
    """What encoder.json beside our encoder.pth says: {"arch", "window", "mean", "std", "facts": Facts,
    "sha256"}; {} without one, and for path None. Raises DataError for a damaged one."""
    beside = path and Path(path).with_suffix(".json")
    if beside is None or not beside.is_file():
        return {}
    try:
        card = read_json(beside, dict)
        window, mean, std = (card["normalisation"][name] for name in ("window", "mean", "std"))
        Intensity(window, mean + 0.0, std + 0.0)
        facts = parse_facts(card.get("data") or {}, beside)
        found = {"arch": str(card["arch"]), "window": window, "mean": mean, "std": std, "facts": facts}
        return found | {"sha256": card.get("sha256")}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{beside}: does not describe an encoder; restore it or remove it") from None


# ---- Datasets ------------------------------------------------------------------------------------


class SliceDataset(Dataset):
    """The slices of a list, as FloatTensor (1, H, W) in HU (or what the set holds, see `kind`).

    root      the data set's folder, or a packed set (NAME, NAME.npy or NAME.json; it is its own list then)
    list      list file below root; None: every slice in the images folder
    images    folder below root; "{split}" in it stands for the list's name without .txt
    hu_offset     HU = value of a 16-bit picture - this; None: the set's own, else 1024; 0: as stored
    size      (H, W) of all slices; None: that in set.json, else the most frequent one of LOOKED_AT slices.
              Slices of another size are scaled to fit, see `Grid`.
    neighbours    1: the slices below and above are further channels, (3, H, W), whether the list has them or
              not; at the ends of a case, the last slice twice
    skip_bad  leave out listed files that are missing, and give the next readable slice of the list for an
              unreadable one, both with a warning; without it they are a DataError
    names, cases, patients    one per slice;  files, stack: with neighbours, see ct.layout.stacks_in
    kind      of the values, "hu", "uint8" (8-bit pictures) or "stored"
    properties, grid    what set.json says, and what slices are brought to
    """

    def __init__(
        self,
        root,
        list="train.txt",
        images="images",
        hu_offset=None,
        size=None,
        skip_bad=False,
        neighbours=0,
    ):
        self.root, self.skip_bad, self.neighbours = root, skip_bad, neighbours
        # Shared, so that all workers together say each of these once.
        self.said = {about: torch.zeros(1, dtype=torch.bool).share_memory_() for about in ("size", "bad")}
        self.packed = packed_at(root)
        if self.packed:
            self.names, self.cases = self.packed.names, self.packed.cases
            self.files, self.stack = self.names, self.packed.stacks(neighbours) if neighbours else None
            self.properties = self.packed.properties
            self.kind, sizes = self.properties.kind, [self.packed.shape[1:]]
        else:
            self.folder, names = listed_slices(root, list, images, skip_bad)
            self.take(names)
            self.properties = read_properties(root)
            self.reading = reading_of(self.properties, hu_offset)
            sizes, kinds = zip(*self.look(self.header))
            self.kind = most_frequent(kinds)
        said = self.properties.kind
        if said and (said == "uint8") != (self.kind == "uint8"):
            raise DataError(f"{root}: holds {KINDS[self.kind]}, but its set.json says {KINDS[said]}")
        self.grid = Grid(tuple(size or self.properties.size or most_frequent(sizes)))

    def take(self, names):
        self.names, self.cases, self.files, self.stack = names, Cases(names), names, None
        if self.neighbours:
            self.files, self.stack = stacks_in(self.folder, names, self.neighbours)

    def look(self, read):
        """read(index) of LOOKED_AT slices, evenly spaced, in which is noticed early what is odd about a set;
        without those that cannot be read, unless that is all of them."""
        count, found, reason = min(LOOKED_AT, len(self)), [], DataError(f"{self.path(0)}: not a file")
        for index in (len(self) * i // count for i in range(count)):
            try:
                if self.path(index).is_file():  # a named pipe would wait
                    found.append(read(index))
            except DataError as error:
                reason = error
        if not found:
            raise reason
        return found

    def header(self, index):
        """The (height, width) in px of a slice, and the kind of its values."""
        if self.packed:
            return self.packed.shape[1:], self.kind
        return self.reading.header(self.path(index))

    @property
    def size(self):
        return self.grid.size

    @property
    def whose(self):
        """What splits are by, in words."""
        return "patients" if self.properties.patients else "cases"

    @property
    def patients(self):
        """One per slice: the patient as the set says, else the case."""
        known = self.properties.patients
        return [patient_of(name, case, known) for name, case in zip(self.names, self.cases)]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return self.item(index, self.reading_once())

    def __getitems__(self, indices):
        """A batch for a DataLoader."""
        read = self.reading_once()
        return [self.item(index, read) for index in indices]

    def item(self, index, read):
        return torch.stack(self.read_or_next(partial(self.channels, read=read), index))

    def channels(self, index, read, mm=None):
        """A slice, with neighbours between them, on the common grid: [FloatTensor (H, W)]."""
        files = [index] if self.stack is None else self.stack[index].tolist()
        return [self.on_common_size(read(file), mm) for file in files]

    def reading_once(self):
        """`read` for a batch: what is a neighbour of several slices there is read once."""
        return self.read if self.stack is None else lru_cache(RECENT)(self.read)

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
        return self.packed.path if self.packed else self.folder / self.files[index]

    def read(self, index):
        """One slice, or one of `files`, as it is on disk, float32 (H, W)."""
        if self.packed:
            return next(self.packed.read([index]))
        path = self.path(index)
        slice, kind = self.reading.slice(path)
        if kind != self.kind:
            raise DataError(f"{path}: {KINDS[kind]}, but the set has {KINDS[self.kind]}")
        return slice

    def on_common_size(self, slice, mm=None):
        """A slice float32 (h, w) as it is on disk -> FloatTensor (H, W) on the common grid."""
        return self.to_grid(torch.from_numpy(slice), AIR[self.kind], mm)

    def to_grid(self, image, fill, mm=None, nearest=False):
        if tuple(image.shape) != self.size:
            rule = "slices of different sizes: scaled to fit %d x %d px, centred, the rest filled with air"
            self.say_once("size", rule % self.size)
        return self.grid.bring(image, fill, mm, nearest)

    def say_once(self, about, text):
        if not self.said[about]:
            self.said[about][0] = True
            log.warning(text)

    def assumed(self):
        """What is taken for granted where set.json says nothing, as a line; "" if it says all."""
        return assumed(self.properties, self.kind, self.size, self.root)

    def first_of_cases(self):
        """{case: the index of its first slice}, in the order of the list."""
        first = {}
        for index, case in enumerate(self.cases):
            first.setdefault(case, index)
        return first

    def spacing_on_grid(self):
        """{case: (slice, row, column) distances in mm on the grid} of the cases of which they are known."""
        known = self.properties.spacing
        first = self.first_of_cases() if known else {}
        return {
            case: (known[case][0], *self.grid.spacing_on(self.header(index)[0], known[case][1:]))
            for case, index in first.items()
            if case in known
        }

    @cached_property
    def pixel_mm(self):
        """How many mm apart rows and columns are on the grid, ((least, most), (least, most)) over the cases;
        None if set.json does not say."""
        apart = [mm[1:] for mm in self.spacing_on_grid().values()]
        return tuple((min(mm), max(mm)) for mm in zip(*apart)) or None

    def facts(self):
        """What travels with an encoder or a model that is trained on these slices."""
        offset = self.properties.hu_offset
        if offset is None and self.kind == "hu":
            offset = HU_OFFSET if self.packed else self.reading.hu_offset
        own = self.properties
        return Facts(self.kind, offset, own.axis, self.size, self.pixel_mm, own.source, self.neighbours)


class SegmentationDataset(SliceDataset):
    """Slices as in SliceDataset with their masks, LongTensor (H, W), 255 = ignore.

    masks        folder below root, with pictures of the slices' names
    num_classes  a mask with a label outside 0 ... num_classes - 1 and 255 is an error; None: not checked
    like         the training set, to whose grid these slices are brought; None: this is the training set
    mask_map     see ct.slices.read_mask
    """

    def __init__(
        self,
        root,
        list="train.txt",
        images="images",
        masks="masks",
        hu_offset=None,
        num_classes=None,
        size=None,
        like=None,
        mask_map=None,
        neighbours=0,
    ):
        if packed_at(root):
            raise DataError(f"{root}: a packed set holds no masks; give the data set's folder")
        super().__init__(root, list, images, hu_offset, size, neighbours=neighbours)
        once = dict.fromkeys(self.names)
        if repeated := len(self.names) - len(once):  # a slice that counts twice would change its case's Dice
            log.warning(f"warning: {list}: {repeated} slices are listed again, and count once")
            self.take(Strings(once))
        self.num_classes, self.mask_map = num_classes, mask_map
        self.mask_folder = split_folder(root, list, masks)
        found = find_masks(self.mask_folder, self.names)
        self.mask_names = present(self.names, found, self.mask_folder, f"masks of {list}")
        self.grid = like.grid if like else replace(self.grid, pixel_mm=self.pixel_mm)

    def reading_once(self):
        return lru_cache(RECENT)(self.read)  # also of a slice whose size is looked at first

    def item(self, index, read):
        slice, mask = read(index), self.own_mask(index)
        self.check_mask(index, mask, slice.shape)
        return self.image(index, read), self.on_grid(mask, index).long()

    def image(self, index, read):
        """A slice without its mask, FloatTensor (C, H, W)."""
        return torch.stack(self.channels(index, read, self.mm_of(index)))

    def on_grid(self, mask, index):
        """A mask uint8 (h, w) on its own grid -> (H, W) on the common one."""
        return self.to_grid(torch.from_numpy(mask), IGNORE, self.mm_of(index), nearest=True)

    def check_mask(self, index, mask, size):
        """DataError if the mask of a slice of this size is of another one."""
        if mask.shape != size:
            raise DataError(f"{self.mask_path(index)}: {mask.shape} px (rows, columns), its image {size}")

    def mask_path(self, index):
        return self.mask_folder / self.mask_names[index]

    def own_mask(self, index):
        """The mask on its own grid, uint8 (h, w)."""
        mask = read_mask(self.mask_path(index), self.mask_map)
        check_labels(mask, self.num_classes, self.mask_path(index))
        return mask

    def to_own_grid(self, prediction, index, size):
        """A prediction uint8 (H, W) on the common grid -> uint8 (h, w), the size of its slice (nearest)."""
        return self.grid.back(torch.as_tensor(prediction), size, self.mm_of(index)).numpy()

    def spacing(self, case):
        """(slice, row, column) distances in mm, or None if the set does not say."""
        return self.properties.spacing.get(case)

    def mm_of(self, index):
        """How many mm rows and columns of a slice are apart, or None."""
        spacing = self.spacing(self.cases[index])
        return spacing and spacing[1:]


def most_frequent(values):
    """The most frequent of some values; the first of two that are equally so."""
    return Counter(values).most_common(1)[0][0]


def check_labels(mask, num_classes, path):
    """DataError if a mask (uint8) has a label that is neither below num_classes nor 255."""
    if num_classes is None:
        return
    wrong = mask[(mask >= num_classes) & (mask != IGNORE)]
    if wrong.size:
        raise DataError(
            f"{path}: label {wrong.max()}, but there are {num_classes} classes, 0 to {num_classes - 1}; "
            "data.classes names more, data.mask_map gives a pixel value another class"
        )


def listed_slices(root, list, images, skip_bad):
    """The folder and the names, with suffix, of a list's slices."""
    if not Path(root).is_dir():
        raise DataError(f"{root}: no such data set (neither a folder nor a packed set)")
    folder = split_folder(root, list, images)
    if list is None:
        return folder, Strings(all_slices(folder))
    names = read_list(Path(root) / list, folder)
    return folder, present(names, find_slices(folder, names), folder, list, skip_bad)


def present(names, found, folder, what, skip_bad=False):
    """The names as they were found. If any is missing (None): DataError, with skip_bad a warning."""
    missing = [name for name, there in zip(names, found) if there is None]
    if missing:
        first = ", ".join(map(one_line, missing[:3])) + (" ..." if len(missing) > 3 else "")
        message = f"{what}: {len(missing)} of {len(names)} files are missing in {folder}"
        if not skip_bad or len(missing) == len(names):
            raise DataError(f"{message}: {first}")
        log.warning(f"warning: {message} and left out: {first}")
    return Strings(filter(None, found))


# ---- What is odd about them ----------------------------------------------------------------------


def judge(dataset, given_window, intensity):
    """What is doubtful about the values of a set, from some of its slices: [Doubt] of ct/plausible.py.

    given_window: data.window of the settings. One of one's own insists that values are what they are.
    """
    values = Values()
    for slice in dataset.look(dataset.read):
        values.add(slice)
    doubts = []
    if dataset.kind == "hu" and given_window == "auto":
        mend = "if they are HU + {offset}, add that to data.hu_offset; data.window=[low,high] insists"
        doubts = judge_values(values, dataset.root, mend, AS_STORED)
    if values.lowest == values.highest:
        doubts = [Doubt(f"{dataset.root}: all values are {values.lowest:g}: nothing to learn", fatal=True)]
    doubts += judge_spacings(dataset.spacing_on_grid(), dataset.root)
    return doubts + judge_window(values, intensity.window, dataset.root)


# ---- Whole batches -------------------------------------------------------------------------------


class BatchReader(Dataset):
    """Batches of a SliceDataset, for DataLoader(BatchReader(...), sampler=lists of indices, batch_size=None).

    An item is a FloatTensor (n, C, H, W) and the number of its slices that were unreadable and replaced
    (`skip_bad`). `workers` is the loader's num_workers.
    """

    def __init__(self, dataset, workers):
        self.dataset = dataset
        # Of each worker: its process id, and the slice that it is reading, -1 between batches.
        self.reading = torch.full((workers, 2), -1).share_memory_()

    def __getitem__(self, indices):
        worker = get_worker_info()
        batch = empty(self.shape(len(indices)), shared=worker is not None)
        note = self.reading[worker.id].numpy() if worker else [0, 0]
        note[0] = os.getpid()

        read_once = self.dataset.reading_once()

        def read(file):
            note[1] = file
            return read_once(file)

        replaced = 0
        for row, index in zip(batch, indices):
            found, images = self.dataset.read_or_next(lambda at: (at, self.dataset.channels(at, read)), index)
            for channel, image in zip(row, images):
                channel[:] = image
            replaced += found != index
        note[1] = -1
        return batch, replaced

    def shape(self, slices):
        return slices, 1 + 2 * self.dataset.neighbours, *self.dataset.size

    def batch_bytes(self, slices):
        return 4 * math.prod(self.shape(slices))

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
