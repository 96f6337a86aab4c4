"""Networks whose activations are data: opened by name, run on samples, and read at their layers by forward hooks."""

import copy
import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from aezoo.data.source import Options
from aezoo.errors import AezooError
from aezoo.io.hub_files import local_path
from aezoo.nets.blocks.classifier import Classifier
from aezoo.nets.blocks.pretrained import cached_weights
from aezoo.security import policy
from aezoo.training.seeding import forked_rng

_CPU = torch.device("cpu")


@dataclass
class Network:
    """The network whose activations are taken.

    Attributes:
        module: the network, in evaluation mode.
        prepare: converts samples to the network's input, (B, *shape) -> (B, ...).
    """

    module: nn.Module
    prepare: Callable[[Tensor], Tensor] = lambda x: x


def open_network(options: Options, shape: tuple[int, ...], classes: int | None) -> Network:
    """The network that `--data.network` names.

    Args:
        options: network, weights and seed count.
        shape: shape of one sample.
        classes: number of classes of the samples.

    Raises:
        AezooError: there is none of that name, it may not be imported, or its weights are missing.
    """
    name = options.network
    is_file = Path(name).exists() or os.sep in name or name.endswith(".ckpt")
    is_import = not is_file and "." in name and all(part.isidentifier() for part in name.split("."))
    if options.weights == "random":
        if is_file or is_import:
            raise AezooError(f"--data.weights random does not apply to {name}, which has weights of its own: drop it")
        rank_zero_warn(f"{name} gets RANDOM weights, fixed by --data.seed {options.seed}: its activations are not "
                       "those of a trained network")  # fmt: skip
    with forked_rng(_CPU), torch.inference_mode(False):
        torch.manual_seed(options.seed)
        if name == "classifier":
            if classes is None:
                raise AezooError(f"{options.of} has no classes for a classifier to learn: give another --data.network")
            network = Network(Classifier(shape, classes))
        elif is_file:
            from aezoo.io.checkpoint import load_model

            network = Network(load_model(local_path(name)).float())
        elif is_import:
            network = Network(_imported_network(name))
        else:
            network = _torchvision_network(name, options.weights, shape)
    network.module.requires_grad_(False).eval()
    return network


def _torchvision_network(name: str, weights: str, shape: tuple[int, ...]) -> Network:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        near = difflib.get_close_matches(name, ["classifier", *known], n=3)
        hint = f", did you mean {' or '.join(map(repr, near))}?" if near else ":"
        raise AezooError(f"unknown network {name!r}{hint} --data.network takes classifier, a classifier of torchvision "
                         "such as resnet18, the run of a model of the zoo, or the import path of a module")  # fmt: skip
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise AezooError(f"{name} takes images of 1 or 3 channels, not samples of shape {shape}: give another data "
                         "set as --data.of or another --data.network")  # fmt: skip
    module = models.get_model(name, weights=None)
    if weights == "stored":
        instead = "give --data.weights random, whose activations are not those of a trained network"
        with cached_weights(name, instead) as state:
            module.load_state_dict(state)
        if hasattr(module, "transform_input"):
            module.transform_input = True  # as torchvision does for weights that were trained so
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

    def prepare(x: Tensor) -> Tensor:
        return (x.expand(-1, 3, -1, -1) - mean.to(x)) / std.to(x)

    return Network(cast(nn.Module, module), prepare)


def _imported_network(path: str) -> nn.Module:
    """A copy of a module, or the result of a class or function without arguments, by import path."""
    from jsonargparse import ArgumentError, ArgumentParser

    if not policy._opened:
        # in a program that does not use the command line: the same rule, and what the environment allows
        policy.enforce(policy.take_flags([])[1])
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=type[nn.Module] | Callable)
    try:
        found = parser.parse_args([f"--network={path}"]).network
    except ArgumentError as error:
        denied = re.search(r"Importing '([\w.]+)' is not allowed, denied by the '([\w.*]+)' entry", str(error))
        if denied:
            raise AezooError(policy.refusal(denied[1], denied[2])) from error
        reasons = re.findall(r"^\s*- (.*)$", str(error), re.MULTILINE)
        raise AezooError(f"--data.network {path} cannot be imported: {(reasons or [str(error)])[0]}"
                         f"{_suggest_names(path)}") from error  # fmt: skip
    if isinstance(found, nn.Module):
        return copy.deepcopy(found)
    # functions among what any configuration may name are not called: some of them start runs
    own = any(f"{path}.".startswith(f"{root}.") for root in policy.PACKAGES)
    if not (isinstance(found, type) and issubclass(found, nn.Module)) and (own or not inspect.isfunction(found)):
        raise AezooError(f"--data.network {path} is neither a torch.nn.Module nor a function of yours that returns one")
    try:
        module = found()
    except Exception as error:  # the user's code may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise AezooError(f"--data.network {path} cannot be built without arguments ({reason}): give a function that "
                         "builds it") from error  # fmt: skip
    if not isinstance(module, nn.Module):
        raise AezooError(f"--data.network {path} returns a {type(module).__name__}, not a torch.nn.Module")
    return module


def _suggest_names(path: str) -> str:
    """The most similar name in a module that is already imported, for a message."""
    module, _, name = path.rpartition(".")
    known = vars(sys.modules[module]) if module in sys.modules else {}
    near = [] if name in known else difflib.get_close_matches(name, known, n=3)
    return f", did you mean {' or '.join(map(repr, near))}?" if near else ""


# ---- layers ---------------------------------------------------------------------------------------------------------


def check_layers(module: nn.Module, layers: Sequence[str], what: str) -> None:
    """Refuse names that no layer has.

    Raises:
        AezooError: names the most similar ones.
    """
    known = [name for name, _ in module.named_modules() if name]
    for layer in layers:
        if layer not in known:
            near = difflib.get_close_matches(layer, known, n=3, cutoff=0.4) or known[:8]
            raise AezooError(f"{what} has no layer {layer!r} (--data.layer): it has {len(known)}, such as "
                             f"{', '.join(near)}")  # fmt: skip


@torch.no_grad()
def layer_outputs(module: nn.Module, layers: Sequence[str], x: Tensor) -> list[Tensor]:
    """The outputs of layers for a batch, one float32 tensor each.

    Raises:
        AezooError: the network refuses the batch, or a layer's output is not a tensor with one row per sample.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output
            while isinstance(first, tuple | list) and first:
                first = first[0]
            if isinstance(first, Tensor):
                # a copy: the next layer may change it in place
                found[name] = first.detach().clone()

        return hook

    hooks = [module.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    try:
        module(x)
    except AezooError:
        raise
    except Exception as error:  # any error of a network that was made for other samples
        raise AezooError(f"the network does not accept samples of shape {tuple(x.shape[1:])} ({type(error).__name__}: "
                         f"{' '.join(str(error).split())[:200]}): give another --data.size, --data.channels or set") \
            from error  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
    for name in layers:
        if name not in found:
            raise AezooError(f"layer {name} returns no tensor, or is not used (--data.layer): choose another")
        if found[name].ndim < 2 or len(found[name]) != len(x):
            raise AezooError(f"layer {name} returns {tuple(found[name].shape)} for {len(x)} samples, not one row per "
                             "sample (--data.layer): choose another")  # fmt: skip
    return [found[name].float() for name in layers]


def flatten_positions(output: Tensor, positions: str, first: bool) -> Tensor:
    """(B, P, D) of a layer's output.

    Args:
        output: (B, D), (B, D, ...) or (B, ..., D).
        positions: each keeps them, mean and max pool them to one.
        first: whether the feature axis follows the batch axis.
    """
    output = output.movedim(1, -1) if first else output
    rows = output.reshape(len(output), -1, output.shape[-1])
    if positions == "each":
        return rows
    return rows.mean(1, keepdim=True) if positions == "mean" else rows.amax(1, keepdim=True)
