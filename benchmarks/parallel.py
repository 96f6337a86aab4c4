"""Rows measured in parallel: one process per job, each with its share of the machine."""

import argparse
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue
from typing import Any

from . import common, processes


def run_rows(
    module: str, specs: Sequence[dict[str, Any]], timeout: float, jobs: int, accelerator: str
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield (spec, row) as each row ends; the libraries are imported once for all rows.

    Args:
        module: module that measures a row, see `processes.run_row`.
        specs: what to measure.
        timeout: seconds after which a row is abandoned.
        jobs: number of rows measured at the same time.
        accelerator: Lightning's accelerator; if it can mean GPUs, they are assigned to the jobs in turn.
    """
    slots: SimpleQueue[dict[str, str]] = SimpleQueue()
    for slot in range(jobs):
        slots.put(job_environment(slot, jobs, accelerator))

    def run(spec: dict[str, Any]) -> dict[str, Any]:
        slot = slots.get()
        try:
            return processes.run_row(module, spec, timeout, slot, warm=True)
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, spec): spec for spec in specs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            processes.kill_all()
            raise


def measure_missing(
    table: common.ResultsCSV,
    module: str,
    specs: Iterable[dict[str, Any]],
    arguments: argparse.Namespace,
    columns: Sequence[str],
    shown: Sequence[str],
    names: Sequence[str] = ("model", "options"),
) -> None:
    """Measure the missing rows of a table, `row` of each spec with all `columns`, and print the values of `shown`.

    The columns `names` and `seed` say which row a printed line is of.
    """
    needed = [spec for spec in specs if table.needs(spec["row"])]
    found = run_rows(module, needed, arguments.timeout, arguments.jobs, arguments.accelerator)
    for i, (spec, measured) in enumerate(found, start=1):
        row = measured | spec["row"]
        table.put({name: row.get(name) for name in columns})
        figures = [f"{name} {common.as_text(row[name])}" for name in shown if row.get(name) not in (None, "")]
        head = f"[{i}/{len(needed)}] {' '.join(filter(None, map(row.get, names)))}, seed {row['seed']}"
        print(f"{head}: {row.get('error') or ', '.join(figures)}", flush=True)


def job_environment(slot: int, jobs: int, accelerator: str) -> dict[str, str]:
    """Environment variables for one of several jobs; a number of threads that the user has set is kept."""
    found = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // jobs))}
    if accelerator not in ("cpu", "mps"):
        import torch

        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        devices = [device for device in visible.split(",") if device]
        found |= {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {}
    return found
