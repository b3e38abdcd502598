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
from gesso.data.records import Reading, Verified
from gesso.files import read_json
from gesso.label_space import LabelSpace


def demo_index(folder: Path, config: DemoConfig, *, progress: Progress | None = None) -> Index:
    """The embedded data set as an index, made on the first call: ``folder/pictures`` and ``folder/index``.

    Goes the way of every import, and carries along what only this set's file tells: the relations of the label space,
    what they imply for verified classes, and the object columns ``visible_xyxy`` float32 (M, 4),
    ``occluded_share`` float32 (M,) and ``part_of`` int64 (M,), the annotation id of the whole or 0.

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
    images = [document["images"][number - 1] for number in reading.images.ids.tolist()]
    objects = [document["annotations"][number - 1] for number in numbers.tolist()]
    visible = np.array([item["visible_bbox"] for item in objects], np.float32).reshape(-1, 4)
    visible[:, 2:] += visible[:, :2]
    columns = {
        **reading.objects.columns,
        "visible_xyxy": visible,
        "occluded_share": np.array([item["occluded_share"] for item in objects], np.float32),
        "part_of": np.array([item.get("part_of", 0) for item in objects], np.int64),
    }
    verified = _verified(images, document["annotations"], space)
    return replace(
        reading,
        images=replace(reading.images, verified=verified),
        objects=replace(reading.objects, columns=columns),
    )


def _verified(images: list[dict[str, Any]], annotations: list[dict[str, Any]], space: LabelSpace) -> Verified | None:
    """LVIS's lists as verdicts: 1 for what is annotated and whole, 2 for what is absent; None where all is verified."""
    if not any("neg_category_ids" in image for image in images):
        return None
    labels_of = {number: label for label, number in enumerate(space.ids)}
    present: dict[int, set[int]] = {image["id"]: set() for image in images}
    for item in annotations:
        present[item["image_id"]].add(labels_of[item["category_id"]])
    offsets, labels, states = [0], [], []
    for image in images:
        shown = {space.index(above) for label in present[image["id"]] for above in space.ancestors(space.names[label])}
        shown |= present[image["id"]]
        if "neg_category_ids" in image:
            absent = {labels_of[number] for number in image["neg_category_ids"]}
            whole = shown - {labels_of[number] for number in image["not_exhaustive_category_ids"]}
        else:
            absent, whole = set(range(len(space))) - shown, shown
        found = sorted([(label, 1) for label in whole] + [(label, 2) for label in absent])
        labels += [label for label, _ in found]
        states += [state for _, state in found]
        offsets.append(len(labels))
    return Verified(
        offsets=np.array(offsets, np.int64), labels=np.array(labels, np.int32), states=np.array(states, np.int8)
    )
