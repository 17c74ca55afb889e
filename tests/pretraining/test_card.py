"""pretraining/card.py: the model card says what the encoder's JSON file does."""

import json

import pytest

from pretraining.card import model_card


def test_a_run_leaves_a_card_of_its_encoder(train, tmp_path):
    train("run", "optim.max_steps=2", "decorrelation.method=none")
    found = json.loads((tmp_path / "run/encoder.json").read_text())
    text = (tmp_path / "run/encoder.md").read_text()
    assert text == model_card("encoder", found) and found["sha256"] in text
    assert (
        "# encoder: a tiny for CT slices" in text
        and "(clip(value, -160, 240) scaled to [0, 1] - 0.5) / 0.25" in text
    )
    for row in ("slices, cases | 18,", "steps | 2 of", "decorrelation | none", "axis | axial", "values | hu"):
        assert f"| {row}" in text
    assert all(line.count("|") == 3 for line in text.splitlines() if line.startswith("|"))


@pytest.mark.parametrize(
    "name, value, row",
    [
        ("pixel_mm", [[0.7, 0.9], [0.8, 0.8]], "pixels | 0.7 to 0.9 x 0.8 mm |"),
        ("pixel_mm", None, "pixels | of unknown size |"),
        ("axis", None, "axis | axis unknown |"),
        ("size", None, "size | several |"),
        ("source", None, "source | unknown |"),
        ("neighbours", 1, "channels | the slice and its two neighbours |"),
    ],
)
def test_what_is_not_known_is_said(train, tmp_path, name, value, row):
    train("run", "optim.max_steps=1")
    card = json.loads((tmp_path / "run/encoder.json").read_text())
    card["data"][name] = value
    card["normalisation"]["window"] = None
    text = model_card("encoder", card)
    assert row in text and "(value - 0.5) / 0.25" in text
