"""The `aezoo fit --help_all` texts of flags that are read before Lightning's, or have another meaning here."""

import argparse

from lightning.pytorch.cli import LightningArgumentParser

from aezoo.cli.parsing import FROM_DATA
from aezoo.security import policy

_FIT = "A run folder (runs/vae/0), to continue from its newest complete checkpoint, or a checkpoint file."
_USE = "A run folder (runs/vae/0), whose best checkpoint is used, or a checkpoint file."
_WORDS = {
    "config": "A name of `aezoo recipes`, or a YAML file. Several are read in order; flags override them.",
    "model": "A model of `aezoo list`, such as vae, or a class of your own, such as my_package.MyModel. "
    "--model.help NAME shows its flags.",
    "data": "A data set, as with --data.name, or a YAML file of settings for the data.",
    "data.batch_size": "Samples in a batch of each process, by default 16 to 128, by the number of training samples.",
    "trainer.max_epochs": "Stop after this many epochs; -1: no limit except max_steps and max_time. By default 20, and "
    "more for few samples.",
    "trainer.check_val_every_n_epoch": "Epochs from one validation to the next. By default 0: each epoch, or less "
    "often if epochs are short, see docs/training.md; null: --trainer.val_check_interval counts batches of all epochs.",
    "trainer.max_steps": "Stop after this many optimiser steps, even within an epoch; -1: no such limit.",
    "trainer.default_root_dir": "The folder of all runs, by default runs; a run is <folder>/<name>/<number>.",
    "trainer.callbacks": "More callbacks, by default none; --trainer.callbacks+=NAME adds one. Those of aezoo have "
    "their own flags, below.",
    "trainer.logger": "A logger of Lightning's or your own, by its class, in addition to those of --logger; false: "
    "only those of --logger.",
}


class _ReadBefore(argparse.Action):
    """Only shown in the help: `aezoo.cli.config_resolution` reads the flag before this parser reads the others."""

    def __call__(self, parser: argparse.ArgumentParser, *args: object) -> None:
        parser.error(f"{self.option_strings[0]} needs a value")


def explain(parser: LightningArgumentParser, command: str) -> None:
    """Make a command's `--help_all` describe what its flags do here.

    Args:
        parser: the complete parser of the command.
        command: `fit`, `validate`, `test` or `predict`.
    """
    if command == "fit":
        _add_documented_flag(
            parser,
            "--resume",
            "RUN|auto",
            "Continue a run that was stopped: a run folder or a checkpoint, or auto, which finds the last run of the "
            "same command, or starts one.",
        )
    _add_documented_flag(
        parser, policy.FLAG, "PKG", "Let a configuration name classes of this package; can be given repeatedly."
    )
    _add_documented_flag(
        parser, policy.REMOTE_FLAG, None, "Open an s3:// address that is given as --data.root, see docs/data.md."
    )
    words = _WORDS | {"ckpt_path": _FIT if command == "fit" else _USE, "weights_only": argparse.SUPPRESS}
    for action in parser._actions:
        if action.dest == "model":
            action.extra_help = str  # type: ignore[attr-defined]  # not the paths of all classes
        if "--model.help" in action.option_strings:
            action.sub_add_kwargs = {"skip": {*FROM_DATA}}  # type: ignore[attr-defined]
        if action.dest in words:
            action.help = words[action.dest]
    for group in parser._action_groups:
        if any(action.dest == "ckpt_path" for action in group._group_actions):
            group.title = "The checkpoint"


def _add_documented_flag(parser: LightningArgumentParser, flag: str, metavar: str | None, text: str) -> None:
    nowhere, n = argparse.SUPPRESS, 0 if metavar is None else None
    parser.add_argument(flag, action=_ReadBefore, dest=nowhere, default=nowhere, metavar=metavar, nargs=n, help=text)
