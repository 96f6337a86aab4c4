"""The work of `compress`: a pass over the samples, the files, and the table."""

import functools
import hashlib
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.bases.entropy_coded import EntropyCoded
from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.errors import AezooError
from aezoo.tasks.codec import baselines, entropy_model, indices, lossless, lossy, rans, reproducibility, tables
from aezoo.tasks.codec.autoregressive import AutoregressiveCoder
from aezoo.tasks.codec.container import FRAME, Header, Writer, max_samples_per_frame
from aezoo.tasks.codec.levels import Levels, reason, to_levels
from aezoo.tasks.result_store import Row, Store, table_text
from aezoo.tasks.results import Result
from aezoo.tasks.samples import SampleSet, reference_tensor
from aezoo.tasks.samples import progress_bar as bar

# limits of samples, and of their values, for fitting steps, tables and baselines: more would change these little
_MAX_SAMPLES, _MAX_VALUES = 20_000, 2**26
# qualities of PCA next to a model that has its own rate
_QUALITIES = (0.0, 1.0, 2.0, 3.0, 4.0)


@dataclass(repr=False)
class Compression(Result):
    """The result of `compress`.

    Attributes:
        mode: lossless, lossy, indices (of a model's own code, under tables), prior (under the model's prior) or learned
            (integers under the model's distributions).
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
        return f"{text}\n{lines[self.mode]}\nthe model's weights are not counted: who decodes has them"


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
    """

    tables: bytes | None
    symbols: Callable[[Any], Any]
    coder: _Coder
    outputs: Callable[[Any], Any]


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

    def code_lossless(self, precision: int, compare: bool) -> Compression:
        """Write one file."""
        chain = lossless.latent_chain(self.model)
        key = lossless.initial_seed(self.header["fingerprint"], self.seed)
        coder = lossless.BitsBack(chain, reference_tensor(self.model), self.batch_size, precision, key)
        result = Compression("lossless", [])

        def fill(file: IO[bytes]) -> None:
            header = Header(mode="lossless", levels=chain.levels, precision=precision, **self.header)
            writer = Writer(file, header)
            for levels in self._level_chunks(chain.levels):
                coded = coder.encode(levels)
                decoded = coder.decode(coded.words, len(levels))
                if decoded is None or not np.array_equal(decoded, levels):
                    raise AezooError("decoding did not give the samples back: this device does not compute the same "
                                     "twice; compress on --device cpu with --threads 1")  # fmt: skip
                result.net_bits += coded.net_bits
                result.initial_bits += coded.initial_bits
                result.bound_bits += coder.bound(levels)
                writer.frame(len(levels), hashlib.sha256(levels.tobytes()).digest(), tables.to_bytes(coded.words))
            writer.close()

        size = self._write("samples", fill)
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
        low, high = codes.min(0), codes.max(0)
        for q in qualities:
            quantiser = lossy.ScalarQuantiser.fit(fit_codes, self._decode, q, steps)
            codec = lossy.Codec.fit(fit_codes, quantiser, low, high, len(codes))
            distortion = baselines.Distortion(self.model.input_shape, limits)
            file = "samples" if len(qualities) == 1 else f"samples-q{q:g}"
            header = Header(mode="lossy", quality=q, **self.header)
            coding = _Coding(codec.to_bytes(), quantiser.symbols, codec, functools.partial(self._restore, quantiser))
            size = self._write(file, functools.partial(self._write_frames, header, coding, codes, distortion))
            rows.append(baselines.table_row(f"aezoo {header.model}", size, shape, q, **distortion.figures()))
        if compare:
            rows += self._baseline_rows(codes.shape[1], fit, qualities, limits, "the same coder")
        self._save_table(rows)
        return Compression("lossy", rows, contents=self.contents, files=self.store.files)

    def code_indices(self, qualities: tuple[float, ...], compare: bool, fit_on: SampleSet | None) -> Compression:
        """Write one file of the model's own indices; several qualities apply to the quantisation of PCA."""
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
        distortion = baselines.Distortion(model.input_shape, limits)
        prior = indices.lossy_mode(model) == "prior"
        with bar(self.title if prior else "", len(stored_indices)) as advance:
            if prior:
                coder = AutoregressiveCoder(model, self.batch_size, advance)
                result = Compression(
                    "prior", [], bound_bits=sum(coder.bound(np.asarray(stored_indices[part])) for part in parts)
                )
                coding = _Coding(None, np.asarray, coder, outputs)
            else:
                result = Compression("indices", [], bound_bits=table_coder.entropy_bits, table_bits=8 * len(stored))
                coding = _Coding(stored, np.asarray, table_coder, outputs)
            header = Header(mode=result.mode, **self.header)
            size = self._write(
                "samples", functools.partial(self._write_frames, header, coding, stored_indices, distortion)
            )
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
                distortion = baselines.Distortion(model.input_shape, limits)
                outputs = functools.partial(entropy_model.decode, model, block=self.batch_size)
                coding = _Coding(None, np.asarray, coder, outputs)
                header = Header(mode="learned", quality=q, **self.header)
                fill = functools.partial(self._write_frames, header, coding, stored_symbols, distortion)
                size = self._write("samples" if len(own) == 1 else f"samples-q{q:g}", fill)
                for i in range(0, len(stored_symbols), self._samples_per_frame()):
                    result.bound_bits += coder.bound(np.asarray(stored_symbols[i : i + self._samples_per_frame()]))
            result.net_bits += 8 * (size - self.overhead)
            name, shape = f"aezoo {header.model}", (len(stored_symbols), math.prod(model.input_shape))
            shown = q if model.max_quality else math.nan
            result.rows.append(baselines.table_row(name, size, shape, shown, **distortion.figures()))
        return self._with_baselines(result, math.prod(model.code_shape), qualities, limits, compare, fit_on)

    def _with_baselines(
        self, result: Compression, width: int, qualities: tuple[float, ...], limits: tuple[float, float], compare: bool,
        fit_on: SampleSet | None,
    ) -> Compression:  # fmt: skip
        """Add the baselines to the result of a model that has its own rate, and write the tables."""
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
        self, header: Header, coding: _Coding, codes: Any, distortion: baselines.Distortion, file: IO[bytes]
    ) -> None:
        """Write the output of the model, (N, D), and measure the decoded samples."""
        writer, coded = Writer(file, header), 0
        if coding.tables is not None:
            writer.frame(0, hashlib.sha256().digest(), coding.tables)
            coded = len(coding.tables)
        per_frame = self._samples_per_frame()
        # under a prior, the slow work is before the outputs, token by token, and has its own progress bar
        batches = self.samples.batches(self.batch_size, "" if header.mode == "prior" else self.title)
        for start in range(0, len(codes), per_frame):
            symbols = coding.symbols(np.asarray(codes[start : start + per_frame]))
            payload = coding.coder.encode(symbols)
            if not coding.coder.decodes_to(payload, symbols):
                raise AezooError("decoding did not give the codes back: this device does not compute the same twice; "
                                 "compress on --device cpu with --threads 1")  # fmt: skip
            digest = hashlib.sha256()
            for i in range(0, len(symbols), self.batch_size):
                x_hat = coding.outputs(symbols[i : i + self.batch_size])
                digest.update(reproducibility.little_endian_bytes(x_hat))
                distortion.add(next(batches), torch.from_numpy(x_hat))
            writer.frame(len(symbols), digest.digest(), payload)
            coded += len(payload)
        next(batches, None)  # completes the progress bar
        writer.close()
        self.overhead = writer.size - coded

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
        """Codes (N, width) of samples in an unnamed file, and the least and the largest value of the samples."""
        n, start = len(samples), 0
        codes = self.store.scratch((n, width), dtype)
        low, high = math.inf, -math.inf
        for batch in samples.batches(self.batch_size, self.title and "encode"):
            if not bool(batch.isfinite().all()):
                raise AezooError("the data hold NaN or infinite values: clean them first")
            codes[start : start + len(batch)] = encode(batch)
            start += len(batch)
            low, high = min(low, float(batch.min())), max(high, float(batch.max()))
        return codes, (low, high)

    def _decode(self, codes: lossy.Floats) -> Any:
        return reproducibility.decode_codes(self.model, codes, self.batch_size)

    def _restore(self, quantiser: lossy.ScalarQuantiser, symbols: lossy.Symbols) -> Any:
        return self._decode(quantiser.codes(symbols))

    def _samples_per_frame(self) -> int:
        """Number of samples in a frame, a multiple of the batch size."""
        return max_samples_per_frame(self.model.input_shape) // self.batch_size * self.batch_size

    def _level_chunks(self, levels: int) -> Iterator[Levels]:
        """Samples as integers, a piece at a time."""
        chunks: list[Levels] = []
        for batch in self.samples.batches(self.batch_size, self.title):
            part = to_levels(batch, levels)
            if part is None:
                raise AezooError(reason(levels))
            chunks.append(part)
            if sum(map(len, chunks)) == self._samples_per_frame():
                yield np.concatenate(chunks)
                chunks = []
        if chunks:
            yield np.concatenate(chunks)

    def _subsample(self, samples: SampleSet) -> Tensor:
        """Samples in memory, as the other formats need them: only a part if they are many or large."""
        subset = samples.subsample(self._max_samples(math.prod(self.model.input_shape)), self.seed)
        return torch.cat(list(subset.batches(self.batch_size)))

    @staticmethod
    def _max_samples(dims: int) -> int:
        """Number of samples of this size to hold in memory."""
        return max(1, min(_MAX_SAMPLES, _MAX_VALUES // dims))

    def _write(self, name: str, fill: Callable[[IO[bytes]], object]) -> int:
        """Write a file completely or not at all, and return its size."""
        if self.store.folder is None:
            memory = io.BytesIO()
            fill(memory)
            self.contents.append(memory.getvalue())
            return len(self.contents[-1])
        return self.store.write(f"{name}.aez", fill)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
