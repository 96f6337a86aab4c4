"""Sequence autoencoder, LSTM or Transformer (Srivastava et al. 2015), https://arxiv.org/abs/1502.04681

Encodes a whole sequence into one code and decodes the sequence from it:

    L = - sum_{t < T} log p(x_t | g(z)_t)     z = f(x_0, ..., x_{T-1})

L is in nats per sample, summed over the T steps of a sequence. All samples have the same shape; shorter sequences are
padded. `pad_value` defines the padding: all steps after the last one that contains another value. Steps before that
which contain only this value are data. Padding affects neither the code nor the loss, whatever its length. With
`pad_value`, the last entry of the code is T, so that decode can fill the steps from T on with `pad_value`. A sequence
that is all padding counts as one step.

The authors' decoder, https://github.com/mansimov/unsupervised-videos, starts from the states of all encoder layers, has
no other input, and writes the last step first. Here the decoder receives one vector, z, at each step, and keeps the
order.

Steps run along the first axis after the channels: (C, L) has L steps of C values, (C, H, W) has H rows, (C, D, H, W)
has D slices and (D,) has D steps of one value. The weights of both networks, `aezoo.nets.lstm` and
`aezoo.nets.transformer`, do not depend on the number of steps.

Shapes: B batch, L steps of the shape, F values of a step, D code.
"""

from typing import Unpack

import torch
from torch import Tensor

from aezoo.bases.network import FixedLikelihoodArgs, NetworkAutoencoder
from aezoo.errors import AezooError
from aezoo.nets.lstm import FromSteps, Steps
from aezoo.training.limits import check_at_least

_NETS = ("lstm", "transformer")


class SequenceAE(NetworkAutoencoder, defaults={"net": "lstm"}, tags=("representation",)):
    """Encodes a sequence of any length up to that of the shape into a vector and decodes it.

    Args:
        input_shape: (C, L) for L steps of C values; images are read by rows, volumes by slices, vectors by values.
        net: lstm or transformer.
        pad_value: steps at the end that contain only this value are padding; None for sequences of full length.
        latent_dim: D, size of the code; with pad_value, the code has one more entry, the length.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus or identity, outside LSTM cells.
        likelihood: how outputs are compared with data: bernoulli, continuous_bernoulli, gaussian, gaussian:0.1,
            gaussian:learned, sigmoid_gaussian, laplace, discretised_logistic, beta_binomial, logcosh, logit_laplace.
        **kwargs: see `NetworkAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        pad_value: float | None = None,
        latent_dim: int = 32,
        likelihood: str = "bernoulli",
        **kwargs: Unpack[FixedLikelihoodArgs],
    ) -> None:
        super().__init__(input_shape, likelihood=likelihood, **kwargs)
        if self.net not in _NETS:
            raise AezooError(f"net must be {' or '.join(_NETS)}, got {self.net!r}")
        check_at_least(1, latent_dim=latent_dim)
        if pad_value is not None and self.likelihood.unit_interval and not 0 <= pad_value <= 1:
            raise AezooError(
                f"pad_value must lie in [0, 1] as the data of likelihood={likelihood!r}, got {pad_value}: "
                "or use likelihood='gaussian'"
            )
        self.pad_value = pad_value
        self.code_shape = (latent_dim + (pad_value is not None),)
        self.encoder = self.build_encoder((latent_dim,))
        self.decoder = self.build_decoder((latent_dim,))
        self.to_steps = Steps()
        self.from_steps = FromSteps(self.input_shape)

    def lengths(self, x: Tensor) -> Tensor | None:
        """Return T of each sequence, (B, *input_shape) -> (B,), or None if there is no padding."""
        if self.pad_value is None:
            return None
        steps_BLF = self.to_steps(x)
        number_L = torch.arange(1, steps_BLF.shape[1] + 1, device=x.device)
        return ((steps_BLF != self.pad_value).any(2) * number_L).amax(1).clamp(min=1)

    def encode(self, x: Tensor) -> Tensor:
        length_B = self.lengths(x)
        z_BD: Tensor = self.encoder(x, length_B)
        # half precision cannot represent every length
        return z_BD if length_B is None else torch.cat([z_BD.to(x.dtype), length_B[:, None].to(x.dtype)], 1)

    def decode(self, z: Tensor) -> Tensor:
        if self.pad_value is None:
            return super().decode(z)
        steps_BLF = self.to_steps(self.likelihood.mean(self.decoder(z[:, :-1])))
        step_L = torch.arange(steps_BLF.shape[1], device=z.device)
        valid_BL = step_L < z[:, -1:].round().clamp(min=1)
        return self.from_steps(steps_BLF.where(valid_BL[..., None], self.pad_value))

    def sequence_nll(self, x: Tensor) -> Tensor:
        """-log p(x | g(f(x))) over the steps that are not padding, in nats, (B, *input_shape) -> (B,)."""
        length_B = self.lengths(x)
        params = self.decoder(self.encoder(x, length_B))
        if length_B is None:
            return self.nll(params, x)
        params_BLF, x_BLF = self.to_steps(params), self.to_steps(x)
        nll_BL = self.nll(params_BLF.flatten(0, 1), x_BLF.flatten(0, 1)).unflatten(0, x_BLF.shape[:2])
        valid_BL = torch.arange(nll_BL.shape[1], device=x.device) < length_B[:, None]
        return nll_BL.where(valid_BL, 0.0).sum(1)

    def score(self, x: Tensor) -> Tensor:
        return self.sequence_nll(x)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll_B = self.sequence_nll(x)
        nll = nll_B.mean()
        return {"loss": nll, "nll": nll}
