"""pythae's AE and VAE with the job's encoder and decoder, in pythae's trainer."""

from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from pythae.data.datasets import BaseDataset, collate_dataset_output
from pythae.models import AE, VAE, AEConfig, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback
from torch import Tensor
from torch.utils.data import DataLoader

from .job import Clock, Job
from .networks import EpochOrderSampler, Network, build_clock, training_rows


class Encoder(BaseEncoder):
    """The job's encoder, with pythae's names of its outputs."""

    def __init__(self, network: Network, variational: bool) -> None:
        super().__init__()
        self.layers, self.variational = network.encoder, variational

    def forward(self, x: Tensor) -> ModelOutput:
        if not self.variational:
            return ModelOutput(embedding=self.layers(x))
        mu, log_var = self.layers(x).chunk(2, 1)
        return ModelOutput(embedding=mu, log_covariance=log_var)


class Decoder(BaseDecoder):
    """The job's decoder, down to probabilities, which pythae's cross-entropy takes."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.layers = network.decoder

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=torch.sigmoid(self.layers(z)))


class BernoulliAE(AE):
    """pythae's AE supports only the squared error; this is the cross-entropy of its VAE."""

    def loss_function(self, recon_x: Tensor, x: Tensor) -> Tensor:
        x_hat, x = recon_x.reshape(len(x), -1), x.reshape(len(x), -1)
        return F.binary_cross_entropy(x_hat, x, reduction="none").sum(dim=-1).mean(dim=0)


class Trainer(BaseTrainer):
    """The trainer with the common order of rows; all other arguments of its loader are pythae's."""

    job: Job

    def get_train_dataloader(self, train_dataset: BaseDataset) -> DataLoader[Any]:
        sampler = EpochOrderSampler(self.job, len(train_dataset))
        return DataLoader(train_dataset, batch_size=self.job.batch, sampler=sampler, collate_fn=collate_dataset_output)


class Timer(TrainingCallback):
    """Records epochs in the clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_epoch_begin(self, training_config: Any, **kwargs: Any) -> None:
        self.clock.begin()

    def on_train_step_end(self, training_config: Any, **kwargs: Any) -> None:
        self.clock.record_step()

    def on_epoch_end(self, training_config: Any, **kwargs: Any) -> None:
        self.clock.end()

    def on_log(self, training_config: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.clock.losses.append(logs["train_epoch_loss"])


def fit(job: Job) -> dict[str, Any]:
    """Train with the trainer's defaults: progress bar, console log, saving of the best model, and a GPU if present."""
    torch.manual_seed(job.seed)
    network, shape = Network(job), job.shape
    parts = {"encoder": Encoder(network, job.variational), "decoder": Decoder(network)}
    if job.variational:
        model = VAE(VAEConfig(input_dim=shape, latent_dim=job.latent_dim, reconstruction_loss="bce"), **parts)
    else:
        model = BernoulliAE(AEConfig(input_dim=shape, latent_dim=job.latent_dim), **parts)
    x = training_rows(job).float() / 255
    config = BaseTrainerConfig(
        output_dir="pythae",
        num_epochs=job.epochs,
        learning_rate=job.lr,
        per_device_train_batch_size=job.batch,
        seed=job.seed,
    )
    clock = build_clock(job)
    Trainer.job = job  # the base class builds its loaders in its constructor
    data = BaseDataset(x, torch.zeros(len(x)))
    Trainer(model, data, training_config=config, callbacks=[Timer(clock)]).train()
    versions = {"torch": torch.__version__, "pythae": version("pythae")}
    return clock.result(sum(p.numel() for p in model.parameters()), **versions)
