"""Statistics of the validation set, throughput, histograms, and the TensorBoard tabs."""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import yaml
from callback_fakes import Fake, FakeSparse, FakeVAE, digits
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from torch.distributions import Normal, kl_divergence

import aezoo
from aezoo.callbacks import CodeStatistics, Dashboard, Histograms, Reconstructions, Samples, Summary, Throughput
from aezoo.callbacks.dashboard import differing, hyperparameters
from aezoo.callbacks.loggers import TensorBoard
from aezoo.callbacks.validation_schedule import ValidationSchedule
from aezoo.data import DataModule
from aezoo.errors import AezooError


def frozen(model: pl.LightningModule) -> pl.LightningModule:
    model.lr = 0.0
    return model


# ---- CodeStatistics --------------------------------------------------------------------------------------------------


def test_active_units_and_kl_over_the_whole_set(fit, monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr(CodeStatistics, "_draw", lambda self, trainer: shown.append(self._undrawn))
    model = frozen(FakeVAE((1, 6, 6), latent_dim=5))
    with torch.no_grad():
        model.encoder[2].weight[:2] *= 0.01  # two nearly constant units
        model.encoder[2].bias.add_(1.0)  # posteriors far from the prior in mean and variance
    # 45 samples in batches of 16, 16 and 13: the mean over batches would give another value
    trainer = fit(model, CodeStatistics(), n=45, max_epochs=1)
    x = digits((1, 6, 6), 45).tensors[0]
    with torch.no_grad():
        mu, log_var = model.eval().posterior(x)
        expected = kl_divergence(Normal(mu, (0.5 * log_var).exp()), Normal(0.0, 1.0)).mean(0)
    kl, active, when = shown[0]
    assert when == "epoch 1, step 3"
    assert torch.allclose(kl.float(), expected, rtol=1e-5)
    assert torch.equal(active, mu.var(0, unbiased=False) > 0.01)
    assert 0 < int(active.sum()) < 5
    assert trainer.callback_metrics["val/active_units"] == active.sum()


@pytest.mark.slow
def test_kl_is_logged_when_counted_and_drawn_at_the_end(fit, events, tmp_path):
    fit(FakeVAE((1, 6, 6)), CodeStatistics(every_n_epochs=2), max_epochs=5)
    found = events()
    assert [e.step for e in found.Scalars("val/active_units")] == [5, 11]
    assert [e.step for e in found.Images("pictures/07 KL per dimension")] == [15]
    assert (tmp_path / "run" / "0" / "pictures" / "kl_per_dimension.png").is_file()


def test_failing_kl_picture_warns_once_and_training_continues(fit, monkeypatch):
    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr("aezoo.callbacks.code_statistics.save_figure", full)
    with pytest.warns(UserWarning, match="CodeStatistics drew no picture: OSError: disk full") as caught:
        trainer = fit(FakeVAE((1, 6, 6)), CodeStatistics(), max_epochs=3)
    assert len([w for w in caught if "CodeStatistics" in str(w.message)]) == 1
    assert trainer.current_epoch == 3 and "val/active_units" in trainer.callback_metrics


def test_l0_and_dead_share_of_sparse_codes(fit):
    model = frozen(FakeSparse((1, 6, 6), latent_dim=6))
    with torch.no_grad():
        model.encoder[2].bias[:2] = -100.0  # never used
        model.encoder[2].bias[2] = 100.0  # always used
    trainer = fit(model, CodeStatistics(), n=45, max_epochs=1)
    with torch.no_grad():
        used = model.eval().encode(digits((1, 6, 6), 45).tensors[0]) > 1e-3
    assert trainer.callback_metrics["val/l0"] == pytest.approx(used.sum(1).float().mean().item())
    assert trainer.callback_metrics["val/dead"] == pytest.approx((~used.any(0)).float().mean().item())
    assert trainer.callback_metrics["val/dead"] >= 2 / 6
    assert "val/active_units" not in trainer.callback_metrics


def test_metric_logged_by_model_is_not_overwritten(fit):
    class Own(FakeSparse):
        def loss(self, x, y=None):
            return {**super().loss(x, y), "l0": torch.tensor(123.0)}

    assert fit(Own((4,)), CodeStatistics(), max_epochs=1).callback_metrics["val/l0"] == 123.0


def test_unsupported_models_and_dry_runs_log_nothing(fit):
    assert "val/l0" not in fit(Fake((4,)), CodeStatistics()).callback_metrics
    assert "val/active_units" not in fit(FakeVAE((4,)), CodeStatistics(), fast_dev_run=True).callback_metrics
    assert "val/active_units" not in fit(FakeVAE((4,)), CodeStatistics(every_n_epochs=0)).callback_metrics


# ---- Throughput ------------------------------------------------------------------------------------------------------


class Clocked(Fake):
    """Uses its own clock: 2 s per training batch, 300 s for the first one, 50 s per validation batch."""

    now, first = 0.0, True

    def training_step(self, batch, batch_idx):
        self.now += 300 if self.first else 2
        self.first = False
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.now += 50
        super().validation_step(batch, batch_idx)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"val_check_interval": 0.5}], ids=["after", "within"])
def test_throughput_counts_only_training(fit, events, monkeypatch, options):
    model = Clocked((4,))
    monkeypatch.setattr("aezoo.callbacks.throughput.time", SimpleNamespace(perf_counter=lambda: model.now))
    fit(model, Throughput(), n=320, max_epochs=2, **options)
    assert [event.value for event in events().Scalars("train/samples_per_s")] == [8.0, 8.0]


def test_throughput_of_short_epochs_is_logged_with_validations(fit, events, monkeypatch):
    model = Clocked((4,))
    monkeypatch.setattr("aezoo.callbacks.throughput.time", SimpleNamespace(perf_counter=lambda: model.now))
    fit(model, Throughput(), ValidationSchedule(), n=48, max_epochs=30)
    found = events().Scalars("train/samples_per_s")
    # epochs of 3 batches, of which every third is validated, as are the first and the last
    assert [event.step for event in found] == [2, *range(8, 90, 9)]
    assert [event.value for event in found] == [8.0] * 11


def test_throughput_of_single_batches_waits_for_the_second(fit, events):
    fit(Fake((4,)), Throughput(), n=16, max_epochs=3)
    assert [event.step for event in events().Scalars("train/samples_per_s")] == [1, 2]


def test_throughput_skips_resumed_empty_epoch():
    callback, model = Throughput(), Fake((4,))
    callback.on_train_start(None, model)
    callback.on_train_epoch_end(None, model)  # logging would fail without a trainer


# ---- Histograms ------------------------------------------------------------------------------------------------------


def test_histograms_on_request(fit, events):
    model = Fake((4,))
    fit(model, Histograms(every_n_epochs=2), max_epochs=4, accumulate_grad_batches=2)
    found = events()
    names = {name for name, _ in model.named_parameters()}
    tags = {f"{kind}/{name}" for kind in ("weights", "gradients") for name in names}
    assert set(found.Tags()["distributions"]) == set(found.Tags()["histograms"]) == tags
    for name, parameter in model.named_parameters():
        values = found.Histograms(f"weights/{name}")
        assert len(values) == 2
        assert values[-1].histogram_value.sum == pytest.approx(parameter.sum().item(), abs=1e-4)
        assert len(found.Histograms(f"gradients/{name}")) == 2


def test_histograms_are_off_by_default(fit, events):
    fit(Fake((4,)), Histograms())
    assert events().Tags()["histograms"] == []


def test_histograms_tolerate_non_finite_gradients(fit, events):
    class Broken(Fake):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx)["loss"] * float("nan")}

    fit(Broken((4,)), Histograms(1), max_epochs=1)
    assert events().Tags()["histograms"] == []


@pytest.mark.parametrize("cls", [Histograms, CodeStatistics])
def test_a_negative_period_is_refused(cls):
    with pytest.raises(AezooError, match=rf"{cls.__name__}.every_n_epochs must be 0 \(off\)"):
        cls(every_n_epochs=-2)


# ---- Dashboard -------------------------------------------------------------------------------------------------------


def context(folder: Path) -> TBContext:
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    return TBContext(
        logdir=str(folder), data_provider=MultiplexerDataProvider(multiplexer, str(folder)), multiplexer=multiplexer
    )


def logger(folder: Path, version: str = "0") -> TensorBoard:
    return TensorBoard(folder, name="run", version=version, default_hp_metric=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated")  # of TensorBoard's imports
def test_train_and_val_share_a_chart(fit, events, tmp_path):
    from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin

    for version, model in enumerate((FakeVAE((4,)), Fake((4,)))):
        fit(model, Dashboard(), logger=logger(tmp_path, str(version)))
    plugin = CustomScalarsPlugin(context(tmp_path))
    layout = plugin.layout_impl(RequestContext(), "")
    layout = layout if isinstance(layout, dict) else json.loads(layout)
    (category,) = layout["category"]
    tags = {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"]}
    assert list(tags) == ["loss", "nll", "kl"]
    assert tags["kl"] == ["^train/kl$", "^val/kl$"]
    written = events().Tags()["scalars"]
    for patterns in tags.values():
        assert all(sum(bool(re.match(pattern, tag)) for tag in written) == 1 for pattern in patterns)


def test_text_tab_contains_the_config_of_the_run(fit, events, tmp_path):
    class Config(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            Path(trainer.log_dir).mkdir(parents=True, exist_ok=True)
            (Path(trainer.log_dir) / "config.yaml").write_text("model: fake\nwidth: 3\n")

    fit(Fake((4,)), Dashboard(), Config(), logger=logger(tmp_path))
    (event,) = events().Tensors("config/text_summary")
    assert event.tensor_proto.string_val[0].decode() == "```yaml\nmodel: fake\nwidth: 3\n\n```"


def test_text_tab_without_config_contains_hyperparameters(fit, events, tmp_path):
    fit(FakeVAE((4,)), Dashboard(), logger=logger(tmp_path))
    text = events().Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    values = yaml.safe_load(text.strip("`").removeprefix("yaml"))
    assert values.pop("model") == "FakeVAE"
    assert values.pop("model.input_shape") == "(4,)"
    assert values == {"model.latent_dim": 4, "model.denoising": False, "model.beta": 2.0, "model.lr": 0.01}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.mark.slow
def test_the_first_page_is_the_loss_and_then_pictures(fit, events, tmp_path):
    callbacks = [Dashboard(), Reconstructions(every_n_epochs=1), Samples(every_n_epochs=1), Throughput()]
    model = aezoo.create_model("vae", input_shape=(1, 8, 8), latent_dim=2)
    fit(model, *callbacks, logger=logger(tmp_path), max_epochs=3)
    run = tmp_path / "run" / "0"
    tags = events().Tags()
    groups = {tag.partition("/")[0] for part in [run, *run.iterdir()] if part.is_dir() for tag in scalars(part)}
    assert groups == {"loss", "train", "val"} and tags["images"] == [
        "pictures/01 reconstructions",
        "pictures/02 samples",
    ]
    # TensorBoard sorts groups by name, and draws tags of equal name in one chart
    assert sorted({*groups, "pictures"})[:2] == ["loss", "pictures"]
    assert list(scalars(run / "train")) == list(scalars(run / "val")) == ["loss"]
    written = scalars(run)
    for part in ("train", "val"):
        assert scalars(run / part)["loss"] == written[f"{part}/loss"]
    assert not {name for name in written if name.endswith("epoch")}


class Loose(aezoo.Autoencoder):
    """A user's model, whose signature does not name the arguments of its base."""

    def __init__(self, input_shape, *, width=2, **kwargs):
        super().__init__(input_shape, **kwargs)


def test_hparams_contain_the_settings_that_differ_between_runs():
    data = DataModule(name="digits", batch_size=64, num_workers=2, num_labels=50)
    model = aezoo.create_model("vae", input_shape=(1, 8, 8), beta=4.0, hidden_dims=(3, 4))
    trainer = SimpleNamespace(datamodule=data, max_epochs=7, world_size=1)
    found = differing(hyperparameters(trainer, model), trainer, model)
    changed = {"model.beta": 4.0, "model.hidden_dims": "(3, 4)", "trainer.max_epochs": 7, "data.batch_size": 64}
    assert found == {"model": "vae", "data.name": "digits", "data.num_labels": 50, **changed}
    # defaults and values that follow from the network and data are not listed
    model, data = aezoo.create_model("vae", input_shape=(1, 8, 8)), DataModule(name="digits", batch_size=32)
    trainer = SimpleNamespace(datamodule=data, max_epochs=45, world_size=1)
    assert differing(hyperparameters(trainer, model), trainer, model) == {"model": "vae", "data.name": "digits"}
    loose = Loose((1, 8, 8), width=3)
    found = differing(hyperparameters(trainer, loose), trainer, loose)
    assert found == {"model": "Loose", "data.name": "digits", "model.width": 3}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated")
def test_hparams_tab_shows_all_runs_with_their_metrics(fit, tmp_path):
    from tensorboard.plugins.hparams import api_pb2
    from tensorboard.plugins.hparams.backend_context import Context
    from tensorboard.plugins.hparams.list_session_groups import Handler

    best = []
    for version, model in enumerate((FakeVAE((4,), beta=3.0), Fake((4,)))):
        trainer = fit(model, Dashboard(), logger=logger(tmp_path, str(version)), max_epochs=3)
        from torch.utils.data import DataLoader

        trainer.test(model, DataLoader(digits((4,)), 16), verbose=False)
        best.append(trainer.callbacks[0]._best.value)
    backend, request = Context(context(tmp_path)), RequestContext()
    contents = backend.hparams_metadata(request, "")
    experiment = backend.experiment_from_metadata(
        request, "", True, contents, backend.hparams_from_data_provider(request, "", None)
    )
    # columns of the first run that the second does not have, such as beta, are kept
    assert {"model", "model.beta", "trainer.max_epochs"} <= {info.name for info in experiment.hparam_infos}
    metrics = [(info.name.tag, info.name.group) for info in experiment.metric_infos]
    # the table is sorted by the first metric
    assert metrics[0] == ("loss", "best") and {("val/loss", ""), ("test/loss", "")} <= {*metrics}
    groups = Handler(
        request,
        backend,
        "",
        api_pb2.ListSessionGroupsRequest(
            start_index=0,
            slice_size=9,
            allowed_statuses=[api_pb2.STATUS_SUCCESS],
            col_params=[api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos],
        ),
    ).run()
    found = {}
    for group in groups.session_groups:
        values = {(m.name.tag, m.name.group): m.value for m in group.metric_values}
        found[group.hparams["model"].string_value] = values["loss", "best"]
        assert values["test/loss", ""] > 0
    assert found == pytest.approx({"FakeVAE": best[0], "Fake": best[1]})


def test_best_loss_survives_a_resume(tmp_path, fit):
    first = Dashboard()
    trainer = fit(Fake((4,)), first, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    model, second = Fake((4,), lr=0.0), Dashboard()
    with torch.no_grad():
        model.decoder[0].bias.add_(5.0)
    second.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["Dashboard"])
    fit(model, second, max_epochs=1)
    assert (second._best.value, second._best.epoch) == (first._best.value, 1)


def test_best_metrics_are_those_of_best_epoch(fit, events, tmp_path):
    class Falling(Fake):
        def validation_step(self, batch, batch_idx):
            loss = [5.0, 3.0, 4.0][self.current_epoch]
            self.log_dict({"val/loss": loss, "val/mse": loss / 10, "val/nll": loss})

    trainer = fit(Falling((4,)), Dashboard(), max_epochs=3)
    assert not [tag for tag in events().Tags()["scalars"] if "best" in tag]
    best = scalars(tmp_path / "run" / "0" / "best")
    assert best == {"loss": [(8, 3.0)], "val/mse": [(8, pytest.approx(0.3))]}
    resumed = Dashboard()
    resumed.load_state_dict(trainer.callbacks[0].state_dict())
    assert resumed.state_dict() == trainer.callbacks[0].state_dict()


@pytest.mark.slow
def test_resume_from_older_checkpoint_does_not_repeat_curves(fit, events, tmp_path):
    class Keep(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "two.ckpt")

    def run(max_epochs, **options):
        trainer = fit(Fake((4,)), Dashboard(), Keep(), logger=logger(tmp_path), max_epochs=max_epochs, **options)
        trainer.logger.log_metrics({"end": 0.0}, step=trainer.global_step)
        trainer.logger.finalize("success")
        time.sleep(1.0)  # event files are named by the second, and within one second have no order

    run(2)
    run(5, ckpt_path=str(tmp_path / "two.ckpt"))
    run(4, ckpt_path=str(tmp_path / "two.ckpt"))
    # three steps per epoch; the first run's values at its last step are kept
    assert sorted(event.step for event in events().Scalars("val/loss")) == [2, 5, 8, 11]
    for part in ("train", "val"):
        assert sorted(step for step, _ in scalars(tmp_path / "run" / "0" / part)["loss"]) == [2, 5, 8, 11]
    assert sorted(event.step for event in events().Scalars("end")) == [6, 12]
    assert sorted(event.step for event in events().Tensors("config/text_summary")) == [0, 6, 6]


def test_dashboard_supports_missing_logger_and_dry_runs(fit, tmp_path):
    fit(Fake((4,)), Dashboard(), logger=False)
    fit(Fake((4,)), Dashboard(), fast_dev_run=True)
    assert not list(tmp_path.rglob("*tfevents*"))


# ---- Summary ---------------------------------------------------------------------------------------------------------


def test_summary_names_results_places_and_commands(fit, tmp_path, capsys):
    trainer = fit(FakeVAE((4,)), Summary(), enable_checkpointing=True)
    out = capsys.readouterr().out
    best = trainer.callbacks[0]._best
    assert f"best val/loss    {best.value:.4f} (epoch {best.epoch + 1})" in out
    assert f"run folder       {tmp_path / 'run' / '0'}\n" in out
    assert f"best checkpoint  {trainer.checkpoint_callback.best_model_path}\n" in out
    assert f"Next: aezoo test --ckpt_path {tmp_path / 'run' / '0'}\n" in out
    assert out.endswith(f"Next: tensorboard --logdir {tmp_path}\n")
    assert "train/kl" in out


def test_summary_is_printed_once_when_test_follows(fit, capsys):
    from torch.utils.data import DataLoader

    summary, model = Summary(), Fake((4,))
    summary.test_follows = True
    trainer = fit(model, summary)
    assert capsys.readouterr().out == ""
    trainer.test(model, DataLoader(digits((4,)), 16), verbose=False)
    out = capsys.readouterr().out
    assert "best val/loss" in out
    assert "test/loss" in out


def test_narrow_summary_does_not_break_commands(fit, capsys, monkeypatch, tmp_path):
    import io

    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=50, color_system=None)
    monkeypatch.setattr("aezoo.callbacks.summary.get_console", lambda: console)
    fit(Fake((4,)), Summary(), enable_checkpointing=True)
    lines = out.getvalue().splitlines()
    assert any(line.endswith(f"aezoo test --ckpt_path {tmp_path / 'run' / '0'}") for line in lines)
    assert any("│" in line for line in lines)
    assert all(len(line) <= 50 for line in lines if "│" in line)
