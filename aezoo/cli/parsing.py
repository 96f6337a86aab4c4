"""Flags and settings parsed by jsonargparse, with registry names and one-line errors."""

import difflib
import re
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from aezoo import registry
from aezoo.cli import LIGHTNING_COMMANDS
from aezoo.cli.config_resolution import expand_model_names
from aezoo.errors import AezooError
from aezoo.security import policy

# arguments of models that are taken from the data
FROM_DATA = ("input_shape", "num_classes")


class Parser(LightningArgumentParser):
    """LightningCLI's parser, with registry names in YAML and one-line errors."""

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        return super().parse_string(expand_model_names(content), *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise AezooError(plain_message(message, self))


def check_flags(argv: list[str], model: str | None, parser: LightningArgumentParser) -> None:
    """Reject an unknown flag and suggest the most similar known one, before jsonargparse does it in five lines."""
    known = _flags(parser)
    for token, after in zip(argv[1:], [*argv[2:], "--"], strict=False):
        flag = token.partition("=")[0].rstrip("+")
        if not flag.startswith("--") or flag in known or flag == "--model.help":
            continue
        if flag.startswith("--model.") and "=" not in token and after.startswith("--"):
            raise AezooError(f"{flag} needs a value")  # jsonargparse would say that --model needs one
        if flag.replace(".init_args", "") in [f"--model.{name}" for name in FROM_DATA]:
            raise AezooError(f"{flag} is determined by the data: leave it out, or change the data with --data...")
        candidates = known
        if flag.startswith("--model."):
            if model is None or registry.resolve(model) is None:
                continue
            candidates = [f"--model.{key}" for key in registry.hyperparameters(model)]
            if flag.replace(".init_args", "") in candidates:
                continue
        parts = flag.split(".")
        if any(".".join(parts[:i]) in known for i in range(2, len(parts))) and candidates is known:
            continue
        complete = "--help_all" if argv[0] in LIGHTNING_COMMANDS else "--help"
        raise AezooError(f"unknown flag {flag}{_near(flag, candidates)} See `aezoo {argv[0]} {complete}`.")


def _flags(parser: LightningArgumentParser) -> list[str]:
    flags = {option for option in parser._option_string_actions if option.startswith("--")}
    for action in parser._actions:
        for part in getattr(action, "_name_parser_map", {}).values():
            flags.update(_flags(part))
    return sorted(flags)


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]}?" if near else "."


def plain_message(message: str, parser: LightningArgumentParser) -> str:
    """A message of jsonargparse on one line: the key, what it takes, what it got."""
    denied = re.search(r"Importing '([\w.]+)' is not allowed, denied by the '([\w.*]+)' entry", message)
    if denied:
        return policy.refusal(denied[1], denied[2])
    unknown = re.search(r"(?:Group '([\w.]+)' )?does not accept option '([\w.]+)'", message)
    if unknown:
        name = ".".join(filter(None, unknown.groups()))
        return f"unknown setting {name}{_near(f'--{name}', _flags(parser)).replace('--', '')}"
    bare = re.search(r"[Uu]nrecognized arguments: (\S+)", message)
    if bare and bare[1].startswith("-"):
        spelling = f"-{bare[1]}"
        named = spelling.startswith("--model.")
        return f"unknown flag {bare[1]}{f', did you mean {spelling}?' if named else _near(spelling, _flags(parser))}"
    if bare:
        suggestion = {
            "--model": "a model",
            "-c": "a recipe or a file",
            "--ckpt_path": "a run",
            "--input": "what to work on",
        }
        known = {"-c", *_flags(parser)} if "--config" in _flags(parser) else _flags(parser)
        cures = [f"{kind} is {flag} {bare[1]}" for flag, kind in suggestion.items() if flag in known]
        return f"{bare[1]!r} does not belong to a flag: {', '.join(cures)}"
    unread = re.search(r'Parser key "(\w+)": Unable to load config "(.*)"', message)
    if unread:
        return f"--{unread[1]} {unread[2]}: no such file, or not a file with settings in YAML"
    keys = ".".join(re.findall(r'Parser key "([\w.]+)"', message))
    absent = re.search(r"Expected a path but (\w+) either not accessible or invalid", message)
    if absent and keys.startswith("trainer."):
        return (
            f"{keys}: no class is named {absent[1]}: `aezoo fit --{keys}.help` lists Lightning's, a class of your own "
            "is my_package.Name with --allow my_package"
        )
    kinds = [kind for kind in re.findall(r"Expected an? (?:<class '([\w.]+)'>)", message) if kind != "NoneType"]
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    kinds += ["one of " + choices.replace("'", "") for choices in re.findall(r"typing\.Literal\[([^\]]*)\]", message)]
    if keys and kinds and value:
        return f"{keys} takes {' or '.join(dict.fromkeys(kinds))}, got {value[1]}"
    reasons = _reasons(message)
    text = reasons[0] if reasons else " ".join(message.split())
    return f"{keys}: {text}" if keys and reasons else text


def _reasons(message: str) -> list[str]:
    """The items of a message's list, each on one line, with the most specific first."""
    items: list[str] = []
    depth: int | None = None
    for line in message.splitlines():
        indent = len(line) - len(line.lstrip())
        if line.lstrip().startswith("- "):
            items.append(line.strip().removeprefix("- "))
            depth = indent
        elif depth is not None and indent > depth and line.strip():
            items[-1] += f" {line.strip()}"
        else:
            depth = None
    named = [re.sub(r"^Problem with given class_path '(?:[\w.]+\.)?(\w+)':", r"\1:", item) for item in items]
    reported = [" ".join(item.split()) for item in named if "NoneType" not in item]
    # jsonargparse lists a reason for each accepted type
    return sorted(reported, key=lambda item: bool(re.match("Expected an? |Not a valid |Does not validate", item)))
