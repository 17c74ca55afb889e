"""engine/process.py: precision, and streams of random numbers."""

import torch

from engine import config, process
from models import seeded
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
