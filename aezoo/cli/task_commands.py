"""Commands for trained models: a model and samples from files, results into a folder.

A command is a function whose keyword arguments, with their types, defaults and docstring, are its flags.
"""

import argparse
import importlib
import inspect
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import aezoo
from aezoo.autoencoder import Autoencoder
from aezoo.cli.config_resolution import (
    drop_foreign_settings,
    for_data_set,
    name_data,
    setting,
    warn_other_splits,
)
from aezoo.cli.parsing import Parser, check_flags
from aezoo.data import DataModule, images
from aezoo.data.array import SAMPLES, check_length, encode_labels, to_channels_first
from aezoo.data.columns import Columns
from aezoo.data.datamodule import PERMISSIONS, stored_settings
from aezoo.data.folder import ImageSource
from aezoo.data.in_memory import as_real_array, check_values, chunk_rows, to_real_tensor
from aezoo.data.loaders import available_cores, worker_failure
from aezoo.data.npy import NpyDataset
from aezoo.data.readers import TableArrays, check_columns, is_streamed, read_arrays
from aezoo.data.resident import lacks_memory
from aezoo.data.settings import settings_of_source
from aezoo.data.source import STAGES, ArrayDataset, Stage
from aezoo.data.windows import TIME_COLUMNS, cut
from aezoo.errors import AezooError
from aezoo.io import calibration, checkpoint, partial, terminal
from aezoo.security import policy
from aezoo.tasks import passes
from aezoo.tasks.codec import tables
from aezoo.tasks.result_store import resolve_device
from aezoo.tasks.results import Result
from aezoo.tasks.samples import Origin, SampleSet, progress_bar
from aezoo.training import sizes, speed
from aezoo.training.data_statistics import DataStatistics
from aezoo.training.data_units import TABLES, DataUnits
from aezoo.training.seeding import mix

_MAX_PIXELS = inspect.signature(DataModule).parameters["max_pixels"].default
# arguments that the command line fills in
_GIVEN = {"model", "x", "file", "fit_on", "calibrate_on", "columns", "out", "batch_size", "seed", "progress"}
# flags that name a file or a folder of samples
_FILES = {"around", "reference", "mask"}
# flags that accept the name of a split of the data instead of a file
_SPLITS = {"reference"}
# sources of which the setting root names the samples
_PATHS = {"array", "folder"}
# commands whose results are samples
_OF_SAMPLES = {"reconstruct", "generate", "denoise", "impute", "decompress"}
# commands that process samples of any size with a model that takes them
_ANY_SIZE = {"reconstruct", "denoise", "compress"}
# commands whose results must be exactly reproducible, because other processes read them
_EXACT = ("compress", "decompress", "export")
# commands that take one process, and why
_ONE_PROCESS = {"export": "it does not process many samples"}
_MAX_PROCESSES = 64
# flags that commands also take by position
_POSITIONAL = {"export": ("--ckpt_path", "--out"), "impute": ("--ckpt_path", "--input")}
_MAX_LINES = 20
# samples in memory at a time
_MAX_RESCALED = 1024
# largest value accepted if the training data lie in [0, 1]; bytes stored as floats exceed it
_MOST = 11.0
_UNSCALED = {"offset": torch.zeros(()), "factor": torch.ones(())}


def main(argv: list[str]) -> None:
    """Run one command.

    Raises:
        AezooError: what the user must correct.
    """
    command = argv[0]
    function = getattr(importlib.import_module(f"aezoo.tasks.{command}"), command)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    argv, allowed = policy.take_flags(name_data(policy.allow_remote(_with_flags(argv))))
    policy.enforce(allowed)
    parser, accepted = parser_of(command, function), inspect.signature(function).parameters
    check_flags(argv, None, parser)
    path = _value(argv, "--ckpt_path")
    trained: dict[str, Any] = {"settings": {}}
    model = None
    if path is not None and not {"-h", "--help"} & set(argv):
        if command in ("compress", "decompress"):
            tables.constriction_stream()  # missing packages are reported before anything is read
        model, trained = checkpoint.load_run(path)
        known = stored_settings()
        recorded = trained["settings"] or trained.get("data", {})
        stored = {key: value for key, value in recorded.items() if key in known and key != "batch_size"}
        stored = for_data_set(drop_foreign_settings(stored, argv), argv)
        if "file" not in accepted:
            parser.set_defaults({f"data.{key}": value for key, value in stored.items()})
    config = parser.parse_args(argv[1:])
    speed.choose(config.speed)
    speed.keep_memory()
    if model is None:
        raise AezooError(f"{command} needs a trained model: give --ckpt_path RUN_OR_FILE_OR_TAG, such as vae.mnist")
    if config.get("batch_size", 1) < 1:
        raise AezooError(f"batch_size takes a number above 0, got {config.batch_size}")
    if not 0 <= config.get("seed", 0) < 2**32:
        raise AezooError(f"seed takes a number from 0 to {2**32 - 1}, got {config.seed}")
    rank, world = _processes(command, config.devices)
    model = model.to(_device(config.device, rank, world)).float()  # samples are float32
    settings = {key: config[key] for key in accepted.keys() - _GIVEN}
    if "file" in accepted:
        if config.input is None:
            raise AezooError(f"{command} needs a file: give --input FILE")
        settings["file"] = config.input
    else:
        any_size = command in _ANY_SIZE and sizes.takes_any_size(model)
        settings |= samples_of_flags(config, model.data_units, trained, argv, accepted, any_size)
    if "columns" in accepted:
        settings["columns"] = Columns.of_model(model)
    out = Path(config.out) if config.out else trained["folder"] / command
    common = {"batch_size": config.get("batch_size"), "seed": config.get("seed"), "progress": True}
    settings |= {key: value for key, value in common.items() if key in accepted}
    before = set(out.glob("*"))
    try:
        with (
            signals_as_exit(),
            nullcontext() if command in _EXACT else speed.evaluating(model),
            nullcontext() if command in _ONE_PROCESS else _passes(out, model, settings, argv, rank, world),
        ):
            result: Result = function(model=model, out=str(out), **settings)
    except (RuntimeError, MemoryError) as error:
        if lacks_memory(error):
            raise AezooError(f"out of memory ({' '.join(str(error).split())[:120]}): lower --batch_size, or give fewer "
                             "samples at once") from error  # fmt: skip
        if (line := worker_failure(error)) is None:
            raise
        raise AezooError(line) from error
    text = result.summary()
    print(f"{text}\n" if text else "", end="")
    _keep_calibration(model, getattr(result, "statistics", None), trained["home"])
    arrays = [file for file in result.files if file.suffix == ".npy"] if command in _OF_SAMPLES else []
    if model.data_units is not None and model.data_units.scaling and arrays:
        names = ", ".join(file.name for file in arrays)
        print(f"values in {names} are in the units of the training data, errors and scores are in the scale that the "
              "model sees (--data.scale)")  # fmt: skip
    if model.data_units is None and command in _OF_SAMPLES:
        print(f"aezoo: {config.ckpt_path} does not record how its training data were scaled: samples are in the scale "
              "that the model sees", file=sys.stderr)  # fmt: skip
    if "force" not in accepted and (replaced := before.intersection(result.files)):
        print(f"aezoo: {len(replaced)} earlier files in {out} are replaced; --out DIR keeps both", file=sys.stderr)
    if len(result.files) > _MAX_LINES:
        print(f"{len(result.files):,} files in {out}")
        return
    for file in result.files:
        print(file)


def _keep_calibration(model: Autoencoder, found: DataStatistics | None, home: Path | None) -> None:
    """Store the calibration next to the weights, if these are in a folder."""
    if found is None or not found.scores or home is None:
        return
    model.data_statistics = (model.data_statistics or DataStatistics()).updated(found)
    try:
        file = calibration.write(home, model)
    except AezooError as error:
        print(f"aezoo: {error}", file=sys.stderr)
    else:
        print(f"{file} stores the calibration, for calls without the training data")


def _processes(command: str, devices: int) -> tuple[int, int]:
    """The rank of this process and the number of processes that share the samples."""
    if not 1 <= devices <= _MAX_PROCESSES:
        raise AezooError(f"devices takes a number from 1 to {_MAX_PROCESSES}, got {devices}")
    if devices > 1 and (why := _ONE_PROCESS.get(command)):
        raise AezooError(f"{command} runs in one process, since {why}: leave out --devices")
    return (int(os.environ.get("LOCAL_RANK", "0")) if devices > 1 else 0), devices


def _device(name: str, rank: int, world: int) -> torch.device:
    """The device of this process: each of several processes has a different GPU; on the CPU they share the cores."""
    device = resolve_device(name)
    if world == 1:
        return device
    if device.type == "cpu":
        torch.set_num_threads(max(1, min(torch.get_num_threads(), available_cores() // world)))
        return device
    if device.type != "cuda" or device.index is not None:
        raise AezooError(f"--devices {world} uses the CPU or the first {world} GPUs: give --device cpu or cuda")
    if world > torch.cuda.device_count():
        raise AezooError(
            f"--devices is {world}, but there are {torch.cuda.device_count()} GPUs: give at most that many"
        )
    return resolve_device(f"cuda:{rank}")


@contextmanager
def _passes(
    out: Path, model: Autoencoder, settings: Mapping[str, Any], argv: list[str], rank: int, world: int
) -> Iterator[None]:
    """Distribute the samples over processes, and continue what an earlier call of this command has computed."""
    given = {key: value for key, value in settings.items() if key != "columns"}  # which the model or the data determine
    plain = {key: value.identity if isinstance(value, SampleSet) else value for key, value in given.items()}
    if "file" in plain and Path(plain["file"]).is_file():  # another one may have its name
        found = Path(plain["file"]).stat()
        plain["file"] = plain["file"], found.st_size, found.st_mtime_ns
    run = world, model.device.type, torch.get_num_threads(), aezoo.__version__
    key = partial.digest(argv[0], plain, run, type(model).__qualname__, dict(model.hparams), model)
    folder = out / f".{argv[0]}"
    running = passes.Passes(partial.Partial(folder, key, passes.CURE, rank), argv, rank, world)
    token = passes.current.set(running)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if not rank and running.has_begun:
            print(f"aezoo: the same command continues from the results in {folder}", file=sys.stderr)
        raise
    except BaseException:
        running.discard()
        raise
    else:
        running.discard()
    finally:
        passes.current.reset(token)
        running.close()


def _with_flags(argv: list[str]) -> list[str]:
    """The same arguments, with their flags before those that a command also takes by position."""
    command, *rest = argv
    given: list[str] = []
    for flag in _POSITIONAL.get(command, ()):
        if rest and not rest[0].startswith("-"):
            given += [flag, rest.pop(0)]
    return [command, *given, *rest]


@contextmanager
def signals_as_exit() -> Iterator[None]:
    """Handle SIGTERM and SIGHUP like Ctrl-C, which removes half-written files."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may install signal handlers
        return

    def handle_signal(signum: int, _: Any) -> None:
        if signum != signal.SIGTERM:
            signal.signal(signum, signal.SIG_IGN)  # the kernel and the shell say so each for itself
        sys.exit(128 + signum)

    before = {number: signal.signal(number, handle_signal) for number in terminal.termination_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parser_of(command: str, function: Callable[..., Any]) -> Parser:
    """All flags of a command."""
    about = inspect.cleandoc(inspect.getdoc(function) or "").partition("\n\n")[0]
    parser = Parser(prog=f"aezoo {command}", description=about)
    parser.add_argument(
        "--ckpt_path",
        type=str,
        help="The model: a checkpoint, a run folder, a saved model folder, hf://user/name, or a tag of `aezoo list "
        "--pretrained`.",
    )
    accepted = inspect.signature(function).parameters
    if "file" in accepted:
        parser.add_argument("--input", type=str | None, default=None, help="The file that compress wrote.")
    else:
        use = "Samples to use" if "x" in accepted else "Normal samples that the model was not trained on,"
        parser.add_argument(
            "--input", type=str | None, default=None,
            help=f"{use} instead of --data: .npy, .npz, .csv, .parquet, .pt, an image, or a folder of images.",
        )  # fmt: skip
        if "x" in accepted:
            parser.add_argument(
                "--split", type=Literal["train", "val", "test"], default="test", help="Which split of --data to use."
            )
    parser.add_argument(
        "--out", type=str | None, default=None, help=f"Folder for the results; by default RUN/{command}."
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--devices", type=int, default=1, help="Processes that share the samples, on GPUs one on each.")
    parser.add_argument("--speed", type=Literal[speed.SETTINGS], default="auto", help=speed.HELP)
    if "batch_size" in accepted:
        parser.add_argument("--batch_size", type=int, default=256, help="Samples that are processed at a time.")
    if "seed" in accepted:
        parser.add_argument("--seed", type=int, default=0, help="Seed of everything that is random.")
    parser.add_function_arguments(function, skip={name for name in accepted if name in _GIVEN})
    if "file" not in accepted:
        parser.add_class_arguments(DataModule, "data", instantiate=False, skip={*PERMISSIONS})
        # hidden, because the command has another --batch_size; a file of settings may still contain that of a fit
        parser._option_string_actions.pop("--data.batch_size").help = argparse.SUPPRESS
    return parser


def samples_of_flags(
    config: Any,
    units: DataUnits | None,
    trained: dict[str, Any],
    argv: list[str],
    accepted: Mapping[str, Any],
    any_size: bool,
) -> dict[str, Any]:
    """The samples for a command, from `--input` or a split, and the splits for fitting."""
    # the parser adds the path of a file of settings
    known = stored_settings()
    data = {key: value for key, value in dict(config.data).items() if key in known}
    named = {key: config[key] for key in _FILES & accepted.keys() if config[key] is not None}
    splits_named = {
        key: name for key, name in named.items() if key in _SPLITS and name in STAGES and not Path(name).exists()
    }
    files = {key: path for key, path in named.items() if key not in splits_named}
    # a missing value is neither 0 nor 1
    keeps_missing = "mask" in accepted and data.get("binarise") in (None, "none")
    if keeps_missing:
        data["missing"] = "keep"
    found: dict[str, Any] = {
        key: _read_mask(str(path), data) if key == "mask" else read(str(path), units, data, key)
        for key, path in files.items()
    }
    if "x" in accepted and config.input is not None:
        own = {key: value for key, value in data.items() if key != "size"}
        keeps = any_size and setting(argv, "data", "size") is None
        if keeps and data.get("size") is not None:
            print(f"aezoo: samples keep their own sizes; --data.size {data['size']} resizes them as in training",
                  file=sys.stderr)  # fmt: skip
        found["x"] = read(config.input, units, own if keeps else data, any_size=any_size)
    elif config.input is not None:
        found["calibrate_on"] = read(config.input, units, data)
    wanted: dict[str, Stage] = {"x": config.get("split", "test"), "fit_on": "train", "calibrate_on": "val"}
    wanted |= splits_named
    missing = [key for key in wanted if key in accepted and key not in found]
    needed = "x" in missing and accepted["x"].default is inspect.Parameter.empty
    # the flags that accept a file instead of a split that must exist
    required = ({"x": "input"} if needed else {}) | {key: key for key in splits_named}
    settings: dict[str, Any] = trained["settings"]
    if not settings and setting(argv, "data", "name") is None:
        flag = next(iter(required.values()), "")
        if required and "data" in trained:
            name = trained["data"]["name"]
            raise AezooError(f"{config.ckpt_path} was trained on {name}: give --data {name}, or --{flag} FILE")
        if required:
            raise AezooError(
                f"{config.ckpt_path} does not record what it was trained on: give --data.name SET or --{flag} FILE"
            )
        return found
    if not missing:
        return found
    try:
        # with --input, settings of another source are those of that file
        of_source = settings_of_source(data)
        if keeps_missing and "missing" not in of_source:
            data.pop("missing", None)
        module = DataModule(**(data if needed else of_source))
        known_units = units or DataUnits()
        check_columns(str(module.name), module.source.columns, known_units.columns)
        splits = module.splits()
        if not module.units.is_table:  # a table is scaled as the training data were
            module.report_other_scaling(known_units.scaling, known_units.white)
        warn_other_splits(settings, dict(module.hparams))
    except AezooError as error:
        if required:
            raise
        # e.g. on another machine than the one it was trained on
        left = "no data are read" if config.input is None else f"only {config.input} is used"
        print(f"aezoo: {left}, as the training data are not available: {error}", file=sys.stderr)
        return found
    for key, flag in required.items():
        if wanted[key] not in splits:
            # not larger fractions, which would take samples that the model was trained on
            other = f"--{'split' if key == 'x' else key} {' or '.join(splits)}"
            raise AezooError(f"{module.name} has no {wanted[key]} split: use {other}, or give --{flag} FILE")
    for key in missing:
        if wanted[key] in splits:
            found[key] = SampleSet.from_data(module, wanted[key])
    root = str(module.hparams["root" if module.name in _PATHS else "name"])
    if needed and config.split in module.source.derived_splits and Path(root).exists() and _chooses_data(argv):
        print(f"aezoo: {root} has no splits of its own: {len(found['x']):,} of its samples are used, the share "
              f"--data.{config.split}_fraction; --input {root} uses all", file=sys.stderr)  # fmt: skip
    return found


def _chooses_data(argv: list[str]) -> bool:
    """Whether the flags name data and leave open which split of them."""
    named = any(setting(argv, "data", key) is not None for key in ("name", "root"))
    return named and _value(argv, "--split") is None


def read(
    path: str, units: DataUnits | None, data: dict[str, Any] | None = None, flag: str = "input", any_size: bool = False
) -> SampleSet:
    """The samples in a file or a folder, scaled and binarised like a model's training data.

    Args:
        path: a file of arrays, an image, or a folder of images.
        units: the units of the data that the model was trained on.
        data: settings of the DataModule; only size, channels, layout, binarise with its seed, on_error, num_workers
            and the limits are used.
        flag: the name of the path in messages.
        any_size: whether pictures of a folder may have several sizes.

    Raises:
        AezooError: there is nothing to read, or it cannot be scaled or binarised in this way.
    """
    given = {key: value for key, value in (data or {}).items() if value is not None}
    samples, rule = _scaled(path, units, given, f"--{flag} {path}", any_size), given.get("binarise", "none")
    # drawn as for one more split
    return samples if rule == "none" else samples.binarised(rule, mix(given.get("seed", 0), len(STAGES)))


def _read_mask(path: str, data: dict[str, Any]) -> SampleSet:
    """A mask in a file, or masks in a folder, as they are."""
    kept = {key: value for key, value in data.items() if key not in ("binarise", "missing", "channels")}
    if Path(path).is_dir() or Path(path).suffix.lower() in images.EXTENSIONS:
        kept["channels"] = 1
    return read(path, None, kept, "mask")


def _scaled(path: str, units: DataUnits | None, given: dict[str, Any], what: str, any_size: bool) -> SampleSet:
    source, known = Path(path), units or DataUnits()
    if not source.exists():
        raise AezooError(f"{what} does not exist: give a file of arrays, an image or a folder of images")
    size, channels, most = given.get("size"), given.get("channels"), given.get("max_pixels", _MAX_PIXELS)
    if source.is_dir():
        kept = {key: given[key] for key in ("size", "channels", "on_error", "max_pixels", "memory") if key in given}
        module = DataModule(name=path, val_fraction=0, test_fraction=0, **kept)
        module.prepare_data()
        if isinstance(module.source, ImageSource):
            module.source.any_size = any_size
        # from the source, since the module refuses data that cannot be trained on
        dataset, *others = (split for stage in STAGES if (split := module.source.split(stage)) is not None)
        if others:
            print(f"aezoo: {what} has a training split, and only that is used: give the folder of another split, or "
                  f"--data {path} --split test", file=sys.stderr)  # fmt: skip
        scaling = _scaling(known, module.source.white, what)
        return SampleSet(dataset, *scaling, module.source.class_names, path, given.get("num_workers"))
    if source.suffix.lower() in images.EXTENSIONS:
        header = images.read_header(source, most)
        for words in images.ignored_content({path: header}):
            print(f"aezoo: {words}", file=sys.stderr)
        image = images.read_image(source, size, channels or (1 if header.mode in images.GREY_MODES else 3), most)
        scaling = _scaling(known, 255 if image.dtype == torch.uint8 else 1, what)
        return SampleSet(ArrayDataset(image[None], None, [path]), *scaling, None, path)
    limit, label_column = given.get("max_bytes", 2**33), given.get("label_column", "auto")
    window = given.get("window_length", 0)
    arrays = read_arrays(source, limit, label_column, not window, TIME_COLUMNS if window else ())
    columns = arrays.columns if isinstance(arrays, TableArrays) and not window else ()
    check_columns(what, columns, known.columns)
    name = next((key for key in SAMPLES if key in arrays), None)
    if name is None:
        raise AezooError(f"{path} contains {', '.join(sorted(arrays)) or 'nothing'}: name the array of samples x")
    title, layout, missing = f"{path}: {name}", given.get("layout", "auto"), given.get("missing", "raise")
    values, labels = as_real_array(arrays[name], title), arrays.get(name.replace("x", "y", 1))
    spans = None
    if window:
        series = {"x_train": values} | ({} if labels is None else {"y_train": labels})
        step, times = given.get("window_step", 1), getattr(arrays, "times", ())
        cuts, by_stage = cut(series, (0.0, 0.0), window, step, limit, f"{title}: ", times)
        values, labels, spans = cuts["x_train"], cuts.get("y_train"), by_stage["train"]
        layout = "sequence"
    shape, is_bytes = tuple(values.shape), values.dtype in (np.uint8, torch.uint8)
    if len(shape) < 2:
        raise AezooError(f"{title} has shape {shape}: give samples (N, *shape), one sample as {name}[None]")
    if 0 in shape:
        raise AezooError(f"{title} is empty (shape {shape}): give at least one sample")
    scaling = _scaling(known, 255 if is_bytes else None)
    if is_streamed(arrays[name]):
        streamed = NpyDataset(arrays[name], layout, size, channels)
        if not is_bytes:
            _check_unscaled(path, shape, check_values(_all_values(streamed), title, missing=missing), units, scaling)
        # a batch is one read, for which no process is needed
        return SampleSet(streamed, *scaling, None, path, num_workers=0, origin=Origin(source, layout))
    x = to_channels_first(to_real_tensor(values, title, columns, missing=missing), layout)
    x = images.resize(x, size, channels) if x.ndim == 4 else x
    numbered, names = encode_labels({} if labels is None else {"test": labels}, f"{path}: ")
    y = numbered.get("test")
    check_length(x, y, title)
    if not is_bytes:
        limits = check_values(x.split(chunk_rows(x.shape[1:])), title, missing=missing)
        _check_unscaled(path, shape, limits, units, scaling)
    found = None
    if x.ndim == 2 and source.suffix.lower() in TABLES:
        state = scaling[1] or ({"offset": torch.zeros(()), "factor": torch.tensor(255.0)} if is_bytes else {})
        found = Columns(columns or known.columns, state, x.shape[1])
    origin = None if window else Origin(source, layout, label_column)
    return SampleSet(ArrayDataset(x, y), *scaling, names, path, columns=found, spans=spans, origin=origin)


def _all_values(dataset: NpyDataset) -> Iterator[Tensor]:
    with progress_bar("check", len(dataset)) as advance:
        for part in dataset.values():
            yield part
            advance(len(part))


def _check_unscaled(
    path: str,
    shape: tuple[int, ...],
    limits: tuple[float, float],
    units: DataUnits | None,
    scaling: tuple[int, dict[str, Tensor]],
) -> None:
    """Refuse bytes that are stored as floats, if the training data had floats from 0 to 1."""
    low, high = limits
    # not for tables, in which an outlying value may be the anomaly to find
    if units is not None and scaling == (255, {}) and len(shape) > 2 and max(-low, high) > _MOST:
        raise AezooError(f"{path}: values from {low:.4g} to {high:.4g}, but the training data had 0 to 1: divide them "
                         "by the value of white, or give bytes (uint8)")  # fmt: skip


def _scaling(units: DataUnits, white: int | None, picture: str = "") -> tuple[int, dict[str, Tensor]]:
    """The divisor of bytes for `SampleSet`, and the scaling, which give samples the scale of the training data.

    Args:
        units: those of the training data.
        white: the value of white in the samples: 255 for bytes, 1 for 16-bit pictures, None for numbers in the units of
            the training data.
        picture: the name of pictures in messages.

    Raises:
        AezooError: they are pictures, and the training data's value of white is unknown.
    """
    scaling, was = dict(units.scaling), units.white
    if not scaling and units.levels != 1:
        return 255, {}
    if picture and was is None:
        raise AezooError(f"{picture} cannot be scaled as the training data were (--data.scale), since their value of "
                         "white is not known: give an array of such values, as .npy")  # fmt: skip
    ratio = white / was if white and was else 1
    if ratio != 1:
        scaling = {key: ratio * value for key, value in (scaling or _UNSCALED).items()}
    return 1, scaling


def _value(argv: list[str], flag: str) -> str | None:
    """The last value of a flag, after an equals sign or a space."""
    found = None
    for word, after in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name == flag:
            found = value if equals else after
    if found == "" or (found or "").startswith("--"):
        raise AezooError(f"{flag} needs a value")
    return found
