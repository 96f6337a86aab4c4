"""Laws of MoPoE-VAE, the mixture of products of experts (Sutter et al. 2021)."""

import itertools
from typing import Any

import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from missing_modality_laws import (  # noqa: F401
    test_loss_matches_models_of_present_modalities,
    test_missing_modality_gets_no_gradient,
    test_outputs_equal_model_of_present_modalities,
    test_partly_missing_modalities_are_refused,
    test_posterior_draws_use_present_components,
)
from multimodal_laws import (  # noqa: F401
    given_noise,
    images,
    small,
    test_each_modality_has_its_own_decoder,
    test_importance_sampling_estimates_evidence,
    test_inconsistent_part_sizes_are_refused,
    test_loss_is_component_mean_by_torch_distributions,
    test_mixture_kl_matches_quadrature_and_its_bounds,
    test_no_bound_is_above_the_evidence,
    test_one_part_mixture_equals_vae_exactly,
    test_other_experts_get_no_reconstruction_gradient,
    test_part_sizes_may_be_list_and_capacity_is_refused,
    test_partial_reconstruction_ignores_other_modalities,
    test_posterior_draws_follow_the_mixture_density,
    test_posterior_moments_match_mixture,
    test_score_is_noise_free_bound_of_all_parts,
    test_unknown_parts_are_refused,
)
from torch import Tensor, nn

from aezoo.models.variational.mmvae import MMVAE
from aezoo.models.variational.mopoe_vae import MoPoEVAE
from aezoo.models.variational.mvae import MVAE

# ---- mixtures: Shi et al. 2019, Sutter et al. 2021 -------------------------------------------------------------------


def test_mopoe_components_are_subset_products(shifted: Any) -> None:
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


def test_mopoe_of_single_modalities_equals_mmvae(shifted: Any) -> None:
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


def test_mopoe_of_full_subset_equals_joint_product(shifted: Any) -> None:
    """With the prior as one more expert this is the joint ELBO of MVAE."""
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
