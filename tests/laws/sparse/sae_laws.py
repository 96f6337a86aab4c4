"""Laws of k-sparse, winner-take-all and dictionary autoencoders: supports, penalties, gates, thresholds, streams."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import aezoo

SHAPE = (2, 3, 4)


def data(n: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


def create(name: str, **settings: Any) -> Any:
    return aezoo.create_model(name, **{"input_shape": SHAPE, **settings})


def build(name: str, **settings: Any) -> Any:
    return create(name, **settings).double()


def gradients(loss: Tensor, model: Any) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        label = f"{name}: "
        torch.testing.assert_close(found[name], expected[name], msg=label.__add__)


def gap(a: Any, b: Any) -> float:
    """The largest difference."""
    return float((a - b).detach().abs().max())


class BatchCallback(pl.Callback):
    """Record what `look` returns after each batch."""

    def __init__(self, look: Any) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.look(pl_module, outputs))


def trained(model: Any, x: Any, quiet: Any, look: Any, batch: int = 25, **settings: Any) -> list[Any]:
    """What `look` returns for the model and its terms after each step of an epoch."""
    watch = BatchCallback(look)
    quiet(max_epochs=1, callbacks=[watch], **settings).fit(model, torch.utils.data.DataLoader(x, batch_size=batch))
    return watch.seen


# ---- sae_l1: Bricken et al. 2023, and April 2024 ---------------------------------------------------------------------


def sae(**settings: Any) -> Any:
    return build("sae_l1", **{"latent_dim": 12, "l1": 0.7, **settings})


def rescaled(model: Any, c: Tensor) -> Any:
    """The model with directions c d_i and activations f_i / c."""
    with torch.no_grad():
        model.decoder.W_NX *= c[:, None]
        model.encoder.weight /= c[:, None]
        model.encoder.bias /= c
    return model


@pytest.mark.parametrize("name", ["sae_l1", "gated_sae", "jumprelu_sae", "transcoder"])
def test_directions_keep_unit_norm_without_radial_gradient(name: str, digits: Any, quiet: Any) -> None:
    extra = {"targets": (1, 3)} if name == "transcoder" else {}
    model = create(name, input_shape=(8, 8), latent_dim=48, lr=1e-2, **extra)
    along: list[float] = []
    off: list[float] = []
    start: list[Tensor] = []

    class Steps(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.optimizers[0].register_step_post_hook(self.after_step)

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            start[:] = [model.decoder.W_NX.detach().clone()]

        def after_step(self, *_: Any) -> None:
            W = model.decoder.W_NX
            along.append(float((W.grad * start[0]).sum(1).abs().max() / W.grad.abs().max()))
            off.append(float((W.detach().norm(dim=1) - 1).abs().max()))

    loader = torch.utils.data.DataLoader(digits[:200, 0].float(), batch_size=25)
    watch = BatchCallback(lambda module, terms: float((module.decoder.W_NX.detach().norm(dim=1) - 1).abs().max()))
    quiet(max_epochs=1, callbacks=[Steps(), watch]).fit(model, loader)
    assert len(along) == len(watch.seen) == 8
    assert max(along) < 1e-5
    assert max(watch.seen) < 1e-6
    assert max(off) > 1e-5  # the optimizer step leaves the unit sphere, so norms are set after it


@pytest.mark.parametrize(("name", "steps", "term"), [
    ("sae_l1", "l1_steps", "l1"), ("gated_sae", "l1_steps", "l1"), ("crosscoder", "l1_steps", "l1"),
    ("transcoder", "l1_steps", "l1"), ("jumprelu_sae", "l0_steps", "l0"),
])  # fmt: skip
def test_penalty_warms_up_linearly_and_is_full_in_eval(
    name: str, steps: str, term: str, digits: Any, quiet: Any
) -> None:
    weight = {"jumprelu_sae": "l0_weight"}.get(name, "l1")
    model = create(name, input_shape=(8, 8), latent_dim=16, **{steps: 4, weight: 0.6})

    def share(module: Any, terms: Any) -> float:
        rest = terms["loss"] - terms["nll"] - terms.get("aux", 0)
        return float((rest / terms[term]).detach()) / 0.6

    found = trained(model, digits[:150, 0].float(), quiet, share)
    assert found == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1], abs=1e-4)
    fresh = create(name, input_shape=(8, 8), latent_dim=16, **{steps: 4, weight: 0.6}).eval()
    assert share(fresh, fresh.loss(digits[:20, 0].float())) == pytest.approx(1, abs=1e-4)


# ---- crosscoder: Lindsey et al. 2024 ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("k_sparse", {"k": 0}), ("k_sparse", {"k": 13, "latent_dim": 12}),
        ("k_sparse", {"start_k": 2, "k": 3}), ("k_sparse", {"start_k": 13, "latent_dim": 12, "k": 3}),
        ("k_sparse", {"k_steps": -1}), ("k_sparse", {"alpha": 0.0}),
        ("k_sparse", {"alpha": 5.0, "k": 3, "latent_dim": 12}),
        ("wta_ae", {"lifetime": 0.0}), ("wta_ae", {"lifetime": 1.1}), ("wta_ae", {"latent_dim": 0}),
        ("wta_ae", {"hidden_dims": (0,), "spatial": True}),
        ("sae_l1", {"form": "march"}), ("sae_l1", {"l1": -1.0}), ("sae_l1", {"l1_steps": -1}),
        ("sae_l1", {"resample_steps": -1}), ("sae_l1", {"dead_after": 0}), ("sae_l1", {"latent_dim": 0}),
        ("jumprelu_sae", {"l0_weight": -1.0}), ("jumprelu_sae", {"l0_steps": -1}),
        ("jumprelu_sae", {"target_l0": -1.0}), ("jumprelu_sae", {"target_l0": 13.0, "latent_dim": 12}),
        ("jumprelu_sae", {"threshold": -0.1}), ("jumprelu_sae", {"bandwidth": 0.0}),
        ("transcoder", {"targets": (2,)}), ("transcoder", {"targets": (0, 1)}), ("transcoder", {"targets": (-1,)}),
        ("transcoder", {"targets": (0, 0)}), ("transcoder", {"targets": (0,), "input_shape": (24,)}),
    ],
)  # fmt: skip
def test_invalid_values_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(aezoo.AezooError, match=next(iter(settings))) as refusal:
        build(name, **settings)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["sae_l1", "gated_sae", "jumprelu_sae", "transcoder", "crosscoder"])
def test_bias_can_start_at_geometric_median(name: str, quiet: Any) -> None:
    extra = {"targets": (2, 0)} if name == "transcoder" else {}
    x = torch.rand(40, 3, 5) ** 4
    model = create(name, input_shape=(3, 5), latent_dim=8, data_init=True, lr=1e-30, **extra)
    trained(model, x, quiet, lambda m, terms: 0, batch=40)
    y, m = (x[:, [2, 0]] if extra else x).flatten(1).double(), model.decoder.b_X.detach().double()
    pull = F.normalize(y - m, dim=1).sum(0)  # sum of the unit vectors from m to all samples
    assert pull.norm() < 1e-3 < F.normalize(y - y.mean(0), dim=1).sum(0).norm()
