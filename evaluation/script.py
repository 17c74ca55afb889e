"""What every eval_*.py does in the same way around what it measures: processes, folder, lists, results.

main         of the script ends in     run(SCRIPT, args, cfg, evaluate, predict)
evaluate     begins with               earlier_results(...), goes on with open_sets(...) and
begin_run    and ends with             write_results(...)
"""

import json
from pathlib import Path

from torch import Tensor

from augment import SegmentationAugment
from ct.properties import KINDS
from ct.slices import mask_mapping
from data import DataError, Intensity, SegmentationDataset, network_input
from engine.config import Config, ConfigError, load_config
from engine.files import make_run_folder, refuse_other_run, write_whole
from engine.ownership import all_refuse
from engine.process import Process, start_process, warn
from engine.stopping import StopRequest, begin
from evaluation import encoder_file
from evaluation.batches import Batches
from evaluation.settings import FREE_KEYS, PHOTOMETRIC
from evaluation.supervised import Stopped, training_positions
from losses import seeded


def run(script: str, args, cfg: Config, evaluate, predict=None) -> int:
    """--folder, --predict or the evaluation; returns the exit code.

    Args:
        evaluate: (cfg, process, stop) -> None.
        predict: (cfg, process, input, out folder) -> None.
    """
    source, out = (getattr(args, name, None) for name in ("predict", "out"))
    if (source is None) != (out is None):
        raise ConfigError("--predict INPUT and --out DIR belong together")
    if args.folder:  # launch.sh asks
        refuse_other_run(cfg, script, cfg.encoder and encoder_file.path_of(cfg))
        print(cfg.run.out)
        return 0
    process = start_process(cfg.run)
    try:
        if source:
            predict(cfg, process, Path(source), Path(out))
        else:
            with StopRequest(process.rank) as stop:
                evaluate(cfg, process, stop)
        code = 0
    except Stopped as stopped:
        code = stopped.args[0]
    process.close()  # not after an error, when it might wait for others
    return code


# ---- The folder of an evaluation -----------------------------------------------------------------


def earlier_results(
    cfg: Config, process: Process, script: str, defaults: str, nullable: dict, read_results
) -> dict | None:
    """The results of this very evaluation if run.out holds them; None if it is new or to be resumed.

    read_results: folder -> the content of its results.json.

    Raises ConfigError if encoder or data are not given, and if the folder holds something else: another
    evaluation, done or under way, or one of an encoder file of the same name but other content.
    """
    for name in ("encoder", "data.root"):
        cfg.check(name, cfg.flat()[name], "a path (for the encoder also: random)")
    all_refuse(process, refuse_other_run, cfg, script, encoder_file.path_of(cfg))
    folder = Path(cfg.run.out)
    results, saved, checkpoint = (folder / f for f in ("results.json", "config.yaml", "checkpoint.pth"))
    if not saved.is_file() and checkpoint.is_file():
        raise ConfigError(f"run.out: {checkpoint} is there without config.yaml; choose another run.out")
    if not saved.is_file() or not (results.is_file() or checkpoint.is_file()):
        return None
    try:
        before = load_config(defaults, saved, [], nullable)
    except ConfigError as error:
        raise ConfigError(f"run.out: {folder} holds another kind of run ({error})") from None
    if name := cfg.first_difference(before, FREE_KEYS):
        there, here = before.flat()[name], cfg.flat()[name]
        raise ConfigError(f"{name}: {folder} holds a run with {there!r}, not {here!r}; change run.out")
    if not results.is_file():
        return None
    content = read_results(folder)
    encoder_file.check_same_encoder(cfg, content.get("encoder_sha256"))
    return content


def begin_run(cfg: Config, process: Process, script: str) -> Path:
    """The folder run.out, made and claimed, with the settings in it."""
    folder = make_run_folder(cfg, process, script, encoder_file.path_of(cfg))
    begin(folder, cfg, process, script)
    return folder


def write_results(cfg: Config, script: str, found: dict) -> dict:
    """results.json, which marks the run as finished: what was found and what it was found of.

    found["metrics"]: {name: {"value": 0 to 1, "interval": [low, high] or None, "classes": {class: value}}},
    the one that tables show first. Returns all that was written.
    """
    folder = Path(cfg.run.out)
    results = found | {
        "benchmark": script,
        "encoder": cfg.encoder,
        "encoder_sha256": encoder_file.sha256_of(cfg),
        "mode": cfg.get("mode", script),
        "seed": cfg.seed,
        "label_fraction": cfg.label_fraction,
        "config": cfg.plain(),
    }
    write_whole(folder / "results.json", json.dumps(results, indent=1))
    for name in ("checkpoint.pth", "checkpoint.pth.previous"):
        (folder / name).unlink(missing_ok=True)
    return results


# ---- Its slices ----------------------------------------------------------------------------------


def open_sets(cfg: Config, num_classes: int) -> dict[str, SegmentationDataset]:
    """The train, val (if there is one) and test slices with their masks."""
    data = cfg.data
    lists = {"train": data.train, "val": data.val, "test": data.test}
    folders = (data.images, data.masks, data.hu_offset, num_classes)
    sets, neighbours = {}, encoder_file.neighbours(cfg)
    for split, file in lists.items():
        if file:
            how = {"like": sets.get("train"), "mask_map": mask_mapping(data.mask_map)}
            how["neighbours"] = neighbours
            sets[split] = SegmentationDataset(data.root, file, *folders, **how)
            if (kind := sets[split].kind) != sets["train"].kind:
                raise DataError(f"{file}: {KINDS[kind]}, but {KINDS[sets['train'].kind]} in {data.train}")
    return sets


def labelled_positions(cfg: Config, sets: dict) -> dict[str, list[int]]:
    """The slices of each split that take part: for training those of label_fraction of the cases."""
    positions = {split: list(range(len(dataset))) for split, dataset in sets.items()}
    positions["train"] = training_positions(sets["train"], cfg.label_fraction, cfg.seed)
    return positions


def check_batch(cfg: Config, process: Process, least: int = 1, slices: int | None = None) -> None:
    """Raise a ConfigError unless a batch is one for this number of processes, `least` slices each, and of at
    most so many training slices."""
    wanted = f"a multiple of the {process.world} processes"
    cfg.check("optim.batch_size", cfg.optim.batch_size % process.world == 0, wanted)
    enough = cfg.optim.batch_size >= least * process.world
    cfg.check("optim.batch_size", enough, f"{least} slices a process or more")
    if slices is not None:
        cfg.check("optim.batch_size", cfg.optim.batch_size <= slices, f"at most the {slices} training slices")


def keep_features(
    cfg: Config, all_batches: list[Batches], process: Process, trained: Batches | None = None
) -> None:
    """Compute frozen features once, unless the config forbids it. Several processes compute a share each and
    hold all in a file that they share; a single process does that for cache: auto and more than cache_gb. If
    there is no room for a file, features are computed at every step.

    trained: those that are trained on, which need their masks, too."""
    if cfg.cache == "off":
        return
    needed, folder = sum(batches.bytes() for batches in all_batches) / 2**30, None
    if process.world > 1 or (cfg.cache == "auto" and needed > cfg.cache_gb):
        folder = Path(cfg.run.out)
        why = "shared by the processes" if process.world > 1 else "more than cache_gb"
        process.say(f"features need {needed:.1f} GiB, {why}: held in a file in {folder}")
    try:
        for batches in all_batches:
            batches.keep("frozen features", folder, masks=batches is trained)
    except OSError as error:
        if folder is None:
            raise
        warn(f"no file of features in {folder} ({error.strerror}): computed again at every step")


# ---- Augmentation --------------------------------------------------------------------------------


def no_augmentation(inputs: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
    return inputs, targets


def crop_augmentation(
    cfg: Config, size: tuple[int, int], intensity: Intensity, in_channels: int, process: Process
):
    """(windowed images, masks, step) -> crops as a network takes them, and their masks: a function of (seed,
    step)."""
    if intensity.window is None:
        for name in PHOTOMETRIC:
            cfg.check(f"augment.{name}", cfg.augment[name] == 0, "0, since data.window is null")
    crops = SegmentationAugment(cfg.data.size or size, **cfg.augment)

    def augment(unit: Tensor, masks: Tensor, step: int) -> tuple[Tensor, Tensor]:
        share = len(unit)
        first, total = process.rank * share, process.world * share
        unit, masks = crops(unit, masks, seeded("crops", cfg.seed, step), first, total)
        return network_input(unit, intensity, in_channels), masks

    return augment
