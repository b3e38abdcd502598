import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from gesso.errors import ConfigError, DataError
from gesso.evaluation.segmentation import Confusion, band, read_label_map, score_segmentation
from tests.command_line import huge_png

KEYS = ["mIoU", "pixel_accuracy", "mean_class_accuracy", "by_class"]


def reference(truths, predictions, num_classes, counted):
    """Pixel by pixel; ``counted`` says of a pixel's place in the list and row and column whether it counts."""
    ious, accuracies, right, total = {}, [], 0, 0
    pixels = []
    for k, (truth, prediction) in enumerate(zip(truths, predictions, strict=True)):
        for y in range(truth.shape[0]):
            for x in range(truth.shape[1]):
                if truth[y, x] != 255 and counted(k, y, x):
                    pixels.append((int(truth[y, x]), int(prediction[y, x])))
    for c in range(num_classes):
        both = sum(t == p == c for t, p in pixels)
        either = sum(c in (t, p) for t, p in pixels)
        of_truth = sum(t == c for t, _ in pixels)
        ious[str(c)] = both / either if either else None
        if of_truth:
            accuracies.append(both / of_truth)
        right, total = right + both, len(pixels)
    known = [v for v in ious.values() if v is not None]
    return {
        "mIoU": sum(known) / len(known) if known else None,
        "pixel_accuracy": right / total if total else None,
        "mean_class_accuracy": sum(accuracies) / len(accuracies) if accuracies else None,
        "by_class": ious,
    }


def assert_equal(scores, expected):
    for key in KEYS:
        assert scores[key] == pytest.approx(expected[key], abs=1e-12), key


def maps(values):
    return hnp.arrays(np.uint8, (2, 6, 7), elements=st.sampled_from(values))


def void_near(truth, y, x, width, disk):
    for v, u in np.argwhere(truth == 255):
        distance = math.hypot(v - y, u - x) if disk else max(abs(v - y), abs(u - x))
        if distance <= width:
            return True
    return False


@settings(max_examples=40, deadline=None)
@given(truth=maps([0, 1, 3, 255]), prediction=maps([0, 1, 2]), dtype=st.sampled_from([np.uint8, np.uint16, np.int64]))
def test_equal_to_counting_pixels(truth, prediction, dtype):
    confusion, parts = Confusion(5), [Confusion(5), Confusion(5)]
    for part, one, other in zip(parts, truth, prediction, strict=True):
        confusion.add(one.astype(dtype), other.astype(dtype))
        part.add(one, other)
    expected = reference(truth, prediction, 5, lambda *_: True)
    assert_equal(confusion.scores(), expected)
    assert confusion.scores()["by_class"]["4"] is None
    parts[0].merge(parts[1])
    assert np.array_equal(parts[0].counts, confusion.counts) and confusion.counts.dtype == np.int64
    summed = Confusion(5)
    summed.counts = sum(c.counts for c in (parts[1], confusion))
    assert summed.counts.sum() == parts[1].counts.sum() + confusion.counts.sum()


@settings(max_examples=40, deadline=None)
@given(
    truth=maps([0, 1, 255]),
    prediction=maps([0, 1, 2]),
    width=st.integers(1, 6),
    shape=st.sampled_from(["disk", "square"]),
)
def test_trimap_equal_to_measuring_every_distance(tmp_path_factory, truth, prediction, width, shape):
    folder = tmp_path_factory.mktemp("maps")
    save(folder / "gt", truth)
    save(folder / "dt", prediction)
    options = {"num_classes": 3, "trimap": width, "shape": shape}
    scores = score_segmentation(folder / "gt", folder / "dt", **options)

    def near(k, y, x):
        return void_near(truth[k], y, x, width, shape == "disk")

    assert_equal(scores, reference(truth, prediction, 3, near))
    assert_equal(scores["anti_trimap"], reference(truth, prediction, 3, lambda *at: not near(*at)))


@pytest.mark.parametrize("width", [5, 25, 50, 65])
def test_the_disk_is_exact_far_from_the_void(width):
    """25 = |(7, 24)| and 65 = |(16, 63)| lie on the border of the disk; the next whole distance does not."""
    void = np.zeros((160, 160), bool)
    void[80, 80] = True
    y, x = np.mgrid[:160, :160] - 80
    squared = y**2 + x**2
    assert np.array_equal(band(void, width), (squared <= width**2) & (squared > 0))
    assert np.array_equal(band(void, width, "square"), (np.maximum(abs(y), abs(x)) <= width) & (squared > 0))


def save(folder, arrays):
    folder.mkdir(exist_ok=True, parents=True)
    for number, array in enumerate(arrays):
        Image.fromarray(np.asarray(array, np.uint8)).save(folder / f"{number}.png")
    return folder


def assert_golden(scores, expected):
    assert scores["mIoU"] == pytest.approx(expected["miou"], abs=1e-9)
    assert scores["pixel_accuracy"] == pytest.approx(expected["pixel_accuracy"], abs=1e-9)
    if "iou" in expected:
        assert scores["mean_class_accuracy"] == pytest.approx(expected["mean_class_accuracy"], abs=1e-9)
        assert list(scores["by_class"].values()) == pytest.approx(expected["iou"], abs=1e-9)


def test_golden_cases(golden):
    file = json.loads((golden / "semseg/miou_cases.json").read_text())
    assert len(file["cases"]) >= 4 and len(file["ade"]) >= 1
    for case in file["cases"] + file["ade"]:
        ade = "raw_gt_0_is_ignored_classes_1_based" in case
        truths = case["raw_gt_0_is_ignored_classes_1_based"] if ade else case["gt"]
        predictions = case["pred_0_based"] if ade else case["pred"]
        confusion = Confusion(len(case["expected"]["iou"]), reduce_zero_label=ade)
        for truth, prediction in zip(truths, predictions, strict=True):
            confusion.add(np.array(truth, np.uint8), np.array(prediction, np.uint8))
        assert confusion.counts.tolist() == case["expected"]["confusion_rows_gt"], case["name"]
        assert_golden(confusion.scores(), case["expected"])


def test_golden_trimaps(golden, tmp_path):
    case = json.loads((golden / "semseg/trimap_cases.json").read_text())
    files = save(tmp_path / "gt", case["gt"]), save(tmp_path / "dt", case["pred"])
    assert len(case["expected"]) >= 5
    for width, shapes in case["expected"].items():
        for shape, name in (("disk", "euclidean"), ("square", "chessboard")):
            options = {"num_classes": case["num_classes"], "trimap": int(width), "shape": shape}
            scores = score_segmentation(*files, **options)
            assert_golden(scores, shapes[name]["trimap"])
            assert_golden(scores["anti_trimap"], shapes[name]["anti_trimap"])


def test_values_of_every_depth_and_palette(tmp_path):
    values = np.arange(16, dtype=np.uint8).reshape(4, 4)
    for bits in (1, 2, 4, 8):
        small = values & ((1 << bits) - 1)
        indexed = Image.fromarray(small, "P")
        indexed.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
        indexed.save(tmp_path / "indexed.png", bits=bits)
        assert np.array_equal(read_label_map(tmp_path / "indexed.png"), small), bits
        grey(tmp_path / "grey.png", small, bits)
        assert np.array_equal(read_label_map(tmp_path / "grey.png"), small), bits
    grey(tmp_path / "grey.png", values.astype(np.uint16) * 1000, 16)
    assert read_label_map(tmp_path / "grey.png").tolist() == (values.astype(int) * 1000).tolist()


def grey(path, values, bits):
    """A grey PNG of any depth, which Pillow does not write: its header is taken, the rows are packed here."""
    import struct
    import zlib

    height, width = values.shape
    planes = (values[:, :, None].astype(int) >> np.arange(bits)[::-1]) & 1
    rows = np.packbits(planes.reshape(height, -1).astype(np.uint8), axis=1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_many_classes_need_sixteen_bits(tmp_path):
    for folder in ("gt", "dt"):
        (tmp_path / folder).mkdir()
    grey(tmp_path / "gt/a.png", np.array([[300, 299], [65535, 5]]), 16)
    grey(tmp_path / "dt/a.png", np.array([[300, 5], [7, 5]]), 16)
    scores = score_segmentation(tmp_path / "gt", tmp_path / "dt", num_classes=301, ignore=65535)
    assert scores["by_class"]["300"] == 1 and scores["by_class"]["299"] == 0 and scores["by_class"]["5"] == 0.5
    assert scores["by_class"]["7"] is None and scores["pixel_accuracy"] == pytest.approx(2 / 3)


def test_zero_label_is_reduced_in_the_truth_only(tmp_path):
    truth, prediction = np.array([[0, 1, 2, 255]]), np.array([[1, 0, 1, 255]])
    confusion = Confusion(2, reduce_zero_label=True)
    confusion.add(truth, prediction)
    assert confusion.counts.tolist() == [[1, 0], [0, 1]]
    files = save(tmp_path / "gt", [truth]), save(tmp_path / "dt", [prediction])
    scores = score_segmentation(*files, num_classes=2, reduce_zero_label=True, trimap=1)
    assert scores["pixel_accuracy"] == 1 and scores["anti_trimap"]["pixel_accuracy"] is None
    with pytest.raises(DataError, match=r"the truth: a pixel has the value 3. The classes are 1 to 2, and 255 is"):
        confusion.add(np.array([3]), np.array([0]))


def test_a_class_that_is_ignored(tmp_path):
    confusion = Confusion(3, ignore=0)
    confusion.add(np.array([0, 0, 1, 2]), np.array([1, 0, 1, 0]))
    assert confusion.counts.tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert confusion.scores(("a", "b", "c"))["by_class"] == {"a": 0, "b": 1, "c": 0}


def test_nothing_added_is_none():
    assert Confusion(2).scores() == dict(zip(KEYS, (None, None, None, {"0": None, "1": None}), strict=True))


@pytest.mark.parametrize(
    ("truth", "prediction", "message"),
    [
        ([[0, 77]], [[0, 1]], r"the truth: a pixel has the value 77. The classes are 0 to 4, and 255 is ignored"),
        ([[0, 1]], [[0, 5]], r"the prediction: a pixel has the value 5. The classes are 0 to 4"),
        ([[0, 1]], [[0, 255]], r"the prediction: a pixel has the value 255"),
        ([[0, 255]], [[0, 9]], r"the prediction: a pixel has the value 9"),
        ([[-1, 0]], [[0, 0]], r"the truth: a pixel has the value -1"),
        ([[0, 0]], [[-1, 0]], r"the prediction: a pixel has the value -1"),
        ([[0, 65536]], [[0, 0]], r"the truth: a pixel has the value 65536"),
        ([[0, 0]], [[0], [0]], r"the prediction: the prediction has 2 x 1 pixels, its truth the truth has 1 x 2"),
    ],
)
def test_what_cannot_be_added_is_refused_and_adds_nothing(truth, prediction, message):
    confusion = Confusion(5)
    with pytest.raises(DataError, match=message):
        confusion.add(np.array(truth), np.array(prediction))
    assert not confusion.counts.any()


@pytest.mark.parametrize("options", [{"num_classes": 0}, {"num_classes": 99_999}, {"ignore": -1}, {"trimap": 0}])
def test_numbers_out_of_range_are_refused(tmp_path, options):
    files = save(tmp_path / "gt", [[[0]]]), save(tmp_path / "dt", [[[0]]])
    with pytest.raises(ConfigError, match="must be"):
        score_segmentation(*files, **({"num_classes": 2} | options))


def test_folders_in_folders(tmp_path):
    for folder in ("gt", "dt"):
        save(tmp_path / folder / "town", [[[0, 1]]])
        save(tmp_path / folder, [[[1, 1]]])
    assert score_segmentation(tmp_path / "gt", tmp_path / "dt", num_classes=2)["mIoU"] == 1


def test_files_that_do_not_fit_are_named(tmp_path):
    gt, dt = save(tmp_path / "gt", [[[0, 1]], [[0, 1]]]), save(tmp_path / "dt", [[[0, 1]]])

    def refused(message):
        with pytest.raises(DataError) as caught:
            score_segmentation(gt, dt, num_classes=2)
        assert message in str(caught.value), caught.value

    refused(f"{dt}: the prediction for {gt / '1.png'} is missing. Predictions are named as the truth: 1.png.")
    save(dt, [[[0, 1]], [[0, 1]], [[0, 1]]])
    refused(f"{dt / '2.png'}: there is no truth of this name in {gt}")
    (dt / "2.png").unlink()
    save(dt, [[[0, 1]], [[0], [1]]])
    refused(f"{dt / '1.png'}: the prediction has 2 x 1 pixels, its truth {gt / '1.png'} has 1 x 2")
    save(dt, [[[0, 1]], [[0, 9]]])
    refused(f"{dt / '1.png'}: a pixel has the value 9. The classes are 0 to 1, and 255 is ignored.")
    Image.new("RGB", (2, 1)).save(dt / "1.png")
    refused(f"{dt / '1.png'}: the map is in colour")
    Image.new("L", (2, 1)).save(dt / "1.png", format="BMP")
    refused(f"{dt / '1.png'}: this is no PNG")
    (dt / "1.png").write_bytes(b"")
    refused(f"{dt / '1.png'}: this is no PNG")
    save(gt, [[[0, 1]], np.random.default_rng(0).integers(0, 2, (90, 90))])
    whole = (gt / "1.png").read_bytes()
    for length in (9, 20, 40, len(whole) // 2):
        (dt / "1.png").write_bytes(whole[:length])
        refused(f"{dt / '1.png'}: the map cannot be read: ")
    huge_png(dt / "1.png")
    refused(f"{dt / '1.png'}: the map is too large (20000 x 20000)")
    (dt / "1.png").unlink()
    (dt / "1.png").mkdir()
    refused(f"{dt / '1.png'}: the map cannot be read: Is a directory")


def test_folders_that_are_none(tmp_path):
    gt = save(tmp_path / "gt", [[[0, 1]]])
    for wrong, message in ((gt / "0.png", "this is no folder"), (tmp_path / "x", "there is no such folder")):
        for folders in ((wrong, gt), (gt, wrong)):
            with pytest.raises(DataError, match=message):
                score_segmentation(*folders, num_classes=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder holds no PNG"):
        score_segmentation(tmp_path / "empty", gt, num_classes=2)
