"""The results of a run and suggested commands."""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only
from rich import box, get_console
from rich.table import Table

from aezoo.bases.entropy_coded import EntropyCoded
from aezoo.callbacks.base import BestLoss, is_dry_run, run_folder
from aezoo.callbacks.checkpoints import checkpoint_callback
from aezoo.callbacks.learning_curves import LearningCurves
from aezoo.callbacks.media import viewers
from aezoo.data import DataModule
from aezoo.report.diagnosis import diagnose
from aezoo.report.writer import NAME

# minimum terminal columns for a frame and a path, in addition to the longest name
_MIN_WIDTH = 30


class Summary(pl.Callback):
    """Prints metrics, files, the diagnosis and suggested commands at the end of fit, validate and test.

    Attributes:
        test_follows: set to True if a test follows the fit; then there is only one table, at the end of the test.
    """

    def __init__(self) -> None:
        super().__init__()
        self.test_follows = False
        self._trained: dict[str, str] = {}
        self._notes: list[str] = []
        self._best = BestLoss()
        self._began = time.monotonic()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._folder = run_folder(trainer)
        self._began = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._best.update(trainer)
        elif trainer.state.fn == "validate" and not is_dry_run(trainer):
            print_summary("Validated", {**_metrics(trainer, "val/"), **self._places(trainer)}, _viewers(trainer))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_dry_run(trainer):
            return
        rows = {}
        if self._best.epoch >= 0:
            rows["best val/loss"] = f"{self._best.value:.4f} (epoch {self._best.epoch + 1})"
        rows |= _metrics(trainer, "val/")
        rows |= _metrics(trainer, "train/")
        rows["time"] = _duration(time.monotonic() - self._began)
        self._trained = rows
        saver = checkpoint_callback(trainer)
        histories = [one.curves for one in trainer.callbacks if isinstance(one, LearningCurves)]  # type: ignore[attr-defined]
        run = shlex.quote(_short(self._folder)) if saver else None
        self._notes = [str(verdict) for history in histories for verdict in diagnose(history, run)]
        if not self.test_follows:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            # only data modules of aezoo have a list of splits
            testable = saver and (not isinstance(data, DataModule) or "test" in data.splits())
            test = [_command("aezoo test --ckpt_path", self._folder)] if testable else []
            then = test + self._task_commands(trainer, pl_module) * bool(saver) + _viewers(trainer)
            print_summary("Trained", {**rows, **self._places(trainer)}, then, self._notes)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_dry_run(trainer):
            return
        trained = self._trained if self.test_follows else {}
        title = "Trained and tested" if trained else "Tested"
        then = self._task_commands(trainer, pl_module) if trained else []
        rows = {**trained, **_metrics(trainer, "test/"), **self._places(trainer)}
        print_summary(title, rows, then + _viewers(trainer), self._notes if trained else [])

    def state_dict(self) -> dict[str, Any]:
        return self._best.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best.load_state_dict(state_dict)

    def _task_commands(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[str]:
        """Return commands that use the model, starting with its main purposes."""
        model: Any = pl_module
        suits = {
            "denoise": getattr(model, "corruption", None) is not None,
            "impute --hide 0.2": "imputation" in getattr(model, "tags", ()),
            "generate": getattr(model, "has_prior", False),
            "compress": getattr(model, "discrete_code", False) or isinstance(model, EntropyCoded),
        }
        names = [*(name for name, is_suited in suits.items() if is_suited), "reconstruct", "detect", "embed"]
        data: Any = getattr(trainer, "datamodule", None)
        splits = data.splits() if isinstance(data, DataModule) else ["test"]
        # the commands read the test split by default; generate needs no samples
        other = "" if "test" in splits else f" --split {'val' if 'val' in splits else 'train'}"
        return [_command(f"aezoo {name} --ckpt_path", self._folder) + other * (name != "generate") for name in names]

    def _places(self, trainer: pl.Trainer) -> dict[str, str]:
        # there is none if a checkpoint outside a run folder is tested
        rows = {"run folder": _short(self._folder)} if self._folder.is_dir() else {}
        pictures = self._folder / "pictures"
        if pictures.is_dir():
            rows["pictures"] = _short(pictures)
        report = self._folder / NAME
        if report.is_file():
            rows["report"] = _short(report)
        saver = checkpoint_callback(trainer)
        if saver and saver.best_model_path:
            rows["best checkpoint"] = _short(Path(saver.best_model_path))
        return rows


@rank_zero_only
def print_summary(title: str, rows: dict[str, str], commands: list[str], notes: Sequence[str] = ()) -> None:
    """Print rows as a table, followed by notes and commands to copy; with frames only in a wide terminal."""
    console = get_console()
    wide = max(map(len, rows), default=0)
    # a frame would take too much space in a narrow window
    if (console.is_terminal or console.is_jupyter) and console.width >= wide + _MIN_WIDTH:
        table = Table(title=title, box=box.ROUNDED, show_header=False, title_justify="left", title_style="bold")
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, value)
        console.print(table)
        for note in notes:
            console.print("Note:", note, soft_wrap=True, highlight=False, markup=False)
        for i, command in enumerate(commands):
            # not wrapped, so that the command can be copied
            console.print("Next:" if i == 0 else "     ", command, soft_wrap=True, highlight=False, markup=False)
        return
    lines = [f"{title}", *(f"  {name:{wide}}  {value}" for name, value in rows.items())]
    lines += [f"Note: {note}" for note in notes]
    print("\n".join([*lines, *(f"Next: {command}" for command in commands)]), flush=True)


def _metrics(trainer: pl.Trainer, prefix: str) -> dict[str, str]:
    return {
        name: f"{float(value):,.0f}" if name.endswith("_per_s") else f"{float(value):.4g}"
        for name, value in sorted(trainer.callback_metrics.items())
        if name.startswith(prefix)
    }


def _viewers(trainer: pl.Trainer) -> list[str]:
    return [f"{words}{shlex.quote(_short(path))}" for words, path in viewers(trainer)]


def _command(words: str, path: Path) -> str:
    return f"{words} {shlex.quote(_short(path))}"


def _short(path: Path) -> str:
    """Return the path, relative to the working directory if it is inside it."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
