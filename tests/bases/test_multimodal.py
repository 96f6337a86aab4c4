"""Tests of aezoo/bases/multimodal.py."""

from typing import Any

import pytest
import torch
from torch import Tensor

from aezoo.bases.multimodal import partition
from aezoo.distributions import gaussians
from aezoo.models.variational.cmvae import CMVAE
from aezoo.models.variational.crmvae import CRMVAE
from aezoo.models.variational.dmvae import DMVAE
from aezoo.models.variational.jmvae import JMVAE
from aezoo.models.variational.jnf import JNF
from aezoo.models.variational.mmvae import MMVAE
from aezoo.models.variational.mmvae_plus import MMVAEPlus
from aezoo.models.variational.mopoe_vae import MoPoEVAE
from aezoo.models.variational.mvae import MVAE
from aezoo.models.variational.mvtcae import MVTCAE
from aezoo.models.variational.nexus import Nexus
from aezoo.models.variational.telbo import TELBO

SHAPE, PARTS, CODE = (6, 2, 3), (1, 2, 3), 4


MIXTURES: list[Any] = [MMVAE, MoPoEVAE]


ALL: list[Any] = [MVAE, *MIXTURES, JMVAE, MVTCAE, CRMVAE, TELBO]


EVERY: list[Any] = [*ALL, JNF, MMVAEPlus, DMVAE, CMVAE, Nexus]


def experts(*batch: int) -> tuple[Tensor, Tensor]:
    """Means and log-variances away from 0."""
    mu = 2 * torch.randn(*batch, CODE, dtype=torch.float64) + 0.5
    return mu, torch.randn(*batch, CODE, dtype=torch.float64) - 0.5


# ---- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dim", "halves"),
    [
        ((10,), 0, (5, 5)),
        ((7,), 0, (4, 3)),
        ((1,), 0, (1,)),
        ((3, 8, 8), 0, (2, 1)),
        ((1, 28, 20), 1, (14, 14)),
        ((1, 1, 9), 2, (5, 4)),
        ((1, 1, 1, 1), 0, (1,)),
        ((2, 100), 0, (1, 1)),
    ],
)
def test_modalities_split_first_divisible_dimension(shape: Any, dim: int, halves: Any) -> None:
    assert partition((), shape) == (dim, halves)
    x = torch.rand(2, *shape)
    for make in EVERY:
        model = make(shape, latent_dim=2, hidden_dims=())
        parts = model.split(x)
        assert [part.shape[dim + 1] for part in parts] == [*halves]
        assert torch.equal(torch.cat(parts, dim + 1), x)
        assert model.eval()(x).shape == x.shape


# ---- products --------------------------------------------------------------------------------------------------------


def test_excluded_expert_gets_no_gradient() -> None:
    mu, log_var = (values.requires_grad_() for values in experts(3, 3))
    member = torch.tensor([True, False, True])
    for values in gaussians.product(mu, log_var, member):
        values.square().sum().backward(retain_graph=True)
    for grad in (mu.grad, log_var.grad):
        assert grad is not None and (grad[:, 1] == 0).all() and (grad[:, [0, 2]] != 0).all()
