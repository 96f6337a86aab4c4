"""Models of Hugging Face `diffusers` split into an encoder and a decoder of samples in [0, 1].

Samples of diffusers are in [-1, 1], except for AutoencoderRAE. Shapes: B batch, D channels of a code, C channels of a
sample, (H, W) their positions.
"""

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.distributions import gaussians
from aezoo.training.precision import at_least_float32

RAE, CONSISTENCY = "AutoencoderRAE", "ConsistencyDecoderVAE"
# mean and standard deviation of each value of a code; in files they have the shape of a code
STATISTICS = {"latents_mean": "_latents_mean", "latents_std": "_latents_std"}
# names of an encoder's weights in versions 4 and 5 of transformers, replaced by common names
_NAMES_OF_TRANSFORMERS = (
    (r"^encoder\.vision_model\.", "encoder."),
    (r"^encoder\.(?:encoder\.)?layers?\.(?=\d)", "encoder.layers."),
    (r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)


class SplitModule(nn.Module):
    """A diffusers model with only some of its modules.

    Args:
        net: the whole model, which is not changed.
        parts: names of the modules to keep.
    """

    def __init__(self, net: Any, parts: Sequence[str]) -> None:
        super().__init__()
        self.net: Any = copy.copy(net)
        self.net._modules = {name: module for name, module in net._modules.items() if name in parts}


class Encoding(SplitModule):
    """Maps samples to codes, or to means and log-variances of Gaussian codes, concatenated along the channels."""

    def forward(self, x: Tensor) -> Tensor:
        found = self.net.encode(2 * x - 1, return_dict=False)[0]
        code: Tensor = found if isinstance(found, Tensor) else found.parameters
        return code


class Decoding(SplitModule):
    """Maps codes to samples."""

    def forward(self, z: Tensor) -> Tensor:
        x: Tensor = self.net.decode(z, return_dict=False)[0]
        return (x + 1) / 2


class RepresentationEncoding(SplitModule):
    """Maps samples to codes of AutoencoderRAE by a frozen network of transformers: (B, 3, H, W) -> (B, D, h, w).

    Codes are normalised and scaled for a diffusion model. Without `reshape_to_2d`, they are (B, h w, D).
    """

    def __init__(self, net: Any, parts: Sequence[str]) -> None:
        super().__init__(net, parts)
        self.requires_grad_(False).train()
        self.register_load_state_dict_pre_hook(_fit_state)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.net.eval()  # it is frozen, and adds no noise in evaluation mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.net.encode(x, return_dict=False)[0]
        return z

    def noised(self, z: Tensor) -> Tensor:
        """Add noise as in the training of AutoencoderRAE, before normalisation: s e, s ~ U(0, noise_tau)."""
        s = self.net.noise_tau * torch.rand(len(z), *[1] * (z.ndim - 1), device=z.device, dtype=z.dtype)
        # the divisor in `encode`
        scale = self.net.config.scaling_factor / (self.net.get_buffer(STATISTICS["latents_std"]) + 1e-5)
        # positions first, so that a seed gives the same noise as in diffusers
        e = gaussians.standard_normal_like(z.flatten(2).mT).mT.reshape(z.shape) if z.ndim == 4 else torch.randn_like(z)
        return z + s * scale.to(z) * e


class RepresentationDecoding(SplitModule):
    """Maps codes of AutoencoderRAE to samples of its size: (B, D, h, w) -> (B, 3, H, H)."""

    def forward(self, z: Tensor) -> Tensor:
        x: Tensor = self.net.decode(z, return_dict=False)[0]
        return x


class ConsistencyDecoding(SplitModule):
    """Maps codes of ConsistencyDecoderVAE to samples by two steps of a consistency model: (B, 4, h, w) -> (B, 3, H, W).

        x = f(a_t f(s_T e, T) + s_t e', t)     T = 1008     t = 512     e, e' ~ N(0, I)
        f(x, t) = c_skip(t) x + c_out(t) F(c_in(t) x, t, z)

    a_t and s_t are the factors of sample and noise after t of 1024 steps; x is in [-1, 1] here. `forward` uses the same
    e and e' for each sample in each call, so that a code has one reconstruction; `draw` draws them.
    """

    STEPS, N_STEPS = (1008, 512), 1024
    schedule: Tensor
    noise: Tensor

    def __init__(self, net: Any, parts: Sequence[str]) -> None:
        super().__init__(net, parts)
        with torch.device("cpu"):
            table = type(net.decoder_scheduler)()
        rows = (table.sqrt_alphas_cumprod, table.sqrt_one_minus_alphas_cumprod, table.c_skip, table.c_out, table.c_in)
        self.register_buffer("schedule", torch.stack(rows), persistent=False)
        self.register_buffer("noise", torch.empty(2, 3, 0, 0), persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        schedule = self.schedule
        super()._apply(fn, recurse)
        self.schedule = schedule.to(self.schedule.device)  # float32 in each precision of the network, as in diffusers
        return self

    def fix_noise(self, grid: Sequence[int]) -> None:
        """Store the noise for samples of a grid, which is otherwise generated in each call."""
        self.noise = _fixed_noise(grid)

    def forward(self, z: Tensor) -> Tensor:
        condition = self.condition(z)
        grid = condition.shape[2:]
        e = self.noise if self.noise.shape[2:] == grid else _fixed_noise(grid)
        e = e.to(z)[:, None].expand(-1, z.shape[0], -1, -1, -1)  # len(z) would fix the batch size in an export
        return self._sample(condition, (e[0], e[1])).to(z.dtype)

    def draw(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Decode with random noise: (B, 4, h, w) -> (B, 3, H, W).

        Args:
            z: codes.
            generator: random number generator; None is torch's. The result equals that of diffusers' `decode`.
        """
        condition = self.condition(z)
        like = condition[:, :3]
        e = [torch.randn(like.shape, generator=generator, device=z.device, dtype=z.dtype) for _ in self.STEPS]
        return self._sample(condition, e).to(z.dtype)

    def condition(self, z: Tensor) -> Tensor:
        """Return codes on the grid of samples, as input of F: (B, 4, h, w) -> (B, 4, H, W)."""
        z = (z * self.net.config.scaling_factor - self.net.means) / self.net.stds
        return F.interpolate(z, mode="nearest", scale_factor=2 ** (len(self.net.config.block_out_channels) - 1))

    def noisy(self, x: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """Return a_t x + s_t e for samples in [-1, 1], where t is a number or (B,)."""
        a, s = self._coefficients(t)[:2]
        return a * x + s * noise

    def f(self, x: Tensor, t: int | Tensor, condition: Tensor) -> Tensor:
        """Return denoised samples in [-1, 1], in at least float32: (B, 3, H, W), a number or (B,), (B, 4, H, W)."""
        skip, out, scale = self._coefficients(t)[2:]
        found = self.net.decoder_unet(torch.cat([(scale * x).to(condition), condition], 1), t, return_dict=False)[0]
        return skip * x + out * at_least_float32(found[:, :3])

    def level(self, t: Tensor) -> Tensor:
        """Return the standard deviation of the noise in units of the sample, s_t / a_t."""
        return self.schedule[1, t] / self.schedule[0, t]

    def _sample(self, condition: Tensor, noise: Sequence[Tensor]) -> Tensor:
        first, second = self.STEPS
        x = self.f(self.schedule[1, first] * noise[0], first, condition)
        x = self.f(self.noisy(x, noise[1], second), second, condition)
        return (x + 1) / 2

    def _coefficients(self, t: int | Tensor) -> Tensor:
        return self.schedule[:, t].reshape(len(self.schedule), -1, 1, 1, 1)


def _fixed_noise(grid: Sequence[int]) -> Tensor:
    return torch.randn(2, 3, *grid, generator=torch.Generator().manual_seed(0), device="cpu")


class _OnDoubledGrid(nn.Conv2d):
    """A convolution of a map with doubled sides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _for_any_batch(net: nn.Module) -> None:
    """Make upsampling layers independent of the batch size, with the same results.

    These layers of diffusers copy inputs of 64 or more samples, a workaround for old versions of torch, so that an
    export would only work for fewer samples.
    """
    for layer in net.modules():
        known: Any = layer if type(layer).__name__ == "Upsample2D" else None
        if known and known.use_conv and known.interpolate and known.name == "conv" and type(known.conv) is nn.Conv2d:
            known.conv.__class__ = _OnDoubledGrid
            known.use_conv_transpose = True  # then the layer only applies the norm and the convolution
    blocks: list[Any] = [layer for layer in net.modules() if type(layer).__name__ == "ResnetBlock2D"]
    for block in blocks:
        up = block.upsample
        if type(up).__name__ == "Upsample2D" and not up.use_conv and up.interpolate:
            # both are called in the same way, but only upsampling depends on the batch size
            block.upsample, block.downsample = None, nn.Upsample(scale_factor=2.0, mode="nearest")


_KINDS: dict[str, tuple[type[SplitModule], type[SplitModule]]] = {
    RAE: (RepresentationEncoding, RepresentationDecoding),
    CONSISTENCY: (Encoding, ConsistencyDecoding),
}


def split_autoencoder(net: Any) -> tuple[SplitModule, SplitModule]:
    """Return encoder and decoder; every module of the model is in one of them."""
    _for_any_batch(net)
    encoding, decoding = _KINDS.get(type(net).__name__, (Encoding, Decoding))
    parts = ("encoder", "quant_conv")
    return encoding(net, parts), decoding(net, [name for name in net._modules if name not in parts])


def own_names(own: Iterable[str], given: Iterable[str]) -> dict[str, str]:
    """Map names of AutoencoderRAE's weights to those in the installed version of transformers; keep unknown names."""
    known = {_common_name(name): name for name in own}
    return {name: known.get(_common_name(name), name) for name in given}


def _common_name(name: str) -> str:
    if not name.startswith("encoder."):
        return name
    for pattern, new in _NAMES_OF_TRANSFORMERS:
        name = re.sub(pattern, new, name)
    return name


def fit_statistics(net: Any, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Reshape the statistics of codes in AutoencoderRAE to their shapes in a file.

    A config may omit them, since they have as many values as a code.
    """
    config, side = net.config, int(net.num_patches**0.5)
    places = (side, side) if net.reshape_to_2d else (net.num_patches,)
    code = (config.encoder_hidden_size, *places) if net.reshape_to_2d else (*places, config.encoder_hidden_size)
    for argument, name in STATISTICS.items():
        found, own = state.get(f"{prefix}{name}"), net.get_buffer(name)
        if isinstance(found, Tensor) and config.get(argument) is None and found.shape != own.shape:
            fits = found.ndim <= 3 and all(n in (1, m) for n, m in zip(found.shape[::-1], code[::-1], strict=False))
            if fits:  # otherwise loading raises an error
                net.register_buffer(name, own.new_empty(found.shape))


def _fit_state(module: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Prepare for loading: statistics of any shape, and names from another version of transformers."""
    fit_statistics(module.net, state, f"{prefix}net.")
    inside = f"{prefix}net."
    given = [name.removeprefix(inside) for name in state if name.startswith(inside)]
    for old, new in own_names(module.net.state_dict(), given).items():
        if old != new:
            state[f"{inside}{new}"] = state.pop(f"{inside}{old}")
