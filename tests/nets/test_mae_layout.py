"""Names of weights in the layouts of masked autoencoders."""

import torch

from aezoo.nets.blocks import mae_layout


def test_transformers_names_become_original_names() -> None:
    names = {
        "vit.embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "vit.embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
        "vit.embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
        "vit.encoder.layer.3.layernorm_before.bias": "blocks.3.norm1.bias",
        "vit.layers.11.mlp.fc2.weight": "blocks.11.mlp.fc2.weight",
        "vit.layernorm.weight": "norm.weight",
        "decoder.decoder_layers.0.attention.output.dense.bias": "decoder_blocks.0.attn.proj.bias",
        "decoder.decoder_norm.weight": "decoder_norm.weight",
        "decoder.mask_token": "mask_token",
        "of_a_user": "of_a_user",
    }
    state = {key: torch.tensor([float(i)]) for i, key in enumerate(names)}
    assert mae_layout.to_original(state) == {name: state[key] for key, name in names.items()}


def test_queries_keys_and_values_are_joined_in_this_order() -> None:
    start = "vit.encoder.layer.0.attention.attention."
    state = {f"{start}{part}.weight": torch.tensor([i]) for i, part in enumerate(("value", "query", "key"))}
    joined = mae_layout.to_original(state)
    assert list(joined) == ["blocks.0.attn.qkv.weight"] and joined["blocks.0.attn.qkv.weight"].tolist() == [1, 2, 0]
    alone = {f"{start}query.bias": torch.zeros(1)}
    assert list(mae_layout.to_original(alone)) == ["blocks.0.attn.query.bias"]
