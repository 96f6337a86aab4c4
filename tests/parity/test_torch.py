"""Jacobians, divergences, covariances and densities of torch, compared with formulas of the models."""

import copy
import math
from typing import Any

import pytest
import torch
from comparison import noise
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Laplace, MixtureSameFamily, MultivariateNormal, kl_divergence
from torch.func import jacrev, vmap
from torch.nn import functional as F

import aezoo

D, CODE, BATCH = 6, 3, 7


def create(name: str, **settings: Any) -> tuple[Any, Any, list[tuple[Tensor, Tensor]]]:
    """Our model, a copy of it and the pairs of their parameters."""
    model = aezoo.create_model(name, (D,), latent_dim=CODE, **settings).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    other = copy.deepcopy(model)
    return model, other, [*zip(model.parameters(), other.parameters(), strict=True)]


def cross_entropy(logits: Tensor, x: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1).mean()


def squared_error(back: Tensor, x: Tensor) -> Tensor:
    """The negative log-density of N(back, 1/2)."""
    return (x - back).square().sum(1).mean() + D / 2 * math.log(math.pi)


@pytest.mark.parametrize("tied", [True, False])
def test_contraction(compare, tied):
    model, other, pairs = create("contractive_ae", contraction=2.0, tied=tied)
    x = torch.rand(BATCH, D)
    found = model.loss(x)
    jacobian = vmap(jacrev(lambda row: other.encoder(row[None])[0]))(x).square().sum((1, 2)).mean()
    expected = cross_entropy(other.decoder(other.encoder(x)), x) + 2 * jacobian
    row = compare("contractive_ae", "torch", "func.jacrev")
    row.equal("loss", found["loss"], expected)
    row.equal("jacobian", found["jacobian"], jacobian)
    row.equal_gradients(found["loss"], expected, pairs)


@pytest.mark.parametrize("distortion", ["isometric", "relaxed"])
def test_isometry(compare, distortion):
    settings = {"hidden_dims": (5,), "activation": "tanh", "isometry": 3.0, "distortion": distortion}
    model, other, pairs = create("isometric_ae", **settings)
    x, draws = torch.rand(BATCH, D), torch.randn(BATCH, 2, CODE)
    with noise([draws]):
        found = model.loss(x)
    u, v = F.normalize(draws, dim=2).unbind(1)
    z = other.encoder(x)
    of_decoder = vmap(jacrev(lambda row: other.decoder(row[None]).sigmoid()[0]))(z.detach())
    if distortion == "isometric":
        of_encoder = vmap(jacrev(lambda row: other.encoder(row[None])[0]))(x)
        iso = ((of_decoder @ u[..., None])[..., 0].norm(dim=1) - 1).square().mean()
        piso = ((v[:, None] @ of_encoder)[:, 0].norm(dim=1) - 1).square().mean()
    else:
        w = math.sqrt(CODE) * u
        metric = of_decoder.mT @ of_decoder
        once = torch.einsum("bi,bij,bj->b", w, metric, w).mean()
        iso, piso = torch.einsum("bi,bij,bj->b", w, metric @ metric, w).mean() / once**2, torch.zeros(())
    expected = cross_entropy(other.decoder(z), x) + 3 * (iso + piso)
    row = compare("isometric_ae", "torch", "func.jacrev")
    row.equal("loss", found["loss"], expected)
    row.equal("iso", found["iso"], iso)
    row.equal("piso", found["piso"], piso)
    row.equal_gradients(found["loss"], expected, pairs)


def test_target_activation(compare):
    model, other, pairs = create("sparse_ae_kl", rho=0.1, beta=3.0, l2=0.01)
    x = torch.rand(BATCH, D)
    found, h = model.loss(x), other.encoder(x).sigmoid()
    divergence = kl_divergence(Bernoulli(torch.tensor(0.1)), Bernoulli(h.mean(0))).sum()
    squares = sum(m.weight.square().sum() for m in other.modules() if isinstance(m, torch.nn.Linear))
    expected = cross_entropy(other.decoder(h), x) + 3 * divergence + 0.01 * squares
    row = compare("sparse_ae_kl", "torch", "distributions.kl_divergence")
    row.equal("loss", found["loss"], expected)
    row.equal("sparsity", found["sparsity"], divergence)
    row.equal_gradients(found["loss"], expected, pairs)


def test_laplace_prior(compare):
    model, other, pairs = create("sparse_ae_l1", l1=0.4)
    x = torch.rand(BATCH, D)
    found, h = model.loss(x), other.encoder(x).relu()
    prior = Laplace(0.0, 1 / 0.4)
    # relative to the density at 0
    penalty = (prior.log_prob(torch.zeros_like(h)) - prior.log_prob(h)).sum(1).mean()
    expected = cross_entropy(other.decoder(h), x) + penalty
    row = compare("sparse_ae_l1", "torch", "distributions.Laplace")
    row.equal("loss", found["loss"], expected)
    row.equal("l1", found["l1"], penalty / 0.4)
    row.equal_gradients(found["loss"], expected, pairs)


def test_memory(compare):
    settings = {"hidden_dims": (5,), "n_items": 8, "shrinkage": 1.0, "entropy_weight": 0.3}
    model, other, pairs = create("memory_ae", **settings)
    x = torch.rand(BATCH, D)
    found = model.loss(x)
    weights = F.cosine_similarity(other.encoder(x)[:, None], other.memory_ND[None], dim=2).softmax(1)
    # hard shrinkage, equations 6 and 7
    shrunk = F.threshold(weights, 1 / 8, 0.0)
    assert (shrunk.sum(1) > 0).all() and (shrunk == 0).any()
    address = shrunk / shrunk.sum(1, keepdim=True)
    entropy = Categorical(probs=address).entropy().mean()
    expected = cross_entropy(other.decoder(address @ other.memory_ND), x) + 0.3 * entropy
    row = compare("memory_ae", "torch", "nn.functional.cosine_similarity, threshold; distributions.Categorical")
    row.equal("loss", found["loss"], expected)
    row.equal("entropy", found["entropy"], entropy)
    row.equal_gradients(found["loss"], expected, pairs)


def test_mixture_of_codes_and_errors(compare):
    settings = {"hidden_dims": (5,), "n_components": 2, "dropout": 0.0, "energy_weight": 0.7, "covariance_weight": 0.1}
    model, other, pairs = create("dagmm", **settings)
    x = torch.rand(20, D)
    found, z_c = model.loss(x), other.encoder(x)
    back = other.decoder(z_c)
    distance = torch.linalg.vector_norm(x - back, dim=1) / torch.linalg.vector_norm(x, dim=1)
    z = torch.cat([z_c, distance[:, None], F.cosine_similarity(x, back, dim=1)[:, None]], 1)
    gamma = other.estimation(z).softmax(1)
    mu = (gamma.T @ z) / gamma.sum(0)[:, None]
    sigma = torch.stack([torch.cov(z.T, correction=0, aweights=weights) for weights in gamma.T])
    jittered = sigma + 1e-6 * torch.eye(CODE + 2)
    mixture = MixtureSameFamily(Categorical(probs=gamma.mean(0)), MultivariateNormal(mu, jittered))
    energy, inverse = -mixture.log_prob(z).mean(), (1 / jittered.diagonal(dim1=1, dim2=2)).sum()
    expected = squared_error(back, x) + 0.7 * energy + 0.1 * inverse
    row = compare("dagmm", "torch", "cov, distributions.MixtureSameFamily")
    row.equal("loss", found["loss"], expected)
    row.equal("energy", found["energy"], energy)
    row.equal("inverse_variances", found["inverse_variances"], inverse)
    row.equal_gradients(found["loss"], expected, pairs)


def test_code_units_with_noise(compare):
    model, other, pairs = create("semantic_hash_ae", hidden_dims=(5,), noise_std=2.0)
    x, eps = torch.rand(BATCH, D), torch.randn(BATCH, CODE)
    with noise([eps]):
        found = model.loss(x)
    expected = cross_entropy(other.decoder(torch.sigmoid(other.encoder(x) + 2 * eps)), x)
    row = compare("semantic_hash_ae", "torch", "nn.functional.binary_cross_entropy_with_logits")
    row.equal("loss", found["loss"], expected)
    row.equal_gradients(found["loss"], expected, pairs)
