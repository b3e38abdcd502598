"""Files of weights that others published, read without running or importing anything that stands in them.

Read are torch's zip files and those of before torch 1.6 (.pth, .pt), pickles of numpy arrays (.pkl), and safetensors;
``pickles.py`` says what is taken from a pickle.

Source: torch's notes on its serialisation, and ``torch.serialization`` for the older files.
"""

import io
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gesso.errors import InputError
from gesso.models.pickles import Code, Machine, Value

_KINDS = "Give a .pth file of torch, a .pkl file of arrays, or a .safetensors file."
_MAGIC = 0x1950A86A20F9469CFC6C  # torch's first pickle in files of before torch 1.6
_CHUNK = 1 << 20
_BROKEN = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, OverflowError, RuntimeError,
    NotImplementedError, zipfile.BadZipFile, MemoryError,
)  # fmt: skip


def read_arrays(path: Path) -> Value:
    """What a file holds: tensors (numpy's arrays too), and the dicts, lists, tuples, texts and numbers around them.

    Dicts keep their order; bytes are ``bytearray``. Tensors lie on the CPU, need no gradient, and are read from the
    file into their own memory, once. All else is an ``Opaque``.

    Raises:
        InputError: the file cannot be read, is of another kind or broken, or holds code instead of weights.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
            file.seek(0)
            if head.startswith(b"PK\x03\x04"):
                return _read_zip(file)
            if re.match(rb"\x80[\x02-\x05]", head):  # protocols 2 to 5
                return _read_pickles(file, path.stat().st_size)
        if head[8:9] == b"{":
            return load_file(path)
    except OSError as error:
        raise InputError(error.strerror or "cannot be read", where=path, remedy="Check the path.") from error
    except Code as error:
        raise InputError(
            f"the file holds code ({error}), not weights", where=path, remedy="Do not load it with torch or pickle."
        ) from error
    except (*_BROKEN, SafetensorError) as error:
        what = f"the file is broken or breaks off ({_reason(error)})"
        raise InputError(what, where=path, remedy="Fetch it once more.") from error
    what = "this is no file of weights that is known here" if head else "the file is empty"
    raise InputError(what, where=path, remedy=_KINDS)


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:80]}" if text else type(error).__name__


def _read_zip(file: BinaryIO) -> Value:
    """torch's files since 1.6: data.pkl, and beside it the memory of each tensor."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("a zip file without torch's data.pkl")
        root = roots[0]
        if root + "constants.pkl" in entries:
            raise Code("a program of TorchScript's")
        order = entries.get(root + "byteorder")
        if order is not None and archive.read(order) != b"little":
            raise NotImplementedError("numbers with the high byte first")
        loaded: dict[str, Tensor] = {}

        def load(dtype: torch.dtype, key: str, count: int) -> Tensor:
            if key not in loaded:
                entry = entries[f"{root}data/{key}"]
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != count * dtype.itemsize:
                    raise ValueError(f"tensor {key} has another size than its data")
                loaded[key] = torch.empty(entry.file_size, dtype=torch.uint8)
                with archive.open(entry) as data:
                    _fill(loaded[key], data)
            return loaded[key].view(dtype)

        if entries[root + "data.pkl"].compress_type != zipfile.ZIP_STORED:
            raise NotImplementedError("a compressed data.pkl")
        program = archive.read(root + "data.pkl")
        return Machine(io.BytesIO(program), len(program), load).run()


def _read_pickles(file: BinaryIO, size: int) -> Value:
    """One pickle; or torch's files of before 1.6, where the memory of the tensors comes behind several."""
    loaded: dict[str, Tensor] = {}

    def load(dtype: torch.dtype, key: str, count: int) -> Tensor:
        if key not in loaded:
            if sum(map(len, loaded.values())) + count * dtype.itemsize > size:
                raise EOFError("the tensors are larger than the file")
            loaded[key] = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        return loaded[key].view(dtype)

    first = Machine(file, size, load).run()
    if not isinstance(first, int) or first != _MAGIC:
        return first
    _version, _system, value, keys = (Machine(file, size, load).run() for _ in range(4))
    if sorted(keys) != sorted(loaded):
        raise ValueError("the list of tensors does not fit")
    for key in keys:
        file.read(8)  # the number of values once more
        _fill(loaded[key], file)
    return value


def _fill(target: Tensor, file: Any) -> None:
    """Reads as many bytes from a file as the tensor of bytes has."""
    memory, at = target.numpy().data, 0
    while at < len(memory):
        got = file.readinto(memory[at : at + _CHUNK])
        if not got:
            raise EOFError("the data of a tensor ends too early")
        at += got
    if isinstance(file, zipfile.ZipExtFile):
        file.read(1)  # behind the end, where the checksum is looked at
