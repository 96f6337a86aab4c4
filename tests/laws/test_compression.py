"""Laws of the compression family: rates against scipy, bounds, who sees whom, and what whole numbers stand for."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from scipy import stats
from torch import Tensor

import aezoo
from aezoo import entropy
from aezoo.entropy import LEAST, LEVELS, MOST, Factorised, Gaussians, Noise, Rounding, Taking, gaussian_tables
from aezoo.errors import AezooError
from aezoo.nets.gdn import GDN

NAMES = aezoo.list_models(family="compression")
WITH_SIDE = [name for name in NAMES if name != "factorized_prior"]
# a law that depends on places before, or of the other colour
IN_STEPS = ["joint_ar_hyperprior", "checkerboard", "elic"]
SHAPE = (2, 11, 10)
SMALL: dict[str, Any] = {"hidden_dims": (6, 8), "latent_dim": 5, "hyper_dim": 3, "hyper_hidden_dims": (4,)}


def small(name: str, shape: tuple[int, ...] = SHAPE, **settings: Any) -> Any:
    """A model in float64 away from where it starts: wide codes, laws of many scales."""
    known = aezoo.registry.hyperparameters(name)
    given = {"groups": (1, 1, 3), "reach": 2, **SMALL, **settings}
    model = aezoo.create_model(name, shape, **{key: value for key, value in given.items() if key in known}).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        [*model.encoder.parameters()][-1].mul_(20)
        [*model.encoder.parameters()][-2].mul_(20)
    return model


def data(n: int = 4, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


# ---- laws of single values -------------------------------------------------------------------------------------------


def spread(channels: int = 3) -> Factorised:
    density = Factorised(channels).double()
    with torch.no_grad():
        for p in density.parameters():
            p += 0.3 * torch.randn_like(p)
    return density


def test_gaussian_masses_are_those_of_scipy_far_out_too() -> None:
    scale = torch.logspace(math.log10(0.11), 2, 25, dtype=torch.float64)[:, None]
    v = torch.tensor([-300.0, -31.3, -2.5, -0.4, 0.0, 0.3, 7.0, 45.2, 900.0], dtype=torch.float64)
    mean = torch.tensor(0.7, dtype=torch.float64)
    found = Gaussians(mean, scale, 0).log_mass(v.expand(25, -1))
    # the tail that does not cancel: log(F(u) - F(l)) = log F(u) + log(1 - F(l) / F(u)) with both below the mean
    off = (v - mean).abs().numpy()
    upper, lower = (stats.norm.logcdf((half - off) / scale.numpy()) for half in (0.5, -0.5))
    np.testing.assert_allclose(found.numpy(), upper + np.log1p(-np.exp(lower - upper)), rtol=1e-9)
    near = stats.norm.cdf((v + 0.5 - 0.7) / scale) - stats.norm.cdf((v - 0.5 - 0.7) / scale)
    np.testing.assert_allclose(found.exp().numpy(), near, rtol=1e-6, atol=1e-15)


def test_gaussian_masses_and_their_gradients_are_finite_in_float32_everywhere() -> None:
    v = torch.tensor([0.0, 0.5, 30.0, 1e3, 1e6], requires_grad=True)
    for scale in (LEAST, 1.0, MOST):
        width = torch.full((5,), scale, requires_grad=True)
        found = Gaussians(torch.zeros(5), width, 0).log_mass(v)
        gradients = torch.autograd.grad(found.sum(), [v, width])
        assert all(bool(values.isfinite().all()) for values in (found, *gradients)), scale


def test_gradients_of_gaussian_masses_are_those_of_float64_however_far_out() -> None:
    """A code that is far from its mean is drawn to it by -(v - mean -+ 1/2) / s^2, and its scale by the square."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        v = torch.tensor([0.3, -2.0, 30.0, 100.0, -1e3, 1e4, 1e5, 1e6], dtype=dtype, requires_grad=True)
        width = torch.tensor([[LEAST], [0.8], [20.0], [MOST]], dtype=dtype).expand(-1, 8).clone().requires_grad_()
        log_mass = Gaussians(torch.zeros(8, dtype=dtype), width, 0).log_mass(v.expand(4, -1))
        found[dtype] = [slope.double() for slope in torch.autograd.grad(log_mass.sum(), [v, width])]
    by_hand = -(1e6 - 0.5) * sum(scale**-2 for scale in (LEAST, 0.8, 20.0, MOST))
    assert float(found[torch.float64][0][-1]) == pytest.approx(by_hand, rel=1e-4)
    for mine, exact in zip(*found.values(), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-3, atol=1e-5)


def test_a_factorised_law_is_a_distribution_function_with_its_median_at_the_parameter() -> None:
    density = spread()
    off = torch.linspace(-400, 400, 20_001, dtype=torch.float64).expand(3, -1)
    F_CN = density.logits(off).sigmoid().detach()
    assert bool((F_CN.diff(dim=1) >= 0).all())
    assert float(F_CN[:, 0].max()) < 0.01 and float(F_CN[:, -1].min()) > 0.99
    torch.testing.assert_close(density.logits(torch.zeros(3, 1).double()).detach(), torch.zeros(3, 1).double())
    law = density.law((1, 3))
    assert torch.equal(law.mean[0], density.median_C) and bool((density.median_C != 0).all())


def test_factorised_masses_are_integrals_of_the_density() -> None:
    density = spread()
    v = torch.tensor([[-3.2, 0.4, 6.0], [1.1, -9.0, 0.2]], dtype=torch.float64)
    fine = torch.linspace(-0.5, 0.5, 2_001, dtype=torch.float64)
    off = ((v - density.median_C).T[..., None] + fine).flatten(1).requires_grad_()
    (slope,) = torch.autograd.grad(density.logits(off).sigmoid().sum(), off)
    expected = torch.trapezoid(slope.view(3, 2, -1), fine, dim=2).T
    torch.testing.assert_close(density.law((2, 3)).log_mass(v).exp(), expected, rtol=1e-5, atol=1e-10)


def test_factorised_masses_of_all_whole_numbers_sum_to_one() -> None:
    density = spread()
    k = torch.arange(-3000.0, 3001.0, dtype=torch.float64)
    mass = density.law((6001, 3)).log_mass(density.median_C + k[:, None]).exp()
    torch.testing.assert_close(mass.sum(0), torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_tables_hold_the_masses_of_their_laws() -> None:
    density = spread()
    for c, (low, mass) in enumerate(density.tables()):
        k = torch.arange(low, low + len(mass), dtype=torch.float64)
        v = density.median_C.detach() + k[:, None]
        found = density.law(v.shape).log_mass(v)[:, c].exp()
        np.testing.assert_allclose(mass, found.detach().numpy(), rtol=1e-6, atol=1e-14)
        assert 1 - 1e-6 < mass.sum() <= 1 and low < 0 < low + len(mass)
    scales = np.geomspace(LEAST, MOST, LEVELS)
    for scale, (low, mass) in zip(scales, gaussian_tables(), strict=True):
        k = np.arange(low, low + len(mass))
        expected = stats.norm.cdf((k + 0.5) / scale) - stats.norm.cdf((k - 0.5) / scale)
        np.testing.assert_allclose(mass, expected, rtol=1e-9, atol=1e-15)
        assert 1 - 1e-8 < mass.sum() <= 1
    between = np.exp((np.log(scales[1:]) + np.log(scales[:-1])) / 2)
    given = torch.tensor([0.001, *between * 0.999, 1e6], dtype=torch.float64)
    assert Gaussians(given, given, 7).table.tolist() == [7, *range(7, 7 + LEVELS - 1), 7 + LEVELS - 1]
    assert Gaussians(given, given * 1.001 / 0.999, 7).table[1:-1].tolist() == [*range(8, 7 + LEVELS)]


def test_a_scale_stays_within_what_tables_hold() -> None:
    raw = torch.tensor([-1e4, -3.0, 0.0, 5.0, 1e4])
    found = entropy.scale_of(raw)
    torch.testing.assert_close(found[1:4], LEAST + torch.log1p(raw[1:4].exp()))
    assert float(found[0]) == pytest.approx(LEAST) and float(found[-1]) == MOST


# ---- the objective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lam", [0.0018, 0.05])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_paper_s_rate_and_distortion(name: str, lam: float, training: bool) -> None:
    """R + lam 255^2 MSE with R in bits a pixel, times pixels and log 2, and the constant of the likelihood."""
    model, x = small(name, lam=lam).train(training), data()
    seen: list[Tensor] = []
    model.decoder.register_forward_hook(lambda *args: seen.append(args[2]))
    terms = model.loss(x)
    pixels = math.prod(SHAPE[1:])
    mse = ((x - seen[0]) ** 2).mean()
    constant = model.weight * x[0].numel() / 2 * math.log(math.pi)
    expected = (terms["bpp"] + lam * 255**2 * mse) * pixels * math.log(2) + constant
    torch.testing.assert_close(terms["loss"], expected)
    torch.testing.assert_close(terms["rate"], terms["bpp"] * pixels * math.log(2))


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_negative_elbo_of_a_uniform_posterior(name: str) -> None:
    """Ballé et al. 2017, section 4: p(x|y~) = N(x; g(y~), 1 / (2 weight)), q = U about y, whose log density is 0."""
    model, x = small(name, lam=0.003).train(), data()
    seen: list[Tensor] = []
    model.decoder.register_forward_hook(lambda *args: seen.append(args[2]))
    terms = model.loss(x)
    sigma = (2 * model.weight) ** -0.5
    log_px = D.Normal(seen[0], sigma).log_prob(x).flatten(1).sum(1).mean()
    elbo = log_px - terms["rate"]
    constant = x[0].numel() * (math.log(sigma * math.sqrt(2 * math.pi)) - model.weight / 2 * math.log(math.pi))
    torch.testing.assert_close(terms["loss"] + constant, -elbo)


def test_the_rate_of_noise_is_the_kl_of_the_uniform_posterior_to_the_smoothed_law() -> None:
    """E_u[-log P(y + u)], P the density of law * U(-1/2, 1/2): here by quadrature with scipy's normal distribution."""
    y, mean, scale = 1.3, 0.4, 0.8
    u = np.linspace(-0.5, 0.5, 20_001)
    density = stats.norm.cdf((y + u + 0.5 - mean) / scale) - stats.norm.cdf((y + u - 0.5 - mean) / scale)
    expected = np.trapezoid(-np.log(density), u)
    noise = Noise()
    ones = torch.ones(100_000, 1, dtype=torch.float64)
    noise(y * ones, Gaussians(mean * ones, scale * ones, 0))
    assert isinstance(noise.rate_B, Tensor)
    assert float(noise.rate_B.mean()) == pytest.approx(expected, abs=5 * float(noise.rate_B.std()) / math.sqrt(100_000))


def test_noise_is_uniform_about_the_value() -> None:
    passed = Noise().change(torch.full((50_000,), 3.0, dtype=torch.float64))
    assert stats.kstest(passed.numpy(), "uniform", args=(2.5, 1)).pvalue > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_vectors_and_maps_count_bits_a_place(name: str) -> None:
    if name in IN_STEPS:
        with pytest.raises(AezooError, match="a code without places: take gdn or conv, or mean_scale_hyperprior"):
            small(name, (7,), net="mlp")
        return
    model = small(name, (7,), net="mlp").eval()
    terms = model.loss(data(shape=(7,)))
    torch.testing.assert_close(terms["bpp"], terms["rate"] / math.log(2) / 7)
    assert model.weight == pytest.approx(0.01 * 255**2 * math.log(2))
    assert small(name).weight == pytest.approx(0.01 * 255**2 * math.log(2) / SHAPE[0])


# ---- what is coded, and in which order -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_whole_numbers_are_all_that_a_code_needs(name: str) -> None:
    model, x = small(name).float().eval(), data().float()
    symbols = model.encode_symbols(x)
    assert symbols.dtype == torch.long and int(symbols.abs().max()) > 3
    assert torch.equal(model.codes(symbols), model.encode(x))
    assert torch.equal(model.decode(model.codes(symbols)), model(x))


@pytest.mark.parametrize("name", NAMES)
def test_in_bf16_whole_numbers_are_all_that_a_code_needs_too(name: str) -> None:
    """Numbers above 256 are none of bf16, so that sums with means must be taken in float32 by writer and reader."""
    model, x = small(name).bfloat16().eval(), data().bfloat16()
    with torch.no_grad():
        for p in [*model.encoder.parameters()][-2:]:
            p.mul_(20)
    symbols = model.encode_symbols(x)
    assert int(symbols.abs().max()) > 300
    assert torch.equal(model.codes(symbols).to(x.dtype), model.encode(x))
    assert bool(model.sample(3).isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_the_encoder_s_output_to_half_a_step(name: str) -> None:
    model, x = small(name).train(), data()  # in training, too, a code is a rounded one
    assert torch.equal(model.encode(x), model.encode(x))
    off = (model.encode(x) - model.encoder(x)).detach().abs()
    assert 0.3 < float(off.max()) <= 0.5 + 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_score_is_the_loss_of_a_sample_as_it_is_evaluated(name: str) -> None:
    model, x = small(name).eval(), data()
    alone = torch.stack([model.loss(x[i : i + 1])["loss"] for i in range(len(x))])
    torch.testing.assert_close(model.score(x), alone)
    torch.testing.assert_close(model.train().score(x), alone)


@pytest.mark.parametrize("name", NAMES)
def test_a_map_s_law_sees_only_what_was_coded_before(name: str) -> None:
    """Change whole numbers from some place on: the laws of everything up to there are the same to the last bit."""
    model, x = small(name).eval(), data(2)
    symbols = model.encode_symbols(x)

    def laws(given: Tensor) -> Tensor:
        take, means, start = entropy.one_by_one(given), [], [0]

        class Watching(Taking):
            def change(self, v: Tensor, law: Any) -> Tensor:
                scale = getattr(law, "scale", law.mean)
                means.append(torch.stack([law.mean, scale]).flatten(2))
                start.append(start[-1] + law.mean[0].numel())
                return super().change(v, law)

        model.walk(Watching(take), None, len(given))
        ends.update(start)
        return torch.cat(means, 2)

    ends: set[int] = set()
    before = laws(symbols)
    steps = sorted(ends)
    calls = {"factorized_prior": 1, "joint_ar_hyperprior": 1 + 9, "checkerboard": 1 + 2, "elic": 1 + 2 * 3}
    assert len(steps) - 1 == calls.get(name, 2)
    changed = 0
    for start, end in itertools.pairwise(steps):
        other = symbols.clone()
        other[:, start:end] += 3
        after = laws(other)
        assert torch.equal(after[..., :end], before[..., :end])
        changed += end < steps[-1] and not torch.equal(after[..., end:], before[..., end:])
    assert changed == calls.get(name, 2) - 1  # and each says something of what comes after it


def test_places_in_turn_are_the_one_convolution_of_training() -> None:
    """With what training would see, y^ for y~, the laws of all places at once have the rate of place after place."""
    model, x = small("joint_ar_hyperprior").eval(), data()
    coder, y = Rounding(), model.encoder(x)
    y_hat = model.walk(coder, y, len(x))
    at_once = Rounding()
    said = model.said(at_once, y, len(x))
    at_once.count(y_hat, model.law(*model.context(said, model.context.seen(y_hat))))
    torch.testing.assert_close(coder.rate_B, at_once.rate_B)


def test_no_place_sees_itself_or_a_later_one_in_training() -> None:
    model = small("joint_ar_hyperprior")
    y = torch.randn(1, *model.code_shape, dtype=torch.float64, requires_grad=True)
    said = torch.zeros(1, 2 * model.code_shape[0], *model.grid, dtype=torch.float64)
    mean, raw = model.context(said, model.context.seen(y))
    height, width = model.grid
    for t in range(height * width):
        (slope,) = torch.autograd.grad((mean + raw).flatten(2)[..., t].sum(), y, retain_graph=True)
        seen = slope.abs().sum((0, 1)).flatten() > 0
        near = [abs(s // width - t // width) <= 2 and abs(s % width - t % width) <= 2 for s in range(height * width)]
        assert seen.tolist() == [s < t and near[s] for s in range(height * width)]


@pytest.mark.parametrize("name", ["checkerboard", "elic"])
@pytest.mark.parametrize("shape", [(1, 11, 10), (1, 11), (1, 6, 7, 8)])
def test_anchors_see_nothing_of_their_channels_and_others_see_anchors(name: str, shape: tuple[int, ...]) -> None:
    model = small(name, shape, hidden_dims=(6,), groups=(2,), latent_dim=2)
    parity = sum(np.indices(model.grid)).flatten() % 2
    assert parity[model.anchors].sum() == 0 and parity[model.others].all()
    assert sorted([*model.anchors.tolist(), *model.others.tolist()]) == [*range(parity.size)]
    context = model.contexts[0]
    y = torch.randn(1, 2, *model.grid, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(context.seen(y).flatten(2)[..., model.others].sum(), y)
    seen = slope.abs().sum((0, 1)).flatten() > 0
    assert bool(seen[model.anchors].all()) and not bool(seen[model.others].any())


def test_a_scale_hyperprior_sees_magnitudes_alone_and_expects_zero() -> None:
    model = small("scale_hyperprior").eval()
    y = 10 * torch.randn(2, *model.code_shape, dtype=torch.float64)
    coders = [Rounding(), Rounding()]
    found = [model.walk(coder, sign * y, 2) for coder, sign in zip(coders, (1, -1), strict=True)]
    torch.testing.assert_close(found[0], -found[1])
    torch.testing.assert_close(coders[0].rate_B, coders[1].rate_B)
    assert torch.equal(found[0], found[0].round())


def test_a_mean_scale_hyperprior_of_means_zero_is_a_scale_hyperprior() -> None:
    """Neutral limit: both with one positive side information and the same scales."""
    both = [small(name).eval() for name in ("scale_hyperprior", "mean_scale_hyperprior")]
    one, two = both
    two.load_state_dict({k: v for k, v in one.state_dict().items() if not k.startswith("hyper_decoder")}, strict=False)
    channels = one.code_shape[0]
    with torch.no_grad():
        for mine, its in zip(one.hyper_decoder.parameters(), two.hyper_decoder.parameters(), strict=True):
            if mine.shape == its.shape:
                its.copy_(mine)
        # the last layer is transposed: (in, out, ...)
        weight, bias = [*two.hyper_decoder.parameters()][-2:]
        weight.zero_()
        bias.zero_()
        weight[:, channels:], bias[channels:] = [*one.hyper_decoder.parameters()][-2:]
        for model in both:
            model.encoder[-1].weight.abs_()
            model.encoder[-1].bias.fill_(100.0)  # codes above 0, of which magnitudes are the same
    x = data()
    terms = [model.loss(x) for model in both]
    for term in terms[0]:
        torch.testing.assert_close(terms[0][term], terms[1][term])


def test_elic_in_one_group_is_a_checkerboard() -> None:
    one, two = small("checkerboard").eval(), small("elic", groups=(5,), net="gdn").eval()
    two.load_state_dict(one.state_dict())
    x = data()
    for term, value in one.loss(x).items():
        torch.testing.assert_close(two.loss(x)[term], value)


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_laws_of_the_model(name: str) -> None:
    """Whole numbers drawn under the first law, that of a channel without anything before, come as often as it says."""
    model = small(name).eval()
    seen: list[Tensor] = []

    class Watching(Taking):
        def change(self, v: Tensor, law: Any) -> Tensor:
            found = super().change(v, law)
            seen.append((found - law.mean).round())
            return found

    original, entropy.Taking = entropy.Taking, Watching  # type: ignore[misc]
    try:
        torch.manual_seed(0)
        model.sample(300)
    finally:
        entropy.Taking = original  # type: ignore[misc]
    first = seen[0].flatten(2)
    for c, (low, mass) in enumerate(model.density.tables()):
        drawn = first[:, c].flatten().long().numpy() - low
        share = np.bincount(drawn, minlength=len(mass))[: len(mass)]
        likely = mass * drawn.size > 5
        assert likely.sum() > 2
        expected = mass[likely] / mass[likely].sum() * share[likely].sum()
        assert stats.chisquare(share[likely], expected).pvalue > 1e-4


# ---- divisive normalisation ------------------------------------------------------------------------------------------


def test_gdn_divides_by_the_joint_size_of_channels() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    layer, mirror = GDN(3).double(), GDN(3, inverse=True).double()
    with torch.no_grad():
        for part in (layer, mirror):
            part.root_beta_C.copy_(torch.tensor([0.5, 1.0, 2.0]))
            part.root_gamma_CC.copy_(torch.tensor([[0.3, -0.2, 0.1], [0.4, 0.6, 0.0], [0.2, 0.1, 0.5]]))
    beta, gamma = np.array([0.25, 1.0, 4.0]) + 1e-6, layer.root_gamma_CC.detach().numpy() ** 2
    size = np.empty(x.shape)
    for i in range(3):
        size[:, i] = beta[i] + sum(gamma[i, j] * x[:, j].numpy() ** 2 for j in range(3))
    np.testing.assert_allclose(layer(x).detach().numpy(), x.numpy() / np.sqrt(size))
    np.testing.assert_allclose(mirror(x).detach().numpy(), x.numpy() * np.sqrt(size))


@pytest.mark.parametrize("inverse", [False, True])
def test_gdn_of_float16_squares_what_has_no_square_there(inverse: bool) -> None:
    """65,504 is the largest number of float16, and 300^2 more."""
    x = torch.tensor([300.0, -20.0, 1000.0]).repeat(2, 1)[..., None].requires_grad_()
    layer, sign = GDN(3, inverse), torch.tensor([1.0, -1.0, 1.0])[:, None]
    exact = layer(x)
    for given, autocast in ((layer, True), (copy.deepcopy(layer).half(), False)):
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            found = given(x.half())
        assert found.dtype == torch.float16
        scale = 1e-3 if inverse else 1.0  # 1000 becomes more than float16 has
        small = exact.abs() < 6e4
        torch.testing.assert_close((scale * found.float())[small], (scale * exact)[small], rtol=5e-3, atol=1e-3)
        (slope,) = torch.autograd.grad((sign * found.float())[small].sum(), x)
        assert bool(slope.isfinite().all())


@pytest.mark.parametrize("grid", [(7,), (4, 5), (2, 3, 4)])
def test_gdn_without_weights_is_undone_by_its_mirror(grid: tuple[int, ...]) -> None:
    """Exact for gamma = 0 alone: with weights the mirror is one step of a fixed-point iteration."""
    x = torch.randn(2, 3, *grid, dtype=torch.float64)
    layer, mirror = GDN(3).double(), GDN(3, inverse=True).double()
    with torch.no_grad():
        for part in (layer, mirror):
            part.root_beta_C.uniform_(0.5, 2).copy_(torch.tensor([0.6, 1.1, 1.7]))
            part.root_gamma_CC.zero_()
    torch.testing.assert_close(mirror(layer(x)), x)
    with torch.no_grad():
        mirror.root_gamma_CC.fill_(0.3)
        layer.root_gamma_CC.fill_(0.3)
    assert not torch.allclose(mirror(layer(x)), x, atol=1e-2)
