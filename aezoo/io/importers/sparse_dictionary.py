"""Sparse autoencoders of other libraries: checks of tensors, exact changes of weights, conversion to models.

    pi = W_enc x + b_enc     f = activation(pi)     x_hat = W_dec f + b_dec

The same function can be written with other weights: a bias b_dec that is subtracted from x can be folded into b_enc, a
scale of the data into both matrices, and norms of directions into W_enc, b_enc and thresholds. These changes are exact
up to rounding and computed in float64.

Shapes: N latents, X inputs, Y outputs.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from aezoo.errors import AezooError
from aezoo.io.importers import Imported
from aezoo.registry import create_model

ACTIVATIONS = ("relu", "topk", "abs_topk", "batch_topk", "jumprelu", "gated")
_NAMES = {"relu": "ReLU", "topk": "TopK", "abs_topk": "AbsTopK", "batch_topk": "BatchTopK", "jumprelu": "JumpReLU",
          "gated": "gated"}  # fmt: skip
_WIDTHS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# number of rows converted to float64 at once
_ROWS = 4096
# tolerance for unit norms in files, in float32 or bf16
_UNIT = 1e-5
UNKNOWN_SCALE = (
    "trained on activations scaled to a mean norm of sqrt(d), and the files lack their mean norm: divide them by c = "
    "mean norm / sqrt(d), or fold c into the weights with aezoo.io.scale_folding.fold"
)
# batches counted in the running mean of thresholds, so that further training changes it slowly
_SEEN_STEPS = 1000


@dataclass(frozen=True)
class SparseDictionary:
    """A sparse autoencoder or a transcoder.

    Attributes:
        W_enc: (N, X).
        b_enc: (N,); the bias of the gates for gated.
        W_dec: (N, Y), directions in rows.
        b_dec: (Y,).
        activation: one of `ACTIVATIONS`.
        k: number of active latents for topk, abs_topk and batch_topk.
        threshold: (N,) for jumprelu; () for batch_topk.
        r_mag: (N,), logarithm of the scale of magnitudes for gated.
        b_mag: (N,), bias of the magnitudes for gated.
        centred: whether b_dec is subtracted from x.
        input_norm: see `aezoo.nets.blocks.dictionary.InputNorm`.
        transcoder: whether the output is not a reconstruction of the input.
        W_skip: (Y, X), the linear skip connection of a transcoder.
        prefixes: sizes of nested dictionaries.
        streams: number of streams of a crosscoder; X and Y are in their order.
        notes: changes made, one line each.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    activation: str = "relu"
    k: int = 0
    threshold: Tensor | None = None
    r_mag: Tensor | None = None
    b_mag: Tensor | None = None
    centred: bool = False
    input_norm: str = "none"
    transcoder: bool = False
    W_skip: Tensor | None = None
    prefixes: tuple[int, ...] = ()
    streams: int = 0
    notes: tuple[str, ...] = field(default=())

    def check(self, label: str) -> None:
        """Reject inconsistent tensors.

        Args:
            label: the file.

        Raises:
            AezooError: shapes differ, k does not lie between 1 and N, or a tensor of the activation is missing.
        """
        if self.W_enc.ndim != 2 or self.W_dec.ndim != 2:
            raise AezooError(
                f"{label}: the encoder and decoder must be matrices, got {_shapes(self.W_enc, self.W_dec)}"
            )
        n, x = self.W_enc.shape
        y = self.W_dec.shape[1]
        shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
            "the decoder": (self.W_dec, (n, y if self.transcoder else x)),
            "the encoder's bias": (self.b_enc, (n,)),
            "the decoder's bias": (self.b_dec, (y,)),
            "the threshold": (self.threshold, () if self.activation == "batch_topk" else (n,)),
            "the scale of magnitudes": (self.r_mag, (n,)),
            "the bias of magnitudes": (self.b_mag, (n,)),
            "the skip connection": (self.W_skip, (y, x)),
        }
        for what, (tensor, shape) in shapes.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise AezooError(
                    f"{label}: {what} has shape {tuple(tensor.shape)}, but an encoder of {x} inputs and {n} latents "
                    f"needs {shape}"
                )
        if self.activation in ("topk", "abs_topk", "batch_topk") and not 1 <= self.k <= n:
            raise AezooError(f"{label}: k must lie between 1 and the {n} latents, got {self.k}")
        if self.activation in ("jumprelu", "batch_topk") and self.threshold is None:
            raise AezooError(f"{label}: {_NAMES[self.activation]} needs a threshold, and the file has none")
        if self.transcoder and self.activation not in ("relu", "topk", "jumprelu"):
            raise AezooError(f"{label}: transcoders are ReLU, TopK or JumpReLU, not {_NAMES[self.activation]}")
        if self.transcoder and (x != y or self.input_norm != "none"):
            why = f"reads {x} and writes {y} values" if x != y else "normalises its input"
            raise AezooError(f"{label}: a transcoder that {why} cannot be represented by aezoo's transcoder")
        if self.W_skip is not None and not self.transcoder:
            raise AezooError(f"{label}: a skip connection in an autoencoder would copy its input")

    # ---- exact changes -----------------------------------------------------------------------------------------------

    def with_scale(self, read: float, written: float) -> "SparseDictionary":
        """Return the model for raw activations, if it was trained on activations times `read`, outputs times `written`.

        Codes and thresholds do not change their units, so b_enc does not change.
        """
        return replace(
            self.uncentred() if read != written else self,
            W_enc=self.W_enc * read,
            W_dec=self.W_dec / written,
            b_dec=self.b_dec / written,
            notes=(*self.notes, f"activation scale of {read:.6g} folded into the weights"),
        )

    def uncentred(self) -> "SparseDictionary":
        """Return the equivalent model that does not subtract b_dec from x."""
        return self if not self.centred else self._shifted(-1, centred=False)

    def recentred(self) -> "SparseDictionary":
        """Return the equivalent model that subtracts b_dec from x."""
        return self if self.centred else self._shifted(1, centred=True)

    def _shifted(self, sign: int, centred: bool) -> "SparseDictionary":
        shift_N = torch.cat([part.double() @ self.b_dec.double() for part in self.W_enc.split(_ROWS)])
        b_mag = self.b_mag
        if b_mag is not None and self.r_mag is not None:
            b_mag = (b_mag.double() + sign * self.r_mag.double().exp() * shift_N).float()
        return replace(
            self,
            b_enc=(self.b_enc.double() + sign * shift_N).float(),
            b_mag=b_mag,
            centred=centred,
            notes=(*self.notes, "decoder bias at the input folded into the encoder's bias"),
        )

    def norms(self) -> Tensor:
        """Return the norms of the directions, (N,), in float64."""
        return torch.linalg.vector_norm(self.W_dec, dim=1, dtype=torch.float64)

    def with_unit_norm(self) -> "SparseDictionary":
        """Return the equivalent model with directions of norm 1: latents are multiplied by the previous norms."""
        norms_N = self.norms().clamp(min=1e-8)

        def times(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else (tensor.double() * norms_N).float()

        return replace(
            self,
            W_enc=self.W_enc * norms_N[:, None].float(),
            b_enc=(self.b_enc.double() * norms_N).float(),
            W_dec=self.W_dec / norms_N[:, None].float(),
            threshold=times(self.threshold),
            b_mag=times(self.b_mag),
            notes=(*self.notes, "norms of directions folded into the encoder"),
        )

    # ---- the model ---------------------------------------------------------------------------------------------------

    def imported(self, library: str, label: str) -> Imported:
        """Build the model with the same codes and outputs.

        Args:
            library: name of the format.
            label: the file that the weights are from.

        Raises:
            AezooError: as in `check`; or the constructor rejects the sizes.
        """
        self.check(label)
        (n, x), y = self.W_enc.shape, self.W_dec.shape[1]
        kind = _NAMES[self.activation] + (f" (k = {self.k})" if self.k else "")
        kind += " crosscoder" if self.streams else " transcoder" if self.transcoder else ""
        found = f"{library}, {kind}{' with a skip connection' if self.W_skip is not None else ''}, "
        found += f"{x:,} inputs, {n:,} latents"
        unit_norm = bool(((self.norms() - 1).abs() < _UNIT).all())
        if self.transcoder:
            name, settings, state, final = self._transcoder(unit_norm)
        elif self.streams:
            name, settings, state, final = self._crosscoder()
        elif self.activation in ("topk", "abs_topk", "batch_topk"):
            name, settings, state, final = self._topk(unit_norm)
        else:
            name, settings, state, final = self._penalised(unit_norm)
        shape = (2, y) if self.transcoder else (self.streams, x // self.streams) if self.streams else (x,)
        try:
            model = create_model(name, shape, latent_dim=n, **settings)
        except AezooError as error:
            raise AezooError(f"{label}: {error}") from error
        common = {"encoder.weight": final.W_enc, "encoder.bias": final.b_enc}
        common |= {"decoder.W_NX": final.W_dec, "decoder.b_X": final.b_dec}
        model.load_state_dict({**model.state_dict(), **common, **state})
        notes = final.notes
        if self.transcoder:
            notes += ("a sample has two rows: the first is read, the second is predicted",)
        if self.W_skip is not None:
            notes += (f"a code has {n:,} latents, then the {y:,} values of the skip connection",)
        if self.input_norm != "none":
            notes += (f"a code has {n:,} latents, then the offset and scale of its sample",)
        return Imported(model.eval(), found, notes)

    def _thresholds(self) -> dict[str, Tensor]:
        # pi below 0 is inactive due to the ReLU, for any threshold
        return {} if self.threshold is None else {"theta_N": self.threshold.clamp(min=0)}

    def _transcoder(self, unit_norm: bool) -> "_Parts":
        activation = f"topk:{self.k}" if self.activation == "topk" else self.activation
        settings = {
            "targets": (1,),
            "form": _form(unit_norm),
            "activation": activation,
            "skip": self.W_skip is not None,
        }
        state = {} if self.W_skip is None else {"skip.weight": self.W_skip}
        return "transcoder", settings, state | self._thresholds(), self

    def _crosscoder(self) -> "_Parts":
        return "crosscoder", {}, {}, self

    def _topk(self, unit_norm: bool) -> "_Parts":
        settings: dict[str, Any] = {"k": self.k, "unit_norm": unit_norm, "input_norm": self.input_norm}
        if self.activation != "batch_topk" or self.threshold is None:
            return f"{self.activation}_sae", settings, {}, self.recentred()
        theta = self.threshold.float()
        # the originals keep values > the threshold, aezoo values >= the threshold
        theta = torch.nextafter(theta, torch.tensor(torch.inf)) if theta >= 0 else torch.zeros(())
        state = {"theta.value": theta, "theta.steps": torch.tensor(_SEEN_STEPS)}
        if not self.prefixes:
            return "batch_topk_sae", settings, state, self.recentred()
        n = self.prefixes[-1]
        settings["fractions"] = tuple(prefix / n for prefix in self.prefixes[:-1])
        return "matryoshka_sae", settings, state, self.recentred()

    def _penalised(self, unit_norm: bool) -> "_Parts":
        centred = self.centred and unit_norm
        settings = {"form": _form(centred), "input_norm": self.input_norm}
        final = self if centred else self.uncentred()
        state = self._thresholds()
        if final.r_mag is not None and final.b_mag is not None:
            state = {"r_N": final.r_mag, "b_mag_N": final.b_mag}
        return {"relu": "sae_l1"}.get(self.activation, f"{self.activation}_sae"), settings, state, final


_Parts = tuple[str, dict[str, Any], dict[str, Tensor], SparseDictionary]


def _form(unit_norm: bool) -> str:
    return "unit_norm" if unit_norm else "april"


# ---- checks of files -------------------------------------------------------------------------------------------------


def float_tensors(
    found: Mapping[str, Tensor], label: str, required: Collection[str], optional: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return tensors of a file, in float32.

    Args:
        found: the file's tensors by name.
        label: the file.
        required: names that the file must have.
        optional: names that the file may have.

    Raises:
        AezooError: a name is missing or unknown; or a tensor does not contain finite floating-point numbers.
    """
    if missing := sorted(set(required) - set(found)):
        raise AezooError(f"{label}: there is no {_some(missing)}; it has {_some(found)}")
    if unknown := sorted(set(found) - set(required) - set(optional)):
        raise AezooError(
            f"{label}: {_some(unknown)} is unknown in this format, so the result would not be the original"
        )
    for name, tensor in found.items():
        if tensor.dtype not in _WIDTHS:
            raise AezooError(
                f"{label}: {name} contains {str(tensor.dtype).removeprefix('torch.')}, not floating-point numbers"
            )
        if not bool(tensor.isfinite().all()):
            raise AezooError(f"{label}: {name} contains NaN or infinite values: the file is damaged")
    return {name: tensor.float() for name, tensor in found.items()}


def value_of(config: Mapping[str, Any], key: str, kind: type, label: str, default: Any = None) -> Any:
    """Return a value of a configuration.

    Args:
        config: the configuration.
        key: name of the value.
        kind: bool, str, dict, list, int, or float (also accepts int).
        label: the file.
        default: the value if it is missing or null; without a default, the value is required.

    Raises:
        AezooError: the value is missing or has another type.
    """
    value = config.get(key)
    if value is None:
        if default is None:
            raise AezooError(f"{label}: there is no {key}")
        return default
    accepted: tuple[type, ...] = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise AezooError(f"{label}: {key} must be a {kind.__name__}, got {str(value)[:50]!r}")
    return value


def check_sizes(config: Mapping[str, Any], sizes: Mapping[str, int], label: str) -> None:
    """Reject weights whose sizes differ from the configuration.

    Raises:
        AezooError: a size differs.
    """
    for key, size in sizes.items():
        if (stated := value_of(config, key, int, label, size)) != size:
            raise AezooError(
                f"{label}: {key} is {stated:,}, but the weights have {size:,}: they do not belong together"
            )


def _some(names: Collection[str]) -> str:
    shown = sorted(map(str, names))[:6]
    return ", ".join(name[:40] for name in shown) + (", ..." if len(names) > len(shown) else "")


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
