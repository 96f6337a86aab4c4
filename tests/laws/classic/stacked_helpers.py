"""Helpers of the laws of the memory autoencoder, of semantic hashing and of the stacked denoising autoencoder."""

from typing import Any

import torch
import torch.distributions as D
from torch import Tensor

import aezoo

SHAPE, CODE = (2, 3, 3), 4


def small(name: str, shifted: Any, **settings: Any) -> Any:
    return shifted(aezoo.create_model(name, SHAPE, **{"latent_dim": CODE, "hidden_dims": (16,), **settings})).double()


def images(n: int = 6, seed: int = 7) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def bernoulli_nll(logits: Tensor, x: Tensor) -> Tensor:
    return -D.Bernoulli(logits=logits, validate_args=False).log_prob(x).flatten(1).sum(1)
