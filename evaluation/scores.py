"""Metrics of classification, with 95 % intervals by bootstrap over cases.

Multi-label: mean average precision (mAP) and AUROC. Single-label: accuracy (by class: the share of its slices
that are recognised) and AUROC, one class against the rest. A class that all or none of the slices have has
no value, and is left out of the mean. So is one that all or none of the training slices had: its scores are
NaN and do not count; nor do, in accuracy, the slices of such a class.
"""

import numpy as np

from engine.config import ConfigError

DRAWS = 500  # of cases, for an interval
NAMES = {"multi": ("mAP", "AUROC"), "single": ("accuracy", "AUROC")}


def scikit_learn():
    """scikit-learn, which is an extra. Raises ConfigError without it."""
    try:
        import sklearn.exceptions
        import sklearn.linear_model
        import sklearn.metrics
        import sklearn.model_selection
        import sklearn.svm
    except ImportError:
        raise ConfigError("classification needs scikit-learn: pip install scikit-learn") from None
    return sklearn


def one_hot(kind: str, targets: np.ndarray, classes: int) -> np.ndarray:
    """(N, K) of 0 and 1."""
    return targets if kind == "multi" else np.eye(classes, dtype=np.uint8)[targets]


def told_apart(truth: np.ndarray) -> np.ndarray:
    """(K,) bool: the classes that some of these slices, (N, K) of 0 and 1, have and some have not."""
    return (truth.min(0) < truth.max(0)) if len(truth) else np.zeros(truth.shape[1], bool)


def class_values(kind: str, targets: np.ndarray, scores: np.ndarray) -> dict[str, tuple]:
    """{metric: (mean, [by class])}; None where it is not defined.

    targets: (N, K) of 0 and 1, or (N,) class numbers; scores: (N, K), the higher the likelier; NaN does not
    count.
    """
    truth, known = one_hot(kind, targets, scores.shape[1]), ~np.isnan(scores)
    pairs = [ranked(y[ok], s[ok]) for y, s, ok in zip(truth.T, scores.T, known.T)]
    precision, auroc = map(list, zip(*pairs))
    if kind == "multi":
        return {"mAP": (mean(precision), precision), "AUROC": (mean(auroc), auroc)}
    right = np.where(known, scores, -np.inf).argmax(1) == targets
    judged = known[np.arange(len(targets)), targets]
    recall = [mean(right[judged & (targets == k)].tolist()) for k in range(scores.shape[1])]
    return {"accuracy": (mean(right[judged].tolist()), recall), "AUROC": (mean(auroc), auroc)}


def ranked(truth: np.ndarray, scores: np.ndarray) -> tuple[float | None, float | None]:
    """Average precision, not interpolated, and area under the ROC curve, of (N,) truths of 0 and 1; None
    unless there are both. Equal scores count at once. As scikit-learn's, which takes sixty times as long to
    check what it is given, and the bootstrap needs thousands of them."""
    if not told_apart(truth[:, None])[0]:
        return None, None
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # of runs of equal scores
    right = np.append(0, np.cumsum(truth[order], dtype=float)[ends])
    taken = np.append(0, ends + 1)
    recall, false = right / right[-1], (taken - right) / (taken[-1] - right[-1])
    precision = right[1:] / taken[1:]
    area = np.diff(false) * (recall[1:] + recall[:-1]) / 2
    return float((np.diff(recall) * precision).sum()), float(area.sum())


def mean(values: list[float | None]) -> float | None:
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def main_value(kind: str, targets: np.ndarray, scores: np.ndarray) -> float | None:
    """The first metric, by which settings are chosen; None where it is not defined."""
    return next(iter(class_values(kind, targets, scores).values()))[0]


def over_draws(kind: str, targets: np.ndarray, all_scores: list[np.ndarray]) -> dict[str, tuple]:
    """{metric: (mean, [by class], [of each draw])} of several scores of the same slices, as several draws of
    training cases give them. A class has the mean over the draws in which it has a value, also in the others,
    or the means would jump with the classes that they go over."""
    each, found = [class_values(kind, targets, scores) for scores in all_scores], {}
    for name in NAMES[kind]:
        values, by_class = zip(*(one[name] for one in each))
        classes = [mean(own) for own in zip(*by_class)]
        if name != "accuracy":
            values = [mean(filled(own, classes)) for own in by_class]
        found[name] = mean(values), classes, values
    return found


def filled(values: list, others: list) -> list:
    return [other if value is None else value for value, other in zip(values, others)]


def drawn_rows(groups: np.ndarray, draws: int) -> list[np.ndarray]:
    """Rows of as many cases as there are, drawn with replacement, always the same draws; none of one case."""
    names, members = np.unique(groups, return_inverse=True)
    rows = [np.flatnonzero(members == i) for i in range(len(names))]
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(names), size=(draws if len(names) > 1 else 0, len(names)))
    return [np.concatenate([rows[i] for i in some]) for some in chosen]


def bootstrap(
    kind: str, targets: np.ndarray, all_scores: list[np.ndarray], groups: np.ndarray, draws: int
) -> dict[str, np.ndarray]:
    """{metric: its means over draws of cases}, NaN where undefined.

    A class that a draw leaves without positive slices has its value over all cases there. Of several scores
    of the same slices each draw takes the next.
    """
    found = {name: [] for name in NAMES[kind]}
    whole = over_draws(kind, targets, all_scores)
    for number, rows in enumerate(drawn_rows(groups, draws)):
        scores = all_scores[number % len(all_scores)][rows]
        for name, (value, by_class) in class_values(kind, targets[rows], scores).items():
            if name != "accuracy":
                value = mean(filled(by_class, whole[name][1]))
            found[name].append(np.nan if value is None else value)
    return {name: np.array(values) for name, values in found.items()}


def interval(values: np.ndarray) -> list[float] | None:
    values = values[np.isfinite(values)]
    return [float(end) for end in np.quantile(values, (0.025, 0.975))] if len(values) else None


def measure(
    kind: str,
    classes: list[str],
    targets: np.ndarray,
    all_scores: list,
    groups: np.ndarray,
    draws: int = DRAWS,
) -> tuple[dict, dict]:
    """The metrics as results.json has them, and their bootstrap draws. Of several scores of the same slices:
    the means over them, and "deviation" from one to another."""
    drawn = bootstrap(kind, targets, all_scores, groups, draws)
    metrics = {}
    for name, (value, by_class, values) in over_draws(kind, targets, all_scores).items():
        metrics[name] = {"value": value, "interval": interval(drawn[name])}
        metrics[name]["classes"] = dict(zip(classes, by_class))
        if len(values) > 1:
            metrics[name]["deviation"] = None if None in values else float(np.std(values, ddof=1))
    return metrics, drawn
