"""Laws of VP-VAE, vector perturbation autoencoder (Zhai et al. 2026).

The model was compared with the authors' code, in float64 on equal networks, weights, batch, queue and random numbers,
at three values of eta and k. Differences are relative to the largest value; for gradients, the largest over the
parameters is given.

    https://github.com/zhai-lw/vp-vae, commit 2ae367dc471c7c6d4194232bc10ce8203d98ecce
        vp/vp.py, VectorPerturbation in training   z_q 1.3e-16, nll 0, gradients of 8 parameters 3.8e-16
        ... in evaluation, on equal codes          z_q 5.2e-17, indices equal
        vp/l_utils.py, VectorNorm none-var         term of means 4.2e-16, of variances 0 with N instead of N - 1

Ours sums over channels and positions, theirs is a mean. Differs: their variance divides by N - 1, ours by N, so that
two ranks give the value of one process; the term differs by 0.4 % to 1.2 % at 24 rows, and the paper does not specify
it. They compute codes by k-means of the queue before evaluation; ours are moving averages.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from quantised_laws import (  # noqa: F401
    test_inference_calls_do_not_update_codebook,
)
from torch import Tensor

import aezoo
from aezoo.quantisers import VQ, VectorPerturbation
from aezoo.testing import SharedNoise

D, K, S = 3, 5, 23


NETS: dict[str, Any] = {"net": "mlp", "hidden_dims": (8,), "places": 4, "latent_dim": D, "codebook_size": K}


def built(**settings: Any) -> Any:
    return VectorPerturbation(D, K, **({"queue_size": S, "neighbours": 2} | settings)).double().train()


def draws(n: int, dim: int = D) -> tuple[Tensor, Tensor, Tensor]:
    direction = torch.randn(n, dim, dtype=torch.float64)
    radius, coin = torch.rand(2, n, dtype=torch.float64)
    return direction, radius, coin


# ---- perturbations ---------------------------------------------------------------------------------------------------


def by_numpy(z: Any, queue: Any, given: Any, eta: float, k: int) -> tuple[Any, Any]:
    """Algorithm 1 for each row: perturbations, and whether they are accepted."""
    m, dim, moves, accepted = math.ceil(len(queue) / K), z.shape[1], [], []

    def nth(point: Any, n: int) -> float:
        return float(np.sort(np.linalg.norm(queue - point, axis=1))[n - 1])

    for row, direction, radius, coin in zip(z, *given, strict=True):
        u = direction / np.linalg.norm(direction) * eta * nth(row, m) * radius ** (1 / dim)
        new = row + u
        ratio = (nth(row, k) * nth(row, m) / (nth(new, k) * nth(new, m))) ** dim
        back = np.linalg.norm(u) <= eta * nth(new, m)
        moves.append(u)
        accepted.append(back and coin < min(1.0, ratio))
    return np.stack(moves), np.array(accepted)


@pytest.mark.parametrize(("eta", "k"), [(1.0, 2), (0.4, 1), (1.7, 6)])
def test_perturbations_match_paper_in_numpy(eta: float, k: int) -> None:
    quantiser, z, given = built(eta=eta, neighbours=k), torch.randn(80, D, dtype=torch.float64), draws(80)
    moves, accepted = by_numpy(z.numpy(), quantiser.queue_SD.numpy(), [v.numpy() for v in given], eta, k)
    np.testing.assert_allclose(quantiser.perturb(z, *given).numpy(), np.where(accepted[:, None], moves, 0), atol=1e-12)
    assert 5 < accepted.sum() < 75
    assert quantiser.m == 5 and not quantiser.queue_SD.requires_grad


def test_perturbations_do_not_depend_on_chunk_size(monkeypatch: Any) -> None:
    quantiser, z, given = built(), torch.randn(80, D, dtype=torch.float64), draws(80)
    whole = quantiser.perturb(z, *given)
    monkeypatch.setattr("aezoo.quantisers.vector_perturbation._ROWS", 7)
    torch.testing.assert_close(quantiser.perturb(z, *given), whole)


@pytest.mark.parametrize(
    ("size", "k", "shift"), [(23, 2, 0.0), (200, 8, 0.0), (203, 1, 0.0), (5, 9, 0.0), (203, 8, 300.0)]
)
def test_distances_match_float64_sort_for_any_queue(size: int, k: int, shift: float) -> None:
    quantiser = VectorPerturbation(D, K, queue_size=size, neighbours=k)
    quantiser.queue_SD.add_(shift)
    z = torch.randn(600, D) + shift
    off = np.linalg.norm(z.double().numpy()[:, None] - quantiser.queue_SD.double().numpy(), axis=2)
    expected = np.sort(off, axis=1)[:, [min(k, size) - 1, quantiser.m - 1]]
    np.testing.assert_allclose(torch.stack(quantiser.distances(z), 1).numpy(), expected, rtol=3e-7)


@pytest.mark.slow
def test_perturbations_keep_the_estimated_density() -> None:
    """In one dimension the estimate 1 / D_k can be normalised on a grid: perturbations keep its distribution."""
    torch.manual_seed(0)
    quantiser = VectorPerturbation(1, 6, queue_size=60, neighbours=8, eta=1.5).double()
    quantiser.queue_SD.copy_(torch.randn(60, 1).abs().double() * torch.tensor([-1.0, 3.0]).repeat(30)[:, None])
    grid = torch.linspace(-12, 25, 20_001, dtype=torch.float64)
    density = 1 / quantiser.distances(grid[:, None])[0]
    z = start = grid[torch.multinomial(density, 8000, replacement=True)][:, None]
    free = z
    for _ in range(6):
        given = draws(len(z), 1)
        z = z + quantiser.perturb(z, *given)
        free = free + 1.5 * quantiser.distances(free)[1][:, None] * given[1][:, None] * given[0].sign()
    edges = torch.tensor([-3.0, -1.5, -0.5, 0.5, 2, 4, 8], dtype=torch.float64)

    def shares(rows: Tensor) -> Tensor:
        return torch.bincount(torch.bucketize(rows[:, 0].contiguous(), edges), minlength=8) / len(rows)

    off = (shares(z) - shares(start)).abs()
    assert float(off.max()) < 0.02
    assert float((shares(free) - shares(start)).abs().max()) > 0.05
    assert (z != start).double().mean() > 0.9


def test_perturbations_grow_with_eta_and_with_fewer_codes() -> None:
    z, given, queue = torch.randn(400, D), draws(400), torch.randn(200, D).double()
    lengths = {}
    for size, eta in ((100, 1.0), (10, 1.0), (10, 0.5), (10, 0.0)):
        quantiser = VectorPerturbation(D, size, queue_size=200, eta=eta).double()
        quantiser.queue_SD.copy_(queue)
        lengths[size, eta] = float(quantiser.perturb(z.double(), *given).norm(dim=1).mean())
    assert lengths[10, 1.0] > 1.5 * lengths[100, 1.0] and lengths[10, 1.0] > 1.2 * lengths[10, 0.5]
    assert lengths[10, 0.0] == 0


def test_equal_rows_in_the_queue_stay_finite() -> None:
    quantiser = built()
    quantiser.queue_SD.zero_()
    found = quantiser(torch.zeros(6, D, 2, dtype=torch.float64))
    assert found.z_q.isfinite().all() and all(term.isfinite() for term in found.terms.values())


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_gradient_passes_unchanged_and_codes_get_none() -> None:
    quantiser, z = built(), torch.randn(9, D, 4, dtype=torch.float64, requires_grad=True)
    found, weight = quantiser(z), torch.randn(9, D, 4, dtype=torch.float64)
    (of_z,) = torch.autograd.grad((weight * found.z_q).sum(), z, retain_graph=True)
    assert torch.equal(of_z, weight) and not torch.equal(found.z_q, z)
    assert [*quantiser.parameters()] == []


def test_terms_pull_each_channel_to_mean_0_and_variance_1() -> None:
    quantiser, z = built(), torch.randn(9, D, 4, dtype=torch.float64) * 2 + 1
    rows = z.movedim(1, -1).flatten(0, 1).numpy()
    expected = {"code_mean": 4 * (rows.mean(0) ** 2).sum(), "code_variance": 4 * ((rows.var(0) - 1) ** 2).sum()}
    assert {key: value.item() for key, value in quantiser(z).terms.items()} == pytest.approx(expected)
    whitened = (z - z.mean((0, 2), keepdim=True)) / z.std((0, 2), unbiased=False, keepdim=True)
    assert all(value < 1e-20 for value in quantiser(whitened).terms.values())


def test_ranks_with_global_moments_match_one_process() -> None:
    quantiser, z = built().eval(), (torch.randn(8, D, dtype=torch.float64) * 2 + 1).requires_grad_()

    def gradient(rows: Tensor) -> Tensor:
        return torch.autograd.grad(sum(quantiser(rows).terms.values()), z)[0]

    whole, found = gradient(z), torch.zeros_like(z)
    for half in z.chunk(2):
        moments = iter((z.mean(0).detach(), z.var(0, unbiased=False).detach()))
        quantiser.all_reduce_mean = lambda own, moments=moments: next(moments) + (own - own.detach())
        found += gradient(half) / 2
    torch.testing.assert_close(found, whole)


def test_codebook_is_vq_ema_and_evaluation_takes_nearest() -> None:
    quantiser, other = built(dead_below=0.3, decay=0.8), VQ(D, K, dead_below=0.3, decay=0.8).double().train()
    z = torch.randn(30, D, dtype=torch.float64)
    for each in (quantiser, other):
        each.init_from_data(z)
    for _ in range(4):
        z = torch.randn(30, D, dtype=torch.float64)
        assert torch.equal(quantiser(z).indices, other(z).indices)
    torch.testing.assert_close(quantiser.code_KD, other.code_KD)
    found = quantiser.eval()(z)
    assert torch.equal(found.z_q, other.eval()(z).z_q)
    torch.testing.assert_close(quantiser.codes(found.indices), found.z_q)


def test_zero_perturbation_equals_autoencoder() -> None:
    model: Any = aezoo.create_model("vp_vae", (6,), **NETS, eta=0.0, mean_weight=0.0, variance_weight=0.0).double()
    x = torch.rand(7, 6, dtype=torch.float64)
    terms = model.train().loss(x)
    expected = model.nll(model.decoder(model.encoder(x)), x).mean()
    torch.testing.assert_close(terms["loss"], expected)
    for a, b in zip(*(torch.autograd.grad(v, [*model.parameters()]) for v in (terms["loss"], expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_loss_matches_formula_with_per_sample_noise() -> None:
    model: Any = aezoo.create_model(
        "vp_vae", (6,), **NETS, mean_weight=0.3, variance_weight=0.7, queue_size=S, neighbours=2, share=0.0
    ).double()
    x = torch.rand(7, 6, dtype=torch.float64)
    with SharedNoise(range(7), 7):
        terms = model.train().loss(x)
    total = terms["nll"] + 0.3 * terms["code_mean"] + 0.7 * terms["code_variance"]
    torch.testing.assert_close(terms["loss"], total)
    with SharedNoise([4, 1], 7):
        part = model.quantise(x[[4, 1]]).z_q
    with SharedNoise(range(7), 7):
        torch.testing.assert_close(part, model.quantise(x).z_q[[4, 1]])
    assert not torch.equal(part, model.encoder(x[[4, 1]]))


# ---- the queue -------------------------------------------------------------------------------------------------------


def test_queue_is_first_in_first_out() -> None:
    quantiser = built(share=0.5, queue_size=7, neighbours=2)
    before, seen = quantiser.queue_SD.clone(), []
    for step in range(4):
        z = torch.full((6, D), step + 1.0, dtype=torch.float64)
        quantiser(z)
        seen.append(quantiser.queue_SD[:, 0].tolist())
    assert torch.equal(before[6:, 0], torch.tensor(seen[1][6:], dtype=torch.float64))
    assert seen[0][:3] == [1, 1, 1] and seen[1][:6] == [1, 1, 1, 2, 2, 2]
    assert seen[2] == [3, 3, 1, 2, 2, 2, 3] and seen[3] == [3, 3, 4, 4, 4, 2, 3]
    assert quantiser.next == 5
    state = {key: value.clone() for key, value in quantiser.state_dict().items()}
    quantiser.eval()(z)
    assert all(torch.equal(value, state[key]) for key, value in quantiser.state_dict().items())


def test_queue_takes_spread_rows_of_each_batch() -> None:
    quantiser, z = built(share=0.25, queue_size=20), torch.arange(16.0, dtype=torch.float64)[:, None].expand(16, D)
    for _ in range(4):
        quantiser(z)
    assert [*quantiser.queue_SD[:8, 0]] != [*range(8)]
    taken = [sorted(quantiser.queue_SD[4 * i : 4 * i + 4, 0].tolist()) for i in range(4)]
    assert all(np.diff(part).tolist() == [4, 4, 4] for part in taken) and len({part[0] for part in taken}) == 4


def test_data_init_fills_queue() -> None:
    quantiser, rows = built(), torch.randn(S, D, dtype=torch.float64)
    quantiser.init_from_data(rows)
    assert torch.equal(quantiser.queue_SD, rows)
    quantiser.init_from_data(rows[:5])
    assert len(quantiser.queue_SD.unique(dim=0)) == 5


@pytest.mark.parametrize(
    "wrong",
    [{"eta": -0.1}, {"neighbours": 0}, {"queue_size": 0}, {"share": -1.0}, {"mean_weight": math.nan}, {"decay": 1.0}],
)
def test_invalid_values_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(aezoo.AezooError, match=next(iter(wrong))):
        aezoo.create_model("vp_vae", (6,), **NETS, **wrong)
