"""Fixtures that several test files use, and one thread for all of them: on networks as small as theirs
threads mostly wait for each other, on a busy machine for minutes."""

import json
import os
import socket

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes of the tests

TINY_TRAINING = """
model: {arch: tiny, output_stride: 16, queue_size: 9, bn_split: 0, momentum: 0.9}
data: {size: 32, workers: 0}
local: {grid: 2}
decorrelation: {group_size: 32}
optim: {epochs: 2, batch_size: 6, warmup_epochs: 1}
log: {every: 1, rank_every: 0, tensorboard: false}
"""


def pytest_configure():
    import tiny

    tiny.register()


@pytest.fixture(scope="session")
def server():
    """Runs scripts in forks of one process that has imported everything."""
    from forks import Server

    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def phantom(tmp_path_factory):
    """Five cases (3 train, 1 val, 1 test) of 6 slices of 48 px. A test that writes into it makes a copy."""
    from prepare import commands

    root = tmp_path_factory.mktemp("set") / "phantom"
    size = ["--cases", "5", "--slices", "6", "--size", "48", "--seed", "7"]
    assert commands.main(["phantom", "--out", str(root), *size]) == 0
    return root


@pytest.fixture
def train(phantom, tmp_path):
    """Run train_moco.py with tiny settings, in this process; returns its metrics."""
    import train_moco

    config = tmp_path / "tiny.yaml"
    config.write_text(TINY_TRAINING)

    def run(name, *overrides):
        out = tmp_path / name
        arguments = [f"data.root={phantom}", f"run.out={out}", *overrides]
        assert train_moco.main(["--config", str(config), *arguments]) == 0
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.fixture
def nibabel():
    return pytest.importorskip("nibabel")


@pytest.fixture
def free_port():
    return unused_port()


def unused_port() -> int:
    """One that nobody listens on; a process that was killed may keep its own for a while."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
