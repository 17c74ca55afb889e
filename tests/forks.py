"""Runs of the scripts in forks of one process that has imported everything, which takes seconds, once.

    server = Server()
    server.run(folder, ["data.py", "check", "--root", "set"])  -> {"code": 1, "out": ..., "err": ..., ...}

The command runs in the folder exactly as `python data.py check --root set` would, with one thread, and is
killed if it takes too long or too much memory.
"""

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
SECONDS, BYTES = 30, 2 * 2**30


class Server:
    def __init__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8:strict"}
        command = [sys.executable, __file__]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def run(self, folder, argv):
        """How the command ended in the folder, and its stdout and stderr."""
        print(json.dumps({"argv": argv, "folder": str(folder)}), file=self.process.stdin, flush=True)
        end = json.loads(self.process.stdout.readline())
        for name in ("out", "err"):
            end[name] = Path(f"{folder}.{name}").read_text(errors="replace")
        return end

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def serve():
    """For each line of stdin, {"argv", "folder"}, run the command in a fork and answer how it ended."""
    sys.path.insert(0, str(PROJECT))
    for needed in ("torch", "nibabel", "eval_seg", "train_moco"):
        importlib.import_module(needed)
    sys.modules["matplotlib"] = None  # not to be found: drawing curves would be half of the time
    for line in sys.stdin:
        case = json.loads(line)
        pid = os.fork()
        if pid == 0:
            become(case["argv"], case["folder"])
        print(json.dumps(watch(pid)), flush=True)


def become(argv, folder):
    """Run a script in place of this process, output to FOLDER.out and FOLDER.err."""
    code = 1
    try:
        for number, end in enumerate((".in", ".out", ".err")):
            os.dup2(os.open(folder + end, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(folder)
        sys.argv = argv
        runpy.run_path(str(PROJECT / argv[0]), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def watch(pid):
    """Wait for a process, which is killed at the limits of time and memory."""
    start, killed = time.monotonic(), ""
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            break
        seconds = time.monotonic() - start
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        if not killed and (seconds > SECONDS or resident > BYTES):
            killed = f"killed after {seconds:.0f} s with {resident >> 20} MB"
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    if not killed and usage.ru_maxrss * 1024 > BYTES:
        killed = f"took {usage.ru_maxrss >> 10} MB"
    return {"code": os.waitstatus_to_exitcode(status), "killed": killed, "seconds": time.monotonic() - start}


if __name__ == "__main__":
    serve()
