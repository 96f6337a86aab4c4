"""Semantic hashing (Salakhutdinov & Hinton 2009), https://doi.org/10.1016/j.ijar.2008.11.006

Gaussian noise before the code's sigmoid drives the code units towards 0 or 1, where the noise has little effect:

    L = E_eps[ -log p(x | g(sigmoid(a + s eps))) ]     a = f(x)     eps ~ N(0, I)     code = 1[a > 0]

L is in nats per sample; s = 4 in the paper. The loss uses noisy codes in training and evaluation; codes, scores and
reconstructions use bits. The gradient passes through the bits as if they were sigmoid(a) (straight-through estimator).

`binarisation` improved is the improved semantic hashing of Kaiser & Bengio 2018, https://arxiv.org/abs/1801.09797,
where s = 1. v = a + s eps passes through the saturating sigmoid s'(v) = max(0, min(1, 1.2 sigmoid(v) - 0.1)). For each
unit, the decoder receives s'(v) or the bit 1[v > 0] with probability 1/2 each; the gradient is always that of s'(v).

The paper pretrains a stack of RBMs, whose visible biases start at the mean of the data (Hinton 2010, "A practical guide
to training RBMs", section 8.1). Otherwise, the output can approach the mean of the data fastest if all code units
behave alike, and the units saturate there permanently. data_init starts a bias of each output at the mean of the first
batch.

Shapes: B batch, D bits, X data dimensions.
"""

from typing import Unpack, cast

import torch
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import NetworkArgs, NetworkAutoencoder
from aezoo.errors import AezooError
from aezoo.quantisers.estimators import ste
from aezoo.training.limits import check_at_least

BINARISATIONS = ("noise", "improved")


class VisibleBias(nn.Module):
    """Adds a learned bias to each output.

    Args:
        input_shape: shape of one sample.
    """

    def __init__(self, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.b_X = nn.Parameter(torch.zeros(input_shape))

    def forward(self, params: Tensor) -> Tensor:
        return params + self.b_X


class SemanticHashAE(NetworkAutoencoder, hidden_dims={"mlp": (256,)}, tags=("representation",)):
    """Learns a binary code in which similar samples have a small Hamming distance.

    Args:
        latent_dim: D, number of bits.
        binarisation: how training makes the code's units binary: noise or improved.
        noise_std: s, standard deviation of the noise before the sigmoid.
        data_init: initialise the bias of each output from the first training batch.
        **kwargs: see `NetworkAutoencoder`.
    """

    decoder: nn.Sequential

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 32,
        binarisation: str = "noise",
        noise_std: float = 4.0,
        data_init: bool = True,
        **kwargs: Unpack[NetworkArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        if binarisation not in BINARISATIONS:
            raise AezooError(f"unknown binarisation {binarisation!r}: choose from {', '.join(BINARISATIONS)}")
        check_at_least(0, noise_std=noise_std)
        self.binarisation = binarisation
        self.noise_std = noise_std
        self.code_shape = (latent_dim,)
        self.encoder = self.build_encoder(self.code_shape)
        decoder = self.build_decoder(self.code_shape)
        self.decoder = nn.Sequential(decoder, VisibleBias(self.input_shape))
        if data_init:
            self.enable_data_init()

    def init_from_data(self, x: Tensor) -> None:
        """Set the output biases to those of the mean of the samples (N, *input_shape)."""
        cast(VisibleBias, self.decoder[1]).b_X.copy_(self.likelihood.params_from_mean(x.mean(0)))

    def noisy_code(self, a_BD: Tensor) -> Tensor:
        """Return the decoder's input in training for the code's pre-activations, (B, D) -> (B, D)."""
        v_BD = a_BD + self.noise_std * torch.randn_like(a_BD)
        if self.binarisation == "noise":
            return v_BD.sigmoid()
        soft_BD = (1.2 * v_BD.sigmoid() - 0.1).clamp(0, 1)
        bits_BD = (v_BD > 0).to(v_BD.dtype)
        return ste(soft_BD, torch.where(torch.rand_like(v_BD) < 0.5, bits_BD, soft_BD))

    def encode(self, x: Tensor) -> Tensor:
        a_BD = self.encoder(x)
        return ste(a_BD.sigmoid().to(x.dtype), (a_BD > 0).to(x.dtype))

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        code_BD = self.noisy_code(at_least_float32(self.encoder(x)))
        nll_B = self.nll(self.decoder(code_BD.to(x.dtype)), x)
        nll = nll_B.mean()
        return {"loss": nll, "nll": nll}
