"""Labels of slices: organs in hand-made masks, and tables as people write them."""

import numpy as np
import pytest
from handmade import put

from data import DataError, SegmentationDataset
from engine.config import ConfigError
from evaluation.labels import presence, read_table

NAMES = ["a/00.png", "a/01.png", "b/00.png", "b/01.png"]
EXISTS = {"a/00", "a/01", "b/00", "b/01", "c/00", "a", "b", "c"}


def test_an_organ_is_there_from_so_many_pixels_on(tmp_path):
    for name, pixels in (("0", 5), ("1", 4), ("2", 0)):
        mask = np.full((6, 6), 255, np.uint8)  # ignored pixels are nobody's
        mask[0] = 0
        mask.flat[6 : 6 + pixels] = 2
        put(tmp_path / f"masks/a/{name}.png", mask)
        put(tmp_path / f"images/a/{name}.png", np.ones((6, 6), np.uint16))
    (tmp_path / "train.txt").write_text("a/0.png\na/1.png\na/2.png\n")
    found = presence(SegmentationDataset(tmp_path), ["background", "liver", "spleen"], 5)
    assert found.kind == "multi" and found.classes == ["liver", "spleen"]
    assert found.targets.tolist() == [[0, 1], [0, 0], [0, 0]] and found.known.all()


def table(tmp_path, text, columns=None, encoding="utf-8"):
    path = tmp_path / "labels.csv"
    path.write_bytes(text.encode(encoding))
    return read_table(path, NAMES, EXISTS, columns)


def test_one_column_has_one_class_a_value(tmp_path):
    text = "slice,size\na/00.png,10\na/01,9\nb/00.png,10\nc/00,7\n"
    found = table(tmp_path, text)
    assert found.kind == "single" and found.classes == ["9", "10"]  # those of the slices, in natural order
    assert found.targets[:3].tolist() == [1, 0, 1] and found.known.tolist() == [True, True, True, False]


@pytest.mark.parametrize("separator", ",;\t")
@pytest.mark.parametrize("encoding", ("utf-8-sig", "utf-16"))
def test_labels_of_cases_in_any_spelling(tmp_path, separator, encoding):
    text = '"case",Kontrast\r\nb,"ja"\r\n\r\na,nein\r\n'.replace(",", separator)
    found = table(tmp_path, text, encoding=encoding)
    assert found.classes == ["ja", "nein"] and found.targets.tolist() == [1, 1, 0, 0]


def test_several_columns_are_of_yes_and_no(tmp_path):
    text = "liver,slice,spleen,note\n1,a/00,no,x\n0,a/01,YES,y\n1,b/00,,z\n"
    found = table(tmp_path, text, ["spleen", "liver"])
    assert found.kind == "multi" and found.classes == ["spleen", "liver"]
    assert found.targets[:2].tolist() == [[0, 1], [1, 0]] and found.known.tolist() == [
        True,
        True,
        False,
        False,
    ]
    with pytest.raises(DataError, match=r"column note holds x.*labels.columns=\[note\] takes its values"):
        table(tmp_path, text)


@pytest.mark.parametrize("word", ("", " ", "nan", "NaN", "NA", "N/A", "None", "null", "NULL", "#N/A", "<NA>"))
def test_what_programs_write_for_unknown_labels_is_unknown(tmp_path, word):
    found = table(tmp_path, f"slice,x\na/00,1\na/01,{word}\nb/00,0\nb/01,{word}\n")
    assert found.classes == ["0", "1"] and found.known.tolist() == [True, False, True, False]
    assert found.missing == ([word] if word.strip() else [])
    found = table(tmp_path, f"slice,x,y\na/00,1,0\na/01,{word},1\nb/00,0,1\nb/01,1,{word}\n")
    assert found.kind == "multi" and found.known.tolist() == [True, False, True, False]
    assert found.targets[[0, 2]].tolist() == [[1, 0], [0, 1]]


def test_a_column_without_a_name_is_no_label(tmp_path):
    found = table(tmp_path, ",slice,x\n0,a/00,1\n1,a/01,0\n2,b/00,1\n")
    assert found.kind == "single" and found.classes == ["0", "1"]
    with pytest.raises(ConfigError, match="has no y; it has x$"):
        table(tmp_path, ",slice,x\n0,a/00,1\n1,a/01,0\n", ["y"])


def test_words_for_nothing_in_small_letters_are_classes(tmp_path):
    found = table(tmp_path, "slice,contrast\na/00,none\na/01,iv\nb/00,oral\nb/01,na\n")
    assert found.classes == ["iv", "na", "none", "oral"] and found.known.all()


@pytest.mark.parametrize(
    "written, classes",
    (
        (("1.0", "1", "0", "0.0"), ["0", "1"]),  # pandas writes 1.0 where a column has gaps
        (("01", "1", "02", "2.00"), ["1", "2"]),
        (("2.5", "2.50", "-0.5", "-0.50"), ["2.5", "-0.5"]),
        (("-0", "0", "+1", "1."), ["0", "1"]),
        (("100", "10", "1e2", "1.0.0"), ["1.0.0", "1e2", "10", "100"]),  # no plain numbers stay text
        (("12345678901234567890.0", "12345678901234567891", "-1", "1"), None),
    ),
)
def test_equal_numbers_are_one_value(tmp_path, written, classes):
    rows = "".join(f"{name},{value}\n" for name, value in zip(NAMES, written))
    found = table(tmp_path, "slice,x\n" + rows)
    assert found.classes == classes if classes else len(found.classes) == 4
    several = table(tmp_path, "slice,x,y\na/00,1.0,0\na/01,0.0,01\nb/00,1,0\nb/01,0,1\n")
    assert several.targets.tolist() == [[1, 0], [0, 1], [1, 0], [0, 1]]


@pytest.mark.parametrize(
    "text, message",
    (
        ("slice,x\nz/00,1\na/00,0\n", "1 of 2 slices do not exist, the first z/00"),
        ("case,x\nz,1\na,0\n", "1 of 2 cases do not exist, the first z"),
        ("slice,x\na/00,1\na/00.png,0\n", "line 3: a/00 stands there twice"),
        ("slice,x\na/00,1\na/01,1\n", "all slices have the label 1"),
        ("slice,x\nc/00,1\n", "none of the 4 slices has a label$"),
        ("slice,x\na/00,nan\na/01,\n", "none of the 4 slices has a label$"),
        ("slice,x,y\na/00,1,\na/01,,1\n", r"a label in all of its columns; labels.columns=\[NAME, ...\]"),
        ("slice,x\na/00,1\na/01,1.0\n", "all slices have the label 1: nothing to tell apart$"),
        ("slice,x\na/00,-1\na/01,1\nb/00,0\n", "-1 stands beside 0 and 1; leave the field empty"),
        ("slice,x,y\na/00,-1,0\na/01,1,1\n", "x holds -1, not 0 or 1 .*; an empty field means unknown$"),
        ("slice,x\na/00,Yes\na/01,yes\nb/00,no\n", "Yes and yes would be two classes"),
        ("slice,x\na/00,1\na/00.png,0\na/00,1.0\n", "line 3: a/00 stands there twice"),
        ("name,x\na/00,1\n", "slice,NAME or case,NAME"),
        ("slice,case,x\na/00,a,1\n", "slice,NAME or case,NAME"),
        ("slice\na/00\n", "slice,NAME or case,NAME"),
        ("slice,x\na/00\n", "line 2: 2 fields are expected"),
        ("slice,x\na/00,1\n,0\n", "line 3: no slice is named"),
        ("slice,\na/00,1\n", "slice,NAME or case,NAME"),
        (f"slice,x\na/00,{'1' * 200_000}\n", "not a table of text fields: field larger than"),
        ("slice,x\n", "the table is empty"),
        ("", "slice,NAME or case,NAME"),
    ),
)
def test_tables_that_cannot_be_used(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        table(tmp_path, text)


def test_a_column_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="has no age; it has x"):
        table(tmp_path, "slice,x\na/00,1\na/01,0\n", ["age"])
    with pytest.raises(DataError, match="no such table"):
        read_table(tmp_path / "none.csv", NAMES, EXISTS)
