"""What is known of slices: the organs in their masks, or a table that somebody wrote.

    slice,contrast              case,sex,age group          slice,liver,spleen
    patient01/000.png,1         patient01,f,60-80           patient01/000,1,0

One column of a table is a single-label task, whose classes are its values; several columns of 0 and 1 are a
multi-label one. An empty field is an unknown label, and so is what programs write there (nan, NA, None,
null); equal numbers (1, 1.0, 01) are one value.
"""

import csv
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ct.layout import case_of, without_suffix
from ct.listing import natural_order
from ct.slices import IGNORE, DataError, in_threads
from engine.config import ConfigError, one_line
from engine.text import read_text

YES, NO = {"1", "yes", "true"}, {"0", "no", "false"}
MISSING = {"NA", "None"}  # not in small letters, where they may be a class, as "none" of a contrast medium
MISSING_IN_ANY_CASE = {"", "nan", "-nan", "null", "n/a", "#n/a", "#na", "<na>"}
NUMBER = re.compile(r"([+-]?)0*(\d+?)(?:\.(\d*?)0*)?", re.ASCII)
SEPARATORS = (",", ";", "\t")


@dataclass
class Labels:
    """Of N slices.

    kind     "multi": targets (N, K) uint8 of 0 and 1; "single": targets (N,) int64 class numbers
    known    (N,) bool; without a label a slice's targets mean nothing
    missing  what stands in the table for unknown labels, beside empty fields
    """

    kind: str
    classes: list[str]
    targets: np.ndarray
    known: np.ndarray
    missing: list[str] = field(default_factory=list)


def presence(dataset, classes: list[str], min_pixels: int) -> Labels:
    """Which organs a slice shows: those with min_pixels pixels or more of its mask, on the mask's own grid.

    dataset: a data.SegmentationDataset; classes: names, background first, which is not judged. Raises
    DataError for masks that cannot be used.
    """
    masks = in_threads(dataset.own_mask, range(len(dataset)), "labels from masks")
    pixels = np.stack([np.bincount(mask.ravel(), minlength=IGNORE + 1) for mask in masks])
    targets = (pixels[:, 1 : len(classes)] >= min_pixels).astype(np.uint8)
    return Labels("multi", classes[1:], targets, np.ones(len(targets), bool))


def read_table(path: str | Path, names: list[str], exists, columns: list[str] | None = None) -> Labels:
    """The labels of these slices in a table.

    names: of slices, CASE/SLICE.png. exists: set of all slices and cases that there are; a row may be of
    others than `names`. columns: those that count; None: all.

    Raises:
        DataError: not such a table; a row of a slice or case that does not exist, or two that contradict each
            other.
        ConfigError: a column that is not there.
    """
    key, header, rows = rows_of(path)
    if unknown := [name for name in columns or [] if name not in header]:
        raise ConfigError(
            f"labels.columns: {path} has no {one_line(unknown[0])}; it has {', '.join(filter(None, header))}"
        )
    columns = columns or [name for name in header if name]  # one without a name is no label
    table, missing = {}, set()
    for line, (name, fields) in rows:
        written = [fields[header.index(column)] for column in columns]
        values = tuple(map(value_of, written))
        missing |= {text for text, value in zip(written, values) if text and not value}
        name = without_suffix(name) if key == "slice" else name
        if table.setdefault(name, values) != values:
            raise DataError(f"{path}: line {line}: {one_line(name)} stands there twice, with other labels")
    if strange := [name for name in table if name not in exists]:
        text = f"{len(strange)} of {len(table)} {key}s do not exist, the first {one_line(strange[0])}"
        raise DataError(f"{path}: {text}")
    found = [table.get(without_suffix(name) if key == "slice" else case_of(name)) for name in names]
    known = np.array([values is not None and all(values) for values in found])
    if not known.any():
        where = " in all of its columns; labels.columns=[NAME, ...] chooses some" if len(columns) > 1 else ""
        raise DataError(f"{path}: none of the {len(names)} slices has a label{where}")
    if len(columns) == 1:
        values = [values[0] if ok else None for values, ok in zip(found, known)]
        return single_label(values, known, sorted(missing), path)
    return multi_label(found, known, columns, sorted(missing), path)


def value_of(text: str) -> str:
    """What a field says: "" for an unknown label, and each number in one spelling."""
    if text in MISSING or text.lower() in MISSING_IN_ANY_CASE:
        return ""
    if not (number := NUMBER.fullmatch(text)):
        return text
    sign, whole, fraction = number.groups()
    value = f"{whole}.{fraction}" if fraction else whole
    return f"-{value}" if sign == "-" and value != "0" else value


def rows_of(path: str | Path) -> tuple[str, list[str], list[tuple]]:
    """ "slice" or "case", the names of the other columns, and [(line number, (name, fields))]. A column has
    no name where pandas has written its index."""
    try:
        lines = read_text(path).splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such table") from None
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    separator = max(SEPARATORS, key=lines[0].count) if lines else ","
    try:
        table = [[text.strip() for text in row] for row in csv.reader(lines, delimiter=separator)]
    except csv.Error as error:
        raise DataError(f"{path}: not a table of text fields: {error}") from None
    header = table[0] if table else []
    keys = [name for name in header if name in ("slice", "case")]
    if len(keys) != 1 or len({*header}) < len(header) or not {*header} - {"", *keys}:
        wanted = "slice,NAME or case,NAME with different names is expected"
        raise DataError(f"{path}: its first line is {one_line(','.join(header))!r}; {wanted}")
    place, rows = header.index(keys[0]), []
    for number, row in enumerate(table[1:], 2):
        if not any(row):
            continue
        if len(row) != len(header):
            raise DataError(f"{path}: line {number}: {len(header)} fields are expected, as in the first line")
        if not row[place]:
            raise DataError(f"{path}: line {number}: no {keys[0]} is named")
        rows.append((number, (row.pop(place).removeprefix("./"), row)))
    if not rows:
        raise DataError(f"{path}: the table is empty")
    return keys[0], [name for name in header if name not in keys], rows


def single_label(values: list[str | None], known: np.ndarray, missing: list[str], path) -> Labels:
    classes = sorted({value for value in values if value is not None}, key=natural_order)
    if len(classes) < 2:
        raise DataError(f"{path}: all slices have the label {one_line(classes[0])}: nothing to tell apart")
    if {*classes} == {"-1", "0", "1"}:
        text = "-1 stands beside 0 and 1; leave the field empty if it means unknown, else give it a name"
        raise DataError(f"{path}: {text}")
    spelled = {}
    for name in classes:
        if (other := spelled.setdefault(name.casefold(), name)) != name:
            raise DataError(f"{path}: {one_line(other)} and {one_line(name)} would be two classes; write one")
    numbers = {name: number for number, name in enumerate(classes)} | {None: 0}
    return Labels("single", classes, np.array([numbers[value] for value in values]), known, missing)


def multi_label(rows: list, known: np.ndarray, columns: list[str], missing: list[str], path) -> Labels:
    targets = np.zeros((len(rows), len(columns)), np.uint8)
    for target, values, ok in zip(targets, rows, known):
        for k, value in enumerate(values if ok else ()):
            if value.lower() not in YES | NO:
                name = one_line(columns[k])
                text = f"column {name} holds {one_line(value)}, not 0 or 1 as several columns do"
                alone = f"labels.columns=[{name}] takes its values for classes"
                mend = "an empty field means unknown" if value == "-1" else alone
                raise DataError(f"{path}: {text}; {mend}")
            target[k] = value.lower() in YES
    return Labels("multi", list(columns), targets, known, missing)
