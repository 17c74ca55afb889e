"""What is odd about the slices that a run is about to learn from: said before the first step."""

from pathlib import Path

from ct.layout import case_of, find_slices, patient_of, read_list, split_folder
from ct.plausible import Doubt, heed, judge_facts
from data import Intensity, SliceDataset, encoder_card, judge
from engine.config import Config
from engine.process import Process
from weights import initial_weights


def heed_data(cfg: Config, process: Process, dataset: SliceDataset, intensity: Intensity) -> None:
    """Say it; raises DataError where nothing right can come out, unless data.insist."""
    doubts = judge(dataset, cfg.data.window, intensity)
    doubts += judge_start(cfg, dataset, intensity) + judge_held_out(cfg, dataset)
    heed(doubts, cfg.data.insist, "data.insist=true", process.warn)
    if note := dataset.assumed():
        process.say(f"note: {note}")


def judge_start(cfg: Config, dataset: SliceDataset, intensity: Intensity) -> list[Doubt]:
    """Whether the weights to start from were trained on such slices, in such a normalisation."""
    card = encoder_card(initial_weights(cfg.model.init))
    if not card:
        return []
    doubts = judge_facts(card["facts"], dataset.facts(), f"model.init: {cfg.model.init}")
    theirs = Intensity(card["window"], card["mean"], card["std"])
    if theirs != intensity:
        text = f"model.init: {cfg.model.init} was trained with {theirs}, this run has {intensity}"
        doubts.append(Doubt(text))
    return doubts


def judge_held_out(cfg: Config, dataset: SliceDataset) -> list[Doubt]:
    """Whether slices, or other slices of the cases, of test.txt or of the validation list are learnt from."""
    doubts = []
    for name in {"test.txt", cfg.data.val} - {None, "", cfg.data.list}:
        path = Path(cfg.data.root) / name
        if dataset.packed or not path.is_file():
            continue
        folder = split_folder(cfg.data.root, name, cfg.data.images)
        held_out = {*filter(None, find_slices(folder, read_list(path, folder)))}
        known = dataset.properties.patients
        patients = {patient_of(slice, case_of(slice), known) for slice in held_out}
        shared = sum(slice in held_out for slice in dataset.names)
        if shared:
            doubts.append(Doubt(f"{cfg.data.list}: {shared} of its slices stand in {name}, too"))
        elif among := sorted(patients & set(dataset.patients)):
            text = f"{cfg.data.list}: has other slices of {len(among)} {dataset.whose} of {name} ({among[0]})"
            doubts.append(Doubt(text))
    return doubts
