"""Export of sparse autoencoders and transcoders for SAELens.

`SAE.load_from_disk` of https://github.com/decoderesearch/SAELens loads the folder, from version 6.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError
from aezoo.io import atomic_files
from aezoo.io.scale_folding import fold
from aezoo.registry import name_of
from aezoo.security import values

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
# the first version with this configuration format
_FORMAT = "6.0.0"
_INPUT_NORMS = {"none": "none", "layer_norm": "layer_norm", "rms_norm": "constant_norm_rescale"}
_ARCHITECTURES = {
    "sae_l1": "standard",
    "gated_sae": "gated",
    "jumprelu_sae": "jumprelu",
    "topk_sae": "topk",
    "abs_topk_sae": "abstopk",
    # like SAELens, which saves models with a threshold as JumpReLU
    "batch_topk_sae": "jumprelu",
    "matryoshka_sae": "jumprelu",
    "transcoder": "transcoder",
}


@torch.no_grad()
def save_sae_lens(
    model: Autoencoder,
    folder: str | Path,
    metadata: Mapping[str, Any] | None = None,
    scaling: Mapping[str, Tensor] | Tensor | float | None = None,
) -> Path:
    """Write a model as `cfg.json` and `sae_weights.safetensors` of SAELens.

    Codes and outputs are the same in SAELens. A batch_topk_sae or matryoshka_sae becomes a JumpReLU SAE with its
    threshold, and samples of several dimensions are flattened.

    Args:
        model: sae_l1, gated_sae, jumprelu_sae, topk_sae, abs_topk_sae, batch_topk_sae, matryoshka_sae, or a transcoder
            from one row to another with relu or jumprelu.
        folder: created if it does not exist; each of the two files is replaced atomically.
        metadata: plain values for SAELens and Neuronpedia, such as model_name and hook_name.
        scaling: scaling of the activations that the model was trained on, see `aezoo.save_model`; the saved model then
            accepts raw activations.

    Returns:
        The folder.

    Raises:
        AezooError: SAELens has no such model, the metadata are not plain values, the scaling cannot be folded into the
            weights, or the files cannot be written.
    """
    name = name_of(type(model)) or type(model).__name__
    if name not in _ARCHITECTURES:
        raise AezooError(f"SAELens has no model like {name}; models that it can run are {', '.join(_ARCHITECTURES)}")
    probe = torch.linspace(-2, 2, 5)
    if not torch.equal(model.likelihood.cpu().mean(probe), probe):
        raise AezooError(
            f"SAELens has no output function, but {name} with this likelihood has one: train it with gaussian"
        )
    if "://" in str(folder):
        raise AezooError(f"models are only saved to local folders, not to {folder}: upload the folder with SAELens")
    given = values.check_plain(dict(metadata or {}), "the metadata for SAELens")
    config, tensors = _described(name, model if scaling is None else fold(model, scaling))
    config["metadata"] = {"sae_lens_version": _FORMAT, **given}
    content = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    text = json.dumps(config, indent=2) + "\n"
    cure = "free disk space, or choose a writable folder"
    atomic_files.write(Path(folder) / WEIGHTS, lambda file: file.write(save(content)), cure=cure)
    atomic_files.write(Path(folder) / CONFIG, lambda file: file.write(text.encode()), cure=cure)
    return Path(folder)


def _described(name: str, model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration without metadata, and the tensors."""
    W_enc = model.encoder.weight
    config: dict[str, Any] = {
        "architecture": _ARCHITECTURES[name],
        "d_in": W_enc.shape[1],
        "d_sae": W_enc.shape[0],
        "dtype": str(W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": name not in ("transcoder", "sae_l1", "gated_sae", "jumprelu_sae") or model.unit_norm,
        "normalize_activations": _INPUT_NORMS[model.input_norm],
        "reshape_activations": "none",
    }
    tensors = {"W_enc": W_enc.t(), "b_enc": model.encoder.bias}
    tensors |= {"W_dec": model.decoder.W_NX, "b_dec": model.decoder.b_X}
    if name == "gated_sae":
        tensors |= {"b_gate": tensors.pop("b_enc"), "r_mag": model.r_N, "b_mag": model.b_mag_N}
    elif name == "jumprelu_sae":
        tensors["threshold"] = model.theta_N.to(W_enc)
    elif name in ("topk_sae", "abs_topk_sae"):
        config |= {"k": model.k, "rescale_acts_by_decoder_norm": False}
    elif name in ("batch_topk_sae", "matryoshka_sae"):
        # aezoo keeps values >= the threshold, SAELens values > the threshold
        theta = model.theta.value.to(W_enc)
        below = torch.nextafter(theta, torch.full_like(theta, -math.inf)).clamp(min=0)
        tensors["threshold"] = below.expand(W_enc.shape[0])
    elif name == "transcoder":
        _add_transcoder(model, config, tensors)
    return config, tensors


def _add_transcoder(model: Any, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if len(model.targets) != 1 or model.n_rows != 2:
        raise AezooError(
            "SAELens' transcoders read one row and predict one: train on samples of two rows, with one target"
        )
    if model.activation not in ("relu", "jumprelu"):
        raise AezooError(f"SAELens' transcoders are ReLU or JumpReLU, this one has {model.activation}")
    config |= {"apply_b_dec_to_input": False, "d_out": model.decoder.W_NX.shape[1]}
    skip, jump = "skip_" * (model.skip is not None), "jumprelu_" * (model.activation == "jumprelu")
    config["architecture"] = f"{jump}{skip}transcoder"
    if model.activation == "jumprelu":
        tensors["threshold"] = model.theta_N.to(tensors["W_enc"])
    if model.skip is not None:
        tensors["W_skip"] = model.skip.weight
