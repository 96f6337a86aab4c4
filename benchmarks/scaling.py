"""How time and memory grow with samples, code size, width, image size and codebook size, also for each command.

    python -m benchmarks.scaling                                  all axes on the CPU, one thread
    python -m benchmarks.scaling --axes image_size codebook
    python -m benchmarks.scaling --axes reconstruct detect --most 10000

A row is one process that trains a model or runs a command, at one value of an axis with everything else fixed. The
time is that of an epoch (axis `samples`), of a training step (forward, backward and optimiser; other axes of models),
or of a whole call of a command's Python function with its defaults, which writes its results into a folder. memory_mb
is the peak memory of the process minus its memory before the measurement. Models are trained on random bytes; commands
run on handwritten digits (mnist5k) that are moved by up to two pixels, so that there are 100,000 different ones. The
report fits c n^a to time and memory at the three largest values of an axis and shows the exponents a.

Existing rows are kept; --again measures them again.
"""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import common
from .processes import run_row

KEY = ("axis", "value", "model", "threads", "device")
COLUMNS = (*KEY, "unit", "milliseconds", "low", "high", "memory_mb", "repeats", "error")
COMMANDS = ("reconstruct", "generate", "denoise", "detect", "embed", "compress", "decompress")


class Axis(NamedTuple):
    """The quantity that is varied, with everything else fixed.

    Attributes:
        values: from the smallest to the largest.
        models: names in the registry, each with its hyperparameters.
        setting: the hyperparameter that takes the value; empty for other quantities.
        shape: shape of a sample.
        batch: samples of a step.
    """

    values: tuple[int, ...]
    models: dict[str, dict[str, Any]]
    setting: str = ""
    shape: tuple[int, ...] = (1, 28, 28)
    batch: int = 128


_CONV = {"net": "conv", "hidden_dims": [32, 64, 128], "latent_dim": 16}
AXES: dict[str, Axis] = {
    "samples": Axis((1_000, 3_000, 10_000, 30_000, 100_000), {"vae": {}, "conv_ae": {}}),
    "code_size": Axis((2, 8, 32, 128, 512, 2048), {"vae": {}, "topk_sae": {"k": 2}}, "latent_dim"),
    "width": Axis((64, 128, 256, 512, 1024, 2048), {"vae": {"latent_dim": 16}}, "hidden_dims"),
    "image_size": Axis((32, 64, 128, 256), {"vae": _CONV, "vq_vae": {}}, "side", (3, 32, 32), 16),
    "codebook": Axis((64, 256, 1024, 4096, 16384, 65536), {"vq_vae": {}, "sim_vq_vae": {}}, "codebook_size", batch=32),
    **{command: Axis((1_000, 10_000, 100_000), {"vae": {"latent_dim": 10}}) for command in COMMANDS},
}


def plan(axes: Sequence[str], most: int, arguments: Any) -> list[dict[str, Any]]:
    """A spec for each row; for `samples` and the commands, values above `most` are left out."""
    specs = []
    for name in axes:
        axis = AXES[name]
        counted = name == "samples" or name in COMMANDS
        for model, hyperparameters in axis.models.items():
            for value in axis.values:
                if counted and value > most:
                    continue
                row = {"axis": name, "value": value, "model": model, "threads": arguments.threads, "device": "cpu"}
                row["unit"] = "epoch" if name == "samples" else "call" if name in COMMANDS else "step"
                settings = dict(hyperparameters)
                shape = [*axis.shape]
                if axis.setting == "side":
                    shape = [axis.shape[0], value, value]
                elif axis.setting:
                    settings[axis.setting] = [value, value] if axis.setting == "hidden_dims" else value
                spec = {"row": row, "settings": settings, "shape": shape, "batch": axis.batch}
                specs.append(spec | {"repeats": arguments.repeats, "seed": arguments.seed})
    return specs


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the requested rows that do not exist yet."""
    argv = sys.argv[1:] if argv is None else argv
    parser = common.build_parser("scaling", __doc__)
    add, count = parser.add_argument, common.at_least(1)
    add("--axes", nargs="+", choices=[*AXES], default=[*AXES], metavar="NAME", help=f"of {', '.join(AXES)}")
    add("--most", type=count, default=100_000, help="most samples of an epoch and of a command (default 100000)")
    add("--threads", type=count, default=1, help="threads (default 1)")
    add("--repeats", type=count, default=5, help="timed repeats after the warm-up; of a command at most 3 (default 5)")
    add("--seed", type=int, default=0)
    add("--timeout", type=common.seconds, default=1800.0, help="give up a row after this many seconds (default 1800)")
    arguments = parser.parse_args(argv)
    path = arguments.results / f"scaling-{common.environment(arguments, accelerator='cpu')}.csv"
    table = common.ResultsCSV(path, KEY, common.command_line("scaling", argv), arguments.again)
    specs = [spec for spec in plan(arguments.axes, arguments.most, arguments) if table.needs(spec["row"])]
    threads = {"OMP_NUM_THREADS": str(arguments.threads)}
    for i, spec in enumerate(specs, start=1):
        row = {**run_row("scaling_row", spec, arguments.timeout, threads, warm=True), **spec["row"]}
        table.put({name: row.get(name) for name in COLUMNS})
        figures = [f"{name} {common.as_text(row[name])}" for name in ("milliseconds", "memory_mb") if name in row]
        head = f"[{i}/{len(specs)}] {row['axis']} {row['value']}, {row['model']}"
        print(f"{head}: {row.get('error') or ', '.join(figures)}", flush=True)
    print(table.path)


if __name__ == "__main__":
    common.run_script(main)
