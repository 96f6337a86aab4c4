"""Folders of Gemma Scope 2: `params.safetensors` with a JumpReLU SAE or transcoder, and `config.json`.

Source: https://huggingface.co/google/gemma-scope-2 and SAELens' loader. Whether it is a transcoder follows from
`hf_hook_point_out` of the configuration or, without a configuration, from the names of folders.
"""

from aezoo.errors import AezooError
from aezoo.io.importers import Imported
from aezoo.io.importers.source import WeightSource
from aezoo.io.importers.sparse_dictionary import SparseDictionary, float_tensors, value_of

NAME = "Gemma Scope 2"
CONFIG, WEIGHTS = "config.json", "params.safetensors"
_NAMES = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
_SKIP = "affine_skip_connection"


def recognise(source: WeightSource) -> bool:
    """Return whether the files have this format."""
    return source.given in (None, CONFIG, WEIGHTS) and source.has(WEIGHTS)


def read(source: WeightSource) -> Imported:
    """Read the model, after all checks."""
    label = source.label(WEIGHTS)
    config = source.json(CONFIG) if source.has(CONFIG) else {}
    kind = value_of(config, "architecture", str, source.label(CONFIG), "jump_relu")
    if kind != "jump_relu":
        raise AezooError(f"{source.label(CONFIG)}: the architecture is {kind[:40]!r}, Gemma Scope 2 has jump_relu")
    found = float_tensors(source.tensors(WEIGHTS), label, _NAMES, [_SKIP])
    if found["w_dec"].ndim == 3:
        raise AezooError(
            f"{label}: a cross-layer transcoder, whose latents write to {found['w_dec'].shape[1]} layers: transcoders "
            "in aezoo write to one"
        )
    read_at, written_at = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    by_name = any(word in source.location.lower() for word in ("transcoder", "clt"))
    skip = found.get(_SKIP)
    if value_of(config, "affine_connection", bool, source.label(CONFIG), skip is not None) != (skip is not None):
        raise AezooError(f"{label}: the configuration's affine_connection and the weights' {_SKIP} do not agree")
    dictionary = SparseDictionary(
        W_enc=found["w_enc"].t(),
        b_enc=found["b_enc"],
        W_dec=found["w_dec"],
        b_dec=found["b_dec"],
        activation="jumprelu",
        threshold=found["threshold"],
        transcoder=by_name or skip is not None or (written_at is not None and written_at != read_at),
        W_skip=None if skip is None else skip.t(),
    )
    return dictionary.imported(NAME, label)
