"""What is judged of values, windows, masks and lists."""

import numpy as np
import pytest

from ct.plausible import Doubt, Values, heed, judge_lists, judge_masks, judge_values, judge_window
from ct.slices import DataError


def scan(seed=0):
    """Values as in a CT slice: air, fat, soft tissue, bone."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(mean, 20, 500) for mean in (-1000, -100, 50, 700)]).round()


def judged(values, mend="subtract {offset}"):
    return judge_values(Values().add(values), "ct.nii.gz", mend)


def test_hu_are_plausible_and_padding_is_air():
    assert judged(scan()) == []
    assert judged(np.append(scan(), np.full(900, -3024))) == []
    assert judged(np.append(scan(), 12_000)) != []  # metal: a word, no end
    assert not judged(np.append(scan(), 12_000))[0].fatal


def test_values_that_are_not_hu_are_named_with_what_mends_them():
    [doubt] = judged(np.maximum(scan() + 1024, 0))
    assert doubt.fatal and "values from 0 to" in doubt.text and "subtract 1024" in doubt.text
    assert any(doubt.fatal for doubt in judged(np.linspace(-180_000, 180_000, 1000)))
    assert "an empty image" in judged(np.zeros(10))[0].text
    [doubt] = judged(np.full(10, np.nan))
    assert doubt.fatal and "100 %" in doubt.text
    [doubt] = judged(scan()[:1500] - 1024)  # the intercept twice
    assert doubt.fatal and "subtract -1024" in doubt.text
    assert judged(scan()[:500]) == []  # a slice of air
    [doubt] = judged(np.linspace(0, 1, 50))
    assert doubt.fatal and "scaled" in doubt.text
    [doubt] = judged(np.append(np.maximum(scan() + 1024, 0), np.full(9, -2000)))  # padding is no air
    assert doubt.fatal and "subtract 1024" in doubt.text
    [doubt] = judged(np.arange(300))  # no air, but no shifted CT either: an organ cut out
    assert not doubt.fatal and "subtract" not in doubt.text


def test_values_of_another_scale_or_after_another_offset_are_no_hu():
    hu = scan()
    for values in (hu / 1000, (hu + 1024) / 2000, (hu - hu.mean()) / hu.std(), np.arange(14)):
        [doubt] = judged(values)  # whole numbers of them are few
        assert doubt.fatal and "scaled to that, or labels" in doubt.text
    for offset in (1000, 2000, 5000, 9000):
        doubts = judged(hu - offset)
        assert any(doubt.fatal and "as tissue would be" in doubt.text for doubt in doubts), offset
    for air in (hu[:500], np.append(hu[:500], np.full(900, -3024)), np.array([-1024, -1023])):
        assert judged(air) == []


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.int32])
def test_numbers_of_any_width_are_judged(dtype):
    high = np.iinfo(dtype).max
    assert "no HU" in judged(np.arange(high - 100, high).astype(dtype))[0].text


@pytest.mark.parametrize("offset, lowest", [(1024, -1000), (1024, -1207), (32768, -1000), (5024, -1024)])
def test_the_offset_that_mends_values(offset, lowest):
    """The usual ones whatever a scanner gives for air; others by the lowest value, as -1024."""
    hu = np.append(scan().clip(-1000), lowest)
    [doubt, *_] = judged(hu + offset)
    assert doubt.fatal and doubt.text.endswith(f"subtract {offset}")


def test_a_few_voxels_that_are_not_finite_are_counted():
    values = scan()
    values[:3] = np.nan
    [doubt] = judged(values)
    assert not doubt.fatal and "3 values" in doubt.text


def test_a_window_that_shows_nothing():
    stored = Values().add(scan() + 1024)
    assert judge_window(Values().add(scan()), (-160, 240), "here") == []
    [doubt] = judge_window(Values().add(scan() + 3000), (-160, 240), "here")
    assert doubt.fatal and "white" in doubt.text and "data.window=[" in doubt.text
    assert judge_window(stored, None, "here") == []
    [doubt] = judge_window(Values().add(np.linspace(0, 1, 99)), (-160, 240), "here")
    assert doubt.fatal and "no contrast" in doubt.text


def test_masks_of_0_and_255_hold_no_class():
    pixels = np.zeros(256, int)
    pixels[[0, 255]] = 10
    [doubt] = judge_masks(pixels, ["background", "liver"], "masks")
    assert doubt.fatal and "data.mask_map={255: 1}" in doubt.text
    pixels[1] = 1
    assert judge_masks(pixels, ["background", "liver"], "masks") == []
    [doubt] = judge_masks(pixels, ["background", "liver", "spleen"], "masks")
    assert not doubt.fatal and "spleen" in doubt.text
    pixels[[1, 255]] = 0
    assert judge_masks(pixels, ["background", "liver"], "masks")[0].fatal


def test_class_0_is_the_background():
    pixels = np.zeros(256, int)
    pixels[:3] = 10
    assert judge_masks(pixels, ["anything", "liver", "spleen"], "masks") == []
    [doubt] = judge_masks(pixels, ["Liver", "spleen", "tumour"], "masks")
    assert not doubt.fatal and "Liver is the name of class 0" in doubt.text
    pixels[0] = 0
    [doubt] = judge_masks(pixels, ["background", "liver", "spleen"], "masks")
    assert not doubt.fatal and "no pixel of class 0, background" in doubt.text


def test_cases_in_several_lists():
    assert judge_lists({"train": ["a", "b"], "val": ["c"], "test": []}) == []
    [doubt] = judge_lists({"train": ["a", "b"], "val": ["c"], "test": ["b", "b"]})
    assert "1, the first: b (in train and test)" in doubt.text


def test_heed_ends_at_what_is_fatal_unless_somebody_insists():
    said = []
    doubts = [Doubt("odd"), Doubt("impossible", fatal=True)]
    with pytest.raises(DataError, match=r"impossible \(--force insists\)"):
        heed(doubts, False, "--force", said.append)
    assert said == ["odd"]
    assert heed(doubts, True, "--force", said.append) == ["odd", "impossible"]
