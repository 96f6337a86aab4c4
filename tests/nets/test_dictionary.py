"""Tests of aezoo/nets/blocks/dictionary.py."""

from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

import aezoo
from aezoo.nets.blocks.dictionary import CROSSOVER, Dictionary, geometric_median, project_to_simplex, scatter_code

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def distances(x: Tensor, point: Any) -> tuple[float, Any]:
    """The sum of distances to a point, and its gradient."""
    off = point - x.numpy()
    lengths = np.linalg.norm(off, axis=1, keepdims=True)
    return float(lengths.sum()), (off / lengths).sum(0)


def numerical_median(x: Tensor) -> Any:
    return scipy.optimize.minimize(
        lambda m: distances(x, m), np.median(x.numpy(), 0), jac=True, method="BFGS", options={"gtol": 1e-9}
    )


# ---- the dictionary --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7])
def test_simplex_projection_matches_numerical_optimiser(size: int) -> None:
    v = torch.randn(12, size, dtype=torch.float64) * torch.logspace(-2, 1, 12, dtype=torch.float64)[:, None]
    found = project_to_simplex(v)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(12, dtype=torch.float64))
    for row, near in zip(v.numpy(), found.numpy(), strict=True):
        best = scipy.optimize.minimize(
            lambda w, row=row: ((w - row) ** 2).sum(),
            np.full(size, 1 / size),
            jac=lambda w, row=row: 2 * (w - row),
            bounds=[(0, None)] * size,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
            method="SLSQP",
            options={"ftol": 1e-14},
        )
        np.testing.assert_allclose(near, best.x, atol=1e-5)
    torch.testing.assert_close(project_to_simplex(found), found)  # idempotent
    torch.testing.assert_close(project_to_simplex(v + 3), found)  # invariant to a constant added to all values
    assert project_to_simplex(v.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("case", ["normal", "outliers", "off centre"])
def test_geometric_median_matches_numerical_optimiser(case: str) -> None:
    x = torch.randn(40, 5, dtype=torch.float64)
    if case == "outliers":
        x[:12] += 1000
    if case == "off centre":
        x = x.exp() * 3 - 7
    found = geometric_median(x).numpy()
    best = numerical_median(x)
    np.testing.assert_allclose(found, best.x, atol=1e-5)
    assert distances(x, found)[0] <= best.fun * (1 + 1e-12)
    assert np.abs(found - x.mean(0).numpy()).max() > 1e-2  # the mean differs


def test_geometric_median_may_coincide_with_a_sample() -> None:
    """Weiszfeld's plain iteration divides by 0 at a sample, and stops there even if it is not the median."""
    x = torch.randn(9, 3, dtype=torch.float64)
    several = torch.cat([x, x[:1].expand(12, 3)])
    torch.testing.assert_close(geometric_median(several), x[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(geometric_median(x[:1].expand(5, 3)), x[0])
    # the mean, where the iteration starts, is a sample
    line = torch.tensor([[-2.0], [-1.5], [-1.0], [0.0], [4.5]], dtype=torch.float64)
    assert line.mean() == 0
    torch.testing.assert_close(geometric_median(line), line[2], rtol=0, atol=1e-6)


def test_bf16_gathered_rows_are_summed_in_float32() -> None:
    values, index = torch.rand(4, 200).bfloat16(), torch.rand(4, 300).topk(200).indices
    dictionary = Dictionary(300, (7,), "gather").bfloat16()
    found = dictionary.sum_of_directions(values, index)
    exact = scatter_code(values, index, 300).double() @ dictionary.W_NX.double()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.bfloat16(), rtol=2**-7, atol=1e-6)
    found.float().sum().backward()
    assert dictionary.W_NX.grad is not None


def test_auto_decode_switches_at_measured_crossover() -> None:
    dictionary = Dictionary(2 * CROSSOVER["cpu"], (7,))
    assert [dictionary.uses_gather(k) for k in (1, 2, 3, 100)] == [True, True, False, False]
    assert not any(Dictionary(2 * CROSSOVER["cpu"], (7,), "dense").uses_gather(k) for k in (1, 2, 3))
    assert not dictionary.to("meta").uses_gather(1)  # no crossover was measured on this device


# ---- normalised samples ----------------------------------------------------------------------------------------------

SHAPE, N = (2, 3), 10
MODELS = {
    "sae_l1": {"l1": 0.3},
    "gated_sae": {"l1": 0.3, "form": "april"},
    "jumprelu_sae": {"threshold": 0.2},
    "topk_sae": {"k": 3, "k_aux": 2, "multi_weight": 0.1, "dead_after": 5},
    "abs_topk_sae": {"k": 3},
    "batch_topk_sae": {"k": 3},
    "matryoshka_sae": {"k": 3, "fractions": (0.5,)},
}


def pair(name: str, input_norm: str, **settings: Any) -> tuple[Any, Any]:
    """Models of equal weights, with and without input_norm."""
    made = []
    for kind in (input_norm, "none"):
        torch.manual_seed(4)
        model = aezoo.create_model(name, SHAPE, latent_dim=N, input_norm=kind, **MODELS[name], **settings).double()
        with torch.no_grad():
            for p in model.parameters():
                p += 0.3 * torch.rand_like(p)
        made.append(model)
    return made[0], made[1]


def by_hand(x: Tensor, input_norm: str) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised samples, offset and scale, a loop over samples with numpy."""
    rows = []
    for row in x.flatten(1).numpy():
        offset, scale = (row.mean(), row.std(ddof=1)) if input_norm == "layer_norm" else (0, np.sqrt((row**2).mean()))
        eps = 1e-5 if input_norm == "layer_norm" else 0
        rows.append(((row - offset) / (scale + eps), offset, scale))
    normed, offsets, scales = (torch.as_tensor(np.array(part)) for part in zip(*rows, strict=True))
    return normed.view_as(x), offsets, scales


@pytest.mark.parametrize("input_norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("name", MODELS)
def test_input_norm_equals_normalising_samples_before(name: str, input_norm: str) -> None:
    x = 3 * torch.randn(12, *SHAPE, dtype=torch.float64) + 1
    x_n, offset, scale = by_hand(x, input_norm)
    model, plain = pair(name, input_norm)
    for training in (True, False):
        found, expected = model.train(training).loss(x), plain.train(training).loss(x_n)
        assert found.keys() == expected.keys()
        for term in found:
            torch.testing.assert_close(found[term], expected[term])
    code = model.encode(x)
    assert code.shape == (12, N + 2) == (12, *model.code_shape) and not model.sparse_code and plain.sparse_code
    torch.testing.assert_close(code, torch.cat([plain.encode(x_n), offset[:, None], scale[:, None]], 1))
    x_hat = plain(x_n) * scale[:, None, None] + offset[:, None, None]
    torch.testing.assert_close(model(x), x_hat)
    torch.testing.assert_close(model.decode(code), x_hat)
    torch.testing.assert_close(model.score(x), model.nll(x_hat, x))


@pytest.mark.parametrize("name", ["sae_l1", "topk_sae"])
def test_data_init_uses_normalised_samples(name: str) -> None:
    x = 3 * torch.randn(12, *SHAPE, dtype=torch.float64) + 1
    model, plain = pair(name, "layer_norm", data_init=True)
    model.train().begin_step(x, 0)
    plain.train().begin_step(by_hand(x, "layer_norm")[0], 0)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)


def test_dead_latents_restart_from_normalised_samples() -> None:
    x = 3 * torch.randn(12, *SHAPE, dtype=torch.float64) + 1
    model, plain = pair("sae_l1", "layer_norm")
    for each, batch in ((model, x), (plain, by_hand(x, "layer_norm")[0])):
        each.since_fired_N[:4] = 10**6
        each.resample(batch, torch.optim.Adam(each.parameters()), 3)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)


def test_samples_without_variation_have_finite_codes() -> None:
    for kind in ("layer_norm", "rms_norm"):
        model, _ = pair("topk_sae", kind)
        assert model(torch.zeros(2, *SHAPE, dtype=torch.float64)).isfinite().all()


def test_unknown_or_unsuitable_input_norm_is_refused() -> None:
    with pytest.raises(aezoo.AezooError, match="input_norm must be one of none, layer_norm, rms_norm"):
        aezoo.create_model("topk_sae", SHAPE, input_norm="batch_norm")
    with pytest.raises(aezoo.AezooError, match="use likelihood='gaussian'"):
        aezoo.create_model("sae_l1", SHAPE, input_norm="layer_norm", likelihood="bernoulli")


@pytest.mark.parametrize("name", ["topk_sae", "batch_topk_sae", "matryoshka_sae"])
def test_unit_norm_of_directions_can_be_disabled(name: str) -> None:
    free, bound = (
        aezoo.create_model(name, SHAPE, latent_dim=N, k=3, unit_norm=unit_norm).double() for unit_norm in (False, True)
    )
    for model in (free, bound):
        model.decoder.W_NX.data.mul_(2)
        model.decoder.W_NX.grad = torch.ones_like(model.decoder.W_NX)
        model.on_before_optimizer_step(torch.optim.Adam(model.parameters()))
        model.after_optimizer_step()
    assert (free.decoder.W_NX.grad == 1).all() and not (bound.decoder.W_NX.grad == 1).all()
    torch.testing.assert_close(free.decoder.W_NX.norm(dim=1), torch.full((N,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(bound.decoder.W_NX.norm(dim=1), torch.ones(N, dtype=torch.float64))
    bound.load_state_dict(free.state_dict())
    x = torch.randn(5, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(free.train().loss(x)["loss"], bound.train().loss(x)["loss"])
