"""Numbers of an export: with as few decimals as give the same float32 again."""

from collections.abc import Callable

import numpy as np

from gesso.data.records import Array

_DECIMALS = (0, 1, 2, 3, 4, 6, 8)


def fewest_digits(values: Array, back: Callable[[Array], Array], wanted: Array) -> Array:
    """Rounds float64 ``values`` as far as ``back(rounded)``, as float32, is still ``wanted``.

    Args:
        values: float64 (...), the exact numbers.
        back: what a reader will do with the numbers, in float64.
        wanted: float32 (...), what the reader should get.

    Returns:
        float64 (...), each rounded to 0, 1, 2, 3, 4, 6 or 8 decimals, or as it was.
    """
    found = np.array(values, np.float64)
    left = np.ones(found.shape, bool)
    for decimals in _DECIMALS:
        rounded = np.round(values, decimals)
        with np.errstate(invalid="ignore"):
            good = left & (back(rounded).astype(np.float32) == wanted)
        found[good] = rounded[good]
        left &= ~good
        if not left.any():
            break
    return found


def short(values: Array) -> Array:
    """float32 values as float64 with the fewest decimals that give them again."""
    with np.errstate(over="ignore", invalid="ignore"):
        return fewest_digits(values.astype(np.float64), lambda rounded: rounded, values)


def text(value: float) -> str:
    """A number as text: without ".0" where it is whole."""
    return str(int(value)) if value == int(value) else repr(value)
