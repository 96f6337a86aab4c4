"""Well-formed files with hostile content: content that expands, fields of wrong types, and special files.

Damage to bytes, as in `edits`, seldom results in a well-formed file with other content. The cases drawn here are short
descriptions from which the files are written, so that a failure shrinks to the few choices that matter.
"""

import contextlib
import copy
import io
import os
import socket
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st

import aezoo
from aezoo.cli.main import main
from aezoo.data import DataModule
from aezoo.errors import AezooError

SET = "--data.name=digits"
FIT = [
    "fit", "--model=vae", "--model.latent_dim=2", "--model.hidden_dims=[4]", "--model.lr_schedule=cosine", SET,
    "--data.batch_size=500", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--projector.n=0",
    "--trainer.limit_test_batches=1", "--trainer.accelerator=cpu",
    *(f"--{name}.every_n_epochs=0" for name in (
        "reconstructions", "samples", "traversal", "latents", "filters", "codebook", "code_statistics")),
]  # fmt: skip
LIMIT = 10**7


def command(*argv):
    """Run a command and raise its one-line refusal as an error."""
    errors, code = io.StringIO(), 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            main([*argv])
        except SystemExit as end:
            code = end.code or 0
    said = errors.getvalue()
    assert code in (0, 2) and "Traceback" not in said, f"exit code {code}: {said[-3000:]}"
    if code:
        *_, line = said.splitlines()
        assert line.startswith("aezoo: "), line
        raise AezooError(line)


# ---- content that expands -------------------------------------------------------------------------------------------

_LEAVES = [0, 1.5, None, True, "x" * 1000, torch.zeros(3)]
# a value and the containers around it, from the inside out
shared = st.tuples(
    st.sampled_from(_LEAVES),
    st.lists(st.tuples(st.sampled_from(["list", "tuple", "dict"]), st.integers(1, 12)), max_size=80),
)


def expand(drawn):
    """Nested containers that each refer to the inner one several times, which a pickle stores once."""
    found, levels = drawn
    for kind, times in levels:
        if kind == "dict":
            found = {f"x{i}": found for i in range(times)}
        else:
            found = [found] * times if kind == "list" else (found,) * times
    return found


# ---- fields ---------------------------------------------------------------------------------------------------------

_VALUES = [
    None, True, False, 0, 1, -1, 2, 10**9, -(2**62), 2**70, 0.0, -1.5, 1e300, float("nan"), float("inf"), "", "text",
    "best.ckpt", "../../x", "/dev/zero", "a\nb\x1b[2J", b"bytes", 1j, [], [1], ["text"], [[]], [None], (), (1, 2), {},
    {"a": 1}, {1: 2}, {"state": {}, "param_groups": []}, {"class_path": "evil.Evil"},
    torch.zeros(()), torch.zeros(0), torch.ones(3), torch.full((2, 2), float("nan")), torch.zeros(2, dtype=torch.int64),
    torch.zeros(2, dtype=torch.bool), torch.zeros(1).expand(10**9), torch.device("cpu"), torch.float32, torch.Size([2]),
]  # fmt: skip


def paths(tree, at=()):
    """The paths of all values that can be replaced."""
    if at:
        yield at
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from paths(value, (*at, key))


def changed(content, edits):
    """A copy with the edits applied: values replaced, added, doubled or removed."""
    content = copy.deepcopy(content)
    for path, what, value in edits:
        place = content
        with contextlib.suppress(KeyError, IndexError, TypeError):  # an earlier edit has removed this path
            for key in path[:-1]:
                place = place[key]
            if what == "drop":
                del place[path[-1]]
            elif what == "add" and isinstance(place, dict):
                place[value if isinstance(value, str | int) else "added"] = place[path[-1]]
            elif what == "double" and isinstance(place, list):
                place.append(place[path[-1]])
            else:
                place[path[-1]] = value
    return content


def _edits(content, values):
    # draw the top-level key first: most paths are in the optimizer state
    places = {}
    for path in paths(content):
        places.setdefault(path[0], []).append(path)
    place = st.sampled_from([*places]).flatmap(lambda key: st.sampled_from(places[key]))
    what = st.sampled_from(["set", "set", "set", "set", "drop", "add", "double"])
    return st.lists(st.tuples(place, what, values), min_size=1, max_size=2)


def _read_checkpoint(path, way):
    if way == "load":
        aezoo.load_model(path)
    elif way == "test":
        command("test", "--ckpt_path", str(path), "--trainer.limit_test_batches=1")
    else:
        command(*FIT, "--ckpt_path", str(path), "--trainer.max_epochs=2", "--trainer.default_root_dir=others")


WAYS = ("load", "test", "fit", "fit")


# ---- parquet --------------------------------------------------------------------------------------------------------

COLUMNS = ("constant", "runs", "numbers", "integers", "text", "lists", "nested", "structs", "bytes", "nothing", "times")
NAMES = ("a", "b", "label", "", "__index_level_0__")
tables = st.fixed_dictionaries({
    "columns": st.lists(st.tuples(st.sampled_from(COLUMNS), st.sampled_from(NAMES)),
                        min_size=1, max_size=4, unique_by=lambda column: column[1]),
    "rows": st.sampled_from([0, 1, 12, 1000, 30_000]),
    "groups": st.sampled_from([1, 1, 2, 60]),
    "width": st.sampled_from([0, 1, 100, 10**5]),
    "compression": st.sampled_from(["none", "snappy", "zstd", "gzip"]),
    "dictionary": st.booleans(),
    "label_column": st.sampled_from(["auto", "none", "a", "b", "nosuch"]),
})  # fmt: skip


def write_table(path, table):
    """Write one row group at a time, to limit memory."""
    import pyarrow
    from pyarrow import parquet

    arrays = [_column(kind, table["rows"], table["width"]) for kind, _ in table["columns"]]
    part = pyarrow.table(arrays, names=[name for _, name in table["columns"]])
    # without a dictionary the longest texts fill 3 GB, more than a string array holds
    dictionary = table["dictionary"] or table["rows"] * table["width"] > 2**27
    options = {"compression": table["compression"], "use_dictionary": dictionary}
    with parquet.ParquetWriter(path, part.schema, **options) as writer:
        for _ in range(table["groups"]):
            writer.write_table(part)
    pyarrow.default_memory_pool().release_unused()


def _column(kind, rows, width):
    import pyarrow

    # rows that fit into a few MiB
    few = max(1, min(rows, 2**21 // max(width, 1)))
    offsets = np.minimum(np.arange(rows + 1) * width, few * width).astype(np.int32)
    if kind == "constant":
        return pyarrow.array(np.zeros(rows))
    if kind == "runs":
        return pyarrow.array(np.arange(rows) // 1000)
    if kind == "numbers":
        return pyarrow.array(np.random.default_rng(0).normal(size=rows))
    if kind == "integers":
        return pyarrow.array(np.arange(rows, dtype=np.uint64) + np.uint64(2**63))
    if kind in ("text", "bytes"):
        one = "x" * width if kind == "text" else b"x" * width
        return pyarrow.DictionaryArray.from_arrays(np.zeros(rows, np.int32), [one])
    if kind in ("lists", "nested"):
        lists = pyarrow.ListArray.from_arrays(offsets, np.zeros(few * width, np.float32))
        return lists if kind == "lists" else pyarrow.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32), lists)
    if kind == "structs":
        return pyarrow.StructArray.from_arrays([np.zeros(rows), np.zeros(rows)], ["x", "y"])
    if kind == "times":
        return pyarrow.array(np.arange(rows).astype("datetime64[s]"))
    return pyarrow.nulls(rows)


# ---- special files --------------------------------------------------------------------------------------------------

SPECIAL = (
    "pipe",
    "zero",
    "null",
    "random",
    "full",
    "terminal",
    "socket",
    "folder",
    "link to nothing",
    "link to itself",
    "empty",
)


def make_special(path, what):
    """Create something other than a regular file."""
    if what == "pipe":
        os.mkfifo(path)
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
            server.bind(path.name)  # a socket address is limited to about 100 bytes
    elif what == "folder":
        path.mkdir()
    elif what == "empty":
        path.touch()
    else:
        device = {"terminal": "ptmx", "link to nothing": "nothing"}.get(what, what)
        path.symlink_to(path.name if what == "link to itself" else f"/dev/{device}")


def remove(path):
    """Remove a file, link or folder."""
    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


# ---- all of it ------------------------------------------------------------------------------------------------------


def all_contents(folder, attempt, kinds):
    """Return (strategy, check, share of the cases) by name; those that train get a smaller share.

    Args:
        folder: an empty one, for the files.
        attempt: calls a reader and returns its result.
        kinds: how files of each kind are read.
    """
    (folder / "special").mkdir(parents=True)
    with contextlib.chdir(folder):
        command(*FIT, "--trainer.max_epochs=1")
        valid = torch.load(next(Path("runs").glob("*/*/checkpoints/last.ckpt")), weights_only=True)

    def checkpoint(case):
        edits, way = case
        path = folder / "x.ckpt"
        torch.save(changed(valid, edits), path)
        return attempt(lambda: _read_checkpoint(path, way))

    def shared_in_checkpoint(case):
        # expanded here, since a failure prints the drawn case
        edits, way = case
        return checkpoint(([(place, what, expand(value)) for place, what, value in edits], way))

    def tensors(value):
        path = folder / "x.pt"
        torch.save({"x": torch.rand(8, 3), "y": expand(value)}, path)
        return attempt(lambda: kinds["pt"].read(path))

    def table(drawn):
        path = folder / "x.parquet"
        write_table(path, drawn)

        def read():
            module = DataModule(str(path), max_bytes=LIMIT, label_column=drawn["label_column"])
            module.setup()
            return module.tensors("train")

        return attempt(read)

    def special(case):
        key, what = case
        path = folder / "special" / kinds[key].name
        make_special(path, what)
        try:
            return attempt(lambda: kinds[key].read(path))
        finally:
            remove(path)

    values = st.sampled_from(_VALUES)
    found = {
        "ckpt, shared values": (st.tuples(_edits(valid, shared), st.sampled_from(WAYS)), shared_in_checkpoint, 0.2),
        "ckpt, wrong types": (st.tuples(_edits(valid, values), st.sampled_from(WAYS)), checkpoint, 0.2),
        "pt, shared values": (shared, tensors, 1.0),
        "special files": (st.tuples(st.sampled_from([*kinds]), st.sampled_from(SPECIAL)), special, 1.0),
    }
    if "parquet" in kinds:
        found["parquet, expanding"] = (tables, table, 1.0)
    return found
