"""Memory-augmented autoencoder, MemAE (Gong et al. 2019), https://arxiv.org/abs/1904.02639

The decoder receives a mixture of a few items of a learned memory, not the code itself, so it draws what it knows:

    w_i = exp(cos(z, m_i)) / sum_j exp(cos(z, m_j))     z = f(x)                             (equations 4 and 5)
    w^_i = h(w_i) / sum_j h(w_j)     h(w) = w where w > s / N, else 0                        (equations 6 and 7)
    L = -log p(x | g(z^)) + alpha H(w^)     z^ = sum_i w^_i m_i     H(w) = -sum_i w_i log w_i     (equations 3 and 8)

L is in nats per sample. In the paper, s lies between 1 and 3. If no weight exceeds the threshold, the largest weight is
kept; the paper does not cover this case. A sample with one item left trains that item but not the encoder, so an s that
removes this many items from the start is too large. The code is z^. s = 0 and alpha = 0 give softmax attention.

Shapes: B batch, N items of the memory, D code.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo import nets
from aezoo.autoencoder import Autoencoder, at_least_float32
from aezoo.errors import AezooError


class MemoryAE(Autoencoder):
    """Reconstructs from the items of a memory learned on normal data, so that unusual samples are reconstructed badly.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        latent_dim: D, size of the code and of each item.
        n_items: N, number of items in the memory.
        shrinkage: s; weights of at most s / N are set to 0.
        entropy_weight: alpha, weight of the entropy of w^.
        net: mlp, conv, resnet, convnext, conv_keras, unet, gdn, dc, vit, mixer, lstm or transformer.
        hidden_dims: widths of the encoder's layers (mlp) or channels of its stages; the decoder mirrors them.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus, identity or (mlp) gated, between layers.
        likelihood: how outputs are compared with data: bernoulli, continuous_bernoulli, gaussian, gaussian:0.1,
            gaussian:learned, laplace, discretised_logistic, beta_binomial, logcosh, logit_laplace.
        lr: learning rate.
        optimizer: adam, adamw, adamax, nadam, radam, rmsprop, adagrad, adadelta or sgd; also adam:beta1=0.5,eps=1e-4.
        weight_decay: the optimiser's weight decay.
        lr_schedule: constant, cosine, linear, exponential, step or multistep:FACTOR@P,P, from warm-up to the last step.
        warmup_steps: optimiser steps over which the learning rate rises linearly.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        n_items: int = 100,
        shrinkage: float = 1.0,
        entropy_weight: float = 2e-4,
        net: str = "mlp",
        hidden_dims: tuple[int, ...] = (256,),
        activation: str = "relu",
        likelihood: str = "bernoulli",
        lr: float = 1e-3,
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        lr_schedule: str = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(
            input_shape,
            likelihood=likelihood,
            lr=lr,
            optimizer=optimizer,
            weight_decay=weight_decay,
            lr_schedule=lr_schedule,
            warmup_steps=warmup_steps,
        )
        self.save_hyperparameters()
        if latent_dim < 1:
            raise AezooError(f"latent_dim must be at least 1, got {latent_dim}")
        if n_items < 1:
            raise AezooError(f"n_items must be at least 1, got {n_items}")
        if not 0 <= shrinkage < math.inf:
            raise AezooError(f"shrinkage must be at least 0 and finite, got {shrinkage}")
        if not 0 <= entropy_weight < math.inf:
            raise AezooError(f"entropy_weight must be at least 0 and finite, got {entropy_weight}")
        self.shrinkage, self.entropy_weight = shrinkage, entropy_weight
        self.code_shape = (latent_dim,)
        self.encoder = nets.encoder(net, self.input_shape, self.code_shape, hidden_dims, activation)
        self.decoder = nets.decoder(net, self.code_shape, self.input_shape, hidden_dims[::-1], activation)
        # cosines ignore the items' scale; at this one, mixtures of nearly equal weights differ by about 1 per sample
        self.memory_ND = nn.Parameter(math.sqrt(n_items) * torch.randn(n_items, latent_dim))

    def address(self, x: Tensor) -> Tensor:
        """w^, the weight of each item in each code, (B, *input_shape) -> (B, N)."""
        z_BD, m_ND = at_least_float32(self.encoder(x)), at_least_float32(self.memory_ND)
        with torch.autocast(x.device.type, enabled=False):  # rounding would change what the threshold cuts
            cosine_BN = F.normalize(z_BD, dim=1) @ F.normalize(m_ND, dim=1).T
        w_BN = cosine_BN.detach().softmax(1)
        kept_BN = (w_BN > self.shrinkage / w_BN.shape[1]) | (w_BN == w_BN.amax(1, keepdim=True))
        # renormalised; the gradient of a removed weight is exactly 0, not a rest of two terms that Adam would enlarge
        return cosine_BN.masked_fill(~kept_BN, -torch.inf).softmax(1)

    def recall(self, w_BN: Tensor) -> Tensor:
        """z^, (B, N) -> (B, D)."""
        return w_BN.to(self.memory_ND.dtype) @ self.memory_ND

    @staticmethod
    def entropy(w_BN: Tensor) -> Tensor:
        """H of each address in nats, (B, N) -> (B,)."""
        return -(w_BN * w_BN.clamp(min=torch.finfo(w_BN.dtype).tiny).log()).sum(1)

    def encode(self, x: Tensor) -> Tensor:
        return self.recall(self.address(x)).to(x.dtype)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        w_BN = self.address(x)
        nll_B = self.nll(self.decoder(self.recall(w_BN).to(x.dtype)), x)
        entropy_B = self.entropy(w_BN)
        return {
            "loss": (nll_B + self.entropy_weight * entropy_B).mean(),
            "nll": nll_B.mean(),
            "entropy": entropy_B.mean(),
        }
