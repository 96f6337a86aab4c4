"""Small models of CompressAI with random weights, and their outputs.

    python tests/compressai_fixtures.py       with compressai 1.2.8, which needs numpy below 2, and safetensors

writes to `tests/fixtures/compressai` the weights of each architecture by their names in CompressAI, an image of squares
of 4 x 4, and for it code, likelihoods, every fourth value of the output, and strings. Codes are at least `MARGIN` away
from where rounding changes an integer, and scales from where they change a table, so that another order of sums gives
the same strings. The tables of Gaussians, which are the same for all, are in a separate file.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressai.models import (
        Cheng2020Anchor,
        Cheng2020Attention,
        FactorizedPrior,
        FactorizedPriorReLU,
        JointAutoregressiveHierarchicalPriors,
        MeanScaleHyperprior,
        ScaleHyperprior,
    )

FOLDER = Path(__file__).parent / "fixtures" / "compressai"
N, M, MARGIN = 4, 6, 1e-4
KINDS = {
    "bmshj2018-factorized": (FactorizedPrior, (N, M)),
    "bmshj2018-factorized-relu": (FactorizedPriorReLU, (N, M)),
    "bmshj2018-hyperprior": (ScaleHyperprior, (N, M)),
    "mbt2018-mean": (MeanScaleHyperprior, (N, M)),
    "mbt2018": (JointAutoregressiveHierarchicalPriors, (N, M)),
    "cheng2020-anchor": (Cheng2020Anchor, (N,)),
    "cheng2020-attn": (Cheng2020Attention, (N,)),
}


class Margin:
    """The least distances of coded values from rounding limits, and of scales from limits between tables."""

    def __init__(self, net: Any) -> None:
        self.least = np.inf
        for model in (net.entropy_bottleneck, getattr(net, "gaussian_conditional", None)):
            if model is not None:
                self.watch(model)

    def watch(self, model: Any) -> None:
        """Measure each time the model rounds or selects tables."""
        quantize = model.quantize

        def quantised(inputs: Tensor, mode: str, means: Tensor | None = None) -> Tensor:
            values = inputs if means is None else inputs - means
            self.add((values - values.floor() - 0.5).abs())
            return quantize(inputs, mode, means)

        model.quantize = quantised
        if hasattr(model, "build_indexes"):
            build = model.build_indexes

            def indexed(scales: Tensor) -> Tensor:
                self.add((scales[..., None].clamp_min(0.11) / model.scale_table - 1).abs()[scales > 0.11])
                return build(scales)

            model.build_indexes = indexed

    def add(self, distances: Tensor) -> None:
        """Keep the minimum of some distances."""
        if distances.numel():
            self.least = min(self.least, float(distances.min()))


def drawn(name: str, seed: int) -> Any:
    """A model with random offsets to its initial weights, wide codes and its own tables."""
    torch.manual_seed(seed)
    kind, sizes = KINDS[name]
    net = kind(*sizes).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        last = [layer for layer in net.g_a if isinstance(layer, torch.nn.Conv2d)][-1]
        last.weight.mul_(20)
        if hasattr(net, "h_a"):
            net.h_a[-1].weight.mul_(10)
            net.h_s[-1 if name != "bmshj2018-hyperprior" else -2].weight.mul_(3)
        if hasattr(net, "entropy_parameters"):
            net.entropy_parameters[-1].weight.mul_(3)
            net.context_prediction.weight.mul_(net.context_prediction.mask)
    # tables do not cover all codes, so that some are coded outside of them
    net.update(update_quantiles=True)
    with torch.no_grad():
        net.entropy_bottleneck.quantiles[:, :, 1] += 0.3
        net.entropy_bottleneck.quantiles[:, :, 0] = net.entropy_bottleneck.quantiles[:, :, 1] - 2.4
        net.entropy_bottleneck.quantiles[:, :, 2] = net.entropy_bottleneck.quantiles[:, :, 1] + 1.2
    net.update(force=True)
    return net


def results(net: Any, x: Tensor) -> dict[str, Any]:
    """The model's outputs for one image."""
    coded = net.compress(x)
    forward = net(x)
    found: dict[str, Any] = {f"likelihoods_{key}": value for key, value in forward["likelihoods"].items()}
    found["x_hat"] = net.decompress(coded["strings"], coded["shape"])["x_hat"][:, :, ::4, ::4]
    found["y"] = net.g_a(x)
    for key, (string,) in zip("yz", coded["strings"], strict=False):
        found[f"string_{key}"] = torch.frombuffer(bytearray(string), dtype=torch.uint8)
    return found


def main() -> None:
    """Write all files."""
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    gaussians: dict[str, Any] = {}
    for name in KINDS:
        for seed in range(1000):
            net = drawn(name, seed)
            margin = Margin(net)
            x = torch.randint(0, 256, (1, 3, 16, 32), dtype=torch.uint8)
            with torch.no_grad():
                found = results(net, F.interpolate(x / 255, scale_factor=4))
            if margin.least > MARGIN:
                break
        else:
            raise SystemExit(f"{name}: no weights with such margins")
        state = {}
        for key, value in net.state_dict().items():
            if key.startswith("gaussian_conditional._"):
                gaussians[key.removeprefix("gaussian_conditional.")] = value.numpy()
            else:
                state[key] = value
        tensors = state | {f"found/{key}": value for key, value in {"x": x, **found}.items()}
        save_file({key: value.contiguous() for key, value in tensors.items()}, FOLDER / f"{name}.safetensors")
        print(name, seed, margin.least, {key: len(value) for key, value in found.items() if "string" in key})
    cdf = gaussians.pop("_quantized_cdf")
    # differences are smaller when compressed
    np.savez_compressed(FOLDER / "gaussians.npz", frequencies=np.diff(cdf, axis=1).astype(np.int32), **gaussians)


if __name__ == "__main__":
    main()
