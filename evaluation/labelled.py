"""The slices that a classification is of: of each list those with a label, and their cases."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from ct.layout import all_slices, case_of, without_suffix
from ct.plausible import Doubt, heed, judge_lists
from ct.properties import KINDS, class_names
from ct.slices import DataError, mask_mapping
from data import Intensity, SegmentationDataset, SliceDataset, encoder_card, judge
from engine.config import Config, ConfigError, one_line
from engine.process import Process
from evaluation import encoder_file
from evaluation.judgement import judge_encoder
from evaluation.labels import Labels, presence, read_table
from evaluation.probes import Task, folds_of, trainings
from evaluation.scores import main_value, one_hot, told_apart
from evaluation.supervised import training_positions


class LabelledPart(Dataset):
    """Slices (C, H, W) of a list with their targets: class numbers, or (K,) of 0 and 1."""

    def __init__(self, dataset: SliceDataset, positions: list[int], targets: np.ndarray):
        self.dataset, self.positions, self.targets = dataset, positions, targets
        self.names = [dataset.names[i] for i in positions]
        self.cases = [dataset.cases[i] for i in positions]
        everybody = dataset.patients
        self.patients = [everybody[i] for i in positions]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]):
        read = self.reading_once()
        return [(self.image(index, read), torch.as_tensor(self.targets[index])) for index in indices]

    def reading_once(self):
        return self.dataset.reading_once()

    def image(self, index: int, read):
        return torch.stack(self.dataset.channels(self.positions[index], read))


@dataclass
class LabelledSlices:
    """parts: "train", "val" (if there is one) and "test"; with folds "train" alone, which is all slices."""

    parts: dict[str, LabelledPart]
    kind: str  # "multi" or "single"
    classes: list[str]
    has_cases: bool
    warnings: list[str] = field(default_factory=list)

    @property
    def train(self) -> LabelledPart:
        return self.parts["train"]

    def task(self, seed: int) -> Task:
        """All parts one after the other, as Task has them."""
        targets = np.concatenate([part.targets for part in self.parts.values()])
        parts = self.parts.values()
        groups = np.array(
            [name for part in parts for name in (part.patients if self.has_cases else part.names)]
        )
        rows, start = {}, 0
        for split, part in self.parts.items():
            rows[split] = np.arange(start, start + len(part))
            start += len(part)
        test = rows.get("test", rows["train"])
        return Task(self.kind, self.classes, targets, groups, rows["train"], rows.get("val"), test, seed)

    def tasks(self, cfg: Config) -> list[Task]:
        """One by the lists, or with labels.folds one for each fold."""
        task = self.task(cfg.seed)
        if not cfg.labels.folds:
            return [task]
        folds = folds_of(task, task.train, cfg.labels.folds)
        return [replace(task, train=rows, test=held) for rows, held in folds]

    def counts(self) -> dict[str, dict[str, int]]:
        return {
            split: {"slices": len(part), "cases": len(set(part.cases)) if self.has_cases else None}
            for split, part in self.parts.items()
        }


def labelled_slices(cfg: Config, process: Process) -> LabelledSlices:
    """The slices of the lists, or with labels.folds all that there are, with their labels.

    Raises DataError or ConfigError where nothing can be learnt from them.
    """
    data, lists = cfg.data, {"train": cfg.data.train, "val": cfg.data.val, "test": cfg.data.test}
    lists = {"train": None} if cfg.labels.folds else {split: file for split, file in lists.items() if file}
    sets, neighbours = {}, encoder_file.neighbours(cfg)
    for split, file in lists.items():
        like = sets.get("train")
        if cfg.labels.table:
            size = like and like.size
            how = {"size": size, "neighbours": neighbours}
            sets[split] = SliceDataset(data.root, file, data.images, data.hu_offset, **how)
        else:
            names = class_names(data.root, data.classes)
            how = {"like": like, "mask_map": mask_mapping(data.mask_map), "num_classes": len(names)}
            how["neighbours"] = neighbours
            sets[split] = SegmentationDataset(data.root, file, data.images, data.masks, data.hu_offset, **how)
        if (kind := sets[split].kind) != sets["train"].kind:
            raise DataError(f"{file}: {KINDS[kind]}, but {KINDS[sets['train'].kind]} in {data.train}")
    labels = process.from_main(lambda: labels_of(cfg, sets))
    if isinstance(labels, Exception):
        raise labels
    parts = parts_of(cfg, sets, labels, process)
    has_cases = any(len(set(part.cases)) > 1 for part in parts.values())
    if not has_cases:
        text = "no list has more than one case: each slice counts as one; if neighbours of a patient are"
        process.say(f"note: {data.root}: {text} among them, figures are too good and intervals too narrow")
    found = LabelledSlices(parts, labels.kind, labels.classes, has_cases)
    found.warnings = heed_slices(cfg, sets, found, process)
    return found


def labels_of(cfg: Config, sets: dict) -> Labels | Exception:
    """The labels of all lists' slices, one list after the other; an error is returned, for all processes."""
    try:
        if cfg.labels.table is None:
            names = class_names(cfg.data.root, cfg.data.classes)
            each = [presence(dataset, names, cfg.labels.min_pixels) for dataset in sets.values()]
            targets = np.concatenate([one.targets for one in each])
            found = Labels("multi", each[0].classes, targets, np.ones(len(targets), bool))
            return chosen_classes(found, cfg.labels.columns)
        path = Path(cfg.labels.table)
        if not path.is_absolute() and (Path(cfg.data.root) / path).is_file():
            path = Path(cfg.data.root) / path
        names = [name for dataset in sets.values() for name in dataset.names]
        return read_table(path, names, existing(cfg, sets, names), cfg.labels.columns)
    except (DataError, ConfigError, OSError) as error:
        return error


def existing(cfg: Config, sets: dict, names: list[str]) -> set[str]:
    """All slices, without suffix, and all cases that a table may speak of: those in the images folder, or in
    a packed set, whether a list has them or not."""
    if not sets["train"].packed:
        folders = {dataset.folder for dataset in sets.values()}
        names = [*names, *(name for folder in folders for name in all_slices(folder))]
    return {*map(without_suffix, names), *map(case_of, names)}


def chosen_classes(labels: Labels, columns: list[str] | None) -> Labels:
    """The organs that are to be judged; all without `columns`."""
    if unknown := [name for name in columns or [] if name not in labels.classes]:
        raise ConfigError(
            f"labels.columns: no organ {one_line(unknown[0])}; there are {', '.join(labels.classes)}"
        )
    chosen = [labels.classes.index(name) for name in columns or labels.classes]
    return Labels("multi", [labels.classes[k] for k in chosen], labels.targets[:, chosen], labels.known)


def parts_of(cfg: Config, sets: dict, labels: Labels, process: Process) -> dict[str, LabelledPart]:
    parts, start, unknown = {}, 0, 0
    for split, dataset in sets.items():
        positions = [i for i in range(len(dataset)) if labels.known[start + i]]
        if split == "train" and cfg.label_fraction < 1:
            taken = {*training_positions(dataset, cfg.label_fraction, cfg.seed)}
            positions = [i for i in positions if i in taken]
        unknown += int((~labels.known[start : start + len(dataset)]).sum())
        if not positions:
            few = (
                f", label_fraction={cfg.label_fraction:g}"
                if split == "train" and cfg.label_fraction < 1
                else ""
            )
            raise DataError(f"{cfg.labels.table}: no label for any slice of {cfg.data[split]}{few}")
        parts[split] = LabelledPart(dataset, positions, labels.targets[start:][positions])
        start += len(dataset)
    if unknown:
        words = f" ({', '.join(map(one_line, labels.missing))} mean none)" if labels.missing else ""
        process.say(f"note: {unknown} of {start} slices have no label{words} and are left out")
    return parts


def heed_slices(cfg: Config, sets: dict, slices: LabelledSlices, process: Process) -> list[str]:
    """Say what is odd about encoder, slices, lists and labels; returns what was said."""
    path, train = encoder_file.path_of(cfg), sets["train"]
    card = encoder_card(path)
    intensity: Intensity = encoder_file.normalisation(cfg, card, train.kind)
    doubts = judge_encoder(path, card, train, intensity) + judge(train, cfg.data.window, intensity)
    if slices.has_cases:
        doubts += judge_lists({split: dataset.patients for split, dataset in sets.items()}, train.whose)
        doubts += judge_shared_cases(slices.parts)
    doubts += judge_classes(cfg, slices)
    return heed(doubts, cfg.data.insist, "data.insist=true", process.warn)


def judge_classes(cfg: Config, slices: LabelledSlices) -> list[Doubt]:
    """The classes that a model cannot learn, or that cannot be judged, since none or all of the slices have
    them: they have no value there. Raises DataError where no class has one."""
    tasks, doubts = slices.tasks(cfg), []
    each = [[told_apart(task.one_hot(rows)) for rows in trainings(task, cfg.mode)] for task in tasks]
    rows = np.concatenate([task.test for task in tasks])
    known = np.concatenate([np.tile(np.any(some, 0), (len(task.test), 1)) for some, task in zip(each, tasks)])
    if main_value(slices.kind, tasks[0].targets[rows], np.where(known, 0.0, np.nan)) is None:
        raise DataError(nothing_to_judge(cfg, slices, known.any()))
    models = np.concatenate(each)  # (models, K)
    which = "draws" if cfg.mode == "lowshot" else "folds"
    some = [
        one_line(name) + (f" (in {count} of {len(models)} {which})" if count < len(models) else "")
        for name, count in zip(slices.classes, (~models).sum(0))
        if count
    ]
    if some:
        where = "labels.folds" if cfg.labels.folds else cfg.data.train
        text = f"none or all training slices have: {', '.join(some)}; no value there, left out of means"
        doubts.append(Doubt(f"{where}: {text}"))
    for split, part in slices.parts.items():
        apart = told_apart(one_hot(slices.kind, part.targets, len(slices.classes)))
        some = [one_line(name) for name, ok in zip(slices.classes, apart | ~models.any(0)) if not ok]
        if some and split != "train":
            text = f"none or all slices have: {', '.join(some)}; left out of means there"
            doubts.append(Doubt(f"{cfg.data[split]}: {text}"))
    return doubts


def nothing_to_judge(cfg: Config, slices: LabelledSlices, learnt: bool) -> str:
    """Why no class has a value: nothing can be learnt, or nothing of it judged."""
    each = "class" if cfg.labels.table else f"organ (labels.min_pixels={cfg.labels.min_pixels})"
    if learnt:
        where, text = cfg.data.test, f"test slices have each {each} that can be learnt: nothing to judge"
    else:
        where, text = (
            cfg.data.train,
            f"{len(slices.train)} training slices have each {each}: nothing to learn",
        )
    few = f"; label_fraction={cfg.label_fraction:g} takes few cases" if cfg.label_fraction < 1 else ""
    return f"{cfg.data.root if cfg.labels.folds else where}: none or all {text}{few}"


def judge_shared_cases(parts: dict[str, LabelledPart]) -> list[Doubt]:
    """Neighbouring slices of a patient on both sides are found again, not recognised."""
    train = {*parts["train"].patients}
    for split, part in parts.items():
        if split != "train" and (shared := sorted(train & {*part.patients})):
            both = f"{len(shared)} cases or patients are in the {split} and training lists"
            text = f"{both}, the first {one_line(shared[0])}"
            return [Doubt(f"lists: {text}: neighbouring slices would be on both sides", fatal=True)]
    return []
