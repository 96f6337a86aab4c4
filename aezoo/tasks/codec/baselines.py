"""What a user could use instead, on the same samples: image formats, general compressors, PCA, the mean sample.

Image formats get all samples in pictures of at most 8192 pixels per side, since a file for each small image would be
mostly headers. Samples are arranged in a grid or, for lossless formats and where that is smaller, in one column.
General compressors get the bytes of all samples or, for binary data and where that is smaller, 8 values per byte. All
use their strongest settings.

Decoders are not counted: neither the model's weights nor PCA's components nor the mean sample, which needs no file at
all. Everything else is counted, headers and tables included.
"""

import bz2
import gzip
import io
import lzma
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.metrics.similarity import StructuralSimilarity, has_peak, psnr
from aezoo.tasks.codec import lossy
from aezoo.tasks.result_store import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

Pixels = npt.NDArray[np.uint8]
_MAX_PIXELS = 8192
_LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {"optimize": True},
    "WEBP": {"lossless": True, "quality": 100, "method": 6},
    "JXL": {"lossless": True},
}
_LOSSY: dict[str, dict[str, Any]] = {"JPEG": {"optimize": True}, "WEBP": {"method": 6}, "AVIF": {}, "JXL": {}}
_QUALITIES = (5, 25, 50, 75, 95)
# the method that sends nothing
MEAN = "mean sample"
# methods that the verdict names, and the difference of two rates that count as equal
_MAX_AHEAD, _SAME_RATE = 6, 1.01
# for smaller differences, no separate axis is drawn
_LEAST_RANGE = {"psnr": 1.0, "ssim": 0.05, "mse": 1e-6}


class Distortion:
    """PSNR, or the mean squared error of data without a peak, and SSIM for images with both sides above 5.

    Args:
        shape: shape of one sample.
        limits: the least and the largest value of the data.
    """

    def __init__(self, shape: tuple[int, ...], limits: tuple[float, float]) -> None:
        self._sse, self._count = 0.0, 0
        # SSIM and the number of samples that other parts have added up
        self._similarity, self._n_similar = 0.0, 0.0
        self._has_peak = has_peak(*limits)
        width = 1.0 if self._has_peak else max(limits[1] - limits[0], 1e-12)
        self._ssim = StructuralSimilarity(data_range=width) if StructuralSimilarity.supports(shape) else None

    def add(self, x: Tensor, x_hat: Tensor) -> None:
        """Add samples and their reconstructions."""
        self._sse += float((x.double() - x_hat.double()).square().sum())
        self._count += x.numel()
        if self._ssim is not None:
            self._ssim.update(x_hat, x)

    @property
    def sums(self) -> tuple[float, ...]:
        """What has been added up."""
        own = (0.0, 0.0) if self._ssim is None else (float(self._ssim.similarity), float(self._ssim.total))
        return self._sse, float(self._count), self._similarity + own[0], self._n_similar + own[1]

    def add_sums(self, sums: Sequence[float]) -> None:
        """Add what was added up over other samples."""
        self._sse += sums[0]
        self._count += int(sums[1])
        self._similarity += sums[2]
        self._n_similar += sums[3]

    def figures(self) -> dict[str, float]:
        """The figures over all samples; NaN if one is not defined, infinite PSNR without any error."""
        mse = self._sse / max(1, self._count)
        error = {"psnr": psnr(mse)} if self._has_peak else {"mse": mse}
        *_, similarity, n_similar = self.sums
        return {**error, "ssim": similarity / n_similar if n_similar else math.nan}


def table_row(
    method: str, size: float, x: npt.NDArray[Any] | tuple[int, float], quality: float = math.nan, **figures: float
) -> Row:
    """A line of the table: `size` bytes for samples x, or for n samples of the given dimension."""
    n, dims = x if isinstance(x, tuple) else (len(x), math.prod(x.shape[1:]))
    shown = {"method": method, "quality": quality, "samples": n, "bytes": math.ceil(size)}
    return shown | {"bits_per_dim": 8 * size / (n * dims), **dict.fromkeys(("mse", "psnr", "ssim"), math.nan)} | figures


def general_compressors(x: npt.NDArray[Any], binary: bool = False) -> list[Row]:
    """gzip, bz2, xz and, if installed, zstd, of the bytes of samples x, or of zeros and ones."""
    contents = [x.tobytes(), np.packbits(x).tobytes()] if binary else [x.tobytes()]
    methods: dict[str, Callable[[bytes], bytes]] = {
        "gzip": lambda data: gzip.compress(data, 9),
        "bz2": lambda data: bz2.compress(data, 9),
        "xz": lambda data: lzma.compress(data, preset=9),
    }
    try:
        import zstandard  # type: ignore[import-not-found,unused-ignore]

        methods["zstd"] = zstandard.ZstdCompressor(level=19).compress
    except ImportError:
        pass
    return [
        table_row(f"{name} (lossless)", min(len(method(content)) for content in contents), x)
        for name, method in methods.items()
    ]


def lossless_codecs(x: Pixels, binary: bool) -> list[Row]:
    """All lossless methods, on bytes (N, *shape), or on zeros and ones."""
    rows = general_compressors(x, binary)
    if _is_picture(x.shape[1:]):
        layouts = [_pages(x * 255 if binary else x, grid) for grid in (_sheet(x.shape), _strip(x.shape))]
        for name, options in _available(_LOSSLESS).items():
            one_bit = binary and name == "PNG"
            size = min(
                sum(len(_save(page.convert("1") if one_bit else page, name, options)) for page in pages)
                for pages in layouts
            )
            rows.append(table_row(f"{name} (lossless)", size, x))
    return rows


def image_codecs(x: Tensor) -> list[Row]:
    """JPEG, WebP, AVIF and, where Pillow has it, JPEG XL, on images (N, C, H, W) in [0, 1]."""
    pixels = (x * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    if not _is_picture(pixels.shape[1:]):
        return []
    grid, rows = _sheet(pixels.shape), []
    pages = _pages(pixels, grid)
    for name, options in _available(_LOSSY).items():
        for quality in _QUALITIES:
            files = [_save(page, name, options | {"quality": quality}) for page in pages]
            found = torch.from_numpy(_split_pages([_open(file) for file in files], pixels.shape, grid)).float() / 255
            distortion = Distortion(tuple(x.shape[1:]), (0.0, 1.0))
            distortion.add(x, found)
            rows.append(table_row(name, sum(map(len, files)), pixels, quality, **distortion.figures()))
    return rows


def pca(
    fit: Tensor, x: Tensor, size: int, qualities: tuple[float, ...], limits: tuple[float, float], overhead: int,
    seed: int, coder: str = "the same coder",
) -> list[Row]:  # fmt: skip
    """PCA with a code of the same size, quantised and coded like the code of a model without indices.

    Args:
        fit: samples that the components are fitted to.
        x: samples to compress.
        size: size of a code.
        qualities: as for the model.
        limits: the least and the largest value of the data.
        overhead: bytes of the model's file that are neither tables nor codes.
        seed: seed of the randomised solver.
        coder: the name of the coder in the table.
    """
    from sklearn.decomposition import PCA

    flat = fit.flatten(1).numpy()
    if not flat.std(axis=0).any():
        return []  # a single sample, or samples that are all equal, have no principal components
    size = min(size, *flat.shape)
    transform = PCA(size, random_state=seed).fit(flat)
    codes = transform.transform(x.flatten(1).numpy()).astype(np.float32)
    seen = transform.transform(flat).astype(np.float32)
    rows = []
    for quality in qualities:
        quantiser = lossy.ScalarQuantiser.fit(seen, transform.inverse_transform, quality)
        codec = lossy.Codec.fit(seen, quantiser, codes.min(0), codes.max(0), len(x))
        symbols = quantiser.symbols(codes)
        found = torch.from_numpy(transform.inverse_transform(quantiser.codes(symbols))).reshape(x.shape)
        distortion = Distortion(tuple(x.shape[1:]), limits)
        distortion.add(x, found.float())
        total = overhead + len(codec.to_bytes()) + len(codec.encode(symbols))
        rows.append(table_row(f"PCA {size} + {coder}", total, x.numpy(), quality, **distortion.figures()))
    return rows


def mean_sample(fit: Tensor, x: Tensor, limits: tuple[float, float]) -> list[Row]:
    """The mean of samples `fit` for each of samples x; the decoder has it, like the model and PCA's components."""
    if bool((fit == fit[0]).all()):
        return []  # as for PCA: it would be the sample itself
    distortion = Distortion(tuple(x.shape[1:]), limits)
    distortion.add(x, fit.double().mean(0).float().expand_as(x))
    return [table_row(MEAN, 0, x.numpy(), **distortion.figures())]


def verdict(rows: list[Row]) -> list[str]:
    """Which other methods are better than the model's files, a line for each file; [] without other methods.

    Lossy files are compared by PSNR, or by mean squared error, at equal rate, along the line between a method's
    neighbouring qualities in the logarithm of the rate; a lossless method at that rate is better. Where no
    method but the mean has files as small, the smallest of them is named. Lossless files are compared by their rate.
    """
    own = [line for line in rows if line["method"].startswith("aezoo")]
    others = [line for line in rows if line not in own and not line["method"].startswith("-ELBO")]
    if not others:
        return []
    if all(_is_lossless(line) for line in own):
        rate = own[-1]["bits_per_dim"]  # of the whole file
        ahead = sorted((line["bits_per_dim"], line["method"]) for line in others if line["bits_per_dim"] < rate)
        found = ", ".join(f"{name} {bits:.4g}" for bits, name in ahead[:_MAX_AHEAD])
        return [f"formats smaller than the file of {rate:.4g} bits per dimension: {found or 'none'}"]
    lines = []
    for line in own:
        rate = line["bits_per_dim"]
        reached = {other["method"]: _level_at(others, other["method"], _SAME_RATE * rate) for other in others}
        by_psnr = not math.isnan(line["psnr"])
        ranked = sorted(((level, name) for name, level in reached.items() if level > _level(line)), reverse=True)
        found = ", ".join(f"{name}{_told(level, by_psnr)}" for level, name in ranked[:_MAX_AHEAD])
        what = f"{line['method']} ({error_text(line)}) at {rate:.4g} bits per dimension"
        compared = any(level > -math.inf for name, level in reached.items() if name != MEAN)
        if found:
            text = f"better than {what}: {found}"
        elif compared:
            text = f"no other method is better than {what}, by {'PSNR' if by_psnr else 'mean squared error'}"
        else:
            text = f"no other method is as small as {what}"
        lines.append(text if compared else text + _nearest(others, " is as small" if found else "", by_psnr))
    return lines


def error_text(line: Row) -> str:
    """The error of a lossy method."""
    return f"mse {line['mse']:.4g}" if math.isnan(line["psnr"]) else f"{line['psnr']:.4g} dB"


def _is_lossless(line: Row) -> bool:
    return math.isnan(line["psnr"]) and math.isnan(line["mse"])


def _level(line: Row) -> float:
    """How close a method's output is, in dB: PSNR, or the same of a peak of 1; infinite of a lossless method."""
    if _is_lossless(line):
        return math.inf
    return float(psnr(line["mse"]) if math.isnan(line["psnr"]) else line["psnr"])


def _told(level: float, by_psnr: bool) -> str:
    if math.isinf(level):
        return ""
    return f" {level:.4g} dB" if by_psnr else f" mse {10 ** (-level / 10):.4g}"


def _nearest(others: list[Row], what: str, by_psnr: bool) -> str:
    """The smallest file of other methods than the mean, as the end of a sentence."""
    files = [line for line in others if line["method"] != MEAN]
    if not files:
        return ""
    smallest = min(files, key=lambda line: float(line["bits_per_dim"]))
    told = f"; no other method{what}, the nearest:" if what else "; the nearest:"
    return f"{told} {smallest['method']}{_told(_level(smallest), by_psnr)} at {smallest['bits_per_dim']:.4g}"


def _level_at(rows: list[Row], method: str, rate: float) -> float:
    """The level that a method reaches in at most `rate` bits per dimension, -inf if its files are all larger."""
    points = [(line["bits_per_dim"], _level(line)) for line in rows if line["method"] == method]
    below, above = ([point for point in points if (point[0] <= rate) == under] for under in (True, False))
    if not below:
        return -math.inf
    reached = max(level for _, level in below)
    if not above or math.isinf(reached):
        return reached
    (r0, p0), (r1, p1) = max(below), min(above)
    share = math.log(rate / r0) / math.log(r1 / r0) if r0 > 0 else 0.0
    return max(reached, p0 + share * (p1 - p0))


def rate_figure(rows: list[Row]) -> "Figure":
    """The rates of lossless methods as bars; with distortions, `rate_distortion_figure`."""
    from matplotlib.figure import Figure

    if any(math.isfinite(line[name]) for line in rows for name in ("mse", "psnr")):
        return rate_distortion_figure(rows)
    figure = Figure(figsize=(6, 0.5 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh([line["method"] for line in rows], [line["bits_per_dim"] for line in rows])
    axes.invert_yaxis()
    axes.set(xlabel="bits per dimension")
    return figure


def rate_distortion_figure(rows: list[Row]) -> "Figure":
    """Distortion against rate, one line per method."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    shown = {"mse": "mean squared error", "psnr": "PSNR (dB)", "ssim": "SSIM"}
    names = [name for name in shown if any(math.isfinite(line.get(name, math.nan)) for line in rows)]
    figure = Figure(figsize=(5.5 * max(1, len(names)), 4), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, max(1, len(names)))), names or ["psnr"], strict=True):
        for method in dict.fromkeys(line["method"] for line in rows):
            points = [line for line in rows if line["method"] == method and math.isfinite(line[name])]
            if points and method == MEAN:
                # a rate of 0 has no place on a logarithmic axis
                axes.axhline(float(points[0][name]), color="grey", linestyle=":", label=method)
            elif points:
                axes.plot([p["bits_per_dim"] for p in points], [p[name] for p in points], marker="o", label=method)
        known = [line for line in rows if math.isfinite(line[name])]
        figures = [float(line[name]) for line in known] or [1.0]
        rates = [float(line["bits_per_dim"]) for line in known if line["method"] != MEAN] or [1.0]
        low, high = min(rates), max(rates)
        if low > 0 and high > 10 * low:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
        elif high < 1.5 * low:
            # around a single quality, matplotlib would zoom in until labels need ten digits
            axes.set_xlim(low / 1.5, 1.5 * high)
            axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter("{x:.4g}")
        least = _LEAST_RANGE[name]
        if max(figures) - min(figures) < least:
            middle = (max(figures) + min(figures)) / 2
            axes.set_ylim(middle - least, middle + least)
        axes.yaxis.set_major_formatter("{x:.4g}")
        axes.set(xlabel="bits per dimension", ylabel=shown[name])
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def _is_picture(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[0] in (1, 3) and max(shape[1:]) <= _MAX_PIXELS


def _available(formats: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The formats that Pillow supports here."""
    from PIL import Image, features

    Image.init()
    missing = {"WEBP": not features.check("webp"), "AVIF": not features.check("avif")}
    return {name: formats[name] for name in formats if name in Image.SAVE and not missing.get(name, False)}


def _sheet(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of samples (N, C, H, W) in a roughly square picture."""
    n, _, h, w = shape
    columns = min(math.ceil(math.sqrt(n * h / w)), _MAX_PIXELS // w, n)
    return min(math.ceil(n / columns), _MAX_PIXELS // h), columns


def _strip(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of samples in one column."""
    return min(shape[0], _MAX_PIXELS // shape[2]), 1


def _pages(x: Pixels, grid: tuple[int, int]) -> "list[Image.Image]":
    """Arrange samples in rows and columns, on as many pictures as needed."""
    from PIL import Image

    rows, columns = grid
    pages = []
    for start in range(0, len(x), rows * columns):
        part = x[start : start + rows * columns]
        filled = np.zeros((rows * columns, *x.shape[1:]), np.uint8)
        filled[: len(part)] = part
        tiles = filled.reshape(rows, columns, *x.shape[1:]).transpose(0, 3, 1, 4, 2)
        page = tiles.reshape(rows * x.shape[2], columns * x.shape[3], x.shape[1])
        pages.append(Image.fromarray(page[..., 0] if x.shape[1] == 1 else page))
    return pages


def _split_pages(pages: list[Pixels], shape: tuple[int, ...], grid: tuple[int, int]) -> Pixels:
    """Cut the samples, (N, C, H, W), from pictures made by `_pages`."""
    rows, columns = grid
    c, h, w = shape[1:]
    parts = [
        (page[..., None] if page.ndim == 2 else page)[..., :c]
        .reshape(rows, h, columns, w, c)
        .transpose(0, 2, 4, 1, 3)
        .reshape(-1, c, h, w)
        for page in pages
    ]
    return np.concatenate(parts)[: shape[0]]


def _save(page: "Image.Image", name: str, options: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    page.save(file, name, **options)
    return file.getvalue()


def _open(content: bytes) -> Pixels:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        return np.array(image)
