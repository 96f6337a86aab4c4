"""Plain values, the only arguments of a constructor that a file may contain."""

from typing import Any

from aezoo.errors import AezooError

MAX_VALUES, MAX_DEPTH, MAX_TEXT = 10_000, 8, 10_000
# limits of whole files, with each reference to a shared part followed
MAX_EXTENT, MAX_LEVELS = 5_000_000, 64


def check_plain(values: object, what: str) -> dict[str, Any]:
    """A copy of a dict of names to plain values: numbers, strings, None, and lists, tuples and dicts of these.

    The copy is complete, so a value that is referenced several times counts each time.

    Args:
        values: values from a file.
        what: beginning of the error message, as in `last.ckpt: its hyperparameters`.

    Raises:
        AezooError: it contains something else, too many values, or a dict that names a class to build.
    """
    if not isinstance(values, dict):
        raise AezooError(f"{what} are a {type(values).__name__}, not a table of names and values: the file is damaged")
    budget = [MAX_VALUES]
    for key in values:
        if not isinstance(key, str):
            raise AezooError(f"{what} have the name {str(key)[:50]!r}, which is not a string: the file is damaged")
    return {key: _copy(value, f"{what}: {key[:100]!r}", budget, 0) for key, value in values.items()}


def check_extent(content: object, what: str) -> None:
    """Refuse content that is nested too deep, or too large once each reference to a shared part is followed.

    A file of a kilobyte can contain lists of lists whose traversal would never end, because each list is stored once.

    Args:
        content: what a file held: tensors, and lists, tuples, sets and dicts of any values.
        what: beginning of the error message, the file.

    Raises:
        AezooError: it is too deep or too large, or contains itself.
    """
    _extent(content, what, {}, 0)


def _extent(value: object, what: str, known: dict[int, int], depth: int) -> int:
    """How many values a traversal visits; 0 in `known` marks containers that are being counted."""
    if not isinstance(value, list | tuple | set | frozenset | dict):
        return 1
    if id(value) not in known:
        if depth > MAX_LEVELS:
            raise AezooError(f"{what} is nested deeper than {MAX_LEVELS} levels: nothing that was trained needs that")
        known[id(value)] = 0
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        total = 1
        for part in parts:
            total += _extent(part, what, known, depth + 1)
            if total > MAX_EXTENT:
                raise AezooError(
                    f"{what} contains more than {MAX_EXTENT:,} values: nothing that was trained needs that"
                )
        known[id(value)] = total
    if not known[id(value)]:
        raise AezooError(f"{what} contains itself: the file is damaged")
    return known[id(value)]


def _copy(value: object, what: str, budget: list[int], depth: int) -> Any:
    budget[0] -= 1
    if budget[0] < 0 or depth > MAX_DEPTH:
        raise AezooError(f"{what} has more than {MAX_VALUES} values or {MAX_DEPTH} levels: no model needs that")
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        if abs(value) >= 2**63:
            raise AezooError(f"{what} is a number of more than 64 bits: no model needs that")
        return value
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise AezooError(f"{what} is a string of {len(value)} characters: no model needs that")
        return value
    if isinstance(value, list | tuple):
        parts = [_copy(part, what, budget, depth + 1) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, dict):
        if "class_path" in value:
            raise AezooError(f"{what} names a class to import and build, which no saved model may do: it is refused")
        if not all(isinstance(key, str) for key in value):
            raise AezooError(f"{what} has a name that is not a string: the file is damaged")
        return {key: _copy(part, what, budget, depth + 1) for key, part in value.items()}
    raise AezooError(f"{what} is a {type(value).__name__}: saved models contain numbers and strings only")
