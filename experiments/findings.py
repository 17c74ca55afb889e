"""What an ablation has found: its tables, from the records of its cells (see cells.py)."""

import itertools
import math
from collections.abc import Iterable
from statistics import mean, stdev

from evaluation.metrics import mean_or_none
from evaluation.results import percent, table
from experiments.cells import Cell, cell_of, chosen, evaluation_name, tuned_records, tuning
from experiments.side_by_side import correlations, encoders_of, kendall_tau
from experiments.side_by_side import table as table_of_seeds

GROUPS = {  # of the organs of BTCV
    "large organs": ("spleen", "right kidney", "left kidney", "liver", "stomach"),
    "vessels": ("aorta", "inferior vena cava", "portal and splenic veins"),
    "small organs": ("gallbladder", "esophagus", "pancreas", "right adrenal gland", "left adrenal gland"),
}
MEASURES = {  # of collapse, in the results of an evaluation and what the monitor said of the same encoder
    "effective rank, pooled": lambda results: results["effective_rank"]["pooled"],
    "effective rank, dense": lambda results: results["effective_rank"]["dense"],
    "DSE": lambda results: results["structure"]["dse"],
    "label-free score": lambda results: results["monitor"].get("score"),  # None before a readout was measured
    "grey readout": lambda results: results["monitor"].get("grey_readout"),
    "cosine of keys (negative)": lambda results: negative(results["monitor"].get("similarity")),
    "DSE, between clusters": lambda results: results["structure"]["inter"],
    "DSE, within clusters (negative)": lambda results: -results["structure"]["intra"],
    "DSE, dimension": lambda results: results["structure"]["dimension"],
    "variance between images (negative)": lambda results: -results["structure"]["image_share"],
}
PICKING = {"score": "by label-free score", "grey_readout": "by grey readout", "dse": "by DSE"}  # columns
CLEAR = 2.0  # points between two methods, see docs/RESULTS.md
PAIRS = ("slices", "slices, reflected", "noise", "noise, reflected")  # see position.py

# ---- Tables --------------------------------------------------------------------------------------


def tables(records: list[dict], protocol: dict) -> str:
    """All tables in Markdown; methods without a finished cell are left out."""
    parts = [main_table(records, protocol), benchmark_tables(records, protocol)]
    parts += [organ_table(records, protocol), tuning_table(records, protocol)]
    parts += [variant_table(records, protocol), position_table(records)]
    alike = monitored_alike(records, protocol)
    found = checkpoints(alike)
    parts += [measure_table(found), picked_table(found)]
    parts += [picked_methods(alike, protocol)] if protocol["benchmarks"] else []
    return "\n\n".join(part for part in parts if part)


def monitored_alike(records: list[dict], protocol: dict) -> list[dict]:
    """Without the methods that were pretrained, and so monitored, on other slices or another input: what the
    monitor says of them does not compare with what it says of the rest."""
    settings = protocol["methods"] | protocol["variants"]
    other = {name for name, own in settings.items() if any(key.startswith("data.") for key in own or {})}
    return [record for record in records if record["method"] not in other]


def describe(results: dict) -> str:
    return f"validation Dice {percent(results['val_dice'])}, test Dice {percent(results['mean_dice'])}"


def markdown(heading: tuple[str, ...], rows: Iterable[tuple[str, ...]], title: str) -> str:
    rows = [heading, *rows]
    return f"**{title}**\n\n{table(rows)}" if len(rows) > 1 else ""


def spread(values: list[float | None]) -> str:
    """Mean and standard deviation in percent, of those that are defined."""
    values = [100 * value for value in values if value is not None]
    if not values:
        return "-"
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def main_table(records: list[dict], protocol: dict) -> str:
    tuned = (f"fine-tuned, {100 * fraction:g} %" for fraction in protocol["fractions"])
    heading = ("method", "seeds", "linear", *GROUPS, *tuned)
    heading += ("rank pooled / dense", "DSE", "variance between images")
    rows = []
    for method in protocol["methods"]:
        own = chosen(records, method)
        if not own:
            continue
        linear = [record["linear"] for record in own]
        row = [method, str(len(own)), spread([r["mean_dice"] for r in linear])]
        row += [spread([group_dice(r, group) for r in linear]) for group in GROUPS]
        row += [spread(tuned_dice(own, fraction)) for fraction in protocol["fractions"]]
        ranks = [mean(r["effective_rank"][kind] for r in linear) for kind in ("pooled", "dense")]
        row += [f"{ranks[0]:.0f} / {ranks[1]:.0f}", f"{mean(r['structure']['dse'] for r in linear):.3f}"]
        row.append(f"{mean(r['structure']['image_share'] for r in linear):.2f}")
        rows.append(tuple(row))
    main = markdown(heading, rows, "Test Dice in %, mean ± standard deviation over seeds")
    return "\n\n".join(part for part in (main, missing_organs(records, protocol)) if part)


def benchmark_tables(records: list[dict], protocol: dict) -> str:
    """All benchmarks side by side, what is better or worse than random weights and than what it varies, and
    whether benchmarks order the pretrained methods alike."""
    found = benchmark_values(records, protocol)
    trained = trained_methods(protocol)
    ordered = {
        column: {method: values for method, values in own.items() if method in trained}
        for column, own in found.items()
    }
    parts = [table_of_seeds(found), other_machines(records, protocol), *verdicts(found, protocol)]
    parts += correlations(ordered)
    return "\n\n".join(part for part in parts if part) if found else ""


def trained_methods(protocol: dict) -> list[str]:
    """Without those that are evaluated with random weights."""
    return [name for name, own in protocol["methods"].items() if own is not None]


def verdicts(found: dict[str, dict[str, list[float]]], protocol: dict) -> list[str]:
    """Tables of who is better or worse in which benchmark: the pretrained methods against those that are not,
    and a method against the one it is `like`."""
    trained, methods = trained_methods(protocol), encoders_of(found)
    bases = {name: trained for name in protocol["methods"] if name not in trained}
    for name in trained:
        if like := protocol["methods"][name].get("like"):
            bases[like] = [*bases.get(like, []), name]
    tables = []
    for base, others in bases.items():
        rows = []
        for method in (method for method in methods if method in others):
            signs = (verdict(own.get(method, []), own.get(base, [])) for own in found.values())
            rows.append((method, *signs))
        title = f"Better (+) or worse (-) than {base}: with every seed, and by {CLEAR:g} points in the mean"
        tables.append(markdown(("encoder", *found), rows, title))
    return tables


def verdict(one: list[float], other: list[float]) -> str:
    """Empty as long as not all seeds of both are measured."""
    if not one or len(one) != len(other):
        return ""
    return "+" if better(one, other) else "-" if better(other, one) else "="


def better(one: list[float], other: list[float]) -> bool:
    """Of values in percent, of the same seeds."""
    gains = [a - b for a, b in zip(one, other)]
    return bool(gains) and min(gains) > 0 and mean(gains) >= CLEAR


def benchmark_values(records: list[dict], protocol: dict) -> dict[str, dict[str, list[float]]]:
    """{benchmark: {method: the value of each seed in percent}}; empty for a protocol without benchmarks."""
    if not protocol["benchmarks"]:
        return {}
    columns = {"linear": lambda record: record["linear"]["mean_dice"]}
    for fraction in protocol["fractions"]:
        name = evaluation_name("finetune", fraction)
        columns[name] = lambda record, name=name: record.get(name, {}).get("mean_dice")
    for name in protocol["benchmarks"]:
        columns[name] = lambda record, name=name: first_metric(record, name)
    found = {}
    for column, value in columns.items():
        for method in protocol["methods"]:
            values = [100 * one for one in map(value, chosen(records, method)) if one is not None]
            if values:
                found.setdefault(column, {})[method] = values
    return found


def first_metric(record: dict, name: str) -> float | None:
    """The value of a benchmark's first metric, if that is finished."""
    metrics = record.get("benchmarks", {}).get(name, {}).get("metrics", {})
    return next((metric["value"] for metric in metrics.values()), None)


def other_machines(records: list[dict], protocol: dict) -> str:
    """Which rows were measured, wholly or in part, on another machine than most, as lines; "" if none was.
    Its rounding differs, and a training of some hundred steps with it."""
    seeds = {}  # {machine: {method: the seeds whose encoder was evaluated there}}
    for method in protocol["methods"]:
        for record in chosen(records, method):
            seeds.setdefault(record["linear"].get("machine"), {}).setdefault(method, []).append(
                record["seed"]
            )
    usual = max(seeds, key=lambda machine: len(seeds[machine]), default=None)
    lines = []
    for machine in seeds.keys() - {usual}:
        partly = {method for method in seeds[machine] if method in seeds[usual]}
        rows = (
            f"{method} (seeds {', '.join(map(str, own))})" if method in partly else method
            for method, own in seeds[machine].items()
        )
        lines.append(f"Measured on {machine}, the others on {usual}: {', '.join(rows)}")
    return "\n".join(lines)


def missing_organs(records: list[dict], protocol: dict) -> str:
    """Which means of the main table do not go over all organs, as lines."""
    lines = []
    for method in protocol["methods"]:
        for record in chosen(records, method):
            dice = record["linear"]["dice"].values()
            if found := len(dice) - sum(value is not None for value in dice):
                lines.append(f"{method}, seed {record['seed']}: {found} of {len(dice)} organs have no value")
    return "\n".join(lines)


def group_dice(results: dict, group: str) -> float | None:
    """None if none of its organs is there or was found."""
    return mean_or_none(results["dice"].get(organ) for organ in GROUPS[group])


def tuned_dice(records: list[dict], fraction: float) -> list[float]:
    """Test Dice after fine-tuning with this fraction of the labels, of the cells where that is finished."""
    name = evaluation_name("finetune", fraction)
    return [record[name]["mean_dice"] for record in records if name in record]


def organ_table(records: list[dict], protocol: dict) -> str:
    found = {
        name: [record["linear"]["dice"] for record in chosen(records, name)] for name in protocol["methods"]
    }
    found = {name: own for name, own in found.items() if own}
    rows = [
        (organ, *(spread([dice[organ] for dice in own]) for own in found.values()))
        for organ in (next(iter(found.values()))[0] if found else ())
    ]
    return markdown(("organ", *found), rows, "Linear Dice in % of each organ")


def tuning_table(records: list[dict], protocol: dict) -> str:
    rows = []
    for method in protocol["methods"]:
        if tried := tuning(records, method):
            rows.append((method, *(percent(tried.get(rate)) for rate in protocol["rates"])))
    heading = ("method", *(f"lr {rate:g}" for rate in protocol["rates"]))
    return markdown(heading, rows, "Validation Dice in % at each learning rate, first seed")


def variant_table(records: list[dict], protocol: dict) -> str:
    rows = []
    for variant, changes in protocol["variants"].items():
        for record in chosen(records, variant)[:1]:
            results, local = record["linear"], last_local_loss(record)
            base = [one for one in chosen(records, changes["like"]) if one["seed"] == record["seed"]]
            gain = results["mean_dice"] - base[0]["linear"]["mean_dice"] if base else None
            rows.append(
                (
                    variant,
                    changes["like"],
                    percent(results["val_dice"]),
                    percent(results["mean_dice"]),
                    "-" if gain is None else f"{100 * gain:+.1f}",
                    *(f"{results['effective_rank'][kind]:.0f}" for kind in ("pooled", "dense")),
                    f"{results['structure']['dse']:.3f}",
                    f"{local:.2f}" if local else "-",
                )
            )
    heading = (
        "variant",
        "of",
        "validation",
        "test",
        "gain",
        "rank pooled",
        "rank dense",
        "DSE",
        "local loss",
    )
    return markdown(heading, rows, "Variants, one seed: linear Dice in %")


def last_local_loss(record: dict) -> float | None:
    return record["pretraining"]["curves"].get("local", [None])[-1] if record["rate"] else None


def position_table(records: list[dict]) -> str:
    rows = []
    for record in records:
        if cues := record.get("position"):
            row = [record["method"], f"{last_local_loss(record):.2f}"]
            rows.append((*row, *(percent(cues[name]["accuracy"]) for name in PAIRS)))
    return markdown(("method", "local loss", *PAIRS), rows, "Regions matched rightly, in %")


# ---- Do label-free measures predict Dice? --------------------------------------------------------


def checkpoints(records: list[dict]) -> list[tuple[Cell, str, dict]]:
    """(cell, name, results) of every linear evaluation, of earlier and last encoders. results["monitor"] is
    what was measured of the same encoder while it was trained; {} if it was not pretrained."""
    found = []
    for record in records:
        monitor = {row["step"]: row for row in record.get("pretraining", {"monitor": []})["monitor"]}
        rows = {evaluation_name("linear", step=step): row for step, row in monitor.items()}
        rows["linear"] = monitor[max(monitor)] if monitor else {}
        for name, row in rows.items():
            if name in record:
                found.append((cell_of(record), name, record[name] | {"monitor": row}))
    return found


def by_cell(found: list) -> dict[Cell, list]:
    """The checkpoints of each cell."""
    return {cell: list(run) for cell, run in itertools.groupby(found, key=lambda one: one[0])}


def measure_table(found: list) -> str:
    if len(found) < 3:
        return ""
    trained = [one for one in found if one[0].rate is not None]
    read = [one for one in trained if MEASURES["label-free score"](one[2]) is not None]
    runs = [run for run in by_cell(trained).values() if len(run) > 2]
    rows = []
    for name, measure in MEASURES.items():
        within = [tau for run in runs if not math.isnan(tau := tau_of(measure, run))]
        taus = [tau_of(measure, some) for some in (found, trained, read)]
        taus.append(mean(within) if within else math.nan)
        rows.append((name, *("-" if math.isnan(tau) else f"{tau:+.2f}" for tau in taus)))
    heading = ("measure", f"all {len(found)}", f"{len(trained)} pretrained", f"{len(read)} with a readout")
    title = "Kendall's tau of each measure with linear Dice, over checkpoints"
    return markdown((*heading, "within one run, mean"), rows, title)


def negative(value: float | None) -> float | None:
    return None if value is None else -value


def tau_of(measure, found: list) -> float:
    """Not a number if the measure is not known of all of them."""
    values = [measure(results) for _, _, results in found]
    if None in values:
        return math.nan
    return kendall_tau(values, [results["mean_dice"] for _, _, results in found])


def picked_table(found: list) -> str:
    """The checkpoint of each run that a measure picks, against the last and the best one."""
    rows = []
    for cell, run in by_cell(found).items():
        if all(name == "linear" for _, name, _ in run):
            continue
        steps = {results["monitor"]["step"]: results for _, _, results in run if results["monitor"]}
        dice = {step: results["mean_dice"] for step, results in steps.items()}
        best = max(dice, key=dice.get)
        row = [cell.name]
        for name in PICKING:
            values = {step: results["monitor"].get(name) for step, results in steps.items()}
            known = None not in values.values()
            row.append(of_step(dice, max(values, key=values.get), best) if known else "-")
        rows.append((*row, of_step(dice, max(dice), best), f"{percent(dice[best])} ({best})"))
    heading = ("cell", *PICKING.values(), "last", "best")
    title = "Linear Dice in % of the checkpoint picked without labels (step; difference from the best one)"
    return markdown(heading, rows, title)


def picked_methods(records: list[dict], protocol: dict) -> str:
    """What a measure picks among methods, by its mean over seeds, and among the rates of each of them."""
    trained = trained_methods(protocol)
    seeds = {name: own for name in trained if (own := chosen(records, name))}
    rates = {name: own for name in seeds if len(own := tuned_records(records, name)) > 1}
    if len(seeds) < 2:
        return ""
    best = max(seeds, key=lambda name: mean_dice(seeds[name]))
    rows = []
    for column, title in PICKING.items():
        known = [name for name in seeds if None not in last_measured(seeds[name], column)]
        if len(known) < len(seeds):
            rows.append((title, "-", "-", "-"))
            continue
        picked = max(known, key=lambda name: mean(last_measured(seeds[name], column)))
        lost = [
            max(map(linear_dice, own)) - linear_dice(max(own, key=lambda r: last_measured([r], column)))
            for own in rates.values()
        ]
        lost = f"{100 * mean(lost):.1f} ({100 * max(lost):.1f})" if lost else "-"
        rows.append((title, picked, percent(mean_dice(seeds[picked])), lost))
    heading = ("picked", "method", "its linear Dice", "lost among rates: mean (most)")
    title = f"Picked without labels; best of {len(seeds)} methods: {best}, {percent(mean_dice(seeds[best]))}"
    return markdown(heading, rows, title)


def linear_dice(record: dict) -> float:
    return record["linear"]["mean_dice"]


def mean_dice(records: list[dict]) -> float:
    return mean(map(linear_dice, records))


def last_measured(records: list[dict], name: str) -> list[float | None]:
    """What the monitor said of the last encoders."""
    return [record["pretraining"]["monitor"][-1].get(name) for record in records]


def of_step(dice: dict[int, float], step: int, best: int) -> str:
    return f"{percent(dice[step])} ({step}; {100 * (dice[step] - dice[best]):+.1f})"
