"""import(export(index)) == index, in every column that the format holds."""

from pathlib import Path

import numpy as np
import pytest

from gesso.data.export import export
from gesso.data.importing import import_data
from gesso.data.index import Index
from gesso.data.index_writer import IndexWriter
from gesso.data.pictures import read_headers
from gesso.data.records import (
    DIFFICULT,
    OCCLUDED,
    POLYGONS,
    RLE,
    TRUNCATED,
    ImageBlock,
    Masks,
    ObjectBlock,
    Rle,
    Source,
    Strings,
)
from gesso.data.rle import encode
from gesso.data.select import _images, _objects

from .sample_index import SPACE, write_index

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
COLUMNS = ("xyxy", "label", "flag", "known_flag", "area", "annotation_id", "offset")


def true_index(tmp_path, **options) -> Index:
    """The sample with true content hashes and masks, and the columns that the COCO reader knows."""
    sample = write_index(tmp_path / "sample", **options)
    rows = np.arange(len(sample))
    images, objects = _images(sample, rows), _objects(sample, rows, 0)
    hashes = [h.content_hash for h in read_headers(sample.image_path(i) for i in rows)]
    masks = []
    for k in range(len(objects)):
        mask = None if objects.masks is None else objects.masks[k]
        if isinstance(mask, Rle):
            pixels = np.zeros(mask.size, np.uint8)
            x1, y1, x2, y2 = objects.xyxy[k].astype(int)
            pixels[y1 : y2 + 1, x1 : x2 + 1] = 1
            mask = encode(pixels)
        masks.append(mask)
    block = ImageBlock(
        ids=images.ids,
        names=images.names,
        widths=images.widths,
        heights=images.heights,
        hashes=np.array(hashes, np.uint64),
        orientations=images.orientations,
        columns={"license": Strings.of(str(i % 3) for i in rows)},
    )
    columns = {"vis_ratio": objects.columns["vis_ratio"]} if objects.columns else {}
    writer = IndexWriter(tmp_path / "true", SPACE, sources=[Source(name="x", root=sample.sources[0].root)])
    writer.add_images(block)
    writer.add_objects(
        ObjectBlock(
            rows=objects.rows,
            xyxy=objects.xyxy,
            labels=objects.labels,
            flags=objects.flags,
            known_flags=objects.known_flags,
            areas=objects.areas,
            annotation_ids=objects.annotation_ids,
            masks=Masks.of(masks) if any(m is not None for m in masks) else None,
            columns=columns,
        )
    )
    return Index.open(writer.finish())


def assert_equal_columns(a: Index, b: Index, names):
    for name in names:
        assert np.array_equal(a._load(name), b._load(name)), name


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("pictures", ["none", "link", "copy"])
def test_coco_comes_back_in_all_columns(tmp_path, rich, pictures):
    index = true_index(tmp_path, rich=rich)
    export(index, tmp_path / "out", pictures=pictures)
    root = index.sources[0].root if pictures == "none" else None
    import_data(tmp_path / "out", tmp_path / "back", images_root=root, label_space=index.label_space)
    back = Index.open(tmp_path / "back")
    assert back.issues() == [] and back.label_space == index.label_space
    assert index._head["columns"].keys() == back._head["columns"].keys()
    assert (index._head["image_columns"], index._head["object_columns"]) == (
        back._head["image_columns"],
        back._head["object_columns"],
    )
    assert_equal_columns(index, back, index._head["columns"])
    assert rich == (back.mask_columns is not None)
    if rich:
        assert {POLYGONS, RLE} <= set(back.mask_columns.kinds.tolist())


def test_coco_alone_keeps_the_categories(tmp_path):
    index = true_index(tmp_path)
    export(index, tmp_path / "out.json")
    import_data(tmp_path / "out.json", tmp_path / "back", images=False)
    space = Index.open(tmp_path / "back").label_space
    order = np.argsort(SPACE.ids)
    assert space.names == tuple(SPACE.names[i] for i in order) and space.ids == tuple(sorted(SPACE.ids))
    assert space.supercategories == tuple(SPACE.supercategories[i] for i in order)


@pytest.mark.parametrize("whole", [True, False])
def test_voc_comes_back(tmp_path, whole):
    index = true_index(tmp_path, whole_pixels=whole)
    export(index, tmp_path / "out", "voc", pictures="link")
    import_data(tmp_path / "out", tmp_path / "back", label_space=index.label_space)
    back = Index.open(tmp_path / "back")
    assert back.issues() == []
    assert list(back.names) == list(index.names)
    assert_equal_columns(index, back, ("xyxy", "label", "offset", "width", "height", "content_hash"))
    held = TRUNCATED | DIFFICULT | OCCLUDED
    assert np.array_equal(back.flags, index.flags & held) and np.array_equal(back.known_flags, index.known_flags & held)


def test_yolo_comes_back(tmp_path):
    index = true_index(tmp_path)
    export(index, tmp_path / "out", "yolo", pictures="link")
    import_data(tmp_path / "out", tmp_path / "back")
    back = Index.open(tmp_path / "back")
    assert back.issues() == [] and back.label_space.names == index.label_space.names
    rows = {name.removeprefix("images/train/"): i for i, name in enumerate(back.names)}
    polygons = 0
    for i in range(len(index)):
        k = rows[index.name(i)]
        assert (back.widths[k], back.heights[k], back.content_hashes[k]) == (
            index.widths[i],
            index.heights[i],
            index.content_hashes[i],
        )
        assert np.array_equal(index.objects(i).xyxy, back.objects(k).xyxy)
        assert np.array_equal(index.objects(i).labels, back.objects(k).labels)
        for a, b in zip(index.masks(i), back.masks(k), strict=True):
            if b is not None:
                polygons += 1
                assert len(a.rings) == 1 and np.array_equal(a.rings[0], b.rings[0])
    assert polygons > 5


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared image sets are not here")
@pytest.mark.parametrize("name", ["raccoon", "coco_mini"])
def test_real_sets_come_back(tmp_path, name):
    import_data(SHARED / name, tmp_path / "index", split="val")
    index = Index.open(tmp_path / "index")
    export(index, tmp_path / "out.json")
    import_data(tmp_path / "out.json", tmp_path / "back", images_root=index.sources[0].root)
    back = Index.open(tmp_path / "back")
    assert back.label_space == index.label_space
    assert_equal_columns(index, back, index._head["columns"])
    for kind in ("voc", "yolo"):
        export(index, tmp_path / kind, kind, pictures="link")
        space = index.label_space
        import_data(tmp_path / kind, tmp_path / f"{kind}_back", label_space=space)
        back = Index.open(tmp_path / f"{kind}_back")
        order = {name.split("/")[-1].rsplit(".")[0]: i for i, name in enumerate(back.names)}
        for i in range(len(index)):
            k = order[index.name(i).split("/")[-1].rsplit(".")[0]]
            assert np.array_equal(index.objects(i).labels, back.objects(k).labels)
            tolerance = 0 if kind == "voc" else 0.1  # a YOLO polygon's extent stands for its box
            assert np.abs(index.objects(i).xyxy - back.objects(k).xyxy).max(initial=0) <= tolerance
