"""Laws of the SAEs that keep the largest: TopK's terms and start, BatchTopK, Matryoshka, matching pursuit."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor
from two_ranks import on_two_ranks

import aezoo
from aezoo.models.sparse.batch_topk_sae import RunningMean
from aezoo.nets.blocks.dictionary import CROSSOVER, Dictionary, geometric_median, scatter_code, top_k

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
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
    """Live latents outrank the dead ones, whose pre-activations are positive none the less."""
    torch.manual_seed(3)
    model = shifted(build(name, dead_after=100, **settings))
    with torch.no_grad():
        model.encoder.bias.fill_(20)
        model.encoder.bias[DEAD] = 5
    model.since_fired_N[DEAD] = 100
    return model


def same_gradients(model: Any, first: Tensor, second: Tensor) -> None:
    """A term may be logged and train nothing (crosscode PR #3)."""
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


@pytest.mark.parametrize("case", ["normal", "outliers", "off centre"])
def test_the_geometric_median_is_the_optimiser_s(case: str) -> None:
    x = torch.randn(40, 5, dtype=torch.float64)
    if case == "outliers":
        x[:12] += 1000
    if case == "off centre":
        x = x.exp() * 3 - 7
    found = geometric_median(x).numpy()
    best = nearest_to_all(x)
    np.testing.assert_allclose(found, best.x, atol=1e-5)
    assert distances(x, found)[0] <= best.fun * (1 + 1e-12)
    assert np.abs(found - x.mean(0).numpy()).max() > 1e-2  # the mean is another point


def test_the_geometric_median_may_be_a_sample_and_start_at_one() -> None:
    """Weiszfeld's plain iteration divides by 0 where a sample is the median, and never leaves one where it is not."""
    x = torch.randn(9, 3, dtype=torch.float64)
    several = torch.cat([x, x[:1].expand(12, 3)])
    torch.testing.assert_close(geometric_median(several), x[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(geometric_median(x[:1].expand(5, 3)), x[0])
    # the mean, where the iteration starts, is a sample
    line = torch.tensor([[-2.0], [-1.5], [-1.0], [0.0], [4.5]], dtype=torch.float64)
    assert line.mean() == 0
    torch.testing.assert_close(geometric_median(line), line[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["topk_sae", "batch_topk_sae", "matryoshka_sae"])
def test_data_start_the_bias_at_their_median_and_the_encoder_at_their_length(name: str) -> None:
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
    torch.testing.assert_close(scale, scale.mean().expand_as(scale))  # directions stay those of the decoder
    assert (scale.mean() - 1).abs() > 0.05
    torch.testing.assert_close(model.decoder.W_NX, before[0])


@pytest.mark.parametrize("name", NAMES)
def test_data_start_a_model_once_and_only_where_asked(name: str) -> None:
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
    again = build(name, data_init=True).train()  # a run that goes on
    again.load_state_dict(model.state_dict())
    again.begin_step(x + 1, 0)
    assert torch.equal(again.decoder.b_X, b)


def test_data_as_bytes_start_a_model_as_their_values_do() -> None:
    x = torch.randint(0, 256, (6, *SHAPE)).to(torch.uint8)
    found = []
    for given in (x, x.float() / 255):
        model = create("topk_sae", input_shape=SHAPE, data_init=True, **SMALL).train()
        model.takes_bytes = True
        model.begin_step(given, 0)
        found.append(model.decoder.b_X.detach())
    torch.testing.assert_close(*found)
    assert 0.2 < found[0].mean() < 0.8


def test_equal_samples_leave_the_encoder_as_it_is() -> None:
    model = build("topk_sae", data_init=True).train()
    before = model.encoder.weight.detach().clone()
    model.begin_step(torch.ones(4, *SHAPE, dtype=torch.float64), 0)
    assert torch.equal(model.encoder.weight, before)
    torch.testing.assert_close(model.decoder.b_X.detach(), torch.ones(24, dtype=torch.float64))


def test_gathering_rows_is_the_dense_product_with_all_gradients(shifted: Any) -> None:
    found = []
    for decode in ("dense", "gather"):
        model = with_dead_latents("topk_sae", shifted, decode=decode, multi_weight=0.3, aux_weight=0.7)
        torch.manual_seed(0)
        x = data(5)
        assert model.decoder.uses_gather(3) == (decode == "gather")
        terms = model.loss(x)
        terms["loss"].backward()
        found.append([*terms.values(), *(p.grad for p in model.parameters())])
        assert all(value.abs().sum() > 0 for value in found[-1])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_gathered_rows_are_added_in_float32_in_a_model_of_bf16() -> None:
    values, index = torch.rand(4, 200).bfloat16(), torch.rand(4, 300).topk(200).indices
    dictionary = Dictionary(300, (7,), "gather").bfloat16()
    found = dictionary.sum_of_directions(values, index)
    exact = scatter_code(values, index, 300).double() @ dictionary.W_NX.double()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.bfloat16(), rtol=2**-7, atol=1e-6)
    found.float().sum().backward()
    assert dictionary.W_NX.grad is not None


def test_auto_gathers_from_the_measured_crossover_on() -> None:
    dictionary = Dictionary(2 * CROSSOVER["cpu"], (7,))
    assert [dictionary.uses_gather(k) for k in (1, 2, 3, 100)] == [True, True, False, False]
    assert not any(Dictionary(2 * CROSSOVER["cpu"], (7,), "dense").uses_gather(k) for k in (1, 2, 3))
    assert not dictionary.to("meta").uses_gather(1)  # a device that nobody has measured


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
def test_a_fit_that_is_stopped_and_goes_on_ends_where_another_does(
    name: str, digits: Tensor, quiet: Any, tmp_path: Any
) -> None:
    """The start, the counts and the threshold are state: none is made anew."""
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


@pytest.mark.parametrize("k", [1, 3, 5])
def test_multi_topk_is_the_loss_of_the_model_with_four_times_as_many(k: int, shifted: Any) -> None:
    model, x = with_dead_latents("topk_sae", shifted, k=k, multi_weight=0.125, aux_weight=0.5), data(5)
    wide = build("topk_sae", k=min(4 * k, 12))
    wide.load_state_dict(model.state_dict())
    terms = model.loss(x)
    torch.testing.assert_close(terms["multi"], wide.loss(x)["nll"])
    total = terms["nll"] + 0.5 * terms["aux"] + 0.125 * terms["multi"]
    torch.testing.assert_close(terms["loss"], total)
    same_gradients(model, terms["loss"], total)
    assert terms["multi"] != terms["nll"]
    assert terms["l0"] == k
    assert "multi" not in build("topk_sae").loss(x)


def encoder_s_rows(model: Any, term: Tensor) -> Tensor:
    """Which latents' encoder a term moves."""
    weight, bias = torch.autograd.grad(term, (model.encoder.weight, model.encoder.bias), retain_graph=True)
    assert torch.equal(weight.abs().sum(1) > 0, bias != 0)
    return bias != 0


@pytest.mark.parametrize("decode", ["dense", "gather"])
@pytest.mark.parametrize("aux_scale", ["sse", "variance"])
def test_auxk_and_multi_topk_train_the_encoder(decode: str, aux_scale: str, shifted: Any) -> None:
    """A fused backward of sparsify 1.3.3 lost the pre-activations' gradient: neither term trained the encoder."""
    settings = {"decode": decode, "aux_scale": aux_scale, "multi_weight": 1.0, "k_aux": 4}
    model, x = with_dead_latents("topk_sae", shifted, k=2, **settings), data(6)
    terms = model.loss(x)
    dead = torch.zeros(12, dtype=torch.bool).index_fill(0, DEAD, True)
    assert torch.equal(encoder_s_rows(model, terms["aux"]), dead)
    beyond = encoder_s_rows(model, terms["multi"]) & ~encoder_s_rows(model, terms["nll"])
    assert beyond.any()
    fused = model.encoder.forward
    model.encoder.forward = lambda x: fused(x).detach()
    lost = model.loss(x)
    model.encoder.forward = fused
    torch.testing.assert_close(lost["aux"], terms["aux"])  # what is logged says nothing
    found = torch.autograd.grad(lost["aux"] + lost["multi"], model.encoder.weight, allow_unused=True)
    assert found == (None,)


@pytest.mark.parametrize("name", ["topk_sae", "abs_topk_sae", "batch_topk_sae", "matryoshka_sae"])
def test_auxk_does_not_add_the_bias_a_second_time(name: str, shifted: Any) -> None:
    """The residual x - x_hat holds no b (sparsify #132): e_hat must not either."""
    model, x = with_dead_latents(name, shifted, k_aux=3), data(6)
    terms = model.loss(x)
    (gradient,) = torch.autograd.grad(terms["aux"], model.decoder.b_X, retain_graph=True)
    pi = model.pre_activations(x)
    e = (x - model.decoder(model.reconstruct(pi, 3)[0])).flatten(1)
    e_hat = pi[:, DEAD].relu() @ model.decoder.W_NX[DEAD]
    torch.testing.assert_close(terms["aux"], (e - e_hat).square().sum(1).mean())
    twice = (e - e_hat - model.decoder.b_X).square().sum(1).mean()
    assert (twice - terms["aux"]).abs() > 1e-2
    # b moves AuxK through the pre-activations of dead latents alone
    through = torch.autograd.grad((e.detach() - e_hat).square().sum(1).mean(), model.decoder.b_X)[0]
    torch.testing.assert_close(gradient, through)


@pytest.mark.parametrize("name", ["topk_sae", "abs_topk_sae", "batch_topk_sae", "matryoshka_sae"])
def test_auxk_moves_dead_latents_alone_and_vanishes_where_none_is_dead(name: str, shifted: Any) -> None:
    model, x = with_dead_latents(name, shifted, aux_scale="variance"), data(6)
    dead = torch.zeros(12, dtype=torch.bool).index_fill(0, DEAD, True)
    terms = model.loss(x)
    assert torch.equal(encoder_s_rows(model, terms["aux"]), dead)
    (W,) = torch.autograd.grad(terms["aux"], model.decoder.W_NX)
    assert torch.equal(W.abs().sum(1) > 0, dead)
    model.since_fired_N.zero_()
    assert model.loss(x)["aux"] == 0


def test_auxk_of_no_dead_latents_is_not_computed(shifted: Any, monkeypatch: Any) -> None:
    """On a CPU, where to ask for them costs nothing."""
    model, x, asked = with_dead_latents("batch_topk_sae", shifted), data(6), []
    sum_of_directions = model.decoder.sum_of_directions
    monkeypatch.setattr(
        model.decoder, "sum_of_directions", lambda *active: asked.append(1) or sum_of_directions(*active)
    )
    assert model.loss(x)["aux"] > 0 and len(asked) == 1
    model.since_fired_N.zero_()
    assert model.loss(x)["aux"] == 0 and len(asked) == 1


@pytest.mark.parametrize("training", [True, False])
def test_in_the_scale_of_the_variance_auxk_is_the_share_of_the_residual_left(training: bool, shifted: Any) -> None:
    """As alpha ||e - e_hat||^2 / Var(e) beside ||e||^2 / Var(x), in nats: both times Var(x), by NumPy."""
    model, x = with_dead_latents("topk_sae", shifted, k_aux=3, aux_scale="variance").train(training), data(7)
    plain = with_dead_latents("topk_sae", shifted, k_aux=3).train(training)
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
    assert 0 < model.aux(x_hat, x_hat, pi).max() < 1e12  # nor has what is rebuilt without an error


def test_the_variance_of_two_ranks_is_that_of_one(shifted: Any) -> None:
    model, x = with_dead_latents("topk_sae", shifted, aux_scale="variance", aux_weight=1.0), data(8)
    x[4:] *= 3
    one, both = model.loss(x), on_two_ranks(model, x)
    torch.testing.assert_close(both.terms, one)
    for found, expected in zip(both.gradients(), torch.autograd.grad(one["loss"], [*model.parameters()]), strict=True):
        torch.testing.assert_close(found, expected)
    apart = on_two_ranks(model, x, exchange=False)
    assert (apart.terms["aux"] - one["aux"]).abs() > 1e-3


def test_auxk_takes_half_of_the_data_s_dimensions() -> None:
    """SAELens took half of the dictionary's (PR #432)."""
    assert build("topk_sae", latent_dim=100).k_aux == 12
    assert build("topk_sae", latent_dim=8).k_aux == 8
    assert build("topk_sae", latent_dim=100, k_aux=40).k_aux == 40


# ---- batch_topk_sae: Bussmann et al. 2024 ----------------------------------------------------------------------------


def positive(name: str, shifted: Any, **settings: Any) -> Any:
    """Off the start, with pre-activations of which most are positive."""
    model = shifted(build(name, **settings))
    with torch.no_grad():
        model.encoder.bias += 2
    return model


@pytest.mark.parametrize("n", [1, 2, 9])
def test_in_training_the_batch_shares_its_active_latents(n: int, shifted: Any) -> None:
    model, x = positive("batch_topk_sae", shifted), data(n)
    pi = model.pre_activations(x).detach()
    f = model.top_of_batch(pi, 3)
    assert (f > 0).sum() == 3 * n
    assert model.loss(x)["l0"] == 3
    cut = np.sort(pi.numpy().ravel())[-3 * n]
    torch.testing.assert_close(f, torch.where(pi >= cut, pi, 0))
    torch.testing.assert_close(model.loss(x)["nll"], model.nll(model.decoder(f), x).mean())
    if n == 9:
        assert (f > 0).sum(1).unique().numel() > 1


def test_of_equal_pre_activations_no_more_than_k_n_are_taken() -> None:
    """In bf16 many are equal: a cut by value would take all of them."""
    model = build("batch_topk_sae")
    pi = torch.ones(4, 12).bfloat16() + torch.rand(4, 12).bfloat16() / 64
    f = model.top_of_batch(pi, 3)
    assert (f > 0).sum() == 12
    cut = pi.flatten().topk(12).values[-1]
    assert (pi >= cut).sum() > 12


def test_negative_pre_activations_are_never_taken(shifted: Any) -> None:
    model = positive("batch_topk_sae", shifted, k=12)
    pi = model.pre_activations(data(4)) - 2
    f = model.top_of_batch(pi, 12)
    assert torch.equal(f, pi.relu())
    assert 0 < (f > 0).sum() < f.numel()
    assert model.theta.value > 0  # the least positive one
    before = model.theta.value.clone(), model.theta.steps.clone()
    model.top_of_batch(-pi.abs(), 12)  # none at all: nothing to average
    assert (model.theta.value, model.theta.steps) == before


@pytest.mark.parametrize("settings", [{"k": 12}, {"n": 1}], ids=["all latents", "one sample"])
def test_with_all_latents_or_one_sample_batch_topk_is_topk(settings: dict[str, int], shifted: Any) -> None:
    k, x, found = settings.get("k", 3), data(settings.get("n", 6)), []
    for name in ("topk_sae", "batch_topk_sae"):
        torch.manual_seed(0)
        model = with_dead_latents(name, shifted, k=k, aux_weight=0.5)
        terms = model.loss(x)
        found.append([*terms.values(), *torch.autograd.grad(terms["loss"], [*model.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["batch_topk_sae", "matryoshka_sae"])
def test_two_ranks_choose_what_one_would(name: str, shifted: Any) -> None:
    model, x = positive(name, shifted, latent_dim=20), data(8)
    x[:4] *= 4  # the first rank's samples take nearly all
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


def test_the_threshold_is_the_mean_of_each_batch_s_least_activation(shifted: Any) -> None:
    model, least = positive("batch_topk_sae", shifted, theta_decay=0.75), []
    for n in (3, 5, 4, 6, 2, 7):
        x = data(n) * n
        pi = model.pre_activations(x).detach().numpy()
        least.append(np.sort(pi.ravel())[-3 * n])
        model.train().loss(x)
        model.eval().loss(data(4))  # evaluation moves nothing
    expected = np.mean(least[:4])
    for value in least[4:]:
        expected = 0.75 * expected + 0.25 * value
    assert model.theta.value.item() == pytest.approx(expected, rel=1e-6)
    assert {"theta.value", "theta.steps"} <= model.state_dict().keys()


def test_the_threshold_stays_float32_and_moves_in_a_model_of_bf16() -> None:
    """SAELens PR #728: in bf16 a mean near 1 stands still, since 1 + 1/1000 is 1."""
    mean, rival = RunningMean(0.999), torch.ones((), dtype=torch.bfloat16)
    mean.update(torch.ones(()))
    mean.bfloat16()
    assert mean.value.dtype == torch.float32
    for _ in range(3000):
        mean.update(torch.tensor(2.0).bfloat16())
        rival.lerp_(torch.tensor(2.0).bfloat16(), 0.001)
    assert mean.value.item() == pytest.approx(2 - 1 / 1000 * 0.999**2001, rel=1e-4)
    assert rival == 1
    model = create("batch_topk_sae", input_shape=SHAPE, **SMALL)
    assert model.bfloat16().theta.value.dtype == torch.float32
    assert model.to(torch.float16).theta.steps.dtype == torch.long


def test_codes_are_what_reaches_the_threshold_whoever_the_batch_mates_are(shifted: Any) -> None:
    model, x = positive("batch_topk_sae", shifted), data(6)
    model.theta.value.fill_(2.5)
    for training in (True, False):  # a callback may ask for codes in training, of one rank alone
        found = model.train(training).encode(x)
        pi = model.pre_activations(x)
        assert torch.equal(found, pi * (pi >= 2.5))
        assert 0 < (found > 0).sum() < (pi > 0).sum()
        torch.testing.assert_close(model.encode(x[:1]), found[:1])
    assert model.theta.steps == 0
    torch.testing.assert_close(model.eval().loss(x)["nll"], model.score(x).mean())
    pi = torch.tensor([[2.5, 2.4999, -1.0, 3.0]], dtype=torch.float64)
    assert model.above_threshold(pi).tolist() == [[2.5, 0, 0, 3.0]]


def test_the_threshold_reproduces_the_number_of_active_latents() -> None:
    truth = torch.nn.functional.normalize(torch.randn(16, 24), dim=1)
    x = (torch.rand(4000, 16) + 0.5) * (torch.rand(4000, 16) < 0.15) @ truth
    model = create("batch_topk_sae", input_shape=(24,), latent_dim=32, k=3).train()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(400):
        optimizer.zero_grad()
        model.loss(x[torch.randint(4000, (256,))])["loss"].backward()
        model.on_before_optimizer_step(optimizer)
        optimizer.step()
        model.decoder.normalise()
    l0 = (model.eval().encode(x) > 0).sum(1).double().mean()
    assert l0.item() == pytest.approx(3, rel=0.15)
    model.theta.value.zero_()  # every positive latent
    assert (model.encode(x) > 0).sum(1).double().mean() > 2 * l0


# ---- matryoshka_sae: Bussmann et al. 2025 ----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_with_one_prefix_matryoshka_is_batch_topk(training: bool, shifted: Any) -> None:
    x, found = data(6), []
    for name, extra in (("batch_topk_sae", {}), ("matryoshka_sae", {"fractions": ()})):
        torch.manual_seed(0)
        model = with_dead_latents(name, shifted, aux_weight=0.5, **extra).train(training)
        model.theta.value.fill_(20)
        terms = model.loss(x)
        assert terms.pop("prefix_nll", torch.zeros(())) == 0
        values = [terms[name] for name in sorted(terms)]
        found.append([*values, model.encode(x), *torch.autograd.grad(terms["loss"], [*model.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_every_prefix_is_to_rebuild_the_data(shifted: Any) -> None:
    model, x = with_dead_latents("matryoshka_sae", shifted, fractions=(0.25, 0.5), k=6, aux_weight=0.5), data(6)
    assert model.prefixes == [3, 6, 12]
    f = model.top_of_batch(model.pre_activations(x), 6)
    each = []
    for size in (3, 6, 12):
        kept = f * (torch.arange(12) < size)
        each.append(model.nll((kept @ model.decoder.W_NX + model.decoder.b_X).unflatten(1, SHAPE), x).mean())
    terms = model.loss(x)
    torch.testing.assert_close(terms["nll"], each[2])
    torch.testing.assert_close(terms["prefix_nll"], each[0] + each[1])
    total = torch.stack(each).sum() + 0.5 * terms["aux"]
    torch.testing.assert_close(terms["loss"], total)
    same_gradients(model, terms["loss"], total)
    assert len({round(value.item(), 3) for value in each}) == 3


def test_later_directions_do_not_touch_a_prefix(shifted: Any) -> None:
    """By the decoder's rows: later pre-activations do compete for the k."""
    model, x = positive("matryoshka_sae", shifted, fractions=(0.5,), k=6), data(6)
    before = model.loss(x)
    (gradient,) = torch.autograd.grad(before["prefix_nll"], model.decoder.W_NX)
    assert not gradient[6:].any()
    assert gradient[:6].any()
    with torch.no_grad():
        model.decoder.W_NX[6:] = -model.decoder.W_NX[6:]
    after = model.loss(x)
    torch.testing.assert_close(after["prefix_nll"], before["prefix_nll"])
    assert (after["nll"] - before["nll"]).abs() > 1e-2


def test_prefixes_of_a_small_dictionary_are_distinct_and_end_with_all_of_it() -> None:
    assert build("matryoshka_sae", latent_dim=512).prefixes == [32, 64, 128, 256, 512]
    assert build("matryoshka_sae", latent_dim=4, k=1).prefixes == [1, 2, 4]
    assert build("matryoshka_sae", latent_dim=1, k=1).prefixes == [1]


# ---- matching_pursuit_sae: Costa et al. 2025 -------------------------------------------------------------------------


def pursuit(model: Any, x: Tensor, k: int) -> tuple[Tensor, list[Tensor]]:
    """The code and the residuals, sample by sample and with the gradient of the written formula."""
    W, codes, residuals = model.decoder.W_NX, [], []
    for row in x.flatten(1):
        r, code, rest = row - model.decoder.b_X, torch.zeros(len(W), dtype=x.dtype), []
        for _ in range(k):
            inner = torch.stack([d @ r for d in W])
            i = int(inner.argmax())
            c = inner[i].clamp(min=0)
            code = code + c * torch.eye(len(W), dtype=x.dtype)[i]
            r = r - c * W[i]
            rest.append(r)
        codes.append(code)
        residuals.append(torch.stack(rest))
    return torch.stack(codes), residuals


@pytest.mark.parametrize("k", [1, 4, 12])
def test_the_code_is_that_of_the_written_pursuit_with_all_gradients(k: int, shifted: Any) -> None:
    model, x = shifted(build("matching_pursuit_sae", k=k)), data(5) * 3
    code, _ = pursuit(model, x, k)
    torch.testing.assert_close(model.encode(x), code)
    terms, expected = model.loss(x), model.nll(model.decoder(code), x).mean()
    torch.testing.assert_close(terms["loss"], expected)
    same_gradients(model, terms["loss"], expected)
    assert ((model.encode(x) > 0).sum(1) <= k).all()
    assert terms["l0"] == (code > 0).sum(1).float().mean()
    if k == 12:
        assert terms["l0"] < 12  # some were taken again, and add up


def test_what_is_left_shrinks_with_every_step_and_is_the_error(shifted: Any) -> None:
    x = data(6) * 3
    model = shifted(build("matching_pursuit_sae", k=8))
    _, residuals = pursuit(model, x, 8)
    lengths = []
    for k in range(1, 9):
        model.k = k
        rest = (x - model(x)).flatten(1)
        torch.testing.assert_close(rest, torch.stack([r[k - 1] for r in residuals]))
        lengths.append(rest.norm(dim=1))
    assert all((b <= a + 1e-12).all() for a, b in pairwise(lengths))
    assert (lengths[-1] < lengths[0]).all()
    with torch.no_grad():  # what a dictionary without unit norm does
        model.decoder.W_NX *= 1.6
    model.k = 1
    first = (x - model(x)).flatten(1).norm(dim=1)
    model.k = 8
    assert ((x - model(x)).flatten(1).norm(dim=1) > first).any()


def test_with_orthogonal_directions_matching_pursuit_is_topk(shifted: Any) -> None:
    x = (data(20) - 0.5) * 5
    settings = {"latent_dim": 24, "k": 5}
    model, parallel = shifted(build("matching_pursuit_sae", **settings)), build("topk_sae", **settings)
    with torch.no_grad():
        torch.nn.init.orthogonal_(model.decoder.W_NX)
        parallel.decoder.load_state_dict(model.decoder.state_dict())
        parallel.encoder.weight.copy_(model.decoder.W_NX)
    torch.testing.assert_close(model.encode(x), parallel.encode(x))
    torch.testing.assert_close(model.loss(x)["nll"], parallel.loss(x)["nll"])
    with torch.no_grad():
        model.decoder.W_NX[1:] += model.decoder.W_NX[:1] / 2
        model.decoder.normalise()
        parallel.encoder.weight.copy_(model.decoder.W_NX)
    assert (model.encode(x) - parallel.encode(x)).abs().max() > 0.1


def test_autocast_does_not_change_what_the_pursuit_takes() -> None:
    model = create("matching_pursuit_sae", input_shape=(32,), latent_dim=400, k=6)
    x = torch.randn(40, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.encode(x)
        rival = (x @ model.decoder.W_NX.T).argmax(1)
    torch.testing.assert_close(found, model.encode(x))
    apart = rival != (x @ model.decoder.W_NX.T).argmax(1)
    assert apart.any()
    torch.testing.assert_close(found[apart][:3], pursuit(model, x[apart][:3], 6)[0])


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
def test_values_that_cannot_work_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(aezoo.AezooError, match=next(iter(settings))):
        build(name, **settings)
