"""aezoo: the autoencoder zoo one can trust."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from aezoo.autoencoder import Autoencoder
    from aezoo.data import DataModule
    from aezoo.errors import AezooError
    from aezoo.io.checkpoint import load_model, save_model
    from aezoo.io.hub import push_to_hub
    from aezoo.io.importers import import_model
    from aezoo.registry import create_model, list_models, model_class
    from aezoo.tasks.compress import compress
    from aezoo.tasks.decompress import decompress
    from aezoo.tasks.denoise import denoise
    from aezoo.tasks.detect import detect
    from aezoo.tasks.embed import embed
    from aezoo.tasks.export import export
    from aezoo.tasks.generate import generate
    from aezoo.tasks.reconstruct import reconstruct
    from aezoo.tasks.show import show
    from aezoo.tasks.tiling import tiled
    from aezoo.training.sizes import at_size

_HOMES = {
    "AezooError": "aezoo.errors",
    "Autoencoder": "aezoo.autoencoder",
    "DataModule": "aezoo.data",
    "at_size": "aezoo.training.sizes",
    "compress": "aezoo.tasks.compress",
    "create_model": "aezoo.registry",
    "decompress": "aezoo.tasks.decompress",
    "denoise": "aezoo.tasks.denoise",
    "detect": "aezoo.tasks.detect",
    "embed": "aezoo.tasks.embed",
    "export": "aezoo.tasks.export",
    "generate": "aezoo.tasks.generate",
    "import_model": "aezoo.io.importers",
    "list_models": "aezoo.registry",
    "load_model": "aezoo.io.checkpoint",
    "model_class": "aezoo.registry",
    "push_to_hub": "aezoo.io.hub",
    "reconstruct": "aezoo.tasks.reconstruct",
    "save_model": "aezoo.io.checkpoint",
    "show": "aezoo.tasks.show",
    "tiled": "aezoo.tasks.tiling",
}
__all__ = [
    "AezooError",
    "Autoencoder",
    "DataModule",
    "at_size",
    "compress",
    "create_model",
    "decompress",
    "denoise",
    "detect",
    "embed",
    "export",
    "generate",
    "import_model",
    "list_models",
    "load_model",
    "model_class",
    "push_to_hub",
    "reconstruct",
    "save_model",
    "show",
    "tiled",
]


class _OldPaths:
    """Finds modules by the paths that they had in earlier releases; the last finder, so only for those."""

    @staticmethod
    def find_spec(fullname: str, path: Any = None, target: Any = None) -> Any:
        """See `importlib.abc.MetaPathFinder`."""
        if not fullname.startswith("aezoo."):
            return None
        from aezoo import deprecated

        return deprecated.spec(fullname)


sys.meta_path.append(_OldPaths)


def __getattr__(name: str) -> Any:
    """Import a public name or a module at its first use (PEP 562), so that `import aezoo` needs no torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if not name.startswith("_"):
        try:
            return import_module(f"aezoo.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"aezoo.{name}":
                raise
    raise AttributeError(f"module 'aezoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"Any", "TYPE_CHECKING", "import_module", "sys", "_HOMES", "_OldPaths"})
