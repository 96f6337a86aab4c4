"""Small autoencoders with the interface of the zoo's models."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * torch.randn_like(x)


class Fake(pl.LightningModule):
    """A linear autoencoder; its dropout layer draws from the global random state in training."""

    has_prior = normal_prior = False
    sparse_code = False

    def __init__(self, input_shape: tuple[int, ...], latent_dim: int = 4, denoising: bool = False, lr: float = 1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.input_shape, self.code_shape, self.lr = tuple(input_shape), (latent_dim,), lr
        size = torch.Size(input_shape).numel()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(size, self.outputs(latent_dim)))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, size), nn.Unflatten(1, self.input_shape))
        self.corruption = Noise() if denoising else None

    def outputs(self, latent_dim: int) -> int:
        return latent_dim

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll = (self(x if self.corruption is None else self.corruption(x)) - x).square().flatten(1).sum(1).mean()
        return {"loss": nll, "nll": nll}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        terms = self.loss(batch[0])
        self.log_dict({f"train/{k}": v for k, v in terms.items()}, on_step=False, on_epoch=True)
        return {"loss": terms["loss"], **{k: v.detach() for k, v in terms.items() if k != "loss"}}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({f"val/{k}": v for k, v in self.loss(batch[0]).items()})

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({f"test/{k}": v for k, v in self.loss(batch[0]).items()})

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        z = self.encode(batch[0])
        return {"code": z, "reconstruction": self.decode(z), "score": z.square().sum(1), "label": batch[1]}

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), self.lr)


class FakeVAE(Fake):
    has_prior = normal_prior = True

    def __init__(self, input_shape: tuple[int, ...], latent_dim: int = 4, beta: float = 2.0, lr: float = 1e-2):
        super().__init__(input_shape, latent_dim, lr=lr)
        self.beta, self.capacity = beta, 0.0

    def outputs(self, latent_dim: int) -> int:
        return 2 * latent_dim

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_var = self.encoder(x).chunk(2, 1)
        return mu, log_var

    def encode(self, x: Tensor) -> Tensor:
        return self.posterior(x)[0]

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu, log_var = self.posterior(x)
        x_hat = self.decode(mu + torch.randn_like(mu) * (0.5 * log_var).exp())
        nll = (x_hat - x).square().flatten(1).sum(1).mean()
        kl = 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum(1).mean()
        return {"loss": nll + self.beta * (kl - self.capacity).abs(), "nll": nll, "kl": kl}

    def sample(self, n: int) -> Tensor:
        return self.decode(torch.randn(n, *self.code_shape, device=self.device))


class FakeSparse(Fake):
    sparse_code = True

    def encode(self, x: Tensor) -> Tensor:
        return F.relu(self.encoder(x))


def digits(shape: tuple[int, ...], n: int = 48) -> TensorDataset:
    """Blobs at random positions, in [0, 1], labelled by the half they lie in."""
    generator = torch.Generator().manual_seed(7)
    size = torch.Size(shape).numel()
    place = torch.rand(n, 1, generator=generator)
    x = torch.exp(-((torch.linspace(0, 1, size) - place) ** 2) / 0.01).reshape(n, *shape)
    return TensorDataset(x, (place.flatten() > 0.5).long())
