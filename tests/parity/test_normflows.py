"""Planar and radial flows of normflows (Stimper et al. 2023), with parameters for each sample.

Source: https://github.com/VincentStimper/normalizing-flows
"""

import copy
from typing import Any

import normflows
import pytest
import torch
from comparison import noise
from torch import Tensor, nn
from torch.nn import functional as F

import aezoo
from aezoo.nets.blocks.flows import above_minus_one

SHAPE, LATENT, BATCH, STEPS = (6,), 3, 4, 2


def set_parameters(flow: nn.Module, **values: Tensor) -> nn.Module:
    """Replace a flow's own parameters by tensors with gradients."""
    for name, value in values.items():
        delattr(flow, name)
        setattr(flow, name, value)
    return flow


def planar(parameters: Tensor) -> Any:
    u, w, b = parameters.split([LATENT, LATENT, 1])
    dot = w @ u
    # their u for our w u'; theirs computes log(1 + exp t) - 1 of its product with w
    target = torch.log(torch.expm1(1 + above_minus_one(dot)))
    u = u + (target - dot) * w / (w @ w)
    return set_parameters(normflows.flows.Planar((LATENT,)), u=u[None], w=w[None], b=b)


def radial(parameters: Tensor) -> Any:
    centre, a, b = parameters.split([LATENT, 1, 1])
    a = F.softplus(a) + 1e-3
    b = torch.log(torch.expm1(a + a * above_minus_one(b)))
    return set_parameters(normflows.flows.Radial((LATENT,)), z_0=centre[None], alpha=a, beta=b)


@pytest.mark.parametrize(("kind", "step"), [("planar", planar), ("radial", radial)])
def test_flow_as_posterior(compare, kind, step):
    settings = {"latent_dim": LATENT, "hidden_dims": (7,), "n_flows": STEPS, "beta": 0.7}
    model = aezoo.create_model("vae_flow", SHAPE, flow=kind, **settings).double()
    with torch.no_grad():
        model.encoder[-2].bias.add_(torch.randn_like(model.encoder[-2].bias))
    other, x, eps = copy.deepcopy(model), torch.rand(BATCH, *SHAPE).bernoulli(), torch.randn(BATCH, LATENT)
    with noise([eps]):
        found = model.loss(x)
    mean, log_var, steps = other.encoder(x).tensor_split((LATENT, 2 * LATENT), 1)
    q0 = torch.distributions.Independent(torch.distributions.Normal(mean, torch.exp(0.5 * log_var)), 1)
    base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros_like(mean), 1.0), 1)
    z0, moved, log_dets = mean + torch.exp(0.5 * log_var) * eps, [], []
    for z, parameters in zip(z0.split(1), steps, strict=True):
        total = torch.zeros(1)
        for of_step in parameters.chunk(STEPS):
            z, log_det = step(of_step)(z)
            total = total + log_det
        moved.append(z)
        log_dets.append(total)
    z, log_det = torch.cat(moved), torch.cat(log_dets)
    nll = F.binary_cross_entropy_with_logits(other.decoder(z), x, reduction="none").sum(1)
    kl = torch.distributions.kl_divergence(q0, base) + base.log_prob(z0) - base.log_prob(z) - log_det
    expected = (nll + 0.7 * kl).mean()
    row = compare("vae_flow", "normflows", f"flows.{kind.title()}")
    row.equal("loss", found["loss"], expected)
    row.equal("nll", found["nll"], nll.mean())
    row.equal("kl", found["kl"], kl.mean())
    row.equal_gradients(found["loss"], expected, zip(model.parameters(), other.parameters(), strict=True))
    ours = model.flow(z0, steps)
    row.equal("codes after the flow", ours[0], z)
    row.equal("log-determinant", ours[1], log_det)
