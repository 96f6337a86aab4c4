"""The benchmark of other libraries: equal networks and losses, environments, continued runs, and targets."""

import contextlib
import csv
import json
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing import event_accumulator

from aezoo.errors import AezooError
from aezoo.speed.denormals import flushed_denormals
from aezoo.training.compilation import worth_compiling
from benchmarks import environments, peer_runs, peers, targets
from benchmarks.common import file_lock, read_csv
from benchmarks.peer_scripts import aezoo_cli, keras_fit, loops, networks
from benchmarks.peer_scripts.job import Job
from benchmarks.workloads import WORKLOADS, build_model, images, write_inputs

RATES = {"loop": 1000.0, "aezoo": 950.0, "lightning": 400.0, "keras_jax": 900.0}


def job_for(workload, folder, **changes):
    """A job of a few rows with files in `folder`."""
    load = WORKLOADS[workload]
    write_inputs(load, 64, 0, folder)
    values = {name: getattr(load, name) for name in ("shape", "hidden_dims", "latent_dim", "variational", "lr")}
    values |= {"data": str(folder / "data.npz"), "weights": str(folder / "weights.npz")}
    return Job(**(values | {"party": "loop", "rows": 64, "batch": 32, "epochs": 2} | changes))


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """`peers.main` with fake runs: records each call's party and precision, and has settings that tests change."""
    state = types.SimpleNamespace(calls=[], losses={}, parameters={}, fail=set(), accelerators=set())

    def train(python, job, timeout, pin):
        state.calls.append((job.party, job.precision, job.options))
        state.accelerators.add(job.accelerator)
        if (job.party, len(state.calls)) in state.fail:
            raise peer_runs.RunFailure("killed by SIGKILL")
        turn = sum(call[0] == job.party for call in state.calls) - 1
        # the second round is slow for all parties
        rate = RATES.get(job.party, 500.0) * (0.5 if turn == 1 else 1.0)
        losses = state.losses.get(job.party, [200.0, 150.0, 140.0])
        return {
            "rates": [1.0, rate, rate],
            "turns": [1.0, rate, rate / 3],
            "losses": losses,
            "first_step_s": 1.5,
            "parameters": state.parameters.get(job.party, 10),
            "versions": {"torch": "2.13"},
            "peak_rss_mb": 100.0,
            "cores_used": 1.0,
        }

    monkeypatch.setattr(peers, "train", train)
    monkeypatch.setattr(peers, "python_for", lambda party, folder, accelerator: sys.executable)
    monkeypatch.setattr(peers, "write_inputs", lambda *_: 10)

    def run(*words, parties=("loop", "aezoo", "lightning", "keras_jax"), repeats="3"):
        words = ["dense", *words, "--parties", *parties, "--repeats", repeats, "--results", str(tmp_path)]
        code = peers.main(words)
        (path,) = tmp_path.glob(f"peers-dense-{'bf16' if 'bf16' in words else 'fp32'}-*.csv")
        return code, {row["party"]: row for row in read_csv(path)[1]}

    state.run, state.folder = run, tmp_path
    return state


def test_ratios_are_taken_within_a_round(fake):
    code, rows = fake.run("--envs", "/somewhere")
    assert code == 0
    assert [rows["aezoo"][name] for name in ("ratio", "ratio_min", "ratio_max")] == ["0.95"] * 3
    assert (rows["aezoo"]["samples_per_s"], rows["aezoo"]["samples_per_s_min"]) == ("950", "475")
    assert rows["aezoo"]["round_rates"] == "950 475 950"
    # twice the samples in four times the seconds of one epoch
    assert rows["aezoo"]["wall_samples_per_s"] == "475"
    assert rows["aezoo"]["outside_share"] == "0.5"
    assert {row["agrees"] for row in rows.values()} == {"yes"}
    # the order alternates between rounds
    assert [call[0] for call in fake.calls[3:5]] == ["keras_jax", "keras_jax"]
    (path,) = fake.folder.glob("*.csv")
    assert "/somewhere" not in path.read_text() and not [*fake.folder.glob("*.part")]


def test_machine_name_separates_result_files(fake):
    fake.run()
    before = {path: path.read_bytes() for path in fake.folder.glob("*.csv")}
    peers.main(["dense", "--machine", "zen4", "--parties", "loop", "aezoo", "--results", str(fake.folder)])
    (path,) = before
    assert {path: path.read_bytes()} == before
    named = path.with_stem(f"{path.stem}-zen4")
    assert {*fake.folder.glob("*.csv")} == {path, named}
    assert "--machine zen4" in read_csv(named)[0][0]
    peers.main(["dense", "--rows", "640", "--parties", "loop", "aezoo", "--results", str(fake.folder)])
    (short,) = fake.folder.glob("peers-dense640rows-*.csv")
    assert {*fake.folder.glob("*.csv")} == {path, named, short}
    # targets are computed for each file
    stems = [
        stem
        for target, stem, _ in targets.evaluate_targets({path.stem: [], named.stem: []})
        if "dense, fp32: " in target.what
    ]
    assert {*stems} == {path.stem, named.stem}


@pytest.mark.parametrize("name", ["", "Zen4", "zen-4", "../zen4"])
def test_invalid_machine_name_is_refused(fake, capsys, name):
    with pytest.raises(SystemExit) as left:
        peers.main(["dense", "--machine", name])
    assert left.value.code == 2 and "lowercase letters and digits" in capsys.readouterr().err


@pytest.mark.parametrize(
    "losses", [[200.0, 150.0, 130.0], [200.0, 150.0], [200.0, 150.0, float("nan")], [200.0, float("inf"), 140.0]]
)
def test_peer_with_different_losses_is_reported(fake, capsys, losses):
    fake.losses["lightning"] = losses
    code, rows = fake.run()
    assert code == 1
    assert {party: row["agrees"] for party, row in rows.items() if row["agrees"] != "yes"} == {"lightning": "no"}
    assert "differ from the loop's: lightning" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lightning_bf16_rounding_differences_are_tolerated(fake, precision):
    # 1.5 %, more than the workload's tolerance
    fake.losses |= {party: [200.0, 150.0, 142.1] for party in ("aezoo", "lightning")}
    _, rows = fake.run("--precision", precision)
    assert {party: row["agrees"] for party, row in rows.items()} == {
        **{"loop": "yes", "aezoo": "no", "keras_jax": "yes"},
        "lightning": "yes" if precision == "bf16" else "no",
    }
    fake.losses["lightning"] = [200.0, 150.0, 143.5]
    assert fake.run("--precision", precision, "--again")[1]["lightning"]["agrees"] == "no"


def test_different_parameter_count_disagrees(fake):
    fake.parameters["aezoo"] = 9
    code, rows = fake.run()
    assert code == 1 and rows["aezoo"]["agrees"] == "no"


def test_failed_run_is_kept_and_only_it_is_retried(fake):
    fake.fail = {("aezoo", 2)}
    code, rows = fake.run()
    assert code == 1 and rows["aezoo"]["error"] == "killed by SIGKILL"
    assert rows["aezoo"]["round_rates"].split()[0] == "-" and rows["aezoo"]["repeats"] == "2"
    before = len(fake.calls)
    code, rows = fake.run()
    assert code == 0 and [call[0] for call in fake.calls[before:]] == ["aezoo"]
    assert not rows["aezoo"]["error"] and "-" not in rows["aezoo"]["round_rates"]
    assert fake.run() == (0, rows) and len(fake.calls) == before + 1  # nothing is left to do


def test_reference_loop_is_required(fake):
    with pytest.raises(AezooError, match="add 'loop' to --parties"):
        fake.run(parties=("aezoo", "lightning"))


def test_bf16_runs_use_peers_that_support_it(fake):
    fake.run("--precision", "bf16", parties=("loop", "aezoo_compiled", "lightning", "lightning_bf16"), repeats="1")
    compiled = ("--compile", "default")
    assert fake.calls == [
        ("loop", "bf16", ()),
        ("aezoo_compiled", "bf16", compiled),
        ("lightning", "fp32", ()),
        ("lightning_bf16", "bf16", ()),
    ]
    assert not any(party.endswith("_bf16") for party in peers.default_parties("fp32"))
    assert "keras_jax_bf16" in peers.default_parties("bf16")


def test_gpu_results_have_their_own_file(fake, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    words = ("loop", "loop_graph", "aezoo_compiled", "keras_jax")
    _, rows = fake.run("--accelerator", "cuda", parties=words, repeats="1")
    (path,) = fake.folder.glob("*.csv")
    assert path.stem.endswith("-nvidia-h100-80gb-hbm3") and rows.keys() == {*words}
    assert fake.accelerators == {"cuda"} and "--accelerator cuda" in read_csv(path)[0][0]
    assert ("aezoo_compiled", "fp32", ("--compile", "reduce-overhead")) in fake.calls
    assert peers.party_precision("loop_graph", "bf16") == "bf16"
    # on the CPU, the same machine has another file, whatever GPU it has
    fake.accelerators.clear()
    peers.main(["dense", "--parties", "loop", "--results", str(fake.folder)])
    assert fake.accelerators == {"cpu"} and len([*fake.folder.glob("*-cpu*.csv")]) == 1


def test_different_command_does_not_replace_rows_without_flag(fake, capsys):
    fake.run()
    (path,) = fake.folder.glob("*.csv")
    before, calls = path.read_bytes(), len(fake.calls)
    assert fake.run()[0] == 0 and "already exists" in capsys.readouterr().out
    with pytest.raises(AezooError, match=r"the rows of another command, python -m benchmarks.peers dense .* --again"):
        fake.run("--epochs", "2")
    assert path.read_bytes() == before and len(fake.calls) == calls
    fake.run("--epochs", "2", "--again")
    assert path.read_bytes() != before


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_concurrent_run_into_same_file_is_refused(fake):
    fake.run()
    (path,) = fake.folder.glob("*.csv")
    part, before = path.with_suffix(".runs.part"), path.read_bytes()
    with file_lock(part):
        part.write_text("theirs")
        with pytest.raises(AezooError, match=r"another run is writing .*runs\.part: wait for it"):
            fake.run("--again")
        assert part.read_text() == "theirs" and path.read_bytes() == before
    fake.run("--again")
    assert not part.exists()


def test_gpu_options_are_refused_without_gpu(fake, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(AezooError, match=r"^--accelerator cuda: torch finds no GPU; .* or use cpu$"):
        fake.run("--accelerator", "cuda")
    with pytest.raises(AezooError, match=r"^loop_graph is a CUDA graph: add --accelerator cuda, or leave it out"):
        fake.run(parties=("loop", "loop_graph"))
    assert not fake.calls and not [*fake.folder.iterdir()]
    assert {*peers.PARTIES} - {*peers.default_parties("bf16")} == {"loop_graph"}
    assert {*peers.default_parties("bf16", "cuda")} == {*peers.PARTIES}
    with pytest.raises(SystemExit):
        peers.parse_arguments(["dense", "--accelerator", "mps"])


# ---- the parties -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workload", WORKLOADS)
def test_reimplemented_networks_match_zoo_models(tmp_path, workload):
    load = WORKLOADS[workload]
    network, zoo = networks.Network(job_for(workload, tmp_path)), build_model(load, 0)
    x = torch.from_numpy(images(2, load.shape, 0)).float() / 255
    with torch.no_grad():
        z = network.posterior(x)[0] if load.variational else network.encoder(x)
        torch.testing.assert_close(z, zoo.encode(x))
        x_hat = network.decoder(z).sigmoid()
        torch.testing.assert_close(x_hat, zoo.decode(z).reshape(x_hat.shape))
    for way in (networks.loss_on_logits, networks.loss_on_probabilities):
        torch.manual_seed(0)
        loss = way(network, x, load.variational)
        torch.manual_seed(0)
        # both draw the noise first
        torch.testing.assert_close(loss, zoo.train().loss(x)["loss"], rtol=1e-4, atol=0)


def test_keras_kernels_are_flipped_for_padding(tmp_path):
    job = job_for("conv28", tmp_path)
    network, x = networks.Network(job), torch.rand(2, 1, 28, 28)
    kernel, bias = (torch.from_numpy(np.ascontiguousarray(array)) for array in keras_fit._weights(job)[:2])
    # `same` padding with stride 2 on an even grid: a row and a column after the last, none before the first
    theirs = F.conv2d(F.pad(x.flip(2, 3), (0, 1, 0, 1)), kernel.permute(3, 2, 0, 1), bias, stride=2)
    torch.testing.assert_close(theirs.flip(2, 3), network.encoder[0](x))


def test_sample_order_depends_on_epoch_only(tmp_path):
    order = networks.EpochOrderSampler(job_for("dense", tmp_path), 64)
    first, second = [*order], [*order]
    assert sorted(first) == sorted(second) == [*range(64)] and first != second
    order.set_epoch(0)
    assert next(iter(order)) == first[0] and [*order] == first  # reading the first row changes nothing


@pytest.mark.slow
def test_peer_losses_match_reference_loop(tmp_path, monkeypatch):
    job = job_for("dense", tmp_path)
    monkeypatch.chdir(tmp_path)
    with flushed_denormals():  # the loop leaves it enabled, and other tests in this process need denormals
        reference = loops.compiled(Job(**(vars(job) | {"options": ("no-compile", "no-malloc")})))
    assert loops.textbook(job)["losses"] == pytest.approx(reference["losses"], rel=1e-4)
    for party in ("aezoo", "lightning", "pytorch_vae"):
        found = peer_runs.train(sys.executable, Job(**(vars(job) | {"party": party})), timeout=120)
        assert found["losses"] == pytest.approx(reference["losses"], rel=1e-4), party
        assert found["parameters"] == reference["parameters"] == 222_384
        assert len(found["rates"]) == 2 and all(rate > 0 for rate in found["rates"]) and found["first_step_s"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("workload", ["dense", "conv28"])
@pytest.mark.parametrize("warm_up", [0, 3])
def test_graph_step_losses_match_reference_loop(tmp_path, workload, warm_up):
    """On the CPU without a graph, after a warm-up that must have no effect; the last batch is smaller."""
    job = job_for(workload, tmp_path, batch=24)
    recorded = []

    def record(step):
        recorded.append(step)
        noise = torch.get_rng_state()
        for _ in range(warm_up):
            step()
        torch.set_rng_state(noise)
        return step

    with flushed_denormals():
        reference = loops.compiled(Job(**(vars(job) | {"options": ("no-compile", "no-malloc")})))
        found = loops.graph(job, record)
    assert found["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    assert found["parameters"] == reference["parameters"] and len(recorded) == 2


def test_clock_synchronises_device_before_reading(monkeypatch, tmp_path):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(len(clock.begins) + len(clock.seconds)))
    clock = networks.build_clock(job_for("dense", tmp_path, accelerator="cuda"))
    clock.begin()
    clock.record_step()
    clock.record_step()  # only the first is timed
    clock.end(1.0)
    assert waited == [0, 1, 1]
    clock = networks.build_clock(job_for("dense", tmp_path))
    clock.begin()
    clock.record_step()
    assert len(waited) == 3


def test_run_environment_selects_device(monkeypatch, tmp_path):
    for given, seen in ((None, "0"), ("3,1", "3")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if given:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        cpu, cuda = peer_runs.thread_environment(2), peer_runs.thread_environment(2, "cuda")
        assert (cpu["CUDA_VISIBLE_DEVICES"], cpu["JAX_PLATFORMS"]) == ("", "cpu")
        # one GPU, without a fallback to the CPU
        assert (cuda["CUDA_VISIBLE_DEVICES"], cuda["JAX_PLATFORMS"]) == (seen, "cuda,cpu")
        assert cpu["OMP_NUM_THREADS"] == cuda["OMP_NUM_THREADS"] == "2"
    assert "--trainer.accelerator" not in aezoo_cli.arguments(job_for("dense", tmp_path))
    words = aezoo_cli.arguments(job_for("dense", tmp_path, accelerator="cuda"))
    assert words[words.index("--trainer.accelerator") + 1] == "gpu"


@pytest.mark.slow
def test_peer_wall_time_includes_validation_and_checkpoint(tmp_path, monkeypatch):
    home = tmp_path / "run"
    home.mkdir()
    monkeypatch.setattr(peer_runs.tempfile, "TemporaryDirectory", lambda: contextlib.nullcontext(str(home)))
    monkeypatch.setenv("TERM", "dumb")
    found = peer_runs.train(sys.executable, job_for("dense", tmp_path, party="aezoo"), timeout=120)
    log = (home / "log").read_text()
    # hides the cursor, draws a coloured bar, and clears the line
    assert all(part in log for part in ("\x1b[?25l", "Epoch 2/2", "\u2501", "\x1b[2K"))
    (events,) = home.glob("runs/*/*/events*")
    read = event_accumulator.EventAccumulator(str(events)).Reload()
    began, ended = (event.wall_time for event in read.Scalars("train/loss"))
    saved = [(events.parent / "checkpoints" / f"{name}.ckpt").stat().st_mtime for name in ("previous", "last")]
    for times in (saved, [event.wall_time for event in read.Scalars("val/loss")]):
        assert len(times) == 2 and sum(began < time <= ended for time in times) == 1
    assert found["turns"] == pytest.approx([64 / (ended - began)])


def test_party_without_terminal_reports_plain_errors(tmp_path, monkeypatch):
    home = tmp_path / "run"
    home.mkdir()
    monkeypatch.setattr(peer_runs.tempfile, "TemporaryDirectory", lambda: contextlib.nullcontext(str(home)))
    script = home / "python"
    follows = 'test "$5" = follow && test -p /dev/stdin || exit 4'
    coloured = "test -t 1 && printf '\\033[1;35mValueError\\033[0m: a terminal\\n'"
    script.write_text(f"#!/bin/sh\n{follows}\n{coloured}\nexit 3\n")
    script.chmod(0o755)
    for party, said in (("aezoo", "exit code 3: ValueError: a terminal"), ("loop", "exit code 3: ")):
        with pytest.raises(peer_runs.RunFailure) as failure:
            peer_runs.train(str(script), job_for("dense", tmp_path, party=party), timeout=60)
        assert str(failure.value) == said
        peer_runs.shutil.rmtree(home / "peer_scripts")


@pytest.mark.slow
def test_failed_run_reports_its_error(tmp_path):
    job = job_for("dense", tmp_path, weights=str(tmp_path / "absent.npz"), party="loop_eager")
    with pytest.raises(peer_runs.RunFailure, match=r"exit code 1: FileNotFoundError: .*absent\.npz"):
        peer_runs.train(sys.executable, job, timeout=120)
    with pytest.raises(peer_runs.RunFailure, match=r"no result after 0\.01 s"):
        peer_runs.train(sys.executable, job, timeout=0.01)


def test_truncated_run_record_is_ignored(tmp_path):
    part = peer_runs.RunsFile(tmp_path / "x.part", {"rows": 1})
    part.add("loop", 0, result={"rates": [1.0]})
    with part.path.open("a") as file:
        file.write('\n{"party": "aezoo", "rou')
    again = peer_runs.RunsFile(part.path, {"rows": 1})
    again.add("aezoo", 0, result={})
    assert peer_runs.RunsFile(part.path, {"rows": 1}).runs.keys() == {("loop", 0), ("aezoo", 0)}
    assert not peer_runs.RunsFile(part.path, {"rows": 2}).runs
    assert json.loads(part.path.read_text()) == {"settings": {"rows": 2}}


def test_unwritable_record_is_reported_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AezooError, match=r"cannot write .*x\.part: .*; give another folder by --results"):
        peer_runs.RunsFile(tmp_path / "file" / "x.part", {})
    part = peer_runs.RunsFile(tmp_path / "x.part", {})
    part.path.unlink()
    part.path.mkdir()
    with pytest.raises(AezooError, match=r"cannot write .*x\.part: Is a directory"):
        part.add("loop", 0, error="it broke")


@pytest.mark.parametrize("wrong", [("--rows", "0"), ("--threads", "x"), ("--timeout", "nan"), ("--timeout", "0")])
def test_invalid_numeric_arguments_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        peers.parse_arguments(["dense", *wrong])
    assert f"argument {wrong[0]}: '{wrong[1]}' is not a " in capsys.readouterr().err


# ---- environments ----------------------------------------------------------------------------------------------------


@pytest.fixture
def pip(monkeypatch):
    """Virtual environments without Python; records the arguments of pip, and sets its exit code."""
    state = types.SimpleNamespace(asked=[], code=0)

    def create(home, **_):
        for folder in ("bin", "lib/python3.11/site-packages"):
            (home / folder).mkdir(parents=True, exist_ok=True)
        (home / "bin/python").touch()

    def run(command, **_):
        state.asked.append(command[4:])
        return subprocess.CompletedProcess(command, state.code, "", "ERROR: first\nERROR: no such package\n")

    monkeypatch.setattr(environments.venv, "create", create)
    monkeypatch.setattr(environments.subprocess, "run", run)
    return state


def test_environment_is_created_once(pip, tmp_path, capsys):
    assert environments.python_for("loop", tmp_path) == sys.executable
    python = environments.python_for("keras_tensorflow", tmp_path)
    assert python == str(tmp_path / "keras_tensorflow/bin/python")
    assert environments.python_for("keras_tensorflow_bf16", tmp_path) == python
    assert pip.asked == [["--quiet", "keras>=3,<4", "tensorflow-cpu"]]
    assert not [*tmp_path.rglob("shared.pth")]
    environments.python_for("pythae", tmp_path)
    (shared,) = tmp_path.rglob("shared.pth")
    assert shared.read_text().strip() in sys.path  # the site-packages with torch


def test_gpu_environment_depends_on_its_packages(pip, tmp_path):
    homes = {environments.python_for(party, tmp_path, "cuda") for party in ("keras_jax", "keras_jax_bf16", "pythae")}
    assert homes == {str(tmp_path / name / "bin/python") for name in ("keras_jax_cuda", "pythae")}
    assert [asked[1:] for asked in pip.asked] == [["keras>=3,<4", "jax[cuda12]"], ["pythae"]]
    assert environments.python_for("keras_jax", tmp_path) == str(tmp_path / "keras_jax/bin/python")
    assert environments.python_for("loop_graph", tmp_path, "cuda") == sys.executable


def test_failed_environment_drops_only_its_party(pip, tmp_path, fake, monkeypatch):
    pip.code = 1
    with pytest.raises(environments.EnvironmentFailure, match="no environment for pythae: ERROR: no such package"):
        environments.python_for("pythae", tmp_path)
    monkeypatch.setattr(peers, "python_for", environments.python_for)
    code, rows = fake.run("--envs", str(tmp_path), parties=("loop", "pythae"), repeats="1")
    assert code == 1 and "no such package" in rows["pythae"]["error"] and rows["loop"]["ratio"] == "1"


# ---- targets ---------------------------------------------------------------------------------------------------------


def peer(party, rates, agrees="yes"):
    return {"party": party, "round_rates": rates, "agrees": agrees}


def test_target_ratio_is_taken_within_rounds():
    rows = [peer("aezoo", "200 90 210 -"), peer("keras_jax", "100 100 100 100"), peer("loop", "- 100 200 100")]
    rows.append(peer("pythae", "1 1 1 1", agrees="no"))
    found = targets.ratio_between("aezoo", "keras_jax")(rows)
    assert found == (2.0, 0.9, 2.1, "")
    assert targets.ratio_between("aezoo", "loop")(rows)[:3] == pytest.approx((0.975, 0.9, 1.05))
    assert (
        targets.ratio_between("aezoo", "pythae")(rows) is None
        and targets.ratio_between("aezoo", "lightning")(rows) is None
    )
    stem = "peers-conv28-fp32-pt2.13-cpu2"
    rows[1]["party"] = "keras_tensorflow"
    judged = {target.what: found for target, file, found in targets.evaluate_targets({stem: rows}) if file == stem}
    assert judged["conv28, fp32: aezoo / keras_tensorflow"] == found and judged["conv28, fp32: aezoo / pythae"] is None
    assert targets.missed_targets({stem: rows}) == []
    why = {
        target.what: targets.missing_reason(target, rows) for target in targets.TARGETS if stem.startswith(target.file)
    }
    assert why["conv28, fp32: aezoo / pythae"] == "losses differ: pythae"
    assert why["conv28, fp32: aezoo / lightning"] == "not measured"
    missed = targets.missed_targets({stem: [peer("aezoo", "90"), peer("loop", "100")]})
    assert missed == [f"conv28, fp32: aezoo / loop ({stem})"]


def test_dense_targets_use_the_compiled_step():
    """Compiled as by `--compile auto` in long runs, without the time of compilation; the other choice is shown, too."""
    rows = [peer("aezoo", "90 80"), peer("aezoo_compiled", "100 110"), peer("loop", "100 100")]
    for workload, ours, otherwise in (("dense", (1.05, "compiled"), 0.85), ("conv64", (0.85, ""), 1.05)):
        (target,) = (t for t in targets.TARGETS if t.what == f"{workload}, fp32: aezoo / loop")
        found = target.measure(rows)
        assert (found.median, found.note) == (pytest.approx(ours[0]), ours[1])
        assert target.other_compilation(rows).median == pytest.approx(otherwise)
    length = {"parameters": 222_384, "batch_size": 256, "positions": 1, "device": torch.device("cpu")}
    assert worth_compiling(steps=60_000 * torch.get_num_threads(), **length)
    assert not worth_compiling(steps=30_000 * torch.get_num_threads(), **length)


def test_gpu_targets_use_gpu_files_only():
    rows = [
        peer("aezoo_compiled", "95 90"),
        peer("loop_graph", "100 100"),
        peer("lightning", "9 10"),
        peer("loop", "1"),
    ]
    card, cpu = "peers-dense-fp32-pt2.13-nvidia-h100-80gb-hbm3", "peers-dense-fp32-pt2.13-cpu2-zen5"
    judged = {
        target.what: found for target, file, found in targets.evaluate_targets({card: rows, cpu: rows}) if file == card
    }
    assert judged.keys() == {f"dense, fp32, on a GPU: aezoo / {party}" for party in ("loop_graph", "lightning")}
    assert judged["dense, fp32, on a GPU: aezoo / loop_graph"][:3] == pytest.approx((0.925, 0.9, 0.95))
    assert targets.missed_targets({card: rows}) == [f"dense, fp32, on a GPU: aezoo / lightning ({card})"]
    assert not any("on a GPU" in target.what for target, _, _ in targets.evaluate_targets({cpu: rows}))
    mac = "peers-dense-fp32-pt2.13-mps"
    assert not any(
        "on a GPU" in target.what for target, file, _ in targets.evaluate_targets({mac: rows}) if file == mac
    )


def test_targets_name_existing_peers_and_workloads():
    for target in targets.TARGETS:
        kind, _, rest = target.file.partition("-")
        if kind == "peers":
            size = re.fullmatch(rf"(?:{'|'.join(WORKLOADS)})(\d+rows)?", rest.split("-")[0])[1]
            assert size or target.what.rsplit(" ", 1)[1] in peers.PARTIES


def test_time_outside_of_training_is_a_target_of_short_epochs():
    rows = [{"party": "loop", "batch": "64", "outside_share": "0"}]
    rows.append({"party": "aezoo", "batch": "64", "outside_share": "0.125", "agrees": "no"})
    found = targets.evaluate_targets({"peers-dense640rows-fp32-pt2.13-cpu2": rows})
    judged = [(target.what, measured) for target, _, measured in found if measured]
    assert [(what.split(":")[0], measured.median) for what, measured in judged] == [
        ("dense, fp32, 10 steps per epoch", 0.125)
    ]


def test_remaining_targets_are_computed_from_rows():
    row = {"name": "dense_article", "compile": "off", "devices": "1", "threads": "1"}
    row |= {"gemm_floor_share": "0.5", "samples_per_s": "100", "samples_per_s_low": "90", "samples_per_s_high": "120"}
    best = row | {"compile": "default", "gemm_floor_share": "0.7"}
    share = targets.gemm_share("dense_article")([row, best, best | {"name": "vae", "gemm_floor_share": "0.9"}])
    assert share[:3] == pytest.approx((0.7, 0.63, 0.84)) and share.note == "compile default, 1 thread(s)"
    startup = {"what": "aezoo fit -c dense_article --compile off", "ratio": "1.4"}
    files = {"speed-startup-fp32-x": [startup | {"ratio_low": "1.2", "ratio_high": "1.5"}]}
    (missed,) = targets.missed_targets(files)
    assert "first step" in missed
    assert targets.missed_targets({"speed-startup-fp32-x": [startup | {"ratio": "1.3"}]}) == []


def test_row_columns_match_declaration(fake):
    fake.run(repeats="1")
    (path,) = fake.folder.glob("*.csv")
    head = next(csv.reader(line for line in path.read_text().splitlines() if not line.startswith("#")))
    assert tuple(head) == (*peers.COLUMNS[:-1], "processor", "error")
