"""Laws of the compression family: rates compared with scipy, bounds, causality, and decoding of the coded symbols."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from scipy import stats
from torch import Tensor

import aezoo
from aezoo.bases import entropy_coded
from aezoo.bases.entropy_coded import AdditiveNoise, Rounding, SymbolReader
from aezoo.errors import AezooError

NAMES = aezoo.list_models(family="compression")


# models whose distributions depend on earlier positions or on the other checkerboard colour
IN_TURN = ["joint_ar_hyperprior", "cheng2020"]


IN_STEPS = [*IN_TURN, "checkerboard", "elic"]


SHAPE = (2, 11, 10)


SMALL: dict[str, Any] = {"hidden_dims": (6, 8), "latent_dim": 5, "hyper_dim": 3, "hyper_hidden_dims": (4,)}


def small(name: str, shape: tuple[int, ...] = SHAPE, **settings: Any) -> Any:
    """A float64 model with random offsets added to its initial weights, and codes with a wide range."""
    known = aezoo.registry.hyperparameters(name)
    given = {"groups": (1, 1, 3), "reach": 2, "attention": False, **SMALL}
    given |= {"lams": (settings.get("lam", 0.01),)} | settings
    model = aezoo.create_model(name, shape, **{key: value for key, value in given.items() if key in known}).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        [*model.encoder.parameters()][-1].mul_(20)
        [*model.encoder.parameters()][-2].mul_(20)
    return model


def data(n: int = 4, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


def paper_loss(terms: dict[str, Tensor]) -> Tensor:
    """The loss without the quantile loss of compressai, which is not part of the objective."""
    return terms["loss"] - terms.get("quantiles", torch.zeros((), dtype=torch.float64))


# ---- the objective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("lam", [0.0018, 0.05])
@pytest.mark.parametrize("name", NAMES)
def test_loss_matches_paper_rate_distortion(name: str, lam: float, training: bool) -> None:
    """R + lam 255^2 MSE with R in bits per pixel, times pixels and log 2, plus the constant of the likelihood."""
    model, x = small(name, lam=lam).train(training), data()
    seen: list[Tensor] = []
    model.decoder.register_forward_hook(lambda *args: seen.append(args[2]))
    terms = model.loss(x)
    pixels = math.prod(SHAPE[1:])
    mse = ((x - seen[0]) ** 2).mean()
    constant = model.weight * x[0].numel() / 2 * math.log(math.pi)
    expected = (terms["bpp"] + lam * 255**2 * mse) * pixels * math.log(2) + constant
    torch.testing.assert_close(paper_loss(terms), expected)
    torch.testing.assert_close(terms["rate"], terms["bpp"] * pixels * math.log(2))


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_negative_elbo_with_uniform_posterior(name: str) -> None:
    """Ballé et al. 2017, section 4: p(x|y~) = N(x; g(y~), 1 / (2 weight)), and q = U around y, with log density 0."""
    model, x = small(name, lam=0.003).train(), data()
    seen: list[Tensor] = []
    model.decoder.register_forward_hook(lambda *args: seen.append(args[2]))
    terms = model.loss(x)
    sigma = (2 * model.weight) ** -0.5
    log_px = D.Normal(seen[0], sigma).log_prob(x).flatten(1).sum(1).mean()
    elbo = log_px - terms["rate"]
    constant = x[0].numel() * (math.log(sigma * math.sqrt(2 * math.pi)) - model.weight / 2 * math.log(math.pi))
    torch.testing.assert_close(paper_loss(terms) + constant, -elbo)


@pytest.mark.parametrize("name", NAMES)
def test_bits_are_counted_per_position_for_vectors_and_maps(name: str) -> None:
    if name in (*IN_STEPS, "compressai"):
        without = "a code without a grid: use gdn or conv, or mean_scale_hyperprior|convolutions take|takes images"
        with pytest.raises(AezooError, match=without):
            small(name, (7,), net="mlp")
        return
    model = small(name, (7,), net="mlp").eval()
    terms = model.loss(data(shape=(7,)))
    torch.testing.assert_close(terms["bpp"], terms["rate"] / math.log(2) / 7)
    assert model.weight == pytest.approx(0.01 * 255**2 * math.log(2))
    assert small(name).weight == pytest.approx(0.01 * 255**2 * math.log(2) / SHAPE[0])


# ---- coded symbols and their order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_symbols_determine_code_and_reconstruction(name: str) -> None:
    model, x = small(name).float().eval(), data().float()
    symbols = model.encode_symbols(x)
    assert symbols.dtype == torch.long and int(symbols.abs().max()) > 3
    assert torch.equal(model.codes(symbols), model.encode(x))
    assert torch.equal(model.decode(model.codes(symbols)), model(x))


@pytest.mark.parametrize("name", NAMES)
def test_bf16_symbols_determine_code(name: str) -> None:
    """bf16 has no odd integers above 256: encoder and decoder must add the means in float32."""
    model, x = small(name).bfloat16().eval(), data().bfloat16()
    with torch.no_grad():
        for p in [*model.encoder.parameters()][-2:]:
            p.mul_(20)
    symbols = model.encode_symbols(x)
    assert int(symbols.abs().max()) > 300
    assert torch.equal(model.codes(symbols).to(x.dtype), model.encode(x))
    assert bool(model.sample(3).isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_encoder_output_within_half_a_step(name: str) -> None:
    model, x = small(name).train(), data()  # codes are rounded in training too
    if name == "gained_hyperprior":  # set the step to 1
        with torch.no_grad():
            model.log_gain_SM.zero_()
            model.log_inverse_SM.zero_()
    assert torch.equal(model.encode(x), model.encode(x))
    off = (model.encode(x) - model.encoder(x)).detach().abs()
    assert 0.3 < float(off.max()) <= 0.5 + 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_score_is_evaluation_loss_per_sample(name: str) -> None:
    model, x = small(name).eval(), data()
    alone = torch.stack([model.loss(x[i : i + 1])["loss"] for i in range(len(x))])
    torch.testing.assert_close(model.score(x), alone)
    torch.testing.assert_close(model.train().score(x), alone)


@pytest.mark.parametrize("name", NAMES)
def test_symbol_distributions_are_causal(name: str) -> None:
    """Changing symbols from some position on leaves the distributions of all symbols up to there exactly the same."""
    model, x = small(name).eval(), data(2)
    symbols = model.encode_symbols(x)

    def laws(given: Tensor) -> Tensor:
        take, means, start = entropy_coded.read_in_order(given), [], [0]

        class Watching(SymbolReader):
            def transform(self, v: Tensor, law: Any) -> Tensor:
                means.append(torch.stack([law.mean, law.log_mass(law.mean)]).flatten(2))
                start.append(start[-1] + law.mean[0].numel())
                return super().transform(v, law)

        model.code_latents(Watching(take), None, len(given))
        ends.update(start)
        return torch.cat(means, 2)

    ends: set[int] = set()
    before = laws(symbols)
    steps = sorted(ends)
    calls = {
        "factorized_prior": 1,
        "compressai": 1,
        "checkerboard": 1 + 2,
        "elic": 1 + 2 * 3,
        **dict.fromkeys(IN_TURN, 1 + 9),
    }
    assert len(steps) - 1 == calls.get(name, 2)
    changed = 0
    for start, end in itertools.pairwise(steps):
        other = symbols.clone()
        other[:, start:end] += 3
        after = laws(other)
        assert torch.equal(after[..., :end], before[..., :end])
        changed += end < steps[-1] and not torch.equal(after[..., end:], before[..., end:])
    assert changed == calls.get(name, 2) - 1  # and each step but the last changes later distributions


@pytest.mark.parametrize("name", IN_TURN)
def test_sequential_coding_matches_parallel_training_rate(name: str) -> None:
    """Given the rounded code y^, the distributions of all positions at once have the same rate as in sequence."""
    model, x = small(name).eval(), data()
    coder, y = Rounding(), model.encoder(x)
    y_hat = model.code_latents(coder, y, len(x))
    parallel_coder = Rounding()
    side = model.code_side(parallel_coder, y, len(x))
    parallel_coder.add_rate(y_hat, model.distribution(*model.context(side, model.context.masked_conv(y_hat))))
    torch.testing.assert_close(coder.rate_B, parallel_coder.rate_B)


@pytest.mark.parametrize("name", IN_TURN)
def test_context_model_is_causal_in_training(name: str) -> None:
    model = small(name)
    y = torch.randn(1, *model.code_shape, dtype=torch.float64, requires_grad=True)
    side = torch.zeros(1, 2 * model.code_shape[0], *model.grid, dtype=torch.float64)
    numbers = sum(model.context(side, model.context.masked_conv(y)))
    height, width = model.grid
    for t in range(height * width):
        (slope,) = torch.autograd.grad(numbers.flatten(2)[..., t].sum(), y, retain_graph=True)
        seen = slope.abs().sum((0, 1)).flatten() > 0
        near = [abs(s // width - t // width) <= 2 and abs(s % width - t % width) <= 2 for s in range(height * width)]
        assert seen.tolist() == [s < t and near[s] for s in range(height * width)]


@pytest.mark.parametrize("name", ["checkerboard", "elic"])
@pytest.mark.parametrize("shape", [(1, 11, 10), (1, 11), (1, 6, 7, 8)])
def test_checkerboard_anchors_condition_non_anchors_only(name: str, shape: tuple[int, ...]) -> None:
    model = small(name, shape, hidden_dims=(6,), groups=(2,), latent_dim=2)
    parity = sum(np.indices(model.grid)).flatten() % 2
    assert parity[model.anchors].sum() == 0 and parity[model.others].all()
    assert sorted([*model.anchors.tolist(), *model.others.tolist()]) == [*range(parity.size)]
    context = model.contexts[0]
    y = torch.randn(1, 2, *model.grid, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(context.masked_conv(y).flatten(2)[..., model.others].sum(), y)
    seen = slope.abs().sum((0, 1)).flatten() > 0
    assert bool(seen[model.anchors].all()) and not bool(seen[model.others].any())


# ---- gradients, in training and with the same noise ------------------------------------------------------------------


def slopes(value: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients, 0 where the value does not depend on an input."""
    return [*torch.autograd.grad(value, inputs, retain_graph=True, materialize_grads=True)]


def along(value: Tensor, inputs: list[Tensor], directions: list[Tensor]) -> Tensor:
    """The directional derivative by autograd."""
    parts = [(slope * d).sum() for slope, d in zip(slopes(value, inputs), directions, strict=True)]
    return torch.stack(parts).sum()


@torch.no_grad()
def by_differences(values: Callable[[], Tensor], inputs: list[Tensor], directions: list[Tensor]) -> Tensor:
    """The directional derivatives of several values by central differences."""
    found, step = [], 1e-6
    for amount in (step, -step):
        for tensor, d in zip(inputs, directions, strict=True):
            tensor.add_(d, alpha=amount)
        torch.manual_seed(0)
        found.append(values())
        for tensor, d in zip(inputs, directions, strict=True):
            tensor.sub_(d, alpha=amount)
    return (found[0] - found[1]) / (2 * step)


def by_network(model: Any) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        found.setdefault(name.split(".")[0], []).append(p)
    return found


def both_terms(model: Any, x: Tensor) -> Tensor:
    terms = model.loss(x)
    return torch.stack([terms["rate"], terms["nll"]])


@pytest.mark.parametrize("name", NAMES)
def test_rate_and_distortion_train_expected_networks(name: str) -> None:
    model = small(name).train()
    rate, nll = both_terms(model, data())

    def trained(value: Tensor) -> set[str]:
        found = set()
        for network, parameters in by_network(model).items():
            if any(bool((slope != 0).any()) for slope in slopes(value, parameters)):
                found.add(network)
        return found

    entropy = {"density", "hyper_encoder", "hyper_decoder", "context", "contexts", "across"} & by_network(model).keys()
    gains = {"log_gain_SM", "log_inverse_SM"} & by_network(model).keys()
    assert trained(rate) == {"encoder", *entropy} | gains - {"log_inverse_SM"}
    assert trained(nll) == {"encoder", "decoder", *gains}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_both_terms_are_finite_differences(name: str) -> None:
    """In a random direction for each network, which a missing gradient would change."""
    model, x = small(name).train(), data(2)
    torch.manual_seed(0)
    terms = both_terms(model, x)
    paths = [(parameters, [torch.randn_like(p) for p in parameters]) for parameters in by_network(model).values()]
    found = torch.stack([torch.stack([along(term, *path) for term in terms]) for path in paths])
    expected = torch.stack([by_differences(lambda: both_terms(model, x), *path) for path in paths])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("factorized_prior", "compressai")])
def test_side_information_passes_gradients_to_code(name: str) -> None:
    """Through the rate of the side information, and through the parameters that it gives the code."""
    model = small(name).train()
    y = model.encoder(data(2)).detach().requires_grad_()
    weight, direction = torch.randn_like(model.code_side(AdditiveNoise(), y, 2)), [torch.randn_like(y)]

    def values() -> Tensor:
        coder = AdditiveNoise()
        given = model.code_side(coder, y, 2)
        return torch.stack([coder.rate_B.sum(), (given * weight).sum()])

    torch.manual_seed(0)
    found = torch.stack([along(value, [y], direction) for value in values()])
    assert bool((found != 0).all())
    torch.testing.assert_close(found, by_differences(values, [y], direction), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", IN_STEPS)
def test_rate_passes_gradients_to_itself_and_earlier_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fixed side information: anchors before non-anchors, channel group by group, or position by position."""
    model = small(name).train()
    y = model.encoder(data(1)).detach().requires_grad_()
    side = model.code_side(AdditiveNoise(), y, 1).detach()
    monkeypatch.setattr(model, "code_side", lambda *_: side)
    coloured = [model.anchors, model.others] if name not in IN_TURN else torch.arange(math.prod(model.grid)).split(1)
    channels = torch.arange(model.code_shape[0]).split(model.groups if name == "elic" else model.code_shape[0])
    directions = []
    for group, places in itertools.product(channels, coloured):
        part = torch.zeros_like(y).flatten(2)
        part[:, group[:, None], places] = torch.randn(1, len(group), len(places), dtype=y.dtype)
        directions.append(part.view_as(y))

    def rates() -> Tensor:
        found: list[Tensor] = []

        class Watching(AdditiveNoise):
            def add_rate(self, v: Tensor, distribution: Any) -> None:
                rate = -distribution.log_mass(v).sum((0, 1))
                found.append(rate.flatten() if name in IN_TURN else rate.sum()[None])

        model.code_latents(Watching(), y, 1)
        return torch.cat(found)

    torch.manual_seed(0)
    jacobian = torch.stack([slopes(value, [y])[0].flatten() for value in rates()])
    found = jacobian @ torch.stack(directions).flatten(1).T
    expected = torch.stack([by_differences(rates, [y], [d]) for d in directions], 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found != 0, torch.ones_like(found).tril().bool())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_sampled_symbols_follow_model_distribution(name: str) -> None:
    """Symbols drawn under the distribution of the first call, which has no context, have its probabilities."""
    model = small(name).eval()
    seen: list[Tensor] = []

    class Watching(SymbolReader):
        def transform(self, v: Tensor, law: Any) -> Tensor:
            found = super().transform(v, law)
            seen.append((found - law.mean).round())
            return found

    original, entropy_coded.SymbolReader = entropy_coded.SymbolReader, Watching  # type: ignore[misc]
    try:
        torch.manual_seed(0)
        model.sample(300)
    finally:
        entropy_coded.SymbolReader = original  # type: ignore[misc]
    first = seen[0].flatten(2)
    for c, (low, mass) in enumerate(model.tables()[: first.shape[1]]):
        drawn = first[:, c].flatten().long().numpy() - low
        share = np.bincount(drawn, minlength=len(mass))[: len(mass)]
        likely = mass * drawn.size > 5
        assert likely.sum() > 2
        expected = mass[likely] / mass[likely].sum() * share[likely].sum()
        assert stats.chisquare(share[likely], expected).pvalue > 1e-4
