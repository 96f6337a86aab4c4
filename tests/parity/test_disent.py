"""Losses of disent around copies of our networks (Michlo 2021).

Source: https://github.com/nmichlo/disent
"""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from comparison import noise
from disent.frameworks import vae as disent
from disent.model import AutoEncoder, DisentDecoder, DisentEncoder
from torch import Tensor

import aezoo

SHAPE, LATENT, BATCH = (1, 3, 2), 3, 6


class Encoder(DisentEncoder):
    """A copy of our encoder, which returns the mean and log-variance."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__(SHAPE, LATENT, z_multiplier=2)
        self.net = copy.deepcopy(net)

    def encode(self, x: Tensor) -> Tensor:
        return self.net(x)


class Decoder(DisentDecoder):
    """A copy of our decoder, which returns logits."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__(SHAPE, LATENT)
        self.net = copy.deepcopy(net)

    def decode(self, z: Tensor) -> Tensor:
        return self.net(z)


def created(name: str, kind: str, ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[Any, Any, list[Any]]:
    """Both models, whose losses are sums over values, and pairs of their parameters."""
    model = aezoo.create_model(name, SHAPE, latent_dim=LATENT, hidden_dims=(5,), **ours).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    framework = getattr(disent, kind)
    config = framework.cfg(recon_loss="bce", loss_reduction="mean_sum", **theirs)
    other = framework(AutoEncoder(Encoder(model.encoder), Decoder(model.decoder)), config).double()
    other.log_dict = lambda *_, **__: None
    pairs = [*zip(model.encoder.parameters(), other._model._encoder.parameters(), strict=True)]
    return model, other, [*pairs, *zip(model.decoder.parameters(), other._model._decoder.parameters(), strict=True)]


def both_losses(model: Any, other: Any, xs: tuple[Tensor, ...], y: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    """Our loss of all samples, and theirs of samples in as many tensors as it compares, from the same noise."""
    eps = [torch.randn(len(x), LATENT) for x in xs]
    # theirs draws noise for each tensor in turn
    with mock.patch("torch.distributions.normal._standard_normal", side_effect=eps):
        expected = other.do_training_step({"x_targ": xs}, 0)
    with noise([torch.cat(eps)]):
        found = model.loss(torch.cat(xs), y)
    return found, expected


FRAMEWORKS = [
    ("vae", "Vae", {}, {}),
    ("beta_vae", "BetaVae", {"beta": 3.0}, {"beta": 3.0}),
    ("dip_vae_i", "DipVae", {"off_diagonal": 2.0, "diagonal": 5.0}, {"dip_mode": "i", "beta": 1.0}),
]


@pytest.mark.parametrize(("name", "kind", "ours", "theirs"), FRAMEWORKS, ids=[row[0] for row in FRAMEWORKS])
def test_losses_of_single_samples(compare, name, kind, ours, theirs):
    if kind == "DipVae":
        theirs = theirs | {"lambda_od": 2.0, "lambda_d": 5.0}
    model, other, pairs = created(name, kind, ours, theirs)
    found, expected = both_losses(model, other, (torch.rand(BATCH, *SHAPE),), None)
    row = compare(name, "disent", kind)
    row.equal("loss", found["loss"], expected)
    row.equal_gradients(found["loss"], expected, pairs)


def test_loss_of_inferred_covariances(compare):
    settings = {"off_diagonal": 2.0, "diagonal": 5.0}
    weights = {"dip_mode": "ii", "beta": 1.0, "lambda_od": 2.0, "lambda_d": 5.0}
    model, other, _ = created("dip_vae_ii", "DipVae", settings, weights)
    found, expected = both_losses(model, other, (torch.rand(BATCH, *SHAPE),), None)
    row = compare("dip_vae_ii", "disent", "DipVae")
    reason = "theirs adds the mean of the diagonal of the table of variances to all covariances, not E[diag sigma^2]"
    row.deviates("loss", found["loss"], expected, reason, follows="ours")
    # the same covariance with the mean variances on its diagonal
    z = other._model.encode(torch.rand(BATCH, *SHAPE), chunk=True)
    q, _ = other.latents_handler.encoding_to_dists(z)
    covariance = other._dip_estimate_cov_matrix(q) - q.variance.diag().mean() + q.variance.mean(0).diag()
    row.equal("covariance, with E[diag sigma^2] in its place", model.covariance(*z), covariance)


@pytest.mark.parametrize("average", ["gvae", "mlvae"])
def test_losses_of_pairs(compare, average):
    mode = {"gvae": "gvae", "mlvae": "ml-vae"}[average]
    model, other, pairs = created(
        "ada_gvae", "AdaVae", {"average": average, "beta": 2.0}, {"ada_average_mode": mode, "beta": 2.0}
    )
    xs = torch.rand(BATCH, *SHAPE), torch.rand(BATCH, *SHAPE)
    labels = torch.arange(BATCH)
    found, expected = both_losses(model, other, xs, torch.cat([labels, labels]))
    row = compare("ada_gvae", "disent", "AdaVae, symmetric_kl")
    row.equal("loss", found["loss"], expected)
    row.equal_gradients(found["loss"], expected, pairs)
