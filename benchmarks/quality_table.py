"""The CSV of `benchmarks.quality`: how rows are matched with runs, and the baselines that its rows share."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .common import ResultsCSV, as_text, number

KEY = ("model", "code_size", "seed", "budget", "batch_size", "probe_rows")
BASELINE = ("pixels_probe", "pixels_knn", "pca_probe", "pca_knn", "pca_mse", "pca_psnr")


class QualityTable(ResultsCSV):
    """A table in which a setting that did not affect a run's figures does not make a separate row.

    `importance_samples` is empty without a log_likelihood, and in rows from before it was recorded. `most_seconds` is
    the time limit of a run; a run that reached its epochs earlier equals one without a limit.
    """

    def find(self, row: Mapping[str, object]) -> dict[str, str] | None:
        """The row of the same run, if there is one; preferably with the same `most_seconds`."""
        wanted = {name: as_text(row.get(name)) for name in (*self.key, "importance_samples", "most_seconds")}
        same = [candidate for candidate in self.rows if self._same(candidate, wanted)]
        exact = [there for there in same if there.get("most_seconds", "") == wanted["most_seconds"]]
        return next(iter(exact + same), None)

    def _same(self, other: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
        if any(other.get(name, "") != wanted[name] for name in self.key):
            return False
        if len({other.get("importance_samples", ""), wanted["importance_samples"]} - {""}) > 1:
            return False
        most = wanted["most_seconds"]
        took = number(other, "seconds")
        in_time = not most or (took is not None and took <= float(most))
        return other.get("most_seconds", "") == most or (reached_budget(other) and in_time)

    def put_run(self, row: Mapping[str, Any]) -> None:
        """Put a run's row; the number of draws is a setting only if samples were drawn, or may have been."""
        drawn = row.get("error") or row.get("log_likelihood") is not None
        self.put({**row, "importance_samples": row["importance_samples"] if drawn else None})

    def baselines(self, probe_rows: int) -> dict[int, dict[str, str]]:
        """Existing baselines by code size, 0 for raw pixels; they depend only on the data."""
        known: dict[int, dict[str, str]] = {}
        for row in self._probed(probe_rows):
            for size, prefix in ((0, "pixels_"), (int(row["code_size"]), "pca_")):
                found = {name: row[name] for name in BASELINE if name.startswith(prefix) and row.get(name)}
                known |= {size: found} if found else {}
        return known

    def fill_baselines(self, baselines: Mapping[int, Mapping[str, Any]], probe_rows: int) -> None:
        """Add baselines to rows that lack them, for example because they had failed."""

        def missing() -> list[tuple[dict[str, str], str, Any]]:
            return [
                (row, name, value)
                for row in self._probed(probe_rows)
                for name, value in {**baselines.get(0, {}), **baselines.get(int(row["code_size"]), {})}.items()
                if not row.get(name)
            ]

        if missing():
            with self.update():
                for row, name, value in missing():
                    row[name] = as_text(value)

    def _probed(self, probe_rows: int) -> Iterable[dict[str, str]]:
        # a size that is not a number was written by hand
        rows = (row for row in self.rows if row.get("code_size", "").isdigit())
        return (row for row in rows if row.get("probe_rows") == str(probe_rows))


def reached_budget(row: Mapping[str, str]) -> bool:
    """Whether a run reached its budget of epochs."""
    requested = row.get("budget", "").partition("epochs=")[2]
    epochs = number(row, "epochs")
    return bool(requested) and epochs is not None and epochs >= float(requested)


def dataset_name(data: Mapping[str, Any]) -> str:
    """The data set as a word for a file name; for the user's own files, their name and a fingerprint."""
    name = data["root"] if data["name"] in ("array", "folder") else data["name"]
    own = "" if name == data["name"] and len(Path(name).parts) == 1 else _fingerprint(Path(name))
    word = re.sub(r"[^\w.-]+", "-", Path(name).stem)
    rows = f"{data['rows']}rows" if data.get("rows") else ""
    return "-".join(filter(None, (word, own, str(data["size"] or ""), rows)))


def _fingerprint(path: Path) -> str:
    """Eight digits of a digest of a file's content, or of the names and sizes of a folder's files."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:8]
    files = sorted((str(part.relative_to(path)), part.stat().st_size) for part in path.rglob("*") if part.is_file())
    return hashlib.sha256(repr(files).encode()).hexdigest()[:8]
