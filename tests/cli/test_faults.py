"""Common accidents end in one line with cause and remedy, on the command line and in Python."""

import errno
import importlib.metadata
import json
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import aezoo
from aezoo.cli.main import main
from aezoo.data import DataModule
from aezoo.distributions.likelihoods import LIKELIHOODS, likelihood
from aezoo.errors import AezooError
from aezoo.models.variational.vae import VAE
from aezoo.training import input_checks

OFF = [f"--{name}.every_n_epochs=0" for name in ("reconstructions", "samples", "traversal", "latents", "filters")]
QUICK = ["--data.name=digits", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--projector.n=0", *OFF]
FIT = ["fit", "--model=vae", "--model.hidden_dims=[8]", *QUICK, "--code_statistics.every_n_epochs=0"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1].removeprefix("aezoo: ")


# ---- unsuitable data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", aezoo.list_models())
def test_wrong_input_shape_at_inference_is_refused(name):
    model = aezoo.create_model(name, input_shape=(1, 8, 8)).eval()
    assert model.encode(torch.rand(2, 1, 8, 8)).shape == (2, *model.code_shape)
    for method in (model.encode, model.score, model):
        for shape in ((2, 3, 8, 8), (1, 8, 8), (2, 64)):
            with pytest.raises(AezooError, match="samples of shape Bx1x8x8, got ") as error:
                method(torch.rand(shape))
            assert "\n" not in str(error.value)
        with pytest.raises(AezooError, match=r"expects float data, got torch\.uint8"):
            method(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(AezooError, match="decode expects codes of shape B"):
        model.decode(torch.rand(2, *(n + 1 for n in model.code_shape)))
    try:
        found, said = model(torch.rand(2, 1, 8, 9)).shape, ""
    except AezooError as error:
        found, said = None, str(error)
    assert found == (2, 1, 8, 9) or said.startswith(f"{name} was built for samples of 8x8 and does not take 8x9: ")
    assert "\n" not in said


def test_shapes_are_checked_only_after_failure_in_training(monkeypatch):
    model = aezoo.create_model("dense_ae", input_shape=(4,)).train()
    looks = []
    monkeypatch.setattr(input_checks, "_check", lambda *arguments: looks.append(arguments))
    model.encode(torch.rand(2, 4))
    assert not looks  # the training loop has checked the first batch
    with pytest.raises(RuntimeError, match="mat1"):
        model.encode(torch.rand(2, 5))
    assert looks


@pytest.mark.parametrize("training", [True, False])
def test_images_from_0_to_255_are_refused(training):
    model = aezoo.create_model("vae", input_shape=(1, 8, 8)).train(training)
    with pytest.raises(AezooError, match=r"data in \[0, 1\], got values from 0 to 255"):
        model.check_batch(torch.linspace(0, 255, 128).reshape(2, 1, 8, 8))
    # values beyond those seen for scaling are accepted in evaluation
    if not training:
        model.check_batch(torch.linspace(-0.5, 2, 128).reshape(2, 1, 8, 8))


@pytest.mark.slow
def test_table_labels_may_be_any_integers_but_not_nan(capsys):
    x = np.random.default_rng(0).random((60, 4), dtype=np.float32)
    np.savez("x.npz", x_train=x, y_train=np.full(60, np.nan))
    assert "labels contain NaN" in refused(capsys, "fit", "--model=vae", "--data.name=x.npz")
    np.savez("x.npz", x_train=x, y_train=np.resize([-5, 10**12], 60))
    data = DataModule("x.npz")
    assert data.num_classes == 2
    assert set(data.tensors("train")[1].tolist()) == {0, 1}


@pytest.mark.slow
def test_checkpoint_of_different_input_shape_is_refused(capsys):
    main(FIT)
    line = refused(capsys, "test", "--ckpt_path=runs/vae-digits/0", "--data.name=mnist5k")
    assert "trained on samples of shape 1x8x8, but these data give 1x28x28" in line


# ---- files of another version, packages that are missing -------------------------------------------------------------


@pytest.mark.slow
def test_checkpoint_of_different_version_loads_with_notice(capsys):
    main(FIT)
    path = Path("runs/vae-digits/0/checkpoints/last.ckpt")
    aezoo.load_model(path)
    assert "was written by" not in capsys.readouterr().err
    stored = torch.load(path, weights_only=True)
    stored["aezoo"]["version"] = "99.0"
    torch.save(stored, "old.ckpt")
    model = aezoo.load_model("old.ckpt")
    note = f"aezoo: old.ckpt was written by aezoo 99.0, this is {aezoo.__version__}"
    assert capsys.readouterr().err.splitlines() == [note]
    main(["test", "--ckpt_path=old.ckpt"])
    assert note in capsys.readouterr().err
    aezoo.save_model(model, "saved")
    config = json.loads(Path("saved/config.json").read_text())
    Path("saved/config.json").write_text(json.dumps(config | {"aezoo_version": "0.0\n1"}))
    aezoo.load_model("saved")
    assert "saved was written by aezoo 0.0 1" in capsys.readouterr().err


@pytest.mark.slow
def test_missing_extra_is_named(capsys, monkeypatch):
    Path("x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    line = refused(capsys, "fit", "--model=vae", "--data.name=x.parquet")
    assert ".[parquet]" in line
    assert "parquet" in importlib.metadata.metadata("aezoo").get_all("Provides-Extra")


@pytest.mark.slow
def test_missing_tensorboard_names_alternatives(capsys, monkeypatch):
    import lightning.fabric.loggers.tensorboard as module

    monkeypatch.setattr(module, "_TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr(module, "_TENSORBOARDX_AVAILABLE", False)
    assert "pip install tensorboard, or use --logger csv or none" in refused(capsys, *FIT)


def test_first_run_mentions_free_tensorboard_port():
    page = Path(aezoo.__file__).parents[1] / "docs" / "start.md"
    assert "--port 0" in next(line for line in page.read_text().splitlines() if line.startswith("tensorboard "))


# ---- folders and disks -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("root", ["a_file", "a_file/below"])
def test_uncreatable_run_folder_is_refused(capsys, root):
    Path("a_file").touch()
    line = refused(capsys, *FIT, f"--trainer.default_root_dir={root}")
    assert "cannot read or write" in line and "a_file" in line and "--trainer.default_root_dir" in line


@pytest.mark.slow
def test_predictions_folder_that_is_a_file_is_refused(capsys):
    main(FIT)
    Path("a_file").touch()
    line = refused(capsys, "predict", "--ckpt_path", "runs/vae-digits/0", "--predictions.folder", "a_file")
    assert "cannot write a_file/.predictions: Not a directory" in line and "--predictions.folder" in line


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_unwritable_logger_is_reported_in_one_line(capsys, monkeypatch, code):
    from torch.utils.tensorboard import SummaryWriter

    def full(*args, **kwargs):
        # TensorBoard's writer names its files in bytes
        raise OSError(code, "the reason", b"runs/events" if code == errno.EACCES else "runs/events")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    line = refused(capsys, *FIT)
    assert "cannot read or write runs/events: the reason" in line


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of a file there")
@pytest.mark.parametrize("size", [3_000, 20_000])
def test_full_disk_during_run_is_reported_in_one_line(capsys, size):
    """3,000 bytes fail in TensorBoard's writer, 20,000 in a checkpoint."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        line = refused(capsys, *FIT, "--model.hidden_dims=[64]")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in line and "files saved before are kept" in line


@pytest.mark.slow
def test_other_os_errors_are_not_hidden(monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def interrupted(*args, **kwargs):
        raise OSError(errno.EBADF, "a mistake in the program")

    monkeypatch.setattr(SummaryWriter, "add_scalar", interrupted)
    with pytest.raises(ValueError, match="not supported") as error:
        main(FIT)
    assert str(error.value.__cause__).endswith("a mistake in the program")


# ---- numbers that could overflow -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1e4, 1e4])
@pytest.mark.parametrize(
    "name", [f"{name}:learned" for name in ("gaussian", "laplace", "discretised_logistic", "beta_binomial")]
)
def test_a_learned_scale_cannot_overflow(name, value):
    made = likelihood(name)
    with torch.no_grad():
        made.log_scale.fill_(value)
    x = torch.rand(3, 5)
    params = (x + 0.3).requires_grad_()
    found = made.log_prob(params, x)
    found.sum().backward()
    assert found.isfinite().all() and params.grad.isfinite().all() and made.log_scale.grad.isfinite()
    assert made.mean(params).isfinite().all() and made.sample(params).isfinite().all()


@pytest.mark.parametrize("value", [-1e4, 1e4])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_decoder_cannot_make_a_likelihood_overflow(name, value):
    made, x = likelihood(name), torch.rand(3, 5)
    params = torch.full((3, 5), value).requires_grad_()
    found = made.log_prob(params, x)
    found.sum().backward()
    assert found.isfinite().all() and params.grad.isfinite().all()
    assert made.mean(params).isfinite().all() and made.sample(params).isfinite().all()


@pytest.mark.parametrize("value", [-1e4, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_log_variance_cannot_overflow(value, dtype):
    model = aezoo.create_model("vae", input_shape=(6,), hidden_dims=(5,), latent_dim=2, likelihood="gaussian")
    with torch.no_grad():
        list(model.encoder.parameters())[-1][2:] = value
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        terms = model.loss(torch.rand(4, 6))
    terms["loss"].backward()
    assert all(term.isfinite() for term in terms.values())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["none", "auto"])
def test_run_whose_steps_are_all_skipped_fails(capsys, scale):
    x = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    np.save("x.npy", x * np.float32(1e30) if scale == "none" else x)
    flags = ["--data", "x.npy", "--data.scale", scale, "--model.likelihood", "gaussian"]
    command = ["fit", "--model", "dense_ae", *flags, "--trainer.max_epochs", "1", "--projector.n", "0"]
    if scale == "auto":
        main(command)
    else:
        line = refused(capsys, *command)
        assert "all 2 steps were skipped" in line and "--data.scale standard" in line


@pytest.mark.slow
@pytest.mark.parametrize("where", ["host", "device", "python"])
def test_out_of_memory_in_a_step_is_reported_in_one_line(capsys, monkeypatch, where):
    def loss(self, x, y=None):
        if where == "device":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return [0] * 2**62 if where == "python" else torch.empty(2**58)

    monkeypatch.setattr(VAE, "loss", loss)
    line = refused(capsys, *FIT)
    assert "out of memory in a step of" in line and "lower --data.batch_size" in line
