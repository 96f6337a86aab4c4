"""Laws of the triplet-based VAE (Ishfaq et al. 2018)."""

from typing import Any

import pytest
import torch
from code_geometry_laws import (  # noqa: F401
    CODE,
    LABELS,
    by_torch,
    gradients,
    images,
    semi_hard,
    small,
    test_training_with_labels_separates_the_classes,
    triples,
)
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from torch import Tensor
from weak_label_laws import (  # noqa: F401
    test_beta_weighs_distance_of_kl_from_capacity,
    test_group_labels_change_loss,
    test_groups_and_pairs_ignore_batch_order,
    test_inference_without_labels_equals_vae,
    test_two_ranks_equal_one_process_with_split_groups,
    test_ungrouped_samples_equal_vae,
)

from aezoo.bases.triplet import MINING

# ---- triplets: Schroff et al. 2015, Hermans et al. 2017 --------------------------------------------------------------


def losses_with_same_noise(models: list[Any], training: bool) -> list[dict[str, Tensor]]:
    found = []
    for model in models:
        torch.manual_seed(3)
        found.append(model.train(training).loss(images(), LABELS))
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mining", MINING)
def test_zero_weight_equals_vae_exactly(mining: str, training: bool, shifted: Any) -> None:
    vae = small("vae", shifted, beta=2.0)
    without, with_it = (small("triplet_vae", shifted, beta=2.0, mining=mining, triplet_weight=w) for w in (0.0, 3.0))
    for model in (without, with_it):
        model.load_state_dict(vae.state_dict())
        model.capacity = vae.capacity = 1.0
    mine, theirs, other = losses_with_same_noise([without, vae, with_it], training)
    assert mine["triplet"] > 0
    for term in ("loss", "nll", "kl", "elbo"):
        assert torch.equal(mine[term], theirs[term])
    for a, b in zip(gradients(without, mine["loss"]), gradients(vae, theirs["loss"]), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(other["loss"] - theirs["loss"], 3 * mine["triplet"])


@pytest.mark.parametrize("mining", MINING)
def test_triplet_term_is_triplet_ae_loss_of_means(mining: str, shifted: Any) -> None:
    """Of the posterior's means, not of the draws; variances and the decoder get no gradient."""
    settings = {"mining": mining, "margin": 0.7}
    model, ae = small("triplet_vae", shifted, **settings), small("triplet_ae", shifted, **settings)
    mu, log_var = (torch.randn(6, CODE, dtype=torch.float64).requires_grad_() for _ in range(2))
    model.posterior = lambda x: (mu, log_var)
    term = model.loss(images(), LABELS)["triplet"]
    chosen = semi_hard(mu.detach(), LABELS) if mining == "semi_hard" else triples(LABELS)
    torch.testing.assert_close(term, by_torch(mu, chosen, 0.7, mining), rtol=1e-9, atol=1e-12)
    assert torch.equal(term, ae.triplet_loss(mu, LABELS)) and float(term.detach()) > 0.01
    in_mu, in_log_var, *rest = torch.autograd.grad(term, (mu, log_var, *model.decoder.parameters()), allow_unused=True)
    assert float(in_mu.norm()) > 1e-3 and in_log_var is None and all(g is None for g in rest)
