"""Each run has a separate folder, and each folder has one run that writes to it."""

import contextlib
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import lightning.pytorch as pl
import pytest
import torch
from extra_callbacks import add_callbacks
from kill_harness import curves

from aezoo.cli.main import main
from aezoo.errors import AezooError
from aezoo.io import atomic_files, resume, run_folder
from aezoo.io.checkpoint import resolve_checkpoint

OFF = [f"--{name}.every_n_epochs=0" for name in ("reconstructions", "samples", "traversal", "latents", "filters")]
FIT = ["fit", "--model=vae", "--data.name=digits", "--trainer.limit_train_batches=2", "--projector.n=0", *OFF]
HOME = Path("runs/vae-digits")
HOLD = """
import sys, pathlib
from aezoo import run_folder
with run_folder.locked(*map(pathlib.Path, sys.argv[1:])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def holder():
    """Another process that writes to run 0."""
    (HOME / "0").mkdir(parents=True)
    command = [sys.executable, "-c", HOLD, str(HOME / "0"), str(HOME / "0")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.slow
def test_concurrent_requests_get_distinct_run_numbers():
    together = Barrier(8)

    def many(_):
        together.wait()
        return [run_folder.create_next(HOME).name for _ in range(50)]

    with ThreadPoolExecutor(8) as pool:
        names = [name for found in pool.map(many, range(8)) for name in found]
    assert sorted(map(int, names)) == list(range(400))


def test_next_run_number_follows_highest():
    (HOME / "7").mkdir(parents=True)
    assert run_folder.next_free(HOME) == HOME / "8" and not (HOME / "8").exists()
    assert run_folder.create_next(HOME) == HOME / "8"


def test_uncreatable_run_folder_is_refused_in_one_line():
    Path("runs").write_text("")
    with pytest.raises(AezooError, match=r"^cannot read or write runs/vae-digits: .*--trainer.default_root_dir$"):
        run_folder.create_next(HOME)


@pytest.mark.slow
def test_fast_dev_run_creates_no_folder():
    main([*FIT, "--trainer.fast_dev_run=1"])
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("there", [Path(), Path("runs"), HOME], ids=str)
def test_run_failing_before_writing_leaves_no_folder(there):
    there.mkdir(parents=True, exist_ok=True)
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        main([*FIT, "--trainer.strategy=none_such"])
    assert sorted(Path().rglob("*")) == before


def test_interrupted_run_with_files_keeps_folder():
    with contextlib.suppress(KeyboardInterrupt), run_folder.locked(run_folder.create_next(HOME), Path()):
        (HOME / "0" / "config.yaml").touch()
        raise KeyboardInterrupt
    assert (HOME / "0" / "config.yaml").is_file()


@pytest.mark.slow
def test_folder_of_run_killed_at_start_is_reused(holder):
    holder.kill()
    holder.wait()
    assert resume.latest_run(HOME) == (None, HOME / "0")
    main([*FIT, "--trainer.max_epochs=1", "--resume=auto"])
    assert [path.name for path in HOME.iterdir()] == ["0"]


@pytest.mark.slow
def test_a_second_writer_of_a_run_is_refused(holder, capsys):
    with pytest.raises(SystemExit) as end:
        main([*FIT, "--trainer.max_epochs=1", "--resume=auto"])
    assert end.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("aezoo: runs/vae-digits/0 is being written by another process: wait for it, or train")
    assert [path.name for path in (HOME / "0").iterdir()] == [".lock"]
    main([*FIT, "--trainer.max_epochs=1"])
    assert (HOME / "1" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.slow
def test_a_second_writer_of_a_folder_of_checkpoints_is_refused(holder, capsys):
    shared = f"--checkpoints.dirpath={HOME / '0'}"
    with pytest.raises(SystemExit) as end:
        main([*FIT, "--trainer.max_epochs=1", "--trainer.default_root_dir=others", shared])
    assert end.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert "runs/vae-digits/0 is being written by another process" in line and "--checkpoints.dirpath" in line
    assert [path.name for path in (HOME / "0").iterdir()] == [".lock"]
    holder.kill()
    holder.wait()
    main([*FIT, "--trainer.max_epochs=1", "--trainer.default_root_dir=others", shared])
    assert (HOME / "0" / "last.ckpt").is_file()


@pytest.mark.parametrize("given", ["last.ckpt", ".", "../checkpoints", "sub/../last.ckpt"])
def test_run_is_found_from_inside_its_folders(given, monkeypatch):
    folder = HOME / "0" / "checkpoints"
    (folder / "sub").mkdir(parents=True)
    torch.save({}, folder / "last.ckpt")
    run = (HOME / "0").absolute()
    monkeypatch.chdir(folder)
    source = resolve_checkpoint(given)
    assert run_folder.run_of(source, Path(given)).resolve() == run
    monkeypatch.chdir("sub")
    assert run_folder.run_of(Path("../last.ckpt"), Path("../last.ckpt")) == run


def test_damaged_checkpoint_is_skipped_inside_its_folder(monkeypatch, capsys):
    folder = HOME / "0" / "checkpoints"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    atomic_files.save({"state_dict": {}}, Path("best-000-1.ckpt"))
    Path("last.ckpt").write_bytes(b"PK")
    assert resume.newest_resumable("last.ckpt").name == "best-000-1.ckpt"
    assert "last.ckpt cannot be used" in capsys.readouterr().err


# ---- moved folders ---------------------------------------------------------------------------------------------------

RUN, ELSEWHERE = HOME / "0", Path("elsewhere")
MORE = [*FIT, "--trainer.limit_train_batches=3", "--trainer.max_epochs=3"]


class Meanwhile(pl.Callback):
    """Acts on the folders at the start of a hook, in the second epoch."""

    def __init__(self, hook, act):
        setattr(self, hook, lambda trainer, *_: self.act(trainer))
        self.happens, self.done = act, False

    def act(self, trainer):
        if trainer.global_step > 2 and not (trainer.sanity_checking or self.done):
            self.done = True
            self.happens()


def fit_while(monkeypatch, hook, act):
    with monkeypatch.context() as patch:
        add_callbacks(Meanwhile(hook, act), setattr=patch.setattr)
        main(MORE)


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_epoch_end"])
def test_a_run_moved_while_it_trains_continues_there(monkeypatch, capsys, hook):
    links = []
    monkeypatch.setattr(run_folder.atexit, "register", lambda *call: links.append(call))
    fit_while(monkeypatch, hook, lambda: RUN.rename(ELSEWHERE))
    assert f"{RUN.absolute()} was moved to {ELSEWHERE.absolute()}, where the run continues" in capsys.readouterr().err
    ((remove, link),) = [call for call in links if call[0] is run_folder._remove_link]
    assert link.is_symlink() and link == RUN.absolute()
    remove(link)
    assert not [*HOME.iterdir()]
    main([*MORE, "--trainer.default_root_dir=whole"])
    whole = Path("whole/vae-digits/0")
    ends = [torch.load(home / "checkpoints" / "last.ckpt", weights_only=True) for home in (ELSEWHERE, whole)]
    for name, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][name]), name
    assert curves(ELSEWHERE) == curves(whole)
    assert {path.name for path in ELSEWHERE.iterdir()} >= {path.name for path in whole.glob("[a-d]*")}


@pytest.mark.slow
def test_a_run_removed_while_it_trains_ends_with_its_state_saved(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        fit_while(monkeypatch, "on_train_batch_start", lambda: shutil.rmtree(RUN))
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{RUN.absolute()} was deleted or moved to another disk" in line and "Step 6 was saved in" in line
    (saved,) = RUN.glob("checkpoints/*.ckpt")
    assert torch.load(saved, weights_only=True)["global_step"] == 6


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no system that says where an open folder is")
@pytest.mark.parametrize("then", ["moved", "removed"])
def test_a_folder_is_found_after_a_second_move(tmp_path, then):
    a, b, c = (tmp_path / name for name in "abc")
    a.mkdir()
    folder = run_folder.OpenFolder(a)
    a.rename(b)
    assert not folder.is_gone() and a.resolve() == b
    if then == "moved":
        b.rename(c)
        assert not folder.is_gone() and a.resolve() == c
    else:
        b.rmdir()
        assert folder.is_gone()
        a.mkdir()  # where the state is saved
    folder.close()
