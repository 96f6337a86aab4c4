"""Comparisons with reference implementations: collected with `--parity FILE`, see CONTRIBUTING.md."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("comparison")

from comparison import Comparison  # noqa: E402


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Other test runs do not need the references."""
    return None if config.getoption("--parity") or collection_path.name == "parity" else True


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    # warnings of the references
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_default_dtype(before)


@pytest.fixture
def compare(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str, str], Comparison]]:
    """`compare(model, package, part)`, a comparison whose rows are kept if the test passes."""
    made: list[Comparison] = []

    def begin(model: str, package: str, part: str) -> Comparison:
        made.append(Comparison(model, package, part))
        return made[-1]

    failed = request.session.testsfailed
    yield begin
    if request.session.testsfailed == failed:
        assert made and all(comparison.rows for comparison in made), "the test has no comparison"
        for comparison in made:
            request.node.user_properties.append(("parity", comparison.record()))
