"""Export of a model's functions for use without aezoo: ONNX graphs, torch.export programs and plain weights.

The input of a graph are samples in the units of the training data, in batches of any size; scaling is part of the
graph. Other information for the user is stored as strings in the file's metadata.

Shapes: B batch.
"""

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError, install_hint
from aezoo.training.data_units import DataUnits

# input and outputs of each function, by their names in the file
FUNCTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "encode": ("x", ("z",)),
    "decode": ("z", ("x_hat",)),
    "reconstruct": ("x", ("x_hat",)),
    "score": ("x", ("score",)),
    "indices": ("x", ("indices",)),
    "decode_indices": ("indices", ("x_hat",)),
}
FORMATS = ("onnx", "pt2", "safetensors")
# protobuf files are limited to 2 GiB; larger weights are stored in a second file
_LARGE = 2**30
_METADATA = "metadata.json"
# minimum and maximum opset version that torch's exporter supports
OPSETS = (18, 23)
Run = Callable[[Tensor], Sequence[Tensor]]


def functions_of(model: Autoencoder) -> tuple[str, ...]:
    """Return the names of the functions that a model supports."""
    return tuple(name for name in FUNCTIONS if "indices" not in name or type(model).discrete_code)


def portable_copy(model: Autoencoder) -> Autoencoder:
    """Return a copy of a model for export: on the CPU, in float32 and evaluation mode."""
    return copy.deepcopy(model).cpu().float().eval().requires_grad_(False)


class Function(nn.Module):
    """A function of a model with input and output in the units of the data, as exported to a file.

    Args:
        model: see `portable_copy`.
        name: one of `FUNCTIONS` that the model supports.
        units: units of the training data; None does not scale samples.
        score: for `score`, the score function instead of `model.anomaly_score`.
        threshold: for `score`, the threshold above which samples are anomalies, a second output. The score is compared
            in its dtype, which is float64 for scores that detect computes in float64.
        reference: for `score`, (n,) scores of calibration samples, for p-values as a third output.

    Attributes:
        input_name: name of the input.
        output_names: names of the outputs.
        input_dtype: uint8 for data in bytes; int64 for indices; otherwise float32, or float64 for data in float64.
        input_shape: shape of one sample, code or array of indices.
        has_bytes: whether the data are bytes.
        score: the score that is exported.
    """

    _offset: Tensor
    _factor: Tensor
    _reference: Tensor

    def __init__(
        self,
        model: Autoencoder,
        name: str,
        units: DataUnits | None = None,
        score: Callable[[Tensor], Tensor] | None = None,
        threshold: float | None = None,
        reference: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model, self.name, self.threshold = model, name, threshold
        self.input_name, self.output_names = FUNCTIONS[name]
        if threshold is not None:
            self.output_names = (*self.output_names, "is_anomaly")
        if reference is not None:
            self.output_names = (*self.output_names, "p_value")
            self.register_buffer("_reference", reference.double().sort().values, persistent=False)
        self.score = model.anomaly_score if score is None else score
        units = units or DataUnits()
        offset, factor = units.offset_and_factor
        self.has_bytes = units.white == 255 and units.levels == 255 and not units.scaling
        self._scales = bool(units.scaling)
        kind = units.scaling["offset"].dtype if units.scaling else torch.float32
        self.register_buffer("_offset", offset.to(kind), persistent=False)
        self.register_buffer("_factor", factor.to(kind), persistent=False)
        shapes = {"x": model.input_shape, "z": model.code_shape, "indices": getattr(model, "index_shape", ())}
        self.input_shape: tuple[int, ...] = shapes[self.input_name]
        of_samples = torch.uint8 if self.has_bytes else kind
        self.input_dtype = {"x": of_samples, "z": torch.float32, "indices": torch.int64}[self.input_name]
        self.eval()

    def forward(self, given: Tensor) -> tuple[Tensor, ...]:
        match self.name:
            case "encode":
                return (self.model.encode(self._scaled(given)),)
            case "decode":
                return (self._in_units(self.model.decode(given)),)
            case "reconstruct":
                return (self._in_units(self.model(self._scaled(given))),)
            case "indices":
                return (self.indices_of(self._scaled(given)),)
            case "decode_indices":
                return (self._in_units(self.samples_of_indices(given)),)
        return self.decided(self.score(self._scaled(given)))

    def decided(self, score: Tensor) -> tuple[Tensor, ...]:
        """Return scores, in float32 or float64, whether they are above the threshold, and p-values."""
        score = score if score.dtype == torch.float64 else score.float()
        outputs = (score,) if self.threshold is None else (score, score > self.threshold)
        if "p_value" not in self.output_names:
            return outputs
        n = len(self._reference)
        at_least = n - torch.searchsorted(self._reference, score.double())
        return (*outputs, (1 + at_least).double() / (n + 1))

    def input_of(self, samples: Tensor) -> Tensor:
        """Return the input of the graph for scaled samples: (B, *model.input_shape) -> (B, *input_shape)."""
        if self.input_name == "z":
            return self.model.encode(samples)
        if self.input_name == "indices":
            return self.indices_of(samples)
        if self.has_bytes:
            return (samples * 255).round().to(torch.uint8)
        return (samples.double() * self._factor + self._offset).to(self.input_dtype) if self._scales else samples

    def indices_of(self, samples: Tensor) -> Tensor:
        """See `DiscreteAutoencoder.encode_indices`."""
        model: Any = self.model
        indices: Tensor = model.encode_indices(samples)
        return indices

    def samples_of_indices(self, indices: Tensor) -> Tensor:
        """See `DiscreteAutoencoder.decode_indices`."""
        model: Any = self.model
        samples: Tensor = model.decode_indices(indices)
        return samples

    def _scaled(self, given: Tensor) -> Tensor:
        if self.has_bytes:
            return given.float() / 255
        return ((given - self._offset) / self._factor).float() if self._scales else given

    def _in_units(self, x_hat: Tensor) -> Tensor:
        if self.has_bytes:
            return x_hat * 255
        return x_hat.to(self._factor.dtype) * self._factor + self._offset if self._scales else x_hat


# ---- writing and running ---------------------------------------------------------------------------------------------


def require_onnx() -> None:
    """Check that the packages for ONNX are installed.

    Raises:
        AezooError: a package is not installed.
    """
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise AezooError(f"ONNX needs {', '.join(missing)}: {install_hint('onnx')}")


def program(function: nn.Module, example: Tensor) -> Any:
    """Return the graph of a module by torch.export, for batches of any size."""
    settings: dict[str, Any] = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)}
    with _quiet():
        try:
            return torch.export.export(function, (example,), **settings)
        except Exception:  # any exception; Dynamo supports any batch size in some cases in which plain tracing does not
            return torch.export.export(function, (example,), strict=True, **settings)


def is_exportable(function: nn.Module, example: Tensor) -> bool:
    """Return whether `program` works."""
    try:
        return program(function, example) is not None
    except Exception:  # torch.export can raise any exception
        return False


def write_onnx(
    function: nn.Module,
    example: Tensor,
    path: Path,
    names: tuple[str, Sequence[str]] | None = None,
    metadata: Mapping[str, str] | None = None,
    opset: int | None = None,
    exported: Any = None,
) -> Run:
    """Write a module as an ONNX file and return a function that runs it with onnxruntime.

    Args:
        function: maps a batch to a tuple of tensors.
        example: a batch of at least 2.
        path: path of the file; weights above 1 GiB are in a second file, `path` with .data appended.
        names: names of input and outputs.
        metadata: values for the file's metadata_props.
        opset: opset version; None uses the default of torch's exporter.
        exported: result of `program`, to save time; the batch axis is then named by torch.
    """
    import onnxruntime

    given, outputs = names or (None, None)
    with _quiet():
        found: Any = torch.onnx.export(
            exported or function,
            () if exported else (example,),
            dynamo=True,
            dynamic_shapes=None if exported else ({0: "batch"},),
            input_names=None if given is None else [given],
            output_names=None if outputs is None else list(outputs),
            opset_version=opset,
            custom_translation_table=_translations(),
            verbose=False,
        )
    found.model.metadata_props.update(metadata or {})
    size = sum(value.nbytes for value in (*function.parameters(), *function.buffers()))
    found.save(str(path), external_data=size > _LARGE)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(value) for value in session.run(None, {name: x.numpy()})]


def _translations() -> dict[Any, Callable[..., Any]]:
    """Return translations of operators that torch lacks or has imprecisely: log(sigmoid(x)) is -inf below -88."""
    from onnxscript import opset18

    op: Any = opset18  # its types are those of ONNX, not of Python

    def log_sigmoid(x: Any) -> Any:
        return op.Neg(op.Softplus(op.Neg(x)))

    def searchsorted(
        values: Any, x: Any, out_int32: bool = False, right: bool = False, side: str | None = None, sorter: Any = None
    ) -> Any:
        """Count the values along the last axis that are less than x, or at most x, by bisection."""
        n = int(values.shape[-1])
        comes_before = op.LessOrEqual if right or side == "right" else op.Less
        count = op.Expand(op.Constant(value_ints=[0]), op.Shape(x))
        for step in (2**k for k in reversed(range(n.bit_length()))):
            more = op.Add(count, op.Constant(value_ints=[step]))
            last = op.Sub(op.Min(more, op.Constant(value_ints=[n])), op.Constant(value_ints=[1]))
            found = op.GatherElements(values, last, axis=-1)
            inside = op.LessOrEqual(more, op.Constant(value_ints=[n]))
            count = op.Where(op.And(inside, comes_before(found, x)), more, count)
        return count

    return {torch.ops.aten.log_sigmoid.default: log_sigmoid, torch.ops.aten.searchsorted.Tensor: searchsorted}


def write_pt2(function: nn.Module, example: Tensor, path: Path, metadata: Mapping[str, str] | None = None) -> Run:
    """Write a module as a torch.export program, metadata in `metadata.json`; return a function that runs it."""
    extra = {_METADATA: json.dumps(dict(metadata or {}), indent=1)}
    with _quiet():
        torch.export.save(program(function, example), path, extra_files=extra)
        run: Run = torch.export.load(path).module()
    return run


def write_weights(function: Function, example: Tensor, path: Path, metadata: Mapping[str, str] | None = None) -> Run:
    """Write the model's weights that a function uses, and return a function that runs it with the file's weights.

    Names are those of `model.state_dict()`. All other weights of the model are set to NaN, to show that no required
    weight is missing.
    """
    state, read = function.model.state_dict(), _storages_read(function, example)
    used = {key: value for key, value in state.items() if value.untyped_storage().data_ptr() in read}
    save_file({key: value.clone(memory_format=torch.contiguous_format) for key, value in used.items()}, path,
              metadata=dict(metadata or {}))  # fmt: skip
    for value in state.values():
        if value.is_floating_point():
            value.fill_(torch.nan)
    for key, value in load_file(path).items():
        state[key].copy_(value)
    run: Run = function
    return run


class _Recorder(TorchFunctionMode):
    """Records the storages that torch functions read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # an attribute, such as the dtype, is not a value; a view of it, such as .T, has the same memory
        if getattr(func, "__name__", "") != "__get__":
            self._record([args, kwargs])
        return func(*args, **(kwargs or {}))

    def _record(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self.read.add(value.untyped_storage().data_ptr())
        elif isinstance(value, list | tuple | dict):
            for part in value.values() if isinstance(value, dict) else value:
                self._record(part)


def _storages_read(function: nn.Module, example: Tensor) -> set[int]:
    recorder = _Recorder()
    with torch.no_grad(), recorder:
        function(example)
    return recorder.read


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's warnings about its export functions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), torch.no_grad():
        # from unrolling an LSTM
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        warnings.filterwarnings("ignore", "_check_is_size will be removed")
        # from the likelihood, which `anomaly_score` replaces temporarily
        warnings.filterwarnings("ignore", "While compiling, we found certain side effects")
        # torch 2.12 warns about this when it loads a program
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        # from torch's copy of one of its deprecated classes
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
