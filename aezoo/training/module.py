"""What a fit does besides its steps: set up, compile, restore and write checkpoints, clean up."""

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch

import aezoo
from aezoo.deprecated.methods import RenamedMethods
from aezoo.training import compilation, distributed, input_checks, optimizers, speed
from aezoo.training.evaluation import EvaluationSteps
from aezoo.training.model_names import name_of
from aezoo.training.optimization import Optimization
from aezoo.training.output_cache import OutputCache
from aezoo.training.steps import TrainingSteps


class TrainingModule(RenamedMethods, Optimization, EvaluationSteps):
    """The LightningModule below `aezoo.Autoencoder`: everything that Lightning calls."""

    def __init__(self) -> None:
        super().__init__()
        self._means_before: dict[str, Any] | None = None
        self._compiled_before: bool | None = None
        self._compiler_settings = ExitStack()  # of this fit

    def __getstate__(self) -> dict[str, Any]:
        # a copy belongs to no fit: a compiled function refers to this model's weights, and cannot be pickled
        of_fit: dict[str, Any] = {"_compiled": None, "takes_bytes": False, "_uses_only_torch_rng": False}
        of_fit |= {"_before_start": [], "_compiler_settings": ExitStack(), "_outputs": OutputCache()}
        return {**super().__getstate__(), **of_fit}

    # ---- begin and end ----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        distributed.check_strategy(self.trainer)
        distributed.release_collectives_at_exit(self.trainer)
        # the data may have changed, and an evaluation may have been interrupted
        self._checked.clear()
        self._evaluations.clear()
        self._outputs.clear()
        if stage == "fit":
            if not self.training:
                self.train()  # Lightning would leave it as load_model gives it
            input_checks.check_reconstruction(self)
        speed.set_up(self, stage)

    def teardown(self, stage: str) -> None:
        if stage != "fit":
            speed.tear_down(self, stage)

    def configure_callbacks(self) -> list[pl.Callback]:
        exists = any(isinstance(callback, CleanupOnException) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if exists else [CleanupOnException()]

    def on_fit_start(self) -> None:
        self.data_statistics = None  # they belong to the weights before this fit
        self._train_means.reset()
        means, self._means_before = self._means_before, None
        if means is not None and self.trainer.ckpt_path is not None:
            # the epoch's sums up to the checkpoint; all ranks get those of rank 0
            self._train_means.load_state_dict(means, self.device)
        if self._fit_seed is None or self.trainer.ckpt_path is None:
            self._fit_seed, self._compiled_before = torch.initial_seed() % 2**63, None

    def on_train_start(self) -> None:
        epoch_loop = self.trainer.fit_loop.epoch_loop
        if epoch_loop.restarted_on_train_batch_end and epoch_loop.batch_progress.is_last_batch:
            self._train_means.reset()  # Lightning counts this epoch as finished
        for optimizer in self.trainer.optimizers:
            if self.trainer.ckpt_path is not None:
                schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
                own = [scheduler for scheduler in schedulers if scheduler.optimizer is optimizer]
                optimizers.check_restored(optimizer, own, self.trainer.ckpt_path)
            optimizers.align(optimizer)
        compile_arguments = self._compile_arguments()
        if compile_arguments is not None:
            self._compiled = compilation.Compiled(self._terms, **compile_arguments)
            self._compiler_settings.enter_context(compilation.consistent_compilation())
        speed.begin_fit(self, compile_arguments)
        self._renew_optimizer()

    def on_fit_end(self) -> None:
        self.leave_fit()

    def leave_fit(self) -> None:
        """Undo everything that belongs to one fit, however it ended."""
        self._compiled, self._before_start = None, []
        self._compiler_settings.close()
        speed.tear_down(self, "fit")

    def on_predict_start(self) -> None:
        speed.begin_prediction(self)

    @property
    def has_own_step(self) -> bool:
        """Whether the class replaces the training step."""
        return type(self).training_step is not TrainingSteps.training_step

    # ---- compilation ------------------------------------------------------------------------------------------------

    def _compile_arguments(self) -> dict[str, Any] | None:
        """Arguments of `Compiled` for this fit's loss; None if it is not compiled."""
        mode = compilation.check_mode(self.compile_mode)
        if mode == "auto":
            chosen = self._compiled_before if self._compiled_before is not None else self._worth_compiling()
        else:
            chosen = mode != "off"
        chosen &= not self.steps_differ
        self._compiled_before = chosen
        compilation.announce(mode, chosen, self.steps_differ)
        if not chosen:
            return None
        batches = self.trainer.fit_loop.epoch_loop.batch_progress
        return {
            "mode": "default" if mode == "auto" else mode,
            "before_retry": lambda: self._seed_step(batches.current.ready - 1),
            "least": compilation.full_batch(self.trainer.train_dataloader),
        }

    def _worth_compiling(self) -> bool:
        batch_size = getattr(self.trainer.train_dataloader, "batch_size", None)
        steps = optimizers.known_steps(self.trainer)
        if not isinstance(batch_size, int):
            return False
        parameters = sum(p.numel() for p in self.parameters())
        uses = compilation.positions(self, self.input_shape)
        return compilation.worth_compiling(parameters, batch_size, uses, steps, self.device)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stamp = {"model": name_of(type(self)), "version": aezoo.__version__}
        # a resumed run must draw the same noise and use the same arithmetic
        checkpoint["aezoo"] = stamp | {"seed": self._fit_seed, "compiled": self._compiled_before}
        if self._train_means.state_dict()["count"]:
            checkpoint["aezoo"]["means"] = self._train_means.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stamp = checkpoint.get("aezoo", {})
        self._fit_seed, self._compiled_before = stamp.get("seed"), stamp.get("compiled")
        self._means_before = stamp.get("means")


class CleanupOnException(pl.Callback):
    """Cleans up after Ctrl-C or an error, of which Lightning informs callbacks only."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if not isinstance(pl_module, TrainingModule) or trainer.state.fn is None:
            return
        if trainer.state.fn == "fit":
            pl_module.leave_fit()
        else:
            pl_module.teardown(trainer.state.fn)
