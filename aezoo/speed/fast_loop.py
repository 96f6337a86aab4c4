"""A fast training loop: Lightning's, without unused features.

At 5 ms per step Lightning 2.6 spends 0.4 to 0.5 ms on empty hooks, metrics that were not logged and transfers that move
nothing. `install_fast_loop` replaces Lightning's epoch loop by one that does the same things in the same order for
every batch, but looks up only once, when training starts, which hooks are implemented. Counters, schedules,
accumulation, clipping, logging, validation and checkpoints are Lightning's.

It is used if one process trains on one device with one of torch's optimisers and automatic optimisation; any other
run, and the first batch after a restart, use Lightning's loop. So does, with one warning, a run with a Lightning
version in which something needed here has been renamed.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning
import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from aezoo.speed.denormals import flushed_denormals
from aezoo.speed.graph_capture import CapturedStep
from aezoo.speed.joint_backward import JointStep
from aezoo.speed.parts import is_enabled
from aezoo.speed.step_plan import Plan, is_plain, transfer
from aezoo.training.compilation import full_batch
from aezoo.training.optimizers import with_gradients

try:
    from lightning.pytorch.loops.optimization.automatic import ClosureResult
    from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
except ImportError:  # pragma: no cover (a future Lightning)
    _TrainingEpochLoop, ClosureResult = object, None  # type: ignore[assignment,misc]

# private attributes of Lightning that the fast loop uses, relative to the trainer
_NEEDED = (
    "_logger_connector._first_loop_iter",
    "_logger_connector.on_batch_end",
    "_logger_connector.update_train_step_metrics",
    "_val_check_time_interval",
    "val_check_batch",
    "lr_scheduler_configs",
    "precision_plugin.train_step_context",
    "precision_plugin.convert_input",
    "strategy.batch_to_device",
    "strategy.model",
    "lightning_module._current_fx_name",
    "lightning_module._on_before_batch_transfer",
    "fit_loop._data_fetcher.fetched",
    "fit_loop._data_fetcher.length",
    "fit_loop._data_fetcher.done",
    "fit_loop._data_fetcher.iterator._iterator.iterators",
    "fit_loop.epoch_loop._results.batch_size",
    "fit_loop.epoch_loop._results.dataloader_idx",
    "fit_loop.epoch_loop._warning_cache.warn",
    "fit_loop.epoch_loop._batches_that_stepped",
    "fit_loop.epoch_loop._skip_next_val",
    "fit_loop.epoch_loop._is_training_done",
    "fit_loop.epoch_loop._should_accumulate",
    "fit_loop.epoch_loop._num_ready_batches_reached",
    "fit_loop.epoch_loop.restarting",
    "fit_loop.epoch_loop.update_lr_schedulers",
    "fit_loop.epoch_loop.val_loop.restarting",
    "fit_loop.epoch_loop.batch_progress.current.ready",
    "fit_loop.epoch_loop.batch_progress.is_last_batch",
    "fit_loop.epoch_loop.batch_progress.increment_ready",
    "fit_loop.epoch_loop.batch_progress.increment_started",
    "fit_loop.epoch_loop.batch_progress.increment_processed",
    "fit_loop.epoch_loop.batch_progress.increment_completed",
    "fit_loop.epoch_loop.automatic_optimization._optimizer_step",
    "fit_loop.epoch_loop.automatic_optimization._skip_backward",
    "fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.increment_ready",
    "fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.increment_completed",
    "fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.zero_grad.increment_started",
)


# what torch adds to a norm before it divides by it
_EPSILON = 1e-6


def missing_attribute(trainer: pl.Trainer) -> str | None:
    """The first attribute of Lightning that the fast loop uses and this version lacks; None if it has all."""
    if ClosureResult is None:
        return "_TrainingEpochLoop or ClosureResult"
    for path in _NEEDED:
        owner: Any = trainer
        for name in path.split("."):
            if not hasattr(owner, name):
                return f"trainer.{path}"
            owner = getattr(owner, name)
    return None


def install_fast_loop(trainer: pl.Trainer) -> bool:
    """Use the fast loop for this fit if it does the same as Lightning's; call it when training starts.

    Returns:
        Whether it is used.
    """
    absent = missing_attribute(trainer)
    if absent is not None:
        rank_zero_warn(
            f"Lightning {lightning.__version__} has no {absent}: training takes Lightning's own loop, which is slower "
            "for small models"
        )
        return False
    loop = trainer.fit_loop.epoch_loop
    if type(loop) not in (_TrainingEpochLoop, FastLoop):
        return False
    loop.__class__ = FastLoop
    loop.plan = plan_of(trainer)
    return loop.plan is not None


def plan_of(trainer: pl.Trainer) -> Plan | None:
    """The plan of a fit; None if the fast loop cannot do the same as Lightning's."""
    module, loader, optimizers = trainer.lightning_module, trainer.train_dataloader, trainer.optimizers
    is_supported = (
        module.automatic_optimization
        and is_plain(trainer)
        and getattr(trainer.precision_plugin, "scaler", None) is None
        and len(optimizers) == 1
        and type(optimizers[0]).__module__.startswith("torch.optim.")
        and not isinstance(optimizers[0], torch.optim.LBFGS)
        and not is_overridden("on_train_batch_start", module)
        # one that takes the loader's iterator fetches its batches itself
        and not is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True)
        and loader is not None
    )
    return Plan(trainer) if is_supported else None


def batch_is_private(trainer: pl.Trainer) -> bool:
    """Whether only the step itself reads the values of a batch in this fit."""
    plan = getattr(trainer.fit_loop.epoch_loop, "plan", None)
    return plan is not None and plan.batch_is_private


def on_participants_changed(trainer: pl.Trainer, on_change: Callable[[], None]) -> None:
    """Call this function when the participants in a step change during this fit, if it uses the fast loop."""
    plan = getattr(trainer.fit_loop.epoch_loop, "plan", None)
    if plan is not None:
        plan.on_change = on_change


def uses_only_torch_rng(trainer: pl.Trainer) -> bool:
    """Whether nothing draws from NumPy's or Python's generators in this fit."""
    plan = getattr(trainer.fit_loop.epoch_loop, "plan", None)
    return plan is not None and plan.uses_only_torch_rng


def capture_steps(trainer: pl.Trainer) -> bool:
    """Use a CUDA graph for the whole step if the fast loop's plan allows it; returns whether it does."""
    loop = trainer.fit_loop.epoch_loop
    if not isinstance(loop, FastLoop) or loop.plan is None or not loop.plan.can_capture:
        return False
    trained = [p for p in loop.plan.module.parameters() if p.requires_grad]
    loop.plan.captured = CapturedStep(loop.recorded_step, trained, least=full_batch(trainer.train_dataloader))
    return True


def set_joint_step(trainer: pl.Trainer, joint: JointStep) -> None:
    """Compute a loss and its gradients jointly in each step for which the fast loop's plan allows it."""
    loop = trainer.fit_loop.epoch_loop
    if isinstance(loop, FastLoop) and loop.plan is not None:
        loop.plan.joint = joint


class FastLoop(_TrainingEpochLoop):
    """The training epoch loop with a plan; without one, Lightning's loop with denormals flushed."""

    plan: Plan | None = None
    # whether the guard's hooks are called
    _calls_guard_hooks = True
    # norm of all gradients of the current step, if it is known and needed for clipping
    _norm: Tensor | None = None

    @property
    def planned(self) -> Plan:
        """The plan, in methods that are only called with one."""
        assert self.plan is not None
        return self.plan

    def run(self, data_fetcher: Any) -> None:
        trainer = self.trainer
        if self.plan is not None and not self.plan.matches(trainer):
            self._renew_plan()
        if self.plan is not None:
            self.plan.begin_epoch(trainer)
        with flushed_denormals() if is_enabled("denormals") else nullcontext():
            super().run(data_fetcher)

    def teardown(self) -> None:
        self.plan = None  # it belongs to this fit only
        super().teardown()
        self.__class__ = _TrainingEpochLoop

    def _renew_plan(self) -> None:
        """Make a new plan, since the participants in a step have changed."""
        old, self.plan = self.plan, None
        assert old is not None
        # another module has not requested this loop
        new = plan_of(self.trainer) if old.module is self.trainer.lightning_module else None
        if new is not None:
            same = new.can_capture and new.optimizer is old.optimizer
            new.captured, new.joint = old.captured if same else None, old.joint
            new.on_change = old.on_change
        self.plan = new
        if old.on_change is not None:
            old.on_change()

    def advance(self, data_fetcher: Any) -> None:
        if self.plan is not None and not self.plan.quick_match(self.trainer):
            self._renew_plan()
        plan = self.plan
        # Lightning's weight averaging runs an epoch without backward passes
        if plan is None or self.restarting or self.automatic_optimization._skip_backward:
            super().advance(data_fetcher)
            return
        trainer, progress = self.trainer, self.batch_progress
        connector, results = trainer._logger_connector, self._results
        # callbacks may have changed both since the epoch began
        simple = trainer.accumulate_grad_batches == 1 and not plan.step.is_watched()
        self.val_loop.restarting, self._calls_guard_hooks = False, plan.guard is None or not simple
        batch = next(data_fetcher)[0] if plan.prepare is None else self._next(data_fetcher)
        batch_idx = progress.current.ready
        progress.is_last_batch = data_fetcher.done
        batch = transfer(trainer, batch) if plan.prepare is None else plan.prepare(batch, 0)
        progress.increment_ready()
        # the same as the connector's on_batch_start
        connector._first_loop_iter = connector._first_loop_iter is None
        results.batch, results.batch_size, results.dataloader_idx = batch, None, None
        output: dict[str, Any] | None = None
        if batch is None:
            self._warning_cache.warn("train_dataloader yielded None. If this was on purpose, ignore this warning...")
        else:
            self._call_hooks("on_train_batch_start", batch, batch_idx)
            progress.increment_started()
            output = self._take_step(batch, batch_idx)
        self._end_step()
        self._call_hooks("on_train_batch_end", output, batch, batch_idx)
        # logged values stay in the results; only those that are not reset were logged in this epoch
        logged = any(not value.has_reset for value in results.values())
        if logged:
            connector.on_batch_end()
        else:
            results.batch = results.batch_size = None
        progress.increment_completed()
        if logged:
            connector.update_train_step_metrics()

    def _end_step(self) -> None:
        self.batch_progress.increment_processed()
        if self.trainer.lr_scheduler_configs:
            self.update_lr_schedulers("step", update_plateau_schedulers=False)
            if self._num_ready_batches_reached():
                self.update_lr_schedulers("epoch", update_plateau_schedulers=False)

    def on_advance_end(self, data_fetcher: Any) -> None:
        trainer, plan = self.trainer, self.plan
        if (
            plan is None
            or not plan.validates_at_end
            or self.restarting
            or self._skip_next_val
            or self._num_ready_batches_reached()
            or trainer.should_stop
            or plan.plateau
        ):
            super().on_advance_end(data_fetcher)
            return
        if not self._should_accumulate():
            self._batches_that_stepped += 1
        if trainer.received_sigterm and not self._is_training_done:
            raise SIGTERMException

    @staticmethod
    def _next(data_fetcher: Any) -> Any:
        """The next batch of the only loader, bypassing Lightning's combination of several."""
        batch = next(data_fetcher.iterator._iterator.iterators[0])
        data_fetcher.fetched += 1
        data_fetcher.done = data_fetcher.fetched >= data_fetcher.length
        return batch

    def _call_hooks(self, hook: str, *args: Any) -> None:
        trainer, plan = self.trainer, self.planned
        # the guard must save the state in its turn among callbacks, which may change the state
        hooks = plan.hooks if self._calls_guard_hooks or hook == "on_train_batch_start" else plan.hooks_without_guard
        for method, is_module in hooks[hook]:
            self._call_as(hook, method, *(args if is_module else (trainer, plan.module, *args)))

    def _call_as(self, name: str, call: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a hook under this name, from which it logs."""
        attributes = vars(self.planned.module)  # bypasses torch's __setattr__, which looks for parameters
        before = attributes["_current_fx_name"]
        attributes["_current_fx_name"] = name
        result = call(*args, **kwargs)
        attributes["_current_fx_name"] = before
        return result

    def _take_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        plan, trainer = self.planned, self.trainer
        watched = plan.own_step or plan.step.is_watched()
        a_graph = plan.captured is not None and not trainer.lr_scheduler_configs and not watched
        if a_graph and trainer.accumulate_grad_batches == 1:
            return self._replay_graph(batch, batch_idx)
        if trainer.accumulate_grad_batches > 1 and self._should_accumulate():
            return self._forward_and_backward(batch, batch_idx)
        if watched:
            outputs: list[dict[str, Any]] = []

            def closure(*_: Any, **__: Any) -> Any:
                outputs.append(self._forward_and_backward(batch, batch_idx))
                return outputs[-1].get("loss")

            self.automatic_optimization._optimizer_step(batch_idx, closure)
            if not outputs:  # the same message as Lightning's closure
                raise MisconfigurationException(
                    "The closure hasn't been executed. HINT: did you call `optimizer_closure()` in your "
                    "`optimizer_step` hook?"
                )
            return outputs[-1]
        step = self.automatic_optimization.optim_progress.optimizer.step
        step.increment_ready()
        output = self._checked_step(batch, batch_idx)
        self._call_hooks("on_before_optimizer_step", plan.optimizer)
        if trainer.gradient_clip_val:
            self._clip()
        plan.step()
        if plan.after_step is not None:
            plan.after_step()
        step.increment_completed()
        return output

    def _checked_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Gradients of a step that the guard checks, directly or by its hooks."""
        plan = self.planned
        if self._calls_guard_hooks:
            return self._forward_and_backward(batch, batch_idx)
        output = self._forward_and_backward(batch, batch_idx)
        self._norm = None
        by_norm = self.trainer.gradient_clip_algorithm in (None, GradClipAlgorithmType.NORM)
        if (self.trainer.gradient_clip_val or 0) > 0 and by_norm and plan.clips_by_norm:
            gradients: list[Any] = [parameter.grad for parameter in with_gradients(plan.optimizer)]
            self._norm = torch.nn.utils.get_total_norm(gradients) if gradients else None
        self._check_by_guard(plan.guard, output)
        return output

    def _clip(self) -> None:
        """Clip gradients as Lightning does; a known and small enough norm needs no clipping."""
        plan, trainer = self.planned, self.trainer
        most, norm, self._norm = trainer.gradient_clip_val, self._norm, None
        if norm is None:
            plan.module.clip_gradients(plan.optimizer, most, trainer.gradient_clip_algorithm)
        elif norm + _EPSILON > most:
            torch.nn.utils.clip_grads_with_norm_(with_gradients(plan.optimizer), float(most), norm)

    def _check_by_guard(self, guard: Any, output: dict[str, Any]) -> None:
        """Call the guard's hooks from here on, unless the step passes."""
        plan = self.planned
        loss, known = output.get("loss"), self._norm is not None and math.isfinite(self._norm)
        is_finite_step = loss is not None and (
            guard.is_finite_loss(loss) if known else guard.is_finite_step(loss, plan.optimizer)
        )
        self._calls_guard_hooks = not is_finite_step
        if self._calls_guard_hooks and loss is not None:
            guard.on_before_backward(self.trainer, plan.module, loss)

    def _replay_graph(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """The same step as one CUDA graph; notifies callbacks that were recorded in it."""
        plan, progress = self.planned, self.automatic_optimization.optim_progress.optimizer
        assert plan.captured is not None
        x, y = plan.module.begin_step(batch, batch_idx)
        progress.zero_grad.increment_ready()
        progress.zero_grad.increment_started()
        progress.zero_grad.increment_completed()
        progress.step.increment_ready()
        replays = plan.captured.replays
        terms, values = plan.captured(x, y)
        if plan.captured.replays > replays:
            for callback in plan.recorded:
                callback.replayed()
        progress.step.increment_completed()
        plan.module.end_step(terms, values, len(x))
        return {**terms}

    def recorded_step(self, x: Tensor, y: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """Forward, backward and update without synchronisation, so that a graph can contain them."""
        plan = self.planned
        optimizer = plan.optimizer
        terms, values = plan.in_precision(plan.module.step_terms, x, y)
        self._call_hooks("on_before_backward", terms["loss"])
        terms["loss"].backward()
        self._call_hooks("on_before_optimizer_step", optimizer)
        optimizer.step()
        return {name: term.detach() for name, term in terms.items()}, values

    def _forward_and_backward(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """A step without the optimiser: loss, zeroed gradients, gradients; returns the outputs for callbacks."""
        if not torch.is_grad_enabled():
            with torch.enable_grad():
                return self._forward_and_backward(batch, batch_idx)
        trainer, plan = self.trainer, self.planned
        if trainer.accumulate_grad_batches == 1 and plan.can_join_backward(self._calls_guard_hooks):
            return self._joint_forward_and_backward(batch, batch_idx)
        module, optimizer = plan.module, plan.optimizer
        arguments = (batch, batch_idx) if plan.takes_index else (batch,)
        output = plan.in_precision(self._call_as, "training_step", module.training_step, *arguments)
        accumulated = trainer.accumulate_grad_batches
        if isinstance(output, dict) and isinstance(output.get("loss"), Tensor):
            shared = accumulated == 1 and plan.loss_is_private
            loss = output["loss"] if shared else output["loss"] / accumulated
            output = {"loss": None, **output} | {"loss": loss.detach() if shared else loss.detach().clone()}
        else:
            # a tensor, None, another mapping, or an error
            result = ClosureResult.from_training_step_output(output, accumulated)
            loss, output = result.closure_loss, {} if result.loss is None else result.asdict()
            if loss is None:
                self._warning_cache.warn(
                    "`training_step` returned `None`. If this was on purpose, ignore this warning..."
                )
        if batch_idx % accumulated == 0:
            zero_grad = self.automatic_optimization.optim_progress.optimizer.zero_grad
            zero_grad.increment_ready()
            self._call_hooks("on_before_zero_grad", optimizer)
            zero_grad.increment_started()
            if plan.own_zero_grad:
                of_step = trainer.current_epoch, batch_idx, optimizer
                self._call_as("optimizer_zero_grad", module.optimizer_zero_grad, *of_step)
            else:
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None
            zero_grad.increment_completed()
        if loss is not None:
            self._call_hooks("on_before_backward", loss)
            self._call_as("backward", module.backward, loss)
            self._call_hooks("on_after_backward")
        return output

    def _joint_forward_and_backward(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """The same with gradients computed together with the loss."""
        plan, zero_grad = self.planned, self.automatic_optimization.optim_progress.optimizer.zero_grad
        assert plan.joint is not None
        x, y = plan.module.begin_step(batch, batch_idx)
        zero_grad.increment_ready()
        zero_grad.increment_started()
        zero_grad.increment_completed()
        terms, values = plan.in_precision(plan.joint.step, x, y)
        plan.module.end_step(terms, values, len(x))
        return {"loss": terms["loss"], **terms}
