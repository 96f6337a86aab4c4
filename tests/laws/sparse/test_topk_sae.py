"""Laws of TopK sparse autoencoder (Gao et al. 2024)."""

import math
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from sparse_laws import (  # noqa: F401
    build,
    data,
    test_invalid_values_are_refused,
)
from topk_sae_laws import DEAD as TOPK_SAE_DEAD
from topk_sae_laws import (  # noqa: F401
    SHAPE,
    SMALL,
    create,
    rows_with_encoder_gradient,
    same_gradients,
    test_a_fit_keeps_unit_norm_and_starts_from_data,
    test_auxk_does_not_add_the_bias_a_second_time,
    test_auxk_trains_dead_latents_only,
    test_data_init_runs_once_and_only_if_enabled,
    test_data_init_sets_bias_to_median_and_encoder_scale,
    test_invalid_topk_values_are_refused,
    test_resumed_fit_equals_uninterrupted_fit,
)
from topk_sae_laws import build as build_topk_sae
from topk_sae_laws import data as data_topk_sae
from topk_sae_laws import with_dead_latents as with_dead_latents_topk_sae
from torch import Tensor
from two_ranks import on_two_ranks

import aezoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

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


def test_all_positive_kept_latents_give_linear_map(shifted: Any) -> None:
    model, x = shifted(sae(k=12)), data(7)
    with torch.no_grad():
        model.encoder.bias += 50
    W, V, b = model.encoder.weight, model.decoder.W_NX, model.decoder.b_X
    torch.testing.assert_close(model(x).flatten(1), ((x.flatten(1) - b) @ W.T + model.encoder.bias) @ V + b)
    terms = model.loss(x)
    sse = ((model(x) - x) ** 2).flatten(1).sum(1).mean()
    torch.testing.assert_close(terms["nll"], sse + 12 * math.log(math.pi))
    assert torch.equal(terms["loss"], terms["nll"])  # no latent is dead


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
    """A model whose live latents have larger pre-activations than its dead ones, which are positive."""
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
def test_auxk_matches_formula_with_detached_residual(k_aux: int, shifted: Any) -> None:
    model, x = with_dead_latents(shifted, k_aux=k_aux, aux_weight=0.25), data(5)
    terms = model.loss(x)
    parameters = (model.encoder.weight, model.encoder.bias, model.decoder.W_NX, model.decoder.b_X)
    torch.testing.assert_close(terms["aux"], aux_by_hand(model, x))
    torch.testing.assert_close(terms["loss"], terms["nll"] + 0.25 * terms["aux"])
    assert terms["dead_latents"] == pytest.approx(3 / 12)
    found = torch.autograd.grad(terms["aux"], parameters, retain_graph=True)
    for a, b in zip(found, torch.autograd.grad(aux_by_hand(model, x), parameters), strict=True):
        torch.testing.assert_close(a, b)
    # sparsify #57 did not detach the residual, which gives live latents a gradient
    leak = torch.autograd.grad(aux_by_hand(model, x, detach=False), parameters)
    assert (leak[0] - found[0]).abs().max() > 1e-2


def test_auxk_gradient_reaches_dead_latents_only(shifted: Any) -> None:
    model, x = with_dead_latents(shifted, aux_weight=1.0), data(5)
    terms = model.loss(x)
    alone = torch.autograd.grad(
        terms["loss"] - terms["nll"], (model.encoder.weight, model.encoder.bias, model.decoder.W_NX)
    )
    expected = torch.zeros(12, dtype=torch.bool)
    expected[DEAD] = True
    for gradient in alone:
        assert torch.equal(gradient.reshape(12, -1).abs().amax(1) > 0, expected)


def test_auxk_is_zero_without_dead_latents(shifted: Any) -> None:
    model = with_dead_latents(shifted, aux_weight=1.0)
    model.since_fired_N[DEAD] = 99 - 5  # after this batch of 5, one sample short of dead_after
    terms = model.loss(data(5))
    assert terms["aux"] == 0
    assert terms["dead_latents"] == 0
    assert torch.equal(terms["loss"], terms["nll"])


def test_dead_latents_are_counted_in_samples(shifted: Any) -> None:
    model = shifted(sae(dead_after=50))
    expected = torch.zeros(12, dtype=torch.long)
    for n in (1, 7, 16, 3):
        x = data(n) * 3
        fired = (by_hand(model, x)[1] > 0).any(0)
        expected = torch.where(fired, 0, expected + n)
        model.train().loss(x)
        assert torch.equal(model.since_fired_N, expected)
        model.eval().loss(data(9))  # not counted in evaluation
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
    """Record radial gradients, updates, and norms after each step and batch."""

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
def test_directions_keep_unit_norm_without_radial_gradient(
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
    assert any((n - 1).abs().max() > 1e-6 for n in watch.norms_after_step)  # norms are set after the step
    assert all((n - 1).abs().max() < 1e-6 for n in watch.norms_after_batch)


@pytest.mark.slow
def test_known_dictionary_is_recovered() -> None:
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


# ---- the dictionary --------------------------------------------------------------------------------------------------


def test_byte_data_initialise_like_float_data() -> None:
    x = torch.randint(0, 256, (6, *SHAPE)).to(torch.uint8)
    found = []
    for given in (x, x.float() / 255):
        model = create("topk_sae", input_shape=SHAPE, data_init=True, **SMALL).train()
        model.takes_bytes = True
        model.begin_step(given, 0)
        found.append(model.decoder.b_X.detach())
    torch.testing.assert_close(*found)
    assert 0.2 < found[0].mean() < 0.8


def test_data_init_with_equal_samples_keeps_encoder() -> None:
    model = build_topk_sae("topk_sae", data_init=True).train()
    before = model.encoder.weight.detach().clone()
    model.begin_step(torch.ones(4, *SHAPE, dtype=torch.float64), 0)
    assert torch.equal(model.encoder.weight, before)
    torch.testing.assert_close(model.decoder.b_X.detach(), torch.ones(24, dtype=torch.float64))


def test_gather_decoding_matches_dense_with_gradients(shifted: Any) -> None:
    found = []
    for decode in ("dense", "gather"):
        model = with_dead_latents_topk_sae("topk_sae", shifted, decode=decode, multi_weight=0.3, aux_weight=0.7)
        torch.manual_seed(0)
        x = data_topk_sae(5)
        assert model.decoder.uses_gather(3) == (decode == "gather")
        terms = model.loss(x)
        terms["loss"].backward()
        found.append([*terms.values(), *(p.grad for p in model.parameters())])
        assert all(value.abs().sum() > 0 for value in found[-1])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# ---- topk_sae: Gao et al. 2024 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 5])
def test_multi_topk_is_loss_with_4k_latents(k: int, shifted: Any) -> None:
    model, x = (
        with_dead_latents_topk_sae("topk_sae", shifted, k=k, multi_weight=0.125, aux_weight=0.5),
        data_topk_sae(5),
    )
    wide = build_topk_sae("topk_sae", k=min(4 * k, 12))
    wide.load_state_dict(model.state_dict())
    terms = model.loss(x)
    torch.testing.assert_close(terms["multi"], wide.loss(x)["nll"])
    total = terms["nll"] + 0.5 * terms["aux"] + 0.125 * terms["multi"]
    torch.testing.assert_close(terms["loss"], total)
    same_gradients(model, terms["loss"], total)
    assert terms["multi"] != terms["nll"]
    assert terms["l0"] == k
    assert "multi" not in build_topk_sae("topk_sae").loss(x)


@pytest.mark.parametrize("decode", ["dense", "gather"])
@pytest.mark.parametrize("aux_scale", ["sse", "variance"])
def test_auxk_and_multi_topk_train_the_encoder(decode: str, aux_scale: str, shifted: Any) -> None:
    """A fused backward in sparsify 1.3.3 lost the gradient of the pre-activations: neither term trained the encoder."""
    settings = {"decode": decode, "aux_scale": aux_scale, "multi_weight": 1.0, "k_aux": 4}
    model, x = with_dead_latents_topk_sae("topk_sae", shifted, k=2, **settings), data_topk_sae(6)
    terms = model.loss(x)
    dead = torch.zeros(12, dtype=torch.bool).index_fill(0, TOPK_SAE_DEAD, True)
    assert torch.equal(rows_with_encoder_gradient(model, terms["aux"]), dead)
    beyond = rows_with_encoder_gradient(model, terms["multi"]) & ~rows_with_encoder_gradient(model, terms["nll"])
    assert beyond.any()
    fused = model.encoder.forward
    model.encoder.forward = lambda x: fused(x).detach()
    lost = model.loss(x)
    model.encoder.forward = fused
    torch.testing.assert_close(lost["aux"], terms["aux"])  # the value of the term does not show the lost gradient
    found = torch.autograd.grad(lost["aux"] + lost["multi"], model.encoder.weight, allow_unused=True)
    assert found == (None,)


@pytest.mark.parametrize("training", [True, False])
def test_variance_scaled_auxk_is_residual_fraction(training: bool, shifted: Any) -> None:
    """Alpha ||e - e_hat||^2 / Var(e) + ||e||^2 / Var(x) times Var(x), with variances by NumPy."""
    model, x = (
        with_dead_latents_topk_sae("topk_sae", shifted, k_aux=3, aux_scale="variance").train(training),
        data_topk_sae(7),
    )
    plain = with_dead_latents_topk_sae("topk_sae", shifted, k_aux=3).train(training)
    plain.load_state_dict(model.state_dict())
    e = (x - plain(x)).detach().flatten(1).numpy()
    ratio = x.flatten(1).numpy().var(0).sum() / e.var(0).sum()
    a, b = model.loss(x)["aux"], plain.loss(x)["aux"]
    assert a.item() == pytest.approx(b.item() * ratio, rel=1e-10)
    assert abs(ratio - 1) > 0.1
    for p, q in zip(
        torch.autograd.grad(a, [*model.parameters()]), torch.autograd.grad(b, [*plain.parameters()]), strict=True
    ):
        torch.testing.assert_close(p, q * ratio)
    assert torch.equal(model.loss(x[:1])["aux"], plain.loss(x[:1])["aux"])  # one sample has no variance
    x_hat, pi = model(x).detach(), model.pre_activations(x)
    assert 0 < model.aux(x_hat, x_hat, pi).max() < 1e12  # Var(e) is 0 for an exact reconstruction


def test_variance_over_two_ranks_matches_one_process(shifted: Any) -> None:
    model, x = with_dead_latents_topk_sae("topk_sae", shifted, aux_scale="variance", aux_weight=1.0), data_topk_sae(8)
    x[4:] *= 3
    one, both = model.loss(x), on_two_ranks(model, x)
    torch.testing.assert_close(both.terms, one)
    for found, expected in zip(both.gradients(), torch.autograd.grad(one["loss"], [*model.parameters()]), strict=True):
        torch.testing.assert_close(found, expected)
    apart = on_two_ranks(model, x, exchange=False)
    assert (apart.terms["aux"] - one["aux"]).abs() > 1e-3


def test_default_k_aux_is_half_of_input_size() -> None:
    """SAELens used half of the dictionary's size (PR #432)."""
    assert build_topk_sae("topk_sae", latent_dim=100).k_aux == 12
    assert build_topk_sae("topk_sae", latent_dim=8).k_aux == 8
    assert build_topk_sae("topk_sae", latent_dim=100, k_aux=40).k_aux == 40
