"""Tests of aezoo/nets/vit.py."""

from typing import Any

import numpy as np
import pytest
import torch
from finite_differences import assert_network_gradients_match
from torch import nn

from aezoo.nets import vit

# ---- patches ---------------------------------------------------------------------------------------------------------


def test_standardised_patches_match_mae_code() -> None:
    """Patches with padding are standardised by the sample's own values; a single value becomes 0."""
    patchify, x = vit.Patchify((1, 8, 8), 4), torch.rand(3, 1, 8, 8, dtype=torch.float64)
    target = patchify(x)
    mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
    found, moments = patchify.standardise(target)
    torch.testing.assert_close(found, (target - mean) / (var + 1.0e-6) ** 0.5)
    torch.testing.assert_close(moments, torch.cat([mean, (var + 1.0e-6) ** 0.5], dim=2))
    filled_up = vit.Patchify((1, 5, 5), 4)
    found, moments = filled_up.standardise(filled_up(x[:, :, :5, :5]))
    assert found.isfinite().all() and found[:, 3, 0].abs().max() < 1e-9
    torch.testing.assert_close(moments[:, 3, 0], x[:, 0, 4, 4])
    torch.testing.assert_close(moments[:, 3, 1], torch.full((3,), 1e-3, dtype=torch.float64))
    torch.testing.assert_close(moments[:, 1, 1], (x[:, 0, :4, 4].var(dim=1) + 1.0e-6) ** 0.5)
    other_padding = filled_up(x[:, :, :5, :5]) + 7 * (1 - filled_up.real_NP)
    torch.testing.assert_close(filled_up.standardise(other_padding)[1], moments)


# ---- the transformer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "heads"), [(64, 2), (96, 3), (7, 1)])
def test_attention_matches_torch_multihead_attention(width: int, heads: int, shifted: Any) -> None:
    ours = shifted(vit.Attention(width)).double()
    theirs = nn.MultiheadAttention(width, heads, batch_first=True).double()
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": torch.cat([ours.bias_q, torch.zeros(2 * width)]),
            "out_proj.weight": ours.out.weight,
            "out_proj.bias": ours.out.bias,
        }
    )
    x_BND = torch.randn(3, 5, width, dtype=torch.float64)
    assert ours.heads == heads
    torch.testing.assert_close(ours(x_BND), theirs(x_BND, x_BND, x_BND)[0])


def test_block_matches_torch_pre_norm_encoder_layer(shifted: Any) -> None:
    ours = shifted(vit.Block(64, "gelu")).double()
    theirs = nn.TransformerEncoderLayer(64, 2, 256, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True).double()
    pairs = {
        "self_attn.out_proj.": ours.attention.out,
        **{"linear1.": ours.mlp[0], "linear2.": ours.mlp[2], "norm1.": ours.norm_1, "norm2.": ours.norm_2},
    }
    state = {f"{a}{b}": getattr(part, b) for a, part in pairs.items() for b in ("weight", "bias")}
    state["self_attn.in_proj_weight"] = ours.attention.qkv.weight
    state["self_attn.in_proj_bias"] = torch.cat([ours.attention.bias_q, torch.zeros(128)])
    theirs.load_state_dict(state)
    x_BND = torch.randn(2, 6, 64, dtype=torch.float64)
    torch.testing.assert_close(ours(x_BND), theirs(x_BND))


def test_positions_are_published_sinusoids_and_distinct() -> None:
    table_ND = vit.sinusoids((4, 5), 16).double().numpy()
    omega = 1 / 10000 ** (np.arange(4) / 4)
    rows, columns = np.repeat(np.arange(4), 5), np.tile(np.arange(5), 4)
    angles = [np.outer(place, omega) for place in (rows, columns)]
    wanted = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    np.testing.assert_allclose(table_ND, wanted, atol=1e-6)
    assert vit.sinusoids((3, 3, 3), 5).shape == (27, 5)
    assert len(vit.sinusoids((3, 3, 3), 12).unique(dim=0)) == 27


def test_gradients_match_finite_differences() -> None:
    assert_network_gradients_match("vit")
