"""What the embedded data set is made of: photographs and handwritten digits that lie inside installed packages.

Nothing is downloaded: scikit-image's photographs are read from the files of its wheel, never through its fetchers.
Every photograph is cut into three regions and the digits of every class into three runs, one for each split, so that
no split shares a pixel of background or a digit with another. The runs are consecutive because neighbouring digits of
the source were written by the same hand: most writers of one split are strangers to the others.
"""

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits

from gesso.errors import DataError

Split = Literal["train", "val", "test"]

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_SHARES = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}
_PUBLIC_DOMAIN = "No known copyright restrictions or CC0, see skimage.data"
_CC_BY = "CC BY 2.0, see sklearn/datasets/images/README.txt"
# (package, file in the package, licence)
_PHOTOGRAPHS = (
    *(
        ("skimage", f"data/{name}", _PUBLIC_DOMAIN)
        for name in (
            "astronaut.png",
            "brick.png",
            "camera.png",
            "chelsea.png",
            "coffee.png",
            "coins.png",
            "grass.png",
            "gravel.png",
            "hubble_deep_field.jpg",
            "ihc.png",
            "moon.png",
            "motorcycle_left.png",
            "retina.jpg",
            "rocket.jpg",
        )
    ),
    ("sklearn", "datasets/images/china.jpg", _CC_BY),
    ("sklearn", "datasets/images/flower.jpg", _CC_BY),
)


@dataclass(frozen=True)
class Photograph:
    """One region of a photograph: ``pixels`` uint8 (h, w, 3) RGB, its file ``name``, and its ``licence``."""

    name: str
    licence: str
    pixels: npt.NDArray[np.uint8]


@functools.cache
def load_photographs(split: Split) -> tuple[Photograph, ...]:
    """The regions of ``split``: the left 60% of each photograph for train; of the rest the upper half for val.

    A photograph that the installed version of its package no longer holds is left out.

    Raises:
        DataError: none of the photographs is there.
    """
    found = []
    for package, file, licence in _PHOTOGRAPHS:
        spec = importlib.util.find_spec(package)
        folders = (spec.submodule_search_locations if spec else None) or ()
        path = next((Path(folder) / file for folder in folders if (Path(folder) / file).is_file()), None)
        if path is None:
            continue
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        found.append(Photograph(name=path.name, licence=licence, pixels=_region(pixels, split)))
    if not found:
        raise DataError(
            "the photographs of the embedded data set are missing",
            where="scikit-image, scikit-learn",
            remedy="Reinstall both packages from their wheels.",
        )
    return tuple(found)


def _region(pixels: npt.NDArray[np.uint8], split: Split) -> npt.NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    cut, half = round(width * 0.6), height // 2
    if split == "train":
        return pixels[:, :cut]
    return pixels[:half, cut:] if split == "val" else pixels[half:, cut:]


@functools.cache
def load_glyphs(split: Split) -> tuple[npt.NDArray[np.float32], ...]:
    """The handwritten digits of ``split``: one float32 array (n, 8, 8) in [0, 1] for each class, ink is 1.

    UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998), the 1,797 samples in scikit-learn.
    """
    digits = load_digits()
    low, high = _SHARES[split]
    glyphs = []
    for label in range(len(DIGIT_NAMES)):
        rows = np.flatnonzero(digits.target == label)
        kept = rows[round(low * len(rows)) : round(high * len(rows))]
        glyphs.append((digits.images[kept] / 16.0).astype(np.float32))
    return tuple(glyphs)
