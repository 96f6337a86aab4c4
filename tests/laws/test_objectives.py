"""Laws of the objectives beside the ELBO: neutral settings, closed forms of each penalty, schedules, rivals' slips."""

import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributions as D
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.utils.data import DataLoader
from two_ranks import on_two_ranks

import aezoo
from aezoo.callbacks import BetaAnnealing
from aezoo.distributions.divergences import squared_distances
from aezoo.models.variational.annealed_vae import AnnealedVAE
from aezoo.models.variational.dip_vae_i import DIPVAEI
from aezoo.models.variational.dip_vae_ii import DIPVAEII
from aezoo.models.variational.info_vae import InfoVAE
from aezoo.testing import SharedNoise

SHAPE, CODE = (2, 3, 3), 5
KERNELS = ("inverse_multiquadratic", "rbf")


def small(name: Any, **settings: Any) -> Any:
    """A model in float64 by its registry name or its class."""
    make = (lambda **s: aezoo.create_model(name, **s)) if isinstance(name, str) else name
    return make(input_shape=SHAPE, latent_dim=CODE, hidden_dims=(16,), **settings).double()


def images(n: int = 6) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64)


def posterior(n: int = 6) -> tuple[Tensor, Tensor]:
    """Means and log-variances off the start, of correlated dimensions."""
    mixing = torch.randn(CODE, CODE, dtype=torch.float64)
    mu = torch.randn(n, CODE, dtype=torch.float64) @ mixing + torch.linspace(-1, 2, CODE, dtype=torch.float64)
    return mu.requires_grad_(), (torch.randn(n, CODE, dtype=torch.float64) - 1).requires_grad_()


def at(model: Any, mu: Tensor, log_var: Tensor) -> Any:
    """The model with a posterior of one's own choice for a batch of its size."""
    model.posterior = lambda x: (mu, log_var)
    return model


def reference_kl(mu: Tensor, log_var: Tensor) -> Tensor:
    q = D.Normal(mu, (0.5 * log_var).exp())
    return D.kl_divergence(q, D.Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(1)


def gradients(value: Tensor, of: tuple[Tensor, ...]) -> list[Tensor]:
    found = torch.autograd.grad(value, of, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, of, strict=True)]


def same(found: Tensor, expected: Tensor, of: tuple[Tensor, ...]) -> None:
    """Value and gradient agree."""
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(found, of), gradients(expected, of), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


# ---- neutral settings ------------------------------------------------------------------------------------------------

NEUTRAL: dict[str, dict[str, Any]] = {
    "beta_vae": {"beta": 1.0},
    "annealed_vae": {"gamma": 1.0, "max_capacity": 0.0},
    "dip_vae_i": {"off_diagonal": 0.0, "diagonal": 0.0},
    "dip_vae_ii": {"off_diagonal": 0.0, "diagonal": 0.0},
    "info_vae": {"alpha": 0.0, "mmd_weight": 1.0},
}
# each setting that takes a model away from the VAE, alone
ACTIVE: list[tuple[str, dict[str, Any]]] = [
    ("beta_vae", {}),
    ("annealed_vae", {"gamma": 2.0, "max_capacity": 0.0}),
    ("dip_vae_i", {"off_diagonal": 1000.0, "diagonal": 0.0}),
    ("dip_vae_i", {"off_diagonal": 0.0, "diagonal": 1.0}),
    ("dip_vae_ii", {"off_diagonal": 1000.0, "diagonal": 0.0}),
    ("dip_vae_ii", {"off_diagonal": 0.0, "diagonal": 1.0}),
    ("info_vae", {"alpha": 0.5, "mmd_weight": 1.0}),
    ("info_vae", {"alpha": 0.0, "mmd_weight": 2.0}),
]


def twins(name: str, settings: dict[str, Any], shifted: Any, **parent: Any) -> tuple[Any, Any]:
    """The model and the VAE with the same weights, off their start."""
    model, vae = small(name, **settings), small("vae", **parent)
    shifted(vae)
    model.load_state_dict(vae.state_dict() | {k: v for k, v in model.state_dict().items() if k not in vae.state_dict()})
    return model, vae


def losses(*models: Any, x: Tensor, training: bool = True) -> list[dict[str, Tensor]]:
    """The loss of each model with the same noise, its gradients left at the weights."""
    found = []
    for model in models:
        torch.manual_seed(3)
        found.append(model.train(training).loss(x))
        model.zero_grad()
        found[-1]["loss"].backward()
    return found


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", NEUTRAL)
def test_at_its_neutral_setting_the_model_is_the_vae(name: str, training: bool, shifted: Any) -> None:
    model, vae = twins(name, NEUTRAL[name], shifted)
    x = images()
    mine, theirs = losses(model, vae, x=x, training=training)
    for term in ("loss", "nll", "kl", "elbo"):
        torch.testing.assert_close(mine[term], theirs[term], rtol=0, atol=1e-5)
        torch.testing.assert_close(mine[term], theirs[term], rtol=1e-12, atol=1e-12)
    assert theirs["kl"] > 0.5
    for p, q in zip(model.parameters(), vae.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "settings"), ACTIVE, ids=lambda value: str(value))
def test_away_from_it_it_is_not(name: str, settings: dict[str, Any], shifted: Any) -> None:
    model, vae = twins(name, settings, shifted)
    mine, theirs = losses(model, vae, x=images())
    assert (mine["loss"] - theirs["loss"]).abs() > 1e-3
    assert any((p.grad - q.grad).abs().max() > 1e-4 for p, q in zip(model.parameters(), vae.parameters(), strict=True))


@pytest.mark.parametrize("name", NEUTRAL)
def test_inference_is_the_vae_s_whatever_the_objective(name: str, shifted: Any) -> None:
    model, vae = twins(name, {}, shifted)
    x, found = images(), []
    for each in (model.eval(), vae.eval()):
        torch.manual_seed(5)
        found.append([each.encode(x), each(x), each.score(x), each.log_likelihood(x, 20), each.sample(3)])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


def test_beta_weighs_the_kl_by_four_unless_told_otherwise(shifted: Any) -> None:
    x = images()
    for settings, beta in (({}, 4.0), ({"beta": 0.3}, 0.3)):
        model = shifted(small("beta_vae", **settings))
        kl = reference_kl(*model.posterior(x)).mean()
        (terms,) = losses(model, x=x)
        torch.testing.assert_close(terms["loss"], terms["nll"] + beta * kl)


@pytest.mark.parametrize("name", ["dip_vae_i", "dip_vae_ii", "info_vae", "sigma_vae"])
def test_the_callback_reaches_the_kl_term(name: str, shifted: Any) -> None:
    """BetaAnnealing sets `beta` and `capacity`: both count, beside the model's own terms."""
    model, x, found = shifted(small(name)), images(), []
    for beta, capacity in ((1.0, 0.0), (0.25, 0.0), (0.25, 90.0)):
        model.beta, model.capacity = beta, capacity
        found += losses(model, x=x)
    kl = found[0]["kl"]
    assert kl > 0.1
    torch.testing.assert_close(found[1]["loss"], found[0]["loss"] - 0.75 * kl)
    torch.testing.assert_close(found[2]["loss"], found[0]["loss"] - kl + 0.25 * (90 - kl))


@pytest.mark.parametrize("name", ["annealed_vae", "dip_vae_i", "dip_vae_ii", "info_vae", "sigma_vae"])
def test_two_ranks_are_one(name: str, shifted: Any) -> None:
    """Terms and gradients, also where the two ranks' KL lie on both sides of the capacity."""
    model, x = shifted(small(name)), images()
    kl_B = reference_kl(*model.posterior(x)).detach()
    x = x[kl_B.argsort()]
    if name == "annealed_vae":
        model.max_capacity, model.capacity_steps = kl_B.median().item(), 1
        model.steps.fill_(1)
    with SharedNoise(range(6), 6):
        whole = model.loss(x)
    together = on_two_ranks(model, x)
    assert together.terms.keys() == whole.keys()
    for term in whole:
        torch.testing.assert_close(together.terms[term], whole[term])
    expected = torch.autograd.grad(whole["loss"], [*model.parameters()])
    for found, g in zip(together.gradients(), expected, strict=True):
        torch.testing.assert_close(found, g)
    assert (on_two_ranks(model, x, exchange=False).terms["loss"] - whole["loss"]).abs() > 1e-3


# ---- annealed capacity: Burgess et al. 2018 --------------------------------------------------------------------------


class PyODAnnealed(AnnealedVAE):
    """clamp(KL, 0, C): above C there is no gradient, below it one that lowers the KL."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        return terms | {
            "loss": terms["nll"] + self.gamma * terms["kl"].clamp(min=torch.zeros(()), max=terms["capacity"])
        }


class PythaeAnnealed(AnnealedVAE):
    """C grows by epoch / (warm-up + 1), never whole; evaluation takes the last factor whatever the epoch."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        n = self.capacity_steps
        factor = self.steps.clamp(max=n) / (n + 1) if self.training else torch.tensor(n / (n + 1))
        C = self.max_capacity * factor.float()
        return terms | {"loss": terms["nll"] + self.gamma * (terms["kl"] - C).abs(), "capacity": C}


def capacity_law(cls: Any) -> None:
    """The penalty is gamma |KL - C|: below C the gradient raises the KL, above C it lowers it, in both modes."""
    for steps, sign in ((0, 1), (4, 1), (10, -1), (400, -1)):
        for training in (True, False):
            model = small(cls, gamma=3.0, max_capacity=90.0, capacity_steps=40).train(training)
            model.steps.fill_(steps)
            mu, log_var = posterior()
            with torch.no_grad():
                mu *= (16 / reference_kl(mu, log_var).mean()).sqrt()  # a KL between 9 and 22.5
            kl, C = reference_kl(mu, log_var).mean(), 90.0 * min(1.0, steps / 40)
            assert (kl > C) == (sign > 0)
            terms = at(model, mu, log_var).loss(images())
            torch.testing.assert_close(terms["capacity"].double(), torch.tensor(C).double())
            torch.testing.assert_close(terms["kl"], kl)
            penalty = terms["loss"] - terms["nll"]
            same(penalty, 3 * sign * (kl - C), (mu, log_var))
            # one step along the descent moves the KL towards C
            g = gradients(penalty, (mu, log_var))
            moved = reference_kl(mu - 1e-4 * g[0], log_var - 1e-4 * g[1]).mean()
            assert (moved < kl) == (sign > 0)


def test_the_code_is_driven_towards_its_capacity() -> None:
    capacity_law("annealed_vae")


@pytest.mark.parametrize("rival", [PyODAnnealed, PythaeAnnealed], ids=lambda cls: cls.__name__)
def test_a_capacity_that_another_library_ships_breaks_the_law(rival: Any) -> None:
    with pytest.raises(AssertionError):
        capacity_law(rival)


def test_the_capacity_holds_the_batch_or_each_sample() -> None:
    """|mean KL - C| lets samples differ; the mean of |KL_i - C| does not, and adds up over accumulated batches."""
    mu, log_var = posterior()
    order = reference_kl(mu, log_var).argsort()
    of = mu, log_var = mu.detach()[order].requires_grad_(), log_var.detach()[order].requires_grad_()
    x, kl_B = images(), reference_kl(mu, log_var)
    C = kl_B.median().item() + 0.1
    assert kl_B[0] < C < kl_B[-1]

    def penalty(model: Any, rows: slice) -> Tensor:
        terms = at(model, mu[rows], log_var[rows]).loss(x[rows])
        difference: Tensor = terms["loss"] - terms["nll"]
        return difference

    whole, parts = [], []
    for per_sample, expected in ((False, (kl_B.mean() - C).abs()), (True, (kl_B - C).abs().mean())):
        model = small("annealed_vae", gamma=2.0, max_capacity=C, capacity_steps=1, per_sample=per_sample)
        model.steps.fill_(1)
        whole.append(penalty(model, slice(6)))
        parts.append((penalty(model, slice(3)) + penalty(model, slice(3, 6))) / 2)
        torch.testing.assert_close(whole[-1], 2 * expected, rtol=1e-6, atol=1e-6)  # C is in float32
        for a, b in zip(gradients(whole[-1], of), gradients(2 * expected, of), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert whole[1] > whole[0] + 0.1
    torch.testing.assert_close(parts[1], whole[1])
    assert parts[0] > whole[0] + 0.1


class Watch(pl.Callback):
    """The loss terms of every step."""

    def __init__(self) -> None:
        self.terms: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.terms.append({name: float(value) for name, value in outputs.items()})

    def __getitem__(self, name: str) -> list[float]:
        return [terms[name] for terms in self.terms]


def annealing(**settings: Any) -> Any:
    torch.manual_seed(0)
    defaults = {"gamma": 10.0, "max_capacity": 8.0, "capacity_steps": 6}
    return aezoo.create_model("annealed_vae", SHAPE, latent_dim=CODE, hidden_dims=(16,), **{**defaults, **settings})


def batches(n: int = 4) -> Any:
    x = torch.rand(n, 5, *SHAPE, generator=torch.Generator().manual_seed(7))
    return DataLoader(list(x), batch_size=None)  # type: ignore[arg-type]


def fitted(quiet: Any, model: Any, *callbacks: Any, ckpt: Any = None, **settings: Any) -> tuple[Any, Any]:
    watch = Watch()
    settings = {"max_epochs": 1, "num_sanity_val_steps": 0, **settings}
    trainer = quiet(callbacks=[*callbacks, watch], **settings)
    torch.manual_seed(0)
    trainer.fit(model, batches(), batches(2), ckpt_path=ckpt)
    return trainer, watch


def test_the_capacity_rises_linearly_with_the_optimiser_s_steps_and_is_logged(quiet: Any) -> None:
    model = annealing()
    trainer, watch = fitted(quiet, model, max_epochs=2)
    assert watch["capacity"] == pytest.approx([8 * min(1, t / 6) for t in range(8)], abs=1e-6)
    assert trainer.callback_metrics["train/capacity"] == pytest.approx((8 * 4 / 6 + 8 * 5 / 6 + 8 + 8) / 4, abs=1e-5)
    assert trainer.callback_metrics["val/capacity"] == 8


def test_evaluation_and_the_finished_model_have_the_capacity_of_the_last_step(quiet: Any, tmp_path: Any) -> None:
    model = annealing()
    trainer, watch = fitted(quiet, model)
    assert watch["capacity"][-1] == pytest.approx(8 * 3 / 6)
    assert float(trainer.callback_metrics["val/capacity"]) == watch["capacity"][-1]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for loaded in (aezoo.load_model(tmp_path / "a.ckpt"), aezoo.load_model(aezoo.save_model(model, tmp_path / "a"))):
        assert float(loaded.loss(images().float())["capacity"]) == watch["capacity"][-1]
    again = quiet()
    again.validate(model, batches(2), verbose=False)
    assert float(again.callback_metrics["val/capacity"]) == watch["capacity"][-1]


def test_accumulated_batches_count_as_one_step(quiet: Any) -> None:
    _, watch = fitted(quiet, annealing(), max_epochs=2, accumulate_grad_batches=2)
    assert watch["capacity"] == pytest.approx([8 * (t // 2) / 6 for t in range(8)], abs=1e-6)


def test_a_resumed_run_goes_on_with_its_capacity(quiet: Any, tmp_path: Any) -> None:
    _, whole = fitted(quiet, annealing(), max_epochs=2)
    trainer, first = fitted(quiet, annealing(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    _, second = fitted(quiet, annealing(), max_epochs=2, ckpt=tmp_path / "a.ckpt")
    assert first.terms + second.terms == whole.terms
    assert second["capacity"][0] == pytest.approx(8 * 4 / 6)


def test_it_is_the_vae_with_the_callback_in_training(quiet: Any) -> None:
    """Step for step the run of VAE under BetaAnnealing, which it does not need and refuses."""
    model = annealing()
    vae = aezoo.create_model("vae", SHAPE, latent_dim=CODE, hidden_dims=(16,))
    vae.load_state_dict({k: v for k, v in model.state_dict().items() if k != "steps"})
    _, mine = fitted(quiet, model, max_epochs=2)
    _, theirs = fitted(quiet, vae, BetaAnnealing("capacity", n_steps=6, max_capacity=8.0, gamma=10.0), max_epochs=2)
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert mine["loss"][-1] != pytest.approx(-mine["elbo"][-1], rel=1e-2)
    for mode in ("linear", "capacity"):
        with pytest.raises(aezoo.AezooError, match="AnnealedVAE has none"):
            fitted(quiet, annealing(), BetaAnnealing(mode, n_steps=6))


# ---- covariance of the codes: Kumar et al. 2018 ----------------------------------------------------------------------


class PyTorchVAEDIP(DIPVAEII):
    """Centred over the code instead of the batch, without 1/B, with exp(2 log_var) summed into a scalar."""

    def covariance(self, mu_BD: Tensor, log_var_BD: Tensor) -> Tensor:
        centred = mu_BD - mu_BD.mean(dim=1, keepdim=True)
        return centred.T @ centred + torch.mean(torch.diagonal((2.0 * log_var_BD).exp(), dim1=0), dim=0)


def covariance(name: str, mu: Tensor, log_var: Tensor) -> np.ndarray:
    """By numpy."""
    found: np.ndarray = np.cov(mu.detach().numpy().T, bias=True)
    return found + (np.diag(log_var.detach().exp().mean(0).numpy()) if name == "dip_vae_ii" else 0)


def dip_law(cls: Any, name: str) -> None:
    """The penalties and their gradients are those of numpy's and torch's covariance, off the start."""
    mu, log_var = posterior(8)
    terms = at(small(cls, off_diagonal=3.0, diagonal=0.7), mu, log_var).loss(images(8))
    C = covariance(name, mu, log_var)
    assert terms["off_diagonal"].item() == pytest.approx((C**2).sum() - (np.diag(C) ** 2).sum(), rel=1e-9)
    assert terms["diagonal"].item() == pytest.approx(((np.diag(C) - 1) ** 2).sum(), rel=1e-9)
    cov = torch.cov(mu.T, correction=0) + (log_var.exp().mean(0).diag() if name == "dip_vae_ii" else 0)
    torch.testing.assert_close(cov.detach(), torch.from_numpy(C))
    off = cov[~torch.eye(CODE, dtype=torch.bool)]
    penalty = 3 * (off**2).sum() + 0.7 * ((cov.diagonal() - 1) ** 2).sum()
    same(terms["loss"] - terms["nll"], reference_kl(mu, log_var).mean() + penalty, (mu, log_var))


@pytest.mark.parametrize("name", ["dip_vae_i", "dip_vae_ii"])
def test_the_penalty_is_that_of_numpy_s_covariance(name: str) -> None:
    dip_law(name, name)


def identity_law(cls: Any, s2: float) -> None:
    """Means with covariance (1 - s2) I and variances s2 on average cost nothing where s2 counts, else 0.25 D of it."""
    mu, log_var = whitened(64)
    terms = at(small(cls), mu * math.sqrt(1 - s2), log_var + math.log(s2 or 1)).loss(images(64))
    assert abs(terms["off_diagonal"].item()) < 1e-20
    assert abs(terms["diagonal"].item()) < 1e-20


def whitened(n: int) -> tuple[Tensor, Tensor]:
    """Means with mean 3 and covariance I, and log-variances whose variances are 1 on average."""
    mu = torch.randn(n, CODE, dtype=torch.float64)
    mu = mu - mu.mean(0)
    log_var = torch.randn(n, CODE, dtype=torch.float64)
    mu = math.sqrt(n) * torch.linalg.qr(mu)[0] + 3
    return mu, log_var - log_var.exp().mean(0).log()


def test_codes_with_the_prior_s_covariance_cost_nothing() -> None:
    identity_law("dip_vae_i", 0.0)
    identity_law("dip_vae_ii", 0.4)


def test_the_second_adds_the_mean_variances_to_the_diagonal_of_the_first() -> None:
    mu, log_var = posterior()
    one, two = (small(name).covariance(mu, log_var) for name in ("dip_vae_i", "dip_vae_ii"))
    torch.testing.assert_close(two - one, torch.diag((log_var.exp().sum(0)) / 6))
    assert (log_var.exp().mean(0) > 0.05).all()


def test_far_codes_lose_no_digits() -> None:
    """E[mu mu'] - E[mu] E[mu]' in float32 would be off by 1 at a mean of 3000; centred codes are not."""
    mu, log_var = whitened(64)
    far = (mu + 3000).float()
    exact = torch.cov(far.double().T, correction=0).float()
    torch.testing.assert_close(small("dip_vae_i").covariance(far, log_var.float()), exact, rtol=1e-4, atol=1e-4)
    moments = (far[:, :, None] * far[:, None]).mean(0) - far.mean(0)[:, None] * far.mean(0)
    assert (moments - exact).abs().max() > 0.1


@pytest.mark.parametrize("law", [lambda cls: dip_law(cls, "dip_vae_ii"), lambda cls: identity_law(cls, 0.4)])
def test_a_covariance_that_another_library_ships_breaks_the_law(law: Any) -> None:
    with pytest.raises(AssertionError):
        law(PyTorchVAEDIP)
    with pytest.raises(AssertionError):  # nor is the one model the other
        law(DIPVAEI)


# ---- maximum mean discrepancy: Zhao et al. 2017, Gretton et al. 2012 -------------------------------------------------


def kernel(name: str, a: Tensor, b: Tensor, bandwidth: float) -> Tensor:
    """Of two codes."""
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
    """For codes that are draws from the prior, 0 but for the bias 2 (1 - E[k]) / B; E[k] of the RBF is closed."""
    n, draws, model = 25, 400, small(cls, kernel="rbf")
    expected = 2 * (1 - (1 + 2 / CODE) ** (-CODE / 2)) / n
    found = torch.stack([model.mmd(*torch.randn(2, n, CODE, dtype=torch.float64)) for _ in range(draws)])
    assert found.mean().item() == pytest.approx(expected, abs=5 * found.std().item() / math.sqrt(draws))
    assert found.std() / math.sqrt(draws) < 0.05 * expected
    assert model.mmd(*torch.randn(2, 1000, CODE, dtype=torch.float64)) < 3e-3


def gaussian_law(cls: Any) -> None:
    """For codes from N(m, v I) the RBF's MMD is a closed form, above 0 where m or v is not the prior's."""
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
def test_the_info_vae_keeps_the_law(law: Any) -> None:
    law("info_vae")


@pytest.mark.parametrize(
    ("rival", "law"),
    [(PyTorchVAEInfo, law) for law in MMD_LAWS]
    + [(PyTorchVAECross, mmd_law), (PyTorchVAECross, prior_law), (PyTorchVAEKernel, mmd_law)]
    + [(PyTorchVAEKernel, gaussian_law), (WithoutAlpha, objective_law)],
    ids=lambda value: value.__name__,
)
def test_a_discrepancy_that_another_library_ships_breaks_the_law(rival: Any, law: Any) -> None:
    with pytest.raises(AssertionError):
        law(rival)


def test_codes_are_compared_with_as_many_draws_from_the_prior() -> None:
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
def test_the_same_codes_in_another_order_have_no_discrepancy(name: str) -> None:
    z, p = posterior(9)[0].detach(), torch.randn(9, CODE, dtype=torch.float64)
    model = small("info_vae", kernel=name)
    assert abs(model.mmd(z, z[torch.randperm(9)])) < 1e-14
    found = model.mmd(z, p)
    torch.testing.assert_close(model.mmd(torch.cat([z, z]), torch.cat([p, p])), found)  # a batch given twice
    assert 0 <= model.mmd(z[:1], p[:1]) < 2  # a batch of one
    assert found > 1e-3


def test_the_kernel_keeps_its_digits_in_half_precision() -> None:
    z, p = torch.randn(2, 16, 16)
    model: Any = aezoo.create_model("info_vae", SHAPE)
    exact = brute_force("inverse_multiquadratic", z.double(), p.double(), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.mmd(z, p).item() == pytest.approx(exact.item(), rel=1e-4)


def test_an_alpha_of_one_drops_the_kl_and_no_discrepancy_leaves_it() -> None:
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


# ---- optimal sigma: Rybkin et al. 2021 -------------------------------------------------------------------------------


def errors(model: Any, x: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The terms, the reconstruction of the code that was drawn and the squared errors of all values."""
    seen: list[Tensor] = []
    hook = model.decoder.register_forward_hook(lambda _, inputs, output: seen.append(output))
    terms = model.loss(x)
    hook.remove()
    return terms, seen[0], (x - seen[0]) ** 2


def test_sigma_is_the_best_there_is(shifted: Any) -> None:
    """s^2 is the MSE; no other s has a lower loss, as scipy finds it; the loss is that of torch's normal there."""
    model, x = shifted(small("sigma_vae")), images(9) * 3
    terms, x_hat, squared = errors(model, x)
    assert terms["sigma"].item() ** 2 == pytest.approx(squared.mean().item(), rel=1e-12)

    def nll(log_s: float) -> float:
        return float(-D.Normal(x_hat.detach(), math.exp(log_s)).log_prob(x).flatten(1).sum(1).mean())

    best = minimize_scalar(nll, bounds=(-5, 5), method="bounded", options={"xatol": 1e-9})
    assert math.log(terms["sigma"].item()) == pytest.approx(best.x, abs=1e-6)
    assert terms["nll"].item() == pytest.approx(best.fun, rel=1e-9)
    assert terms["nll"].item() == pytest.approx(18 / 2 * math.log(2 * math.pi * math.e * squared.mean().item()))
    kl = reference_kl(*model.posterior(x)).mean()
    torch.testing.assert_close(terms["loss"], terms["nll"] + kl)
    torch.testing.assert_close(terms["elbo"], -terms["loss"])
    assert abs(terms["sigma"].item() - 1) > 0.05


def test_sigma_needs_no_gradient(shifted: Any) -> None:
    """dL/ds = 0 at the optimum: the weights' gradient is that of the loss with s^2 written out as the MSE."""
    model, x = shifted(small("sigma_vae")), images(9)
    terms, _, squared = errors(model, x)
    written_out = 18 / 2 * torch.log(2 * math.pi * math.e * squared.mean())
    same(terms["nll"], written_out, tuple(model.parameters()))
    log_s = (0.5 * squared.mean().log()).detach().requires_grad_()
    nll = (squared.detach().flatten(1).sum(1) * torch.exp(-2 * log_s) / 2 + 18 * log_s).mean()
    assert abs(torch.autograd.grad(nll, log_s)[0]) < 1e-12
    # it is not 0 elsewhere, and a fixed sigma gives other gradients
    assert any(
        g.abs().max() > 1e-3
        for g in gradients(terms["nll"] - squared.flatten(1).sum(1).mean(), tuple(model.parameters()))
    )


def test_at_its_sigma_the_model_is_the_gaussian_vae(shifted: Any) -> None:
    sigma_vae, _ = twins("sigma_vae", {}, shifted)
    x = images(9)
    torch.manual_seed(3)
    sigma = sigma_vae.train().loss(x)["sigma"].item()
    vae = small("vae", likelihood=f"gaussian:{sigma!r}")
    vae.likelihood.log_scale.fill_(math.log(sigma))
    vae.load_state_dict({k: v for k, v in sigma_vae.state_dict().items() if k in vae.state_dict()})
    mine, theirs = losses(sigma_vae, vae, x=x)
    for term in ("loss", "nll", "kl", "elbo"):
        torch.testing.assert_close(mine[term], theirs[term])
    for p, q in zip(sigma_vae.parameters(), vae.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    # evaluation, scores and importance weights take the sigma that training has left
    sigma_vae.likelihood.log_scale.fill_(math.log(sigma))
    mine, theirs = losses(sigma_vae, vae, x=x[:4], training=False)
    for term in ("loss", "nll", "kl", "elbo"):
        torch.testing.assert_close(mine[term], theirs[term])
    found = []
    for each in (sigma_vae, vae):
        torch.manual_seed(5)
        found.append([each.score(x), each.log_likelihood(x, 10), each(x)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(sigma_vae.score(x)[:2], sigma_vae.score(x[:2]))


def test_training_leaves_its_sigma_to_evaluation(shifted: Any, tmp_path: Any) -> None:
    """The running mean of log sigma: where training stands still it is the batch's own; evaluation does not move it."""
    model, x = shifted(small("sigma_vae")), images(9) * 5
    start = model.likelihood.log_scale.item()
    sigmas = [model.loss(x)["sigma"].item() for _ in range(60)]
    expected = start
    for sigma in sigmas:
        expected = 0.9 * expected + 0.1 * math.log(sigma)
    assert model.likelihood.log_scale.item() == pytest.approx(expected, abs=1e-9)
    assert abs(start - expected) > 0.1
    model.eval()
    assert model.loss(x * 2)["sigma"].item() == pytest.approx(math.exp(expected), rel=1e-9)
    assert model.likelihood.log_scale.item() == pytest.approx(expected, abs=1e-9)
    model.float()
    loaded = aezoo.load_model(aezoo.save_model(model, tmp_path / "a"))
    assert torch.equal(loaded.score(x.float()), model.score(x.float()))


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e12])
def test_sigma_stays_finite_on_perfect_and_on_absurd_reconstructions(scale: float) -> None:
    model = small("sigma_vae").float()
    x = torch.full((4, *SHAPE), scale)
    with torch.no_grad():
        for p in model.decoder.parameters():
            p.zero_()
    for training in (True, False):
        terms = model.train(training).loss(x)
        terms["loss"].backward()
        values = [*terms.values(), *(p.grad for p in model.parameters() if p.grad is not None), model.score(x)]
        assert all(torch.isfinite(v).all() for v in values)


# ---- values that cannot work -----------------------------------------------------------------------------------------

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("beta_vae", {"beta": -1.0}, "beta must"),
    ("sigma_vae", {"beta": -0.1}, "beta must"),
    ("annealed_vae", {"gamma": -1.0}, "gamma must"),
    ("annealed_vae", {"gamma": math.inf}, "gamma takes a finite"),
    ("annealed_vae", {"max_capacity": -0.1}, "max_capacity must"),
    ("annealed_vae", {"capacity_steps": 0}, "capacity_steps must"),
    *((f"dip_vae_{n}", {name: -1.0}, f"{name} must") for n in ("i", "ii") for name in ("off_diagonal", "diagonal")),
    ("info_vae", {"alpha": 1.5}, "alpha must"),
    ("info_vae", {"alpha": 0.2, "mmd_weight": 0.7}, "at least 1 - alpha = 0.8"),
    ("info_vae", {"kernel": "linear"}, "inverse_multiquadratic or rbf"),
    ("info_vae", {"bandwidth": 0.0}, "bandwidth must"),
]


@pytest.mark.parametrize(("name", "settings", "words"), BAD, ids=lambda value: str(value))
def test_values_that_cannot_work_are_refused(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(aezoo.AezooError, match=words) as error:
        aezoo.create_model(name, input_shape=(4,), **settings)
    assert "\n" not in str(error.value)
    for each in (*NEUTRAL, "sigma_vae"):
        with pytest.raises(aezoo.AezooError, match="latent_dim"):
            aezoo.create_model(each, input_shape=(4,), latent_dim=0)
