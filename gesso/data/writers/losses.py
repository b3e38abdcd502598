"""What VOC and YOLO cannot hold of an index, counted."""

import numpy as np

from gesso.data.index import Index
from gesso.data.records import FLAGS, box_areas


def losses(index: Index, kind: str, *, flags: int) -> list[str]:
    """One line for each kind of loss, common to the formats that are no JSON; ``flags``: the bits that are kept."""
    found = []
    values = np.asarray(index.flags)
    for name, bit in FLAGS.items():
        count = int(np.count_nonzero(values & bit))
        if count and not flags & bit:
            found.append(f"{kind} has no flag '{name}': lost at {count} boxes, which become ordinary boxes")
    areas = np.asarray(index.areas)
    other = int(np.count_nonzero(areas != box_areas(np.asarray(index.boxes))))
    if other:
        found.append(f"{kind} has no areas: {other} differ from width times height")
    if len(index) and not np.array_equal(index.image_ids, np.arange(1, len(index) + 1)):
        found.append(f"{kind} has no image ids")
    if index.num_boxes and not np.array_equal(index.annotation_ids, np.arange(1, index.num_boxes + 1)):
        found.append(f"{kind} has no annotation ids")
    space = index.label_space
    if any(space.supercategories) or space.parents or space.parts or space.synonyms:
        found.append(f"{kind} has no super-categories, hierarchy, part-of relations or synonyms")
    if space.ids != tuple(range(1, len(space) + 1)):
        found.append(f"{kind} has no category ids")
    columns = sorted(index.image_columns.keys() | index.object_columns.keys())
    if columns:
        found.append(f"{kind} has no further columns: {', '.join(columns)}")
    if index.verified_columns is not None or any(source.labelled is not None for source in index.sources):
        found.append(f"{kind} has no image-level labels")
    if index.semantic is not None and any(index.semantic):
        found.append(f"the paths of semantic maps are not written to {kind}")
    return found
