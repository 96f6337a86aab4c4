"""FusedStep compared exactly with torch's step, and when it uses torch's step."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from aezoo.speed.fused_optimizer import FusedStep


class Net(nn.Module):
    """Two layers, of which one gets gradients only in some steps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.late = nn.Linear(7, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x, step):
        out = self.a(x).tanh()
        return (self.b(out) if step % 5 != 3 else out[:, :3]) + (self.late(out) if step > 6 else 0)


def steps(net, optimizer, update, n=12, schedule=None, before=lambda i: None, inputs=(4, 7)):
    x = torch.randn(inputs, generator=torch.Generator().manual_seed(1))
    for i in range(n):
        before(i)
        optimizer.zero_grad()
        (net(x, i) - 1).square().sum().backward()
        update()
        if schedule is not None:
            schedule.step()


def assert_same(left, right):
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, dict):
            assert_same(value, right[key])
        else:
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(right[key])), key


MAKERS = {
    "adam": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "adam decays": lambda p: torch.optim.Adam(p, 0.01, betas=(0.8, 0.99), eps=1e-3, weight_decay=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True, fused=True),
    "maximise": lambda p: torch.optim.Adam(p, 0.01, maximize=True, fused=True),
    "not fused": lambda p: torch.optim.Adam(p, 0.01),
    "rate in a tensor": lambda p: torch.optim.Adam(p, torch.tensor(0.01), fused=True),
    "betas in tensors": lambda p: torch.optim.Adam(p, 0.01, (torch.tensor(0.9), torch.tensor(0.99)), fused=True),
    "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01, fused=True),
}


def pair(make, groups=False):
    """Two equal networks with equal optimisers."""
    made = []
    for net in (Net(), Net()):
        parts = [
            {"params": [*net.a.parameters()]},
            {"params": [*net.b.parameters(), *net.late.parameters()], "lr": 0.1},
        ]
        made.append((net, make(parts if groups else net.parameters())))
    return made


@pytest.mark.parametrize("groups", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("name", MAKERS)
def test_fused_step_matches_weights_and_state(name, groups):
    (net, own), (other, optimizer) = pair(MAKERS[name], groups)
    steps(net, own, own.step)
    steps(other, optimizer, FusedStep(optimizer))
    assert_same(net.state_dict(), other.state_dict())
    assert_same(own.state_dict()["state"], optimizer.state_dict()["state"])
    assert float(optimizer.state[other.late.weight]["step" if name != "sgd" else "momentum_buffer"].sum())


def test_fused_step_matches_in_float64_and_under_schedule():
    (net, own), (other, optimizer) = pair(MAKERS["adam"])
    for each in (net, other):
        each.double()
    schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.8) for each in (own, optimizer)]
    torch.set_default_dtype(torch.float64)
    try:
        steps(net, own, own.step, schedule=schedules[0])
        steps(other, optimizer, FusedStep(optimizer), schedule=schedules[1])
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(net.state_dict(), other.state_dict())


def test_loaded_state_and_added_group_match_plain_step():
    made = pair(MAKERS["adam"])
    for i, (net, optimizer) in enumerate(made):
        extra = nn.Parameter(torch.ones(3))
        kept = []

        def before(step, net=net, optimizer=optimizer, extra=extra, kept=kept):
            if step == 5:
                kept.append(copy.deepcopy(optimizer.state_dict()))
            if step == 9:
                optimizer.load_state_dict(kept[0])
            if step == 10:
                optimizer.add_param_group({"params": [extra], "lr": 0.5})
                net.late.register_forward_hook(lambda m, a, out: out + extra)

        steps(net, optimizer, FusedStep(optimizer) if i else optimizer.step, before=before)
    assert_same(made[0][0].state_dict(), made[1][0].state_dict())
    assert_same(made[0][1].state_dict()["state"], made[1][1].state_dict()["state"])
    assert len(made[1][1].state) == 7


def slow_steps(monkeypatch, optimizer, run):
    """The number of steps of `run` that were torch's own."""
    taken = []
    original = type(optimizer).step
    monkeypatch.setattr(type(optimizer), "step", lambda self: (taken.append(0), original(self))[1])
    run()
    return len(taken)


def test_unchanged_parameters_use_kernel_directly(monkeypatch):
    net = Net()
    optimizer = torch.optim.Adam([*net.a.parameters(), *net.b.parameters()], 0.01, fused=True)
    # the first, and the fourth and ninth, in which b has no gradients
    assert slow_steps(monkeypatch, optimizer, lambda: steps(net, optimizer, FusedStep(optimizer))) == 3


def test_frozen_weights_do_not_block_capture(monkeypatch):
    ends = []
    for ours in (False, True):
        net = Net()
        optimizer = torch.optim.Adam(net.parameters(), 0.01, fused=True)
        steps(net, optimizer, optimizer.step, n=8)

        def layers(x, i, net=net):
            return net(x, 7) if i >= 5 else net.a(x)

        update = FusedStep(optimizer) if ours else optimizer.step
        taken = slow_steps(monkeypatch, optimizer, lambda run=(layers, optimizer, update): steps(*run))
        # the first, and the sixth, from which on all have gradients
        assert taken == (2 if ours else 0)
        ends.append((net.state_dict(), optimizer.state_dict()["state"]))
    for mine, theirs in zip(*ends, strict=True):
        assert_same(mine, theirs)


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_weights_in_channels_last_are_not_copied():
    ends = []
    for ours in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(net.parameters(), 0.01, amsgrad=True, fused=True)
        update = FusedStep(optimizer) if ours else optimizer.step
        steps(lambda x, i, net=net: net(x.view(1, 3, 4, 4).repeat(2, 1, 1, 1) * i), optimizer, update, inputs=(1, 48))
        with torch.profiler.profile() as profiler:
            update()
        ends.append((net.state_dict(), optimizer.state_dict()["state"], {event.name for event in profiler.events()}))
    (*theirs, copying), (*mine, plain) = ends
    for left, right in zip(mine, theirs, strict=True):
        assert_same(left, right)
    assert mine[0]["0.weight"].is_contiguous(memory_format=torch.channels_last)
    assert "aten::clone" in copying  # if this fails, torch no longer copies and `_in_order` can be deleted
    assert "aten::clone" not in plain


def test_parameters_of_two_types():
    ends = []
    for fused in (False, True):
        weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, dtype=torch.float64))]
        optimizer = MAKERS["adam"](weights)
        update = FusedStep(optimizer) if fused else optimizer.step
        for i in range(4):
            for weight in weights:
                weight.grad = torch.full_like(weight, 0.1 * i)
            update()
        ends.append(weights)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_replaced_optimizer_step_is_called():
    net = Net()
    optimizer = MAKERS["adam"](net.parameters())
    called, own = [], optimizer.step
    optimizer.step = lambda: (called.append(0), own())
    steps(net, optimizer, FusedStep(optimizer))
    assert len(called) == 12


@pytest.mark.parametrize("which", ["own", "global"])
def test_hooks_on_a_step_are_called(which):
    net = Net()
    optimizer = MAKERS["adam"](net.parameters())
    called, handles, update = [], [], FusedStep(optimizer)

    def before(i):
        if i == 5:
            register = optimizer.register_step_post_hook if which == "own" else register_optimizer_step_pre_hook
            handles.append(register(lambda *_: called.append(0)))
        if i == 9:
            handles[0].remove()

    steps(net, optimizer, update, before=before)
    assert len(called) == 4


def test_found_inf_skips_step():
    net = Net()
    optimizer = MAKERS["adam"](net.parameters())
    update = FusedStep(optimizer)
    steps(net, optimizer, update, n=2)
    before = copy.deepcopy(net.state_dict())
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), None
    steps(net, optimizer, update, n=1)
    assert_same(before, net.state_dict())


def test_step_without_gradients_changes_nothing():
    net = Net()
    optimizer = MAKERS["adam"](net.parameters())
    update = FusedStep(optimizer)
    before = copy.deepcopy(net.state_dict())
    update()
    update()
    assert_same(before, net.state_dict())
    steps(net, optimizer, update)
    assert optimizer.state[net.a.weight]["step"] == 12
