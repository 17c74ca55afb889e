"""Scripts as processes: what is raised when one of them fails."""

import math
import os
import random
import threading
from pathlib import Path

import pytest

from engine.config import ConfigError, from_yaml, load_config
from experiments.jobs import Jobs, Stopped, as_yaml


def test_a_failure_is_raised_and_not_what_it_stopped():
    jobs, began, done = Jobs(2), threading.Barrier(2, timeout=60), []

    def work(item):
        if item < 2:
            began.wait()
        if item == 1:
            raise ConfigError("this one")
        if item == 0:  # stops because the other has failed, as `call` does
            jobs.stopping.wait(60)
            raise Stopped
        done.append(item)

    with pytest.raises(ConfigError, match="this one"):
        jobs.all(work, [0, 1, 2])
    assert not done


@pytest.mark.parametrize("own, expected", [("3", "3"), ("", "5")], ids=["the user's", "shared out"])
def test_threads_of_a_script(own, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where scripts run
    monkeypatch.setenv("OMP_NUM_THREADS", own)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    (tmp_path / "say.py").write_text("import os; print(os.environ['OMP_NUM_THREADS'])")
    Jobs(2).call(tmp_path / "log.txt", str(tmp_path / "say.py"))
    assert (tmp_path / "log.txt").read_text() == f"{expected}\n"


# fmt: off
PIECES = [
    "a", "Ω", "😀", " ", "  ", ":", ": ", " #", "'", '"', "\\", "\n", "\r\n", "\t", "\0", "\x85", "\u2028",
    "-", "- ", "?", "[", "]", "{", "}", ",", "&", "*", "!", "|", ">", "%", "@", "`", "=", "<<", "~", "/", "é",
    "1", ".5", "1e3", "0x1f", "1_000", "12:30", "null", "yes", "2001-12-14", ".nan", "long words " * 20,
    "\ufeff",
]
# fmt: on
ORGANS = [f"organ number {i}, of 13" for i in range(13)]


def values(count):
    """Of every kind that settings have, nested."""
    chance, same = random.Random(0), ["one list", "twice"]
    yield from (
        [],
        {},
        "",
        [""],
        ORGANS,
        dict(zip(ORGANS, range(13))),
        [same, same],
        "x" * 5000,
        {"x" * 5000: 1},
    )
    for _ in range(count):
        text = "".join(chance.choices(PIECES, k=chance.randint(1, 4)))
        number = chance.choice([0, -1, 2**70, 1e-5, 0.1, 1e300, math.inf, -2.5e-7, True, False, None])
        yield from (text, number, [text, number, [text]], {text: [number, {"a": text}]})


def test_a_script_gets_the_settings_that_it_was_given():
    for value in values(1000):
        line = as_yaml(value)
        assert line.isprintable() and from_yaml(line) == value, (value, line)
    assert from_yaml(as_yaml([Path("a folder: of/mine")])) == ["a folder: of/mine"]
    for value in (ORGANS, "/a long/path with spaces" * 9, "1e3", "null", "12:30", "é: # 'x'", ""):
        cfg = load_config("key: null", None, [f"key={as_yaml(value)}"], {"key": (str, list)})
        assert cfg.key == value
