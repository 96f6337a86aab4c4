"""Persistent homology of Ripser (Tralie et al. 2018), which computes in float32.

Source: https://github.com/scikit-tda/ripser.py
"""

import copy

import numpy as np
import ripser
import torch
from torch import Tensor
from torch.nn import functional as F

import aezoo
from aezoo.models.classic.topological_ae import pairing


def merging_edges(a: Tensor) -> tuple[Tensor, Tensor]:
    """The distances at which components merge, by Ripser's diagram of dimension 0, and the edges of these lengths."""
    deaths = ripser.ripser(a.detach().numpy(), maxdim=0, distance_matrix=True)["dgms"][0][:, 1]
    deaths = torch.from_numpy(deaths[np.isfinite(deaths)])
    rows, columns = torch.triu_indices(len(a), len(a), 1)
    off = (a.detach()[rows, columns] - deaths[:, None].double()).abs()
    assert (off.amin(1) < 1e-6).all() and (off.topk(2, largest=False).values[:, 1] > 1e-6).all(), "not one edge"
    nearest = off.argmin(1)
    return deaths, torch.stack([rows[nearest], columns[nearest]])


def test_topological_loss(compare):
    shape, d, n = (6,), 2, 12
    settings = {"latent_dim": d, "hidden_dims": (7,), "topology": 3.0}
    model = aezoo.create_model("topological_ae", shape, **settings).double()
    with torch.no_grad():
        model.log_unit.fill_(0.3)
    other, x = copy.deepcopy(model), torch.rand(n, *shape)
    found, z = model.loss(x), other.encoder(x)
    a_x, a_z = (torch.linalg.vector_norm(p[:, None] - p + torch.eye(n)[..., None], dim=2) for p in (x, z))
    off_diagonal = 1 - torch.eye(n)
    a_x, a_z = a_x * off_diagonal, a_z * off_diagonal / other.log_unit.exp()
    a_x = a_x / a_x.max()
    row = compare("topological_ae", "ripser", "ripser")
    terms = []
    for quantity, a in (("samples", a_x), ("codes", a_z)):
        deaths, edges = merging_edges(a)
        ours = a[tuple(pairing(a.detach()).T)].sort().values
        row.equal(f"deaths of components of {quantity}", ours, deaths.double().sort().values)
        # equations 3 and 4
        terms.append(0.5 * (a_x[tuple(edges)] - a_z[tuple(edges)]).square().sum() / n)
    nll = F.binary_cross_entropy_with_logits(other.decoder(z), x, reduction="none").sum(1).mean()
    expected = nll + 3 * sum(terms)
    row.equal("x_to_z", found["x_to_z"], terms[0])
    row.equal("z_to_x", found["z_to_x"], terms[1])
    row.equal("loss", found["loss"], expected)
    row.equal_gradients(found["loss"], expected, zip(model.parameters(), other.parameters(), strict=True))
