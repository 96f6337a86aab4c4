"""Laws of the denoising VAE (Im et al. 2015)."""

from typing import Any

import pytest
import torch
import torch.distributions as D
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from perceptual_distance_laws import (
    CODE,
    SHAPE,
    decoded,
    images,
    model_and_vae,
    same,
    small,
)
from torch import Tensor

from aezoo.models.variational.denoising_vae import DenoisingVAE

# ---- denoising: Im et al. 2015 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_no_corruption_equals_vae(training: bool, shifted: Any) -> None:
    same(*model_and_vae(DenoisingVAE, shifted, {"beta": 2.0}, corruption="none", beta=2.0), training)


@pytest.mark.parametrize("corruption", ["gaussian:0.3", "masking:0.4", "salt_and_pepper:0.3"])
def test_corrupted_input_and_clean_target(corruption: str, shifted: Any) -> None:
    model, x = shifted(small(DenoisingVAE, corruption=corruption)), images()
    seen: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    terms, params = decoded(model, lambda: model.loss(x))
    assert (seen[0] - x).abs().max() > 0.2
    torch.manual_seed(2)
    expected = model.corruption(x)
    torch.manual_seed(2)
    model.loss(x)
    torch.testing.assert_close(seen[1], expected)
    clean = -D.Bernoulli(logits=params, validate_args=False).log_prob(x).flatten(1).sum(1).mean()
    torch.testing.assert_close(terms["nll"], clean)
    mu, log_var = model.posterior(seen[0])
    q, p = D.Normal(mu, (0.5 * log_var).exp()), D.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    torch.testing.assert_close(terms["kl"], D.kl_divergence(q, p).sum(1).mean())
    torch.testing.assert_close(terms["loss"], terms["nll"] + terms["kl"])


def test_inference_does_not_corrupt_samples(shifted: Any) -> None:
    model, vae = model_and_vae(DenoisingVAE, shifted, {})
    x, found = images(), []
    for each in (model.eval(), vae.eval()):
        torch.manual_seed(5)
        found.append([each.encode(x), each(x), each.score(x), each.log_likelihood(x, 20), each.sample(3)])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


def test_bound_is_below_evidence_and_falls_with_noise(shifted: Any) -> None:
    """Against the exact log p(x) of a linear decoder: the ELBO is a bound for any corruption."""
    x, found = images(200), []
    for corruption in ("none", "gaussian:0.2", "gaussian:2"):
        torch.manual_seed(0)
        model = DenoisingVAE(SHAPE, latent_dim=CODE, hidden_dims=(), likelihood="gaussian", corruption=corruption)
        model = shifted(model).double().eval()
        with torch.no_grad():
            found.append(torch.stack([model.loss(x)["elbo"] for _ in range(20)]).mean().item())
    W, c = model.decoder[1].weight.detach(), model.decoder[1].bias.detach()
    exact = D.LowRankMultivariateNormal(c, W, torch.full((64,), 0.5).double()).log_prob(x.flatten(1)).mean().item()
    assert exact > found[0] > found[1] + 1e-3 > found[2]
