"""Masked convolutional autoencoder, context encoder (Pathak et al. 2016), https://arxiv.org/abs/1604.07379

Predicts patches that are cut out of a sample, by convolutional networks with a code as bottleneck:

    L = N/|M| sum_{v in M} -log p(x_v | g(f(x~))_v)     x~ = t in the patches M, x elsewhere     |M| = floor(ratio N)

L is in nats per sample: N/|M| makes it the mean over masks of a sum over all values v, whatever the ratio. t is a
learned number for each channel, or 0. Patches are drawn at random, as in SparK (Tian et al. 2023,
https://arxiv.org/abs/2301.03580, ratio 0.6). Unlike in SparK, the convolutions are dense and their input has the value
t in the cut-out patches, and targets are not normalised in each patch. This is the paper's reconstruction loss; its
adversarial loss is not implemented.

Code, reconstruction and score are those of the whole sample: the decoder has no information on which patches were cut
out, so every position of its output is trained.

Shapes: B batch, N patches, P values in a patch.
"""

from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo import nets
from aezoo.bases.network import NetworkArgs, NetworkAutoencoder
from aezoo.nets import vit
from aezoo.training.limits import check_at_least


class MaskedConvAE(
    NetworkAutoencoder, hidden_dims={"conv": (32, 64)}, defaults={"net": "conv"}, tags=("representation",)
):
    """Learns to fill in missing patches with a convolutional autoencoder.

    Args:
        input_shape: (C, L), (C, H, W) or (C, D, H, W), any size of at least two patches.
        mask_ratio: share of the patches that are masked.
        patch_size: side of a patch; 0 chooses it so that a sample has at most 64, with a side of at most 16.
        learned_token: replace masked values by a learned number for each channel, instead of 0.
        net: conv, resnet, convnext, conv_keras, vit, mixer or mlp.
        latent_dim: size of the code, or its channels if `latent_map` is on.
        latent_map: use a feature map, on the grid after the last stage, as the code instead of a vector.
        **kwargs: see `NetworkAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        mask_ratio: float = 0.6,
        patch_size: int = 0,
        learned_token: bool = True,
        latent_dim: int = 64,
        latent_map: bool = False,
        **kwargs: Unpack[NetworkArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        self.patchify = vit.Patchify(self.input_shape, patch_size)
        self.masked = vit.count_masked(self.patchify.n, mask_ratio)
        channels, *grid = self.input_shape
        self.token = nn.Parameter(torch.zeros(channels, *(1 for _ in grid)), requires_grad=learned_token)
        self.code_shape = (latent_dim,)
        if latent_map:
            self.code_shape = nets.map_shape(self.net, self.input_shape, self.hidden_dims, latent_dim)
        self.encoder = self.build_encoder(self.code_shape)
        self.decoder = self.build_decoder(self.code_shape)

    def mask(self, x: Tensor) -> Tensor:
        """Return which values of each sample are masked, in patches drawn at random, (B, *input_shape), boolean."""
        order_BN = vit.random_order(len(x), self.patchify.n, x.device)
        masked_BN = vit.is_masked(order_BN, self.masked)
        return self.patchify.inverse(masked_BN[..., None].expand(-1, -1, self.patchify.size))

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        masked = self.mask(x)
        params = self.decoder(self.encoder(torch.where(masked, self.token.to(x.dtype), x)))
        of_value = self.nll(params.reshape(-1, 1), x.reshape(-1, 1)).reshape(x.shape)
        nll = (of_value * masked).flatten(1).sum(1).mean() * (self.patchify.n / self.masked)
        return {"loss": nll, "nll": nll}
