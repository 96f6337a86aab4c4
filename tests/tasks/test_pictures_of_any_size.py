"""Commands on images of several sizes: each is processed and returned in its own size."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

import aezoo
from aezoo.cli.main import main
from aezoo.errors import AezooError
from aezoo.io import checkpoint
from tests.tasks.test_codec_container import put_together, take_apart

SIZES = ((20, 12), (12, 20), (16, 16), (20, 12))
MAP = {"latent_map": True, "hidden_dims": (4, 8), "latent_dim": 3}
CODES = {
    "learned": ("mean_scale_hyperprior", {"hidden_dims": (4, 8), "latent_dim": 3}, {}),
    "learned, in tiles": ("mean_scale_hyperprior", {"hidden_dims": (4, 8), "latent_dim": 3}, {"tile": 8}),
    "indices": ("vq_vae", {"net": "conv", "hidden_dims": (4, 8), "codebook_size": 16}, {}),
    "lossy": ("conv_ae", MAP, {}),
    "lossy, in tiles": ("conv_ae", MAP, {"tile": 8, "quality": 5.0}),
    "lossless": ("autoencoder_kl", {"hidden_dims": (4, 8), "likelihood": "discretised_logistic"}, {}),
}


def made(case):
    name, settings, _ = CODES[case]
    torch.manual_seed(0)
    model = aezoo.create_model(name, (3, 8, 8), **settings).eval()
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return model


def pictures():
    torch.manual_seed(1)
    return [torch.randint(0, 256, (3, *size)).float() / 255 for size in SIZES]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "photos"
    path.mkdir()
    for i, x in enumerate(pictures()):
        Image.fromarray((x * 255).byte().permute(1, 2, 0).numpy()).save(path / f"{i}.png")
    return path


def image_data(path):
    with Image.open(path) as image:
        return np.array(image)


@pytest.mark.slow
def test_reconstruct_and_denoise_keep_each_size():
    model, x = made("lossy"), pictures()
    found = aezoo.reconstruct(model, x)
    noise = aezoo.denoise(model, x, corrupt="gaussian:0.1", baselines=False)
    for i, picture in enumerate(x):
        with torch.no_grad():
            expected = model(picture[None])[0]
        np.testing.assert_allclose(found.x_hat[i], expected, atol=1e-6)
        assert found.mse[i] == pytest.approx(float((expected - picture).square().mean()), rel=1e-4)
        assert noise.x_hat[i].shape == picture.shape
    assert "4 samples of several sizes" in repr(found) and found.figure is not None
    assert noise.rows[0]["mse"] == pytest.approx(
        sum(float((torch.from_numpy(y) - p).square().sum()) for y, p in zip(noise.x_hat, x, strict=True))
        / sum(p.numel() for p in x), rel=1e-4,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CODES)
def test_decompress_gives_each_picture_back_in_its_size(case, tmp_path):
    model, x = made(case), pictures()
    result = aezoo.compress(model, x, compare=False, out=str(tmp_path), **CODES[case][2])
    assert (
        result.mode == case.partition(",")[0] and (tmp_path / "samples.aez").stat().st_size == result.rows[-1]["bytes"]
    )
    found = aezoo.decompress(model, str(tmp_path / "samples.aez"))
    assert found.same and [part.shape for part in found.x] == [tuple(part.shape) for part in x]
    if case == "lossless":
        assert all(np.array_equal(a, (b * 255).round()) for a, b in zip(found.x, x, strict=True))
        return
    error = sum(float((torch.from_numpy(a) - b).square().sum()) for a, b in zip(found.x, x, strict=True))
    mse = error / sum(part.numel() for part in x)
    assert result.rows[0]["psnr"] == pytest.approx(-10 * np.log10(mse), abs=1e-4)
    if case in ("learned", "indices"):  # exactly the model's reconstruction
        with torch.no_grad():
            assert all(np.array_equal(a, model(b[None])[0]) for a, b in zip(found.x, x, strict=True))


@pytest.mark.slow
def test_a_finer_code_is_closer_to_the_reconstruction_and_larger(tmp_path):
    model, x = made("lossy"), pictures()
    result = aezoo.compress(model, x, quality=(1.0, 5.0), compare=False, out=str(tmp_path))
    assert result.rows[0]["bytes"] < result.rows[1]["bytes"]
    coarse, fine = (
        max(
            float((torch.from_numpy(a) - model(b[None])[0].detach()).abs().max())
            for a, b in zip(found.x, x, strict=True)
        )
        for found in (aezoo.decompress(model, str(tmp_path / f"samples-q{q}.aez")) for q in (1, 5))
    )
    assert 8 * fine < coarse


@pytest.mark.slow
def test_command_line_takes_a_folder_of_several_sizes(folder, tmp_path, capsys):
    saved = str(aezoo.save_model(made("learned"), tmp_path / "model"))
    main(["reconstruct", "--ckpt_path", saved, "--input", str(folder), "--out", str(tmp_path / "r"), "--tile", "8"])
    rows = list(csv.DictReader((tmp_path / "r/errors.csv").read_text().splitlines()))
    assert [row["file"] for row in rows] == [str(folder / f"{i}.png") for i in range(4)]
    main(["compress", "--ckpt_path", saved, "--input", str(folder), "--out", str(tmp_path / "c"), "--compare", "false"])
    assert "bits_per_pixel" in capsys.readouterr().out
    file = str(tmp_path / "c/samples.aez")
    main(["decompress", "--ckpt_path", saved, "--input", file, "--out", str(tmp_path / "d")])
    for i, size in enumerate(SIZES):
        decoded, reconstructed = (
            image_data(tmp_path / name) for name in (f"d/{i:06d}.png", f"r/reconstructions/{i:06d}.png")
        )
        assert decoded.shape == (*size, 3)
        assert np.abs(decoded.astype(int) - reconstructed).max() <= 1  # whole and in tiles


@pytest.mark.slow
def test_files_keep_their_sizes_though_training_resized(folder, tmp_path, capsys, monkeypatch):
    model = made("lossy")
    trained = {"settings": {"name": str(folder), "size": 8}, "folder": tmp_path, "home": None}
    monkeypatch.setattr(checkpoint, "load_run", lambda path: (model, trained))
    argv = ["reconstruct", "--ckpt_path", "x", "--input", str(folder), "--out", str(tmp_path / "r"), "--n_shown", "0"]
    main(argv)
    assert "samples keep their own sizes; --data.size 8 resizes them as in training" in capsys.readouterr().err
    assert image_data(tmp_path / "r/reconstructions/000001.png").shape == (12, 20, 3)
    main([*argv, "--data.size", "8"])
    assert np.load(tmp_path / "r/reconstructions.npy").shape == (4, 3, 8, 8)


def test_one_size_is_asked_for_where_the_model_has_one(folder, tmp_path, capsys):
    saved = str(aezoo.save_model(aezoo.create_model("conv_ae", (3, 8, 8), hidden_dims=(2,)), tmp_path / "model"))
    with pytest.raises(SystemExit):
        main(["reconstruct", "--ckpt_path", saved, "--input", str(folder)])
    assert "images of 3 sizes" in (said := capsys.readouterr().err) and "--data.size 12" in said
    with pytest.raises(AezooError, match="conv_ae was built for samples of 8x8 and does not take 20x12"):
        aezoo.reconstruct(aezoo.create_model("conv_ae", (3, 8, 8), hidden_dims=(2,)), pictures())
    with pytest.raises(AezooError, match="the model expects samples of shape 3x8x8, the data give 3x20x12"):
        aezoo.detect(made("lossy"), pictures())


def test_only_sizes_of_pictures_may_differ():
    with pytest.raises(AezooError, match="only the sizes of pictures may differ"):
        aezoo.reconstruct(made("lossy"), [torch.rand(3, 8, 8), torch.rand(1, 8, 9)])


# ---- hostile files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written():
    model = made("lossy")
    return model, aezoo.compress(model, pictures(), compare=False).contents[0]


def sides(n, k):
    return n.to_bytes(4, "little") + k.to_bytes(4, "little")


@pytest.mark.parametrize(
    ("forge", "said"),
    [
        (
            lambda header, frames: frames[1].__setitem__(2, sides(2**31, 2**31) + frames[1][2][8:]),
            "more than 268,435,456",
        ),
        (lambda header, frames: frames[1].__setitem__(2, sides(0, 12) + frames[1][2][8:]), "a picture has no size"),
        (lambda header, frames: frames[1].__setitem__(2, b"\x14\0"), "do not add up"),
        (lambda header, frames: frames[1].__setitem__(2, sides(24, 12) + frames[1][2][8:]), "refused"),
        (lambda header, frames: frames[1].__setitem__(0, 2), "empty or larger"),
        (lambda header, frames: header.update(own_sizes=2), "own_sizes is 2"),
        (lambda header, frames: header.update(tile=-1), "tile is -1"),
        (lambda header, frames: header.pop("own_sizes"), "refused"),
        (lambda header, frames: header.update(kind="csv"), "are not a table"),
    ],
)
def test_forged_sizes_are_refused_in_one_line(written, tmp_path, forge, said):
    model, content = written
    header, frames = take_apart(content)
    forge(header, frames)
    (tmp_path / "forged.aez").write_bytes(put_together(header, frames))
    with pytest.raises(AezooError, match=said) as refused:
        aezoo.decompress(model, str(tmp_path / "forged.aez"))
    assert "\n" not in str(refused.value)


def test_a_file_larger_than_allowed_is_refused_before_memory(written, tmp_path):
    model, content = written
    header, frames = take_apart(content)
    frames[1][2] = sides(9000, 9000) + frames[1][2][8:]
    (tmp_path / "forged.aez").write_bytes(put_together(header, frames))
    with pytest.raises(AezooError, match="more than the limit of 1,000,000"):
        aezoo.decompress(model, str(tmp_path / "forged.aez"), max_bytes=10**6)


def test_files_of_one_size_stay_as_they_were(written):
    model, _ = written
    header, _ = take_apart(aezoo.compress(model, torch.rand(3, 3, 8, 8), compare=False).contents[0])
    assert not {"own_sizes", "tile", "kind"} & header.keys()
