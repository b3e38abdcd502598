"""Pickles of arrays, read without running or importing anything that stands in them.

A pickle is a program for a small stack machine, which may call any function of any module. The machine here knows plain
values, and does itself the few things that arrays, tensors and ordered dictionaries ask for. It has no way to call
anything else: what belongs to other classes becomes an ``Opaque`` that keeps nothing, and a name of Python's own
library that weights have no use for is refused.

Source: Python's ``pickletools``, which lists the instructions; ``torch._utils`` and numpy, for the state of arrays.
"""

import codecs
import math
import pickletools
import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import torch
from torch import Tensor

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_NUMBERS = r"b1|[iu][1248]|f[248]"  # numpy's dtypes of which tensors are made
_HARMLESS = re.compile(  # of Python's library, what checkpoints mention beside the ``_MAKERS``
    r"collections\.(Counter|defaultdict|deque)|builtins\.(complex|slice|range|object|int|float|str|bool)|"
    r"copyreg\._reconstructor|(datetime|pathlib|uuid)(\.\w+)+|decimal\.Decimal|fractions\.Fraction|"
    r"argparse\.Namespace|types\.SimpleNamespace"
)


@dataclass(frozen=True)
class Opaque:
    """Stands for a value of a class that is not read; ``name`` is the class's, the value itself is not kept."""

    name: str


class Code(Exception):
    """A name for which weights have no use: the file is a program."""


@dataclass(frozen=True)
class _Maker:
    """A class or function of others, as far as it is done here."""

    make: Callable[..., Any]


@dataclass
class _Unfinished:
    """A numpy array or dtype whose state is still to come; ``places`` of the memo hold it."""

    kind: str
    code: str = ""
    places: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Storage:
    """The memory of tensors: ``data`` is one-dimensional."""

    data: Tensor


Value: TypeAlias = Any
LoadStorage: TypeAlias = Callable[[torch.dtype, str, int], Tensor]
_MARK = object()


class Machine:
    """Reads one pickle.

    The value is made of dicts, lists, tuples, sets, texts, numbers, ``bytearray``, tensors (numpy's arrays too) and
    ``Opaque``. Arrays share the memory that they were read into.
    """

    def __init__(self, file: BinaryIO, size: int, load: LoadStorage) -> None:
        """Takes a file that stands where the pickle begins.

        Args:
            file: with ``read``, ``readinto``, ``readline`` and ``tell``.
            size: its bytes, before which every array has to end.
            load: gives the memory of torch's tensors, one-dimensional, by dtype, name and number of values.
        """
        self.file, self.size, self.load = file, size, load
        self.stack: list[Value] = []
        self.memo: dict[int, Value] = {}

    def run(self) -> Value:
        """The value; the file stands behind the pickle then.

        Raises:
            Code: the pickle names a part of Python's library for which weights have no use.
            Exception: the pickle is broken; of any kind that has to do with values.
        """
        for name, argument in self._instructions():
            if name == "STOP":
                break
            self._step(name, argument)
        if len(self.stack) != 1:
            raise ValueError("values are left over")
        return self.stack[0]

    def _instructions(self) -> Iterator[tuple[str, Value]]:
        """Names of ``pickletools`` with their arguments."""
        while True:
            code = self.file.read(1)
            if not code:
                raise EOFError("the end is missing")
            operation = _OPERATIONS.get(code.decode("latin-1"))
            if operation is None:
                raise ValueError(f"there is no instruction {code!r}")
            name, reader = operation.name, operation.arg
            if name in _SIZED:
                yield name, self._take(int.from_bytes(self.file.read(_SIZED[name]), "little"))
            else:
                yield name, None if reader is None else reader.reader(self.file)

    def _take(self, count: int) -> bytearray:
        """The next bytes of the file, in memory of their own."""
        if count > self.size - self.file.tell():
            raise EOFError("a text or an array is longer than the file")
        taken = bytearray(count)
        if self.file.readinto(taken) != count:  # type: ignore[attr-defined]
            raise EOFError("a text or an array ends too early")
        return taken

    def _step(self, name: str, argument: Value) -> None:
        stack = self.stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _TEXTS:
            stack.append(argument.decode(_TEXTS[name], "surrogatepass" if _TEXTS[name] == "utf-8" else "strict"))
        elif name in _PLAIN:
            stack.append(argument)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._remember(len(self.memo) if name == "MEMOIZE" else argument)
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("POP", "POP_MARK"):
            self._to_mark() if name == "POP_MARK" else stack.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("TUPLE", "LIST", "FROZENSET", "DICT"):
            stack.append(_collected(name, self._to_mark()))
        elif name in ("APPEND", "APPENDS", "ADDITEMS", "SETITEM", "SETITEMS"):
            self._add(name)
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name not in ("PROTO", "FRAME"):
            self._of_class(name, argument)

    def _of_class(self, name: str, argument: Value) -> None:
        """What names, calls or completes something of a class."""
        stack = self.stack
        if name == "GLOBAL":
            stack.append(_named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            member, module = stack.pop(), stack.pop()
            stack.append(_named(module, member))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(_made(function, arguments))
        elif name == "NEWOBJ_EX":
            _keywords, arguments, function = stack.pop(), stack.pop(), stack.pop()
            stack.append(_made(function, arguments))
        elif name == "INST":
            arguments = tuple(self._to_mark())
            stack.append(_made(_named(*argument.split(" ", 1)), arguments))
        elif name == "OBJ":
            function, *arguments = self._to_mark()
            stack.append(_made(function, tuple(arguments)))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], _Unfinished):
                self._finish(state)
        else:
            raise NotImplementedError(f"the instruction {name}")

    def _to_mark(self) -> list[Value]:
        at = next((k for k in reversed(range(len(self.stack))) if self.stack[k] is _MARK), None)
        if at is None:
            raise IndexError("a mark is missing")
        found = self.stack[at + 1 :]
        del self.stack[at:]
        return found

    def _remember(self, place: int) -> None:
        self.memo[place] = self.stack[-1]
        if isinstance(self.stack[-1], _Unfinished):
            self.stack[-1].places.append(place)

    def _add(self, name: str) -> None:
        """Puts values into the list, set or dict below them; an ``Opaque`` takes none."""
        values = self._to_mark() if name.endswith("S") else self.stack[-(1 if name == "APPEND" else 2) :]
        if not name.endswith("S"):
            del self.stack[-len(values) :]
        target = self.stack[-1]
        if isinstance(target, Opaque):
            return
        if name.startswith("APPEND"):
            target.extend(values)
        elif name == "ADDITEMS":
            target.update(values)
        else:
            target.update(zip(values[::2], values[1::2], strict=True))

    def _storage(self, which: Value) -> Value:
        """The memory that torch keeps beside the pickle."""
        kind, dtype, key, _device, count, *view = which
        if kind != "storage" or any(part is not None for part in view):
            raise ValueError("a tensor in an unknown form")
        if isinstance(dtype, Opaque):
            return dtype
        if not isinstance(dtype, torch.dtype) or not isinstance(count, int) or count < 0:
            raise ValueError("a tensor in an unknown form")
        return _Storage(self.load(dtype, key, count))

    def _finish(self, state: Value) -> None:
        """Completes the numpy array or dtype on top of the stack."""
        blank: _Unfinished = self.stack.pop()
        done = _dtype(blank.code, state[1]) if blank.kind == "dtype" else _array(*state[1:5])
        self.stack.append(done)
        for place in blank.places:
            self.memo[place] = done


_OPERATIONS = {operation.code: operation for operation in pickletools.opcodes}
_SIZED = {  # texts and arrays, with the bytes of their length
    "SHORT_BINSTRING": 1, "BINSTRING": 4, "SHORT_BINUNICODE": 1, "BINUNICODE": 4, "BINUNICODE8": 8,
    "SHORT_BINBYTES": 1, "BINBYTES": 4, "BINBYTES8": 8, "BYTEARRAY8": 8,
}  # fmt: skip
_TEXTS = {
    "SHORT_BINSTRING": "latin-1", "BINSTRING": "latin-1",
    "SHORT_BINUNICODE": "utf-8", "BINUNICODE": "utf-8", "BINUNICODE8": "utf-8",
}  # fmt: skip
_PLAIN = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "UNICODE",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Value]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple, "EMPTY_LIST": list,
    "EMPTY_DICT": dict, "EMPTY_SET": set, "MARK": lambda: _MARK,
}  # fmt: skip


def _collected(name: str, values: list[Value]) -> Value:
    if name == "TUPLE":
        return tuple(values)
    if name == "FROZENSET":
        return frozenset(values)
    return values if name == "LIST" else dict(zip(values[::2], values[1::2], strict=True))


def _named(module: str, name: str) -> Value:
    """What a global stands for: the ``torch.dtype`` of a storage, a ``_Maker``, or an ``Opaque``.

    Raises:
        Code: it is a part of Python's library for which weights have no use.
    """
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # of Python 2
    full = f"{module}.{name}"
    if module == "torch" and name in _STORAGES:
        return _STORAGES[name]
    if full in _MAKERS:
        return _Maker(_MAKERS[full])
    if module.split(".")[0] in sys.stdlib_module_names and not _HARMLESS.fullmatch(full):
        raise Code(full)
    return Opaque(full)


def _made(function: Value, arguments: Value) -> Value:
    if isinstance(function, Opaque):
        return function
    if not isinstance(function, _Maker) or not isinstance(arguments, tuple):
        raise ValueError("something is called that is no class")
    return function.make(*arguments)


def _collection(kind: Callable[[Any], Value]) -> Callable[..., Value]:
    """A function that turns a list, tuple, dict or bytes into ``kind``."""

    def make(values: Value = ()) -> Value:
        if not isinstance(values, list | tuple | dict | bytearray):
            raise ValueError("a collection of what is none")
        return kind(values)

    return make


def _tensor(storage: Value, offset: int, size: Value, stride: Value, *_rest: Value) -> Value:
    """A tensor over a storage; torch refuses what lies outside."""
    if isinstance(storage, Opaque):
        return storage
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without memory")
    if math.prod(size) > len(storage.data):
        raise ValueError("a tensor is larger than its memory")
    return torch.as_strided(storage.data, tuple(size), tuple(stride), offset)


def _parameter(data: Value, *_rest: Value) -> Value:
    return data


def _dtype(code: str, order: str) -> Value:
    if not isinstance(code, str) or order not in ("<", ">", "|", "=") or not re.fullmatch(_NUMBERS, code):
        return Opaque(f"numpy.dtype {code}")
    return np.dtype(code if order == "|" else order + code)


def _array(shape: Value, dtype: Value, fortran: Value, raw: Value) -> Value:
    """The array in the state of numpy's pickles, as a tensor over the same memory."""
    if not isinstance(dtype, np.dtype):
        return dtype if isinstance(dtype, Opaque) else Opaque("numpy.ndarray")
    memory = bytearray(raw, "latin-1") if isinstance(raw, str) else raw
    if not isinstance(memory, bytearray) or len(memory) != math.prod(shape) * dtype.itemsize:
        raise ValueError("an array has another size than its data")
    values = np.frombuffer(memory, dtype) if memory else np.zeros(0, dtype)
    values = values.reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(values if dtype.isnative else values.astype(dtype.newbyteorder("=")))


def _scalar(dtype: Value, raw: Value = b"") -> Value:
    found = _array((), dtype, False, raw)
    return found.item() if isinstance(found, Tensor) else found


def _from_buffer(raw: Value, dtype: Value, shape: Value, order: Value = "C") -> Value:
    return _array(shape, dtype, order == "F", raw)


def _encoded(text: str, encoding: str = "utf-8") -> bytearray:
    if codecs.lookup(encoding).name != "iso8859-1":
        raise ValueError(f"bytes as a text in {encoding}")
    return bytearray(text, "latin-1")


_MAKERS: dict[str, Callable[..., Value]] = {
    "collections.OrderedDict": _collection(dict),
    "builtins.dict": _collection(dict),
    "builtins.list": _collection(list),
    "builtins.tuple": _collection(tuple),
    "builtins.set": _collection(set),
    "builtins.frozenset": _collection(frozenset),
    "builtins.bytearray": _collection(bytearray),
    "builtins.bytes": _collection(bytearray),
    "_codecs.encode": _encoded,
    "torch.Size": _collection(tuple),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "numpy.dtype": lambda code, *_: _Unfinished("dtype", code),
}
for _core in ("numpy.core", "numpy._core"):
    _MAKERS[f"{_core}.multiarray._reconstruct"] = lambda *_: _Unfinished("array")
    _MAKERS[f"{_core}.multiarray.scalar"] = _scalar
    _MAKERS[f"{_core}.numeric._frombuffer"] = _from_buffer
