import itertools

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.data import duplicates
from gesso.errors import ConfigError


def scene(seed: int, height: int = 240, width: int = 320) -> np.ndarray:
    """A textured picture (H, W, 3): smooth noise and some discs."""
    rng = np.random.default_rng(seed)
    picture = cv2.resize(rng.integers(0, 255, (6, 8, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(5):
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        cv2.circle(picture, centre, int(rng.integers(10, 60)), rng.integers(0, 255, 3).tolist(), -1)
    return picture


def slow_pairs(hashes: np.ndarray, distance: int) -> set[tuple[int, int]]:
    values = [int(h) for h in hashes]
    return {
        (i, j)
        for i, j in itertools.combinations(range(len(values)), 2)
        if (values[i] ^ values[j]).bit_count() <= distance
    }


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 8), st.integers(0, 2**32), st.integers(0, 40))
def test_near_pairs_are_those_of_the_slow_search(distance, seed, count):
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 2**63, 4, np.int64).astype(np.uint64)
    hashes = base[rng.integers(0, 4, count)]
    for _ in range(6):
        hashes = hashes ^ (np.uint64(1) << rng.integers(0, 64, count).astype(np.uint64))
    found = {
        (min(i, j), max(i, j))
        for a, b in duplicates.near_pairs(hashes, distance, np.arange(count))
        for i, j in zip(a.tolist(), b.tolist(), strict=True)
    }
    assert found == slow_pairs(hashes, distance)


def test_long_runs_come_in_pieces(monkeypatch):
    monkeypatch.setattr(duplicates, "_PAIRS_AT_ONCE", 10)
    pieces = [len(a) for a, _ in duplicates.near_pairs(np.full(30, 7, np.uint64), 0, np.arange(30))]
    assert sum(pieces) == 30 * 29 // 2 + 29  # neighbours come first, and again
    assert max(pieces) <= 29


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 8), st.integers(0, 2**32), st.integers(0, 60), st.integers(1, 40))
def test_groups_are_closed_under_nearness(distance, seed, count, kinds):
    """Thumbnails turn by steps of which two are too far, so that groups hold together by chains alone."""
    rng = np.random.default_rng(seed)
    flips = rng.integers(0, 64, (3, count)).astype(np.uint64)
    hashes = rng.integers(0, 2**63, 2, np.int64).astype(np.uint64)[rng.integers(0, 2, count)]
    for bits in flips:
        hashes = hashes ^ (np.uint64(1) << bits)
    angles = rng.integers(0, kinds, count) * 0.1
    thumbnails = np.zeros((count, 256), np.float32)
    thumbnails[:, 0], thumbnails[:, 1] = np.cos(angles), np.sin(angles)
    edges = [(a, b) for a, b in slow_pairs(hashes, distance) if abs(angles[a] - angles[b]) < 0.14]
    expected = duplicates.join(
        np.arange(count), np.array([a for a, _ in edges], np.int64), np.array([b for _, b in edges], np.int64)
    )
    prints = duplicates.Fingerprints(hashes, thumbnails, np.ones(count, bool))
    assert duplicates.group_near(np.arange(count), prints, distance=distance).tolist() == expected.tolist()


@pytest.mark.parametrize("noise", [0, 1])
def test_the_alike_pictures_of_a_static_camera_cost_few_pairs(monkeypatch, noise):
    """All pairs would be 56 tables of 450,000 each."""
    count, pairs = 3000, []
    candidates = duplicates._candidates

    def counted(keys, groups):
        for a, b in candidates(keys, groups):
            pairs.append(len(a))
            yield a, b

    monkeypatch.setattr(duplicates, "_candidates", counted)
    rng = np.random.default_rng(0)
    hashes = np.full(count, 12345, np.uint64) ^ (rng.integers(0, 16, count).astype(np.uint64) << np.uint64(30)) * noise
    thumbnails = np.full((count, 256), 1 / 16, np.float32)
    prints = duplicates.Fingerprints(hashes, thumbnails, np.ones(count, bool))
    assert not duplicates.group_near(np.arange(count), prints).any()
    assert sum(pairs) <= 60 * count


@pytest.mark.parametrize("distance", [-1, 9])
def test_a_distance_out_of_range_is_refused(distance):
    with pytest.raises(ConfigError, match="0 to 8"):
        next(duplicates.near_pairs(np.zeros(2, np.uint64), distance, np.arange(2)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
def test_join_makes_the_connected_components(edges):
    groups = [{i} for i in range(20)]
    for a, b in edges:
        merged = groups[a] | groups[b]
        for i in merged:
            groups[i] = merged
    a = np.array([e[0] for e in edges], np.int64)
    b = np.array([e[1] for e in edges], np.int64)
    assert duplicates.join(np.arange(20), a, b).tolist() == [min(group) for group in groups]


def test_equal_content_groups_and_unknown_content_does_not():
    content = np.array([5, 0, 5, 0, 9], np.uint64)
    assert duplicates.group_equal(content, content != 0).tolist() == [0, 1, 0, 3, 4]


def test_the_hash_is_the_sign_of_the_gradient():
    ramp = np.tile(np.arange(9, dtype=np.uint8) * 20, (8, 1))
    assert duplicates.difference_hash(ramp) == 2**64 - 1
    assert duplicates.difference_hash(ramp[:, ::-1].copy()) == 0
    step = np.zeros((8, 9), np.uint8)
    step[3, 5:] = 90
    assert duplicates.difference_hash(step) == 1 << (3 * 8 + 4)


def test_copies_are_joined_and_other_pictures_are_not(tmp_path):
    paths = []

    def write(name: str, picture: np.ndarray, quality: int = 92) -> None:
        paths.append(tmp_path / name)
        assert cv2.imwrite(str(paths[-1]), picture, [cv2.IMWRITE_JPEG_QUALITY, quality])

    for seed in range(6):
        write(f"{seed}.jpg", scene(seed))
    write("0_low.jpg", scene(0), 35)
    write("1_half.png", cv2.resize(scene(1), (160, 120), interpolation=cv2.INTER_AREA))
    write("2_tiny.jpg", cv2.resize(scene(2), (80, 60), interpolation=cv2.INTER_AREA))
    write("3_blur.jpg", cv2.GaussianBlur(scene(3), (0, 0), 1.5))
    write("4_mirrored.jpg", scene(4)[:, ::-1])
    flat = np.full((50, 50, 3), 128, np.uint8)
    write("flat.png", flat)
    write("flat2.png", flat)
    paths += [tmp_path / "missing.jpg", None]
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    paths += [tmp_path / "text.jpg", tmp_path / "empty.jpg"]

    seen = []
    prints = duplicates.fingerprints(paths, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(paths), len(paths))
    assert prints.usable.tolist() == [True] * 11 + [False] * 6
    labels = duplicates.group_near(np.arange(len(paths)), prints)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 10, 11, 12, 13, 14, 15, 16]


def test_the_thumbnail_rejects_what_shares_a_hash_only(tmp_path):
    """Two ramps of very different shape have the same signs, so the same hash."""
    x = np.linspace(0, 1, 90)
    for name, curve in (("a", x), ("b", x**8)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.tile((30 * x + 220 * curve).astype(np.uint8), (80, 1)))
    prints = duplicates.fingerprints([tmp_path / "a.png", tmp_path / "b.png"])
    assert np.bitwise_count(prints.hashes[0] ^ prints.hashes[1]) <= duplicates.MAX_DISTANCE
    assert duplicates.group_near(np.arange(2), prints, distance=duplicates.MAX_DISTANCE).tolist() == [0, 1]
