"""The embedded data set on disk: pictures with a COCO file, an index of them, and a folder of classes.

``make_demo`` writes, below a folder,

    images/000000.jpg      the scenes
    semantic/000000.png    indexed: 0 background, 1 + label (in the order of the label space), 255 void
    annotations.json       COCO, with instance masks as run lengths; further keys as below
    demo.json              the settings that made it

Keys beside COCO's own. Annotations: ``visible_bbox`` (xywh), ``occluded_share`` (hidden share of the area),
CityPersons' ``vis_ratio`` (visible box over box) and ``height``, and ``part_of``, the id of the card under a digit.
``bbox`` is the whole object, hidden parts included; ``segmentation`` and ``area`` are what can be seen. Images:
``semantic`` (a path), ``photograph`` and ``license``; where labels are hidden, LVIS's ``neg_category_ids`` (verified as
absent) and ``not_exhaustive_category_ids`` (some annotations are missing): a class in the second list is unverified,
and so is one with neither an annotation nor a verdict of absence.
The document: ``label_space`` (``LabelSpace.to_dict``: is-a and part-of relations).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from gesso.config import to_dict
from gesso.data import rle
from gesso.data.demo_paint import paste
from gesso.data.demo_scenes import DemoConfig, Scene, SceneObject, demo_label_space, make_scene
from gesso.errors import ConfigError, InputError
from gesso.files import read_json, write_json, write_text
from gesso.label_space import LabelSpace

__all__ = ["ANNOTATIONS", "DemoConfig", "demo_label_space", "make_demo", "make_demo_classes"]

ANNOTATIONS = "annotations.json"
_SETTINGS, _DONE = "demo.json", "done.json"
_QUALITY = 92
# Classes are far apart in colour for the eye; the palette's numbers carry no meaning.
_PALETTE = np.random.Generator(np.random.PCG64(4)).integers(60, 256, (256, 3)).astype(np.uint8)
_PALETTE[0], _PALETTE[255] = (0, 0, 0), (224, 224, 192)

Progress = Callable[[int, int], None]


def make_demo(folder: Path, config: DemoConfig, *, progress: Progress | None = None) -> Path:
    """Writes the embedded data set, or finds it there already.

    Args:
        folder: where to write; it may hold the same set, whole or broken off, but no other files.
        config: what the set holds.
        progress: called with (scenes done, scenes in all).

    Returns:
        The path of the COCO file, which is written last: where it stands, the set is whole.

    Raises:
        InputError: the folder holds something else, or another set, or cannot be written.
    """
    target = folder / ANNOTATIONS
    _claim(folder, {"format": 1, "view": "scenes", **to_dict(config)})
    if target.is_file():
        return target
    document = _Document(demo_label_space(config))
    for number in range(config.images):
        scene = make_scene(config, number)
        name = f"{number:06d}"
        _save(Image.fromarray(scene.pixels), folder / "images" / f"{name}.jpg", quality=_QUALITY, subsampling=0)
        semantic = Image.fromarray(scene.semantic)
        semantic.putpalette(_PALETTE.tobytes())
        _save(semantic, folder / "semantic" / f"{name}.png")
        document.add(scene, number + 1, name)
        if progress is not None:
            progress(number + 1, config.images)
    write_text(target, json.dumps(document.finish(config), separators=(",", ":")) + "\n")
    return target


def make_demo_classes(folder: Path, config: DemoConfig, *, side: int = 64, progress: Progress | None = None) -> Path:
    """Writes the same objects one a picture: ``folder/CLASS/000123.png``, the class being the object's finest.

    An object stands alone, wholly visible, on its scene's background (a digit of a card on its card), in a square
    1.3 times as large as its box. The number counts the objects of all scenes.

    Args:
        folder: where to write; it may hold the same set, but no other files.
        config: the scenes that the objects come from.
        side: width and height of a picture in pixels.
        progress: called with (scenes done, scenes in all).

    Returns:
        ``folder``.

    Raises:
        ConfigError: ``side`` is below 8.
        InputError: the folder holds something else, or another set, or cannot be written.
    """
    if side < 8:
        raise ConfigError(f"single-object pictures of {side} px", remedy="Use 8 px or more.")
    _claim(folder, {"format": 1, "view": "classes", "picture_side": side, **to_dict(config)})
    done = folder / _DONE
    if done.is_file():
        return folder
    count = 0
    for number in range(config.images):
        scene = make_scene(config, number)
        for item in scene.objects:
            _save(Image.fromarray(_single(scene, item, side)), folder / item.leaf / f"{count:06d}.png")
            count += 1
        if progress is not None:
            progress(number + 1, config.images)
    write_json(done, {"pictures": count})
    return folder


class _Document:
    """The COCO document as it grows by scenes."""

    def __init__(self, space: LabelSpace) -> None:
        self.space = space
        self.licences: dict[str, int] = {}
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, scene: Scene, image_id: int, name: str) -> None:
        height, width = scene.pixels.shape[:2]
        image: dict[str, Any] = {
            "id": image_id,
            "file_name": f"images/{name}.jpg",
            "width": width,
            "height": height,
            "license": self.licences.setdefault(scene.licence, len(self.licences) + 1),
            "photograph": scene.photograph,
            "semantic": f"semantic/{name}.png",
        }
        shown = {item.name for item in scene.objects if not item.hidden_label}
        if scene.unverified:
            present = shown | {above for name in shown for above in self.space.ancestors(name)}
            names, ids = self.space.names, self.space.ids
            pairs = list(zip(names, ids, strict=True))
            image["neg_category_ids"] = [i for n, i in pairs if n not in present and n not in scene.unverified]
            image["not_exhaustive_category_ids"] = [i for n, i in pairs if n in present and n in scene.unverified]
        self.images.append(image)
        ids_of_objects: dict[int, int] = {}
        for place, item in enumerate(scene.objects):
            if not item.hidden_label:
                ids_of_objects[place] = len(self.annotations) + 1
                self.annotations.append(self._annotation(item, image_id, ids_of_objects))

    def _annotation(self, item: SceneObject, image_id: int, ids_of_objects: dict[int, int]) -> dict[str, Any]:
        box, visible, mask = _xywh(item.xyxy), _xywh(item.visible_xyxy), rle.encode(item.mask)
        annotation: dict[str, Any] = {
            "id": len(self.annotations) + 1,
            "image_id": image_id,
            "category_id": self.space.ids[self.space.index(item.name)],
            "bbox": box,
            "area": int(np.count_nonzero(item.mask)),
            "iscrowd": 0,
            "segmentation": {"size": list(mask.size), "counts": mask.counts.decode()},
            "visible_bbox": visible,
            "occluded_share": round(item.occluded, 4),
            "vis_ratio": round(visible[2] * visible[3] / (box[2] * box[3]), 4),
            "height": box[3],
        }
        if item.whole in ids_of_objects:
            annotation["part_of"] = ids_of_objects[item.whole]
        return annotation

    def finish(self, config: DemoConfig) -> dict[str, Any]:
        space = self.space
        rows = zip(space.ids, space.names, space.supercategories, strict=True)
        return {
            "info": {"description": "Embedded data set of Gesso", "settings": to_dict(config)},
            "licenses": [{"id": number, "name": name} for name, number in self.licences.items()],
            "label_space": space.to_dict(),
            "categories": [{"id": i, "name": name, "supercategory": above} for i, name, above in rows],
            "images": self.images,
            "annotations": self.annotations,
        }


def _single(scene: Scene, item: SceneObject, side: int) -> npt.NDArray[np.uint8]:
    """The object alone on its background, cut out and resized: uint8 (side, side, 3)."""
    pixels = scene.background
    below = [] if item.whole is None else [scene.objects[item.whole]]
    above = [other for other in scene.objects if other.whole is not None and scene.objects[other.whole] is item]
    for each in (*below, item, *above):
        pixels = paste(pixels, each.figure)
    x0, y0, x1, y1 = item.xyxy.tolist()
    limit = pixels.shape[0]
    size = min(limit, round(1.3 * max(x1 - x0, y1 - y0)))
    left = int(np.clip(round((x0 + x1 - size) / 2), 0, limit - size))
    top = int(np.clip(round((y0 + y1 - size) / 2), 0, limit - size))
    crop = pixels[top : top + size, left : left + size]
    method = cv2.INTER_AREA if size > side else cv2.INTER_CUBIC
    return cv2.resize(crop, (side, side), interpolation=method).astype(np.uint8, copy=False)


def _xywh(xyxy: npt.NDArray[np.float32]) -> list[float]:
    x0, y0, x1, y1 = xyxy.tolist()
    return [x0, y0, x1 - x0, y1 - y0]


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Makes the folder, or checks that it was made with the same settings."""
    mark = folder / _SETTINGS
    if mark.is_file():
        if read_json(mark) != settings:
            raise InputError(
                "holds an embedded data set of other settings", where=folder, remedy="Name another folder."
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError("exists already and is no embedded data set", where=folder, remedy="Name another folder.")
    write_json(mark, settings)


def _save(image: Image.Image, path: Path, **options: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
    except OSError as error:
        remedy = "Check the path, its rights and the free space."
        raise InputError(f"cannot be written: {error.strerror or error}", where=path, remedy=remedy) from error
