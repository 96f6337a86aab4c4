"""Networks of timm (Wightman 2019) with copies of our weights, as encoder and decoder of a model.

Source: https://github.com/huggingface/pytorch-image-models
"""

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import copy_parameters
from timm.models.convnext import ConvNeXtBlock
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import aezoo
from aezoo.nets import convnext, mixer, vit

SHAPE, WIDTH = (3, 16, 16), 64
Pairs = list[tuple[Tensor, Tensor]]


def copied(a: nn.Module, b: nn.Module, parameters: Pairs) -> nn.Module:
    """Copy the weights of `a` to `b`, add the pairs to `parameters`, and return `b`."""
    parameters += copy_parameters(a, b)
    return b


def transformer(
    layers: list[nn.Module], parameters: Pairs, embed: nn.Module | None, out: nn.Linear | None
) -> nn.Module:
    """Timm's transformer with the weights of our blocks; `embed` replaces its embedding."""
    place, *blocks, norm = layers
    other = VisionTransformer(
        img_size=16, patch_size=2, num_classes=out.out_features if out else 0, global_pool="", embed_dim=WIDTH,
        depth=len(blocks), num_heads=blocks[0].attention.heads, class_token=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), act_layer=nn.GELU,
    )  # fmt: skip
    other.pos_embed.data.copy_(place.table_ND)
    for a, b in zip(blocks, other.blocks, strict=True):
        for x, y in (
            (a.norm_1, b.norm1), (a.norm_2, b.norm2), (a.attention.out, b.attn.proj), (a.mlp[0], b.mlp.fc1),
            (a.mlp[2], b.mlp.fc2),
        ):  # fmt: skip
            copied(x, y, parameters)
        qkv = b.attn.qkv
        qkv.weight.data.copy_(a.attention.qkv.weight)
        # keys and values have no bias in ours
        bias = a.attention.bias_q.detach().clone().requires_grad_()
        del qkv.bias
        qkv.bias = F.pad(bias, (0, 2 * WIDTH))
        parameters += [(a.attention.qkv.weight, qkv.weight), (a.attention.bias_q, bias)]
    copied(norm, other.norm, parameters)
    return finished(other, "patch_embed", embed, out, parameters)


def mlp_mixer(layers: list[nn.Module], parameters: Pairs, embed: nn.Module | None, out: nn.Linear | None) -> nn.Module:
    *blocks, norm = layers
    other = MlpMixer(
        out.out_features if out else 0, img_size=16, patch_size=2, num_blocks=len(blocks), embed_dim=WIDTH,
        global_pool="",
    )  # fmt: skip
    for a, b in zip(blocks, other.blocks, strict=True):
        copied(a.norm_1, b.norm1, parameters)
        copied(a.norm_2, b.norm2, parameters)
        copied(a.places, b.mlp_tokens, parameters)
        copied(a.channels, b.mlp_channels, parameters)
    copied(norm, other.norm, parameters)
    return finished(other, "stem", embed, out, parameters)


def finished(
    other: nn.Module, first: str, embed: nn.Module | None, out: nn.Linear | None, parameters: Pairs
) -> nn.Module:
    if isinstance(embed, nn.Linear):  # theirs splits patches by a convolution
        copied(embed, getattr(other, first).proj, parameters)
    else:
        setattr(other, first, embed)
    if out:
        copied(out, other.head, parameters)
    return other


def vit_networks(model: Any, parameters: Pairs) -> tuple[nn.Module, nn.Module]:
    kind = mixer.Block if model.net == "mixer" else vit.Block
    build = mlp_mixer if model.net == "mixer" else transformer
    networks = []
    for net in (model.encoder, model.decoder):
        layers = [*net.children()]
        inner = [i for i, layer in enumerate(layers) if isinstance(layer, (kind, vit.Positions))]
        start, end = inner[0], inner[-1] + 2  # including the normalisation
        before, after = layers[:start], layers[end:]
        if net is model.encoder:
            body = build(layers[start:end], parameters, before[-1], None)
            parts = [body, *(copy.deepcopy(layer) for layer in after)]
            parameters += zip(nn.Sequential(*after).parameters(), nn.Sequential(*parts[1:]).parameters(), strict=True)
        else:
            first = nn.Sequential(*copy.deepcopy(before))
            parameters += zip(nn.Sequential(*before).parameters(), first.parameters(), strict=True)
            parts = [build(layers[start:end], parameters, first, after[0]), after[1]]
        networks.append(nn.Sequential(*parts))
    return networks[0], networks[1]


def convnext_networks(model: Any, parameters: Pairs) -> tuple[nn.Module, nn.Module]:
    networks = []
    for net in (model.encoder, model.decoder):
        other = nn.Sequential(*copy.deepcopy([*net.children()]))
        for i, layer in enumerate(net):
            if isinstance(layer, convnext.ConvNeXtBlock):
                other[i] = ConvNeXtBlock(layer.norm.normalized_shape[0], ls_init_value=None)
        parameters += copy_parameters(net, other)
        networks.append(other)
    return networks[0], networks[1]


@pytest.mark.parametrize("name", ["denoising_ae", "vae", "rae"])
@pytest.mark.parametrize(
    ("net", "part", "build"),
    [
        ("vit", "VisionTransformer", vit_networks),
        ("mixer", "MlpMixer", vit_networks),
        ("convnext", "ConvNeXtBlock", convnext_networks),
    ],
)
def test_networks(compare, name, net, part, build):
    dims = (16, 32) if net == "convnext" else (WIDTH, WIDTH)
    model = aezoo.create_model(name, SHAPE, net=net, hidden_dims=dims, activation="gelu", latent_dim=6).double()
    with torch.no_grad():
        for p in model.parameters():  # so that weights of norms are not 1, and biases not 0
            p.add_(0.05 * torch.randn_like(p))
    parameters: Pairs = []
    encoder, decoder = (part.double() for part in build(model, parameters))
    assert len(parameters) == len([*model.encoder.parameters(), *model.decoder.parameters()])
    x, z = torch.rand(3, *SHAPE), torch.randn(3, *model.code_shape)
    with_reference = compare(name, "timm", part)
    code, expected = model.encoder(x), encoder(x)
    with_reference.equal(f"encoder, net {net}", code, expected)
    with_reference.equal(f"decoder, net {net}", model.decoder(z), decoder(z))
    found, theirs = model.nll(model.decoder(z), x).mean(), model.nll(decoder(z), x).mean()
    found, theirs = found + code.square().sum(), theirs + expected.square().sum()
    with_reference.equal_gradients(found, theirs, parameters, f"gradient, net {net},")
