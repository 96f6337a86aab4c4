"""Multiscale structural similarity of torchmetrics (Detlefsen et al. 2022).

Source: https://github.com/Lightning-AI/torchmetrics
"""

import copy

import torch
from comparison import noise
from torch.distributions import Normal, kl_divergence
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as multiscale

import aezoo

SHAPE, LATENT, BATCH = (2, 24, 26), 3, 4
# the first two of five scales are larger than a window of 11
EXPONENTS = tuple(a / (0.0448 + 0.2856) for a in (0.0448, 0.2856))


def test_similarity_loss(compare):
    settings = {"latent_dim": LATENT, "hidden_dims": (6,), "weight": 20.0, "beta": 0.7}
    model = aezoo.create_model("msssim_vae", SHAPE, **settings).double()
    assert model.scales == 2
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    other, eps = copy.deepcopy(model), torch.randn(BATCH, LATENT)
    mean, log_var = other.encoder(torch.rand(BATCH, *SHAPE)).chunk(2, 1)
    # images similar to the reconstructions
    x = (other.decoder(mean) + 0.5 * torch.randn(BATCH, *SHAPE)).sigmoid().detach()
    with noise([eps]):
        found = model.loss(x)
    mean, log_var = other.encoder(x).chunk(2, 1)
    std = torch.exp(0.5 * log_var)
    back = other.decoder(mean + std * eps).sigmoid()
    similarity = multiscale(back, x, data_range=1.0, betas=EXPONENTS, normalize=None, reduction="none")
    nll = 20 * (1 - similarity).mean()
    kl = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).sum(1).mean()
    expected = nll + 0.7 * kl
    row = compare("msssim_vae", "torchmetrics", "multiscale_structural_similarity_index_measure")
    row.equal("MS-SSIM", model.ms_ssim(back, x), similarity)
    row.equal("nll", found["nll"], nll)
    row.equal("loss", found["loss"], expected)
    row.equal_gradients(found["loss"], expected, zip(model.parameters(), other.parameters(), strict=True))
