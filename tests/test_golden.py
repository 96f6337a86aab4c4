"""Golden values agree on every processor, and none of them hangs on a tie that rounding decides."""

import copy

import pytest
from golden import NUDGE, TOLERANCE, differences, golden_values, recorded, subjects

SUBJECTS = subjects()
of_each = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.label)


@of_each
def test_golden_values(subject):
    golden = recorded()
    assert subject.label in golden, "run python -m tests.golden"
    assert not differences(golden_values(subject), golden[subject.label], TOLERANCE)


@pytest.mark.slow
@of_each
def test_no_golden_value_hangs_on_a_tie(subject):
    assert not differences(golden_values(subject, NUDGE), recorded()[subject.label], 1000 * NUDGE)


def test_no_golden_values_of_models_that_are_gone():
    assert set(recorded()) == {subject.label for subject in SUBJECTS}


def test_a_difference_is_told():
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
