"""pretraining/schedule.py: which slices a step reads, and its learning rate."""

import pytest
import torch

from engine import config
from engine.process import Process
from pretraining.schedule import StepBatches, learning_rate


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
