"""Image autoencoders of Hugging Face `diffusers`: kinds, configs, weights and codes for diffusion models.

diffusers is imported when a model is built.
"""

import contextlib
import difflib
import importlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from aezoo.errors import AezooError, install_hint
from aezoo.nets.blocks.split_diffusers import (
    CONSISTENCY,
    RAE,
    STATISTICS,
    ConsistencyDecoding,
    SplitModule,
    fit_statistics,
    own_names,
)
from aezoo.security import json_files, values, weights

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
# bytes of AutoencoderRAE's config, which may contain statistics for each value of a code
MAX_CONFIG = 2**26
# limit on the positions of its codes along each axis, since a table of their positions is built first
_MOST_PLACES = 256
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# names in attention layers of earlier versions of diffusers
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_NAMES_OF_ATTENTION = re.compile(r"(?<=\.)(query|key|value|proj_attn)(?=\.(?:weight|bias)$)")
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
_BLOCKS_OF_CONSISTENCY = {
    "encoder_down_block_types": "DownEncoderBlock2D",
    "decoder_down_block_types": "ResnetDownsampleBlock2D",
    "decoder_up_block_types": "ResnetUpsampleBlock2D",
}
_TWO_BLOCKS: dict[str, Any] = {key: [block] * 2 for key, block in _BLOCKS.items()} | {"norm_num_groups": 8}
_TWO_STAGES = {**_TWO_BLOCKS, "block_out_channels": [32, 64]}
# a small model of each kind, for omitted settings: the classes' defaults have 1 stage or 10^8 weights
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
    RAE: {
        **{"encoder_hidden_size": 64, "encoder_num_hidden_layers": 2, "patch_size": 4, "decoder_hidden_size": 64},
        **{"decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4, "decoder_intermediate_size": 128},
    },
    CONSISTENCY: {
        **{key: [block] * 2 for key, block in _BLOCKS_OF_CONSISTENCY.items()},
        **{"encoder_block_out_channels": [32, 64], "encoder_layers_per_block": 1, "encoder_norm_num_groups": 8},
        **{"decoder_block_out_channels": [32, 64], "decoder_layers_per_block": 1, "decoder_norm_num_groups": 8},
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
    "RFD4ProteinaAutoencoder": "is made for proteins",
}


def kind_of(name: str) -> Any:
    """Return the class of a kind.

    Raises:
        AezooError: the kind does not exist or is not an image autoencoder; or diffusers (for AutoencoderRAE also
            transformers) is not installed.
    """
    if name in REFUSED:
        raise AezooError(f"{name} of diffusers {REFUSED[name]}: choose from {', '.join(KINDS)}")
    if name not in KINDS:
        near = difflib.get_close_matches(name, KINDS, n=1, cutoff=0.5)
        raise AezooError(
            f"unknown kind {name!r}{f', did you mean {near[0]!r}?' if near else ':'} Take one of {', '.join(KINDS)}"
        )
    try:
        cls = getattr(importlib.import_module("diffusers"), name)
    except ImportError as error:
        raise AezooError(f"diffusers_ae needs diffusers: {install_hint('diffusers')}") from error
    except (AttributeError, RuntimeError) as error:
        raise AezooError(f"diffusers cannot give {name}, {_brief(error)}: {install_hint('diffusers')}") from error
    if name == RAE:
        try:
            importlib.import_module("transformers")
        except ImportError as error:
            raise AezooError(f"the encoder of {name} needs transformers: {install_hint('transformers')}") from error
    return cls


def build(name: str, config: dict[str, Any], input_shape: tuple[int, ...]) -> Any:
    """Create a model with initial weights.

    Args:
        name: the kind.
        config: arguments of the class; all others are derived from `input_shape` and `KINDS`, or are the defaults of
            the class.
        input_shape: (C, H, W).

    Raises:
        AezooError: as `kind_of`, or the class does not accept the arguments.
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
    settings: dict[str, Any] = dict.fromkeys({"in_channels", "out_channels"} & {*known}, input_shape[0])
    settings |= {**KINDS[name], **given}
    blocks = _BLOCKS_OF_CONSISTENCY if name == CONSISTENCY else _BLOCKS
    try:
        for key in [key for key in blocks if key in known and key not in given]:
            # one block for each width
            side = re.sub("(down|up)_block_types", "block_out_channels", key)
            widths = settings.get(side) or settings[key.replace("types", "out_channels")]
            settings[key] = [blocks[key]] * len(widths)
        if name == RAE:
            _fit_to_side(settings, cls, input_shape)
            with _siglip_of_earlier_transformers():
                return cls(**settings)
        if name == CONSISTENCY:
            _check_steps(settings)
        return cls(**settings)
    except AezooError:  # the model is too large
        raise
    except Exception as error:  # a class can fail in any way on unexpected values
        raise AezooError(f"{name} does not take config {_brief(given)}: {_brief(error)}") from error


def _fit_to_side(settings: dict[str, Any], cls: Any, input_shape: tuple[int, ...]) -> None:
    """Set the input size of AutoencoderRAE's encoder such that the decoder returns samples of the given size.

    Raises:
        AezooError: a code would have too many positions.
    """
    defaults = {key: parameter.default for key, parameter in inspect.signature(cls.__init__).parameters.items()}
    sides = defaults | settings
    patch = sides["encoder_patch_size"]
    if "encoder_input_size" not in settings:
        settings["encoder_input_size"] = max(input_shape[1] // sides["patch_size"], 1) * patch
    places = settings["encoder_input_size"] // patch
    if places > _MOST_PLACES:
        raise AezooError(
            f"{RAE} has codes of at most {_MOST_PLACES} positions per side, got {places}: use larger patches"
        )


def _check_steps(settings: dict[str, Any]) -> None:
    """Check that the table of steps includes those at which samples are drawn."""
    if settings.get("decoder_time_embedding_type", "learned") == "learned":
        steps = settings.get("decoder_num_train_timesteps", ConsistencyDecoding.N_STEPS)
        if steps < ConsistencyDecoding.N_STEPS:
            raise ValueError(f"it decodes at {ConsistencyDecoding.STEPS} of {ConsistencyDecoding.N_STEPS} steps")


@contextlib.contextmanager
def _siglip_of_earlier_transformers() -> Iterator[None]:
    """Provide `vision_model` for diffusers 0.42, which transformers merged into the parent module after 5.4."""
    siglip: Any = importlib.import_module("transformers").SiglipVisionModel
    merged = "vision_model" not in inspect.getsource(siglip.__init__)
    if merged:
        siglip.vision_model = property(lambda model: model)
    try:
        yield
    finally:
        if merged:
            del siglip.vision_model


def read(folder: Path) -> Any:
    """Load a model that `save_pretrained` has written, only from safetensors files, which limit its size.

    Raises:
        AezooError: as `check_config` and `copy_weights`; or the folder has no safetensors file of one model.
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
    except Exception as error:  # a damaged file can cause any error
        raise AezooError(f"cannot read {folder / WEIGHTS} as {name}: {_brief(error)}; save it again") from error
    with weights.limit_parameters(state):
        net = build(name, config, (0, 0, 0))
    if name == RAE:
        fit_statistics(net, state)
    copy_weights(net.state_dict(), state, str(folder / WEIGHTS))
    return net.train()


def check_config(config: object, what: str) -> tuple[str, dict[str, Any]]:
    """Return the kind and all arguments in a model's `config.json`, with the class's defaults for omitted arguments.

    Args:
        config: content of the file.
        what: the file or its folder, for messages.

    Raises:
        AezooError: as in `kind_of`; the model name is missing; third-party code is needed; or an argument is not plain.
    """
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(name, str):
        raise AezooError(f"{what} has no model name: it was not written by a model of diffusers")
    if config.get("quantization_config"):
        raise AezooError(f"{what} is quantised, which needs third-party code: give the model from which it was made")
    if config.get("auto_map"):
        raise AezooError(f"{what} is refused: its auto_map specifies other code to run instead of {name}")
    parameters = inspect.signature(kind_of(name).__init__).parameters
    known = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
    given = {key: value for key, value in config.items() if key in parameters}
    if name == RAE:
        given |= dict.fromkeys(STATISTICS)  # they are in the weights, too
    return name, values.check_plain(known | given, f"{what}: its arguments")


def copy_weights(own: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Copy weights from a file to a model.

    Args:
        own: state dict of the model.
        given: weights from the file.
        what: the file, for messages.

    Raises:
        AezooError: a name, shape or data type does not fit.
    """
    if "decoder.decoder_embed.weight" in own:  # AutoencoderRAE
        given = {name: given[key] for key, name in own_names(own, given).items()}
    else:
        given = {_NAMES_OF_ATTENTION.sub(lambda found: _ATTENTION[found[1]], key): v for key, v in given.items()}
    keys = {"has no": own.keys() - given.keys(), "has unknown": given.keys() - own.keys()}
    for problem, names in keys.items():
        if names:
            raise AezooError(f"{what} does not fit its {CONFIG}: it {problem} {_brief(', '.join(sorted(names)))}")
    for key, value in own.items():
        # attention layers used to be 1x1 convolutions
        found = given[key].squeeze((2, 3)) if value.ndim == 2 and given[key].shape[2:] == (1, 1) else given[key]
        if found.shape != value.shape:
            raise AezooError(
                f"{what} does not fit its {CONFIG}: {key} has the shape {tuple(found.shape)}, not {tuple(value.shape)}"
            )
        if value.is_floating_point() and found.dtype not in _FLOATS:
            raise AezooError(
                f"{what} contains {key} as {str(found.dtype).removeprefix('torch.')}, whose scale is not in it: use "
                "the file in float32, float16 or bfloat16"
            )
        with torch.no_grad():
            value.copy_(found)


def _read_config(folder: Path) -> object:
    """Return the content of a folder's `config.json`.

    Raises:
        AezooError: the file does not exist or is not JSON.
    """
    if not (folder / CONFIG).is_file():
        raise AezooError(
            f"{folder} has no {CONFIG}: give the folder of a model of diffusers on this disk, of a pipeline its vae; "
            "`aezoo import hf://NAME OUT` fetches one"
        )
    return json_files.read(folder / CONFIG, MAX_CONFIG, str(folder / CONFIG))


class LatentScaling:
    """Scales codes for a diffusion model, and back: (B, D, H, W) -> (B, D, H, W).

    scale (z - shift), with the factors in the model's config: `scaling_factor` and `shift_factor`, or, for each
    channel, `scaling_factor` / `latents_std` and `latents_mean`. AutoencoderKLFlux2 has the mean and variance of each
    value of a patch instead, as buffers. Codes of AutoencoderRAE are already scaled.

    Args:
        decoder: the decoder of a model, which has these buffers.
    """

    def __init__(self, decoder: SplitModule) -> None:
        config, norm = decoder.net.config, decoder.net._modules.get("bn")
        if type(decoder.net).__name__ == RAE:
            self.shift, self.scale = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
            return
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
        """Return the codes for `decode`, the inverse of `__call__`."""
        return (z / _on_grid(self.scale, z) + _on_grid(self.shift, z)).to(z)


def _on_grid(patch: Tensor, z: Tensor) -> Tensor:
    """Repeat a patch over the grid of codes, (D or 1, h, w) -> (D or 1, H, W); unchanged for one value per channel."""
    if patch.shape[1:] == (1, 1):
        return patch.to(z.device)
    repeats = [-(-n // m) for n, m in zip(z.shape[2:], patch.shape[1:], strict=True)]
    return patch.to(z.device).repeat(1, *repeats)[:, : z.shape[2], : z.shape[3]]


def config_of(net: Any) -> dict[str, Any]:
    """Return all arguments of a model's class as plain values, from which `build` can recreate it."""
    config: dict[str, Any] = json.loads(json.dumps({key: net.config[key] for key in _arguments(type(net))}))
    return config


def whole_config(net: Any) -> dict[str, Any]:
    """Return `config_of` with the statistics of codes, from which diffusers derives shapes of weights."""
    config = config_of(net)
    if type(net).__name__ == RAE:
        config |= {argument: net.get_buffer(name).tolist() for argument, name in STATISTICS.items()}
    return config


def code_shape(
    encoder: SplitModule, decoder: SplitModule, input_shape: tuple[int, ...], gaussian: bool
) -> tuple[int, ...]:
    """Return the shape of a code, computed from shapes only.

    Args:
        encoder: the encoder of a model.
        decoder: the decoder of the same model.
        input_shape: (C, H, W).
        gaussian: whether half of the encoder's channels are log-variances.

    Raises:
        AezooError: the model does not accept such samples, or returns another shape.
    """
    name = type(encoder.net).__name__
    if name in (RAE, CONSISTENCY) and input_shape[0] != 3:
        raise AezooError(f"{name} takes 3 channels, got {input_shape}: give --data.channels 3")
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
    if name == RAE and x_hat.shape[1:] != input_shape:
        size = x_hat.shape[2]
        raise AezooError(f"this {name} gives {(*x_hat.shape[1:],)} back for {input_shape}: give --data.size {size}")
    if x_hat.shape[1:] != input_shape:
        factors = [max(n // m, 1) for n, m in zip(x_hat.shape[2:], z.shape[2:], strict=True)]
        sides = " and ".join(map(str, dict.fromkeys(factors)))
        raise AezooError(
            f"this {name} gives {tuple(x_hat.shape[1:])} back for {input_shape}: use sides that are multiples of "
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
