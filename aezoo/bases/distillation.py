"""Models with a teacher: another trained model that stays frozen."""

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
    """The value of `teacher` to store: none or a path, made absolute for a file in the working directory.

    Raises:
        AezooError: the value is neither of them.
    """
    teacher = str(teacher)
    if teacher != "none" and len(Path(teacher).parts) < 2:
        if not teacher or not Path(teacher).exists():
            raise AezooError(f"teacher takes none or the path of a model of the zoo, got {teacher!r}")
        teacher = str(Path(teacher).absolute())  # still a path if there is no such file
    return teacher


class DistilledAutoencoder(Autoencoder):
    """An autoencoder with a teacher, a model of the zoo that is not trained; a subclass sets `teacher` and code_shape.

    The teacher moves to the model's device, but is not a submodule: its weights are not saved.

    Attributes:
        teacher: none, or the teacher's path, see `teacher_path`.
        frozen: the teacher, once it is loaded.
        shape_arguments: the arguments that determine the shape of a code.
    """

    shape_arguments: ClassVar[str]

    teacher: str
    # in a tuple, which keeps it out of the state_dict, the optimiser, train() and the exchange between ranks
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
        """The teacher, loaded from its file at the first call, not in the constructor, so a model loads without it.

        Raises:
            AezooError: there is no such model, or it does not fit the data or the code.
        """
        if not self.frozen:
            model = load_model(local_path(self.teacher))
            with contextlib.suppress(AezooError):  # of one that takes its own size only
                model = sizes.for_samples(model, self.input_shape) or model
            teacher_shapes, own_shapes = ((module.input_shape, module.code_shape) for module in (model, self))
            if teacher_shapes != own_shapes:
                cure = f"set {self.shape_arguments} to match, or take another"
                raise AezooError(f"teacher: {self.teacher} has shapes {teacher_shapes}, not {own_shapes}: {cure}")
            self.frozen = (model.requires_grad_(False).to(next(self.decoder.parameters())),)
        return self.frozen[0]
