"""Pictures from files to RGB, and onto their canvas.

``read_picture`` gives uint8 (H, W, 3) RGB with the EXIF orientation always applied, whatever the file's mode. Plain
JPEG files take OpenCV's decoder, which is the fastest; everything else, and every file that looks odd, takes Pillow,
whose word on a broken file is final.
"""

import io
import struct
import warnings
from pathlib import Path
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from gesso.data.pictures import MAX_PIXELS, exif_orientation, jpeg_layout
from gesso.data.transforms import Placement
from gesso.errors import DataError

Pixels: TypeAlias = npt.NDArray[np.uint8]

_GREY = np.array([0.299, 0.587, 0.114])
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_UNFINISHED = (OSError, ValueError, SyntaxError, EOFError, struct.error, IndexError, TypeError, KeyError)


def read_picture(path: Path) -> Pixels:
    """Reads a picture as uint8 (H, W, 3) RGB, transposed as its EXIF orientation says.

    Grey, palette, CMYK and 16-bit pictures are converted; transparency is dropped; of several frames the first counts.

    Raises:
        DataError: the file is missing, empty, no picture, broken off, or larger than ``MAX_PIXELS``.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"the picture cannot be read: {error.strerror or error}", where=path) from error
    if not data:
        raise DataError("the picture is empty (0 bytes)", where=path, remedy="Get the file again.")
    layout = jpeg_layout(data)
    if layout is not None:
        _refuse_huge(layout.width, layout.height, path)
        if layout.bits == 8 and layout.channels in (1, 3) and layout.ends(data):
            picture = _decode_jpeg(data)
            if picture is not None:
                return picture
    return _read_with_pillow(data, path)


def _decode_jpeg(data: bytes) -> Pixels | None:
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:
        return None
    return None if picture is None else np.asarray(picture, np.uint8)


def _read_with_pillow(data: bytes, path: Path) -> Pixels:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                _refuse_huge(*image.size, path)
                return upright_rgb(image)
    except Image.DecompressionBombError as error:
        what = f"the picture is too large (more than {MAX_PIXELS / 1e6:.0f} megapixels)"
        raise DataError(what, where=path, remedy="Make it smaller.") from error
    except UnidentifiedImageError as error:
        raise DataError("this is no picture of a known format", where=path) from error
    except _UNFINISHED as error:
        raise DataError(f"the picture is broken: {error}", where=path, remedy="Get the file again.") from error


def upright_rgb(image: Image.Image) -> Pixels:
    """uint8 (H, W, 3) RGB of a picture of Pillow's, turned as its EXIF says; converted as in ``read_picture``."""
    turn = None if isinstance(image, TiffImageFile) else _TURNS.get(exif_orientation(image))  # Pillow turns a TIFF
    return _to_rgb(image if turn is None else image.transpose(turn))


def _to_rgb(image: Image.Image) -> Pixels:
    """RGB of any mode; 16-bit grey keeps its high byte, floating point is taken as 0..255."""
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        grey = (deep >> 8 if deep.max(initial=0) > 255 or image.mode != "I" else deep).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        grey = np.nan_to_num(np.asarray(image)).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    return np.ascontiguousarray(np.asarray(image.convert("RGB"), np.uint8))


def _refuse_huge(width: int, height: int, path: Path) -> None:
    if width * height > MAX_PIXELS:
        what = f"the picture has {width} x {height} = {width * height / 1e6:.0f} megapixels"
        raise DataError(what, where=path, remedy=f"Make it smaller than {MAX_PIXELS / 1e6:.0f} megapixels.")


def draw(picture: Pixels, placement: Placement, canvas: Pixels) -> None:
    """Draws a picture (H, W, 3) on its ``canvas``, zeros of shape ``placement.canvas`` + (3,), in place.

    Bilinear, as the reference detectors do; below half size the mean over each pixel's area, against aliasing.
    """
    height, width = placement.resized
    if picture.shape[:2] != placement.resized:
        small = min(placement.scale) <= 0.5
        method = cv2.INTER_AREA if small else cv2.INTER_LINEAR
        picture = np.asarray(cv2.resize(picture, (width, height), interpolation=method), np.uint8)
    (top, left), (high, wide) = placement.offset, placement.size
    part = picture[top : top + high, left : left + wide]
    canvas[:high, :wide] = cv2.flip(part, 1) if placement.flip else part


def colour(picture: Pixels, factors: tuple[float, float, float]) -> None:
    """Changes brightness, contrast and saturation of RGB pixels (..., 3) in place, in this order.

    Each is a blend as in torchvision's ``ColorJitter``: with black, with the mean grey, with the grey picture.
    """
    brightness, contrast, saturation = factors
    if brightness != 1:
        picture[...] = cv2.LUT(picture, _table(brightness, 0.0))
    if contrast != 1:
        mean = float(np.dot(cv2.mean(picture)[:3], _GREY))
        picture[...] = cv2.LUT(picture, _table(contrast, (1 - contrast) * mean))
    if saturation != 1:
        grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        picture[...] = cv2.addWeighted(picture, saturation, grey, 1 - saturation, 0.0)


def _table(factor: float, shift: float) -> Pixels:
    table: Pixels = np.clip(np.arange(256) * factor + shift, 0, 255).astype(np.uint8)
    return table
