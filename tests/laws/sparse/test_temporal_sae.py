"""Laws of the temporal SAE (Lubana et al. 2025): SAELens' codes, causality, TopK without a past, predicted codes."""

import math
from typing import Any

import pytest
import torch
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from torch import Tensor

import aezoo
from aezoo.models.sparse.temporal_sae import Context, SequenceDictionary, counts, positions
from aezoo.nets.blocks.dictionary import geometric_median

T, D, N = 5, 6, 12


SMALL: dict[str, Any] = {"latent_dim": N, "k": 3, "key_dim": 4, "heads": 2}


create: Any = aezoo.create_model


def build(shape: tuple[int, ...] = (T, D), name: str = "temporal_sae", **settings: Any) -> Any:
    given = (SMALL if name == "temporal_sae" else {"latent_dim": N, "k": 3}) | settings
    return create(name, input_shape=shape, **given).double()


def data(n: int, shape: tuple[int, ...] = (T, D)) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64) * 2 - 1


# ---- SAELens ---------------------------------------------------------------------------------------------------------


def of_saelens(p: dict[str, Tensor], x: Tensor, heads: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """New and predicted codes and x_hat of sae_lens 6.54's TemporalSAE with tied weights and b_dec, in a loop."""
    lam, new, predicted, x_hat = 1 / (4 * x.shape[2]), [], [], []
    for sample in x - p["b"]:
        codes = (lam * sample @ p["W"].T).relu()
        for t, (r, z) in enumerate(zip(sample, codes, strict=True)):
            past, parts = torch.cat([torch.zeros_like(codes[:1]), codes[:t]]), []
            key, value, query = past @ p["k"].T + p["bk"], past @ p["v"].T + p["bv"], z @ p["q"].T + p["bq"]
            for kh, vh, qh in zip(key.chunk(heads, 1), value.chunk(heads, 1), query.chunk(heads), strict=True):
                parts.append((kh @ qh / math.sqrt(len(qh))).softmax(0) @ vh)
            direction = (torch.cat(parts) @ p["o"].T + p["bo"]).relu()
            of_data = direction @ p["W"]
            share = (of_data @ r) / (of_data.norm() + 1e-6) ** 2
            left = (lam * (r - share * of_data) @ p["W"].T).relu()
            new.append(torch.where(left >= left.topk(k).values[-1], left, 0))
            predicted.append(share * direction)
            x_hat.append((new[-1] + predicted[-1]) @ p["W"] + p["b"])
    found = [torch.stack(rows).unflatten(0, x.shape[:2]) for rows in (new, predicted, x_hat)]
    return found[0], found[1], found[2]


@pytest.mark.parametrize(("heads", "k"), [(1, 3), (2, 5), (4, N)])
def test_matches_saelens_up_to_attention_biases(heads: int, k: int) -> None:
    sizes = {"W": (N, D), "k": (4, N), "q": (4, N), "v": (N, N), "o": (N, N)}
    sizes |= {"b": (D,), "bk": (4,), "bq": (4,), "bv": (N,), "bo": (N,)}
    p = {name: torch.randn(*size, dtype=torch.float64) for name, size in sizes.items()}
    model, x = build(heads=heads, k=k), data(3) * 3
    context = model.context
    with torch.no_grad():
        for name, layer in (("k", context.key), ("q", context.query), ("v", context.value), ("o", context.out)):
            layer.weight.copy_(p[name])
        context.query.bias.copy_(p["bq"])
        context.out.bias.copy_(p["bo"] + p["o"] @ p["bv"])
        model.decoder.W_NX.copy_(p["W"])
        model.decoder.b_X.copy_(p["b"])
        model.encoder.weight.copy_(p["W"] / (4 * D))
    new, predicted, x_hat = of_saelens(p, x, heads, k)
    torch.testing.assert_close(model.encode(x), torch.stack([new, predicted], 1))
    torch.testing.assert_close(model(x), x_hat)
    assert (predicted < 0).any() and (predicted > 0).any() and (k == N or ((new != 0).sum(2) <= k).all())


def test_attention_starts_with_rows_of_saelens_norms() -> None:
    context = Context(N, 4, 2)
    for layer, width in ((context.query, 2), (context.key, 2), (context.value, 6), (context.out, 12)):
        torch.testing.assert_close(layer.weight.norm(dim=1), torch.full((len(layer.weight),), width**-0.5))
    assert not context.out.bias.any()


# ---- causality -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(T, D), (2, T, 3), (1, T, 2, 3)])
def test_codes_depend_on_earlier_positions_only(shape: tuple[int, ...], shifted: Any) -> None:
    model, x = shifted(build(shape)), data(4, shape)
    assert positions(x).shape == (4, T, D)
    for t in range(T):
        other = x.clone()
        other.select(min(len(shape), 3) - 1, t).normal_()
        codes, others = model.encode(x), model.encode(other)
        differs_T = (codes - others).abs().amax((0, 1, 3)) > 1e-9
        assert differs_T.tolist() == [s >= t for s in range(T)]
        assert torch.equal(positions(model(x))[:, :t], positions(model(other))[:, :t])


def test_prediction_uses_past_in_any_order(shifted: Any) -> None:
    """Attention has no position embedding: the last prediction does not depend on the order of earlier positions."""
    model, x = shifted(build()), data(4)
    mixed = torch.cat([x[:, torch.tensor([2, 0, 3, 1])], x[:, 4:]], 1)
    torch.testing.assert_close(model.encode(mixed)[:, :, -1], model.encode(x)[:, :, -1])


def test_the_first_position_is_predicted_only_by_the_bias(shifted: Any) -> None:
    model, x = shifted(build()), data(4)
    direction_N = model.context.out.bias.relu()
    of_data_X, r_BX = direction_N @ model.decoder.W_NX, x[:, 0] - model.decoder.b_X
    share_B = r_BX @ of_data_X / of_data_X.norm().add(1e-6) ** 2
    torch.testing.assert_close(model.encode(x)[:, 1, 0], share_B[:, None] * direction_N)
    with torch.no_grad():
        model.context.out.bias.zero_()
    assert not model.encode(x)[:, 1, 0].any() and model.encode(x)[:, 1, 1:].any()


# ---- without a past --------------------------------------------------------------------------------------------------


def topk_twin(model: Any, shape: tuple[int, ...], **settings: Any) -> Any:
    """topk_sae with the same encoder and dictionary, and as many dead latents."""
    other = build(shape, "topk_sae", **settings)
    other.load_state_dict({key: value for key, value in model.state_dict().items() if "context" not in key})
    return other


def with_dead_latents(model: Any) -> Any:
    with torch.no_grad():
        model.encoder.bias += 5
        model.encoder.bias[::3] -= 4
    model.since_fired_N[::3] = 10**6
    return model


@pytest.mark.parametrize("aux_scale", ["sse", "variance"])
@pytest.mark.parametrize("shape", [(1, D), (D,)])
def test_sequence_of_length_one_equals_topk_sae(shape: tuple[int, ...], aux_scale: str, shifted: Any) -> None:
    model, settings = shifted(build(shape, aux_scale=aux_scale)), {"aux_scale": aux_scale, "decode": "dense"}
    with torch.no_grad():
        model.context.out.bias.zero_()
    model, x = with_dead_latents(model), data(9, shape)
    other = topk_twin(model, shape, **settings)
    torch.testing.assert_close(model.encode(x)[:, 0, 0], other.encode(x))
    steps = [torch.optim.Adam(each.parameters(), 1e-2) for each in (model, other)]
    for _ in range(3):
        found, expected = model.train().loss(x), other.train().loss(x)
        assert found.keys() == expected.keys() and expected["aux"] > 0
        for term in expected:
            torch.testing.assert_close(found[term], expected[term])
        for step, terms in zip(steps, (found, expected), strict=True):
            step.zero_grad()
            terms["loss"].backward()
            step.step()
    torch.testing.assert_close(model.encoder.weight, other.encoder.weight)
    torch.testing.assert_close(model.decoder.W_NX, other.decoder.W_NX)


@pytest.mark.parametrize("aux_scale", ["sse", "variance"])
def test_without_attention_each_position_is_a_sample_of_topk_sae(aux_scale: str, shifted: Any) -> None:
    model = with_dead_latents(shifted(build(aux_scale=aux_scale))).train()
    with torch.no_grad():
        model.context.out.weight.zero_()
        model.context.out.bias.zero_()
    other, x = topk_twin(model, (D,), aux_scale=aux_scale).train(), data(7)
    found, expected = model.loss(x), other.loss(x.flatten(0, 1))
    for term in expected:
        torch.testing.assert_close(found[term], expected[term] * (T if term in ("loss", "nll", "aux") else 1))
    assert expected["aux"] > 0
    assert torch.equal(model.since_fired_N, other.since_fired_N)
    for name, p in other.named_parameters():
        of_one = torch.autograd.grad(found["loss"], model.get_parameter(name), retain_graph=True)[0]
        torch.testing.assert_close(of_one, T * torch.autograd.grad(expected["loss"], p, retain_graph=True)[0])


# ---- predicted and new codes -----------------------------------------------------------------------------------------


def test_prediction_is_projection_onto_one_direction(shifted: Any) -> None:
    model, x = shifted(build()), data(6) * 5
    taken = model.encode(x)[:, 1] @ model.decoder.W_NX
    left = x - model.decoder.b_X - taken
    lengths = taken.norm(dim=2)
    assert (lengths > 1e-3).all()
    assert ((left * taken).sum(2) / lengths).abs().max() < 1e-4  # not exactly 0, because 1e-6 is added to a norm
    assert (left.norm(dim=2) <= (x - model.decoder.b_X).norm(dim=2)).all()
    # the length does not depend on the attention output
    with torch.no_grad():
        model.context.out.weight *= 7
        model.context.out.bias *= 7
    torch.testing.assert_close(model.encode(x)[:, 1] @ model.decoder.W_NX, taken, rtol=1e-4, atol=1e-4)


def test_gradient_is_the_slope_of_the_loss(shifted: Any) -> None:
    """Only the choice of the k largest is treated as constant: the predicted direction and c are differentiated."""
    model, x, h = shifted(build()), data(6) * 3, 1e-6
    model.loss(x)["loss"].backward()
    assert model.loss(x)["aux"] == 0  # aux has a detached residual
    for name, p in model.named_parameters():
        step, slopes = torch.randn_like(p), []
        for sign in (1, -1):
            with torch.no_grad():
                p += sign * h * step
                slopes.append(model.loss(x)["loss"] * sign / (2 * h))
                p -= sign * h * step
        torch.testing.assert_close((p.grad * step).sum(), sum(slopes), rtol=1e-5, atol=1e-6, msg=f"{name}: {{}}".format)


def test_new_codes_are_sparse_and_counted_by_positions(shifted: Any) -> None:
    model, x = shifted(build(dead_after=8)).train(), data(7)
    with torch.no_grad():
        model.encoder.bias[4] = -100
    new = model.encode(x)[:, 0]
    assert (new >= 0).all() and ((new != 0).sum(2) <= 3).all()
    terms = model.loss(x)
    torch.testing.assert_close(terms["l0"], (new != 0).sum(2).float().mean())
    fired_N = (new != 0).flatten(0, 1).any(0)
    assert not fired_N[4] and torch.equal(model.since_fired_N, torch.where(fired_N, 0, 7 * T))
    assert terms["dead_latents"] == (~fired_N).float().mean()


def test_default_k_aux_is_half_of_dimensions() -> None:
    assert build().k_aux == D // 2 and build((2, T, 3)).k_aux == D // 2 and build((1, T, 1)).k_aux == 1


def test_data_init_uses_median_and_scale_of_positions() -> None:
    model, x = build(data_init=True), data(9) ** 3 * 5 + 1
    with torch.no_grad():
        model.init_from_data(x)
    rows = x.flatten(0, 1)
    torch.testing.assert_close(model.decoder.b_X, geometric_median(rows))
    new = model.active(model.pre_activations(rows), 3)
    far = (rows - model.decoder.b_X).norm(dim=1).mean()
    torch.testing.assert_close(model.decoder.sum_of_directions(*new).norm(dim=1).mean(), far)


@pytest.mark.parametrize(
    ("shape", "t", "d"), [((7,), 1, 7), ((3, 4), 3, 4), ((2, 3, 4), 3, 8), ((2, 3, 4, 5), 3, 40), ((1, 1, 6), 1, 6)]
)
def test_positions_follow_rows_or_axis_after_channels(shape: tuple[int, ...], t: int, d: int) -> None:
    x = torch.arange(2.0 * math.prod(shape)).reshape(2, *shape)
    rows = positions(x)
    assert counts(shape) == (t, d) and rows.shape == (2, t, d)
    for i in range(t):
        expected = x if len(shape) == 1 else x[:, i] if len(shape) == 2 else x[:, :, i]
        assert torch.equal(rows[:, i], expected.flatten(1))
    decoder = SequenceDictionary(d, shape)
    with torch.no_grad():
        decoder.W_NX.copy_(torch.eye(d))
        decoder.b_X.fill_(0.5)
    assert torch.equal(decoder(torch.stack([rows, 2 * rows], 1)), 3 * x + 0.5)


@pytest.mark.slow
def test_constant_part_is_predicted_without_latents() -> None:
    """Sequences of a dense constant plus one new atom per position: with k = 1, TopK cannot represent both."""
    torch.manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(8, D), dim=1)
    constant = torch.randn(50, 1, D)
    x = constant + torch.rand(50, 8, 1) * atoms[torch.randint(8, (50, 8))]
    errors = {}
    for name in ("temporal_sae", "topk_sae"):
        torch.manual_seed(1)
        shape = (8, D) if name == "temporal_sae" else (D,)
        model = build(shape, name, latent_dim=16, k=1, aux_weight=0.0).float()
        optimizer, seen = torch.optim.Adam(model.parameters(), 2e-2), x if name == "temporal_sae" else x.flatten(0, 1)
        for _ in range(100):
            optimizer.zero_grad()
            model.loss(seen)["loss"].backward()
            model.on_before_optimizer_step(optimizer)
            optimizer.step()
            model.after_optimizer_step()
        errors[name] = (model(seen).reshape(-1, 8, D)[:, 1:] - x[:, 1:]).square().mean().item()
    assert errors["temporal_sae"] < 0.7 * errors["topk_sae"]


@pytest.mark.parametrize(
    "settings",
    [{"heads": 0}, {"heads": 5}, {"key_dim": 0}, {"key_dim": 3}, {"latent_dim": 13}, {"k": 0}, {"dead_after": 0}],
)
def test_invalid_values_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(aezoo.AezooError, match=next(iter(settings))):
        build(**settings)
