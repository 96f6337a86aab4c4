"""Laws of OMP sparse autoencoder, orthogonal matching pursuit (Pati et al. 1993)."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from gradient_laws import (
    test_gradients_are_derivatives_of_the_terms,  # noqa: F401
    test_gradients_with_other_settings_are_derivatives,  # noqa: F401
)
from sklearn.linear_model import orthogonal_mp
from topk_sae_laws import (  # noqa: F401
    test_a_fit_keeps_unit_norm_and_starts_from_data,
    test_data_init_runs_once_and_only_if_enabled,
    test_resumed_fit_equals_uninterrupted_fit,
)
from torch import Tensor

import aezoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

SHAPE = (2, 3, 4)


create: Any = aezoo.create_model


def data(n: int) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64) * 4 - 2


def build(name: str = "omp_sae", **settings: Any) -> Any:
    return create(name, input_shape=SHAPE, **({"latent_dim": 30, "k": 5} | settings)).double()


def of_sklearn(model: Any, x: Tensor) -> Tensor:
    W, left = model.decoder.W_NX.detach().numpy(), (x.flatten(1) - model.decoder.b_X).detach().numpy()
    return torch.tensor(orthogonal_mp(W.T, left.T, n_nonzero_coefs=model.k)).reshape(len(W), -1).T


def by_least_squares(model: Any, x: Tensor) -> Tensor:
    """Differentiable least-squares coefficients of the latents chosen by scikit-learn."""
    W, left, codes = model.decoder.W_NX, x.flatten(1) - model.decoder.b_X, []
    for row, chosen in zip(left, of_sklearn(model, x).bool(), strict=True):
        c = torch.linalg.lstsq(W[chosen].T, row[:, None]).solution[:, 0]
        codes.append(torch.zeros(len(W), dtype=x.dtype).masked_scatter(chosen, c))
    return torch.stack(codes)


@pytest.mark.parametrize("likelihood", ["gaussian", "laplace", "logcosh:0.3"])
@pytest.mark.parametrize("k", [1, 5, 12])
def test_codes_match_scikit_learn_omp_with_gradients(k: int, likelihood: str, shifted: Any) -> None:
    model, x = shifted(build(k=k, likelihood=likelihood)), data(8)
    code = by_least_squares(model, x)
    torch.testing.assert_close(model.encode(x), of_sklearn(model, x))
    terms, expected = model.loss(x), model.nll(model.decoder(code), x).mean()
    torch.testing.assert_close(terms["loss"], expected)
    assert terms["l0"] == k
    for a, b in zip(*(torch.autograd.grad(v, [*model.parameters()]) for v in (terms["loss"], expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("likelihood", "same"), [("gaussian", True), ("laplace", False)])
def test_squared_error_gives_full_decoder_gradient(likelihood: str, same: bool, shifted: Any) -> None:
    model, x = shifted(build(likelihood=likelihood)), data(8)
    held = model.nll(model.decoder(model.encode(x).detach()), x).mean()
    whole, part = (torch.autograd.grad(v, model.decoder.W_NX)[0] for v in (model.loss(x)["loss"], held))
    assert torch.allclose(whole, part, rtol=1e-9, atol=1e-9) is same


def test_residual_is_orthogonal_and_shrinks(shifted: Any) -> None:
    model, x = shifted(build(k=12)), data(8)
    lengths = []
    for k in range(1, 13):
        model.k = k
        rest = (x - model(x)).flatten(1)
        chosen = model.encode(x) != 0
        assert (rest @ model.decoder.W_NX.T)[chosen].abs().max() < 1e-12
        assert (chosen.sum(1) == k).all()
        lengths.append(rest.norm(dim=1))
    assert all((b < a).all() for a, b in pairwise(lengths))


def test_k_equal_to_dimension_reconstructs_exactly(shifted: Any) -> None:
    model, x = shifted(build(k=24)), data(5)
    torch.testing.assert_close(model(x), x)


def test_orthogonal_directions_equal_abs_topk(shifted: Any) -> None:
    x, settings = data(20), {"latent_dim": 24, "k": 5}
    model, parallel = shifted(build(**settings)), build("abs_topk_sae", **settings)
    with torch.no_grad():
        torch.nn.init.orthogonal_(model.decoder.W_NX)
        parallel.decoder.load_state_dict(model.decoder.state_dict())
        parallel.encoder.weight.copy_(model.decoder.W_NX)
    torch.testing.assert_close(model.encode(x), parallel.encode(x))


def test_one_step_equals_signed_matching_pursuit(shifted: Any) -> None:
    model, x = shifted(build(k=1)), data(20)
    plain = build("matching_pursuit_sae", k=1)
    plain.load_state_dict(model.state_dict())
    f, g = model.encode(x), plain.encode(x)
    positive = (f >= 0).all(1)
    assert 0 < positive.sum() < 20
    torch.testing.assert_close(f[positive], g[positive])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_combination_is_recovered_exactly(dtype: torch.dtype, shifted: Any) -> None:
    model = shifted(build(k=6)).to(dtype)
    W, b = model.decoder.W_NX.detach(), model.decoder.b_X.detach()
    x = torch.stack([b, b + 3 * W[0], b + 2 * W[4] - W[7]]).reshape(3, *SHAPE)
    f = model.encode(x)
    expected = torch.zeros(3, 30, dtype=dtype)
    expected[1, 0], expected[2, 4], expected[2, 7] = 3, 2, -1
    torch.testing.assert_close(f, expected, rtol=1e-4, atol=1e-5)
    loss = model.loss(x)["loss"]
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_nearly_equal_directions_are_selected_once(shifted: Any) -> None:
    model, x = shifted(build(k=8)).float(), data(6).float()
    with torch.no_grad():
        W = model.decoder.W_NX
        W[10:20] = W[:10] + 1e-6 * torch.randn(10, 24)
        W[20:] = W[:10]
        model.decoder.normalise()
    one = (model.decoder.b_X + torch.linspace(1, 3, 10)[:, None] * W[:10]).reshape(10, *SHAPE)
    assert ((model.encode(one).abs() > 1e-3).sum(1) == 1).all()
    assert (x - model(x)).flatten(1).norm(dim=1).max() < (x.flatten(1) - model.decoder.b_X).norm(dim=1).max()
    model.loss(x)["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_close_directions_are_distinguished_in_float32(shifted: Any) -> None:
    model, x = shifted(build(latent_dim=60, k=20)), data(8)
    with torch.no_grad():
        model.decoder.W_NX[30:] = model.decoder.W_NX[:30] + 0.02 * torch.randn(30, 24)
        model.decoder.normalise()
    exact = model(x)
    torch.testing.assert_close(model.float()(x.float()).double(), exact, rtol=1e-3, atol=1e-3)


def test_autocast_does_not_change_selected_directions() -> None:
    model, x = create("omp_sae", input_shape=(32,), latent_dim=400, k=6), torch.randn(2000, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.encode(x)
        rival = (x @ model.decoder.W_NX.T).abs().argmax(1)
    torch.testing.assert_close(found, model.encode(x))
    assert (rival != (x @ model.decoder.W_NX.T).abs().argmax(1)).any()


@pytest.mark.parametrize("settings", [{"k": 0}, {"k": 31}, {"dead_after": 0}])
def test_invalid_values_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(aezoo.AezooError, match=next(iter(settings))):
        build(**settings)


@pytest.mark.slow
def test_gradients_repeat_exactly_on_two_threads() -> None:
    model, x = create("omp_sae", input_shape=(784,), latent_dim=8, k=4, likelihood="laplace"), torch.rand(64, 784)

    def gradient() -> Tensor:
        return torch.autograd.grad(model.loss(x)["loss"], model.decoder.W_NX)[0]

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(gradient(), first) for first in [gradient()] for _ in range(9))
    finally:
        torch.set_num_threads(threads)
