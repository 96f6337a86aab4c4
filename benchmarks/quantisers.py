"""Speed of quantisers in training, compared with vector-quantize-pytorch: one CSV row per kind and number of codes.

    python -m benchmarks.quantisers                                         all kinds, 512 to 65,536 codes
    python -m benchmarks.quantisers --kinds vq_ema rvq --codes 1024 --threads 2 --repeats 9
    pip install vector-quantize-pytorch                                     without it, its columns are empty

Each row is a separate process, in which both parties take turns on the same maps of 32x32 places with the same codes,
in training mode. `forward` computes codes and loss terms of z, which requires a gradient; `step` adds the backward pass
from both. Speeds are places per second, as medians over the rounds. A ratio is our speed divided by theirs within a
round; its median, lowest and highest are given. memory_mb is the peak memory of a step beyond what was allocated
before it. same_codes is the share of places at which both give the same code, before training.

Neither side uses k-means initialisation, replaces dead codes, projects, or uses more than the plain straight-through
estimator. The differences: for vq and rvq, theirs keeps N x K one-hot rows in training. rvq has two levels, and theirs
passes a gradient at each. Our fsq rounds at the same points as the paper's code and theirs does not, so codes differ
for even levels. lfq's entropy over all codes is exact in theirs; ours is a bound from groups of bits from 11 bits on.
The loss terms of sim_vq and rvq are means in theirs and sums in ours.

Existing rows are kept; --again measures them again.
"""

import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from aezoo.errors import AezooError

from . import common
from .processes import run_row

KINDS = ("vq_ema", "vq_cosine", "vq_gradient", "rvq", "sim_vq", "fsq", "lfq")
# kinds whose codes are all combinations of a few values; the number of codes is a power of 2 here
_POWERS_OF_2 = ("fsq", "lfq")
CODES = (512, 4096, 16384, 65536)
SIDE = 32
KEY = ("kind", "codes", "dim", "batch", "threads", "device")
PARTIES = ("", "peer_")
TIMED = ("forward", "step")
COLUMNS = (
    *(*KEY, "places"),
    *(f"{party}{work}_per_s" for work in TIMED for party in PARTIES),
    *(f"{work}_ratio{end}" for work in TIMED for end in ("", "_min", "_max")),
    *("memory_mb", "peer_memory_mb", "same_codes", "repeats", "peer", "peer_error", "seconds", "error"),
)


def plan(arguments: Namespace, device: str) -> list[dict[str, Any]]:
    """The runs: a spec for each row."""
    specs = []
    for kind in arguments.kinds:
        for codes in arguments.codes:
            bits = round(math.log2(codes))
            if kind in _POWERS_OF_2 and (2**bits != codes or bits < 2):
                raise AezooError(f"{kind} has a power of 2 of codes, at least 4, not {codes}: leave it out of --kinds")
            # a channel of an FSQ has 8 values, or 4 where the number of codes requires it
            dim = {"fsq": math.ceil(bits / 3), "lfq": bits}.get(kind, arguments.dim)
            batch = arguments.batch or (16 if device == "cuda" else 1)
            row = {"kind": kind, "codes": codes, "dim": dim, "batch": batch, "device": device}
            row |= {"threads": arguments.threads, "places": batch * SIDE**2}
            spec = {name: getattr(arguments, name) for name in ("repeats", "seconds", "seed")}
            specs.append(spec | {"row": row, "side": SIDE})
    return specs


def parse_arguments(argv: Sequence[str]) -> Namespace:
    """Read the command line."""
    parser = common.build_parser("quantisers", __doc__)
    add, count = parser.add_argument, common.at_least(1)
    add(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=[*KINDS],
        metavar="NAME",
        help=f"kinds of quantisers, of {', '.join(KINDS)}",
    )
    add("--codes", nargs="+", type=common.at_least(2), default=[*CODES], metavar="K", help="numbers of codes")
    add("--dim", type=count, default=32, help="channels of z, for kinds that do not determine it (default 32)")
    add("--batch", type=count, help=f"maps of {SIDE}x{SIDE} places (default 1 on the CPU, 16 on a GPU)")
    add("--accelerator", default="auto", choices=("auto", "cpu", "gpu"))
    add("--threads", type=count, default=1, help="threads on the CPU (default 1)")
    add("--repeats", type=count, default=7, help="maximum number of rounds after the warm-up (default 7)")
    add(
        "--seconds",
        type=common.seconds,
        default=60.0,
        help="start no further round of a row after this time (default 60)",
    )
    add("--seed", type=int, default=0)
    add("--timeout", type=common.seconds, default=1800.0, help="give up a row after this many seconds (default 1800)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the requested rows that do not exist yet."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    import torch

    if arguments.accelerator == "gpu" and not torch.cuda.is_available():
        raise AezooError("no CUDA device was found: use --accelerator cpu")
    device = "cuda" if arguments.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    path = f"quantisers-{common.environment(arguments)}.csv"
    table = common.ResultsCSV(arguments.results / path, KEY, common.command_line("quantisers", argv), arguments.again)
    specs = [spec for spec in plan(arguments, device) if table.needs(spec["row"])]
    threads = {"OMP_NUM_THREADS": str(arguments.threads)}
    for i, spec in enumerate(specs, start=1):
        row = {**run_row("quantisers_row", spec, arguments.timeout, threads, warm=True), **spec["row"]}
        table.put({name: row.get(name) for name in COLUMNS})
        figures = [f"{name} {common.as_text(row.get(name))}" for name in COLUMNS[7:] if row.get(name) is not None]
        head = f"[{i}/{len(specs)}] {row['kind']}, {row['codes']} codes"
        print(f"{head}: {row.get('error') or ', '.join(figures)}", flush=True)
    if any(not row.get("peer") and not row.get("error") for row in table.rows):
        print("rows without a peer: pip install vector-quantize-pytorch, then --again")
    print(table.path)


if __name__ == "__main__":
    common.run_script(main)
