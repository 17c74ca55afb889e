"""engine/stopping.py: how a script ends."""

import pytest

from engine import stopping


def test_errors_become_one_line_and_exit_code_2(train, capsys):
    def main():
        return train("run", "optim.lrr=1")

    with pytest.raises(SystemExit) as stop:
        stopping.run_script(main)
    captured = capsys.readouterr().err
    assert stop.value.code == 2 and captured.count("\n") == 1 and captured.startswith("error: ")
