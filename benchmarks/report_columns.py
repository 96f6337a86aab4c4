"""Cells, columns and tables of the report: the figures of a CSV that are shown, and their headings."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .common import number

Row = dict[str, str]


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        heading: heading, with the unit.
        cell: the text of a row's cell; empty if the row has no value.
    """

    heading: str
    cell: Callable[[Row], str]


# ---- cells ----------------------------------------------------------------------------------------------------------


def format_number(value: float, digits: int = 4) -> str:
    """A number for a reader: `digits` significant digits, thousands separators, no unnecessary exponent."""
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
        return "" if value is None else format_number(value * factor, digits)

    return Column(head, cell)


def spread(head: str, name: str, low: str = "", high: str = "") -> Column:
    """A median with its lowest and highest."""

    def cell(row: Row) -> str:
        values = [number(row, key) for key in (name, low or f"{name}_low", high or f"{name}_high")]
        middle, bottom, top = values
        if middle is None:
            return ""
        if bottom is None or top is None or bottom == top:
            return format_number(middle)
        return f"{format_number(middle)} ({format_number(bottom)} to {format_number(top)})"

    return Column(head, cell)


def epochs_cell(row: Row) -> str:
    """The epochs of a row over seeds; marked if the time limit ended a run before its budget of epochs."""
    text, least = spread("", "epochs").cell(row), number(row, "epochs_low")
    requested = row.get("budget", "").partition("epochs=")[2]
    return f"{text}, cut" if requested and least is not None and least < float(requested) else text


def _interface_cell(row: Row) -> str:
    return "off" if row.get("interface") == "off" else ""


# CSVs of a GPU have its name in place of the processor's number of cores, and rows of their own
GPU = Column("on a GPU", lambda row: row.get("gpu") or "not measured")
TRAIN = (
    *(words("model", "name"), words("settings", "settings"), words("shape", "shape"), words("compile", "compile")),
    *(words("batch", "batch_used"), words("devices", "devices"), words("threads", "threads")),
    *(Column("interface", _interface_cell), spread("samples/s", "samples_per_s"), figures("ms/step", "step_ms")),
    figures("of matmul peak, %", "share_of_peak", 100, 3),
    figures("GEMMs at peak / step, %", "gemm_floor_share", 100, 3),
    figures("products alone / step, %", "products_alone_share", 100, 3),
    figures("fault guard / step, %", "guard_share", 100, 2),
    figures("interface / step, %", "interface_share", 100, 2),
    *(figures("peak, GFLOP/s", "peak_gflops"), figures("MFLOP/sample", "flops_step", 1e-6)),
    *(figures("parameters", "parameters"), figures("peak memory, MB", "peak_memory_mb")),
    *(figures("compile, s", "compile_s", digits=3), words("compiler's cache", "compiler_cache")),
    figures("cold start, s", "cold_start_s", digits=3),
    *(figures("launches/step", "kernel_launches"), figures("copies/step", "host_device_copies")),
    *(figures("scaling efficiency", "scaling_efficiency", digits=3), words("why no efficiency", "unscaled")),
    *(GPU, words("error", "error")),
)
INFER = (
    *(words("model", "name"), words("settings", "settings"), words("shape", "shape"), words("compile", "compile")),
    *(words("batch", "batch_used"), words("threads", "threads"), spread("encode, samples/s", "encode_samples_per_s")),
    spread("reconstruct, samples/s", "reconstruct_samples_per_s"),
    spread("sample, samples/s", "sample_samples_per_s"),
    spread("Trainer's predict, samples/s", "predict_samples_per_s"),
    *(spread("encode / network", "encode_ratio"), spread("reconstruct / network", "reconstruct_ratio")),
    *(spread("predict / bare loop", "predict_ratio"), figures("ms/batch", "step_ms")),
    *(figures("of matmul peak, %", "share_of_peak", 100, 3), figures("peak, GFLOP/s", "peak_gflops")),
    *(figures("MFLOP/sample", "flops_forward", 1e-6), figures("parameters", "parameters")),
    *(figures("peak memory, MB", "peak_memory_mb"), figures("compile, s", "compile_s", digits=3)),
    *(words("compiler's cache", "compiler_cache"), figures("cold start, s", "cold_start_s", digits=3)),
    *(GPU, words("error", "error")),
)
STARTUP = (
    *(words("what", "what"), spread("seconds", "seconds", "low", "high")),
    *(spread("ratio", "ratio"), words("repeats", "repeats")),
)
LATENCY = (
    *(words("model", "model"), words("score", "score"), words("features", "features")),
    *(figures("file, us", "file_us", digits=3), figures("file, 99th percentile", "file_us_p99", digits=3)),
    *(figures("model, us", "model_us", digits=3), figures("model, 99th percentile", "model_us_p99", digits=3)),
    *(words("calls", "calls"), words("threads", "threads"), words("error", "error")),
)
PEERS = (
    *(words("party", "party"), words("precision", "precision")),
    spread("samples/s", "samples_per_s", "samples_per_s_min", "samples_per_s_max"),
    *(spread("ratio to the loop", "ratio", "ratio_min", "ratio_max"), figures("wall, samples/s", "wall_samples_per_s")),
    figures("outside of training, %", "outside_share", 100, 2),
    *(figures("first step, s", "first_step_s", digits=3), figures("final loss", "final_loss")),
    *(figures("distance of loss curves, %", "max_loss_gap", 100, 2), figures("allowed, %", "tolerance", 100, 2)),
    *(words("agrees", "agrees"), figures("peak memory, MB", "peak_rss_mb"), words("threads", "threads")),
    *(GPU, words("error", "error")),
)
QUALITY = (
    *(words("model", "model"), words("family", "family"), words("code size", "code_size"), words("seeds", "seeds")),
    *(words("budget", "budget"), Column("epochs", epochs_cell), words("batch", "batch_size")),
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
    *(spread("samples/s", "samples_per_s"), figures("seconds", "seconds", digits=3), words("processor", "processor")),
    words("errors", "errors"),
)
BOUNDS = (
    *(words("model", "model"), words("party", "party"), words("seed", "seed"), words("epochs", "epochs")),
    *(words("options", "options"), figures("ELBO, nats", "elbo", digits=5)),
    *(figures("log p(x), nats", "log_likelihood", digits=5), figures("zoo tighter by, nats", "tighter_by")),
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
    *(words("samples", "rows"), words("seeds", "seeds"), figures("bits/sample", "bits"), spread("mse", "mse")),
    *(spread("psnr, dB", "psnr"), spread("ssim", "ssim"), spread("usage", "usage")),
    *(spread("perplexity", "perplexity"), spread("bits used", "used_bits")),
    *(figures("parameters", "parameters"), figures("seconds", "seconds", digits=3), words("errors", "errors")),
)
QUANTISERS = (
    *(words("kind", "kind"), words("codes", "codes"), words("channels", "dim"), words("places", "places")),
    *(words("device", "device"), words("threads", "threads")),
    *(figures("forward, places/s", "forward_per_s"), figures("peer's, places/s", "peer_forward_per_s")),
    spread("forward ratio", "forward_ratio", "forward_ratio_min", "forward_ratio_max"),
    *(figures("with backward, places/s", "step_per_s"), figures("peer's, places/s", "peer_step_per_s")),
    spread("ratio with backward", "step_ratio", "step_ratio_min", "step_ratio_max"),
    *(figures("memory, MB", "memory_mb"), figures("peer's, MB", "peer_memory_mb")),
    *(figures("same codes, %", "same_codes", 100), words("rounds", "repeats"), words("peer's error", "peer_error")),
    words("error", "error"),
)
PROBE = (
    *(words("model", "model"), words("data", "dataset"), words("numbers", "numbers"), words("steps", "steps")),
    *(words("samples", "rows"), words("seeds", "seeds"), spread("linear probe", "probe"), spread("kNN", "knn")),
    *(spread("pooled probe", "pooled_probe"), spread("pooled kNN", "pooled_knn"), spread("mse", "mse")),
    words("errors", "errors"),
)


def merge_groups(
    rows: Sequence[Row], keys: Sequence[str], measures: Sequence[str], middle: Callable[[list[float]], float]
) -> list[Row]:
    """A row for each group of rows with equal `keys`: of `measures` the middle, lowest and highest; and `seeds`."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in keys), []).append(row)
    merged = []
    for group in groups.values():
        found = group[0] | {"seeds": str(len(group))}
        for name in measures:
            if values := [value for row in group if (value := number(row, name)) is not None]:
                low, high = min(values), max(values)
                found |= {name: repr(middle(values)), f"{name}_low": repr(low), f"{name}_high": repr(high)}
        merged.append(found)
    return merged


def markdown(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A Markdown table without empty columns."""
    table = [(column.heading, [column.cell(row) for row in rows]) for column in columns]
    kept = [(head, cells) for head, cells in table if any(cells)]
    lines = [[head for head, _ in kept], ["---"] * len(kept), *zip(*(cells for _, cells in kept), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
