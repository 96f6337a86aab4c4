"""Laws of Ada-GVAE, weak supervision by pairs (Locatello et al. 2020)."""

import torch
import torch.distributions as D
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from torch import Tensor
from weak_label_laws import (  # noqa: F401
    labels,
    normal,
    posterior,
    small,
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

# ---- Ada-GVAE: Locatello et al. 2020 ---------------------------------------------------------------------------------


def test_pairs_are_cyclic_neighbours_of_a_label() -> None:
    y = labels(3, 7, 3, -1, 7, 3, -1, 4)
    assert small(AdaGVAE).partners(y).tolist() == [2, 4, 5, 3, 1, 0, 6, 7]
    # of two samples with one label, each is the partner of the other
    assert small(AdaGVAE).partners(labels(1, 0, 0, 1)).tolist() == [3, 2, 1, 0]


def test_threshold_is_midpoint_of_distances() -> None:
    """KLs of 0.125, 2, 0.5 and 1.125 nats: the threshold is 1.0625, which the second and the last exceed."""
    mu, mu2 = torch.tensor([[0.5, 2.0, 1.0, 1.5]]), torch.zeros(1, 4)
    zero = torch.zeros(1, 4)
    kl = D.kl_divergence(normal(mu, zero), normal(mu2, zero))
    torch.testing.assert_close(kl, torch.tensor([[0.125, 2.0, 0.5, 1.125]]))
    assert AdaGVAE.shared(mu, zero, mu2, zero).tolist() == [[True, False, True, False]]


def test_distance_is_symmetric_kl_per_dimension() -> None:
    for _ in range(20):
        one, two = posterior(3), posterior(3)
        kl = 0.5 * (D.kl_divergence(normal(*one), normal(*two)) + D.kl_divergence(normal(*two), normal(*one)))
        tau = (kl.min(1, keepdim=True).values + kl.max(1, keepdim=True).values) / 2
        assert torch.equal(AdaGVAE.shared(*one, *two), kl < tau)


def authors_mask(mu: Tensor, log_var: Tensor, mu2: Tensor, log_var2: Tensor) -> Tensor:
    """The dimensions that disentanglement_lib averages, by a distance that is not symmetric in the pair."""
    v, v2 = log_var.exp(), log_var2.exp()
    distance = v / v2 + (mu2 - mu) ** 2 / v2 - 1 + log_var2 - log_var
    return distance < (distance.amin(1, keepdim=True) + distance.amax(1, keepdim=True)) / 2


def test_shared_dimensions_are_symmetric_in_pair() -> None:
    model, n_asymmetric = small(AdaGVAE), 0
    for _ in range(50):
        one, two = posterior(3), posterior(3)
        assert torch.equal(model.shared(*one, *two), model.shared(*two, *one))
        n_asymmetric += int((authors_mask(*one, *two) != authors_mask(*two, *one)).sum())
        # for equal variances the authors' distance is symmetric
        like_one = two[0], one[1]
        assert torch.equal(model.shared(*one, *like_one), authors_mask(*one, *like_one))
        both = [torch.cat(parts) for parts in zip(one, two, strict=True)]
        moved = model.paired(*both, labels(0, 1, 2, 0, 1, 2))[0] != both[0]
        assert torch.equal(moved[:3], moved[3:]) and torch.equal(moved[:3], model.shared(*one, *two))
    assert n_asymmetric > 0


def test_gvae_averages_means_and_variances() -> None:
    one, two = posterior(), posterior()
    mu, log_var = small(AdaGVAE).averaged(*one, *two)
    torch.testing.assert_close(mu, (normal(*one).mean + normal(*two).mean) / 2)
    torch.testing.assert_close(log_var.exp(), (normal(*one).variance + normal(*two).variance) / 2)
