import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gesso.data.blocks import no_objects, one_label_each
from gesso.data.index import Index
from gesso.data.index_writer import IndexWriter
from gesso.data.known_spaces import known_space
from gesso.data.records import ImageBlock, ObjectBlock, Source, Strings
from gesso.data.selection import choose_classes, select
from gesso.errors import ConfigError, DataError
from gesso.label_space import LabelSpace

from .sample_index import write_index

SPACE = LabelSpace(names=("cat", "dog", "cow", "bird"), ids=(4, 2, 9, 1))


def boxes(folder, shown, space=SPACE):
    """An index without pictures: of each image the labels of its boxes."""
    counts = [len(labels) for labels in shown]
    writer = IndexWriter(folder, space, sources=[Source(name="s", root=str(folder), labelled=("cat", "cow"))])
    sizes = np.full(len(shown), 50, np.int32)
    names = Strings.of(f"{i}.png" for i in range(len(shown)))
    writer.add_images(ImageBlock(ids=np.arange(len(shown)) * 7 + 1, names=names, widths=sizes, heights=sizes))
    total = sum(counts)
    xyxy = np.tile(np.array([[1, 2, 3, 4]], np.float32), (total, 1)) + np.arange(total, dtype=np.float32)[:, None]
    labels = np.array([label for some in shown for label in some], np.int64)
    writer.add_objects(ObjectBlock(rows=np.repeat(np.arange(len(shown)), counts), xyxy=xyxy, labels=labels))
    return Index.open(writer.finish())


def classified(folder, labels, space=SPACE):
    """An index of pictures of one class each."""
    writer = IndexWriter(folder, space, sources=[Source(name="s", root=str(folder))])
    sizes = np.full(len(labels), 50, np.int32)
    names = Strings.of(f"{i}.png" for i in range(len(labels)))
    verified = one_label_each(labels)
    ids = np.arange(len(labels)) * 7 + 1
    writer.add_images(ImageBlock(ids=ids, names=names, widths=sizes, heights=sizes, verified=verified))
    writer.add_objects(no_objects())
    return Index.open(writer.finish())


def content(index):
    """By the name of the image: the names of its boxes' classes with the boxes."""
    return {
        index.name(row): [
            (index.label_space.names[label], tuple(box.tolist()))
            for label, box in zip(index.objects(row).labels, index.objects(row).xyxy, strict=True)
        ]
        for row in range(len(index))
    }


SHOWN = st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=12)
KEPT = st.sets(st.sampled_from(SPACE.names), min_size=1, max_size=3)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SHOWN, KEPT, st.booleans())
def test_classes_against_a_slow_form(tmp_path_factory, shown, kept, keep_empty):
    folder = tmp_path_factory.mktemp("s")
    index = boxes(folder / "i", shown)
    wanted = {}
    for name, objects in content(index).items():
        left = [(label, box) for label, box in objects if label in kept]
        if left or not objects or keep_empty:
            wanted[name] = left
    if not wanted:
        with pytest.raises(DataError, match="no image is left"):
            select(index, folder / "o", classes=kept, keep_empty=keep_empty)
        return
    made = select(index, folder / "o", classes=kept, keep_empty=keep_empty)
    found = Index.open(folder / "o")
    assert content(found) == wanted
    assert (made.images, made.boxes) == (len(found), found.num_boxes) and made.not_drawn == 0
    assert made.kept == found.label_space.names == tuple(name for name in SPACE.names if name in kept)
    assert found.label_space.ids == tuple(SPACE.ids[SPACE.index(name)] for name in made.kept)
    assert {one.name for one in made.dropped} == set(SPACE.names) - kept
    flat = [SPACE.names[label] for labels in shown for label in labels]
    for one in made.dropped:
        assert one.boxes == flat.count(one.name)
        assert one.images == sum(SPACE.index(one.name) in labels for labels in shown)
    emptied = [labels for labels in shown if labels and not {SPACE.names[label] for label in labels} & kept]
    assert made.emptied == len(emptied)
    assert found.sources[0].labelled == tuple(name for name in ("cat", "cow") if name in kept)


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**40), st.lists(st.floats(0.05, 1), min_size=2, max_size=4))
def test_fractions_lie_in_one_another(tmp_path_factory, seed, fractions):
    folder = tmp_path_factory.mktemp("s")
    index = boxes(folder / "i", [[0]] * 40)
    before: set[str] = set()
    for number, fraction in enumerate(sorted(fractions)):
        made = select(index, folder / str(number), fraction=fraction, seed=seed)
        names = list(Index.open(made.path).names)
        assert len(names) == round(fraction * 40) == made.images == 40 - made.not_drawn
        assert names == sorted(names, key=lambda name: int(name[:-4])) and before <= set(names)
        before = set(names)


def test_a_number_of_images_is_a_fraction_and_seeds_differ(tmp_path):
    index = boxes(tmp_path / "i", [[0]] * 200)
    for name, more in {
        "a": {"fraction": 0.25},
        "b": {"images": 50},
        "c": {"images": 50, "seed": 1},
    }.items():
        select(index, tmp_path / name, **more)
    a, b, c = (set(Index.open(tmp_path / name).names) for name in "abc")
    assert a == b != c and len(c) == 50
    assert 3 < len(a & c) < 25  # two draws of 50 from 200 share 12.5 in the mean


def test_the_draw_depends_on_ids_not_on_places(tmp_path):
    whole = boxes(tmp_path / "i", [[0]] * 60)
    made = select(whole, tmp_path / "half", fraction=0.5)
    again = select(Index.open(made.path), tmp_path / "tenth", images=6)
    direct = select(whole, tmp_path / "direct", images=6)
    assert list(Index.open(again.path).names) == list(Index.open(direct.path).names)


@pytest.mark.parametrize("count", [1, 2, 5, 50])
def test_per_class(tmp_path, count):
    rng = np.random.default_rng(count)
    shown = [rng.choice(4, rng.integers(0, 4), p=[0.6, 0.3, 0.09, 0.01]).tolist() for _ in range(80)]
    index = boxes(tmp_path / "i", shown)
    made = select(index, tmp_path / "o", per_class=count, classes=("cat", "dog", "cow"))
    taken = [set(shown[int(name[:-4])]) for name in Index.open(made.path).names]
    for label, name in enumerate(("cat", "dog", "cow")):
        there = sum(label in labels for labels in shown)
        assert sum(label in labels for labels in taken) >= min(count, there)
        assert (f"{name} ({there})" in " ".join(made.notes)) == (there < count)
    assert len(taken) <= 3 * count and all(labels & {0, 1, 2} for labels in taken)


def test_per_class_of_pictures_of_one_class_and_the_rest(tmp_path):
    """As Caltech-256 is divided in papers: a number of pictures a class, and all others."""
    labels = np.random.default_rng(0).integers(0, 4, 100)
    index = classified(tmp_path / "i", labels)
    made = select(index, tmp_path / "train", per_class=6, rest=tmp_path / "test", seed=3)
    train, test = Index.open(tmp_path / "train"), Index.open(tmp_path / "test")
    assert np.bincount(train.verified_columns.labels).tolist() == [6] * 4
    assert sorted([*train.names, *test.names]) == sorted(index.names)
    assert made.not_drawn == len(test) == 76 and made.rest == str(tmp_path / "test")
    for part in (train, test):
        for row in range(len(part)):
            assert int(np.argmax(part.verified(row) == 1)) == labels[int(part.name(row)[:-4])]


def test_pictures_of_a_dropped_class_go(tmp_path):
    index = classified(tmp_path / "i", [0, 1, 2, 3, 0, 1])
    made = select(index, tmp_path / "o", classes=("cat", "bird"))
    found = Index.open(made.path)
    assert list(found.names) == ["0.png", "3.png", "4.png"] and made.emptied == 3
    assert [found.verified(row).tolist() for row in range(3)] == [[1, 2], [2, 1], [1, 2]]
    with pytest.raises(ConfigError, match="would show no class at all"):
        select(index, tmp_path / "p", classes=("cat", "bird"), keep_empty=True)


def test_everything_else_is_kept(tmp_path):
    index = write_index(tmp_path)
    made = select(index, tmp_path / "o", classes=("dog", "traffic light"))
    found = Index.open(made.path)
    assert found.semantic is None and "semantic maps are left out" in made.notes[0]
    rows = {index.name(row): row for row in range(len(index))}
    for new in range(len(found)):
        old = rows[found.name(new)]
        at = np.arange(index.offsets[old], index.offsets[old + 1])
        at = at[np.isin(index.labels[at], (1, 2))]
        to = slice(found.offsets[new], found.offsets[new + 1])
        for name in ("boxes", "flags", "known_flags", "areas", "annotation_ids"):
            assert np.array_equal(getattr(index, name)[at], getattr(found, name)[to]), name
        assert list(found.object_columns["author"][to]) == [index.object_columns["author"][k] for k in at]
        assert [str(mask) for mask in found.masks(new)] == [str(index.mask_columns[k]) for k in at]
        states = index.verified(old)
        if states is not None:
            assert (found.verified(new) if found.verified(new) is not None else np.full(2, 2))[0] in (1, 2)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({}, ConfigError, "nothing is asked for"),
        ({"fraction": 0.5, "images": 3}, ConfigError, "--fraction and --images exclude one another"),
        ({"fraction": 0.0}, ConfigError, r"--fraction 0 is outside \(0, 1\]"),
        ({"fraction": 1.5}, ConfigError, r"--fraction 1.5 is outside"),
        ({"fraction": float("nan")}, ConfigError, "is outside"),
        ({"fraction": 0.01}, DataError, "no image is drawn"),
        ({"images": 0}, ConfigError, "--images 0 is below 1"),
        ({"images": 11}, ConfigError, "--images 11 are more than there are: 10"),
        ({"per_class": 0}, ConfigError, "--per-class 0 is below 1"),
        ({"classes": ()}, DataError, "no class is left"),
        ({"classes": ("dgo",)}, DataError, "unknown category 'dgo'.*'dog'"),
        ({"classes": ("cow",)}, DataError, "no image is left"),
        ({"classes": ("cat",), "rest": "r"}, ConfigError, "--rest takes what is not drawn"),
        ({"fraction": 1.0, "rest": "r"}, DataError, "every image is drawn"),
        ({"fraction": 0.5, "keep_empty": True}, ConfigError, "no class is dropped"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, more, error, message):
    monkeypatch.chdir(tmp_path)
    index = boxes(tmp_path / "i", [[0]] * 10)
    with pytest.raises(error, match=message):
        select(index, tmp_path / "o", **more)
    assert [file.name for file in tmp_path.iterdir()] == ["i"]


def test_nothing_is_overwritten_unasked(tmp_path):
    index = boxes(tmp_path / "i", [[0]] * 10)
    for out, more in (("i", {}), ("o", {"rest": tmp_path / "i"})):
        with pytest.raises(DataError, match="an index stands here already"):
            select(index, tmp_path / out, fraction=0.5, **more)
    select(index, tmp_path / "o", fraction=0.5)
    select(index, tmp_path / "o", fraction=0.2, overwrite=True)
    assert len(Index.open(tmp_path / "o")) == 2


def test_choosing_classes():
    coco = known_space("coco")
    assert choose_classes(SPACE, only=("bird", "Cat")) == ("cat", "bird")
    assert choose_classes(SPACE, only=("bird", "cat"), without=("cat",)) == ("bird",)
    objects365 = LabelSpace.from_names(["SUV", "Car", "Sneakers", "Pigeon", "Wild Bird", "Luggage"])
    assert choose_classes(objects365, without_of=coco) == ("SUV", "Sneakers", "Pigeon")
    assert choose_classes(objects365, without_of=coco, broad=True) == ("Sneakers",)
    assert choose_classes(objects365, only_of=known_space("voc")) == ("Car", "Wild Bird")
    assert choose_classes(objects365, only_of=coco, without=("car",)) == ("Wild Bird", "Luggage")


def test_objects365_without_coco(golden):
    """The strict set is the default, as in SPEC's 'w/o COCO 80'; the broad one leaves no near relative."""
    for version, strict, broad in (("objects365-v1", 87, 106), ("objects365-v2", 88, 105)):
        space = known_space(version)
        assert len(choose_classes(space, without_of=known_space("coco"))) == 365 - strict
        assert len(choose_classes(space, without_of=known_space("coco"), broad=True)) == 365 - broad


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"without_of": LabelSpace.from_names(["thing"])}, "none of the 4 classes counts as one of the other 1"),
        ({"without_of": known_space("voc"), "broad": True}, "--broad: no map of near relatives is known here"),
        ({"without": ("cat",), "broad": True}, "--broad widens"),
    ],
)
def test_choosing_that_has_no_effect_is_refused(more, message):
    with pytest.raises(ConfigError, match=message):
        choose_classes(LabelSpace.from_names(["cat", "dog", "own", "thingy"]), **more)
