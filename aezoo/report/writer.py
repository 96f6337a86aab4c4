"""Writing the report of runs into a file."""

import os
from collections.abc import Sequence
from pathlib import Path

from aezoo.errors import AezooError
from aezoo.report.page import page
from aezoo.report.runs import find_runs

NAME = "report.html"


def write_report(runs: str | Path | Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write one HTML file about a run, or a comparison of several; it loads no other files and has no scripts.

    Args:
        runs: folders of runs, files in them such as checkpoints, or folders that contain runs.
        output: the file; by default `report.html` in the run's folder or, for several runs, in the working directory.

    Returns:
        The file.

    Raises:
        AezooError: there is no run, there are too many, or the file cannot be written.
    """
    paths = [runs] if isinstance(runs, str | Path) else list(runs)
    if not paths:
        raise AezooError("which run? Give its folder, such as runs/vae/0")
    found = find_runs([Path(path) for path in paths])
    path = Path(output) if output is not None else (found[0].folder if len(found) == 1 else Path()) / NAME
    content = page(found).encode("utf-8", "replace")
    # a browser that reads it meanwhile finds the old file or the new one
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise AezooError(f"cannot write {path}: {error.strerror or error}; give another file with --out") from error
    return path
