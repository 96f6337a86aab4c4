"""Hostile files: pickles that run code, archives that expand, and wrong headers."""

import gzip
import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch


class Bomb:
    """Makes the canary folder when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def pickled(path, content, how):
    """Write `content` in torch's zip format, in its legacy format, or as a bare pickle."""
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    return path


def with_bomb(checkpoint, canary, where):
    """A checkpoint's content with a bomb in one of its parts."""
    content = dict(checkpoint)
    bomb = Bomb(canary)
    if where == "top":
        content["extra"] = bomb
    elif where == "data":
        content["datamodule_hyper_parameters"] = {"name": bomb}
    elif where == "callbacks":
        content["callbacks"] = {"Checkpoints": {"best_model_path": bomb}}
    else:
        content[where] = {**content[where], "extra": bomb}
    return content


def inflated(path, source, size=64 * 2**20):
    """A deflated copy of a checkpoint with an additional member of `size` zeros."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        top = old.namelist()[0].split("/")[0]
        for member in old.namelist():
            new.writestr(member, old.read(member))
        new.writestr(f"{top}/data/999", bytes(size))
    return path


def npy_header(shape, descr="'<f4'"):
    """An .npy file that declares a shape and has no values."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def npz(path, **members):
    """An .npz of raw members, deflated."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npz_bomb(path, size=64 * 2**20):
    """Zeros that deflate to a thousandth of their size."""
    np.savez_compressed(path, x=np.zeros((size // 1024, 1024), np.uint8))
    return path


def idx_bomb(path, declared, size=64 * 2**20):
    """A gzipped idx file of `size` zeros whose header declares `declared` images."""
    path.write_bytes(gzip.compress(b"\0\0\x08\x03" + np.array([declared, 28, 28], ">u4").tobytes() + bytes(size)))
    return path


def tar_that_escapes(path):
    """A tar file with a regular member, one of `../`, one with an absolute path, and a link that leaves the folder."""
    with tarfile.open(path, "w:gz") as archive:
        for name in ("honest.txt", "../escaped.txt", str(Path(path).parent / "absolute.txt")):
            member = tarfile.TarInfo(name)
            member.size = 5
            archive.addfile(member, io.BytesIO(b"hello"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/"
        archive.addfile(link)
    return path
