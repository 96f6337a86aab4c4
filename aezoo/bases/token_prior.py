"""Priors over the indices of a quantised model, for generation: k ~ p(k), x = g(k).

    p(k) = prod_t p(k_t | k_1 .. k_{t-1})        L = -log p(k),  k the indices of x

in nats per sample, summed over the T indices: positions in raster order, and the Q indices of each position in order.
The quantised model, the `tokenizer`, is trained first and then frozen (van den Oord et al. 2017, section 3.3,
https://arxiv.org/abs/1711.00937). An untrained tokenizer is trained together with its prior, and their losses are
added. No gradient passes through indices, so the tokenizer's weights are the same as in training without a prior.

The score is -log p(x, k) = -log p(x | g(k)) - log p(k), the length of a message with the indices and then x. It is at
least -log p(x), which sums over all indices.

Shapes: B batch, T indices of a sample, Q indices of a position, P positions, K codes of the largest codebook.
"""

import json
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo import registry
from aezoo.autoencoder import Autoencoder, at_least_float32
from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.errors import AezooError
from aezoo.io.checkpoint import load_model
from aezoo.io.hub_files import local_path
from aezoo.quantisers.base import Quantised
from aezoo.training.arguments import OptimizerArgs
from aezoo.training.limits import check_at_least
from aezoo.training.model_names import display_name

_MAX_CODES, _MAX_LAYERS = 2**16, 1000
_CURE = "give the run of a trained quantised model (runs/vq_vae-mnist5k/0), or the name of one, such as vq_vae"


class IndexPriorArgs(OptimizerArgs, total=False):
    """Arguments of `IndexPrior`."""

    tokenizer: str | dict[str, Any]


class IndexPrior(DiscreteAutoencoder, has_prior=True, score_term="nll of the indices"):
    """An autoregressive prior over a tokenizer's indices; a subclass defines `token_logits`.

    Codes, indices and reconstructions are those of the tokenizer. Terms of the loss: nll, of the indices; accuracy, the
    fraction of indices that had the highest probability; those of a tokenizer that is trained jointly, tokenizer_loss,
    tokenizer_nll, ...

    Attributes:
        tokenizer: the model that computes and decodes indices.
        frozen: whether the tokenizer is frozen.

    Args:
        input_shape: shape of one sample.
        tokenizer: path of a trained quantised model (checkpoint, run or saved folder; of a prior, its tokenizer), which
            is copied into this one; or a quantised model to train together with its prior, by name or as {"model":
            name, argument: value, ...}. It then has its own lr; other settings of the optimiser are the prior's.
        **kwargs: see `Autoencoder`.

    Raises:
        AezooError: the tokenizer does not exist, has no indices, is for another data shape, or has too large codebooks.
    """

    tokenizer: DiscreteAutoencoder
    unused_QK: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        tokenizer: str | dict[str, Any] = "vq_vae",
        **kwargs: Unpack[OptimizerArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        if tokenizer == "":
            raise AezooError(f"tokenizer is {tokenizer!r}: {_CURE}")
        if isinstance(tokenizer, dict) or tokenizer in registry.entries() or tokenizer in registry.ALIASES:
            self._tokenizer_config = tokenizer
            self._has_weights = False
            self.tokenizer = _build_tokenizer(tokenizer, self.input_shape)
        else:
            self.tokenizer = _load_tokenizer(str(tokenizer), self.input_shape)
            self._has_weights = True
            # lists instead of tuples, as after saving to and loading from JSON
            self._tokenizer_config = {"model": registry.name_of(type(self.tokenizer)), "trained": True}
            self._tokenizer_config |= json.loads(json.dumps({**self.tokenizer.hparams, "input_shape": None}))
            del self._tokenizer_config["input_shape"]
        self._record(self.hparams)
        self.frozen = isinstance(self._tokenizer_config, dict) and bool(self._tokenizer_config.get("trained"))
        if self.frozen:
            self.tokenizer.requires_grad_(False).eval()
        self.likelihood = self.tokenizer.likelihood
        self.code_shape = self.tokenizer.code_shape
        sizes = self.index_sizes
        self.n_tokens = math.prod(self.index_shape)
        self.n_codes = max(sizes)
        if self.n_codes > _MAX_CODES:
            raise AezooError(
                f"a prior gives each code a logit, and the tokenizer has codebooks of {self.n_codes:,}, above "
                f"{_MAX_CODES:,}: use one with smaller codebooks and more indices per position, such as rq_vae"
            )
        self.register_buffer("unused_QK", torch.arange(self.n_codes) >= torch.tensor(sizes)[:, None], persistent=False)

    def _record(self, arguments: Mapping[str, Any]) -> None:
        """Replace a path by the arguments of the tokenizer; its weights are stored with the prior's."""
        super()._record({**arguments, "tokenizer": getattr(self, "_tokenizer_config", arguments["tokenizer"])})

    def check_net(self, width: int, depth: int, dropout: float) -> None:
        """Check the sizes of a network; for constructors."""
        if width < 1 or not 1 <= depth <= _MAX_LAYERS or not 0 <= dropout < 1:
            raise AezooError(
                f"width must be at least 1, depth from 1 to {_MAX_LAYERS} and dropout at least 0 and below 1, got "
                f"{width}, {depth} and {dropout}"
            )

    # ---- the tokenizer -----------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> nn.Module:  # type: ignore[override]
        """Return the tokenizer's encoder."""
        return self.tokenizer.encoder

    @property
    def decoder(self) -> nn.Module:  # type: ignore[override]
        """Return the tokenizer's decoder."""
        return self.tokenizer.decoder

    @property
    def index_shape(self) -> tuple[int, ...]:
        return self.tokenizer.index_shape

    @property
    def index_sizes(self) -> tuple[int, ...]:
        return self.tokenizer.index_sizes

    def quantise(self, x: Tensor) -> Quantised:
        return self.tokenizer.quantise(x)

    def encode(self, x: Tensor) -> Tensor:
        return self.tokenizer.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.tokenizer.decode(z)

    def encode_indices(self, x: Tensor) -> Tensor:
        return self.tokenizer.encode_indices(x)

    def codes(self, indices: Tensor) -> Tensor:
        return self.tokenizer.codes(indices)

    def decode_indices(self, indices: Tensor) -> Tensor:
        return self.tokenizer.decode_indices(indices)

    def codebooks(self, indices: Tensor) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
        return self.tokenizer.codebooks(indices)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            self.tokenizer.eval()
        return self

    def parameter_groups(self) -> list[dict[str, Any]]:
        tokenizer_ids = {id(p) for p in self.tokenizer.parameters()}
        groups: list[dict[str, Any]] = [{"params": [p for p in self.parameters() if id(p) not in tokenizer_ids]}]
        if not self.frozen:
            groups += [{"lr": self.tokenizer.lr} | group for group in self.tokenizer.parameter_groups()]
        return groups

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._has_weights = True
        return super().load_state_dict(*args, **kwargs)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        name = display_name(type(self.tokenizer))
        if self.frozen:
            if not self._has_weights:
                raise AezooError(f"the tokenizer {name} should be trained, but has no weights: {_CURE}")
            # Lightning warns about this; the tokenizer is meant to be in eval mode
            warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start")
        elif not self._has_weights and self.trainer.is_global_zero:
            print(
                f"aezoo: the tokenizer {name} has random weights and is trained together with its prior; to use a "
                f"trained one, give --model.tokenizer RUN, as in runs/{name}-mnist5k/0",
                file=sys.stderr,
            )

    def begin_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor | None]:
        if not self.frozen:
            self.tokenizer.takes_bytes = self.takes_bytes
            self.tokenizer.begin_step(batch, batch_idx)  # initialises it from data and counts its steps
        return super().begin_step(batch, batch_idx)

    # ---- the prior ---------------------------------------------------------------------------------------------------

    def token_logits(self, tokens: Tensor) -> Tensor:
        """Return logits, including those of codes outside an index's codebook, (B, T) -> (B, T, K)."""
        raise NotImplementedError(f"{type(self).__name__} must write token_logits")

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits of every token given the previous tokens: (B, T) -> (B, T, K).

        The result is in at least float32. Codes outside an index's codebook have the logit -inf.
        """
        logits_BPQK = self.token_logits(tokens).unflatten(1, (-1, len(self.index_sizes)))
        return self.mask_unused_codes(logits_BPQK, self.unused_QK).flatten(1, 2)

    @staticmethod
    def mask_unused_codes(logits: Tensor, unused: Tensor) -> Tensor:
        """Return logits in at least float32, with -inf where `unused`."""
        return at_least_float32(logits).masked_fill(unused, -math.inf)

    def next_logits(self, tokens: Tensor, t: int) -> Tensor:
        """Return the logits of token t, bitwise independent of tokens from t on: (B, T) -> (B, K)."""
        past = torch.arange(self.n_tokens, device=tokens.device) < t
        return self.logits(torch.where(past, tokens, 0))[:, t]

    def incremental_logits(self) -> Callable[[Tensor, int], Tensor]:
        """Return a function like `next_logits` for one pass over the tokens of a batch, with increasing t.

        A subclass may return a function that caches the computations for earlier tokens.
        """
        return self.next_logits

    def to_tokens(self, indices: Tensor) -> Tensor:
        """Return indices in the order in which they are drawn: (B, *index_shape) -> (B, T)."""
        return indices.flatten(2).transpose(1, 2).flatten(1) if indices.ndim > 2 else indices

    def from_tokens(self, tokens: Tensor) -> Tensor:
        """Invert `to_tokens`: (B, T) -> (B, *index_shape)."""
        q, *places = self.index_shape
        return tokens.unflatten(1, (-1, q)).transpose(1, 2).unflatten(2, places) if places else tokens

    def log_prob(self, indices: Tensor) -> Tensor:
        """Return log p(indices) in nats, (B, *index_shape) -> (B,)."""
        return -self._nll(self.to_tokens(indices))[0]

    def _nll(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return -log p, (B, T) -> (B,), and the logits; the index -1, for a dropped level, adds nothing."""
        logits_BTK = self.logits(tokens.clamp(min=0))
        nll_BT = F.cross_entropy(logits_BTK.transpose(1, 2), tokens, ignore_index=-1, reduction="none")
        return nll_BT.sum(1), logits_BTK

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        tokens = self.to_tokens(self._indices(x))
        tokenizer_terms = {} if self.frozen else self.tokenizer.loss(x, y)
        nll_B, logits_BTK = self._nll(tokens)
        nll = nll_B.mean()
        accuracy = (logits_BTK.argmax(2) == tokens).to(nll.dtype).mean()
        extra_terms = {f"tokenizer_{name}": term for name, term in tokenizer_terms.items()}
        return {"loss": nll + tokenizer_terms.get("loss", 0), "nll": nll, "accuracy": accuracy, **extra_terms}

    @torch.no_grad()
    def _indices(self, x: Tensor) -> Tensor:
        """Return indices in evaluation mode, i.e. deterministic, without dropout or updates of codebooks."""
        was_training = self.tokenizer.training
        self.tokenizer.eval()
        indices = self.tokenizer.encode_indices(x)
        self.tokenizer.train(was_training)
        return indices

    def score(self, x: Tensor) -> Tensor:
        nll_B = self.tokenizer.nll(self.decoder(self.encode(x)), x)  # its own score may include a prior of the indices
        return nll_B - self.log_prob(self.encode_indices(x))

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0, top_k: int = 0) -> Tensor:
        """Draw n samples, (n, *input_shape): the reconstructions of `sample_indices`."""
        return self.decode_indices(self.sample_indices(n, temperature, top_k))

    @torch.no_grad()
    def sample_indices(self, n: int, temperature: float = 1.0, top_k: int = 0) -> Tensor:
        """Draw the indices of n samples sequentially: (n, *index_shape).

        Args:
            n: number of samples.
            temperature: divides the logits: below 1 for more likely samples, near 0 for the most likely codes.
            top_k: draw each index only from this number of most likely codes; 0 for all.

        Raises:
            AezooError: the temperature or the number of codes is negative.
        """
        check_at_least(0, temperature=temperature, top_k=top_k)
        tokens = torch.zeros(n, self.n_tokens, dtype=torch.long, device=self.device)
        next_logits = self.incremental_logits()
        for t in range(self.n_tokens):
            logits, codes = next_logits(tokens, t).topk(min(top_k or self.n_codes, self.n_codes))
            # relative to the maximum, so that the quotient is finite at any temperature
            p = ((logits - logits[:, :1]) / max(temperature, 1e-30)).softmax(1)
            tokens[:, t] = codes.gather(1, p.multinomial(1))[:, 0]
        return self.from_tokens(tokens)


def _check_tokenizer(cls: type[Autoencoder], what: str) -> type[DiscreteAutoencoder]:
    if not issubclass(cls, DiscreteAutoencoder) or issubclass(cls, IndexPrior):
        wrong = "is a prior itself" if issubclass(cls, IndexPrior) else "writes no code in indices"
        raise AezooError(f"tokenizer {what} {wrong}: {_CURE}")
    return cls


def _build_tokenizer(config: str | dict[str, Any], input_shape: tuple[int, ...]) -> DiscreteAutoencoder:
    """Build a tokenizer with initial weights."""
    settings = {"model": config} if isinstance(config, str) else dict(config)
    name = settings.pop("model", None)
    settings.pop("trained", None)
    if not isinstance(name, str):
        raise AezooError(f'tokenizer {config} names no model: write {{"model": "vq_vae", "latent_dim": 8}}')
    cls = _check_tokenizer(registry.model_class(name), name)
    registry.check_hyperparameters(cls, settings, f"tokenizer {name}")
    model: Any = cls
    tokenizer: DiscreteAutoencoder = model(
        input_shape, **{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    )
    return tokenizer


def _load_tokenizer(path: str, input_shape: tuple[int, ...]) -> DiscreteAutoencoder:
    """Load a trained tokenizer; the path of a prior gives its tokenizer."""
    try:
        loaded = load_model(local_path(path)).float()
    except AezooError as error:
        raise AezooError(
            f"tokenizer {path}: {error}; {_CURE}; the run of a prior contains it: --ckpt_path RUN continues it"
        ) from error
    model = loaded.tokenizer if isinstance(loaded, IndexPrior) else loaded
    _check_tokenizer(type(model), path)
    if model.input_shape != input_shape:
        raise AezooError(
            f"tokenizer {path} takes samples of shape {model.input_shape}, these data give {input_shape}: train one on "
            "them, or give --data.size and --data.channels that fit"
        )
    assert isinstance(model, DiscreteAutoencoder)
    return model
