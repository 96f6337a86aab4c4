"""The error that users see for problems that they can fix, and how messages name optional packages."""


class AezooError(ValueError):
    """An error that the user can fix; the message says in one line what is wrong and what to do.

    The command line prints it without a traceback and ends with exit code 2.
    """


def install_hint(*extras: str) -> str:
    """How to install aezoo with extras, as messages and model cards say it.

    As long as no package index has aezoo, that is from a checkout.

    Args:
        extras: names in `[project.optional-dependencies]`; none for aezoo alone.
    """
    target = f"'.[{','.join(extras)}]'" if extras else "."
    return f"pip install {target} in a checkout of aezoo"
