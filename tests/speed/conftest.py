"""Tests of speed have it on."""

import pytest


@pytest.fixture(autouse=True)
def _speed_is_on(speed_on):
    pass
