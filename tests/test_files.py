import errno

import pytest

from gesso import files
from gesso.errors import InputError


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.json"
    files.write_json(path, {"a": [1, 2]})
    assert files.read_json(path) == {"a": [1, 2]}
    with pytest.raises(RuntimeError), files.atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert files.read_json(path) == {"a": [1, 2]}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "index"
    with pytest.raises(KeyboardInterrupt), files.atomic_folder(path) as temporary:
        (temporary / "x").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with files.atomic_folder(path) as temporary:
        (temporary / "x").write_text("one")
    with pytest.raises(InputError, match="exists already"), files.atomic_folder(path):
        pass
    with files.atomic_folder(path, overwrite=True) as temporary:
        (temporary / "x").write_text("two")
    assert (path / "x").read_text() == "two" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_said_in_one_line(tmp_path):
    path = tmp_path / "a.bin"
    path.write_text("old")
    with pytest.raises(InputError, match="disk is full") as caught, files.atomic_file(path) as temporary:
        temporary.write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "\n" not in str(caught.value) and path.read_text() == "old"


@pytest.mark.parametrize(
    ("content", "words"),
    [(b'{"a": [1,', "line 1, column"), (b"\xff\xfe\x00", "not a text file"), (None, "No such file")],
)
def test_reading_says_where_it_breaks(tmp_path, content, words):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        files.read_json(path)


def test_a_file_where_the_folder_should_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        files.write_text(tmp_path / "file" / "a.json", "text")
