"""Laws of Transcoder (Dunefsky et al. 2024)."""

import math
from typing import Any

import pytest
import torch
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from sae_laws import (  # noqa: F401
    SHAPE,
    assert_same,
    build,
    create,
    data,
    gap,
    gradients,
    test_bias_can_start_at_geometric_median,
    test_directions_keep_unit_norm_without_radial_gradient,
    test_invalid_values_are_refused,
    test_penalty_warms_up_linearly_and_is_full_in_eval,
    trained,
)
from two_ranks import on_two_ranks

import aezoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

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
def test_transcoder_of_row_into_itself_equals_sae(form: str, shifted: Any) -> None:
    x = data(9, (10,))
    model = shifted(build("transcoder", input_shape=(2, 10), targets=(1,), latent_dim=12, form=form, l1=0.4))
    plain = build("sae_l1", input_shape=(10,), latent_dim=12, form=form, l1=0.4)
    state = {name: v for name, v in model.state_dict().items() if name not in ("mean_RX", "seen")}
    if form == "unit_norm":  # the encoder of this form reads x - b
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


def test_targets_are_predicted_from_input_rows_only(shifted: Any) -> None:
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
    assert torch.equal(model.encode(other), model.encode(x))  # the code does not depend on the targets
    assert gap(model.nll(x_hat, x), nll) > 0.1  # the score does not include the input rows


def test_input_only_rows_decode_to_running_mean(quiet: Any) -> None:
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


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["relu", "topk:3", "jumprelu"])
def test_activations_and_skip_match_written_formula(activation: str, skip: bool, shifted: Any) -> None:
    settings = {"targets": (1,), "activation": activation, "skip": skip, "form": "april", "l1": 0.4}
    model = shifted(build("transcoder", input_shape=(2, 10), latent_dim=12, **settings))
    x, y = data(9, (2, 10)).unbind(1)
    if activation == "jumprelu":
        with torch.no_grad():
            model.theta_N.uniform_(0.05, 0.5)
    pi = x @ model.encoder.weight.T + model.encoder.bias
    cut = pi.topk(3).values[:, -1:] if activation == "topk:3" else torch.zeros(())
    f = (
        torch.where(pi > model.theta_N, pi, 0)
        if activation == "jumprelu"
        else torch.where(pi >= cut, pi, 0).clamp(min=0)
    )
    added = x @ model.skip.weight.T if skip else torch.zeros_like(y)
    y_hat = f @ model.decoder.W_NX + added + model.decoder.b_X
    pair, code = torch.stack([x, y], 1), torch.cat([f, added], 1) if skip else f
    assert model.code_shape == code.shape[1:] and model.sparse_code != skip
    torch.testing.assert_close(model.encode(pair), code)
    torch.testing.assert_close(model(pair)[:, 1], y_hat)
    torch.testing.assert_close(model.decode(code)[:, 1], y_hat)
    nll = (y_hat - y).square().sum(1) + 5 * math.log(math.pi)
    torch.testing.assert_close(model.score(pair), nll)
    terms = model.loss(pair)
    penalty = {
        "relu": (f * model.decoder.W_NX.norm(dim=1)).sum(1),
        "topk:3": torch.zeros(9),
        "jumprelu": (f > 0).sum(1),
    }
    torch.testing.assert_close(terms["nll"], nll.mean())
    torch.testing.assert_close(terms["loss"], nll.mean() + 0.4 * penalty[activation].double().mean())
    torch.testing.assert_close(terms["l0"], (f != 0).sum(1).double().mean(), check_dtype=False)
    assert 0 < (f != 0).sum() < f.numel() and not (skip and gap(added, 0) < 0.01)


def test_thresholds_are_trained_as_those_of_jumprelu_sae(shifted: Any) -> None:
    model = shifted(build("transcoder", input_shape=(2, 10), latent_dim=12, targets=(1,), form="april", l1=0.4,
                          activation="jumprelu", bandwidth=0.5))  # fmt: skip
    plain = build("jumprelu_sae", input_shape=(10,), latent_dim=12, form="april", l0_weight=0.4, bandwidth=0.5)
    with torch.no_grad():
        model.theta_N.uniform_(0.05, 0.5)
    plain.load_state_dict({key: v for key, v in model.state_dict().items() if key not in ("mean_RX", "seen")})
    x = data(9, (10,))
    found, expected = model.loss(torch.stack([x, x], 1)), plain.loss(x)
    mine, theirs = gradients(found["loss"], model), gradients(expected["loss"], plain)
    assert_same(mine, theirs)
    assert mine["theta_N"].abs().max() > 0
    with torch.no_grad():
        model.theta_N.sub_(1)
    model.after_optimizer_step()
    assert (model.theta_N == 0).all()
    assert model.bfloat16().theta_N.dtype == torch.float64


def test_skip_starts_at_zero_and_counts_when_latents_restart(shifted: Any) -> None:
    model = build("transcoder", input_shape=(2, 10), latent_dim=12, targets=(1,), skip=True)
    assert (model.skip.weight == 0).all()
    model, x = shifted(model), data(9, (2, 10))
    latents, y_hat = model.reconstruct(x)
    torch.testing.assert_close(y_hat[:, 0], model(x)[:, 1])
    assert latents.shape == (9, 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "gelu"}, "activation must be relu, jumprelu or topk:K"),
        ({"activation": "topk:0"}, "activation must be"),
        ({"activation": "topk:13"}, "needs K of at most latent_dim=12"),
        ({"skip": True, "targets": ()}, "skip without targets"),
        ({"bandwidth": 0.0}, "bandwidth"),
    ],
)
def test_invalid_transcoder_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(aezoo.AezooError, match=message):
        create("transcoder", input_shape=(2, 10), **{"latent_dim": 12, "targets": (1,)} | settings)
