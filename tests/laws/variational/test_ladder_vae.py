"""Laws of the ladder variational autoencoder (Sonderby et al. 2016)."""

from typing import Any

import pytest
import torch
import torch.distributions as D
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from hierarchy_laws import (  # noqa: F401
    data,
    normal,
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

from aezoo.models.variational.ladder_vae import product as product_of

# ---- the ladder: Sonderby et al. 2016 --------------------------------------------------------------------------------


def test_ladder_merge_is_product_of_gaussians() -> None:
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
    # a factor of very large variance has no effect, and nothing overflows
    for a, b, expected in ((20.0, -30.0, 2.0), (-30.0, 20.0, 1.0)):
        mu, log_var = product_of((torch.tensor(1.0), torch.tensor(a)), (torch.tensor(2.0), torch.tensor(b)))
        assert mu.item() == pytest.approx(expected, abs=1e-6)
        assert log_var.item() == pytest.approx(-30, abs=1e-5)


def test_bottom_up_is_deterministic_and_bottom_is_decoded(shifted: Any) -> None:
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
