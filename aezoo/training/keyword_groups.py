"""Groups of constructor arguments: `**settings: Unpack[Group]` (PEP 692) as if each argument were written out.

A group is a TypedDict whose annotations contain defaults and descriptions:

    class ImageArgs(TypedDict, total=False):
        size: Annotated[int | None, Argument(None, "Resize images to this.")]

Editors and type checkers read such a constructor by themselves. `arguments.complete_signature` writes the arguments out
for what reads signatures and docstrings at run time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints


@dataclass(frozen=True)
class Argument:
    """What `Annotated` adds to the type of an argument.

    Attributes:
        default: its default.
        text: its description.
        minimum: the smallest value.
        maximum: the largest value.
    """

    default: Any
    text: str
    minimum: float | None = None
    maximum: float | None = None


def arguments_of(group: type) -> dict[str, Argument]:
    """The arguments of a group by name, without those whose annotation has no `Argument`."""
    hints = get_type_hints(group, include_extras=True).items()
    return {name: part for name, hint in hints for part in get_args(hint) if isinstance(part, Argument)}


def complete(group: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a group with its defaults."""
    return {name: given.get(name, argument.default) for name, argument in arguments_of(group).items()}
