"""Laws of Learned compression with mixtures and attention (Cheng et al. 2020)."""

import itertools
import math

import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from compression_laws import (  # noqa: F401
    data,
    small,
    test_bf16_symbols_determine_code,
    test_bits_are_counted_per_position_for_vectors_and_maps,
    test_codes_are_encoder_output_within_half_a_step,
    test_context_model_is_causal_in_training,
    test_gradients_of_both_terms_are_finite_differences,
    test_loss_is_negative_elbo_with_uniform_posterior,
    test_loss_matches_paper_rate_distortion,
    test_rate_and_distortion_train_expected_networks,
    test_rate_passes_gradients_to_itself_and_earlier_parts,
    test_sampled_symbols_follow_model_distribution,
    test_score_is_evaluation_loss_per_sample,
    test_sequential_coding_matches_parallel_training_rate,
    test_side_information_passes_gradients_to_code,
    test_symbol_distributions_are_causal,
    test_symbols_determine_code_and_reconstruction,
)
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401

import aezoo
from aezoo.bases.entropy_coded import MIN_SCALE, Gaussians, Mixtures, scale_of
from aezoo.models.compression.cheng2020 import Attention, Decoder, Encoder, Subpixel

# ---- mixture distributions -------------------------------------------------------------------------------------------


def of_torch(law: Mixtures) -> D.MixtureSameFamily:
    """The same mixture without rounding, by torch.distributions, (n, 1)."""
    means, scales, logits = (part.movedim(0, -1) for part in (law.parts.mean, law.parts.scale, law.log_weight))
    return D.MixtureSameFamily(D.Categorical(logits=logits), D.Normal(means, scales))


# ---- coded symbols and their order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_one_component_mixture_equals_joint_ar_hyperprior(training: bool) -> None:
    """Except for the transforms, which are copied here."""
    one, two = small("cheng2020", mixtures=1), small("joint_ar_hyperprior", activation="leaky_relu")
    two.encoder, two.decoder = one.encoder, one.decoder
    two.load_state_dict(one.state_dict())
    x = data()
    terms = []
    for model in (one, two):
        torch.manual_seed(0)
        terms.append(model.train(training).loss(x))
    for term, value in terms[1].items():
        assert torch.equal(terms[0][term], value)
    assert torch.equal(one.encode_symbols(x), two.encode_symbols(x))


def test_mixture_parameters_are_means_scales_weights() -> None:
    model = small("cheng2020")
    means, raws, logits = torch.randn(3, 3, 2, 5, dtype=torch.float64)
    law, v = model.distribution(*means, *raws, *logits), torch.randn(2, 5, dtype=torch.float64)
    expected = of_torch(Mixtures(means, scale_of(raws), logits))
    torch.testing.assert_close(law.log_mass(v).exp(), expected.cdf(v + 0.5) - expected.cdf(v - 0.5))
    alone = small("cheng2020", mixtures=1).distribution(means[0], raws[0])
    same = model.distribution(*[means[0]] * 3, *[raws[0]] * 3, *logits)
    torch.testing.assert_close(same.log_mass(v), alone.log_mass(v))
    torch.testing.assert_close(same.mean, alone.mean)


def test_mixture_codes_bimodal_symbols_cheaply() -> None:
    """Symbols of two distant modes cost 1 bit, where a single Gaussian needs to cover both."""
    modes = torch.tensor([-20.0, 20.0, 0.0]).view(3, 1, 1)
    v = torch.tensor([-20.0, 20.0]).view(2, 1)
    law = Mixtures(
        modes.expand(3, 2, 1), torch.full((3, 2, 1), MIN_SCALE), torch.tensor([0.0, 0.0, -90.0]).view(3, 1, 1)
    )
    torch.testing.assert_close(law.log_mass(v), torch.full((2, 1), -math.log(2)), rtol=0, atol=1e-4)
    assert float(Gaussians(torch.zeros(2, 1), torch.full((2, 1), 20.0), 0).log_mass(v).max()) < -4


# ---- sub-pixel convolutions and attention ----------------------------------------------------------------------------


@pytest.mark.parametrize("larger", [(8, 10), (7, 10), (7, 9)])
def test_subpixel_conv_is_cropped_pixel_shuffle(larger: tuple[int, ...]) -> None:
    layer, x = Subpixel(3, 2, larger), torch.randn(2, 3, 4, 5)
    expected = F.pixel_shuffle(layer.conv(x), 2)[..., : larger[0], : larger[1]]
    assert torch.equal(layer(x), expected)


def test_subpixel_conv_interleaves_every_axis() -> None:
    line, x = Subpixel(3, 2, (7,)), torch.randn(2, 3, 4)
    both = line.conv(x).view(2, 2, 2, 4)
    assert torch.equal(line(x)[..., ::2], both[:, :, 0]) and torch.equal(line(x)[..., 1::2], both[:, :, 1, :3])
    block, x = Subpixel(3, 2, (4, 6, 4)), torch.randn(1, 3, 2, 3, 2)
    parts = block.conv(x).view(1, 2, 2, 2, 2, 2, 3, 2)
    for a, b, c in itertools.product((0, 1), repeat=3):
        assert torch.equal(block(x)[..., a::2, b::2, c::2], parts[:, :, a, b, c])


def test_attention_mask_scales_trunk() -> None:
    layer, x = Attention(2, 5, "relu").double(), torch.randn(2, 5, 4, 3, dtype=torch.float64)
    for bias, share in ((-1e3, 0.0), (0.0, 0.5), (1e3, 1.0)):
        with torch.no_grad():
            layer.mask[-1].weight.zero_()
            layer.mask[-1].bias.fill_(bias)
        torch.testing.assert_close(layer(x), x + share * layer.trunk(x))
    assert not torch.allclose(layer.trunk(x), x)


@pytest.mark.parametrize("shape", [(1, 13), (3, 16, 11), (1, 5, 6, 7)])
@pytest.mark.parametrize("dims", [(), (4,), (4, 6), (4, 6, 5)])
def test_residual_stages_restore_every_grid_size(shape: tuple[int, ...], dims: tuple[int, ...]) -> None:
    code = aezoo.nets.map_shape("gdn", shape, dims, 3)
    x = torch.rand(2, *shape)
    for attention in (True, False):
        down, up = Encoder(shape, code, dims, "relu", attention), Decoder(code, shape, dims[::-1], "relu", attention)
        assert down(x).shape[1:] == code and up(down(x)).shape == x.shape
        counts = [sum(isinstance(part, Attention) for part in net) for net in (down, up)]
        assert counts == ([1 + (len(dims) > 1)] * 2 if attention else [0, 0])
        # the decoder has attention on the same grid as the encoder
        if attention and len(dims) > 1:
            middle = [
                [*net][[isinstance(part, Attention) for part in net].index(True, first)]
                for net, first in ((down, 0), (up, 1))
            ]
            assert len({part.mask[-1].weight.shape for part in middle}) == 1
