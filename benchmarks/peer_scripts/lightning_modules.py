"""Lightning as in tutorials, and a short version of PyTorch-VAE's training code."""

import logging
from importlib.metadata import version
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from .job import Clock, Job
from .networks import (
    EpochOrderSampler,
    Network,
    build_clock,
    kl,
    loss_on_probabilities,
    sample_posterior,
    training_rows,
)


class Timer(pl.Callback):
    """Records epochs in the clock, at about ten microseconds per step.

    Args:
        clock: the clock of the run.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock, self.total, self.count = clock, torch.zeros(()), 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.total = torch.zeros((), device=pl_module.device)
        self.clock.begin()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.total.add_(outputs["loss"], alpha=len(batch[0]))
        self.count += len(batch[0])
        self.clock.record_step()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.clock.end(float(self.total) / self.count)
        self.count = 0


class Textbook(pl.LightningModule):
    """Sigmoid and cross-entropy, `self.log` each step, plain Adam."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job, self.network = job, Network(job)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        loss = loss_on_probabilities(self.network, batch[0], self.job.variational)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.job.lr)


class Model(torch.nn.Module):
    """The interface of PyTorch-VAE's models: `forward` gives all that `loss_function` needs."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.network, self.variational = Network(job), job.variational

    def forward(self, x: Tensor, **kwargs: Any) -> list[Tensor]:
        if not self.variational:
            return [torch.sigmoid(self.network.decoder(self.network.encoder(x))), x]
        mu, log_var = self.network.posterior(x)
        return [torch.sigmoid(self.network.decoder(sample_posterior(mu, log_var))), x, mu, log_var]

    def loss_function(self, *args: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        x_hat, x, *posterior = args
        reconstruction = F.binary_cross_entropy(x_hat, x, reduction="sum") / len(x)
        if not posterior:
            return {"loss": reconstruction, "Reconstruction_Loss": reconstruction.detach()}
        divergence = kl(*posterior)
        loss = reconstruction + kwargs["M_N"] * divergence
        return {"loss": loss, "Reconstruction_Loss": reconstruction.detach(), "KLD": divergence.detach()}


class Experiment(pl.LightningModule):
    """A model whose terms are all logged each step and averaged over ranks, as that project's experiment class does."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job, self.model = job, Model(job)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, labels = batch
        results = self.model(x, labels=labels)
        terms = self.model.loss_function(*results, M_N=1.0, batch_idx=batch_idx)
        self.log_dict({key: value.item() for key, value in terms.items()}, sync_dist=True)
        return terms["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.job.lr)


def _fit(job: Job, module: pl.LightningModule, data: TensorDataset) -> dict[str, Any]:
    """The Trainer with its defaults: bar, logger and checkpoints."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    clock, n = build_clock(job), len(data)
    loader: DataLoader[Any] = DataLoader(data, batch_size=job.batch, sampler=EpochOrderSampler(job, n))
    precision: Any = "bf16-mixed" if job.precision == "bf16" else "32-true"
    trainer = pl.Trainer(
        max_epochs=job.epochs, accelerator=job.accelerator, precision=precision, callbacks=[Timer(clock)]
    )
    trainer.fit(module, loader)
    versions = {"torch": torch.__version__, "lightning": version("lightning")}
    return clock.result(sum(p.numel() for p in module.parameters()), **versions)


def textbook(job: Job) -> dict[str, Any]:
    """TensorDataset, default loader, default Trainer."""
    pl.seed_everything(job.seed)
    return _fit(job, Textbook(job), TensorDataset(training_rows(job).float() / 255))


def experiment(job: Job) -> dict[str, Any]:
    """The same with labels, as that project's data sets give them."""
    pl.seed_everything(job.seed)
    x = training_rows(job).float() / 255
    return _fit(job, Experiment(job), TensorDataset(x, torch.zeros(len(x), dtype=torch.long)))
