"""pythae's variational models on dense networks, by pythae's trainers; the trained weights are written to a file."""

import math
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from pythae import models, trainers
from pythae.data.datasets import BaseDataset, collate_dataset_output
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .job import Job
from .networks import EpochOrderSampler, dense, training_rows

# name of the zoo: pythae's class, and its names for our arguments
MODELS: dict[str, tuple[str, dict[str, str]]] = {
    "vae": ("VAE", {}),
    "beta_vae": ("BetaVAE", {"beta": "beta"}),
    "iwae": ("IWAE", {"n_samples": "number_samples"}),
    "miwae": ("MIWAE", {"n_groups": "number_gradient_estimates", "n_samples": "number_samples"}),
    "piwae": ("PIWAE", {"n_groups": "number_gradient_estimates", "n_samples": "number_samples"}),
    "ciwae": ("CIWAE", {"n_samples": "number_samples", "beta": "beta"}),
    "vamp_vae": ("VAMP", {"n_components": "number_components"}),
}


class Encoder(BaseEncoder):
    """Linear layers to mean and log-variance."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> ModelOutput:
        mu, log_var = self.layers(x.flatten(1)).chunk(2, 1)
        return ModelOutput(embedding=mu, log_covariance=log_var)


class Decoder(BaseDecoder):
    """Linear layers to probabilities."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=torch.sigmoid(self.layers(z)))


class Seeded(DataLoader[Any]):
    """Batches in the job's order, before each of which torch gets the seed of the zoo's noise at that step.

    Args:
        job: the run.
        dataset: its samples.
    """

    def __init__(self, job: Job, dataset: BaseDataset) -> None:
        self.order = EpochOrderSampler(job, len(dataset))
        super().__init__(dataset, batch_size=job.batch, sampler=self.order, collate_fn=collate_dataset_output)
        with np.load(job.data) as file:
            self.seeds = file["noise_seeds"].tolist()

    def __iter__(self) -> Any:
        # the trainer also reads a first batch before training
        for seed, batch in zip(self.seeds[self.order.epoch], super().__iter__(), strict=True):
            torch.manual_seed(seed)
            yield batch


def fit(job: Job) -> dict[str, Any]:
    """Train the model of the job's options (`model=iwae`, `n_samples=5`, ...) and write its weights to `out=FILE`."""
    options = dict(option.split("=") for option in job.options)
    (name, arguments), out = MODELS[options.pop("model")], options.pop("out")
    torch.manual_seed(job.seed)
    widths = (math.prod(job.shape), *job.hidden_dims)
    encoder, decoder = dense((*widths, 2 * job.latent_dim)), dense((job.latent_dim, *widths[::-1]))
    layers = nn.ModuleList([encoder, decoder])
    with np.load(job.weights) as file, torch.no_grad():
        for parameter, key in zip(layers.parameters(), file.files, strict=True):
            parameter.copy_(torch.from_numpy(file[key]))
    values = {arguments[key]: float(value) if "." in value else int(value) for key, value in options.items()}
    config = getattr(models, f"{name}Config")(
        input_dim=job.shape, latent_dim=job.latent_dim, reconstruction_loss="bce", **values
    )
    model = getattr(models, name)(config, encoder=Encoder(encoder), decoder=Decoder(decoder))
    own = {"output_dir": "pythae", "num_epochs": job.epochs, "per_device_train_batch_size": job.batch, "seed": job.seed}
    if name == "PIWAE":  # it has separate optimisers for encoder and decoder
        base = trainers.CoupledOptimizerTrainer
        settings = trainers.CoupledOptimizerTrainerConfig(
            **own, encoder_learning_rate=job.lr, decoder_learning_rate=job.lr
        )
    else:
        base, settings = trainers.BaseTrainer, trainers.BaseTrainerConfig(**own, learning_rate=job.lr)

    x = training_rows(job).float() / 255
    data = BaseDataset(x, torch.zeros(len(x)))
    loader = {"get_train_dataloader": lambda self, dataset: Seeded(job, dataset)}
    trainer = type("Trainer", (base,), loader)(model, data, training_config=settings)
    trainer.train()
    # the trainer stores its best epoch in a copy of the model; these are the weights after all epochs
    trained = {f"w{i}": p.detach().numpy() for i, p in enumerate(layers.parameters())}
    if name == "VAMP":
        trained["pseudo_inputs"] = model.pseudo_inputs(model.idle_input).detach().numpy()
    np.savez(out, **trained)  # type: ignore[arg-type]
    return {"versions": {"torch": torch.__version__, "pythae": version("pythae")}}
