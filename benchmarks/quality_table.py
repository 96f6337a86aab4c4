"""The CSV of `benchmarks.quality`: how rows are matched with runs, and the baselines that its rows share."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .common import ResultsCSV, as_text, number

KEY = ("model", "kind", "size", "seed", "budget", "batch_size", "probe_rows", "importance_samples")
BASELINE = ("pixels_probe", "pixels_knn", "pca_probe", "pca_knn", "pca_mse", "pca_psnr", "pca_mse_at_bits")


class CappedTable(ResultsCSV):
    """A table of trainings that a limit of time may have ended."""

    def needs(self, row: Mapping[str, object]) -> bool:
        """Whether the row still has to be measured: also a run that its limit of time ended, with a longer one."""
        there = self.find(row) or {}
        limit = number(there, "most_seconds") or 0.0
        is_cut = there.get("stopped") == "capped" and limit < float(str(row.get("most_seconds", 0)))
        if is_cut:
            self.check_writable()
        return is_cut or super().needs(row)


class QualityTable(CappedTable):
    """A table whose rows share baselines, which depend only on the data and on the size of codes."""

    def baselines(self, probe_rows: int) -> dict[int, dict[str, str]]:
        """Existing baselines by code size, 0 for raw pixels."""
        known: dict[int, dict[str, str]] = {}
        for row in self._probed(probe_rows):
            for size, prefix in ((0, "pixels_"), (int(row["size"]), "pca_")):
                found = {name: row[name] for name in BASELINE if name.startswith(prefix) and row.get(name)}
                known |= {size: found} if found else {}
        return known

    def fill_baselines(self, baselines: Mapping[int, Mapping[str, Any]], probe_rows: int) -> None:
        """Add baselines to rows without them, for example because they had failed."""

        def missing() -> list[tuple[dict[str, str], str, Any]]:
            return [
                (row, name, value)
                for row in self._probed(probe_rows)
                for name, value in {**baselines.get(0, {}), **baselines.get(int(row["size"]), {})}.items()
                if not row.get(name)
            ]

        if missing():
            with self.update():
                for row, name, value in missing():
                    row[name] = as_text(value)

    def _probed(self, probe_rows: int) -> Iterable[dict[str, str]]:
        # a size that is not a number was written by hand
        rows = (row for row in self.rows if row.get("size", "").isdigit())
        return (row for row in rows if row.get("probe_rows") == str(probe_rows))


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
