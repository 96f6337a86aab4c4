"""Laws of AAE, the adversarial autoencoder (Makhzani et al. 2015)."""

from typing import Any

import pytest
import torch
from aggregate_posterior_laws import (  # noqa: F401
    POSTERIORS,
    SHAPE,
    images,
    small,
    test_default_likelihood_is_the_papers_squared_error,
    test_each_player_has_a_parameter_group,
    test_no_term_reaches_other_networks,
    test_one_backward_gives_each_network_its_gradient,
    test_regularisation_term_trains_encoder,
    test_samples_are_decoded_draws_from_a_standard_normal_prior,
    test_zero_weight_equals_dense_autoencoder,
)
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from torch import nn

from aezoo.models.regularised.aae import AAE
from aezoo.models.regularised.wae_gan import WAEGAN

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- WAE-GAN and AAE: Tolstikhin et al. 2018, Makhzani et al. 2015 ---------------------------------------------------


@POSTERIORS
def test_aae_equals_wae_gan_with_networks_of_the_paper(gaussian: bool, shifted: Any) -> None:
    ours: Any = AAE(SHAPE, gaussian_posterior=gaussian)
    widths = [m.out_features for m in ours.discriminator if isinstance(m, nn.Linear)]
    assert widths == [1000, 1000, 1]
    assert [m.out_features for m in ours.decoder if isinstance(m, nn.Linear)] == [1000, 1000, 20]
    assert (ours.code_shape, ours.adversarial_weight) == ((8,), 1.0)
    assert ours.gaussian_posterior == gaussian
    aae, x, found = shifted(small("aae", gaussian_posterior=gaussian)), images(), []
    wae = small("wae_gan", adversarial_weight=1.0, gaussian_posterior=gaussian)
    wae.load_state_dict(aae.state_dict())
    for each in (aae, wae):
        torch.manual_seed(3)
        found.append(each.loss(x))
    assert all(torch.equal(found[0][term], found[1][term]) for term in found[0])
    assert isinstance(aae, WAEGAN)
