"""The report of runs: one HTML file from the files in their folders; needs no torch."""

from aezoo.report.writer import write_report

__all__ = ["write_report"]
