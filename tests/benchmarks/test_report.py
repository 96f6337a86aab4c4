"""The CSVs of the benchmarks, the report made from them, and the command that runs the benchmarks."""

import argparse
import errno
import os
import runpy
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import aezoo
from aezoo.cli.main import BENCHMARKS, main
from aezoo.errors import AezooError
from benchmarks import plots, report, report_columns, report_pca, speed, targets
from benchmarks.common import ResultsCSV, command_line, environment, folder_lock, processor_name, read_csv

ROOT = Path(__file__).parents[2]


# ---- tables and reports ----------------------------------------------------------------------------------------------


def test_csv_is_complete_after_each_row(tmp_path):
    path = tmp_path / "new" / "a.csv"
    first = ResultsCSV(path, ("model",), "python -m benchmarks.x")
    first.put({"model": "vae", "mse": 1 / 3})
    second = ResultsCSV(path, ("model",), "python -m benchmarks.x --more")
    assert not second.needs({"model": "vae"}) and second.needs({"model": "dense_ae"})
    second.put({"model": "dense_ae", "mse": 123456.0, "error": 'a "quoted", text\nof two lines'})
    commands, rows = read_csv(path)
    assert commands == ["python -m benchmarks.x", "python -m benchmarks.x --more"]
    machine = {"processor": " ".join(processor_name().split())}
    assert machine["processor"] and "/" not in machine["processor"]
    assert rows[0] == machine | {"model": "vae", "mse": "0.33333", "error": ""}
    assert rows[1] == machine | {"model": "dense_ae", "mse": "123456", "error": 'a "quoted", text of two lines'}
    assert [p.name for p in path.parent.iterdir()] == ["a.csv"]


def test_failed_table_write_keeps_old_table(tmp_path, monkeypatch):
    table = ResultsCSV(tmp_path / "some.csv", ("a",), "it")
    table.put({"a": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("benchmarks.common.os.fsync", full)
    with pytest.raises(AezooError, match="No space left on device; give another folder by --results"):
        table.put({"a": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["some.csv"] and len(read_csv(tmp_path / "some.csv")[1]) == 1


def test_concurrent_csv_edits_are_kept(tmp_path):
    path = tmp_path / "a.csv"
    ours, theirs = ResultsCSV(path, ("model",), "ours"), ResultsCSV(path, ("model",), "theirs")
    theirs.put({"model": "vae", "mse": 1.0})
    path.write_text("\ufeff" + path.read_text().replace("1,", "2,"), encoding="utf-8")  # as saved by a spreadsheet
    ours.put({"model": "dense_ae"})
    assert not ours.needs({"model": "vae"})
    theirs.put({"model": "linear_ae"})
    commands, rows = read_csv(path)
    assert {*commands} == {"ours", "theirs"}
    assert [(row["model"], row["mse"]) for row in rows] == [("vae", "2"), ("dense_ae", ""), ("linear_ae", "")]
    ours.replace_all([{"model": "aae"}])
    assert (commands := read_csv(path)[0]) == ["ours"] and [row["model"] for row in read_csv(path)[1]] == ["aae"]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no locks of folders")
def test_table_writes_are_serialised(tmp_path):
    writer = threading.Thread(target=ResultsCSV(tmp_path / "a.csv", ("model",), "it").put, args=({"model": "vae"},))
    with folder_lock(tmp_path):
        writer.start()
        writer.join(0.1)
        assert writer.is_alive() and not [*tmp_path.iterdir()]
    writer.join()
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_unwritable_table_is_refused_before_measuring(tmp_path):
    (tmp_path / "file").touch()
    table = ResultsCSV(tmp_path / "file" / "a.csv", ("model",), "it")
    with pytest.raises(AezooError, match=r"cannot write .*a\.csv: .*; give another folder by --results"):
        table.needs({"model": "vae"})


def test_absent_accelerator_has_no_rows(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("gpu", "cuda", "mps", "gpx"):
        with pytest.raises(AezooError, match=f"--accelerator {name}: torch finds none on this machine; use cpu"):
            environment(SimpleNamespace(accelerator=name))
    assert "-cpu" in environment(SimpleNamespace(accelerator="auto"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert [environment(SimpleNamespace(accelerator=name))[-4:] for name in ("auto", "gpu", "mps")] == ["-mps"] * 3


def test_malformed_csv_is_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2,3\n")
    with pytest.raises(aezoo.AezooError, match=r"a\.csv"):
        read_csv(path)


def test_recorded_command_omits_folders_and_is_runnable(monkeypatch):
    words = ["train", "--results", "/somewhere", "--again", "failed", "--models", "all", "--results=/x"]
    assert command_line("speed", words) == "python -m benchmarks.speed train --models all"
    monkeypatch.setattr("benchmarks.common.NAME", "aezoo.benchmarks")  # in a wheel, which only has this package
    assert command_line("speed", words) == "python -m aezoo.benchmarks.speed train --models all"


def written(folder):
    """RESULTS.md and its pages, which are in the same folder outside of a checkout."""
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.md")))


@pytest.fixture
def results(tmp_path):
    """A folder of small CSVs of every kind but start-up."""
    key = ("model", "code_size", "seed", "batch_size")
    quality = ResultsCSV(tmp_path / "quality-digits-fp32-pt2.13-cpu2.csv", key, "quality it")
    for model, family, rate in (
        ("vae", "variational", 2e3),
        ("dense_ae", "classic", 9e3),
        ("linear_ae", "classic", 1e4),
    ):
        for size in (4, 8, 16):
            for seed in range(3):
                row = {"model": model, "family": family, "dataset": "digits", "code_size": size, "seed": seed}
                row |= {"batch_size": 128}
                quality.put(row | {"mse": (0.1 + 0.01 * seed) / size, "pca_mse": 0.2 / size, "samples_per_s": rate})
    other = {"model": "vae", "family": "variational", "dataset": "digits", "code_size": 16, "seed": 0}
    quality.put(other | {"batch_size": 64, "mse": 0.5, "pca_mse": 0.2 / 16, "samples_per_s": 1e3})
    quality.put({"model": "conv_ae", "dataset": "digits", "code_size": 8, "seed": 0, "error": "killed by SIGKILL"})
    peers = ResultsCSV(tmp_path / "peers-dense-fp32-pt2.13-cpu2.csv", ("party",), "peers it")
    for party, ratio in (("loop", 1.0), ("aezoo", 0.9), ("aezoo_compiled", 0.97), ("lightning", 0.5)):
        spread = {"ratio_min": ratio - 0.1, "ratio_max": ratio + 0.1}
        rates = f"{5e4 * ratio:.6g} {4e4 * ratio:.6g}"
        row = {"party": party, "samples_per_s": 5e4 * ratio, "ratio": ratio, **spread, "round_rates": rates}
        peers.put(row | {"agrees": "yes"})
    train = ResultsCSV(
        tmp_path / "speed-train-fp32-pt2.13-cpu2.csv", ("name", "devices"), "python -m benchmarks.speed --no"
    )
    for devices, rate in ((1, 1000.0), (2, 1800.0)):
        peak = {"peak_gflops": 90 + 10 * devices}
        train.put({"name": "vae", "devices": devices, "samples_per_s": rate, "share_of_peak": 0.123} | peak)
    return tmp_path


def test_pages_are_cut_to_size_by_their_longest_tables():
    short, long = ("\n".join(["| a |", "| --- |", *[f"| {'x' * 90} |"] * n]) for n in (3, 400))
    page = f"# A\n\n{short}\n\ntext\n\n{long}"
    cut = report.fit(page)
    assert len(cut) <= 15_000 and short in cut and report.fit(f"# A\n\n{short}") == f"# A\n\n{short}"
    left = cut.count("x" * 90) - 3
    assert 100 < left < 400 and cut.endswith(f"\n\nThe first {left} of 400 lines; the CSV has all.")


def test_gemm_share_uses_run_with_interface():
    def row(rate, interface):
        rates = {f"samples_per_s{end}": str(rate) for end in ("", "_low", "_high")}
        return {"name": "vae", "devices": "1", "interface": interface, "gemm_floor_share": str(rate / 4000), **rates}

    assert targets.gemm_share("vae")([row(980, "on"), row(1000, "off")]).median == 980 / 4000


@pytest.mark.slow
def test_report_is_built_from_available_results(results, capsys):
    report.main(["--results", str(results)])
    said = capsys.readouterr().out
    assert "no speed-startup-*.csv" in said and "start-up left out" in said
    text = written(results)
    for command in (
        "quality it",
        "peers it",
        "python -m benchmarks.speed --no  # how many of its rows are here is not known",
    ):
        assert f"```bash\n{command}\n```" in text
    assert "| vae | 2 | 1,800 | 12.3 | 110 | 0.9 |" in text
    # median, lowest and highest of three seeds
    assert "| vae | variational | 16 | 3 | 128 | 0.006875 (0.00625 to 0.0075) | 0.0125 |" in text
    assert "| vae | variational | 16 | 1 | 64 | 0.5 | 0.0125 |" in text  # another batch size is another setting
    assert "killed by SIGKILL" in text
    stem = "peers-dense-fp32-pt2.13-cpu2"
    assert f"| dense, fp32: aezoo / loop | >= 0.95 | 0.97 | compiled | yes | 0.9 | {stem} |" in text
    assert f"| dense, fp32: aezoo / lightning | >= 2 | 1.94 | compiled | no | 1.8 | {stem} |" in text
    assert "target not reached: dense, fp32: aezoo / lightning" in said
    assert "| conv28, fp32: aezoo / pythae | >= 1.3 |  |  | not measured |  |  |" in text
    for name in ("pareto", "code_size", "scaling", "peers"):
        assert f"(pictures/{name}.png)" in text
        assert (results / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_other_processor_rates_are_excluded_from_front():
    rows = [
        {"model": name, "family": "f", "dataset": "d", "code_size": "4", "mse": mse, "samples_per_s": rate}
        | {"pca_mse": "0.1", "processor": processor}
        for name, mse, rate, processor in (
            ("slow", "0.2", "100", ""), ("fast", "0.3", "900", ""), ("elsewhere", "0.01", "5000", "another"),
        )
    ]  # fmt: skip
    for part, hollow, front in ((rows, [5000.0], [900.0, 100.0]), (rows[:2], [], [900.0, 100.0])):
        figure = plots.pareto(part)
        lines = figure.axes[0].get_lines()
        assert [*lines[0].get_xdata()] == front
        assert [float(line.get_xdata()[0]) for line in lines if line.get_markerfacecolor() == "white"] == hollow
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        assert ("on another processor" in legend) is bool(hollow)


@pytest.mark.slow
def test_each_machine_has_a_peers_picture(results):
    for name in ("dense-fp32-pt2.13-cpu2-zen4", "conv28-bf16-pt2.13-cpu2-zen4"):
        peers = ResultsCSV(results / f"peers-{name}.csv", ("party",), "peers it")
        peers.put({"party": "loop", "samples_per_s": 1e4, "ratio": 1.0, "agrees": "yes"})
    report.main(["--results", str(results)])
    assert sorted(path.stem for path in (results / "pictures").glob("peers*")) == ["peers", "peers-zen4"]
    text = written(results)
    assert ", as ratios to a compiled loop](pictures/peers.png)" in text
    assert ", as ratios to a compiled loop, on zen4](pictures/peers-zen4.png)" in text


def test_peers_picture_names_precision_and_missing_parties():
    row = {"party": "loop", "precision": "bf16", "ratio": "1", "samples_per_s": "9", "agrees": "yes"}
    row |= {"processor": "Some CPU"}
    rows = [row, row | {"party": "pythae", "precision": "fp32", "ratio": "0.5"}]
    same = plots.peers({"dense-bf16-pt2.13-cpu2": rows})
    odd = plots.peers({"dense-bf16-pt2.13-cpu2": [rows[0], rows[1] | {"agrees": "no"}]})
    for figure, hatched in ((same, [False, False]), (odd, [True, False])):
        (ax,) = figure.axes
        assert [bool(bar.get_hatch()) for bar in ax.patches] == hatched
        assert [tick.get_text() for tick in ax.get_yticklabels()] == ["pythae, fp32", "compiled loop by hand"]
        assert figure.get_suptitle() == "on Some CPU"
        assert [text.get_text()[:8] for legend in figure.legends for text in legend.texts] == ["hatched:"] * any(
            hatched
        )


@pytest.mark.slow
def test_scaling_uses_matching_single_device_row(results):
    one = {"name": "vae", "devices": "1", "samples_per_s": "1000", "peak_gflops": "100", "scaling_efficiency": "1"}
    two = one | {"devices": "2", "samples_per_s": "1500", "scaling_efficiency": "0.9"}

    def found(*changed):
        return report.add_efficiency([one, *({**two, **change} for change in changed)])[1:]

    assert [row["scaling_efficiency"] for row in found({"peak_gflops": "125"}, {"peak_gflops": "80"})] == ["0.75"] * 2
    slow, fast, other, unknown = found(
        {"peak_gflops": "79"}, {"peak_gflops": "126"}, {"batch": "7"}, {"peak_gflops": ""}
    )
    assert slow["unscaled"] == fast["unscaled"] == "one device was measured at a peak of 100 GFLOP/s"
    assert (other["unscaled"], unknown["unscaled"]) == ("no row of one device", "a peak was not measured")
    assert not any(row["scaling_efficiency"] for row in (slow, fast, other, unknown))
    halved = report.add_efficiency([one | {"batch_used": "128"}, two | {"batch_used": "64"}])[1]
    assert halved["unscaled"] == "one device was measured with a batch of 128" and not halved["scaling_efficiency"]
    assert report.add_efficiency([one]) == [one | {"scaling_efficiency": "", "unscaled": ""}]

    train = ResultsCSV(results / "speed-train-fp32-pt2.13-cpu2.csv", ("name", "devices"), "speed it")
    train.put({"name": "vae", "devices": 2, "samples_per_s": 1500.0, "peak_gflops": 50.0})
    report.main(["--results", str(results)])
    text = written(results)
    assert "| vae | 2 | 1,500 |  | 50 | one device was measured at a peak of 100 GFLOP/s |" in text
    assert "pictures/scaling.png" not in text


def test_unnamed_processor_is_that_of_the_machine(results):
    for name, cpu in (("dense-bf16-pt9.9-cpu2", "Old CPU"), ("dense-bf16-pt9.9-cpu2-zen4", "New CPU")):
        peers = ResultsCSV(results / f"peers-{name}.csv", ("party",), "peers it")
        peers.put({"party": "aezoo_compiled", "samples_per_s": 5.0})
        peers.rows[0]["processor"] = cpu
        peers.write()
    files = {path.stem: read_csv(path)[1] for path in results.glob("peers-*.csv")}
    for row in files["peers-dense-fp32-pt2.13-cpu2"]:
        row["processor"] = ""
    table = report.target_table(files)
    assert "| measured | variant | reached |" in table
    assert "| peers-dense-fp32-pt2.13-cpu2 | (Old CPU) |" in table
    assert (
        "| peers-dense-bf16-pt9.9-cpu2-zen4 | New CPU |" in table
        and "| peers-dense-bf16-pt9.9-cpu2 | Old CPU |" in table
    )


def test_command_states_number_of_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "run_row", lambda *_: {"samples_per_s": 7.0})
    words = [
        "--models",
        "vae",
        "dense_ae",
        "--shapes",
        "12",
        "--compile",
        "off",
        "--batch",
        "4",
        "--accelerator",
        "cpu",
    ]
    for flags in ([], ["--precision", "bf16", "fp32"], ["--threads", "3"]):
        speed.main([*words, *flags, "--results", str(tmp_path)])
    (path,) = tmp_path.glob("speed-train-fp32-*.csv")
    commands, rows = read_csv(path)
    assert report.with_row_counts(path.stem, commands, rows) == commands
    elsewhere = [row | {"threads": "8"} for row in rows[:2]]
    assert report.with_row_counts(path.stem, commands[:1], elsewhere) == commands[:1]
    more = [
        commands[0].replace("vae", "'v*ae'"),
        commands[1].replace("--threads 3", "--threads 5"),
        "python -m x --odd",
    ]
    vaes = len(aezoo.list_models("v*ae"))
    assert report.with_row_counts(path.stem, more, rows[:1]) == [
        f"{more[0]}  # 1 of {vaes + 1} rows",
        f"{more[1]}  # 0 of 2 rows",
        f"{more[2]}  # how many of its rows are here is not known",
    ]
    assert report.with_row_counts("quality-digits-fp32-x", more, rows) == more


@pytest.mark.slow
def test_layers_where_torch_is_near_best_are_omitted(results):
    layers = ResultsCSV(results / "convolutions-fp32-pt2.13-cpu2.csv", ("side",), "convolutions it")
    for side, chosen, lost in ((1, "torch", 1.0), (2, "torch", 1.09), (3, "torch", 1.2), (4, "products", 1.0)):
        layers.put({"side": side, "chosen": chosen, "lost": lost})
    report.main(["--results", str(results)])
    text = written(results)
    assert [row in text for row in ("| 1 | torch", "| 2 | torch", "| 3 | torch", "| 4 | products")] == [0, 0, 1, 1]


def test_hand_edited_csv_is_shown_or_reported(results):
    wrong = ResultsCSV(results / "peers-dense-bf16-pt9.9-cpu2.csv", ("party",), "python -m 'benchmarks.speed")
    wrong.put({"party": "loop", "agrees": "yes", "round_rates": "90 fast"})
    assert targets.round_rates(wrong.rows[0]) == [90, None]
    row = {"model": "vae", "dataset": "digits", "code_size": "8", "budget": "epochs=2", "epochs": "all", "steps": "x"}
    row |= {"mse": "0.3", "pca_mse": "0.2"}
    assert "| digits | vae | 8 | 1.50 |" in report_pca.section([row], [row, row | {"mse": "good"}, row | {"l0": "few"}])
    assert "not known" in report.with_row_counts("speed-train-fp32-pt2.13-cpu2", ["python -m 'benchmarks.speed"], [])[0]
    quality = results / "quality-digits-fp32-pt9.9-cpu2.csv"
    quality.write_text("model,mse\nvae,1\n")
    with pytest.raises(AezooError, match=r"cannot read .*quality-digits.*\.csv: no column dataset, code_size; measure"):
        report.main(["--results", str(results)])


def test_models_worse_than_pca_are_listed_with_reasons(monkeypatch):
    row = {"dataset": "digits", "code_size": "8", "budget": "epochs=1", "steps": "1", "mse": "0.3", "pca_mse": "0.2"}
    rows = [row | {"model": name} for name in ("slow_ae", "odd_ae", "lost_ae")]
    rows.append(row | {"model": "vae", "mse": "0.1"})
    rows.append(row | {"model": "topk", "code_size": "64", "l0": "4.2", "pca_mse": "", "pca_mse_at_l0": "0.24"})
    rows.append(row | {"model": "no_floor", "pca_mse": ""})
    rows.append(rows[0] | {"budget": "epochs=9", "steps": "9", "mse": "0.1"})
    rows.append(rows[2] | {"budget": "epochs=0.5", "steps": "0", "mse": "0.1"})
    rows += [row | {"model": "late_ae"}, row | {"model": "cut_ae", "epochs": "0.4"}]
    rows.append(row | {"model": "late_ae", "dataset": "mnist5k", "mse": "0.1"})
    monkeypatch.setitem(report_pca.REASONS, "odd_ae", "it is odd")
    text = report_pca.section(report.comparable(rows), rows)
    assert "- digits, epochs=1: 1 of 7 models and code sizes have at most PCA's error." in text
    for line in (
        "| digits | slow_ae | 8 | 1.50 | the budget: 0.50 at epochs=9 |",
        "| digits | odd_ae | 8 | 1.50 | it is odd |",
        "| digits | late_ae | 8 | 1.50 | better on other data: 0.50 on mnist5k, epochs=1 |",
        "| digits | cut_ae | 8 | 1.50 | the budget: cut off after 0.4 of 1 epochs |",
        f"| digits | lost_ae | 8 | 1.50 | {report_pca.NOT_EXPLAINED} |",
        f"| digits | topk | 4 of 64 | 1.25 | {report_pca.NOT_EXPLAINED} |",
    ):
        assert line in text
    assert "no_floor" not in text and "vae" not in text
    assert report_pca.section([rows[5]], rows) == ""


def test_seeds_of_equal_budget_are_merged():
    row = {"model": "vae", "budget": "seconds=1"}
    (found,) = report.merge_seeds([row | {"seed": str(i), "steps": str(90 + i), "mse": str(i)} for i in range(3)])
    assert found["seeds"] == "3" and float(found["mse"]) == 1
    assert len(report.merge_seeds([{"model": "vae", "steps": str(i), "seed": "0"} for i in range(2)])) == 2


def test_rows_differ_by_draws_and_time_limit():
    base = {"model": "vae", "code_size": "8", "budget": "epochs=2", "mse": "1", "importance_samples": "10"}
    rows = [base | {"seed": str(seed)} for seed in range(2)]
    for other in ({"importance_samples": "100"}, {"most_seconds": "5"}):
        found = report.merge_seeds([*rows, base | {"seed": "0"} | other])
        assert [row["seeds"] for row in found] == ["2", "1"]


def test_time_limited_runs_are_marked():
    def cells(budget, *epochs):
        row = {"model": "vae", "budget": budget}
        (found,) = report.merge_seeds([row | {"seed": str(i), "epochs": n} for i, n in enumerate(epochs)])
        return report_columns.markdown(report_columns.QUALITY, [found]).splitlines()[-1].split(" | ")[2:]

    assert cells("epochs=20", "20", "20") == ["epochs=20", "20 |"]
    assert cells("epochs=20", "20", "19.5", "20") == ["epochs=20", "20 (19.5 to 20), cut |"]
    assert cells("seconds=20", "7.5") == ["seconds=20", "7.5 |"] and cells("epochs=1", "") == ["epochs=1 |"]


def test_pictures_compare_runs_of_one_budget():
    row = {"dataset": "digits", "model": "vae", "code_size": "8"}
    long, short = row | {"budget": "epochs=20"}, row | {"budget": "epochs=1"}
    other = long | {"model": "dense_ae"}
    assert report.comparable([short, long, other, long | {"mse": "2"}]) == [long, other]


def test_a_report_without_rows_has_no_pictures(tmp_path, capsys):
    with pytest.raises(aezoo.AezooError, match="measure first"):
        report.main(["--results", str(tmp_path)])
    ResultsCSV(tmp_path / "speed-startup-x.csv", ("what",), "it").put({"what": "imports", "seconds": 3.0})
    report.main(["--results", str(tmp_path)])
    assert not (tmp_path / "pictures").exists() and "no rows for pareto.png" in capsys.readouterr().out


# ---- command ---------------------------------------------------------------------------------------------------------


def test_the_command_lists_the_benchmarks_without_torch():
    code = "import sys; from aezoo.cli.main import main; main(['benchmark'])"
    code += "; assert not {'torch', 'numpy'} & {*sys.modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()[2:]]
    trained = ["quality", "tasks", "disentangle", "dictionaries", "probe", "bits"]
    assert names == ["speed", *trained, "quantisers", "adbench", "kodak", "scaling", "latency", "peers", "report"]


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (AezooError("cause; cure"), 2)])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_script_errors_are_reported_in_one_line(monkeypatch, capsys, error, code):
    def ends(*_):
        raise error

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", ends)
    for name in [*BENCHMARKS, "recipes"]:
        with pytest.raises(SystemExit) as left:
            runpy.run_module(f"benchmarks.{name}", run_name="__main__")
        assert left.value.code == code, name
        assert capsys.readouterr().err == ("aezoo: cause; cure\n" if code == 2 else "")


def test_an_unknown_benchmark_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        main(["benchmark", "qualty"])
    assert end.value.code == 2
    assert "did you mean 'quality'?" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_runs_the_benchmark(results, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [*sys.path])
    main(["benchmark", "report", "--results", str(results)])
    assert (results / "RESULTS.md").is_file()
    with pytest.raises(SystemExit) as end:
        main(["benchmark", "report", "--results", str(results / "absent")])
    assert end.value.code == 2 and "measure first" in capsys.readouterr().err


@pytest.mark.slow
def test_an_installed_wheel_has_the_benchmarks(results, tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        file.extractall(tmp_path / "site")
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").rglob("*.py")}
    assert {f"aezoo/{name}" for name in ours} <= {*names}
    assert not any("/results/" in name for name in names)
    code = (
        "import sys, importlib, aezoo; assert aezoo.__file__.startswith(sys.argv[1])\n"
        "for name in ('speed', 'peers', 'quality', 'processes'): importlib.import_module('aezoo.benchmarks.' + name)\n"
        "assert 'benchmarks' not in sys.modules\n"
        "from aezoo.cli.main import main; main(['benchmark', 'report', '--results', sys.argv[2]])"
    )
    site = str(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-c", code, site, str(results)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": site},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (results / "RESULTS.md").is_file()
