"""Laws of MVAE, the multimodal VAE (Wu & Goodman 2018)."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from lightning.pytorch import Trainer
from missing_modality_laws import (  # noqa: F401
    NAN,
    test_loss_matches_models_of_present_modalities,
    test_missing_modality_gets_no_gradient,
    test_outputs_equal_model_of_present_modalities,
    test_partly_missing_modalities_are_refused,
)
from multimodal_laws import (  # noqa: F401
    ALL,
    CODE,
    PARTS,
    PRIOR,
    SUBSETS,
    assert_equals_vae,
    assert_same_terms,
    encoded,
    exact_model,
    experts,
    given_noise,
    images,
    normal,
    one_part_model_and_vae,
    small,
    test_each_modality_has_its_own_decoder,
    test_importance_sampling_estimates_evidence,
    test_inconsistent_part_sizes_are_refused,
    test_no_bound_is_above_the_evidence,
    test_other_experts_get_no_reconstruction_gradient,
    test_part_sizes_may_be_list_and_capacity_is_refused,
    test_partial_reconstruction_ignores_other_modalities,
    test_score_is_noise_free_bound_of_all_parts,
    test_unknown_parts_are_refused,
)
from scipy import stats
from scipy.integrate import quad
from torch import Tensor

from aezoo import AezooError, DataModule
from aezoo.distributions import gaussians
from aezoo.models.variational.crmvae import CRMVAE
from aezoo.models.variational.jmvae import JMVAE
from aezoo.models.variational.mmvae import MMVAE
from aezoo.models.variational.mopoe_vae import MoPoEVAE
from aezoo.models.variational.mvae import MVAE
from aezoo.models.variational.mvtcae import MVTCAE
from aezoo.models.variational.telbo import TELBO
from aezoo.models.variational.vae import VAE

# ---- sizes of the parts ----------------------------------------------------------------------------------------------


def test_image_halves_and_channels_can_be_parts() -> None:
    x = torch.rand(2, 1, 4, 4)
    upper, lower = MVAE((1, 4, 4)).split(x)
    assert torch.equal(upper, x[:, :, :2]) and torch.equal(lower, x[:, :, 2:])
    x = torch.rand(2, 3, 4, 4)
    red, others = MVAE((3, 4, 4), parts=(1, 2)).split(x)
    assert torch.equal(red, x[:, :1]) and torch.equal(others, x[:, 1:])


def test_mixture_subset_count_is_bounded() -> None:
    MoPoEVAE((6,), parts=(1,) * 6)
    with pytest.raises(AezooError, match="at most 6, got 7: use mvae or mmvae"):
        MoPoEVAE((7,), parts=(1,) * 7)
    MVAE((40,), parts=(1,) * 40)


# ---- products --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("with_prior", [True, False])
@pytest.mark.parametrize("m", [1, 2, 3])
def test_product_matches_numerical_integration(m: int, with_prior: bool) -> None:
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
def test_product_log_density_is_sum_of_members(with_prior: bool) -> None:
    mu, log_var = experts(6, 4)
    member = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 1]]).bool()
    found = normal(*(MVAE.product if with_prior else gaussians.product)(mu, log_var, member))
    z = 3 * torch.randn(50, 6, CODE, dtype=torch.float64)
    summed = (normal(mu, log_var).log_prob(z[:, :, None]) * member).sum(2)
    if with_prior:
        summed = summed + PRIOR.log_prob(z)
    difference = found.log_prob(z) - summed
    torch.testing.assert_close(difference, difference[:1].expand_as(difference), rtol=1e-9, atol=1e-9)


def test_product_of_one_expert_and_prior_matches_formula() -> None:
    mu, log_var = experts(6, 1)
    found_mu, found_log_var = MVAE.product(mu, log_var)
    var = log_var[:, 0].exp()
    torch.testing.assert_close(found_log_var.exp(), var / (1 + var))
    torch.testing.assert_close(found_mu, mu[:, 0] / (1 + var))
    assert all(torch.equal(a, b[:, 0]) for a, b in zip(gaussians.product(mu, log_var), (mu, log_var), strict=True))


def test_unit_variance_experts_average_with_prior() -> None:
    mu = torch.tensor([[[3.0], [9.0]]])
    found_mu, found_log_var = MVAE.product(mu, torch.zeros(1, 2, 1))
    assert found_mu.item() == pytest.approx(4.0) and found_log_var.exp().item() == pytest.approx(1 / 3)


# ---- one part --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_product_of_one_modality_equals_vae_with_prior_expert(beta: float, training: bool, shifted: Any) -> None:
    model, vae = one_part_model_and_vae(MVAE, shifted, beta=beta)
    plain = vae.posterior

    def with_prior(x: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_var = plain(x)
        precision = 1 + 1 / log_var.exp()
        return mu / log_var.exp() / precision, -precision.log()

    vae.posterior = with_prior
    assert_equals_vae(model, vae, training, rtol=1e-12, atol=1e-12)
    assert model.loss(images())["subset_nelbo"] == 0


# ---- MVAE: Wu & Goodman 2018 -----------------------------------------------------------------------------------------


def test_loss_is_sum_of_subset_elbos(shifted: Any) -> None:
    """By loops over samples, subsets and their parts, with the densities of torch.distributions; gradients as well."""
    model, x = small(MVAE, shifted, n_subsets=2, beta=3.0, activation="tanh"), images(2)
    eps = torch.randn(2, 6, CODE, dtype=torch.float64)
    mu, log_var = encoded(model, x)
    with pytest.MonkeyPatch.context() as patch:
        given_noise(patch, eps)
        torch.manual_seed(7)
        terms = model.loss(x)
    torch.manual_seed(7)
    member = model.subsets(model.present_mask(x))
    assert member.shape == (2, 6, 3) and member[:, 0].all() and (member[:, 1:4] == torch.eye(3)).all()
    nll, kl = torch.zeros(2, 6).double(), torch.zeros(2, 6).double()
    for b, s in itertools.product(range(2), range(6)):
        chosen = [i for i in range(3) if member[b, s, i]]
        precision = 1 + sum(1 / log_var[b, i].exp() for i in chosen)
        mean = sum(mu[b, i] / log_var[b, i].exp() for i in chosen) / precision
        q = D.Independent(D.Normal(mean, precision**-0.5), 1)
        kl[b, s] = D.kl_divergence(q, PRIOR)
        x_hat = model.decode((mean + precision**-0.5 * eps[b, s])[None])[0]
        log_p = D.Bernoulli(probs=x_hat, validate_args=False).log_prob(x[b]).split(PARTS)
        nll[b, s] = -sum(log_p[i].sum() for i in chosen)
    expected = {"loss": (nll + 3.0 * kl).sum(1), "nll": nll[:, 0], "kl": kl[:, 0], "elbo": -(nll + kl)[:, 0]}
    expected["subset_nelbo"] = (nll + 3.0 * kl)[:, 1:].sum(1)
    assert_same_terms(model, terms, {term: values.mean() for term, values in expected.items()})


def test_random_subsets_are_proper_and_uniform() -> None:
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


def test_no_random_subsets_below_three_modalities() -> None:
    of = torch.ones(2, 3, dtype=torch.bool)
    assert MVAE((4,), n_subsets=9).subsets(of[:1, :2]).tolist() == [[[True, True], [True, False], [False, True]]]
    assert MVAE((4,), parts=(1, 1, 2), n_subsets=0).subsets(of[:1]).shape == (1, 4, 3)
    assert MVAE((4,), parts=(4,)).subsets(of[:, :1]).tolist() == [[[True]]] * 2


@pytest.mark.parametrize("only", range(3))
def test_omitted_modality_gets_no_gradient(only: int, shifted: Any) -> None:
    model, x = small(MVAE, shifted), images()
    model.subsets = lambda seen: (torch.arange(3) == only).expand(len(seen), 5, 3)
    model.loss(x)["loss"].backward()
    for i in range(3):
        for net in (model.encoder[i], model.decoder[i]):
            assert all((p.grad.abs().max() > 0) == (i == only) for p in net.parameters())


# ---- codes and samples from some parts -------------------------------------------------------------------------------


def test_partial_code_matches_model_posterior(shifted: Any) -> None:
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


# ---- exact evidence --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", SUBSETS, ids=str)
def test_product_of_exact_experts_is_the_posterior(chosen: tuple[int, ...]) -> None:
    exact, model, x = exact_model(MVAE)
    mean, covariance = exact.posterior(x.numpy(), chosen)
    found_mean, found_log_var = (values.detach().numpy() for values in model.infer(x, chosen))
    np.testing.assert_allclose(found_mean, mean, rtol=1e-9)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-12)
    np.testing.assert_allclose(np.exp(found_log_var), np.diag(covariance)[None].repeat(4, 0), rtol=1e-9)


def test_exact_posterior_weights_equal_evidence() -> None:
    exact, model, x = exact_model(MVAE, n_subsets=2)
    everything = exact.evidence(x.numpy(), range(3))
    np.testing.assert_allclose(model.log_likelihood(x, 1).numpy(), everything, rtol=1e-7)
    singles = sum(exact.evidence(x.numpy(), (i,)) for i in range(3))
    pairs = sum(exact.evidence(x.numpy(), chosen) for chosen in ((0, 1), (0, 2), (1, 2))) / 3
    found = [model.loss(x.repeat(500, 1)) for _ in range(10)]
    for term, expected in (("elbo", everything), ("subset_nelbo", -singles - 2 * pairs)):
        values = torch.stack([terms[term].detach() for terms in found])
        error = float(values.std()) / math.sqrt(10)
        assert float(values.mean()) == pytest.approx(expected.mean(), abs=5 * error) and error < 0.05


def test_random_subsets_use_present_modalities(shifted: Any) -> None:
    """Like those of a model of the present parts, uniform within each size; none for fewer than three parts."""
    n, seen = 20_000, torch.tensor([True, False, True, True, True])
    model = MVAE((5,), parts=(1,) * 5, latent_dim=1, hidden_dims=())
    fixed, drawn = model.subsets(seen.expand(n, 5)).split([6, 1], 1)
    assert (fixed[:, 0] == seen).all() and (fixed[:, 1:] == torch.eye(5).bool() & seen).all()
    assert not drawn[..., 1].any()
    sizes = drawn.sum((1, 2))
    assert sizes.unique().tolist() == [2, 3]
    for size, count in ((2, 6), (3, 4)):
        numbers = (drawn[sizes == size, 0] * 2 ** torch.arange(5)).sum(1).bincount()
        counts = numbers[numbers > 0].numpy()
        assert len(counts) == count and stats.chisquare(counts).pvalue > 1e-3
    two, one = torch.tensor([[True, True, False, False, False], [True, False, False, False, False]])
    assert not model.subsets(two.expand(9, 5))[:, 6:].any()
    assert model.subsets(one.expand(9, 5)).sum((1, 2)).tolist() == [1] * 9  # the subset of all present parts


def test_table_with_missing_values_trains_on_request() -> None:
    x = torch.rand(60, 6)
    x[:20, :3], x[20:40, 3:] = NAN, NAN
    with pytest.raises(AezooError, match=r"NaN or infinity in 40 of 60 rows.*give --data.missing keep to a model"):
        DataModule.from_arrays(x).setup()
    data = DataModule.from_arrays(x, missing="keep", batch_size=10)
    model = MVAE((6,), latent_dim=2, hidden_dims=(4,), likelihood="gaussian")
    quiet: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, **quiet)
    with pytest.raises(AezooError, match=r"--data.missing keep is for models of .* mvae, which vae is not"):
        Trainer(max_epochs=1, accelerator="cpu", **quiet).fit(VAE((6,)), data)
    trainer.fit(model, data)
    assert all(p.isfinite().all() for p in model.parameters())
    figures = trainer.test(model, data, verbose=False)[0]
    known = data.tensors("test")[0]
    errors = ((model(known).detach() - known) ** 2)[~known.isnan()]
    assert figures["test/mse"] == pytest.approx(errors.mean().item(), rel=1e-5)
    bits = -figures["test/elbo"] * len(known) / (len(errors) * torch.log(torch.tensor(2.0)))
    assert figures["test/bits_per_dim"] == pytest.approx(float(bits), rel=1e-5)
    assert all(torch.tensor(value).isfinite() for value in figures.values())
