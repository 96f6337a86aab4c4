"""`compress` for pictures that are not of the model's size: each is a frame of the file, with its size.

Each picture is coded separately by the model for its size; tables are fitted to all pictures. A code without indices is
a map; each channel has a step and a histogram for all positions of all pictures; see `lossy.py`. A channel's
sensitivity is that of a sample to an independent error at each position, the root of their mean square:

    s_c^2 = E ||g(z + h e) - g(z)||^2 / (h^2 T)    e = +-1 at each of T positions of channel c, 0 in other channels
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.bases.entropy_coded import EntropyCoded
from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.errors import AezooError
from aezoo.metrics.similarity import psnr
from aezoo.tasks.codec import baselines, entropy_model, indices, lossless, lossy, rans, reproducibility, tables
from aezoo.tasks.codec.autoregressive import AutoregressiveCoder
from aezoo.tasks.codec.compression import Compression, CompressionRun
from aezoo.tasks.codec.container import MAX_PICTURE, Header, frame
from aezoo.tasks.codec.levels import reason, to_levels
from aezoo.tasks.passes import Range, Total
from aezoo.tasks.result_store import Row, release
from aezoo.tasks.samples import reference_tensor
from aezoo.tasks.tiling import Sized
from aezoo.training import sizes
from aezoo.training.model_names import display_name

# values of codes that steps and tables are fitted to; positions per side, and pictures, for a channel's sensitivity
_MAX_CODES, _SIDE, _PICTURES = 2**24, 32, 8
_REPEAT = (
    "decoding did not reproduce the {}: this device does not give the same result twice; compress on --device cpu with "
    "--threads 1"
)


class _Coded(NamedTuple):
    """A picture: its bytes in the file, what they decode to, and figures that are added up over pictures."""

    payload: bytes
    x_hat: npt.NDArray[Any]
    figures: tuple[float, ...] = (0.0, 0.0, 0.0)


@dataclass
class PictureRun(CompressionRun):
    """One call of `compress` for pictures of any size."""

    sized: Sized | None = None

    def code(self, mode: str, qualities: tuple[float, ...], steps: str, precision: int, compare: bool) -> Compression:
        """Write one file, or one for each quality."""
        result = Compression(mode, [])
        if mode == "lossless":
            self._lossless(result, precision)
        elif mode == "learned":
            self._learned(result, qualities)
        elif mode == "lossy":
            self._lossy(result, qualities, steps)
        else:
            self._indices(result)
        self.passes.finish()
        if compare:
            result.rows += self._other_formats(mode == "lossless")
        channels = self.samples.shape[0]
        result.rows = [line | {"bits_per_pixel": line["bits_per_dim"] * channels} for line in result.rows]
        if mode == "lossless":
            self.store.table("comparison", result.rows)
        else:
            self._save_table(result.rows)
        result.contents, result.files = self.contents, self.store.files
        return result

    def _lossless(self, result: Compression, precision: int) -> None:
        levels = lossless.latent_chain(self.model).levels
        key = lossless.initial_seed(self.header["fingerprint"], self.seed)

        def code(model: Autoencoder, x: Tensor, i: int) -> _Coded:
            coder = lossless.BitsBack(lossless.latent_chain(model), reference_tensor(model), 1, precision, key)
            if (values := to_levels(x, levels)) is None:
                raise AezooError(reason(levels))
            coded = coder.encode(values)
            decoded = coder.decode(coded.words, 1)
            if decoded is None or not np.array_equal(decoded, values):
                raise AezooError(_REPEAT.format("samples"))
            figures = float(coder.bound(values)), float(coded.net_bits), float(coded.initial_bits)
            return _Coded(tables.to_bytes(coded.words), values, figures)

        header = self._header("lossless", levels=levels, precision=precision)
        size, _ = self._write_pictures("samples", header, None, code, None, result)
        parts = {"-ELBO, the bound": result.bound_bits / 8, "aezoo, net": result.net_bits / 8}
        parts["aezoo, the file with initial bits"] = size
        result.rows = [self._row(method, part) for method, part in parts.items()]

    def _learned(self, result: Compression, qualities: tuple[float, ...]) -> None:
        whole = cast(EntropyCoded, self.model)
        own = qualities if whole.max_quality else (whole.quality,)
        limits = self._limits()
        for q in own:

            def code(model: Autoencoder, x: Tensor, i: int, q: float = q) -> _Coded:
                sized = cast(EntropyCoded, model)
                with entropy_model.at_quality(sized, q):
                    coder, symbols = rans.coder_of(sized, 1), entropy_model.encode(sized, x)
                    payload = coder.encode(symbols)
                    if not coder.decodes_to(payload, symbols):
                        raise AezooError(_REPEAT.format("codes"))
                    figures = coder.bound(symbols), 8.0 * len(payload), 0.0
                    return _Coded(payload, entropy_model.decode(sized, symbols, 1), figures)

            file = "samples" if len(own) == 1 else f"samples-q{q:g}"
            size, figures = self._write_pictures(file, self._header("learned", quality=q), None, code, limits, result)
            shown = q if whole.max_quality else math.nan
            result.rows.append(self._row(self._name, size, shown, **figures))

    def _indices(self, result: Compression) -> None:
        models = [cast(DiscreteAutoencoder, self._model(shape)) for shape in self._distinct]
        shapes = {model.input_shape: (math.prod(model.index_shape),) for model in models}
        found = self.store.separate([shapes[shape] for shape in self._shapes], np.int64)
        limits = Range()
        for i, model, x in self._pictures("encode", limits):
            sized = cast(DiscreteAutoencoder, model)
            found[i][...] = indices.encode(sized, x, indices.index_sizes(sized))[0]
            release(found)
        books = {model.input_shape: indices.model_codebooks(model) for model in models}
        parts = ((books[shape], found[i][None]) for i, shape in enumerate(self._shapes))
        fitted = indices.TableCoder.fit_sizes(books[self._shapes[0]], parts)
        stored = fitted.to_bytes()
        prior = result.mode == "prior"

        def code(model: Autoencoder, x: Tensor, i: int) -> _Coded:
            sized, symbols, bound = cast(DiscreteAutoencoder, model), found[i][None], 0.0
            coder: Any = replace(fitted, codebooks=books[tuple(x.shape[1:])])
            if prior:
                coder = AutoregressiveCoder(sized, 1)
                bound = coder.bound(symbols)
            payload = coder.encode(symbols)
            if not coder.decodes_to(payload, symbols):
                raise AezooError(_REPEAT.format("codes"))
            return _Coded(payload, indices.decode(sized, symbols, 1), (bound, 8.0 * len(payload), 0.0))

        first, header, ends = None if prior else stored, self._header(result.mode), (limits.low, limits.high)
        size, figures = self._write_pictures("samples", header, first, code, ends, result)
        if not prior:
            result.bound_bits, result.table_bits = fitted.entropy_bits, 8 * len(stored)
        result.rows = [self._row(self._name, size, **figures)]

    def _lossy(self, result: Compression, qualities: tuple[float, ...], steps: str) -> None:
        channels, every = self.model.code_shape[0], 1
        places = [math.prod(self._model(shape).code_shape[1:]) for shape in self._shapes]
        total = sum(places)
        while channels * sum(-(-count // every) for count in places) > _MAX_CODES and every < max(places):
            every *= 2  # every second position is enough
        starts = np.cumsum([0, *(-(-count // every) for count in places)]).tolist()
        codes = self.store.scratch((starts[-1], channels))
        limits, by_channel, crops = Range(), _ChannelRange(channels), list[Tensor]()
        for i, model, x in self._pictures("encode", limits, by_channel):
            rows = _rows(_codes(model, x))
            by_channel.add(rows)
            codes[starts[i] : starts[i + 1]] = rows[::every]
            release(codes)
        for x in self.samples.subset(torch.arange(min(_PICTURES, len(self.samples)))).batches(1):
            z = _codes(self._model(tuple(x.shape[1:])), x)
            corner: list[Any] = [slice(0, _SIDE) for _ in z.shape[2:]]
            crops.append(z[(..., *corner)].cpu())
        fit, ends = np.array(codes), (limits.low, limits.high)
        for q in qualities:
            slopes = functools.partial(self._slopes, crops)
            quantiser = lossy.ScalarQuantiser.fit(fit, lambda places: places, q, steps, slopes)
            codec = lossy.Codec.fit(fit, quantiser, by_channel.low, by_channel.high, total)

            def code(model: Autoencoder, x: Tensor, i: int, codec: lossy.Codec = codec) -> _Coded:
                symbols = codec.quantiser.symbols(_rows(_codes(model, x)))
                payload = codec.encode(symbols)
                if not codec.decodes_to(payload, symbols):
                    raise AezooError(_REPEAT.format("codes"))
                return _Coded(payload, decode_places(model, codec.quantiser.codes(symbols)))

            file, header = "samples" if len(qualities) == 1 else f"samples-q{q:g}", self._header("lossy", quality=q)
            size, figures = self._write_pictures(file, header, codec.to_bytes(), code, ends, result)
            result.rows.append(self._row(self._name, size, q, **figures))

    def _slopes(
        self, crops: list[Tensor], _codes: lossy.Floats, _decode: lossy.Decode, deviation: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """s_c of each channel, over the corners of a few pictures."""
        signs, squares = torch.Generator().manual_seed(0), np.zeros(len(deviation))
        for z in crops:
            model, places = self._of_code(z), math.prod(z.shape[2:])
            z = z.to(reference_tensor(model))
            base = model.decode(z).double()
            for c in np.flatnonzero(deviation > 0):
                h, changed = 0.25 * float(deviation[c]), z.clone()
                e = torch.randint(0, 2, z.shape[2:], generator=signs).to(z) * 2 - 1
                changed[:, c] += h * e
                squares[c] += float((model.decode(changed).double() - base).square().sum()) / (h * h * places)
        found: npt.NDArray[np.float64] = np.sqrt(squares / len(crops))
        return found

    def _of_code(self, z: Tensor) -> Autoencoder:
        found = sizes.for_codes(self.model, tuple(z.shape[1:]))
        if found is None:
            raise AezooError(f"the code of {display_name(type(self.model))} is not a map of positions, so samples of "
                             "another size cannot be compressed: resize them (--data.size)")  # fmt: skip
        return found

    # ---- what all modes share ----------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return f"aezoo {self.header['model']}"

    @functools.cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        return list(self.samples.shapes or [self.samples.shape] * len(self.samples))

    @property
    def _distinct(self) -> list[tuple[int, ...]]:
        return list(dict.fromkeys(self._shapes))

    def _model(self, shape: tuple[int, ...]) -> Autoencoder:
        assert self.sized is not None  # set by compress
        return self.sized(shape)

    def _pictures(self, title: str, limits: Range, *totals: Total) -> Iterator[tuple[int, Autoencoder, Tensor]]:
        """The pictures of this process: number, the model of its size, (1, C, H, W); they must be finite."""
        for i, x in self.passes.blocks(self.samples, 1, self.seed, self.title and title, (limits, *totals)):
            _check_size(x)
            if not bool(x.isfinite().all()):
                raise AezooError("the data contain NaN or infinite values: clean them first")
            limits.add(x)
            yield i, self._model(tuple(x.shape[1:])), x

    def _limits(self) -> tuple[float, float]:
        """The smallest and the largest value of the samples, which must be finite."""
        limits = Range()
        for _ in self._pictures("", limits):
            pass
        return limits.low, limits.high

    def _header(self, mode: str, **values: Any) -> Header:
        assert self.sized is not None
        return Header(mode=mode, own_sizes=1, tile=self.sized.tile, **self.header, **values)

    def _write_pictures(
        self,
        name: str,
        header: Header,
        first: bytes | None,
        code: Callable[[Autoencoder, Tensor, int], _Coded],
        limits: tuple[float, float] | None,
        result: Compression,
    ) -> tuple[int, dict[str, float]]:
        """Write a file, and add its bits to the result: its size, and with limits the error of decoded pictures."""

        def make(i: int, x: Tensor) -> tuple[bytes, Sequence[float]]:
            _check_size(x)
            payload, x_hat, figures = code(self._model(tuple(x.shape[1:])), x, i)
            digest = hashlib.sha256(reproducibility.little_endian_bytes(x_hat)).digest()
            distortion = baselines.Distortion(self.samples.shape, limits or (0.0, 1.0))
            if limits is not None:
                distortion.add(x, torch.from_numpy(x_hat))
            return frame(1, digest, payload, tuple(x.shape[2:])), (*figures, *distortion.sums)

        pictures = self.passes.pieces(self.samples, 1, self.seed, make, self.title)
        size, found = self._write(name, header, first, pictures, 7)
        result.bound_bits += float(found[0])
        result.net_bits += int(found[1])
        result.initial_bits += int(found[2])
        if limits is None:
            return size, {}
        total = baselines.Distortion(self.samples.shape, limits)
        total.add_sums(found[3:].tolist())
        return size, total.figures()

    def _row(self, method: str, size: float, quality: float = math.nan, **figures: float) -> Row:
        n = len(self._shapes)
        return baselines.table_row(method, size, (n, sum(map(math.prod, self._shapes)) / n), quality, **figures)

    def _other_formats(self, is_lossless: bool) -> list[Row]:
        """Image formats, a file for each picture; PCA and the mean sample need samples of one size."""
        most = self._max_samples(max(map(math.prod, self._shapes)))
        subset = self.samples.subset(torch.arange(min(len(self._shapes), most)))
        sums: dict[tuple[str, str], list[float]] = {}
        n = 0
        for x in subset.batches(1):
            levels = to_levels(x, 256)
            rows = [] if levels is None else baselines.lossless_codecs(levels, False)
            rows += [] if is_lossless or x.min() < 0 or x.max() > 1 else baselines.image_codecs(x)
            for line in rows:
                mse = math.nan if math.isnan(line["psnr"]) else 10 ** (-line["psnr"] / 10)
                values = sums.setdefault((line["method"], str(line["quality"])), [0.0, 0.0, 0.0, 0.0])
                for i, value in enumerate((line["bytes"], x.numel(), mse * x.numel(), line["ssim"])):
                    values[i] += value
            n += 1
        return [
            baselines.table_row(method, size, (n, total / n), float(quality), psnr=psnr(error / total), ssim=ssim / n)
            for (method, quality), (size, total, error, ssim) in sums.items()
        ]


class _ChannelRange:
    """The smallest and the largest value of each channel, (C,)."""

    def __init__(self, channels: int) -> None:
        self.low, self.high = (np.full(channels, limit, np.float32) for limit in (math.inf, -math.inf))

    def add(self, rows: lossy.Floats) -> None:
        """Add positions, (T, C)."""
        self.low, self.high = np.minimum(self.low, rows.min(0)), np.maximum(self.high, rows.max(0))

    @property
    def state(self) -> npt.NDArray[Any]:
        return np.stack([self.low, self.high])

    def merge(self, states: Sequence[npt.NDArray[Any]]) -> None:
        self.low = np.min([state[0] for state in states], 0)
        self.high = np.max([state[1] for state in states], 0)


def _check_size(x: Tensor) -> None:
    if x.numel() > MAX_PICTURE:
        raise AezooError(f"a picture has {x.numel():,} values, more than the limit of {MAX_PICTURE:,}: crop it")


def _codes(model: Autoencoder, x: Tensor) -> Tensor:
    """(1, C, H, W) -> (1, C, *positions), which must be finite."""
    z = model.encode(x.to(reference_tensor(model))).float()
    if not bool(z.isfinite().all()):
        raise AezooError("the model gives codes that are NaN or infinite: train it again")
    return z


def _rows(z: Tensor) -> lossy.Floats:
    """(1, C, *positions) -> (T, C)."""
    rows: lossy.Floats = z[0].flatten(1).T.cpu().numpy()
    return rows


def decode_places(model: Autoencoder, codes: lossy.Floats) -> Any:
    """The output (1, *input_shape), float32, of the positions of a code, (T, C)."""
    return reproducibility.decode_codes(model, np.ascontiguousarray(codes.T).reshape(1, -1), 1)
