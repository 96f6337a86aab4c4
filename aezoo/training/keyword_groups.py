"""Groups of constructor arguments: `**settings: Unpack[Group]` (PEP 692) as if each argument were written out.

A group is a TypedDict whose annotations hold defaults and descriptions:

    class ImageArgs(TypedDict, total=False):
        size: Annotated[int | None, Argument(None, "Resize images to this.")]

Editors and type checkers read such a constructor by themselves. `expand` does the same for what reads signatures at run
time: jsonargparse 4.53 takes all keys of an unpacked TypedDict for optional ones without a default.
"""

import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType, GeneratorType
from typing import Any, Unpack, cast, get_args, get_origin, get_type_hints

_WIDTH = 112


@dataclass(frozen=True)
class Argument:
    """What `Annotated` adds to the type of an argument.

    Attributes:
        default: its default.
        text: its description.
        least: the smallest value.
        most: the largest value.
    """

    default: Any
    text: str
    least: float | None = None
    most: float | None = None


def arguments_of(group: type) -> dict[str, Argument]:
    """The arguments of a group by name."""
    hints = get_type_hints(group, include_extras=True).items()
    return {name: next(one for one in get_args(hint) if isinstance(one, Argument)) for name, hint in hints}


def group_of(function: Any) -> type | None:
    """The TypedDict of a function's `**name: Unpack[...]`; None without one."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD and get_origin(parameter.annotation) is Unpack:
            group: type = get_args(parameter.annotation)[0]
            return group
    return None


def expand(cls: type) -> None:
    """Write out a class's group of arguments in the signature of its constructor and at the end of its docstring."""
    init = inspect.getattr_static(cls, "__init__")
    group = group_of(init)
    if group is None:
        return
    types, arguments, signature = get_type_hints(group), arguments_of(group), inspect.signature(init)
    parameters = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    lines = [inspect.cleandoc(cls.__doc__ or "")]
    for name, argument in arguments.items():
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(name, kind, default=argument.default, annotation=types[name]))
        lines += textwrap.wrap(f"{name}: {argument.text}", _WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8)
    init.__signature__ = signature.replace(parameters=parameters)
    cls.__doc__ = "\n".join(lines)


def complete(group: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a group with its defaults."""
    return {name: given.get(name, argument.default) for name, argument in arguments_of(group).items()}


def frame_without_callers() -> FrameType:
    """A frame for `save_hyperparameters(values, frame=...)`.

    Even for given values Lightning looks up the names of a constructor's signature among the variables of the calling
    frames, and would fail for those that `expand` adds; it stops at a frame that nothing has called.
    """
    generator = cast("GeneratorType[None, None, None]", (None for _ in range(0)))
    return cast(FrameType, generator.gi_frame)
