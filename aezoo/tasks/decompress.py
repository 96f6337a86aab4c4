"""decompress: the samples in an .aez file, with the model that it was written with."""

import copy
import functools
import hashlib
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from aezoo.autoencoder import Autoencoder
from aezoo.bases.entropy_coded import EntropyCoded
from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.data.columns import COLUMNS, Columns
from aezoo.data.source import ArrayDataset
from aezoo.errors import AezooError
from aezoo.tasks.codec import entropy_model, indices, lossless, lossy, rans, reproducibility, tables
from aezoo.tasks.codec.autoregressive import Advance, AutoregressiveCoder
from aezoo.tasks.codec.container import KINDS, Frame, Header, Reader
from aezoo.tasks.codec.pictures import decode_places
from aezoo.tasks.passes import current
from aezoo.tasks.result_store import Row, Samples, SeparateArrays, Store, release
from aezoo.tasks.results import Result, count_of, takes_model
from aezoo.tasks.samples import SampleSet, SeparateSamples, evaluation_mode, reference_tensor
from aezoo.tasks.samples import progress_bar as bar
from aezoo.tasks.show import show
from aezoo.tasks.tiling import Sized

# bytes of columns.json
_MAX_COLUMNS = 2**26


@dataclass(repr=False)
class Decompression(Result):
    """The content of a file.

    Attributes:
        x: (N, *shape): bytes of a lossless file, 255 for 1.0; float32 of any other, in the scale of the model; written
            files are in the units of the data that the model was trained on. For a file of pictures of different sizes,
            a sequence of (C, H, W).
        mode: lossless, lossy, indices, prior or learned.
        same: whether every sample equals to the bit what `compress` decoded when it checked the file.
    """

    x: Samples
    mode: str
    same: bool

    def about(self) -> str:
        return f"{count_of(self.x)}, {self.mode}"

    def summary(self) -> str:
        """The number of samples, and whether they are the same bytes."""
        same = "the same bytes as when it was written" if self.same else "codes are exact, outputs differ by rounding"
        return f"{count_of(self.x)}, {self.mode}: {same}"


@takes_model
def decompress(
    model: Autoencoder,
    file: str,
    *,
    kind: str = "auto",
    strict: bool = True,
    threads: int = 0,
    max_bytes: int = 2**33,
    columns: Columns | None = None,
    out: str | None = None,
    progress: bool = False,
) -> Decompression:
    """Decompress an .aez file with the model that it was written with.

    Writes the kind of files that were compressed: a PNG for each image of a folder, samples.csv for a table, otherwise
    samples.npy, or 000000.npy and so on for samples of different sizes. A file is refused if it is truncated, altered
    or of another model, or if it decodes to other bytes on this machine.

    Args:
        model: the model that compressed it.
        file: the .aez file.
        kind: what to write, npy, png or csv; auto writes the kind that was compressed.
        strict: refuse a file that is not lossless if its outputs are not the same to the last bit. Without it, outputs
            may differ by the rounding of another machine or device, if their codes are the same.
        threads: threads of torch on the CPU; 0 takes the number with which the file was written.
        max_bytes: refuse a file that would decode to more than this, counted as float32.
        columns: the columns of a table, if there is no columns.json next to the file; by default those
            of the table that the model was trained on.
        out: folder for the results; None keeps them in memory.
        progress: show a bar on a terminal.

    Raises:
        AezooError: as above, one line.
    """
    if kind not in ("auto", *KINDS):
        raise AezooError(f"kind is {kind!r}: choose from auto, {', '.join(KINDS)}")
    tables.constriction_stream()
    reader = Reader(file, max_bytes)
    header = reader.header
    _check_model(model, header, file, strict or header.mode == "lossless")
    kind = header.kind if kind == "auto" else kind
    if kind == "png" and not (len(header.shape) == 3 and header.shape[0] in (1, 3)):
        raise AezooError(f"samples of shape {header.shape} are not pictures: use kind npy")
    if kind == "csv":
        columns = _columns(file, header) or columns or Columns.of_model(model) or Columns((), {}, header.dims)
        if len(header.shape) != 1:
            raise AezooError(f"samples of shape {header.shape} are not a table: use kind npy")
    with (
        Store(out, model.data_units) as store,
        reproducibility.deterministic_kernels(threads or header.threads),
        evaluation_mode(model),
    ):
        dtype = np.uint8 if header.mode == "lossless" else np.float32
        shape = (header.n, *header.shape)
        x: Samples
        with _one_line_errors(reader):
            if header.own_sizes:
                x = store.separate([frame.shape for frame in reader.samples], dtype)
            else:
                x = store.samples("samples", shape, dtype) if kind == "npy" else store.scratch(shape, dtype)
        frames, sized = reader.samples, Sized(model, header.tile) if header.own_sizes else None
        starts, exactness, passes = np.cumsum([0, *(frame.n for frame in frames)]).tolist(), _All(), current.get()
        title = "decompress" if progress and not passes.rank else ""
        with bar(title, header.n) as advance:
            for i, _ in passes.blocks(len(frames), 1, 0, totals=(exactness,)):
                start = starts[i]
                for part, exact in _parts(model, sized, reader, frames[i], strict, advance):
                    x[start : start + len(part)] = part
                    release(x)
                    start += len(part)
                    exactness.add(exact)
                    if header.mode != "prior":  # whose work is done token by token
                        advance(len(part))
        passes.finish()
        same = exactness.value
        if kind == "png" or header.own_sizes:
            store.each_sample("", x, kind)
        if kind == "csv" and columns is not None and not isinstance(x, SeparateArrays):
            store.table("samples", _rows(x, columns))
    dataset: Dataset[Any]
    if isinstance(x, SeparateArrays):
        tabulate, dataset = None, SeparateSamples([torch.from_numpy(picture) for picture in x])
    else:
        tabulate = functools.partial(_rows, x, columns if kind == "csv" else None)
        dataset = ArrayDataset(torch.from_numpy(x))
    draw = functools.partial(show, SampleSet(dataset, name=Path(file).name, columns=columns))
    return Decompression(x, header.mode, same, files=store.files, tabulate=tabulate, draw=draw)


def _rows(x: npt.NDArray[Any], columns: Columns | None) -> Iterator[Row]:
    flat = x.reshape(len(x), -1)
    # bytes are those of a lossless file, 255 for 1
    return (columns or Columns((), {}, flat.shape[1])).rows(flat / np.float32(255) if x.dtype == np.uint8 else flat)


def _columns(file: str, header: Header) -> Columns | None:
    """The columns that compress wrote next to the file; None without them."""
    path = Path(file).with_name(COLUMNS)
    if not path.is_file():
        return None
    try:
        with path.open("rb") as opened:
            return Columns.from_bytes(opened.read(_MAX_COLUMNS), header.dims, str(path))
    except OSError as error:
        raise AezooError(f"cannot read {path}: {error.strerror or error}; check its permissions") from error


def _check_model(model: Autoencoder, header: Header, file: str, exact: bool) -> None:
    fingerprint = reproducibility.fingerprint(model)
    if header.fingerprint != fingerprint:
        raise AezooError(
            f"{file} was written with another model ({header.model} {header.fingerprint[:8]}, this is "
            f"{reproducibility.model_name(model)} {fingerprint[:8]}): give --ckpt_path "
            f"{Path(file).parent / reproducibility.model_folder(header.fingerprint)}, where compress saved that one"
        )
    if header.shape != model.input_shape or header.code_shape != tuple(model.code_shape):
        raise AezooError(f"{file} is refused: its samples have shape {header.shape}, the model's {model.input_shape}")
    if header.mode not in ("lossless", "lossy", *_readable_modes(model)):
        raise AezooError(
            f"{file} is refused: it contains {header.mode}, which {reproducibility.model_name(model)} does not use"
        )
    current = reproducibility.describe_device(model)
    if exact and (header.device, header.dtype) != (current["device"], current["dtype"]):
        raise AezooError(
            f"{file} was written on {header.device} in {header.dtype}, and the model is on {current['device']} in "
            f"{current['dtype']}, which rounds differently: give --device {header.device}"
            + (", or --strict false" if header.mode != "lossless" else "")
        )


def _readable_modes(model: Autoencoder) -> tuple[str, ...]:
    """The modes for the code of a model; files from before it had a prior use tables."""
    mode = indices.lossy_mode(model)
    return ("indices", "prior") if mode == "prior" else (mode,)


def _parts(
    model: Autoencoder, sized: Sized | None, reader: Reader, frame: Frame, strict: bool, advance: Advance
) -> Iterator[tuple[npt.NDArray[Any], bool]]:
    """The samples of a frame in parts, and whether they equal those decoded when the file was written."""
    own, one = model, copy.copy(reader)
    one.frames = [*reader.frames[: int(reader.header.tables)], frame]
    if sized is not None:
        own = sized(frame.shape)
        one.header = replace(reader.header, shape=frame.shape, code_shape=tuple(own.code_shape), n=1)
    return _decode_parts(own, one, strict, advance)


class _All:
    """Whether all that was added is true."""

    def __init__(self) -> None:
        self.value = True

    def add(self, value: bool) -> None:
        """Add one more."""
        self.value = self.value and value

    @property
    def state(self) -> npt.NDArray[Any]:
        return np.array([self.value])

    def merge(self, states: Sequence[npt.NDArray[Any]]) -> None:
        self.value = all(bool(state[0]) for state in states)


def _decode_parts(
    model: Autoencoder, reader: Reader, strict: bool, advance: Advance
) -> Iterator[tuple[npt.NDArray[Any], bool]]:
    """The samples in parts, and whether they equal those decoded when the file was written."""
    match reader.header.mode:
        case "lossless":
            return _lossless(model, reader)
        case "lossy":
            return _lossy(model, reader, strict)
        case "learned":
            return _learned(cast(EntropyCoded, model), reader, strict)
    return _indices(cast(DiscreteAutoencoder, model), reader, strict, advance)


def _lossless(model: Autoencoder, reader: Reader) -> Iterator[tuple[npt.NDArray[Any], bool]]:
    header = reader.header
    chain = lossless.latent_chain(model)
    if chain.levels != header.levels:
        raise AezooError(f"{reader.path} is refused: {header.levels} levels, and the model has {chain.levels}")
    key = lossless.initial_seed(header.fingerprint, header.seed)
    coder = lossless.BitsBack(chain, reference_tensor(model), header.block, header.precision, key)
    for frame in reader.frames:
        words = tables.from_bytes(reader.payload(frame))
        with _one_line_errors(reader):
            levels = coder.decode(words, frame.n)
        if levels is None or hashlib.sha256(levels.tobytes()).digest() != frame.digest:
            raise AezooError(_mismatch(reader, "samples"))
        yield levels * np.uint8(255 // (header.levels - 1)), True


def _lossy(model: Autoencoder, reader: Reader, strict: bool) -> Iterator[tuple[npt.NDArray[Any], bool]]:
    (first, *frames), shape, block = reader.frames, reader.header.code_shape, reader.header.block
    # a channel at each position, if sizes of pictures differ
    places = math.prod(shape[1:]) if reader.header.own_sizes else 1
    with _one_line_errors(reader):
        codec = lossy.Codec.from_bytes(reader.payload(first), math.prod(shape) // places)

    def decode(symbols: lossy.Symbols) -> Any:
        codes = codec.quantiser.codes(symbols)
        if reader.header.own_sizes:
            return decode_places(model, codes)
        return reproducibility.decode_codes(model, codes, block)

    for frame in frames:
        with _one_line_errors(reader):
            symbols = codec.decode(reader.payload(frame), frame.n * places)
        yield from _outputs(reader, frame, symbols, decode, strict, block * places)


def _indices(
    model: DiscreteAutoencoder, reader: Reader, strict: bool, advance: Advance
) -> Iterator[tuple[npt.NDArray[Any], bool]]:
    block, frames = reader.header.block, reader.frames
    coder: indices.TableCoder | AutoregressiveCoder
    if reader.header.mode == "prior":
        coder = AutoregressiveCoder(model, block, advance)
    else:
        first, *frames = frames
        with _one_line_errors(reader):
            coder = indices.TableCoder.from_bytes(reader.payload(first), indices.model_codebooks(model))
    decode = functools.partial(indices.decode, model, block=block)
    return _decode_frames(reader, frames, coder, "indices", decode, strict)


def _learned(model: EntropyCoded, reader: Reader, strict: bool) -> Iterator[tuple[npt.NDArray[Any], bool]]:
    block = reader.header.block
    with entropy_model.at_quality(model, reader.header.quality):
        coder, decode = (
            rans.coder_of(model, block),
            functools.partial(entropy_model.decode, model, block=block),
        )
        yield from _decode_frames(reader, reader.frames, coder, "whole numbers", decode, strict)


class _Decoder(Protocol):
    """Bytes as (n, D) integers; None if they are not what was encoded."""

    def decode(self, content: bytes, n: int, /) -> Any: ...


def _decode_frames(
    reader: Reader, frames: list[Frame], coder: _Decoder, what: str, decode: Callable[[Any], Any], strict: bool
) -> Iterator[tuple[npt.NDArray[Any], bool]]:
    """The outputs of frames of integers, the code of a model."""
    for frame in frames:
        with _one_line_errors(reader):
            symbols = coder.decode(reader.payload(frame), frame.n)
        if symbols is None:
            raise AezooError(_mismatch(reader, what))
        yield from _outputs(reader, frame, symbols, decode, strict, reader.header.block)


def _outputs(
    reader: Reader, frame: Frame, symbols: Any, decode: Callable[[Any], Any], strict: bool, block: int
) -> Iterator[tuple[npt.NDArray[Any], bool]]:
    """The outputs of symbols (n, D), a block of rows at a time, checked against the frame's digest."""
    digest, parts = hashlib.sha256(), []
    for start in range(0, len(symbols), block):
        parts.append(decode(symbols[start : start + block]))
        digest.update(reproducibility.little_endian_bytes(parts[-1]))
    same = digest.digest() == frame.digest
    if strict and not same:
        raise AezooError(
            f"{_mismatch(reader, 'outputs')}, or accept outputs that differ by rounding with --strict false"
        )
    for part in parts:
        yield part, same


@contextmanager
def _one_line_errors(reader: Reader) -> Iterator[None]:
    """Turn any error into one line: a file with a correct checksum that causes an error was forged."""
    try:
        yield
    except AezooError:
        raise
    except MemoryError as error:
        raise AezooError(
            f"{reader.path} needs more memory than is available: free some, or give --out FOLDER"
        ) from error
    except (ValueError, AssertionError, OverflowError, zlib.error) as error:
        raise AezooError(f"{reader.path} is refused: {' '.join(str(error).split())[:100]}") from error


def _mismatch(reader: Reader, what: str) -> str:
    return (
        f"{reader.path} is refused: its {what} are different here, because this machine rounds differently "
        f"({torch.__version__}); decode it where it was written ({reader.header.writer})"
    )
