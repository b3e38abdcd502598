import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from gesso.data import rle
from gesso.data.check import check
from gesso.data.importing import import_data
from gesso.data.index import Index
from gesso.data.joining import TURNED, TURNED_UNTOLD
from gesso.data.records import Rle
from gesso.errors import DataError
from gesso.label_space import LabelSpace

SHARED = Path(__file__).parents[2].parent / "shared"
CATEGORIES = [{"id": 3, "name": "cat", "supercategory": "animal"}, {"id": 0, "name": "car"}]


def document(images, annotations, categories=CATEGORIES):
    return {"annotations": annotations, "images": images, "categories": categories}


def annotation(number, image, bbox, category=3, **more):
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, **more}


def save(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def picture(path, size=(40, 30), **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **more)
    return path


def bring(source, out, **more):
    summary = import_data(source, out, **more)
    index = Index.open(out)
    index.verify()
    return index, summary


# --- the repair rules against a slow, obvious form ---------------------------------------------------------------

NUMBER = st.sampled_from([0, 1, 5, 39.5, 40, 41, -3, 100, -100, math.nan, math.inf, 1e300]) | st.floats(
    -60, 60, width=32
)
ANNOTATIONS = st.lists(
    st.fixed_dictionaries(
        {
            "image_id": st.sampled_from([7, 2, 9, 1000]),
            "category_id": st.sampled_from([0, 3]),
            "bbox": st.lists(NUMBER, min_size=4, max_size=4),
        },
        optional={
            "area": st.floats(0, 99, width=32),
            "iscrowd": st.sampled_from([0, 1, True]),
            "ignore": st.sampled_from([0, 1]),
            "difficult": st.sampled_from([0, 1, None]),
            "segmentation": st.sampled_from([[], None, [[0, 0, 4, 0, 4, 4.5]]]),
            "score": st.floats(0, 1, width=32),
        },
    ),
    max_size=25,
)
SIZES = {7: (40, 30), 2: (50, 20), 9: (None, None)}


def slow_reference(annotations):
    """Boxes by image id, and the multiset of issues, by json values and loops alone."""
    kept, issues, seen = {image: [] for image in SIZES}, [], set()
    for a in annotations:
        with np.errstate(over="ignore"):
            x, y, w, h = a["bbox"]
            box = [float(np.float32(v)) for v in (x, y, x + w, y + h)]
        width, height = SIZES.get(a["image_id"], (None, None))
        clipped = box
        if width is not None:
            clipped = [min(max(v, 0), limit) for v, limit in zip(box, (width, height) * 2, strict=True)]
        flags = bool(a.get("iscrowd")) + 2 * bool(a.get("ignore")) + 4 * bool(a.get("difficult"))
        key = (a["image_id"], a["category_id"], flags, *clipped, str(a.get("segmentation") or ""))
        if a["image_id"] not in SIZES:
            issues.append((a["id"], "annotation for an unknown image"))
        elif not all(math.isfinite(v) for v in box):
            issues.append((a["id"], "box is not finite"))
        elif box[2] < box[0] or box[3] < box[1]:
            issues.append((a["id"], "box is inverted"))
        elif box[2] == box[0] or box[3] == box[1]:
            issues.append((a["id"], "box is empty"))
        elif clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            issues.append((a["id"], "box outside the picture"))
        elif key in seen:
            issues.append((a["id"], "duplicate box"))
        else:
            seen.add(key)
            if clipped != box:
                issues.append((a["id"], "box beyond the border"))
            known = sum(b for k, b in (("iscrowd", 1), ("ignore", 2), ("difficult", 4)) if a.get(k) is not None)
            kept[a["image_id"]].append((clipped, a["category_id"], flags, known, a["id"], bool(a.get("segmentation"))))
    return kept, sorted(issues)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ANNOTATIONS, st.permutations(["annotations", "images", "categories"]))
def test_every_box_equals_the_slow_reference(tmp_path_factory, annotations, order):
    annotations = [{"id": number, **a} for number, a in enumerate(annotations, start=100)]
    sizes = SIZES.items()
    images = [{"id": i, "file_name": f"{i}.jpg"} | ({"width": w, "height": h} if w else {}) for i, (w, h) in sizes]
    whole = document(images, annotations)
    folder = tmp_path_factory.mktemp("d")
    source = save(folder / "x.json", {key: whole[key] for key in order})
    index, summary = bring(source, folder / "i", images=False)
    kept, issues = slow_reference(json.loads(source.read_text())["annotations"])
    assert index.label_space.names == ("car", "cat") and index.label_space.ids == (0, 3)
    assert index.image_ids.tolist() == [7, 2, 9]
    for row, image in enumerate([7, 2, 9]):
        found = index.objects(row)
        start, end = index.offsets[row : row + 2]
        columns = zip(
            found.xyxy.tolist(),
            [index.label_space.ids[label] for label in found.labels],
            found.flags.tolist(),
            index.known_flags[start:end].tolist(),
            index.annotation_ids[start:end].tolist(),
            [mask is not None for mask in index.masks(row)],
            strict=True,
        )
        assert list(columns) == kept[image]
    assert sorted((issue.annotation_id, issue.what) for issue in index.issues()) == issues
    assert sum(summary.issues.values()) == len(issues)


# --- pictures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("frame", ["stored", "upright", "none"])
def test_exif_turns_boxes_and_masks_with_the_picture(tmp_path, orientation, frame):
    mask = np.zeros((30, 40), np.uint8)
    mask[4:10, 7:25] = 1
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(tmp_path / "a.jpg", exif=exif)
    swapped = orientation >= 5
    upright = (30, 40) if swapped else (40, 30)
    if frame == "stored" and swapped:
        Image.fromarray(mask).save(tmp_path / "m.png", exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "m.png")))
        size = {"width": 40, "height": 30}
    else:
        mask = mask.T if swapped else mask
        expected = mask
        size = {} if frame == "none" else dict(zip(("width", "height"), upright, strict=True))
    runs = rle.encode(mask)
    y, x = np.nonzero(mask)
    box = [int(x.min()), int(y.min()), int(np.ptp(x)) + 1, int(np.ptp(y)) + 1]
    ring = [box[0], box[1], box[0] + box[2], box[1], box[0] + box[2], box[1] + box[3], box[0], box[1] + box[3]]
    runs_json = {"size": list(runs.size), "counts": runs.counts.decode()}
    rows = [
        annotation(1, 1, box, segmentation=runs_json),
        annotation(2, 1, box, category=0, segmentation=[ring]),
    ]
    source = save(tmp_path / "x.json", document([{"id": 1, "file_name": "a.jpg", **size}], rows))
    index, _ = bring(source, tmp_path / "i")
    assert (index.widths[0], index.heights[0]) == upright
    y, x = np.nonzero(expected)
    wanted = [x.min(), y.min(), x.max() + 1, y.max() + 1]
    assert index.boxes.tolist() == [wanted, wanted]
    runs, polygons = index.masks(0)
    assert isinstance(runs, Rle) and np.array_equal(rle.decode(runs), expected)
    assert [*polygons.rings[0].min(0), *polygons.rings[0].max(0)] == wanted
    assert index.orientations[0] == orientation
    told = swapped and frame != "none"
    wanted_issues = [] if orientation == 1 else [TURNED if told else TURNED_UNTOLD]
    assert [issue.what for issue in index.issues()] == wanted_issues
    assert check(source).problems == wanted_issues.count(TURNED_UNTOLD)


def test_bad_pictures_are_kept_aside_and_odd_ones_are_not(tmp_path):
    whole = picture(tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("this is a text file, not a picture")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    Image.new("L", (1, 1)).save(tmp_path / "one.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    picture(tmp_path / "negative.png")
    names = ["whole.jpg", "empty.jpg", "text.jpg", "cut.jpg", "one.png", "gone.jpg", "huge.png", "negative.png"]
    images = [{"id": i, "file_name": n, "width": 40, "height": 30} for i, n in enumerate(names)]
    rows = [annotation(i + 1, i, [0, 0, 20, 10]) for i in range(len(names) - 1)]
    index, summary = bring(save(tmp_path / "x.json", document(images, rows)), tmp_path / "i")
    assert list(index.names) == ["whole.jpg", "one.png", "negative.png"]
    assert index.widths.tolist() == [40, 1, 40] and index.heights.tolist() == [30, 1, 30]
    assert index.boxes.tolist() == [[0, 0, 20, 10], [0, 0, 1, 1]]
    assert len(index.objects(2).labels) == 0
    aside = {issue.image: issue.what for issue in index.issues() if issue.action == "kept aside"}
    assert aside == {
        "empty.jpg": "picture is empty",
        "text.jpg": "picture cannot be read",
        "cut.jpg": "picture is cut off",
        "gone.jpg": "picture is missing",
        "huge.png": "picture is too large",
    }
    assert summary.issues["picture has another size"] == 1
    hashes = index.content_hashes
    assert len(set(hashes.tolist())) == 3 and hashes.all()
    assert not bring(tmp_path / "x.json", tmp_path / "j", hash_images=False)[0].content_hashes.any()


def test_pictures_that_are_all_missing_stop_the_import_unless_unwanted(tmp_path):
    source = save(tmp_path / "x.json", document([{"id": 1, "file_name": "a.jpg", "width": 9, "height": 9}], []))
    with pytest.raises(DataError, match=r"none of the pictures was found \(such as 'a.jpg'\).*--no-images"):
        import_data(source, tmp_path / "i")
    assert not (tmp_path / "i").exists()
    index, _ = bring(source, tmp_path / "i", images=False)
    assert len(index) == 1 and index.num_boxes == 0
    with pytest.raises(DataError, match="stands here already"):
        import_data(source, tmp_path / "i", images=False)


def test_images_root(tmp_path):
    picture(tmp_path / "far" / "a.jpg")
    source = save(tmp_path / "x.json", document([{"id": 1, "file_name": "a.jpg"}], []))
    index, _ = bring(source, tmp_path / "i", images_root=tmp_path / "far")
    assert index.image_path(0) == tmp_path / "far" / "a.jpg" and index.widths[0] == 40
    with pytest.raises(DataError, match="does not exist"):
        import_data(source, tmp_path / "j", images_root=tmp_path / "farther")


# --- masks ------------------------------------------------------------------------------------------------------


def test_what_differs_in_flags_or_mask_is_no_duplicate(tmp_path):
    box, ring, other = [2, 3, 10, 8], [2, 3, 12, 3, 12, 11], [2, 3, 12, 11, 2, 11]
    rows = [
        annotation(1, 1, box),
        annotation(2, 1, box, iscrowd=1),
        annotation(3, 1, box, segmentation=[ring]),
        annotation(4, 1, box, segmentation=[other]),
        annotation(5, 1, box, segmentation=[ring]),
        annotation(6, 1, box),
        annotation(7, 1, [30, 3, 20, 8]),
        annotation(8, 1, [30, 3, 10, 8]),
    ]
    image = [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}]
    index, summary = bring(save(tmp_path / "x.json", document(image, rows)), tmp_path / "i", images=False)
    assert index.annotation_ids.tolist() == [1, 2, 3, 4, 7]
    assert summary.issues == {"duplicate box": 3, "box beyond the border": 1}


def test_an_area_that_is_not_given_is_that_of_the_mask(tmp_path):
    solid = np.zeros((30, 40), np.uint8)
    solid[4:10, 7:25] = 1
    runs = rle.encode(solid)
    rows = [
        annotation(1, 1, [0, 0, 20, 10], segmentation=[[0, 0, 20, 0, 20, 10]]),
        annotation(2, 1, [0, 0, 20, 10], segmentation=[[0, 0, 4, 0, 4, 5, 0, 5], [10, 0, 20, 0, 20, 10]]),
        annotation(3, 1, [7, 4, 18, 6], segmentation={"size": [30, 40], "counts": runs.counts.decode()}),
        annotation(4, 1, [1, 0, 20, 10], segmentation=[[0, 0, 20, 0, 20, 10]], area=77),
        annotation(5, 1, [2, 0, 20, 10]),
    ]
    image = [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}]
    index, _ = bring(save(tmp_path / "x.json", document(image, rows)), tmp_path / "i", images=False)
    assert index.areas.tolist() == [100, 70, 108, 77, 200]


def test_a_mask_of_another_size_than_its_picture_is_dropped_and_the_box_stays(tmp_path):
    picture(tmp_path / "a.jpg", size=(40, 30))
    frames = [{"size": [30, 40], "counts": [5, 9, 1186]}, {"size": [60, 80], "counts": [5, 9, 4786]}]
    rows = [annotation(k, 1, [k, 0, 9, 9], segmentation=frame) for k, frame in enumerate(frames, start=1)]
    source = save(tmp_path / "x.json", document([{"id": 1, "file_name": "a.jpg"}], rows))
    index, summary = bring(source, tmp_path / "i")
    assert summary.issues == {"mask is not of the picture's size": 1} and index.num_boxes == 2
    kept, dropped = index.masks(0)
    assert isinstance(kept, Rle) and kept.size == (30, 40) and dropped is None


# --- label spaces and splits --------------------------------------------------------------------------------------


def test_splits_with_categories_in_another_order_are_joined_by_name(tmp_path):
    rows = [annotation(1, 1, [0, 0, 9, 9], category=1)]
    image = [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}]
    train = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    val = [{"id": 2, "name": "Cat "}, {"id": 1, "name": "dog"}]
    save(tmp_path / "d" / "annotations" / "instances_train.json", document(image, rows, train))
    save(tmp_path / "d" / "annotations" / "instances_val.json", document(image, rows, val))
    summary = import_data(tmp_path / "d", tmp_path / "i", images=False)
    assert [part.split for part in summary.splits] == ["train", "val"] and summary.boxes == 2
    first, second = Index.open(tmp_path / "i" / "train"), Index.open(tmp_path / "i" / "val")
    assert first.label_space == second.label_space
    assert (first.labels.tolist(), second.labels.tolist()) == ([0], [1])
    alone, _ = bring(tmp_path / "d", tmp_path / "v", split="val", images=False, label_space=first.label_space)
    assert alone.labels.tolist() == [1] and alone.sources[0].split == "val"
    with pytest.raises(DataError, match=r"no split 'vall'.*'val'"):
        import_data(tmp_path / "d", tmp_path / "w", split="vall", images=False)


def two_splits(folder, train, val):
    image = [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}]
    for name, categories in (("train", train), ("val", val)):
        categories = [{"id": number, "name": text} for number, text in categories]
        save(folder / "annotations" / f"instances_{name}.json", document(image, [], categories))
    return folder


def test_splits_with_different_categories_keep_the_ids_of_the_files(tmp_path, caplog):
    import_data(
        two_splits(tmp_path / "d", [(7, "cat"), (90, "dog")], [(7, "cat"), (4, "cow")]), tmp_path / "i", images=False
    )
    space = Index.open(tmp_path / "i" / "val").label_space
    assert (space.names, space.ids) == (("cat", "dog", "cow"), (7, 90, 4))
    import_data(two_splits(tmp_path / "e", [(7, "cat"), (9, "dog")], [(7, "cow")]), tmp_path / "j", images=False)
    space = Index.open(tmp_path / "j" / "val").label_space
    assert (space.names, space.ids) == (("cat", "dog", "cow"), (1, 2, 3)) and "counted anew" in caplog.text


def test_a_split_that_cannot_be_imported_leaves_none_behind(tmp_path):
    source = two_splits(tmp_path / "d", [(7, "cat")], [(7, "cat")])
    picture(source / "images" / "a.jpg")
    broken = source / "annotations" / "instances_val.json"
    broken.write_text(broken.read_text().replace("a.jpg", "gone.jpg"))
    with pytest.raises(DataError, match="none of the pictures"):
        import_data(source, tmp_path / "i")
    assert not (tmp_path / "i").exists()


def test_what_stands_beside_an_index_is_never_overwritten(tmp_path):
    source = save(tmp_path / "x.json", document([{"id": 1, "file_name": "a.jpg", "width": 9, "height": 9}], []))
    bring(source, tmp_path / "i", images=False)
    bring(source, tmp_path / "i", images=False, overwrite=True)
    bring(source, tmp_path / "i" / "train", images=False)
    with pytest.raises(DataError, match="holds 'train' beside the index"):
        import_data(source, tmp_path / "i", images=False, overwrite=True)
    assert len(Index.open(tmp_path / "i" / "train")) == 1


def test_a_name_that_is_no_text_is_kept_and_shown(tmp_path, gesso):
    """On Linux a file name is bytes."""
    (tmp_path / "d" / "labels").mkdir(parents=True)
    (tmp_path / "d" / "classes.txt").write_text("cat\n")
    for name in (b"caf\xe9.jpg", b"tea.jpg"):
        picture(tmp_path / "d" / "images" / os.fsdecode(name))
    (tmp_path / "d" / "images" / os.fsdecode(b"\xe9.jpg")).write_bytes(b"")
    index, _ = bring(tmp_path / "d", tmp_path / "i")
    assert sorted(map(os.fsencode, index.names)) == [b"images/caf\xe9.jpg", b"images/tea.jpg"]
    assert [os.fsencode(issue.image) for issue in index.issues()] == [b"images/\xe9.jpg"]
    assert "\\udce9.jpg" in gesso("data", "check", tmp_path / "d", code=1).out
    for format in ("coco", "voc"):
        line = gesso.mistake("data", "export", tmp_path / "i", "--out", tmp_path / format, "--format", format)
        assert "is no UTF-8" in line and not (tmp_path / format).exists()


def test_a_category_outside_the_given_space_is_refused_when_used(tmp_path):
    image = [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}]
    used = save(tmp_path / "x.json", document(image, [annotation(1, 1, [0, 0, 9, 9])]))
    with pytest.raises(DataError, match="category 'cat'"):
        import_data(used, tmp_path / "i", images=False, label_space=LabelSpace.from_names(["car"]))
    unused = save(tmp_path / "y.json", document(image, [annotation(1, 1, [0, 0, 9, 9], category=0)]))
    index, _ = bring(unused, tmp_path / "i", images=False, label_space=LabelSpace.from_names(["bus", "car"]))
    assert index.labels.tolist() == [1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is not here")
@pytest.mark.parametrize("name", ["raccoon", "bccd", "coco_mini", "nuclei", "pretrain_mix", "dali_pixabay"])
def test_real_sets(tmp_path, name):
    summary = import_data(SHARED / "data" / name, tmp_path / "i")
    for part in summary.splits:
        raw = json.loads((SHARED / "data" / name / f"{part.split}.json").read_text())
        index = Index.open(part.path)
        assert (len(index), index.num_boxes) == (len(raw["images"]), len(raw["annotations"])) and not part.issues
        assert all(index.image_path(i).is_file() for i in range(len(index)))
        names = {c["id"]: c["name"] for c in raw["categories"]}
        found = sorted(
            zip(index.annotation_ids.tolist(), [index.label_space.names[k] for k in index.labels], strict=True)
        )
        assert found == sorted((a["id"], names[a["category_id"]]) for a in raw["annotations"])
