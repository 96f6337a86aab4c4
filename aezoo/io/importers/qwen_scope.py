"""Files of Qwen Scope: `layer0.sae.pt`, `layer1.sae.pt`, ... with a TopK SAE each.

Source: https://huggingface.co/collections/Qwen/qwen-scope and SAELens' loader. Matrices are transposed relative to
    those of SAELens. k is not in the files but at the end of the repository's name, e.g.
    `SAE-Res-Qwen3-8B-Base-W64K-L0_50`.
"""

import re

from aezoo.errors import AezooError
from aezoo.io.importers import Imported
from aezoo.io.importers.source import WeightSource
from aezoo.io.importers.sparse_dictionary import SparseDictionary, float_tensors

NAME = "Qwen Scope"
_FILE = re.compile(r"layer\d+\.sae\.pt")
_K = re.compile(r"L0_(\d+)")


def recognise(source: WeightSource) -> bool:
    """Return whether the files have this format."""
    return bool(_files(source))


def read(source: WeightSource) -> Imported:
    """Read the model, after all checks."""
    files = _files(source)
    if len(files) > 1:
        raise AezooError(
            f"{source.address} has {len(files)} layers: give one of them, e.g. {source.address}/{files[0]}"
        )
    label = source.label(files[0])
    k = _K.findall(source.location)
    if not k:
        raise AezooError(f"{label}: k is only in the repository's name: name its folder like that, e.g. ...-W64K-L0_50")
    found = float_tensors(source.tensors(files[0]), label, ("W_enc", "W_dec", "b_enc", "b_dec"))
    dictionary = SparseDictionary(
        W_enc=found["W_enc"],
        b_enc=found["b_enc"],
        W_dec=found["W_dec"].t(),
        b_dec=found["b_dec"],
        activation="topk",
        k=int(k[-1]),
    )
    return dictionary.imported(NAME, label)


def _files(source: WeightSource) -> list[str]:
    names = source.names if source.given is None else (source.given,)
    return [name for name in names if _FILE.fullmatch(name)]
