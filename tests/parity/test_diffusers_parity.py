"""Image autoencoders and schedules of diffusers (von Platen et al. 2022) with copies of our networks or weights.

Source: https://github.com/huggingface/diffusers. Its images are in [-1, 1].
"""

import copy
from typing import Any

import diffusers
import pytest
import torch
from comparison import copy_parameters, noise
from diffusers.models.autoencoders.autoencoder_dc import DCDownBlock2d, DCUpBlock2d
from diffusers_reference import CONSISTENCY, RAE, decoded, encoded
from torch import Tensor, nn

import aezoo
from aezoo.nets.blocks.diffusers import KINDS

SHAPE = (3, 16, 16)


def ours(name: str, **settings: Any) -> Any:
    model = aezoo.create_model(name, SHAPE, **settings).double()
    with torch.no_grad():
        for p in model.parameters():  # so that weights of norms are not 1, and biases not 0
            p.add_(0.02 * torch.randn_like(p))
    return model


def pairs(*modules: tuple[nn.Module, nn.Module]) -> list[tuple[Tensor, Tensor]]:
    return [pair for a, b in modules for pair in zip(a.parameters(), b.parameters(), strict=True)]


def laplace(x_hat: Tensor, x: Tensor) -> Tensor:
    """The mean over samples of -log p under a Laplace density of scale 1."""
    return -torch.distributions.Laplace(x_hat, 1.0).log_prob(x).flatten(1).sum(1).mean()


@pytest.mark.parametrize("name", ["autoencoder_kl", "va_vae", "eq_vae"])
def test_gaussian_feature_maps(compare, name):
    model = ours(name, hidden_dims=(8, 8), likelihood="laplace", discriminator_weight=0.0, features="none").eval()
    other = diffusers.AutoencoderKL(
        latent_channels=4, norm_num_groups=8, use_quant_conv=False, use_post_quant_conv=False
    )
    other.encoder, other.decoder = copy.deepcopy(model.encoder), copy.deepcopy(model.decoder)
    x, draw = torch.rand(3, *SHAPE), torch.randn(3, *model.code_shape)
    with noise([draw]):
        found = model.loss(x)
    posterior = other.encode(x).latent_dist
    with noise([draw]):
        z = posterior.sample()
    x_hat = other.decode(z).sample
    nll, kl = laplace(x_hat, x), posterior.kl()
    with_reference = compare(name, "diffusers", "AutoencoderKL")
    mu, log_var = model.posterior(x)
    with_reference.equal("posterior mean", mu, posterior.mean)
    with_reference.equal("posterior log-variance", log_var, posterior.logvar)
    with_reference.equal("code", model.encode(x), posterior.mode())
    with_reference.equal("reconstruction", model(x), other(x).sample)
    with_reference.equal("kl of each sample", model.kl(mu, log_var), kl)
    with noise([draw.flatten(1)[None]]):
        draws, log_q = model.sample_posterior(x, 1)
    with_reference.equal("draw from the posterior", draws[0], z)
    with_reference.equal("density of the draw", -log_q[0], posterior.nll(z))
    with_reference.equal("nll", found["nll"], nll)
    with_reference.equal("kl", found["kl"], kl.mean())
    with_reference.equal("elbo", found["elbo"], -(nll + kl.mean()))
    params = pairs((model.encoder, other.encoder), (model.decoder, other.decoder))
    with_reference.equal_gradients(found["elbo"], -(nll + kl.mean()), params, "gradient of the elbo")
    if name != "va_vae":  # diffusers has no alignment loss
        with_reference.equal("loss", found["loss"], nll + 1e-6 * kl.mean())
        with_reference.equal_gradients(found["loss"], nll + 1e-6 * kl.mean(), params)
    expected = -torch.distributions.Laplace(other(x).sample, 1.0).log_prob(x).flatten(1).sum(1) + kl
    with_reference.equal("score", model.score(x), expected)


def test_decoder_that_receives_the_visible_values(compare):
    model = ours(
        "asymmetric_kl", hidden_dims=(8, 8), likelihood="laplace", discriminator_weight=0.0, features="none",
        activation="relu",
    )  # fmt: skip
    other = diffusers.AsymmetricAutoencoderKL(latent_channels=4, norm_num_groups=8)
    other.encoder, other.quant_conv, other.post_quant_conv = copy.deepcopy(model.encoder), nn.Identity(), nn.Identity()
    decoder, first = copy.deepcopy(model.decoder), other.decoder
    first.conv_in, *stages = decoder.stages
    first.mid_block, first.up_blocks = Ignoring(nn.Identity()), nn.ModuleList(Ignoring(stage) for stage in stages)
    # convolutions without the activations, which theirs applies between them
    convs = [decoder.condition[0], *(stage[-1] for stage in decoder.condition[1:])]
    first.condition_encoder.layers = nn.Sequential(*convs)
    first.conv_norm_out, first.conv_act, first.conv_out = nn.Identity(), decoder.last[0], decoder.last[1]
    x, draw = torch.rand(3, *SHAPE), torch.randn(3, *model.code_shape)
    visible = torch.rand(3, 1, 4, 4).gt(0.5).repeat_interleave(4, 2).repeat_interleave(4, 3)
    model.visible = lambda x: visible
    hidden = (~visible).double()
    with noise([draw]):
        found = model.loss(x)
    posterior = other.encode(x).latent_dist
    with noise([draw]):
        z = posterior.sample()
    nll, kl = laplace(other.decode(z, None, x, hidden).sample, x), posterior.kl().mean()
    with_reference = compare("asymmetric_kl", "diffusers", "AsymmetricAutoencoderKL")
    with_reference.equal("nll with visible places", found["nll"], nll)
    with_reference.equal("kl", found["kl"], kl)
    with_reference.equal("loss", found["loss"], nll + 1e-6 * kl)
    params = [
        *pairs((model.encoder, other.encoder), (model.decoder.stages, nn.ModuleList([first.conv_in, *stages]))),
        *pairs((model.decoder.condition, nn.ModuleList(convs)), (model.decoder.last, decoder.last)),
    ]
    with_reference.equal_gradients(found["loss"], nll + 1e-6 * kl, params)
    model.eval()
    with_reference.equal("reconstruction", model(x), other(x).sample)
    inpainted = x.where(visible, other.decode(z, None, x.where(visible, 0), hidden).sample)
    with_reference.equal("inpainted image", model.inpaint(x, visible, z), inpainted)


class Ignoring(nn.Module):
    """A layer that ignores the code that diffusers passes to each block."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, _: Any = None) -> Tensor:
        return self.layer(x)


def test_tiny_autoencoder(compare):
    model = ours("taesd", hidden_dims=(8, 8))
    blocks = {"num_encoder_blocks": (1, 3, 3), "num_decoder_blocks": (3, 3, 1)}
    other = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3, decoder_block_out_channels=(8,) * 3, **blocks
    )
    params = copy_parameters(model.encoder, other.encoder) + copy_parameters(model.decoder, other.decoder)
    x, z = torch.rand(3, *SHAPE), 3 * torch.randn(3, *model.code_shape)
    code = other.encode(2 * x - 1).latents
    x_hat = (other.decode(code).sample + 1) / 2
    with_reference = compare("taesd", "diffusers", "AutoencoderTiny")
    with_reference.equal("code", model.encode(x), code)
    with_reference.equal("decoded code", model.decode(z), (other.decode(z).sample + 1) / 2)
    found = model.loss(x)
    # variance 1/2
    nll = -torch.distributions.Normal(x_hat, 0.5**0.5).log_prob(x).flatten(1).sum(1).mean()
    with_reference.equal("loss", found["loss"], nll)
    with_reference.equal_gradients(found["loss"], nll, params)


@pytest.mark.parametrize("name", ["vq_vae", "vqgan"])
@pytest.mark.parametrize("legacy", [False, True])
def test_codebooks(compare, name, legacy):
    settings = {"discriminator_weight": 0.0, "features": "none"} if name == "vqgan" else {}
    # legacy: as in the first version, beta weights the codebook term
    model = ours(
        name, hidden_dims=(8, 8), latent_dim=4, codebook_size=16, update="gradient", dead_below=0.0,
        likelihood="laplace", beta=4.0 if legacy else 0.25, data_init=False, **settings,
    )  # fmt: skip
    other = diffusers.VQModel(latent_channels=4, num_vq_embeddings=16, norm_num_groups=8)
    other.encoder, other.decoder = copy.deepcopy(model.encoder), Ignoring(copy.deepcopy(model.decoder))
    other.quant_conv, other.post_quant_conv = nn.Identity(), nn.Identity()
    quantise = other.quantize
    quantise.legacy = legacy
    x = torch.rand(3, *SHAPE)
    with torch.no_grad():  # codes near the encoder's outputs
        codes = model.encoder(x).movedim(1, -1).reshape(-1, 4)[:16]
        model.quantiser.code_KD.copy_(codes + 0.1 * codes.std() * torch.randn_like(codes))
        quantise.embedding.weight.copy_(model.quantiser.code_KD)
    found, theirs = model.loss(x), other(x)
    z = other.encode(x).latents
    z_q, _, (_, _, index) = quantise(z)
    with_reference = compare(name, "diffusers", "VQModel" + (", legacy" if legacy else ""))
    with_reference.equal("indices", model.encode_indices(x).flatten(), index)
    with_reference.equal("quantised code", model.quantise(x)[0], z_q)
    with_reference.equal("reconstruction", model(x), theirs.sample)
    values, nll = z[0].numel(), laplace(theirs.sample, x)
    with_reference.equal("nll", found["nll"], nll)
    terms = found["codebook"] + model.beta * found["commitment"]
    scale = values * (4.0 if legacy else 1.0)
    why = "sums over the values of a code, where diffusers has means" + (
        ", and the weight 0.25 is on the other term there, which our beta of 4 equals" if legacy else ""
    )
    with_reference.scaled("codebook and commitment", terms, theirs.commit_loss, scale, why)
    params = pairs((model.encoder, other.encoder), (model.decoder, other.decoder.layer))
    params.append((model.quantiser.code_KD, quantise.embedding.weight))
    with_reference.equal_gradients(found["loss"], nll + scale * theirs.commit_loss, params)


def test_consistency_decoder(compare):
    model = ours("consistency_decoder", hidden_dims=(8, 8))
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=41, clip_denoised=False)
    scheduler.set_timesteps(41)
    with_reference = compare("consistency_decoder", "diffusers", "CMStochasticIterativeScheduler")
    low, high = model.pair(torch.linspace(1e-9, 1 - 1e-9, 200_001), torch.tensor(40.0))
    with_reference.equal("noise levels below", low.unique()[[0, 5, 20]], scheduler.sigmas.flip(0)[[1, 6, 21]].double())
    reached = high.unique()
    expected = scheduler.sigmas[:-1].flip(0).double()
    nearest = (reached[:, None] - expected).abs().argmin(1)
    with_reference.equal("noise levels above", reached, expected[nearest])
    x, z = torch.rand(2, *SHAPE), torch.randn(2, *model.code_shape, requires_grad=True)
    for i in (3, 30):
        level, t = scheduler.sigmas[i].double(), scheduler.timesteps[i]
        noisy = x + level * torch.randn_like(x)
        scheduler._step_index = i
        scaled = scheduler.scale_model_input(noisy, t)
        with noise([torch.zeros_like(x)]):
            denoised = scheduler.step(model.decoder.net(scaled, t.reshape(1, 1) / 1000, z), t, noisy).prev_sample
        found = model.decoder.f(noisy, level.reshape(1, 1, 1, 1), z)
        with_reference.equal(f"f at level {i} of 41", found, denoised)
        params = [(p, p) for p in (z, *model.decoder.parameters())]
        with_reference.equal_gradients(found.square().sum(), denoised.square().sum(), params, f"gradient of f at {i}")
    scheduler.set_timesteps(1)
    t, zeros = scheduler.timesteps[0], torch.zeros_like(x)
    output = model.decoder.net(scheduler.scale_model_input(zeros, t), t.reshape(1, 1) / 1000, z)
    with_reference.equal("reconstruction of a code", model.decode(z), scheduler.step(output, t, zeros).prev_sample)


def counterpart(model):
    """Our parameters by name, after random offsets, and the model of diffusers with these weights."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    parts = model.encoder.net, model.decoder.net
    named = {name: p for part in parts for name, p in part.named_parameters()}
    other = type(parts[0]).from_config(parts[0].config).double()
    other.load_state_dict({k: v for part in parts for k, v in part.state_dict().items()}, strict=True)
    return named, other


@pytest.mark.parametrize("kind", [CONSISTENCY, RAE])
def test_kinds_with_decoders_of_their_own(compare, kind):
    """Diffusers has no objective of a consistency decoder; its formula is tested with the model."""
    shape, config = (3, 16, 16), {RAE: {"noise_tau": 0.5, "scaling_factor": 0.7}}.get(kind)
    model = aezoo.create_model("diffusers_ae", shape, kind=kind, config=config, likelihood="laplace").double()
    named, other = counterpart(model)
    x = torch.rand(3, *shape)
    with_reference = compare("diffusers_ae", "diffusers", kind)
    z = encoded(other.eval(), x)
    with_reference.equal("code", model.encode(x), z)
    with_reference.equal("reconstruction", model(x), decoded(other, z))
    if kind == CONSISTENCY:
        images = [model.decoder.draw(z, torch.Generator().manual_seed(1))]
        images.append(decoded(other, z, torch.Generator().manual_seed(1)))
        with_reference.equal("reconstruction from drawn noise", *images)
        q = other.encode(2 * x - 1).latent_dist
        with_reference.equal("kl", model.loss(x)["kl"], q.kl().mean())
        losses = [image.square().sum() for image in (model(x), decoded(other, encoded(other, x)))]
    else:
        torch.manual_seed(1)
        losses = [model.train().loss(x)["loss"]]
        torch.manual_seed(1)
        losses.append(laplace(other.train()(x).sample, x))
        with_reference.equal("loss", *losses)
    theirs = dict(other.named_parameters())
    trained = [(p, theirs[name]) for name, p in named.items() if p.requires_grad and theirs[name].requires_grad]
    with_reference.equal_gradients(*losses, trained)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (CONSISTENCY, RAE)])
def test_models_of_diffusers(compare, kind):
    shape = (3, 32, 32)
    model = aezoo.create_model("diffusers_ae", shape, kind=kind, likelihood="laplace", beta=0.5).double()
    named, other = counterpart(model)
    x = torch.rand(3, *shape)
    with_reference = compare("diffusers_ae", "diffusers", kind)
    encoded = other.encode(2 * x - 1)
    if model.gaussian:
        posterior = encoded.latent_dist
        draw = torch.randn_like(posterior.mean)
        with noise([draw]):
            found = model.loss(x)
        with noise([draw]):
            z = posterior.sample()
        nll, kl = laplace((other.decode(z).sample + 1) / 2, x), posterior.kl().mean()
        with_reference.equal("code", model.encode(x), posterior.mode())
        with_reference.equal("kl", found["kl"], kl)
        loss = nll + 0.5 * kl
    elif kind == "VQModel":
        other.quantize.legacy = False
        found, decoded = model.loss(x), other(2 * x - 1)
        with_reference.equal("code", model.encode(x), encoded.latents)
        nll = laplace((decoded.sample + 1) / 2, x)
        terms, values = found["codebook"] + 0.25 * found["commitment"], encoded.latents[0].numel()
        why = "sums over the values of a code, where diffusers has means"
        with_reference.scaled("codebook and commitment", terms, decoded.commit_loss, values, why)
        loss = nll + values * decoded.commit_loss
    else:
        found = model.loss(x)
        z = encoded.latents if kind == "AutoencoderTiny" else encoded.latent
        with_reference.equal("code", model.encode(x), z)
        nll = loss = laplace((other.decode(z).sample + 1) / 2, x)
    with_reference.equal("nll", found["nll"], nll)
    with_reference.equal("loss", found["loss"], loss)
    theirs = dict(other.named_parameters())
    with_reference.equal_gradients(
        found["loss"], loss, [(p, theirs[name]) for name, p in named.items() if p.requires_grad]
    )


def test_stages_of_dc(compare):
    model = ours("autoencoder_kl", net="dc", hidden_dims=(4, 16), latent_dim=6)
    with_reference = compare("autoencoder_kl", "diffusers", "DCDownBlock2d, DCUpBlock2d")
    for part, name in ((model.encoder, "down"), (model.decoder, "up")):
        for i, stage in enumerate(stage for stage in part.stages if hasattr(stage, "conv")):
            before, h = stage.conv.in_channels, torch.randn(2, stage.conv.in_channels, 4, 4)
            if name == "down":
                other = DCDownBlock2d(before, stage.after, downsample=True)
            elif stage.channels % before:
                continue  # theirs can only repeat channels a whole number of times
            else:
                other = DCUpBlock2d(before, stage.channels // 4)
                stage.act = nn.Identity()  # in theirs, the activation is in the block before
            params = copy_parameters(stage, other)
            found, theirs = stage(h), other(h)
            with_reference.equal(f"stage {i} {name} of net dc", found, theirs)
            with_reference.equal_gradients(
                found.square().sum(), theirs.square().sum(), params, f"gradient of {name} {i}"
            )
