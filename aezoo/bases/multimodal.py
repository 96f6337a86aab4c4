"""Models of samples with several parts (modalities): an encoder and a decoder per part, and one Gaussian code.

If a model combines its posterior from those of the parts, parts of a sample may be missing: all values of a missing
part are NaN. The model then computes the same result as a model of the other parts, and the sample does not train the
networks of the missing part.

Shapes: B batch, D code, M parts, S subsets of them.
"""

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from aezoo import nets
from aezoo.autoencoder import Autoencoder
from aezoo.bases.network import LatentArgs, NetworkArgs
from aezoo.errors import AezooError
from aezoo.nets.blocks.levels import gaussian


def partition(parts: tuple[int, ...], input_shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Return the dimension along which samples are split, the first longer than 1, and the size of each part along it.

    Args:
        parts: their sizes; () for two halves, where the first may be larger, or for one part if no dimension can be
            split.
        input_shape: shape of one sample.

    Raises:
        AezooError: a size is below 1, or the sum of the sizes differs from the dimension.
    """
    dim = next((d for d, n in enumerate(input_shape) if n > 1), 0)
    n = input_shape[dim]
    sizes = tuple(parts) or tuple(size for size in (n - n // 2, n // 2) if size)
    if min(sizes) < 1 or sum(sizes) != n:
        raise AezooError(
            f"parts must be sizes of at least 1 that add up to {n}, dimension {dim} of input_shape, got {sizes}"
        )
    return dim, sizes


class Decoders(nn.ModuleList):
    """The decoders of the parts, which together decode a whole sample.

    Args:
        decoders: a decoder for each part.
        dim: the dimension of a sample along which the parts are concatenated.
    """

    def __init__(self, decoders: Sequence[nn.Module], dim: int) -> None:
        super().__init__(decoders)
        self.dim = dim

    def forward(self, z: Tensor) -> Tensor:
        """(B, D) -> (B, *input_shape)."""
        return torch.cat([decoder(z) for decoder in self], self.dim + 1)


class PartDecoders(Decoders):
    """Decoders of parts with separate codes: (B, D + M P) -> (B, *input_shape).

    Args:
        decoders: a decoder for each part, with P input values.
        dim: the dimension of a sample along which the parts are concatenated.
        shared: D, number of leading values, which no decoder uses.
    """

    def __init__(self, decoders: Sequence[nn.Module], dim: int, shared: int) -> None:
        super().__init__(decoders, dim)
        self.shared = shared

    def forward(self, z: Tensor) -> Tensor:
        own = z[:, self.shared :].chunk(len(self), 1)
        return torch.cat([decoder(z_i) for decoder, z_i in zip(self, own, strict=True)], self.dim + 1)


class PrivateDecoders(PartDecoders):
    """Decoders whose inputs are the shared values and those of their part, D + P together."""

    def forward(self, z: Tensor) -> Tensor:
        u, own = z[:, : self.shared], z[:, self.shared :].chunk(len(self), 1)
        pairs = (decoder(torch.cat([u, w], 1)) for decoder, w in zip(self, own, strict=True))
        return torch.cat([*pairs], self.dim + 1)


class PartsArgs(TypedDict, total=False):
    """Arguments of `Multimodal`."""

    parts: tuple[int, ...]


class MultimodalVAEArgs(LatentArgs, PartsArgs, total=False):
    """Arguments of `Multimodal` and `VAE`."""

    beta: float


class MultimodalBetaArgs(NetworkArgs, PartsArgs, total=False):
    """Arguments of `Multimodal` and networks, without the size of the code."""

    beta: float


class Multimodal(Autoencoder):
    """A model with a Gaussian code for samples that have parts; its constructor calls `build_parts`.

    Args:
        parts: sizes of the parts along the first dimension of input_shape that is longer than 1, channels of images or
            entries of vectors, rows of images with one channel; halves by default.
        net: mlp, conv, resnet, convnext, conv_keras, unet, gdn, dc, ldm, vit, mixer, lstm or
            transformer, for each part.

    Attributes:
        sizes: size of each part along the dimension that is split.
        encoder: the encoders of the parts, (B, *part) -> (B, 2 D).
        decoder: their decoders, which together decode a whole sample.
    """

    sizes: tuple[int, ...]
    encoder: nn.ModuleList
    decoder: Decoders

    def __init__(self, input_shape: tuple[int, ...], *, parts: tuple[int, ...] = (), **kwargs: Any) -> None:
        super().__init__(input_shape, **kwargs)
        self.parts = tuple(parts)

    def build_parts(
        self,
        parts: tuple[int, ...],
        net: str,
        hidden_dims: tuple[int, ...],
        activation: str,
        n_decoded: int | None = None,
    ) -> None:
        """Build the networks, of the same kind and sizes for all parts.

        Args:
            parts: as in `partition`.
            net: kind of the networks.
            hidden_dims: widths or channels of the encoders' layers; the decoders mirror them.
            activation: activation between layers.
            n_decoded: number of input values of the decoders, D by default.
        """
        dim, self.sizes = partition(parts, self.input_shape)
        shapes = [(*self.input_shape[:dim], size, *self.input_shape[dim + 1 :]) for size in self.sizes]
        code = (2 * self.code_shape[0],)
        self.encoder = nn.ModuleList(nets.encoder(net, shape, code, hidden_dims, activation) for shape in shapes)
        decoded, mirrored = (n_decoded or self.code_shape[0],), hidden_dims[::-1]
        self.decoder = Decoders([nets.decoder(net, decoded, shape, mirrored, activation) for shape in shapes], dim)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Split samples into parts, (B, *input_shape) -> M of (B, *part)."""
        return x.split(self.sizes, self.decoder.dim + 1)

    def encode_parts(self, x: Tensor, parts: Sequence[int] | None = None) -> Tensor:
        """Return the outputs of the parts' encoders: (B, *input_shape) -> (B, M, 2 D), where M parts are used.

        Args:
            x: whole samples.
            parts: parts to use, in this order; all by default. Other parts are ignored.

        Raises:
            AezooError: there is no part, or a part does not exist or is given twice.
        """
        m = len(self.sizes)
        parts = range(m) if parts is None else parts
        if not parts or len({*parts}) < len(parts) or not {*parts} <= {*range(m)}:
            raise AezooError(f"parts must be some of 0 to {m - 1}, each once, got {tuple(parts)}")
        x_M = self.split(x)
        return torch.stack([self.encoder[i](x_M[i]) for i in parts], 1)

    def experts(self, x: Tensor, parts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of each part's q_i(z|x_i): (B, *input_shape) -> (B, M, D), (B, M, D).

        Args:
            x: whole samples.
            parts: parts to use, as in `encode_parts`.

        Raises:
            AezooError: there is no part, or a part does not exist or is given twice.
        """
        return gaussian(self.encode_parts(x, parts))

    def infer(self, x: Tensor, parts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of q(z | parts), by default all parts: (B, *input_shape) -> (B, D), (B, D)."""
        raise NotImplementedError(f"{type(self).__name__} must write infer")

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of q(z|x), from all parts: (B, *input_shape) -> (B, D), (B, D)."""
        return self.infer(x)

    def reconstruct_from(self, x: Tensor, parts: Sequence[int] = (0,)) -> Tensor:
        """Reconstruct whole samples from some of their parts: (B, *input_shape) -> (B, *input_shape).

        Args:
            x: whole samples.
            parts: parts to use, numbered from 0; the code is the mean of q(z | these parts).

        Raises:
            AezooError: there is no part, or a part does not exist or is given twice.
        """
        return self.decode(self.infer(x, parts)[0].to(x.dtype))

    def nll_of_part(self, i: int, z_BSD: Tensor, x: Tensor) -> Tensor:
        """Return -log p(x_i|z) for several codes per sample: (B, S, D), (B, *part) -> (B, S)."""
        b, s, _ = z_BSD.shape
        x_BS = x[:, None].expand(b, s, *x.shape[1:]).flatten(0, 1)
        return self.nll(self.decoder[i](z_BSD.flatten(0, 1).to(x.dtype)), x_BS).unflatten(0, (b, s))


def is_missing(x: Tensor) -> Tensor:
    """Return for which samples a part is missing, i.e. all its values are NaN: (B, *part) -> (B,) bool."""
    return x.isnan().flatten(1).all(1)


class MissingModalities(Multimodal, takes_missing=True):
    """A model that allows missing parts: their networks get zeros as input, and their expert is N(0, I)."""

    def present_mask(self, x: Tensor, parts: Sequence[int] | None = None) -> Tensor:
        """Return which parts (of `parts`, by default all) each sample has: (B, *input_shape) -> (B, M) bool."""
        x_M = self.split(x)
        return ~torch.stack([is_missing(x_M[i]) for i in (range(len(x_M)) if parts is None else parts)], 1)

    def fill_missing(self, x: Tensor) -> Tensor:
        """Replace missing parts of samples by zeros: (B, *input_shape) -> (B, *input_shape)."""
        return torch.cat([_fill_missing(x_i) for x_i in self.split(x)], self.decoder.dim + 1)

    def invalid_mask(self, x: Tensor) -> Tensor:
        return super().invalid_mask(self.fill_missing(x)) | ~self.present_mask(x).any(1)

    def experts(self, x: Tensor, parts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        mu_BMD, log_var_BMD = super().experts(self.fill_missing(x), parts)
        missing_BM1 = ~self.present_mask(x, parts)[..., None]
        return mu_BMD.masked_fill(missing_BM1, 0), log_var_BMD.masked_fill(missing_BM1, 0)

    def nll(self, params: Tensor, x: Tensor) -> Tensor:
        """Return -log p(x | params) in nats over the parts that a sample has, for whole samples or one part: (B,)."""
        is_whole_sample = x.shape[self.decoder.dim + 1] == sum(self.sizes)
        nll_B = params.new_zeros(())
        for params_i, x_i in zip(self.split(params), self.split(x), strict=True) if is_whole_sample else [(params, x)]:
            nll_B = nll_B + super().nll(params_i, _fill_missing(x_i)).masked_fill(is_missing(x_i), 0)
        return nll_B


def _fill_missing(x: Tensor) -> Tensor:
    return x.masked_fill(is_missing(x).reshape(-1, *[1] * (x.ndim - 1)), 0)
