"""Damage to bytes and texts, drawn by hypothesis so that a failure shrinks to the few edits that matter."""

from hypothesis import strategies as st

# sizes, signs and markers that often break parsers
_NUMBERS = [0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1]
_WORDS = [
    b"", b"\0", b"\n", b"'", b'"', b"(", b")", b"[" * 200, b"{" * 50, b"nan", b"inf", b"-1", b"1e999", b"null", b"~",
    b"True", b"99999999999", b"9" * 400, b"\xff\xfe", b"\xef\xbb\xbf", b"PK\x03\x04", b"\x93NUMPY", b"..", b"../",
    b"*a", b"&a ", b"!!python/name:os.system ", b"class_path", b"O", b"|O", b"<U999999999", b"<f4", b"%", b"\r",
    b"\x1b[2J",
]  # fmt: skip


@st.composite
def _edit(draw, size):
    # half of the damage goes to the first bytes, where headers are
    start = draw(st.one_of(st.integers(0, min(size, 200)), st.integers(0, size)))
    kind = draw(st.sampled_from(["set", "bits", "bits", "number", "number", "word", "cut", "drop", "repeat", "move"]))
    if kind == "set":
        return kind, start, draw(st.binary(min_size=1, max_size=4))
    if kind == "bits":
        return kind, start, bytes([1 << draw(st.integers(0, 7))])
    if kind == "number":
        order = draw(st.sampled_from(["little", "big"]))
        width = draw(st.sampled_from([1, 2, 4, 8]))
        number = draw(st.sampled_from(_NUMBERS)) % 2 ** (8 * width)
        return "set", start, number.to_bytes(width, order)
    if kind == "word":
        return kind, start, draw(st.sampled_from(_WORDS))
    length = draw(st.one_of(st.integers(1, 8), st.integers(1, 16), st.integers(1, max(1, size))))
    return kind, start, length


def apply(data, edits):
    """The data with one edit after the other."""
    out = bytearray(data)
    for kind, start, value in edits:
        if kind == "set":
            out[start : start + len(value)] = value
        elif kind == "bits" and start < len(out):
            out[start] ^= value[0]
        elif kind == "word":
            out[start:start] = value
        elif kind == "cut":
            del out[start:]
        elif kind == "drop":
            del out[start : start + value]
        elif kind == "repeat":
            out[start:start] = bytes(out[start : start + value]) * 2
        elif kind == "move":
            part = bytes(out[start : start + value])
            del out[start : start + value]
            out[:0] = part
    return bytes(out[: 4 * len(data) + 4096])


def damaged(data):
    """A strategy of damaged copies of some bytes."""
    edits = st.lists(_edit(len(data)), min_size=1, max_size=3)
    return edits.map(lambda drawn: apply(data, drawn))
