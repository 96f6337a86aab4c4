"""Metrics that torchmetrics does not have, and the set of metrics that every evaluation reports."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from aezoo.metrics.evaluation import Evaluation, Means

if TYPE_CHECKING:
    from aezoo.metrics.codebook import CodebookPerplexity, CodebookUsage, codebook_metrics
    from aezoo.metrics.coherence import CrossCoherence, JointCoherence
    from aezoo.metrics.disentanglement import DCI, MIG, SAP, Modularity
    from aezoo.metrics.disentanglement_groups import IRS, UDR, FactorVAEScore
    from aezoo.metrics.sparsity import (
        FVU,
        L0,
        Cosine,
        DeadShare,
        ReconstructionBias,
        Recovery,
        Shrinkage,
        sparse_metrics,
    )

__all__ = [
    "DCI",
    "FVU",
    "IRS",
    "L0",
    "MIG",
    "SAP",
    "UDR",
    "CodebookPerplexity",
    "CodebookUsage",
    "Cosine",
    "CrossCoherence",
    "DeadShare",
    "Evaluation",
    "FactorVAEScore",
    "JointCoherence",
    "Means",
    "Modularity",
    "ReconstructionBias",
    "Recovery",
    "Shrinkage",
    "codebook_metrics",
    "sparse_metrics",
]

# imported on first use: training does not need them
_LATER = {
    **dict.fromkeys(("CodebookPerplexity", "CodebookUsage", "codebook_metrics"), "codebook"),
    **dict.fromkeys(("CrossCoherence", "JointCoherence"), "coherence"),
    **dict.fromkeys(("DCI", "MIG", "SAP", "Modularity"), "disentanglement"),
    **dict.fromkeys(("IRS", "UDR", "FactorVAEScore"), "disentanglement_groups"),
    **dict.fromkeys(("FVU", "L0", "Cosine", "DeadShare", "ReconstructionBias", "Recovery"), "sparsity"),
    **dict.fromkeys(("Shrinkage", "sparse_metrics"), "sparsity"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
