"""Images keep their memory format through a training step."""

from collections import Counter
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import aezoo
from aezoo.speed import conv2d
from aezoo.speed.layers import swap_in, swap_out
from aezoo.speed.memory_format import (
    Flatten,
    Unflatten,
    is_batch_inner,
    keep_grad_layout,
    to_channels_first,
    to_channels_last,
    with_layout_of,
)

LAST = torch.channels_last
# smaller images take no noticeable time
MANY = 2_000


class Mixed(TorchDispatchMode):
    """Counts operations on images of one shape in several formats: channels first, last, or batch inner."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        images = [x for x in args if isinstance(x, Tensor) and x.dim() == 4 and x.numel() >= MANY]
        images = [x for x in images if x.shape == images[0].shape and min(x.shape) > 1 and 0 not in x.stride()]
        if len({(x.stride(1) == 1, is_batch_inner(x)) for x in images}) > 1 and "copy" not in str(func):
            self.found[f"{func} {tuple(images[0].shape)}"] += 1
        return func(*args, **(kwargs or {}))


def as_in_fit(model: aezoo.Autoencoder) -> None:
    assert to_channels_last(model)
    swap_in(model, model.input_shape, channels_last=True)
    model._channels_last = True


def mixed(name: str, shape: tuple[int, ...], **settings: Any) -> Counter[str]:
    torch.manual_seed(0)
    model = aezoo.create_model(name, shape, **settings)
    as_in_fit(model)
    model.train()
    x, y = model.begin_step((torch.rand(16, *shape), torch.randint(0, 10, (16,))), 0)
    with Mixed() as mode:
        model.step_terms(x, y)[0]["loss"].backward()
    return mode.found


@pytest.mark.parametrize("batch_inner", [False, True])
@pytest.mark.parametrize("net", ["conv", "resnet", "convnext"])
@pytest.mark.parametrize("widths", [(32,), (16, 32, 64)])
def test_networks_do_not_mix_memory_formats(
    net: str, widths: tuple[int, ...], batch_inner: bool, monkeypatch: Any
) -> None:
    monkeypatch.setattr(conv2d, "use_batch_inner", lambda layer, *_: batch_inner and layer.feeds_convolutions)
    assert not mixed("vae", (3, 28, 28), net=net, hidden_dims=widths)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("iwae", {"net": "conv", "hidden_dims": (16, 32)}),
        ("hierarchical_vae", {"net": "conv", "hidden_dims": (16, 32)}),
        ("conv_ae", {}),
    ],
)
def test_models_do_not_mix_memory_formats(name: str, settings: dict[str, Any]) -> None:
    assert not mixed(name, (3, 28, 28), **settings)


def test_dncnn_mixes_formats_only_for_noise() -> None:
    # noise is drawn with channels first, so that it does not depend on the layout of images
    found = mixed("dncnn", (3, 28, 28), depth=4, width=16, likelihood="gaussian")
    assert {*found} == {"aten.add.Tensor (16, 3, 28, 28)"}


def test_mixed_memory_formats_are_counted() -> None:
    x = torch.rand(2, 3, 20, 20).contiguous(memory_format=LAST)
    with Mixed() as mode:
        x + x.contiguous()
        x + x
    assert mode.found == {"aten.add.Tensor (2, 3, 20, 20)": 1}


class Seen(nn.Identity):
    """Keeps the gradient that passes through."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x.register_hook(lambda g: setattr(self, "gradient", g))
        return x


def test_flatten_keeps_gradient_memory_format() -> None:
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    weight = torch.rand(2, 60, dtype=torch.float64)
    for image, last in ((x.contiguous(memory_format=LAST), True), (x, False), (x[:, :1], False)):
        seen = Seen()
        out = Flatten()(seen(image.requires_grad_()))
        assert torch.equal(out, image.flatten(1))
        (out * weight[:, : out.shape[1]]).sum().backward()
        assert torch.equal(seen.gradient, weight[:, : out.shape[1]].view_as(image))
        assert (seen.gradient.stride(1) == 1) == last


def test_flatten_has_derivatives_of_any_order() -> None:
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=LAST).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: Flatten()(x) ** 3, x)
    assert torch.autograd.gradgradcheck(lambda x: Flatten()(x) ** 3, x)
    per_sample = torch.func.vmap(torch.func.grad(lambda x: (keep_grad_layout(x[None]) ** 3).sum()))(x.detach())
    assert torch.equal(per_sample, 3 * x.detach() ** 2)


def test_keep_grad_layout_ignores_other_tensors() -> None:
    image = torch.rand(2, 3, 4, 5).contiguous(memory_format=LAST)
    assert keep_grad_layout(image) is image  # without a gradient
    one_channel = torch.zeros(2, 1, 4, 5).as_strided((2, 1, 4, 5), (20, 1, 5, 1))
    for other in (torch.rand(2, 3, 4, 5), torch.rand(2, 60), one_channel):
        assert keep_grad_layout(other.requires_grad_()) is other
    volume = torch.rand(2, 3, 2, 4, 5).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    assert keep_grad_layout(volume) is volume


def test_target_takes_layout_of_prediction() -> None:
    first = torch.rand(2, 3, 4, 5)
    last = first.contiguous(memory_format=LAST)
    assert with_layout_of(first, last).stride() == last.stride() and torch.equal(with_layout_of(first, last), first)
    assert with_layout_of(first, first) is first and with_layout_of(last, first) is last
    vectors = torch.rand(2, 60)
    assert with_layout_of(vectors, vectors) is vectors


def test_unflatten_follows_model_memory_format() -> None:
    model = aezoo.create_model("conv_ae", (1, 28, 28))
    names, z = [*model.state_dict()], torch.rand(2, *model.code_shape)
    part = next(part for part in model.decoder.modules() if isinstance(part, nn.Unflatten))
    before = model.decode(z)
    swapped = swap_in(model, model.input_shape, channels_last=to_channels_last(model))
    assert type(part) is Unflatten
    flat = torch.rand(2, int(torch.tensor(part.unflattened_size).prod()))
    assert part(flat).stride(1) == 1 and torch.equal(part(flat), flat.unflatten(1, part.unflattened_size))
    torch.testing.assert_close(model.decode(z), before)
    assert [*model.state_dict()] == names
    swap_out(swapped)
    to_channels_first(model)
    assert type(part) is nn.Unflatten and torch.equal(model.decode(z), before)


def test_fitted_and_loaded_models_give_equal_outputs() -> None:
    x, model = torch.rand(16, 1, 28, 28), aezoo.create_model("conv_ae", (1, 28, 28))
    pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    ).fit(model, aezoo.DataModule.from_arrays(x, batch_size=8, val_fraction=0.5, test_fraction=0))
    again = aezoo.create_model("conv_ae", (1, 28, 28))
    again.load_state_dict(model.state_dict())
    model.eval(), again.eval()
    assert torch.equal(model(x), again(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_graphs_plan_their_own_memory() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Flatten(), Unflatten(1, (4, 2, 3)))
    x = torch.rand(2, 3, 4, 5).contiguous(memory_format=LAST)
    assert net(x).stride(1) == 1
    for graph in (torch.export.export(net, (x,)).module(), torch.jit.trace(net, x, check_trace=False)):
        assert graph(x).is_contiguous()
    compared = torch.jit.trace(lambda y: with_layout_of(y, x), torch.rand(2, 3, 4, 5), check_trace=False)
    assert compared(torch.rand(2, 3, 4, 5)).is_contiguous()

    compiled: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph.code)
        return graph.forward

    torch.compile(net, backend=keep)(x).sum().backward()
    (code,) = compiled
    assert "flatten" in code and "channels_last" not in code and "autograd" not in code, code
