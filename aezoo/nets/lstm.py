"""Long short-term memory (Hochreiter & Schmidhuber 1997, https://doi.org/10.1162/neco.1997.9.8.1735).

A sample is a sequence of steps along its first axis after the channels: (C, L) is L steps of C values, (C, H, W) its H
rows, (C, D, H, W) its D slices, and (D,) is D steps of one value. The encoder computes the code from the state after
the last step. The decoder receives the code at each step, as in Cho et al. 2014 (https://arxiv.org/abs/1406.1078), but
not its previous output, as in the unconditional decoder of Srivastava et al. 2015 (https://arxiv.org/abs/1502.04681).

No weight depends on the number of steps, and no step of the decoder depends on a later step. If `forward` is given
lengths, steps beyond a sample's length do not affect the code.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.nets.build import activation
from aezoo.training.precision import at_least_float32

# oneDNN has no bfloat16 LSTM for other processors, and torch raises an error without a fallback
_HAS_BF16_LSTM = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


class Steps(nn.Module):
    """(B, *shape) -> (B, L, F)."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., None] if x.ndim == 2 else x.movedim(2, 1).flatten(2)


class FromSteps(nn.Module):
    """(B, L, F) -> (B, *shape), the inverse of `Steps`."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, steps_BLF: Tensor) -> Tensor:
        if len(self.shape) == 1:
            return steps_BLF[..., 0]
        return steps_BLF.unflatten(2, (self.shape[0], *self.shape[2:])).movedim(1, 2)


def steps_of(input_shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the number of steps of a sample and the number of values per step."""
    steps = input_shape[0] if len(input_shape) == 1 else input_shape[1]
    return steps, math.prod(input_shape) // steps


def default_hidden_dims(input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """See `nets.default_hidden_dims`."""
    return (64,)


def check_shapes(net: str, code_shape: tuple[int, ...], hidden_dims: tuple[int, ...]) -> None:
    """Check the shapes of a network for sequences.

    Raises:
        AezooError: the code is not a vector, or there is no layer.
    """
    if len(code_shape) != 1:
        raise AezooError(f"the code of net={net!r} is a vector, not {tuple(code_shape)}: leave latent_map off")
    if not hidden_dims:
        raise AezooError(f"net={net!r} needs at least one layer: give hidden_dims at least one width")


def map_shape(input_shape: tuple[int, ...], hidden_dims: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """Raise an error, because a network for sequences has no grid."""
    raise AezooError("lstm and transformer have no feature map: use net='conv' or net='resnet', or latent_map off")


def sinusoids(n_steps: int, width: int) -> Tensor:
    """Return sin(t / 10000^(2 i / width)) and the cosine of the same angle, interleaved, (n_steps, width).

    Vaswani et al. 2017, section 3.5, https://arxiv.org/abs/1706.03762.
    """
    i = torch.arange(0, width, 2, dtype=torch.float64)
    angle_LI = torch.arange(n_steps, dtype=torch.float64)[:, None] / 10000 ** (i / width)
    return torch.stack([angle_LI.sin(), angle_LI.cos()], 2).flatten(1)[:, :width].float()


class LSTM(nn.Module):
    """One layer, (B, L, F) -> (B, L, H): the output of torch.nn.LSTM, plus its input if F = H.

    The sum is that of Wu et al. 2016, section 3.1, https://arxiv.org/abs/1609.08144; without it, the decoder hardly
    improves in a few hundred steps. torch.nn.LSTM also keeps plain references to its weights, which cause errors in
    copies and exports. The weights are initialised as in Keras: input weights uniform (Glorot & Bengio 2010), recurrent
    weights orthogonal, and the bias of the forget gate 1 (Jozefowicz et al. 2015,
    https://proceedings.mlr.press/v37/jozefowicz15.html).
    """

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight_ih = nn.Parameter(torch.empty(4 * width, before))
        self.weight_hh = nn.Parameter(torch.empty(4 * width, width))
        self.bias = nn.Parameter(torch.zeros(4 * width))
        nn.init.xavier_uniform_(self.weight_ih)
        with torch.no_grad():
            for gate in self.weight_hh.chunk(4):
                nn.init.orthogonal_(gate)
            self.bias[width : 2 * width].fill_(1)

    def forward(self, x_BLF: Tensor) -> Tensor:
        weights = [self.weight_ih, self.weight_hh, self.bias, torch.zeros_like(self.bias)]
        if x_BLF.device.type == "cpu" and not _HAS_BF16_LSTM:
            with torch.autocast("cpu", enabled=False):
                out_BLH = self._outputs(at_least_float32(x_BLF), [at_least_float32(w) for w in weights]).to(x_BLF.dtype)
        else:
            out_BLH = self._outputs(x_BLF, weights)
        return x_BLF + out_BLH if x_BLF.shape[2] == self.width else out_BLH

    def _outputs(self, x_BLF: Tensor, weights: list[Tensor]) -> Tensor:
        zero = x_BLF.new_zeros(1, x_BLF.shape[0], self.width)
        out_BLH: Tensor = torch.lstm(x_BLF, (zero, zero), weights, True, 1, 0.0, self.training, False, True)[0]
        return out_BLH


def _layers(hidden_dims: tuple[int, ...]) -> nn.Sequential:
    return nn.Sequential(*[LSTM(a, b) for a, b in pairwise((hidden_dims[0], *hidden_dims))])


class Encoder(nn.Module):
    """(B, *input_shape) -> (B, D); `hidden_dims` are the widths of the layers."""

    def __init__(
        self, input_shape: tuple[int, ...], code_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        super().__init__()
        check_shapes("lstm", code_shape, hidden_dims)
        self.steps, (_, features) = Steps(), steps_of(input_shape)
        self.embed = nn.Sequential(nn.Linear(features, hidden_dims[0]), activation(act))
        self.layers = _layers(hidden_dims)
        self.head = nn.Linear(hidden_dims[-1], code_shape[0])

    def forward(self, x: Tensor, length_B: Tensor | None = None) -> Tensor:
        h_BLH = self.layers(self.embed(self.steps(x)))
        if length_B is None:
            last_BH = h_BLH[:, -1]
        else:
            last_BH = h_BLH.gather(1, (length_B - 1)[:, None, None].expand(-1, 1, h_BLH.shape[2]))[:, 0]
        code: Tensor = self.head(last_BH)
        return code


class Decoder(nn.Module):
    """(B, D) -> (B, *input_shape); `hidden_dims` from the code to the sample."""

    positions_LH: Tensor

    def __init__(
        self, code_shape: tuple[int, ...], input_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        super().__init__()
        check_shapes("lstm", code_shape, hidden_dims)
        n_steps, features = steps_of(input_shape)
        self.embed = nn.Sequential(nn.Linear(code_shape[0], hidden_dims[0]), activation(act))
        self.register_buffer("positions_LH", sinusoids(n_steps, hidden_dims[0]), persistent=False)
        self.layers = _layers(hidden_dims)
        self.head = nn.Sequential(nn.Linear(hidden_dims[-1], features), FromSteps(input_shape))

    def forward(self, z: Tensor) -> Tensor:
        x_hat: Tensor = self.head(self.layers(self.embed(z)[:, None] + self.positions_LH))
        return x_hat
