"""Random ground truths with VOC's and CityPersons' fields, and detections on them; written as files or an index."""

import json

import numpy as np


def random_case(seed, *, images=6, classes=3, name="class"):
    """Whole and half pixels (so that IoUs are exact and equal ones occur), ties of scores, empty images, id 0."""
    rng = np.random.default_rng(seed)
    image_ids = (rng.permutation(images) * 3).tolist()
    category_ids = (rng.permutation(classes) * 7).tolist()
    truth = {
        "images": [{"id": i, "height": 300, "width": 200} for i in image_ids],
        "categories": [{"id": c, "name": f"{name} {c}"} for c in category_ids],
        "annotations": [],
    }
    results = []
    for image in image_ids:
        boxes = random_boxes(rng, int(rng.integers(0, 7)))
        for box in boxes:
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]),
                    "image_id": image,
                    "category_id": int(rng.choice(category_ids)),
                    "bbox": box.tolist(),
                    "difficult": int(rng.random() < 0.3),
                    "ignore": int(rng.random() < 0.2),
                    "iscrowd": int(rng.random() < 0.1),
                    "height": float(box[3] + rng.choice([0, 5, 30])),
                    "vis_ratio": float(rng.choice([0.1, 0.2, 0.5, 0.65, 0.8, 1.0])),
                }
            )
        for _ in range(int(rng.integers(0, 16))):
            box, category = random_boxes(rng, 1)[0], int(rng.choice(category_ids))
            if len(boxes) and rng.random() < 0.7:
                copied = truth["annotations"][-1 - int(rng.integers(len(boxes)))]
                box = np.maximum(np.array(copied["bbox"]) + rng.integers(-6, 7, 4) / 2, [0, 0, 1, 1])
                category = copied["category_id"]
            score = float(np.round(rng.random(), 1))
            results.append({"image_id": image, "category_id": category, "bbox": box.tolist(), "score": score})
    return truth, results


def random_boxes(rng, count):
    sides = rng.integers(1, (60, 200), (count, 2)) / 2 + [4, 20]
    return np.concatenate([rng.integers(0, 200, (count, 2)) / 2, sides], axis=1)


def write(folder, truth, results):
    (folder / "gt.json").write_text(json.dumps(truth))
    (folder / "dt.json").write_text(json.dumps(results))
    return folder / "gt.json", folder / "dt.json"


def iou(a, b, *, extra=0.0, of_first=False):
    """The overlap of two boxes x, y, w, h; ``extra`` pixels are added to every width and height."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]) + extra
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]) + extra
    if width <= 0 or height <= 0:
        return 0.0
    first, second = (a[2] + extra) * (a[3] + extra), (b[2] + extra) * (b[3] + extra)
    return width * height / (first if of_first else first + second - width * height)


def by_score(results):
    """Falling score; among equal ones by image id, then as they stand."""
    return sorted(results, key=lambda row: (-row["score"], row["image_id"]))
