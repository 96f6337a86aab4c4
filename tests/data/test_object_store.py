"""Chunks in an object store: moto's S3-compatible server on localhost, accessed with boto3."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path

import boto3
import numpy as np
import pytest
import torch
from litdata_chunks import write_chunks
from PIL import Image

from aezoo.__main__ import main
from aezoo.data import DataModule, object_store
from aezoo.data.identity import data_identity
from aezoo.data.loaders import SHUFFLE_GROUP
from aezoo.data.object_store import FileCache, Object
from aezoo.errors import AezooError

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
]
SECRETS = ("AKIALOOPBACK", "loopback-secret")
ALL = {"val_fraction": 0, "test_fraction": 0}


@pytest.fixture(scope="module")
def moto():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Credentials and settings of AWS, without those of the machine."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRETS[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS[1])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(object_store, "_PAUSE", 0.01)


@pytest.fixture
def bucket(moto, environment, monkeypatch, request):
    """A client, and the name of an empty bucket."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{moto}")
    client = boto3.Session().client("s3")
    name = re.sub(r"\W|_", "-", request.node.name.lower())[:50] + "-x"
    client.create_bucket(Bucket=name)
    return client, name


def dicts(n, side=8, seed=0):
    draws = np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    return [{"image": Image.fromarray(array), "label": i % 2} for i, array in enumerate(draws)]


def upload(root, bucket, prefix="set"):
    client, name = bucket
    for file in root.rglob("*"):
        if file.is_file():
            client.upload_file(str(file), name, f"{prefix}/{file.relative_to(root)}")
    return f"s3://{name}/{prefix}"


def remote(address, **plain):
    return DataModule("stream", root=address, allow_remote=True, **{"num_workers": 0, "memory": "off"} | plain)


def epochs(data, numbers=(0, 1)):
    loader, found = data.train_dataloader(), []
    for number in numbers:
        loader.sampler.set_epoch(number)
        found.append([(x.numpy().tobytes(), y.tolist()) for x, y in loader])
    return found


def refused(match, run):
    with pytest.raises(AezooError, match=match) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message and not any(secret in message for secret in SECRETS)
    # chained errors, whose texts may contain secrets, are not shown
    assert caught.value.__cause__ is None and (caught.value.__suppress_context__ or caught.value.__context__ is None)
    return message


def chunk_bytes(root):
    """The bytes of all chunks, counted while no process deletes or adds one; a renamed one counts once."""
    sizes = {}
    with (root / ".lock").open("ab") as lock:
        object_store._lock(lock)
        for file in root.rglob("*.bin"):
            with contextlib.suppress(FileNotFoundError):
                sizes[file.stat().st_ino] = file.stat().st_size
    return sum(sizes.values())


# ---- permission ------------------------------------------------------------------------------------------------------


def test_address_is_not_opened_without_permission(monkeypatch):
    monkeypatch.setattr(boto3, "Session", lambda *_, **__: pytest.fail("it was opened"))
    for run in (
        lambda: DataModule("stream", root="s3://bucket/set"),
        lambda: DataModule("s3://bucket/set"),
        lambda: data_identity("stream", "s3://bucket/set"),
    ):
        with pytest.raises(AezooError, match=r"s3://bucket/set is an address.*: add --allow_remote \(in Python"):
            run()
    with pytest.raises(AezooError, match="only s3:// addresses are opened"):
        DataModule("stream", root="http://bucket/set", allow_remote=True)


def test_credentials_in_an_address_are_refused_and_not_shown():
    for address in ("s3://AKIALOOPBACK:loopback-secret@bucket/set", "https://a:loopback-secret@host/x"):
        for allow_remote in (False, True):
            with pytest.raises(AezooError, match=r"://\*\*\*@") as caught:
                DataModule("stream", root=address, allow_remote=allow_remote)
            assert not any(secret in str(caught.value) for secret in SECRETS)


@pytest.mark.parametrize("words", [["--allow_remote"], ["--allow_remote=true"], ["--allow_remote", "true"]])
def test_flag_gives_the_permission_for_one_command(words, monkeypatch):
    from aezoo.security import policy

    monkeypatch.setattr(policy, "_remote", False)
    assert policy.allow_remote(["--seed", "1", *words, "--name", "x"]) == ["--seed", "1", "--name", "x"]
    assert policy.allows_remote()
    assert policy.allow_remote(["--allow_remote", "false"]) == [] and not policy.allows_remote()
    with pytest.raises(AezooError, match="--allow_remote takes no value, got 's3'"):
        policy.allow_remote(["--allow_remote=s3"])


@pytest.mark.parametrize("data", [{"allow_remote": True}, {"root": "s3://bucket/set", "allow_remote": True}])
def test_files_cannot_give_the_permission(tmp_path, monkeypatch, capsys, data):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(boto3, "Session", lambda *_, **__: pytest.fail("it was opened"))
    Path("a.yaml").write_text(json.dumps({"model": "vae", "data": {"name": "stream", **data}}))
    with pytest.raises(SystemExit) as end:
        main(["fit", "-c", "a.yaml"])
    assert end.value.code == 2 and "allow_remote" in capsys.readouterr().err


def test_permission_is_no_hyperparameter():
    data = DataModule("digits", allow_remote=True)
    assert "allow_remote" not in data.hparams and "allow_remote" not in dict(data.hparams_initial)


# ---- comparison with a folder ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_batches_equal_those_of_the_local_folder(tmp_path, bucket):
    root = write_chunks(tmp_path / "set" / "train", dicts(90), chunk_size=3).parent
    write_chunks(root / "validation", dicts(5, seed=1))
    (root / "classes.json").write_text('["cat", "dog"]')
    address = upload(root, bucket)
    settings = {"batch_size": 8, "seed": 3}
    local = DataModule("stream", root=str(root), memory="off", num_workers=0, **settings)
    held = epochs(local)
    assert held[0] != held[1]
    for plain in ({}, {"num_workers": 2}, {"memory": "on"}):
        data = remote(address, **settings | plain)
        assert (data.num_classes, data.source.class_names) == (2, ("cat", "dog"))
        assert epochs(data) == held
    assert epochs(remote(address, **settings | {"seed": 4})) != held
    assert [torch.equal(a, b) for a, b in zip(local.tensors("val"), data.tensors("val"), strict=True)] == [True] * 2
    assert data.identity == local.identity == data_identity(str(root))
    named = DataModule(f"{address}/", allow_remote=True, memory="off", num_workers=0, **settings)
    assert epochs(named) == held


@pytest.mark.slow
def test_cache_stays_within_its_size_and_batches_stay_equal(tmp_path, bucket):
    root = write_chunks(tmp_path / "set", dicts(3 * SHUFFLE_GROUP), chunk_size=1)
    address, size = upload(root, bucket), max(file.stat().st_size for file in root.glob("*.bin"))
    held = epochs(DataModule("stream", root=str(root), memory="off", num_workers=0, batch_size=8, **ALL), range(3))
    most, seen = 2 * SHUFFLE_GROUP * size, []
    data = remote(address, batch_size=8, cache_dir=str(tmp_path / "small"), cache_bytes=most, **ALL)
    download = data.source.chunks["train"].cache._download

    def watched(path):
        download(path)
        seen.append(chunk_bytes(tmp_path / "small"))

    data.source.chunks["train"].cache._download = watched
    assert epochs(data, range(3)) == held
    # an epoch's chunks do not fit, so some are downloaded twice
    assert max(seen) <= most and len(seen) > 3 * SHUFFLE_GROUP
    refused(rf"cache_bytes {size} is too small .* 32 chunks .* at least \d+", lambda: remote(address, cache_bytes=size))


_READ_ALL = """
import os, sys
import torch
from aezoo.data import DataModule
data = DataModule("stream", root=sys.argv[1], allow_remote=True, memory="off", num_workers=0, batch_size=5,
                  cache_bytes=int(sys.argv[2]), seed=int(sys.argv[3]), val_fraction=0, test_fraction=0)
loader = data.train_dataloader()
total = torch.zeros(3, 8, 8, dtype=torch.float64)
for epoch in range(2):
    loader.sampler.set_epoch(epoch)
    for x, *_ in loader:
        total += x.double().sum(0)
print(total.sum().item())
"""


@pytest.mark.slow
def test_processes_share_a_cache_that_is_full(tmp_path, bucket):
    items = dicts(2 * SHUFFLE_GROUP + 8)
    root = write_chunks(tmp_path / "set", items, chunk_size=1)
    address, size = upload(root, bucket), max(file.stat().st_size for file in root.glob("*.bin"))
    most = 2 * SHUFFLE_GROUP * size
    command = [sys.executable, "-c", _READ_ALL, address, str(most)]
    # different orders, so that each deletes chunks that others need
    started = [
        subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in range(2)
    ]
    sizes, wanted = [], 2 * sum(np.asarray(item["image"], np.float64).sum() for item in items)
    while any(process.poll() is None for process in started):
        if (cache := tmp_path / "cache" / "aezoo" / "chunks").exists():
            sizes.append(chunk_bytes(cache))
        time.sleep(0.02)
    for process in started:
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert float(out.splitlines()[-1]) == pytest.approx(wanted, rel=1e-12)
    assert most - 2 * size < max(sizes) <= most
    assert not [*(tmp_path / "cache").rglob(".part-*")]


@pytest.mark.slow
def test_killed_fit_resumes_bit_for_bit(tmp_path, bucket, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    root = write_chunks(tmp_path / "set", dicts(60), chunk_size=3)
    address = upload(root, bucket)

    def command(name):
        flags = ["--model", "dense_ae", "--data", "stream", "--data.root", address, "--allow_remote", "--name", name]
        flags += ["--data.batch_size", "4", "--data.memory", "off", "--data.num_workers", "1", "--logger", "none"]
        flags += ["--trainer.max_epochs", "8", "--trainer.accelerator", "cpu", "--compile", "off"]
        flags += ["--checkpoints.every_n_steps", "5", "--trainer.limit_test_batches", "0", "--resume", "auto"]
        return ["fit", *flags]

    def weights(name):
        found = torch.load(tmp_path / "runs" / name / "0" / "checkpoints" / "last.ckpt", weights_only=True)
        assert found["global_step"] == 96 and "allow_remote" not in str(found["datamodule_hyper_parameters"])
        return found["state_dict"]

    main(command("whole"))
    last = tmp_path / "runs" / "killed" / "0" / "checkpoints" / "last.ckpt"
    killed = [sys.executable, "-m", "aezoo", *command("killed")]
    with subprocess.Popen(killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 120
        while not last.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    step = torch.load(last, weights_only=True)["global_step"]
    assert process.returncode == -signal.SIGKILL and step < 96 and step % 12
    # as left by a kill within a download
    (tmp_path / "cache" / "aezoo" / "chunks" / ".part-old.bin").write_bytes(b"half")
    for file in (tmp_path / "cache").rglob("*.bin"):
        if not file.name.startswith("."):
            file.replace(file.with_name(f".part-{file.name}"))
    main(command("killed"))
    assert "allow_remote" not in (tmp_path / "runs" / "killed" / "0" / "config.yaml").read_text().split("\n", 2)[2]
    whole, resumed = weights("whole"), weights("killed")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    # the address is stored with the run, the permission is not
    with pytest.raises(SystemExit):
        main(["reconstruct", "--ckpt_path", "runs/killed/0", "--device", "cpu"])
    assert "add --allow_remote" in capsys.readouterr().err


# ---- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_errors_of_the_store_are_one_line_without_secrets(tmp_path, bucket, monkeypatch):
    client, name = bucket
    root = write_chunks(tmp_path / "set", dicts(9))
    address = upload(root, bucket)
    refused(
        "s3://no-such-bucket/set cannot be read: there is no such bucket", lambda: remote("s3://no-such-bucket/set")
    )
    refused(f"no index.json in s3://{name}/other, nor in s3://{name}/other/train", lambda: remote(f"s3://{name}/other"))
    refused("s3://x is not the address of a folder", lambda: remote("s3://x"))
    client.delete_object(Bucket=name, Key="set/chunk-0-1.bin")
    refused(f"{address}/chunk-0-1.bin is missing", lambda: remote(address))
    client.put_object(Bucket=name, Key="set/chunk-0-1.bin", Body=b"short")
    refused(rf"{address}/chunk-0-1.bin has 5 of \d+ bytes", lambda: remote(address))
    rule = {"Effect": "Deny", "Principal": "*", "Action": "s3:GetObject", "Resource": f"arn:aws:s3:::{name}/*"}
    client.put_bucket_policy(Bucket=name, Policy=json.dumps({"Version": "2012-10-17", "Statement": [rule]}))
    client.delete_object(Bucket=name, Key="set/chunk-0-2.bin")  # so that the set is not known
    refused(
        f"{address}/index.json cannot be read: access is denied: the credentials need s3:ListBucket and s3:GetObject",
        lambda: remote(address),
    )
    for variable, value, match in (
        ("AWS_PROFILE", "loopback-secret", "AWS_PROFILE names a profile that is in no AWS configuration file"),
        ("AWS_ENDPOINT_URL", "loopback-secret", "AWS_ENDPOINT_URL is not an address"),
        ("AWS_ENDPOINT_URL", "http://AKIALOOPBACK:loopback-secret@127.0.0.1:9", "the server cannot be reached"),
        ("AWS_ACCESS_KEY_ID", None, "one of the two credentials is missing|there are no credentials"),
    ):
        with monkeypatch.context() as changed:
            changed.setenv("AWS_MAX_ATTEMPTS", "1")
            changed.delenv(variable) if value is None else changed.setenv(variable, value)
            refused(match, lambda: remote(address))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    refused("there are no credentials: set AWS_ACCESS_KEY_ID", lambda: remote(address))


@pytest.mark.slow
def test_rewritten_chunk_is_refused(tmp_path, bucket):
    address = upload(write_chunks(tmp_path / "set", dicts(9)), bucket)
    data = remote(address, **ALL)
    client, name = bucket
    size = (tmp_path / "set" / "chunk-0-2.bin").stat().st_size
    client.put_object(Bucket=name, Key="set/chunk-0-2.bin", Body=bytes(size))
    refused(f"{address}/chunk-0-2.bin cannot be read: it has been overwritten", lambda: data.tensors("train"))
    before, after = data.identity, remote(address, **ALL).identity
    assert before != DataModule("stream", root=str(tmp_path / "set"), **ALL).identity == after or before == after


@pytest.mark.slow
def test_hostile_chunks_are_refused(tmp_path, bucket):
    client, name = bucket
    root = write_chunks(tmp_path / "set", [{"x": np.zeros(3, np.float32), "o": {1, 2}} for _ in range(4)])
    address = upload(root, bucket)
    refused("lists items of pickle, which may be pickled and run code", lambda: remote(address))
    told = json.loads((root / "index.json").read_text())
    chunk = told["chunks"][0]
    told["config"]["data_format"] = ["no_header_numpy:1"]
    told["config"]["data_spec"] = None
    for path in ("../escape.bin", "..", "a.json", ".lock", "x" * 300):
        client.put_object(Bucket=name, Key=f"set/{path}", Body=bytes(chunk["chunk_bytes"]))
        index = told | {"chunks": [chunk | {"filename": path}]}
        client.put_object(Bucket=name, Key="set/index.json", Body=json.dumps(index).encode())
        refused("not in its folder|is missing|has a chunk called", lambda: remote(address))
    client.put_object(Bucket=name, Key="set/index.json", Body=b"{")
    refused(f"{address}/index.json is not an index of litdata", lambda: remote(address))
    assert {file.suffix for file in (tmp_path / "cache").rglob("*") if file.is_file()} == {".json"}


@pytest.mark.slow
def test_packed_item_beyond_the_limit_is_refused_unread(tmp_path, bucket):
    from litdata.streaming.cache import Cache

    (tmp_path / "set").mkdir()
    cache = Cache(str(tmp_path / "set"), chunk_size=4, compression="zstd", compression_level="sample")
    for i in range(4):
        cache[i] = np.zeros(2**20, np.float32)
    cache.done()
    cache.merge()
    address = upload(tmp_path / "set", bucket)
    refused(
        rf"{address}, item 0 .* more than the limit of .* --data\.max_bytes", lambda: remote(address, max_bytes=10**6)
    )


def test_unwritable_cache_is_reported(tmp_path):
    (tmp_path / "file").write_text("")

    class Objects:
        address, objects = "s3://b/x", {}

        def digest(self):
            return "d"

    refused(
        "cannot write chunks into .*file.*: free disk space", lambda: FileCache(Objects(), str(tmp_path / "file"), 9)
    )


# ---- cache -----------------------------------------------------------------------------------------------------------


class FakeObjects:
    """Objects of 10 bytes with numbers as names."""

    address = "s3://fake/set"
    client = None

    def __init__(self, n):
        self.objects, self.read = {f"{i}.bin": Object(10, "t") for i in range(n)}, []

    def digest(self):
        return "d"

    def blocks(self, path, most=None):
        self.read.append(path)
        yield f"{path:10}".encode()


def hold(cache, path):
    with cache.held(path):
        return (cache.folder / path).read_bytes()


def test_file_unused_for_longest_is_deleted_first(tmp_path):
    objects = FakeObjects(4)
    cache = FileCache(objects, str(tmp_path), 30)
    for i, path in enumerate(("0.bin", "1.bin", "2.bin", "0.bin")):
        assert hold(cache, path) == f"{path:10}".encode()
        os.utime(cache.folder / path, (i, i))
    with cache.held("1.bin"):
        os.utime(cache.folder / "1.bin", (0, 0))
        hold(cache, "3.bin")  # 1.bin is older but in use
    assert {file.name for file in cache.folder.iterdir()} == {"0.bin", "1.bin", "3.bin"}
    assert objects.read == ["0.bin", "1.bin", "2.bin", "3.bin"]


def test_truncated_file_is_fetched_again(tmp_path):
    cache = FileCache(FakeObjects(1), str(tmp_path), 30)
    hold(cache, "0.bin")
    (cache.folder / "0.bin").write_bytes(b"half")
    assert hold(cache, "0.bin") == b"0.bin     "


def test_unfinished_file_of_a_killed_process_makes_room(tmp_path):
    cache = FileCache(FakeObjects(2), str(tmp_path), 15)
    (cache.folder / ".part-0.bin").write_bytes(bytes(15))
    assert hold(cache, "1.bin") == b"1.bin     "
    assert [file.name for file in cache.folder.iterdir()] == ["1.bin"]


def test_failed_download_leaves_no_file(tmp_path):
    objects = FakeObjects(1)
    objects.blocks = lambda path: iter([b"part", 1 / 0])
    cache = FileCache(objects, str(tmp_path), 30)
    with pytest.raises(ZeroDivisionError):
        hold(cache, "0.bin")
    assert not [*cache.folder.iterdir()]


def test_threads_fetch_a_file_once(tmp_path):
    objects = FakeObjects(1)
    slow = objects.blocks

    def blocks(path):
        time.sleep(0.05)
        return slow(path)

    objects.blocks = blocks
    caches = [FileCache(objects, str(tmp_path), 10) for _ in range(4)]
    threads = [threading.Thread(target=hold, args=(cache, "0.bin")) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert objects.read == ["0.bin"]


# ---- dropped connections ---------------------------------------------------------------------------------------------


class CuttingProxy(socketserver.ThreadingTCPServer):
    """Forwards connections, and cuts the first ones within the response to a request for a chunk.

    Args:
        port: of the server behind it.
        cuts: how many responses to cut.
        after: the bytes of a response that pass.
    """

    daemon_threads = True

    def __init__(self, port, cuts, after):
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.port, self.cuts, self.after, self.ranges = port, cuts, after, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def finish_request(self, request, client_address):
        with socket.create_connection(("127.0.0.1", self.port)) as server:
            passed, cutting = 0, False
            while True:
                for ready in select.select([request, server], [], [], 30)[0]:
                    data = ready.recv(2**14)
                    if not data:
                        return
                    if ready is request:
                        if b".bin" in data.partition(b"\r\n")[0]:
                            found = re.search(rb"(?i)\r\nrange: bytes=(\d+)-", data)
                            self.ranges.append(int(found[1]) if found else 0)
                            passed, cutting = 0, self.cuts > 0
                        server.sendall(data)
                        continue
                    cut = cutting and passed + len(data) > self.after
                    request.sendall(data[: self.after - passed] if cut else data)
                    passed += len(data)
                    if cut:
                        self.cuts -= 1
                        return


@pytest.fixture
def cut(moto, bucket, monkeypatch, tmp_path):
    """Upload one chunk of 2 MiB; returns its items and a function that makes a proxy for it."""
    items = [{"x": np.random.default_rng(i).random(2**17).astype(np.float32)} for i in range(4)]
    address = upload(write_chunks(tmp_path / "set", items), bucket)
    proxies = []
    monkeypatch.setattr(object_store, "_BLOCK", 2**16)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")

    def through(cuts, after):
        proxies.append(CuttingProxy(moto, cuts, after))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxies[-1].server_address[1]}")
        return proxies[-1]

    yield address, torch.from_numpy(np.stack([item["x"] for item in items])), through
    for proxy in proxies:
        proxy.shutdown()
        proxy.server_close()


@pytest.mark.slow
def test_dropped_connection_is_taken_up_where_it_ended(cut):
    address, x, through = cut
    proxy = through(cuts=6, after=300_000)
    assert torch.equal(remote(address, **ALL).tensors("train")[0], x)
    # more drops than attempts, but each attempt made progress
    assert proxy.cuts == 0 and len(proxy.ranges) == 7
    assert proxy.ranges == sorted({*proxy.ranges}) and proxy.ranges[0] == 0 and proxy.ranges[-1] > 1_500_000


@pytest.mark.slow
def test_permanent_connection_loss_is_reported_in_one_line(cut, tmp_path):
    address, _, through = cut
    proxy = through(cuts=10**6, after=1000)
    refused(rf"{address}/chunk-0-0.bin cannot be read: the server cannot be reached", lambda: remote(address, **ALL))
    assert len(proxy.ranges) == 3 and proxy.ranges[-1] < 3000
    assert not [*(tmp_path / "cache").rglob("*.bin")]
