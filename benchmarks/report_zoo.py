"""The pages of the zoo: every model trained until it converges, by data set and kind of code, and compared with PCA."""

from collections.abc import Iterable, Mapping, Sequence

from .bits import options_text
from .causes import CAUSES
from .common import number
from .quality import LEFT_OUT
from .report_columns import Column, Row, figures, format_number, markdown, spread, words
from .report_pca import NOT_EXPLAINED

# models that textbooks and surveys name
TEXTBOOK = (
    *("linear_ae", "dense_ae", "conv_ae", "denoising_ae", "contractive_ae", "sparse_ae_l1", "sparse_ae_kl", "k_sparse"),
    *("vae", "beta_vae", "iwae", "vae_gan", "aae", "wae_mmd", "vq_vae", "vq_vae_2", "rq_vae", "fsq_vae", "topk_sae"),
    "sae_l1",
)
KINDS = {
    "numbers": "Codes of {size} numbers",
    "bits": "Codes of {bits} bits",
    "active": "Codes of {size} active latents",
}
# PCA's error with as large a code, by kind
_FLOORS = {"numbers": "pca_mse", "bits": "pca_mse_at_bits", "active": "pca_mse_at_l0"}
# an error up to 1 % above PCA's counts as equal to it: the best linear code is PCA's, which training only approaches
_EQUAL = 1.01
_MOST_LINES = 40
_NO_GPU = "not measured"
_COLUMNS = (
    *(Column("model", lambda row: f"**{row['model']}**" if row["model"] in TEXTBOOK else row["model"]),),
    *(words("seeds", "seeds"), words("ended", "ended"), figures("bits", "bits", digits=3), spread("L0", "l0")),
    *(spread("mse", "mse"), Column("mse / PCA's", lambda row: _as_text(ratio(row))), figures("psnr, dB", "psnr")),
    *(figures("ssim", "ssim", digits=3), figures("bits/dim", "bits_per_dim"), figures("log p(x)", "log_likelihood")),
    *(figures("active units", "active_units"), figures("probe", "probe", digits=3), figures("kNN", "knn", digits=3)),
    *(figures("FID", "fid", digits=3), figures("rFID", "rfid", digits=3), figures("samples/s", "samples_per_s")),
    Column("samples/s, GPU", lambda row: "" if row["model"].startswith("PCA") else _NO_GPU),
    *(figures("s to best", "seconds_to_best", digits=3), figures("epochs to best", "best_epoch", digits=3)),
)


def _as_text(value: float | None) -> str:
    return "" if value is None else format_number(value, 3)


def ratio(row: Row) -> float | None:
    """A row's error divided by that of PCA with as large a code, or None."""
    floor, mse = number(row, _FLOORS[row["kind"]]), number(row, "mse")
    return mse / floor if floor and mse is not None else None


def reason(row: Row) -> str:
    """Why a row has a larger error than PCA: it was cut off, or a cause and the error without it."""
    if "capped" in row["ended"]:
        return "the budget: its loss was still falling when its time was up"
    found = number(row, "without_cause")
    if found is None:
        return NOT_EXPLAINED
    cause = CAUSES[row["model"]]
    changes = (cause.model or options_text(cause.without)) + cause.parts()
    return f"{cause.words if found <= _EQUAL else NOT_EXPLAINED}: {found:.2g} with {changes}"


def behind(rows: Iterable[Row]) -> list[Row]:
    """The rows with an error more than 1 % larger than PCA's."""
    return [row for row in rows if (ratio(row) or 0) > _EQUAL]


def unexplained(rows: Iterable[Row]) -> list[str]:
    """Models with a larger error than PCA somewhere for which no reason has been checked."""
    return [*dict.fromkeys(row["model"] for row in behind(rows) if reason(row).startswith(NOT_EXPLAINED))]


def _are_alike(one: Row, other: Row) -> bool:
    """Whether both rows are of the same model and settings."""
    keys = ("dataset", "model", "kind", "size", "budget", "batch_size")
    return all(one.get(key) == other.get(key) for key in keys)


def zoo_rows(runs: Sequence[Row], merged: Sequence[Row], causes: Sequence[Row]) -> list[Row]:
    """Medians over seeds of the converged trainings, with how they ended; one budget and code size for each data set.

    Args:
        runs: rows of all seeds.
        merged: their medians, see `report.merge_seeds`.
        causes: medians of trainings without the causes of errors above PCA's, see `benchmarks.causes`.
    """
    found = []
    without = {(row["dataset"], row["model"]): ratio(row) for row in causes if row["model"] in CAUSES}
    for row in merged:
        if row.get("kind") not in KINDS or row["seeds"] == "0":
            continue
        ends = [run["stopped"] for run in runs if _are_alike(run, row) and run.get("stopped")]
        counts = {end: ends.count(end) for end in dict.fromkeys(ends)}
        text = ", ".join(end if len(counts) == 1 else f"{end} {count}" for end, count in counts.items())
        checked = without.get((row["dataset"], row["model"]))
        if (cause := CAUSES.get(row["model"])) and cause.model:
            checked = next((ratio(of) for of in merged if _are_alike(of, row | {"model": cause.model})), None)
        found.append(row | {"ended": text, "without_cause": "" if checked is None else repr(checked)})
    usual: dict[str, list[tuple[str, str]]] = {}
    for row in found:
        usual.setdefault(row["dataset"], []).append((row["budget"], row["size"]))
    most = {dataset: max(dict.fromkeys(of), key=of.count) for dataset, of in usual.items()}
    return [row for row in found if (row["budget"], row["size"]) == most[row["dataset"]]]


def pages(rows: Sequence[Row], commands: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The text of each page, by the name of its file; none without rows.

    Args:
        rows: see `zoo_rows`.
        commands: the commands that measured each data set.
    """
    if not rows:
        return {}
    sets: dict[str, list[Row]] = {}
    for row in rows:
        sets.setdefault(row["dataset"], []).append(row)
    found = {"zoo.md": _overview(sets), "zoo-pca.md": _beside_pca(sets)}
    return found | {f"zoo-{name}.md": _page(name, of, commands.get(name, ())) for name, of in sets.items()}


def _overview(sets: Mapping[str, Sequence[Row]]) -> str:
    lines = []
    for dataset, rows in sets.items():
        for kind, title in KINDS.items():
            of = [row for row in rows if row["kind"] == kind]
            if not of:
                continue
            best = min(of, key=lambda row: number(row, "mse") or 9e9)
            late = behind(of)
            lines.append(
                {
                    "data": f"[{dataset}](zoo-{dataset}.md)",
                    "codes": title.removeprefix("Codes of ").format_map(_sizes(of)),
                    "models": str(len(of)),
                    "capped": str(sum("capped" in row["ended"] for row in of)),
                    "best": f"{best['model']} ({_as_text(number(best, 'mse'))})",
                    "floor": _as_text(number(best, _FLOORS[kind])),
                    "behind": str(len(late)),
                    "unexplained": str(len(unexplained(of))),
                }
            )
    columns = (
        *(words("data", "data"), words("codes", "codes"), words("models", "models"), words("capped", "capped")),
        *(words("lowest mse", "best"), words("PCA's mse", "floor"), words("behind PCA", "behind")),
        words("not explained", "unexplained"),
    )
    everything = [row for rows in sets.values() for row in rows]
    capped, shares = sum("capped" in row["ended"] for row in everything), len(everything)
    left = "\n".join(f"- {why}: {', '.join(names)}" for why, names in _left_out().items())
    return "\n\n".join(
        [
            "# The zoo at convergence",
            "Every model is trained until its validation loss has stopped falling; the weights of the lowest loss are "
            "measured on the test split. Codes of different kinds cannot be compared, so each kind has separate "
            "tables: 16 numbers, as many bits as 16 bytes, or 16 active latents. All other settings are the models' "
            "defaults. `python -m benchmarks.quality --help` says how a run ends and what each figure means; the CSVs "
            "in `benchmarks/results` contain all figures.",
            f"{capped} of {shares} trainings ended at the time limit ({100 * capped / shares:.0f} %; the target is at "
            "most 10 %). No GPU was available: the columns for GPUs say so until "
            "`python -m benchmarks.quality --accelerator cuda` has run.",
            markdown(columns, lines),
            "[The comparison with PCA](zoo-pca.md) lists the models with a larger error than PCA, with the reasons "
            "that have been checked.",
            f"Models that are left out because their codes cannot have this size:\n\n{left}",
        ]
    )


def _left_out() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, why in LEFT_OUT.items():
        found.setdefault(why, []).append(name)
    return found


def _page(dataset: str, rows: Sequence[Row], commands: Sequence[str]) -> str:
    seeds = sorted({row["seeds"] for row in rows}, key=int)
    processors = dict.fromkeys(row["processor"] for row in rows if row.get("processor"))
    spaces = dict.fromkeys(row["features"] for row in rows if row.get("features"))
    splits = dict.fromkeys(row["splits"] for row in rows if row.get("splits"))
    limits = [f"{limit:g}" for limit in sorted({number(row, "most_seconds") or 0 for row in rows})]
    parts = [
        f"# The zoo on {dataset}",
        f"[All data sets](zoo.md). Samples (training, validation, test): {'; '.join(splits)}. Budget: "
        f"{rows[0]['budget']} (of the fall of the loss), at most {' or '.join(limits)} s of one core; batches of "
        f"{rows[0]['batch_size']}. Seeds: {' or '.join(seeds)}; median "
        f"(lowest to highest). Processor: {'; '.join(processors)}. No GPU was available. FID and rFID in the feature "
        f"space of {'; '.join(spaces)}. Textbook models are bold. Lines are sorted by error; the CSV also contains the "
        "lines that are not shown here.",
        "\n".join(["```bash", *commands, "```"]),
    ]
    for kind, title in KINDS.items():
        of = sorted((row for row in rows if row["kind"] == kind), key=lambda row: number(row, "mse") or 9e9)
        if of:
            text = f"## {title.format_map(_sizes(of))}\n\n{markdown(_COLUMNS, [*_floor(of, kind), *_shown(of)])}"
            parts.append(f"{text}\n\n{len(of)} models." if len(of) > _MOST_LINES else text)
    return "\n\n".join(parts)


def _sizes(rows: Sequence[Row]) -> dict[str, str]:
    return {"size": rows[0]["size"], "bits": str(8 * int(rows[0]["size"]))}


def _shown(rows: Sequence[Row]) -> list[Row]:
    """The textbook models and the best others, sorted as they are."""
    others = [row["model"] for row in rows if row["model"] not in TEXTBOOK]
    kept = {*TEXTBOOK, *others[: _MOST_LINES - (len(rows) - len(others))]}
    return [row for row in rows if row["model"] in kept]


def _floor(rows: Sequence[Row], kind: str) -> list[Row]:
    """PCA's line, for codes of one size."""
    row = rows[0]
    if kind == "active" or not row.get(_FLOORS[kind]):
        return []
    text = {"numbers": "PCA, {size} numbers", "bits": "PCA, {size} numbers of 8 bits"}[kind]
    floor = {"model": text.format_map(row), "kind": kind, "mse": row[_FLOORS[kind]]}
    more = {"psnr": row.get("pca_psnr", "")} if kind == "numbers" else {}
    return [floor | more | {"probe": row.get("pca_probe", ""), "knn": row.get("pca_knn", "")}]


def _beside_pca(sets: Mapping[str, Sequence[Row]]) -> str:
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for dataset, rows in sets.items():
        for row in behind(rows):
            found.setdefault((row["kind"], row["model"]), {})[dataset] = row
    lines = []
    for (kind, model), of in sorted(found.items(), key=lambda item: ([*KINDS].index(item[0][0]), item[0][1])):
        why = dict.fromkeys(reason(row) for row in of.values())
        line = {"kind": kind, "model": model, "why": "; ".join(why)}
        lines.append(line | {dataset: _as_text(ratio(row)) for dataset, row in of.items()})
    ahead = {
        dataset: (sum(ratio(row) is not None for row in rows), len(behind(rows))) for dataset, rows in sets.items()
    }
    counts = [
        f"- {dataset}: {total - late} of {total} are at most 1 % above PCA's error."
        for dataset, (total, late) in ahead.items()
    ]
    missing = unexplained(row for rows in sets.values() for row in rows)
    columns = (
        *(words("code", "kind"), words("model", "model"), *(words(dataset, dataset) for dataset in sets)),
        words("why", "why"),
    )
    return "\n\n".join(
        [
            "# The zoo compared with PCA",
            "PCA gives the lowest error that a linear code can reach. It has as many numbers as the code; for "
            "indices, as many numbers of 8 bits as make the same total of bits; for sparse codes, as many numbers as "
            "are active. The table lists the models whose error is more than 1 % above PCA's, divided by PCA's.",
            "\n".join(counts),
            f"Not explained: {len(missing)}{': ' if missing else ''}{', '.join(missing)}.",
            *([markdown(columns, lines)] if lines else []),
        ]
    )
