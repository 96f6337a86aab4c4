"""Properties that a class of models declares."""

import difflib
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from aezoo.errors import AezooError

# purposes of models, each with a command that uses it
TAGS = {
    "anomaly": "how strange a sample is: aezoo detect",
    "generation": "new samples: aezoo generate",
    "compression": "small files: aezoo compress",
    "representation": "codes for search, clusters and classifiers: aezoo embed",
    "disentanglement": "one number of the code for each factor of the data: aezoo benchmark disentangle",
    "interpretability": "dictionaries that explain the activations of a network: --data activations",
    "multimodal": "samples that consist of parts, such as a picture and its text: --model.parts",
    "tokenizer": "codes as sequences or maps of tokens, for a model that learns to draw them",
    "latent diffusion": "codes on which a diffusion model is trained",
    "imputation": "samples of which parts are missing: aezoo impute, or reconstruct --parts",
    "denoising": "samples without their noise: aezoo denoise",
}


class Traits:
    """Properties that a class declares in its first line: `class MyVAE(Autoencoder, has_prior=True)`.

    Subclasses inherit the values.

    Attributes:
        has_prior: whether `sample` works.
        normal_prior: whether q(z|x) is the diagonal Gaussian of `posterior(x)`, its mean and log-variance, and p(z) is
            N(0, I).
        sparse_code: whether most entries of a code should be zero; a constructor may set it for its instance.
        discrete_code: whether a code can be written as indices, see `aezoo.bases.quantised`.
        compares_samples: whether the loss compares the samples of a batch, and so depends on the batch size.
        reads_labels: whether labels define which samples of a batch belong together, for any number of labels.
        not_averaged: names of buffers that contain single codes or samples, which must not be averaged over steps.
        steps_differ: whether the computation of a training step depends on random draws, so that one graph does not
            fit all steps and a fit never compiles it.
        takes_missing: whether samples may have missing parts, whose values are all NaN, see `aezoo.bases.multimodal`.
        score_term: name of what `score` adds to -log p(x | z), such as kl, for explanations of `detect`; if empty,
            other terms.
        tags: what the model is for, some of `TAGS`, the most important first; `aezoo list --tag` finds it by them.
    """

    has_prior: ClassVar[bool] = False
    normal_prior: ClassVar[bool] = False
    sparse_code: bool = False
    discrete_code: ClassVar[bool] = False
    compares_samples: ClassVar[bool] = False
    reads_labels: ClassVar[bool] = False
    not_averaged: ClassVar[tuple[str, ...]] = ()
    steps_differ: ClassVar[bool] = False
    takes_missing: ClassVar[bool] = False
    score_term: ClassVar[str] = ""
    tags: ClassVar[tuple[str, ...]] = ()


def set_traits(cls: type[Traits], values: Mapping[str, Any]) -> None:
    """Set the traits that the first line of a class gives.

    Raises:
        AezooError: there is no such trait or tag, or its value has another type.
    """
    known = Traits.__annotations__
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f": there are {', '.join(known)}"
            raise AezooError(f"{cls.__name__}: unknown trait {name!r}{hint}")
        kind = type(getattr(Traits, name))
        if type(value) is not kind:
            raise AezooError(f"{cls.__name__}: {name} takes a {kind.__name__}, got {value!r}")
        if name == "tags":
            for tag in value:
                check_tag(tag, f"{cls.__name__}: ")
        setattr(cls, name, value)


def check_tag(text: object, where: str = "") -> str:
    """The tag of `TAGS` that a text spells, such as latent_diffusion.

    Args:
        text: what is to be a tag.
        where: the beginning of the error message.

    Raises:
        AezooError: it is not a tag; the message suggests the most similar one.
    """
    spelled = re.sub(r"[-_ ]+", " ", str(text)).strip().lower()
    if spelled in TAGS:
        return spelled
    near = difflib.get_close_matches(spelled, TAGS, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ":"
    raise AezooError(f"{where}unknown tag {str(text)!r}{hint} There are {', '.join(TAGS)}")
