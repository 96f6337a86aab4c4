"""The first hour of five kinds of users: figures read from a run, and their page."""

import numpy as np
import pytest

from aezoo.cli.main import main
from benchmarks import first_hour
from benchmarks.common import ROOT


def test_page_has_a_table_for_each_user_with_figures():
    rows = [{"user": "table", "task": "table", "figure": "AUROC", "before": "0.5", "here": "0.9"}]
    assert first_hour.page(rows).splitlines()[-4:] == [
        "",
        "| task | figure | before | after |",
        "|---|---|---|---|",
        "| table | AUROC | 0.5 | 0.9 |",
    ]
    assert "## Table: Measurements of tumours" in first_hour.page(rows) and "## Student" not in first_hour.page(rows)


@pytest.mark.slow
def test_figures_are_those_of_the_run_and_of_its_scores(tmp_path, monkeypatch, capsys):
    user, rng = first_hour.User(tmp_path, ROOT), np.random.default_rng(0)
    normal = rng.normal(5, 1, (120, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", normal[:90])
    run, figures = user.fit("--model", "linear_ae", "--data", "x.npy", "--trainer.max_epochs", "2")
    assert figures["epochs"] == 2 and figures["parameters"] > 6 and figures["checkpoints, MB"] > 0
    with pytest.raises(first_hour.AezooError, match="no_such"):
        user.aezoo("info", "no_such")

    def in_this_process(*words):
        main([*words])
        return capsys.readouterr().out, 0.0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(user, "aezoo", in_this_process)
    found = user.detect(run, normal[90:], normal[90:] + 30)
    assert found["AUROC"] == found["AUROC, mse"] == 1 and 0 <= found["flagged"] < 0.6
