"""Old names of methods, which plug-ins may still call and override, with a DeprecationWarning."""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# old and new names by the class that has the method
METHODS: dict[str, dict[str, str]] = {
    "aezoo.autoencoder.Autoencoder": {
        "keep_started": "enable_data_init",
        "keep_steps": "enable_step_counter",
        "of_all_ranks": "all_gather_batch",
        "own_rank": "gather_rank",
        "own_rows": "local_rows",
        "share_of_steps": "step_fraction",
        "start_from": "init_from_data",
        "unusable": "invalid_mask",
    },
    "aezoo.bases.distillation.DistilledAutoencoder": {"taught_by": "load_teacher"},
    "aezoo.bases.entropy_coded.EntropyCoded": {
        "bits_a_place": "bits_per_place",
        "rated": "code_with_rate",
        "set_nets": "build_nets",
        "walk": "code_latents",
    },
    "aezoo.bases.mixture_prior.MixturePrior": {
        "draw_mixture": "sample_mixture",
        "keep_mixture": "build_mixture",
        "log_mixture": "mixture_log_prob",
    },
    "aezoo.bases.multimodal.MissingModalities": {"filled": "fill_missing", "seen": "present_mask"},
    "aezoo.bases.multimodal.Multimodal": {"encoded": "encode_parts", "keep_parts": "build_parts"},
    "aezoo.bases.perceptual_adversarial.PerceptualAdversarial": {
        "judged": "adversarial_objective",
        "keep_judges": "set_adversarial_losses",
    },
    "aezoo.bases.quantised.DiscreteAutoencoder": {"books": "codebooks", "set_nets": "build_nets"},
    "aezoo.bases.token_prior.IndexPrior": {
        "indices_of": "from_tokens",
        "stepper": "incremental_logits",
        "tokens": "to_tokens",
        "within_books": "mask_unused_codes",
    },
    "aezoo.bases.triplet.TripletAutoencoder": {"keep_triplets": "set_triplet_loss"},
    "aezoo.models.compression.scale_hyperprior.ScaleHyperprior": {"said": "code_side"},
    "aezoo.models.latent_diffusion.autoencoder_kl.AutoencoderKL": {
        "besides": "extra_terms",
        "compared": "decoder_inputs",
    },
    "aezoo.models.sparse.sae_l1.SAEL1": {"warmed": "warm_up_weight"},
    "aezoo.models.variational.mmvae.MMVAE": {"there": "present_components"},
}
_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"


class RenamedMethods:
    """Base of classes with renamed methods: a class in `METHODS` has the old names too, and subclasses may use them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for old, new in METHODS.get(f"{cls.__module__}.{cls.__qualname__}", {}).items():
            setattr(cls, old, _alias(old, new))
        for parent in cls.__mro__:
            for old, new in METHODS.get(f"{parent.__module__}.{parent.__qualname__}", {}).items():
                _take_over(cls, old, new)


def _alias(old: str, new: str) -> Callable[..., Any]:
    def alias(self: Any, *args: Any, **kwargs: Any) -> Any:
        # an override under the old name has been called under the new one, and calls its parent's
        overrides = [cls for cls in type(self).__mro__ if vars(cls).get(old, alias) is not alias]
        if overrides:
            return getattr(super(overrides[-1], self), new)(*args, **kwargs)
        _warn(f"{type(self).__name__}.{old}", new)
        return getattr(self, new)(*args, **kwargs)

    alias.__name__, alias.__doc__ = old, f"Deprecated: see `{new}`."
    alias._is_alias = True  # type: ignore[attr-defined]
    return alias


def _take_over(cls: type, old: str, new: str) -> None:
    """Let a class's override under an old name, or that of a mixin, be its override under the new name."""
    for owner in cls.__mro__:
        if new in vars(owner):
            return
        method = vars(owner).get(old)
        if method is not None and not hasattr(method, "_is_alias"):
            _warn(f"{cls.__name__}.{old}", new)
            setattr(cls, new, method)
            return


def _warn(old: str, new: str) -> None:
    """Warn at the innermost line of code outside this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        f"{old} is now {new}, and the old name goes with the next release", DeprecationWarning, stacklevel=level
    )
