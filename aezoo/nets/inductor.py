"""How inductor calls the products of `aezoo.nets.linear`: oneDNN itself, past Python, on matrices as it wants them.

Of an operator that it does not know inductor has a matrix written once more for each order in which it is read, and
oneDNN then writes a transposed one number by number. Here it is written once, and a transposed one by the vector
instructions of inductor's own loops: together an eighth of the compiled step of 784-128-64-32-64-128-784.

Nothing of inductor has a public name. Where a version lacks something, the operator is called as any other.
"""

from functools import cache
from typing import Any

import torch

from aezoo.nets import linear


@cache
def teach() -> bool:
    """Tell inductor, in this process; returns whether it can be told."""
    try:
        from torch._inductor import lowering

        straight = lowering.fallback_handler(torch.ops.mkldnn._linear_pointwise.default, False)
        as_any_other = lowering.fallback_handler(linear.as_operator, False)
        register = lowering.register_lowering(linear.as_operator, type_promotion_kind=None)
    except (AttributeError, ImportError, TypeError):
        return False

    def lower(a: Any, b: Any, bias: Any) -> Any:
        try:
            *rows, k = a.get_size()
            matrix = a if len(rows) == 1 else lowering.view(a, [-1, k])
            out = straight(_matrix(matrix, True), _matrix(b, False), _vector(bias), "none", [], "")
            return out if len(rows) == 1 else lowering.view(out, [*rows, b.get_size()[0]])
        except (AttributeError, NotImplementedError, TypeError):  # and sizes that are no numbers
            return as_any_other(a, b, bias)

    register(lower)
    return True


def _matrix(x: Any, row_by_row: bool) -> Any:
    """A matrix in memory without gaps, row by row or, if it may be, column by column."""
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
