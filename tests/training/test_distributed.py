"""Several processes: a failing one ends all, a restart resumes exactly, and each sample counts once."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import failing
import numpy as np
import promises
import pytest
import torch
import torch.distributed as dist
from extra_callbacks import add_callbacks
from kill_harness import MARK, processes
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from quiet_trainer import quiet_trainer
from refusals import refused
from torch.utils.data import DataLoader

from aezoo import callbacks, create_model
from aezoo.cli import trainer_settings
from aezoo.cli.main import main
from aezoo.data import DataModule
from aezoo.errors import AezooError
from aezoo.training import distributed

SCRIPT = Path(__file__).with_name("failing.py")
OFF = [f"--{name}.every_n_epochs=0" for name in ("reconstructions", "samples", "traversal", "latents", "filters")]
# without logger and pictures, which have other tests, since four processes run on two cores
FIT = [
    "fit", "--data.name=digits", "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.logger=false",
    "--projector.n=0", "--checkpoints.every_n_steps=4", *OFF,
]  # fmt: skip
VAE = ["--model=vae", "--trainer.max_epochs=3"]
# seconds: the timeout of ranks that do not answer, and the time limit of a run, including its start
TIMEOUT, ENDS = 25, 120
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def command(*argv, torchrun=()):
    return [sys.executable, *torchrun, str(SCRIPT), *argv]


def environment(fault):
    kept = {k: v for k, v in os.environ.items() if "RANK" not in k and "WORLD" not in k and not k.startswith("AEZOO_")}
    kept |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), *filter(None, sys.path)]),
    }
    return kept | ({"FAULT": fault} if fault else {})


def run(folder, *argv, fault="", torchrun=(), ends=ENDS):
    """Run a command; returns exit code, output, and the processes left 6 s after its end."""
    folder.mkdir(exist_ok=True)
    log = folder / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            command(*argv, torchrun=torchrun), cwd=folder, env=environment(fault) | {MARK: str(folder)}, stdout=out,
            stderr=out, start_new_session=True,
        )  # fmt: skip
    try:
        code = process.wait(ends)
        limit = time.monotonic() + 6
        while processes(folder) and time.monotonic() < limit:
            time.sleep(0.1)
        return code, log.read_text(), processes(folder)
    except subprocess.TimeoutExpired:
        pytest.fail(f"no end within {ends} s: {processes(folder)}\n{log.read_text()[-3000:]}")
    finally:
        for pid in processes(folder):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def trace(folder, rank):
    """The last line of each step, without the process id."""
    return {line["step"]: {**line, "pid": 0} for line in lines(folder / f"trace-{rank}.jsonl")}


def weights(folder):
    (last,) = folder.glob("runs/*/0/checkpoints/last.ckpt")
    content = torch.load(last, weights_only=True)
    return content["global_step"], content["state_dict"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes without failures."""
    folder = tmp_path_factory.mktemp("whole")
    code, log, left = run(folder, *FIT, *VAE)
    assert code == 0 and not left and "Warning" not in log, log
    return folder


def assert_same_run(folder, whole):
    for rank in (0, 1):
        assert trace(folder, rank) == trace(whole, rank)
    (step, state), (whole_step, whole_state) = weights(folder), weights(whole)
    assert step == whole_step
    for name, value in whole_state.items():
        assert torch.equal(state[name], value), name


# ---- run without failures --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_noise_differs_between_ranks_and_rank_zero_writes(whole):
    first, second = trace(whole, 0), trace(whole, 1)
    assert first.keys() == second.keys() and len(first) > 15
    for step, line in first.items():
        assert line["pixels"] != second[step]["pixels"]
        # torch, NumPy, Python
        assert all(a != b for a, b in zip(line["draws"], second[step]["draws"], strict=True))
    pids = {line["pid"] for rank in (0, 1) for line in lines(whole / f"trace-{rank}.jsonl")}
    assert len(pids) == 2
    assert not (whole / "written.jsonl").exists(), (whole / "written.jsonl").read_text()


# ---- components ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [True, False])
def test_launched_processes_end_after_an_error(monkeypatch, stopped):
    monkeypatch.setattr(distributed, "GRACE", 0.1)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    if stopped:
        process.send_signal(signal.SIGSTOP)
    strategy = SimpleNamespace(launcher=SimpleNamespace(procs=[process]))
    trainer = SimpleNamespace(strategy=strategy, world_size=1, global_rank=0)
    try:
        distributed.terminate_other_ranks(trainer, RuntimeError("any"))
        assert process.returncode == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()


def test_rank_that_ends_within_grace_is_not_killed():
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(3)"])
    strategy = SimpleNamespace(launcher=SimpleNamespace(procs=[process]))
    trainer = SimpleNamespace(strategy=strategy, world_size=1, global_rank=0)
    distributed.terminate_other_ranks(trainer, RuntimeError("any"))
    assert process.returncode == 3


def test_rank_timeout_defaults_unless_strategy_sets_it():
    for own, wanted in ((None, 20), (50, 50)):
        strategy = DDPStrategy() if own is None else DDPStrategy(timeout=timedelta(seconds=own))
        distributed.limit_wait(SimpleNamespace(strategy=strategy), 20)
        assert strategy._timeout == timedelta(seconds=wanted)


_LATE_THREAD = """
import os, sys, threading, time
from types import SimpleNamespace
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
import aezoo

model = aezoo.create_model("dense_ae", input_shape=(4,))
model._trainer = SimpleNamespace(world_size=2, strategy=DDPStrategy(), callbacks=[])
model.setup("fit")
if sys.argv[1] == "group":
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
threading.Thread(target=lambda: (time.sleep(0.05), os.write(1, b"let go")), daemon=True).start()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("group", "said"), [("group", "let go"), ("none", "")])
def test_threads_join_before_rank_interpreter_ends(group, said):
    done = subprocess.run(
        [sys.executable, "-c", _LATE_THREAD, group], env=environment(None), capture_output=True, text=True, timeout=ENDS
    )
    assert done.returncode == 0 and done.stdout == said, done.stderr


def test_ranks_of_an_attempt_agree_on_a_unique_name():
    store, wait, names = dist.HashStore(), timedelta(seconds=20), []
    # left by processes that were killed before all had an answer
    store.set("aezoo-rank-2", "dead")
    store.set("aezoo-answer-dead", "old")
    for _ in range(3):
        found = [""] * 3

        def join(rank, found=found):
            found[rank] = distributed.attempt_name(store, rank, 3, wait)

        threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found[0] and len({*found}) == 1
        names.append(found[0])
    assert len({*names, "old"}) == 4


def test_missing_rank_ends_the_wait_for_a_name():
    with pytest.raises(TimeoutError, match=r"timed out after .* s: not all 2 processes have started"):
        distributed.attempt_name(dist.HashStore(), 0, 2, timedelta(seconds=0.05))


@pytest.mark.parametrize("name", ["Checkpoints", "CodeStatistics", "Codebook", "FaultGuard", "Interrupt"])
def test_callbacks_that_communicate_extend_rank_timeout(name, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(distributed.atexit, "register", asked.append)
    trainer = Trainer(default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    for world, wanted in ((1, []), (2, [distributed._wait_for_release])):
        monkeypatch.setattr(Trainer, "world_size", world)
        getattr(callbacks, name)().setup(trainer, LightningModule(), "fit")
        assert asked == wanted


def test_position_within_epoch_needs_equal_process_count():
    data = DataModule("digits")
    data.load_state_dict({"epoch": 1, "batches": 3, "world": 1})
    data.load_state_dict({"epoch": 1, "batches": 0, "world": 2})
    with pytest.raises(AezooError, match="within an epoch, with 2 processes"):
        data.load_state_dict({"epoch": 1, "batches": 3, "world": 2})


# ---- memory ----------------------------------------------------------------------------------------------------------


class Layout(Callback):
    """Saves the final weights, and the memory layout of weights and gradients."""

    def __init__(self, folder):
        self.folder, self.last = folder, []

    def on_train_start(self, trainer, pl_module):
        warnings.filterwarnings("error", message="Grad strides do not match")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        images = [p for p in pl_module.parameters() if p.dim() == 4]
        self.last += [t.is_contiguous(memory_format=torch.channels_last) for p in images for t in (p, p.grad)]

    def on_train_end(self, trainer, pl_module):
        held = {"weights": pl_module.state_dict(), "last": self.last}
        torch.save(held, self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


class Halves(DataLoader):
    """Each rank has half of each batch."""

    def __iter__(self):
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return (x.chunk(world)[rank] for x in super().__iter__())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(no `val_dataloader`|many workers|LeafSpec)")
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_matches_in_multi_process_training(tmp_path, channels):
    x = torch.rand(24, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    for devices in (1, 2):
        torch.manual_seed(0)
        model = create_model("conv_ae", (channels, 8, 8), hidden_dims=(6, 8), latent_dim=4)
        trainer = quiet_trainer(
            devices=devices, strategy="ddp_fork" if devices == 2 else "auto", max_epochs=2,
            use_distributed_sampler=False, callbacks=[Layout(tmp_path)],
        )  # fmt: skip
        trainer.fit(model, Halves(x, 8))
    one, *both = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    assert len(one["last"]) == 2 * 4 * 6 and all(one["last"])
    for rank in both:
        assert rank["last"] == one["last"]
        for name, weight in one["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight, rtol=1e-4, atol=1e-5)


def test_untested_strategies_are_refused(capsys):
    message = "strategy FSDPStrategy is not supported: use auto or ddp, with which each process has the whole model"
    model = create_model("dense_ae", (4,), hidden_dims=(), latent_dim=2)
    for strategy in (FSDPStrategy(), DeepSpeedStrategy.__new__(DeepSpeedStrategy), ModelParallelStrategy()):
        model._trainer = SimpleNamespace(strategy=strategy)
        with pytest.raises(AezooError, match=message.replace("FSDPStrategy", type(strategy).__name__)):
            model.setup("fit")
    for name in ("fsdp", "deepspeed_stage_2", "lightning.pytorch.strategies.ModelParallelStrategy", "tpu"):
        said = refused(capsys, "fit", "--model=vae", "--data.name=digits", f"--trainer.strategy={name}")
        assert f"strategy {name.rpartition('.')[2]} is not supported: use auto or ddp" in said


@pytest.mark.parametrize("name", ["auto", "ddp", "ddp_spawn", "ddp_find_unused_parameters_true", DDPStrategy()])
def test_spellings_of_ddp_are_accepted(name, monkeypatch):
    trainer = quiet_trainer(devices=1, strategy=name, max_epochs=1, logger=False)
    distributed.check_strategy(trainer)
    trainer_settings.check({"strategy": name})


# ---- a rank that fails -----------------------------------------------------------------------------------------------


def count(case, **counts):
    promises.add("ranks", case, counts)


def end_of(folder, rank, kind, *more, **options):
    """Let a rank fail after 10 steps, in the middle of an epoch of 6, and check the remaining processes and files."""
    code, log, left = run(folder, *FIT, *VAE, f"--rank_timeout={TIMEOUT}", *more, fault=f"{rank}:10:{kind}", **options)
    assert code != 0, log
    assert not left, f"left behind: {left}\n{log}"
    assert (folder / "failed").exists(), log
    step, state = weights(folder)
    assert step == 8 and all(value.isfinite().all() for value in state.values())
    return log


# other tests also cover a raising rank (another number of processes) and a frozen one (restart by torchrun)
FAILURES = [("kill", 0)]
OTHERS = [("freeze", 1), ("raise", 0), ("raise", 1), ("kill", 1), ("freeze", 0)] if promises.is_recording() else []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rank"), [*FAILURES, *OTHERS])
def test_failed_rank_ends_run_and_resume_is_exact(tmp_path, whole, rank, kind):
    log = end_of(tmp_path, rank, kind)
    # the last error is its own, not that of the other rank
    assert kind != "raise" or log.rstrip().endswith("RuntimeError: the rank that raises"), log
    assert not [*tmp_path.rglob(".rank-*")]
    code, log, _ = run(tmp_path, *FIT, *VAE, "--resume=auto")
    assert code == 0, log
    assert_same_run(tmp_path, whole)
    count(f"{kind} {rank}", runs=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["raise", "kill", "freeze"] if promises.is_recording() else ["freeze"])
def test_torchrun_restart_resumes_exactly(tmp_path, whole, kind):
    code, log, left = run(
        tmp_path, *FIT, *VAE, f"--rank_timeout={TIMEOUT}", "--resume=auto", fault=f"1:10:{kind}",
        torchrun=[*TORCHRUN, "--max-restarts=1"], ends=180,
    )  # fmt: skip
    assert code == 0 and not left and (tmp_path / "failed").exists(), log
    assert_same_run(tmp_path, whole)
    count(f"torchrun {kind}", runs=1, restarts=1)


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


@pytest.mark.slow
def test_restarted_agent_resumes_run_exactly(tmp_path, whole):
    meet = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-id=run",
            "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]  # fmt: skip
    fit = [*FIT, *VAE, "--trainer.devices=1", "--trainer.num_nodes=2", "--resume=auto", f"--rank_timeout={TIMEOUT}"]
    own = environment("1:10:agent") | {MARK: str(tmp_path), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    began, logs = [], []

    def agent(host):
        logs.append((tmp_path / f"log-{len(logs)}.txt").open("w+"))
        conf = f"--rdzv-conf=is_host={host},keep_alive_interval=1"
        began.append(subprocess.Popen(
            command(*fit, torchrun=[*meet, conf]), cwd=tmp_path, stdout=logs[-1], stderr=logs[-1],
            env=own, start_new_session=True,
        ))  # fmt: skip
        return began[-1]

    try:
        first, second = agent(1), agent(0)
        # the order of agents depends on their addresses and process ids
        assert second.wait(ENDS) == -signal.SIGKILL and first.poll() is None
        # after the other worker has failed, too: the agents then count different numbers of restarts
        limit = time.monotonic() + ENDS
        while [*processes(tmp_path)] != [first.pid] and time.monotonic() < limit:
            time.sleep(0.1)
        third = agent(0)
        assert [one.wait(2 * ENDS) for one in (first, third)] == [0, 0]
        assert_same_run(tmp_path, whole)
        assert not [*tmp_path.rglob(".shared-*")]
    except (AssertionError, subprocess.TimeoutExpired):
        for log in logs:
            log.seek(0)
            print(log.read()[-5000:], "=" * 20)
        raise
    finally:
        for pid in processes(tmp_path):
            os.kill(pid, signal.SIGKILL)
        for one in began:
            one.wait()
        for log in logs:
            log.close()


@pytest.mark.parametrize("shared", [True, False])
def test_machines_without_a_shared_folder_are_refused(tmp_path, monkeypatch, shared):
    monkeypatch.setattr(distributed, "_SHARED_SECONDS", 0.2)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda told: None)
    monkeypatch.setattr(dist, "all_gather_object", lambda found, seen: found.__setitem__(slice(None), [seen, shared]))
    if shared:
        distributed.check_shared_folder(tmp_path, 0)
    else:
        with pytest.raises(AezooError, match=r"rank 1 does not see .*: give a folder that all machines share"):
            distributed.check_shared_folder(tmp_path, 0)
    assert not [*tmp_path.iterdir()]


# ---- each sample counts once -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_uneven_shards_finish_and_count_samples_once(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    # one rank without validation samples; several test batches per rank
    n_val, n_test = 1, 15
    np.savez(tmp_path / "data.npz", x=rng.random((63, 6)), x_val=rng.random((n_val, 6)), x_test=rng.random((n_test, 6)))
    model = ["--model=dense_ae", "--data.name=data.npz", "--data.batch_size=4", "--trainer.max_epochs=2"]
    code, log, left = run(tmp_path, *FIT, *model)
    assert code == 0 and not left, log
    steps = trace(tmp_path, 0)
    assert [line["n"] for line in steps.values()] == [line["n"] for line in trace(tmp_path, 1).values()]
    # the fit validates after each epoch, and tests the best weights at the end
    figures = lines(tmp_path / "figures.jsonl")
    assert len(figures) == 3
    (best,) = tmp_path.glob("runs/*/0/checkpoints/best-*.ckpt")
    epoch = torch.load(best, weights_only=True)["epoch"]
    monkeypatch.chdir(tmp_path)
    add_callbacks(failing.Failing(), setattr=monkeypatch.setattr)
    for stage, of_two in (("val", figures[epoch]), ("test", figures[-1])):
        main(["validate" if stage == "val" else "test", f"--ckpt_path={best}", "--trainer.accelerator=cpu"])
        of_one = {name: value for name, value in lines(Path("figures.jsonl"))[-1].items() if name.startswith(stage)}
        assert len(of_one) >= 4
        for name, value in of_one.items():
            assert of_two[name] == pytest.approx(value, rel=1e-6), name


# ---- another number of processes -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_other_process_count_resumes_only_between_epochs(tmp_path, whole, monkeypatch, capsys):
    alone = ["fit", *VAE, "--trainer.devices=1"]
    # a copy, since resuming writes to the folder of the checkpoint, and other tests use `whole`
    (checkpoints,) = Path(shutil.copytree(whole, tmp_path / "end")).glob("runs/*/0/checkpoints")
    monkeypatch.chdir(tmp_path / "end")
    main([*alone, f"--ckpt_path={checkpoints}/last.ckpt", "--trainer.max_epochs=4"])
    end_of(tmp_path / "within", 1, "raise")
    (last,) = (tmp_path / "within").glob("runs/*/0/checkpoints/last.ckpt")
    monkeypatch.chdir(tmp_path / "within")
    capsys.readouterr()
    assert "within an epoch, with 2 processes" in refused(capsys, *alone, f"--ckpt_path={last}")


@pytest.mark.slow
def test_port_in_use_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = str(held.getsockname()[1])
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", port)
        line = refused(capsys, *FIT, *VAE, "--trainer.devices=1", "--trainer.strategy=ddp")
    assert line.startswith(f"aezoo: port {port} of 127.0.0.1, at which the processes connect, is in use")
    assert "set MASTER_PORT" in line


class Ended:
    """A process that has ended."""

    def poll(self):
        return 1


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("Connection closed by peer [127.0.0.1]:1", "rank 1: ValueError: w"),
        ("Distributed package doesn't have NCCL built in", None),
    ],
)
def test_notes_of_ranks_are_removed_whether_used_or_not(tmp_path, message, said):
    launcher = SimpleNamespace(procs=[Ended()])
    trainer = SimpleNamespace(
        global_rank=0, world_size=2, default_root_dir=str(tmp_path), strategy=SimpleNamespace(launcher=launcher)
    )
    note = distributed._note(trainer, 1, os.getpid())
    note.write_text("rank 1: ValueError: w")
    assert distributed.terminate_other_ranks(trainer, RuntimeError(message)) == said
    assert not note.exists() and launcher.procs == []
