"""Untrusted diffusers folders: no pickle is read, only ten classes are built, none larger than its weights."""

import json
import socket
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from hostile import files

import aezoo
from aezoo.errors import AezooError

WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = {"block_out_channels": [8, 8], "norm_num_groups": 4, "in_channels": 1, "out_channels": 1}
TWO = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}


@pytest.fixture
def folder(canary):
    """A folder saved by diffusers."""
    diffusers.AutoencoderKL(**SMALL, **TWO).save_pretrained("theirs")
    return Path("theirs")


def load(folder):
    return aezoo.create_model("diffusers_ae", (1, 8, 8), pretrained=str(folder))


def changed(folder, **more):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **more}))


@pytest.mark.slow
def test_regular_folder_loads_without_network(folder, canary, monkeypatch):
    asked = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **_: asked.append(arguments))
    assert load(folder).code_shape == (4, 4, 4) and not canary.exists()
    with pytest.raises(AezooError, match="aezoo import hf://NAME"):
        aezoo.create_model("diffusers_ae", (1, 8, 8), pretrained="stabilityai/sd-vae-ft-mse")
    assert not asked


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", WEIGHTS])
def test_pickled_weights_run_no_code(folder, canary, refused, name):
    (folder / WEIGHTS).unlink()
    torch.save({"decoder.conv_in.bias": files.Bomb(canary)}, folder / name)
    with pytest.raises(AezooError, match=r"a pickle can run code|cannot read"):
        load(folder)
    refused("fit", "--model", "diffusers_ae", "--model.pretrained", str(folder), "--data.name", "digits")
    torch.load((folder / name).rename("bomb.pt"), weights_only=False)
    assert canary.exists(), "the file does not run code"


def test_an_index_cannot_point_to_a_pickle(folder, canary):
    torch.save({"decoder.conv_in.bias": files.Bomb(canary)}, folder / "part.bin")
    index = {"metadata": {}, "weight_map": {"decoder.conv_in.bias": "part.bin"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(AezooError, match="in several files"):
        load(folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    "more",
    [
        {"_class_name": "evil.Evil"},
        {"_class_name": "UNet2DModel"},
        {"_class_name": ["AutoencoderKL"]},
        {"quantization_config": {"quant_method": "evil"}},
        {"auto_map": {"AutoModel": "evil.Evil"}},
        {"act_fn": "evil.Evil"},
        {"down_block_types": ["evil.Evil"] * 2},
    ],
    ids=str,
)
def test_a_config_cannot_choose_code(folder, canary, more):
    changed(folder, **more)
    with pytest.raises(AezooError) as refusal:
        load(folder)
    assert "\n" not in str(refusal.value) and "evil" not in sys.modules and not canary.exists()


def test_config_code_references_are_ignored(folder, canary):
    changed(folder, _module="evil", evil={"class_path": "evil.Evil"})
    assert load(folder).code_shape == (4, 4, 4)
    assert "evil" not in sys.modules and not canary.exists()


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"block_out_channels": [4096, 8192]}, {"layers_per_block": 10**9}], ids=str)
def test_config_cannot_ask_for_more_memory_than_its_weights(folder, more):
    changed(folder, **more)
    with pytest.raises(AezooError, match="ask for far more than the"):
        load(folder)
