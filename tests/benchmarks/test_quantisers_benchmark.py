"""The benchmark of quantisers: its rows, its timing, and that both implementations give equal results."""

import csv
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from aezoo.errors import AezooError
from benchmarks import quantisers, quantisers_row
from benchmarks.common import ROOT


def rows_of(folder):
    (path,) = folder.glob("quantisers-fp32-pt*-cpu*.csv")
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# command: python -m benchmarks.quantisers")
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    """Rows are measured in this process, with small maps and the current number of threads."""

    def run_row(module, spec, timeout, variables, warm):
        assert (module, warm) == ("quantisers_row", True)
        assert variables == {"OMP_NUM_THREADS": str(spec["row"]["threads"])}
        return quantisers_row.measure(spec | {"row": spec["row"] | {"threads": torch.get_num_threads()}})

    monkeypatch.setattr(quantisers, "run_row", run_row)
    monkeypatch.setattr(quantisers, "SIDE", 4)
    # it changes the allocator of this process, in which other tests run
    monkeypatch.setattr(quantisers_row, "_release_memory", lambda: None)


@pytest.fixture
def _alone(monkeypatch):
    monkeypatch.setattr(quantisers_row, "PEER", "no_such_package")


def run(folder, *more):
    quantisers.main(["--accelerator", "cpu", "--repeats", "2", "--results", str(folder), *more])


@pytest.mark.slow
@pytest.mark.usefixtures("_alone")
def test_missing_peer_leaves_empty_columns(tmp_path, capsys):
    run(tmp_path, "--codes", "16", "32", "--dim", "6")
    rows = rows_of(tmp_path)
    assert [(row["kind"], row["codes"]) for row in rows] == [
        (kind, codes) for kind in quantisers.KINDS for codes in ("16", "32")
    ]
    for row in rows:
        assert tuple(row) == (*quantisers.COLUMNS[:-1], "processor", "error") and not row["error"]
        assert (row["places"], row["batch"], row["threads"], row["device"], row["repeats"]) == (
            "16",
            "1",
            "1",
            "cpu",
            "2",
        )
        assert row["dim"] == {"fsq": "2", "lfq": str(round(math.log2(int(row["codes"]))))}.get(row["kind"], "6")
        assert all(float(row[name]) > 0 for name in ("forward_per_s", "step_per_s"))
        assert not any(cell for name, cell in row.items() if "peer" in name or "ratio" in name or name == "same_codes")
    assert "pip install vector-quantize-pytorch" in capsys.readouterr().out
    run(tmp_path, "--codes", "16", "32", "--dim", "6")
    assert rows_of(tmp_path) == rows and "codes:" not in capsys.readouterr().out


def test_fsq_levels_multiply_to_code_count():
    for bits in range(2, 22):
        (spec,) = quantisers.plan(quantisers.parse_arguments(["--kinds", "fsq", "--codes", str(2**bits)]), "cpu")
        levels = quantisers_row.fsq_levels(2**bits, spec["row"]["dim"])
        assert math.prod(levels) == 2**bits and {*levels} <= {4, 8} and len(levels) == spec["row"]["dim"]
        assert levels.count(4) <= 2


@pytest.mark.parametrize("codes", ["1000", "2"])
def test_code_counts_that_are_not_powers_of_two_are_refused(codes):
    for kind in ("fsq", "lfq"):
        with pytest.raises(AezooError, match=f"not {codes}: leave it out"):
            quantisers.plan(quantisers.parse_arguments(["--kinds", kind, "--codes", codes]), "cpu")
    assert len(quantisers.plan(quantisers.parse_arguments(["--kinds", "rvq", "--codes", codes]), "cpu")) == 1


class Fixed(nn.Module):
    """A quantiser that returns z with some values moved."""

    def __init__(self, moved: Tensor | None = None) -> None:
        super().__init__()
        self.moved = moved

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = z if self.moved is None else z + self.moved
        return q, torch.zeros(1), q.square().sum()


SPEC = {"side": 4, "repeats": 3, "seconds": 60.0, "seed": 0}
ROW = {"kind": "vq_ema", "codes": 8, "dim": 3, "batch": 1, "places": 16, "threads": 1, "device": "cpu"}


@pytest.fixture
def _beside_another(monkeypatch):
    threads = torch.get_num_threads()
    ours = quantisers_row.VQ(3, 8)
    monkeypatch.setattr(quantisers_row, "build_pair", lambda *args: quantisers_row.QuantiserPair(ours, Fixed()))
    monkeypatch.setattr(quantisers_row.importlib.metadata, "version", lambda name: "9")
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_beside_another")
def test_speed_ratio_is_per_round_and_above_1_if_faster(monkeypatch):
    order, turns = [], {}
    seconds = {("ours", "forward"): [9, 1, 2, 4], ("theirs", "forward"): [9, 2, 8, 4]}
    seconds |= {("ours", "step"): [9, 4, 4, 4], ("theirs", "step"): [9, 2, 1, 4]}

    def of_one(work, device):
        which = "theirs" if isinstance(work.args[0], Fixed) else "ours", work.func.__name__
        order.append(which)
        turns[which] = turns.get(which, -1) + 1
        return seconds[which][turns[which]]

    monkeypatch.setattr(quantisers_row, "seconds_per_call", of_one)
    row = quantisers_row.measure(SPEC | {"row": ROW})
    assert [row[f"forward_ratio{end}"] for end in ("", "_min", "_max")] == [2, 1, 4]
    assert [row[f"step_ratio{end}"] for end in ("", "_min", "_max")] == [0.5, 0.25, 1]
    assert (row["forward_per_s"], row["peer_forward_per_s"], row["step_per_s"]) == (8, 4, 4)
    assert (row["repeats"], row["peer_error"]) == (3, "")
    assert order[:4] == order[4:8][::-1]  # the order alternates


@pytest.mark.slow
@pytest.mark.usefixtures("_beside_another")
def test_at_least_one_round_is_measured(monkeypatch):
    row = quantisers_row.measure(SPEC | {"row": ROW, "seconds": 1e-9})
    assert row["repeats"] == 1 and row["forward_per_s"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("_beside_another")
def test_failing_peer_leaves_only_its_columns_empty(monkeypatch):
    def fails(self: Fixed, z: Tensor) -> None:
        if self.training:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return z, torch.zeros(1)

    monkeypatch.setattr(Fixed, "forward", fails)
    row = quantisers_row.measure(SPEC | {"row": ROW})
    assert row["forward_per_s"] > 0 and row["step_per_s"] > 0
    assert "can't allocate memory" in row["peer_error"]
    assert not any((name.startswith("peer_") and name != "peer_error") or "ratio" in name for name in row)


def test_equal_codes_are_counted_per_position():
    z = torch.randn(2, 3, 4, 4)
    moved = torch.zeros(2, 3, 4, 4)
    moved[0, 1, :, :2] = 0.1  # a channel of 8 of 32 positions
    assert quantisers_row.share_of_equal_codes(Fixed(), Fixed(moved), z) == 0.75
    assert quantisers_row.share_of_equal_codes(Fixed(), Fixed(), z) == 1


@pytest.mark.slow
def test_peak_memory_counts_simultaneous_allocations():
    """In a separate process, as for every row."""
    script = """
import torch
from benchmarks import quantisers_row
def work():
    for _ in range(3):
        torch.ones(10_000_000).add_(1)
torch.ones(10).add_(1)  # its code is loaded from disk at the first call
print(quantisers_row.peak_mb(work, torch.device("cpu")))
"""
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300)
    if found.stdout.strip() == "None":
        pytest.skip("this system does not tell")
    assert float(found.stdout) == pytest.approx(40, rel=0.1)


# ---- the package itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", quantisers.KINDS)
def test_both_implementations_give_equal_results(kind):
    """Codes, gradients and moving averages, compared with vector-quantize-pytorch."""
    torch.manual_seed(0)
    (spec,) = quantisers.plan(quantisers.parse_arguments(["--kinds", kind, "--codes", "64", "--dim", "6"]), "cpu")
    ours, theirs = quantisers_row.build_pair(kind, 64, spec["row"]["dim"])
    z, grad = torch.randn(2, 2, spec["row"]["dim"], 16, 16)
    # the package's FSQ shifts even levels by atanh, the paper's code by tan
    assert quantisers_row.share_of_equal_codes(ours, theirs, z) >= (0.9 if kind == "fsq" else 0.999)
    gradients = []
    for party in (ours.train(), theirs.train()):
        leaf = z.clone().requires_grad_()
        party(leaf)[0].backward(grad)
        gradients.append(leaf.grad)
    # the package passes the gradient to z once per residual level
    levels = quantisers_row.RESIDUAL_LEVELS if kind == "rvq" else 1
    far = {"rtol": 0.05, "atol": 0.02} if kind == "fsq" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(gradients[0] * levels, gradients[1], **far)
    if kind in ("vq_ema", "vq_cosine", "rvq"):
        codebooks = [ours] if kind != "rvq" else [*ours.levels]
        layers = [theirs] if kind != "rvq" else [*theirs.inner.layers]
        for codebook, layer in zip(codebooks, layers, strict=True):
            # the package adds 1e-5 per code to the denominator
            torch.testing.assert_close(codebook.codebook(), layer._codebook.embed[0], rtol=1e-3, atol=1e-4)
