"""pretraining/guard.py: a step that is not finite leaves everything as it was."""

import pytest
import torch

import train_moco
from engine.config import to_config
from moco import MoCo
from models import Encoder
from pretraining.guard import Guard


def moco_and_views():
    torch.manual_seed(0)
    model = MoCo(Encoder("tiny", whitening="zca"), dim=8, queue_size=16, bn_split=2)
    return model, torch.randn(4, 1, 32, 32)


def take_step(model, optimizer, guard, view):
    guard.remember()
    targets = model.targets([view, view])
    terms = model([view, view], None, targets)
    terms["loss"].backward()
    ok = guard.judge(terms["loss"].detach())
    optimizer.step()
    optimizer.zero_grad()
    model.after_step(targets, ok)
    guard.restore_unless(ok)
    return bool(ok)


@pytest.mark.parametrize("first", [True, False])
def test_a_bad_step_changes_nothing(first):
    model, view = moco_and_views()
    optimizer = train_moco.make_optimizer(
        to_config({"optim": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}}), model
    )
    guard = Guard(model, optimizer, most=3)
    if not first:
        assert take_step(model, optimizer, guard, view)
    before = {name: value.clone() for name, value in model.state_dict().items() if name != "_extra_state"}
    momentum = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    for value in (torch.nan, torch.inf):
        bad = view.clone()
        bad[0, 0, 0, 0] = value
        assert not take_step(model, optimizer, guard, bad)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(torch.equal(s["momentum_buffer"], m) for s, m in zip(optimizer.state.values(), momentum))
    assert (int(guard.in_row), int(guard.skipped)) == (2, 2)
    assert take_step(model, optimizer, guard, view) and int(guard.in_row) == 0
    changed = {name for name in before if not torch.equal(model.state_dict()[name], before[name])}
    assert {"queue", "queue_pointer", "query.encoder.conv1.weight", "key.encoder.conv1.weight"} <= changed
