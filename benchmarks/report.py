"""Turn the CSVs of the benchmarks into RESULTS.md and pictures; nothing in either is typed by hand.

    python -m benchmarks.report                    benchmarks/results -> benchmarks/RESULTS.md
    python -m benchmarks.report --results DIR      another folder; RESULTS.md is written into it

Each table stands under the command that heads its CSV. What is missing is left out, with a line that says so.
"""

import argparse
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from aezoo.errors import AezooError

from . import report_pca, targets
from .common import PACKAGE, Spread, read_csv, results_folder, run_script
from .speed import KEY, there

Row = dict[str, str]
# columns of a row over seeds that are settings, not figures
_GROUP = (
    *("dataset", "model", "code_size", "budget", "batch_size", "probe_rows"),
    *("steps", "lr", "atoms", "dim", "active", "correlation", "noise", "samples", "options", "rows"),
    "bits_a_place",
)
# peaks that are further apart are of a machine in two states
_SAME_STATE = 1.25


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        head: what stands above it, with the unit.
        cell: the text of a row's cell; empty where the row has none.
    """

    head: str
    cell: Callable[[Row], str]


# ---- cells ----------------------------------------------------------------------------------------------------------


def number(row: Row, name: str) -> float | None:
    """A cell as a number, or None."""
    try:
        return float(row.get(name, ""))
    except ValueError:
        return None


def plain(value: float, digits: int = 4) -> str:
    """A number for a reader: so many significant digits, thousands apart, no exponent where it is not needed."""
    if value == 0 or 1e-4 <= abs(value) < 10 ** (digits - 1):
        return f"{value:.{digits}g}" if value != int(value) else f"{value:.0f}"
    return f"{value:,.0f}" if 1 <= abs(value) < 1e9 else f"{value:.{digits - 1}g}"


def words(head: str, name: str) -> Column:
    """A column of text."""
    return Column(head, lambda row: row.get(name, "").replace("|", "\\|"))


def figures(head: str, name: str, factor: float = 1.0, digits: int = 4) -> Column:
    """A column of numbers."""

    def cell(row: Row) -> str:
        value = number(row, name)
        return "" if value is None else plain(value * factor, digits)

    return Column(head, cell)


def spread(head: str, name: str, low: str = "", high: str = "") -> Column:
    """A median with its lowest and highest."""

    def cell(row: Row) -> str:
        values = [number(row, key) for key in (name, low or f"{name}_low", high or f"{name}_high")]
        middle, bottom, top = values
        if middle is None:
            return ""
        if bottom is None or top is None or bottom == top:
            return plain(middle)
        return f"{plain(middle)} ({plain(bottom)} to {plain(top)})"

    return Column(head, cell)


def trained(row: Row) -> str:
    """The epochs of a row over seeds; marked where time ended a run before its budget of epochs did."""
    told, least = spread("", "epochs").cell(row), number(row, "epochs_low")
    asked = row.get("budget", "").partition("epochs=")[2]
    return f"{told}, cut" if asked and least is not None and least < float(asked) else told


TRAIN = (
    *(words("model", "name"), words("settings", "settings"), words("shape", "shape"), words("compile", "compile")),
    *(words("batch", "batch_used"), words("devices", "devices"), words("threads", "threads")),
    *(spread("samples/s", "samples_per_s"), figures("ms a step", "step_ms")),
    figures("of matmul peak, %", "share_of_peak", 100, 3),
    figures("GEMMs at peak / step, %", "gemm_floor_share", 100, 3),
    figures("products alone / step, %", "products_alone_share", 100, 3),
    figures("fault guard / step, %", "guard_share", 100, 2),
    *(figures("peak, GFLOP/s", "peak_gflops"), figures("MFLOP a sample", "flops_step", 1e-6)),
    *(figures("parameters", "parameters"), figures("peak memory, MB", "peak_memory_mb")),
    *(figures("compile, s", "compile_s", digits=3), words("compiler's cache held", "compiler_cache")),
    figures("cold start, s", "cold_start_s", digits=3),
    *(figures("launches a step", "kernel_launches"), figures("copies a step", "host_device_copies")),
    *(figures("scaling efficiency", "scaling_efficiency", digits=3), words("no efficiency, as", "unscaled")),
    words("error", "error"),
)
INFER = (
    *(words("model", "name"), words("settings", "settings"), words("shape", "shape"), words("compile", "compile")),
    *(words("batch", "batch_used"), words("threads", "threads"), spread("encode, samples/s", "encode_samples_per_s")),
    spread("reconstruct, samples/s", "reconstruct_samples_per_s"),
    spread("sample, samples/s", "sample_samples_per_s"),
    spread("Trainer's predict, samples/s", "predict_samples_per_s"),
    *(spread("encode / network", "encode_ratio"), spread("reconstruct / network", "reconstruct_ratio")),
    *(spread("predict / bare loop", "predict_ratio"), figures("ms a batch", "step_ms")),
    *(figures("of matmul peak, %", "share_of_peak", 100, 3), figures("peak, GFLOP/s", "peak_gflops")),
    *(figures("MFLOP a sample", "flops_forward", 1e-6), figures("parameters", "parameters")),
    *(figures("peak memory, MB", "peak_memory_mb"), figures("compile, s", "compile_s", digits=3)),
    *(words("compiler's cache held", "compiler_cache"), figures("cold start, s", "cold_start_s", digits=3)),
    words("error", "error"),
)
STARTUP = (
    *(words("what", "what"), spread("seconds", "seconds", "low", "high")),
    *(spread("ratio", "ratio"), words("repeats", "repeats")),
)
PEERS = (
    *(words("party", "party"), words("precision", "precision")),
    spread("samples/s", "samples_per_s", "samples_per_s_min", "samples_per_s_max"),
    *(spread("ratio to the loop", "ratio", "ratio_min", "ratio_max"), figures("wall, samples/s", "wall_samples_per_s")),
    *(figures("first step, s", "first_step_s", digits=3), figures("final loss", "final_loss")),
    *(figures("distance of loss curves, %", "max_loss_gap", 100, 2), words("agrees", "agrees")),
    *(figures("peak memory, MB", "peak_rss_mb"), words("threads", "threads"), words("error", "error")),
)
QUALITY = (
    *(words("model", "model"), words("family", "family"), words("code size", "code_size"), words("seeds", "seeds")),
    *(words("budget", "budget"), Column("epochs", trained), words("batch", "batch_size")),
    *(
        words("probe rows", "probe_rows"),
        figures("L0", "l0", digits=3),
        spread("mse", "mse"),
        figures("PCA's mse", "pca_mse"),
    ),
    *(figures("PCA's mse at L0", "pca_mse_at_l0"), spread("psnr, dB", "psnr"), spread("ssim", "ssim")),
    *(spread("nll, nats", "nll"), figures("bits/dim", "bits_per_dim"), spread("active units", "active_units")),
    *(spread("linear probe", "probe"), spread("kNN", "knn"), figures("PCA's probe", "pca_probe", digits=3)),
    *(figures("pixels' probe", "pixels_probe", digits=3), figures("pixels' kNN", "pixels_knn", digits=3)),
    *(spread("samples/s", "samples_per_s"), figures("seconds", "seconds", digits=3), words("errors", "errors")),
)
BOUNDS = (
    *(words("model", "model"), words("party", "party"), words("seed", "seed"), words("epochs", "epochs")),
    *(words("options", "options"), figures("ELBO, nats", "elbo", digits=5)),
    *(figures("log p(x), nats", "log_likelihood", digits=5), figures("the zoo tighter by, nats", "tighter_by")),
    *(words("importance samples", "importance_samples"), words("error", "error")),
)
DISENTANGLE = (
    *(words("model", "model"), words("code size", "code_size"), words("steps", "steps"), words("seeds", "seeds")),
    *(spread("MIG", "mig"), spread("SAP", "sap"), spread("DCI disentanglement", "disentanglement")),
    *(spread("completeness", "completeness"), spread("informativeness", "informativeness")),
    *(spread("modularity", "modularity"), spread("FactorVAE score", "factor_vae_score"), spread("IRS", "irs")),
    *(spread("UDR", "udr"), spread("mse", "mse"), spread("ELBO, nats", "elbo"), words("errors", "errors")),
)
DICTIONARIES = (
    *(words("model", "model"), words("atoms", "atoms"), words("dimensions", "dim"), words("active", "active")),
    *(words("correlation", "correlation"), words("noise", "noise"), words("steps", "steps"), words("seeds", "seeds")),
    *(words("options", "options"), spread("MCC", "mcc"), spread("uniqueness", "uniqueness"), spread("L0", "l0")),
    *(spread("FVU", "fvu"), spread("dead share", "dead_share"), spread("cosine", "cosine")),
    *(
        spread("shrinkage", "shrinkage"),
        spread("reconstruction bias", "reconstruction_bias"),
        words("errors", "errors"),
    ),
)
BITS = (
    *(words("model", "model"), words("options", "options"), words("data", "dataset"), words("budget", "budget")),
    *(words("samples", "rows"), words("seeds", "seeds"), figures("bits a sample", "bits"), spread("mse", "mse")),
    *(spread("psnr, dB", "psnr"), spread("ssim", "ssim"), spread("usage", "usage")),
    *(spread("perplexity", "perplexity"), spread("bits used", "used_bits")),
    *(figures("parameters", "parameters"), figures("seconds", "seconds", digits=3), words("errors", "errors")),
)
QUANTISERS = (
    *(words("kind", "kind"), words("codes", "codes"), words("channels", "dim"), words("places", "places")),
    *(words("device", "device"), words("threads", "threads")),
    *(figures("forward, places/s", "forward_per_s"), figures("theirs, places/s", "peer_forward_per_s")),
    spread("forward ratio", "forward_ratio", "forward_ratio_min", "forward_ratio_max"),
    *(figures("with backward, places/s", "step_per_s"), figures("theirs, places/s", "peer_step_per_s")),
    spread("ratio with backward", "step_ratio", "step_ratio_min", "step_ratio_max"),
    *(figures("memory, MB", "memory_mb"), figures("theirs, MB", "peer_memory_mb")),
    *(figures("same codes, %", "same_codes", 100), words("rounds", "repeats"), words("peer's error", "peer_error")),
    words("error", "error"),
)
PROBE = (
    *(words("model", "model"), words("data", "dataset"), words("numbers", "numbers"), words("steps", "steps")),
    *(words("samples", "rows"), words("seeds", "seeds"), spread("linear probe", "probe"), spread("kNN", "knn")),
    *(spread("pooled probe", "pooled_probe"), spread("pooled kNN", "pooled_knn"), spread("mse", "mse")),
    words("errors", "errors"),
)


# ---- tables ---------------------------------------------------------------------------------------------------------


class Section(NamedTuple):
    """CSVs of a kind.

    Attributes:
        prefix: of their names.
        title: heading.
        text: what the figures are.
        columns: of the tables; all of the CSV's if there are none.
        shows: whether a row is worth a line.
    """

    prefix: str
    title: str
    text: str
    columns: tuple[Column, ...]
    shows: Callable[[Row], bool] = lambda row: True


def _is_no_plain_layer(row: Row) -> bool:
    return row.get("chosen") != "torch" or (number(row, "lost") or 1) > 1.1


SECTIONS = (
    Section(
        "peers-quality-",
        "Bounds beside pythae",
        "The same networks, weights, batches and budget; both parties' trained weights are judged by one estimate. "
        "Tighter by: the zoo's log p(x) less pythae's of the same seed.",
        BOUNDS,
    ),
    Section(
        "disentangle-",
        "Disentanglement",
        "Codes of `shapes` against its factors, median over seeds (lowest to highest); higher is better but for mse. "
        "MIG to IRS are explained in `aezoo.metrics`; UDR compares a model's seeds with each other, without the "
        "factors.",
        DISENTANGLE,
    ),
    Section(
        "dictionaries-",
        "Known dictionaries",
        "Sparse sums of known atoms (`synthetic_dictionary`), test split, median over seeds (lowest to highest). MCC: "
        "mean absolute cosine of atoms and the latents matched with them; uniqueness: atoms that are the nearest of a "
        "latent, over latents; L0: entries of a code that are not 0; FVU: fraction of variance unexplained, best at 0; "
        "dead share: latents that are never active; cosine, shrinkage and reconstruction bias are best at 1 "
        "(`aezoo.metrics`). Atoms, dimensions, active, correlation and noise are of the sums.",
        DICTIONARIES,
    ),
    Section(
        "probe-",
        "What codes hold",
        "Shares of test samples whose class simple classifiers read off codes that were learned without labels, median "
        "over seeds (lowest to highest); pooled: over the places of a map or the tokens.",
        PROBE,
    ),
    Section(
        "bits-",
        "Errors at equal bits",
        "Quantised models with the same networks, grid and bits a sample; test split, median over seeds (lowest to "
        "highest). Usage: the share of a book's codes that are chosen at all; perplexity: how many codes chosen "
        "equally often would be as hard to guess; bits used: by an ideal code for the shares of choices.",
        BITS,
    ),
    Section(
        "quantisers-",
        "Quantisers beside vector-quantize-pytorch",
        "The same codes and maps in training mode, in turns; a ratio above 1 says that ours are faster, median over "
        "rounds (lowest to highest). Places: points of the maps, each of which gets a code; memory: what a step takes "
        "at its peak beyond what lay there before; same codes: the share of places at which both sides choose the "
        "same.",
        QUANTISERS,
    ),
    Section(
        "gather-",
        "Decoding of sparse codes",
        "The whole dictionary multiplied, or the active rows gathered; forward and backward, one thread. A sample of "
        "`x_dim` numbers has `k` of `latents` active, `ratio` is latents / k, `speedup` dense_ms / gather_ms.",
        (),
    ),
    Section(
        "convolutions-",
        "Convolutions",
        "Layers of kernel 3, forward and backward, in each way a CPU can: by torch (`torch_ms`), by products of "
        "matrices (`products_ms`), by torch with the derivatives taken apart (`apart_ms`; in older files "
        "`bias_apart_ms`, of the bias alone), of transposed ones as a convolution of the smaller grid "
        "(`sub_pixels_ms`) and as products laid over one another (`overlay_ms`). `side` is that of the smaller grid, "
        "`channels` are those of the larger; `chosen` is what a layer takes by itself. `speedup` is what the chosen "
        "way makes of torch's own time, `lost` its time by that of the fastest. Left out, but not of the CSVs: layers "
        "that torch computes in its own way, where no other way is a tenth faster.",
        (),
        _is_no_plain_layer,
    ),
    Section(
        "published-",
        "Published settings",
        "Recipes of published figures on other data and for a share of their steps: no reproduction. Losses are in "
        "nats; `binarise` is how grey pictures become zeros and ones.",
        (),
    ),
    Section(
        "peers-",
        "Beside others",
        "The same network, data and losses; a party's ratio is to a compiled PyTorch loop by hand, in the same rounds. "
        "Samples/s: in training, without the first epoch; wall: with what happens between epochs, such as validation "
        "and pictures; first step: from the start of the process, with compilers' caches as they were; distance of "
        "loss curves: the largest from the loop's, as a share of it, within 1 % (of Keras, which shuffles for itself, "
        "3 %) where 'agrees' is yes.",
        PEERS,
    ),
    Section(
        "speed-train-",
        "Training",
        "A Trainer's fit with bar, logger and checkpoints; median of the epochs after the first (lowest to highest). "
        "Peak: the fastest product of square matrices in the same process and precision. Of matmul peak: the share of "
        "a step in which the device could do all of its FLOPs at that peak; GEMMs at peak: the same of its matrix "
        "products alone; products alone: the share that its products and convolutions take when they run by "
        "themselves. Fault guard: what looking for faults adds to a step (a negative share is noise). Compile: what "
        "the first step takes beyond the others, with what the compiler's cache held (unknown where the cell is "
        "empty); cold start: from the start of the process to the end of the first step. Scaling efficiency: the rate "
        "by that of as many devices alone.",
        TRAIN,
    ),
    Section(
        "speed-infer-",
        "Inference",
        "Under inference_mode; beside the bare networks, and the Trainer's predict beside a loop that does the same. "
        "Encode / network and reconstruct / network: the model's methods by its bare modules; ms a batch, the share of "
        "the peak and FLOPs are those of a reconstruction.",
        INFER,
    ),
    Section(
        "speed-startup-",
        "Start-up",
        "Whole processes, timed from outside in turns; the ratio is to the imports of the same turn.",
        STARTUP,
    ),
    Section(
        "quality-recipes-",
        "Recipes",
        "Test split, one seed; losses in nats, `val/l0` the numbers of a sparse code in use.",
        (),
    ),
    Section(
        "quality-",
        "Quality",
        "Test split, median over seeds (lowest to highest). PCA of the same code size is the floor of a linear code. "
        "L0: the numbers of a sparse code in use, PCA's mse at L0: with as many; active units: numbers of a code that "
        "vary with the sample; linear probe and kNN: the share of test samples whose class logistic regression and the "
        "5 nearest neighbours read off the code, of at most so many training codes (probe rows), beside PCA's code and "
        "raw pixels. Epochs marked 'cut': `--most-seconds` ended a run before its budget of epochs did.",
        QUALITY,
    ),
    Section("", "Others", "", ()),
)


def _setting(row: Row) -> tuple[str, ...]:
    """What the seeds of a row share; steps are a setting only where they are the budget."""
    return tuple("" if name == "steps" and row.get("budget") else row.get(name, "") for name in _GROUP)


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """One row for each model, code size and setting: median, lowest and highest of each figure, and how many seeds."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(_setting(row), []).append(row)
    merged = []
    for group in groups.values():
        good = [row for row in group if not row.get("error")]
        found = dict((good or group)[0])
        for name in [*found]:
            values = [value for row in good if (value := number(row, name)) is not None]
            if values and name not in (*_GROUP, "seed"):
                of = Spread.of(values)
                found |= {name: repr(of.median), f"{name}_low": repr(of.low), f"{name}_high": repr(of.high)}
        failed = [row["error"] for row in group if row.get("error")]
        merged.append(found | {"seeds": str(len(good)), "errors": "; ".join(dict.fromkeys(failed))})
    return sorted(
        merged, key=lambda row: (row.get("dataset", ""), number(row, "mse") or 9e9, -(number(row, "mcc") or 0))
    )


def scaled(rows: Sequence[Row]) -> list[Row]:
    """Rows of a CSV, those of several devices with their rate by that of as many alone, or why there is none."""

    def setting(row: Row) -> tuple[str, ...]:
        return tuple(row.get(name, "") for name in KEY if name != "devices")

    alone = {setting(row): row for row in rows if row.get("devices") == "1"}
    # what earlier CSVs say of it is of rows that may have been replaced since
    none = {"scaling_efficiency": "", "unscaled": ""}
    return [row | none | _efficiency(row, alone.get(setting(row), {})) for row in rows]


def _efficiency(row: Row, one: Row) -> Row:
    devices, rate, base = number(row, "devices") or 1, number(row, "samples_per_s"), number(one, "samples_per_s")
    if devices == 1 or not rate:
        return {}
    if not base:
        return {"unscaled": "no row of one device"}
    peaks = [number(of, "peak_gflops") or 0 for of in (row, one)]
    if not all(peaks):
        return {"unscaled": "a peak was not measured"}
    # rows are replaced one by one, and a cloud's machine is not the same on another day
    if max(peaks) > _SAME_STATE * min(peaks):
        return {"unscaled": f"one device was measured at a peak of {plain(peaks[1])} GFLOP/s"}
    return {"scaling_efficiency": repr(rate / (devices * base))}


def comparable(rows: Sequence[Row]) -> list[Row]:
    """Of each data set the rows of its most frequent budget and batch; of each model and code size the first."""

    def setting(row: Row) -> tuple[str, ...]:
        return row.get("budget", ""), row.get("batch_size", "")

    settings: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        settings.setdefault(row.get("dataset", ""), []).append(setting(row))
    usual = {dataset: max(dict.fromkeys(found), key=found.count) for dataset, found in settings.items()}
    kept: dict[tuple[str, ...], Row] = {}
    for row in rows:
        if setting(row) == usual[row.get("dataset", "")]:
            kept.setdefault(tuple(row.get(name, "") for name in ("dataset", "model", "code_size")), row)
    return list(kept.values())


def markdown(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A table without the columns that hold nothing."""
    table = [(column.head, [column.cell(row) for row in rows]) for column in columns]
    kept = [(head, cells) for head, cells in table if any(cells)]
    lines = [[head for head, _ in kept], ["---"] * len(kept), *zip(*(cells for _, cells in kept), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(folder: Path, home: Path) -> tuple[str, dict[str, list[Row]]]:
    """The text of all tables, for a file in `home`, and the rows of each CSV by its stem."""
    read = {path.stem: read_csv(path) for path in sorted(folder.glob("*.csv"))}
    read = {
        stem: (head, scaled(rows) if stem.startswith("speed-train-") else rows) for stem, (head, rows) in read.items()
    }
    left, parts = dict(read), []
    verbs = {stem: left.pop(stem) for stem in read if stem.startswith("tasks-")}
    for section in SECTIONS:
        stems = [stem for stem in left if stem.startswith(section.prefix)]
        found = {stem: left.pop(stem) for stem in stems}
        if not found and section.prefix:
            print(f"no {section.prefix}*.csv in {folder.name}: {section.title.lower()} left out")
        shown = [
            f"### {stem}\n\n{_table(section, counted(stem, *content), content[1])}"
            for stem, content in found.items()
            if content[1]
        ]
        if shown:
            parts += ["\n\n".join(filter(None, [f"## {section.title}", section.text])), *shown]
    quality = quality_rows({stem: rows for stem, (_, rows) in read.items()})
    parts += filter(None, [report_pca.section(comparable(quality), quality)])
    if verbs:
        from . import report_tasks

        parts.insert(0, report_tasks.section(verbs, folder, home))
    return "\n\n".join(parts), {stem: rows for stem, (_, rows) in read.items()}


def counted(stem: str, commands: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Commands of a CSV; of the benchmark of speed with how many of their rows are there, if not all are."""
    found = re.match(r"speed-(train|infer)-([a-z0-9]+)-", stem)
    if not found:
        return [*commands]
    return [command + _share(command, found[1], found[2], rows) for command in commands]


def _share(command: str, kind: str, precision: str, rows: Sequence[Row]) -> str:
    try:
        here, asked = there(command, kind, precision, rows)
    except (AezooError, SystemExit):  # a flag or a model of before
        return "  # how many of its rows are here is not known"
    return "" if here == asked else f"  # {here} of {asked} rows"


def target_table(files: Mapping[str, list[Row]]) -> str:
    """What was to be reached, and what was; and with the zoo's step compiled or not, the other way round."""
    rows = []
    for target, stem, found in targets.judge(files):
        row = {"what": target.what, "bound": f"{'<=' if target.at_most else '>='} {target.bound:g}", "file": stem}
        if found is not None:
            row |= {"median": repr(found.median), "median_low": repr(found.low), "median_high": repr(found.high)}
            row |= {"note": found.note, "reached": "yes" if target.reached(found) else "no"}
        else:
            row |= {"reached": targets.why_not(target, files.get(stem, []))}
        own, others = processors([stem], files), processors(files, files, machine(stem))
        row |= {"processor": ", ".join(own) or (f"({', '.join(others)})" if stem and others else "")}
        otherwise = target.otherwise(files[stem]) if stem and target.otherwise else None
        if otherwise is not None:
            row |= {"otherwise": repr(otherwise.median)}
            row |= {"otherwise_low": repr(otherwise.low), "otherwise_high": repr(otherwise.high)}
        rows.append(row)
    columns = (
        *(words("what", "what"), words("target", "bound"), spread("measured", "median"), words("variant", "note")),
        *(words("reached", "reached"), spread("compiled otherwise", "otherwise"), words("measured in", "file")),
        words("on", "processor"),
    )
    return (
        "## Targets\n\nMedian (lowest to highest) of the rounds of one run; a ratio is taken within a round. "
        "A party whose losses do not agree is not compared. What compiling costs is counted for no party: the zoo's "
        "dense step is compiled, as `--compile auto` has it in runs of some 60,000 steps and more, and convolutional "
        "ones are not, as it has them on a CPU; 'compiled otherwise' is the other way round. Several processors have "
        "been measured on (in brackets, where a file is from before they were written down: that of the other files of "
        "the same machine): rates compare within a file of peers, and among rows of one command. Variant: what the "
        "figure is of where there are several. A negative share of the fault guard is noise.\n\n"
        + markdown(columns, rows)
    )


def processors(stems: Iterable[str], files: Mapping[str, list[Row]], on: str | None = None) -> list[str]:
    """Processors that these CSVs name, or those of them that are of a machine."""
    kept = [stem for stem in stems if stem in files and on in (None, machine(stem))]
    return [*dict.fromkeys(row["processor"] for stem in kept for row in files[stem] if row.get("processor"))]


def _table(section: Section, commands: Sequence[str], rows: Sequence[Row]) -> str:
    columns = section.columns or tuple(words(name, name) for name in rows[0])
    code = "\n".join(["```bash", *commands, "```", "", ""]) if commands else ""
    if section.columns in (QUALITY, DISENTANGLE, DICTIONARIES, BITS):
        # a model's errors compare at the same bits
        rows = sorted(over_seeds(rows), key=lambda row: number(row, "bits_a_place") or 0)
    return code + markdown(columns, [row for row in rows if section.shows(row)])


def main(argv: Sequence[str] | None = None) -> None:
    """Write the report."""
    summary, _, usage = (__doc__ or "").partition("\n")
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=summary,
        epilog=usage,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--results", type=Path, default=results_folder(), metavar="DIR", help="folder of the CSVs")
    folder: Path = made.parse_args(argv).results
    if not any(folder.glob("*.csv")):
        raise AezooError(f"no CSV in {folder}: measure first, as by `aezoo benchmark speed`, or give --results DIR")
    home = PACKAGE if folder.resolve() == (PACKAGE / "results").resolve() else folder
    text, rows = tables(folder, home)
    pictures = draw(folder, rows)
    head = (
        "# Results\n\nWritten by `python -m benchmarks.report` from the CSVs in this repository; do not edit. Above a "
        "table stand the commands that its CSV names. Those of `benchmarks.speed` say how many of the rows they ask "
        "for are here, if not all are; others may ask for more as well, such as models that have come since."
    )
    shown = [f"![{alt}]({os.path.relpath(path, home)})" for path, alt in pictures.items()]
    whole = "\n\n".join([head, *shown, target_table(rows), text]) + "\n"
    try:
        (home / "RESULTS.md").write_text(whole, encoding="utf-8")
    except OSError as error:
        raise AezooError(f"cannot write {home / 'RESULTS.md'}: {error.strerror}") from error
    for what in targets.missed(rows):
        print(f"target not reached: {what}")
    print(home / "RESULTS.md")


def quality_rows(rows: Mapping[str, list[Row]]) -> list[Row]:
    """Medians over seeds of all data sets."""
    runs = (part for stem, part in rows.items() if stem.startswith("quality-") and "-recipes-" not in stem)
    return [row for part in runs for row in over_seeds(part) if row["seeds"] != "0"]


def machine(stem: str) -> str:
    """The name that a CSV of processors carries after their number, if any; see `common.parser`."""
    found = re.search(r"-cpu\d+-([a-z0-9]+)$", stem)
    return found[1] if found else ""


def draw(folder: Path, rows: Mapping[str, list[Row]]) -> dict[Path, str]:
    """Draw the pictures that there are rows for; files and what they show."""
    from . import plots, plots_bits

    bits = [row for stem, part in rows.items() if stem.startswith("bits-") for row in over_seeds(part)]
    quality = comparable(quality_rows(rows))
    trained = {stem: part for stem, part in rows.items() if stem.startswith("speed-train-")}
    scaling = [
        row | {"precision": stem.split("-")[2], "machine": machine(stem)}
        for stem, part in trained.items()
        for row in part
        if row.get("devices") == "1" or row.get("scaling_efficiency")
    ]
    speed = {stem: part for stem, part in rows.items() if stem.startswith("peers-") and "-quality-" not in stem}
    peers: dict[str, dict[str, list[Row]]] = {"": {}}
    for stem, part in speed.items():
        peers.setdefault(machine(stem), {})[stem.removeprefix("peers-")] = part
    beside = "training speed of the zoo and of others, as ratios to a compiled loop"
    home, drawn = folder / "pictures", {}
    for name, alt, figure in (
        ("peers", beside, plots.peers(peers.pop(""))),
        *((f"peers-{on}", f"{beside}, on {on}", plots.peers(part)) for on, part in peers.items()),
        ("pareto", "reconstruction error against training speed", plots.pareto(quality)),
        ("code_size", "reconstruction error against code size, with PCA", plots.code_size(quality)),
        ("bits", "reconstruction error against bits a sample", plots_bits.bits(bits)),
        ("scaling", "training speed against the number of devices", plots.scaling(scaling)),
    ):
        if figure is None:
            print(f"no rows for {name}.png: left out")
            continue
        home.mkdir(parents=True, exist_ok=True)
        figure.savefig(home / f"{name}.png", dpi=150)
        drawn[home / f"{name}.png"] = alt
        print(home / f"{name}.png")
    return drawn


if __name__ == "__main__":
    run_script(main)
