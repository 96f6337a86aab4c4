"""Find the ratio of latents to active latents from which gathering a dictionary's rows beats a full product.

    python -m benchmarks.gather                           the whole grid on the fastest device
    python -m benchmarks.gather --accelerator cpu --threads 1

A row is one decoding of a code's active latents, forward and backward; both ways take turns. `dense_ms` and
`gather_ms` are medians over the repeats, and `ratio` is latents / k. The script ends by printing the smallest ratio
from which gathering is faster in every row, which `CROSSOVER` of `aezoo/nets/blocks/dictionary.py` stores for each type
of device.
"""

import itertools
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from .common import ResultsCSV, at_least, build_parser, command_line, environment, interleaved_medians, run_script

KEY = ("batch", "x_dim", "latents", "k", "threads")
_RATIOS = (4, 8, 16, 32, 64, 128, 256, 512)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the requested grid."""
    parser = build_parser("gather", __doc__)
    add = parser.add_argument
    add("--batch", nargs="+", type=at_least(1), default=[128, 1024], metavar="N", help="samples of a batch")
    add("--x_dim", nargs="+", type=at_least(1), default=[64, 784], metavar="N", help="data dimensions")
    add("--k", nargs="+", type=at_least(1), default=[8, 32], metavar="N", help="active latents of a sample")
    add("--ratios", nargs="+", type=at_least(1), default=[*_RATIOS], metavar="N", help="latents for each active one")
    add("--accelerator", default="auto", choices=("auto", "cpu", "gpu", "cuda"))
    add("--threads", type=at_least(1), default=1, help="threads on the CPU")
    add("--repeats", type=at_least(1), default=7, help="repeats after the warm-up")
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(words)
    path = arguments.results / f"gather-{environment(arguments)}.csv"
    table = ResultsCSV(path, KEY, command_line("gather", words), arguments.again)
    for batch, x_dim, k, ratio in itertools.product(arguments.batch, arguments.x_dim, arguments.k, arguments.ratios):
        row = {"batch": batch, "x_dim": x_dim, "latents": ratio * k, "k": k, "threads": arguments.threads}
        if table.needs(row):
            table.put(row | {"ratio": ratio} | measure(row, arguments))
    slower = [float(row["ratio"]) for row in table.rows if float(row["speedup"]) < 1]
    faster = [ratio for row in table.rows if (ratio := float(row["ratio"])) > max(slower, default=0)]
    print(f"gathering is faster in every row from {min(faster):g} on" if faster else "gathering is not always faster")
    print(path)


def measure(row: dict[str, int], arguments: Namespace) -> dict[str, Any]:
    """Milliseconds of both ways."""
    import torch

    from aezoo.nets.blocks.dictionary import Dictionary

    on_gpu = arguments.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dictionaries = {name: Dictionary(row["latents"], (row["x_dim"],), name).to(device) for name in ("dense", "gather")}
    values_Bk = torch.rand(row["batch"], row["k"], device=device, requires_grad=True)
    index_Bk = torch.rand(row["batch"], row["latents"], device=device).topk(row["k"]).indices
    grad_BX = torch.randn(row["batch"], row["x_dim"], device=device)

    def step(dictionary: Dictionary) -> None:
        dictionary.zero_grad()
        dictionary.decode_sparse(values_Bk, index_Bk).backward(grad_BX)
        if on_gpu:
            torch.cuda.synchronize()

    clocks = {name: partial(_timed, partial(step, dictionary)) for name, dictionary in dictionaries.items()}
    times = interleaved_medians(clocks, arguments.repeats)
    return {"dense_ms": times["dense"], "gather_ms": times["gather"], "speedup": times["dense"] / times["gather"]}


def _timed(step: Callable[[], None]) -> float:
    """Milliseconds per call, averaged over enough calls for the clock to resolve."""
    calls, took = 1, 0.0
    while took < 0.02:
        began = time.perf_counter()
        for _ in range(calls):
            step()
        took = time.perf_counter() - began
        calls *= 4
    return 1000 * took / (calls // 4)


if __name__ == "__main__":
    run_script(main)
