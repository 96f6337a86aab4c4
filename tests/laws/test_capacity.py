"""With a capacity the KL is a mean over all ranks; without a capacity it needs no communication."""

from typing import Any

import pytest
import torch
from reductions_helpers import (
    MODELS,
    SHAPE,
)
from torch import Tensor
from two_ranks import on_two_ranks

import aezoo
from aezoo.testing import SharedNoise

# the loss is nll + beta |KL - C|, for COUPLED with further terms of the whole batch
LINEAR = (
    *("vae", "beta_vae", "logcosh_vae", "denoising_vae", "msssim_vae", "perceptual_vae", "categorical_vae"),
    *("hyperspherical_vae", "gamma_vae", "semi_supervised_m1"),
)


COUPLED = (
    *("sigma_vae", "dip_vae_i", "dip_vae_ii", "info_vae", "factor_vae", "vae_gan", "ada_gvae", "mlvae"),
    *("triplet_vae", "autoencoder_kl", "eq_vae", "asymmetric_kl", "mine_vae", "va_vae"),
)


# free bits limit the KL of each level, which is always a mean over all ranks
BY_LEVEL = ("hierarchical_vae", "ladder_vae")


@pytest.mark.slow
def test_every_model_with_a_capacity_is_in_a_list() -> None:
    """Models with a KL estimated from draws have no capacity, because the estimate can be negative."""
    with_capacity = [name for name in MODELS if hasattr(aezoo.create_model(name, SHAPE, **MODELS[name]), "capacity")]
    assert sorted(with_capacity) == sorted([*LINEAR, *COUPLED, *BY_LEVEL])


def made(name: str, shifted: Any) -> tuple[Any, Tensor, Tensor]:
    model = shifted(aezoo.create_model(name, SHAPE, **MODELS[name]).double())
    model.beta = 2.0
    return model, torch.rand(6, *SHAPE, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1, 2])


def set_across_ranks(model: Any, rank: int) -> None:
    model._across_ranks = lambda: True


@pytest.mark.parametrize("name", [*LINEAR, *COUPLED])
def test_capacity_applies_to_kl_mean_over_ranks(name: str, shifted: Any) -> None:
    model, x, y = made(name, shifted)
    with SharedNoise(range(6), 6):
        # the KLs of the two ranks lie on both sides of it, at the same distance
        model.capacity = model.loss(x, y)["kl"].item()
    with SharedNoise(range(6), 6):
        whole = model.loss(x, y)
    torch.testing.assert_close(on_two_ranks(model, x, y, prepare=set_across_ranks).terms["loss"], whole["loss"])
    assert (on_two_ranks(model, x, y, exchange=False).terms["loss"] - whole["loss"]).abs() > 1e-4
    model.capacity += 1.0
    together = on_two_ranks(model, x, y, prepare=set_across_ranks)
    with SharedNoise(range(6), 6):
        whole = model.loss(x, y)
    expected = torch.autograd.grad(whole["loss"], [*model.parameters()])
    for found, g in zip(together.gradients(), expected, strict=True):
        torch.testing.assert_close(found, g)


@pytest.mark.parametrize("name", LINEAR)
def test_zero_capacity_needs_no_rank_communication(name: str, shifted: Any) -> None:
    model, x, y = made(name, shifted)
    with SharedNoise(range(6), 6):
        whole = model.loss(x, y)
    separate = on_two_ranks(model, x, y, exchange=False)

    def communicate(values: Tensor) -> Tensor:
        raise AssertionError(f"{name} communicates")

    model._across_ranks, model.batch_mean, model.all_gather_batch = (lambda: True), communicate, communicate
    model.loss(x, y)
    for term, value in separate.terms.items():
        torch.testing.assert_close(value, whole[term])
    expected = torch.autograd.grad(whole["loss"], [*model.parameters()])
    for found, g in zip(separate.gradients(), expected, strict=True):
        torch.testing.assert_close(found, g)
