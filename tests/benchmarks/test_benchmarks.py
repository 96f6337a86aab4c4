"""The speed benchmark: rows in separate processes, continued CSVs, reduced batch sizes, consistent figures."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import aezoo
from aezoo.callbacks import FaultGuard
from benchmarks import measure, processes, speed, startup
from benchmarks.common import read_csv

ROOT = Path(__file__).parents[2]
TINY = ["--models", "dense_ae", "--shapes", "12", "--compile", "off", "--batch", "4", "--accelerator", "cpu"]
QUICK = [*TINY, "--steps", "2", "--repeats", "1", "--threads", "1"]


def measured(kind, folder):
    (path,) = folder.glob(f"speed-{kind}-fp32-*.csv")
    return read_csv(path)


# ---- speed -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_speed_measures_training_and_inference_once(tmp_path, monkeypatch, capsys):
    speed.main([*QUICK, "--results", str(tmp_path)])
    (command,), (train,) = measured("train", tmp_path)
    assert command == "python -m benchmarks.speed " + " ".join(QUICK)
    assert not train["error"], train["error"]
    for name in ("samples_per_s", "step_ms", "loss", "peak_memory_mb", "first_step_s", "cold_start_s", "share_of_peak"):
        assert float(train[name]) > 0, name
    assert float(train["samples_per_s_low"]) <= float(train["samples_per_s"]) <= float(train["samples_per_s_high"])
    assert train["batch_used"] == "4" and train["steps"] == "2"
    _, (infer,) = measured("infer", tmp_path)
    assert not infer["error"], infer["error"]
    for path in ("encode", "reconstruct", "network_encode", "bare_predict", "predict"):
        assert float(infer[f"{path}_samples_per_s"]) > 0
    assert float(infer["predict_ratio"]) > 0
    rate = float(infer["reconstruct_samples_per_s"])
    assert float(infer["step_ms"]) == pytest.approx(1e3 * 4 / rate, rel=1e-3)

    monkeypatch.setattr(speed, "run_row", None)  # an existing row is not measured again
    before = [path.read_bytes() for path in sorted(tmp_path.glob("*.csv"))]
    capsys.readouterr()
    speed.main([*QUICK, "--results", str(tmp_path)])
    assert capsys.readouterr().out.count("already measured") == 2
    assert [path.read_bytes() for path in sorted(tmp_path.glob("*.csv"))] == before


@pytest.mark.slow
def test_multi_device_speed_includes_model_with_all_gather(tmp_path):
    words = [word if word != "dense_ae" else "sparse_ae_kl" for word in QUICK]
    speed.main(["train", *words, "--devices", "1,2", "--results", str(tmp_path)])
    _, rows = measured("train", tmp_path)
    assert [(row["devices"], row["error"]) for row in rows] == [("1", ""), ("2", "")]
    assert all(float(row[name]) > 0 for row in rows for name in ("samples_per_s", "share_of_peak"))


def test_failed_row_keeps_its_error_and_is_retried_on_demand(tmp_path, monkeypatch):
    calls = []

    def run_row(module, spec, timeout, variables):
        calls.append(spec["devices"])
        if spec["devices"] == 2 and len(calls) < 3:
            return {"error": "no result after 1 s"}
        return {"samples_per_s": 100.0 if spec["devices"] == 1 else 150.0}

    monkeypatch.setattr(speed, "run_row", run_row)
    words = ["train", *TINY, "--devices", "1,2", "--results", str(tmp_path)]
    speed.main(words)
    _, rows = measured("train", tmp_path)
    assert [(row["devices"], row["samples_per_s"], row["error"]) for row in rows] == [
        ("1", "100", ""),
        ("2", "", "no result after 1 s"),
    ]
    speed.main(words)
    assert calls == [1, 2]
    speed.main([*words, "--again", "failed"])
    assert calls == [1, 2, 2]
    commands, rows = measured("train", tmp_path)
    assert rows[1]["samples_per_s"] == "150" and not rows[1]["error"] and len(commands) == 1


def test_batch_is_halved_until_it_fits_in_memory(tmp_path, monkeypatch):
    tried = []

    def run_row(module, spec, timeout, variables):
        tried.append(spec["batch"])
        full = processes.error_columns(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
        return full if spec["batch"] > 1 else {"samples_per_s": 7.0}

    monkeypatch.setattr(speed, "run_row", run_row)
    speed.main(["train", *TINY, "--results", str(tmp_path)])
    _, (row,) = measured("train", tmp_path)
    assert tried == [4, 2, 1]
    assert (row["batch"], row["batch_used"], row["samples_per_s"], row["error"]) == ("4", "1", "7", "")


def test_each_row_compiles_with_an_empty_cache(tmp_path, monkeypatch):
    caches = []

    def run_row(module, spec, timeout, variables):
        cache = Path(variables["TORCHINDUCTOR_CACHE_DIR"])
        assert not [*cache.iterdir()]
        (cache / "graph").touch()
        caches.append(cache)
        return {"samples_per_s": 7.0}

    monkeypatch.setattr(speed, "run_row", run_row)
    speed.main(["train", *TINY, "--compile", "off", "default", "--results", str(tmp_path / "results")])
    _, rows = measured("train", tmp_path / "results")
    assert [row["compiler_cache"] for row in rows] == ["", "nothing"]
    assert len(caches) == 2 and not any(cache.exists() for cache in caches)


def test_error_is_kept_when_no_batch_fits():
    full = {"error": "MemoryError: ", "out_of_memory": True}
    assert processes.with_smaller_batches(lambda spec: dict(full), {"batch": 3}) == ({"error": "MemoryError: "}, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shapes", "1xx8"], "--shapes"),
        (["--devices", "0"], "--devices"),
        (["--models", "vea"], "did you mean 'vae'"),
        (["--models", "vae:{net"], "write settings as in"),
        (["--repeats", "0"], "--repeats"),
        (["--steps", "-1"], "--steps"),
        (["--startup", "--repeats", "0"], "--repeats"),
    ],
)
def test_invalid_speed_arguments_are_refused(tmp_path, monkeypatch, words, message):
    monkeypatch.setattr(startup, "_seconds", lambda *_: 1.0)
    monkeypatch.setattr(speed, "run_row", lambda *_: {})
    with pytest.raises(aezoo.AezooError, match=message):
        speed.main([*words, "--results", str(tmp_path)])


@pytest.mark.parametrize("accelerator", ["auto", "cpu"])
def test_startup_benchmark_uses_requested_accelerator(tmp_path, monkeypatch, accelerator):
    ran = []
    monkeypatch.setattr(startup, "_seconds", lambda words, _: ran.append(words) or 1.0)
    speed.main(["--startup", "--repeats", "1", "--accelerator", accelerator, "--results", str(tmp_path)])
    assert (
        ran[1][2:]
        == ["fit", "-c", "dense_article", "--compile", "off", f"--trainer.accelerator={accelerator}"][
            : 5 + (accelerator != "auto")
        ]
    )
    (path,) = tmp_path.glob("speed-startup-*.csv")
    assert read_csv(path)[1][1]["what"] == "aezoo fit -c dense_article --compile off"


def test_workload_settings_fit_their_models():
    for name, load in speed.WORKLOADS.items():
        model = aezoo.create_model(load.model, load.shape, **load.settings)
        assert model(torch.rand(2, *load.shape)).shape == (2, *load.shape), name


# ---- measurement -----------------------------------------------------------------------------------------------------


def test_dense_network_flops_match_matrix_products():
    model = aezoo.create_model("dense_ae", (784,), latent_dim=32, hidden_dims=(128, 64))
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    found = measure.count_flops(model, torch.rand(8, 784))
    # backward needs the gradient of each weight, and of each layer's input but the first
    assert found == (2 * weights, 6 * weights - 2 * 784 * 128, 6 * weights - 2 * 784 * 128)


def test_convolutions_count_as_flops_but_not_gemms():
    model = aezoo.create_model("conv_ae", (1, 8, 8), hidden_dims=(4,), latent_dim=2)
    found = measure.count_flops(model, torch.rand(4, 1, 8, 8))
    assert 0 <= found.gemms < found.forward < found.step
    assert measure.seconds_of_products(model, torch.rand(4, 1, 8, 8), "fp32") > 0


@pytest.mark.slow
def test_peak_is_measured_in_both_precisions():
    for precision in measure.DTYPES:
        assert measure.matmul_peak(torch.device("cpu"), precision, seconds=0.01) > 1e8


def test_kernel_launches_and_copies_are_counted():
    names = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cudaGraphLaunch", "aten::mm", "Memcpy DtoD"]
    assert measure.count_events([*names, "Memcpy HtoD (Pageable -> Device)", "cudaMemcpyAsync"], 2) == (2, 0.5)


def test_guard_cost_is_step_time_difference(monkeypatch):
    now = 0.0

    class Slow(FaultGuard):
        def on_before_backward(self, *args):
            nonlocal now
            now += 0.25

        def is_finite_step(self, *args):
            nonlocal now
            now += 0.25
            return False

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    for asked in (True, False):
        slow, given, active = Slow(), [None] * 4, []
        cost = measure.GuardCost(slow, block=4)
        assert slow.on_before_backward.__self__ is slow
        for batch in range(45):
            began = now
            passed = slow.is_finite_step(None, None) if asked else slow.on_before_backward(*given[:3])
            active.append(now > began)
            assert passed is (None if not asked else not active[-1])
            # the first batch of a block is slow and does not count
            now += 0.75 if batch % 4 else 5.0
            cost.on_train_batch_end(*given, 0)
        assert active == [batch // 4 % 2 == 1 for batch in range(45)]
        assert cost.shares() == [0.25] * 5 and cost.shares(2) == [0.25] * 2
    assert measure.GuardCost(FaultGuard()).shares() == []


# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True])
def test_every_process_failure_returns_an_error_row(tmp_path, warm):
    assert "No module named" in processes.run_row("absent", {}, 60, warm=warm)["error"]
    assert processes.run_row("absent", {}, 1e-3, warm=warm)["error"] == "no result after 0.001 s"
    killed = processes._outcome([], -9, 1, tmp_path)
    assert killed == {"error": "killed by SIGKILL", "out_of_memory": True}
    ranks = [processes.error_columns(ConnectionError("peer")), processes.error_columns(RuntimeError("out of memory"))]
    assert processes._outcome(ranks, 1, 1, tmp_path)["out_of_memory"]
    # the kernel killed a rank, so it reported nothing
    lost = processes.error_columns(
        RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]")
    )
    assert processes._outcome([lost, lost], 1, 1, tmp_path)["out_of_memory"]
    assert not processes._outcome([lost, processes.error_columns(ValueError("NaN"))], 1, 1, tmp_path)["out_of_memory"]
    log = tmp_path / "log"
    for said, memory in (("terminate called after throwing an instance of 'std::bad_alloc'", True), ("free()", False)):
        log.write_text(said)
        assert processes._outcome([], -6, 1, log) == {"error": "killed by SIGABRT", "out_of_memory": memory}


@pytest.mark.skipif(sys.platform == "win32", reason="there are no groups of processes")
def test_row_process_ends_with_its_parent(tmp_path, monkeypatch):
    code = "import time; from benchmarks import processes; processes.run_measurement(lambda _: time.sleep(60), %s)"
    of_peers = "from benchmarks.peer_scripts.__main__ import end_with_parent; end_with_parent()"
    for words in (code % ["{}", "row", "follow"], of_peers):
        row = subprocess.Popen(
            [sys.executable, "-c", words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        row.stdin.close()  # as the system does for a killed process
        assert row.wait(30) == -signal.SIGKILL
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text('#!/bin/sh\necho "$5"\ncat\necho closed\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    row = processes._Spawned("speed_row", ["{}", "row"], log, {})
    row.join(0.05)
    assert row.exitcode is None
    row._process.stdin.close()
    row.join()
    assert log.read_text().split() == ["follow", "closed"]


def test_partial_row_is_a_failure_without_traceback(tmp_path, monkeypatch):
    def cut_off(module, argv, log, variables):
        Path(f"{argv[1]}.0").write_text('{"samples_per_s": 12')
        log.write_text("OSError: [Errno 28] No space left on device")
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"], start_new_session=True)

    class Process:
        def __init__(self, *args):
            self._process = cut_off(*args)
            self.pid, self.kill = self._process.pid, self._process.kill
            self.join = self._process.wait

        @property
        def exitcode(self):
            return self._process.poll()

    monkeypatch.setattr(processes, "_Spawned", Process)
    row = processes.run_row("speed_row", {}, 60)
    assert row == {"error": "exit code 1: OSError: [Errno 28] No space left on device"}


@pytest.mark.slow
def test_forked_rows_come_back_from_all_threads_and_end_in_time():
    data = {"name": "digits", "root": "data", "batch_size": 128}
    baselines = {"data": data, "probe_rows": 20, "sizes": [2], "features": ""}
    with ThreadPoolExecutor(4) as pool:
        rows = [*pool.map(lambda _: processes.run_row("quality_row", baselines, 100, warm=True), range(8))]
    assert all(row == rows[0] and "pca_mse" in row["baselines"]["2"] for row in rows)
    endless = {"model": "linear_ae", "hyperparameters": {}, "seed": 0, "data": data, "features": ""}
    endless |= {"precision": "32-true", "accelerator": "cpu", "probe_rows": 20, "importance_samples": 1}
    endless |= {"budget": [100, 10**9, 0.0, 1e9, 100]}
    before = {*processes._running}
    assert processes.run_row("quality_row", endless, 2, warm=True) == {"error": "no result after 2 s"}
    assert {*processes._running} == before


def test_exception_is_written_as_row_error(tmp_path):
    code = "from benchmarks import processes; processes.run_measurement(lambda s: 1 / s['x'], ['{\"x\": 0}', 'row'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert (tmp_path / "row.0").read_text() == (
        '{"error": "ZeroDivisionError: division by zero", "out_of_memory": false}'
    )


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_errors_are_recognised(error, is_memory):
    assert processes.is_out_of_memory(error) == is_memory


@pytest.mark.parametrize("batch_inner", [False, True])
def test_recorded_matrix_products_can_be_run_separately(batch_inner, monkeypatch):
    from aezoo.speed import conv2d

    monkeypatch.setattr(conv2d, "use_batch_inner", lambda layer, *_: batch_inner and layer.feeds_convolutions)
    model, x = aezoo.create_model("vae", (1, 16, 16), net="conv", hidden_dims=(8, 16)), torch.rand(4, 1, 16, 16)
    with measure._Recorder() as recorder:
        model.loss(x)["loss"].backward()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for call in recorder.calls:
            call()
    assert counter.get_total_flops() == len(x) * measure.count_flops(model, x).step > 0
