"""Codes and samples of diffusers models, in [0, 1], by their own `encode` and `decode`; used by several tests."""

from typing import Any
from unittest import mock

import torch
from diffusers.models.autoencoders import consistency_decoder_vae
from diffusers.schedulers import scheduling_consistency_decoder
from torch import Tensor

RAE, CONSISTENCY = "AutoencoderRAE", "ConsistencyDecoderVAE"


def kind_of(net: Any) -> str:
    return type(net).__name__


def side_for(kind: str, side: int) -> dict[str, int]:
    """Arguments with which samples of this side keep their size."""
    return {"encoder_input_size": side // 4 * 14} if kind == RAE else {}


def encoded(net: Any, x: Tensor) -> Tensor:
    """The deterministic code of samples in [0, 1]."""
    found = net.encode(x if kind_of(net) == RAE else 2 * x - 1)
    if hasattr(found, "latent_dist"):
        mode: Tensor = found.latent_dist.mode()
        return mode
    code: Tensor = found[0]
    return code


def decoded(net: Any, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Samples in [0, 1]; a consistency decoder draws noise from the generator, or that of seed 0 for all samples."""
    if kind_of(net) == RAE:
        image: Tensor = net.decode(z).sample
        return image
    if kind_of(net) != CONSISTENCY:
        return (net.decode(z).sample + 1) / 2
    if generator is not None:
        return (net.decode(z, generator=generator).sample + 1) / 2
    drawn = []

    def draw(shape: tuple[int, ...], **_: Any) -> Tensor:
        if not drawn:
            drawn.extend(torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(0)))
        return drawn.pop(0).to(z).expand(shape)

    modules = consistency_decoder_vae, scheduling_consistency_decoder
    with mock.patch.object(modules[0], "randn_tensor", draw), mock.patch.object(modules[1], "randn_tensor", draw):
        return (net.decode(z).sample + 1) / 2
