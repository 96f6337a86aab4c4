"""Triplet losses of pytorch-metric-learning (Musgrave et al. 2020).

Source: https://github.com/KevinMusgrave/pytorch-metric-learning
"""

import copy

import pytest
import torch
from comparison import noise
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.reducers import AvgNonZeroReducer, MeanReducer
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

import aezoo

SHAPE, LATENT, BATCH = (6,), 3, 9
REDUCERS = {"all": MeanReducer, "active": AvgNonZeroReducer}


@pytest.mark.parametrize("mining", ["all", "active"])
@pytest.mark.parametrize("name", ["triplet_ae", "triplet_vae"])
def test_triplet_losses(compare, name, mining):
    settings = {"latent_dim": LATENT, "hidden_dims": (7,), "triplet_weight": 2.0, "margin": 0.2, "mining": mining}
    model = aezoo.create_model(name, SHAPE, **settings).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    other, x, y = copy.deepcopy(model), torch.rand(BATCH, *SHAPE).bernoulli(), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 3])
    triplet = TripletMarginLoss(
        margin=0.2, distance=LpDistance(normalize_embeddings=False, p=2), reducer=REDUCERS[mining]()
    )
    if name == "triplet_ae":
        found, mean, kl = model.loss(x, y), other.encoder(x), 0.0
        z = mean
    else:
        eps = torch.randn(BATCH, LATENT)
        with noise([eps]):
            found = model.loss(x, y)
        mean, log_var = other.encoder(x).chunk(2, 1)
        z = mean + torch.exp(0.5 * log_var) * eps
        kl = kl_divergence(Normal(mean, torch.exp(0.5 * log_var)), Normal(0.0, 1.0)).sum(1).mean()
    nll = F.binary_cross_entropy_with_logits(other.decoder(z), x, reduction="none").sum(1).mean()
    term = triplet(mean, y)
    expected = nll + kl + 2 * term
    row = compare(name, "pytorch-metric-learning", f"TripletMarginLoss, {REDUCERS[mining].__name__}")
    row.equal("loss", found["loss"], expected)
    row.equal("triplet", found["triplet"], term)
    row.equal_gradients(found["loss"], expected, zip(model.parameters(), other.parameters(), strict=True))
