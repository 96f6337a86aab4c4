"""Laws of the top-down hierarchical VAE with free bits (Kingma et al. 2016)."""

from typing import Any

import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from hierarchy_laws import (  # noqa: F401
    SHAPE,
    bound_law,
    concatenated,
    data,
    draw_law,
    small,
    test_binarised_digits_compress_to_bound_losslessly,
    test_codes_and_scores_use_top_down_means,
    test_densities_and_samples_match_conditionals,
    test_elbo_importance_bounds_and_evidence_are_ordered,
    test_free_bits_cost_a_constant_without_gradient,
    test_hierarchy_satisfies_every_law,
    test_invalid_values_are_refused,
    test_one_level_equals_vae,
    test_two_level_importance_weights_are_constant_at_posterior,
)
from torch import Tensor

from aezoo.models.variational.hierarchical_vae import HierarchicalVAE
from aezoo.nets.blocks.levels import Level

# ---- the bound -------------------------------------------------------------------------------------------------------


class TwoDrawsOfTheTop(HierarchicalVAE):
    """The level below and the decoder get different draws of the top level (`autoencoders` 0.6.8)."""

    def top_down(self, h_L: list[Tensor], draw: bool) -> list[Level]:
        *low, top = super().top_down(h_L, draw)
        again = top.mu + torch.exp(0.5 * top.log_var) * torch.randn_like(top.mu)
        return [*low, top._replace(z=again)]


class BottomWithoutPrior(HierarchicalVAE):
    """p(z_1) = N(0, I): no hierarchy (`autoencoders` 0.6.8)."""

    def top_down(self, h_L: list[Tensor], draw: bool) -> list[Level]:
        bottom, *rest = super().top_down(h_L, draw)
        return [bottom._replace(m=0 * bottom.m, log_s2=0 * bottom.m), *rest]


class DetachedLevels(HierarchicalVAE):
    """No gradient passes from a level to the one above."""

    def q_and_p(self, h_L: list[Tensor], above: list[Tensor]) -> Any:
        return super().q_and_p(h_L, [z.detach() for z in above])


@pytest.mark.parametrize(
    ("mistake", "law"),
    [(TwoDrawsOfTheTop, draw_law), (BottomWithoutPrior, bound_law), (DetachedLevels, bound_law)],
    ids=lambda value: value.__name__,
)
def test_wrong_hierarchies_are_detected(mistake: Any, law: Any, shifted: Any) -> None:
    model = shifted(mistake(SHAPE, latent_dims=(5, 4, 3), level_dim=11, hidden_dims=(16,))).double()
    with pytest.raises(AssertionError):
        law(model, concatenated)


@pytest.mark.parametrize("level", [0, 1])
def test_posterior_equal_to_prior_has_zero_kl(level: int, shifted: Any) -> None:
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
