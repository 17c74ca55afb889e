"""What comes out of a checkpoint is checked before it is used, and no picture costs the run that it is of."""

import errno
import json
import os
import shutil

import pytest
import torch

import eval_seg
from engine.config import ConfigError
from evaluation import batches, report
from pretraining import monitor, run
from weights import WeightsError

# ---- Pretraining --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(phantom, tmp_path_factory):
    """A folder of settings and a run after five of its six steps."""
    from conftest import TINY_TRAINING

    import train_moco

    folder = tmp_path_factory.mktemp("pretrained")
    (folder / "tiny.yaml").write_text(TINY_TRAINING)
    out = folder / "run"
    arguments = ["--config", str(folder / "tiny.yaml"), f"data.root={phantom}", "run.save_steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Run, "finish", lambda run: None)
        assert train_moco.main([*arguments, f"run.out={out}"]) == 0
    (out / "checkpoint.pth.previous").rename(out / "checkpoint.pth")
    return out, arguments


@pytest.fixture
def resume(pretrained, tmp_path):
    """Go on with a copy of that run whose checkpoint `damage` has changed."""
    import train_moco

    source, arguments = pretrained
    out = tmp_path / "run"

    def resume(damage=lambda state: None, sound_before=False, *overrides):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(source, out)
        if sound_before:
            shutil.copy(out / "checkpoint.pth", out / "checkpoint.pth.previous")
        state = torch.load(out / "checkpoint.pth", weights_only=True)
        damage(state)
        torch.save(state, out / "checkpoint.pth")
        assert train_moco.main([*arguments, f"run.out={out}", *overrides]) == 0
        return out

    return resume


def put(*path_and_value):
    """Damage: a value at a place of nested dicts and lists."""
    *path, last, value = path_and_value

    def damage(state):
        for name in path:
            state = state[name]
        state[last] = value(state[last]) if callable(value) else value

    return damage


def drop(*path):
    def damage(state):
        for name in path[:-1]:
            state = state[name]
        del state[path[-1]]

    return damage


WEIGHT, NORM = "query.encoder.conv1.weight", "query.encoder.bn1"
NAN, HUGE = float("nan"), 10**30
EXPANDED = torch.zeros(1).expand(10**5, 10**5)  # 40 GB, were it to be computed with
MOMENTUM = ("optimizer", "state", 0, "momentum_buffer")
GROUP = ("optimizer", "param_groups", 0)

PRETRAINING = [
    *(put("step", value) for value in (-1, 7, 4, True, 5.0, None, "5", HUGE, torch.tensor(5))),
    *(put("slices", value) for value in (0, -18, 18.0, None, "18", [18])),
    *(put("bad_steps", value) for value in ([0], [1, 0], [-1, 0], [0, 6], [0, NAN], None, [0, 0, 0], "00")),
    *(drop(name) for name in ("config", "model", "optimizer", "running_statistics", "step", "bad_steps")),
    *(put("config", value) for value in (None, [], "config")),
    *(put("config", "optim", "lr", value) for value in (EXPANDED, [EXPANDED])),
    *(put("model", value) for value in (None, {}, [1])),
    *(put("model", WEIGHT, value) for value in (None, 1.0, "x")),
    put("model", WEIGHT, lambda weight: weight * torch.nan),
    put("model", WEIGHT, lambda weight: weight * torch.inf),
    put("model", WEIGHT, lambda weight: weight.double()),
    put("model", WEIGHT, lambda weight: weight[:3]),
    put("model", WEIGHT, lambda weight: weight.to_sparse()),
    put("model", WEIGHT, lambda weight: torch.zeros(()).expand(weight.shape)),
    drop("model", WEIGHT),
    put("model", "more", torch.zeros(3)),
    put("model", f"{NORM}.running_var", lambda variance: -variance),
    put("model", f"{NORM}.num_batches_tracked", lambda count: -1 - count),
    put("model", "queue", lambda queue: 3 * queue),
    *(put("model", "queue_pointer", torch.tensor(value)) for value in (-1, 9, 2**60, 3.0)),
    *(put("model", "_extra_state", value) for value in (None, {"step": 3}, {"step": EXPANDED}, {}, 5)),
    *(put(*GROUP, "momentum", value) for value in (0.5, None, NAN, HUGE, "x")),
    *(put(*GROUP, "weight_decay", value) for value in (1e30, HUGE, -1, torch.zeros(3))),
    *(put(*GROUP, name, True) for name in ("nesterov", "maximize")),
    put(*GROUP, "params", lambda numbers: numbers[::-1]),
    put(*GROUP, "params", lambda numbers: [EXPANDED, *numbers[1:]]),
    put("optimizer", "param_groups", []),
    put("optimizer", "state", {}),
    put(*MOMENTUM, lambda momentum: momentum * torch.nan),
    put(*MOMENTUM, lambda momentum: momentum.half()),
    put(*MOMENTUM, lambda momentum: momentum[:1]),
    put(*MOMENTUM, None),
    put("running_statistics", lambda rows: rows * torch.nan),
    put("running_statistics", lambda rows: rows[:, 1:]),
    put("running_statistics", lambda rows: rows[0]),
    *(put("running_statistics", value) for value in (None, EXPANDED)),
]


def test_damaged_checkpoints_of_pretraining_are_refused_in_one_line(resume):
    for number, damage in enumerate(PRETRAINING):
        with pytest.raises(ConfigError, match="is not a checkpoint of this program, or damaged; ") as error:
            resume(damage)
            pytest.fail(f"damage {number} is not seen")
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_what_is_set_anew_may_differ(resume):
    """The rate, and settings that another version of PyTorch has or has not."""
    whole = metrics(resume())
    assert metrics(resume(put(*GROUP, "lr", HUGE))) == whole
    assert metrics(resume(drop(*GROUP, "foreach"))) == whole
    assert metrics(resume(put(*GROUP, "of a newer version", 1))) == whole
    assert metrics(resume(put(*MOMENTUM, lambda momentum: momentum.to_mkldnn().to_dense()))) == whole


def metrics(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [{**json.loads(line), "images_per_second": None} for line in lines]


def test_the_checkpoint_before_a_damaged_one_is_taken(resume, capsys):
    whole = metrics(resume())
    for damage in (put("step", 99), put("config", "optim", "lr", 0.5), put("model", {})):
        capsys.readouterr()
        assert metrics(resume(damage, True)) == whole
        assert "continuing from" in capsys.readouterr().err


@pytest.mark.parametrize("sound_before", [False, True])
def test_a_changed_setting_is_named_as_such(resume, sound_before):
    with pytest.raises(ConfigError, match="optim.lr: is 0.5, but the run in .* was started with 0.03"):
        resume(lambda state: None, sound_before, "optim.lr=0.5")


FAILURES = [
    MemoryError(),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    torch.linalg.LinAlgError("did not converge"),
    ValueError("Image size of 1e6 x 1 pixels is too large"),
    KeyError("font"),
]


def raising(error):
    def fail(*arguments, **named):
        raise error

    return fail


PLACES = [
    (run, "draw"),
    (monitor.CollapseMonitor, "features_page"),
    (monitor.CollapseMonitor, "measure"),
    (monitor.CollapseMonitor, "structure"),
    (monitor, "feature_colors"),
]


@pytest.mark.parametrize(
    ("place", "error"), [*zip(PLACES, FAILURES, strict=True)], ids=[name for _, name in PLACES]
)
def test_no_picture_or_measurement_costs_the_encoder(resume, monkeypatch, capsys, place, error):
    monkeypatch.setattr(*place, raising(error))
    out = resume()
    assert (out / "encoder.pth").is_file() and (out / "encoder.json").is_file()
    warnings = capsys.readouterr().err.splitlines()
    assert warnings and all(line.startswith("warning: ") for line in warnings)
    assert not list(out.glob("*.part"))


def test_features_that_are_not_finite_are_a_missing_picture(resume, monkeypatch, capsys):
    maps = monitor.CollapseMonitor.maps
    monkeypatch.setattr(monitor.CollapseMonitor, "maps", lambda *inputs: maps(*inputs) * torch.nan)
    out = resume()
    assert (out / "encoder.pth").is_file() and not (out / "features.png").exists()
    assert "warning: no features.png" in capsys.readouterr().err


def test_training_goes_on_in_training_mode_after_a_failed_measurement(train, monkeypatch):
    """Or BatchNorm would stay at its running statistics, without a word."""
    settings = ("log.rank_every=1", "optim.epochs=3")
    whole = train("whole", *settings)
    measure, calls = monitor.CollapseMonitor.structure, iter(range(9))

    def failing(self, encoder):
        if next(calls) == 1:
            raise MemoryError
        return measure(self, encoder)

    monkeypatch.setattr(monitor.CollapseMonitor, "structure", failing)
    losses = [
        {row["step"]: row["loss"] for row in rows if "loss" in row} for rows in (whole, train("x", *settings))
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 3, "similarity": "x"}',
        '{"step": 3, "score": [1, "x"]}',
        '{"step": 3, "loss": {"a": 1}}',
        '{"step": true}',
        '{"step": -1, "loss": 2}',
        '{"step": 3, "similarity": 1' + "0" * 400 + "}",
        '{"step": 3, "effective_rank": NaN}',
        '{"step": 3, "effective_rank": 2, "spectrum": []}',
    ],
)
def test_lines_of_metrics_that_no_run_writes_are_dropped(resume, pretrained, line):
    path = pretrained[0] / "metrics.jsonl"
    before = path.read_text()
    whole = metrics(resume())
    try:
        path.write_text(line + "\n" + before)
        assert metrics(resume()) == whole
    finally:
        path.write_text(before)


# ---- Evaluation ---------------------------------------------------------------------------------

TINY = ["model.arch=tiny", "model.output_stride=16", "data.workers=0", "run.device=cpu", "encoder=random"]
TINY += ["optim.steps=4", "optim.batch_size=4", "eval.every=2", "log.every=1"]
EVALUATION = [
    *(put("step", value) for value in (0, 4, -1, 2.0, True, None, HUGE)),
    *(put("best", value) for value in (NAN, -0.1, 1.5, "0.5", True, 1, torch.zeros(()))),
    *(put("encoder_sha256", value) for value in (1, [], {})),
    *(drop(name) for name in ("trained", "optimizer", "step", "best", "encoder_sha256")),
    *(put("trained", value) for value in (None, {}, torch.zeros(3))),
    put("trained", "classifier.weight", lambda weight: weight * torch.nan),
    put("trained", "classifier.weight", lambda weight: weight[:2]),
    put("trained", "norm.running_var", lambda variance: -variance),
    *(put(*GROUP, "weight_decay", value) for value in (HUGE, 1e30, None)),
    *(put(*GROUP, "initial_lr", value) for value in (HUGE, 9.0, NAN, "x")),
    put(*MOMENTUM, lambda momentum: momentum * torch.inf),
    put("optimizer", "state", {}),
]


@pytest.fixture(scope="module")
def half_done(phantom, tmp_path_factory):
    """An evaluation after its first validation."""
    out = tmp_path_factory.mktemp("evaluation") / "run"
    before = eval_seg.report.score

    def stop_at_the_test(*arguments, full=False):
        if full:
            raise KeyboardInterrupt
        return before(*arguments, full=full)

    eval_seg.report.score = stop_at_the_test
    try:
        with pytest.raises(KeyboardInterrupt):
            eval_seg.main([*TINY, f"data.root={phantom}", f"run.out={out}"])
    finally:
        eval_seg.report.score = before
    return out


@pytest.fixture
def go_on(half_done, phantom, tmp_path):
    out = tmp_path / "run"

    def go_on(damage=lambda state: None, prepare=lambda out: None):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(half_done, out)
        state = torch.load(out / "checkpoint.pth", weights_only=True)
        damage(state)
        torch.save(state, out / "checkpoint.pth")
        prepare(out)
        assert eval_seg.main([*TINY, f"data.root={phantom}", f"run.out={out}"]) == 0
        return out

    return go_on


def test_damaged_checkpoints_of_evaluation_are_refused_in_one_line(go_on):
    go_on()
    for number, damage in enumerate(EVALUATION):
        with pytest.raises(ConfigError, match="is not a checkpoint of this program, or damaged; ") as error:
            go_on(damage)
            pytest.fail(f"damage {number} is not seen")
        assert "\n" not in str(error.value)


def test_an_evaluation_does_not_go_on_without_its_best_model_or_its_settings(go_on):
    with pytest.raises(ConfigError, match=r"the best model so far is not usable .*remove .*checkpoint.pth"):
        go_on(prepare=lambda out: (out / "model.pth").unlink())
    with pytest.raises(ConfigError, match="the best model so far is not usable"):
        go_on(prepare=lambda out: (out / "model.pth").write_bytes(b"no model"))
    with pytest.raises(
        ConfigError, match="checkpoint.pth is there without config.yaml; choose another run.out"
    ):
        go_on(prepare=lambda out: (out / "config.yaml").unlink())


@pytest.mark.parametrize(
    ("name", "lost", "error"),
    [
        ("draw_predictions", "predictions.png", MemoryError()),
        ("prediction_page", "predictions.png", FAILURES[1]),
        ("cases_csv", "cases.csv", KeyError("liver")),
        ("organ_table", "table.md", ValueError("no table")),
    ],
)
def test_no_picture_or_table_costs_the_results(go_on, monkeypatch, capsys, name, lost, error):
    monkeypatch.setattr(report, name, raising(error))
    out = go_on()
    assert json.loads((out / "results.json").read_text())["mean_dice"] is not None
    assert (out / "model.pth").is_file() and not (out / lost).exists()
    assert f"warning: no {lost}" in capsys.readouterr().err
    assert not (out / "checkpoint.pth").exists()


def test_features_that_are_not_finite_end_an_evaluation_before_its_training(go_on, monkeypatch):
    sample = batches.FeatureSample
    monkeypatch.setattr(sample, "add", lambda self, maps, add=sample.add: add(self, maps * torch.nan))
    with pytest.raises(WeightsError, match="encoder: its features are not finite numbers"):
        go_on()
