"""Limits that constructors set to their arguments."""

import math

from aezoo.errors import AezooError


def check_at_least(least: float, **values: float) -> None:
    """Reject numbers that are below a limit, or infinite.

    Args:
        least: the limit.
        **values: the numbers, each by the name of its argument.

    Raises:
        AezooError: names the first rejected argument and the limit.
    """
    for name, value in values.items():
        if not least <= value < math.inf:
            finite = "" if isinstance(value, int) else " and finite"
            raise AezooError(f"{name} must be at least {least}{finite}, got {value}")


def check_above(limit: float, **values: float) -> None:
    """Reject numbers that are not above a limit, or infinite.

    Args:
        limit: the limit.
        **values: the numbers, each by the name of its argument.

    Raises:
        AezooError: names the first rejected argument and the limit.
    """
    for name, value in values.items():
        if not limit < value < math.inf:
            raise AezooError(f"{name} must be above {limit} and finite, got {value}")
