"""`aezoo report`: one HTML file about a run, or several in comparison."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from aezoo.report import write_report


def main(argv: Sequence[str]) -> None:
    """Write the report and print its path.

    Raises:
        AezooError: there is no run, there are too many, or the file cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="aezoo report",
        description="Write one HTML file about a run, or about several in comparison: results, curves and what they "
        "say, pictures, tables that commands have written, settings that differ, time and environment.",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's folder, such as runs/vae/0, or a folder of runs"
    )
    parser.add_argument(
        "--out",
        "--output",
        metavar="FILE",
        help="the file (default: report.html in the run's folder or, of several runs, in the working directory)",
    )
    arguments = parser.parse_args(argv)
    print(write_report([Path(run) for run in arguments.runs], arguments.out))
