"""Tests of aezoo/nets/blocks/tokens.py."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor, nn

from aezoo.nets import vit
from aezoo.nets.blocks import tokens

SHAPE, K, N, DIM = (1, 8, 8), 11, 5, 6


def data(n: int = 6, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


def rows_of_encoder(encoder: Any, x: Tensor) -> np.ndarray:
    """Tokens as a numpy array, (B, N, D)."""
    return np.asarray(encoder(x).detach().numpy().swapaxes(1, 2))


# ---- networks --------------------------------------------------------------------------------------------------------


def nets(shape: tuple[int, ...] = SHAPE, n: int = N) -> tuple[tokens.TokenEncoder, tokens.TokenDecoder]:
    patchify = vit.Patchify(shape)
    encoder = tokens.TokenEncoder(patchify, (DIM, n), (12, 8), "gelu").double()
    return encoder, tokens.TokenDecoder(patchify, (DIM, n), (8, 12), "gelu").double()


def test_every_token_reads_every_patch() -> None:
    for shape in (SHAPE, (2, 12), (1, 4, 4, 4)):
        encoder, _ = nets(shape)
        x = data(1, shape).requires_grad_()
        for d in range(DIM):
            for token in encoder(x)[0, d]:
                (by_value,) = torch.autograd.grad(token, x, retain_graph=True)
                assert (encoder.embed[0](by_value)[0].abs().amax(1) > 1e-9).all()


def test_every_patch_is_written_from_every_token() -> None:
    _, decoder = nets()
    code = torch.randn(1, DIM, N, dtype=torch.float64)
    by_code = torch.autograd.functional.jacobian(decoder, code)[0, :, :, :, 0]  # (C, H, W, D, N)
    assert (by_code.abs().amax(3) > 1e-9).all()


def test_permuted_latent_tokens_permute_the_code() -> None:
    """Each token of the code is the output of its own latent token, in its order."""
    encoder, decoder = nets()
    x, order = data(3), torch.tensor([3, 1, 4, 0, 2])
    code = encoder(x)
    with torch.no_grad():
        encoder.latent_NW.copy_(encoder.latent_NW[order])
        encoder.bias_DN.copy_(encoder.bias_DN[:, order])
    torch.testing.assert_close(encoder(x), code[..., order])
    x_hat = decoder(code)
    with torch.no_grad():
        decoder.place_NW.copy_(decoder.place_NW[order])
    torch.testing.assert_close(decoder(code[..., order]), x_hat)
    assert not torch.allclose(decoder(code), x_hat)  # the order of tokens matters


def test_reshape_instead_of_transpose_is_detected() -> None:
    """1d-tokenizer's `is_legacy` reshapes (B, N, W) to (B, W, N), so that a channel of the code mixes tokens."""

    class Legacy(tokens.TokenEncoder):
        def read(self, patches_BPW: Tensor) -> Tensor:
            code_BDN = super().read(patches_BPW)
            return code_BDN.transpose(1, 2).reshape(code_BDN.shape)

    legacy = Legacy(vit.Patchify(SHAPE), (DIM, N), (12, 8), "gelu").double()
    x, order = data(3), torch.tensor([3, 1, 4, 0, 2])
    code = legacy(x)
    with torch.no_grad():
        legacy.latent_NW.copy_(legacy.latent_NW[order])
    assert not torch.allclose(legacy(x), code[..., order])


def test_init_standardises_tokens_and_channels(shifted: Any) -> None:
    encoder, x = shifted(nets()[0]), data(9)
    before = rows_of_encoder(encoder, x)
    encoder.init_from_data(x)
    after = rows_of_encoder(encoder, x)
    centred = before - before.mean(0)
    np.testing.assert_allclose(after, centred / np.sqrt((centred**2).mean((0, 1))), rtol=1e-7, atol=1e-9)


def test_init_is_finite_for_equal_samples() -> None:
    for x in (data(1), data(1).expand(7, *SHAPE)):
        encoder, _ = nets()
        weight = encoder.out.weight.clone()
        encoder.init_from_data(x)
        torch.testing.assert_close(encoder.out.weight, weight)
        torch.testing.assert_close(encoder(x), torch.zeros(len(x), DIM, N, dtype=torch.float64))


def attention(layer: vit.Attention, x: np.ndarray) -> np.ndarray:
    """Self-attention of one sample, (P, W), written out in numpy."""
    q, k, v = (x @ w.T for w in np.split(layer.qkv.weight.detach().numpy(), 3))
    q = q + layer.bias_q.detach().numpy()
    parts = []
    for head in np.split(np.arange(x.shape[1]), layer.heads):
        p = scipy.special.softmax(q[:, head] @ k[:, head].T / math.sqrt(len(head)), axis=1)
        parts.append(p @ v[:, head])
    return apply(layer.out, np.concatenate(parts, 1))


def apply(layer: nn.Module, x: np.ndarray) -> np.ndarray:
    return np.asarray(layer(torch.from_numpy(x)).detach().numpy())


def transformer(blocks: nn.Sequential, x: np.ndarray) -> np.ndarray:
    for layer in blocks:
        if isinstance(layer, vit.Block):
            x = x + attention(layer.attention, apply(layer.norm_1, x))
            x = x + apply(layer.mlp, apply(layer.norm_2, x))
        else:
            x = apply(layer, x)
    return x


def test_encoder_and_decoder_are_the_published_ones(shifted: Any) -> None:
    """In numpy for one sample: concatenate, transform, keep latent tokens or patches, project them."""
    encoder, decoder = (shifted(net) for net in nets())
    x = data(1)
    cells = x[0, 0].numpy().reshape(4, 2, 4, 2).swapaxes(1, 2).reshape(16, 4)
    seen = apply(encoder.embed[1], cells) + encoder.position_PW.detach().numpy()
    latent = encoder.latent_NW.detach().numpy()
    out = transformer(encoder.blocks, np.concatenate([seen, latent]))[16:]
    code = apply(encoder.out, out).T + encoder.bias_DN.detach().numpy()
    np.testing.assert_allclose(encoder(x)[0].detach().numpy(), code, rtol=1e-8, atol=1e-9)

    written = apply(decoder.embed, code.T.copy()) + decoder.place_NW.detach().numpy()
    mask = decoder.mask_W.detach().numpy() + decoder.position_PW.detach().numpy()
    out = transformer(decoder.blocks, np.concatenate([mask, written]))[:16]
    picture = apply(decoder.out, out).reshape(4, 4, 2, 2).swapaxes(1, 2).reshape(8, 8)
    np.testing.assert_allclose(decoder(encoder(x))[0, 0].detach().numpy(), picture, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("n", [3, 16, 21])
def test_initial_attention_assigns_patch_runs_to_tokens(n: int) -> None:
    """In the first attention layer, each token scores its run of patches higher than all other patches."""
    torch.manual_seed(0)
    patchify, width = vit.Patchify(SHAPE), 128
    encoder = tokens.TokenEncoder(patchify, (DIM, n), (width,), "gelu")
    decoder = tokens.TokenDecoder(patchify, (DIM, n), (width,), "gelu")
    longest = max(n, 16)
    run = np.zeros((n, 16), dtype=bool)
    for step in range(longest):
        run[step * n // longest, step * 16 // longest] = True
    for net, queries, keys in (
        (encoder, encoder.latent_NW, encoder.position_PW),
        (decoder, decoder.position_PW, decoder.place_NW),
    ):
        q, k, _ = np.split(net.blocks.get_parameter("0.attention.qkv.weight").detach().numpy(), 3)
        np.testing.assert_allclose(q @ q.T, 2.25 * np.eye(width), atol=1e-4)
        np.testing.assert_allclose(k @ k.T, 2.25 * np.eye(width), atol=1e-4)
        scores = (queries.detach().numpy() @ q.T) @ (keys.detach().numpy() @ k.T).T
        scores = scores if net is encoder else scores.T
        assert scores[run].min() > scores[~run].max()
        own = 2.25 * width / np.sqrt(run.sum(1))  # E ||position||^2 is the width
        np.testing.assert_allclose((scores * run).sum(1) / run.sum(1), own, rtol=0.35)
