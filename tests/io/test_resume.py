"""A run that is killed at any time and restarted continues exactly like an uninterrupted one."""

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import promises
import pytest
import torch
from kill_harness import COMMON, DIGITS, FIT_VAE, FIT_VQ_VAE, OFF, compare, curves, same

from aezoo import registry
from aezoo.callbacks import ProgressBar, dashboard
from aezoo.callbacks.checkpoints import Checkpoints
from aezoo.cli import lightning_cli
from aezoo.cli.main import main
from aezoo.data import DataModule
from aezoo.errors import AezooError
from aezoo.io import atomic_files, resume
from aezoo.models.variational.vae import VAE

HELPER = Path(__file__).parents[1] / "kill_harness.py"
PLAIN = [*FIT_VAE, *COMMON, *DIGITS]
CASES = {
    "vae": [*PLAIN, "--model.lr_schedule=cosine", "--model.warmup_steps=5"],
    "ema": [*PLAIN, "--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.9"],
    "annealing": [*PLAIN, "--trainer.callbacks+=BetaAnnealing", "--trainer.callbacks.n_steps=40"],
    "factor_vae": [
        *("fit", "--model=factor_vae", "--model.hidden_dims=[32]", "--model.latent_dim=4"),
        *("--model.discriminator_lr=3e-4", "--model.lr_schedule=cosine", "--model.warmup_steps=5"),
        *(*COMMON, *DIGITS),
    ],
    "vq_vae": [*FIT_VQ_VAE, *COMMON, *DIGITS],
    "topk_sae": [
        *("fit", "--model=topk_sae", "--model.latent_dim=64", "--model.k=4", "--model.dead_after=300"),
        *(*COMMON, *DIGITS),
    ],
}


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HELPER.parents[1])}


def killed(home, argv, kills, seed=0, **how):
    spec = json.dumps({"argv": argv, "kills": kills, "seed": seed, **how})
    done = subprocess.run(
        [sys.executable, str(HELPER), str(home), spec], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] == kills
    compare(home / "whole", home / "killed")
    promises.add("resume", f"{home.name} {kills}", counts)


@pytest.mark.slow
def test_a_kill_right_after_a_save_loses_no_point_of_a_curve(tmp_path):
    # 9 steps per epoch: saves at 3, 6, 9 and so on, within epochs and at their ends
    short = ["--trainer.max_epochs=4", "--checkpoints.every_n_steps=3", "--trainer.log_every_n_steps=1"]
    argv = [*CASES["annealing"], *short]
    killed(tmp_path, argv, kills=3, after_saves=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES if promises.is_recording() else ["factor_vae", "vq_vae"])
def test_killed_run_equals_uninterrupted_run(tmp_path, case):
    # enough steps for all kills
    epochs, kills = (40, 20) if promises.is_recording() else (10, 3)
    argv = [*CASES[case], f"--trainer.max_epochs={epochs}", "--checkpoints.every_n_steps=4"]
    killed(tmp_path, argv, kills=kills, seed=1)


# ---- other data ------------------------------------------------------------------------------------------------------

AUTO = ["--resume", "auto"]
OF_ARRAYS = ["fit", "--model=vae", "--model.hidden_dims=[8]", "--data.name=array", *OFF, "--projector.n=0"]


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Two files of the same name and shape, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        Path(name).mkdir()
        np.save(f"{name}/x.npy", np.random.default_rng(seed).random((60, 4), dtype=np.float32))


def fit_to(name, *flags, epochs=1):
    main([*OF_ARRAYS, f"--data.root={name}/x.npy", f"--trainer.max_epochs={epochs}", *flags])


def trained(run):
    return {path.name: path.read_bytes() for path in Path(run, "checkpoints").iterdir()}


@pytest.mark.slow
def test_auto_starts_a_new_run_for_another_file(sets, capsys):
    fit_to("a")
    first = trained("runs/vae-x/0")
    fit_to("b", *AUTO, epochs=2)
    error = capsys.readouterr().err
    assert "runs/vae-x/0 was trained on other data" in error and "nothing is left to do" not in error
    assert trained("runs/vae-x/0") == first and trained("runs/vae-x/1")
    # the older run of the first file is found again
    with pytest.raises(SystemExit) as ended:
        fit_to("a", *AUTO, epochs=1)
    assert ended.value.code == 0
    assert "runs/vae-x/0 is finished" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--ckpt_path", "--resume"])
@pytest.mark.parametrize("change", ["another file", "new content"])
def test_a_run_is_not_continued_on_other_data(sets, capsys, flag, change):
    fit_to("a")
    before = trained("runs/vae-x/0")
    if change == "new content":
        Path("b/x.npy").replace("a/x.npy")
    with pytest.raises(SystemExit) as ended:
        fit_to("a" if change == "new content" else "b", f"{flag}=runs/vae-x/0", epochs=2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and "runs/vae-x/0 was trained on other data" in lines[-1]
    assert trained("runs/vae-x/0") == before and not Path("runs/vae-x/1").exists()


@pytest.mark.slow
def test_a_moved_file_is_the_same_data(sets, capsys):
    fit_to("a")
    Path("a").rename("c")
    fit_to("c", "--resume=runs/vae-x/0", epochs=2)
    assert "runs/vae-x/0/checkpoints" in capsys.readouterr().out


def test_python_fits_refuse_other_data_and_tests_take_them(sets, tmp_path):
    model = VAE((4,), hidden_dims=(8,))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=1, default_root_dir=tmp_path, **quiet)
    trainer.fit(model, DataModule("array", root="a/x.npy"))
    trainer.save_checkpoint("end.ckpt")
    other = DataModule("array", root="b/x.npy")
    with pytest.raises(AezooError, match="trained on other data"):
        pl.Trainer(max_epochs=2, **quiet).fit(model, other, ckpt_path="end.ckpt", weights_only=True)
    trainer.test(model, other, ckpt_path="end.ckpt", weights_only=True, verbose=False)


@pytest.mark.slow
def test_run_without_its_config_is_not_continued(sets, capsys):
    fit_to("a", "--trainer.gradient_clip_val=0.5")
    config = Path("runs/vae-x/0/config.yaml")
    config.rename("kept.yaml")
    for flag in ("--ckpt_path", "--resume"):
        with pytest.raises(SystemExit) as ended:
            main(["fit", f"{flag}=runs/vae-x/0", "--trainer.max_epochs=2"])
        assert ended.value.code == 2
        assert "runs/vae-x/0 lacks its config.yaml" in capsys.readouterr().err
    main(["fit", "-c", "kept.yaml", "--ckpt_path=runs/vae-x/0", "--trainer.max_epochs=2"])
    assert "gradient_clip_val: 0.5" in config.read_text()


# ---- choice of checkpoint --------------------------------------------------------------------------------------------

QUIET = [*OFF, "--code_statistics.every_n_epochs=0", "--projector.n=0", "--trainer.limit_test_batches=0"]
SHORT = ["fit", "--model=vae", "--model.hidden_dims=[8]", "--data.name=digits", "--data.batch_size=500", *QUIET]
RUN = Path("runs/vae-digits/0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs with three steps each."""
    home = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(home):
        main([*SHORT, "--trainer.max_epochs=2"])
    return home


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of that run in the current folder; returns its checkpoint folder."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return RUN / "checkpoints"


def go_on(*flags, epochs=3):
    main([*SHORT, f"--trainer.max_epochs={epochs}", "--resume", "auto", *flags])
    return torch.load(RUN / "checkpoints/last.ckpt", weights_only=True)


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def cut(path):
    path.write_bytes(path.read_bytes()[:-3000])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.fixture(scope="module")
def third(finished, tmp_path_factory):
    """The state of the run after one more epoch."""
    home = tmp_path_factory.mktemp("third")
    shutil.copytree(finished, home, dirs_exist_ok=True)
    with contextlib.chdir(home):
        return go_on()["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "words"),
    [(cut, "it is truncated"), (flip, "its checksum does not match"), (Path.unlink, "is missing"), (None, "")],
)
def test_damaged_last_checkpoint_is_named_and_previous_used(run, third, capsys, damage, words):
    before = (run / "previous.ckpt").read_bytes()
    if damage is not None:
        damage(run / "last.ckpt")
    end = go_on()
    error = capsys.readouterr().err
    assert (f"{run}/last.ckpt" in error and words in error and "previous.ckpt instead" in error) == bool(damage)
    assert end["global_step"] == 9
    same(end["state_dict"], third, "from another checkpoint to the same end")
    assert not (RUN.parent / "1").exists()
    assert (run / "previous.ckpt").read_bytes() != before
    assert atomic_files.find_damage(run / "previous.ckpt") is None


@pytest.mark.slow
def test_curves_of_resume_in_same_second_are_read_last(run):
    file = next(RUN.glob("events.out.tfevents.*"))
    before = curves(RUN)["train/loss"]
    # TensorBoard reads in order of names: within one second, the largest process id would come last
    file.rename(RUN / f"events.out.tfevents.{int(time.time()) + 1}.~host.99999.0")
    go_on()
    after = curves(RUN)["train/loss"]
    assert after[: len(before)] == before
    assert before and [step for step, _ in after[len(before) :]] == [8]


def test_new_event_file_waits_for_later_timestamp(tmp_path, monkeypatch):
    (tmp_path / "events.out.tfevents.100.host.1.0").touch()
    waited = []
    monkeypatch.setattr(dashboard.time, "sleep", waited.append)
    for now in (100.5, 101.0, 98.0):
        monkeypatch.setattr(dashboard.time, "time", lambda now=now: now)
        dashboard.wait_for_new_timestamp(tmp_path)
    assert waited == [0.5]


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["record", "damaged"])
def test_resume_without_valid_checkpoint_is_refused(run, capsys, keep):
    for path in run.glob("*.ckpt"):
        path.write_bytes(b"PK") if keep == "damaged" else path.unlink()
    argv = [*SHORT, "--trainer.max_epochs=3"]
    assert "last.ckpt" in (line := refused(capsys, *argv, "--resume", "auto")) and "--resume off" in line
    assert "last.ckpt" in refused(capsys, *argv, "--resume", str(RUN))
    assert "nothing" in refused(capsys, *argv, "--resume", "nothing")
    assert [path.name for path in RUN.parent.iterdir()] == ["0"]


@pytest.mark.slow
def test_finished_run_is_reported_and_extended_by_larger_limit(run, capsys):
    before = (run / "last.ckpt").read_bytes()
    with pytest.raises(SystemExit) as end:
        go_on(epochs=2)
    assert end.value.code == 0
    assert "is finished (epoch 2, step 6)" in capsys.readouterr().err
    assert (run / "last.ckpt").read_bytes() == before
    assert go_on(epochs=3)["global_step"] == 9


@pytest.mark.slow
def test_early_stopped_run_resumes_with_larger_patience(run, capsys):
    never = "--early_stopping.min_delta=1e6"  # no improvement after the first epoch
    flags = [never, "--early_stopping.patience=1"]
    end = go_on(*flags, epochs=9)
    assert end["global_step"] == 9
    assert capsys.readouterr().out.count("stopped early: 1 epoch without improvement of val/loss after epoch ") == 1
    with pytest.raises(SystemExit) as ended:
        go_on(*flags, epochs=20)
    assert ended.value.code == 0
    assert "continue with a larger --early_stopping.patience" in capsys.readouterr().err
    assert go_on(never, "--early_stopping.patience=3", epochs=9)["global_step"] == 15
    assert go_on(never, "--early_stopping.patience=0", epochs=7)["global_step"] == 21
    # the run did not end at the seventh epoch because of patience
    assert go_on(*flags, epochs=8)["global_step"] == 24


@pytest.mark.slow
def test_resume_without_improvement_keeps_scores(run, monkeypatch):
    def scores(checkpoint):
        (state,) = (value for key, value in checkpoint["callbacks"].items() if key.startswith("Checkpoints"))
        return {key: state[key] for key in ("current_score", "best_model_score", "kth_value", "best_k_models")}

    before = scores(torch.load(run / "last.ckpt", weights_only=True))
    assert before["current_score"] is not None
    monkeypatch.setattr(Checkpoints, "check_monitor_top_k", lambda self, trainer, current: False)
    same(scores(go_on()), before, "scores")


@pytest.mark.slow
def test_resume_accepts_path_and_off(run, capsys):
    main([*SHORT, "--trainer.max_epochs=3", "--resume", str(run / "last.ckpt")])
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 9
    main([*SHORT, "--trainer.max_epochs=1", "--resume", "off"])
    assert torch.load("runs/vae-digits/1/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
    # refers to the newest run
    main([*SHORT, "--trainer.max_epochs=2", "--resume", "auto"])
    assert torch.load("runs/vae-digits/1/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    assert "give --resume or --ckpt_path, not both" in refused(
        capsys, *SHORT, "--resume", "auto", "--ckpt_path", str(RUN)
    )
    capsys.readouterr()
    with pytest.raises(SystemExit):
        # ends there, without training data
        main([*SHORT, "--data.name=folder", "--data.root=none", *AUTO, "--trainer.default_root_dir=other"])
    assert "no run in other" in capsys.readouterr().err


SETTINGS = {
    "d.yaml": "name: digits\n",
    "m.yaml": "class_path: aezoo.models.variational.vae.VAE\ninit_args: {hidden_dims: [8]}\n",
    "t.yaml": "default_root_dir: other\n",
    "whole.yaml": "trainer: sub/t.yaml\n",
    "sub/t.yaml": "default_root_dir: deep\n",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "root", "name"),
    [
        (["--model=vae", "--data=d.yaml"], "runs", "vae-digits"),
        (["--model=vae", "--data", "{name: digits}"], "runs", "vae-digits"),
        (["--model=vae", "--data.name=shapes", "--data=d.yaml"], "runs", "vae-digits"),
        (["--model=vae", "--data=d.yaml", "--data.name=shapes"], "runs", "vae-shapes"),
        (["--model=m.yaml"], "runs", "vae-mnist5k"),
        (["--model", "{class_path: VAE}"], "runs", "vae-mnist5k"),
        (["--model=VAE"], "runs", "vae-mnist5k"),
        (["--model=aezoo.models.variational.vae.VAE"], "runs", "vae-mnist5k"),
        (["--model=variational", "--trainer=t.yaml"], "other", "vae-mnist5k"),
        (["--model=vae", "--trainer={max_epochs: 1}"], "runs", "vae-mnist5k"),
        (["-c", "whole.yaml", "--model=vae"], "deep", "whole"),
        (["-c", "whole.yaml", "--model=vae", "--trainer.default_root_dir=other"], "other", "whole"),
    ],
)
def test_auto_resume_searches_run_folder_of_command(tmp_path, monkeypatch, flags, root, name):
    monkeypatch.chdir(tmp_path)
    looked, trains = [], []

    def automatic(home, matches):
        looked.append(home)
        return None, None

    def stop(self):
        config = self.config["fit"]
        module, _, cls = config["model"]["class_path"].rpartition(".")
        own = f"{registry.name_of(getattr(sys.modules[module], cls))}-{config['data']['name']}"
        trains.append(Path(config["trainer"]["default_root_dir"] or "runs", self.request.run_name or own))
        sys.exit(0)

    monkeypatch.setattr(resume, "latest_run", automatic)
    monkeypatch.setattr(lightning_cli.AezooCLI, "before_instantiate_classes", stop)
    Path("sub").mkdir()
    for file, text in SETTINGS.items():
        Path(file).write_text(text)
    with pytest.raises(SystemExit):
        main(["fit", *flags, *AUTO])
    assert looked == trains == [Path(root, name)]


@pytest.mark.slow
def test_auto_resume_works_with_settings_in_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    for file, text in SETTINGS.items():
        Path(file).write_text(text)
    words = ["fit", "--model=m.yaml", "--data", "{name: digits, batch_size: 500}", "--trainer=t.yaml", *QUIET]
    for epochs in (1, 2):
        main([*words, f"--trainer.max_epochs={epochs}", *AUTO])
    assert torch.load("other/vae-digits/0/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6


@pytest.mark.slow
def test_flags_override_files_override_checkpoint(run, capsys):
    Path("my.yaml").write_text("model: {class_path: vae, init_args: {lr: 0.5, beta: 3.0}}\n")
    # without --resume, the name of the file would name the run
    main(["fit", "-c", "my.yaml", "--model.lr=0.25", "--trainer.max_epochs=3", "--resume", str(RUN)])
    error = capsys.readouterr().err
    assert "model.lr is 0.25, the checkpoint has 0.001" in error
    assert "model.beta is 3.0, the checkpoint has 1.0" in error
    end = torch.load(run / "last.ckpt", weights_only=True)
    assert end["global_step"] == 9
    assert end["optimizer_states"][0]["param_groups"][0]["lr"] == 0.25
    assert (end["hyper_parameters"]["lr"], end["hyper_parameters"]["beta"]) == (0.25, 3.0)
    assert end["hyper_parameters"]["hidden_dims"] in ((8,), [8])


@pytest.mark.slow
def test_resume_does_not_duplicate_added_callbacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for epochs in (1, 2):
        end = go_on("--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.5", epochs=epochs)
        assert end["global_step"] == 3 * epochs
    text = (RUN / "config.yaml").read_text()
    assert text.count("callbacks.EMA") == 1 and "decay: 0.5" in text


@pytest.fixture
def hangs_up():
    """Fail if SIGHUP reaches the default handler, instead of ending the tests."""
    before = signal.signal(signal.SIGHUP, lambda *_: pytest.fail("nobody listens to SIGHUP"))
    yield
    signal.signal(signal.SIGHUP, before)


class Gone(io.StringIO):
    """An output whose reader has gone."""

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.slow
@pytest.mark.usefixtures("hangs_up")
@pytest.mark.parametrize(
    ("number", "times", "code"), [(signal.SIGTERM, 1, 143), (signal.SIGINT, 1, 130), (signal.SIGHUP, 2, 129)]
)
def test_a_signal_saves_the_step_and_ends_with_its_code(run, monkeypatch, capsys, number, times, code):
    true, write = VAE.training_step, os.write

    def step(self, batch, batch_idx):
        if self.trainer.global_step == 7:
            if number == signal.SIGHUP:  # the terminal has gone, and the signal comes from the kernel and the shell
                monkeypatch.setattr(sys, "stderr", Gone())
                monkeypatch.setattr(os, "write", lambda fd, text: Gone().write(text) if fd == 2 else write(fd, text))
            for _ in range(times):
                os.kill(os.getpid(), number)
        return true(self, batch, batch_idx)

    monkeypatch.setattr(VAE, "training_step", step)
    with pytest.raises(SystemExit) as end:
        go_on()
    assert end.value.code == code
    assert ("interrupted at epoch 2, step 8" in capsys.readouterr().err) == (number != signal.SIGHUP)
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.EIO, "Input/output")])
def test_closed_output_saves_step_and_fails(run, monkeypatch, capsys, error):
    """Printing fails if the reader has gone, also when the bar is removed from the screen."""

    def show(self, trainer, *_):
        if trainer.global_step == 8:
            raise error

    def take_off(self):
        if self.trainer.global_step == 8:
            raise error

    monkeypatch.setattr(ProgressBar, "on_train_batch_end", show)
    monkeypatch.setattr(ProgressBar, "_stop_progress", take_off)
    with pytest.raises(SystemExit) as end:
        go_on()
    said = capsys.readouterr().err
    if isinstance(error, BrokenPipeError):
        assert end.value.code == 141 and "broken pipe" in said
        assert said.splitlines()[-1].startswith("continue with: aezoo fit --ckpt_path ")
    assert end.value.code
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "at", "back"),
    [
        (signal.SIGUSR1, 7, True),
        (signal.SIGTERM, 7, False),
        # in the last step: the run ends by itself
        (signal.SIGUSR1, 8, False),
    ],
)
def test_slurm_signal_saves_and_requeues_the_job(run, monkeypatch, number, at, back):
    job = {"NTASKS": "1", "JOB_NAME": "train", "JOB_ID": "77", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for key, value in job.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    scontrol = Path("bin/scontrol")
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> asked\ncat {run / "last.ckpt.json"} >> asked\n')
    scontrol.chmod(0o700)
    monkeypatch.setenv("PATH", str(scontrol.parent.absolute()), prepend=os.pathsep)
    true = VAE.training_step

    def step(self, batch, batch_idx):
        if self.trainer.global_step == at:
            os.kill(os.getpid(), number)
        return true(self, batch, batch_idx)

    monkeypatch.setattr(VAE, "training_step", step)
    with contextlib.suppress(SystemExit):
        go_on()
    assert Path("asked").exists() == back
    if back:
        command, record = Path("asked").read_text().splitlines()
        assert command == "requeue 77" and json.loads(record)["step"] == 8


@pytest.mark.slow
def test_run_with_custom_checkpoint_folder_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    last, own = Path("ck/last.ckpt"), "--checkpoints.dirpath=ck"
    command = [*SHORT, own, "--resume=auto"]

    def steps():
        assert [path.name for path in RUN.parent.iterdir()] == ["0"] and not (RUN / "checkpoints").exists()
        return torch.load(last, weights_only=True)["global_step"]

    for epochs in (1, 2):
        main([*command, f"--trainer.max_epochs={epochs}"])
        assert steps() == 3 * epochs
    main(["fit", "--ckpt_path", str(RUN), "--trainer.max_epochs=3"])
    assert steps() == 9
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*command, "--trainer.max_epochs=3"])
    assert f"aezoo test --ckpt_path {RUN}" in capsys.readouterr().err
    main(["test", "--ckpt_path", str(RUN)])
    true = VAE.training_step

    def step(self, batch, batch_idx):
        if self.trainer.global_step == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return true(self, batch, batch_idx)

    monkeypatch.setattr(VAE, "training_step", step)
    with pytest.raises(SystemExit):
        main([*command, "--trainer.max_epochs=4"])
    assert capsys.readouterr().err.splitlines()[-1] == f"continue with: aezoo fit --ckpt_path {RUN}"
    assert steps() == 11
    main(["embed", "--ckpt_path", str(RUN)])
    assert (RUN / "embed" / "codes.npy").is_file()


@pytest.mark.slow
def test_later_run_ignores_remains_of_earlier_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main([*SHORT, "--checkpoints.dirpath=ck", "--trainer.max_epochs=1"])
    assert resume.latest_run(RUN.parent) == ((tmp_path / "ck/last.ckpt").resolve(), RUN)
    # killed before saving anything
    (RUN.parent / "1").mkdir()
    assert resume.latest_run(RUN.parent) == (None, RUN.parent / "1")
    shutil.rmtree(RUN.parent / "1")
    Path("ck").rename("gone")
    with pytest.raises(AezooError, match=r"no .ckpt file in .*/ck; .* train from scratch with --resume off"):
        resume.latest_run(RUN.parent)
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["full", "read-only"])
def test_failed_checkpoint_write_keeps_last_checkpoint(run, monkeypatch, capsys, how):
    last = (run / "last.ckpt").read_bytes()
    true_open, true_fdopen = os.open, os.fdopen

    def read_only(path, flags, *args, **kwargs):
        if flags & os.O_WRONLY and "checkpoints" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return true_open(path, flags, *args, **kwargs)

    class Full:
        """A file on a disk with space for a thousand bytes."""

        def __init__(self, file):
            self.file, self.room = file, 1000

        def write(self, data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.file.close()

    if how == "full":
        monkeypatch.setattr(os, "fdopen", lambda handle, mode: Full(true_fdopen(handle, mode)))
        # the settings would also be too long
        monkeypatch.setattr(lightning_cli.SaveConfig, "_write", lambda *args, **kwargs: None)
    else:
        monkeypatch.setattr(os, "open", read_only)
    line = refused(capsys, *SHORT, "--trainer.max_epochs=3", "--resume", "auto")
    words = {"full": "No space left on device", "read-only": "Permission denied"}[how]
    assert line.startswith("aezoo: cannot write runs/vae-digits/0/checkpoints") and words in line
    assert "files saved before are kept" in line
    assert (run / "last.ckpt").read_bytes() == last
    assert not list(run.glob(".tmp-*"))


def saves_of(monkeypatch, *flags):
    """The steps at which `last.ckpt` is written, or linked to the best checkpoint."""
    steps = []
    true = atomic_files._write_record

    def write_record(path, record):
        steps.append(record["step"])
        true(path, record)

    monkeypatch.setattr(atomic_files, "_write_record", write_record)
    main([*SHORT[:4], "--data.batch_size=200", *QUIET, "--trainer.max_epochs=2", *flags])
    return steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        # eight steps per epoch; the last one is saved at the end of the epoch
        ([], [8, 16]),
        (["--checkpoints.every_n_steps=3"], [3, 6, 8, 9, 12, 15, 16]),
        (["--checkpoints.every_n_epochs=2"], [16]),
        (["--checkpoints.every_n_minutes=1e-9"], [*range(1, 8), 8, *range(9, 16), 16]),
        (["--checkpoints.every_n_steps=3", "--trainer.accumulate_grad_batches=2"], [3, 4, 6, 8]),
    ],
)
def test_checkpoints_by_step_epoch_and_time(tmp_path, monkeypatch, flags, steps):
    monkeypatch.chdir(tmp_path)
    assert saves_of(monkeypatch, *flags) == steps


@pytest.mark.slow
def test_run_folder_always_has_valid_checkpoint(tmp_path, monkeypatch):
    """Checked after each call that renames, links or removes a file."""
    monkeypatch.chdir(tmp_path)
    looks = []

    def wrapped(true):
        def call(*args, **kwargs):
            result = true(*args, **kwargs)
            found, _ = atomic_files.newest_checkpoint(RUN / "checkpoints")
            # after the first one; best checkpoints, which would hide a gap, are not kept here
            if found is not None or looks:
                looks.append(found)
            return result

        return call

    for name in ("rename", "replace", "link", "unlink", "remove"):
        monkeypatch.setattr(os, name, wrapped(getattr(os, name)))
    main([*SHORT, "--trainer.max_epochs=2", "--checkpoints.every_n_steps=1", "--checkpoints.save_top_k=0"])
    assert len(looks) > 15
    assert None not in looks
