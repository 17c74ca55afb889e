"""metrics.py against hand-made cases, slow double loops, and MONAI where it is installed."""

import math

import pytest
import torch

from evaluation import metrics


def test_dice_counts_of_a_hand_made_slice():
    truth = torch.tensor([[0, 1, 1, 2], [0, 1, 255, 2]])
    prediction = torch.tensor([[0, 1, 2, 2], [1, 1, 1, 0]])
    # The pixel with truth 255 counts nowhere, although the prediction there is 1.
    assert metrics.dice_counts(prediction, truth, 3).tolist() == [[1, 2, 2], [2, 3, 3], [1, 2, 2]]


def test_counts_equal_a_double_loop_and_add_up_over_slices():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 5, (6, 9, 7), generator=generator)
    truth[truth == 4] = 255
    prediction = torch.randint(0, 4, (6, 9, 7), generator=generator)
    expected = [[0, 0, 0] for _ in range(4)]
    for p, t in zip(prediction.flatten().tolist(), truth.flatten().tolist()):
        if t == 255:
            continue
        expected[p][1] += 1
        expected[t][2] += 1
        expected[t][0] += p == t
    by_slice = sum(metrics.dice_counts(p, t, 4) for p, t in zip(prediction, truth))
    assert by_slice.tolist() == expected
    assert metrics.dice_counts(prediction.to(torch.uint8), truth.to(torch.uint8), 4).tolist() == expected


def test_dice_edge_cases_of_empty_organs():
    counts = torch.tensor([[50, 60, 60], [0, 0, 0], [0, 7, 0], [0, 0, 7], [4, 4, 4], [3, 4, 6]])
    assert metrics.case_dice(counts) == [100 / 120, None, 0.0, 0.0, 1.0, 0.6]
    assert all(value is None for value in metrics.case_dice(torch.zeros(3, 3, dtype=torch.int64)))


def test_mean_is_over_cases_first_then_over_organs():
    cases = {
        "a": {"spleen": 1.0, "liver": 0.5, "pancreas": None},
        "b": {"spleen": None, "liver": 0.7, "pancreas": None},
        "c": {"spleen": None, "liver": 0.9, "pancreas": None},
    }
    organs = metrics.mean_over_cases(cases)
    assert organs == {"spleen": 1.0, "liver": pytest.approx(0.7), "pancreas": None}
    assert metrics.mean_or_none(organs.values()) == pytest.approx(
        0.85
    )  # the mean of all values would be 0.775
    assert metrics.mean_or_none([None]) is None and metrics.mean_over_cases({}) == {}


def test_dataset_dice_counts_all_cases_as_one_image():
    small = metrics.dice_counts(
        torch.tensor([[0, 0, 0, 0]]), torch.tensor([[0, 0, 0, 1]]), 3
    )  # the organ is missed
    large = metrics.dice_counts(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 1, 1, 1]]), 3)
    result = metrics.dataset_dice(small + large)
    assert result["classes"] == [pytest.approx(8 / 9), pytest.approx(6 / 7), None]
    assert result["mean"] == pytest.approx(6 / 7)
    assert result["mean_with_background"] == pytest.approx((8 / 9 + 6 / 7) / 2)
    assert metrics.case_dice(small)[1] == 0.0  # which Dice per case does not hide


def test_wrong_shapes_and_labels_are_named():
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.dice_counts(torch.zeros(2, 3), torch.zeros(3, 2), 2)
    with pytest.raises(ValueError, match="truth holds label 5, with 3 classes"):
        metrics.dice_counts(torch.tensor([[0]]), torch.tensor([[5]]), 3)
    with pytest.raises(ValueError, match="two volumes"):
        metrics.hd95(torch.zeros(4, 4), torch.zeros(4, 4), (1, 1, 1))


# ----------------------------------------------------------------------------------------- Hausdorff distance


def slow_surface(mask):
    """(z, y, x) of the voxels with a neighbour outside the mask or the volume."""
    shape, points = mask.shape, []
    for z, y, x in mask.nonzero().tolist():
        for dz, dy, dx in ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)):
            n = (z + dz, y + dy, x + dx)
            if not all(0 <= i < length for i, length in zip(n, shape)) or not mask[n]:
                points.append((z, y, x))
                break
    return points


def slow_hd95(prediction, truth, spacing):
    def directed(source, target):
        distances = sorted(
            min(
                math.dist([i * mm for i, mm in zip(p, spacing)], [i * mm for i, mm in zip(q, spacing)])
                for q in target
            )
            for p in source
        )
        at = 0.95 * (len(distances) - 1)
        low, high = distances[int(at)], distances[math.ceil(at)]
        return low + (high - low) * (at - int(at))

    prediction, truth = slow_surface(prediction), slow_surface(truth)
    return max(directed(prediction, truth), directed(truth, prediction))


def random_volumes(count):
    """Pairs of masks, sparse to nearly full, touching the borders, with another spacing along each axis."""
    generator = torch.Generator().manual_seed(1)
    for index in range(count):
        shape = torch.randint(1, 9, (3,), generator=generator).tolist()
        density = (0.05, 0.4, 0.9)[index % 3]
        volumes = [torch.rand(shape, generator=generator) < density for _ in range(2)]
        spacing = (0.3 + 4 * torch.rand(3, generator=generator)).tolist()
        if volumes[0].any() and volumes[1].any():
            yield *volumes, spacing


def test_hd95_equals_a_double_loop():
    compared = 0
    for prediction, truth, spacing in random_volumes(24):
        expected = slow_hd95(prediction, truth, spacing)
        assert metrics.hd95(prediction, truth, spacing) == pytest.approx(expected, rel=1e-5, abs=1e-5)
        compared += 1
    assert compared > 15


def test_hd95_uses_the_spacing_of_each_axis_and_the_larger_direction():
    truth = torch.zeros(10, 12, 14, dtype=torch.bool)
    truth[2, 3, 4] = True
    for axis, spacing in enumerate((5.0, 0.7, 0.8)):
        moved = truth.roll(3, axis)
        assert metrics.hd95(moved, truth, (5.0, 0.7, 0.8)) == pytest.approx(3 * spacing)
    both = truth | truth.roll(
        8, 2
    )  # everything in the truth is found, but half of the prediction is 8 columns away
    assert metrics.hd95(both, truth, (1, 1, 1)) == pytest.approx(metrics.hd95(truth, both, (1, 1, 1)))
    assert metrics.hd95(both, truth, (1, 1, 1)) == pytest.approx(0.95 * 8)


def test_hd95_of_equal_and_of_empty_masks():
    full, empty = torch.ones(3, 4, 5, dtype=torch.bool), torch.zeros(3, 4, 5, dtype=torch.bool)
    assert metrics.hd95(full, full, (1, 1, 1)) == 0.0
    assert metrics.hd95(full, empty, (1, 1, 1)) is None
    assert metrics.hd95(empty, full, (1, 1, 1)) is None
    assert metrics.hd95(empty, empty, (1, 1, 1)) is None


def test_surface_is_a_hull_and_the_volume_border_counts_as_outside():
    full = torch.ones(4, 5, 6, dtype=torch.bool)
    assert int(metrics.surface(full).sum()) == 4 * 5 * 6 - 2 * 3 * 4
    assert not metrics.surface(torch.zeros(4, 5, 6, dtype=torch.bool)).any()


def test_percentile_interpolates_like_torch_quantile():
    values = torch.rand(37, generator=torch.Generator().manual_seed(2))
    for q in (0.0, 0.5, 0.95, 1.0):
        assert metrics.percentile(values, q) == pytest.approx(float(values.double().quantile(q)))
    assert metrics.percentile(torch.tensor([3.0]), 0.95) == 3.0


@pytest.mark.filterwarnings("ignore")
def test_dice_and_hd95_equal_monai_where_the_truth_is_not_empty():
    pytest.importorskip("scipy", reason="monai's distances need scipy")
    monai = pytest.importorskip("monai.metrics", reason="pip install monai scipy to compare with it")
    for prediction, truth, spacing in random_volumes(30):
        pair = {
            "y_pred": prediction[None, None].float(),
            "y": truth[None, None].float(),
            "include_background": True,
        }
        expected = float(monai.compute_hausdorff_distance(**pair, percentile=95, spacing=spacing))
        assert metrics.hd95(prediction, truth, spacing) == pytest.approx(expected, rel=1e-5, abs=1e-5)
        counts = metrics.dice_counts(prediction.long(), truth.long(), 2)
        assert metrics.case_dice(counts)[1] == pytest.approx(float(monai.compute_dice(**pair)), rel=1e-6)


def test_sign_flip_p_values_by_hand():
    """Of 2^n equally likely signs, those whose sum is as large."""
    assert metrics.sign_flip_test([1.0, 2.0, 3.0]) == 2 / 8  # +++ and ---
    assert metrics.sign_flip_test([1.0, 2.0, -3.0]) == 1.0
    assert metrics.sign_flip_test([1.0, 1.0, 1.0, -1.0]) == (2 + 8) / 16  # sums of 4 and of 2
    assert metrics.sign_flip_test([0.5] * 16) == 2 / 2**16


def test_sign_flips_by_chance_agree_with_the_t_test():
    """For normal differences the two have nearly the same p: n = 40, t = 2 has p = 0.0525 (tables)."""
    values = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values = (values - values.mean()) / values.std() + 2 / 40**0.5
    assert metrics.sign_flip_test(values.tolist()) == pytest.approx(0.0525, abs=0.01)
