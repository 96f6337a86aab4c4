"""Histograms of weights and gradients."""

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from aezoo.callbacks import media
from aezoo.callbacks.base import check_period, is_dry_run
from aezoo.training.arguments import Checked


class Histograms(Checked, pl.Callback):
    """Logs histograms of each weight and of its gradient at the last optimiser step of the epoch.

    Gradients are averaged over ranks and not clipped; rank zero logs them.

    Args:
        every_n_epochs: epochs between two histograms; 0 disables them.
    """

    def __init__(self, every_n_epochs: int = 0) -> None:
        super().__init__()
        self.every_n_epochs = check_period(self, every_n_epochs)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        if self._due(trainer) and trainer.is_last_batch:
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for name, parameter in pl_module.named_parameters():
                if id(parameter) in own and parameter.grad is not None:
                    self._write(trainer, f"gradients/{name}", parameter.grad)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._due(trainer):
            for name, parameter in pl_module.named_parameters():
                self._write(trainer, f"weights/{name}", parameter)

    def _due(self, trainer: pl.Trainer) -> bool:
        wanted = self.every_n_epochs > 0 and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        return wanted and trainer.is_global_zero and not is_dry_run(trainer)

    def _write(self, trainer: pl.Trainer, name: str, values: Tensor) -> None:
        values = values.detach().float().flatten()
        values = values[torch.isfinite(values)]  # TensorBoard rejects other values
        if len(values):
            step = trainer.global_step
            media.log_histogram(
                trainer, name, lambda writer: writer.add_histogram(name, values, step), lambda: media.bars_of(values)
            )
