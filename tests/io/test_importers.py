"""Weights of other libraries: local files and files on the hub, and invalid sources."""

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hub_server import ask
from safetensors.torch import save, save_file

import aezoo
from aezoo.cli.main import main
from aezoo.io.importers.source import WeightSource

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}


def test_files_of_a_folder_are_read_by_format(tmp_path):
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    np.savez(tmp_path / "x.npz", **{key: value.numpy() for key, value in WEIGHTS.items()})
    (tmp_path / "deep").mkdir()
    torch.save(WEIGHTS, tmp_path / "deep" / "x.pt")
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": 3}))
    source = WeightSource(tmp_path)
    assert source.names == ("cfg.json", "deep/x.pt", "x.npz", "x.safetensors") and source.given is None
    assert source.json("cfg.json") == {"d_in": 3}
    for name in ("x.safetensors", "x.npz", "deep/x.pt"):
        found = source.tensors(name)
        assert found.keys() == WEIGHTS.keys() and all(torch.equal(found[key], WEIGHTS[key]) for key in WEIGHTS)
    one = WeightSource(tmp_path / "x.npz")
    assert one.given == "x.npz" and one.has("x.npz", "cfg.json") and not one.has("x.npz", "y.npz")


def test_some_tensors_are_read_by_their_names(tmp_path):
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    torch.save({"state_dict": WEIGHTS, "epoch": 3}, tmp_path / "x.ckpt")
    torch.save([WEIGHTS], tmp_path / "list.pt")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "y.json").write_text("{}")
    source = WeightSource(tmp_path)
    for name in ("x.safetensors", "x.ckpt"):
        assert sorted(source.keys(name)) == ["a", "b"]
        found = source.some_tensors(name, ("a",))
        assert found.keys() == {"a"} and torch.equal(found["a"], WEIGHTS["a"])
    assert source.keys("list.pt") == ()
    with pytest.raises(aezoo.AezooError, match="contains no named weights"):
        source.some_tensors("list.pt", ("",))
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 100)
    for read in (WeightSource(tmp_path).keys, lambda name: WeightSource(tmp_path).some_tensors(name, ("",))):
        with pytest.raises(aezoo.AezooError, match=r"cannot read .*damaged"):
            read("damaged.safetensors")
    assert "deep/y.json" not in WeightSource(tmp_path / "x.ckpt").names


def test_path_inside_a_hub_repository_is_read_from_one_commit(hub):
    sha = hub.put("user/saes", {"layer/0/cfg.json": b'{"d_in": 1}', "layer/0/x.safetensors": save(WEIGHTS)})
    source = WeightSource("hf://user/saes/layer/0")
    assert source.names == ("cfg.json", "x.safetensors")
    hub.put("user/saes", {"layer/0/cfg.json": b'{"d_in": 2}'})
    assert source.json("cfg.json") == {"d_in": 1}
    assert WeightSource("hf://user/saes/layer/0/cfg.json").json("cfg.json") == {"d_in": 2}
    file = WeightSource(f"hf://user/saes/layer/0/x.safetensors@{sha}")
    assert file.given == "x.safetensors" and file.json("cfg.json") == {"d_in": 1}
    assert torch.equal(file.tensors("x.safetensors")["a"], WEIGHTS["a"])


def test_downloaded_files_are_read_without_a_network(hub, monkeypatch):
    hub.put("user/saes", {"layer/x.safetensors": save(WEIGHTS)})
    WeightSource("hf://user/saes/layer").tensors("x.safetensors")
    ask(monkeypatch, "http://127.0.0.1:9")  # no server
    assert torch.equal(WeightSource("hf://user/saes/layer").tensors("x.safetensors")["a"], WEIGHTS["a"])
    with pytest.raises(aezoo.AezooError, match="cannot reach"):
        WeightSource("hf://user/others")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://user/saes/no", "has no file or folder 'no'"),
        ("hf://user/saes/../x", "is not a path"),
        ("hf://user/none/x", "no repository user/none"),
        ("s3://bucket/x", "not from s3"),
        ("nowhere", "there is no file or folder nowhere"),
    ],
)
def test_address_without_files_is_refused(hub, address, message):
    hub.put("user/saes", {"x.json": b"{}"})
    with pytest.raises(aezoo.AezooError, match=message):
        aezoo.import_model(address)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def npz_of_object():
    file = io.BytesIO()
    np.savez(file, a=np.array([{}], dtype=object))
    return file.getvalue()


def npz_of_zeros():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as member:
        np.save(member, np.zeros(2**24, dtype=np.float32))
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.pt", pickle.dumps(Bomb(), 2), "damaged, or contains objects"),
        ("x.npz", npz_of_object(), "cannot read"),
        ("x.npz", npz_of_zeros(), "would unpack to 64 MiB"),
        ("x.safetensors", b"\xff" * 100, "cannot read"),
        ("x.json", b"[" * 100_000, "cannot read"),
        ("x.json", b"[]", "contains a list"),
        ("x.json", b" " * (2**24 + 1), "more than"),
    ],
)
def test_unsafe_and_damaged_files_are_refused(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    source = WeightSource(tmp_path)
    with pytest.raises(aezoo.AezooError, match=message) as raised:
        source.json(name) if name.endswith("json") else source.tensors(name)
    assert "\n" not in str(raised.value) and not (tmp_path / "executed").exists()


def test_format_that_is_not_known_is_refused(tmp_path, capsys):
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    with pytest.raises(SystemExit):
        main(["import", str(tmp_path), str(tmp_path / "out")])
    assert "has an unknown format" in capsys.readouterr().err
