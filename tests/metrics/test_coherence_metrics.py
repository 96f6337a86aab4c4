"""Coherence metrics against counts by hand, for any batch size, and the table of coherence on known data."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import aezoo
from aezoo import AezooError, metrics
from aezoo.tasks.coherence import coherence
from aezoo.tasks.samples import SampleSet

# the classes of the two parts of 6 samples, and the labels of the samples (-1: none)
FIRST, SECOND = [0, 1, 2, 2, 1, 0], [0, 1, 1, 2, 0, 0]
CLASSES = [0, 1, 2, 1, 1, -1]


def logits(classes, k=3):
    """Logits whose maxima are these classes, with random margins."""
    one_hot = F.one_hot(torch.tensor(classes), k).float()
    return 3 * one_hot + torch.rand(len(classes), k, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [6, 4, 1])
def test_coherence_shares_match_manual_count(size):
    cross, joint = metrics.CrossCoherence(2), metrics.JointCoherence()
    everything = logits(FIRST), logits(SECOND), torch.tensor(CLASSES)
    for a, b, y in zip(*(values.split(size) for values in everything), strict=True):
        cross.update([a, b], y)
        joint.update([a, b])
    # the last sample has no label; the first part is right for samples 0, 1, 2, 4, the second for 0, 1
    assert cross.compute().tolist() == pytest.approx([4 / 5, 2 / 5])
    assert joint.compute().item() == pytest.approx(4 / 6)  # all but samples 2 and 4


def test_perfect_coherence_is_one_and_random_is_chance():
    cross, joint = metrics.CrossCoherence(3), metrics.JointCoherence()
    y = torch.arange(3).repeat(400)
    cross.update([F.one_hot(y, 3)] * 3, y)
    joint.update([F.one_hot(y, 3)] * 3)
    assert cross.compute().tolist() == [1, 1, 1] and joint.compute() == 1
    generator = torch.Generator().manual_seed(0)
    joint.reset()
    joint.update([torch.rand(30_000, 3, generator=generator) for _ in range(2)])
    assert float(joint.compute()) == pytest.approx(1 / 3, abs=0.01)


def test_mismatched_parts_or_samples_are_refused():
    for given, y in (([logits(FIRST)], CLASSES), ([logits(FIRST)] * 2, CLASSES[1:])):
        with pytest.raises(AezooError, match="takes logits of 2 parts and y"):
            metrics.CrossCoherence(2).update(given, torch.tensor(y))
    with pytest.raises(AezooError, match="logits must be"):
        metrics.JointCoherence().update([])


class FixedCoherence:
    """A model of which a given share of samples has two parts of the same class."""

    sizes, has_prior = (2, 2), True

    def __init__(self, share):
        self.share = share

    def split(self, x):
        return x.split(2, 1)

    def sample(self, n):
        return made(torch.zeros(n).long(), (torch.arange(n) % 4 >= 4 * self.share).long())


def made(first, second):
    """Samples of two clearly separated classes, given for each part."""
    noise = 0.1 * torch.randn(len(first), 4, generator=torch.Generator().manual_seed(1))
    return noise + torch.stack([first, -first, second, -second], 1) * 3.0


@pytest.mark.slow
def test_coherence_table_compares_with_real_parts():
    y = torch.arange(200) % 2
    wrong = torch.arange(200) % 10 == 0
    x_hat = made(y, torch.where(wrong, 1 - y, y))
    samples = SampleSet(aezoo.data.source.ArrayDataset(made(y, y), y))
    first, second, joint = coherence(FixedCoherence(0.75), samples, x_hat.numpy(), 0, 64)
    assert first == {"part": "0", "coherence": 1, "of real parts": 1, "most common class": 0.5}
    assert second["coherence"] == pytest.approx(0.9) and second["of real parts"] == 1
    assert joint["coherence"] == pytest.approx(0.75) and joint["of real parts"] == 1


def test_incomplete_samples_are_left_out_of_coherence():
    y = torch.arange(60) % 2
    x = made(y, y)
    x[:10, 2:] = float("nan")
    some = torch.where(torch.arange(60) % 6 == 0, -1, y)
    rows = coherence(FixedCoherence(1.0), SampleSet(aezoo.data.source.ArrayDataset(x, some)), x.numpy(), 0, 64)
    assert [row["coherence"] for row in rows] == [1, 1, 1]
    few = SampleSet(aezoo.data.source.ArrayDataset(x[10:13], y[10:13]))
    assert coherence(FixedCoherence(1.0), few, x[10:13].numpy(), 0, 64) == []


@pytest.mark.slow
def test_reconstruct_from_some_parts_writes_their_coherence(tmp_path):
    model = aezoo.create_model("mvae", (1, 8, 8), latent_dim=2, hidden_dims=(8,))
    data = aezoo.DataModule("digits")
    found = aezoo.reconstruct(model, data, parts=(1,), out=str(tmp_path), n_shown=0)
    x = data.tensors("test")[0]
    assert np.allclose(found.x_hat, model.eval().reconstruct_from(x, (1,)).detach(), atol=1e-6)
    assert [row["part"] for row in found.coherence] == ["0", "1", "all, of the prior"]
    assert "coherence" in found.summary() and (tmp_path / "coherence.csv").exists()
    with pytest.raises(AezooError, match="vae does not support parts of samples: drop --parts"):
        aezoo.reconstruct(aezoo.create_model("vae", (1, 8, 8)), data, parts=(0,))
