"""Which classes of an image were checked, as LVIS tells it beside COCO's keys.

An image's ``neg_category_ids`` are absent; a class with boxes is present and whole, unless it stands in
``not_exhaustive_category_ids``: such a class has boxes and stays unverified, since more of its instances may be there.
Of every other class nothing is known. Source: Gupta et al., "LVIS: A Dataset for Large Vocabulary Instance
Segmentation" (2019), section 3. An image without both lists, beside others that have them, is verified for every class.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gesso.data.records import Array, Verified
from gesso.errors import DataError


class Lists(NamedTuple):
    """The category ids of one image's two lists."""

    absent: Sequence[int]
    partial: Sequence[int]


def verdicts(
    lists: Mapping[int, Lists], image_ids: Array, rows: Array, labels: Array, category_ids: Array, *, where: Path
) -> Verified:
    """State 1 for the classes that are annotated and whole, 2 for those that are absent; a box speaks against a list.

    Args:
        lists: by image id.
        image_ids: (N,).
        rows, labels: (M,) the image's position and the label of each object.
        category_ids: (C,) rising, one a label.
        where: the file, for messages.

    Raises:
        DataError: a list names a category id that does not exist.
    """
    labels_of = {number: label for label, number in enumerate(category_ids.tolist())}
    order = np.argsort(rows, kind="stable")
    borders = np.searchsorted(rows[order], np.arange(len(image_ids) + 1))
    ordered = labels[order]
    offsets, found, states = [0], [], []
    for row, number in enumerate(image_ids.tolist()):
        shown = set(ordered[borders[row] : borders[row + 1]].tolist())
        given = lists.get(number)
        absent, whole = set(labels_of.values()) - shown, shown
        if given is not None:
            try:
                absent = {labels_of[category] for category in given.absent} - shown
                whole = shown - {labels_of[category] for category in given.partial}
            except KeyError as error:
                what = f"a list of image {number} has the category id {error.args[0]}, which 'categories' lacks"
                raise DataError(what, where=where, remedy="Add the category to the file, or take it off.") from None
        verdict = sorted([(label, 1) for label in whole] + [(label, 2) for label in absent])
        found += [label for label, _ in verdict]
        states += [state for _, state in verdict]
        offsets.append(len(found))
    return Verified(
        offsets=np.array(offsets, np.int64), labels=np.array(found, np.int32), states=np.array(states, np.int8)
    )


def map_verdicts(verified: Verified, targets: Array) -> Verified:
    """The same in another label space; ``targets`` (C,) are the new labels, -1 for classes that it lacks."""
    labels = targets[verified.labels]
    kept = labels >= 0
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])
    return Verified(
        offsets=before[verified.offsets], labels=labels[kept].astype(np.int32), states=verified.states[kept]
    )
