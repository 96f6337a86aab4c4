"""Laws of Learned compression with a scale hyperprior (Ballé et al. 2018)."""

import torch
from compression_laws import (  # noqa: F401
    small,
    test_a_map_s_law_sees_only_what_was_coded_before,
    test_codes_are_the_encoder_s_output_to_half_a_step,
    test_in_bf16_whole_numbers_are_all_that_a_code_needs_too,
    test_samples_have_the_laws_of_the_model,
    test_score_is_the_loss_of_a_sample_as_it_is_evaluated,
    test_the_loss_is_the_negative_elbo_of_a_uniform_posterior,
    test_the_loss_is_the_paper_s_rate_and_distortion,
    test_vectors_and_maps_count_bits_a_place,
    test_whole_numbers_are_all_that_a_code_needs,
)

from aezoo.bases.entropy_coded import Rounding

# ---- what is coded, and in which order -------------------------------------------------------------------------------


def test_scale_hyperprior_uses_magnitudes_with_zero_mean() -> None:
    model = small("scale_hyperprior").eval()
    y = 10 * torch.randn(2, *model.code_shape, dtype=torch.float64)
    coders = [Rounding(), Rounding()]
    found = [model.code_latents(coder, sign * y, 2) for coder, sign in zip(coders, (1, -1), strict=True)]
    torch.testing.assert_close(found[0], -found[1])
    torch.testing.assert_close(coders[0].rate_B, coders[1].rate_B)
    assert torch.equal(found[0], found[0].round())
