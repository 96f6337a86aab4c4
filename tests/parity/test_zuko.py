"""Transforms of zuko (Rozet et al. 2022) with the outputs of our networks.

Source: https://github.com/probabilists/zuko
"""

import copy
from typing import Any

import pytest
import torch
import zuko
from comparison import noise
from torch import Tensor
from torch.nn import functional as F

import aezoo

SHAPE, LATENT, BATCH = (6,), 4, 5


def autoregressive(layer: Any) -> zuko.transforms.Transform:
    def element_wise(z: Tensor) -> zuko.transforms.Transform:
        shift, scale = layer.net(z).chunk(2, -1)
        return zuko.transforms.DependentTransform(zuko.transforms.MonotonicAffineTransform(shift, scale), 1)

    return zuko.transforms.AutoregressiveTransform(element_wise, passes=LATENT)


def coupling(layer: Any) -> zuko.transforms.Transform:
    fixed = ~layer.moves_D

    def element_wise(kept: Tensor) -> zuko.transforms.Transform:
        # the network reads only the fixed elements, so the others may have any value
        z = kept.new_full((*kept.shape[:-1], LATENT), torch.pi)
        z[..., fixed] = kept
        shift, scale = (part[..., ~fixed] for part in layer.net(z).chunk(2, -1))
        return zuko.transforms.DependentTransform(zuko.transforms.MonotonicAffineTransform(shift, scale), 1)

    return zuko.transforms.CouplingTransform(element_wise, mask=fixed)


@pytest.mark.parametrize(("prior", "transform"), [("maf", autoregressive), ("realnvp", coupling)])
def test_flow_as_prior(compare, prior, transform):
    settings = {"latent_dim": LATENT, "hidden_dims": (7,), "flow_width": 8, "n_flows": 3, "beta": 0.7}
    model = aezoo.create_model("flow_prior_vae", SHAPE, prior=prior, **settings).double()
    with torch.no_grad():
        for parameter in model.flow.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    other = copy.deepcopy(model)
    base = zuko.distributions.DiagNormal(torch.zeros(LATENT), torch.ones(LATENT))
    flow = zuko.transforms.ComposedTransform(*(transform(layer) for layer in other.flow))
    theirs = zuko.distributions.NormalizingFlow(flow, base)
    x, eps = torch.rand(BATCH, *SHAPE).bernoulli(), torch.randn(BATCH, LATENT)
    with noise([eps]):
        found = model.loss(x)
    mean, log_var = other.encoder(x).chunk(2, 1)
    q = zuko.distributions.DiagNormal(mean, torch.exp(0.5 * log_var))
    z = mean + torch.exp(0.5 * log_var) * eps
    nll = F.binary_cross_entropy_with_logits(other.decoder(z), x, reduction="none").sum(1)
    # ours has the KL to N(0, I) in closed form, plus the change by the flow at the draw
    kl = torch.distributions.kl_divergence(q, base.expand((BATCH,))) + base.log_prob(z) - theirs.log_prob(z)
    expected = (nll + 0.7 * kl).mean()
    part = type(transform(other.flow[0])).__name__
    row = compare("flow_prior_vae", "zuko", f"transforms.{part}")
    row.equal("loss", found["loss"], expected)
    row.equal("kl", found["kl"], kl.mean())
    row.equal_gradients(found["loss"], expected, zip(model.parameters(), other.parameters(), strict=True))
    row.equal("log-density of the prior", model.log_prior(z), theirs.log_prob(z))
    with noise([eps]):
        codes = model.sample_prior(BATCH)
    row.equal("draws from the prior", codes, flow.inv(eps))
