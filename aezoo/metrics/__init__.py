"""Metrics that torchmetrics lacks, and the set that every evaluation reports."""

from aezoo.metrics.evaluation import Evaluation, Means

__all__ = ["Evaluation", "Means"]
