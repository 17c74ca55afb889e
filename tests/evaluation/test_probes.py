"""Probes against scikit-learn called directly, a loop, and chance; metrics; who is on which side."""

import warnings
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("sklearn")
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from engine.config import ConfigError
from evaluation import probes
from evaluation.probes import Task, best_kind, folds_of, knn, logistic, lowshot, lowshot_draws, svm
from evaluation.scores import class_values, main_value, measure, over_draws


def task_of(kind="multi", cases=12, slices=10, dims=24, classes=3, seed=0, val=True, signal=1.0):
    """Slices of `cases`, a third each for training, validation and test, and features that tell classes."""
    rng = np.random.default_rng(seed)
    count = cases * slices
    groups = np.repeat([f"case{i}" for i in range(cases)], slices)
    directions = rng.normal(size=(classes, dims))
    if kind == "multi":
        targets = rng.integers(0, 2, (count, classes)).astype(np.uint8)
        told = targets @ directions
    else:
        targets = rng.integers(0, classes, count)
        told = directions[targets]
    features = (signal * told + rng.normal(size=(count, dims))).astype(np.float32)
    third = count // 3
    rows = np.arange(count)
    parts = rows[:third], rows[third : 2 * third] if val else None, rows[2 * third :]
    return Task(kind, [f"class {k}" for k in range(classes)], targets, groups, *parts, seed), features


def test_nearest_neighbours_against_a_loop():
    task, features = task_of()
    found = knn(task, features)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    k = found.chosen["k"]
    for row, scores in zip(task.test, found.scores[""][0]):
        near = sorted(task.train, key=lambda i: -(unit[i] @ unit[row]))[:k]
        weights = [np.exp(unit[i] @ unit[row] / 0.07) for i in near]
        votes = sum(w * task.targets[i] for w, i in zip(weights, near))
        np.testing.assert_allclose(scores, votes / sum(weights), rtol=1e-4)
    assert set(found.details["by_k"]) == {"10", "20", "100", "200"}


@pytest.mark.parametrize("kind", ("multi", "single"))
def test_logistic_regression_against_scikit_learn(kind):
    task, features = task_of(kind, dims=60)  # more features than training slices: rotated
    found = logistic(task, features)
    scaler = StandardScaler().fit(features[task.train].astype(np.float64))
    train, test = (scaler.transform(features[rows]) for rows in (task.train, task.test))
    model = LogisticRegression(C=found.chosen["C"], max_iter=1000, tol=1e-6)
    if kind == "multi":
        columns = task.targets[task.train].T
        scores = np.stack([model.fit(train, y).decision_function(test) for y in columns], axis=1)
    else:
        scores = model.fit(train, task.targets[task.train]).predict_log_proba(test)
    np.testing.assert_allclose(found.scores[""][0], scores, atol=0.02)


@pytest.mark.parametrize("kind", ("multi", "single"))
def test_support_vector_machines_against_scikit_learn(kind):
    task, features = task_of(kind, dims=60)
    found = svm(task, features)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for k, c in enumerate(found.chosen["C"].values()):
        y = task.targets[task.train][:, k] if kind == "multi" else task.targets[task.train] == k
        model = LinearSVC(C=c, class_weight={1: 2}, dual=False, tol=1e-6).fit(unit[task.train], y.astype(int))
        np.testing.assert_allclose(
            found.scores[""][0][:, k], model.decision_function(unit[task.test]), atol=0.02
        )


def test_low_shot_draws_whole_cases():
    task, features = task_of(cases=15)
    draws = lowshot_draws(task)
    assert list(draws) == ["1", "2", "4"]  # of five training cases
    for count, rows in draws.items():
        assert len(rows) == 5
        for some in rows:
            assert len(np.unique(task.groups[some])) == int(count) and len(some) == 10 * int(count)
            assert {*some} <= {*task.train}
    found = lowshot(task, features)
    assert [len(found.scores[count]) for count in draws] == [5, 5, 5]
    values = [class_values("multi", task.targets[task.test], s)["mAP"][0] for s in found.scores["4"]]
    metrics, _ = measure(
        "multi", task.classes, task.targets[task.test], found.scores["4"], task.groups[task.test], 20
    )
    assert metrics["mAP"]["value"] == pytest.approx(np.mean(values))
    assert metrics["mAP"]["deviation"] == pytest.approx(np.std(values, ddof=1))
    single, _ = task_of("single", cases=15)
    for rows in lowshot_draws(single)["1"]:
        assert {*single.targets[rows]} == {0, 1, 2}  # of each class a case


@pytest.mark.parametrize("val", (True, False))
@pytest.mark.parametrize("name", probes.PROBES)
def test_features_that_know_the_case_alone_are_at_chance(name, val):
    """A label of the case, and features that tell cases apart but not labels: whoever sees a case on both
    sides is always right."""
    rng = np.random.default_rng(3)
    task, _ = task_of("single", cases=60, slices=4, classes=2, val=val)
    labels = np.arange(60) % 2
    task.targets = np.repeat(labels, 4)
    features = np.repeat(rng.normal(size=(60, 40)), 4, axis=0).astype(np.float32)
    features += 0.01 * rng.normal(size=features.shape).astype(np.float32)
    found = probes.PROBES[name](task, features)
    scores = [one for draws in found.scores.values() for one in draws]
    auroc = np.mean([class_values("single", task.targets[task.test], one)["AUROC"][0] for one in scores])
    assert 0.25 < auroc < 0.75
    if name != "lowshot" and found.value is not None:
        assert found.value < 0.8  # what it was chosen by does not see the case either
    leaking = Task(
        "single",
        task.classes,
        task.targets,
        np.arange(240).astype(str),
        task.train[::2],
        None,
        task.train[1::2],
    )
    if name == "knn":
        assert (
            class_values("single", leaking.targets[leaking.test], knn(leaking, features).scores[""][0])[
                "AUROC"
            ][0]
            > 0.95
        )


@pytest.mark.parametrize("kind", ("multi", "single"))
def test_folds_divide_cases(kind):
    task, _ = task_of(kind, val=False)
    folds = folds_of(task, task.train, 3)
    assert sorted(np.concatenate([held for _, held in folds])) == [*task.train]
    for train, held in folds:
        assert not {*task.groups[train]} & {*task.groups[held]}
    with pytest.raises(ConfigError, match="9 folds of cases are needed, and there are 4 cases"):
        folds_of(task, task.train, 9)


def test_the_kind_of_feature_is_chosen_without_the_test_cases():
    task, features = task_of(signal=1.0)
    _, noise = task_of(signal=0.0, seed=5)
    found = {"noise mean": logistic(task, noise), "told mean": logistic(task, features)}
    assert best_kind(found) == "told mean"
    for probed in found.values():
        probed.value = None
    assert best_kind(found | {"x grid": found["noise mean"]}) == "told mean"  # the last mean


def without(task, kind, rows, k=1, present=False):
    """The task with a class that none, or all, of these rows have."""
    targets = task.targets.copy()
    if kind == "multi":
        targets[rows, k] = present
    else:
        targets[rows] = np.where(targets[rows] == k, k + 1, targets[rows])
    return replace(task, targets=targets)


@pytest.mark.parametrize("name", probes.PROBES)
@pytest.mark.parametrize("kind, present", (("multi", False), ("multi", True), ("single", False)))
def test_a_class_that_training_cannot_teach_has_no_value(name, kind, present):
    """For scikit-learn a training set without one side is an error; each other class is judged as if there
    were none such."""
    task, features = task_of(kind, cases=15)
    task = without(task, kind, task.train, present=present)
    found = probes.PROBES[name](task, features)
    test, others = task.targets[task.test], [0, 2]
    for scores in (one for draws in found.scores.values() for one in draws):
        assert np.isnan(scores[:, 1]).all() and np.isfinite(scores[:, others]).all()
        for values in class_values(kind, test, scores).values():
            assert values[1][1] is None and None not in [values[1][k] for k in others]
    if kind == "multi":
        rest = replace(task, classes=["class 0", "class 2"], targets=task.targets[:, others])
        same = probes.PROBES[name](rest, features)
        for count, draws in same.scores.items():
            np.testing.assert_allclose(np.stack(draws), np.stack(found.scores[count])[..., others])
        assert same.value == found.value
    column = (task.targets[task.train] if kind == "multi" else np.eye(3)[task.targets[task.train]])[:, 1]
    with pytest.raises(ValueError, match="class"):
        LogisticRegression().fit(features[task.train], column)


@pytest.mark.parametrize("name", probes.PROBES)
def test_a_class_of_one_case_has_no_value_in_folds(name):
    """Its fold has not seen it, the others have nothing of it to judge: equal scores in one fold beside true
    ones in the others would give it an AUROC by construction."""
    task, features = task_of("single", cases=12, slices=6, classes=2, val=False)
    task.targets[:] = np.repeat(np.arange(12) % 2, 6)
    task.targets[:6] = 2
    task.classes.append("rare")
    scores, rows = [], []
    for train, held in folds_of(task, np.arange(72), 4):
        found = probes.PROBES[name](replace(task, train=train, test=held), features)
        scores.append(next(iter(found.scores.values()))[0])
        rows.append(held)
    rows, scores = np.concatenate(rows), np.concatenate(scores)
    values = class_values("single", task.targets[rows], scores)
    assert [values[metric][1][2] for metric in ("accuracy", "AUROC")] == [None, None]
    others = task.targets[rows] != 2  # its slices do not count: nobody could recognise them
    recognised = np.nan_to_num(scores[others], nan=-np.inf).argmax(1) == task.targets[rows][others]
    assert values["accuracy"][0] == recognised.mean() and None not in values["AUROC"][1][:2]


@pytest.mark.parametrize("val", (True, False))
def test_nothing_to_choose_by_is_no_value(val):
    task, features = task_of("single", classes=2, val=val)
    task.targets[:] = np.arange(len(task.targets)) % 2
    if val:
        task.targets[task.val] = 1
        assert knn(task, features).value is not None  # accuracy is defined all the same
    task.targets[task.train] = 1
    found = {name: probe(task, features) for name, probe in probes.PROBES.items()}
    assert all(one.value is None for one in found.values())
    assert main_value("single", task.targets[task.test], found["svm"].scores[""][0]) is None
    assert best_kind({"a mean": found["knn"], "b grid": found["svm"]}) == "a mean"


def test_folds_of_fewer_slices_of_a_class_than_folds():
    targets, groups = np.array([0, 0, 0, 1, 1]), np.array([*"abcde"])
    task = Task("single", ["no", "yes"], targets, groups, np.arange(5), None, np.arange(5))
    assert len(folds_of(task, task.train, 4)) == 4


# ---- Metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [16, 1, 0])  # 1 and 0: with ties
def test_metrics_are_those_of_scikit_learn(digits):
    rng = np.random.default_rng(0)
    targets, scores = rng.integers(0, 2, (50, 3)), rng.normal(size=(50, 3)).round(digits)
    targets[:, 2] = 0  # a class of which the test slices have none
    found = class_values("multi", targets, scores)
    for name, metric in (("mAP", average_precision_score), ("AUROC", roc_auc_score)):
        expected = [metric(targets[:, k], scores[:, k]) for k in range(2)]
        assert found[name] == (pytest.approx(np.mean(expected)), [*map(pytest.approx, expected), None])
    single = rng.integers(0, 3, 50)
    value, recall = class_values("single", single, scores)["accuracy"]
    assert value == (scores.argmax(1) == single).mean()
    assert recall == [(scores.argmax(1)[single == k] == k).mean() for k in range(3)]


def test_undefined_values_are_those_of_scikit_learn():
    """Of one side alone its AUROC is undefined; its average precision of no positives is 0, which we leave
    out."""
    scores = np.arange(4.0)
    for truth in ([0, 0, 0, 0], [1, 1, 1, 1]):
        assert class_values("multi", np.array(truth)[:, None], scores[:, None])["AUROC"] == (None, [None])
        with warnings.catch_warnings(action="ignore"), suppress(ValueError):  # raised before 1.6
            assert np.isnan(roc_auc_score(truth, scores))
    targets, scores = np.array([[0], [1], [0], [1]]), np.array([[0.3], [0.2], [np.nan], [np.nan]])
    assert class_values("multi", targets, scores)["AUROC"] == (0.0, [0.0])  # of those with a score


def test_a_class_counts_with_the_draws_in_which_it_has_a_value():
    rng = np.random.default_rng(0)
    targets, scores = rng.integers(0, 2, (40, 2)), rng.normal(size=(3, 40, 2))
    scores[0, :, 1] = np.nan  # as a low-shot draw without it
    value, classes, each = over_draws("multi", targets, [*scores])["AUROC"]
    own = [[roc_auc_score(targets[:, k], one[:, k]) for one in scores[k:]] for k in range(2)]
    assert classes == pytest.approx([np.mean(own[0]), np.mean(own[1])]) and value == pytest.approx(
        np.mean(classes)
    )
    assert each == pytest.approx([(a + b) / 2 for a, b in zip(own[0], [np.mean(own[1]), *own[1]])])
    found, drawn = measure("multi", ["a", "b"], targets, [*scores], np.arange(40) // 4, 50)
    assert (
        found["AUROC"]["deviation"] == pytest.approx(np.std(each, ddof=1))
        and np.isfinite(drawn["AUROC"]).all()
    )
    scores[:] = np.nan
    found, _ = measure("multi", ["a", "b"], targets, [*scores], np.arange(40) // 4, 50)
    assert found["mAP"] == {
        "value": None, "interval": None, "classes": {"a": None, "b": None}, "deviation": None
    }  # fmt: skip


def test_average_precision_by_hand():
    """Positives first, third and fourth of four: (1/1 + 2/3 + 3/4) / 3."""
    found = class_values("multi", np.array([[1], [0], [1], [1]]), np.array([[4.0], [3.0], [2.0], [1.0]]))
    assert found["mAP"][0] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)


def test_intervals_draw_cases_not_slices():
    """Slices of a case that are copies of each other say no more than one of them."""
    rng = np.random.default_rng(1)
    targets, scores = rng.integers(0, 2, (30, 1)), rng.normal(size=(30, 1))
    scores += targets
    groups = np.arange(30).astype(str)
    one, _ = measure("multi", ["c"], targets, [scores], groups)
    ten, _ = measure(
        "multi",
        ["c"],
        *(np.repeat(a, 10, 0) for a in (targets,)),
        [np.repeat(scores, 10, 0)],
        np.repeat(groups, 10),
    )
    low, high = one["AUROC"]["interval"]
    assert low < one["AUROC"]["value"] < high
    assert ten["AUROC"]["interval"] == pytest.approx([low, high], abs=0.03)
    alone, _ = measure("multi", ["c"], targets, [scores], np.repeat("case", 30))
    assert alone["AUROC"]["interval"] is None
