"""pretraining/schedule.py: which slices a step reads, its learning rate, and when to save."""

import pytest
import torch

from engine import config
from engine.process import Process
from pretraining import schedule
from pretraining.schedule import Due, StepBatches, learning_rate


def test_order_of_reading_is_every_slice_once_an_epoch_whatever_the_ranks():
    def reads(world, first=0):
        ranks = [Process(rank, world, torch.device("cpu"), "fp32") for rank in range(world)]
        batches = [list(StepBatches(13, 4, 7, process, first, 6)) for process in ranks]
        return [sum(shares, []) for shares in zip(*batches)]

    one = reads(1)
    assert one == reads(2) == reads(4)
    assert one[4:] == reads(2, first=4)
    for epoch in (one[:3], one[3:]):
        assert len(set(sum(epoch, []))) == 12
    assert one[:3] != one[3:]


def test_learning_rate_warms_up_and_falls_to_zero():
    optim = config.to_config({"lr": 2.0, "warmup_epochs": 1.0})
    rates = [learning_rate(step, 4, 20, optim) for step in range(20)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0 and rates[12] == pytest.approx(1.0)
    assert all(a > b for a, b in zip(rates[4:], rates[5:])) and 0 < rates[-1] < 0.05


@pytest.fixture
def due(monkeypatch):
    """due(rank=0, ...settings of run) -> a Due, and the clock that it looks at: a list of one number."""
    clock = [0.0]
    monkeypatch.setattr(schedule.time, "monotonic", lambda: clock[0])

    def due(rank=0, **settings):
        run = {"save_steps": 0, "save_minutes": 30.0} | settings
        process = Process(rank, 2, torch.device("cpu"), "fp32")
        return Due(config.to_config({"run": run, "log": {"rank_every": 1}}), 4, process), clock

    return due


def saves_of(due, clock, seconds, cost, step=0.5):
    """The times of the saves of a run that lasts so long, in steps of `step` seconds, if one takes `cost`."""
    times, begun = [], clock[0]
    while clock[0] - begun < seconds:
        clock[0] += step
        if due.by_time():
            times.append(clock[0])
            with due.saving():
                clock[0] += cost
    return times


@pytest.mark.parametrize("cost", [0.01, 0.5, 3.0])
def test_saving_takes_a_hundredth_of_the_time_however_short_the_epochs(due, cost):
    times = saves_of(*due(), 20_000, cost)
    assert times[0] == 120.5 and len(times) * cost <= 0.0101 * 20_000
    pauses = [later - earlier for earlier, later in zip(times, times[1:])]
    assert max(pauses) <= max(120, 100 * cost) + cost + 1  # what a kill can cost


def test_a_save_is_never_longer_ago_than_the_user_allows(due):
    assert len(saves_of(*due(save_minutes=2.0), 1250, cost=8.0)) == 9  # at 120.5 s, then every 128.5 s
    assert len(saves_of(*due(save_minutes=0.0), 1250, cost=8.0)) == 2  # then after 800 s
    assert not saves_of(*due(save_steps=7, save_minutes=0.0), 1250, cost=8.0)
    assert not saves_of(*due(rank=1), 1250, cost=8.0)  # the main process says it for all
    steps, _ = due(save_steps=7)
    assert [step for step in range(1, 30) if steps.by_step(step)] == [7, 14, 21, 28]


def test_a_save_under_way_is_not_asked_for_again(due):
    due, clock = due()
    clock[0] = 121.0
    assert due.by_time() and not due.by_time()
