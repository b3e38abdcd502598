import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gesso.data import rle
from gesso.data.index import Index
from gesso.data.readers.coco_masks import runs_of_values
from tests.command_line import coco, write


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_runs_of_values_are_those_of_each_value_alone(height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 4, (height, width)).astype(np.uint16)
    values = np.array([1, 3, 0, 2, 77])
    for value, mask in zip(values, runs_of_values(pixels, values), strict=True):
        wanted = pixels == value
        assert mask == (rle.encode(wanted) if wanted.any() else None)


def source(folder, size=(40, 30)):
    """Two pictures of two boxes; the annotations' pixels are 300 and 2."""
    document = coco(folder, 2, boxes=2, size=size)
    pixels = np.zeros((30, 40), np.uint16)
    pixels[3:10, 2:9], pixels[12:15, 3:20] = 300, 2
    (folder / "masks").mkdir()
    for image in document["images"]:
        image["mask_file"] = f"{image['id']}.png"
        Image.fromarray(pixels).save(folder / "masks" / f"{image['id']}.png")
    for i, row in enumerate(document["annotations"]):
        row["mask_value"] = (300, 2)[i % 2]
        del row["area"]
    write(folder, document)
    return document, pixels


def test_masks_of_values(gesso, tmp_path):
    document, pixels = source(tmp_path / "s")
    document["annotations"][3]["segmentation"] = [[1, 1, 5, 1, 5, 5]]
    del document["annotations"][2]["mask_value"]
    write(tmp_path / "s", document)
    made = gesso.json("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert made["format"] == "coco" and made["boxes"] == 4 and not made["issues"]
    index = Index.open(tmp_path / "i")
    first, second = index.masks(0)
    assert np.array_equal(rle.decode(first), pixels == 300) and np.array_equal(rle.decode(second), pixels == 2)
    assert index.objects(0).areas.tolist() == [49, 51]
    none, ring = index.masks(1)
    assert none is None and len(ring.rings) == 1


def test_what_cannot_be_read_is_told(gesso, tmp_path):
    document, _ = source(tmp_path / "s")
    document["annotations"][1]["mask_value"] = 77
    write(tmp_path / "s", document)
    (tmp_path / "s" / "masks" / "2.png").write_bytes(b"broken")
    made = gesso.json("data", "import", tmp_path / "s", "--out", tmp_path / "i")
    assert made["issues"] == {"mask cannot be read": 1, "mask file cannot be read": 1} and made["boxes"] == 4
    index = Index.open(tmp_path / "i")
    assert [mask is None for row in range(2) for mask in index.masks(row)] == [False, True, True, True]
    details = {issue.what: issue.detail for issue in index.issues()}
    assert "the value 77 is not in 1.png" in details["mask cannot be read"]
    assert "2.png" in details["mask file cannot be read"]
    (tmp_path / "s" / "masks" / "1.png").unlink()
    report = gesso.json("data", "check", tmp_path / "s", code=1)
    assert report["problems"] == 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_real_set(gesso, real_sets, tmp_path, split):
    gesso("data", "import", real_sets / "nuclei", "--split", split, "--out", tmp_path / "i")
    index = Index.open(tmp_path / "i")
    document = json.loads((real_sets / "nuclei" / f"{split}.json").read_text())
    values = {row["id"]: row["mask_value"] for row in document["annotations"]}
    files = {image["id"]: image["mask_file"] for image in document["images"]}
    assert (index.mask_columns.kinds > 0).all()
    for row in range(0, len(index), 9):
        pixels = np.asarray(Image.open(real_sets / "nuclei" / "masks" / files[int(index.image_ids[row])]))
        numbers = index.annotation_ids[index.offsets[row] : index.offsets[row + 1]]
        for number, mask in zip(numbers.tolist(), index.masks(row), strict=True):
            assert np.array_equal(rle.decode(mask), pixels == values[number])
