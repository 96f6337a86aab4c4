"""The contract of every model and the only training loop."""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import aezoo
from aezoo.corruptions import Corruption
from aezoo.distributions import likelihoods
from aezoo.distributions.likelihoods import Likelihood
from aezoo.errors import AezooError
from aezoo.metrics import Evaluation, Means
from aezoo.speed import fast_loop, joint_backward, predict_loop
from aezoo.speed.memory_format import like
from aezoo.training import collectives, compilation, distributed, input_checks, optimizers
from aezoo.training.arguments import Checked
from aezoo.training.precision import at_least_float32 as at_least_float32  # models find it here, beside the contract
from aezoo.training.projected_weights import Constrained
from aezoo.training.seeding import forked_rng, mix, seed_all

_EVALUATION_SEED = 20


def from_bytes(x: Tensor) -> Tensor:
    """Bytes as values from 0 to 1, as the DataModule gives them; anything else unchanged."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


class Autoencoder(Checked, pl.LightningModule):
    """An encoder, a decoder, a likelihood and a loss; subclass it in one file and write the paper's formula in `loss`.

    Losses are in nats per sample: summed over data dimensions, averaged over the batch. Batches are `x`, `(x,)` or
    `(x, y)`; x is float, (B, *input_shape); labels y are optional.

    A subclass sets `encoder`, `decoder` and `code_shape` and calls `save_hyperparameters()`; its constructor takes
    `input_shape` and plain keyword arguments with defaults, nothing else.

    Attributes:
        input_shape: shape of one sample.
        code_shape: shape of one code.
        likelihood: p(x | decoder output).
        corruption: corruption of the input in training; None for most models.
        has_prior: whether `sample` works.
        normal_prior: whether q(z|x) is the diagonal Gaussian of `posterior(x)`, its mean and log-variance, and p(z) is
            N(0, I).
        code_radius: radius of the ball around 0 in which codes lie; infinite for most models.
        sparse_code: whether most entries of a code should be zero.
        discrete_code: whether a code can be written as indices, see `aezoo.bases.quantised`.
        compares_samples: whether the loss compares the samples of a batch, and so depends on the batch size.
        reads_labels: whether labels tell which samples of a batch belong together, whatever the number of labels.
        not_averaged: names of buffers that hold single codes or samples, which must not be averaged over steps.
        steps_differ: whether the computation of a training step depends on random draws, so that one graph does not
            fit all steps and a fit never compiles it.
        compile_mode: whether a fit compiles the loss: auto (if the run is long enough to earn it back), off, or a mode
            of torch.compile: default, reduce-overhead, max-autotune. Weights keep their names.
        importance_samples: draws of the code per sample for `log_likelihood` in validation and test after training;
            more draws tighten the bound.
        steps_before: optimiser steps of earlier fits, from which a fit continues; 0 starts anew, see
            `enable_step_counter`.
        takes_missing: whether samples may lack parts, whose values are then all NaN, see `aezoo.bases.multimodal`.
        takes_bytes: whether `training_step` scales bytes to [0, 1] itself, as part of the compiled function.

    Args:
        input_shape: shape of one sample: (D,), (C, L), (C, H, W) or (C, D, H, W).
        likelihood: how outputs are compared with data, see `aezoo.distributions.likelihoods`.
        lr: learning rate.
        optimizer: adam, adamw, sgd, ... see `aezoo.training.optimizers`.
        weight_decay: the optimiser's weight decay.
        lr_schedule: constant, cosine, linear, exponential, step or multistep:FACTOR@P,P, from warm-up to the last step.
        warmup_steps: optimiser steps over which the learning rate rises linearly.

    Raises:
        AezooError: an invalid value; the message names it and the valid ones.
    """

    has_prior: ClassVar[bool] = False
    normal_prior: ClassVar[bool] = False
    sparse_code: ClassVar[bool] = False
    discrete_code: ClassVar[bool] = False
    compares_samples: ClassVar[bool] = False
    reads_labels: ClassVar[bool] = False
    not_averaged: ClassVar[tuple[str, ...]] = ()
    steps_differ: ClassVar[bool] = False
    takes_missing: ClassVar[bool] = False

    compile_mode: str = "auto"
    importance_samples: int = 100
    code_radius: float = math.inf
    takes_bytes: bool = False
    steps_before: int = 0

    started: Tensor
    encoder: nn.Module
    decoder: nn.Module
    code_shape: tuple[int, ...]
    corruption: Corruption | None
    _keywords: frozenset[str]

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        likelihood: str = "bernoulli",
        lr: float = 1e-3,
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        lr_schedule: str = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        compilation.expect_large_tensors()
        if not 1 <= len(input_shape) <= 4 or any(int(n) != n or n < 1 for n in input_shape):
            raise AezooError(f"input_shape must be (D,), (C, L), (C, H, W) or (C, D, H, W), got {tuple(input_shape)}")
        optimizers.check(optimizer, lr, weight_decay, lr_schedule, warmup_steps)
        self.input_shape = tuple(int(n) for n in input_shape)
        self.likelihood: Likelihood = likelihoods.likelihood(likelihood)
        self.corruption = None  # not on the class, where it would hide the module that a subclass sets
        self.lr, self.optimizer, self.weight_decay = lr, optimizer, weight_decay
        self.lr_schedule, self.warmup_steps = lr_schedule, warmup_steps
        self._train_means = Means()
        self._before_start: list[Tensor] = []
        self._evaluations: dict[int, Evaluation] = {}
        self._checked: set[bool] = set()
        self._fit_seed: int | None = None
        self._means_before: dict[str, Any] | None = None
        self._compiled: compilation.Compiled | None = None
        self._compiled_before: bool | None = None
        self._channels_last = False
        self._noise_is_torch_s = False

    # ---- the contract -----------------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> Tensor:
        """The deterministic code, (B, *input_shape) -> (B, *code_shape); the mean of a posterior."""
        code: Tensor = self.encoder(x)
        return code

    def decode(self, z: Tensor) -> Tensor:
        """The reconstruction in data space, (B, *code_shape) -> (B, *input_shape): the likelihood's mean."""
        return self.likelihood.mean(self.decoder(z))

    def forward(self, x: Tensor) -> Tensor:
        """decode(encode(x)): what an export contains."""
        return self.decode(self.encode(x))

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """Named scalars in nats per sample; `loss` is minimised, all are logged.

        Args:
            x: (B, *input_shape).
            y: (B,) labels, for models that use them.
        """
        raise NotImplementedError(f"{type(self).__name__} must write its loss")

    def sample(self, n: int) -> Tensor:
        """Draw n samples from the model's prior, (n, *input_shape): the likelihood's mean at z ~ p(z).

        Raises:
            AezooError: the model has no prior.
        """
        raise AezooError(f"{type(self).__name__} has no prior to sample from: take a variational model such as vae")

    def score(self, x: Tensor) -> Tensor:
        """Anomaly score, larger is stranger: -log p(x | decoder(encode(x))) in nats, (B, *input_shape) -> (B,)."""
        return self.nll(self.decoder(self.encode(x)), x)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        made = super().__new__(cls, *args, **kwargs)
        made._keywords = frozenset(kwargs)
        return made

    def unusable(self, x: Tensor) -> Tensor:
        """Which samples have no loss, since some values are not finite: (B, *input_shape) -> (B,) bool."""
        return input_checks.not_finite(x)

    def _set_hparams(self, hp: Any) -> None:
        """Keep only arguments of this class: those collected from parents' constructors would not load."""
        own = inspect.signature(type(self)).parameters
        taken = own.keys() | self._keywords  # of a constructor that hands on **kwargs
        if any(p.kind is p.VAR_POSITIONAL for p in own.values()):
            taken |= {"input_shape"}
        super()._set_hparams({name: value for name, value in hp.items() if name in taken})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        input_checks.guard(cls)

    # ---- for the formulas of subclasses -----------------------------------------------------------------------------

    def nll(self, params: Tensor, x: Tensor) -> Tensor:
        """-log p(x | params) in nats per sample, in at least float32: (B, *shape), (B, *shape) -> (B,)."""
        return -self.likelihood.log_prob(at_least_float32(params), like(at_least_float32(x), params))

    def batch_mean(self, values: Tensor) -> Tensor:
        """Mean over the batch dimension, in training over the batches of all ranks, with gradient.

        Loss terms that are not linear in a batch mean need it to give the same result on one process and on many.
        """
        mean = at_least_float32(values).mean(0)
        if self._across_ranks():
            mean = collectives.all_reduce_sum(mean) / dist.get_world_size()
        return mean

    def all_gather_batch(self, values: Tensor) -> Tensor:
        """In training the values of all ranks, in their order, with gradient: (B, ...) -> (N, ...); else unchanged.

        The mean over ranks of the loss is minimised, so a term that each rank computes between its own samples and all
        N counts every pair once.
        """
        return collectives.all_gather_rows(values) if self._across_ranks() else values

    def enable_step_counter(self) -> None:
        """Add the buffer `steps`, the optimiser steps taken; for constructors of models that change over training."""
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def step_fraction(self, n: float) -> Tensor:
        """The share of n optimiser steps that has been taken, from 0 to 1, (); 1 for n = 0."""
        steps = self._buffers["steps"]
        assert steps is not None
        return (steps / n).clamp(max=1) if n else 1 + 0 * steps

    def enable_data_init(self) -> None:
        """Add the buffer `started`; for constructors of models that `init_from_data` initialises with data."""
        self.register_buffer("started", torch.tensor(False))

    def init_from_data(self, x: Tensor) -> None:
        """Initialise parameters from the first training batch of all ranks, (N, *input_shape)."""
        raise NotImplementedError(f"{type(self).__name__} must write what its first data start")

    def gather_rank(self) -> int:
        """The position of this rank's batch in the result of `all_gather_batch`."""
        return dist.get_rank() if self._across_ranks() else 0

    def local_rows(self, values: Tensor) -> Tensor:
        """The row indices of this rank's samples in the result of `all_gather_batch`: (B, ...) -> (B,)."""
        first = self.gather_rank() * len(values)
        return torch.arange(first, first + len(values), device=values.device)

    def _across_ranks(self) -> bool:
        return self.training and dist.is_available() and dist.is_initialized()

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = self.begin_step(batch, batch_idx)
        terms, values = self.step_terms(x, y)
        self.end_step(terms, values, len(x))
        return terms

    def begin_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor | None]:
        """Unpack and check a batch, and seed the step's noise; the first of three parts of a training step."""
        x, y = self._unpack(batch)
        self._seed_step(batch_idx)
        trainer = self._fitted_by()
        if "steps" in self._buffers and trainer is not None:
            # in place, since a compiled step or a CUDA graph reads it each time
            self._buffers["steps"].fill_(self.steps_before + trainer.global_step)  # type: ignore[union-attr]
        if "started" in self._buffers:
            first = trainer is None or trainer.global_step == 0
            if first or self._before_start:
                self._start(x, first)  # in later steps the flag need not be fetched from an accelerator
        return x, y

    def _fitted_by(self) -> pl.Trainer | None:
        """The Trainer that is fitting this model, if any; Lightning keeps the reference after a fit."""
        trainer = self._trainer
        return trainer if trainer is not None and trainer.training else None

    @torch.no_grad()
    def _start(self, x: Tensor, first: bool) -> None:
        if not self.started:
            # after a step that was not finite the fault guard restores buffers, `started` among them, but no weights
            for parameter, before in zip(self.parameters(), self._before_start, strict=False):
                parameter.copy_(before)
            if self._fitted_by() is not None and not self._before_start:
                self._before_start = [parameter.detach().clone() for parameter in self.parameters()]
            self.init_from_data(self.all_gather_batch(from_bytes(x)))
            self.started.fill_(True)
        elif not first:
            self._before_start = []

    def step_terms(self, x: Tensor, y: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of the loss, by name and as one vector, compiled or not; the second part, device work only."""
        terms: tuple[dict[str, Tensor], Tensor] = (self._compiled or self._terms)(x, y)
        return terms

    def end_step(self, terms: dict[str, Tensor], values: Tensor, n: int) -> None:
        """Add the terms of n samples to the epoch's means; the third part."""
        self._train_means.add(terms, n, values)

    def _terms(self, x: Tensor, y: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """The loss of a batch, which may be bytes, and all its terms as one vector; this function is compiled."""
        x = from_bytes(x)
        if self._channels_last and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        # only the loss needs gradients
        terms = {name: term if name == "loss" else term.detach() for name, term in self.loss(x, y).items()}
        return terms, torch.stack([*terms.values()]).detach()

    def _seed_step(self, batch_idx: int) -> None:
        """Make noise a function of (seed, rank, epoch, batch): a resumed run draws the same as an uninterrupted one."""
        trainer = self._fitted_by()
        if trainer is not None and self._fit_seed is not None:
            seed = mix(self._fit_seed, trainer.global_rank, trainer.current_epoch, batch_idx)
            seed_all(seed, self._device, others=not self._noise_is_torch_s)

    def on_train_epoch_end(self) -> None:
        means = self._train_means.compute()
        self._train_means.reset()
        self.log_dict({f"train/{name}": value for name, value in means.items()}, sync_dist=True)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        x, y = self._unpack(batch)
        z, kind = self.encode(x), type(self)
        if kind.score is Autoencoder.score and kind.decode is Autoencoder.decode:
            params = self.decoder(z)  # once for mean and score
            found = {"code": z, "reconstruction": self.likelihood.mean(params), "score": self.nll(params, x)}
        else:
            found = {"code": z, "reconstruction": self.decode(z), "score": self.score(x)}
        return found if y is None else {**found, "label": y}

    def on_predict_start(self) -> None:
        predict_loop.install_predict_loop(self.trainer)

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
                "lr_schedule and warmup_steps need a Trainer, which knows the last step: in a loop of your own leave "
                "them out, and take one of torch.optim.lr_scheduler"
            )
        schedule = optimizers.schedule(optimizer, self.lr_schedule, self.warmup_steps, trainer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "train/lr"}}

    def _hook_into(self, optimizer: torch.optim.Optimizer) -> None:
        """Hook into the optimiser what a Trainer would call this module for, for steps of a user's own loop."""

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

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters for the optimiser, which may have their own settings.

        Each player of an adversarial model has a group: if every parameter gets the gradient of its own player's loss
        only, one backward pass and one optimiser of disjoint groups are equivalent to several optimisers.
        """
        return [{"params": [*self.parameters()]}]

    def setup(self, stage: str) -> None:
        distributed.release_collectives_at_exit(self.trainer)
        # data may be others now, and an evaluation may have been interrupted
        self._checked.clear()
        self._evaluations.clear()
        if stage == "fit" and not self.training:
            self.train()  # Lightning would leave it as load_model gives it
        # before DistributedDataParallel, which lays out gradients like the weights
        fits = stage == "fit" and distributed.has_full_model(self.trainer)
        # ModelPruning uses torch.nn.utils.parameters_to_vector, which accepts only torch's usual layout
        callbacks: list[Any] = self.trainer.callbacks if fits else []  # type: ignore[attr-defined]
        prunes = any(isinstance(callback, pl.callbacks.ModelPruning) for callback in callbacks)
        self._channels_last = fits and not prunes and compilation.to_channels_last(self)

    def on_fit_start(self) -> None:
        self._train_means.reset()
        means, self._means_before = self._means_before, None
        if means is not None and self.trainer.ckpt_path is not None:
            # the epoch's sums up to the checkpoint; several ranks all get those of the first
            self._train_means.load_state_dict(means, self.device)
        if self._fit_seed is None or self.trainer.ckpt_path is None:
            self._fit_seed, self._compiled_before = torch.initial_seed() % 2**63, None

    def __getstate__(self) -> dict[str, Any]:
        # a copy belongs to no fit: a compiled function refers to this model's weights, and cannot be pickled
        of_fit: dict[str, Any] = {"_compiled": None, "takes_bytes": False, "_noise_is_torch_s": False}
        return {**super().__getstate__(), **of_fit, "_before_start": []}

    def configure_callbacks(self) -> list[pl.Callback]:
        there = any(isinstance(callback, _AfterError) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        return [] if there or self.trainer.state.fn != "fit" else [_AfterError()]

    def on_fit_end(self) -> None:
        self.leave_fit()

    def leave_fit(self) -> None:
        """Undo everything that belongs to one fit, however it ended."""
        self._compiled, self.takes_bytes, self._before_start = None, False, []
        if self._channels_last:
            # the same bits as a model that is loaded from a file
            compilation.to_channels_first(self)
            self._channels_last = False

    def on_train_start(self) -> None:
        epoch_loop = self.trainer.fit_loop.epoch_loop
        if epoch_loop.restarted_on_train_batch_end and epoch_loop.batch_progress.is_last_batch:
            self._train_means.reset()  # Lightning counts this epoch as finished
        for held in self.trainer.optimizers:
            optimizers.align(held)
        self._prepare_step()
        own = getattr(self.configure_optimizers, "__func__", None) is Autoencoder.configure_optimizers
        if self.trainer.ckpt_path is None or not own:
            return
        optimizer, scheduler = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        if isinstance(optimizer, torch.optim.Optimizer) and (scheduler is None or isinstance(scheduler, LambdaLR)):
            groups = self.parameter_groups()
            rates = [group.get("lr", self.lr) for group in groups]
            decays = [group.get("weight_decay", self.weight_decay) for group in groups]
            optimizers.renew(optimizer, scheduler, rates, decays)

    def _prepare_step(self) -> None:
        """Use the light loop and compile the loss, if they suit this run."""
        light = fast_loop.install_fast_loop(self.trainer)
        mode = compilation.check_mode(self.compile_mode)
        if mode == "auto":
            chosen = self._compiled_before if self._compiled_before is not None else self._worth_compiling()
        else:
            chosen = mode != "off"
        chosen &= not self.steps_differ
        self._compiled_before = chosen
        compilation.announce(mode, chosen, self.steps_differ)
        self._compiled = None
        own_loop = type(self).training_step is Autoencoder.training_step
        if chosen:
            if light and own_loop and mode == "reduce-overhead" and fast_loop.capture(self.trainer):
                mode = "default"  # a graph of the whole step includes those of its parts
            batches = self.trainer.fit_loop.epoch_loop.batch_progress
            how: dict[str, Any] = {
                "mode": "default" if mode == "auto" else mode,
                "before_retry": lambda: self._seed_step(batches.current.ready - 1),
                "least": compilation.full_batch(self.trainer.train_dataloader),
            }
            self._compiled = compilation.Compiled(self._terms, **how)
            if light and own_loop and self.device.type == "cpu" and joint_backward.can_trace():
                fast_loop.join(self.trainer, joint_backward.Joint(self, self._terms, **how))
        if light and _is_own(type(self)):
            fast_loop.trust(self.trainer)
        self._refresh_participants()
        fast_loop.tell(self.trainer, self._refresh_participants)

    def _refresh_participants(self) -> None:
        """Check who else takes part in a step: what others see and draw must not change."""
        self._noise_is_torch_s = fast_loop.uses_only_torch_rng(self.trainer) and _is_own(type(self))
        # bytes from other data are refused if the step is not compiled, so also if it is
        leaves = getattr(self.trainer.datamodule, "leaves_bytes", False)  # type: ignore[attr-defined]
        self.takes_bytes = leaves and self._compiled is not None and fast_loop.batch_is_private(self.trainer)

    def _worth_compiling(self) -> bool:
        batch_size = getattr(self.trainer.train_dataloader, "batch_size", None)
        steps = optimizers.known_steps(self.trainer)
        if not isinstance(batch_size, int):
            return False
        parameters = sum(p.numel() for p in self.parameters())
        uses = compilation.positions(self, self.input_shape)
        return compilation.worth_compiling(parameters, batch_size, uses, steps, self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        from aezoo.registry import name_of

        stamp = {"model": name_of(type(self)), "version": aezoo.__version__}
        # a resumed run must draw the same noise and use the same arithmetic
        checkpoint["aezoo"] = stamp | {"seed": self._fit_seed, "compiled": self._compiled_before}
        if self._train_means.state_dict()["count"]:
            checkpoint["aezoo"]["means"] = self._train_means.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stamp = checkpoint.get("aezoo", {})
        self._fit_seed, self._compiled_before = stamp.get("seed"), stamp.get("compiled")
        self._means_before = stamp.get("means")

    def _evaluate(self, batch: Any, batch_idx: int, loader: int) -> None:
        x, y = self._unpack(batch)
        if loader not in self._evaluations:
            code_shape = self.code_shape if self.sparse_code else None
            self._evaluations[loader] = Evaluation(self.input_shape, self.device, code_shape, self.takes_missing)
        with self._fixed_noise(batch_idx):
            terms = self.loss(x, y)
            read = x if self.corruption is None else self.corruption(x)
            x_hat, seen = self._reconstruct(read)
            log_likelihood = getattr(self, "log_likelihood", None)
            trainer = self._trainer
            if callable(log_likelihood) and trainer is not None and trainer.state.fn in ("validate", "test"):
                terms["log_likelihood"] = log_likelihood(x, self.importance_samples).mean()
        self._evaluations[loader].add(terms, x, x_hat, **seen)

    def _reconstruct(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The reconstruction, and further arguments of `Evaluation.add`."""
        if self.sparse_code:
            code = self.encode(x)
            return self.decode(code), {"code": code}
        return self(x), {}

    def _log_evaluation(self, stage: str) -> None:
        for loader, evaluation in self._evaluations.items():
            # the first loader has the plain names, which checkpoints monitor
            group = f"{stage}_{loader}" if loader else stage
            figures = {f"{group}/{name}": value for name, value in evaluation.compute().items()}
            self.log_dict(figures, sync_dist=True)
        self._evaluations.clear()

    @contextmanager
    def _fixed_noise(self, batch_idx: int) -> Iterator[None]:
        """The same noise for a batch in every evaluation, so that epochs are comparable; training's noise stays."""
        with forked_rng(self.device):
            torch.manual_seed((_EVALUATION_SEED * 1_000_003 + self.global_rank) * 1_000_003 + batch_idx)
            yield

    def _unpack(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        x, y = input_checks.unpack(batch)
        if self.training not in self._checked:
            input_checks.warn_unused_parts(batch)
            self.check_batch(from_bytes(x) if self.takes_bytes else x)
            self._checked.add(self.training)
        return x, y

    def check_batch(self, x: Tensor) -> None:
        """Refuse a batch that the model cannot use; the loop calls it on the first batches of training and evaluation.

        Training data must lie in the likelihood's interval; other data may exceed the range of the training data, but
        not tenfold, as unscaled images from 0 to 255 do.

        Raises:
            AezooError: wrong shape or dtype, values that are not finite, or outside the likelihood's [0, 1].
        """
        input_checks.check_batch(self, x)


class _AfterError(pl.Callback):
    """Calls `leave_fit` after Ctrl-C or an error, of which Lightning informs callbacks only."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(pl_module, Autoencoder) and trainer.state.fn == "fit":
            pl_module.leave_fit()


input_checks.guard(Autoencoder)  # subclasses are guarded when they are defined


def _is_own(cls: type) -> bool:
    return cls.__module__.startswith("aezoo.models.")
