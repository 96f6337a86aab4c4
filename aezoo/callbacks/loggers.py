"""The loggers of a run folder, which a resumed run continues: TensorBoard, CSV, W&B and MLflow.

W&B and MLflow name their runs themselves; `loggers.json` in the run folder stores these names. Values that cannot be
sent to a server do not end the run: they are sent later, and a message at the end reports those that were not sent.
"""

import csv
import io
import json
import math
import os
import re
import secrets
import shutil
import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from aezoo.errors import AezooError, install_hint
from aezoo.io import atomic_files

TRACKING_URI = "MLFLOW_TRACKING_URI"
_NAMES = "loggers.json"
_PLAIN = (bool, int, float, str, list, type(None))
# maximum values in a request to MLflow, and maximum seconds between two requests
_BATCH, _SECONDS = 1000, 10.0
# seconds until a failed server is tried again
_PAUSE = 60.0


class TensorBoard(TensorBoardLogger):
    """A TensorBoardLogger without the chart of the epoch number, which Lightning logs with all metrics."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({key: value for key, value in metrics.items() if key != "epoch"}, step)


# ---- CSV ------------------------------------------------------------------------------------------------------------


class StepLogger(CSVLogger):
    """A CSVLogger with files in the run's folder `csv`, since `LearningCurves` writes metrics.csv in the run folder.

    Args:
        args: see CSVLogger.
        resumed_at: optimiser steps of the checkpoint from which the run continues; None keeps all rows.
        kwargs: see CSVLogger.
    """

    def __init__(self, *args: Any, resumed_at: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resumed_at = resumed_at
        self._table: StepTable | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._table is None:
            self._table = StepTable(Path(self.log_dir) / "csv", self._resumed_at)
        return self._table

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._table is not None:
            self._table.save()


class StepTable:
    """metrics.csv and hparams.yaml of a StepLogger; rows of earlier starts of the run are kept.

    Rows after the checkpoint, which the run will write again, are moved to metrics-0.csv, metrics-1.csv, ...

    Args:
        folder: folder of the files.
        step: optimiser steps of the checkpoint; None keeps all rows.

    Attributes:
        metrics: rows that have not been written yet.
    """

    def __init__(self, folder: Path, step: int | None) -> None:
        self.metrics: list[dict[str, Any]] = []
        self._folder, self._path, self._columns = folder, folder / "metrics.csv", [""][:0]
        self._hparams: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if self._path.is_file():
            rows = self._read()
            kept = [row for row in rows if step is None or _is_before(row, step)]
            if len(kept) < len(rows):
                number = sum(1 for _ in folder.glob("metrics-*.csv"))
                shutil.copyfile(self._path, folder / f"metrics-{number}.csv")
            self._write(kept)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row."""
        row = {key: value.item() if hasattr(value, "item") else value for key, value in metrics.items()}
        self.metrics.append({**row, "step": len(self.metrics) if step is None else step})

    def log_hparams(self, params: Mapping[str, Any]) -> None:
        """Write hyperparameters to hparams.yaml."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in params.items()}
        self._hparams |= {key: value if isinstance(value, _PLAIN) else str(value) for key, value in plain.items()}
        text = yaml.safe_dump(self._hparams, sort_keys=False)
        atomic_files.write(self._folder / "hparams.yaml", lambda file: file.write(text.encode()))

    def save(self) -> None:
        """Write the rows that have not been written yet."""
        if not self.metrics:
            return
        if {key for row in self.metrics for key in row} - set(self._columns):
            self._write([*(self._read() if self._path.is_file() else []), *self.metrics])
        else:
            with self._path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self._columns, lineterminator="\n").writerows(self.metrics)
        self.metrics = []

    def _read(self) -> list[dict[str, Any]]:
        with self._path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            # a killed run may have left an incomplete row
            rows = [row for row in table if None not in row.values()]
            self._columns = sorted({*self._columns, *(table.fieldnames or [])})
        return rows

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self._columns = sorted({*self._columns, *(key for row in rows for key in row)})
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic_files.write(self._path, lambda file: file.write(text.getvalue().encode()))


def _is_before(row: Mapping[str, Any], step: int) -> bool:
    """Return whether a row precedes a checkpoint of `step` steps; rows have the number of steps before their own."""
    try:
        at = int(row["step"])
    except (KeyError, ValueError):
        return True
    # values logged at the end of a fit
    ended = any(value for key, value in row.items() if key.startswith(("best/", "test/")))
    return at < step or (at == step and ended)


# ---- W&B ------------------------------------------------------------------------------------------------------------


class WandB(WandbLogger):
    """A WandbLogger with files in the run folder; a resumed run continues the same W&B run.

    Args:
        folder: the run folder.
        kwargs: see WandbLogger; the default id is that of the run's first start.
    """

    def __init__(self, folder: Path, **kwargs: Any) -> None:
        self.folder, self._began = folder, False
        given = kwargs.pop("version", None) or kwargs.pop("id", None)
        version = given or read_names(folder).get("wandb", {}).get("id") or secrets.token_hex(4)
        # the writing process may have another working directory
        super().__init__(save_dir=folder.absolute(), version=version, **kwargs)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._began:
            return super().experiment
        import wandb

        try:
            run = super().experiment
        except wandb.errors.Error as error:
            raise AezooError(
                f"W&B could not start a run ({_brief(error)}): run `wandb login`, set WANDB_MODE=offline, or remove "
                "wandb from --logger"
            ) from error
        self._began = True
        note_names(self.folder, "wandb", {"id": run.id, "project": self.name})
        return run

    def close(self) -> None:
        """Write all data and finish the W&B run."""
        if self._began:
            self.experiment.finish()


# ---- MLflow ---------------------------------------------------------------------------------------------------------


class MLflow(MLFlowLogger):
    """An MLFlowLogger that sends values in batches; a resumed run continues the same MLflow run.

    Without an address, values are stored in `mlflow/mlflow.db` in the run folder, and files in `mlflow/artifacts`.

    Args:
        folder: the run folder.
        tracking_uri: address of the server or the database; empty for the database in the run folder.
        kwargs: see MLFlowLogger.

    Raises:
        AezooError: the server cannot be reached, or the packages for databases are not installed.
    """

    def __init__(self, folder: Path, tracking_uri: str | None = None, **kwargs: Any) -> None:
        own = folder.absolute() / "mlflow"
        self.folder, self.is_local = folder, not tracking_uri
        self._prefix_given = kwargs.get("prefix", "")
        self._values: list[Any] = []
        self._sent_at = time.monotonic()
        self._failed_at, self._closed = -math.inf, False
        held = read_names(folder).get("mlflow", {})
        address = tracking_uri or f"sqlite:///{own / 'mlflow.db'}"
        # by default, MLflow retries an unreachable server for four minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        if self.is_local:
            own.mkdir(parents=True, exist_ok=True)
            _relocate(own)
            kwargs = {"artifact_location": (own / "artifacts").as_uri()} | kwargs
        self.address = address
        import mlflow

        given = os.environ.get(TRACKING_URI)
        try:
            if held.get("run_id") and not kwargs.get("run_id") and held.get("address") == self._name_of(address):
                kwargs["run_id"] = _found(address, held["run_id"])
            super().__init__(tracking_uri=address, save_dir=None, **kwargs)
            note_names(folder, "mlflow", {"run_id": self.run_id, "address": self._name_of(address)})
            if kwargs.get("run_id"):
                self.experiment.update_run(self.run_id, status="RUNNING")
        except (mlflow.exceptions.MlflowException, ImportError) as error:
            local = f"{install_hint('mlflow')}, or " if self.is_local else ""
            raise AezooError(
                f"MLflow cannot use {address} ({_brief(error)}): {local}set MLFLOW_TRACKING_URI to another address, or "
                "remove mlflow from --logger"
            ) from error
        finally:
            # MLflow sets it to the address of this run, which would affect later runs of this process
            if given is None:
                os.environ.pop(TRACKING_URI, None)
            else:
                os.environ[TRACKING_URI] = given

    def _name_of(self, address: str) -> str:
        """Return an address as stored in `loggers.json`: empty for the run folder, which may be moved."""
        return "" if self.is_local else address

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        prefix = f"{self._prefix_given}-" if self._prefix_given else ""
        for name, value in metrics.items():
            # characters that MLflow allows
            key = re.sub(r"[^\w/. -]+", "", f"{prefix}{name}", flags=re.ASCII)
            self._values.append(Metric(key=key, value=float(value), timestamp=now, step=step or 0))
        if len(self._values) >= _BATCH or time.monotonic() - self._sent_at >= _SECONDS:
            self._send()

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log hyperparameters that the run does not have yet, since MLflow does not allow to change them."""
        values = params if isinstance(params, Mapping) else vars(params)
        self._try("hyperparameters", lambda: self._add_params(values))

    @rank_zero_only
    def save(self) -> None:
        super().save()
        self._send()

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        self._send(again=True)
        self._try("the end of the run", lambda: super(MLflow, self).finalize(status))

    @rank_zero_only
    def close(self) -> None:
        """Send the remaining values."""
        self._send(again=True)
        if self._values:
            rank_zero_warn(
                f"{len(self._values)} values could not be sent to MLflow at {self.address}; metrics.csv in the run "
                "folder contains those of each epoch"
            )

    def _add_params(self, values: Mapping[str, Any]) -> None:
        held = self.experiment.get_run(self.run_id).data.params
        super().log_hyperparams({key: value for key, value in values.items() if key not in held})

    def _send(self, again: bool = False) -> None:
        """Send the values; keep them if that fails."""
        if again or time.monotonic() - self._failed_at >= _PAUSE:
            self._try("metrics", self._send_all)

    def _send_all(self) -> None:
        self._sent_at = time.monotonic()
        while self._values:
            self.experiment.log_batch(run_id=self.run_id, metrics=self._values[:_BATCH])
            del self._values[:_BATCH]

    def _try(self, what: str, action: Any) -> None:
        try:
            action()
        except Exception as error:  # must not end training
            if self._failed_at == -math.inf:
                rank_zero_warn(f"MLflow at {self.address} did not accept {what}: {_brief(error)}")
            self._failed_at = time.monotonic()


def _found(address: str, run_id: str) -> str | None:
    """Return the id of the run if the server still has it."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        run = MlflowClient(address).get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run_id if run.info.lifecycle_stage == "active" else None


def _relocate(folder: Path) -> None:
    """Update the absolute addresses of files in the database of a run folder that was moved."""
    path, address = folder / "mlflow.db", (folder / "artifacts").as_uri()
    if not path.is_file():
        return
    with closing(sqlite3.connect(path)) as base, base:
        for old, experiment in base.execute("SELECT artifact_location, experiment_id FROM experiments").fetchall():
            if old and old != address and old.endswith("/mlflow/artifacts"):
                base.execute(
                    "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) WHERE experiment_id = ?",
                    (address, len(old) + 1, experiment),
                )
                base.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?",
                             (address, experiment))  # fmt: skip


# ---- names ----------------------------------------------------------------------------------------------------------


def read_names(folder: Path) -> dict[str, dict[str, str]]:
    """Return the names of a folder's run in W&B and MLflow."""
    try:
        found = json.loads((folder / _NAMES).read_text("utf-8"))
        return {key: {k: str(v) for k, v in value.items()} for key, value in found.items()}
    except (OSError, ValueError, AttributeError):
        return {}


def note_names(folder: Path, logger: str, names: dict[str, Any]) -> None:
    """Record the name of a folder's run in a logger."""
    held = read_names(folder)
    if held.get(logger) != names:
        text = json.dumps({**held, logger: names}, indent=1)
        atomic_files.write(folder / _NAMES, lambda file: file.write(text.encode() + b"\n"))


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
