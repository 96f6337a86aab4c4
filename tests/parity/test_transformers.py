"""Vision transformers of transformers (Wolf et al. 2019) with our weights: masked images, and blocks on tokens.

Source: https://github.com/huggingface/transformers. Attention ignores its class token, which the models here lack.
"""

import copy
import math
from typing import Any

import pytest
import torch
from comparison import copy_parameters, seeded
from torch import Tensor, nn
from transformers import (
    FlavaImageCodebook,
    FlavaImageCodebookConfig,
    FlavaImageProcessor,
    GPT2Config,
    GPT2LMHeadModel,
    IJepaConfig,
    IJepaModel,
    ViTConfig,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

import aezoo
from aezoo.nets import vit
from aezoo.nets.blocks.channel_norm import IMAGENET

SHAPE, PATCH, WIDTH, DEPTH, PATCHES = (3, 16, 16), 4, 64, 2, 16
VALUES = math.prod(SHAPE)
SETTINGS = {
    "image_size": 16, "patch_size": PATCH, "num_channels": 3, "hidden_size": WIDTH, "num_hidden_layers": DEPTH,
    "num_attention_heads": 2, "intermediate_size": 4 * WIDTH, "layer_norm_eps": 1e-6, "hidden_act": "gelu",
    "encoder_stride": PATCH, "attn_implementation": "sdpa",
}  # fmt: skip
SUMS = "a sum over the values of a sample, where theirs is a mean"
Pairs = list[tuple[Tensor, Tensor]]


def ours(name: str, **settings: Any) -> Any:
    model = aezoo.create_model(name, SHAPE, patch_size=PATCH, width=WIDTH, depth=DEPTH, **settings).double()
    with torch.no_grad():
        for p in model.parameters():  # so that weights of norms are not 1, and biases not 0
            p.add_(0.05 * torch.randn_like(p))
    return model


def copy_blocks(blocks: nn.Module, layers: nn.ModuleList, norm: nn.Module) -> Pairs:
    """Copy our blocks and the final normalisation, and return the pairs of parameters."""
    *ours, last = blocks.children()
    parameters = copy_parameters(last, norm)
    for a, b in zip(ours, layers, strict=True):
        attention = b.attention
        for x, y in (
            (a.norm_1, b.layernorm_before), (a.norm_2, b.layernorm_after), (a.attention.out, attention.o_proj),
            (a.mlp[0], b.mlp.fc1), (a.mlp[2], b.mlp.fc2),
        ):  # fmt: skip
            parameters += copy_parameters(x, y)
        weight, bias = (p.detach().clone().requires_grad_() for p in (a.attention.qkv.weight, a.attention.bias_q))
        # keys and values have no bias in ours
        for part, rows in zip((attention.q_proj, attention.k_proj, attention.v_proj), weight.chunk(3), strict=True):
            del part.weight, part.bias
            part.weight, part.bias = rows, None
        attention.q_proj.bias = bias
        parameters += [(a.attention.qkv.weight, weight), (a.attention.bias_q, bias)]
    return parameters


def without_class_token(samples: int, patches: int) -> Tensor:
    return torch.ones(samples, 1 + patches, dtype=torch.bool).index_fill(1, torch.tensor([0]), False)


class WithoutClassToken(nn.Module):
    """A decoder layer called without a mask."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens, without_class_token(*tokens.shape[:1], tokens.shape[1] - 1)[:, None, None])


@pytest.mark.parametrize("norm_pix", [False, True])
def test_masked_autoencoder(compare, norm_pix):
    model = ours("mae", decoder_width=32, decoder_depth=1, norm_pix=norm_pix)
    config = ViTMAEConfig(
        **SETTINGS, mask_ratio=0.75, norm_pix_loss=norm_pix, decoder_hidden_size=32, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=1, decoder_intermediate_size=4 * 32,
    )  # fmt: skip
    other = ViTMAEForPreTraining(config)
    encoder, decoder = other.vit, other.decoder
    embed, blocks, _ = model.encoder.children()
    params = copy_parameters(embed[1], encoder.embeddings.patch_embeddings.projection)
    encoder.embeddings.position_embeddings.data[:, 1:] = embed[2].table_ND
    params += copy_blocks(blocks, encoder.layers, encoder.layernorm)
    params += copy_parameters(model.decoder.embed, decoder.decoder_embed)
    decoder.decoder_pos_embed.data[:, 1:] = model.decoder.positions.table_ND
    decoder.mask_token.data[:] = model.decoder.mask_token
    params.append((model.decoder.mask_token, decoder.mask_token))
    params += copy_blocks(model.decoder.blocks, decoder.decoder_layers, decoder.decoder_norm)
    decoder.decoder_layers = nn.ModuleList(map(WithoutClassToken, decoder.decoder_layers))
    # the values of a patch are ordered by channel in ours, by position in theirs
    for key in ("weight", "bias"):
        mine = getattr(model.decoder.out, key)
        copied = mine.detach().clone().requires_grad_()
        delattr(decoder.decoder_pred, key)
        setattr(decoder.decoder_pred, key, copied.unflatten(0, (3, PATCH, PATCH)).movedim(0, 2).flatten(0, 2))
        params.append((mine, copied))
    x = torch.rand(3, *SHAPE)
    with seeded(1):
        found = model.loss(x)
    with seeded(1):
        noise = torch.rand(3, PATCHES)
    theirs = other(x, noise=noise, attention_mask=without_class_token(3, PATCHES // 4))
    with_reference = compare("mae", "transformers", "ViTMAEForPreTraining" + (", norm_pix_loss" if norm_pix else ""))
    # constant of the density of variance 1/2
    squared = found["nll"] - VALUES / 2 * math.log(math.pi)
    with_reference.scaled("nll without its constant", squared, theirs.loss, VALUES, SUMS)
    # the scale head of our model has no effect on these
    with_reference.equal_gradients(found["loss"], theirs.loss, params, "gradient", VALUES, SUMS)
    encoder.config.mask_ratio = 0.0
    order = torch.arange(PATCHES, dtype=torch.float64).expand(3, -1)
    tokens = encoder(x, noise=order, attention_mask=without_class_token(3, PATCHES)).last_hidden_state
    with_reference.equal("code", model.encode(x).flatten(2).mT, tokens[:, 1:])
    patches = other.patchify(x).unflatten(2, (PATCH, PATCH, 3)).movedim(4, 2).flatten(2)
    with_reference.equal("patches", model.decoder.patchify(x), patches)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_imported_masked_autoencoder(compare, tmp_path, norm_pix):
    """With its class token, heads and epsilon, and images normalised by ImageNet's mean and deviation."""
    config = ViTMAEConfig(
        **SETTINGS | {"num_attention_heads": 4, "layer_norm_eps": 1e-12}, mask_ratio=0.6, norm_pix_loss=norm_pix,
        decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=4 * 32,
    )  # fmt: skip
    other = ViTMAEForPreTraining(config).float()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05 * torch.randn_like(p))
    other.decoder.decoder_pos_embed.data[:, 0] = 0
    other.save_pretrained(tmp_path)
    model, other = aezoo.import_model(tmp_path).model.double(), other.double()
    x = torch.rand(3, *SHAPE, requires_grad=True)
    normalised = (x - torch.tensor(IMAGENET[0])[:, None, None]) / torch.tensor(IMAGENET[1])[:, None, None]
    with seeded(1):
        found = model.loss(x)
    with seeded(1):
        noise = torch.rand(3, PATCHES)
    theirs = other(normalised, noise=noise)
    part = "ViTMAEForPreTraining, imported" + (", norm_pix_loss" if norm_pix else "")
    with_reference = compare("mae", "transformers", part)
    squared = found["nll"] - VALUES / 2 * math.log(math.pi)
    with_reference.scaled("nll without its constant", squared, theirs.loss, VALUES, SUMS)
    with_reference.equal_gradients(found["nll"], theirs.loss, [(x, x)], "gradient of the image", VALUES, SUMS)
    encoder = other.vit
    encoder.config.mask_ratio = 0.0
    order = torch.arange(PATCHES, dtype=torch.float64).expand(3, -1)
    with_reference.equal("code", model.encode(x).mT, encoder(normalised, noise=order).last_hidden_state)


def test_simple_masked_image_modelling(compare):
    model = ours("simmim")
    other = ViTForMaskedImageModeling(ViTConfig(**SETTINGS))
    encoder = other.vit
    embed, (place, blocks), _ = model.encoder.children()
    params = copy_parameters(embed[1], encoder.embeddings.patch_embeddings.projection)
    encoder.embeddings.position_embeddings.data[:, 1:] = place.table_ND
    encoder.embeddings.mask_token.data[:] = model.mask_token
    params.append((model.mask_token, encoder.embeddings.mask_token))
    params += copy_blocks(blocks, encoder.layers, encoder.layernorm)
    params += copy_parameters(model.head, other.decoder[0])
    x = torch.rand(3, *SHAPE)
    with seeded(1):
        found = model.loss(x)
    with seeded(1):
        place_in_order = torch.rand(3, PATCHES).argsort(1).argsort(1)
    masked, seen = place_in_order >= PATCHES - int(0.6 * PATCHES), without_class_token(3, PATCHES)
    theirs = other(x, bool_masked_pos=masked, attention_mask=seen)
    with_reference = compare("simmim", "transformers", "ViTForMaskedImageModeling")
    absolute = found["nll"] - VALUES * math.log(2)
    with_reference.scaled("nll without its constant", absolute, theirs.loss, VALUES, SUMS)
    # the extra layer of our model, which reads visible patches, has no effect on these
    with_reference.equal_gradients(found["loss"], theirs.loss, params, "gradient", VALUES, SUMS)
    tokens = encoder(x, attention_mask=seen).last_hidden_state[:, 1:]
    with_reference.equal("code", model.encode(x).flatten(2).mT, tokens)


def test_encoder_of_joint_embeddings(compare):
    model = ours("ijepa")
    other = IJepaModel(IJepaConfig(**SETTINGS))
    embed, blocks, _ = model.context.children()
    params = copy_parameters(embed[1], other.embeddings.patch_embeddings.projection)
    other.embeddings.position_embeddings.data[:] = embed[2].table_ND
    params += copy_blocks(blocks, other.layers, other.layernorm)
    model.encoder.update_from(model.context, torch.tensor(1.0))
    x, seen = torch.rand(3, *SHAPE), torch.rand(3, PATCHES) < 0.6
    with_reference = compare("ijepa", "transformers", "IJepaModel")
    with_reference.equal("code", model.encode(x).flatten(2).mT, other(x).last_hidden_state)
    found = vit.attend_to_visible(blocks, embed(x), seen)
    theirs = other(x, attention_mask=seen).last_hidden_state
    with_reference.equal("tokens of a context", found[seen], theirs[seen])
    weight = torch.randn_like(found[seen])
    with_reference.equal_gradients(
        (found[seen] * weight).sum(), (theirs[seen] * weight).sum(), params, "gradient of the context's tokens"
    )


class Tokens(nn.Module):
    """Returns given tokens instead of the embedding of an image."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens
        self.patch_embeddings = nn.Module()
        self.patch_embeddings.projection = nn.Conv2d(1, 1, 1)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self.tokens


@pytest.mark.parametrize("name", ["titok", "maetok"])
def test_tokens_without_a_grid(compare, name):
    model = ours(name, n_tokens=5, decoder_width=WIDTH, decoder_depth=DEPTH).eval()
    with_reference = compare(name, "transformers", "ViTModel")
    x = torch.rand(3, *SHAPE)
    encoder, decoder = model.encoder, model.decoder
    z = torch.randn(3, *model.code_shape)
    patches = encoder.embed(x) + encoder.position_PW
    before = {
        "encoder": torch.cat([encoder.latent_NW.expand(3, -1, -1), patches], 1),
        "decoder": torch.cat(
            [decoder.embed(z.mT) + decoder.place_NW, (decoder.mask_W + decoder.position_PW).expand(3, -1, -1)], 1
        ),
    }
    after = {}
    for part, tokens in before.items():
        other = ViTModel(ViTConfig(**SETTINGS), add_pooling_layer=False)
        blocks = getattr(model, part).blocks
        params = copy_blocks(blocks, other.layers, other.layernorm)
        other.embeddings = Tokens(tokens)
        after[part] = other(x).last_hidden_state
        found = blocks(tokens)
        with_reference.equal(f"tokens of the {part}", found, after[part])
        weight = torch.randn_like(found)
        # including the parameters that make the tokens
        inputs = [
            p for key, p in getattr(model, part).named_parameters() if not key.startswith(("blocks", "out", "bias"))
        ]
        params += [(p, p) for p in inputs]
        with_reference.equal_gradients(
            (found * weight).sum(), (after[part] * weight).sum(), params, f"gradient of the {part}'s tokens"
        )
    code = encoder.out(after["encoder"][:, :5]).mT + encoder.bias_DN
    with_reference.equal("encoder's output", encoder(x), code)
    patches = decoder.out(after["decoder"][:, 5:])
    with_reference.equal("decoder's output", model.decoder(z), decoder.patchify.inverse(patches))


def transposed(linear: nn.Linear, other: nn.Module, params: Pairs) -> None:
    """Copy a linear layer to GPT-2's layer, whose weight is transposed, without a bias where ours has none."""
    weight = linear.weight.detach().clone().requires_grad_()
    del other.weight
    other.weight = weight.T
    params.append((linear.weight, weight))
    if linear.bias is None:
        other.bias.data.zero_()
    else:
        params += copy_parameters(nn.ParameterList([linear.bias]), nn.ParameterList([other.bias]))


def test_prior_over_indices(compare):
    codes, width, tokens = 11, 32, 16
    model: Any = aezoo.create_model(
        "index_transformer", SHAPE, width=width, depth=2, dropout=0.0,
        tokenizer={"model": "vq_vae", "codebook_size": codes, "hidden_dims": (8, 8), "data_init": False},
    ).double().eval()  # fmt: skip
    config = GPT2Config(
        vocab_size=codes + 1, n_positions=tokens + 1, n_embd=width, n_layer=2, n_head=2, activation_function="gelu",
        attn_implementation="sdpa", tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    other = GPT2LMHeadModel(config).eval()
    other.config.vocab_size = codes  # vocabulary of its loss
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        book = model.tokenizer.quantiser.code_KD
        book.copy_(model.tokenizer.encoder(torch.rand(8, *SHAPE)).movedim(1, -1).flatten(0, -2)[:codes])
    body, params = other.transformer, []
    vectors, start, position = (
        p.detach().clone().requires_grad_() for p in (model.book_QKW, model.start_W, model.position_TW)
    )
    params += [(model.book_QKW, vectors), (model.start_W, start), (model.position_TW, position)]
    # the start is an additional token that is never predicted
    del body.wte.weight, other.lm_head.weight, body.wpe.weight
    body.wte.weight, other.lm_head.weight = torch.cat([vectors[0], start[None]]), vectors[0]
    body.wpe.weight = torch.cat([position, torch.zeros(1, width)])
    _, *blocks, norm = model.blocks
    params += copy_parameters(norm, body.ln_f)
    for a, b in zip(blocks, body.h, strict=True):
        params += copy_parameters(a.norm, b.ln_1) + copy_parameters(a.mlp[0], b.ln_2)
        transposed(a.qkv, b.attn.c_attn, params)
        transposed(a.out, b.attn.c_proj, params)
        transposed(a.mlp[1], b.mlp.c_fc, params)
        transposed(a.mlp[3], b.mlp.c_proj, params)
    x = torch.rand(5, *SHAPE)
    index = model.encode_indices(x).flatten(1)
    with_start = torch.cat([torch.full((5, 1), codes), index], 1)
    theirs = other(with_start, labels=with_start)
    found = model.loss(x)
    with_reference = compare("index_transformer", "transformers", "GPT2LMHeadModel")
    with_reference.equal("logits", model.token_logits(index), theirs.logits[:, :-1])
    following = model.incremental_logits()
    step_by_step = torch.stack([following(index, t) for t in range(tokens)], 1)
    with_reference.equal("logits of one token after another", step_by_step, theirs.logits[:, :-1])
    why = "a sum over the indices of a sample, where theirs is a mean"
    with_reference.scaled("nll of the indices", found["nll"], theirs.loss, tokens, why)
    with_reference.equal_gradients(found["nll"], theirs.loss, params, "gradient of nll", tokens, why)


@pytest.mark.parametrize("name", ["gumbel_vq_vae", "dvae"])
def test_codes_by_logits(compare, name):
    model: Any = aezoo.create_model(name, SHAPE, codebook_size=11, hidden_dims=(8, 8)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    # the codebook of DALL-E, with our encoder instead of its convolutions
    other = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=8, vocab_size=11))
    other.blocks = copy.deepcopy(model.encoder)
    x = torch.rand(4, *SHAPE)
    with_reference = compare(name, "transformers", "FlavaImageCodebook")
    logits = model.encoder(x)
    with_reference.equal("indices", model.encode_indices(x)[:, 0], other.get_codebook_indices(x))
    shares = other.get_codebook_probs(x)
    kl = (shares * (shares * 11).log()).flatten(1).sum(1).mean()
    params = [*zip(model.encoder.parameters(), other.blocks.parameters(), strict=True)]
    with seeded():
        found = model.loss(x)
    with_reference.equal("KL of the probabilities from uniform ones", found["kl"], kl)
    with_reference.equal_gradients(found["kl"], kl, params, "gradient of the KL")
    with_reference.equal("logits", logits, other(x))
    if name == "dvae":
        mapped = FlavaImageProcessor().map_pixels(x)
        with_reference.equal(
            "data on the scale of the logit-Laplace", model.likelihood.params_from_mean(x), mapped.logit()
        )
