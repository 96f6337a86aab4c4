"""Warnings that Lightning raises by itself are no failures here."""

import warnings

import pytest


@pytest.fixture(autouse=True)
def _lightnings_own_warnings():
    with warnings.catch_warnings():
        # raised inside lightning 2.6.6, cured on its master branch only
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        # an advice that depends on the number of cores, and comes for a set in memory too
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        yield
