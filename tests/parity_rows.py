"""A pytest plugin that keeps the rows of comparisons with references, loaded by `--parity FILE`."""

import json
from pathlib import Path

import pytest


class ParityRows:
    """The plugin; rows of the tests in a run replace those of earlier runs.

    Args:
        file: JSON file of rows by test.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: dict[str, list[dict[str, object]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown" and report.passed:
            rows = [row for kind, found in report.user_properties if kind == "parity" for row in found]
            if rows:
                self.rows[report.nodeid] = rows

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput") or not self.rows:
            return
        held = json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # one row per line
        tests = [
            f"{json.dumps(test)}: [\n " + ",\n ".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]"
            for test, rows in sorted((held | self.rows).items())
        ]
        self.file.write_text("{\n" + ",\n".join(tests) + "\n}\n", encoding="utf-8")
