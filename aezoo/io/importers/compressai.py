"""Checkpoints of CompressAI, https://github.com/InterDigitalInc/CompressAI, as the model `compressai`.

A file contains only the weights, as published, or also other values, as saved by the training scripts. The architecture
is determined by names, the numbers of channels by shapes. Names of older versions and of DataParallel are supported.
"""

import contextlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aezoo import registry
from aezoo.autoencoder import Autoencoder
from aezoo.distributions.frequency_tables import MAX_ENTRIES, TAIL_MASS, FrequencyTables, join
from aezoo.errors import AezooError
from aezoo.io.importers import Imported
from aezoo.io.importers.source import WeightSource
from aezoo.nets.blocks.compressai import LEAST_BETA, PEDESTAL
from aezoo.security import weights
from aezoo.training.seeding import forked_rng

NAME = "CompressAI"
_SUFFIXES = (".tar", ".pth", ".pt", ".ckpt", ".safetensors")
_BOTTLENECK, _GAUSSIANS = "entropy_bottleneck", "gaussian_conditional"
_QUANTILES = f"{_BOTTLENECK}.quantiles"
# the weights do not depend on the size of images
_SIDE = 256
# CompressAI's old names -> new names
_RENAMED = (
    (r"^module\.", ""),
    (r"\.downsample\.", ".skip."),
    (rf"^{_BOTTLENECK}\._(?:matrix|matrices\.)(\d)$", rf"{_BOTTLENECK}.matrices.\1"),
    (rf"^{_BOTTLENECK}\._bias(?:es\.)?(\d)$", rf"{_BOTTLENECK}.biases.\1"),
    (rf"^{_BOTTLENECK}\._factor(?:s\.)?(\d)$", rf"{_BOTTLENECK}.factors.\1"),
)
# names in aezoo -> names in CompressAI
_NAMES = (
    (r"^encoder\.", "g_a."),
    (r"^decoder\.", "g_s."),
    (r"^hyper_encoder\.", "h_a."),
    (r"^hyper_decoder\.", "h_s."),
    (r"^context\.", "context_prediction."),
    (r"\.root_beta_C$", ".beta"),
    (r"\.root_gamma_CC$", ".gamma"),
    (r"^density\.weights\.", f"{_BOTTLENECK}.matrices."),
    (r"^density\.bends\.", f"{_BOTTLENECK}.factors."),
    (r"^density\.biases\.", f"{_BOTTLENECK}.biases."),
    (r"^density\.last_bias_C1$", f"{_BOTTLENECK}.biases.4"),
    (r"^quantiles_C3$", _QUANTILES),
)
_TAIL = math.log(2 / TAIL_MASS - 1)
# values that are equal in all files; other values would change the results of the networks
_CONSTANTS: dict[str, tuple[float, ...]] = {
    "reparam.pedestal": (PEDESTAL,),
    "beta_reparam.lower_bound.bound": ((LEAST_BETA + PEDESTAL) ** 0.5,),
    "gamma_reparam.lower_bound.bound": (PEDESTAL**0.5,),
    ".likelihood_lower_bound.bound": (1e-9,),
    ".lower_bound_scale.bound": (0.11,),
    ".scale_bound": (0.11,),
    f"{_BOTTLENECK}.target": (-_TAIL, 0.0, _TAIL),
    "context_prediction.mask": (*[1.0] * 12, *[0.0] * 13),
}
_TOO_LARGE = "it has far fewer weights than its shapes require: it is damaged"
_TABLES = ("_quantized_cdf", "_cdf_length", "_offset")


def recognise(source: WeightSource) -> bool:
    """Return whether a file has the names of an entropy bottleneck of CompressAI."""
    name = source.one_file(*_SUFFIXES)
    return name is not None and any(key.endswith(_QUANTILES) for key in _state_in(source.content(name)))


def read(source: WeightSource) -> Imported:
    """Read the model as `compressai`.

    Raises:
        AezooError: the weights are not those of one of the seven architectures, or are damaged.
    """
    name = str(source.one_file(*_SUFFIXES))
    what = source.label(name)
    state = _renamed(weights.check_tensors(_state_in(source.content(name)), Path(what), "compressai"), what)
    for key, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise AezooError(f"{what}: {key} has values that are NaN or infinite: the file is damaged")
    settings = _settings(state, what)
    first = "g_a.0.conv1.weight" if "cheng" in settings["architecture"] else "g_a.0.weight"
    shape = (state[first].shape[1], _SIDE, _SIDE)
    _take_constants(state, what)
    tables = _take_tables(state, what)
    settings["table_width"] = 0 if tables is None else tables.cdf.shape[1]
    model = _filled(shape, settings, state, tables, what)
    sizes = f"{shape[0]} channels, N = {settings['width']}, M = {settings['latent_dim']}"
    made = "those of the file" if tables is not None else "made from the weights: the file has none, see its update()"
    return Imported(model, f"CompressAI, {settings['architecture']}, {sizes}", (f"the frequency tables are {made}",))


def _state_in(content: Any) -> dict[str, Any]:
    for key in ("network", "state_dict"):
        content = content.get(key, content) if isinstance(content, dict) else content
    return content if isinstance(content, dict) and all(isinstance(key, str) for key in content) else {}


def _renamed(state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Return the weights by the names of the newest version."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, new in _RENAMED:
            key = re.sub(pattern, new, key)
        if key in renamed:
            raise AezooError(f"{what} contains {key} under two names: download it again")
        renamed[key] = value
    return renamed


def _settings(state: Mapping[str, Tensor], what: str) -> dict[str, Any]:
    """Determine architecture and channels from names and shapes."""

    def size(key: str) -> int:
        if key not in state or state[key].ndim != 4:
            raise AezooError(
                f"{what} has no {key} of a convolution: the CompressAI models of Ballé et al. 2018, Minnen et al. 2018 "
                "and Cheng et al. 2020 are read, not those of variable rate, latent codecs, videos or points"
            )
        return len(state[key])

    if "g_a.0.conv1.weight" in state:
        n = m = size("g_a.0.conv1.weight")
        attention = any(key.startswith("g_a.3.conv_a.") for key in state)
        architecture = "cheng2020-attn" if attention else "cheng2020-anchor"
    else:
        n, m = size("g_a.0.weight"), size("g_a.6.weight")
        if "h_a.0.weight" not in state:
            architecture = "bmshj2018-factorized" if "g_a.1.beta" in state else "bmshj2018-factorized-relu"
        elif "context_prediction.weight" in state:
            architecture = "mbt2018"
        else:
            architecture = "mbt2018-mean" if size("h_s.4.weight") == 2 * m else "bmshj2018-hyperprior"
    return {"architecture": architecture, "width": n, "latent_dim": m}


def _take_constants(state: dict[str, Tensor], what: str) -> None:
    """Remove constants, after checking their values."""
    for key in [*state]:
        for ending, values in _CONSTANTS.items():
            if not key.endswith(ending):
                continue
            found = state.pop(key).double()
            wanted = torch.tensor(values, dtype=torch.float64).reshape(found.shape[-2:] if len(values) > 3 else -1)
            if found.numel() and not torch.allclose(found, wanted.expand(found.shape), rtol=1e-5, atol=0):
                raise AezooError(f"{what}: {key} has other values than in CompressAI, where it is a constant")
            break


def _take_tables(state: dict[str, Tensor], what: str) -> FrequencyTables | None:
    """Remove and return the frequency tables, if the file has those of all distributions."""
    found: list[FrequencyTables | None] = []
    for of in (_BOTTLENECK, _GAUSSIANS):
        parts = [state.pop(f"{of}.{name}", torch.empty(0)) for name in _TABLES]
        if of == _GAUSSIANS and f"{of}.scale_table" not in state:
            continue
        if not all(part.numel() for part in parts):
            found.append(None)
            continue
        integers = all(part.dtype in (torch.int32, torch.int64) for part in parts)
        if not integers or [part.ndim for part in parts] != [2, 1, 1] or parts[0].shape[1] > MAX_ENTRIES:
            raise AezooError(f"{what}: {of} has tables that are not integers in up to {MAX_ENTRIES:,} columns")
        tables = FrequencyTables(*(part.clamp(-(2**31), 2**31 - 1).int() for part in parts))
        if (wrong := tables.check()) is not None:
            raise AezooError(f"{what}: the tables of {of} are damaged: {wrong}")
        found.append(tables)
    complete = [tables for tables in found if tables is not None]
    return join(complete) if len(complete) == len(found) else None


def _filled(
    shape: tuple[int, ...],
    settings: dict[str, Any],
    state: dict[str, Tensor],
    tables: FrequencyTables | None,
    what: str,
) -> Autoencoder:
    """Build the model with all weights."""
    try:
        with forked_rng(torch.device("cpu")), weights.limit_parameters(state, _TOO_LARGE):
            # before memory is allocated
            with contextlib.suppress(RuntimeError, NotImplementedError), torch.device("meta"):
                registry.create_model("compressai", shape, **settings)
            model = registry.create_model("compressai", shape, **settings)
    except AezooError as error:
        raise AezooError(f"{what}: {error}") from error
    own: dict[str, Tensor] = model.state_dict()
    if tables is not None:
        for part, values in zip(("cdf", "length", "offset"), tables, strict=True):
            if own[f"table_{part}"].shape != values.shape:
                raise AezooError(f"{what} has {len(values)} tables, but its distributions require another number")
            own.pop(f"table_{part}").copy_(values)
    scales = state.pop(f"{_GAUSSIANS}.scale_table", torch.empty(0))
    if scales.numel():
        standard = own.pop("scales", torch.empty(0))
        if scales.shape != standard.shape or not torch.allclose(scales.float(), standard.float(), rtol=1e-5):
            raise AezooError(f"{what}: its scale_table is not that of CompressAI's get_scale_table()")
        standard.copy_(scales)
    own.pop("scales", None)
    for key, parameter in own.items():
        for pattern, new in _NAMES:
            key = re.sub(pattern, new, key)
        if (value := state.pop(key, None)) is None:
            raise AezooError(f"{what} has no {key}, which {settings['architecture']} has: the file is damaged")
        if not value.is_floating_point():
            raise AezooError(f"{what}: {key} has {value.dtype} instead of floating-point numbers")
        # the others have additional axes of length 1
        if [n for n in value.shape if n != 1] != [n for n in parameter.shape if n != 1]:
            raise AezooError(
                f"{what}: {key} has shape {tuple(value.shape)}, the others require {tuple(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(value.reshape(parameter.shape))
    if state:
        raise AezooError(
            f"{what} is not a {settings['architecture']} of CompressAI: it also has {', '.join(sorted(state)[:3])}"
        )
    return model.eval()
