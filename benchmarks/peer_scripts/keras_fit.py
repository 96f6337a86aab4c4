"""Keras 3 with `model.fit` and its defaults, on the backend in the party's name."""

import math
import os
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from .job import Clock, Job

Floats = npt.NDArray[np.float32]


def _backend(job: Job) -> str:
    """Choose backend and threads, before the first import of Keras."""
    backend = job.party.removeprefix("keras_").removesuffix("_bf16")
    os.environ["KERAS_BACKEND"] = backend
    if backend == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(job.threads)
        tf.config.threading.set_inter_op_parallelism_threads(job.threads)
        # the other backends fail without a GPU; TensorFlow would use the CPU without an error
        if job.accelerator == "cuda" and not tf.config.list_physical_devices("GPU"):
            raise RuntimeError("tensorflow finds no GPU: install the CUDA libraries that its wheels name")
    elif backend == "torch":
        import torch

        torch.set_num_threads(job.threads)
    return backend


def _dense(job: Job, keras: Any) -> Any:
    widths = (*job.hidden_dims, job.latent_dim, *job.hidden_dims[::-1])
    layers = [keras.layers.Dense(width, activation="relu") for width in widths]
    last = keras.layers.Dense(math.prod(job.shape))
    return keras.Sequential([keras.Input(job.shape), *layers, last, _probabilities(keras)])


def _probabilities(keras: Any) -> Any:
    """Sigmoid in float32 at any precision, as Keras's guide to mixed precision recommends."""
    return keras.layers.Activation("sigmoid", dtype="float32")


def _conv(job: Job, keras: Any) -> Any:
    channels, *grid = job.shape

    class Draw(keras.layers.Layer):
        """z from the posterior; adds its KL term to the loss."""

        def __init__(self) -> None:
            super().__init__(dtype="float32")  # for the loss terms as well
            self.seeds = keras.random.SeedGenerator(job.seed)

        def call(self, posterior: Any) -> Any:
            mu, log_var = keras.ops.split(posterior, 2, axis=-1)
            kl = 0.5 * keras.ops.sum(mu**2 + keras.ops.exp(log_var) - 1 - log_var, axis=-1)
            self.add_loss(keras.ops.mean(kl))
            noise = keras.random.normal(keras.ops.shape(mu), seed=self.seeds)
            return mu + keras.ops.exp(0.5 * log_var) * noise

    sides = [grid[0]]
    x = given = keras.Input((*grid, channels))
    for width in job.hidden_dims:
        x = keras.layers.Conv2D(width, 3, strides=2, padding="same", activation="relu")(x)
        sides.append(math.ceil(sides[-1] / 2))
    smallest = (sides[-1], sides[-1], job.hidden_dims[-1])
    z = Draw()(keras.layers.Dense(2 * job.latent_dim)(keras.layers.Flatten()(x)))
    x = keras.layers.Reshape(smallest)(keras.layers.Dense(math.prod(smallest), activation="relu")(z))
    for width, side in zip((*job.hidden_dims[-2::-1], channels), sides[-2::-1], strict=True):
        x = keras.layers.Conv2DTranspose(
            width,
            3,
            strides=2,
            padding="same",
            output_padding=1 - side % 2,
            activation=None if side == grid[0] else "relu",
        )(x)
    return keras.Model(given, _probabilities(keras)(x))


def _weights(job: Job) -> list[Floats]:
    """The common initial weights with Keras's axes: channels last, inputs before outputs.

    PyTorch's convolutions of stride 2 pad an even grid before its first row, Keras's after its last one: the networks
    are mirror images. So kernels are mirrored here, and `fit` mirrors the pictures, for the same function.
    """
    with np.load(job.weights) as file:
        arrays = [file[name] for name in file.files]
    if not job.variational:
        return [array.T if array.ndim == 2 else array for array in arrays]
    stages, found = len(job.hidden_dims), []
    for i, (kernel, bias) in enumerate(pairwise(arrays)):
        if i % 2:
            continue
        if kernel.ndim == 4:  # (out, in, h, w), and (in, out, h, w) for the transposed ones: Keras swaps both
            kernel = kernel.transpose(2, 3, 1, 0)[::-1, ::-1]
        else:
            # reorder features from (channels, h, w) to (h, w, channels)
            width = job.hidden_dims[-1]
            side = math.isqrt(max(kernel.shape) // width)
            if i == 2 * stages:
                outputs = len(kernel)
                kernel = kernel.reshape(-1, width, side, side).transpose(2, 3, 1, 0)[::-1, ::-1].reshape(-1, outputs)
            else:
                inputs = kernel.shape[1]
                kernel = kernel.reshape(width, side, side, -1).transpose(3, 1, 2, 0)[:, ::-1, ::-1].reshape(inputs, -1)
                bias = bias.reshape(width, side, side).transpose(1, 2, 0)[::-1, ::-1].ravel()
        found += [kernel, bias]
    return found


def fit(job: Job) -> dict[str, Any]:
    """Sigmoid outputs, cross-entropy, Adam, shuffled float arrays, a progress bar."""
    backend = _backend(job)
    import keras

    if job.precision == "bf16":
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    keras.utils.set_random_seed(job.seed)
    with np.load(job.data) as file:
        x = file["x_train"].astype(np.float32) / 255
    # mirrored, see `_weights`
    x = np.ascontiguousarray(np.moveaxis(x, 1, -1)[:, ::-1, ::-1]) if job.variational else x
    network = _conv(job, keras) if job.variational else _dense(job, keras)
    for weight, value in zip(network.trainable_weights, _weights(job), strict=True):
        weight.assign(value)

    def nats(x: Any, x_hat: Any) -> Any:
        """The cross-entropy in nats per sample, as of the other parties; Keras averages over values."""
        axes = tuple(range(1, len(x.shape)))
        return math.prod(job.shape) * keras.ops.mean(keras.losses.binary_crossentropy(x, x_hat), axis=axes[:-1])

    clock = Clock(job)

    class Timer(keras.callbacks.Callback):
        """Records epochs in the clock."""

        # otherwise Keras would run all callbacks, including the progress bar, in the training thread
        async_safe = True

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            clock.begin()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if job.accelerator == "cuda" and clock.first_step is None:
                float(logs["loss"])  # waits for the GPU, as the epoch's does below
            clock.record_step()

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            clock.end(float(logs["loss"]))

    # torch's epsilon; the default of Keras is 1e-7
    network.compile(optimizer=keras.optimizers.Adam(job.lr, epsilon=1e-8), loss=nats)
    network.fit(x, x, batch_size=job.batch, epochs=job.epochs, callbacks=[Timer()])
    package = "tensorflow-cpu" if backend == "tensorflow" and job.accelerator == "cpu" else backend
    versions = {"keras": keras.__version__, backend: version(package)}
    return clock.result(network.count_params(), **versions)
