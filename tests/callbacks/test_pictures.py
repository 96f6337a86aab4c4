"""Pictures: their contents, schedule and files, and that training does not change."""

import contextlib
import copy
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from callback_fakes import Fake, FakeSparse, FakeVAE, digits
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from quiet_trainer import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from aezoo.callbacks import Filters, LatentScatter, Projector, Reconstructions, Samples, Traversal
from aezoo.callbacks.base import Picture, picture_title, preserved_state
from aezoo.callbacks.filters import first_weights
from aezoo.callbacks.latents import principal_plane
from aezoo.callbacks.plotting import (
    is_image,
    mosaic_figure,
    planes,
    render,
    scatter_figure,
    tiles,
    value_range,
    write_png,
)
from aezoo.data.columns import Columns
from aezoo.errors import AezooError

SHAPES = [(30,), (2, 40), (7, 40), (1, 8, 8), (3, 9, 7), (5, 6, 6), (1, 6, 6, 6)]
FAKES = [Fake, FakeVAE, FakeSparse]


def all_pictures(every_n_epochs: int = 1) -> list[pl.Callback]:
    return [
        Reconstructions(n=4, every_n_epochs=every_n_epochs),
        Samples(n=8, every_n_epochs=every_n_epochs),
        Traversal(n_dims=3, n_pairs=2, side=5, every_n_epochs=every_n_epochs),
        LatentScatter(every_n_epochs=every_n_epochs),
        Filters(n=8, every_n_epochs=every_n_epochs),
        Projector(),
    ]


def pictures(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "run" / "0" / "pictures").glob("*")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fake", "shape"), [*((FakeVAE, shape) for shape in SHAPES), (Fake, (1, 8, 8)), (FakeSparse, (1, 8, 8))], ids=str
)
def test_every_kind_of_sample_and_model_is_drawn(fit, tmp_path, fake, shape):
    fit(fake(shape), *all_pictures(), max_epochs=1)
    expected = {"reconstructions", "traversal", "interpolation", "latents", "filters"}
    expected |= {"samples"} if fake is FakeVAE else set()
    expected |= {"atoms"} if fake is FakeSparse else set()
    assert pictures(tmp_path) == expected
    for name in expected:
        pixels = np.asarray(Image.open(tmp_path / "run" / "0" / "pictures" / f"{name}.png"))
        assert pixels.std() > 5, f"{name} is a blank sheet"


@pytest.mark.slow
def test_pictures_go_to_tensorboard_at_the_asked_epochs(fit, events, tmp_path):
    fit(FakeVAE((1, 8, 8), latent_dim=2), *all_pictures(every_n_epochs=2), max_epochs=5)
    found = events()
    tags = {"reconstructions", "samples", "traversal", "interpolation", "latent_map", "latents", "filters"}
    assert set(found.Tags()["images"]) == {f"pictures/{picture_title(tag)}" for tag in tags}
    for tag in tags:
        images = found.Images(f"pictures/{picture_title(tag)}")
        # three steps per epoch; after epochs 2, 4, and 5, the last
        assert [image.step for image in images] == [6, 12, 15]
        file = tmp_path / "run" / "0" / "pictures" / f"{tag}.png"
        assert images[-1].encoded_image_string == file.read_bytes()
        with Image.open(file) as picture:
            assert picture.size == (images[-1].width, images[-1].height)


class Clock:
    """A clock that only epochs and pictures advance."""

    def __init__(self, monkeypatch, picture: float = 0.4) -> None:
        self.now = 0.0
        monkeypatch.setattr("aezoo.callbacks.base.time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr("aezoo.callbacks.base.save_figure", lambda *_: self.wait(picture))

    def wait(self, seconds: float) -> None:
        self.now += seconds


class Epochs(pl.Callback):
    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def on_train_epoch_start(self, trainer, pl_module):
        self.clock.wait(self.seconds)


def drawn_in(fit, monkeypatch, picture: float, epochs: int, **options: int) -> list[int]:
    """The epochs in which two callbacks draw, with epochs of 2 s."""
    clock, epochs_of = Clock(monkeypatch, picture), ([], [])
    callbacks = Reconstructions(n=2, **options), Samples(n=2, **options)
    for callback, found in zip(callbacks, epochs_of, strict=True):

        def draw(*args, own=callback, found=found, draw=callback.draw):
            found.append(own._epoch + 1)
            return draw(*args)

        monkeypatch.setattr(callback, "draw", draw)
    fit(FakeVAE((1, 8, 8), latent_dim=2), Epochs(clock, 2.0), *callbacks, max_epochs=epochs)
    assert epochs_of[0] == epochs_of[1]
    return epochs_of[0]


def test_pictures_take_at_most_three_percent_of_the_time(fit, monkeypatch):
    # a round takes 0.8 s, as do the pictures at the end, so it is drawn after 27 s for each, at multiples of 5 epochs;
    # the first is assumed to take 0.5 s
    assert drawn_in(fit, monkeypatch, 0.4, 42) == [20, 40, 42]


@pytest.mark.slow
def test_quick_pictures_are_drawn_every_five_epochs(fit, monkeypatch):
    assert drawn_in(fit, monkeypatch, 0.1, 26) == [20, 25, 26]


def test_a_period_that_is_given_is_kept(fit, monkeypatch):
    assert drawn_in(fit, monkeypatch, 9.0, 5, every_n_epochs=2) == [2, 4, 5]


def test_zero_turns_pictures_off(fit, tmp_path):
    fit(Fake((1, 8, 8)), *all_pictures(every_n_epochs=0)[:-1], Projector(n=0))
    assert pictures(tmp_path) == set()


def test_early_stop_draws_pictures_of_last_weights(fit, events):
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    fit(Fake((1, 8, 8)), Stop(), Reconstructions(every_n_epochs=5), max_epochs=20)
    assert [image.step for image in events().Images("pictures/01 reconstructions")] == [6]


@pytest.mark.slow
@pytest.mark.parametrize("fake", FAKES)
def test_training_is_the_same_with_and_without_pictures(fit, fake):
    weights = []
    for callbacks in ([], all_pictures()):
        pl.seed_everything(3, verbose=False)
        model = fake((1, 6, 6), latent_dim=2)
        fit(model, *callbacks, max_epochs=3)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_drawing_restores_modes_and_random_streams():
    model = Fake((4,))
    model.train()
    model.encoder[1].eval()  # a frozen layer stays in evaluation mode
    before = [m.training for m in model.modules()]
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    with contextlib.suppress(RuntimeError), preserved_state(model):
        assert not any(m.training for m in model.modules())
        assert not torch.is_grad_enabled()
        torch.rand(7), np.random.rand(7)
        raise RuntimeError("inside")
    assert [m.training for m in model.modules()] == before
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


def test_failing_picture_warns_once_and_training_continues(fit, tmp_path):
    class Broken(Picture):
        calls = 0

        def draw(self, model, x, y):
            Broken.calls += 1
            raise ValueError("exotic")

    with pytest.warns(UserWarning, match="Broken drew no picture: ValueError: exotic") as caught:
        trainer = fit(Fake((4,)), Broken(1, 4), max_epochs=3)
    assert len([w for w in caught if "Broken" in str(w.message)]) == 1
    assert (trainer.current_epoch, Broken.calls) == (3, 3)
    assert pictures(tmp_path) == set()


def test_failed_write_keeps_old_picture_without_temporary_files(tmp_path, monkeypatch):
    path, pixels = tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8)
    write_png(path, pixels)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(AezooError, match=r"cannot write .*a\.png: disk full.* free disk space"):
        write_png(path, pixels + 9)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert np.asarray(Image.open(path)).max() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="files have no such modes there")
def test_picture_permissions_follow_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    finally:
        os.umask(before)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o640


@pytest.mark.slow
@pytest.mark.parametrize("logger", [False, "csv"])
def test_pictures_are_written_as_files_without_tensorboard(fit, tmp_path, logger):
    made = CSVLogger(tmp_path, name="csv", version="0") if logger else False
    fit(FakeVAE((1, 6, 6)), *all_pictures(), logger=made, max_epochs=1)
    folder = tmp_path / "csv" / "0" if logger else tmp_path
    assert (folder / "pictures" / "samples.png").is_file()
    assert not list(tmp_path.rglob("*tfevents*"))
    assert not list(tmp_path.rglob("projector_config.pbtxt"))


def test_fast_dev_run_draws_nothing(fit, tmp_path):
    fit(FakeVAE((1, 6, 6)), *all_pictures(), fast_dev_run=2)
    assert not list(tmp_path.rglob("*.png"))


def test_samples_are_fixed_and_independent_of_sanity_check(fit):
    seen = []

    class Spy(Picture):
        def draw(self, model, x, y):
            seen.append((x, y))
            return {}

    fit(Fake((4,)), Spy(1, 20), max_epochs=3, num_sanity_val_steps=1)
    x, y = digits((4,)).tensors
    assert len(seen) == 3
    for drawn_x, drawn_y in seen:
        assert torch.equal(drawn_x, x[:20])
        assert torch.equal(drawn_y, y[:20])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "one", "float label"])
def test_pictures_support_batches_without_labels(tmp_path, kind):
    x = digits((1, 6, 6)).tensors[0]
    data = {"tensor": x, "one": TensorDataset(x), "float label": TensorDataset(x, torch.rand(len(x)))}[kind]

    class Plain(Fake):
        def training_step(self, batch, batch_idx):
            return self.loss(batch if isinstance(batch, torch.Tensor) else batch[0])["loss"]

        def validation_step(self, batch, batch_idx):
            pass

    trainer = quiet_trainer(max_epochs=1, default_root_dir=tmp_path, callbacks=all_pictures())
    trainer.fit(Plain((1, 6, 6)), DataLoader(data, 16), DataLoader(data, 16))
    assert (tmp_path / "pictures" / "latents.png").is_file()


@pytest.mark.slow
def test_bfloat16_models_are_drawn(fit, tmp_path):
    fit(FakeVAE((1, 6, 6), latent_dim=2), *all_pictures(), precision="bf16-true", max_epochs=1)
    assert "latent_map" in pictures(tmp_path)


# ---- reconstructions -------------------------------------------------------------------------------------------------


def drawn(monkeypatch) -> list[list[np.ndarray]]:
    """The tiles passed to the mosaic, instead of pixels."""
    rows = []
    monkeypatch.setattr(
        "aezoo.callbacks.plotting.mosaic_figure",
        lambda r, labels=(), *a, **k: rows.append((list(labels), r)) or mosaic_figure(r, labels, *a, **k),
    )
    return rows


def test_reconstruction_rows_show_original_output_and_error(fit, monkeypatch):
    rows = drawn(monkeypatch)
    model = Fake((1, 6, 6))
    fit(model, Reconstructions(n=5, every_n_epochs=1), max_epochs=1)
    (labels, (original, output, error)) = rows[0]
    assert [label.split(" ")[0] for label in labels] == ["original", "output", "error"]
    x = digits((1, 6, 6)).tensors[0][:5]
    with torch.no_grad():
        x_hat = model.eval()(x)
    np.testing.assert_allclose(original[..., 0], x[:, 0], atol=1e-6)
    np.testing.assert_allclose(output[..., 1], x_hat[:, 0], atol=1e-6)
    where = np.unravel_index(int((x_hat - x).abs().argmax()), x.shape)
    assert error.sum(-1).reshape(5, 6, 6)[where[0], where[2], where[3]] == error.sum(-1).max()


def test_a_denoiser_is_shown_the_corrupted_input(fit, monkeypatch):
    rows = drawn(monkeypatch)
    model = Fake((1, 6, 6), denoising=True)
    fit(model, Reconstructions(n=5, every_n_epochs=1), max_epochs=2)
    labels, (original, corrupted, *_) = rows[0]
    assert labels[1] == "corrupted"
    assert np.abs(corrupted - original).mean() > 0.05
    np.testing.assert_array_equal(corrupted, rows[1][1][1])  # the same noise in every epoch


def test_reconstruction_rows_can_be_selected(fit, monkeypatch):
    rows = drawn(monkeypatch)
    fit(Fake((1, 6, 6), denoising=True), Reconstructions(every_n_epochs=1, rows=("original", "output")), max_epochs=1)
    assert rows[0][0] == ["original", "output"]
    assert [len(row) for row in rows[0][1]] == [10, 10]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reconstructions(rows=("original", "ouput")), "rows must be some of original, corrupted, output"),
        (lambda: Reconstructions(n=0), "Reconstructions.n must be at least 1, got 0"),
        (lambda: Samples(every_n_epochs=-1), "Samples.every_n_epochs must be 0"),
        (lambda: Traversal(steps=1), "Traversal.steps must be at least 2"),
        (lambda: Traversal(span=0.0), "Traversal.span must be above 0"),
        (lambda: LatentScatter(n=1), "LatentScatter.n must be at least 3"),
        (lambda: Projector(n=-1), "Projector.n must be at least 0"),
    ],
)
def test_bad_values_are_refused_in_one_line(make, message):
    with pytest.raises(AezooError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


# ---- the latent space ------------------------------------------------------------------------------------------------


class Known(FakeVAE):
    """Dimension 1 has the largest KL; the decoder writes the code into the first pixels."""

    def __init__(self):
        super().__init__((1, 4, 4), latent_dim=2)
        self.decoded = []

    def posterior(self, x):
        mu = torch.stack([x.flatten(1)[:, 0] * 0.1, x.flatten(1)[:, 5] * 3], 1)
        return mu, torch.zeros_like(mu)

    def decode(self, z):
        self.decoded.append(z)
        return torch.cat([z, torch.zeros(len(z), 14)], 1).reshape(-1, 1, 4, 4)


def traversed(model: pl.LightningModule, x: torch.Tensor, **options) -> list[torch.Tensor]:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    trainer.strategy.connect(model)
    callback = Traversal(**options)
    callback._trainer = trainer
    callback.draw(model, x, None)
    return [z.detach() for z in model.decoded]


def test_traversal_varies_dimensions_by_kl_order():
    model, x = Known(), torch.rand(8, 1, 4, 4)
    walks, lines, grid = traversed(model, x, steps=5, n_pairs=2, side=3)
    first = model.posterior(x[:1])[0][0]
    assert torch.allclose(walks[:5, 1], torch.linspace(-3, 3, 5))
    assert torch.allclose(walks[:5, 0], first[0].expand(5))
    assert torch.allclose(walks[5:, 0], torch.linspace(-3, 3, 5))
    assert torch.allclose(walks[5:, 1], first[1].expand(5))
    codes = model.posterior(x)[0]
    assert torch.allclose(lines[2], (codes[0] + codes[1]) / 2)
    assert torch.allclose(lines[9], codes[3])
    edge = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(0.98))
    assert torch.allclose(grid[0], torch.stack([-edge, edge]))  # top left: lowest z0, highest z1
    assert torch.allclose(grid[4], torch.zeros(2), atol=1e-6)


def test_traversal_without_prior_uses_code_statistics():
    class Deterministic(Known):
        normal_prior = False

        def encode(self, x):
            return x.flatten(1)[:, :2] * torch.tensor([1.0, 4.0])

    model, x = Deterministic(), torch.rand(50, 1, 4, 4)
    walks, _, grid = traversed(model, x, steps=3, n_pairs=1, side=3)
    codes = model.encode(x)
    assert torch.allclose(walks[:3, 1], torch.linspace(float(codes[:, 1].min()), float(codes[:, 1].max()), 3))
    assert torch.allclose(grid[4], codes.median(0).values, atol=0.1)


def test_principal_plane_is_pca():
    from sklearn.decomposition import PCA

    codes = torch.randn(300, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.tensor([5, 3, 1, 1, 1, 1.0])
    )
    points, names = principal_plane(codes + 7)
    reference = PCA(2).fit(codes.numpy())
    expected = torch.tensor(reference.transform(codes.numpy()))
    assert torch.allclose(points.abs(), expected.abs(), atol=1e-3)
    assert names[0] == f"PC 1 ({100 * reference.explained_variance_ratio_[0]:.0f} %)"
    assert torch.equal(principal_plane(codes[:, :2])[0], codes[:, :2])
    assert principal_plane(codes[:, :1])[0].shape == (300, 2)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 9), (30,)], ids=str)
def test_projector_files(fit, tmp_path, shape):
    from google.protobuf import text_format
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    model, (x, y) = Fake(shape), digits(shape).tensors
    for epochs in (1, 2):  # the second run overwrites the files of the first
        fit(model, Projector(n=30), max_epochs=epochs)
    folder = tmp_path / "run" / "0"
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["projector"]
    (info,) = text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig()).embeddings
    assert info.tensor_name == "codes at step 6"
    codes = model.eval().encode(x[:30]).detach().numpy()
    assert np.loadtxt(folder / info.tensor_path, delimiter="\t") == pytest.approx(codes, abs=1e-4)
    assert (folder / info.metadata_path).read_text().split() == [str(label) for label in y[:30].tolist()]
    if is_image(shape):
        side = max(shape[1:])
        assert list(info.sprite.single_image_dim) == [side, side]
        sheet = np.asarray(Image.open(folder / info.sprite.image_path)) / 255
        assert sheet.shape == (6 * side, 6 * side, 3)
        # sample 8 is the third of the second row
        found = sheet[side : side + shape[1], 2 * side : 2 * side + shape[2]].transpose(2, 0, 1)
        assert found == pytest.approx(np.broadcast_to(x[8].numpy(), found.shape), abs=0.003)
    else:
        assert not info.HasField("sprite")


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_projector_pads_codes_to_three_dimensions(fit, tmp_path, latent_dim):
    fit(Fake((6,), latent_dim=latent_dim), Projector(n=30))
    codes = np.loadtxt(tmp_path / "run" / "0" / "projector" / "codes.tsv")
    assert codes.shape == (30, 3)
    assert (codes.std(0) > 0).tolist() == [column < latent_dim for column in range(3)]


def test_tensorboard_offers_the_projector(fit, tmp_path):
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin

    fit(Fake((1, 8, 8)), Projector(n=30))
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    plugin = ProjectorPlugin(TBContext(logdir=str(tmp_path), data_provider=provider, multiplexer=multiplexer))
    plugin._update_configs()
    assert [len(config.embeddings) for config in plugin._configs.values()] == [1]


# ---- filters ---------------------------------------------------------------------------------------------------------


def test_first_weights_of_linear_and_convolutional_encoders():
    model = Fake((1, 6, 6))
    assert torch.equal(first_weights(model), model.encoder[2].weight.reshape(4, 1, 6, 6))
    model.encoder = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten(), nn.Linear(80, 4))
    assert first_weights(model).shape == (5, 1, 3, 3)
    model.encoder = nn.Sequential(nn.Conv2d(1, 5, 1))
    assert first_weights(model) is None
    model.encoder = nn.Sequential(nn.Linear(6, 4))
    assert first_weights(model) is None


def test_filters_of_tables_are_bars_by_column(monkeypatch):
    monkeypatch.setattr(
        Filters, "columns", Columns(("a", "b", "c"), {"offset": torch.ones(3), "factor": torch.full((3,), 9.0)}, 3)
    )
    monkeypatch.setattr(Filters, "caption", "", raising=False)
    axes = Filters()._figure(torch.tensor([[0.5, -1.0, 2.0]]), "unit").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert [text.get_text().strip() for text in axes.texts] == ["0.5", "-1", "2"]


def test_linear_decoder_atoms_match_dictionary(monkeypatch):
    class Linear(FakeSparse):
        def decode(self, z):
            return self.decoder(z)

    model = Linear((1, 6, 6), latent_dim=3)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    trainer.strategy.connect(model)
    callback, shown = Filters(), []
    callback._trainer = trainer
    monkeypatch.setattr(callback, "_figure", lambda weights, name: shown.append((name, weights)))
    x = torch.rand(20, 1, 6, 6)
    with torch.no_grad():
        callback.draw(model.eval(), x, None)
    name, atoms = shown[1]
    use = model.encode(x).mean(0).argsort(descending=True)
    assert name == "atom"
    assert torch.allclose(atoms.flatten(1), model.decoder[0].weight.T[use], atol=1e-6)


# ---- drawing ---------------------------------------------------------------------------------------------------------


def test_mosaic_places_tiles_in_order():
    x = torch.zeros(6, 1, 4, 4)
    x[4] = 1.0
    rgb = tiles(x, (0.0, 1.0))
    pixels = render(mosaic_figure([rgb[:3], rgb[3:]], gap=0))
    grey = pixels[12:-12, 12:-12].mean(-1)
    blocks = grey.reshape(2, grey.shape[0] // 2, 3, grey.shape[1] // 3).mean((1, 3))
    assert blocks[1, 1] > 250
    assert np.delete(blocks.flatten(), 4).max() < 5


def test_planes_and_ranges():
    volume = torch.arange(27.0).reshape(1, 1, 3, 3, 3)
    assert np.array_equal(planes(volume)[0, ..., 0], volume[0, 0, 1])
    assert planes(torch.rand(2, 5, 4, 4)).shape == (2, 4, 4, 1)
    assert planes(torch.rand(2, 3, 4, 4)).shape == (2, 4, 4, 3)
    assert planes(torch.rand(2, 9, 4)).shape == (2, 9, 4, 1)
    assert np.isfinite(planes(torch.full((1, 1, 2, 2), torch.nan))).all()
    assert value_range(torch.tensor([0.2, 0.9])) == (0.0, 1.0)
    assert value_range(torch.tensor([-2.0, 3.0])) == (-2.0, 3.0)


def test_drawing_leaves_no_figure_behind():
    from matplotlib import pyplot

    assert render(scatter_figure(torch.rand(9, 2), None, ("a", "b"))).shape == (540, 640, 3)
    assert pyplot.get_fignums() == []


def test_pictures_can_be_copied_and_pickled():
    import pickle

    for callback in all_pictures():
        pickle.loads(pickle.dumps(copy.deepcopy(callback)))
