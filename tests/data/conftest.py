"""Ignore warnings that Lightning raises itself."""

import warnings

import pytest


@pytest.fixture(autouse=True)
def _lightnings_own_warnings():
    with warnings.catch_warnings():
        # raised inside lightning 2.6.6, fixed on its master branch only
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        # depends on the number of cores, and is raised for sets in memory, too
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        yield
