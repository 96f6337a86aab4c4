"""Bits and errors of the Kodak photographs, compressed by models of the zoo and by JPEG, WebP, AVIF and JPEG XL.

    python -m benchmarks.kodak --kodak DIR                  train the models that are not in --runs yet, and compress
    python -m benchmarks.kodak --kodak DIR --seconds 1800   train for longer

Models are trained on the crops of `sample_photos` (five other photographs), until their validation loss has stopped
improving or --seconds have passed, and compress the whole photographs by `aezoo.compress`. A row is a method at one
quality:

    bits_per_pixel  bits of the file with all photographs, divided by their pixels; not of the model, which the reader
                    must have
    psnr, ms_ssim   of photographs of 8 bits, read back from the file; mean over the photographs
    stopped         whether the training has converged or was ended by --seconds (capped)

The page of results adds BD-rates (Bjontegaard 2001, VCEG-M33): the bits of a method relative to JPEG, WebP and AVIF at
equal PSNR and at equal MS-SSIM, averaged over the qualities that both curves reach; -10 % means a tenth fewer bits.
JPEG XL is measured where Pillow can write it (pip install pillow-jxl-plugin).

DIR is the folder of the 24 files kodim01.png to kodim24.png.
"""

import io
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aezoo.errors import AezooError

from .common import ResultsCSV, at_least, build_parser, command_line, environment, run_script, seconds
from .photos import read_photograph

if TYPE_CHECKING:
    from torch import Tensor

    from aezoo.autoencoder import Autoencoder

KEY = ("method", "quality")
SIZE = 64
LAMBDAS = (0.0018, 0.0067, 0.025, 0.0932)
# a model, and the qualities at which it compresses; None is its only one
MODELS: dict[str, tuple[str, dict[str, Any], tuple[float | None, ...]]] = {
    "gained_hyperprior": ("gained_hyperprior", {"lams": LAMBDAS}, (0.0, 1.0, 2.0, 3.0)),
    **{f"mean_scale_hyperprior:{lam}": ("mean_scale_hyperprior", {"lam": lam}, (None,)) for lam in LAMBDAS},
}
CODECS: dict[str, dict[str, Any]] = {
    "JPEG": {"optimize": True},
    "WEBP": {"method": 6},
    "AVIF": {},
    "JXL": {},
}
QUALITIES = (5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95)


def main(argv: Sequence[str] | None = None) -> None:
    """Train the missing models, compress, and write the CSV."""
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser("kodak", __doc__)
    parser.add_argument("--kodak", type=Path, required=True, metavar="DIR", help="folder of the photographs")
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("build/kodak"),
        metavar="DIR",
        help="folder of trained models (default %(default)s)",
    )
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS], metavar="NAME")
    parser.add_argument("--seconds", type=seconds, default=600.0, help="maximum seconds of a training (default 600)")
    parser.add_argument(
        "--photographs", type=at_least(1), default=24, help="use only the first N photographs (default 24)"
    )
    arguments = parser.parse_args(argv)
    files = sorted(arguments.kodak.expanduser().glob("kodim*.png"))[: arguments.photographs]
    if not files:
        raise AezooError(f"{arguments.kodak} contains no kodim01.png: give the folder of the photographs with --kodak")
    command = command_line("kodak", argv, left_out=("--runs",), folders=("--kodak",))
    table = ResultsCSV(arguments.results / f"kodak-{environment(arguments)}.csv", KEY, command, arguments.again)
    photographs = [read_photograph(file) for file in files]
    for method, options in CODECS.items():
        for quality in QUALITIES:
            if table.needs({"method": method, "quality": quality}):
                row = _codec(method, options | {"quality": quality}, photographs)
                table.put({"method": method, "quality": quality, **row, "photographs": len(files)})
    for name in arguments.models:
        registered, hyperparameters, qualities = MODELS[name]
        keys = [{"method": registered, "quality": hyperparameters.get("lam", q)} for q in qualities]
        if any(map(table.needs, keys)):
            model, stopped = _trained(name, arguments)
            for key, at in zip(keys, qualities, strict=True):
                row = _compressed(model, at, photographs)
                table.put({**key, **row, "photographs": len(files), "stopped": stopped})
                print(table.find(key), flush=True)
    print(table.path)


def _trained(name: str, arguments: Any) -> tuple["Autoencoder", str]:
    """A trained model, kept in the folder of runs, and how its training ended."""
    import aezoo

    from .convergence import Budget
    from .quality_row import train_to_convergence

    registered, hyperparameters, _ = MODELS[name]
    folder, ended = arguments.runs / name.replace(":", "-"), "stopped.txt"
    if arguments.again or not (folder / ended).is_file():
        import lightning.pytorch as pl

        pl.seed_everything(0, workers=True, verbose=False)
        data = aezoo.DataModule("sample_photos", size=SIZE, batch_size=32)
        model = aezoo.create_model(registered, data.input_shape, **hyperparameters)
        rule, _ = train_to_convergence({"accelerator": "auto"}, model, data, Budget(seconds=arguments.seconds))
        aezoo.save_model(model, folder)
        (folder / ended).write_text(rule.columns["stopped"], encoding="utf-8")
    return aezoo.load_model(folder), (folder / ended).read_text(encoding="utf-8")


def _compressed(model: "Autoencoder", quality: float | None, photographs: "list[Tensor]") -> dict[str, float]:
    """Figures of photographs that a model compresses to one file and decompresses again."""
    import torch

    import aezoo

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        aezoo.compress(model, photographs, mode="lossy", quality=quality, compare=False, out=folder)
        (file,) = out.glob("*.aez")
        found = aezoo.decompress(model, str(file), out=str(out / "out"))
        outputs = [torch.as_tensor(x_hat).clamp(0, 1).mul(255).round() / 255 for x_hat in found.x]
        return _figures(file.stat().st_size, photographs, outputs)


def _codec(name: str, options: dict[str, Any], photographs: "list[Tensor]") -> dict[str, Any]:
    """Figures of photographs that Pillow writes to a file each."""
    import numpy as np
    import torch
    from PIL import Image

    if name == "JXL":
        try:
            import pillow_jxl  # noqa: F401  # registers the format
        except ImportError:
            return {"error": "needs pillow-jxl-plugin"}
    size, outputs = 0, []
    for x in photographs:
        file = io.BytesIO()
        image = Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy())
        try:
            image.save(file, name, **options)
        except (KeyError, OSError) as error:
            return {"error": f"Pillow writes no {name} here: {error}"}
        size += len(file.getvalue())
        pixels = torch.from_numpy(np.array(Image.open(file).convert("RGB")))
        outputs.append(pixels.permute(2, 0, 1).float() / 255)
    return _figures(size, photographs, outputs)


def _figures(size: int, photographs: "list[Tensor]", outputs: "list[Tensor]") -> dict[str, float]:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

    from aezoo.metrics.similarity import psnr

    errors = [float((a.double() - b).square().mean()) for a, b in zip(outputs, photographs, strict=True)]
    similar: list[Any] = [ms_ssim(a[None], b[None], data_range=1.0) for a, b in zip(outputs, photographs, strict=True)]
    return {
        "bits_per_pixel": 8 * size / sum(x.shape[1] * x.shape[2] for x in photographs),
        "psnr": sum(map(psnr, errors)) / len(errors),
        "ms_ssim": sum(map(float, similar)) / len(similar),
    }


def bd_rate(reference: list[tuple[float, float]], method: list[tuple[float, float]]) -> float | None:
    """Average difference of bits at equal quality, as a share of the reference's; None without a common range.

    Args:
        reference: pairs of bits and quality, in any order.
        method: the same of another method.
    """
    import numpy as np
    from scipy.interpolate import PchipInterpolator

    curves = []
    for points in (reference, method):
        ordered = [*_rising(sorted(points, key=lambda point: point[1]))]
        if len(ordered) < 2:
            return None
        bits, quality = np.array(ordered).T
        curves.append((PchipInterpolator(quality, np.log(bits)), quality[0], quality[-1]))
    low, high = max(curve[1] for curve in curves), min(curve[2] for curve in curves)
    if low >= high:
        return None
    first, second = (float(curve[0].integrate(low, high)) for curve in curves)
    return float(np.exp((second - first) / (high - low)) - 1)


def _rising(points: list[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """The points whose quality is above that of the one before."""
    last = float("-inf")
    for bits, quality in points:
        if quality > last:
            yield bits, quality
            last = quality


if __name__ == "__main__":
    run_script(main)
