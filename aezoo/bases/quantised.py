"""Autoencoders with discrete codes: a quantiser between encoder and decoder.

Shapes: B batch, D channels before quantisation, C channels of a code, Q indices per position.
"""

from typing import Any, Unpack

from torch import Tensor, nn

from aezoo import nets
from aezoo.autoencoder import Autoencoder
from aezoo.bases.network import NetworkArgs, NetworkAutoencoder
from aezoo.errors import AezooError
from aezoo.quantisers.base import Quantised, Quantiser, quantisers_in_eval_mode


class DiscreteAutoencoder(Autoencoder, discrete_code=True):
    """An autoencoder with a `quantiser`; a subclass sets it, calls `build_nets` and defines its loss.

    The code of a sample is (C, *positions), and is equivalent to indices (Q, *positions).

    Attributes:
        quantiser: maps the encoder's output to codes.
    """

    quantiser: Quantiser

    def build_nets(
        self, net: str, dims: tuple[int, int], hidden_dims: tuple[int, ...], activation: str, places: int
    ) -> None:
        """Set encoder, decoder and code_shape; for constructors.

        Args:
            net: a network's name.
            dims: D and C.
            hidden_dims: hidden_dims of the encoder; the decoder mirrors them.
            activation: an activation's name.
            places: number of positions, for a network without a grid (mlp, lstm, transformer).

        Raises:
            AezooError: the network does not support the shapes.
        """
        if min(dims) < 1 or places < 1:
            raise AezooError(f"latent_dim and places must be at least 1, got {min(dims)} and {places}")
        mirrored = hidden_dims[::-1]
        if net in nets.WITHOUT_GRID:  # the vector is split into positions
            (d, c) = dims
            self.code_shape = (dims[1], places)
            encoder = nets.encoder(net, self.input_shape, (d * places,), hidden_dims, activation)
            decoder = nets.decoder(net, (c * places,), self.input_shape, mirrored, activation)
            self.encoder = nn.Sequential(encoder, nn.Unflatten(1, (d, places)))
            self.decoder = nn.Sequential(nn.Flatten(), decoder)
        else:
            quantised_shape, self.code_shape = (nets.map_shape(net, self.input_shape, hidden_dims, dim) for dim in dims)
            self.encoder = nets.encoder(net, self.input_shape, quantised_shape, hidden_dims, activation)
            self.decoder = nets.decoder(net, self.code_shape, self.input_shape, mirrored, activation)

    # ---- indices -----------------------------------------------------------------------------------------------------

    @property
    def index_shape(self) -> tuple[int, ...]:
        """Return the shape of a sample's indices, (Q, *positions)."""
        return (len(self.quantiser.codebook_sizes), *self.code_shape[1:])

    @property
    def index_sizes(self) -> tuple[int, ...]:
        """Return K for each of the Q indices of a position; indices are from 0 to K - 1."""
        return self.quantiser.codebook_sizes

    def quantise(self, x: Tensor) -> Quantised:
        """Codes, indices and terms of samples: (B, *input_shape) -> (B, *code_shape), (B, *index_shape), {name: ()}."""
        found: Quantised = self.quantiser(self.encoder(x))
        return found

    def encode(self, x: Tensor) -> Tensor:
        with quantisers_in_eval_mode(self):
            return self.quantise(x).z_q

    def encode_indices(self, x: Tensor) -> Tensor:
        """Return the indices of samples, (B, *input_shape) -> (B, *index_shape), long."""
        with quantisers_in_eval_mode(self):
            return self.quantise(x).indices

    def codes(self, indices: Tensor) -> Tensor:
        """Return the codes of indices, (B, *index_shape) -> (B, *code_shape)."""
        return self.quantiser.codes(indices)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Return reconstructions from indices, (B, *index_shape) -> (B, *input_shape)."""
        return self.decode(self.codes(indices))

    def codebooks(self, indices: Tensor) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
        """Return indices by codebook: for each name, indices (B, Q, *positions) and K of each of the Q."""
        return {"": (indices, self.index_sizes)}

    def init_from_data(self, x: Tensor) -> None:
        self.quantiser.init_from_data(self.encoder(x))

    def _reconstruct(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        indices = self.encode_indices(x)
        return self.decode_indices(indices), {"codebooks": self.codebooks(indices)}


class CodeMapArgs(NetworkArgs, total=False):
    """Arguments of `CodeMapAutoencoder`."""

    places: int


class CodeMapAutoencoder(
    DiscreteAutoencoder,
    NetworkAutoencoder,
    hidden_dims={"resnet": (32, 64), "mlp": (32, 64)},
    defaults={"net": "resnet"},
):
    """A discrete autoencoder with networks of one kind; its constructor sets the quantiser and calls `build_code_nets`.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        places: number of codes per sample with net mlp, lstm and transformer; other nets have a code at each
            position of the grid.
        net: resnet, conv, convnext, conv_keras, unet, gdn, dc, ldm, vit, mixer, mlp, lstm or transformer.
        **kwargs: see `NetworkAutoencoder`.
    """

    def __init__(self, input_shape: tuple[int, ...], *, places: int = 16, **kwargs: Unpack[NetworkArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        self.places = places

    def build_code_nets(self, encoded_dim: int, code_dim: int) -> None:
        """Set encoder, decoder and code_shape for D channels before quantisation and C channels of a code."""
        self.build_nets(self.net, (encoded_dim, code_dim), self.hidden_dims, self.activation, self.places)
