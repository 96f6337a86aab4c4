"""Folders of Gemma Scope: `params.npz` with a JumpReLU SAE or transcoder (Lieberum et al. 2024).

Source: https://arxiv.org/abs/2408.05147, https://huggingface.co/google/gemma-scope. The files do not state whether they
    contain a transcoder, or whether the inputs are embeddings, whose scale of sqrt(d) must be folded in. This is
    derived from the names of the repository and its folders, e.g. `gemma-scope-2b-pt-transcoders` and
    `embedding/width_4k`.
"""

import math
from dataclasses import replace

from aezoo.io.importers import Imported
from aezoo.io.importers.source import WeightSource
from aezoo.io.importers.sparse_dictionary import SparseDictionary, float_tensors

NAME = "Gemma Scope"
WEIGHTS = "params.npz"
_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def recognise(source: WeightSource) -> bool:
    """Return whether the files have this format."""
    return source.given in (None, WEIGHTS) and source.has(WEIGHTS)


def read(source: WeightSource) -> Imported:
    """Read the model, after all checks."""
    tensors = {
        name[:1].upper() + name[1:] if name[:2] == "w_" else name: t for name, t in source.tensors(WEIGHTS).items()
    }
    found = float_tensors(tensors, source.label(WEIGHTS), _NAMES)
    dictionary = SparseDictionary(
        W_enc=found["W_enc"].t(),
        b_enc=found["b_enc"],
        W_dec=found["W_dec"],
        b_dec=found["b_dec"],
        activation="jumprelu",
        threshold=found["threshold"],
        transcoder="transcoder" in source.location.lower(),
    )
    dictionary.check(source.label(WEIGHTS))
    if "embedding" in source.location.lower():
        dictionary = _of_embeddings(dictionary)
    return dictionary.imported(NAME, source.label(WEIGHTS))


def _of_embeddings(dictionary: SparseDictionary) -> SparseDictionary:
    """Convert to embeddings, which the model multiplies by sqrt(d); the bias already has their scale."""
    scale = math.sqrt(dictionary.W_enc.shape[1])
    note = f"scale of embeddings, {scale:.6g}, folded into the weights"
    return replace(dictionary, W_enc=dictionary.W_enc / scale, W_dec=dictionary.W_dec * scale, notes=(note,))
