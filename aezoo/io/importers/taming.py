"""First stages of taming-transformers and latent diffusion: VQGAN, KL and VQ autoencoders, Stable Diffusion.

The weights have the names of https://github.com/CompVis/taming-transformers: encoder.down.0.block.0.norm1.weight and so
on, in the checkpoint of an autoencoder, or with the prefix `first_stage_model.` in that of a diffusion model or
transformer, of which nothing else is read. Arguments are derived from shapes, except for the 32 groups of
normalisation, which are fixed. A YAML file next to the checkpoint, if any, is compared with it, and provides the size
of images and the scale of codes.

The networks are the same as those of AutoencoderKL and VQModel of diffusers, and become `diffusers_ae`.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from aezoo.errors import AezooError
from aezoo.io.importers import Imported
from aezoo.io.importers import diffusers as of_diffusers
from aezoo.io.importers.source import WeightSource
from aezoo.nets.blocks import diffusers
from aezoo.security import yaml_text

NAME = "taming-transformers and latent diffusion"
_MARK = "encoder.mid.block_1.norm1.weight"
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")
# losses and averages of a trainer, which the autoencoder does not need
_LEFT_OUT = ("loss.", "model_ema.")
_NAMES = (
    (r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
    (r"\.downsample\.conv\.", ".downsamplers.0.conv."),
    (r"\.upsample\.conv\.", ".upsamplers.0.conv."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(\.attentions\.\d+\.)norm\.", r"\1group_norm."),
    (r"(\.attentions\.\d+\.)proj_out\.", r"\1to_out.0."),
    (r"(\.attentions\.\d+\.)([qkv])\.", r"\1to_\2."),
    (r"\.norm_out\.", ".conv_norm_out."),
)
# tensors in a file other than those of the autoencoder -> factor and shift of codes
_DIFFUSION_MODELS = (
    ("conditioner.embedders.1.", "Stable Diffusion XL", 0.13025, 0.0),
    ("model.diffusion_model.joint_blocks.", "Stable Diffusion 3", 1.5305, 0.0609),
    ("model.diffusion_model.double_blocks.", "FLUX.1", 0.3611, 0.1159),
    ("cond_stage_model.transformer.text_model.", "Stable Diffusion 1", 0.18215, 0.0),
    ("cond_stage_model.model.transformer.", "Stable Diffusion 2", 0.18215, 0.0),
)


def recognise(source: WeightSource) -> bool:
    """Return whether a file has weights with the names of taming-transformers' encoder."""
    file = source.one_file(*of_diffusers.SUFFIXES)
    return file is not None and any(key.endswith(_MARK) for key in source.keys(file))


def read(source: WeightSource) -> Imported:
    """Read the model as `diffusers_ae`.

    Raises:
        AezooError: the weights, or the YAML file next to them, are not those of such an autoencoder, or are damaged;
            or diffusers is missing.
    """
    file = source.one_file(*of_diffusers.SUFFIXES)
    assert file is not None  # since the format was recognised
    what, keys = source.label(file), source.keys(file)
    prefix = _prefix(keys, what)
    state = {
        key.removeprefix(prefix): value
        for key, value in source.some_tensors(file, tuple(prefix + part for part in _PARTS)).items()
    }
    others = [key for key in keys if key.startswith(prefix) and not key.startswith(tuple(prefix + p for p in _PARTS))]
    _check_kind(state, [key.removeprefix(prefix) for key in others] if prefix else others, what)
    state = _renamed(state, what)
    name, arguments = of_diffusers.infer_arguments(state, what)
    notes = []
    if prefix:
        notes.append(f"only {prefix.rstrip('.')} is read, not the model that works on its codes")
    if any(key.endswith("model_ema.decay") for key in keys):
        notes.append("these are the trained weights; their moving averages in the file are not read")
    config = _config(source)
    scale, shift, of = _scale(source, file, keys, config)
    if config is not None:
        yaml, params = config
        _check_config(params.get("ddconfig", {}), name, arguments, yaml, what)
        if isinstance(resolution := params.get("ddconfig", {}).get("resolution"), int):
            arguments["sample_size"] = resolution
    arguments["scaling_factor"] = 1.0 if scale is None else scale
    if name == "AutoencoderKL" and shift:
        arguments["shift_factor"] = shift
    model = of_diffusers.host(*diffusers.check_config({"_class_name": name, **arguments}, what), state, what)
    notes.append(of_diffusers.UNKNOWN_SCALE if scale is None else f"{of_diffusers.scale_note(model)}{of}")
    return Imported(
        model, f"a first stage in the layout of taming-transformers, {of_diffusers.described(model)}", tuple(notes)
    )


def _prefix(keys: Iterable[str], what: str) -> str:
    """Return the prefix of the names of the autoencoder's weights: none, `first_stage_model.` or `vae.`."""
    found = sorted({key.removesuffix(_MARK) for key in keys if key.endswith(_MARK)})
    chosen = [prefix for prefix in ("", "first_stage_model.", "vae.") if prefix in found] or found
    if len(chosen) > 1 and "" not in chosen and len(found) > 1 and "first_stage_model." not in found:
        raise AezooError(f"{what} contains several autoencoders: {', '.join(found)}")
    return chosen[0]


def _check_kind(state: Mapping[str, Tensor], others: list[str], what: str) -> None:
    """Reject models that VQModel and AutoencoderKL cannot represent."""
    if "quantize.embed.weight" in state or "quantize.proj.weight" in state:
        raise AezooError(
            f"{what} is a Gumbel VQGAN, which draws its codes at random: no model of aezoo does that with its networks"
        )
    if "quantize.used" in state:
        raise AezooError(f"{what} renumbers its codes (remap, quantize.used): import a checkpoint without remap")
    if "colorize" in others:
        raise AezooError(f"{what} is a VQGAN of segmentation maps, whose values are labels and not images")
    if unknown := [key for key in others if not key.startswith(_LEFT_OUT)]:
        raise AezooError(f"{what} has unknown weights: {', '.join(unknown[:5])[:200]}")


def _renamed(state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Return the weights by their names in diffusers, where the decoder's stages are counted from the code."""
    ups = [int(found[1]) for key in state if (found := re.match(r"decoder\.up\.(\d{1,4})\.", key))]
    last = max(ups, default=0)
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        key = re.sub(r"^decoder\.up\.(\d{1,4})\.", lambda found: f"decoder.up_blocks.{last - int(found[1])}.", key)
        for pattern, new in _NAMES:
            key = re.sub(pattern, new, key)
        if key in renamed:
            raise AezooError(f"{what} contains {key} under two names: download it again")
        renamed[key] = value
    return renamed


def _config(source: WeightSource) -> tuple[str, dict[str, Any]] | None:
    """Return the YAML file that describes the autoencoder, and the parameters in it."""
    for name in source.names:
        if not name.endswith((".yaml", ".yml")) or "/" in name:
            continue
        params = _params(yaml_text.read(source.path(name)))
        first = params.get("first_stage_config")
        inner = first.get("params", {}) if isinstance(first, dict) else params
        if isinstance(inner, dict) and isinstance(inner.get("ddconfig"), dict):
            return source.label(name), {**inner, "scale_factor": params.get("scale_factor")}
    return None


def _params(config: Any) -> dict[str, Any]:
    for key in ("model", "params"):
        config = config.get(key) if isinstance(config, dict) else None
    return config if isinstance(config, dict) else {}


def _check_config(dd: dict[str, Any], name: str, arguments: Mapping[str, Any], yaml: str, what: str) -> None:
    """Reject a configuration of other weights, or of unsupported layers without weights."""
    ch, mult = dd.get("ch"), dd.get("ch_mult")
    widths = None
    if isinstance(ch, int) and isinstance(mult, list) and all(isinstance(n, int) for n in mult):
        widths = [ch * n for n in mult]
    said = {
        "z_channels": (dd.get("z_channels"), arguments["latent_channels"]),
        "in_channels": (dd.get("in_channels"), arguments["in_channels"]),
        "out_ch": (dd.get("out_ch"), arguments["out_channels"]),
        "num_res_blocks": (dd.get("num_res_blocks"), arguments["layers_per_block"]),
        "double_z": (dd.get("double_z"), name == "AutoencoderKL"),
        "ch times ch_mult": (widths, arguments["block_out_channels"]),
    }
    for key, (stated, found) in said.items():
        if stated is not None and stated != found:
            raise AezooError(
                f"{yaml} does not describe {what}: {key} is {str(stated)[:50]} there, {found} in the weights"
            )
    for key, other in {"tanh_out": False, "give_pre_end": False, "resamp_with_conv": True}.items():
        if dd.get(key, other) is not other:
            raise AezooError(f"{yaml} sets {key}, which the networks of diffusers do not support")


def _scale(
    source: WeightSource, file: str, keys: tuple[str, ...], config: tuple[str, dict[str, Any]] | None
) -> tuple[float | None, float, str]:
    """Return factor and shift of codes and their source, if in the file or if the diffusion model is recognised."""
    stated: Any = None
    if "scale_factor" in keys:
        found = source.some_tensors(file, ("scale_factor",)).get("scale_factor")
        stated = float(found) if found is not None and found.numel() == 1 else None
        where = "its weights"
    elif config is not None:
        stated, where = config[1].get("scale_factor"), config[0]
    if isinstance(stated, float | int) and math.isfinite(stated) and stated > 0:
        return float(stated), 0.0, f" (of {where})"
    for start, diffusion_model, scale, shift in _DIFFUSION_MODELS:
        if any(key.startswith(start) for key in keys):
            return scale, shift, f" (those of {diffusion_model})"
    return None, 0.0, ""
