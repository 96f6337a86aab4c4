"""Distances of POT, Python Optimal Transport (Flamary et al. 2021).

Source: https://github.com/PythonOT/POT
"""

import copy
import math

import ot
import torch
from comparison import noise
from torch.nn import functional as F

import aezoo


def test_sliced_wasserstein_loss(compare):
    shape, d, n, directions = (6,), 3, 9, 11
    settings = {"latent_dim": d, "hidden_dims": (7,), "sw_weight": 2.5, "n_projections": directions}
    model = aezoo.create_model("swae", shape, **settings).double()
    other, x = copy.deepcopy(model), torch.rand(n, *shape)
    prior, v = torch.randn(n, d), torch.randn(directions, d)
    with noise([prior, v]):
        found = model.loss(x)
    z = other.encoder(x)
    distance = ot.sliced_wasserstein_distance(z, prior, projections=F.normalize(v).T, p=2)
    # -log p of N(xhat, 1/2) is the squared error plus a constant
    nll = (x - other.decoder(z)).square().sum(1).mean() + 0.5 * shape[0] * math.log(math.pi)
    expected = nll + 2.5 * distance**2
    row = compare("swae", "POT", "sliced_wasserstein_distance")
    row.equal("loss", found["loss"], expected)
    row.equal("sw", found["sw"], distance**2)
    row.equal_gradients(found["loss"], expected, zip(model.parameters(), other.parameters(), strict=True))
