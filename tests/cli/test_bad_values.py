"""Invalid values for every constructor argument and every option, generated from the signatures.

Each is refused in one line before training, or listed in a table below with its meaning.
"""

import contextlib
import inspect
import io
import math
import os
import random
import shutil
import warnings
from pathlib import Path

import promises
import pytest
import torch
from golden import own_models
from lightning.pytorch import Trainer
from representative_models import REPRESENTATIVE, others_slow

import aezoo
from aezoo import callbacks, registry
from aezoo.cli import lightning_cli, trainer_settings
from aezoo.cli.main import main
from aezoo.cli.parsing import Parser
from aezoo.data import DataModule
from aezoo.errors import AezooError

HUGE = 10**12
VALUES = (-1, 0, 1.5, math.nan, math.inf, -math.inf, HUGE, 10**30, "", "abc", "1", [], [0], ["a"], None, True, {"a": 1})
# values that are valid although they look unusual, by the last part of the name; all others must be refused
WEIGHT = {0, 1.5}
NEVER, OFF, ALL, NONE, ON = {HUGE}, {0}, {-1}, {None}, {True}
MEANING = {
    # models: any finite weight of a term; more latents or a longer wait than there are
    "contraction": WEIGHT, "l1": WEIGHT, "beta": WEIGHT, "aux_weight": WEIGHT, "weight_decay": WEIGHT, "lr": {1.5},
    "warmup_steps": OFF | NEVER, "k_aux": OFF | NEVER, "dead_after": NEVER, "latent_map": ON,
    "class_token": ON, "heads": OFF, "decoder_heads": OFF, "norm_eps": {1.5}, "unit_norm": ON, "pretrained": NONE,
    "hidden_dims": {"[]", None},  # no hidden layer, or those of the net
    "start_k": OFF, "k_steps": OFF | NEVER, "spatial": ON, "l1_steps": OFF | NEVER, "resample_steps": OFF | NEVER,
    "l0_weight": WEIGHT, "l0_steps": OFF | NEVER, "target_l0": WEIGHT, "targets": {"[]"},
    "l2": WEIGHT, "data_init": ON, "tied": ON, "multi_weight": WEIGHT, "fractions": {"[]"}, "theta_decay": OFF,
    "delta": WEIGHT,
    "energy_weight": WEIGHT, "covariance_weight": WEIGHT, "dropout": OFF, "adv_weight": WEIGHT, "enc_weight": WEIGHT,
    "ssim_weight": WEIGHT, "segmentation_weight": WEIGHT,
    "svm_weight": WEIGHT, "nll_weight": WEIGHT, "generator_weight": WEIGHT, "feature_weight": WEIGHT,
    "penalty_weight": WEIGHT,
    "sw_weight": WEIGHT, "cw_weight": WEIGHT, "adversarial_weight": WEIGHT, "regulariser_weight": WEIGHT,
    "unbiased": ON, "gaussian_posterior": ON, "patch_size": OFF, "norm_pix": ON, "learned_token": ON,
    "shrinkage": WEIGHT, "entropy_weight": WEIGHT, "noise_std": WEIGHT, "topology": WEIGHT, "triplet_weight": WEIGHT,
    "margin": {1.5}, "isometry": WEIGHT, "phase_epochs": OFF | NEVER,
    "off_diagonal": WEIGHT, "diagonal": WEIGHT, "mmd_weight": {1.5}, "bandwidth": {1.5}, "per_sample": ON,
    "curvature": {1.5}, "kappa_scale": {1.5} | NONE, "prior_shape": {1.5}, "prior_rate": {1.5}, "metric_floor": {1.5},
    "n_leapfrog": OFF, "free_bits": WEIGHT, "n_flows": OFF, "second_hidden_dims": {"[]"}, "classifier_dims": {"[]"},
    "discriminator_dims": {"[]"}, "discriminator_lr": {1.5},
    "discriminator_weight": WEIGHT, "discriminator_start": OFF | NEVER, "perceptual_weight": WEIGHT,
    "equivariance": OFF, "full_mask": OFF, "decoder_dims": {"[]"}, "mi_weight": WEIGHT,
    "alignment_weight": WEIGHT, "cosine_margin": WEIGHT, "matrix_margin": WEIGHT,
    "config": NONE, "commitment": WEIGHT, "sigma_min": {1.5}, "sigma_max": {1.5}, "sigma_data": {1.5},
    "level_steps": OFF | NEVER,
    "momentum": OFF, "momentum_steps": OFF | NEVER,
    "least_masked": OFF,
    "code_shape": {"[]"}, "tau": WEIGHT,
    "temperature": {1.5}, "start_temperature": {1.5}, "temperature_steps": OFF | NEVER, "straight_through": ON,
    "max_discrete_capacity": WEIGHT, "num_labels": OFF, "start_variance": {1.5},
    "capacity_steps": NEVER, "a": {1.5}, "weight": {1.5}, "dataset_size": OFF | NEVER, "group_dim": NONE | OFF,
    "n_subsets": OFF, "private_dim": OFF, "parts": {"[]"}, "sigma": {1.5}, "residual": ON, "pad_value": NONE | OFF,
    "top_beta": WEIGHT, "lam": WEIGHT, "hyper_hidden_dims": {"[]"}, "attention": ON,
    "table_width": OFF,
    "eta": WEIGHT, "neighbours": NEVER, "share": WEIGHT, "mean_weight": WEIGHT, "variance_weight": WEIGHT,
    "quantised": OFF, "epsilon": {1.5},
    "places": NEVER, "dead_below": WEIGHT, "cosine": ON, "kl_steps": OFF | NEVER, "hard": ON, "top_dims": {"[]"},
    # data: digits needs no folder; one batch of all samples; limits that are raised
    "root": {"", "abc", "1"}, "batch_size": {HUGE}, "val_fraction": OFF, "test_fraction": OFF, "seed": {0, HUGE},
    "size": NONE, "channels": NONE, "download": ON, "max_pixels": NEVER, "max_bytes": NEVER, "drop_last": ON,
    "hflip": OFF, "vflip": OFF, "crop_padding": OFF, "color_jitter": OFF,
    "num_workers": OFF | NONE, "train_classes": NONE | {"[0]", "['a']"},  # read with the labels
    # only for the sources synthetic_dictionary, activations, hf and stream, which read them
    "dictionary_active": {1.5}, "dictionary_correlation": OFF, "dictionary_noise": WEIGHT, "normalise": ON,
    "network": {"", "abc", "1"}, "layer": {"", "abc", "1"}, "of": {"", "abc", "1"},
    "column": {"", "abc", "1"}, "label_column": {"", "abc", "1"}, "cache_dir": {"", "abc", "1"}, "cache_bytes": NEVER,
    "allow_remote": ON,
    # callbacks
    "decay": OFF, "every_n_steps": OFF | NEVER, "start_step": OFF | NEVER, "n_steps": OFF | NEVER,
    "max_capacity": WEIGHT, "gamma": WEIGHT, "save_top_k": ALL | OFF | NEVER, "every_n_epochs": OFF | NEVER | NONE,
    "every_n_minutes": WEIGHT, "dirpath": {"", "abc", "1", None}, "threshold": WEIGHT, "l0_threshold": WEIGHT,
    "layout": ON, "text": ON, "hparams": ON, "html": ON,
    "patience": OFF | NEVER, "min_delta": WEIGHT, "folder": {"", "abc", "1"},
    "refresh_rate": OFF | NEVER, "leave": ON, "projector.n": OFF, "n_projected": OFF, "span": {1.5},
}  # fmt: skip
FEWER = {
    ("temporal_sae", "heads"): set(),
    ("EMA", "every_n_steps"): NEVER,
    ("FaultGuard", "every_n_steps"): NEVER,
    ("Checkpoints", "every_n_epochs"): NONE | NEVER,
    **dict.fromkeys((("CodeStatistics", "every_n_epochs"), ("Histograms", "every_n_epochs")), OFF | NEVER),
    ("Projector", "n"): OFF,
    ("data", "layout"): set(),
    ("data", "window_length"): OFF,
    ("ciwae", "beta"): OFF,
    ("deep_svdd", "nu"): OFF,
    # more than there are
    **dict.fromkeys(
        (("fre", "latent_dim"), ("fre", "pool"), ("padim", "n_features"), ("patchcore", "n_neighbors")), NEVER
    ),
    ("reverse_distillation", "latent_dim"): OFF,
    **{(name, "sigma"): WEIGHT for name in ("padim", "patchcore", "reverse_distillation")},
    ("k_sparse", "alpha"): {1.5},
    ("beta_tcvae", "alpha"): WEIGHT,
    ("jmvae", "alpha"): WEIGHT,
    ("mvtcae", "alpha"): OFF,
    ("crmvae", "alpha"): OFF | NONE,
    ("joint_vae", "n_variables"): OFF,
    ("semi_supervised_vae", "alpha"): WEIGHT,
    ("sequence_ae", "hidden_dims"): NONE,
    # models with one kind of net
    **{(name, "hidden_dims"): {"[]"} for name in ("dense_ae", "conv_ae", "resnet_ae", "unet_ae", "stacked_dae")},
    **{(name, "hidden_dims"): {"[]"} for name in ("wta_ae", "taesd")},
    # one patch for the whole sample
    ("titok", "patch_size"): OFF | NEVER,
    ("soft_vq", "patch_size"): OFF | NEVER,
    ("maetok", "patch_size"): OFF | NEVER,
    ("wae_mmd", "mmd_weight"): WEIGHT,
    ("info_vae", "alpha"): {-1, 0},  # the KL may have a larger weight than in an ELBO
}


# message for a setting of another source
OF_OTHERS = "does not apply to digits, only to"


def constructors():
    """(name, constructor, its parameters) of every model, the DataModule and every callback."""
    for name in own_models():
        cls = registry.model_class(name)
        yield name, lambda _name=name, **given: aezoo.create_model(_name, (1, 8, 8), **given), cls
    yield "data", data_module, DataModule
    for name in callbacks.__all__:
        cls = getattr(callbacks, name)
        if isinstance(cls, type):
            yield name, cls, cls


def data_module(**given):
    """A DataModule of digits, or of the source to which its settings apply."""
    name = "synthetic_dictionary" if any(key.startswith("dictionary_") for key in given) else "digits"
    try:
        return DataModule(**{"name": name, **given})
    except AezooError as error:
        if OF_OTHERS not in str(error):
            raise


def cases():
    """Every parameter; those of models other than the representative ones are slow."""
    for name, build, cls in constructors():
        marks = [pytest.mark.slow] if issubclass(cls, aezoo.Autoencoder) and name not in REPRESENTATIVE else []
        for parameter in inspect.signature(cls).parameters:
            if parameter != "input_shape":
                yield pytest.param(build, name, parameter, id=f"{name}.{parameter}", marks=marks)


def means_something(name, parameter, value):
    allowed = FEWER.get((name, parameter), MEANING.get(parameter, set()))
    key = str(value) if isinstance(value, list | dict) else value
    return any(key is odd or (type(key) is type(odd) and key == odd) for odd in allowed)


def refusal(build, parameter, value):
    """The error message, or None; other errors are defects."""
    try:
        build(**{parameter: value})
    except AezooError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("build", "name", "parameter"), [*cases()])
def test_constructor_refuses_invalid_values(build, name, parameter):
    for value in VALUES:
        if means_something(name, parameter, value):
            build(**{parameter: value})
            continue
        message = refusal(build, parameter, value)
        assert message is not None, f"{name} accepts {parameter}={value!r}"
        assert len(message.splitlines()) == 1 and len(message) < 1000, message


@pytest.mark.parametrize("name", others_slow(own_models()))
def test_model_refuses_invalid_input_shapes(name):
    for shape in [(), (0,), (-1, 8), (1, 2, 3, 4, 5), (1.5,), (math.nan, 3), ("a",), (True,), (HUGE,)]:
        with pytest.raises(AezooError) as refusal:
            aezoo.create_model(name, shape)
        assert len(str(refusal.value).splitlines()) == 1, shape


def test_path_object_is_accepted_as_root():
    assert DataModule(name="digits", root=Path("data")).hparams["root"] == "data"


# ---- the command line ------------------------------------------------------------------------------------------------

FIT = ["fit", "--model=vae", "--data.name=digits", "--trainer.accelerator=cpu", "--trainer.max_epochs=1"]
TEXTS = ("-1", "0", "1.5", "nan", "1e400", str(HUGE), str(10**30), "", "abc", "[]", "[0]", "{a: 1}", "null", "true")
WORDS = {"-1": -1, "0": 0, "1.5": 1.5, str(HUGE): HUGE, "null": None, "true": True, "[]": "[]", "[0]": "[0]"}
# names of runs, folders, columns and labels are free
FREE = (
    "name",
    *("data.root", "data.network", "data.layer", "data.of", "data.column", "data.label_column"),
    "data.cache_dir",
    *("trainer.default_root_dir", "trainer.model_registry", "predictions.folder", "checkpoints.dirpath"),
)
UNSET, SWITCHED_ON, COUNT = {"null"}, {"true"}, {"0", "null"}
TRAINER = {
    "precision": UNSET, "logger": {"[]", "null", "true"}, "callbacks": {"[]", "null"}, "max_epochs": {"-1", "null"},
    "min_epochs": COUNT, "max_steps": {"-1"}, "min_steps": COUNT, "max_time": UNSET, "limit_train_batches": UNSET,
    "limit_val_batches": COUNT, "limit_test_batches": COUNT, "limit_predict_batches": COUNT, "overfit_batches": {"0"},
    "val_check_interval": UNSET, "check_val_every_n_epoch": COUNT, "num_sanity_val_steps": {"-1", "0", "null"},
    "log_every_n_steps": COUNT, "gradient_clip_val": {"0", "1.5", "null"}, "gradient_clip_algorithm": UNSET,
    "fast_dev_run": {"0", "true"}, "plugins": {"[]", "null"}, "profiler": UNSET,
    "reload_dataloaders_every_n_epochs": {"0"},
    **dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), UNSET | SWITCHED_ON),
    **dict.fromkeys(("deterministic", "benchmark"), UNSET | SWITCHED_ON),
    **dict.fromkeys(("inference_mode", "use_distributed_sampler", "detect_anomaly", "sync_batchnorm"), SWITCHED_ON),
    "enable_autolog_hparams": SWITCHED_ON,
}  # fmt: skip
REST = {"seed_everything": {"0", "true"}, "rank_timeout": {"1.5"}}


class Trained(Exception):
    """The command would have trained."""


def reached(*args, **kwargs):
    raise Trained


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """An empty folder, and a `fit` that only raises `Trained`."""
    monkeypatch.setattr(Trainer, "fit", reached)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    os.environ.pop("AEZOO_RUN_DIR", None)
    torch.use_deterministic_algorithms(False)


def outcome(flag):
    """`trained`, or the error line; anything else is a defect."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            main([*FIT, flag])
        except Trained:
            # files of the run: with an empty `checkpoints.dirpath` its lock is here
            for path in Path().iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            return "trained"
        except SystemExit as end:
            code = end.code
        except Exception as error:
            raise AssertionError(f"{flag} ends in {type(error).__name__}: {error}") from error
        else:
            raise AssertionError(f"{flag} ends without a word")
    lines = [line for line in err.getvalue().splitlines() if line.startswith("aezoo: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err.getvalue(), f"{flag}: {code} {err.getvalue()}"
    assert not list(Path().iterdir()), f"{flag} leaves {list(Path().iterdir())}"
    return lines[0]


def options(monkeypatch):
    """Every option of fit with a value."""
    with (
        monkeypatch.context() as patch,
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.ExitStack() as ends,
    ):
        patch.setattr(lightning_cli.AezooCLI, "_run_subcommand", lambda self, subcommand: None)
        made = lightning_cli.AezooCLI(FIT, ends)
    actions = made._subcommand_parsers["fit"]._actions
    names = [a.dest for a in actions if getattr(a, "_typehint", a.type) is not None and not a.dest.endswith("help")]
    return [n for n in names if n != "model"] + [f"model.{key}" for key in registry.hyperparameters("vae")]


def may_train(option, text):
    """Whether the text is valid for the option."""
    section, _, key = option.partition(".")
    if option in FREE:
        return text != "" or section in ("data", "predictions", "checkpoints")
    if section == "trainer" or not key:
        return text in (TRAINER if key else REST).get(key or option, set())
    cls = lightning_cli.DEFAULT_CALLBACKS.get(section)
    return text in WORDS and means_something(cls.__name__ if cls else section, key, WORDS[text])


def check_flag(option, text):
    said = outcome(f"--{option}={text}")
    if may_train(option, text):
        assert said == "trained" or OF_OTHERS in said, f"--{option}={text}: {said}"
    else:
        assert said != "trained", f"--{option}={text} is accepted"
        assert len(said) < 1500, said


def test_integers_are_parsed_first_regardless_of_imports():
    class Trainer:
        def __init__(self, limit: float | int | None = None, often: float | int | str = 1) -> None: ...

    trainer_settings.parse_int_before_float(Trainer)
    parser = Parser()
    parser.add_class_arguments(Trainer, "trainer")
    for text, limit, often in (("1", 1, 1), ("1.0", 1.0, 1.0), ("null", None, "null")):
        read = parser.parse_args([f"--trainer.limit={text}", f"--trainer.often={text}"]).trainer
        assert (read.limit, type(read.limit)) == (limit, type(limit))
        assert (read.often, type(read.often)) == (often, type(often))


@pytest.mark.parametrize("key", trainer_settings._INTEGER_RANGES)
def test_trainer_settings_are_range_checked(key):
    for value in (-1, 0, 1, -2, HUGE, 1.0, -0.5, 1.5, math.nan, math.inf):
        whole, share = isinstance(value, int), key.startswith(("limit_", "overfit", "val_check"))
        works = value == 1 if whole else share and value == 1.0
        works = works or (whole and str(value) in TRAINER.get(key, {"1"}) and value in (-1, 0))
        message = refusal(lambda **given: trainer_settings.check(given), key, value)
        assert (message is None) == works, f"trainer.{key}={value}: {message}"
        assert works or (len(message.splitlines()) == 1 and key in message)


@pytest.mark.slow
def test_bad_value_of_each_option_exits_2_without_files(prepared, monkeypatch):
    """Every text for every option if the figures of guarantees are measured, else one random text for each."""
    found = options(monkeypatch)
    assert len(found) > 100
    draw = random.Random(0)
    wrong, counts = [], {"options": len(found), "values": 0, "refused": 0}
    for option in found:
        for text in TEXTS if promises.is_recording() else [draw.choice(TEXTS)]:
            counts["values"] += 1
            counts["refused"] += not may_train(option, text)
            try:
                check_flag(option, text)
            except AssertionError as error:
                wrong.append(str(error))
    assert not wrong, "\n".join(wrong)
    promises.record("bad_values", counts)
