"""Detection files: COCO results JSON (boxes as x, y, width, height) and the same columns as Parquet.

Both are read in pieces and kept as columns, so that half a million detections take a fraction of a second and never
become half a million Python objects at once. Numbers are kept as the file has them, in float64.
"""

import mmap
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gesso.data.records import Array, Masks, Rle
from gesso.errors import DataError, InputError
from gesso.evaluation.detections import DetectionTable
from gesso.evaluation.masks import areas_and_boxes, first_broken, pack, to_coco
from gesso.files import atomic_file

_PIECE = 1 << 18
_BETWEEN = re.compile(rb"\}\s*,\s*\{")
_NOT_A_NUMBER = re.compile(rb"-?(NaN|Infinity)")
_WRITE_ROWS = 20_000
_COLUMNS = ("image_id", "category_id", "score", "x", "y", "width", "height")
_Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _Row(msgspec.Struct, gc=False):
    image_id: _Id
    category_id: _Id
    score: float
    bbox: tuple[float, float, float, float]


class _MaskRow(msgspec.Struct, gc=False):
    image_id: _Id
    category_id: _Id
    score: float
    bbox: tuple[float, float, float, float] | None = None
    segmentation: Any = None


def read_detections(path: str | Path, category_ids: Sequence[int], *, masks: bool = False) -> DetectionTable:
    """Reads a detection file; ``.parquet`` is Parquet, everything else COCO results JSON.

    Rows without a box take the tight box and the area of their mask, as pycocotools does.

    Args:
        path: the file.
        category_ids: the category ids in the order of the labels (``LabelSpace.ids``, ``GroundTruth.category_ids``).
        masks: read the masks too; every row must have one then.

    Raises:
        DataError: the file is missing, breaks off, lacks a key, has a category id that is not in ``category_ids``, or
            a number that is not finite. The row (counted from 0) or the byte is named.
    """
    path = Path(path)
    try:
        read = _read_parquet if path.suffix == ".parquet" else _read_json
        columns = read(path, masks)
    except OSError as error:
        raise DataError(error.strerror or str(error), where=path, remedy="Check the path.") from error
    image_id, category_id, score, xywh, areas, packed = columns
    _check_finite(path, score, xywh)
    xyxy = xywh.copy()
    xyxy[:, 2:] += xywh[:, :2]
    label = _labels(path, category_id, category_ids)
    return DetectionTable(image_id=image_id, label=label, score=score, xyxy=xyxy, masks=packed, xywh=xywh, areas=areas)


_Columns = tuple[Array, Array, Array, Array, Array | None, Masks | None]


def _labels(path: Path, category_id: Array, category_ids: Sequence[int]) -> Array:
    known = np.asarray(category_ids, np.int64)
    order = np.argsort(known)
    if not len(known):
        found = np.zeros(len(category_id), bool)
    else:
        at = np.minimum(np.searchsorted(known, category_id, sorter=order), len(known) - 1)
        found = known[order[at]] == category_id
    if not found.all():
        row = int(np.argmin(found))
        shown = ", ".join(str(i) for i in sorted(category_ids)[:8]) + (", ..." if len(category_ids) > 8 else "")
        raise DataError(
            f"result {row} (counted from 0) has the unknown category id {category_id[row]}",
            where=path,
            remedy=f"Use the category ids of the ground truth: {shown or 'it has none'}.",
        )
    return order[at] if len(known) else np.zeros(0, np.int64)


def _check_finite(path: Path, score: Array, xywh: Array) -> None:
    for what, finite in (("score", np.isfinite(score)), ("box", np.isfinite(xywh).all(1))):
        if not finite.all():
            row = int(np.argmin(finite))
            value = score[row] if what == "score" else xywh[row].tolist()
            raise DataError(
                f"the {what} of result {row} (counted from 0) is not finite: {value}",
                where=path,
                remedy="Leave such detections out; a model that makes them has diverged.",
            )


def _read_json(path: Path, masks: bool) -> _Columns:
    if path.is_dir():
        raise DataError("this is a folder, not a detection file", where=path, remedy="Name the JSON or Parquet file.")
    if not path.stat().st_size:
        raise DataError("the file is empty", where=path, remedy="A file without detections holds []")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if not masks:
            try:
                return _join([_box_columns(rows) for rows in _decode(path, data, _Row)])
            except DataError as error:
                if "`bbox`" not in error.what:
                    raise
        first = 0
        pieces = []
        for rows in _decode(path, data, _MaskRow):
            pieces.append(_mask_columns(path, rows, first, masks))
            first += len(rows)
        return _join(pieces)


def _decode(path: Path, data: mmap.mmap, kind: type) -> Iterator[list[Any]]:
    """The rows of a JSON list, piece by piece; the pieces are cut between rows.

    A cut can only go wrong where a string holds "},{"; then, and where the file is broken, it is decoded as one.
    """
    decoder: msgspec.json.Decoder[list[Any]] = msgspec.json.Decoder(list[kind])  # type: ignore[valid-type]
    done = 0
    try:
        for piece in _pieces(data):
            rows = decoder.decode(piece)
            done += len(rows)
            yield rows
    except msgspec.DecodeError:
        try:
            yield decoder.decode(data)[done:]
        except msgspec.DecodeError as error:
            raise _explain(path, data, error) from error


def _pieces(data: mmap.mmap) -> Iterator[bytes]:
    start, end = data.find(b"["), data.rfind(b"]")
    if data[: max(start, 0)].strip() or data[end + 1 :].strip() or end < 0:
        raise msgspec.DecodeError("not one list")
    start += 1
    while True:
        cut = _BETWEEN.search(data, min(start + _PIECE, end), end)
        stop = cut.start() + 1 if cut else end
        yield b"[" + data[start:stop] + b"]"
        if cut is None:
            return
        start = cut.end() - 1


def _explain(path: Path, data: mmap.mmap, error: msgspec.DecodeError) -> DataError:
    text = str(error)
    at = re.search(r"\(byte (\d+)\)", text)
    row = re.search(r"\$\[(\d+)\]", text)
    if isinstance(error, msgspec.ValidationError):
        what = text.split(" - at ")[0]
        if row is None:
            return DataError(
                f"this is not a list of detections: {what}",
                where=path,
                remedy='COCO results are [{"image_id": 1, "category_id": 1, "bbox": [x, y, w, h], "score": 0.5}, ...].',
            )
        key = re.search(r"\]\.(\w+)", text)
        place = f"result {row[1]} (counted from 0)" + (f", key '{key[1]}'" if key else "")
        return DataError(f"{place}: {what}", where=path, remedy="Every result needs image_id, category_id and score.")
    position = int(at[1]) if at else len(data)
    if _NOT_A_NUMBER.match(data, position):
        what = f"NaN or Infinity at byte {position}: scores and boxes must be finite"
        return DataError(what, where=path, remedy="Leave such detections out.")
    line = data[:position].count(b"\n") + 1
    what = re.sub(r"\s*\(byte \d+\)", "", text)
    return DataError(
        f"this is not valid JSON: {what} at byte {position} (line {line})",
        where=path,
        remedy="The file may have been cut off: write it again.",
    )


def _box_columns(rows: list[Any]) -> _Columns:
    count = len(rows)
    return (*_numbers(rows), _boxes([row.bbox for row in rows], count), None, None)


def _numbers(rows: list[Any]) -> tuple[Array, Array, Array]:
    count = len(rows)
    return (
        np.fromiter(map(attrgetter("image_id"), rows), np.int64, count),
        np.fromiter(map(attrgetter("category_id"), rows), np.int64, count),
        np.fromiter(map(attrgetter("score"), rows), np.float64, count),
    )


def _boxes(boxes: list[Any], count: int) -> Array:
    return np.fromiter(chain.from_iterable(boxes), np.float64, 4 * count).reshape(-1, 4)


def _mask_columns(path: Path, rows: list[Any], first: int, keep: bool) -> _Columns:
    """``first`` is the number of the first row in the file; without ``keep`` masks serve to find boxes only."""
    packed: list[Rle | None] = []
    for number, row in enumerate(rows, first):
        place = f"result {number} (counted from 0)"
        if row.segmentation is None and (keep or row.bbox is None):
            missing = "segmentation" if keep else "bbox"
            raise DataError(
                f"{place}: Object missing required field `{missing}`",
                where=path,
                remedy="Masks are scored with a segmentation, boxes with a bbox.",
            )
        packed.append(_pack(path, place, row.segmentation) if keep or row.bbox is None else None)
    kept = [(number, mask) for number, mask in enumerate(packed, first) if mask is not None]
    broken = first_broken([mask for _, mask in kept])
    if broken is not None:
        place = f"result {kept[broken][0]} (counted from 0)"
        raise DataError(f"{place}: the mask is broken", where=path, remedy="Encode the mask again.")
    xywh = _boxes([row.bbox or (0.0, 0.0, 0.0, 0.0) for row in rows], len(rows))
    areas = xywh[:, 2] * xywh[:, 3]
    bare = [i for i, row in enumerate(rows) if row.bbox is None]
    areas[bare], xywh[bare] = areas_and_boxes([mask for i in bare if (mask := packed[i]) is not None])
    return (*_numbers(rows), xywh, areas if bare else None, Masks.of(packed) if keep else None)


def _pack(path: Path, place: str, segmentation: Any) -> Rle:
    if not isinstance(segmentation, dict):
        raise DataError(
            f"{place}: the mask is no run-length encoding",
            where=path,
            remedy='Write it as {"size": [height, width], "counts": ...}.',
        )
    try:
        return pack(segmentation)
    except DataError as error:
        raise DataError(f"{place}: {error.what}", where=path, remedy="Encode the mask again.") from error


def _join(pieces: list[_Columns]) -> _Columns:
    """One set of columns; ``areas`` are filled from the boxes where only some pieces have them."""
    boxes = [piece[3] for piece in pieces]
    areas: Array | None = None
    if any(piece[4] is not None for piece in pieces):
        sized = [b[:, 2] * b[:, 3] if piece[4] is None else piece[4] for b, piece in zip(boxes, pieces, strict=True)]
        areas = np.concatenate(sized)
    masks = [piece[5] for piece in pieces if piece[5] is not None]
    first, second, third = (np.concatenate([piece[k] for piece in pieces]) for k in range(3))
    return first, second, third, np.concatenate(boxes), areas, Masks.concatenate(masks) if masks else None


def _read_parquet(path: Path, masks: bool) -> _Columns:
    names = [*_COLUMNS, *(("mask_height", "mask_width", "mask_counts") if masks else ())]
    try:
        with pq.ParquetFile(path) as file:
            present = set(file.schema_arrow.names)
            missing = [name for name in names if name not in present]
            if missing:
                raise DataError(
                    f"the column '{missing[0]}' is missing", where=path, remedy=f"Needed: {', '.join(names)}."
                )
            table = file.read(columns=names + (["area"] if "area" in present else []))
    except pa.ArrowException as error:
        text = str(error).splitlines()[0]
        raise DataError(f"this is not a Parquet file: {text}", where=path, remedy="Write it again.") from error
    for name in _COLUMNS:
        if table[name].null_count:
            row = table[name].is_null().to_pylist().index(True)
            raise DataError(f"result {row} (counted from 0) has no '{name}'", where=path, remedy="Write it again.")
        number = pa.types.is_integer if name.endswith("_id") else pa.types.is_floating
        if not number(table[name].type):
            what = f"the column '{name}' holds {table[name].type}"
            raise DataError(what, where=path, remedy="Ids are integers, everything else floats.")
    ids = (table[name].to_numpy().astype(np.int64) for name in ("image_id", "category_id"))
    score, *sides = (table[name].to_numpy().astype(np.float64) for name in _COLUMNS[2:])
    packed = None
    if masks:
        parts = zip(*(table[name].to_pylist() for name in names[-3:]), strict=True)
        packed = Masks.of([Rle((height, width), counts) for height, width, counts in parts])
    areas = table["area"].to_numpy().astype(np.float64) if "area" in present else None
    image_id, category_id = ids
    return image_id, category_id, score, np.stack(sides, axis=1), areas, packed


def write_detections(table: DetectionTable, path: str | Path, category_ids: Sequence[int]) -> None:
    """Writes a detection file whole or not at all; ``.parquet`` is Parquet, everything else COCO results JSON.

    Reading it back gives the same numbers, bit for bit; ``areas`` without masks are kept by Parquet alone.

    Args:
        table: the detections.
        path: the file; its folder is made where it is missing.
        category_ids: the category id of each label (``LabelSpace.ids``).

    Raises:
        InputError: two classes share a category id, or the file cannot be written.
    """
    path = Path(path)
    if len(set(category_ids)) != len(category_ids):
        raise InputError(
            "two categories have the same id, so a detection file could not be read back",
            where=path,
            remedy="Give every category of the label space an id of its own.",
        )
    with atomic_file(path) as temporary:
        if path.suffix == ".parquet":
            _write_parquet(table, temporary, category_ids)
        else:
            _write_json(table, temporary, category_ids)


def _write_json(table: DetectionTable, path: Path, category_ids: Sequence[int]) -> None:
    encoder = msgspec.json.Encoder()
    ids = np.asarray(category_ids, np.int64)
    boxes = table.boxes_xywh()
    bare = table.sizes() != boxes[:, 2] * boxes[:, 3]
    with path.open("wb") as file:
        file.write(b"[")
        for start in range(0, len(table), _WRITE_ROWS):
            at = slice(start, start + _WRITE_ROWS)
            rows: list[dict[str, Any]] = [
                {"image_id": image, "category_id": category, "bbox": box, "score": score}
                for image, category, box, score in zip(
                    table.image_id[at].tolist(),
                    ids[table.label[at]].tolist(),
                    boxes[at].tolist(),
                    table.score[at].tolist(),
                    strict=True,
                )
            ]
            if table.masks is not None:
                for number, row in enumerate(rows, start):
                    rle = to_coco(table.masks[number])
                    row["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
                    if bare[number]:
                        del row["bbox"]
            file.write(b",\n" if start else b"\n")
            file.write(encoder.encode_lines(rows).rstrip(b"\n").replace(b"\n", b",\n"))
        file.write(b"\n]\n")


def _write_parquet(table: DetectionTable, path: Path, category_ids: Sequence[int]) -> None:
    boxes = table.boxes_xywh()
    columns: dict[str, Any] = {
        "image_id": table.image_id,
        "category_id": np.asarray(category_ids, np.int64)[table.label],
        "score": table.score,
        **{name: boxes[:, k] for k, name in enumerate(_COLUMNS[3:])},
    }
    if table.areas is not None:
        columns["area"] = table.areas
    if table.masks is not None:
        masks = [table.masks[i] for i in range(len(table))]
        assert all(isinstance(mask, Rle) for mask in masks), "a detection has no RLE mask"
        rles = [mask for mask in masks if isinstance(mask, Rle)]
        columns["mask_height"] = np.asarray([rle.size[0] for rle in rles], np.int32)
        columns["mask_width"] = np.asarray([rle.size[1] for rle in rles], np.int32)
        columns["mask_counts"] = pa.array([rle.counts for rle in rles], pa.binary())
    pq.write_table(pa.table(columns), path, compression="zstd")
