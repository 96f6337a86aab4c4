"""Reconstruction error at equal bits: every quantised model with the same networks and grid, one CSV row per run.

    python -m benchmarks.bits                                             all models, 6 and 8 bits per place, mnist5k
    python -m benchmarks.bits --data fashion_mnist --root /usr/share/datasets --rows 5000 --epochs 8 --jobs 2
    python -m benchmarks.bits --models vq_vae fsq_vae --bits 4 10 --seeds 5

bits is the number of bits of a sample's indices, log2 K each: 294 with --bits 6 and 7x7 places. It is as equal
across models as their codebook sizes allow. vq_vae has K = 2^bits codes, lfq_vae and bsq_vae have `bits` channels of
one bit, and fsq_vae has the levels of the paper's table 5. rq_vae has two levels, and vq_vae with n_groups has two
groups, with half the bits each. qlae has a vector of twice as many numbers as there are places, with half the bits
each. vq_vae_2 has two grids with smaller codebooks, and titok has as many tokens as there are places. used_bits are the
bits that an ideal entropy code needs, given how often the test split chooses each code, for each place and codebook
separately. usage and perplexity are means over codebooks.

Errors are measured on the test split with the model after its last step. All models have the net conv, except titok,
which is a transformer. All other settings are each model's defaults, except that temperatures and weights with a
schedule change over the first half of training. A seed fixes weights, noise and order; the splits are the same for all.

Existing rows are kept; --again measures them again. Every run has its own process.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

from aezoo import registry
from aezoo.errors import AezooError

from . import common, parallel
from .quality_table import dataset_name

NET: dict[str, Any] = {"net": "conv", "hidden_dims": (32, 64)}
# with the default width of 64 this transformer takes as long as all other models together
TITOK = {"width": 32, "decoder_width": 32}
# as in table 5 of https://arxiv.org/abs/2309.15505
FSQ_LEVELS = {4: (5, 3), 6: (8, 8), 8: (8, 6, 5), 10: (8, 5, 5, 5), 12: (7, 5, 5, 5, 5), 14: (8, 8, 8, 6, 5)}
KEY = ("model", "options", "seed", "bits_per_place", "budget", "batch_size", "rows", "most_seconds")
FIGURES = ("mse", "psnr", "ssim", "usage", "perplexity", "used_bits", "loss", "seconds")
COLUMNS = (
    *(
        "model",
        "options",
        "dataset",
        "seed",
        "bits_per_place",
        "bits",
        "budget",
        "batch_size",
        "rows",
        "epochs",
        "steps",
    ),
    *("most_seconds", *FIGURES, "parameters", "threads", "device", "error"),
)


def settings(bits: int, places: int) -> list[tuple[str, dict[str, Any]]]:
    """Models with settings that give a sample places x bits; vq_vae with all its codebook updates and estimators.

    Args:
        bits: bits per place; even.
        places: places of the grid.
    """
    size = {"codebook_size": 2**bits}
    return [
        ("vq_vae", size),
        ("vq_vae", size | {"update": "gradient"}),
        ("vq_vae", size | {"cosine": True}),
        ("vq_vae", size | {"estimator": "rotation"}),
        ("vq_vae", size | {"estimator": "gumbel"}),
        ("vq_vae", size | {"estimator": "diveq", "update": "gradient"}),
        ("vq_vae", {"codebook_size": 2 ** (bits // 2), "n_groups": 2}),
        ("vq_vae_2", {}),
        ("rq_vae", {"levels": 2, "codebook_size": 2 ** (bits // 2)}),
        ("sim_vq_vae", size),
        ("fvq_vae", size),
        ("vp_vae", size),
        ("gumbel_vq_vae", size),
        ("dvae", size),
        ("sq_vae", size),
        ("fsq_vae", {"levels": FSQ_LEVELS[bits]}),
        ("fsp_vae", {"levels": FSQ_LEVELS[bits]}),
        ("qlae", {"latent_dim": 2 * places, "n_values": 2 ** (bits // 2)}),
        ("lfq_vae", {"latent_dim": bits}),
        ("bsq_vae", {"latent_dim": bits}),
        ("titok", size | {"n_tokens": places, **TITOK}),
    ]


def plan(arguments: argparse.Namespace, data: dict[str, Any], input_shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """The runs: a spec for each row, with the row's first columns; sorted by seed."""
    names = [registry.find(name).name for name in arguments.models or dict(settings(6, 1))]
    other = next((name for name in names if name not in dict(settings(6, 1))), None)
    if other is not None:
        raise AezooError(f"{other} is not a quantised model; this benchmark is for {', '.join(dict(settings(6, 1)))}")
    places = math.prod(registry.create_model("vq_vae", input_shape, **NET).code_shape[1:])
    fixed = {"dataset": dataset_name(data | {"rows": None}), "budget": f"epochs={arguments.epochs}"}
    fixed |= {"batch_size": data["batch_size"], "rows": data["rows"] or "all"}
    fixed |= {"most_seconds": arguments.most_seconds}
    specs = []
    for bits in arguments.bits:
        for model, options in settings(bits, places):
            if model not in names:
                continue
            net = {key: value for key, value in NET.items() if key in registry.hyperparameters(model)}
            if model == "vq_vae_2":
                codes = bits_per_sample(registry.create_model(model, input_shape, codebook_size=2, **net))
                options = {"codebook_size": round(2 ** (bits * places / codes))}
            found = bits_per_sample(registry.create_model(model, input_shape, **net, **options))
            row = {"model": model, "options": options_text(options), "bits_per_place": bits, "bits": found, **fixed}
            spec = {"data": data, "hyperparameters": net | options, "epochs": arguments.epochs}
            spec |= {"most_seconds": arguments.most_seconds, "accelerator": arguments.accelerator}
            specs += [spec | {"row": row | {"seed": seed}} for seed in range(arguments.seeds)]
    return sorted(specs, key=lambda spec: int(spec["row"]["seed"]))


def bits_per_sample(model: Any) -> float:
    """The number of bits of a sample's indices."""
    import torch

    codebooks = model.codebooks(torch.zeros(1, *model.index_shape, dtype=torch.long))
    return sum(math.prod(index.shape[2:]) * math.log2(size) for index, sizes in codebooks.values() for size in sizes)


def options_text(options: dict[str, Any]) -> str:
    """Hyperparameters as the text of a cell."""
    return " ".join(
        f"{key}={'x'.join(map(str, value)) if isinstance(value, tuple) else value}" for key, value in options.items()
    )


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = common.build_parser("bits", __doc__)
    add, count = parser.add_argument, common.at_least(1)
    add("--models", nargs="+", metavar="NAME", help="models to train (default: all quantised ones)")
    add("--bits", nargs="+", type=int, choices=[*FSQ_LEVELS], default=[6, 8], help="bits per place (default 6 8)")
    add("--data", default="mnist5k", help="a name or a path that --data.name of `aezoo fit` takes")
    add("--root", default="data", help="folder of the data set's files or of its download")
    add("--rows", type=count, metavar="N", help="use at most this many samples for training and for the test")
    add("--batch-size", type=count, default=128)
    add("--epochs", type=count, default=10, help="budget of each run (default 10)")
    add("--most-seconds", type=common.seconds, help="end a run after this many seconds of training")
    common.add_run_flags(parser, "row", timeout=3600)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the requested rows that do not exist yet."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    data, options = common.download_data(arguments.data, arguments.root, arguments.batch_size)
    specs = plan(arguments, options | {"rows": arguments.rows}, data.input_shape)
    path = f"bits-{specs[0]['row']['dataset']}-{common.environment(arguments)}.csv"
    table = common.ResultsCSV(arguments.results / path, KEY, common.command_line("bits", argv), arguments.again)
    parallel.measure_missing(table, "bits_row", specs, arguments, COLUMNS, ("mse", "usage", "perplexity", "seconds"))
    print(table.path)


if __name__ == "__main__":
    common.run_script(main)
