"""Laws of semantic hashing (Salakhutdinov & Hinton 2009)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from stacked_helpers import (
    CODE,
    SHAPE,
    bernoulli_nll,
    images,
    small,
)
from torch import Tensor

import aezoo
from aezoo.models.classic.semantic_hash_ae import BINARISATIONS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

# ---- semantic hashing: Salakhutdinov & Hinton 2009, Kaiser & Bengio 2018 ---------------------------------------------


@pytest.mark.parametrize("binarisation", BINARISATIONS)
def test_codes_are_bits_exactly(binarisation: str, shifted: Any) -> None:
    model = small("semantic_hash_ae", shifted, binarisation=binarisation)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = images(200).to(dtype)
        code = model.to(dtype).encode(x)
        assert code.dtype == dtype and set(code.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(code, model.encode(x))  # no noise
        assert torch.equal(code > 0.5, model.encoder(x) > 0)


def test_bit_gradient_equals_sigmoid_gradient(shifted: Any) -> None:
    model, x, g = small("semantic_hash_ae", shifted), images(), torch.randn(6, CODE, dtype=torch.float64)
    parts = [*model.encoder.parameters()]
    through = torch.autograd.grad(model.encode(x), parts, g)
    as_sigmoid = torch.autograd.grad(model.encoder(x).sigmoid(), parts, g)
    for mine, expected in zip(through, as_sigmoid, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)
    assert max(float(p.abs().max()) for p in through) > 1e-3  # rounding alone has no gradient


def noise_of(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("noise_std", [0.0, 1.0, 4.0])
def test_noise_is_added_before_sigmoid(noise_std: float, training: bool, shifted: Any) -> None:
    model, x = small("semantic_hash_ae", shifted, noise_std=noise_std).train(training), images()
    eps, _ = noise_of((6, CODE), 3)
    expected = bernoulli_nll(model.decoder((model.encoder(x) + noise_std * eps).sigmoid()), x).mean()
    torch.manual_seed(3)
    torch.testing.assert_close(model.loss(x)["loss"], expected)
    after = bernoulli_nll(model.decoder(model.encoder(x).sigmoid() + noise_std * eps), x).mean()
    assert noise_std == 0 or (expected - after).abs() > 1e-2


def test_zero_noise_equals_sigmoid_code_autoencoder(shifted: Any) -> None:
    model = small("semantic_hash_ae", shifted, noise_std=0.0)
    plain = aezoo.create_model(
        "dense_ae", SHAPE, latent_dim=CODE, hidden_dims=(16,), code_activation="sigmoid"
    ).double()
    bias = model.decoder[1].b_X.data.zero_()
    names = {
        name: name.replace("encoder.", "encoder.0.").replace("decoder.0.", "decoder.") for name in model.state_dict()
    }
    state = model.state_dict()
    plain.load_state_dict({names[name]: state[name] for name in names if name not in ("decoder.1.b_X", "started")})
    torch.testing.assert_close(model.loss(images())["loss"], plain.loss(images())["loss"], rtol=1e-12, atol=1e-12)
    bias += 1
    assert (model.loss(images())["loss"] - plain.loss(images())["loss"]).abs() > 0.1


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "beta_binomial"])
def test_outputs_start_at_the_mean_of_the_first_batch(likelihood: str, shifted: Any) -> None:
    model, x = small("semantic_hash_ae", shifted, likelihood=likelihood), images()
    model.train().begin_step(x, 0)
    outputs = model.decoder[1](torch.zeros_like(x[:1]))
    torch.testing.assert_close(model.likelihood.mean(outputs)[0], x.mean(0).clamp(0.01, 0.99))
    after = model.decoder[1].b_X.detach().clone()
    model.begin_step(images(seed=8), 1)
    assert torch.equal(model.decoder[1].b_X, after)


@pytest.mark.slow
def test_mean_init_keeps_units_distinct(adam: Callable[..., float], mnist5k: Tensor) -> None:
    x, used = mnist5k[:1280].float(), {}
    for data_init in (False, True):
        torch.manual_seed(0)
        model = aezoo.create_model(
            "semantic_hash_ae", (1, 28, 28), latent_dim=8, hidden_dims=(64,), data_init=data_init
        )
        model.begin_step(x[:128], 0)
        adam(model, x, 200, 3e-3, 128)
        ones = model.encode(x).mean(0)
        used[data_init] = int(((ones > 0.1) & (ones < 0.9)).sum())
    assert used[False] <= 4 and used[True] >= 6


def saturating(v: Tensor) -> Tensor:
    return torch.minimum(torch.ones_like(v), torch.maximum(torch.zeros_like(v), 1.2 / (1 + (-v).exp()) - 0.1))


def test_improved_code_mixes_soft_and_hard_evenly(shifted: Any) -> None:
    model = small("semantic_hash_ae", shifted, binarisation="improved", noise_std=1.0)
    a = torch.randn(5000, CODE, dtype=torch.float64)
    eps, u = noise_of((5000, CODE), 3)
    torch.manual_seed(3)
    code = model.noisy_code(a)
    v = a + eps
    torch.testing.assert_close(code, torch.where(u < 0.5, (v > 0).double(), saturating(v)), rtol=1e-12, atol=1e-12)
    inside = (saturating(v) > 0) & (saturating(v) < 1)
    bits = ((code == 0) | (code == 1))[inside].double().mean()
    assert float(bits) == pytest.approx(0.5, abs=0.02)
    # drawn for each unit: with one draw per sample all units of a row would be of one kind
    rows = ((code == 0) | (code == 1)) | ~inside
    assert 0.02 < float(rows.all(1).double().mean()) < 0.3


def test_improved_hash_uses_soft_gradient(shifted: Any) -> None:
    model = small("semantic_hash_ae", shifted, binarisation="improved", noise_std=1.0)
    a = (3 * torch.randn(500, CODE, dtype=torch.float64)).requires_grad_()
    eps, _ = noise_of((500, CODE), 3)
    g = torch.randn(500, CODE, dtype=torch.float64)
    torch.manual_seed(3)
    (mine,) = torch.autograd.grad(model.noisy_code(a), a, g)
    v = (a + eps).detach()
    s = v.sigmoid()
    expected = g * torch.where((1.2 * s - 0.1 > 0) & (1.2 * s - 0.1 < 1), 1.2 * s * (1 - s), 0.0)
    torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)
    assert 0.1 < float((mine == 0).double().mean()) < 0.9  # saturated units have no gradient


def test_encoder_gradient_is_that_of_the_soft_code(shifted: Any) -> None:
    """For the improved code the decoder's gradient by the code is backpropagated through the soft code."""
    model, x = small("semantic_hash_ae", shifted, binarisation="improved", noise_std=1.0), images()
    seen: list[Tensor] = []
    hook = model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(3)
    loss = model.loss(x)["loss"]
    hook.remove()
    g = torch.autograd.grad(loss, seen[0], retain_graph=True)[0]
    eps, _ = noise_of((6, CODE), 3)
    parts = [*model.encoder.parameters()]
    mine = torch.autograd.grad(loss, parts)
    expected = torch.autograd.grad(saturating(model.encoder(x) + eps), parts, g)
    for p, q in zip(mine, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_noise_training_makes_codes_nearly_binary(adam: Callable[..., float], digits: Tensor) -> None:
    """After training with noise the sigmoids are nearly binary, and rounding them increases the NLL less."""
    x, found = digits[:400].float(), {}
    for noise_std in (0.0, 4.0):
        torch.manual_seed(0)
        model = aezoo.create_model(
            "semantic_hash_ae", x.shape[1:], latent_dim=16, hidden_dims=(64,), noise_std=noise_std
        )
        adam(model, x, 500, 1e-2, 50)
        s = model.encoder(x).sigmoid()
        cost = model.score(x).mean() - model.nll(model.decoder(s), x).mean()
        found[noise_std] = (float((s - s.round()).abs().mean().detach()), float(cost.detach()))
    assert found[4.0][0] < 0.5 * found[0.0][0]
    assert found[4.0][1] < 0.5 * found[0.0][1]
