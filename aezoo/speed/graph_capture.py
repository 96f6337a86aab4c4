"""A whole training step as one CUDA graph, because kernel launches dominate the step of a small model on a GPU.

Forward, backward, the fault check and the update of a fused optimiser are recorded once and then replayed with one
launch. A fit with `compile_mode` reduce-overhead uses it if its data are on the GPU (see `aezoo.speed.fast_loop`). CUDA
does the recording, which has not been run on a GPU yet; everything around it is tested on the CPU.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor | None], Any]
# steps before the recording: allocators, libraries and lazy states must have settled
WARM_UP = 3


class Recorder(Protocol):
    """Runs and records a step; `CudaRecorder`, or a replacement in tests."""

    def warm_up(self, step: Callable[[], Any]) -> Any:
        """Run the step eagerly, separate from other work."""

    def record(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record the step without running it; return a function that replays it, and the tensors that it fills."""


class CudaRecorder:
    """CUDA graphs as in torch's documentation: warm up on a side stream, then capture."""

    def warm_up(self, step: Callable[[], Any]) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            result = step()
        torch.cuda.current_stream().wait_stream(side)
        return result

    def record(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()
        return graph.replay, result


class CapturedStep:
    """A step that first runs eagerly a few times, is then recorded, and is replayed from then on.

    All of these are training steps. A batch of another size, such as the last of an epoch, runs eagerly. Afterwards the
    gradient tensors to which the recorded step writes are restored.

    Args:
        step: takes a batch and its labels, updates the parameters, and returns tensors.
        parameters: the trained parameters.
        recorder: runs and records the step.
        least: size of a full batch; a resumed run may begin with the smaller last batch of an epoch.
    """

    def __init__(
        self, step: Step, parameters: list[torch.nn.Parameter], recorder: Recorder | None = None, least: int = 0
    ) -> None:
        self._step, self._parameters, self._least = step, parameters, least
        self._recorder = recorder or CudaRecorder()
        self._x: Tensor | None = None
        self._y: Tensor | None = None
        self._runs = 0
        self._replay: Callable[[], None] | None = None
        self._result: Any = None
        self._gradients: list[Tensor | None] = []
        self.replays = 0

    def __call__(self, x: Tensor, y: Tensor | None) -> Any:
        if self._x is None and len(x) >= self._least:
            self._x, self._y = x.clone(), None if y is None else y.clone()
        if self._x is None or x.shape != self._x.shape:
            return self._eager_step(x, y)
        self._x.copy_(x)
        if self._y is not None and y is not None:
            self._y.copy_(y)
        if self._runs < WARM_UP:
            self._runs += 1
            self._drop_gradients()
            return self._recorder.warm_up(lambda: self._step(x, y))
        if self._replay is None:
            # without gradients: the recording creates them, and each replay overwrites them
            self._drop_gradients()
            self._replay, self._result = self._recorder.record(lambda: self._step(self._x, self._y))  # type: ignore[arg-type]
            self._gradients = [parameter.grad for parameter in self._parameters]
        self.replays += 1
        self._replay()
        return self._result

    def _eager_step(self, x: Tensor, y: Tensor | None) -> Any:
        self._drop_gradients()
        result = self._step(x, y)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=False):
            parameter.grad = gradient
        return result

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
