"""torch's linear layer, with the same parameters and results, multiplied as fast as the processor can.

For matrices of float32 on a CPU torch calls MKL, which on AMD's processors computes 256 bits at a time. Since Zen 5
these compute 512, and oneDNN, which torch has for convolutions and for 16 bits, does so: twice as fast. On other
processors, of other types and in graphs for elsewhere all is torch's own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

# multiplications from which on the way through Python is short
_LARGE = 2**21


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """(..., K), (N, K), (N,) -> (..., N), without derivatives."""
    rows = a if a.dim() == 2 else a.flatten(0, -2)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, b, bias, "none", [], "")
    # an operator's result is nobody's view
    return out if a.dim() == 2 else torch.ops.aten._unsafe_view(out, [*a.shape[:-1], len(b)])


def _halved() -> bool:
    """Whether MKL uses half of this processor and oneDNN all; older versions of torch do not know the processor."""
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    # of AMD's, those that compute 512 bits at a time are those that have vp2intersect
    wide = str(has.get("cpu_name")).startswith("AMD") and bool(has.get("avx512_vp2intersect"))
    if not (wide and torch.backends.mkl.is_available()):
        return False
    try:
        return product(torch.ones(1, 1), torch.ones(1, 1)).item() == 1
    except (AttributeError, RuntimeError, TypeError):  # private to torch, and not in all of its builds
        return False


HALVED = _halved()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(multiply: Callable[..., Tensor], ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    (a, b), (of_a, of_b, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
    rows = g.reshape(-1, g.shape[-1])
    return (
        multiply(g, b.t(), None) if of_a else None,
        multiply(rows.t(), a.flatten(0, -2).t(), None) if of_b else None,
        rows.sum(0) if of_bias else None,
    )


def is_batched(*tensors: Tensor) -> bool:
    """Whether one stands for many, as in `torch.autograd.grad(..., is_grads_batched=True)`: torch's operators alone."""
    return any(torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors)


class Product(torch.autograd.Function):
    """`product`, with derivatives of any order."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """The values."""
        out = product(*inputs)
        _keep(ctx, inputs, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """With respect to both factors and to the bias."""
        multiply = Product.apply if torch.is_grad_enabled() else product
        return _backward(F.linear if is_batched(*gradients) else multiply, ctx, *gradients)


# the same for graphs, in which inductor takes oneDNN's own for one of constant weights; a step takes longer by it
_ops = torch.library.Library("aezoo", "FRAGMENT")
_ops.define("product(Tensor a, Tensor b, Tensor? bias) -> Tensor")
_ops.impl("product", product, "CPU")
in_graph = torch.ops.aezoo.product.default
torch.library.register_fake("aezoo::product", lambda a, b, bias: a.new_empty(*a.shape[:-1], len(b)), lib=_ops)
torch.library.register_autograd("aezoo::product", partial(_backward, in_graph), setup_context=_keep, lib=_ops)


def _flops(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b[0]


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_flops)


def is_transformed() -> bool:
    """Whether torch.func or forward derivatives are at work, whose rules only torch's own operators have."""
    # neither has a public name
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: (..., K), (N, K), (N,) -> (..., N)."""
    if HALVED and _suits(x, weight):
        if torch.compiler.is_compiling():
            out: Tensor = in_graph(x, weight, bias)
        else:
            out = Product.apply(x, weight, bias) if torch.is_grad_enabled() else product(x, weight, bias)
        return out
    return F.linear(x, weight, bias)


def _suits(x: Tensor, weight: Tensor) -> bool:
    if torch.jit.is_tracing() or torch.compiler.is_exporting():  # type: ignore[attr-defined]
        return False
    full = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    large = x.dim() > 1 and x.numel() * len(weight) >= _LARGE
    # torch names the shapes that do not fit
    fits = large and x.shape[-1] == weight.shape[1]
    return x.is_cpu and weight.is_cpu and full and fits and not is_transformed()


class Linear(nn.Linear):
    """`torch.nn.Linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in features) -> (..., out features)."""
        return linear(input, self.weight, self.bias)
