"""Laws of the first stages of latent diffusion: gradients of each player, the adaptive weight, settings."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributions as D
from torch import Tensor, nn
from torch.utils.data import DataLoader

import aezoo
from aezoo.errors import AezooError
from aezoo.nets.blocks.features import random_features

SHAPE, X = (2, 9, 7), 126


NETS = ("resnet", "conv", "convnext", "conv_keras", "unet", "dc", "ldm", "vit", "mixer")


def small(name: str = "autoencoder_kl", **settings: Any) -> Any:
    settings = {"input_shape": SHAPE, "latent_dim": 3, "hidden_dims": (8, 6), "discriminator_dims": (8, 8), **settings}
    return aezoo.create_model(name, **settings).double()


def images(n: int = 6, seed: int = 7, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def last_layer(model: Any) -> nn.Parameter:
    """The last weight of a sequential decoder."""
    return [m.weight for m in model.decoder.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)][-1]


def sets(model: Any) -> dict[str, list[nn.Parameter]]:
    parts = (model.encoder, model.decoder, model.likelihood)
    return {
        "autoencoder": [p for part in parts for p in part.parameters()],
        "discriminator": [*model.discriminator.parameters()],
    }


Tau = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def by_hand(model: Any, x: Tensor, tau: Tau = lambda x, z: (x, z)) -> dict[str, Tensor]:
    """All terms by torch.distributions, differentiable; tau maps x and z to targets and decoder inputs."""
    mu, log_var = model.encoder(x).chunk(2, 1)
    q = D.Normal(mu, (0.5 * log_var).exp())
    kl = D.kl_divergence(q, D.Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum((1, 2, 3)).mean()
    x, *decoded = tau(x, mu + q.scale * torch.randn(mu.shape, dtype=mu.dtype))
    x_hat = model.decoder(*decoded)
    scale = model.likelihood.log_scale.exp()
    nll = -D.Laplace(x_hat, scale.expand_as(x_hat)).log_prob(x).sum((1, 2, 3)).mean()
    net = random_features(SHAPE).double()
    pairs = zip(net(x_hat), net(x), strict=True)
    perceptual = x[0].numel() * torch.stack([0.5 * nn.functional.mse_loss(a, b) for a, b in pairs]).sum()
    if model.distance.features == "none":
        perceptual = 0 * perceptual
    gan = -model.discriminator(x_hat).mean()
    rec = nll + model.perceptual_weight * perceptual
    at_w = [torch.autograd.grad(term, last_layer(model), retain_graph=True)[0] for term in (rec, gan)]
    weight = min(float(at_w[0].square().sum().sqrt() / (at_w[1].square().sum().sqrt() + 1e-4)), 1e4)
    real, fake = model.discriminator(x), model.discriminator(x_hat.detach())
    return {
        "nll": nll,
        "kl": kl,
        "perceptual": perceptual,
        "adversarial": gan,
        "adaptive_weight": torch.tensor(weight, dtype=torch.float64),
        "discriminator": (torch.clamp(1 - real, min=0).mean() + torch.clamp(1 + fake, min=0).mean()) / 2,
        "loss": rec + model.beta * kl,
    }


def losses(model: Any, x: Tensor, started: bool = True, tau: Tau = lambda x, z: (x, z)) -> dict[str, Tensor]:
    """The losses that the autoencoder and the discriminator minimise."""
    terms = by_hand(model, x, tau)
    game = model.discriminator_weight * terms["adaptive_weight"] * terms["adversarial"]
    return {"autoencoder": terms["loss"] + started * game, "discriminator": started * terms["discriminator"]}


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["autoencoder_kl", "asymmetric_kl", "vqgan"])
def test_missing_feature_file_is_named_before_training(name: str, quiet: Any, tmp_path: Any) -> None:
    def began(*args: Any) -> None:
        raise AssertionError("training begins")

    model: Any = aezoo.create_model(name, (3, 8, 8), features=str(tmp_path / "gone.pth"))
    model.loss = model.init_from_data = began
    with pytest.raises(AezooError, match=r"gone\.pth"):
        quiet(max_epochs=1).fit(model, DataLoader([torch.rand(2, 3, 8, 8)], batch_size=None))  # type: ignore[arg-type]
