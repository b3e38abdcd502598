"""What import asks of a picture without decoding it: size, EXIF orientation, content hash, whether it is whole."""

import hashlib
import io
import itertools
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError

_ORIENTATION = 0x0112
_AT_ONCE = 256
MAX_PIXELS = 178_956_970
"""Larger pictures are not read: half a gigabyte of RGB. Pillow's own hard limit."""
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
"""File name endings that are taken for pictures when a folder is searched."""


class Header(NamedTuple):
    """What was found in a picture file.

    Attributes:
        width, height: of the stored pixels, before EXIF transposition; 0 where the file is broken.
        orientation: EXIF orientation, 1 to 8.
        content_hash: the first 8 bytes of the file's BLAKE2b as an unsigned number, never 0; 0 where not asked for.
        problem: "" or what is wrong: "picture is missing", "picture is empty", "picture cannot be read",
            "picture is cut off", "picture is too large".
        detail: the path or the library's message.
    """

    width: int
    height: int
    orientation: int
    content_hash: int
    problem: str = ""
    detail: str = ""

    @property
    def transposed(self) -> tuple[int, int]:
        """Width and height after EXIF transposition."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def read_header(path: Path, *, content_hash: bool = True) -> Header:
    """Reads the header of the picture at ``path``; with ``content_hash`` the whole file's bytes, but no pixel."""
    try:
        if not content_hash:
            with path.open("rb") as file:
                return _parse(file, 0)
        data = path.read_bytes()
    except OSError as error:
        problem = "picture is missing" if not path.exists() else "picture cannot be read"
        return Header(0, 0, 1, 0, problem, error.strerror or str(error))
    number = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1
    header = _parse(io.BytesIO(data), number)
    if not header.problem and _cut_off(data):
        return Header(0, 0, 1, 0, "picture is cut off", f"{len(data)} bytes")
    return header


def read_headers(
    paths: Iterable[Path], *, content_hash: bool = True, progress: Callable[[int], None] | None = None
) -> Iterator[Header]:
    """The headers of ``paths`` in order, read by threads; ``progress`` is told the number done."""
    remaining, done = iter(paths), 0
    with ThreadPoolExecutor(max_workers=min(16, 2 * (os.cpu_count() or 1))) as pool:
        while some := list(itertools.islice(remaining, _AT_ONCE)):
            yield from pool.map(lambda path: read_header(path, content_hash=content_hash), some)
            done += len(some)
            if progress is not None:
                progress(done)


def _parse(file: BinaryIO, number: int) -> Header:
    head = file.read(16)
    if not head:
        return Header(0, 0, 1, 0, "picture is empty", "0 bytes")
    file.seek(0)
    try:
        picture = _open(file, head)
        orientation = picture.getexif().get(_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error) as error:
        text = "not a picture" if isinstance(error, UnidentifiedImageError) else str(error)
        return Header(0, 0, 1, 0, "picture cannot be read", text)
    width, height = picture.size
    orientation = orientation if orientation in range(1, 9) else 1
    if width * height > MAX_PIXELS:
        text = f"{width} x {height} pixels, more than {MAX_PIXELS / 1e6:.0f} million"
        return Header(0, 0, 1, 0, "picture is too large", text)
    return Header(width, height, orientation, number)


def _open(file: BinaryIO, head: bytes) -> Image.Image:
    """Like ``Image.open``, without its limit on the size: no pixel is decoded here."""
    for name in _formats():
        factory, accept = Image.OPEN[name]
        if accept is None:
            continue
        try:
            accepted = accept(head)
            if accepted and not isinstance(accepted, str):
                return factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # what plug-ins raise at another format
            file.seek(0)
    raise UnidentifiedImageError("not a picture")


def _formats() -> list[str]:
    Image.init()
    return Image.ID


def _cut_off(data: bytes) -> bool:
    """Whether a JPEG or PNG lacks its end. A thumbnail's end in the JPEG's head stands before the last scan."""
    if data.startswith(b"\xff\xd8"):
        return data.rfind(b"\xff\xd9") <= data.rfind(b"\xff\xda")
    if data.startswith(b"\x89PNG"):
        return data.rfind(b"IEND") < 0
    return False
