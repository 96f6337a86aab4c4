"""impute: closed-form conditional means, exactly preserved values, file formats, baselines."""

import csv

import numpy as np
import pytest
import torch
from sklearn.impute import KNNImputer
from torch import nn

import aezoo
from aezoo.cli.task_commands import read
from aezoo.errors import AezooError
from aezoo.tasks.impute import _hidden, impute
from aezoo.training.data_units import DataUnits

D, K = 7, 3
QUIET = {"baselines": False, "n_shown": 0}


def holes(x, share=0.3, seed=0):
    """The array with NaN in a share of the values, and at least one value in each sample."""
    x = np.array(x)
    lacks = np.random.default_rng(seed).random(x.shape) < share
    lacks.reshape(len(x), -1)[:, 0] &= ~lacks.reshape(len(x), -1).all(1)
    x[lacks] = np.nan
    return x


class Gaussian:
    """x = W z + m + s eps, and models with known W, m and s."""

    def __init__(self, noise):
        rng = np.random.default_rng(1)
        vectors = np.linalg.qr(rng.normal(0, 1, (D, K)))[0]
        self.w, self.m, self.s2 = vectors * [2.0, 1.5, 1.0], rng.normal(0, 1, D), noise**2
        self.x = rng.normal(0, 1, (200, K)) @ self.w.T + self.m + noise * rng.normal(0, 1, (200, D))

    def linear_ae(self):
        """The projection onto the columns of W."""
        model = aezoo.create_model("linear_ae", (D,), latent_dim=K)
        vectors = torch.from_numpy(self.w / np.linalg.norm(self.w, axis=0)).float()
        linear = [m for net in (model.encoder, model.decoder) for m in net.modules() if isinstance(m, nn.Linear)]
        with torch.no_grad():
            linear[0].weight.copy_(vectors.T)
            linear[0].bias.copy_(-vectors.T @ torch.from_numpy(self.m).float())
            linear[1].weight.copy_(vectors)
            linear[1].bias.copy_(torch.from_numpy(self.m))
        return model

    def vae(self, spread=1.0, name="vae"):
        """Probabilistic PCA, with standard deviations of the posterior multiplied by `spread`."""
        model = aezoo.create_model(name, (D,), latent_dim=K, hidden_dims=(), likelihood=f"gaussian:{self.s2**0.5!r}")
        down, up = (
            next(m for m in net.modules() if isinstance(m, nn.Linear)) for net in (model.encoder, model.decoder)
        )
        precision = (self.w**2).sum(0) + self.s2
        to_z = self.w.T / precision[:, None]
        log_var = np.log(spread**2 * self.s2 / precision)
        with torch.no_grad():
            up.weight.copy_(torch.from_numpy(self.w))
            up.bias.copy_(torch.from_numpy(self.m))
            down.weight.zero_()
            down.weight[:K].copy_(torch.from_numpy(to_z))
            down.bias.copy_(torch.from_numpy(np.concatenate([-to_z @ self.m, log_var])))
        return model

    def conditional_means(self, x):
        """E[x_missing | x_observed] of N(m, W W' + s^2 I), for each sample."""
        found, covariance = np.array(x, np.float64), self.w @ self.w.T + self.s2 * np.eye(D)
        for row in found:
            lacks, has = np.isnan(row), ~np.isnan(row)
            gain = np.linalg.solve(covariance[np.ix_(has, has)], covariance[np.ix_(has, lacks)]).T
            row[lacks] = self.m[lacks] + gain @ (row[has] - self.m[has])
        return found


def test_fixed_point_of_pca_is_least_squares():
    data = Gaussian(0.3)
    x = holes(data.x, 0.3).astype(np.float32)
    x = x[(~np.isnan(x)).sum(1) > K]
    expected = np.array(x, np.float64)
    for row in expected:
        has = ~np.isnan(row)
        z = np.linalg.lstsq(data.w[has], row[has] - data.m[has], rcond=None)[0]
        row[~has] = (data.m + data.w @ z)[~has]
    found = impute(data.linear_ae(), x, steps=2000, **QUIET)
    near = found.change < 1e-5  # convergence is slow where the observed values hardly determine the code
    assert near.mean() > 0.9
    np.testing.assert_allclose(found.x_hat[near], expected[near], atol=2e-3)


@pytest.mark.parametrize("name", ["vae", "iwae", "miwae"])
def test_fixed_point_of_linear_vae_is_conditional_mean(name):
    data = Gaussian(0.8)
    x = holes(data.x).astype(np.float32)
    found = impute(data.vae(name=name), x, steps=500, **QUIET)
    assert found.change.max() < 1e-4
    np.testing.assert_allclose(found.x_hat, data.conditional_means(x), atol=1e-3)


def test_importance_sampling_corrects_another_proposal():
    data = Gaussian(0.8)
    x = holes(data.x[:40], 0.5).astype(np.float32)
    expected = data.conditional_means(x)
    # one step is far from the fixed point, and the proposal is wider than the posterior
    near, far = (impute(data.vae(1.5), x, steps=1, draws=draws, **QUIET) for draws in (800, 0))
    lacks = np.isnan(x)
    error, before = (np.abs(found.x_hat - expected)[lacks] for found in (near, far))
    assert np.sqrt((error**2).mean()) < 0.07 < 3 * 0.07 < np.sqrt((before**2).mean())
    assert 50 < np.median(near.effective_draws) < 700


def test_exact_proposal_gives_equal_weights():
    data = Gaussian(0.8)
    data.w[-1] = 0  # the last value does not depend on the code
    data.w[:-1] = np.linalg.qr(data.w[:-1])[0] * [2.0, 1.5, 1.0]
    x = data.x.astype(np.float32)
    x[:, -1] = np.nan
    found = impute(data.vae(), x, draws=20, **QUIET)
    np.testing.assert_allclose(found.effective_draws, 20, rtol=1e-3)
    # 1 / integral of p^2 / q for a Gaussian p, and q with 1.5 times its deviation in K dimensions
    expected = 400 * (np.sqrt(2 * 1.5**2 - 1) / 1.5**2) ** K
    wide = impute(data.vae(1.5), x, draws=400, **QUIET).effective_draws
    assert wide.mean() == pytest.approx(expected, rel=0.03)


def test_mean_of_training_samples_is_the_start():
    model = aezoo.create_model("dense_ae", (D,), latent_dim=2).eval()
    x = holes(Gaussian(0.5).x).astype(np.float32)
    train = np.random.default_rng(5).random((50, D)).astype(np.float32)
    started = torch.from_numpy(np.where(np.isnan(x), train.mean(0), x))
    with torch.no_grad():
        expected = np.where(np.isnan(x), model(started).numpy(), x)
    np.testing.assert_allclose(impute(model, x, fit_on=train, steps=1, **QUIET).x_hat, expected, atol=1e-6)


def test_given_values_stay_bit_for_bit_and_batches_do_not_matter():
    model = aezoo.create_model("vae", (1, 8, 8), latent_dim=2, hidden_dims=(8,))
    x = holes(np.random.default_rng(0).random((23, 1, 8, 8), np.float32))
    found = impute(model, x, **QUIET)
    given = ~np.isnan(x)
    assert found.x_hat.dtype == np.float32 and (found.x_hat[given] == x[given]).all()
    assert np.isfinite(found.x_hat).all() and (found.n_missing == (~given).sum((1, 2, 3))).all()
    for size in (1, 7):
        assert np.allclose(impute(model, x, batch_size=size, **QUIET).x_hat, found.x_hat, atol=1e-5)
    assert (impute(model.to(torch.bfloat16), x, **QUIET).x_hat[given] == x[given]).all()


def test_mask_hides_what_is_there():
    model = aezoo.create_model("dense_ae", (2, 5, 5), latent_dim=2)
    x = np.random.default_rng(0).random((6, 2, 5, 5), np.float32)
    lacks = np.isnan(holes(x))
    lacking = np.where(lacks, np.nan, x)
    expected = impute(model, lacking, fit_on=x, **QUIET).x_hat
    marked = np.where(lacks, -999, x)  # outside of the range of the likelihood
    assert (impute(model, marked, mask=lacks, fit_on=x, **QUIET).x_hat == expected).all()
    # a mask of one channel applies to all
    half = np.zeros((1, 1, 5, 5), bool)
    half[..., 2:] = True
    lacking = np.where(half, np.nan, x)
    expected = impute(model, lacking, fit_on=x, **QUIET).x_hat
    assert (impute(model, x, mask=half, fit_on=x, **QUIET).x_hat == expected).all()
    assert (impute(model, lacking, mask=half, fit_on=x, **QUIET).x_hat == expected).all()


# ---- the comparison --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_hidden_values_are_compared_with_baselines():
    data = Gaussian(0.3)
    x, train = data.x[:60].astype(np.float32), data.x[60:].astype(np.float32)
    found = impute(data.linear_ae(), x, fit_on=train, hide=0.2, n_shown=0)
    rows = {row["method"]: row for row in found.rows}
    assert list(rows) == ["linear_ae", "mean", "knn", "regressions"]
    assert rows["linear_ae"]["rmse"] < 0.5 * rows["mean"]["rmse"]
    assert "least error: linear_ae" in found.summary() or "least error: regressions" in found.summary()
    # a model that returns the mean is as good as the mean, and one that returns a constant has its error
    model = data.linear_ae()
    with torch.no_grad():
        model.decoder[0].weight.zero_()
        model.decoder[0].bias.copy_(torch.from_numpy(train.mean(0)))
    same = impute(model, x, fit_on=train, hide=0.2, n_shown=0)
    assert same.rows[0]["rmse"] == pytest.approx(rows["mean"]["rmse"], rel=1e-5)
    assert same.rows[0]["mae"] == pytest.approx(rows["mean"]["mae"], rel=1e-5)
    # every value but one of each sample is hidden
    most = impute(model, x, fit_on=train, hide=0.999, n_shown=0).rows
    assert most[1]["rmse"] == pytest.approx(np.sqrt(np.mean((x - train.mean(0)) ** 2)), rel=0.1)


def test_baselines_do_not_see_what_is_hidden():
    x = np.random.default_rng(0).normal(0, 1, (60, D)).astype(np.float32)
    rows = {row["method"]: row for row in impute(Gaussian(0.3).linear_ae(), x, hide=0.3, n_shown=0).rows}
    # for independent values nothing is better than the mean, and five neighbours add a fifth of the variance
    assert rows["knn"]["rmse"] > rows["mean"]["rmse"]
    assert rows["mean"]["rmse"] == pytest.approx(1, abs=0.15)


def test_hiding_changes_nothing_of_the_result(tmp_path):
    data = Gaussian(0.3)
    x = holes(data.x[:30]).astype(np.float32)
    plain = impute(data.vae(), x, fit_on=data.x, **QUIET)
    hidden = impute(data.vae(), x, fit_on=data.x, hide=0.3, out=str(tmp_path), **QUIET)
    assert (plain.x_hat == hidden.x_hat).all() and (plain.n_missing == hidden.n_missing).all()
    assert [path.name for path in hidden.files] == ["impute.csv", "imputed.npy", "samples.csv"]
    again = impute(data.vae(), x, fit_on=data.x, hide=0.3, batch_size=7, **QUIET)
    assert again.rows[0]["rmse"] == pytest.approx(hidden.rows[0]["rmse"], rel=1e-5)
    other = impute(data.vae(), x, fit_on=data.x, hide=0.3, seed=1, **QUIET)
    assert other.rows[0]["rmse"] != pytest.approx(hidden.rows[0]["rmse"], rel=1e-5)


@pytest.mark.slow
def test_trained_model_beats_the_mean():
    rng = np.random.default_rng(0)
    x = np.sin(rng.uniform(0, 6, (600, 1)) + np.arange(8) / 2).astype(np.float32)
    torch.manual_seed(0)
    model = aezoo.create_model("dense_ae", (8,), latent_dim=2, hidden_dims=(32,), likelihood="gaussian")
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        optimiser.zero_grad()
        model.loss(torch.from_numpy(x[:500]))["loss"].backward()
        optimiser.step()
    rows = {row["method"]: row["rmse"] for row in impute(model, x[500:], fit_on=x[:500], hide=0.3, n_shown=0).rows}
    assert rows["dense_ae"] < 0.6 * rows["mean"]


# ---- files -----------------------------------------------------------------------------------------------------------

NAMES = ("age", "height", "weight")


@pytest.fixture(scope="module")
def table_model():
    torch.manual_seed(0)
    model = aezoo.create_model("dense_ae", (3,), latent_dim=2, likelihood="gaussian").eval()
    scaling = {"offset": torch.tensor([40.0, 1.7, 70.0]).double(), "factor": torch.tensor([10.0, 0.1, 12.0]).double()}
    model.data_units = DataUnits(scaling, columns=NAMES, is_table=True)
    return model


def completed(model, path, **settings):
    """The files that impute writes for a file, by name."""
    out = path.parent / "out"
    samples = read(str(path), model.data_units, {"missing": "keep"})
    found = impute(model, samples, out=str(out), n_shown=0, **settings)
    return found, out


def test_csv_keeps_its_text_but_empty_cells(table_model, tmp_path):
    text = 'age;label;height;weight\n 41.50;yes;;70.000\n;no;1.7300000000000002;1e1\n30;"a;b";1.5;60\n'
    (tmp_path / "x.csv").write_text(text)
    found, out = completed(table_model, tmp_path / "x.csv")
    given, written = (
        list(csv.reader(part.splitlines(), delimiter=";")) for part in (text, (out / "imputed.csv").read_text())
    )
    filled = {(1, 2), (2, 0)}
    for i, (before, after) in enumerate(zip(given, written, strict=True)):
        assert len(before) == len(after)
        assert all(b == a for j, (b, a) in enumerate(zip(before, after, strict=True)) if (i, j) not in filled)
    values = found.x_hat * [10, 0.1, 12] + [40, 1.7, 70]
    assert float(written[1][2]) == pytest.approx(values[0, 1], rel=1e-5)
    assert float(written[2][0]) == pytest.approx(values[1, 0], rel=1e-5)
    with (out / "samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["n_missing"] for row in rows] == ["1", "1", "0"] and [row["label"] for row in rows] == [
        "yes",
        "no",
        "a;b",
    ]


def test_parquet_keeps_other_columns_and_values(table_model, tmp_path):
    import pandas

    frame = pandas.DataFrame({"age": [41, None, 30], "height": [1.7, np.nan, 0.1 + 0.2], "weight": [70.0, 71.0, 72.0]})
    frame.insert(1, "label", ["a", "b", "a"])
    frame.to_parquet(tmp_path / "x.parquet", index=False)
    found, out = completed(table_model, tmp_path / "x.parquet")
    written = pandas.read_parquet(out / "imputed.parquet")
    assert list(written) == list(frame) and list(written["label"]) == ["a", "b", "a"]
    given = frame[[*NAMES]].to_numpy(float)
    assert (written[[*NAMES]].to_numpy()[~np.isnan(given)] == given[~np.isnan(given)]).all()
    expected = found.x_hat[1, :2] * [10, 0.1] + [40, 1.7]
    np.testing.assert_allclose(written[["age", "height"]].to_numpy()[1], expected, rtol=1e-5)


def test_parquet_is_completed_in_parts(table_model, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("aezoo.tasks.impute_files._MAX_VALUES", 6)  # two rows
    age, height = [41, 35, 30, None, 52], [1.7, 1.6, None, 1.8, 1.75]
    table = pa.table({"age": age, "label": ["a", "b", "a", "b", "c"], "height": height, "weight": [70, 71, 72, 73, 74]})
    # groups of rows that do not end with the parts
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=3)
    found, out = completed(table_model, tmp_path / "x.parquet")
    written = pq.read_table(out / "imputed.parquet")
    assert [str(kind) for kind in written.schema.types] == ["double", "string", "double", "int64"]
    assert [written[name].to_pylist() for name in ("label", "weight")] == [
        table[name].to_pylist() for name in ("label", "weight")
    ]
    given = [41, 35, 30, pytest.approx(found.x_hat[3, 0] * 10 + 40, rel=1e-5), 52]
    assert written["age"].to_pylist() == given
    assert written["height"].to_pylist() == [
        *height[:2],
        pytest.approx(found.x_hat[2, 1] * 0.1 + 1.7, rel=1e-5),
        *height[3:],
    ]


def test_frame_comes_back_in_its_units(table_model, tmp_path):
    import pandas

    x = np.random.default_rng(0).normal([40, 1.7, 70], [10, 0.1, 12], (9, 3))
    frame = pandas.DataFrame(holes(x), columns=NAMES)
    found = impute(table_model, frame, out=str(tmp_path), n_shown=2)
    # read_csv of pandas before 3.1 rounds floats
    written = pandas.read_csv(tmp_path / "imputed.csv", dtype=str).astype(float)
    given = frame.notna().to_numpy()
    assert list(written) == [*NAMES] and (written.to_numpy()[given] == frame.to_numpy()[given]).all()
    np.testing.assert_allclose(written, found.x_hat * [10, 0.1, 12] + [40, 1.7, 70], rtol=1e-5)
    assert list(found.table)[:3] == ["index", "n_missing", "change"] and found.figure.axes


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f8"])
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_arrays_keep_dtype_axes_and_values(tmp_path, kind, dtype):
    model = aezoo.create_model("dense_ae", (3, 6, 5), latent_dim=2, likelihood="gaussian").eval()
    scaling = {"offset": torch.tensor(100.0).double(), "factor": torch.tensor(7.0).double()}
    model.data_units = DataUnits(scaling)
    x = holes(np.random.default_rng(0).normal(100, 7, (8, 6, 5, 3))).astype(dtype)  # channels last
    y = np.array(list("abcabcab"))
    np.save(tmp_path / "x.npy", x) if kind == "npy" else np.savez(tmp_path / "x.npz", x=x, y=y)
    found, out = completed(model, tmp_path / f"x.{kind}")
    written = np.load(out / f"imputed.{kind}")
    if kind == "npz":
        assert set(written.files) == {"x", "y"} and (written["y"] == y).all()
        written = written["x"]
    given = ~np.isnan(x)
    assert written.dtype == x.dtype and written.shape == x.shape and (written[given] == x[given]).all()
    assert np.allclose(written, np.moveaxis(found.x_hat, 1, -1) * 7 + 100, rtol=1e-3 if dtype == np.float16 else 1e-5)


def test_bytes_come_back_as_bytes(tmp_path):
    model = aezoo.create_model("dense_ae", (1, 4, 4), latent_dim=2).eval()
    x = np.random.default_rng(0).integers(0, 256, (5, 4, 4), np.uint8)
    mask = np.zeros((1, 4, 4), bool)
    mask[:, 2:] = True
    np.save(tmp_path / "x.npy", x)
    found, out = completed(model, tmp_path / "x.npy", mask=mask)
    written = np.load(out / "imputed.npy")
    assert written.dtype == np.uint8 and written.shape == x.shape and (written[:, :2] == x[:, :2]).all()
    assert (written == np.rint(found.x_hat[:, 0] * 255)).all()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(9,), (2, 16), (3, 9, 7), (1, 4, 8, 8)], ids=str)
def test_every_kind_of_sample_is_completed_and_drawn(tmp_path, shape):
    model = aezoo.create_model("dense_ae", shape, latent_dim=3)
    x = holes(torch.rand(5, *shape, generator=torch.Generator().manual_seed(0)).numpy())
    for hide in (0.0, 0.4):
        found = impute(model, x, hide=hide, n_shown=3, out=str(tmp_path), batch_size=2, n_compared=4)
        assert [path.name for path in found.files][-3:] == ["imputed.npy", "samples.csv", "imputed.png"]
        assert np.load(tmp_path / "imputed.npy").shape == (5, *shape) and np.isfinite(found.x_hat).all()


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"^x has no missing value: give samples with NaN or empty cells, a mask, or a share to hide"),
        ({"hide": 1.0}, "hide must be a share from 0 up to, but not including, 1"),
        ({"hide": 1e-9}, "hide is 1e-09, which hides none of the 14 values"),
        ({"steps": 0}, "steps must be from 1 to"),
        ({"draws": 2}, "draws need a model with a Gaussian posterior and prior, such as vae, not linear_ae"),
        ({"n_compared": 0}, "n_compared"),
        ({"table": "xlsx"}, "table is 'xlsx'"),
        (
            {"mask": np.ones((3, D), bool)},
            r"the mask x has 3 rows of shape \(7,\), but there are 2 samples of shape \(7,\)",
        ),
        ({"mask": np.ones((1, D), bool)}, "sample 0 has no value that is not missing: leave it out"),
    ],
)
def test_bad_values_are_refused_in_one_line(options, message):
    data = Gaussian(0.3)
    with pytest.raises(AezooError, match=message) as refused:
        impute(data.linear_ae(), data.x[:2].astype(np.float32), **options)
    assert "\n" not in str(refused.value)


def test_values_that_leave_all_bounds_are_refused():
    data = Gaussian(0.3)
    model, x = data.linear_ae(), holes(data.x[:4]).astype(np.float32)
    with torch.no_grad():
        model.decoder[0].weight.mul_(1e4)
    with pytest.raises(AezooError, match="are not finite after 20 steps: use fewer --steps"):
        impute(model, x, **QUIET)
    x[0, 0] = np.inf
    with pytest.raises(AezooError, match="infinity"):
        impute(data.linear_ae(), x, **QUIET)


def test_other_commands_refuse_nan_and_name_impute():
    model, x = Gaussian(0.3).linear_ae(), np.full((2, D), np.nan, np.float32)
    with pytest.raises(AezooError, match="aezoo impute fills them with a trained model"):
        aezoo.reconstruct(model, x)
    with pytest.raises(AezooError, match="aezoo impute fills missing values"):
        model.check_batch(torch.from_numpy(x))


def test_column_without_any_value_is_filled():
    data = Gaussian(0.8)
    x = data.x.astype(np.float32)
    x[:, 2] = np.nan
    found = impute(data.vae(), x, steps=300, **QUIET)
    np.testing.assert_allclose(found.x_hat, data.conditional_means(x), atol=1e-3)


def test_knn_is_that_of_scikit_learn():
    data = Gaussian(0.3)
    x, train = data.x[:20].astype(np.float32), data.x[20:].astype(np.float32)
    found = impute(data.linear_ae(), x, fit_on=train, hide=0.2, n_shown=0)
    given = _hidden(torch.from_numpy(x), range(20), 0.2, 0).numpy()
    lacks = np.isnan(given)
    error = (KNNImputer().fit(train).transform(given) - x)[lacks]
    assert found.rows[2]["rmse"] == pytest.approx(np.sqrt((error.astype(float) ** 2).mean()), rel=1e-5)
    assert 0.1 < lacks.mean() < 0.3 and not lacks.all(1).any()
