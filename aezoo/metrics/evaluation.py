"""The metrics of validation and test: exact means of the loss terms, and reconstruction quality by torchmetrics."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import MeanSquaredError, Metric, MetricCollection

from aezoo.metrics.similarity import Limits, StructuralSimilarity, has_peak, psnr

_KNOWN = "share of values that are not missing"


class Means:
    """Means of named scalars over samples: any batch size, all ranks, kept on the device without a sync per step."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sums: Tensor | None = None
        self._count = 0

    def add(self, terms: dict[str, Tensor], count: int, values: Tensor | None = None) -> None:
        """Add means over `count` samples; the names must be the same each time.

        Args:
            terms: scalars by name.
            count: number of samples that each scalar is the mean of.
            values: the same scalars as one vector, if available.
        """
        if not terms:
            return
        if values is None:
            # one operation for all terms instead of three for each
            values = torch.stack([*terms.values()]).detach()
        if self._sums is None:
            self._names = tuple(terms)
            dtype = torch.float32 if values.device.type == "mps" else torch.float64
            self._sums = torch.zeros(len(terms), dtype=dtype, device=values.device)
        self._sums.add_(values, alpha=count)
        self._count += count

    def compute(self) -> dict[str, Tensor]:
        """The mean of each name over all samples of all ranks, as float32 scalars."""
        if self._sums is None:
            return {}
        values = self._sums
        count = torch.tensor(float(self._count), dtype=values.dtype, device=values.device)
        packed = torch.cat([values, count[None]])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(packed)
        means = (packed[:-1] / packed[-1]).float()
        return dict(zip(self._names, means.unbind(), strict=True))

    def reset(self) -> None:
        """Remove all that has been added."""
        self._sums, self._count = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Everything added on this rank, as tensors and plain values."""
        return {"names": list(self._names), "sums": self._sums, "count": self._count}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from the result of `state_dict`."""
        sums = state["sums"]
        self._names, self._count = tuple(state["names"]), int(state["count"])
        self._sums = None if sums is None else sums.to(device, copy=True)


class Evaluation:
    """Loss terms and mse, psnr of data in [0, 1], ssim of images; bits per dimension if the terms include an `elbo`.

    For models with a sparse code it adds `aezoo.metrics.sparse_metrics`; for models whose code is indices, `usage` and
    `perplexity` of their codebooks, over all samples.

    The nll of a deterministic model is not a bound on log p(x), because its code is not counted, so there are no bits
    per dimension. Other models have -elbo / (D log 2), with the bound of the model, which is tighter for
    importance-weighted models. This is a code length, as in papers, if the likelihood is discrete and matches the data:
    for Bernoulli, binarised data, not grey values. For a density, it may be below 0.

    PSNR and SSIM use a data range of 1, the range of data scaled to [0, 1]; outputs are not clipped. Other data, such
    as standardised ones, have no PSNR: `aezoo.metrics.similarity.has_peak` decides, for the commands, too.

    Args:
        input_shape: shape of one sample; ssim is reported for (C, H, W) with both sides above 5.
        device: device of the data.
        code_shape: shape of one code, for models with a sparse code.
        gaps: whether samples may have missing values, NaN: mse, psnr and bits per dimension are those of the others,
            ssim that of samples without missing values.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        device: torch.device,
        code_shape: tuple[int, ...] | None = None,
        gaps: bool = False,
    ) -> None:
        self._means, self._gaps = Means(), gaps
        self._dims = math.prod(input_shape)
        self._metrics: dict[str, Metric] = {"mse": MeanSquaredError()}
        if StructuralSimilarity.supports(input_shape):
            self._metrics["ssim"] = StructuralSimilarity(data_range=1.0)
        self._limits = Limits()
        for metric in (self._limits, *self._metrics.values()):
            metric.to(device)
        self._sparse: MetricCollection | None = None
        if code_shape is not None:
            from aezoo.metrics.sparsity import sparse_metrics

            self._sparse = sparse_metrics(input_shape, code_shape)
            if device.type == "mps":
                self._sparse.set_dtype(torch.float32)
            self._sparse.to(device)
        self._codebook_metrics: dict[str, MetricCollection] = {}

    def add(
        self,
        terms: dict[str, Tensor],
        x: Tensor,
        x_hat: Tensor,
        code: Tensor | None = None,
        codebooks: dict[str, tuple[Tensor, tuple[int, ...]]] | None = None,
    ) -> None:
        """Add one batch.

        Args:
            terms: terms of the loss, means over the batch.
            x: the batch's samples.
            x_hat: their reconstructions.
            code: their codes, if these are sparse.
            codebooks: their indices, (B, Q, *positions), and the sizes of Q codebooks, under a name or "".
        """
        for name, (indices, sizes) in (codebooks or {}).items():
            if name not in self._codebook_metrics:
                from aezoo.metrics.codebook import codebook_metrics

                self._codebook_metrics[name] = codebook_metrics(sizes, f"_{name}" if name else "").to(x.device)
            self._codebook_metrics[name].update(indices)
        known = ~x.isnan() if self._gaps else None
        if known is not None:
            terms = {**terms, _KNOWN: known.float().mean()}
        self._means.add(terms, len(x))
        if self._sparse is not None:
            self._sparse.update(code=code, x=x, x_hat=x_hat)
        self._limits.update(x if known is None else x[known])
        for name, metric in self._metrics.items():
            pair = x_hat.float().contiguous(), x.float().contiguous()
            if known is None or known.all():
                metric.update(*pair)
            elif name != "ssim":
                metric.update(*(values[known] for values in pair))
            elif (whole_B := known.flatten(1).all(1)).any():
                metric.update(*(values[whole_B] for values in pair))

    def compute(self) -> dict[str, Tensor]:
        """All figures, over all samples of all ranks."""
        figures = self._means.compute()
        dims = self._dims * figures.pop(_KNOWN, 1)
        if "elbo" in figures:
            figures["bits_per_dim"] = -figures["elbo"] / (dims * math.log(2.0))
        figures["mse"] = mse = self._metrics["mse"].compute()
        if has_peak(*map(float, self._limits.compute())):
            figures["psnr"] = mse.new_tensor(psnr(float(mse)))
        figures |= {name: metric.compute() for name, metric in self._metrics.items() if name != "mse"}
        for metrics in (*self._codebook_metrics.values(), *([] if self._sparse is None else [self._sparse])):
            figures |= metrics.compute()
        return figures
