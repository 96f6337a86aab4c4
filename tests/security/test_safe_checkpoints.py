"""Untrusted checkpoints and saved models: no code is run and memory is limited; regular ones load."""

import copy
import json
import math
import os
import pickle
import re
import sys
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hostile import files
from hostile.memory import memory

import aezoo
from aezoo.cli.main import main
from aezoo.data import DataModule
from aezoo.data.idx import read_idx
from aezoo.data.images import read_header
from aezoo.errors import AezooError
from aezoo.io.checkpoint import read_checkpoint
from aezoo.security import values

COMMANDS = ("fit", "validate", "test", "predict")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("where", ["top", "state_dict", "hyper_parameters", "data", "callbacks"])
def test_checkpoint_that_runs_code_is_refused_on_every_path(refused, honest, canary, monkeypatch, how, where):
    path = files.pickled(Path("bomb.ckpt"), files.with_bomb(honest, canary, where), how)
    for forced in (False, True):
        if forced:
            monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        with pytest.raises(AezooError, match=r"is refused: .* could run code"):
            aezoo.load_model(path)
        assert not canary.exists()
        for command in COMMANDS:
            assert "could run code" in refused(command, "--ckpt_path", str(path), "--weights_only", "false")
    if how != "pickle":
        torch.load(path, weights_only=False)
        assert canary.exists(), "the file does not run code"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_always_loads_without_pickle(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    seen, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: seen.append(k.get("weights_only")) or load(*a, **k))
    for command in COMMANDS:
        main([command, "--ckpt_path", str(run), "--weights_only", "false", "--trainer.fast_dev_run", "true"])
    assert len(seen) >= 2 * len(COMMANDS) and all(flag is True for flag in seen)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_regular_run_loads_on_every_path(run, capsys):
    assert type(aezoo.load_model(run)).__name__ == "VAE"
    aezoo.load_model(aezoo.save_model(aezoo.load_model(run), "saved"))
    for command in COMMANDS:
        main([command, "--ckpt_path", str(run), "--trainer.fast_dev_run", "true"])


NESTED = {"class_path": "evil.Evil"}
SHELL = {"class_path": "subprocess.Popen", "init_args": {"args": "mkdir canary", "shell": True}}


@pytest.mark.parametrize(
    "extra",
    [
        {"_class_path": "evil.Evil"},
        {"_class_path": "evil.Evil", "_instantiator": "lightning.pytorch.cli.instantiate_module"},
        {"_instantiator": "os.system"},
        {"_instantiator": ["evil.Evil"]},
        {"likelihood": NESTED},
        {"likelihood": SHELL},
        {"beta": NESTED},
        {"hidden_dims": [SHELL]},
        {"unknown": NESTED},
        {"unknown": 3},
        {"likelihood": {"a": {"b": [NESTED]}}},
    ],
    ids=str,
)
def test_a_checkpoint_cannot_choose_code(refused, honest, canary, extra):
    honest["hyper_parameters"].update(extra)
    torch.save(honest, "strings.ckpt")
    with pytest.raises(AezooError):
        aezoo.load_model("strings.ckpt")
    for command in ("fit", "test"):
        refused(command, "--ckpt_path", "strings.ckpt")
    assert "evil" not in sys.modules


def test_checkpoint_data_settings_cannot_choose_code(refused, honest):
    for extra in ({"name": NESTED}, {"name": {"x": SHELL}}, {"seed": [NESTED]}, [NESTED], 3):
        honest["datamodule_hyper_parameters"] = extra
        torch.save(honest, "strings.ckpt")
        refused("test", "--ckpt_path", "strings.ckpt")


@pytest.mark.parametrize("text", ["evil.Evil", "os.system", "../vae", "", "__import__('os')"])
def test_saved_model_may_name_only_registered_models(run, canary, text):
    folder = aezoo.save_model(aezoo.load_model(run), "saved")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model": text}))
    with pytest.raises(AezooError, match="unknown model"):
        aezoo.load_model(folder)
    config["hyperparameters"]["likelihood"] = NESTED
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(AezooError, match="names a class to import"):
        aezoo.load_model(folder)
    assert not canary.exists()


def test_pickled_or_malformed_weights_are_refused(run, canary):
    folder = aezoo.save_model(aezoo.load_model(run), "saved")
    weights = folder / "model.safetensors"
    for content in (
        pickle.dumps(files.Bomb(canary)),
        files.pickled(Path("bomb.pt"), files.Bomb(canary), "zip").read_bytes(),
        (2**62).to_bytes(8, "little") + weights.read_bytes(),
        (2**40).to_bytes(8, "little") + b"{}",
    ):
        weights.write_bytes(content)
        before = memory()
        with pytest.raises(AezooError, match=r"cannot read .*model\.safetensors"):
            aezoo.load_model(folder)
        assert memory() - before < 2**25
    assert not canary.exists()


@pytest.mark.slow
def test_zip_bomb_is_refused_unless_limit_is_raised(run, refused, monkeypatch):
    bomb = files.inflated(Path("bomb.ckpt"), run / "checkpoints" / "last.ckpt")
    assert bomb.stat().st_size < 2**20
    before = memory()
    with pytest.raises(AezooError, match=r"would unpack to 6[45] MiB, more than the limit of 1[67]"):
        aezoo.load_model(bomb)
    assert "AEZOO_MAX_BYTES" in refused("test", "--ckpt_path", str(bomb))
    assert memory() - before < 2**25
    aezoo.load_model(bomb, max_bytes=2**27)
    monkeypatch.setenv("AEZOO_MAX_BYTES", str(2**27))
    aezoo.load_model(bomb)
    monkeypatch.setenv("AEZOO_MAX_BYTES", "much")
    assert "give a number of bytes" in refused("test", "--ckpt_path", str(bomb))


@pytest.mark.slow
def test_hyperparameters_beyond_weight_memory_are_refused(run, honest, refused):
    folder = aezoo.save_model(aezoo.load_model(run), "saved")
    config = json.loads((folder / "config.json").read_text())
    before = memory()
    for key, value in (("latent_dim", 10**8), ("hidden_dims", [10**5, 10**5]), ("hidden_dims", [1] * 9000)):
        changed = {**config["hyperparameters"], key: value}
        (folder / "config.json").write_text(json.dumps({**config, "hyperparameters": changed}))
        torch.save({**honest, "hyper_parameters": {**honest["hyper_parameters"], key: value}}, "large.ckpt")
        for path in (folder, "large.ckpt"):
            with pytest.raises(AezooError, match=r"far more than the|do not fit"):
                aezoo.load_model(path)
        refused("predict", "--ckpt_path", "large.ckpt")
    assert memory() - before < 2**28


def test_expanded_weights_are_refused(honest):
    key, value = next(iter(honest["state_dict"].items()))
    honest["state_dict"][key] = torch.zeros(1).expand(value.shape)
    torch.save(honest, "thin.ckpt")
    with pytest.raises(AezooError, match=r"claims to have .* values and has fewer"):
        aezoo.load_model("thin.ckpt")


def test_repeated_values_are_counted_as_printed(honest):
    laugh = ["ha"]
    for _ in range(40):
        laugh = [laugh, laugh]
    honest["hyper_parameters"]["hidden_dims"] = laugh
    torch.save(honest, "laugh.ckpt")
    with pytest.raises(AezooError, match="contains more than 5,000,000 values"):
        aezoo.load_model("laugh.ckpt")


@pytest.mark.parametrize("value", [2**64, -(2**63), "x" * 10_001, {3: 4}, torch.zeros(2), {1, 2}, 1j, b"x"], ids=str)
def test_non_plain_values_are_refused(value):
    with pytest.raises(AezooError, match="it: 'key'"):
        values.check_plain({"key": value}, "it")


def test_plain_values_are_returned_unchanged():
    plain = {"a": 1, "b": 1.5, "c": None, "d": True, "e": "x", "f": [1, (2, {"g": 3})], "h": math.inf}
    assert values.check_plain(plain, "it") == plain


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "s3", "gs", "file"])
def test_urls_are_refused_with_advice_to_download(refused, scheme):
    address = f"{scheme}://127.0.0.1:9/x"
    with pytest.raises(AezooError, match="download it first"):
        aezoo.load_model(address)
    for argv in (["-c", address], ["--ckpt_path", address]):
        assert "download it first" in refused("fit", *argv)
    refused("fit", "--model", "vae", "--data", address)
    refused("fit", f"--model={address}")


@pytest.mark.slow
def test_no_request_reaches_a_live_server(refused, canary, tmp_path):
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/x.yaml"
    try:
        for argv in (["-c", address], ["--config", address], ["--ckpt_path", address], ["--data", address]):
            refused("fit", "--model", "vae", *argv)
        Path("remote.yaml").write_text(f"model: vae\ndata: {address}\n")
        refused("fit", "-c", "remote.yaml")
        Path("remote.yaml").write_text(f"model: vae\nckpt_path: {address}\n")
        refused("fit", "-c", "remote.yaml")
    finally:
        server.shutdown()
        server.server_close()
    assert asked == []


# ---- valid but hostile content ---------------------------------------------------------------------------------------


def shared_lists(levels=30):
    """10^levels values in a few hundred bytes."""
    found = [0]
    for _ in range(levels):
        found = [found] * 10
    return found


def with_field(content, path, value):
    """The content with a value at a path of keys; `*` is the first key there."""
    content = copy.deepcopy(content)
    place = content
    for key in path[:-1]:
        place = place[next(iter(place)) if key == "*" else key]
    place[next(iter(place)) if path[-1] == "*" else path[-1]] = value
    return content


SHARED = [
    ("pytorch-lightning_version",),
    ("epoch",),
    ("loops",),
    ("callbacks", "*", "best_model_path"),
    ("callbacks", "*", "last_model_path"),
    ("hyper_parameters", "beta"),
    ("datamodule_hyper_parameters", "name"),
    ("DataModule", "columns"),
    ("DataModule", "scaling"),
    ("optimizer_states",),
    ("aezoo", "version"),
]


@pytest.mark.parametrize("path", SHARED, ids=".".join)
def test_lists_that_expand_without_end_are_refused(refused, honest, path):
    torch.save(with_field(honest, path, shared_lists()), "x.ckpt")
    for command in ("fit", "test"):
        assert "x.ckpt" in refused(command, "--ckpt_path", "x.ckpt")
    with pytest.raises(AezooError, match="contains more than"):
        aezoo.load_model("x.ckpt")


@pytest.mark.parametrize("how", ["zip", "other case", "other local name", "legacy", "legacy storages"])
def test_shared_tuple_keys_are_refused_before_hashing(honest, how):
    # () and 60 times (x, x), then a dict with the result as a key; torch takes 2^60 steps to hash it
    bomb = b"\x80\x02)q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60)) + b"}h%cK\x01s." % 60
    torch.save({"x": 1}, "x.pt", _use_new_zipfile_serialization="legacy" not in how)
    if "legacy" not in how:
        with zipfile.ZipFile("x.pt") as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile("x.ckpt", "w") as archive:
            for name, content in parts.items():
                if name.endswith("data.pkl"):
                    name, content = name.replace("data.pkl", "DATA.PKL") if how == "other case" else name, bomb
                archive.writestr(name, content)
        if how == "other local name":  # the first of the two
            Path("x.ckpt").write_bytes(Path("x.ckpt").read_bytes().replace(b"data.pkl", b"date.pkl", 1))
    elif how == "legacy storages":
        content = Path("x.pt").read_bytes()
        storages = pickle.dumps([], protocol=2)
        assert content.endswith(storages)
        Path("x.ckpt").write_bytes(content.removesuffix(storages) + bomb)
    else:
        whole = pickle.dumps({"x": 1}, protocol=2)
        content = Path("x.pt").read_bytes()
        assert whole in content
        Path("x.ckpt").write_bytes(content.replace(whole, bomb))
    Path("x.pt").write_bytes(Path("x.ckpt").read_bytes())
    for read in (aezoo.load_model, DataModule):
        with pytest.raises(AezooError, match=r"contains more than|damaged zip file|checksum"):
            read("x.ckpt" if read is aezoo.load_model else "x.pt")


def test_deep_and_recursive_content_is_refused(honest):
    deep, loop = [], []
    for _ in range(200):
        deep = [deep]
    loop.append(loop)
    for value, words in ((deep, "nested deeper"), (loop, "contains itself")):
        torch.save({**honest, "loops": {"fit_loop": value}}, "x.ckpt")
        with pytest.raises(AezooError, match=words):
            aezoo.load_model("x.ckpt")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (shared_lists(), r"x\.pt contains more than"),
        # 4 GB as an array of strings of one width
        (shared_lists(6), r"x\.pt contains lists of lists"),
        (["x" * 10**6] * 10**4, "are not names of classes"),
    ],
    ids=["endless", "lists", "texts"],
)
def test_labels_of_tensor_files_are_held_to_the_extent(labels, words):
    torch.save({"x": torch.rand(8, 3), "y": labels}, "x.pt")
    assert Path("x.pt").stat().st_size < 2 * 10**6
    before = memory()
    with pytest.raises(AezooError, match=words):
        DataModule("x.pt")
    assert memory() - before < 2**25


WRONG = [
    (("epoch",), "text"),
    (("global_step",), [1]),
    (("pytorch-lightning_version",), 3),
    (("loops",), [1]),
    (("loops", "fit_loop"), 5),
    (("loops", "fit_loop", "epoch_progress"), []),
    (("loops", "fit_loop", "epoch_progress", "current", "ready"), "text"),
    (("callbacks",), 5),
    (("callbacks", "*"), 5),
    (("optimizer_states",), {}),
    (("optimizer_states",), [5]),
    (("optimizer_states",), [{"state": 5, "param_groups": []}]),
    (("optimizer_states",), [{"state": {}, "param_groups": [{"params": [0, 1, 99]}]}]),
    # a fused kernel would read as many values as its parameter has
    (("optimizer_states", 0, "state", 0, "exp_avg"), torch.zeros(0)),
    (("optimizer_states", 0, "state", 0, "exp_avg"), torch.zeros(1)),
    # of no parameter
    (("optimizer_states", 0, "state", 77), torch.zeros(3)),
    (("optimizer_states", 0, "state", 77), {"exp_avg": torch.zeros(3)}),
    (("optimizer_states", 0, "state", 0, "exp_avg"), torch.zeros(3, dtype=torch.int64)),
    (("optimizer_states", 0, "param_groups", 0, "eps"), [1e-8]),
    (("optimizer_states", 0, "param_groups", 0, "betas"), (0.9,)),
    (("lr_schedulers",), 5),
    (("lr_schedulers", 0, "last_epoch"), [0]),
    (("DataModule",), 5),
    (("DataModule", "scaling"), 5),
    (("DataModule", "scaling"), {"offset": "text", "factor": torch.ones(3)}),
    (("DataModule", "columns"), 5),
    (("DataModule", "epoch"), "text"),
    (("DataModule", "batches"), [1]),
    (("DataModule", "identity"), 5),
]


def test_content_of_an_honest_checkpoint_is_accepted(honest):
    torch.save(honest, "x.ckpt")
    assert read_checkpoint(Path("x.ckpt")).keys() == honest.keys()


def name_of_field(value):
    return ".".join(map(str, value)) if isinstance(value, tuple) else repr(value)[:20]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("path", "value"), WRONG, ids=name_of_field)
def test_wrong_types_in_training_state_are_refused_in_one_line(run, refused, path, value):
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(with_field(content, path, value), "x.ckpt")
    settings = ["--trainer.max_epochs", "3", "--trainer.default_root_dir", "other"]
    line = refused("fit", "--ckpt_path", "x.ckpt", *settings)
    assert "x.ckpt" in line and (str(path[-1]) in line or "cannot be restored" in line)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["model.safetensors", "x.png", "images-idx3-ubyte"])
def test_pipes_in_place_of_files_are_refused_immediately(run, name):
    folder = aezoo.save_model(aezoo.load_model(run), "saved")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    readers = {".safetensors": lambda path: aezoo.load_model(path.parent), ".png": lambda path: read_header(path, 9)}
    with pytest.raises(AezooError, match=re.escape(name)):
        readers.get(Path(name).suffix, read_idx)(folder / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pipes_and_devices_are_refused_immediately(run, refused):
    os.mkfifo("pipe.ckpt")
    os.mkfifo("pipe.npy")
    os.mkfifo("pipe.aez")
    trained = ["--ckpt_path", str(run)]
    for argv in (
        ["fit", "--ckpt_path", "pipe.ckpt"],
        ["fit", "--model", "vae", "--resume", "pipe.ckpt"],
        ["test", "--ckpt_path", "pipe.ckpt"],
        ["reconstruct", "--ckpt_path", "/dev/zero"],
        ["fit", "-c", "pipe.ckpt"],
        ["fit", "--model", "vae", "--data", "pipe.npy"],
        ["fit", "--model", "vae", "--data", "array", "--data.root", "/dev/zero"],
        ["reconstruct", *trained, "--input", "pipe.npy"],
        ["reconstruct", *trained, "--input", "/dev/zero"],
        ["decompress", *trained, "--input", "pipe.aez"],
    ):
        refused(*argv)
