"""Laws of I-JEPA: context and target masks, gradients, and the moving average of the target encoder."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from torch import Tensor
from torch.utils.data import DataLoader

import aezoo
from aezoo.errors import AezooError
from aezoo.models.masked import ijepa
from aezoo.nets import vit

SHAPE = (2, 11, 12)  # 6 x 6 patches of 2 x 2, of which the last row is half padding


SMALL: dict[str, Any] = {"width": 12, "depth": 2, "predictor_width": 8, "decoder_width": 8, "patch_size": 2}


N, K, D = 36, 4, 12


def build(shifted: Any, shape: tuple[int, ...] = SHAPE, **extra: Any) -> Any:
    """A model whose target encoder differs from its context encoder."""
    torch.manual_seed(0)
    model = shifted(aezoo.create_model("ijepa", input_shape=shape, **SMALL | extra).double())
    model.encoder.update_from(model.context, torch.tensor(0.5))
    return model


def data(n: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


def loss(model: Any, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(7)
    found: dict[str, Tensor] = model.loss(x)
    return found


def masks(n: int, grid: tuple[int, int] = (6, 6), seed: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    return ijepa.masks(torch.rand(n, K + 1, 4), grid)


# ---- masks -----------------------------------------------------------------------------------------------------------


def rectangle(u: list[float], grid: tuple[int, int], share: tuple[float, float], aspect: tuple[float, float]) -> Tensor:
    """A block of the paper from given random numbers."""
    s, a = (low + (high - low) * v for v, (low, high) in zip(u, (share, aspect), strict=False))
    h = min(max(round(grid[0] * math.sqrt(s * a)), 1), grid[0])
    w = min(max(round(grid[1] * math.sqrt(s / a)), 1), grid[1])
    top, left = int(u[2] * (grid[0] - h + 1)), int(u[3] * (grid[1] - w + 1))
    mask = torch.zeros(grid).bool()
    mask[top : top + h, left : left + w] = True
    return mask.flatten()


@pytest.mark.parametrize("grid", [(6, 6), (14, 14), (3, 8), (1, 5), (2, 1)])
def test_masks_match_paper_blocks_and_remaining_context(grid: tuple[int, int]) -> None:
    context_BN, target_BKN, counts_BK = masks(60, grid)
    torch.manual_seed(7)
    for b, u_L4 in enumerate(torch.rand(60, K + 1, 4).tolist()):
        targets = [rectangle(u, grid, (0.15, 0.2), (0.75, 1.5)) for u in u_L4[1:]]
        left = rectangle(u_L4[0], grid, (0.85, 1.0), (1.0, 1.0))
        assert torch.equal(target_BKN[b], torch.stack(targets))
        counts = 0
        while counts < K and (left & ~targets[counts]).any():
            left, counts = left & ~targets[counts], counts + 1
        assert counts_BK[b].tolist() == [k < counts for k in range(K)]
        assert torch.equal(context_BN[b], left)
    assert context_BN.any(1).all() and target_BKN.any(2).all() and not target_BKN.all(2).any()
    assert not (context_BN[:, None] & target_BKN & counts_BK[..., None]).any()


@pytest.mark.slow
def test_masks_leave_context_and_targets_on_every_grid() -> None:
    """At the limits of the random numbers: smallest context, largest blocks, either aspect, in each corner."""
    ends_4L = torch.cartesian_prod(*[torch.tensor([0.0, 1 - 1e-6])] * 4)
    context_A4, target_A4 = ends_4L.repeat_interleave(16, 0), ends_4L.repeat(16, 1)
    u_AL4 = torch.cat([context_A4[:, None], target_A4[:, None].expand(-1, K, -1)], dim=1)
    for grid in ((h, w) for h in range(1, 13) for w in range(1, 13) if h * w > 1):
        context_BN, target_BKN, counts_BK = ijepa.masks(u_AL4, grid)
        assert context_BN.any(1).all() and target_BKN.any(2).all() and counts_BK[:, 0].all()


def test_mask_scale_and_aspect_match_paper() -> None:
    """On a fine grid, where rounding is small."""
    side = 60
    blocks_BKSS = ijepa.blocks(torch.rand(500, K, 4), (side, side), (0.15, 0.2), (0.75, 1.5)).unflatten(2, (side, side))
    h, w = blocks_BKSS.any(3).sum(2), blocks_BKSS.any(2).sum(2)
    assert torch.equal(blocks_BKSS.sum((2, 3)), h * w)
    share, aspect = h * w / side**2, h / w
    for values, low, high, slack in ((share, 0.15, 0.2, 0.007), (aspect, 0.75, 1.5, 0.07)):
        assert low - slack < values.min() < low + slack and high - slack < values.max() < high + slack
        assert values.mean().item() == pytest.approx((low + high) / 2, rel=0.01)
    # share and aspect are independent, differ between blocks, and blocks reach all edges
    assert abs(torch.corrcoef(torch.stack([share.flatten(), aspect.flatten()]))[0, 1]) < 0.1
    assert (h.double().std(1) > 0).double().mean() > 0.99
    edges = [blocks_BKSS[..., i, :].any(2).double().mean() for i in (0, -1)]
    edges += [blocks_BKSS[..., i].any(2).double().mean() for i in (0, -1)]
    assert all(edge.item() == pytest.approx(1 / (side - 25), rel=0.5) for edge in edges)
    context_BN, target_BKN, counts_BK = masks(200, (14, 14))
    assert counts_BK.all()
    covered_BN = context_BN | target_BKN.any(1)
    assert 0.8 < covered_BN.double().mean() <= 1 and 0.25 < context_BN.double().mean() < 0.6


# ---- context ---------------------------------------------------------------------------------------------------------


def test_visible_attention_equals_removing_masked_tokens(shifted: Any) -> None:
    """The authors' code removes masked tokens; here the sequences keep their length."""
    layers, tokens_BND = shifted(vit.blocks((8, 8), "gelu")).double(), torch.randn(5, N, 8, dtype=torch.float64)
    context_BN, _, _ = masks(5)
    found_BND = vit.attend_to_visible(layers, tokens_BND, context_BN)
    assert len(context_BN.sum(1).unique()) > 1
    for b in range(5):
        torch.testing.assert_close(found_BND[b, context_BN[b]], layers(tokens_BND[b : b + 1, context_BN[b]])[0])
    torch.testing.assert_close(vit.attend_to_visible(layers, tokens_BND, torch.ones(5, N).bool()), layers(tokens_BND))


def by_hand(model: Any, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Predictions and normalised targets of each block of each sample, with masked tokens removed."""
    context_BN, target_BKN, counts_BK = masks(len(x), model.grid)
    embed, layers, _ = model.context
    code_BND, found = model.encode(x).flatten(2).transpose(1, 2), []
    for b in range(len(x)):
        context = layers(embed(x[b : b + 1])[:, context_BN[b]])
        table_ND, p = model.predictor.positions.table_ND, model.predictor
        for asked_N in target_BKN[b, counts_BK[b]]:
            known, masked = p.embed(context)[0] + table_ND[context_BN[b]], p.mask_token + table_ND[asked_N]
            out = p.out(p.blocks(torch.cat([known, masked])[None]))[0, len(known) :]
            target = code_BND[b, asked_N]
            mean, variance = target.mean(1, keepdim=True), target.var(1, correction=0, keepdim=True)
            found.append((out, (target - mean) / (variance + 1e-5).sqrt()))
    return found


@pytest.mark.parametrize(("training", "likelihood"), [(True, "gaussian"), (False, "bernoulli")])
@pytest.mark.parametrize("shape", [SHAPE, (2, 2, 4)])
def test_loss_matches_authors_smooth_l1_sum(
    shape: tuple[int, ...], training: bool, likelihood: str, shifted: Any
) -> None:
    model, x = build(shifted, shape, likelihood=likelihood).train(training), data(5, shape)
    n, counts_BK = math.prod(model.grid), masks(5, model.grid)[2]
    assert bool(counts_BK.all()) == (shape == SHAPE)  # on a coarse grid, empty blocks are not counted
    errors = iter([F.smooth_l1_loss(*pair) for pair in by_hand(model, x)])
    wanted = torch.stack([torch.stack([next(errors) for _ in range(k)]).mean() for k in counts_BK.sum(1).tolist()])
    terms = loss(model, x)
    torch.testing.assert_close(terms["prediction"], n * D * wanted.mean())
    torch.testing.assert_close(terms["nll"], model.score(x).mean())
    torch.testing.assert_close(terms["loss"], terms["nll"] + terms["prediction"])


def test_predictions_do_not_depend_on_target_pixels(shifted: Any) -> None:
    """The gradient with respect to context pixels is not 0, with respect to all others it is."""
    model, x, found = build(shifted), data(5).requires_grad_(), []
    model.predictor.register_forward_hook(lambda module, given, out: found.append((given[0], out)))
    loss(model, x)
    context_BN, target_BKN, counts_BK = masks(5)
    patchify = model.context[0][0]
    seen = patchify.inverse(context_BN[..., None].expand(-1, -1, patchify.size))
    (context_BND, out_BKND), counted = found[0], (target_BKN & counts_BK[..., None])[..., None]
    for values in (context_BND * context_BN[..., None], out_BKND * counted):
        (gradient,) = torch.autograd.grad((values * torch.randn_like(values)).sum(), x, retain_graph=True)
        assert torch.equal(gradient != 0, seen)
    with torch.no_grad():
        loss(model, torch.where(seen, x, data(5)))
        assert torch.equal(found[1][0][context_BN], context_BND[context_BN])
        assert torch.equal(found[1][1][counted[..., 0]], out_BKND[counted[..., 0]])


# ---- target encoder --------------------------------------------------------------------------------------------------


def test_target_encoder_gets_no_gradient(shifted: Any) -> None:
    model, x = build(shifted), data(5)
    terms, parameters = loss(model, x), dict(model.named_parameters())
    for term, own in (("nll", ("decoder.",)), ("prediction", ("context.", "predictor."))):
        found = torch.autograd.grad(terms[term], [*parameters.values()], retain_graph=True, allow_unused=True)
        assert {key for key, g in zip(parameters, found, strict=True) if g is not None} == {
            key for key in parameters if key.startswith(own)
        }
    trained = {id(p) for group in model.configure_optimizers().param_groups for p in group["params"]}
    tensors = dict(model.encoder.named_buffers())
    assert not [*model.encoder.parameters()] and trained == {id(p) for p in parameters.values()}
    # the target encoder has all weights of the context encoder, as buffers
    weights = {f"net.{name}" for name, _ in model.context.named_parameters()}
    assert weights <= tensors.keys() and {f"encoder.{name}" for name in weights} <= model.state_dict().keys()
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_codes_of_target_encoder_are_constants_of_the_loss(shifted: Any) -> None:
    """The loss has no gradient through f'(x), neither to pixels outside the context nor from the decoder's nll."""
    model, x = build(shifted), data(5).requires_grad_()
    terms, patchify = loss(model, x), model.context[0][0]
    seen = patchify.inverse(masks(5)[0][..., None].expand(-1, -1, patchify.size))
    (gradient,) = torch.autograd.grad(terms["prediction"], x, retain_graph=True)
    assert torch.equal(gradient != 0, seen)
    with torch.no_grad():
        code = model.encode(x)
    held = model.nll(model.decoder(code), x).mean()
    torch.testing.assert_close(*(torch.autograd.grad(nll, x)[0] for nll in (terms["nll"], held)))


def test_target_encoder_starts_as_encoder_and_gives_codes(shifted: Any) -> None:
    model = aezoo.create_model("ijepa", SHAPE, **SMALL)
    x = data(3).float()
    assert torch.equal(model.encode(x), model.context(x))  # type: ignore[operator]
    shifted(model)
    assert (model.encode(x) - model.context(x)).abs().max() > 0.1  # type: ignore[operator]


class Seen:
    """Record the weights of both encoders at each training step."""

    def __init__(self, model: Any) -> None:
        self.of_context: list[dict[str, Tensor]] = []
        self.of_target: list[dict[str, Tensor]] = []
        model.predictor.register_forward_hook(lambda *_: self.look(model) if model.training else None)

    def look(self, model: Any) -> None:
        self.of_context.append(copy.deepcopy(dict(model.context.named_parameters())))
        self.of_target.append({name: model.encoder.net.get_buffer(name).clone() for name in self.of_context[-1]})


@pytest.mark.slow
@pytest.mark.parametrize(("batches", "momentum_steps"), [(1, 0), (2, 0), (1, 2)])
def test_target_encoder_ema_updates_once_per_step(batches: int, momentum_steps: int, quiet: Any) -> None:
    torch.manual_seed(0)
    model: Any = aezoo.create_model("ijepa", SHAPE, **SMALL, momentum=0.9, momentum_steps=momentum_steps, lr=0.05)
    model.compile_mode, seen = "off", Seen(model)
    trainer = quiet(max_steps=5, accumulate_grad_batches=batches, num_sanity_val_steps=0)
    loaders = [DataLoader(list(data(n, (2, *SHAPE)).float()), batch_size=None) for n in (5 * batches, 1)]  # type: ignore[arg-type]
    trainer.fit(model, *loaders)
    assert len(seen.of_context) == 5 * batches and int(model.steps) == 4
    for name, start in seen.of_context[0].items():
        wanted = start
        for i in range(5 * batches):
            step = i // batches
            if i % batches == 0 and step:
                m = 1 - 0.1 * (1 - min(1, step / (momentum_steps or 5)))
                wanted = m * wanted + (1 - m) * seen.of_context[i][name]
            torch.testing.assert_close(seen.of_target[i][name], wanted)
    moved = [
        (after - before).abs().max()
        for before, after in zip(*(seen.of_target[i].values() for i in (0, -1)), strict=True)
    ]
    assert max(moved) > 1e-3


def test_the_momentum_rises_from_its_start_to_one() -> None:
    model: Any = aezoo.create_model("ijepa", SHAPE, **SMALL, momentum_steps=1000)
    for step, m in ((0, 0.996), (500, 0.998), (1000, 1.0), (2000, 1.0)):
        model.steps.fill_(step)
        assert model.current_momentum().item() == pytest.approx(m, abs=1e-7)
    model.momentum_steps = 0  # the length of the run is unknown
    assert model.current_momentum().item() == pytest.approx(0.996, abs=1e-7)


@pytest.mark.slow
def test_trained_predictions_use_visible_patches(adam: Any) -> None:
    """Samples of one grey value each: hidden codes can be inferred from visible ones, unlike by a constant."""
    torch.manual_seed(0)
    model, x = aezoo.create_model("ijepa", (1, 8, 8), **SMALL), torch.randn(256, 1, 1, 1).expand(-1, 1, 8, 8)
    start = loss(model, x)["prediction"].item()
    adam(model, x, steps=60, lr=1e-2, batch=32)
    with torch.no_grad():
        code_BND = F.layer_norm(model.encode(x).flatten(2).transpose(1, 2), (D,))
        constant = 16 * F.smooth_l1_loss(code_BND.mean(0).expand_as(code_BND), code_BND, reduction="none").sum(2).mean()
        assert loss(model, x)["prediction"] < 0.4 * constant < 0.4 * start


@pytest.mark.parametrize(
    ("shape", "given", "words"),
    [
        ((30,), {}, "takes images"),
        ((1, 30), {}, "takes images"),
        ((1, 4, 4, 4), {}, "takes images"),
        ((1, 8, 8), {"patch_size": 8}, "smaller patch_size"),
        ((1, 8, 8), {"momentum": 1.5}, "between 0 and 1"),
        ((1, 8, 8), {"n_targets": 0}, "at least 1"),
        ((1, 8, 8), {"predictor_depth": 0}, "at least 1"),
    ],
)
def test_invalid_values_are_refused_with_a_cure(shape: tuple[int, ...], given: dict[str, Any], words: str) -> None:
    with pytest.raises(AezooError, match=words):
        aezoo.create_model("ijepa", shape, **given)
