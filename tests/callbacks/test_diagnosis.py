"""Diagnosis of example loss curves."""

import dataclasses
import math
import re

import pytest
from example_curves import DOCS, EXAMPLES, curves, falling

from aezoo import registry
from aezoo.report.diagnosis import Curves, diagnose, docs_page


def sections(history, run="runs/vae/0"):
    return [verdict.section for verdict in diagnose(history, run)]


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_curves_get_their_verdict(name):
    (verdict,) = diagnose(EXAMPLES[name], "runs/vae/0")
    assert verdict.section == name
    assert re.search(
        f"^## {name.replace('-', ' ').capitalize()}\n\n.*pictures/{name}.png", docs_page().read_text(), re.M
    )
    assert (DOCS / "pictures" / f"{name}.png").is_file()
    assert str(verdict).endswith(f"training.md#{name}") and "\n" not in str(verdict)


def test_models_of_one_epoch_get_no_advice_to_train_longer():
    short = curves(falling(1), falling(1), steps_per_epoch=2, n=1)
    assert sections(short) == ["too-few-steps"]
    assert sections(dataclasses.replace(short, one_epoch=True)) == []
    made = {name: getattr(registry.model_class(name), "one_epoch", False) for name in registry.list_models()}
    assert [name for name, is_one in made.items() if is_one] == ["padim", "patchcore"]


def test_verdicts_contain_the_figures_and_the_command():
    texts = {name: diagnose(history, "runs/vae/0")[0].text for name, history in EXAMPLES.items()}
    assert texts["still-improving"].endswith("aezoo fit --ckpt_path runs/vae/0 --trainer.max_epochs 120 continues")
    assert texts["too-few-steps"].startswith(
        "80 steps only: aezoo fit --ckpt_path runs/vae/0 --trainer.max_epochs 125 "
    )
    nearly = curves(falling(15), falling(15), steps_per_epoch=16, n=30)
    assert "480 steps only: --trainer.max_epochs 60 continues" in diagnose(nearly)[0].text
    assert re.search(r"risen since epoch 2\d: overfitting", texts["overfitting"])
    assert "20 epochs without improvement of val/loss after epoch 25" in texts["stopped-early"]
    steps = curves(falling(30), falling(30), limit="max_steps")
    assert "continues" in diagnose(steps)[0].text and "--ckpt_path" not in diagnose(steps)[0].text
    assert "--trainer.max_steps 6000 continues" in diagnose(steps)[0].text


@pytest.mark.slow
@pytest.mark.parametrize("n", [15, 60])
def test_noisy_plateaus_raise_no_alarm(n):
    alarms = 0
    for seed in range(1000):
        noise = (0.1, 3.0, 10.0)[seed % 3]
        level = curves(falling(0.8), falling(0.8, 104), noise, steps_per_epoch=10 ** (seed % 4), n=n, seed=seed)
        alarms += sections(level) != ["level"]
    assert alarms <= 5


def test_epochs_without_validation_count_as_level():
    level = curves(falling(5), falling(5), 0.5)
    counts = []
    for period in (1, 3):
        epochs = [period * epoch for epoch in level.epochs]
        text = diagnose(Curves(epochs, level.train, level.val, steps=3000))[0].text
        counts.append(int(re.search(r"level for (\d+) epochs", text)[1]))
    assert counts[1] == 3 * (counts[0] - 1) + 1


def test_code_and_pca_are_compared():
    level = curves(falling(5), falling(5), 0.5)
    values = {"epochs": level.epochs, "train": level.train, "val": level.val, "steps": 3000, "units": 16}
    assert sections(Curves(**values, dead_units=1)) == ["level"]
    found = diagnose(Curves(**values, dead_units=5, mse=0.035, pca_mse=0.027))
    assert [verdict.section for verdict in found] == ["level", "worse-than-pca", "dead-units"]
    assert "mean squared error 0.035, PCA with 16 components 0.027" in found[1].text
    assert "the code has 5 dead units of 16" in found[2].text
    # the curve is level
    assert found[1].text.endswith("; try another --model.lr or a wider network")
    vae = diagnose(Curves(**values, mse=0.035, pca_mse=0.027, has_posterior=True, has_beta=True))
    assert "; try a smaller --model.beta, which" in vae[1].text
    short = {**values, "epochs": [1, 2, 3], "train": [3, 2, 1], "val": [3, 2, 1], "steps": 30}
    assert diagnose(Curves(**short, mse=0.035, pca_mse=0.027))[1].text.endswith(
        "try more epochs, another --model.lr or a wider network"
    )
    for mse, pca_mse in ((0.028, 0.027), (math.nan, 0.027), (0.035, math.nan)):
        assert sections(Curves(**values, mse=mse, pca_mse=pca_mse)) == ["level"]
    headings = {"## Worse than PCA", "## Dead units", "## Posterior collapse", "## Decode gives logits"}
    assert headings <= set(docs_page().read_text().splitlines())
    # findings about the code or the decoder's output take precedence over the curves
    none = {"dead_units": 16, "mse": 0.07, "pca_mse": 0.027}
    (collapse,) = diagnose(Curves(**values, **none, has_posterior=True, has_beta=True))
    assert re.match("posterior collapse: all 16 units .* try a smaller --model.beta", collapse.text)
    (collapse,) = diagnose(Curves(**values, **none, has_posterior=True))
    assert collapse.text.startswith("posterior collapse") and "beta" not in collapse.text
    (dead,) = diagnose(Curves(**values, **none))
    assert dead.text.startswith("the code is dead: all 16 units")
    (logits,) = diagnose(Curves(**values, mse=2.5, pca_mse=0.027, decoded=(-7.25, 6.5)))
    assert logits.text.startswith("decode gives values from -7.25 to 6.5 for data in [0, 1]: logits must")


def test_curves_with_gaps_and_short_ones_are_read():
    assert sections(Curves((), (), ())) == []
    one = Curves((1,), (3.0,), (math.nan,), steps=10)
    assert sections(one) == ["too-few-steps"]
    untouched = curves(falling(30), falling(30), n=60)
    gaps = [loss if epoch % 5 == 0 else math.nan for epoch, loss in zip(untouched.epochs, untouched.val, strict=True)]
    assert sections(Curves(untouched.epochs, untouched.train, gaps, 3000)) == ["still-improving"]
    nowhere = [math.nan] * 60
    (verdict,) = diagnose(Curves(untouched.epochs, untouched.train, nowhere, 3000))
    assert "train/loss fell" in verdict.text
    # overfitting needs a rise of the validation loss only
    assert sections(EXAMPLES["rising"]) == ["rising"]
