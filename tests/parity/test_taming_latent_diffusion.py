"""The loss of taming-transformers (Esser et al. 2020) around copies of the decoders of continuous codes.

Source: https://github.com/CompVis/taming-transformers. Its loss is a mean over the X values of a sample, ours a sum.
Latent diffusion adds beta KL to it and a scale of the absolute errors, here 1.
"""

import copy
import math
from typing import Any

import pytest
import torch
from comparison import noise
from taming_loss import their_loss

import aezoo

SHAPE, X = (3, 8, 8), 192
MODELS: dict[str, dict[str, Any]] = {
    "autoencoder_kl": {},
    "asymmetric_kl": {},
    # without the terms that taming-transformers does not have
    "eq_vae": {"equivariance": 0.0},
    "va_vae": {"alignment_weight": 0.0},
    "representation_ae": {},
}
SUM = "a sum over the X values of a sample, where theirs is a mean"


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_perceptual_and_adversarial_loss(compare, name, started):
    start = 0 if started else 5
    settings = MODELS[name] | ({} if name == "representation_ae" else {"hidden_dims": (6,), "beta": 0.01})
    model: Any = aezoo.create_model(
        name, SHAPE, likelihood="laplace", perceptual_weight=0.7, discriminator_weight=0.6, discriminator_start=start,
        discriminator_dims=(8, 16), **settings,
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    other, x = copy.deepcopy(model), torch.rand(4, *SHAPE)
    loss = their_loss(model.distance, other.discriminator, disc_start=start)
    if name == "representation_ae":
        terms, z, kl = model.loss(x), other.encode(x).detach(), torch.zeros(())
        params = []
    else:
        draw = torch.randn(4, *model.code_shape)
        with noise([draw]):
            terms = model.loss(x)
        mu, log_var = other.encoder(x).chunk(2, 1)
        z, normal = mu + (0.5 * log_var).exp() * draw, torch.distributions.Normal
        kl = torch.distributions.kl_divergence(normal(mu, (0.5 * log_var).exp()), normal(0.0, 1.0))
        kl = kl.flatten(1).sum(1).mean()
        params = [*zip(model.encoder.parameters(), other.encoder.parameters(), strict=True)]
    x_hat = other.decoder(z)
    last = [p for p in other.decoder.parameters() if p.ndim > 1][-1]
    of_autoencoder, log = loss(torch.zeros(()), x, x_hat, 0, 0, last_layer=last)
    of_discriminator, judged = loss(torch.zeros(()), x, x_hat, 1, 0)
    state = f"VQLPIPSWithDiscriminator ({'discriminator' if started else 'before its start'})"
    with_taming = compare(name, "taming-transformers-rom1504", state)
    R = terms["nll"] + 0.7 * terms["perceptual"] - X * math.log(2)
    with_taming.scaled("nll + perceptual, without log 2 of the density", R, log["train/nll_loss"], X, SUM)
    with_taming.scaled("perceptual", terms["perceptual"], log["train/p_loss"], X, SUM)
    with_taming.equal("adversarial", terms["adversarial"], log["train/g_loss"])
    with_taming.scaled("adaptive weight", 0.6 * terms["adaptive_weight"], log["train/d_weight"], X, f"of {SUM}")
    params += zip(model.decoder.parameters(), other.decoder.parameters(), strict=True)
    beta = getattr(model, "beta", 0.0)
    with_taming.equal_gradients(
        terms["loss"], of_autoencoder + beta * kl / X, params, "gradient of the autoencoder", X, SUM
    )
    if started:
        with_taming.equal("discriminator", terms["discriminator"], judged["train/disc_loss"])
        judges = zip(model.discriminator.parameters(), other.discriminator.parameters(), strict=True)
        with_taming.equal_gradients(terms["loss"], of_discriminator, judges, "gradient of the discriminator")
