"""Ready-made configurations: where they are and how they are found by name."""

import difflib
from pathlib import Path

from aezoo.errors import AezooError


def recipe_folder() -> Path:
    """The folder of the recipes: inside the installed package, or next to it in a checkout."""
    here = Path(__file__).parent.parent
    return here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"


def recipes() -> dict[str, Path]:
    """All recipes by name."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe.

    Raises:
        AezooError: no such recipe; the message suggests the nearest.
    """
    known = recipes()
    stem = name.removesuffix(".yaml")
    if stem in known:
        return known[stem]
    near = difflib.get_close_matches(stem, known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else "."
    raise AezooError(f"no file and no recipe is named {name!r}{hint} See `aezoo recipes`.")
