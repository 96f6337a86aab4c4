"""Laws of InfoVAE with the maximum mean discrepancy (Zhao et al. 2017)."""

import math
from typing import Any

import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from objective_laws import (  # noqa: F401
    CODE,
    SHAPE,
    at,
    images,
    posterior,
    reference_kl,
    same,
    small,
    test_active_setting_differs_from_vae,
    test_beta_and_capacity_apply_to_kl_term,
    test_inference_equals_vae_for_every_objective,
    test_invalid_values_are_refused,
    test_neutral_setting_equals_vae,
    test_two_ranks_equal_one_process,
)
from torch import Tensor

import aezoo
from aezoo.distributions.divergences import squared_distances
from aezoo.models.variational.info_vae import InfoVAE

KERNELS = ("inverse_multiquadratic", "rbf")


# ---- maximum mean discrepancy: Zhao et al. 2017, Gretton et al. 2012 -------------------------------------------------


def kernel(name: str, a: Tensor, b: Tensor, bandwidth: float) -> Tensor:
    """The kernel of two codes."""
    t = torch.dot(a - b, a - b) / (2 * len(a) * bandwidth**2)
    return 1 / (1 + t) if name == "inverse_multiquadratic" else torch.exp(-t)


def brute_force(name: str, z: Tensor, p: Tensor, bandwidth: float) -> Tensor:
    """The V-statistic by two loops over samples."""
    total = torch.zeros((), dtype=z.dtype)
    for i in range(len(z)):
        for j in range(len(z)):
            total = total + kernel(name, z[i], z[j], bandwidth) + kernel(name, p[i], p[j], bandwidth)
            total = total - kernel(name, z[i], p[j], bandwidth) - kernel(name, p[i], z[j], bandwidth)
    return total / len(z) ** 2


class PyTorchVAEInfo(InfoVAE):
    """The mean MMD divided by B (B - 1) once more."""

    def mmd(self, z_BD: Tensor, prior_BD: Tensor) -> Tensor:
        n = len(z_BD)
        return super().mmd(z_BD, prior_BD) / (n * (n - 1))


class PyTorchVAECross(InfoVAE):
    """Leaves the diagonal out of the kernel between codes and prior as well."""

    def mmd(self, z_BD: Tensor, prior_BD: Tensor) -> Tensor:
        n = len(z_BD)

        def off(k: Tensor) -> Tensor:
            return (k.sum() - k.diagonal().sum()) / (n * (n - 1))

        pairs = ((z_BD, z_BD), (prior_BD, prior_BD), (z_BD, prior_BD))
        zz, pp, zp = (self.k(squared_distances(a, b)) for a, b in pairs)
        return off(zz) + off(pp) - 2 * off(zp)


class PyTorchVAEKernel(InfoVAE):
    """The squared distance is a mean over the code before it is divided by D."""

    def k(self, squared: Tensor) -> Tensor:
        return super().k(squared / self.code_shape[0])


class WithoutAlpha(InfoVAE):
    """`autoencoders`: the KL term keeps its weight."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        return terms | {"loss": terms["loss"] + self.alpha * terms["kl"]}


def mmd_law(cls: Any) -> None:
    """The MMD and its gradient are those of two loops over the samples."""
    for name in KERNELS:
        for bandwidth in (0.4, 1.0, 3.0):
            z, p = posterior(7)[0], torch.randn(7, CODE, dtype=torch.float64)
            found = small(cls, kernel=name, bandwidth=bandwidth).mmd(z, p)
            same(found, brute_force(name, z, p, bandwidth), (z,))
            assert found > 0


def objective_law(cls: Any) -> None:
    """The loss is nll + (1 - alpha) KL + (alpha + lam - 1) MMD, the MMD of the codes that are decoded."""
    for alpha, lam in ((0.0, 1.0), (0.3, 5.0), (1.0, 2.0), (-2.0, 9.0)):
        model, (mu, log_var) = small(cls, alpha=alpha, mmd_weight=lam), posterior()
        seen: list[Tensor] = []
        model.decoder.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        prior: list[Tensor] = []
        whole = model.mmd
        model.mmd = lambda z, p, prior=prior, whole=whole: prior.append(p) or whole(z, p)
        terms = at(model, mu, log_var).loss(images())
        mmd = brute_force("inverse_multiquadratic", seen[0], prior[0], 1.0)
        expected = terms["nll"] + (1 - alpha) * reference_kl(mu, log_var).mean() + (alpha + lam - 1) * mmd
        torch.testing.assert_close(terms["mmd"], mmd)
        same(terms["loss"], expected, (mu, log_var))


def prior_law(cls: Any) -> None:
    """For codes drawn from the prior the mean is the bias 2 (1 - E[k]) / B, with a closed form of E[k] for the RBF."""
    n, draws, model = 25, 400, small(cls, kernel="rbf")
    expected = 2 * (1 - (1 + 2 / CODE) ** (-CODE / 2)) / n
    found = torch.stack([model.mmd(*torch.randn(2, n, CODE, dtype=torch.float64)) for _ in range(draws)])
    assert found.mean().item() == pytest.approx(expected, abs=5 * found.std().item() / math.sqrt(draws))
    assert found.std() / math.sqrt(draws) < 0.05 * expected
    assert model.mmd(*torch.randn(2, 1000, CODE, dtype=torch.float64)) < 3e-3


def gaussian_law(cls: Any) -> None:
    """For codes from N(m, v I) the MMD with the RBF kernel has a closed form, which is 0 only for the prior."""
    model = small(cls, kernel="rbf")

    def mean_kernel(distance: float, variance: float) -> float:
        h = CODE + variance  # E exp(-||d||^2 / (2 D)), d ~ N(m, variance I)
        return (CODE / h) ** (CODE / 2) * math.exp(-distance / (2 * h))

    for shift, v in ((1.0, 1.0), (0.0, 0.05), (0.0, 4.0), (0.7, 0.3)):
        z, p = torch.randn(2, 1000, CODE, dtype=torch.float64)
        exact = mean_kernel(0, 2 * v) + mean_kernel(0, 2) - 2 * mean_kernel(CODE * shift**2, v + 1)
        assert model.mmd(shift + math.sqrt(v) * z, p).item() == pytest.approx(exact, rel=0.1, abs=5e-3)
        assert exact > 0.02


MMD_LAWS = (mmd_law, objective_law, prior_law, gaussian_law)


@pytest.mark.parametrize("law", MMD_LAWS, ids=lambda law: law.__name__)
def test_info_vae_satisfies_every_law(law: Any) -> None:
    law("info_vae")


@pytest.mark.parametrize(
    ("mistake", "law"),
    [(PyTorchVAEInfo, law) for law in MMD_LAWS]
    + [(PyTorchVAECross, mmd_law), (PyTorchVAECross, prior_law), (PyTorchVAEKernel, mmd_law)]
    + [(PyTorchVAEKernel, gaussian_law), (WithoutAlpha, objective_law)],
    ids=lambda value: value.__name__,
)
def test_wrong_discrepancies_are_detected(mistake: Any, law: Any) -> None:
    with pytest.raises(AssertionError):
        law(mistake)


def test_mmd_uses_one_prior_draw_per_code() -> None:
    model, n = small("info_vae"), 4000
    given: list[Tensor] = []

    def mmd(*codes: Tensor) -> Tensor:
        given.extend(codes)
        return codes[0].sum()

    model.mmd = mmd
    model.loss(images(n))
    z, p = given
    assert p.shape == z.shape == (n, CODE)
    assert (p.mean(0).abs() < 5 / math.sqrt(n)).all()
    assert ((p.var(0) - 1).abs() < 5 * math.sqrt(2 / n)).all()
    both = torch.corrcoef(torch.cat([p, z.detach()], 1).T)[:CODE]
    assert (both - torch.eye(CODE, 2 * CODE)).abs().max() < 5 / math.sqrt(n)


@pytest.mark.parametrize("name", KERNELS)
def test_permuted_codes_have_zero_discrepancy(name: str) -> None:
    z, p = posterior(9)[0].detach(), torch.randn(9, CODE, dtype=torch.float64)
    model = small("info_vae", kernel=name)
    assert abs(model.mmd(z, z[torch.randperm(9)])) < 1e-14
    found = model.mmd(z, p)
    torch.testing.assert_close(model.mmd(torch.cat([z, z]), torch.cat([p, p])), found)  # a batch given twice
    assert 0 <= model.mmd(z[:1], p[:1]) < 2  # a batch of one
    assert found > 1e-3


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_several_scales_add_up(name: str) -> None:
    z, p = posterior(7)[0], torch.randn(7, CODE, dtype=torch.float64)
    settings: dict[str, Any] = {"kernel": name, "kernel_scales": (0.3, 4.0), "bandwidth": 1.3}
    expected = sum(brute_force(name, z, p, 1.3 * math.sqrt(c)) for c in (0.3, 4.0))
    same(small(InfoVAE, **settings).mmd(z, p), expected, (z,))
    # only pairs of different samples; a sample with itself has k = 1 at each of the two scales
    within = [sum(kernel(name, a, b, 1.3 * math.sqrt(c)) for c in (0.3, 4.0) for a in v for b in v) for v in (z, p)]
    of_pairs = expected - sum(within) / 49 + sum(k - 2 * 7 for k in within) / 42
    same(small(InfoVAE, unbiased=True, **settings).mmd(z, p), of_pairs, (z,))


def test_kernel_is_accurate_under_autocast() -> None:
    z, p = torch.randn(2, 16, 16)
    model: Any = aezoo.create_model("info_vae", SHAPE)
    exact = brute_force("inverse_multiquadratic", z.double(), p.double(), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.mmd(z, p).item() == pytest.approx(exact.item(), rel=1e-4)


def test_alpha_one_drops_the_kl() -> None:
    mu, log_var = posterior()
    model = small("info_vae", alpha=1.0, mmd_weight=1.0)
    at(model, mu, log_var).loss(images())
    x = images()
    torch.manual_seed(1)
    terms = model.loss(x)
    torch.testing.assert_close(terms["loss"], terms["nll"] + terms["mmd"])
    model = small("info_vae", alpha=0.25, mmd_weight=10.0)
    model.mmd = lambda z, p: torch.zeros((), dtype=torch.float64)
    terms = at(model, mu, log_var).loss(x)
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.75 * reference_kl(mu, log_var).mean())
