"""Laws of Learned image compression in the layout of CompressAI (Bégaint et al. 2020)."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from compression_laws import (  # noqa: F401
    along,
    both_terms,
    by_differences,
    by_network,
    small,
    test_bf16_symbols_determine_code,
    test_bits_are_counted_per_position_for_vectors_and_maps,
    test_codes_are_encoder_output_within_half_a_step,
    test_gradients_of_both_terms_are_finite_differences,
    test_loss_is_negative_elbo_with_uniform_posterior,
    test_loss_matches_paper_rate_distortion,
    test_rate_and_distortion_train_expected_networks,
    test_sampled_symbols_follow_model_distribution,
    test_score_is_evaluation_loss_per_sample,
    test_symbol_distributions_are_causal,
    test_symbols_determine_code_and_reconstruction,
)
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from scipy import stats

import aezoo
from aezoo.bases.entropy_coded import AdditiveNoise, Rounding
from aezoo.distributions import frequency_tables
from aezoo.errors import AezooError
from aezoo.nets.blocks.compressai import ARCHITECTURES, GDN, lower_bound, padding
from aezoo.tasks.codec import entropy_model, rans

WITH_SIDE = [name for name in ARCHITECTURES if "factorized" not in name]
IN_TURN = ["mbt2018", "cheng2020-anchor", "cheng2020-attn"]
SHAPE = (2, 60, 70)


def of(architecture: str, shape: tuple[int, ...] = SHAPE, **settings: Any) -> Any:
    """A small float64 model with random offsets added to its initial weights, and scales above their lower bound."""
    torch.manual_seed(0)
    settings = {"width": 4, "latent_dim": 4} | settings
    model = aezoo.create_model("compressai", shape, architecture=architecture, **settings)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
        for parts in (model.hyper_decoder, model.entropy_parameters):
            if parts is not None:
                [*parts.parameters()][-1].add_(1)
        for layer in model.modules():
            if isinstance(layer, GDN):  # above the lower bound, too
                layer.root_gamma_CC.abs_().add_(1e-3)
        if model.context is not None:
            model.context.weight.mul_(0.05)
        [*model.encoder.parameters()][-2].mul_(20)
    return model.double()


def data(n: int = 2, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.rand(n, *shape, dtype=torch.float64)


# ---- objective -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_every_architecture_are_finite_differences(architecture: str) -> None:
    model, x = of(architecture).train(), data()
    torch.manual_seed(0)
    terms = both_terms(model, x)
    paths = [(parameters, [torch.randn_like(p) for p in parameters]) for parameters in by_network(model).values()]
    found = torch.stack([torch.stack([along(term, *path) for term in terms]) for path in paths])
    expected = torch.stack([by_differences(lambda: both_terms(model, x), *path) for path in paths])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_trained(architecture: str) -> None:
    # attention blocks have half the width, and some ReLUs of narrow ones are never active
    model = of(architecture, width=16, latent_dim=16).train()
    model.loss(data())["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("architecture", IN_TURN)
def test_sequential_and_parallel_rates_are_equal(architecture: str) -> None:
    """Training computes all positions at once, the coder one after the other."""
    model, x = of(architecture).eval(), data()
    coder, y = Rounding(), model.encoder(x)
    y_hat = model.code_latents(coder, y, len(x))

    class Known(AdditiveNoise):
        def transform(self, v: torch.Tensor, distribution: Any = None) -> torch.Tensor:
            return (
                y_hat
                if v.shape == y_hat.shape and distribution is None
                else distribution.mean + (v - distribution.mean).round()
            )

    together = Known()
    model.code_latents(together, y, len(x))
    torch.testing.assert_close(together.rate_B, coder.rate_B)


@pytest.mark.parametrize("architecture", IN_TURN)
def test_context_depends_only_on_earlier_positions(architecture: str) -> None:
    model = of(architecture)
    y = torch.randn(1, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    for i, j in itertools.product(range(5), range(6)):
        (slope,) = torch.autograd.grad(model.context(y)[0, :, i, j].sum(), y)
        seen = {(a, b) for a, b in slope[0].abs().sum(0).nonzero().tolist()}
        near = {(a, b) for a in range(max(0, i - 2), i + 1) for b in range(max(0, j - 2), min(6, j + 3))}
        assert seen == {place for place in near if place < (i, j)}


@pytest.mark.slow
def test_quantiles_are_trained_to_those_of_the_distribution() -> None:
    model = of("bmshj2018-factorized")
    optimizer = torch.optim.Adam([model.quantiles_C3], 1.0)
    for step in range(3000):
        optimizer.param_groups[0]["lr"] = 0.998**step
        optimizer.zero_grad()
        model.quantile_loss().backward()
        optimizer.step()
    assert all(p.grad is None for p in model.density.parameters())
    probability = model.density(model.quantiles_C3).detach().sigmoid()
    expected = torch.tensor([0.5e-9, 0.5, 1 - 0.5e-9], dtype=torch.float64).expand(4, 3)
    torch.testing.assert_close(probability.logit(), expected.logit(), rtol=0.01, atol=0.02)


def test_gradient_below_a_bound_only_moves_values_up() -> None:
    x = torch.tensor([0.05, 0.05, 0.2, 0.2, 0.1], requires_grad=True)
    bounded = lower_bound(x, 0.1)
    assert bounded.tolist() == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.1])
    bounded.backward(torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]))
    assert x.grad is not None and x.grad.tolist() == [0, -1, 1, -1, 1]


def test_mean_gradient_moves_gdn_below_its_bound_only_up() -> None:
    model = of("bmshj2018-factorized")
    layer = next(layer for layer in model.modules() if isinstance(layer, GDN))
    with torch.no_grad():
        layer.root_gamma_CC.fill_(-1)
        layer.root_gamma_CC[0] = 1
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(len(layer.root_gamma_CC), 2)
    layer.root_gamma_CC.grad, expected = signs.clone(), signs.clone()
    expected[1:][signs[1:] > 0] = 0
    model.on_before_optimizer_step(model.configure_optimizers())
    assert torch.equal(layer.root_gamma_CC.grad, expected)


def test_scales_below_the_bound_count_as_the_bound() -> None:
    model = of("mbt2018-mean")
    law = model.gaussians(torch.tensor([0.01] * 4 + [0.0] * 4, dtype=torch.float64).view(1, 8, 1, 1))
    expected = stats.norm.cdf(0.5 / 0.11) - stats.norm.cdf(-0.5 / 0.11)
    assert law.log_mass(torch.zeros(1, 4, 1, 1).double()).exp().flatten().tolist() == pytest.approx([expected] * 4)


# ---- tables and bits -------------------------------------------------------------------------------------------------


def test_gaussians_are_coded_under_the_next_larger_scale() -> None:
    model = of("mbt2018-mean")
    scales = torch.cat([model.scales * factor for factor in (0.99, 1.0, 1.01)]).clamp_min(0.11)
    law = model.gaussians(torch.cat([scales.repeat(4, 1), torch.zeros(4, len(scales))])[None, :, :, None].double())
    expected = [min(int((model.scales < s).sum()), 63) for s in scales.double()]
    assert (law.table[0, 0, :, 0] - 4).tolist() == expected
    assert torch.allclose(model.scales[[0, -1]].double(), torch.tensor([0.11, 256.0]).double())


def test_frequencies_are_near_probabilities() -> None:
    """Up to the differences due to the sum of 2^16 and the frequency of at least 1 for each integer."""
    tables = of("mbt2018-mean").frequency_tables()
    for row, scale in zip(range(4, 68), of("mbt2018-mean").scales.tolist(), strict=True):
        n, low = int(tables.length[row]), int(tables.offset[row])
        frequencies = np.diff(tables.cdf[row, :n].numpy())
        assert frequencies.sum() == 2**16 and frequencies.min() >= 1 and low == -(n - 3) // 2
        borders = np.arange(low - 0.5, low + n - 2)
        expected = np.diff(stats.norm.cdf(borders / scale)) * 2**16
        # the rarest integer gives up one count for each integer that would have none
        assert np.abs(frequencies[:-1] - expected).max() < 2 + (expected < 0.5).sum()
        assert low == -math.ceil(scale * stats.norm.isf(0.5e-9)) or abs(low) == pytest.approx(scale * 6.109, rel=1e-3)


@pytest.mark.parametrize(
    ("mass", "expected"),
    [
        ([0.5, 0.5], [0, 32768, 65536]),
        # a missing count is taken from the first of the rarest integers that have more than 1
        ([0.0, 0.5, 0.5], [0, 1, 32768, 65536]),
        ([0.75, 0.0, 0.25], [0, 49152, 49153, 65536]),
        ([0.25, 0.0, 0.0, 0.75], [0, 16382, 16383, 16384, 65536]),
        # half counts are rounded away from 0
        ([2.5 / 65536, 3.5 / 65536, 65530 / 65536], [0, 2, 5, 65536]),
        # scaled to the sum of 2^16 and rounded down; the last integer takes the rest
        ([0.5, 0.25, 0.125], [0, 37449, 56173, 65536]),
    ],
)
def test_cumulative_frequencies_by_hand(mass: list[float], expected: list[int]) -> None:
    assert frequency_tables.quantised_cdf(np.array(mass, dtype=np.float32)).tolist() == expected


@pytest.mark.parametrize("mass", [[0.0, 0.0], [math.nan, 1.0], [-0.1, 1.1], [1.0] * 40_000])
def test_probabilities_without_a_table_are_refused(mass: list[float]) -> None:
    with pytest.raises(AezooError, match="cannot create a table"):
        frequency_tables.quantised_cdf(np.array(mass, dtype=np.float32))


def coded(architecture: str) -> tuple[Any, Any, Any]:
    """A model with distributions fitted to its codes, the symbols, and their coder."""
    model = of(architecture, (3, 192, 128)).float().train()
    x, optimizer = data(1, (3, 192, 128)).float(), torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(x)["loss"].backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        model.quantiles_C3.copy_(torch.tensor([-20.0, 0.0, 20.0]))
        return model, entropy_model.encode(model, x), rans.RansCoder(model, 1)


@pytest.mark.parametrize("architecture", ["bmshj2018-factorized", "mbt2018-mean", "mbt2018"])
def test_stream_length_matches_entropy_bound(architecture: str) -> None:
    """Up to a state of 64 bits per stream, and scales that are up to 13 % larger."""
    _, symbols, coder = coded(architecture)
    streams = coder.streams(symbols)
    bits = 8 * sum(len(stream) for (stream,) in streams)
    with torch.no_grad():
        bound = coder.bound(symbols)
    assert bound > 1000 and 0.98 * bound < bits < 1.03 * bound + 64 * len(streams)
    back = coder.read_streams(iter([stream for (stream,) in streams]), 1)
    assert np.array_equal(back, symbols)


def unbounded_state(symbols: list[int], rows: list[int], tables: Any) -> int:
    """The rANS state as an integer of any size, without renormalisation, as in Duda's paper."""
    state = 1 << 31
    for symbol, row in zip(symbols[::-1], rows[::-1], strict=True):
        cdf = tables.cdf[row].tolist()
        entry = symbol - int(tables.offset[row])
        frequency = cdf[entry + 1] - cdf[entry]
        state = state // frequency * 65536 + state % frequency + cdf[entry]
    return state


def test_short_streams_are_the_state_of_rans() -> None:
    tables = of("mbt2018-mean").frequency_tables()
    rows, symbols = np.array([67, 60]), np.array([100, -7])
    state = unbounded_state(symbols.tolist(), rows.tolist(), tables)
    assert state < 1 << 63
    assert rans.encode(symbols, rows, tables) == state.to_bytes(8, "little")


@pytest.mark.parametrize("far", [0, 1, 2, 7, 8, 100, 2**20, 2**28])
def test_integers_outside_of_tables_are_coded(far: int) -> None:
    tables = of("mbt2018-mean").frequency_tables()
    low, high = int(tables.offset[4]), int(tables.offset[4] + tables.length[4] - 3)
    symbols = np.array([low - 1 - far, 0, high + 1 + far, high, low, high + 1])
    rows = np.full(len(symbols), 4)
    content = rans.encode(symbols, rows, tables)
    lists = [row[:n] for row, n in zip(tables.cdf.tolist(), tables.length.tolist(), strict=True)]
    assert rans.Decoder(content, lists, tables.offset.tolist()).decode(rows.tolist()) == symbols.tolist()
    # integers outside of the table need extra nibbles
    assert len(content) >= len(rans.encode(np.clip(symbols, low - 1, high + 1), rows, tables))


def test_too_large_integers_are_refused() -> None:
    _, symbols, coder = coded("bmshj2018-factorized")
    symbols[0, 0] = 2**29
    with pytest.raises(AezooError, match="gives codes above"):
        coder.streams(symbols)


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_sides_are_padded_to_multiples_of_64() -> None:
    assert padding(64, 128) == (0, 0, 0, 0)
    assert padding(63, 61) == (1, 2, 0, 1)  # left, right, top, bottom
    model = of("mbt2018-mean", (2, 63, 61)).eval()
    assert model.code_shape == (4, 4, 4) and model.z_shape == (4, 1, 1)
    seen: list[torch.Tensor] = []
    model.encoder[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = data(1, (2, 63, 61)) + 1
    assert model(x).shape == x.shape
    (padded,) = seen
    assert padded.shape == (1, 2, 64, 64) and torch.equal(padded[:, :, 0:63, 1:62], x)
    assert padded.sum() == pytest.approx(float(x.sum()))


def test_other_shapes_and_channels_are_refused() -> None:
    for shape in ((7,), (1, 7), (1, 7, 7, 7)):
        with pytest.raises(AezooError, match="compressai takes images"):
            aezoo.create_model("compressai", shape)
    with pytest.raises(AezooError, match="needs a latent_dim equal to width"):
        aezoo.create_model("compressai", (3, 64, 64), architecture="cheng2020-attn", width=4, latent_dim=6)
    with pytest.raises(AezooError, match="unknown architecture 'vbr': choose from bmshj2018-factorized"):
        aezoo.create_model("compressai", (3, 64, 64), architecture="vbr")


def test_tiles_that_would_be_padded_are_refused() -> None:
    model = of("bmshj2018-factorized", (2, 64, 64)).eval()
    for size, tile, blend in (((256, 256), 128, 0.0), ((256, 100), 128, 0.5), ((256, 256), 100, 0.5)):
        with pytest.raises(AezooError, match="cannot process tiles: it pads samples"):
            aezoo.tiled(model, size, tile, blend=blend)(data(1, (2, *size)))
    x = data(1, (2, 256, 256))
    tile = aezoo.at_size(model, (128, 128))
    with torch.no_grad():
        found = aezoo.tiled(model, (256, 256), 128, blend=0.5).encoder(x)
        assert torch.equal(found[..., :4, :4], tile.encoder(x[..., :128, :128])[..., :4, :4])
