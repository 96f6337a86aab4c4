"""Laws and helpers of the multimodal VAEs with a KL between the joint posterior and that of each part."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from multimodal_laws import (
    CODE,
    PARTS,
    PRIOR,
    SHAPE,
    Exact,
    normal,
)
from torch import Tensor

from aezoo.models.variational.crmvae import CRMVAE
from aezoo.models.variational.jmvae import JMVAE
from aezoo.models.variational.mvtcae import MVTCAE
from aezoo.models.variational.vae import VAE

K, SIZES = 2, (3, 4, 2)


def gradients(term: Tensor, net: Any) -> list[Any]:
    return [*torch.autograd.grad(term, [*net.parameters()], retain_graph=True, allow_unused=True)]


# ---- the KL of two Gaussians -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [JMVAE, MVTCAE, CRMVAE])
def test_kl_is_float32_for_half_precision_encoders(make: Any) -> None:
    model, x = make(SHAPE, parts=PARTS, latent_dim=CODE), torch.rand(5, *SHAPE)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        terms, found, own = model.loss(x), model.infer(x), model.experts(x)
    assert all(values.dtype == torch.float32 for values in (*found, *own, *terms.values()))
    q, *of_parts = (
        normal(*(v.double() for v in pair)) for pair in (found, *zip(*(v.unbind(1) for v in own), strict=True))
    )
    parts_kl = torch.stack([D.kl_divergence(q, q_i) for q_i in of_parts])
    torch.testing.assert_close(terms["kl"].double(), D.kl_divergence(q, PRIOR).mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(terms["parts_kl"].double(), parts_kl.sum(0).mean(), rtol=1e-5, atol=0)


# ---- the loss --------------------------------------------------------------------------------------------------------


def vae_of(model: Any, **settings: Any) -> Any:
    """A VAE with the joint encoder and the decoder of the model."""
    vae: Any = VAE(SHAPE, latent_dim=CODE, hidden_dims=(8,), **settings).double()
    vae.encoder, vae.decoder = model.joint_encoder, model.decoder
    return vae


# ---- exact evidence --------------------------------------------------------------------------------------------------


def drawn(exact: Exact, n: int) -> Tensor:
    rng = np.random.default_rng(1)
    w, m = exact.stacked(range(3))
    return torch.from_numpy(rng.normal(size=(n, K)) @ w.T + m + 0.6 * rng.normal(size=(n, 9)))
