"""Laws of Decoder-only Transformer, GPT-2 (Radford et al. 2019)."""

import itertools
import math
from typing import Any

import pytest
import torch
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from quantised_laws import (  # noqa: F401
    test_inference_calls_do_not_update_codebook,
)
from token_prior_laws import (  # noqa: F401
    LAYOUTS,
    causal_law,
    chi_square_law,
    drawn,
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

# Lightning warns of fits without validation data and of loaders with few workers
pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")

# ---- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "sizes"), LAYOUTS)
def test_tokens_are_in_raster_order_by_position(shape: Any, sizes: Any) -> None:
    model = prior("index_transformer", shape, sizes)
    indices = torch.arange(2 * math.prod(shape)).reshape(2, *shape)
    q, *places = shape
    for b, row in enumerate(model.to_tokens(indices).tolist()):
        steps = [(i, *place) for place in itertools.product(*map(range, places)) for i in range(q)]
        assert row == [int(indices[(b, *step)]) for step in steps]
    assert torch.equal(model.from_tokens(model.to_tokens(indices)), indices)


@pytest.mark.parametrize(("shape", "sizes"), LAYOUTS)
def test_indices_are_embedded_by_their_codebook(shape: Any, sizes: Any) -> None:
    model = prior("index_transformer", shape, sizes)
    tokens = drawn(model, 3)
    for t in range(model.n_tokens):
        found = model.embedded(tokens[:, :t]) - model.position_TW[: t + 1]
        assert found.shape == (3, t + 1, model.position_TW.shape[1])
        torch.testing.assert_close(found[:, 0], model.start_W.expand(3, -1))
        for s in range(t):
            torch.testing.assert_close(found[:, s + 1], model.book_QKW[s % len(sizes), tokens[:, s]])


# ---- causality -------------------------------------------------------------------------------------------------------


def test_non_causal_attention_is_detected() -> None:
    model = prior("index_transformer", (1, 5), (4,))
    model.blocks[1].causal = False
    with pytest.raises(AssertionError):
        causal_law(model)


# ---- draws -----------------------------------------------------------------------------------------------------------


def test_wrong_sampling_temperature_is_detected() -> None:
    model = prior("index_transformer", (2, 2), (3, 2))
    with pytest.raises(AssertionError):
        chi_square_law(model, lambda n, temperature, top_k: model.sample_indices(n, 1.3, top_k), 1.0, 0)
    with pytest.raises(AssertionError):
        chi_square_law(model, lambda n, temperature, top_k: model.sample_indices(n, temperature, 2), 1.0, 0)
