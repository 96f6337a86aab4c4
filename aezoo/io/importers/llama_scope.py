"""Folders of Llama Scope (He et al. 2024), https://arxiv.org/abs/2410.20526

    hyperparams.json, checkpoints/final.safetensors     one threshold for all latents
    config.json, sae_weights.safetensors                one threshold per latent, as in Llama-Scope-R1-Distill

Training multiplies activations by sqrt(d) / their mean norm, which is folded into the weights. The one threshold is of
pre-activations divided by that factor (https://github.com/OpenMOSS/Language-Model-SAEs at b932639), hence multiplied by
it here, and of pre-activations times the norms of their directions if `sparsity_include_decoder_norm` is set. Codes are
those of SAELens.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aezoo.errors import AezooError
from aezoo.io.importers import Imported
from aezoo.io.importers.source import WeightSource
from aezoo.io.importers.sparse_dictionary import UNKNOWN_SCALE, SparseDictionary, check_sizes, float_tensors, value_of

NAME = "Llama Scope"
CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
CONFIG_R1, WEIGHTS_R1 = "config.json", "sae_weights.safetensors"
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
_NORM = "dataset_average_activation_norm"


def recognise(source: WeightSource) -> bool:
    """Return whether the files have this format."""
    if source.given in (None, CONFIG) and source.has(CONFIG, WEIGHTS):
        return True
    if source.given not in (None, CONFIG_R1, WEIGHTS_R1) or not source.has(CONFIG_R1, WEIGHTS_R1):
        return False
    return "hook_point_in" in source.json(CONFIG_R1)


def read(source: WeightSource) -> Imported:
    """Read the model, after all checks."""
    first = source.has(CONFIG, WEIGHTS)
    config_name, name = (CONFIG, WEIGHTS) if first else (CONFIG_R1, WEIGHTS_R1)
    config, label = source.json(config_name), source.label(config_name)
    kind = value_of(config, "act_fn", str, label, "jumprelu").lower()
    if kind != "jumprelu" or value_of(config, "use_glu_encoder", bool, label, False):
        raise AezooError(f"{label}: act_fn is {kind[:40]!r} or the encoder is gated; Llama Scope's models are JumpReLU")
    tensors = source.tensors(name)
    if not first:
        config = config | _norms_of(tensors, config, source.label(name))
    tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(_NORM)}
    own = [] if first else ["log_jumprelu_threshold"]
    found = float_tensors(tensors, source.label(name), [*_LINEAR, *own])
    n = len(found["encoder.bias"])
    if first:
        threshold_N = torch.full((n,), value_of(config, "jump_relu_threshold", float, label))
    else:
        threshold_N = found["log_jumprelu_threshold"].exp()
    dictionary = SparseDictionary(
        W_enc=found["encoder.weight"],
        b_enc=found["encoder.bias"],
        W_dec=found["decoder.weight"].t(),
        b_dec=found["decoder.bias"],
        activation="jumprelu",
        threshold=threshold_N,
        centred=value_of(config, "apply_decoder_bias_to_pre_encoder", bool, label, False),
        transcoder=config.get("hook_point_out", config.get("hook_point_in")) != config.get("hook_point_in"),
    )
    dictionary.check(source.label(name))
    check_sizes(config, {"d_model": dictionary.W_enc.shape[1]} | ({"d_sae": n} if first else {}), label)
    dictionary = _in_raw_units(dictionary, config, label, first)
    return dictionary.imported(NAME, source.label(name))


def _in_raw_units(dictionary: SparseDictionary, config: dict[str, Any], label: str, first: bool) -> SparseDictionary:
    """Return the equivalent dictionary for activations that are not normalised."""
    mode = value_of(config, "norm_activation", str, label, "dataset-wise")
    if mode not in ("dataset-wise", "inference"):
        raise AezooError(f"{label}: norm_activation must be dataset-wise or inference, got {mode[:40]!r}")
    threshold_N = dictionary.threshold
    assert threshold_N is not None  # as in the constructor above
    read_by = written_by = 1.0
    notes = dictionary.notes
    if mode == "dataset-wise" and config.get(_NORM) is not None:
        norms = value_of(config, _NORM, dict, label)
        sides = [value_of(norms, side, float, label) for side in ("in", "out")]
        if not all(0 < side < math.inf for side in sides):
            raise AezooError(f"{label}: {_NORM} must be above 0, got {sides}")
        read_by, written_by = (math.sqrt(dictionary.W_enc.shape[1]) / side for side in sides)
    elif mode == "dataset-wise":
        if first:
            raise AezooError(f"{label}: there is no {_NORM}, by which the threshold is scaled")
        notes = (*notes, UNKNOWN_SCALE)
    if value_of(config, "sparsity_include_decoder_norm", bool, label, False):
        norms_N = dictionary.norms().clamp(min=1e-12) / (written_by if first else 1.0)
        threshold_N = (threshold_N.double() / norms_N).float()
    elif first:
        threshold_N = threshold_N * read_by
    dictionary = replace(dictionary, threshold=threshold_N, notes=notes)
    return dictionary if read_by == written_by == 1.0 else dictionary.with_scale(read_by, written_by)


def _norms_of(tensors: dict[str, Tensor], config: dict[str, Any], label: str) -> dict[str, Any]:
    """Return the mean norms of activations, which newer files contain in addition to the weights."""
    read_at = config.get("hook_point_in")
    sides = {"in": read_at, "out": config.get("hook_point_out") or read_at}
    found = {side: tensors.get(f"{_NORM}.{hook}") for side, hook in sides.items()}
    if any(tensor is None for tensor in found.values()):
        return {}
    if any(tensor is None or tensor.numel() != 1 for tensor in found.values()):
        raise AezooError(f"{label}: {_NORM} must be one number per hook point")
    return {_NORM: {side: float(tensor) for side, tensor in found.items() if tensor is not None}}
