"""Laws of the hierarchies: conditionals and their KLs, one draw of each level, free bits, exact posteriors, coding."""

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
from aezoo.models.variational.hierarchical_vae import HierarchicalVAE
from aezoo.models.variational.ladder_vae import product as product_of
from aezoo.nets.blocks.levels import Level
from aezoo.tasks.compress import compress
from aezoo.tasks.decompress import decompress

SHAPE = (2, 3, 3)
Pair = tuple[Tensor, Tensor]


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
    """q(z_l | x, z_{l+1}) of the top-down VAE: a net that sees h_l and the level above."""
    return normal(*model.posteriors[level](h[level], above))


def product(model: Any, h: list[Tensor], level: int, above: Tensor, p: D.Normal) -> D.Normal:
    """q(z_l | x, z_{l+1}) of the ladder, proportional to N(z_l; estimate) N(z_l; prior): completing the square."""
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
    """What a call gives, and the code that the decoder sees in it."""
    seen: list[Tensor] = []
    handle = model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = call()
    handle.remove()
    return found, seen[0]


# ---- the bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONDITIONALS)
def test_one_level_is_the_vae(name: str, shifted: Any) -> None:
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


def test_the_kl_of_a_level_is_that_of_two_gaussians() -> None:
    mu, log_var, m, log_s2 = (torch.randn(4, 6, 5).double().requires_grad_() for _ in range(4))
    found = Level(mu, mu, mu, log_var, m, log_s2).kl()
    expected = D.kl_divergence(normal(mu, log_var), normal(m, log_s2)).sum(-1)
    torch.testing.assert_close(found, expected)
    weights = torch.rand(4, 6).double()
    variables = (mu, log_var, m, log_s2)
    for a, b in zip(
        torch.autograd.grad((weights * found).sum(), variables),
        torch.autograd.grad((weights * expected).sum(), variables),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    # also where a variance of float32 would overflow
    far = torch.full((1, 1), 20.0)
    assert Level(far, far, far, far, -far, -far).kl().isfinite()


def bound_law(model: Any, q_of: Any) -> None:
    """Loss, terms and all gradients are those of the ELBO by torch.distributions, at the same noise."""
    x = data()
    torch.manual_seed(1)
    found = model.loss(x)
    torch.manual_seed(1)
    z: list[Tensor] = []
    for d in reversed(model.latent_dims):
        # of the levels drawn so far; those below are put in as zeros and not looked at
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
    """The draw of a level that the decoder sees is the one that the levels below are conditioned on."""
    x = data()
    terms, z = decoded(model, lambda: model.loss(x))
    kl = divergences(model, x, [*z.split(model.latent_dims, 1)], q_of).mean(0)
    for i, value in enumerate(kl):
        torch.testing.assert_close(terms[f"kl_{i + 1}"], value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(terms["kl"], kl.sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("law", [bound_law, draw_law], ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", CONDITIONALS)
def test_the_hierarchy_keeps_the_law(name: str, law: Any, shifted: Any) -> None:
    law(small(name, shifted, beta=2.0), CONDITIONALS[name])


class DrawsTheTopTwice(HierarchicalVAE):
    """The posterior below is conditioned on one draw of the top, the decoder sees another (`autoencoders` 0.6.8)."""

    def top_down(self, h_L: list[Tensor], draw: bool) -> list[Level]:
        *low, top = super().top_down(h_L, draw)
        again = top.mu + torch.exp(0.5 * top.log_var) * torch.randn_like(top.mu)
        return [*low, top._replace(z=again)]


class BottomWithoutPrior(HierarchicalVAE):
    """p(z_1) = N(0, I): no hierarchy (`autoencoders` 0.6.8)."""

    def top_down(self, h_L: list[Tensor], draw: bool) -> list[Level]:
        bottom, *rest = super().top_down(h_L, draw)
        return [bottom._replace(m=0 * bottom.m, log_s2=0 * bottom.m), *rest]


class LosesTheTopsGradient(HierarchicalVAE):
    """The levels below see a constant."""

    def q_and_p(self, h_L: list[Tensor], above: list[Tensor]) -> Any:
        return super().q_and_p(h_L, [z.detach() for z in above])


@pytest.mark.parametrize(
    ("rival", "law"),
    [(DrawsTheTopTwice, draw_law), (BottomWithoutPrior, bound_law), (LosesTheTopsGradient, bound_law)],
    ids=lambda value: value.__name__,
)
def test_the_law_catches_a_rivals_slip(rival: Any, law: Any, shifted: Any) -> None:
    model = shifted(rival(SHAPE, latent_dims=(5, 4, 3), level_dim=11, hidden_dims=(16,))).double()
    with pytest.raises(AssertionError):
        law(model, concatenated)


@pytest.mark.parametrize("level", [0, 1])
def test_a_level_whose_posterior_is_its_prior_costs_nothing(level: int, shifted: Any) -> None:
    model = small("hierarchical_vae", shifted)
    p, q = model.priors[level], model.posteriors[level]
    with torch.no_grad():
        q.load_state_dict(
            p.state_dict()
            | {"0.weight": torch.nn.functional.pad(p[0].weight, (q[0].in_features - p[0].in_features, 0))}
        )
    terms = model.loss(data())
    assert terms[f"kl_{level + 1}"].abs() < 1e-12
    assert all(terms[f"kl_{i}"] > 0.01 for i in (1, 2, 3) if i != level + 1)
    with torch.no_grad():
        q[2].bias += 0.1
    assert model.loss(data())[f"kl_{level + 1}"] > 1e-3


# ---- the ladder: Sonderby et al. 2016 --------------------------------------------------------------------------------


def test_the_ladder_s_merge_is_the_product_of_two_gaussians() -> None:
    """N(z; a) N(z; b) / N(z; merged) is the same for all z: Bayes' rule with the estimate as the likelihood."""
    given = [*torch.randn(4, 4, 5).double()]
    for spread in (1.0, 6.0):
        mu, log_var, m, log_s2 = given[0], spread * given[1], given[2], spread * given[3]
        merged = normal(*product_of((mu, log_var), (m, log_s2)))
        z = torch.randn(50, 4, 5).double()
        estimate, prior = normal(mu, log_var), normal(m, log_s2)
        log_ratio = estimate.log_prob(z) + prior.log_prob(z) - merged.log_prob(z)
        # the evidence of the estimate, N(mu^; m, sigma^^2 + s^2)
        evidence = D.Normal(m, (estimate.variance + prior.variance).sqrt()).log_prob(estimate.loc)
        torch.testing.assert_close(log_ratio, evidence.expand(50, 4, 5))
    # without overflow: the one that knows nothing has no say
    for a, b, expected in ((20.0, -30.0, 2.0), (-30.0, 20.0, 1.0)):
        mu, log_var = product_of((torch.tensor(1.0), torch.tensor(a)), (torch.tensor(2.0), torch.tensor(b)))
        assert mu.item() == pytest.approx(expected, abs=1e-6)
        assert log_var.item() == pytest.approx(-30, abs=1e-5)


def test_the_ladder_goes_up_without_noise_and_x_depends_on_the_bottom_alone(shifted: Any) -> None:
    model, x = small("ladder_vae", shifted), data()
    for a, b in zip(model.bottom_up(x), model.bottom_up(x), strict=True):
        assert torch.equal(a, b)
    # each level's features are made from those of the level below
    h = model.bottom_up(x)
    for level, rung in enumerate(model.rungs, 1):
        reached = torch.autograd.grad([part.sum() for part in h], rung[1].weight, retain_graph=True, allow_unused=True)
        assert reached[0].any()
        lower = torch.autograd.grad(
            sum(part.sum() for part in h[:level]), rung[1].weight, retain_graph=True, allow_unused=True
        )
        assert lower[0] is None
        upper = torch.autograd.grad(h[-1].sum(), rung[1].weight, retain_graph=True)
        assert upper[0].any()
    z = torch.randn(3, 12, dtype=torch.float64)
    other = torch.cat([z[:, :5], torch.randn(3, 7, dtype=torch.float64)], 1)
    assert torch.equal(model.decode(z), model.decode(other))
    assert not torch.equal(model.decode(z), model.decode(z.flip(1)))


# ---- free bits: Kingma et al. 2016 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONDITIONALS)
def test_a_level_below_its_free_bits_costs_them_and_gets_no_pressure(name: str, shifted: Any) -> None:
    model, x = small(name, shifted, beta=2.0), data()
    torch.manual_seed(1)
    terms, z = decoded(model, lambda: model.loss(x))
    kl_BL = divergences(model, x, [*z.split(model.latent_dims, 1)], CONDITIONALS[name]).detach()
    kl = kl_BL.mean(0)
    # between the second and the third; and a level of whose samples some are below
    middle = float(kl.sort().values[1:].mean())
    mixed = float((kl_BL.amin(0) + kl_BL.amax(0))[0] / 2)
    for free in (0.0, middle, mixed, 1000.0):
        model.free_bits = free
        torch.manual_seed(1)
        found = model.loss(x)
        torch.testing.assert_close(found["loss"], found["nll"] + 2 * kl.clamp(min=free).sum())
        for term in ("nll", "kl", "elbo", "kl_1", "kl_2", "kl_3"):
            assert torch.equal(found[term], terms[term])
    assert not torch.isclose(kl_BL.clamp(min=mixed).mean(0), kl.clamp(min=mixed)).all()  # a maximum of each sample
    # pressure comes from the levels above theirs alone
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
def test_densities_and_draws_are_those_of_the_conditionals(name: str, shifted: Any) -> None:
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
def test_codes_and_scores_are_at_the_means_from_the_top_down(name: str, shifted: Any) -> None:
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


# ---- a linear hierarchy, whose evidence and posteriors are known -----------------------------------------------------


def set_linear(link: Any, matrix: Tensor, bias: Tensor) -> None:
    """Make a net of one hidden layer and no activation a linear map."""
    for p in link.parameters():
        p.zero_()
    n_in = matrix.shape[1]
    link[0].weight[:n_in] = torch.eye(n_in, link[0].in_features)
    link[2].weight[:, :n_in] = matrix
    link[2].bias.copy_(bias)


def linear_hierarchy(name: str) -> tuple[Any, D.MultivariateNormal]:
    """A model x = W1 z1 + W2 z2 + c + s e, z1 = A z2 + a + S e, whose q is the posterior, a diagonal one; and p(x)."""
    skip = name == "hierarchical_vae"  # the likelihood reads z2 too
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
            model.encoder[1].weight[:9] = torch.cat([first, gain])  # z1 as it shows in x, and that once more
            model.encoder[1].bias[:9] = torch.cat([low_bias, -gain @ c])
            set_linear(model.rungs[0][1:], torch.cat([top, 0 * top]), torch.cat([-top @ a, 0 * a[:2]]))
            model.rungs[0][3].bias[2:] = -precision.log()
    M = W1 @ A + W2
    covariance = M @ M.T + (W1 * S) @ W1.T + s2 * torch.eye(9).double()
    return model, D.MultivariateNormal(W1 @ a + c, covariance)


@pytest.mark.parametrize("name", CONDITIONALS)
def test_importance_weights_are_constant_under_the_true_posterior_of_two_levels(name: str) -> None:
    model, evidence = linear_hierarchy(name)
    x = evidence.sample((20,))
    for n in (1, 3, 50):
        torch.testing.assert_close(model.log_likelihood(x, n), evidence.log_prob(x), rtol=0, atol=1e-9)
    # the ELBO is tight there
    many = x.repeat(2000, 1)
    assert model.loss(many)["elbo"].item() == pytest.approx(evidence.log_prob(x).mean().item(), abs=0.05)
    draws = model.decoder(model.sample_prior(20_000)) + math.exp(-0.4) * torch.randn(20_000, 9).double()
    torch.testing.assert_close(draws.T.cov(), evidence.covariance_matrix, rtol=0, atol=0.25)
    torch.testing.assert_close(draws.mean(0), evidence.mean, rtol=0, atol=0.1)


@pytest.mark.parametrize("name", CONDITIONALS)
def test_elbo_importance_bounds_and_evidence_come_in_that_order(name: str) -> None:
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


@pytest.mark.parametrize("name", CONDITIONALS)
def test_binarised_digits_take_the_bits_of_the_bound_and_come_back_exactly(
    name: str, digits: Tensor, adam: Any, tmp_path: Path
) -> None:
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
    assert kl.mean(0)[1] > 0.5  # the upper level is in use, so that its order in the code matters
    assert found.net_bits == pytest.approx(bits, rel=0.02)
    assert found.bound_bits == pytest.approx(bits, rel=0.02)
    assert bits < 0.75 * test.numel()  # and the model has learned


# ---- what cannot work ------------------------------------------------------------------------------------------------


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
def test_values_that_cannot_work_are_refused(name: str, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word):
        aezoo.create_model(name, input_shape=(4,), **settings)


# ---- the very deep VAE: Child 2021 -----------------------------------------------------------------------------------

BLOCKS = {"width": 8, "latent_channels": 2, "enc_blocks": (1, 2), "dec_blocks": (2, 1)}


def deep(shifted: Any | None, shape: tuple[int, ...] = (1, 4, 6), **settings: Any) -> Any:
    model = aezoo.create_model("vdvae", input_shape=shape, **BLOCKS | settings)
    return (shifted(model) if shifted else model).double()


def images(n: int = 5, shape: tuple[int, ...] = (1, 4, 6)) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


def apply(net: Any, y: Tensor) -> Tensor:
    """A bottleneck, by its weights alone."""
    weights = list(net.parameters())
    for weight, bias in zip(weights[::2], weights[1::2], strict=True):
        y = torch.nn.functional.conv2d(torch.nn.functional.gelu(y), weight, bias, padding=weight.shape[-1] // 2)
    return y


def written_out(model: Any, x: Tensor, noise: list[Tensor]) -> tuple[Tensor, list[D.Normal], list[D.Normal], Tensor]:
    """The code, all q and p, and the decoder's output of two resolutions by torch.distributions, from the paper."""
    up, down = model.encoder, model.decoder
    y = torch.nn.functional.conv2d(x, up.first.weight, up.first.bias, padding=1)
    y = y + apply(up.stages[0][0], y)
    fine = y
    y = (y[..., ::2, ::2] + y[..., 1::2, ::2] + y[..., ::2, 1::2] + y[..., 1::2, 1::2]) / 4
    for net in up.stages[1]:
        y = y + apply(net, y)
    z, qs, ps = [], [], []
    y_of = {1: down.starts[1].expand_as(y)}
    for stage, a in ((1, y), (0, fine)):
        if stage == 0:
            y_of[0] = y_of[1].repeat_interleave(2, 2).repeat_interleave(2, 3) + down.starts[0]
        for block in down.stages[stage]:
            stream = y_of[stage]
            m, log_s, f = apply(block.p, stream).split([2, 2, 8], 1)
            mu, log_sigma = apply(block.q, torch.cat([stream, a], 1)).chunk(2, 1)
            qs.append(D.Normal(mu, log_sigma.exp()))
            ps.append(D.Normal(m, log_s.exp()))
            z.append(qs[-1].loc + qs[-1].scale * noise[len(z)])
            stream = stream + f + torch.nn.functional.conv2d(z[-1], block.of_z.weight, block.of_z.bias)
            y_of[stage] = stream + apply(block.net, stream)
    out = torch.nn.functional.conv2d(down.gain * y_of[0] + down.bias, down.last.weight, down.last.bias)
    return torch.cat([part.flatten(1) for part in z], 1), qs, ps, out


def noise_of(model: Any, n: int) -> list[Tensor]:
    """What the model draws from the generator as it stands: coarse block, then the two fine ones."""
    return [torch.randn(n, 2, *grid, dtype=torch.float64) for grid in ((2, 3), (4, 6), (4, 6))]


def test_the_very_deep_vae_computes_the_paper_s_bound_and_its_gradients(shifted: Any) -> None:
    model, x = deep(shifted), images()
    torch.manual_seed(2)
    found = model.loss(x)
    torch.manual_seed(2)
    _, q, p, out = written_out(model, x, noise_of(model, 5))
    fit = -D.Bernoulli(logits=out, validate_args=False).log_prob(x).flatten(1).sum(1).mean()
    kl_BN = torch.stack([D.kl_divergence(*pair).flatten(1).sum(1) for pair in zip(q, p, strict=True)], 1)
    kl = kl_BN.sum(1).mean()
    assert (kl_BN.mean(0) > 0.1).all()
    expected = {"loss": fit + kl, "nll": fit, "kl": kl, "elbo": -(fit + kl)}
    assert set(found) == set(expected)
    for term, value in expected.items():
        torch.testing.assert_close(found[term], value, rtol=1e-9, atol=1e-9)
    weights = [*model.parameters()]
    for a, b in zip(
        torch.autograd.grad(found["loss"], weights), torch.autograd.grad(expected["loss"], weights), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
        assert b.any()


def test_codes_scores_and_densities_of_the_very_deep_vae_are_those_of_its_groups(shifted: Any) -> None:
    model, x, n = deep(shifted).eval(), images(), 1500
    with torch.no_grad():
        code, q, p, out = written_out(model, x, [torch.zeros(()).double()] * 3)
        torch.testing.assert_close(model.encode(x), code)
        torch.testing.assert_close(model(x), out.sigmoid())
        torch.testing.assert_close(model.decode(code), out.sigmoid())
        kl = sum(D.kl_divergence(*pair).flatten(1).sum(1) for pair in zip(q, p, strict=True))
        fit = -D.Bernoulli(logits=out, validate_args=False).log_prob(x).flatten(1).sum(1)
        torch.testing.assert_close(model.score(x), fit + kl)
        log_std = torch.cat([d.scale.log().flatten(1) for d in q], 1)
        torch.testing.assert_close(model.posterior(x)[1], 2 * log_std)
        # draws, for one image many at a time
        torch.manual_seed(3)
        z_KBD, log_q_KB = model.sample_posterior(x[:1], n)
        torch.manual_seed(3)
        noise = noise_of(model, n)
        z, q, p, out = written_out(model, x[:1].expand(n, 1, 4, 6), noise)
        torch.testing.assert_close(z_KBD[:, 0], z)
        parts = [part.unflatten(1, d.loc.shape[1:]) for part, d in zip(z.split((12, 48, 48), 1), q, strict=True)]
        for found, ds in ((log_q_KB, q), (model.log_prior(z_KBD), p)):
            density = sum(d.log_prob(part).flatten(1).sum(1) for d, part in zip(ds, parts, strict=True))
            torch.testing.assert_close(found[:, 0], density)
        torch.testing.assert_close(model.decode(z_KBD[:, 0]), out.sigmoid())
        # what the codec is told of each group, given those before
        many, flat = x[:1].expand(n, 1, 4, 6), [part.flatten(1) for part in parts]
        for i, layer in enumerate(model.latent_chain().layers):
            for (mean, scale), d in ((layer.posterior(many, flat[:i]), q[i]), (layer.prior(flat[:i], n), p[i])):
                torch.testing.assert_close(mean, d.loc.flatten(1))
                torch.testing.assert_close(scale, d.scale.flatten(1))
        # draws from the prior, which are standard normal once its own means and scales are taken off
        drawn = model.sample_prior(n)
        levels = model.decoder.forward_levels(n, codes=[*drawn.split((12, 48, 48), 1)])[1]
        free = torch.cat([(level.z - level.m) * torch.exp(-0.5 * level.log_s2) for level in levels], 1)
        assert torch.equal(torch.cat([level.z for level in levels], 1), drawn)
        torch.testing.assert_close(free.mean(0), torch.zeros(108).double(), rtol=0, atol=5 / math.sqrt(n))
        torch.testing.assert_close(free.T.cov(), torch.eye(108).double(), rtol=0, atol=8 / math.sqrt(n))


def test_the_very_deep_vae_s_log_likelihood_is_the_importance_weighted_bound(shifted: Any) -> None:
    """In one pass as in the VAE's three, whatever the number of rows; and it rises from the ELBO."""
    model, x = deep(shifted), images()
    for n in (1, 7):
        torch.manual_seed(4)
        one = model.log_likelihood(x, n)
        torch.manual_seed(4)
        torch.testing.assert_close(one, aezoo.model_class("vae").log_likelihood(model, x, n))
        assert not one.requires_grad
    with torch.no_grad():
        elbo = torch.stack([model.loss(x)["elbo"] for _ in range(200)]).mean().item()
    bounds = [
        torch.stack([model.log_likelihood(x, n).mean() for _ in range(r)]).mean() for n, r in ((1, 300), (30, 20))
    ]
    assert bounds[0].item() == pytest.approx(elbo, abs=0.5)
    assert bounds[1] > bounds[0] + 1
    rows: list[int] = []
    model.decoder.last.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    wide = images(4, (1, 4, 6)).repeat(25, 1, 1, 1)
    model.width = 1024  # as it would be: 2^23 / (1024 * 24) rows fit
    model.log_likelihood(wide, 10)
    assert sum(rows) == 1000
    assert max(rows) == 300
    with pytest.raises(aezoo.AezooError, match="at least 1"):
        model.log_likelihood(x, 0)


def test_one_block_is_the_flat_vae_of_the_same_posterior(shifted: Any) -> None:
    """With a prior of N(0, I), as at the start, the bound is the VAE's formula."""
    model = deep(None, enc_blocks=(1,), dec_blocks=(1,))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith("decoder.stages.0.0.p."):
                p += 0.2 * torch.randn_like(p)
        model.decoder.starts[0].zero_()
    x = images()
    mu, log_var = model.posterior(x)
    terms = model.loss(x)
    torch.testing.assert_close(terms["kl"], model.kl(mu, log_var).mean())
    assert terms["kl"] > 1
    z = torch.randn(4, 48).double()
    torch.testing.assert_close(model.log_prior(z), aezoo.model_class("vae").log_prior(model, z))


def test_at_the_start_priors_are_standard_and_the_stream_is_scaled_by_the_depth() -> None:
    torch.manual_seed(0)
    model = aezoo.create_model("vdvae", input_shape=(3, 16, 16), width=32, enc_blocks=(3, 4, 2), dec_blocks=(7, 5, 4))
    x = torch.rand(4, 3, 16, 16)
    _, levels = model.infer(x)
    assert len(levels) == 16
    for level in levels:
        assert not level.m.any()
        assert not level.log_s2.any()
    # p_net adds nothing to the stream: with the ways of z and net shut the image's stream is that of the start
    with torch.no_grad():
        starts = [start.normal_() for start in model.decoder.starts]
        for name, p in model.decoder.named_parameters():
            if ".of_z." in name or name.endswith((".net.7.weight", ".net.7.bias")):
                p.zero_()
    seen: list[Tensor] = []
    model.decoder.last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.infer(x)
    up = torch.nn.functional.interpolate
    whole = starts[0] + up(starts[1][None] + up(starts[2][None], scale_factor=2), scale_factor=2)
    torch.testing.assert_close(seen[0], whole.expand(4, 32, 16, 16))
    # the usual bound of torch's convolutions is 1 / sqrt(fan in)
    fresh = aezoo.create_model("vdvae", input_shape=(3, 16, 16), width=32, enc_blocks=(3, 4, 2), dec_blocks=(7, 5, 4))
    for block in [block for stage in fresh.decoder.stages for block in stage]:
        for weight, bound in (
            (block.net[-1].weight, math.sqrt(1 / 16 / 8)), (block.of_z.weight, math.sqrt(1 / 16 / 4)),
            (block.q[-1].weight, math.sqrt(1 / 8)), (block.net[3].weight, math.sqrt(1 / 72)),
        ):  # fmt: skip
            assert 0.9 * bound < weight.abs().max() <= bound
        assert not block.p[-1].weight.any()
        assert block.p[1].weight.any()
    for net in [net for stage in fresh.encoder.stages for net in stage]:
        assert 0.9 * math.sqrt(1 / 9 / 8) < net[-1].weight.abs().max() <= math.sqrt(1 / 9 / 8)
    assert not any(p.any() for name, p in fresh.named_parameters() if name.endswith("bias"))


def test_blocks_have_the_published_shapes() -> None:
    """https://github.com/openai/vdvae, vae.py: class Block, DecBlock and Decoder with width 32, zdim 5."""
    model = aezoo.create_model(
        "vdvae", input_shape=(3, 8, 8), width=32, latent_channels=5, enc_blocks=(1, 1, 1, 1), dec_blocks=(1, 1, 1, 2)
    )
    assert model.code_shape == (5 * (1 + 1 + 4 + 16 + 64),)

    def shapes(net: Any) -> list[tuple[int, ...]]:
        return [tuple(p.shape) for name, p in net.named_parameters() if name.endswith("weight")]

    def bottleneck(n_in: int, n_out: int, kernel: int) -> list[tuple[int, ...]]:
        return [(8, n_in, 1, 1), (8, 8, kernel, kernel), (8, 8, kernel, kernel), (n_out, 8, 1, 1)]

    for i, kernel in enumerate((3, 3, 1, 1)):  # 3x3 above 2x2
        assert shapes(model.encoder.stages[i]) == bottleneck(32, 32, kernel)
        for block in model.decoder.stages[i]:
            assert shapes(block.q) == bottleneck(64, 10, kernel)
            assert shapes(block.p) == bottleneck(32, 10 + 32, kernel)
            assert shapes(block.of_z) == [(32, 5, 1, 1)]
            assert shapes(block.net) == bottleneck(32, 32, kernel)
            for layer, kind in zip(block.net, [torch.nn.GELU, torch.nn.Conv2d] * 4, strict=True):
                assert isinstance(layer, kind)
    assert len(model.decoder.stages[3]) == 2
    assert [tuple(start.shape) for start in model.decoder.starts] == [(32, n, n) for n in (8, 4, 2, 1)]
    assert shapes(model.encoder.first) == [(32, 3, 3, 3)]
    assert shapes(model.decoder.last) == [(3, 32, 1, 1)]
    big = aezoo.create_model("vdvae", input_shape=(1, 70, 130), width=4)
    assert [tuple(start.shape) for start in big.decoder.starts] == [(4, 1, 1), (4, 1, 1), (4, 18, 33)]


@pytest.mark.parametrize(
    ("shape", "grids"),
    [
        ((1, 28, 28), [(28, 28), (14, 14), (7, 7)]),
        ((3, 32, 32), [(32, 32), (16, 16), (8, 8)]),
        ((1, 27, 35), [(27, 35), (14, 18), (7, 9)]),
        ((2, 5, 1), [(5, 1), (3, 1), (2, 1)]),
        ((1, 2, 1), [(2, 1), (1, 1), (1, 1)]),
    ],
)
def test_images_of_any_size_have_resolutions_by_halves(shape: tuple[int, ...], grids: list[tuple[int, int]]) -> None:
    model = aezoo.create_model("vdvae", input_shape=shape, width=4, latent_channels=1)
    x = torch.rand(2, *shape)
    assert [tuple(a.shape[2:]) for a in model.encoder(x)] == grids
    assert model.decoder.sizes == [
        math.prod(grid) for grid, n in zip(grids[::-1], (2, 1, 1), strict=True) for _ in range(n)
    ]
    # a pooled value is the mean of what there is, an unpooled one what it comes from
    with torch.no_grad():
        for stage in model.encoder.stages:
            for layer in (layer for net in stage for layer in net if hasattr(layer, "weight")):
                layer.weight.zero_()
    fine, coarse = model.encoder(x)[:2]
    for i, j in ((0, 0), (grids[1][0] - 1, grids[1][1] - 1)):
        torch.testing.assert_close(coarse[:, :, i, j], fine[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3)))
    assert model.sample(2).shape == model(x).shape == (2, *shape)


@pytest.mark.slow
def test_the_very_deep_vae_codes_images_in_the_bits_of_its_bound(digits: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = aezoo.create_model("vdvae", input_shape=(1, 8, 8), **BLOCKS).eval()
    x = (digits[:200] > 0.5).float()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        nats = [model.loss(x) for _ in range(50)]
    bits = [len(x) * float(terms[name]) / math.log(2) for name in ("loss", "kl") for terms in nats]
    found = compress(model, x, mode="lossless", compare=False, out=str(tmp_path))
    assert np.array_equal(decompress(model, str(tmp_path / "samples.aez")).x, (255 * x).byte().numpy())
    assert found.net_bits == pytest.approx(np.mean(bits[:50]), rel=0.03)
    assert np.mean(bits[50:]) > 0.05 * np.mean(bits[:50])  # the latent variables count


@pytest.mark.parametrize(
    ("shape", "settings", "word"),
    [
        ((30,), {}, "images"),
        ((3, 128), {}, "images"),
        ((1, 12, 12, 12), {}, "images"),
        ((1, 8, 8), {"enc_blocks": ()}, "enc_blocks"),
        ((1, 8, 8), {"enc_blocks": (1, 1)}, "the same for both"),
        ((1, 8, 8), {"dec_blocks": (1, 0, 1)}, "at least 1"),
        ((1, 8, 8), {"width": 0}, "width"),
        ((1, 8, 8), {"latent_channels": 0}, "latent_channels"),
    ],
)
def test_what_no_very_deep_vae_can_be_is_refused(shape: tuple[int, ...], settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word):
        aezoo.create_model("vdvae", input_shape=shape, **settings)
