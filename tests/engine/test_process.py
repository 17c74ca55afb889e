"""engine/process.py: precision, and streams of random numbers."""

import torch

from engine import config, process
from losses import seeded
from train_moco import DEFAULTS, NULLABLE


def test_streams_of_random_numbers_differ():
    keys = [("views", 0, 0), ("views", 0, 1), ("views", 1, 0), ("epoch", 0, 0)]
    assert len({float(torch.rand(1, generator=seeded(*key))) for key in keys}) == 4
    assert torch.equal(torch.rand(3, generator=seeded("a", 1)), torch.rand(3, generator=seeded("a", 1)))


def test_bf16_where_the_processor_has_no_instructions_for_it(monkeypatch, capsys):
    overrides = ["data.root=x", "run.device=cpu", "run.precision=bf16"]
    run = config.load_config(DEFAULTS, None, overrides, NULLABLE).run
    for capability, lines in (("AVX2", 1), ("AVX512", 0)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        process.start_process(run)
        assert capsys.readouterr().out.count("fp32 is ten times as fast") == lines


def test_a_line_for_every_tenth(monkeypatch):
    clock = iter(range(0, 2000, 2))
    monkeypatch.setattr(process.time, "monotonic", lambda: next(clock))
    tenths = process.Tenths(200, done=40)
    lines = [line for step in range(41, 201) if (line := tenths.line(step, f"loss {step}"))]
    assert [line.split()[1] for line in lines] == [f"{step}/200" for step in (*range(60, 200, 20), 200)]
    assert lines[0] == "step 60/200  loss 60 (00:40 gone, 04:40 left)"
    assert all(process.Tenths(8).line(step, "") for step in range(1, 9))  # of a short loop every step


def test_a_line_at_least_every_ten_minutes(monkeypatch):
    clock = iter(range(0, 100_000, 250))
    monkeypatch.setattr(process.time, "monotonic", lambda: next(clock))
    tenths = process.Tenths(100_000)
    assert [step for step in range(1, 8) if tenths.line(step, "")] == [3, 6]
