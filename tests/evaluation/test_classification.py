import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.errors import DataError
from gesso.evaluation.classification import ranks_of_truth, score_classification, score_label_files, score_ranks

NAMES = tuple("abcdefg")


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), classes=st.integers(1, 7), pictures=st.integers(1, 12))
def test_equal_to_sorting_the_classes(seed, classes, pictures):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (pictures, classes)) / 4  # many equal ones
    labels = rng.integers(0, classes, pictures)
    ranks = [sorted(range(classes), key=lambda c: (-row[c], c)).index(k) for row, k in zip(scores, labels, strict=True)]
    assert ranks_of_truth(scores, labels).tolist() == ranks
    found = score_classification(scores, labels, NAMES[:classes])
    assert found["top1"] == pytest.approx(sum(rank == 0 for rank in ranks) / pictures)
    assert found["top5"] == pytest.approx(sum(rank < 5 for rank in ranks) / pictures)
    for label, name in enumerate(NAMES[:classes]):
        of_class = [rank == 0 for rank, k in zip(ranks, labels, strict=True) if k == label]
        assert found["by_class"][name] == (pytest.approx(sum(of_class) / len(of_class)) if of_class else None)


def test_numbers_by_hand():
    scores = np.array([[0.1, 0.9, 0.0, 0.0, 0.0, 0.0], [6, 5, 4, 3, 2, 1.0], [6, 5, 4, 3, 2, 1.0]])
    found = score_classification(scores, np.array([1, 4, 5]), NAMES[:6])
    assert found["top1"] == pytest.approx(1 / 3) and found["top5"] == pytest.approx(2 / 3)
    assert found["by_class"] == {"a": None, "b": 1.0, "c": None, "d": None, "e": 0.0, "f": 0.0}


def test_no_picture_and_scores_that_are_not_finite():
    none = score_ranks(np.zeros(0, np.int64), np.zeros(0, np.int64), ("a",))
    assert none == {"top1": None, "top5": None, "by_class": {"a": None}}
    with pytest.raises(DataError, match=r"a score of picture 1 .* is not finite"):
        ranks_of_truth(np.array([[0.0, 1.0], [np.nan, 0.0]]), np.array([0, 0]))


def files(folder, truth, guesses):
    (folder / "gt.csv").write_text(truth, encoding="utf-8")
    (folder / "dt.csv").write_text(guesses, encoding="utf-8")
    return folder / "gt.csv", folder / "dt.csv"


TRUTH = "image,label\n1.jpg,cat\n2.jpg,dog\n3.jpg,Dog\n4.jpg,owl\n"


def test_one_guess_an_image(tmp_path):
    found = score_label_files(*files(tmp_path, TRUTH, "image,label\n4.jpg,cat\n2.jpg,dog\n3.jpg, DOG \n1.jpg,emu\n"))
    assert found == {"top1": 0.5, "top5": 0.5, "by_class": {"cat": 0.0, "dog": 1.0, "owl": 0.0}}


def test_ranked_guesses_as_they_stand_or_by_score(tmp_path):
    guesses = {
        "1.jpg": "cat dog emu owl ant bat",
        "2.jpg": "ant bat cat emu dog owl",
        "3.jpg": "ant bat cat emu owl dog",
    }
    guesses["4.jpg"] = "owl"
    rows = [(image, label, 9 - k) for image, names in guesses.items() for k, label in enumerate(names.split())]
    expected = {"top1": 0.5, "top5": 0.75, "by_class": {"cat": 1.0, "dog": 0.0, "owl": 1.0}}
    plain = "image,label\n" + "".join(f"{image},{label}\n" for image, label, _ in rows)
    assert score_label_files(*files(tmp_path, TRUTH, plain)) == expected
    mixed = np.random.default_rng(0).permutation(len(rows))
    scored = "score,label,image,note\n" + "".join(f"{rows[k][2]},{rows[k][1]},{rows[k][0]},x\n" for k in mixed)
    assert score_label_files(*files(tmp_path, TRUTH, scored)) == expected


def test_csv_as_spreadsheets_write_it(tmp_path):
    truth = '\ufeffimage, label\r\n"a, b.jpg","brown ""big"" bear"\r\n\r\n'
    found = score_label_files(*files(tmp_path, truth, 'image,label\n"a, b.jpg","Brown ""big""  bear"\n'))
    assert found == {"top1": 1.0, "top5": 1.0, "by_class": {'brown "big" bear': 1.0}}


@pytest.mark.parametrize(
    ("truth", "guesses", "message"),
    [
        (
            "a,b\n1,2\n",
            "image,label\n",
            r"gt.csv: the column 'image' is missing: the file has the columns a, b. The first",
        ),
        ("image,b\n1,2\n", "image,label\n", r"gt.csv: the column 'label' is missing"),
        ("", "image,label\n", r"gt.csv: the column 'image' is missing: the file is empty"),
        (TRUTH, "image;label\n1;2\n", r"dt.csv: the column 'image' is missing: the file has the columns image;label"),
        (TRUTH + "1.jpg,owl\n", "image,label\n", r"gt.csv: line 6: the image '1.jpg' stands twice"),
        (TRUTH, "image,label\n9.jpg,cat\n", r"dt.csv: line 2: the image '9.jpg' is not in .*gt.csv. Score against"),
        (TRUTH, "image,label\n1.jpg,cat\n", r"dt.csv: there is no guess for the image '2.jpg' of .*gt.csv. Every"),
        (
            TRUTH,
            "image,label\n1.jpg,cat\n1.jpg,CAT\n",
            r"dt.csv: line 3: the class 'CAT' is guessed twice for the image",
        ),
        (TRUTH, "image,label\n1.jpg\n", r"dt.csv: line 2: the label is missing"),
        (TRUTH, "image,label\n ,cat\n", r"dt.csv: line 2: the image is missing"),
        (TRUTH, "image,label,score\n1.jpg,cat,much\n", r"dt.csv: line 2: the score is no finite number, but 'much'"),
        (TRUTH, "image,label,score\n1.jpg,cat,nan\n", r"dt.csv: line 2: the score is no finite number, but 'nan'"),
        (TRUTH, "image,label,score\n1.jpg,cat\n", r"dt.csv: line 2: the score is no finite number, but ''"),
        (TRUTH, 'image,label\n1.jpg,"cat\n', r"dt.csv: line \d: this is not valid CSV: unexpected end of data"),
    ],
)
def test_files_that_are_wrong_are_refused(tmp_path, truth, guesses, message):
    with pytest.raises(DataError, match=message):
        score_label_files(*files(tmp_path, truth, guesses))


def test_files_that_are_none_are_refused(tmp_path):
    gt, dt = files(tmp_path, TRUTH, TRUTH)
    with pytest.raises(DataError, match=r"absent.csv: No such file or directory. Check the path."):
        score_label_files(tmp_path / "absent.csv", dt)
    with pytest.raises(DataError, match=r"Is a directory"):
        score_label_files(gt, tmp_path)
    dt.write_bytes(b"image,label\n1.jpg,\xff\n")
    with pytest.raises(DataError, match=r"dt.csv: this is not a text file \(byte 18\)"):
        score_label_files(gt, dt)
