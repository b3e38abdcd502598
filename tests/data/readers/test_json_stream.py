import json
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.data.readers.json_stream import stream_arrays
from gesso.errors import DataError

DECODE = msgspec.json.Decoder(list[dict]).decode
TRAPS = st.sampled_from(["},{", '"', "\\", "]}", '},\n{"a":1', "é", ""])
VALUE = st.recursive(
    st.none() | st.integers(-9, 9) | TRAPS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TRAPS, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(st.sampled_from(["id", "x", "},{"]), VALUE, max_size=3), max_size=8)


def gather(path, block):
    found = {}
    for piece in stream_arrays(path, {"a": DECODE, "b": DECODE}, block=block):
        rows = piece.elements if piece.elements is not None else piece.raw
        found.setdefault(piece.key, []).extend(rows)
    return found


@settings(max_examples=150, deadline=None)
@given(
    document=st.fixed_dictionaries({}, optional={"info": VALUE, "a": ROWS, "more": VALUE, "b": ROWS}),
    block=st.integers(1, 60) | st.just(1 << 20),
    indent=st.sampled_from([None, 0, 2]),
    ascii=st.booleans(),
)
def test_any_document_at_any_block_size(tmp_path_factory, document, block, indent, ascii):
    path = tmp_path_factory.mktemp("j") / "x.json"
    path.write_text(json.dumps(document, indent=indent, ensure_ascii=ascii), encoding="utf-8")
    assert gather(path, block) == {key: document[key] for key in ("a", "b") if key in document}


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_a_cut_anywhere_is_found_and_placed(tmp_path, block):
    text = json.dumps(
        {"info": {"x": [1, "s"]}, "a": [{"id": 1, "s": "},{"}, {"id": 2}], "n": -1.5e3, "b": []}, indent=1
    )
    path = tmp_path / "x.json"
    for end in range(len(text) - 1):
        path.write_text(text[:end])
        with pytest.raises(DataError, match=r"not valid JSON: .* at line \d+, byte \d+") as caught:
            gather(path, block)
        place = int(str(caught.value).split("byte ")[1].split(".")[0])
        assert place <= end


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"a": [{"id": 1},\n {"id" 2}]}', "line 2, byte 25"),
        ('{"a": [{"id": 1},]}', "line 1, byte 17"),
        ('{"a": [{"id": 1}] "b": []}', "line 1, byte 18"),
        ('{"a": []} x', "line 1, byte 10"),
        ("[1]", "line 1, byte 0"),
        ("not json", "line 1, byte 0"),
        ("", "line 1, byte 0"),
    ],
)
def test_the_fault_is_placed(tmp_path, text, place):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match=place):
        gather(path, 1 << 20)


def test_nan_and_infinity_are_read(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": [{"id": NaN}, {"id": -Infinity}]}')
    first, second = gather(path, 1 << 20)["a"]
    assert math.isnan(first["id"]) and second["id"] == -math.inf


def test_bytes_that_are_no_utf8(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'{"a": [{"id": "\xff"}]}')
    with pytest.raises(DataError, match="not UTF-8 at line 1, byte 15"):
        gather(path, 1 << 20)


def test_byte_order_mark_and_missing_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [{"id": 1}]}')
    assert gather(path, 4) == {"a": [{"id": 1}]}
    with pytest.raises(DataError, match="No such file"):
        gather(tmp_path / "none.json", 4)
