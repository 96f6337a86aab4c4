"""Laws of Learned compression with a scale hyperprior (Ballé et al. 2018)."""

import torch
from compression_laws import (  # noqa: F401
    small,
    test_bf16_symbols_determine_code,
    test_bits_are_counted_per_position_for_vectors_and_maps,
    test_codes_are_encoder_output_within_half_a_step,
    test_gradients_of_both_terms_are_finite_differences,
    test_loss_is_negative_elbo_with_uniform_posterior,
    test_loss_matches_paper_rate_distortion,
    test_rate_and_distortion_train_expected_networks,
    test_sampled_symbols_follow_model_distribution,
    test_score_is_evaluation_loss_per_sample,
    test_side_information_passes_gradients_to_code,
    test_symbol_distributions_are_causal,
    test_symbols_determine_code_and_reconstruction,
)
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401

from aezoo.bases.entropy_coded import Rounding

# ---- coded symbols and their order -----------------------------------------------------------------------------------


def test_scale_hyperprior_uses_magnitudes_with_zero_mean() -> None:
    model = small("scale_hyperprior").eval()
    y = 10 * torch.randn(2, *model.code_shape, dtype=torch.float64)
    coders = [Rounding(), Rounding()]
    found = [model.code_latents(coder, sign * y, 2) for coder, sign in zip(coders, (1, -1), strict=True)]
    torch.testing.assert_close(found[0], -found[1])
    torch.testing.assert_close(coders[0].rate_B, coders[1].rate_B)
    assert torch.equal(found[0], found[0].round())
