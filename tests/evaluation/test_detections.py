import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gesso.data.records import Masks, Rle
from gesso.data.rle import encode
from gesso.errors import DataError, InputError
from gesso.evaluation import detection_files
from gesso.evaluation.detection_files import read_detections, write_detections
from gesso.evaluation.detections import DetectionTable
from gesso.label_space import LabelSpace

IDS = (5, 0, 90)


def table(count, seed=0, masks=False):
    rng = np.random.default_rng(seed)
    low = rng.random((count, 2)) * 100
    drawn = [encode(rng.random((6, 8)) < 0.5) for _ in range(count)] if masks else None
    return DetectionTable(
        image_id=rng.integers(0, 2**60, count),
        label=rng.integers(0, 3, count),
        score=rng.random(count),
        xyxy=np.concatenate([low, low + rng.random((count, 2)) * 50], axis=1).astype(np.float32),
        masks=None if drawn is None else Masks.of(drawn),
    )


def assert_same(a, b):
    assert np.array_equal(a.image_id, b.image_id)
    assert np.array_equal(a.label, b.label)
    assert np.array_equal(a.score, b.score)
    assert np.array_equal(a.boxes_xywh(), b.boxes_xywh())
    assert np.array_equal(a.sizes(), b.sizes())
    assert (a.masks is None) == (b.masks is None)
    if a.masks is not None:
        assert [a.masks[i] for i in range(len(a))] == [b.masks[i] for i in range(len(b))]


@pytest.mark.parametrize("name", ["dt.json", "dt.parquet"])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("count", [0, 1, 7, 25_000])
def test_files_give_the_same_numbers_back(tmp_path, name, masks, count):
    if masks and count > 100:
        return
    made = table(count, masks=masks and count > 0)
    write_detections(made, tmp_path / "new" / name, IDS)
    read = read_detections(tmp_path / "new" / name, IDS, masks=made.masks is not None)
    assert_same(made, read)
    assert np.allclose(made.xyxy, read.xyxy)
    assert [p.name for p in (tmp_path / "new").iterdir()] == [name]


def test_json_is_what_pycocotools_reads(tmp_path):
    write_detections(table(3), tmp_path / "dt.json", IDS)
    rows = json.loads((tmp_path / "dt.json").read_text())
    made = table(3)
    assert [row["category_id"] for row in rows] == [IDS[label] for label in made.label]
    assert [row["bbox"] for row in rows] == made.boxes_xywh().tolist()
    assert rows[0].keys() == {"image_id", "category_id", "bbox", "score"}


def test_masks_without_boxes_survive_a_round_trip(tmp_path):
    mask = {"size": [4, 5], "counts": [2, 3, 15]}
    path = tmp_path / "dt.json"
    path.write_text(json.dumps([{"image_id": 1, "category_id": 0, "score": 0.5, "segmentation": mask}]))
    first = read_detections(path, IDS, masks=True)
    assert first.areas.tolist() == [3]
    assert first.xyxy.tolist() == [[0, 0, 2, 4]]
    for name in ("again.json", "again.parquet"):
        write_detections(first, tmp_path / name, IDS)
        assert_same(first, read_detections(tmp_path / name, IDS, masks=True))


@given(gap=st.sampled_from([",", ", ", ",\n", " ,\t\n "]), piece=st.sampled_from([1, 60, 200, 10_000]))
def test_pieces_may_be_cut_anywhere(tmp_path_factory, gap, piece):
    path = tmp_path_factory.mktemp("pieces") / "dt.json"
    rows = [
        {"image_id": i, "category_id": 5, "score": i / 9, "bbox": [i, 1, 2, 3], "note": "}, {" if i == 4 else "]"}
        for i in range(9)
    ]
    path.write_text("\n [" + gap.join(map(json.dumps, rows)) + " ] \n")
    old, detection_files._PIECE = detection_files._PIECE, piece
    try:
        read = read_detections(path, IDS)
    finally:
        detection_files._PIECE = old
    assert read.image_id.tolist() == list(range(9))
    assert read.score.tolist() == [i / 9 for i in range(9)]


ROW = '{"image_id": 1, "category_id": 5, "bbox": [0, 0, 2, 2], "score": 0.5}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"[{ROW},\n{ROW[:30]}", r"not valid JSON: .* at byte 102 \(line 2\)"),
        (f"[{ROW}, {ROW}", "not valid JSON"),
        (f"[{ROW} {ROW}]", r"not valid JSON: .* at byte 71"),
        (f"[{ROW}] x", "not valid JSON"),
        (f'[{ROW}, {{"image_id": 1, "category_id": 5, "bbox": [0, 0, 2, 2]}}]', r"result 1 .*`score`"),
        (f'[{ROW}, {{"image_id": 1, "category_id": 5, "score": 1}}]', r"result 1 .*`bbox`"),
        (f"[{ROW}, {ROW.replace('0.5', 'NaN')}]", f"NaN or Infinity at byte {len(ROW) + 3 + ROW.index('0.5')}"),
        (f"[{ROW}, {ROW.replace('0.5', '-Infinity')}]", "NaN or Infinity at byte"),
        (f"[{ROW.replace('0.5', 'null')}]", r"result 0 .*'score'.*Expected `float`, got `null`"),
        (f"[{ROW.replace('2]', '2, 3]')}]", r"result 0 .*'bbox'.*length 4"),
        (f"[{ROW.replace(' 1,', ' 1.5,')}]", r"result 0 .*'image_id'.*Expected `int`"),
        (f"[{ROW}, {ROW.replace(': 5', ': 6')}]", r"result 1 .* unknown category id 6\. Use .*: 0, 5, 90"),
        ('{"images": [], "annotations": []}', "not a list of detections"),
        ("", "the file is empty"),
        ("\x00\x01", "not valid JSON"),
        ("[1, 2]", r"result 0 .*Expected `object`, got `int`"),
    ],
)
def test_broken_json_names_the_place(tmp_path, text, message):
    path = tmp_path / "dt.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_detections(path, IDS)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_in_a_late_piece_counts_rows_over_the_file(tmp_path):
    path = tmp_path / "dt.json"
    rows = [ROW] * 9_000
    path.write_text("[" + ", ".join([*rows, ROW.replace("score", "scores")]) + "]")
    with pytest.raises(DataError, match=r"result 9000 .*`score`"):
        read_detections(path, IDS)


def test_infinite_numbers_are_refused(tmp_path):
    path = tmp_path / "dt.parquet"
    for column, message in (("score", "the score of result 2"), ("xyxy", "the box of result 2")):
        made = table(4)
        getattr(made, column).flat[9 if column == "xyxy" else 2] = np.nan
        write_detections(made, path, IDS)
        with pytest.raises(DataError, match=message):
            read_detections(path, IDS)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[0, 0, 1, 1, 2, 2]], "no run-length encoding"),
        ({"size": [4, 5], "counts": [1, 2]}, "do not fill"),
        ({"size": [4, 5], "counts": "zzzz"}, "the mask is broken"),
        ({"size": [4], "counts": "zzzz"}, "size is"),
        ({"size": [4, 5], "counts": 7}, "counts are text"),
        ({"size": [4, 5]}, "counts are text"),
        (None, "`segmentation`"),
    ],
)
def test_broken_masks_name_their_row(tmp_path, segmentation, message):
    path = tmp_path / "dt.json"
    row = json.loads(ROW)
    good = row | {"segmentation": {"size": [4, 5], "counts": [20]}}
    path.write_text(json.dumps([good, row | {"segmentation": segmentation}]))
    with pytest.raises(DataError, match=f"result 1 .*{message}"):
        read_detections(path, IDS, masks=True)
    assert len(read_detections(path, IDS)) == 2


def test_parquet_that_is_none(tmp_path):
    path = tmp_path / "dt.parquet"
    path.write_text("[]")
    with pytest.raises(DataError, match="not a Parquet file"):
        read_detections(path, IDS)
    write_detections(table(2), path, IDS)
    with pytest.raises(DataError, match="the column 'mask_height' is missing"):
        read_detections(path, IDS, masks=True)
    with pytest.raises(DataError, match="No such file"):
        read_detections(tmp_path / "absent.parquet", IDS)
    with pytest.raises(DataError, match="folder"):
        read_detections(tmp_path, IDS)


def test_writing_refuses_equal_ids_and_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="the same id"):
        write_detections(table(2), tmp_path / "dt.json", (1, 1, 2))
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "dt.json"
    write_detections(table(2), path, IDS)
    before = path.read_bytes()
    monkeypatch.setattr(detection_files, "to_coco", lambda mask: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_detections(table(2, seed=1, masks=True), path, IDS)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["dt.json"]


def test_order_is_stable_by_image_and_falling_score():
    made = DetectionTable(
        image_id=[2, 1, 2, 1], label=[0, 1, 2, 3], score=[0.5, 0.5, 0.9, 0.5], xyxy=np.arange(16).reshape(4, 4)
    ).ordered()
    assert made.label.tolist() == [1, 3, 2, 0]
    assert made.of_image(2).xyxy.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]


def test_labels_go_to_another_space_by_name():
    here, there = LabelSpace.from_names(["cat", "dog", "cow"]), LabelSpace.from_names(["Cow", "cat"])
    made = DetectionTable(image_id=[1, 1, 1], label=[0, 1, 2], score=[1, 2, 3], xyxy=np.zeros((3, 4)))
    mapped = made.map_labels(here.map_to(there))
    assert mapped.label.tolist() == [1, 0]
    assert mapped.score.tolist() == [1, 3]


def test_concatenation_keeps_every_column():
    a, b = table(3, masks=True), table(4, seed=1, masks=True)
    joined = DetectionTable.concatenate([a, DetectionTable.empty(), b])
    assert_same(joined.take(np.arange(3)), a)
    assert_same(joined.take(np.arange(7) > 2), b)
    assert len(DetectionTable.concatenate([])) == 0
    assert isinstance(joined.masks[6], Rle)


@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_numbers_beyond_64_bits_are_refused_in_both_files(tmp_path, gesso, key):
    truth = {
        "images": [{"id": 1}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}],
    }
    found = [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]
    gt, dt = tmp_path / "gt.json", tmp_path / "dt.json"
    gt.write_text(json.dumps(truth))
    for wrong in (10**30, 2**63):
        dt.write_text(json.dumps([found[0] | {key: wrong}]))
        assert key in gesso.mistake("score", "coco", "--gt", gt, "--dt", dt)
    dt.write_text(json.dumps(found))
    truth["annotations"][0][key] = 10**30
    gt.write_text(json.dumps(truth))
    assert key in gesso.mistake("score", "coco", "--gt", gt, "--dt", dt)


def test_tables_without_rows_keep_that_there_are_masks():
    nothing = table(3, masks=True).take(np.zeros(0, np.int64))
    for joined in ([nothing], [DetectionTable.empty(), nothing], [nothing, nothing]):
        one = DetectionTable.concatenate(joined).ordered()
        assert len(one) == 0 and one.masks is not None and len(one.masks) == 0
    assert DetectionTable.concatenate([DetectionTable.empty()]).masks is None
    some = table(2, masks=True)
    assert_same(DetectionTable.concatenate([DetectionTable.empty(), nothing, some]), some)
