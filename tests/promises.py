"""The table of guarantees: each guarantee, the tests that check it, and a figure of the last run of these tests.

    python -m tests.promises                        write PROMISES.md from tests/promises.json
    python -m tests.promises --run [NAME ...]       measure all or some again first: fuzz, mutants, resume, ...

The figures are the counts of the runs themselves.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = Path(__file__).with_suffix(".json"), ROOT / "PROMISES.md"
_SWITCH = "AEZOO_RECORD_PROMISES"
SLOW = ("-m", "pytest", "-n0", "-q", "-m", "slow or not slow")
# the command of each run
RUNS = {
    "fuzz": ("-m", "tests.fuzz", "--files=5000", "--configs=1000", "--out={out}"),
    "mutants": ("-m", "tests.mutants", "--draw=200", "--keep=build/mutants.jsonl", "--out={out}"),
    "bad_values": (*SLOW, "tests/cli/test_bad_values.py"),
    "input": (*SLOW, "tests/data/test_npy.py", "-k", "memory_of_commands"),
    "inductor": (*SLOW, "tests/test_models.py", "-k", "slowly or compile or onnx or overfits or seed or two_proc"),
    "soak": (*SLOW, "tests/test_soak.py"),
    "ranks": (*SLOW, "tests/training/test_distributed.py"),
    "resume": (*SLOW, "tests/io/test_resume.py"),
    "kills": ("tests/kill_campaigns.py", "--kills=1000", "--keep=build/kills.jsonl", "--out={out}"),
}


@dataclass(frozen=True)
class Promise:
    """A row: the guarantee, the tests that check it, and a figure with the names of its run's counts in braces."""

    text: str
    tests: tuple[str, ...]
    figure: str = ""
    run: str = ""


PROMISES = (
    Promise("Loading weights never runs code", ("tests/security/test_safe_checkpoints.py",)),
    Promise("An untrusted configuration cannot run code", ("tests/security/test_safe_configs.py",)),
    Promise("A checkpoint cannot select code that is imported or called", ("tests/security/test_safe_checkpoints.py",)),
    Promise(
        "A crash during a save never loses the previous checkpoint; a killed run resumes bit for bit",
        ("tests/io/test_resume.py",),
        "{kills} kills survived, {in_saves} of them while a file was being written",
        "resume",
    ),
    Promise(
        "Randomly killed runs (of two processes, compiled, streaming, with large saves) and studies lose no work",
        ("tests/kill_campaigns.py",),
        "{kills} kills in {campaigns} campaigns, {in_saves} of them while a file was being written",
        "kills",
    ),
    Promise(
        "Every model resumes from a checkpoint, at the end of an epoch or within one, bit for bit",
        ("tests/test_models.py",),
    ),
    Promise("Resuming finds the newest good state or refuses", ("tests/io/test_resume.py",)),
    Promise(
        "A step that is not finite never changes the weights silently",
        ("tests/callbacks/test_fault_guard.py",),
    ),
    Promise("The KL term is safe against overflow", ("tests/laws/variational/test_vae.py",)),
    Promise("Bad data are refused with a one-line message", ("tests/data", "tests/security/test_safe_data.py")),
    Promise(
        "Bad values are refused before training: exit code 2, a one-line message, no files left behind",
        ("tests/cli/test_bad_values.py",),
        "{values} values for {options} flags, {refused} refused, none accepted silently",
        "bad_values",
    ),
    Promise("Two processes give the same result as one on the same global batch", ("tests/test_models.py",)),
    Promise(
        "A rank that is killed, raises or freezes ends the run; a restarted run continues bit for bit",
        ("tests/training/test_distributed.py",),
        "{runs} failures of a rank, {restarts} of them restarted by torchrun",
        "ranks",
    ),
    Promise(
        "Noise differs between ranks, only rank 0 writes, each sample counts once",
        ("tests/training/test_distributed.py",),
    ),
    Promise("Any valid shape, batch size and value gives finite numbers", ("tests/test_properties.py",)),
    Promise(
        "A damaged file or configuration is read, or refused with a one-line message",
        ("tests/fuzz/test_fuzz.py",),
        "{files} files and {configs} configurations fuzzed, {defects} crashed",
        "fuzz",
    ),
    Promise(
        "A truncated, altered, forged or foreign .aez file is refused with a one-line message",
        ("tests/tasks/test_codec_container.py",),
    ),
    Promise(
        "Lossless compression restores the data, and takes as many bits as the ELBO predicts",
        ("tests/tasks/test_codec_promises.py",),
    ),
    Promise(
        "In long training, memory does not grow and all numbers stay finite",
        ("tests/test_soak.py",),
        "{count} long runs with random hyperparameters, {steps} steps",
        "soak",
    ),
    Promise(
        "The test suite catches injected faults",
        ("tests/test_mutants.py",),
        "{caught} of {faults} faults caught, drawn at random from a list of {listed}",
        "mutants",
    ),
    Promise(
        "An --input larger than memory is read, and its results written, batch by batch",
        ("tests/data/test_npy.py",),
        "{samples} samples of 48 KiB: a peak of {peak} MiB",
        "input",
    ),
    Promise(
        "A compiled model has the same loss and gradients as the eager one",
        ("tests/test_models.py",),
        "{models} models compiled",
        "inductor",
    ),
    Promise("Golden values detect any change of results", ("tests/test_models.py",)),
)


def results():
    """The counts of all runs so far."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def is_recording():
    """Whether this program runs the tests: then tests that draw cases or stop early run all cases."""
    return _SWITCH in os.environ


def record(run, counts):
    """Save the counts of a run if it was started by this program; other runs write nothing."""
    if is_recording():
        RESULTS.write_text(json.dumps(results() | {run: counts}, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def add(run, case, counts):
    """Add the counts of one case to those of a run, which are summed over the cases."""
    held = results().get(run, {})
    cases = held.get("cases", {}) | {case: counts}
    names = sorted({name for case in cases.values() for name in case})
    total = {name: sum(case.get(name, 0) for case in cases.values()) for name in names}
    record(run, {"cases": cases, "count": len(cases)} | total)


def page(counts):
    """The page as text."""
    lines = [
        "# Guarantees",
        "",
        "Each row states a guarantee, the test that checks it, and the counts of the last run of that test.",
        "`python -m tests.promises` writes this page; `--run` measures the figures again.",
        "",
        "| guarantee | test | last run |",
        "|---|---|---|",
    ]
    for promise in PROMISES:
        tests = ", ".join(f"[{test}]({test})" for test in promise.tests)
        figure = promise.figure.format(**counts[promise.run]) if promise.run in counts else ""
        lines.append(f"| {promise.text} | {tests} | {figure} |")
    return "\n".join(lines) + "\n"


def measure(run):
    """Run a measurement and return its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counts.json"
        before = results()
        before.pop(run, None)
        RESULTS.write_text(json.dumps(before, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        command = [sys.executable, *(part.format(out=out) for part in RUNS[run])]
        status = subprocess.run(command, cwd=ROOT, env=os.environ | {_SWITCH: "1"}, check=False).returncode
        if out.is_file():
            counts = json.loads(out.read_text(encoding="utf-8"))
            os.environ[_SWITCH] = "1"
            record(run, {key: value for key, value in counts.items() if isinstance(value, int)})
        return status


def main(arguments=None):
    """Measure if requested, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.promises", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", nargs="*", choices=[*RUNS], metavar="NAME", help=f"measure anew: {', '.join(RUNS)}")
    options = parser.parse_args(arguments)
    chosen = [] if options.run is None else options.run or [*RUNS]
    failed = [run for run in chosen if measure(run)]
    PAGE.write_text(page(results()), encoding="utf-8")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
