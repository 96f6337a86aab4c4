"""Laws of Sparse autoencoder with an L1 penalty and a dictionary (Bricken et al. 2023)."""

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from sae_laws import (  # noqa: F401
    assert_same,
    build,
    create,
    data,
    gap,
    gradients,
    rescaled,
    sae,
    test_bias_can_start_at_geometric_median,
    test_directions_keep_unit_norm_without_radial_gradient,
    test_invalid_values_are_refused,
    test_penalty_warms_up_linearly_and_is_full_in_eval,
    trained,
)
from torch import Tensor

import aezoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

# ---- sae_l1: Bricken et al. 2023, and April 2024 ---------------------------------------------------------------------


def by_hand(model: Any, x: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """f, x_hat and the penalty of each sample."""
    flat, W, b = x.flatten(1), model.decoder.W_NX, model.decoder.b_X
    seen = flat - b if form == "unit_norm" else flat
    f = (seen @ model.encoder.weight.T + model.encoder.bias).clamp(min=0)
    lengths = 1 if form == "unit_norm" else W.square().sum(1).sqrt()
    return f, f @ W + b, (f * lengths).sum(1)


@pytest.mark.parametrize("form", ["unit_norm", "april"])
def test_both_forms_match_formulas(form: str, shifted: Any) -> None:
    model, x = shifted(sae(form=form)), data(9)
    if form == "april":
        with torch.no_grad():
            model.decoder.W_NX *= torch.linspace(0.3, 2, 12)[:, None]
    f, x_hat, penalty = by_hand(model, x, form)
    terms = model.loss(x)
    torch.testing.assert_close(model.encode(x), f)
    torch.testing.assert_close(model(x).flatten(1), x_hat)
    sse = (x_hat - x.flatten(1)).square().sum(1).mean()
    torch.testing.assert_close(terms["nll"], sse + 12 * math.log(math.pi))
    torch.testing.assert_close(terms["l1"], penalty.mean())
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.7 * terms["l1"])
    assert_same(gradients(terms["loss"], model), gradients(sse + 0.7 * penalty.mean(), model))
    other = by_hand(model, x, "april" if form == "unit_norm" else "unit_norm")
    assert gap(other[0], f) > 1e-2
    assert 0 < (f == 0).sum() < f.numel()


@pytest.mark.parametrize("form", ["unit_norm", "april"])
def test_no_penalty_equals_relu_autoencoder(form: str, shifted: Any) -> None:
    model, x = shifted(sae(form=form, l1=0.0)), data(6)
    dense = build("dense_ae", latent_dim=12, hidden_dims=(), code_activation="relu", likelihood="gaussian")
    W, b, up, c = dense.parameters()
    shift = model.encoder.weight @ model.decoder.b_X if form == "unit_norm" else 0
    with torch.no_grad():
        W.copy_(model.encoder.weight)
        b.copy_(model.encoder.bias - shift)
        up.copy_(model.decoder.W_NX.T)
        c.copy_(model.decoder.b_X)
    torch.testing.assert_close(model.encode(x), dense.encode(x))
    torch.testing.assert_close(model.score(x), dense.score(x))
    torch.testing.assert_close(model.loss(x)["loss"], dense.loss(x)["loss"])
    found, expected = gradients(model.loss(x)["loss"], model), gradients(dense.loss(x)["loss"], dense)
    torch.testing.assert_close(found["decoder.W_NX"].T, [*expected.values()][2])


def test_april_loss_is_invariant_to_latent_scale(shifted: Any) -> None:
    model, x, c = shifted(sae(form="april")), data(9), torch.linspace(0.2, 3, 12).double()
    before, plain = model.loss(x), model.encode(x).sum(1).mean()
    after = rescaled(model, c).loss(x)
    for term in before:
        torch.testing.assert_close(after[term], before[term])
    assert gap(model.encode(x).sum(1).mean(), plain) > 0.1  # the sum of f itself does change
    # so the gradient along each latent's scale is 0
    slopes = gradients(model.loss(x)["loss"], model)
    along = (slopes["decoder.W_NX"] * model.decoder.W_NX).sum(1)
    along -= (slopes["encoder.weight"] * model.encoder.weight).sum(1) + slopes["encoder.bias"] * model.encoder.bias
    assert along.abs().max() < 1e-9


def test_directions_of_the_april_form_take_any_norm(digits: Any, quiet: Any) -> None:
    model = create("sae_l1", input_shape=(1, 8, 8), latent_dim=48, form="april", lr=1e-2)
    norms = trained(model, digits[:200].float(), quiet, lambda m, terms: m.decoder.W_NX.detach().norm(dim=1))
    assert (norms[-1] - 1).abs().min() > 1e-6
    assert (norms[-1] - norms[0]).abs().max() > 1e-2


@pytest.mark.slow
def test_activity_falls_with_the_weight_of_the_sum(digits: Tensor, adam: Any) -> None:
    x, activity = digits[:1437].float(), []
    for l1 in (0.0, 0.3, 3.0):
        torch.manual_seed(0)
        model = create("sae_l1", input_shape=(1, 8, 8), l1=l1, latent_dim=64)
        adam(model, x, steps=200, lr=3e-3, batch=128)
        h = model.encode(x).detach()
        activity.append((float(h.mean()), float((h > 0).sum(1).float().mean())))
    assert activity[0][0] > 1.3 * activity[1][0] > 1.3 * 1.3 * activity[2][0]
    assert activity[0][1] > activity[1][1] > activity[2][1]


DEAD = torch.tensor([2, 5, 7])


def with_dead(model: Any, x: Tensor) -> tuple[Any, Any]:
    """The model after two steps of Adam, with three dead latents."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(x)["loss"].backward()
        optimizer.step()
    model.since_fired_N.zero_()
    model.since_fired_N[DEAD] = model.dead_after
    return model, optimizer


@pytest.mark.parametrize("form", ["unit_norm", "april"])
def test_resampled_latents_have_a_fifth_of_the_norm(form: str, shifted: Any) -> None:
    model, optimizer = with_dead(shifted(sae(form=form)), data(30))
    x, before = data(40), {name: p.detach().clone() for name, p in model.named_parameters()}
    model.resample(x, optimizer, seed=3)
    live = torch.ones(12, dtype=torch.bool)
    live[DEAD] = False
    W, b, D = model.encoder.weight, model.encoder.bias, model.decoder.W_NX
    for name, p in (("encoder.weight", W), ("encoder.bias", b), ("decoder.W_NX", D)):
        assert torch.equal(p[live], before[name][live])
        moments = optimizer.state[p]
        for key in ("exp_avg", "exp_avg_sq"):
            assert (moments[key][DEAD] == 0).all()
            assert moments[key][live].any()
    assert (b[DEAD] == 0).all()
    assert (model.since_fired_N == 0).all()
    fifth = 0.2 * before["encoder.weight"][live].norm(dim=1).mean()
    torch.testing.assert_close(W[DEAD].norm(dim=1), fifth.expand(3))
    torch.testing.assert_close(D[DEAD].norm(dim=1), before["decoder.W_NX"][live].norm(dim=1).mean().expand(3))
    seen = F.normalize(model.read(x), dim=1)
    rows = (W[DEAD] / fifth @ seen.T).argmax(1)
    torch.testing.assert_close(W[DEAD], fifth * seen[rows])
    centred = F.normalize(x.flatten(1) - model.decoder.b_X, dim=1)
    torch.testing.assert_close(D[DEAD], D[DEAD].norm(dim=1, keepdim=True) * centred[rows])
    held = [p.detach().clone() for p in model.parameters()]
    model.resample(x, optimizer, seed=4)  # no latent is dead now
    assert all(torch.equal(a, b) for a, b in zip(held, model.parameters(), strict=True))


@pytest.mark.slow
def test_samples_are_drawn_by_the_square_of_their_error(shifted: Any) -> None:
    """Sampling by the error itself fails the chi-square test."""
    model, optimizer = with_dead(shifted(sae()), data(30))
    x = data(4) * torch.tensor([0.5, 1.0, 1.5, 2.0]).view(4, 1, 1, 1)
    sse = (model(x) - x).flatten(1).square().sum(1).detach()
    seen = F.normalize(model.read(x), dim=1).detach()
    drawn = torch.zeros(4, dtype=torch.float64)
    for seed in range(700):
        model.since_fired_N[DEAD] = model.dead_after
        model.resample(x, optimizer, seed)
        # errors stay the same: live latents do not change and resampled ones are set inactive
        rows = (F.normalize(model.encoder.weight[DEAD], dim=1) @ seen.T).argmax(1)
        drawn += torch.bincount(rows, minlength=4)
        with torch.no_grad():
            model.encoder.bias[DEAD] = -100
    squared, plain = (share / share.sum() for share in (sse**2, sse))
    chi2 = [float(((drawn - 2100 * share) ** 2 / (2100 * share)).sum()) for share in (squared, plain)]
    assert chi2[0] < 16.3 < chi2[1]  # 0.1 % critical value with three degrees of freedom


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_resampling_ignores_non_finite_samples(value: float, shifted: Any) -> None:
    """The fault guard would skip the step but not restore the weights."""
    for seed in range(4):
        model, optimizer = with_dead(shifted(sae()), data(30))
        x = data(3)
        seen = F.normalize(model.read(x[:2]), dim=1).detach()
        x[2] = value
        model.resample(x, optimizer, seed)
        found = F.normalize(model.encoder.weight[DEAD].detach(), dim=1) @ seen.T
        assert found.amax(1).min() > 0.9999


def test_fit_resamples_dead_latents_at_interval(digits: Any, quiet: Any) -> None:
    settings: dict[str, Any] = {"input_shape": (1, 8, 8), "latent_dim": 32, "dead_after": 30}
    shares = []
    for resample_steps in (0, 4):
        torch.manual_seed(0)
        model = create("sae_l1", resample_steps=resample_steps, **settings)
        with torch.no_grad():
            model.encoder.bias[:9] = -50
        seen = trained(model, digits[:200].float(), quiet, lambda m, terms: int((m.encoder.bias[:9] < -40).sum()))
        shares.append(seen)
    assert shares[0] == [9] * 8
    assert shares[1] == [9, 9, 9, 9, 0, 0, 0, 0]


def test_checkpoint_before_revival_keeps_the_revival(digits: Any, quiet: Any, tmp_path: Any) -> None:
    path, ends = tmp_path / "4.ckpt", []

    def save(trainer: Any, *_: Any) -> None:
        if trainer.global_step == 4 and not path.exists():
            trainer.save_checkpoint(path)

    for ckpt_path in (None, path):
        torch.manual_seed(0)
        model = create("sae_l1", input_shape=(1, 8, 8), latent_dim=32, dead_after=30, resample_steps=4)
        with torch.no_grad():
            model.encoder.bias[:9] = -50
        arrays = aezoo.DataModule.from_arrays(digits[:200].float(), batch_size=25, val_fraction=0, test_fraction=0)
        callbacks = [pl.callbacks.LambdaCallback(on_train_batch_end=save)]
        quiet(max_epochs=1, callbacks=callbacks).fit(model, arrays, ckpt_path=ckpt_path)
        ends.append(model.state_dict())
    assert ends[0]["encoder.bias"][:9].min() > -40
    assert all(torch.equal(value, ends[0][name]) for name, value in ends[1].items())
