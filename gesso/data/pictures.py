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
from PIL.TiffImagePlugin import TiffImageFile

_ORIENTATION, _TIFF_WIDTH, _TIFF_HEIGHT = 0x0112, 0x0100, 0x0101
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SCAN = 0xDA
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
    limit = f"more than {MAX_PIXELS / 1e6:.0f} million pixels"
    try:
        picture = _open(file, head)
        width, height = _stored_size(picture)
        if width * height > MAX_PIXELS:
            return Header(0, 0, 1, 0, "picture is too large", f"{width} x {height} pixels, {limit}")
        return Header(width, height, exif_orientation(picture), number)
    except Image.DecompressionBombError:  # some plug-ins look at the size themselves
        return Header(0, 0, 1, 0, "picture is too large", limit)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error) as error:
        text = "not a picture" if isinstance(error, UnidentifiedImageError) else str(error)
        return Header(0, 0, 1, 0, "picture cannot be read", text)


def exif_orientation(picture: Image.Image) -> int:
    """The orientation, 1 to 8, that stands in the EXIF before the pixels; 1 where there is none. Decodes nothing.

    XMP is not looked at: OpenCV and browsers do not either, and everything here has to agree.
    """
    if isinstance(picture, TiffImageFile):
        value = picture.tag_v2.get(_ORIENTATION, 1)
    else:
        exif = Image.Exif()
        exif.load(picture.info.get("exif", b""))
        value = exif.get(_ORIENTATION, 1)
    return value if value in range(1, 9) else 1


def _stored_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height as stored; of a TIFF, Pillow gives those of the upright picture."""
    if isinstance(picture, TiffImageFile):
        return int(picture.tag_v2[_TIFF_WIDTH]), int(picture.tag_v2[_TIFF_HEIGHT])
    return picture.size


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


class JpegLayout(NamedTuple):
    """What the markers of a JPEG file say: bits a channel, height, width, channels, and where the first scan begins."""

    bits: int
    height: int
    width: int
    channels: int
    scan: int

    def ends(self, data: bytes) -> bool:
        """Whether the scans have an end; what follows it (the film of a phone, for example) does not count."""
        return data.rfind(b"\xff\xd9", self.scan) >= 0  # it stands at the end of most


def jpeg_layout(data: bytes) -> JpegLayout | None:
    """Walks the markers of a JPEG to its first scan, past thumbnails; None where it does not get there."""
    if data[:2] != b"\xff\xd8":
        return None
    at, frame = 2, (0, 0, 0, 0)
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == _SCAN:
            return JpegLayout(*frame, at) if frame[1] and frame[2] else None
        if marker in _FRAMES and at + 10 <= len(data):
            bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 4)
            frame = bits, height, width, channels
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _cut_off(data: bytes) -> bool:
    """Whether a JPEG or PNG lacks its end."""
    if data.startswith(b"\xff\xd8"):
        layout = jpeg_layout(data)
        return layout is None or not layout.ends(data)
    if data.startswith(b"\x89PNG"):
        return data.rfind(b"IEND") < 0
    return False
