"""What an ablation has measured: cells.jsonl, one line for every cell, and what is chosen among cells.

A cell is one pretraining and all that is measured of its encoder. Its record has

    method, rate, seed    rate is null for an encoder that is not pretrained
    pretraining           monitor: what the collapse monitor measured, with the cosine of keys and the
                          label-free score of that time; spectra, in depth only: the first and the last;
                          curves: the losses of metrics.jsonl and what is logged with them
    linear, linear-STEP, finetune-PERCENT    an evaluation of the last encoder, or of that after STEP steps:
                          Dice of validation and test cases (0 to 1), of each organ and each test case
                          (cases: a list in the order of dice), HD95 in mm, measures of collapse
    benchmarks            {name: the metrics of its results.json, without single classes}
    position              see position.py
    masks                 {slice: PNG in base64}: predictions for the figure

and each pretraining and evaluation the encoder's sha256, its precision (bf16 or fp32) and its machine (the
GPU, or what the CPU can do); null if that is not known.
"""

import fcntl
import json
import math
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from collapse import label_free_score, recent_similarity
from engine.config import ConfigError
from engine.files import write_whole

EVALUATED = (  # columns of results.json that are kept
    *("encoder_sha256", "label_fraction", "val_dice", "mean_dice", "dice", "hd95"),
    *("effective_rank", "structure"),
)
NO_CURVES = ("step", "epoch", "lr", "images_per_second", "skipped_steps", "unreadable_slices")


@dataclass(frozen=True)
class Cell:
    """One pretraining and what is evaluated of it. `rate` is None for an encoder that is not pretrained."""

    method: str
    rate: float | None
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}/" + ("" if self.rate is None else f"lr{self.rate:g}-") + f"seed{self.seed}"


def cell_of(record: dict) -> Cell:
    return Cell(record["method"], record["rate"], record["seed"])


class Cells:
    """The file. Threads and processes may write at a time: each rewrites it whole, one after the other."""

    def __init__(self, folder: Path):
        self.path, self.lock = folder / "cells.jsonl", folder / "work" / "lock"

    def read(self) -> list[dict]:
        """All records; none if there is no such file.

        Raises:
            ConfigError: a line is not a record.
        """
        records = []
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                records.append(json.loads(line))
                cell_of(records[-1])
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{self.path}: line {number} is not the record of a cell") from None
        return records

    def record(self, cell: Cell) -> dict:
        """What is known of the cell; nothing at first."""
        return next((record for record in self.read() if cell_of(record) == cell), {})

    def keep(self, cell: Cell, **measured) -> None:
        """Add to the cell's record, in the place of what has the same name."""
        with self.locked():
            records = {cell_of(record): record for record in self.read()}
            records[cell] = records.get(cell, vars(cell)) | measured
            order = sorted(records, key=lambda cell: (cell.method, cell.rate or 0, cell.seed))
            lines = (json.dumps(records[cell], separators=(",", ":")) + "\n" for cell in order)
            write_whole(self.path, "".join(lines))

    @contextmanager
    def locked(self):
        self.lock.parent.mkdir(parents=True, exist_ok=True)
        with open(self.lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed, also by a killed process
            yield


# ---- What is kept of a run -----------------------------------------------------------------------


def evaluation_name(mode: str, fraction: float | None = None, step: int | None = None) -> str:
    """In a record: linear, linear-288, finetune-10."""
    return mode + ("" if fraction is None else f"-{100 * fraction:g}") + ("" if step is None else f"-{step}")


def evaluation_record(results: dict) -> dict:
    """Of results.json: numbers of five digits, of three for single cases."""
    kept = {name: results[name] for name in EVALUATED}
    kept = json.loads(json.dumps(kept), parse_float=lambda text: round(float(text), 5))
    cases = {
        case: [None if dice[organ] is None else round(dice[organ], 3) for organ in results["dice"]]
        for case, dice in results["cases"].items()
    }
    return kept | {"cases": cases}


def benchmark_record(results: dict) -> dict:
    """Of results.json, whatever was measured: the encoder, and its metrics, of five digits, without those of
    single classes."""
    kept = {"encoder_sha256": results["encoder_sha256"], "metrics": {}}
    for name, metric in results["metrics"].items():
        kept["metrics"][name] = {key: value for key, value in metric.items() if key != "classes"}
    return json.loads(json.dumps(kept), parse_float=lambda text: round(float(text), 5))


def pretraining_record(rows: list[dict], in_depth: bool = True) -> dict:
    """Of metrics.jsonl: what the monitor measured, as it was logged, curves of three digits, and in depth
    thinned spectra. What a label-free measure says of an encoder is not rounded: it may decide which one is
    better."""
    measured, logged = ([row for row in rows if name in row] for name in ("dse", "loss"))
    monitor = []
    for row in measured:
        keys = recent_similarity(r.get("similarity") for r in rows if r["step"] <= row["step"])
        own = {name: value for name, value in row.items() if not name.startswith("spectrum")}
        if not math.isnan(keys):  # not before the first step
            own = {"similarity": keys} | own
            if "grey_readout" in own:  # older runs have no score of their own
                own = {"score": label_free_score(own["grey_readout"], keys)} | own
        monitor.append(own)
    columns = dict.fromkeys(name for row in logged for name in row if name not in NO_CURVES)
    curves = {"step": [row["step"] for row in logged]}
    curves |= {name: [digits(row.get(name)) for row in logged] for name in columns}
    kept = {"monitor": monitor, "curves": curves}
    if not in_depth:
        return kept
    spectra = {
        kind: {"first": thinned(measured[0][column]), "last": thinned(measured[-1][column])}
        for kind, column in (("pooled", "spectrum"), ("dense", "spectrum_dense"))
    }
    return kept | {"spectra": spectra}


def thinned(spectrum: list[float]) -> dict[str, list]:
    """{"index", "value"}: so many of the values that lines between them pass all others within 0.5 %, on a
    logarithmic axis and down to a millionth of the largest."""
    heights = np.log10(np.maximum(spectrum, 1e-6 * spectrum[0] + 1e-30))
    index = [0]
    for end in range(2, len(heights) + 1):
        start = index[-1]
        between = heights[start : end + 1]
        line = np.linspace(between[0], between[-1], len(between))
        if end == len(heights) or np.abs(line - between).max() > math.log10(1.005):
            index.append(end - 1)
    return {"index": index, "value": [digits(spectrum[i]) for i in index]}


def digits(value: float | None, count: int = 3) -> float | None:
    return None if value is None else float(f"{value:.{count}g}")


# ---- What is chosen ------------------------------------------------------------------------------


def evaluated(records: Iterable[dict], method: str) -> list[dict]:
    """The method's records with a linear evaluation, by seed."""
    own = [record for record in records if record["method"] == method and "linear" in record]
    return sorted(own, key=lambda record: record["seed"])


def tuned_records(records: list[dict], method: str) -> list[dict]:
    """Those that the learning rate is chosen from: of the lowest seed."""
    own = [record for record in evaluated(records, method) if record["rate"] is not None]
    return [record for record in own if record["seed"] == own[0]["seed"]]


def tuning(records: list[dict], method: str) -> dict[float, float]:
    """{learning rate: validation Dice} of the cells with the lowest seed."""
    return {r["rate"]: r["linear"]["val_dice"] for r in tuned_records(records, method)}


def best_rate(records: list[dict], method: str) -> float:
    found = tuning(records, method)
    if not found:
        raise ConfigError(f"{method}: no finished cell to take the learning rate from; run that method first")
    return max(found, key=found.get)


def chosen(records: list[dict], method: str) -> list[dict]:
    """One for each seed, at the chosen learning rate."""
    own = evaluated(records, method)
    if not tuning(records, method):
        return own
    rate = best_rate(records, method)
    return [record for record in own if record["rate"] == rate]
