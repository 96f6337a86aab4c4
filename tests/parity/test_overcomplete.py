"""Dictionaries and pursuits of the authors of archetypal sparse autoencoders (Fel et al. 2025).

Source: https://github.com/KempnerInstitute/overcomplete
"""

import math
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import aezoo

# the plots need an older matplotlib
with mock.patch.dict(sys.modules, {"overcomplete.visualization": mock.MagicMock()}):
    from overcomplete.sae.archetypal_dictionary import RelaxedArchetypalDictionary
    from overcomplete.sae.mp_sae import MpSAE
    from overcomplete.sae.rasae import RATopKSAE

D, LATENTS, K, BATCH = 6, 10, 3, 8


class LinearEncoder(torch.nn.Module):
    """A linear map and a ReLU, the paper's encoder without batch normalisation; returns both stages."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(D, LATENTS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.linear(x)
        return found, found.relu()


def error(x: Tensor, back: Tensor) -> Tensor:
    """The -log-density of N(back, 1/2), the squared error and a constant."""
    return (x - back).square().sum(1).mean() + D / 2 * math.log(math.pi)


def created_archetypal(points: int, delta: float) -> tuple[Any, Any, list[tuple[Tensor, Tensor]]]:
    settings = {"latent_dim": LATENTS, "k": K, "n_points": points, "delta": delta}
    model = aezoo.create_model("ra_sae", (D,), **settings).double()
    candidates, shares = torch.randn(points, D), torch.rand(LATENTS, points)
    relaxed = torch.randn(LATENTS, D)
    with torch.no_grad():
        model.decoder.points_PX.copy_(candidates)
        model.decoder.shares_NP.copy_(shares / shares.sum(1, keepdim=True))
        # inside the ball of radius delta
        model.decoder.lambda_NX.copy_(0.9 * delta * relaxed / relaxed.norm(dim=1, keepdim=True))
    arguments = {"top_k": K, "delta": delta, "use_multiplier": False, "encoder_module": LinearEncoder()}
    other = RATopKSAE(D, LATENTS, candidates, **arguments).double()
    dictionary, linear = other.dictionary, other.encoder.linear
    pairs = [
        (model.encoder.weight, linear.weight),
        (model.encoder.bias, linear.bias),
        (model.decoder.shares_NP, dictionary.W),
        (model.decoder.lambda_NX, dictionary.Relax),
    ]
    for a, b in pairs:
        b.data.copy_(a.detach())
    return model, other.train(), pairs


@pytest.mark.parametrize("delta", [0.5, 2.0])
def test_archetypal_loss(compare, delta):
    model, other, pairs = created_archetypal(7, delta)
    x = torch.randn(BATCH, D)
    found, (_, codes, back) = model.loss(x), other(x)
    row = compare("ra_sae", "overcomplete", "RATopKSAE")
    # theirs divides shares by their sum plus 1e-8
    row.equal("directions", model.decoder.directions(), other.get_dictionary())
    row.equal("codes", model.encode(x), codes)
    row.equal("reconstructions", model(x), back)
    row.equal("loss", found["loss"], error(x, back))
    row.equal_gradients(found["loss"], error(x, back), pairs)


def test_archetypal_bounds(compare):
    model, _, _ = created_archetypal(7, 0.5)
    with torch.no_grad():
        model.decoder.shares_NP.add_(0.3 * torch.randn(LATENTS, 7))
        model.decoder.lambda_NX.mul_(3)
    theirs = RelaxedArchetypalDictionary(D, LATENTS, model.decoder.points_PX, delta=0.5, use_multiplier=False)
    theirs.W.data.copy_(model.decoder.shares_NP)
    theirs.Relax.data.copy_(model.decoder.lambda_NX)
    theirs.get_dictionary()
    model.decoder.normalise()
    row = compare("ra_sae", "overcomplete", "RelaxedArchetypalDictionary")
    row.equal("Lambda in its balls", model.decoder.lambda_NX, theirs.Relax)
    reason = "ours are the nearest that sum to 1, theirs relu(W) divided by its sum; the paper states only the set"
    row.deviates("shares after a step", model.decoder.shares_NP, theirs.W, reason, follows="both")


def test_matching_pursuit_loss(compare):
    model = aezoo.create_model("matching_pursuit_sae", (D,), latent_dim=LATENTS, k=K).double()
    other = MpSAE(D, LATENTS, k=K, dictionary_params={"normalization": "identity"}).double()
    dictionary = other.dictionary
    dictionary._weights.data.copy_(model.decoder.W_NX.detach())
    x = torch.randn(BATCH, D)
    found, (residual, codes, back) = model.loss(x), other(x)
    row = compare("matching_pursuit_sae", "overcomplete", "MpSAE")
    row.equal("codes", model.encode(x), codes)
    row.equal("reconstructions", model(x), back)
    row.equal("residuals", x - model(x), residual)
    row.equal("loss", found["loss"], error(x, back))
    row.equal_gradients(found["loss"], error(x, back), [(model.decoder.W_NX, dictionary._weights)])
