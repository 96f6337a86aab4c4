"""fit, validate, test and predict: LightningCLI with short model names, recipes and self-contained checkpoints."""

import contextlib
import inspect
import logging
import math
import os
import shlex
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import Namespace
from jsonargparse.typing import restricted_number_type
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

import aezoo
from aezoo import callbacks, registry
from aezoo.autoencoder import Autoencoder
from aezoo.callbacks import dashboard
from aezoo.cli import flag_help, loggers, run_errors, trainer_settings
from aezoo.cli.config_resolution import (
    RESUMED,
    RUN_DIR,
    check_against,
    expand,
    print_differences,
    setting,
    warn_other_splits,
)
from aezoo.cli.parsing import FROM_DATA, Parser, check_flags, plain_message
from aezoo.data import DataModule
from aezoo.data.datamodule import PERMISSIONS
from aezoo.data.identity import data_set_name
from aezoo.data.in_memory import InMemory
from aezoo.data.loaders import local_processes
from aezoo.distributions.likelihoods import likelihood
from aezoo.errors import AezooError
from aezoo.io import atomic_files, resume, run_folder
from aezoo.security import archives, values
from aezoo.training import budgets, compilation, cost, distributed, launcher, speed
from aezoo.training.model_names import display_name

# each callback is a group of flags and a section of the YAML, e.g. --reconstructions.every_n_epochs 1
DEFAULT_CALLBACKS: dict[str, type[Callback]] = {
    "progress": callbacks.ProgressBar,
    "throughput": callbacks.Throughput,
    "learning_curves": callbacks.LearningCurves,
    "code_statistics": callbacks.CodeStatistics,
    "reconstructions": callbacks.Reconstructions,
    "samples": callbacks.Samples,
    "traversal": callbacks.Traversal,
    "latents": callbacks.LatentScatter,
    "projector": callbacks.Projector,
    "codebook": callbacks.Codebook,
    "filters": callbacks.Filters,
    "histograms": callbacks.Histograms,
    "dashboard": callbacks.Dashboard,
    "predictions": callbacks.PredictionWriter,
    "fault_guard": callbacks.FaultGuard,
    "interrupt": callbacks.Interrupt,
    # a second signal is delayed while the report is written, and the summary names its file
    "report": callbacks.Report,
    "summary": callbacks.Summary,
    "early_stopping": callbacks.EarlyStop,
    "checkpoints": callbacks.Checkpoints,
}


_SampleCount = restricted_number_type("Draws", int, [(">=", 1), ("<=", 10**6)], join="and")


# how often a command that evaluates a run looks for its best checkpoint
_ATTEMPTS = 3


class Budget:
    """Sets batch size and epochs by the number of samples if the user has given none; see `training.budgets`.

    Args:
        config: the command's settings, in which the chosen values are set.
        batch_size: whether to choose it.
        max_epochs: whether to choose them.

    Attributes:
        chosen: what was chosen, by the names of the flags.
    """

    def __init__(self, config: Namespace, batch_size: bool, max_epochs: bool) -> None:
        self.config, self.batch_size, self.max_epochs = config, batch_size, max_epochs
        self.chosen: dict[str, Any] = {}

    def choose(self, trainer: Trainer, data: DataModule) -> None:
        """Read the data and choose, unless that has been done."""
        if self.chosen or not (self.batch_size or self.max_epochs):
            return
        train: Any = data.dataset("train")
        if self.batch_size:
            size = budgets.choose_batch_size(len(train) // trainer.world_size)
            data.choose(batch_size=size)
            self.config["data"]["batch_size"] = self.chosen["data.batch_size"] = size
        if self.max_epochs:
            epochs = budgets.choose_max_epochs(math.ceil(len(train) / trainer.world_size), data.batch_size)
            trainer.fit_loop.max_epochs = epochs
            self.config["trainer"]["max_epochs"] = self.chosen["trainer.max_epochs"] = epochs


class SaveConfig(SaveConfigCallback):
    """Writes `config.yaml` into the folder of a fit, with registry names for models; `aezoo fit -c` can read it.

    Its second line is the command that started the run.

    Args:
        args: as in Lightning's class.
        command: the command line.
        budget: chooses batch size and epochs once every rank has the data.
        kwargs: as in Lightning's class.
    """

    def __init__(self, *args: Any, command: str, budget: Budget | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.command, self.budget = f"# {command}", budget

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # every rank has the data by now
        if stage == "fit" and self.budget is not None:
            self.budget.choose(trainer, trainer.datamodule)  # type: ignore[attr-defined]
        log_dir = trainer.log_dir  # this broadcasts, so every rank must read it
        # the file of a resumed run is not changed until the checkpoint has been checked with the current settings
        if stage == "fit" and log_dir is not None and not (Path(log_dir) / self.config_filename).exists():
            self._write(trainer, pl_module, log_dir)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module, trainer.log_dir)

    def state_dict(self) -> dict[str, Any]:
        """Notes in checkpoints that their run has this file, which is then required to continue it."""
        return {"file": self.config_filename}

    def _write(self, trainer: Trainer, pl_module: LightningModule, log_dir: str | None) -> None:
        if trainer.is_global_zero and log_dir is not None and not self.already_saved:
            config = yaml.safe_load(self.parser.dump(self.config, skip_none=False, format="yaml"))
            config.pop("ckpt_path", None)
            config = {key: config.pop(key) for key in ("model", "data")} | config
            name = registry.name_of(type(pl_module))
            if name is not None:
                config["model"]["class_path"] = name
            path = Path(log_dir) / self.config_filename
            lines = path.read_text("utf-8").splitlines()[:2] if path.is_file() else []
            begun = next((line for line in lines if line.startswith("# aezoo fit ")), self.command)
            head = f"# aezoo {aezoo.__version__}: all settings of this run\n{begun}\n"
            text = head + yaml.safe_dump(config, sort_keys=False)
            atomic_files.write(path, lambda file: file.write(text.encode()))
            self.already_saved = True


class RunTrainer(Trainer):
    """A Trainer whose folder is that of the run, with any loggers."""

    @property
    def log_dir(self) -> str | None:
        return self.strategy.broadcast(self.default_root_dir)


class AezooCLI(LightningCLI):
    """One command of the command line.

    Args:
        argv: the command and its flags.
        exit_stack: closed when the command has ended; the run's folder is held until then.
    """

    def __init__(self, argv: list[str], exit_stack: contextlib.ExitStack) -> None:
        self.exit_stack = exit_stack
        self.budget: Budget | None = None
        # settings that the user has not given, by their flags' names
        self.chosen: dict[str, Any] = {}
        try:
            self.request = expand(argv)
        except OSError as error:
            raise AezooError(f"cannot read {error.filename}: {error.strerror}; give another path") from error
        super().__init__(
            Autoencoder,
            DataModule,
            trainer_class=RunTrainer,
            subclass_mode_model=True,
            parser_class=Parser,
            parser_kwargs={"prog": "aezoo"},
            save_config_callback=SaveConfig,
            save_config_kwargs={"command": " ".join(shlex.join(["aezoo", *argv]).split())},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            # checkpoints contain the constructor's values: no class paths, and all defaults
            load_from_checkpoint_support=False,
            # the loaders shard by rank themselves, and one line replaces the table of layers
            trainer_defaults={
                "max_epochs": 20,
                "check_val_every_n_epoch": trainer_settings.SCHEDULED,
                "log_every_n_steps": 1,
                "use_distributed_sampler": False,
                "enable_model_summary": False,
            },
        )

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        super().setup_parser(*args, **kwargs)
        command, parser = self.request.argv[0], self.command_parser
        if command in ("validate", "test"):
            # the summary callback prints the figures
            parser.set_defaults({"verbose": False})
        elif command == "predict":
            # predictions are written to a file; Lightning would also keep all of them in memory
            parser.set_defaults({"return_predictions": False})
        flag_help.explain(parser, command)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the requested subcommand, because each parser takes a tenth of a second to build."""
        command = self.request.argv[0]
        return {command: LightningCLI.subcommands()[command]}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.command_parser = parser
        trainer_settings.parse_int_before_float(Trainer)
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        parser.add_lightning_class_args(Autoencoder, "model", subclass_mode=True, required=False)
        # as add_lightning_class_args does; no file may give a permission
        parser.add_class_arguments(DataModule, "data", fail_untyped=False, sub_configs=True, skip={*PERMISSIONS})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name in FROM_DATA:
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
        for name, cls in DEFAULT_CALLBACKS.items():
            parser.add_lightning_class_args(cls, name)
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="The name of a new run: its folder is <default_root_dir>/<name>/<number>. By default that of the "
            "recipe, or of the model and the data.",
        )
        parser.add_argument(
            "--logger",
            type=list[str] | bool | str | None,
            default=None,
            help=f"Where metrics and pictures go in addition to the run folder: {', '.join(loggers.KINDS)} with commas "
            "between them, or none. By default tensorboard.",
        )
        parser.add_argument(
            "--compile",
            type=Literal[compilation.MODES],
            default="auto",
            help="Compile the training step: auto, which compiles if the run is long enough, off, or "
            "a mode of torch.compile.",
        )
        parser.add_argument("--speed", type=Literal[speed.SETTINGS], default="auto", help=speed.HELP)
        parser.add_argument(
            "--importance_samples",
            type=_SampleCount,
            default=100,
            help="Importance samples for each data sample in the log-likelihood that validate and test report.",
        )
        parser.add_argument(
            "--matmul_precision",
            type=Literal["highest", "high", "medium"],
            default="high",
            help="How a GPU multiplies float32 matrices: high uses TF32, highest uses plain float32.",
        )

        parser.add_argument(
            "--rank_timeout",
            type=float,
            default=600.0,
            help="Seconds that processes wait for one another before the run ends, including for downloads by the "
            "first process.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        argv, command = self.request.argv, self.request.argv[0]
        check_flags(argv, self.request.model, self.command_parser)
        self.config = parser.parse_args(argv)
        if command != "fit" and not self.config[command].get("ckpt_path"):
            raise AezooError(f"{command} needs a trained model: give --ckpt_path RUN_OR_FILE")
        if self.config[command].get("ckpt_path") not in (None, str(self.request.source)):
            raise AezooError("ckpt_path is not read from a file: give --ckpt_path RUN_OR_FILE on the command line")
        seed = self.config[command].get("seed_everything")
        if not isinstance(seed, bool | None) and not 0 <= seed < 2**32:
            raise AezooError(f"seed_everything takes a number from 0 to {2**32 - 1}, got {seed}")
        sections: dict[str, type] = {"trainer": Trainer, "data": DataModule, **DEFAULT_CALLBACKS}
        for section, cls in sections.items():
            value = self.config[command].get(section)
            # an empty section is None
            if not isinstance(value, Namespace) and (value is not None or inspect.signature(cls).parameters):
                raise AezooError(f"{section} is {value!r}: write its settings below it, one per line, or leave it out")
        trainer_settings.check(self.config[command]["trainer"])
        loggers.check(self.config[command]["logger"])
        if not 1 <= self.config[command]["rank_timeout"] <= 1e6:
            raise AezooError(f"rank_timeout takes seconds from 1 to 1e6, got {self.config[command]['rank_timeout']}")
        # no setting and no environment variable can make Lightning load files that run code
        self.config[command]["weights_only"] = True
        if self.config[command].get("model") is None:
            raise AezooError("which model? Give --model NAME, -c RECIPE, or --ckpt_path RUN (see `aezoo list`)")

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would put a checkpoint's values above the flags here; `expand` has put them below."""

    def _is_given(self, section: str, key: str) -> bool:
        return setting(self.request.argv, section, key) is not None

    def _choose_model(self) -> None:
        """Set code size, likelihood and scale by the data, where neither a flag nor a file gives them."""
        if self.subcommand != "fit" or self.request.source is not None:
            return
        config, data, cls = self.config[self.subcommand], self.datamodule, type(self.model)
        given, shape = dict(self.model.hparams), data.input_shape
        free = [key for key in ("latent_dim", "likelihood") if key in given and not self._is_given("model", key)]
        scale = None if data.scale == "auto" and not self._is_given("data", "scale") else data.scale
        unbounded = ("likelihood" in free or scale is None) and data.source.is_unbounded()
        chosen: dict[str, Any] = {}
        if "latent_dim" in free:
            chosen["latent_dim"] = budgets.choose_latent_dim(cls, given["latent_dim"], shape)
        if "likelihood" in free:
            chosen["likelihood"] = budgets.choose_likelihood(given["likelihood"], shape, unbounded, scale)
        if scale is None and "likelihood" in given:
            bounded = likelihood({**given, **chosen}["likelihood"]).unit_interval
            scale = budgets.choose_scale(shape, unbounded, bounded)
            if scale != data.scale and isinstance(data.source, InMemory):
                data.choose(scale=scale)
                config["data"]["scale"] = self.chosen["data.scale"] = scale
        changed = {key: value for key, value in chosen.items() if value != given[key]}
        if changed:
            # the same initial weights as if these values were given
            torch.set_rng_state(self._rng_state)
            self.model = cls(**{**given, **changed})
            for key, value in changed.items():
                config["model"]["init_args"][key] = value
        self.chosen |= {f"model.{key}": value for key, value in chosen.items()}

    def before_instantiate_classes(self) -> None:
        """Keep memory pages for speed, and stop here if `--resume` finds a run that has ended by itself."""
        speed.choose(self.config[self.subcommand]["speed"])
        speed.keep_memory()
        self._rng_state = torch.get_rng_state()
        name, run = self.config[self.subcommand]["name"], self.request.run
        named = any(word.partition("=")[0] == "--name" for word in self.request.argv)
        if name == "":
            raise AezooError("--name is empty: give the run a name, or drop the flag")
        if named and run is not None and archives.safe_name(name or "") != run.resolve().parent.name:
            raise AezooError(f"{run} keeps its name: drop --name {name}, or start a new run without --ckpt_path")
        source = self.request.source
        if self.request.resumes and source is not None:
            trainer, early = (self.config[self.subcommand][key] for key in ("trainer", "early_stopping"))
            limits = trainer.get("max_epochs"), trainer.get("max_steps")
            line = resume.finished_message(source, self.request.run, *limits, early.as_dict())
            if line is not None:
                print(line, file=sys.stderr)
                sys.exit(0)

    def instantiate_classes(self) -> None:
        trainer = self.config[self.subcommand]["trainer"]
        given = trainer["logger"]
        trainer["logger"], self.own_loggers = loggers.split(given)
        try:
            super().instantiate_classes()
        except AezooError:
            raise
        except Exception as error:  # classes of Lightning or a plug-in may raise anything for invalid values
            if registry.is_out_of_memory(error.__cause__ or error):
                raise AezooError(registry.out_of_memory_message(self.request.model or "the model")) from error
            # jsonargparse wraps a constructor's error in a report about all types that it tried
            raise AezooError(plain_message(f"{error}" or repr(error), self.command_parser)) from error
        finally:
            trainer["logger"] = given  # as in the run's config.yaml
        kind = display_name(type(self.model))
        values.check_plain(
            dict(self.model.hparams), f"{kind} could not be loaded from its checkpoint: its hyperparameters"
        )
        self.model.importance_samples = self._setting("importance_samples")
        if self.request.source is not None:
            check_against(self.request.stored, self.request.source, self.model, self.subcommand == "fit")
        if self.subcommand == "fit":
            print_differences("data", self.request.stored_data, dict(self.datamodule.hparams))
        else:
            warn_other_splits(self.request.stored_data, dict(self.datamodule.hparams))

    def _setting(self, key: str) -> Any:
        """A setting of the command, with its classes instantiated."""
        return self.config_init[self.subcommand][key]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self._choose_model()
        config = dict(self._setting("trainer"))
        extra: list[Callback] = [self._setting(key) for key in self.command_parser.callback_keys]
        if self.subcommand == "fit" and self.request.source is None and not config.get("fast_dev_run"):
            self._set_budget(config)
        if config.get("enable_checkpointing") is False or config.get("fast_dev_run"):
            extra = [callback for callback in extra if not isinstance(callback, callbacks.Checkpoints)]
        if config.get("enable_progress_bar") is False:
            extra = [callback for callback in extra if not isinstance(callback, callbacks.ProgressBar)]
        # the other ranks write to rank zero's trainer.log_dir, which is broadcast
        first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        writes = first and self.subcommand in ("fit", "predict") and not config.get("fast_dev_run")
        run_dir = self.run_dir(Path(config.get("default_root_dir") or "runs"), writes)
        config["default_root_dir"] = str(run_dir)
        for callback in extra:
            if isinstance(callback, callbacks.Checkpoints):
                callback.run = run_dir
                if writes and self.subcommand == "fit":
                    self._lock_checkpoints(callback.dirpath)
        for callback in [*extra, *(config.get("callbacks") or [])]:
            # Lightning would use the folder of the first logger
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(run_dir / run_folder.CHECKPOINTS)
        # an evaluation has no logger by default: its events at step 0 would truncate the curves of the run
        config["logger"] = loggers.make(
            self._setting("logger"),
            config.get("logger"),
            self.own_loggers,
            run_dir,
            self._resumed_step(run_dir),
            fit=self.subcommand == "fit",
            writes=first and not config.get("fast_dev_run"),
        )
        if isinstance(config["logger"], list):
            self.exit_stack.callback(loggers.close, config["logger"])
        if config.get("logger") and self.model.lr_schedule != "constant":
            extra.append(LearningRateMonitor(logging_interval="step"))
        scheduled = trainer_settings.take_schedule(config) and self.subcommand == "fit"
        config.update(kwargs)
        trainer = self._instantiate_trainer(config, [callback for callback in extra if callbacks.is_enabled(callback)])
        if scheduled:
            # after Lightning's timer, which may stop the run, and before checkpoints
            others = [callback for callback in trainer.callbacks if not isinstance(callback, Checkpoint)]  # type: ignore[attr-defined]
            trainer.callbacks.insert(len(others), callbacks.ValidationSchedule())  # type: ignore[attr-defined]
        trainer_settings.check_processes(trainer)
        distributed.limit_wait(trainer, self._setting("rank_timeout"))
        return trainer

    def _set_budget(self, config: dict[str, Any]) -> None:
        """Choose batch size and epochs by the data, unless flags or files set these or other limits."""
        own_limit = config.get("max_steps", -1) != -1 or config.get("max_time") is not None
        own_epoch = config.get("limit_train_batches") is not None or bool(config.get("overfit_batches"))
        batch_size = not self._is_given("data", "batch_size")
        max_epochs = not (own_limit or own_epoch or self._is_given("trainer", "max_epochs"))
        self.budget = self.save_config_kwargs["budget"] = Budget(self.config["fit"], batch_size, max_epochs)

    def _lock_checkpoints(self, dirpath: Any) -> None:
        """Prevent other runs from writing into a folder of checkpoints that the user has named."""
        if dirpath is None or "://" in str(dirpath):
            return
        folder = Path(dirpath)
        stays = run_folder.existing_parent(folder)
        with contextlib.suppress(OSError):  # reported when the first file is written
            folder.mkdir(parents=True, exist_ok=True)
            self.exit_stack.enter_context(run_folder.locked(folder, stays, "give another --checkpoints.dirpath"))

    def _resumed_step(self, run_dir: Path) -> int | None:
        """The step from which loggers continue in a folder that a fit has written to; None for others."""
        if self.subcommand != "fit" or not any(run_dir.glob("[!.]*")):
            return None
        dashboard.wait_for_new_timestamp(run_dir)
        return self.request.step

    def run_dir(self, root: Path, writes: bool) -> Path:
        """The folder of this run: that of the checkpoint, or the next free number in `<root>/<recipe or model-data>`.

        Args:
            root: the folder of all runs.
            writes: whether this process creates the folder and writes into it.
        """
        inside = None if self.request.source is None else self.request.run
        if inside is not None:
            folder = stays = inside
        else:
            # processes that a multi-device strategy starts must use the same number
            if RUN_DIR not in os.environ:
                home = root / self.run_name()
                stays = run_folder.existing_parent(home)
                os.environ[RUN_DIR] = str((run_folder.create_next if writes else run_folder.next_free)(home))
            else:
                stays = Path(os.environ[RUN_DIR])
            folder = Path(os.environ[RUN_DIR])
        # predicting from a run that is still training is allowed
        if writes and (self.subcommand == "fit" or inside is None):
            self.exit_stack.enter_context(run_folder.locked(folder, stays))
        return folder

    def run_name(self) -> str:
        """The name of the folder of runs: the given name, the recipe's, or that of the model and the data."""
        model = display_name(type(self.model))
        own = f"{model}-{data_set_name(*(str(self.datamodule.hparams[key]) for key in ('name', 'root')))}"
        return archives.safe_name(self._setting("name") or self.request.run_name or own)

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            distributed.connect(self.trainer)
            super()._run_subcommand(subcommand)
        except SystemExit:
            # Lightning exits with 1 after an interrupt that it has handled
            held = self._setting("interrupt")
            with contextlib.suppress(OSError):  # the terminal may be closed
                print(self._resume_hint(), file=sys.stderr)
            sys.exit(128 + (held.signum or signal.SIGINT))
        except BaseException as error:
            of_other_rank = distributed.terminate_other_ranks(self.trainer, error)
            if isinstance(error, BrokenPipeError):
                with contextlib.suppress(OSError):
                    print(self._resume_hint(" by a broken pipe, because the output is not read,"), file=sys.stderr)
                raise
            line = run_errors.one_line(error, self.request.source, self.datamodule.batch_size)
            if line is None and of_other_rank is not None:
                line = AezooError(of_other_rank)
            if line is None:
                raise
            raise line from error

    def _resume_hint(self, advice: str = "") -> str:
        last = getattr(callbacks.checkpoint_callback(self.trainer), "last_model_path", None)
        if self.subcommand != "fit" or not last:
            return f"aezoo: interrupted{advice}; nothing was saved"
        run = run_folder.run_of(Path(last), Path(self.trainer.default_root_dir)) or Path(last)
        # a run that was moved is accessed by a link that is removed at the end of this process
        run = run.resolve() if run.is_symlink() else run
        return (
            f"aezoo: interrupted{advice} at epoch {self.trainer.current_epoch}, step {self.trainer.global_step}; "
            f"last saved: {last}\ncontinue with: aezoo fit --ckpt_path {shlex.quote(str(run))}"
        )

    def before_fit(self) -> None:
        """Set compilation and matmul precision, and print two lines about the model and the data."""
        self.model.compile_mode = self._setting("compile")
        if self.trainer.strategy.root_device.type == "cuda":
            torch.set_float32_matmul_precision(self._setting("matmul_precision"))
        if not self.trainer.is_global_zero:
            return  # the other ranks wait for rank zero, which may be downloading the data
        parameters = sum(p.numel() for p in self.model.parameters())
        kind = type(self.model)
        name = display_name(kind)
        print(f"{name}: {parameters:,} parameters, code shape {self.model.code_shape}")
        # the data is read here, before Lightning attaches the trainer to it
        self.datamodule.source.processes = local_processes(self.trainer)
        print(self.datamodule.describe())
        if self.budget is not None:
            self.budget.choose(self.trainer, self.datamodule)
            self.chosen |= self.budget.chosen
        if self.chosen:
            print(self._chosen_line())
        slow = cost.advice(self.model, self.datamodule.batch_size, self.trainer.strategy.root_device)
        if slow:
            print(slow)
        if self._test_follows():
            self._check_test_share()
        # one table at the end shows the figures of training and test
        self._setting("summary").test_follows = self._test_follows()

    def _chosen_line(self) -> str:
        parts = [f"{key} {value}" for key, value in self.chosen.items()]
        if "trainer.max_epochs" in self.chosen:
            train: Any = self.datamodule.dataset("train")
            steps = budgets.steps_per_epoch(math.ceil(len(train) / self.trainer.world_size), self.datamodule.batch_size)
            parts[-1] += f" ({self.chosen['trainer.max_epochs'] * steps:,} steps)"
        return f"chosen from the data, unless given: {', '.join(parts)}"

    def after_fit(self) -> None:
        """Test the best weights, so that a run ends with figures on data it has not seen."""
        if self._test_follows():
            # a run of less than an epoch has no best weights
            best = getattr(callbacks.checkpoint_callback(self.trainer), "best_model_path", "") or None
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best, verbose=False)

    def _check_test_share(self) -> None:
        # Lightning would report this only after the training
        samples: Any = self.datamodule.dataset("test")
        share = self.trainer.limit_test_batches
        batches = math.ceil(len(samples) / self.trainer.world_size / self.datamodule.batch_size)
        if isinstance(share, float) and 0 < share * batches < 1:
            raise AezooError(
                f"trainer.limit_test_batches is {share}, less than one of {batches} batches: give a whole number, or a "
                f"share of at least 1/{batches}"
            )

    def _test_follows(self) -> bool:
        savers = [saver for saver in self.trainer.checkpoint_callbacks if isinstance(saver, callbacks.Checkpoints)]
        kept = any(saver.save_top_k != 0 for saver in savers)
        return kept and self.trainer.limit_test_batches != 0 and "test" in self.datamodule.splits()


def main(argv: list[str]) -> None:
    """Run `fit`, `validate`, `test` or `predict`.

    Raises:
        AezooError: an error that the user can fix.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP, 0 after help.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_relevant)
    # data in memory need no workers
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Lightning 2.6 uses a class that newer torch versions rename; the user cannot do anything about it
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)", category=FutureWarning)
    launcher.end_with_launcher()
    if "LOCAL_RANK" not in os.environ:
        os.environ.pop(RUN_DIR, None)
        os.environ.pop(RESUMED, None)
    with run_errors.system_errors_in_one_line(argv[0]):
        for attempt in range(_ATTEMPTS):
            try:
                with contextlib.ExitStack() as exit_stack:
                    AezooCLI(argv, exit_stack)
                break
            except (AezooError, FileNotFoundError) as error:
                # a run that is still training may have replaced its best checkpoint
                cause = error.__cause__ if isinstance(error, AezooError) else error
                missing = isinstance(cause, FileNotFoundError) and str(cause.filename).endswith(".ckpt")
                if argv[0] == "fit" or not missing or attempt == _ATTEMPTS - 1:
                    raise


def _is_relevant(record: logging.LogRecord) -> bool:
    """Whether a log record is useful; Lightning's advertisements and its list of absent accelerators are not."""
    text = record.getMessage()
    return not any(word in text for word in ("litlogger", "litmodels", "Tip:", "TPU available", "HPU available"))
