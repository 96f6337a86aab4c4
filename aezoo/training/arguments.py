"""Constructor arguments: the groups that all models share, complete signatures, and checks against annotations.

A constructor only names the arguments that it adds and passes the others on, as `**kwargs: Unpack[SomeArgs]` (PEP 692),
where SomeArgs lists the others with their types. Their defaults and descriptions are in the constructor that uses them,
or in the group, see `keyword_groups`. `complete_signature` combines all of them for `inspect.signature`.
"""

import difflib
import inspect
import os
import textwrap
import types
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, Self, TypedDict, Union, Unpack, get_args, get_origin, get_type_hints

from aezoo.errors import AezooError
from aezoo.training.keyword_groups import arguments_of
from aezoo.training.model_names import display_name

# the largest integer of torch and of a checkpoint
_MAX_INTEGER = 2**63 - 1
# larger hyperparameters make no sense, and float32 would lose all digits of a loss in a sum with them
_MAX_FLOAT = 1e9
# line width of descriptions in a docstring
_WIDTH = 112


class OptimizerArgs(TypedDict, total=False):
    """How the parameters are optimised, see `Autoencoder`."""

    lr: float
    optimizer: str
    weight_decay: float
    lr_schedule: str
    warmup_steps: int


class TrainingArgs(OptimizerArgs, total=False):
    """The likelihood and how the parameters are optimised, see `Autoencoder`."""

    likelihood: str


# ---- complete signatures --------------------------------------------------------------------------------------------


def complete_signature(cls: type, defaults: Mapping[str, Any]) -> None:
    """Give the constructor of a class the signature that it has together with those of its parents.

    It names the arguments that come as `**kwargs: Unpack[...]` too, each with its type and default. Those that their
    group describes are added to the class's docstring.

    Args:
        cls: a new class.
        defaults: defaults of inherited arguments, instead of the parents'.

    Raises:
        AezooError: a default of an argument that the class does not have, or of another type.
    """
    own = vars(cls).get("__init__")
    if own is not None:
        cls._own_parameters = _annotated(own)  # type: ignore[attr-defined]
        _describe(cls)
    cls._own_defaults = dict(defaults)  # type: ignore[attr-defined]
    signature = _resolved(cls)
    for name in defaults:
        if name not in signature.parameters:
            known = [key for key in signature.parameters if key not in ("self", "input_shape")]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f": it has {', '.join(known)}"
            raise AezooError(f"{cls.__name__}: default of an unknown argument {name!r}{hint}")
    if defaults or (own is None and signature != inspect.signature(cls.__init__)):  # type: ignore[misc]
        _wrap(cls, own, dict(defaults))
        own = vars(cls)["__init__"]
    if own is not None and signature != inspect.signature(own):
        own.__signature__ = signature
    check(cls, (), dict(defaults))


def _describe(cls: Any) -> None:
    group = _group(cls._own_parameters)
    lines = [inspect.cleandoc(cls.__doc__ or "")]
    for name, argument in arguments_of(group).items() if group else ():
        lines += textwrap.wrap(f"{name}: {argument.text}", _WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8)
    if len(lines) > 1:
        cls.__doc__ = "\n".join(lines)


def _group(parameters: list[inspect.Parameter]) -> type | None:
    """The TypedDict of `**name: Unpack[...]`; None without one."""
    hints = [p.annotation for p in parameters if p.kind is p.VAR_KEYWORD and get_origin(p.annotation) is Unpack]
    return get_args(hints[0])[0] if hints else None


def _wrap(cls: Any, own: Any, defaults: dict[str, Any]) -> None:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        inner = super(cls, self).__init__ if own is None else own.__get__(self)
        inner(*args, **{**defaults, **kwargs})

    __init__.__qualname__, __init__.__module__ = f"{cls.__qualname__}.__init__", cls.__module__
    __init__.__doc__ = getattr(own, "__doc__", None)
    cls.__init__ = __init__


def _annotated(init: Any) -> list[inspect.Parameter]:
    """The parameters of one function, with evaluated annotations if possible."""
    try:
        hints = get_type_hints(init)
    except Exception:  # names that exist for a type checker only
        hints = {}
    parameters = inspect.signature(init).parameters.values()
    return [p.replace(annotation=hints.get(p.name, p.annotation)) for p in parameters]


def _own_parameters(cls: type) -> list[inspect.Parameter] | None:
    """The parameters of the constructor that a class itself defines, or None."""
    if "_own_defaults" in vars(cls):
        return vars(cls).get("_own_parameters")
    return _annotated(vars(cls)["__init__"]) if inspect.isfunction(vars(cls).get("__init__")) else None


def _resolved(cls: type) -> inspect.Signature:
    constructors = [found for c in cls.__mro__ if (found := _own_parameters(c)) is not None]
    group = _group(constructors[0])
    parameters = {p.name: p for p in constructors[0] if group is None or p.kind is not p.VAR_KEYWORD}
    if group is not None:
        hints, described = get_type_hints(group), arguments_of(group)
        for p in [p for of_parent in constructors[1:] for p in of_parent]:
            if p.name in hints and p.name not in parameters:
                parameters[p.name] = p.replace(kind=p.KEYWORD_ONLY)
        for name in [key for key in hints if key not in parameters]:
            default = described[name].default if name in described else inspect.Parameter.empty
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters[name] = inspect.Parameter(name, kind, default=default, annotation=hints[name])
    return inspect.Signature([p.replace(default=_default(cls, p)) for p in parameters.values()])


def _default(cls: type, parameter: inspect.Parameter) -> Any:
    """The default of the first class in the order of inheritance that sets or declares one."""
    for c in cls.__mro__:
        if parameter.name in vars(c).get("_own_defaults", {}):
            return vars(c)["_own_defaults"][parameter.name]
        for written in _own_parameters(c) or ():
            if written.name == parameter.name:
                return written.default
    return parameter.default


def bound(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The values of all arguments of a constructor, given or by default; {} if it does not take these."""
    signature, _ = _constructor(cls)
    assert signature is not None
    try:
        given = signature.bind_partial(*args, **kwargs)
    except TypeError:
        return {}  # the message of the constructor names the argument
    given.apply_defaults()
    values = dict(given.arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            values |= values.pop(name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            values |= dict(zip(["input_shape"], values.pop(name), strict=False))
    return values


# ---- checks ---------------------------------------------------------------------------------------------------------


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
    except TypeError as error:
        if hasattr(cls.__init__, "__signature__"):  # type: ignore[misc]
            unknown = next((name for name in kwargs if name not in signature.parameters), "")
            near = difflib.get_close_matches(unknown, signature.parameters, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            # names the class itself, not the parent that gets **kwargs
            raise TypeError(f"{cls.__name__}.__init__() {error}{hint}") from None
        return  # Python's message names the argument
    for name, value in given.items():
        if name in hints and not _fits(value, hints[name]):
            takes_integers = tuple[int, ...] in (hints[name], *get_args(hints[name]))
            cure = f": give ({value},)" if takes_integers and _fits(value, int) else ""
            raise AezooError(
                f"{display_name(cls)}: {name} takes {_type_text(hints[name])}, got {_short_repr(value)}{cure}"
            )


@lru_cache(maxsize=256)
def _constructor(cls: type) -> tuple[inspect.Signature | None, dict[str, Any]]:
    init = inspect.getattr_static(cls, "__init__")
    if not inspect.isfunction(init):
        return None, {}
    parameters = _annotated(init)[1:]
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    # a string annotation is a name that exists for type checkers only
    known = {p.name: p.annotation for p in plain if p.annotation is not p.empty and not isinstance(p.annotation, str)}
    return inspect.Signature(parameters), known


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Literal:
        # if a string is not one of the choices, the constructor refuses it and suggests the most similar one
        return isinstance(value, tuple({type(choice) for choice in get_args(hint)}))
    if origin in (tuple, list):
        part = get_args(hint)[0] if get_args(hint) else Any
        return isinstance(value, tuple | list) and all(_fits(item, part) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is int:
        # not NumPy's, which torch does not take as sizes and a checkpoint not at all
        return type(value) is int and abs(value) <= _MAX_INTEGER
    if hint is float:
        return type(value) in (int, float) and abs(value) <= _MAX_FLOAT
    if hint is str:
        return isinstance(value, str | os.PathLike)
    if hint in (bool, type(None)):
        return isinstance(value, hint)
    return True


def _type_text(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_text(part) for part in get_args(hint) if part is not type(None))
    if origin is Literal:
        return f"one of {', '.join(map(str, get_args(hint)))}"
    if origin in (tuple, list):
        kind = get_args(hint)[0] if get_args(hint) else Any
        return {int: "a list of whole numbers", str: "a list of strings"}.get(kind, "a list")
    if origin is dict:
        return "a mapping"
    names = {
        int: "a whole number of at most 64 bits",
        float: "a finite number of at most 1e9",
        bool: "true or false",
        str: "a text",
    }
    return names.get(hint, str(hint))


def _short_repr(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:80]}..."
