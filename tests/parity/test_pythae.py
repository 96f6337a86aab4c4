"""Losses of pythae around copies of our networks (Chadebec et al. 2022).

Source: https://github.com/clementchadebec/benchmark_VAE
"""

import copy
from typing import Any

import pytest
import torch
from comparison import noise
from pythae import models as pythae
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from torch import Tensor

import aezoo

SHAPE, LATENT = (1, 4, 4), 3


class GaussianEncoder(BaseEncoder):
    """A copy of our encoder, whose output is the mean beside the log-variance."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.net, self.latent_dim = copy.deepcopy(encoder), LATENT

    def forward(self, x: Tensor) -> ModelOutput:
        mean, log_var = self.net(x).chunk(2, dim=1)
        return ModelOutput(embedding=mean, log_covariance=log_var)


class BernoulliDecoder(BaseDecoder):
    """A copy of our decoder, whose output is logits; pythae takes probabilities."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(decoder)

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.net(z).sigmoid())


def ours(name: str, **settings: Any) -> Any:
    return aezoo.create_model(name, SHAPE, latent_dim=LATENT, hidden_dims=(8,), **settings).double()


def theirs(kind: str, model: Any, **settings: Any) -> Any:
    config = getattr(pythae, f"{kind}Config")(input_dim=SHAPE, latent_dim=LATENT, reconstruction_loss="bce", **settings)
    return getattr(pythae, kind)(config, GaussianEncoder(model.encoder), BernoulliDecoder(model.decoder)).double()


def parameters(model: Any, other: Any) -> list[tuple[Tensor, Tensor]]:
    """Pairs of parameters of both networks."""
    pairs = []
    for a, b in ((model.encoder, other.encoder.net), (model.decoder, other.decoder.net)):
        pairs += zip(a.parameters(), b.parameters(), strict=True)
    return pairs


@pytest.mark.parametrize(("name", "kind", "beta"), [("vae", "VAE", 1.0), ("beta_vae", "BetaVAE", 4.0)])
def test_beta_vae_losses(compare, name, kind, beta):
    model = ours(name, beta=beta)
    other = theirs(kind, model, **({} if beta == 1 else {"beta": beta}))
    x, draw = torch.rand(7, *SHAPE), torch.randn(7, LATENT)
    with noise([draw]):
        found = model.loss(x)
    with noise([draw]):
        expected = other({"data": x})
    with_reference = compare(name, "pythae", kind)
    with_reference.equal("loss", found["loss"], expected.loss)
    with_reference.equal("nll", found["nll"], expected.recon_loss)
    with_reference.equal("kl", found["kl"], expected.reg_loss / (beta if name == "vae" else 1))
    with_reference.equal_gradients(found["loss"], expected.loss, parameters(model, other))
