"""launch.sh: real bash, processes and signals; torchrun, training, srun and scontrol are stood in for.

launch.sh runs in a folder where `python` finds these stand-ins instead of the project and PyTorch. They print
what they are called with and which signals reach them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

TRAINING = """
import json, os, signal, sys
from pathlib import Path

if "wrong=1" in sys.argv:
    print("error: wrong: is no setting", file=sys.stderr)
    sys.exit(2)
if "--folder" in sys.argv:
    print("out")
    sys.exit()
if "fail=1" in sys.argv:
    sys.exit(3)

def say(*words):  # print() may not be called within print()
    os.write(1, (" ".join(words) + "\\n").encode())

def stop(number, frame):
    name = signal.Signals(number).name
    say("training got", name)
    Path("out/stopped.json").write_text(json.dumps({"step": 1, "reason": name}) + "\\n")
    sys.exit(75)

for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(name, signal.SIG_DFL if "deaf=1" in sys.argv else stop)
say("in", os.getcwd(), "by", sys.executable)
say("training", *sys.argv[1:], "with", os.environ["OMP_NUM_THREADS"], "threads")
while "done=1" not in sys.argv:
    signal.alarm(30)
    signal.pause()
"""

TORCHRUN = """
import os, signal, subprocess, sys

print("torchrun", os.getpid(), *sys.argv[1:], flush=True)
if "waits=1" in sys.argv:  # for other nodes
    print("torchrun waits", flush=True)
    signal.alarm(30)
    signal.pause()
for name in (signal.SIGTERM, signal.SIGINT):
    signal.signal(name, lambda number, frame: os.write(1, b"torchrun got a signal\\n"))
tool = subprocess.Popen(["sleep", "30"], stdout=subprocess.DEVNULL)  # it calls ldconfig, for one
script = next(i for i, word in enumerate(sys.argv) if i and word.endswith(".py"))
processes = int(next(word for word in sys.argv if word.startswith("--nproc")).split("=")[1])
command = [sys.executable, *sys.argv[script:]]
workers = [subprocess.Popen(command, start_new_session=True) for _ in range(processes)]
failed = any([worker.wait() for worker in workers])
print("tool", "runs" if tool.poll() is None else "was hit", flush=True)
tool.kill()
sys.exit(failed)
"""

SRUN = """#!/usr/bin/env python3
import os, signal, subprocess, sys

nodes = os.environ["SLURM_NNODES"]
command = sys.argv.index("bash")
print("srun", *sys.argv[1:command], flush=True)
step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[0-1]"}
step |= {"SLURM_STEP_NUM_NODES": nodes, "SLURM_STEP_NUM_TASKS": nodes}
tasks = []
for i in range(int(nodes)):
    place = {"SLURM_NODEID": str(i), "SLURMD_NODENAME": f"n{i}"}
    tasks.append(subprocess.Popen(sys.argv[command:], env=os.environ | step | place))
    print("task", tasks[-1].pid, flush=True)

def forward(number, frame):
    for task in tasks:
        task.send_signal(number if number == signal.SIGUSR1 else signal.SIGKILL)

for name in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(name, forward)
signal.signal(signal.SIGINT, lambda *_: os.write(1, b"srun got SIGINT\\n"))
sys.exit(max([task.wait() for task in tasks]))
"""

SCONTROL = """#!/bin/sh
[ "$1" = show ] && printf 'n0\\nn1\\n' || echo "scontrol $*"
"""

BATCH = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURMD_NODENAME": "n0"}
ONE_NODE = BATCH | {"SLURM_NNODES": "1"}


class Launched:
    """launch.sh under way, in a process group of its own, and its output line by line."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        script: str = "launch.sh",
        cwd: Path | None = None,
        **variables: str,
    ):
        base = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable}
        base |= {"PYTHONPATH": str(folder / "modules")}  # launch.sh does not let Python look in its folder
        self.lines = []
        self.process = subprocess.Popen(
            ["bash", folder / script, *arguments],
            env=base | {"OMP_NUM_THREADS": "1"} | variables,
            cwd=cwd or folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # What runs in the background of a script ignores SIGINT, and so would what it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def until(self, *starts: str) -> "Launched":
        """Read on until there has been a line that begins with each of `starts`."""
        missing = list(starts)
        while missing and (line := self.process.stdout.readline()):
            self.lines.append(line.rstrip("\n"))
            found = [start for start in missing if line.startswith(start)]
            missing.remove(found[0]) if found else None
        assert not missing, self.lines
        return self

    def signal(self, number: int) -> "Launched":
        """To all processes of its group, as a terminal does."""
        os.killpg(self.process.pid, number)
        return self

    def numbers(self, word: str) -> list[int]:
        """What follows after `word` in the lines that begin with it."""
        return [int(line.split()[1]) for line in self.lines if line.startswith(word)]

    def end(self) -> int:
        """The exit code."""
        self.lines += self.process.stdout.read().splitlines()
        return self.process.wait()

    def count(self, start: str) -> int:
        return sum(line.startswith(start) for line in self.lines)


@pytest.fixture
def project(tmp_path):
    """launch.sh among its stand-ins."""
    folder = tmp_path / "project"
    for name in ("modules/torch/distributed", "bin", "out"):
        (folder / name).mkdir(parents=True)
    shutil.copy(ROOT / "launch.sh", folder)
    (folder / "modules/torch/__init__.py").touch()
    (folder / "modules/torch/distributed/run.py").write_text(TORCHRUN)
    for script in ("train_moco.py", "eval_seg.py"):
        (folder / script).write_text(TRAINING)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    return folder


SIGNALS = pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name
)
START = ("pretrain", "c.yaml", "a.b=1")


# ---------------------------------------------------------------------------------------------------------
# One machine
# ---------------------------------------------------------------------------------------------------------


@SIGNALS
def test_one_process_is_told_once_and_its_code_is_passed_on(project, number):
    run = Launched(project, *START, GPUS="1").until("training --config c.yaml a.b=1")
    assert run.signal(number).end() == 75
    assert [line for line in run.lines if "got" in line] == [f"training got {number.name}"]


@SIGNALS
def test_under_torchrun_its_processes_are_told_and_not_torchrun(project, number):
    run = Launched(project, *START, GPUS="2").until("training", "training")
    os.kill(*run.numbers("torchrun"), signal.SIGUSR1)  # some clusters signal every process there is
    assert run.signal(number).end() == 75
    assert run.count(f"training got {number.name}") == 2
    assert run.count("torchrun got") == 0 and "tool runs" in run.lines
    assert run.lines[-1] == f"stopped ({number.name}) and saved; the same command resumes the run"


def test_a_signal_before_training_is_not_lost(project):
    run = Launched(project, *START, "waits=1", GPUS="2").until("torchrun waits")
    assert run.signal(signal.SIGTERM).end() == 75
    assert run.lines[-1] == "stopped by SIGTERM while nothing was being trained"


def test_an_earlier_stop_is_not_taken_for_a_new_one(project):
    marker = project / "out/stopped.json"
    marker.write_text('{"step": 1, "reason": "SIGUSR1"}')
    run = Launched(project, "evaluate", "c.yaml", "done=1", GPUS="2", **ONE_NODE)
    assert (run.end(), run.count("training"), run.count("scontrol")) == (0, 2, 0)
    assert not marker.exists()


def test_a_failure_is_passed_on(project):
    assert Launched(project, *START, "fail=1", GPUS="1").end() == 3
    run = Launched(project, *START, "fail=1", GPUS="2")
    assert run.end() == 1
    assert run.lines[-1].startswith("error: training has ended with exit code 1, the lines above say why")


@pytest.mark.parametrize("where", [{}, BATCH], ids=["here", "slurm"])
def test_a_wrong_setting_is_one_line(project, where):
    run = Launched(project, *START, "wrong=1", GPUS="2", **where)
    assert (run.end(), run.lines) == (2, ["error: wrong: is no setting"])


def test_torchrun_on_one_machine_takes_a_free_port(project):
    run = Launched(project, *START, "done=1", GPUS="2", MAX_RESTARTS="3")
    assert run.end() == 0
    words = run.lines[0].split()
    assert {"--nnodes=1", "--nproc-per-node=2", "--max-restarts=3", "--rdzv-endpoint=localhost:0"} < set(
        words
    )
    script = str(project / "train_moco.py")
    assert words[-5:] == [script, "--config", "c.yaml", "a.b=1", "done=1"]


@pytest.mark.parametrize(("cores", "threads"), [("16", "8"), ("1", "1")])
def test_processes_share_the_cores(project, cores, threads):
    run = Launched(project, *START, "done=1", GPUS="2", OMP_NUM_THREADS="", SLURM_CPUS_ON_NODE=cores)
    assert run.end() == 0 and run.lines[-2].endswith(f"with {threads} threads")


@pytest.mark.parametrize("command", ["demo", "ablation", "benchmark"])
def test_what_runs_several_scripts_shares_the_cores_out_itself(project, command):
    """With all of them for each, two scripts at a time stand in each other's way."""
    (project / "experiments").mkdir()
    text = "import os; print('threads:', repr(os.environ.get('OMP_NUM_THREADS')))"
    (project / f"experiments/{command}.py").write_text(text)
    run = Launched(project, command, OMP_NUM_THREADS="", SLURM_CPUS_ON_NODE="16")
    assert run.end() == 0 and run.lines[-1] == "threads: ''"


@pytest.mark.parametrize("gpus", ["1", "2"])
@pytest.mark.parametrize("where", [{}, BATCH, ONE_NODE], ids=["here", "two nodes", "one node"])
def test_paths_are_relative_to_where_the_user_stands(project, tmp_path, gpus, where):
    """Even where modules of the same names lie."""
    user = tmp_path / "a user's folder"
    (user / "out").mkdir(parents=True)
    for name in ("torch.py", "yaml.py", "train_moco.py", "signal.py"):
        (user / name).write_text("raise SystemExit('not ours')")
    run = Launched(project, *START, "done=1", cwd=user, GPUS=gpus, **where)
    assert run.end() == 0, run.lines
    assert run.count("training --config c.yaml a.b=1") == int(gpus) * int(where.get("SLURM_NNODES", 1))
    assert run.count("in ") == run.count(f"in {user} by")


def test_a_link_to_launch_sh_finds_the_project(project, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/launch").symlink_to(project / "launch.sh")
    run = Launched(project, "evaluate", "c.yaml", "done=1", script="../bin/launch", cwd=tmp_path, GPUS="1")
    assert (run.end(), run.count(f"in {tmp_path} by")) == (0, 1), run.lines


def test_help_comes_from_any_folder(project, tmp_path):
    run = Launched(project, cwd=tmp_path)
    assert run.end() == 2 and run.lines[0] == "Set-up and launching."


@pytest.mark.parametrize("script", ["train_moco.py", "eval_seg.py"])
def test_a_config_that_is_not_there_is_named_with_the_path_tried(tmp_path, script):
    kind = "pretrain" if script == "train_moco.py" else "evaluate"
    line = f"error: configs/none.yaml: no such config file ({tmp_path}/configs/none.yaml)"
    run = Launched(ROOT, kind, "configs/none.yaml", cwd=tmp_path, GPUS="1")
    assert (run.end(), run.lines) == (2, [line])
    command = [sys.executable, ROOT / script, "--config", "configs/none.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, line + "\n")


def test_the_ablation_runs_from_any_folder(tmp_path):
    """With the project's protocol, and relative to the user's folder in all else."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "data.py").write_text("raise SystemExit('not ours')")
    run = Launched(ROOT, "ablation", "--table", "--out", "mine", cwd=tmp_path)
    assert run.end() == 0, run.lines
    run = Launched(ROOT, "ablation", "--table", "--protocol", "mine.yaml", cwd=tmp_path)
    assert (run.end(), run.lines) == (2, [f"error: mine.yaml: no such config file ({tmp_path}/mine.yaml)"])


def test_the_demo_stays_in_the_projects_folder(tmp_path):
    run = Launched(ROOT, "demo", "--settings", "none.yaml", cwd=tmp_path)
    assert (run.end(), run.lines) == (2, [f"error: none.yaml: no such config file ({ROOT}/none.yaml)"])


# ---------------------------------------------------------------------------------------------------------
# Several nodes, SLURM
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "place"), [("0", "is_host=1 --local-addr=10.0.0.1"), ("1", "is_host=0")])
def test_nodes_by_hand(project, rank, place):
    nodes = {"NNODES": "2", "NODE_RANK": rank, "MASTER_ADDR": "10.0.0.1"}
    run = Launched(project, *START, "done=1", GPUS="1", **nodes)
    assert run.end() == 0
    assert "--nnodes=2 --nproc-per-node=1" in run.lines[0]
    assert (
        f"--rdzv-endpoint=10.0.0.1:29500 --rdzv-id=moco-0 --rdzv-conf={place} {project}/train_moco.py"
        in run.lines[0]
    )


def test_nodes_by_hand_need_an_address(project):
    run = Launched(project, *START, NNODES="2")
    assert (run.end(), run.lines) == (2, ["error: NNODES=2 needs MASTER_ADDR, the address of node 0"])


def test_a_batch_script_starts_itself_on_every_node(project):
    run = Launched(project, *START, "done=1", GPUS="2", **BATCH)
    assert run.end() == 0
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1" in run.lines[0]
    for i in range(2):
        place = f"--rdzv-endpoint=n0:10077 --rdzv-id=moco-77 --rdzv-conf=is_host={1 - i} --local-addr=n{i}"
        assert any(place in line for line in run.lines if line.startswith("torchrun"))
    assert run.count("training --config c.yaml a.b=1") == 4


@pytest.mark.parametrize("where", [ONE_NODE, BATCH], ids=["one node", "two nodes"])
@SIGNALS
def test_only_a_preemption_warning_requeues(project, where, number):
    """SIGTERM is scancel's, SIGINT is the user's."""
    processes = 2 * int(where["SLURM_NNODES"])
    run = Launched(project, *START, GPUS="2", **where).until(*["training"] * processes)
    os.kill(run.process.pid, number)
    assert run.end() == 75
    assert run.count("training got") == processes
    assert run.count("scontrol requeue 77") == (number == signal.SIGUSR1)
    assert run.count("stopped") == 1, "one launch.sh speaks for all"


def test_a_warning_to_a_run_that_cannot_save_yet_requeues_too(project):
    """Training that still imports dies of the signal."""
    run = Launched(project, *START, "deaf=1", GPUS="1", **ONE_NODE).until("training")
    os.kill(run.process.pid, signal.SIGUSR1)
    assert (run.end(), run.count("scontrol requeue 77")) == (128 + signal.SIGUSR1, 1)


def test_a_warning_to_the_processes_of_srun_requeues_too(project):
    """--signal=USR1 without B: does not reach the batch script; the marker tells it."""
    run = Launched(project, *START, GPUS="1", **BATCH).until("training", "training")
    for pid in run.numbers("task"):
        os.kill(pid, signal.SIGUSR1)
    assert (run.end(), run.count("scontrol requeue 77")) == (75, 1)


def test_variables_of_another_jobs_step_are_not_believed(project):
    leftover = {"SLURM_STEP_ID": "3", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}
    run = Launched(project, *START, "done=1", GPUS="1", **BATCH, **leftover)
    assert (run.end(), run.count("srun")) == (0, 1)


def test_srun_with_a_task_for_each_gpu_is_refused(project):
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "8"}
    run = Launched(project, *START, **BATCH, **step)
    line = "error: srun runs launch.sh 8 times on 2 nodes; give it --ntasks-per-node=1"
    assert (run.end(), run.lines) == (2, [line])


def test_a_copy_in_slurms_folder_finds_the_project(project, tmp_path):
    shutil.copy(ROOT / "launch.sh", tmp_path / "slurm_script")
    where = ONE_NODE | {"SLURM_SUBMIT_DIR": str(project)}
    run = Launched(project, *START, "done=1", script="../slurm_script", GPUS="1", **where)
    assert (run.end(), run.count("training")) == (0, 1)
    run = Launched(
        project, *START, script="../slurm_script", cwd=tmp_path, **where | {"SLURM_SUBMIT_DIR": "/"}
    )
    assert run.end() == 2
    assert run.lines == ["error: submit launch.sh from the project's folder: there is no train_moco.py in /"]


# ---------------------------------------------------------------------------------------------------------
# The true ones: torchrun, train_moco.py, two processes on the CPU
# ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrain(phantom):
    """Arguments of a small run that takes some seconds."""
    settings = (
        "run.device=cpu data.size=32 data.workers=0 model.arch=resnet18 model.queue_size=20 model.bn_split=2"
    )
    settings += " optim.batch_size=4 optim.max_steps=16 log.every=1 log.rank_every=0 run.save_steps=4"
    return ("pretrain", "configs/phantom.yaml", f"data.root={phantom}", *settings.split())


@pytest.mark.long
@SIGNALS
def test_torchrun_lets_training_save(pretrain, tmp_path, number):
    run = Launched(ROOT, *pretrain, f"run.out={tmp_path}", GPUS="2").until("step 3/16")
    assert run.signal(number).end() == 75, run.lines
    assert json.loads((tmp_path / "stopped.json").read_text())["reason"] == number.name
    assert run.lines[-1] == f"stopped ({number.name}) and saved; the same command resumes the run"


@pytest.mark.long
def test_two_nodes_stop_together_and_one_goes_on(pretrain, tmp_path, free_port):
    nodes = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port), "GPUS": "1"}
    command = (*pretrain, f"run.out={tmp_path}")
    runs = [
        Launched(ROOT, *command, NODE_RANK=f"{i}", NODE_ADDR=f"127.0.0.{i + 1}", **nodes) for i in range(2)
    ]
    runs[0].until("step 3/16")
    runs[1].signal(signal.SIGTERM)
    assert [run.end() for run in runs] == [75, 75], runs[0].lines + runs[1].lines
    run = Launched(ROOT, *command, GPUS="2")
    assert run.end() == 0, run.lines
    assert any("resuming from step" in line for line in run.lines) and run.count("step 16/16") == 1


@pytest.mark.long
def test_a_lost_process_is_replaced(pretrain, tmp_path):
    run = Launched(ROOT, *pretrain, f"run.out={tmp_path}", GPUS="2", MAX_RESTARTS="1").until("step 6/16")
    (torchrun,) = children(run.process.pid)
    os.kill(children(torchrun)[1], signal.SIGKILL)
    assert run.end() == 0, run.lines
    assert any("resuming from step" in line for line in run.lines) and run.count("step 16/16") == 1


def children(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(child) for found in lists for child in found.read_text().split())
