"""Settings of the DataModule and the sources that accept them."""

import json

import pytest
import torch

from aezoo import AezooError
from aezoo.__main__ import main
from aezoo.data import DataModule, Options, list_data
from aezoo.data.datamodule import stored_settings
from aezoo.data.images import ImageArgs
from aezoo.data.settings import SourceArgs, settings_of_source
from aezoo.data.source import ArrayDataset, Source, accepts
from aezoo.data.source_registry import settings_of

DEFAULTS = {key: one.default for key, one in stored_settings().items()}


@pytest.mark.slow
def test_source_settings_cover_datamodule_settings():
    taken = [settings_of(name, {}) for name in list_data()]
    assert set().union(*taken) == set(SourceArgs.__annotations__)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            {"dictionary_atoms": 3},
            "atoms 3 does not apply to mnist5k, only to synthetic_dictionary: drop it",
        ),
        ({"name": "array", "root": "x.npy", "column": "a"}, "to array, only to hf, stream: use --data.label_column"),
        (
            {"name": "synthetic_dictionary", "size": 8},
            "size 8 does not apply to synthetic_dictionary, only to mnist5k,",
        ),
        (
            {"name": "activations", "of": "digits", "column": "a"},
            "column a does not apply to activations, only to hf, stream",
        ),
    ],
)
def test_setting_of_different_source_is_refused_with_suggestion(given, line):
    with pytest.raises(AezooError) as refusal:
        DataModule(**given)
    assert line in str(refusal.value) and "\n" not in str(refusal.value)


def test_from_arrays_refuses_settings_of_other_sources():
    with pytest.raises(AezooError, match="layer x does not apply to array"):
        DataModule.from_arrays(torch.rand(20, 3), layer="x")


def test_unknown_argument_raises_type_error_with_suggestion():
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'batch_sise', did you mean 'batch_size'\?"):
        DataModule(batch_sise=3)


@pytest.mark.parametrize("name", ["mnist5k", "digits", "shapes", "synthetic_dictionary"])
def test_default_settings_load_with_every_source(name):
    assert dict(DataModule(**DEFAULTS | {"name": name}).hparams) == DEFAULTS | {"name": name}


def test_activations_accept_settings_of_underlying_source():
    with pytest.warns(UserWarning, match="RANDOM weights"):
        data = DataModule("activations", of="shapes", size=8, weights="random")
    assert data.source.of.input_shape == (1, 8, 8)


def test_stored_settings_of_other_sources_are_dropped():
    stored = {"name": "digits", "seed": 3, "size": 4, "column": "a"}
    assert settings_of_source(stored) == {"name": "digits", "seed": 3, "size": 4}
    assert settings_of_source(stored | {"name": "no such set"}) == stored | {"name": "no such set"}


class Plain(Source):
    """A plug-in that does not declare its settings."""

    def __init__(self, options):
        self.input_shape, self.options = (options.layout == "vector", options.max_bytes), options

    def split(self, stage):
        return ArrayDataset(torch.rand(4, 2))


@accepts(ImageArgs)
class Resized(Plain):
    """A plug-in that declares its settings."""


@pytest.mark.parametrize("factory", [Plain, Resized])
def test_plugin_accepts_all_or_its_declared_settings(factory, monkeypatch):
    class Dist:
        name = "some-dist"

    class Point:
        name, value, group, dist = "plugged", "", "aezoo.data", Dist()

        def load(self):
            return factory

    monkeypatch.setattr("aezoo.registry.entry_points", lambda group: [Point()])
    assert DataModule("plugged", size=5).source.options.size == 5
    if factory is Plain:
        assert DataModule("plugged", layout="vector", max_bytes=7).input_shape == (True, 7)
    else:
        with pytest.raises(
            AezooError, match="layout vector does not apply to plugged, only to folder, array, hf, stream"
        ):
            DataModule("plugged", layout="vector")


def test_options_fall_back_to_setting_defaults():
    options = Options("shapes", size=8)
    assert (options.size, options.channels, options.seed) == (8, None, 0)
    with pytest.raises(AttributeError, match="no setting 'sise'"):
        options.sise  # noqa: B018


@pytest.mark.slow
def test_config_with_all_data_settings_works_for_all_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.yaml").write_text(json.dumps(DEFAULTS | {"name": "digits"}))
    run = ["--model", "linear_ae", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    main(["fit", *run, "--data", "data.yaml"])
    stored = torch.load(tmp_path / "runs/linear_ae-digits/0/checkpoints/last.ckpt", weights_only=True)
    assert {key: stored["datamodule_hyper_parameters"][key] for key in DEFAULTS} == DEFAULTS | {"name": "digits"}
    main(["reconstruct", "--ckpt_path", "runs/linear_ae-digits/0", "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        main(["fit", *run, "--data", "data.yaml", "--data.layer", "x"])
    assert end.value.code == 2
    assert "--data.layer x does not apply to digits, only to activations: drop it" in capsys.readouterr().err
