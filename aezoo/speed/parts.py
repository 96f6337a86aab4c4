"""Which parts of `aezoo.speed` are used: all, or those that the environment variable AEZOO_SPEED does not disable."""

import functools
import os

from aezoo.errors import AezooError

# names and descriptions
PARTS = {
    "fast_loop": "Lightning's training loop without unused features",
    "predict_loop": "Lightning's prediction loop without unused features",
    "fused_optimizer": "the fused kernel of Adam, called without torch's bookkeeping",
    "joint_backward": "loss and gradients as one compiled graph",
    "graph_capture": "a whole step as a CUDA graph",
    "linear": "matrix products by oneDNN where MKL uses half of the vector width",
    "inductor_lowering": "the same in compiled graphs, without Python",
    "conv_products": "convolutions on small grids as matrix products",
    "sub_pixel": "transposed convolutions to few channels as sub-pixel convolutions",
    "overlap_add": "transposed convolutions to one channel as overlapping products",
    "separate_gradients": "gradients of a convolution one by one, in the order of their use",
    "batch_inner": "convolutions with the batch as the innermost spatial dimension",
    "channels_last": "images with channels last in memory",
    "denormals": "denormal numbers are flushed to zero",
    "malloc": "memory of large tensors is kept from step to step, in huge pages",
}


def is_enabled(part: str) -> bool:
    """Whether a part is used."""
    return part not in disabled_parts(os.environ.get("AEZOO_SPEED", "auto"))


@functools.lru_cache(maxsize=1)
def disabled_parts(value: str) -> frozenset[str]:
    """The parts that a value of AEZOO_SPEED disables: none for auto, otherwise a list of names with commas.

    Raises:
        AezooError: there is no such part.
    """
    names = frozenset() if value in ("", "auto") else frozenset(name.strip() for name in value.split(","))
    for name in sorted(names - PARTS.keys()):
        raise AezooError(
            f"AEZOO_SPEED disables {name!r}, which is not a part: give auto, off or some of {', '.join(PARTS)}"
        )
    return names
