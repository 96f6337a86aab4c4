"""Commands that end with exit code 2 and one line that says why."""

import pytest

from aezoo.cli.main import main


def refused(capsys, *argv):
    """The last line on stderr, which says why."""
    *_, line = _stderr(capsys, *argv)
    assert line.startswith("aezoo: ")
    return line


def refused_in_one_line(capsys, *argv):
    """The only line on stderr."""
    lines = _stderr(capsys, *argv)
    assert len(lines) == 1, lines
    return lines[0]


def _stderr(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()
