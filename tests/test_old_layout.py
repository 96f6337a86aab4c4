"""Checkpoints and saved models written before modules were moved still load, with the same outputs."""

import json
from pathlib import Path

import pytest
import torch

import aezoo

FOLDER = Path(__file__).parent / "fixtures/old_layout"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_file_of_old_layout_gives_same_outputs(name):
    model = aezoo.load_model(FOLDER / name).eval()
    torch.manual_seed(0)
    x = torch.rand(3, 1, 8, 8).flatten(1)[:, : torch.Size(model.input_shape).numel()].unflatten(1, model.input_shape)
    with torch.no_grad():
        found = {"code": model.encode(x), "reconstruction": model(x), "score": model.score(x)}
    for key, value in found.items():
        expected = torch.tensor(EXPECTED[name][key])
        value = value if key == "score" else value.flatten(1)[:, : expected.shape[1]]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", EXPECTED)
def test_file_of_old_layout_keeps_hyperparameters(name):
    model = aezoo.load_model(FOLDER / name)
    kept = {key: [*value] if isinstance(value, tuple) else value for key, value in model.hparams.items()}
    stored = EXPECTED[name]["hyperparameters"]
    assert kept.keys() >= stored.keys() and {key: kept[key] for key in stored} == stored
