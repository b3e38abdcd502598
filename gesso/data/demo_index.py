"""The embedded data set as an index."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gesso.data.demo import Progress, make_demo
from gesso.data.demo_scenes import DemoConfig, demo_label_space
from gesso.data.importing import examine
from gesso.data.index import Index
from gesso.data.index_writer import IndexWriter
from gesso.data.readers.coco import read_coco
from gesso.data.readers.lvis import Lists, verdicts
from gesso.data.records import Reading, Verified
from gesso.files import read_json
from gesso.label_space import LabelSpace


def demo_index(folder: Path, config: DemoConfig, *, progress: Progress | None = None) -> Index:
    """The embedded data set as an index, made on the first call: ``folder/pictures`` and ``folder/index``.

    Goes the way of every import, and carries along what only this set's file tells: the relations of the label space,
    what they imply for verified classes, and the object columns ``visible_xyxy`` float32 (M, 4),
    ``occluded_share`` float32 (M,) and ``part_of`` int64 (M,), the annotation id of the whole or 0. An annotation shows
    the classes above its own as well; what hidden or coarse labels leave in doubt is unverified, annotated or not.

    Raises:
        InputError: as ``make_demo``. DataError: the index in the folder is damaged.
    """
    source = make_demo(folder / "pictures", config, progress=progress)
    target = folder / "index"
    if not target.exists():
        space = demo_label_space(config)
        reading = _with_extras(read_coco(source, split=config.split), read_json(source), space)
        examined = examine(reading, space, format="coco", images_root=source.parent)
        writer = IndexWriter(target, space, sources=[examined.source])
        writer.add_images(examined.images)
        writer.add_objects(examined.objects)
        writer.add_issues(examined.issues)
        writer.finish()
    return Index.open(target)


def _with_extras(reading: Reading, document: dict[str, Any], space: LabelSpace) -> Reading:
    """Adds the columns of the keys that are not COCO's; images and annotations are numbered from 1 in this file."""
    numbers = reading.objects.annotation_ids
    assert numbers is not None and reading.label_space.names == space.names
    objects = [document["annotations"][number - 1] for number in numbers.tolist()]
    visible = np.array([item["visible_bbox"] for item in objects], np.float32).reshape(-1, 4)
    visible[:, 2:] += visible[:, :2]
    columns = {
        **reading.objects.columns,
        "visible_xyxy": visible,
        "occluded_share": np.array([item["occluded_share"] for item in objects], np.float32),
        "part_of": np.array([item.get("part_of", 0) for item in objects], np.int64),
    }
    verified = None if reading.images.verified is None else _verified(reading, document["images"], space)
    return replace(
        reading,
        images=replace(reading.images, verified=verified),
        objects=replace(reading.objects, columns=columns),
    )


def _verified(reading: Reading, images: list[dict[str, Any]], space: LabelSpace) -> Verified:
    """LVIS's verdicts, where an annotation shows the classes above its own too."""
    lists = {
        image["id"]: Lists(absent=image["neg_category_ids"], partial=image["not_exhaustive_category_ids"])
        for image in images
        if "neg_category_ids" in image
    }
    shown = [[label, *map(space.index, space.ancestors(name))] for label, name in enumerate(space.names)]
    labels = reading.objects.labels.tolist()
    return verdicts(
        lists,
        reading.images.ids,
        np.repeat(reading.objects.rows, [len(shown[label]) for label in labels]),
        np.array([above for label in labels for above in shown[label]], np.int64),
        np.array(space.ids),
        where=Path(reading.name),
    )
