"""Losses of pythae around copies of our networks: flows, regularised and quantised codes, two stages, similarity."""

import copy
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from comparison import Comparison, noise
from pythae import samplers
from pythae.models.base.base_utils import ModelOutput
from pythae.models.normalizing_flows import MAF, MAFConfig, NFModel
from pythae_copies import (
    BATCH,
    LATENT,
    LOSSES,
    SHAPE,
    Pairs,
    constant,
    decoder_pairs,
    deterministic,
    encoder_pairs,
    named,
    nll_of,
    ours,
    pairs,
    theirs,
)
from torch import Tensor, nn

import aezoo
from aezoo.nets.blocks.flows import above_minus_one
from aezoo.nets.blocks.ssim import similarity

# ---- flows -----------------------------------------------------------------------------------------------------------


def drawn_bound(model: Any, x: Tensor) -> Tensor:
    """-log p(x|z) + log q(z|x) - log p(z) of one draw, with gradients."""
    return -type(model).log_likelihood.__wrapped__(model, x, 1).mean()


DRAWN = "the KL of q_0 is the closed form and not that of the draw, which has the same mean"


@pytest.mark.parametrize("likelihood", LOSSES)
def test_radial_flow_of_vae_flow(compare, likelihood):
    model = ours("vae_flow", flow="radial", n_flows=2, likelihood=likelihood)
    other = theirs("VAE_LinNF", model, likelihood=likelihood, flows=["Radial", "Radial"])

    def head(out: Tensor) -> dict[str, Tensor]:
        mean, log_var, *steps = out.split([LATENT, LATENT, *[LATENT, 1, 1] * 2], 1)
        for layer, (x0, a, b) in zip(other.net, (steps[:3], steps[3:]), strict=True):
            a = nn.functional.softplus(a) + 1e-3
            set_tensors(layer, x0=x0, log_alpha=a.log(), beta=torch.log(torch.expm1(a * (1 + above_minus_one(b)))))
        return {"embedding": mean, "log_covariance": log_var}

    other.encoder.head = head
    equal_flows(compare("vae_flow", "pythae", "VAE_LinNF (radial)"), model, other, torch.rand(BATCH, *SHAPE))


def test_planar_flow_of_vae_flow(compare):
    model = ours("vae_flow", flow="planar", n_flows=2)
    other = theirs("VAE_LinNF", model, flows=["Planar", "Planar"])

    def head(out: Tensor) -> dict[str, Tensor]:
        mean, log_var, *steps = out.split([LATENT, LATENT, *[LATENT, LATENT, 1] * 2], 1)
        for layer, (u, w, b) in zip(other.net, (steps[:3], steps[3:]), strict=True):
            # theirs takes u for u', which makes the step invertible
            w_u = (w * u).sum(1, keepdim=True)
            u = u + (above_minus_one(w_u) - w_u) * w / (w**2).sum(1, keepdim=True)
            # the parameters of a batch of one
            set_tensors(layer, u=u[:1], w=w[:1], b=b[0])
        return {"embedding": mean, "log_covariance": log_var}

    other.encoder.head = head
    row, x, draw = compare("vae_flow", "pythae", "VAE_LinNF (planar)"), torch.rand(1, *SHAPE), torch.randn(1, LATENT)
    with noise([draw[None]]):
        found = drawn_bound(model, x)
    with noise([draw]):
        expected = other({"data": x})
    log = torch.log
    with mock.patch("torch.log", lambda at: log(at - 1e-4)):
        equal_flows(row, model, other, x, ", theirs without 1e-4")
    with noise([draw]):
        nll = model.loss(x)["nll"]
    reason = "theirs adds 1e-4 to the determinant in the logarithm"
    row.deviates("kl of the draw", found - nll, expected.reg_loss, reason, follows="ours")


def set_tensors(layer: nn.Module, **tensors: Tensor) -> None:
    """Replace parameters of a layer by tensors."""
    for name, tensor in tensors.items():
        layer._parameters.pop(name, None)
        setattr(layer, name, tensor)


def equal_flows(
    row: Comparison, model: Any, other: Any, x: Tensor, of: str = "", more: Pairs | None = None, order: int = 1
) -> None:
    """Compare the bound with a sampled KL, its terms and gradients, and log-likelihoods; order is that of noise."""
    draw, off, n = torch.randn(len(x), LATENT), constant(model, x), 5
    with noise([draw[None]]):
        found = drawn_bound(model, x)
    with noise([draw]):
        terms = model.loss(x)
    with noise([draw if order > 0 else draw.flip(1)]):
        expected = other({"data": x})
    row.equal(named("nll", off) + of, terms["nll"] - off, expected.recon_loss)
    row.deviates(f"kl{of}", terms["kl"], expected.reg_loss, DRAWN, follows="both")
    row.equal(named(f"loss by the drawn KL{of}", off), found - off, expected.loss)
    both = [*pairs(model, other), *(more or [])]
    row.equal_gradients(found, expected.loss, both, f"gradient by the drawn KL{of}")
    draws = torch.randn(n, len(x), LATENT)
    with noise([draws]):
        found = model.log_likelihood(x, n)
    if order < 0:
        draws = draws.flip(2)
    nll = [nll_of(other, x[i], n, draws[:, i]) for i in range(len(x))]
    row.equal(f"log-likelihood by {n} draws{of}", found, nll)


class MADE(nn.Module):
    """A copy of our layer in their interface, which refers to the class by name.

    Args:
        layer: our layer.
        head: computes their mean and log-variance from that layer and z.
    """

    def __init__(self, layer: nn.Module, head: Callable[[Any, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.layer, self.head = copy.deepcopy(layer), head

    def forward(self, z: Tensor) -> ModelOutput:
        mu, log_var = self.head(self.layer, z)
        return ModelOutput(mu=mu, log_var=log_var)


@pytest.mark.parametrize("likelihood", LOSSES)
def test_steps_of_vae_iaf(compare, likelihood):
    width = 5
    model = ours("vae_iaf", n_flows=3, flow_width=width, likelihood=likelihood)
    context: list[Tensor] = []

    def head(out: Tensor) -> dict[str, Tensor]:
        mean, log_var, h = out.split([LATENT, LATENT, width], 1)
        context.append(h)
        # theirs also reverses the order before the first step
        return {"embedding": mean.flip(1), "log_covariance": log_var.flip(1)}

    def affine(layer: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        m, a = layer(z, context[-1])
        gate = torch.sigmoid(a + 1.5)
        return (1 - gate) * m, gate.log()

    other = theirs("VAE_IAF", model, head, likelihood, n_made_blocks=3)
    other.iaf_flow.net = nn.ModuleList(MADE(layer, affine) for layer in reversed(model.steps))
    of_steps = [
        pair
        for ours_t, theirs_t in zip(model.steps, reversed(other.iaf_flow.net), strict=True)
        for pair in zip(ours_t.parameters(), theirs_t.parameters(), strict=True)
    ]
    row = compare("vae_iaf", "pythae", "VAE_IAF around our steps")
    equal_flows(row, model, other, torch.rand(BATCH, *SHAPE), more=of_steps, order=-1)


def test_density_of_flow_prior_vae(compare):
    model = ours("flow_prior_vae", prior="maf", n_flows=3, flow_width=5)
    flow = MAF(MAFConfig(input_dim=(LATENT,), n_made_blocks=3, include_batch_norm=False)).double()

    def head(layer: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        m, a = layer.shift_and_log_scale(z)
        return -m * torch.exp(-a), -a

    def reversed_head(layer: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_var = head(layer, z.flip(1))
        return mu.flip(1), log_var.flip(1)

    # theirs reverses the order after each layer
    flow.net = nn.ModuleList(MADE(layer, reversed_head if t % 2 else head) for t, layer in enumerate(model.flow))
    of_prior = torch.distributions.MultivariateNormal(torch.zeros(LATENT), torch.eye(LATENT))
    other, z = NFModel(of_prior, flow), torch.randn(BATCH, LATENT)
    found, expected = -model.log_prior(z).sum(), other({"data": z}).loss
    row = compare("flow_prior_vae", "pythae", "NFModel of MAF around our layers")
    row.equal("-log p(z)", found, expected)
    of_flow = [*zip(model.flow.parameters(), flow.parameters(), strict=True)]
    row.equal_gradients(found, expected, of_flow, "gradient of -log p(z)")
    u = torch.randn(BATCH, LATENT)
    with noise([u]):
        drawn = model.sample_prior(BATCH)
    # after three layers the order in theirs is reversed
    row.equal("codes drawn from the prior", drawn, flow.inverse(u.flip(1)).out)


# ---- regularised and quantised codes ---------------------------------------------------------------------------------


def test_losses_of_rae_l2(compare):
    decay = 0.02
    model = ours("rae", beta=0.1, regulariser="l2", regulariser_weight=decay / 2)
    other = theirs("RAE_L2", model, deterministic, "gaussian", embedding_weight=0.1, reg_weight=decay)
    x = torch.rand(BATCH, *SHAPE)
    found, expected = model.loss(x), other({"data": x})
    row, off = compare("rae", "pythae", "RAE_L2"), constant(model, x)
    row.equal("nll without constant", found["nll"] - off, expected.recon_loss)
    row.equal("term code", found["code"], expected.embedding_loss)
    row.equal("code", model.encode(x), expected.z)
    row.equal("loss without l2 and constant", found["loss"] - decay / 2 * found["l2"] - off, expected.loss)
    row.equal_gradients(found["loss"], expected.loss, encoder_pairs(model, other), "gradient of encoder")
    # theirs leaves ||theta||^2 to the weight decay of the decoder's optimiser, see their pipelines/training.py
    steps = []
    for loss, decoder, weight_decay in ((found["loss"], model.decoder, 0.0), (expected.loss, other.decoder.net, decay)):
        before = nn.utils.parameters_to_vector(decoder.parameters()).detach()
        sgd = torch.optim.SGD(decoder.parameters(), lr=1.0, weight_decay=weight_decay)
        loss.backward()
        sgd.step()
        steps.append(nn.utils.parameters_to_vector(decoder.parameters()) - before)
    row.equal("step of SGD of the decoder, their weight_decay twice regulariser_weight", *steps)


@pytest.mark.parametrize("own_encoder", [True, False], ids=["encoder", "identity"])
def test_losses_of_rae_gp(compare, own_encoder):
    size = math.prod(SHAPE)
    model = ours("rae", beta=0.1, regulariser="gp", regulariser_weight=0.01, latent_dim=size)
    if not own_encoder:
        model.encoder = nn.Flatten()
    other = theirs("RAE_GP", model, deterministic, "gaussian", embedding_weight=0.1, reg_weight=0.01)
    x = torch.rand(BATCH, *SHAPE)
    expected = other({"data": x.clone()})
    # theirs is J' v for this v
    with noise([torch.ones(BATCH, *SHAPE)]):
        found = model.loss(x)
    row, off = compare("rae", "pythae", "RAE_GP"), constant(model, x)
    row.equal("nll without constant", found["nll"] - off, expected.recon_loss)
    row.equal("term code", found["code"], expected.embedding_loss)
    if own_encoder:
        reason = "the gradient of the decoder by the code, as in section 3; theirs is that of all by the data"
        row.deviates("gp for v = 1", found["gp"], expected.gen_reg_loss, reason, follows="ours")
        rest = [total - 0.01 * gp for total, gp in zip(*terms_of_gp(found, expected), strict=True)]
        row.equal("loss without gp and constant", rest[0] - off, rest[1])
        row.equal_gradients(*rest, pairs(model, other), "gradient without gp")
        return
    row.equal("gp for v = 1, codes that are data", found["gp"], expected.gen_reg_loss)
    row.equal("loss without constant for v = 1, codes that are data", found["loss"] - off, expected.loss)
    quantity = "gradient for v = 1, codes that are data"
    row.equal_gradients(found["loss"], expected.loss, decoder_pairs(model, other), quantity)


def terms_of_gp(found: dict[str, Tensor], expected: ModelOutput) -> tuple[list[Tensor], list[Tensor]]:
    return [found["loss"], expected.loss], [found["gp"], expected.gen_reg_loss]


def vq_vae(update: str) -> tuple[Any, Any]:
    places = 2
    settings = {"net": "mlp", "places": places, "codebook_size": 8, "data_init": False, "dead_below": 0.0, "decay": 0.9}
    model = ours("vq_vae", update=update, likelihood="gaussian", beta=0.25, **settings)
    size, ema = places * LATENT, update == "ema"
    weights = {"commitment_loss_factor": 0.25 * size, "quantization_loss_factor": size}
    other = theirs(
        "VQVAE",
        model,
        lambda out: {"embedding": out[..., None]},
        "gaussian",
        num_embeddings=8,
        use_ema=ema,
        decay=0.9,
        **({"commitment_loss_factor": 0.25 * size} if ema else weights),
    )
    return model, other


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_losses_of_vq_vae(compare, update):
    model, other = vq_vae(update)
    codes = other.quantizer.embeddings
    code_KD = model.quantiser.code_KD
    (codes if update == "ema" else codes.weight).data.copy_(code_KD)
    x, row, of = torch.rand(BATCH, *SHAPE), compare("vq_vae", "pythae", "VQVAE"), f" with update {update}"
    indices, code = model.encode_indices(x)[:, 0], model.encode(x)
    if update == "ema":
        other.quantizer.ema_embed.copy_(code_KD)
    # theirs casts the one-hot rows to float32
    with mock.patch("torch.float", torch.float64):
        expected = other({"data": x})
    found, off, size = model.loss(x), constant(model, x), math.prod(model.code_shape)
    row.equal(f"indices{of}", indices, expected.quantized_indices[:, 0, :, 0])
    row.equal(f"code{of}", code, expected.z[..., 0])
    row.equal(f"loss without constant{of}, their weights {size} times ours", found["loss"] - off, expected.loss)
    row.equal(f"nll without constant{of}", found["nll"] - off, expected.recon_loss)
    both = pairs(model, other) + ([(code_KD, codes.weight)] if update == "gradient" else [])
    row.equal_gradients(found["loss"], expected.loss, both, f"gradient{of}, their weights {size} times ours")
    # theirs keeps the weighted sum of terms, which have equal values
    mean = expected.vq_loss / (size * (0.25 if update == "ema" else 1.25))
    for name in ("commitment",) if update == "ema" else ("commitment", "codebook"):
        row.scaled(f"{name}{of}", found[name], mean, size, "summed over channels and places, not their mean")
    if update == "ema":
        row.equal("moving averages of sums", model.quantiser.sum_KD, other.quantizer.ema_embed)
        reason = "theirs starts N_k at 0 and adds 1e-5 to it, so that a code that no row chose becomes m_k / 1e-5"
        row.deviates("codes after the first step", code_KD, other.quantizer.embeddings, reason, follows="ours")


# ---- two stages, and structural similarity ---------------------------------------------------------------------------


def second_stage(model: Any, sampler: Any) -> tuple[Any, Pairs]:
    """Their second stage with copies of our weights, and the pairs of parameters."""
    second = sampler.second_vae.double()
    encoder, decoder = ([*part.parameters()] for part in (model.second.encoder, model.second.decoder))
    held = [p.detach().clone().requires_grad_() for p in encoder]
    for layer, (weight, bias) in zip(second.encoder.layers, (held[:2], held[2:4]), strict=True):
        set_tensors(layer[0], weight=weight, bias=bias)
    # theirs has separate layers for mean and log-variance
    for layer, rows in ((second.encoder.mu, slice(LATENT)), (second.encoder.std, slice(LATENT, None))):
        set_tensors(layer, weight=held[4][rows], bias=held[5][rows])
    _, *copies = second.decoder.parameters()
    for copied, p in zip(copies, decoder, strict=True):
        copied.data.copy_(p)
    return second, [*zip(encoder, held, strict=True), *zip(decoder, copies, strict=True)]


def test_both_stages_of_two_stage_vae(compare):
    model = ours("two_stage_vae", likelihood="gaussian:1", second_hidden_dims=(8, 8))
    for p in model.second.likelihood.parameters():
        p.data.zero_()
    other = theirs("VAE", model, likelihood="gaussian:1")
    config = samplers.TwoStageVAESamplerConfig(second_stage_depth=2, second_layers_dim=8)
    sampler = samplers.TwoStageVAESampler(other, config)
    second, of_second = second_stage(model, sampler)
    x, draws = torch.rand(BATCH, *SHAPE), torch.randn(3, BATCH, LATENT)
    with noise(draws[:2]):
        found = model.loss(x)
    with noise(draws[:1]):
        first = other({"data": x})

    def run() -> ModelOutput:
        with noise(draws[1:]):
            return second({"data": first.z.detach()})

    row = compare("two_stage_vae", "pythae", "VAE and TwoStageVAESampler")
    off, of_codes = constant(model, x), constant(model.second, first.z.detach())
    row.equal("nll without constant", found["nll"] - off, first.recon_loss)
    row.equal("kl", found["kl"], first.reg_loss)
    reason = "the scale of codes given u is learned; theirs adds gamma_z times a draw, for which gamma_z = 0 is best"
    code_nll = found["code_nll"] - of_codes
    row.deviates("code_nll without constant, s and gamma_z 1", code_nll, run().recon_loss, reason, follows="ours")
    with noise(draws[:2]):
        drawn = model.sample(BATCH)
    sampler.is_fitted = True
    with noise(draws[:2]):
        row.equal("samples, s and gamma_z 1", drawn, sampler.sample(BATCH))
    second.decoder.gamma_z.data.zero_()
    expected = run()
    row.equal("code_nll without constant, s 1, gamma_z 0", code_nll, expected.recon_loss)
    row.equal("code_kl", found["code_kl"], expected.reg_loss)
    total = first.loss + expected.loss
    row.equal("loss without constants, s 1, gamma_z 0", found["loss"] - off - of_codes, total)
    row.equal_gradients(found["loss"], total, [*pairs(model, other), *of_second], "gradient, s 1, gamma_z 0")


def test_similarity_of_msssim_vae(compare):
    shape, pad = (2, 20, 20), (5,) * 4
    model = aezoo.create_model("msssim_vae", shape, latent_dim=LATENT, hidden_dims=(8,), weight=1.0).double()
    other = theirs("MSSSIM_VAE", model)
    x, draw = torch.rand(BATCH, *shape), torch.randn(BATCH, LATENT)
    y, theirs_y = (torch.lerp(x, draw[:, :1, None, None].sigmoid(), 0.3).requires_grad_() for _ in range(2))
    row = compare("msssim_vae", "pythae", "MSSSIM_VAE")
    # theirs casts the window to float32
    with mock.patch("torch.Tensor.float", torch.Tensor.double):
        with noise([draw]):
            expected = other({"data": x})
        ssim, cs = other.msssim.ssim(x, theirs_y)
    with noise([draw]):
        found = model.loss(x)
    row.equal("kl", found["kl"], expected.reg_loss)
    padded, window = (nn.functional.pad(x, pad), nn.functional.pad(y, pad)), model.window
    for name, value, luminance in (("SSIM", ssim, True), ("SSIM without luminance", cs, False)):
        of_ours = similarity(*padded, window, luminance).mean()
        row.equal(f"{name}, borders of zeros", of_ours, value)
        row.equal_gradients(of_ours, value, [(y, theirs_y)], f"gradient of {name} by the image, borders of zeros")
    reason = (
        "MS-SSIM of each image over scales that hold the window, as of Wang et al. 2003; theirs takes means over the"
        " batch, maps them to [0, 1], raises the last to a power for each scale but one, and pads with zeros"
    )
    row.deviates("nll at weight 1", found["nll"], expected.recon_loss, reason, follows="ours")
