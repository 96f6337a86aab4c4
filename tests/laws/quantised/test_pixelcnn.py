"""Laws of Gated PixelCNN (van den Oord et al. 2016).

The model was compared with a port of the paper for the indices of a VQ-VAE, in float64 on equal weights and indices.
Differences are relative to the largest value; for gradients, the largest over the parameters is given.

    https://github.com/ritheshkumar95/pytorch-vqvae, commit 8d123c0d043bebc8734d37785dd13dd20e7e5e0e
        modules.py, GatedPixelCNN of kernel 3  logits 0
        pixelcnn_prior.py, train               loss 0, gradients of 29 parameters 7.3e-16

Their loss is a mean over the T positions of a sample, ours a sum. Ours has the vertical stack of a row one row lower
and shifts it in each layer, theirs in the first layer only; so for equal networks, the first row of our first kernel is
0. Differs: above the first row of positions, theirs has the biases of the vertical stack, ours zeros, which the paper
does not specify; for the comparison, the biases of `v` and `link` were 0. Our output layers begin with a ReLU, as in
table 1 of van den Oord et al. 2016 (https://arxiv.org/abs/1601.06759); the port has none, so one was added to it. It
has one index per position: models with several are only tested below.
"""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from quantised_laws import (  # noqa: F401
    test_inference_calls_do_not_update_codebook,
)
from token_prior_laws import (  # noqa: F401
    NAMES,
    SMALL,
    batches,
    causal_law,
    dependence,
    prior,
    test_deterministic_pattern_costs_first_index_only,
    test_draws_have_the_enumerated_probabilities,
    test_dropped_index_has_no_loss,
    test_incremental_logits_match_full_logits,
    test_next_logits_match_whole_and_are_causal,
    test_prior_contains_tokenizer_and_needs_no_file,
    test_temperature_0_or_top_1_draws_the_likeliest,
    test_the_loss_is_the_cross_entropy_of_the_indices,
    test_the_probabilities_of_all_sequences_sum_to_one,
    test_token_logits_are_causal,
    test_trained_nll_reaches_source_entropy,
    test_trained_tokenizer_is_frozen_under_its_prior,
    test_untrained_tokenizer_trains_as_if_alone,
    trained,
)
from torch import Tensor, nn

import aezoo
from aezoo.errors import AezooError
from aezoo.models.quantised.pixelcnn import GatedLayer, MaskedConv

# Lightning warns of fits without validation data and of loaders with few workers
pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")

# ---- causality -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 3, 3), (1, 6), (2, 2, 2)])
def test_first_layer_mask_b_leak_is_detected(shape: Any) -> None:
    model = prior("pixelcnn", shape, (4,) * shape[0], depth=6)
    causal_law(model)
    first = model.layers[0].h
    model.layers[0].h = leaking = MaskedConv(first.in_channels, first.out_channels, 1, shape[0], own=True).double()
    leaking.load_state_dict(first.state_dict())
    with pytest.raises(AssertionError):
        causal_law(model)


def test_two_masked_stacks_have_no_blind_spot() -> None:
    class OneStack(nn.Module):
        """PixelCNN of van den Oord et al. 2016 (1601.06759): 3x3 convolutions, the later half of each kernel masked."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(6)).double()

        def forward(self, x: Tensor) -> Tensor:
            for i, layer in enumerate(self.layers):
                mask = torch.ones(3, 3, dtype=torch.float64)
                mask[2], mask[1, 2], mask[1, 1] = 0, 0, float(i > 0)
                x = F.conv2d(x, layer.weight * mask, layer.bias, padding=1).tanh()
            return x

    x = torch.randn(1, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    OneStack()(x)[0, :, 4, 2].sum().backward()
    seen = x.grad[0].norm(dim=0) > 0
    assert seen[4, :2].all() and not seen[4, 2:].any()
    assert not seen[3, 4]  # the blind spot: the row above, two columns to the right
    ours = dependence(prior("pixelcnn", (1, 5, 5), (4,), depth=6))[4 * 5 + 2].reshape(5, 5) > 0
    assert ours[:4].all() and ours[4, :2].all() and not ours[4, 2:].any()


# ---- the layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_gated_layer_matches_explicit_sums(first: bool) -> None:
    """Figure 2 of van den Oord et al. 2016 as sums over the positions and channels that a position depends on."""
    Q, F, R, rows, columns = 2, 4, 1, 3, 4
    layer = GatedLayer(F, Q, R, vertical=True, dropout=0.5, first=first).double().eval()
    v, h = torch.randn(2, F, rows, columns, dtype=torch.float64).unbind()
    group = [c * Q // F for c in range(F)]

    def halves(pre: Tensor) -> Tensor:
        """tanh(a) sigmoid(b), where a is the first half of the 2 F / Q features of each group."""
        out = []
        for q in range(Q):
            a, b = pre[q * 2 * F // Q : (q + 1) * 2 * F // Q].chunk(2)
            out.append(a.tanh() * b.sigmoid())
        return torch.cat(out)

    def inside(i: int, j: int) -> bool:
        return 0 <= i < rows and 0 <= j < columns

    with torch.no_grad():
        found_v, found_h = (each[0] for each in layer(v[None], h[None]))
        pre_v = torch.zeros(2 * F, rows, columns, dtype=torch.float64)
        for i, j in itertools.product(range(rows), range(columns)):
            pre_v[:, i, j] = layer.v.bias
            for up, side in itertools.product(range(R + 1), range(-R, R + 1)):
                if inside(i - up, j + side):
                    pre_v[:, i, j] += layer.v.weight[:, :, R - up, R + side] @ v[:, i - up, j + side]
        out, mixed, own = layer.out[1], layer.link, 0 if first else 1
        for i, j in itertools.product(range(rows), range(columns)):
            torch.testing.assert_close(found_v[:, i, j], halves(pre_v[:, i, j]))
            pre_h = layer.h.bias.clone()
            for o in range(2 * F):
                for left in range(R + 1):
                    if inside(i, j - left):
                        seen = [c for c in range(F) if left or group[c] < o * Q // (2 * F) + own]
                        pre_h[o] += sum(layer.h.weight[o, c, 0, R - left] * h[c, i, j - left] for c in seen)
            if i:
                pre_h += mixed.weight[..., 0, 0] @ pre_v[:, i - 1, j] + mixed.bias
            gated = halves(pre_h)
            added = out.bias.clone()
            for o in range(F):
                added[o] += sum(out.weight[o, c, 0, 0] * gated[c] for c in range(F) if group[c] <= group[o])
            torch.testing.assert_close(found_h[:, i, j], added if first else h[:, i, j] + added)


# ---- probabilities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["vq_vae", "gumbel_vq_vae"])
def test_score_is_message_length_for_any_tokenizer(tokenizer: str) -> None:
    small = {"net": "mlp", "places": 3, "latent_dim": 2, "codebook_size": 5, "hidden_dims": [8]}
    model: Any = aezoo.create_model("pixelcnn", (6,), tokenizer={"model": tokenizer, **small}, **SMALL["pixelcnn"])
    model, x = model.double().eval(), torch.rand(4, 6, dtype=torch.float64)
    log_px = torch.distributions.Bernoulli(model(x), validate_args=False).log_prob(x).sum(1)
    torch.testing.assert_close(model.score(x), -log_px - model.log_prob(model.encode_indices(x)))


# ---- draws -----------------------------------------------------------------------------------------------------------


def test_sampled_indices_stay_within_uneven_codebooks() -> None:
    model = prior("pixelcnn", (3, 2), (2, 5, 3))
    for top_k in (0, 4):
        found = model.sample_indices(500, 3.0, top_k)
        assert [int(found[:, i].max()) for i in range(3)] == [1, 4, 2]


@pytest.mark.parametrize(("temperature", "top_k"), [(-1.0, 0), (math.nan, 0), (1.0, -1)])
def test_invalid_sampling_arguments_are_refused(temperature: float, top_k: int) -> None:
    with pytest.raises(AezooError, match="must be at least 0"):
        prior("pixelcnn", (1, 2), (3,)).sample(1, temperature, top_k)


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def test_trained_tokenizer_settings_need_weights(trained: Any, quiet: Any) -> None:
    model = aezoo.create_model("pixelcnn", (1, 4, 4), tokenizer=str(trained), **SMALL["pixelcnn"])
    empty = aezoo.create_model("pixelcnn", **model.hparams)
    with pytest.raises(AezooError, match="no weights"):
        quiet(max_epochs=1).fit(empty, batches())
    empty.load_state_dict(model.state_dict())
    quiet(max_epochs=1).fit(empty, batches())


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ("vae", "writes no code in indices"),
        ("pixelcnn", "is a prior itself"),
        ("vq_va", "no checkpoint at vq_va.*give the run"),
        ("runs/gone/0", "no checkpoint at runs/gone/0.*--ckpt_path RUN"),
        ({"latent_dim": 3}, "names no model"),
        ("", "give the run of a trained quantised model"),
        (None, "a text or a mapping"),
        ([], "a text or a mapping"),
        ({"model": "vq_vae", "latent": 3}, "has no hyperparameter 'latent'.*latent_dim"),
        ({"model": "vq_vae", "codebook_size": 2**17}, "rq_vae"),
    ],
)
def test_invalid_tokenizer_is_refused_in_one_line(tokenizer: Any, message: str) -> None:
    for name in NAMES:
        with pytest.raises(AezooError, match=message) as caught:
            aezoo.create_model(name, (1, 8, 8), tokenizer=tokenizer)
        assert "\n" not in str(caught.value)


def test_tokenizer_with_other_input_shape_is_refused(trained: Any, tmp_path: Any) -> None:
    with pytest.raises(AezooError, match=r"samples of shape \(1, 4, 4\), these data give \(1, 8, 8\)"):
        aezoo.create_model("pixelcnn", (1, 8, 8), tokenizer=str(trained))
    folder = aezoo.save_model(aezoo.create_model("dense_ae", (1, 4, 4)), tmp_path / "dense")
    with pytest.raises(AezooError, match="writes no code in indices"):
        aezoo.create_model("pixelcnn", (1, 4, 4), tokenizer=str(folder))


def test_pixelcnn_refuses_volumes_and_suggests_transformer() -> None:
    with pytest.raises(AezooError, match="use index_transformer"):
        prior("pixelcnn", (1, 2, 2, 2), (3,))


@pytest.mark.parametrize(
    "given", [{"width": 0}, {"depth": 0}, {"depth": 10**12}, {"dropout": 1.0}, {"dropout": math.nan}], ids=str
)
def test_invalid_network_settings_are_refused(given: dict[str, Any]) -> None:
    for name in NAMES:
        with pytest.raises(AezooError, match=f"got .*{next(iter(given.values()))}"):
            prior(name, (1, 2), (3,), **given)
    for size in (1, 4):
        with pytest.raises(AezooError, match="kernel_size must be odd"):
            prior("pixelcnn", (1, 2), (3,), kernel_size=size)


def test_embedding_loads_from_its_former_name() -> None:
    model, other = (prior("pixelcnn", (1, 6), (4,)) for _ in range(2))
    nn.init.normal_(model.embedding.weight)
    state = {key.replace("embedding.", "book.", 1): value for key, value in model.state_dict().items()}
    assert "book.weight" in state
    other.load_state_dict(state)
    assert torch.equal(other.embedding.weight, model.embedding.weight)
