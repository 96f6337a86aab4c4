"""ONNX Runtime Web, which runs exported graphs in a browser: two files of npm's package onnxruntime-web.

They are 14 MB, so aezoo does not contain them. npm fetches the package once, into the user's cache.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from aezoo.errors import AezooError

# the module, and what it runs on one thread
FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
# 1.30 is what the page was tested with; a minor version may rename the files
RELEASES = ">=1.30.0 <1.31"
_MOST_BYTES = 2**26
_TIMEOUT = 600
_CURE = (
    "run `npm pack onnxruntime-web@1.30` where the network and Node.js are, and give the file that it writes: "
    "--runtime FILE.tgz"
)


def cache_folder() -> Path:
    """Where the files stay: `aezoo/onnxruntime-web` in the folder for caches."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "aezoo" / "onnxruntime-web"


def locate(given: str | Path | None = None) -> dict[str, bytes]:
    """The files by their names.

    Args:
        given: the package as npm packs it (.tgz), or a folder that contains the files; None takes those in the cache,
            into which npm downloads them if they are missing.

    Raises:
        AezooError: the files are not in `given`, or npm is not installed or cannot download them.
    """
    if given is not None:
        return _read(Path(given))
    cache = cache_folder()
    if not all((cache / name).is_file() for name in FILES):
        _fetch(cache)
    return _read(cache)


def _read(path: Path) -> dict[str, bytes]:
    try:
        if path.is_dir():
            folder = path / "dist" if (path / "dist").is_dir() else path
            return {name: (folder / name).read_bytes() for name in FILES}
        with tarfile.open(path) as archive:
            return {name: _member(archive, name) for name in FILES}
    except (OSError, KeyError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise AezooError(
            f"{path} does not contain {' and '.join(FILES)} of onnxruntime-web ({reason}): {_CURE}"
        ) from None


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.getmember(f"package/dist/{name}")
    file = archive.extractfile(member) if member.isreg() and member.size <= _MOST_BYTES else None
    if file is None:
        raise KeyError(f"{name} is no file of at most {_MOST_BYTES:,} bytes")
    return file.read()


def _fetch(cache: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise AezooError(f"the page needs onnxruntime-web, and npm is not installed: {_CURE}")
    print(f"aezoo: npm fetches onnxruntime-web (33 MB), once, for {cache}", file=sys.stderr)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=cache) as folder:
            command = [npm, "pack", "--silent", f"onnxruntime-web@{RELEASES}"]
            done = subprocess.run(
                command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT
            )
            packed = [*Path(folder).glob("*.tgz")]
            if done.returncode or not packed:
                reason = " ".join((done.stderr or done.stdout).split())[:150]
                raise AezooError(f"npm cannot fetch onnxruntime-web ({reason or 'it does not say why'}): {_CURE}")
            for name, content in _read(packed[0]).items():
                part = Path(folder) / name
                part.write_bytes(content)
                part.replace(cache / name)
    except subprocess.TimeoutExpired:
        raise AezooError(f"npm has not fetched onnxruntime-web within {_TIMEOUT} s: {_CURE}") from None
    except OSError as error:
        raise AezooError(f"cannot write {cache}: {error.strerror}; make room, or set XDG_CACHE_HOME") from None
