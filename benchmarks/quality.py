"""Train models until their validation loss stops improving and measure their quality: one CSV row per run.

    python -m benchmarks.quality                                    every model that suits the data, on mnist5k
    python -m benchmarks.quality --models dense_ae vae --code-sizes 8 16 32 64
    python -m benchmarks.quality --data fashion_mnist --root /usr/share/datasets --seeds 1 --jobs 2
    python -m benchmarks.quality --data fashion_mnist --root /usr/share/datasets --seeds 3 --top 10 --jobs 2
    python -m benchmarks.quality --data shapes --size 32 --rows 5000
    python -m benchmarks.quality --data digits --without-causes     models that may be behind PCA, see benchmarks.causes

There are three kinds of codes, which cannot be compared with each other. With --code-sizes 16, a code of kind numbers
has 16 numbers; of kind bits, 128 bits, as indices (as many as 16 numbers of 8 bits, each); of kind active, 16 of its
numbers differ from 0, if the model has a setting for it (otherwise the column l0 has their number, without numbers that
its decoder does not use). Models whose codes cannot have such a size are left out, with the reason. All other settings
are the models' defaults.

A run evaluates at most 4,000 validation samples every --interval steps, always with the same noise. It has converged
if the monitored figure has not fallen for --patience evaluations by --least of its fall since the first step. The
weights of the lowest figure are measured on the test split. monitor is the loss; for adversarial losses, whose values
also depend on the opponent, the negative ELBO or the nll. Evaluations start when the model's schedules of weights
and temperatures have ended. stopped is converged, capped (--most-seconds of training and evaluation: seconds of the
processor, not of the clock; one thread unless OMP_NUM_THREADS says otherwise) or diverged. Steps are not compiled.

mse, psnr and ssim are those of clean samples' reconstructions, loss, nll and bits_per_dim those of the model's own
objective. probe and knn are the shares of test samples whose class is predicted correctly from the code, by logistic
regression and by the 5 nearest neighbours. pixels_ and pca_ are the same for raw pixels and for PCA's code of that
size. PCA's error is the lowest that a linear code can reach: pca_mse of as many numbers, pca_mse_at_bits with each of
them rounded to 8 bits, pca_mse_at_l0 of as many numbers as a sparse code has active entries. fid compares 10,000
samples of the model's own prior (as many as there are training samples, if these are fewer) with training samples, rfid
the test samples' reconstructions with the test samples, in the space of `features`. Codes of more than 4,096 numbers
get no probe. A seed fixes the weights, the noise and the order of training; the splits are the same for all.

Rows are written one by one, and existing rows of the same model, code, seed and settings are kept: a command that was
interrupted continues where it stopped. A longer --most-seconds only repeats runs that were cut off by a shorter one.
--again repeats all. Every run is a separate process, so a crash affects one row, which records the reason. --top 10
measures further seeds only for the ten models of each kind that have the lowest mse at seed 0. Compare speeds only for
--jobs 1 on a quiet machine. With --without-causes, rows are in a CSV of their own, causes-*.csv.
"""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aezoo import registry
from aezoo.errors import AezooError

from . import common
from .bits import bits_per_sample, options_text
from .causes import without_cause
from .parallel import run_rows
from .quality_table import BASELINE, KEY, QualityTable, dataset_name

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
COLUMNS = (
    *("model", "family", "dataset", "kind", "size", "seed", "code_size", "bits", "l0", "options", "budget"),
    *("splits", "batch_size", "monitor", "stopped", "patience", "most_seconds", "best_epoch", "best_step"),
    "seconds_to_best",
    *("epochs", "steps", "seconds", "samples_per_s", "val", "loss", "nll", "mse", "psnr", "ssim", "bits_per_dim"),
    *("log_likelihood", "likelihood", "active_units", "active_share", "probe", "knn", "fid", "rfid", *BASELINE),
    *("pca_mse_at_l0", "features", "probe_rows", "importance_samples", "parameters", "peak_mb", "threads", "device"),
    *("note", "error"),
)
_BITS = 8
# models whose code is a map, of one channel here
_MAPS = ("asymmetric_kl", "autoencoder_kl", "consistency_decoder", "eq_vae", "taesd", "va_vae")
_MAP = "its code is a map or tokens of more numbers than that, with no setting for fewer"
_WHOLE = "it has no bottleneck"
_FROZEN = "its codes are features of a frozen network, and its decoder only shows them"
_RATE = "the length of its code depends on the sample and on lam: see `tasks --commands compress`"
# models without a code of the requested size
LEFT_OUT = {
    "diffusers_ae": "a frame for weights of diffusers, whose settings fix the code",
    "dncnn": _WHOLE,
    "noise2noise": _WHOLE,
    "noise2void": _WHOLE,
    "vdvae": "its code has several scales and more numbers than the sample",
    "ijepa": "it has no decoder",
    "mae": _MAP,
    "simmim": _MAP,
    "representation_ae": _MAP,
    "temporal_sae": "its samples are sequences: on samples of one position it equals topk_sae",
    **dict.fromkeys(("fre", "padim", "patchcore", "student_teacher", "reverse_distillation"), _FROZEN),
    **dict.fromkeys(registry.list_models(family="compression"), _RATE),
}


def code_settings(name: str, n: int, input_shape: tuple[int, ...]) -> tuple[str, dict[str, Any]]:
    """The kind of a model's code, and the hyperparameters that give it the size of n numbers of 8 bits.

    Raises:
        AezooError: no model is left; the message says why.
    """
    if name in LEFT_OUT:
        raise AezooError(LEFT_OUT[name])
    cls, known = registry.model_class(name), registry.hyperparameters(name)
    own = _own_settings(n).get(name, {})
    if name in _MAPS:
        return "numbers", {"latent_dim": 1} | grid(name, n, input_shape)
    if cls.sparse_code:
        sizes = {"k": n, "target_l0": float(n)}
        return "active", own or {key: value for key, value in sizes.items() if key in known}
    if "tokenizer" in known:
        vq_vae = {"model": "vq_vae", "codebook_size": 2**_BITS, **grid("vq_vae", n, input_shape)}
        return "bits", {"tokenizer": vq_vae}
    if cls.discrete_code and name != "qlae":
        map_ = grid(name, n, input_shape) if "net" in known else {}
        return "bits", (own or {"codebook_size": 2**_BITS}) | map_
    is_discrete = name in ("qlae", "categorical_vae", "semantic_hash_ae")
    return "bits" if is_discrete else "numbers", own or code_size_arguments(name, n)


def _own_settings(n: int) -> dict[str, dict[str, Any]]:
    """Settings of models for which `latent_dim`, `codebook_size` and `k` alone do not give the size."""
    joint, parts = {"latent_dim": n - 10}, {"latent_dim": n // 2, "private_dim": n // 4}
    levels, tokens = {"latent_dims": (n - n // 3, n // 3)}, {"n_tokens": max(1, n // 4), "latent_dim": min(n, 4)}
    cubes, channels = {"levels": (8, 6, 5)}, {"latent_dim": _BITS}
    return {
        # the ten numbers of the label, or of the discrete variable, are part of the code
        **dict.fromkeys(("conditional_vae", "semi_supervised_vae", "joint_vae"), joint),
        **dict.fromkeys(("cmvae", "dmvae", "mmvae_plus"), parts),
        "nexus": {"latent_dim": n // 2, "part_dim": n // 4},
        **dict.fromkeys(("hierarchical_vae", "ladder_vae", "mhvae"), levels),
        **dict.fromkeys(("maetok", "soft_vq"), tokens),
        "categorical_vae": {"n_variables": n * _BITS // 2, "n_classes": 4},
        "semantic_hash_ae": {"latent_dim": n * _BITS},
        "qlae": {"latent_dim": 2 * n, "n_values": 2 ** (_BITS // 2)},
        "rq_vae": {"levels": 2, "codebook_size": 2 ** (_BITS // 2)},
        **dict.fromkeys(("fsq_vae", "fsp_vae"), cubes),
        **dict.fromkeys(("lfq_vae", "bsq_vae"), channels),
        "titok": {"n_tokens": n, "codebook_size": 2**_BITS},
        # a grid of n places and one of half its sides, with as many bits together
        "vq_vae_2": {"codebook_size": round(2 ** (_BITS / 1.25))},
        "sparse_ae_kl": {"rho": n / 256},
        "wta_ae": {"lifetime": n / 256},
    }


def grid(name: str, n: int, input_shape: tuple[int, ...]) -> dict[str, Any]:
    """`hidden_dims` of a convolutional model whose code is a square map of n places.

    Its default widths, of as many halvings as that takes; further ones have the last width.

    Raises:
        AezooError: no number of halvings gives such a map.
    """
    side = math.isqrt(n)
    stages = round(math.log2(max(input_shape[-1] / side, 1)))
    sides = {math.ceil(length / 2**stages) for length in input_shape[1:]}
    if side**2 != n or len(input_shape) != 3 or sides != {side}:
        raise AezooError(f"samples of {input_shape} cannot be halved to a map of {n} places")
    model: Any = registry.create_model(name, input_shape)
    widths = (*model.hparams["hidden_dims"],)
    return {"hidden_dims": (*widths, *widths[-1:] * stages)[:stages]}


def code_size_arguments(name: str, size: int | None) -> dict[str, Any]:
    """Hyperparameters that give a model's code `size` numbers; empty if its code has no such setting."""
    known = registry.hyperparameters(name)
    if size is None or "latent_dim" not in known:
        return {}
    # for a map, latent_dim would be the number of channels
    return {"latent_dim": size} | ({"latent_map": False} if "latent_map" in known else {})


def plan(arguments: argparse.Namespace, data: dict[str, Any], input_shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """The runs: a spec for each row, with the row's first columns. What has no such code is skipped with a message."""
    from .convergence import Budget

    budget = Budget(arguments.interval, arguments.patience, arguments.least, arguments.most_seconds)
    spec = {
        "data": data,
        "budget": budget,
        "precision": PRECISIONS[arguments.precision],
        "accelerator": arguments.accelerator,
        "probe_rows": arguments.probe_rows,
        "importance_samples": arguments.importance_samples,
    }
    fixed: dict[str, Any] = {"dataset": dataset_name(data), "budget": budget.as_text()}
    fixed |= {"batch_size": data["batch_size"], "probe_rows": arguments.probe_rows}
    fixed |= {"importance_samples": arguments.importance_samples, "patience": arguments.patience * arguments.interval}
    fixed["most_seconds"] = arguments.most_seconds
    specs: list[dict[str, Any]] = []
    for entry in map(registry.find, arguments.models or registry.list_models()):
        changes = without_cause(entry.name, input_shape) if arguments.without_causes else {}
        if arguments.without_causes and not changes:
            continue
        for size in arguments.code_sizes:
            try:
                columns, hyperparameters = code_columns(entry.name, size, input_shape, changes)
            except AezooError as error:
                print(f"{entry.name} is left out at code size {size}: {error}", file=sys.stderr)
                continue
            run = {"model": entry.name, "hyperparameters": hyperparameters}
            row = {"model": entry.name, "family": entry.family, **columns, **fixed}
            specs += [spec | run | {"seed": i, "row": row | {"seed": i}} for i in range(arguments.seeds)]
    if not specs:
        raise AezooError(f"no model is left to train on {data['name']}: `aezoo list` shows all")
    # sorted by seed: an interrupted run has results for every model
    return sorted(specs, key=lambda spec: int(spec["seed"]))


def code_columns(
    name: str, size: int, input_shape: tuple[int, ...], changes: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns that describe a model's code, and its hyperparameters, of which `changes` are not the defaults.

    Raises:
        AezooError: the model has no code of this size.
    """
    kind, hyperparameters = code_settings(name, size, input_shape)
    hyperparameters |= changes
    model: Any = registry.create_model(name, input_shape, **hyperparameters)
    code_size = math.prod(model.code_shape)
    if kind == "numbers" and code_size != size and not changes:
        raise AezooError(f"its code has {code_size} numbers, and no setting for {size}")
    row = {"kind": kind, "size": size, "code_size": code_size, "options": options_text(hyperparameters)}
    if kind == "bits":
        row["bits"] = bits_per_sample(model) if hasattr(model, "codebooks") else float(size * _BITS)
    return row, hyperparameters


def only_best(specs: list[dict[str, Any]], table: QualityTable, top: int) -> list[dict[str, Any]]:
    """The specs of seed 0, and of other seeds for the `top` models of each kind with the lowest error."""
    found: dict[tuple[str, int], list[tuple[float, str]]] = {}
    for spec in specs:
        row = table.find(spec["row"])
        if not spec["seed"] and row is not None and (mse := common.number(row, "mse")) is not None:
            found.setdefault((row["kind"], int(row["size"])), []).append((mse, row["model"]))
    best = {(*kind, name) for kind, of in found.items() for _, name in sorted(of)[:top]}
    key = ("kind", "size", "model")
    return [spec for spec in specs if not spec["seed"] or tuple(spec["row"][name] for name in key) in best]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = common.build_parser("quality", __doc__)
    add, count = parser.add_argument, common.at_least(1)
    add("--models", nargs="+", metavar="NAME", help="models to train (default: all that suit the data)")
    add("--data", default="mnist5k", help="a name or a path that --data.name of `aezoo fit` takes")
    add("--root", default="data", help="folder of the data set's files or of its download")
    add("--size", type=count, help="resize images to this side")
    add("--rows", type=count, metavar="N", help="use at most this many samples of each split")
    add("--batch-size", type=count, default=128)
    add("--code-sizes", type=count, nargs="+", metavar="N", default=[16], help="sizes of codes (default 16)")
    add("--interval", type=count, default=200, metavar="N", help="steps between two evaluations (default 200)")
    add(
        "--patience",
        type=count,
        default=10,
        metavar="N",
        help="evaluations without improvement that end a run (default 10)",
    )
    add("--least", type=float, default=5e-4, metavar="SHARE", help="least improvement, see below (default 0.0005)")
    add("--most-seconds", type=common.seconds, default=300.0, help="end a run after this long (default 300)")
    add("--without-causes", action="store_true", help="train models without the causes of errors above PCA's")
    add("--top", type=count, metavar="N", help="seeds above 0 only for the N best models of each kind")
    add("--probe-rows", type=count, default=10_000, help="maximum training codes of a classifier (default 10000)")
    add("--importance-samples", type=count, default=100, help="draws for each log_likelihood (default 100)")
    add("--precision", choices=PRECISIONS, default="fp32", help="arithmetic of training and test")
    # wall-clock time, which includes delays by other load
    common.add_run_flags(parser, "run", timeout=43_200)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the requested rows that do not exist yet."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    data, options = common.download_data(arguments.data, arguments.root, arguments.batch_size, arguments.size)
    options |= {"rows": arguments.rows}
    specs = plan(arguments, options, data.input_shape)
    prefix = "causes" if arguments.without_causes else "quality"
    path = f"{prefix}-{specs[0]['row']['dataset']}-{common.environment(arguments, arguments.precision)}.csv"
    table = QualityTable(arguments.results / path, KEY, common.command_line("quality", argv), arguments.again)
    if arguments.top:
        specs = only_best(specs, table, arguments.top)
    # PCA with as many numbers as a sample is no baseline
    sizes = {size for size in arguments.code_sizes if size < math.prod(data.input_shape)}
    sizes |= {0} if data.num_classes else set()
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, table, specs, options, sizes, Path(folder) / "features")
    print(table.path)


def measure(
    arguments: argparse.Namespace,
    table: QualityTable,
    specs: list[dict[str, Any]],
    data: dict[str, Any],
    sizes: set[int],
    features: Path,
) -> None:
    """Measure the missing baselines and rows.

    Args:
        arguments: the command line.
        table: receives the rows.
        specs: see `plan`.
        data: the DataModule's arguments.
        sizes: codes of PCA that are baselines, and 0 for raw pixels.
        features: a file for the feature space of FID, which all runs share.
    """

    def run(specs: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        return run_rows("quality_row", specs, arguments.timeout, arguments.jobs, arguments.accelerator)

    baselines: dict[int, dict[str, Any]] = {**table.baselines(arguments.probe_rows)}
    # also for existing rows, whose baselines may have failed
    missing = sorted(sizes - baselines.keys())
    specs = [spec for spec in specs if table.needs(spec["row"])]
    shared = {"data": data, "probe_rows": arguments.probe_rows, "sizes": missing, "features": str(features)}
    for _, found in run([shared] if missing or specs else []):
        if found.get("error"):
            print(f"figures of raw pixels and PCA, and FID, are missing: {found['error']}", file=sys.stderr)
        baselines |= {int(size): columns for size, columns in found.get("baselines", {}).items()}
    table.fill_baselines(baselines, arguments.probe_rows)
    specs = [spec | {"features": str(features) if features.exists() else ""} for spec in specs]
    for i, (spec, row) in enumerate(run(specs), start=1):
        row |= baselines.get(0, {}) | baselines.get(spec["row"]["size"], {}) | spec["row"]
        table.put({name: row.get(name) for name in COLUMNS})
        figures = [f"{name} {common.as_text(row.get(name))}" for name in ("mse", "pca_mse", "probe", "seconds")]
        head = f"[{i}/{len(specs)}] {row['model']}, {row['kind']} {row['size']}, seed {row['seed']}"
        print(f"{head}: {row.get('error') or ', '.join([str(row.get('stopped')), *figures])}", flush=True)


if __name__ == "__main__":
    common.run_script(main)
