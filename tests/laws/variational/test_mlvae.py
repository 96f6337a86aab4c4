"""Laws of ML-VAE, the multi-level VAE (Bouchacourt et al. 2018)."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from scipy import stats
from scipy.integrate import quad
from torch import Tensor
from weak_label_laws import (  # noqa: F401
    CODE,
    WEAK,
    assert_equals_vae,
    images,
    labels,
    model_and_vae,
    normal,
    posterior,
    small,
    terms_at,
    test_an_identical_pair_shares_every_dimension,
    test_averaging_sample_with_itself_is_identity,
    test_beta_weighs_distance_of_kl_from_capacity,
    test_group_labels_change_loss,
    test_groups_and_pairs_ignore_batch_order,
    test_inference_without_labels_equals_vae,
    test_invalid_values_are_refused,
    test_loss_uses_averaged_posteriors,
    test_most_different_dimension_is_kept_least_averaged,
    test_pair_training_finds_shared_dimension,
    test_two_ranks_equal_one_process_with_split_groups,
    test_ungrouped_samples_equal_vae,
)

from aezoo.models.variational.ada_gvae import AdaGVAE
from aezoo.models.variational.mlvae import MLVAE

# ---- without labels --------------------------------------------------------------------------------------------------


def test_zero_group_dimension_equals_vae(shifted: Any) -> None:
    assert_equals_vae(*model_and_vae(MLVAE, shifted, group_dim=0), labels(0, 0, 0, 1, 1, 1), True)


# ---- Ada-GVAE: Locatello et al. 2020 ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_mlvae_average_is_normalised_geometric_mean() -> None:
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


# ---- ML-VAE: Bouchacourt et al. 2018 ---------------------------------------------------------------------------------


def product_law(product: Any) -> None:
    """The log-density of the product is the sum of the members' log-densities plus a constant."""
    mu, log_var = posterior(5)
    member = torch.tensor([[True, True, False, True, False]])
    found = normal(*product(mu, log_var, member))
    z = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None].expand(7, CODE)
    experts = sum(normal(mu[j], log_var[j]).log_prob(z) for j in (0, 1, 3))
    constant = experts - found.log_prob(z)
    torch.testing.assert_close(constant, constant[:1].expand_as(constant))


def test_group_content_is_product_of_posteriors() -> None:
    model = small(MLVAE)
    product_law(model.product)
    two = torch.tensor([[1.0], [4.0]]), torch.log(torch.tensor([[1.0], [0.5]]))
    mean, log_var = model.product(*two, torch.ones(1, 2, dtype=torch.bool))
    assert mean.item() == pytest.approx((1 * 1 + 4 * 2) / 3)  # by precisions 1 and 2
    assert log_var.exp().item() == pytest.approx(1 / 3)


def test_averaged_precisions_are_detected() -> None:
    def rooted(mu: Tensor, log_var: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
        mean, new = small(MLVAE).product(mu, log_var, member)
        return mean, new + member.sum(1, keepdim=True).log()

    with pytest.raises(AssertionError):
        product_law(rooted)


def test_groups_share_label_and_unlabelled_samples_form_no_group() -> None:
    found = small(MLVAE).members(labels(3, -1, 3, -1, 0))
    assert found.int().tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [1, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]


def test_content_kl_counts_per_group_style_kl_per_sample() -> None:
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


def test_group_members_draw_content_independently() -> None:
    model, mu, log_var = small(MLVAE), *posterior()
    model.posterior = lambda x: (mu, log_var)
    seen: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.loss(images(), labels(0, 0, 0, 0, 0, 0))
    assert len(seen[0][:, 0].unique()) == 6


def test_narrow_posteriors_of_a_large_group_stay_finite() -> None:
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
