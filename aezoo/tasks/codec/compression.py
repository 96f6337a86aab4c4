"""The work of `compress`: a pass over the samples, the files, and the table."""

import functools
import hashlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.bases.entropy_coded import EntropyCoded
from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.errors import AezooError
from aezoo.tasks.codec import baselines, entropy_model, indices, lossless, lossy, rans, reproducibility, tables
from aezoo.tasks.codec.autoregressive import AutoregressiveCoder
from aezoo.tasks.codec.container import FRAME, Header, Writer, frame, max_samples_per_frame
from aezoo.tasks.codec.levels import Levels, reason, to_levels
from aezoo.tasks.passes import Passes, Range, current
from aezoo.tasks.result_store import Row, Store, release, table_text
from aezoo.tasks.results import Result
from aezoo.tasks.samples import SampleSet, reference_tensor
from aezoo.tasks.samples import progress_bar as bar

# limits of samples, and of their values, for fitting steps, tables and baselines: more would change these little
_MAX_SAMPLES, _MAX_VALUES = 20_000, 2**26
# qualities of PCA for a model whose rate is fixed
_QUALITIES = (0.0, 1.0, 2.0, 3.0, 4.0)
# rows of codes in memory at a time
_ROWS = 2**14


@dataclass(repr=False)
class Compression(Result):
    """The result of `compress`.

    Attributes:
        mode: lossless, lossy, indices (of a model's code, with tables), prior (indices, with the model's prior) or
            learned (integers, with the model's distributions).
        rows: methods with their bytes, bits per dimension and, for lossy ones, PSNR, or the mean squared error of data
            that are not scaled to [0, 1], and SSIM.
        net_bits: lossless: size of the samples; its expectation is -ELBO. Otherwise size of the indices or integers,
            without tables.
        initial_bits: lossless: bits needed on the stack beforehand; decoding recovers them.
        bound_bits: lossless: -ELBO of the samples, estimated with one draw of z each. Indices: -log2 of their
            probability under the prior or, with tables, of their shares in their codebooks: their number times the
            entropy. Learned: -log2 of the integers' probability.
        table_bits: indices: size of the tables.
        contents: the files themselves, if no folder was given.
    """

    mode: str
    rows: list[Row]
    net_bits: int = 0
    initial_bits: int = 0
    bound_bits: float = 0.0
    table_bits: int = 0
    contents: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tabulate, self.draw = (lambda: self.rows), (lambda: baselines.rate_figure(self.rows))

    def about(self) -> str:
        own = [line for line in self.rows if line["method"].startswith("aezoo")]
        sizes = ", ".join(f"{line['bytes']:,} bytes" for line in own[-1:] if self.mode == "lossless") or ", ".join(
            f"{line['bytes']:,} bytes at {baselines.error_text(line)}" for line in own
        )
        return f"{own[0]['samples']:,} samples, {self.mode}: {sizes}"

    def summary(self) -> str:
        """The table, and the bound on the rate if there is one."""
        columns = [name for name in self.rows[0] if not all(_is_nan(line[name]) for line in self.rows)]
        text = table_text([{name: line[name] for name in columns} for line in self.rows])
        text = "\n".join([text, *baselines.verdict(self.rows)])
        if self.mode == "lossy":
            return text
        excess = 100 * (self.net_bits / self.bound_bits - 1) if 0 < self.bound_bits < math.inf else 0.0
        rate = "the rate is the model's own, which quality and steps do not change"
        if not _is_nan(self.rows[0]["quality"]):
            rate = "the quality is one that the model was trained for, or between two of these"
        lines = {
            "lossless": f"net {self.net_bits:,} bits, {excess:+.2f} % of -ELBO ({self.bound_bits:,.0f}); "
            f"initial bits {self.initial_bits:,}; every sample was decoded again and is the same",
            "indices": f"indices {self.net_bits:,} bits, tables {self.table_bits:,}, entropy {self.bound_bits:,.0f}; "
            f"{rate}",
            "prior": f"indices {self.net_bits:,} bits, {excess:+.2f} % of -log2 p under the prior "
            f"({self.bound_bits:,.0f}); {rate}",
            "learned": f"whole numbers {self.net_bits:,} bits, {excess:+.2f} % of -log2 p under their distributions "
            f"({self.bound_bits:,.0f}); {rate}",
        }
        return f"{text}\n{lines[self.mode]}\nthe model's weights are not counted: the decoder has them"


# a frame, and figures that are added up over frames
_Piece = tuple[bytes, Sequence[float]]


class _Coder(Protocol):
    """Encodes integers (n, D) as bytes, and checks whether bytes decode to them."""

    def encode(self, symbols: Any, /) -> bytes: ...

    def decodes_to(self, content: bytes, symbols: Any, /) -> bool: ...


class _Coding(NamedTuple):
    """How the output of a model is written.

    Attributes:
        tables: the first frame, if there is one.
        symbols: converts the output of a model, (n, D), to integers.
        coder: the coder of these integers.
        outputs: converts integers to outputs, (n, *input_shape).
        bound: -log2 p of integers, (n, D), if the model gives one.
    """

    tables: bytes | None
    symbols: Callable[[Any], Any]
    coder: _Coder
    outputs: Callable[[Any], Any]
    bound: Callable[[Any], float] = lambda symbols: 0.0


@dataclass
class CompressionRun:
    """One call of `compress`."""

    model: Autoencoder
    samples: SampleSet
    header: dict[str, Any]
    store: Store
    batch_size: int
    seed: int
    title: str
    contents: list[bytes] = field(default_factory=list)
    overhead: int = 0
    passes: Passes = field(default_factory=lambda: current.get())
    advance: Callable[[float], object] = lambda n: None

    def code_lossless(self, precision: int, compare: bool) -> Compression:
        """Write one file."""
        chain = lossless.latent_chain(self.model)
        key = lossless.initial_seed(self.header["fingerprint"], self.seed)
        coder = lossless.BitsBack(chain, reference_tensor(self.model), self.batch_size, precision, key)
        header = Header(mode="lossless", levels=chain.levels, precision=precision, **self.header)

        def make(part: slice) -> _Piece:
            levels = self._levels(part, chain.levels)
            coded = coder.encode(levels)
            decoded = coder.decode(coded.words, len(levels))
            if decoded is None or not np.array_equal(decoded, levels):
                raise AezooError("decoding did not reproduce the samples: this device does not give the same "
                                 "result twice; compress on --device cpu with --threads 1")  # fmt: skip
            digest = hashlib.sha256(levels.tobytes()).digest()
            written = frame(len(levels), digest, tables.to_bytes(coded.words))
            return written, (coded.net_bits, coded.initial_bits, coder.bound(levels))

        with bar(self._own_title, len(self.samples)) as self.advance:
            size, sums = self._write("samples", header, None, self._frames(make), 3)
        self.passes.finish()
        result = Compression("lossless", [], int(sums[0]), int(sums[1]), float(sums[2]))
        shape = len(self.samples), math.prod(self.model.input_shape)
        result.rows = [baselines.table_row("-ELBO, the bound", result.bound_bits / 8, shape),
                      baselines.table_row("aezoo, net", result.net_bits / 8, shape),
                      baselines.table_row("aezoo, the file with initial bits", size, shape)]  # fmt: skip
        if compare:
            sample_levels = to_levels(self._subsample(self.samples), chain.levels)
            assert sample_levels is not None  # all samples have been coded as levels
            result.rows += baselines.lossless_codecs(sample_levels, chain.levels == 2)
        self.store.table("comparison", result.rows)
        result.contents, result.files = self.contents, self.store.files
        return result

    def code_lossy(
        self, qualities: tuple[float, ...], steps: str, compare: bool, fit_on: SampleSet | None
    ) -> Compression:
        """Write one file for each quality."""
        codes, limits = self._codes()
        fit = self.samples if fit_on is None else fit_on
        max_samples = self._max_samples(max(codes.shape[1], math.prod(self.model.input_shape)))
        fit_codes = (
            np.array(codes)
            if fit is self.samples and len(codes) <= max_samples
            else self._codes(fit.subsample(max_samples))[0]
        )
        shape, rows = (len(self.samples), math.prod(self.model.input_shape)), []
        low, high = _limits_by_column(codes)
        for q in qualities:
            quantiser = lossy.ScalarQuantiser.fit(fit_codes, self._decode, q, steps)
            codec = lossy.Codec.fit(fit_codes, quantiser, low, high, len(codes))
            file = "samples" if len(qualities) == 1 else f"samples-q{q:g}"
            header = Header(mode="lossy", quality=q, **self.header)
            coding = _Coding(codec.to_bytes(), quantiser.symbols, codec, functools.partial(self._restore, quantiser))
            size, _, distortion = self._write_frames(file, header, coding, codes, limits)
            rows.append(baselines.table_row(f"aezoo {header.model}", size, shape, q, **distortion.figures()))
        self.passes.finish()
        if compare:
            rows += self._baseline_rows(codes.shape[1], fit, qualities, limits, "the same coder")
        self._save_table(rows)
        return Compression("lossy", rows, contents=self.contents, files=self.store.files)

    def code_indices(self, qualities: tuple[float, ...], compare: bool, fit_on: SampleSet | None) -> Compression:
        """Write one file of the model's indices; several qualities apply to the quantisation of PCA."""
        model = cast(DiscreteAutoencoder, self.model)
        sizes = indices.index_sizes(model)
        stored_indices, limits = self._read(
            self.samples, len(sizes), np.int64, lambda x: indices.encode(model, x, sizes)
        )
        parts = [
            slice(start, start + self._samples_per_frame())
            for start in range(0, len(stored_indices), self._samples_per_frame())
        ]
        table_coder = indices.TableCoder.fit(
            indices.model_codebooks(model), (np.asarray(stored_indices[part]) for part in parts)
        )
        stored, outputs = table_coder.to_bytes(), functools.partial(indices.decode, model, block=self.batch_size)
        prior = indices.lossy_mode(model) == "prior"
        with bar(self._own_title if prior else "", len(stored_indices)) as advance:
            if prior:
                coder = AutoregressiveCoder(model, self.batch_size, advance)
                result = Compression("prior", [])
                coding = _Coding(None, np.asarray, coder, outputs, coder.bound)
            else:
                result = Compression("indices", [], table_bits=8 * len(stored))
                coding = _Coding(stored, np.asarray, table_coder, outputs)
            header = Header(mode=result.mode, **self.header)
            size, bound, distortion = self._write_frames("samples", header, coding, stored_indices, limits)
        self.passes.finish()
        result.bound_bits = bound if prior else table_coder.entropy_bits
        result.net_bits = 8 * (size - self.overhead) - result.table_bits
        shape = len(stored_indices), math.prod(model.input_shape)
        figures, name = distortion.figures(), f"aezoo {header.model}"
        result.rows = [baselines.table_row(name, size, shape, **figures)]
        if compare and prior:
            static = self.overhead + FRAME + len(stored) + table_coder.bits / 8
            result.rows.append(baselines.table_row(f"{name}, tables instead of its prior", static, shape, **figures))
        return self._with_baselines(result, len(sizes), qualities, limits, compare, fit_on)

    def code_learned(self, qualities: tuple[float, ...], compare: bool, fit_on: SampleSet | None) -> Compression:
        """Write a file of integers under the model's distributions, or one for each quality if the model has several.

        For a model with one rate, several qualities apply to the quantisation of PCA.
        """
        model, result = cast(EntropyCoded, self.model), Compression("learned", [])
        own = qualities if model.max_quality else (model.quality,)
        for q in own:
            with entropy_model.at_quality(model, q):
                width, coder = entropy_model.n_symbols(model), rans.coder_of(model, self.batch_size)
                stored_symbols, limits = self._read(
                    self.samples, width, np.int64, lambda x: entropy_model.encode(model, x)
                )
                outputs = functools.partial(entropy_model.decode, model, block=self.batch_size)
                coding = _Coding(None, np.asarray, coder, outputs, coder.bound)
                header = Header(mode="learned", quality=q, **self.header)
                file = "samples" if len(own) == 1 else f"samples-q{q:g}"
                size, bound, distortion = self._write_frames(file, header, coding, stored_symbols, limits)
            result.bound_bits += bound
            result.net_bits += 8 * (size - self.overhead)
            name, shape = f"aezoo {header.model}", (len(stored_symbols), math.prod(model.input_shape))
            shown = q if model.max_quality else math.nan
            result.rows.append(baselines.table_row(name, size, shape, shown, **distortion.figures()))
        self.passes.finish()
        return self._with_baselines(result, math.prod(model.code_shape), qualities, limits, compare, fit_on)

    def _with_baselines(
        self, result: Compression, width: int, qualities: tuple[float, ...], limits: tuple[float, float], compare: bool,
        fit_on: SampleSet | None,
    ) -> Compression:  # fmt: skip
        """Add the baselines to the result of a model whose rate is fixed, and write the tables."""
        dims = math.prod(self.model.input_shape)
        if compare:
            fit = self.samples if fit_on is None else fit_on
            qualities = qualities if len(qualities) > 1 else _QUALITIES
            result.rows += self._baseline_rows(width, fit, qualities, limits, "histograms")
        result.rows = [line | {"bits_per_sample": line["bits_per_dim"] * dims} for line in result.rows]
        self._save_table(result.rows)
        result.contents, result.files = self.contents, self.store.files
        return result

    def _baseline_rows(
        self, size: int, fit: SampleSet, qualities: tuple[float, ...], limits: tuple[float, float], coder: str
    ) -> list[Row]:
        """The baselines, with `size` numbers per sample for those with a code."""
        subset, fitted = self._subsample(self.samples), self._subsample(fit)
        size = min(size, subset[0].numel())
        rows = baselines.mean_sample(fitted, subset, limits)
        rows += baselines.pca(fitted, subset, size, qualities, limits, self.overhead, self.seed, coder)
        rows += baselines.image_codecs(subset) if limits[0] >= 0 and limits[1] <= 1 else []
        levels = to_levels(subset, 256)
        return rows + (
            baselines.general_compressors(subset.numpy())
            if levels is None
            else baselines.lossless_codecs(levels, False)
        )

    def _save_table(self, rows: list[Row]) -> None:
        self.store.table("rate_distortion", rows)
        if len(rows) > 1:
            self.store.picture("rate_distortion", lambda: baselines.rate_distortion_figure(rows))

    def _write_frames(
        self, name: str, header: Header, coding: _Coding, codes: Any, limits: tuple[float, float]
    ) -> tuple[int, float, baselines.Distortion]:
        """Write the output of the model, (N, D): the file's size, the bound, and the error of decoded samples."""

        def make(part: slice) -> _Piece:
            symbols = coding.symbols(np.asarray(codes[part]))
            payload = coding.coder.encode(symbols)
            if not coding.coder.decodes_to(payload, symbols):
                raise AezooError("decoding did not reproduce the codes: this device does not give the same result "
                                 "twice; compress on --device cpu with --threads 1")  # fmt: skip
            digest, distortion = hashlib.sha256(), baselines.Distortion(self.model.input_shape, limits)
            batches = self.samples.batches(self.batch_size, "", part.start, part.stop)
            for i, batch in zip(range(0, len(symbols), self.batch_size), batches, strict=True):
                x_hat = coding.outputs(symbols[i : i + self.batch_size])
                digest.update(reproducibility.little_endian_bytes(x_hat))
                distortion.add(batch, torch.from_numpy(x_hat))
                self.advance(len(batch))
            release(codes)
            written = frame(len(symbols), digest.digest(), payload)
            return written, (len(payload), coding.bound(symbols), *distortion.sums)

        # with a prior, the slow work is before the outputs, token by token, and has a separate progress bar
        with bar("" if header.mode == "prior" else self._own_title, len(codes)) as self.advance:
            size, sums = self._write(name, header, coding.tables, self._frames(make), 6)
        self.overhead = size - int(sums[0]) - len(coding.tables or b"")
        distortion = baselines.Distortion(self.model.input_shape, limits)
        distortion.add_sums(sums[2:].tolist())
        return size, float(sums[1]), distortion

    def _frames(self, make: Callable[[slice], _Piece]) -> Iterator[_Piece]:
        """The frames of a file, each computed by one process."""
        n, step = len(self.samples), self._samples_per_frame()
        return self.passes.pieces(
            math.ceil(n / step), 1, self.seed, lambda i, _: make(slice(i * step, min(n, (i + 1) * step)))
        )

    def _codes(self, samples: SampleSet | None = None) -> tuple[Any, tuple[float, float]]:
        """`_read` for codes (N, D), float32."""

        def encode(batch: Tensor) -> Any:
            z = self.model.encode(batch.to(reference_tensor(self.model))).float().flatten(1)
            if not bool(z.isfinite().all()):
                raise AezooError("the model gives codes that are NaN or infinite: train it again")
            return z.cpu().numpy()

        samples = self.samples if samples is None else samples
        return self._read(samples, math.prod(self.model.code_shape), np.float32, encode)

    def _read(
        self, samples: SampleSet, width: int, dtype: Any, encode: Callable[[Tensor], Any]
    ) -> tuple[Any, tuple[float, float]]:
        """Codes (N, width) of samples in an unnamed file, and the smallest and the largest value of the samples."""
        codes, limits = self.store.scratch((len(samples), width), dtype), Range()
        title = self.title and "encode"
        for start, batch in self.passes.blocks(samples, self.batch_size, self.seed, title, (limits,)):
            if not bool(batch.isfinite().all()):
                raise AezooError("the data contain NaN or infinite values: clean them first")
            codes[start : start + len(batch)] = encode(batch)
            release(codes)
            limits.add(batch)
        return codes, (limits.low, limits.high)

    def _decode(self, codes: lossy.Floats) -> Any:
        return reproducibility.decode_codes(self.model, codes, self.batch_size)

    def _restore(self, quantiser: lossy.ScalarQuantiser, symbols: lossy.Symbols) -> Any:
        return self._decode(quantiser.codes(symbols))

    def _samples_per_frame(self) -> int:
        """Number of samples in a frame, a multiple of the batch size."""
        return max_samples_per_frame(self.model.input_shape) // self.batch_size * self.batch_size

    def _levels(self, part: slice, levels: int) -> Levels:
        """Samples as integers."""
        found: list[Levels] = []
        for batch in self.samples.batches(self.batch_size, "", part.start, part.stop):
            if (values := to_levels(batch, levels)) is None:
                raise AezooError(reason(levels))
            found.append(values)
            self.advance(len(batch))
        return np.concatenate(found)

    def _subsample(self, samples: SampleSet) -> Tensor:
        """Samples in memory, as the other formats need them: only a part if they are many or large."""
        subset = samples.subsample(self._max_samples(math.prod(self.model.input_shape)), self.seed)
        return torch.cat(list(subset.batches(self.batch_size)))

    @staticmethod
    def _max_samples(dims: int) -> int:
        """Number of samples of this size to have in memory at a time."""
        return max(1, min(_MAX_SAMPLES, _MAX_VALUES // dims))

    def _write(
        self, name: str, header: Header, first: bytes | None, frames: Iterator[_Piece], n_figures: int
    ) -> tuple[int, npt.NDArray[np.float64]]:
        """Write a file completely or not at all: its size, and the sum of the figures of its frames in their order."""
        sums = np.zeros(n_figures)

        def fill(file: IO[bytes]) -> None:
            writer = Writer(file, header)
            if first is not None:
                writer.frame(frame(0, hashlib.sha256().digest(), first))
            for content, figures in frames:
                writer.frame(content)
                sums[:] += figures
            writer.close()

        if self.store.folder is not None:
            return self.store.write(f"{name}.aez", fill), sums
        memory = io.BytesIO()
        fill(memory)
        self.contents.append(memory.getvalue())
        return len(self.contents[-1]), sums

    @property
    def _own_title(self) -> str:
        """The title of the progress bar, which rank zero shows."""
        return "" if self.passes.rank else self.title


def _limits_by_column(codes: Any) -> tuple[Any, Any]:
    """The smallest and the largest value of each column of a file, (N, D) -> (D,), read in parts."""
    parts = []
    for i in range(0, len(codes), _ROWS):
        rows = codes[i : i + _ROWS]
        parts.append((rows.min(0), rows.max(0)))
        release(codes)
    return np.min([low for low, _ in parts], 0), np.max([high for _, high in parts], 0)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
