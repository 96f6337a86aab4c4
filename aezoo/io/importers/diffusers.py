"""Image autoencoders of Hugging Face's diffusers: folders, pipelines, weights in one or several files, single files.

A folder contains weights and `config.json` with the class and its arguments. A pipeline contains `model_index.json`
with the class of each component, including the autoencoder. A single file contains only weights, and the arguments
are determined by their names and shapes: those of AutoencoderKL and VQModel, or of AutoencoderDC as in
https://github.com/dc-ai-projects/DC-Gen, see https://github.com/mit-han-lab/efficientvit. For the layout of latent
diffusion, see `aezoo.io.importers.taming`.

Weights become `diffusers_ae`, with the class of diffusers inside.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from aezoo import registry
from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError
from aezoo.io.importers import Imported
from aezoo.io.importers.source import WeightSource
from aezoo.nets.blocks import diffusers, split_diffusers
from aezoo.security import weights
from aezoo.training.seeding import forked_rng

NAME = "diffusers"
INDEX = "model_index.json"
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
UNKNOWN_SCALE = (
    "the file does not state the factor by which a diffusion model scales codes: model.standardiser does not change "
    "them (Stable Diffusion 1 and 2 0.18215, XL 0.13025, 3 1.5305 after a shift of 0.0609, FLUX.1 0.3611 after 0.1159)"
)
# default size of images, if not in the config or set by the user; weights do not depend on it
_SIDE, _LARGEST_SIDE, _MOST_CHANNELS = 256, 2048, 1024
_STEM = "diffusion_pytorch_model"


def recognise(source: WeightSource) -> bool:
    """Return whether the files, or a single file of weights, are from a supported class of diffusers."""
    if _folder_of(source) is not None:
        return True
    name = source.one_file(*SUFFIXES)
    keys = () if name is None else source.keys(name)
    return _needs_config(keys) is not None or (
        any(key.startswith(("encoder.down_blocks.", "encoder.stages.", "encoder.project_in.")) for key in keys)
        and any(key.startswith("decoder.") for key in keys)
    )


def read(source: WeightSource) -> Imported:
    """Read the model as `diffusers_ae`.

    Raises:
        AezooError: its class, configuration, weights or files are not supported; or diffusers is missing.
    """
    folder = _folder_of(source)
    if folder is None:
        return _read_single(source)
    config = source.json(f"{folder}{diffusers.CONFIG}", diffusers.MAX_CONFIG)
    name, arguments = diffusers.check_config(config, source.label(f"{folder}{diffusers.CONFIG}"))
    files = _weight_files(source, folder)
    state: dict[str, Tensor] = {}
    for file in files:
        part = source.tensors(file)
        if twice := sorted(state.keys() & part.keys()):
            raise AezooError(f"{source.label(file)} contains {twice[0]} a second time: download the files again")
        state |= part
    model = host(name, arguments, state, source.label(files[0]))
    of = f"the {folder.rstrip('/')} of a pipeline of " if folder else ""
    return Imported(model, f"{of}diffusers, {described(model)}", _notes(model, folder, files))


def host(name: str, arguments: dict[str, Any], state: Mapping[str, Tensor], what: str) -> Autoencoder:
    """Build a model of a class of diffusers with given weights, in eval mode, for images of the size in its config.

    Args:
        name: the class.
        arguments: all of its arguments.
        state: weights by their names in diffusers.
        what: the file, for messages.

    Raises:
        AezooError: the class does not take the arguments, or the weights do not fit.
    """
    channels = arguments.get("in_channels", 3)
    if not isinstance(channels, int) or not 0 < channels <= _MOST_CHANNELS:
        raise AezooError(
            f"{what}: in_channels of its {diffusers.CONFIG} is {str(channels)[:50]}, not a number of channels"
        )
    sides = arguments.get("sample_size")
    if name == split_diffusers.RAE:
        sides = _side_of_decoder(arguments)
    sides = sides if isinstance(sides, list | tuple) and len(sides) == 2 else [sides, sides]
    plausible = all(isinstance(side, int) and 0 < side <= _LARGEST_SIDE for side in sides)
    shapes = [(channels, *sides)] if plausible else []
    model: Any = None
    for shape in [*shapes, (channels, _SIDE, _SIDE)]:
        try:
            with weights.limit_parameters(state), forked_rng(torch.device("cpu")):
                model = registry.create_model("diffusers_ae", shape, kind=name, config=arguments)
            break
        except AezooError as error:
            failure = error  # the size may not be a multiple of the factor
    else:
        raise AezooError(f"{what}: {failure}") from failure
    if name == split_diffusers.RAE:
        split_diffusers.fit_statistics(model.encoder.net, state)
    own = {**model.encoder.net.state_dict(), **model.decoder.net.state_dict()}
    diffusers.copy_weights(own, state, what)
    hosted: Autoencoder = model.eval()
    return hosted


def _side_of_decoder(arguments: dict[str, Any]) -> int | None:
    """Return the image side of AutoencoderRAE's output, or None if its arguments are invalid."""
    keys = ("encoder_input_size", "encoder_patch_size", "patch_size")
    size, patch, patch_of_decoder = (arguments.get(key) for key in keys)
    if not (isinstance(size, int) and isinstance(patch, int) and isinstance(patch_of_decoder, int) and patch > 0):
        return None
    return size // patch * patch_of_decoder


def described(model: Any) -> str:
    """Describe class, channels and codes of a model."""
    if len(model.code_shape) == 2:
        n, width = model.code_shape
        return f"{model.kind}, {model.input_shape[0]} channels, codes of {n} tokens of {width} values"
    sides, places = model.input_shape[1:], model.code_shape[1:]
    factor = " and ".join(map(str, dict.fromkeys(n // m for n, m in zip(sides, places, strict=True))))
    return f"{model.kind}, {model.input_shape[0]} channels, codes of {model.code_shape[0]} channels, sides / {factor}"


def scale_note(model: Any) -> str:
    """Describe how a diffusion model scales codes, in one line."""
    config = model.decoder.net.config
    if model.kind == split_diffusers.RAE:
        return "its codes are normalised for a diffusion model, by the mean and the standard deviation in its weights"
    names = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    known = {key: config.get(key) for key in names if config.get(key) not in (None, 0.0)}
    factors = ", ".join(f"{key} {value:g}" if isinstance(value, float | int) else key for key, value in known.items())
    if "bn" in model.decoder.net._modules:
        factors = "the mean and variance in its weights"
    if not factors:
        return "its config does not state how a diffusion model scales codes: model.standardiser does not change them"
    return f"model.standardiser(z) gives codes for a diffusion model, with {factors}"


def infer_arguments(state: Mapping[str, Tensor], what: str) -> tuple[str, dict[str, Any]]:
    """Determine class and arguments of AutoencoderKL or VQModel from the names and shapes of weights.

    Groups of 32 channels for normalisation are assumed, as in all published weights; they are not in the file.

    Raises:
        AezooError: some are missing.
    """

    def shape(key: str) -> tuple[int, ...]:
        if key not in state or state[key].ndim < 2:
            raise AezooError(f"{what} has no {key} of convolutions or linear layers: it is not a whole autoencoder")
        return tuple(state[key].shape)

    sides: dict[str, list[int]] = {
        side: _numbers(state, rf"{part}\.{side}_blocks\.(\d+)\.")
        for part, side in (("encoder", "down"), ("decoder", "up"))
    }
    down, up = sides["down"], sides["up"]
    widths = [shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in down]
    blocks = {
        "down_block_types": [
            f"{'Attn' if f'encoder.down_blocks.{i}.attentions.0.to_q.weight' in state else ''}DownEncoderBlock2D"
            for i in down
        ],
        "up_block_types": [
            f"{'Attn' if f'decoder.up_blocks.{i}.attentions.0.to_q.weight' in state else ''}UpDecoderBlock2D"
            for i in up
        ],
    }
    book = "quantize.embedding.weight"
    z = shape("encoder.conv_out.weight")[0]
    arguments = {
        **blocks,
        "block_out_channels": widths,
        "layers_per_block": len(_numbers(state, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.")),
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "latent_channels": z if book in state else z // 2,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in state,
        "norm_num_groups": 32,
        "scaling_factor": 1.0,
        "sample_size": _SIDE,
    }
    if book in state:
        n, d = shape(book)
        return "VQModel", {**arguments, "num_vq_embeddings": n, "vq_embed_dim": d}
    convs = {f"use_{part}": f"{part}.weight" in state for part in ("quant_conv", "post_quant_conv")}
    return "AutoencoderKL", {**arguments, **convs}


def _numbers(keys: Iterable[str], pattern: str) -> list[int]:
    """Return the sorted numbers at one position of names."""
    found = (re.match(pattern, key) for key in keys)
    return sorted({int(match[1]) for match in found if match})


def _folder_of(source: WeightSource) -> str | None:
    """Return the folder of a diffusers `config.json`: "", a folder of a pipeline such as "vae/", or None."""
    if _names_a_class(source, diffusers.CONFIG):
        return ""
    if source.given not in (None, INDEX):
        return None
    if source.has(INDEX):
        return f"{_component(source)}/"
    return "vae/" if _names_a_class(source, f"vae/{diffusers.CONFIG}") else None


def _names_a_class(source: WeightSource, config: str) -> bool:
    """Return whether there is such a file of diffusers; unreadable files are reported elsewhere."""
    try:
        return source.has(config) and "_class_name" in source.json(config, diffusers.MAX_CONFIG)
    except AezooError:
        return False


def _component(source: WeightSource) -> str:
    """Return the component of a pipeline that is an autoencoder.

    Raises:
        AezooError: none or several are.
    """
    kinds = {name: kind[1] for name, kind in source.json(INDEX).items() if isinstance(kind, list) and len(kind) == 2}
    known = [name for name, kind in kinds.items() if kind in (*diffusers.KINDS, *diffusers.REFUSED)]
    chosen = [name for name in known if name == "vae"] or known
    if len(chosen) != 1:
        have = f"several, {', '.join(known)}: give the folder of one" if known else "none"
        raise AezooError(f"{source.address} is a pipeline of diffusers; autoencoders in it: {have}")
    if not source.has(f"{chosen[0]}/{diffusers.CONFIG}"):
        raise AezooError(f"{source.address} has no {chosen[0]}/{diffusers.CONFIG}, which its {INDEX} names")
    return chosen[0]


def _weight_files(source: WeightSource, folder: str) -> list[str]:
    """Return the weight files of a folder: one, or those in an index.

    Raises:
        AezooError: there are none, several variants, or the index names other files than weights in its folder.
    """
    if source.given is not None and source.given.endswith(SUFFIXES):
        return [source.given]
    for suffix in (".safetensors", ".bin"):
        if source.has(f"{folder}{_STEM}{suffix}"):
            return [f"{folder}{_STEM}{suffix}"]
        index = f"{folder}{_STEM}{suffix}.index.json"
        if source.has(index):
            return _shards(source, folder, index, suffix)
        start = f"{folder}{_STEM}."
        variants = [name for name in source.names if name.startswith(start) and name.endswith(suffix)]
        if len(variants) == 1:
            return variants
        if variants:
            raise AezooError(f"{source.address} has weights in several variants: give one of {', '.join(variants)}")
    raise AezooError(f"{source.address} has no weights {folder}{_STEM}.safetensors beside its {diffusers.CONFIG}")


def _shards(source: WeightSource, folder: str, index: str, suffix: str) -> list[str]:
    places = source.json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise AezooError(f"{source.label(index)} names no files: download it again")
    names = sorted(set(places.values()))
    for name in names:
        if PurePosixPath(name).name != name or not name.endswith(suffix):
            raise AezooError(f"{source.label(index)} is refused: {name[:100]!r} is not a {suffix} file beside it")
        if not source.has(f"{folder}{name}"):
            raise AezooError(f"{source.address} has no {folder}{name}, which its index names: download it too")
    return [f"{folder}{name}" for name in names]


def _notes(model: Any, folder: str, files: list[str]) -> tuple[str, ...]:
    of = [name.removeprefix(folder) for name in files]
    weights_in = of[0] if len(of) == 1 else f"{len(of)} files, from {of[0]} on"
    sides = "x".join(map(str, model.input_shape[1:]))
    others = "no other sizes" if model.kind == split_diffusers.RAE else "other sizes"
    notes = (f"weights from {weights_in}; built for images of {sides}, accepts {others}", scale_note(model))
    if model.kind == split_diffusers.CONSISTENCY:
        return (*notes, "a code is decoded from the same noise each time: model.decoder.draw(z) draws it")
    return notes


# ---- single files ----------------------------------------------------------------------------------------------------

# names of DC-AE's authors -> names in diffusers, in the order of replacement
_DC_NAMES = (
    (r"\.main\.", "."),
    (r"\.op_list\.", "."),
    (r"\.context_module\.", ".attn."),
    (r"\.local_module\.", ".conv_out."),
    (r"\.aggreg\.(\d+)\.0\.", r".to_qkv_multiscale.\1.proj_in."),
    (r"\.aggreg\.(\d+)\.1\.", r".to_qkv_multiscale.\1.proj_out."),
    (r"\.depth_conv\.conv\.", ".conv_depth."),
    (r"\.inverted_conv\.conv\.", ".conv_inverted."),
    (r"\.point_conv\.conv\.", ".conv_point."),
    (r"\.(?:point_conv|conv2)\.norm\.", ".norm."),
    (r"\.conv([12])\.conv\.", r".conv\1."),
    (r"\.conv\.conv\.", ".conv."),
    (r"\.proj\.norm\.", ".norm_out."),
    (r"\.proj\.conv\.", ".to_out."),
    (r"^encoder\.stages\.", "encoder.down_blocks."),
    (r"^decoder\.stages\.", "decoder.up_blocks."),
    (r"^encoder\.project_out\.0\.conv\.", "encoder.conv_out."),
    (r"^decoder\.project_in\.conv\.", "decoder.conv_in."),
    (r"^decoder\.project_out\.0\.", "decoder.norm_out."),
)


def _needs_config(keys: Iterable[str]) -> str | None:
    """Return a class whose weights do not determine its arguments, such as the number of heads or groups."""
    marks = {
        "decoder_unet.conv_in.weight": split_diffusers.CONSISTENCY,
        "decoder.trainable_cls_token": split_diffusers.RAE,
    }
    return next((marks[key] for key in keys if key in marks), None)


def _read_single(source: WeightSource) -> Imported:
    file = source.one_file(*SUFFIXES)
    assert file is not None  # since the format was recognised
    what = source.label(file)
    if kind := _needs_config(source.keys(file)):
        raise AezooError(
            f"{what} contains weights of {kind}, which do not determine its arguments: put its config.json beside it"
        )
    state = source.some_tensors(file, ("",))
    if (
        any(key.startswith("encoder.down_blocks.") for key in state)
        and "encoder.mid_block.resnets.0.conv1.weight" in state
    ):
        name, arguments = infer_arguments(state, what)
    else:
        state = _renamed_dc(state)
        name, arguments = "AutoencoderDC", _infer_dc(state, what)
    model = host(*diffusers.check_config({"_class_name": name, **arguments}, what), state, what)
    return Imported(model, f"weights of diffusers' {described(model)}", (UNKNOWN_SCALE,))


def _renamed_dc(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        # the first stage may itself be a downsampling, whose convolution has no norm
        ends = {"encoder.project_in.": "encoder.conv_in.", "decoder.project_out.2.": "decoder.conv_out."}
        for old, new in ends.items():
            inside = "" if f"{old}conv.weight" in state else "conv."
            key = re.sub(rf"^{re.escape(old)}(?:main\.)?conv\.", new + inside, key)
        for pattern, new in _DC_NAMES:
            key = re.sub(pattern, new, key)
        if key.endswith(".qkv.conv.weight"):
            parts = zip("qkv", value.chunk(3), strict=False)
            renamed |= {key.replace(".qkv.conv.", f".to_{name}."): part for name, part in parts}
        else:
            renamed[key] = value
    return renamed


def _infer_dc(state: Mapping[str, Tensor], what: str) -> dict[str, Any]:
    """Determine the arguments of AutoencoderDC from the names and shapes of its weights in diffusers.

    Shortcuts past the first and the last layer are assumed, as in all published weights; they are not in the file.
    """
    found: dict[str, Any] = {"scaling_factor": 1.0}
    try:
        for part, blocks in (("encoder", "down"), ("decoder", "up")):
            stages = range(max(_numbers(state, rf"{part}\.{blocks}_blocks\.(\d+)\.")) + 1)
            each = [_dc_stage(state, f"{part}.{blocks}_blocks.{i}") for i in stages]
            # a first stage without layers is skipped, and its width is not in the file
            found[f"{part}_block_out_channels"] = [stage["width"] or each[1]["width"] for stage in each]
            for key, name in (("layers", "layers_per_block"), ("type", "block_types"), ("scales", "qkv_multiscales")):
                found[f"{part}_{name}"] = [stage[key] for stage in each]
            if part == "decoder":
                found["decoder_norm_types"] = [stage["norm"] for stage in each]
                found["decoder_act_fns"] = ["relu" if stage["norm"] == "batch_norm" else "silu" for stage in each]
        widths, layers = found["encoder_block_out_channels"], found["encoder_layers_per_block"]
        first = state.get("encoder.conv_in.weight", state.get("encoder.conv_in.conv.weight"))
        found["in_channels"] = first.shape[1]  # type: ignore[union-attr]
        found["latent_channels"] = state["encoder.conv_out.weight"].shape[0]
        i = next(i for i, n in enumerate(layers) if n)
        if i + 1 < len(widths):
            steps = state[f"encoder.down_blocks.{i}.{layers[i]}.conv.weight"].shape[0] * 4 == widths[i + 1]
            found["downsample_block_type"] = "pixel_unshuffle" if steps else "conv"
            up = state[f"decoder.up_blocks.{i}.0.conv.weight"].shape[0] == found["decoder_block_out_channels"][i]
            found["upsample_block_type"] = "interpolate" if up else "pixel_shuffle"
    except (KeyError, ValueError, AttributeError, IndexError, StopIteration) as error:
        raise AezooError(f"{what} is not a whole AutoencoderDC: {' '.join(str(error).split())[:100]}") from error
    return found


def _dc_stage(state: Mapping[str, Tensor], start: str) -> dict[str, Any]:
    keys = [key for key in state if key.startswith(f"{start}.")]
    residual = [key for key in keys if key.endswith(".conv2.weight")]
    attention = [key for key in keys if key.endswith(".attn.to_q.weight")]
    block = f"{attention[0].removesuffix('to_q.weight')}to_qkv_multiscale." if attention else ""
    scales = [key for key in keys if block and key.startswith(block) and key.endswith(".proj_in.weight")]
    widths = [state[key].shape[0] for key in residual] + [state[key].shape[1] for key in attention]
    return {
        "layers": len(residual) + len(attention),
        "width": widths[0] if widths else 0,
        "type": "EfficientViTBlock" if attention else "ResBlock",
        "scales": [state[key].shape[-1] for key in scales],
        "norm": "batch_norm" if any(key.endswith("running_mean") for key in keys) else "rms_norm",
    }
