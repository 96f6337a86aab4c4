"""OpenAI's sparse autoencoders of GPT-2 (Gao et al. 2024): one `.pt` file each.

Source: https://github.com/openai/sparse_autoencoder. As in its loader, TopK models normalise each sample, ReLU models
do not.
"""

from typing import Any

import torch
from torch import Tensor

from aezoo.errors import AezooError
from aezoo.io.importers import Imported
from aezoo.io.importers.source import WeightSource
from aezoo.io.importers.sparse_dictionary import SparseDictionary, float_tensors, value_of

NAME = "OpenAI's sparse autoencoders"
_WEIGHTS = ("pre_bias", "latent_bias", "encoder.weight", "decoder.weight")
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def recognise(source: WeightSource) -> bool:
    """Whether the files have this format."""
    name = source.one_file(".pt", ".pth")
    if name is None:
        return False
    content = source.content(name)
    return isinstance(content, dict) and {"pre_bias", "latent_bias"} <= set(content)


def read(source: WeightSource) -> Imported:
    """The model, after every check."""
    name = source.one_file(".pt", ".pth")
    assert name is not None  # it has been recognised
    label = source.label(name)
    content: dict[str, Any] = dict(source.content(name))
    activation = value_of(content, "activation", str, label, "ReLU")
    if activation not in ("ReLU", "TopK"):
        raise AezooError(f"{label}: the activation is {activation[:40]!r}; those read are ReLU and TopK")
    state = value_of(content, "activation_state_dict", dict, label, {})
    tensors = {
        key: value
        for key, value in content.items()
        if key.partition(".")[0] not in ("activation", "activation_state_dict")
    }
    if wrong := [key for key, value in tensors.items() if not isinstance(value, Tensor)]:
        raise AezooError(f"{label}: {str(wrong[0])[:40]} is a {type(tensors[wrong[0]]).__name__}, not a tensor")
    weights = {key: value for key, value in tensors.items() if key not in _STATISTICS}
    found = float_tensors(weights, label, _WEIGHTS)
    dictionary = SparseDictionary(
        W_enc=found["encoder.weight"],
        b_enc=found["latent_bias"],
        W_dec=found["decoder.weight"].t(),
        b_dec=found["pre_bias"],
        activation="topk" if activation == "TopK" else "relu",
        k=_k(state, label) if activation == "TopK" else 0,
        centred=True,
        input_norm="layer_norm" if activation == "TopK" else "none",
    )
    return dictionary.imported(NAME, label)


def _k(state: dict[str, Any], label: str) -> int:
    function = value_of(state, "postact_fn", str, label, "ReLU")
    if function != "ReLU":
        raise AezooError(f"{label}: TopK with {function[:40]!r} after it; aezoo's TopK has ReLU")
    k = state.get("k")
    if isinstance(k, Tensor) and k.numel() == 1 and k.dtype in (torch.int32, torch.int64):
        return int(k)
    return int(value_of(state, "k", int, label))
