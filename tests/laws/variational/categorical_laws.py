"""Laws of the categorical codes: their KL, their relaxation, exact evidence by enumeration, and known mistakes."""

import math
from typing import Any

import pytest
import torch
import torch.distributions as D
from torch import Tensor
from torch.utils.data import DataLoader

import aezoo

N, K = 3, 4


def small(name: str = "categorical_vae", **settings: Any) -> Any:
    given = {"n_variables": N, "n_classes": K, "hidden_dims": (16,)} | settings
    return aezoo.create_model(name, input_shape=(6,), **given).double()


def data(n: int = 5) -> Tensor:
    return torch.rand(n, 6, dtype=torch.float64)


def nll_at(model: Any, x: Tensor, z: Tensor) -> Tensor:
    """-log p(x|z) by torch.distributions, (B,)."""
    return -D.Bernoulli(logits=model.decoder(z), validate_args=False).log_prob(x).flatten(1).sum(1)


# ---- KL --------------------------------------------------------------------------------------------------------------


def reference_kl(log_p: Tensor) -> Tensor:
    q = D.Categorical(logits=log_p)
    return D.kl_divergence(q, D.Categorical(logits=torch.zeros_like(log_p))).sum(1)


# ---- schedules of the temperature and the capacity -------------------------------------------------------------------


class Record:
    """The loss term with a given name at each training step, or the temperature if there is no such term."""

    def __init__(self, of: str) -> None:
        self.of, self.found = of, []

    def watch(self, model: Any) -> Any:
        loss = model.loss

        def watched(x: Tensor, y: Any = None) -> Any:
            terms = loss(x, y)
            if model.training:
                self.found.append(float(terms[self.of] if self.of in terms else model.tau()))
            return terms

        model.loss = watched
        return model


def steps_of(cls: Any, of: str, quiet: Any, tmp_path: Any, **settings: Any) -> tuple[list[float], list[float]]:
    """The recorded values at the 9 steps of 3 epochs: of one run, and of a run resumed from a checkpoint after 2."""
    loader: Any = DataLoader(list(torch.rand(12, 6)), batch_size=4)
    whole, parted = Record(of), Record(of)
    quiet(max_epochs=3, log_every_n_steps=1).fit(whole.watch(cls((6,), **settings)), loader, loader)
    first = quiet(max_epochs=2, log_every_n_steps=1)
    first.fit(parted.watch(cls((6,), **settings)), loader, loader)
    first.save_checkpoint(tmp_path / "stopped.ckpt")
    later = quiet(max_epochs=3, log_every_n_steps=1)
    later.fit(
        parted.watch(cls((6,), **settings)), loader, loader, ckpt_path=tmp_path / "stopped.ckpt", weights_only=True
    )
    return whole.found, parted.found


# ---- invalid values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [
        ("categorical_vae", {"n_variables": 0}, "n_variables"),
        ("categorical_vae", {"n_classes": 1}, "n_classes"),
        ("categorical_vae", {"temperature": 0.0}, "temperature"),
        ("categorical_vae", {"start_temperature": math.inf}, "start_temperature"),
        ("categorical_vae", {"temperature_steps": -1}, "temperature_steps"),
        ("joint_vae", {"n_variables": -1}, "n_variables"),
        ("joint_vae", {"n_classes": 1}, "n_classes"),
        ("joint_vae", {"latent_dim": 0}, "latent_dim"),
        ("joint_vae", {"gamma": -1.0}, "gamma"),
        ("joint_vae", {"max_discrete_capacity": math.nan}, "max_discrete_capacity"),
        ("joint_vae", {"capacity_steps": 0}, "capacity_steps"),
    ],
)
def test_invalid_values_are_refused(name: str, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word) as refusal:
        aezoo.create_model(name, input_shape=(4,), **settings)
    assert len(str(refusal.value).splitlines()) == 1
