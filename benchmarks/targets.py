"""The targets of the benchmarks, and the figures in the CSVs for them: one row per target.

A ratio between two parties is that of their rates in the same round, so slow phases of the machine affect both.
"""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from .common import as_number, number

Row = dict[str, str]
Files = Mapping[str, Sequence[Row]]


class Measurement(NamedTuple):
    """A measured figure: median, lowest and highest, and the name of the best variant if there are several."""

    median: float
    low: float
    high: float
    note: str = ""


class Target(NamedTuple):
    """One requirement.

    Attributes:
        what: description for the reader.
        file: prefix of the name of the CSV that contains the figure, up to torch's version.
        bound: the figure to reach.
        measure: computes the figure from that CSV's rows; None if they do not have it.
        at_most: whether less is better.
        other_compilation: the same figure with the opposite choice of compiling the zoo's step, for comparison.
        gpu: True: read from files of a GPU and shown if there is one; False: from other files; None: from all.
    """

    what: str
    file: str
    bound: float
    measure: Callable[[Sequence[Row]], Measurement | None]
    at_most: bool = False
    other_compilation: Callable[[Sequence[Row]], Measurement | None] | None = None
    gpu: bool | None = None

    def matches(self, stem: str) -> bool:
        """Whether a CSV of that name contains the figure."""
        on_gpu = not re.search(r"-pt[\d.]+-(cpu\d|mps)", stem)
        return stem.startswith(self.file) and self.gpu in (None, on_gpu)

    def is_reached(self, found: Measurement) -> bool:
        """Whether the median is on the right side of the bound."""
        return found.median <= self.bound if self.at_most else found.median >= self.bound


# ---- peers ----------------------------------------------------------------------------------------------------------


def round_rates(row: Row) -> list[float | None]:
    """Samples per second of each round; None for a failed round."""
    return [as_number(text) for text in row.get("round_rates", "").split()]


def ratio_between(ours: str, other: str, note: str = "") -> Callable[[Sequence[Row]], Measurement | None]:
    """Rate of one party divided by that of another, round by round."""

    def measure(rows: Sequence[Row]) -> Measurement | None:
        # parties whose losses do not agree are not compared
        by_party = {row["party"]: round_rates(row) for row in rows if row.get("agrees") == "yes"}
        pairs = zip(by_party.get(ours, []), by_party.get(other, []), strict=False)
        ratios = [a / b for a, b in pairs if a and b]
        return Measurement(statistics.median(ratios), min(ratios), max(ratios), note) if ratios else None

    return measure


def _peers(
    workload: str, precision: str, bounds: Mapping[str, float], compiled: bool = False, gpu: bool = False
) -> list[Target]:
    """Targets of a long run, compiled or not as `--compile auto` decides; on a GPU with reduce-overhead."""
    ours, otherwise = ("aezoo_compiled", "aezoo") if compiled or gpu else ("aezoo", "aezoo_compiled")
    note = "reduce-overhead" if gpu else "compiled" if compiled else ""
    return [
        Target(
            f"{workload}, {precision}{', on a GPU' if gpu else ''}: aezoo / {party}",
            f"peers-{workload}-{precision}-",
            bound,
            ratio_between(ours, party, note),
            other_compilation=ratio_between(otherwise, party),
            gpu=gpu,
        )
        for party, bound in bounds.items()
    ]


# ---- speed ----------------------------------------------------------------------------------------------------------


def gemm_share(name: str) -> Callable[[Sequence[Row]], Measurement | None]:
    """Share of a training step that its matrix products take at the measured peak; from the row with the largest."""

    def measure(rows: Sequence[Row]) -> Measurement | None:
        found = []
        for row in rows:
            note = f"compile {row.get('compile')}, {row.get('threads')} thread(s)"
            share, rate = number(row, "gemm_floor_share"), number(row, "samples_per_s")
            low, high = number(row, "samples_per_s_low"), number(row, "samples_per_s_high")
            alone = row.get("devices") == "1" and row.get("interface") != "off"
            if row.get("name") == name and alone and share and rate and low and high:
                found.append(Measurement(share, share * low / rate, share * high / rate, note))
        return max(found, default=None)

    return measure


def cell(where: Mapping[str, str], name: str) -> Callable[[Sequence[Row]], Measurement | None]:
    """A figure with its spread, from the row with these cells."""

    def measure(rows: Sequence[Row]) -> Measurement | None:
        for row in rows:
            if all(row.get(key) == value for key, value in where.items()) and (middle := number(row, name)) is not None:
                low, high = number(row, f"{name}_low"), number(row, f"{name}_high")
                return Measurement(middle, middle if low is None else low, middle if high is None else high)
        return None

    return measure


def _inference() -> list[Target]:
    file, found = "speed-infer-fp32-", []
    for name in ("dense_article", "conv_vae_28", "conv_vae_64"):
        for what, column, bound in (
            ("encode / bare network", "encode_ratio", 0.95),
            ("reconstruct / bare network", "reconstruct_ratio", 0.95),
            ("Trainer's predict / bare loop", "predict_ratio", 0.9),
        ):
            measure = cell({"name": name, "compile": "off"}, column)
            found.append(Target(f"{name}: {what}", file, bound, measure))
    return found


TARGETS: tuple[Target, ...] = (
    *_peers(
        "dense",
        "fp32",
        {"loop": 0.95, "lightning": 2.0, "keras_torch": 2.0, "pytorch_vae": 2.0, "pythae": 1.4, "keras_jax": 1.0},
        compiled=True,
    ),
    *(
        Target(
            f"dense, fp32, {rows // 64} steps per epoch: time outside of training / time",
            f"peers-dense{rows}rows-fp32-",
            0.1,
            cell({"party": "aezoo", "batch": "64"}, "outside_share"),
            at_most=True,
        )
        for rows in (640, 3840, 32_000)
    ),
    # Keras runs at fp32 here too; its own bf16 is in the table of the same run
    *_peers("dense", "bf16", {"keras_jax": 1.3}, compiled=True),
    *_peers("conv28", "fp32", {"loop": 0.95, "pythae": 1.3, "lightning": 1.3, "keras_tensorflow": 1.1}),
    *_peers(
        "conv64",
        "fp32",
        {"loop": 0.95, "pythae": 1.8, "pytorch_vae": 1.8, "lightning": 1.8, "keras_tensorflow": 1.1},
    ),
    *_peers("conv64", "bf16", {"pythae": 2.4, "pytorch_vae": 2.4, "lightning": 2.4}),
    *_peers("dense", "fp32", {"loop_graph": 0.9, "lightning": 10.0}, gpu=True),
    *_peers("conv28", "fp32", {"loop_graph": 0.9, "lightning": 10.0}, gpu=True),
    Target(
        "dense_article: matrix products at measured peak / step",
        "speed-train-fp32-",
        0.6,
        gemm_share("dense_article"),
    ),
    *(
        Target(
            f"{name}: fault guard / step",
            "speed-train-fp32-",
            0.01,
            cell({"name": name, "compile": "off", "devices": "1"}, "guard_share"),
            at_most=True,
        )
        for name in ("dense_article", "conv_vae_28", "conv_vae_64")
    ),
    *(
        Target(
            f"{name}: interface / step",
            "speed-train-fp32-",
            0.02,
            cell({"name": name, "compile": mode, "devices": "1"}, "interface_share"),
            at_most=True,
        )
        for name, mode in (("dense_article", "default"), ("conv_vae_28", "off"), ("conv_vae_64", "off"))
    ),
    *_inference(),
    Target(
        "first step of `aezoo fit -c dense_article --compile off` / imports",
        "speed-startup-fp32-",
        1.3,
        cell({"what": "aezoo fit -c dense_article --compile off"}, "ratio"),
        at_most=True,
    ),
    *(
        Target(
            f"score of one sample by the exported file, {name} of {features} features / microseconds",
            "latency-fp32-",
            1000,
            cell({"model": name, "features": str(features)}, "file_us"),
            at_most=True,
        )
        for name in ("dense_ae", "vae")
        for features in (10, 100)
    ),
)


def evaluate_targets(files: Files) -> list[tuple[Target, str, Measurement | None]]:
    """Each target with the figure of each matching CSV; (target, "", None) without a CSV, except for GPU targets.

    Args:
        files: rows of each CSV by its stem.
    """
    evaluated: list[tuple[Target, str, Measurement | None]] = []
    for target in TARGETS:
        stems = [stem for stem in files if target.matches(stem)]
        found = [(target, stem, target.measure(files[stem])) for stem in stems]
        evaluated += found or ([] if target.gpu else [(target, "", None)])
    return evaluated


def missing_reason(target: Target, rows: Sequence[Row]) -> str:
    """Why a CSV has no figure for a target."""
    odd = [row["party"] for row in rows if row.get("agrees") == "no"]
    other = target.what.rpartition(" ")[2]
    return f"losses differ: {' '.join(odd)}" if {"aezoo", "aezoo_compiled", other} & {*odd} else "not measured"


def missed_targets(files: Files) -> list[str]:
    """Targets that are not reached according to a CSV, with the CSV's name."""
    evaluated = evaluate_targets(files)
    return [f"{target.what} ({stem})" for target, stem, found in evaluated if found and not target.is_reached(found)]
