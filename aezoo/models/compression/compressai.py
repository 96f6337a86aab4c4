"""Learned image compression in the layout of the library CompressAI (Bégaint et al. 2020), https://arxiv.org/abs/2011.03029

Implements its seven architectures, so that models trained by others can be evaluated, used and trained further:

    bmshj2018-factorized(-relu)   y = f(x)    P(y^) factorised, learned
    bmshj2018-hyperprior          z = h(|y|)    P(y^ | z^) = N(0, s^2) * U    s = g_h(z^)
    mbt2018-mean                  z = h(y)    P(y^ | z^) = N(mu, s^2) * U    s, mu = g_h(z^)
    mbt2018, cheng2020-*          z = h(y)    P(y^_t | y^_<t, z^) = N(mu_t, s_t^2) * U

    z^ = m + round(z - m)    y^ = mu + round(y - mu)    U is uniform between -1/2 and 1/2

    L = R + lam 255^2 log 2 / C  ||x - g(y^)||^2 + L_q    R = -log P(z^) - log P(y^ | z^)
    L_q = sum |logit F(q) - logit p|    for the quantiles q of P(z^) at p = 5e-10, 1/2 (m) and 1 - 5e-10

in nats per sample; in training, noise replaces rounding, and L_q trains only the quantiles q. Scales are at least 0.11.
Sides are padded with zeros to multiples of 64, half on each side, and outputs are cropped.

The architectures are those of Ballé et al. 2018, https://arxiv.org/abs/1802.01436, of Minnen et al. 2018,
https://arxiv.org/abs/1809.02736, and of Cheng et al. 2020, https://arxiv.org/abs/2001.01568; both here and in
CompressAI, the latter have one Gaussian for each number; `cheng2020` has the paper's mixtures. `aezoo compress` writes
the integers with the tables and the bits of CompressAI's coder, see `aezoo.tasks.codec.rans`.

Shapes: B batch, C channels of x, M of the code, N of the layers and the side information, T positions.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.bases.entropy_coded import (
    MAX_SCALE,
    MIN_SCALE,
    NUM_SCALES,
    AdditiveNoise,
    Coder,
    EntropyCoded,
    FactorisedDistribution,
    Gaussians,
    MonotonicNetwork,
    ProbabilityTable,
    Rounding,
)
from aezoo.distributions.frequency_tables import (
    MAX_ENTRIES,
    PRECISION,
    TAIL_MASS,
    FrequencyTables,
    gaussian_tables,
    join,
    quantise,
    scale_table,
)
from aezoo.errors import AezooError
from aezoo.nets.blocks.adversarial import call_frozen
from aezoo.nets.blocks.compressai import CODE_STRIDE, GDN, MULTIPLE, REACH, SIDE_STRIDE, build, lower_bound
from aezoo.training.arguments import TrainingArgs
from aezoo.training.limits import check_at_least

_WIDTHS = (3, 3, 3, 3)
# logits of the cumulative probabilities of the quantiles
_TAIL_LOGIT = math.log(2 / TAIL_MASS - 1)
_START = 10.0


class Bottleneck(MonotonicNetwork):
    """Logit of F(v) = sigmoid(f(v) + b), without the median, (C, N) -> (C, N)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, _WIDTHS)
        self.last_bias_C1 = nn.Parameter(torch.empty(channels, 1).uniform_(-0.5, 0.5))

    def forward(self, v: Tensor) -> Tensor:
        return super().forward(v) + self.last_bias_C1.to(v)

    def logits(self, offset: Tensor) -> Tensor:
        logits: Tensor = self(offset)
        return logits


@dataclass
class BottleneckDistribution(FactorisedDistribution):
    """Distribution whose F does not depend on the mean, which only rounding uses."""

    def log_mass(self, v: Tensor) -> Tensor:
        return FactorisedDistribution(self.density, torch.zeros_like(self.mean)).log_mass(v)


@dataclass
class TabulatedGaussians(Gaussians):
    """N(mean, scale^2), coded with the table of the next larger scale."""

    scales: Tensor

    @property
    def table(self) -> Tensor:
        return self.first + torch.bucketize(self.scale.contiguous(), self.scales[:-1].to(self.scale).contiguous())


class CompressAI(EntropyCoded, defaults={"likelihood": "gaussian"}, tags=("compression",)):
    """Learns rounded codes with the networks, distributions and bit streams of CompressAI.

    Args:
        input_shape: (C, H, W).
        architecture: bmshj2018-factorized, bmshj2018-factorized-relu, bmshj2018-hyperprior, mbt2018-mean, mbt2018,
            cheng2020-anchor or cheng2020-attn.
        width: N, channels of the layers and of the side information.
        latent_dim: M, channels of the code; N for cheng2020.
        lam: weight of the distortion.
        table_width: entries of the longest table of frequencies if tables come with the weights, set by `aezoo import`;
            0 computes tables from the weights.
        **kwargs: see `Autoencoder`.
    """

    scales: Tensor
    table_cdf: Tensor
    table_length: Tensor
    table_offset: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        architecture: str = "bmshj2018-factorized",
        width: int = 16,
        latent_dim: int = 16,
        lam: float = 0.01,
        table_width: int = 0,
        **kwargs: Unpack[TrainingArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(2, width=width, latent_dim=latent_dim)
        check_at_least(0, lam=lam, table_width=table_width)
        if len(self.input_shape) != 3:
            raise AezooError(f"compressai takes images, (C, H, W), got {self.input_shape}")
        if table_width > 2**PRECISION:
            raise AezooError(f"table_width is at most {2**PRECISION}, got {table_width}")
        parts = build(architecture, self.input_shape, width, latent_dim)
        self.encoder, self.decoder = parts.encoder, parts.decoder
        self.hyper_encoder, self.hyper_decoder = parts.hyper_encoder, parts.hyper_decoder
        self.context, self.entropy_parameters = parts.context, parts.entropy_parameters
        sides = [-(-side // MULTIPLE) * MULTIPLE for side in self.input_shape[1:]]
        self.architecture, self.latent_dim, self.table_width = architecture, latent_dim, table_width
        self.code_shape = (latent_dim, *(side // CODE_STRIDE for side in sides))
        self.z_shape = (width, *(side // SIDE_STRIDE for side in sides))
        self.weight = lam * 255**2 * math.log(2) / self.input_shape[0]
        coded = latent_dim if self.hyper_encoder is None else width
        self.density = Bottleneck(coded)
        self.quantiles_C3 = nn.Parameter(torch.tensor([-_START, 0.0, _START]).repeat(coded, 1))
        n_tables = coded
        if self.hyper_encoder is not None:
            n_tables += NUM_SCALES
            self.register_buffer("scales", scale_table(MIN_SCALE, MAX_SCALE, NUM_SCALES))
        if table_width:
            self.register_buffer("table_cdf", torch.zeros(n_tables, table_width, dtype=torch.int32))
            self.register_buffer("table_length", torch.zeros(n_tables, dtype=torch.int32))
            self.register_buffer("table_offset", torch.zeros(n_tables, dtype=torch.int32))

    # ---- coding and distributions ------------------------------------------------------------------------------------

    def factorised(self, n: int, shape: tuple[int, ...]) -> BottleneckDistribution:
        """Return the distribution of n samples of the channels with learned distributions, (n, *shape)."""
        median_C11 = at_least_float32(self.quantiles_C3)[:, 1, None, None]
        return BottleneckDistribution(self.density, median_C11.expand(n, *shape))

    def gaussians(self, numbers: Tensor) -> TabulatedGaussians:
        """Return the distribution with the given scales, or scales and means, (n, M or 2 M, ...)."""
        scale, *means = at_least_float32(numbers).split(self.latent_dim, 1)
        mean = means[0] if means else torch.zeros_like(scale)
        return TabulatedGaussians(mean, lower_bound(scale, MIN_SCALE), len(self.density.last_bias_C1), self.scales)

    def side(self, y: Tensor) -> Tensor:
        """Return the side information before rounding, (n, *code_shape) -> (n, *z_shape)."""
        assert self.hyper_encoder is not None
        z: Tensor = self.hyper_encoder(y.abs() if self.architecture == "bmshj2018-hyperprior" else y)
        return z

    def code_latents(self, coder: Coder, y: Tensor | None, n: int) -> Tensor:
        if self.hyper_decoder is None:
            return coder(y, self.factorised(n, self.code_shape))
        z_hat = coder(None if y is None else self.side(y), self.factorised(n, self.z_shape))
        params: Tensor = self.hyper_decoder(z_hat.to(self.quantiles_C3))
        if self.context is None:
            return coder(y, self.gaussians(params))
        if isinstance(coder, AdditiveNoise) and y is not None:
            y_noisy = coder.transform(at_least_float32(y))
            coder.add_rate(y_noisy, self.gaussians(self.fused(params, self.context(y_noisy.to(params)))))
            return y_noisy
        known = F.pad(params.new_zeros(n, *self.code_shape), [REACH] * 4).to(at_least_float32(params).dtype)
        weight = self.context.masked_weight()
        for i, j in itertools.product(*map(range, self.code_shape[1:])):
            about = known[:, :, i : i + 2 * REACH + 1, j : j + 2 * REACH + 1].clone().to(params)
            distribution = self.gaussians(
                self.fused(params[:, :, i : i + 1, j : j + 1], self.context.at(about, weight))
            )
            y_hat = coder(None if y is None else y[:, :, i : i + 1, j : j + 1], distribution)
            known[:, :, i + REACH, j + REACH] = y_hat[:, :, 0, 0].detach()  # no optimiser step follows an evaluation
        return known[:, :, REACH:-REACH, REACH:-REACH]

    def fused(self, params: Tensor, context: Tensor) -> Tensor:
        """Combine side information and context to scales and means, (n, 2 M, ...) twice -> (n, 2 M, ...)."""
        assert self.entropy_parameters is not None
        found: Tensor = self.entropy_parameters(torch.cat((params, context), 1))
        return found

    # ---- objective ---------------------------------------------------------------------------------------------------

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll_B, rate_B = self.code_with_rate(x, AdditiveNoise() if self.training else Rounding())
        nll, rate, quantiles = nll_B.mean(), rate_B.mean(), self.quantile_loss()
        loss = rate + self.weight * nll + quantiles
        return {"loss": loss, "nll": nll, "rate": rate, "bpp": self.bits_per_place(rate), "quantiles": quantiles}

    def quantile_loss(self) -> Tensor:
        """Return L_q, with F as a constant."""
        logit_C3 = call_frozen(self.density, at_least_float32(self.quantiles_C3))
        return (logit_C3 - logit_C3.new_tensor([-_TAIL_LOGIT, 0.0, _TAIL_LOGIT])).abs().sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for module in self.modules():
            if isinstance(module, GDN):
                module.drop_gradients()

    # ---- tables ------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.table_width:  # they belong to the weights before training
            del self.table_cdf, self.table_length, self.table_offset
            self.table_width = 0
            self.update_hyperparameters(table_width=0)

    @torch.no_grad()
    def frequency_tables(self) -> FrequencyTables:
        """Return the tables that came with the weights, or those computed from the weights; on the CPU."""
        if self.table_width and bool(self.table_length.any()):
            return FrequencyTables(self.table_cdf.cpu(), self.table_length.cpu(), self.table_offset.cpu())
        parts = [self._bottleneck_tables()]
        if self.hyper_encoder is not None:
            parts.append(gaussian_tables(self.scales.cpu().float()))
        return join(parts)

    def _bottleneck_tables(self) -> FrequencyTables:
        density = Bottleneck(len(self.density.last_bias_C1)).float()
        density.load_state_dict(self.density.state_dict())
        low_C, median_C, high_C = self.quantiles_C3.detach().cpu().float().unbind(1)
        reaches = [
            torch.ceil(reach).nan_to_num(MAX_ENTRIES).clamp(0, MAX_ENTRIES).int()
            for reach in (median_C - low_C, high_C - median_C)
        ]
        length = reaches[0] + reaches[1] + 1
        v_CN = torch.arange(int(length.max())) + (median_C - reaches[0])[:, None]
        lower, upper = density.logits(v_CN - 0.5), density.logits(v_CN + 0.5)
        # the upper tail starts at the end of the widest table, as in CompressAI
        tails = lower[:, 0].sigmoid() + (-upper[:, -1]).sigmoid()
        return quantise(upper.sigmoid() - lower.sigmoid(), tails, length, -reaches[0])

    def tables(self) -> list[ProbabilityTable]:
        cdf, length, offset = self.frequency_tables()
        rows: Any = zip(cdf.double().numpy(), length.tolist(), offset.tolist(), strict=True)
        return [ProbabilityTable(low, (row[1 : n - 1] - row[: n - 2]) / 2**PRECISION) for row, n, low in rows]
