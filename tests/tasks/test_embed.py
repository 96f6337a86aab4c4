"""embed: codes, plane, accuracies and neighbours match scikit-learn's."""

import csv

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import aezoo
from aezoo.data.source import ArrayDataset
from aezoo.errors import AezooError
from aezoo.tasks import embed_codes
from aezoo.tasks.embed import Embedding, embed
from aezoo.tasks.embed_codes import choose_rows, nearest_codes, probe_accuracies, project_to_plane
from aezoo.tasks.samples import SampleSet


@pytest.fixture(scope="module")
def digits():
    return aezoo.DataModule("digits")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return aezoo.create_model("dense_ae", (1, 8, 8), latent_dim=5).eval()


def encoded(model, x):
    with torch.no_grad():
        return model.eval().encode(x).flatten(1).numpy()


def lines(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_npz_codes_load_as_training_data(tmp_path):
    model = aezoo.create_model("dense_ae", (1, 8, 8), latent_dim=3)
    data = aezoo.DataModule("digits")
    found = embed(model, data, table="npz", n_shown=0, out=str(tmp_path))
    assert tmp_path / "codes.npz" in found.files
    again = aezoo.DataModule(str(tmp_path / "codes.npz"), scale="none", val_fraction=0, test_fraction=0)
    x, y = again.tensors("train")
    assert np.array_equal(x.numpy(), found.codes) and torch.equal(y, data.tensors("test")[1])


@pytest.mark.parametrize(
    ("labels", "kept"), [([7, 3, 7, 3], [7, 3, 7, 3]), ([7, 3, -1, 3], [7, 3, -1, 3]), (list("baba"), list("baba"))]
)
def test_npz_labels_match_data(tmp_path, labels, kept):
    model = aezoo.create_model("dense_ae", (5,), latent_dim=3)
    data = aezoo.DataModule.from_arrays(
        np.random.default_rng(0).random((4, 5)), labels, val_fraction=0, test_fraction=0
    )
    embed(model, SampleSet.from_data(data, "train"), table="npz", n_shown=0, out=str(tmp_path))
    with np.load(tmp_path / "codes.npz") as file:
        assert file["y"].tolist() == kept


@pytest.mark.slow
def test_embedded_codes_match_model_encode(tmp_path, model, digits):
    x, y = digits.tensors("test")
    found = embed(model, digits, out=str(tmp_path), batch_size=7)
    assert np.allclose(found.codes, encoded(model, x), atol=1e-6)
    assert np.array_equal(np.load(tmp_path / "codes.npy"), found.codes)
    table = embed(model, digits, table="csv", out=str(tmp_path / "csv"))
    read = np.array([[float(row[f"z{d}"]) for d in range(5)] for row in lines(tmp_path / "csv" / "codes.csv")])
    assert np.array_equal(read.astype(np.float32), table.codes)
    assert [int(row["label"]) for row in lines(tmp_path / "csv" / "codes.csv")] == y.tolist()


@pytest.mark.slow
def test_probe_accuracies_match_scikit_learn(tmp_path, model, digits):
    (x_train, y_train), (x, y) = (tuple(part.numpy() for part in digits.tensors(stage)) for stage in ("train", "test"))
    found = embed(model, digits, fit_on=digits, out=str(tmp_path))
    raw_train, raw = x_train.reshape(len(x_train), -1), x.reshape(len(x), -1)
    pca = PCA(5, random_state=0).fit(raw_train)
    sets = [
        (encoded(model, torch.from_numpy(x_train)), encoded(model, torch.from_numpy(x))),
        (raw_train, raw),
        (pca.transform(raw_train), pca.transform(raw)),
    ]
    for row, (a, b) in zip(found.accuracies, sets, strict=True):
        scaler = StandardScaler().fit(a.astype(np.float64))
        probe = LogisticRegression(max_iter=1000).fit(scaler.transform(a.astype(np.float64)), y_train)
        assert row["probe"] == pytest.approx((probe.predict(scaler.transform(b.astype(np.float64))) == y).mean())
        assert row["knn"] == pytest.approx((KNeighborsClassifier(5).fit(a, y_train).predict(b) == y).mean())
        assert row["size"] == a.shape[1]
    assert [row["features"] for row in lines(tmp_path / "accuracies.csv")] == ["codes", "raw values", "pca"]
    assert "raw values" in found.summary()


@pytest.mark.slow
def test_interrupted_embed_keeps_earlier_results(tmp_path, model, digits, monkeypatch):
    def there():
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def stopped(*_):
        raise KeyboardInterrupt

    embed(model, digits, fit_on=digits, out=str(tmp_path))
    before = there()
    monkeypatch.setattr("aezoo.tasks.embed.probe_accuracies", stopped)
    x, y = digits.tensors("test")
    with pytest.raises(KeyboardInterrupt):
        embed(model, SampleSet(ArrayDataset(x[:50], y[:50])), fit_on=digits, out=str(tmp_path))
    assert there() == before


def test_neighbours_do_not_depend_on_parts_of_the_library(monkeypatch):
    rng = np.random.default_rng(0)
    library, codes = rng.normal(size=(53, 3)).astype(np.float32), rng.normal(size=(20, 3)).astype(np.float32)
    whole = nearest_codes(library, codes, 5)
    exact = np.linalg.norm(codes[:, None].astype(np.float64) - library[None], axis=2)
    assert (whole[0] == np.argsort(exact, axis=1, kind="stable")[:, :5]).all()
    monkeypatch.setattr(embed_codes, "_LIBRARY", 3)
    assert all(np.array_equal(a, b) for a, b in zip(whole, nearest_codes(library, codes, 5), strict=True))


def test_linear_probe_needs_linear_separability_and_knn_does_not():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(400, 1)), rng.normal(size=(200, 1))
    assert probe_accuracies(a, a[:, 0] > 0, b, b[:, 0] > 0)["probe"] > 0.97
    # one class around the other: not linearly separable, unlike by neighbours
    assert probe_accuracies(a, np.abs(a[:, 0]) > 1, b, np.abs(b[:, 0]) > 1)["probe"] < 0.75
    assert probe_accuracies(a, np.abs(a[:, 0]) > 1, b, np.abs(b[:, 0]) > 1)["knn"] > 0.97


@pytest.mark.slow
def test_labels_are_compared_by_class_name(model, digits):
    x, y = digits.tensors("test")
    few = (y == 3) | (y == 5)
    names = SampleSet(ArrayDataset(x[few], (y[few] == 5).long()), class_names=("3", "5"))
    by_name = embed(model, names, fit_on=digits).accuracies
    assert by_name == embed(model, SampleSet(ArrayDataset(x[few], y[few])), fit_on=digits).accuracies
    assert by_name[1]["knn"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("names", [tuple("0123456789"), tuple("9876543210")], ids=["same", "other numbering"])
def test_samples_without_a_label_are_left_out_of_the_accuracies(model, digits, names, monkeypatch):
    x, y = digits.tensors("test")
    y = y if names[0] == "0" else 9 - y
    labelled = torch.arange(len(y)) % 4 == 1
    some = SampleSet(ArrayDataset(x, torch.where(labelled, y, -1)), class_names=names)
    few = SampleSet(ArrayDataset(x[labelled], y[labelled]), class_names=names)
    found = embed(model, some, fit_on=digits)
    assert len(found.codes) == len(y) and found.accuracies == embed(model, few, fit_on=digits).accuracies
    # also in training, and however few they are
    monkeypatch.setattr("aezoo.tasks.embed._MAX_PROBE_SAMPLES", 30)
    x_train, y_train = digits.tensors("train")
    rows = torch.arange(0, len(y_train), 50)
    sparse = torch.full_like(y_train, -1).index_copy(0, rows, y_train[rows])
    partly, wholly = (ArrayDataset(x_train, sparse), ArrayDataset(x_train[rows], y_train[rows]))
    expected = embed(model, digits, fit_on=SampleSet(wholly)).accuracies
    assert embed(model, digits, fit_on=SampleSet(partly)).accuracies == expected
    none = SampleSet(ArrayDataset(x, torch.full_like(y, -1)), class_names=names)
    assert embed(model, none, fit_on=digits).accuracies == []


@pytest.mark.slow
def test_unseen_class_counts_as_misclassified(model, digits):
    x, y = digits.tensors("test")
    half = SampleSet(ArrayDataset(x, y % 2), class_names=("3", "hare"))
    only = SampleSet(ArrayDataset(x[y % 2 == 0], y[y % 2 == 0] % 2), class_names=("3", "hare"))
    share, alone = (embed(model, samples, fit_on=digits).accuracies[1]["knn"] for samples in (half, only))
    assert share == pytest.approx(alone * len(only) / len(half))


@pytest.mark.slow
def test_plane_matches_pca_up_to_sign(tmp_path, model, digits):
    found = embed(model, digits, out=str(tmp_path))
    reference = PCA(2).fit_transform(np.asarray(found.codes, np.float64))
    for ours, theirs in zip(found.plane.T, reference.T, strict=True):
        assert min(np.abs(ours - theirs).max(), np.abs(ours + theirs).max()) < 1e-6
    table = lines(tmp_path / "plane.csv")
    assert np.allclose([[float(row["u"]), float(row["v"])] for row in table], found.plane)
    assert (tmp_path / "plane.png").stat().st_size > 1000


@pytest.mark.parametrize("size", [3, 40], ids=["few dimensions", "many dimensions"])
def test_training_sample_is_its_own_nearest_neighbour(size):
    torch.manual_seed(1)
    model = aezoo.create_model("dense_ae", (64,), latent_dim=size)
    x = torch.rand(300, 64) + 5
    found = embed(model, x, fit_on=x, nearest=3)
    assert found.neighbours[:, 0].tolist() == list(range(300)) and (found.distances[:, 0] == 0).all()
    codes = found.codes.astype(np.float64)
    every = np.linalg.norm(codes[:, None] - codes[None], axis=2)
    assert np.array_equal(found.neighbours, np.argsort(every, axis=1, kind="stable")[:, :3])
    assert np.allclose(found.distances, np.sort(every, axis=1)[:, :3], atol=1e-12)


@pytest.mark.slow
def test_neighbours_come_from_the_training_samples(tmp_path, model, digits):
    x, _ = digits.tensors("test")
    x_train, y_train = digits.tensors("train")
    found = embed(model, digits, fit_on=digits, nearest=2, out=str(tmp_path))
    every = np.linalg.norm(encoded(model, x)[:, None].astype(float) - encoded(model, x_train)[None], axis=2)
    assert np.array_equal(found.neighbours, np.argsort(every, axis=1, kind="stable")[:, :2])
    table = lines(tmp_path / "neighbours.csv")
    assert len(table) == 2 * len(x) and [int(row["rank"]) for row in table[:4]] == [1, 2, 1, 2]
    assert [int(row["label"]) for row in table] == y_train[found.neighbours.flatten()].tolist()
    assert (tmp_path / "neighbours.png").stat().st_size > 1000


def test_nearest_codes_match_brute_force_over_several_chunks():
    library, queries = np.random.default_rng(0).normal(size=(50, 4)), np.random.default_rng(1).normal(size=(1500, 4))
    every = np.linalg.norm(queries[:, None] - library[None], axis=2)
    found, distances = nearest_codes(library, queries, 4)
    assert np.array_equal(found, np.argsort(every, axis=1)[:, :4])
    assert np.allclose(distances, np.sort(every, axis=1)[:, :4])


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4, 60])
def test_tsne_separates_groups_reproducibly(size):
    rng = np.random.default_rng(0)
    codes = np.concatenate([rng.normal(0, 1, (40, size)), rng.normal(30, 1, (40, size))])
    plane = project_to_plane(codes, "tsne", seed=0)
    groups = np.repeat([0, 1], 40)
    assert KNeighborsClassifier(5).fit(plane, groups).score(plane, groups) == 1
    assert np.array_equal(plane, project_to_plane(codes, "tsne", seed=0))


@pytest.mark.slow  # umap compiles itself for half a minute
@pytest.mark.parametrize("size", [1, 4, 60])
def test_umap_separates_groups_reproducibly(size):
    rng = np.random.default_rng(0)
    codes = np.concatenate([rng.normal(0, 1, (40, size)), rng.normal(30, 1, (40, size))])
    plane = project_to_plane(codes, "umap", seed=0)
    groups = np.repeat([0, 1], 40)
    assert plane.shape == (80, 2) and KNeighborsClassifier(5).fit(plane, groups).score(plane, groups) == 1
    assert np.array_equal(plane, project_to_plane(codes, "umap", seed=0))
    few = np.repeat(codes[:4], 5, axis=0)  # duplicates, reduced to four points
    assert np.isfinite(project_to_plane(few, "umap", seed=0)).all() and project_to_plane(
        codes[:4], "umap", seed=0
    ).shape == (4, 2)


@pytest.mark.slow
def test_umap_plane_and_picture_are_written(tmp_path, model, digits):
    found = embed(model, digits, method="umap", out=str(tmp_path))
    assert found.plane.shape == (180, 2) and (tmp_path / "plane.png").stat().st_size > 1000
    y = digits.tensors("test")[1].numpy()
    near = KNeighborsClassifier(6).fit(found.plane, y).kneighbors(return_distance=False)
    in_code = KNeighborsClassifier(15).fit(found.codes, y).kneighbors(return_distance=False)
    kept = np.mean([len({*a} & {*b}) / 6 for a, b in zip(near, in_code, strict=True)])
    assert kept > 0.5  # by chance 0.08


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(9,), (2, 16), (1, 8, 8), (3, 9, 7), (1, 4, 8, 8)], ids=str)
def test_every_kind_of_sample_is_written(tmp_path, shape):
    model = aezoo.create_model("dense_ae", shape, latent_dim=3)
    x = torch.rand(6, *shape, generator=torch.Generator().manual_seed(0))
    found = embed(model, x, fit_on=x, nearest=2, out=str(tmp_path), batch_size=4)
    names = ["codes.npy", "plane.csv", "neighbours.csv", "plane.png", "neighbours.png"]
    assert [file.name for file in found.files] == names and all((tmp_path / name).stat().st_size for name in names)
    assert found.accuracies == [] and "6 codes of 3" in found.summary()


def test_code_maps_are_kept_as_maps(tmp_path):
    model = aezoo.create_model("conv_ae", (1, 8, 8))
    x = torch.rand(5, 1, 8, 8)
    found = embed(model, x, nearest=1, out=str(tmp_path))
    assert np.load(tmp_path / "codes.npy").shape == (5, *model.code_shape)
    assert found.neighbours[:, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("x", [torch.rand(1, 1, 8, 8), torch.full((5, 1, 8, 8), 0.5)], ids=["one", "all the same"])
def test_single_and_equal_samples_map_to_origin(tmp_path, model, x):
    found = embed(model, x, nearest=1, out=str(tmp_path))
    assert np.array_equal(found.plane, np.zeros((len(x), 2))) and (found.distances == 0).all()


def test_one_dimensional_code_has_a_plane():
    model = aezoo.create_model("dense_ae", (6,), latent_dim=1)
    found = embed(model, torch.rand(20, 6))
    assert found.plane[:, 0].std() > 0 and (found.plane[:, 1] == 0).all()


def test_classifier_training_samples_give_no_accuracies(model, digits):
    train = SampleSet.from_data(digits, "train")
    assert embed(model, train, fit_on=digits).accuracies == []


def test_multi_label_targets_are_omitted(tmp_path, model):
    data = SampleSet(ArrayDataset(torch.rand(6, 1, 8, 8), torch.zeros(6, 2)))
    embed(model, data, fit_on=data, nearest=1, out=str(tmp_path))
    assert "label" not in lines(tmp_path / "plane.csv")[0] and "label" not in lines(tmp_path / "neighbours.csv")[0]


def test_row_limit_draws_without_repeats():
    rows = choose_rows(100, 30)
    assert len(rows) == len(set(rows)) == 30 and rows.max() > 30 and (np.diff(rows) > 0).all()
    assert np.array_equal(rows, choose_rows(100, 30)) and not np.array_equal(rows, choose_rows(100, 30, seed=1))
    assert np.array_equal(choose_rows(20, 30), np.arange(20)) and np.array_equal(choose_rows(20, None), np.arange(20))


def test_degenerate_labels_give_no_accuracies(model):
    x = torch.rand(8, 1, 8, 8)
    for y in (torch.zeros(8, dtype=torch.long), torch.rand(8)):
        data = SampleSet(ArrayDataset(x, y))
        assert embed(model, data, fit_on=data).accuracies == []


def test_parquet_contains_the_same_numbers(tmp_path, model):
    import pandas as pd

    found = embed(model, torch.rand(4, 1, 8, 8), table="parquet", nearest=1, out=str(tmp_path))
    read = pd.read_parquet(tmp_path / "codes.parquet")
    assert np.array_equal(read[[f"z{d}" for d in range(5)]].to_numpy(np.float32), found.codes)
    assert (tmp_path / "neighbours.parquet").exists() and not (tmp_path / "plane.csv").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"method": "mds"}, "use pca, tsne or umap"),
        ({"table": "xls"}, "use npy, npz, csv or parquet"),
        ({"nearest": -1}, "at least 0"),
        ({"nearest": 4}, "3 samples to choose from"),
        ({"batch_size": 0}, "batch_size at least 1"),
        ({"method": "tsne"}, "at least 4 samples, got 3"),
        ({"x": torch.rand(3, 1, 9, 9)}, "expects samples of shape"),
        ({"fit_on": torch.rand(3, 1, 9, 9)}, "expects samples of shape"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str([*value]),
)
def test_a_bad_value_is_refused_in_one_line(model, wrong, said):
    with pytest.raises(AezooError, match=said) as caught:
        embed(model, **({"x": torch.rand(3, 1, 8, 8)} | wrong))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asked", [{}, {"method": "tsne"}, {"nearest": 2}])
def test_non_finite_codes_are_refused(asked):
    broken = aezoo.create_model("dense_ae", (1, 8, 8), latent_dim=5)
    broken.encoder.apply(lambda part: [weight.data.fill_(torch.nan) for weight in part.parameters(recurse=False)])
    with pytest.raises(AezooError, match="some codes are NaN or infinite: the model is broken"):
        embed(broken, torch.rand(8, 1, 8, 8), **asked)


def test_missing_umap_names_extra_to_install(model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    with pytest.raises(AezooError, match=r"\.\[umap\]"):
        embed(model, torch.rand(8, 1, 8, 8), method="umap")


@pytest.mark.parametrize(
    ("raw", "said"),
    [((0.9, 0.8), "raw values, by probe; pca, by knn"), ((0.7, 0.8), "pca, by knn"), ((0.7, 0.6), None)],
)
def test_the_summary_names_features_ahead_of_codes(raw, said):
    rows = [
        {"features": name, "size": 2, "probe": probe, "knn": knn}
        for name, probe, knn in [("codes", 0.8, 0.84), ("raw values", *raw), ("pca", 0.75, 0.85 if said else 0.84)]
    ]
    empty = np.empty((3, 2))
    found = Embedding(empty, empty, empty, rows, empty[:, :0], empty[:, :0])
    assert found.summary().count("a baseline separates the classes best: ") == (said is not None)
    assert said is None or f"a baseline separates the classes best: {said}\n" in found.summary()
