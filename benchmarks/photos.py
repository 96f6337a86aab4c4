"""Compare the recipe `photos` with conv_ae and vae on the Kodak photographs: a CSV, and a picture of details.

    python -m benchmarks.photos --kodak DIR              train the models that are not in --runs yet, and measure errors
    python -m benchmarks.photos --kodak DIR --again      train all three again

All three are trained on the crops of `sample_photos`, the two models with their defaults. A Kodak photograph is cut
into squares of the models' size without gaps or overlaps (768 x 512 is 12 x 8 squares of 64), reconstructed square by
square and put together again, so that seams between squares affect the figures.

    code           numbers in the code of a square, of which the pixels are 12,288
    psnr, ssim     of whole photographs with values in [0, 1], mean over the photographs
    psnr_pca       the same for PCA with a code of that size, fitted on the squares that the models are trained on
    seconds        of the training, from start to end

DIR is the folder of the 24 files kodim01.png to kodim24.png. The table in `docs/recipes.md` is made from the CSV; the
figures of the recipe's own test split go to the CSV of `benchmarks.recipes`.
"""

import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aezoo.errors import AezooError

from .common import ROOT, ResultsCSV, build_parser, command_line, environment, results_folder, run_script
from .recipes import read_run, replace_table, scalars

if TYPE_CHECKING:
    from torch import Tensor

    from aezoo.autoencoder import Autoencoder

SIZE = 64
FITS = {
    "conv_ae": ("--model", "conv_ae", "--data", "sample_photos", "--trainer.max_epochs", "40"),
    "vae": ("--model", "vae", "--data", "sample_photos", "--trainer.max_epochs", "40"),
    "photos": ("-c", "photos"),
}
# photographs of the picture, and the row and column at which the detail begins
DETAILS = {"kodim04.png": (128, 128), "kodim23.png": (64, 64), "kodim15.png": (64, 192)}
_DETAIL = 192


def main() -> None:
    """Train the missing models, and write the CSV and the picture."""
    parser = build_parser("photos", __doc__)
    parser.add_argument("--kodak", type=Path, required=True, metavar="DIR", help="folder of the photographs")
    parser.add_argument("--runs", type=Path, default=Path("build/photos"), metavar="DIR", help="%(default)s")
    arguments = parser.parse_args()
    files = sorted(arguments.kodak.expanduser().glob("kodim*.png"))
    if not files:
        raise AezooError(f"{arguments.kodak} contains no kodim01.png: give the folder of the photographs with --kodak")
    table = ResultsCSV(
        arguments.results / f"photos-{environment(arguments)}.csv",
        ("model",),
        command_line("photos", sys.argv[1:]),
        arguments.again,
    )
    for name in FITS:
        if table.needs({"model": name}):
            if arguments.again:
                shutil.rmtree(arguments.runs / name, ignore_errors=True)
            table.put({"model": name, **_measure(name, arguments.runs, files)})
            print(table.find({"model": name}), flush=True)
    run, seconds = _run(arguments.runs, "photos"), _train("photos", arguments.runs / "photos")
    path = arguments.results / f"quality-recipes-{environment()}.csv"
    ResultsCSV(path, ("recipe",), command_line("photos", sys.argv[1:])).put(read_run("photos", run, seconds))
    _picture(arguments.runs, arguments.kodak.expanduser(), arguments.results / "pictures" / "photos.png")
    page = ROOT / "docs" / "recipes.md"
    if arguments.results == results_folder() and page.is_file():
        text = replace_table(page.read_text(encoding="utf-8"), "photos", as_markdown(table.rows))
        page.write_text(text, encoding="utf-8")
    print(table.path)


def as_markdown(rows: list[dict[str, str]]) -> str:
    """The results as a Markdown table."""
    lines = ["| | numbers in a code | PSNR (dB) | PCA of that size (dB) | SSIM | epochs |", "|---" * 6 + "|"]
    for row in rows:
        figures = [f"{float(row[key]):.2f}" for key in ("psnr", "psnr_pca", "ssim")]
        lines.append(f"| `{row['model']}` | {row['code']} | {' | '.join(figures)} | {row['epochs']} |")
    return "\n".join(lines)


def _measure(name: str, runs: Path, files: list[Path]) -> dict[str, object]:
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    seconds = _train(name, runs / name)
    model = _load(runs, name)
    figures: dict[str, list[float]] = {"psnr": [], "ssim": [], "psnr_pca": []}
    pca = _pca(math.prod(model.code_shape))
    for file in files:
        photograph = read_photograph(file)
        output = _reconstructed(model, photograph)
        figures["psnr"].append(_psnr(output, photograph))
        similarity: Any = structural_similarity_index_measure(output[None], photograph[None], data_range=1.0)
        figures["ssim"].append(float(similarity))
        figures["psnr_pca"].append(_psnr(_reconstructed(pca, photograph), photograph))
    return {
        "code": math.prod(model.code_shape),
        **{key: sum(values) / len(files) for key, values in figures.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "photographs": len(files),
        "epochs": len(scalars(_run(runs, name))["train/loss"]),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
    }


def _train(name: str, folder: Path) -> float:
    """Train a model, if it has not been trained yet; the seconds that it took."""
    seconds = folder / "seconds.txt"
    if not seconds.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        command = [sys.executable, "-m", "aezoo", "fit", *FITS[name], "--resume", "auto"]
        done = subprocess.run(command, cwd=folder, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)})
        if done.returncode:
            raise AezooError(f"{name} ends with exit code {done.returncode}: fix it; the same command continues")
        seconds.write_text(f"{time.monotonic() - began:.0f}\n", encoding="utf-8")
    return float(seconds.read_text(encoding="utf-8"))


def _load(runs: Path, name: str) -> "Autoencoder":
    import aezoo

    return aezoo.load_model(_run(runs, name)).eval()


def _run(runs: Path, name: str) -> Path:
    return next((runs / name).glob("runs/*/0"))


def read_photograph(file: Path) -> "Tensor":
    """A photograph, (3, H, W) in [0, 1]."""
    from aezoo.data.images import read_image

    return read_image(file, None, 3, 10**7).float() / 255


def _pca(size: int) -> "Callable[[Tensor], Tensor]":
    import torch
    from sklearn.decomposition import PCA

    import aezoo

    train = aezoo.DataModule("sample_photos", size=SIZE).tensors("train")[0]
    fitted = PCA(size, random_state=0).fit(train.flatten(1).numpy())

    def reconstruct(x: "Tensor") -> "Tensor":
        return torch.from_numpy(fitted.inverse_transform(fitted.transform(x.flatten(1).numpy()))).reshape(x.shape)

    return reconstruct


def _reconstructed(model: "Callable[[Tensor], Tensor]", photograph: "Tensor") -> "Tensor":
    """A photograph, (3, H, W), reconstructed square by square; its sides are multiples of SIZE."""
    import torch

    channels, height, width = photograph.shape
    rows, columns = height // SIZE, width // SIZE
    squares = photograph.reshape(channels, rows, SIZE, columns, SIZE).permute(1, 3, 0, 2, 4)
    with torch.no_grad():
        output = torch.cat([model(x) for x in squares.reshape(-1, channels, SIZE, SIZE).split(32)])
    return output.reshape(squares.shape).permute(2, 0, 3, 1, 4).reshape(photograph.shape).clamp(0, 1)


def _psnr(output: "Tensor", photograph: "Tensor") -> float:
    from aezoo.metrics.similarity import psnr

    return psnr(float((output.double() - photograph).square().mean()))


def _picture(runs: Path, kodak: Path, path: Path) -> None:
    """Details of photographs, and below each what every model makes of it."""
    import torch

    from aezoo.callbacks import plotting

    photographs = [read_photograph(kodak / name) for name in DETAILS]

    def details(images: "list[Tensor]") -> "Tensor":
        places = zip(images, DETAILS.values(), strict=True)
        return torch.stack([image[:, i : i + _DETAIL, j : j + _DETAIL] for image, (i, j) in places])

    shown = {"original": details(photographs)}
    for name in FITS:
        model = _load(runs, name)
        shown[name] = details([_reconstructed(model, photograph) for photograph in photographs])
    rows = [plotting.tiles(images, (0.0, 1.0)) for images in shown.values()]
    figure = plotting.mosaic_figure(rows, list(shown))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    run_script(main)
