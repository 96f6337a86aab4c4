"""Laws of the sparse models: neutral limits, Bernoulli divergence, top-k, AuxK's gradient, unit norm, dead latents."""

import math
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributions as D
from torch import Tensor

import aezoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
SHAPE = (2, 3, 4)


def data(n: int) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64)


def build(name: str, **settings: Any) -> Any:
    return aezoo.create_model(name, input_shape=SHAPE, **settings).double()


# ---- sparse_ae_l1 ----------------------------------------------------------------------------------------------------


def test_without_penalty_l1_is_the_dense_autoencoder_with_a_relu_code_bit_for_bit(shifted: Any) -> None:
    x, found = data(6), []
    for name, extra in (("sparse_ae_l1", {"l1": 0.0}), ("dense_ae", {"code_activation": "relu"})):
        torch.manual_seed(0)
        model = shifted(build(name, latent_dim=9, hidden_dims=(8,), **extra))
        model.loss(x)["loss"].backward()
        found.append((model.loss(x)["loss"], model.encode(x), *(p.grad for p in model.parameters())))
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_l1_penalty_is_the_sum_over_the_code_in_nats_per_sample(shifted: Any) -> None:
    model, x = shifted(build("sparse_ae_l1", l1=0.7, latent_dim=9)), data(6)
    terms, h = model.loss(x), model.encode(x)
    torch.testing.assert_close(terms["loss"] - terms["nll"], 0.7 * h.norm(p=1, dim=1).mean())
    torch.testing.assert_close(terms["nll"], model.score(x).mean())
    assert (h == 0).any()
    (a,) = torch.autograd.grad(terms["loss"] - terms["nll"], model.encoder[1].bias)
    torch.testing.assert_close(a, 0.7 * (h > 0).double().mean(0))


def test_a_smaller_code_and_a_larger_decoder_always_cost_less(shifted: Any) -> None:
    """Why unit norms or weight decay are needed, as the docstring says."""
    model, x = shifted(build("sparse_ae_l1", l1=0.7, latent_dim=9)), data(6)
    found = [model.loss(x)]
    for _ in range(3):
        with torch.no_grad():
            for p in (model.encoder[1].weight, model.encoder[1].bias):
                p /= 10
            model.decoder[1].weight *= 10
        found.append(model.loss(x))
    for before, after in pairwise(found):
        torch.testing.assert_close(after["nll"], before["nll"])
        torch.testing.assert_close(after["l1"], before["l1"] / 10)
        assert after["loss"] < before["loss"]


def test_activity_falls_with_the_l1_weight(digits: Tensor, adam: Any) -> None:
    x, activity, active = digits[:1437].float(), [], []
    for l1 in (0.0, 0.3, 3.0):
        torch.manual_seed(0)
        model = aezoo.create_model("sparse_ae_l1", input_shape=(1, 8, 8), l1=l1, latent_dim=64)
        adam(model, x, steps=300, lr=3e-3, batch=128)
        h = model.encode(x).detach()
        activity.append(h.abs().mean().item())
        active.append((h > 0).double().mean().item())
    assert activity[0] > 1.5 * activity[1] > 1.5 * 1.5 * activity[2]
    assert active[0] > active[2]


# ---- sparse_ae_kl ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.01, 0.05, 0.4])
def test_the_divergence_is_that_of_bernoulli_variables(rho: float, shifted: Any) -> None:
    model, x = shifted(build("sparse_ae_kl", rho=rho, beta=2.0, latent_dim=9)), data(6)
    terms, h = model.loss(x), model.encode(x)
    assert 0 < h.min() <= h.max() < 1
    rho_hat = h.mean(0)
    expected = D.kl_divergence(D.Bernoulli(torch.full_like(rho_hat, rho)), D.Bernoulli(rho_hat)).sum()
    torch.testing.assert_close(terms["sparsity"], expected)
    torch.testing.assert_close(terms["loss"], terms["nll"] + 2 * expected + 1e-4 * terms["l2"])
    # the divergence of the mean activity, not the mean of each sample's divergence
    each = torch.stack([model.sparsity(row) for row in h]).mean()
    assert (each - expected).abs() > 1e-3


@pytest.mark.parametrize("rho", [0.01, 0.05, 0.4])
def test_the_divergence_and_its_gradient_vanish_at_the_target_alone(rho: float) -> None:
    model = build("sparse_ae_kl", rho=rho, latent_dim=3)
    for r in (1e-9, 1e-4, rho / 2, rho, (1 + rho) / 2, 1 - 1e-9):
        rho_hat = torch.full((3,), r, dtype=torch.float64, requires_grad=True)
        value = model.sparsity(rho_hat)
        (slope,) = torch.autograd.grad(value, rho_hat)
        if r == rho:
            assert abs(value.item()) < 1e-12
            assert slope.abs().max() < 1e-12
        else:
            assert value > 1e-4
            assert (slope * (r - rho) > 0).all()
            torch.testing.assert_close(slope, torch.full_like(slope, (r - rho) / (r * (1 - r))), rtol=1e-6, atol=0)


def test_the_divergence_s_gradient_is_that_of_finite_differences(shifted: Any) -> None:
    model, x = shifted(build("sparse_ae_kl", latent_dim=5, beta=3.0, l2=0.0)), data(4)
    parameter, h = model.encoder[1].weight, 1e-5
    terms = model.loss(x)
    (found,) = torch.autograd.grad(terms["loss"] - terms["nll"], parameter)
    with torch.no_grad():
        for i, j in ((0, 0), (1, 7), (4, 23)):
            ends = []
            for step in (h, -2 * h):
                parameter[i, j] += step
                terms = model.loss(x)
                ends.append(3 * terms["sparsity"])
            parameter[i, j] += h
            assert abs((ends[0] - ends[1]) / (2 * h) - found[i, j]) < 1e-7


@pytest.mark.parametrize("logit", [-60.0, -20.0, -3.0, 3.0, 12.0])
def test_a_unit_that_is_always_silent_or_always_on_is_still_pulled(logit: float) -> None:
    """With equal activations the gradient in the pre-activation is rhohat - rho, however small rhohat is."""
    model = aezoo.create_model("sparse_ae_kl", input_shape=SHAPE, rho=0.2, latent_dim=3)
    pre = torch.full((3,), logit, requires_grad=True)
    (slope,) = torch.autograd.grad(model.sparsity(pre.sigmoid()), pre)
    torch.testing.assert_close(slope, pre.sigmoid().detach() - 0.2, rtol=2e-2, atol=0)


def of_ng(model: Any, x: Tensor, rho: float, beta: float, decay: float) -> Tensor:
    """J_sparse of the notes for one sigmoid layer and a linear one, with loops over units and layers."""
    flat, down, up = x.flatten(1), model.encoder[1], model.decoder[1]
    h = torch.sigmoid(flat @ down.weight.T + down.bias)
    J = 0.5 * (h @ up.weight.T + up.bias - flat).square().sum(1).mean()
    for W in (down.weight, up.weight):
        J = J + decay / 2 * sum(row.square().sum() for row in W)
    for r in h.mean(0):
        J = J + beta * (rho * torch.log(rho / r) + (1 - rho) * torch.log((1 - rho) / (1 - r)))
    return J


def test_with_the_squared_error_it_is_twice_the_objective_of_the_notes(shifted: Any) -> None:
    """And the defaults are the notes' beta = 3 and lambda = 1e-4."""
    model, x = shifted(build("sparse_ae_kl", likelihood="gaussian", latent_dim=9)), data(6)
    constant = 12 * math.log(math.pi)
    found, expected = model.loss(x)["loss"], constant + 2 * of_ng(model, x, 0.05, 3, 1e-4)
    torch.testing.assert_close(found, expected)
    a, e = (torch.autograd.grad(value, [*model.parameters()]) for value in (found, expected))
    for mine, theirs in zip(a, e, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert (expected - constant - 2 * of_ng(model, x, 0.05, 3, 0)) > 1e-3


@pytest.mark.parametrize("net", ["mlp", "conv", "vit", "lstm"])
def test_weights_decay_and_biases_do_not(net: str, shifted: Any) -> None:
    shape = (2, 12) if net == "lstm" else (2, 4, 4)
    settings = {"net": net, "hidden_dims": (8, 8), "latent_dim": 5, "beta": 0.0}
    model = shifted(aezoo.create_model("sparse_ae_kl", shape, l2=0.25, **settings).double())
    terms = model.loss(torch.rand(3, *shape, dtype=torch.float64))
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(terms["loss"] - terms["nll"], parameters)
    for name, p, g in zip(names, parameters, found, strict=True):
        expected = 0.5 * p if p.ndim > 1 else torch.zeros_like(p)
        torch.testing.assert_close(g, expected.detach(), rtol=1e-6, atol=1e-9, msg=name)
    assert sum(p.ndim > 1 for p in parameters) >= 4


@pytest.mark.parametrize("l2", [0.0, 1e-4])
def test_the_divergence_alone_can_be_evaded_and_the_weights_cannot(l2: float, shifted: Any) -> None:
    """Units at rho + eps (h - mean of h) and the decoder over eps: no divergence, nearly the same reconstruction."""
    model, x = shifted(build("sparse_ae_kl", latent_dim=5, l2=l2)), data(200)
    down, up, eps, rho = model.encoder[1], model.decoder[1], 1e-4, 0.05
    with torch.no_grad():
        before, pre = model.loss(x), down(x.flatten(1))
        h = pre.sigmoid()
        # a unit is linear over so short a way, with the slope rho (1 - rho)
        shrink = eps * (h * (1 - h)).mean(0) / (rho * (1 - rho))
        up.bias += up.weight @ (h.mean(0) - rho / eps)
        up.weight /= eps
        down.bias.copy_(math.log(rho / (1 - rho)) - shrink * (pre - down.bias).mean(0))
        down.weight *= shrink[:, None]
        after = model.loss(x)
    assert before["sparsity"] > 1 and after["sparsity"] < 1e-6
    assert (after["nll"] - before["nll"]).abs() < 0.5
    assert (after["loss"] < before["loss"]) == (l2 == 0)


# ---- topk_sae: Gao et al. 2024 ---------------------------------------------------------------------------------------


def sae(**settings: Any) -> Any:
    return build("topk_sae", **({"latent_dim": 12, "k": 3, "k_aux": 4} | settings))


def by_hand(model: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """pi, f and x_hat - b of the paper's formula, with a loop instead of top-k."""
    flat, b = x.flatten(1), model.decoder.b_X
    pi = (flat - b) @ model.encoder.weight.T + model.encoder.bias
    f = torch.zeros_like(pi)
    for row, values in enumerate(pi.detach()):
        for i in sorted(range(len(values)), key=lambda i: -values[i])[: model.k]:
            f[row, i] = pi[row, i].clamp(min=0)
    return pi, f, f @ model.decoder.W_NX


@pytest.mark.parametrize("k", [1, 3, 12])
def test_the_code_is_the_top_k_of_the_pre_activations(k: int, shifted: Any) -> None:
    model, x = shifted(sae(k=k)), data(20) * 4
    _, f, rebuilt = by_hand(model, x)
    found = model.encode(x)
    torch.testing.assert_close(found, f)
    torch.testing.assert_close(model(x).flatten(1), rebuilt + model.decoder.b_X)
    assert ((found != 0).sum(1) <= k).all()
    assert (found >= 0).all()
    assert (found != 0).sum(1).max() == k or k == 12
    assert model.loss(x)["l0"] == (found > 0).sum(1).float().mean()


def test_with_all_latents_positive_and_kept_it_is_linear(shifted: Any) -> None:
    model, x = shifted(sae(k=12)), data(7)
    with torch.no_grad():
        model.encoder.bias += 50
    W, V, b = model.encoder.weight, model.decoder.W_NX, model.decoder.b_X
    torch.testing.assert_close(model(x).flatten(1), ((x.flatten(1) - b) @ W.T + model.encoder.bias) @ V + b)
    terms = model.loss(x)
    sse = ((model(x) - x) ** 2).flatten(1).sum(1).mean()
    torch.testing.assert_close(terms["nll"], sse + 12 * math.log(math.pi))
    assert torch.equal(terms["loss"], terms["nll"])  # nothing is dead


def test_inactive_latents_get_no_gradient_without_auxk(shifted: Any) -> None:
    model, x = shifted(sae(aux_weight=0.0)), data(2)
    model.since_fired_N.fill_(10**9)
    model.loss(x)["loss"].backward()
    silent = ~(model.encode(x) > 0).any(0)
    assert 0 < silent.sum() < 12
    for gradient in (model.encoder.weight.grad, model.encoder.bias.grad[:, None], model.decoder.W_NX.grad):
        assert torch.equal(gradient.abs().amax(1) == 0, silent)


DEAD = torch.tensor([2, 5, 7])


def with_dead_latents(shifted: Any, **settings: Any) -> Any:
    """Live latents outrank the dead ones, whose pre-activations are positive none the less."""
    model = shifted(sae(dead_after=100, **settings))
    with torch.no_grad():
        model.encoder.bias.fill_(20)
        model.encoder.bias[DEAD] = 5
    model.since_fired_N[DEAD] = 100
    return model


def aux_by_hand(model: Any, x: Tensor, detach: bool = True) -> Tensor:
    pi, _, rebuilt = by_hand(model, x)
    residual = x.flatten(1) - rebuilt - model.decoder.b_X
    residual = residual.detach() if detach else residual
    kept = pi[:, DEAD].clamp(min=0)
    if model.k_aux < 3:
        kept = kept * (kept >= kept.topk(model.k_aux, dim=1).values[:, -1:])
    e_hat = kept @ model.decoder.W_NX[DEAD]  # no bias: the residual has none
    return ((residual - e_hat) ** 2).sum(1).mean() * min(3 / model.k_aux, 1)


@pytest.mark.parametrize("k_aux", [2, 3, 6])
def test_auxk_is_the_paper_s_formula_and_its_residual_is_detached(k_aux: int, shifted: Any) -> None:
    model, x = with_dead_latents(shifted, k_aux=k_aux, aux_weight=0.25), data(5)
    terms = model.loss(x)
    parameters = (model.encoder.weight, model.encoder.bias, model.decoder.W_NX, model.decoder.b_X)
    torch.testing.assert_close(terms["aux"], aux_by_hand(model, x))
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.25 * terms["aux"])
    assert terms["dead_latents"] == pytest.approx(3 / 12)
    found = torch.autograd.grad(terms["aux"], parameters, retain_graph=True)
    for a, b in zip(found, torch.autograd.grad(aux_by_hand(model, x), parameters), strict=True):
        torch.testing.assert_close(a, b)
    # sparsify #57 did not detach the residual: the live latents would feel it
    leak = torch.autograd.grad(aux_by_hand(model, x, detach=False), parameters)
    assert (leak[0] - found[0]).abs().max() > 1e-2


def test_auxk_reaches_the_dead_latents_and_only_them(shifted: Any) -> None:
    model, x = with_dead_latents(shifted, aux_weight=1.0), data(5)
    terms = model.loss(x)
    alone = torch.autograd.grad(
        terms["loss"] - terms["nll"], (model.encoder.weight, model.encoder.bias, model.decoder.W_NX)
    )
    expected = torch.zeros(12, dtype=torch.bool)
    expected[DEAD] = True
    for gradient in alone:
        assert torch.equal(gradient.reshape(12, -1).abs().amax(1) > 0, expected)


def test_auxk_is_zero_when_nothing_is_dead(shifted: Any) -> None:
    model = with_dead_latents(shifted, aux_weight=1.0)
    model.since_fired_N[DEAD] = 99 - 5  # one sample short after this batch of 5
    terms = model.loss(data(5))
    assert terms["aux"] == 0
    assert terms["dead_latents"] == 0
    assert torch.equal(terms["loss"], terms["nll"])


def test_dead_latents_are_counted_in_samples_and_revived_when_they_fire(shifted: Any) -> None:
    model = shifted(sae(dead_after=50))
    expected = torch.zeros(12, dtype=torch.long)
    for n in (1, 7, 16, 3):
        x = data(n) * 3
        fired = (by_hand(model, x)[1] > 0).any(0)
        expected = torch.where(fired, 0, expected + n)
        model.train().loss(x)
        assert torch.equal(model.since_fired_N, expected)
        model.eval().loss(data(9))  # evaluation counts nothing
        assert torch.equal(model.since_fired_N, expected)
    assert 0 < (expected > 0).sum() < 12
    assert "since_fired_N" in model.state_dict()
    model.since_fired_N.fill_(49)
    terms, x = model.train().loss(data(1)), data(1)
    assert terms["dead_latents"] == pytest.approx((12 - (model.since_fired_N == 0).sum().item()) / 12)
    assert (model.since_fired_N == 50).any()  # dead from dead_after samples on
    model.eval()
    assert model.loss(x)["dead_latents"] > 0


class Watch(pl.Callback):
    """What the optimiser's step sees and leaves: gradients along the directions, norms before and after."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.along, self.norms_after_step, self.norms_after_batch, self.moved = [], [], [], []
        self.start = pl_module.decoder.W_NX.detach().clone()
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.after_step(pl_module))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = pl_module.decoder.W_NX.detach().clone()

    def after_step(self, pl_module: Any) -> None:
        W = pl_module.decoder.W_NX
        self.along.append(((W.grad * self.before).sum(1).abs() / W.grad.norm(dim=1).clamp(min=1e-9)).max())
        self.norms_after_step.append(W.detach().norm(dim=1))
        self.moved.append((W.detach() - self.before).abs().max())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.norms_after_batch.append(pl_module.decoder.W_NX.detach().norm(dim=1))


@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}], ids=str)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_directions_have_unit_norm_after_each_step_and_no_gradient_along_them(
    settings: dict[str, Any], optimizer: str, digits: Tensor, quiet: Any
) -> None:
    model = aezoo.create_model("topk_sae", input_shape=(1, 8, 8), latent_dim=96, k=8, lr=1e-2, optimizer=optimizer)
    assert torch.equal(model.encoder.weight, model.decoder.W_NX)
    torch.testing.assert_close(model.decoder.W_NX.norm(dim=1), torch.ones(96))
    watch = Watch()
    loader = torch.utils.data.DataLoader(digits[:400].float(), batch_size=50)
    quiet(max_epochs=1, callbacks=[watch], **settings).fit(model, loader)
    steps = 8 // settings.get("accumulate_grad_batches", 1)
    assert len(watch.along) == steps
    assert max(watch.along) < 1e-5
    assert all(m > 0 for m in watch.moved)
    assert any((n - 1).abs().max() > 1e-6 for n in watch.norms_after_step)  # so the order matters
    assert all((n - 1).abs().max() < 1e-6 for n in watch.norms_after_batch)


def test_a_dictionary_is_recovered_where_it_is_known() -> None:
    """Known directions with sparse positive coefficients: at least 14 of 16 are found (cosine above 0.95)."""
    truth = torch.nn.functional.normalize(torch.randn(16, 24), dim=1)
    active = torch.rand(6000, 16) < 0.12
    x = (torch.rand(6000, 16) + 0.5) * active @ truth
    model = aezoo.create_model("topk_sae", input_shape=(24,), latent_dim=32, k=3, dead_after=2000)
    before = (truth @ model.decoder.W_NX.T).amax(1)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(1500):
        optimizer.zero_grad()
        model.loss(x[torch.randint(6000, (256,))])["loss"].backward()
        model.on_before_optimizer_step(optimizer)
        optimizer.step()
        with torch.no_grad():
            model.decoder.W_NX /= model.decoder.W_NX.norm(dim=1, keepdim=True)
    best = (truth @ model.decoder.W_NX.T).amax(1)
    assert (before > 0.95).sum() == 0
    assert (best > 0.95).sum() >= 14


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sparse_ae_l1", {"l1": -0.1}),
        ("sparse_ae_l1", {"l1": math.inf}),
        ("sparse_ae_kl", {"rho": 0.0}),
        ("sparse_ae_kl", {"rho": 1.0}),
        ("sparse_ae_kl", {"beta": -1.0}),
        ("sparse_ae_kl", {"l2": -1.0}),
        ("sparse_ae_kl", {"l2": math.nan}),
        ("topk_sae", {"k": 0}),
        ("topk_sae", {"k": 13, "latent_dim": 12}),
        ("topk_sae", {"k_aux": -1}),
        ("topk_sae", {"dead_after": 0}),
        ("topk_sae", {"aux_weight": -1.0}),
    ],
)
def test_values_that_cannot_work_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(aezoo.AezooError, match=next(iter(settings))):
        build(name, **settings)
