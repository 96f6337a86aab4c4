"""export: one function of a model in a file that runs without aezoo, in the units of its data."""

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import aezoo
from aezoo.autoencoder import Autoencoder
from aezoo.data import DataModule
from aezoo.data.source import Stage
from aezoo.errors import AezooError
from aezoo.io import atomic_files
from aezoo.io.exporters import graphs
from aezoo.io.exporters.export_readme import Readme, section
from aezoo.io.exporters.graphs import FORMATS, FUNCTIONS, Function
from aezoo.security import values
from aezoo.tasks.detect_calibration import clear_of_ties, threshold_of
from aezoo.tasks.detect_combined import CombinedScore
from aezoo.tasks.detect_labels import Protocol, Reference
from aezoo.tasks.detect_scores import FunctionScorer, Mahalanobis
from aezoo.tasks.detectors import Detector
from aezoo.tasks.export_check import Check, drawn_samples, what_works
from aezoo.tasks.passes import CURE
from aezoo.tasks.results import Result, takes_model
from aezoo.tasks.samples import SampleSet, evaluation_mode
from aezoo.training.data_units import DataUnits
from aezoo.training.model_names import display_name

_UNITS = ("data", "model")


@dataclass(repr=False)
class Export(Result):
    """The result of `export`.

    Attributes:
        path: the file.
        metadata: the metadata in the file, see docs/export.md.
        n_checked: samples that the file was checked with.
        difference: the largest difference from the model there, relative to the largest value; of indices their share.
        threshold: of scores, None for another function or without samples to calibrate on.
    """

    path: Path
    metadata: dict[str, str]
    n_checked: int
    difference: float
    threshold: float | None = None

    def about(self) -> str:
        given, outputs = json.loads(self.metadata["input"]), json.loads(self.metadata["outputs"])
        names = " and ".join(f"{part['name']} {_shape_text(part['shape'])}" for part in outputs)
        return f"{given['name']} {_shape_text(given['shape'])} of {given['dtype']}, {given['range_text']} -> {names}"

    def summary(self) -> str:
        """What the file takes and gives, how it was checked, and its threshold."""
        lines = [self.about(), _check_text(self.metadata["function"], self.n_checked, self.difference)]
        if self.threshold is not None:
            lines.append(f"threshold {self.threshold:.6g}: {self.metadata['calibration']}")
        elif self.metadata["function"] == "score":
            lines.append("no threshold, since there are no samples to calibrate on: give --input FILE of normal "
                         "samples, --data, or in Python calibrate_on")  # fmt: skip
        return "\n".join(lines)


@takes_model
def export(
    model: Autoencoder,
    *,
    what: str = "reconstruct",
    format: str = "onnx",
    units: str = "data",
    opset: int | None = None,
    score: str = "deviance",
    contamination: float = 0.1,
    quantile: float | None = None,
    normal: str | None = None,
    anomaly: str | None = None,
    class_names: list[str] | None = None,
    force: bool = False,
    fit_on: Any = None,
    calibrate_on: Any = None,
    out: str = "export",
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Export:
    """Write one function of a model to a file that runs without aezoo, checked against the model.

    Writes WHAT.onnx, WHAT.pt2 or WHAT.safetensors, and its section of README.md: name, shape and range of the input,
    and an example. Graphs take batches of any size, in the units of the data: bytes if the model was trained on bytes,
    columns as they are in the table. Threshold, class names and scaling are in the file. docs/export.md has the
    details, and which models cannot be exported.

    Args:
        model: a trained model.
        what: encode (samples to codes, the mean of a posterior), decode (codes to samples), reconstruct, score
            (anomaly scores, with a threshold), indices or decode_indices (of models with discrete codes).
        format: onnx, pt2 (torch.export) or safetensors (the weights that the function reads, by their names in the
            state_dict, and no graph).
        units: data, the values as in the user's files; or model, scaled values.
        opset: version of the ONNX operators; the default is that of torch's exporter.
        score: which score, as in detect; elbo and iwae are random and refused.
        contamination: share of normal samples above the threshold, as in detect.
        quantile: put the threshold at this quantile of the calibration scores instead.
        normal: calibrate on samples of this class only, as in detect.
        anomaly: calibrate on samples of all other classes, as in detect.
        class_names: names of the classes for the file; by default those of the data.
        force: replace an earlier export of this name.
        fit_on: normal samples for scores that are fitted to data (mahalanobis, nap, combined, deep_svdd): an array or a
            DataModule. By default the statistics that are stored with the weights.
        calibrate_on: normal samples that the model was not trained on, for the threshold and for the check; of a
            DataModule its validation split. Without any, the threshold comes from the calibration that is stored with
            the weights (pretrained ones, a run after `detect`), and the check draws random samples.
        out: folder for the files.
        batch_size: samples at a time.
        seed: seed of everything that is random.
        progress: show bars on a terminal.

    Raises:
        AezooError: an unknown value, a model that has no such function or whose function cannot be a graph, a package
            that is not installed, a file that exists, or a file that gives other values than the model.
    """
    for key, given, known in (("what", what, FUNCTIONS), ("format", format, FORMATS), ("units", units, _UNITS)):
        if given not in known:
            raise AezooError(f"{key} is {given!r}: choose from {', '.join(known)}")
    if quantile is not None and not 0 < quantile < 1:
        raise AezooError(f"quantile is {quantile}: give a number between 0 and 1, such as 0.95")
    if opset is not None and (format != "onnx" or not graphs.OPSETS[0] <= opset <= graphs.OPSETS[1]):
        raise AezooError(f"opset is {opset}: for format onnx, give a number from {graphs.OPSETS[0]} to "
                         f"{graphs.OPSETS[1]}")  # fmt: skip
    name, available = display_name(type(model)), graphs.functions_of(model)
    if what not in available:
        raise AezooError(f"{name} has no {what}, which only models with discrete codes have: it can export "
                         f"{', '.join(available)}")  # fmt: skip
    if format == "onnx":
        graphs.require_onnx()
    path = Path(out) / f"{what}.{format}"
    if path.exists() and not force:
        raise AezooError(f"{path} exists: choose another folder with --out DIR, or replace it with --force true")
    readme = Readme(path.parent, force)

    portable = graphs.portable_copy(model)
    detector = Detector(portable, score, contamination, batch_size=batch_size, seed=seed, progress=progress)
    calibration = _calibrated(detector, what, fit_on, calibrate_on, Protocol(normal, anomaly), quantile)
    if format == "safetensors" and what == "score" and not isinstance(detector.scorer, FunctionScorer):
        raise AezooError(f"{score} is learned from samples, not from the weights: use format onnx or pt2, or score "
                         "deviance")  # fmt: skip
    known_units = model.data_units if units == "data" else None
    # weights have no graph that could scale: their metadata say how it is done
    data_units = None if format == "safetensors" else known_units
    function = Function(portable, what, data_units, detector.scorer, calibration.threshold, calibration.reference)
    samples = calibration.samples or drawn_samples(portable, seed)
    cures = "use score deviance" if what == "score" and score != "deviance" else None
    with evaluation_mode(portable, seed):
        check = Check(function, samples, data_units, batch_size)
        if check.is_random:
            raise AezooError(f"{name} draws random numbers in {score if what == 'score' else what}, which a file "
                             f"cannot reproduce: {cures or what_works(portable, what, samples)}")  # fmt: skip
        metadata = _metadata(model, function, known_units, calibration, class_names, check)
        writers: dict[str, Callable[..., graphs.Run]] = {
            "onnx": partial(graphs.write_onnx, names=(function.input_name, function.output_names), opset=opset),
            "pt2": graphs.write_pt2,
            "safetensors": graphs.write_weights,
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
                written = Path(folder) / path.name
                run = writers[format](function, check.example, written, metadata=metadata)
                difference = check.compare(run)
                if difference is None:
                    raise AezooError(
                        f"{name} cannot export {what} as {format}: the values of the file differ from those of the "
                        f"model by {check.worst:.2g} of the largest; {cures or what_works(portable, what, samples)}"
                    )
                # weights in a separate file are written first, so that no graph is ever without them
                parts = sorted(Path(folder).iterdir(), key=lambda part: part == written)
                files = [path.parent / part.name for part in parts]
                for part, file in zip(parts, files, strict=True):
                    with part.open("rb") as source:
                        atomic_files.write(file, partial(shutil.copyfileobj, source), cure=CURE)
        except AezooError:
            raise
        except OSError as error:
            raise AezooError(f"cannot write {path}: {error.strerror or error}; {CURE}") from error
        except Exception as error:  # exporters raise anything
            if format == "onnx" and graphs.is_exportable(function, check.example):
                cures = "use format pt2"
            raise AezooError(f"{name} cannot export {what} as {format} ({_reason(error)}): "
                             f"{cures or what_works(portable, what, samples)}") from error  # fmt: skip
    text = section(path.name, metadata, _check_text(what, check.n, difference))
    files.append(readme.write(path.name, text, CURE))
    return Export(path, metadata, check.n, difference, calibration.threshold, files=files)


# ---- the threshold ---------------------------------------------------------------------------------------------------


@dataclass
class _Calibration:
    """Normal samples, and threshold and p-values by their scores; for functions other than score only the samples."""

    samples: SampleSet | None = None
    threshold: float | None = None
    reference: Tensor | None = None
    score: str = ""
    about: str = ""
    rule: dict[str, str] = field(default_factory=dict)


def _calibrated(
    detector: Detector, what: str, fit_on: Any, calibrate_on: Any, protocol: Protocol, quantile: float | None
) -> _Calibration:
    """The threshold that `detect` finds with the same samples."""
    model = detector.model
    fit_on = calibrate_on if fit_on is None and isinstance(calibrate_on, DataModule) else fit_on
    if isinstance(calibrate_on, DataModule) and "val" not in calibrate_on.splits():
        calibrate_on = None

    def normal_samples(given: Any, split: Stage) -> Reference | None:
        return Reference.from_split(model, given, None, split, protocol)

    held_out, train = normal_samples(calibrate_on, "val"), normal_samples(fit_on, "train")
    known = held_out or train
    if protocol.class_name is not None and known is not None and known.samples.labels is None:
        raise AezooError(f"{known.samples.name} has no labels to say what is normal: drop normal and anomaly, or give "
                         "samples with labels")  # fmt: skip
    if what != "score":
        return _Calibration(None if known is None else known.samples)
    learns = not isinstance(detector.scorer, FunctionScorer)
    rule = {"contamination": repr(detector.contamination)} if quantile is None else {"quantile": repr(quantile)}
    share = f"the upper {100 * detector.contamination:g} %" if quantile is None else f"the {quantile:g} quantile"
    if known is None:
        if model.data_statistics is None or not detector.restore(model.data_statistics):
            if learns:
                raise AezooError(f"{detector.score} must learn from samples: give --data or, in Python, fit_on")
            return _Calibration(score=detector.score)
        scores = detector.calibration_scores_
        threshold = _exact(threshold_of(scores, detector.contamination, quantile), detector)
        about = f"{share} of the scores of {len(scores):,} held-out samples that are stored with the weights"
        return _Calibration(None, threshold, torch.from_numpy(scores), detector.score, about, rule)
    detector.fit((train if learns and train is not None else known).samples, calibrate_on=known.samples)
    scores = detector.decision_scores_ if learns and held_out is None else detector.calibration_scores_
    threshold = threshold_of(scores, detector.contamination, quantile, held_out=held_out is not None)
    if held_out is None:
        threshold = clear_of_ties(threshold, scores)
    kind = "held-out" if held_out is not None else "training"
    about = f"{share} of the scores of {len(scores):,} {kind} samples of {Path(known.samples.name).name}"
    reference = None if held_out is None else torch.from_numpy(scores)
    return _Calibration(known.samples, _exact(threshold, detector), reference, detector.score, about, rule)


def _exact(threshold: float, detector: Detector) -> float:
    """The largest float32 that is not above a threshold: scores in float32 exceed both or none."""
    if isinstance(detector.scorer, CombinedScore | Mahalanobis):  # in float64
        return threshold
    found = np.float32(threshold)
    # as numbers of Python: numpy would round the threshold to float32 before it compares
    return float(found) if float(found) <= threshold else float(np.nextafter(found, np.float32(-np.inf)))


# ---- metadata of the file --------------------------------------------------------------------------------------------


def _metadata(
    model: Autoencoder,
    function: Function,
    units: DataUnits | None,
    calibration: _Calibration,
    class_names: list[str] | None,
    check: Check,
) -> dict[str, str]:
    """The metadata for a user of the file, as text; numbers and lists as JSON."""
    low, high, of = *check.limits, "the samples that it was checked with"
    if function.input_dtype == torch.uint8:
        low, high, of = 0, 255, "bytes"
    elif function.input_name == "indices":
        of = "indices of the samples that it was checked with; each has as many as its codebook has codes"
    elif function.input_name == "x" and model.likelihood.unit_interval and (units is None or not units.scaling):
        low, high, of = 0, 1, "the model's likelihood"
    elif calibration.samples is None:
        of = "random samples, since none were given"
    known = units or DataUnits()
    given = {
        "name": function.input_name, "dtype": str(function.input_dtype).removeprefix("torch."),
        "shape": ["batch", *function.input_shape], "range": [low, high],
        "range_text": f"from {low:g} to {high:g} ({of})",
    }  # fmt: skip
    outputs = [
        {"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": ["batch", *value.shape[1:]]}
        for name, value in zip(function.output_names, check.example_outputs, strict=True)
    ]
    columns = list(known.columns)
    names = class_names or list((calibration.samples and calibration.samples.class_names) or ())
    found: dict[str, str] = {
        "aezoo_version": aezoo.__version__,
        "model": display_name(type(model)),
        "hyperparameters": json.dumps(values.check_plain(dict(model.hparams), "the hyperparameters")),
        "function": function.name,
        "input": json.dumps(given),
        "outputs": json.dumps(outputs),
    }
    if units is not None:
        found["data_units"] = json.dumps(known.to_plain())
    found |= {"columns": json.dumps(columns)} if columns else {}
    found |= {"class_names": json.dumps(names)} if names else {}
    found |= {"score": calibration.score} if calibration.score else {}
    if function.threshold is not None:
        found |= {"threshold": repr(function.threshold), "calibration": calibration.about, **calibration.rule}
    return found


def _reason(error: BaseException) -> str:
    """The reason why an exporter failed, which its outermost error hides, as a short text."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[\d*m", "", " ".join(str(error).split()))
    if operator := re.search(r"No ONNX function found for <OpOverload\(op='\w+\.(\w+)'", text):
        return f"ONNX has no operator {operator[1]}"
    return f"{type(error).__name__}: {text}"[:160]


def _shape_text(shape: list[Any]) -> str:
    return f"({', '.join(map(str, shape))})"


def _check_text(what: str, n: int, difference: float) -> str:
    found = f"{100 * (1 - difference):.4g} % of the indices are the same"
    if what != "indices":
        found = f"off by at most {difference:.2g} of the largest value"
    return f"checked against the model with {n:,} samples: {found}"
