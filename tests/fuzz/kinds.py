"""The kinds of files: a valid one, the bytes to damage in it, and how a user would read the result."""

import gzip
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import aezoo
from aezoo.data import DataModule
from aezoo.data.idx import read_idx
from aezoo.data.images import read_header, read_image
from aezoo.training.data_units import DataUnits

X = np.random.default_rng(0).integers(0, 256, (12, 6, 6), dtype=np.uint8)


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        name: name of the file, which determines how it is read.
        payload: the bytes to damage.
        pack: builds the file from the damaged bytes, with valid checksums, which would otherwise reject all damage.
        read: reads the file as a user would.
    """

    name: str
    payload: bytes
    read: Callable[[Path], object]
    pack: Callable[[bytes], bytes] = bytes


def all_kinds(folder):
    """Every kind by its name in the table; valid folders of saved models are written under `folder`."""
    npy = _bytes(lambda f: np.save(f, X))
    npz = _bytes(lambda f: np.savez_compressed(f, x=X, y=np.arange(12) % 2))
    idx = b"\0\0\x08\x03" + np.array(X.shape, ">u4").tobytes() + X.tobytes()
    model = aezoo.create_model("vae", input_shape=(5,), latent_dim=2, hidden_dims=(3,))
    checkpoint = {
        "state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), "aezoo": {"model": "vae"},
        "callbacks": {"Checkpoints": {"best_model_path": "best.ckpt"}},
    }  # fmt: skip
    packed = _bytes(lambda f: torch.save(checkpoint, f))
    scaling = {"offset": torch.arange(5.0), "factor": torch.arange(1.0, 6.0)}
    model.data_units = DataUnits(scaling, None, tuple("abcde"), is_table=True)
    saved = aezoo.save_model(model, Path(folder) / "saved")
    config, weights = (saved / "config.json").read_bytes(), (saved / "model.safetensors").read_bytes()
    tensors = _bytes(lambda f: torch.save({"x": torch.from_numpy(X), "y": torch.arange(12) % 2}, f))
    csv = "a,b,label\n" + "".join(f"{i / 7:.3f},{i},{'xy'[i % 2]}\n" for i in range(12))
    kinds = {
        "npy": Kind("x.npy", npy, _data),
        "npz": Kind("x.npz", npz, _data),
        "npz, array inside": Kind("x.npz", npy, _data, lambda b: _zip({"x.npy": b})),
        "idx": Kind("idx", idx, read_idx),
        "idx.gz": Kind("idx.gz", gzip.compress(idx), read_idx),
        "idx.gz, array inside": Kind("idx.gz", idx, read_idx, gzip.compress),
        "csv": Kind("x.csv", csv.encode(), _data),
        "pt": Kind("x.pt", tensors, _data),
        "pt, pickle inside": Kind("x.pt", *_inside(tensors, "data.pkl", _data)),
        "pt, legacy": Kind("x.pt", _legacy({"x": torch.from_numpy(X)}), _data),
        "ckpt": Kind("x.ckpt", packed, aezoo.load_model),
        "ckpt, pickle inside": Kind("x.ckpt", *_inside(packed, "data.pkl", aezoo.load_model)),
        "ckpt, legacy": Kind("x.ckpt", _legacy(checkpoint), aezoo.load_model),
        "config.json": Kind("config.json", config, _with_model("model.safetensors", weights)),
        "safetensors": Kind("model.safetensors", weights, _with_model("config.json", config)),
        "png, checksums repaired": Kind("x.png", _picture("PNG"), _image, _repair_png),
    }  # fmt: skip
    text, around = _header(weights)
    kinds["safetensors, header"] = Kind("model.safetensors", text, _with_model("config.json", config), around)
    for suffix, name in (("png", "PNG"), ("jpg", "JPEG"), ("gif", "GIF"), ("bmp", "BMP"), ("tif", "TIFF"),
                         ("webp", "WEBP"), ("ppm", "PPM")):  # fmt: skip
        kinds[suffix] = Kind(f"x.{suffix}", _picture(name), _image)
    return {**kinds, **_parquet()}


def _bytes(write):
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def _data(path):
    module = DataModule(str(path), val_fraction=0.1, test_fraction=0.1)
    module.setup()
    return module.tensors("train")


def _image(path):
    read_header(path, 10**6)
    return read_image(path, None, 1, 10**6), read_image(path, 5, 3, 10**6)


def _with_model(other, content):
    """Read the folder of a saved model whose other file is intact."""

    def load(path):
        (path.parent / other).write_bytes(content)
        try:
            return aezoo.load_model(path.parent)
        finally:
            (path.parent / other).unlink()

    return load


def _zip(members, compression=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def _inside(packed, ending, reader):
    """One member of a zip file, its reader, and a function that puts it back into the file, with correct checksums."""
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    inner = next(name for name in members if name.endswith(ending))
    return members[inner], reader, lambda content: _zip({**members, inner: content})


def _legacy(content):
    return _bytes(lambda f: torch.save(content, f, _use_new_zipfile_serialization=False))


def _header(weights):
    """The JSON header of a safetensors file, and a function that puts it back with the correct length."""
    (size,) = struct.unpack("<Q", weights[:8])
    json.loads(weights[8 : 8 + size])
    return weights[8 : 8 + size], lambda text: struct.pack("<Q", len(text)) + text + weights[8 + size :]


def _picture(name):
    image = Image.fromarray(np.tile(X[0], (3, 3)))
    image = image if name in ("GIF", "PPM") else image.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"exif": exif} if name in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    return _bytes(lambda f: image.save(f, name, **more))


def _repair_png(data):
    """Correct the checksum of every chunk, so that damage reaches the decoder."""
    out, at = bytearray(data), 8
    while at + 8 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = zlib.crc32(out[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(out)


def _parquet():
    try:
        import pandas
        import pyarrow  # noqa: F401
    except ImportError:
        return {}
    frame = pandas.DataFrame({"a": np.arange(12.0), "b": np.arange(12) % 5, "label": ["x", "y"] * 6})
    return {"parquet": Kind("x.parquet", _bytes(frame.to_parquet), _data)}
