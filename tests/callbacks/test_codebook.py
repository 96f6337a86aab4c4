"""Codebook pictures: counts over the whole set and all ranks, indices drawn at their positions, projector files."""

import json
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from callback_fakes import Fake, FakeVAE, digits
from google.protobuf import text_format
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.colors import hsv_to_rgb
from PIL import Image
from quiet_trainer import quiet_trainer
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import aezoo
from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.callbacks import Codebook, Projector, is_enabled
from aezoo.callbacks.base import picture_title
from aezoo.callbacks.codebook import find_quantiser, level_codes
from aezoo.callbacks.latents import write_embedding
from aezoo.callbacks.plotting import count_cells, count_figure, index_colours, index_grid, mosaic_figure, render
from aezoo.cli import lightning_cli
from aezoo.cli.main import main
from aezoo.errors import AezooError
from aezoo.quantisers.base import Quantiser
from aezoo.quantisers.fsq import FSQ
from aezoo.quantisers.grouped_vq import GroupedVQ
from aezoo.quantisers.lfq import LFQ
from aezoo.quantisers.residual_fsq import ResidualFSQ
from aezoo.quantisers.residual_vq import ResidualVQ
from aezoo.quantisers.vq import VQ

SIZES = (16, 5)
PICTURES = {"codebook_usage", "codebook_frequencies", "codebook_indices"}


class Indexed(Fake):
    """Indices that depend on the data only: the brightness of 2x2 pixels, and its last digit in base 5."""

    discrete_code = True

    def __init__(self, input_shape: tuple[int, ...] = (1, 8, 8), sizes: tuple[int, ...] = SIZES):
        super().__init__(input_shape)
        self.sizes, self.encoded = sizes, 0

    def encode_indices(self, x: Tensor) -> Tensor:
        self.encoded += 1
        assert not self.training
        first = (torch.nn.functional.avg_pool2d(x, 2) * 15).long()
        return torch.cat([first, first % 5], 1)[:, : len(self.sizes)]

    def codebooks(self, indices: Tensor) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
        return {"": (indices, self.sizes)}


def by_hand(x: Tensor) -> list[np.ndarray]:
    """The counts of the codes of both codebooks."""
    blocks = x.numpy().reshape(len(x), 4, 2, 4, 2).mean((2, 4))
    first = np.floor(blocks * 15).astype(int).ravel()
    return [np.array([(first == k).sum() for k in range(16)]), np.array([(first % 5 == k).sum() for k in range(5)])]


def pictures(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "run" / "0" / "pictures").glob("codebook*")}


@pytest.fixture
def counted(monkeypatch):
    """The counts that are drawn."""
    found = []
    monkeypatch.setattr(
        "aezoo.callbacks.plotting.count_figure",
        lambda counts, *a, **k: found.append([c.numpy().copy() for c in counts]) or count_figure(counts, *a, **k),
    )
    return found


@pytest.fixture
def rows(monkeypatch):
    """The labels and tiles of the index pictures."""
    found = []
    monkeypatch.setattr(
        "aezoo.callbacks.plotting.mosaic_figure",
        lambda r, labels=(), *a, **k: found.append((list(labels), r)) or mosaic_figure(r, labels, *a, **k),
    )
    return found


# ---- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_counts_cover_whole_validation_set(fit, counted, tmp_path):
    # batches of 16, 16 and 13
    model = Indexed()
    fit(model, Codebook(every_n_epochs=1), n=45, max_epochs=2)
    expected = by_hand(digits((1, 8, 8), 45).tensors[0])
    assert expected[0].sum() == 45 * 16 and (expected[0] == 0).any() and (expected[0] > 0).sum() > 5
    assert len(counted) == 2
    for counts in counted:
        for level in (0, 1):
            np.testing.assert_array_equal(counts[level], expected[level])
    assert pictures(tmp_path) == PICTURES
    # not counting the sanity check
    assert model.encoded == 2 * (3 + 1 + 1)


@pytest.mark.slow
def test_histogram_shows_codes_sorted_by_use(fit, events):
    fit(Indexed(), Codebook(every_n_epochs=1), n=45, max_epochs=2)
    found = events()
    assert set(found.Tags()["histograms"]) == {"pictures/codebook use_0", "pictures/codebook use_1"}
    expected = np.sort(by_hand(digits((1, 8, 8), 45).tensors[0])[0])[::-1]
    assert [event.step for event in found.Histograms("pictures/codebook use_0")] == [3, 6]
    histogram = found.Histograms("pictures/codebook use_0")[-1].histogram_value
    np.testing.assert_array_equal(histogram.bucket, expected)
    assert list(histogram.bucket_limit) == list(range(1, 17))
    assert (histogram.min, histogram.max, histogram.num) == (0, (expected > 0).sum(), expected.sum())
    middles = np.repeat(np.arange(16) + 0.5, expected)
    assert histogram.sum == middles.sum()
    assert histogram.sum_squares == (middles**2).sum()


def test_large_codebook_histogram_buckets_keep_total(tmp_path):
    from aezoo.callbacks.codebook import log_rank_histogram

    class Writer:
        def add_histogram_raw(self, *given):
            self.given = given

    counts, writer = torch.randint(0, 9, (4321,), generator=torch.Generator().manual_seed(0)), Writer()
    board = TensorBoardLogger(tmp_path)
    board._experiment = writer
    log_rank_histogram(SimpleNamespace(loggers=[board], global_step=7, is_global_zero=True), "a", counts)
    *_, limits, bars, step = writer.given
    assert step == 7 and len(bars) == 240 and limits[-1] == 4321
    ordered = np.sort(counts.numpy())[::-1]
    np.testing.assert_array_equal(bars, [part.sum() for part in np.split(ordered, limits[:-1])])


@pytest.mark.slow
def test_usage_scalars_are_not_logged_by_callback(fit, events):
    fit(Indexed(), Codebook(every_n_epochs=1), max_epochs=1)
    assert not [tag for tag in events().Tags()["scalars"] if "usage" in tag or "perplexity" in tag]


class Shards(DataLoader):
    """Each rank has a share of the samples, and the batches that it needs."""

    def __init__(self, data, shares):
        super().__init__(data, 8)
        self.shares = shares

    def __iter__(self):
        rank = torch.distributed.get_rank()
        x, y = self.dataset.tensors
        start, end = sum(self.shares[:rank]), sum(self.shares[: rank + 1])
        return iter([(x[i : min(i + 8, end)], y[i : min(i + 8, end)]) for i in range(start, end, 8)])

    def __len__(self):
        return -(-self.shares[torch.distributed.get_rank()] // 8)


class Written(Codebook):
    """Writes its counts to a file per rank."""

    def on_validation_epoch_end(self, trainer, pl_module):
        super().on_validation_epoch_end(trainer, pl_module)
        counts = [[c.tolist() for c in codebook] for codebook in self._counts.values()]
        (Path(trainer.default_root_dir) / f"{trainer.global_rank}.json").write_text(json.dumps(counts))


class Fails(Indexed):
    """Cannot encode in the second process."""

    def encode_indices(self, x):
        if self.global_rank == 1 and len(x) > 1:
            raise RuntimeError("exotic")
        return super().encode_indices(x)


def on_two_ranks(folder: Path, model: pl.LightningModule, shares: tuple[int, int]) -> list[list[list[list[int]]]]:
    settings = {"max_epochs": 1, "use_distributed_sampler": False, "default_root_dir": folder}
    trainer = quiet_trainer(devices=2, strategy="ddp_fork", **settings, callbacks=[Written(every_n_epochs=1)])
    data = digits((1, 8, 8), 45)
    trainer.fit(model, DataLoader(data, 9), Shards(data, shares))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_counts_are_summed_over_ranks_in_one_exchange(fit, monkeypatch, counted):
    asked = []

    def of_two(self, tensor, *given, **options):
        if tensor.numel() > 1:  # Lightning's own reductions have one element
            asked.append((len(tensor), options))
        return 2 * tensor

    monkeypatch.setattr("lightning.pytorch.strategies.SingleDeviceStrategy.reduce", of_two)
    fit(Indexed(), Codebook(every_n_epochs=2), n=45, max_epochs=2)
    # all codes, and a flag of failed ranks
    assert asked == [(16 + 5 + 1, {"reduce_op": "sum"})]
    np.testing.assert_array_equal(counted[0][0], 2 * by_hand(digits((1, 8, 8), 45).tensors[0])[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:It is recommended to use .*sync_dist=True")  # forks have the tests' filters
def test_two_processes_count_as_one(tmp_path):
    expected = [[counts.tolist() for counts in by_hand(digits((1, 8, 8), 45).tensors[0])]]
    # six batches and one
    assert on_two_ranks(tmp_path, Indexed(), (42, 3)) == [expected, expected]
    # pictures by rank zero only
    assert {path.stem for path in (tmp_path / "pictures").glob("codebook*")} == PICTURES


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:It is recommended to use .*sync_dist=True")  # forks have the tests' filters
def test_failing_rank_does_not_block_other_rank(tmp_path):
    assert on_two_ranks(tmp_path, Fails(), (25, 20)) == [[], []]
    assert {path.stem for path in (tmp_path / "pictures").glob("codebook*")} == {"codebook_indices"}


# ---- schedule --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_validation_is_encoded_once_when_a_picture_is_due(fit, events):
    model = Indexed()
    fit(model, Codebook(every_n_epochs=2), max_epochs=5)
    # three batches, one blank sample to find the codebooks, and the drawn samples; in epochs 2, 4 and the last
    assert model.encoded == 3 * (3 + 1 + 1)
    assert set(events().Tags()["images"]) == {f"pictures/{picture_title(name)}" for name in PICTURES}
    for name in PICTURES:
        assert [image.step for image in events().Images(f"pictures/{picture_title(name)}")] == [6, 12, 15]


def test_max_steps_end_in_all_pictures(fit, events):
    fit(Indexed(), Codebook(every_n_epochs=5), max_epochs=-1, max_steps=6)
    for name in PICTURES:
        assert [image.step for image in events().Images(f"pictures/{picture_title(name)}")] == [6]


@pytest.mark.slow
def test_early_stop_draws_last_weights_and_usage(fit, events):
    stop = EarlyStopping("val/loss", patience=2, min_delta=1e9)
    fit(Indexed(), Codebook(every_n_epochs=2), stop, max_epochs=20)
    assert [image.step for image in events().Images("pictures/08 codebook indices")] == [6, 9]
    assert [image.step for image in events().Images("pictures/09 codebook usage")] == [6]


@pytest.mark.parametrize("options", [{"fast_dev_run": 2}, {"off": True}, {"model": Fake}, {"model": FakeVAE}], ids=str)
def test_disabled_or_unsupported_callback_draws_nothing(fit, tmp_path, options):
    model, period = options.pop("model", Indexed)((1, 8, 8)), 0 if options.pop("off", False) else 1
    callback = Codebook(every_n_epochs=period)
    assert is_enabled(callback) == (period > 0)
    fit(model, callback, **options)
    assert getattr(model, "encoded", 0) == 0
    assert not list(tmp_path.rglob("codebook*")) and not list(tmp_path.rglob("projector*"))


def test_without_validation_nothing_is_drawn(tmp_path):
    trainer = quiet_trainer(max_epochs=1, default_root_dir=tmp_path, callbacks=[Codebook(every_n_epochs=1)])
    model = Indexed()
    model.validation_step = None
    trainer.fit(model, DataLoader(digits((1, 8, 8)), 16))
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.slow
def test_training_is_the_same_with_and_without(fit):
    weights = []
    for callbacks in ([], [Codebook(every_n_epochs=1)]):
        pl.seed_everything(3, verbose=False)
        model = small()
        fit(model, *callbacks, max_epochs=2)
        weights.append(torch.cat([value.detach().flatten().float() for value in model.state_dict().values()]))
    assert torch.equal(*weights)
    # no state that a resumed run needs
    assert not Codebook().state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["first", "later"])
def test_uncountable_model_warns_once_and_trains(fit, tmp_path, where):
    class Broken(Indexed):
        def encode_indices(self, x):
            if where == "first" or len(x) == 13:
                raise ValueError("exotic")
            return super().encode_indices(x)

    with pytest.warns(UserWarning, match="Codebook could not count codes: ValueError: exotic") as caught:
        trainer = fit(Broken(), Codebook(every_n_epochs=1), n=45, max_epochs=3)
    assert trainer.current_epoch == 3
    assert len([w for w in caught if "Codebook" in str(w.message)]) == 1
    assert pictures(tmp_path) == (set() if where == "first" else {"codebook_indices"})


def test_bad_values_are_refused():
    with pytest.raises(AezooError, match=r"Codebook\.n must be at least 1"):
        Codebook(n=0)
    with pytest.raises(AezooError, match=r"Codebook.every_n_epochs must be 0 \(off\)"):
        Codebook(every_n_epochs=-1)
    with pytest.raises(AezooError, match=r"Codebook\.n_projected must be at least 0"):
        Codebook(n_projected=-1)


# ---- usage map -------------------------------------------------------------------------------------------------------


def test_used_codes_are_drawn_as_lit_cells():
    counts = torch.zeros(23, dtype=torch.long)
    counts[[0, 4, 5, 22]] = torch.tensor([1, 10, 1000, 10])
    figure = count_figure([counts], ["a codebook"], "times")
    pixels = render(figure).astype(int)
    axes = figure.axes[0]
    box = axes.get_window_extent()
    left, top, side = round(box.x0), round(pixels.shape[0] - box.y1), round(box.width) / 5
    assert side == 51 and round(box.height) == 5 * 51
    found = {}
    for k in range(25):
        cell = pixels[int(top + k // 5 * side) :][:51, int(left + k % 5 * side) :][:, :51]
        assert (cell == cell[0, 0]).all(), f"cell {k} is of several colours"
        found[k] = tuple(cell[0, 0])
    lit = {k for k, colour in found.items() if k < 23 and sum(colour)}
    assert lit == {0, 4, 5, 22}
    assert found[23] == found[24] == (255, 255, 255)
    assert sum(found[0]) < sum(found[4]) < sum(found[5])
    assert found[4] == found[22]


def test_large_codebook_cells_sum_consecutive_codes():
    counts = torch.arange(2 * 65536 + 1)
    cells = count_cells(counts).flatten().numpy()
    # three codes per cell
    assert cells[0] == 0 + 1 + 2 and cells[1] == 3 + 4 + 5
    assert cells[cells >= 0].sum() == counts.sum()
    assert count_cells(counts[:65536]).shape == (256, 256)
    assert np.array_equal(count_cells(counts[:65536]).flatten(), counts[:65536])


@pytest.mark.slow
def test_codebook_too_large_to_count_warns_once(fit, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("aezoo.callbacks.codebook.rank_zero_info", said.append)
    fit(Indexed(sizes=(2**40,)), Codebook(every_n_epochs=1), max_epochs=2)
    assert said == [
        "Codebook counts no codes: CodebookUsage counts codebooks of one code or more, 16777216 codes together "
        "at most, got (1099511627776,): of larger codebooks count the digits of an index"
    ]
    assert pictures(tmp_path) == {"codebook_indices"}


@pytest.mark.slow
def test_at_most_eight_indices_per_position_are_shown(fit, rows, counted, events):
    class Many(Indexed):
        def encode_indices(self, x):
            first = super().encode_indices(x)[:, :1]
            return first.expand(-1, 12, *first.shape[2:])

    fit(Many(sizes=(16,) * 12), Codebook(every_n_epochs=1), max_epochs=1)
    assert len(counted[0]) == 8
    assert rows[0][0] == ["original", *(f"indices {level}" for level in range(8)), "output"]
    assert len(events().Tags()["histograms"]) == 8


@pytest.mark.slow
def test_each_codebook_has_named_pictures(fit, tmp_path, counted, rows):
    class Two(Indexed):
        def codebooks(self, indices):
            return {"top": (indices[:, :1], SIZES[:1]), "bottom": (indices[:, 1:], SIZES[1:])}

    fit(Two(), Codebook(every_n_epochs=1), n=45, max_epochs=1)
    expected = by_hand(digits((1, 8, 8), 45).tensors[0])
    for codebook, counts in zip(counted, expected, strict=True):
        np.testing.assert_array_equal(codebook[0], counts)
    names = {f"codebook_{kind}_{codebook}" for kind in ("usage", "frequencies") for codebook in ("top", "bottom")}
    assert pictures(tmp_path) == {*names, "codebook_indices"}
    assert rows[0][0] == ["original", "indices top", "indices bottom", "output"]


# ---- indices at their positions --------------------------------------------------------------------------------------


def test_index_colours_are_distinct_and_stable():
    colours = index_colours(torch.arange(512))
    assert len({tuple(colour) for colour in colours.round(4).tolist()}) == 512
    np.testing.assert_allclose(colours[:3], index_colours(torch.tensor([[0], [1], [2]]))[:, 0])
    # hues advance by the golden ratio, so that close indices have distant hues
    golden = (5**0.5 - 1) / 2
    np.testing.assert_allclose(colours[4], hsv_to_rgb([4 * golden % 1, 0.75, 0.75]), atol=1e-6)
    assert np.array_equal(index_colours(torch.tensor([-1]))[0], [1, 1, 1])
    assert np.isfinite(index_colours(torch.tensor([2**61, 2**62 - 1]))).all()


class Counting(Indexed):
    """Each position of each sample has its own index, for each of two indices."""

    def __init__(self, input_shape, places):
        super().__init__(input_shape, sizes=(4096, 4096))
        self.places = places

    def encode_indices(self, x):
        first = torch.arange(len(x) * int(np.prod(self.places))).reshape(len(x), 1, *self.places)
        return torch.cat([first, first + 2048], 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "places", "grid"),
    [
        ((1, 8, 8), (4, 4), (4, 4)),
        ((3, 9, 7), (3, 2), (3, 2)),
        ((1, 8, 8), (5,), (1, 5)),
        ((1, 8, 8), (), (1, 1)),
        ((1, 4, 4), (8, 8), (8, 8)),
        ((1, 6, 6, 6), (3, 3, 2), (3, 2)),
        ((7, 40), (10,), (1, 10)),
        ((2, 40), (10,), (1, 10)),
        ((30,), (16,), (1, 16)),
        ((4,), (16,), (1, 16)),
        ((600,), (16,), (1, 16)),
    ],
    ids=str,
)
def test_indices_are_drawn_at_their_positions(fit, rows, tmp_path, shape, places, grid):
    fit(Counting(shape, places), Codebook(n=3, every_n_epochs=1), max_epochs=1)
    labels, tiles = rows[0]
    kinds = ["original", "indices 0", "indices 1", "output"]
    flat = len(shape) == 1 or (len(shape) == 2 and shape[0] <= 3)
    assert labels == (kinds * 3 if flat else kinds)
    index = np.arange(3 * int(np.prod(places))).reshape(3, *places)
    if len(places) == 3:
        index = index[:, places[0] // 2]
    index = index.reshape(3, *grid)
    for sample in range(3):
        for level in (0, 1):
            tile = tiles[4 * sample + 1 + level][0] if flat else tiles[1 + level][sample]
            expected = index_colours(torch.from_numpy(index[sample] + 2048 * level))
            for i in range(grid[0]):
                for j in range(grid[1]):
                    centre = tuple(int((p + 0.5) * n / m) for p, n, m in zip((i, j), tile.shape, grid, strict=False))
                    np.testing.assert_allclose(tile[centre], expected[i, j], err_msg=f"{sample} {level} {i} {j}")
    # the sample and the output have the size of their index grids
    assert len({part.shape[1:] for part in tiles}) == 1
    assert np.asarray(Image.open(tmp_path / "run" / "0" / "pictures" / "codebook_indices.png")).std() > 5


@pytest.mark.slow
def test_samples_and_outputs_are_drawn_next_to_indices(fit, rows):
    model = Indexed()
    fit(model, Codebook(n=5, every_n_epochs=1), max_epochs=1)
    x = digits((1, 8, 8)).tensors[0][:5]
    with torch.no_grad():
        x_hat = model.eval()(x)
    _, (original, *_, output) = rows[0]
    np.testing.assert_allclose(original[:, ::14, ::14, 0], x[:, 0], atol=1e-6)
    np.testing.assert_allclose(output[:, 7::14, 7::14, 1], x_hat[:, 0], atol=1e-6)


def test_index_grid_takes_middle_plane_of_volume():
    volume = torch.arange(2 * 4 * 3 * 5).reshape(2, 4, 3, 5)
    assert torch.equal(index_grid(volume), volume[:, 2])
    assert index_grid(volume[:, 0, 0]).shape == (2, 1, 5)
    assert index_grid(volume[:, 0, 0, 0]).shape == (2, 1, 1)


# ---- the projector ---------------------------------------------------------------------------------------------------


def small(**options) -> DiscreteAutoencoder:
    given = {"net": "mlp", "hidden_dims": (16,), "codebook_size": 12, "latent_dim": 5, "places": 4} | options
    return aezoo.create_model("vq_vae", (1, 8, 8), **given)


def embeddings(folder: Path):
    return text_format.Parse((folder / "projector_config.pbtxt").read_text(), ProjectorConfig()).embeddings


def table(path: Path) -> tuple[list[str], np.ndarray]:
    head, *lines = path.read_text().splitlines()
    return head.split("\t"), np.array([[int(value) for value in line.split("\t")] for line in lines])


def test_projector_config_lists_each_file_once(tmp_path):
    points, columns = torch.rand(4, 3), {"index": torch.arange(4), "chosen": torch.arange(4)}
    for step, prefix in ((1, ""), (1, "codebook_"), (2, "codebook_"), (3, "")):
        write_embedding(tmp_path, f"{prefix}points at step {step}", points, columns, None, prefix)
    found = {info.tensor_name: table(tmp_path / info.metadata_path)[0] for info in embeddings(tmp_path)}
    assert found == {"codebook_points at step 2": [*columns], "points at step 3": [*columns]}
    assert len(embeddings(tmp_path)) == 2


@pytest.mark.slow
def test_projector_files_contain_codes_and_usage(fit, tmp_path):
    model = small()
    for epochs in (2, 1):  # the second run overwrites the files of the first
        fit(model, Codebook(every_n_epochs=1), max_epochs=epochs, n=45)
    folder = tmp_path / "run" / "0"
    (info,) = embeddings(folder)
    assert info.tensor_name == "codebook at step 3"
    codes = np.loadtxt(folder / info.tensor_path, delimiter="\t")
    np.testing.assert_allclose(codes, model.quantiser.code_KD.numpy(), atol=1e-5)
    names, values = table(folder / info.metadata_path)
    assert names == ["index", "chosen in epoch 1"]
    np.testing.assert_array_equal(values[:, 0], np.arange(12))
    with torch.no_grad():
        z = model.eval().encoder(digits((1, 8, 8), 45).tensors[0])
    distance = (z.movedim(1, -1).reshape(-1, 1, 5).numpy() - codes) ** 2
    np.testing.assert_array_equal(values[:, 1], np.bincount(distance.sum(-1).argmin(1), minlength=12))


@pytest.mark.slow
@pytest.mark.parametrize("codebook_first", [True, False])
def test_codebook_and_latent_codes_share_projector_tab(fit, tmp_path, codebook_first):
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin

    both = [Codebook(every_n_epochs=1), Projector(n=30)]
    for _ in range(2):
        fit(small(), *(both if codebook_first else both[::-1]), max_epochs=1)
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    plugin = ProjectorPlugin(TBContext(logdir=str(tmp_path), data_provider=provider, multiplexer=multiplexer))
    plugin._update_configs()
    (config,) = plugin._configs.values()
    assert [info.tensor_name for info in config.embeddings] == ["codebook at step 3", "codes at step 3"]
    assert [list(info.tensor_shape) for info in config.embeddings] == [[12, 5], [30, 20]]


@pytest.mark.slow
def test_truncated_projector_config_is_rewritten(fit, tmp_path):
    folder = tmp_path / "run" / "0"
    folder.mkdir(parents=True)
    (folder / "projector_config.pbtxt").write_text('embeddings {\n  tensor_name: "cod')
    fit(small(), Codebook(every_n_epochs=1), max_epochs=1)
    assert len(embeddings(folder)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("most", "written"), [(12, True), (11, False), (0, False)])
def test_codebooks_above_limit_are_not_projected(fit, tmp_path, most, written):
    fit(small(), Codebook(every_n_epochs=1, n_projected=most), max_epochs=1)
    assert (tmp_path / "run" / "0" / "projector_config.pbtxt").is_file() == written


@pytest.mark.slow
def test_early_stop_labels_usage_with_its_epoch(fit, tmp_path):
    class Stop(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 2

    fit(small(), Codebook(every_n_epochs=2), Stop(), max_epochs=20)
    (info,) = embeddings(tmp_path / "run" / "0")
    assert info.tensor_name == "codebook at step 9"
    assert table(tmp_path / "run" / "0" / info.metadata_path)[0] == ["index", "chosen in epoch 2"]


def shaken(quantiser: Quantiser) -> Quantiser:
    with torch.no_grad():
        for name, values in quantiser.state_dict().items():
            if "code_KD" in name:
                values.copy_(torch.randn(values.shape, generator=torch.Generator().manual_seed(len(name))))
    return quantiser.eval()


def test_level_codes_match_levels_and_groups():
    residual = shaken(ResidualVQ(6, 3, 8))
    groups = shaken(GroupedVQ(6, 3, 8))
    for level in range(3):
        np.testing.assert_allclose(level_codes(residual, level), residual.levels[level].code_KD)
        found = level_codes(groups, level)
        assert found.shape == (8, 2)
        np.testing.assert_allclose(found, groups.groups[level].code_KD)


def test_level_codes_of_implicit_codebooks_are_computed():
    # 0, +-1/2, 1 and -1, +-1 by the paper's formula, the first channel least significant
    np.testing.assert_allclose(level_codes(FSQ((4, 2)), 0), [[a, b] for b in (-1, 1) for a in (-1, -0.5, 0, 0.5)])
    np.testing.assert_allclose(level_codes(LFQ(2), 0), [[-1, -1], [1, -1], [-1, 1], [1, 1]])
    first, second = (level_codes(ResidualFSQ((4, 2), 2), level) for level in (0, 1))
    np.testing.assert_allclose(first, level_codes(FSQ((4, 2)), 0))
    # the second level divides an interval of the first: of width 1/2 by four, of width 2 by two
    np.testing.assert_allclose(second, [[a, b] for b in (-0.5, 0.5) for a in (-0.1875, -0.0625, 0.0625, 0.1875)])
    code_KD = torch.randn(5, 3)
    vq = VQ(3, 5, update="gradient", cosine=True).eval()
    vq.code_KD.data = code_KD
    np.testing.assert_allclose(level_codes(vq, 0).detach(), code_KD / code_KD.norm(dim=1, keepdim=True), rtol=1e-5)


def test_quantisers_are_found_by_codebook_name():
    class Two(Fake):
        def __init__(self):
            super().__init__((4,))
            self.quantiser_top, self.quantiser_bottom = VQ(2, 8), ResidualVQ(2, 2, 8)

    model = Two()
    assert find_quantiser(model, "top", (8,)) is model.quantiser_top
    assert find_quantiser(model, "bottom", (8, 8)) is model.quantiser_bottom
    assert find_quantiser(model, "bottom", (8,)) is None
    assert find_quantiser(model, "bot", (8, 8)) is None
    assert find_quantiser(model, "", (8,)) is None
    assert find_quantiser(Fake((4,)), "", (8,)) is None
    one = small()
    assert find_quantiser(one, "", (12,)) is one.quantiser
    # with nested quantisers
    one.quantiser = ResidualVQ(5, 2, 12)
    assert find_quantiser(one, "", (12, 12)) is one.quantiser
    # indices with other digits
    assert find_quantiser(one, "", (4, 3)) is None


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_codebook_callback_is_enabled_by_default(tmp_path, monkeypatch):
    assert lightning_cli.DEFAULT_CALLBACKS["codebook"] is Codebook
    monkeypatch.chdir(tmp_path)
    off = [f"--{name}.every_n_epochs=0" for name in ("reconstructions", "samples", "traversal", "latents", "filters")]
    main([
        "fit", "--model=vq_vae", "--model.net=mlp", "--model.hidden_dims=[16]", "--model.codebook_size=32", *off,
        "--data.name=digits", "--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.accelerator=cpu",
    ])  # fmt: skip
    (folder,) = tmp_path.glob("runs/*/0")
    assert {path.stem for path in (folder / "pictures").iterdir()} == {*PICTURES, "curves"}
    assert [info.tensor_name for info in embeddings(folder)] == ["codebook at step 3", "codes at step 3"]
    head, values = table(folder / "projector" / "codebook_labels.tsv")
    assert head == ["index", "chosen in epoch 1"] and len(values) == 32
    assert values[:, 1].sum() % 16 == 0 and values[:, 1].sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"precision": "bf16-true"}, {"logger": False}], ids=str)
def test_bf16_and_missing_logger_are_supported(fit, tmp_path, options):
    fit(small(), Codebook(every_n_epochs=1), max_epochs=1, **options)
    folder = tmp_path if "logger" in options else tmp_path / "run" / "0"
    assert {path.stem for path in (folder / "pictures").iterdir()} == PICTURES


@pytest.mark.slow
def test_batches_without_labels_are_counted(tmp_path, counted):
    x = digits((1, 8, 8), 45).tensors[0]

    class Plain(Indexed):
        def training_step(self, batch, batch_idx):
            return self.loss(batch if isinstance(batch, Tensor) else batch[0])["loss"]

        def validation_step(self, batch, batch_idx):
            pass

    for data in (x, TensorDataset(x)):
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=TensorBoardLogger(tmp_path),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            default_root_dir=tmp_path,
            callbacks=[Codebook(every_n_epochs=1)],
        )
        trainer.fit(Plain(), DataLoader(data, 16), DataLoader(data, 16))
    for counts in counted:
        np.testing.assert_array_equal(counts[0], by_hand(x)[0])
    assert len(counted) == 2
