"""Files that are complete or do not exist, and from which of them a run continues."""

import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch

from aezoo.errors import AezooError
from aezoo.io import atomic_files, resume


def checkpoint(step):
    return {"global_step": step, "epoch": step // 10, "state_dict": {"w": torch.full((300,), float(step))}}


def save(folder, name, step):
    atomic_files.save(checkpoint(step), folder / name)
    return folder / name


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_saved_file_is_intact_and_loadable(tmp_path):
    path = save(tmp_path, "a.ckpt", 7)
    assert atomic_files.find_damage(path) is None and step_of(path) == 7 and names(tmp_path) == ["a.ckpt"]


def damaged(content):
    """The file with one bit changed at each position, and truncated at each position."""
    for i in range(len(content)):
        yield content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]
        yield content[:i]


@pytest.mark.slow
def test_bit_flips_and_truncation_are_detected(tmp_path):
    path = save(tmp_path, "a.ckpt", 7)
    content, harmless = path.read_bytes(), 0
    for other in damaged(content):
        path.write_bytes(other)
        # as `newest_checkpoint` does; the reader refuses files that are not zip files
        if atomic_files.find_damage(path) is None and zipfile.is_zipfile(path):
            # the changed bit is in the comment at the end, which has no checksum
            harmless += 1
            found = torch.load(path, weights_only=True)
            assert found["global_step"] == 7 and torch.equal(found["state_dict"]["w"], checkpoint(7)["state_dict"]["w"])
    assert harmless < 0.1 * len(content)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_truncated_file_is_named(tmp_path, share):
    path = save(tmp_path, "a.ckpt", 7)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(AezooError, match=r"a\.ckpt cannot be used"):
        atomic_files.check_intact(path)


def test_failed_write_keeps_old_file_and_no_remains(tmp_path):
    path = tmp_path / "a.txt"
    atomic_files.write(path, lambda file: file.write(b"old"))

    def full(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(AezooError, match="No space left") as refusal:
        atomic_files.write(path, full)
    assert len(str(refusal.value).splitlines()) == 1
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.txt"]


def test_previous_checkpoint_is_kept_with_matching_record(tmp_path):
    save(tmp_path, "last.ckpt", 1)
    save(tmp_path, "last.ckpt", 2)
    assert names(tmp_path) == ["last.ckpt", "last.ckpt.json", "previous.ckpt"]
    assert step_of(tmp_path / "last.ckpt") == 2 and step_of(tmp_path / "previous.ckpt") == 1
    record = json.loads((tmp_path / "last.ckpt.json").read_text())
    assert record["step"] == 2 and record["size"] == (tmp_path / "last.ckpt").stat().st_size


@pytest.mark.parametrize("has_links", [True, False])
def test_best_checkpoint_becomes_last_without_second_write(tmp_path, monkeypatch, has_links):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    save(tmp_path, "last.ckpt", 1)
    best, last, durable = tmp_path / "best.ckpt", tmp_path / "last.ckpt", atomic_files.DurableIO()
    durable.save_checkpoint(checkpoint(2), best)
    assert durable.name_as_last() and names(tmp_path) == ["best.ckpt", "last.ckpt", "last.ckpt.json", "previous.ckpt"]
    assert last.read_bytes() == best.read_bytes() and last.samefile(best) == has_links
    assert step_of(tmp_path / "previous.ckpt") == 1
    record = json.loads((tmp_path / "last.ckpt.json").read_text())
    assert (record["step"], record["sha256"]) == (2, hashlib.sha256(last.read_bytes()).hexdigest())
    # the next last checkpoint does not overwrite the best one
    durable.save_checkpoint(checkpoint(3), last)
    assert not durable.name_as_last() and [step_of(path) for path in (best, last)] == [2, 3]


@pytest.mark.parametrize("damage", ["cut", "gone", "link"])
def test_newest_whole_checkpoint_is_found_others_named(tmp_path, damage):
    for step in (1, 2):
        save(tmp_path, "last.ckpt", step)
    save(tmp_path, "best-000-1.ckpt", 1)
    last = tmp_path / "last.ckpt"
    assert atomic_files.newest_checkpoint(tmp_path) == (last, [])
    content = last.read_bytes()
    last.unlink()
    if damage == "cut":
        last.write_bytes(content[: len(content) // 2])
    elif damage == "link":
        last.symlink_to("nothing")
    found, lines = atomic_files.newest_checkpoint(tmp_path)
    assert found == tmp_path / "previous.ckpt" and len(lines) == 1 and "last.ckpt" in lines[0]


def test_remains_of_killed_save_are_removed(tmp_path):
    for step in (1, 2):
        save(tmp_path, "last.ckpt", step)
    (tmp_path / ".tmp-0123.part").write_bytes(b"half")
    (tmp_path / "last.ckpt").write_bytes(b"PK damaged")
    atomic_files.prepare_folder(tmp_path)
    assert names(tmp_path) == ["last.ckpt.damaged", "last.ckpt.json", "previous.ckpt"]
    save(tmp_path, "last.ckpt", 3)
    assert step_of(tmp_path / "previous.ckpt") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_unwritable_folder_is_reported(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(AezooError, match="cannot write"):
        atomic_files.prepare_folder(tmp_path)


# ---- choice of the run -----------------------------------------------------------------------------------------------


def test_auto_resume_takes_newest_starts_or_refuses(tmp_path, capsys):
    assert resume.latest_run(tmp_path / "vae") == (None, None)
    for number in (2, 9, 10):
        save(tmp_path / "vae" / str(number) / "checkpoints", "last.ckpt", number)
    newest = tmp_path / "vae" / "10"
    assert resume.latest_run(tmp_path / "vae") == (newest / "checkpoints" / "last.ckpt", newest)
    (newest / "checkpoints" / "last.ckpt").write_bytes(b"")
    with pytest.raises(AezooError, match="there is no other intact checkpoint"):
        resume.latest_run(tmp_path / "vae")
    capsys.readouterr()


def test_finished_run_resumes_only_with_larger_limit(tmp_path):
    path = save(tmp_path / "checkpoints", "last.ckpt", 30)
    early = {"monitor": "val/loss", "patience": 2, "min_delta": 0.0}
    assert resume.finished_message(path, None, 3, -1, early) is None
    end = {"epoch": 3, "step": 30, "max_epochs": 3, "max_steps": -1}
    (path.parent / atomic_files.FINISHED).write_text(json.dumps(end))
    assert "nothing is left to do" in resume.finished_message(path, None, 3, -1, early)
    assert resume.finished_message(path, None, 4, -1, early) is None


def test_early_stopped_run_suggests_larger_patience(tmp_path):
    path = save(tmp_path / "checkpoints", "last.ckpt", 30)
    early = {"monitor": "val/loss", "patience": 2, "min_delta": 0.5}
    end = {"epoch": 3, "step": 30, "max_epochs": 9, "max_steps": -1, "early_stopping": early}
    (path.parent / atomic_files.FINISHED).write_text(json.dumps(end))

    def cures(max_epochs=9, max_steps=-1, **settings):
        line = resume.finished_message(path, None, max_epochs, max_steps, early | settings) or ""
        return [flag for flag in ("max_epochs", "patience") if flag in line]

    assert cures() == cures(max_epochs=20) == cures(patience=1) == ["patience"]
    assert cures(patience=3) == cures(patience=0) == cures(min_delta=0.1) == cures(monitor="val/nll") == []
    assert cures(max_epochs=3) == ["max_epochs", "patience"]
    assert cures(max_epochs=3, patience=3) == cures(max_steps=30, patience=3) == ["max_epochs"]
