"""evaluation/supervised.py: which slices a step of training on labels sees."""

import pytest
import torch

import eval_seg
from engine.process import Process
from evaluation import supervised


def test_batches_depend_on_seed_and_step_only_and_every_epoch_sees_every_slice():
    cfg = eval_seg.load_config(eval_seg.DEFAULTS, None, ["optim.batch_size=6"], eval_seg.NULLABLE)

    def batch(step, world):
        processes = [Process(rank, world, torch.device("cpu"), "fp32") for rank in range(world)]
        return [row for process in processes for row in supervised.training_rows(step, 10, cfg, process)]

    for step in range(5):
        assert batch(step, 1) == batch(step, 2) == batch(step, 3)
    stream = [row for step in range(5) for row in batch(step, 1)]
    for epoch in range(3):
        assert sorted(stream[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert stream[:10] != stream[10:20]


def test_label_fractions_are_nested_whole_cases():
    class Set:
        cases = patients = [f"case{i // 4}" for i in range(40)]

    shares = [supervised.training_positions(Set, fraction, seed=1) for fraction in (0.01, 0.25, 0.5, 1.0)]
    assert [len(share) for share in shares] == [4, 8, 20, 40]  # 0.25 of 10 cases rounds to 2
    for small, large in zip(shares, shares[1:]):
        assert set(small) < set(large)
    assert shares[2] != supervised.training_positions(Set, 0.5, seed=2)


@pytest.mark.parametrize(
    "overrides, kind, rate, loss, clip",
    [
        ([], torch.optim.SGD, 0.5, None, None),
        (["mode=finetune"], torch.optim.AdamW, 0.001, "dice_ce", 1.0),
        (["mode=finetune", "optim.name=sgd", "optim.loss=ce"], torch.optim.SGD, 0.05, "ce", None),
        (["optim.name=adamw", "optim.lr=0.1", "optim.clip=5"], torch.optim.AdamW, 0.1, None, 5.0),
    ],
)
def test_loss_optimizer_and_rate_by_mode(overrides, kind, rate, loss, clip):
    cfg = eval_seg.load_config(eval_seg.DEFAULTS, None, overrides, eval_seg.NULLABLE)
    eval_seg.check_config(cfg)
    optimizer = supervised.make_optimizer(cfg, torch.nn.Linear(2, 2))
    assert type(optimizer) is kind and optimizer.param_groups[0]["lr"] == rate and cfg.optim.loss == loss
    assert cfg.optim.clip == clip
