"""The weights in the package: complete, unchanged, small, and usable without data."""

import subprocess
import sys

import pytest
import torch

import aezoo
from aezoo import registry
from aezoo.io import tag_files
from aezoo.training import tags


def test_weights_of_the_package_are_complete_and_small():
    own = tags.read(tags._OWN, "aezoo")
    folders = {path.name for path in tags._OWN.parent.iterdir() if path.is_dir()}
    assert own and folders == set(own)
    assert sum(path.stat().st_size for path in tags._OWN.parent.rglob("*") if path.is_file()) <= 12_000_000
    for name, tag in own.items():
        assert registry.find_tag(name) == tag and tag.figures and tag.command.startswith("aezoo fit --model=")
        tag_files.locate(tag)


@pytest.mark.parametrize("name", tags.read(tags._OWN, "aezoo"))
def test_weights_of_the_package_load(name):
    model, tag = aezoo.load_model(name), registry.find_tag(name)
    assert model.input_shape == tag.input_shape
    assert all(value.dtype == torch.float32 for value in model.parameters())
    # the validation split has 674 digits of class 1
    assert len(model.data_statistics.scores["deviance"]) == (674 if tag.data.get("train_classes") == ["1"] else 1000)


def test_listing_tags_needs_no_torch():
    code = (
        "import sys; from aezoo.cli.main import main; main(['list', '--pretrained']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "vae.mnist " in done.stdout
