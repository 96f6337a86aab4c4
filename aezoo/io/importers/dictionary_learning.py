"""Folders of dictionary_learning: `config.json`, whose `trainer` contains the class name, and `ae.pt`.

Source: https://github.com/saprmarks/dictionary_learning, 0.1.0; CrossCoder is that of its fork
https://github.com/science-of-finetuning/dictionary_learning. As its loader does, AutoEncoder gets directions of norm 1.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from aezoo.errors import AezooError
from aezoo.io.importers import Imported
from aezoo.io.importers.source import WeightSource
from aezoo.io.importers.sparse_dictionary import SparseDictionary, check_sizes, float_tensors, value_of

NAME = "dictionary_learning"
CONFIG, WEIGHTS = "config.json", "ae.pt"
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_MATRICES = ("W_enc", "b_enc", "W_dec", "b_dec")


def recognise(source: WeightSource) -> bool:
    """Return whether the files have this format."""
    return source.given in (None, CONFIG, WEIGHTS) and source.has(CONFIG, WEIGHTS)


def read(source: WeightSource) -> Imported:
    """Read the model, after all checks."""
    label = source.label(WEIGHTS)
    trainer = value_of(source.json(CONFIG), "trainer", dict, source.label(CONFIG))
    kind = value_of(trainer, "dict_class", str, source.label(CONFIG))
    if kind not in _CLASSES:
        raise AezooError(f"{source.label(CONFIG)}: dict_class is {kind[:40]!r}; those read are {', '.join(_CLASSES)}")
    # of a compiled class
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in source.tensors(WEIGHTS).items()}
    dictionary = _CLASSES[kind](tensors, trainer, label)
    dictionary.check(label)
    if not dictionary.streams:
        n, x = dictionary.W_enc.shape
        check_sizes(trainer, {"activation_dim": x, "dict_size": n}, source.label(CONFIG))
    return dictionary.imported(f"{NAME} {kind}", label)


def _auto_encoder(tensors: dict[str, Tensor], trainer: dict[str, Any], label: str) -> SparseDictionary:
    found = float_tensors(tensors, label, (*_LINEAR, "bias"))
    dictionary = _linear(found, found["bias"], centred=True)
    dictionary.check(label)
    norms_N = dictionary.norms()
    return dictionary if bool(((norms_N - 1).abs() < 1e-5).all()) else dictionary.with_unit_norm()


def _auto_encoder_new(tensors: dict[str, Tensor], trainer: dict[str, Any], label: str) -> SparseDictionary:
    found = float_tensors(tensors, label, (*_LINEAR, "decoder.bias"))
    return _linear(found, found["decoder.bias"])


def _gated(tensors: dict[str, Tensor], trainer: dict[str, Any], label: str) -> SparseDictionary:
    names = ("encoder.weight", "decoder.weight", "decoder_bias", "gate_bias", "mag_bias", "r_mag")
    found = float_tensors(tensors, label, names)
    return SparseDictionary(
        W_enc=found["encoder.weight"],
        b_enc=found["gate_bias"],
        W_dec=found["decoder.weight"].t(),
        b_dec=found["decoder_bias"],
        activation="gated",
        r_mag=found["r_mag"],
        b_mag=found["mag_bias"],
        centred=True,
    )


def _jumprelu(tensors: dict[str, Tensor], trainer: dict[str, Any], label: str) -> SparseDictionary:
    found = float_tensors(tensors, label, (*_MATRICES, "threshold"))
    return _matrices(found, activation="jumprelu", threshold=found["threshold"])


def _topk(tensors: dict[str, Tensor], trainer: dict[str, Any], label: str) -> SparseDictionary:
    k = _k(tensors, trainer, label)
    # the threshold is only used by an option of encode that is off by default
    found = float_tensors(_without(tensors, "k"), label, (*_LINEAR, "b_dec"), ["threshold"])
    return _linear(found, found["b_dec"], activation="topk", k=k, centred=True)


def _batch_topk(tensors: dict[str, Tensor], trainer: dict[str, Any], label: str) -> SparseDictionary:
    k = _k(tensors, trainer, label)
    found = float_tensors(_without(tensors, "k"), label, (*_LINEAR, "b_dec", "threshold"))
    return _linear(found, found["b_dec"], activation="batch_topk", k=k, threshold=found["threshold"], centred=True)


def _matryoshka(tensors: dict[str, Tensor], trainer: dict[str, Any], label: str) -> SparseDictionary:
    k = _k(tensors, trainer, label)
    found = float_tensors(_without(tensors, "k", "group_sizes"), label, (*_MATRICES, "threshold"))
    if "group_sizes" not in tensors:
        raise AezooError(f"{label}: there is no group_sizes, which says where the nested dictionaries end")
    sizes = [int(size) for size in tensors["group_sizes"].flatten().tolist()]
    if min(sizes, default=0) < 1 or sum(sizes) != len(found["b_enc"]):
        raise AezooError(
            f"{label}: group_sizes must be at least 1 and sum to {len(found['b_enc'])} latents, got {sizes[:8]}"
        )
    prefixes = tuple(sum(sizes[: i + 1]) for i in range(len(sizes)))
    return _matrices(found, activation="batch_topk", k=k, threshold=found["threshold"], centred=True, prefixes=prefixes)


def _crosscoder(tensors: dict[str, Tensor], trainer: dict[str, Any], label: str) -> SparseDictionary:
    found = float_tensors(tensors, label, (*_LINEAR, "decoder.bias"))
    W_enc, W_dec, b_dec = found["encoder.weight"], found["decoder.weight"], found["decoder.bias"]
    if (
        W_enc.ndim != 3
        or W_dec.ndim != 3
        or W_enc.shape != W_dec.transpose(1, 2).shape
        or b_dec.shape != W_enc.shape[:2]
    ):
        raise AezooError(
            f"{label}: a crosscoder has an encoder (layers, inputs, latents) and a decoder (layers, latents, inputs), "
            f"got {tuple(W_enc.shape)} and {tuple(W_dec.shape)}"
        )
    return SparseDictionary(
        W_enc=W_enc.permute(2, 0, 1).flatten(1),
        b_enc=found["encoder.bias"],
        W_dec=W_dec.transpose(0, 1).flatten(1),
        b_dec=b_dec.flatten(),
        streams=len(W_enc),
    )


_CLASSES: dict[str, Callable[[dict[str, Tensor], dict[str, Any], str], SparseDictionary]] = {
    "AutoEncoder": _auto_encoder,
    "AutoEncoderNew": _auto_encoder_new,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jumprelu,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "CrossCoder": _crosscoder,
}


def _linear(found: dict[str, Tensor], b_dec: Tensor, **others: Any) -> SparseDictionary:
    """Build a dictionary from the weights of linear layers."""
    return SparseDictionary(
        W_enc=found["encoder.weight"],
        b_enc=found["encoder.bias"],
        W_dec=found["decoder.weight"].t(),
        b_dec=b_dec,
        **others,
    )


def _matrices(found: dict[str, Tensor], **others: Any) -> SparseDictionary:
    """Build a dictionary from an encoder of shape (inputs, latents)."""
    return SparseDictionary(
        W_enc=found["W_enc"].t(), b_enc=found["b_enc"], W_dec=found["W_dec"], b_dec=found["b_dec"], **others
    )


def _without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def _k(tensors: dict[str, Tensor], trainer: dict[str, Any], label: str) -> int:
    """Return the k of the configuration, which the weights may also contain.

    Raises:
        AezooError: there is none, or they differ.
    """
    stated = tensors.get("k")
    if stated is not None and (stated.numel() != 1 or stated.is_floating_point() or stated.is_complex()):
        raise AezooError(f"{label}: k must be one whole number")
    k: int = value_of(trainer, "k", int, label, None if stated is None else int(stated))
    if stated is not None and k != int(stated):
        raise AezooError(f"{label}: k is {k} in the configuration and {int(stated)} in the weights")
    return k
