"""Detectors of the anomaly benchmark: names, groups and settings."""

import inspect
import re
from typing import Any

import yaml

from aezoo.errors import AezooError

from .common import as_number

DEFAULT = "default"
# models that were published for the detection of anomalies and take vectors, and the autoencoders that are used for it
ZOO = (
    *("ae1svm", "alad", "dagmm", "deep_svdd", "f_anogan", "ganomaly", "memory_ae"),
    *("linear_ae", "dense_ae", "denoising_ae", "contractive_ae", "rae", "vae", "iwae"),
)
# PyOD's detectors, and their modules in `pyod.models`
PYOD = {
    "AutoEncoder": "auto_encoder",
    "VAE": "vae",
    "DeepSVDD": "deep_svdd",
    "IForest": "iforest",
    "ECOD": "ecod",
    "COPOD": "copod",
    "KNN": "knn",
    "LOF": "lof",
    "PCA": "pca",
    "OCSVM": "ocsvm",
    "LUNAR": "lunar",
}
_OF_PYOD = "pyod."
GROUPS = {"zoo": (DEFAULT, *ZOO), "pyod": tuple(_OF_PYOD + name for name in PYOD)}
GROUPS["all"] = GROUPS["zoo"] + GROUPS["pyod"]


def parse_detector(text: str) -> dict[str, Any]:
    """What `adbench_row` builds: party, name and settings.

    Raises:
        AezooError: the detector or one of its settings does not exist.
    """
    name, _, given = text.partition(":")
    settings: dict[str, Any] = {}
    # commas within a list do not separate settings
    for part in filter(None, re.split(r",(?=\w+=)", given)):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise AezooError(f"--detectors {text}: settings are KEY=VALUE,KEY=VALUE, got {part!r}")
        try:
            # YAML reads 1e-3 as text
            settings[key] = yaml.safe_load(value) if (found := as_number(value)) is None or value.isdigit() else found
        except yaml.YAMLError as error:
            raise AezooError(f"--detectors {text}: {value!r} is not a value") from error
    if name.startswith(_OF_PYOD):
        if name.removeprefix(_OF_PYOD) not in PYOD:
            raise AezooError(f"unknown detector {name!r}: PyOD has {', '.join(GROUPS['pyod'])}")
        return {"party": "pyod", "name": name.removeprefix(_OF_PYOD), "settings": settings}
    return {"party": "aezoo", "name": name, "settings": _estimator_settings(name, settings)}


def _estimator_settings(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of AutoencoderDetector; settings that it does not have are passed to its model."""
    from aezoo import registry
    from aezoo.sklearn import AutoencoderDetector

    known = inspect.signature(AutoencoderDetector).parameters
    if name != DEFAULT:
        settings = {"model": registry.find(name).name} | settings
    own = {key: value for key, value in settings.items() if key in known}
    params = {key: value for key, value in settings.items() if key not in known}
    model = own.get("model", known["model"].default)
    if unknown := [key for key in params if key not in registry.hyperparameters(model)]:
        raise AezooError(f"--detectors {name}: neither AutoencoderDetector nor {model} has {unknown[0]}")
    return own | ({"model_params": params} if params else {})
