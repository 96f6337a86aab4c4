"""Whether a graph is being traced, whose computation must not depend on values or memory layouts."""

import torch


def is_tracing() -> bool:
    """Whether a graph is being traced, for a compiler or for export."""
    return bool(torch.compiler.is_compiling() or torch.jit.is_tracing())  # type: ignore[attr-defined]


def is_exporting() -> bool:
    """Whether a graph is being exported, which should only contain torch's operators."""
    return bool(torch.jit.is_tracing() or torch.compiler.is_exporting())  # type: ignore[attr-defined]
