"""Laws of FVQ autoencoder, vector quantisation with all codes in use (Chang et al. 2025)."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import vector_quantize_pytorch as peer
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from quantised_laws import (  # noqa: F401
    test_autocast_indices_and_terms_match_float32,
    test_each_term_trains_expected_parts_only,
    test_inference_calls_do_not_update_codebook,
    test_invalid_values_are_refused,
    test_loss_matches_numpy_formula,
    test_resume_is_exact_and_indices_roundtrip,
    test_rotation_trick_keeps_angle_and_scales_by_norms,
    test_straight_through_passes_code_gradient_to_z,
)
from torch import Tensor, nn

import aezoo
from aezoo.quantisers import FVQ, VQ
from aezoo.quantisers.fvq import Bridge

D, K = 4, 10


SMALL: dict[str, Any] = {"group_size": 3, "width": 32, "depth": 2}


def built(size: int = K, **settings: Any) -> Any:
    """A quantiser with random offsets added to its initial weights."""
    quantiser = FVQ(D, size, **(SMALL | settings)).double()
    with torch.no_grad():
        for parameter in quantiser.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return quantiser


def torch_layer(block: Any) -> nn.TransformerEncoderLayer:
    """Torch's pre-norm layer with the weights of a block."""
    width = block.norm_1.weight.shape[0]
    layer = nn.TransformerEncoderLayer(
        width, block.attention.heads, 4 * width, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
    ).double()
    pairs = [(layer.norm1, block.norm_1), (layer.norm2, block.norm_2), (layer.linear1, block.mlp[0])]
    pairs += [(layer.linear2, block.mlp[2]), (layer.self_attn.out_proj, block.attention.out)]
    for theirs, ours in pairs:
        theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        layer.self_attn.in_proj_weight.copy_(block.attention.qkv.weight)
        layer.self_attn.in_proj_bias.zero_()
        layer.self_attn.in_proj_bias[:width] = block.attention.bias_q
    return layer


@pytest.mark.parametrize(("size", "group_size"), [(K, 3), (9, 3), (6, 1), (5, 8)])
def test_codebook_is_torch_transformer_of_code_groups(size: int, group_size: int) -> None:
    quantiser = built(size, group_size=group_size)
    bridge, raw = quantiser.bridge, [*quantiser.raw_KD]
    raw += [torch.zeros(D, dtype=torch.float64)] * (-len(raw) % group_size)
    groups = [torch.cat(raw[i : i + group_size]) for i in range(0, len(raw), group_size)]
    tokens = torch.stack([bridge.compress.weight @ group + bridge.compress.bias for group in groups])[None]
    for block in bridge.blocks[:2]:
        tokens = torch_layer(block)(tokens)
    last = bridge.blocks[2]
    tokens = F.layer_norm(tokens, (32,), last.weight, last.bias, 1e-6)[0]
    codes = [code for token in tokens for code in (bridge.recover.weight @ token + bridge.recover.bias).split(D)]
    torch.testing.assert_close(quantiser.codebook(), torch.stack(codes[:size]))
    z = torch.randn(20, D, 3, dtype=torch.float64)
    rows = z.movedim(1, -1).flatten(0, 1)
    assert torch.equal(quantiser(z).indices.flatten(), torch.cdist(rows, quantiser.codebook()).argmin(1))


def test_one_used_code_moves_every_code() -> None:
    quantiser, z = built(), torch.randn(1, D, dtype=torch.float64)
    before = quantiser.codebook().detach().clone()
    loss = quantiser(z).terms["codebook"]
    (of_raw,) = torch.autograd.grad(loss, quantiser.raw_KD, retain_graph=True)
    assert (of_raw.abs().amax(1) > 0).all()
    plain = VQ(D, K, update="gradient").double()
    (of_code,) = torch.autograd.grad(plain(z).terms["codebook"], plain.code_KD)
    assert int((of_code.abs().amax(1) > 0).sum()) == 1
    with torch.no_grad():
        every = [*quantiser.parameters()]
        for parameter, g in zip(every, torch.autograd.grad(loss, every), strict=True):
            parameter -= 1e-2 * g
    moves = quantiser.codebook() - before
    assert (moves.norm(dim=1) > 1e-6).all() and torch.linalg.matrix_rank(moves) == D
    assert torch.cdist(moves, moves).add(torch.eye(K)).min() > 1e-9


def test_without_attention_codes_depend_on_own_group_only() -> None:
    for knows, scale in ((K, 1.0), (3, 0.0)):
        quantiser = built()
        with torch.no_grad():
            for block in quantiser.bridge.blocks[:2]:
                block.attention.out.weight *= scale
            before = quantiser.codebook().clone()
            quantiser.raw_KD[4] += 1
            moved = (quantiser.codebook() - before).abs().amax(1) > 1e-9
        assert int(moved.sum()) == knows and moved[3:6].all()


def test_codes_start_distinct_unlike_zero_initialisation() -> None:
    quantiser = FVQ(D, 512)
    codebook = quantiser.codebook()
    assert torch.pdist(codebook).min() > 1e-3 and 0.2 < codebook.std() < 1.5
    nn.init.zeros_(quantiser.bridge.recover.weight)
    nn.init.zeros_(quantiser.bridge.recover.bias)
    assert not quantiser.codebook().any()


def test_straight_through_and_terms_have_one_sided_gradients() -> None:
    quantiser, z = built().train(), torch.randn(9, D, 2, dtype=torch.float64, requires_grad=True)
    found = quantiser(z)
    weight = torch.randn_like(z)
    (of_z,) = torch.autograd.grad((weight * found.z_q).sum(), z, retain_graph=True)
    assert torch.equal(of_z, weight)
    assert found.terms["commitment"].equal(found.terms["codebook"])
    for term, of_book in (("commitment", False), ("codebook", True)):
        every = [z, *quantiser.parameters()]
        of = torch.autograd.grad(found.terms[term], every, retain_graph=True, allow_unused=True)
        assert (of[0] is None or not of[0].any()) == of_book
        assert all((g is not None and bool(g.any())) == of_book for g in of[1:])


@pytest.mark.slow
def test_transformed_codebook_revives_codes_together() -> None:
    rows, used = torch.randn(150, D), {}
    for quantiser in (FVQ(D, 32, group_size=4, width=32, depth=1), VQ(D, 32, update="gradient")):
        with torch.no_grad():
            far = quantiser.bridge.recover.bias if isinstance(quantiser, FVQ) else quantiser.code_KD
            far += 3
        optimizer = torch.optim.Adam(quantiser.parameters(), 1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            quantiser.train()(rows).terms["codebook"].backward()
            optimizer.step()
        used[type(quantiser)] = len(quantiser.eval()(rows).indices.unique())
    assert used[FVQ] >= 16 and used[VQ] <= 4


def test_codes_and_loss_match_peer_vq_behind_same_bridge() -> None:
    quantiser, z = built().float().train(), torch.randn(30, D)
    theirs = peer.VectorQuantize(
        D, K, vq_bridge=copy.deepcopy(quantiser.bridge), rotation_trick=False, commitment_weight=1.0
    ).train()
    with torch.no_grad():
        theirs._codebook.embed.copy_(quantiser.raw_KD[None])
    z_q, index, loss = theirs(z[None])
    found = quantiser(z)
    assert torch.equal(index[0], found.indices[:, 0])
    torch.testing.assert_close(z_q[0], found.z_q, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.squeeze() * D, found.terms["commitment"], rtol=1e-4, atol=1e-5)


def test_single_matrix_bridge_equals_sim_vq_vae() -> None:
    nets: dict[str, Any] = {"latent_dim": D, "codebook_size": K, "net": "mlp", "hidden_dims": (8,), "places": 3}
    model = aezoo.create_model("fvq_vae", (6,), **nets, **SMALL).double().train()
    other: Any = aezoo.create_model("sim_vq_vae", (6,), **nets).double().train()
    own: dict[str, Tensor] = {k: v for k, v in model.state_dict().items() if "quantiser" not in k}
    codebook = model.quantiser.codebook().detach()
    other.load_state_dict({**own, "quantiser.frozen_KD": codebook, "quantiser.W_DD": torch.eye(D)})
    x = torch.rand(7, 6, dtype=torch.float64)
    found, expected = model.loss(x), other.loss(x)
    assert found.keys() == expected.keys()
    for term in expected:
        torch.testing.assert_close(found[term], expected[term])


@pytest.mark.parametrize("wrong", [{"group_size": 0}, {"width": 0}, {"depth": 0}, {"estimator": "gumbel"}])
def test_invalid_quantiser_values_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(aezoo.AezooError, match=next(iter(wrong))):
        FVQ(D, K, **wrong)


def test_bridge_transforms_batched_codebooks() -> None:
    bridge, codebooks = Bridge(D, 3, 8, 1), torch.randn(2, K, D)
    torch.testing.assert_close(bridge(codebooks), torch.stack([bridge(codebook) for codebook in codebooks]))
