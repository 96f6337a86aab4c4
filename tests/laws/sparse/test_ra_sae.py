"""Laws of Relaxed archetypal sparse autoencoder (Fel et al. 2025)."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from archetypal_sae_laws import (  # noqa: F401
    DEAD,
    SHAPE,
    SMALL,
    build,
    create,
    data,
    largest,
    same_gradients,
    test_invalid_values_are_refused,
)
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from torch import Tensor

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- ra_sae: Fel et al. 2025 -----------------------------------------------------------------------------------------


def started(x: Tensor, **settings: Any) -> Any:
    """A model in training mode, initialised from its first batch."""
    model = create("ra_sae", input_shape=tuple(x.shape[1:]), **(SMALL | settings)).to(x.dtype).train()
    model.begin_step(x, 0)
    return model


def away(model: Any, shares: bool = True) -> Any:
    """Add random offsets to the initial weights, within the constraints."""
    with torch.no_grad():
        model.encoder.weight += 0.1 * torch.randn_like(model.encoder.weight)
        model.encoder.bias += 0.4 * torch.randn_like(model.encoder.bias)
        if shares:
            model.decoder.shares_NP += 0.3 * torch.rand_like(model.decoder.shares_NP)
        model.decoder.lambda_NX += 0.1 * torch.randn_like(model.decoder.lambda_NX)
        model.after_optimizer_step()
    return model


def distance_from_hull(d: Tensor, points: Tensor) -> float:
    """The distance of a direction from the convex hull of points, by non-negative least squares.

    An equation of large weight makes the shares sum to 1.
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
def test_directions_stay_within_delta_of_convex_hull(delta: float, digits: Tensor, quiet: Any) -> None:
    x = digits[:150].float()
    model = create("ra_sae", (1, 8, 8), latent_dim=40, k=4, n_points=30, delta=delta, lr=1e-2)
    fit(model, x, quiet)
    decoder = model.decoder
    W, A, Lambda = decoder.shares_NP.detach(), decoder.points_PX, decoder.lambda_NX.detach()
    assert torch.equal(A, x[:30].flatten(1))
    assert (W >= 0).all()
    torch.testing.assert_close(W.sum(1), torch.ones(40))
    assert ((W > 1e-4).sum(1) > 2).any()  # mixtures of several points
    assert Lambda.norm(dim=1).max() <= delta * (1 + 1e-6)
    off = [distance_from_hull(d, A) for d in decoder.directions().detach()[::4]]
    assert max(off) <= delta + 1e-3
    assert delta == 0 or max(off) > delta / 2
    free = fit(create("topk_sae", (1, 8, 8), latent_dim=40, k=4, lr=1e-2), x, quiet, 1).decoder.W_NX.detach()
    assert min(distance_from_hull(d, A) for d in free[::8]) > 0.5


def test_initial_directions_are_points_and_midpoints() -> None:
    x = data(9)
    flat, model = x.flatten(1), started(x, latent_dim=14, n_points=5)
    D = model.decoder.directions()
    torch.testing.assert_close(model.decoder.points_PX, flat[:5])
    torch.testing.assert_close(D[:5], flat[:5])
    middles = [(flat[i % 5] + flat[(i + i // 5) % 5]) / 2 for i in range(5, 14)]
    torch.testing.assert_close(D[5:], torch.stack(middles))
    assert torch.cdist(D, D).add(torch.eye(14)).min() > 1e-3  # all directions differ
    few = started(x[:3], latent_dim=6, n_points=5)  # fewer samples than points
    torch.testing.assert_close(few.decoder.points_PX, flat[[0, 1, 2, 0, 1]])
    D = few.decoder.directions()
    torch.testing.assert_close(D, torch.cat([flat[:3], (flat[:3] + flat[[1, 2, 0]]) / 2]))


@pytest.mark.slow
def test_single_latent_is_its_point_and_points_are_rebuilt() -> None:
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
def test_encoder_init_matches_data_norm(k: int) -> None:
    x = data(20) ** 2
    model = create("ra_sae", SHAPE, **(SMALL | {"k": k}), n_points=10).double().train()
    before = model.encoder.weight.detach().clone()
    model.begin_step(x, 0)
    torch.testing.assert_close(model(x).flatten(1).norm(dim=1).mean(), x.flatten(1).norm(dim=1).mean())
    scale = model.encoder.weight / before
    torch.testing.assert_close(scale, scale.mean().expand_as(scale))
    assert (scale.mean() - 1).abs() > 0.05
    assert not model.encoder.bias.any()


def test_all_zero_data_can_initialise() -> None:
    model = started(torch.zeros(4, *SHAPE))
    terms = model.loss(torch.zeros(4, *SHAPE))
    terms["loss"].backward()
    assert all(p.isfinite().all() and p.grad.isfinite().all() for p in model.parameters())


def test_loss_and_gradients_match_written_formula() -> None:
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


def test_equals_topk_without_biases_on_its_dictionary() -> None:
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
    # Lambda has the gradient g of the directions, and the shares its projections on the points
    (g,) = torch.autograd.grad(others["loss"], plain.decoder.W_NX)
    shares, slack = torch.autograd.grad(terms["loss"], (model.decoder.shares_NP, model.decoder.lambda_NX))
    torch.testing.assert_close(slack, g)
    torch.testing.assert_close(shares, g @ model.decoder.points_PX.T)


def test_training_updates_shares_and_lambda_not_points(digits: Tensor, quiet: Any) -> None:
    x = digits[:150].float()
    model = create("ra_sae", (1, 8, 8), latent_dim=40, k=4, n_points=30, lr=1e-2)
    assert {name for name, _ in model.named_parameters()} == {
        *("encoder.weight", "encoder.bias", "decoder.shares_NP", "decoder.lambda_NX"),
    }
    model.begin_step(x[50:100], 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, x, quiet, 1)
    after = model.state_dict()
    assert torch.equal(after["decoder.points_PX"], before["decoder.points_PX"])  # initialised only once
    for name in ("encoder.weight", "encoder.bias", "decoder.shares_NP", "decoder.lambda_NX"):
        assert (after[name] - before[name]).abs().max() > 1e-3, name


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


def test_radial_gradient_is_kept() -> None:
    model, x = away(started(data(8), n_points=8)), data(6)
    model.loss(x)["loss"].backward()
    before = [p.grad.clone() for p in model.parameters()]
    model.on_before_optimizer_step(torch.optim.SGD(model.parameters(), 1.0))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))
    D, g = model.decoder.directions(), model.decoder.lambda_NX.grad
    assert (D * g).sum(1).abs().max() > 1e-2


@pytest.mark.slow
def test_directions_are_more_stable_than_topk(digits: Tensor, quiet: Any) -> None:
    """The main claim of the paper: two trainings find similar directions."""
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
