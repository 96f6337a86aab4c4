"""EleutherAI's sparsify: `cfg.json` and `sae.safetensors`.

Source: https://github.com/EleutherAI/sparsify, 1.3. Transcoders are marked by `transcode`; older files may have
`signed`, which keeps the latents of largest absolute value.
"""

from aezoo.errors import AezooError
from aezoo.io.importers import Imported
from aezoo.io.importers.source import WeightSource
from aezoo.io.importers.sparse_dictionary import SparseDictionary, check_sizes, float_tensors, value_of

NAME = "sparsify"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def recognise(source: WeightSource) -> bool:
    """Return whether the files have this format."""
    return source.given in (None, CONFIG, WEIGHTS) and source.has(CONFIG, WEIGHTS)


def read(source: WeightSource) -> Imported:
    """Read the model, after all checks."""
    config, label = source.json(CONFIG), source.label(CONFIG)
    activation = value_of(config, "activation", str, label, "topk")
    if activation != "topk":
        raise AezooError(f"{label}: there is no model for the activation {activation[:40]!r}; only topk can be read")
    skip = value_of(config, "skip_connection", bool, label, False)
    transcode = value_of(config, "transcode", bool, label, False)
    required = ["encoder.weight", "encoder.bias", "W_dec", "b_dec"] + ["W_skip"] * skip
    found = float_tensors(source.tensors(WEIGHTS), source.label(WEIGHTS), required)
    dictionary = SparseDictionary(
        W_enc=found["encoder.weight"],
        b_enc=found["encoder.bias"],
        W_dec=found["W_dec"],
        b_dec=found["b_dec"],
        activation="abs_topk" if value_of(config, "signed", bool, label, False) else "topk",
        k=value_of(config, "k", int, label),
        centred=not transcode,
        transcoder=transcode,
        W_skip=found.get("W_skip"),
    )
    dictionary.check(source.label(WEIGHTS))
    n, x = dictionary.W_enc.shape
    check_sizes(config, {"d_in": x} | ({"num_latents": n} if config.get("num_latents") else {}), label)
    return dictionary.imported(NAME, source.label(WEIGHTS))
