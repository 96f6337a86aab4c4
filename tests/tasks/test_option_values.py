"""Unusual values of every option of every command: each is accepted or refused immediately, in one line, by name."""

import contextlib
import importlib
import inspect
import io

import numpy as np
import pytest
import torch

import aezoo
from aezoo.cli import task_commands
from aezoo.cli.main import TASK_COMMANDS
from aezoo.errors import AezooError

VALUES = ("-1", "0", "1", "1.5", "nan", "inf", "-inf", "1000000000000", "abc", "", "[]", "true", "null")


def function_of(command):
    return getattr(importlib.import_module(f"aezoo.tasks.{command}"), command)


def options():
    for command in TASK_COMMANDS:
        for name in inspect.signature(function_of(command)).parameters:
            if name not in task_commands._GIVEN:
                yield pytest.param(command, name, id=f"{command}.{name}")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return aezoo.create_model("vae", (1, 8, 8), latent_dim=2, hidden_dims=(8,)).eval()


@pytest.fixture(scope="module")
def x():
    return (np.random.default_rng(0).random((24, 1, 8, 8)) > 0.5).astype(np.float32)


@pytest.fixture(scope="module")
def packed(model, x, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    aezoo.compress(model, x, compare=False, fit_on=x, out=str(folder))
    return folder / "samples.aez"


@pytest.mark.slow
@pytest.mark.parametrize(("command", "option"), [*options()])
@pytest.mark.filterwarnings("ignore")
def test_option_value_is_accepted_or_refused_in_one_line(command, option, model, x, packed, tmp_path):
    function = function_of(command)
    parser = task_commands.parser_of(command, function)
    accepted = inspect.signature(function).parameters
    # settings that keep the command fast
    quick = {"n_shown": 0, "baselines": False, "compare": False, "n": 4, "n_draws": 2, "format": "safetensors"}
    common = {key: value for key, value in quick.items() if key in accepted and key != option}
    if "file" in accepted:
        common["file"] = str(packed)
    common |= {key: x for key in ("x", "fit_on", "calibrate_on") if key in accepted}
    for value in VALUES:
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                config = parser.parse_args([f"--{option}={value}"])
        except (AezooError, SystemExit):
            continue
        try:
            function(model=model, out=str(tmp_path / value.strip("[]")), **common, **{option: config[option]})
        except AezooError as error:
            message = str(error)
            assert len(message.splitlines()) == 1 and len(message) < 500, message
