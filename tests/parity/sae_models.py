"""Sparse autoencoders for the comparisons, with parameters that differ from their initial values, and dead latents."""

import math
from typing import Any

import torch
from torch import Tensor

import aezoo

X, N = 6, 12
DEAD = torch.tensor([1, 4, 6, 9])
DEAD_AFTER = 1000


def build(name: str, shape: tuple[int, ...] = (X,), **settings: Any) -> Any:
    """A model in training mode with random offsets added to all parameters."""
    model = aezoo.create_model(name, shape, latent_dim=N, **settings).double().train()
    with torch.no_grad():
        for p in model.parameters():
            p += (0.4 if p.ndim == 1 else 0.2) * torch.randn_like(p)
    if hasattr(model, "after_optimizer_step"):
        model.after_optimizer_step()
    return model


def with_dead(name: str, dead: Tensor = DEAD, **settings: Any) -> Any:
    """A model whose live latents outrank the dead ones, of which some are positive; they are dead at the next batch."""
    model = build(name, dead_after=DEAD_AFTER, **settings)
    with torch.no_grad():
        model.encoder.bias.fill_(8)
        model.encoder.bias[dead] = 0.5
    model.since_fired_N[dead] = DEAD_AFTER
    return model


def sum_prefixes(model: Any) -> Any:
    """A matryoshka_sae with the sum of the paper instead of the mean and without the empty prefix, as both packages."""
    mean_loss = model.loss

    def loss(x: Tensor) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = mean_loss(x)
        prefix_nll = terms["prefix_nll"] - model.nll(model.decoder.b_X.expand_as(x), x).mean()
        total = terms["nll"] + prefix_nll + model.aux_weight * terms["aux"]
        return terms | {"loss": total, "prefix_nll": prefix_nll, "mean_loss": terms["loss"]}

    model.loss = loss
    return model


def dead_mask(dead: Tensor = DEAD) -> Tensor:
    return torch.zeros(N, dtype=torch.bool).index_fill(0, dead, True)


def data(n: int = 7, shape: tuple[int, ...] = (X,)) -> Tensor:
    return torch.randn(n, *shape)


def without_constant(nll: Tensor, dimensions: int = X) -> Tensor:
    """The squared error: -log p of a Gaussian of variance 1/2 without its constant."""
    return nll - dimensions / 2 * math.log(math.pi)
