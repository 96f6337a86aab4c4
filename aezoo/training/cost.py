"""The cost of a training step, estimated before the first step."""

import copy
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from aezoo.training.interface import ModelInterface
from aezoo.training.seeding import forked_rng

# if one of them is exceeded, the fit prints how to train faster
MANY_PARAMETERS = 20_000_000
LONG_STEP = 1.0  # seconds
# FLOP/s of whole training steps in float32. Per thread: the median of this package's networks at their default sizes
# on 1x28x28 and 3x64x64, which range from 15e9 (convnext) to 86e9 (dc) on one thread of a Xeon with AVX-512. Per
# accelerator: half the peak of an A100 without its tensor cores
_OF_THREAD, _OF_ACCELERATOR = 5e10, 1e13
# batches for which FLOPs are counted: the loss of some models compares samples
_FEW = 2


def seconds_per_step(model: ModelInterface, batch_size: int, device: torch.device) -> float:
    """Estimated duration of a training step, from the FLOPs of products and convolutions.

    Args:
        model: before its first step.
        batch_size: samples in a step.
        device: where it trains.
    """
    # a copy, because a training step changes counters; in evaluation mode with several ranks, which would wait for
    # each other
    model = copy.deepcopy(model).train(not (dist.is_available() and dist.is_initialized()))
    try:
        few, more = (_flops(model, n, model.loss) for n in (_FEW, 2 * _FEW))
    except (RuntimeError, AssertionError):  # raised by the counter, which does not support a loss with custom gradients
        model.requires_grad_(False)  # the counter does not support parameters that are inputs of a layer either
        few, more = (_flops(model, n, lambda x, _: model.forward(x)) for n in (_FEW, 2 * _FEW))
    per_sample = (more - few) / _FEW
    flops = few + per_sample * (batch_size - _FEW)
    rate = _OF_THREAD * torch.get_num_threads() if device.type == "cpu" else _OF_ACCELERATOR
    return 3 * flops / rate  # a backward pass takes twice as many as a forward pass


def _flops(model: ModelInterface, n: int, function: Callable[[Tensor, Tensor], object]) -> int:
    """FLOPs of the forward pass of a function of n samples and their labels."""
    weight = next(model.parameters())
    x = torch.full((n, *model.input_shape), 0.5, device=weight.device, dtype=weight.dtype)
    labels = torch.zeros(n, dtype=torch.long, device=weight.device)
    with torch.no_grad(), forked_rng(weight.device), FlopCounterMode(display=False) as counter:
        function(x, labels)
    return counter.get_total_flops()


def advice(model: ModelInterface, batch_size: int, device: torch.device) -> str | None:
    """A one-line message if training is costly: the cost, and the flag that lowers it; None if it is not.

    Args:
        model: before its first step.
        batch_size: samples in a step.
        device: where it trains.
    """
    parameters = sum(p.numel() for p in model.parameters())
    try:
        seconds = seconds_per_step(model, batch_size, device)
    except Exception:  # the first step will report the model's error
        seconds = 0.0
    costs = [f"{parameters:,} parameters"] if parameters > MANY_PARAMETERS else []
    if seconds > LONG_STEP:
        costs.append(f"an estimated {seconds:.2g} s for a step of {batch_size} samples")
    if not costs:
        return None
    size = next((name for name in ("hidden_dims", "width", "latent_dim") if name in model.hparams), None)
    cure = f"lower --model.{size}" if size else "lower --data.batch_size or --data.size"
    draws = next((name for name in ("n_groups", "n_samples") if name in model.hparams), None)
    if draws and seconds > LONG_STEP:
        cure += f" or --model.{draws}"
    default = getattr(model, "default_hidden_dims", None)
    if size == "hidden_dims" and default not in (None, tuple(model.hparams[size])):
        cure += f"; the default here is --model.hidden_dims '{[*default]}'"
    return f"this is slow to train, {' and '.join(costs)}: {cure}"
