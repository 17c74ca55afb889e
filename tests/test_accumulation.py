"""optim.accumulate: parts of a batch give its gradients, whatever looks at all of it, or a line says not."""

import copy

import pytest
import torch
from every_method import ALONE, LOCAL, batches_for, small, trained_parameters

import train_moco
from engine.config import ConfigError, load_config
from engine.process import Process
from losses import Whitening
from methods import METHODS
from moco import row_ranges
from models import Encoder
from pretraining.method_settings import defaults_of, settle
from pretraining.schedule import count_steps

WHITENING = {"group_size": 4}
CASES = {  # settings, and the same for a class
    "plain": ([], {}),
    "regions": (["local.weight=0.5"], {"local": LOCAL}),
    "regions of all": (
        ["local.weight=0.5", "local.negatives=batch"],
        {"local": {**LOCAL, "negatives": "batch"}},
    ),
    "zca": (["decorrelation.method=zca"], {"decorrelation": {"method": "zca", **WHITENING}}),
    "iternorm": (["decorrelation.method=iternorm"], {"decorrelation": {"method": "iternorm", **WHITENING}}),
    "zca at bn3": (["decorrelation.method=zca", "decorrelation.position=bn3"], {}),
}
methods_and_cases = pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in METHODS for case in CASES if name not in ALONE or case == "plain"],
)


def answer(name, case, batch, parts, split, world=1, *more):
    """The line by which a run is refused, or None."""
    settings = ["local.weight=0", "decorrelation.method=none", *CASES[case][0], *more, "data.root=set"]
    settings += [f"method={name}", f"model.bn_split={split}"]
    settings += [f"optim.batch_size={batch}", f"optim.accumulate={parts}"]
    cfg = load_config(train_moco.DEFAULTS, None, settings, train_moco.NULLABLE)
    settle(cfg, METHODS, settings)
    try:
        train_moco.check_config(cfg)
        count_steps(cfg, 10**6, Process(0, world, torch.device("cpu"), "fp32"))
    except ConfigError as error:
        return str(error)


def model_of(name, case, split):
    encoder = Encoder("tiny", whitening="zca", group_size=4) if case == "zca at bn3" else None
    return small(name, encoder, bn_split=split, **CASES[case][1]).double()


def gradients(name, model, batch, parts):
    """Of a batch in so many parts, as train_moco.py takes them, in one vector; and the loss."""
    ((views, boxes),) = batches_for(name, 1, batch, torch.float64)
    targets, loss = model.targets(views, boxes, parts=parts), 0.0
    for rows in row_ranges(batch, parts):
        some = [view[rows] for view in views], [box[rows] for box in boxes]
        part = model(*some, targets.part(rows))["loss"] / parts
        part.backward()
        loss += part.item()
    return torch.cat([p.grad.flatten() for p in trained_parameters(model).values()]), loss


@pytest.mark.parametrize(
    ("batch", "parts", "split"),
    [(4, 2, 2), *(pytest.param(8, *plan, marks=pytest.mark.long) for plan in ((4, 2), (2, 4), (2, 2)))],
)
@methods_and_cases
def test_parts_give_the_gradients_of_the_whole(name, case, batch, parts, split, capsys, monkeypatch):
    """Or are refused. With whitening they are those of the whole if it takes its statistics from parts."""
    refusal = answer(name, case, batch, parts, split)
    has_keys = "momentum" in defaults_of(METHODS[name])
    assert (refusal is None) == (not METHODS[name].whole_batch and (has_keys or case != "regions of all"))
    if refusal is not None:
        assert refusal.startswith(("optim.accumulate: ", "local.negatives: ")) and "\n" not in refusal
        return
    note = (
        f"note: whitening takes its statistics from {batch // parts} samples at a time, not from the {batch}"
    )
    assert capsys.readouterr().out.count(note) == ("zca" in case or case == "iternorm")
    model = model_of(name, case, split)
    found, loss = gradients(name, copy.deepcopy(model), batch, parts)
    forward = Whitening.forward
    monkeypatch.setattr(
        Whitening, "forward", lambda self, x: torch.cat([forward(self, part) for part in x.chunk(parts)])
    )
    expected, expected_loss = gradients(name, model, batch, 1)
    assert loss == pytest.approx(expected_loss, rel=1e-10)
    assert (found - expected).norm() < 1e-9 * expected.norm()


@pytest.mark.parametrize("split", [0, 4])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.whole_batch])
def test_parts_too_small_for_a_batchnorm_are_refused(name, split):
    """With reason, since the gradients would be others; and what the line offers is possible."""
    refusal = answer(name, "plain", 4, 2, split)
    assert refusal.startswith("optim.accumulate: 2 would leave BatchNorm 2 samples at a time in place of ")
    assert f"model.bn_split={split}; model.bn_split=2, or" in refusal and "\n" not in refusal
    assert answer(name, "plain", 4, 2, 2) is None and answer(name, "plain", 4, 1, split) is None
    if split:  # then a copy of the case below
        return
    model = model_of(name, "plain", split)
    parts, whole = (gradients(name, copy.deepcopy(model), 4, count)[0] for count in (2, 1))
    assert torch.cosine_similarity(parts, whole, dim=0) < 0.95


@pytest.mark.parametrize(
    ("world", "parts", "sync", "together"),
    [(1, 1, True, 8), (2, 1, True, 8), (2, 1, False, 4), (1, 4, True, 2), (2, 2, True, 4), (2, 2, False, 2)],
)
@pytest.mark.parametrize("case", ["zca", "zca at bn3", "iternorm"])
def test_whitening_of_less_than_the_batch_is_said(case, world, parts, sync, together, capsys):
    assert answer("moco", case, 8, parts, 2, world, f"decorrelation.sync={sync}") is None
    note = f"note: whitening takes its statistics from {together} samples at a time, not from the 8 of the"
    assert capsys.readouterr().out.count(note) == (together < 8)


def test_running_statistics_last_as_long_in_parts():
    """They move for each part, by so much less."""
    settings = ["data.root=set", "model.arch=resnet18", "model.queue_size=256"]
    cfg = load_config(train_moco.DEFAULTS, None, [*settings, "optim.accumulate=4"], train_moco.NULLABLE)
    settle(cfg, METHODS, settings)
    model = train_moco.build_model(cfg, Process(0, 1, torch.device("cpu"), "fp32"))
    momenta = {m.momentum for m in model.modules() if hasattr(m, "running_mean")}
    assert momenta == {0.1 / 4} and type(model.query.decorrelation).__name__ == "ZCAWhitening"
