"""TensorBoard's tabs other than scalars and images."""

import inspect
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml

from aezoo.autoencoder import Autoencoder
from aezoo.callbacks import media
from aezoo.callbacks.base import BestLoss, EpochEnd, is_dry_run, run_folder
from aezoo.callbacks.media import tensorboard_writers
from aezoo.data import DataModule
from aezoo.data.settings import settings_of_source
from aezoo.training.arguments import Checked
from aezoo.training.budgets import choose_batch_size, choose_latent_dim, choose_max_epochs
from aezoo.training.model_names import display_name

_PLAIN = (bool, int, float, str)
_EVENTS = re.compile(r"events\.out\.tfevents\.(\d+)\.")
_MAX_WAIT = 2.0
# metrics that are comparable between likelihoods, unlike losses
_COMPARABLE = ("mse", "psnr", "ssim")
# hyperparameters that are always shown, even if they have their defaults
_ALWAYS = {"model", "data.name"}
# settings of data loading, which do not change results
_MACHINE_SETTINGS = {"num_workers", "memory", "download", "max_pixels", "max_bytes", "on_error"}


class Dashboard(Checked, EpochEnd):
    """Writes TensorBoard's first chart and its Custom Scalars, Text and HParams tabs.

    The first chart, `loss`, contains the training and validation losses. TensorBoard draws two curves in one chart if
    they have the same name in two runs, so they are written to the folders `train` and `val` of the run. Custom Scalars
    has such a chart for each loss term. Text contains the run's config.yaml, or the hyperparameters of model and data
    if there is none. HParams lists the run from its first step, together with the other runs in the same folder. Its
    columns are `model`, `data.name`, the other hyperparameters that differ from their defaults (an empty cell is a
    default, since a run cannot know which hyperparameters later runs will change) and all scalars. At the end, metrics
    of the best validation that are comparable between models are added, in the folder `best`, so that they have no
    charts of their own. In HParams, a resumed run keeps the hyperparameters of its first start; Text has the settings
    of each start.

    Other loggers receive the text, all hyperparameters and the metrics of the best validation, e.g. `best/loss`.

    Use it with TensorBoardLogger(default_hp_metric=False), since the logger's own `hp_metric` hides all other columns.

    Args:
        layout: write the first chart and the Custom Scalars tab.
        text: write the Text tab.
        hparams: write the HParams tab.
    """

    def __init__(self, layout: bool = True, text: bool = True, hparams: bool = True) -> None:
        super().__init__()
        self.layout, self.text, self.hparams = layout, text, hparams
        self._best = BestLoss()
        self._figures: dict[str, float] = {}
        self._laid_out = False
        self._opened: set[str] = set()
        self._parts: dict[Path, Any] = {}
        self._flushed = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        silent = is_dry_run(trainer) or not trainer.is_global_zero
        self._began, self._ended, self._parts = trainer.global_step, None, {}
        self._laid_out = not self.layout or silent
        # not in on_fit_start, where the steps of a resumed run are not yet restored
        self._start(trainer, pl_module)
        if trainer.global_step and not silent:
            for writer in tensorboard_writers(trainer):
                purge_later_steps(writer, trainer.global_step)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._laid_out:  # the names of the loss terms are known after the first batch
            self._laid_out = True
            terms = list(outputs) if isinstance(outputs, dict) else ["loss"]
            for writer in tensorboard_writers(trainer):
                writer.add_custom_scalars(scalars_layout(terms))

    def on_epoch_logged(self, trainer: pl.Trainer, epoch: int) -> None:
        if self.layout:
            self._write(trainer, "train", {"loss": trainer.callback_metrics.get("train/loss")})

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._close()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            if self.layout:
                self._write(trainer, "val", {"loss": trainer.callback_metrics.get("val/loss")})
            before = self._best.epoch
            self._best.update(trainer)
            if self._best.epoch != before:
                figures = {name: trainer.callback_metrics.get(f"val/{name}") for name in _COMPARABLE}
                self._figures = {name: float(value) for name, value in figures.items() if value is not None}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.hparams and self._best.epoch >= 0:
            figures = {f"val/{name}": value for name, value in self._figures.items()}
            self._write(trainer, "best", {"loss": self._best.value, **figures})
            if not is_dry_run(trainer):
                figures = {name.replace("val", "best"): value for name, value in figures.items()}
                media.log_results(trainer, {"best/loss": self._best.value, **figures})
        self._end(trainer)
        self._close()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {**self._best.state_dict(), "figures": self._figures}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best.load_state_dict(state_dict)
        self._figures = {name: float(value) for name, value in state_dict.get("figures", {}).items()}

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = run_folder(trainer)  # on every rank
        if not trainer.is_global_zero or is_dry_run(trainer) or str(folder) in self._opened:
            return
        self._opened.add(str(folder))
        values = hyperparameters(trainer, pl_module)
        config = folder / "config.yaml"
        written = config.read_text("utf-8") if config.is_file() else yaml.safe_dump(values, sort_keys=False)
        if self.text:
            media.log_text(trainer, "config", written)
        if self.hparams:
            media.log_hyperparameters(trainer, values)
            for writer in tensorboard_writers(trainer):
                self._summary(writer, differing(values, trainer, pl_module), end=False)

    def _end(self, trainer: pl.Trainer) -> None:
        if self.hparams and trainer.is_global_zero and not is_dry_run(trainer):
            for writer in tensorboard_writers(trainer):
                self._summary(writer, {}, end=True)

    def _write(self, trainer: pl.Trainer, part: str, values: Mapping[str, Any]) -> None:
        """Write scalars at the last step into a folder below that of the event files."""
        if not trainer.is_global_zero or is_dry_run(trainer):
            return
        from torch.utils.tensorboard import SummaryWriter

        for above in tensorboard_writers(trainer):
            folder = Path(above.log_dir) / part
            if folder in self._parts and not folder.is_dir():
                continue  # handled by `Checkpoints`: the run was deleted or moved
            if folder not in self._parts:
                self._parts[folder] = SummaryWriter(folder)
                if self._began:
                    purge_later_steps(self._parts[folder], self._began)
            for name, value in values.items():
                if value is not None:
                    # the step under which Lightning logs the last batch
                    self._parts[folder].add_scalar(name, float(value), trainer.global_step - 1)
            # waits for the writer's thread, so not after each of many short epochs
            if part != "train" or time.monotonic() - self._flushed >= 1:
                self._parts[folder].flush()
                self._flushed = time.monotonic()

    def _close(self) -> None:
        for writer in self._parts.values():
            writer.close()
        self._parts = {}

    @staticmethod
    def _summary(writer: Any, values: dict[str, Any], end: bool) -> None:
        """Write the start or the end of a run, without torch's third summary.

        That summary, the experiment, restricts the columns of the whole tab to the hyperparameters and metrics of the
        first run that TensorBoard reads; without it, the columns are those of all runs
        (tensorboard/plugins/hparams/backend_context.py, experiment_from_metadata).
        """
        from torch.utils.tensorboard.summary import hparams

        _, started, ended = hparams(values, {})
        writer.file_writer.add_summary(ended if end else started)
        writer.flush()


def purge_later_steps(writer: Any, step: int) -> None:
    """Hide events that an earlier continuation of the run wrote after `step`, so that no curve is drawn twice.

    TensorBoard's fast loader detects this automatically; the Python loader needs an explicit event
    (tensorboard/backend/event_processing/event_accumulator.py, _CheckForRestartAndMaybePurge).
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    # events of the step itself, such as pictures and the test, belong to the checkpoint
    start = SessionLog(status=SessionLog.START)
    writer.file_writer.add_event(Event(session_log=start), step=step + 1)


def wait_for_new_timestamp(folder: Path) -> None:
    """Wait until the name of a new event file would sort after those in a run's folder.

    Names begin with a time in whole seconds, followed by host and process (tensorboard/summary/writer/
    event_file_writer.py), and TensorBoard reads files in the order of their names. Of two files of the same second, the
    later one may be read first, and TensorBoard then discards its points. If the clock is further behind, the function
    returns at once.
    """
    names = (_EVENTS.match(path.name) for path in folder.glob("events.out.tfevents.*"))
    wait = max((int(name[1]) for name in names if name), default=0) + 1 - time.time()
    if 0 < wait <= _MAX_WAIT:
        time.sleep(wait)


def scalars_layout(terms: list[str]) -> dict[str, dict[str, list[Any]]]:
    """Return a chart of the training and validation curves for each loss term; tags are regular expressions."""
    charts = {
        term: ["Multiline", [f"^{re.escape(f'{stage}/{term}')}$" for stage in ("train", "val")]] for term in terms
    }
    return {"loss terms": charts}


def differing(values: dict[str, Any], trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    """Select the hyperparameters that are not at their defaults and do not belong to other data sources."""
    data: Any = getattr(trainer, "datamodule", None)
    taken = settings_of_source(dict(data.hparams_initial)) if isinstance(data, DataModule) else {}
    # a model may pass the arguments of its base class by **kwargs
    owners = [("data", type(data))] if taken else []
    owners += [("model", Autoencoder), ("model", type(pl_module))]
    defaults = {
        f"{section}.{key}": parameter.default
        for section, owner in owners
        for key, parameter in inspect.signature(owner).parameters.items()
    }
    # defaults that depend on the network and the data
    chosen = {"model.hidden_dims": getattr(pl_module, "default_hidden_dims", None)}
    if taken:
        n_samples = math.ceil(len(data.dataset("train")) / trainer.world_size)
        chosen["data.batch_size"] = choose_batch_size(n_samples)
        chosen["trainer.max_epochs"] = choose_max_epochs(n_samples, data.batch_size)
        if isinstance(size := defaults.get("model.latent_dim"), int):
            chosen["model.latent_dim"] = choose_latent_dim(type(pl_module), size, data.input_shape)
    kept = {}
    for name, value in {**values, "trainer.max_epochs": trainer.max_epochs}.items():
        section, _, key = name.partition(".")
        is_default = str(value) in {str(where[name]) for where in (defaults, chosen) if name in where}
        is_foreign = section == "data" and taken and (key not in taken or key in _MACHINE_SETTINGS)
        if name in _ALWAYS or not (is_default or is_foreign):
            kept[name] = value
    return kept


def hyperparameters(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    """Return the hyperparameters of model and data as plain values, named like the command-line options."""
    values: dict[str, Any] = {"model": display_name(type(pl_module))}
    values |= {f"model.{name}": value for name, value in dict(pl_module.hparams_initial).items()}
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None:
        values |= {f"data.{name}": value for name, value in dict(datamodule.hparams_initial).items()}
        values.pop("model.input_shape", None)  # determined by the data
    hidden = {name for name in values if name.rpartition(".")[2].startswith("_")}
    return {
        name: value if isinstance(value, _PLAIN) else str(value)
        for name, value in values.items()
        if name not in hidden and value is not None
    }
