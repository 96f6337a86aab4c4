"""Masked autoencoders as the model `mae`: checkpoints of the authors, and folders of transformers' ViTMAE.

All weights are copied except two biases, whose removal is exact: a bias of keys adds the same value to all scores of a
query, and a bias of values adds a constant to the output of the attention.
"""

import argparse
import contextlib
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aezoo import registry
from aezoo.errors import AezooError
from aezoo.io.importers import Imported
from aezoo.io.importers.source import WeightSource
from aezoo.nets.blocks import mae_layout
from aezoo.nets.vit import sinusoids
from aezoo.security import weights
from aezoo.training.seeding import forked_rng

NAME = "MAE (its authors' checkpoints and transformers' ViTMAE)"
_CONFIG = "config.json"
_FILES = ("model.safetensors", "pytorch_model.bin")
_ENCODER = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight"}
# heads of the authors' encoders have width 64, except ViT-H with 16 heads, and those of the decoders 32
_HUGE, _HEADS_OF_HUGE, _HEAD, _DECODER_HEAD = 1280, 16, 64, 32
_NEW_WIDTH, _NEW_DEPTH = 512, 8
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu"}
# tolerance for tables in half precision
_POSITION_TOLERANCE = 2e-3
_TOO_LARGE = "the file has far fewer weights than its shapes and names of blocks require"


def recognise(source: WeightSource) -> bool:
    """Return whether there is a configuration of ViTMAE, or one file with the authors' names and positions."""
    if _is_folder(source):
        return source.json(_CONFIG).get("model_type") == "vit_mae"
    name = _checkpoint(source)
    state = None if name is None else _state_in(source.content(name))
    if not isinstance(state, dict) or not state.keys() >= _ENCODER or not isinstance(state["pos_embed"], Tensor):
        return False
    # without a decoder, it may be another vision transformer, but these have trained positions
    return "mask_token" in state or ("head.weight" not in state and _has_sine_positions(state["pos_embed"]))


def read(source: WeightSource) -> Imported:
    """Read the model, see `aezoo.io.importers`."""
    if _is_folder(source):
        config, library = source.json(_CONFIG), "transformers' ViTMAE"
        name = next((name for name in _FILES if source.has(name)), None)
        if name is None:
            raise AezooError(f"{source.address} has no {' or '.join(_FILES)}: download the whole folder, unsharded")
        state = mae_layout.to_original(source.tensors(name))
    else:
        name = str(_checkpoint(source))
        content = source.content(name)
        arguments = content.get("args")
        config, library = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}, "MAE"
        state = weights.check_tensors(_state_in(content), Path(source.address), "mae")
    given = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    return _Reader(f"{source.address}: {name}", given, config).read(library)


def _is_folder(source: WeightSource) -> bool:
    return source.given in (None, _CONFIG, *_FILES) and source.has(_CONFIG)


def _checkpoint(source: WeightSource) -> str | None:
    """Return the file that may be a checkpoint of the authors, if any."""
    return source.one_file(".pth", ".pt") or source.one_file(".safetensors")


def _state_in(content: Any) -> Any:
    return content.get("model", content) if isinstance(content, dict) else content


def _has_sine_positions(table_1ND: Tensor) -> bool:
    if table_1ND.ndim != 3 or table_1ND.shape[1] < 2 or table_1ND.shape[2] % 4:
        return False
    side = math.isqrt(table_1ND.shape[1] - 1)
    expected_ND = torch.cat([torch.zeros(1, table_1ND.shape[2]), sinusoids((side, side), table_1ND.shape[2], True)])
    fits = expected_ND.shape == table_1ND.shape[1:]
    return fits and torch.allclose(table_1ND[0].float(), expected_ND, rtol=0, atol=_POSITION_TOLERANCE)


class _Reader:
    """Weights by the authors' names, which are removed one by one.

    Args:
        label: the file, for messages.
        state: the weights.
        config: that of transformers, or the settings of a training script of the authors.

    Attributes:
        notes: notes for the user of the model.
    """

    def __init__(self, label: str, state: dict[str, Tensor], config: dict[str, Any]) -> None:
        self.label, self.state, self.config = label, dict(state), config
        self.notes: list[str] = []

    def read(self, library: str) -> Imported:
        whole = "mask_token" in self.state
        shape, settings = self.settings(whole)
        with forked_rng(torch.device("cpu")), weights.limit_parameters(self.state, _TOO_LARGE):
            # before memory is allocated
            with contextlib.suppress(RuntimeError, NotImplementedError), torch.device("meta"):
                registry.create_model("mae", shape, **settings)
            torch.manual_seed(0)  # for weights that the file does not contain
            model: Any = registry.create_model("mae", shape, **settings)
        with torch.no_grad():
            self.fill_encoder(model)
            if whole:
                self.fill_decoder(model.decoder)
        if self.state:
            raise AezooError(f"{self.label} is not an MAE: it also has {', '.join(sorted(self.state)[:3])}")
        sizes = f"width {settings['width']}, {settings['depth']} blocks, patches of {settings['patch_size']}"
        parts = "encoder and decoder" if whole else "encoder"
        return Imported(model.eval(), f"{library}, {parts}, {sizes}, images of {shape}", tuple(self.notes))

    def settings(self, whole: bool) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Return the shape of a sample and the arguments of `mae`."""
        width, channels, *patch = self.state["patch_embed.proj.weight"].shape
        depth, decoder_depth = (self.count(f"{name}.") for name in ("blocks", "decoder_blocks"))
        n = self.state["pos_embed"].shape[-2] - 1
        sides = [patch[0] * math.isqrt(n)] * 2
        if len(patch) != 2 or patch[0] != patch[1] or math.isqrt(n) ** 2 != n or n < 2:
            raise AezooError(f"{self.label} has {n} patches of {patch}: mae reads square patches of square images")
        ratio = self.number("mask_ratio", 0.75)
        act = self.config.get("hidden_act", "gelu")
        if act not in _ACTIVATIONS or not 0 < ratio < 1:
            raise AezooError(f"{self.label}: mae does not support hidden_act {act!r} with mask_ratio {ratio}")
        found: dict[str, Any] = {
            "patch_size": patch[0], "width": width, "depth": depth, "activation": _ACTIVATIONS[act],
            "heads": self.number("num_attention_heads", _HEADS_OF_HUGE if width == _HUGE else max(1, width // _HEAD)),
            "norm_eps": self.number("layer_norm_eps", 1e-6), "norm_pix": bool(self.config.get("norm_pix_loss", False)),
            # the authors round the number of visible patches down, aezoo that of masked patches
            "mask_ratio": (n - int(n * (1 - ratio))) / n,
            "class_token": True, "input_norm": "imagenet" if channels == 3 else "none", "likelihood": "gaussian",
            "decoder_width": self.state["mask_token"].shape[-1] if whole else min(width, _NEW_WIDTH),
            "decoder_depth": decoder_depth if whole else _NEW_DEPTH,
        }  # fmt: skip
        usual = max(1, found["decoder_width"] // _DECODER_HEAD)
        found["decoder_heads"] = self.number("decoder_num_attention_heads", usual) if whole else usual
        if found["norm_pix"]:
            self.notes.append(
                "the decoder predicts normalised patches; the head for their mean and deviation is untrained"
            )
        if not whole:
            self.notes.append("the file has no decoder: the decoder of the model is untrained")
        if channels != 3:
            self.notes.append(f"{channels} channels have no ImageNet mean and deviation: give normalised samples")
        return (channels, *sides), found

    def count(self, start: str) -> int:
        """Return the number of blocks."""
        return len({match[1] for key in self.state if (match := re.match(rf"{re.escape(start)}(\d+)\.", key))})

    def number(self, name: str, default: float) -> Any:
        """Return a number from the configuration."""
        value = self.config.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise AezooError(f"{self.label}: {name} is {value!r}, not a number")
        return value

    # ---- weights -----------------------------------------------------------------------------------------------------

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor, reshaped to a shape with the same number of values."""
        tensor = self.state.pop(name, None)
        if tensor is None:
            raise AezooError(f"{self.label} has no {name}: it is damaged, or another model")
        if tensor.numel() != math.prod(shape):
            raise AezooError(f"{self.label}: {name} has shape {tuple(tensor.shape)}, but the others require {shape}")
        return tensor.reshape(shape)

    def copy(self, parameter: Tensor, name: str) -> None:
        parameter.copy_(self.take(name, tuple(parameter.shape)))

    def copy_layer(self, layer: Any, name: str) -> None:
        self.copy(layer.weight, f"{name}.weight")
        self.copy(layer.bias, f"{name}.bias")

    def copy_blocks(self, layers: list[Any], start: str) -> None:
        for i, block in enumerate(layers):
            name, (width,) = f"{start}.{i}", block.norm_1.weight.shape
            self.copy_layer(block.norm_1, f"{name}.norm1")
            self.copy_layer(block.norm_2, f"{name}.norm2")
            self.copy_layer(block.mlp[0], f"{name}.mlp.fc1")
            self.copy_layer(block.mlp[2], f"{name}.mlp.fc2")
            self.copy_layer(block.attention.out, f"{name}.attn.proj")
            self.copy(block.attention.qkv.weight, f"{name}.attn.qkv.weight")
            if f"{name}.attn.qkv.bias" in self.state:
                of_q, _, of_v = self.take(f"{name}.attn.qkv.bias", (3 * width,)).double().chunk(3)
                block.attention.bias_q.copy_(of_q)
                # the attention weights of a query sum to 1
                out = block.attention.out
                out.bias.copy_(out.bias.double() + out.weight.double() @ of_v)

    def copy_positions(self, table_ND: Tensor, name: str) -> Tensor:
        """Copy the positions of patches; return that of the class token."""
        first_1D, places_ND = self.take(name, (1 + len(table_ND), table_ND.shape[1])).split([1, len(table_ND)])
        table_ND.copy_(places_ND)
        return first_1D[0]

    def fill_encoder(self, model: Any) -> None:
        embed, layers, _ = model.encoder.children()
        *_, patches, positions = embed.children()
        first, *blocks, norm = layers.children()
        self.copy(patches.weight, "patch_embed.proj.weight")
        self.copy(patches.bias, "patch_embed.proj.bias")
        self.copy(first.token, "cls_token")
        first.token.add_(self.copy_positions(positions.table_ND, "pos_embed"))
        self.copy_blocks(blocks, "blocks")
        self.copy_layer(norm, "norm")

    def fill_decoder(self, decoder: Any) -> None:
        *blocks, norm = decoder.blocks.children()
        if self.copy_positions(decoder.positions.table_ND, "decoder_pos_embed").any():
            raise AezooError(f"{self.label}: decoder_pos_embed has a position for the class token, unlike that of MAE")
        self.copy_layer(decoder.embed, "decoder_embed")
        self.copy(decoder.mask_token, "mask_token")
        self.copy_blocks(blocks, "decoder_blocks")
        self.copy_layer(norm, "decoder_norm")
        # values of a patch are ordered (position, channel) in the file and (channel, position) in aezoo
        channels, *sides = decoder.patchify.input_shape[:1] + decoder.patchify.sides
        for name, parameter in decoder.out.named_parameters():
            rows = self.take(f"decoder_pred.{name}", tuple(parameter.shape))
            parameter.copy_(rows.unflatten(0, (*sides, channels)).movedim(2, 0).flatten(0, 2))
        if decoder.scale is not None:
            decoder.scale.weight.zero_()
            decoder.scale.bias.copy_(torch.tensor([0.0, 1.0]))
