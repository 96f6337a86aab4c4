"""Masked autoencoder (He et al. 2021), https://arxiv.org/abs/2111.06377

The encoder processes only the visible patches V, a small decoder also mask tokens; the loss covers masked patches M:

    L = N/|M| sum_{i in M} -log p(x_i | g_i(f(x_V)))     |M| = floor(ratio N), drawn for each sample

L is in nats per sample: N/|M| makes it the mean over masks of a sum over all patches, whatever the ratio. The Gaussian
of variance 1/2 gives the paper's squared error. With norm_pix, x_i is a patch minus its mean, divided by its unbiased
standard deviation. A separate layer estimates both for masked patches; its squared error (`scale`) has no gradient for
other layers. The code covers the whole sample, with a token for each patch. Outputs at visible positions are not
trained, so decode hides a part of the tokens at a time and takes each patch from the pass in which it was hidden. score
likewise hides patches from the encoder.

The layout of the authors' code has a class token, which all patches attend to, 12 or 16 heads, and images normalised by
ImageNet's mean and standard deviation, for which L is computed. `aezoo import` reads their checkpoints and those of
transformers' ViTMAE into this layout, with outputs equal within 1e-5.

Shapes: B batch, N patches, P values in a patch, D width of a token, V visible patches, K hidden parts.
"""

from collections.abc import Callable
from functools import partial
from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.bases.patch_transformer import PatchTransformer, PatchTransformerArgs
from aezoo.errors import AezooError
from aezoo.nets import vit
from aezoo.nets.blocks.channel_norm import IMAGENET, ChannelNorm
from aezoo.training.limits import check_above

_INPUT_NORMS = ("none", "imagenet")


class LightDecoder(nn.Module):
    """A narrow, shallow transformer on tokens and mask tokens.

    Args:
        patchify: module that divides samples into patches.
        masked: number of masked patches.
        dims: widths of the encoder and of the decoder.
        make_blocks: returns new blocks with a final normalisation.
        norm_pix: whether targets are standardised patches.
        class_token: whether a class token precedes those of the patches.
        input_norm: normalisation of the samples, if any.
    """

    orders_KN: Tensor

    def __init__(
        self,
        patchify: vit.Patchify,
        masked: int,
        dims: tuple[int, int],
        make_blocks: Callable[[], nn.Module],
        norm_pix: bool,
        class_token: bool,
        input_norm: ChannelNorm | None,
    ) -> None:
        super().__init__()
        self.patchify = patchify
        self.masked = masked
        self.first = int(class_token)
        self.input_norm = input_norm
        self.embed = nn.Linear(*dims)
        self.positions = vit.Positions(patchify.grid, dims[1], authors=class_token)
        self.mask_token = nn.Parameter(0.02 * torch.randn(dims[1]))
        self.blocks = make_blocks()
        self.out = nn.Linear(dims[1], patchify.size)
        nn.init.xavier_uniform_(self.out.weight, 0.1)
        nn.init.xavier_uniform_(self.embed.weight, 0.3)
        self.scale = nn.Linear(dims[1], 2) if norm_pix else None
        self.register_buffer("orders_KN", vit.fixed_orders(patchify.n, masked), persistent=False)

    def patches(self, x: Tensor) -> Tensor:
        """Return the patches of normalised samples, (B, *input_shape) -> (B, N, P)."""
        patches_BNP: Tensor = self.patchify(x if self.input_norm is None else self.input_norm(x))
        return patches_BNP

    def hidden(self, visible_BVD: Tensor, order_BN: Tensor) -> Tensor:
        """Compute features of all patches from tokens of the first V of an order, (B, V, D), (B, N) -> (B, N, D').

        The class token, if there is one, precedes the V tokens.
        """
        tokens_BVD = self.embed(visible_BVD)
        first_B1D, tokens_BVD = tokens_BVD[:, : self.first], tokens_BVD[:, self.first :]
        mask_BMD = self.mask_token.expand(tokens_BVD.shape[0], self.masked, -1).to(tokens_BVD)
        tokens_BND = self.positions(vit.unshuffle(torch.cat([tokens_BVD, mask_BMD], dim=1), order_BN))
        if self.first:
            tokens_BND = torch.cat([first_B1D, tokens_BND], dim=1)
        features: Tensor = self.blocks(tokens_BND)[:, self.first :]
        return features

    def forward(self, z: Tensor) -> Tensor:
        tokens_BND = z.flatten(2).transpose(1, 2)
        first_B1D, tokens_BND = tokens_BND[:, : self.first], tokens_BND[:, self.first :]
        visible_BKVD, order_BKN = vit.mask_tokens(tokens_BND, self.orders_KN, self.masked)
        if self.first:
            first_BK1D = first_B1D.repeat_interleave(len(self.orders_KN), dim=0)
            visible_BKVD = torch.cat([first_BK1D, visible_BKVD], dim=1)
        hidden_BKND = self.hidden(visible_BKVD, order_BKN)
        patches_BKNP = self.out(hidden_BKND)
        if self.scale is not None:
            mean_BKN1, deviation_BKN1 = self.scale(hidden_BKND).chunk(2, dim=2)
            patches_BKNP = mean_BKN1 + deviation_BKN1.clamp(min=0) * patches_BKNP
        x = self.patchify.inverse(vit.average_masked(patches_BKNP, self.orders_KN, self.masked))
        return x if self.input_norm is None else self.input_norm.inverse(x)


class MAE(
    PatchTransformer,
    defaults={"decoder_width": 32, "decoder_depth": 1, "likelihood": "gaussian"},
    tags=("representation",),
):
    """Learns to predict the masked patches of a sample, its larger part, with a vision transformer.

    Args:
        input_shape: (C, L), (C, H, W) or (C, D, H, W), any size of at least two patches.
        mask_ratio: share of the patches that are masked.
        norm_pix: normalise the target values of each patch by their mean and standard deviation.
        width: D, size of a token; the code has one for each patch.
        class_token: add a class token, the first of the code, whose shape then is (D, 1 + N), and order positions as in
            the authors' code, columns before rows.
        heads: attention heads of the encoder, a divisor of width; 0 for heads of about 32 dimensions.
        decoder_heads: attention heads of the decoder, a divisor of decoder_width; 0 as for heads.
        norm_eps: constant added to variances in layer normalisations.
        input_norm: none, or imagenet for samples of 3 channels in [0, 1], normalised by ImageNet's mean and standard
            deviation.
        **kwargs: see `PatchTransformer`.
    """

    decoder: LightDecoder

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        mask_ratio: float = 0.75,
        norm_pix: bool = False,
        class_token: bool = False,
        heads: int = 0,
        decoder_heads: int = 0,
        norm_eps: float = 1e-6,
        input_norm: str = "none",
        **kwargs: Unpack[PatchTransformerArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_above(0, norm_eps=norm_eps)
        if input_norm not in _INPUT_NORMS or (input_norm == "imagenet" and self.input_shape[0] != 3):
            raise AezooError(f"input_norm takes none or, for 3 channels, imagenet, got {input_norm!r}")
        for leaves, argument in ((norm_pix, "norm_pix"), (input_norm != "none", "input_norm")):
            if leaves and self.likelihood.unit_interval:
                raise AezooError(f"{argument} leaves [0, 1]: use likelihood='gaussian', laplace or logcosh with it")
        patchify = vit.Patchify(self.input_shape, self.patch_size)
        self.norm_pix = norm_pix
        self.masked = vit.count_masked(patchify.n, mask_ratio)
        width, dims = self.width, (self.width, self.decoder_width)
        norm = ChannelNorm(*IMAGENET) if input_norm == "imagenet" else None
        self.code_shape = (width, 1 + patchify.n) if class_token else (width, *patchify.grid)
        place = vit.Positions(patchify.grid, width, authors=class_token)
        before = [patchify] if norm is None else [norm, patchify]
        embed = nn.Sequential(*before, vit.embedding(patchify.size, width), place)
        blocks, decoder_blocks = (
            partial(vit.blocks, widths, self.activation, partial(vit.Block, heads=n, eps=norm_eps), norm_eps)
            for widths, n in ((self.widths, heads), (self.decoder_widths, decoder_heads))
        )
        layers = blocks()
        if class_token:
            layers = nn.Sequential(vit.ClassToken(width), *layers)
        self.encoder = nn.Sequential(embed, layers, vit.ToMap(self.code_shape[1:]))
        self.decoder = LightDecoder(patchify, self.masked, dims, decoder_blocks, norm_pix, class_token, norm)

    def terms(self, x: Tensor, hidden_BND: Tensor) -> tuple[Tensor, Tensor]:
        """Return -log p of each value of the patches, (B, N, P), and squared errors of patch scales, (B, N, 2)."""
        real_NP, x_BNP = self.decoder.patchify.real_NP, at_least_float32(self.decoder.patches(x))
        scale_BN2 = torch.zeros_like(x_BNP[..., :1])
        if self.decoder.scale is not None:
            x_BNP, moments_BN2 = self.decoder.patchify.standardise(x_BNP)
            scale_BN2 = moments_BN2 - self.decoder.scale(hidden_BND.detach())
        nll_BNP = self.nll(self.decoder.out(hidden_BND).reshape(-1, 1), x_BNP.reshape(-1, 1)).reshape(x_BNP.shape)
        return nll_BNP * real_NP, scale_BN2.square()

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        (embed, blocks, _), n = self.encoder.children(), self.decoder.patchify.n
        order_BN = vit.random_order(len(x), n, x.device)
        visible_BVD = vit.shuffle(embed(x), order_BN[:, : n - self.masked])
        nll_BNP, scale_BN2 = self.terms(x, self.decoder.hidden(blocks(visible_BVD), order_BN))
        masked_BN = vit.is_masked(order_BN, self.masked)
        nll, scale = ((term.sum(2) * masked_BN).sum(1).mean() * n / self.masked for term in (nll_BNP, scale_BN2))
        return {"loss": nll + scale, "nll": nll} | ({"scale": scale} if self.norm_pix else {})

    def score(self, x: Tensor) -> Tensor:
        """Return -log p in nats, summed over patches, each hidden from the encoder, (B, *input_shape) -> (B,)."""
        embed, blocks, _ = self.encoder.children()
        visible_BKVD, order_BKN = vit.mask_tokens(embed(x), self.decoder.orders_KN, self.masked)
        hidden_BKND = self.decoder.hidden(blocks(visible_BKVD), order_BKN)
        nll_BKNP = self.terms(x.repeat_interleave(len(self.decoder.orders_KN), dim=0), hidden_BKND)[0]
        return vit.average_masked(nll_BKNP, self.decoder.orders_KN, self.masked).sum((1, 2))
