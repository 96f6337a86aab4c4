"""The end of `aezoo info`: a working command, the measured row, and better models."""

import json
import subprocess
import sys

import pytest
from golden import own_models

import aezoo
from aezoo import registry
from aezoo.cli import TASK_COMMANDS, measured
from aezoo.cli.main import main
from aezoo.testing import subject_of


def test_info_ends_with_command_figures_and_rivals(capsys):
    main(["info", "vae"])
    out = capsys.readouterr().out
    found = json.loads(measured.RESULTS.read_text())["vae"]
    end = out.partition("\nTry it\n")[2].splitlines()
    assert end[0] == "  aezoo fit --model vae && aezoo generate --ckpt_path runs/vae-mnist5k/0"
    row = found["row"]
    assert end[2] == f"Measured on mnist5k: {row['setting']}; test split, median of {row['seeds']} seeds"
    for label, value in row["figures"].items():
        assert label.format(f"{value:g}") in end[3]
    assert end[5] == "Better models and baselines, on the same data with the same budget and size of code"
    for of in found["compared"]:
        figure = of["measure"].format(f"{of['value']:g}")
        at = end.index(f"  {of['use']}: {figure} on {of['data']}")
        assert of["setting"] in end[at + 1]
        assert all(f"{rival} {value:g}" in end[at + 2] for rival, value in of["better"])
    assert {of["use"] for of in found["compared"]} <= set(registry.uses_of("vae"))


def test_info_says_what_has_no_figures_or_rivals(capsys, tmp_path, monkeypatch):
    alone = {"use": "reconstruction", "measure": "mse {}", "value": 0.1, "data": "digits", "setting": "",
             "better": [], "n_better": 0, "n_rivals": 0}  # fmt: skip
    best = alone | {"n_rivals": 7, "use": "generation"}
    pca = {"data": "digits", "ratio": 1.5, "without": 0.75, "flags": "--model.beta 0.1", "cause": "the prior"}
    (tmp_path / "results.json").write_text(json.dumps({"vae": {"row": None, "compared": [alone, best], "pca": pca}}))
    monkeypatch.setattr(measured, "RESULTS", tmp_path / "results.json")
    assert measured.lines("conv_ae")[-1] == "Not measured yet: `aezoo benchmark` lists what measures models"
    text = "\n".join(measured.lines("vae"))
    assert "Measured on" not in text
    assert "reconstruction: mse 0.1 on digits\n    better: no other was measured in the same setting" in text
    assert "generation: mse 0.1 on digits\n    better: none of 7 others" in text
    assert text.endswith(
        "Trained to convergence on digits: 1.5 times the error of PCA with as large a code\n"
        "  0.75 times with --model.beta 0.1\n  cause: the prior"
    )


def test_every_model_has_the_end_of_info_without_torch():
    code = (
        "import sys\nfrom aezoo import registry\nfrom aezoo.cli import measured\n"
        "print([name for name in registry.list_models() if not measured.lines(name)[1].strip()])\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("name", own_models())
def test_command_of_every_model_can_be_run(name):
    fit, use = (part.split() for part in measured.command(name).split(" && "))
    assert fit == ["aezoo", "fit", "--model", name] and use[:1] == ["aezoo"] and use[1] in TASK_COMMANDS
    assert use[-2:] == ["--ckpt_path", f"runs/{name}-mnist5k/0"]
    assert subject_of(name).takes((1, 28, 28))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["memory_ae", "vae", "beta_vae", "topk_sae", "dncnn", "mvae"])
def test_command_of_each_use_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fit, use = (part.split()[1:] for part in measured.command(name).split(" && "))
    main([*fit, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1",
          "--trainer.limit_test_batches=1", "--data.batch_size=32", "--trainer.accelerator=cpu"])  # fmt: skip
    main(use)
    assert any((tmp_path / "runs" / f"{name}-mnist5k" / "0" / use[0]).iterdir())
    assert aezoo.model_class(name)
