"""Tests of aezoo/nets/unet.py."""

import math

import pytest
import torch
from finite_differences import assert_network_gradients_match
from torch import nn

from aezoo.nets import unet

# ---- U-Net (Ronneberger et al. 2015), split at the code --------------------------------------------------------------


def test_every_unet_stage_passes_through_the_code() -> None:
    encoder, decoder = (
        unet.Encoder((1, 12, 12), (3,), (4, 5, 6), "silu"),
        unet.Decoder((3,), (1, 12, 12), (6, 5, 4), "silu"),
    )
    x, z = torch.rand(2, 1, 12, 12), torch.randn(2, 3)
    code, x_hat = encoder(x), decoder(z)
    # zeroing one stage changes the output, which still depends on the input through the other stages
    for parts, stage in ((encoder, 1), (encoder, 2), (decoder, 0), (decoder, 1)):
        hook = parts.stages[stage].register_forward_hook(lambda module, inputs, output: 0 * output)
        if parts is encoder:
            assert not torch.allclose(encoder(x), code)
            assert not torch.allclose(encoder(x), encoder(0 * x))
        else:
            assert not torch.allclose(decoder(z), x_hat)
            assert not torch.allclose(decoder(z), decoder(0 * z))
        hook.remove()


@pytest.mark.parametrize("n", [1, 2, 3, 6, 7])
def test_upsampling_inverts_ceil_mode_pooling(n: int) -> None:
    small_map = torch.rand(1, 1, math.ceil(n / 2))
    large = unet._DoubleChannels((n,))(small_map)
    assert torch.equal(large[0, 0], small_map[0, 0].repeat_interleave(2)[:n])
    assert torch.equal(nn.MaxPool1d(2, ceil_mode=True)(large), small_map)


def test_gradients_match_finite_differences() -> None:
    assert_network_gradients_match("unet")
