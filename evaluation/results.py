"""results.json, whatever was measured: reading it, and runs side by side.

Every evaluation leaves

    {"benchmark": "eval_det.py", "mode": ..., "encoder": ..., "encoder_sha256": ..., "seed": ...,
     "label_fraction": ..., "config": {...}, "warnings": [...],
     "metrics": {"AP50": {"value": 0.41, "interval": [0.33, 0.5], "classes": {"liver": 0.7, ...}}, ...}, ...}

Values are 0 to 1 (shown in percent), None where undefined; the first metric is the one that tables show.
interval: 95 %, by bootstrap over the test cases.
"""

import json
from itertools import chain
from pathlib import Path
from statistics import mean, stdev

from engine.config import ConfigError, one_line


def read_results(folder: str | Path, holds) -> dict:
    """The content of results.json.

    holds: whether it has all that the caller needs; what it raises counts as no.

    Raises:
        ConfigError: there is none, or a damaged one.
    """
    path = Path(folder) / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if is_of_an_evaluation(results) and holds(results):
            return results
    except FileNotFoundError:
        raise ConfigError(f"{folder}: holds no results.json; evaluate there first") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, NotADirectoryError):
        pass
    raise ConfigError(f"{path}: not the results of an evaluation, or damaged")


def is_of_an_evaluation(results: dict) -> bool:
    texts = [results["mode"], results["encoder"], results["config"]["data"]["root"]]
    texts += [results.get("encoder_sha256") or ""]
    return all(map(is_text, texts)) and is_number(results["label_fraction"])


def has_metrics(results: dict) -> bool:
    """Whether the part is sound that all evaluations have in common."""
    for name, one in results["metrics"].items():
        values = [one["value"], *(one["interval"] or ()), *one["classes"].values()]
        if not all(map(is_text, (name, *one["classes"]))) or not all(map(is_score, values)):
            return False
    return bool(results["metrics"]) and isinstance(results.get("warnings", []), list)


def is_text(value) -> bool:
    return isinstance(value, str) and value.isprintable()


def is_number(value) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e12


def is_score(value) -> bool:
    return value is None or is_number(value)


# ---- Tables --------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def defined(values) -> list[float]:
    return [value for value in values if value is not None]


def deviation(values: list[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def spread(scores: list[float | None]) -> str:
    """Mean and standard deviation over seeds, in percent."""
    scores = [100 * score for score in defined(scores)]
    if not scores:
        return "-"
    return f"{mean(scores):.1f}" + (f" +- {stdev(scores):.1f} (n={len(scores)})" if len(scores) > 1 else "")


def with_interval(value: float | None, interval: list[float] | None) -> str:
    """ "41.0 [33.2, 50.1]", in percent."""
    return percent(value) + (f" [{percent(interval[0])}, {percent(interval[1])}]" if interval else "")


def table(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table that reads well as text, too: a heading and rows, the first column to the left."""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        for row in (rows[0], rule, *rows[1:])
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def metrics_table(metrics: dict[str, dict]) -> str:
    """One line per class, one column per metric, and their means with 95 % intervals."""
    first = next(iter(metrics.values()))
    rows = [("class", *(f"{name} %" for name in metrics))]
    for name in first["classes"]:
        rows.append((name, *(percent(one["classes"].get(name)) for one in metrics.values())))
    rows.append(("mean", *(with_interval(one["value"], one["interval"]) for one in metrics.values())))
    return table(rows)


# ---- Several runs --------------------------------------------------------------------------------


def compare(folders: list[str], without_effect: tuple[str, ...]) -> str:
    """Means: one line per encoder, each mode's metrics; classes: one line per class, the first metric.

    Runs of one encoder, mode and label fraction are averaged, with their standard deviation; a line says in
    which settings but the seed they differ. Raises ConfigError for folders without results or given twice,
    and for results of other benchmarks, data sets or classes.
    """
    runs = [read_results(folder, has_metrics) for folder in folders]
    refuse_twice(folders)
    refuse_other_data(runs)
    names = {(run["mode"], name): None for run in runs for name in run["metrics"]}
    rows = [("encoder", *(f"{mode}: {name} %" for mode, name in names))]
    for label, own in by_encoder(runs).items():
        rows.append((label, *(shown_metric(own, mode, name) for mode, name in names)))
    parts = [table(rows), classes_side_by_side(runs), *averaged_over_settings(runs, without_effect)]
    return "\n".join(parts)


def shown_metric(runs: list[dict], mode: str, name: str) -> str:
    found = [run["metrics"][name] for run in runs if run["mode"] == mode and name in run["metrics"]]
    if len(found) == 1:
        return with_interval(found[0]["value"], found[0]["interval"])
    return spread([one["value"] for one in found])


def classes_side_by_side(runs: list[dict]) -> str:
    """The table of classes; a value is the mean over seeds of the mode's first metric."""
    columns = {}
    for run in runs:
        name, first = next(iter(run["metrics"].items()))
        columns.setdefault(f"{run['mode']}: {encoder_label(run)} ({name} %)", []).append(first["classes"])
    rows = [("class", *columns)]
    for name in next(iter(columns.values()))[0]:
        found = [defined(one.get(name) for one in seeds) for seeds in columns.values()]
        rows.append((name, *(percent(mean(values) if values else None) for values in found)))
    return f"\n{table(rows)}"


def refuse_twice(folders: list[str]) -> None:
    places = [Path(folder).resolve() for folder in folders]
    for place, folder in zip(places, folders):
        if places.count(place) > 1:
            raise ConfigError(f"--compare: {folder} is given twice, and would count as two seeds")


def refuse_other_data(runs: list[dict]) -> None:
    for what, of in (
        ("by different benchmarks", lambda run: run.get("benchmark")),
        ("on different data sets", lambda run: run["config"]["data"]["root"]),
        ("with different classes", lambda run: ", ".join(next(iter(run["metrics"].values()))["classes"])),
    ):
        found = list(dict.fromkeys(map(of, runs)))
        if len(found) > 1:
            raise ConfigError(f"results {what} ({'; '.join(map(one_line, found))}) do not compare")


def by_encoder(runs: list[dict]) -> dict[str, list[dict]]:
    labels = dict.fromkeys(map(encoder_label, runs))
    return {label: [run for run in runs if encoder_label(run) == label] for label in labels}


def encoder_label(run: dict) -> str:
    """The folder of the encoder's run, or its file, or "random"; with the share of labels if not all."""
    path = Path(run["encoder"])
    label = (path.parent if path.name == "encoder.pth" else path).as_posix()
    share = run["label_fraction"]
    return label if share == 1 else f"{label}, {100 * share:g} % of the labels"


def averaged_over_settings(runs: list[dict], without_effect: tuple[str, ...]) -> list[str]:
    """A line for each mean over runs that are not the seeds of one experiment."""
    lines, groups = [], {}
    for run in runs:
        groups.setdefault(f"{run['mode']}: {encoder_label(run)}", []).append(run)
    for label, own in groups.items():
        settings = [settings_of(run) for run in own]
        names = sorted({*chain(*settings)} - {"seed", "encoder"})
        differing = [
            name for name in names if any(one.get(name) != settings[0].get(name) for one in settings)
        ]
        differing = [name for name in differing if not name.startswith(without_effect)]
        if differing:
            found = f"{len(own)} runs that differ in {one_line(', '.join(differing))}, not in the seed alone"
            lines.append(f"warning: {label}: the mean over {found}")
        elif len({str(run.get("seed")) for run in own}) < len(own):
            lines.append(f"warning: {label}: the mean over {len(own)} runs, some of them of one seed")
    return ["", *lines] if lines else []


def settings_of(run: dict) -> dict:
    """{"optim.steps": 2000, ...}"""
    rows = {}
    for name, value in run["config"].items():
        rows |= (
            {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
        )
    return rows
