"""Laws of MINE-VAE: the bound in closed form and by hand, gradients of both networks, the moving average."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributions as D
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from torch import Tensor, nn
from torch.utils.data import DataLoader
from two_ranks import on_two_ranks

import aezoo
from aezoo.testing import SharedNoise

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

SHAPE, CODE = (2, 3, 3), 5


every_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def small(name: str = "mine_vae", **settings: Any) -> Any:
    dims = {"discriminator_dims": (12, 8)} if name == "mine_vae" else {}
    settings = {"input_shape": SHAPE, "latent_dim": CODE, "hidden_dims": (16,), **dims, **settings}
    return aezoo.create_model(name, **settings).double()


def images(n: int = 6, seed: int = 7) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def players(model: Any) -> dict[str, list[nn.Parameter]]:
    statistics = [*model.discriminator.parameters()]
    return {"vae": [p for p in model.parameters() if all(p is not q for q in statistics)], "statistics": statistics}


def gradients(value: Tensor, of: list[nn.Parameter]) -> list[Tensor]:
    found = torch.autograd.grad(value, of, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(of, found, strict=True)]


def assert_gradients_close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert sum(float(g.square().sum()) for g in expected) > 1e-6
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


def by_hand(model: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ELBO's loss, and T of every sample with its own code and with the next one's, pair by pair."""
    mu, log_var = model.posterior(x)
    q = D.Normal(mu, (0.5 * log_var).exp())
    z = mu + q.scale * torch.randn_like(mu)
    kl = D.kl_divergence(q, D.Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(1).mean()
    own = [model.discriminator(torch.cat([x[i].flatten(), z[i]])) for i in range(len(x))]
    other = [model.discriminator(torch.cat([x[i].flatten(), z[(i + 1) % len(x)]])) for i in range(len(x))]
    return model.nll(model.decoder(z), x).mean() + model.beta * kl, torch.cat(own), torch.cat(other)


# ---- which loss trains which network ---------------------------------------------------------------------------------


@every_mode
def test_zero_weight_equals_beta_vae(training: bool, shifted: Any) -> None:
    vae, model, x, found = shifted(small("beta_vae", beta=3.0)), small(beta=3.0, mi_weight=0.0), images(), []
    model.load_state_dict(model.state_dict() | vae.state_dict())
    for each in (model, vae):
        torch.manual_seed(3)
        found.append(each.train(training).loss(x))
        found[-1]["loss"].backward()
    for term, value in found[1].items():
        torch.testing.assert_close(found[0][term], value, rtol=1e-12, atol=1e-12)
    for p, q in zip(players(model)["vae"], vae.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    # T is trained nevertheless
    assert max(float(p.grad.abs().max()) for p in players(model)["statistics"]) > 1e-4


def test_zero_weight_trains_like_beta_vae(shifted: Any, quiet: Any) -> None:
    start, found = shifted(small("beta_vae", beta=3.0)), {}
    for weight in (None, 0.0, 2.0):
        model = small("beta_vae", beta=3.0) if weight is None else small(beta=3.0, mi_weight=weight)
        model.load_state_dict(model.state_dict() | start.state_dict())
        torch.manual_seed(11)
        quiet(max_epochs=1).fit(model, DataLoader([images(6, seed) for seed in range(6)], batch_size=None))
        found[weight] = model.state_dict()
    for name, p in found[None].items():
        torch.testing.assert_close(found[0.0][name], p, rtol=1e-9, atol=1e-12)
    assert max((found[2.0][name] - p).abs().max() for name, p in found[None].items()) > 1e-4


def test_inference_equals_vae(shifted: Any) -> None:
    vae, model, x, found = shifted(small("vae")), small(), images(), []
    model.load_state_dict(model.state_dict() | vae.state_dict())
    for each in (model.eval(), vae.eval()):
        torch.manual_seed(5)
        found.append([each.encode(x), each(x), each.score(x), each.log_likelihood(x, 20), each.sample(3)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_parameter_groups_match_networks() -> None:
    model = small(likelihood="gaussian:learned", discriminator_lr=3e-3)
    vae, statistics = model.configure_optimizers().param_groups
    for group, player in ((vae, "vae"), (statistics, "statistics")):
        assert {id(p) for p in group["params"]} == {id(p) for p in players(model)[player]}
    assert (vae["lr"], statistics["lr"]) == (1e-3, 3e-3)
    assert vae["betas"] == statistics["betas"] == (0.9, 0.999)


@every_mode
@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_each_network_gets_gradient_of_its_own_loss(weight: float, training: bool, shifted: Any) -> None:
    """T maximises the bound with weight 1, the encoder with mi_weight; it has no gradient for the decoder."""
    model, x = shifted(small(mi_weight=weight, decay=0.0, beta=2.0)).train(training), images()
    torch.manual_seed(3)
    terms = model.loss(x)
    torch.manual_seed(3)
    elbo_loss, own, other = by_hand(model, x)
    mi = own.mean() - (torch.logsumexp(other, 0) - math.log(len(x)))
    assert mi.abs() > 1e-3
    torch.testing.assert_close(terms["mi"], mi)
    torch.testing.assert_close(terms["loss"], elbo_loss - weight * mi)
    sets = players(model)
    assert_gradients_close(gradients(terms["loss"], sets["vae"]), gradients(elbo_loss - weight * mi, sets["vae"]))
    assert_gradients_close(gradients(terms["loss"], sets["statistics"]), gradients(-mi, sets["statistics"]))
    decoder = [*model.decoder.parameters()]
    assert_gradients_close(gradients(terms["loss"], decoder), gradients(terms["nll"], decoder))
    for term in ("nll", "kl", "elbo"):
        assert not any(g.any() for g in gradients(terms[term], sets["statistics"])), term
    assert not terms["mi"].requires_grad


# ---- the moving average ----------------------------------------------------------------------------------------------


def test_gradient_is_divided_by_the_moving_average(shifted: Any) -> None:
    """Three steps, with M in plain numbers and the gradient as a sum over pairs with constant weights."""
    model, average = shifted(small(decay=0.6, mi_weight=0.7)), 1.0
    for seed in range(3):
        x = images(6, seed)
        torch.manual_seed(seed)
        terms = model.loss(x)
        torch.manual_seed(seed)
        elbo_loss, own, other = by_hand(model, x)
        mean = sum(math.exp(t) for t in other.tolist()) / 6
        average = 0.6 * average + 0.4 * mean
        assert model.log_average.item() == pytest.approx(math.log(average))
        assert abs(average - mean) > 0.05
        torch.testing.assert_close(terms["mi"], own.mean() - math.log(mean))
        weights = [math.exp(t) / average / 6 for t in other.tolist()]
        climbed = own.mean() - sum(weight * t for weight, t in zip(weights, other, strict=True))
        sets = players(model)
        assert_gradients_close(gradients(terms["loss"], sets["statistics"]), gradients(-climbed, sets["statistics"]))
        assert_gradients_close(gradients(terms["loss"], sets["vae"]), gradients(elbo_loss - 0.7 * climbed, sets["vae"]))


@pytest.mark.slow
def test_moving_average_reduces_gradient_bias() -> None:
    """For batches of two and T(x, z) = z, where the mean of ratios over batches differs from the ratio of means."""
    model: Any = small(input_shape=(1,), latent_dim=1, hidden_dims=(), discriminator_dims=(), decay=0.99)
    with torch.no_grad():
        for p in model.discriminator.parameters():
            p.zero_()
        model.discriminator[0].weight[0, 1] = 1.0  # T(x, z) = z
    x, generator = torch.zeros(2, 1).double(), torch.Generator().manual_seed(0)
    found: dict[float, list[float]] = {0.99: [], 0.0: []}
    # z is 0 or 2: E[exp(z) z] / E[exp z] = 2 e^2 / (1 + e^2)
    for step in range(1500):
        z = 2 * torch.randint(2, (2, 1), generator=generator).double()
        for decay, slopes in found.items():
            model.decay = decay
            mi = model.mutual_information(x, z)
            (slope,) = torch.autograd.grad(mi, model.discriminator[0].weight)
            if step >= 300 or decay == 0:
                slopes.append(z.mean().item() - slope[0, 1].item())
    exact = 2 * math.exp(2) / (1 + math.exp(2))
    assert sum(found[0.99]) / len(found[0.99]) == pytest.approx(exact, abs=0.08)
    assert sum(found[0.0]) / len(found[0.0]) < exact - 0.3


def test_evaluation_does_not_update_moving_average(shifted: Any) -> None:
    model = shifted(small())
    model.loss(images())
    before = model.log_average.clone()
    assert before != 0
    model.eval().loss(images(seed=8))
    assert torch.equal(model.log_average, before)
    assert torch.equal(model.state_dict()["log_average"], before)


@every_mode
@pytest.mark.parametrize("t", [-2000.0, 2000.0])
def test_extreme_statistics_stay_finite(t: float, training: bool) -> None:
    """exp(2000) overflows, and exp(-2000) is 0; the average contains 1 % of this batch, so weights sum to 100."""
    model, x = small().train(training), images()
    with torch.no_grad():
        model.discriminator[-1].bias.fill_(t)
        model.discriminator[-1].weight.mul_(100)
    terms = model.loss(x)
    assert all(value.isfinite() for value in terms.values())
    found = gradients(terms["loss"], [*model.parameters()])
    assert all(g.isfinite().all() for g in found)
    # by a constant added to T, which does not change the bound once the average contains it
    slope = gradients(terms["loss"], [model.discriminator[-1].bias])[0].item()
    total = (1 / 0.01 if t > 0 else 0.0) if training else 1.0
    assert slope == pytest.approx(total - 1, abs=1e-6)


# ---- the bound -------------------------------------------------------------------------------------------------------


class LogRatio(nn.Module):
    """The log of p(x, z) / (p(x) p(z)) for correlated standard normal pairs, times a factor plus a constant."""

    def __init__(self, rho: float, factor: float = 1.0, constant: float = 0.0) -> None:
        super().__init__()
        self.rho, self.factor, self.constant = rho, factor, constant

    def forward(self, pairs: Tensor) -> Tensor:
        covariance = torch.tensor([[1.0, self.rho], [self.rho, 1.0]], dtype=torch.float64)
        joint = D.MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance)
        ratio = joint.log_prob(pairs) - D.Normal(0.0, 1.0).log_prob(pairs).sum(1)
        return self.factor * ratio[:, None] + self.constant


def correlated_pairs(rho: float, discriminator: nn.Module, **settings: Any) -> Any:
    """Codes z ~ N(rho x, 1 - rho^2), which for x ~ N(0, 1) are standard normal."""
    model = small(input_shape=(1,), latent_dim=1, hidden_dims=(), likelihood="gaussian", **settings)
    model.posterior = lambda x: (rho * x, torch.full_like(x, math.log(1 - rho**2)))
    model.discriminator = discriminator
    return model.eval()


@pytest.mark.parametrize("constant", [0.0, 3.0, -40.0])
@pytest.mark.parametrize("rho", [0.0, 0.5, -0.8])
def test_optimal_statistics_give_gaussian_information(rho: float, constant: float) -> None:
    """-1/2 log(1 - rho^2), for T plus any constant."""
    x = torch.randn(200_000, 1, dtype=torch.float64)
    exact = -0.5 * math.log(1 - rho**2)
    assert correlated_pairs(rho, LogRatio(rho, constant=constant)).loss(x)["mi"].item() == pytest.approx(
        exact, abs=0.01
    )


@pytest.mark.parametrize("factor", [-0.3, 0.0, 0.5, 0.9, 1.1])
def test_suboptimal_statistics_give_lower_bound(factor: float) -> None:
    """E[exp(a t)] is an integral of Gaussians, so the bound has a closed form for each factor a."""
    rho, x = 0.5, torch.randn(200_000, 1, dtype=torch.float64)
    # a t = -a/2 log(1 - rho^2) - v' Q v / 2, whose mean under N(0, I) of exp is a determinant
    covariance = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)
    excess = factor * (torch.linalg.inv(covariance) - torch.eye(2))
    log_mean = -0.5 * factor * math.log(1 - rho**2) - 0.5 * torch.logdet(torch.eye(2) + excess).item()
    information = -0.5 * math.log(1 - rho**2)
    bound = factor * information - log_mean
    assert bound < information - 1e-3
    assert correlated_pairs(rho, LogRatio(rho, factor)).loss(x)["mi"].item() == pytest.approx(bound, abs=0.01)


def test_mi_weight_equal_to_beta_cancels_information_cost() -> None:
    """KL = I + KL(q(z) || p(z)), where q(z) is the prior here."""
    x = torch.randn(200_000, 1, dtype=torch.float64)
    terms = correlated_pairs(0.8, LogRatio(0.8), beta=1.5, mi_weight=1.5).loss(x)
    assert terms["kl"].item() == pytest.approx(-0.5 * math.log(1 - 0.8**2), abs=0.01)
    assert terms["loss"].item() == pytest.approx(terms["nll"].item(), abs=0.03)


def test_shuffled_pairs_exclude_own_sample() -> None:
    model, seen = small().eval(), []
    model.discriminator.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x_BX, z_BD = torch.rand(6, 18, dtype=torch.float64), torch.rand(6, CODE, dtype=torch.float64)
    model.mutual_information(x_BX, z_BD)
    (pairs,) = seen
    samples, codes = pairs.split([18, CODE], dim=1)
    assert torch.equal(samples, torch.cat([x_BX, x_BX]))
    assert torch.equal(codes[:6], z_BD)
    whose = [z_BD.tolist().index(row) for row in codes[6:].tolist()]
    assert sorted(whose) == [*range(6)]
    assert all(i != j for i, j in enumerate(whose))


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_trained_network_estimates_mutual_information(rho: float) -> None:
    """T is trained with the model's own loss and evaluated on new pairs."""
    model: Any = aezoo.create_model(
        "mine_vae", input_shape=(1,), latent_dim=1, hidden_dims=(), discriminator_dims=(32, 32), likelihood="gaussian"
    )
    model.posterior = lambda x: (rho * x, torch.full_like(x, math.log(1 - rho**2)))
    adam = torch.optim.Adam(model.discriminator.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, 400)
    for _ in range(400):
        adam.zero_grad()
        model.loss(torch.randn(512, 1))["loss"].backward()
        adam.step()
        schedule.step()
    with torch.no_grad():
        found = model.eval().loss(torch.randn(50_000, 1))["mi"].item()
    assert found == pytest.approx(-0.5 * math.log(1 - rho**2), abs=0.03)


# ---- several ranks ---------------------------------------------------------------------------------------------------


def test_two_ranks_equal_one_process(shifted: Any) -> None:
    model, x = shifted(small(mi_weight=0.7, decay=0.6)), images()
    with torch.no_grad():
        model.discriminator[-1].weight.mul_(10)
    start = copy.deepcopy(model)
    with SharedNoise(range(6), 6):
        whole = model.loss(x)
    together = on_two_ranks(start, x)
    for term, value in whole.items():
        torch.testing.assert_close(together.terms[term], value, msg=term)
    expected = torch.autograd.grad(whole["loss"], [*model.parameters()])
    for found, g in zip(together.gradients(), expected, strict=True):
        torch.testing.assert_close(found, g)
    for own in together.copies:
        torch.testing.assert_close(own.log_average, model.log_average)
    alone = on_two_ranks(start, x, exchange=False)
    assert (alone.terms["mi"] - whole["mi"]).abs() > 1e-4
    assert not torch.equal(alone.copies[0].log_average, alone.copies[1].log_average)
