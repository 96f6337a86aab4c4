"""Statistics of the training data that commands need, stored with a model's weights to work without these data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from aezoo.errors import AezooError


@dataclass(frozen=True)
class DataStatistics:
    """Codes and scores of the data that a model was trained on.

    Attributes:
        codes: (N, D) codes of training samples, to which `generate` fits a prior; None for a model that has a prior.
        scores: (M,) scores of normal samples that the model was not trained on, by the name of the score, such as
            `deviance`: `detect` calibrates thresholds and p-values on them.
        states: statistics of a score on training samples, such as the mean code of `mahalanobis`: tensors by name, by
            the name of the score, see `aezoo.tasks.detect_scores.Scorer.state`.
    """

    PREFIX: ClassVar[str] = "data_statistics."

    codes: Tensor | None = None
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    states: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def updated(self, new: "DataStatistics") -> "DataStatistics":
        """A copy with codes and scores of another one; states of scores that these replace are removed."""
        states = {name: state for name, state in self.states.items() if name not in new.scores}
        codes = self.codes if new.codes is None else new.codes
        return DataStatistics(codes, {**self.scores, **new.scores}, {**states, **new.states})

    def to_tensors(self) -> dict[str, Tensor]:
        """The statistics as named tensors, which are stored with the weights."""
        named = {f"scores.{name}": scores for name, scores in self.scores.items()}
        named |= {} if self.codes is None else {"codes": self.codes}
        named |= {
            f"states.{score}.{key}": value for score, state in self.states.items() for key, value in state.items()
        }
        # copies, because safetensors rejects tensors that share memory
        return {
            f"{self.PREFIX}{name}": value.detach().clone(memory_format=torch.contiguous_format)
            for name, value in named.items()
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], code_size: int, what: str) -> "DataStatistics":
        """Read what `to_tensors` returned: codes in float32, scores in float64, states in their dtypes.

        Args:
            tensors: the named tensors.
            code_size: D.
            what: the file that contains them.

        Raises:
            AezooError: they are something else.
        """
        own = {key.removeprefix(cls.PREFIX): value for key, value in tensors.items()}
        states: dict[str, dict[str, Tensor]] = {}
        for key in [key for key in own if key.startswith("states.")]:
            _, score, name = [*key.split(".", 2), ""][:3]
            states.setdefault(score, {})[name] = own.pop(key)
        if any(value.isnan().any() for state in states.values() for value in state.values()):
            raise AezooError(f"{what} is damaged: the statistics of its scores are not finite; save the model again")
        codes = own.pop("codes", None)
        if codes is not None and (codes.ndim != 2 or len(codes) < 2 or codes.shape[1] != code_size):
            raise AezooError(f"{what} is damaged: its codes are those of another model; save the model again")
        if any(not name.startswith("scores.") or value.ndim != 1 or not len(value) for name, value in own.items()):
            raise AezooError(f"{what} is damaged: it contains no scores of samples; save the model again")
        if not all(value.isfinite().all() for value in (*own.values(), *(() if codes is None else (codes,)))):
            raise AezooError(f"{what} is damaged: its codes or scores are not finite; save the model again")
        scores = {name.removeprefix("scores."): value.double() for name, value in own.items()}
        return cls(None if codes is None else codes.float(), scores, states)
