"""What all tests share: few threads, since the suite itself runs in two processes."""

from pathlib import Path

import pytest
import torch

collect_ignore = ["plugin"]


def pytest_addoption(parser):
    parser.addoption("--proofs", type=Path, metavar="FILE", help="count there what each model has passed")


def pytest_configure(config):
    if config.getoption("--proofs"):
        from proofs import Proofs

        config.pluginmanager.register(Proofs(config.getoption("--proofs")))


@pytest.fixture(autouse=True, scope="session")
def _few_threads():
    torch.set_num_threads(1)


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile with a back end that compiles nothing; collects what it was asked for."""
    asked = []
    real = torch.compile

    def backend(module, inputs):
        asked.append(module)
        return module.forward

    def compile_it(function, *, mode, dynamic):
        torch._dynamo.reset()
        return real(function, backend=backend, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compile_it)
    return asked
