"""Folders in the formats of pythae and MultiVae, with random weights, and outputs of these libraries."""

import json
from collections import OrderedDict
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from drawn_weights import drawn

import aezoo
from aezoo.errors import AezooError

FIXTURES = Path(__file__).parents[1] / "fixtures"
# tolerances for layers of 512 units
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@cache
def _state(path):
    with np.load(path) as arrays:
        shapes, fixed = (json.loads(str(arrays[key])) if key in arrays else {} for key in ("shapes", "fixed"))
    state = {key: torch.from_numpy(value) for key, value in drawn(shapes, 0).items()}
    return state | {key: torch.zeros(shape) for key, shape in fixed.items()}


class Folders:
    """Cases of one library, by name."""

    def __init__(self, library):
        self.path = FIXTURES / library
        self.cases = sorted(path.name for path in self.path.iterdir())

    def config(self, case):
        return json.loads((self.path / case / "model_config.json").read_text())

    def expected(self, case):
        with np.load(self.path / case / "expected.npz") as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files if key not in ("shapes", "fixed")}

    def state(self, case):
        return OrderedDict(_state(self.path / case / "expected.npz"))

    def write(self, case, folder, state=None, pickled=None, **settings):
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "model_config.json").write_text(json.dumps({**self.config(case), **settings}))
        (folder / "environment.json").write_text('{"name": "EnvironmentConfig", "python_version": "3.11"}')
        content = {"model_state_dict": self.state(case) if state is None else state} if pickled is None else pickled
        torch.save(content, folder / "model.pt")
        return folder


@contextmanager
def noise(*draws):
    """Make torch draw these normal numbers in order."""
    left = list(draws)

    def take(shape):
        return left.pop(0).reshape(shape)

    with (
        mock.patch("torch.randn_like", lambda like, **_: take(like.shape)),
        mock.patch("torch.randn", lambda *shape, **_: take(shape if isinstance(shape[0], int) else shape[0])),
    ):
        yield
    assert not left


def assert_close(pairs):
    """Compare ours and theirs by name."""
    for name, (found, theirs) in pairs.items():
        torch.testing.assert_close(found.detach(), theirs, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def assert_refused(folder, message):
    with pytest.raises(AezooError, match=message) as refusal:
        aezoo.import_model(folder)
    assert "\n" not in str(refusal.value)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        import os

        return os.mkdir, ("executed",)
