"""Tests of aezoo/nets/transformer.py."""

import math
from typing import Any

import pytest
import torch
from finite_differences import assert_gradients_match, assert_network_gradients_match
from torch import nn

from aezoo import nets
from aezoo.nets import lstm
from aezoo.nets.transformer import Block

# ---- sequence networks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [6, 7])
def test_sinusoids_match_paper_and_shift_rotates_them(width: int) -> None:
    found = lstm.sinusoids(50, width).double()
    for t in (0, 1, 31):
        for k in range(width):
            angle = t / 10000 ** (2 * (k // 2) / width)
            assert float(found[t, k]) == pytest.approx(math.cos(angle) if k % 2 else math.sin(angle), abs=1e-6)
    for i in range(width // 2):
        turn = 7 / 10000 ** (2 * i / width)
        R = torch.tensor([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]], dtype=torch.float64)
        pair = found[:, 2 * i : 2 * i + 2]
        torch.testing.assert_close(pair[7:], pair[:-7] @ R.T, rtol=0, atol=1e-5)
    assert torch.equal(lstm.sinusoids(20, width), lstm.sinusoids(50, width)[:20])


def test_block_matches_torch_pre_norm_layer(shifted: Any) -> None:
    """nn.TransformerEncoderLayer with the same weights, with a key padding mask and with a causal mask."""
    for causal in (False, True):
        block = shifted(Block(32, "relu", causal)).double()
        layer = nn.TransformerEncoderLayer(32, 2, 128, 0.0, batch_first=True, norm_first=True).double()
        attention = layer.self_attn
        pairs = {
            attention.in_proj_weight: block.qkv.weight, attention.in_proj_bias: torch.zeros(96),
            attention.out_proj.weight: block.out.weight, attention.out_proj.bias: block.out.bias,
            layer.linear1.weight: block.mlp[1].weight, layer.linear1.bias: block.mlp[1].bias,
            layer.linear2.weight: block.mlp[3].weight, layer.linear2.bias: block.mlp[3].bias,
            layer.norm1.weight: block.norm.weight, layer.norm1.bias: block.norm.bias,
            layer.norm2.weight: block.mlp[0].weight, layer.norm2.bias: block.mlp[0].bias,
        }  # fmt: skip
        for theirs, own in pairs.items():
            theirs.data.copy_(own)
        h = torch.randn(3, 5, 32, dtype=torch.float64)
        seen = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]
        mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64) if causal else None
        expected = layer(h, src_mask=mask, src_key_padding_mask=None if causal else ~seen)
        found = block(h, None if causal else seen)
        torch.testing.assert_close(found[seen], expected[seen])


def test_gradients_match_finite_differences() -> None:
    assert_network_gradients_match("transformer")
    encoder = nets.encoder("transformer", (2, 6), (3,), (8, 8), "silu")
    assert_gradients_match(encoder, torch.rand(3, 2, 6), length_B=torch.tensor([1, 4, 6]))
