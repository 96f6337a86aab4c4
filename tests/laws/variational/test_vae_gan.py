"""Laws of the VAE-GAN (Larsen et al. 2015)."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adversarial_laws import (  # noqa: F401
    CODE,
    SHAPE,
    draw,
    gradients,
    images,
    player_parameters,
    size,
    small,
    test_beta_and_capacity_apply_to_kl_term,
    test_inference_equals_vae,
    test_no_term_reaches_other_networks,
    test_one_backward_gives_each_network_its_gradient,
    test_player_parameters_partition_the_model,
    test_resumed_networks_use_requested_learning_rates,
    test_training_matches_separate_optimisers,
    test_two_ranks_equal_one_process,
    test_zero_logits_cost_log_2_per_term,
)
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from torch import Tensor

import aezoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

# ---- which loss trains which network ---------------------------------------------------------------------------------


def test_gradient_leaks_between_networks_are_detected(shifted: Any) -> None:
    """In Pythae the loss of FactorVAE's discriminator has a gradient for the encoder; so would a GAN loss here."""
    model, x = shifted(small("factor_vae")), images()
    _, z, _ = draw(model, x)
    leaky = F.softplus(-model.discriminator(z)).mean() + F.softplus(model.discriminator(model.permute_dims(z))).mean()
    assert size(gradients(leaky, player_parameters(model)["vae"])) > 1e-3
    model = shifted(small("vae_gan"))
    _, _, params = draw(model, x)
    t = model.discriminator["head"](model.discriminator["features"](model.likelihood.mean(params)))
    for player in ("encoder", "decoder", "discriminator"):
        assert size(gradients(F.softplus(t).mean(), player_parameters(model)[player])) > 1e-3


# ---- VAE-GAN ---------------------------------------------------------------------------------------------------------


def test_exact_reconstruction_has_zero_feature_distance(shifted: Any) -> None:
    model = small("vae_gan", input_shape=(CODE,), hidden_dims=(), likelihood="gaussian")
    with torch.no_grad():
        model.encoder[1].weight.copy_(torch.cat([torch.eye(CODE), torch.zeros(CODE, CODE)]))
        model.encoder[1].bias.copy_(torch.cat([torch.zeros(CODE), torch.full((CODE,), -60.0)]))
        model.decoder[1].weight.copy_(torch.eye(CODE))
        model.decoder[1].bias.zero_()
        x = torch.rand(6, CODE, dtype=torch.float64)
        assert model.loss(x)["feature_nll"].item() == pytest.approx(0, abs=1e-9)
        model.decoder[1].bias += 0.1
        assert model.loss(x)["feature_nll"].item() > 1e-3


@pytest.mark.parametrize("net", ["mlp", "conv", "resnet"])
def test_feature_distance_is_invariant_to_critic_scale(net: str, shifted: Any) -> None:
    """With s = 1, features scaled by 100 would scale the distance by 10,000."""
    model, x = shifted(small("vae_gan", net=net, hidden_dims=(8,))), images()
    found = []
    for factor in (1, 100):
        with torch.no_grad():
            last = [m for m in model.discriminator["features"].modules() if hasattr(m, "weight")][-1]
            last.weight *= factor
            last.bias *= factor
        torch.manual_seed(3)
        found.append(model.loss(x)["feature_nll"])
    assert found[0] > 0.1
    torch.testing.assert_close(*found)


def test_constant_features_give_finite_losses() -> None:
    """As for images of one colour that the decoder reconstructs exactly."""
    model = small("vae_gan")
    with torch.no_grad():
        for p in model.discriminator["features"].parameters():
            p.zero_()
    terms = model.loss(torch.full((6, *SHAPE), 0.5, dtype=torch.float64))
    terms["loss"].backward()
    assert terms["feature_nll"] == 0
    assert all(value.isfinite() for value in terms.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "gamma"), [(1e-2, 0.0), (1e-2, 1.0), (1e-4, 0.1)])
def test_discriminator_learning_rate_ratio_keeps_loss_bounded(rate: float, gamma: float, digits: Tensor) -> None:
    """Neither a fast discriminator nor a decoder without a reconstruction term makes a loss diverge."""
    torch.manual_seed(0)
    x, worst = digits[:1024].float(), {"feature_nll": 0.0, "discriminator": 0.0}
    model = aezoo.create_model(
        "vae_gan", input_shape=(1, 8, 8), latent_dim=8, hidden_dims=(64,), discriminator_dims=(128,),
        lr=2e-3, discriminator_lr=rate, gamma=gamma,
    )  # fmt: skip
    optimizer = model.configure_optimizers()
    for _ in range(300):
        terms = model.loss(x[torch.randint(1024, (64,))])
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        worst = {name: max(value, terms[name].item()) for name, value in worst.items()}
    assert all(value.isfinite() for value in terms.values())
    assert worst["feature_nll"] < 4 * 128
    assert worst["discriminator"] < 10
    with torch.no_grad():
        mse = (model.eval()(x) - x).square().mean() / (x - x.mean(0)).square().mean()
    if rate < 1e-3:
        assert mse < 0.55
