"""Hostile .aez files: any content, even with a correct checksum, gives a one-line error or the original samples."""

import hashlib
import json
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aezoo
from aezoo.errors import AezooError
from aezoo.tasks.codec import container
from aezoo.tasks.compress import compress
from aezoo.tasks.decompress import decompress

MODES = ("lossless", "lossy")


def take_apart(content):
    """Header and frames [n, digest, payload] of a file, as in the format's description."""
    assert content[:8] == b"\x89AEZ\r\n\x1a\n" and hashlib.sha256(content[:-32]).digest() == content[-32:]
    version, size = struct.unpack("<HI", content[8:14])
    assert version == 1
    frames, at = [], 14 + size
    while at < len(content) - 32:
        length, n, digest = struct.unpack("<QI32s", content[at : at + 44])
        frames.append([n, digest, content[at + 44 : at + 44 + length]])
        at += 44 + length
    return json.loads(content[14 : 14 + size]), frames


def put_together(header, frames):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    parts = [struct.pack("<QI32s", len(payload), n, digest) + payload for n, digest, payload in frames]
    return sealed(b"\x89AEZ\r\n\x1a\n" + struct.pack("<HI", 1, len(text)) + text + b"".join(parts))


def sealed(content):
    return content + hashlib.sha256(content).digest()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A model, samples and a file of each mode."""
    torch.manual_seed(0)
    model = aezoo.create_model("vae", (9,), latent_dim=3, hidden_dims=(5,)).eval()
    x = torch.randint(0, 2, (6, 9)).float()
    files = {mode: compress(model, x, mode=mode, compare=False, batch_size=4).contents[0] for mode in MODES}
    path = tmp_path_factory.mktemp("aez") / "file.aez"
    path.write_bytes(files["lossy"])
    right = {"lossless": (x * 255).byte().numpy(), "lossy": decompress(model, str(path)).x}
    return model, files, path, right


def outcome(written, content, **options):
    """The error message, or the samples."""
    model, _, path, _ = written
    path.write_bytes(content)
    try:
        return decompress(model, str(path), **options).x
    except AezooError as error:
        line = str(error)
    assert "\n" not in line and len(line) < 500
    return line


@pytest.mark.parametrize("mode", MODES)
def test_file_layout_matches_format_description(written, mode):
    _, files, _, right = written
    header, frames = take_apart(files[mode])
    assert (header["mode"], header["n"], header["shape"], header["code_shape"]) == (mode, 6, [9], [3])
    assert put_together(json.dumps(header, separators=(",", ":")).encode(), frames) == files[mode]
    n, digest, _ = frames[-1]
    stored = right[mode] // 255 if mode == "lossless" else right[mode]
    assert n == 6 and digest == hashlib.sha256(stored.tobytes()).digest()


FORGED = {
    "n": [0, -1, 5, 7, 2**24, 2**40, 2**64, 10**400, 6.0, True, None, "6", [6]],
    "block": [0, -4, 2**20, 2**20 + 1, 10**400],
    "threads": [0, -1, 1025, 2**31, 1.5],
    "shape": [[], [0], [-9], [9, 1], [3, 3], [2**31] * 4, [10**400], [[9]], 9, "9", None, {}],
    "code_shape": [[], [0], [2], [4], [2**31], [3, 1], None],
    "precision": [0, -1, 9, 17, 24, 2**31, 10**400],
    "levels": [0, 1, 2, 3, 255, 256, -256, 10**400],
    "seed": [1, -1, 10**400],
    "quality": ["high", 10**400, -(10**400), 1e308, None],
    "mode": ["", "zip", "lossy", "lossless", 3, None],
    "dtype": ["float16", "object", "", 3],
    "device": ["cuda", "../../etc/passwd", "x\ny", "\ud800", "c" * 1000],
    "model": ["../../../tmp/x", "a\x00b", "v" * 300, 1],
    "fingerprint": ["0" * 64, "", "../" * 21 + "a", "F" * 64, 0],
    "torch": ["0.0.0", "\x1b[31m", 2],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("field", FORGED)
def test_forged_header_is_refused_or_harmless(written, mode, field):
    _, files, _, right = written
    header, frames = take_apart(files[mode])
    harmless = {"quality", "seed", "model", "torch", "block"} | ({"precision"} if mode == "lossy" else set())
    for value in FORGED[field]:
        found = outcome(written, put_together(header | {field: value}, frames))
        if not isinstance(found, str):
            assert header[field] == value or field in harmless, (field, value)
            assert np.array_equal(found, right[mode])


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"{" * 60000, b"\xff\xfe", b"1" * 5000, b'{"n": NaN}'])
def test_malformed_header_is_refused(written, text):
    _, frames = take_apart(written[1]["lossless"])
    assert "header is not one of compress" in outcome(written, put_together(text, frames))
    assert isinstance(outcome(written, put_together(text + b" " * 70000, frames)), str)


def test_missing_or_extra_header_fields_are_refused(written):
    header, frames = take_apart(written[1]["lossless"])
    for name in header:
        assert "missing or too many" in outcome(
            written, put_together({key: header[key] for key in header if key != name}, frames)
        )
    assert "missing or too many" in outcome(written, put_together(header | {"path": "/etc/passwd"}, frames))


def test_non_finite_header_number_is_refused(written):
    header, frames = take_apart(written[1]["lossy"])
    for word in (float("nan"), float("inf")):
        assert "quality is" in outcome(written, put_together(header | {"quality": word}, frames))


@pytest.mark.parametrize("mode", MODES)
def test_false_sample_count_is_refused_cheaply(written, mode):
    header, frames = take_apart(written[1][mode])
    *tables, (_, digest, payload) = frames
    most = container.max_samples_per_frame((9,))
    tracemalloc.start()
    try:
        for n, line in ((most, "is refused"), (most + 1, "larger than compress writes"), (2**32 - 1, "larger than")):
            found = outcome(written, put_together(header | {"n": n, "block": 256}, [*tables, [n, digest, payload]]))
            assert line in found or "more than the limit" in found
        found = outcome(written, put_together(header | {"n": 2**40}, frames))
        assert "its parts 6" in found
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**28
    limit = outcome(written, put_together(header, frames), max_bytes=4 * 6 * 9 - 1)
    assert "would decode to 216 bytes" in limit and "max_bytes" in limit


@pytest.mark.parametrize("mode", MODES)
def test_empty_missing_or_extra_frames_are_refused(written, mode):
    header, frames = take_apart(written[1][mode])
    *tables, part = frames
    nothing = [0, part[1], b""]
    for forged in ([], tables, [part], [*frames, part], [*frames, nothing], [nothing] * 1000 + frames):
        if forged != frames:  # a lossless file has no tables
            assert "is refused" in outcome(written, put_together(header, forged))
    cut = [part[0], part[1], part[2][:-4]]
    assert "is refused" in outcome(written, put_together(header, [*tables, cut]))


@pytest.mark.parametrize("mode", MODES)
def test_digest_mismatch_is_refused(written, mode):
    header, frames = take_apart(written[1][mode])
    frames[-1][1] = hashlib.sha256(b"other samples").digest()
    assert "are different here" in outcome(written, put_together(header, frames))


def test_inconsistent_frame_sizes_are_refused(written):
    content = written[1]["lossless"][:-32]
    at = 14 + struct.unpack("<I", content[10:14])[0]
    for size in (0, 1, 2**32, 2**63, 2**64 - 1):
        forged = content[:at] + struct.pack("<Q", size) + content[at + 8 :]
        assert "is refused" in outcome(written, sealed(forged))
    for size in (0, 13, 2**16 + 1, 2**32 - 1):
        assert isinstance(outcome(written, sealed(content[:10] + struct.pack("<I", size) + content[14:])), str)
    assert "version 2" in outcome(written, sealed(content[:8] + b"\x02" + content[9:]))


def test_multi_frame_file_roundtrips(written, monkeypatch):
    model = written[0]
    x = torch.randint(0, 2, (21, 9)).float()
    for mode in MODES:
        with monkeypatch.context() as patch:
            patch.setattr(container, "MAX_FRAME_VALUES", 9 * 8)
            content = compress(model, x, mode=mode, quality=12.0, compare=False, batch_size=4).contents[0]
        counts = [frame[0] for frame in take_apart(content)[1]]
        assert counts == ([8, 8, 5] if mode == "lossless" else [0, 8, 8, 5])
        found = outcome(written, content)
        assert found.shape == (21, 9)
        if mode == "lossless":
            assert np.array_equal(found, (x * 255).byte().numpy())
        else:
            with torch.no_grad():
                assert found == pytest.approx(model(x).numpy(), abs=2e-3)


SMALL = st.one_of(st.integers(-(2**65), 2**65), st.floats(), st.text(max_size=8), st.none(), st.booleans())
VALUE = st.one_of(SMALL, st.lists(SMALL, max_size=4), st.integers(0, 300))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_altered_file_never_decodes_to_other_samples(written, mode, data):
    content, right = written[1][mode], written[3][mode]
    kind = data.draw(st.sampled_from(["flip", "cut", "field", "number", "payload"]))
    seal = True
    header, frames = take_apart(content)
    if kind == "flip":
        i, byte, seal = data.draw(
            st.tuples(st.integers(0, len(content) - 33), st.integers(1, 255), st.booleans()), label="flip"
        )
        changed = content[:i] + bytes([content[i] ^ byte]) + content[i + 1 : -32]
    elif kind == "cut":
        changed, seal = content[: data.draw(st.integers(0, len(content) - 33))], data.draw(st.booleans())
    elif kind == "field":
        changed = put_together(header | {data.draw(st.sampled_from(sorted(header))): data.draw(VALUE)}, frames)[:-32]
    elif kind == "number":
        frame = data.draw(st.sampled_from(frames))
        frame[0] = data.draw(st.integers(0, 2**32 - 1))
        changed = put_together(header | {"n": sum(frame[0] for frame in frames)}, frames)[:-32]
    else:
        frame = data.draw(st.sampled_from(frames))
        frame[2] = data.draw(st.binary(max_size=200))
        changed = put_together(header, frames)[:-32]
    found = outcome(written, sealed(changed) if seal else changed + content[-32:])
    assert isinstance(found, str) or np.array_equal(found, right)
