"""Read pictures and convert them to one size and number of channels."""

import io
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from aezoo.errors import AezooError
from aezoo.training.keyword_groups import Argument

EXTENSIONS = frozenset([".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm"])
# Pillow looks at the content, not the name, and would pass a PostScript file called x.png to an interpreter
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM")
MODES_16_BIT = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})
GREY_MODES = frozenset({"1", "L", "LA"}) | MODES_16_BIT
_ALPHA_MODES = frozenset({"RGBA", "LA", "PA", "La", "RGBa"})
# formats with several pictures of one kind; in a JPEG, those after the first are only used by cameras
_MULTI_FRAME_FORMATS = frozenset({"GIF", "TIFF", "PNG", "WEBP"})
_WITH_ALPHA = {"P": "PA", "L": "LA", "RGB": "RGBA"}
_ORIENTATION, _ROTATED = 0x0112, frozenset({5, 6, 7, 8})
# other places than the chunk eXIf in which a PNG may store its orientation
_METADATA_CHUNKS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")


class ImageArgs(TypedDict, total=False):
    """Settings of sources of images."""

    size: Annotated[int | None, Argument(
        None, "Resize the shorter side of images to this and crop the middle square.", 1, 2**14
    )]  # fmt: skip
    channels: Annotated[int | None, Argument(
        None, "1 converts images to grey, 3 to colour; by default they stay as they are."
    )]  # fmt: skip


class ImageFileArgs(TypedDict, total=False):
    """Settings of sources that decode image files."""

    on_error: Annotated[Literal["raise", "skip"], Argument(
        "raise", "A broken image ends the run (raise), or is skipped with a warning that counts them (skip)."
    )]  # fmt: skip
    max_pixels: Annotated[int, Argument(
        89_478_485, "Refuse images with more pixels than this, which may be decompression bombs.", 1
    )]  # fmt: skip


class Header(NamedTuple):
    """The properties of a picture file that are known without decoding its pixels.

    Attributes:
        shape: (height, width) after the EXIF rotation.
        mode: Pillow's mode.
        pages: pictures in the file; the first is read.
    """

    shape: tuple[int, int]
    mode: str
    pages: int = 1


def first_few(paths: list[Any]) -> str:
    """The first three of some paths, for a message."""
    return ", ".join(str(path) for path in paths[:3]) + (", ..." if len(paths) > 3 else "")


def ignored_content(headers: Mapping[Any, Header]) -> list[str]:
    """What is ignored in some files, as the text of a warning."""
    transparent = [path for path, header in headers.items() if header.mode in _ALPHA_MODES]
    paged = [path for path, header in headers.items() if header.pages > 1]
    return [
        *([f"transparency is dropped from {len(transparent)} images: {first_few(transparent)}"] if transparent else []),
        *(
            [f"{len(paged)} files contain several images, and only the first is read: {first_few(paged)}"]
            if paged
            else []
        ),
    ]


def resized_shape(shape: tuple[int, ...], size: int | None, channels: int | None) -> tuple[int, ...]:
    """The shape that `resize` gives to samples of `shape`, or the reason why it cannot."""
    if size is None and channels is None:
        return shape
    if len(shape) != 3:
        raise AezooError(f"--data.size and --data.channels are for images, and a sample has shape {shape}: drop them")
    if channels is not None and channels != shape[0] and shape[0] not in (1, 3, 4):
        raise AezooError(f"images of {shape[0]} channels cannot become {channels}: drop --data.channels")
    return (channels or shape[0], *((size, size) if size else shape[1:]))


def resize(x: Tensor, size: int | None, channels: int | None) -> Tensor:
    """Resize the shorter side to `size`, crop the centre square, and convert grey and colour: (N, C, H, W)."""
    if channels is not None and channels != x.shape[1]:
        x = x[:, :3] if x.shape[1] == 4 else x
        if x.shape[1] != channels:
            x = F.rgb_to_grayscale(x) if channels == 1 else x.expand(-1, channels, -1, -1).contiguous()
    if size is not None and tuple(x.shape[2:]) != (size, size):
        parts = (F.center_crop(F.resize(part, [size], antialias=True), [size, size]) for part in x.split(1024))
        x = torch.cat(list(parts))
    return x


def to_tensor(image: Image.Image, size: int | None, channels: int) -> Tensor:
    """A picture as (channels, H, W): uint8, or float32 in [0, 1] if it has 16 bits per value."""
    if image.mode in MODES_16_BIT:
        values = np.asarray(image).astype(np.float32) / 65535
        if values.min() < 0 or values.max() > 1:
            raise ValueError("it has 32 bits per value; save it with 16 or 8")
        return resize(torch.from_numpy(values)[None, None], size, channels)[0]
    mode = "L" if channels == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)  # convert would copy it
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    values = np.array(image)
    return torch.from_numpy(values[None] if channels == 1 else values.transpose(2, 0, 1).copy())


class EncodedImage:
    """A picture file inside a larger file.

    Args:
        title: its name in messages.
        content: its bytes.
    """

    def __init__(self, title: str, content: bytes) -> None:
        self.title, self.content = title, content

    def __str__(self) -> str:
        return self.title


def _open(path: Path | EncodedImage) -> Image.Image:
    if isinstance(path, Path) and path.exists() and not path.is_file():
        raise AezooError(f"{path} is a pipe, a device or a folder: remove it, or give a picture file")
    return Image.open(io.BytesIO(path.content) if isinstance(path, EncodedImage) else path, formats=FORMATS)


@contextmanager
def open_picture(path: Path | EncodedImage, max_pixels: int) -> Iterator[Image.Image]:
    """A picture file, decoded, after the EXIF rotation; an error names the file and says how to fix it."""
    try:
        with _open(path) as image:
            check_pixels(path, image.size, max_pixels)
            # this also decodes the file, so that an error for a truncated one is raised here
            ImageOps.exif_transpose(image, in_place=True)
            yield image
    except AezooError:
        raise
    # Pillow raises SyntaxError, ValueError, struct.error ... for broken files
    except Exception as error:
        raise _broken_image_error(path, error, max_pixels) from None


def read_image(path: Path | EncodedImage, size: int | None, channels: int, max_pixels: int) -> Tensor:
    """A picture file as a tensor; an error names the file and says how to fix it."""
    with open_picture(path, max_pixels) as image:
        return to_tensor(image, size, channels)


def read_header(path: Path | EncodedImage, max_pixels: int) -> Header:
    """The header of a picture file; an error names a broken one."""
    try:
        with _open(path) as image:
            check_pixels(path, image.size, max_pixels)
            width, height = image.size
            # if a PNG has no text before its pixels, Pillow decodes them, because there may be one after them
            skips = isinstance(image, PngImageFile) and image.fp is not None and not _metadata_follows(image.fp)
            exif = Image.Image.getexif(image) if skips else image.getexif()
            if exif.get(_ORIENTATION) in _ROTATED:
                width, height = height, width
            # a palette, colour or grey picture can also have one transparent colour
            mode = _WITH_ALPHA.get(image.mode, image.mode) if "transparency" in image.info else image.mode
            pages = getattr(image, "n_frames", 1) if image.format in _MULTI_FRAME_FORMATS else 1
    except AezooError:
        raise
    except Exception as error:
        raise _broken_image_error(path, error, max_pixels) from None
    if mode == "F":
        raise AezooError(f"{path} has floating-point pixels: save it with 8 or 16 bits, or give the values as .npy")
    return Header((height, width), mode, pages)


def _metadata_follows(file: IO[bytes]) -> bool:
    """Whether a PNG has chunks of metadata after its pixels; does not change the file position."""
    place, seen = file.tell(), False
    file.seek(8)
    try:
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            seen = seen or kind == b"IDAT"
            start = file.read(min(length, 22)) if seen and kind in (b"tEXt", b"zTXt", b"iTXt") else b""
            if (seen and kind == b"eXIf") or start.startswith(_METADATA_CHUNKS):
                return True
            file.seek(length + 4 - len(start), io.SEEK_CUR)
        return False
    finally:
        file.seek(place)


def check_pixels(path: object, size: tuple[int, int], max_pixels: int) -> None:
    """Refuse a picture whose decoded form would fill the memory."""
    if math.prod(size) > max_pixels:
        raise AezooError(
            f"{path} has {math.prod(size) / 1e6:.0f} million pixels, more than the limit of {max_pixels / 1e6:.0f}: "
            "shrink or remove it, or raise --data.max_pixels"
        )


def _broken_image_error(path: Path | EncodedImage, error: Exception, max_pixels: int) -> AezooError:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return AezooError(
            f"{path} has more pixels than the limit of {max_pixels / 1e6:.0f} million: "
            "shrink or remove it, or raise --data.max_pixels"
        )
    try:
        size, start = (len(path.content), path.content[:64]) if isinstance(path, EncodedImage) else _first_bytes(path)
    except OSError as unreadable:
        return AezooError(f"cannot read {path} ({unreadable.strerror}): check the file and its permissions")
    what, start = f"{size} bytes", start.lstrip()
    if not start:
        what += ", empty"
    elif start.startswith(b"<"):
        what += ", looks like HTML: a failed download?"
    reason = "" if isinstance(error, UnidentifiedImageError) else f": {error}".rstrip(": ")
    return AezooError(
        f"{path} is not a readable image ({what}){reason}; replace or delete it, or skip such files with "
        "--data.on_error skip"
    )


def _first_bytes(path: Path) -> tuple[int, bytes]:
    with path.open("rb") as file:
        return path.stat().st_size, file.read(64)
