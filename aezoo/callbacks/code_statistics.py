"""Statistics of the code: active units and sparsity."""

from collections.abc import Collection
from contextlib import nullcontext
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor

from aezoo.callbacks.base import (
    PERIOD,
    DrawingTime,
    check_not_negative,
    check_period,
    is_dry_run,
    run_folder,
    save_figure,
    unpack,
    warn_on_error,
)
from aezoo.training import distributed
from aezoo.training.arguments import Checked
from aezoo.training.seeding import forked_rng


class CodeStatistics(Checked, pl.Callback):
    """Logs active units and KL per dimension, or L0 and the fraction of dead entries, over the whole validation set.

    For models with a Gaussian posterior and the prior N(0, I): `val/active_units`, the number of dimensions whose
    posterior mean has a variance of more than `threshold` over the set (Burda et al. 2016,
    https://arxiv.org/abs/1509.00519), and pictures/kl_per_dimension.png, drawn at the default times of pictures and at
    the end. For models with a sparse code: `val/l0`, the mean number of entries above `l0_threshold` in a code, and
    `val/dead`, the fraction of entries that are used by no sample. All are computed over all ranks. Metrics that the
    model logs itself are not logged again. For other models, the callback does nothing.

    Args:
        every_n_epochs: epochs between two computations; 0 disables them, 1 computes in each validation.
        threshold: minimum variance of the posterior mean of an active unit.
        l0_threshold: minimum absolute value of an entry that is used.
    """

    def __init__(self, every_n_epochs: int = 1, threshold: float = 0.01, l0_threshold: float = 1e-3) -> None:
        super().__init__()
        self.every_n_epochs = check_period(self, every_n_epochs)
        self.requested_period = self.every_n_epochs if self.every_n_epochs > 1 else 0
        self.threshold = check_not_negative(self, "threshold", threshold)
        self.l0_threshold = check_not_negative(self, "l0_threshold", l0_threshold)
        self._active = False
        self._terms: Collection[str] = ()
        # until drawn: the KL of each unit, whether it is active, and the caption
        self._undrawn: tuple[Tensor, Tensor, str] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        of_interest = getattr(pl_module, "normal_prior", False) or getattr(pl_module, "sparse_code", False)
        wanted = stage in ("fit", "validate") and self.every_n_epochs > 0 and not is_dry_run(trainer)
        self._active, self._counting, self._warned = bool(of_interest and wanted), False, False
        self._folder, self._undrawn = run_folder(trainer) / "pictures", None
        self._looked_at = 0  # the epoch of the last count, counted from 1
        DrawingTime.start(trainer)
        distributed.release_collectives_at_exit(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(outputs, dict):
            self._terms = outputs.keys()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch, in_fit = trainer.current_epoch + 1, trainer.state.fn == "fit"
        due = self._active and not (in_fit and epoch % self.every_n_epochs)
        self._counting = due and not trainer.sanity_checking
        self._sums: dict[str, Tensor] = {}

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self._counting or dataloader_idx != 0:
            return
        x, _ = unpack(batch)
        model = cast(Any, pl_module)
        # models of this package reuse their code; the loop has set evaluation mode and disabled gradients
        encoded = getattr(model, "computed_once", nullcontext)
        with forked_rng(pl_module.device), encoded(), trainer.precision_plugin.forward_context():
            x = trainer.precision_plugin.convert_input(x)
            if model.normal_prior:
                mu, log_var = (_exact(part) for part in model.posterior(x)[:2])
                kl = 0.5 * (mu.square() + log_var.exp() - 1 - log_var)
                found = {"mu": mu.sum(0), "mu2": mu.square().sum(0), "kl": kl.sum(0)}
            else:
                found = {}
            if model.sparse_code:
                found["used"] = _exact(model.encode(x).abs() > self.l0_threshold).sum(0)
            found["n"] = torch.full_like(next(iter(found.values()))[:1], len(x))
        for name, value in found.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._counting or not self._sums:
            return
        # all ranks have the same names in the same order, since these depend only on the model's class
        sums = {name: trainer.strategy.reduce(value, reduce_op="sum").cpu() for name, value in self._sums.items()}
        n = sums["n"]
        if "used" in sums:
            self._log(pl_module, "l0", (sums["used"] / n).sum())
            self._log(pl_module, "dead", (sums["used"] == 0).double().mean())
        if "mu" in sums:
            variance = sums["mu2"] / n - (sums["mu"] / n).square()
            active = variance > self.threshold
            self._log(pl_module, "active_units", active.sum())
            if trainer.is_global_zero:
                epoch = trainer.current_epoch
                self._undrawn = sums["kl"] / n, active, f"epoch {epoch + 1}, step {trainer.global_step}"
                due = (epoch + 1) // PERIOD > self._looked_at // PERIOD and DrawingTime.of(trainer).allows(epoch)
                self._looked_at = epoch + 1
                if due or trainer.state.fn != "fit":
                    self._draw(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer)

    def _log(self, pl_module: pl.LightningModule, name: str, value: Tensor) -> None:
        if name not in self._terms:  # Lightning would average two values of the same name
            pl_module.log(f"val/{name}", value.float(), sync_dist=True)

    def _draw(self, trainer: pl.Trainer) -> None:
        from aezoo.callbacks import plotting

        if self._undrawn is None:
            return
        (kl, active, when), self._undrawn = self._undrawn, None
        title = f"{int(active.sum())} of {len(kl)} units active (dark), {float(kl.sum()):.2f} nats in total; {when}"
        with warn_on_error(self), DrawingTime.of(trainer).measured():
            save_figure(trainer, self._folder, "kl_per_dimension", plotting.bar_figure(kl, "KL in nats", title, active))


def _exact(values: Tensor) -> Tensor:
    """Convert sums over a whole set to float64, if the device supports it."""
    return values.flatten(1).to(torch.float32 if values.device.type == "mps" else torch.float64)
