"""The CSVs of `benchmarks.tasks`: rows of a model and a command, which are replaced together, and rows of baselines.

Baselines belong to a setting, which is KEY without the model, and to a part of the command (column `task`). They have
the name of the model with which they were measured. If the rows of that model are removed, the baselines stay until
another model measures them.
"""

from collections.abc import Sequence
from typing import Any

from .common import ResultsCSV, as_text

Row = dict[str, Any]
KEY = ("dataset", "model", "seed", "budget", "code_size", "fit_rows", "test_rows", "classes")
# columns of every CSV; the command's own columns follow
FIRST_COLUMNS = ("dataset", "model", "code_size", "seed", "budget", "fit_rows", "test_rows", "method", "kind")


class CommandTable(ResultsCSV):
    """The CSV of a command, with several rows for each key."""

    def rows_of(self, head: Row, key: Sequence[str] = KEY) -> list[dict[str, str]]:
        """All rows that agree with the head in the columns of a key."""
        wanted = [as_text(head.get(name)) for name in key]
        return [row for row in self.rows if [row.get(name, "") for name in key] == wanted]

    def needs(self, head: Any) -> bool:
        """Whether these rows still have to be measured."""
        existing = self.rows_of(head)
        failed = any(row.get("error") for row in existing)
        needed = not existing or self.again == "all" or (self.again == "failed" and failed)
        if needed:
            self.check_writable()
        return needed

    def model_rows(self, head: Row) -> list[dict[str, str]]:
        """Rows of the model itself."""
        return [row for row in self.rows_of(head) if not is_baseline(row)]

    def baselines(self, head: Row, task: str) -> list[dict[str, str]]:
        """Baselines of a setting, whichever model measured them."""
        existing = self.rows_of(head, [name for name in KEY if name != "model"])
        return [row for row in existing if is_baseline(row) and row.get("task", "") == task]

    def needs_baselines(self, head: Row, task: str) -> bool:
        """Whether a model that is measured should also measure the baselines."""
        existing = self.baselines(head, task)
        failed = any(row.get("error") for row in existing)
        return not existing or self.again == "all" or (self.again == "failed" and failed)

    def can_measure_baselines(self, head: Row, task: str) -> bool:
        """Whether a model has finished this part of the command, so that it can run again for the baselines."""
        return any(row.get("task", "") == task and not row.get("error") for row in self.model_rows(head))

    def replace(self, head: Row, rows: Sequence[Row]) -> None:
        """Replace the model's rows, and the baselines of their setting, and write the file."""
        new = []
        for row in rows:
            cells = {name: (head | row).get(name) for name in FIRST_COLUMNS} | row
            cells |= {"classes": head["classes"]} if head.get("classes") else {}
            new.append({name: as_text(value) for name, value in cells.items() if name != "out_of_memory"})
        with self.update():
            old = self.model_rows(head)
            for task in {row.get("task", "") for row in new if is_baseline(row)}:
                old += self.baselines(head, task)
            self.rows = [row for row in self.rows if row not in old] + new


def is_baseline(row: Row) -> bool:
    """Whether a row belongs to no model: a baseline, or a reference such as real samples (but not a model's bound)."""
    return row["kind"] == "baseline" or (
        row["kind"] == "reference" and not row["method"].startswith(f"{row['model']}, ")
    )
