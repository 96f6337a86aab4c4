"""Laws of the SAEs that keep the largest activations: TopK's terms and initialisation, BatchTopK, Matryoshka, MP."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor
from two_ranks import on_two_ranks

import aezoo
from aezoo.nets.blocks.dictionary import geometric_median, scatter_code, top_k

SHAPE = (2, 3, 4)


create: Any = aezoo.create_model


DEAD = torch.tensor([2, 5, 7])


SMALL = {"latent_dim": 12, "k": 3}


NAMES = ("topk_sae", "abs_topk_sae", "batch_topk_sae", "matryoshka_sae", "matching_pursuit_sae", "omp_sae")


def data(n: int) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64)


def build(name: str, **settings: Any) -> Any:
    return create(name, input_shape=SHAPE, **(SMALL | settings)).double()


def with_dead_latents(name: str, shifted: Any, **settings: Any) -> Any:
    """A model whose live latents have larger pre-activations than its dead ones, which are positive."""
    torch.manual_seed(3)
    model = shifted(build(name, dead_after=100, **settings))
    with torch.no_grad():
        model.encoder.bias.fill_(20)
        model.encoder.bias[DEAD] = 5
    model.since_fired_N[DEAD] = 100
    return model


def same_gradients(model: Any, first: Tensor, second: Tensor) -> None:
    """Compared because a term may be logged and train nothing (crosscode PR #3)."""
    found = [torch.autograd.grad(value, [*model.parameters()], retain_graph=True) for value in (first, second)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def distances(x: Tensor, point: Any) -> tuple[float, Any]:
    """The sum of distances to a point, and its gradient."""
    off = point - x.numpy()
    lengths = np.linalg.norm(off, axis=1, keepdims=True)
    return float(lengths.sum()), (off / lengths).sum(0)


def nearest_to_all(x: Tensor) -> Any:
    return scipy.optimize.minimize(
        lambda m: distances(x, m), np.median(x.numpy(), 0), jac=True, method="BFGS", options={"gtol": 1e-9}
    )


# ---- the dictionary --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["topk_sae", "batch_topk_sae", "matryoshka_sae"])
def test_data_init_sets_bias_to_median_and_encoder_scale(name: str) -> None:
    model, x = build(name, data_init=True).train(), data(30) ** 3 * 5
    before = [*map(torch.clone, model.encoder.parameters())]
    model.begin_step(x, 0)
    b = model.decoder.b_X.detach()
    best = nearest_to_all(x.flatten(1))
    np.testing.assert_allclose(b, best.x, atol=1e-5)
    f = scatter_code(*top_k((x.flatten(1) - b) @ model.encoder.weight.T + model.encoder.bias, 3), 12)
    lengths = [v.norm(dim=1).mean() for v in (x.flatten(1) - b, f @ model.decoder.W_NX)]
    torch.testing.assert_close(*lengths)
    scale = model.encoder.weight / before[0]
    torch.testing.assert_close(scale, scale.mean().expand_as(scale))  # directions stay equal to those of the decoder
    assert (scale.mean() - 1).abs() > 0.05
    torch.testing.assert_close(model.decoder.W_NX, before[0])


@pytest.mark.parametrize("name", NAMES)
def test_data_init_runs_once_and_only_if_enabled(name: str) -> None:
    model, x = build(name, data_init=True).train(), data(6)
    untouched = build(name).train()
    untouched.begin_step(x, 0)
    assert not untouched.decoder.b_X.any() and not hasattr(untouched, "started")
    assert not model.started
    model.begin_step(x, 0)
    b = model.decoder.b_X.detach().clone()
    torch.testing.assert_close(b, geometric_median(x.flatten(1)))
    model.begin_step(x + 1, 1)
    assert torch.equal(model.decoder.b_X, b)
    again = build(name, data_init=True).train()  # resuming does not initialise again
    again.load_state_dict(model.state_dict())
    again.begin_step(x + 1, 0)
    assert torch.equal(again.decoder.b_X, b)


@pytest.mark.parametrize("name", NAMES)
def test_a_fit_keeps_unit_norm_and_starts_from_data(name: str, digits: Tensor, quiet: Any) -> None:
    model = create(name, input_shape=(1, 8, 8), latent_dim=96, k=4, lr=1e-2, data_init=True)
    start = model.decoder.W_NX.detach().clone()
    samples: Any = digits[:150].float()
    loader = torch.utils.data.DataLoader[Tensor](samples, batch_size=50)
    quiet(max_epochs=1).fit(model, loader)
    W = model.decoder.W_NX.detach()
    torch.testing.assert_close(W.norm(dim=1), torch.ones(96))
    assert (W - start).abs().max() > 1e-3
    assert model.started
    median = geometric_median(digits[:50].flatten(1).float())
    assert (model.decoder.b_X.detach() - median).abs().max() <= 0.031  # three steps of Adam
    assert (model.since_fired_N > 0).any()
    assert (model.since_fired_N == 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_resumed_fit_equals_uninterrupted_fit(name: str, digits: Tensor, quiet: Any, tmp_path: Any) -> None:
    """The initialisation, the counts and the threshold are restored from the checkpoint."""
    samples: Any = digits[:150].float()
    loader, ends = torch.utils.data.DataLoader[Tensor](samples, batch_size=50), []
    for stops in (False, True):
        torch.manual_seed(0)
        settings = {"latent_dim": 96, "k": 4, "data_init": True, "dead_after": 100}
        model = create(name, input_shape=(1, 8, 8), **settings)
        trainer = quiet(max_epochs=1 if stops else 2)
        trainer.fit(model, loader)
        if stops:
            trainer.save_checkpoint(tmp_path / "half.ckpt")
            torch.manual_seed(1)
            model = create(name, input_shape=(1, 8, 8), **settings)
            quiet(max_epochs=2).fit(model, loader, ckpt_path=tmp_path / "half.ckpt")
        ends.append(model.state_dict())
    assert ends[0].keys() == ends[1].keys()
    for key, value in ends[0].items():
        assert torch.equal(ends[1][key], value), key


# ---- topk_sae: Gao et al. 2024 ---------------------------------------------------------------------------------------


def rows_with_encoder_gradient(model: Any, term: Tensor) -> Tensor:
    """The latents whose encoder has a gradient of a term."""
    weight, bias = torch.autograd.grad(term, (model.encoder.weight, model.encoder.bias), retain_graph=True)
    assert torch.equal(weight.abs().sum(1) > 0, bias != 0)
    return bias != 0


@pytest.mark.parametrize("name", ["topk_sae", "abs_topk_sae", "batch_topk_sae", "matryoshka_sae"])
def test_auxk_does_not_add_the_bias_a_second_time(name: str, shifted: Any) -> None:
    """The residual x - x_hat has no b (sparsify #132), so e_hat must not have it either."""
    model, x = with_dead_latents(name, shifted, k_aux=3), data(6)
    terms = model.loss(x)
    (gradient,) = torch.autograd.grad(terms["aux"], model.decoder.b_X, retain_graph=True)
    pi = model.pre_activations(x)
    e = (x - model.decoder(model.reconstruct(pi, 3)[0])).flatten(1)
    e_hat = pi[:, DEAD].relu() @ model.decoder.W_NX[DEAD]
    torch.testing.assert_close(terms["aux"], (e - e_hat).square().sum(1).mean())
    twice = (e - e_hat - model.decoder.b_X).square().sum(1).mean()
    assert (twice - terms["aux"]).abs() > 1e-2
    # b has a gradient through the pre-activations of dead latents only
    through = torch.autograd.grad((e.detach() - e_hat).square().sum(1).mean(), model.decoder.b_X)[0]
    torch.testing.assert_close(gradient, through)


@pytest.mark.parametrize("name", ["topk_sae", "abs_topk_sae", "batch_topk_sae", "matryoshka_sae"])
def test_auxk_trains_dead_latents_only(name: str, shifted: Any) -> None:
    model, x = with_dead_latents(name, shifted, aux_scale="variance"), data(6)
    dead = torch.zeros(12, dtype=torch.bool).index_fill(0, DEAD, True)
    terms = model.loss(x)
    assert torch.equal(rows_with_encoder_gradient(model, terms["aux"]), dead)
    (W,) = torch.autograd.grad(terms["aux"], model.decoder.W_NX)
    assert torch.equal(W.abs().sum(1) > 0, dead)
    model.since_fired_N.zero_()
    assert model.loss(x)["aux"] == 0


# ---- batch_topk_sae: Bussmann et al. 2024 ----------------------------------------------------------------------------


def positive(name: str, shifted: Any, **settings: Any) -> Any:
    """A model with random offsets added to its initial weights, and mostly positive pre-activations."""
    model = shifted(build(name, **settings))
    with torch.no_grad():
        model.encoder.bias += 2
    return model


@pytest.mark.parametrize("name", ["batch_topk_sae", "matryoshka_sae"])
def test_two_ranks_select_same_latents_as_one_process(name: str, shifted: Any) -> None:
    model, x = positive(name, shifted, latent_dim=20), data(8)
    x[:4] *= 4  # so that most selected latents are of the first rank
    with torch.no_grad():
        model.encoder.weight.abs_()
    both, one = on_two_ranks(model, x), model.loss(x)
    torch.testing.assert_close(both.terms, one)
    expected = torch.autograd.grad(one["loss"], [*model.parameters()])
    for a, b in zip(both.gradients(), expected, strict=True):
        torch.testing.assert_close(a, b)
    for rank in both.copies:
        torch.testing.assert_close(rank.theta.value, model.theta.value)
    assert (on_two_ranks(model, x, exchange=False).terms["nll"] - one["nll"]).abs() > 1e-3
    assert (on_two_ranks(model, x, ranked=False).terms["nll"] - one["nll"]).abs() > 1e-3


# ---- matching_pursuit_sae: Costa et al. 2025 -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("topk_sae", {"multi_weight": -1.0}),
        ("topk_sae", {"multi_weight": math.inf}),
        ("topk_sae", {"aux_scale": "mse"}),
        ("topk_sae", {"decode": "sparse"}),
        ("batch_topk_sae", {"k": 13}),
        ("batch_topk_sae", {"theta_decay": 1.0}),
        ("batch_topk_sae", {"theta_decay": -0.1}),
        ("matryoshka_sae", {"fractions": (0.5, 0.25)}),
        ("matryoshka_sae", {"fractions": (0.5, 1.0)}),
        ("matryoshka_sae", {"fractions": (0.0,)}),
        ("matching_pursuit_sae", {"k": 0}),
        ("matching_pursuit_sae", {"k": 13}),
        ("matching_pursuit_sae", {"dead_after": 0}),
    ],
)
def test_invalid_topk_values_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(aezoo.AezooError, match=next(iter(settings))):
        build(name, **settings)
