"""Runs of the scripts in forks of one process that has imported everything, which takes seconds, once.

    server = Server()
    server.run(folder, ["data.py", "check", "--root", "set"])  -> {"code": 1, "out": ..., "err": ..., ...}
    fork = server.start(["train_moco.py", ...], log)            -> goes on beside the test, to be killed by it

The command runs exactly as `python data.py check --root set` would, with one thread, and knows the network
"tiny" of tiny.py. What `run` starts is killed if it takes too long or too much memory.
"""

import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import tiny

PROJECT = Path(__file__).resolve().parent.parent
SECONDS, BYTES = 30, 2 * 2**30


class Server:
    def __init__(self):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8:strict"}
        command = [sys.executable, __file__]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.started = []

    def ask(self, **what):
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def run(self, folder, argv):
        """How the command ended in the folder, and its stdout and stderr."""
        files = [f"{folder}.{name}" for name in ("in", "out", "err")]
        end = self.ask(fork={"argv": argv, "folder": str(folder), "files": files}, watch=True)
        return end | {name: Path(f"{folder}.{name}").read_text(errors="replace") for name in ("out", "err")}

    def start(self, argv, log, environment=None, file_size=None, pauses=()):
        """The command under way, with stdout and stderr in `log`.

        environment: variables that it has besides. file_size: bytes beyond which it cannot write a file.
        pauses: texts; where it has printed the next of them it waits for `Fork.go_on`, so that a signal comes
        when it should, however fast the run and slow the test.
        """
        options = {"environment": environment or {}, "file_size": file_size, "pauses": pauses}
        argv, files = [str(word) for word in argv], ["/dev/null", str(log), str(log)]
        log.write_text("")
        fork = {"argv": argv, "folder": str(PROJECT), "files": files, **options}
        self.started.append(Fork(self, self.ask(fork=fork)["pid"]))
        return self.started[-1]

    def close(self):
        for fork in self.started:
            fork.kill()
        self.process.stdin.close()
        self.process.wait()


class Fork:
    """A started command, as subprocess.Popen has it."""

    def __init__(self, server, pid):
        self.server, self.pid, self.code = server, pid, None

    def poll(self):
        if self.code is None:
            self.code = self.server.ask(poll=self.pid)["code"]
        return self.code

    def wait(self, seconds=600):
        end = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < end, "does not end"
            time.sleep(0.01)
        return self.code

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def wait_for_pause(self, seconds=600):
        end = time.monotonic() + seconds
        while self.poll() is None:
            if Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                return
            assert time.monotonic() < end, "does not pause"
            time.sleep(0.01)
        raise AssertionError(f"ended before its pause, with code {self.code}")

    def go_on(self):
        self.send_signal(signal.SIGCONT)


def serve():
    """For each line of stdin, {"fork": how, "watch": until it has ended?} or {"poll": pid}, one of stdout."""
    sys.path.insert(0, str(PROJECT))
    for needed in ("torch", "nibabel", "eval_seg", "train_moco"):
        importlib.import_module(needed)
    tiny.register()
    sys.modules["matplotlib"] = None  # not to be found: drawing curves would be half of the time
    for line in sys.stdin:
        wanted = json.loads(line)
        if "poll" in wanted:
            pid, status = os.waitpid(wanted["poll"], os.WNOHANG)
            answer = {"code": os.waitstatus_to_exitcode(status) if pid else None}
        elif pid := os.fork():
            answer = watch(pid) if wanted.get("watch") else {"pid": pid}
        else:
            become(**wanted["fork"])
        print(json.dumps(answer), flush=True)
    os._exit(0)  # without taking everything apart, which takes seconds too


def become(argv, folder, files, environment=None, file_size=None, pauses=()):
    """Run a script in place of this process, with stdin, stdout and stderr in the three files."""
    code = 1
    try:
        for number, file in enumerate(files):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
            if number and files.index(file) == number:
                os.ftruncate(number, 0)
        os.chdir(folder)
        os.environ.update(environment or {})
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        if pauses:
            sys.stdout = Pausing(sys.stdout, pauses)
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


class Pausing:
    """An output that stops the process after each of some texts, in their order."""

    def __init__(self, file, texts):
        self.file, self.texts = file, list(texts)

    def write(self, text):
        written = self.file.write(text)
        if self.texts and self.texts[0] in text:
            del self.texts[0]
            self.file.flush()
            os.kill(os.getpid(), signal.SIGSTOP)
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)


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
