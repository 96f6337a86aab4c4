"""What verbs need of the training data, kept with a model's weights so that they work without these data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from aezoo.errors import AezooError


@dataclass(frozen=True)
class DataStatistics:
    """Codes and scores of the data that a model was trained on.

    Attributes:
        codes: (N, D) codes of training samples, which `generate` fits a prior to; None for a model with a prior of its
            own.
        scores: (M,) scores of normal samples that the model was not trained on, by the name of the score, such as
            `deviance`: `detect` calibrates thresholds and p-values on them.
    """

    PREFIX: ClassVar[str] = "data_statistics."

    codes: Tensor | None = None
    scores: Mapping[str, Tensor] = field(default_factory=dict)

    def to_tensors(self) -> dict[str, Tensor]:
        """The statistics as named tensors, which are kept beside the weights."""
        named = {f"scores.{name}": scores for name, scores in self.scores.items()}
        named |= {} if self.codes is None else {"codes": self.codes}
        return {f"{self.PREFIX}{name}": value.contiguous() for name, value in named.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], code_size: int, what: str) -> "DataStatistics":
        """What `to_tensors` gave, codes in float32 and scores in float64.

        Args:
            tensors: the named tensors.
            code_size: D.
            what: the file that holds them.

        Raises:
            AezooError: they are something else.
        """
        own = {key.removeprefix(cls.PREFIX): value for key, value in tensors.items()}
        codes = own.pop("codes", None)
        if codes is not None and (codes.ndim != 2 or len(codes) < 2 or codes.shape[1] != code_size):
            raise AezooError(f"{what} is damaged: its codes are those of another model; save the model again")
        if any(not name.startswith("scores.") or value.ndim != 1 or not len(value) for name, value in own.items()):
            raise AezooError(f"{what} is damaged: it holds no scores of samples; save the model again")
        if not all(value.isfinite().all() for value in tensors.values()):
            raise AezooError(f"{what} is damaged: its codes or scores are not finite; save the model again")
        scores = {name.removeprefix("scores."): value.double() for name, value in own.items()}
        return cls(None if codes is None else codes.float(), scores)
