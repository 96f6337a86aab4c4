"""Checks of the interface of models, for the tests of this package and of plug-ins.

    from aezoo.testing import check_model

    def test_my_ae():
        check_model("my_ae")  # or the class itself, registered or not; keyword arguments go to its constructor

One test for each check, with a failure that names it:

    from aezoo.testing import CHECKS

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_ae(check):
        check("my_ae")

A check raises AssertionError with one line that says what is wrong, or `unittest.SkipTest`, which pytest shows as a
skip, if it cannot run. It restores the global random state, the warning filters and the loggers.
"""

from collections.abc import Collection
from typing import Any
from unittest import SkipTest

from aezoo.errors import AezooError
from aezoo.testing.contract import (
    check_batch_independence,
    check_batch_mean,
    check_batch_of_one,
    check_constructor,
    check_gradients,
    check_indices,
    check_inputs_unchanged,
    check_loss,
    check_shapes,
)
from aezoo.testing.portability import check_bf16, check_compile, check_export, check_inductor, check_onnx
from aezoo.testing.ranks import SharedNoise, check_ddp
from aezoo.testing.subject import SHAPES, Check, Model, Subject, subject_of
from aezoo.testing.training import (
    check_checkpoint,
    check_deterministic_evaluation,
    check_loop,
    check_overfits,
    check_resume,
    check_seed,
    check_state_dict,
)

__all__ = [
    "CHECKS",
    "SHAPES",
    "SLOW_CHECKS",
    "Check",
    "Model",
    "SharedNoise",
    "Subject",
    "check_batch_independence",
    "check_batch_mean",
    "check_batch_of_one",
    "check_bf16",
    "check_checkpoint",
    "check_compile",
    "check_constructor",
    "check_ddp",
    "check_deterministic_evaluation",
    "check_export",
    "check_gradients",
    "check_indices",
    "check_inductor",
    "check_inputs_unchanged",
    "check_loop",
    "check_loss",
    "check_model",
    "check_onnx",
    "check_overfits",
    "check_resume",
    "check_seed",
    "check_shapes",
    "check_state_dict",
    "subject_of",
]

# cheapest first
CHECKS: tuple[Check, ...] = (
    check_constructor,
    check_shapes,
    check_loss,
    check_batch_of_one,
    check_gradients,
    check_inputs_unchanged,
    check_indices,
    check_batch_mean,
    check_batch_independence,
    check_deterministic_evaluation,
    check_loop,
    check_overfits,
    check_seed,
    check_state_dict,
    check_checkpoint,
    check_resume,
    check_bf16,
    check_compile,
    check_export,
    check_onnx,
    check_ddp,
)
SLOW_CHECKS: tuple[Check, ...] = (check_inductor,)


def check_model(model: Model, /, *, exclude: Collection[str] = (), **hyperparameters: Any) -> dict[str, str]:
    """Run all of `CHECKS`.

    Args:
        model: a registry name or a class.
        exclude: names of checks to leave out, such as `check_ddp`.
        **hyperparameters: constructor arguments to build the model with.

    Returns:
        The checks that could not run, and why.

    Raises:
        AssertionError: a line for each check that fails.
    """
    unknown = set(exclude) - {check.__name__ for check in CHECKS}
    if unknown:
        raise AezooError(f"no check is named {', '.join(sorted(unknown))}: see aezoo.testing.CHECKS")
    failed, skipped = [], {}
    for check in CHECKS:
        if check.__name__ not in exclude:
            try:
                check(model, **hyperparameters)
            except AssertionError as error:
                failed.append(str(error))
            except SkipTest as reason:
                skipped[check.__name__] = str(reason)
    if failed:
        raise AssertionError("\n".join(failed))
    return skipped
