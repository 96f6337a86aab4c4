"""Laws of the compression family: rates against scipy, bounds, who sees whom, and what whole numbers stand for."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

import aezoo
from aezoo.bases import entropy_coded
from aezoo.bases.entropy_coded import (
    MAX_SCALE,
    MIN_SCALE,
    NUM_SCALES,
    AdditiveNoise,
    Factorised,
    Gaussians,
    Mixtures,
    Rounding,
    SymbolReader,
    gaussian_tables,
    scale_of,
)
from aezoo.errors import AezooError
from aezoo.models.compression.cheng2020 import Attention, Decoder, Encoder, Subpixel
from aezoo.nets.gdn import GDN

NAMES = aezoo.list_models(family="compression")
WITH_SIDE = [name for name in NAMES if name != "factorized_prior"]
# a law that depends on places before, or of the other colour
IN_TURN = ["joint_ar_hyperprior", "cheng2020"]
IN_STEPS = [*IN_TURN, "checkerboard", "elic"]
SHAPE = (2, 11, 10)
SMALL: dict[str, Any] = {"hidden_dims": (6, 8), "latent_dim": 5, "hyper_dim": 3, "hyper_hidden_dims": (4,)}


def small(name: str, shape: tuple[int, ...] = SHAPE, **settings: Any) -> Any:
    """A model in float64 away from where it starts: wide codes, laws of many scales."""
    known = aezoo.registry.hyperparameters(name)
    given = {"groups": (1, 1, 3), "reach": 2, "attention": False, **SMALL}
    given |= {"lams": (settings.get("lam", 0.01),)} | settings
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
    for scale in (MIN_SCALE, 1.0, MAX_SCALE):
        width = torch.full((5,), scale, requires_grad=True)
        found = Gaussians(torch.zeros(5), width, 0).log_mass(v)
        gradients = torch.autograd.grad(found.sum(), [v, width])
        assert all(bool(values.isfinite().all()) for values in (found, *gradients)), scale


def test_gradients_of_gaussian_masses_are_those_of_float64_however_far_out() -> None:
    """A code that is far from its mean is drawn to it by -(v - mean -+ 1/2) / s^2, and its scale by the square."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        v = torch.tensor([0.3, -2.0, 30.0, 100.0, -1e3, 1e4, 1e5, 1e6], dtype=dtype, requires_grad=True)
        width = (
            torch.tensor([[MIN_SCALE], [0.8], [20.0], [MAX_SCALE]], dtype=dtype).expand(-1, 8).clone().requires_grad_()
        )
        log_mass = Gaussians(torch.zeros(8, dtype=dtype), width, 0).log_mass(v.expand(4, -1))
        found[dtype] = [slope.double() for slope in torch.autograd.grad(log_mass.sum(), [v, width])]
    by_hand = -(1e6 - 0.5) * sum(scale**-2 for scale in (MIN_SCALE, 0.8, 20.0, MAX_SCALE))
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
    law = density.distribution((1, 3))
    assert torch.equal(law.mean[0], density.median_C) and bool((density.median_C != 0).all())


def test_factorised_masses_are_integrals_of_the_density() -> None:
    density = spread()
    v = torch.tensor([[-3.2, 0.4, 6.0], [1.1, -9.0, 0.2]], dtype=torch.float64)
    fine = torch.linspace(-0.5, 0.5, 2_001, dtype=torch.float64)
    off = ((v - density.median_C).T[..., None] + fine).flatten(1).requires_grad_()
    (slope,) = torch.autograd.grad(density.logits(off).sigmoid().sum(), off)
    expected = torch.trapezoid(slope.view(3, 2, -1), fine, dim=2).T
    torch.testing.assert_close(density.distribution((2, 3)).log_mass(v).exp(), expected, rtol=1e-5, atol=1e-10)


def test_factorised_masses_of_all_whole_numbers_sum_to_one() -> None:
    density = spread()
    k = torch.arange(-3000.0, 3001.0, dtype=torch.float64)
    mass = density.distribution((6001, 3)).log_mass(density.median_C + k[:, None]).exp()
    torch.testing.assert_close(mass.sum(0), torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_tables_hold_the_masses_of_their_laws() -> None:
    density = spread()
    for c, (low, mass) in enumerate(density.tables()):
        k = torch.arange(low, low + len(mass), dtype=torch.float64)
        v = density.median_C.detach() + k[:, None]
        found = density.distribution(v.shape).log_mass(v)[:, c].exp()
        np.testing.assert_allclose(mass, found.detach().numpy(), rtol=1e-6, atol=1e-14)
        assert 1 - 1e-6 < mass.sum() <= 1 and low < 0 < low + len(mass)
    scales = np.geomspace(MIN_SCALE, MAX_SCALE, NUM_SCALES)
    for scale, (low, mass) in zip(scales, gaussian_tables(), strict=True):
        k = np.arange(low, low + len(mass))
        expected = stats.norm.cdf((k + 0.5) / scale) - stats.norm.cdf((k - 0.5) / scale)
        np.testing.assert_allclose(mass, expected, rtol=1e-9, atol=1e-15)
        assert 1 - 1e-8 < mass.sum() <= 1
    between = np.exp((np.log(scales[1:]) + np.log(scales[:-1])) / 2)
    given = torch.tensor([0.001, *between * 0.999, 1e6], dtype=torch.float64)
    assert Gaussians(given, given, 7).table.tolist() == [7, *range(7, 7 + NUM_SCALES - 1), 7 + NUM_SCALES - 1]
    assert Gaussians(given, given * 1.001 / 0.999, 7).table[1:-1].tolist() == [*range(8, 7 + NUM_SCALES)]


def mixtures(k: int = 3, n: int = 40, dtype: torch.dtype = torch.float64) -> Mixtures:
    """Of n numbers, (K, n, 1), with modes apart and scales over all of the range."""
    means, logits = 6 * torch.randn(k, n, 1, dtype=dtype), torch.randn(k, n, 1, dtype=dtype)
    return Mixtures(means, (MIN_SCALE + 3 * torch.rand(k, n, 1, dtype=dtype) ** 3).clamp_max(MAX_SCALE), logits)


def of_torch(law: Mixtures) -> D.MixtureSameFamily:
    """The same without rounding, by torch's distributions, (n, 1)."""
    means, scales, logits = (part.movedim(0, -1) for part in (law.parts.mean, law.parts.scale, law.log_weight))
    return D.MixtureSameFamily(D.Categorical(logits=logits), D.Normal(means, scales))


def test_mixture_masses_are_differences_of_torch_s_distribution_functions() -> None:
    law = mixtures()
    k = torch.arange(-12.0, 13.0, dtype=torch.float64)
    for v in (law.mean + step for step in k):
        steps = of_torch(law).cdf(v + 0.5) - of_torch(law).cdf(v - 0.5)
        torch.testing.assert_close(law.log_mass(v).exp(), steps, rtol=1e-6, atol=1e-14)
    torch.testing.assert_close(law.mean, of_torch(law).mean)


def test_mixture_masses_are_those_of_scipy_far_out_too() -> None:
    law = mixtures()
    for v in (law.mean - 300, law.mean + 900.3):
        parts = []
        for mean, scale, log_weight in zip(law.parts.mean, law.parts.scale, law.log_weight, strict=True):
            upper, lower = (stats.norm.logcdf((half - (v - mean).abs()) / scale) for half in (0.5, -0.5))
            parts.append(log_weight.numpy() + upper + np.log1p(-np.exp(lower - upper)))
        np.testing.assert_allclose(law.log_mass(v).numpy(), np.logaddexp.reduce(parts), rtol=1e-9)


def test_mixture_masses_of_all_whole_numbers_sum_to_one() -> None:
    """From wherever they are counted, in float32 as well."""
    for dtype in (torch.float64, torch.float32):
        law = mixtures(dtype=dtype)
        k = torch.arange(-100.0, 101.0, dtype=dtype)
        for start in (law.mean, torch.zeros_like(law.mean), law.mean + 0.37):
            total = sum(law.log_mass(start + step).double().exp() for step in k)
            torch.testing.assert_close(
                total, torch.ones_like(total), rtol=0, atol=1e-8 if dtype == torch.float64 else 1e-4
            )


def test_a_mixture_of_equals_or_of_one_is_a_gaussian() -> None:
    mean, scale = torch.randn(30, 2, dtype=torch.float64), MIN_SCALE + torch.rand(30, 2, dtype=torch.float64)
    one, v = Gaussians(mean, scale, 0), mean + 4 * torch.randn(30, 2, dtype=torch.float64)
    for k in (1, 2, 5):
        logits = 3 * torch.randn(k, 30, 2, dtype=torch.float64)
        law = Mixtures(mean.expand(k, -1, -1), scale.expand(k, -1, -1), logits)
        torch.testing.assert_close(law.mean, one.mean)
        torch.testing.assert_close(law.log_mass(v), one.log_mass(v))
    # and one of which all others have no weight
    logits = torch.tensor([0.0, -200.0], dtype=torch.float64).view(2, 1, 1).expand(2, 30, 2)
    law = Mixtures(torch.stack([mean, mean + 70]), torch.stack([scale, 9 * scale]), logits)
    torch.testing.assert_close(law.log_mass(v), one.log_mass(v))


def test_mixture_masses_and_their_gradients_are_finite_in_float32_everywhere() -> None:
    v = torch.tensor([0.0, 0.5, 30.0, 1e3, 1e6]).requires_grad_()
    for scale in (MIN_SCALE, 1.0, MAX_SCALE):
        means = torch.tensor([0.0, 50.0, -1e3])[:, None].expand(3, 5).clone().requires_grad_()
        scales = torch.tensor([scale, MIN_SCALE, MAX_SCALE])[:, None].expand(3, 5).clone().requires_grad_()
        logits = torch.tensor([0.0, -300.0, 80.0])[:, None].expand(3, 5).clone().requires_grad_()
        found = Mixtures(means, scales, logits).log_mass(v)
        gradients = torch.autograd.grad(found.sum(), [v, means, scales, logits])
        assert all(bool(values.isfinite().all()) for values in (found, *gradients)), scale


def test_tables_of_mixtures_hold_the_masses_of_their_laws() -> None:
    law = mixtures(n=200)
    powers = law.table.flatten().numpy()
    assert len({*powers}) > 2
    for power in np.unique(powers):
        here = np.flatnonzero(powers == power)
        low, mass = law.tables_at(int(power), here)
        assert low == -(2**power) and mass.shape == (len(here), 2 ** (power + 1) + 1)
        for i, step in enumerate(range(low, -low + 1)):
            expected = law.log_mass(law.mean + step).exp().flatten()[here]
            np.testing.assert_allclose(mass[:, i], expected, rtol=1e-6, atol=1e-14)
        assert mass.sum(1).min() > 1 - 1e-8
        # half as wide would leave something out
        reach = ((law.parts.mean - law.mean).abs() + 6 * law.parts.scale).amax(0).flatten()[here]
        assert bool((reach > 2 ** (power - 1)).all()) or power == 1


def test_the_table_of_a_mixture_is_no_wider_than_what_has_weight_in_it() -> None:
    means, scales = torch.tensor([[0.0], [0.0], [3000.0]]), torch.tensor([[0.2], [200.0], [1.0]])
    law = Mixtures(means, scales, torch.tensor([[0.0], [-25.0], [-40.0]]))
    assert law.table.tolist() == [1]
    assert Mixtures(means, scales, torch.tensor([[0.0], [-15.0], [-40.0]])).table.tolist() == [11]
    assert Mixtures(100 * means, scales, torch.tensor([[0.0], [0.0], [0.0]])).table.tolist() == [12]


def test_draws_of_a_mixture_come_as_often_as_its_masses_say() -> None:
    one = mixtures(n=1)
    law = Mixtures(*(of.expand(3, 20_000, 1) for of in (one.parts.mean, one.parts.scale, one.log_weight)))
    drawn = law.draw()
    assert drawn.shape == (20_000, 1) and drawn.dtype == torch.long
    low, mass = one.tables_at(int(one.table), np.array([0]))
    likely = mass[0] * 20_000 > 5
    share = np.bincount(drawn.flatten().numpy() - low, minlength=mass.size)[likely]
    assert (
        likely.sum() > 3 and stats.chisquare(share, mass[0][likely] / mass[0][likely].sum() * share.sum()).pvalue > 1e-4
    )


def test_a_scale_stays_within_what_tables_hold() -> None:
    raw = torch.tensor([-1e4, -3.0, 0.0, 5.0, 1e4])
    found = entropy_coded.scale_of(raw)
    torch.testing.assert_close(found[1:4], MIN_SCALE + torch.log1p(raw[1:4].exp()))
    assert float(found[0]) == pytest.approx(MIN_SCALE) and float(found[-1]) == MAX_SCALE


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
    noise = AdditiveNoise()
    ones = torch.ones(100_000, 1, dtype=torch.float64)
    noise(y * ones, Gaussians(mean * ones, scale * ones, 0))
    assert isinstance(noise.rate_B, Tensor)
    assert float(noise.rate_B.mean()) == pytest.approx(expected, abs=5 * float(noise.rate_B.std()) / math.sqrt(100_000))


def test_noise_is_uniform_about_the_value() -> None:
    passed = AdditiveNoise().transform(torch.full((50_000,), 3.0, dtype=torch.float64))
    assert stats.kstest(passed.numpy(), "uniform", args=(2.5, 1)).pvalue > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_vectors_and_maps_count_bits_a_place(name: str) -> None:
    if name in IN_STEPS:
        without = "a code without places: take gdn or conv, or mean_scale_hyperprior|convolutions take"
        with pytest.raises(AezooError, match=without):
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
    if name == "gained_hyperprior":  # with steps of 1
        with torch.no_grad():
            model.log_gain_SM.zero_()
            model.log_inverse_SM.zero_()
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
        take, means, start = entropy_coded.read_in_order(given), [], [0]

        class Watching(SymbolReader):
            def transform(self, v: Tensor, law: Any) -> Tensor:
                means.append(torch.stack([law.mean, law.log_mass(law.mean)]).flatten(2))
                start.append(start[-1] + law.mean[0].numel())
                return super().transform(v, law)

        model.code_latents(Watching(take), None, len(given))
        ends.update(start)
        return torch.cat(means, 2)

    ends: set[int] = set()
    before = laws(symbols)
    steps = sorted(ends)
    calls = {"factorized_prior": 1, "checkerboard": 1 + 2, "elic": 1 + 2 * 3, **dict.fromkeys(IN_TURN, 1 + 9)}
    assert len(steps) - 1 == calls.get(name, 2)
    changed = 0
    for start, end in itertools.pairwise(steps):
        other = symbols.clone()
        other[:, start:end] += 3
        after = laws(other)
        assert torch.equal(after[..., :end], before[..., :end])
        changed += end < steps[-1] and not torch.equal(after[..., end:], before[..., end:])
    assert changed == calls.get(name, 2) - 1  # and each says something of what comes after it


@pytest.mark.parametrize("name", IN_TURN)
def test_places_in_turn_are_the_one_convolution_of_training(name: str) -> None:
    """With what training would see, y^ for y~, the laws of all places at once have the rate of place after place."""
    model, x = small(name).eval(), data()
    coder, y = Rounding(), model.encoder(x)
    y_hat = model.code_latents(coder, y, len(x))
    can_join_backward = Rounding()
    said = model.said(can_join_backward, y, len(x))
    can_join_backward.add_rate(y_hat, model.distribution(*model.context(said, model.context.masked_conv(y_hat))))
    torch.testing.assert_close(coder.rate_B, can_join_backward.rate_B)


@pytest.mark.parametrize("name", IN_TURN)
def test_no_place_sees_itself_or_a_later_one_in_training(name: str) -> None:
    model = small(name)
    y = torch.randn(1, *model.code_shape, dtype=torch.float64, requires_grad=True)
    said = torch.zeros(1, 2 * model.code_shape[0], *model.grid, dtype=torch.float64)
    numbers = sum(model.context(said, model.context.masked_conv(y)))
    height, width = model.grid
    for t in range(height * width):
        (slope,) = torch.autograd.grad(numbers.flatten(2)[..., t].sum(), y, retain_graph=True)
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
    (slope,) = torch.autograd.grad(context.masked_conv(y).flatten(2)[..., model.others].sum(), y)
    seen = slope.abs().sum((0, 1)).flatten() > 0
    assert bool(seen[model.anchors].all()) and not bool(seen[model.others].any())


def test_a_scale_hyperprior_sees_magnitudes_alone_and_expects_zero() -> None:
    model = small("scale_hyperprior").eval()
    y = 10 * torch.randn(2, *model.code_shape, dtype=torch.float64)
    coders = [Rounding(), Rounding()]
    found = [model.code_latents(coder, sign * y, 2) for coder, sign in zip(coders, (1, -1), strict=True)]
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


@pytest.mark.parametrize("training", [True, False])
def test_a_mixture_of_one_is_the_autoregressive_gaussian(training: bool) -> None:
    """But for the transforms, which are put into the parent here."""
    one, two = small("cheng2020", mixtures=1), small("joint_ar_hyperprior", activation="leaky_relu")
    two.encoder, two.decoder = one.encoder, one.decoder
    two.load_state_dict(one.state_dict())
    x = data()
    terms = []
    for model in (one, two):
        torch.manual_seed(0)
        terms.append(model.train(training).loss(x))
    for term, value in terms[1].items():
        assert torch.equal(terms[0][term], value)
    assert torch.equal(one.encode_symbols(x), two.encode_symbols(x))


def test_the_numbers_of_a_place_are_means_scales_and_weights_of_its_mixture() -> None:
    model = small("cheng2020")
    means, raws, logits = torch.randn(3, 3, 2, 5, dtype=torch.float64)
    law, v = model.distribution(*means, *raws, *logits), torch.randn(2, 5, dtype=torch.float64)
    expected = of_torch(Mixtures(means, scale_of(raws), logits))
    torch.testing.assert_close(law.log_mass(v).exp(), expected.cdf(v + 0.5) - expected.cdf(v - 0.5))
    alone = small("cheng2020", mixtures=1).distribution(means[0], raws[0])
    same = model.distribution(*[means[0]] * 3, *[raws[0]] * 3, *logits)
    torch.testing.assert_close(same.log_mass(v), alone.log_mass(v))
    torch.testing.assert_close(same.mean, alone.mean)


def test_a_mixture_tells_two_modes_apart_that_a_gaussian_cannot() -> None:
    """Numbers of two far modes cost a bit more than their width, and not the width of both."""
    modes = torch.tensor([-20.0, 20.0, 0.0]).view(3, 1, 1)
    v = torch.tensor([-20.0, 20.0]).view(2, 1)
    law = Mixtures(
        modes.expand(3, 2, 1), torch.full((3, 2, 1), MIN_SCALE), torch.tensor([0.0, 0.0, -90.0]).view(3, 1, 1)
    )
    torch.testing.assert_close(law.log_mass(v), torch.full((2, 1), -math.log(2)), rtol=0, atol=1e-4)
    assert float(Gaussians(torch.zeros(2, 1), torch.full((2, 1), 20.0), 0).log_mass(v).max()) < -4


@pytest.mark.parametrize("name", IN_TURN)
def test_rate_and_distortion_train_what_they_follow_from(name: str) -> None:
    model = small(name).train()
    terms = model.loss(data())
    names, parameters = zip(*model.named_parameters(), strict=True)

    def trained(term: str) -> set[str]:
        slopes = torch.autograd.grad(terms[term], parameters, retain_graph=True, allow_unused=True)
        found = zip(names, slopes, strict=True)
        return {name.split(".")[0] for name, slope in found if slope is not None and bool((slope != 0).any())}

    assert trained("rate") == {"encoder", "hyper_encoder", "hyper_decoder", "density", "context"}
    assert trained("nll") == {"encoder", "decoder"}


LAMS = (0.002, 0.01, 0.03)


@pytest.mark.parametrize("training", [True, False])
def test_gains_of_one_are_a_mean_scale_hyperprior(training: bool) -> None:
    """Neutral limit, at each quality with its own lam, and in training with one."""
    x = data()
    for lams in ((0.01,),) if training else ((0.01,), LAMS):
        one = small("gained_hyperprior", lams=lams).train(training)
        with torch.no_grad():
            one.log_gain_SM.zero_()
            one.log_inverse_SM.zero_()
        for s, lam in enumerate(lams):
            two = small("mean_scale_hyperprior", lam=lam).train(training)
            two.load_state_dict({key: value for key, value in one.state_dict().items() if key[:4] != "log_"})
            one.quality = s
            torch.manual_seed(0)
            found = one.loss(x)
            torch.manual_seed(0)
            if training:
                torch.rand(len(x))
            expected = two.loss(x)
            for term, value in expected.items():
                torch.testing.assert_close(found[term], value)
            torch.testing.assert_close(one.score(x), two.score(x))
            assert torch.equal(one.encode_symbols(x), two.encode_symbols(x))


def test_a_code_is_rounded_in_steps_of_its_quality() -> None:
    model, x = small("gained_hyperprior", lams=LAMS).eval(), data()
    parent, y = small("mean_scale_hyperprior").eval(), model.encoder(x)
    parent.load_state_dict({key: value for key, value in model.state_dict().items() if key[:4] != "log_"})
    for s in range(3):
        model.quality = s
        gain, inverse = (of[s].exp().view(-1, 1, 1) for of in (model.log_gain_SM, model.log_inverse_SM))
        torch.testing.assert_close(model.encode(x), parent.code_latents(Rounding(), gain * y, len(x)) * inverse)


def test_between_two_qualities_gains_and_lam_are_geometric() -> None:
    model, x = small("gained_hyperprior", lams=LAMS).eval(), data()
    for s, part in ((0, 0.25), (1, 0.7)):
        model.quality = s + part
        found = model.loss(x)
        between = small("gained_hyperprior", lams=(LAMS[s] ** (1 - part) * LAMS[s + 1] ** part,)).eval()
        state = model.state_dict()
        for name in ("log_gain_SM", "log_inverse_SM"):
            low, high = state[name][s].exp(), state[name][s + 1].exp()
            state[name] = (low ** (1 - part) * high**part).log()[None]
        between.load_state_dict(state)
        for term, value in between.loss(x).items():
            torch.testing.assert_close(found[term], value)
        torch.testing.assert_close(model.score(x), between.score(x))


def test_training_draws_a_quality_for_each_sample_and_weighs_it_by_its_lam() -> None:
    model, x = small("gained_hyperprior", lams=LAMS).train(), data(12)
    torch.manual_seed(3)
    found = model.loss(x)
    expected = torch.zeros(12, dtype=torch.float64)
    for s, lam in enumerate(LAMS):
        torch.manual_seed(3)
        drawn, noise = (3 * torch.rand(12)).long(), AdditiveNoise()
        y_hat = model.gained(noise, model.encoder(x), 12, [float(s == other) for other in range(3)])
        loss_B = noise.rate_B + lam * 255**2 * math.log(2) / SHAPE[0] * model.nll(model.decoder(y_hat), x)
        assert bool((drawn == s).any())
        expected = torch.where(drawn == s, loss_B, expected)
    torch.testing.assert_close(found["loss"], expected.mean())


def test_qualities_are_drawn_equally_often() -> None:
    model = aezoo.create_model("gained_hyperprior", (3,), net="mlp", hidden_dims=(4,), lams=LAMS).train()
    seen: list[Any] = []
    original = model.gained
    model.gained = lambda *given: seen.append(given[-1]) or original(*given)  # type: ignore[func-returns-value]
    model.loss(torch.rand(3000, 3))
    counts = [int(share.sum()) for share in seen[0]]
    assert sum(counts) == 3000 and stats.chisquare(counts).pvalue > 1e-4


def test_gains_learn_from_the_samples_of_their_quality() -> None:
    """Those before rounding from rate and distortion, the inverse ones from distortion alone."""
    model, x = small("gained_hyperprior", lams=LAMS).train(), data(2)
    torch.manual_seed(0)
    drawn = {*(3 * torch.rand(2)).long().tolist()}
    assert 0 < len(drawn) < 3
    torch.manual_seed(0)
    terms = model.loss(x)
    for p, of in ((model.log_gain_SM, ("rate", "nll", "loss")), (model.log_inverse_SM, ("nll", "loss"))):
        for term in of:
            (slope,) = torch.autograd.grad(terms[term], p, retain_graph=True)
            assert {s for s in range(3) if bool((slope[s] != 0).all())} == drawn
            assert {s for s in range(3) if bool((slope[s] != 0).any())} == drawn
    assert torch.autograd.grad(terms["rate"], model.log_inverse_SM, allow_unused=True, retain_graph=True)[0] is None


def test_first_gains_make_the_squared_error_of_steps_as_the_inverse_of_lam() -> None:
    model = aezoo.create_model("gained_hyperprior", SHAPE, lams=LAMS, **SMALL)
    step = model.log_inverse_SM.exp()
    torch.testing.assert_close(step[0] ** 2 / step[2] ** 2, torch.full((5,), LAMS[2] / LAMS[0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(step * model.log_gain_SM.exp(), torch.ones(3, 5))
    torch.testing.assert_close(step.log().mean(0), torch.zeros(5))


def test_qualities_and_lams_that_are_none_are_refused() -> None:
    model = aezoo.create_model("gained_hyperprior", SHAPE, lams=LAMS, **SMALL)
    assert model.quality == model.max_quality == 2
    for value in (-0.1, 2.1, math.nan):
        with pytest.raises(AezooError, match="quality must be from 0 to 2, one of each lam"):
            model.quality = value
    for lams in ((), (0.1, 0.01), (0.0, 0.1), (0.1, math.inf), (math.nan,)):
        with pytest.raises(AezooError, match=r"lams must be numbers above 0 that rise|lams takes a list"):
            type(model)(SHAPE, lams=lams)


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_laws_of_the_model(name: str) -> None:
    """Whole numbers drawn under the first law, that of a channel without anything before, come as often as it says."""
    model = small(name).eval()
    seen: list[Tensor] = []

    class Watching(SymbolReader):
        def transform(self, v: Tensor, law: Any) -> Tensor:
            found = super().transform(v, law)
            seen.append((found - law.mean).round())
            return found

    original, entropy_coded.SymbolReader = entropy_coded.SymbolReader, Watching  # type: ignore[misc]
    try:
        torch.manual_seed(0)
        model.sample(300)
    finally:
        entropy_coded.SymbolReader = original  # type: ignore[misc]
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


# ---- sub-pixel convolutions and attention ----------------------------------------------------------------------------


@pytest.mark.parametrize("larger", [(8, 10), (7, 10), (7, 9)])
def test_subpixel_convolutions_are_torch_s_pixel_shuffle_cut_to_the_grid(larger: tuple[int, ...]) -> None:
    layer, x = Subpixel(3, 2, larger), torch.randn(2, 3, 4, 5)
    expected = F.pixel_shuffle(layer.conv(x), 2)[..., : larger[0], : larger[1]]
    assert torch.equal(layer(x), expected)


def test_subpixel_convolutions_put_halves_of_a_place_side_by_side_on_every_axis() -> None:
    line, x = Subpixel(3, 2, (7,)), torch.randn(2, 3, 4)
    both = line.conv(x).view(2, 2, 2, 4)
    assert torch.equal(line(x)[..., ::2], both[:, :, 0]) and torch.equal(line(x)[..., 1::2], both[:, :, 1, :3])
    block, x = Subpixel(3, 2, (4, 6, 4)), torch.randn(1, 3, 2, 3, 2)
    parts = block.conv(x).view(1, 2, 2, 2, 2, 2, 3, 2)
    for a, b, c in itertools.product((0, 1), repeat=3):
        assert torch.equal(block(x)[..., a::2, b::2, c::2], parts[:, :, a, b, c])


def test_attention_is_a_share_of_its_trunk() -> None:
    layer, x = Attention(2, 5, "relu").double(), torch.randn(2, 5, 4, 3, dtype=torch.float64)
    for bias, share in ((-1e3, 0.0), (0.0, 0.5), (1e3, 1.0)):
        with torch.no_grad():
            layer.mask[-1].weight.zero_()
            layer.mask[-1].bias.fill_(bias)
        torch.testing.assert_close(layer(x), x + share * layer.trunk(x))
    assert not torch.allclose(layer.trunk(x), x)


@pytest.mark.parametrize("shape", [(1, 13), (3, 16, 11), (1, 5, 6, 7)])
@pytest.mark.parametrize("dims", [(), (4,), (4, 6), (4, 6, 5)])
def test_residual_stages_come_back_to_every_grid(shape: tuple[int, ...], dims: tuple[int, ...]) -> None:
    code = aezoo.nets.map_shape("gdn", shape, dims, 3)
    x = torch.rand(2, *shape)
    for attention in (True, False):
        down, up = Encoder(shape, code, dims, "relu", attention), Decoder(code, shape, dims[::-1], "relu", attention)
        assert down(x).shape[1:] == code and up(down(x)).shape == x.shape
        counts = [sum(isinstance(part, Attention) for part in net) for net in (down, up)]
        assert counts == ([1 + (len(dims) > 1)] * 2 if attention else [0, 0])
        # on the grid on which the encoder has it
        if attention and len(dims) > 1:
            middle = [
                [*net][[isinstance(part, Attention) for part in net].index(True, first)]
                for net, first in ((down, 0), (up, 1))
            ]
            assert len({part.mask[-1].weight.shape for part in middle}) == 1
