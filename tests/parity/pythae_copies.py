"""Models of pythae around copies of our networks (Chadebec et al. 2022).

Source: https://github.com/clementchadebec/benchmark_VAE

pythae leaves out the constant of a Gaussian's density. Where the quantity is named "without constant", ours is compared
without it. Variances that ours clamps to keep them finite lie inside the interval here.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from comparison import Comparison, noise
from pythae import models as pythae
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseDiscriminator, BaseEncoder
from torch import Tensor, nn

import aezoo

SHAPE, LATENT, BATCH = (1, 4, 4), 3, 7
LOSSES = {"bernoulli": "bce", "gaussian:1": "mse"}
# models whose only loss is the squared error
PLAIN = ("AE", "WAE_MMD", "RAE_L2", "RAE_GP", "VQVAE")
Pairs = list[tuple[Tensor, Tensor]]


class Encoder(BaseEncoder):
    """A copy of our encoder, with its output mapped to what pythae expects."""

    def __init__(self, encoder: nn.Module, head: Callable[[Tensor], dict[str, Tensor]]) -> None:
        super().__init__()
        self.net, self.head, self.latent_dim = copy.deepcopy(encoder), head, LATENT

    def forward(self, x: Tensor) -> ModelOutput:
        return ModelOutput(**self.head(self.net(x)))


class Decoder(BaseDecoder):
    """A copy of our decoder, with its output mapped to what pythae expects."""

    def __init__(self, decoder: nn.Module, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.head = copy.deepcopy(decoder), head

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.head(self.net(z)))


class Discriminator(BaseDiscriminator):
    """Copies of the layers of our discriminator, which returns a logit; pythae expects a probability."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.depth = nn.ModuleList(copy.deepcopy(layer) for layer in layers), len(layers)

    def forward(self, x: Tensor, output_layer_levels: list[int] | None = None) -> ModelOutput:
        found = ModelOutput()
        for i, layer in enumerate(self.layers):
            x = layer(x)
            found[f"embedding_layer_{i + 1}"] = x
        return ModelOutput(embedding=x.sigmoid(), **{k: found[k] for k in found})


def deterministic(out: Tensor) -> dict[str, Tensor]:
    return {"embedding": out}


def gaussian(out: Tensor) -> dict[str, Tensor]:
    mean, log_var = out.chunk(2, dim=1)
    return {"embedding": mean, "log_covariance": log_var}


def identity(out: Tensor) -> Tensor:
    return out


def ours(name: str, **settings: Any) -> Any:
    return aezoo.create_model(name, SHAPE, **{"latent_dim": LATENT, "hidden_dims": (8,), **settings}).double()


def theirs(
    kind: str,
    model: Any,
    head: Callable[[Tensor], dict[str, Tensor]] = gaussian,
    likelihood: str = "bernoulli",
    networks: dict[str, Any] | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    **settings: Any,
) -> Any:
    encoder = Encoder(model.encoder, head)
    decoder = Decoder(model.decoder, decode or (torch.sigmoid if likelihood == "bernoulli" else identity))
    if kind not in PLAIN:
        settings["reconstruction_loss"] = LOSSES[likelihood]
    kind_class, config_class = getattr(pythae, kind), getattr(pythae, f"{kind}Config", None)
    config = (config_class or getattr(pythae, f"{kind}_Config"))(
        input_dim=tuple(model.input_shape), latent_dim=model.code_shape[0], **settings
    )
    return kind_class(config, encoder, decoder, **(networks or {})).double()


def encoder_pairs(model: Any, other: Any) -> Pairs:
    return [*zip(model.encoder.parameters(), other.encoder.net.parameters(), strict=True)]


def decoder_pairs(model: Any, other: Any) -> Pairs:
    return [*zip(model.decoder.parameters(), other.decoder.net.parameters(), strict=True)]


def pairs(model: Any, other: Any) -> Pairs:
    return encoder_pairs(model, other) + decoder_pairs(model, other)


def constant(model: Any, x: Tensor) -> float:
    """The part of -log p(x|z) that pythae leaves out."""
    return 0.0 if model.likelihood.unit_interval else model.nll(x, x).mean().item()


def named(quantity: str, off: float) -> str:
    return f"{quantity} without constant" if off else quantity


def equal_log_likelihood(row: Comparison, model: Any, other: Any, x: Tensor, n: int = 5) -> None:
    """Importance-sampled log p(x) of each sample."""
    draws = torch.randn(n, len(x), *model.code_shape)
    with noise([draws]):
        found = model.log_likelihood(x, n)
    row.equal(f"log-likelihood by {n} draws", found, [nll_of(other, x[i], n, draws[:, i]) for i in range(len(x))])


def nll_of(other: Any, x: Tensor, n: int, *draws: Tensor) -> float:
    """Their log-likelihood of one sample, which they name nll."""
    with noise(draws):
        return float(other.get_nll(x[None], n_samples=n, batch_size=n))
