"""Results, data and models in Python: one-line reprs, DataFrames and figures."""

import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import aezoo
from aezoo.errors import AezooError
from aezoo.tasks.samples import SampleSet

COMMANDS = {
    "reconstruct": ({}, "30 samples of 3, mse ", ["index", "mse", "mae", "score", "a", "b", "c"], 30),
    "detect": (
        {"baselines": False},
        "30 samples of 3, ",
        ["index", "score", "p_value", "is_anomaly", "a", "b", "c"],
        30,
    ),
    "embed": ({}, "30 codes of 2", ["index", "z0", "z1"], 30),
    "generate": ({"n": 5}, "5x3: 5 samples from the model's own prior", ["a", "b", "c"], 5),
    "denoise": ({"corrupt": "gaussian:0.1"}, "30 samples of 3, mse ", ["method", "mse", "psnr"], 2),
    "compress": ({"compare": False, "mode": "lossy"}, "30 samples, lossy: ", ["method", "quality", "samples"], 1),
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return aezoo.create_model("vae", (3,), latent_dim=2, hidden_dims=(4,)).eval()


@pytest.fixture(scope="module")
def frame():
    import pandas

    return pandas.DataFrame(np.random.default_rng(0).random((30, 3)), columns=["a", "b", "c"])


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_results_have_a_line_a_table_and_a_figure(model, frame, monkeypatch, command):
    settings, line, names, n = COMMANDS[command]
    found = getattr(aezoo, command)(model, frame, **settings)
    assert repr(found).startswith(f"{type(found).__name__}({line}") and "\n" not in repr(found)
    assert list(found.table)[: len(names)] == names and len(found.table) == n and found.table is found.table
    assert isinstance(found.figure, Figure) and aezoo.show(found) is found.figure and found.files == []
    del found.table
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(AezooError, match="which needs pandas: pip install pandas"):
        _ = found.table


def test_figures_show_in_a_notebook_and_need_samples(model, frame):
    figure = aezoo.show(frame, n=2)
    assert figure._repr_png_().startswith(b"\x89PNG") and len(figure.axes) == 2
    # each value is a bar with the scale of its column
    wide = aezoo.show(frame.assign(b=1e6 * frame["b"]), n=2)
    assert [bar.get_width() for bar in wide.axes[0].patches] == pytest.approx(
        [bar.get_width() for bar in figure.axes[0].patches], rel=1e-4
    )
    noisy = aezoo.denoise(model, frame, n_shown=0)
    assert noisy.rows == [] and list(noisy.table) == ["method", "mse", "psnr", "setting"] and len(noisy.table) == 1
    with pytest.raises(AezooError, match="n_shown is 0, so there are no samples to draw"):
        _ = aezoo.reconstruct(model, frame, n_shown=0).figure
    with pytest.raises(AezooError, match="n must be at least 1"):
        aezoo.show(frame, n=0)


@pytest.mark.slow
def test_show_draws_every_kind_of_data():
    for shape in ((9,), (2, 16), (1, 8, 8), (3, 9, 7), (1, 4, 8, 8)):
        assert aezoo.show(torch.rand(5, *shape), n=3).axes
    digits = aezoo.DataModule("digits")
    assert aezoo.show(digits, split="val").axes[0].images


def test_reprs_name_shapes_sizes_and_splits(model):
    data = aezoo.DataModule("digits", batch_size=32)
    assert repr(data) == str(data) == "DataModule(digits: samples of 1x8x8, not read yet, batches of 32)"
    assert "1x8x8 in elsewhere, not read yet" in repr(aezoo.DataModule("digits", root="elsewhere"))
    sizes = {stage: len(data.tensors(stage)[0]) for stage in data.splits()}
    said = ", ".join(f"{n} {stage}" for stage, n in sizes.items())
    assert repr(data) == str(data) == f"DataModule(digits: {said}, 1x8x8, 10 classes, batches of 32)"
    assert repr(SampleSet.from_data(data)) == f"SampleSet(digits (test): {sizes['test']} of 1x8x8)"
    n = sum(p.numel() for p in model.parameters())
    first, second, *rest = repr(model).splitlines()
    assert (first, second) == ("VAE(", f"  input_shape=(3,), code_shape=(2,), {n:,} parameters") and len(rest) > 5
