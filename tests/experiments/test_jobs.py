"""Scripts as processes: what is raised when one of them fails."""

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
