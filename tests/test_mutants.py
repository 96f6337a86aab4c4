"""The listed faults match the package, and `mutants.py` tells caught faults from others."""

import json
from collections import Counter
from dataclasses import replace

import mutants
import pytest
from mutants import ROOT, Fault, Verdict

LISTED = mutants.listed()
CAUGHT_BY_TEST = (mutants.CAUGHT, "t.py::test", 1.0)
KL = "aezoo/models/variational/vae.py: VAE.kl: detach 1"
FIND_DETACHMENTS = mutants.detachments
QUICK = "aezoo/corruptions.py: GaussianNoise.forward: drop factor 1"


@pytest.fixture(autouse=True)
def _without_detachments(monkeypatch):
    """Skip the search for detachments, which takes minutes."""
    monkeypatch.setattr(mutants, "detachments", lambda patterns: [])


def quick():
    return next(fault for fault in mutants.generated() if fault.identity == QUICK)


@pytest.mark.slow
def test_every_listed_fault_matches_once_and_has_a_test():
    misfits = [fault.identity for fault in LISTED if fault.occurrences() != 1]
    assert not misfits, f"tests/mutants.txt is stale, correct the old text of: {misfits}"
    assert all(fault.old != fault.new for fault in LISTED)
    missing = [fault.identity for fault in LISTED if not all((ROOT / test).is_file() for test in fault.tests() or "?")]
    assert not missing, f"no test file in tests/mutants.txt, nor one of the file's name, for: {missing}"
    assert {fault.file.partition("/")[0] for fault in LISTED} <= {*mutants.COPIED}


def test_listed_faults_are_distinct():
    assert max(Counter(fault.identity for fault in LISTED).values()) == 1
    assert max(Counter((fault.file, fault.old, fault.new) for fault in LISTED).values()) == 1


def test_equivalent_mutants_exist_and_have_reasons(monkeypatch):
    equivalent = mutants.EQUIVALENT
    left_out = {fault.identity for fault in mutants.generated()}
    assert not left_out & equivalent.keys()
    assert all(len(reason) > 10 for reason in equivalent.values())
    monkeypatch.setattr(mutants, "EQUIVALENT", {})
    assert {fault.identity for fault in mutants.generated()} == left_out | equivalent.keys()


@pytest.mark.slow
def test_every_formula_has_a_test():
    files = {fault.file for fault in mutants.generated()}
    assert not [file for file in sorted(files) if not mutants.test_files(file)]


@pytest.mark.slow
def test_test_files_are_derived_from_source_name():
    assert mutants.test_files("aezoo/corruptions.py") == ["tests/test_corruptions.py"]
    golden = mutants.golden_tests("aezoo/models/variational/mine_vae.py")
    assert len(golden) == 2 and golden[0] == "tests/test_golden.py::test_golden_values[mine_vae]"
    assert golden[1].startswith("tests/test_golden.py::test_golden_values[mine_vae(")
    assert mutants.golden_tests("aezoo/manifolds/poincare.py")[0].endswith("[poincare_vae]")
    assert any("[vae(net='gdn'" in test for test in mutants.golden_tests("aezoo/nets/gdn.py"))
    assert mutants.golden_tests("aezoo/cli/main.py") == []


def test_mutant_list_is_parsed_exactly():
    first = "# head\n[a.py]\none\n-   x = 1\n-\n+   x = 2\ntwo\n- - b\n+\n"
    second = "\n[c.py -> u.py]\nthree\n- d\n+ + d\n+ e\n"
    assert list(mutants.parse(first + second)) == [
        Fault("one", "a.py", "  x = 1\n", "  x = 2"),
        Fault("two", "a.py", "- b", ""),
        Fault("three", "c.py", "d", "+ d\ne", "u.py"),
    ]


@pytest.mark.slow
def test_detachments_are_found_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "DETACHMENTS", tmp_path / "kept.json")
    found = FIND_DETACHMENTS(["/vae.py: VAE.kl: "])
    assert found[0].identity == KL
    assert {fault.old for fault in found} >= {
        "0.5 * (mu_BD**2 + log_var_BD.exp() - 1 - log_var_BD).sum(1)",
        *("mu_BD**2 + log_var_BD.exp() - 1", "mu_BD**2", "log_var_BD"),
    }
    assert found[0].tests() == [f"{mutants.GOLDEN}::test_golden_values[{found[0].golden}]", *found[0].tests(False)]
    monkeypatch.setattr(mutants.subprocess, "run", None)
    assert FIND_DETACHMENTS(["/vae.py: VAE.kl: "]) == found
    assert {fault.file for fault in FIND_DETACHMENTS(["/vae.py: "])} == {found[0].file}


@pytest.mark.slow
def test_a_fault_is_caught_in_a_copy(capsys):
    before = (ROOT / "aezoo/corruptions.py").read_bytes()
    assert mutants.main([QUICK, "--jobs", "1", "--without-golden"]) == 0
    line, summary = capsys.readouterr().out.splitlines()
    assert line.startswith("caught") and QUICK in line and "tests/test_corruptions.py::test_gaussian_noise" in line
    assert summary == "1 of 1 faults caught, 100.0%; needed: 90%"
    assert (ROOT / "aezoo/corruptions.py").read_bytes() == before


@pytest.mark.slow
def test_interrupted_mutation_run_resumes(tmp_path, monkeypatch, capsys):
    judged, file = [], tmp_path / "kept"
    monkeypatch.setattr(
        mutants, "run_fault", lambda fault, *_: (judged.append(fault), Verdict(fault, *CAUGHT_BY_TEST))[1]
    )
    monkeypatch.setattr(mutants, "failing_without_fault", lambda *_: [])
    call = ["corruptions", "--jobs", "1", "--keep", str(file)]
    assert mutants.main(call) == 0
    every, text = len(judged), file.read_text()
    assert every > 2
    file.write_text(text.rpartition("[")[0] + '["cut')
    assert mutants.main(call) == 0
    assert len(judged) == every + 1
    assert mutants.main(call) == 0
    assert len(judged) == every + 1
    assert capsys.readouterr().out.count(f"{every} of {every} faults caught") == 3
    # verdicts of another state of the files are not used
    monkeypatch.setattr(mutants, "source_digest", lambda: "another")
    assert mutants.main(call) == 0
    assert len(judged) == 2 * every + 1


def test_draw_selects_subset_of_faults(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mutants, "run_fault", lambda fault, *_: Verdict(fault, *CAUGHT_BY_TEST))
    monkeypatch.setattr(mutants, "failing_without_fault", lambda *_: [])
    every = len(mutants.faults())
    assert mutants.main(["--draw", "20", "--out", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == {"listed": every, "faults": 20, "caught": 20}
    drawn = []
    for options in (["--draw", "20"], ["--draw", "20", "--seed", "1"], ["--draw", "20"], ["--draw", "99999"]):
        capsys.readouterr()
        assert mutants.main(["--list", *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        drawn.append(sorted(line for line in lines if line.startswith(("aezoo/", "benchmarks/"))))
    assert drawn[0] == drawn[2] != drawn[1]
    assert [len({*lines}) for lines in drawn] == [20, 20, 20, every]


def test_state_hash_covers_all_copied_files(tmp_path):
    for name in mutants.COPIED:
        (tmp_path / name).mkdir() if "." not in name else (tmp_path / name).write_text("")
    states = [mutants.source_digest(tmp_path)]
    for name in ("aezoo/a.py", "tests/b.txt", "pyproject.toml"):
        (tmp_path / name).write_text("changed")
        states.append(mutants.source_digest(tmp_path))
    assert len({*states}) == len(states)
    (tmp_path / "aezoo/__pycache__").mkdir()
    (tmp_path / "aezoo/__pycache__/a.pyc").write_text("compiled")
    assert mutants.source_digest(tmp_path) == states[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "limit", "outcome"),
    [
        ({"new": "noise * self.amount"}, 300, mutants.SURVIVED),
        ({"new": "self.amount *"}, 300, mutants.BROKEN),
        ({}, 0.01, mutants.TIMED_OUT),
        ({"old": "2 * noise"}, 300, mutants.STALE),
    ],
)
def test_surviving_mutants_are_reported(change, limit, outcome):
    assert mutants.run_fault(replace(quick(), **change), limit, golden=False).outcome == outcome


def test_run_fails_below_90_percent_or_on_stale_fault():
    caught = [Verdict(fault, mutants.CAUGHT, "t.py::test") for fault in LISTED[:9]]
    survived, stale = (Verdict(LISTED[9], word, "t.py") for word in (mutants.SURVIVED, mutants.STALE))
    assert mutants.summary([*caught, survived])[1]
    assert not mutants.summary([*caught[1:], survived])[1]
    assert not mutants.summary([*caught, stale])[1]
    assert LISTED[9].identity in mutants.summary([*caught, stale])[0]
    assert not mutants.summary([*caught, survived], ["t.py::test"])[1]


@pytest.mark.slow
def test_tests_failing_without_fault_are_excluded(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "COPIED", ("aezoo", "test_all.py"))
    (tmp_path / "aezoo").mkdir()
    (tmp_path / "aezoo" / "__init__.py").touch()
    (tmp_path / "test_all.py").write_text("def test_red():\n    assert False\n\n\ndef test_green():\n    pass\n")
    assert mutants.failing_without_fault(["test_all.py::test_green", "test_all.py::test_red"], 300) == [
        "test_all.py::test_red"
    ]


@pytest.mark.slow
def test_importing_package_outside_copy_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="another aezoo"):
        mutants.pytest_in(tmp_path, ["--version"], 300)
