"""Quantisers: nearest codes, k-means, gradients, indices, entropies, several processes, compilers and exporters."""

import copy
import itertools
import math
import tempfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import vector_quantize_pytorch as peer
from sklearn.cluster import KMeans
from torch import distributed, multiprocessing, nn

from aezoo.errors import AezooError
from aezoo.metrics.codebook import CodebookPerplexity, CodebookUsage
from aezoo.quantisers import (
    BSQ,
    FSP,
    FSQ,
    FVQ,
    LFQ,
    VQ,
    GroupedVQ,
    GumbelVQ,
    LatentQuantisation,
    RandomProjection,
    ResidualFSQ,
    ResidualVQ,
    SimVQ,
    StochasticVQ,
    VectorPerturbation,
)
from aezoo.quantisers.common import entropy, k_means, split_for_tf32
from aezoo.quantisers.estimators import diveq, rotation, ste

D, K = 6, 16


GRIDS = (8, 5, 4, 3, 2, 6)


ALL = {
    "vq": lambda: VQ(D, K),
    "vq-gradient": lambda: VQ(D, K, update="gradient"),
    "vq-rotation": lambda: VQ(D, K, estimator="rotation"),
    "vq-gumbel": lambda: VQ(D, K, estimator="gumbel"),
    "vq-diveq": lambda: VQ(D, K, update="gradient", estimator="diveq"),
    "vq-cosine": lambda: VQ(D, K, cosine=True, dead_below=0.5),
    "residual_vq": lambda: ResidualVQ(D, 3, K, dropout=0.5),
    "grouped_vq": lambda: GroupedVQ(D, 3, K, dead_below=0.5),
    "fsq": lambda: FSQ(GRIDS),
    "fsp": lambda: FSP(GRIDS),
    "residual_fsq": lambda: ResidualFSQ(GRIDS, 3, dropout=0.5),
    "lfq": lambda: LFQ(D),
    "bsq": lambda: BSQ(D),
    "sim_vq": lambda: SimVQ(D, K),
    "fvq": lambda: FVQ(D, K, group_size=3, width=12, depth=1),
    "latent_quantisation": lambda: LatentQuantisation(D, 5),
    "gumbel_vq": lambda: GumbelVQ(D, 4),
    "stochastic_vq": lambda: StochasticVQ(D, K),
    "stochastic_vq-place": lambda: StochasticVQ(D - 1, K, variance="place"),
    "random_projection": lambda: RandomProjection(D, K, 4),
    "vector_perturbation": lambda: VectorPerturbation(D, K, queue_size=40),
}


LAYOUTS = {"vector": (), "sequence": (7,), "map": (4, 3), "volume": (2, 3, 2)}


every = pytest.mark.parametrize("name", ALL)


def built(name, rows=200):
    """A quantiser initialised from data, in evaluation mode."""
    quantiser = ALL[name]()
    quantiser.init_from_data(torch.randn(rows, D))
    return quantiser.eval()


def as_rows(values):
    return values.movedim(1, -1).flatten(0, -2)


def inertia(rows, codes):
    return float(torch.cdist(rows.double(), codes.double()).square().min(1).values.sum())


# ---- the interface ---------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("places", LAYOUTS.values(), ids=LAYOUTS)
def test_result_is_independent_of_spatial_layout(name, places):
    quantiser, z = built(name), torch.randn(5, D, *places)
    found, flat = quantiser(z), quantiser(as_rows(z))
    assert found.z_q.shape == (5, quantiser.code_dim, *places)
    assert found.indices.shape == (5, len(quantiser.codebook_sizes), *places) and found.indices.dtype == torch.long
    assert torch.equal(as_rows(found.z_q), flat.z_q) and torch.equal(as_rows(found.indices), flat.indices)
    for term, value in found.terms.items():  # a sum over places and a mean over samples
        torch.testing.assert_close(value, flat.terms[term] * math.prod(places), msg=term)


@every
def test_indices_roundtrip_to_codes(name):
    quantiser, z = built(name), torch.randn(40, D, 3)
    for given in (z, z.bfloat16(), z.double()):
        found = quantiser.quantise(given)
        assert found.z_q.dtype == given.dtype
        assert torch.equal(quantiser.codes(found.indices).to(given.dtype), found.z_q)
    for part, size in zip(found.indices.unbind(1), quantiser.codebook_sizes, strict=True):
        assert 0 <= int(part.min()) < int(part.max()) < size
    assert quantiser.bits == pytest.approx(sum(math.log2(size) for size in quantiser.codebook_sizes))
    double = copy.deepcopy(quantiser).double()
    found = double(z.double())
    assert torch.equal(double.codes(found.indices), found.z_q) and found.z_q.dtype == torch.float64
    half = copy.deepcopy(quantiser).bfloat16()
    found = half(z.bfloat16())
    assert torch.equal(half.codes(found.indices), found.z_q) and found.z_q.dtype == torch.bfloat16


@every
def test_autocast_does_not_change_results(name):
    quantiser, z = built(name), torch.randn(2000, D)
    with torch.autocast("cpu", torch.bfloat16):
        found = quantiser(z)
        codes = quantiser.codes(found.indices)
    exact = quantiser(z)
    assert torch.equal(found.indices, exact.indices) and torch.equal(found.z_q, exact.z_q)
    assert torch.equal(codes, exact.z_q)
    for term, value in found.terms.items():
        assert value.dtype == torch.float32 and torch.equal(value, exact.terms[term])


@every
def test_evaluation_and_saving_change_no_state(name):
    quantiser, z = built(name), torch.randn(50, D)
    before = copy.deepcopy(quantiser.state_dict())
    first = quantiser(z)
    assert all(torch.equal(value, before[key]) for key, value in quantiser.state_dict().items())
    other = ALL[name]().eval()
    other.load_state_dict(before)
    assert torch.equal(other(z).indices, first.indices) and torch.equal(other(z).z_q, first.z_q)


@every
def test_training_gives_finite_gradients(name):
    quantiser, z = built(name).train(), torch.randn(12, D, 2, requires_grad=True)
    found = quantiser(z)
    (found.z_q.square().sum() + sum(found.terms.values(), 0 * z.sum())).backward()
    for tensor in (z, *quantiser.parameters()):
        assert tensor.grad is not None and tensor.grad.isfinite().all()
    assert (z.grad.abs().sum() > 0) == (name != "random_projection")


@every
def test_wrong_shapes_are_refused(name):
    quantiser = built(name)
    for wrong in (torch.randn(4, D + 1), torch.randn(D)):
        with pytest.raises(AezooError, match=f"takes z \\(B, {D}, ...\\)"):
            quantiser(wrong)
    with pytest.raises(AezooError, match="takes indices"):
        quantiser.codes(torch.zeros(4, len(quantiser.codebook_sizes) + 1, dtype=torch.long))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VQ(4, 8, update="sgd"), "update must be one of ema, gradient"),
        (lambda: VQ(4, 8, estimator="straight"), "estimator must be one of"),
        (lambda: VQ(4, 8, decay=1.0), "decay"),
        (lambda: VQ(4, 8, temperature=0.0), "temperature"),
        (lambda: VQ(4, 0), "at least one channel and one code"),
        (lambda: ResidualVQ(4, 2, 8, dropout=1.5), "dropout"),
        (lambda: ResidualVQ(4, 2, 8, cosine=True), "norms of residuals"),
        (lambda: ResidualVQ(4, 0, 8), "at least one"),
        (lambda: GroupedVQ(4, 3, 8), "do not divide"),
        (lambda: GroupedVQ(4, 0, 8), "do not divide"),
        (lambda: LatentQuantisation(4, 0), "at least one channel and one code"),
        (lambda: FSQ((8, 1)), "levels of 2 or more"),
        (lambda: FSQ(()), "levels of 2 or more"),
        (lambda: FSQ((2,) * 63), "62 bits"),
        (lambda: ResidualFSQ((5, 5), 0), "depth"),
        (lambda: LFQ(63), "1 to 62"),
        (lambda: BSQ(4, temperature=0.0), "temperature"),
        (lambda: SimVQ(4, 8, estimator="gumbel"), "ste, rotation"),
        (lambda: GumbelVQ(8, 4, 0.0), "temperature"),
        (lambda: StochasticVQ(4, 8, variance="all"), "variance must be one of one, sample, place"),
        (lambda: StochasticVQ(4, 8, start_variance=0.0), "start_variance"),
        (lambda: StochasticVQ(4, 8, temperature=0.0), "temperature"),
        (lambda: CodebookUsage((2**25,)), "digits of an index"),
    ],
)
def test_invalid_settings_are_refused(build, message):
    with pytest.raises(AezooError, match=message):
        build()


def test_counts_stay_in_float32_when_a_model_goes_to_bf16():
    quantiser = VQ(D, K, dead_below=0.1)
    quantiser.init_from_data(torch.randn(300, D))
    exact = copy.deepcopy(quantiser)
    quantiser.bfloat16().train()
    assert torch.equal(quantiser.sum_KD, exact.sum_KD) and torch.equal(quantiser.code_KD, exact.code_KD)
    for _ in range(3):
        z = torch.randn(64, D).bfloat16()
        quantiser(z)
        exact.train()(z.float())
    assert quantiser.count_K.dtype == torch.float32 and torch.equal(quantiser.count_K, exact.count_K)
    assert quantiser.double().count_K.dtype == torch.float64


# ---- the nearest code ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 300.0])
def test_index_is_nearest_code(shift):
    quantiser, z = VQ(D, 200), torch.randn(3000, D) + shift
    quantiser.code_KD.copy_(torch.randn(200, D) + shift)
    distance = torch.cdist(z.double(), quantiser.code_KD.double(), compute_mode="donot_use_mm_for_euclid_dist")
    index = quantiser.eval()(z).indices[:, 0]
    excess = distance.gather(1, index[:, None])[:, 0] - distance.min(1).values
    assert float(excess.max()) < 1e-5
    assert float((index == distance.argmin(1)).double().mean()) > 0.999


def test_products_in_tf32_have_the_precision_of_float32():
    """TF32, as which a GPU may multiply float32, has 10 bits of mantissa."""

    def rounded(x):
        return ((x.view(torch.int32) + 2**12) & -(2**13)).view(torch.float32).double()

    z, codes = torch.randn(100, D), torch.randn(50, D)
    exact, (left, right) = z.double() @ codes.double().T, split_for_tf32(z, codes)
    plain = (rounded(z) @ rounded(codes).T - exact).abs().max()
    assert plain > 2e-4 and (rounded(left) @ rounded(right).T - exact).abs().max() < plain / 100


def test_cosine_index_has_largest_similarity():
    quantiser, z = VQ(D, 50, cosine=True).eval(), 5 * torch.randn(500, D)
    quantiser.code_KD.mul_(torch.rand(50, 1) + 0.1)
    cosine = F.cosine_similarity(z[:, None], quantiser.code_KD[None], dim=2)
    found = quantiser(z)
    assert torch.equal(found.indices[:, 0], cosine.argmax(1))
    torch.testing.assert_close(found.z_q.norm(dim=1), torch.ones(500))
    # ||a - b||^2 of unit vectors
    torch.testing.assert_close(found.terms["commitment"], (2 - 2 * cosine.max(1).values).mean())


# ---- k-means ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_training_reaches_k_means_inertia(update, digits):
    rows = digits.flatten(1).float()
    first = rows[torch.randperm(len(rows))[:20]].clone()
    reference = KMeans(20, init=first.numpy(), n_init=1, max_iter=300).fit(rows.numpy()).inertia_
    quantiser = VQ(64, 20, update=update, decay=0.5).train()
    with torch.no_grad():
        quantiser.code_KD.copy_(first)
    if update == "ema":
        quantiser.sum_KD.copy_(first)
    for _ in range(100):
        terms = quantiser(rows).terms
        if update == "gradient":
            (gradient,) = torch.autograd.grad(terms["codebook"], quantiser.code_KD)
            with torch.no_grad():
                quantiser.code_KD -= 4 * gradient
    assert inertia(rows, first) > 1.3 * reference
    assert inertia(rows, quantiser.code_KD.detach()) < 1.01 * reference
    quantiser.eval()
    assert float(quantiser(rows).terms["commitment"]) * len(rows) == pytest.approx(
        inertia(rows, quantiser.code_KD.detach()), rel=1e-4
    )


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_init_is_k_means_with_sums_and_counts(update, digits):
    rows = digits.flatten(1).float()
    quantiser = VQ(64, 20, update=update, dead_below=0.1)
    quantiser.init_from_data(rows)
    reference = min(KMeans(20, n_init=1, random_state=seed).fit(rows.numpy()).inertia_ for seed in range(3))
    codes = quantiser.code_KD.detach()
    assert inertia(rows, codes) < 1.03 * reference
    index = quantiser.eval()(rows).indices[:, 0]
    hits = torch.bincount(index, minlength=20).float()
    assert (hits - quantiser.count_K).abs().sum() < 0.03 * len(rows) and float(quantiser.count_K.sum()) == len(rows)
    if update == "ema":
        torch.testing.assert_close(quantiser.sum_KD, codes * quantiser.count_K[:, None])
        # a step on the same data then hardly moves codes; sums that were means would be divided by the counts
        quantiser.train()(rows)
        assert float((quantiser.code_KD - codes).norm() / codes.norm()) < 0.01


def test_init_takes_few_or_equal_rows():
    rows = torch.randn(5, D)
    for given in (rows, rows.repeat(30, 1), torch.zeros(4, D)):
        quantiser = VQ(D, K)
        quantiser.init_from_data(given)
        assert quantiser.code_KD.isfinite().all()
        assert float(quantiser.eval()(given).terms["commitment"]) < 1e-10
    assert quantiser.code_KD.abs().max() == 0  # for constant data
    mean, count = k_means(rows.repeat(30, 1), K)
    assert sorted(count.tolist()) == [1.0] * (K - 5) + [30.0] * 5
    mean, count = k_means(torch.tensor([0.0, 0, 0, 1, 8, 9]).repeat(2)[:, None], 2)
    assert sorted(mean[:, 0].tolist()) == [0.25, 8.5] and sorted(count.tolist()) == [4.0, 8.0]


def test_k_means_subsamples_rows_and_scales_sizes():
    centres = torch.tensor([-5.0, 0, 5])
    rows = centres.repeat(20_000)[:, None] + 0.1 * torch.randn(60_000, 1)
    mean, count = k_means(rows, 3)
    torch.testing.assert_close(mean[:, 0].sort().values, centres, atol=0.01, rtol=0)
    torch.testing.assert_close(count, torch.full((3,), 20_000.0), rtol=0.03, atol=0)


# ---- moving averages -------------------------------------------------------------------------------------------------


def clusters(codes, per, spread=0.05):
    return codes.repeat(per, 1) + spread * torch.randn(per * len(codes), codes.shape[1])


def test_ema_codes_become_cluster_means():
    codes = 10 * torch.randn(K, D)
    rows = clusters(codes, 30)
    quantiser = VQ(D, K, decay=0.9).double().train()
    quantiser.code_KD.copy_(codes + 0.3 * torch.randn(K, D))
    quantiser.sum_KD.copy_(quantiser.code_KD)
    for _ in range(300):
        quantiser(rows.double())
    means = torch.stack([rows[k::K].double().mean(0) for k in range(K)])
    torch.testing.assert_close(quantiser.code_KD, means, rtol=0, atol=1e-10)
    torch.testing.assert_close(quantiser.count_K, torch.full((K,), 30.0, dtype=torch.float64))


def test_ema_step_matches_formula_and_keeps_unused_codes():
    quantiser = VQ(D, K, decay=0.99)
    quantiser.code_KD.copy_(torch.randn(K, D))
    quantiser.sum_KD.copy_(quantiser.code_KD)
    code, total, count = (t.double().numpy().copy() for t in (quantiser.code_KD, quantiser.sum_KD, quantiser.count_K))
    start = quantiser.code_KD.clone()
    quantiser.train()
    used = np.zeros(K, dtype=bool)
    for _ in range(500):
        z = start[:10] + 0.3 * torch.randn(10, D)
        index = ((z[:, None].double().numpy() - code) ** 2).sum(2).argmin(1)
        assert quantiser(z).indices[:, 0].tolist() == index.tolist()
        hit = np.eye(K)[index]
        count = 0.99 * count + 0.01 * hit.sum(0)
        total = 0.99 * total + 0.01 * hit.T @ z.double().numpy()
        used |= hit.any(0)
        code = np.where(hit.any(0)[:, None], total / count[:, None], code)
    assert 10 <= used.sum() < K
    np.testing.assert_allclose(quantiser.code_KD.numpy(), code, atol=1e-5)
    np.testing.assert_allclose(quantiser.count_K.numpy(), count, rtol=1e-4)
    assert torch.equal(quantiser.code_KD[~used], start[~used])


def test_long_unused_code_moves_to_its_rows_when_used():
    quantiser = VQ(2, 2, decay=0.5).train()
    quantiser.code_KD.copy_(torch.tensor([[0.0, 0], [9, 9]]))
    quantiser.sum_KD.copy_(quantiser.code_KD)
    for _ in range(300):  # 2^-300 underflows float32
        quantiser(torch.zeros(4, 2))
    assert quantiser.code_KD[1].tolist() == [9, 9] and float(quantiser.count_K[1]) == 0
    quantiser(torch.full((4, 2), 8.0))
    assert quantiser.code_KD.tolist() == [[0, 0], [8, 8]]


def test_unused_codes_do_not_drift_as_in_pythae():
    """`vq_vae_utils.py` of pythae 0.1.2 starts counts at 0 and divides sums, which start at the codes, by 1e-5."""
    codes, z, decay, eps = torch.empty(64, 8).uniform_(-1 / 64, 1 / 64), torch.randn(32, 8), 0.99, 1e-5
    index = torch.cdist(z, codes).argmin(1)
    hit = F.one_hot(index, 64).float()
    size, average = (1 - decay) * hit.sum(0), decay * codes + (1 - decay) * hit.T @ z
    size = (size + eps) / (size.sum() + 64 * eps) * size.sum()
    assert (average / size[:, None]).abs().max() > 1000
    quantiser = VQ(8, 64, decay=decay).train()
    quantiser.code_KD.copy_(codes)
    quantiser.sum_KD.copy_(codes)
    assert torch.equal(quantiser(z).indices[:, 0], index)
    assert quantiser.code_KD.abs().max() < z.abs().max()


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients(value, *of):
    return torch.autograd.grad(value, of, retain_graph=True, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize(
    "build",
    [
        lambda: VQ(D, K, update="gradient"),
        lambda: VQ(D, K, update="gradient", dead_below=1.0),
        lambda: SimVQ(D, K),
    ],
)
def test_commitment_moves_only_z_and_codebook_loss_only_codes(build):
    quantiser, z = build().train(), torch.randn(9, D, 2, requires_grad=True)
    (parameter,) = quantiser.parameters()
    terms = quantiser(z).terms
    assert terms["commitment"].equal(terms["codebook"])
    of_z, of_code = gradients(terms["commitment"], z, parameter)
    assert of_z.abs().min() > 0 and of_code.abs().max() == 0
    of_z, of_code = gradients(terms["codebook"], z, parameter)
    assert of_z.abs().max() == 0 and of_code.abs().max() > 0


def test_beta_weights_commitment_gradient():
    """Weighting the codebook term is the bug of taming-transformers #57, diffusers #8226 and 1d-tokenizer #95."""
    quantiser, z, beta = VQ(D, K, update="gradient").train(), torch.randn(30, D, requires_grad=True), 0.25
    found = quantiser(z)
    code, index, terms = quantiser.code_KD, found.indices[:, 0], found.terms
    pull = 2 * (z - code[index]).detach() / len(z)
    expected = beta * pull, -F.one_hot(index, K).float().T @ pull
    for (weighted, other), right in ((("commitment", "codebook"), True), (("codebook", "commitment"), False)):
        of_z, of_code = gradients(beta * terms[weighted] + terms[other], z, code)
        assert torch.allclose(of_z, expected[0], atol=1e-6) is right
        assert torch.allclose(of_code, expected[1], atol=1e-6) is right


@pytest.mark.parametrize("name", ["vq", "vq-gradient", "residual_vq", "grouped_vq", "sim_vq", "fvq", "lfq"])
def test_straight_through_passes_code_gradient_to_input(name):
    quantiser, z, weight = built(name).train(), torch.randn(8, D, 3, requires_grad=True), torch.randn(8, D, 3)
    z_q = quantiser(z).z_q
    (of_z,) = gradients((weight * z_q).sum(), z)
    assert torch.equal(of_z, weight)  # once, not once per level
    for parameter in quantiser.parameters():
        assert gradients(z_q.sum(), parameter)[0].abs().max() == 0


def test_rotation_trick_keeps_angle_and_scales_by_norms():
    z, q, g = (torch.randn(50, D, dtype=torch.float64) * scale for scale in (1, 3, 2))
    z.requires_grad_()
    z_q = rotation(z, q)
    assert torch.equal(z_q, q)
    (of_z,) = gradients((g * z_q).sum(), z)
    ratio = q.norm(dim=1) / z.norm(dim=1)
    torch.testing.assert_close(of_z.norm(dim=1), ratio * g.norm(dim=1), rtol=1e-10, atol=0)
    angle = F.cosine_similarity(of_z, z), F.cosine_similarity(g, q)
    torch.testing.assert_close(*angle, rtol=0, atol=1e-10)
    # the Jacobian maps z to q, which the exact value that `rotation` substitutes does not show
    rebuilt = torch.stack([torch.autograd.functional.jacobian(lambda one, to=to: rotation(one, to), one) @ one
                           for one, to in zip(z.detach(), q, strict=True)])  # fmt: skip
    torch.testing.assert_close(rebuilt, q, rtol=0, atol=1e-10)
    # vectors orthogonal to both are only scaled by the ratio
    other = torch.linalg.svd(torch.stack([z[0], q[0]])).Vh[-1].detach()
    (kept,) = gradients((other * rotation(z, q)[0]).sum(), z)
    torch.testing.assert_close(kept[0], ratio[0] * other, rtol=0, atol=1e-10)


def test_rotation_of_zeros_and_of_opposites_is_finite():
    z = torch.tensor([[0.0, 0], [1, 2], [1, 2]], requires_grad=True)
    q = torch.tensor([[1.0, 1], [-2, -4], [0, 0]])
    z_q = rotation(z, q)
    assert torch.equal(z_q, q) and gradients(z_q.square().sum(), z)[0].isfinite().all()


def test_diveq_without_noise_is_the_code_with_gradients():
    z, q = (torch.randn(20, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(diveq(z, q, 0.0), q, rtol=0, atol=1e-14)
    noisy = diveq(z, q, 0.5)
    torch.testing.assert_close((noisy - z).norm(dim=1), (q - z).norm(dim=1))
    assert (noisy - q).norm(dim=1).min() > 0.01
    g = torch.randn(20, D, dtype=torch.float64)
    of_z, of_q = gradients((g * diveq(z, q, 0.0)).sum(), z, q)
    unit = F.normalize(q - z, dim=1)
    along = (g * unit).sum(1, keepdim=True) * unit
    torch.testing.assert_close(of_q, along.detach())
    torch.testing.assert_close(of_z, (g - along).detach())
    same = torch.zeros(2, 3, requires_grad=True)
    assert gradients(diveq(same, same.detach(), 0.0).sum(), same)[0].isfinite().all()


def test_diveq_needs_no_codebook_term_and_is_exact_in_evaluation():
    quantiser, z = VQ(D, K, update="gradient", estimator="diveq", sigma=0.1).train(), torch.randn(50, D)
    found = quantiser(z)
    assert set(found.terms) == {"commitment"} and gradients(found.z_q.sum(), quantiser.code_KD)[0].abs().sum() > 0
    assert not torch.allclose(found.z_q, quantiser.codes(found.indices), atol=1e-3)
    assert torch.equal(quantiser.eval()(z).z_q, quantiser.codes(found.indices))


def test_gumbel_draws_by_distance_with_relaxed_gradient():
    quantiser, n = VQ(2, 5, update="gradient", estimator="gumbel", temperature=0.7).double().train(), 40_000
    with torch.no_grad():
        quantiser.code_KD.copy_(torch.randn(5, 2))
    one = torch.randn(1, 2, dtype=torch.float64)
    p = (-torch.cdist(one, quantiser.code_KD).square() / 0.7).softmax(1)[0].detach()
    found = quantiser(one.expand(n, 2))
    shares = torch.bincount(found.indices[:, 0], minlength=5) / n
    assert ((shares - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all() and p.max() < 0.9
    assert torch.equal(found.z_q, quantiser.codes(found.indices))
    # the same draw by hand
    z, weight = torch.randn(6, 2, dtype=torch.float64, requires_grad=True), torch.randn(6, 2, dtype=torch.float64)
    torch.manual_seed(3)
    got = gradients((weight * quantiser(z).z_q).sum(), z, quantiser.code_KD)
    torch.manual_seed(3)
    noise = -torch.empty(6, 1, 5, dtype=torch.float64).exponential_().log()[:, 0]
    soft = (-torch.cdist(z, quantiser.code_KD).square() / 0.7 + noise).softmax(1) @ quantiser.code_KD
    torch.testing.assert_close(got, gradients((weight * soft).sum(), z, quantiser.code_KD))


def test_gumbel_tends_to_nearest_code_at_low_temperature():
    quantiser, z = VQ(D, K, estimator="gumbel", temperature=1e-6), torch.randn(500, D)
    quantiser.init_from_data(z)
    found = quantiser.train()(z).indices
    drawn = VQ(D, K, estimator="gumbel", temperature=100.0).train()
    assert drawn(z).indices.unique().numel() == K
    fresh = VQ(D, K)
    fresh.init_from_data(z)
    assert torch.equal(found, fresh.eval()(z).indices)
    assert torch.equal(drawn.eval()(z).indices, drawn(z).indices)


def test_estimators_agree_in_evaluation():
    z, first = torch.randn(30, D), None
    for estimator in ("ste", "rotation", "gumbel", "diveq"):
        torch.manual_seed(0)
        found = VQ(D, K, estimator=estimator).eval()(z)
        first = first or found
        assert torch.equal(found.z_q, first.z_q) and torch.equal(found.indices, first.indices)


# ---- equivalent quantisers -------------------------------------------------------------------------------------------


def trained_pair(one, other, steps=3):
    """Train both on the same data and random numbers: pairs of outputs, gradients and state after each step."""
    results = []
    for quantiser in (one, other):
        torch.manual_seed(5)
        for _ in range(steps):
            z = torch.randn(40, D, 2, requires_grad=True)
            found = quantiser(z)
            loss = found.z_q.square().sum() + sum(found.terms.values(), 0 * z.sum())
            of = gradients(loss, z, *quantiser.parameters())
            results.append((found, of, [value.clone() for value in quantiser.state_dict().values()]))
    return zip(results[:steps], results[steps:], strict=True)


@pytest.mark.parametrize("options", [{}, {"update": "gradient", "dead_below": 1.0}, {"estimator": "rotation"},
                                     {"estimator": "gumbel"}, {"estimator": "diveq", "update": "gradient"}],
                         ids=lambda options: "-".join(map(str, options.values())) or "default")  # fmt: skip
@pytest.mark.parametrize("build", [lambda o: ResidualVQ(D, 1, K, **o), lambda o: GroupedVQ(D, 1, K, **o)],
                         ids=["one level", "one group"])  # fmt: skip
def test_one_level_or_one_group_is_vq(build, options):
    parent, child = VQ(D, K, **options).train(), build(options).train()
    (only,) = [m for m in child.modules() if isinstance(m, VQ)]
    only.load_state_dict(parent.state_dict())
    for (found, of, state), (other, of_other, other_state) in trained_pair(parent, child):
        assert torch.equal(found.indices, other.indices) and torch.equal(found.z_q, other.z_q)
        assert found.terms.keys() == other.terms.keys()
        torch.testing.assert_close([*found.terms.values()], [*other.terms.values()])
        torch.testing.assert_close(of, of_other)
        assert all(torch.equal(a, b) for a, b in zip(state, other_state, strict=True))


def test_one_level_of_residual_fsq_is_fsq():
    for (found, of, _), (other, of_other, _) in trained_pair(FSQ(GRIDS), ResidualFSQ(GRIDS, 1)):
        assert torch.equal(found.indices, other.indices) and torch.equal(found.z_q, other.z_q)
        assert torch.equal(of[0], of_other[0])


def test_fsq_lfq_and_bsq_with_two_levels_give_signs():
    z = torch.randn(500, D)
    fsq, lfq, bsq = FSQ((2,) * D)(z), LFQ(D)(z), BSQ(D)(z)
    assert torch.equal(lfq.z_q, z.sign()) and torch.equal(fsq.z_q, z.sign())
    torch.testing.assert_close(bsq.z_q, z.sign() / math.sqrt(D))
    bits = (2 ** torch.arange(D) * (z > 0)).sum(1)
    for found in (fsq, lfq, bsq):
        assert torch.equal(found.indices[:, 0], bits)


def test_single_code_is_mean_of_rows():
    quantiser, z = VQ(D, 1, decay=0.0), torch.randn(100, D) + 3
    assert quantiser.bits == 0 and quantiser.train()(z).indices.abs().max() == 0
    torch.testing.assert_close(quantiser.code_KD[0], z.mean(0))
    variance = z.var(0, correction=0).sum()
    torch.testing.assert_close(quantiser.eval()(z).terms["commitment"], variance)


def test_grouped_vq_equals_separate_quantisers():
    quantiser, z = built("grouped_vq"), torch.randn(20, D)
    found = quantiser(z)
    parts = [group(part) for group, part in zip(quantiser.groups, z.split(2, 1), strict=True)]
    assert torch.equal(found.z_q, torch.cat([part.z_q for part in parts], 1))
    torch.testing.assert_close(found.terms["commitment"], (z - found.z_q).square().sum(1).mean())
    quantiser.init_from_data(rows := torch.randn(200, D))
    for group, part in zip(quantiser.groups, rows.split(2, 1), strict=True):
        alone = VQ(2, K, dead_below=0.5)
        alone.init_from_data(part)
        assert all(torch.equal(value, alone.state_dict()[key]) for key, value in group.state_dict().items())


# ---- finite scalars and signs ----------------------------------------------------------------------------------------


def published_fsq(levels, z):
    """The listing of appendix A.1 of the paper, in NumPy: codes and indices."""
    levels = np.asarray(levels)
    basis = np.concatenate(([1], np.cumprod(levels[:-1])))
    half_l = (levels - 1) * (1 - 1e-3) / 2
    offset = np.where(levels % 2 == 1, 0.0, 0.5)
    shift = np.tan(offset / half_l)
    quantised = np.round(np.tanh(z + shift) * half_l - offset)
    half_width = levels // 2
    codes = quantised / half_width
    return codes, ((codes * half_width + half_width) * basis).sum(1).round().astype(int)


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (8, 8, 8, 6, 5), (3, 4, 7)])
def test_fsq_matches_the_published_listing(levels):
    z = 2 * torch.randn(2000, len(levels), dtype=torch.float64)
    codes, indices = published_fsq(levels, z.numpy())
    found = FSQ(levels).double()(z)
    np.testing.assert_allclose(found.z_q.numpy(), codes, atol=1e-15)
    assert found.indices[:, 0].tolist() == indices.tolist()


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2, 3, 4, 2)])
def test_every_fsq_code_is_reachable_and_distinct(levels):
    quantiser, size = FSQ(levels), math.prod(levels)
    codes = quantiser.codes(torch.arange(size)[:, None])
    assert len(codes.unique(dim=0)) == size and codes.abs().max() == 1
    grids = [[-1.0, 1.0] if n == 2 else [(i - n // 2) / (n // 2) for i in range(n)] for n in levels]
    for channel, grid in zip(codes.T, grids, strict=True):
        torch.testing.assert_close(channel.unique(), torch.tensor(grid))
    # a z for each code, by the inverse of the bound
    digit = codes * quantiser.width_D + quantiser.zero_D - quantiser.lowest_D
    z = ((digit + quantiser.offset_D) / quantiser.half_D).clamp(-0.999, 0.999).atanh() - quantiser.shift_D
    assert quantiser(z).indices[:, 0].tolist() == [*range(size)]


@pytest.mark.parametrize("levels", [2, 3, 8, 981, 1500, 4097])
def test_fsq_reaches_the_outermost_values(levels):
    """With an eps of 0.001, the indices of 4,097 values would be 2 to 4,094."""
    z = torch.tensor([[-30.0], [30.0]])
    for quantiser in (FSQ((levels,)), ResidualFSQ((levels,), 2)):
        found = quantiser(z)
        assert found.indices[:, 0].tolist() == [0, levels - 1]
        torch.testing.assert_close(quantiser.codes(found.indices), found.z_q)


def test_two_level_fsq_thresholds_at_zero():
    """A shift of atanh(.999), as in vector-quantize-pytorch #237, would move the threshold to -3.8."""
    z = torch.tensor([-4.0, -3, -0.01, 0.01, 3, 4])
    for levels in ((2,), (2, 5)):
        found = FSQ(levels)(torch.stack([z] * len(levels), 1)).z_q[:, 0]
        assert found.tolist() == [-1, -1, -1, 1, 1, 1]


def test_fsq_gradient_matches_bound_derivative():
    z = torch.randn(30, len(GRIDS), dtype=torch.float64, requires_grad=True)
    quantiser = FSQ(GRIDS).double()
    (found,) = gradients(quantiser(z).z_q.sum(), z)
    levels = np.asarray(GRIDS)
    half = (levels - 1) * (1 - 1e-3) / 2
    shift = np.where(levels == 2, 0, np.tan(np.where(levels % 2 == 1, 0.0, 0.5) / half))
    width = np.where(levels == 2, 0.5, levels // 2)
    expected = half / np.cosh(z.detach().numpy() + shift) ** 2 / width
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def brute_entropies(u, temperature, scale):
    """E H(p) and H(E p) over the whole codebook, in float64."""
    codebook = scale * torch.tensor([*itertools.product((-1.0, 1), repeat=u.shape[1])], dtype=torch.float64)
    p = torch.distributions.Categorical(logits=2 / temperature * u.double() @ codebook.T)
    return p.entropy().mean(), torch.distributions.Categorical(probs=p.probs.mean(0)).entropy()


@pytest.mark.parametrize("kind", [LFQ, BSQ])
@pytest.mark.parametrize("dim", [1, 4, 10])
def test_entropy_terms_match_brute_force(kind, dim):
    z = 0.5 * torch.randn(60, dim) + 0.2
    quantiser = kind(dim, temperature=0.7)
    terms = quantiser(z).terms
    u, scale = (z, 1.0) if kind is LFQ else (F.normalize(z, dim=1), dim**-0.5)
    assert quantiser.scale == pytest.approx(scale)
    sample, batch = brute_entropies(u, 0.7, scale)
    assert float(terms["entropy"]) == pytest.approx(float(sample), rel=1e-5, abs=1e-6)
    assert float(terms["diversity"]) == pytest.approx(float(batch), rel=1e-5)
    torch.testing.assert_close(terms["commitment"], (u - scale * z.sign()).square().sum(1).mean())


def test_grouped_entropy_bounds_joint_entropy():
    z = torch.randn(30, 12)
    z[:, 6:] = z[:, :6]  # a dependence between groups, which separate groups do not see
    quantiser = LFQ(12, temperature=2.0)
    assert quantiser.sizes == [6, 6]
    assert [LFQ(dim).sizes for dim in (10, 11, 18, 21)] == [[10], [6, 5], [9, 9], [7, 7, 7]]
    terms = quantiser(z).terms
    halves = sum(brute_entropies(half, 2.0, 1.0)[1] for half in z.split(6, 1))
    assert float(terms["diversity"]) == pytest.approx(float(halves), rel=1e-5)
    sample, batch = brute_entropies(z, 2.0, 1.0)
    assert float(terms["diversity"]) > float(batch) + 0.1
    assert float(terms["entropy"]) == pytest.approx(float(sample), rel=1e-5)


def test_entropy_loss_is_least_for_confident_diverse_codes():
    dim, quantiser = 5, LFQ(5, temperature=1.0)
    every_code = torch.tensor([*itertools.product((-1.0, 1), repeat=dim)])

    def value(z):
        terms = quantiser(z).terms
        return float(terms["entropy"] - terms["diversity"])

    least = -dim * math.log(2)
    assert value(20 * every_code) == pytest.approx(least, abs=1e-5)
    for worse in (0.2 * every_code, 20 * every_code[:16], torch.randn(32, dim)):
        assert value(worse) > least + 0.1
    assert value(torch.zeros(4, dim)) == pytest.approx(0, abs=1e-5)  # both entropies are dim log 2


def test_entropy_of_certain_codes_has_finite_gradient():
    for kind in (LFQ, BSQ):
        z = (1e3 * torch.randn(8, 9)).requires_grad_()
        terms = kind(9)(z).terms
        assert gradients(terms["entropy"] - terms["diversity"], z)[0].isfinite().all()
    p = torch.tensor([0.0, 1], requires_grad=True)
    assert float(entropy(p).detach()) == 0 and gradients(entropy(p), p)[0].isfinite().all()


def test_bsq_codes_have_unit_norm_and_ignore_length():
    z = torch.randn(50, 7)
    found = BSQ(7)(z)
    torch.testing.assert_close(found.z_q.norm(dim=1), torch.ones(50))
    assert torch.equal(BSQ(7)(9 * z).indices, found.indices)
    torch.testing.assert_close(BSQ(7)(9 * z).terms, found.terms)
    big = LFQ(62)(torch.ones(1, 62))
    assert int(big.indices) == 2**62 - 1 and LFQ(62).codes(big.indices).min() == 1


# ---- SimVQ, Gumbel, random projection --------------------------------------------------------------------------------


def test_sim_vq_step_moves_all_codes_and_vq_step_one():
    z = torch.randn(1, D)
    for quantiser, moved in ((SimVQ(D, K), K), (VQ(D, K, update="gradient"), 1)):
        before, (parameter,) = quantiser.codebook().detach().clone(), quantiser.parameters()
        (gradient,) = gradients(quantiser(z).terms["codebook"], parameter)
        with torch.no_grad():
            parameter -= 0.1 * gradient
        assert int(((quantiser.codebook() - before).norm(dim=1) > 1e-6).sum()) == moved
    assert "frozen_KD" in dict(SimVQ(D, K).named_buffers())
    quantiser = SimVQ(D, K)
    torch.testing.assert_close(quantiser.codebook(), quantiser.frozen_KD @ quantiser.W_DD)
    index = torch.cdist(z, quantiser.codebook()).argmin(1)
    assert torch.equal(quantiser(z).indices[:, 0], index)


def test_gumbel_vq_kl_is_relative_to_uniform_distribution():
    z = 2 * torch.randn(30, 7, 4)
    uniform = torch.distributions.Categorical(logits=torch.zeros(7))
    kl = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=z.movedim(1, -1)), uniform)
    for hard in (False, True):
        found = GumbelVQ(7, 3, hard=hard)(z)
        torch.testing.assert_close(found.terms["kl"], kl.sum(1).mean())


def test_gumbel_vq_mixes_in_training_and_argmaxes_in_eval():
    z, n = torch.randn(1, 5), 20_000
    soft, hard = GumbelVQ(5, 3, 0.5).train(), GumbelVQ(5, 3, 0.5, hard=True).train()
    assert torch.equal(soft.eval()(z).indices[:, 0], z.argmax(1))
    found = hard(z.expand(n, 5))
    assert torch.equal(found.z_q, hard.codes(found.indices))
    shares, p = torch.bincount(found.indices[:, 0], minlength=5) / n, z.softmax(1)[0]
    assert ((shares - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()
    soft.train()
    mixed = soft(z.expand(n, 5))
    assert not torch.allclose(mixed.z_q, soft.codes(mixed.indices), atol=0.1)
    soft.temperature.fill_(1e-4)  # callbacks set the temperature like this
    sharp = soft(z.expand(2000, 5))
    assert float(((sharp.z_q - soft.codes(sharp.indices)).norm(dim=1) < 1e-3).float().mean()) > 0.99


def test_random_projection_is_frozen_and_compares_directions():
    quantiser, z = RandomProjection(D, 50, 4).train(), torch.randn(200, D, requires_grad=True)
    before = copy.deepcopy(quantiser.state_dict())
    found = quantiser(z)
    assert not found.z_q.requires_grad and not [*quantiser.parameters()] and not found.terms
    cosine = F.cosine_similarity((z @ quantiser.projection_DC)[:, None], quantiser.code_KC[None], dim=2)
    assert torch.equal(found.indices[:, 0], cosine.argmax(1))
    assert torch.equal(quantiser(3 * z).indices, found.indices)
    assert all(torch.equal(value, before[key]) for key, value in quantiser.state_dict().items())
    torch.testing.assert_close(quantiser.code_KC.norm(dim=1), torch.ones(50))


# ---- residuals and dropout -------------------------------------------------------------------------------------------


def test_residual_levels_reduce_error():
    z = torch.randn(600, D)
    quantiser = ResidualVQ(D, 4, K)
    quantiser.init_from_data(z)
    found = quantiser.eval()(z)
    left = [z.square().sum()]
    for n in range(1, 5):
        first = found.indices.clone()
        first[:, n:] = -1
        left.append((z - quantiser.codes(first)).square().sum())
        # each level takes the code nearest to the residual
        codebook = quantiser.levels[n - 1].codebook()
        residual = z - (quantiser.codes(torch.where(torch.arange(4) < n - 1, found.indices, -1)))
        assert torch.equal(torch.cdist(residual, codebook).argmin(1), found.indices[:, n - 1])
    assert all(after < 0.8 * before for before, after in itertools.pairwise(left))
    assert float(found.terms["commitment"]) == pytest.approx(float(sum(left[1:])) / 600, rel=1e-4)


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2, 3, 6, 7)])
def test_residual_fsq_error_shrinks_by_levels(levels):
    quantiser = ResidualFSQ(levels, 4).double()
    z = torch.randn(3000, len(levels), dtype=torch.float64)
    found = quantiser(z)
    exact = quantiser.value(quantiser.bound(z))
    for n in range(1, 5):
        first = torch.where(torch.arange(4) < n, found.indices, -1)
        error = ((quantiser.codes(first) - exact).abs() * quantiser.width_D).max(0).values
        bound = 0.5 / torch.tensor(levels, dtype=torch.float64) ** (n - 1)
        assert (error <= bound + 1e-12).all()
        assert (error > 0.7 * bound).all()  # the bound is nearly attained
    assert quantiser.bits == pytest.approx(4 * FSQ(levels).bits)


@pytest.mark.parametrize(
    "build", [lambda p: ResidualVQ(D, 4, K, dropout=p), lambda p: ResidualFSQ(GRIDS, 4, dropout=p)], ids=["vq", "fsq"]
)
def test_dropout_keeps_the_first_levels_of_a_sample(build):
    quantiser, z = build(1.0).train(), torch.randn(4000, D, 2)
    found = quantiser(z)
    kept = found.indices >= 0
    assert torch.equal(kept[..., 0], kept[..., 1])  # equal for all places of a sample
    depth = kept[..., 0].sum(1)
    assert torch.equal(kept[..., 0], torch.arange(4) < depth[:, None])
    shares = torch.bincount(depth, minlength=5)[1:] / 4000
    assert depth.min() == 1 and ((shares - 0.25).abs() < 4 * math.sqrt(0.25 * 0.75 / 4000)).all()
    half = build(0.5).train()(z).indices[:, -1, 0] >= 0
    assert float(half.float().mean()) == pytest.approx(0.5 + 0.5 / 4, abs=0.035)
    assert (quantiser.eval()(z).indices >= 0).all() and (build(0.0).train()(z).indices >= 0).all()


def test_dropped_levels_are_not_updated():
    z = torch.randn(300, D)
    quantiser = ResidualVQ(D, 3, K, dropout=1.0, decay=0.0)
    quantiser.init_from_data(z)
    codebooks = [level.code_KD.clone() for level in quantiser.levels]
    found = quantiser.train()(z)
    total, terms = torch.zeros_like(z), 0
    for i, (level, codebook) in enumerate(zip(quantiser.levels, codebooks, strict=True)):
        index = found.indices[:, i]
        kept = index >= 0
        residual = (z - total)[kept]
        assert torch.equal(torch.cdist(residual, codebook).argmin(1), index[kept])
        hits = torch.bincount(index[kept], minlength=K).float()
        assert torch.equal(level.count_K, hits)  # with decay 0, of this batch only
        sums = torch.zeros(K, D).index_add(0, index[kept], residual)
        torch.testing.assert_close(level.sum_KD, sums, rtol=1e-5, atol=1e-5)
        terms = terms + (residual - codebook[index[kept]]).square().sum() / 300
        total = total + torch.where(kept[:, None], codebook[index.clamp(min=0)], 0)
    torch.testing.assert_close(found.z_q, total)
    torch.testing.assert_close(found.terms["commitment"], terms)


# ---- dead codes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_dead_code_revival_uses_every_code(update):
    centres = 10 * F.normalize(torch.randn(K, D), dim=1)
    used = {}
    for dead_below in (0.0, 1.0):
        quantiser = VQ(D, K, update=update, dead_below=dead_below, decay=0.9).train()
        with torch.no_grad():
            quantiser.code_KD.copy_(torch.cat([torch.zeros(1, D), torch.full((K - 1, D), 100.0)]))
        if update == "ema":
            quantiser.sum_KD.copy_(quantiser.code_KD)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1)), *quantiser.parameters()], 1.0)
        for _ in range(100):
            optimizer.zero_grad()
            terms = quantiser(clusters(centres, 4)[torch.randperm(4 * K)]).terms
            if update == "gradient":
                terms["codebook"].backward()
                optimizer.step()
        usage = CodebookUsage((K,))
        usage.update(quantiser.eval()(clusters(centres, 10)).indices)
        used[dead_below] = float(usage.compute()["usage"])
    assert used == {0.0: 1 / K, 1.0: 1.0}


def test_revived_code_resets_sum_and_count():
    z = torch.randn(40, D)
    quantiser = VQ(D, K, dead_below=0.995, decay=0.99)
    quantiser.code_KD[1:] += 100
    quantiser.sum_KD.copy_(quantiser.code_KD)
    for update in (0, 1):
        quantiser.train()(z)
        revived = quantiser.count_K == 40 / K
        assert int(revived.sum()) == (K - 1 if update == 0 else 0)
        if update == 0:
            rows = [int((z == code).all(1).nonzero()) for code in quantiser.code_KD[1:]]
            assert rows == [j * 40 // (K - 1) for j in range(K - 1)]  # spread evenly
            torch.testing.assert_close(quantiser.sum_KD[1:], quantiser.code_KD[1:] * 40 / K)
    assert int(quantiser.updates) == 2
    again = VQ(D, K, dead_below=50.0).train()
    again(z)
    assert (again.count_K == 50).all()  # not below the threshold, so that no code is dead at once
    again(z)  # the next update takes the rows that follow
    rows = [int((z == code).all(1).nonzero()) for code in again.code_KD]
    assert rows == [(j * 40 // K + 1) % 40 for j in range(K)]


def test_revived_codes_are_rows_of_all_ranks(monkeypatch):
    z, given = torch.randn(40, D), []
    for rank in range(2):
        quantiser = VQ(D, K, dead_below=50.0).train()
        monkeypatch.setattr(quantiser, "is_distributed", lambda: True)
        monkeypatch.setattr(quantiser, "all_reduce_sum", lambda total: given.append(total) or total)
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
        quantiser._replace_dead_codes(z[20 * rank : 20 * (rank + 1)])
    assert torch.equal(sum(given), z[[j * 40 // K for j in range(K)]])
    assert all(part.any() for part in given)


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize(
    ("n", "dead_below", "expected"),
    [
        # 14 steps from 1 to below N / 2K = 1/4, then log 2 / log(1 / d), rounded up to 7, from N / K
        (4, 1.0, [14, 21, 28]),
        (4, 4.0, [14, 21, 28]),
        (4, 0.2, [16, 25]),
        (8, 1.0, [7, 14, 21, 28]),
        (8, 0.3, [12, 24]),
        # with more rows than codes the threshold is dead_below
        (16, 1.0, [1, 8, 15, 22, 29]),
        (16, 3.0, [*range(1, 33)]),
    ],
)
def test_unused_code_moves_when_count_is_below_threshold(n, dead_below, expected, update):
    """K = 8 and d = 0.9, over 32 steps."""
    dim = 32 * n
    quantiser = VQ(dim, 8, update=update, dead_below=dead_below, decay=0.9).train()
    with torch.no_grad():
        quantiser.code_KD.copy_(torch.cat([torch.zeros(1, dim), torch.full((7, dim), 100.0)]))
    if update == "ema":
        quantiser.sum_KD.copy_(quantiser.code_KD)
    moves = []
    # distinct orthogonal rows, so that the first code, 0, is the nearest to all
    for step, z in enumerate(torch.eye(dim).split(n), 1):
        before = quantiser.code_KD[1:].clone()
        assert not quantiser(z).indices.any()
        moved = (quantiser.code_KD[1:] != before).any(1)
        assert moved.all() or not moved.any()
        moves += [step] if moved.any() else []
    assert moves == expected


# ---- two processes ---------------------------------------------------------------------------------------------------


RANKED = {
    "vq": lambda: VQ(D, K, decay=0.9),
    "revived": lambda: VQ(D, K, decay=0.5, dead_below=2.0),
    "gradient": lambda: VQ(D, K, update="gradient", decay=0.5, dead_below=2.0),
    "residual": lambda: ResidualVQ(D, 3, K, decay=0.9, dead_below=0.2),
    "dropped": lambda: ResidualVQ(D, 3, K, dropout=0.7, decay=0.5, dead_below=0.2),
    "lfq": lambda: LFQ(D, temperature=1.0),
    "bsq": lambda: BSQ(12, temperature=1.0),
    "grouped": lambda: GroupedVQ(D, 3, K, decay=0.5, dead_below=0.2),
    "latent": lambda: LatentQuantisation(D, 5),
}


def ranked(name, rank=None):
    """A few steps on all samples or on those of a rank: state, and terms and gradients of the last step."""
    torch.manual_seed(7)
    quantiser = RANKED[name]()
    data = torch.randn(5, 24, quantiser.dim, 2) + 0.3
    rows = slice(None) if rank is None else slice(12 * rank, 12 * (rank + 1))
    # only the first rank has the data, so the others must receive its result
    quantiser.init_from_data(data[0] if rank in (None, 0) else torch.zeros_like(data[0]))
    quantiser.train()
    torch.manual_seed(8 if rank is None else rank)  # each rank drops its own levels
    for batch in data:
        z = batch[rows].clone().requires_grad_()
        found = quantiser(z)
        loss = sum(found.terms.values()) + found.z_q.square().sum() / len(z)
        gradient = torch.autograd.grad(loss, [z, *quantiser.parameters()])
    terms = {term: value.detach() for term, value in found.terms.items()}
    return {"state": quantiser.state_dict(), "terms": terms, "gradient": [g.clone() for g in gradient]}


def _rank(rank, store, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save({name: ranked(name, rank) for name in RANKED}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_match_single_process_training(tmp_path):
    multiprocessing.start_processes(_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2, start_method="fork")
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name in RANKED:
        one, first, second = ranked(name), both[0][name], both[1][name]
        for key, value in one["state"].items():
            assert torch.equal(first["state"][key], second["state"][key]), (name, key)
            if name != "dropped":
                torch.testing.assert_close(first["state"][key], value, rtol=1e-5, atol=1e-5, msg=f"{name} {key}")
        if name == "dropped":
            continue
        for term, value in one["terms"].items():
            mean = (first["terms"][term] + second["terms"][term]) / 2
            torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-5, msg=f"{name} {term}")
        # DDP minimises the mean of the loss over ranks
        joined = torch.cat([first["gradient"][0], second["gradient"][0]]) / 2
        torch.testing.assert_close(joined, one["gradient"][0], rtol=1e-4, atol=1e-6, msg=name)
        for a, b, value in zip(first["gradient"][1:], second["gradient"][1:], one["gradient"][1:], strict=True):
            torch.testing.assert_close((a + b) / 2, value, rtol=1e-4, atol=1e-6, msg=name)


# ---- compilers and exporters -----------------------------------------------------------------------------------------


COMPILED = {
    "vq": lambda: VQ(D, K, dead_below=0.5),
    "vq-gradient": lambda: VQ(D, K, update="gradient", estimator="rotation", dead_below=0.5),
    "fsq": lambda: FSQ(GRIDS),
    "residual_vq": lambda: ResidualVQ(D, 3, K),
}


def require_compiled_alike(name, backend):
    quantiser, z = COMPILED[name](), torch.randn(20, D, 3)
    quantiser.init_from_data(z)
    other = copy.deepcopy(quantiser)
    torch._dynamo.reset()
    compiled = torch.compile(other.quantise, fullgraph=True, backend=backend, dynamic=False)
    try:
        for mode in (True, False):
            results = []
            for run, module in ((quantiser.quantise, quantiser), (compiled, other)):
                module.train(mode)
                given = z.clone().requires_grad_()
                found = run(given)
                loss = found.z_q.square().sum() + sum(found.terms.values(), 0 * given.sum())
                results.append((found, gradients(loss, given, *module.parameters())))
            (found, of), (same, of_same) = results
            assert torch.equal(found.indices, same.indices)
            torch.testing.assert_close(found.z_q, same.z_q)
            torch.testing.assert_close(found.terms, same.terms)
            torch.testing.assert_close(of, of_same, rtol=1e-4, atol=1e-5)
            for key, value in quantiser.state_dict().items():
                torch.testing.assert_close(other.state_dict()[key], value)
    finally:
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor imports modules that torch has deprecated
@pytest.mark.parametrize("name", ["vq", "fsq"])
def test_inductor_matches_eager(name):
    require_compiled_alike(name, "inductor")


class ToIndices(nn.Module):
    def __init__(self, quantiser):
        super().__init__()
        self.quantiser = quantiser

    def forward(self, z):
        return self.quantiser.quantise(z).indices


class FromIndices(ToIndices):
    def forward(self, indices):
        return self.quantiser.codes(indices)


EXPORTED = ("vq", "fsq", "lfq", "residual_vq")


@pytest.mark.slow  # EXPORTED ones are tested by the ONNX export below
@pytest.mark.parametrize("name", [name for name in ALL if name not in EXPORTED])
def test_exported_program_matches_for_any_batch(name):
    quantiser, z = built(name), torch.randn(5, D, 2, 3)
    batch = torch.export.Dim("batch", min=1)
    for module, given in ((ToIndices(quantiser), z), (FromIndices(quantiser), quantiser(z).indices)):
        program = torch.export.export(module, (given,), dynamic_shapes=({0: batch},)).module()
        for part in (given, given[:3], given[:1]):
            assert torch.equal(program(part), module(part))


@pytest.mark.slow  # check_model exports and compiles them too
@pytest.mark.parametrize("name", EXPORTED)
def test_onnx_model_matches_for_any_batch(name):
    import onnxruntime

    quantiser, z = built(name), torch.randn(5, D, 2, 3)
    for module, given in ((ToIndices(quantiser), z), (FromIndices(quantiser), quantiser(z).indices)):
        module.eval()
        program = torch.onnx.export(module, (given,), dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)
        with tempfile.TemporaryDirectory() as folder:
            program.save(f"{folder}/model.onnx")
            session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
        for part in (given, given[:3], given[:1]):
            found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: part.numpy()})[0])
            torch.testing.assert_close(found, module(part))


# ---- against vector-quantize-pytorch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [(5, 5, 7), (3, 9, 5, 7)])
def test_residual_fsq_of_odd_levels_matches_peer(levels):
    L = torch.tensor(levels, dtype=torch.float64)
    value = 0.998 * (2 * torch.rand(2000, len(levels), dtype=torch.float64) - 1)
    # ours bounds z by a tanh that reaches 1 - 1e-3, the peer's by one that reaches the edge of the outer cells
    edge = L / (L - 1)
    theirs = peer.ResidualFSQ(levels=[*levels], num_quantizers=3).double().eval()
    z_q, indices = theirs((edge * (value / edge).atanh())[None])
    found = ResidualFSQ(levels, 3).double()((value / (1 - 1e-3)).atanh())
    assert torch.equal(found.indices, indices[0].long())
    torch.testing.assert_close(found.z_q, z_q[0], rtol=0, atol=1e-6)  # the peer's scales are float32


def test_residual_fsq_levels_match_peer():
    """For even levels the peer's first level differs from the paper's, so both continue from the residual of ours."""
    levels, z = (8, 5, 2, 6), torch.randn(2000, 4, dtype=torch.float64)
    L = torch.tensor(levels, dtype=torch.float64)
    quantiser = ResidualFSQ(levels, 4).double()
    found, exact = quantiser(z), quantiser.value(quantiser.bound(z))
    first = quantiser.codes(torch.where(torch.arange(4) < 1, found.indices, -1))
    step = 2 / (L - 1)  # between the peer's values
    left = (exact - first) * quantiser.width_D * step
    theirs = peer.ResidualFSQ(levels=[*levels], num_quantizers=4).double().eval()
    for level in (1, 2, 3):
        code, index = theirs.layers[level]((left / theirs.scales[level])[None])
        assert torch.equal(index[0].long(), found.indices[:, level])
        left = left - code[0] * theirs.scales[level]
    torch.testing.assert_close(left / step, (exact - found.z_q) * quantiser.width_D, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cosine", [False, True])
def test_grouped_vq_matches_peer_codes(cosine):
    quantiser, z = GroupedVQ(D, 3, K, cosine=cosine), torch.randn(300, D)
    quantiser.init_from_data(z)
    theirs = peer.GroupedResidualVQ(
        dim=D, groups=3, num_quantizers=1, codebook_size=K, use_cosine_sim=cosine, rotation_trick=False
    )
    with torch.no_grad():
        for group, of_group in zip(quantiser.groups, theirs.rvqs, strict=True):
            of_group.layers[0]._codebook.embed.copy_(group.codebook())
            of_group.layers[0]._codebook.initted.fill_(True)
    found, (z_q, indices, _) = quantiser.eval()(z), theirs.eval()(z[None])
    assert torch.equal(found.indices, indices[:, 0, :, 0].T)
    torch.testing.assert_close(found.z_q, z_q[0])


# ---- usage of codebooks ----------------------------------------------------------------------------------------------


def test_usage_and_perplexity_cover_all_batches():
    sizes, dice = (8, 5), torch.Generator().manual_seed(0)
    second = torch.tensor([2, 2, 2, 3]).expand(300, 4)
    indices = torch.stack([torch.randint(6, (300, 4), generator=dice), second], 1)
    indices[::3, 1] = -1
    indices[1, 0, 0] = 7
    usage, perplexity = CodebookUsage(sizes), CodebookPerplexity(sizes)
    for part in indices.split(7):
        usage.update(part)
        perplexity.update(part)
    found = usage.compute()
    assert {key: float(value) for key, value in found.items()} == pytest.approx(
        {"usage": (7 / 8 + 2 / 5) / 2, "usage_0": 7 / 8, "usage_1": 2 / 5}
    )
    shares = np.bincount(indices[:, 0].flatten().numpy(), minlength=8) / 1200
    expected, other = (math.exp(-sum(p * math.log(p) for p in of if p)) for of in (shares, (0.75, 0.25)))
    found = {key: float(value) for key, value in perplexity.compute().items()}
    of_books = {"perplexity": (expected + other) / 2, "perplexity_0": expected, "perplexity_1": other}
    assert found == pytest.approx(of_books, rel=1e-5)
    # the mean over batches of their perplexity would be lower
    means = [math.exp(-sum(p * math.log(p) for p in np.bincount(part.numpy()) / len(part) if p))
             for part in indices[:, 0, 0].split(7)]  # fmt: skip
    assert np.mean(means) < 0.9 * expected


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_uniform_usage_is_1_and_empty_is_refused():
    usage, perplexity = CodebookUsage((K,)), CodebookPerplexity((K,))
    with pytest.raises(AezooError, match="no indices"):
        usage.compute()
    for metric, value in ((usage, 1), (perplexity, K)):
        metric.update(torch.arange(K)[:, None])
        assert {key: float(figure) for key, figure in metric.compute().items()} == pytest.approx({metric.name: value})
        metric.reset()
        metric.update(torch.full((9, 1), 3))
        assert float(metric.compute()[metric.name]) == pytest.approx(1 / K if value == 1 else 1)
        with pytest.raises(AezooError, match="takes indices"):
            metric.update(torch.zeros(3, 2, dtype=torch.long))


def _count(rank, store, folder):
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    metrics = CodebookUsage((K,)), CodebookPerplexity((K,))
    for metric in metrics:
        metric.update(torch.arange(K)[:, None][8 * rank : 8 * (rank + 1)])
    torch.save([float(metric.compute()[metric.name]) for metric in metrics], f"{folder}/count-{rank}.pt")
    distributed.destroy_process_group()


def test_usage_is_counted_over_ranks(tmp_path):
    multiprocessing.start_processes(_count, (str(tmp_path / "store"), str(tmp_path)), nprocs=2, start_method="fork")
    for rank in (0, 1):
        assert torch.load(tmp_path / f"count-{rank}.pt") == pytest.approx([1, K])


def test_ste_value_equals_code_exactly():
    z, q = 1e6 * torch.randn(100), torch.randn(100)
    assert torch.equal(ste(z, q), q) and not torch.equal(z + (q - z), q)
