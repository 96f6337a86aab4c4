"""Tests of the search for detached sub-expressions that change gradients."""

import torch
from detachments import Probe, differ


def test_gradients_differ_by_more_than_rounding():
    right = {"weight": torch.tensor([3.0, 4.0], dtype=torch.float64), "bias": torch.zeros(2, dtype=torch.float64)}
    assert not differ(right, right)
    assert not differ({"weight": right["weight"]}, right)  # a missing gradient is zero
    assert not differ({**right, "weight": right["weight"] * (1 + 1e-12)}, right)
    assert not differ({**right, "bias": right["bias"] + 1e-17}, right)
    assert differ({**right, "weight": right["weight"] * (1 + 1e-7)}, right)
    assert differ({**right, "bias": right["bias"] + 1e-7}, right)
    assert differ({"bias": right["bias"]}, right)
    assert differ({**right, "weight": right["weight"] * float("nan")}, right)


def test_probe_detaches_the_chosen_or_notes_tensors():
    probe, x = Probe(), torch.ones(2, requires_grad=True)
    assert probe("a", x) is x and probe("b", x.detach()).sum() == 2 and probe("c", 3) == 3
    assert (probe.tensors, probe.others) == ({"a"}, {"c"})
    probe.chosen = "a"
    assert not probe("a", x).requires_grad and probe("d", x) is x and probe.tensors == {"a"}
