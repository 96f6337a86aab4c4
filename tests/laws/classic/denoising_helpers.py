"""Helpers of the laws of the denoising autoencoders."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import aezoo

# ---- denoising_ae: Vincent et al. 2008, Alain & Bengio 2014 ----------------------------------------------------------


class RecordingNoise(nn.Module):
    """A corruption that records the noise it adds, separately for training and evaluation."""

    def __init__(self, model: aezoo.Autoencoder) -> None:
        super().__init__()
        self.inner, self.seen = model.corruption, {True: [], False: []}

    def forward(self, x: Tensor) -> Tensor:
        noisy: Tensor = self.inner(x)
        self.seen[self.training].append((noisy - x).detach())
        return noisy


def noise_law(model: aezoo.Autoencoder, quiet: Any) -> None:
    """Evaluation adds the same noise in every epoch, training adds new noise to every batch."""
    loader = DataLoader(torch.rand(12, 1, 4, 4), batch_size=6)
    model.corruption = RecordingNoise(model)
    seen = model.corruption.seen
    trainer = quiet(max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(model, loader, loader)
    first, second = seen[False][:4], seen[False][4:]  # two batches, each for its loss and for its reconstruction
    assert len(second) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[2])
    assert all(noise.abs().max() > 0 for noise in first)
    assert len(seen[True]) == 4
    assert all(not torch.equal(a, b) for a, b in pairwise(seen[True]))
    a, b = (trainer.validate(model, loader, verbose=False)[0] for _ in range(2))
    assert a == b
