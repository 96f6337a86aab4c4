"""Texts in HTML."""

from html import escape


def text(value: object) -> str:
    """Escape a text for HTML; invalid characters, which names of files may contain, are replaced."""
    return escape("".join(c if c.isprintable() else " " if c in "\n\t" else "\ufffd" for c in str(value)))
