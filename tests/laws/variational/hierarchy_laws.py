"""Laws of the hierarchical VAEs: conditionals, KLs, one draw per level, free bits, exact posteriors, coding."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from torch import Tensor

import aezoo
from aezoo.tasks.compress import compress
from aezoo.tasks.decompress import decompress

SHAPE = (2, 3, 3)


def small(name: str, shifted: Any, **settings: Any) -> Any:
    """A small model away from its initial weights, in float64."""
    settings = {"latent_dims": (5, 4, 3), "level_dim": 11, "hidden_dims": (16,), "activation": "relu"} | settings
    return shifted(aezoo.create_model(name, input_shape=SHAPE, **settings)).double()


def data(n: int = 6) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64)


def normal(mu: Tensor, log_var: Tensor) -> D.Normal:
    return D.Normal(mu, torch.exp(0.5 * log_var))


def standard(like: Tensor) -> D.Normal:
    return D.Normal(torch.zeros_like(like), torch.ones_like(like))


def concatenated(model: Any, h: list[Tensor], level: int, above: Tensor, p: D.Normal) -> D.Normal:
    """q(z_l | x, z_{l+1}) of the hierarchical VAE, from a network of h_l and z_{l+1}."""
    return normal(*model.posteriors[level](h[level], above))


def product(model: Any, h: list[Tensor], level: int, above: Tensor, p: D.Normal) -> D.Normal:
    """q(z_l | x, z_{l+1}) of the ladder VAE: the normalised product of the encoder's Gaussian and p(z_l | z_{l+1})."""
    mu, log_var = h[level].chunk(2, 1)
    precision = torch.exp(-log_var) + p.scale**-2
    return D.Normal((mu * torch.exp(-log_var) + p.loc * p.scale**-2) / precision, precision.rsqrt())


CONDITIONALS: dict[str, Callable[..., D.Normal]] = {"hierarchical_vae": concatenated, "ladder_vae": product}


def conditionals(model: Any, x: Tensor, z: list[Tensor], q_of: Any) -> tuple[list[D.Normal], list[D.Normal]]:
    """All q(z_l | x, z_{l+1}) and p(z_l | z_{l+1}) at given codes, by torch.distributions, from the bottom up."""
    h = model.bottom_up(x)
    q, p = [normal(*h[-1].chunk(2, 1))], [standard(z[-1])]
    for level in reversed(range(len(z) - 1)):
        p.insert(0, normal(*model.priors[level](z[level + 1])))
        q.insert(0, q_of(model, h, level, z[level + 1], p[0]))
    return q, p


def divergences(model: Any, x: Tensor, z: list[Tensor], q_of: Any) -> Tensor:
    """KL_l of each sample, (B, L)."""
    pairs = zip(*conditionals(model, x, z, q_of), strict=True)
    return torch.stack([D.kl_divergence(q, p).sum(1) for q, p in pairs], 1)


def nll(model: Any, z: Tensor, x: Tensor) -> Tensor:
    return -D.Bernoulli(logits=model.decoder(z), validate_args=False).log_prob(x).flatten(1).sum(1)


def decoded(model: Any, call: Callable[[], Any]) -> tuple[Any, Tensor]:
    """The result of a call, and the decoder's input in it."""
    seen: list[Tensor] = []
    handle = model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = call()
    handle.remove()
    return found, seen[0]


# ---- the bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONDITIONALS)
def test_one_level_equals_vae(name: str, shifted: Any) -> None:
    model = small(name, shifted, latent_dims=(5,), beta=3.0)
    vae = aezoo.create_model("vae", input_shape=SHAPE, latent_dim=5, hidden_dims=(16,), beta=3.0).double()
    vae.load_state_dict(model.state_dict())
    x = data()
    for capacity in (0.0, 2.0, 60.0):
        model.capacity = vae.capacity = capacity
        torch.manual_seed(3)
        found = model.loss(x)
        torch.manual_seed(3)
        expected = vae.loss(x)
        assert set(found) == {*expected, "kl_1"}
        for term, value in expected.items():
            torch.testing.assert_close(found[term], value, rtol=1e-9, atol=1e-9)
    calls: tuple[Callable[[Any], Tensor], ...] = (
        lambda m: m.encode(x), lambda m: m.posterior(x)[1], lambda m: m(x), lambda m: m.score(x),
        lambda m: m.log_likelihood(x, 20), lambda m: m.sample(4), lambda m: m.log_prior(m.encode(x)),
    )  # fmt: skip
    for call in calls:
        found, expected = [(torch.manual_seed(5), call(m))[1] for m in (model, vae)]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def bound_law(model: Any, q_of: Any) -> None:
    """Loss, terms and all gradients are those of the ELBO by torch.distributions, at the same noise."""
    x = data()
    torch.manual_seed(1)
    found = model.loss(x)
    torch.manual_seed(1)
    z: list[Tensor] = []
    for d in reversed(model.latent_dims):
        # the levels below are not drawn yet; zeros replace them, which the conditionals of this level do not depend on
        low = [torch.zeros(len(x), size, dtype=x.dtype) for size in model.latent_dims[: -len(z) - 1]]
        q, _ = conditionals(model, x, [*low, torch.zeros(len(x), d, dtype=x.dtype), *z], q_of)
        here = q[len(low)]
        z.insert(0, here.loc + here.scale * torch.randn(len(x), d, dtype=x.dtype))
    kl = divergences(model, x, z, q_of).mean(0)
    fit = nll(model, torch.cat(z, 1), x).mean()
    expected = {"loss": fit + model.beta * kl.sum(), "nll": fit, "kl": kl.sum(), "elbo": -fit - kl.sum()}
    expected |= {f"kl_{i + 1}": value for i, value in enumerate(kl)}
    assert set(found) == set(expected)
    for term, value in expected.items():
        torch.testing.assert_close(found[term], value, rtol=1e-9, atol=1e-9)
    assert (kl > 0.01).all()
    weights = [*model.parameters()]
    for a, b in zip(
        torch.autograd.grad(found["loss"], weights), torch.autograd.grad(expected["loss"], weights), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
        assert b.any()


def draw_law(model: Any, q_of: Any) -> None:
    """The decoder and the levels below get the same draw of a level."""
    x = data()
    terms, z = decoded(model, lambda: model.loss(x))
    kl = divergences(model, x, [*z.split(model.latent_dims, 1)], q_of).mean(0)
    for i, value in enumerate(kl):
        torch.testing.assert_close(terms[f"kl_{i + 1}"], value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(terms["kl"], kl.sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("law", [bound_law, draw_law], ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", CONDITIONALS)
def test_hierarchy_satisfies_every_law(name: str, law: Any, shifted: Any) -> None:
    law(small(name, shifted, beta=2.0), CONDITIONALS[name])


# ---- free bits: Kingma et al. 2016 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONDITIONALS)
def test_free_bits_cost_a_constant_without_gradient(name: str, shifted: Any) -> None:
    model, x = small(name, shifted, beta=2.0), data()
    torch.manual_seed(1)
    terms, z = decoded(model, lambda: model.loss(x))
    kl_BL = divergences(model, x, [*z.split(model.latent_dims, 1)], CONDITIONALS[name]).detach()
    kl = kl_BL.mean(0)
    # between the second and the third KL in order, and between the KLs of samples at one level
    middle = float(kl.sort().values[1:].mean())
    mixed = float((kl_BL.amin(0) + kl_BL.amax(0))[0] / 2)
    for free in (0.0, middle, mixed, 1000.0):
        model.free_bits = free
        torch.manual_seed(1)
        found = model.loss(x)
        torch.testing.assert_close(found["loss"], found["nll"] + 2 * kl.clamp(min=free).sum())
        for term in ("nll", "kl", "elbo", "kl_1", "kl_2", "kl_3"):
            assert torch.equal(found[term], terms[term])
    assert not torch.isclose(kl_BL.clamp(min=mixed).mean(0), kl.clamp(min=mixed)).all()  # not a maximum for each sample
    # only levels whose KL exceeds free_bits have a gradient
    free = model.free_bits = middle
    weights = [*model.parameters()]
    torch.manual_seed(1)
    found = model.loss(x)
    counted = [found[f"kl_{i}"] for i in (1, 2, 3) if found[f"kl_{i}"] > free]
    assert 0 < len(counted) < 3
    penalty = 2 * torch.stack(counted).sum()
    for a, b in zip(
        torch.autograd.grad(found["loss"] - found["nll"], weights, retain_graph=True),
        torch.autograd.grad(penalty, weights, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-7, atol=1e-9)


# ---- densities and draws ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONDITIONALS)
def test_densities_and_samples_match_conditionals(name: str, shifted: Any) -> None:
    model, x, n = small(name, shifted), data(3), 4000
    with torch.no_grad():
        z_KBD, log_q_KB = model.sample_posterior(x, n)
        z = [*z_KBD.flatten(0, 1).split(model.latent_dims, 1)]
        q, p = conditionals(model, x.repeat(n, 1, 1, 1), z, CONDITIONALS[name])
        log_q, log_p = (sum(d.log_prob(part).sum(1) for d, part in zip(ds, z, strict=True)) for ds in (q, p))
        torch.testing.assert_close(log_q_KB.flatten(), log_q)
        torch.testing.assert_close(model.log_prior(z_KBD).flatten(), log_p)
        drawn = model.sample_prior(3 * n)
        assert drawn.shape == (3 * n, 12)
        parts = [*drawn.split(model.latent_dims, 1)]
        prior = conditionals(model, x[:1].expand(3 * n, *SHAPE), parts, CONDITIONALS[name])[1]
    for some, distributions in ((z, q), (parts, prior)):
        noise = torch.cat([(part - d.loc) / d.scale for part, d in zip(some, distributions, strict=True)], 1)
        torch.testing.assert_close(noise.mean(0), torch.zeros(12).double(), rtol=0, atol=5 / math.sqrt(3 * n))
        torch.testing.assert_close(noise.T.cov(), torch.eye(12).double(), rtol=0, atol=7 / math.sqrt(3 * n))


@pytest.mark.parametrize("name", CONDITIONALS)
def test_codes_and_scores_use_top_down_means(name: str, shifted: Any) -> None:
    model, x = small(name, shifted).eval(), data()
    code = model.encode(x)
    z = [*code.split(model.latent_dims, 1)]
    q, _ = conditionals(model, x, z, CONDITIONALS[name])
    for part, d, log_var in zip(z, q, model.posterior(x)[1].split(model.latent_dims, 1), strict=True):
        torch.testing.assert_close(part, d.loc)
        torch.testing.assert_close(log_var, 2 * d.scale.log())
    torch.testing.assert_close(
        model.score(x), nll(model, code, x) + divergences(model, x, z, CONDITIONALS[name]).sum(1)
    )
    torch.testing.assert_close(model(x), model.decoder(code).sigmoid())
    assert not model.score(x).requires_grad


# ---- a linear hierarchy with exact evidence and posteriors -----------------------------------------------------------


def set_linear(link: Any, matrix: Tensor, bias: Tensor) -> None:
    """Set a network with one hidden layer and the identity as activation to a linear map."""
    for p in link.parameters():
        p.zero_()
    n_in = matrix.shape[1]
    link[0].weight[:n_in] = torch.eye(n_in, link[0].in_features)
    link[2].weight[:, :n_in] = matrix
    link[2].bias.copy_(bias)


def linear_hierarchy(name: str) -> tuple[Any, D.MultivariateNormal]:
    """A model x = W1 z1 + W2 z2 + c + s e, z1 = A z2 + a + S^1/2 e with q at the exact diagonal posterior; and p(x)."""
    skip = name == "hierarchical_vae"  # the likelihood depends on z2 too
    model = aezoo.create_model(
        name, input_shape=(9,), latent_dims=(3, 2), level_dim=8, hidden_dims=(), activation="identity",
        likelihood="gaussian:learned",
    ).double()  # fmt: skip
    lengths, s2 = torch.tensor([0.6, 1.2, 2.0]).double(), math.exp(-0.8)
    S, a = torch.tensor([0.5, 0.9, 1.4]).double(), torch.tensor([0.3, -0.6, 0.8]).double()
    A, skipped = torch.zeros(3, 2).double(), torch.zeros(3, 2).double()
    A[0, 0], A[1, 1] = 1.1, -0.7
    if skip:
        skipped[0, 0], skipped[1, 1] = 0.4, 0.9
    W1 = torch.linalg.qr(torch.randn(9, 3).double())[0] * lengths
    W2, c = W1 @ skipped, torch.randn(9).double()
    gain = W1.T / (lengths**2)[:, None]  # u = gain (x - c) = z1 + skipped z2 + noise of variance r
    r, both = s2 / lengths**2, A + skipped
    precision = 1 + (both**2 / (S + r)[:, None]).sum(0)
    top = (both / (S + r)[:, None]).T / precision[:, None]
    low = 1 / (1 / S + 1 / r)
    with torch.no_grad():
        model.likelihood.log_scale.fill_(-0.4)
        set_linear(model.priors[0], torch.cat([A, 0 * A]), torch.cat([a, S.log()]))
        down = (model.decoder if skip else model.decoder.net)[-2]
        down.weight.copy_(torch.cat([W1, W2], 1) if skip else W1)
        if skip:
            of_x = (low / r)[:, None] * torch.eye(3).double()
            of_top = (low / S)[:, None] * A - (low / r)[:, None] * skipped
            matrix = torch.cat([of_x, torch.zeros(3, 3), of_top], 1)
            set_linear(model.posteriors[0], torch.cat([matrix, 0 * matrix]), torch.cat([low / S * a, low.log()]))
        down.bias.copy_(c)
        first, second = torch.cat([gain, 0 * gain]), torch.cat([top @ gain, 0 * top @ gain])
        low_bias = torch.cat([-gain @ c, 0 * r if skip else r.log()])
        top_bias = torch.cat([top @ (-gain @ c - a), -precision.log()])
        if skip:
            model.encoder[1].weight.copy_(torch.cat([first, second]))
            model.encoder[1].bias.copy_(torch.cat([low_bias, top_bias]))
        else:
            model.encoder[1].weight.zero_()
            model.encoder[1].bias.zero_()
            model.encoder[1].weight[:9] = torch.cat([first, gain])  # the Gaussian of z1, and its mean again for z2
            model.encoder[1].bias[:9] = torch.cat([low_bias, -gain @ c])
            set_linear(model.rungs[0][1:], torch.cat([top, 0 * top]), torch.cat([-top @ a, 0 * a[:2]]))
            model.rungs[0][3].bias[2:] = -precision.log()
    M = W1 @ A + W2
    covariance = M @ M.T + (W1 * S) @ W1.T + s2 * torch.eye(9).double()
    return model, D.MultivariateNormal(W1 @ a + c, covariance)


@pytest.mark.parametrize("name", CONDITIONALS)
def test_two_level_importance_weights_are_constant_at_posterior(name: str) -> None:
    model, evidence = linear_hierarchy(name)
    x = evidence.sample((20,))
    for n in (1, 3, 50):
        torch.testing.assert_close(model.log_likelihood(x, n), evidence.log_prob(x), rtol=0, atol=1e-9)
    # the ELBO is tight at the exact posterior
    many = x.repeat(2000, 1)
    assert model.loss(many)["elbo"].item() == pytest.approx(evidence.log_prob(x).mean().item(), abs=0.05)
    draws = model.decoder(model.sample_prior(20_000)) + math.exp(-0.4) * torch.randn(20_000, 9).double()
    torch.testing.assert_close(draws.T.cov(), evidence.covariance_matrix, rtol=0, atol=0.25)
    torch.testing.assert_close(draws.mean(0), evidence.mean, rtol=0, atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONDITIONALS)
def test_elbo_importance_bounds_and_evidence_are_ordered(name: str) -> None:
    model, evidence = linear_hierarchy(name)
    x = evidence.sample((30,))
    with torch.no_grad():
        model.encoder[1].bias += 0.3
        model.encoder[1].bias[-2:] -= 0.8
        elbo = torch.stack([model.loss(x)["elbo"] for _ in range(200)]).mean().item()
    bounds = [
        torch.stack([model.log_likelihood(x, n).mean() for _ in range(1000 // n)]).mean().item() for n in (1, 10, 500)
    ]
    top = evidence.log_prob(x).mean().item()
    assert bounds[0] == pytest.approx(elbo, abs=0.05)
    assert all(b - a > 0.02 for a, b in pairwise(bounds))
    assert top - 0.1 * (top - elbo) < bounds[-1] < top + 0.01
    assert top - elbo > 0.2


# ---- bits-back coding ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", CONDITIONALS)
def test_binarised_digits_compress_to_bound_losslessly(name: str, digits: Tensor, adam: Any, tmp_path: Path) -> None:
    x = (digits > 0.5).float()
    torch.manual_seed(0)
    settings = {"latent_dims": (8, 4), "level_dim": 32, "hidden_dims": (64,), "free_bits": 1.0}
    model: Any = aezoo.create_model(name, input_shape=(1, 8, 8), **settings)
    adam(model, x[:1437], steps=250, lr=5e-3, batch=128)
    model.eval()
    test = x[1437:]
    found = compress(model, test, mode="lossless", compare=False, out=str(tmp_path))
    back = decompress(model, str(tmp_path / "samples.aez"))
    assert np.array_equal(back.x, (255 * test).byte().numpy())
    nats = []
    with torch.no_grad():
        for _ in range(20):
            z_KBD, _ = model.sample_posterior(test, 1)
            z = [*z_KBD[0].split(model.latent_dims, 1)]
            kl = divergences(model, test, z, CONDITIONALS[name])
            nats.append(float(nll(model, z_KBD[0], test).sum() + kl.sum()))
    bits = np.mean(nats) / math.log(2)
    assert kl.mean(0)[1] > 0.5  # the upper level is used, so that the coding order matters
    assert found.net_bits == pytest.approx(bits, rel=0.02)
    assert found.bound_bits == pytest.approx(bits, rel=0.02)
    assert bits < 0.75 * test.numel()  # 1 bit per pixel without a model


# ---- invalid values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"latent_dims": ()}, "latent_dims"),
        ({"latent_dims": (3, 0)}, "latent_dims"),
        ({"level_dim": 0}, "level_dim"),
        ({"free_bits": -1.0}, "free_bits"),
    ],
)
@pytest.mark.parametrize("name", CONDITIONALS)
def test_invalid_values_are_refused(name: str, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word):
        aezoo.create_model(name, input_shape=(4,), **settings)
