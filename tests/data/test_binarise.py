"""Binarised samples: probabilities equal the values, and draws depend on the seed, not on how samples are read."""

import numpy as np
import pytest
import torch

from aezoo.data import DataModule
from aezoo.data.binarise import resample_batches, sample_bernoulli
from aezoo.data.loaders import EpochSampler
from aezoo.errors import AezooError


def epochs(data: DataModule, n: int = 2, skip: tuple[int, int] = (-1, 0)) -> list[torch.Tensor]:
    loader = data.train_dataloader()
    loader.sampler.skip = skip
    found = []
    for epoch in range(n):
        loader.sampler.set_epoch(epoch)
        found.append(torch.cat([batch[0] for batch in loader]))
    return found


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_pixel_value_is_probability_of_one(dtype):
    levels = torch.tensor([0, 1, 60, 128, 254, 255])
    x = levels.repeat(200_000, 1)
    x = x.to(torch.uint8) if dtype == torch.uint8 else x.float() / 255
    drawn = sample_bernoulli(x, torch.Generator().manual_seed(0)).float() / (255 if dtype == torch.uint8 else 1)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    p = levels.double() / 255
    error = (drawn.double().mean(0) - p).abs()
    # five standard deviations of a mean of 200,000 coins; exact where the probability is 0 or 1
    assert (error <= 5 * (p * (1 - p) / 200_000).sqrt()).all()


def test_static_binarisation_is_fixed_and_independent_per_split():
    first, second = (DataModule("digits", binarise="static", seed=3) for _ in range(2))
    x, again, other = first.tensors("train")[0], second.tensors("train")[0], DataModule("digits", binarise="static")
    assert torch.equal(x, again)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(other.tensors("train")[0], x)
    one, two = epochs(first)
    assert torch.equal(one.mean(0), two.mean(0))  # the same samples in another order
    grey = DataModule("digits", seed=3)
    assert (first.tensors("test")[0].mean() - grey.tensors("test")[0].mean()).abs() < 0.01


def test_threshold_is_one_above_a_half():
    grey, data = DataModule("mnist5k"), DataModule("mnist5k", binarise="threshold")
    for stage in data.splits():
        assert torch.equal(data.tensors(stage)[0], (grey.tensors(stage)[0] > 0.5).float())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_dynamic_binarisation_redraws_training_only(name):
    held, read = (DataModule(name, binarise="dynamic", memory=memory, num_workers=0) for memory in ("on", "off"))
    for first, second in zip(epochs(held), epochs(read), strict=True):
        assert torch.equal(first, second)
    one, two = epochs(held)
    assert not torch.equal(one.float().mean(0), two.float().mean(0))
    assert torch.equal(epochs(held)[1], two)
    assert torch.equal(held.tensors("val")[0], DataModule(name, binarise="static").tensors("val")[0])


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_dynamic_binarisation_is_fixed_outside_training(name):
    data, fresh = (DataModule(name, binarise="dynamic", seed=3) for _ in range(2))
    x = data.tensors("train")[0]
    assert torch.equal(x, DataModule(name, binarise="static", seed=3).tensors("train")[0])
    assert data.dataset("train") is data.dataset("train")
    for first, second in zip(epochs(data), epochs(fresh), strict=True):
        assert torch.equal(first, second)
        assert not torch.equal(first.float().mean(0), x.mean(0))


def test_noise_differs_between_epochs_at_same_index():
    sampler, x = EpochSampler(100, shuffle=True), torch.full((100, 64), 0.5)
    draws = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        sampler.rows()
        draws.append(torch.cat([part for (part,) in resample_batches(iter([(x[:50],), (x[50:],)]), sampler)]))
    assert torch.equal(draws[0], draws[2])
    assert 0.4 < float((draws[0] == draws[1]).float().mean()) < 0.6
    assert 0.4 < float((draws[0][:50] == draws[0][50:]).float().mean()) < 0.6


def test_dynamic_binarisation_resumes_mid_epoch():
    data = DataModule("digits", binarise="dynamic", batch_size=100)
    whole = epochs(data)[0]
    assert torch.equal(epochs(data, 1, skip=(0, 300))[0], whole[300:])
    assert torch.equal(epochs(data, 2, skip=(0, 300))[1], epochs(data)[1])


def test_out_of_range_values_and_unknown_rules_are_refused():
    with pytest.raises(AezooError, match="did you mean 'static'"):
        DataModule("digits", binarise="statik")
    data = DataModule.from_arrays(torch.randn(50, 4), scale="none", binarise="static")
    with pytest.raises(AezooError, match="scale unit"):
        data.setup()


def test_binarized_mnist_files_are_read_as_they_are(tmp_path):
    rng = np.random.default_rng(0)
    for name, n in (("train", 5), ("valid", 3), ("test", 2)):
        rows = rng.integers(0, 2, (n, 784))
        text = "".join(" ".join(map(str, row)) + (" \n" if name == "valid" else "\n") for row in rows)
        (tmp_path / f"binarized_mnist_{name}.amat").write_text(text)
    data = DataModule("binarized_mnist", root=str(tmp_path))
    assert [len(data.dataset(stage)) for stage in data.splits()] == [5, 3, 2]
    assert np.array_equal(data.tensors("test")[0].flatten(1).numpy(), rows)
    (tmp_path / "binarized_mnist_test.amat").write_text("0 1 2\n")
    with pytest.raises(AezooError, match="784 zeros and ones"):
        DataModule("binarized_mnist", root=str(tmp_path)).setup()
    with pytest.raises(AezooError, match="download the three files"):
        DataModule("binarized_mnist", root=str(tmp_path / "none")).setup()
