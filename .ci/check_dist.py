#!/usr/bin/env python3
"""Check the contents of an sdist and a wheel; prints one line for each fault, and exits with 1 if there are any.

python .ci/check_dist.py SDIST WHEEL_FROM_SDIST WHEEL_FROM_CHECKOUT
"""

import re
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

# files that each wheel must contain besides code
NEEDED = (
    "aezoo/py.typed",
    "aezoo/data/files/mnist5k.npz",
    "aezoo/data/files/NOTICE.md",
    "aezoo/docs/training.md",
    "aezoo/recipes/vae.yaml",
    "aezoo/results.json",
    "aezoo/weights/vae.mnist/model.safetensors",
)
UNWANTED = re.compile(r"(^|/)(__pycache__|\.venv\S*|runs|build|\.git|\.pytest_cache)/|\.(pyc|part|orig|rej)$")
# folders of the wheel; other files of the repository are only in the sdist
ROOMS = re.compile(r"aezoo/|aezoo-[^/]+\.dist-info/")


def problems(sdist: Path, wheel: Path, direct: Path) -> list[str]:
    """The faults of the files, one line each.

    Args:
        sdist: the .tar.gz.
        wheel: the wheel built from it.
        direct: the wheel built from the checkout.
    """
    with tarfile.open(sdist) as archive:
        source = {str(PurePosixPath(*PurePosixPath(name).parts[1:])) for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(direct) as other:
        files = set(one.namelist())
        lines = [f"only one of the two wheels holds {name}" for name in sorted(files ^ set(other.namelist()))]
    lines += [f"{wheel.name} lacks {name}" for name in NEEDED if name not in files]
    lines += [f"{wheel.name} holds {name}" for name in sorted(files) if UNWANTED.search(name) or not ROOMS.match(name)]
    lines += [
        f"{wheel.name} holds tests: {name}"
        for name in sorted(files)
        if re.search(r"(^|/)(test_\w+\.py|conftest\.py)$", name)
    ]
    lines += [f"{sdist.name} holds {name}" for name in sorted(source) if UNWANTED.search(name)]
    lines += [
        f"{sdist.name} lacks {name}"
        for name in ("pyproject.toml", "tests/test_models.py", "CHANGELOG.md", "LICENSE")
        if name not in source
    ]
    return lines


def main() -> int:
    """Print the problems of the files named on the command line."""
    if len(sys.argv) != 4:
        print(__doc__)
        return 2
    lines = problems(*map(Path, sys.argv[1:]))
    print("\n".join(lines) or "sdist and wheel are complete")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
