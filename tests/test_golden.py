"""Golden values are the same on every processor, and do not depend on ties decided by rounding."""

import copy

import pytest
from golden import TOLERANCE, differences, golden_values, recorded, subjects
from representative_models import SLOW_REPRESENTATIVE

SUBJECTS = subjects()
of_each = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.label)
others_slow = pytest.mark.parametrize(
    "subject",
    [
        pytest.param(subject, id=subject.label, marks=[pytest.mark.slow] * (subject.label not in SLOW_REPRESENTATIVE))
        for subject in SUBJECTS
    ],
)


@others_slow
def test_golden_values(subject):
    golden = recorded()
    assert subject.label in golden, "run python -m tests.golden"
    assert not differences(golden_values(subject), golden[subject.label], TOLERANCE)


def test_golden_values_exist_for_current_models_only():
    assert set(recorded()) == {subject.label for subject in SUBJECTS}


def test_golden_differences_are_reported():
    golden = recorded()["vae"]
    assert not differences(golden, golden, TOLERANCE)
    for kind, name in (
        ("terms", "kl"),
        ("gradient", "encoder.norm"),
        ("gradient", "decoder.projection"),
        ("step", "after"),
    ):
        for factor in (1 + 2 * TOLERANCE, float("nan")):
            changed = copy.deepcopy(golden)
            changed[kind][name] *= factor
            assert [line.split(" is ")[0] for line in differences(changed, golden, TOLERANCE)] == [f"{kind} {name}"]
    del golden["terms"]["kl"]
    assert differences(recorded()["vae"], golden, TOLERANCE) == [f"terms has {sorted(recorded()['vae']['terms'])}"]
