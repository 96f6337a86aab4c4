"""These tests start from one seed, as the laws do."""

from law_fixtures import _seed  # noqa: F401
