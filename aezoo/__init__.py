"""aezoo: the autoencoder zoo one can trust."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from aezoo.autoencoder import Autoencoder
    from aezoo.checkpoint import load_model, save_model
    from aezoo.data import DataModule
    from aezoo.errors import AezooError
    from aezoo.hub import push_to_hub
    from aezoo.registry import create_model, list_models, model_class
    from aezoo.tasks.compress import compress
    from aezoo.tasks.decompress import decompress
    from aezoo.tasks.denoise import denoise
    from aezoo.tasks.detect import detect
    from aezoo.tasks.embed import embed
    from aezoo.tasks.generate import generate
    from aezoo.tasks.reconstruct import reconstruct

_HOMES = {
    "AezooError": "aezoo.errors",
    "Autoencoder": "aezoo.autoencoder",
    "DataModule": "aezoo.data",
    "compress": "aezoo.tasks.compress",
    "create_model": "aezoo.registry",
    "decompress": "aezoo.tasks.decompress",
    "denoise": "aezoo.tasks.denoise",
    "detect": "aezoo.tasks.detect",
    "embed": "aezoo.tasks.embed",
    "generate": "aezoo.tasks.generate",
    "list_models": "aezoo.registry",
    "load_model": "aezoo.checkpoint",
    "model_class": "aezoo.registry",
    "push_to_hub": "aezoo.hub",
    "reconstruct": "aezoo.tasks.reconstruct",
    "save_model": "aezoo.checkpoint",
}
__all__ = [
    "AezooError",
    "Autoencoder",
    "DataModule",
    "compress",
    "create_model",
    "decompress",
    "denoise",
    "detect",
    "embed",
    "generate",
    "list_models",
    "load_model",
    "model_class",
    "push_to_hub",
    "reconstruct",
    "save_model",
]


def __getattr__(name: str) -> Any:
    """Import a public name or a module at its first use (PEP 562), so that `import aezoo` needs no torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if not name.startswith("_"):
        from importlib.util import find_spec  # which `import aezoo` can do without

        if find_spec(f"aezoo.{name}") is not None:
            return import_module(f"aezoo.{name}")
    raise AttributeError(f"module 'aezoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"Any", "TYPE_CHECKING", "import_module", "_HOMES"})
