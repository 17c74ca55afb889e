"""evaluation/report.py: scores, tables and pictures."""

import json

import numpy as np
import pytest
import torch

import eval_seg
from ct import organs
from engine.config import ConfigError
from evaluation import report


def test_slices_are_stacked_in_the_order_of_their_numbers():
    names = ["a/slice10.png", "a/slice9.png", "a/slice100.png", "a/slice1.png"]
    assert sorted(names, key=report.natural_order) == [names[3], names[1], names[0], names[2]]


def test_scores_use_the_masks_own_grid_and_spacing(tmp_path):
    """With a second slice of another size Dice counts each on its own grid, and there is no volume."""
    truth = np.zeros((2, 8, 8), np.uint8)
    truth[:, 2:6, 2:6] = 1
    prediction = torch.zeros(2, 8, 8, dtype=torch.uint8)
    prediction[:, 2:6, 4:8] = 1

    class Set:
        num_classes = 2
        sizes = (8, 8)

        def to_own_grid(self, labels, i, size):
            assert size == (self.sizes[i], self.sizes[i])
            return labels[:: 8 // self.sizes[i], :: 8 // self.sizes[i]]

        def spacing(self, case):
            return 5.0, 1.0, 0.5

    one = report.score_case(Set(), "case", [0, 1], [*truth], prediction, full=True)
    assert one.counts.tolist()[1] == [16, 32, 32] and one.hd95 == [None, 1.0]
    Set.sizes = (8, 4)
    truths = [truth[0], truth[1][::2, ::2]]
    other = report.score_case(Set(), "case", [0, 1], truths, prediction, full=True)
    assert other.counts.tolist()[1] == [8 + 2, 16 + 4, 16 + 4] and other.hd95 == [None, None]


def results_of(
    folder, encoder="random", mode="linear", seed=0, dice=0.5, organs=("liver", "spleen"), **settings
):
    """A results.json with four cases, the first organ in each of them; the folder."""
    folder.mkdir()
    rank = {"pooled": 10.0 + seed, "dense": 20.0}
    content = {"encoder": encoder, "mode": mode, "seed": seed, "mean_dice": dice, "effective_rank": rank}
    content["cases"] = {
        f"case{i}": dict.fromkeys(organs) | {organs[0]: dice + 0.01 * i}
        for i in range(settings.pop("cases", 4))
    }
    config = {"seed": seed, "encoder": encoder, "data": {"root": "data/phantom"}, "run": {"out": str(folder)}}
    content |= {"label_fraction": 1.0, "config": config | settings}
    (folder / "results.json").write_text(json.dumps(content))
    return str(folder)


def test_compare_groups_by_encoder_and_averages_over_seeds(tmp_path, capsys):
    runs = [
        ("random", "linear", 0, 0.20),
        ("random", "linear", 1, 0.30),
        ("random", "finetune", 0, 0.5),
        ("runs/x/encoder.pth", "linear", 0, 0.456),
    ]
    folders = [results_of(tmp_path / f"{number}", *run) for number, run in enumerate(runs)]
    eval_seg.main(["--compare", *folders])
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[2] == ["random", "25.0 +- 7.1 (n=2)", "50.0", "10.3 / 20.0"]
    assert cells[3] == ["runs/x", "45.6", "-", "10.0 / 20.0"]
    assert cells[5] == ["Dice %", "linear: random", "linear: runs/x", "finetune: random"]
    assert cells[7:9] == [["liver", "26.5", "47.1", "51.5"], ["spleen", "-", "-", "-"]]
    assert cells[12] == ["linear: runs/x - random", "+20.6", "0.0", "4 of 4", "0.12"]
    assert sum("predictions.png" in line for line in lines) == 4
    assert not any("warning" in line for line in lines)
    with pytest.raises(ConfigError, match="no results.json"):
        eval_seg.main(["--compare", str(tmp_path)])


def test_a_mean_over_other_settings_is_no_mean_over_seeds(tmp_path, capsys):
    first = results_of(tmp_path / "first", optim={"steps": 20}, data={"root": "data/phantom", "workers": 0})
    other = results_of(
        tmp_path / "other", seed=1, optim={"steps": 9}, data={"root": "data/phantom", "workers": 2}
    )
    again = results_of(tmp_path / "again", optim={"steps": 20}, data={"root": "data/phantom"})
    eval_seg.main(["--compare", first, other])
    said = "linear: random: the mean over 2 runs that differ in optim.steps, not in the seed alone"
    assert f"warning: {said}" in capsys.readouterr().out
    eval_seg.main(["--compare", first, again])
    assert (
        "warning: linear: random: the mean over 2 runs, some of them of one seed" in capsys.readouterr().out
    )


def test_results_that_do_not_compare(tmp_path):
    first = results_of(tmp_path / "first")
    (tmp_path / "link").symlink_to(tmp_path / "first")
    organs = results_of(tmp_path / "organs", organs=("liver", "aorta"))
    fewer = results_of(tmp_path / "fewer", cases=3)
    for second, message in (
        (str(tmp_path / "link"), "given twice"),
        (organs, r"different organs \(.*first, .*organs\) do not compare"),
        (fewer, r"different test cases \(.*first, .*fewer\) do not compare"),
    ):
        with pytest.raises(ConfigError, match=message):
            eval_seg.main(["--compare", first, second])


def test_label_colours_and_legend_are_drawn():
    mask = np.zeros((20, 30), np.uint8)
    mask[5:15, 5:15] = 6
    painted = report.painted(np.zeros((20, 30), np.float32), mask)
    assert painted.shape == (192, 288, 3) and not painted[0, 0].any()
    assert np.abs(painted[96, 96] - 0.65 * organs.ORGAN_COLORS[6]).max() <= 1
    page = report.prediction_page([("case/1.png", mask / 6.0, mask, mask)], organs.BTCV_ORGANS)
    assert page.size[0] > 3 * 288


def test_a_mean_says_over_how_many_organs_and_cases_it_goes():
    """HD95 of the one organ that was found in one case is no mean over three organs and two cases."""
    counts = torch.tensor([[9, 9, 9], [1, 2, 2], [0, 0, 3], [0, 0, 0]])  # the last organ is nowhere
    found = {
        "a": report.CaseScore(counts, [None, 2.0, None, None], None),
        "b": report.CaseScore(counts, [None] * 4, None),
    }
    results = report.summary(found, ["background", "liver", "spleen", "aorta"])
    assert results["measured"] == {
        "dice": {"organs": [2, 3], "cases": [2, 2]},
        "hd95": {"organs": [1, 3], "cases": [1, 2]},
    }
    text = report.organ_table(results)
    assert (
        "mean Dice over 2 of 3 organs in 2 of 2 cases; mean HD95 over 1 of 3 organs in 1 of 2 cases" in text
    )
    mean = [line.split() for line in text.splitlines() if line.startswith("| mean")][0]
    assert mean[3::2] == ["25.0", "0.0", "2", "2.0", "-", "1"]
    assert report.mean_dice(found) == {"val_dice": pytest.approx(0.25), "val_organs": 2}
