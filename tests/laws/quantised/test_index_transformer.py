"""Laws of Decoder-only Transformer, GPT-2 (Radford et al. 2019)."""

import itertools
import math
from typing import Any

import pytest
import torch
from quantised_laws import (  # noqa: F401
    test_what_is_only_looked_at_teaches_a_book_nothing,
)
from token_prior_laws import (  # noqa: F401
    LAYOUTS,
    causal_law,
    chi_square_law,
    drawn,
    prior,
    test_a_dropped_index_costs_nothing,
    test_a_pattern_costs_what_its_first_index_does,
    test_a_prior_holds_its_tokenizer_and_needs_no_file_of_it,
    test_a_source_of_known_entropy_is_learnt_to_its_entropy,
    test_a_walk_over_the_tokens_gives_the_logits_of_the_whole,
    test_draws_have_the_enumerated_probabilities,
    test_every_token_depends_on_all_before_it_and_none_after,
    test_next_logits_match_whole_and_are_causal,
    test_temperature_0_or_top_1_draws_the_likeliest,
    test_the_loss_is_the_cross_entropy_of_the_indices,
    test_the_probabilities_of_all_sequences_sum_to_one,
    test_trained_tokenizer_is_frozen_under_its_prior,
    test_untrained_tokenizer_trains_as_if_alone,
    trained,
)

# fits without validation, and Lightning's advice on loaders
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
def test_an_index_is_told_by_the_vectors_of_its_own_book(shape: Any, sizes: Any) -> None:
    model = prior("index_transformer", shape, sizes)
    tokens = drawn(model, 3)
    for t in range(model.n_tokens):
        found = model.embedded(tokens[:, :t]) - model.position_TW[: t + 1]
        assert found.shape == (3, t + 1, model.position_TW.shape[1])
        torch.testing.assert_close(found[:, 0], model.start_W.expand(3, -1))
        for s in range(t):
            torch.testing.assert_close(found[:, s + 1], model.book_QKW[s % len(sizes), tokens[:, s]])


# ---- causality -------------------------------------------------------------------------------------------------------


def test_attention_to_later_tokens_leaks_and_the_law_sees_it() -> None:
    model = prior("index_transformer", (1, 5), (4,))
    model.blocks[1].causal = False
    with pytest.raises(AssertionError):
        causal_law(model)


# ---- draws -----------------------------------------------------------------------------------------------------------


def test_draws_at_another_temperature_are_told_apart() -> None:
    model = prior("index_transformer", (2, 2), (3, 2))
    with pytest.raises(AssertionError):
        chi_square_law(model, lambda n, temperature, top_k: model.sample_indices(n, 1.3, top_k), 1.0, 0)
    with pytest.raises(AssertionError):
        chi_square_law(model, lambda n, temperature, top_k: model.sample_indices(n, temperature, 2), 1.0, 0)
