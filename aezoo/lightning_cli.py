"""fit, validate, test and predict: LightningCLI with short model names, recipes, and checkpoints that say enough.

Settings come from, in rising order: defaults, the checkpoint, the files given by -c in their order, flags.
"""

import difflib
import inspect
import json
import logging
import os
import re
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

import aezoo
from aezoo import callbacks, checkpoint, registry
from aezoo.autoencoder import Autoencoder
from aezoo.cli import HEAVY, find_recipe
from aezoo.data import DataModule
from aezoo.errors import AezooError

_RUN_DIR = "AEZOO_RUN_DIR"
# each is a group of flags and a section of the YAML, e.g. --reconstructions.every_n_epochs 1
DEFAULT_CALLBACKS: dict[str, type[Callback]] = {
    "progress": callbacks.ProgressBar,
    "throughput": callbacks.Throughput,
    "code_statistics": callbacks.CodeStatistics,
    "reconstructions": callbacks.Reconstructions,
    "samples": callbacks.Samples,
    "traversal": callbacks.Traversal,
    "latents": callbacks.LatentScatter,
    "projector": callbacks.Projector,
    "filters": callbacks.Filters,
    "histograms": callbacks.Histograms,
    "dashboard": callbacks.Dashboard,
    "predictions": callbacks.PredictionWriter,
    "summary": callbacks.Summary,
    "interrupt": callbacks.Interrupt,
    "early_stopping": callbacks.EarlyStop,
    "checkpoints": callbacks.Checkpoints,
}


class Parser(LightningArgumentParser):
    """LightningCLI's parser, with registry names in YAML and errors of one line."""

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        return super().parse_string(_spell_out(content), *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise AezooError(_plain(message, self))


class SaveConfig(SaveConfigCallback):
    """Writes `config.yaml` into the folder of a fit, with registry names for models; `aezoo fit -c` reads it again."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        log_dir = trainer.log_dir  # broadcasts, so every rank must ask
        if stage == "fit" and trainer.is_global_zero and log_dir is not None and not self.already_saved:
            config = yaml.safe_load(self.parser.dump(self.config, skip_none=False, format="yaml"))
            config.pop("ckpt_path", None)
            config = {key: config.pop(key) for key in ("model", "data")} | config
            name = registry.name_of(type(pl_module))
            if name is not None:
                config["model"]["class_path"] = name
            head = f"# aezoo {aezoo.__version__}: all settings of this run\n"
            Path(log_dir).mkdir(parents=True, exist_ok=True)
            (Path(log_dir) / self.config_filename).write_text(head + yaml.safe_dump(config, sort_keys=False))
            self.already_saved = True


class AezooCLI(LightningCLI):
    """One command of the command line.

    Args:
        argv: the command and its flags.
    """

    def __init__(self, argv: list[str]) -> None:
        self.request = _expand(argv)
        super().__init__(
            Autoencoder,
            DataModule,
            subclass_mode_model=True,
            parser_class=Parser,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            # the constructor's own values go into checkpoints: no class paths, complete with defaults
            load_from_checkpoint_support=False,
            # the loaders shard by rank themselves, and one line says what a table of layers would
            trainer_defaults={
                "max_epochs": 20,
                "log_every_n_steps": 1,
                "use_distributed_sampler": False,
                "enable_model_summary": False,
            },
        )

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        super().setup_parser(*args, **kwargs)
        for command in ("validate", "test"):
            # the summary callback prints the figures
            self._subcommand_parsers[command].set_defaults({"verbose": False})
        # they go to a file; Lightning would hold all of them once more
        self._subcommand_parsers["predict"].set_defaults({"return_predictions": False})

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        parser.add_lightning_class_args(Autoencoder, "model", subclass_mode=True, required=False)
        parser.add_lightning_class_args(DataModule, "data")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.input_shape", "model.init_args.input_shape", apply_on="instantiate")
        for name, cls in DEFAULT_CALLBACKS.items():
            parser.add_lightning_class_args(cls, name)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        argv, command = self.request.argv, self.request.argv[0]
        _check_flags(argv, self.request.model, self._subcommand_parsers[command])
        self.config = parser.parse_args(argv)
        if command != "fit" and not self.config[command].get("ckpt_path"):
            raise AezooError(f"{command} needs a trained model: give --ckpt_path RUN_OR_FILE")
        if self.config[command].get("model") is None:
            raise AezooError("which model? Give --model NAME, -c RECIPE, or --ckpt_path RUN (see `aezoo list`)")

    def _parse_ckpt_path(self) -> None:
        """Lightning merges a checkpoint's values over the flags here; `_expand` has put them below instead."""

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # jsonargparse wraps what a constructor raises in a report on all types that it tried
            if isinstance(error, AezooError) or "Does not validate" not in str(error):
                raise
            raise AezooError(_plain(str(error), self._parser(self.subcommand))) from error
        if self.request.source is not None:
            _check_against(self.request.stored, self.request.source, self.model, self.subcommand == "fit")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = dict(self._get(self.config_init, "trainer", default={}))
        extra: list[Callback] = [
            self._get(self.config_init, key) for key in self._parser(self.subcommand).callback_keys
        ]
        if config.get("enable_checkpointing") is False or config.get("fast_dev_run"):
            extra = [callback for callback in extra if not isinstance(callback, callbacks.Checkpoints)]
        if config.get("enable_progress_bar") is False:
            extra = [callback for callback in extra if not isinstance(callback, callbacks.ProgressBar)]
        run_dir = self.run_dir(Path(config.get("default_root_dir") or "runs"))
        config["default_root_dir"] = str(run_dir)
        if self.subcommand != "fit" and config.get("logger") is None:
            # at step 0 their events would end the run's own curves
            config["logger"] = False
        if config.get("logger") in (None, True):
            name, version = run_dir.parent.name, run_dir.name
            config["logger"] = TensorBoardLogger(
                str(run_dir.parent.parent), name=name, version=version, default_hp_metric=False
            )
        if config.get("logger") and self.model.lr_schedule != "constant":
            extra.append(LearningRateMonitor(logging_interval="step"))
        config.update(kwargs)
        return self._instantiate_trainer(config, [callback for callback in extra if callbacks.in_use(callback)])

    def run_dir(self, root: Path) -> Path:
        """Folder of this run: the checkpoint's own, or the next free number in `<root>/<recipe or model-data>`."""
        source = self.request.source
        if source is not None and source.parent.name == "checkpoints":
            return source.parent.parent
        # processes that a multi-device strategy starts must not count up again
        if _RUN_DIR not in os.environ:
            own = f"{registry.name_of(type(self.model))}-{Path(self.datamodule.hparams['name']).stem}"
            home = root / (self.request.run_name or own)
            taken = [int(path.name) for path in home.glob("*") if path.name.isdigit()]
            os.environ[_RUN_DIR] = str(home / str(max(taken, default=-1) + 1))
        return Path(os.environ[_RUN_DIR])

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit:
            # Lightning ends with 1 after an interrupt that it has handled
            held = self._get(self.config_init, "interrupt")
            print(self._how_to_resume(), file=sys.stderr)
            sys.exit(128 + (held.signum or signal.SIGINT))
        except RuntimeError as error:
            if "Error(s) in loading state_dict" not in str(error):
                raise
            raise AezooError(
                "the checkpoint's weights do not fit the model as it is set now: drop the --model flags and -c files "
                "that differ from the checkpoint's"
            ) from error

    def _how_to_resume(self) -> str:
        saved = self.trainer.checkpoint_callback
        last = getattr(saved, "last_model_path", None)
        if self.subcommand != "fit" or not last:
            return "aezoo: interrupted; nothing was saved"
        run = Path(last).parent.parent
        return (
            f"aezoo: interrupted at epoch {self.trainer.current_epoch}, step {self.trainer.global_step}; "
            f"last saved: {last}\ngo on with: aezoo fit --ckpt_path {run}"
        )

    def before_fit(self) -> None:
        """Say in two lines what is trained on what."""
        if not self.trainer.is_global_zero:
            return  # the others wait for the data that rank zero may be fetching
        parameters = sum(p.numel() for p in self.model.parameters())
        print(f"{registry.name_of(type(self.model))}: {parameters:,} parameters, code shape {self.model.code_shape}")
        print(self.datamodule.describe())
        # one table at the very end holds the figures of training and test
        self._get(self.config_init, "summary").test_follows = self._test_follows()

    def after_fit(self) -> None:
        """Test the best weights, so that a run ends with figures on data it has not seen."""
        if self._test_follows():
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path="best", verbose=False)

    def _test_follows(self) -> bool:
        savers = [saver for saver in self.trainer.checkpoint_callbacks if isinstance(saver, callbacks.Checkpoints)]
        return any(saver.save_top_k != 0 for saver in savers) and "test" in self.datamodule.splits()


def main(argv: list[str]) -> None:
    """Run `fit`, `validate`, `test` or `predict`.

    Raises:
        AezooError: what the user must mend.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, 0 after help.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_worth_saying)
    # data in memory need no workers
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Lightning 2.6 asks torch for a class that newer ones rename; nothing a user could do
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)", category=FutureWarning)
    if "LOCAL_RANK" not in os.environ:
        os.environ.pop(_RUN_DIR, None)
    AezooCLI(argv)


def _worth_saying(record: logging.LogRecord) -> bool:
    """Lightning's advertisements and its list of accelerators that are absent are not."""
    text = record.getMessage()
    return not any(word in text for word in ("litlogger", "litmodels", "Tip:", "TPU available", "HPU available"))


@dataclass(frozen=True)
class Request:
    """What the arguments ask for.

    Attributes:
        argv: the command and its flags, as LightningCLI understands them.
        run_name: the name of the first recipe or file given by -c, or of the checkpoint's runs.
        source: the checkpoint given by --ckpt_path.
        stored: the hyperparameters in that checkpoint.
        model: the model that is meant.
    """

    argv: list[str]
    run_name: str | None
    source: Path | None
    stored: dict[str, Any]
    model: str | None


def _expand(argv: list[str]) -> Request:
    """Names to what LightningCLI understands: models to classes, recipes to files, runs to checkpoints and settings."""
    command, rest = argv[0], list(argv[1:])
    _built_in()  # a class that is imported can be named in YAML
    registry.import_plugins()
    flags: list[str] = []
    run_name: str | None = None
    source: Path | None = None
    model: str | None = None
    given: str | None = None
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if flag not in ("-c", "--config", "--model", "--ckpt_path", "--model.help"):
            flags.append(flag + equals + value)
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                if flag == "--model.help":
                    flags.append(flag)
                    continue
                raise AezooError(f"{flag} needs a value")
            value = rest.pop(0)
        if flag in ("-c", "--config"):
            path, config = _config_file(value)
            run_name = run_name or path.stem
            flags += ["--config", str(path)]
            model = _model_of(config) or model
        elif flag == "--ckpt_path":
            source = checkpoint.find_checkpoint(value, prefer="last" if command == "fit" else "best")
            flags += ["--ckpt_path", str(source)]
        else:
            given = value if flag == "--model" else given
            flags += [flag, _class_path(value)]
    stored: dict[str, Any] = {}
    if source is not None:
        content = checkpoint.read_checkpoint(source)
        stored = content.get("hyper_parameters", {})
        settings = _settings(command, content, source, optional=given is not None)
        flags = ["--config", json.dumps(settings), *flags]
        model = model or _model_of(settings)
    return Request([command, *flags], run_name, source, stored, given or model)


def _model_of(config: dict[str, Any]) -> str | None:
    model = config.get("model")
    name = model.get("class_path") if isinstance(model, dict) else model
    return name if isinstance(name, str) else None


def _config_file(value: str) -> tuple[Path, dict[str, Any]]:
    if "://" in value:
        raise AezooError(f"configurations are read from disk only, not from {value}: download it first")
    path = Path(value) if Path(value).is_file() else find_recipe(value)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise AezooError(f"cannot read {path} as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise AezooError(f"{path} holds no settings: write sections such as model:, data: and trainer:")
    return path, content


def _class_path(name: str) -> str:
    """`vae` to `aezoo.models.variational.vae.VAE`; class names, class paths, files and inline YAML stay."""
    if name in _built_in() or "." in name or name.lstrip().startswith("{"):
        return name
    cls = registry.model_class(name)
    return f"{cls.__module__}.{cls.__qualname__}"


def _built_in() -> set[str]:
    """Class names of the models of this package, which are imported by this."""
    entries = registry.entries().values()
    return {registry.model_class(entry.name).__name__ for entry in entries if entry.owner == "aezoo"}


def _spell_out(text: str) -> str:
    """A YAML text with registry names of models replaced by class paths, where a model is named."""
    config = yaml.safe_load(text)
    if not isinstance(config, dict):
        return text
    for section in (config, *(v for k, v in config.items() if k in HEAVY)):
        model = section.get("model") if isinstance(section, dict) else None
        if isinstance(model, str):
            section["model"] = {"class_path": _class_path(model)}
        elif isinstance(model, dict) and isinstance(model.get("class_path"), str):
            name = model["class_path"]
            model["class_path"] = _class_path(name)
            if "." not in name and isinstance(model.get("init_args"), dict):
                registry.check_hyperparameters(registry.model_class(name), model["init_args"], name)
    return yaml.safe_dump(config, sort_keys=False)


def _settings(command: str, content: dict[str, Any], source: Path, optional: bool) -> dict[str, Any]:
    """What a checkpoint says of its run: all of `config.yaml` beside it for a fit, else its own model and data."""
    config_file = source.parent.parent / "config.yaml"
    if command == "fit" and source.parent.name == "checkpoints" and config_file.is_file():
        return _config_file(str(config_file))[1]
    settings: dict[str, Any] = {}
    try:
        name, hyperparameters = checkpoint.described(content, source)
        arguments = _plain_values(hyperparameters)
        arguments.pop("input_shape", None)
        settings["model"] = {"class_path": name, "init_args": arguments}
    except AezooError:
        if not optional:
            raise
    data = _plain_values(content.get("datamodule_hyper_parameters", {}))
    known = inspect.signature(DataModule).parameters
    return settings | {"data": {key: value for key, value in data.items() if key in known}}


def _plain_values(hyperparameters: dict[str, Any]) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in hyperparameters.items()
        if not key.startswith("_")
    }


def _check_against(stored: dict[str, Any], source: Path, model: Autoencoder, resume: bool) -> None:
    """Say which hyperparameters differ from the checkpoint's; refuse another shape of data."""
    now = dict(model.hparams)
    shape = tuple(stored.get("input_shape", model.input_shape))
    if shape != model.input_shape:
        raise AezooError(
            f"{source} was trained on samples of shape {'x'.join(map(str, shape))}, these data give "
            f"{'x'.join(map(str, model.input_shape))}: choose the same --data, or --data.size and --data.channels"
        )
    if resume and stored.get("optimizer", model.optimizer) != model.optimizer:
        raise AezooError(
            f"{source} holds the state of {stored['optimizer']}, which {model.optimizer} cannot go on with: keep "
            f"--model.optimizer {stored['optimizer']}, or fine-tune from Python with aezoo.load_model"
        )
    for key in sorted(stored.keys() & now.keys()):
        if stored[key] != now[key]:
            print(f"aezoo: model.{key} is {now[key]}, the checkpoint has {stored[key]}", file=sys.stderr)


def _check_flags(argv: list[str], model: str | None, parser: LightningArgumentParser) -> None:
    """Refuse an unknown flag with the nearest known one, before jsonargparse does it in five lines."""
    known = _flags(parser)
    for token in argv[1:]:
        flag = token.partition("=")[0].rstrip("+")
        if not flag.startswith("--") or flag in known or flag == "--model.help":
            continue
        candidates = known
        if flag.startswith("--model."):
            if model is None or registry.ALIASES.get(model, model) not in registry.entries():
                continue
            candidates = [f"--model.{key}" for key in registry.hyperparameters(model)]
            if flag.replace(".init_args", "") in candidates:
                continue
        parts = flag.split(".")
        if any(".".join(parts[:i]) in known for i in range(2, len(parts))) and candidates is known:
            continue
        raise AezooError(f"unknown flag {flag}{_near(flag, candidates)} See `aezoo {argv[0]} --help`.")


def _flags(parser: LightningArgumentParser) -> list[str]:
    flags = {option for option in parser._option_string_actions if option.startswith("--")}
    for action in parser._actions:
        for part in getattr(action, "_name_parser_map", {}).values():
            flags.update(_flags(part))
    return sorted(flags)


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]}?" if near else "."


def _plain(message: str, parser: LightningArgumentParser) -> str:
    """A message of jsonargparse in one line: which key, what it takes, what it got."""
    unknown = re.search(r"does not accept option '([\w.]+)'", message)
    if unknown:
        return f"unknown setting {unknown[1]}{_near('--' + unknown[1], _flags(parser)).replace('--', '')}"
    keys = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    kinds = [kind for kind in re.findall(r"Expected an? (?:<class '([\w.]+)'>)", message) if kind != "NoneType"]
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if keys and kinds and value:
        return f"{keys} takes {' or '.join(dict.fromkeys(kinds))}, got {value[1]}"
    errors = [error for error in re.findall(r"^\s*- (.*)$", message, re.MULTILINE) if "NoneType" not in error]
    text = " ".join((errors[0] if errors else message).split())
    return f"{keys}: {text}" if keys and errors else text
