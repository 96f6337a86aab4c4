"""Folders of SAELens: `cfg.json` and `sae_weights.safetensors` (Bloom et al. 2024).

Source: https://github.com/decoderesearch/SAELens, 6.54. Versions before 6 stored the activation separately from the
    architecture, so that the architecture of a TopK SAE is standard (issue #553).
"""

from dataclasses import replace
from typing import Any

from aezoo.errors import AezooError
from aezoo.io.importers import Imported
from aezoo.io.importers.source import WeightSource
from aezoo.io.importers.sparse_dictionary import UNKNOWN_SCALE, SparseDictionary, check_sizes, float_tensors, value_of

NAME = "SAELens"
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

# BatchTopK models are saved as JumpReLU for inference; these are training checkpoints
_BATCH = ("batchtopk", "matryoshka_batchtopk")
_TOPK = {"topk": "topk", "abstopk": "abs_topk", **dict.fromkeys(_BATCH, "batch_topk")}
_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_PENALISED = {"standard": "relu", "gated": "gated", "jumprelu": "jumprelu"}
_INPUT_NORMS = {"none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "rms_norm",
                "expected_average_only_in": "none"}  # fmt: skip
_COMMON = ("W_enc", "W_dec", "b_dec")


def recognise(source: WeightSource) -> bool:
    """Return whether the files have this format."""
    return source.given in (None, CONFIG, WEIGHTS) and source.has(CONFIG, WEIGHTS)


def read(source: WeightSource) -> Imported:
    """Read the model, after all checks."""
    label = source.label(CONFIG)
    config = source.json(CONFIG)
    kind = _architecture(config, label)
    if kind not in (*_TOPK, *_TRANSCODERS, *_PENALISED):
        known = ", ".join((*_PENALISED, *_TOPK, *_TRANSCODERS))
        raise AezooError(
            f"{label}: there is no model for the architecture {kind[:40]!r}; architectures that can be read: {known}"
        )
    tensors = dict(source.tensors(WEIGHTS))
    scale = tensors.pop("scaling_factor", None)
    required = [*_COMMON, *(("b_gate", "r_mag", "b_mag") if kind == "gated" else ("b_enc",))]
    required += (
        ["threshold"] * ("jumprelu" in kind) + ["W_skip"] * ("skip" in kind) + ["topk_threshold"] * (kind in _BATCH)
    )
    found = float_tensors(tensors, source.label(WEIGHTS), required)
    notes = _notes(config, label)
    dictionary = SparseDictionary(
        W_enc=found["W_enc"].t(),
        b_enc=found["b_gate"] if kind == "gated" else found["b_enc"],
        W_dec=found["W_dec"],
        b_dec=found["b_dec"],
        activation=_activation(kind),
        k=_k(config, label) if kind in _TOPK else 0,
        threshold=found.get("topk_threshold", found.get("threshold")),
        r_mag=found.get("r_mag"),
        b_mag=found.get("b_mag"),
        centred=value_of(config, "apply_b_dec_to_input", bool, label, True),
        input_norm=_input_norm(config, label),
        transcoder=kind in _TRANSCODERS,
        W_skip=found.get("W_skip"),
        prefixes=_prefixes(config, kind, label),
        notes=notes,
    )
    if dictionary.transcoder and dictionary.centred:
        raise AezooError(f"{label}: apply_b_dec_to_input is true, which a transcoder cannot do: it must be false")
    dictionary.check(source.label(WEIGHTS))
    n, x = dictionary.W_enc.shape
    check_sizes(config, {"d_in": x, "d_sae": n} | ({"d_out": x} if dictionary.transcoder else {}), label)
    if scale is not None:
        dictionary = _finetuned(
            dictionary, float_tensors({"scaling_factor": scale}, label, ["scaling_factor"]), config, label
        )
    if value_of(config, "rescale_acts_by_decoder_norm", bool, label, kind in _BATCH) and kind in _TOPK:
        dictionary = dictionary.with_unit_norm() if kind not in _BATCH else _keeping_threshold(dictionary)
    return dictionary.imported(NAME, source.label(WEIGHTS))


def _architecture(config: dict[str, Any], label: str) -> str:
    kind: str = value_of(config, "architecture", str, label, "standard")
    older = value_of(config, "activation_fn_str", str, label, "relu")
    activation = value_of(config, "activation_fn", str, label, older)
    if kind == "standard" and activation == "topk":
        kind = "topk"
    if activation not in ("relu", *(["topk"] * (kind == "topk"))):
        raise AezooError(
            f"{label}: {kind[:40]} with the activation {activation[:40]!r}: aezoo has relu, and topk for standard"
        )
    return kind


def _activation(kind: str) -> str:
    if kind in _TRANSCODERS:
        return "jumprelu" if "jumprelu" in kind else "relu"
    return (_TOPK | _PENALISED)[kind]


def _k(config: dict[str, Any], label: str) -> int:
    older = value_of(config, "activation_fn_kwargs", dict, label, {})
    if older.get("signed"):
        raise AezooError(f"{label}: signed topk, which SAELens 6 reads as unsigned: import the original weights")
    k = value_of(config if config.get("k") is not None else older, "k", float, label)
    if k != int(k):
        raise AezooError(f"{label}: k must be a whole number, got {k}")
    return int(k)


def _input_norm(config: dict[str, Any], label: str) -> str:
    given = config.get("normalize_activations")
    if given is None or isinstance(given, bool):  # of old versions
        return "none"
    kind: str = value_of(config, "normalize_activations", str, label)
    if kind not in _INPUT_NORMS:
        raise AezooError(f"{label}: normalize_activations is {kind[:40]!r}, for which the file lacks the statistics")
    return _INPUT_NORMS[kind]


def _notes(config: dict[str, Any], label: str) -> tuple[str, ...]:
    notes = []
    if config.get("normalize_activations") in (True, "expected_average_only_in"):
        notes.append(UNKNOWN_SCALE)
    if value_of(config, "reshape_activations", str, label, "none") == "hook_z":
        notes.append("flatten the heads of hook_z first, (n_heads, d_head) -> (d_in,)")
    return tuple(notes)


def _prefixes(config: dict[str, Any], kind: str, label: str) -> tuple[int, ...]:
    if kind != "matryoshka_batchtopk":
        return ()
    widths = value_of(config, "matryoshka_widths", list, label)
    n = value_of(config, "d_sae", int, label)
    if (
        not all(type(width) is int for width in widths)
        or sorted({*widths}) != widths
        or not 1 <= widths[0] <= widths[-1] <= n
    ):
        raise AezooError(f"{label}: matryoshka_widths must rise from 1 to d_sae, got {str(widths)[:60]}")
    return (*widths, *([n] if widths[-1] < n else []))


def _finetuned(
    dictionary: SparseDictionary, found: dict[str, Any], config: dict[str, Any], label: str
) -> SparseDictionary:
    """Apply the factor by which old versions multiply latents before decoding."""
    scale_N = found["scaling_factor"]
    if bool((scale_N == 1).all()):
        return dictionary
    if not value_of(config, "finetuning_scaling_factor", bool, label, False):
        raise AezooError(f"{label}: finetuning_scaling_factor is false, but the weights have a scaling_factor")
    if scale_N.shape != dictionary.b_enc.shape:
        raise AezooError(
            f"{label}: scaling_factor has shape {tuple(scale_N.shape)}, there are {len(dictionary.b_enc)} latents"
        )
    note = "the latents' scaling factor folded into the decoder"
    return replace(dictionary, W_dec=dictionary.W_dec * scale_N[:, None], notes=(*dictionary.notes, note))


def _keeping_threshold(dictionary: SparseDictionary) -> SparseDictionary:
    """Normalise a BatchTopK dictionary whose threshold already includes the norms."""
    return replace(replace(dictionary, threshold=None).with_unit_norm(), threshold=dictionary.threshold)
