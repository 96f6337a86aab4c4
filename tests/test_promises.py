"""PROMISES.md is the output of `python -m tests.promises`, and every test that it names exists."""

import itertools
import json
import re

import promises
import pytest


def test_page_matches_recorded_figures():
    assert promises.PAGE.read_text(encoding="utf-8") == promises.page(promises.results()), "python -m tests.promises"


@pytest.mark.parametrize("promise", promises.PROMISES, ids=lambda promise: promise.text)
def test_promise_tests_exist_and_figures_are_measured(promise):
    assert promise.tests and all((promises.ROOT / test).exists() for test in promise.tests)
    assert bool(promise.figure) == bool(promise.run)
    assert not promise.run or promise.run in promises.RUNS


def test_figures_are_recorded_only_when_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(promises, "RESULTS", tmp_path / "counts.json")
    monkeypatch.delenv(promises._SWITCH, raising=False)
    promises.add("soak", "a", {"steps": 3})
    assert not promises.RESULTS.exists()
    monkeypatch.setenv(promises._SWITCH, "1")
    promises.add("soak", "a", {"steps": 3})
    promises.add("soak", "b", {"steps": 4})
    assert json.loads(promises.RESULTS.read_text())["soak"] | {"cases": 0} == {"cases": 0, "count": 2, "steps": 7}


def test_warnings_fail_and_ignored_ones_have_a_reason(pytestconfig):
    """The checks of models ignore none, see tests/test_models.py; `aezoo.testing` has its own filters."""
    first, *ignored = pytestconfig.getini("filterwarnings")
    assert first == "error" and all(line.startswith("ignore:") for line in ignored)
    text = (promises.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"filterwarnings = \[\n(.*?)\n\]", text, re.DOTALL)[1].splitlines()
    for before, line in itertools.pairwise(block):
        assert "ignore:" not in line or before.strip().startswith("#"), f"{line.strip()} has no reason"
