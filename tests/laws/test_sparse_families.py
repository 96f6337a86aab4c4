"""Laws of k-sparse, winner-take-all and dictionary autoencoders: supports, penalties, gates, thresholds, streams."""

import math
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor
from two_ranks import on_two_ranks

import aezoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
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


class Watch(pl.Callback):
    """What each step of the optimiser is given and leaves."""

    def __init__(self, look: Any) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.look(pl_module, outputs))


def trained(model: Any, x: Any, quiet: Any, look: Any, batch: int = 25, **settings: Any) -> list[Any]:
    """What `look` sees of the model and its terms after each step of an epoch."""
    watch = Watch(look)
    quiet(max_epochs=1, callbacks=[watch], **settings).fit(model, torch.utils.data.DataLoader(x, batch_size=batch))
    return watch.seen


# ---- k_sparse: Makhzani & Frey 2013 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 11, 12])
def test_the_k_largest_units_are_kept_whatever_their_sign(k: int, shifted: Any) -> None:
    model, x = shifted(build("k_sparse", latent_dim=12, k=k)), data(30) - 0.5
    z = (x.flatten(1) @ model.encoder.weight.T + model.encoder.bias).detach().numpy()
    support = np.argsort(-z, axis=1)[:, :k]
    kept = np.zeros_like(z)
    np.put_along_axis(kept, support, np.take_along_axis(z, support, 1), 1)
    found = model.encode(x)
    np.testing.assert_allclose(found.detach().numpy(), kept, atol=1e-12)
    assert ((found != 0).sum(1) == k).all()
    assert model.loss(x)["l0"] == k
    # neither a ReLU nor the largest absolute values: z is linear on its support
    assert (kept < 0).any() or k < 5
    by_size = np.argsort(-np.abs(z), axis=1)[:, :k]
    assert k == 12 or (np.sort(by_size) != np.sort(support)).any()


def test_with_all_units_it_is_the_linear_autoencoder_of_tied_weights(shifted: Any) -> None:
    x = data(9)
    model, linear = shifted(build("k_sparse", latent_dim=12, k=12)), build("linear_ae", latent_dim=12)
    with torch.no_grad():
        linear.encoder[1].weight.copy_(model.encoder.weight)
        linear.encoder[1].bias.copy_(model.encoder.bias)
        linear.decoder[0].weight.copy_(model.encoder.weight.T)
        linear.decoder[0].bias.copy_(model.decoder.bias)
    torch.testing.assert_close(model.encode(x), linear.encode(x))
    torch.testing.assert_close(model(x), linear(x))
    found, expected = model.loss(x)["loss"], linear.loss(x)["loss"]
    torch.testing.assert_close(found, expected)
    down, up = torch.autograd.grad(expected, (linear.encoder[1].weight, linear.decoder[0].weight))
    (tied,) = torch.autograd.grad(found, model.encoder.weight)
    torch.testing.assert_close(tied, down + up.T)
    assert gap(tied, down) > 1e-2  # as if the decoder did not train it
    assert sum(p.numel() for p in model.parameters()) == 12 * 24 + 12 + 24


def test_units_out_of_the_support_get_no_gradient(shifted: Any) -> None:
    model, x = shifted(build("k_sparse", latent_dim=12, k=2, start_k=9, k_steps=10)), data(2)
    for steps, mode in ((10, True), (0, False)):
        model.train(mode).steps.fill_(steps)
        found = gradients(model.loss(x)["loss"], model)
        idle = ~(model.encode(x) != 0).any(0)
        assert 8 <= idle.sum() <= 10
        for name in ("encoder.weight", "encoder.bias"):
            assert torch.equal(found[name].reshape(12, -1).abs().amax(1) == 0, idle)


def test_k_falls_in_a_line_during_training_and_evaluation_has_the_last(shifted: Any, quiet: Any) -> None:
    model, x = shifted(build("k_sparse", latent_dim=12, k=3, start_k=11, k_steps=6)).float(), data(250).float()
    seen = trained(model, x, quiet, lambda module, terms: float(terms["l0"]))
    expected = [11, 10, 8, 7, 6, 4, 3, 3, 3, 3]  # 11 - 8 t / 6, to the nearest whole number
    assert seen == expected
    fresh = shifted(build("k_sparse", latent_dim=12, k=3, start_k=11, k_steps=6))
    assert fresh.train().loss(data(5))["l0"] == 11
    assert fresh.eval().loss(data(5))["l0"] == 3
    assert build("k_sparse", latent_dim=12, k=3, start_k=11).train().loss(data(5))["l0"] == 3


@pytest.mark.parametrize(("alpha", "kept"), [(1.0, 5), (1.3, 6), (2.4, 12), (0.01, 1)])
def test_codes_take_alpha_k_units_and_the_loss_k(alpha: float, kept: int, shifted: Any) -> None:
    model, x = shifted(build("k_sparse", latent_dim=12, k=5, alpha=alpha)), data(7)
    for mode in (True, False):
        model.train(mode)
        assert ((model.encode(x) != 0).sum(1) == kept).all()
        assert model.loss(x)["l0"] == 5
        assert torch.equal(model(x), model.decode(model.encode(x)))
    assert (gap(model.loss(x)["nll"], model.score(x).mean()) < 1e-9) == (kept == 5)


# ---- wta_ae: Makhzani & Frey 2015 ------------------------------------------------------------------------------------


def last_layer(net: Any) -> Any:
    """The layer that gives the code."""
    return [layer for layer in net.modules() if hasattr(layer, "bias")][-1]


def winners_by_hand(h: np.ndarray, p: float) -> np.ndarray:
    """Which samples each unit is kept for, (B, D): by a loop over units."""
    kept, most = np.zeros(h.shape, bool), math.ceil(round(p * len(h), 9))
    for unit in range(h.shape[1]):
        kept[np.argsort(-h[:, unit])[:most], unit] = True
    return kept


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize(("lifetime", "n"), [(0.05, 7), (0.05, 40), (0.07, 100), (0.5, 9), (1.0, 6)])
def test_each_unit_is_kept_for_its_share_of_the_batch(lifetime: float, n: int, spatial: bool, shifted: Any) -> None:
    model, x = shifted(build("wta_ae", lifetime=lifetime, spatial=spatial, latent_dim=10)), data(n)
    with torch.no_grad():
        last_layer(model.encoder).bias += 5  # no zeros: what is kept can be seen
        h = model.encode(x)
        found = model.keep(h, model.winners).flatten(2) if spatial else model.keep(h, model.winners)[..., None]
    best = h.flatten(2).amax(2) if spatial else h
    kept = winners_by_hand(best.numpy(), lifetime)
    used = (found != 0).any(2)
    np.testing.assert_array_equal(used.numpy(), kept)
    assert (used.sum(0) == math.ceil(round(lifetime * n, 9))).all()
    assert lifetime == 1 or len(used.sum(1).unique()) > 1  # a sample may have any number
    assert ((found != 0).sum(2) <= 1).all()
    torch.testing.assert_close(found.sum(2), best * torch.from_numpy(kept))
    places = found.argmax(2)[used]
    assert torch.equal(places, h.flatten(2).argmax(2)[used]) if spatial else True
    assert math.ceil(0.07 * 100) == 8  # the product is rounded up: one winner too many without care


@pytest.mark.parametrize("spatial", [False, True])
def test_winners_are_those_of_the_batch_of_all_ranks(spatial: bool, shifted: Any) -> None:
    model, x = shifted(build("wta_ae", lifetime=0.25, spatial=spatial, latent_dim=10)).train(), data(12)
    single = shifted(model).train()
    one, together = single.loss(x), on_two_ranks(single, x)
    before = on_two_ranks(single, x, exchange=False)
    for term in one:
        torch.testing.assert_close(together.terms[term], one[term])
    expected = [*torch.autograd.grad(one["loss"], [*single.parameters()])]
    for a, b in zip(together.gradients(), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert gap(before.terms["nll"], one["nll"]) > 1e-6
    first, second = (copy.theta_D for copy in together.copies)
    assert torch.equal(first, second)
    # a rank that takes itself for the first keeps the samples of another
    wrong = on_two_ranks(single, x, ranked=False)
    assert gap(wrong.terms["nll"], one["nll"]) > 1e-6


def test_codes_have_no_sparsity_at_all_after_training(shifted: Any) -> None:
    for spatial in (False, True):
        model, x = shifted(build("wta_ae", spatial=spatial, latent_dim=10)), data(8)
        model.train().loss(x)
        for mode in (True, False):
            assert torch.equal(model.train(mode).encode(x), model.encoder(x).relu())
        torch.testing.assert_close(model.encode(x)[2:3], model.encode(x[2:3]))


def test_the_gradient_passes_through_the_winners_alone(shifted: Any) -> None:
    model, x = shifted(build("wta_ae", lifetime=0.2, latent_dim=3)), data(10)
    with torch.no_grad():
        last_layer(model.encoder).bias += 5
    h = model.encode(x)
    (through,) = torch.autograd.grad(model.loss(x)["loss"], last_layer(model.encoder).bias)
    h_hat = model.decoder(h * model.winners(h))
    slope = torch.autograd.grad(model.nll(h_hat, x).mean(), h)[0]
    assert torch.equal(slope != 0, model.winners(h))
    torch.testing.assert_close(through, slope.sum(0))


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_with_every_sample_a_winner_it_is_the_autoencoder_with_a_relu_code(likelihood: str, shifted: Any) -> None:
    x, found = data(6), []
    for name, extra in (("wta_ae", {"lifetime": 1.0}), ("dense_ae", {"code_activation": "relu"})):
        torch.manual_seed(0)
        model = build(name, latent_dim=9, hidden_dims=(), likelihood=likelihood, **extra)
        found.append(shifted(model).eval())
    mine, dense = (model.loss(x)["loss"] for model in found)
    torch.testing.assert_close(mine, dense)
    slopes = [[*gradients(loss, model).values()] for loss, model in zip((mine, dense), found, strict=True)]
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(found[0](x), found[1](x))  # nothing has been trained: theta is 0


@pytest.mark.parametrize("spatial", [False, True])
def test_reconstructions_come_to_keep_what_the_batches_kept(spatial: bool, shifted: Any) -> None:
    model, x = shifted(build("wta_ae", lifetime=0.25, spatial=spatial, latent_dim=10)), data(16)
    nll = [model.train().loss(x)["nll"] for _ in range(300)][-1]
    h = model.eval().encode(x)
    least = (h.flatten(2).amax(2) if spatial else h).sort(0, descending=True).values[3]
    torch.testing.assert_close(model.theta_D, least.detach(), rtol=1e-6, atol=1e-9)
    model.theta_D.sub_(1e-7)
    torch.testing.assert_close(model.score(x).mean(), nll, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.nll(model(x), x), model.score(x))
    everything = model.nll(model.decoder(model.encode(x)), x).mean()
    assert everything > nll + 1e-3  # all units at once: too much
    held = model.theta_D.clone()
    model.loss(x)
    assert torch.equal(model.theta_D, held)


# ---- sae_l1: Bricken et al. 2023, and April 2024 ---------------------------------------------------------------------


def sae(**settings: Any) -> Any:
    return build("sae_l1", **{"latent_dim": 12, "l1": 0.7, **settings})


def by_hand(model: Any, x: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """f, x_hat and the penalty of each sample."""
    flat, W, b = x.flatten(1), model.decoder.W_NX, model.decoder.b_X
    seen = flat - b if form == "unit_norm" else flat
    f = (seen @ model.encoder.weight.T + model.encoder.bias).clamp(min=0)
    lengths = 1 if form == "unit_norm" else W.square().sum(1).sqrt()
    return f, f @ W + b, (f * lengths).sum(1)


@pytest.mark.parametrize("form", ["unit_norm", "april"])
def test_both_forms_are_their_formulas_in_nats(form: str, shifted: Any) -> None:
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
def test_without_penalty_it_is_the_dense_autoencoder_with_a_relu_code(form: str, shifted: Any) -> None:
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


def rescaled(model: Any, c: Tensor) -> Any:
    """The model with c d_i and f_i / c."""
    with torch.no_grad():
        model.decoder.W_NX *= c[:, None]
        model.encoder.weight /= c[:, None]
        model.encoder.bias /= c
    return model


def test_the_april_loss_does_not_see_how_a_latent_is_scaled(shifted: Any) -> None:
    model, x, c = shifted(sae(form="april")), data(9), torch.linspace(0.2, 3, 12).double()
    before, plain = model.loss(x), model.encode(x).sum(1).mean()
    after = rescaled(model, c).loss(x)
    for term in before:
        torch.testing.assert_close(after[term], before[term])
    assert gap(model.encode(x).sum(1).mean(), plain) > 0.1  # what a plain sum of f would see
    # so the slope along each latent's scale is 0
    slopes = gradients(model.loss(x)["loss"], model)
    along = (slopes["decoder.W_NX"] * model.decoder.W_NX).sum(1)
    along -= (slopes["encoder.weight"] * model.encoder.weight).sum(1) + slopes["encoder.bias"] * model.encoder.bias
    assert along.abs().max() < 1e-9


@pytest.mark.parametrize("name", ["sae_l1", "gated_sae", "jumprelu_sae", "transcoder"])
def test_directions_have_unit_norm_after_each_step_and_no_gradient_along_them(
    name: str, digits: Any, quiet: Any
) -> None:
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
    watch = Watch(lambda module, terms: float((module.decoder.W_NX.detach().norm(dim=1) - 1).abs().max()))
    quiet(max_epochs=1, callbacks=[Steps(), watch]).fit(model, loader)
    assert len(along) == len(watch.seen) == 8
    assert max(along) < 1e-5
    assert max(watch.seen) < 1e-6
    assert max(off) > 1e-5  # a step leaves the sphere: a norm that is set before it is lost


def test_directions_of_the_april_form_take_any_norm(digits: Any, quiet: Any) -> None:
    model = create("sae_l1", input_shape=(1, 8, 8), latent_dim=48, form="april", lr=1e-2)
    norms = trained(model, digits[:200].float(), quiet, lambda m, terms: m.decoder.W_NX.detach().norm(dim=1))
    assert (norms[-1] - 1).abs().min() > 1e-6
    assert (norms[-1] - norms[0]).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "steps", "term"), [
    ("sae_l1", "l1_steps", "l1"), ("gated_sae", "l1_steps", "l1"), ("crosscoder", "l1_steps", "l1"),
    ("transcoder", "l1_steps", "l1"), ("jumprelu_sae", "l0_steps", "l0"),
])  # fmt: skip
def test_the_penalty_rises_in_a_line_and_evaluation_has_all_of_it(
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
    """The model after two steps of Adam, three of its latents dead."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(x)["loss"].backward()
        optimizer.step()
    model.since_fired_N.zero_()
    model.since_fired_N[DEAD] = model.dead_after
    return model, optimizer


@pytest.mark.parametrize("form", ["unit_norm", "april"])
def test_dead_latents_start_anew_from_samples_with_a_fifth_of_the_norm(form: str, shifted: Any) -> None:
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
    model.resample(x, optimizer, seed=4)  # nothing is dead now
    assert all(torch.equal(a, b) for a, b in zip(held, model.parameters(), strict=True))


def test_samples_are_drawn_by_the_square_of_their_error(shifted: Any) -> None:
    """A rival draws by the error itself: then one sample would be taken half as often as it is here."""
    model, optimizer = with_dead(shifted(sae()), data(30))
    x = data(4) * torch.tensor([0.5, 1.0, 1.5, 2.0]).view(4, 1, 1, 1)
    sse = (model(x) - x).flatten(1).square().sum(1).detach()
    seen = F.normalize(model.read(x), dim=1).detach()
    drawn = torch.zeros(4, dtype=torch.float64)
    for seed in range(700):
        model.since_fired_N[DEAD] = model.dead_after
        model.resample(x, optimizer, seed)
        # the live latents stay, and so do the errors, where the new ones are silent
        rows = (F.normalize(model.encoder.weight[DEAD], dim=1) @ seen.T).argmax(1)
        drawn += torch.bincount(rows, minlength=4)
        with torch.no_grad():
            model.encoder.bias[DEAD] = -100
    squared, plain = (share / share.sum() for share in (sse**2, sse))
    chi2 = [float(((drawn - 2100 * share) ** 2 / (2100 * share)).sum()) for share in (squared, plain)]
    assert chi2[0] < 16.3 < chi2[1]  # three degrees of freedom, 0.1 %


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_no_latent_starts_anew_from_a_sample_that_is_not_finite(value: float, shifted: Any) -> None:
    """The fault guard would skip the step, but not bring back the weights."""
    for seed in range(4):
        model, optimizer = with_dead(shifted(sae()), data(30))
        x = data(3)
        seen = F.normalize(model.read(x[:2]), dim=1).detach()
        x[2] = value
        model.resample(x, optimizer, seed)
        found = F.normalize(model.encoder.weight[DEAD].detach(), dim=1) @ seen.T
        assert found.amax(1).min() > 0.9999


def test_a_fit_revives_dead_latents_when_it_is_time(digits: Any, quiet: Any) -> None:
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


def test_a_checkpoint_between_a_step_and_the_revival_after_it_loses_no_revival(
    digits: Any, quiet: Any, tmp_path: Any
) -> None:
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


# ---- jumprelu_sae: Rajamanoharan et al. 2024, 2407.14435 -------------------------------------------------------------


def jump(shifted: Any, **settings: Any) -> Any:
    """Thresholds of all sizes, and a rectangle that some pre-activations are in."""
    model = shifted(build("jumprelu_sae", **{"latent_dim": 12, "bandwidth": 0.5, "l0_weight": 0.3, **settings}))
    with torch.no_grad():
        model.theta_N.abs_()
    return model


def test_a_latent_fires_at_its_pre_activation_where_that_exceeds_its_threshold(shifted: Any) -> None:
    model, x = jump(shifted), data(20)
    pi = (x.flatten(1) - model.decoder.b_X) @ model.encoder.weight.T + model.encoder.bias
    f = torch.where(pi > model.theta_N, pi, 0.0)
    terms = model.loss(x)
    assert torch.equal(model.encode(x), model.encode(x).clamp(min=0))
    torch.testing.assert_close(model.encode(x), f)
    torch.testing.assert_close(model(x).flatten(1), f @ model.decoder.W_NX + model.decoder.b_X)
    torch.testing.assert_close(terms["l0"], (f > 0).sum(1).double().mean())
    torch.testing.assert_close(terms["nll"], model.score(x).mean())
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.3 * terms["l0"])
    assert ((pi > 0) & (pi < model.theta_N)).any()  # what a ReLU would let pass
    assert gap(f, (pi - model.theta_N).clamp(min=0)) > 0.1  # no soft threshold, which shrinks


def test_with_thresholds_at_zero_it_is_the_relu(shifted: Any) -> None:
    model, x = jump(shifted, l0_weight=0.0), data(9)
    relu = build("sae_l1", latent_dim=12, l1=0.0)
    with torch.no_grad():
        model.theta_N.zero_()
    relu.load_state_dict({name: value for name, value in model.state_dict().items() if name != "theta_N"})
    torch.testing.assert_close(model.encode(x), relu.encode(x))
    found, expected = gradients(model.loss(x)["loss"], model), gradients(relu.loss(x)["loss"], relu)
    assert (found.pop("theta_N") == 0).all()  # -theta / eps K
    assert_same(found, expected)


@pytest.mark.parametrize("bandwidth", [0.2, 1.0])
def test_thresholds_get_the_gradient_of_the_rectangle_and_pre_activations_that_of_what_fires(bandwidth: float) -> None:
    model = build("jumprelu_sae", latent_dim=12, bandwidth=bandwidth)
    with torch.no_grad():
        model.theta_N.uniform_(0.1, 1)
    pi = torch.randn(400, 12, dtype=torch.float64, requires_grad=True)
    weight, theta = torch.randn(400, 12, dtype=torch.float64), model.theta_N.detach()
    near: Any = ((pi.detach() - theta) / bandwidth > -0.5) & ((pi.detach() - theta) / bandwidth < 0.5)
    assert near.any(0).all()
    in_pi, in_theta = torch.autograd.grad((model.jump(pi) * weight).sum(), (pi, model.theta_N))
    torch.testing.assert_close(in_pi, weight * (pi > theta))
    torch.testing.assert_close(in_theta, (-theta / bandwidth * near * weight).sum(0))
    steps = model.step(pi)
    torch.testing.assert_close(steps, (pi > theta).double())
    in_theta, in_pi = torch.autograd.grad((steps * weight).sum(), (model.theta_N, pi), allow_unused=True)
    torch.testing.assert_close(in_theta, (-1 / bandwidth * near * weight).sum(0))
    assert in_pi is None or (in_pi == 0).all()


@pytest.mark.parametrize("theta", [0.01, 0.5, 1.5])
def test_the_mean_slope_of_the_l0_is_minus_the_density_at_the_threshold(theta: float) -> None:
    """Read after a ReLU, or from f, the rectangle has another half: rivals' slopes are halved or far too steep."""
    eps, n = 0.05, 1_000_000
    model = build("jumprelu_sae", latent_dim=1, bandwidth=eps, threshold=theta)
    pi = torch.randn(n, 1, dtype=torch.float64)

    def slope(values: Tensor) -> float:
        return float(torch.autograd.grad(values.sum() / n, model.theta_N)[0])

    density = float(stats.norm.pdf(theta))
    exact = float(stats.norm.cdf(theta + eps / 2) - stats.norm.cdf(theta - eps / 2)) / eps
    assert exact == pytest.approx(density, rel=1e-3)
    error = 5 * (density / eps / n) ** 0.5
    assert slope(model.step(pi)) == pytest.approx(-density, abs=error)
    # d/dtheta of the mean of pi H(pi - theta), which is the integral of u p(u) from theta on
    assert slope(model.jump(pi)) == pytest.approx(-theta * density, abs=error * max(theta, 0.01))
    halved = slope(model.step(model.jump(pi).detach()))  # dictionary_learning #55
    after_relu = slope(model.step(pi.relu()))
    assert abs(halved + density) > 0.3 * density
    assert theta != 0.01 or after_relu < -5 * density


def test_the_number_of_active_latents_trains_the_thresholds_alone(shifted: Any) -> None:
    model, x = jump(shifted, l0_weight=0.5), data(20)
    terms = model.loss(x)
    found = gradients(terms["l0"], model)
    pi, theta = model.pre_activations(x).detach(), model.theta_N.detach()
    near = (pi - theta).abs() < 0.25
    assert (near & (pi < theta)).any()  # those that do not fire count as well: not so in dictionary_learning #55
    torch.testing.assert_close(found.pop("theta_N"), -near.double().mean(0) / 0.5)
    assert all((g == 0).all() for g in found.values())
    whole, fit = gradients(terms["loss"], model), gradients(terms["nll"], model)
    torch.testing.assert_close(whole["theta_N"] - fit["theta_N"], 0.5 * gradients(terms["l0"], model)["theta_N"])


def test_a_target_is_approached_from_both_sides_by_the_mean_over_all_ranks(shifted: Any) -> None:
    model, x = jump(shifted, l0_weight=0.5, target_l0=3.0).train(), data(12)
    one, together, apart = model.loss(x), on_two_ranks(model, x), on_two_ranks(model, x, exchange=False)
    torch.testing.assert_close(one["loss"], one["nll"] + 0.5 * (one["l0"] / 3 - 1) ** 2)
    torch.testing.assert_close(together.terms["loss"], one["loss"])
    for a, b in zip(together.gradients(), gradients(one["loss"], model).values(), strict=True):
        torch.testing.assert_close(a, b)
    assert gap(apart.terms["loss"], one["loss"]) > 1e-6  # a mean of squares is not the square of a mean
    slopes = []
    for target in (0.5, 11.0):
        model.target_l0 = target
        terms = model.loss(x)
        slopes.append(gradients(terms["loss"] - terms["nll"], model)["theta_N"].sum())
    assert slopes[0] < 0 < slopes[1]


def test_thresholds_move_under_adam_where_their_logarithms_would_not(digits: Any) -> None:
    x = digits[:200].float()
    model = create("jumprelu_sae", input_shape=(1, 8, 8), latent_dim=32, threshold=0.001, l0_weight=1.0)
    log_theta = torch.nn.Parameter(model.theta_N.detach().log())
    optimizer = torch.optim.Adam([model.theta_N, log_theta], 1e-3)
    for _ in range(200):
        (slope,) = torch.autograd.grad(model.loss(x)["loss"], model.theta_N)
        model.theta_N.grad, log_theta.grad = slope, slope * log_theta.detach().exp()
        optimizer.step()
    assert model.theta_N.mean() > 0.02
    assert (log_theta.exp() < 0.0015).all()  # SAELens #494


def test_thresholds_stay_in_float32_where_the_rest_is_in_half_precision() -> None:
    model = create("jumprelu_sae", input_shape=(9,), latent_dim=5, threshold=0.0123).bfloat16()
    assert model.theta_N.dtype == torch.float32
    assert (model.theta_N == torch.tensor(0.0123)).all()
    assert {p.dtype for name, p in model.named_parameters() if name != "theta_N"} == {torch.bfloat16}
    lost = torch.full((5,), 0.0123, dtype=torch.bfloat16)
    assert torch.equal(lost + 1e-5, lost)  # SAELens #728: steps of this size come to nothing
    assert model.double().theta_N.dtype == torch.float64


def test_thresholds_do_not_fall_below_zero(digits: Any, quiet: Any) -> None:
    model = create(
        "jumprelu_sae", input_shape=(1, 8, 8), latent_dim=32, threshold=0.02, l0_weight=10.0, target_l0=31.0, lr=1e-2
    )
    least = trained(model, digits[:200].float(), quiet, lambda m, terms: float(m.theta_N.detach().min()))
    assert min(least) == 0


# ---- gated_sae: Rajamanoharan et al. 2024, 2404.16014 ----------------------------------------------------------------


def gated(shifted: Any, **settings: Any) -> Any:
    return shifted(build("gated_sae", **{"latent_dim": 12, "l1": 0.7, **settings}))


def gated_by_hand(model: Any, x: Tensor, frozen: bool = True) -> dict[str, Tensor]:
    W, b, D = model.encoder.weight, model.decoder.b_X, model.decoder.W_NX
    W_mag = torch.diag(model.r_N.exp()) @ W
    gate = (x.flatten(1) - b.detach()) @ W.T + model.encoder.bias
    f = torch.where(gate > 0, ((x.flatten(1) - b) @ W_mag.T + model.b_mag_N).clamp(min=0), 0.0)
    via = gate.clamp(min=0) @ (D.detach() if frozen else D) + (b.detach() if frozen else b)
    return {
        "f": f, "x_hat": f @ D + b, "l1": gate.clamp(min=0).sum(1).mean(),
        "aux": (via - x.flatten(1)).square().sum(1).mean(), "sse": (f @ D + b - x.flatten(1)).square().sum(1).mean(),
    }  # fmt: skip


def test_the_gated_loss_is_the_paper_s_and_so_are_its_gradients(shifted: Any) -> None:
    model, x = gated(shifted), data(20)
    expected, terms = gated_by_hand(model, x), model.loss(x)
    torch.testing.assert_close(model.encode(x), expected["f"])
    torch.testing.assert_close(model(x).flatten(1), expected["x_hat"])
    torch.testing.assert_close(terms["nll"], expected["sse"] + 12 * math.log(math.pi))
    for term in ("l1", "aux"):
        torch.testing.assert_close(terms[term], expected[term])
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.7 * terms["l1"] + terms["aux"])
    by_hand_loss = expected["sse"] + 0.7 * expected["l1"] + expected["aux"]
    assert_same(gradients(terms["loss"], model), gradients(by_hand_loss, model))
    assert 0 < (expected["f"] == 0).sum() < expected["f"].numel()


def test_each_gated_term_trains_its_own_parameters(shifted: Any) -> None:
    model, x = gated(shifted), data(20)
    terms = model.loss(x)
    gate_alone = {"encoder.weight", "encoder.bias"}
    for term, moved in (
        ("aux", gate_alone), ("l1", gate_alone),
        ("nll", {"encoder.weight", "r_N", "b_mag_N", "decoder.W_NX", "decoder.b_X"}),
    ):  # fmt: skip
        found = gradients(terms[term], model)
        assert {name for name, g in found.items() if g.any()} == moved, term
    leaks = gradients(gated_by_hand(model, x, frozen=False)["aux"], model)
    assert leaks["decoder.W_NX"].abs().max() > 1e-2 < leaks["decoder.b_X"].abs().max()


def test_with_gates_and_magnitudes_that_agree_it_is_the_relu(shifted: Any) -> None:
    model, x = gated(shifted), data(20)
    relu = shifted(sae())
    with torch.no_grad():
        model.r_N.zero_()
        model.b_mag_N.copy_(model.encoder.bias)
    relu.load_state_dict({name: v for name, v in model.state_dict().items() if name not in ("r_N", "b_mag_N")})
    torch.testing.assert_close(model.encode(x), relu.encode(x))
    torch.testing.assert_close(model.loss(x)["nll"], relu.loss(x)["nll"])
    torch.testing.assert_close(model.loss(x)["l1"], relu.loss(x)["l1"])
    with torch.no_grad():
        model.r_N.fill_(math.log(2))
        model.b_mag_N.mul_(2)
    torch.testing.assert_close(model.encode(x), 2 * relu.encode(x))  # exp(r), not r or 1 + r


def test_an_l1_penalty_shrinks_what_a_gate_leaves_at_its_size(lbfgs: Any) -> None:
    """One direction, of which every sample has at least 1: the L1 code is lam / 2 short, the gated one is not."""
    d = F.normalize(torch.randn(6, dtype=torch.float64), dim=0)
    a = torch.linspace(1, 3, 40, dtype=torch.float64)[:, None]
    share = {}
    for name in ("sae_l1", "gated_sae"):
        model = build(name, input_shape=(6,), latent_dim=1, l1=0.8)
        with torch.no_grad():
            model.decoder.W_NX.copy_(d[None])
            model.encoder.weight.copy_(d[None])
        for fixed in (model.decoder.W_NX, model.decoder.b_X, model.encoder.weight):
            fixed.requires_grad_(False)
        lbfgs(model, a * d, 60)
        share[name] = float((a - model.encode(a * d)).detach().mean())
    assert share["sae_l1"] == pytest.approx(0.4, abs=1e-4)
    assert share["gated_sae"] == pytest.approx(0, abs=1e-4)


# ---- transcoder: Dunefsky et al. 2024 --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24,), (4, 6), SHAPE])
@pytest.mark.parametrize("form", ["unit_norm", "april"])
def test_a_transcoder_without_targets_is_the_sparse_autoencoder(
    form: str, shape: tuple[int, ...], shifted: Any
) -> None:
    found = []
    for name in ("transcoder", "sae_l1"):
        torch.manual_seed(0)
        model, x = shifted(build(name, input_shape=shape, latent_dim=12, form=form, l1=0.4)), data(7, shape)
        loss = model.loss(x)["loss"]
        found.append({"x": x, "code": model.encode(x), "x_hat": model(x), "score": model.score(x), "loss": loss})
        found[-1] |= gradients(loss, model)
    assert_same(*found)


@pytest.mark.parametrize("form", ["unit_norm", "april"])
def test_a_transcoder_of_a_row_into_its_copy_is_the_sparse_autoencoder(form: str, shifted: Any) -> None:
    x = data(9, (10,))
    model = shifted(build("transcoder", input_shape=(2, 10), targets=(1,), latent_dim=12, form=form, l1=0.4))
    plain = build("sae_l1", input_shape=(10,), latent_dim=12, form=form, l1=0.4)
    state = {name: v for name, v in model.state_dict().items() if name not in ("mean_RX", "seen")}
    if form == "unit_norm":  # whose encoder sees x - b
        state["encoder.bias"] = state["encoder.bias"] + state["encoder.weight"] @ state["decoder.b_X"]
    plain.load_state_dict(state)
    pair = torch.stack([x, x], 1)
    torch.testing.assert_close(model.encode(pair), plain.encode(x))
    torch.testing.assert_close(model(pair)[:, 1], plain(x))
    torch.testing.assert_close(model.score(pair), plain.score(x))
    terms, expected = model.loss(pair), plain.loss(x)
    for term in terms:
        torch.testing.assert_close(terms[term], expected[term])
    mine, theirs = gradients(terms["loss"], model), gradients(expected["loss"], plain)
    torch.testing.assert_close(mine["decoder.W_NX"], theirs["decoder.W_NX"])
    assert form == "unit_norm" or all(torch.allclose(mine[name], theirs[name]) for name in mine)


def test_targets_are_predicted_from_the_other_rows_and_from_nothing_else(shifted: Any) -> None:
    model = shifted(build("transcoder", input_shape=(4, 3, 2), targets=(2, 0), latent_dim=12, l1=0.4)).eval()
    model.mean_RX.uniform_()
    x, W, D = data(9, (4, 3, 2)), model.encoder.weight, model.decoder.W_NX
    f = (torch.cat([x[:, 1].flatten(1), x[:, 3].flatten(1)], 1) @ W.T + model.encoder.bias).clamp(min=0)
    rows = (f @ D + model.decoder.b_X).view(9, 2, 3, 2)
    x_hat = torch.stack(
        [rows[:, 1], model.mean_RX[:1].expand(9, 3, 2), rows[:, 0], model.mean_RX[1:].expand(9, 3, 2)], 1
    )
    torch.testing.assert_close(model.encode(x), f)
    torch.testing.assert_close(model(x), x_hat)
    torch.testing.assert_close(model.decode(f), x_hat)
    y = torch.stack([x[:, 2], x[:, 0]], 1)
    nll = (rows - y).square().flatten(1).sum(1) + 6 * math.log(math.pi)
    torch.testing.assert_close(model.score(x), nll)
    torch.testing.assert_close(model.loss(x)["nll"], nll.mean())
    torch.testing.assert_close(model.loss(x)["loss"], nll.mean() + 0.4 * f.sum(1).mean())
    other = x.clone()
    other[:, [2, 0]] += 1
    assert torch.equal(model.encode(other), model.encode(x))  # what is predicted is not seen
    assert gap(model.nll(x_hat, x), nll) > 0.1  # as if the rows that are read counted


def test_rows_that_are_only_read_are_decoded_as_the_mean_of_all_samples_so_far(quiet: Any) -> None:
    x = torch.rand(110, 3, 5) + torch.arange(3)[:, None]
    model = create("transcoder", input_shape=(3, 5), targets=(1,), latent_dim=8)
    trained(model, x, quiet, lambda m, terms: 0)  # batches of 25, and one of 10
    torch.testing.assert_close(model.mean_RX, x[:, [0, 2]].mean(0))
    assert model.seen == 110
    held = model.eval().mean_RX.clone()
    model.loss(x[:5])
    assert torch.equal(model.mean_RX, held)
    torch.testing.assert_close(model(x[:4])[:, [0, 2]], held.expand(4, 2, 5))
    first, second = (copy.mean_RX for copy in on_two_ranks(model.train(), x[:40]).copies)
    assert torch.equal(first, second)
    apart = on_two_ranks(model, x[:40], exchange=False)
    assert gap(apart.copies[0].mean_RX, apart.copies[1].mean_RX) > 1e-4


# ---- crosscoder: Lindsey et al. 2024 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 4, 6)])
def test_a_crosscoder_of_one_stream_is_the_april_form(shape: tuple[int, ...], shifted: Any) -> None:
    found = []
    for name, extra in (("crosscoder", {}), ("sae_l1", {"form": "april"})):
        torch.manual_seed(0)
        model, x = shifted(build(name, input_shape=shape, latent_dim=12, l1=0.4, **extra)), data(7, shape)
        terms = model.loss(x)
        found.append({"code": model.encode(x), "x_hat": model(x), "score": model.score(x), **terms})
        found[-1] |= gradients(terms["loss"], model)
    assert_same(*found)


def test_the_encoder_sums_over_streams_and_each_has_a_decoder_and_a_cost(shifted: Any) -> None:
    model, x = shifted(build("crosscoder", input_shape=(3, 5), latent_dim=12, l1=0.4)), data(9, (3, 5))
    with torch.no_grad():
        model.decoder.W_NX *= torch.linspace(0.2, 2, 15)
    pi, W, D = model.encoder.bias, model.encoder.weight.view(12, 3, 5), model.decoder.W_NX.view(12, 3, 5)
    for s in range(3):
        pi = pi + torch.einsum("bd,nd->bn", x[:, s], W[:, s])
    f = pi.clamp(min=0)
    x_hat = torch.stack([f @ D[:, s] + model.decoder.b_X.view(3, 5)[s] for s in range(3)], 1)
    cost = torch.stack([f * D[:, s].square().sum(1).sqrt() for s in range(3)]).sum((0, 2)).mean()
    sse = torch.stack([(x[:, s] - x_hat[:, s]).square().sum(1) for s in range(3)]).sum(0).mean()
    terms = model.loss(x)
    torch.testing.assert_close(model.encode(x), f)
    torch.testing.assert_close(model(x), x_hat)
    torch.testing.assert_close(terms["nll"], sse + 7.5 * math.log(math.pi))
    torch.testing.assert_close(terms["l1"], cost)
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.4 * cost)
    assert_same(gradients(terms["loss"], model), gradients(sse + 0.4 * cost, model))
    assert model.norms().shape == (12, 3)
    torch.testing.assert_close(model.norms(), D.norm(dim=2))
    assert gap((f * D.flatten(1).norm(dim=1)).sum(1).mean(), cost) > 0.1  # the norm of all streams together


def test_the_crosscoder_s_loss_does_not_see_how_a_latent_is_scaled(shifted: Any) -> None:
    model, x = shifted(build("crosscoder", input_shape=(3, 5), latent_dim=12, l1=0.4)), data(9, (3, 5))
    before = model.loss(x)
    after = rescaled(model, torch.linspace(0.2, 3, 12).double()).loss(x)
    for term in before:
        torch.testing.assert_close(after[term], before[term])


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
def test_values_that_cannot_work_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(aezoo.AezooError, match=next(iter(settings))) as refusal:
        build(name, **settings)
    assert len(str(refusal.value).splitlines()) == 1


def test_convolutions_of_the_winner_take_all_model_need_a_grid() -> None:
    with pytest.raises(aezoo.AezooError, match="convolutions take"):
        build("wta_ae", input_shape=(24,), spatial=True)


@pytest.mark.parametrize("name", ["sae_l1", "gated_sae", "jumprelu_sae", "transcoder", "crosscoder"])
def test_the_bias_may_start_at_the_geometric_median_of_what_is_predicted(name: str, quiet: Any) -> None:
    extra = {"targets": (2, 0)} if name == "transcoder" else {}
    x = torch.rand(40, 3, 5) ** 4
    model = create(name, input_shape=(3, 5), latent_dim=8, data_init=True, lr=1e-30, **extra)
    trained(model, x, quiet, lambda m, terms: 0, batch=40)
    y, m = (x[:, [2, 0]] if extra else x).flatten(1).double(), model.decoder.b_X.detach().double()
    pull = F.normalize(y - m, dim=1).sum(0)  # of unit forces towards all samples
    assert pull.norm() < 1e-3 < F.normalize(y - y.mean(0), dim=1).sum(0).norm()
