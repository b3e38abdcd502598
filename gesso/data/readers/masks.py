"""Sets for semantic segmentation: a picture and a map of one number a pixel (``gesso.data.maps``). Known layouts:

images/[SPLIT/]NAME.jpg, masks/[SPLIT/]NAME.png
    or annotations/ in place of masks/, as ADE20K (SceneParse150) has it. The names of the classes stand in
    objectInfo150.txt (ADE20K's table) or classes.txt, one a line; a first line "background" names the value 0.
    Without them they are called "class 1" and on, up to the greatest value of any map.
JPEGImages, SegmentationClass, ImageSets/Segmentation/SPLIT.txt
    PASCAL VOC.
img, cls/NAME.mat, train.txt, val.txt
    SBD (Hariharan et al., "Semantic Contours from Inverse Detectors", ICCV 2011). The maps are drawn as PNGs when
    the index is written.
VOC2012 or VOCdevkit/VOC2012 beside SBD
    "train" is what papers call VOC 2012 + SBD (10,582 pictures): VOC's train, and all of SBD that is neither in it
    nor in VOC's val. Of a picture that both label, VOC's map is taken, which is the finer.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gesso.data.blocks import no_objects
from gesso.data.known_spaces import known_space
from gesso.data.maps import NUMBERING, look_through
from gesso.data.pictures import SUFFIXES
from gesso.data.readers.ids import stable_ids
from gesso.data.readers.mat import read_mat
from gesso.data.readers.voc import lines_of
from gesso.data.records import ImageBlock, Issue, Reading, Strings
from gesso.data.semantic import VOID, Map
from gesso.errors import DataError
from gesso.label_space import LabelSpace, normalise

_SPLIT = re.compile(r"(train|training|trainval|val|valid|validation|test|testing)[-_]?\d*", re.IGNORECASE)
_MAPS = ("masks", "annotations")
_VOC = ("", "VOC2012", "VOCdevkit/VOC2012", "VOC2007", "VOCdevkit/VOC2007")
_SBD = ("", "dataset", "SBD", "SBD/dataset", "benchmark_RELEASE/dataset", "benchmark/benchmark_RELEASE/dataset")
_VOC_ALONE = "train-voc"


class _Pair(NamedTuple):
    """A picture and its map as paths relative to the source; the map is "" where it has to be drawn."""

    picture: str
    map: str


def mask_splits(folder: Path) -> list[tuple[str, bool]]:
    """The splits of a set for segmentation, and whether each is taken only by name; [] where the folder is none."""
    voc, sbd = _voc(folder), _sbd(folder)
    if voc is not None and sbd is not None:
        return [("train", False), ("val", False), (_VOC_ALONE, True)]
    if voc is not None:
        splits = sorted(file.stem for file in (voc / "ImageSets" / "Segmentation").glob("*.txt"))
        return [(split, split == "trainval" and {"train", "val"} <= set(splits)) for split in splits]
    if sbd is not None:
        return [(split, False) for split in ("train", "val") if (sbd / f"{split}.txt").is_file()]
    maps = _maps(folder)
    return [] if maps is None else [(split, False) for split in _folders(folder, maps) or [""]]


def read_masks(folder: Path, *, split: str = "", progress: Callable[[int], None] | None = None) -> Reading:
    """Reads one split of a set for segmentation; ``progress`` is told the number of pictures found.

    An image's id is a hash of its name.

    Raises:
        DataError: the split or its list is missing, no picture has a map, no map shows a class, or the names of the
            classes cannot be used.
    """
    voc, sbd = _voc(folder), _sbd(folder)
    issues: list[Issue] = []
    draw = None
    if voc is None and sbd is None:
        maps = _maps(folder)
        if maps is None:
            remedy = "Pictures should lie in images/, and their maps under the same names in masks/."
            raise DataError("holds no semantic maps", where=folder, remedy=remedy)
        pairs = list(_named_alike(folder, maps, split, issues))
        space = _space(folder, maps)
    else:
        space = known_space("voc")
        if sbd is not None and (voc is None or split == "train"):
            pairs = _with_sbd(folder, voc, sbd, split)
            draw = _drawer(sbd)
        else:
            assert voc is not None
            pairs = list(_voc_pairs(folder, voc, "train" if split == _VOC_ALONE and sbd else split))
    if not pairs:
        raise DataError(f"no picture of the split '{split}' has a semantic map", where=folder)
    if progress is not None:
        progress(len(pairs))
    names = [pair.picture for pair in pairs]
    return Reading(
        name=folder.absolute().name,
        split=split,
        roots=(folder.absolute(),),
        label_space=space,
        images=ImageBlock(
            ids=stable_ids(names),
            names=Strings.of(names),
            widths=np.zeros(len(names), np.int32),
            heights=np.zeros(len(names), np.int32),
            semantic=Strings.of(pair.map for pair in pairs),
        ),
        objects=no_objects(),
        issues=tuple(issues),
        truth="map",
        draw=draw,
    )


def _voc(folder: Path) -> Path | None:
    places = (folder / place for place in _VOC)
    return next((p for p in places if (p / "ImageSets" / "Segmentation").is_dir() and _has_voc_maps(p)), None)


def _has_voc_maps(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in ("SegmentationClass", "SegmentationClassAug"))


def _sbd(folder: Path) -> Path | None:
    places = (folder / place for place in _SBD)
    return next((p for p in places if (p / "img").is_dir() and next((p / "cls").glob("*.mat"), None)), None)


def _voc_pairs(folder: Path, voc: Path, split: str) -> Iterator[_Pair]:
    """The pictures of VOC's list; a line of two paths, as lists of more pictures have it, names the map too."""
    file = voc / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not file.is_file():
        raise DataError("the list of the split is missing", where=file)
    above = voc.relative_to(folder)
    for line in lines_of(file):
        words = [word.strip("/") for word in line.split()]
        if len(words) == 2:
            yield _Pair((above / words[0]).as_posix(), (above / words[1]).as_posix())
            continue
        places = [Path(place, f"{line}.png") for place in ("SegmentationClass", "SegmentationClassAug")]
        there = next((place for place in places if (voc / place).is_file()), places[0])
        yield _Pair((above / "JPEGImages" / f"{line}.jpg").as_posix(), (above / there).as_posix())


def _with_sbd(folder: Path, voc: Path | None, sbd: Path, split: str) -> list[_Pair]:
    """SBD's own split or, beside VOC, VOC's train and then all further pictures of SBD that are not in VOC's val."""
    own = [] if voc is None else list(_voc_pairs(folder, voc, "train"))
    known = set() if voc is None else {Path(pair.picture).stem for pair in (*own, *_voc_pairs(folder, voc, "val"))}
    lists = [sbd / f"{name}.txt" for name in ([split] if voc is None else ["train", "val"])]
    for file in lists:
        if not file.is_file():
            raise DataError("the list of the split is missing", where=file)
    further = [name for file in lists for name in lines_of(file) if name not in known]
    pictures = sbd / "img" if voc is None or not (voc / "JPEGImages").is_dir() else voc / "JPEGImages"
    above = pictures.relative_to(folder)
    return own + [_Pair((above / f"{name}.jpg").as_posix(), "") for name in dict.fromkeys(further)]


def _drawer(sbd: Path) -> Callable[[str], Map]:
    def draw(name: str) -> Map:
        file = sbd / "cls" / f"{Path(name).stem}.mat"
        (record,) = read_mat(file, "GTcls")
        pixels = np.asarray(getattr(record, "Segmentation", None))
        if pixels.ndim != 2 or pixels.dtype.kind not in "iu" or not 0 <= pixels.min() <= pixels.max() <= VOID:
            raise DataError("GTcls.Segmentation is no map of 8-bit numbers", where=file)
        return pixels.astype(np.uint8)

    return draw


def _maps(folder: Path) -> Path | None:
    """The folder of maps beside images/."""
    if not (folder / "images").is_dir():
        return None
    places = (folder / name for name in _MAPS)
    return next((place for place in places if next(place.rglob("*.png"), None)), None)


def _folders(folder: Path, maps: Path) -> list[str]:
    """The splits: the folders in ``maps`` that images/ has too, if all of them are called like splits."""
    inner = (entry.name for entry in maps.iterdir() if entry.is_dir())
    both = sorted(name for name in inner if (folder / "images" / name).is_dir())
    return both if all(_SPLIT.fullmatch(name) for name in both) else []


def _named_alike(folder: Path, maps: Path, split: str, issues: list[Issue]) -> Iterator[_Pair]:
    pictures, masks = folder / "images" / split, maps / split
    if not pictures.is_dir() or not masks.is_dir():
        raise DataError(f"holds no folder of the split '{split}'", where=folder)
    used = set()
    for picture in sorted(file for file in pictures.rglob("*") if file.suffix.lower() in SUFFIXES):
        mask = (masks / picture.relative_to(pictures)).with_suffix(".png")
        name = picture.relative_to(folder).as_posix()
        if mask.is_file():
            used.add(mask)
            yield _Pair(name, mask.relative_to(folder).as_posix())
        else:
            issues.append(Issue(name, None, "picture without a semantic map", "left out", f"sought {mask}"))
    for mask in sorted(set(masks.rglob("*.png")) - used):
        issues.append(Issue("", None, "semantic map without a picture", "left out", str(mask)))


def _space(folder: Path, maps: Path) -> LabelSpace:
    table, listed = folder / "objectInfo150.txt", folder / "classes.txt"
    if table.is_file():
        return _named(_first_words(table), table)
    if listed.is_file():
        names = lines_of(listed)
        return _named(names[1:] if names and normalise(names[0]) == "background" else names, listed)
    files = sorted(maps.rglob("*.png"))
    looks = list(look_through(files, itertools.repeat((0, 0), len(files)), VOID - 1))
    seen = np.flatnonzero(np.any([found.values for found in looks], 0)[:VOID])
    if not len(seen) or not seen[-1]:
        told = next((f" ({found.what}: {found.detail})" for found in looks if found.what), "")
        raise DataError(f"no semantic map shows a class{told}", where=maps, remedy=NUMBERING)
    return LabelSpace.from_names(f"class {value}" for value in range(1, int(seen[-1]) + 1))


def _first_words(table: Path) -> list[str]:
    """The names of ADE20K's table: of several for one class the first, unless another class has it too."""
    columns = [line.split("\t")[-1].strip() for line in lines_of(table)[1:]]
    short = [re.split(r"[,;]", name)[0].strip() for name in columns]
    return [name if short.count(name) == 1 else whole for name, whole in zip(short, columns, strict=True)]


def _named(names: Iterable[str], file: Path) -> LabelSpace:
    try:
        space = LabelSpace.from_names(names)
    except DataError as error:
        raise DataError(error.what, where=file) from None
    if not 0 < len(space) < VOID:
        raise DataError(f"names {len(space)} classes; a map can hold 1 to {VOID - 1}", where=file)
    return space
