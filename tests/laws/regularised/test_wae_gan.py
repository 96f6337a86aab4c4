"""Laws of WAE-GAN, the adversarial Wasserstein autoencoder (Tolstikhin et al. 2018)."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from aggregate_posterior_laws import (  # noqa: F401
    CODE,
    SHAPE,
    images,
    normal,
    small,
    test_default_likelihood_is_the_papers_squared_error,
    test_each_player_has_a_parameter_group,
    test_fitted_priors_follow_the_codes,
    test_no_term_reaches_other_networks,
    test_one_backward_gives_each_network_its_gradient,
    test_regularisation_term_trains_encoder,
    test_samples_are_decoded_draws_from_a_standard_normal_prior,
    test_zero_weight_equals_dense_autoencoder,
)
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_gradients_with_other_settings_are_derivatives,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from scipy import stats
from torch import Tensor

import aezoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- WAE-GAN and AAE: Tolstikhin et al. 2018, Makhzani et al. 2015 ---------------------------------------------------


def test_zero_logits_cost_log_2_per_term(shifted: Any) -> None:
    model = shifted(small("wae_gan"))
    with torch.no_grad():
        for p in [*model.discriminator.parameters()][-2:]:
            p.zero_()
    terms = model.loss(images())
    assert terms["discriminator"].item() == pytest.approx(2 * math.log(2))
    assert terms["adversarial"].item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_optimal_discriminator_is_log_ratio_prior_to_codes(shift: float) -> None:
    """For N(m, 1) and N(0, 1) the log-ratio is linear in z; the least loss is 2 log 2 - 2 Jensen-Shannon divergence."""
    n = 20_000
    model = small("wae_gan", input_shape=(1,), latent_dim=1, hidden_dims=(), discriminator_dims=())
    z = normal(n, 1) + shift
    model.draw = lambda x: z
    x = torch.rand(n, 1).double()
    optimizer = torch.optim.LBFGS(model.discriminator.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        torch.manual_seed(8)
        optimizer.zero_grad()
        loss: Tensor = model.loss(x)["discriminator"]
        loss.backward()
        return loss

    optimizer.step(closure)
    weight, bias = (p.item() for p in model.discriminator.parameters())
    assert (weight, bias) == (pytest.approx(-shift, abs=0.08), pytest.approx(shift**2 / 2, abs=0.08))
    grid = np.linspace(-10, 12, 20_001)
    p, q = stats.norm.pdf(grid), stats.norm.pdf(grid, shift)
    js = np.trapezoid(0.5 * p * np.log(2 * p / (p + q)) + 0.5 * q * np.log(2 * q / (p + q)), grid)
    assert closure().item() == pytest.approx(2 * math.log(2) - 2 * js, abs=0.01)


def test_gaussian_posterior_has_its_mean_and_variance(shifted: Any) -> None:
    model, x = shifted(small("wae_gan", gaussian_posterior=True)), images(1).expand(8000, *SHAPE)
    mu, log_var = model.encoder(x[:1]).detach().chunk(2, 1)
    z = model.draw(x).detach()
    assert ((z.mean(0) - mu) / (0.5 * log_var).exp()).abs().max() < 0.06
    torch.testing.assert_close(z.var(0), log_var[0].exp(), rtol=0.1, atol=0)
    torch.testing.assert_close(model.encode(x[:1]), mu)
    assert model.decoder[1].in_features == CODE
    plain = shifted(small("wae_gan"))
    torch.testing.assert_close(plain.draw(x[:3]), plain.encode(x[:3]))


def test_overflowing_log_variances_give_finite_loss() -> None:
    model = aezoo.create_model("wae_gan", SHAPE, latent_dim=CODE, gaussian_posterior=True)
    with torch.no_grad():
        model.encoder[-2].bias[CODE:] = 300.0  # type: ignore[index]
    assert model.loss(images().float())["loss"].isfinite()


@pytest.mark.slow
def test_training_moves_codes_towards_the_prior() -> None:
    """For a shifted code, which would move away with the wrong sign of the adversarial term."""
    torch.manual_seed(0)
    model: Any = aezoo.create_model(
        "wae_gan", (1,), latent_dim=1, hidden_dims=(), discriminator_dims=(16,), lr=1e-2, discriminator_lr=1e-2
    )
    with torch.no_grad():
        model.encoder[1].weight.fill_(0.3)
        model.encoder[1].bias.fill_(3.0)
    optimizer = model.configure_optimizers()
    for _ in range(400):
        optimizer.zero_grad()
        model.loss(torch.randn(128, 1))["loss"].backward()
        optimizer.step()
    z = model.encode(torch.randn(4000, 1))
    assert z.mean().abs() < 0.4 and 0.6 < z.std() < 1.6
