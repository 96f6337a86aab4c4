"""Image autoencoders of Hugging Face's `diffusers`, each as an encoder and a decoder.

Their values range from -1 to 1; here from 0 to 1. diffusers is imported when a model is built.
"""

import copy
import difflib
import importlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

from aezoo.errors import AezooError
from aezoo.security import json_files, values, weights

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_MAX_CONFIG = 2**20
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# layers of attention in earlier versions of diffusers
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_NAMES_OF_ATTENTION = re.compile(r"(?<=\.)(query|key|value|proj_attn)(?=\.(?:weight|bias)$)")
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
_TWO_BLOCKS: dict[str, Any] = {key: [block] * 2 for key, block in _BLOCKS.items()} | {"norm_num_groups": 8}
_TWO_STAGES = {**_TWO_BLOCKS, "block_out_channels": [32, 64]}
# a small model of each kind, for settings that the user leaves out: the classes' defaults have 1 stage or 10^8 weights
KINDS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {**_TWO_STAGES, "mid_block_add_attention": False},
    "AsymmetricAutoencoderKL": {
        **_TWO_BLOCKS,
        **{"down_block_out_channels": [32, 64], "up_block_out_channels": [32, 64]},
    },
    "AutoencoderKLFlux2": {**_TWO_STAGES, "layers_per_block": 1, "latent_channels": 8},
    "AutoencoderKLHunyuanImage": {
        **{"block_out_channels": [32, 64], "layers_per_block": 1, "latent_channels": 4},
        **{"spatial_compression_ratio": 2, "sample_size": 32},
    },
    "AutoencoderKLKVAE": {"channels": 32, "ch_mult": [1, 2], "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4},
    "VQModel": {**_TWO_STAGES, "latent_channels": 4, "mid_block_add_attention": False},
    "AutoencoderDC": {
        **{"encoder_block_out_channels": [32, 64], "decoder_block_out_channels": [32, 64], "latent_channels": 8},
        **{"encoder_layers_per_block": [1, 1], "decoder_layers_per_block": [1, 1]},
        **{"encoder_qkv_multiscales": [[], []], "decoder_qkv_multiscales": [[], []]},
    },
    "AutoencoderTiny": {
        **{"encoder_block_out_channels": [32, 32], "decoder_block_out_channels": [32, 32]},
        **{"num_encoder_blocks": [1, 2], "num_decoder_blocks": [2, 1]},
    },
}
_VIDEO = (
    *("AutoencoderKLAllegro", "AutoencoderKLCogVideoX", "AutoencoderKLCosmos", "AutoencoderKLHunyuanVideo"),
    *("AutoencoderKLHunyuanImageRefiner", "AutoencoderKLHunyuanVideo15", "AutoencoderKLKVAEVideo", "Kandinsky6SRVAE"),
    *("AutoencoderKLLTXVideo", "AutoencoderKLLTX2Video", "AutoencoderKLMagvit", "AutoencoderKLMiniMaxH3"),
    *("AutoencoderKLMochi", "AutoencoderKLQwenImage", "AutoencoderKLQwenImage21", "AutoencoderKLTemporalDecoder"),
    *("AutoencoderKLWan", "AutoencoderVidTok", "LTX2VideoDiffusionDecoderModel"),
)
_AUDIO = (
    *("AutoencoderKLKVAEAudio", "AutoencoderKLLTX2Audio", "AutoencoderKLMiniMaxH3Audio", "AutoencoderOobleck"),
    *("AutoencoderSAME", "Cosmos3AVAEAudioTokenizer", "LongCatAudioDiTVae", "MMAudioVAE"),
)
REFUSED = {
    **dict.fromkeys(_VIDEO, "is made for videos, with an axis of time"),
    **dict.fromkeys(_AUDIO, "is made for sound"),
    "ConsistencyDecoderVAE": "decodes by a diffusion model, so that a code has no one reconstruction",
    "AutoencoderRAE": "has an encoder of the package transformers",
    "RFD4ProteinaAutoencoder": "is made for proteins",
}


class SplitModule(nn.Module):
    """A diffusers model with only some of its modules.

    Args:
        net: the whole model, which keeps all.
        parts: names of the modules.
    """

    def __init__(self, net: Any, parts: Sequence[str]) -> None:
        super().__init__()
        self.net: Any = copy.copy(net)
        self.net._modules = {name: module for name, module in net._modules.items() if name in parts}


class Encoding(SplitModule):
    """Samples to codes, or to means and log-variances of Gaussian codes, concatenated along the channels."""

    def forward(self, x: Tensor) -> Tensor:
        found = self.net.encode(2 * x - 1, return_dict=False)[0]
        code: Tensor = found if isinstance(found, Tensor) else found.parameters
        return code


class Decoding(SplitModule):
    """Codes to samples."""

    def forward(self, z: Tensor) -> Tensor:
        x: Tensor = self.net.decode(z, return_dict=False)[0]
        return (x + 1) / 2


class _OnDoubledGrid(nn.Conv2d):
    """A convolution of a map with doubled sides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _for_any_batch(net: nn.Module) -> None:
    """Let layers that double the sides compute the same without depending on the batch size.

    Theirs copies inputs of 64 or more samples, a workaround for old versions of torch, so an export would hold only for
    fewer samples.
    """
    for layer in net.modules():
        known: Any = layer if type(layer).__name__ == "Upsample2D" else None
        if known and known.use_conv and known.interpolate and known.name == "conv" and type(known.conv) is nn.Conv2d:
            known.conv.__class__ = _OnDoubledGrid
            known.use_conv_transpose = True  # then the layer is only the convolution, after the norm


def split_autoencoder(net: Any) -> tuple[Encoding, Decoding]:
    """Encoder and decoder; every module of the model is in one of them."""
    _for_any_batch(net)
    parts = ("encoder", "quant_conv")
    return Encoding(net, parts), Decoding(net, [name for name in net._modules if name not in parts])


def kind_of(name: str) -> Any:
    """The class of a kind.

    Raises:
        AezooError: no such kind, a kind that is not an autoencoder of images, or diffusers is not installed.
    """
    if name in REFUSED:
        raise AezooError(f"{name} of diffusers {REFUSED[name]}: take one of {', '.join(KINDS)}")
    if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, n=1, cutoff=0.5)
        raise AezooError(
            f"unknown kind {name!r}{f', did you mean {near[0]!r}?' if near else ':'} Take one of {', '.join(KINDS)}"
        )
    try:
        return getattr(importlib.import_module("diffusers"), name)
    except ImportError as error:
        raise AezooError("diffusers_ae needs diffusers: pip install 'aezoo[diffusers]'") from error
    except (AttributeError, RuntimeError) as error:
        raise AezooError(f"diffusers cannot give {name}, {_brief(error)}: pip install -U 'aezoo[diffusers]'") from error


def build(name: str, config: dict[str, Any], channels: int) -> Any:
    """A model with its initial weights.

    Args:
        name: its kind.
        config: arguments of its class; other arguments are taken from `KINDS`, then from the class's defaults.
        channels: channels of a sample.

    Raises:
        AezooError: as `kind_of`, or the class does not take the arguments.
    """
    cls = kind_of(name)
    given = values.check_plain(config, f"config of {name}: its arguments")
    known = _arguments(cls)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise AezooError(
                f"config of {name} has no {key!r}{f', did you mean {near[0]!r}?' if near else ':'} "
                f"It takes {', '.join(known)}"
            )
    settings: dict[str, Any] = dict.fromkeys({"in_channels", "out_channels"} & {*known}, channels)
    settings |= {**KINDS[name], **given}
    try:
        for key in [key for key in _BLOCKS if key in known and key not in given]:
            # one block for each width
            widths = settings.get("block_out_channels") or settings[key.replace("types", "out_channels")]
            settings[key] = [_BLOCKS[key]] * len(widths)
        return cls(**settings)
    except AezooError:  # it has grown too large
        raise
    except Exception as error:  # a class can fail in any way on unexpected values
        raise AezooError(f"{name} does not take config {_brief(given)}: {_brief(error)}") from error


def read(folder: Path) -> Any:
    """A model that `save_pretrained` has written, only from safetensors, which limit its size.

    Raises:
        AezooError: as `check_config` and `copy_weights`; or the folder has no such files of one model.
    """
    name, config = check_config(_read_config(folder), str(folder))
    if (folder / f"{WEIGHTS}.index.json").exists():
        raise AezooError(
            f"{folder} has its weights in several files: `aezoo import {folder} OUT` reads them, and load_model too"
        )
    if not (folder / WEIGHTS).is_file():
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        why = f"{pickles[0]} is refused, since a pickle can run code" if pickles else "so that there are no weights"
        raise AezooError(
            f"{folder} has no {WEIGHTS}, {why}: save_pretrained(FOLDER, safe_serialization=True) writes one"
        )
    try:
        state = load_file(folder / WEIGHTS)
    except Exception as error:  # a damaged file can end in any error
        raise AezooError(f"cannot read {folder / WEIGHTS} as {name}: {_brief(error)}; save it again") from error
    with weights.limit_parameters(state):
        net = build(name, config, 0)
    copy_weights(net.state_dict(), state, str(folder / WEIGHTS))
    return net.train()


def check_config(config: object, what: str) -> tuple[str, dict[str, Any]]:
    """Kind and all arguments that a model's `config.json` describes, those that it leaves out as the class has them.

    Args:
        config: content of the file.
        what: the file or its folder, for messages.

    Raises:
        AezooError: as `kind_of`; it names no model, or needs code of others; or an argument is no plain value.
    """
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(name, str):
        raise AezooError(f"{what} names no model: it was not written by a model of diffusers")
    if config.get("quantization_config"):
        raise AezooError(f"{what} is quantised, which needs code of others: give the model that it was made from")
    if config.get("auto_map"):
        raise AezooError(f"{what} is refused: its auto_map names code of its own to run in the place of {name}")
    parameters = inspect.signature(kind_of(name).__init__).parameters
    known = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
    given = {key: value for key, value in config.items() if key in parameters}
    return name, values.check_plain(known | given, f"{what}: its arguments")


def copy_weights(own: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Copy weights from a file into a model.

    Args:
        own: state dict of the model.
        given: weights from the file.
        what: the file, for messages.

    Raises:
        AezooError: a name, a shape or a type of numbers does not fit.
    """
    given = {_NAMES_OF_ATTENTION.sub(lambda found: _ATTENTION[found[1]], key): value for key, value in given.items()}
    keys = {"has no": own.keys() - given.keys(), "has unknown": given.keys() - own.keys()}
    for problem, names in keys.items():
        if names:
            raise AezooError(f"{what} does not fit its {CONFIG}: it {problem} {_brief(', '.join(sorted(names)))}")
    for key, value in own.items():
        # layers of attention were convolutions of one point
        found = given[key].squeeze((2, 3)) if value.ndim == 2 and given[key].shape[2:] == (1, 1) else given[key]
        if found.shape != value.shape:
            raise AezooError(
                f"{what} does not fit its {CONFIG}: {key} has the shape {tuple(found.shape)}, not {tuple(value.shape)}"
            )
        if value.is_floating_point() and found.dtype not in _FLOATS:
            raise AezooError(
                f"{what} holds {key} as {str(found.dtype).removeprefix('torch.')}, whose scale is not in it: take the "
                "file in float32, float16 or bfloat16"
            )
        with torch.no_grad():
            value.copy_(found)


def _read_config(folder: Path) -> object:
    """The content of a folder's `config.json`.

    Raises:
        AezooError: there is no such file, or it is not JSON.
    """
    if not (folder / CONFIG).is_file():
        raise AezooError(
            f"{folder} has no {CONFIG}: give the folder of a model of diffusers on this disk, of a pipeline its vae; "
            "`aezoo import hf://NAME OUT` fetches one"
        )
    return json_files.read(folder / CONFIG, _MAX_CONFIG, str(folder / CONFIG))


class LatentScaling:
    """Codes as a diffusion model takes them, and back: (B, D, H, W) -> (B, D, H, W).

    scale (z - shift), with the factors of the model's config: `scaling_factor` and `shift_factor`, or, channel by
    channel, `scaling_factor` / `latents_std` and `latents_mean`. AutoencoderKLFlux2 has the mean and variance of each
    value of a patch instead, as buffers of its weights.

    Args:
        decoder: the decoder of a model, which has these buffers.
    """

    def __init__(self, decoder: Decoding) -> None:
        config, norm = decoder.net.config, decoder.net._modules.get("bn")
        if norm is not None:
            h, w = config.patch_size
            mean, std = norm.running_mean, (norm.running_var + norm.eps).sqrt()
            self.shift, self.scale = (part.unflatten(0, (-1, h, w)) for part in (mean, 1 / std))
            return
        scale, shift = (config.get(key) for key in ("scaling_factor", "shift_factor"))
        scale, shift = torch.as_tensor(1.0 if scale is None else scale), torch.as_tensor(shift or 0.0)
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            shift, scale = torch.tensor(config.latents_mean), scale / torch.tensor(config.latents_std)
        self.shift, self.scale = (part.float().reshape(-1, 1, 1) for part in (shift, scale))

    def __call__(self, z: Tensor) -> Tensor:
        return ((z - _on_grid(self.shift, z)) * _on_grid(self.scale, z)).to(z)

    def restore(self, z: Tensor) -> Tensor:
        """The inverse: codes as `decode` takes them."""
        return (z / _on_grid(self.scale, z) + _on_grid(self.shift, z)).to(z)


def _on_grid(patch: Tensor, z: Tensor) -> Tensor:
    """Repeat a patch over the grid of codes, (D or 1, h, w) -> (D or 1, H, W); one value of each channel stays."""
    if patch.shape[1:] == (1, 1):
        return patch.to(z.device)
    repeats = [-(-n // m) for n, m in zip(z.shape[2:], patch.shape[1:], strict=True)]
    return patch.to(z.device).repeat(1, *repeats)[:, : z.shape[2], : z.shape[3]]


def config_of(net: Any) -> dict[str, Any]:
    """All arguments of a model's class, as plain values from which `build` can recreate it."""
    config: dict[str, Any] = json.loads(json.dumps({key: net.config[key] for key in _arguments(type(net))}))
    return config


def code_shape(encoder: Encoding, decoder: Decoding, input_shape: tuple[int, ...], gaussian: bool) -> tuple[int, ...]:
    """Shape of a code, computed from shapes only.

    Args:
        encoder: the encoder of a model.
        decoder: the decoder of the same model.
        input_shape: (C, H, W).
        gaussian: whether half of the encoder's channels are log-variances.

    Raises:
        AezooError: the model does not take such samples, or returns another shape.
    """
    name = type(encoder.net).__name__
    try:
        h = _shapes_alone(encoder, torch.empty(1, *input_shape, device="meta"))
        z = h.chunk(2, dim=1)[0] if gaussian else h
        x_hat = _shapes_alone(decoder, z)
    except Exception as error:  # raised by torch or diffusers
        channels = encoder.net.config.get("in_channels", input_shape[0])
        if channels != input_shape[0]:
            raise AezooError(
                f"this {name} takes {channels} channels, got {input_shape}: give --data.channels {channels}"
            ) from error
        raise AezooError(f"this {name} does not take samples of shape {input_shape}: {_brief(error)}") from error
    if x_hat.shape[1:] != input_shape:
        factors = [max(n // m, 1) for n, m in zip(x_hat.shape[2:], z.shape[2:], strict=True)]
        sides = " and ".join(map(str, dict.fromkeys(factors)))
        raise AezooError(
            f"this {name} gives {tuple(x_hat.shape[1:])} back for {input_shape}: take sides that are multiples of "
            f"{sides}, as --data.size resizes them"
        )
    return tuple(z.shape[1:])


@torch.no_grad()
def _shapes_alone(split: SplitModule, x: Tensor) -> Tensor:
    state = {key: value.to("meta") for key, value in [*split.named_parameters(), *split.named_buffers()]}
    found: Tensor = functional_call(split, state, x)
    return found


def _arguments(cls: Any) -> list[str]:
    return [key for key in inspect.signature(cls.__init__).parameters if key != "self"]


def _brief(what: object) -> str:
    text = " ".join(str(what).split())
    return text if len(text) <= 200 else f"{text[:200]}..."
