"""The one error that a user can cause and mend."""


class AezooError(ValueError):
    """A mistake in what was asked for; the message names the cause and the cure in one line.

    The command line prints it without a traceback and ends with exit code 2.
    """
