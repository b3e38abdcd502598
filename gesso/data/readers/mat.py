"""MATLAB files, as some data sets keep their labels: variables by name, and one line for what is wrong with them."""

import struct
import zlib
from pathlib import Path
from typing import Any

from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from gesso.errors import DataError

_BROKEN = (
    MatReadError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    OSError,
    MemoryError,
    struct.error,
    zlib.error,
)
"""What the library raises at bytes that it does not understand."""


def read_mat(path: Path, *names: str) -> list[Any]:
    """The variables ``names`` of a MATLAB file, with axes of length 1 taken out and structures as objects.

    Raises:
        DataError: the file is missing or no MATLAB file of version 4 to 7.2, or a variable is not in it.
    """
    if not path.is_file():
        raise DataError("the file is missing", where=path, remedy="Download the data set again.")
    try:
        found = loadmat(path, squeeze_me=True, struct_as_record=False, variable_names=names)
    except NotImplementedError:
        remedy = "Save it again with MATLAB's option -v7."
        raise DataError("is a MATLAB file of version 7.3, which is not read", where=path, remedy=remedy) from None
    except _BROKEN as error:
        raise DataError(f"is no MATLAB file that can be read: {error}", where=path) from None
    for name in names:
        if name not in found:
            raise DataError(f"the variable '{name}' is missing", where=path, remedy="Is this the right file?")
    return [found[name] for name in names]
