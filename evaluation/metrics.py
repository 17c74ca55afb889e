"""Segmentation metrics: Dice per organ and case, dataset Dice, and the 95 % Hausdorff distance in mm.

Dice is counted slice by slice (`dice_counts`, (K, 3) integers that add up over slices), so that no volume has
to stay in memory. The Hausdorff distance needs both masks of a case as volumes. Needs torch and nothing else
of this project.

    counts = sum(dice_counts(prediction, truth, num_classes) for the slices of a case)
    case_dice(counts)                      one value a class, None where it is not defined
    dataset_dice([counts of all cases])    the number that mmseg calls mDice
    hd95(prediction == c, truth == c, spacing)

Conventions, all written down where they are applied: class 0 is background; label 255 is "ignore": such
pixels count nowhere; a value that is not defined is None and is left out of every mean.
"""

import torch
from torch import Tensor

IGNORE = 255


# ---- Dice ----------------------------------------------------------------------------------------


def dice_counts(prediction: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Counts of one slice or volume, (K, 3) int64: per class the pixels in both masks, predicted, true.

    prediction and truth: integer tensors of one shape, with classes 0..K-1; pixels whose truth is 255 are
    left out of all three counts. Counts of slices add up to the counts of their case, counts of cases to
    those of the dataset.
    Raises ValueError for different shapes and for labels outside 0..K-1.
    """
    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and truth {tuple(truth.shape)} differ in shape"
        )
    counted = truth != IGNORE
    prediction, truth = prediction[counted].long(), truth[counted].long()
    for name, labels in (("prediction", prediction), ("truth", truth)):
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(f"{name} holds label {int(labels.max())}, with {num_classes} classes")
    pairs = torch.bincount(truth * num_classes + prediction, minlength=num_classes**2)
    confusion = pairs.view(num_classes, num_classes)  # truth by prediction
    return torch.stack([confusion.diagonal(), confusion.sum(dim=0), confusion.sum(dim=1)], dim=1)


def case_dice(counts: Tensor) -> list[float | None]:
    """Dice = 2 |P and T| / (|P| + |T|) per class from (K, 3) counts, 0 to 1.

    Both empty: None (there is nothing to find and nothing was found; left out of means). Empty truth with a
    prediction: 0.
    MONAI leaves the second case out too; where the truth is not empty both agree.
    """
    return [2 * both / (found + true) if found + true else None for both, found, true in counts.tolist()]


def mean_or_none(values) -> float | None:
    """Mean of the values that are not None; None if there is none."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def mean_over_cases(cases: dict[str, dict[str, float | None]]) -> dict[str, float | None]:
    """{case: {organ: value}} -> {organ: mean over the cases where it is defined}.

    The mean over organs, `mean_or_none(result.values())`, is then the figure that papers quote: cases first,
    organs second.
    """
    organs = next(iter(cases.values()), {})
    return {organ: mean_or_none(case[organ] for case in cases.values()) for organ in organs}


def interval_over_cases(cases: dict[str, dict[str, float | None]], draws: int = 2000) -> list[float] | None:
    """95 % interval of the mean over cases, then over organs: how it varies if cases are drawn anew, with
    replacement (percentile bootstrap, fixed seed). None with fewer than two cases that have a value."""
    rows = [[torch.nan if value is None else value for value in case.values()] for case in cases.values()]
    values = torch.tensor(rows, dtype=torch.float64)  # (cases, organs)
    values = values[~values.isnan().all(1)]
    if len(values) < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    drawn = values[torch.randint(len(values), (draws, len(values)), generator=generator)]
    means = drawn.nanmean(1).nanmean(1)
    return [percentile(means[~means.isnan()], q) for q in (0.025, 0.975)]


def dataset_dice(counts: Tensor) -> dict[str, float | list[float | None] | None]:
    """Dice of the whole dataset as if it were one image, from (K, 3) counts summed over all cases.

    What mmseg's `mDice` reports (there with background). Large cases weigh more, and a small organ missed in
    one case is hidden by the others: published numbers of this kind are not comparable with Dice per case.
    Returns {"mean": without background, "mean_with_background", "classes": per class, background first}.
    """
    classes = case_dice(counts)
    return {
        "mean": mean_or_none(classes[1:]),
        "mean_with_background": mean_or_none(classes),
        "classes": classes,
    }


def sign_flip_test(differences: list[float], draws: int = 100_000) -> float:
    """Two-sided p of paired differences: how often their mean is as far from 0 if each sign is a coin's toss.

    Fisher's randomisation test: no assumption on the distribution. All 2^n signs for n <= 16, else random
    ones (fixed seed). The smallest p that n pairs can give is 2^(1 - n).
    """
    values = torch.tensor(differences, dtype=torch.float64)
    if (n := len(values)) <= 16:
        signs = 1 - 2 * (torch.arange(2**n)[:, None] >> torch.arange(n) & 1).double()
    else:
        generator = torch.Generator().manual_seed(0)
        signs = 1 - 2 * torch.randint(2, (draws, n), generator=generator).double()
        signs[0] = 1  # what was observed is one of the possibilities
    means = (signs @ values).abs()
    return float((means >= means[0] * (1 - 1e-9)).double().mean())


# ---- Hausdorff distance --------------------------------------------------------------------------


def hd95(prediction: Tensor, truth: Tensor, spacing: tuple[float, float, float]) -> float | None:
    """95 % Hausdorff distance in mm between two binary volumes (S, H, W); spacing (slice, row, column) in mm.

    Distances run from each surface voxel of one mask to the nearest surface voxel of the other, between voxel
    centres; the result is the larger of the two directed 95th percentiles (linear interpolation). This is
    MONAI's `compute_hausdorff_distance(percentile=95, spacing=...)`. Exact, not sampled.
    One or both masks empty: None, left out of means (MONAI: inf or NaN). A missed organ shows in its Dice.
    """
    if prediction.shape != truth.shape or prediction.dim() != 3:
        raise ValueError(
            f"two volumes (S, H, W) expected, got {tuple(prediction.shape)} and {tuple(truth.shape)}"
        )
    prediction, truth = prediction.bool(), truth.bool()
    if not prediction.any() or not truth.any():
        return None
    box = bounding_box(prediction | truth)
    prediction, truth = surface(prediction[box]), surface(truth[box])
    there = surface_distances(prediction, truth, spacing)
    back = surface_distances(truth, prediction, spacing)
    return max(percentile(there, 0.95), percentile(back, 0.95))


def bounding_box(mask: Tensor) -> tuple[slice, ...]:
    """The smallest box (a slice object per axis) that holds all voxels of a non-empty mask."""
    box = []
    for axis in range(mask.dim()):
        used = mask.movedim(axis, 0).flatten(1).any(1).nonzero()
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return tuple(box)


def surface(mask: Tensor) -> Tensor:
    """Voxels of a boolean volume (S, H, W) that a 6-connected erosion removes; its border faces outside."""
    inside = mask
    for axis, length in enumerate(mask.shape):
        border = torch.zeros_like(mask.narrow(axis, 0, 1))
        padded = torch.cat([border, mask, border], dim=axis)
        inside = inside & padded.narrow(axis, 0, length) & padded.narrow(axis, 2, length)
    return mask & ~inside


def surface_distances(source: Tensor, target: Tensor, spacing: tuple[float, float, float]) -> Tensor:
    """Distance in mm from each true voxel of `source` to the nearest of `target`; (S, H, W), not empty.

    Two exact steps, since squared distances add over axes: the distance map of each target slice in its own
    plane, then at each source voxel the minimum over all slices of in-plane plus between-slices distance.
    Memory: a few volumes.
    """
    slice_mm, row_mm, column_mm = spacing
    occupied = target.flatten(1).any(1).nonzero().flatten()  # (T,) slices in which there is a target at all
    in_plane = torch.stack(
        [squared_distance_map(target[z], row_mm, column_mm) for z in occupied]
    )  # (T, H, W)
    z, y, x = source.nonzero(as_tuple=True)
    nearest = torch.full(z.shape, torch.inf, device=source.device)
    for slice_map, target_z in zip(in_plane, occupied):
        nearest = torch.minimum(nearest, slice_map[y, x] + ((z - target_z) * slice_mm).square())
    return nearest.sqrt()


def squared_distance_map(target: Tensor, row_mm: float, column_mm: float) -> Tensor:
    """Squared distance in mm^2 of each pixel of a slice (H, W) to its nearest true one; (H, W) float32."""
    height, width = target.shape
    # Within each row: the nearest true column to the left and to the right, infinitely far in empty rows.
    column = torch.arange(width, device=target.device, dtype=torch.float32).expand(height, width)
    left = torch.where(target, column, -torch.inf).cummax(1).values
    right = torch.where(target, column, torch.inf).flip(1).cummin(1).values.flip(1)
    in_row = (torch.minimum(column - left, right - column) * column_mm).square()
    # Across rows: d rows away costs (d * row_mm)^2 more; beyond the largest value left, no row is nearer.
    nearest = in_row.clone()
    for d in range(1, height):
        extra = (d * row_mm) ** 2
        if extra >= nearest.max():
            break
        torch.minimum(nearest[d:], in_row[:-d] + extra, out=nearest[d:])
        torch.minimum(nearest[:-d], in_row[d:] + extra, out=nearest[:-d])
    return nearest


def percentile(values: Tensor, q: float) -> float:
    """The q-quantile (0..1) with linear interpolation; unlike torch.quantile for any number of values."""
    values = values.flatten().double().sort().values
    position = q * (len(values) - 1)
    low = int(position)
    high = min(low + 1, len(values) - 1)
    return float(values[low] + (values[high] - values[low]) * (position - low))
