"""Bits-back coding with ANS: the size of samples is about their negative ELBO in bits.

BB-ANS (Townsend et al. 2019, https://arxiv.org/abs/1901.04866). To encode x, z is decoded under q(z|x), which takes
bits from the stack. Then x is encoded under p(x|z), and z under p(z). The net growth is

    log q(z|x) - log p(x|z) - log p(z)    with the mean    -ELBO = E_q[-log p(x|z)] + KL(q(z|x) || p(z))

To decode, z and x are taken from the stack, and encoding z under q(z|x) gives the bits back. Every latent variable has
2^b bins of equal mass under its prior N(m, s^2), with midpoints m + s Phi^-1((k + 1/2) / 2^b). q gives each bin the
mass of N(mu, sigma^2) there. The latent variables may form layers, as in HiLLoC (Townsend et al. 2020,
https://arxiv.org/abs/1912.09953): all are taken from the top down, and put back in reverse.

The network processes blocks of samples: single samples at first, then an eighth of the number of earlier samples, up to
`block`. So initial bits are needed for one sample only: each sample takes about b bits per latent variable before it
adds -ELBO bits, which may be a fraction of that. At the top of the stack are earlier z, which are far from random bits
if codes do not follow the prior. Drawing z from such "dirty bits" would need more bits than the ELBO. Therefore the
index of a bin is stored after an exclusive or with bits from the seed, which needs no additional bits.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from aezoo.autoencoder import Autoencoder, at_least_float32
from aezoo.distributions.latent_chain import LatentChain, Layer
from aezoo.errors import AezooError
from aezoo.tasks.codec import tables
from aezoo.tasks.codec.levels import Levels, level_cdf
from aezoo.tasks.codec.tables import Floats, Stack, Words
from aezoo.training.model_names import display_name


class _SingleLayer:
    """The single layer of a model with `posterior(x) -> mu, log variance` and p(z) = N(0, I)."""

    def __init__(self, model: Autoencoder) -> None:
        self._model: Any = model

    def prior(self, above: list[Tensor], n: int) -> tuple[Tensor, Tensor]:
        m = torch.zeros(n, *self._model.code_shape, device=self._model.device)
        return m, torch.ones_like(m)

    def posterior(self, x: Tensor, above: list[Tensor]) -> tuple[Tensor, Tensor]:
        mu, log_var = self._model.posterior(x)
        return mu, torch.exp(0.5 * log_var)


def latent_chain(model: Autoencoder) -> LatentChain:
    """How to code with a model: its `latent_chain()` if it has one, or its Gaussian posterior and N(0, I).

    Raises:
        AezooError: the model gives samples no probability; the message says what to do.
    """
    cure = "use vae with likelihood bernoulli, discretised_logistic or beta_binomial, or mode lossy"
    if not model.likelihood.discrete:
        kind = type(model.likelihood).__name__
        raise AezooError(f"lossless needs a likelihood of discrete values, and {kind} has densities: {cure}")
    own = getattr(model, "latent_chain", None)
    if callable(own):
        return cast(LatentChain, own())
    if not model.normal_prior:
        raise AezooError(
            f"lossless needs a Gaussian posterior and prior, which {display_name(type(model))} does not have: {cure}"
        )
    return LatentChain([_SingleLayer(model)], lambda z: model.decoder(z[-1]), model.likelihood, model.input_shape)


def blocks(n: int, max_block: int) -> Iterator[slice]:
    """0:1, 1:2, ..., 16:18, ...: an eighth of the number of earlier samples, at least 1 and at most `max_block`."""
    start = 0
    while start < n:
        stop = min(n, start + max(1, min(start // 8, max_block)))
        yield slice(start, stop)
        start = stop


@dataclass(frozen=True)
class EncodedSamples:
    """Samples as a stack of words.

    Attributes:
        words: the stack.
        net_bits: bits that the samples have added to it.
        initial_bits: bits that had to be there before.
    """

    words: Words
    net_bits: int
    initial_bits: int


class BitsBack:
    """Encodes and decodes samples with a chain.

    Args:
        chain: the model.
        like: an empty tensor on the model's device and of its dtype.
        block: maximal number of samples that the network processes at a time.
        precision: a latent variable has 2^precision bins.
        seed: determines the initial bits.
    """

    def __init__(self, chain: LatentChain, like: Tensor, block: int, precision: int, seed: bytes) -> None:
        from scipy.special import ndtri

        self._chain, self._like, self._block, self._b, self._seed = chain, like, block, precision, seed
        k = np.arange(1 << precision)
        self._edges = ndtri(k[1:] / (1 << precision))
        self._midpoints = torch.from_numpy(ndtri((k + 0.5) / (1 << precision)))

    def encode(self, levels: Levels) -> EncodedSamples:
        """Encode samples (n, *shape) of integers as words."""
        stack, b = Stack(seed=self._seed), self._b
        before = stack.bits - 32 * stack.given
        for rows in blocks(len(levels), self._block):
            x = self._as_data(levels[rows])
            z: list[Tensor] = []
            bin_indices: list[npt.NDArray[np.int32]] = []
            for layer in self._chain.layers:
                prior, q = self._tables(layer, x, z)
                stack.reserve(prior[0].numel())
                bin_indices.append(stack.pop(prior[0].numel(), q, 1 << b))
                z.append(self._values(bin_indices[-1], *prior))
            stack.push(levels[rows].reshape(-1).astype(np.int32), self._pixels(z), self._chain.levels)
            for i, index in reversed(list(enumerate(bin_indices))):
                stack.push_uniform(index ^ self._mask(rows, i, len(index)), b)
        used = stack.given - stack.untouched
        return EncodedSamples(stack.words(), stack.bits - 32 * stack.given - before, 32 * used)

    def decode(self, words: Words, n: int) -> Levels | None:
        """Decode n samples from words; None if the words end too early or the initial bits are not recovered."""
        stack, b = Stack(words), self._b
        levels = np.empty((n, *self._chain.input_shape), dtype=np.uint8)
        for rows in reversed(list(blocks(n, self._block))):
            size = rows.stop - rows.start
            z: list[Tensor] = []
            bin_indices: list[npt.NDArray[np.int32]] = []
            for i, layer in enumerate(self._chain.layers):
                prior = layer.prior(z, size)
                count = prior[0].numel()
                bin_indices.append(stack.pop_uniform(count, b) ^ self._mask(rows, i, count))
                z.append(self._values(bin_indices[-1], *prior))
            dims = math.prod(levels.shape[1:])
            pixels = stack.pop(size * dims, self._pixels(z), self._chain.levels)
            if stack.is_exhausted:
                return None
            levels[rows] = pixels.reshape(size, *self._chain.input_shape)
            x = self._as_data(levels[rows])
            for i, layer in reversed(list(enumerate(self._chain.layers))):
                stack.push(bin_indices[i], self._tables(layer, x, z[:i])[1], 1 << b)
        rest = stack.unseal()
        is_intact = rest is not None and np.array_equal(rest, tables.initial_words(self._seed, len(rest)))
        return levels if is_intact else None

    def bound(self, levels: Levels) -> float:
        """-ELBO of samples in bits, with one draw of z each from torch's generator and closed-form divergences."""
        total = 0.0
        for start in range(0, len(levels), self._block):
            x = self._as_data(levels[start : start + self._block])
            z: list[Tensor] = []
            for layer in self._chain.layers:
                q = Normal(*layer.posterior(x, z))
                p = Normal(*layer.prior(z, len(x)))
                total += float(kl_divergence(q, p).cpu().double().sum())
                z.append(q.sample())
            params = at_least_float32(self._chain.params([part.to(self._like.dtype) for part in z]))
            total -= float(self._chain.likelihood.log_prob(params, x.to(params.dtype)).cpu().double().sum())
        return total / math.log(2)

    def _mask(self, rows: slice, layer: int, n: int) -> npt.NDArray[np.int32]:
        """Integers below 2^b, determined by the seed, for a layer of a block."""
        key = self._seed + f" {rows.start} {layer}".encode()
        return (tables.initial_words(key, n) & ((1 << self._b) - 1)).astype(np.int32)

    def _as_data(self, levels: Levels) -> Tensor:
        x = torch.from_numpy(levels).float() / (self._chain.levels - 1)
        return x.to(device=self._like.device, dtype=self._like.dtype)

    def _values(self, index: npt.NDArray[np.int32], m: Tensor, s: Tensor) -> Tensor:
        """The midpoints of bins."""
        middles = self._midpoints[torch.from_numpy(index.astype(np.int64))].reshape(m.shape)
        return (m.cpu().double() + s.cpu().double() * middles).to(self._like)

    def _tables(self, layer: Layer, x: Tensor, z: list[Tensor]) -> tuple[tuple[Tensor, Tensor], tables.Rows]:
        """The mean m and deviation s of the prior, and the tables of the posterior over its bins."""
        from scipy.special import ndtr

        mu, sigma = layer.posterior(x, z)
        m, s = layer.prior(z, len(x))
        # the border m + s t of a bin is at (m + s t - mu) / sigma in units of q
        ratio, shift = _flat(s / sigma), _flat((m - mu) / sigma)

        def rows(part: slice) -> npt.NDArray[np.float32]:
            return tables.from_cdf(ndtr(ratio[part, None] * self._edges + shift[part, None]))

        return (m, s), rows

    def _pixels(self, z: list[Tensor]) -> tables.Rows:
        """The tables of data values under p(x|z)."""
        params = _flat(self._chain.params(z))
        return lambda part: tables.from_cdf(level_cdf(self._chain.likelihood, params[part]))


def initial_seed(fingerprint: str, seed: int) -> bytes:
    """The source of the initial bits."""
    return hashlib.sha256(f"{fingerprint} {seed}".encode()).digest()


def _flat(values: Tensor) -> Floats:
    """Numbers of a network in float64 on the CPU, (M,)."""
    found: Floats = values.detach().cpu().double().numpy().reshape(-1)
    if not np.isfinite(found).all():
        raise AezooError("the model gives NaN or infinite values for these samples: train it again, or use mode lossy")
    return found
