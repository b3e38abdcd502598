"""Pictures from files to RGB, and onto their canvas.

``read_picture`` gives uint8 (H, W, 3) RGB with the EXIF orientation always applied, whatever the file's mode. Plain
JPEG files take OpenCV's decoder, which is the fastest; everything else, and every file that looks odd, takes Pillow,
whose word on a broken file is final.

Where a JPEG file is resized to less than half its size anyway, libjpeg decodes it at 1/2, 1/4 or 1/8: the largest
reduction that leaves at least ``MARGIN`` pixels each way for each pixel of the resized picture. Boxes, maps and masks
do not notice: the placement is that of the stored picture. Against full decoding, both resized by area, for sharp
photographs side by side, quality 90, pixels of 0 to 255 (``benchmarks/pipeline.py``):

    stored         resized to    decoded at    mean and largest difference    times as fast
    1280 x 960      448 x 336       1/2                1.3     34                  1.5
    4000 x 3000     448 x 336       1/4                1.2     25                  2.6
    4000 x 3000    1067 x 800       1/2                1.0     29                  2.1

640 x 480, and 1280 x 960 for (800, 1333), are decoded whole. A margin of 1 would decode the second row at 1/8, with
differences of 4.0 and 80; a margin of 2 the first and the third whole.
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
from gesso.data.placement import Placement, Shape
from gesso.errors import DataError

Pixels: TypeAlias = npt.NDArray[np.uint8]

MARGIN = 4 / 3
_JPEG_FLAGS = {  # the reductions' grey is the lack of IMREAD_COLOR, which is BGR
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
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


def read_picture(path: Path, placement: Placement | None = None) -> Pixels:
    """Reads a picture as uint8 (H, W, 3) RGB, transposed as its EXIF orientation says.

    Grey, palette, CMYK and 16-bit pictures are converted; transparency is dropped; of several frames the first counts.
    With ``placement`` it is read for ``draw`` to draw it there: a JPEG file may come as ``reduced_size(placement)``.

    Raises:
        DataError: the file is missing, empty, no picture, broken off, larger than ``MAX_PIXELS``, or not of the size
            ``placement.original``.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"the picture cannot be read: {error.strerror or error}", where=path) from error
    if not data:
        raise DataError("the picture is empty (0 bytes)", where=path, remedy="Get the file again.")
    layout = jpeg_layout(data)
    picture, number = None, 1
    if layout is not None:
        _refuse_huge(layout.width, layout.height, path)
        if placement is not None and sorted(placement.original) == sorted((layout.height, layout.width)):
            number = reduction(placement)
        if layout.bits == 8 and layout.channels in (1, 3) and layout.ends(data):
            picture = _decode_jpeg(data, number)
    if picture is None:
        picture, number = _read_with_pillow(data, path), 1
    if placement is not None:
        if number == 1:
            check_size(picture.shape[:2], placement.original, path)
        elif picture.shape[:2] != reduced_size(placement):  # of these sides, so the other way round
            check_size(placement.original[::-1], placement.original, path)
    return picture


def check_size(found: tuple[int, ...], expected: Shape, path: Path) -> None:
    """Raises DataError where a picture's height and width are not the expected ones."""
    if found != expected:
        what = f"the picture is {found[1]} x {found[0]}, expected {expected[1]} x {expected[0]}"
        raise DataError(what, where=path, remedy="If it has been changed, import the data again.")


def reduction(placement: Placement) -> int:
    """By what a JPEG file may be reduced in decoding, to be drawn at ``placement``: 1, 2, 4 or 8.

    1 where a region is cut out first: its corner need not lie on the grid of the reduced picture.
    """
    most = 0.0 if placement.region is not None else 1 / (MARGIN * max(placement.scale))
    return next((number for number in (8, 4, 2) if number <= most), 1)


def reduced_size(placement: Placement) -> Shape:
    """Height and width of the picture that is reduced for ``placement``: a last pixel that is not full counts."""
    number = reduction(placement)
    return -(-placement.original[0] // number), -(-placement.original[1] // number)


def _decode_jpeg(data: bytes, number: int) -> Pixels | None:
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), _JPEG_FLAGS[number])
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

    The picture is the stored one, or reduced as ``read_picture`` reads it for this placement. Bilinear, as the
    reference detectors do; below half size the mean over each pixel's area, against aliasing.
    """
    number = 1 if picture.shape[:2] == placement.original else reduction(placement)
    if placement.region is not None:
        top, left, height, width = placement.region
        picture = picture[top : top + height, left : left + width]
    if picture.shape[:2] != placement.resized:
        picture = _resize(picture, placement, number)
    (top, left), (high, wide) = placement.offset, placement.size
    part = picture[top : top + high, left : left + wide]
    canvas[:high, :wide] = cv2.flip(part, 1) if placement.flip else part


def _resize(picture: Pixels, placement: Placement, number: int) -> Pixels:
    height, width = placement.resized
    method = cv2.INTER_AREA if min(placement.scale) <= 0.5 else cv2.INTER_LINEAR
    if number == 1:
        return np.asarray(cv2.resize(picture, (width, height), interpolation=method), np.uint8)
    # The scale is given, not the size: a last pixel that is not full must not squeeze the others.
    down, across = (scale * number for scale in placement.scale)
    return np.asarray(cv2.resize(picture, None, fx=across, fy=down, interpolation=method), np.uint8)[:height, :width]


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
