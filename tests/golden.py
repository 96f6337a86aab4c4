"""Golden losses: the first training losses of every model, so that no change moves a number unseen.

    python -m tests.golden

writes `tests/golden.json` anew; a pull request that changes it says why.
"""

import json
import logging
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader

import aezoo
from aezoo.registry import entries
from aezoo.testing import Subject, subject_of

FILE = Path(__file__).with_suffix(".json")
SHAPE, STEPS, BATCH = (1, 28, 28), 3, 16
# code paths that no default reaches
VARIANTS = [
    subject_of("conv_ae", latent_map=True, latent_dim=4),
    subject_of("resnet_ae", latent_map=True, latent_dim=4, hidden_dims=(8, 8)),
    subject_of("dense_ae", hidden_dims=(), code_activation="relu", likelihood="continuous_bernoulli"),
    subject_of("dense_ae", likelihood="gaussian:learned"),
    subject_of("dense_ae", likelihood="laplace:learned", lr_schedule="cosine", warmup_steps=2),
    subject_of("dense_ae", likelihood="discretised_logistic", optimizer="sgd", lr=1e-5),
    subject_of("denoising_ae", corruption="masking:0.3", net="conv", hidden_dims=(8, 8)),
    subject_of("denoising_ae", corruption="salt_and_pepper:0.2"),
    subject_of("denoising_ae", corruption="none"),
    subject_of("sparse_ae_kl", net="conv", hidden_dims=(8, 8), latent_dim=32),
    subject_of("sparse_ae_l1", net="resnet", hidden_dims=(8, 8), latent_dim=32),
    subject_of("topk_sae", dead_after=1, k=4, k_aux=32, aux_weight=1.0),
    subject_of("vae", net="conv", hidden_dims=(8, 8), beta=4.0),
    subject_of("vae", net="resnet", hidden_dims=(8, 8), likelihood="gaussian:learned"),
]


def own_models() -> list[str]:
    """The models of this package, without those of plug-ins that happen to be installed."""
    return [name for name in aezoo.list_models() if entries()[name].owner == "aezoo"]


def first_losses(subject: Subject) -> list[float]:
    """The losses of the first training steps from seed 0, on noise that NumPy's generator draws."""
    rng = np.random.default_rng(0)
    batches = [torch.from_numpy(rng.random((BATCH, *SHAPE), dtype=np.float32)) for _ in range(STEPS)]
    losses: list[float] = []

    class Record(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    torch.manual_seed(0)
    model = subject.build(SHAPE)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            callbacks=[Record()],
            default_root_dir=folder,
            enable_model_summary=False,
            **quiet,
        )
        trainer.fit(model, DataLoader(batches, batch_size=None))
    return losses


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    subjects = [*map(subject_of, own_models()), *VARIANTS]
    table = {subject.label: first_losses(subject) for subject in subjects}
    FILE.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")
