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


@pytest.mark.parametrize("shape", [(9,), (6, 2, 3), (1, 6, 2), (1, 1, 6)])
def test_nll_of_sample_is_the_sum_over_its_parts(shape: tuple[int, ...]) -> None:
    """For a split along any dimension; a missing part adds nothing."""
    model: Any = MVAE(shape, latent_dim=2, hidden_dims=(), likelihood="bernoulli").double()
    params, x = torch.randn(2, *shape, dtype=torch.float64), torch.rand(2, *shape, dtype=torch.float64)
    first, second = model.split(x)
    x = torch.cat([first, second.index_fill(0, torch.tensor([1]), torch.nan)], model.decoder.dim + 1)
    log_p = torch.distributions.Bernoulli(logits=params, validate_args=False).log_prob(x)
    assert x[1].isnan().any() and not x[1].isnan().all()
    torch.testing.assert_close(model.nll(params, x), -log_p.nan_to_num().flatten(1).sum(1))
    of_parts = [model.nll(*part) for part in zip(model.split(params), model.split(x), strict=True)]
    torch.testing.assert_close(model.nll(params, x), of_parts[0] + of_parts[1])


def test_samples_are_invalid_without_parts_or_with_nan_in_one() -> None:
    model: Any = MVAE(SHAPE, parts=PARTS, latent_dim=2, hidden_dims=())
    x = torch.rand(5, *SHAPE)
    x[1, 1:3], x[2], x[3, 0], x[4, 3, 0, 1] = torch.nan, torch.nan, torch.nan, torch.nan
    assert model.invalid_mask(x).tolist() == [False, False, True, False, True]
    assert model.present_mask(x).int().tolist() == [[1, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 1], [1, 1, 1]]


# ---- products of experts ---------------------------------------------------------------------------------------------


def test_excluded_expert_gets_no_gradient() -> None:
    mu, log_var = (values.requires_grad_() for values in experts(3, 3))
    member = torch.tensor([True, False, True])
    for values in gaussians.product(mu, log_var, member):
        values.square().sum().backward(retain_graph=True)
    for grad in (mu.grad, log_var.grad):
        assert grad is not None and (grad[:, 1] == 0).all() and (grad[:, [0, 2]] != 0).all()
