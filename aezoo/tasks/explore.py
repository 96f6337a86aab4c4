"""explore: a folder of a page on which a browser runs encoders and decoders, with samples and codes to look at.

The page is in `explorer/` next to this file. Shapes: N samples, P pixels of all channels, D numbers of a code.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import aezoo
from aezoo.autoencoder import Autoencoder
from aezoo.data.classes import UNLABELLED
from aezoo.errors import AezooError
from aezoo.io import atomic_files, onnxruntime_web
from aezoo.io.exporters import graphs
from aezoo.io.exporters.graphs import Function, portable_copy
from aezoo.tasks.detectors import Detector
from aezoo.tasks.export import export
from aezoo.tasks.passes import CURE
from aezoo.tasks.results import Result, sizes
from aezoo.tasks.samples import SampleSet, evaluation_mode, progress_bar, random_rows
from aezoo.training.data_units import DataUnits
from aezoo.training.model_names import display_name

Array = npt.NDArray[Any]
PAGE = Path(__file__).parent / "explorer"
MANIFEST = "manifest.json"
# samples to choose from, and training samples: no more than these bytes
_SHOWN, _TRAIN, _MOST_PIXELS = 60, 1000, 2**22
# numbers of codes of a model, 1 MiB
_MOST_CODES = 2**18
# codes drawn from a prior if there are no training samples
_DRAWN = 500
# weights that a browser should have to load
_MOST_WEIGHTS = 2**28


@dataclass
class Subject:
    """A model to explore, and its samples where there are any.

    Attributes:
        label: its name on the page.
        model: a trained model of images.
        test: samples to choose from.
        train: those that it was trained on, for points and nearest neighbours.
        calibrate_on: normal samples that it was not trained on, for the threshold, if its weights have no calibration.
        data: the name of the samples.
        note: a note on them for the user.
        is_binary: whether the model was trained on pixels that are 0 or white.
    """

    label: str
    model: Autoencoder
    test: SampleSet | None = None
    train: SampleSet | None = None
    calibrate_on: SampleSet | None = None
    data: str = "the data"
    note: str = ""
    is_binary: bool = False


@dataclass(repr=False)
class Exploration(Result):
    """The result of `explore`.

    Attributes:
        folder: with index.html.
        manifest: what the page reads first.
    """

    folder: Path
    manifest: dict[str, Any]

    def about(self) -> str:
        names = ", ".join(model["label"] for model in self.manifest["models"])
        size = sum(file.stat().st_size for file in self.files)
        return (
            f"{self.folder / 'index.html'}: {names}; {len(self.files)} files, {size / 1e6:.1f} MB, for any web server"
        )


def explore(
    subjects: Sequence[Subject],
    *,
    out: str | Path = "explore",
    runtime: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Exploration:
    """Write a folder with a page on which a browser runs models of images.

    The folder only needs a web server for static files. It contains the models' graphs (ONNX), up to 1,000 training
    samples with their codes, some samples to choose from, and the outputs of the models for a few inputs, with which
    the page compares the outputs in the browser.

    Args:
        subjects: models that take samples of one shape.
        out: the folder; files of an earlier page are replaced.
        runtime: onnxruntime-web, see `aezoo.io.onnxruntime_web.locate`.
        seed: of the choice of samples.
        progress: show a bar on a terminal.

    Raises:
        AezooError: a model of other data than images, of another shape, or that cannot be exported; onnxruntime-web is
            not available; or the folder cannot be written.
    """
    for subject in subjects:
        _check(subject, subjects[0])
    graphs.require_onnx()
    folder, files = Path(out), _Files(Path(out))
    runtime_files = onnxruntime_web.locate(runtime)
    # without this file, an earlier page does not start while its files are replaced
    (folder / MANIFEST).unlink(missing_ok=True)
    sets = _Sets(files, seed)
    models = []
    with progress_bar("models" if progress else "", len(subjects)) as advance:
        for index, subject in enumerate(subjects):
            models.append((subject, sets.add(subject), f"models/{index}"))
        check = sets.check_inputs(subjects[0].model.input_shape)
        files.write("check.bin", check.tobytes())
        found = []
        for subject, place, home in models:
            train = None if place is None else sets.train[place]
            found.append({**_model(files, subject, train, check, home, seed), "set": place})
            advance(1)
    for name, content in runtime_files.items():
        files.write(f"runtime/{name}", content)
    for page in sorted(PAGE.iterdir()):
        files.write(page.name, page.read_bytes())
    manifest = {
        "aezoo_version": aezoo.__version__,
        "shape": list(subjects[0].model.input_shape),
        "check": {"file": "check.bin", "n": len(check)},
        "sets": sets.found,
        "models": found,
    }
    files.write(MANIFEST, json.dumps(manifest, allow_nan=False).encode())
    return Exploration(folder, manifest, files=files.written)


def _check(subject: Subject, first: Subject) -> None:
    label, model = subject.label, subject.model
    shape = model.input_shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise AezooError(f"explore shows grey and colour images, and {label} takes samples of {sizes(shape)}: "
                         "use aezoo embed or aezoo export")  # fmt: skip
    if shape != first.model.input_shape:
        raise AezooError(f"{label} takes {sizes(shape)} and {first.label} {sizes(first.model.input_shape)}: models "
                         "on one page must take the same shape, so explore them separately")  # fmt: skip
    if (weights := sum(p.nbytes for p in model.parameters())) > _MOST_WEIGHTS:
        raise AezooError(f"{label} has {weights / 1e6:,.0f} MB of weights, and a browser should load at most "
                         f"{_MOST_WEIGHTS / 1e6:.0f} MB: use a smaller model")  # fmt: skip
    _white(subject)


def _white(subject: Subject) -> float:
    """The value of white in the units of a model's data."""
    units = subject.model.data_units or DataUnits()
    if units.white is None and (units.scaling or units.levels == 1):
        raise AezooError(f"{subject.label} does not say which value is white in its training data, so no page can draw "
                         "them: train it on images, or on an array of bytes")  # fmt: skip
    return float(units.white or 1)


class _Files:
    """The files of a folder, each written completely or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.written = folder, list[Path]()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AezooError(f"cannot write {folder}: {error.strerror}; {CURE}") from error

    def write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write(path, lambda file: file.write(content), cure=CURE)
        self.written.append(path)


# ---- samples ---------------------------------------------------------------------------------------------------------


class _Sets:
    """Samples as bytes, each set once however many models have it.

    Attributes:
        found: the description of each set for the page.
        train: (N, *shape) bytes of training samples of each set, None without.
    """

    def __init__(self, files: _Files, seed: int) -> None:
        self.found: list[dict[str, Any]] = []
        self.train: list[Array | None] = []
        self._files, self._seed = files, seed
        self._known: dict[str, int] = {}
        self._shown: list[Array] = []

    def add(self, subject: Subject) -> int | None:
        """The index of a subject's set, None if it has none."""
        test, train = (
            None if part is None else self._bytes(subject, part, most)
            for part, most in ((subject.test, _SHOWN), (subject.train, _TRAIN))
        )
        if test is None and train is None:
            return None
        digest = hashlib.sha256(b"".join(part[0].tobytes() for part in (test, train) if part is not None)).hexdigest()
        if digest in self._known:
            return self._known[digest]
        place = self._known[digest] = len(self.found)
        samples = subject.test or subject.train
        assert samples is not None
        names = None if samples.class_names is None else list(map(str, samples.class_names))
        entry: dict[str, Any] = {"name": subject.data, "note": subject.note, "classes": names}
        for key, part in (("test", test), ("train", train)):
            entry[key] = None
            if part is not None:
                name = f"samples/{place}.{key}.bin"
                self._files.write(name, part[0].tobytes())
                entry |= {key: {"file": name, "n": len(part[0])}, f"{key}_labels": part[1]}
        self.found.append(entry)
        self.train.append(None if train is None else train[0])
        self._shown += [] if test is None else [test[0]]
        return place

    def _bytes(self, subject: Subject, samples: SampleSet, most: int) -> tuple[Array, list[int] | None]:
        """A random choice of samples as bytes, white is 255, in random order, and their labels."""
        samples = samples.check(subject.model)
        most = max(1, min(most, _MOST_PIXELS // math.prod(samples.shape)))
        rows = random_rows(len(samples), most, self._seed)
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(self._seed))]
        function = Function(subject.model, "encode", subject.model.data_units)
        values = function.input_of(samples.rows(rows)).double() / _white(subject)
        labels = samples.labels
        has_labels = labels is not None and not labels.is_floating_point() and not (labels == UNLABELLED).any()
        found = None if labels is None or not has_labels else labels[rows].tolist()
        return (values.clamp(0, 1) * 255).round().to(torch.uint8).numpy(), found

    def check_inputs(self, shape: tuple[int, ...]) -> Array:
        """Images that the page compares its numbers for: a sample of each set, and noise."""
        noise = np.random.default_rng(self._seed).integers(0, 256, (1, *shape), dtype=np.uint8)
        return np.concatenate([*(shown[:2] for shown in self._shown[:2]), noise])


# ---- a model ---------------------------------------------------------------------------------------------------------


def _model(files: _Files, subject: Subject, train: Array | None, check: Array, home: str, seed: int) -> dict[str, Any]:
    """Write the graphs, codes and outputs of a model; returns its description for the page."""
    model, folder = subject.model, files.folder / home
    statistics, units = model.data_statistics, model.data_units
    brings_scores = statistics is not None and "deviance" in statistics.scores
    calibrate_on = None if brings_scores else subject.calibrate_on
    functions = {}
    try:
        for what in ("encode", "decode", "score"):
            normal = calibrate_on if what == "score" else None
            try:
                functions[what] = export(model, what=what, force=True, calibrate_on=normal, out=str(folder), seed=seed)
            except AezooError as error:
                if what != "score":
                    raise AezooError(f"{subject.label}: {error}") from None
                no_score = f"No anomaly score: {error}"
    finally:
        # messages of export are for other uses of the files
        (folder / "README.md").unlink(missing_ok=True)
    files.written += [folder / f"{what}.onnx" for what in functions]

    portable, white = portable_copy(model), _white(subject)
    encoder, decoder = (Function(portable, what, units) for what in ("encode", "decode"))
    scorer = Detector(portable, "deviance").scorer if "score" in functions else None
    score = None if scorer is None else Function(portable, "score", units, scorer)
    size = math.prod(model.code_shape)

    def encode(pixels: Array) -> Tensor:
        return torch.cat([encoder(part)[0].flatten(1) for part in _inputs(encoder, pixels, white).split(256)])

    with evaluation_mode(portable, seed):
        z = encode(check)
        parts = [z, decoder(z.unflatten(1, model.code_shape))[0].flatten(1) / white]
        parts += [] if score is None else [score(_inputs(score, check, white))[0].unsqueeze(1)]
        files.write(f"{home}/check.bin", _floats(torch.cat([part.double() for part in parts], 1)))
        codes, points = _codes(portable, encode, train, max(2, _MOST_CODES // size))
    if codes is not None:
        files.write(f"{home}/codes.bin", _floats(codes))
        files.write(f"{home}/axes.bin", _floats(_principal_axes(codes)))
    no_plane = (
        ""
        if codes is not None
        else ("The range of codes is unknown: this model has no prior, and its training samples are not available.")
    )
    if type(model).discrete_code:
        no_plane = "This code is one of a codebook's entries at each position: there are no codes between them."
    found = functions.get("score")
    return {
        "label": subject.label,
        "model": display_name(type(model)),
        "folder": home,
        "dtype": str(encoder.input_dtype).removeprefix("torch."),
        "white": white,
        "is_binary": subject.is_binary,
        "code_shape": list(model.code_shape),
        "n_codes": 0 if codes is None else len(codes),
        "codes_are_of_set": train is not None,
        "points": points,
        "no_plane": no_plane,
        "score": None if found is None else found.metadata["score"],
        "no_score": no_score if found is None else "",
        "threshold": None if found is None else found.threshold,
        "calibration": "" if found is None else found.metadata.get("calibration", ""),
    }


def _inputs(function: Function, pixels: Array, white: float) -> Tensor:
    """Bytes of which 255 is white as the input of a function."""
    if function.input_dtype == torch.uint8:
        return torch.from_numpy(pixels)
    return (torch.from_numpy(pixels).double() / 255 * white).to(function.input_dtype)


def _codes(
    model: Autoencoder, encode: Callable[[Array], Tensor], train: Array | None, most: int
) -> tuple[Tensor | None, str]:
    """Codes (N, D) to draw as points, and what they are of."""
    statistics = model.data_statistics
    if train is not None:
        codes = encode(train[:most])
        return codes, f"Points: codes of {len(codes):,} training samples."
    if statistics is not None and statistics.codes is not None:
        codes = statistics.codes[: min(most, _TRAIN)]
        return codes, f"Points: codes of {len(codes):,} training samples, stored with the weights."
    if model.has_prior:
        codes = model.encode(model.sample(min(most, _DRAWN))).flatten(1)
        return codes, f"Points: codes of {len(codes):,} images drawn from the model's prior."
    return None, ""


def _principal_axes(codes: Tensor) -> Tensor:
    """The two directions of largest variance, (2, D); zeros if there is none."""
    centred = codes.double() - codes.double().mean(0)
    axes = torch.zeros(2, codes.shape[1], dtype=torch.double)
    found = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
    axes[: len(found)] = found
    return axes


def _floats(values: Tensor) -> bytes:
    return values.numpy().astype("<f4").tobytes()
