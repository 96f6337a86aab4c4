"""Find the fastest way for a CPU to compute a convolution, and check whether the layers of the zoo use it.

    python -m benchmarks.convolutions --threads 1                       the whole grid
    python -m benchmarks.convolutions --precision bf16 --sides 4        a part of it, with autocast

A row is one layer of kernel 3, forward and backward. Torch and the ways of `aezoo/speed/conv2d.py` take turns, and each
time is a median over the repeats: `torch_ms`, `products_ms`, `separate_gradients_ms`, `batch_inner_ms` (on images in
this layout, as between layers) and, for transposed layers, `sub_pixels_ms` (up to four output channels) and
`overlap_add_ms` (one). Memory pages are kept, as in runs of the command line. `side` is the side of the smaller grid;
the larger grid of a `transposed_odd` layer is not a whole number of strides. `channels` is the channel count of the
larger grid; the smaller grid has twice as many at stride 2, and never fewer than 32. `chosen` is the way that the layer
uses in a network. `speedup` is torch_ms divided by the time of the chosen way, and `lost` is the time
of the chosen way divided by the time of the fastest way. At the end, the script prints the rows in which `lost` exceeds
1.1.
"""

import contextlib
import itertools
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

from .common import ResultsCSV, at_least, build_parser, command_line, environment, interleaved_medians, run_script

LAYERS = ("conv", "transposed", "transposed_odd")
KEY = ("layer", "precision", "batch", "channels", "side", "stride", "threads")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the requested grid."""
    parser = build_parser("convolutions", __doc__)
    add = parser.add_argument
    add("--batch", nargs="+", type=at_least(1), default=[64], metavar="N", help="samples of a batch")
    add(
        "--channels",
        nargs="+",
        type=at_least(1),
        default=[1, 3, 32, 64, 128, 256],
        metavar="N",
        help="on the larger grid",
    )
    add("--sides", nargs="+", type=at_least(1), default=[1, 2, 3, 4, 7, 8, 16], metavar="N", help="of the smaller grid")
    add("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    add("--strides", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--threads", type=at_least(1), default=1, help="threads on the CPU")
    add("--repeats", type=at_least(1), default=7, help="repeats after the warm-up")
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(words)
    path = arguments.results / f"convolutions-{environment(arguments, arguments.precision, 'cpu')}.csv"
    table = ResultsCSV(path, KEY, command_line("convolutions", words), arguments.again)
    sizes = (vars(arguments)[name] for name in ("batch", "channels", "sides", "strides"))
    for values in itertools.product(arguments.layers, [arguments.precision], *sizes, [arguments.threads]):
        row = dict(zip(KEY, values, strict=True))
        if (row["layer"] != "transposed_odd" or row["stride"] > 1) and table.needs(row):
            table.put(row | measure(row, arguments))
    worse = [row for row in table.rows if float(row["lost"]) > 1.1]
    print(f"another way is more than a tenth faster: {len(worse)} of {len(table.rows)}")
    for row in worse:
        print("  " + ", ".join(f"{name} {row[name]}" for name in (*KEY, "chosen", "speedup", "lost")))
    print(path)


def measure(row: dict[str, Any], arguments: Namespace) -> dict[str, Any]:
    """Milliseconds of each way."""
    import torch

    from aezoo.speed import conv2d
    from aezoo.speed.denormals import flushed_denormals
    from aezoo.speed.malloc import keep_pages
    from aezoo.speed.memory_format import to_layout

    from .measure import timed

    keep_pages()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    few, stride, side = row["channels"], row["stride"], row["side"]
    many = max(32, few * stride)
    layer: Any
    if row["layer"] == "conv":
        layer = conv2d.Conv2d(few, many, 3, stride, 1)
        shape = (row["batch"], few, side * stride, side * stride)
    else:
        layer = conv2d.ConvTranspose2d(many, few, 3, stride, 1, 0 if row["layer"] == "transposed_odd" else stride - 1)
        shape = (row["batch"], many, side, side)
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()
    geometry = layer.geometry(x)
    lower = torch.autocast("cpu", torch.bfloat16) if row["precision"] == "bf16" else contextlib.nullcontext()
    ways: dict[str, Any] = {
        "torch": partial(layer.plain.forward, layer),
        "products": lambda x: layer.with_products(x, geometry),
    }
    layer.feeds_convolutions = True
    with lower:
        pays = {"batch_inner": conv2d.use_batch_inner(layer, geometry, x)}
        pays |= {"products": conv2d.use_products(layer, geometry.small)}
    ways["separate_gradients"] = lambda x: layer.with_separate_gradients(x, geometry)
    ways["batch_inner"] = lambda x: layer.with_batch_inner(x, geometry)
    if row["layer"] != "conv":
        if stride > 1 and few <= 4:
            ways["sub_pixels"] = lambda x: layer.with_sub_pixels(x, geometry)
        if stride > 1 and few == 1:
            ways["overlap_add"] = lambda x: layer.with_overlap_add(x, geometry)
        with lower:
            pays |= {"overlap_add": conv2d.use_overlap_add(layer, geometry)}
            pays |= {"sub_pixels": conv2d.use_sub_pixels(layer, geometry)}
    with lower:
        pays |= {"separate_gradients": conv2d.use_separate_gradients(layer, geometry, x)}
    chosen = next((name for name, pay in pays.items() if pay), "torch")

    with lower, torch.no_grad():
        g = torch.randn_like(ways["torch"](x))
    last = x, g
    batch_inner = [to_layout(images.detach(), batch_inner=True) for images in last]

    def step(way: Any, x: Any, g: Any) -> None:
        with lower:
            y = way(x)
        torch.autograd.grad(y, [x, *layer.parameters()], g)

    given = {name: batch_inner if name == "batch_inner" else last for name in ways}
    batch_inner[0].requires_grad_()
    with flushed_denormals():
        took = interleaved_medians(
            {name: partial(timed, partial(step, way, *given[name]), x.device) for name, way in ways.items()},
            arguments.repeats,
        )
    times = {f"{name}_ms": 1000 * seconds for name, seconds in took.items()}
    mine = took[chosen]
    return {"chosen": chosen, **times, "speedup": took["torch"] / mine, "lost": mine / min(took.values())}


if __name__ == "__main__":
    run_script(main)
