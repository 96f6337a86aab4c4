"""The report of runs: one HTML file from what their folders hold; reads files only and needs no torch."""

from aezoo.report.writer import write_report

__all__ = ["write_report"]
