"""Autoencoders whose codes are integers with a learned distribution, for entropy coding.

Values v are rounded relative to a mean m; in training, noise replaces rounding, so that gradients pass (Ballé et al.
2017, https://arxiv.org/abs/1611.01704, section 3):

    evaluation  v^ = m + round(v - m)      training  v~ = v + u, u ~ U(-1/2, 1/2)
    P(v) = F(v + 1/2) - F(v - 1/2)         rate = -sum log P, in nats

F is the cumulative distribution function of an entropy model: `Factorised`, learned for each channel, `Gaussians` with
given means and scales, or `Mixtures` of Gaussians. A model's `code_latents` defines which values are coded with which
distribution and in which order, for any coder: `AdditiveNoise`, `Rounding`, or `SymbolReader`, whose integers are from
a file or a random generator. So encoder and decoder compute the same distributions by the same operations.

Shapes: B batch, C channels; ... are the positions of a map, none for a vector.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo import nets
from aezoo.autoencoder import Autoencoder
from aezoo.distributions.frequency_tables import FrequencyTables
from aezoo.training.limits import check_at_least
from aezoo.training.precision import at_least_float32

# Gaussians are coded with the nearest of scales that are 13 % apart; the code of Ballé et al. 2018 uses 0.11 to 256
MIN_SCALE, MAX_SCALE, NUM_SCALES = 0.11, 256.0, 64
# tables exclude rarer values, which are coded as an escape symbol followed by the number
_TAIL_MASS = 2.0**-26
_MAX_INTEGER = 2**12
_EPS = 1e-9


class Distribution(Protocol):
    """A probability distribution of independent values.

    Attributes:
        mean: offset of the integers, (B, C, ...).
        table: index of each value's table among the model's `tables`, (B, C, ...), long; for `Mixtures`, where each
            value has its own table, the width of the table.
    """

    mean: Tensor

    @property
    def table(self) -> Tensor: ...

    def log_mass(self, v: Tensor) -> Tensor:
        """Log P(v) in nats: (B, C, ...) -> (B, C, ...)."""
        ...


class ProbabilityTable(NamedTuple):
    """Probabilities of the integers from `low` on, (K,); the remaining probability is that of all other integers.

    Tables of N values have the shape (N, K).
    """

    low: int
    mass: npt.NDArray[np.float64]


def _log_one_minus(d: Tensor) -> Tensor:
    """Return log(1 - exp(-d)) for d above 0."""
    return torch.log(-torch.expm1(-d.clamp_min(_EPS)))


def _log_ndtr(x: Tensor) -> Tensor:
    """Return the log of the standard normal distribution function, with an accurate gradient even far from 0.

    torch computes the gradient as exp(-x^2 / 2 - log ndtr(x)), a difference that cancels in float32 below -1000.
    """
    t = x.clamp_max(-1) * -math.sqrt(0.5)
    tail = (torch.special.erfcx(t) / 2).log() - t * t
    return torch.where(x < -1, tail, torch.special.log_ndtr(x.clamp_min(-1)))


@dataclass
class Gaussians:
    """N(mean, scale^2): (B, C, ...) each; `first` is the index of the first table of a Gaussian."""

    mean: Tensor
    scale: Tensor
    first: int

    def log_mass(self, v: Tensor) -> Tensor:
        offset = (v - self.mean).abs()
        # use the smaller tail, so that nothing cancels where both are tiny
        upper, lower = (_log_ndtr((half - offset) / self.scale) for half in (0.5, -0.5))
        return upper + _log_one_minus(upper - lower)

    @property
    def table(self) -> Tensor:
        step = math.log(MAX_SCALE / MIN_SCALE) / (NUM_SCALES - 1)
        return self.first + ((self.scale / MIN_SCALE).log() / step).round().long().clamp(0, NUM_SCALES - 1)


class Mixtures:
    """A mixture sum_k w_k N(mean_k, scale_k^2) for each value; integers are relative to its mean.

    Args:
        means: (K, B, C, ...).
        scales: (K, B, C, ...).
        logits: logits of the weights, (K, B, C, ...).
    """

    def __init__(self, means: Tensor, scales: Tensor, logits: Tensor) -> None:
        self.parts = Gaussians(means, scales, 0)
        self.log_weight = logits.log_softmax(0)
        self.mean = (self.log_weight.exp() * means).sum(0)

    def log_mass(self, v: Tensor) -> Tensor:
        return torch.logsumexp(self.log_weight + self.parts.log_mass(v), 0)

    @property
    def table(self) -> Tensor:
        """Return log2 of the table width, a power of two that covers six scales of all components: (B, C, ...)."""
        reach = (self.parts.mean - self.mean).abs() + 6 * self.parts.scale
        reach = torch.where(self.log_weight > math.log(_TAIL_MASS), reach, 1)
        return reach.amax(0).log2().ceil().long().clamp(1, int(math.log2(_MAX_INTEGER)))

    def tables_at(self, power: int, positions: npt.NDArray[np.int64]) -> ProbabilityTable:
        """Return the tables of values, given their flat indices, (N,)."""
        from scipy.special import ndtr

        parts = (self.parts.mean - self.mean, self.parts.scale, self.log_weight.exp())
        offset_KN, scale_KN, weight_KN = (
            part.detach().cpu().double().flatten(1).numpy()[:, positions] for part in parts
        )
        borders = np.arange(-(2**power) - 0.5, 2**power + 1)
        F_NB = sum(
            weight[:, None] * ndtr((borders - offset[:, None]) / scale[:, None])
            for offset, scale, weight in zip(offset_KN, scale_KN, weight_KN, strict=True)
        )
        return ProbabilityTable(-(2**power), np.diff(F_NB))

    def draw(self) -> Tensor:
        """Draw integers, (B, C, ...), long, as rounded samples of the mixture."""
        part = self.log_weight.movedim(0, -1).exp().flatten(0, -2).multinomial(1).view(1, *self.mean.shape)
        mean, scale = (values.gather(0, part)[0] for values in (self.parts.mean, self.parts.scale))
        return (mean - self.mean + scale * torch.randn_like(mean)).round().long()


def scale_of(raw: Tensor) -> Tensor:
    """Return a scale within the range of the tables: (...) -> (...)."""
    return (MIN_SCALE + F.softplus(at_least_float32(raw))).clamp_max(MAX_SCALE)


def gaussian_tables() -> list[ProbabilityTable]:
    """Return tables of N(0, s^2) for NUM_SCALES scales s from MIN_SCALE to MAX_SCALE."""
    from scipy.special import ndtr

    tables = []
    for scale in np.geomspace(MIN_SCALE, MAX_SCALE, NUM_SCALES):
        limit = math.ceil(6 * scale)
        borders = np.arange(-limit - 0.5, limit + 1) / scale
        tables.append(ProbabilityTable(-limit, np.diff(ndtr(borders))))
    return tables


class MonotonicNetwork(nn.Module):
    """A network f with positive weights, one input and one output, for each channel: (C, N) -> (C, N).

    Args:
        channels: C.
        widths: widths of the hidden layers.
    """

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        sizes = (1, *widths, 1)
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        self.bends = nn.ParameterList()
        for n_in, n_out in pairwise(sizes):
            # F starts about as wide as a rounding step, since codes are narrow at first and a wide F learns slowly
            raw = math.log(math.expm1(1 / n_out))
            self.weights.append(nn.Parameter(torch.full((channels, n_out, n_in), raw)))
        for n_out in widths:
            self.biases.append(nn.Parameter(torch.empty(channels, n_out, 1).uniform_(-0.5, 0.5)))
            self.bends.append(nn.Parameter(torch.zeros(channels, n_out, 1)))

    def forward(self, v: Tensor) -> Tensor:
        with torch.autocast(v.device.type, enabled=False):
            h = v[:, None]
            *hidden, last = self.weights
            for weight, bias, bend in zip(hidden, self.biases, self.bends, strict=True):
                h = F.softplus(weight.to(h)) @ h + bias.to(h)
                h = h + torch.tanh(bend.to(h)) * torch.tanh(h)
            return (F.softplus(last.to(h)) @ h)[:, 0]

    def logits(self, offset: Tensor) -> Tensor:
        """Return the logit of a cumulative distribution function, at offsets from the mean: (C, N) -> (C, N)."""
        raise NotImplementedError(f"{type(self).__name__} must write its logits")


class Factorised(MonotonicNetwork):
    """A flexible learned distribution for each channel (Ballé et al. 2018, https://arxiv.org/abs/1802.01436, 6.1).

    F(v) = sigmoid(f(v - m) - f(0)), where f is a network with one input, one output and positive weights, so it is
    monotonic. Since f(0) is subtracted, m is the median; it is learned without a separate loss.

    Args:
        channels: C.
        widths: widths of the hidden layers of f.
    """

    def __init__(self, channels: int, widths: tuple[int, ...] = (3, 3, 3)) -> None:
        super().__init__(channels, widths)
        self.median_C = nn.Parameter(torch.zeros(channels))

    def logits(self, offset: Tensor) -> Tensor:
        """Return f(offset) - f(0): (C, N) -> (C, N)."""
        f = self(torch.cat([offset, torch.zeros_like(offset[:, :1])], 1))
        return f[:, :-1] - f[:, -1:]

    def distribution(self, shape: Sequence[int]) -> "FactorisedDistribution":
        """Return the distribution of values (B, C, ...)."""
        median = at_least_float32(self.median_C).view(-1, *(1 for _ in shape[2:]))
        return FactorisedDistribution(self, median.expand(tuple(shape)))

    @torch.no_grad()
    def tables(self) -> list[ProbabilityTable]:
        """Return a table for each channel."""
        exact = {name: value.cpu().double() for name, value in self.state_dict().items()}
        borders = torch.arange(-_MAX_INTEGER - 0.5, _MAX_INTEGER + 1, dtype=torch.float64)
        density = Factorised(len(self.median_C), tuple(weight.shape[1] for weight in [*self.weights][:-1])).double()
        density.load_state_dict(exact)
        F_CN = density.logits(borders.expand(len(self.median_C), -1)).sigmoid().numpy()
        tables = []
        for F_N in F_CN:
            first = int(np.searchsorted(F_N, _TAIL_MASS, "right")) - 1
            last = int(np.searchsorted(F_N, 1 - _TAIL_MASS, "left"))
            first, last = min(max(first, 0), _MAX_INTEGER), max(min(last, 2 * _MAX_INTEGER), _MAX_INTEGER) + 1
            tables.append(ProbabilityTable(first - _MAX_INTEGER, np.diff(F_N[first : last + 1])))
        return tables


@dataclass
class FactorisedDistribution:
    """The distribution defined by a `Factorised` network, whose tables are the model's first: mean (B, C, ...)."""

    density: MonotonicNetwork
    mean: Tensor

    def log_mass(self, v: Tensor) -> Tensor:
        offset = (v - self.mean).transpose(0, 1)
        upper, lower = (self.density.logits(offset.flatten(1) + half) for half in (0.5, -0.5))
        # s(u) - s(l) = s(u) s(-l) (1 - exp(l - u)) for the sigmoid s
        log_mass = F.logsigmoid(upper) + F.logsigmoid(-lower) + _log_one_minus(upper - lower)
        return log_mass.view(offset.shape).transpose(0, 1)

    @property
    def table(self) -> Tensor:
        channels = torch.arange(self.mean.shape[1], device=self.mean.device)
        return channels.view(-1, *(1 for _ in self.mean.shape[2:])).expand(self.mean.shape)


class Coder:
    """Transforms the values in `code_latents`.

    Attributes:
        rate_B: -log P of all values so far, in nats; computed on access, so decoding never computes it.
    """

    def __init__(self) -> None:
        self._coded: list[tuple[Tensor, Distribution]] = []

    @property
    def rate_B(self) -> Tensor:
        first, *others = (distribution.log_mass(v).flatten(1).sum(1) for v, distribution in self._coded)
        return -sum(others, first)

    def transform(self, v: Tensor, distribution: Distribution) -> Tensor:
        """Return the transformed values, (B, C, ...) -> (B, C, ...)."""
        raise NotImplementedError

    def add_rate(self, v: Tensor, distribution: Distribution) -> None:
        """Add values to the rate without changing them."""
        self._coded.append((v, distribution))

    def __call__(self, v: Tensor | None, distribution: Distribution) -> Tensor:
        """Transform values, (B, C, ...), or None if they are not known yet."""
        v = self.transform(distribution.mean if v is None else at_least_float32(v), distribution)
        self.add_rate(v, distribution)
        return v


class AdditiveNoise(Coder):
    """v~ = v + u, for training, with any distribution."""

    def transform(self, v: Tensor, distribution: Distribution | None = None) -> Tensor:
        # the same noise for any memory layout of v
        return v + torch.rand(v.shape, dtype=v.dtype, device=v.device) - 0.5


class Rounding(Coder):
    """v^ = m + round(v - m), for evaluation.

    Attributes:
        symbols: the integers of each call, (B, C x positions).
    """

    def __init__(self) -> None:
        super().__init__()
        self.symbols: list[Tensor] = []

    def transform(self, v: Tensor, distribution: Distribution) -> Tensor:
        symbols = (v - distribution.mean).round()
        self.symbols.append(symbols.flatten(1))
        return distribution.mean + symbols


class SymbolReader(Coder):
    """Reads integers with a given function.

    Args:
        read: returns the integers, (B, C, ...), for a given distribution.
    """

    def __init__(self, read: Callable[[Distribution], Tensor]) -> None:
        super().__init__()
        self._read = read

    def transform(self, v: Tensor, distribution: Distribution) -> Tensor:
        return distribution.mean + self._read(distribution).to(distribution.mean)


def read_in_order(symbols: Tensor) -> Callable[[Distribution], Tensor]:
    """Create a function for `SymbolReader` that returns the next integers of (B, T), one for each value."""
    start = 0

    def read(distribution: Distribution) -> Tensor:
        nonlocal start
        start, first = start + distribution.mean[0].numel(), start
        return symbols[:, first:start].reshape(distribution.mean.shape)

    return read


class EntropyCoded(Autoencoder, has_prior=True, score_term="rate"):
    """An autoencoder whose code is rounded and has a learned distribution.

    A subclass sets its networks and defines `code_latents` and `loss`.

    The code of a sample is y^, (C, ...), and is equivalent to integers (T,), including those of side information.

    Attributes:
        weight: weight of the reconstruction's nll relative to the rate, in the loss.
        quality: selects the rate of a model with several rates in evaluation, from 0 to `max_quality`; 0 for other
            models.
    """

    weight: float
    quality: float = 0.0
    max_quality: float = 0.0

    def build_nets(self, net: str, latent_dim: int, hidden_dims: tuple[int, ...], activation: str, lam: float) -> None:
        """Set encoder, decoder, code_shape and weight: a map of `latent_dim` channels, or a vector without a map.

        `lam` weights the mean squared error of values from 0 to 255 relative to bits per position: summed over the
        positions of a sample and in nats, L = rate + lam 255^2 log 2 / C ||x - x^||^2 for C channels; ||x - x^||^2 is
        the nll of the likelihood gaussian up to a constant.

        Raises:
            AezooError: a value is invalid, or the network does not support the shapes.
        """
        check_at_least(1, latent_dim=latent_dim)
        check_at_least(0, lam=lam)
        with_map = net not in nets.WITHOUT_GRID
        self.code_shape = nets.map_shape(net, self.input_shape, hidden_dims, latent_dim) if with_map else (latent_dim,)
        self.encoder = nets.encoder(net, self.input_shape, self.code_shape, hidden_dims, activation)
        self.decoder = nets.decoder(net, self.code_shape, self.input_shape, hidden_dims[::-1], activation)
        self.weight = lam * 255**2 * math.log(2) / (self.input_shape[0] if len(self.input_shape) > 1 else 1)

    def code_latents(self, coder: Coder, y: Tensor | None, n: int) -> Tensor:
        """Pass the code of n samples through a coder, part by part, in the order in which they are coded.

        Args:
            coder: transforms each part.
            y: the encoder's output, (n, *code_shape), or None if it is not known.
            n: number of samples.

        Returns:
            The coded y, (n, *code_shape).
        """
        raise NotImplementedError(f"{type(self).__name__} must write its code_latents")

    def tables(self) -> list[ProbabilityTable]:
        """Return the tables of its distributions, by the index in `Distribution.table`."""
        raise NotImplementedError(f"{type(self).__name__} must write its tables")

    def frequency_tables(self) -> FrequencyTables | None:
        """Return the tables in the same order if the model's integers are written by rANS, else None."""
        return None

    def code_with_rate(self, x: Tensor, coder: Coder) -> tuple[Tensor, Tensor]:
        """Return the nll of the reconstruction and the rate of samples, in nats: (B, *input_shape) -> (B,), (B,)."""
        y_hat = self.code_latents(coder, self.encoder(x), x.shape[0])
        return self.nll(self.decoder(y_hat.to(x.dtype)), x), coder.rate_B

    def bits_per_place(self, rate: Tensor) -> Tensor:
        """Convert a rate in nats per sample to bits per pixel, or per value of a vector: (...) -> (...)."""
        return rate / math.log(2) / math.prod(self.input_shape[len(self.input_shape) > 1 :])

    def encode(self, x: Tensor) -> Tensor:
        return self.code_latents(Rounding(), self.encoder(x), x.shape[0]).to(x.dtype)

    def encode_symbols(self, x: Tensor) -> Tensor:
        """Return the integers of samples, in the order of `code_latents`: (B, *input_shape) -> (B, T), long.

        NaN becomes -2^40, since processors convert it to different integers (ARM: to 0).
        """
        coder = Rounding()
        self.code_latents(coder, self.encoder(x), x.shape[0])
        return torch.cat(coder.symbols, 1).nan_to_num(-(2.0**40)).long()

    def codes(self, symbols: Tensor) -> Tensor:
        """Return the codes of integers, (B, T) -> (B, *code_shape)."""
        return self.code_latents(SymbolReader(read_in_order(symbols)), None, symbols.shape[0])

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """Return the sum of rate and weighted nll of the rounded code, in nats: (B, *input_shape) -> (B,)."""
        nll_B, rate_B = self.code_with_rate(x, Rounding())
        return rate_B + self.weight * nll_B

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        tables = self.tables()

        def draw(distribution: Distribution) -> Tensor:
            if isinstance(distribution, Mixtures):
                return distribution.draw()
            table = distribution.table
            symbols = torch.empty(table.shape, dtype=torch.long)
            for index in table.unique().tolist():
                mask = (table == index).cpu()
                low, mass = tables[index]
                symbols[mask] = low + torch.from_numpy(mass).multinomial(int(mask.sum()), replacement=True)
            return symbols.to(table.device)

        like = next(self.decoder.parameters())
        return self.decode(self.code_latents(SymbolReader(draw), None, n).to(like))
