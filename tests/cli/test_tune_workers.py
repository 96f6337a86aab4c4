"""`aezoo tune` with several workers: on a PostgreSQL server, on files, and on machines that share nothing else."""

import contextlib
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import optuna
import postgres
import pytest
import yaml
from optuna.trial import TrialState

from aezoo.cli import tune_samplers, tune_storage, tune_study
from aezoo.cli.main import main
from aezoo.cli.tune_search import search
from aezoo.errors import AezooError, install_hint

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
BASE = ["tune", "--model=vae", "--data=digits"]
LR = "--search.model.lr=log:1e-4:1e-1"
FIT = (sys.executable, str(Path(__file__).with_name("tune_fit.py")))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def port():
    with postgres.server() as port:
        yield port


@pytest.fixture
def fake(monkeypatch):
    """Fake trials: `fake(what)` sets the outcome of each one, by the number of its folder."""
    monkeypatch.setattr(tune_study, "FIT", FIT)
    return lambda **what: monkeypatch.setenv("FAKE_FIT", json.dumps({key.lstrip("_"): what[key] for key in what}))


def ends(*argv, code=2):
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    assert end.value.code == code


def rows(folder):
    with Path(folder, "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def load(url, name):
    return optuna.load_study(study_name=name, storage=tune_storage.open_storage(url))


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)
    return found


# ---- a server --------------------------------------------------------------------------------------------------------

needs_server = pytest.mark.skipif(postgres.binaries() is None, reason="a PostgreSQL server")


WORKER = f"""
import sys
from aezoo.cli import tune_study
from aezoo.cli.main import main
tune_study.FIT = {FIT!r}
main(sys.argv[1:])
"""


@pytest.mark.slow
@needs_server
def test_postgresql_workers_share_study_and_replace_killed_one(port, fake):
    url = postgres.create_database(port, "sweeps")
    workers = {}
    for name, folder in (("a", "one"), ("b", "one"), ("c", "two")):
        fake(_0="hang") if name == "a" else fake()
        command = [sys.executable, "-c", WORKER, *BASE, LR, "--trials=3", f"--storage={url}",
                   "--study_name=sweep", f"--study={folder}", "--lost_after=5"]  # fmt: skip
        with Path(f"{name}.txt").open("wb") as log:
            workers[name] = subprocess.Popen(command, stdout=log, stderr=log)
        if name == "a":
            until(lambda: b" runs, its output" in Path("a.txt").read_bytes())
            (hangs,) = until(lambda: [file for file in Path("one").glob("*/*/*/hangs") if file.read_text()])
    try:
        until(lambda: b" runs, its output" in Path("b.txt").read_bytes() + Path("c.txt").read_bytes())
        workers["a"].kill()
        assert [workers[name].wait(400) for name in "abc"] == [-signal.SIGKILL, 0, 0]
    finally:
        os.kill(int(hangs.read_text()), signal.SIGKILL)
        for worker in workers.values():
            worker.kill()
            worker.wait()
    said = "".join(Path(f"{name}.txt").read_text() for name in "abc")
    killed = int(Path("a.txt").read_text().split(" runs, its output")[0].split("trial ")[-1])
    trials = load(url, "sweep").trials
    # each of the three settings has one complete trial; the killed worker's trial has another attempt
    whole = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert len(whole) == 3 == len({trial.params["model.lr"] for trial in whole}), said
    assert trials[killed].state == TrialState.FAIL
    (again,) = [trial for trial in whole if trial.system_attrs.get("failed_trial") == killed]
    assert again.params == trials[killed].params and again.user_attrs["lost"] == 1
    for folder in ("one", "two"):
        table = [row for row in rows(folder) if row["state"] == "complete"]
        assert [float(row["model.lr"]) for row in table] == [trial.params["model.lr"] for trial in whole]
        best = min(whole, key=lambda trial: trial.value)
        config = yaml.safe_load(Path(folder, "best.yaml").read_text())
        assert config["model"]["init_args"]["lr"] == best.params["model.lr"]
        assert "Plotly.newPlot" in Path(folder, "study.html").read_text()
    kept = said + "".join(path.read_text() for path in (*Path.cwd().glob("*/*.*"), *Path.cwd().glob("*/*/log.txt")))
    with postgres.connect(port, "sweeps") as connection:
        for table in ("study_user_attributes", "trial_user_attributes"):
            kept += str(connection.execute(f"SELECT value_json FROM {table}").fetchall())
    assert postgres.PASSWORD not in kept and postgres.QUOTED not in kept and f"{postgres.USER}:***@127.0.0.1" in kept


@pytest.mark.slow
@needs_server
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ((postgres.QUOTED, "w%40rong"), "password authentication failed for user"),
        (("/none", "/missing"), 'database "missing" does not exist; create the database first'),
        (("PORT", "1"), "; check that the server runs and can be reached from this machine"),
        (("127.0.0.1", "none.invalid"), "; check that the server runs and can be reached from this machine"),
    ],
)
def test_database_error_is_one_line_without_password(port, capsys, fake, change, words):
    url = f"postgresql://{postgres.USER}:{postgres.QUOTED}@127.0.0.1:{port}/none".replace(*change)
    ends(*BASE, LR, f"--storage={url.replace(str(port), '1') if change[0] == 'PORT' else url}")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"aezoo: cannot use postgresql://{postgres.USER}:***@") and words in line
    assert not any(secret in line for secret in (postgres.PASSWORD, postgres.QUOTED, "rong")), line
    assert not Path("runs").exists()


@pytest.mark.slow
@needs_server
def test_server_that_ends_stops_worker_in_one_line(port, capsys, fake):
    fake(_0="hang")
    url = postgres.create_database(port, "ends")

    def end():
        until(lambda: [*Path("study").glob("*/*/*/hangs")])
        with postgres.connect(port) as connection:
            connection.execute("ALTER DATABASE ends ALLOW_CONNECTIONS false")
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'ends'")

    thread = threading.Thread(target=end)
    thread.start()
    ends(*BASE, LR, f"--storage={url}", "--study=study", "--lost_after=2")
    thread.join()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("aezoo: the study in study stopped: ") and "what was recorded is kept" in line


# ---- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("postgresql://me:secret@host:5432/sweeps is down", "postgresql://me:***@host:5432/sweeps is down"),
        ("postgresql://me@host/sweeps", "postgresql://me@host/sweeps"),
        ("postgresql://host/sweeps?user=me&password=secret&sslmode=require",
         "postgresql://host/sweeps?user=me&password=***&sslmode=require"),
        ("--storage=postgresql+psycopg://me:sec%40:ret@h/d --trials 3",
         "--storage=postgresql+psycopg://me:***@h/d --trials 3"),
        ("postgresql://me:se@cr@et@host/d", "postgresql://me:***@host/d"),
    ],
)  # fmt: skip
def test_passwords_in_addresses_are_hidden(text, hidden):
    assert tune_storage.hide_passwords(text) == hidden


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ("postgresql://me:se/cret@host/sweeps", "percent-encode special characters of its password"),
        ("postgresql://me:se@cret@host/sweeps", "percent-encode special characters of its password"),
        ("postgresql://me:se#cret@host/sweeps", "percent-encode special characters of its password"),
        ("postgresql://me:se cret@host/sweeps", "percent-encode special characters of its password"),
        ("postgresql://me:secret@host:port/sweeps", "this address cannot be read"),
        ("postgresql://me:secret@host", "postgresql://me:***@host: the database is missing"),
        ("postgresql:///sweeps", "the host is missing"),
        ("mysql://me:secret@host/sweeps", "--storage mysql://me:***@host/sweeps: give postgresql://"),
        ("sqlite:///", "--storage sqlite:///: give postgresql://"),
    ],
)
def test_invalid_storage_address_is_refused_in_one_line(capsys, storage, words):
    ends(*BASE, LR, f"--storage={storage}")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("aezoo: --storage") and words in line and "cret" not in line


@pytest.mark.parametrize(("package", "flag"), [("psycopg", "--storage=postgresql://h/d"), ("plotly", "--trials=3"),
                                               ("cmaes", "--sampler=cmaes")])  # fmt: skip
def test_missing_package_names_extra_to_install(capsys, monkeypatch, package, flag):
    monkeypatch.setitem(sys.modules, package, None)
    ends(*BASE, LR, "--search.model.beta=float:1:4", flag)
    (line,) = capsys.readouterr().err.splitlines()
    assert package in line and install_hint("tune") in line


# ---- samplers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--search.model.likelihood=bernoulli,gaussian", "--sampler=cmaes"], "cmaes takes ranges of numbers only"),
        (["--sampler=cmaes"], "--sampler cmaes searches two or more settings"),
        (["--sampler=grid"], "log:1e-4:1e-1: --sampler grid takes values, such as 0.001,0.01 or int:LOW:HIGH:STEP"),
        (["--sampler=bayes"], "invalid choice: 'bayes'"),
        (["--lost_after=1"], "--lost_after takes seconds from 2"),
        (["--study_name= "], "--study_name takes a name"),
    ],
)
def test_settings_a_sampler_cannot_draw_are_refused(capsys, flags, words):
    ends(*BASE, LR, *flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("aezoo: ") and words in line and not Path("runs").exists()


def test_grid_sets_number_of_trials():
    grid = ["--search.model.a=int:1:7:3", "--search.model.b=x,y", "--sampler=grid"]
    from aezoo.cli import tune

    assert [tune.read([*grid, *more])[0].trials for more in ([], ["--trials=4"], ["--trials=99"])] == [6, 4, 6]
    with pytest.raises(AezooError, match="20000 combinations are more than 10000"):
        tune.read(["--search.model.a=int:1:10000", "--search.model.b=x,y", "--sampler=grid"])


def drawn(name, searches, together=1, n=6, seed=0):
    """The values drawn by trials, `together` of which run at the same time, in order of their numbers."""
    study = optuna.create_study()
    study.sampler = tune_samplers.WorkerSampler(name, seed, searches, lambda trial: trial.number)
    values, running = [], []
    for _ in range(n):
        trial = study.ask()
        values.append(tuple(each.suggest(trial) for each in searches))
        running.append(trial)
        if len(running) == together:
            for trial in running:
                study.tell(trial, sum(map(float, trial.params.values())))
            running = []
    return values


RANGES = [search("a", "float:0:1"), search("b", "int:1:64")]


@pytest.mark.parametrize("name", ["tpe", "cmaes", "random"])
def test_workers_draw_determined_and_different_settings(name):
    values = drawn(name, RANGES, together=3, n=15)
    assert values == drawn(name, RANGES, together=3, n=15) and len(set(values)) == 15
    assert not {*values} & {*drawn(name, RANGES, together=3, n=15, seed=1)}


def test_cmaes_converges_faster_than_random():
    def late(name):
        return sum(float(a) + float(b) / 64 for a, b in drawn(name, RANGES, together=3, n=120)[-30:])

    assert late("cmaes") < late("random") / 2


@pytest.mark.parametrize("together", [1, 3])
def test_grid_draws_each_combination_once(together):
    searches = [search("a", "int:1:7:3"), search("b", "1,2")]
    values = drawn("grid", searches, together)
    assert sorted(values) == [(a, b) for a in "147" for b in "12"]
    assert values != drawn("grid", searches, together, seed=1)


# ---- workers ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["sqlite:///all.db", "all.log"])
def test_lost_workers_trial_runs_again_elsewhere(fake, capsys, storage):
    fake(_0="interrupt")
    command = [*BASE, LR, "--trials=2", f"--storage={storage}", "--study_name=x", "--lost_after=2"]
    ends(*command, "--study=one", code=130)
    # as if the worker that continued it was killed, on a machine whose files are not available
    study = load(storage, "x")
    trial = study.ask()
    trial.set_user_attr("heartbeat", [7, 2.0])
    trial.set_user_attr("place", {"host": "elsewhere", "folder": "/runs/0", "mark": "none"})
    capsys.readouterr()
    fake()
    main([*command, "--study=two"])
    said = capsys.readouterr().out
    assert f"trial {trial.number} has sent no heartbeat for too long: its worker is lost" in said
    assert "waiting for 1 trials of other workers" in said
    table = rows("two")
    assert [row["state"] for row in table] == ["interrupted", "lost", "complete", "complete"]
    again = max(table[2:], key=lambda row: row["model.lr"] == table[0]["model.lr"])
    assert again["model.lr"] == table[0]["model.lr"] and again["run"].startswith("two/")
    assert table[1]["run"] == "elsewhere:/runs/0"


@pytest.mark.slow
def test_single_worker_resumes_killed_trial_immediately(fake, capsys):
    fake()
    command = [*BASE, LR, "--study=one"]
    main([*command, "--trials=1"])
    trial, root = load("one/study.log", "one").ask(), Path("one/1")
    search("model.lr", "log:1e-4:1e-1").suggest(trial)
    root.mkdir()
    (root / ".trial").write_text("mark")
    (root / "log.txt").touch()
    trial.set_user_attr("heartbeat", [0, 120.0])
    trial.set_user_attr("place", {"host": socket.gethostname(), "folder": str(root.absolute()), "mark": "mark"})
    trial.set_user_attr("run", "1")
    capsys.readouterr()
    main([*command, "--trials=2"])
    assert "no heartbeat" not in capsys.readouterr().out
    table = rows("one")
    assert [row["state"] for row in table] == ["complete", "lost", "complete"]
    assert table[1]["run"] == table[2]["run"] == "one/1" and table[1]["model.lr"] == table[2]["model.lr"]


@pytest.mark.slow
def test_trial_that_loses_three_workers_is_given_up(fake, capsys):
    fake()
    command = [*BASE, LR, "--storage=all.db", "--study_name=x", "--lost_after=2", "--study=one"]
    main([*command, "--trials=1"])
    study = load("all.db", "x")
    for _ in range(2):
        study.ask()
    # both earlier attempts were lost, too
    numbers = [trial.number for trial in study.trials if trial.state == TrialState.RUNNING]
    for number in numbers:
        study.tell(number, state=TrialState.FAIL)
        tune_study._queue(study, study.trials[number], lost=2)
        study.ask()
    capsys.readouterr()
    main([*command, "--trials=3"])
    assert capsys.readouterr().out.count("has been lost with 3 workers and is not run again") == 2
    assert [row["state"] for row in rows("one")].count("complete") == 1


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_worker_hands_its_trial_back(fake, signum):
    fake(_1="hang")
    command = [*BASE, LR, "--trials=2", "--storage=all.db", "--study_name=x"]

    def stop():
        until(lambda: [*Path("one").glob("1/*/*/hangs")])
        signal.pthread_kill(threading.main_thread().ident, signum)

    thread = threading.Thread(target=stop)
    thread.start()
    ends(*command, "--study=one", code=128 + signum)
    thread.join()
    states = [trial.state for trial in load("all.db", "x").trials]
    assert states == [TrialState.COMPLETE, TrialState.FAIL, TrialState.WAITING]
    assert [row["state"] for row in rows("one")] == ["complete", "interrupted", "waiting"]
    assert Path("one/study.html").is_file()
    fake()
    main([*command, "--study=two"])
    first, second = rows("two")[1:]
    assert second["state"] == "complete" and second["model.lr"] == first["model.lr"] and second["run"] == "two/0"


@pytest.mark.slow
def test_pruning_compares_with_trials_of_other_workers(fake):
    fake(_0="bad")
    command = [*BASE, LR, "--storage=all.db", "--study_name=x"]
    with contextlib.suppress(AezooError):
        fake()
        main([*command, "--trials=5", "--study=one"])
    fake(_0="bad")
    main([*command, "--trials=6", "--study=two"])
    table = rows("two")
    assert [row["state"] for row in table] == ["complete"] * 5 + ["pruned"]
    assert table[5]["run"] == "two/0" and table[5]["epochs"] == "4"
    assert [row["run"] for row in table[:5]] == [f"{socket.gethostname()}:{Path.cwd()}/one/{n}" for n in range(5)]
    # the folder of the best run need not exist
    best = min(table[:5], key=lambda row: float(row["val/loss"]))
    Path("one").rename("gone")
    main([*command, "--trials=6", "--study=two"])
    config = yaml.safe_load(Path("two/best.yaml").read_text())
    assert config["model"]["init_args"]["lr"] == float(best["model.lr"])


@pytest.mark.slow
def test_worker_drops_trial_that_another_has_taken_up(fake, capsys):
    fake(_0="hang")
    command = [*BASE, LR, "--trials=1", "--storage=all.db", "--study_name=x", "--study=one", "--lost_after=2"]

    def take():
        until(lambda: [*Path("one").glob("0/*/*/hangs")])
        study = load("all.db", "x")
        study.tell(0, state=TrialState.FAIL)
        tune_study._queue(study, study.trials[0], lost=1)

    thread = threading.Thread(target=take)
    thread.start()
    main(command)
    thread.join()
    assert "trial 0 was taken over by another worker" in capsys.readouterr().out
    assert [row["state"] for row in rows("one")] == ["lost", "complete"]


@pytest.mark.slow
def test_trials_beyond_the_number_are_withdrawn(fake, monkeypatch):
    fake()
    ask, others = optuna.Study.ask, []

    def ask_after_another(study):
        others.append(ask(study))  # by another worker, at the same time
        return ask(study)

    def finish(trial):
        trial.set_user_attr("value", 1.0)
        trial.study.tell(trial, 1.0)

    command = [*BASE, LR, "--storage=all.db", "--study=x"]
    main([*command, "--trials=1"])
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "ask", ask_after_another)
        patch.setattr(time, "sleep", lambda seconds: finish(others[0]))
        main([*command, "--trials=2"])
    assert len(others) == 1 and [row["trial"] for row in rows("x")] == ["0", "1"]
    main([*command, "--trials=3"])  # withdrawn trials do not count
    assert [row["trial"] for row in rows("x")] == ["0", "1", "3"]


def test_stopped_trial_is_not_done_and_next_attempt_keeps_run():
    study = optuna.create_study()
    trial = study.ask()
    trial.suggest_float("lr", 0, 1)
    place = {"host": "here", "folder": "/runs/3", "mark": "m"}
    for key, value in {"run": "3", "place": place, "heartbeat": [4, 120.0], "handed_back": True}.items():
        trial.set_user_attr(key, value)
    study.tell(trial, state=TrialState.FAIL)
    assert not tune_study._is_done(study.trials)
    tune_study._queue(study, study.trials[0])
    first, again = study.trials
    assert again.state == TrialState.WAITING and again.params == first.params and tune_study._first(again) == 0
    assert again.user_attrs == {"run": "3", "place": place, "lost": 0}
    failed = optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"error": "no memory left"})
    assert tune_study._is_done([failed])


def test_lost_workers_are_detected_by_the_local_clock_only(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(tune_study.time, "monotonic", lambda: clock[0])
    watch = tune_study._Watch(10.0)

    def lost(after, *beats):
        clock[0] += after
        trials = [optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={"heartbeat": beat} if beat else {})
                  for beat in beats]  # fmt: skip
        for number, trial in enumerate(trials):
            trial.number = number
        return [trial.number for trial in watch.lost(trials)]

    assert lost(0, [0, 10.0], [0, 30.0], None) == []
    assert lost(4, [1, 10.0], [0, 30.0], None) == []
    assert lost(4, [1, 10.0], [0, 30.0], None) == []
    assert lost(4, [1, 10.0], [0, 30.0], None) == [2]  # 12 s without any heartbeat
    assert lost(4, [1, 10.0], [0, 30.0]) == [0]  # 12 s without a new one
    assert lost(60, [2, 10.0], [0, 30.0]) == []  # this process was suspended
    assert [lost(4, [2 + n, 10.0], [0, 30.0]) for n in range(8)] == [[]] * 7 + [[1]]
