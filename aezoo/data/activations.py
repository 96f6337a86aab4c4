"""activations: a network layer's outputs for the samples of another set, for models that interpret networks.

    aezoo fit --model topk_sae --data.name activations --data.network resnet18 --data.layer layer3 --data.of cifar10

The network is run once on the samples of `--data.of`, scaled as for any model, in evaluation mode, in batches of a
fixed size and on the GPU if there is one. The splits are those of that set. Layers are named as in `named_modules()`,
and activations are the outputs that a forward hook receives, copied before a later layer can change them in place. For
a layer that is called several times, those of the last call are used.

    output of a layer                              samples (D,); of S layers (S, D)
    (B, D)                                         one each
    (B, D, H, W) and other maps, (B, T, D) tokens  one for each position, or the mean or the largest over positions
                                                   (--data.positions)

    x = a / c     c^2 = E||a||^2 / D, over the training split, one c for each layer (--data.normalise)

Checkpoints store c, like the statistics of `--data.scale`, so that tasks scale raw activations from files.
`save_model` folds it into the weights of a trained model, which then takes raw activations:

    model, trained = aezoo.io.checkpoint.load_run("runs/topk_sae-activations/0")
    aezoo.save_model(model, "sae", trained["scaling"])

Activations are stored in memory or in a memory-mapped temporary file, as `--data.memory` says.

Shapes: B batch, P positions, S layers, D features.
"""

import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, cast

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import Dataset

from aezoo.data.classes import subset
from aezoo.data.loaders import default_num_workers, make_loader, reads_whole_batches
from aezoo.data.networks import check_layers, flatten_positions, layer_outputs, open_network
from aezoo.data.resident import fits_in_memory, free_memory
from aezoo.data.source import STAGES, ArrayDataset, Batch, Options, Source, Stage, accepts, byte_divisor, to_float32
from aezoo.data.source_registry import open_source, source_of_path
from aezoo.errors import AezooError
from aezoo.nets.blocks.classifier import Classifier
from aezoo.training.keyword_groups import Argument
from aezoo.training.seeding import forked_rng

_BATCH_SIZE, _MAX_CLASSIFIER_SAMPLES = 128, 20_000
_CPU = torch.device("cpu")


class ActivationsArgs(TypedDict, total=False):
    """Settings of `activations`."""

    network: Annotated[str, Argument(
        "classifier", "activations: the network that makes them. A torchvision model such as resnet18; classifier, a "
        "small one that learns the labels of the set first; the run, checkpoint or saved folder of a model of the zoo; "
        "or the import path of a module, or of a function that makes one, in a package that --allow names."
    )]  # fmt: skip
    layer: Annotated[str, Argument(
        "features", "activations: the name of the layer, as in named_modules(). Several, separated by commas, give "
        "(S, D). In the classifier, the layer before the last is called features."
    )]  # fmt: skip
    of: Annotated[str, Argument(
        "mnist5k", "activations: the set whose samples go through the network. The other settings, such as root, size "
        "and scale, apply to it."
    )]  # fmt: skip
    weights: Annotated[Literal["stored", "random"], Argument(
        "stored", "stored takes a torchvision model's pretrained weights from torch's folder of checkpoints, and "
        "refuses if they are missing; random takes random initial weights, fixed by the seed."
    )]  # fmt: skip
    positions: Annotated[Literal["each", "mean", "max"], Argument(
        "each", "For a feature map or a row of tokens, each makes a sample of every position; mean and max pool them."
    )]  # fmt: skip
    feature_axis: Annotated[Literal["auto", "first", "last"], Argument(
        "auto", "The axis of a layer's output that contains its features, first or last after the batch; auto is first "
        "for maps and last for tokens, (B, T, D)."
    )]  # fmt: skip
    normalise: Annotated[bool, Argument(
        True, "Divide activations by one number for each layer, so that their mean squared norm in the training split "
        "is the number of their dimensions. It is kept in the checkpoint; save_model folds it into the weights."
    )]  # fmt: skip


class Normalisation:
    """x = a / c, in the form of `aezoo.data.in_memory.Scale`.

    Args:
        factor: c, () or (S, 1).
    """

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def state(self) -> dict[str, Tensor]:
        """Tensors with which other activations are scaled in the same way."""
        return {"offset": torch.zeros_like(self.factor), "factor": self.factor}


@accepts(ActivationsArgs, nested_source="of")
class Activations(Source):
    """Activations of a network over another set.

    Attributes:
        of: that set.
        network: the network.
        scaling: divides the activations; None before they are computed, or without `normalise`.
    """

    value_range = None

    def __init__(self, options: Options) -> None:
        if options.of == options.name:
            raise AezooError("--data.of activations has no samples of its own: give a data set such as mnist5k")
        self.options = options
        reader = source_of_path(options.of)
        self.of = open_source(options.for_source(reader or options.of, options.of if reader else options.root))
        self.num_classes, self.class_names = self.of.num_classes, self.of.class_names
        self.network = open_network(options, tuple(self.of.input_shape), self.num_classes)
        self.layers = [part.strip() for part in options.layer.split(",")]
        check_layers(self.network.module, self.layers, options.network)
        rows = self._rows(torch.zeros(1, *self.of.input_shape), _CPU)
        self.positions, *shape = rows.shape[1:]
        self.input_shape = tuple(shape)
        self.scaling: Normalisation | None = None
        self._splits: dict[Stage, Dataset[Any]] | None = None

    def prepare(self) -> None:
        self.of.prepare()

    def split(self, stage: Stage) -> "Dataset[Any] | None":
        if self._splits is None:
            with torch.inference_mode(False):
                self._splits = self._build()
        return self._splits.get(stage)

    def _rows(self, x: Tensor, device: torch.device) -> Tensor:
        """Samples of the set to activations, (B, *shape) -> (B, P, D) or (B, P, S, D)."""
        outputs = layer_outputs(self.network.module, self.layers, self.network.prepare(x.to(device)))
        grid = len(self.of.input_shape) == 2
        parts = []
        for output in outputs:
            auto = output.ndim > 3 or (output.ndim == 3 and grid)
            first = self.options.feature_axis == "first" or (self.options.feature_axis == "auto" and auto)
            parts.append(flatten_positions(output, self.options.positions, first))
        if len({part.shape for part in parts}) > 1:
            given = ", ".join(f"{name} {p.shape[1]} x {p.shape[2]}" for name, p in zip(self.layers, parts, strict=True))
            raise AezooError(f"several layers must have the same number of positions and of features, got {given} "
                             "(--data.layer): choose other layers, or give --data.positions mean if only positions "
                             "differ")  # fmt: skip
        return parts[0] if len(parts) == 1 else torch.stack(parts, 2)

    def _build(self) -> dict[Stage, Dataset[Any]]:
        self.of.processes = self.processes
        sets = {stage: held for stage in STAGES if (held := self.of.split(stage)) is not None}
        self._train_classifier(sets)
        device = torch.device("cuda") if torch.cuda.is_available() else _CPU
        self.network.module.to(device)
        try:
            with _exact_float32():
                found = {stage: self._compute_activations(dataset, stage, device) for stage, dataset in sets.items()}
        finally:
            self.network.module.to(_CPU)
        if self.options.normalise:
            squares, n = found["train"][1], len(found["train"][0])
            factor = (squares / (n * self.input_shape[-1])).sqrt().float()
            if not bool((factor > 0).all() and factor.isfinite().all()):
                raise AezooError(f"{self.options.layer} of {self.options.network} gives only zeros, NaN or infinity "
                                 "(--data.layer): choose another layer, or --data.normalise false")  # fmt: skip
            factor = factor[:, None] if factor.ndim else factor
            self.scaling = Normalisation(factor)
            for dataset, _ in found.values():
                dataset.divide(factor)
        return {stage: dataset.as_dataset() for stage, (dataset, _) in found.items()}

    def _train_classifier(self, sets: dict[Stage, Dataset[Any]]) -> None:
        module = self.network.module
        if not isinstance(module, Classifier) or self.options.weights == "random":
            return
        n = len(cast(Any, sets["train"]))
        few = torch.randperm(n, generator=torch.Generator().manual_seed(self.options.seed))[:_MAX_CLASSIFIER_SAMPLES]
        learnt = self._batches(subset(sets["train"], few.sort().values))
        x, y = (torch.cat(part) for part in zip(*learnt, strict=True))
        x, y = x[y >= 0], y[y >= 0]  # -1 means no label
        with forked_rng(_CPU), torch.enable_grad():
            torch.manual_seed(self.options.seed)
            module.standardise(x)
            module.learn(x, y)
        if "val" in sets:
            with torch.no_grad():
                right = torch.cat([module(x).argmax(1) == y for x, y in self._batches(sets["val"])])
            rank_zero_info(f"classifier of {self.options.of}: validation accuracy {float(right.float().mean()):.3f}")

    def _batches(self, dataset: Dataset[Any]) -> Iterator[Any]:
        """Scaled samples as for a model, with their labels if they have any."""
        num_workers = 0 if reads_whole_batches(dataset) else default_num_workers(self.processes)
        for x, *y in make_loader(dataset, batch_size=_BATCH_SIZE, num_workers=num_workers):
            yield (to_float32(x, byte_divisor(self.options.scale)), *y)

    def _compute_activations(
        self, dataset: Dataset[Any], stage: Stage, device: torch.device
    ) -> tuple["ActivationDataset", Tensor]:
        """All activations of a split, and the sum of their squares over samples and features, () or (S,)."""
        n = len(cast(Any, dataset)) * self.positions
        name = f"{self.options.name} ({stage})"
        rows = ActivationDataset(n, self.input_shape, self.options.memory, name, self.processes)
        squares = torch.zeros(self.input_shape[:-1], dtype=torch.float64)
        labels, start = [], 0
        for x, *y in self._batches(dataset):
            part = self._rows(x, device).flatten(0, 1).cpu()
            rows.write(start, part)
            start += len(part)
            squares += part.double().square().sum((0, -1))
            labels += [one.repeat_interleave(self.positions, 0) for one in y]
        rows.labels = torch.cat(labels) if labels else None
        return rows, squares


class ActivationDataset(Dataset[Batch]):
    """Activations in memory or in a memory-mapped file.

    Args:
        n: number of samples.
        shape: shape of one.
        memory: on, off or auto, see `DataModule`.
        name: their name in messages.
        processes: how many processes of this machine have a copy.

    Attributes:
        labels: (n,), None without labels.
    """

    labels: Tensor | None = None

    def __init__(self, n: int, shape: tuple[int, ...], memory: str, name: str, processes: int) -> None:
        self.shape: tuple[int, ...] = (n, *shape)
        self.factor: Tensor | None = None
        size = 4 * math.prod(self.shape)
        self._x: Tensor | None = None
        self._path = ""
        if memory == "on" or (memory == "auto" and fits_in_memory(size, _CPU, processes)):
            if 0 < free_memory(_CPU) < size:
                raise AezooError(f"{name}: {n} samples take {size / 2**20:,.0f} MiB of memory, which is more than is "
                                 "free: give --data.memory off or auto, which write them to a file")  # fmt: skip
            self._x = torch.empty(self.shape)
            return
        folder = tempfile.mkdtemp(prefix="aezoo-activations-")
        weakref.finalize(self, _remove_folder, folder, os.getpid())
        if shutil.disk_usage(folder).free < size:
            raise AezooError(f"{name}: {n} samples take {size / 2**20:,.0f} MiB, more than is free in "
                             f"{Path(folder).parent}: set TMPDIR to a larger disk, or use fewer samples")  # fmt: skip
        self._path = str(Path(folder, "rows.float32"))
        np.memmap(self._path, np.float32, "w+", shape=self.shape)

    def write(self, start: int, part: Tensor) -> None:
        """Write samples from row `start` on."""
        if self._x is not None:
            self._x[start : start + len(part)] = part
        else:
            mapped = self._mapped("r+")
            mapped[start : start + len(part)] = part.numpy()
            cast(Any, mapped).flush()

    def divide(self, factor: Tensor) -> None:
        """Divide all samples: those in memory now, those in a file when they are read."""
        if self._x is not None:
            self._x.div_(factor)
        else:
            self.factor = factor

    def as_dataset(self) -> Dataset[Any]:
        """This object, or an `ArrayDataset` if its samples are in memory."""
        return self if self._x is None else ArrayDataset(self._x, self.labels)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Batch:
        batch = self.__getitems__([range(len(self))[index]])
        return cast(Batch, tuple(part[0] for part in batch))

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """A whole batch at once; torch's loader prefers this method to one call per sample."""
        at = torch.as_tensor(indices)
        x = torch.from_numpy(np.array(self._mapped("r")[at.numpy()]))
        x = x if self.factor is None else x / self.factor
        return (x,) if self.labels is None else (x, self.labels[at])

    def _mapped(self, mode: Any) -> npt.NDArray[np.float32]:
        # opened each time: an open map would be pickled with all its values
        return np.memmap(self._path, np.float32, mode, shape=self.shape)


def _remove_folder(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a worker process
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Plain float32 and deterministic algorithms, whatever the run uses."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
