"""What a pretraining run survives: real processes, real signals, at seeded random moments.

The processes are forks of one that has imported everything. The long tests (`pytest -m long`) repeat the
short ones often, and under torchrun, with its restarts and with two nodes.
"""

import errno
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import unused_port
from every_method import small_settings

import train_moco
from ct.slices import DataError
from data import BatchReader
from methods import METHODS
from pretraining.guard import NotFinite

ROOT = Path(__file__).parent.parent
TINY = """
run: {save_steps: 2, keep_checkpoint: true}
model: {arch: tiny, output_stride: 16, queue_size: 20, bn_split: 2, momentum: 0.9}
data: {size: 32, workers: 1}
local: {grid: 2}
decorrelation: {group_size: 32}
optim: {epochs: 2, batch_size: 4, warmup_epochs: 1}
log: {every: 1, rank_every: 1, tensorboard: false}
"""
STEPS = 8  # 18 slices: four steps an epoch
SLOWER = "model.arch=resnet18"  # where the test has to be faster than the run
IN_TORCHRUN = ("-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")


class Run:
    """train_moco.py with the tiny settings as a process; or as several, by the arguments for `torchrun`."""

    def __init__(self, server, phantom, out, *overrides, torchrun=(), log=None, **options):
        self.out, self.log, config = out, log or out.with_suffix(".log"), out.with_suffix(".yaml")
        config.write_text(TINY)
        command = ["train_moco.py", "--config", config, f"data.root={phantom}", f"run.out={out}", *overrides]
        if not torchrun:
            self.process = server.start(command, self.log, **options)
            return
        command = [sys.executable, *torchrun, "tests/tiny.py", *map(str, command)]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)

    def at_pause(self, number):
        """Send the signal where the run pauses, and let it go on."""
        self.process.wait_for_pause()
        self.process.send_signal(number)
        self.process.go_on()

    def wait_for(self, pattern, seconds=600):
        """Until the log holds the pattern, or the run ends; returns the match."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.log.read_text())) and self.process.poll() is None:
            assert time.monotonic() < end, f"no {pattern!r} in {self.log.read_text()}"
            time.sleep(0.01)
        return found or re.search(pattern, self.log.read_text())

    def end(self, seconds=600):
        """The exit code."""
        return self.process.wait(seconds)

    def children(self):
        """The pids of torchrun's processes, in order of rank, or of the reading processes."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return sorted(int(pid) for file in children for pid in file.read_text().split())


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def history(out):
    """Everything that a run has computed, but no times: its metrics and its last checkpoint's tensors."""
    state = torch.load(out / "checkpoint.pth", weights_only=True)
    numbers = [{name: v for name, v in row.items() if name != "images_per_second"} for row in rows(out)]
    momentum = [value for averages in state["optimizer"]["state"].values() for value in averages.values()]
    return numbers, {**state["model"], "statistics": state["running_statistics"]}, momentum


def assert_same(out, other):
    (metrics, model, momentum), (metrics2, model2, momentum2) = history(out), history(other)
    assert metrics == metrics2
    assert model.pop("_extra_state") == model2.pop("_extra_state")
    assert all(torch.equal(model[name], model2[name]) for name in model)
    assert all(map(torch.equal, momentum, momentum2))


@pytest.fixture(scope="module")
def start(server, phantom):
    """start(out, *overrides, ...) -> a Run on the phantom."""
    return functools.partial(Run, server, phantom)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run that nothing has happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert start(out).end() == 0
    return out


# ---- Killed, stopped, restarted ----


@pytest.mark.parametrize(("kills", "steps"), [(3, STEPS), pytest.param(25, 90, marks=pytest.mark.long)])
def test_a_killed_run_goes_on_bitwise(start, whole, tmp_path, kills, steps):
    """kill -9 at random moments: between steps, inside a step, while a checkpoint is being written."""
    chance = random.Random(kills)
    out, often = tmp_path / "run", ("run.save_steps=1", f"optim.max_steps={steps}")
    if steps != STEPS:
        whole = tmp_path / "whole"
        assert start(whole, f"optim.max_steps={steps}").end() == 0
    done = writing = 0
    while done < kills:
        run = start(out, *often, pauses=(f"step {steps}/",))  # and is not over before it is killed
        assert run.wait_for(r"slices of")
        time.sleep(chance.uniform(0, 0.5))
        run.process.kill()
        assert run.end() == -signal.SIGKILL, run.log.read_text()
        done, writing = done + 1, writing + bool(list(out.glob("*.part")))
    print(f"{done} kills, {writing} of them while a file was being written")
    assert start(out, *often).end() == 0
    assert_same(out, whole)
    assert not [*out.glob("*.part"), *out.glob("*.new")]


OPTIMIZERS = ("sgd", "lars", "adamw")


@pytest.mark.long
@pytest.mark.parametrize(("name", "optimizer"), [(name, OPTIMIZERS[i % 3]) for i, name in enumerate(METHODS)])
def test_every_method_goes_on_bitwise_after_kills(start, tmp_path, name, optimizer):
    chance = random.Random(name)
    settings = (*small_settings(name), f"optim.name={optimizer}", "run.save_steps=1")
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert start(whole, *settings).end() == 0
    for _ in range(3):
        run = start(out, *settings, pauses=(f"step {STEPS}/",))
        assert run.wait_for(r"slices of")
        time.sleep(chance.uniform(0, 0.8))
        run.process.kill()
        assert run.end() == -signal.SIGKILL, run.log.read_text()
    assert start(out, *settings).end() == 0
    assert_same(out, whole)


@pytest.mark.parametrize(
    "name",
    [
        "SIGUSR1",
        pytest.param("SIGTERM", marks=pytest.mark.long),
        pytest.param("SIGINT", marks=pytest.mark.long),
    ],
)
def test_a_stopped_run_saves_and_goes_on_bitwise(start, whole, tmp_path, name):
    out = tmp_path / "run"
    run = start(out, "run.save_steps=100", pauses=("step 3/",))
    run.at_pause(signal.Signals[name])
    assert run.end() == 75, run.log.read_text()
    marker = json.loads((out / "stopped.json").read_text())
    assert marker["reason"] == name and 3 <= marker["step"] < STEPS
    assert f"stopped after step {marker['step']} ({name})" in run.log.read_text()
    assert start(out).end() == 0
    assert_same(out, whole)
    assert not (out / "stopped.json").exists()
    again = start(out)
    assert again.end() == 0 and "nothing to do" in again.log.read_text()


def test_a_second_ctrl_c_ends_at_once(start, tmp_path):
    settings = ("data.workers=0", "optim.batch_size=18", "data.size=128")
    run = start(tmp_path / "run", *settings, pauses=("step 1/", "stopped after"))
    run.at_pause(signal.SIGINT)
    run.wait_for("Ctrl-C again")
    run.process.send_signal(signal.SIGINT)
    run.process.go_on()  # if the step was faster than we are
    assert run.end() == -signal.SIGINT


def start_two(start, out, port, *overrides, pauses=()):
    """Two ranks as processes without torchrun; the first one pauses."""
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank in ("0", "1"):
        options = {"environment": place | {"RANK": rank, "LOCAL_RANK": rank}, "pauses": pauses}
        ranks.append(start(out, *overrides, log=out.with_suffix(f".{rank}.log"), **options))
        pauses = ()
    return ranks


def test_two_ranks_stop_at_the_same_step_and_go_on_bitwise(start, tmp_path, free_port):
    """The signal goes to one of them only."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert [rank.end() for rank in start_two(start, whole, free_port)] == [0, 0]
    ranks = start_two(start, out, free_port, "run.save_steps=100", pauses=("step 3/",))
    ranks[0].process.wait_for_pause()
    ranks[1].process.send_signal(signal.SIGUSR1)
    ranks[0].process.go_on()
    assert [rank.end() for rank in ranks] == [75, 75], logs(ranks)
    assert json.loads((out / "stopped.json").read_text())["reason"] == "SIGUSR1"
    assert [rank.end() for rank in start_two(start, out, free_port)] == [0, 0]
    assert_same(out, whole)


@pytest.mark.parametrize(
    "name", ["swav", *(pytest.param(name, marks=pytest.mark.long) for name in METHODS if name != "swav")]
)
def test_two_ranks_of_a_method_begin_as_one_does_and_go_on_bitwise(start, tmp_path, name):
    settings = (*small_settings(name), "run.save_steps=2", "model.bn_split=0", "optim.max_steps=4")
    one, whole, out = (tmp_path / folder for folder in ("one", "two", "run"))
    assert start(one, *settings).end() == 0
    ranks = start_two(start, whole, unused_port(), *settings)
    assert [rank.end() for rank in ranks] == [0, 0], logs(ranks)
    first, same = ([row for row in rows(path) if "loss" in row][0] for path in (one, whole))
    for term in same.keys() - {"images_per_second", "gradient_norm"}:
        assert same[term] == pytest.approx(first[term], rel=1e-3, abs=1e-5), term
    ranks = start_two(start, out, unused_port(), *settings, pauses=("step 3/",))
    ranks[0].process.wait_for_pause()
    for rank in ranks:
        rank.process.kill()
    assert [rank.end() for rank in ranks] == [-signal.SIGKILL] * 2
    assert [rank.end() for rank in start_two(start, out, unused_port(), *settings)] == [0, 0]
    assert_same(out, whole)


@pytest.mark.long
@pytest.mark.parametrize("name", ["byol", "spark"])
def test_two_ranks_of_torchrun_train_a_method(start, tmp_path, name):
    run = start(tmp_path / "run", *small_settings(name), torchrun=(*IN_TORCHRUN, "--nproc-per-node=2"))
    assert run.end(300) == 0, run.log.read_text()
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert len(losses) == STEPS and all(map(math.isfinite, losses))


@pytest.mark.long
def test_two_ranks_of_torchrun_stop_at_the_same_step_and_go_on_bitwise(start, tmp_path):
    two = functools.partial(start, torchrun=(*IN_TORCHRUN, "--nproc-per-node=2"))
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert two(whole, SLOWER).end() == 0
    run = two(out, SLOWER, "run.save_steps=100")
    run.wait_for("step 3/")
    os.kill(run.children()[1], signal.SIGUSR1)
    assert run.end() == 1  # torchrun's own code
    assert re.search(r"exitcode *: 75", run.log.read_text())
    assert json.loads((out / "stopped.json").read_text())["reason"] == "SIGUSR1"
    assert two(out, SLOWER).end() == 0
    assert_same(out, whole)


@pytest.mark.long
def test_going_on_with_another_number_of_ranks(start, whole, tmp_path):
    out = tmp_path / "run"
    run = start(out, pauses=("step 5/",))
    run.at_pause(signal.SIGTERM)
    assert run.end() == 75
    assert start(out, torchrun=(*IN_TORCHRUN, "--nproc-per-node=2")).end() == 0
    ours, theirs = ([row["loss"] for row in rows(path) if "loss" in row] for path in (out, whole))
    assert ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.long
@pytest.mark.parametrize("world", [2, 4])
def test_torchrun_restarts_after_the_death_of_a_rank(start, tmp_path, world):
    settings = (SLOWER, "model.bn_split=1", "decorrelation.method=none", "run.save_steps=1")
    ranks = (*IN_TORCHRUN, f"--nproc-per-node={world}")
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert start(whole, *settings, torchrun=ranks).end(300) == 0
    run = start(out, *settings, torchrun=(*ranks, "--max-restarts=2"))
    run.wait_for("step 4/")
    os.kill(run.children()[-1], signal.SIGKILL)
    assert run.end(300) == 0, run.log.read_text()
    assert "resuming from step" in run.log.read_text()
    assert_same(out, whole)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("lost", [0, 1])
def test_two_nodes_and_the_loss_of_one(start, tmp_path, free_port, number, lost):
    """Two agents, each with an address of its own; both train; then one is killed."""
    out = tmp_path / "run"
    nodes = []
    for node in range(2):
        rendezvous = ("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port}", "--rdzv-id=7")
        place = (f"--local-addr=127.0.0.{node + 1}", f"--rdzv-conf=is_host={1 - node}")
        torchrun = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *rendezvous, *place)
        nodes.append(start(out, "run.timeout_minutes=0.5", "optim.epochs=50", SLOWER, torchrun=torchrun))
        nodes[-1].log = nodes[-1].log.rename(tmp_path / f"node{node}.log")
    nodes[0].wait_for("step 20/")
    other = nodes[1 - lost]
    nodes[lost].process.send_signal(number)
    assert other.end(90) != 0
    assert re.search(r"stopped after step \d+|error: rank \d has lost another process", logs(nodes))
    state = torch.load(out / "checkpoint.pth", weights_only=True)
    assert state["step"] >= 6
    nodes[lost].end(90)


def logs(runs):
    return "".join(run.log.read_text() for run in runs)


# ---- Bad numbers, bad files, full disks ----


@pytest.fixture
def slices(tmp_path):
    """Twelve slices of noise."""
    root = tmp_path / "set"
    (root / "images/a").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(12):
        np.save(root / f"images/a/{i:02d}.npy", generator.normal(0, 100, (40, 40)).astype(np.int16))
    (root / "unlabelled.txt").write_text("".join(f"a/{i:02d}.npy\n" for i in range(12)))
    (root / "tiny.yaml").write_text(TINY)
    return root


@pytest.fixture
def spoil(monkeypatch):
    """Of the slices with these indices only NaN arrives: what reading refuses, arithmetic can still make."""

    def spoil(*indices):
        read = BatchReader.__getitem__

        def spoilt(reader, batch):
            values, unreadable = read(reader, batch)
            values[[i for i, index in enumerate(batch) if index in indices]] = torch.nan
            return values, unreadable

        monkeypatch.setattr(BatchReader, "__getitem__", spoilt)

    return spoil


def train_here(slices, *overrides):
    settings = (f"data.root={slices}", f"run.out={slices / 'run'}", "data.workers=0", "log.rank_every=0")
    return train_moco.main(["--config", str(slices / "tiny.yaml"), *settings, *overrides])


def test_bad_steps_are_skipped_and_counted(slices, spoil, capsys):
    spoil(5)
    assert train_here(slices) == 0
    out = capsys.readouterr().out
    last = rows(slices / "run")[-2]
    assert last["skipped_steps"] == 2 == out.count("not finite, skipped")  # one of three batches an epoch
    bad = [row for row in rows(slices / "run") if "loss" in row and row["loss"] is None]
    assert len(bad) == 2
    assert torch.load(slices / "run/encoder.pth", weights_only=True)["conv1.weight"].isfinite().all()


def test_too_many_bad_steps_end_the_run_with_the_state_from_before_them(slices, spoil):
    assert train_here(slices, "optim.max_steps=3", "run.max_bad_steps=2") == 0
    before = torch.load(slices / "run/checkpoint.pth", weights_only=True)["model"]
    spoil(*range(12))
    state = torch.load(slices / "run/checkpoint.pth", weights_only=True)
    state["config"]["optim"]["max_steps"] = 9
    torch.save(state, slices / "run/checkpoint.pth")
    with pytest.raises(NotFinite) as error:
        train_here(slices, "optim.max_steps=9", "run.max_bad_steps=2")
    line = str(error.value)
    assert re.search(r"steps 4 to 5 were not finite.*loss nan.*its slices: a/\d\d.npy, a/.*bad_steps", line)
    listed = json.loads((slices / "run/bad_steps.json").read_text())
    assert [step["step"] for step in listed] == [4, 5] and all(len(step["slices"]) == 4 for step in listed)
    state = torch.load(slices / "run/checkpoint.pth", weights_only=True)
    assert state["step"] == 3 and state["model"].pop("_extra_state") == before.pop("_extra_state")
    assert all(torch.equal(state["model"][name], before[name]) for name in before)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_slice_ends_the_run_or_is_skipped(slices, workers, caplog):
    (slices / "images/a/07.npy").write_bytes(b"no array")
    settings = (f"data.workers={workers}", "optim.epochs=2")
    with pytest.raises(DataError, match="07.npy"):
        train_here(slices, *settings)
    assert train_here(slices, *settings, "run.skip_bad=true") == 0
    assert workers or "07.npy" in caplog.text
    assert rows(slices / "run")[-2]["unreadable_slices"] == 2  # once an epoch


def test_a_reading_process_that_dies_is_reported_with_its_file(start, phantom, tmp_path):
    """A named pipe in place of a slice keeps its reader waiting for ever."""
    root = tmp_path / "set"
    shutil.copytree(phantom, root)
    first, *others = (root / "unlabelled.txt").read_text().split()
    (root / "unlabelled.txt").write_text("\n".join([*others, first]))
    (root / "images" / first).unlink()
    os.mkfifo(root / "images" / first)
    run = start(tmp_path / "run", f"data.root={root}")
    run.wait_for("step 0")
    pipe = opened_by_a_reader(root / "images" / first)
    (reader,) = run.children()
    os.kill(reader, signal.SIGKILL)
    assert run.end() == 2
    line = run.log.read_text().strip().splitlines()[-1]
    assert line.startswith("error: DataLoader worker") and first in line
    os.close(pipe)

    run = start(tmp_path / "run", f"data.root={root}", "run.timeout_minutes=0.05")
    assert run.end() == 2
    line = run.log.read_text().strip().splitlines()[-1]
    assert line.startswith("error: DataLoader timed out") and first in line


IN_SMALL_SHM = """
import ctypes, runpy, sys
system = ctypes.CDLL(None)
NEWNS, REC_PRIVATE, SIZE = 0x20000, 0x44000, b"size=128k"
if (
    system.unshare(NEWNS)
    or system.mount(b"none", b"/", None, REC_PRIVATE, None)
    or system.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, SIZE)
):
    sys.exit(77)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("script", "settings"),
    [
        ("train_moco.py", ["model.queue_size=9", "optim.batch_size=6", "decorrelation.method=none"]),
        ("eval_seg.py", ["mode=finetune", "encoder=random", "optim.batch_size=8", "optim.steps=2"]),
    ],
)
def test_batches_that_dev_shm_has_no_room_for(server, phantom, tmp_path, script, settings):
    """As in a container, with 64 MB and usual batches."""
    (tmp_path / "small.py").write_text(IN_SMALL_SHM)
    settings = [*settings, "model.arch=tiny", "model.output_stride=16", "data.size=32", "data.workers=2"]
    command = [ROOT / script, f"data.root={phantom}", f"run.out={tmp_path / 'run'}", *settings]
    end = server.run(tmp_path, [str(tmp_path / "small.py"), *map(str, command)])
    if end["code"] == 77:
        pytest.skip("another /dev/shm for a single process takes the rights of root")
    last = end["err"].strip().splitlines()[-1]
    assert end["code"] == 2 and not end["killed"] and "Traceback" not in end["err"], end
    assert re.match(r"error: .*/dev/shm.*docker run --shm-size=.* data.workers=0", last)


def opened_by_a_reader(pipe, seconds=60):
    """The writing end of a named pipe, once somebody reads from it."""
    end = time.monotonic() + seconds
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            assert error.errno == errno.ENXIO and time.monotonic() < end
            time.sleep(0.01)


def test_a_full_disk_stops_saving_but_not_training(start, whole, tmp_path):
    """Files of more than 1 MB cannot be written: no checkpoint, no encoder.pth."""
    out = tmp_path / "run"
    run = start(out, pauses=("step 3/",))
    run.at_pause(signal.SIGTERM)
    assert run.end() == 75
    before = (out / "checkpoint.pth").read_bytes()

    full = start(out, file_size=1 << 20)
    assert full.end() == 2
    lines = full.log.read_text().splitlines()
    assert sum("no checkpoint written" in line for line in lines) >= 2
    assert f"step {STEPS}/{STEPS}" in full.log.read_text()
    assert lines[-1].startswith("error: ") and "Traceback" not in full.log.read_text()
    assert (out / "checkpoint.pth").read_bytes() == before
    assert not (out / "encoder.pth").exists() and not [*out.glob("*.part"), *out.glob("*.new")]
    assert start(out).end() == 0
    assert_same(out, whole)


def test_the_same_seed_gives_the_same_run(start, whole, tmp_path):
    out = tmp_path / "run"
    run = start(out, "run.deterministic=true", "data.workers=2")
    assert run.end() == 0 and "costs nothing on a CPU" in run.log.read_text()
    assert_same(out, whole)


def test_flipped_bits_in_a_checkpoint_are_seen(start, whole, tmp_path):
    out = tmp_path / "run"
    run = start(out, pauses=("step 5/",))
    run.at_pause(signal.SIGKILL)
    run.end()
    path = out / "checkpoint.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    again = start(out)
    assert again.end() == 0
    assert "warning: cannot read" in again.log.read_text()
    assert_same(out, whole)
