"""COCO JSON: one object with ``images``, ``annotations`` and ``categories``, in any order and of any size.

Source: cocodataset.org/#format-data. Beside COCO's own keys the flags of ``records.FLAGS`` are read under their names,
and ``height``, ``vis_ratio`` and ``score`` as further columns; an image's key ``semantic`` is the path of its semantic
map, and LVIS's lists of category ids become verified labels. Where an image names a ``mask_file`` (a picture of whole
numbers in masks/), the mask of an annotation without ``segmentation`` are the pixels of its ``mask_value``. Category id
0 is legal; labels follow the rank of the category ids, never the place in the list, which differs between the files of
some sets.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from gesso.data import rle
from gesso.data.blocks import join_columns, join_masks, join_texts, lookup, take_images, take_objects
from gesso.data.readers.coco_masks import NO_BOX, extent, masks_in_files, polygons
from gesso.data.readers.json_stream import stream_arrays
from gesso.data.readers.lvis import Lists, verdicts
from gesso.data.records import FLAGS, Array, ImageBlock, Issue, Mask, Masks, ObjectBlock, Reading, Strings
from gesso.errors import DataError
from gesso.label_space import LabelSpace

S = TypeVar("S", bound=msgspec.Struct)
_FLOATS = ("height", "vis_ratio", "score")
_FLAG_KEYS = {("iscrowd" if name == "crowd" else name): bit for name, bit in FLAGS.items()}
_BITS = {"id": 63, "image_id": 63, "category_id": 63, "width": 31, "height": 31}


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str = ""
    width: int | None = None
    height: int | None = None
    license: int | str | None = None
    semantic: str | None = None
    mask_file: str | None = None
    neg_category_ids: list[int] | None = None
    not_exhaustive_category_ids: list[int] | None = None


class _Category(msgspec.Struct, gc=False):
    id: int
    name: str
    supercategory: str | None = None


class _Runs(msgspec.Struct, gc=False):
    size: tuple[int, int]
    counts: str | list[int]


class _Annotation(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float] | None = None
    id: int = 0
    area: float | None = None
    segmentation: list[list[float]] | _Runs | None = None
    iscrowd: int | bool | None = None
    ignore: int | bool | None = None
    difficult: int | bool | None = None
    group_of: int | bool | None = None
    occluded: int | bool | None = None
    truncated: int | bool | None = None
    depiction: int | bool | None = None
    inside: int | bool | None = None
    height: float | None = None
    vis_ratio: float | None = None
    score: float | None = None
    mask_value: int | None = None


_DECODERS: dict[str, Callable[[bytes], list[Any]]] = {
    "images": msgspec.json.Decoder(list[_Image]).decode,
    "annotations": msgspec.json.Decoder(list[_Annotation]).decode,
    "categories": msgspec.json.Decoder(list[_Category]).decode,
}


def read_coco(path: Path, *, split: str = "", progress: Callable[[int], None] | None = None) -> Reading:
    """Reads a COCO JSON file of any size in blocks; ``progress`` is told the number of bytes read.

    Raises:
        DataError: the file is no JSON or breaks off (line and byte are named), an array is missing, a category id is
            unknown, a category or an image cannot be understood, or a number or a text is none that a column holds.
    """
    parts = _Parts(path)
    for piece in stream_arrays(path, _DECODERS, progress=progress):
        kind: Any = {"images": _Image, "annotations": _Annotation, "categories": _Category}[piece.key]
        elements = piece.raw
        parts.seen.add(piece.key)
        try:
            elements = piece.elements if piece.elements is not None else parts.convert(piece.raw, kind)
            if piece.key == "categories":
                parts.add_categories(elements)
            elif piece.key == "images":
                parts.add_images(elements, piece.text)
            else:
                parts.add_annotations(elements, piece.text)
        except OverflowError:
            what = f"{_too_large(elements)} in '{piece.key}' is too large"
            raise DataError(what, where=path, remedy="An id may have 63 bits, a width or height 31.") from None
        except UnicodeEncodeError as error:
            what = f"the text {error.object!r} in '{piece.key}' is not Unicode"
            raise DataError(what, where=path, remedy="Mend or rename it there.") from None
    return parts.finish(split)


class _Parts:
    """The columns gathered so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: set[str] = set()
        self.categories: list[_Category] = []
        self.images: list[ImageBlock] = []
        self.lists: dict[int, Lists] = {}
        self.mask_files: dict[int, str] = {}
        self.mask_values: list[Array] = []
        self.objects: list[ObjectBlock] = []
        self.image_ids: list[Array] = []
        self.category_ids: list[Array] = []
        self.issues: list[Issue] = []
        self.notes: list[tuple[int | None, int | None, str, str, str]] = []

    def convert(self, raw: list[Any], kind: type[S]) -> list[S]:
        """Converts elements one by one where the block did not decode: an annotation that does not fit is an issue."""
        found = []
        for element in raw:
            try:
                found.append(msgspec.convert(element, kind, strict=False))
            except msgspec.ValidationError as error:
                if kind is not _Annotation:
                    what = "an image" if kind is _Image else "a category"
                    line = f"{what} cannot be understood: {error} in {element!r:.200}"
                    raise DataError(line, where=self.path) from None
                found.extend(self._mend(element, str(error)))  # type: ignore[arg-type]
        return found

    def _mend(self, element: Any, problem: str) -> Iterable[_Annotation]:
        number, image_id = (_id(element.get(key)) if isinstance(element, dict) else None for key in ("id", "image_id"))
        if isinstance(element, dict):
            bbox = element.get("bbox")
            if isinstance(bbox, list) and len(bbox) == 4 and None in bbox:
                element = {**element, "bbox": [NO_BOX[0] if value is None else value for value in bbox]}
            try:
                return [msgspec.convert(element, _Annotation, strict=False)]
            except msgspec.ValidationError:
                pass
            try:
                mended = msgspec.convert({**element, "segmentation": None}, _Annotation, strict=False)
                self._note(mended.image_id, number, "mask cannot be read", "mask dropped", problem)
                return [mended]
            except msgspec.ValidationError:
                pass
        self._note(image_id, number, "annotation cannot be read", "dropped", problem)
        return []

    def add_categories(self, categories: list[_Category]) -> None:
        # Made to raise here what a column of them would raise where the file is no longer known.
        np.fromiter([category.id for category in categories], np.int64)
        Strings.of(category.name + (category.supercategory or "") for category in categories)
        self.categories.extend(categories)

    def add_images(self, images: list[_Image], text: bytes) -> None:
        count = len(images)
        columns = {}
        if b'"license"' in text:
            columns["license"] = Strings.of("" if i.license is None else str(i.license) for i in images)
        if b'_category_ids"' in text:
            for i in images:
                if i.neg_category_ids is not None or i.not_exhaustive_category_ids is not None:
                    self.lists.setdefault(i.id, Lists(i.neg_category_ids or (), i.not_exhaustive_category_ids or ()))
        self.mask_files |= {i.id: i.mask_file for i in images if i.mask_file}
        paths = Strings.of([i.semantic or "" for i in images]) if b'"semantic"' in text else None
        block = ImageBlock(
            ids=np.fromiter([i.id for i in images], np.int64, count),
            names=Strings.of([i.file_name for i in images]),
            widths=np.fromiter([max(i.width or 0, 0) for i in images], np.int32, count),
            heights=np.fromiter([max(i.height or 0, 0) for i in images], np.int32, count),
            semantic=paths,
            columns=columns,
        )
        self.images.append(block)

    def add_annotations(self, annotations: list[_Annotation], text: bytes) -> None:
        count = len(annotations)
        ids = np.fromiter([a.id for a in annotations], np.int64, count)
        masks = [self._mask(a) for a in annotations] if b'"segmentation"' in text else [None] * count
        corners = [a.bbox or extent(mask) for a, mask in zip(annotations, masks, strict=True)]
        flat = np.fromiter(itertools.chain.from_iterable(corners), np.float64, 4 * count)
        xyxy = flat.reshape(-1, 4)
        xyxy[:, 2:] += xyxy[:, :2]
        flags, known = np.zeros(count, np.uint16), np.zeros(count, np.uint16)
        for key, bit in _FLAG_KEYS.items():
            if f'"{key}"'.encode() in text:
                values = [getattr(a, key) for a in annotations]
                flags |= np.fromiter([bit if value else 0 for value in values], np.uint16, count)
                known |= np.fromiter([0 if value is None else bit for value in values], np.uint16, count)
        columns: dict[str, Any] = {}
        for key in _FLOATS:
            if f'"{key}"'.encode() in text:
                columns[key] = _floats([getattr(a, key) for a in annotations])
        self.mask_values.append(np.fromiter([a.mask_value or 0 for a in annotations], np.int64, count))
        self.image_ids.append(np.fromiter([a.image_id for a in annotations], np.int64, count))
        self.category_ids.append(np.fromiter([a.category_id for a in annotations], np.int64, count))
        with np.errstate(over="ignore"):
            boxes = xyxy.astype(np.float32)
            areas = _floats([a.area for a in annotations])
        self.objects.append(
            ObjectBlock(
                rows=np.full(count, -1, np.int32),
                xyxy=boxes,
                labels=np.full(count, -1, np.int32),
                flags=flags,
                known_flags=known,
                areas=areas,
                annotation_ids=ids,
                masks=Masks.of(masks) if any(masks) else None,
                columns=columns,
            )
        )

    def _mask(self, annotation: _Annotation) -> Mask:
        found = annotation.segmentation
        if not found:
            return None
        try:
            if isinstance(found, _Runs):
                height, width = found.size
                counts = found.counts
                runs = rle.uncompress(counts.encode()) if isinstance(counts, str) else np.array(counts, np.int64)
                return rle.from_counts(runs, (height, width))
            return polygons(found)
        except (DataError, OverflowError, UnicodeEncodeError) as error:
            self._note(annotation.image_id, annotation.id, "mask cannot be read", "mask dropped", str(error))
            return None

    def finish(self, split: str) -> Reading:
        for key in ("images", "annotations", "categories"):
            if key not in self.seen:
                remedy = "A COCO file holds the lists 'images', 'annotations' and 'categories'."
                raise DataError(f"the list '{key}' is missing", where=self.path, remedy=remedy)
        space, category_ids = self._label_space()
        images = self._join_images()
        objects, image_ids = self._join_objects(category_ids)
        rows = lookup(images.ids, image_ids)
        unknown = np.flatnonzero(rows < 0)
        numbers = np.zeros(0, np.int64) if objects.annotation_ids is None else objects.annotation_ids[unknown]
        for number, image in zip(numbers.tolist(), image_ids[unknown].tolist(), strict=True):
            self._note(image, number, "annotation for an unknown image", "dropped", f"image id {image}")
        objects = dataclasses.replace(objects, rows=rows.astype(np.int32))
        if len(unknown):
            objects = take_objects(objects, np.flatnonzero(rows >= 0))
        if self.mask_files:
            values = np.concatenate(self.mask_values)[rows >= 0]
            objects, lost = masks_in_files(self.path.parent, images, self.mask_files, objects, values)
            self.issues.extend(lost)
        if self.lists:
            checked = verdicts(self.lists, images.ids, objects.rows, objects.labels, category_ids, where=self.path)
            images = dataclasses.replace(images, verified=checked)
        return Reading(
            name=self.path.name,
            split=split,
            roots=_roots(self.path, split),
            label_space=space,
            images=images,
            objects=objects,
            issues=self._named_issues(images),
        )

    def _label_space(self) -> tuple[LabelSpace, Array]:
        """The categories by rising id, and their ids."""
        categories = sorted(self.categories, key=lambda category: category.id)
        for first, second in itertools.pairwise(categories):
            if first.id == second.id:
                what = f"the category id {first.id} stands twice ('{first.name}' and '{second.name}')"
                raise DataError(what, where=self.path)
        try:
            space = LabelSpace(
                names=tuple(category.name for category in categories),
                supercategories=tuple(category.supercategory for category in categories),
                ids=tuple(category.id for category in categories),
            )
        except DataError as error:
            raise DataError(error.what, where=self.path, remedy=error.remedy) from None
        return space, np.array(space.ids, np.int64)

    def _join_images(self) -> ImageBlock:
        blocks = self.images
        names = sorted({name for block in blocks for name in block.columns})
        images = ImageBlock(
            ids=np.concatenate([block.ids for block in blocks]),
            names=Strings.concatenate([block.names for block in blocks]),
            widths=np.concatenate([block.widths for block in blocks]),
            heights=np.concatenate([block.heights for block in blocks]),
            semantic=join_texts([(block.semantic, len(block)) for block in blocks]),
            columns={name: join_columns([(b.columns.get(name), len(b)) for b in blocks]) for name in names},
        )
        first = lookup(images.ids, images.ids) == np.arange(len(images))
        if first.all():
            return images
        for row in np.flatnonzero(~first).tolist():
            self.issues.append(
                Issue(images.names[row], None, "image id stands twice", "dropped", f"id {images.ids[row]}")
            )
        return take_images(images, np.flatnonzero(first))

    def _join_objects(self, known: Array) -> tuple[ObjectBlock, Array]:
        """All objects with their labels, still without rows, and their image ids."""
        blocks, names = self.objects, sorted({name for block in self.objects for name in block.columns})
        annotation_ids = np.concatenate([block.annotation_ids for block in blocks if block.annotation_ids is not None])
        category_ids = np.concatenate(self.category_ids)
        labels = lookup(known, category_ids).astype(np.int32)
        unknown = np.flatnonzero(labels < 0)
        if len(unknown):
            at = int(unknown[0])
            what = f"annotation {annotation_ids[at]} has the category id {category_ids[at]}, which 'categories' lacks"
            remedy = "Add the category to the file, or remove its annotations."
            raise DataError(what, where=self.path, remedy=remedy)
        del category_ids
        objects = ObjectBlock(
            rows=np.full(len(labels), -1, np.int32),
            xyxy=np.concatenate([block.xyxy for block in blocks]),
            labels=labels,
            flags=np.concatenate([block.flags for block in blocks if block.flags is not None]),
            known_flags=np.concatenate([block.known_flags for block in blocks if block.known_flags is not None]),
            areas=np.concatenate([block.areas for block in blocks if block.areas is not None]),
            annotation_ids=annotation_ids,
            masks=join_masks([(block.masks, len(block)) for block in blocks]),
            columns={name: join_columns([(b.columns.get(name), len(b)) for b in blocks]) for name in names},
        )
        self.objects = []
        return objects, np.concatenate(self.image_ids)

    def _note(self, image_id: int | None, number: int | None, what: str, action: str, detail: str) -> None:
        self.notes.append((image_id, number, what, action, detail))

    def _named_issues(self, images: ImageBlock) -> tuple[Issue, ...]:
        wanted = np.array([-1 if note[0] is None else note[0] for note in self.notes], np.int64)
        found = []
        for row, note in zip(lookup(images.ids, wanted).tolist(), self.notes, strict=True):
            name = images.names[row] if row >= 0 and note[0] is not None else ""
            found.append(Issue(name, *note[1:]))
        return (*self.issues, *found)


def _too_large(elements: Iterable[Any]) -> str:
    """Names the first number that its column does not hold."""
    for element, (key, bits) in itertools.product(elements, _BITS.items()):
        value = getattr(element, key, None)
        if isinstance(value, int) and not -(1 << bits) <= value < 1 << bits:
            return f"the {key} {value}"
    return "a number"


def _id(value: Any) -> int | None:
    return value if isinstance(value, int) and -(1 << 63) <= value < 1 << 63 else None


def _floats(values: list[float | None]) -> Array:
    return np.array(values, np.float64).astype(np.float32)


def _roots(path: Path, split: str) -> tuple[Path, ...]:
    """Where the pictures of an annotation file usually lie, the likeliest first."""
    folder, name = path.parent.absolute(), split or path.stem
    near = (folder / "images", folder, folder / "images" / name, folder / name)
    above = folder.parent
    return (*near, above / "images", above / "images" / name, above / name, above)
