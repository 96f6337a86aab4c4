"""Comparison of an exported file with the model it was made of, on real samples or random ones."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.data.source import ArrayDataset
from aezoo.io.exporters.graphs import Function, Run, functions_of, is_exportable
from aezoo.tasks.samples import SampleSet
from aezoo.training.data_units import DataUnits
from aezoo.training.seeding import forked_rng

# largest difference of outputs, relative to the largest output, as in aezoo.testing
_TOLERANCE = 1e-4
# indices that may differ, where the distances to two codes are the same but for rounding
_MAX_OTHER_INDICES = 1e-3
# samples of functions other than score, which is checked with all that its threshold is calibrated on
_MAX_CHECKED = 256


class Check:
    """Inputs of a function, and the outputs of the model for these samples.

    Attributes:
        example: a batch of inputs, at least 2.
        example_outputs: what the model gives for it.
        limits: the smallest and the largest value of all inputs.
        n: number of samples.
        is_random: whether the model draws random numbers.
        worst: the largest difference that `compare` has found.
    """

    def __init__(self, function: Function, samples: SampleSet, units: DataUnits | None, batch_size: int) -> None:
        self._function, self._samples, self._units, self._batch_size = function, samples, units, batch_size
        if function.name != "score" and len(samples) > _MAX_CHECKED:
            self._samples = samples.subset(torch.arange(_MAX_CHECKED))
        self.n, self.worst = len(self._samples), 0.0
        first = next(self._batches(range(min(self.n, 7))))[0]
        self.example = first if len(first) > 1 else torch.cat([first, first])
        with forked_rng(torch.device("cpu")):
            found = []
            for draw in (1, 2):
                torch.manual_seed(draw)
                found.append(function(self.example))
        self.example_outputs: tuple[Tensor, ...] = found[0]
        self.is_random = any(not torch.equal(one, two) for one, two in zip(*found, strict=True))
        self.limits = (math.inf, -math.inf)
        # before the file is written, since the export may change the model's weights
        self._wanted: list[tuple[Tensor | None, tuple[Tensor, ...]]] = []
        for given, wanted in self._batches():
            if len(known := given.double()[given.isfinite()]):
                self.limits = (min(self.limits[0], float(known.min())), max(self.limits[1], float(known.max())))
            self._wanted.append((None if function.name == "score" else given, wanted))

    def compare(self, run: Run) -> float | None:
        """The largest difference of a file's outputs, relative to the largest output; None if it is too large."""
        largest, differences, others = 1e-3, 0.0, [0, 0]
        inputs = (x for x, _ in self._batches(of=False)) if self._function.name == "score" else None
        for kept, wanted in self._wanted:
            given = next(inputs) if kept is None and inputs is not None else kept
            assert given is not None
            for name, value, expected in zip(self._function.output_names, run(given), wanted, strict=True):
                if value.shape != expected.shape:
                    raise RuntimeError(f"{name} has shape {tuple(value.shape)}, not {tuple(expected.shape)}")
                if name == "indices":
                    others = [others[0] + int((value != expected).sum()), others[1] + value.numel()]
                elif name not in ("is_anomaly", "p_value"):  # which follow from the score
                    same = (value == expected) | (value.isnan() & expected.isnan())
                    off = (value.double() - expected.double()).abs().masked_fill(same, 0)
                    differences = max(differences, float(off.max()) if bool(off.isfinite().all()) else math.inf)
                    largest = max(largest, float(expected.nan_to_num(0, 0, 0).abs().max()))
        is_index = others[1] > 0
        self.worst = others[0] / others[1] if is_index else differences / largest
        return self.worst if self.worst <= (_MAX_OTHER_INDICES if is_index else _TOLERANCE) else None

    def _batches(self, rows: range | None = None, of: bool = True) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """Inputs (with outputs if `of` is given) of one sample, of three, and of the others."""
        starts = [0, 1, *range(4, self.n, self._batch_size)] if rows is None else [0]
        for start, end in zip(starts, [*starts[1:], self.n if rows is None else len(rows)], strict=True):
            if start >= self.n:
                return
            x = self._samples.rows(range(start, min(end, self.n)))
            given = self._function.input_of(x)
            yield given, self._by_the_model(given, x) if of else ()

    def _by_the_model(self, given: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the model, computed without the code that is exported."""
        function, model = self._function, self._function.model
        x = given.float() / 255 if given.dtype == torch.uint8 else x
        match function.name:
            case "encode":
                return (model.encode(x),)
            case "indices":
                return (function.indices_of(x),)
            case "score":
                return function.decided(function.score(x))
        x_hat = model(x) if function.name == "reconstruct" else None
        if x_hat is None:
            x_hat = model.decode(given) if function.name == "decode" else function.samples_of_indices(given)
        if self._units is None:
            return (x_hat,)
        white = 255 if function.has_bytes else 1
        return (torch.from_numpy(self._units.values(x_hat.numpy())) * white,)


def drawn_samples(model: Autoencoder, seed: int) -> SampleSet:
    """Random samples in the scale of a model."""
    x = torch.rand(16, *model.input_shape, generator=torch.Generator().manual_seed(seed))
    return SampleSet(ArrayDataset(x), name="random samples")


def what_works(model: Autoencoder, failed: str, samples: SampleSet) -> str:
    """The other functions of a model that can be exported, in words."""
    few, found = samples.subset(torch.arange(min(len(samples), 8))), []
    for name in functions_of(model):
        if name != failed:
            with contextlib.suppress(Exception):  # of a model that fails in one of its functions
                check = Check(function := Function(model, name), few, None, 8)
                found += [] if check.is_random or not is_exportable(function, check.example) else [name]
    return f"it can export {', '.join(found)}" if found else "it can export nothing else"
