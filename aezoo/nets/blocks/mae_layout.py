"""Weights of masked autoencoders in the layout of the authors' code, https://github.com/facebookresearch/mae

    cls_token, pos_embed, patch_embed.proj, blocks.i.{norm1, attn.qkv, attn.proj, norm2, mlp.fc1, mlp.fc2}, norm
    mask_token, decoder_embed, decoder_pos_embed, decoder_blocks.i, decoder_norm, decoder_pred

The encoder is a vision transformer of timm. The library transformers uses other names for the same weights, and
separate weights for queries, keys and values.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_NAMES = {
    "cls_token": "cls_token",
    "position_embeddings": "pos_embed",
    "patch_embeddings.projection": "patch_embed.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.attention.query": "attn.query",
    "attention.attention.key": "attn.key",
    "attention.attention.value": "attn.value",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    # transformers 5 in memory
    "attention.q_proj": "attn.query",
    "attention.k_proj": "attn.key",
    "attention.v_proj": "attn.value",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_PARTS = ("query", "key", "value")
_LAYER = re.compile(r"(?:vit\.)?(?:encoder\.layer|layers)\.(\d+)\.(.+?)(\.weight|\.bias)")
_DECODER_LAYER = re.compile(r"decoder\.(?:decoder_layers|decoder_encoder\.layer)\.(\d+)\.(.+?)(\.weight|\.bias)")
_EMBEDDING = re.compile(r"(?:vit\.)?embeddings\.(.+?)(\.weight|\.bias)?")


def is_of_transformers(keys: Mapping[str, object]) -> bool:
    """Return whether keys are those of transformers' ViTMAEForPreTraining or ViTMAEModel."""
    return any(f"{start}embeddings.patch_embeddings.projection.weight" in keys for start in ("", "vit."))


def encoder_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return only the weights of the encoder, with the authors' names."""
    return {key: tensor for key, tensor in state.items() if not key.startswith(("decoder_", "mask_token"))}


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights of transformers' ViTMAE to the authors' names; unknown names stay unchanged."""
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if match := _DECODER_LAYER.fullmatch(key):
            name = f"decoder_blocks.{match[1]}.{_NAMES.get(match[2], match[2])}{match[3]}"
        elif match := _LAYER.fullmatch(key):
            name = f"blocks.{match[1]}.{_NAMES.get(match[2], match[2])}{match[3]}"
        elif match := _EMBEDDING.fullmatch(key):
            name = _NAMES.get(match[1], match[1]) + (match[2] or "")
        else:
            name = re.sub(r"^(?:vit\.)?layernorm\.|^decoder\.", lambda m: "" if m[0] == "decoder." else "norm.", key)
        found[name] = tensor
    for name in [name for name in found if name.endswith((".attn.query.weight", ".attn.query.bias"))]:
        names = [name.replace(".query.", f".{part}.") for part in _PARTS]
        if all(part in found for part in names):
            found[name.replace(".query.", ".qkv.")] = torch.cat([found.pop(part) for part in names])
    return found
