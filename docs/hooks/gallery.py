"""The gallery: pictures of the shipped weights, and of what the numbers of their codes do."""

import io
from collections.abc import Collection, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import aezoo
from aezoo.autoencoder import Autoencoder

ROWS, STEPS = 8, 11
# samples of a prior whose codes stand in for those of the training data
_DRAWN = 500
_ZOOM, _GAP = 2, 2

INTRODUCTION = """# Gallery

What the [pretrained weights](pretrained.md) that come with aezoo do: test samples with their reconstructions and, where
the model can draw them, new samples; then, where the code is a vector, what its numbers do. There, each row moves one
number of a code from the 1st to the 99th percentile of its values while the others stay; the rows are the numbers that
change the picture most.
"""


def page(names: Sequence[str], with_traversal: Collection[str]) -> str:
    """The page in Markdown: of weights with these names."""
    parts = []
    for name in names:
        model = name.partition(".")[0]
        parts.append(
            f"## {name}\n\n[`{model}`](models/{model}.md), `aezoo.load_model({name!r})`, "
            f"[figures and the command that trained it](weights/{name}.md).\n\n"
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
