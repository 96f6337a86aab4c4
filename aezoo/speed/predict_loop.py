"""A fast prediction loop: Lightning's, without unused features, like `aezoo.speed.fast_loop` for training.

Lightning 2.6 spends 0.1 ms per batch of a prediction, half of it on empty hooks, repeated inspection of signatures and
transfers that move nothing. If one process predicts on one device, this loop looks up the implemented hooks once, at
the first batch. Any other run uses Lightning's loop, and so does a run with a Lightning version that has renamed
something needed here.
"""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import move_data_to_device
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from aezoo.speed.step_plan import Hook, hooks_of, is_plain, resident_transform, transfer

try:
    from lightning.pytorch.loops.prediction_loop import _PredictionLoop
except ImportError:  # pragma: no cover (a future Lightning)
    _PredictionLoop = object  # type: ignore[assignment,misc]

_PRIVATE = (
    "_combined_loader",
    "_data_fetcher",
    "_predict_step",
    "_predictions",
    "_return_predictions",
    "_warning_cache",
)
_AROUND = ("on_predict_batch_start", "on_predict_batch_end")


def install_predict_loop(trainer: pl.Trainer) -> None:
    """Offer the fast loop for this prediction; call it when prediction starts."""
    loop: Any = trainer.predict_loop
    is_known = type(loop) in (_PredictionLoop, FastPredictionLoop) and all(hasattr(loop, name) for name in _PRIVATE)
    if is_known and hasattr(trainer.lightning_module, "_on_before_batch_transfer"):
        loop.__class__ = FastPredictionLoop
        loop.hooks = None


class FastPredictionLoop(_PredictionLoop):
    """The prediction loop with its hooks looked up at the first batch.

    Attributes:
        hooks: for each name the methods, and whether each is the module's; empty for Lightning's loop, None before.
        prepare: the only transform of a batch that is already on the device.
    """

    hooks: dict[str, list[tuple[Hook, bool]]] | None = None
    prepare: Hook | None = None

    def _find_hooks(self) -> None:
        trainer = self.trainer
        step = trainer.lightning_module.predict_step
        is_supported = (
            is_plain(trainer)
            and self.num_dataloaders == 1
            and not any(isinstance(callback, BasePredictionWriter) for callback in trainer.callbacks)  # type: ignore[attr-defined]
            and is_param_in_hook_signature(step, "batch_idx", min_args=2)
            and not is_param_in_hook_signature(step, "dataloader_iter", explicit=True)
        )
        self.hooks = {name: hooks_of(name, trainer) for name in _AROUND} if is_supported else {}
        assert self._combined_loader is not None
        self.prepare = resident_transform(trainer, self._combined_loader.flattened[0]) if is_supported else None

    def teardown(self) -> None:
        self.hooks, self.prepare = {}, None  # only valid for this prediction
        super().teardown()

    def _predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int, dataloader_iter: Any) -> None:
        if self.hooks is None:
            self._find_hooks()
        if not self.hooks:
            super()._predict_step(batch, batch_idx, dataloader_idx, dataloader_iter)
            return
        trainer, progress = self.trainer, self.batch_progress
        batch = transfer(trainer, batch) if self.prepare is None else self.prepare(batch, 0)
        progress.increment_ready()
        self._call_hooks("on_predict_batch_start", batch, batch_idx)
        progress.increment_started()
        with trainer.precision_plugin.predict_step_context():
            found = trainer.lightning_module.predict_step(batch, batch_idx)
        if found is None:
            self._warning_cache.warn("predict returned None if it was on purpose, ignore this warning...")
        progress.increment_processed()
        self._call_hooks("on_predict_batch_end", found, batch, batch_idx)
        progress.increment_completed()
        if self._return_predictions:
            self._predictions[0].append(move_data_to_device(found, torch.device("cpu")))

    def _call_hooks(self, name: str, *args: Any) -> None:
        assert self.hooks is not None
        for hook, is_module in self.hooks[name]:
            if is_module:
                hook(*args)
            else:
                hook(self.trainer, self.trainer.lightning_module, *args)
