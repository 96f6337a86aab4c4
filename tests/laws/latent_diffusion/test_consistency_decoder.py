"""Laws of the consistency decoder: preconditioning, noise levels, the ODE's solution, gradients, and its U-Net."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from latent_diffusion_laws import (
    SHAPE,
    X,
    images,
)
from scipy import integrate, stats
from torch import Tensor, nn

import aezoo
from aezoo.errors import AezooError
from aezoo.models.latent_diffusion.consistency_decoder import Block, Denoiser
from aezoo.nets.resnet import ResidualBlock

S_0, S_N, S_D = 0.002, 80.0, 0.5


def small(**settings: Any) -> Any:
    settings = {"latent_dim": 3, "hidden_dims": (8, 6), **settings}
    return aezoo.create_model("consistency_decoder", SHAPE, **settings).double()


def at(sigma: Any) -> Tensor:
    return torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1, 1, 1)


def codes(model: Any, n: int = 6) -> Tensor:
    return torch.randn(n, *model.code_shape, dtype=torch.float64)


def levels(N: int, s_0: float = S_0, s_N: float = S_N) -> np.ndarray:
    """All levels in ascending order: equation 5 of Karras et al. 2022, reversed."""
    found: np.ndarray = np.linspace(s_0 ** (1 / 7), s_N ** (1 / 7), N + 1) ** 7
    return found


class Given(nn.Module):
    """A network that records its inputs and returns a function of them."""

    def __init__(self, make: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.make, self.seen = make, []

    def forward(self, *given: Tensor) -> Tensor:
        self.seen.append(given)
        return self.make(*given)


# ---- preconditioning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sigma_min", [0.002, 0.3])
def test_consistency_function_is_identity_at_least_noise(sigma_min: float, dtype: torch.dtype, shifted: Any) -> None:
    decoder = shifted(small(sigma_min=sigma_min)).decoder.to(dtype)
    x, z = images().to(dtype), torch.randn(6, 3, 3, 2, dtype=dtype)
    assert torch.equal(decoder.f(x, at(sigma_min).to(dtype), z), x)
    assert (decoder.f(x, at(2 * sigma_min).to(dtype), z) - x).abs().max() > 1e-5


@pytest.mark.parametrize("sigmas", [(0.002, 80.0, 0.5), (0.1, 20.0, 1.5)])
def test_preconditioning_matches_diffusers(sigmas: tuple[float, float, float]) -> None:
    from diffusers.schedulers import scheduling_consistency_models as schedulers

    s_0, s_N, s_d = sigmas
    theirs = schedulers.CMStochasticIterativeScheduler(sigma_min=s_0, sigma_max=s_N, sigma_data=s_d)
    decoder = small(sigma_min=s_0, sigma_max=s_N, sigma_data=s_d).decoder
    net = decoder.net = Given(lambda x, level, z: torch.full_like(x, 3.0))
    x, s, z = images(), at([s_0, 0.15, 0.7, 3.0, 11.0, s_N]), torch.randn(6, 3, 3, 2, dtype=torch.float64)
    c_skip, c_out = theirs.get_scalings_for_boundary_condition(s)
    torch.testing.assert_close(decoder.f(x, s, z), c_skip * x + 3 * c_out)
    ((c_in_x, level, seen),) = net.seen
    torch.testing.assert_close(c_in_x, x / (s**2 + s_d**2) ** 0.5)
    torch.testing.assert_close(level, torch.from_numpy(theirs.sigma_to_t(s.numpy())).reshape(6, 1) / 1000)
    assert seen is z


def test_decoding_is_one_step_from_mean_of_maximum_noise(shifted: Any) -> None:
    model = shifted(small(sigma_max=70.0))
    z, s = codes(model), 70.0
    e = model.decoder.net(torch.zeros(6, *SHAPE, dtype=torch.float64), at([math.log(s) / 4] * 6).reshape(6, 1), z)
    torch.testing.assert_close(model.decode(z), S_D * (s - S_0) / (S_D**2 + s**2) ** 0.5 * e)
    assert torch.equal(model.decode(z), model.decode(z))


# ---- levels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigmas", [(0.002, 80.0), (0.05, 10.0)])
@pytest.mark.parametrize("N", [1, 2, 10, 37])
def test_noise_level_distribution_matches_paper(N: int, sigmas: tuple[float, float]) -> None:
    """Evenly spaced u, with the values of section 3.5 and equation 5 of Song & Dhariwal."""
    model, n_u = small(sigma_min=sigmas[0], sigma_max=sigmas[1]), 200_000
    u = (torch.arange(n_u, dtype=torch.float64) + 0.5) / n_u
    low, high = model.pair(u, torch.tensor(float(N)))
    s = levels(N, *sigmas)
    lower, upper = (np.abs(part.numpy()[:, None] - s).argmin(1) for part in (low, high))
    np.testing.assert_allclose(low, s[lower], rtol=1e-9)
    np.testing.assert_allclose(high, s[upper], rtol=1e-9)
    assert (upper == lower + 1).all() and lower.min() == 0 and upper.max() == N
    mass = np.diff([math.erf((math.log(each) + 1.1) / (math.sqrt(2) * 2.0)) for each in s])
    np.testing.assert_allclose(np.bincount(lower, minlength=N) / n_u, mass / mass.sum(), atol=2 / n_u)


@pytest.mark.parametrize("N", [1, 10, 160, 10_000])
def test_float32_noise_levels_reach_both_ends(N: int) -> None:
    model = small()
    ends = torch.tensor([0.0, 1 - 2**-24, 1.0])
    low, high = model.pair(ends, torch.tensor(float(N)))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low[0], torch.tensor(S_0), rtol=1e-5, atol=0)
    torch.testing.assert_close(high[1:], torch.tensor([S_N, S_N]), rtol=1e-5, atol=0)
    assert (high > low).all()


@pytest.mark.parametrize(("s0", "s1", "K"), [(10, 160, 1000), (10, 1280, 800), (2, 12, 40), (7, 7, 30), (1, 100, 7)])
def test_noise_level_count_doubles_as_in_paper(s0: int, s1: int, K: int) -> None:
    """N(k) = min(s0 2^floor(k / K'), s1) with K' = K / (log2(s1 / s0) + 1); equation 4 there rounds K' down."""
    model = small(start_noise_levels=s0, noise_levels=s1, level_steps=K)
    found = []
    for k in range(0, K + 5, max(1, K // 97)):
        model.steps.fill_(k)
        found.append(int(model.n_levels()))
        after = k * (math.log2(s1 / s0) + 1) / K
        # at a doubling, rounding decides
        either = {min(s0 * 2 ** math.floor(after + eps), s1) for eps in (-1e-6, 1e-6)}
        assert found[-1] in either
    assert found[0] == s0 and found[-1] == s1 and found == sorted(found)


def test_zero_level_steps_use_all_levels() -> None:
    model = small(start_noise_levels=3, noise_levels=50, level_steps=0)
    assert model.n_levels() == 50


# ---- consistency loss ------------------------------------------------------------------------------------------------


def by_hand(model: Any, x: Tensor, N: int, stopped: bool = True) -> dict[str, Tensor]:
    """All terms by numpy, scipy and autograd, from the draws that the model makes."""
    z = model.encoder(x)
    u, noise = torch.rand(len(x), 1, 1, 1, dtype=x.dtype), torch.randn_like(x)
    s = levels(N)
    a, b = ((math.log(each) + 1.1) / 2.0 for each in (S_0, S_N))
    drawn = np.exp(stats.truncnorm.ppf(u.flatten().numpy(), a, b, loc=-1.1, scale=2.0))
    n = np.searchsorted(s, drawn, side="right") - 1
    low, high = at(s[n]), at(s[n + 1])

    def f(sigma: Tensor) -> Tensor:
        noisy = x + sigma * noise
        out = model.decoder.net(noisy / (sigma**2 + S_D**2) ** 0.5, 0.25 * sigma.log().reshape(-1, 1), z)
        c_skip = S_D**2 / ((sigma - S_0) ** 2 + S_D**2)
        result: Tensor = c_skip * noisy + S_D * (sigma - S_0) / (S_D**2 + sigma**2) ** 0.5 * out
        return result

    target, c = f(low), 0.00054 * X**0.5
    distance = (((f(high) - (target.detach() if stopped else target)) ** 2).sum((1, 2, 3)) + c**2) ** 0.5 - c
    x_hat = model.decoder(z)
    nll = -torch.distributions.Normal(x_hat, 0.5**0.5).log_prob(x).sum((1, 2, 3)).mean()
    consistency = (distance / (high - low).flatten()).mean()
    return {"nll": nll, "consistency": consistency, "loss": consistency + model.nll_weight * nll}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("step", "N"), [(0, 10), (500, 40), (10**6, 160)])
def test_terms_match_papers(step: int, N: int, training: bool, shifted: Any) -> None:
    model, x = shifted(small(nll_weight=0.7, noise_levels=160)).train(training), images()
    model.steps.fill_(step)
    torch.manual_seed(3)
    found = model.loss(x)
    torch.manual_seed(3)
    expected = by_hand(model, x, N)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=name)


def test_the_target_gets_no_gradient(shifted: Any) -> None:
    model, x = shifted(small(nll_weight=0.0)), images()
    params = [*model.encoder.parameters(), *model.decoder.parameters()]
    of: dict[str, list[Tensor]] = {}
    for name, make in (
        ("found", lambda: model.loss(x)["loss"]),
        ("stopped", lambda: by_hand(model, x, 10)["loss"]),
        ("live", lambda: by_hand(model, x, 10, stopped=False)["loss"]),
    ):
        torch.manual_seed(3)
        of[name] = [*torch.autograd.grad(make(), params)]
    for found, stopped in zip(of["found"], of["stopped"], strict=True):
        torch.testing.assert_close(found, stopped, rtol=1e-6, atol=1e-9)
        assert found.any()
    assert any((a - b).abs().max() > 0.1 * a.abs().max() for a, b in zip(of["found"], of["live"], strict=True))


def test_ema_target_keeps_full_precision_weights(shifted: Any) -> None:
    """Autocast caches rounded weights: those of the pass without gradient must not be used in the other pass."""
    model, x = shifted(small(nll_weight=0.0)).float(), images(64).float()
    grads = []
    for half in (False, True):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            z = model.encode(x).detach()
            loss = model.consistency(x, z).mean()
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.decoder.parameters()])]))
    assert loss.dtype == torch.float32 and F.cosine_similarity(*grads, dim=0) > 0.9


def test_single_level_uses_sample_as_target(shifted: Any) -> None:
    """One step from s_N to s_0, a reconstruction."""
    model, x = shifted(small(start_noise_levels=1, noise_levels=1)), images()
    z = model.encode(x).detach()
    torch.manual_seed(3)
    found = model.consistency(x, z)
    torch.manual_seed(3)
    torch.rand(6, dtype=x.dtype)
    noise = torch.randn_like(x)
    x_hat, c = model.decoder.f(x + S_N * noise, at([S_N] * 6), z), 0.00054 * X**0.5
    target = x + S_0 * noise
    expected = ((x_hat - target).square().sum((1, 2, 3)) + c**2).sqrt() - c
    torch.testing.assert_close(found, expected / (S_N - S_0))


# ---- Gaussian data, for which the ODE has a closed-form solution -----------------------------------------------------


M, S = 0.4, 0.3


def solution(x: Any, sigma: Any) -> Any:
    return M + (x - M) * ((S**2 + S_0**2) / (S**2 + sigma**2)) ** 0.5


def trajectory(x: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Solution of dx / ds = -s d/dx log p_s(x), p_s = N(M, S^2 + s^2), from the largest noise down: (n, D) by (D,)."""
    found = integrate.solve_ivp(
        lambda s, x: s * (x - M) / (S**2 + s**2),
        (sigmas[-1], sigmas[0]),
        x,
        t_eval=sigmas[::-1],
        rtol=1e-10,
        atol=1e-12,
    )
    path: np.ndarray = found.y.T[::-1]
    return path


class Solved(nn.Module):
    """F of the closed-form solution, with an exponent p instead of 1/2."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(p, dtype=torch.float64))

    def forward(self, scaled: Tensor, level: Tensor, z: Tensor) -> Tensor:
        s = torch.exp(4 * level).reshape(-1, 1, 1, 1)
        x = scaled * (s**2 + S_D**2) ** 0.5
        f = M + (x - M) * ((S**2 + S_0**2) / (S**2 + s**2)) ** self.p
        c_skip, c_out = S_D**2 / ((s - S_0) ** 2 + S_D**2), S_D * (s - S_0) / (S_D**2 + s**2) ** 0.5
        return torch.where(s - S_0 > 1e-9, (f - c_skip * x) / c_out.clamp_min(1e-12), 0)


def test_exact_ode_solution_is_consistent_along_trajectory() -> None:
    model, s = small(), levels(40)
    model.decoder.net = Solved()
    path = trajectory(S_N * np.random.default_rng(0).standard_normal(X), s)
    np.testing.assert_allclose(solution(path, s[:, None]), np.broadcast_to(path[0], path.shape), atol=1e-6)
    x = torch.from_numpy(path.copy()).reshape(41, *SHAPE)
    with torch.no_grad():
        f = model.decoder.f(x, at(s), codes(model, 41))
    torch.testing.assert_close(f, x[:1].expand_as(f), rtol=0, atol=1e-6)
    model.decoder.net.p.data.fill_(0.6)
    with torch.no_grad():
        assert (model.decoder.f(x, at(s), codes(model, 41)) - f).abs().max() > 0.1


def test_training_without_a_teacher_tends_to_the_ode_s_solution() -> None:
    """The exponent of zero slope, by the secant method, tends to 1/2 as levels get closer (theorem 2)."""
    off = []
    for N in (10, 40):
        model, slopes = small(start_noise_levels=N, noise_levels=N), []
        for p in (0.48, 0.52):
            model.decoder.net = Solved(p)
            torch.manual_seed(3)
            x = M + S * torch.randn(2000, *SHAPE, dtype=torch.float64)
            loss = model.consistency(x, codes(model, 1)).mean()
            slopes.append(torch.autograd.grad(loss, [model.decoder.net.p])[0].item())
        off.append(abs(0.48 - 0.04 * slopes[0] / (slopes[1] - slopes[0]) - 0.5))
    assert off[1] < 0.01 and off[0] / off[1] == pytest.approx(4, rel=0.15)


# ---- invalid settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma_min": 0.0}, "sigmas must be from 1e-4"),
        ({"sigma_min": 3.0, "sigma_max": 2.0}, "min < max: got 3.0, 2.0"),
        ({"sigma_max": 2e4}, "to 1e4"),
        ({"sigma_data": 0.0}, "sigmas must be from 1e-4"),
        ({"sigma_data": 1e5}, "to 1e4"),
        ({"start_noise_levels": 0}, "from 1 to 10000: got 0"),
        ({"start_noise_levels": 20, "noise_levels": 10}, "must rise"),
        ({"noise_levels": 10_001}, "to 10000"),
        ({"nll_weight": -1.0}, "nll_weight"),
        ({"level_steps": -1}, "level_steps"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AezooError, match=message):
        small(**settings)


# ---- the U-Net -------------------------------------------------------------------------------------------------------


def test_unmodulated_block_equals_residual_block() -> None:
    block, plain = Block(2, 8, "silu").double(), ResidualBlock(2, 8, "silu").double()
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("film")})
    x, level = torch.randn(3, 8, 5, 4, dtype=torch.float64), torch.randn(3, 32, dtype=torch.float64)
    with torch.no_grad():
        block.film.weight.zero_()
        block.film.bias.zero_()
        torch.testing.assert_close(block(x, level), plain(x))
        # with a scale of -1 only the shift remains
        block.film.bias[:8], block.film.bias[8:] = -1.0, torch.arange(8.0)
        h = F.silu(torch.arange(8.0, dtype=torch.float64)).view(1, 8, 1, 1).expand(3, 8, 5, 4)
        torch.testing.assert_close(block(x, level), x + plain.body[5](h))


def test_one_stage_network_matches_hand_written_forward() -> None:
    torch.manual_seed(0)
    net = Denoiser((2, 5, 4), 3, (6,), "silu").double()
    x, z = torch.randn(4, 2, 5, 4, dtype=torch.float64), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    level = torch.linspace(-1.5, 1, 4, dtype=torch.float64)[:, None]
    waves = level * torch.logspace(-1, 1, 16, dtype=torch.float64)
    e = net.embed(torch.cat([waves.cos(), waves.sin()], 1))
    top = net.first(torch.cat([x, F.interpolate(z, (5, 4))], 1))
    below = net.blocks[1](net.blocks[0](net.down[0](top), e), e)
    h = net.blocks[2](net.up[0][1](F.interpolate(below, (5, 4))) + top, e)
    torch.testing.assert_close(net(x, level, z), net.last[1](F.silu(h)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dims", [(), (4,), (4, 6, 5)])
@pytest.mark.parametrize("grid", [(7,), (1, 5), (4, 3, 2)])
def test_output_depends_on_sample_noise_level_and_code(grid: tuple[int, ...], dims: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = Denoiser((2, *grid), 3, dims, "silu").double()
    made: list[Any] = [(2, *grid), (1,), (3, *[2] * len(grid))]
    given = [torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in made]
    out = net(*given)
    assert out.shape == (2, 2, *grid)
    for part in torch.autograd.grad(out[0].square().sum(), given):
        assert part[0].any() and not part[1].any()  # but not on other samples
