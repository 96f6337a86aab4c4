"""Commands for trained models: models and samples from files, results in a folder, one-line errors."""

import csv
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from refusals import refused_in_one_line as refused

import aezoo
from aezoo.cli.main import main
from aezoo.cli.task_commands import read
from aezoo.errors import AezooError
from aezoo.tasks.codec import tables
from aezoo.tasks.samples import SampleSet
from aezoo.training.data_units import DataUnits


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of `aezoo fit`, with vectors outside of [0, 1]."""
    home = tmp_path_factory.mktemp("run")
    x = np.random.default_rng(0).normal(100, 5, (80, 4))
    np.savez(home / "data.npz", x=x, y=np.arange(80) % 3)
    flags = ["--data.name", str(home / "data.npz"), "--trainer.max_epochs", "1", "--model.latent_dim", "2"]
    main(["fit", "--model", "dense_ae", *flags, "--trainer.default_root_dir", str(home / "runs")])
    (folder,) = (path.parent for path in (home / "runs").rglob("config.yaml"))
    return folder


@pytest.mark.slow
def test_command_needs_only_a_run_folder(run, capsys):
    main(["reconstruct", "--ckpt_path", str(run)])
    out = capsys.readouterr().out
    assert "8 samples" in out and str(run / "reconstruct" / "errors.csv") in out
    assert np.load(run / "reconstruct" / "reconstructions.npy").shape == (8, 4)


@pytest.mark.slow
def test_samples_are_written_in_the_units_of_the_data(run, tmp_path, capsys):
    module = aezoo.DataModule(str(run.parents[2] / "data.npz"), scale="standard")
    given, state = module.tensors("test")[0], module.source.scaling.state()
    model, given = aezoo.load_model(run), given.to(torch.float32)
    expected = (model(given).detach().double() * state["factor"] + state["offset"]).numpy()
    assert 90 < expected.mean() < 110
    ckpt, out = ["--ckpt_path", str(run)], ["--out", str(tmp_path)]
    for command, name in (("reconstruct", "reconstructions"), ("denoise", "denoised"), ("generate", "samples")):
        main([command, *ckpt, *out])
        said, found = capsys.readouterr().out, np.load(tmp_path / f"{name}.npy")
        assert f"values in {name}.npy are in the units of the training data" in said
        assert np.allclose(found, expected, atol=1e-3) if command != "generate" else 90 < found.mean() < 110
    main(["compress", *ckpt, *out, "--quality", "12", "--compare", "false"])
    (saved,) = tmp_path.glob("model-*")
    for path in (run, saved):
        main(["decompress", "--ckpt_path", str(path), *out, "--input", str(tmp_path / "samples.aez")])
        assert np.allclose(np.load(tmp_path / "samples.npy"), expected, atol=0.1)
    # a model of another program has no units
    aezoo.save_model(aezoo.create_model("dense_ae", (4,), latent_dim=2), tmp_path / "foreign")
    np.save(tmp_path / "x.npy", given.numpy())
    main(["reconstruct", "--ckpt_path", str(tmp_path / "foreign"), "--input", str(tmp_path / "x.npy"), *out])
    assert "does not record how its training data were scaled: samples are in the scale" in capsys.readouterr().err
    capsys.readouterr()
    main(["predict", *ckpt, "--predictions.folder", str(tmp_path)])
    assert "`aezoo reconstruct` writes the units of the data" in capsys.readouterr().out


@pytest.mark.slow
def test_split_output_folder_and_batch_size_are_respected(run, tmp_path, capsys):
    flags = ["--split=train", f"--out={tmp_path / 'here'}", "--batch_size=5", "--n_shown", "0", "--device", "cpu"]
    main(["reconstruct", "--ckpt_path", str(run), *flags])
    assert "64 samples" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["errors.csv", "reconstructions.npy"]


@pytest.mark.slow
def test_overwritten_results_are_reported(run, tmp_path, capsys):
    flags = ["--ckpt_path", str(run), f"--out={tmp_path}", "--n_shown", "0"]
    main(["reconstruct", *flags])
    assert capsys.readouterr().err == ""
    (tmp_path / "mine.txt").write_text("mine")
    main(["reconstruct", *flags])
    said = f"aezoo: 2 earlier files in {tmp_path} are replaced; --out DIR keeps both\n"
    assert capsys.readouterr().err == said and (tmp_path / "mine.txt").is_file()


@pytest.mark.slow
def test_input_file_is_scaled_as_training_data(run, tmp_path, capsys):
    with np.load(run.parents[2] / "data.npz") as file:
        x, y = file["x"], file["y"]
    np.savez(tmp_path / "new.npz", x=x, y=y)
    main(["reconstruct", "--ckpt_path", str(run), "--input", str(tmp_path / "new.npz"), f"--out={tmp_path}"])
    model, trained = aezoo.io.checkpoint.load_run(run)
    scaled = ((torch.from_numpy(x) - trained["scaling"]["offset"]) / trained["scaling"]["factor"]).float()
    assert abs(float(scaled.mean())) < 0.2 and float(scaled.std()) == pytest.approx(1, abs=0.2)
    # converted to the units of the data
    expected = model(scaled).detach() * trained["scaling"]["factor"] + trained["scaling"]["offset"]
    assert np.allclose(np.load(tmp_path / "reconstructions.npy"), expected, rtol=1e-6)
    assert (tmp_path / "errors.csv").read_text().splitlines()[0].endswith("label")


@pytest.mark.slow
def test_float_stored_bytes_are_recognised(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", x=pixels)
    flags = ["--data", str(tmp_path / "data.npz"), "--trainer.max_epochs", "1", "--model.likelihood", "gaussian"]
    main(["fit", "--model", "dense_ae", *flags, "--trainer.default_root_dir", str(tmp_path / "runs")])
    (run,) = (path.parent for path in (tmp_path / "runs").rglob("config.yaml"))
    found = {}
    for name, x in {"bytes": pixels, "unit": pixels / np.float32(255), "floats": pixels.astype(np.float32)}.items():
        np.save(tmp_path / f"{name}.npy", x)
        capsys.readouterr()
        argv = ["reconstruct", "--ckpt_path", str(run), "--input", str(tmp_path / f"{name}.npy"), "--n_shown", "0"]
        if name == "floats":
            assert "values from 0 to 255, but the training data had 0 to 1: divide them" in refused(capsys, *argv)
        else:
            main([*argv, f"--out={tmp_path / name}"])
            found[name] = np.load(tmp_path / name / "reconstructions.npy")
    assert np.allclose(found["bytes"], found["unit"], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["reconstruct", "test"])
def test_differently_scaled_data_are_reported(run, tmp_path, caplog, command):
    with np.load(run.parents[2] / "data.npz") as file:
        np.savez(tmp_path / "new.npz", x=2 * file["x"], y=file["y"])
    words = "values are scaled by the statistics of its own training split"
    for flags, said in ([], False), (["--data", str(tmp_path / "new.npz")], True):
        caplog.clear()
        place = [f"--out={tmp_path}"] if command == "reconstruct" else []
        main([command, "--ckpt_path", str(run), *flags, *place])
        assert (words in caplog.text) == said


@pytest.mark.slow
@pytest.mark.parametrize("command", ["reconstruct", "test"])
def test_changed_split_settings_are_reported(run, tmp_path, capsys, command):
    place = [f"--out={tmp_path}"] if command == "reconstruct" else []
    words = "aezoo: --data.seed and --data.test_fraction: the split is not the one used for training"
    for flags, said in ([], False), (["--data.seed=7", "--data.test_fraction=0.3"], True):
        main([command, "--ckpt_path", str(run), *flags, *place])
        assert (words in capsys.readouterr().err) == said


@pytest.mark.slow
def test_training_classes_are_not_required_in_other_data(tmp_path, capsys):
    x = np.random.default_rng(0).random((60, 4))
    np.savez(tmp_path / "seen.npz", x=x, y=np.arange(60) % 3)
    np.save(tmp_path / "new.npy", x)
    np.savez(tmp_path / "new.npz", x=x, y=7 + np.arange(60) % 2)
    flags = ["--data", str(tmp_path / "seen.npz"), "--data.train_classes=[0]", "--data.num_labels=2"]
    flags += ["--trainer.max_epochs=1", "--trainer.default_root_dir", str(tmp_path / "runs")]
    main(["fit", "--model", "dense_ae", *flags])
    (run,) = (path.parent for path in (tmp_path / "runs").rglob("config.yaml"))
    for name in ("new.npy", "new.npz"):
        for command in ("test", "reconstruct"):
            main([command, "--ckpt_path", str(run), "--data", str(tmp_path / name)])
    capsys.readouterr()
    # classes of the training set itself are kept
    main(["reconstruct", "--ckpt_path", str(run), "--split=train"])
    assert "16 samples" in capsys.readouterr().out


@pytest.mark.slow
def test_tables_contain_file_names_and_labels(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    for i, image in enumerate(pixels):
        folder = tmp_path / "photos" / ("sound" if i % 2 else "broken")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    flags = ["--data.val_fraction", "0.2", "--data.test_fraction", "0.2", "--model.latent_dim", "2"]
    flags += ["--data", str(tmp_path / "photos"), "--trainer.max_epochs", "1"]
    main(["fit", "--model", "dense_ae", *flags, "--trainer.default_root_dir", str(tmp_path / "runs")])
    (run,) = (path.parent for path in (tmp_path / "runs").rglob("config.yaml"))
    given = ["--ckpt_path", str(run), "--n_shown", "0", f"--out={tmp_path / 'out'}"]
    photos = tmp_path / "photos"
    for memory in ("on", "off"):
        main(["detect", *given, "--baselines", "false", "--data.memory", memory])
        main(["reconstruct", *given, "--input", str(photos), "--data.memory", memory])
        main(["embed", *given, "--table", "csv", "--nearest", "1", "--data.memory", memory])
        for name, most in (("scores", 4), ("errors", 20), ("codes", 4), ("plane", 4), ("neighbours", 4)):
            with (tmp_path / "out" / f"{name}.csv").open() as file:
                rows = list(csv.DictReader(file))
            assert len(rows) == most
            assert all(row["file"].startswith(str(photos / row["label"])) for row in rows), rows
        assert all(row["query_file"].startswith(str(photos / row["query_label"])) for row in rows)  # neighbours
    capsys.readouterr()
    for named, n in (["--data", str(photos)], 4), (["--data", "folder", "--data.root", str(photos)], 4), ([], 0):
        main(["reconstruct", *given, *named])
        said = f"{n} of its samples are used, the share --data.test_fraction; --input {photos} uses all"
        assert (said in capsys.readouterr().err) == bool(n)
    one = str(photos / "sound" / "1.png")
    main(["detect", *given, "--baselines", "false", "--input", one])
    assert one in (tmp_path / "out" / "scores.csv").read_text()


@pytest.mark.slow
def test_table_labels_match_input_file(run, tmp_path):
    rows = np.random.default_rng(0).normal(100, 5, (6, 4)).tolist()
    for labels in ([7, 3, 7, -1, 3, 30], ["b", "a", "b", "b", "a", "c"]):
        lines = [",".join(map(repr, row)) + f",{label}" for row, label in zip(rows, labels, strict=True)]
        (tmp_path / "new.csv").write_text("\n".join(["a,b,c,d,label", *lines]))
        main(["detect", "--ckpt_path", str(run), "--input", str(tmp_path / "new.csv"), f"--out={tmp_path}",
                  "--baselines", "false", "--n_shown", "0"])  # fmt: skip
        with (tmp_path / "scores.csv").open() as file:
            assert [row["label"] for row in csv.DictReader(file)] == list(map(str, labels))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A run folder of a table with named columns."""
    home = tmp_path_factory.mktemp("table")
    x = np.random.default_rng(0).random((40, 3))
    rows = [",".join(map(repr, [*row, i % 2])) for i, row in enumerate(x.tolist())]
    (home / "d.csv").write_text("\n".join(["age,height,weight,label", *rows]))
    flags = ["--data.name", str(home / "d.csv"), "--trainer.max_epochs", "1", "--model.latent_dim", "2"]
    main(["fit", "--model", "dense_ae", *flags, "--trainer.default_root_dir", str(home / "runs")])
    (folder,) = (path.parent for path in (home / "runs").rglob("config.yaml"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("height,age,weight", "in another order, 'height' where 'age' was: write them in the order 'age', 'height', "),
        ("age,height", "lacks 'weight' of the 3 columns of the training data"),
        ("id,age,height,weight", "has 'id' besides of the 3 columns of the training data: give it these columns"),
        ("age,height,mass", "lacks 'weight' and has 'mass' besides of the 3"),
    ],
)
def test_renamed_or_reordered_columns_are_refused(table, tmp_path, capsys, header, words):
    import pandas

    names = header.split(",")
    frame = pandas.DataFrame(np.random.default_rng(1).random((12, len(names))), columns=names)
    frame.to_csv(tmp_path / "new.csv", index=False)
    frame.to_parquet(tmp_path / "new.parquet")
    capsys.readouterr()
    for name in ("new.csv", "new.parquet"):
        for flags in (["--input", str(tmp_path / name)], ["--data", str(tmp_path / name)]):
            said = refused(capsys, "reconstruct", "--ckpt_path", str(table), *flags, "--out", str(tmp_path))
            assert words in said and name in said, said


@pytest.mark.slow
def test_matching_or_unnamed_columns_are_taken(table, tmp_path):
    for header in (["weight,label,height,age"], ["age,height,weight"], ["label,age,height,weight"], []):
        rows = ["0.1,0.2,0.3" + ",1" * ("label" in "".join(header))] * 4
        (tmp_path / "new.csv").write_text("\n".join([*header, *rows]))
        if header == ["weight,label,height,age"]:
            with pytest.raises(aezoo.AezooError, match="another order"):
                read(str(tmp_path / "new.csv"), aezoo.load_model(table).data_units)
        else:
            assert read(str(tmp_path / "new.csv"), aezoo.load_model(table).data_units).shape == (3,)


def test_label_column_is_optional_in_input_file(tmp_path):
    units = DataUnits(columns=("a", "b"), is_table=True)
    for text, labels in (("a,fraud,b\n0.1,yes,0.2\n0.3,no,0.4\n", [1, 0]), ("a,b\n0.1,0.2\n0.3,0.4\n", None)):
        (tmp_path / "new.csv").write_text(text)
        samples = read(str(tmp_path / "new.csv"), units, {"label_column": "fraud"})
        assert torch.allclose(samples.rows([0, 1]), torch.tensor([[0.1, 0.2], [0.3, 0.4]]))
        assert labels is None if samples.y is None else samples.y.tolist() == labels


@pytest.mark.slow
def test_test_refuses_reordered_columns(table, tmp_path, capsys):
    text = (table.parents[2] / "d.csv").read_text()
    (tmp_path / "other.csv").write_text(text.replace("age,height", "height,age"))
    capsys.readouterr()
    said = refused(capsys, "test", "--ckpt_path", str(table), "--data", str(tmp_path / "other.csv"))
    assert "other.csv has the columns of the training data in another order" in said


@pytest.mark.slow
def test_input_picture_is_scaled_as_training_data(tmp_path):
    x = np.random.default_rng(0).integers(0, 200, (40, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    Image.fromarray(x[0]).save(tmp_path / "photo.png")
    flags = ["--data.scale", "standard", "--model.likelihood", "gaussian", "--trainer.max_epochs", "1"]
    flags += ["--data.name", str(tmp_path / "x.npy"), "--trainer.default_root_dir", str(tmp_path / "runs")]
    main(["fit", "--model", "dense_ae", *flags])
    (folder,) = (path.parent for path in tmp_path.rglob("config.yaml"))
    main(["reconstruct", "--ckpt_path", str(folder), "--input", str(tmp_path / "photo.png"), f"--out={tmp_path}"])
    model, trained = aezoo.io.checkpoint.load_run(folder)
    scaled = (torch.from_numpy(x[:1, None]) - trained["scaling"]["offset"]) / trained["scaling"]["factor"]
    assert trained["white"] == 255 and -3 < float(scaled.min()) < -1 < 1 < float(scaled.max()) < 3
    expected = model(scaled).detach() * trained["scaling"]["factor"] + trained["scaling"]["offset"]
    assert np.allclose(np.load(tmp_path / "reconstructions.npy"), expected, rtol=1e-5)
    # a file decodes to an image in bytes
    out = f"--out={tmp_path}"
    main(["compress", f"--ckpt_path={folder}", f"--input={tmp_path / 'photo.png'}", out, "--compare=false"])
    main(["decompress", f"--ckpt_path={folder}", f"--input={tmp_path / 'samples.aez'}", out])
    found = np.asarray(Image.open(tmp_path / "000000.png"), np.float32)
    assert np.abs(found - np.clip(expected.numpy()[0, 0], 0, 255)).max() < 30 and 50 < found.min() < found.max() < 150


def test_dropped_transparency_is_reported(tmp_path, capsys):
    aezoo.save_model(aezoo.create_model("dense_ae", (3, 8, 8), latent_dim=2), tmp_path / "model")
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(tmp_path / "one.png")
    main(["reconstruct", f"--ckpt_path={tmp_path / 'model'}", f"--input={tmp_path / 'one.png'}", "--n_shown=0"])
    assert "aezoo: transparency is dropped from 1 images: " in capsys.readouterr().err


@pytest.mark.slow
def test_tasks_binarise_as_training_did(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    flags = ["--data.name", str(tmp_path / "x.npy"), "--data.binarise", "dynamic", "--data.seed", "3"]
    flags += ["--trainer.max_epochs", "1", "--trainer.default_root_dir", str(tmp_path / "runs")]
    main(["fit", "--model", "dense_ae", *flags])
    (folder,) = (path.parent for path in tmp_path.rglob("config.yaml"))
    model, trained = aezoo.io.checkpoint.load_run(folder)
    static = aezoo.DataModule(str(tmp_path / "x.npy"), binarise="static", seed=3).tensors("train")[0]
    drawn = read(str(tmp_path / "x.npy"), model.data_units, trained["settings"]).rows(range(40))
    given = ["--input", str(tmp_path / "x.npy")]
    for flags, seen in ((["--split", "train"], static), (given, drawn)):
        main(["reconstruct", "--ckpt_path", str(folder), f"--out={tmp_path / 'out'}", *flags])
        assert set(seen.unique().tolist()) == {0.0, 1.0}
        found = np.load(tmp_path / "out" / "reconstructions.npy")
        assert np.allclose(found, model(seen).detach().numpy(), atol=1e-6)


@pytest.mark.slow
def test_saved_model_takes_file_and_names_missing_data(run, tmp_path, capsys):
    aezoo.save_model(aezoo.load_model(run), tmp_path / "saved")
    assert "does not record what it was trained on" in refused(
        capsys, "reconstruct", "--ckpt_path", str(tmp_path / "saved")
    )
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((3, 4)))
    main(["reconstruct", "--ckpt_path", str(tmp_path / "saved"), "--input", str(tmp_path / "x.npy")])
    assert (tmp_path / "saved" / "reconstruct" / "errors.csv").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["a file", "written out"])
def test_saved_model_accepts_data_settings(run, tmp_path, capsys, form):
    aezoo.save_model(aezoo.load_model(run), tmp_path / "saved")
    path, rest = run.parents[2] / "data.npz", "val_fraction: 0.5, batch_size: 7"
    flags = ["reconstruct", "--ckpt_path", str(tmp_path / "saved"), "--data"]

    def data(text):
        if form == "written out":
            return text
        (tmp_path / "set.yaml").write_text(text)
        return str(tmp_path / "set.yaml")

    assert "does not record what it was trained on" in refused(capsys, *flags, data("{" + rest + "}"))
    main([*flags, data("{" + f"name: {path}, {rest}" + "}"), "--split=val"])
    assert "40 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "needs a trained model"),
        (["--ckpt_path"], "--ckpt_path needs a value"),
        (["--ckpt_path", "nowhere"], "no checkpoint at nowhere"),
        (["--ckpt_path", "RUN", "--n_show", "3"], "unknown flag --n_show, did you mean --n_shown?"),
        (["--ckpt_path", "RUN", "--n_shown", "many"], "n_shown takes int, got many"),
        (["--ckpt_path", "RUN", "--split", "exam"], "split"),
        (["--ckpt_path", "RUN", "--input", "nowhere.npy"], "--input nowhere.npy does not exist"),
        (["--ckpt_path", "RUN", "--device", "abacus"], "no device 'abacus'"),
        (["--ckpt_path", "RUN", "--batch_size", "0"], "batch_size"),
        (["--ckpt_path", "RUN", "--seed", "-1"], "seed"),
        (["--ckpt_path", "RUN", "--data.name", "digits"], "the data give 1x8x8"),
        (["--ckpt_path", "RUN", "--data", "digits"], "the data give 1x8x8"),
        (["--ckpt_path", "RUN", "--data.nmae", "digits"], "did you mean --data.name?"),
        (["--ckpt_path", "RUN", "--data.batch_size", "9"], "did you mean --batch_size?"),
        (["--ckpt_path", "RUN", "--data", "{nmae: digits}"], "unknown setting data.nmae, did you mean data.name?"),
    ],
)
def test_invalid_flags_are_refused_in_one_line(run, capsys, flags, words):
    assert words in refused(capsys, "reconstruct", *[str(run) if flag == "RUN" else flag for flag in flags])


def test_empty_input_file_is_refused(run, tmp_path, capsys):
    np.save(tmp_path / "none.npy", np.zeros((0, 1, 8, 8), np.float32))
    line = refused(capsys, "reconstruct", "--ckpt_path", str(run), "--input", str(tmp_path / "none.npy"))
    assert line.endswith("none.npy: x is empty (shape (0, 1, 8, 8)): give at least one sample")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signal_leaves_no_partial_output(run, tmp_path, monkeypatch, number):
    from aezoo.tasks import reconstruct

    def ended(*_):
        assert len(list(tmp_path.iterdir())) == 2
        monkeypatch.setattr(Path, "unlink", removed)
        os.kill(os.getpid(), number)

    def removed(path, **how):
        # a closing terminal sends it from the kernel and the shell, so the second may arrive during cleanup
        if number == signal.SIGHUP:
            os.kill(os.getpid(), number)
        unlink(path, **how)

    def afterwards(*_):
        pytest.fail("nobody listens")

    unlink = Path.unlink
    monkeypatch.setattr(reconstruct, "_picture", ended)
    before = signal.signal(number, afterwards)
    try:
        with pytest.raises(SystemExit) as end:
            main(["reconstruct", "--ckpt_path", str(run), f"--out={tmp_path}"])
        assert end.value.code == 128 + number and list(tmp_path.glob("[!.]*")) == []
        assert [path.name for path in tmp_path.iterdir()] == [".reconstruct"]  # partial results of the same command
        assert signal.getsignal(number) == afterwards
    finally:
        signal.signal(number, before)


def test_help_lists_command_flags_without_model(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["reconstruct", "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "--n_shown" in out and "--input" in out and "samples in each row" in out
    assert "data.batch_size" not in out


def test_scaling_is_saved_only_where_needed(tmp_path):
    for scale, there in (("standard", True), ("none", False)):
        data = aezoo.DataModule.from_arrays(np.random.default_rng(0).random((40, 3)), scale=scale)
        model = aezoo.create_model("dense_ae", (3,), likelihood="gaussian")
        trainer = Trainer(max_epochs=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path / scale)
        trainer.fit(model, datamodule=data)
        assert ("scaling" in data.state_dict()) == there


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "flags", "files"),
    [
        ("generate", ["--n", "5"], {"samples.npy", "samples.png"}),
        ("generate", ["--prior", "gaussian", "--interpolate", "true"], {"interpolation.npy", "interpolation.png"}),
        ("denoise", ["--corrupt", "gaussian:0.1"], {"denoised.npy", "denoised.png", "denoise.csv"}),
        ("detect", ["--normal", "1"], {"scores.csv", "detect.csv", "anomalies.png"}),
        ("embed", ["--nearest", "2"], {"codes.npy", "plane.csv", "plane.png", "accuracies.csv", "neighbours.csv"}),
        ("compress", ["--quality", "2"], {"samples.aez", "rate_distortion.csv", "rate_distortion.png"}),
    ],
)
def test_each_command_needs_only_a_run(run, tmp_path, command, flags, files):
    main([command, "--ckpt_path", str(run), f"--out={tmp_path}", *flags])
    assert files <= {path.name for path in tmp_path.iterdir()}
    if command == "compress":
        back = ["decompress", "--ckpt_path", str(run), "--input", str(tmp_path / "samples.aez")]
        main([*back, f"--out={tmp_path / 'back'}"])
        assert np.load(tmp_path / "back" / "samples.npy").shape == (8, 4)


@pytest.mark.slow
def test_input_file_settings_keep_training_data_available(run, tmp_path, capsys):
    with np.load(run.parents[2] / "data.npz") as file:
        np.save(tmp_path / "x.npy", file["x"][:9])
    command = ["detect", "--ckpt_path", str(run), "--input", str(tmp_path / "x.npy"), f"--out={tmp_path / 'out'}"]
    main([*command, "--data.on_error", "skip"])
    assert "not available" not in capsys.readouterr().err
    assert "--data.on_error skip does not apply to array" in refused(capsys, *command[:3], "--data.on_error", "skip")


@pytest.mark.slow
def test_model_works_without_its_training_data(run, tmp_path, capsys):
    folder = tmp_path / "moved"
    shutil.copytree(run, folder)
    with np.load(run.parents[2] / "data.npz") as file:
        np.save(tmp_path / "x.npy", file["x"][:9])
    hidden = run.parents[2] / "data.npz"
    hidden.rename(hidden.with_suffix(".hidden"))
    try:
        main(["detect", "--ckpt_path", str(folder), "--input", str(tmp_path / "x.npy")])
        assert "the training data are not available" in capsys.readouterr().err
        assert "no such file" in refused(capsys, "detect", "--ckpt_path", str(folder))
    finally:
        hidden.with_suffix(".hidden").rename(hidden)
    assert (folder / "detect" / "scores.csv").is_file()


@pytest.mark.slow
def test_run_without_test_split_needs_input(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((40, 4)))
    flags = ["--data", str(tmp_path / "x.npy"), "--data.test_fraction", "0", "--trainer.max_epochs", "1"]
    main(["fit", "--model", "vae", *flags, "--trainer.default_root_dir", str(tmp_path / "runs")])
    (run,) = (str(path.parent) for path in (tmp_path / "runs").rglob("config.yaml"))
    main(["generate", "--ckpt_path", run, f"--out={tmp_path}", "--n", "3"])  # which needs no data
    assert "3 samples from the model's own prior" in capsys.readouterr().out
    line = refused(capsys, "detect", "--ckpt_path", run, f"--out={tmp_path}")
    assert line.endswith("x.npy has no test split: use --split train or val, or give --input FILE")
    main(["detect", "--ckpt_path", run, f"--out={tmp_path}", "--split", "val", "--baselines", "false"])


@pytest.mark.parametrize(
    ("package", "extra", "command", "flags"),
    [
        ("pyarrow", "parquet", "reconstruct", {"table": "parquet"}),
        ("pyarrow", "parquet", "detect", {"table": "parquet"}),
        ("pyarrow", "parquet", "embed", {"table": "parquet"}),
        ("umap", "umap", "embed", {"method": "umap"}),
        ("zuko", "flows", "generate", {"prior": "maf"}),
    ],
)
def test_missing_package_is_reported_first(monkeypatch, package, extra, command, flags):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AezooError, match=rf"pip install '\.\[{extra}\]'"):
        getattr(aezoo, command)(aezoo.create_model("dense_ae", (4,)), torch.ones(1), **flags)


def test_dead_data_worker_is_reported_in_one_line(run, tmp_path, capsys, monkeypatch):
    def batches(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible")

    monkeypatch.setattr(SampleSet, "batches", batches)
    line = refused(capsys, "reconstruct", "--ckpt_path", str(run), f"--out={tmp_path}")
    assert "a data worker is killed by signal: Bus error" in line and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("error", [MemoryError("4 GiB"), torch.OutOfMemoryError("CUDA out of memory")])
def test_insufficient_memory_is_reported_in_one_line(run, tmp_path, capsys, monkeypatch, error):
    def batches(*_):
        raise error

    monkeypatch.setattr(SampleSet, "batches", batches)
    line = refused(capsys, "reconstruct", "--ckpt_path", str(run), f"--out={tmp_path}")
    assert f"out of memory ({error}): lower --batch_size" in line and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_missing_codec_is_reported_before_loading_model(monkeypatch, capsys, command):
    monkeypatch.setitem(sys.modules, "constriction", None)
    tables.constriction_stream.cache_clear()
    assert "pip install '.[codec]' in a checkout of aezoo" in refused(capsys, command, "--ckpt_path", "nowhere")
    with pytest.raises(SystemExit) as ended:
        main([command, "--ckpt_path", "nowhere", "--help"])
    assert ended.value.code == 0


@pytest.mark.slow
def test_generating_from_prior_needs_no_training_data(tmp_path, capsys):
    np.save(tmp_path / "data.npy", np.random.default_rng(0).random((60, 4)))
    flags = [
        "--data.name",
        str(tmp_path / "data.npy"),
        "--trainer.max_epochs=1",
        "--trainer.default_root_dir",
        str(tmp_path),
    ]
    main(["fit", "--model", "vae", *flags])
    (tmp_path / "data.npy").unlink()
    (folder,) = (path.parent for path in tmp_path.rglob("config.yaml"))
    capsys.readouterr()
    main(["generate", "--ckpt_path", str(folder), "--n", "3"])
    assert "no data are read, as the training data are not available" in capsys.readouterr().err
    assert np.load(folder / "generate" / "samples.npy").shape == (3, 4)
    with pytest.raises(SystemExit):
        main(["generate", "--ckpt_path", str(folder), "--prior", "gaussian"])
    assert "gaussian is fitted to the codes of training samples: give" in capsys.readouterr().err.splitlines()[1]
