"""predictions.npz: in the order of the data, one file for all ranks, resumed after a kill, with little memory."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from callback_fakes import Fake, digits
from PIL import Image
from torch.utils.data import DataLoader

import aezoo
from aezoo.callbacks import PredictionWriter
from aezoo.cli.main import main
from aezoo.data import DataModule
from aezoo.errors import AezooError
from aezoo.io import partial

N, BATCH = 103, 10


class Noisy(Fake):
    """Predictions depend on random numbers."""

    def predict_step(self, batch, batch_idx):
        return super().predict_step((batch[0], None), batch_idx) | {"label": torch.rand(len(batch[0]))}


class Stop(pl.callbacks.Callback):
    """Ends a prediction within a batch, and counts the samples passed to the model."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.seen = at, 0

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == self.at:
            raise KeyError("killed")
        self.seen += len(batch[0])


@pytest.fixture
def predict(tmp_path, monkeypatch):
    """Predict a file of samples into a folder."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((4 * N, 4), np.float32))
    monkeypatch.setattr(partial, "SECONDS", 0.0)

    def run(folder, *callbacks, model=None, batch_size=BATCH, **options):
        torch.manual_seed(0)
        model = Noisy((4,)) if model is None else model
        data = DataModule("array", root=str(tmp_path / "x.npy"), batch_size=batch_size, test_fraction=0.25)
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False} | options
        writer = PredictionWriter(str(tmp_path / folder))
        trainer = pl.Trainer(accelerator="cpu", callbacks=[writer, *callbacks], **options)
        trainer.predict(model, data, return_predictions=False)
        return data

    return run


def arrays(file):
    with np.load(file) as found:
        return dict(found)


@pytest.mark.parametrize("own", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_predictions_are_written_in_order(fit, tmp_path, capsys, own):
    writer = PredictionWriter(str(tmp_path / "here") if own else "")
    model = Fake((1, 6, 6))
    trainer = fit(model, writer)
    data = digits((1, 6, 6))
    capsys.readouterr()
    trainer.predict(model, DataLoader(data, 20), return_predictions=False)
    path = tmp_path / ("here" if own else "run/0") / "predictions.npz"
    assert capsys.readouterr().out.startswith(f"Predictions: {path} (code (48, 4), reconstruction (48, 1, 6, 6)")
    found = arrays(path)
    with torch.no_grad():
        z = model.eval().encode(data.tensors[0])
    assert set(found) == {"code", "reconstruction", "score", "label", "index"}
    np.testing.assert_allclose(found["code"], z, rtol=1e-5)
    np.testing.assert_array_equal(found["label"], data.tensors[1])
    assert found["index"].tolist() == [*range(48)]
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.slow
def test_samples_in_unknown_order_have_no_index(fit, tmp_path):
    model = Fake((4,))
    trainer = fit(model, PredictionWriter(), max_epochs=1)
    data = digits((4,))
    trainer.predict(model, DataLoader(data, 20, sampler=[*range(47, -1, -1)]), return_predictions=False)
    found = arrays(tmp_path / "run" / "0" / "predictions.npz")
    with torch.no_grad():
        z = model.eval().encode(data.tensors[0]).numpy()
    assert "index" not in found and np.allclose(found["code"], z[::-1], atol=1e-6)


@pytest.mark.slow
def test_limited_prediction_has_first_samples(predict, tmp_path):
    predict("all")
    predict("few", limit_predict_batches=3)
    every, few = (arrays(tmp_path / folder / "predictions.npz") for folder in ("all", "few"))
    assert few["index"].tolist() == [*range(3 * BATCH)]
    assert all(np.array_equal(few[name], every[name][: 3 * BATCH]) for name in every)


@pytest.mark.parametrize("at", [1, pytest.param(N // BATCH, marks=pytest.mark.slow)])
def test_resumed_prediction_equals_undisturbed_one(predict, tmp_path, at):
    predict("whole")
    with pytest.raises(KeyError, match="killed"):
        predict("again", Stop(at))
    assert not [*(tmp_path / "again").glob("*.npz")]
    rest = Stop()
    predict("again", rest)
    assert rest.seen == N - at * BATCH
    whole, again = (tmp_path / folder / "predictions.npz" for folder in ("whole", "again"))
    assert whole.read_bytes() == again.read_bytes()
    assert [path.name for path in again.parent.iterdir()] == ["predictions.npz"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["weights", "batch_size", "data"])
def test_other_prediction_starts_from_the_beginning(predict, tmp_path, what):
    with pytest.raises(KeyError, match="killed"):
        predict("here", Stop(4))
    other = {"weights": {"model": Noisy((4,))}, "batch_size": {"batch_size": 9}, "data": {}}[what]
    if what == "data":
        np.save(tmp_path / "x.npy", np.random.default_rng(1).random((4 * N, 4), np.float32))
    count = Stop()
    predict("here", count, **other)
    assert count.seen == N


@pytest.mark.slow
def test_prediction_killed_before_its_file_is_written_resumes(predict, tmp_path, monkeypatch):
    predict("whole")
    with monkeypatch.context() as patch:
        patch.setattr(partial, "write_npz", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            predict("again")
    rest = Stop()
    predict("again", rest)
    assert rest.seen == 0
    whole, again = (tmp_path / folder / "predictions.npz" for folder in ("whole", "again"))
    assert whole.read_bytes() == again.read_bytes()


@pytest.mark.slow
def test_overwritten_predictions_are_reported(predict, tmp_path, capsys):
    path = tmp_path / "here" / "predictions.npz"
    for said in ("", f"aezoo: the earlier {path} is replaced; --predictions.folder DIR keeps both\n"):
        predict("here")
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_bfloat16_predictions_become_float32(fit, tmp_path):
    model, writer = Fake((4,)), PredictionWriter()
    trainer = fit(model, writer, precision="bf16-true", max_epochs=1)
    trainer.predict(model, DataLoader(digits((4,)), 20))
    assert np.load(tmp_path / "run" / "0" / "predictions.npz")["code"].dtype == np.float32


def test_unwritable_predictions_are_reported_in_one_line(predict, tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(AezooError, match=r"cannot write .*--predictions\.folder$") as caught:
        predict("a")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_second_prediction_into_a_folder_is_refused(predict, tmp_path):
    (tmp_path / "here" / ".predictions").mkdir(parents=True)
    held = "import fcntl, sys, time; fcntl.lockf(f := open(sys.argv[1], 'ab'), fcntl.LOCK_EX)"
    held += "; print(flush=True); time.sleep(60)"
    command = [sys.executable, "-c", held, str(tmp_path / "here/.predictions/.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"\n"
        try:
            with pytest.raises(AezooError, match="is being written by another process"):
                predict("here")
        finally:
            other.kill()


def photos(folder: Path, n: int, size: int = 8, n_train: int = 20) -> list[str]:
    """A folder of images with a separate training split."""
    pixels = np.random.default_rng(0).integers(0, 256, (n_train, size, size), np.uint8)
    names: list[Path] = []
    for i in range(n + n_train):
        path = folder / ("train" if i < n_train else "test") / "a" / f"{'long-' * (i % 3)}{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i < n_train:
            Image.fromarray(pixels[i]).save(path)
        else:
            path.hardlink_to(names[i % n_train])
        names.append(path)
    return sorted(map(str, names[n_train:]))


@pytest.mark.slow
def test_predictions_name_files(tmp_path):
    names = photos(tmp_path / "photos", 13)
    data = DataModule("folder", root=str(tmp_path / "photos"), batch_size=5, num_workers=0)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[PredictionWriter(str(tmp_path))],
    )  # fmt: skip
    model = aezoo.create_model("dense_ae", (1, 8, 8), latent_dim=2)
    trainer.predict(model, data, return_predictions=False)
    found = arrays(tmp_path / "predictions.npz")
    assert found["file"].tolist() == names
    x = torch.stack([torch.from_numpy(np.array(Image.open(name)))[None] / 255 for name in names])
    with torch.no_grad():
        np.testing.assert_allclose(found["code"], model.eval().encode(x), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_ranks_write_the_file_of_one(predict, tmp_path):
    predict("one")
    predict("two", devices=2, strategy="ddp_fork")
    one, two = (tmp_path / folder / "predictions.npz" for folder in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


RUN = """
import json, os, re, signal, sys
from pathlib import Path
import lightning.pytorch as pl
from aezoo.cli.main import main
from aezoo.io import partial

partial.SECONDS, commands, at = 0.0, json.loads(sys.argv[1]), int(sys.argv[2])
write, seen = partial.Partial.write, 0

def counted(self, name, *rest):
    global seen
    seen += name == "code"
    if seen == at and name == "score":
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, name, *rest)

partial.Partial.write = counted
for argv in commands:
    seen = 0
    main(argv)
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps([seen, int(peak[1]) / 2**10 if peak else 0]))
"""


def run(*commands: list[str], at: int = -1) -> list[list[float]]:
    """Batches computed by each command, and peak memory until its end in MiB; killed within batch `at`."""
    command = [sys.executable, "-W", "ignore", "-c", RUN, json.dumps(commands), str(at)]
    # a single thread and arena, since more of them use a varying amount of memory
    settings = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=settings)
    if at > 0:
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        return []
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if re.fullmatch(r"\[\d+, [\d.]+\]", line)]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="a process cannot tell what it took at most")
def test_killed_prediction_resumes_in_little_memory(tmp_path):
    """For 160 photographs, whose reconstructions take 31 MiB, and for four times as many."""
    photos(tmp_path / "few", 1, 224)
    size = ["--model.latent_dim=4", "--model.hidden_dims=[4]", "--trainer.max_epochs=1"]
    size += [f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    main(["fit", "--model=dense_ae", f"--data={tmp_path / 'few'}", *size])
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    command = ["predict", f"--ckpt_path={checkpoint}", "--trainer.accelerator=cpu"]
    command += ["--data.batch_size=32", "--data.num_workers=0"]
    for n in (160, 640):
        photos(tmp_path / str(n), n, 224)
    of_both = [
        [*command, f"--data={tmp_path / n}", f"--predictions.folder={tmp_path / f'out{n}'}"] for n in ("160", "640")
    ]
    (few, peak), (many, later) = run(*of_both)
    assert (few, many) == (160 // 32, 640 // 32)
    assert later - peak < 50, (peak, later)
    command += [f"--data={tmp_path / '160'}", f"--predictions.folder={tmp_path / 'again'}"]
    run(command, at=4)
    assert run(command)[0][0] == 160 // 32 - 3
    again, whole = (tmp_path / folder / "predictions.npz" for folder in ("again", "out160"))
    assert again.read_bytes() == whole.read_bytes()
    assert re.fullmatch(r"\S+/test/a/\S+\.png", arrays(again)["file"][0])
