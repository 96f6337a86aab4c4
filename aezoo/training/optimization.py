"""The optimiser and schedule of every model."""

from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.optim.lr_scheduler import LambdaLR

from aezoo.errors import AezooError
from aezoo.training import optimizers
from aezoo.training.projected_weights import Constrained
from aezoo.training.steps import TrainingSteps


class Optimization(TrainingSteps):
    """Builds the optimiser and schedule that a model's hyperparameters name."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters for the optimiser, which may have different settings.

        Each player of an adversarial model has a group: if every parameter only gets the gradient of the loss of its
        player, one backward pass and one optimiser of disjoint groups are equivalent to several optimisers.
        """
        return [{"params": [*self.parameters()]}]

    def configure_optimizers(self) -> Any:
        # a gradient scaler that clips must see the gradients before the optimiser unscales them; Lightning refuses to
        # clip for a fused optimiser where there could be a scaler
        plugin = None if self._trainer is None else self.trainer.precision_plugin
        scaled = getattr(plugin, "scaler", None) is not None
        scaled |= isinstance(plugin, MixedPrecision) and bool(self.trainer.gradient_clip_val)
        first, *others = self.parameter_groups()
        optimizer = optimizers.build(self.optimizer, first["params"], self.lr, self.weight_decay, fused=not scaled)
        optimizer.param_groups[0].update({name: value for name, value in first.items() if name != "params"})
        for group in others:
            optimizer.add_param_group(group)
        trainer = self._fitted_by()
        if trainer is None or trainer.lightning_module is not self:
            self._hook_into(optimizer)
        if self.lr_schedule == "constant" and not self.warmup_steps:
            return optimizer
        if trainer is None:
            raise AezooError(
                "lr_schedule and warmup_steps need a Trainer, which knows the last step: in your own loop, leave "
                "them out, and use one of torch.optim.lr_scheduler"
            )
        schedule = optimizers.schedule(optimizer, self.lr_schedule, self.warmup_steps, trainer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "train/lr"}}

    def _hook_into(self, optimizer: torch.optim.Optimizer) -> None:
        """Add hooks to the optimiser for what a Trainer would call in this module, for a training loop of the user."""

        def after(*_: Any) -> None:
            if "steps" in self._buffers:
                self._buffers["steps"].add_(1)  # type: ignore[union-attr]
            if isinstance(self, Constrained):
                self.after_optimizer_step()

        optimizer.register_step_pre_hook(lambda held, *_: self.on_before_optimizer_step(held))
        optimizer.register_step_post_hook(after)

    def clip_gradients(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        # a skipped step has no gradients, and torch refuses to clip none by value
        if optimizers.with_gradients(optimizer):
            super().clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _renew_optimizer(self) -> None:
        """Replace hyperparameters of the checkpoint by those that were given to the resumed run."""
        own = getattr(self.configure_optimizers, "__func__", None) is Optimization.configure_optimizers
        if self.trainer.ckpt_path is None or not own:
            return
        optimizer, scheduler = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        if isinstance(optimizer, torch.optim.Optimizer) and (scheduler is None or isinstance(scheduler, LambdaLR)):
            groups = self.parameter_groups()
            rates = [group.get("lr", self.lr) for group in groups]
            decays = [group.get("weight_decay", self.weight_decay) for group in groups]
            optimizers.renew(optimizer, scheduler, rates, decays)
