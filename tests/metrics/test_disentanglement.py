"""Disentanglement metrics: scores of perfect, rotated and uninformative codes, and values against slow loops."""

import math
import warnings
from collections import Counter
from datetime import timedelta

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.ensemble import RandomForestRegressor
from torch import distributed, multiprocessing
from torchmetrics import MetricCollection

from aezoo.data.shapes import Shapes
from aezoo.data.source import Options
from aezoo.errors import AezooError
from aezoo.metrics import DCI, IRS, MIG, SAP, UDR, FactorVAEScore, Modularity
from aezoo.metrics.disentanglement import train_test_rows

N, SIZES = 1500, (3, 6, 10, 8)
RNG = np.random.default_rng(0)
FACTORS = torch.from_numpy(np.stack([RNG.integers(size, size=N) for size in SIZES], 1))
PERFECT = ((FACTORS - FACTORS.double().mean(0)) / FACTORS.double().std(0)).float()
# an orthogonal matrix without a large entry: every dimension mixes all factors
MIXED = PERFECT @ (torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2.0)
NOISE = torch.from_numpy(RNG.normal(size=(N, 4))).float()
BLURRED = PERFECT + 0.5 * NOISE
METRICS = {
    "mig": MIG,
    "sap": SAP,
    "modularity": Modularity,
    "factor_vae": lambda: FactorVAEScore(votes=800),
    "irs": IRS,
    "disentanglement": DCI,
    "completeness": DCI,
    "informativeness": DCI,
}
# a rotation keeps all information, and votes of a rotated code may still distinguish factors
SAME_WHEN_MIXED = {"informativeness"}


def score(name, codes, factors=FACTORS):
    metric = METRICS[name]()
    metric.update(codes, factors)
    found = metric.compute()
    return float(found[name] if isinstance(found, dict) else found)


@pytest.mark.parametrize("name", METRICS)
def test_true_factors_score_one(name):
    assert 0.99 < score(name, PERFECT) <= 1


@pytest.mark.parametrize("name", METRICS)
def test_rotated_factors_score_lower(name):
    mixed = score(name, MIXED)
    assert (mixed > 0.8) if name in SAME_WHEN_MIXED else (mixed < 0.75)


@pytest.mark.parametrize("name", METRICS)
def test_uninformative_codes_score_at_chance(name):
    # a vote among 4 factors is right in 1/4 of cases; modularity compares the small information of a finite sample
    least, most = {"factor_vae": (0.2, 0.35), "modularity": (0.3, 0.9)}.get(name, (0, 0.07))
    assert least <= score(name, NOISE) < most


@pytest.mark.slow
@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("codes", [BLURRED, MIXED], ids=["blurred", "mixed"])
def test_score_is_invariant_to_permutation_and_affine_maps(name, codes):
    before = score(name, codes)
    # forests break ties by the order of dimensions; a change of sign moves the edges of bins and quantiles
    off = {"disentanglement": 0.03, "completeness": 0.03, "factor_vae": 0.03}.get(name, 0.01)
    assert score(name, codes[:, [2, 0, 3, 1]]) == pytest.approx(before, abs=off)
    assert score(name, -codes) == pytest.approx(before, abs=off)
    assert score(name, 16 * codes - 3) == pytest.approx(before, abs=off)
    if name != "irs":  # IRS weights dimensions by their deviation
        scales = torch.tensor([1, 1e-9, 10, 3])  # the values of the second dimension are less than 1e-7 apart
        assert score(name, codes * scales + torch.tensor([0, 0, 2, 3])) == pytest.approx(before, abs=off)


@pytest.mark.slow
@pytest.mark.parametrize("name", METRICS)
def test_metrics_ignore_order_of_samples_and_factors(name):
    before = score(name, BLURRED)
    order = torch.from_numpy(np.random.default_rng(1).permutation(N))
    # which samples are held out, and which votes are cast, depends on the order
    off = {"mig": 1e-6, "modularity": 1e-6, "sap": 1e-6, "irs": 1e-6}.get(name, 0.05)
    assert score(name, BLURRED[order], FACTORS[order]) == pytest.approx(before, abs=off)
    assert score(name, BLURRED, FACTORS[:, [3, 1, 0, 2]]) == pytest.approx(before, abs=off)
    metric = METRICS[name]()
    for rows in torch.arange(N).split(700):
        metric.update(BLURRED[rows], FACTORS[rows])
    found = metric.compute()
    assert float(found[name] if isinstance(found, dict) else found) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", METRICS)
def test_constant_dimensions_do_not_change_score(name):
    wider = torch.cat([torch.full((N, 1), 0.1), BLURRED, torch.zeros(N, 2)], 1)
    assert score(name, wider) == pytest.approx(score(name, BLURRED), abs=1e-6)
    assert score(name, torch.full((N, 3), 0.1)) == 0
    assert math.isfinite(score(name, BLURRED[:, :1])) and 0 <= score(name, BLURRED[:, :1]) <= 1


@pytest.mark.slow
def test_duplicated_factor_has_no_gap():
    twice = torch.cat([PERFECT, PERFECT], 1)
    assert score("mig", twice) < 1e-6 and score("sap", twice) < 1e-6
    # each dimension still encodes one factor, but each factor is spread over two dimensions
    assert score("modularity", twice) > 0.99 and score("disentanglement", twice) > 0.99
    assert score("completeness", twice) < 0.8


def test_single_dimension_is_complete_not_disentangled():
    one = (FACTORS[:, :1] * 1000 + FACTORS[:, 1:2] * 100 + FACTORS[:, 2:3] * 10 + FACTORS[:, 3:]).float()
    found = DCI()
    found.update(torch.cat([one, NOISE[:, :1]], 1), FACTORS)
    figures = {name: float(value) for name, value in found.compute().items()}
    assert figures["disentanglement"] < 0.3 < 0.6 < figures["completeness"]


# ---- against slow loops ---------------------------------------------------------------------------------------------


def information(a, b):
    """I(a; b) in nats, of two lists, by counting."""
    n, both, one, other = len(a), Counter(zip(a, b, strict=True)), Counter(a), Counter(b)
    return sum(k / n * math.log(k * n / (one[x] * other[y])) for (x, y), k in both.items())


def bins_of(z, bins):
    low, high = z.min(), z.max()
    return [min(int((value - low) / (high - low) * bins), bins - 1) for value in z]


def table(codes, bins=20):
    return [[information(bins_of(z, bins), v.tolist()) for v in FACTORS.numpy().T] for z in codes.double().numpy().T]


@pytest.mark.parametrize("bins", [20, 7])
def test_mig_and_modularity_match_counted_information(bins):
    known = table(BLURRED, bins)
    gaps = []
    for k in range(4):
        first, second = sorted((row[k] for row in known), reverse=True)[:2]
        gaps.append((first - second) / information(FACTORS[:, k].tolist(), FACTORS[:, k].tolist()))
    spread = [1 - sum(x * x for x in sorted(row)[:-1]) / (max(row) ** 2 * 3) for row in known]
    for metric, expected in ((MIG(bins), np.mean(gaps)), (Modularity(bins), np.mean(spread))):
        metric.update(BLURRED, FACTORS)
        assert float(metric.compute()) == pytest.approx(expected, abs=1e-4)


def test_sap_is_the_gap_of_squared_correlations():
    gaps = []
    for k in range(4):
        found = sorted(scipy.stats.pearsonr(BLURRED[:, d], FACTORS[:, k]).statistic ** 2 for d in range(4))
        gaps.append(found[-1] - found[-2])
    assert score("sap", BLURRED) == pytest.approx(np.mean(gaps), abs=1e-5)


def test_sap_of_two_classes_is_accuracy_gap():
    # dimension 0 separates the two classes by 4, dimension 1 is random
    y = torch.arange(3000)[:, None] % 2
    codes = torch.cat(
        [
            4.0 * y + 0.5 * torch.from_numpy(np.random.default_rng(2).normal(size=(3000, 1))),
            torch.rand(3000, 1, generator=torch.Generator().manual_seed(0)),
        ],
        1,
    )
    metric = SAP(categorical=(0,))
    metric.update(codes, y)
    assert float(metric.compute()) == pytest.approx(0.5, abs=0.06)
    # one of 200 samples is of the second class, and may be held out
    rare = torch.arange(200)[:, None] // 199
    for seed in range(6):
        metric = SAP(categorical=(0,), seed=seed)
        metric.update(codes[:200], rare)
        held = 199 in train_test_rows(200, seed)[1]
        assert float(metric.compute()) == 0 if held else float(metric.compute()) >= 0
    # for three unordered classes the other dimensions are right by chance in 1/3 of cases
    three = SAP(categorical=(0,))
    three.update(PERFECT, FACTORS[:, :1])
    assert float(three.compute()) == pytest.approx(2 / 3, abs=0.06)


@pytest.mark.slow
def test_dci_matches_random_forest_importances():
    # uneven: two dimensions share a factor, and two mix all
    codes = torch.cat([BLURRED, PERFECT[:, :1] + 0.5 * NOISE.flip(0)[:, :1], MIXED[:, :2]], 1)
    # standardised exactly as in the metric, since other rounding may move a value across a split
    z = codes.double().numpy()
    z = (z - z.mean(0)) / z.std(0)
    rows, held = train_test_rows(N, 0)
    r, shares = np.zeros((7, 4)), []
    for k in range(4):
        forest = RandomForestRegressor(20, max_features=None, min_samples_leaf=5, random_state=0)
        forest.fit(z[rows], FACTORS[rows, k])
        r[:, k] = forest.feature_importances_
        shares.append(forest.score(z[held], FACTORS[held, k]))
    of_codes = [1 - scipy.stats.entropy(row, base=4) for row in r]
    of_factors = [1 - scipy.stats.entropy(column, base=7) for column in r.T]
    expected = {
        "disentanglement": np.average(of_codes, weights=r.sum(1)),
        "completeness": np.average(of_factors, weights=r.sum(0)),
        "informativeness": np.mean(shares),
    }
    metric = DCI()
    metric.update(codes, FACTORS)
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(expected, abs=1e-5)
    assert abs(expected["disentanglement"] - expected["completeness"]) > 0.02
    assert abs(expected["disentanglement"] - np.mean(of_codes)) > 0.02
    assert sorted([*rows, *held]) == list(range(N)) and len(held) == N // 3


@pytest.mark.parametrize("quantile", [0.99, 1.0, 0.5])
def test_irs_matches_loop_over_factor_values(quantile):
    codes = MIXED.double().numpy()
    whole = [np.quantile(abs(z - z.mean()), quantile) for z in codes.T]
    robust = []
    for d in range(4):
        of_factors = []
        for k in range(4):
            farthest = []
            for value in range(SIZES[k]):
                group = codes[(FACTORS[:, k] == value).numpy(), d]
                farthest.append(np.quantile(abs(group - group.mean()), quantile))
            of_factors.append(1 - np.mean(farthest) / whole[d])
        robust.append(max(of_factors))
    metric = IRS(quantile)
    metric.update(MIXED, FACTORS)
    assert float(metric.compute()) == pytest.approx(np.average(robust, weights=whole), abs=1e-5)


@pytest.mark.slow
def test_factor_vae_score_matches_fixed_factor_sampling():
    """The paper's procedure, which draws samples with one fixed factor; the code mixes the factors of `shapes`."""
    source = Shapes(Options("shapes", size=8))
    sizes = np.array(source.factor_sizes)
    mix = np.random.default_rng(5).normal(size=(5, 4)) * np.array([[1], [1], [0.2], [0.2], [0.1]])
    rng = np.random.default_rng(1)

    def encode(factors):
        return (factors / sizes) @ mix

    spread = encode(rng.integers(sizes, size=(20_000, 5))).var(0)

    def votes(n):
        found = np.zeros((5, 4))
        for _ in range(n):
            k = rng.integers(5)
            factors = rng.integers(sizes, size=(64, 5))
            factors[:, k] = factors[0, k]
            found[k, (encode(factors).var(0) / spread).argmin()] += 1
        return found

    chosen, judged = votes(4000).argmax(0), votes(4000)
    expected = sum(judged[k, d] for d, k in enumerate(chosen)) / 4000
    factors = source.factors(torch.randint(len(source), (8000,), generator=torch.Generator().manual_seed(0)))
    metric = FactorVAEScore(votes=4000)
    metric.update(torch.from_numpy(encode(factors.numpy())), factors)
    assert 0.3 < expected < 0.9 and float(metric.compute()) == pytest.approx(expected, abs=0.03)


def test_factor_values_are_drawn_by_frequency():
    # dimension 0 is constant for one of four values of factor 0, dimension 1 for every value of factor 1
    factors = torch.randint(4, (4000, 2), generator=torch.Generator().manual_seed(0))
    noise = torch.from_numpy(np.random.default_rng(3).normal(size=4000))
    metric = FactorVAEScore(votes=2000)
    metric.update(torch.stack([noise * (factors[:, 0] > 0), factors[:, 1].double()], 1), factors)
    # correct votes: all of factor 1, and a quarter of factor 0, whose other votes go to dimension 1
    assert float(metric.compute()) == pytest.approx(0.625, abs=0.05)


# ---- UDR ------------------------------------------------------------------------------------------------------------


def udr(*codes, kl=None, **plain):
    metric = UDR(len(codes), **plain)
    metric.update(codes, kl)
    return metric.compute().tolist()


def test_equivalent_models_score_1_and_unrelated_0():
    same = (BLURRED, -BLURRED[:, [2, 0, 3, 1]], 9 * BLURRED + 1)
    agreed = udr(*same)
    assert agreed == pytest.approx([agreed[0]] * 3, abs=1e-6) and 0.85 < agreed[0] <= 1
    mixed = udr(BLURRED, MIXED, BLURRED @ torch.linalg.qr(NOISE[:4])[0])
    assert max(mixed) < 0.6
    assert max(udr(NOISE, torch.from_numpy(np.random.default_rng(4).normal(size=(N, 5))))) < 0.06
    # lasso shrinks by its alpha of 0.1
    assert udr(PERFECT, PERFECT.flip(1), correlation="lasso") == pytest.approx([0.9, 0.9], abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("correlation", ["spearman", "lasso"])
def test_udr_matches_loop_over_model_pairs(correlation):
    codes = [BLURRED, MIXED[:, :3], torch.cat([MIXED, NOISE[:, :2]], 1), PERFECT + 2 * NOISE.flip(1)]
    expected = []
    for j, one in enumerate(codes):
        scores = []
        for i, other in enumerate(codes):
            if i == j:
                continue
            r = np.zeros((other.shape[1], one.shape[1]))
            for b in range(one.shape[1]):
                if correlation == "spearman":
                    for a in range(other.shape[1]):
                        r[a, b] = abs(scipy.stats.spearmanr(other[:, a], one[:, b]).statistic)
                else:
                    r[:, b] = lasso(
                        scipy.stats.zscore(other.double().numpy()), scipy.stats.zscore(one[:, b].double().numpy())
                    )
            total = sum(r[:, b].max() ** 2 / r[:, b].sum() for b in range(r.shape[1]) if r[:, b].any())
            total += sum(r[a].max() ** 2 / r[a].sum() for a in range(r.shape[0]) if r[a].any())
            scores.append(total / sum(r.shape))
        expected.append(np.median(scores))
    assert udr(*codes, correlation=correlation) == pytest.approx(expected, abs=1e-3)


def lasso(x, y, alpha=0.1):
    """|w| of argmin 1/2N ||y - x w||^2 + alpha |w|_1, by coordinate descent."""
    w = np.zeros(x.shape[1])
    for _ in range(200):
        for d in range(len(w)):
            rho = x[:, d] @ (y - x @ w + x[:, d] * w[d]) / len(y)
            w[d] = np.sign(rho) * max(abs(rho) - alpha, 0) / (x[:, d] @ x[:, d] / len(y))
    return abs(w)


def test_udr_omits_constant_and_zero_kl_dimensions():
    plain = udr(BLURRED, MIXED)
    wide = torch.cat([BLURRED, NOISE[:, :2], torch.ones(N, 1)], 1)
    kl = torch.tensor([1.0, 1, 1, 1, 0.005, 0.0, 2]).expand(N, 7)
    assert udr(wide, MIXED, kl=[kl, torch.ones(N, 4)]) == pytest.approx(plain, abs=1e-6)
    assert udr(wide, MIXED) != pytest.approx(plain, abs=0.01)
    assert udr(wide, MIXED, kl=[0 * kl, torch.ones(N, 4)]) == [0, 0]


# ---- as metrics of torchmetrics -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_metric_collection_shares_samples_and_resets():
    together = MetricCollection([MIG(), IRS(), DCI(trees=3)])
    together.update(BLURRED, FACTORS)
    found = together.compute()
    assert set(found) == {"MIG", "IRS", "disentanglement", "completeness", "informativeness"}
    assert all(value.dtype == torch.float32 and value.ndim == 0 for value in found.values())
    together.reset()
    together.update(NOISE, FACTORS)
    assert float(together.compute()["MIG"]) < 0.05
    assert math.isclose(float(MIG()(BLURRED, FACTORS)), score("mig", BLURRED))


def _rank(rank, store, folder, n_first):
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    # torchmetrics warns of a missing update, on rank 0 alone if LOCAL_RANK is set
    warnings.filterwarnings("ignore", "The ``compute`` method of metric")
    rows = slice(0, n_first) if rank == 0 else slice(n_first, N)
    mig, ranking = MIG(), UDR(2)
    if rank == 0 or n_first < N:
        mig.update(BLURRED[rows], FACTORS[rows])
        ranking.update([BLURRED[rows], MIXED[rows]])
    torch.save([mig.compute(), ranking.compute(), len(mig.codes)], f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("n_first", [600, N], ids=["both", "one of them has no samples"])
def test_two_processes_compute_from_the_samples_of_both(tmp_path, n_first):
    arguments = str(tmp_path / "store"), str(tmp_path), n_first
    multiprocessing.start_processes(_rank, arguments, nprocs=2, start_method="fork")
    for rank in (0, 1):
        mig, ranking, kept = torch.load(tmp_path / f"{rank}.pt")
        assert float(mig) == pytest.approx(score("mig", BLURRED), abs=1e-6)
        assert ranking.tolist() == pytest.approx(udr(BLURRED, MIXED), abs=1e-5)
        assert kept == (rank == 0 or n_first < N)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "codes", "factors", "message"),
    [
        (MIG, PERFECT, FACTORS + 0.5, "whole numbers"),
        (MIG, PERFECT, FACTORS[:5], r"shape \(1500, F\)"),
        (MIG, PERFECT, FACTORS[:, 0], r"shape \(1500, F\)"),
        (MIG, PERFECT[:, 0], FACTORS, r"\(B, D\)"),
        (MIG, PERFECT / 0, FACTORS, "diverged"),
        (MIG, PERFECT.double() * 1e300, FACTORS, "diverged"),
        (IRS, PERFECT[:0], FACTORS[:0], "needs 20 samples of these factors, got 0"),
        (MIG, PERFECT[:19], FACTORS[:19], "needs 20 samples"),
        (Modularity, PERFECT[:19], FACTORS[:19], "needs 20 samples"),
        (SAP, PERFECT[:50], FACTORS[:50], "needs 100 samples"),
        (IRS, PERFECT[:50], FACTORS[:50], "needs 100 samples"),
        (MIG, PERFECT, torch.cat([FACTORS[:, :1], 0 * FACTORS[:, :1]], 1), "factor 1 has one value"),
        (DCI, PERFECT, FACTORS[:, :1], "needs 2 factors, got 1"),
        (Modularity, PERFECT, FACTORS[:, :1], "needs 2 factors, got 1"),
        (FactorVAEScore, PERFECT, FACTORS[:, :1], "needs 2 factors, got 1"),
        (lambda: SAP(categorical=(4,)), PERFECT, FACTORS, "must be columns 0 to 3"),
        (lambda: DCI(categorical=(-1,)), PERFECT, FACTORS, "must be columns 0 to 3"),
    ],
)
def test_invalid_inputs_are_refused_in_one_line(metric, codes, factors, message):
    def run(found):
        found.update(codes, factors)
        found.compute()

    with pytest.raises(AezooError, match=message) as caught:
        run(metric())
    assert "\n" not in str(caught.value)


def test_gap_metrics_accept_one_factor():
    for metric in (MIG(), SAP(), IRS()):
        metric.update(PERFECT, FACTORS[:, :1].float())
        assert float(metric.compute()) > (0.2 if isinstance(metric, IRS) else 0.98)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
@pytest.mark.parametrize("metric", [MIG, lambda: UDR(2)])
def test_empty_state_and_width_changes_are_refused(metric):
    with pytest.raises(AezooError, match="seen no codes"):
        metric().compute()
    mig = MIG()
    mig.update(PERFECT, FACTORS)
    with pytest.raises(AezooError, match="codes had 4 columns before, got 3"):
        mig.update(PERFECT[:, :3], FACTORS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MIG(bins=1), "bins"),
        (lambda: DCI(trees=0), "trees"),
        (lambda: IRS(quantile=0.0), "quantile"),
        (lambda: FactorVAEScore(votes=1), "votes"),
        (lambda: UDR(1), "models"),
        (lambda: UDR(2, "pearson"), "correlation"),
        (lambda: udr(PERFECT, PERFECT[:9]), "same samples"),
        (lambda: udr(PERFECT[:9], PERFECT[:9]), "10 samples"),
        (lambda: udr(PERFECT[:0], PERFECT[:0]), "10 samples"),
        (lambda: udr(PERFECT, PERFECT, kl=[PERFECT]), "compares 2 models"),
        (lambda: udr(PERFECT, PERFECT, kl=[PERFECT, PERFECT[:, :2]]), "shape of the codes"),
    ],
)
def test_invalid_metric_arguments_are_refused(make, message):
    with pytest.raises(AezooError, match=message):
        make()
