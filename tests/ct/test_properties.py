"""ct/properties.py: what set.json says of a set, and what is read where it does not."""

import json

import numpy as np
import pytest
from handmade import put, random_set

from ct.properties import (
    Properties,
    Reading,
    class_names,
    read_json,
    read_properties,
    reading_of,
    write_properties,
)
from ct.slices import DataError
from data import SegmentationDataset, SliceDataset

WHOLE = Properties(
    "hu",
    1024,
    1,
    (64, 48),
    spacing={"a": (5.0, 0.8, 0.7)},
    patients={"a": "p", "b": "p"},
    classes=["background", "liver"],
    source="a.nii.gz",
    made_by="data.py slice",
)


def test_what_is_written_is_read(tmp_path):
    assert read_properties(tmp_path) == Properties()
    write_properties(tmp_path, WHOLE)
    assert read_properties(tmp_path) == WHOLE and WHOLE.missing() == []
    assert Properties().missing() == ["kind", "axis", "size", "spacing"]


def test_files_that_sets_had_before_are_read_where_set_json_does_not_say(tmp_path):
    random_set(tmp_path)
    (tmp_path / "classes.json").write_text('["background", "spleen"]')
    (tmp_path / "spacing.json").write_text('{"a": [5, 0.8, 0.7]}')
    assert class_names(tmp_path) == ["background", "spleen"]
    dataset = SegmentationDataset(tmp_path, "train.txt")
    assert dataset.spacing("a") == (5, 0.8, 0.7) and dataset.spacing("b") is None
    for name, content in (("spacing", '{"a": [5, 0.8]}'), ("classes", "{")):
        (tmp_path / f"{name}.json").write_text(content)
        with pytest.raises(DataError, match=f"{name}.json"):
            SegmentationDataset(tmp_path, "train.txt")
    (tmp_path / "spacing.json").unlink()
    (tmp_path / "classes.json").write_text('["background", "spleen"]')
    write_properties(tmp_path, WHOLE)
    with pytest.raises(DataError, match="set.json: its classes are not those in classes.json"):
        class_names(tmp_path)


@pytest.mark.parametrize("twice", ['"a": 1, "a": 2', '"b": {"a": 1, "a": 1}'])
def test_an_entry_that_stands_twice_is_named(tmp_path, twice):
    (tmp_path / "x.json").write_text(f'{{{twice}, "c": [1, 1], "d": {{"a": 3}}}}')
    with pytest.raises(DataError, match="x.json: not valid JSON \\('a' stands there twice"):
        read_json(tmp_path / "x.json", dict)


def test_a_misspelt_entry_is_named(tmp_path):
    (tmp_path / "set.json").write_text('{"spacings": {}, "comment": "mine"}')
    with pytest.raises(DataError, match="no entry is called spacings; spacing is meant"):
        read_properties(tmp_path)


@pytest.mark.parametrize(
    "content",
    ({"kind": "mri"}, {"axis": 3}, {"axis": True}, {"size": [1]}, {"size": [0, 4]}, {"hu_offset": "a"})
    + (
        {"spacing": {"a": [1, 2]}},
        {"spacing": [1]},
        {"classes": "btcv"},
        {"classes": ["a"]},
        {"source": 1},
    ),
)
def test_a_wrong_entry_is_named(tmp_path, content):
    (tmp_path / "set.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"set.json: .*{[*content][0]}|class names"):
        read_properties(tmp_path)


def test_class_names(tmp_path):
    assert class_names(tmp_path, 3) == ["background", "class 1", "class 2"]
    assert class_names(tmp_path, ["background", "liver"]) == ["background", "liver"]
    with pytest.raises(DataError, match="set.json: no class names"):
        class_names(tmp_path)


def test_how_slices_are_read(tmp_path):
    assert reading_of(Properties()) == Reading("hu", 1024)
    assert reading_of(Properties(hu_offset=1000)) == Reading("hu", 1000)
    assert reading_of(Properties(hu_offset=0)) == reading_of(Properties(hu_offset=0), 0) == Reading("hu", 0)
    assert reading_of(Properties(), 900) == Reading("hu", 900)
    assert reading_of(Properties(hu_offset=1024), 0) == Reading("stored", 0)
    assert reading_of(Properties(kind="stored")) == Reading("stored", 0, "stored")
    for own in (Properties(hu_offset=1024), Properties(kind="stored")):
        with pytest.raises(DataError, match="data.hu_offset: 900"):
            reading_of(own, 900)


def test_kinds_of_values_are_told_apart(tmp_path):
    """16-bit PNGs taken as stored are no HU, .npy are HU all the same; 8-bit ones are what they are."""
    put(tmp_path / "images/a/1.png", np.full((4, 4), 1064, np.uint16))
    (tmp_path / "images/b").mkdir()
    np.save(tmp_path / "images/b/1.npy", np.full((4, 4), 40, np.int16))
    put(tmp_path / "images/c/1.png", np.full((4, 4), 7, np.uint8))

    def read(name, offset=None):
        (tmp_path / "train.txt").write_text(name)
        dataset = SliceDataset(tmp_path, hu_offset=offset)
        return dataset.kind, dataset[0][0, 0, 0].item()

    assert read("a/1.png") == ("hu", 40) and read("a/1.png", 0) == ("stored", 1064)
    assert read("b/1.npy") == read("b/1.npy", 0) == ("hu", 40)
    assert read("c/1.png") == read("c/1.png", 0) == ("uint8", 7)
    write_properties(tmp_path, Properties(kind="uint8"))
    with pytest.raises(DataError, match="holds HU, but its set.json says 8-bit values"):
        read("a/1.png")
    write_properties(tmp_path, Properties(kind="stored"))
    assert read("a/1.png") == ("stored", 1064) and read("b/1.npy") == ("stored", 40)
