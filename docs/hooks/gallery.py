"""The gallery: pictures of the shipped weights, and of what the numbers of their codes do."""

import hashlib
import io
import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import aezoo
from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError

ROWS, STEPS = 8, 11
# samples of a prior whose codes stand in for those of the training data
_DRAWN = 500
_ZOOM, _GAP = 2, 2
# Fashion-MNIST as Debian installs it; without it the page has no samples for the models of clothes
_FASHION = Path("/usr/share/datasets")
# what the graphs and codes of the explorer depend on
_SOURCES = ("aezoo/weights/tags.json", "aezoo/tasks/explore.py", "aezoo/io/exporters/graphs.py", "aezoo/cli/explore.py")
log = logging.getLogger("mkdocs.hooks.gallery")

INTRODUCTION = """# Gallery

What the [pretrained weights](pretrained.md) that come with aezoo do: test samples with their reconstructions and, where
the model can draw them, new samples; then, where the code is a vector, what its numbers do. There, each row moves one
number of a code from the 1st to the 99th percentile of its values while the others stay; the rows are the numbers that
change the picture most.
"""

EXPLORER = """
## Try them here

The weights run in this page, in your browser: draw a digit, or drag the point over the plane. They are on
[a page of their own](explorer/index.html), too, and [`aezoo explore`](explore.md) makes such a page of your own models.

<iframe class="explorer" src="explorer/index.html?model=vae.mnist_2d" title="Weights to try" loading="lazy"></iframe>
"""


def page(names: Sequence[str], with_traversal: Collection[str], with_explorer: bool) -> str:
    """The page in Markdown: of weights with these names."""
    parts = [EXPLORER.strip()] if with_explorer else []
    for name in names:
        model = name.partition(".")[0]
        explored = f", [try it](explorer/index.html?model={name})" if with_explorer else ""
        parts.append(
            f"## {name}\n\n[`{model}`](models/{model}.md), `aezoo.load_model({name!r})`, "
            f"[figures and the command that trained it](weights/{name}.md){explored}.\n\n"
            f"![samples and reconstructions of {name}](weights/{name}.png)"
        )
        if name in with_traversal:
            parts.append(f"![one number of the code of {name} a row](weights/{name}.traversal.png)")
    return INTRODUCTION + "\n" + "\n\n".join(parts) + "\n"


@torch.no_grad()
def traversals(model: Autoencoder) -> Tensor | None:
    """One number of a code at a time, the ones that change the output most first.

    Returns:
        (ROWS, STEPS, *input_shape), fewer rows for a shorter code; None if the code is no vector or nothing decodes it
        to images.
    """
    if len(model.code_shape) != 1 or len(model.input_shape) != 3 or model.discrete_code:
        return None
    statistics = model.data_statistics
    if statistics is not None and statistics.codes is not None:
        codes = statistics.codes
    elif model.has_prior:
        torch.manual_seed(0)
        codes = model.encode(model.sample(_DRAWN))
    else:
        return None
    # a code of a sample; the mean of all may be the code of none
    start = codes[(codes - codes.mean(0)).square().sum(1).argmin()]
    low, high = codes.quantile(0.01, 0), codes.quantile(0.99, 0)
    varied = start.repeat(len(start), STEPS, 1)
    for d in range(len(start)):
        varied[d, :, d] = torch.linspace(float(low[d]), float(high[d]), STEPS)
    decoded = model.decode(varied.flatten(0, 1)).unflatten(0, varied.shape[:2])
    change = (decoded[:, 0] - decoded[:, -1]).square().flatten(1).sum(1)
    return decoded[change.argsort(descending=True)[:ROWS]]


def picture(rows: Tensor) -> bytes:
    """Rows of images in [0, 1], (rows, columns, channels, height, width), as a PNG."""
    padded = torch.nn.functional.pad(rows.clamp(0, 1), (0, _GAP, 0, _GAP), value=1.0)
    image = padded.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)[:-_GAP, :-_GAP]
    pixels = (image * 255).round().to(torch.uint8).numpy().repeat(_ZOOM, 0).repeat(_ZOOM, 1)
    out = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else np.ascontiguousarray(pixels)).save(out, "png")
    return out.getvalue()


def pictures(names: Sequence[str]) -> dict[str, bytes]:
    """PNGs of the traversals of these weights, by name; of those that have one."""
    found = {name: traversals(aezoo.load_model(name)) for name in names}
    return {name: picture(rows) for name, rows in found.items() if rows is not None}


def explorer(names: Sequence[str], folder: Path) -> dict[str, Path]:
    """The files of the page of `aezoo explore` for these weights, by their place on it.

    They are written to `folder` where those of the same sources are not there. {} where the page cannot be made, for
    want of onnxruntime-web, which is then said.
    """
    from aezoo.cli import explore as command
    from aezoo.tasks.explore import PAGE, explore

    key, mark = _digest(names), folder / "key.txt"
    if not mark.is_file() or mark.read_text() != key:
        mark.unlink(missing_ok=True)
        clothes = ["--data.name", "fashion_mnist", "--data.root", str(_FASHION)]
        fashion = [name for name in names if name.endswith(".fashion_mnist")]
        found = command.subjects([name for name in names if name not in fashion], [])
        found += command.subjects(fashion, clothes if (_FASHION / "fashion-mnist").is_dir() else [])
        try:
            explore(found, out=folder)
        except AezooError as error:
            log.info("the gallery has no explorer: %s", error)
            return {}
        mark.write_text(key)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file() and path != mark}
    return files | {path.name: path for path in PAGE.iterdir()}


def _digest(names: Sequence[str]) -> str:
    root = Path(__file__).parents[2]
    content = [(root / name).read_bytes() for name in _SOURCES]
    return hashlib.sha256(b"".join([repr((names, torch.__version__)).encode(), *content])).hexdigest()
