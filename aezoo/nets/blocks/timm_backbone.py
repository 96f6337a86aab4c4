"""Backbones of timm (Wightman 2019, https://github.com/huggingface/pytorch-image-models), described by a text.

    timm:NAME[,OPTION][,OPTION=VALUE] ...       timm:resnet18.a1_in1k,pretrained,frozen

NAME is one of `timm.list_models(pretrained=True)` or of `timm.list_models()`. Options:

    pretrained          start from the weights of the name's tag, which timm downloads once
    pretrained=PATH     start from a file of weights, or a folder with such a file, of timm or a network's authors
    frozen              do not train the backbone
    img_size=N          resize samples to N x N; backbones with a fixed size use it by default
    out_indices=I:J     indices of the feature maps, from 0, or from -1 for the last
    decoder=KIND        see `aezoo.nets.timm`

All other options are arguments of timm's model, such as patch_size=4 or norm_layer=groupnorm. timm is imported when a
backbone is built.

BatchNorm uses stored statistics in training too, and only its scale and shift are trained, as usual in fine-tuning, so
samples do not depend on their batch, and results do not depend on the number of processes. In a new backbone, the
statistics are those of smooth random images.
"""

import contextlib
import difflib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from aezoo.errors import AezooError, install_hint
from aezoo.nets.blocks import mae_layout
from aezoo.nets.blocks.channel_norm import ChannelNorm
from aezoo.nets.build import TIMM
from aezoo.security import weight_files, weights
from aezoo.training.seeding import forked_rng

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FLAGS = {"true": True, "false": False, "": True}
# arguments that are set here, or would read or download files
_REFUSED = (
    *("features_only", "feature_cls", "in_chans", "num_classes", "global_pool", "pretrained_cfg", "cache_dir"),
    *("pretrained_cfg_overlay", "pretrained_model_args", "checkpoint_path", "scriptable", "exportable", "no_jit"),
    *("device", "dtype"),
)
# images for the initial statistics of BatchNorm: their number and the side of their random grid
_IMAGES, _COARSE = 16, 7
_FILES = (".safetensors", ".bin", ".pth", ".pt")
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")


@dataclass(frozen=True)
class Description:
    """The description of a backbone in a text.

    Attributes:
        name: timm's name, with or without a tag.
        pretrained: True for timm's weights, or the path of other weights.
        frozen: whether the backbone is not trained.
        img_size: side to which samples are resized; 0 to keep it, or to use the fixed size of a backbone.
        out_indices: indices of the feature maps; empty for timm's default.
        decoder: kind of the decoder.
        arguments: further arguments of timm's model.
    """

    name: str
    pretrained: bool | str = False
    frozen: bool = False
    img_size: int = 0
    out_indices: tuple[int, ...] = ()
    decoder: str = "conv"
    arguments: tuple[tuple[str, Any], ...] = ()


def parse(text: str) -> Description:
    """Parse a description.

    Raises:
        AezooError: an option is unknown or has an invalid value.
    """
    name, *options = text.removeprefix(TIMM).split(",")
    found: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    for option in options:
        key, _, value = (part.strip() for part in option.partition("="))
        if key in found or key in arguments or not key or key in _REFUSED:
            raise AezooError(f"net {text!r}: option {key!r} is given twice, or is not allowed")
        if key == "pretrained":
            found[key] = _FLAGS.get(value.lower(), value)
        elif key == "frozen" and value.lower() in _FLAGS:
            found[key] = _FLAGS[value.lower()]
        elif key == "img_size" and value.isdecimal() and int(value) > 0:
            found[key] = int(value)
        elif key == "out_indices" and value and all(i.removeprefix("-").isdecimal() for i in value.split(":")):
            found[key] = tuple(map(int, value.split(":")))
        elif key == "decoder" and value:
            found[key] = value
        elif key in Description.__dataclass_fields__:
            raise AezooError(f"net {text!r}: {key} cannot be {value!r}, see docs/networks.md")
        else:
            arguments[key] = _value(value)
    return Description(name, **found, arguments=tuple(arguments.items()))


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return _FLAGS.get(text.lower(), text)


@dataclass(frozen=True)
class Plan:
    """Properties of a backbone, known before it is built.

    Attributes:
        shapes: (C', H', W') of each map.
        size: (H, W) to which samples are resized; None to keep their size.
        getter: the class that extracts maps after the backbone's last normalisation; None without it.
    """

    shapes: tuple[tuple[int, ...], ...]
    size: tuple[int, int] | None
    getter: type | None


class Backbone(nn.Module):
    """Feature maps of images in [0, 1], from the shallowest to the deepest: (B, C, H, W) -> [(B, C', H', W'), ...].

    Samples are resized if the backbone has a fixed size or a size is given, and normalised as its weights require.

    Attributes:
        shapes: (C', H', W') of each map.

    Args:
        description: the result of `parse`.
        input_shape: (C, H, W).
        last_only: compute only the last map, after the backbone's last normalisation.

    Raises:
        AezooError: timm is not installed or has no such model or weights, or the model does not accept such samples.
    """

    def __init__(self, description: Description, input_shape: tuple[int, ...], last_only: bool = False) -> None:
        super().__init__()
        found = plan(description, input_shape, last_only)
        self.shapes, self.size, self.frozen = found.shapes, found.size, description.frozen
        self.norm = ChannelNorm(*_data_config(description.name, input_shape[0]))
        self.net = _build(description, input_shape[0], last_only, found.getter, description.pretrained)
        if self.frozen:
            self.requires_grad_(False)
        # once, since training does not update them
        if not description.pretrained and next(self.net.parameters()).device.type != "meta":
            start_statistics(self, self.size or input_shape[1:], input_shape[0])
        self.train()

    def train(self, mode: bool = True) -> Self:
        super().train(mode and not self.frozen)
        for module in self.modules():
            if isinstance(module, _BATCH_NORMS):
                module.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        return _channels_first(self.net, self.net(self.norm(resized(x, self.size))))


@torch.no_grad()
def start_statistics(net: nn.Module, size: tuple[int, ...], channels: int) -> None:
    """Set the statistics of BatchNorm in a network of images to those of smooth random images of a size, (H, W)."""
    norms: list[Any] = [part for part in net.modules() if isinstance(part, _BATCH_NORMS)]
    if not norms:
        return
    net.eval()
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.train().momentum = 1.0
    with forked_rng(torch.device("cpu")):
        torch.manual_seed(0)
        coarse = torch.rand(_IMAGES, channels, _COARSE, _COARSE)
    # float64, so that differences in rounding between numbers of threads vanish in float32
    dtype = next(net.parameters()).dtype
    net.double()(F.interpolate(coarse.double(), size, mode="bilinear"))
    net.to(dtype)
    for module, momentum in zip(norms, momenta, strict=True):
        module.eval().momentum = momentum
        module.num_batches_tracked.zero_()


def _channels_first(net: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    """Return maps as (B, C, H, W); some networks, such as Swin, return (B, H, W, C)."""
    last = getattr(getattr(net, "output_fmt", None), "value", "NCHW") == "NHWC"
    return [found.permute(0, 3, 1, 2) for found in maps] if last else maps


def resized(x: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Resize images, (B, C, H, W) -> (B, C, *size); None returns them unchanged."""
    if size is None or x.shape[2:] == size:
        return x
    return F.interpolate(x, size, mode="bilinear", antialias=size[0] < x.shape[2] or size[1] < x.shape[3])


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise AezooError(f"networks of timm need timm: {install_hint('timm')}") from error


def _config(name: str) -> Any:
    """Return the configuration of timm's weights with this name.

    Raises:
        AezooError: the model or its weights do not exist.
    """
    timm = _timm()
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() has all"
        raise AezooError(f"timm has no model {architecture!r}: {hint}")
    known = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and name not in known:
        there = f"choose from {', '.join(known[:8])}" if known else "there are none"
        raise AezooError(f"timm has no weights {name!r}: {there}")
    return timm.models.get_pretrained_cfg(name)


def _data_config(name: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation that a backbone's weights expect, for any number of channels."""
    config = _config(name)
    if channels == 1:
        return (sum(config.mean) / len(config.mean),), (sum(config.std) / len(config.std),)
    return tuple(islice(cycle(config.mean), channels)), tuple(islice(cycle(config.std), channels))


@lru_cache(maxsize=64)
def plan(description: Description, input_shape: tuple[int, ...], last_only: bool) -> Plan:
    """Return the properties of a `Backbone`, computed from shapes only.

    Raises:
        AezooError: as `Backbone`.
    """
    if len(input_shape) != 3:
        raise AezooError(f"networks of timm take images, (C, H, W), got {tuple(input_shape)}: use net='conv' or mlp")
    config = _config(description.name)
    size = (description.img_size,) * 2 if description.img_size else None
    if size is None and config.fixed_input_size:
        size = (config.input_size[1], config.input_size[2])

    def trial(getter: type | None) -> tuple[type, Plan]:
        with forked_rng(torch.device("cpu")), torch.device("meta"), torch.no_grad():
            net = _build(description, input_shape[0], last_only, getter, False).eval()
            maps = _channels_first(net, net(torch.empty(1, input_shape[0], *(size or input_shape[1:]))))
        shapes = tuple(tuple(found.shape[1:]) for found in maps)
        return type(net), Plan(shapes, size, getter)

    try:
        kind, found = trial(None)
    except AezooError:
        raise
    except Exception as error:  # raised anywhere in timm or torch
        raise AezooError(
            f"timm's {description.name} does not take samples of shape {input_shape}, {_brief(error)}: give "
            "img_size=224, or another network"
        ) from error
    if last_only and kind.__name__ == "FeatureGetterNet":
        with contextlib.suppress(Exception):  # raised by networks that have no such normalisation
            return trial(_normalised(kind))[1]
    return found


def _build(
    description: Description, channels: int, last_only: bool, getter: type | None, pretrained: bool | str
) -> nn.Module:
    """Build the network for feature maps, with the requested weights."""
    timm = _timm()
    config = _config(description.name)
    arguments: dict[str, Any] = {**dict(description.arguments), "features_only": True, "in_chans": channels}
    if config.fixed_input_size and description.img_size:
        arguments["img_size"] = description.img_size
    indices = description.out_indices or ((-1,) if last_only else ())
    if indices:
        arguments["out_indices"] = indices
    if getter is not None:
        arguments["feature_cls"] = getter
    if pretrained:
        file = _stored_file(config) if pretrained is True else _file_in(Path(str(pretrained)))
        overlay = {"state_dict": _read(file)} if file else {}
        arguments |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
    try:
        with _missing_weights() as missing:
            net: nn.Module = timm.create_model(description.name, **arguments)
    except AezooError:
        raise
    except Exception as error:  # raised anywhere in timm
        if pretrained is True and not overlay:
            raise AezooError(_cure(config, error)) from error
        raise AezooError(f"timm cannot build {description.name}: {_brief(error)}") from error
    if pretrained and (absent := missing(net)):
        where = file or "what timm has downloaded"
        raise AezooError(f"{where} contains no weights of {description.name}: it has no {', '.join(absent[:3])}")
    return net


def _normalised(getter: Any) -> type:
    class NormalisedGetter(getter):
        """The class of timm with the last normalisation."""

        def __init__(self, model: nn.Module, **kwargs: Any) -> None:
            super().__init__(model, norm=True, **kwargs)

    return NormalisedGetter


# ---- weights ---------------------------------------------------------------------------------------------------------


def _stored_file(config: Any) -> Path | None:
    """Return the file of timm's weights that a user has stored manually, if it exists."""
    file = _place(config)
    return file if file.is_file() else None


def _place(config: Any) -> Path:
    name = ".".join(part for part in (config.architecture, config.tag) if part)
    return Path(torch.hub.get_dir(), "checkpoints", f"{name}.safetensors")


def _cure(config: Any, error: Exception) -> str:
    name = _place(config).stem
    if not config.has_weights:
        return f"timm has no weights of {name}: leave pretrained out, or give pretrained=FILE"
    fetch = f"`hf download {config.hf_hub_id} model.safetensors`" if config.hf_hub_id else str(config.url)
    return (
        f"timm cannot fetch the weights of {name} ({type(error).__name__}): fetch {fetch} where there is a network and "
        f"put the file at {_place(config)}, or give pretrained=FILE"
    )


def _file_in(path: Path) -> Path:
    """Return the file of weights at a path, which may be a folder.

    Raises:
        AezooError: there is no file, or a folder contains several.
    """
    if path.is_file():
        return path
    found = sorted(file for file in path.glob("*") if file.suffix in _FILES) if path.is_dir() else []
    preferred = [file for file in found if file.name == "model.safetensors"] or found
    if len(preferred) != 1:
        raise AezooError(f"pretrained={path} names {len(preferred)} files of weights: give the path of one")
    return preferred[0]


def _read(file: Path) -> dict[str, Tensor]:
    found = weight_files.read(file, str(file))
    for key in _NESTED:
        found = found[key] if isinstance(found, dict) and isinstance(found.get(key), dict) else found
    if not isinstance(found, dict):
        raise AezooError(f"{file} contains a {type(found).__name__} instead of named tensors")
    state = weights.check_tensors(found, file, "a network of timm")
    if mae_layout.is_of_transformers(state):
        state = mae_layout.to_original(state)
    if "decoder_pred.weight" in state:
        state = mae_layout.encoder_of(state)
    return {key.removeprefix("module."): value for key, value in state.items()}


@contextlib.contextmanager
def _missing_weights() -> Iterator[Any]:
    """Provide a function that returns which weights of a network were not loaded by `load_state_dict` in this context.

    timm loads a network without its classifier from any file without an error for missing weights.
    """
    loaded: list[tuple[nn.Module, Any]] = []
    known: set[nn.Module] = set()

    def note(module: nn.Module, keys: Any) -> None:
        loaded[:] = [(module, keys)]  # the last call is for the whole network

    def watch(parent: nn.Module, name: str, part: Any) -> None:
        if parent not in known:
            known.add(parent)
            parent.register_load_state_dict_post_hook(note)

    def missing(net: nn.Module) -> list[str]:
        own = {id(parameter) for parameter in net.parameters()}
        if not loaded:
            return []
        root, keys = loaded[0]
        parameters = dict(root.named_parameters(remove_duplicate=False))
        return [key for key in keys.missing_keys if id(parameters.get(key)) in own]

    hooks = (
        torch_module.register_module_parameter_registration_hook(watch),
        torch_module.register_module_module_registration_hook(watch),
    )
    try:
        yield missing
    finally:
        for hook in hooks:
            hook.remove()


def _brief(error: Exception | None) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
