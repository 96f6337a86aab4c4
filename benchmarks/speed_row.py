"""One row of the speed benchmark, in this process. Run by `benchmarks.speed`."""

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

import aezoo
from aezoo.callbacks import FaultGuard, is_enabled
from aezoo.data.array import LAYOUTS
from aezoo.speed import layers, malloc, memory_format
from aezoo.training import distributed

from . import measure
from .common import Spread
from .processes import run_measurement

_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed"}
# limits of the random samples in memory; an epoch uses each sample once
_MAX_BYTES, _MAX_SAMPLES = 64_000_000, 60_000
_WARM_STEPS = 5
# modes without compilation in inference; auto decides by the length of a training run
_UNCOMPILED = ("off", "auto")
# callbacks of the command line that have no use in a run without validation data
_PICTURES = {"reconstructions", "samples", "traversal", "latents", "projector", "codebook", "filters", "histograms"}
_UNUSED = _PICTURES | {"dashboard", "predictions", "summary", "early_stopping", "code_statistics"}


def measure_row(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure the row that `spec` describes.

    Args:
        spec: the key columns of a row, and kind, accelerator, precision, steps, seconds, repeats, started.
    """
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)", category=FutureWarning)
    torch.manual_seed(0)
    malloc.keep_pages()  # as the command line does
    with tempfile.TemporaryDirectory() as folder:
        return (train if spec["kind"] == "train" else infer)(spec, folder)


def random_samples(shape: Sequence[int], batch: int) -> Tensor:
    """Whole batches of random bytes for images and volumes, or of random numbers in [0, 1) for other shapes."""
    size = math.prod(shape) * (1 if len(shape) > 2 else 4)
    n = max(2, min(_MAX_SAMPLES, _MAX_BYTES // size) // batch) * batch
    generator = torch.Generator().manual_seed(0)
    if len(shape) > 2:
        return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=generator)
    return torch.rand(n, *shape, generator=generator)


def data_module(spec: dict[str, Any], x: Tensor, **splits: Any) -> aezoo.DataModule:
    """The zoo's DataModule on these samples, without validation."""
    memory = {"memory": spec["memory"]} if spec.get("memory") else {}
    return aezoo.DataModule.from_arrays(
        x,
        **splits,
        **memory,
        batch_size=spec["batch"],
        val_fraction=0,
        test_fraction=0,
        layout=LAYOUTS[len(spec["shape"])],
    )


def build_model(spec: dict[str, Any]) -> Any:
    """The model of a row."""
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in spec["settings"].items()
    }
    model: Any = aezoo.create_model(spec["model"], tuple(spec["shape"]), **settings)
    model.compile_mode = spec["compile"]
    return model


def build_trainer(spec: dict[str, Any], folder: str, extra: list[pl.Callback], **settings: Any) -> pl.Trainer:
    """A Trainer like the command line's, with its bar, logger, checkpoints and guards unless interface is off."""
    interface: list[pl.Callback] = []
    logger: Any = False
    if spec["interface"] == "on":
        from aezoo.cli.lightning_cli import DEFAULT_CALLBACKS

        callbacks = (cls() for name, cls in DEFAULT_CALLBACKS.items() if name not in _UNUSED)
        interface = [callback for callback in callbacks if is_enabled(callback)]
        logger = TensorBoardLogger(folder, default_hp_metric=False)
    return pl.Trainer(
        accelerator=spec["accelerator"],
        devices=spec["devices"],
        strategy="ddp" if spec["devices"] > 1 else "auto",
        precision=_PRECISION[spec["precision"]],  # type: ignore[arg-type]
        callbacks=[*extra, *interface],
        logger=logger,
        default_root_dir=folder,
        enable_checkpointing=bool(interface),
        enable_progress_bar=bool(interface),
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        **settings,
    )


def train(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    """Fit the model: a short fit for the cold start, then a warm-up epoch and one epoch per repeat."""
    global_batch = spec["batch"] * spec["devices"]
    x = random_samples(spec["shape"], global_batch)
    data, model = data_module(spec, x), build_model(spec)
    first = measure.StepTimer()
    fit = build_trainer(spec, str(Path(folder, "first")), [first], max_steps=_WARM_STEPS)
    fit.fit(model, data)
    device = fit.strategy.root_device

    measure.reset_peak_memory(device)
    steps = min(
        _from_first_rank(spec["steps"] or max(3, math.ceil(spec["seconds"] / first.seconds[-1]))),
        len(x) // global_batch,
    )
    epochs = measure.EpochTimer()
    fit = build_trainer(
        spec, str(Path(folder, "fit")), [epochs], max_epochs=1 + spec["repeats"], limit_train_batches=steps
    )
    fit.fit(model, data)
    rate = Spread.from_data([steps * global_batch / seconds for seconds in epochs.seconds[1:]])
    step = global_batch / rate.median
    row = {
        **_spread_columns("samples_per_s", rate),
        "step_ms": 1e3 * step,
        "loss": float(fit.callback_metrics["train/loss"]),
        "peak_memory_mb": measure.peak_memory_mb(device),
        "first_step_s": first.seconds[0],
        "compile_s": None if spec["compile"] == "off" else max(0.0, first.seconds[0] - step),
        "cold_start_s": first.first_at - spec["started"],
        "steps": steps,
    }
    if spec["interface"] == "on" and device.type == "cpu" and spec["devices"] == 1:
        # a small difference needs many steps to show
        shares = _guard_shares(spec, str(Path(folder, "guard")), model, data, 3 * steps * spec["repeats"])
        row |= _spread_columns("guard_share", Spread.from_data(shares)) if shares else {}
        row |= _spread_columns("interface_share", Spread.from_data(_interface_shares(spec, folder, model, data, steps)))
    if device.type == "cuda":
        launches = measure.LaunchCounter()
        build_trainer(
            spec, str(Path(folder, "count")), [launches], max_epochs=-1, max_steps=launches.skip + launches.steps
        ).fit(model, data)
        row |= {"kernel_launches": launches.kernels, "host_device_copies": launches.copies}
    # only the first rank continues, and loss terms over all ranks would wait for the others
    distributed.disconnect()
    return row | _flop_columns(spec, x, device, rate.median) if fit.is_global_zero else row


def _guard_shares(spec: dict[str, Any], folder: str, model: Any, data: aezoo.DataModule, steps: int) -> list[float]:
    """Shares of a step that the fault guard costs, in parts of a separate fit."""
    fit = build_trainer(spec, folder, [], max_epochs=-1, max_steps=steps)
    guard = next(callback for callback in fit.callbacks if isinstance(callback, FaultGuard))  # type: ignore[attr-defined]
    cost = measure.GuardCost(guard)
    fit.callbacks.append(cost)  # type: ignore[attr-defined]
    fit.fit(model, data)
    return cost.shares()


def _interface_shares(spec: dict[str, Any], folder: str, model: Any, data: aezoo.DataModule, steps: int) -> list[float]:
    """Shares of a step that bar, logger, checkpoints and guard cost, one per pair of fits with and without them."""
    shares = []
    for turn in range(spec["repeats"]):
        found = {}
        for interface in ("on", "off") if turn % 2 else ("off", "on"):
            epochs = measure.EpochTimer()
            row_spec = {**spec, "interface": interface}
            home = str(Path(folder, f"{interface}-{turn}"))
            build_trainer(row_spec, home, [epochs], max_epochs=3, limit_train_batches=max(3, steps // 2)).fit(
                model, data
            )
            found[interface] = min(epochs.seconds[1:])
        shares.append(1 - found["off"] / found["on"])
    return shares


def _spread_columns(name: str, spread: Spread) -> dict[str, float]:
    return {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}


def _from_first_rank(value: int) -> int:
    """The first rank's value on all ranks."""
    values = [value]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(values, 0)
    return values[0]


def _flop_columns(spec: dict[str, Any], x: Tensor, device: torch.device, rate: float) -> dict[str, Any]:
    """The FLOPs of a step, and the share of its time that the device would need for them at its peak."""
    model = build_model(spec).to(device)
    sample = _as_float(x[: max(2, min(8, len(x)))]).to(device)
    flops = measure.count_flops(model, sample)
    peak = measure.matmul_peak(device, spec["precision"])
    row = _size(model) | {"flops_forward": flops.forward, "flops_step": flops.step, "peak_gflops": peak / 1e9}
    each = rate / spec["devices"]
    if spec["kind"] != "train":
        return row
    layers.swap_in(model, model.input_shape, memory_format.to_channels_last(model))  # as a fit does
    alone = measure.seconds_of_products(model, _as_float(x[: spec["batch"]]).to(device), spec["precision"])
    return row | {
        "share_of_peak": flops.step * each / peak,
        "gemm_floor_share": flops.gemms * each / peak,
        "products_alone_share": alone * each / spec["batch"],
    }


def _size(model: aezoo.Autoencoder) -> dict[str, int]:
    return {"parameters": sum(p.numel() for p in model.parameters()), "code_size": math.prod(model.code_shape)}


def _as_float(x: Tensor) -> Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x


def infer(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    """Encode, reconstruct and sample directly under inference_mode, and through the Trainer's predict, in turns."""
    batch, repeats = spec["batch"], spec["repeats"]
    predictor_epochs = measure.EpochTimer()
    predictor = build_trainer({**spec, "interface": "off"}, folder, [predictor_epochs])
    device = predictor.strategy.root_device
    x = random_samples(spec["shape"], batch)
    model = build_model(spec).eval().to(device)
    samples = _as_float(x).to(device)
    paths = _paths(model, spec["compile"], batch)
    row: dict[str, Any] = {}
    with torch.inference_mode(), measure.autocast(device, spec["precision"]):
        first = measure.timed(lambda: [path(samples[:batch]) for path in paths.values()], device)
        again = measure.timed(lambda: [path(samples[:batch]) for path in paths.values()], device)
        row |= {
            "first_batch_s": first,
            "compile_s": None if spec["compile"] in _UNCOMPILED else max(0.0, first - again),
        }
        row["cold_start_s"] = time.time() - again - spec["started"]
        once = {name: measure.timed(lambda p=path: p(samples[:batch]), device) for name, path in paths.items()}  # type: ignore[misc]
    measure.reset_peak_memory(device)
    batches = len(x) // batch
    requested = spec["steps"] or math.ceil(spec["seconds"] / once["bare_predict"])
    batches = max(1, min(requested, batches))
    data = data_module(spec, x[: max(2, batch)], x_test=x[: batches * batch])
    seconds: dict[str, list[float]] = {name: [] for name in [*paths, "predict"]}
    for turn in range(1 + repeats):
        for name, path in paths.items():
            rounds = 1 if spec["steps"] else max(1, round(spec["seconds"] / (once[name] * batches)))
            with torch.inference_mode(), measure.autocast(device, spec["precision"]):
                took = measure.timed(_repeat_batches(path, samples, batch, batches, rounds), device)
            seconds[name].append(took / rounds)
        predictor.predict(model, data, return_predictions=False)
        model.eval().to(device)
        seconds["predict"].append(predictor_epochs.seconds[turn])
    rates = {name: [batches * batch / value for value in values[1:]] for name, values in seconds.items()}
    for name, values in rates.items():
        row |= _spread_columns(f"{name}_samples_per_s", Spread.from_data(values))
    for name, ratio, base in (
        ("encode_ratio", "encode", "network_encode"),
        ("reconstruct_ratio", "reconstruct", "network_reconstruct"),
        ("predict_ratio", "predict", "bare_predict"),
    ):
        row |= _spread_columns(name, Spread.from_data([a / b for a, b in zip(rates[ratio], rates[base], strict=True)]))
    row |= {"step_ms": 1e3 * batch / row["reconstruct_samples_per_s"], "steps": batches}
    row["peak_memory_mb"] = measure.peak_memory_mb(device)
    row |= _flop_columns(spec, x, device, row["reconstruct_samples_per_s"])
    row["share_of_peak"] = row["flops_forward"] * row["reconstruct_samples_per_s"] / (row["peak_gflops"] * 1e9)
    return row


def _paths(model: Any, mode: str, batch: int) -> dict[str, Callable[[Tensor], object]]:
    """The timed functions of a batch: the model's methods, its networks alone, and the parts of a prediction."""

    def bare_predict(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = model.encode(x)
        if not plain:
            return z, model.decode(z), model.anomaly_score(x)
        params = model.decoder(z)
        return z, model.likelihood.mean(params), model.likelihood.deviance(params, x)

    def network_encode(x: Tensor) -> Tensor:
        return cast(Tensor, model.encoder(x if as_it_is else x.flatten(1)))

    def network_reconstruct(x: Tensor) -> tuple[Tensor, Tensor]:
        return network_encode(x), model.likelihood.mean(model.decoder(codes[: len(x)]))

    plain = all(getattr(type(model), name) is getattr(aezoo.Autoencoder, name) for name in ("decode", "score"))
    as_it_is = _accepts(model.encoder, torch.zeros(2, *model.input_shape, device=model.device))
    codes = torch.randn(batch, *model.code_shape, device=model.device)
    paths: dict[str, Callable[[Tensor], object]] = {
        "encode": model.encode,
        "network_encode": network_encode,
        "reconstruct": model.forward,
        "network_reconstruct": network_reconstruct,
    }
    if model.has_prior:
        paths["sample"] = lambda x: model.sample(len(x))
    if mode not in _UNCOMPILED:
        paths = {name: torch.compile(path, mode=mode) for name, path in paths.items()}
    return paths | {"bare_predict": bare_predict}


def _accepts(network: Any, x: Tensor) -> bool:
    """Whether an encoder takes samples unchanged; some networks take vectors, and their model flattens samples."""
    try:
        with torch.no_grad():
            network(x)
    except RuntimeError:
        return False
    return True


def _repeat_batches(
    path: Callable[[Tensor], object], x: Tensor, batch: int, batches: int, rounds: int
) -> Callable[[], None]:
    def loop() -> None:
        for _ in range(rounds):
            for i in range(batches):
                path(x[i * batch : (i + 1) * batch])

    return loop


if __name__ == "__main__":
    run_measurement(measure_row)
