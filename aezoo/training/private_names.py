"""x"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PrivateName:
    name: str
    files: tuple[str, ...]
    why: str
    without: str


PRIVATE_NAMES: tuple[PrivateName, ...] = ()
