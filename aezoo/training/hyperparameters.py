"""Constructor arguments recorded as hyperparameters, for checkpoints and loggers."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, Self

from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from torch import nn

from aezoo.training.arguments import Checked, bound, complete_signature


class ConstructorHyperparameters(Checked, HyperparametersMixin):
    """Base of modules whose hyperparameters are all constructor arguments, including inherited arguments and defaults.

    A subclass may change the defaults of inherited arguments: `class Variant(Parent, defaults={"lr": 1e-2})`.
    """

    _arguments: dict[str, Any]

    def __init_subclass__(cls, *, defaults: Mapping[str, Any] | None = None) -> None:
        super().__init_subclass__()
        complete_signature(cls, defaults or {})

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        instance = super().__new__(cls, *args, **kwargs)
        instance._arguments = bound(cls, args, kwargs)
        return instance

    def __init__(self) -> None:
        super().__init__()
        self._record(self.__dict__.pop("_arguments"))

    def _record(self, arguments: Mapping[str, Any]) -> None:
        # as set by Lightning's save_hyperparameters
        self._log_hyperparams = True
        self._hparams_name = "kwargs"
        # a module's weights are in the checkpoint
        self._set_hparams({name: value for name, value in arguments.items() if not isinstance(value, nn.Module)})
        self._hparams_initial = copy.deepcopy(self._hparams)

    def update_hyperparameters(self, **values: Any) -> None:
        """Record changed values of arguments, such as a resolved path; for constructors."""
        self._record({**self.hparams, **values})

    def save_hyperparameters(
        self,
        *args: Any,
        ignore: Sequence[str] | str | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Record hyperparameters. Models need not call this, since the constructor records them.

        Args:
            args: mappings of hyperparameters to record in addition; names, all of which are recorded anyway.
            ignore: names of arguments to omit.
            frame: frame of the constructor, by default of the caller; its variables have the arguments' values.
            logger: whether loggers get the hyperparameters.
        """
        caller = frame or inspect.currentframe().f_back  # type: ignore[union-attr]
        values = dict(self.hparams)
        if caller is not None and caller.f_code is getattr(vars(type(self)).get("__init__"), "__code__", None):
            values |= {name: caller.f_locals[name] for name in values.keys() & caller.f_locals.keys()}
        for given in args:
            values |= {} if isinstance(given, str) else dict(given)
        self._record(values)
        self.remove_ignored_hparams([ignore] if isinstance(ignore, str) else [*(ignore or ())])
        self._log_hyperparams = logger
        self._hparams_initial = copy.deepcopy(self._hparams)
