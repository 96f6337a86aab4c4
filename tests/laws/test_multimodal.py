"""Laws of the multimodal VAEs: products and mixtures of experts, which parts a term or a code is of, exact evidence."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from scipy import stats
from scipy.integrate import quad
from torch import Tensor, nn

import aezoo
from aezoo import AezooError
from aezoo.bases.multimodal import partition
from aezoo.distributions import gaussians
from aezoo.models.variational.cmvae import CMVAE
from aezoo.models.variational.crmvae import CRMVAE
from aezoo.models.variational.dmvae import DMVAE
from aezoo.models.variational.jmvae import JMVAE
from aezoo.models.variational.jnf import JNF
from aezoo.models.variational.mmvae import MMVAE
from aezoo.models.variational.mmvae_plus import MMVAEPlus
from aezoo.models.variational.mopoe_vae import MoPoEVAE
from aezoo.models.variational.mvae import MVAE
from aezoo.models.variational.mvtcae import MVTCAE
from aezoo.models.variational.nexus import Nexus
from aezoo.models.variational.telbo import TELBO
from aezoo.models.variational.vae import VAE

SHAPE, PARTS, CODE = (6, 2, 3), (1, 2, 3), 4
MIXTURES: list[Any] = [MMVAE, MoPoEVAE]
ALL: list[Any] = [MVAE, *MIXTURES, JMVAE, MVTCAE, CRMVAE, TELBO]
EVERY: list[Any] = [*ALL, JNF, MMVAEPlus, DMVAE, CMVAE, Nexus]


def small(make: Any, shifted: Any, **settings: Any) -> Any:
    settings = {"parts": PARTS, "latent_dim": CODE, "hidden_dims": (8,), **settings}
    return shifted(make(SHAPE, **settings).double())


def images(n: int = 5) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64)


def experts(*batch: int) -> tuple[Tensor, Tensor]:
    """Means and log-variances away from 0."""
    mu = 2 * torch.randn(*batch, CODE, dtype=torch.float64) + 0.5
    return mu, torch.randn(*batch, CODE, dtype=torch.float64) - 0.5


def normal(mu: Tensor, log_var: Tensor) -> D.Independent:
    return D.Independent(D.Normal(mu, (0.5 * log_var).exp()), 1)


def mixture(mu_BSD: Tensor, log_var_BSD: Tensor) -> D.MixtureSameFamily:
    return D.MixtureSameFamily(D.Categorical(torch.ones_like(mu_BSD[..., 0])), normal(mu_BSD, log_var_BSD))


PRIOR = D.Independent(D.Normal(torch.zeros(CODE).double(), torch.ones(CODE).double()), 1)


def given_noise(patch: pytest.MonkeyPatch, eps: Tensor | None = None) -> None:
    """Have a loss draw this noise, or none."""
    patch.setattr(torch, "randn_like", lambda like: torch.zeros_like(like) if eps is None else eps)


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dim", "halves"),
    [
        ((10,), 0, (5, 5)),
        ((7,), 0, (4, 3)),
        ((1,), 0, (1,)),
        ((3, 8, 8), 0, (2, 1)),
        ((1, 28, 20), 1, (14, 14)),
        ((1, 1, 9), 2, (5, 4)),
        ((1, 1, 1, 1), 0, (1,)),
        ((2, 100), 0, (1, 1)),
    ],
)
def test_samples_are_cut_along_the_first_dimension_that_can_be_and_in_halves(shape: Any, dim: int, halves: Any) -> None:
    assert partition((), shape) == (dim, halves)
    x = torch.rand(2, *shape)
    for make in EVERY:
        model = make(shape, latent_dim=2, hidden_dims=())
        parts = model.split(x)
        assert [part.shape[dim + 1] for part in parts] == [*halves]
        assert torch.equal(torch.cat(parts, dim + 1), x)
        assert model.eval()(x).shape == x.shape


def test_upper_and_lower_half_of_an_image_and_channels_are_parts() -> None:
    x = torch.rand(2, 1, 4, 4)
    upper, lower = MVAE((1, 4, 4)).split(x)
    assert torch.equal(upper, x[:, :, :2]) and torch.equal(lower, x[:, :, 2:])
    x = torch.rand(2, 3, 4, 4)
    red, others = MVAE((3, 4, 4), parts=(1, 2)).split(x)
    assert torch.equal(red, x[:, :1]) and torch.equal(others, x[:, 1:])


@pytest.mark.parametrize("make", EVERY)
def test_sizes_that_do_not_add_up_are_refused(make: Any) -> None:
    for parts in ((3, 2), (6, 1), (7, -1), (6, 0)):
        with pytest.raises(AezooError, match="parts must be sizes of at least 1 that add up to 6, dimension 0"):
            make(SHAPE, parts=parts)


def test_the_subsets_of_a_mixture_are_bounded_and_those_of_mvae_are_not() -> None:
    MoPoEVAE((6,), parts=(1,) * 6)
    with pytest.raises(AezooError, match="at most 6, got 7: take mvae or mmvae"):
        MoPoEVAE((7,), parts=(1,) * 7)
    MVAE((40,), parts=(1,) * 40)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_each_part_is_decoded_to_its_own_place_from_its_own_network(make: Any, net: str, shifted: Any) -> None:
    model, z = small(make, shifted, net=net), torch.randn(3, CODE, dtype=torch.float64)
    expected = torch.empty(3, *SHAPE, dtype=torch.float64)
    expected[:, :1], expected[:, 1:3], expected[:, 3:] = (model.decoder[i](z) for i in range(3))
    assert torch.equal(model.decode(z), expected.sigmoid())


# ---- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_prior", [True, False])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_a_product_is_that_of_the_densities_by_integration(m: int, with_prior: bool) -> None:
    mu, log_var = experts(3, m)
    found_mu, found_log_var = (MVAE.product if with_prior else gaussians.product)(mu, log_var)
    for b, d in itertools.product(range(3), range(CODE)):
        means, deviations = mu[b, :, d].numpy(), (0.5 * log_var[b, :, d]).exp().numpy()

        def moment(n: int, about: float, means: Any = means, deviations: Any = deviations) -> float:
            def integrand(z: float) -> float:
                log_density = stats.norm.logpdf(z, means, deviations).sum()
                return float((z - about) ** n * np.exp(log_density + (stats.norm.logpdf(z) if with_prior else 0)))

            return float(quad(integrand, means.min(initial=0) - 9, means.max(initial=0) + 9, epsabs=0, limit=200)[0])

        total = moment(0, 0.0)
        mean = moment(1, 0.0) / total
        assert mean == pytest.approx(float(found_mu[b, d]), rel=1e-6)
        assert moment(2, mean) / total == pytest.approx(float(found_log_var[b, d].exp()), rel=1e-6)


@pytest.mark.parametrize("with_prior", [True, False])
def test_a_product_s_log_density_is_the_sum_of_its_members_but_for_a_constant(with_prior: bool) -> None:
    mu, log_var = experts(6, 4)
    member = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 1]]).bool()
    found = normal(*(MVAE.product if with_prior else gaussians.product)(mu, log_var, member))
    z = 3 * torch.randn(50, 6, CODE, dtype=torch.float64)
    summed = (normal(mu, log_var).log_prob(z[:, :, None]) * member).sum(2)
    if with_prior:
        summed = summed + PRIOR.log_prob(z)
    difference = found.log_prob(z) - summed
    torch.testing.assert_close(difference, difference[:1].expand_as(difference), rtol=1e-9, atol=1e-9)


def test_one_expert_and_the_prior() -> None:
    mu, log_var = experts(6, 1)
    found_mu, found_log_var = MVAE.product(mu, log_var)
    var = log_var[:, 0].exp()
    torch.testing.assert_close(found_log_var.exp(), var / (1 + var))
    torch.testing.assert_close(found_mu, mu[:, 0] / (1 + var))
    assert all(torch.equal(a, b[:, 0]) for a, b in zip(gaussians.product(mu, log_var), (mu, log_var), strict=True))


def test_experts_as_sure_as_the_prior_are_averaged_with_it() -> None:
    mu = torch.tensor([[[3.0], [9.0]]])
    found_mu, found_log_var = MVAE.product(mu, torch.zeros(1, 2, 1))
    assert found_mu.item() == pytest.approx(4.0) and found_log_var.exp().item() == pytest.approx(1 / 3)


def test_who_is_left_out_of_a_product_gets_no_gradient() -> None:
    mu, log_var = (values.requires_grad_() for values in experts(3, 3))
    member = torch.tensor([True, False, True])
    for values in gaussians.product(mu, log_var, member):
        values.square().sum().backward(retain_graph=True)
    for grad in (mu.grad, log_var.grad):
        assert grad is not None and (grad[:, 1] == 0).all() and (grad[:, [0, 2]] != 0).all()


# ---- one part --------------------------------------------------------------------------------------------------------


def both(make: Any, shifted: Any, **settings: Any) -> tuple[Any, Any]:
    """A model of one part and a VAE of the same weights."""
    vae = small_vae(shifted, **settings)
    model = small(make, shifted, parts=(6,), **settings)
    own = {name.replace("coder.", "coder.0.", 1): value for name, value in vae.state_dict().items()}
    model.load_state_dict(own)
    return model, vae


def small_vae(shifted: Any, **settings: Any) -> Any:
    return shifted(VAE(SHAPE, latent_dim=CODE, hidden_dims=(8,), **settings).double())


def is_the_vae(model: Any, vae: Any, training: bool, **close: float) -> None:
    found, x = [], images()
    for each in (model, vae):
        torch.manual_seed(3)
        found.append(each.train(training).loss(x))
        found[-1]["loss"].backward()
    for term in ("loss", "nll", "kl", "elbo"):
        torch.testing.assert_close(found[0][term], found[1][term], **close)
    for p, q in zip(model.parameters(), vae.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    for call in ("encode", "forward", "score"):
        torch.testing.assert_close(getattr(model.eval(), call)(x), getattr(vae.eval(), call)(x), **close)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("beta", [1.0, 3.0])
@pytest.mark.parametrize("make", MIXTURES)
def test_a_mixture_of_one_part_is_the_vae_to_the_last_bit(make: Any, beta: float, training: bool, shifted: Any) -> None:
    is_the_vae(*both(make, shifted, beta=beta), training, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_a_product_of_one_part_is_the_vae_whose_posterior_has_the_prior_in_it(
    beta: float, training: bool, shifted: Any
) -> None:
    model, vae = both(MVAE, shifted, beta=beta)
    plain = vae.posterior

    def with_prior(x: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_var = plain(x)
        precision = 1 + 1 / log_var.exp()
        return mu / log_var.exp() / precision, -precision.log()

    vae.posterior = with_prior
    is_the_vae(model, vae, training, rtol=1e-12, atol=1e-12)
    assert model.loss(images())["subset_nelbo"] == 0


# ---- MVAE: Wu & Goodman 2018 -----------------------------------------------------------------------------------------


def test_the_loss_is_the_sum_of_the_elbos_of_the_subsets(shifted: Any) -> None:
    """By loops over samples, subsets and their parts, with the densities of torch.distributions."""
    model, x = small(MVAE, shifted, n_subsets=2, beta=3.0), images()
    eps = torch.randn(5, 6, CODE, dtype=torch.float64)
    mu, log_var = model.experts(x)
    with pytest.MonkeyPatch.context() as patch:
        given_noise(patch, eps)
        torch.manual_seed(7)
        terms = model.loss(x)
    torch.manual_seed(7)
    member = model.subsets(model.present_mask(x))
    assert member.shape == (5, 6, 3) and member[:, 0].all() and (member[:, 1:4] == torch.eye(3)).all()
    nll, kl = torch.zeros(5, 6).double(), torch.zeros(5, 6).double()
    for b, s in itertools.product(range(5), range(6)):
        chosen = [i for i in range(3) if member[b, s, i]]
        precision = 1 + sum(1 / log_var[b, i].exp() for i in chosen)
        mean = sum(mu[b, i] / log_var[b, i].exp() for i in chosen) / precision
        q = D.Independent(D.Normal(mean, precision**-0.5), 1)
        kl[b, s] = D.kl_divergence(q, PRIOR)
        x_hat = model.decode((mean + precision**-0.5 * eps[b, s])[None])[0]
        log_p = D.Bernoulli(probs=x_hat, validate_args=False).log_prob(x[b]).split(PARTS)
        nll[b, s] = -sum(log_p[i].sum() for i in chosen)
    torch.testing.assert_close(terms["nll"], nll[:, 0].mean())
    torch.testing.assert_close(terms["kl"], kl[:, 0].mean())
    torch.testing.assert_close(terms["elbo"], -(nll + kl)[:, 0].mean())
    torch.testing.assert_close(terms["loss"], (nll + 3.0 * kl).sum(1).mean())
    torch.testing.assert_close(terms["subset_nelbo"], (nll + 3.0 * kl)[:, 1:].sum(1).mean())


def test_random_subsets_are_neither_one_part_nor_all_and_each_is_as_likely_as_another_of_its_size() -> None:
    model, n = MVAE((5,), parts=(1,) * 5, n_subsets=2, latent_dim=1, hidden_dims=()), 30_000
    drawn = model.subsets(torch.ones(n, 5, dtype=torch.bool))[:, 6:]
    assert drawn.shape == (n, 2, 5)
    for own in drawn.unbind(1):
        sizes = own.sum(1)
        assert sizes.unique().tolist() == [2, 3, 4]
        assert stats.chisquare(sizes.bincount()[2:].numpy()).pvalue > 1e-3
        for size in (2, 3, 4):
            numbers = (own[sizes == size] * 2 ** torch.arange(5)).sum(1).bincount()
            counts = numbers[numbers > 0].numpy()
            assert len(counts) == math.comb(5, size) and stats.chisquare(counts).pvalue > 1e-3
    assert (drawn[:, 0] != drawn[:, 1]).any()


def test_of_two_parts_there_are_no_random_subsets_and_of_more_none_unless_asked_for() -> None:
    of = torch.ones(2, 3, dtype=torch.bool)
    assert MVAE((4,), n_subsets=9).subsets(of[:1, :2]).tolist() == [[[True, True], [True, False], [False, True]]]
    assert MVAE((4,), parts=(1, 1, 2), n_subsets=0).subsets(of[:1]).shape == (1, 4, 3)
    assert MVAE((4,), parts=(4,)).subsets(of[:, :1]).tolist() == [[[True]]] * 2


@pytest.mark.parametrize("only", range(3))
def test_neither_expert_nor_decoder_of_a_part_that_is_left_out_gets_a_gradient(only: int, shifted: Any) -> None:
    model, x = small(MVAE, shifted), images()
    model.subsets = lambda seen: (torch.arange(3) == only).expand(len(seen), 5, 3)
    model.loss(x)["loss"].backward()
    for i in range(3):
        for net in (model.encoder[i], model.decoder[i]):
            assert all((p.grad.abs().max() > 0) == (i == only) for p in net.parameters())


# ---- mixtures: Shi et al. 2019, Sutter et al. 2021 -------------------------------------------------------------------


@pytest.mark.parametrize("make", MIXTURES)
def test_the_loss_is_the_mean_over_the_components_by_torch_distributions(make: Any, shifted: Any) -> None:
    model, x = small(make, shifted, beta=3.0), images()
    mu, log_var = model.components(x)
    eps = torch.randn_like(mu)
    with pytest.MonkeyPatch.context() as patch:
        given_noise(patch, eps)
        terms = model.loss(x)
    q, nll, kl = mixture(mu, log_var), [], []
    for s in range(mu.shape[1]):
        q_s = normal(mu[:, s], log_var[:, s])
        z = mu[:, s] + (0.5 * log_var[:, s]).exp() * eps[:, s]
        log_p = D.Bernoulli(probs=model.decode(z), validate_args=False).log_prob(x)
        nll.append(-log_p.flatten(1).sum(1))
        kl.append(D.kl_divergence(q_s, PRIOR) - q_s.log_prob(z) + q.log_prob(z))
    torch.testing.assert_close(terms["nll"], torch.stack(nll).mean())
    torch.testing.assert_close(terms["kl"], torch.stack(kl).mean())
    torch.testing.assert_close(terms["loss"], torch.stack(nll).mean() + 3.0 * torch.stack(kl).mean())


@pytest.mark.parametrize("make", MIXTURES)
@pytest.mark.parametrize("apart", [0.0, 1.0, 6.0])
def test_the_kl_is_the_mixture_s_by_integration_and_the_experts_mean_bounds_it(
    make: Any, apart: float, shifted: Any
) -> None:
    """Experts that agree, overlap, and are apart; all samples of a batch are the same, their mean is over draws."""
    n, sigma = 40_000, torch.tensor([0.5, 0.8, 0.4]).double()
    mu = apart * torch.tensor([-1.0, 0.2, 1.0]).double() + 0.3
    model = shifted(make((3,), parts=(1, 1, 1), latent_dim=1, hidden_dims=()).double())
    own = (mu[None, :, None].expand(n, -1, -1), 2 * sigma.log()[None, :, None].expand(n, -1, -1))
    model.experts = lambda x, parts=None: own
    _, kl_BS = model.bound(torch.rand(n, 3).double())
    mus, variances = (values[0, :, 0].detach().numpy() for values in model.components(torch.rand(n, 3).double()))
    scales = np.exp(0.5 * variances)

    def integrand(z: float) -> float:
        q = stats.norm(mus, scales).pdf(z).mean()
        return float(q * (np.log(q) - stats.norm.logpdf(z))) if q > 1e-300 else 0.0

    exact = quad(integrand, -20, 20, points=sorted({*mus.tolist()}), limit=400)[0]
    per_draw = kl_BS.mean(1)
    error = float(per_draw.std()) / math.sqrt(n)
    assert float(per_draw.mean()) == pytest.approx(exact, abs=5 * error + 1e-4)
    bound = float(np.mean(0.5 * (mus**2 + scales**2 - 1 - np.log(scales**2))))
    assert bound - math.log(len(mus)) - 1e-9 <= exact <= bound + 1e-9
    if make is MMVAE and apart == 6.0:
        assert exact == pytest.approx(bound - math.log(3), abs=1e-3)  # nothing overlaps


@pytest.mark.parametrize("make", MIXTURES)
def test_codes_are_the_mixture_s_mean_and_its_moments_are_known(make: Any, shifted: Any) -> None:
    model, x = small(make, shifted).eval(), images()
    q = mixture(*model.components(x))
    mean, log_var = model.posterior(x)
    torch.testing.assert_close(mean, q.mean)
    torch.testing.assert_close(log_var.exp(), q.variance)
    assert torch.equal(model.encode(x), mean)


@pytest.mark.parametrize("make", MIXTURES)
def test_draws_from_the_posterior_are_the_mixture_s_and_know_their_density(make: Any, shifted: Any) -> None:
    model, x = small(make, shifted), images(2)
    z, log_q = model.sample_posterior(x, 20_000)
    q = mixture(*model.components(x))
    assert z.shape == (20_000, 2, CODE)
    torch.testing.assert_close(log_q, q.log_prob(z))
    for b, d in itertools.product(range(2), range(CODE)):
        mu, log_var = (values[b, :, d].detach().numpy() for values in model.components(x))

        def cdf(values: Any, mu: Any = mu, log_var: Any = log_var) -> Any:
            return stats.norm(mu, np.exp(0.5 * log_var)).cdf(np.asarray(values)[:, None]).mean(1)

        assert stats.kstest(z[:, b, d].detach().numpy(), cdf).pvalue > 1e-4


def test_the_subsets_of_mopoe_are_all_but_the_empty_one_and_their_products_are_its_components(shifted: Any) -> None:
    model, x = small(MoPoEVAE, shifted), images()
    member = model.subsets(3, x.device)
    expected = {chosen for n in (1, 2, 3) for chosen in itertools.combinations(range(3), n)}
    assert {tuple(row.nonzero().flatten().tolist()) for row in member} == expected and len(member) == 7
    mu, log_var = model.experts(x)
    for s, row in enumerate(member):
        chosen = row.nonzero().flatten()
        precision = (1 / log_var[:, chosen].exp()).sum(1)
        found_mu, found_log_var = (values[:, s] for values in model.components(x))
        torch.testing.assert_close(found_log_var, -precision.log())
        torch.testing.assert_close(found_mu, (mu[:, chosen] / log_var[:, chosen].exp()).sum(1) / precision)


def test_mopoe_of_single_parts_alone_is_mmvae(shifted: Any) -> None:
    model, other, x = small(MoPoEVAE, shifted), small(MMVAE, shifted), images()
    other.load_state_dict(model.state_dict())
    model.subsets = lambda m, device: torch.eye(m, dtype=torch.bool, device=device)
    for training in (True, False):
        found = []
        for each in (model, other):
            torch.manual_seed(5)
            found.append(each.train(training).loss(x))
        for term in found[0]:
            torch.testing.assert_close(found[0][term], found[1][term], rtol=1e-12, atol=1e-12)


def test_mopoe_of_the_full_subset_alone_is_the_joint_product(shifted: Any) -> None:
    """With the prior among its experts it is the first ELBO of MVAE."""
    model, other, x = small(MoPoEVAE, shifted), small(MVAE, shifted), images()
    other.load_state_dict(model.state_dict())
    model.subsets = lambda m, device: torch.ones(1, m, dtype=torch.bool, device=device)
    without = MoPoEVAE.experts

    def with_prior(x: Tensor, parts: Any = None) -> tuple[Tensor, ...]:
        return tuple(nn.functional.pad(values, (0, 0, 0, 1)) for values in without(model, x, parts))

    model.experts = with_prior
    with pytest.MonkeyPatch.context() as patch:
        given_noise(patch)
        mine, theirs = model.loss(x), other.loss(x)
    for term in ("nll", "kl", "elbo"):
        torch.testing.assert_close(mine[term], theirs[term], rtol=1e-12, atol=1e-12)
    for call in ("encode", "score"):
        torch.testing.assert_close(getattr(model.eval(), call)(x), getattr(other.eval(), call)(x))


@pytest.mark.parametrize("make", EVERY)
def test_the_score_is_the_bound_of_all_parts_without_noise(make: Any, shifted: Any) -> None:
    model, x = small(make, shifted, beta=3.0).eval(), images()
    with pytest.MonkeyPatch.context() as patch:
        given_noise(patch)
        alone = torch.stack([-model.loss(x[b : b + 1])["elbo"] for b in range(5)])
    torch.testing.assert_close(model.score(x), alone)


# ---- codes and samples from some parts -------------------------------------------------------------------------------

SUBSETS = [chosen for n in (1, 2, 3) for chosen in itertools.combinations(range(3), n)]


@pytest.mark.parametrize("chosen", SUBSETS, ids=str)
@pytest.mark.parametrize("make", EVERY)
def test_a_reconstruction_from_some_parts_depends_on_no_value_of_the_others(
    make: Any, chosen: tuple[int, ...], shifted: Any
) -> None:
    model, x = small(make, shifted).eval(), images()
    other = torch.full_like(x, torch.nan)
    for i in chosen:
        model.split(other)[i].copy_(model.split(x)[i])
    found = model.reconstruct_from(other, chosen)
    assert torch.equal(found, model.reconstruct_from(x, chosen)) and found.isfinite().all()
    torch.testing.assert_close(found, model.reconstruct_from(x, chosen[::-1]))
    for i in chosen:
        changed = x.clone()
        model.split(changed)[i].mul_(0.5)
        assert (model.reconstruct_from(changed, chosen) - found).abs().max() > 1e-6
    if len(chosen) == 3:
        assert torch.equal(found, model(x))


@pytest.mark.parametrize("make", EVERY)
def test_the_experts_of_other_parts_get_no_gradient_from_a_reconstruction(make: Any, shifted: Any) -> None:
    model = small(make, shifted)
    model.reconstruct_from(images(), (2,)).sum().backward()
    for i, net in enumerate(model.encoder):
        assert all((p.grad is not None) == (i == 2) for p in net.parameters())


def test_the_code_of_some_parts_is_the_posterior_of_the_kind_of_model(shifted: Any) -> None:
    x = images()
    for make in ALL:
        model = small(make, shifted)
        mu, log_var = (values[:, [0, 2]] for values in model.experts(x))
        both_mu = gaussians.product(mu, log_var)[0]
        expected = {
            MVAE: MVAE.product(mu, log_var)[0],
            MMVAE: mu.mean(1),
            MoPoEVAE: (mu.sum(1) + both_mu) / 3,
            JMVAE: JMVAE.product(mu, log_var)[0],
            MVTCAE: both_mu,
            TELBO: MVAE.product(mu, log_var)[0],
            CRMVAE: both_mu,
        }[make]
        torch.testing.assert_close(model.infer(x, (0, 2))[0], expected)
        torch.testing.assert_close(model.reconstruct_from(x, (0, 2)), model.decode(expected))


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("parts", [(), (3,), (-1,), (0, 0), (0, 1, 2, 3)])
def test_parts_that_there_are_not_are_refused(make: Any, parts: tuple[int, ...], shifted: Any) -> None:
    with pytest.raises(AezooError, match="parts must be some of 0 to 2, each once, got"):
        small(make, shifted).reconstruct_from(images(), parts)


# ---- exact evidence --------------------------------------------------------------------------------------------------

SCALE, SIZES, K = 0.6, (3, 4, 2), 2


class Exact:
    """x_i = W_i z + m_i + noise, the columns of each W_i orthogonal; in numpy. What is said of a subset is of its x."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.w = [np.linalg.qr(rng.normal(size=(n, K)))[0] * rng.uniform(0.5, 1.5, K) for n in SIZES]
        self.m = [rng.normal(size=n) for n in SIZES]

    def stacked(self, chosen: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate([self.w[i] for i in chosen]), np.concatenate([self.m[i] for i in chosen])

    def evidence(self, x: Any, chosen: Any) -> np.ndarray:
        w, m = self.stacked(chosen)
        x_S = np.concatenate([np.split(x, np.cumsum(SIZES)[:-1], 1)[i] for i in chosen], 1)
        law = stats.multivariate_normal(m, w @ w.T + SCALE**2 * np.eye(len(m)))
        return np.atleast_1d(law.logpdf(x_S))

    def posterior(self, x: Any, chosen: Any) -> tuple[np.ndarray, np.ndarray]:
        w, m = self.stacked(chosen)
        x_S = np.concatenate([np.split(x, np.cumsum(SIZES)[:-1], 1)[i] for i in chosen], 1)
        covariance = np.linalg.inv(np.eye(K) + w.T @ w / SCALE**2)
        return (x_S - m) @ w @ covariance / SCALE**2, covariance

    def put_into(self, model: Any) -> Any:
        """Decoders, and as experts the likelihoods p(x_i|z) as functions of z, which are Gaussian."""
        with torch.no_grad():
            for w, m, down, up in zip(self.w, self.m, model.encoder, model.decoder, strict=True):
                (to_code,), (to_x,) = ([m for m in net.modules() if isinstance(m, nn.Linear)] for net in (down, up))
                precision = (w**2).sum(0)
                to_x.weight.copy_(torch.from_numpy(w))
                to_x.bias.copy_(torch.from_numpy(m))
                to_code.weight.zero_()
                to_code.weight[:K].copy_(torch.from_numpy(w.T / precision[:, None]))
                bias = [-(m @ w) / precision, np.log(SCALE**2 / precision)]
                to_code.bias.copy_(torch.from_numpy(np.concatenate(bias)))
        return model


def solved(make: Any, **settings: Any) -> tuple[Exact, Any, Tensor]:
    exact = Exact()
    plain = {"parts": SIZES, "latent_dim": K, "hidden_dims": (), "likelihood": f"gaussian:{SCALE}"}
    model = exact.put_into(make((sum(SIZES),), **plain, **settings).double())
    rng = np.random.default_rng(1)
    w, m = exact.stacked(range(3))
    x = rng.normal(size=(4, K)) @ w.T + m + SCALE * rng.normal(size=(4, len(m)))
    return exact, model.eval(), torch.from_numpy(x)


@pytest.mark.parametrize("chosen", SUBSETS, ids=str)
def test_the_product_of_the_likelihoods_and_the_prior_is_the_posterior_of_any_parts(chosen: tuple[int, ...]) -> None:
    exact, model, x = solved(MVAE)
    mean, covariance = exact.posterior(x.numpy(), chosen)
    found_mean, found_log_var = (values.detach().numpy() for values in model.infer(x, chosen))
    np.testing.assert_allclose(found_mean, mean, rtol=1e-9)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-12)
    np.testing.assert_allclose(np.exp(found_log_var), np.diag(covariance)[None].repeat(4, 0), rtol=1e-9)


def test_there_one_draw_weighs_as_much_as_the_evidence_and_each_elbo_is_that_of_its_parts() -> None:
    exact, model, x = solved(MVAE, n_subsets=2)
    everything = exact.evidence(x.numpy(), range(3))
    np.testing.assert_allclose(model.log_likelihood(x, 1).numpy(), everything, rtol=1e-7)
    singles = sum(exact.evidence(x.numpy(), (i,)) for i in range(3))
    pairs = sum(exact.evidence(x.numpy(), chosen) for chosen in ((0, 1), (0, 2), (1, 2))) / 3
    found = [model.loss(x.repeat(500, 1)) for _ in range(10)]
    for term, expected in (("elbo", everything), ("subset_nelbo", -singles - 2 * pairs)):
        values = torch.stack([terms[term].detach() for terms in found])
        error = float(values.std()) / math.sqrt(10)
        assert float(values.mean()) == pytest.approx(expected.mean(), abs=5 * error) and error < 0.05


@pytest.mark.parametrize("make", ALL)
def test_no_bound_is_above_the_evidence(make: Any, shifted: Any) -> None:
    """At the experts above and away from there, over 5,000 draws for each sample."""
    for start in (True, False):
        exact, model, x = solved(make, **({"n_subsets": 1} if make is MVAE else {}))
        if not start:
            shifted(model.encoder)
        with torch.no_grad():
            found = torch.stack([model.loss(x.repeat(500, 1))["elbo"] for _ in range(10)])
        gap = exact.evidence(x.numpy(), range(3)).mean() - float(found.mean())
        error = float(found.std()) / math.sqrt(10)
        assert gap > 5 * error if not (make is MVAE and start) else abs(gap) < 5 * error


@pytest.mark.parametrize("make", ALL)
def test_importance_samples_find_the_evidence_from_any_posterior(make: Any, shifted: Any) -> None:
    """From experts that are wrong, and less sure than the true ones, so that few draws weigh no more than the rest."""
    exact, model, x = solved(make)
    shifted(model.encoder)
    with torch.no_grad():
        for name, p in model.encoder.named_parameters():
            if name.endswith("bias"):
                p[K:] += 1.0
    found = model.log_likelihood(x, 20_000).numpy()
    np.testing.assert_allclose(found, exact.evidence(x.numpy(), range(3)), atol=0.1)


# ---- the zoo ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", EVERY)
def test_sizes_may_be_a_list_and_no_kl_of_several_has_a_capacity(make: Any) -> None:
    model = aezoo.create_model(aezoo.registry.name_of(make), SHAPE, parts=[2, 4])
    assert model.sizes == (2, 4) and not hasattr(model, "capacity") and model.beta == 1.0
