"""VQ-VAE-2, two levels of codes (Razavi et al. 2019), https://arxiv.org/abs/1906.00446

A top grid represents global structure, and a finer bottom grid the rest. In nats per sample:

    h = f(x)                              features on the bottom grid
    t = VQ_top(f_top(h))                  on the grid after f_top's strides
    b = VQ_bottom(W [h, g_top(t)])        on the bottom grid, given the top
    L = -log p(x | g([up(t), b])) + beta (||z_t - sg(t)||^2 + ||z_b - sg(b)||^2)

summed over positions. z_t and z_b are the inputs of the quantisers, g_top mirrors f_top, and up gives each bottom
position the nearest code of t. Codes are moving averages; update gradient adds ||sg(z) - e||^2 of both. t does not
depend on b, so a prior is p(t) p(b | t). A sample's code is the sequence of both grids, top first, each row by row: (C,
T).

Shapes: B batch, C channels of a code, F channels of h, K codes of each codebook, T codes of a sample.
"""

import math
from typing import Unpack, cast

import torch
from torch import Tensor, nn

from aezoo import nets
from aezoo.bases.network import NetworkAutoencoder
from aezoo.bases.vector_quantised import VQAutoencoder, VQNetworkArgs
from aezoo.nets.conv import CONVS, UpsampleConcat
from aezoo.quantisers.base import Quantised


class VQVAE2(
    VQAutoencoder, NetworkAutoencoder, hidden_dims={"resnet": (32, 64)}, defaults={"net": "resnet"}, tags=("tokenizer",)
):
    """Learns two grids of codes with one codebook each; the finer grid is conditioned on the coarser one.

    Args:
        input_shape: shape of one sample: (C, L), (C, H, W) or (C, D, H, W).
        data_init: initialise the codes by k-means on the first training batch, the bottom ones given the top.
        net: resnet, conv, convnext, conv_keras, unet, gdn, dc, ldm, vit or mixer.
        hidden_dims: channels of the encoder's stages down to the bottom grid; the decoder mirrors them. None chooses
            them by net and sample size; `aezoo info vq_vae_2 --shape C H W` shows the choice.
        top_dims: channels of the stages from there to the top grid.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus or identity, between layers.
        **kwargs: see `VQAutoencoder` and `NetworkAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        top_dims: tuple[int, ...] = (64,),
        **kwargs: Unpack[VQNetworkArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        latent_dim = self.latent_dim
        width = (self.hidden_dims or (latent_dim,))[-1]
        h = (width, *grid) = nets.map_shape(self.net, self.input_shape, self.hidden_dims, width)
        top = nets.map_shape(self.net, h, top_dims, latent_dim)
        grids = (top[1:], h[1:])
        self.places = [math.prod(sides) for sides in grids]
        self.code_shape = (latent_dim, sum(self.places))
        self.encoder = self.build_encoder(h)
        self.top_encoder = nets.encoder(self.net, h, top, top_dims, self.activation)
        self.top_decoder = nets.decoder(self.net, top, h, top_dims[::-1], self.activation)
        self.to_bottom = CONVS[len(grid)](2 * width, latent_dim, 1)
        decoder = self.build_decoder((2 * latent_dim, *grid))
        self.decoder = nn.Sequential(UpsampleConcat(grids), decoder)
        self.top, self.bottom = self.build_vq(), self.build_vq()

    def bottom_input(self, h: Tensor, top: Quantised) -> Tensor:
        """Return the input of the bottom quantiser, (B, F, *grid), codes (B, C, *top grid) -> (B, C, *grid)."""
        return cast(Tensor, self.to_bottom(torch.cat([h, self.top_decoder(top.z_q)], 1)))

    def quantise(self, x: Tensor) -> Quantised:
        h = self.encoder(x)
        top = self.top.quantise(self.top_encoder(h))
        bottom = self.bottom.quantise(self.bottom_input(h, top))
        z_q = torch.cat([top.z_q.flatten(2), bottom.z_q.flatten(2)], 2)
        indices = torch.cat([top.indices.flatten(2), bottom.indices.flatten(2)], 2)
        return Quantised(z_q, indices, {name: top.terms[name] + bottom.terms[name] for name in top.terms})

    @property
    def index_shape(self) -> tuple[int, ...]:
        return (1, self.code_shape[1])

    @property
    def index_sizes(self) -> tuple[int, ...]:
        return self.top.codebook_sizes

    def codes(self, indices: Tensor) -> Tensor:
        top, bottom = indices.split(self.places, 2)
        return torch.cat([self.top.codes(top), self.bottom.codes(bottom)], 2)

    def codebooks(self, indices: Tensor) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
        top, bottom = indices.split(self.places, 2)
        return {"top": (top, self.top.codebook_sizes), "bottom": (bottom, self.bottom.codebook_sizes)}

    def init_from_data(self, x: Tensor) -> None:
        h = self.encoder(x)
        self.top.init_from_data(z := self.top_encoder(h))
        top = self.top.eval().quantise(z)  # in training mode, these rows would update it twice
        self.top.train(self.training)
        self.bottom.init_from_data(self.bottom_input(h, top))

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_q, _, terms = self.quantise(x)
        nll = self.nll(self.decoder(z_q), x).mean()
        return {"loss": nll + self.beta * terms["commitment"] + terms.get("codebook", 0), "nll": nll, **terms}
