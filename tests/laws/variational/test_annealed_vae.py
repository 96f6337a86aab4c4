"""Laws of beta-VAE with annealed capacity (Burgess et al. 2018)."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from objective_laws import (  # noqa: F401
    CODE,
    SHAPE,
    at,
    gradients,
    images,
    posterior,
    reference_kl,
    same,
    small,
    test_active_setting_differs_from_vae,
    test_inference_equals_vae_for_every_objective,
    test_invalid_values_are_refused,
    test_neutral_setting_equals_vae,
    test_two_ranks_equal_one_process,
)
from torch import Tensor
from torch.utils.data import DataLoader

import aezoo
from aezoo.callbacks import BetaAnnealing
from aezoo.models.variational.annealed_vae import AnnealedVAE

# ---- annealed capacity: Burgess et al. 2018 --------------------------------------------------------------------------


class PyODAnnealed(AnnealedVAE):
    """clamp(KL, 0, C), which has no gradient above C, and below C one that lowers the KL."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        return terms | {
            "loss": terms["nll"] + self.gamma * terms["kl"].clamp(min=torch.zeros(()), max=terms["capacity"])
        }


class PythaeAnnealed(AnnealedVAE):
    """C grows by epoch / (warm-up + 1) and never reaches its maximum; evaluation always uses the last factor."""

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


def test_loss_pulls_kl_towards_capacity() -> None:
    capacity_law("annealed_vae")


@pytest.mark.parametrize("mistake", [PyODAnnealed, PythaeAnnealed], ids=lambda cls: cls.__name__)
def test_wrong_capacity_terms_are_detected(mistake: Any) -> None:
    with pytest.raises(AssertionError):
        capacity_law(mistake)


def test_capacity_applies_to_batch_mean_or_each_sample() -> None:
    """|mean KL - C|, or the mean of |KL_i - C|, which is also the mean over accumulated batches."""
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


def test_capacity_rises_linearly_and_is_logged(quiet: Any) -> None:
    model = annealing()
    trainer, watch = fitted(quiet, model, max_epochs=2)
    assert watch["capacity"] == pytest.approx([8 * min(1, t / 6) for t in range(8)], abs=1e-6)
    assert trainer.callback_metrics["train/capacity"] == pytest.approx((8 * 4 / 6 + 8 * 5 / 6 + 8 + 8) / 4, abs=1e-5)
    assert trainer.callback_metrics["val/capacity"] == 8


def test_evaluation_has_capacity_of_last_step(quiet: Any, tmp_path: Any) -> None:
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


def test_resumed_run_continues_capacity_schedule(quiet: Any, tmp_path: Any) -> None:
    _, whole = fitted(quiet, annealing(), max_epochs=2)
    trainer, first = fitted(quiet, annealing(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    _, second = fitted(quiet, annealing(), max_epochs=2, ckpt=tmp_path / "a.ckpt")
    assert first.terms + second.terms == whole.terms
    assert second["capacity"][0] == pytest.approx(8 * 4 / 6)


def test_equals_vae_with_annealing_callback(quiet: Any) -> None:
    """Each step equals that of VAE with BetaAnnealing, which annealed_vae refuses."""
    model = annealing()
    vae = aezoo.create_model("vae", SHAPE, latent_dim=CODE, hidden_dims=(16,))
    vae.load_state_dict({k: v for k, v in model.state_dict().items() if k != "steps"})
    _, mine = fitted(quiet, model, max_epochs=2)
    _, theirs = fitted(quiet, vae, BetaAnnealing("capacity", n_steps=6, max_capacity=8.0, gamma=10.0), max_epochs=2)
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert mine["loss"][-1] != pytest.approx(-mine["elbo"][-1], rel=1e-2)
    for mode in ("linear", "capacity"):
        with pytest.raises(aezoo.AezooError, match="annealed_vae does not have"):
            fitted(quiet, annealing(), BetaAnnealing(mode, n_steps=6))
