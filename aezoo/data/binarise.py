"""Images as zeros and ones, as in papers on binarised MNIST.

    threshold   1 where a value is above 1/2
    static      1 with the value as its probability, drawn once (Salakhutdinov & Murray 2008, ICML)
    dynamic     training samples are drawn again in every epoch (Burda et al. 2015, https://arxiv.org/abs/1509.00519,
                section 5); samples of val and test, and of train outside training, are drawn once

Values depend on the seed, the split and, for dynamic, the epoch and the position in it, not on workers or other draws.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from aezoo.data.loaders import EpochSampler
from aezoo.data.source import ArrayDataset, Batch
from aezoo.errors import AezooError
from aezoo.training.seeding import mix

# samples that are binarised at a time
_CHUNK = 4096


def sample_bernoulli(x: Tensor, generator: torch.Generator) -> Tensor:
    """0 or the largest value, which has the probability x: uint8 out of 255, or floats in [0, 1]."""
    if x.dtype == torch.uint8:
        # one of 255 equally likely thresholds below x: a probability of x / 255, exactly
        noise = torch.empty_like(x).random_(0, 255, generator=generator)
        return (x > noise).to(torch.uint8) * 255
    noise = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return (noise < x).to(x.dtype)


def check_probabilities(x: Tensor, name: str, cure: str = "set --data.scale unit") -> None:
    """Refuse values that are not probabilities.

    Raises:
        AezooError: values outside [0, 1]; the message ends with what to do.
    """
    if x.dtype != torch.uint8 and not (float(x.min()) >= 0 and float(x.max()) <= 1):
        raise AezooError(f"{name}: --data.binarise needs values from 0 to 1: {cure}")


def binarise_dataset(dataset: ArrayDataset, rule: str, seed: int) -> ArrayDataset:
    """The samples of a split by `rule`: threshold, or else drawn once."""
    x = dataset.x
    if rule == "threshold":
        fresh = (x > 127).to(torch.uint8) * 255 if x.dtype == torch.uint8 else (x > 0.5).to(x.dtype)
    else:
        generator = torch.Generator(x.device).manual_seed(seed)
        fresh = torch.cat([sample_bernoulli(part, generator) for part in x.split(_CHUNK)])
    return ArrayDataset(fresh, dataset.y, dataset.paths)


def resample_batches(batches: Iterator[Batch], sampler: EpochSampler) -> Iterator[Batch]:
    """Batches of an epoch, binarised by draws that depend on (seed, epoch, rank, position)."""
    place, generator = -1, torch.Generator()
    for x, *y in batches:
        if place < 0:
            place, generator = sampler.first, torch.Generator(x.device)
        generator.manual_seed(mix(sampler.seed, sampler.epoch, sampler.rank, place))
        place += len(x)
        yield (sample_bernoulli(x, generator), *y)  # type: ignore[misc]
