import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gesso.errors import DataError, InputError, RunError
from gesso.label_space import LabelSpace
from gesso.run.folder import RunFolder

SPACE = LabelSpace.from_names(["a", "b"])


def make(path):
    folder = RunFolder.create(path, {"config": {"seed": 1}})
    folder.write_label_space(SPACE)
    return folder


def test_create_and_open(tmp_path):
    make(tmp_path / "r")
    folder = RunFolder.open(tmp_path / "r")
    assert folder.read_config() == {"config": {"seed": 1}} and folder.read_label_space() == SPACE
    with pytest.raises(RunError, match="--resume"):
        make(tmp_path / "r")
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")


@pytest.mark.parametrize("name", ["missing", "."])
def test_open_says_what_is_missing(tmp_path, name):
    with pytest.raises(RunError, match="run folder"):
        RunFolder.open(tmp_path / name)


def test_rewind_cuts_rows_and_keeps_the_rest(tmp_path):
    folder = make(tmp_path / "r")
    for step in range(1, 6):
        folder.append({"step": step, "loss": 0.1 * step})
    with folder.metrics.open("a") as file:
        file.write('{"step": 6, "lo')
    folder.detections.mkdir()
    for name in ("00000002.parquet", "00000004.parquet"):
        (folder.detections / name).write_text(name)
    assert [row["step"] for row in folder.rows()] == [1, 2, 3, 4, 5]
    folder.rewind(3)
    lines = folder.metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    assert sorted(p.name for p in folder.detections.iterdir()) == ["00000002.parquet", "00000004.parquet.stale"]


def test_two_processes_cannot_hold_one_run(tmp_path):
    folder = make(tmp_path / "r")
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from gesso.errors import RunError\nfrom gesso.run.folder import RunFolder\n"
        "try:\n    RunFolder.open(Path(sys.argv[1])).locked().__enter__()\n"
        "except RunError as error:\n    print(error); sys.exit(3)\n"
    )
    with folder.locked():
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder.path)], capture_output=True, text=True, check=False
        )
    assert done.returncode == 3 and "another process" in done.stdout
    with folder.locked():
        pass


def test_what_a_process_left_that_died_in_making_the_folder_is_nothing(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / ".config.json.4711.tmp").write_text('{"conf')
    assert make(tmp_path / "r").read_config() == {"config": {"seed": 1}}


def test_later_detections_are_kept_aside_under_a_free_name(tmp_path):
    folder = make(tmp_path / "r")
    for _ in range(3):
        (folder.detections / "00000012").mkdir(parents=True)
        (folder.detections / "00000012" / "detections.parquet").touch()
        folder.rewind(8)
    names = sorted(path.name for path in folder.detections.iterdir())
    assert names == ["00000012.2.stale", "00000012.3.stale", "00000012.stale"]


def test_categories_of_a_run_are_fixed(tmp_path):
    folder = make(tmp_path / "r")
    folder.keep_label_space(SPACE)
    with pytest.raises(DataError, match="another order"):
        folder.keep_label_space(LabelSpace.from_names(["b", "a"]))
    assert folder.read_label_space() == SPACE


def test_a_row_that_cannot_be_written_leaves_no_torn_line(tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path / "r", {"config": {}})
    folder.append({"step": 1})

    torn = os.open(folder.metrics, os.O_WRONLY | os.O_APPEND)

    class Full(io.StringIO):
        def write(self, text):
            os.write(torn, text[:5].encode())
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda *given, **more: Full())
        with pytest.raises(InputError, match="No space left"):
            folder.append({"step": 2})
    os.close(torn)
    folder.append({"step": 3})
    assert folder.rows() == [{"step": 1}, {"step": 3}]
