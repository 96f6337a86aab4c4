"""MAETok, masked autoencoders as tokenizers (Chen et al. 2025), https://arxiv.org/abs/2502.03444

A deterministic autoencoder whose code is a sequence of N tokens without a grid, like that of titok but not quantised.
In training, a mask token replaces each patch in M, and a second, shallow decoder predicts the histogram of oriented
gradients (HOG) of the masked patches:

    z = f(x with mask tokens at M, l)    L = -log p(x | g(z)) + w P/|M| sum_{i in M} |h_i(z) - HOG_i(x)|^2

|M| = ceil(r P), with r uniform, by default in 0.4 to 0.6, for each sample. Codes, reconstructions and evaluation use no
mask; the second term then covers all patches. P/|M| makes it a sum over patches, whatever r. The HOG of a patch (Dalal
& Triggs 2005) has 9 unsigned directions and norm 1. Each pixel is weighted by the magnitude of its gradient, in the
channel where it is largest. This is scikit-image's version with one cell per block, for any patch size.

The paper also has decoders for features of DINOv2 and CLIP, a perceptual and an adversarial loss, rotary positions and
a last stage that trains only g, without a mask. These are not implemented. Networks are initialised as in
`nets.tokens`.

Shapes: B batch, P patches, W width within the encoder, D channels of a token, N tokens, K directions.
"""

import math
from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.bases.patch_transformer import PatchTransformer, PatchTransformerArgs
from aezoo.errors import AezooError
from aezoo.nets import vit
from aezoo.nets.blocks import tokens
from aezoo.training.limits import check_at_least

_DIRECTIONS = 9


@torch.no_grad()
def hog(x: Tensor, patchify: vit.Patchify) -> Tensor:
    """Compute histograms of oriented gradients of image patches, (B, C, H, W) -> (B, K, rows, columns)."""
    down, right = torch.zeros_like(x), torch.zeros_like(x)
    down[..., 1:-1, :] = x[..., 2:, :] - x[..., :-2, :]
    right[..., 1:-1] = x[..., 2:] - x[..., :-2]
    size, channel = torch.hypot(down, right).max(1, keepdim=True)
    turn = torch.atan2(down.gather(1, channel), right.gather(1, channel)) / math.pi % 1
    direction = (turn * _DIRECTIONS).long().clamp(max=_DIRECTIONS - 1)
    of_direction = direction == torch.arange(_DIRECTIONS, device=x.device)[:, None, None]
    found_BPK = patchify(of_direction * size).unflatten(2, (_DIRECTIONS, -1)).mean(3)
    found_BPK = found_BPK / (found_BPK.square().sum(2, keepdim=True) + 1e-10).sqrt()
    return found_BPK.transpose(1, 2).unflatten(2, patchify.grid)


class MAETok(PatchTransformer, defaults={"depth": 2, "likelihood": "gaussian"}, tags=("tokenizer", "latent diffusion")):
    """Learns a sequence of tokens from partly masked patches.

    Args:
        input_shape: (C, H, W), of any size.
        n_tokens: N, number of tokens per sample.
        latent_dim: D, channels of a token.
        least_masked: smallest share of the patches that is masked in training.
        most_masked: largest share of the patches that is masked in training, below 1.
        aux_weight: w, weight of the HOG decoder's loss; 0 omits the decoder.
        decoder_width: size of a token in the decoders.
        decoder_depth: number of blocks of the pixel decoder.
        aux_depth: number of blocks of the HOG decoder.
        **kwargs: see `PatchTransformer`.
    """

    encoder: tokens.TokenEncoder

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        n_tokens: int = 32,
        latent_dim: int = 16,
        least_masked: float = 0.4,
        most_masked: float = 0.6,
        aux_weight: float = 1.0,
        aux_depth: int = 1,
        **kwargs: Unpack[PatchTransformerArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        if len(self.input_shape) != 3:
            raise AezooError(
                f"maetok takes images (C, H, W), since its loss uses image gradients, got {self.input_shape}: use mae"
            )
        check_at_least(0, aux_weight=aux_weight)
        check_at_least(1, n_tokens=n_tokens, latent_dim=latent_dim, aux_depth=aux_depth)
        if not 0 <= least_masked <= most_masked < 1:
            raise AezooError(
                f"maetok needs 0 <= least_masked <= most_masked < 1, got least_masked={least_masked} and "
                f"most_masked={most_masked}"
            )
        self.least_masked = least_masked
        self.most_masked = most_masked
        self.aux_weight = aux_weight
        self.patchify = vit.Patchify(self.input_shape, self.patch_size)
        self.code_shape = (latent_dim, n_tokens)
        self.encoder = tokens.TokenEncoder(self.patchify, self.code_shape, self.widths, self.activation)
        self.mask_W = nn.Parameter(0.02 * torch.randn(self.width), requires_grad=most_masked > 0)
        self.decoder = tokens.TokenDecoder(self.patchify, self.code_shape, self.decoder_widths, self.activation)
        cells, widths = vit.Patchify((_DIRECTIONS, *self.patchify.grid), 1), (self.decoder_width,) * aux_depth
        self.aux = tokens.TokenDecoder(cells, self.code_shape, widths, self.activation) if aux_weight else None

    def draw_mask(self, x: Tensor) -> Tensor:
        """Return which patches are masked, at random in training and none otherwise, (B, *input_shape) -> (B, P)."""
        n, place_BP = self.patchify.n, vit.random_order(len(x), self.patchify.n, x.device)
        share_B1 = torch.empty(len(x), 1, device=x.device).uniform_(self.least_masked, self.most_masked)
        masked_BP: Tensor = place_BP < (share_B1 * n - 1e-4).ceil().clamp(max=n - 1)
        return masked_BP & self.training

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        masked_BP = self.draw_mask(x)
        patches_BPW = torch.where(masked_BP[..., None], self.mask_W, self.encoder.embed(x))
        z = self.encoder.read(patches_BPW + self.encoder.position_PW)
        nll = self.nll(self.decoder(z), x).mean()
        if self.aux is None:
            return {"loss": nll, "nll": nll}
        error_BP = (at_least_float32(self.aux(z)) - hog(at_least_float32(x), self.patchify)).square().sum(1).flatten(1)
        counts_BP = masked_BP | ~masked_BP.any(1, keepdim=True)
        features = ((error_BP * counts_BP).sum(1) / counts_BP.sum(1)).mean() * self.patchify.n
        return {"loss": nll + self.aux_weight * features, "nll": nll, "hog": features}
