"""What a trained model finds in slices and volumes, on the way on which its test cases were scored.

predict     --predict INPUT --out DIR: the files, one after the other
Predictor   what all models have in common there; segmenter.py and detector.py say what they find
"""

from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ct.cases import File, refuse_namesakes, volumes_below
from ct.channels import first_channels
from ct.grid import Grid
from ct.layout import case_of, stacks_in
from ct.listing import VOLUMES, listed, slices_below, stem_of, without_masks
from ct.plausible import Doubt, Values, heed, judge_values, judge_window
from ct.properties import AXES, KINDS, Facts, Properties, Reading, read_properties, reading_of
from ct.slices import AIR, SUFFIXES, DataError, whole_hu
from ct.volumes import Volume, read_volume
from data import LOOKED_AT, RECENT, Intensity, network_input
from engine.config import Config
from engine.files import make_folder
from engine.ownership import all_refuse, refuse_foreign
from engine.process import Process, progress, warn
from evaluation.trained import Description

TAKES_HU = "the model takes HU"


def predict(kind: type["Predictor"], cfg: Config, process: Process, source: Path, out: Path) -> None:
    """What the model in run.out finds in a slice, a volume, or all slices and volumes below a folder.

    The files written have the relative names of the slices (given a data set's root, those of its images
    folder), and of volumes those of their cases, as `data.py slice` calls them.
    What cannot be read is named and passed over.
    Raises ConfigError without a trained model, DataError for an input that cannot be used.
    """
    model, about = kind.load(Path(cfg.run.out) / "model.pth", process)
    inputs = Inputs.of(source, out, cfg)
    if inputs.left_out:
        process.say(f"{out}: lies below {source}; {inputs.left_out} files there are not taken as input")
    if inputs.images is not None and source.is_dir() and inputs.base != source:
        process.say(f"note: {source}: a data set; what lies in its {inputs.base.name} is taken")
    for text in inputs.not_taken:
        process.say(f"note: {source}: left out: {text}")
    if inputs.masks:
        found = f"{len(inputs.masks)} files are masks by their names, the first {inputs.masks[0]}"
        process.say(f"note: {source}: {found}: not taken; --predict FILE insists")
    targets = inputs.targets(out, kind.name_of)
    all_refuse(process, refuse_foreign, targets.values(), targets, kind.command)
    predictor = kind(model, about, inputs.reading(about.facts, cfg), cfg, process)
    predictor.judge(inputs)
    make_folder(out, process, "--out")
    failed, volumes, stacks = [], {*inputs.volumes}, inputs.stacks(about.facts.neighbours)
    for path in progress(process, "predicting", [*targets][process.rank :: process.world]):
        targets[path].parent.mkdir(parents=True, exist_ok=True)
        try:
            if path in volumes:
                predictor.volume(path, targets[path])
            else:
                predictor.slice(path, stacks[path], targets[path], inputs.mm_of(path))
        except DataError as error:
            if len(targets) == 1:
                raise
            warn(f"{error}; passed over")
            failed.append(path)
    if failed := sum(process.gather(failed), []):
        raise DataError(
            f"{source}: no {kind.what} for {len(failed)} of {len(targets)} files, the first: {failed[0]}"
        )
    process.say(f"{out}: {kind.what} of {len(inputs.slices)} slices and {len(inputs.volumes)} volumes")


@dataclass
class Inputs:
    """What is to be predicted: files, the folder that their targets' names are relative to, and of the data
    set around them, if there is one, its properties and its images folder."""

    slices: list[Path]
    volumes: dict[Path, str]  # with their cases
    base: Path
    properties: Properties
    images: Path | None
    left_out: int  # files that are earlier predictions
    masks: list[Path]  # that lie beside
    not_taken: list[str] = field(default_factory=list)  # further volumes, in words

    @classmethod
    def of(cls, source: Path, out: Path, cfg: Config) -> "Inputs":
        """All slices and volumes of `source` but those below `out`, which are earlier predictions."""
        name = cfg.data.images.partition("{split}")[0].strip("/")
        name = name if name and (source / name).is_dir() else "images"
        inside = (source / name).is_dir() and is_set(source, cfg.data.masks)
        where = source / name if inside else source
        every_slice, found = slices_below(where), volumes_below(where, cfg.data.masks)
        if not every_slice and not found.images + found.masks:
            kinds = f"neither slices ({', '.join(SUFFIXES)}) nor volumes ({', '.join(VOLUMES)}, DICOM series)"
            more = f" (left out: {'; '.join(found.left_out)})" if found.left_out else ""
            raise DataError(f"{source}: {kinds}; give such a file or a folder of them{more}")
        files, masks = ({file.path: file for file in own} for own in (found.images, found.masks))
        slices, volumes, masks = (outside(out, where, [*own]) for own in (every_slice, files, masks))
        left_out = len(every_slice) + len(found.images + found.masks) - len(slices + volumes + masks)
        if not slices + volumes + masks:
            raise DataError(f"{source}: all slices and volumes there lie below --out {out}; choose another")
        if where.is_dir():
            images = without_masks(slices, where, cfg.data.masks)
            masks, slices = sorted({*slices} - {*images}) + masks, images
        if not slices + volumes:
            raise DataError(f"{source}: only masks there, by their names, such as {masks[0]}; give images")
        files, channels = cases_of([files[path] for path in volumes], where)
        not_taken = found.left_out + ([listed("further channels", channels)] if channels else [])
        volumes = {file.path: file.name for file in files}
        base, here = where if where.is_dir() else where.parent, where.absolute()
        roots = (folder for folder in here.parents if here.is_relative_to(folder / name))
        root = next((folder for folder in roots if (folder / "set.json").is_file()), None)
        own, images = Properties(), where if inside else None
        if root is not None:
            own, images = read_properties(root), root / name
        return cls(slices, volumes, base, own, images, left_out, masks, not_taken)

    def reading(self, facts: Facts, cfg: Config) -> Reading:
        """How its slices are read: as their own set says, else as those that the model was trained on."""
        own = self.properties
        if own.kind is None and own.hu_offset is None:
            own = replace(own, kind=facts.kind if facts.kind == "stored" else None, hu_offset=facts.hu_offset)
        elif facts.kind == "stored" and cfg.data.hu_offset is None:
            return reading_of(own, 0)
        return reading_of(own, cfg.data.hu_offset)

    def targets(self, out: Path, name_of) -> dict[Path, Path]:
        """{input: file to be written}, of the same name relative to `base` but for its ending; of a volume
        called after its case.

        name_of: (path, whether it is a volume) -> path.
        """
        targets = {path: out / name_of(path.relative_to(self.base), False) for path in self.slices}
        for path, case in self.volumes.items():
            ending = path.name[len(stem_of(path.name)) :] or ".nii.gz"
            targets[path] = out / name_of(Path(f"{case}{ending}"), True)
        return targets

    def stacks(self, neighbours: int) -> dict[Path, list[Path]]:
        """Of each slice the files that its channels come from."""
        if not neighbours:
            return {path: [path] for path in self.slices}
        folder = self.images if all(map(self.is_inside, self.slices)) else self.base.absolute()
        names = [path.absolute().relative_to(folder).as_posix() for path in self.slices]
        files, rows = stacks_in(folder, names, neighbours)
        return {path: [folder / files[i] for i in row] for path, row in zip(self.slices, rows.tolist())}

    def is_inside(self, path: Path) -> bool:
        """Whether it is a slice of the set around it."""
        return self.images is not None and path.absolute().is_relative_to(self.images)

    def case(self, path: Path) -> str | None:
        """The case of a slice in the set around it; None without one."""
        if not self.is_inside(path):
            return None
        return case_of(path.absolute().relative_to(self.images).as_posix())

    def mm_of(self, path: Path):
        """How many mm rows and columns of a slice are apart, or None."""
        spacing = self.properties.spacing.get(self.case(path))
        return spacing and spacing[1:]


class Predictor(ABC):
    """A trained model and how files are read and judged for it: slices are brought to the grid of the
    training slices, and what is found there is brought back."""

    command: str  # by which its files are known, see engine/ownership.py
    what: str  # it finds, as "masks"

    def __init__(self, model: nn.Module, about: Description, reading: Reading, cfg: Config, process: Process):
        self.model, self.about, self.reading, self.cfg, self.process = model, about, reading, cfg, process
        self.facts, self.intensity = about.facts, Intensity(**about.normalisation)
        self.read_once = lru_cache(RECENT)(reading.slice)  # a slice is a neighbour of those that follow
        self.axis = 2 if about.facts.axis is None else about.facts.axis

    @staticmethod
    @abstractmethod
    def load(path: Path, process: Process) -> tuple[nn.Module, Description]:
        """Raises ConfigError if there is no such file, WeightsError if it is damaged."""

    @staticmethod
    @abstractmethod
    def name_of(path: Path, is_volume: bool) -> Path:
        """The name of an input's result."""

    @abstractmethod
    def find(self, images: Tensor, grid: Grid, own: tuple, mm: tuple | None) -> list:
        """What is found in each of the slices (n, C, H, W), on its own grid of `own` px, rows and columns
        `mm` apart."""

    @abstractmethod
    def write(self, target: Path, found: list, volume: Volume | None) -> None:
        """Write what was found in the slices of a volume, or in one slice."""

    def judge(self, inputs: Inputs) -> None:
        """Say what is odd about the inputs as a whole."""
        if inputs.volumes and self.facts.axis is None:
            self.process.say("note: the model does not say across which axis slices lie: axial")
        own = inputs.properties.axis
        if own not in (None, self.axis):
            text = f"{AXES[own]} slices, the model was trained on {AXES[self.axis]} ones"
            self.process.warn(f"{inputs.images}: {text}")
        self.heed(self.judge_spacing(inputs), self.process.warn)
        values = Values()
        for path in inputs.slices[:: -(-len(inputs.slices) // LOOKED_AT) or 1]:
            with suppress(DataError):
                slice, kind = self.reading.slice(path)
                if kind == self.facts.kind:
                    values.add(slice)
        if values.total():
            doubts = judge_values(values, inputs.base, TAKES_HU) if self.facts.kind == "hu" else []
            unseen = judge_window(values, self.intensity.window, inputs.base)
            doubts += [replace(doubt, fatal=False) for doubt in unseen]  # a slice of air is nothing wrong
            self.heed(doubts, self.process.warn)

    def judge_spacing(self, inputs: Inputs) -> list[Doubt]:
        """Whether the pixels of the slices' cases, where their set knows the spacing, are as in training."""
        first = {}
        for path in inputs.slices if self.facts.size else ():
            if mm := inputs.mm_of(path):
                first.setdefault(inputs.case(path), (path, mm))
        sizes = {}
        for case, (path, mm) in first.items():
            with suppress(DataError):
                sizes[case] = self.reading.header(path)[0], mm
        return Grid(self.facts.size, self.facts.pixel_mm).judge_cases(sizes)

    def heed(self, doubts: list[Doubt], say=warn) -> None:
        heed(doubts, self.cfg.data.insist, "data.insist=true", say)

    def slice(self, path: Path, stack: list[Path], target: Path, mm: tuple | None) -> None:
        """stack: the files of its channels, of which it is the middle one."""
        channels = []
        for one in stack:
            values, kind = self.read_once(one)
            if kind != self.facts.kind:
                raise DataError(
                    f"{one}: {KINDS[kind]}, but the model was trained on {KINDS[self.facts.kind]}"
                )
            channels.append(torch.from_numpy(values))
        if len({values.shape for values in channels}) > 1:
            raise DataError(f"{path}: its neighbours are of another size")
        self.write(target, self.found(torch.stack(channels), [[*range(len(stack))]], mm), None)

    def volume(self, path: Path, target: Path) -> None:
        volume = read_volume(path, self.axis)
        values, mm = whole_hu(volume.array), volume.spacing[1:]
        some = slice(None, None, -(-len(values) // LOOKED_AT))
        doubts = [*volume.geometry.doubts, *judge_values(Values().add(volume.array[some]), path, TAKES_HU)]
        if self.facts.kind == "stored" and self.facts.hu_offset is not None:
            values += np.float32(self.facts.hu_offset)
        elif self.facts.kind != "hu":
            raise DataError(f"{path}: HU, but the model was trained on {KINDS[self.facts.kind]}")
        doubts += judge_window(Values().add(values[some]), self.intensity.window, path)
        self.heed(doubts + self.grid(values.shape[1:]).judge(values.shape[1:], mm, path))
        reach = self.facts.neighbours
        around = np.arange(len(values))[:, None] + np.arange(-reach, reach + 1)
        stacks = around.clip(0, len(values) - 1).tolist()
        self.write(target, self.found(torch.from_numpy(values), stacks, mm), volume)

    def grid(self, own: tuple) -> Grid:
        """That of the training slices; for a model that does not know it, the slices' own."""
        return Grid(self.facts.size or tuple(own), self.facts.pixel_mm)

    @torch.no_grad()
    def found(self, stored: Tensor, stacks: list[list[int]], mm: tuple | None) -> list:
        """What is found in each of the stacks, rows of `stored` (S, H, W), which are slices in stored values,
        rows and columns `mm` apart."""
        own, found = tuple(stored.shape[1:]), []
        grid = self.grid(own)
        for some in torch.tensor(stacks).split(self.cfg.optim.batch_size):
            on_grid = grid.bring(stored[some], AIR[self.facts.kind], mm).to(self.process.device)
            unit = self.intensity.to_unit(on_grid)
            with self.process.autocast():
                images = network_input(unit, self.intensity, self.about.in_channels)
                found += self.find(images, grid, own, mm)
        return found


def cases_of(files: list[File], source: Path) -> tuple[list[File], list[str]]:
    """The files of which each is a case, and the names of those that are further channels of one."""
    try:
        files, _, left_out = first_channels(files, [], source, None)
    except DataError:  # `data.py slice` asks whether _0000, _0001 ... are channels; here each is predicted
        left_out = []
    refuse_namesakes(files)
    return files, left_out


def is_set(folder: Path, masks: str) -> bool:
    """Whether a folder with images is a data set's root: with set.json, masks or lists beside them."""
    beside = folder / (masks.partition("{split}")[0].strip("/") or "masks")
    return (folder / "set.json").is_file() or beside.is_dir() or any(folder.glob("*.txt"))


def outside(out: Path, source: Path, paths: list[Path]) -> list[Path]:
    """The paths without those below --out, where it lies inside of what is predicted."""
    folder = out.resolve()
    if source.resolve() not in folder.parents:
        return paths
    return [path for path in paths if not path.parent.resolve().is_relative_to(folder)]
