"""The file format `.aez`, version 1; all numbers are little-endian.

    8 bytes     89 41 45 5A 0D 0A 1A 0A: not a text file, and changed by transfers that convert line endings
    2, 4        version of the format; H, the size of the header
    H           header: plain JSON, the fields of `Header`
    frames      each 8 bytes L, the size of its payload; 4 bytes n, the samples in it; 32 bytes SHA-256 of the samples
                that it decodes to; the payload. Lossy files and those of indices begin with a frame of 0 samples, their
                tables. If pictures have sizes of their own, a frame is one picture, and its payload follows its
                sides, 4 bytes each, which L counts.
    32          SHA-256 of everything before

A reader first compares the checksum, block by block, then reads the header within bounds, then the sizes of the
frames, which must add up. Only then does it allocate memory, for one frame at a time and in total at most what the
caller allows. The checksum detects accidents; a forger can compute it, so the reader does not trust the header.
"""

import hashlib
import json
import math
import os
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import IO, Any, get_args, get_origin

from aezoo.errors import AezooError

MAGIC = b"\x89AEZ\r\n\x1a\n"
VERSION = 1
_HEAD = struct.Struct("<HI")
_FRAME = struct.Struct("<QI32s")
FRAME = _FRAME.size  # bytes of a frame without its payload
_DIGEST = 32
_CHUNK = 2**20
MAX_HEADER = 2**16
MAX_BLOCK = 2**20
MAX_THREADS = 1024
# values of samples in a frame, which can be decoded without other frames; a single sample may have more
MAX_FRAME_VALUES = 2**24
# values of a picture if sizes differ: 89 million pixels of three channels, the limit for a folder
MAX_PICTURE = 2**28
QUALITIES = (-8.0, 20.0)
KINDS = ("npy", "png", "csv")
_HEX = frozenset("0123456789abcdef")
# fields that files leave out if they have this value
_OPTIONAL = {"kind": "npy", "own_sizes": 0, "tile": 0}


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        mode: lossless; lossy; indices (of a model's code, with tables); prior (indices, with the model's prior); or
            learned (integers, with distributions of the model). Readers refuse unknown modes by name.
        model: registry name of the model.
        fingerprint: SHA-256 of the model, see `reproducibility.fingerprint`.
        n: number of samples.
        shape: shape of one sample.
        code_shape: shape of one code.
        block: samples that the network saw at a time.
        threads: threads that it ran on.
        device: cpu, cuda, ...
        dtype: dtype of the model's weights.
        torch: version of torch.
        levels: number of values that a data value can have, 2 or 256; 0 if the file is not lossless.
        precision: lossless: a latent variable has 2^precision bins.
        seed: lossless: determines the initial bits.
        quality: lossy: the quality that the steps were fitted for; learned: the quality of the file, for a model with
            several rates.
        kind: what the samples were: png, picture files; csv, the rows of a table; npy, anything else (not written to
            files).
        own_sizes: 1 if each frame is one picture with its size; shape and code_shape are then those of the model.
        tile: side of the tiles in which the networks processed samples with larger sides; 0 for none.
    """

    mode: str
    model: str
    fingerprint: str
    n: int
    shape: tuple[int, ...]
    code_shape: tuple[int, ...]
    block: int
    threads: int
    device: str
    dtype: str
    torch: str
    levels: int = 0
    precision: int = 0
    seed: int = 0
    quality: float = 0.0
    kind: str = "npy"
    own_sizes: int = 0
    tile: int = 0

    @property
    def dims(self) -> int:
        """Number of values in one sample."""
        return math.prod(self.shape)

    @property
    def tables(self) -> bool:
        """Whether the first frame contains tables."""
        return self.mode in ("lossy", "indices")

    @property
    def writer(self) -> str:
        """Where the file was written, in words."""
        return f"torch {self.torch}, {self.device}, {self.threads} threads"

    def check(self) -> None:
        """Refuse values that `compress` does not write.

        Raises:
            ValueError: names the invalid field.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if not _is_instance(value, field.type):
                raise ValueError(f"{field.name} is {str(value)[:40]!r}")
        bounds = {"n": (1, 2**40), "block": (1, MAX_BLOCK), "threads": (1, MAX_THREADS), "quality": QUALITIES,
                  "own_sizes": (0, 1), "tile": (0, 2**31)}  # fmt: skip
        if self.mode == "lossless":
            bounds |= {"precision": (1, 16)}
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {str(getattr(self, name))[:40]}")
        for name in ("shape", "code_shape"):
            shape = getattr(self, name)
            if not 1 <= len(shape) <= 4 or not all(1 <= size <= 2**31 for size in shape):
                raise ValueError(f"{name} is {str(shape)[:40]}")
        if self.block > max_samples_per_frame(self.shape):
            raise ValueError(f"block is {self.block}")
        known = {"lossless": (2, 256), "lossy": (0,), "indices": (0,), "prior": (0,), "learned": (0,)}
        if self.levels not in known.get(self.mode, ()):
            raise ValueError(f"mode is {self.mode[:40]!r} with {self.levels} levels")
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind[:40]!r}")
        if len(self.fingerprint) != 64 or not set(self.fingerprint) <= _HEX:
            raise ValueError("the fingerprint is not valid")
        if any(len(text) > 200 or not text.isprintable() for text in (self.model, self.device, self.dtype, self.torch)):
            raise ValueError("a name is not valid")


def max_samples_per_frame(shape: tuple[int, ...]) -> int:
    """The number of samples of a shape that a frame may contain."""
    return max(1, MAX_FRAME_VALUES // math.prod(shape))


def _is_instance(value: Any, kind: Any) -> bool:
    """Whether a value from JSON has a field's type; True and False do not count as numbers."""
    if isinstance(value, bool):
        return False
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_instance(part, get_args(kind)[0]) for part in value)
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(kind, type | UnionType) and isinstance(value, kind)


class Writer:
    """Writes a file frame by frame; `close` ends it with its checksum.

    Args:
        file: a file open for writing.
        header: the metadata of the file.
    """

    def __init__(self, file: IO[bytes], header: Header) -> None:
        header.check()
        self._file, self._digest, self.size = file, hashlib.sha256(), 0
        content = {key: value for key, value in asdict(header).items() if (key, value) not in _OPTIONAL.items()}
        text = json.dumps(content, separators=(",", ":")).encode()
        self._put(MAGIC + _HEAD.pack(VERSION, len(text)) + text)

    def frame(self, content: bytes) -> None:
        """Write a frame, see `frame`."""
        self._put(content)

    def close(self) -> None:
        """Write the checksum."""
        self._put(self._digest.digest())

    def _put(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self.size += len(content)


def frame(n: int, digest: bytes, payload: bytes, sides: tuple[int, ...] = ()) -> bytes:
    """A frame of n samples, or of one picture with its size."""
    payload = struct.pack(f"<{len(sides)}I", *sides) + payload
    return _FRAME.pack(len(payload), n, digest) + payload


@dataclass(frozen=True)
class Frame:
    """Position of a frame's payload, number of samples in it, digest of the samples it decodes to, and their shape."""

    start: int
    size: int
    n: int
    digest: bytes
    shape: tuple[int, ...]


class Reader:
    """A file that has passed all checks.

    Args:
        path: the file.
        max_bytes: the most that the decoded samples may take in memory or on disk.

    Attributes:
        header: the metadata of the file.
        frames: its frames.

    Raises:
        AezooError: not an .aez file, truncated, altered, of another version, or with wrong sizes.
    """

    def __init__(self, path: str | Path, max_bytes: int) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_file():
            raise AezooError(f"{path} is not a file: give a file that compress wrote")
        try:
            with self.path.open("rb") as file:
                self._end = _check_complete(file, self.path)
                self.header, start = _header(file, self._end, self.path)
                self.frames = _frames(file, start, self._end, self.path, self.header)
        except OSError as error:
            raise AezooError(
                f"cannot read {path}: {error.strerror or error}; give a file that compress wrote"
            ) from error
        except (ValueError, RecursionError) as error:
            if isinstance(error, AezooError):
                raise
            raise AezooError(
                f"{path} is refused, its header is not one of compress: {' '.join(str(error).split())[:100]}"
            ) from error
        if self.header.tables and (not self.frames or self.frames[0].n):
            raise AezooError(f"{path} is refused: it has no tables")
        frames = self.samples
        counts = [frame.n for frame in frames]
        most = 1 if self.header.own_sizes else max_samples_per_frame(self.header.shape)
        if not all(1 <= n <= most for n in counts):
            raise AezooError(f"{path} is refused: one of its parts is empty or larger than compress writes them")
        if sum(counts) != self.header.n:
            raise AezooError(f"{path} is refused: it declares {self.header.n} samples, its parts {sum(counts)}")
        if self.header.own_sizes and any(math.prod(frame.shape) > MAX_PICTURE for frame in frames):
            raise AezooError(f"{path} is refused: a picture would have more than {MAX_PICTURE:,} values")
        needed = 4 * sum(frame.n * math.prod(frame.shape) for frame in frames)
        if needed > max_bytes:
            raise AezooError(
                f"{path} would decode to {needed:,} bytes, more than the limit of {max_bytes:,}: "
                "if you trust it, raise max_bytes"
            )

    @property
    def samples(self) -> list[Frame]:
        """The frames without that of the tables."""
        return self.frames[1:] if self.header.tables else self.frames

    def payload(self, frame: Frame) -> bytes:
        """The content of a frame."""
        with self.path.open("rb") as file:
            file.seek(frame.start)
            return file.read(frame.size)


def _check_complete(file: IO[bytes], path: Path) -> int:
    """The position of the checksum, if it is correct."""
    if file.read(len(MAGIC)) != MAGIC:
        raise AezooError(f"{path} is not an .aez file: give one that compress wrote")
    left = file.seek(0, os.SEEK_END) - _DIGEST
    end = left
    file.seek(0)
    digest = hashlib.sha256()
    while left > 0 and (chunk := file.read(min(left, _CHUNK))):
        digest.update(chunk)
        left -= len(chunk)
    if left or digest.digest() != file.read():
        raise AezooError(f"{path} is cut off or altered: its checksum does not match its content; copy it again")
    return end


def _header(file: IO[bytes], end: int, path: Path) -> tuple[Header, int]:
    """The header, and the position where it ends."""
    file.seek(len(MAGIC))
    head = file.read(_HEAD.size)
    start = len(MAGIC) + _HEAD.size
    version, size = _HEAD.unpack(head) if start <= end else (VERSION, end)
    if version != VERSION:
        raise AezooError(f"{path} has version {version} of the format, this aezoo reads {VERSION}: install a newer one")
    if size > min(MAX_HEADER, end - start):
        raise ValueError(f"it would have {size} bytes")
    content = json.loads(file.read(size).decode())
    names = {field.name for field in fields(Header)}
    if not isinstance(content, dict) or content.keys() | _OPTIONAL != names:
        raise ValueError("fields are missing or too many")
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    header = Header(**plain)
    header.check()
    return header, start + size


def _frames(file: IO[bytes], start: int, end: int, path: Path, header: Header) -> list[Frame]:
    found: list[Frame] = []
    sides = struct.Struct(f"<{len(header.shape) - 1}I")
    while start < end:
        if end - start < _FRAME.size:
            raise AezooError(f"{path} is refused: the sizes of its parts do not add up")
        file.seek(start)
        size, n, digest = _FRAME.unpack(file.read(_FRAME.size))
        start += _FRAME.size
        if size > end - start:
            raise AezooError(f"{path} is refused: the sizes of its parts do not add up")
        shape, own = header.shape, sides.size if header.own_sizes and n else 0
        if own > size:
            raise AezooError(f"{path} is refused: the sizes of its parts do not add up")
        if own:
            shape = (shape[0], *sides.unpack(file.read(own)))
            if min(shape) < 1:
                raise AezooError(f"{path} is refused: a picture has no size")
        found.append(Frame(start + own, size - own, n, digest, shape))
        start += size
    return found
