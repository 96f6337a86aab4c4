"""Walks through code space: between samples, along each dimension, and around a sample.

A walk is a row of codes, (walks, steps, D); a feature map is one vector of all its channels and positions.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.data.columns import Columns
from aezoo.errors import AezooError
from aezoo.tasks.embed_codes import encode_samples
from aezoo.tasks.result_store import Store, write_batch
from aezoo.tasks.samples import SampleSet, reference_tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]

GIVE_TRAINING = "give them as fit_on (on the command line those of --data.name SET)"
# codes that a range or a spread is measured on
_MAX_CODES = 10_000
# rows of a picture of curves
_MAX_PANELS = 16


@dataclass
class Walks:
    """Codes to decode, and how to show them.

    Attributes:
        name: name of the files.
        codes: (walks, steps, D).
        labels: label of each walk in the picture; may be empty.
        ends: originals to show before and after a walk, (walks, *shape) each; may be empty.
    """

    name: str
    codes: Tensor
    labels: list[str]
    ends: tuple[Tensor, ...] = ()


def interpolation(model: Autoencoder, starts: SampleSet, circle: bool, walks: int, steps: int, seed: int) -> Walks:
    """Walks between the first two samples, the next two, ...; between random ones if there are many."""
    if len(starts) < 2:
        raise AezooError(f"interpolate needs two samples at least, {starts.name} contains one: give more")
    x = _random_codes(starts, 2 * walks, seed)
    x = x[: len(x) // 2 * 2]
    a, b = _encoded(model, x).unflatten(0, (-1, 2)).unbind(1)
    t = torch.linspace(0, 1, steps)[:, None]
    between = slerp if circle else torch.lerp
    codes = torch.stack([between(start, end, t) for start, end in zip(a, b, strict=True)])
    return Walks("interpolation", codes, [], (x[::2], x[1::2]))


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Spherical interpolation from a to b, which keeps lengths typical of N(0, I): (D,), (D,), (T, 1) -> (T, D).

    sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b, w the angle between them (White 2016, section 2.1,
    https://arxiv.org/abs/1609.04468).
    """
    w = torch.acos(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).clamp(-1, 1))
    if float(torch.sin(w)) < 1e-6:  # the same or opposite directions, which define no unique circle
        return torch.lerp(a, b, t)
    return ((torch.sin((1 - t) * w) * a + torch.sin(t * w) * b) / torch.sin(w)).to(a.dtype)


def traversal(
    model: Autoencoder, starts: SampleSet, known: SampleSet, walks: int, steps: int, batch_size: int, seed: int
) -> Walks:
    """One dimension of the first sample's code at a time, from the smallest to the largest value in codes of `known`.

    Dimensions are in order of decreasing variance.
    """
    codes = _codes(model, known, batch_size, seed)
    variance, low, high = codes.var(0, unbiased=False), codes.amin(0), codes.amax(0)
    order = variance.argsort(descending=True, stable=True)[:walks].tolist()
    start = _encoded(model, starts.rows([0]))[0]
    varied_dims = start.repeat(len(order), steps, 1)
    for i, d in enumerate(order):
        varied_dims[i, :, d] = torch.linspace(float(low[d]), float(high[d]), steps)
    return Walks("traversal", varied_dims, [f"z{d}  var {float(variance[d]):.2g}" for d in order])


def around_sample(
    model: Autoencoder,
    starts: SampleSet,
    known: SampleSet,
    spread: float,
    walks: int,
    steps: int,
    batch_size: int,
    seed: int,
) -> Walks:
    """Codes near those of samples: z + spread s e, e ~ N(0, I), s the standard deviations of codes of `known`."""
    s = _codes(model, known, batch_size, seed).std(0, unbiased=False)
    x = _random_codes(starts, walks, seed)
    z = _encoded(model, x)
    e = torch.randn(len(z), steps, z.shape[1], generator=torch.Generator().manual_seed(seed))
    return Walks("around", z[:, None] + spread * s * e, [], (x,))


def _codes(model: Autoencoder, known: SampleSet, batch_size: int, seed: int) -> Tensor:
    if len(known) < 2:
        raise AezooError(f"the range of codes is that of the training samples, two at least: {GIVE_TRAINING}")
    return torch.from_numpy(encode_samples(model, known, _MAX_CODES, batch_size, seed, False)[0])


def _encoded(model: Autoencoder, x: Tensor) -> Tensor:
    """Codes as rows of float32 on the CPU, (B, *input_shape) -> (B, D)."""
    return model.encode(x.to(reference_tensor(model))).flatten(1).float().cpu()


def _random_codes(samples: SampleSet, most: int, seed: int) -> Tensor:
    """All samples in their order, or `most` random ones in random order if there are more."""
    if len(samples) <= most:
        return samples.rows(range(len(samples)))
    return samples.rows(torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:most])


# ---- decoding and pictures ----------------------------------------------------------------------------------------


def decode(model: Autoencoder, walk: Walks, store: Store, batch_size: int) -> Array:
    """The samples of each walk, (walks, steps, *shape)."""
    codes = walk.codes.flatten(0, 1).unflatten(1, model.code_shape)
    samples = store.samples(walk.name, (*walk.codes.shape[:2], *model.input_shape))
    flat = samples.reshape(-1, *model.input_shape)  # a view
    start = 0
    for part in codes.split(batch_size):
        write_batch(flat, start, model.decode(part.to(reference_tensor(model))))
        start += len(part)
    return samples


def picture(walk: Walks, samples: Array, table: Columns | None = None) -> "Figure":
    """One walk per row, between its originals."""
    from aezoo.callbacks import plotting

    decoded = torch.from_numpy(np.array(samples))
    steps = [str(i + 1) for i in range(decoded.shape[1])]
    before, after = walk.ends[:1], walk.ends[1:]
    rows = [
        torch.cat([*(x[i, None] for x in before), row, *(x[i, None] for x in after)]) for i, row in enumerate(decoded)
    ]
    columns = [*("original" for _ in before), *steps, *("original " for _ in after)]
    if not plotting.is_image(decoded.shape[2:]):
        if after:
            columns[0], columns[-1] = "first sample", "second sample"
        panels = [dict(zip(columns, row, strict=True)) for row in rows[:_MAX_PANELS]]
        return plotting.panel_figure(panels, walk.labels[:_MAX_PANELS], ordered=True, columns=table)
    limits = plotting.value_range(torch.cat(rows))
    return plotting.mosaic_figure([plotting.tiles(row, limits) for row in rows], walk.labels, columns)
