"""synthetic_dictionary: sparse sums of known atoms, for models that should recover these atoms.

    x = sum_i f_i d_i + noise     ||d_i|| = 1     f_i = 0, or uniform from 1/2 to 3/2 where atom i is active

    atoms         N, each drawn uniformly from the sphere; more atoms than dimensions make the dictionary overcomplete
    active        the mean number of active atoms: each is active with probability p = active / N
    correlation   rho between the supports of the atoms of a group of four (1 and 0 for active or not): with probability
                  sqrt(rho) an atom follows a draw for its group, otherwise a separate draw. So p does not change, and
                  the correlation is exactly rho within groups and 0 between them
    noise         standard deviation of a Gaussian in every dimension
    streams       S streams have the same f in S spaces, each with different atoms, for crosscoders and transcoders

Every number is a function of the seed and the sample's index, by splitmix64: only the atoms are stored, a sample does
not depend on which others are read, and the splits are ranges of indices, train first.

Shapes: n samples, N atoms, S streams, D dimensions, G groups.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import ndtri
from torch import Tensor
from torch.utils.data import Dataset

from aezoo.data.source import STAGES, Batch, Options, Source, Stage, accepts
from aezoo.errors import AezooError
from aezoo.training.keyword_groups import Argument
from aezoo.training.seeding import mix

GROUP_SIZE = 4
# numbers that are drawn at a time, which take some tens of MiB
_CHUNK = 2**21
_ATOMS, _ATOM_ACTIVE, _GROUP_ACTIVE, _FOLLOWS_GROUP, _COEFFICIENT, _NOISE = range(6)
Floats = npt.NDArray[np.float64]


class DictionaryArgs(TypedDict, total=False):
    """Settings of `synthetic_dictionary`."""

    dictionary_samples: Annotated[int, Argument(
        100_000, "synthetic_dictionary: number of samples, all splits together.", 1, 10**9
    )]  # fmt: skip
    dictionary_atoms: Annotated[int, Argument(64, "synthetic_dictionary: number of atoms.", 1, 2**20)]
    dictionary_dim: Annotated[int, Argument(32, "synthetic_dictionary: dimensions of each atom.", 1, 2**20)]
    dictionary_active: Annotated[float, Argument(
        4.0, "synthetic_dictionary: mean number of active atoms in a sample."
    )]  # fmt: skip
    dictionary_correlation: Annotated[float, Argument(
        0.0, "synthetic_dictionary: correlation of which atoms are active, within groups of four."
    )]  # fmt: skip
    dictionary_noise: Annotated[float, Argument(
        0.0, "synthetic_dictionary: standard deviation of the noise in each dimension."
    )]  # fmt: skip
    dictionary_streams: Annotated[int, Argument(
        1, "With S above 1, samples are (S, D): the same code in S spaces, each with its own atoms.", 1, 2**10
    )]  # fmt: skip


def uniform(seed: int, stream: int, index: npt.NDArray[np.int64]) -> Floats:
    """Numbers within (0, 1), each a function of its index, seed and stream: splitmix64, as in `mix`."""
    z = index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(mix(seed, stream))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    found: Floats = ((z >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52
    return found


@accepts(DictionaryArgs)
class SyntheticDictionary(Source):
    """Sparse sums of atoms that are known.

    Attributes:
        atoms: (N, D) or, with several streams, (N, S, D), float32; in each stream of unit norm.
    """

    value_range = None

    def __init__(self, options: Options) -> None:
        if options.scale not in ("auto", "none"):
            raise AezooError(f"--data.scale {options.scale} would hide the atoms of {options.name}: use auto")
        self.seed, self.noise = options.seed, options.dictionary_noise
        self.number, self.streams = options.dictionary_atoms, options.dictionary_streams
        self.active, self.correlation = options.dictionary_active, options.dictionary_correlation
        if not self.active > 0:
            raise AezooError(f"--data.dictionary_active is {self.active!r}: give a number above 0")
        if not 0 <= self.correlation < 1:
            raise AezooError(f"--data.dictionary_correlation is {self.correlation!r}: give a number from 0 up to, but "
                             "not including, 1")  # fmt: skip
        if self.noise < 0:
            raise AezooError(f"--data.dictionary_noise is {self.noise!r}: give a number from 0")
        if self.active > self.number:
            raise AezooError(f"--data.dictionary_active is {self.active}: give a mean number of active atoms above 0 "
                             f"and at most --data.dictionary_atoms {self.number}")  # fmt: skip
        dim = options.dictionary_dim
        self.input_shape = (dim,) if self.streams == 1 else (self.streams, dim)
        at = np.arange(self.number * self.streams * dim).reshape(self.number, self.streams, dim)
        samples = ndtri(uniform(self.seed, _ATOMS, at))
        unit = samples / np.sqrt(np.square(samples).sum(-1, keepdims=True))
        self._atoms: Floats = unit.reshape(self.number, -1)
        self.atoms = torch.from_numpy(self._atoms).float().view(self.number, *self.input_shape)
        n = options.dictionary_samples
        held = [max(1, round(n * part)) if part else 0 for part in (options.val_fraction, options.test_fraction)]
        if sum(held) >= n:
            raise AezooError(f"--data.dictionary_samples {n} are too few for {held[0]} of validation and {held[1]} of "
                             "test: give more")  # fmt: skip
        bounds = [0, n - sum(held), n - held[1], n]
        self._ranges = dict(zip(STAGES, map(range, bounds[:-1], bounds[1:]), strict=True))

    def rows(self, stage: Stage) -> Tensor:
        """The indices of a split's samples, in its order."""
        chosen = self._ranges[stage]
        return torch.arange(chosen.start, chosen.stop)

    def split(self, stage: Stage) -> "Dataset[Any] | None":
        return DictionaryDataset(self, self._ranges[stage]) if self._ranges[stage] else None

    def codes(self, index: Tensor | Sequence[int]) -> Tensor:
        """Codes f of the samples with these indices: (n,) -> (n, N), float32."""
        parts = [self._codes(part) for part in self._parts(index)]
        return torch.from_numpy(np.concatenate([np.empty((0, self.number)), *parts])).float()

    def samples(self, index: Tensor | Sequence[int]) -> Tensor:
        """Samples x with these indices: (n,) -> (n, *input_shape), float32."""
        parts = [self._samples(part) for part in self._parts(index)]
        return torch.from_numpy(np.concatenate([np.empty((0, *self.input_shape)), *parts])).float()

    def _parts(self, index: Tensor | Sequence[int]) -> list[npt.NDArray[np.int64]]:
        numbers = torch.as_tensor(index).long().numpy()
        if len(numbers) and numbers.min() < 0:
            raise AezooError(f"samples are numbered from 0: {int(numbers.min())} is out of range")
        most = max(1, _CHUNK // max(self.number, self._atoms.shape[1]))
        return [numbers[start : start + most] for start in range(0, len(numbers), most)]

    def _codes(self, index: npt.NDArray[np.int64]) -> Floats:
        """(n,) -> (n, N)."""
        chance = self.active / self.number
        at_nN = index[:, None] * self.number + np.arange(self.number)
        active_nN = uniform(self.seed, _ATOM_ACTIVE, at_nN) < chance
        if self.correlation:
            groups = math.ceil(self.number / GROUP_SIZE)
            called_nG = uniform(self.seed, _GROUP_ACTIVE, index[:, None] * groups + np.arange(groups)) < chance
            follows_nN = uniform(self.seed, _FOLLOWS_GROUP, at_nN) < math.sqrt(self.correlation)
            active_nN = np.where(follows_nN, called_nG.repeat(GROUP_SIZE, 1)[:, : self.number], active_nN)
        f_nN = np.zeros(at_nN.shape)
        f_nN[active_nN] = 0.5 + uniform(self.seed, _COEFFICIENT, at_nN[active_nN])
        return f_nN

    def _samples(self, index: npt.NDArray[np.int64]) -> Floats:
        """(n,) -> (n, *input_shape)."""
        f_nN = self._codes(index)
        x_nX = np.zeros((len(index), self._atoms.shape[1]))
        # one atom of each sample at a time: the rounding of a matrix product depends on its size
        row, atom = f_nN.nonzero()
        turn = np.arange(len(row)) - np.searchsorted(row, row)
        for k in range(turn.max(initial=-1) + 1):
            now, which = row[turn == k], atom[turn == k]
            x_nX[now] += f_nN[now, which, None] * self._atoms[which]
        if self.noise:
            at_nX = index[:, None] * x_nX.shape[1] + np.arange(x_nX.shape[1])
            x_nX += self.noise * ndtri(uniform(self.seed, _NOISE, at_nX))
        return x_nX.reshape(len(index), *self.input_shape)


class DictionaryDataset(Dataset[Batch]):
    """The samples of a split, drawn when they are read.

    Args:
        source: draws them.
        numbers: indices of the samples.
    """

    labels: Tensor | None = None

    def __init__(self, source: SyntheticDictionary, numbers: range) -> None:
        self.source, self.numbers = source, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Batch:
        return (self.source.samples([self.numbers[index]])[0],)

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """A whole batch at once; torch's loader prefers this method to one call per sample."""
        return (self.source.samples(self.numbers.start + torch.as_tensor(indices)),)
