"""Which convolutions a CPU computes faster as products of matrices, and what the bias of a transposed one costs.

    python -m benchmarks.convolutions --threads 1                       the whole grid
    python -m benchmarks.convolutions --precision bf16 --sides 4        some of it by autocast

A row is one layer of kernel 3, forward and backward, by torch and by `aezoo/nets/conv2d.py` in turns: `torch_ms`,
`products_ms` and, of transposed ones, `bias_apart_ms` are medians of the repeats; `speedup` is what products make of
the last of these, or of torch_ms. `side` is that of the smaller grid; `channels` those of the larger grid, of which the
smaller one has twice as many at stride 2. `chosen` is what the layer takes by itself. Printed at the end is where that
is more than a tenth slower.
"""

import contextlib
import itertools
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

from .common import Table, at_least, command_line, environment, in_turns, parser, run_script

KEY = ("layer", "precision", "batch", "channels", "side", "stride", "threads")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the grid that is asked for."""
    made = parser("convolutions", __doc__)
    add = made.add_argument
    add("--batch", nargs="+", type=at_least(1), default=[64], metavar="N", help="samples of a batch")
    add("--channels", nargs="+", type=at_least(1), default=[32, 64, 128, 256], metavar="N", help="on the larger grid")
    add("--sides", nargs="+", type=at_least(1), default=[1, 2, 3, 4, 7, 8, 16], metavar="N", help="of the smaller grid")
    add("--strides", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--threads", type=at_least(1), default=1, help="threads on the CPU")
    add("--repeats", type=at_least(1), default=7, help="repeats after the warm-up")
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = made.parse_args(words)
    path = arguments.results / f"convolutions-{environment(arguments.precision, 'cpu')}.csv"
    table = Table(path, KEY, command_line("convolutions", words), arguments.again)
    sizes = (vars(arguments)[name] for name in ("batch", "channels", "sides", "strides"))
    for values in itertools.product(("conv", "transposed"), [arguments.precision], *sizes, [arguments.threads]):
        row = dict(zip(KEY, values, strict=True))
        if table.needs(row):
            table.put(row | measure(row, arguments))
    worse = [row for row in table.rows if row["chosen"] == "products" and float(row["speedup"]) < 0.9]
    missed = [row for row in table.rows if row["chosen"] != "products" and float(row["speedup"]) > 1.1]
    for what, rows in ("products are chosen and slower", worse), ("torch's own is chosen and slower", missed):
        print(f"{what}: {len(rows)} of {len(table.rows)}")
        for row in rows:
            print("  " + ", ".join(f"{name} {row[name]}" for name in (*KEY, "speedup")))
    print(path)


def measure(row: dict[str, Any], arguments: Namespace) -> dict[str, Any]:
    """Milliseconds of each way."""
    import torch

    from aezoo.acceleration import flushed_denormals
    from aezoo.nets import conv2d

    from .measure import timed

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    few, many, stride, side = row["channels"], row["channels"] * row["stride"], row["stride"], row["side"]
    layer: Any
    if row["layer"] == "conv":
        layer = conv2d.Conv2d(few, many, 3, stride, 1)
        shape = (row["batch"], few, side * stride, side * stride)
    else:
        layer = conv2d.ConvTranspose2d(many, few, 3, stride, 1, stride - 1)
        shape = (row["batch"], many, side, side)
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()
    geometry = layer.geometry(x)
    ways = {"torch": super(type(layer), layer).forward, "products": lambda x: layer.by_products(x, geometry)}
    if row["layer"] == "transposed":
        ways["bias_apart"] = layer.with_bias_apart
    lower = torch.autocast("cpu", torch.bfloat16) if row["precision"] == "bf16" else contextlib.nullcontext()

    def step(way: Any) -> None:
        with lower:
            y = way(x)
        torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))

    with flushed_denormals():
        took = in_turns(
            {name: partial(timed, partial(step, way), x.device) for name, way in ways.items()}, arguments.repeats
        )
    found = {f"{name}_ms": 1000 * seconds for name, seconds in took.items()}
    chosen = "products" if conv2d.products_pay(layer, geometry.small) else "torch"
    usual = found.get("bias_apart_ms", found["torch_ms"])
    return {"chosen": chosen, **found, "speedup": usual / found["products_ms"]}


if __name__ == "__main__":
    run_script(main)
