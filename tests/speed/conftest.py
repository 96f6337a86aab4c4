"""Enable `aezoo.speed` in its tests."""

import pytest


@pytest.fixture(autouse=True)
def _speed_is_on(speed_on):
    pass
