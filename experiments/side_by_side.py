"""Encoders side by side: what each reached in some benchmarks, over seeds, and whether these agree.

Everything here takes {"knn: mAP %": {encoder: [value of each seed, in percent]}}.
"""

import itertools
from statistics import mean, stdev

import numpy as np

from evaluation import results

FEW = 5  # encoders, below which an order says little


def encoders_of(columns: dict) -> list[str]:
    return list(dict.fromkeys(itertools.chain(*columns.values())))


def table(columns: dict[str, dict[str, list[float]]]) -> str:
    """Mean and standard deviation over seeds; the best mean of each column in bold."""
    rows = [("encoder", *columns)]
    for encoder in encoders_of(columns):
        rows.append((encoder, *(shown(column, encoder) for column in columns.values())))
    return results.table(rows)


def shown(column: dict[str, list[float]], encoder: str) -> str:
    if encoder not in column:
        return "-"
    values, most = column[encoder], max(map(len, column.values()))
    text = f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")
    text = f"**{text}**" if len(column) > 1 and mean(values) == max(map(mean, column.values())) else text
    return text if len(values) == most else f"{text} (n={len(values)})"


def correlations(columns: dict[str, dict[str, list[float]]]) -> list[str]:
    """Kendall's tau between benchmarks over the encoders that both have, of means over seeds."""
    encoders = encoders_of(columns)
    if len(encoders) < 3 or len(columns) < 2:
        return ["", "Rank correlations of benchmarks need three encoders and two benchmarks."]
    names = [name.partition(": ")[0] for name in columns]
    rows = [("Kendall's tau", *names)]
    for name, one in zip(names, columns.values()):
        cells = []
        for other in columns.values():
            both = [encoder for encoder in encoders if encoder in one and encoder in other]
            tau = kendall_tau([mean(one[e]) for e in both], [mean(other[e]) for e in both])
            cells.append("-" if tau != tau else f"{tau:+.2f}")
        rows.append((name, *cells))
    few = f"\nOf {len(encoders)} encoders: an order of so few may be chance." if len(encoders) < FEW else ""
    return ["", results.table(rows) + few]


def kendall_tau(x: list[float], y: list[float]) -> float:
    """Kendall's tau-b: concordant less discordant pairs over the pairs that are not tied."""
    pairs = list(itertools.combinations(zip(x, y), 2))
    signs = [(np.sign(a[0] - b[0]), np.sign(a[1] - b[1])) for a, b in pairs]
    agreement = sum(first * second for first, second in signs)
    untied = [sum(sign[side] != 0 for sign in signs) for side in (0, 1)]
    return float(agreement / (untied[0] * untied[1]) ** 0.5) if all(untied) else float("nan")
