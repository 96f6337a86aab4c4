"""Seed every test in this folder."""

from law_fixtures import _seed  # noqa: F401
