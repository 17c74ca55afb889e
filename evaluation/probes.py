"""Probes of frozen features: nearest neighbours, logistic regression, support vector machines.

A probe is judged on the slices of cases that it has not seen, and what it leaves open (a number of
neighbours, a penalty) is chosen on validation cases, or without them by folds of training cases.

    knn        neighbours weighted by exp(cosine / 0.07)
    logistic   L-BFGS on standardised features, one penalty for all classes
    svm        squared hinge on L2-normalised features, positives weighted twice, one penalty a class, by
               3 folds of training cases: the protocol of VOC07 (Goyal et al., arXiv 1905.01235)
    lowshot    the same machine on k training cases, five draws of them

Arrays: features (N, D) float32; targets (N, K) of 0 and 1, or (N,) class numbers; scores (N, K), the higher
the likelier, NaN for a class that all or none of the training slices have; groups (N,), the cases.
"""

import warnings
from dataclasses import dataclass, field, replace

import numpy as np

from engine.config import ConfigError
from evaluation.scores import class_values, main_value, mean, one_hot, scikit_learn, told_apart

TEMPERATURE = 0.07
NEIGHBOURS = (10, 20, 100, 200)
LOGISTIC_C = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
SVM_C = (2.0**-6, 2.0**-3, 1.0, 10.0, 100.0)
POSITIVE_WEIGHT = 2
FOLDS = 3
LEAST = 1e-300  # probability
LOWSHOT_CASES = (1, 2, 4, 8, 16)
LOWSHOT_DRAWS = 5


@dataclass
class Task:
    """What is to be told from what, and by whom: rows of all arrays."""

    kind: str  # "multi" or "single"
    classes: list[str]
    targets: np.ndarray
    groups: np.ndarray
    train: np.ndarray
    val: np.ndarray | None
    test: np.ndarray
    seed: int = 0

    def value(self, rows: np.ndarray, scores: np.ndarray) -> float | None:
        return main_value(self.kind, self.targets[rows], scores)

    def one_hot(self, rows: np.ndarray) -> np.ndarray:
        return one_hot(self.kind, self.targets[rows], len(self.classes))


@dataclass
class Probed:
    """What a probe found with one kind of feature."""

    scores: dict[str, list[np.ndarray]]  # of the test slices, several draws; by number of cases, or {"": ...}
    chosen: dict[str, object]
    value: float | None  # on the validation cases or folds, by which kinds of features are chosen
    details: dict = field(default_factory=dict)


def folds_of(task: Task, rows: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training rows, held-out rows) of each fold; a case is in one fold as a whole."""
    cases = len(np.unique(task.groups[rows]))
    if cases < count:
        raise ConfigError(f"{count} folds of cases are needed, and there are {cases} cases with labels")
    select, y = scikit_learn().model_selection, task.targets[rows]
    stratified = task.kind == "single" and np.bincount(y).max() >= count
    kind = select.StratifiedGroupKFold if stratified else select.GroupKFold
    splitter = kind(count, shuffle=True, random_state=task.seed)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of rare classes: we name those
        return [(rows[a], rows[b]) for a, b in splitter.split(rows, y, task.groups[rows])]


def choosing_folds(task: Task) -> list[tuple[np.ndarray, np.ndarray]]:
    """The rows on which candidates are fitted, and those on which they are compared."""
    return folds_of(task, task.train, FOLDS) if task.val is None else [(task.train, task.val)]


def choose(task: Task, fit, features: np.ndarray, candidates) -> tuple[object, float | None]:
    """The candidate with the best value on what it was not fitted on, and that value; the first where none
    has a value."""
    found = []
    folds = choosing_folds(task)
    rows = np.concatenate([held for _, held in folds])
    for candidate in candidates:
        scores = [fit(task, features, train, held, candidate) for train, held in folds]
        found.append(task.value(rows, np.concatenate(scores)))
    best = int(np.argmax([-1 if value is None else value for value in found]))
    return candidates[best], found[best]


# ---- Nearest neighbours --------------------------------------------------------------------------


def knn(task: Task, features: np.ndarray) -> Probed:
    features = l2_normalised(features)
    k, value = choose(task, knn_scores, features, NEIGHBOURS)
    by_k = {}
    for each in NEIGHBOURS:
        scores = knn_scores(task, features, task.train, task.test, each)
        by_k[str(each)] = task.value(task.test, scores)
        if each == k:
            best = scores
    return Probed({"": [best]}, {"k": k}, value, {"by_k": by_k})


def knn_scores(task: Task, features: np.ndarray, train: np.ndarray, rows: np.ndarray, k: int) -> np.ndarray:
    """The share of each class among the k nearest training slices, weighted by exp(cosine / 0.07); of all
    training slices if they are fewer. Features are L2-normalised."""
    cosines = features[rows] @ features[train].T
    k = min(k, len(train))
    nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
    weights = np.exp(np.take_along_axis(cosines, nearest, 1).astype(np.float64) / TEMPERATURE)
    truth = task.one_hot(train)
    votes = truth[nearest]  # (rows, k, K)
    scores = np.einsum("nk,nkc->nc", weights, votes) / weights.sum(1, keepdims=True)
    return np.where(told_apart(truth), scores, np.nan)


def l2_normalised(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


# ---- Linear models -------------------------------------------------------------------------------


def logistic(task: Task, features: np.ndarray) -> Probed:
    features = rotated(standardised(features, task.train), task.train)
    c, value = choose(task, logistic_scores, features, LOGISTIC_C)
    return Probed({"": [logistic_scores(task, features, task.train, task.test, c)]}, {"C": c}, value)


def logistic_scores(task: Task, features: np.ndarray, train, rows, c: float) -> np.ndarray:
    def fit(targets, k=None):
        model = scikit_learn().linear_model.LogisticRegression(C=c, solver="lbfgs", max_iter=1000)
        return model.fit(features[train], targets)

    if task.kind == "multi":
        return by_class(fit, task.targets[train], features[rows])
    found = np.full((len(rows), len(task.classes)), np.nan)
    known = np.unique(task.targets[train])
    if len(known) > 1:
        found[:, known] = fit(task.targets[train]).predict_proba(features[rows])
    return np.log(np.maximum(found, LEAST))


def svm(task: Task, features: np.ndarray) -> Probed:
    features = rotated(l2_normalised(features), task.train)
    penalties, value = svm_penalties(task, features, folds_of(task, task.train, FOLDS))
    if task.val is not None:  # by which kinds of features are chosen then
        value = task.value(task.val, svm_scores(task, features, task.train, task.val, penalties))
    scores = svm_scores(task, features, task.train, task.test, penalties)
    return Probed({"": [scores]}, {"C": dict(zip(task.classes, penalties))}, value)


def svm_penalties(task: Task, features: np.ndarray, folds) -> tuple[list[float], float | None]:
    """For each class the penalty with the best average precision over the held-out rows of all folds, and the
    value that they reach together."""
    rows = np.concatenate([held for _, held in folds])
    found = []
    for c in SVM_C:
        same = [c] * len(task.classes)
        found.append(np.concatenate([svm_scores(task, features, *fold, same) for fold in folds]))
    truth = task.one_hot(rows)
    values = [class_values("multi", truth, scores)["mAP"][1] for scores in found]
    best = np.argmax([[value or 0.0 for value in one] for one in values], axis=0)
    together = np.stack([found[i][:, k] for k, i in enumerate(best)], axis=1)
    return [SVM_C[i] for i in best], task.value(rows, together)


def svm_scores(task: Task, features: np.ndarray, train, rows, penalties: list[float]) -> np.ndarray:
    def fit(targets, k):
        model = scikit_learn().svm.LinearSVC(
            C=penalties[k],
            loss="squared_hinge",
            class_weight={1: POSITIVE_WEIGHT},
            max_iter=2000,
            dual=False,  # twenty times as fast at C = 100, and converges
        )
        return model.fit(features[train], targets)

    return by_class(fit, task.one_hot(train), features[rows])


def lowshot(task: Task, features: np.ndarray) -> Probed:
    """Of each number of cases the penalty is chosen with the first draw, on the validation cases; without
    them it is 1."""
    features = rotated(l2_normalised(features), task.train)
    classes, scores, values, chosen = len(task.classes), {}, [], {}
    for count, draws in lowshot_draws(task).items():
        c = 1.0
        if task.val is not None:

            def fit(task, features, train, rows, c):
                return svm_scores(task, features, train, rows, [c] * classes)

            c, value = choose(replace(task, train=draws[0]), fit, features, SVM_C)
            values.append(value)
        chosen[count] = c
        scores[count] = [svm_scores(task, features, rows, task.test, [c] * classes) for rows in draws]
    return Probed(scores, {"C": chosen}, mean(values))


def lowshot_draws(task: Task) -> dict[str, list[np.ndarray]]:
    """{k: the training rows of k cases, five times}; k cases of each class that there is, where a slice has
    one class."""
    groups, targets = task.groups[task.train], task.targets[task.train]
    if task.kind == "single":
        pools = [np.unique(groups[targets == k]) for k in np.unique(targets)]
    else:
        pools = [np.unique(groups)]
    enough = [count for count in LOWSHOT_CASES if count <= min(map(len, pools))]
    rng, draws = np.random.default_rng(task.seed), {}
    for count in enough:
        picked = [
            np.concatenate([rng.choice(pool, count, replace=False) for pool in pools])
            for _ in range(LOWSHOT_DRAWS)
        ]
        draws[str(count)] = [task.train[np.isin(groups, cases)] for cases in picked]
    return draws


def trainings(task: Task, mode: str) -> list[np.ndarray]:
    """The training rows of each model that is judged: all, or those of each low-shot draw."""
    draws = lowshot_draws(task) if mode == "lowshot" else {"": [task.train]}
    return [rows for some in draws.values() for rows in some]


def by_class(fit, targets: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Scores (N, K) of fit(column, k), a model for each column of targets (rows, K); NaN where a column says
    nothing, being all 0 or all 1."""
    found = np.full((len(features), targets.shape[1]), np.nan)
    with warnings.catch_warnings(action="ignore", category=scikit_learn().exceptions.ConvergenceWarning):
        for k in np.flatnonzero(told_apart(targets)):
            found[:, k] = fit(targets[:, k], k).decision_function(features)
    return found


def standardised(features: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance over the training slices; features that are constant there become 0."""
    features = features.astype(np.float64)  # L-BFGS fails in float32
    mean, deviation = features[train].mean(0), features[train].std(0)
    return (features - mean) * np.where(deviation > 1e-6, 1 / np.maximum(deviation, 1e-6), 0)


def rotated(features: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Where there are more features than training slices: their coordinates in the space that these span.

    A linear model with an L2 penalty has its weights in that space, so that nothing changes but the time.
    """
    if features.shape[1] <= len(train):
        return features
    basis, _ = np.linalg.qr(features[train].T.astype(np.float64))
    return features @ basis.astype(features.dtype)


# ---- All kinds of features -----------------------------------------------------------------------

PROBES = {"knn": knn, "logistic": logistic, "svm": svm, "lowshot": lowshot}


def best_kind(found: dict[str, Probed]) -> str:
    """The kind of feature that was best on validation cases or folds; the last mean where nothing tells."""
    values = {name: probed.value for name, probed in found.items()}
    if None in values.values():
        return [name for name in values if not name.endswith("grid")][-1]
    return max(values, key=values.get)
