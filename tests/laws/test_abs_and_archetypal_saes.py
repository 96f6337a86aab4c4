"""Laws of two kinds of TopK SAE: codes of both signs (AbsTopK), directions that are mixtures of data (archetypal)."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from torch import Tensor

import aezoo
from aezoo.nets.blocks.dictionary import project_to_simplex

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
SHAPE = (2, 3, 4)
SMALL = {"latent_dim": 12, "k": 3}
DEAD = torch.tensor([2, 5, 7])
create: Any = aezoo.create_model


def data(n: int) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64)


def build(name: str, **settings: Any) -> Any:
    return create(name, input_shape=SHAPE, **(SMALL | settings)).double()


def same_gradients(model: Any, first: Tensor, second: Tensor) -> None:
    found = [torch.autograd.grad(value, [*model.parameters()], retain_graph=True) for value in (first, second)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# ---- abs_topk_sae: Zhu et al. 2025 -----------------------------------------------------------------------------------


def largest(pi: Tensor, k: int) -> Tensor:
    """The k entries of each row that are largest in absolute value, by a loop."""
    f = torch.zeros_like(pi)
    for row, values in enumerate(pi.tolist()):
        for i in sorted(range(len(values)), key=lambda i: -abs(values[i]))[:k]:
            f[row, i] = pi[row, i]
    return f


@pytest.mark.parametrize("decode", ["dense", "gather"])
@pytest.mark.parametrize("k", [1, 3, 12])
def test_the_code_has_the_k_largest_of_either_sign_with_all_gradients(k: int, decode: str, shifted: Any) -> None:
    model, x = shifted(build("abs_topk_sae", k=k, decode=decode, multi_weight=0.125)), data(20) * 4 - 2
    W, V, b = model.encoder.weight, model.decoder.W_NX, model.decoder.b_X
    pi = (x.flatten(1) - b) @ W.T + model.encoder.bias
    f = largest(pi, k)
    torch.testing.assert_close(model.encode(x), f)
    assert (f < 0).any(1).float().mean() > 0.2 < (f > 0).any(1).float().mean()
    torch.testing.assert_close(model(x).flatten(1), f @ V + b)
    terms = model.loss(x)
    assert terms["l0"] == k
    wide = largest(pi, min(4 * k, 12)) @ V + b
    sse = [(x.flatten(1) - x_hat).square().sum(1).mean() + 12 * math.log(math.pi) for x_hat in (f @ V + b, wide)]
    torch.testing.assert_close(terms["loss"], sse[0] + sse[1] / 8)
    same_gradients(model, terms["loss"], sse[0] + sse[1] / 8)


def test_the_opposite_sample_has_the_opposite_code(shifted: Any) -> None:
    """About b_pre and without b_enc; TopK gives it other latents."""
    for name, odd in (("abs_topk_sae", True), ("topk_sae", False)):
        model, x = shifted(build(name)), data(9) * 4 - 2
        with torch.no_grad():
            model.encoder.bias.zero_()
        b = model.decoder.b_X.view(SHAPE)
        opposite = 2 * b - x
        assert torch.allclose(model.encode(opposite), -model.encode(x)) == odd
        assert torch.allclose(model(opposite) - b, b - model(x)) == odd
        with torch.no_grad():
            model.encoder.bias += 1
        assert not torch.allclose(model.encode(opposite), -model.encode(x))


def best_sum(x: Tensor, V: Tensor, k: int, lowest: float) -> Tensor:
    """||x - x_hat||^2 of the best sum of k of the directions, least squares for all choices of k."""
    found = []
    for row in x.numpy():
        errors = []
        for which in itertools.combinations(range(len(V)), k):
            D = V[list(which)].numpy().T
            errors.append(2 * scipy.optimize.lsq_linear(D, row, (lowest, np.inf)).cost)
        found.append(min(errors))
    return torch.tensor(found)


def test_with_orthonormal_directions_it_is_the_best_sum_of_k_of_them() -> None:
    """TopK is the best with coefficients of at least 0, and no better than that."""
    x, errors = torch.randn(4, 8, dtype=torch.float64) * 2, {}
    V = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q[:6]
    for name, lowest in (("abs_topk_sae", -np.inf), ("topk_sae", 0)):
        model = create(name, input_shape=(8,), latent_dim=6, k=2).double()
        with torch.no_grad():
            model.decoder.W_NX.copy_(V)
            model.encoder.weight.copy_(V)
            model.decoder.b_X.fill_(0.3)
            errors[name] = (x - model(x)).square().sum(1)
        torch.testing.assert_close(errors[name], best_sum(x - 0.3, V, 2, lowest), rtol=1e-6, atol=1e-9)
    assert (errors["abs_topk_sae"] <= errors["topk_sae"] + 1e-9).all()
    assert (errors["abs_topk_sae"] < errors["topk_sae"] - 1e-2).any()


@pytest.mark.parametrize("aux_scale", ["sse", "variance"])
@pytest.mark.parametrize("decode", ["dense", "gather"])
def test_where_the_largest_are_positive_it_is_topk(decode: str, aux_scale: str, shifted: Any) -> None:
    x, found = data(6), []
    settings = {"decode": decode, "aux_scale": aux_scale, "multi_weight": 0.3, "aux_weight": 0.7, "k_aux": 4}
    for name in ("topk_sae", "abs_topk_sae"):
        torch.manual_seed(3)
        model = shifted(build(name, dead_after=100, **settings))
        with torch.no_grad():
            model.encoder.bias += 20
            model.encoder.bias[DEAD] -= 15
        model.since_fired_N[DEAD] = 100
        assert (model.pre_activations(x) > 0).all()
        terms = model.loss(x)
        assert terms["aux"] > 0
        gradients = torch.autograd.grad(terms["loss"], [*model.parameters()])
        found.append([*terms.values(), model.encode(x), *gradients, model.since_fired_N.double()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("k_aux", [1, 2, 3, 6])
def test_auxk_takes_dead_latents_of_either_sign_and_no_other(k_aux: int, shifted: Any) -> None:
    model, x = shifted(build("abs_topk_sae", dead_after=100, k_aux=k_aux, aux_weight=0.5)), data(5)
    with torch.no_grad():  # live ones outrank them
        model.encoder.bias += 20 * torch.tensor([1.0, -1.0]).repeat(6)
        model.encoder.bias[DEAD] /= 4
    model.since_fired_N[DEAD] = 100
    terms = model.loss(x)
    pi = model.pre_activations(x)
    assert (pi[:, DEAD] > 0).any() and (pi[:, DEAD] < 0).any()
    e = (x - model(x)).detach().flatten(1)
    e_hat = largest(pi[:, DEAD], k_aux) @ model.decoder.W_NX[DEAD]
    expected = (e - e_hat).square().sum(1).mean() * min(3 / k_aux, 1)
    torch.testing.assert_close(terms["aux"], expected)
    same_gradients(model, terms["aux"], expected)
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.5 * expected)
    model.since_fired_N.zero_()
    assert model.loss(x)["aux"] == 0


def test_a_latent_that_is_negative_fires(shifted: Any) -> None:
    model, expected = shifted(build("abs_topk_sae", dead_after=20)), torch.zeros(12, dtype=torch.long)
    with torch.no_grad():
        model.encoder.bias[:6] -= 4
    for n in (2, 9, 4):
        x = data(n) - 0.5
        f = largest(model.pre_activations(x), 3)
        expected = torch.where((f != 0).any(0), 0, expected + n)
        terms = model.train().loss(x)
        assert torch.equal(model.since_fired_N, expected)
        assert terms["dead_latents"] == ((expected >= 20).sum() / 12).item()
    assert ((f < 0).any(0) & ~(f > 0).any(0)).any()
    assert (expected > 0).any()


def test_data_start_the_encoder_where_sums_of_either_sign_are_as_long_as_they(shifted: Any) -> None:
    model, x = shifted(build("abs_topk_sae", data_init=True)).train(), data(30) ** 3 * 5
    model.begin_step(x, 0)
    b = model.decoder.b_X.detach()
    f = largest((x.flatten(1) - b) @ model.encoder.weight.T + model.encoder.bias, 3)
    lengths = [v.norm(dim=1).mean() for v in (x.flatten(1) - b, f @ model.decoder.W_NX)]
    torch.testing.assert_close(*lengths)
    assert (f < 0).any()


def test_both_poles_of_a_direction_are_found_as_one_latent() -> None:
    """Known directions with coefficients of both signs, as many latents as directions: TopK has too few."""
    truth = F.normalize(torch.randn(8, 24), dim=1)
    signs = torch.where(torch.rand(4000, 8) < 0.5, -1.0, 1.0)
    x = (torch.rand(4000, 8) + 0.5) * signs * (torch.rand(4000, 8) < 0.25) @ truth
    recovered = {}
    for name in ("abs_topk_sae", "topk_sae"):
        torch.manual_seed(0)
        model = create(name, input_shape=(24,), latent_dim=8, k=2, dead_after=2000).train()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(400):
            optimizer.zero_grad()
            model.loss(x[torch.randint(4000, (128,))])["loss"].backward()
            model.on_before_optimizer_step(optimizer)
            optimizer.step()
            model.after_optimizer_step()
        best = (truth @ model.decoder.W_NX.T).abs().amax(1)
        fvu = (x - model.eval()(x)).square().sum() / x.square().sum()
        recovered[name] = (int((best > 0.9).sum()), fvu.item())
    assert recovered["abs_topk_sae"][0] >= 7
    assert recovered["abs_topk_sae"][1] < 0.6 * recovered["topk_sae"][1]


# ---- ra_sae: Fel et al. 2025 -----------------------------------------------------------------------------------------


def started(x: Tensor, **settings: Any) -> Any:
    """A model that its first batch has started, in training."""
    model = create("ra_sae", input_shape=tuple(x.shape[1:]), **(SMALL | settings)).to(x.dtype).train()
    model.begin_step(x, 0)
    return model


def away(model: Any, shares: bool = True) -> Any:
    """Off the start, and within the bounds."""
    with torch.no_grad():
        model.encoder.weight += 0.1 * torch.randn_like(model.encoder.weight)
        model.encoder.bias += 0.4 * torch.randn_like(model.encoder.bias)
        if shares:
            model.decoder.shares_NP += 0.3 * torch.rand_like(model.decoder.shares_NP)
        model.decoder.lambda_NX += 0.1 * torch.randn_like(model.decoder.lambda_NX)
        model.after_optimizer_step()
    return model


def off_the_hull(d: Tensor, points: Tensor) -> float:
    """The distance of a direction from the convex hull of points: a quadratic programme, by non-negative squares.

    Weights of any sum are brought near 1 by an equation of great weight.
    """
    A, target = points.double().numpy().T, d.double().numpy()
    heavy = 1e4 * max(1.0, float(np.abs(A).max()))
    shares, _ = scipy.optimize.nnls(np.vstack([A, np.full((1, A.shape[1]), heavy)]), np.append(target, heavy))
    return float(np.linalg.norm(A @ (shares / shares.sum()) - target))


def fit(model: Any, x: Tensor, quiet: Any, epochs: int = 4) -> Any:
    loader = torch.utils.data.DataLoader[Tensor](x, batch_size=50)  # type: ignore[arg-type]
    quiet(max_epochs=epochs).fit(model, loader)
    return model.eval()


@pytest.mark.parametrize("delta", [0.0, 0.3])
def test_after_a_fit_directions_are_within_delta_of_the_hull_of_points(
    delta: float, digits: Tensor, quiet: Any
) -> None:
    x = digits[:150].float()
    model = create("ra_sae", (1, 8, 8), latent_dim=40, k=4, n_points=30, delta=delta, lr=1e-2)
    fit(model, x, quiet)
    decoder = model.decoder
    W, A, Lambda = decoder.shares_NP.detach(), decoder.points_PX, decoder.lambda_NX.detach()
    assert torch.equal(A, x[:30].flatten(1))
    assert (W >= 0).all()
    torch.testing.assert_close(W.sum(1), torch.ones(40))
    assert ((W > 1e-4).sum(1) > 2).any()  # mixtures
    assert Lambda.norm(dim=1).max() <= delta * (1 + 1e-6)
    off = [off_the_hull(d, A) for d in decoder.directions().detach()[::4]]
    assert max(off) <= delta + 1e-3
    assert delta == 0 or max(off) > delta / 2
    free = fit(create("topk_sae", (1, 8, 8), latent_dim=40, k=4, lr=1e-2), x, quiet, 1).decoder.W_NX.detach()
    assert min(off_the_hull(d, A) for d in free[::8]) > 0.5


def test_directions_start_at_the_points_and_in_the_middle_of_two() -> None:
    x = data(9)
    flat, model = x.flatten(1), started(x, latent_dim=14, n_points=5)
    D = model.decoder.directions()
    torch.testing.assert_close(model.decoder.points_PX, flat[:5])
    torch.testing.assert_close(D[:5], flat[:5])
    middles = [(flat[i % 5] + flat[(i + i // 5) % 5]) / 2 for i in range(5, 14)]
    torch.testing.assert_close(D[5:], torch.stack(middles))
    assert torch.cdist(D, D).add(torch.eye(14)).min() > 1e-3  # no two alike
    few = started(x[:3], latent_dim=6, n_points=5)  # a batch of fewer samples: their hull
    torch.testing.assert_close(few.decoder.points_PX, flat[[0, 1, 2, 0, 1]])
    D = few.decoder.directions()
    torch.testing.assert_close(D, torch.cat([flat[:3], (flat[:3] + flat[[1, 2, 0]]) / 2]))


def test_a_latent_alone_is_its_point_and_points_are_soon_rebuilt_from_themselves() -> None:
    x = data(6)
    model = started(x, k=4, n_points=6, latent_dim=48, delta=0.0)
    torch.testing.assert_close(model.decode(torch.eye(48, dtype=torch.float64)[:6]), x)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(600):
        optimizer.zero_grad()
        model.loss(x)["loss"].backward()
        model.on_before_optimizer_step(optimizer)
        optimizer.step()
        model.after_optimizer_step()
    assert (model(x) - x).square().mean() < 0.005 * (x - x.mean(0)).square().mean()
    assert not model.decoder.lambda_NX.any()


@pytest.mark.parametrize("k", [1, 5])
def test_the_encoder_starts_where_sums_of_directions_are_as_long_as_data(k: int) -> None:
    x = data(20) ** 2
    model = create("ra_sae", SHAPE, **(SMALL | {"k": k}), n_points=10).double().train()
    before = model.encoder.weight.detach().clone()
    model.begin_step(x, 0)
    torch.testing.assert_close(model(x).flatten(1).norm(dim=1).mean(), x.flatten(1).norm(dim=1).mean())
    scale = model.encoder.weight / before
    torch.testing.assert_close(scale, scale.mean().expand_as(scale))
    assert (scale.mean() - 1).abs() > 0.05
    assert not model.encoder.bias.any()


def test_zeros_can_start_it() -> None:
    model = started(torch.zeros(4, *SHAPE))
    terms = model.loss(torch.zeros(4, *SHAPE))
    terms["loss"].backward()
    assert all(p.isfinite().all() and p.grad.isfinite().all() for p in model.parameters())


def test_the_loss_is_that_of_the_written_formula_with_all_gradients() -> None:
    x = data(7)
    model = away(started(data(8), n_points=8, dead_after=100, k_aux=3, aux_weight=0.5))
    with torch.no_grad():
        model.encoder.bias += 20
        model.encoder.bias[DEAD] -= 15
    model.since_fired_N[DEAD] = 100
    part = model.decoder
    D = part.shares_NP @ part.points_PX + part.lambda_NX
    flat = x.flatten(1)
    pi = flat @ model.encoder.weight.T + model.encoder.bias
    f = largest(pi, 3).relu()
    assert (pi > 0).all() and not f[:, DEAD].any()
    e = flat - f @ D
    e_hat = pi[:, DEAD] @ D[DEAD]
    nll, aux = e.square().sum(1).mean() + 12 * math.log(math.pi), (e.detach() - e_hat).square().sum(1).mean()
    terms = model.loss(x)
    torch.testing.assert_close(terms["nll"], nll)
    torch.testing.assert_close(terms["aux"], aux)
    torch.testing.assert_close(terms["loss"], nll + 0.5 * aux)
    same_gradients(model, terms["loss"], nll + 0.5 * aux)
    torch.testing.assert_close(model(x).flatten(1), f @ D)


def test_with_its_directions_for_a_dictionary_it_is_topk_without_biases() -> None:
    x, model = data(7), away(started(data(8), n_points=8))
    D = model.decoder.directions()
    plain = build("topk_sae").train()
    with torch.no_grad():
        plain.decoder.W_NX.copy_(D)
        plain.encoder.load_state_dict(model.encoder.state_dict())
    assert not plain.decoder.b_X.any()
    torch.testing.assert_close(model.encode(x), plain.encode(x))
    torch.testing.assert_close(model(x), plain(x))
    terms, others = model.loss(x), plain.loss(x)
    torch.testing.assert_close(terms, others)
    # of a direction's gradient Lambda has all, and each share what lies along its point
    (g,) = torch.autograd.grad(others["loss"], plain.decoder.W_NX)
    shares, slack = torch.autograd.grad(terms["loss"], (model.decoder.shares_NP, model.decoder.lambda_NX))
    torch.testing.assert_close(slack, g)
    torch.testing.assert_close(shares, g @ model.decoder.points_PX.T)


def test_gradients_reach_shares_and_lambda_and_the_points_stay(digits: Tensor, quiet: Any) -> None:
    x = digits[:150].float()
    model = create("ra_sae", (1, 8, 8), latent_dim=40, k=4, n_points=30, lr=1e-2)
    assert {name for name, _ in model.named_parameters()} == {
        *("encoder.weight", "encoder.bias", "decoder.shares_NP", "decoder.lambda_NX"),
    }
    model.begin_step(x[50:100], 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, x, quiet, 1)
    after = model.state_dict()
    assert torch.equal(after["decoder.points_PX"], before["decoder.points_PX"])  # a batch starts it once
    for name in ("encoder.weight", "encoder.bias", "decoder.shares_NP", "decoder.lambda_NX"):
        assert (after[name] - before[name]).abs().max() > 1e-3, name


@pytest.mark.parametrize("size", [1, 2, 7])
def test_rows_move_to_the_nearest_point_of_the_simplex(size: int) -> None:
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
    torch.testing.assert_close(project_to_simplex(found), found)  # what is there stays
    torch.testing.assert_close(project_to_simplex(v + 3), found)  # a number for a whole row changes nothing
    assert project_to_simplex(v.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("delta", [0.0, 0.5, 2.0])
def test_lambda_moves_to_the_nearest_point_of_its_ball(delta: float) -> None:
    model = started(data(8), delta=delta)
    part = model.decoder
    with torch.no_grad():
        part.lambda_NX.copy_(torch.randn(12, 24) * torch.linspace(0, 0.5, 12)[:, None])
        before = part.lambda_NX.clone()
        model.after_optimizer_step()
    norm = before.norm(dim=1, keepdim=True)
    expected = torch.where(norm > delta, before * delta / norm.clamp(min=1e-9), before)
    torch.testing.assert_close(part.lambda_NX.detach(), expected)
    assert (norm <= delta).any() and (norm > delta).any()


def test_no_gradient_is_removed_as_it_is_along_directions_of_unit_norm() -> None:
    model, x = away(started(data(8), n_points=8)), data(6)
    model.loss(x)["loss"].backward()
    before = [p.grad.clone() for p in model.parameters()]
    model.on_before_optimizer_step(torch.optim.SGD(model.parameters(), 1.0))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    D, g = model.decoder.directions(), model.decoder.lambda_NX.grad
    assert (D * g).sum(1).abs().max() > 1e-2


def test_two_fits_on_other_weights_find_more_alike_directions_than_topk(digits: Tensor, quiet: Any) -> None:
    """What the paper is for: the least distance from a direction of one to those of the other is small."""
    x, alike = digits[:400].float(), {}
    for name, extra in (("ra_sae", {"n_points": 50}), ("topk_sae", {})):
        found = []
        for seed in range(2):
            torch.manual_seed(seed)
            rows = torch.randperm(400) if seed else torch.arange(400)
            model = create(name, (1, 8, 8), latent_dim=32, k=4, lr=3e-3, **extra)
            fit(model, x[rows], quiet)
            found.append(F.normalize(model.decoder.directions().detach(), dim=1))
        alike[name] = (found[0] @ found[1].T).abs().amax(1).mean()
    assert alike["ra_sae"] > alike["topk_sae"] + 0.1


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("abs_topk_sae", {"k": 0}),
        ("abs_topk_sae", {"k": 13}),
        ("abs_topk_sae", {"aux_scale": "mse"}),
        ("ra_sae", {"n_points": 0}),
        ("ra_sae", {"delta": -0.1}),
        ("ra_sae", {"delta": math.inf}),
        ("ra_sae", {"delta": math.nan}),
        ("ra_sae", {"k": 13}),
    ],
)
def test_values_that_cannot_work_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(aezoo.AezooError, match=next(iter(settings))):
        build(name, **settings)
