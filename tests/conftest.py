"""Settings of all tests: few threads, since the tests run in two processes."""

import functools
import getpass
import importlib.metadata
import logging
import os
import sys
import tempfile
import zlib
from pathlib import Path

import pytest

_read_entry_points = importlib.metadata.entry_points


@functools.cache
def _points_of(path, group):
    return _read_entry_points(group=group)


def _entry_points(**given):
    """Cache entry points: each Trainer and DataModule reads those of all installed packages, which takes 10 ms."""
    return _points_of(tuple(sys.path), **given) if given.keys() == {"group"} else _read_entry_points(**given)


# before Lightning and aezoo import it by name
importlib.metadata.entry_points = _entry_points

import torch  # noqa: E402
from law_fixtures import (  # noqa: E402, F401
    adam,
    centred,
    digits,
    fashion_mnist,
    lbfgs,
    mnist5k,
    quiet,
    shifted,
    spectrum,
)
from lightning.pytorch.utilities import rank_zero_only  # noqa: E402

collect_ignore = ["plugin"]


def _processor() -> str:
    """The processor's capability by torch, and a hash of its instruction sets."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{torch.backends.cpu.get_cpu_capability()}-{zlib.crc32(flags.encode()):08x}"


# inductor caches kernels for AVX2 and AVX512 under the same key, and kernels of the wrong one crash the process
_CACHE = Path(tempfile.gettempdir(), f"inductor-{getpass.getuser()}-{_processor()}")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_CACHE)
# defaults depend on the weights downloaded by torch.hub, see `features=auto`
os.environ["TORCH_HOME"] = str(Path(tempfile.gettempdir(), "aezoo-tests-without-weights"))


def pytest_addoption(parser):
    parser.addoption(
        "--parity", type=Path, metavar="FILE", help="run tests/parity, and write the rows of its comparisons there"
    )


def pytest_configure(config):
    if config.getoption("--parity"):
        from parity_rows import ParityRows

        config.pluginmanager.register(ParityRows(config.getoption("--parity")))


# each keeps the stack of every torch.manual_seed for a device that is never used: 0.5 ms and 20 kB per call
for _device in (torch.cuda, torch.xpu, torch.mtia):
    if not _device.is_available():
        _device.manual_seed_all = lambda seed: None

# Lightning sets them when it starts other ranks; later tests in this process would run as one of these ranks
_RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _process_state():
    """Reset process state that tests change: numba, for UMAP, sets threads; strategies and quiet fits silence logs."""
    torch.set_num_threads(1)
    rank_zero_only.rank = 0
    for name in _RANK_VARIABLES:
        os.environ.pop(name, None)
    if logging.root.manager.disable:
        logging.disable(logging.NOTSET)
    for name in ("lightning.pytorch", "lightning.fabric"):
        if logging.getLogger(name).level != logging.INFO:  # setting a level clears the caches of all loggers
            logging.getLogger(name).setLevel(logging.INFO)
    # Lightning disables propagation if the root has no handler at import; other libraries disable its loggers
    for name in ("lightning", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).disabled = False
        logging.getLogger(name).propagate = True


_parsers_kept = []


@pytest.fixture(autouse=True)
def _parse_translations_once():
    """Keep the parsed translations of onnxscript: parsing them for each export takes a third of its time."""
    if _parsers_kept or "onnxscript" not in sys.modules:
        return
    # the module for this version of torch, after an export has imported it
    for name, module in [*sys.modules.items()]:
        parse = getattr(module, "get_torchlib_ops", None) if name.startswith("onnxscript._framework_apis") else None
        if parse is not None:
            module.get_torchlib_ops = functools.cache(parse)
            _parsers_kept.append(name)


@pytest.fixture
def speed_on(monkeypatch):
    """Enable `aezoo.speed` for its own tests, also if AEZOO_SPEED=off disables it for all others."""
    monkeypatch.delenv("AEZOO_SPEED", raising=False)


def _compile_by(backend, monkeypatch):
    real = torch.compile

    def compile_it(function, *, mode, dynamic):
        torch._dynamo.reset()
        return real(function, backend=backend, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compile_it)


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile with a back end that compiles nothing; collects the graphs it receives."""
    asked = []

    def backend(module, inputs):
        asked.append(module)
        return module.forward

    _compile_by(backend, monkeypatch)
    return asked


@pytest.fixture
def aot_graphs(monkeypatch):
    """The same after autograd is traced, as for inductor: forward graphs."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    asked = []

    def compiler(module, inputs):
        asked.append(module)
        return make_boxed_func(module.forward)

    _compile_by(
        aot_autograd(fw_compiler=compiler, bw_compiler=lambda module, _: make_boxed_func(module.forward)), monkeypatch
    )
    return asked
