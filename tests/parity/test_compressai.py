"""Models of compressai, from its own layers with parameters computed from ours (Bégaint et al. 2020).

Parameters of its layers are functions of ours, through which gradients pass: GDN takes the roots of beta and gamma, the
entropy bottleneck f(v - m) - f(0) as f with other biases, masked convolutions the weights after the mask, and the
Gaussians scales instead of raw scales.

Source: https://github.com/InterDigitalInc/CompressAI
"""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparison import shape_of, taken
from torch import Tensor, nn
from torch.func import functional_call

import aezoo
from aezoo.bases.entropy_coded import Gaussians
from aezoo.models.compression.cheng2020 import Attention
from aezoo.nets.blocks.context import Context
from aezoo.nets.gdn import GDN

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # warnings of torch_geometric, which it imports
    from compressai import latent_codecs, layers, models
    from compressai.entropy_models import EntropyBottleneck, GaussianConditional, GaussianMixtureConditional
    from compressai.losses import RateDistortionLoss
    from compressai.models.utils import conv, deconv

SHAPE, WIDTH, CODE, SIDE, LAM = (3, 16, 16), 6, 4, 3, 0.013
GROUPS = (1, 1, 2)
PER_PIXEL = math.prod(SHAPE[1:]) * math.log(2)
UNITS = "nats per sample instead of bits per pixel"


def scale_of(raw: Tensor) -> Tensor:
    """Our scale of a raw value, which is below 256 here; theirs takes the scale itself."""
    return 0.11 + F.softplus(raw)


# ---- their layers with our weights -----------------------------------------------------------------------------------


class Raw(nn.Module):
    """Scales, or scales and means, of a network that returns means and raw scales."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)

    def forward(self, z: Tensor) -> Tensor:
        return self.in_their_order(self.net(z).split(CODE, 1))

    @staticmethod
    def in_their_order(numbers: tuple[Tensor, ...]) -> Tensor:
        *means, raw = numbers
        return torch.cat([scale_of(raw), *means], 1)


class EntropyParameters(nn.Module):
    """Our network at each position; `order` permutes channels from their order to ours."""

    def __init__(self, context: Context, order: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fuse, self.order, self.channels = copy.deepcopy(context.fuse), order, context.channels

    def forward(self, joined: Tensor) -> Tensor:
        numbers = self.fuse(self.order(joined).movedim(1, -1)).movedim(-1, 1)
        return Raw.in_their_order(numbers.split(self.channels, 1))


class Gained(nn.Module):
    """The hyper-encoder applied to the code times its gains."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.gain = copy.deepcopy(net), torch.ones(())

    def forward(self, y: Tensor) -> Tensor:
        return self.net(y * self.gain)


class Cumulative(nn.Module):
    """The function f of an entropy bottleneck, (C, 1, N) -> (C, 1, N)."""

    def __init__(self, bottleneck: EntropyBottleneck) -> None:
        super().__init__()
        self.bottleneck = bottleneck

    def forward(self, v: Tensor) -> Tensor:
        return self.bottleneck._logits_cumulative(v, stop_gradient=False)


def bottleneck(channels: int) -> EntropyBottleneck:
    return EntropyBottleneck(channels, filters=(3, 3, 3), likelihood_bound=0)


def gaussians() -> GaussianConditional:
    """Without a lower bound of the likelihood, which has its own test."""
    return GaussianConditional(None, likelihood_bound=0)


def gdn_transforms() -> tuple[nn.Module, nn.Module]:
    """Their layers that correspond to our net gdn."""
    down = nn.Sequential(conv(SHAPE[0], WIDTH), layers.GDN(WIDTH), conv(WIDTH, WIDTH), nn.Conv2d(WIDTH, CODE, 1))
    up = nn.Sequential(
        nn.Conv2d(CODE, WIDTH, 1), deconv(WIDTH, WIDTH), layers.GDN(WIDTH, inverse=True), deconv(WIDTH, SHAPE[0])
    )
    return down, up


def residual_transforms() -> tuple[nn.Module, nn.Module]:
    """Their layers that correspond to `cheng2020` without attention."""
    down = nn.Sequential(
        layers.ResidualBlockWithStride(SHAPE[0], WIDTH),
        layers.ResidualBlock(WIDTH, WIDTH),
        layers.ResidualBlockWithStride(WIDTH, WIDTH),
        layers.ResidualBlock(WIDTH, WIDTH),
        layers.conv1x1(WIDTH, CODE),
    )
    up = nn.Sequential(
        layers.conv1x1(CODE, WIDTH),
        layers.ResidualBlock(WIDTH, WIDTH),
        layers.ResidualBlockUpsample(WIDTH, WIDTH),
        layers.ResidualBlock(WIDTH, WIDTH),
        layers.subpel_conv3x3(WIDTH, SHAPE[0], 2),
    )
    return down, up


def of_layers(prefix: str, theirs: nn.Module, ours: nn.Module) -> dict[str, Tensor]:
    """Parameters of their layers computed from ours, which have the same order."""
    found = {}
    for (name, its), p in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        if name.endswith("beta"):
            p = (p**2 + 1e-6 + 2**-36).sqrt()
        elif name.endswith("gamma"):
            p = (p**2 + 2**-36).sqrt()
        found[f"{prefix}.{name}"] = p.reshape(its.shape)
    return found


def of_density(prefix: str, theirs: EntropyBottleneck, density: Any) -> dict[str, Tensor]:
    """Parameters that make theirs our density: the first bias shifts f by the median, the last one by -f(0)."""
    median, n = density.median_C[:, None, None], len(density.weights)
    found = {f"matrices.{i}": density.weights[i] for i in range(n)}
    found |= {f"factors.{i}": density.bends[i] for i in range(n - 1)}
    found |= {f"biases.{i}": density.biases[i] for i in range(n - 1)}
    found["biases.0"] = density.biases[0] - F.softplus(density.weights[0]) * median
    found[f"biases.{n - 1}"] = torch.zeros_like(median)
    found["quantiles"] = torch.cat([median - 30, median, median + 30], 2)
    inner = {f"bottleneck.{name}": value for name, value in found.items()}
    found[f"biases.{n - 1}"] = -functional_call(Cumulative(theirs), inner, (median,))
    return {f"{prefix}.{name}": value for name, value in found.items()}


def of_context(prefix: str, context: Context) -> dict[str, Tensor]:
    """Theirs sets masked weights to 0 before each use, so their gradients have no effect; ours are masked."""
    weight = context.weight * context.kernel_mask
    return {f"{prefix}context_prediction.weight": weight, f"{prefix}context_prediction.bias": context.bias}


class Theirs:
    """One of their models, with parameters computed from a copy of ours.

    Attributes:
        copy: our model, of which their parameters are functions.
        other: their model.
        given: parameters of theirs, by name.
    """

    def __init__(self, model: Any, other: Any) -> None:
        self.copy, self.other, self.given = copy.deepcopy(model), other, {}

    def share(self, **parts: tuple[nn.Module, nn.Module]) -> None:
        """Give parts, named with __ for a dot, parameters computed from ours in the same order."""
        for name, (theirs, ours) in parts.items():
            self.given |= of_layers(name.replace("__", "."), theirs, ours)

    def check_and_fill(self) -> "Theirs":
        """Check that all of their parameters are given, and copy them to their model for calls other than `forward`."""
        named = dict(self.other.named_parameters())
        assert named.keys() == self.given.keys(), named.keys() ^ self.given.keys()
        for name, p in named.items():
            p.data = self.given[name].detach().clone()
        return self

    def __call__(self, *arguments: Any) -> Any:
        return functional_call(self.other, self.given, arguments)

    def pairs(self, model: Any) -> list[tuple[Tensor, Tensor]]:
        return [*zip(model.parameters(), self.copy.parameters(), strict=True)]


# ---- noise -----------------------------------------------------------------------------------------------------------


@contextmanager
def our_noise(*draws: Tensor) -> Iterator[None]:
    """Make `torch.rand` return these plus 1/2."""
    with taken(draws) as take, mock.patch("torch.rand", lambda *shape, **_: take(shape_of(shape)) + 0.5):
        yield


@contextmanager
def their_noise(*draws: Tensor) -> Iterator[None]:
    """Make `Tensor.uniform_` return these."""
    with taken(draws) as take, mock.patch.object(Tensor, "uniform_", lambda self, *_: take(self.shape)):
        yield


def of_bottleneck(draw: Tensor) -> Tensor:
    """A draw in the layout of the entropy bottleneck, channels first."""
    return draw.transpose(0, 1).reshape(draw.shape[1], 1, -1)


# ---- our models and theirs -------------------------------------------------------------------------------------------


def ours(name: str, **settings: Any) -> Any:
    """A model with offsets added to its parameters: codes of several steps, and means and medians other than 0."""
    known = aezoo.registry.hyperparameters(name)
    given = {"hidden_dims": (WIDTH, WIDTH), "latent_dim": CODE, "hyper_dim": SIDE, "hyper_hidden_dims": (5,)}
    given |= {"lam": LAM, "groups": GROUPS, "attention": False} | settings
    model = aezoo.create_model(name, SHAPE, **{key: value for key, value in given.items() if key in known}).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        for p in [*model.encoder.parameters()][-2:]:
            p.mul_(5)
    return model


def hyperprior(model: Any, other: Any, down: nn.Module, up: nn.Module) -> Theirs:
    """Put transforms and side information networks into a model that contains all of them itself."""
    other.g_a, other.g_s, other.entropy_bottleneck = down, up, bottleneck(len(model.density.median_C))
    found = Theirs(model, other)
    mine = found.copy
    found.share(g_a=(down, mine.encoder), g_s=(up, mine.decoder))
    found.given |= of_density("entropy_bottleneck", other.entropy_bottleneck, mine.density)
    if hasattr(model, "hyper_encoder"):
        other.gaussian_conditional = gaussians()
        other.h_a = copy.deepcopy(model.hyper_encoder)
        in_context = hasattr(model, "context")
        other.h_s = copy.deepcopy(model.hyper_decoder) if in_context else Raw(model.hyper_decoder)
        found.share(h_a=(other.h_a, mine.hyper_encoder), h_s=(other.h_s, mine.hyper_decoder))
        if in_context:
            other.entropy_parameters = EntropyParameters(model.context, lambda joined: joined)
            other.context_prediction = layers.MaskedConv2d(CODE, 2 * CODE, kernel_size=5, padding=2)
            found.share(entropy_parameters=(other.entropy_parameters, mine.context.fuse))
            found.given |= of_context("", mine.context)
    return found.check_and_fill()


def codec(channels: int, context: Context, entropy_parameters: nn.Module) -> latent_codecs.CheckerboardLatentCodec:
    return latent_codecs.CheckerboardLatentCodec(
        latent_codec={"y": latent_codecs.GaussianConditionalLatentCodec(None, gaussians(), quantizer="ste")},
        entropy_parameters=entropy_parameters,
        context_prediction=layers.CheckerboardMaskedConv2d(channels, 2 * channels, kernel_size=5, padding=2),
        forward_method="onepass",
    )


def in_codecs(model: Any, part: latent_codecs.LatentCodec) -> Theirs:
    """A model of latent codecs with the given codec of the code; parameters of its parts are shared later."""
    other = models.base.SimpleVAECompressionModel()
    other.g_a, other.g_s = copy.deepcopy(model.encoder), copy.deepcopy(model.decoder)
    hyper = latent_codecs.HyperLatentCodec(
        bottleneck(SIDE), copy.deepcopy(model.hyper_encoder), copy.deepcopy(model.hyper_decoder), quantizer="noise"
    )
    other.latent_codec = latent_codecs.HyperpriorLatentCodec({"y": part, "hyper": hyper})
    found = Theirs(model, other)
    mine = found.copy
    found.share(
        g_a=(other.g_a, mine.encoder),
        g_s=(other.g_s, mine.decoder),
        latent_codec__hyper__h_a=(hyper.h_a, mine.hyper_encoder),
        latent_codec__hyper__h_s=(hyper.h_s, mine.hyper_decoder),
    )
    found.given |= of_density("latent_codec.hyper.entropy_bottleneck", hyper.entropy_bottleneck, mine.density)
    return found


def checkerboard(model: Any) -> Theirs:
    context = model.contexts[0]
    # the order in theirs is context, side information, and in ours the reverse
    fuse = EntropyParameters(context, lambda joined: joined.roll(-2 * CODE, 1))
    found = in_codecs(model, codec(CODE, context, fuse))
    found.share(latent_codec__y__entropy_parameters=(fuse, found.copy.contexts[0].fuse))
    found.given |= of_context("latent_codec.y.", found.copy.contexts[0])
    return found.check_and_fill()


def elic(model: Any) -> Theirs:
    """The order in theirs is spatial context, channel context, side information, and in ours the reverse."""

    def order(size: int, first: bool) -> Callable[[Tensor], Tensor]:
        sizes = [2 * size, 2 * CODE] if first else [2 * size, 2 * size, 2 * CODE]
        return lambda joined: torch.cat(joined.split(sizes, 1)[::-1], 1)

    parts, fuses = {}, []
    for k, (size, context) in enumerate(zip(GROUPS, model.contexts, strict=True)):
        fuses.append(EntropyParameters(context, order(size, k == 0)))
        parts[f"y{k}"] = codec(size, context, fuses[-1])
    across = {f"y{k}": copy.deepcopy(net) for k, net in enumerate(model.across, start=1)}
    found = in_codecs(model, latent_codecs.ChannelGroupsLatentCodec(parts, across, groups=[*GROUPS]))
    for k, context in enumerate(found.copy.contexts):
        prefix = f"latent_codec.y.latent_codec.y{k}."
        found.given |= of_layers(f"{prefix}entropy_parameters", fuses[k], context.fuse) | of_context(prefix, context)
        if k:
            net = found.copy.across[k - 1]
            found.given |= of_layers(f"latent_codec.y.channel_context.y{k}", across[f"y{k}"], net)
    return found.check_and_fill()


def gained(model: Any) -> Theirs:
    """Theirs also has gains of z, here 1; its hyper-encoder reads the code before the gains, ours after them."""
    part = latent_codecs.GaussianConditionalLatentCodec(None, gaussians())
    hyper = latent_codecs.GainHyperLatentCodec(bottleneck(SIDE), Gained(model.hyper_encoder), Raw(model.hyper_decoder))
    found = Theirs(model, latent_codecs.GainHyperpriorLatentCodec({"y": part, "hyper": hyper}))
    found.share(
        hyper__h_a=(hyper.h_a, found.copy.hyper_encoder),
        hyper__h_s=(hyper.h_s, found.copy.hyper_decoder),
    )
    found.given |= of_density("hyper.entropy_bottleneck", hyper.entropy_bottleneck, found.copy.density)
    return found.check_and_fill()


def theirs(name: str, model: Any) -> Theirs:
    if name in IN_PLACES:
        return IN_PLACES[name](model)
    if name == "cheng2020":
        return hyperprior(model, models.Cheng2020Anchor(WIDTH), *residual_transforms())
    return hyperprior(model, getattr(models, PARTS[name])(WIDTH, CODE), *gdn_transforms())


PARTS = {
    "factorized_prior": "FactorizedPrior",
    "scale_hyperprior": "ScaleHyperprior",
    "mean_scale_hyperprior": "MeanScaleHyperprior",
    "joint_ar_hyperprior": "JointAutoregressiveHierarchicalPriors",
    "cheng2020": "Cheng2020Anchor",
    "checkerboard": "CheckerboardLatentCodec",
    "elic": "ChannelGroupsLatentCodec",
}
IN_PLACES = {"checkerboard": checkerboard, "elic": elic}
AUTOREGRESSIVE = ("joint_ar_hyperprior", "cheng2020")


def settings_of(name: str) -> dict[str, Any]:
    return {"mixtures": 1} if name == "cheng2020" else {"activation": "relu"}


def compare_losses(with_reference: Any, model: Any, found: dict[str, Tensor], output: Any, x: Tensor) -> Tensor:
    """Compare both losses and their terms, and return theirs."""
    expected = RateDistortionLoss(LAM)(output, x)
    constant = x[0].numel() / 2 * math.log(math.pi)  # constant of the likelihood
    with_reference.equal("bpp", found["bpp"], expected["bpp_loss"])
    with_reference.equal("mse", (found["nll"] - constant) / x[0].numel(), expected["mse_loss"])
    ours_without = found["loss"] - model.weight * constant
    with_reference.scaled("loss without constants", ours_without, expected["loss"], PER_PIXEL, UNITS)
    return expected["loss"]


@pytest.mark.parametrize("name", [*PARTS])
def test_compression_losses_in_training(compare, name):
    model = ours(name, **settings_of(name)).train()
    other, x = theirs(name, model), torch.rand(3, *SHAPE)
    other.other.train()
    u_y = torch.rand(3, *model.code_shape) - 0.5
    if name == "factorized_prior":
        mine, its = [u_y], [of_bottleneck(u_y)]
    else:
        u_z = torch.rand(3, *model.z_shape) - 0.5
        mine, its = [u_z, u_y], [of_bottleneck(u_z), u_y]
    if name in AUTOREGRESSIVE:
        its.append(u_y)  # theirs draws noise for the context and again for the rate
    if name in IN_PLACES:
        parts = u_y.split(GROUPS, 1) if name == "elic" else [u_y]
        mine = [u_z, *(u.flatten(2)[..., at] for u in parts for at in (model.anchors, model.others))]
        its = [of_bottleneck(u_z), *(u for u in parts for _ in range(2))]
    with our_noise(*mine):
        found = model.loss(x)
    with their_noise(*its):
        output = other(x)
    with_reference = compare(name, "compressai", PARTS[name])
    loss = compare_losses(with_reference, model, found, output, x)
    with_reference.equal_gradients(
        found["loss"], loss, other.pairs(model), scale=PER_PIXEL, reason=UNITS, quantity="gradient of the loss"
    )
    rates = RateDistortionLoss(0)(output, x)["loss"]
    with_reference.equal_gradients(found["bpp"], rates, other.pairs(model), quantity="gradient of the rate")


def checkerboards(other: nn.Module) -> list[Any]:
    return [part for part in other.modules() if isinstance(part, latent_codecs.CheckerboardLatentCodec)]


@pytest.mark.parametrize("name", [name for name in PARTS if name not in AUTOREGRESSIVE])
def test_compression_losses_in_evaluation(compare, name):
    model = ours(name, **settings_of(name)).eval()
    other, x = theirs(name, model), torch.rand(3, *SHAPE)
    for part in checkerboards(other.other):
        part.forward_method = "twopass"  # as in their coder
    seen = []
    other.other.g_s.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    output = other.other.eval()(x)
    assert int(model.encode_symbols(x).abs().max()) > 1
    with_reference = compare(name, "compressai", PARTS[name])
    compare_losses(with_reference, model, model.loss(x), output, x)
    with_reference.equal("codes", model.encode(x), seen[0])
    with_reference.equal("reconstructions", model(x), output["x_hat"])


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_codes_place_after_place(compare, name):
    """Compared with their coder; their `forward` gives the context round(y), which their coder does not."""
    model = ours(name, **settings_of(name)).eval()
    other, x = theirs(name, model).other.eval(), torch.rand(3, *SHAPE)
    other.update(force=True)
    part = latent_codecs.RasterScanLatentCodec(
        other.gaussian_conditional, other.entropy_parameters, other.context_prediction
    )
    hyper = latent_codecs.HyperLatentCodec(other.entropy_bottleneck, other.h_a, other.h_s)
    together = latent_codecs.HyperpriorLatentCodec({"y": part, "hyper": hyper})
    with torch.no_grad():
        y_hat = together.compress(other.g_a(x))["y_hat"]
    assert int(model.encode_symbols(x).abs().max()) > 1
    with_reference = compare(name, "compressai", "RasterScanLatentCodec")
    with_reference.equal("codes", model.encode(x), y_hat)
    with_reference.equal("reconstructions", model(x), other.g_s(y_hat))


@pytest.mark.parametrize("training", [True, False])
def test_gained_hyperprior(compare, training):
    lams = (0.004, LAM)
    model = ours("gained_hyperprior", lams=lams, activation="relu").train(training)
    other, x = gained(model), torch.rand(4, *SHAPE)
    other.other.train(training)
    quality_B = torch.tensor([0, 1, 1, 0]) if training else torch.full((4,), 1)
    mine = other.copy
    gain, inverse = (of[quality_B].exp()[..., None, None] for of in (mine.log_gain_SM, mine.log_inverse_SM))
    other.other.hyper.h_a.gain = gain
    u_y, u_z = (torch.rand(4, *shape) - 0.5 for shape in (model.code_shape, model.z_shape))
    with our_noise(*([quality_B / 2 - 0.25, u_z, u_y] if training else [])):
        found = model.loss(x)
    with their_noise(*([of_bottleneck(u_z), u_y] if training else [])):
        output = other(mine.encoder(x), gain, torch.ones(()), inverse, torch.ones(()))
    output["x_hat"] = mine.decoder(output["y_hat"])
    loss = torch.zeros(())
    for s, lam in enumerate(lams):
        of = quality_B == s
        if bool(of.any()):
            part = {"x_hat": output["x_hat"][of], "likelihoods": {k: v[of] for k, v in output["likelihoods"].items()}}
            loss = loss + RateDistortionLoss(lam)(part, x[of])["loss"] * of.double().mean()
    expected = RateDistortionLoss(0)(output, x)
    with_reference = compare("gained_hyperprior", "compressai", "GainHyperpriorLatentCodec")
    with_reference.equal("bpp", found["bpp"], expected["bpp_loss"])
    constant = x[0].numel() / 2 * math.log(math.pi)
    weight = 255**2 * math.log(2) / SHAPE[0] * sum(lams[s] for s in quality_B) / 4
    with_reference.scaled("loss without constants", found["loss"] - weight * constant, loss, PER_PIXEL, UNITS)
    if not training:
        with_reference.equal("codes", model.encode(x), output["y_hat"])
        return
    with_reference.equal_gradients(
        found["loss"], loss, other.pairs(model), scale=PER_PIXEL, reason=UNITS, quantity="gradient of the loss"
    )


# ---- distributions ---------------------------------------------------------------------------------------------------


def test_factorised_density(compare):
    model = ours("factorized_prior")
    other = theirs("factorized_prior", model)
    density, its = model.density, other.other.entropy_bottleneck
    v = torch.linspace(-6, 6, 41)
    f = Cumulative(its)(v.expand(CODE, 1, -1))[:, 0]
    with_reference = compare("factorized_prior", "compressai", "EntropyBottleneck")
    median_C = density.median_C.detach()
    with_reference.equal("cumulative distribution", density.logits(v - median_C[:, None]).sigmoid(), f.sigmoid())
    low, high = torch.full((2, CODE, 1, 1), 50.0) * torch.tensor([-1, 1]).view(2, 1, 1, 1)
    found = its._search_target(Cumulative(its), torch.zeros(()), low, high, 0, 1e-12)
    with_reference.equal("medians", median_C, found[:, 0, 0])
    # theirs has a second loss, which is minimal at the medians
    at_median = Cumulative(its)(median_C[:, None, None])
    with_reference.equal("probabilities below the medians", torch.full((CODE, 1, 1), 0.5), at_median.sigmoid())
    # the tails of our tables
    its.target = torch.tensor([-math.log(2**26 - 1), 0.0, math.log(2**26 - 1)])
    its.quantiles.data = torch.stack(
        [its._search_target(Cumulative(its), target, low, high, 0, 1e-12)[:, :, 0] for target in its.target], 2
    )
    its.update(force=True)
    for c, (first, mass) in enumerate(density.tables()):
        n = int(its._cdf_length[c]) - 2
        start = int(its._offset[c])
        at = (torch.arange(n) + start + median_C[c])[None, None].expand(CODE, 1, -1)
        pmf = its._likelihood(at)[0][c, 0].detach().numpy()
        both = slice(max(first, start), min(first + len(mass), start + n))
        assert both.stop - both.start > 4
        with_reference.equal(
            "probabilities of integers",
            mass[both.start - first : both.stop - first],
            pmf[both.start - start : both.stop - start],
        )


def test_gaussian_likelihoods(compare):
    its = GaussianConditional(None)
    its.update_scale_table(models.get_scale_table().tolist())
    mean, raw, v = torch.randn(3, 2, CODE, 5)
    scale = scale_of(raw)
    law = Gaussians(mean, scale, 0)
    with_reference = compare("mean_scale_hyperprior", "compressai", "GaussianConditional")
    with_reference.equal("likelihoods", law.log_mass(v).exp(), its._likelihood(v, scale, mean))
    with_reference.equal("scales of tables", np.geomspace(0.11, 256, 64), its.scale_table)
    far = mean + 40
    with_reference.deviates(
        "log-likelihoods 40 steps from the mean",
        law.log_mass(far),
        GaussianConditional(None)(far, scale, mean, training=False)[1].log(),
        "theirs are at least log 1e-9; the paper has no bound",
        follows="ours",
    )
    scales = torch.linspace(0.2, 90, 50)
    with_reference.deviates(
        "indices of tables",
        Gaussians(torch.zeros(50), scales, 0).table,
        its.build_indexes(scales),
        "theirs takes the next larger scale of the tables, ours the nearest; the paper has no tables",
        follows="both",
    )


def test_mixture_likelihoods(compare):
    model = ours("cheng2020", mixtures=3)
    means, raws, logits = torch.randn(3, 3, 2, CODE, 3, 3)
    values = [v.requires_grad_() for v in (means, raws, logits, torch.randn(2, CODE, 3, 3))]
    copies = [v.detach().clone().requires_grad_() for v in values]
    law = model.distribution(*values[0], *values[1], *values[2])
    scales, its_means, weights = (
        torch.cat([*part], 1) for part in (scale_of(copies[1]), copies[0], copies[2].softmax(0))
    )
    its = GaussianMixtureConditional(K=3, likelihood_bound=0)
    likelihoods = its._likelihood(copies[3], scales, its_means, weights)
    found = law.log_mass(values[3])
    with_reference = compare("cheng2020", "compressai", "GaussianMixtureConditional")
    with_reference.equal("likelihoods", found.exp(), likelihoods)
    with_reference.equal_gradients(found.sum(), likelihoods.log().sum(), zip(values, copies, strict=True))
    integers = its(copies[3], scales, its_means, weights, training=False)[0]
    with_reference.deviates(
        "codes in evaluation",
        law.mean + (values[3] - law.mean).round(),
        integers,
        "theirs are integers, ours integers from the mixture's mean on",
        follows="theirs",
    )


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
def test_divisive_normalisation(compare, inverse):
    mine, its = GDN(WIDTH, inverse), layers.GDN(WIDTH, inverse)
    with torch.no_grad():
        for p in mine.parameters():
            p += 0.3 * torch.randn_like(p)
    twin, x, weight = copy.deepcopy(mine), torch.randn(2, WIDTH, 4, 4), torch.randn(2, WIDTH, 4, 4)
    given = {name[4:]: value for name, value in of_layers("gdn", its, twin).items()}
    found, expected = mine(x), functional_call(its, given, (x,))
    with_reference = compare("factorized_prior", "compressai", "GDN")
    quantity = "inverse normalisation" if inverse else "divisive normalisation"
    with_reference.equal(quantity, found, expected)
    pairs = zip(mine.parameters(), twin.parameters(), strict=True)
    with_reference.equal_gradients((found * weight).sum(), (expected * weight).sum(), pairs, f"gradient of {quantity}")


def test_attention(compare):
    mine, its = Attention(2, WIDTH, "relu"), layers.AttentionBlock(WIDTH)
    pairs = [*zip(mine.parameters(), its.parameters(), strict=True)]
    for p, other in pairs:
        other.data = p.detach().clone()
    x, weight = torch.randn(2, WIDTH, 4, 4), torch.randn(2, WIDTH, 4, 4)
    with_reference = compare("cheng2020", "compressai", "AttentionBlock")
    with_reference.deviates(
        "attention",
        mine(x),
        its(x),
        "theirs has another ReLU after each residual unit, which the code of the paper's authors has not",
        follows="ours",
    )
    for unit in [*its.conv_a, *its.conv_b][:6]:
        unit.relu = nn.Identity()
    found, expected = mine(x), its(x)
    with_reference.equal("attention without these", found, expected)
    with_reference.equal_gradients((found * weight).sum(), (expected * weight).sum(), pairs, "gradient of attention")
