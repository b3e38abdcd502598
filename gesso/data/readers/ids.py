"""Image ids for formats that have none."""

import hashlib
from collections.abc import Sequence

import numpy as np

from gesso.data.records import Array

BITS = 52
"""A whole number of this size survives JSON in every language."""


def stable_ids(names: Sequence[str], *, bits: int = BITS) -> Array:
    """int64 (N,) in [1, 2**bits): a hash of each name, so that an image keeps its id when others come or go.

    Of names whose hashes are equal, the first in alphabetical order keeps it and the others are hashed again with a
    number; equal names count as different images.
    """
    ids = np.zeros(len(names), np.int64)
    taken: set[int] = {0}
    for row in sorted(range(len(names)), key=lambda row: names[row]):
        number, again = 0, 0
        while number in taken:
            salt = again.to_bytes(8, "little")
            digest = hashlib.blake2b(names[row].encode("utf-8", "surrogateescape"), digest_size=8, salt=salt).digest()
            number = int.from_bytes(digest, "little") >> (64 - bits)
            again += 1
        taken.add(number)
        ids[row] = number
    return ids
