"""export: files give the results of the model, in the units of the data, without torch or aezoo."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import broken_models
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from golden import own_models
from refusals import refused_in_one_line as refused
from representative_models import of_graphs
from safetensors import safe_open

import aezoo
from aezoo.autoencoder import Autoencoder
from aezoo.cli.main import main
from aezoo.errors import AezooError
from aezoo.io.exporters import graphs
from aezoo.sklearn import AutoencoderDetector
from aezoo.tasks import export as export_task
from aezoo.tasks.detect import Detector
from aezoo.training.data_units import DataUnits

slow = pytest.mark.slow
# hides these packages, as if they were not installed
ALONE = "import sys; sys.modules.update(dict.fromkeys(['torch', 'aezoo', 'lightning'])); "


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).random(shape)


def onnx_session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def example_of(readme, name):
    """The code in a section of a file."""
    section = readme.read_text().partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code


@pytest.fixture(scope="module")
def bytes_home(tmp_path_factory):
    """A saved model of small byte images and their file, which has a test split."""
    home = tmp_path_factory.mktemp("bytes")
    x = (drawn(150, 1, 8, 8) ** 3 * 255).astype(np.uint8)
    labels = np.array(["cat", "dog", "eel"])[np.arange(150) % 3]
    np.savez(home / "data.npz", x_train=x[:100], y_train=labels[:100], x_test=x[100:], y_test=labels[100:])
    module = aezoo.DataModule(str(home / "data.npz"), val_fraction=0.29)
    module.setup()
    torch.manual_seed(0)
    model = aezoo.create_model("vae", module.input_shape, latent_dim=3)
    model.data_units = module.units
    aezoo.save_model(model, home / "model")
    return home


def flags_of_detect(home, *flags):
    """is_anomaly of `aezoo detect` for the test split."""
    common = ["--baselines", "false", "--n_shown", "0", "--out", str(home / "detected"), *flags]
    main(["detect", "--ckpt_path", str(home / "model"), *common])
    with (home / "detected" / "scores.csv").open() as file:
        rows = [*csv.DictReader(file)]
    return np.array([row["is_anomaly"] == "True" for row in rows]), np.array([float(row["score"]) for row in rows])


@pytest.mark.slow
def test_score_of_raw_bytes_agrees_with_detect_without_torch(bytes_home, tmp_path):
    data = ["--data", str(bytes_home / "data.npz"), "--data.val_fraction", "0.29"]
    main(["export", str(bytes_home / "model"), str(tmp_path), "--what", "score", *data, "--contamination", "0.2"])
    expected, scores = flags_of_detect(bytes_home, *data, "--contamination", "0.2")
    code = example_of(tmp_path / "README.md", "score.onnx")
    assert len(code.splitlines()) <= 10 and "np.zeros((2, 1, 8, 8), np.uint8)" in code
    subprocess.run([sys.executable, "-c", ALONE + code], cwd=tmp_path, check=True, capture_output=True)
    given = code.replace("np.zeros((2, 1, 8, 8), np.uint8)", f'np.load("{bytes_home / "data.npz"}")["x_test"]')
    saved = given + '\nnp.savez("found.npz", score=score, is_anomaly=is_anomaly, t=float(about["threshold"]))'
    subprocess.run([sys.executable, "-c", ALONE + saved], cwd=tmp_path, check=True, capture_output=True)
    found = np.load(tmp_path / "found.npz")
    assert 0 < expected.sum() < len(expected) == 50 and "score, is_anomaly, p_value = session.run" in code
    assert (found["is_anomaly"] == expected).all()
    assert ((found["score"] > found["t"]) == expected).all()
    np.testing.assert_allclose(found["score"], scores, rtol=1e-5)
    about = onnx_session(tmp_path / "score.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == ["cat", "dog", "eel"]
    assert (about["contamination"], about["score"], about["model"]) == ("0.2", "deviance", "vae")
    assert json.loads(about["data_units"])["white"] == 255 and json.loads(about["input"])["range"] == [0, 255]


@pytest.mark.parametrize(
    "flags",
    [
        ["--score", "mse", "--quantile", "0.6"],
        pytest.param(["--score", "nap", "--contamination", "0.4"], marks=slow),
        pytest.param(["--score", "combined", "--contamination", "0.4"], marks=slow),
        pytest.param(["--score", "mahalanobis", "--contamination", "0.4"], marks=slow),
        pytest.param(["--normal", "dog", "--contamination", "0.4"], marks=slow),
    ],
)
def test_threshold_agrees_with_detect_by_every_rule(bytes_home, tmp_path, flags):
    data = ["--data", str(bytes_home / "data.npz"), "--data.val_fraction", "0.29"]
    main(["export", str(bytes_home / "model"), str(tmp_path), "--what", "score", *data, *flags])
    expected, _ = flags_of_detect(bytes_home, *data, *flags)
    x = np.load(bytes_home / "data.npz")["x_test"]
    (is_anomaly,) = onnx_session(tmp_path / "score.onnx").run(["is_anomaly"], {"x": x})
    assert 0 < expected.sum() < len(expected)
    assert (is_anomaly == expected).all()


@slow
def test_score_of_a_table_uses_the_units_of_the_table(tmp_path):
    """Values of about 1e9, which float32 would not distinguish."""
    x = drawn(120, 3) * [1, 100, 1e-3] + [1e9, 5, 0]
    home = tmp_path
    np.savetxt(home / "table.csv", x, delimiter=",", header="a,b,c", comments="", fmt="%.12g")
    x = np.loadtxt(home / "table.csv", delimiter=",", skiprows=1)
    data = ["--data", str(home / "table.csv"), "--data.scale", "standard"]
    module = aezoo.DataModule(str(home / "table.csv"), scale="standard")
    module.setup()
    torch.manual_seed(0)
    model = aezoo.create_model("dense_ae", (3,), likelihood="gaussian", latent_dim=2)
    model.data_units = module.units
    aezoo.save_model(model, home / "model")
    main(["export", str(home / "model"), str(home / "out"), "--what", "score", *data, "--quantile", "0.75"])
    expected, scores = flags_of_detect(home, "--input", str(home / "table.csv"), *data, "--quantile", "0.75")
    session = onnx_session(home / "out" / "score.onnx")
    score, is_anomaly, _ = session.run(None, {"x": x})
    assert expected.any() and not expected.all()
    assert (is_anomaly == expected).all()
    np.testing.assert_allclose(score, scores, rtol=1e-4)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["columns"]) == ["a", "b", "c"] and "`a`, `b`, `c`" in (home / "out/README.md").read_text()
    # reconstructions are in the units of the table
    aezoo.export(model, out=str(home / "back"))
    (x_hat,) = onnx_session(home / "back" / "reconstruct.onnx").run(None, {"x": x})
    offset, factor = (part.numpy() for part in module.units.offset_and_factor)
    scaled = torch.from_numpy(((x - offset) / factor).astype(np.float32))
    np.testing.assert_allclose((x_hat - offset) / factor, model.eval()(scaled).detach().numpy(), atol=1e-5)


@slow
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_exported_functions_of_a_discrete_model_agree(tmp_path, format):
    torch.manual_seed(0)
    model = aezoo.create_model("vq_vae", (1, 8, 8), latent_dim=4, codebook_size=16, net="mlp", hidden_dims=(8,)).eval()
    model.data_units = DataUnits(white=255)
    x = torch.from_numpy((drawn(5, 1, 8, 8) * 255).astype(np.uint8))
    run = {}
    for what in ("encode", "decode", "reconstruct", "indices", "decode_indices"):
        path = aezoo.export(model, what=what, format=format, out=str(tmp_path)).path
        if format == "onnx":
            session = onnx_session(path)
            name = session.get_inputs()[0].name
            run[what] = lambda x, s=session, n=name: torch.from_numpy(s.run(None, {n: x.numpy()})[0])
        else:
            module = torch.export.load(path).module()
            run[what] = lambda x, m=module: m(x)[0]
    with torch.no_grad():
        seen = x.float() / 255
        assert torch.equal(run["indices"](x), model.encode_indices(seen))
        torch.testing.assert_close(run["encode"](x), model.encode(seen))
        torch.testing.assert_close(run["reconstruct"](x), 255 * model(seen))
    torch.testing.assert_close(run["decode"](run["encode"](x)), run["reconstruct"](x))
    torch.testing.assert_close(run["decode_indices"](run["indices"](x)), run["reconstruct"](x))
    for batch in (1, 2, 9):
        assert run["encode"](x[:1].expand(batch, -1, -1, -1).contiguous()).shape[0] == batch
    sections = re.findall(r"^## (.*)$", (tmp_path / "README.md").read_text(), re.MULTILINE)
    assert sections == sorted(f"{what}.{format}" for what in run)


@slow
def test_encode_of_a_variational_model_is_the_mean(tmp_path):
    model = aezoo.create_model("vae", (6,), latent_dim=2).eval()
    aezoo.export(model, what="encode", out=str(tmp_path))
    x = torch.rand(4, 6)
    (z,) = onnx_session(tmp_path / "encode.onnx").run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(z), model.posterior(x)[0].detach())


def test_units_of_the_model_leave_samples_as_it_sees_them(tmp_path):
    model = aezoo.create_model("dense_ae", (6,), latent_dim=2).eval()
    model.data_units = DataUnits(white=255)
    aezoo.export(model, units="model", format="pt2", out=str(tmp_path))
    x = torch.rand(3, 6)
    torch.testing.assert_close(torch.export.load(tmp_path / "reconstruct.pt2").module()(x)[0], model(x).detach())


def test_weights_are_those_that_the_function_reads(tmp_path):
    model = aezoo.create_model("vae", (6,), latent_dim=2)
    found = aezoo.export(model, what="encode", format="safetensors", out=str(tmp_path))
    with safe_open(found.path, "np") as file:
        about, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = {name: value.numpy() for name, value in model.state_dict().items() if name.startswith("encoder.")}
    assert weights.keys() == expected.keys() and len(expected) > 2
    assert all((weights[name] == value).all() for name, value in expected.items())
    again = aezoo.create_model(about["model"], **json.loads(about["hyperparameters"]))
    again.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()}, strict=False)
    x = torch.rand(2, 6)
    assert torch.equal(again.encode(x), model.encode(x))
    exec(example_of(tmp_path / "README.md", "encode.safetensors").replace("encode.safetensors", str(found.path)), {})


def test_program_contains_its_metadata(tmp_path):
    model = aezoo.create_model("dense_ae", (6,), latent_dim=2)
    aezoo.export(model, what="score", format="pt2", calibrate_on=torch.rand(40, 6), out=str(tmp_path))
    scope = {}
    code = example_of(tmp_path / "README.md", "score.pt2").replace("score.pt2", str(tmp_path / "score.pt2"))
    exec(code, scope)
    about = json.loads(scope["about"]["metadata.json"])
    assert about["function"] == "score" and float(about["threshold"]) > 0
    assert scope["is_anomaly"].dtype == torch.bool and scope["score"].shape == (2,)


@pytest.mark.slow
def test_weights_are_stored_next_to_a_large_graph(tmp_path, monkeypatch):
    """A protobuf holds up to 2 GiB; larger weights are in a separate file, which keeps its name."""
    monkeypatch.setattr(graphs, "_LARGE", 0)
    model = aezoo.create_model("dense_ae", (64,), latent_dim=2).eval()
    found = aezoo.export(model, out=str(tmp_path))
    assert [file.name for file in found.files] == ["reconstruct.onnx.data", "reconstruct.onnx", "README.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(file.name for file in found.files)
    x = torch.rand(3, 64)
    (x_hat,) = onnx_session(found.path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(x_hat), model(x).detach())


def test_log_of_a_sigmoid_stays_finite(tmp_path):
    """Torch's own translation gives -inf below -88."""
    model = aezoo.create_model("dense_ae", (6,), latent_dim=2, likelihood="bernoulli").eval()
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(1000)
        x = torch.rand(9, 6)
        assert float(model.decoder(model.encode(x)).min()) < -150
    aezoo.export(model, what="score", calibrate_on=x, out=str(tmp_path))
    score = onnx_session(tmp_path / "score.onnx").run(["score"], {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(score), model.anomaly_score(x).detach())


def test_threshold_in_float32_separates_the_same_scores():
    model = aezoo.create_model("dense_ae", (6,), latent_dim=2)
    for threshold in np.random.default_rng(0).normal(50, 10, 100):
        exact = export_task._exact(float(threshold), Detector(model, "mse"))
        assert exact <= threshold < float(np.nextafter(np.float32(exact), np.float32(np.inf)))


@pytest.mark.slow
def test_estimator_detect_and_files_decide_alike(tmp_path):
    """A default estimator, its model in a folder, and its model in ONNX, on training, calibration and new samples."""
    random = np.random.default_rng(0)
    x = random.normal(size=(900, 5)) * [1, 100, 1e-3, 1, 1] + [1e6, 5, 0, 0, 0]
    x[600:700] += random.normal(size=(100, 5)) * x.std(0) * 3
    # 99 of 500 samples are held out, so that the threshold is the score of one of them
    estimator = AutoencoderDetector(random_state=0, max_epochs=4, calibration_fraction=0.198).fit(x[:500])
    model = aezoo.load_model(aezoo.save_model(estimator.autoencoder_, tmp_path / "model"))
    np.save(tmp_path / "x.npy", x)
    detected, scores = flags_of_detect(tmp_path, "--input", str(tmp_path / "x.npy"), "--score", "combined")
    path = aezoo.export(model, what="score", score="combined", out=str(tmp_path)).path
    score, is_anomaly, p_value = onnx_session(path).run(None, {"x": x})
    assert score.dtype == np.float64 and 50 < is_anomaly.sum() < 300
    assert (is_anomaly == (estimator.predict(x) == -1)).all() and (is_anomaly == detected).all()
    np.testing.assert_allclose(score, scores, rtol=1e-4)
    np.testing.assert_allclose(p_value[500:], estimator.p_values(x[500:]), rtol=1e-12)
    threshold = float(onnx_session(path).get_modelmeta().custom_metadata_map["threshold"])
    assert threshold == -estimator.offset_ and (is_anomaly == (score > threshold)).all()
    with pytest.raises(AezooError, match="combined is learned from samples"):
        aezoo.export(model, what="score", score="combined", format="safetensors", out=str(tmp_path))


@pytest.mark.parametrize("n", [1, 2, 7, 8, 100])
def test_bisection_counts_as_searchsorted(tmp_path, n):
    values = torch.from_numpy(np.sort(np.random.default_rng(0).integers(0, 9, (3, n)).astype(np.float64)))

    class Counts(torch.nn.Module):
        def forward(self, x):
            first = x[:, 0].contiguous()
            lines = torch.searchsorted(values, x.T.contiguous(), right=True), torch.searchsorted(values[0], first)
            return (lines[0].T, lines[1])

    x = torch.from_numpy(np.random.default_rng(1).integers(-1, 11, (40, 3)).astype(np.float64))
    run = graphs.write_onnx(Counts().eval(), x[:4], tmp_path / "counts.onnx")
    assert all(torch.equal(found, wanted) for found, wanted in zip(run(x), Counts()(x), strict=True))


@slow
def test_pretrained_weights_bring_their_threshold(tmp_path, capsys):
    main(["export", "dense_ae.mnist", str(tmp_path), "--what", "score"])
    out = capsys.readouterr().out
    assert "1,000 held-out samples that are stored with the weights" in out and str(tmp_path / "score.onnx") in out
    about = onnx_session(tmp_path / "score.onnx").get_modelmeta().custom_metadata_map
    scores = aezoo.load_model("dense_ae.mnist").data_statistics.scores["deviance"].numpy()
    assert float((scores > float(about["threshold"])).mean()) == pytest.approx(0.1, abs=2e-3)


@slow
def test_opset_is_that_of_the_file(tmp_path):
    model = aezoo.create_model("dense_ae", (6,), latent_dim=2)
    for opset in (18, 21, 23):
        path = aezoo.export(model, what="encode", opset=opset, force=True, out=str(tmp_path)).path
        assert {one.version for one in onnx.load(path).opset_import if one.domain == ""} == {opset}


# ---- refusals --------------------------------------------------------------------------------------------------------


class Branches(broken_models.CorrectModel):
    """The code depends on values by control flow that cannot be exported."""

    def encode(self, x):
        code = super().encode(x)
        return code if float(code.sum()) > 1e9 else code + 0


class Draws(broken_models.CorrectModel):
    """The code is drawn."""

    def encode(self, x):
        code = super().encode(x)
        return code + torch.randn_like(code)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"what": "codes"}, "what is 'codes': choose from encode, decode, reconstruct, score, indices"),
        ({"format": "tflite"}, "format is 'tflite': choose from onnx, pt2, safetensors"),
        ({"units": "pixels"}, "units is 'pixels': choose from data, model"),
        ({"what": "indices"}, "vae has no indices.*it can export encode, decode, reconstruct, score"),
        ({"opset": 7}, "opset is 7: for format onnx, give a number from 18"),
        ({"opset": 18, "format": "pt2"}, "opset is 18: for format onnx"),
        ({"quantile": 2.0}, "quantile is 2.0"),
        ({"what": "score", "score": "elbo"}, "vae draws random numbers in elbo.*use score deviance"),
        ({"what": "score", "score": "combined"}, "combined must learn from samples: give --data or, in Python, fit_on"),
        ({"what": "score", "score": "typical"}, "unknown score 'typical'"),
        ({"what": "score", "score": "nap"}, "nap must learn from samples"),
        ({"what": "score", "contamination": 0.9}, "contamination is 0.9"),
        ({"what": "score", "normal": "3", "calibrate_on": torch.rand(30, 6)}, "x has no labels to say what is normal"),
        ({"calibrate_on": torch.rand(3, 7)}, "expects samples of shape 6"),
        (
            {"what": "score", "score": "mahalanobis", "format": "safetensors", "calibrate_on": torch.rand(30, 6)},
            "mahalanobis is learned from samples",
        ),
    ],
)
def test_what_cannot_be_exported_is_named(tmp_path, settings, message):
    model = aezoo.create_model("vae", (6,), latent_dim=2)
    with pytest.raises(AezooError, match=message) as refusal:
        aezoo.export(model, out=str(tmp_path / "out"), **settings)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@slow
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_refusal_says_what_works(tmp_path, format):
    model = Branches((6,))
    with pytest.raises(AezooError, match=f"cannot export encode as {format} .*it can export decode$") as refusal:
        aezoo.export(model, what="encode", format=format, out=str(tmp_path))
    assert "\n" not in str(refusal.value) and not any(tmp_path.iterdir())
    with pytest.raises(AezooError, match=r"draws random numbers in encode.*it can export decode$"):
        aezoo.export(Draws((6,)), what="encode", format=format, out=str(tmp_path))


def unscaled(function, given):
    return given.float()


def coarse(function, given):
    return ((given - function._offset) / function._factor).half().float()


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [unscaled, coarse])
def test_file_that_gives_other_values_is_not_written(tmp_path, monkeypatch, scaled):
    model = aezoo.create_model("dense_ae", (6,), latent_dim=2, likelihood="gaussian")
    model.data_units = DataUnits({"offset": torch.tensor(3.0), "factor": torch.tensor(2.0)})
    monkeypatch.setattr(graphs.Function, "_scaled", scaled)
    with pytest.raises(
        AezooError, match=r"the values of the file differ from those of the model by .* it can export encode"
    ):
        aezoo.export(model, what="score", format="pt2", calibrate_on=torch.rand(30, 6), out=str(tmp_path))
    assert not any(tmp_path.iterdir())


def test_nothing_is_overwritten_without_force(tmp_path):
    model = aezoo.create_model("dense_ae", (6,), latent_dim=2)
    first = aezoo.export(model, what="encode", format="pt2", out=str(tmp_path)).path.read_bytes()
    with pytest.raises(AezooError, match=r"encode.pt2 exists: .*--force true"):
        aezoo.export(model, what="encode", format="pt2", out=str(tmp_path))
    assert (tmp_path / "encode.pt2").read_bytes() == first
    aezoo.export(
        aezoo.create_model("dense_ae", (7,), latent_dim=2), what="encode", force=True, format="pt2", out=str(tmp_path)
    )
    assert (tmp_path / "README.md").read_text().count("## encode.pt2") == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").write_text("# My notes\n")
    with pytest.raises(AezooError, match=r"README.md is not from aezoo"):
        aezoo.export(model, format="pt2", out=str(tmp_path / "other"))
    assert (tmp_path / "other" / "README.md").read_text() == "# My notes\n"


def test_missing_packages_are_named(tmp_path, monkeypatch):
    model = aezoo.create_model("dense_ae", (6,), latent_dim=2)
    monkeypatch.setattr(graphs, "find_spec", lambda name: None)
    with pytest.raises(AezooError, match=r"ONNX needs onnx, onnxscript, onnxruntime: pip install '\.\[onnx\]'"):
        aezoo.export(model, out=str(tmp_path))
    assert aezoo.export(model, format="pt2", out=str(tmp_path)).path.is_file()


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AezooError, match=r"cannot write .*: (Not a directory|File exists); free disk space, or choose"):
        aezoo.export(aezoo.create_model("dense_ae", (6,)), format="safetensors", out=str(tmp_path / "file"))


@slow
def test_export_uses_the_data_of_the_run(tmp_path, capsys):
    """Scaling, classes and calibration samples come from the run; `detect` gives the same for its test split."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.normal(100, 5, (200, 4)), y=np.array(["a", "b"])[np.arange(200) % 2])
    flags = ["--data.name", str(tmp_path / "data.npz"), "--trainer.max_epochs", "1", "--model.latent_dim", "2"]
    main(["fit", "--model", "dense_ae", *flags, "--trainer.default_root_dir", str(tmp_path / "runs")])
    (run,) = (path.parent for path in (tmp_path / "runs").rglob("config.yaml"))
    main(["export", str(run), "--format", "onnx", "--what", "score"])
    assert str(run / "export" / "score.onnx") in capsys.readouterr().out
    main(["detect", "--ckpt_path", str(run), "--baselines", "false", "--input", str(tmp_path / "data.npz")])
    with (run / "detect" / "scores.csv").open() as file:
        expected = np.array([row["is_anomaly"] == "True" for row in csv.DictReader(file)])
    session = onnx_session(run / "export" / "score.onnx")
    (is_anomaly,) = session.run(["is_anomaly"], {"x": np.load(tmp_path / "data.npz")["x"]})
    assert 0 < expected.sum() < 200 and (is_anomaly == expected).all()
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == ["a", "b"]


def test_command_line_refuses_in_one_line(bytes_home, tmp_path, capsys):
    assert "no checkpoint at nowhere" in refused(capsys, "export", "nowhere")
    assert "export needs a trained model" in refused(capsys, "export", "--what", "encode")
    assert "unknown flag --wat, did you mean --what" in refused(
        capsys, "export", str(bytes_home / "model"), "--wat", "x"
    )
    assert "what is 'codes'" in refused(capsys, "export", str(bytes_home / "model"), "--what", "codes")


# ---- all models ------------------------------------------------------------------------------------------------------

LIKELIHOODS = (
    *("bernoulli", "continuous_bernoulli", "gaussian:learned", "sigmoid_gaussian", "laplace"),
    *("discretised_logistic", "beta_binomial", "logcosh", "logit_laplace"),
)
# without an ONNX operator, by likelihood and by model as documented in docs/export.md
NOT_IN_ONNX = ("beta_binomial",)


@slow
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_score_of_every_likelihood(likelihood, tmp_path):
    torch.manual_seed(0)
    model = aezoo.create_model("dense_ae", (1, 4, 4), latent_dim=2, likelihood=likelihood).eval()
    x = torch.from_numpy((drawn(30, 1, 4, 4) * 255).astype(np.uint8)) / 255
    # an ONNX file is made from an exported program, which a pt2 file contains
    given = "pt2" if likelihood in NOT_IN_ONNX else "onnx"
    if likelihood in NOT_IN_ONNX:
        with pytest.raises(AezooError, match=r"ONNX has no operator .*: use format pt2"):
            aezoo.export(model, what="score", calibrate_on=x, out=str(tmp_path))
    assert aezoo.export(model, what="score", format=given, calibrate_on=x, out=str(tmp_path)).difference < 1e-4


# as documented in docs/export.md, by model
NOT_EXPORTED = {
    name: {"score"} for name in ("dagmm", "gamma_vae", "hyperspherical_vae", "hvae", "padim", "patchcore", "rhvae")
}


def differs(found, wanted):
    """Whether two outputs differ by more than the tolerance of the model checks."""
    return any(float((a.double() - b.double()).abs().max()) > 1e-4 * max(1e-3, float(b.abs().max())) for a, b in
               zip(found, wanted, strict=True))  # fmt: skip


def test_page_names_what_cannot_be_exported():
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text().partition("## What cannot be exported")[2]
    assert all(f"`{name}`" in page for name in (*NOT_EXPORTED, *NOT_IN_ONNX))


def of_own_functions():
    """Models that override score or forward; the base's are tested above for each likelihood."""
    found = {(Autoencoder.score, Autoencoder.forward)}
    for name in own_models():
        cls = aezoo.model_class(name)
        if (cls.score, cls.forward) not in found or name in NOT_EXPORTED:
            found.add((cls.score, cls.forward))
            yield name


@slow
@pytest.mark.parametrize("name", [*of_own_functions()])
def test_model_functions_can_be_exported(name, tmp_path):
    """Scores, and codes and decoders if a reconstruction is not their composition; model checks cover the rest."""
    subject = of_graphs(name)
    model, batches = graphs.portable_copy(subject.build()), (subject.data(), subject.data(3, seed=1), subject.data(1))
    failed = set()
    for what in ("score",) if type(model).forward is Autoencoder.forward else ("encode", "decode", "score"):
        function = graphs.Function(model, what)
        with torch.no_grad():
            given = [function.input_of(x) for x in batches]
            wanted = [function(x) for x in given]
            again = function(given[0])
        assert torch.equal(again[0], wanted[0][0]), f"{what} draws"
        try:
            program = graphs.program(function, given[0])
            runs = [program.module()]
            if what == "score" and type(model).score is not Autoencoder.score:
                runs.append(graphs.write_onnx(function, given[0], tmp_path / "score.onnx", exported=program))
            with torch.no_grad():
                results = [[run(x) for x in given] for run in runs]
        except Exception:
            failed.add(what)
        else:
            for found in results:
                assert not any(differs(*pair) for pair in zip(found, wanted, strict=True)), what
    assert failed == NOT_EXPORTED.get(name, set())
