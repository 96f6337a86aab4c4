"""Texts in HTML."""

from html import escape


def text(value: object) -> str:
    """Any text for HTML; what is no character to be shown, as names of files may hold, becomes a replacement."""
    return escape("".join(c if c.isprintable() else " " if c in "\n\t" else "\ufffd" for c in str(value)))
