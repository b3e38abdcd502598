"""Pickles: arrays and plain values come out as Python's own reader gives them, and nothing of them is ever run."""

import collections
import contextlib
import datetime
import io
import os
import pickle
import subprocess
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gesso.models.pickles import Code, Machine, Opaque

RUN: list[str] = []


def refuse(*_: Any) -> Any:
    raise AssertionError("no storage is asked for")


def read(data: bytes) -> Any:
    return Machine(io.BytesIO(data), len(data), refuse).run()


def run(mark: str = "run") -> str:
    """What a pickle must not call."""
    RUN.append(mark)
    return mark


class Call:
    """Pickled as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


class Settings(dict):
    """A class of its own, with items and attributes."""


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(), inner)
        | st.lists(st.tuples(st.text(), inner)).map(collections.OrderedDict)
        | st.sets(st.integers())
        | st.frozensets(st.text())
    ),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(PLAIN, st.integers(2, 5))
def test_plain_values_are_those_of_python(value, protocol):
    assert read(pickle.dumps(value, protocol)) == value


NUMBERS = st.one_of(
    arrays.boolean_dtypes(),
    arrays.integer_dtypes(endianness="?", sizes=(8, 16, 32, 64)),
    arrays.unsigned_integer_dtypes(endianness="?", sizes=(8,)),
    arrays.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
)


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(NUMBERS, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0)), st.integers(2, 5), st.booleans()
)
def test_arrays_are_those_of_numpy(value, protocol, fortran):
    value = np.asfortranarray(value) if fortran else value
    data = pickle.dumps({"a": value, "again": value, "scalar": value.reshape(-1)[:1].sum()}, protocol)
    found = read(data)
    assert isinstance(found["a"], torch.Tensor) and found["again"] is found["a"]
    wanted = pickle.loads(data)["a"]
    assert found["a"].shape == wanted.shape
    assert np.array_equal(found["a"].numpy(), wanted, equal_nan=value.dtype.kind == "f")
    assert found["a"].numpy().dtype == wanted.dtype.newbyteorder("=")


def test_arrays_can_be_written_and_take_no_second_memory():
    raw = np.arange(1000.0)
    machine = Machine(io.BytesIO(pickle.dumps(raw, 4)), 100_000, refuse)
    found = machine.run()
    memory = max((value for value in machine.memo.values() if isinstance(value, bytearray)), key=len)
    assert np.frombuffer(memory).ctypes.data == found.data_ptr()
    found[0] = 7.0
    assert found[0] == 7.0


def test_other_classes_are_not_kept():
    value = {
        "settings": Settings(a=[1], b=np.ones(3)),
        "moment": datetime.datetime(2024, 1, 1),
        "path": PurePosixPath("a/b"),
        "counter": collections.Counter("aab"),
        "names": ("cat", "dog"),
        "range": range(3),
        "text": np.array(["a"]),
        "objects": np.array([1, "a"], dtype=object),
        "dtype": torch.float32,
    }
    value["settings"].more = {"deep": [1, 2]}
    for protocol in range(2, 6):
        found = read(pickle.dumps(value, protocol))
        assert found["names"] == ("cat", "dog")
        assert all(isinstance(found[name], Opaque) for name in value if name != "names"), protocol
        assert found["settings"] == Opaque("tests.models.test_pickles.Settings")


def test_functions_of_others_are_never_called():
    for protocol in range(2, 6):
        data = pickle.dumps({"a": Call(run), "b": [Call(run, "x")]}, protocol)
        assert read(data) == {
            "a": Opaque("tests.models.test_pickles.run"),
            "b": [Opaque("tests.models.test_pickles.run")],
        }
        assert not RUN
        assert pickle.loads(data)["a"] == "run" and RUN  # it is a pickle that runs
        RUN.clear()


BAD: list[tuple[Any, tuple[Any, ...], str]] = [
    (os.system, ("true",), r"posix\.system"),
    (eval, ("1 + 1",), r"builtins\.eval"),
    (exec, ("pass",), r"builtins\.exec"),
    (getattr, ("a", "upper"), r"builtins\.getattr"),
    (subprocess.Popen, (["true"],), r"subprocess\.Popen"),
    (__import__, ("os",), r"builtins\.__import__"),
    (open, ("/dev/null",), r"(_?io)\.open"),
]


@pytest.mark.parametrize(("function", "arguments", "name"), BAD)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_code_is_refused(function, arguments, name, protocol):
    bad = Call(function, *arguments)
    for value in (
        bad,
        {"model": {"w": np.ones(2)}, "meta": [({"x": bad},)]},
        Call(collections.OrderedDict, [("a", bad)]),
    ):
        with pytest.raises(Code, match=f"^{name}$"):
            read(pickle.dumps(value, protocol))


def test_code_in_older_instructions_is_refused():
    for data in (b"\x80\x02cos\nsystem\n.", b"\x80\x02(S'true'\nios\nsystem\n.", b"\x80\x02(cos\nsystem\nS'true'\no."):
        with pytest.raises(Code, match=r"^os\.system$"):
            read(data)
    with pytest.raises(Code, match=r"^builtins\.eval$"):
        read(b"\x80\x02c__builtin__\neval\n.")
    assert read(b"\x80\x02ctorch.hub\nload\n(S'a'\ntR.") == Opaque("torch.hub.load")
    assert read(b"\x80\x02ctorch\nserialization.os.system\n(S'a'\ntR.") == Opaque("torch.serialization.os.system")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02\x82\x01.",  # an extension
        b"\x80\x02NNR.",  # a call of None
        b"\x80\x02}K\x01K\x02R.",  # a call of a number
        b"\x80\x02ccollections\nOrderedDict\nK\x05\x85R.",  # a dictionary of a number
        b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",  # memory for the asking
        b"\x80\x02h\x01.",  # what was never remembered
        b"\x80\x02t.",  # a tuple without a beginning
        b"\x80\x02NN.",  # two values
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x00.",  # an array longer than the file
        b"\x80\x02X\xff\xff\xff\x7fabc.",
        b"\x80\x02\xff.",
        b"\x80\x02]",
        b"\x80\x05\x97.",  # memory from outside
    ],
)
def test_broken_pickles_are_errors_of_values(data):
    with pytest.raises((ValueError, TypeError, KeyError, IndexError, EOFError, NotImplementedError)):
        read(data)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_changed_pickles_run_nothing(data):
    """Cut off or with a changed byte: a value, or an error of the kinds that the reader of files knows."""
    source = pickle.dumps({"w": np.arange(6.0).reshape(2, 3), "names": ["cat", "dog"], "n": (1, 2.5, None)}, 3)
    at = data.draw(st.integers(0, len(source) - 1))
    changed = data.draw(
        st.just(source[:at]) | st.integers(0, 255).map(lambda byte: source[:at] + bytes([byte]) + source[at + 1 :])
    )
    known = (ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, OverflowError, RuntimeError, Code)
    with contextlib.suppress(known):
        read(changed)
