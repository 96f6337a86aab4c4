"""One setting that `aezoo tune` searches: `--search.SETTING` and its value."""

import difflib
import math
from dataclasses import dataclass
from typing import Any

from aezoo.errors import AezooError

FLAG = "--search."


@dataclass(frozen=True)
class Search:
    """One setting to search.

    Attributes:
        name: a flag of fit without its dashes.
        text: the search as the user wrote it.
        kind: log, float, int or choice.
        low: the smallest value of a number.
        high: the largest value of a number.
        step: step between whole numbers; 0 means uniform in their logarithm.
        choices: the values if they are not a range.
    """

    name: str
    text: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    step: int = 1
    choices: tuple[str, ...] = ()

    def bounds(self) -> tuple[str, ...]:
        """The values that are checked before the first trial: the ends of a range, or all choices."""
        if self.kind == "choice":
            return self.choices
        return tuple(str(int(end)) if self.kind == "int" else repr(end) for end in (self.low, self.high))

    def values(self) -> tuple[Any, ...]:
        """All values, for a grid.

        Raises:
            AezooError: they cannot be counted.
        """
        if self.kind == "choice":
            return self.choices
        if self.kind != "int" or not self.step:
            raise AezooError(
                f"{FLAG}{self.name} {self.text}: --sampler grid takes values, such as 0.001,0.01 or int:LOW:HIGH:STEP"
            )
        return tuple(range(int(self.low), int(self.high) + 1, self.step))

    def suggest(self, trial: Any) -> str:
        """The value for a trial of optuna, in the form that its flag takes."""
        if self.kind == "choice":
            return str(trial.suggest_categorical(self.name, self.choices))
        if self.kind == "int":
            low, high, log = int(self.low), int(self.high), self.step == 0
            return str(trial.suggest_int(self.name, low, high, step=self.step or 1, log=log))
        return repr(trial.suggest_float(self.name, self.low, self.high, log=self.kind == "log"))


def search(name: str, text: str) -> Search:
    """Parse the value of `--search.NAME`.

    Raises:
        AezooError: it is neither a range nor several values.
    """
    flag = f"{FLAG}{name}"
    kind, *parts = text.split(":")
    if kind not in ("log", "float", "int"):
        choices = tuple(part.strip() for part in _at_commas(text))
        if len(choices) < 2:
            near = difflib.get_close_matches(kind, ["log", "float", "int"], n=1) if parts else []
            hint = f"did you mean {':'.join([*near, *parts])}?" if near else "give log:LOW:HIGH, float:LOW:HIGH, "
            hint += "" if near else "int:LOW:HIGH, or values with commas between them"
            raise AezooError(f"{flag} {text}: {'' if near else 'that is one value: '}{hint}")
        if "" in choices or len(set(choices)) < len(choices):
            raise AezooError(f"{flag} {text}: give values that differ, none of them empty")
        return Search(name, text, "choice", choices=choices)
    form = "int:LOW:HIGH, int:LOW:HIGH:STEP or int:LOW:HIGH:log" if kind == "int" else f"{kind}:LOW:HIGH"
    step = 0 if kind == "int" and parts[2:] == ["log"] else 1
    try:
        numbers = [(int if kind == "int" else float)(part) for part in (parts[:2] if step == 0 else parts)]
    except ValueError:
        numbers = []
    if not (len(numbers) == 2 or (kind == "int" and len(numbers) == 3)) or not all(map(math.isfinite, numbers)):
        raise AezooError(f"{flag} {text}: give {form}, with numbers")
    low, high = numbers[:2]
    if len(numbers) == 3:
        step = int(numbers[2])
        if step < 1:
            raise AezooError(f"{flag} {text}: the step must be at least 1")
    if low >= high:
        raise AezooError(f"{flag} {text}: {parts[0]} is not below {parts[1]}: give the lower end first")
    if (kind == "log" or step == 0) and low <= 0:
        raise AezooError(f"{flag} {text}: a logarithm needs a lower end above 0")
    return Search(name, text, kind, float(low), float(high), step)


def _at_commas(text: str) -> list[str]:
    """Split at commas outside brackets: `[64,32],[128]` is two values."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "[({") - (sign in "])}")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return parts
