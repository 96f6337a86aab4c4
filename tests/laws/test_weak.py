"""Laws of the weakly supervised models: who is with whom, what a pair or a group has in common, ranks, and slips."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from scipy import stats
from scipy.integrate import quad
from torch import Tensor
from two_ranks import on_two_ranks

import aezoo
from aezoo.models.variational.ada_gvae import AVERAGES, AdaGVAE
from aezoo.models.variational.mlvae import MLVAE
from aezoo.models.variational.triplet_vae import TripletVAE
from aezoo.models.variational.vae import VAE
from aezoo.testing import SharedNoise

SHAPE, CODE = (2, 3, 3), 4
SHARING: list[Any] = [AdaGVAE, MLVAE]
WEAK = [*SHARING, TripletVAE]


def small(make: Any, **settings: Any) -> Any:
    settings |= {"group_dim": 2} if make is MLVAE and "group_dim" not in settings else {}
    return make(SHAPE, latent_dim=CODE, hidden_dims=(16,), **settings).double()


def images(n: int = 6) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64)


def posterior(n: int = 6) -> tuple[Tensor, Tensor]:
    mu = torch.randn(n, CODE, dtype=torch.float64) @ torch.randn(CODE, CODE, dtype=torch.float64) + 0.5
    return mu, torch.randn(n, CODE, dtype=torch.float64) - 1


def normal(mu: Tensor, log_var: Tensor) -> D.Normal:
    return D.Normal(mu, (0.5 * log_var).exp())


def terms_at(model: Any, mu: Tensor, log_var: Tensor, y: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    """The loss with posteriors of one's own choice, and the codes that the decoder saw, at noise 0."""
    model.posterior = lambda x: (mu, log_var)
    seen: list[Tensor] = []
    hook = model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", torch.zeros_like)
        terms = model.loss(images(len(mu)), y)
    hook.remove()
    return terms, seen[0]


def labels(*values: int) -> Tensor:
    return torch.tensor(values)


# ---- without labels --------------------------------------------------------------------------------------------------

ALONE: dict[str, Tensor | None] = {
    "none": None,
    "unknown": labels(-1, -1, -1, -1, -1, -1),
    "all different": labels(5, 3, 0, 2, 9, 1),
}


def twins(make: Any, shifted: Any, **settings: Any) -> tuple[Any, Any]:
    model, vae = small(make, **settings), shifted(small(VAE))
    model.load_state_dict(vae.state_dict())
    return model, vae


def losses(model: Any, vae: Any, y: Tensor | None, training: bool) -> list[dict[str, Tensor]]:
    found, x = [], images()
    for each, given in ((model, y), (vae, None)):
        torch.manual_seed(3)
        each.zero_grad()
        found.append(each.train(training).loss(x, given))
        found[-1]["loss"].backward()
    return found


def is_the_vae(model: Any, vae: Any, y: Tensor | None, training: bool) -> None:
    mine, theirs = losses(model, vae, y, training)
    for term in ("loss", "nll", "kl", "elbo"):
        torch.testing.assert_close(mine[term], theirs[term], rtol=1e-10, atol=1e-12)
    for p, q in zip(model.parameters(), vae.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("y", ALONE.values(), ids=list(ALONE))
@pytest.mark.parametrize("make", WEAK)
def test_samples_that_belong_to_no_other_make_a_vae(make: Any, y: Tensor | None, training: bool, shifted: Any) -> None:
    is_the_vae(*twins(make, shifted), y, training)


@pytest.mark.parametrize("average", AVERAGES)
def test_any_average_of_a_sample_with_itself_is_itself(average: str, shifted: Any) -> None:
    is_the_vae(*twins(AdaGVAE, shifted, average=average), ALONE["all different"], True)


@pytest.mark.parametrize("make", WEAK)
def test_with_labels_it_is_none(make: Any, shifted: Any) -> None:
    mine, theirs = losses(*twins(make, shifted), labels(0, 0, 1, 1, -1, -1), True)
    assert (mine["loss"] - theirs["loss"]).abs() > 1e-3


def test_without_a_content_the_groups_have_nothing_in_common(shifted: Any) -> None:
    is_the_vae(*twins(MLVAE, shifted, group_dim=0), labels(0, 0, 0, 1, 1, 1), True)


@pytest.mark.parametrize("make", WEAK)
def test_codes_scores_and_likelihoods_are_the_vae_s(make: Any, shifted: Any) -> None:
    x, found = images(), []
    for each in twins(make, shifted):
        torch.manual_seed(5)
        each.eval()
        found.append([each.encode(x), each(x), each.score(x), each.log_likelihood(x, 20), each.sample(3)])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


# ---- Ada-GVAE: Locatello et al. 2020 ---------------------------------------------------------------------------------


def test_a_pair_is_the_next_of_the_label_and_the_last_goes_with_the_first() -> None:
    y = labels(3, 7, 3, -1, 7, 3, -1, 4)
    assert small(AdaGVAE).partners(y).tolist() == [2, 4, 5, 3, 1, 0, 6, 7]
    # two of a label are one pair, seen from both sides
    assert small(AdaGVAE).partners(labels(1, 0, 0, 1)).tolist() == [3, 2, 1, 0]


def test_the_threshold_is_half_way_between_the_least_and_the_largest_distance() -> None:
    """KLs of 0.125, 2, 0.5 and 1.125 nats: half-way is 1.0625, beyond which lie the second and the last."""
    mu, mu2 = torch.tensor([[0.5, 2.0, 1.0, 1.5]]), torch.zeros(1, 4)
    zero = torch.zeros(1, 4)
    kl = D.kl_divergence(normal(mu, zero), normal(mu2, zero))
    torch.testing.assert_close(kl, torch.tensor([[0.125, 2.0, 0.5, 1.125]]))
    assert AdaGVAE.shared(mu, zero, mu2, zero).tolist() == [[True, False, True, False]]


def test_the_distance_is_the_mean_kl_of_both_directions_dimension_by_dimension() -> None:
    for _ in range(20):
        one, two = posterior(3), posterior(3)
        kl = 0.5 * (D.kl_divergence(normal(*one), normal(*two)) + D.kl_divergence(normal(*two), normal(*one)))
        tau = (kl.min(1, keepdim=True).values + kl.max(1, keepdim=True).values) / 2
        assert torch.equal(AdaGVAE.shared(*one, *two), kl < tau)


def authors_mask(mu: Tensor, log_var: Tensor, mu2: Tensor, log_var2: Tensor) -> Tensor:
    """What disentanglement_lib averages of a pair: its distance of the first from the second, in two equal bins."""
    v, v2 = log_var.exp(), log_var2.exp()
    distance = v / v2 + (mu2 - mu) ** 2 / v2 - 1 + log_var2 - log_var
    return distance < (distance.amin(1, keepdim=True) + distance.amax(1, keepdim=True)) / 2


def test_both_of_a_pair_have_the_same_dimensions_in_common() -> None:
    model, apart = small(AdaGVAE), 0
    for _ in range(50):
        one, two = posterior(3), posterior(3)
        assert torch.equal(model.shared(*one, *two), model.shared(*two, *one))
        apart += int((authors_mask(*one, *two) != authors_mask(*two, *one)).sum())
        # at equal variances the authors' code has an order no more
        like_one = two[0], one[1]
        assert torch.equal(model.shared(*one, *like_one), authors_mask(*one, *like_one))
        both = [torch.cat(parts) for parts in zip(one, two, strict=True)]
        moved = model.paired(*both, labels(0, 1, 2, 0, 1, 2))[0] != both[0]
        assert torch.equal(moved[:3], moved[3:]) and torch.equal(moved[:3], model.shared(*one, *two))
    assert apart > 0


@pytest.mark.parametrize("average", AVERAGES)
def test_an_identical_pair_shares_every_dimension(average: str) -> None:
    mu, log_var = (t[:1].expand(2, -1) for t in posterior())
    model = small(AdaGVAE, average=average)
    assert model.shared(mu, log_var, mu, log_var).all()
    for found, expected in zip(model.paired(mu, log_var, labels(4, 4)), (mu, log_var), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("average", AVERAGES)
def test_the_most_different_dimension_stays_and_the_least_different_is_averaged(average: str) -> None:
    mu, log_var = posterior(2)
    model = small(AdaGVAE, average=average)
    kl = D.kl_divergence(normal(mu, log_var), normal(mu.flip(0), log_var.flip(0)))
    kl = kl + kl.flip(0)
    new = model.paired(mu, log_var, labels(0, 0))
    for i in range(2):
        far, near = kl[i].argmax(), kl[i].argmin()
        assert new[0][i, far] == mu[i, far] and new[1][i, far] == log_var[i, far]
        expected = model.averaged(mu[i], log_var[i], mu[1 - i], log_var[1 - i])
        assert new[0][i, near] == expected[0][near] and new[1][i, near] == expected[1][near]
        assert abs(new[0][i, near] - mu[i, near]) > 1e-4


def test_gvae_averages_means_and_variances() -> None:
    one, two = posterior(), posterior()
    mu, log_var = small(AdaGVAE).averaged(*one, *two)
    torch.testing.assert_close(mu, (normal(*one).mean + normal(*two).mean) / 2)
    torch.testing.assert_close(log_var.exp(), (normal(*one).variance + normal(*two).variance) / 2)


def test_mlvae_takes_the_normalised_root_of_the_product_of_the_densities() -> None:
    one, two = posterior(1), posterior(1)
    mu, log_var = small(AdaGVAE, average="mlvae").averaged(*one, *two)
    for d in range(CODE):
        p, q = (stats.norm(m[0, d].item(), math.exp(v[0, d].item() / 2)).logpdf for m, v in (one, two))
        root = lambda z, p=p, q=q: np.exp(0.5 * (p(z) + q(z)))  # noqa: E731
        ends = (mu[0, d].item() - 40, mu[0, d].item() + 40)
        at = {"points": [mu[0, d].item()], "limit": 200}
        total = quad(root, *ends, **at)[0]
        mean = quad(lambda z, f=root: z * f(z), *ends, **at)[0] / total
        square = quad(lambda z, f=root, m=mean: (z - m) ** 2 * f(z), *ends, **at)[0] / total
        assert mu[0, d].item() == pytest.approx(mean, abs=1e-6)
        assert log_var[0, d].exp().item() == pytest.approx(square, rel=1e-5)


@pytest.mark.parametrize("average", AVERAGES)
def test_the_loss_is_that_of_the_averaged_posteriors(average: str) -> None:
    mu, log_var = posterior()
    y, model = labels(0, 1, 0, 0, 1, -1), small(AdaGVAE, average=average, beta=3.0)
    terms, z = terms_at(model, mu, log_var, y)
    new_mu, new_log_var = model.paired(mu, log_var, y)
    assert (new_mu - mu).abs().max() > 0.1
    torch.testing.assert_close(z, new_mu)
    prior = D.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    torch.testing.assert_close(terms["kl"], D.kl_divergence(normal(new_mu, new_log_var), prior).sum(1).mean())
    torch.testing.assert_close(terms["loss"], terms["nll"] + 3 * terms["kl"])


# ---- ML-VAE: Bouchacourt et al. 2018 ---------------------------------------------------------------------------------


def product_law(product: Any) -> None:
    """The log of the product density differs from the experts' sum by a constant: quadratic, no least squares."""
    mu, log_var = posterior(5)
    member = torch.tensor([[True, True, False, True, False]])
    found = normal(*product(mu, log_var, member))
    z = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None].expand(7, CODE)
    experts = sum(normal(mu[j], log_var[j]).log_prob(z) for j in (0, 1, 3))
    constant = experts - found.log_prob(z)
    torch.testing.assert_close(constant, constant[:1].expand_as(constant))


def test_the_content_is_the_normalised_product_of_its_group() -> None:
    model = small(MLVAE)
    product_law(model.product)
    two = torch.tensor([[1.0], [4.0]]), torch.log(torch.tensor([[1.0], [0.5]]))
    mean, log_var = model.product(*two, torch.ones(1, 2, dtype=torch.bool))
    assert mean.item() == pytest.approx((1 * 1 + 4 * 2) / 3)  # by precisions 1 and 2
    assert log_var.exp().item() == pytest.approx(1 / 3)


def test_an_average_of_precisions_is_not_their_product() -> None:
    def rooted(mu: Tensor, log_var: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
        mean, new = small(MLVAE).product(mu, log_var, member)
        return mean, new + member.sum(1, keepdim=True).log()

    with pytest.raises(AssertionError):
        product_law(rooted)


def test_a_group_is_all_of_a_label_and_an_unknown_label_is_none() -> None:
    found = small(MLVAE).members(labels(3, -1, 3, -1, 0))
    assert found.int().tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]


def test_the_content_s_kl_counts_once_for_a_group_and_the_style_s_for_each_sample() -> None:
    mu, log_var = posterior()
    groups, y = [[0, 2, 3], [1, 4], [5]], labels(0, 1, 0, 0, 1, -1)
    model = small(MLVAE, group_dim=3, beta=0.7)
    terms, z = terms_at(model, mu, log_var, y)
    total = torch.zeros((), dtype=torch.float64)
    p = D.Normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    for rows in groups:
        precision = (-log_var[rows, :3]).exp()
        variance = 1 / precision.sum(0)
        mean = (precision * mu[rows, :3]).sum(0) * variance
        torch.testing.assert_close(z[rows, :3], mean.expand(len(rows), 3))
        torch.testing.assert_close(z[rows, 3:], mu[rows, 3:])
        total = total + D.kl_divergence(D.Normal(mean, variance.sqrt()), p).sum()
        total = total + D.kl_divergence(normal(mu[rows, 3:], log_var[rows, 3:]), p).sum()
    torch.testing.assert_close(terms["kl"], total / 6)
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.7 * terms["kl"])
    torch.testing.assert_close(terms["elbo"], -(terms["nll"] + terms["kl"]))


def test_each_sample_of_a_group_draws_its_own_content() -> None:
    model, mu, log_var = small(MLVAE), *posterior()
    model.posterior = lambda x: (mu, log_var)
    seen: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.loss(images(), labels(0, 0, 0, 0, 0, 0))
    assert len(seen[0][:, 0].unique()) == 6


def test_certain_posteriors_of_a_large_group_stay_finite() -> None:
    mu, log_var = posterior()
    mu.requires_grad_()
    log_var = (log_var * 0 - 30).requires_grad_()
    for make in WEAK:
        model = small(make).float()
        model.posterior = lambda x: (mu.float(), log_var.float())
        terms = model.loss(images().float(), labels(0, 0, 0, 0, 0, 0))
        assert all(term.isfinite() for term in terms.values())
        for g in torch.autograd.grad(terms["loss"], (mu, log_var)):
            assert g.isfinite().all()


# ---- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", WEAK)
def test_two_ranks_are_one_also_where_a_group_lies_on_both(make: Any, shifted: Any) -> None:
    model, x, y = shifted(small(make)), images(), labels(0, 1, 0, 1, 1, 2)
    with SharedNoise(range(6), 6):
        whole = model.loss(x, y)
    together = on_two_ranks(model, x, y)
    for term in whole:
        torch.testing.assert_close(together.terms[term], whole[term])
    expected = torch.autograd.grad(whole["loss"], [*model.parameters()])
    for a, b in zip(together.gradients(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    for wrong in ({"exchange": False}, {"ranked": False}):
        assert (on_two_ranks(model, x, y, **wrong).terms["loss"] - whole["loss"]).abs() > 1e-4


@pytest.mark.parametrize("make", WEAK)
def test_the_order_of_the_batch_does_not_matter_to_groups_and_pairs(make: Any, shifted: Any) -> None:
    model, x, y = shifted(small(make)), images(), labels(0, 1, 0, 2, 1, -1)
    order = torch.tensor([4, 2, 5, 0, 3, 1])
    found = []
    for rows in (torch.arange(6), order):
        with SharedNoise(rows.tolist(), 6):
            found.append(model.loss(x[rows], y[rows])["loss"])
    torch.testing.assert_close(*found)


def shares_of_the_common_factor(model: Any, with_labels: bool) -> float:
    """Of data a u + b v, with a common to each pair: the least share of a dimension's variance that is within pairs."""
    torch.manual_seed(1)
    pair = torch.arange(256).repeat_interleave(2)
    a, b = torch.randn(256).repeat_interleave(2), torch.randn(512)
    u, v = torch.tensor([1.0, 0, 1, 0, 1, 0]), torch.tensor([0.0, 1, 1, 0, 1, 1])  # neither is a principal component
    x = a[:, None] * u + b[:, None] * v
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(300):
        rows = slice(128 * (step % 4), 128 * (step % 4) + 128)
        optimizer.zero_grad()
        model.loss(x[rows], pair[rows] if with_labels else None)["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        z = model.encode(x)
    within = (z[::2] - z[1::2]).square().mean(0) / 2
    return float((within / z.var(0)).min())


@pytest.mark.parametrize("make", SHARING)
def test_training_on_pairs_gives_what_they_have_in_common_a_dimension(make: Any) -> None:
    found = []
    for with_labels in (True, False):
        torch.manual_seed(0)
        model = make((6,), latent_dim=2, hidden_dims=(), likelihood="gaussian:0.3")
        found.append(shares_of_the_common_factor(model, with_labels))
    assert found[0] < 0.01 < 0.05 < found[1]


@pytest.mark.parametrize(
    ("make", "settings", "word"),
    [
        (AdaGVAE, {"average": "vae"}, "average"),
        (AdaGVAE, {"beta": -1.0}, "beta"),
        (MLVAE, {"group_dim": -1}, "group_dim"),
        (MLVAE, {"group_dim": CODE + 1}, "latent_dim = 4"),
    ],
)
def test_values_that_cannot_work_are_refused(make: Any, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word):
        small(make, **settings)
