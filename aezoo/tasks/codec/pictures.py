"""The work of `compress` for pictures that are not of the model's size: each is a piece of the file, with its size.

The model of each picture's size codes it, alone; tables are those of all pictures. A code without indices is a map, of
which each channel has a step and a histogram, over all places of all pictures; see `lossy.py`. A channel's sensitivity
is that of a sample to an independent error of each place, the root of their mean square:

    s_c^2 = E ||g(z + h e) - g(z)||^2 / (h^2 T)    e = +-1 at each of T places of channel c, 0 elsewhere
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import IO, Any, NamedTuple, cast

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
from aezoo.tasks.codec.container import MAX_PICTURE, Header, Writer
from aezoo.tasks.codec.levels import reason, to_levels
from aezoo.tasks.result_store import Row
from aezoo.tasks.samples import reference_tensor
from aezoo.tasks.tiling import Sized
from aezoo.training import sizes
from aezoo.training.model_names import display_name

# values of codes that steps and tables are fitted to; places a side, and pictures, for a channel's sensitivity
_MAX_CODES, _SIDE, _PICTURES = 2**24, 32, 8
_REPEAT = (
    "decoding did not give the {} back: this device does not compute the same twice; compress on --device cpu with "
    "--threads 1"
)


class _Coded(NamedTuple):
    """A picture: its bytes in the file, and what they decode to."""

    payload: bytes
    x_hat: npt.NDArray[Any]


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

        def code(model: Autoencoder, x: Tensor) -> _Coded:
            coder = lossless.BitsBack(lossless.latent_chain(model), reference_tensor(model), 1, precision, key)
            if (values := to_levels(x, levels)) is None:
                raise AezooError(reason(levels))
            coded = coder.encode(values)
            decoded = coder.decode(coded.words, 1)
            if decoded is None or not np.array_equal(decoded, values):
                raise AezooError(_REPEAT.format("samples"))
            result.net_bits += coded.net_bits
            result.initial_bits += coded.initial_bits
            result.bound_bits += coder.bound(values)
            return _Coded(tables.to_bytes(coded.words), values)

        header = self._header("lossless", levels=levels, precision=precision)
        size = self._write("samples", functools.partial(self._write_pictures, header, None, code, None))
        parts = {"-ELBO, the bound": result.bound_bits / 8, "aezoo, net": result.net_bits / 8}
        parts["aezoo, the file with initial bits"] = size
        result.rows = [self._row(method, part) for method, part in parts.items()]

    def _learned(self, result: Compression, qualities: tuple[float, ...]) -> None:
        whole = cast(EntropyCoded, self.model)
        own = qualities if whole.max_quality else (whole.quality,)
        limits = self._limits()
        for q in own:

            def code(model: Autoencoder, x: Tensor, q: float = q) -> _Coded:
                sized = cast(EntropyCoded, model)
                with entropy_model.at_quality(sized, q):
                    coder, symbols = rans.coder_of(sized, 1), entropy_model.encode(sized, x)
                    payload = coder.encode(symbols)
                    if not coder.decodes_to(payload, symbols):
                        raise AezooError(_REPEAT.format("codes"))
                    result.bound_bits += coder.bound(symbols)
                    result.net_bits += 8 * len(payload)
                    return _Coded(payload, entropy_model.decode(sized, symbols, 1))

            distortion = baselines.Distortion(self.samples.shape, limits)
            fill = functools.partial(self._write_pictures, self._header("learned", quality=q), None, code, distortion)
            size = self._write("samples" if len(own) == 1 else f"samples-q{q:g}", fill)
            shown = q if whole.max_quality else math.nan
            result.rows.append(self._row(self._name, size, shown, **distortion.figures()))

    def _indices(self, result: Compression) -> None:
        models = [cast(DiscreteAutoencoder, self._model(shape)) for shape in self._distinct]
        shapes = {model.input_shape: (math.prod(model.index_shape),) for model in models}
        found = self.store.separate([shapes[shape] for shape in self._shapes], np.int64)
        limits = self._limits()
        for i, (model, x) in enumerate(self._pictures("encode")):
            sized = cast(DiscreteAutoencoder, model)
            found[i][...] = indices.encode(sized, x, indices.index_sizes(sized))[0]
        books = {model.input_shape: indices.model_codebooks(model) for model in models}
        parts = ((books[shape], found[i][None]) for i, shape in enumerate(self._shapes))
        fitted = indices.TableCoder.fit_sizes(books[self._shapes[0]], parts)
        stored, number = fitted.to_bytes(), iter(range(len(found)))
        prior = result.mode == "prior"

        def code(model: Autoencoder, x: Tensor) -> _Coded:
            sized, symbols = cast(DiscreteAutoencoder, model), found[next(number)][None]
            coder: Any = replace(fitted, codebooks=books[tuple(x.shape[1:])])
            if prior:
                coder = AutoregressiveCoder(sized, 1)
                result.bound_bits += coder.bound(symbols)
            payload = coder.encode(symbols)
            if not coder.decodes_to(payload, symbols):
                raise AezooError(_REPEAT.format("codes"))
            result.net_bits += 8 * len(payload)
            return _Coded(payload, indices.decode(sized, symbols, 1))

        if not prior:
            result.bound_bits, result.table_bits = fitted.entropy_bits, 8 * len(stored)
        distortion, first = baselines.Distortion(self.samples.shape, limits), None if prior else stored
        fill = functools.partial(self._write_pictures, self._header(result.mode), first, code, distortion)
        result.rows = [self._row(self._name, self._write("samples", fill), **distortion.figures())]

    def _lossy(self, result: Compression, qualities: tuple[float, ...], steps: str) -> None:
        codes: list[Any] = []
        limits, total, every = self._limits(), 0, 1
        low, high = (np.full(self.model.code_shape[0], limit, np.float32) for limit in (math.inf, -math.inf))
        crops: list[Tensor] = []
        for model, x in self._pictures("encode"):
            z = model.encode(x.to(reference_tensor(model))).float()
            if not bool(z.isfinite().all()):
                raise AezooError("the model gives codes that are NaN or infinite: train it again")
            rows = _rows(z)
            low, high = np.minimum(low, rows.min(0)), np.maximum(high, rows.max(0))
            total += len(rows)
            codes.append(rows[::every])
            if sum(part.size for part in codes) > _MAX_CODES:  # every second place of all is enough
                every, codes = 2 * every, [part[::2] for part in codes]
            if len(crops) < _PICTURES:
                corner: list[Any] = [slice(0, _SIDE) for _ in z.shape[2:]]
                crops.append(z[(..., *corner)].cpu())
        fit = np.concatenate(codes)
        for q in qualities:
            slopes = functools.partial(self._slopes, crops)
            quantiser = lossy.ScalarQuantiser.fit(fit, lambda places: places, q, steps, slopes)
            codec = lossy.Codec.fit(fit, quantiser, low, high, total)

            def code(model: Autoencoder, x: Tensor, codec: lossy.Codec = codec) -> _Coded:
                symbols = codec.quantiser.symbols(_rows(model.encode(x.to(reference_tensor(model))).float()))
                payload = codec.encode(symbols)
                if not codec.decodes_to(payload, symbols):
                    raise AezooError(_REPEAT.format("codes"))
                return _Coded(payload, decode_places(model, codec.quantiser.codes(symbols)))

            distortion = baselines.Distortion(self.samples.shape, limits)
            header = self._header("lossy", quality=q)
            fill = functools.partial(self._write_pictures, header, codec.to_bytes(), code, distortion)
            size = self._write("samples" if len(qualities) == 1 else f"samples-q{q:g}", fill)
            result.rows.append(self._row(self._name, size, q, **distortion.figures()))

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
            raise AezooError(f"the code of {display_name(type(self.model))} is no map of places, so samples of another "
                             "size cannot be compressed: resize them (--data.size)")  # fmt: skip
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

    def _pictures(self, title: str) -> Iterator[tuple[Autoencoder, Tensor]]:
        """Each picture, (1, C, H, W), with the model of its size."""
        for x in self.samples.batches(1, self.title and title):
            if x.numel() > MAX_PICTURE:
                raise AezooError(f"a picture has {x.numel():,} values, more than the limit of {MAX_PICTURE:,}: cut it")
            yield self._model(tuple(x.shape[1:])), x

    def _limits(self) -> tuple[float, float]:
        """The least and the largest value of the samples, which must be finite."""
        low, high = math.inf, -math.inf
        for x in self.samples.batches(1):
            if not bool(x.isfinite().all()):
                raise AezooError("the data hold NaN or infinite values: clean them first")
            low, high = min(low, float(x.min())), max(high, float(x.max()))
        return low, high

    def _header(self, mode: str, **values: Any) -> Header:
        assert self.sized is not None
        return Header(mode=mode, own_sizes=1, tile=self.sized.tile, **self.header, **values)

    def _write_pictures(
        self,
        header: Header,
        first: bytes | None,
        code: Callable[[Autoencoder, Tensor], _Coded],
        distortion: baselines.Distortion | None,
        file: IO[bytes],
    ) -> None:
        writer = Writer(file, header)
        if first is not None:
            writer.frame(0, hashlib.sha256().digest(), first)
        for model, x in self._pictures("compress"):
            payload, x_hat = code(model, x)
            digest = hashlib.sha256(reproducibility.little_endian_bytes(x_hat)).digest()
            writer.frame(1, digest, payload, tuple(x.shape[2:]))
            if distortion is not None:
                distortion.add(x, torch.from_numpy(x_hat))
        writer.close()

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


def _rows(z: Tensor) -> lossy.Floats:
    """(1, C, *places) -> (T, C)."""
    rows: lossy.Floats = z[0].flatten(1).T.cpu().numpy()
    return rows


def decode_places(model: Autoencoder, codes: lossy.Floats) -> Any:
    """The output (1, *input_shape), float32, of the places of a code, (T, C)."""
    return reproducibility.decode_codes(model, np.ascontiguousarray(codes.T).reshape(1, -1), 1)
