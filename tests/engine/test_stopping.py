"""engine/stopping.py: how a script ends."""

import json
import re
from pathlib import Path

import pytest

from engine import stopping

READING = """
import os, signal
import torch
from engine.process import Process
from engine.stopping import batch_loader, run_script

class Reader:
    def __getitem__(self, row):
        return row if row < 2 else signal.pause()

def main():
    process = Process(0, 1, torch.device("cpu"), "fp32")
    loader = iter(batch_loader(Reader(), 2, process, 1, sampler=range(9), batch_size=None))
    readers = [reader.pid for reader in loader._workers]
    print(readers, flush=True)
    next(loader), next(loader)
    HAPPENS

run_script(main)
"""
LAST_WORDS = {
    "raise KeyError('of a bug')": (1, "KeyError: 'of a bug'"),
    "raise KeyboardInterrupt": (130, "interrupted"),
    "raise MemoryError('4 GiB')": (2, "error: out of memory; a smaller optim.batch_size.*4 GiB"),
    "os.kill(readers[0], signal.SIGKILL), next(loader)": (
        2,
        "error: DataLoader.*Killed.*smaller data.workers",
    ),
    "os.kill(readers[1], signal.SIGBUS), next(loader)": (2, "error: no room in /dev/shm.*--shm-size"),
}


def test_errors_become_one_line_and_exit_code_2(train, capsys):
    def main():
        return train("run", "optim.lrr=1")

    with pytest.raises(SystemExit) as stop:
        stopping.run_script(main)
    captured = capsys.readouterr().err
    assert stop.value.code == 2 and captured.count("\n") == 1 and captured.startswith("error: ")


@pytest.mark.parametrize("happens", LAST_WORDS)
def test_no_reading_process_outlives_its_script(server, tmp_path, happens):
    """They ignore SIGTERM, and each of them waits in its second batch."""
    (tmp_path / "reading.py").write_text(READING.replace("HAPPENS", happens))
    end = server.run(tmp_path, [str(tmp_path / "reading.py")])
    code, words = LAST_WORDS[happens]
    assert end["code"] == code and not end["killed"], end
    assert re.search(words, end["err"].strip().splitlines()[-1]), end["err"]
    assert code == 1 or "Traceback" not in end["err"]
    assert not [pid for pid in json.loads(end["out"]) if is_running(pid)]


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"  # dead, though perhaps nobody has asked for its exit code yet
