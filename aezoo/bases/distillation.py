"""Models with a teacher, which is another trained and frozen model."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError
from aezoo.io.checkpoint import load_model
from aezoo.io.hub_files import local_path
from aezoo.training import sizes


def teacher_path(teacher: str) -> str:
    """Return the value of `teacher` to store: none or a path, which is made absolute for a local file.

    Raises:
        AezooError: the value is neither none nor a path.
    """
    teacher = str(teacher)
    if teacher != "none" and len(Path(teacher).parts) < 2:
        if not teacher or not Path(teacher).exists():
            raise AezooError(f"teacher takes none or the path of a model of the zoo, got {teacher!r}")
        teacher = str(Path(teacher).absolute())  # a valid value even if the file does not exist
    return teacher


class DistilledAutoencoder(Autoencoder):
    """An autoencoder with a frozen model of aezoo as teacher; a subclass sets `teacher` and `code_shape`.

    The teacher moves to the model's device, but is not a submodule: its weights are not saved.

    Attributes:
        teacher: none, or the teacher's path, see `teacher_path`.
        frozen: the teacher, after it is loaded.
        shape_arguments: the arguments that determine the shape of a code.
    """

    shape_arguments: ClassVar[str]

    teacher: str
    # in a tuple, which excludes it from the state_dict, the optimiser, train() and synchronisation between ranks
    frozen: tuple[Autoencoder, ...] = ()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        for model in self.frozen:
            model._apply(fn)
        return super()._apply(fn, recurse)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.teacher != "none":
            self.load_teacher()

    def load_teacher(self) -> Autoencoder:
        """Return the teacher, loaded on the first call, so that a model can be loaded without the teacher's file.

        Raises:
            AezooError: the teacher does not exist, or does not fit the data or the code.
        """
        if not self.frozen:
            model = load_model(local_path(self.teacher))
            with contextlib.suppress(AezooError):  # the teacher may support only one size
                model = sizes.for_samples(model, self.input_shape) or model
            teacher_shapes, own_shapes = ((module.input_shape, module.code_shape) for module in (model, self))
            if teacher_shapes != own_shapes:
                cure = f"set {self.shape_arguments} to match, or use another"
                raise AezooError(f"teacher: {self.teacher} has shapes {teacher_shapes}, not {own_shapes}: {cure}")
            self.frozen = (model.requires_grad_(False).to(next(self.decoder.parameters())),)
        return self.frozen[0]
