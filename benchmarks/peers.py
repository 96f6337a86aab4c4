"""Train one network with several parties, in turns, each run in its own process: one CSV row per party.

    python -m benchmarks.peers dense                      784-128-64-32-64-128-784 on 60,000 digits
    python -m benchmarks.peers conv28 --precision bf16    a convolutional VAE on 1x28x28
    python -m benchmarks.peers conv64 --parties loop aezoo lightning --rows 512 --epochs 3
    python -m benchmarks.peers dense --accelerator cuda   all parties on the first GPU, and the loop as a CUDA graph
    python -m benchmarks.peers quality --help             compares the bounds that the zoo and pythae reach

Parties: `loop` is the reference, a hand-written, compiled PyTorch loop (logits, fused Adam, uint8 data, channels_last).
`loop_graph`, on a GPU only, is the same loop without compilation; each whole step is one CUDA graph. `loop_eager` is
the textbook loop. `aezoo` is the command `aezoo fit` with all defaults. `aezoo_compiled` is the same with `--compile
default`, which `auto` chooses for long runs except those of convolutions on a CPU; on a GPU it uses `--compile
reduce-overhead`, which no default chooses. `lightning` is the module of tutorials, with a TensorDataset, the default
loader and the default Trainer. `pytorch_vae` follows that project's experiment class, and `pythae` is its trainer.
`keras_torch`, `keras_jax` and `keras_tensorflow` are `model.fit`.

All parties read the same file and start from the same weights. The PyTorch parties read the same batches in the same
order. Keras does not: by default `model.fit` shuffles all rows in each epoch with its own generator, which --seed also
seeds, so its batches differ; its `tolerance` is 3 % in all workloads. Its strided convolutions pad on the other side,
so its pictures and weights are mirrored. Each party draws its own noise for variational codes.

With --precision bf16, `loop`, `loop_graph` and the zoo use bf16, and the others stay at fp32, their default.
`lightning_bf16`, `keras_jax_bf16` and `keras_tensorflow_bf16` are the parties that have a switch for bf16, with the
switch on. A curve of another precision than the loop's is rounded differently, so its `tolerance` is at least 2 %: in
the dense workload `loop_eager`, the loop's own arithmetic in fp32, differs by 1.1 %.

Each process is bound to as many cores as it has threads, because JAX would otherwise use a second one whatever
--threads says; --no-pin removes this binding. The figures are only meaningful on a quiet machine.

    samples_per_s       rows divided by the seconds from the start of an epoch to the end of its last step. This
                        includes loading, training, the bar and logging between steps, but not validation, pictures or
                        checkpoints of any party
    wall_samples_per_s  rows divided by the seconds from one epoch to the next, the mean over time. For the zoo this
                        adds validation on up to 500 rows (no other party validates), pictures, event files and
                        checkpoints; for Lightning's parties it adds checkpoints
    outside_share       share of the time from one epoch to the next that samples_per_s leaves out
    ratio               samples_per_s divided by that of the loop in the same round, median over rounds
    round_rates         samples_per_s of each round
    first_step_s        from the start of the process to its first update, with compilers' caches as they are
    max_loss_gap        largest distance of the curve of training losses from the loop's, as a share of it; above
                        `tolerance`, `agrees` says no and the exit code is 1
    peak_rss_mb         of the whole process on the host, including imports and everything after the last epoch
    cores_used          CPU seconds per second of the whole process

Rates are medians over epochs without the first, and the wall's is their mean, as the zoo does not validate each of
short epochs; then follow medians over rounds. _min and _max are the lowest and highest round. The time before the first
epoch and after the last does not count. The zoo runs in a pseudo terminal, where its bar is drawn as for a user. The
output of the others goes to a file; Keras and pythae still draw their bars there, and Lightning draws its bar only at
the end.

Finished runs are stored in a .part file next to the CSV: the same command without --again continues where it stopped
and repeats failed runs. Environments that parties need are made once, with pip, in --envs.

With --accelerator cuda, clocks are read after the GPU has finished its work, and the CSV has the GPU's name. CUDA has
not been run yet; the code that leads up to it is tested on the CPU.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aezoo.errors import AezooError

from .common import (
    ResultsCSV,
    Spread,
    at_least,
    build_parser,
    command_line,
    environment,
    file_lock,
    run_script,
    seconds,
)
from .environments import EnvironmentFailure, default_folder, python_for
from .peer_runs import RunFailure, RunsFile, train
from .peer_scripts.__main__ import PARTIES
from .peer_scripts.job import Job
from .workloads import WORKLOADS, Workload, write_inputs

# parties that use bf16 with --precision bf16; those named ..._bf16 always use it
BF16_PARTIES = ("loop", "loop_graph", "aezoo", "aezoo_compiled")
REFERENCE_PARTY = "loop"
CUDA_PARTIES = ("loop_graph",)
# for another shuffle, and for another rounding
KERAS_TOLERANCE, ROUNDING_TOLERANCE = 0.03, 0.02


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = build_parser("peers", __doc__)
    add = parser.add_argument
    workloads = "; ".join(f"{name}: {workload.description}" for name, workload in WORKLOADS.items())
    add("workload", choices=list(WORKLOADS), help=workloads)
    add(
        "--parties",
        nargs="+",
        choices=list(PARTIES),
        metavar="NAME",
        help="all; those ..._bf16 at bf16 only, loop_graph on cuda only",
    )
    add("--accelerator", choices=("cpu", "cuda"), default="cpu", help="where all parties train (cpu)")
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--threads", type=at_least(1), default=1, metavar="N", help="threads of every party (1)")
    add("--repeats", type=at_least(1), default=3, metavar="N", help="rounds (3)")
    add("--rows", type=at_least(1), metavar="N", help="training rows (those of the workload)")
    add("--batch", type=at_least(1), metavar="N", help="rows a step (that of the workload)")
    add("--epochs", type=at_least(1), metavar="N", help="epochs, the first is warm-up (of the workload)")
    add("--seed", type=int, default=0, metavar="N")
    add(
        "--pin",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="bind each process to --threads cores (Linux with taskset; on)",
    )
    add(
        "--aezoo-flags", default="", metavar="FLAGS", help="more flags of aezoo fit, e.g. --aezoo-flags='--compile off'"
    )
    add("--timeout", type=seconds, default=3600.0, metavar="S", help="seconds for a run (3600)")
    add("--envs", type=Path, default=default_folder(), metavar="DIR", help="environments of parties (%(default)s)")
    found = parser.parse_args(argv)
    workload = WORKLOADS[found.workload]
    found.parties = list(dict.fromkeys(found.parties or default_parties(found.precision, found.accelerator)))
    found.rows = found.rows or workload.rows
    found.batch = found.batch or workload.batch
    found.epochs = found.epochs or workload.epochs
    return found


def default_parties(precision: str, accelerator: str = "cpu") -> list[str]:
    """The parties that take part unless --parties names others."""
    absent = () if accelerator == "cuda" else CUDA_PARTIES
    return [party for party in PARTIES if party not in absent and (precision == "bf16" or not party.endswith("_bf16"))]


def check(arguments: argparse.Namespace) -> None:
    """Reject requests that cannot be measured.

    Raises:
        AezooError: names the cause and a remedy.
    """
    if REFERENCE_PARTY not in arguments.parties:
        raise AezooError(f"nothing to compare with: add {REFERENCE_PARTY!r} to --parties")
    if arguments.accelerator == "cpu":
        for party in set(CUDA_PARTIES) & {*arguments.parties}:
            raise AezooError(f"{party} is a CUDA graph: add --accelerator cuda, or leave it out of --parties")
        return
    import torch

    if not torch.cuda.is_available():
        raise AezooError(
            "--accelerator cuda: torch finds no GPU; install its CUDA build on a machine with one, or use cpu"
        )


def party_precision(party: str, requested: str) -> str:
    """The precision that a party runs at."""
    return requested if party in BF16_PARTIES else "bf16" if party.endswith("_bf16") else "fp32"


def party_options(party: str, flags: str, accelerator: str = "cpu") -> tuple[str, ...]:
    """A party's own switches."""
    if not party.startswith("aezoo"):
        return ()
    mode = "reduce-overhead" if accelerator == "cuda" else "default"
    return (*(("--compile", mode) if party == "aezoo_compiled" else ()), *flags.split())


def measure(arguments: argparse.Namespace, runs: RunsFile) -> None:
    """Do the missing runs, round by round; every second round runs in the opposite order."""
    workload = WORKLOADS[arguments.workload]
    pythons: dict[str, str | EnvironmentFailure] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(workload, arguments.rows, arguments.seed, folder)
        for turn in range(arguments.repeats):
            for party in arguments.parties if turn % 2 == 0 else arguments.parties[::-1]:
                if runs.has(party, turn):
                    continue
                if party not in pythons:
                    pythons[party] = _python(party, arguments.envs, arguments.accelerator)
                try:
                    python = pythons[party]
                    if isinstance(python, EnvironmentFailure):
                        raise python
                    result = train(
                        python, build_job(party, arguments, workload, folder), arguments.timeout, arguments.pin
                    )
                except (EnvironmentFailure, RunFailure) as error:
                    runs.add(party, turn, error=str(error))
                    print(f"round {turn + 1} {party}: {error}", flush=True)
                else:
                    runs.add(party, turn, result=result)
                    loss = result["losses"][-1]
                    print(f"round {turn + 1} {party}: {rate(result):,.0f} samples/s, loss {loss:.4f}", flush=True)


def _python(party: str, envs: Path, accelerator: str) -> str | EnvironmentFailure:
    try:
        return python_for(party, envs.expanduser().absolute(), accelerator)
    except EnvironmentFailure as error:
        return error


def build_job(party: str, arguments: argparse.Namespace, workload: Workload, folder: Path) -> Job:
    """The job of a party's run."""
    return Job(
        party=party,
        data=str(folder / "data.npz"),
        weights=str(folder / "weights.npz"),
        shape=workload.shape,
        hidden_dims=workload.hidden_dims,
        latent_dim=workload.latent_dim,
        variational=workload.variational,
        rows=arguments.rows,
        batch=arguments.batch,
        epochs=arguments.epochs,
        threads=arguments.threads,
        precision=party_precision(party, arguments.precision),
        seed=arguments.seed,
        lr=workload.lr,
        options=party_options(party, arguments.aezoo_flags, arguments.accelerator),
        accelerator=arguments.accelerator,
    )


def rate(result: dict[str, Any]) -> float:
    """Samples per second of a run: the median over its epochs without the first, unless there is only one."""
    return statistics.median(result["rates"][1:] or result["rates"])


def wall_rate(result: dict[str, Any]) -> float:
    """Samples per second by the clock, of all epochs without the first together, unless there is only one."""
    return statistics.harmonic_mean(result["turns"][1:] or result["turns"])


def outside_share(result: dict[str, Any]) -> float:
    """Share of the time outside of training: 1 minus the ratio of `wall_rate` to the mean rate of the same epochs."""
    return 1 - wall_rate(result) / statistics.harmonic_mean(result["rates"][1:] or result["rates"])


def row(party: str, arguments: argparse.Namespace, runs: RunsFile) -> dict[str, Any]:
    """A party's row of the table."""
    turns = range(arguments.repeats)
    results, references = runs.results(party, turns), runs.results(REFERENCE_PARTY, turns)
    workload = WORKLOADS[arguments.workload]
    settings = {
        "threads": arguments.threads,
        "rows": arguments.rows,
        "batch": arguments.batch,
        "epochs": arguments.epochs,
    }
    line: dict[str, Any] = {"party": party, "precision": party_precision(party, arguments.precision)}
    figures: dict[str, Any] = dict.fromkeys(COLUMNS[2:])
    figures |= settings | {"repeats": len(results), "error": runs.error(party, turns)}
    if not results:
        return line | figures
    finished = list(results.values())
    rates = Spread.from_data([rate(run) for run in finished])
    figures |= {"samples_per_s": rates.median, "samples_per_s_min": rates.low, "samples_per_s_max": rates.high}
    figures["round_rates"] = " ".join(f"{rate(results[turn]):.6g}" if turn in results else "-" for turn in turns)
    ratios = [rate(run) / rate(references[turn]) for turn, run in results.items() if turn in references]
    if ratios:
        ratio = Spread.from_data(ratios)
        figures |= {"ratio": ratio.median, "ratio_min": ratio.low, "ratio_max": ratio.high}
    walls = [wall_rate(run) for run in finished if run["turns"]]
    figures["wall_samples_per_s"] = statistics.median(walls) if walls else None
    shares = [outside_share(run) for run in finished if run["turns"]]
    figures["outside_share"] = statistics.median(shares) if shares else None
    for name in ("first_step_s", "peak_rss_mb", "cores_used"):
        values = [run[name] for run in finished if run[name] is not None]
        figures[name] = statistics.median(values) if values else None
    figures |= {"parameters": finished[-1]["parameters"], "final_loss": finished[-1]["losses"][-1]}
    figures["losses"] = " ".join(f"{loss:.6g}" for loss in finished[-1]["losses"])
    figures["versions"] = " ".join(f"{name}={version}" for name, version in finished[-1]["versions"].items())
    if references:
        reference = next(iter(references.values()))
        same = all(run["parameters"] == reference["parameters"] for run in finished)
        gap = max(loss_gap(run["losses"], reference["losses"]) for run in finished)
        tolerance = KERAS_TOLERANCE if party.startswith("keras") else workload.tolerance
        if line["precision"] != party_precision(REFERENCE_PARTY, arguments.precision):
            tolerance = max(tolerance, ROUNDING_TOLERANCE)
        agrees = "yes" if gap <= tolerance and same else "no"
        figures |= {"max_loss_gap": gap, "tolerance": tolerance, "agrees": agrees}
    return line | figures


COLUMNS = (
    *("party", "precision", "samples_per_s", "samples_per_s_min", "samples_per_s_max", "ratio", "ratio_min"),
    *("ratio_max", "wall_samples_per_s", "outside_share", "first_step_s", "final_loss", "max_loss_gap", "tolerance"),
    *("agrees", "parameters", "peak_rss_mb", "cores_used", "threads", "rows", "batch", "epochs", "repeats"),
    *("round_rates", "versions", "losses", "error"),
)


def loss_gap(curve: list[float], reference: list[float]) -> float:
    """The largest distance between two curves relative to the second; infinite for curves that cannot be compared."""
    if len(curve) != len(reference) or not all(map(math.isfinite, (*curve, *reference))):
        return math.inf
    return max(abs(loss - other) / abs(other) for loss, other in zip(curve, reference, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the CSV; 0 if every party ran and agrees."""
    words = sys.argv[1:] if argv is None else [*argv]
    if words[:1] == ["quality"]:
        from . import peers_quality

        return peers_quality.main(words[1:])
    arguments = parse_arguments(argv)
    check(arguments)
    name = environment(arguments, arguments.precision)
    # runs of another size are other figures
    size = "" if arguments.rows == WORKLOADS[arguments.workload].rows else f"{arguments.rows}rows"
    path = arguments.results / f"peers-{arguments.workload}{size}-{name}.csv"
    command = command_line("peers", sys.argv[1:] if argv is None else argv, left_out=("--envs",))
    table, part_path = ResultsCSV(path, ("party",), command), path.with_suffix(".runs.part")
    if arguments.again != "all" and table.rows and not part_path.exists():
        if table.commands != [command]:
            raise AezooError(
                f"{path} contains the rows of another command, {table.commands[0]}: give --again to replace them, or "
                "another folder by --results"
            )
        print(f"{path} already exists; --again measures it again")
        return 0
    with file_lock(part_path):
        return _measured(arguments, table, part_path)


def _measured(arguments: argparse.Namespace, table: ResultsCSV, part_path: Path) -> int:
    if arguments.again == "all":
        os.truncate(part_path, 0)
    keys = ("workload", "precision", "threads", "rows", "batch", "epochs", "seed", "pin", "aezoo_flags")
    runs = RunsFile(part_path, {key: getattr(arguments, key) for key in keys})
    measure(arguments, runs)
    lines = [row(party, arguments, runs) for party in arguments.parties]
    table.replace_all(lines)
    print(table.path)
    if not any(line["error"] for line in lines):
        part_path.unlink()
    odd = [line["party"] for line in lines if line["agrees"] == "no"]
    if odd:
        print(f"losses or parameters differ from the loop's: {', '.join(odd)}", file=sys.stderr)
    return 1 if odd or any(line["error"] for line in lines) else 0


if __name__ == "__main__":
    run_script(lambda: sys.exit(main()))
