"""Tests of aezoo/nets/convnext.py."""

from typing import Any

import pytest
import torch
from finite_differences import assert_network_gradients_match
from torch import nn

from aezoo.nets import convnext

# ---- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convnext_block_matches_formula(rank: int, shifted: Any) -> None:
    block = shifted(convnext.ConvNeXtBlock(rank, 4, "gelu"))
    x = torch.randn(2, 4, *([9] * rank))
    norm_, (first, _, last) = block.norm, block.pointwise
    h = block.depthwise(x)
    assert block.depthwise.weight.shape == (4, 1, *([7] * rank))
    mean, var = h.mean(1, keepdim=True), h.var(1, correction=0, keepdim=True)
    column = (4, *([1] * rank))
    h = (h - mean) / (var + 1e-6).sqrt() * norm_.weight.view(column) + norm_.bias.view(column)
    conv = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[rank]
    one = [1] * rank
    h = nn.functional.gelu(conv(h, first.weight.view(16, 4, *one), first.bias))
    torch.testing.assert_close(block(x), x + conv(h, last.weight.view(4, 16, *one), last.bias), rtol=1e-4, atol=1e-5)


def test_gradients_match_finite_differences() -> None:
    assert_network_gradients_match("convnext")
