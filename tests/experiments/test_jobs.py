"""Scripts as processes: what is raised when one of them fails."""

import os
import threading

import pytest

from engine.config import ConfigError
from experiments.jobs import Jobs, Stopped


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
