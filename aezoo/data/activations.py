"""activations: a network layer's outputs for the samples of another set, for models that interpret networks.

    aezoo fit --model topk_sae --data.name activations --data.network resnet18 --data.layer layer3 --data.of cifar10

The samples of `--data.of`, as any model would get them, go through the network once, in evaluation mode, in batches of
a fixed size and on the GPU if there is one; the splits are those of that set. Layers have their names in
`named_modules()`, and activations are what a forward hook there would see, copied before a later layer can change it in
place. For a layer that is used several times the last use counts.

    a layer gives                                  samples (D,); of S layers (S, D)
    (B, D)                                         one each
    (B, D, H, W) and other maps, (B, T, D) tokens  one for each position, or the mean or the largest over positions
                                                   (--data.positions)

    x = a / c     c^2 = E||a||^2 / D, over the training split, one c for each layer (--data.normalise)

c stays in checkpoints, as the statistics of `--data.scale` do, so that tasks scale raw activations from files.
`save_model` folds it into the weights of a trained model, which then works on raw activations anywhere:

    model, trained = aezoo.io.checkpoint.load_run("runs/topk_sae-activations/0")
    aezoo.save_model(model, "sae", trained["scaling"])

Activations are held in memory or in a memory-mapped temporary file, by `--data.memory`.

Shapes: B batch, P positions, S layers, D features.
"""

import copy
import difflib
import inspect
import math
import os
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, cast

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import Dataset

from aezoo.data.classes import subset
from aezoo.data.loaders import default_num_workers, make_loader, reads_whole_batches
from aezoo.data.resident import fits_in_memory, free_memory
from aezoo.data.source import STAGES, ArrayDataset, Batch, Options, Source, Stage, accepts, byte_divisor, to_float32
from aezoo.data.source_registry import open_source, source_of_path
from aezoo.errors import AezooError
from aezoo.io.hub_files import local_path
from aezoo.nets.blocks.classifier import Classifier
from aezoo.nets.blocks.pretrained import cached_weights
from aezoo.security import policy
from aezoo.training.keyword_groups import Argument
from aezoo.training.seeding import forked_rng

_BATCH_SIZE, _MAX_CLASSIFIER_SAMPLES = 128, 20_000
_CPU = torch.device("cpu")


# ---- networks -------------------------------------------------------------------------------------------------------


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
        "auto", "The axis of a layer's output that holds its features, first or last after the batch; auto is first "
        "for maps and last for tokens, (B, T, D)."
    )]  # fmt: skip
    normalise: Annotated[bool, Argument(
        True, "Divide activations by one number for each layer, so that their mean squared norm in the training split "
        "is the number of their dimensions. It is kept in the checkpoint; save_model folds it into the weights."
    )]  # fmt: skip


@dataclass
class Network:
    """The network whose activations are taken.

    Attributes:
        module: the network, in evaluation mode.
        prepare: converts samples to the network's input, (B, *shape) -> (B, ...).
    """

    module: nn.Module
    prepare: Callable[[Tensor], Tensor] = lambda x: x


def open_network(options: Options, shape: tuple[int, ...], classes: int | None) -> Network:
    """The network that `--data.network` names.

    Args:
        options: network, weights and seed count.
        shape: shape of one sample.
        classes: number of classes of the samples.

    Raises:
        AezooError: there is none of that name, it may not be imported, or its weights are missing.
    """
    name = options.network
    is_file = Path(name).exists() or os.sep in name or name.endswith(".ckpt")
    is_import = not is_file and "." in name and all(part.isidentifier() for part in name.split("."))
    if options.weights == "random":
        if is_file or is_import:
            raise AezooError(f"--data.weights random is not for {name}, which brings its weights: drop it")
        rank_zero_warn(f"{name} gets RANDOM weights, fixed by --data.seed {options.seed}: its activations are not "
                       "those of a trained network")  # fmt: skip
    with forked_rng(_CPU), torch.inference_mode(False):
        torch.manual_seed(options.seed)
        if name == "classifier":
            if classes is None:
                raise AezooError(f"{options.of} has no classes for a classifier to learn: give another --data.network")
            network = Network(Classifier(shape, classes))
        elif is_file:
            from aezoo.io.checkpoint import load_model

            network = Network(load_model(local_path(name)).float())
        elif is_import:
            network = Network(_imported_network(name))
        else:
            network = _torchvision_network(name, options.weights, shape)
    network.module.requires_grad_(False).eval()
    return network


def _torchvision_network(name: str, weights: str, shape: tuple[int, ...]) -> Network:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, ["classifier", *known], n=3)
        hint = f", did you mean {' or '.join(map(repr, near))}?" if near else ":"
        raise AezooError(f"unknown network {name!r}{hint} --data.network takes classifier, a classifier of torchvision "
                         "such as resnet18, the run of a model of the zoo, or the import path of a module")  # fmt: skip
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise AezooError(f"{name} takes images of 1 or 3 channels, not samples of shape {shape}: give another set as "
                         "--data.of or another --data.network")  # fmt: skip
    module = models.get_model(name, weights=None)
    if weights == "stored":
        instead = "give --data.weights random, whose activations are not those of a trained network"
        with cached_weights(name, instead) as state:
            module.load_state_dict(state)
        if hasattr(module, "transform_input"):
            module.transform_input = True  # as torchvision does for weights that were trained so
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def prepare(x: Tensor) -> Tensor:
        return (x.expand(-1, 3, -1, -1) - mean.to(x)) / std.to(x)

    return Network(cast(nn.Module, module), prepare)


def _imported_network(path: str) -> nn.Module:
    """A copy of a module, or the result of a class or function without arguments, by import path."""
    from jsonargparse import ArgumentError, ArgumentParser

    if not policy._opened:
        # a program that has not gone through the command line: the same rule, and what the environment allows
        policy.enforce(policy.take_flags([])[1])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=type[nn.Module] | Callable)
    try:
        found = parser.parse_args([f"--network={path}"]).network
    except ArgumentError as error:
        denied = re.search(r"Importing '([\w.]+)' is not allowed, denied by the '([\w.*]+)' entry", str(error))
        if denied:
            raise AezooError(policy.refusal(denied[1], denied[2])) from error
        reasons = re.findall(r"^\s*- (.*)$", str(error), re.MULTILINE)
        raise AezooError(f"--data.network {path} cannot be imported: {(reasons or [str(error)])[0]}"
                         f"{_suggest_names(path)}") from error  # fmt: skip
    if isinstance(found, nn.Module):
        return copy.deepcopy(found)
    # of what every configuration may name, which a stranger's may, no function is called: some start runs
    own = any(f"{path}.".startswith(f"{root}.") for root in policy.PACKAGES)
    if not (isinstance(found, type) and issubclass(found, nn.Module)) and (own or not inspect.isfunction(found)):
        raise AezooError(f"--data.network {path} is no torch.nn.Module and no function of yours that makes one")
    try:
        module = found()
    except Exception as error:  # whatever the user's code raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise AezooError(f"--data.network {path} cannot be built without arguments ({reason}): give a function that "
                         "makes it") from error  # fmt: skip
    if not isinstance(module, nn.Module):
        raise AezooError(f"--data.network {path} gives a {type(module).__name__} and no torch.nn.Module")
    return module


def _suggest_names(path: str) -> str:
    """The nearest name in a module that is already imported, for a message."""
    module, _, name = path.rpartition(".")
    known = vars(sys.modules[module]) if module in sys.modules else {}
    near = [] if name in known else difflib.get_close_matches(name, known, n=3)
    return f", did you mean {' or '.join(map(repr, near))}?" if near else ""


# ---- layers ---------------------------------------------------------------------------------------------------------


def check_layers(module: nn.Module, layers: Sequence[str], what: str) -> None:
    """Refuse names that no layer has.

    Raises:
        AezooError: names the nearest ones.
    """
    known = [name for name, _ in module.named_modules() if name]
    for layer in layers:
        if layer not in known:
            near = difflib.get_close_matches(layer, known, n=3, cutoff=0.4) or known[:8]
            raise AezooError(f"{what} has no layer {layer!r} (--data.layer): there are {len(known)}, such as "
                             f"{', '.join(near)}")  # fmt: skip


@torch.no_grad()
def layer_outputs(module: nn.Module, layers: Sequence[str], x: Tensor) -> list[Tensor]:
    """The outputs of layers for a batch, one float32 tensor each.

    Raises:
        AezooError: the network does not take the batch, or a layer's output is no tensor with one row per sample.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output
            while isinstance(first, tuple | list) and first:
                first = first[0]
            if isinstance(first, Tensor):
                # a copy: the next layer may work in place
                found[name] = first.detach().clone()

        return hook

    hooks = [module.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    try:
        module(x)
    except AezooError:
        raise
    except Exception as error:  # whatever a network raises that was made for other samples
        raise AezooError(f"the network does not take samples of shape {tuple(x.shape[1:])} ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[:200]}): give another --data.size, --data.channels or set") \
            from error  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
    for name in layers:
        if name not in found:
            raise AezooError(f"layer {name} gives no tensor, or is not used (--data.layer): take one before or after")
        if found[name].ndim < 2 or len(found[name]) != len(x):
            raise AezooError(f"layer {name} gives {tuple(found[name].shape)} for {len(x)} samples, and not a row for "
                             "each (--data.layer): take one before or after")  # fmt: skip
    return [found[name].float() for name in layers]


def flatten_positions(output: Tensor, positions: str, first: bool) -> Tensor:
    """(B, P, D) of a layer's output.

    Args:
        output: (B, D), (B, D, ...) or (B, ..., D).
        positions: each keeps them, mean and max pool them to one.
        first: whether the feature axis follows the batch axis.
    """
    output = output.movedim(1, -1) if first else output
    rows = output.reshape(len(output), -1, output.shape[-1])
    if positions == "each":
        return rows
    return rows.mean(1, keepdim=True) if positions == "mean" else rows.amax(1, keepdim=True)


# ---- the source -----------------------------------------------------------------------------------------------------


class Normalisation:
    """x = a / c, in the form of `aezoo.data.in_memory.Scale`.

    Args:
        factor: c, () or (S, 1).
    """

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def state(self) -> dict[str, Tensor]:
        """What scales other activations in the same way."""
        return {"offset": torch.zeros_like(self.factor), "factor": self.factor}


@accepts(ActivationsArgs, inner="of")
class Activations(Source):
    """Activations of a network over another set.

    Attributes:
        of: that set.
        network: the network.
        scaling: what divides the activations; None before they are computed, or without `normalise`.
    """

    value_range = None

    def __init__(self, options: Options) -> None:
        if options.of == options.name:
            raise AezooError("--data.of activations has no samples of its own: give a set such as mnist5k")
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
            raise AezooError(f"several layers need as many positions and features each, not {given} (--data.layer): "
                             "take others, or --data.positions mean where only positions differ")  # fmt: skip
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
                                 "(--data.layer): take another layer, or --data.normalise false")  # fmt: skip
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
        x, y = x[y >= 0], y[y >= 0]  # -1 is no label
        with forked_rng(_CPU), torch.enable_grad():
            torch.manual_seed(self.options.seed)
            module.standardise(x)
            module.learn(x, y)
        if "val" in sets:
            with torch.no_grad():
                right = torch.cat([module(x).argmax(1) == y for x, y in self._batches(sets["val"])])
            rank_zero_info(f"classifier of {self.options.of}: {float(right.float().mean()):.3f} right in validation")

    def _batches(self, dataset: Dataset[Any]) -> Iterator[Any]:
        """Samples as a model sees them, with their labels if they have any."""
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
        processes: how many processes of this machine hold them.

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
                             f"{Path(folder).parent}: set TMPDIR to a larger disk, or take fewer samples")  # fmt: skip
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
        """Itself, or an `ArrayDataset` if its samples are in memory."""
        return self if self._x is None else ArrayDataset(self._x, self.labels)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Batch:
        batch = self.__getitems__([range(len(self))[index]])
        return cast(Batch, tuple(part[0] for part in batch))

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """A whole batch at once; torch's loader prefers this method to one call a sample."""
        at = torch.as_tensor(indices)
        x = torch.from_numpy(np.array(self._mapped("r")[at.numpy()]))
        x = x if self.factor is None else x / self.factor
        return (x,) if self.labels is None else (x, self.labels[at])

    def _mapped(self, mode: Any) -> npt.NDArray[np.float32]:
        # opened each time: an open map would be pickled with all its values
        return np.memmap(self._path, np.float32, mode, shape=self.shape)


def _remove_folder(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # and not a process that reads ahead
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
