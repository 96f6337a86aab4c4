"""torch's linear layer, with the same parameters and faster products on some processors.

For float32 matrices on a CPU, torch calls MKL, which computes 256 bits at a time on AMD's processors. Since Zen 5 these
have 512-bit units. oneDNN, torch's library for convolutions and 16-bit types, uses them: it is twice as fast, with sums
in another order. On other processors, for other types and in traced or exported graphs, torch's layers are used.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

from aezoo.speed.swapping import Swapped
from aezoo.training.tracing import is_exporting

# number of multiplications above which the overhead of Python is small, and above which oneDNN is faster
_LARGE, _MIN_MULTIPLICATIONS = 2**21, 2**18


def onednn_linear(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., K), (N, K), (N,) -> (..., N), without derivatives."""
    rows = a if a.dim() == 2 else a.flatten(0, -2)
    # oneDNN multiplies a matrix with gaps number by number, thousands of times slower, and misreads other strides
    n, k = b.shape
    b = b if b.stride() in ((k, 1), (1, n)) else b.clone(memory_format=torch.contiguous_format)
    bias = bias if bias is None else bias.contiguous()
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, b, bias, "none", [], "")
    # the result of an operator must not be a view
    return out if a.dim() == 2 else torch.ops.aten._unsafe_view(out, [*a.shape[:-1], n])


def _mkl_uses_half_width() -> bool:
    """Whether MKL uses only half of this processor's width; older versions of torch do not recognise the processor."""
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    # all AMD processors that compute 512 bits at a time have vp2intersect, and none before them
    wide = str(has.get("cpu_name")).startswith("AMD") and bool(has.get("avx512_vp2intersect"))
    if not (wide and torch.backends.mkl.is_available()):
        return False
    one = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    try:
        return onednn_linear(one[None], one).item() == 1
    except (AttributeError, RuntimeError, TypeError):  # private to torch, and missing in some builds
        return False


MKL_HALF_WIDTH = _mkl_uses_half_width()
# whether inductor calls oneDNN directly, see `aezoo.speed.inductor_lowering`
lowered_by_inductor = False
# whether the processor has units for products of 16-bit tiles
HAS_AMX = bool(getattr(torch.cpu, "get_capabilities", dict[str, bool])().get("amx_bf16"))


# private functions of torch that detect derivatives for which only torch's operators have rules
_signs: tuple[Any, ...]
try:
    _signs = (
        torch._C._are_functorch_transforms_active,
        torch._C._functorch.is_legacy_batchedtensor,
        torch.autograd.forward_ad._current_level,
    )
except AttributeError:
    _signs = ()


def needs_torch_autograd(*tensors: Tensor) -> bool:
    """Whether derivatives are being computed for which only torch's operators have rules.

    These are those of torch.func, forward-mode ones, and batched ones, as in
    `torch.autograd.grad(is_grads_batched=True)`. True in a version of torch without these functions.
    """
    if not _signs:
        return True
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return True
    many = torch._C._functorch.is_legacy_batchedtensor
    return not torch.compiler.is_compiling() and any(many(tensor) for tensor in tensors)


def _backward(multiply: Callable[..., Tensor], ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    (a, b), (of_a, of_b, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
    rows = g.reshape(-1, g.shape[-1])
    return (
        multiply(g, b.t(), None) if of_a else None,
        multiply(rows.t(), a.flatten(0, -2).t(), None) if of_b else None,
        rows.sum(0) if of_bias else None,
    )


class OneDNNLinear(torch.autograd.Function):
    """`onednn_linear`, with derivatives of any order."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        """The values."""
        of_a, of_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(a if of_b else None, b if of_a else None)
        return onednn_linear(a, b, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients with respect to both factors and to the bias."""
        multiply = OneDNNLinear.apply if torch.is_grad_enabled() else onednn_linear
        return _backward(F.linear if needs_torch_autograd(*gradients) else multiply, ctx, *gradients)


# the same as a custom operator: inductor uses oneDNN's only for constant weights, and `OneDNNLinear` is faster
_ops = torch.library.Library("aezoo", "FRAGMENT")
if not hasattr(torch.ops.aezoo, "product"):
    _ops.define("product(Tensor a, Tensor b, Tensor? bias) -> Tensor")
    _ops.impl("product", onednn_linear, "CPU")
    # for shapes without values; register_fake would search all of Python's modules
    _ops.impl("product", lambda a, b, bias: a.new_empty(*a.shape[:-1], len(b)), "Meta")
    torch.library.register_autograd(
        "aezoo::product",
        partial(_backward, torch.ops.aezoo.product.default),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]),
        lib=_ops,
    )
onednn_linear_op = torch.ops.aezoo.product.default


def _flops(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b[0]


def register_flops(operator: Any, flops: Callable[..., int]) -> None:
    """Register an operator with torch's FLOP counter, if this build of torch has it.

    Args:
        operator: the operator, or None.
        flops: a function of the input shapes and `out_shape`.
    """
    if operator is not None and operator not in flop_registry:
        register_flop_formula(operator)(flops)


register_flops(getattr(torch.ops.mkldnn, "_linear_pointwise", None), _flops)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: (..., K), (N, K), (N,) -> (..., N)."""
    if MKL_HALF_WIDTH and _is_supported(x, weight, bias):
        if torch.compiler.is_compiling():
            out: Tensor = onednn_linear_op(x, weight, bias)
        else:
            out = OneDNNLinear.apply(x, weight, bias) if torch.is_grad_enabled() else onednn_linear(x, weight, bias)
        return out
    return F.linear(x, weight, bias)


def _is_supported(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if is_exporting():
        return False
    given = [x, weight] if bias is None else [x, weight, bias]
    if not all(_is_plain(tensor) for tensor in given) or torch.is_autocast_enabled("cpu"):
        return False
    # torch's error names shapes that do not fit
    matrices = x.dim() > 1 and weight.dim() == 2 and x.shape[-1] == weight.shape[1]
    fits = matrices and (bias is None or bias.shape == weight.shape[:1])
    return fits and _is_large(x.numel() * len(weight)) and not needs_torch_autograd()


def _is_plain(x: Tensor) -> bool:
    """Whether it is a dense float32 tensor and not a subclass with another product."""
    mine = type(x) in (Tensor, nn.Parameter) and x.is_cpu and x.dtype == torch.float32
    return mine and x.layout == torch.strided and not x.is_nested


def _is_large(multiplications: Any) -> bool:
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(multiplications >= (_MIN_MULTIPLICATIONS if lowered_by_inductor else _LARGE))
    return bool(multiplications >= _LARGE) and bool(torch.backends.mkldnn.enabled)


class Linear(Swapped, nn.Linear):
    """`torch.nn.Linear`."""

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """(..., in features) -> (..., out features)."""
        return linear(input, self.weight, self.bias)
