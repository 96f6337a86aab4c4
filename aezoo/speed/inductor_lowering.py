"""Compiles the products of `aezoo.speed.linear` to direct calls of oneDNN, without Python, on suitable matrices.

For an unknown operator, inductor writes another copy of a matrix for each order in which it is read, and oneDNN then
writes a transposed matrix value by value. Here it is written once, and inductor's vectorised loops write a transposed
one. Together this saves an eighth of the compiled step of 784-128-64-32-64-128-784.

No part of inductor used here is public. If a version lacks something, the operator is called like any other.
"""

from functools import cache
from typing import Any

import torch

from aezoo.speed import linear


def enable() -> None:
    """Use the lowering in graphs that are compiled from now on, on processors where it pays."""
    linear.lowered_by_inductor = linear.MKL_HALF_WIDTH and register()


@cache
def register() -> bool:
    """Register the lowering with inductor in this process; returns whether this is possible."""
    try:
        from torch._inductor import lowering

        straight = lowering.fallback_handler(torch.ops.mkldnn._linear_pointwise.default, False)
        as_any_other = lowering.fallback_handler(linear.onednn_linear_op, False)
        register = lowering.register_lowering(linear.onednn_linear_op, type_promotion_kind=None)
    except (AttributeError, ImportError, TypeError):
        return False

    def lower(a: Any, b: Any, bias: Any) -> Any:
        try:
            *rows, k = a.get_size()
            matrix = a if len(rows) == 1 else lowering.view(a, [-1, k])
            out = straight(_matrix(matrix, True), _matrix(b, False), _vector(bias), "none", [], "")
            return out if len(rows) == 1 else lowering.view(out, [*rows, b.get_size()[0]])
        except (AttributeError, NotImplementedError, TypeError):  # also raised for symbolic sizes
            return as_any_other(a, b, bias)

    register(lower)
    return True


def _matrix(x: Any, row_by_row: bool) -> Any:
    """A contiguous matrix in memory, row by row or, if allowed, column by column."""
    from torch._inductor import ir

    x = ir.ExternKernel.realize_input(x)
    if ir.is_storage_and_layout(x):
        ir.as_storage_and_layout(x, freeze=True)
    rows, columns = (int(n) for n in x.get_size())
    strides = [int(n) for n in x.get_stride()]
    fits = strides == [columns, 1] or (strides == [1, rows] and not row_by_row)
    return x if fits else ir.ExternKernel.require_contiguous(x)


def _vector(x: Any) -> Any:
    from torch._inductor import ir

    return x if x is None else ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x))
