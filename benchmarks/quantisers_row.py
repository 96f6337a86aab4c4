"""One row of the quantiser benchmark: a quantiser and its peer, in turns. Run by `benchmarks.quantisers`."""

import ctypes
import importlib.metadata
import importlib.util
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aezoo.quantisers.base import Quantiser
from aezoo.quantisers.fsq import FSQ
from aezoo.quantisers.lfq import LFQ
from aezoo.quantisers.residual_vq import ResidualVQ
from aezoo.quantisers.sim_vq import SimVQ
from aezoo.quantisers.vq import VQ

from . import measure as clocks
from . import processes
from .common import Spread

PEER = "vector_quantize_pytorch"
RESIDUAL_LEVELS = 2
_OPTIONS: dict[str, dict[str, Any]] = {
    "vq_ema": {},
    "vq_cosine": {"cosine": True},
    "vq_gradient": {"update": "gradient"},
}
# glibc's mallopt: blocks above the threshold are taken from the system and returned to it
_MMAP_THRESHOLD = -3


class QuantiserPair(NamedTuple):
    """Our quantiser of a kind and the peer's with the same codes, None if that package is not installed."""

    ours: Quantiser
    theirs: nn.Module | None


def build_pair(kind: str, codes: int, dim: int) -> QuantiserPair:
    """Both quantisers, with the same normally distributed codes."""
    installed = importlib.util.find_spec(PEER) is not None
    if kind == "fsq":
        levels = fsq_levels(codes, dim)
        return QuantiserPair(FSQ(levels), _peer("FSQ", levels) if installed else None)
    if kind == "lfq":
        # its default weight of 0 would leave out the commitment loss
        return QuantiserPair(LFQ(dim), _peer("LFQ", dim=dim, commitment_loss_weight=0.25) if installed else None)
    if kind == "sim_vq":
        return _sim_vq(SimVQ(dim, codes), installed)
    ours: ResidualVQ | VQ
    if kind == "rvq":
        ours = ResidualVQ(dim, RESIDUAL_LEVELS, codes)
        codebooks = [level for level in ours.levels if isinstance(level, VQ)]
        theirs = (
            _SequenceQuantiser(_vq("ResidualVQ", dim, codes, num_quantizers=RESIDUAL_LEVELS)) if installed else None
        )
        layers = [None] * RESIDUAL_LEVELS if theirs is None else [*theirs.inner.layers]
    else:
        ours = VQ(dim, codes, **_OPTIONS[kind])
        own = {"vq_cosine": {"use_cosine_sim": True}, "vq_gradient": {"ema_update": False, "learnable_codebook": True}}
        theirs = _vq("VectorQuantize", dim, codes, **own.get(kind, {})) if installed else None
        codebooks, layers = [ours], [theirs]
    for i, (codebook, layer) in enumerate(zip(codebooks, layers, strict=True)):
        # residuals are smaller
        _set_codes(codebook, layer, torch.randn(codes, dim) / (i + 1))
    return QuantiserPair(ours, theirs)


def fsq_levels(codes: int, dim: int) -> tuple[int, ...]:
    """Number of values of each channel of an FSQ: 8, or 4 in as many channels as the number of codes requires."""
    fours = 3 * dim - round(math.log2(codes))
    return (8,) * (dim - fours) + (4,) * fours


def _peer(name: str, *args: Any, **options: Any) -> Any:
    return getattr(importlib.import_module(PEER), name)(*args, **options)


def _vq(name: str, dim: int, codes: int, **own: Any) -> Any:
    plain = {"kmeans_init": False, "threshold_ema_dead_code": 0, "rotation_trick": False, "decay": 0.99}
    maps = name == "VectorQuantize"
    return _peer(name, dim=dim, codebook_size=codes, accept_image_fmap=maps, **plain, **own)


class _SequenceQuantiser(nn.Module):
    """Wraps the package's ResidualVQ, which in 1.32 fails on maps whose width is not the number of channels."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, indices, loss = self.inner(z.flatten(2).mT)
        return q.mT.unflatten(2, z.shape[2:]), indices, loss


@torch.no_grad()
def _set_codes(quantiser: VQ, layer: Any, code_KD: Tensor) -> None:
    code_KD = quantiser.project(code_KD)
    quantiser.code_KD.copy_(code_KD)
    if quantiser.uses_ema:
        quantiser.sum_KD.copy_(code_KD)
    if layer is not None:
        layer._codebook.embed.data.copy_(code_KD)
        layer._codebook.embed_avg.copy_(code_KD)


@torch.no_grad()
def _sim_vq(ours: SimVQ, installed: bool) -> QuantiserPair:
    if not installed:
        return QuantiserPair(ours, None)
    theirs = _peer("SimVQ", ours.dim, len(ours.frozen_KD), channel_first=True, rotation_trick=False)
    theirs.frozen_codebook.copy_(ours.frozen_KD)
    theirs.code_transform.weight.copy_(ours.W_DD.T)
    return QuantiserPair(ours, theirs)


def codes_and_loss(quantiser: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
    """z_q of either party, and the sum of its loss terms."""
    z_q, _, *rest = quantiser(z)
    terms = [*rest[0].values()] if rest and isinstance(rest[0], dict) else rest
    return z_q, sum((term.sum() for term in terms), z.new_zeros(()))


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Time both parties.

    Args:
        spec: side, repeats, seconds, seed, and row, with kind, codes, dim, batch, places, threads and device.
    """
    began, row = time.perf_counter(), spec["row"]
    device = torch.device(row["device"])
    torch.set_num_threads(row["threads"])
    torch.manual_seed(spec["seed"])
    ours, theirs = build_pair(row["kind"], row["codes"], row["dim"])
    z = torch.randn(row["batch"], row["dim"], spec["side"], spec["side"], device=device)
    grad = torch.randn_like(z)
    parties = {"": ours.to(device)} | ({} if theirs is None else {"peer_": theirs.to(device)})
    found: dict[str, Any] = {}
    if theirs is not None:
        found["peer"] = f"{PEER} {importlib.metadata.version(PEER)}"
    failed: dict[str, str] = {}
    work = {
        (party, name): partial(call, quantiser, z, grad)
        for party, quantiser in parties.items()
        for name, call in (("forward", forward), ("step", step))
    }
    with torch.no_grad():
        if theirs is not None:
            found["same_codes"] = share_of_equal_codes(ours, theirs, z)
    for quantiser in parties.values():
        quantiser.train()
    took: dict[tuple[str, str], list[float]] = {which: [] for which in work}
    for turn in range(1 + spec["repeats"]):
        if turn > 1 and time.perf_counter() - began > spec["seconds"]:
            break
        found["repeats"] = turn
        for which in [*work] if turn % 2 else [*work][::-1]:
            if which[0] in failed:
                continue
            try:
                seconds = seconds_per_call(work[which], device)
            except RuntimeError as error:
                if not which[0]:
                    raise
                # if memory does not suffice for the peer, ours can still be measured
                failed[which[0]] = processes.error_columns(error)["error"]
                continue
            if turn:  # the first turn fills caches
                took[which].append(seconds)
    for (party, name), values in took.items():
        if values and party not in failed:
            found[f"{party}{name}_per_s"] = row["places"] / Spread.from_data(values).median
    for name in ("forward", "step") if theirs is not None and not failed else ():
        ratio = Spread.from_data([peer / own for own, peer in zip(took["", name], took["peer_", name], strict=True)])
        found |= {f"{name}_ratio": ratio.median, f"{name}_ratio_min": ratio.low, f"{name}_ratio_max": ratio.high}
    for party in parties:
        if party not in failed:
            found[f"{party}memory_mb"] = peak_mb(work[party, "step"], device)
    return found | {"peer_error": "; ".join(failed.values()), "seconds": time.perf_counter() - began}


def forward(quantiser: nn.Module, z: Tensor, grad: Tensor) -> None:
    """Codes and loss terms, with the graph that a backward pass needs."""
    codes_and_loss(quantiser, z.detach().requires_grad_())


def step(quantiser: nn.Module, z: Tensor, grad: Tensor) -> None:
    """Codes and loss terms, and the backward pass from both."""
    quantiser.zero_grad()
    z_q, loss = codes_and_loss(quantiser, z.detach().requires_grad_())
    torch.autograd.backward([z_q, loss], [grad, None]) if loss.requires_grad else z_q.backward(grad)


def share_of_equal_codes(ours: nn.Module, theirs: nn.Module, z: Tensor) -> float:
    """The share of places at which both give the same code in evaluation mode."""
    q, other = (codes_and_loss(quantiser.eval(), z)[0] for quantiser in (ours, theirs))
    return float(torch.isclose(q, other, rtol=1e-4, atol=1e-5).all(1).float().mean())


def seconds_per_call(work: Callable[[], None], device: torch.device) -> float:
    """Seconds per call, averaged over enough calls for the clock to resolve."""
    calls, took = 1, clocks.timed(work, device)
    while took < 0.02:
        calls *= 4
        took = clocks.timed(partial(_repeat, work, calls), device)
    return took / calls


def _repeat(work: Callable[[], None], calls: int) -> None:
    for _ in range(calls):
        work()


def peak_mb(work: Callable[[], None], device: torch.device) -> float | None:
    """Peak memory of a call beyond what is already allocated, in MB; None if it cannot be measured.

    On the CPU the figure is correct only in a separate process: blocks that an allocator freed but kept do not count.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        clocks.reset_peak_memory(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    try:
        _release_memory()
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_value("VmRSS")
        work()
        return (_status_value("VmHWM") - before) / 1e3
    except (AttributeError, OSError, TypeError):
        return None


def _release_memory() -> None:
    """Return free memory to the system, now and from now on."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 2**16)
    libc.malloc_trim(0)


def _status_value(name: str) -> int:
    """A value from this process's status file, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    processes.run_measurement(measure)
