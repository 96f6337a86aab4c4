"""Laws of the codes that are shaped without noise: MMD, sliced Wasserstein, Cramer-Wold, GAN, and smooth decoders."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from scipy import stats
from scipy.special import hyp1f1
from torch import Tensor, nn
from torch.utils.data import DataLoader
from two_ranks import on_two_ranks

import aezoo
from aezoo.cli.main import main
from aezoo.distributions import divergences
from aezoo.io.checkpoint import save_model
from aezoo.models.regularised.aae import AAE
from aezoo.models.regularised.cw_ae import CWAE
from aezoo.models.regularised.rae import RAE, SpectralNorm
from aezoo.models.regularised.swae import SWAE
from aezoo.models.regularised.wae_gan import WAEGAN
from aezoo.models.regularised.wae_mmd import KERNELS, WAEMMD
from aezoo.tasks.generate import generate
from aezoo.testing import SharedNoise

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
SHAPE, CODE = (1, 5, 4), 3
WITH_PRIOR = ("wae_mmd", "swae", "cw_ae", "wae_gan", "aae")
GANS = ("wae_gan", "aae")
SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def small(model: Any, **settings: Any) -> Any:
    name = model if isinstance(model, str) else ""
    dims = {"discriminator_dims": (12, 8)} if name in GANS else {}
    settings = {"input_shape": SHAPE, "latent_dim": CODE, "hidden_dims": (10,), **dims, **settings}
    made = aezoo.create_model(name, **settings) if name else model(**settings)
    return made.double()


def images(n: int = 6, seed: int = 7) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def codes(n: int, d: int = CODE) -> Tensor:
    """Codes from a distribution that is not the prior."""
    return (0.6 * torch.randn(n, d, dtype=torch.float64) + torch.linspace(-1, 1.5, d).double()).requires_grad_()


def normal(n: int, d: int = CODE) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64)


def same(found: Tensor, expected: Tensor, of: Tensor) -> None:
    torch.testing.assert_close(found, expected)
    a, b = (torch.autograd.grad(value, of, retain_graph=True)[0] for value in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def caught(law: Callable[[Any], None], mistake: Any) -> None:
    with pytest.raises(AssertionError):
        law(mistake)


# ---- all of them -----------------------------------------------------------------------------------------------------

NEUTRAL: dict[str, dict[str, Any]] = {
    "wae_mmd": {"mmd_weight": 0.0},
    "swae": {"sw_weight": 0.0},
    "cw_ae": {"cw_weight": 0.0},
    "rae": {"beta": 0.0, "regulariser_weight": 0.0},
    "wae_gan": {"adversarial_weight": 0.0},
    "aae": {"adversarial_weight": 0.0},
}
# what holds the codes, or the decoder, in the loss of each
TERMS = {
    "wae_mmd": "mmd",
    "swae": "sw",
    "cw_ae": "log_cw",
    "rae": "code",
    "wae_gan": "adversarial",
    "aae": "adversarial",
}


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("name", NEUTRAL)
def test_with_weight_0_each_is_the_plain_autoencoder(name: str, likelihood: str, shifted: Any) -> None:
    plain, x = shifted(small("dense_ae", likelihood=likelihood)), images()
    model, whole = small(name, likelihood=likelihood, **NEUTRAL[name]), small(name, likelihood=likelihood)
    state = {key.replace("encoder.0.", "encoder."): value for key, value in plain.state_dict().items()}
    for each in (model, whole):
        each.load_state_dict(each.state_dict() | state)
    terms, others = model.loss(x), plain.loss(x)
    for found in (terms, others):
        found["loss"].backward()
    torch.testing.assert_close(terms["loss"], others["loss"], rtol=1e-12, atol=1e-12)
    named = dict(model.named_parameters())
    for key, p in plain.named_parameters():
        torch.testing.assert_close(named[key.replace("encoder.0.", "encoder.")].grad, p.grad, rtol=1e-9, atol=1e-12)
    for mine, theirs in ((model.encode(x), plain.encode(x)), (model(x), plain(x)), (model.score(x), plain.score(x))):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert whole.loss(x)["loss"] != others["loss"]


@pytest.mark.parametrize("name", NEUTRAL)
def test_the_squared_error_of_the_papers_is_the_default(name: str, shifted: Any) -> None:
    model, x = shifted(small(name)), images()
    sse = (model(x) - x).square().flatten(1).sum(1).mean()
    torch.testing.assert_close(model.loss(x)["nll"], sse + 10 * math.log(math.pi))


@pytest.mark.parametrize("name", NEUTRAL)
def test_the_term_of_each_moves_the_encoder(name: str, shifted: Any) -> None:
    model = shifted(small(name))
    found = torch.autograd.grad(model.loss(images())[TERMS[name]], [*model.encoder.parameters()])
    assert all(g.abs().max() > 1e-6 for g in found)


@pytest.mark.parametrize("name", WITH_PRIOR)
def test_samples_are_decoded_draws_from_a_standard_normal_prior(name: str) -> None:
    model = small(name, input_shape=(CODE,), hidden_dims=())
    with torch.no_grad():
        model.decoder[1].weight.copy_(torch.eye(CODE))
        model.decoder[1].bias.zero_()
    assert model.has_prior and not model.normal_prior
    drawn = model.sample(4000)
    assert all(stats.kstest(column, "norm").pvalue > 1e-3 for column in drawn.numpy().T)
    assert np.abs(np.corrcoef(drawn.numpy().T) - np.eye(CODE)).max() < 0.08


def of_loss(model: Any, method: str, x: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The terms of a loss, and what it compared: codes and draws from the prior."""
    seen: list[Tensor] = []
    whole = getattr(model, method)

    def watched(*given: Tensor) -> Tensor:
        seen.extend(given)
        result: Tensor = whole(*given)
        return result

    setattr(model, method, watched)
    terms = model.loss(x)
    setattr(model, method, whole)
    return terms, seen


@pytest.mark.parametrize(
    ("name", "method", "weight"), [("wae_mmd", "mmd", "mmd_weight"), ("swae", "sliced_wasserstein", "sw_weight")]
)
def test_the_codes_that_are_decoded_are_compared_with_draws_from_the_prior(
    name: str, method: str, weight: str, shifted: Any
) -> None:
    model, x = shifted(small(name, **{weight: 3.0})), images(500)
    terms, (z, prior) = of_loss(model, method, x)
    torch.testing.assert_close(z, model.encode(x))
    assert prior.shape == z.shape and not prior.requires_grad
    assert all(stats.kstest(column, "norm").pvalue > 1e-3 for column in prior.numpy().T)
    torch.testing.assert_close(terms["loss"], terms["nll"] + 3 * terms[TERMS[name]])


COUPLED: list[tuple[str, dict[str, Any]]] = [
    ("wae_mmd", {}),
    ("wae_mmd", {"unbiased": False, "kernel": "rbf"}),
    ("swae", {"n_projections": 20}),
    ("cw_ae", {}),
    ("cw_ae", {"latent_dim": 21}),
]


@pytest.mark.parametrize(("name", "settings"), COUPLED)
def test_two_ranks_are_one(name: str, settings: dict[str, Any], shifted: Any) -> None:
    model, x, term = shifted(small(name, **settings)), images(8), TERMS[name]

    def later(own: Any, rank: int) -> None:
        """Directions of its own for each rank, as processes draw them: the first's are those of one process."""
        inner = getattr(own, "sliced_wasserstein", None)
        if inner is not None:
            own.sliced_wasserstein = lambda *given: (torch.randn(1 + 2 * rank), inner(*given))[1]

    alike = copy.deepcopy(model)
    later(alike, 0)
    with SharedNoise(range(8), 8):
        whole = alike.loss(x)
    expected = torch.autograd.grad(whole["loss"], [*alike.parameters()])
    together = on_two_ranks(model, x, prepare=later)
    for key, value in whole.items():
        torch.testing.assert_close(together.terms[key], value, msg=key)
    for found, g in zip(together.gradients(), expected, strict=True):
        torch.testing.assert_close(found, g)
    alone = on_two_ranks(model, x, exchange=False, prepare=later).terms
    assert (alone[term] - whole[term]).abs() > 1e-4


@pytest.mark.parametrize("name", ["wae_mmd", "swae", "cw_ae"])
def test_distances_are_not_rounded_under_autocast(name: str) -> None:
    model: Any = aezoo.create_model(name, SHAPE, latent_dim=CODE)
    z, p = 3 + 0.1 * torch.randn(2, 64, CODE)
    directions = torch.randn(50, CODE)
    method = {"wae_mmd": "mmd", "swae": "sliced_wasserstein", "cw_ae": "distance"}[name]
    found = []
    for dtype in (torch.float64, torch.float32):
        given = [each.to(dtype) for each in ((z,) if name == "cw_ae" else (z, p))]
        model.all_gather = lambda values, dtype=dtype: directions.to(dtype) if len(values) == 50 else values
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            found.append(getattr(model, method)(*given).double())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


# ---- WAE-MMD: Tolstikhin et al. 2018 ---------------------------------------------------------------------------------


def loops(name: str, scales: tuple[float, ...], z: Tensor, p: Tensor, unbiased: bool) -> Tensor:
    """The MMD by two loops over samples."""

    def k(a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros((), dtype=z.dtype)
        for s in scales:
            c, squared = 2 * len(a) * s, ((a - b) ** 2).sum()
            total = total + (c / (c + squared) if name == "inverse_multiquadratic" else torch.exp(-squared / c))
        return total

    n, own, cross = len(z), torch.zeros((), dtype=z.dtype), torch.zeros((), dtype=z.dtype)
    for i in range(n):
        for j in range(n):
            if i != j or not unbiased:
                own = own + k(z[i], z[j]) + k(p[i], p[j])
            cross = cross + k(z[i], p[j])
    return own / (n * (n - 1) if unbiased else n**2) - 2 * cross / n**2


class DividedTwice(WAEMMD):
    """PyTorch-VAE: the mean MMD is divided by B (B - 1) once more."""

    def mmd(self, z_BD: Tensor, prior_BD: Tensor) -> Tensor:
        return super().mmd(z_BD, prior_BD) / (len(z_BD) * (len(z_BD) - 1))


class CrossWithoutDiagonal(WAEMMD):
    """PyTorch-VAE: pairs (z_i, p_i) are left out, as if they were pairs of a sample with itself."""

    def mmd(self, z_BD: Tensor, prior_BD: Tensor) -> Tensor:
        n, k = len(z_BD), self.k(divergences.squared_distances(z_BD, prior_BD))
        off = (k.sum() - k.diagonal().sum()) / (n * (n - 1))
        return super().mmd(z_BD, prior_BD) + 2 * k.mean() - 2 * off


class MeanOverTheCode(WAEMMD):
    """PyTorch-VAE: the squared distance of the RBF is a mean over the code."""

    def k(self, squared: Tensor) -> Tensor:
        return super().k(squared / self.code_shape[0])


@pytest.fixture(params=[False, True], ids=["V", "U"])
def unbiased(request: Any) -> Any:
    return request.param


def mmd_law(cls: Any) -> None:
    """The MMD and its gradient are those of two loops over the samples."""
    for kernel in KERNELS:
        for scales in ((1.0,), SCALES):
            for unbiased in (False, True):
                z, p = codes(5), normal(5)
                found = small(cls, kernel=kernel, kernel_scales=scales, unbiased=unbiased).mmd(z, p)
                same(found, loops(kernel, scales, z, p, unbiased), z)


def test_the_mmd_is_that_of_a_double_loop() -> None:
    mmd_law(WAEMMD)
    model = small("wae_mmd")
    assert (model.kernel, model.kernel_scales, model.unbiased, model.mmd_weight) == (KERNELS[0], SCALES, True, 10.0)


@pytest.mark.parametrize("mistake", [DividedTwice, CrossWithoutDiagonal, MeanOverTheCode])
def test_the_double_loop_catches_the_mistakes_of_pytorch_vae(mistake: Any) -> None:
    caught(mmd_law, mistake)


def mean_kernel(squared_shift: float, variance: float) -> float:
    """E k(a, b) of the RBFs, a - b ~ N(m, variance I), in closed form."""
    total = 0.0
    for s in SCALES:
        c = 2 * CODE * s
        h = 1 + 2 * variance / c
        total += h ** (-CODE / 2) * math.exp(-squared_shift / (c * h))
    return total


def test_for_codes_from_the_prior_u_has_mean_0_and_both_signs_and_v_its_bias() -> None:
    n, draws = 20, 300
    for unbiased, expected in ((True, 0.0), (False, 2 * (len(SCALES) - mean_kernel(0, 2)) / n)):
        model = small("wae_mmd", kernel="rbf", unbiased=unbiased)
        found = torch.stack([model.mmd(normal(n), normal(n)) for _ in range(draws)])
        assert found.mean().item() == pytest.approx(expected, abs=4 * found.std().item() / math.sqrt(draws))
        assert (found < 0).float().mean() > 0.3 if unbiased else (found > 0).all()
        assert found.std() / math.sqrt(draws) < 0.02


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_v_statistic_of_a_permuted_set_is_0_and_that_of_a_batch_given_twice_the_same(kernel: str) -> None:
    model, z, p = small("wae_mmd", kernel=kernel, unbiased=False), codes(9), normal(9)
    assert model.mmd(z, z[torch.randperm(9)]).abs() < 1e-12
    torch.testing.assert_close(model.mmd(torch.cat([z, z]), torch.cat([p, p])), model.mmd(z, p))
    for unbiased in (False, True):
        single = small("wae_mmd", kernel=kernel, unbiased=unbiased).mmd(z[:1], p[:1])
        assert single.isfinite()


def test_the_default_is_algorithm_2_term_for_term() -> None:
    """Sums over l != j over n (n - 1), and over all pairs with the prior twice over n^2."""
    model, z, p = small("wae_mmd"), codes(7), normal(7)
    n, k = 7, lambda a, b: sum(2 * CODE * s / (2 * CODE * s + (a - b).square().sum()) for s in SCALES)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    same_set = sum(k(z[i], z[j]) + k(p[i], p[j]) for i, j in pairs) / (n * (n - 1))
    same(model.mmd(z, p), same_set - 2 * sum(k(a, b) for a in z for b in p) / n**2, z)
    # of codes from the prior it is below 0 as often as above
    signs = {float(small("wae_mmd").mmd(normal(20), normal(20)).sign()) for _ in range(40)}
    assert signs == {-1.0, 1.0}


def test_of_shifted_or_scaled_codes_it_is_the_closed_form() -> None:
    model = small("wae_mmd", kernel="rbf", unbiased=True)
    for shift, v in ((1.0, 1.0), (0.0, 0.05), (0.0, 4.0), (0.7, 0.3)):
        exact = mean_kernel(0, 2 * v) + mean_kernel(0, 2) - 2 * mean_kernel(CODE * shift**2, v + 1)
        found = model.mmd(shift + math.sqrt(v) * normal(700), normal(700))
        assert found.item() == pytest.approx(exact, rel=0.15, abs=0.03)
        assert exact > 0.1


# ---- SWAE: Kolouri et al. 2018 ---------------------------------------------------------------------------------------


class DividedOnceMore(SWAE):
    """PyTorch-VAE: an extra 1 / (B (B - 1))."""

    def sliced_wasserstein(self, z_BD: Tensor, prior_BD: Tensor) -> Tensor:
        return super().sliced_wasserstein(z_BD, prior_BD) / (len(z_BD) * (len(z_BD) - 1))


class NotOfUnitLength(SWAE):
    """Directions that are Gaussian vectors: D times the distance."""

    def sliced_wasserstein(self, z_BD: Tensor, prior_BD: Tensor) -> Tensor:
        v = torch.randn(self.n_projections, z_BD.shape[1], dtype=z_BD.dtype)
        return ((v @ z_BD.T).sort().values - (v @ prior_BD.T).sort().values).square().mean()


class Unsorted(SWAE):
    """The n-th code is paired with the n-th draw."""

    def sliced_wasserstein(self, z_BD: Tensor, prior_BD: Tensor) -> Tensor:
        v = F.normalize(torch.randn(self.n_projections, z_BD.shape[1], dtype=z_BD.dtype))
        return (v @ (z_BD - prior_BD).T).square().mean()


def pot_law(cls: Any) -> None:
    """The distance and its gradient are POT's for the same directions."""
    ot = pytest.importorskip("ot")
    for d in (1, 2, CODE):
        model, z, p = small(cls, latent_dim=d, n_projections=12), codes(9, d), normal(9, d)
        torch.manual_seed(4)
        found = model.sliced_wasserstein(z, p)
        torch.manual_seed(4)
        v = F.normalize(torch.randn(12, d, dtype=z.dtype))
        same(found, ot.sliced_wasserstein_distance(z, p, projections=v.T, p=2) ** 2, z)


def line_law(cls: Any) -> None:
    """On a line it is the integral of the squared difference of the quantiles."""
    z, p = codes(7, 1), normal(7, 1)
    levels = (np.arange(7 * 300) + 0.5) / (7 * 300)
    a, b = (np.quantile(s.detach().numpy(), levels, method="inverted_cdf") for s in (z, p))
    found = small(cls, latent_dim=1).sliced_wasserstein(z, p)
    assert found.item() == pytest.approx(((a - b) ** 2).mean(), rel=1e-9)


def shift_law(cls: Any) -> None:
    """Between N(m, I) and N(0, I) it is ||m||^2 / D, whatever the dimension."""
    for d in (2, 8):
        m = torch.linspace(0.5, 2, d).double()
        found = small(cls, latent_dim=d, n_projections=600).sliced_wasserstein(normal(1500, d) + m, normal(1500, d))
        assert found.item() == pytest.approx(m.square().sum().item() / d, rel=0.1)


SW_LAWS = (pot_law, line_law, shift_law)


@pytest.mark.parametrize("law", SW_LAWS, ids=lambda law: law.__name__)
def test_the_sliced_wasserstein_distance_keeps_the_law(law: Any) -> None:
    law(SWAE)


@pytest.mark.parametrize(
    ("mistake", "law"),
    [
        *((DividedOnceMore, law) for law in SW_LAWS),
        (NotOfUnitLength, line_law),
        (NotOfUnitLength, shift_law),
        (Unsorted, line_law),
        (Unsorted, shift_law),
    ],
)
def test_the_laws_catch_the_mistakes_of_sliced_wasserstein(mistake: Any, law: Any) -> None:
    caught(law, mistake)


def test_of_a_permuted_set_it_is_0_and_directions_are_drawn_anew() -> None:
    model, z = small("swae"), codes(9)
    assert model.sliced_wasserstein(z, z[torch.randperm(9)]) == 0
    p = normal(9)
    assert model.sliced_wasserstein(z, p) != model.sliced_wasserstein(z, p)
    assert (model.n_projections, model.sw_weight) == (50, 10.0)


# ---- Cramer-Wold: Knop et al. 2018 -----------------------------------------------------------------------------------


def test_phi_is_kummer_s_function_with_its_gradient() -> None:
    s = torch.cat([torch.linspace(0, 60, 601), torch.logspace(1.8, 5, 30)]).double().requires_grad_()
    for d in range(1, 20):
        found = small("cw_ae", latent_dim=d, hidden_dims=()).phi(s)
        (slope,) = torch.autograd.grad(found.sum(), s)
        at, b = -s.detach().numpy(), d / 2
        np.testing.assert_allclose(found.detach(), hyp1f1(0.5, b, at), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(slope, -0.5 / b * hyp1f1(1.5, b + 1, at), rtol=1e-8, atol=1e-11)


def test_from_20_dimensions_on_phi_is_the_paper_s_asymptotics() -> None:
    s = torch.linspace(0, 200, 101).double()
    for d in (20, 64):
        found = small("cw_ae", latent_dim=d, hidden_dims=()).phi(s)
        torch.testing.assert_close(found, (1 + 4 * s / (2 * d - 3)) ** -0.5)
        assert np.abs(found.numpy() / hyp1f1(0.5, d / 2, -s.numpy()) - 1).max() < 0.02


def over_lines(z: Tensor, lines: Tensor) -> float:
    """The squared L2 distance of the blurred densities on each line, by a sum over a grid, averaged over the lines."""
    z, c = z.detach(), (4 / (3 * len(z))) ** 0.4
    t = torch.linspace(-16, 16, 1601, dtype=torch.float64)
    total, prior = 0.0, D.Normal(torch.zeros_like(t), math.sqrt(1 + c))
    for part in lines.split(250):
        found = torch.exp(D.Normal((part @ z.T)[:, :, None], math.sqrt(c)).log_prob(t)).mean(1)
        total += ((found - torch.exp(prior.log_prob(t))) ** 2).sum().item() * 0.02
    return total / len(lines)


class OneWidth(CWAE):
    """Silverman's rule with n^(-1/5), that of a standard deviation, in place of a variance."""

    def distance(self, z_BD: Tensor) -> Tensor:
        n = len(z_BD)
        c = (4 / (3 * n)) ** 0.2
        within = self.phi(divergences.squared_distances(z_BD, z_BD) / (4 * c)).mean() / c**0.5
        across = self.phi((z_BD**2).sum(1) / (2 + 4 * c)).mean() / (c + 0.5) ** 0.5
        return (within - 2 * across + (1 + c) ** -0.5) / (2 * math.sqrt(math.pi))


def lines_law(cls: Any) -> None:
    """In 1 and 2 dimensions the mean over all lines is exact, in more it is a Monte-Carlo mean."""
    angles = torch.arange(200).double() * math.pi / 200
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    for d, lines, rel in ((1, torch.ones(1, 1).double(), 1e-8), (2, circle, 1e-8), (5, None, 0.03), (24, None, 0.05)):
        lines = F.normalize(torch.randn(1500, d).double()) if lines is None else lines
        z = codes(6, d)
        assert small(cls, latent_dim=d).distance(z).item() == pytest.approx(over_lines(z, lines), rel=rel)


def test_the_cramer_wold_distance_is_the_integral_over_lines() -> None:
    lines_law(CWAE)
    caught(lines_law, OneWidth)


def test_its_gradient_is_right_by_finite_differences() -> None:
    for d in (2, 3, 20):
        assert torch.autograd.gradcheck(small("cw_ae", latent_dim=d).distance, codes(4, d))


def test_it_falls_to_0_for_codes_from_the_prior_and_grows_as_they_move_off() -> None:
    model = small("cw_ae", latent_dim=5)
    few, many = model.distance(normal(30, 5)), model.distance(normal(700, 5))
    assert 0 < many < few / 5
    moved = [model.distance(normal(700, 5) + shift).item() for shift in (0.3, 0.6, 1.2, 2.4)]
    assert many < moved[0] / 2 and moved == sorted(moved)
    assert model.distance(0.3 * normal(700, 5)) > 20 * many


def test_the_loss_counts_the_logarithm_of_the_distance(shifted: Any) -> None:
    model, x = shifted(small("cw_ae", cw_weight=3.0)), images()
    terms = model.loss(x)
    expected = torch.log(model.distance(model.encode(x)))
    torch.testing.assert_close(terms["log_cw"], expected)
    same(terms["loss"], terms["nll"] + 3 * expected, model.encoder[1].weight)
    assert small("cw_ae").cw_weight == 1


def test_what_rounding_takes_below_0_has_a_finite_logarithm(shifted: Any) -> None:
    model = shifted(small("cw_ae"))
    model.distance = lambda z: z.sum() * 0 - 1e-7
    terms = model.loss(images())
    terms["loss"].backward()
    assert all(value.isfinite() for value in terms.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ---- RAE: Ghosh et al. 2020 ------------------------------------------------------------------------------------------


def test_the_code_and_the_decoder_s_parameters_are_held_near_0(shifted: Any) -> None:
    model, x = shifted(small("rae", beta=0.3, regulariser_weight=0.2)), images()
    terms = model.loss(x)
    code = np.linalg.norm(model.encode(x).detach(), axis=1) ** 2 / 2
    size = sum(float(np.linalg.norm(p.detach()) ** 2) for p in model.decoder.parameters())
    assert terms["code"].item() == pytest.approx(code.mean(), rel=1e-9)
    assert terms["l2"].item() == pytest.approx(size, rel=1e-9)
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.3 * terms["code"] + 0.2 * terms["l2"])
    for each, keys in (("gp", {"code", "gp"}), ("sn", {"code"}), ("none", {"code"})):
        assert small("rae", regulariser=each).loss(x).keys() == {"loss", "nll", *keys}


def jacobians(model: Any, z: Tensor) -> Tensor:
    """dg/dz of each sample by autograd, (B, D) -> (B, X, D)."""
    rows = [
        torch.autograd.functional.jacobian(lambda one: model.decode(one[None]), one, create_graph=True) for one in z
    ]
    return torch.stack([row.flatten(0, -2) for row in rows])


class OfTheImage(RAE):
    """pythae: the derivative of the reconstruction's sum with respect to the image."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
        return {**super().loss(x), "gp": g.square().flatten(1).sum(1).mean()}


class OfTheSquares(RAE):
    """The authors' code: the gradient of the sum of squares, 2 J' g."""

    def jacobian_norm(self, z_BD: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(self.decode(z_BD).square().sum(), z_BD, create_graph=True)
        return g.square().mean(1)


def linear_law(cls: Any) -> None:
    """Of a linear decoder the Jacobian is its weight, whose squared Frobenius norm is known."""
    torch.manual_seed(5)
    model = small(cls, hidden_dims=(), regulariser="gp")
    found = torch.stack([model.loss(images(2000))["gp"] for _ in range(3)])
    expected = np.linalg.norm(model.decoder[1].weight.detach().numpy(), "fro") ** 2
    assert found.mean().item() == pytest.approx(expected, rel=0.05)


def test_the_penalty_of_a_linear_decoder_is_the_squared_norm_of_its_weight() -> None:
    linear_law(RAE)
    caught(linear_law, OfTheImage)
    caught(linear_law, OfTheSquares)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_the_jacobian_s_estimate_and_its_gradient_are_those_of_autograd(likelihood: str, shifted: Any) -> None:
    model, x = shifted(small("rae", regulariser="gp", activation="tanh", likelihood=likelihood)), images()
    z, weight = model.encode(x), model.decoder[1].weight
    torch.manual_seed(3)
    found = model.jacobian_norm(z)
    torch.manual_seed(3)
    v = torch.randn_like(x).flatten(1)
    J = jacobians(model, z)
    expected = (J.mT @ v[:, :, None]).square().sum((1, 2))
    torch.testing.assert_close(found, expected)
    same(found.mean(), expected.mean(), weight)
    same(found.mean(), expected.mean(), model.encoder[1].weight)
    with torch.no_grad():  # as in validation
        draws = torch.stack([model.jacobian_norm(z) for _ in range(2000)])
    exact = J.square().sum((1, 2)).detach()
    assert ((draws.mean(0) - exact).abs() < 5 * draws.std(0) / math.sqrt(2000)).all()


def norms(model: Any) -> list[float]:
    """The largest singular value of each weight of the decoder, by NumPy."""
    layers = [m for m in model.decoder.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    assert len(layers) >= 2
    return [float(np.linalg.norm(m.weight.detach().flatten(1).numpy(), 2)) for m in layers]


class Stale(RAE):
    """torch.nn.utils: the singular vectors are those of before the step."""

    def after_optimizer_step(self) -> None:
        pass


def spectral_law(cls: Any, quiet: Any, **settings: Any) -> None:
    torch.manual_seed(0)
    model = cls((1, 8, 8), latent_dim=4, regulariser="sn", **settings)
    assert max(norms(model)) <= 1 + 1e-3 and min(norms(model)) > 1 - 1e-4
    batches = [3 * torch.rand(32, 1, 8, 8) for _ in range(40)]
    seen: list[float] = []
    look = pl.callbacks.LambdaCallback(on_train_batch_end=lambda *_: seen.extend(norms(model)))
    quiet(max_epochs=1, callbacks=[look]).fit(model, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert len(seen) >= 80
    assert max(seen) <= 1 + 1e-3 and min(seen) > 1 - 1e-4


@pytest.mark.parametrize("settings", [{"hidden_dims": (40,)}, {"net": "conv", "hidden_dims": (8, 12)}])
def test_every_weight_of_the_decoder_has_spectral_norm_1_after_every_step(settings: Any, quiet: Any) -> None:
    spectral_law(RAE, quiet, **settings)
    caught(lambda cls: spectral_law(cls, quiet, **settings), Stale)
    assert max(abs(norm - 1) for norm in norms(RAE((1, 8, 8), regulariser="none", **settings))) > 0.1


def test_weights_that_are_normalised_are_loaded_as_they_were_saved(tmp_path: Path) -> None:
    model = aezoo.create_model("rae", SHAPE, regulariser="sn", hidden_dims=(8,))
    x = images().float()
    loaded = aezoo.load_model(save_model(model, tmp_path / "saved"))
    assert torch.equal(loaded(x), model.eval()(x))


def test_the_gradient_through_the_norm_is_autograd_s_of_the_singular_value() -> None:
    weight = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    norm, direction = SpectralNorm(weight.detach().float()).double(), torch.randn(6, 5, dtype=torch.float64)
    norm.search(weight)
    same((norm(weight) * direction).sum(), (weight / torch.linalg.matrix_norm(weight, 2) * direction).sum(), weight)
    norm(0 * weight.detach())  # nothing to divide by
    single = SpectralNorm(weight.detach().float())
    for diverged in (math.nan, math.inf, 1e36, 1e20):
        single.search(weight.detach().float() * diverged)


def test_a_decoder_of_spectral_norm_1_lengthens_no_difference_of_codes() -> None:
    model = small("rae", regulariser="sn", hidden_dims=(8, 12)).eval()
    z, other = 3 * normal(200), 3 * normal(200)
    moved = (model.decode(z) - model.decode(other)).flatten(1).norm(dim=1)
    assert (moved <= (1 + 3e-3) * (z - other).norm(dim=1)).all()


def test_it_samples_from_a_mixture_fitted_after_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    off = [f"--{name}.every_n_epochs=0" for name in ("reconstructions", "samples", "traversal", "latents", "filters")]
    main([
        *("fit", "--model=rae", "--model.latent_dim=4", "--model.hidden_dims=[16]", "--data.name=digits"),
        *("--trainer.max_epochs=1", "--projector.n=0", "--trainer.accelerator=cpu", *off),
    ])  # fmt: skip
    main(["generate", "--ckpt_path", "runs/rae-digits/0", "--prior", "gmm", "--n", "12", "--data.name", "digits"])
    (file,) = tmp_path.glob("**/samples.npy")
    drawn = np.load(file)
    assert drawn.shape == (12, 1, 8, 8) and np.isfinite(drawn).all() and drawn.std(0).max() > 0
    model = aezoo.load_model("runs/rae-digits/0")
    with pytest.raises(aezoo.AezooError, match="has no prior"):
        generate(model, prior="own")


@pytest.mark.parametrize(("name", "prior"), [("rae", "auto"), ("wae_gan", "gaussian"), ("cw_ae", "gmm")])
def test_priors_fitted_after_training_have_the_distribution_of_the_codes(name: str, prior: str, digits: Tensor) -> None:
    model, x = aezoo.create_model(name, (1, 8, 8), latent_dim=2).eval(), digits[:1000].float().numpy()
    model.decode = lambda z: (z @ torch.eye(2, 64)).unflatten(1, (1, 8, 8))  # type: ignore[method-assign]
    generated = generate(model, n=1000, prior=prior, fit_on=x, n_components=3).samples.reshape(1000, -1)[:, :2]
    found = model.encode(torch.from_numpy(x)).detach().numpy()
    assert np.abs(generated.mean(0) - found.mean(0)).max() < 0.2 * found.std(0).min()
    np.testing.assert_allclose(np.cov(generated.T), np.cov(found.T), atol=0.2 * np.cov(found.T).max())


# ---- WAE-GAN and AAE: Tolstikhin et al. 2018, Makhzani et al. 2015 ---------------------------------------------------

POSTERIORS = pytest.mark.parametrize("gaussian", [False, True], ids=["deterministic", "gaussian"])


def parts(model: Any) -> dict[str, list[nn.Parameter]]:
    discriminator = [*model.discriminator.parameters()]
    held = {id(p) for p in discriminator}
    return {"autoencoder": [p for p in model.parameters() if id(p) not in held], "discriminator": discriminator}


def players(model: Any, x: Tensor) -> dict[str, Tensor]:
    """What each player minimises, all parameters live."""
    z = model.encoder(x)
    if model.gaussian_posterior:
        mu, log_var = z.chunk(2, 1)
        z = D.Normal(mu, torch.sqrt(log_var.exp())).mean + log_var.exp().sqrt() * torch.randn_like(mu)
    adversarial = -torch.log(torch.sigmoid(model.discriminator(z))).mean()
    t = model.discriminator(torch.cat([torch.randn_like(z), z.detach()]))[:, 0]
    labels = torch.cat([torch.ones(len(x)), torch.zeros(len(x))]).double()
    return {
        "autoencoder": model.nll(model.decoder(z), x).mean() + model.adversarial_weight * adversarial,
        "discriminator": 2 * F.binary_cross_entropy_with_logits(t, labels),
        "adversarial": adversarial,
    }


@POSTERIORS
@pytest.mark.parametrize("likelihood", ["gaussian", "gaussian:learned"])
@pytest.mark.parametrize("name", GANS)
def test_one_backward_pass_gives_each_player_the_gradient_of_its_own_loss(
    name: str, likelihood: str, gaussian: bool, shifted: Any
) -> None:
    model = shifted(small(name, likelihood=likelihood, gaussian_posterior=gaussian, adversarial_weight=3.0))
    x, found = images(), []
    for loss in (model.loss, lambda x: players(model, x)):
        torch.manual_seed(3)
        found.append(loss(x))
    terms, losses = found
    terms["loss"].backward()
    for player, part in parts(model).items():
        for p, g in zip(part, torch.autograd.grad(losses[player], part), strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-7, atol=1e-10)
            assert g.abs().max() > 1e-6
    torch.testing.assert_close(terms["loss"], losses["autoencoder"])
    for term in ("adversarial", "discriminator"):
        torch.testing.assert_close(terms[term], losses[term])


@POSTERIORS
@pytest.mark.parametrize("name", GANS)
def test_no_term_reaches_another_player(name: str, gaussian: bool, shifted: Any) -> None:
    model = shifted(small(name, gaussian_posterior=gaussian))
    terms, sets = model.loss(images()), parts(model)
    owners = {"nll": "autoencoder", "adversarial": "autoencoder", "discriminator": "discriminator"}
    for term, owner in owners.items():
        for player, part in sets.items():
            g = torch.autograd.grad(terms[term], part, allow_unused=True, retain_graph=True)
            reached = any(each is not None and bool(each.any()) for each in g)
            assert reached == (player == owner), (term, player)
    leaky = F.softplus(model.discriminator(model.draw(images()))).mean()  # the slip of rivals would be seen
    assert torch.autograd.grad(leaky, sets["autoencoder"][0])[0].any()


@pytest.mark.parametrize("name", GANS)
def test_each_player_has_a_group_of_the_optimiser(name: str) -> None:
    model = small(name, lr=2e-3, discriminator_lr=7e-3, likelihood="gaussian:learned")
    first, second = model.configure_optimizers().param_groups
    assert {id(p) for p in second["params"]} == {id(p) for p in model.discriminator.parameters()}
    held = [id(p) for group in (first, second) for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == {id(p) for p in model.parameters()}
    # https://github.com/tolstikhin/wae, wae.py: both; the paper of the AAE names none
    assert (first["lr"], first["betas"]) == (2e-3, (0.5 if name == "wae_gan" else 0.9, 0.999))
    assert (second["lr"], second["betas"]) == (7e-3, (0.5, 0.999))
    groups = small(name, optimizer="adamw:beta2=0.9,beta1=0.7").configure_optimizers().param_groups
    assert [group["betas"] for group in groups] == [(0.7, 0.9)] * 2


def test_a_discriminator_that_sees_no_difference_pays_log_2_for_each_kind(shifted: Any) -> None:
    model = shifted(small("wae_gan"))
    with torch.no_grad():
        for p in [*model.discriminator.parameters()][-2:]:
            p.zero_()
    terms = model.loss(images())
    assert terms["discriminator"].item() == pytest.approx(2 * math.log(2))
    assert terms["adversarial"].item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_at_its_optimum_the_discriminator_is_the_log_ratio_of_prior_and_codes(shift: float) -> None:
    """Of N(m, 1) and N(0, 1) the ratio is linear in z: 2 log 2 less twice the Jensen-Shannon divergence is paid."""
    n = 20_000
    model = small("wae_gan", input_shape=(1,), latent_dim=1, hidden_dims=(), discriminator_dims=())
    z = normal(n, 1) + shift
    model.draw = lambda x: z
    x = torch.rand(n, 1).double()
    optimizer = torch.optim.LBFGS(model.discriminator.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        torch.manual_seed(8)
        optimizer.zero_grad()
        loss: Tensor = model.loss(x)["discriminator"]
        loss.backward()
        return loss

    optimizer.step(closure)
    weight, bias = (p.item() for p in model.discriminator.parameters())
    assert (weight, bias) == (pytest.approx(-shift, abs=0.08), pytest.approx(shift**2 / 2, abs=0.08))
    grid = np.linspace(-10, 12, 20_001)
    p, q = stats.norm.pdf(grid), stats.norm.pdf(grid, shift)
    js = np.trapezoid(0.5 * p * np.log(2 * p / (p + q)) + 0.5 * q * np.log(2 * q / (p + q)), grid)
    assert closure().item() == pytest.approx(2 * math.log(2) - 2 * js, abs=0.01)


def test_a_gaussian_posterior_is_drawn_with_its_mean_and_variance_and_told_by_its_mean(shifted: Any) -> None:
    model, x = shifted(small("wae_gan", gaussian_posterior=True)), images(1).expand(8000, *SHAPE)
    mu, log_var = model.encoder(x[:1]).detach().chunk(2, 1)
    z = model.draw(x).detach()
    assert ((z.mean(0) - mu) / (0.5 * log_var).exp()).abs().max() < 0.06
    torch.testing.assert_close(z.var(0), log_var[0].exp(), rtol=0.1, atol=0)
    torch.testing.assert_close(model.encode(x[:1]), mu)
    assert model.decoder[1].in_features == CODE
    plain = shifted(small("wae_gan"))
    torch.testing.assert_close(plain.draw(x[:3]), plain.encode(x[:3]))


def test_log_variances_that_would_overflow_give_a_finite_loss() -> None:
    model = aezoo.create_model("wae_gan", SHAPE, latent_dim=CODE, gaussian_posterior=True)
    with torch.no_grad():
        model.encoder[-2].bias[CODE:] = 300.0  # type: ignore[index]
    assert model.loss(images().float())["loss"].isfinite()


@POSTERIORS
def test_the_aae_is_the_wae_gan_with_the_paper_s_networks(gaussian: bool, shifted: Any) -> None:
    ours: Any = AAE(SHAPE, gaussian_posterior=gaussian)
    widths = [m.out_features for m in ours.discriminator if isinstance(m, nn.Linear)]
    assert widths == [1000, 1000, 1]
    assert [m.out_features for m in ours.decoder if isinstance(m, nn.Linear)] == [1000, 1000, 20]
    assert (ours.code_shape, ours.adversarial_weight) == ((8,), 1.0)
    assert ours.gaussian_posterior == gaussian
    aae, x, found = shifted(small("aae", gaussian_posterior=gaussian)), images(), []
    wae = small("wae_gan", adversarial_weight=1.0, gaussian_posterior=gaussian)
    wae.load_state_dict(aae.state_dict())
    for each in (aae, wae):
        torch.manual_seed(3)
        found.append(each.loss(x))
    assert all(torch.equal(found[0][term], found[1][term]) for term in found[0])
    assert isinstance(aae, WAEGAN)


def test_the_encoder_is_driven_towards_the_prior() -> None:
    """A code that is the sample moved: with the sign of the adversarial term turned it would run away."""
    torch.manual_seed(0)
    model: Any = aezoo.create_model(
        "wae_gan", (1,), latent_dim=1, hidden_dims=(), discriminator_dims=(16,), lr=1e-2, discriminator_lr=1e-2
    )
    with torch.no_grad():
        model.encoder[1].weight.fill_(0.3)
        model.encoder[1].bias.fill_(3.0)
    optimizer = model.configure_optimizers()
    for _ in range(400):
        optimizer.zero_grad()
        model.loss(torch.randn(128, 1))["loss"].backward()
        optimizer.step()
    z = model.encode(torch.randn(4000, 1))
    assert z.mean().abs() < 0.4 and 0.6 < z.std() < 1.6
