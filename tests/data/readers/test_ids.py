import numpy as np

from gesso.data.readers.ids import stable_ids


def test_an_id_depends_on_the_name_alone():
    names = [f"images/{i}.jpg" for i in range(500)]
    ids = dict(zip(names, stable_ids(names).tolist(), strict=True))
    assert len(set(ids.values())) == 500 and min(ids.values()) > 0 and max(ids.values()) < 2**52
    some = [*reversed(names[100:200]), "new.jpg"]
    assert stable_ids(some).tolist()[:-1] == [ids[name] for name in some[:-1]]
    assert stable_ids(["a.jpg"]).tolist() == [stable_ids(["b", "a.jpg"]).tolist()[1]]


def test_collisions_are_resolved_alike_in_any_order():
    names = [f"{i}" for i in range(250)]
    ids = stable_ids(names, bits=8)
    assert len(set(ids.tolist())) == 250 and ids.min() >= 1 and ids.max() < 256
    order = np.random.default_rng(0).permutation(250)
    assert np.array_equal(stable_ids([names[i] for i in order], bits=8), ids[order])


def test_equal_and_no_names():
    assert len(set(stable_ids(["a", "a", "a"]).tolist())) == 3 and len(stable_ids([])) == 0
