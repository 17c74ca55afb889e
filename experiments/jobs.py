"""Scripts of the project as processes, some at a time, which stop together and can be run again."""

import fcntl
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

import yaml

from engine.config import ConfigError
from engine.stopping import STOPPED

PROJECT = Path(__file__).resolve().parent.parent


class Stopped(Exception):
    """Asked to stop."""


class Jobs:
    """`count` scripts at a time."""

    def __init__(self, count: int):
        self.count = count
        self.running, self.stopping = set(), threading.Event()

    def all(self, function, items: list) -> None:
        """function of each item. The first failure stops the rest and is raised."""
        with ThreadPoolExecutor(self.count) as pool:
            tasks = [pool.submit(self.unless_stopped, function, item) for item in items]
            errors = [error for task in tasks if (error := task.exception())]
        if errors:
            raise min(errors, key=lambda error: isinstance(error, Stopped))  # what was stopped tells nothing

    def unless_stopped(self, function, item) -> None:
        if self.stopping.is_set():
            raise Stopped
        try:
            function(item)
        except BaseException:
            self.stopping.set()
            raise

    def script(self, log: Path, name: str, settings: dict, *options: str) -> None:
        words = [f"{key}={as_yaml(value)}" for key, value in settings.items()]
        self.call(log, name, *words, *options)

    def call(self, log: Path, *command: str) -> None:
        """Run a script, or with -m a module, of the project in the user's folder; raises ConfigError with its
        last line if it fails, Stopped if it was stopped."""
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // self.count))
        search = os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": search}
        start = [sys.executable, "-P"]  # -P: nothing of the user's folder is taken for a module of ours
        start += command if command[0] == "-m" else [str(PROJECT / command[0]), *command[1:]]
        with open(log, "a") as file:
            self.wait_for_others(file)
            process = subprocess.Popen(
                start, stdout=file, stderr=file, env=environment, start_new_session=True
            )
            self.running.add(process)
            if self.stopping.is_set():
                process.send_signal(signal.SIGTERM)
            code = process.wait()
            self.running.discard(process)
        if self.stopping.is_set() and code in (STOPPED, -signal.SIGTERM):
            raise Stopped
        if code:
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing"]
            script = command[1] if command[0] == "-m" else command[0]
            raise ConfigError(f"{script} ended with code {code} and said: {last[0]}; all of it: {log}")

    def wait_for_others(self, log) -> None:
        """Until no script writes into the open log. If this program is killed, its scripts go on, and the
        same command must not start them a second time: a script inherits the lock with the file."""
        while not self.stopping.is_set():
            try:
                return fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(1)
        raise Stopped

    def stop_on_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, *_) -> None:
        """Signal handler: the scripts finish their step and save."""
        self.stopping.set()
        for process in list(self.running):
            process.send_signal(signal.SIGTERM)


def as_yaml(value) -> str:
    """On one line, whatever the value is; a path as its text."""
    lines = yaml.dump(value, Dumper=OneLineDumper, default_flow_style=True, width=math.inf)
    return lines.removesuffix("\n").removesuffix("\n...")


class OneLineDumper(yaml.SafeDumper):
    def ignore_aliases(self, data) -> bool:
        return True  # they are not taken in settings

    def represent_text(self, data) -> yaml.ScalarNode:
        style = None if str(data).isprintable() else '"'  # in which a line break is \n
        return self.represent_scalar("tag:yaml.org,2002:str", str(data), style)


OneLineDumper.add_representer(str, OneLineDumper.represent_text)
OneLineDumper.add_multi_representer(PurePath, OneLineDumper.represent_text)


def without_machine(settings: dict | None) -> dict:
    """Those that decide about results: precision and device are the machine's."""
    return {name: value for name, value in (settings or {}).items() if not name.startswith("run.")}
