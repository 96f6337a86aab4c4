"""Buffers of a model that a batch changes: statistics, codebooks, thresholds, counters."""

from typing import cast

import torch
from torch import Tensor, nn


class Buffers:
    """The buffers of a model, and a copy made by `remember`.

    Args:
        module: the model; a forward pass may change its buffers in place or replace them.
    """

    def __init__(self, module: nn.Module) -> None:
        # the dict and name of each buffer: looking up all of them in every batch would cost more than the copy
        places: dict[tuple[torch.dtype, torch.device], list[tuple[dict[str, Tensor | None], str]]] = {}
        seen: set[int] = set()
        for part in module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None and buffer.numel() and id(buffer) not in seen:
                    seen.add(id(buffer))
                    places.setdefault((buffer.dtype, buffer.device), []).append((part._buffers, name))
        self._places = list(places.values())
        self._held: list[list[Tensor]] = []
        self._kept: list[Tensor] = []

    def __bool__(self) -> bool:
        return bool(self._places)

    def remember(self) -> None:
        """Copy the values of the buffers."""
        self._held = self._now()
        self._kept = [_flat(group) for group in self._held]

    def restore(self) -> None:
        """Restore the copied values."""
        for places, group, kept in zip(self._places, self._held, self._kept, strict=False):
            self._write(group, kept)
            for (owner, name), buffer in zip(places, group, strict=True):
                owner[name] = buffer

    def restore_where(self, found: Tensor) -> None:
        """Restore the copied values if `found` is above 0, without synchronising with the device."""
        for group, kept in zip(self._now(), self._kept, strict=False):
            self._write(group, torch.where(found > 0, kept, _flat(group)))

    def _now(self) -> list[list[Tensor]]:
        return [[cast(Tensor, owner[name]) for owner, name in group] for group in self._places]

    @staticmethod
    @torch.no_grad()
    def _write(group: list[Tensor], flat: Tensor) -> None:
        parts = flat.split([buffer.numel() for buffer in group])
        values = [part.view_as(buffer) for part, buffer in zip(parts, group, strict=True)]
        if hasattr(torch, "_foreach_copy_"):  # one kernel for all; private to torch
            torch._foreach_copy_(group, values)
            return
        for buffer, value in zip(group, values, strict=True):
            buffer.copy_(value)


def _flat(group: list[Tensor]) -> Tensor:
    return torch.cat([buffer.detach().reshape(-1) for buffer in group])
