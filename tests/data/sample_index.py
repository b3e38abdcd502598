"""A small index with everything in it, for the tests of the tools that read indexes."""

from pathlib import Path

import cv2
import numpy as np

from gesso.data.index import Index
from gesso.data.index_writer import IndexWriter
from gesso.data.records import (
    CROWD,
    DIFFICULT,
    IGNORE,
    OCCLUDED,
    TRUNCATED,
    ImageBlock,
    Issue,
    Mask,
    Masks,
    ObjectBlock,
    Polygons,
    Rle,
    Source,
    Strings,
    Verified,
)
from gesso.label_space import LabelSpace

SPACE = LabelSpace(
    names=("person", "dog", "traffic light", "unused thing"),
    supercategories=("human", "animal", None, None),
    ids=(7, 0, 3, 90),
)


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """A textured picture (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 255, (6, 8, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)


def write_index(
    folder: Path,
    *,
    images: int = 24,
    seed: int = 0,
    pictures: bool = True,
    rich: bool = True,
    whole_pixels: bool = False,
) -> Index:
    """An index at ``folder``/index with pictures under ``folder``/pictures; every sixth image is a negative.

    ``rich`` adds masks, all flags, further columns, image-level labels and a report; ``whole_pixels`` rounds the boxes.
    """
    rng = np.random.default_rng(seed)
    root = folder / "pictures"
    names = [f"{'sub/' if i % 2 else ''}{i:04d}.png" for i in range(images)]
    widths, heights = rng.integers(60, 120, images), rng.integers(50, 100, images)
    (root / "sub").mkdir(parents=True)
    if pictures:
        for i, name in enumerate(names):
            cv2.imwrite(str(root / name), picture(seed * 1000 + i, heights[i], widths[i]))
    counts = rng.integers(1, 5, images)
    counts[::6] = 0
    rows = np.repeat(np.arange(images), counts)
    count = len(rows)
    size = np.stack([widths, heights], 1)[rows]
    corner = rng.random((count, 2)) * size * 0.6
    xyxy = np.concatenate([corner, corner + 2 + rng.random((count, 2)) * (size - corner - 2)], 1)
    xyxy = np.round(xyxy) if whole_pixels else np.round(xyxy, 2)
    labels = rng.choice(3, count, p=[0.6, 0.3, 0.1])
    hashes = np.arange(1, images + 1, dtype=np.uint64) * np.uint64(7919) if pictures else None
    block = ImageBlock(
        ids=(np.arange(images) * 3 + 5).astype(np.int64),
        names=Strings.of(names),
        widths=widths,
        heights=heights,
        hashes=hashes,
        orientations=np.ones(images, np.uint8),
        **(_rich_images(names, rng) if rich else {}),
    )
    writer = IndexWriter(folder / "index", SPACE, sources=[Source(name="sample", root=str(root), split="train")])
    writer.add_images(block)
    objects = ObjectBlock(
        rows=rows,
        xyxy=xyxy.astype(np.float32),
        labels=labels,
        annotation_ids=rng.permutation(count) + 100,
        **(_rich_objects(xyxy, size, rng) if rich else {"known_flags": np.full(count, CROWD, np.uint16)}),
    )
    writer.add_objects(objects)
    if rich:
        writer.add_issues(
            [Issue(names[3], 17, "empty box", "dropped", "w 0"), Issue("gone.jpg", None, "missing", "kept aside")]
        )
    return Index.open(writer.finish())


def _rich_images(names: list[str], rng: np.random.Generator) -> dict:
    counts = rng.integers(0, 3, len(names))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return {
        "semantic": Strings.of([f"semantic/{i}.png" if i % 3 else "" for i in range(len(names))]),
        "verified": Verified(
            offsets=offsets,
            labels=np.concatenate([np.zeros(0, np.int32), *(rng.permutation(4)[:c] for c in counts)]),
            states=rng.integers(1, 3, offsets[-1]).astype(np.int8),
        ),
        "columns": {
            "licence": rng.integers(0, 5, len(names)),
            "photographer": Strings.of(f"é{i}" for i in range(len(names))),
        },
    }


def _rich_objects(xyxy: np.ndarray, size: np.ndarray, rng: np.random.Generator) -> dict:
    masks: list[Mask] = []
    for i, (x1, y1, x2, y2) in enumerate(xyxy.tolist()):
        ring = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], np.float32)
        if i % 4 == 0:
            masks.append(None)
        elif i % 4 == 3:
            width, height = (int(v) for v in size[i])
            masks.append(Rle((height, width), b"PPYo0"))
        else:
            masks.append(Polygons((ring, ring[:3]) if i % 4 == 2 else (ring,)))
    known = np.uint16(CROWD | IGNORE | DIFFICULT | OCCLUDED | TRUNCATED)
    flags = rng.integers(0, 2**16, len(xyxy)).astype(np.uint16) & known
    flags[rng.random(len(xyxy)) < 0.5] = 0
    return {
        "masks": Masks.of(masks),
        "flags": flags,
        "known_flags": np.full(len(xyxy), known, np.uint16),
        "areas": (rng.random(len(xyxy)) * 3000).astype(np.float32),
        "columns": {
            "vis_ratio": rng.random(len(xyxy)).astype(np.float32),
            "author": Strings.of(f"a{i % 3}" for i in range(len(xyxy))),
        },
    }
