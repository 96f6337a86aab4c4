"""Constructor arguments checked against their annotations, before a constructor computes with them."""

import inspect
import os
import types
from functools import lru_cache
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from aezoo.errors import AezooError

# what fits in the integers of torch and of a checkpoint
_MOST = 2**63 - 1
# no hyperparameter means more, and float32 loses every digit of a loss beside it
_LARGEST = 1e9


class Checked:
    """Base of classes whose constructors take plain values: a value of another type is refused in one line.

    Integers must fit in 64 bits, floats must be finite and at most 1e9. Constructors check the meaning of values
    themselves. This is not a decorator of `__init__`, since `save_hyperparameters` reads the frame of that.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        check(cls, args, kwargs)
        return super().__new__(cls)


def check(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse values that do not fit a constructor's annotations; only annotations of plain types are checked.

    Raises:
        AezooError: names the class, the argument, what it takes and what it got.
    """
    signature, hints = _constructor(cls)
    if signature is None:
        return
    try:
        given = signature.bind_partial(*args, **kwargs).arguments
    except TypeError:
        return  # Python's own message names the argument
    for name, value in given.items():
        if name in hints and not _fits(value, hints[name]):
            cure = f": give ({value},)" if hints[name] == tuple[int, ...] and _fits(value, int) else ""
            raise AezooError(f"{cls.__name__}: {name} takes {_words(hints[name])}, got {_brief(value)}{cure}")


@lru_cache(maxsize=256)
def _constructor(cls: type) -> tuple[inspect.Signature | None, dict[str, Any]]:
    init = inspect.getattr_static(cls, "__init__")
    if not inspect.isfunction(init):
        return None, {}
    try:
        hints = get_type_hints(init)
    except Exception:  # names that exist for a type checker only
        return None, {}
    parameters = list(inspect.signature(init).parameters.values())[1:]
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return inspect.Signature(parameters), {
        p.name: hints.get(p.name, p.annotation) for p in plain if p.annotation is not p.empty
    }


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        # a text that is none of the choices is refused by the constructor, which suggests the nearest
        return isinstance(value, tuple({type(choice) for choice in get_args(hint)}))
    if origin in (tuple, list):
        part = get_args(hint)[0] if get_args(hint) else Any
        return isinstance(value, tuple | list) and all(_fits(item, part) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is int:
        # not NumPy's, which torch does not take as sizes and a checkpoint not at all
        return type(value) is int and abs(value) <= _MOST
    if hint is float:
        return type(value) in (int, float) and abs(value) <= _LARGEST
    if hint is str:
        return isinstance(value, str | os.PathLike)
    if hint in (bool, type(None)):
        return isinstance(value, hint)
    return True


def _words(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part) for part in get_args(hint))
    if origin is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if origin in (tuple, list):
        kind = get_args(hint)[0] if get_args(hint) else Any
        return {int: "a list of whole numbers", str: "a list of texts"}.get(kind, "a list")
    if origin is dict:
        return "a mapping"
    names = {
        int: "a whole number of at most 64 bits",
        float: "a finite number of at most 1e9",
        bool: "true or false",
        str: "a text",
    }
    return names.get(hint, "nothing" if hint is type(None) else str(hint))


def _brief(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:80]}..."
