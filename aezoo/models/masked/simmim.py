"""SimMIM, a simple framework for masked image modelling (Xie et al. 2021), https://arxiv.org/abs/2111.09886

Mask tokens replace the masked patches M and pass through the encoder; a linear layer predicts the patches from them:

    L = N/|M| sum_{i in M} -log p(x_i | W f(x with mask tokens at M)_i + b)     |M| = floor(ratio N), for each sample

L is in nats per sample: N/|M| makes it the mean over masks of a sum over all patches, whatever the ratio. The Laplace
density of scale 1 gives the paper's |x - x_hat|, up to a constant.

The code covers the whole sample, without mask tokens, with a token for each patch. W is trained only on masked patches
and does not fit the tokens of visible ones, so decode has a separate linear layer. This layer learns to predict visible
patches from their tokens in training (`readout`, -log p), without a gradient for other layers. score hides the patches
from the encoder, one part at a time.

The encoder is a transformer or an MLP-Mixer, whose layers over positions need all tokens, including mask tokens. A
model that mixes positions before they are masked, as in https://github.com/tomouellette/autoencodersplz, reveals the
targets.

Shapes: B batch, N patches, P values in a patch, D width of a token, K hidden parts.
"""

from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.bases.patch_transformer import PatchEncoder, PatchEncoderArgs
from aezoo.errors import AezooError
from aezoo.nets import mixer, vit


class SimMIM(PatchEncoder, defaults={"likelihood": "laplace"}, tags=("representation",)):
    """Learns to predict masked patches with a vision transformer or MLP-Mixer, without a decoder.

    Args:
        input_shape: (C, L), (C, H, W) or (C, D, H, W), any size of at least two patches.
        mask_ratio: share of the patches that are masked.
        net: kind of the encoder's blocks: vit or mixer.
        width: D, size of a token; the code has one for each patch.
        **kwargs: see `PatchEncoder`.
    """

    orders_KN: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        mask_ratio: float = 0.6,
        net: str = "vit",
        **kwargs: Unpack[PatchEncoderArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        if net not in ("vit", "mixer"):
            raise AezooError(f"net must be vit or mixer, got {net!r}: masked_conv_ae takes conv, resnet, ...")
        self.patchify = vit.Patchify(self.input_shape, self.patch_size)
        self.masked = vit.count_masked(self.patchify.n, mask_ratio)
        width = self.width
        self.code_shape = (width, *self.patchify.grid)
        embed = nn.Sequential(self.patchify, vit.embedding(self.patchify.size, width))
        blocks = nn.Sequential(vit.Positions(self.patchify.grid, width), vit.blocks(self.widths, self.activation))
        if net == "mixer":
            blocks = mixer.blocks(self.patchify.n, self.widths, self.activation)
        self.encoder = nn.Sequential(embed, blocks, vit.ToMap(self.patchify.grid))
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.head = nn.Linear(width, self.patchify.size)
        readout = nn.Linear(width, self.patchify.size)
        self.decoder = nn.Sequential(vit.ToTokens(), readout, vit.Unpatchify(self.patchify))
        self.register_buffer("orders_KN", vit.fixed_orders(self.patchify.n, self.masked), persistent=False)

    def tokens(self, x: Tensor, masked_BN: Tensor) -> Tensor:
        """Return the encoder's output tokens for samples with mask tokens, (B, *input_shape), (B, N) -> (B, N, D)."""
        embed, blocks, _ = self.encoder.children()
        tokens_BND: Tensor = blocks(torch.where(masked_BN[..., None], self.mask_token, embed(x)))
        return tokens_BND

    def nll_of(self, params_BNP: Tensor, x: Tensor) -> Tensor:
        """Return -log p of each patch in nats, (B, N, P), (B, *input_shape) -> (B, N)."""
        x_BNP = at_least_float32(self.patchify(x))
        nll_BNP = self.nll(params_BNP.reshape(-1, 1), x_BNP.reshape(-1, 1)).reshape(x_BNP.shape)
        return (nll_BNP * self.patchify.real_NP).sum(2)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        n = self.patchify.n
        masked_BN = vit.is_masked(vit.random_order(len(x), n, x.device), self.masked)
        tokens_BND = self.tokens(x, masked_BN)
        nll = (self.nll_of(self.head(tokens_BND), x) * masked_BN).sum(1).mean() * (n / self.masked)
        _, linear, _ = self.decoder.children()
        readout_BN = self.nll_of(linear(tokens_BND.detach()), x) * ~masked_BN
        readout = readout_BN.sum(1).mean() * (n / (n - self.masked))
        return {"loss": nll + readout, "nll": nll, "readout": readout}

    def score(self, x: Tensor) -> Tensor:
        """Return -log p in nats, summed over patches, each while it is hidden, (B, *input_shape) -> (B,)."""
        masked_KN = vit.is_masked(self.orders_KN, self.masked)
        x_BK = x.repeat_interleave(len(masked_KN), dim=0)
        nll_BKN = self.nll_of(self.head(self.tokens(x_BK, masked_KN.repeat(len(x), 1))), x_BK)
        return vit.average_masked(nll_BKN[..., None], self.orders_KN, self.masked).sum((1, 2))
