"""The `--help` of fit, validate, test and predict: the most used flags on one screen, without torch.

`--help_all` shows the help of the complete parser.
"""

from typing import NamedTuple

# width of a line, and of its flag
WIDTH = 100
_FLAG = 32


class Flag(NamedTuple):
    """One line.

    Attributes:
        flag: the flag and its value.
        meaning: what it does.
        default: its default; empty if it is part of the meaning.
    """

    flag: str
    meaning: str
    default: str = ""


Groups = dict[str, tuple[Flag, ...]]

_FIT: Groups = {
    "Model and data": (
        Flag("-c, --config NAME|FILE", "a name of `aezoo recipes`, or a YAML file; flags override it"),
        Flag("--model NAME", "a name of `aezoo list`; --model.KEY VALUE: its settings"),
        Flag("--data NAME|FOLDER|FILE", "digits, cifar10, folder, array, hf, stream, ...", "mnist5k"),
        Flag("--data.root PATH", "where the files are, or where downloads go", "data"),
        Flag("--data.size N", "resize and crop images to squares of this side", "as they are"),
        Flag("--data.batch_size N", "samples in a batch of each process", "16 to 128"),
        Flag("--data.hflip P", "augment images; also --data.crop_padding, --data.color_jitter", "0.0"),
        Flag("--data.val_fraction SHARE", "share of the training samples for validation", "0.1"),
    ),
    "Training": (
        Flag("--trainer.max_epochs N", "and --trainer.max_steps N, --trainer.max_time D:H:M:S", "20 or more"),
        Flag("--early_stopping.patience N", "epochs without a lower validation loss; 0: never stop", "20"),
        Flag("--model.lr RATE", "and --model.lr_schedule, --model.optimizer adamw", "the model's"),
        Flag("--model.latent_dim N", "size of the code, for most models", "the model's"),
        Flag("--model.likelihood KIND", "bernoulli, gaussian:learned, laplace, ...", "the model's"),
        Flag("--seed_everything N", "initial weights and noise; --data.seed N: splits and order", "0"),
    ),
    "Hardware": (
        Flag("--trainer.devices N", "and --trainer.accelerator cpu|gpu|mps", "auto"),
        Flag("--trainer.precision KIND", "bf16-mixed, 16-mixed, 64-true, ...", "32-true"),
        Flag("--compile MODE", "off, default, reduce-overhead, max-autotune", "auto"),
    ),
    "Output and resuming": (
        Flag("--name NAME", "name of the run: runs/NAME/0", "recipe, or model-data"),
        Flag("--logger NAME,NAME", "some of tensorboard, csv, wandb, mlflow; or none", "tensorboard"),
        Flag("--samples.every_n_epochs N", "pictures; also --reconstructions, --latents, ...; 0: none", "auto"),
        Flag("--checkpoints.save_top_k N", "best checkpoints to keep, by --checkpoints.monitor", "1"),
        Flag("--resume RUN|auto", "continue a run that was stopped, or the last run of this command"),
        Flag("--ckpt_path RUN|FILE", "start from a checkpoint, with other flags"),
    ),
}
_EVALUATE: Groups = {
    "Model and data": (
        Flag("--ckpt_path RUN|FILE", "a run folder, such as runs/vae/0, or a checkpoint; required"),
        Flag("--data NAME|FOLDER|FILE", "data other than those of the run", "the run's"),
        Flag("--data.root PATH", "where their files are", "the run's"),
        Flag("--data.batch_size N", "samples in a batch of each process", "the run's"),
    ),
    "Settings": (
        Flag("--importance_samples N", "draws for each log-likelihood", "100"),
        Flag("--trainer.devices N", "and --trainer.accelerator cpu|gpu|mps", "auto"),
        Flag("--trainer.precision KIND", "bf16-mixed, 16-mixed, 64-true, ...", "32-true"),
        Flag("--seed_everything N", "seed of random draws", "0"),
    ),
}
_PREDICT: Groups = {
    **_EVALUATE,
    "Output": (Flag("--predictions.folder DIR", "codes, reconstructions and scores", "the run's folder"),),
}
# usage and purpose, groups and examples of each command
COMMANDS: dict[str, tuple[str, Groups, tuple[str, ...]]] = {
    "fit": (
        "fit -c RECIPE | --model NAME --data SET ...    train, and test the best weights",
        _FIT,
        (
            "fit -c vae --model.latent_dim 32",
            "fit --model conv_ae --data folder --data.root photos --data.size 64",
        ),
    ),
    "validate": (
        "validate --ckpt_path RUN_OR_FILE ...    evaluate on the validation split",
        _EVALUATE,
        ("validate --ckpt_path runs/vae/0",),
    ),
    "test": (
        "test --ckpt_path RUN_OR_FILE ...    evaluate on the test split",
        _EVALUATE,
        ("test --ckpt_path runs/vae/0 --importance_samples 1000",),
    ),
    "predict": (
        "predict --ckpt_path RUN_OR_FILE ...    write codes, reconstructions and scores",
        _PREDICT,
        ("predict --ckpt_path runs/vae/0 --data array --data.root new.npy",),
    ),
}


def text(command: str) -> str:
    """The help of `fit`, `validate`, `test` or `predict`, at most `WIDTH` columns wide."""
    usage, groups, examples = COMMANDS[command]
    lines = [f"usage: aezoo {usage}"]
    for title, flags in groups.items():
        lines += ["", title]
        lines += [f"  {line.flag:<{_FLAG - 2}}{line.meaning}{line.default and f' ({line.default})'}" for line in flags]
    lines += ["", "All flags"]
    everything = (
        (f"aezoo {command} --help_all", "every flag with its type and default"),
        (f"aezoo {command} --model.help NAME", "the flags of a model"),
        (f"aezoo {command} ... --print_config", "all settings as YAML, for -c"),
    )
    lines += [f"  {call:<{_FLAG + 2}}{meaning}" for call, meaning in everything]
    return "\n".join([*lines, "", "Examples", *(f"  aezoo {example}" for example in examples), ""])
