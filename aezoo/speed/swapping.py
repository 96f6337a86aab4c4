"""Layers that replace torch's during a fit or a prediction, by setting `module.__class__`."""

from typing import Any, ClassVar

from torch import nn


class Swapped:
    """A faster subclass of a layer's class, with the same attributes and parameters.

    A copy of a layer, by pickle, `copy` or `torch.save`, has the plain class, because it is not part of a fit.

    Attributes:
        plain: the class that it replaces.
        settings: names of attributes that only the faster class has, which a layer may have during a fit.
    """

    plain: ClassVar[type[nn.Module]]
    settings: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__name__ = cls.plain.__name__  # as summaries show it

    def __reduce_ex__(self, protocol: Any) -> Any:
        state: dict[str, Any] = super().__reduce_ex__(protocol)[2]  # type: ignore[assignment]
        # for the usual function, pickle requires the class of the object itself
        return (
            object.__new__,
            (self.plain,),
            {name: value for name, value in state.items() if name not in self.settings},
        )

    def swap_out(self) -> None:
        """Make the layer one of the plain class again."""
        for name in self.settings:
            vars(self).pop(name, None)
        self.__class__ = self.plain  # type: ignore[assignment]
