"""Find the checkpoint from which a run continues, and check whether the run is finished."""

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aezoo.errors import AezooError
from aezoo.io import atomic_files, hub_files, run_folder, tag_files


def newest_resumable(text: str) -> Path:
    """Return the newest intact checkpoint of a run, or a given file; print skipped checkpoints.

    Args:
        text: a run folder (`runs/vae/0`), its folder of checkpoints, a folder of runs, of which the newest is used, or
            a checkpoint file. If a file within a run is damaged or missing, the run continues from an older checkpoint
            of the run, with the same result. Any other file must be intact.

    Raises:
        AezooError: there is no intact checkpoint.
    """
    if hub_files.is_address(text):
        raise AezooError(f"{text} is a saved model, which has no training state to continue from: give a run folder")
    tag_files.refuse_tag(text)
    if "://" in text:
        raise AezooError(f"checkpoints can only be loaded from disk, not from {text}: download it first")
    path = Path(text)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise AezooError(f"{path} is a pipe or a device: give a .ckpt file or a run folder")
    if path.suffix == ".ckpt" and not path.is_dir():
        home = run_folder.parent_folder(path)
        if home.name == run_folder.CHECKPOINTS and home.is_dir():
            return _newest(home, home / path.name)
        if not path.exists():
            raise AezooError(f"no checkpoint at {path}: give a .ckpt file or a run folder")
        atomic_files.check_intact(path)
        return path
    if not path.exists():
        raise AezooError(f"no checkpoint at {path}: give a .ckpt file or a run folder")
    if path.is_file():
        atomic_files.check_intact(path)
        return path
    for home in run_folder.checkpoint_folders(path):
        if _has_saved(home):
            return _newest(home)
    raise AezooError(f"no .ckpt file in {path} or its {run_folder.CHECKPOINTS} folder: has the run saved one yet?")


def latest_run(
    home: Path, matches: Callable[[Path], bool] = lambda checkpoint: True
) -> tuple[Path | None, Path | None]:
    """Return the checkpoint from which `--resume auto` continues.

    Args:
        home: the folder of all runs of a recipe, `runs/vae`.
        matches: returns whether a checkpoint belongs to this command's data; runs on other data are skipped.

    Returns:
        The newest intact checkpoint of the newest such run, or None if there is no run or it has not saved one yet; and
        the folder of that run, or None.

    Raises:
        AezooError: the newest run has saved checkpoints, but none of them is intact.
    """
    runs = [path for path in home.glob("*") if path.name.isdigit() and path.is_dir()]
    if not runs:
        print(f"aezoo: no run in {home} yet: starting one", file=sys.stderr)
        return None, None
    for run in sorted(runs, key=lambda path: int(path.name), reverse=True):
        folder = run_folder.checkpoints_of(run)
        if folder == run / run_folder.CHECKPOINTS and not _has_saved(folder):
            print(f"aezoo: {run} was stopped before its first checkpoint: starting it again", file=sys.stderr)
            return None, run
        found = _newest(folder)
        if matches(found):
            return found, run
        print(f"aezoo: {run} was trained on other data, or its data have changed: it is not continued", file=sys.stderr)
    print(f"aezoo: no run on these data in {home} yet: starting one", file=sys.stderr)
    return None, None


def finished_message(
    source: Path, run: Path | None, max_epochs: Any, max_steps: Any, early_stopping: Mapping[str, Any]
) -> str | None:
    """Return a message if the run of a checkpoint has already finished under the current limits.

    Args:
        source: the checkpoint.
        run: the folder of its run, if there is one.
        max_epochs: the trainer's current limit of epochs.
        max_steps: its current limit of steps.
        early_stopping: the settings of that callback; empty if the run has none.
    """
    try:
        end = json.loads((source.parent / atomic_files.FINISHED).read_text())
        epoch, step = int(end["epoch"]), int(end["step"])
        early = end.get("early_stopping")
        same = not early and (end["max_epochs"], end["max_steps"]) == (max_epochs, max_steps)
        at_limit = _reached(max_epochs, epoch) or (bool(early) and _reached(max_steps, step))
        stopped_early = bool(early) and _is_same_patience(early_stopping, early)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not (same or at_limit or stopped_early):
        return None
    name = str(run or source)
    cures = ["--trainer.max_epochs"] if same or at_limit else []
    if stopped_early:
        cures.append("--early_stopping.patience (0: no early stopping)")
    return (
        f"aezoo: {name} is finished (epoch {epoch}, step {step}), nothing is left to do; "
        f"continue with a larger {' and a larger '.join(cures)}, or show its metrics: "
        f"aezoo test --ckpt_path {shlex.quote(name)}"
    )


def _reached(limit: Any, at: int) -> bool:
    return isinstance(limit, int) and 0 <= limit <= at


def _is_same_patience(now: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    same = all(now.get(key) == then[key] for key in ("monitor", "min_delta"))
    return same and 0 < now["patience"] <= then["patience"]


def _has_saved(folder: Path) -> bool:
    return folder.is_dir() and (
        any(folder.glob("*.ckpt")) or atomic_files.record_path(folder / atomic_files.LAST).exists()
    )


def _newest(folder: Path, first: Path | None = None) -> Path:
    found, lines = atomic_files.newest_checkpoint(folder, first)
    if found is None:
        reasons = "; ".join(lines) or f"no .ckpt file in {folder}"
        raise AezooError(f"{reasons}; there is no other intact checkpoint: train from scratch with --resume off")
    for line in lines:
        print(f"aezoo: {line}", file=sys.stderr)
    if lines:
        print(f"aezoo: continuing from {found} instead", file=sys.stderr)
    return found
