"""File names of an export: where the files of an image stand below a folder."""

from collections.abc import Callable
from pathlib import PurePosixPath

from gesso.data.index import Index
from gesso.errors import DataError


def safe_name(index: Index, row: int) -> str:
    """The name of an image, which must stay below the folder that it is put in.

    Raises:
        DataError: the name is absolute or climbs with "..".
    """
    name = index.name(row)
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise DataError(
            f"the picture '{name}' stands outside of its folder, so it has no place in an export",
            where=index.path,
            remedy="Import the data with a higher --images-root.",
        )
    return str(path)


def yolo_name(index: Index, row: int) -> str:
    """The name of an image below images/SPLIT. YOLO finds the labels by the last folder called images, so there is one.

    Raises:
        DataError: as ``safe_name``.
    """
    parts = PurePosixPath(safe_name(index, row)).parts
    for layout in (("images", split_name(index, row)), ("images",)):
        if len(parts) > len(layout) and parts[: len(layout)] == layout:
            parts = parts[len(layout) :]
    *folders, name = parts
    return str(PurePosixPath(*("pictures" if folder == "images" else folder for folder in folders), name))


def stems(index: Index, name: Callable[[Index, int], str] = safe_name) -> list[str]:
    """The names of all images without their endings; ``name`` as in ``safe_name`` or ``yolo_name``.

    Raises:
        DataError: two images have the same, so that their label files would be one.
    """
    found: dict[str, int] = {}
    for row in range(len(index)):
        stem = str(PurePosixPath(name(index, row)).with_suffix(""))
        if stem in found:
            raise DataError(
                f"'{index.name(found[stem])}' and '{index.name(row)}' would share one label file",
                where=index.path,
                remedy="Rename one of the pictures, or export COCO.",
            )
        found[stem] = row
    return list(found)


def split_name(index: Index, row: int) -> str:
    """The split that an image's source names; "train" where it names none."""
    return index.sources[index.source_rows[row]].split or "train"
