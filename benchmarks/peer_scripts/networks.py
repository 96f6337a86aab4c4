"""The networks and losses in plain PyTorch, without aezoo's code, to check that all parties train the same."""

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Sampler

from .job import Clock, Job


def dense(widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers = [layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def conv(job: Job) -> tuple[nn.Sequential, nn.Sequential]:
    """Convolutions of stride 2 down to a linear layer, and transposed ones back."""
    channels, *grid = job.shape
    sides, widths = [grid[0]], (channels, *job.hidden_dims)
    down: list[nn.Module] = []
    for before, after in pairwise(widths):
        down += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        sides.append(math.ceil(sides[-1] / 2))
    smallest = (widths[-1], sides[-1], sides[-1])
    size = math.prod(smallest)
    up: list[nn.Module] = [nn.Linear(job.latent_dim, size), nn.Unflatten(1, smallest)]
    for (before, after), side in zip(pairwise(widths[::-1]), sides[-2::-1], strict=True):
        up += [nn.ReLU(), nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=1 - side % 2)]
    return nn.Sequential(*down, nn.Flatten(), nn.Linear(size, 2 * job.latent_dim)), nn.Sequential(*up)


class Network(nn.Module):
    """Encoder and decoder with the job's initial weights."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        if job.variational:
            self.encoder, self.decoder = conv(job)
        else:
            widths = (math.prod(job.shape), *job.hidden_dims, job.latent_dim)
            self.encoder, self.decoder = nn.Sequential(dense(widths), nn.ReLU()), dense(widths[::-1])
        with np.load(job.weights) as file, torch.no_grad():
            for parameter, name in zip(self.parameters(), file.files, strict=True):
                if parameter.shape != file[name].shape:
                    raise ValueError(f"{name} has shape {file[name].shape}, this network wants {parameter.shape}")
                parameter.copy_(torch.from_numpy(file[name]))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the code."""
        mu, log_var = self.encoder(x).float().chunk(2, 1)
        return mu, log_var


def sample_posterior(mu: Tensor, log_var: Tensor) -> Tensor:
    """A draw from the posterior."""
    return mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)


def kl(mu: Tensor, log_var: Tensor) -> Tensor:
    """KL to the standard normal, in nats per sample."""
    return 0.5 * (mu**2 + log_var.exp() - 1 - log_var).sum() / len(mu)


def loss_on_logits(network: Network, x: Tensor, variational: bool) -> Tensor:
    """Negative evidence lower bound, or only the cross-entropy, in nats per sample; stable and in one kernel."""
    extra: Tensor | float = 0.0
    if variational:
        mu, log_var = network.posterior(x)
        code, extra = sample_posterior(mu, log_var), kl(mu, log_var)
    else:
        code = network.encoder(x)
    return F.binary_cross_entropy_with_logits(network.decoder(code).float(), x, reduction="sum") / len(x) + extra


def loss_on_probabilities(network: Network, x: Tensor, variational: bool) -> Tensor:
    """The same as in textbooks: sigmoid, then cross-entropy."""
    if not variational:
        x_hat = torch.sigmoid(network.decoder(network.encoder(x)).float())
        return F.binary_cross_entropy(x_hat, x, reduction="sum") / len(x)
    mu, log_var = network.posterior(x)
    x_hat = torch.sigmoid(network.decoder(sample_posterior(mu, log_var)).float())
    return F.binary_cross_entropy(x_hat, x, reduction="sum") / len(x) + kl(mu, log_var)


def build_clock(job: Job) -> Clock:
    """A clock for parties that use PyTorch; it waits for the GPU, if there is one."""
    return Clock(job, torch.cuda.synchronize) if job.accelerator == "cuda" else Clock(job)


def training_rows(job: Job) -> Tensor:
    """The training rows as they are stored: uint8, (N, *shape), flat for the dense network."""
    with np.load(job.data) as file:
        return torch.from_numpy(file["x_train"])


def epoch_order(job: Job, n: int, epoch: int) -> Tensor:
    """The rows of an epoch in the order in which all PyTorch parties read them."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(job.order_seed(epoch)))


class EpochOrderSampler(Sampler[int]):
    """Gives rows in `epoch_order` to torch's loader, at the cost of torch's random sampler.

    Args:
        job: the run.
        n: number of rows.
    """

    def __init__(self, job: Job, n: int) -> None:
        self.job, self.n, self.epoch = job, n, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch. Lightning calls this; its loop stops at the last row, before `__iter__` counts."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        yield from epoch_order(self.job, self.n, self.epoch).tolist()
        # not reached if a trainer only reads the first batch
        self.epoch += 1
