"""Convolutions of images on a CPU with the batch as the innermost spatial dimension: (H, W, B, C) in memory.

oneDNN multiplies one row of the grid at a time. On small grids, this is a matrix of only 2 to 8 points. In this
layout, the batch is another axis of the grid, along which the kernel has a single tap. Then the matrices have as
many rows as there are samples, and padding is never multiplied. Values and input gradients are computed in this way,
and so is the gradient of 16-bit weights; that of 32-bit weights is faster with channels last. Forward and backward of a
layer are up to 2.4 times as fast as torch's, and 6.7 times in bfloat16, where torch also adds a bias number by number
(`python -m benchmarks.convolutions`). The shape of a tensor stays (B, C, H, W): only its strides change, and
activations keep them.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count

from aezoo.speed import conv_products, linear
from aezoo.speed.conv_products import Convolution, Geometry, channels_first, channels_last, has_remainder
from aezoo.speed.memory_format import as_base_tensor, is_batch_inner, to_layout

_onednn: Any = torch.ops.mkldnn
_NO_DILATION = (1, 1, 1)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """(B, C, H, W), (O, C, rows, columns), (O,) -> (B, O, h, w) in batch-inner layout; without derivatives."""
    padding, stride = (*geometry.padding, 0), (*geometry.stride, 1)
    return _as_images(
        torch.mkldnn_convolution(_as_volume(x), _as_volume_weight(weight), bias, padding, stride, _NO_DILATION, 1)
    )


def transpose(y: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """(B, O, h, w), (O, C, rows, columns), (C,) -> (B, C, H, W) in batch-inner layout; without derivatives."""
    # oneDNN adds a bias value by value if the larger grid is not a whole number of strides
    if bias is not None and has_remainder(geometry.large, geometry.stride):
        return transpose(y, weight, None, geometry).add_(bias[:, None, None])
    padding, extra, stride = (*geometry.padding, 0), (*geometry.output_padding(), 0), (*geometry.stride, 1)
    volume = _onednn._convolution_transpose_pointwise(
        _as_volume(y), _as_volume_weight(weight), bias, padding, extra, stride, _NO_DILATION, 1, "none", [], ""
    )
    return _as_images(volume)


def conv_weight_grad(x: Tensor, y: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of <y, convolve(x)> with respect to the weights, for 16 bits: (O, C, rows, columns)."""
    settings = (*geometry.stride, 1), (*geometry.padding, 0), _NO_DILATION, False, (0, 0, 0), 1, (False, True, False)
    found = torch.ops.aten.convolution_backward(
        _as_volume(y), _as_volume(x), _as_volume_weight(weight), None, *settings
    )
    return found[1].squeeze(4)


def _as_volume(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (1, C, H, W, B) with channels last, which torch detects from the stride of the first axis."""
    b, c, h, w = x.shape
    return to_layout(x, batch_inner=True).as_strided((1, c, h, w, b), (x.numel(), 1, w * b * c, b * c, c))


def _as_volume_weight(weight: Tensor) -> Tensor:
    """(O, C, rows, columns) -> (O, C, rows, columns, 1) with channels last."""
    c, rows, columns = weight.shape[1:]
    strides = (c * rows * columns, 1, columns * c, c, c)
    return to_layout(weight, batch_inner=False).as_strided((*weight.shape, 1), strides)


def _as_images(volume: Tensor) -> Tensor:
    """(1, C, H, W, B) -> (B, C, H, W)."""
    return as_base_tensor(volume[0].permute(3, 0, 1, 2))


@functools.cache
def is_available() -> bool:
    """Whether this build of torch has oneDNN's operators, one of which is private."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float32, device="cpu")
    point = Geometry((1, 1), (1, 1), (0, 0), (1, 1), (1, 1))
    try:
        return transpose(one, one, None, point).item() == convolve(one, one, None, point).item() == 1
    except (AttributeError, RuntimeError, TypeError):
        return False


def _flops(
    x: torch.Size, weight: torch.Size, *_: Any, out_shape: torch.Size, transposed: bool = False, **__: Any
) -> int:
    return conv_flop_count([*x], [*weight], [*out_shape], transposed)


linear.register_flops(getattr(torch.ops.aten, "mkldnn_convolution", None), _flops)
linear.register_flops(
    getattr(_onednn, "_convolution_transpose_pointwise", None), functools.partial(_flops, transposed=True)
)


class BatchInnerConv(Convolution):
    """A convolution, transposed or not, in batch-inner layout; the input's gradient has the input's layout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        weight_by_product: bool,
        transposed: bool,
    ) -> Tensor:
        """The values of the convolution."""
        Convolution.save(ctx, x, weight, geometry, weight_by_product, transposed)
        return (transpose if transposed else convolve)(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients with respect to the input, the weights and the bias."""
        if torch.is_grad_enabled() or linear.needs_torch_autograd(*gradients):
            return Convolution.backward(ctx, *gradients)
        (x, weight), (of_x, of_weight, of_bias, *_) = ctx.saved_tensors, ctx.needs_input_grad
        g = to_layout(gradients[0], batch_inner=True)
        by_bias = g.sum((0, 2, 3)) if of_bias else None
        by_weight = BatchInnerConv.weight_gradient(ctx, g, x, weight) if of_weight else None
        back = convolve if ctx.transposed else transpose
        by_x = to_layout(back(g, weight, None, ctx.geometry), batch_inner=is_batch_inner(x)) if of_x else None
        return by_x, by_weight, by_bias, None, None, None

    @staticmethod
    def weight_gradient(ctx: Any, g: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
        """The gradient with respect to the weights, channels last."""
        large, small = (g, x) if ctx.transposed else (x, g)
        if ctx.weight_by_product:
            return channels_first(
                conv_products.conv_weight_grad(channels_last(large), channels_last(small), ctx.geometry)
            )
        if g.itemsize == 2:
            return conv_weight_grad(large, small, weight, ctx.geometry)
        output_mask = False, True, False
        return Convolution.torch_reference(
            ctx, to_layout(g, batch_inner=False), to_layout(x, batch_inner=False), weight, output_mask
        )[1]
