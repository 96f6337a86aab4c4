"""Sparse autoencoder with an L1 penalty and a dictionary (Bricken et al. 2023), https://transformer-circuits.pub/2023/monosemantic-features

    f = relu(W_enc (x - b) + b_enc)     x_hat = sum_i f_i d_i + b     ||d_i|| = 1
    L = -log p(x | x_hat) + lam sum_i f_i

L is in nats per sample. In the form of April 2024 (https://transformer-circuits.pub/2024/april-update), the norm of
each direction is part of the penalty instead of being constrained to 1, and b is not subtracted from x:

    f = relu(W_enc x + b_enc)     L = -log p(x | x_hat) + lam sum_i f_i ||d_i||

Scaling d_i by c and f_i by 1 / c thus changes neither the output nor the penalty. lam increases linearly from 0 over
the first l1_steps optimiser steps in training; evaluation uses the final lam. lam = 0 is the dense autoencoder with a
ReLU code.

With input_norm, each sample is normalised (Gao et al. 2024), and the loss is that of the normalised sample.

With resample_steps, dead latents are reinitialised every resample_steps optimiser steps. Each is set to a sample from
the next batch (of all ranks), drawn with probability proportional to the fourth power of its error norm. The authors
draw from many more samples, at four steps of a long run. Shapes: B batch, X data dimensions, N latents.
"""

import math
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from aezoo.autoencoder import Autoencoder, at_least_float32, from_bytes
from aezoo.errors import AezooError
from aezoo.nets.blocks.dictionary import Dictionary, InputNorm, UnitNorm, resample_dead
from aezoo.training.arguments import TrainingArgs
from aezoo.training.limits import check_at_least


class DictionaryArgs(TrainingArgs, total=False):
    """Arguments of `SAEL1` that all variants accept."""

    dead_after: int
    data_init: bool


class SAEL1Args(DictionaryArgs, total=False):
    """Arguments of `SAEL1` except those of `FormArgs` and resample_steps."""

    latent_dim: int
    l1: float
    l1_steps: int


class FormArgs(TypedDict, total=False):
    """Arguments of `SAEL1` for loading weights from other libraries."""

    form: str
    input_norm: str


class SAEL1(
    InputNorm, UnitNorm, Autoencoder, defaults={"likelihood": "gaussian"}, sparse_code=True, tags=("interpretability",)
):
    """Few latents of a wide dictionary are active for each sample, due to an L1 penalty.

    Args:
        input_shape: shape of one sample; any shape is valid, samples are flattened.
        latent_dim: N, number of latents in the dictionary.
        form: unit_norm (2023) or april (April 2024).
        input_norm: none, layer_norm or rms_norm: normalise each sample, see `aezoo.nets.blocks.dictionary.InputNorm`.
        l1: lam, weight of the sum of activations.
        l1_steps: optimiser steps over which lam increases from 0; with 0, lam is constant.
        resample_steps: optimiser steps between reinitialisations of dead latents; 0 disables them.
        dead_after: a latent is dead if it has not been active for this many samples.
        data_init: initialise the bias to the geometric median of the first training batch.
        **kwargs: see `Autoencoder`.
    """

    encoder: nn.Linear
    steps: Tensor
    decoder: Dictionary

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 512,
        form: str = "unit_norm",
        input_norm: str = "none",
        l1: float = 1.0,
        l1_steps: int = 0,
        resample_steps: int = 0,
        dead_after: int = 20_000,
        data_init: bool = False,
        **kwargs: Unpack[TrainingArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        self.latent_dim = latent_dim
        if form not in ("unit_norm", "april"):
            raise AezooError(f"form must be unit_norm or april, got {form!r}")
        check_at_least(1, latent_dim=latent_dim, dead_after=dead_after)
        check_at_least(0, l1=l1, l1_steps=l1_steps, resample_steps=resample_steps)
        self.unit_norm = form == "unit_norm"
        self.l1 = l1
        self.l1_steps = l1_steps
        self.resample_steps = resample_steps
        self.init_input_norm(input_norm, latent_dim, self.likelihood.unit_interval)
        self.encoder = nn.Linear(math.prod(self.input_shape), latent_dim)
        self.decoder = Dictionary(latent_dim, self.input_shape, unit_norm=self.unit_norm)
        self.encoder.weight.data.copy_(self.decoder.W_NX)
        nn.init.zeros_(self.encoder.bias)
        self.init_dictionary_training(latent_dim, dead_after, data_init)
        self.enable_step_counter()

    def init_from_data(self, x: Tensor) -> None:
        super().init_from_data(self.predicted(self.normalised(x)))

    def warm_up_weight(self, weight: float) -> Tensor | float:
        """Return the weight of a penalty at the current step."""
        return weight * self.step_fraction(self.l1_steps) if self.training and self.l1_steps else weight

    def read(self, x: Tensor) -> Tensor:
        """Return the encoder's input, (B, *input_shape) -> (B, X)."""
        return x.flatten(1) - self.decoder.b_X if self.unit_norm else x.flatten(1)

    def predicted(self, x: Tensor) -> Tensor:
        """Return the decoder's target, (B, *input_shape) -> (B, *shape)."""
        return x

    def latents(self, x: Tensor) -> Tensor:
        return self.encoder(self.read(x)).relu()

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents f and the decoder's output for normalised samples."""
        f_BN = self.latents(x)
        return f_BN, self.decoder(f_BN)

    def costs(self) -> Tensor | float:
        """Return each latent's factor in the penalty: 1, or the norm of its direction, (N,)."""
        return 1.0 if self.unit_norm else at_least_float32(self.decoder.W_NX).norm(dim=1)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        x = self.normalised(x)
        f_BN, x_hat = self.reconstruct(x)
        nll_B = self.nll(x_hat, self.predicted(x))
        l1_B = (at_least_float32(f_BN) * self.costs()).sum(1)
        loss = (nll_B + self.warm_up_weight(self.l1) * l1_B).mean()
        return {"loss": loss, "nll": nll_B.mean(), "l1": l1_B.mean(), **self.usage_terms(f_BN)}

    def begin_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor | None]:
        x, y = super().begin_step(batch, batch_idx)
        steps = self._trainer.global_step if self.resample_steps and self._trainer is not None else 0
        if steps and steps % self.resample_steps == 0:
            with torch.autocast(x.device.type, enabled=False):
                self.resample(from_bytes(x), self.optimizers(use_pl_optimizer=False), steps)
        return x, y

    @torch.no_grad()
    def resample(self, x: Tensor, optimizer: Any, seed: int) -> None:
        """Reinitialise dead latents with samples that have a large reconstruction error."""
        dead_N, x = self.dead_N, self.all_gather_batch(x.to(self.encoder.weight.dtype))
        if not dead_N.any():
            return
        x = self.normalised(x)
        y = self.predicted(x)
        sse_B = at_least_float32(y - self.likelihood.mean(self.reconstruct(x)[1])).flatten(1).square().sum(1)
        sse_B = torch.where(sse_B.isfinite(), sse_B, 0)  # samples that are not finite are never drawn
        share_B = (sse_B / sse_B.max()).nan_to_num(1).square().cpu()
        generator = torch.Generator().manual_seed(seed)  # all ranks must draw the same rows
        rows = torch.multinomial(share_B, int(dead_N.sum()), True, generator=generator).to(x.device)
        resample_dead(self.encoder, self.decoder, dead_N, self.read(x)[rows], y.flatten(1)[rows], optimizer)
        self.since_fired_N[dead_N] = 0
