"""No test is skipped because of a missing package, and each skip is listed in CONTRIBUTING.md with its reason."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SKIP = re.compile(r"pytest\.skip\(|mark\.skip(?:if)?\(|mark\.xfail|pytest\.xfail\(")


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    """The text of each file of tests, by its path."""
    found = {path.relative_to(TESTS.parent).as_posix(): path.read_text() for path in TESTS.rglob("*.py")}
    del found["tests/test_skips.py"]
    return found


def test_no_test_is_skipped_for_a_missing_package(sources: dict[str, str]) -> None:
    assert [name for name, text in sources.items() if "importorskip" in text] == []


def test_every_skip_is_listed_in_contributing(sources: dict[str, str]) -> None:
    text = (TESTS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("## Skipped tests")[1].split("\n## ")[0].split("|---|---|---|")[1]
    listed = set(re.findall(r"`(tests/[\w/]+\.py)`", table))
    # skips raised by scikit-learn
    assert listed - {"tests/test_sklearn.py"} == {name for name, text in sources.items() if SKIP.search(text)}
