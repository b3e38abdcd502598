"""Random COCO data sets with every awkward thing in them, and pycocotools' answer."""

import contextlib
import io
import json

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def random_case(seed, *, images=6, classes=4, masks=False, zero_ids=True):
    """Crowds, ties, jittered copies, many detections, empty images, unordered ids; half pixels make equal IoUs."""
    rng = np.random.default_rng(seed)
    height, width = 60, 80
    image_ids = rng.permutation(np.arange(0, 3 * images, 3) + (0 if zero_ids else 5)).tolist()
    category_ids = rng.permutation(np.arange(classes) * 7).tolist()
    truth = {
        "images": [{"id": i, "height": height, "width": width} for i in image_ids],
        "categories": [{"id": c, "name": f"class {c}"} for c in category_ids],
        "annotations": [],
    }
    results = []
    for image in image_ids[:-1]:
        count = int(rng.integers(0, 9))
        boxes = random_boxes(rng, count, height, width)
        for box in boxes:
            annotation = {
                "id": len(truth["annotations"]) + 1,
                "image_id": image,
                "category_id": int(rng.choice(category_ids[:-1])),
                "bbox": box.tolist(),
                "area": float(box[2] * box[3] * rng.choice([1.0, 0.6, 60.0])),
                "iscrowd": int(rng.random() < 0.15),
            }
            if masks:
                polygon = random_polygon(rng, box)
                annotation["segmentation"] = [polygon]
                if annotation["iscrowd"]:
                    rle = mask_utils.merge(mask_utils.frPyObjects([polygon], height, width))
                    annotation["segmentation"] = {"size": [height, width], "counts": rle["counts"].decode()}
            truth["annotations"].append(annotation)
    for image in image_ids:
        near = [a for a in truth["annotations"] if a["image_id"] == image]
        for _ in range(int(rng.integers(0, 40))):
            if near and rng.random() < 0.7:
                copied = near[int(rng.integers(len(near)))]
                box = np.maximum(np.array(copied["bbox"]) + np.round(rng.normal(0, 2, 4) * 2) / 2, [0, 0, 1, 1])
                category = copied["category_id"]
            else:
                box, category = random_boxes(rng, 1, height, width)[0], int(rng.choice(category_ids))
            row = {"image_id": image, "category_id": category, "score": float(np.round(rng.random(), 1))}
            if masks:
                rle = mask_utils.merge(mask_utils.frPyObjects([random_polygon(rng, box)], height, width))
                row["segmentation"] = {"size": [height, width], "counts": rle["counts"].decode()}
            else:
                row["bbox"] = box.tolist()
            results.append(row)
    return truth, results


def random_boxes(rng, count, height, width):
    size = np.round(np.exp(rng.uniform(0.7, 3.6, (count, 2))) * 2) / 2
    corner = np.round(rng.random((count, 2)) * np.maximum([width, height] - size, 1) * 2) / 2
    return np.concatenate([corner, size], axis=1)


def random_polygon(rng, box):
    x, y, w, h = box
    corners = np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]]) + rng.uniform(0, 0.3, (4, 2)) * [w, h]
    return corners.reshape(-1).tolist()


def pycocotools_counts(truth, results, iou_type="bbox"):
    """Precision (T, R, K, A, M), recall and the twelve numbers."""
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = json.loads(json.dumps(truth))
        reference.createIndex()
        found = reference.loadRes(json.loads(json.dumps(results)))
        evaluation = COCOeval(reference, found, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.eval["precision"], evaluation.eval["recall"], evaluation.stats
