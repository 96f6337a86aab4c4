"""Laws of the autoencoders with regularised codes: WAE-MMD, SWAE, CWAE, RAE, WAE-GAN and AAE."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from two_ranks import on_two_ranks

import aezoo
from aezoo.tasks.generate import generate
from aezoo.testing import SharedNoise

SHAPE, CODE = (1, 5, 4), 3


WITH_PRIOR = ("wae_mmd", "swae", "cw_ae", "wae_gan", "aae")


GANS = ("wae_gan", "aae")


def small(model: Any, **settings: Any) -> Any:
    name = model if isinstance(model, str) else ""
    dims = {"discriminator_dims": (12, 8)} if name in GANS else {}
    settings = {"input_shape": SHAPE, "latent_dim": CODE, "hidden_dims": (10,), **dims, **settings}
    made = aezoo.create_model(name, **settings) if name else model(**settings)
    return made.double()


def images(n: int = 6, seed: int = 7) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def codes(n: int, d: int = CODE) -> Tensor:
    """Codes from a distribution that is not the prior."""
    return (0.6 * torch.randn(n, d, dtype=torch.float64) + torch.linspace(-1, 1.5, d).double()).requires_grad_()


def normal(n: int, d: int = CODE) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64)


def same(found: Tensor, expected: Tensor, of: Tensor) -> None:
    torch.testing.assert_close(found, expected)
    a, b = (torch.autograd.grad(value, of, retain_graph=True)[0] for value in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def assert_law_fails(law: Callable[[Any], None], mistake: Any) -> None:
    with pytest.raises(AssertionError):
        law(mistake)


# ---- all models ------------------------------------------------------------------------------------------------------


NEUTRAL: dict[str, dict[str, Any]] = {
    "wae_mmd": {"mmd_weight": 0.0},
    "swae": {"sw_weight": 0.0},
    "cw_ae": {"cw_weight": 0.0},
    "rae": {"beta": 0.0, "regulariser_weight": 0.0},
    "wae_gan": {"adversarial_weight": 0.0},
    "aae": {"adversarial_weight": 0.0},
}


# the regularisation term of each loss
TERMS = {
    "wae_mmd": "mmd",
    "swae": "sw",
    "cw_ae": "log_cw",
    "rae": "code",
    "wae_gan": "adversarial",
    "aae": "adversarial",
}


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("name", NEUTRAL)
def test_zero_weight_equals_dense_autoencoder(name: str, likelihood: str, shifted: Any) -> None:
    plain, x = shifted(small("dense_ae", likelihood=likelihood)), images()
    model, whole = small(name, likelihood=likelihood, **NEUTRAL[name]), small(name, likelihood=likelihood)
    state = {key.replace("encoder.0.", "encoder."): value for key, value in plain.state_dict().items()}
    for each in (model, whole):
        each.load_state_dict(each.state_dict() | state)
    terms, others = model.loss(x), plain.loss(x)
    for found in (terms, others):
        found["loss"].backward()
    torch.testing.assert_close(terms["loss"], others["loss"], rtol=1e-12, atol=1e-12)
    named = dict(model.named_parameters())
    for key, p in plain.named_parameters():
        torch.testing.assert_close(named[key.replace("encoder.0.", "encoder.")].grad, p.grad, rtol=1e-9, atol=1e-12)
    for mine, theirs in ((model.encode(x), plain.encode(x)), (model(x), plain(x)), (model.score(x), plain.score(x))):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert whole.loss(x)["loss"] != others["loss"]


@pytest.mark.parametrize("name", NEUTRAL)
def test_default_likelihood_is_the_papers_squared_error(name: str, shifted: Any) -> None:
    model, x = shifted(small(name)), images()
    sse = (model(x) - x).square().flatten(1).sum(1).mean()
    torch.testing.assert_close(model.loss(x)["nll"], sse + 10 * math.log(math.pi))


@pytest.mark.parametrize("name", NEUTRAL)
def test_regularisation_term_trains_encoder(name: str, shifted: Any) -> None:
    model = shifted(small(name))
    found = torch.autograd.grad(model.loss(images())[TERMS[name]], [*model.encoder.parameters()])
    assert all(g.abs().max() > 1e-6 for g in found)


@pytest.mark.parametrize("name", WITH_PRIOR)
def test_samples_are_decoded_draws_from_a_standard_normal_prior(name: str) -> None:
    model = small(name, input_shape=(CODE,), hidden_dims=())
    with torch.no_grad():
        model.decoder[1].weight.copy_(torch.eye(CODE))
        model.decoder[1].bias.zero_()
    assert model.has_prior and not model.normal_prior
    drawn = model.sample(4000)
    assert all(stats.kstest(column, "norm").pvalue > 1e-3 for column in drawn.numpy().T)
    assert np.abs(np.corrcoef(drawn.numpy().T) - np.eye(CODE)).max() < 0.08


def terms_and_arguments(model: Any, method: str, x: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The loss terms, and the arguments of `method`: codes and draws from the prior."""
    seen: list[Tensor] = []
    whole = getattr(model, method)

    def watched(*given: Tensor) -> Tensor:
        seen.extend(given)
        result: Tensor = whole(*given)
        return result

    setattr(model, method, watched)
    terms = model.loss(x)
    setattr(model, method, whole)
    return terms, seen


@pytest.mark.parametrize(
    ("name", "method", "weight"), [("wae_mmd", "mmd", "mmd_weight"), ("swae", "sliced_wasserstein", "sw_weight")]
)
def test_decoded_codes_are_compared_with_prior_draws(name: str, method: str, weight: str, shifted: Any) -> None:
    model, x = shifted(small(name, **{weight: 3.0})), images(500)
    terms, (z, prior) = terms_and_arguments(model, method, x)
    torch.testing.assert_close(z, model.encode(x))
    assert prior.shape == z.shape and not prior.requires_grad
    assert all(stats.kstest(column, "norm").pvalue > 1e-3 for column in prior.numpy().T)
    torch.testing.assert_close(terms["loss"], terms["nll"] + 3 * terms[TERMS[name]])


COUPLED: list[tuple[str, dict[str, Any]]] = [
    ("wae_mmd", {}),
    ("wae_mmd", {"unbiased": False, "kernel": "rbf"}),
    ("swae", {"n_projections": 20}),
    ("cw_ae", {}),
    ("cw_ae", {"latent_dim": 21}),
]


@pytest.mark.parametrize(("name", "settings"), COUPLED)
def test_two_ranks_equal_one_process(name: str, settings: dict[str, Any], shifted: Any) -> None:
    model, x, term = shifted(small(name, **settings)), images(8), TERMS[name]

    def draw_other_directions(own: Any, rank: int) -> None:
        """Let each rank draw other directions; those of the first are those of a single process."""
        inner = getattr(own, "sliced_wasserstein", None)
        if inner is not None:
            own.sliced_wasserstein = lambda *given: (torch.randn(1 + 2 * rank), inner(*given))[1]

    single = copy.deepcopy(model)
    draw_other_directions(single, 0)
    with SharedNoise(range(8), 8):
        whole = single.loss(x)
    expected = torch.autograd.grad(whole["loss"], [*single.parameters()])
    together = on_two_ranks(model, x, prepare=draw_other_directions)
    for key, value in whole.items():
        torch.testing.assert_close(together.terms[key], value, msg=key)
    for found, g in zip(together.gradients(), expected, strict=True):
        torch.testing.assert_close(found, g)
    alone = on_two_ranks(model, x, exchange=False, prepare=draw_other_directions).terms
    assert (alone[term] - whole[term]).abs() > 1e-4


@pytest.mark.parametrize("name", ["wae_mmd", "swae", "cw_ae"])
def test_distances_are_not_rounded_under_autocast(name: str) -> None:
    model: Any = aezoo.create_model(name, SHAPE, latent_dim=CODE)
    z, p = 3 + 0.1 * torch.randn(2, 64, CODE)
    directions = torch.randn(50, CODE)
    method = {"wae_mmd": "mmd", "swae": "sliced_wasserstein", "cw_ae": "distance"}[name]
    found = []
    for dtype in (torch.float64, torch.float32):
        given = [each.to(dtype) for each in ((z,) if name == "cw_ae" else (z, p))]
        model.all_gather_batch = lambda values, dtype=dtype: directions.to(dtype) if len(values) == 50 else values
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            found.append(getattr(model, method)(*given).double())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


# ---- RAE: Ghosh et al. 2020 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "prior"), [("rae", "auto"), ("wae_gan", "gaussian"), ("cw_ae", "gmm")])
def test_fitted_priors_follow_the_codes(name: str, prior: str, digits: Tensor) -> None:
    model, x = aezoo.create_model(name, (1, 8, 8), latent_dim=2).eval(), digits[:1000].float().numpy()
    model.decode = lambda z: (z @ torch.eye(2, 64)).unflatten(1, (1, 8, 8))  # type: ignore[method-assign]
    generated = generate(model, n=1000, prior=prior, fit_on=x, n_components=3).samples.reshape(1000, -1)[:, :2]
    found = model.encode(torch.from_numpy(x)).detach().numpy()
    assert np.abs(generated.mean(0) - found.mean(0)).max() < 0.2 * found.std(0).min()
    np.testing.assert_allclose(np.cov(generated.T), np.cov(found.T), atol=0.2 * np.cov(found.T).max())


# ---- WAE-GAN and AAE: Tolstikhin et al. 2018, Makhzani et al. 2015 ---------------------------------------------------


POSTERIORS = pytest.mark.parametrize("gaussian", [False, True], ids=["deterministic", "gaussian"])


def parts(model: Any) -> dict[str, list[nn.Parameter]]:
    discriminator = [*model.discriminator.parameters()]
    ids = {id(p) for p in discriminator}
    return {"autoencoder": [p for p in model.parameters() if id(p) not in ids], "discriminator": discriminator}


def player_losses(model: Any, x: Tensor) -> dict[str, Tensor]:
    """The loss of each player, and the adversarial term."""
    z = model.encoder(x)
    if model.gaussian_posterior:
        mu, log_var = z.chunk(2, 1)
        z = D.Normal(mu, torch.sqrt(log_var.exp())).mean + log_var.exp().sqrt() * torch.randn_like(mu)
    adversarial = -torch.log(torch.sigmoid(model.discriminator(z))).mean()
    t = model.discriminator(torch.cat([torch.randn_like(z), z.detach()]))[:, 0]
    labels = torch.cat([torch.ones(len(x)), torch.zeros(len(x))]).double()
    return {
        "autoencoder": model.nll(model.decoder(z), x).mean() + model.adversarial_weight * adversarial,
        "discriminator": 2 * F.binary_cross_entropy_with_logits(t, labels),
        "adversarial": adversarial,
    }


@POSTERIORS
@pytest.mark.parametrize("likelihood", ["gaussian", "gaussian:learned"])
@pytest.mark.parametrize("name", GANS)
def test_one_backward_gives_each_network_its_gradient(name: str, likelihood: str, gaussian: bool, shifted: Any) -> None:
    model = shifted(small(name, likelihood=likelihood, gaussian_posterior=gaussian, adversarial_weight=3.0))
    x, found = images(), []
    for loss in (model.loss, lambda x: player_losses(model, x)):
        torch.manual_seed(3)
        found.append(loss(x))
    terms, losses = found
    terms["loss"].backward()
    for player, part in parts(model).items():
        for p, g in zip(part, torch.autograd.grad(losses[player], part), strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-10)
            assert g.abs().max() > 1e-6
    torch.testing.assert_close(terms["loss"], losses["autoencoder"])
    for term in ("adversarial", "discriminator"):
        torch.testing.assert_close(terms[term], losses[term])


@POSTERIORS
@pytest.mark.parametrize("name", GANS)
def test_no_term_reaches_other_networks(name: str, gaussian: bool, shifted: Any) -> None:
    model = shifted(small(name, gaussian_posterior=gaussian))
    terms, sets = model.loss(images()), parts(model)
    owners = {"nll": "autoencoder", "adversarial": "autoencoder", "discriminator": "discriminator"}
    for term, owner in owners.items():
        for player, part in sets.items():
            g = torch.autograd.grad(terms[term], part, allow_unused=True, retain_graph=True)
            reached = any(each is not None and bool(each.any()) for each in g)
            assert reached == (player == owner), (term, player)
    leaky = F.softplus(model.discriminator(model.draw(images()))).mean()  # without the detach there would be one
    assert torch.autograd.grad(leaky, sets["autoencoder"][0])[0].any()


@pytest.mark.parametrize("name", GANS)
def test_each_player_has_a_parameter_group(name: str) -> None:
    model = small(name, lr=2e-3, discriminator_lr=7e-3, likelihood="gaussian:learned")
    first, second = model.configure_optimizers().param_groups
    assert {id(p) for p in second["params"]} == {id(p) for p in model.discriminator.parameters()}
    ids = [id(p) for group in (first, second) for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    # wae.py of https://github.com/tolstikhin/wae has these for both; the paper of the AAE has none
    assert (first["lr"], first["betas"]) == (2e-3, (0.5 if name == "wae_gan" else 0.9, 0.999))
    assert (second["lr"], second["betas"]) == (7e-3, (0.5, 0.999))
    groups = small(name, optimizer="adamw:beta2=0.9,beta1=0.7").configure_optimizers().param_groups
    assert [group["betas"] for group in groups] == [(0.7, 0.9)] * 2
