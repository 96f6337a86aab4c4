"""Export of models for Hugging Face's diffusers: `AutoencoderKL.from_pretrained(FOLDER)`.

| model | class of diffusers |
|---|---|
| autoencoder_kl, eq_vae, va_vae with net ldm | AutoencoderKL |
| vqgan, vq_vae with net ldm | VQModel |
| taesd | AutoencoderTiny |
| diffusers_ae | its kind |

Outputs are equal up to rounding. Other networks have layers that these classes do not support; e.g. resnet halves grids
by padding both sides and doubles them by transposed convolutions. diffusers is only needed for diffusers_ae.

Images are in [-1, 1] in diffusers, and in [0, 1] here. The scale and shift of an autoencoder_kl's codes are those of
its `standardiser`, computed over all channels.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from aezoo.autoencoder import Autoencoder
from aezoo.distributions.likelihoods import Gaussian, Laplace, LogCosh
from aezoo.errors import AezooError
from aezoo.io import atomic_files
from aezoo.nets import ldm
from aezoo.nets.blocks import diffusers
from aezoo.registry import name_of

KL, VQ = ("autoencoder_kl", "eq_vae", "va_vae"), ("vqgan", "vq_vae")
# the first version with all classes and arguments
_VERSION = "0.38.0"
_PARTS = {
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
}


def save_diffusers(model: Autoencoder, folder: str | Path) -> Path:
    """Write a model as `config.json` and `diffusion_pytorch_model.safetensors` of diffusers.

    Args:
        model: one of the table above, for images whose sides are multiples of its stride.
        folder: created if it does not exist; each of its two files is replaced atomically.

    Returns:
        The folder.

    Raises:
        AezooError: no class of diffusers is equivalent; or the files cannot be written.
    """
    name, config, state = _converted(model)
    folder, cure = Path(folder), "free disk space, or choose a writable folder"
    config = {"_class_name": name, "_diffusers_version": _VERSION, **config}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    content = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    metadata = {"format": "pt"}  # required by diffusers
    atomic_files.write(folder / diffusers.WEIGHTS, lambda file: file.write(save(content, metadata)), cure=cure)
    atomic_files.write(folder / diffusers.CONFIG, lambda file: file.write(text.encode()), cure=cure)
    return folder


def _converted(model: Any) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return class, arguments and weights in diffusers."""
    name = name_of(type(model))
    if name == "diffusers_ae":
        net = model.encoder.net
        return model.kind, diffusers.whole_config(net), {**net.state_dict(), **model.decoder.net.state_dict()}
    if name not in (*KL, *VQ, "taesd"):
        known = ", ".join((*KL, *VQ, "taesd", "diffusers_ae"))
        raise AezooError(
            f"diffusers has no class for {name or type(model).__name__}: models that it can run are {known}"
        )
    _check_samples(model, name)
    if name == "taesd":
        return _tiny(model)
    if model.net != "ldm":
        raise AezooError(
            f"diffusers has no network like net {model.net!r}, which resizes grids in another way: train {name} "
            "with net='ldm', which it has"
        )
    if model.activation != "silu":
        raise AezooError(f"the networks of diffusers end with silu, this one has {model.activation}: train with silu")
    widths = ldm.stage_widths(model.input_shape, tuple(model.hidden_dims))
    config = {
        **{"in_channels": model.input_shape[0], "out_channels": model.input_shape[0], "act_fn": "silu"},
        **{"block_out_channels": list(widths), "layers_per_block": ldm.LAYERS, "latent_channels": model.latent_dim},
        **{"norm_num_groups": ldm.group_count(widths), "sample_size": max(model.input_shape[1:])},
        **{"down_block_types": ["DownEncoderBlock2D"] * len(widths), "mid_block_add_attention": True},
        **{"up_block_types": ["UpDecoderBlock2D"] * len(widths), "force_upcast": False},
    }
    state = _ldm_weights(model, len(widths))
    if name in KL:
        scale, shift = _scale_and_shift(model.standardiser)
        convs = {"use_quant_conv": False, "use_post_quant_conv": False}
        return "AutoencoderKL", {**config, **convs, "scaling_factor": scale, "shift_factor": shift}, state
    if model.cosine:
        raise AezooError(
            f"VQModel of diffusers chooses the nearest code, this {name} the one of the nearest direction (cosine)"
        )
    codes = model.quantiser.code_KD
    # VQModel always has a 1x1 convolution between the networks and the codes
    for key in ("quant_conv", "post_quant_conv"):
        state[f"{key}.weight"] = torch.eye(codes.shape[1]).to(codes)[..., None, None]
        state[f"{key}.bias"] = codes.new_zeros(codes.shape[1])
    state["quantize.embedding.weight"] = codes
    book = {"num_vq_embeddings": codes.shape[0], "vq_embed_dim": codes.shape[1], "norm_type": "group"}
    return "VQModel", {**config, **book, "lookup_from_codebook": False, "scaling_factor": 1.0}, state


def _check_samples(model: Any, name: str) -> None:
    shape = model.input_shape
    if len(shape) != 3:
        raise AezooError(f"diffusers has networks for images, (C, H, W), and this {name} takes {shape}")
    if not isinstance(model.likelihood, Gaussian | Laplace | LogCosh):
        raise AezooError(
            f"with likelihood {model.hparams['likelihood']!r} the network's output is not an image, as diffusers "
            "expects: train with gaussian, laplace or logcosh"
        )
    factor = 2 ** len(model.hparams["hidden_dims"])
    if any(side % factor for side in shape[1:]):
        size = "x".join(map(str, shape[1:]))
        raise AezooError(
            f"diffusers needs sides that are multiples of {factor}, this {name} has {size}: export "
            f"aezoo.at_size(model, SIZE) with such a SIZE"
        )
    if model.data_units is not None and model.data_units.scaling:
        raise AezooError(
            f"this {name} was trained on data that were scaled by their statistics, unlike diffusers' images"
        )


def _scale_and_shift(standardiser: nn.Module) -> tuple[float, float]:
    """Return 1 / standard deviation and mean of codes over all channels; 1 and 0 before training."""
    mean_C, std_C = (getattr(standardiser, name).double().cpu() for name in ("mean_C", "std_C"))
    mean = mean_C.mean()
    return float(1 / math.sqrt((std_C**2 + mean_C**2).mean() - mean**2)), float(mean)


def _ldm_weights(model: Any, n: int) -> dict[str, Tensor]:
    """Return the weights of both networks; n is the number of grids."""
    middle = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    stages: dict[str, list[str]] = {"down": [], "up": []}
    for side, layers in (("down", ldm.LAYERS), ("up", ldm.LAYERS + 1)):
        for i in range(n):
            stages[side] += [f"{side}_blocks.{i}.resnets.{j}" for j in range(layers)]
            stages[side] += [f"{side}_blocks.{i}.{side}samplers.0"] if i < n - 1 else []
    ends = ["conv_norm_out", "conv_act", "conv_out"]
    names = {
        "encoder": ["conv_in", *stages["down"], *middle, *ends],
        "decoder": ["conv_in", *middle, *stages["up"], *ends],
    }
    state: dict[str, Tensor] = {}
    for part, of in names.items():
        for name, layer in zip(of, getattr(model, part).layers, strict=True):
            # networks for vector codes have linear layers at the end
            if name in ("conv_in", "conv_out") and not isinstance(layer, nn.Conv2d):
                raise AezooError("diffusers has no network whose code is a vector: train with a map of codes")
            blocks = isinstance(layer, ldm.Block | ldm.Attention)
            for key, value in layer.state_dict().items():
                first, _, rest = key.rpartition(".")
                state[f"{part}.{name}.{_PARTS.get(first, first) if blocks else first}.{rest}".replace("..", ".")] = (
                    value
                )
            if isinstance(layer, ldm.Attention):
                zeros = torch.zeros_like(layer.query.bias)
                state |= {f"{part}.{name}.to_{key}.bias": zeros for key in "kv"}
    return state


def _tiny(model: Any) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Convert a taesd to AutoencoderTiny, whose stages all have the same channels; additional ones are 0."""
    if model.hparams["activation"] != "relu":
        raise AezooError(f"AutoencoderTiny of diffusers uses relu, this taesd has {model.hparams['activation']}")
    dims = model.hparams["hidden_dims"]
    channels, width = model.input_shape[0], max(dims, default=model.input_shape[0])
    state: dict[str, Tensor] = {}
    for part, before in (("encoder", 0), ("decoder", 1)):  # diffusers bounds codes outside of the layers
        layers = getattr(model, part)
        for i, layer in enumerate(layers):
            for key, value in layer.state_dict().items():
                value = _widened(value, width if i > before else None, width if i < len(layers) - 1 else None)
                state[f"{part}.layers.{i - before}.{key.replace('body.', 'conv.')}"] = value
    blocks = [1, *[3] * len(dims)]
    config = {
        **{"in_channels": channels, "out_channels": channels, "latent_channels": model.code_shape[0], "act_fn": "relu"},
        **{"encoder_block_out_channels": [width] * len(blocks), "decoder_block_out_channels": [width] * len(blocks)},
        **{"num_encoder_blocks": blocks, "num_decoder_blocks": blocks[::-1], "upsample_fn": "nearest"},
        **{"upsampling_scaling_factor": 2, "scaling_factor": 1.0, "shift_factor": 0.0},
    }
    return "AutoencoderTiny", config, state


def _widened(value: Tensor, before: int | None, after: int | None) -> Tensor:
    """Pad a convolution's weight or bias with zeros to more channels; None keeps their number."""
    shape = [*value.shape]
    shape[0] = after or shape[0]
    if value.ndim > 1:
        shape[1] = before or shape[1]
    wide = value.new_zeros(shape)
    wide[tuple(slice(0, n) for n in value.shape)] = value
    return wide
