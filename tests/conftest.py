"""Fixtures that several test files use, and one thread for all of them: on networks as small as theirs
threads mostly wait for each other, on a busy machine for minutes."""

import os
import socket

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes of the tests


@pytest.fixture
def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
