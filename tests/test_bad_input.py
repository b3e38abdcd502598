"""Everything wrong that users bring, through the command line: one line each, no traceback, nothing lost."""

import contextlib
import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from gesso.data.index import Index
from tests.command_line import Called, coco, environment, huge_png, picture, process, the_line, tree, write

TINY = ("debug:tiny", "--device", "cpu")


@pytest.fixture
def source(tmp_path):
    """A folder that holds a sound COCO data set of three pictures."""
    folder = tmp_path / "source"
    coco(folder)
    return folder


@pytest.fixture
def index(source, tmp_path, gesso):
    gesso("data", "import", source, "--out", tmp_path / "index")
    return tmp_path / "index"


def refused(gesso, folder, *words):
    """The line of a mistake, after which everything below ``folder`` is as it was."""
    before = tree(folder)
    line = gesso.mistake(*words)
    assert tree(folder) == before
    return line


class TestSources:
    def test_wrong_path(self, gesso, tmp_path):
        line = refused(gesso, tmp_path, "data", "import", tmp_path / "nowhere", "--out", tmp_path / "i")
        assert line == f"{tmp_path}/nowhere: does not exist. Check the path."
        line = refused(gesso, tmp_path, "data", "check", tmp_path / "nowhere.json")
        assert line.startswith(f"{tmp_path}/nowhere.json: does not exist")

    @pytest.mark.parametrize(
        "words",
        [
            ("data", "stats", "nowhere"),
            ("data", "split", "nowhere", "--out", "o"),
            ("data", "export", "nowhere", "--out", "o"),
            ("score", "coco", "--gt", "nowhere", "--dt", "nowhere"),
            ("train", *TINY, "--data.train", "nowhere", "--out", "run"),
            ("evaluate", "nowhere", "--data", "nowhere"),
            ("predict", "nowhere", "nowhere.jpg", "--out", "o"),
            ("predict", "nowhere", "source/images/1.png", "--out", "o"),
        ],
    )
    def test_wrong_path_of_every_command(self, gesso, source, tmp_path, monkeypatch, words):
        monkeypatch.chdir(tmp_path)
        line = refused(gesso, tmp_path, *words)
        place, _, rest = line.partition(": ")
        assert "nowhere" in place and ". " in rest

    def test_empty_folder(self, gesso, tmp_path):
        (tmp_path / "empty").mkdir()
        line = refused(gesso, tmp_path, "data", "import", tmp_path / "empty", "--out", tmp_path / "i")
        assert line == f"{tmp_path}/empty: the folder is empty. Check the path."

    def test_folder_of_pictures_alone(self, gesso, tmp_path):
        picture(tmp_path / "photos" / "a.jpg")
        line = refused(gesso, tmp_path, "data", "import", tmp_path / "photos", "--out", tmp_path / "i")
        assert "photos: holds no annotations: found 1 pictures" in line and "Sought:" in line

    def test_json_that_breaks_off(self, gesso, source, tmp_path):
        file = source / "annotations.json"
        text = file.read_bytes()
        for share in (0.2, 0.5, 0.9):
            cut = text[: int(share * len(text))]
            file.write_bytes(cut)
            for words in (("import", source, "--out", tmp_path / "i"), ("check", source)):
                line = refused(gesso, tmp_path, "data", *words)
                assert line.startswith(f"{file}: this is not valid JSON: ") and line.endswith(
                    ("again.", "get it again.")
                )
                found = int(line.split(", byte ")[1].split(".")[0])
                assert len(cut) - 40 <= found <= len(cut)
                assert f"at line {cut[:found].count(bytes([10])) + 1}," in line

    @pytest.mark.parametrize(
        "text", ["", "[]", "null", "{}", '{"images": {}}', "\0\1\2", '{"images": [1], "categories": []}']
    )
    def test_json_of_another_kind(self, gesso, tmp_path, text):
        (tmp_path / "x.json").write_text(text)
        line = refused(gesso, tmp_path, "data", "import", tmp_path / "x.json", "--out", tmp_path / "i")
        assert line.startswith(f"{tmp_path}/x.json: ")

    def test_category_that_does_not_exist(self, gesso, source, tmp_path):
        document = json.loads((source / "annotations.json").read_text())
        document["annotations"][1]["category_id"] = 9
        write(source, document)
        line = refused(gesso, tmp_path, "data", "import", source, "--out", tmp_path / "i")
        assert line == (
            f"{source}/annotations.json: annotation 2 has the category id 9, which 'categories' lacks. "
            "Add the category to the file, or remove its annotations."
        )

    def test_annotation_for_an_unknown_image(self, gesso, source, tmp_path):
        document = json.loads((source / "annotations.json").read_text())
        document["annotations"][1]["image_id"] = 77
        write(source, document)
        made = gesso.json("data", "import", source, "--out", tmp_path / "i")
        assert made["issues"] == {"annotation for an unknown image": 1} and made["boxes"] == 2
        (issue,) = Index.open(tmp_path / "i").issues()
        assert issue.annotation_id == 2 and issue.action == "dropped" and "77" in issue.detail
        checked = gesso.json("data", "check", source, code=1)
        assert checked["problems"] == 1

    def test_a_source_that_may_not_be_read(self, gesso, source, tmp_path):
        if os.geteuid() == 0:
            pytest.skip("root may read everything")
        (source / "annotations.json").chmod(0)
        line = refused(gesso, tmp_path, "data", "import", source / "annotations.json", "--out", tmp_path / "i")
        assert "annotations.json: Permission denied" in line

    def test_out_stands_already_or_cannot_be_made(self, gesso, source, index, tmp_path):
        line = refused(gesso, tmp_path, "data", "import", source, "--out", index)
        assert line == f"{index}: an index stands here already. Choose another --out or --overwrite."
        line = refused(gesso, tmp_path, "data", "import", source, "--out", source)
        assert line == f"{source}: the folder is not empty and holds no index. Choose another --out."
        line = refused(gesso, tmp_path, "data", "import", source, "--out", source / "annotations.json" / "i")
        assert line.startswith(f"{source}/annotations.json: is a file")
        line = refused(gesso, tmp_path, "data", "export", index, "--out", source)
        assert line.startswith(f"{source}: exists already")
        gesso("data", "split", index, "--out", tmp_path / "parts", "--val", "1", "--no-near-duplicates")
        line = refused(gesso, tmp_path, "data", "split", index, "--out", tmp_path / "parts", "--val", "1")
        assert line == f"{tmp_path}/parts/train: an index stands here already. Choose another --out."

    def test_a_number_of_pictures_is_a_whole_one(self, gesso, index, tmp_path):
        made = gesso.json("data", "split", index, "--out", tmp_path / "parts", "--val", "1")
        assert {part["name"]: part["images"] for part in made["parts"]} == {"val": 1, "train": 2}
        for value in ("1.5", "inf"):
            line = refused(gesso, tmp_path, "data", "split", index, "--out", tmp_path / "other", "--val", value)
            assert line.startswith(f"--val {value} is neither a share below 1 nor a number of images")

    def test_a_damaged_index(self, gesso, index, tmp_path):
        column = max(index.glob("*.npy"), key=lambda file: file.stat().st_size)
        column.write_bytes(column.read_bytes()[:-3])
        line = refused(gesso, tmp_path, "data", "stats", index)
        assert line.startswith(f"{column}: a column of the index has ") and line.endswith("Import the data again.")


class TestPictures:
    def test_bad_ones_are_kept_aside_and_odd_ones_are_not(self, gesso, tmp_path):
        folder = tmp_path / "source"
        document = coco(folder, 7)
        images = folder / "images"
        (images / "1.png").write_bytes(b"")
        (images / "2.png").unlink()
        (images / "2.jpg").write_text("a text file, no picture\n" * 9)
        document["images"][1]["file_name"] = "2.jpg"
        picture(images / "3.png", (1, 1))
        huge_png(images / "4.png")
        document["annotations"][4]["image_id"] = 6  # picture 5 is a negative
        (images / "7.png").unlink()
        write(folder, document)
        made = gesso.json("data", "import", folder, "--out", tmp_path / "i")
        index = Index.open(tmp_path / "i")
        assert list(index.names) == ["3.png", "5.png", "6.png"] and made["images"] == 3
        aside = {issue.image: issue.what for issue in index.issues() if issue.action == "kept aside"}
        assert aside == {
            "1.png": "picture is empty",
            "2.jpg": "picture cannot be read",
            "4.png": "picture is too large",
            "7.png": "picture is missing",
        }
        assert len(index.objects(1).labels) == 0
        checked = gesso("data", "check", folder, code=1).out
        for what in (*aside.values(), "picture without a box (negative)", "class without images"):
            assert what in checked, what
        assert "20000 x 20000 pixels" in checked

    def test_no_box_at_all(self, gesso, tmp_path):
        coco(tmp_path / "source", boxes=0)
        gesso("data", "import", tmp_path / "source", "--out", tmp_path / "i")
        assert "picture without a box (negative)" in gesso("data", "check", tmp_path / "i", code=1).out
        found = gesso.json("data", "stats", tmp_path / "i")
        assert found["boxes"] == 0 and found["negatives"] == 3 and found["unused"] == ["cat", "dog"]
        line = refused(gesso, tmp_path, "train", *TINY, "--data.train", tmp_path / "i", "--out", tmp_path / "run")
        assert line.startswith(
            f"{tmp_path}/i: none of its 3 images has a box: there is nothing to learn. Name an index"
        )

    def test_no_picture_at_all(self, gesso, tmp_path):
        write_folder = tmp_path / "source"
        write_folder.mkdir()
        write(write_folder, {"images": [], "annotations": [], "categories": []})
        gesso("data", "import", write_folder, "--out", tmp_path / "i")
        assert "no image" in gesso("data", "check", tmp_path / "i", code=1).out
        stats = gesso("data", "stats", tmp_path / "i", "--json").out
        assert "NaN" not in stats and json.loads(stats)["images"] == 0
        for words in (("data", "split", tmp_path / "i"), ("train", *TINY, "--data.train", tmp_path / "i")):
            assert f"{tmp_path}/i: " in refused(gesso, tmp_path, *words, "--out", tmp_path / "o")

    def test_class_without_images_is_legal(self, gesso, index):
        checked = gesso("data", "check", index)
        assert "class without images" in checked.out and "dog" in checked.out and "no problem found" in checked.out
        assert gesso.json("data", "stats", index)["unused"] == ["dog"]


class TestCalls:
    @pytest.mark.parametrize(
        ("words", "named"),
        [
            ("trian debug:tiny", "'train'"),
            ("data imprt x", "'import'"),
            ("score coca", "'coco'"),
            ("train debug:tinny --out r", "'debug:tiny'"),
            ("train dbug:tiny --out r", "'debug:tiny'"),
            ("train debug:tiny --out r --training.stps 3", "'--training.steps'"),
            ("train debug:tiny --out r --trainig.steps=3", "'--training.steps'"),
            ("config debug:tiny --training.optimizer.rat 3", "'--training.optimizer.rate'"),
            ("train debug:tiny --out r --training.precision float63", "'float64'"),
            ("data import x --ouut y", "'--out'"),
            ("data import x --out y --format cocoo", "'coco'"),
            ("recipes --chek", "'--check'"),
        ],
    )
    def test_the_nearest_name_is_suggested(self, gesso, tmp_path, monkeypatch, words, named):
        monkeypatch.chdir(tmp_path)
        line = refused(gesso, tmp_path, *words.split())
        assert f"Did you mean {named}" in line

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("data import x", "gesso data import needs --out PATH: The index to make."),
            ("data import --out x", "gesso data import needs PATH: A folder, or one annotation file."),
            ("data import x --out", "a value is missing behind --out"),
            ("data split x --out y --val much", "--val of gesso data split takes FLOAT, found 'much'"),
            ("data stats x y", "does not take the argument 'y'"),
            ("data stats x --seed 1", "unknown option '--seed' of gesso data stats"),
            ("train", "gesso train needs"),
            ("train debug:tiny", "the run's folder is not named. Add --out RUN."),
            ("train debug:tiny --out r --training.steps x", "--training.steps of gesso train debug:tiny takes INT"),
            ("train debug:tiny --out r --training.steps 0", "training: steps must be at least 1, found 0"),
            ("train debug:tiny --out r --init nowhere", "nowhere"),
        ],
    )
    def test_what_is_missing_or_of_another_kind_is_named(self, gesso, tmp_path, monkeypatch, words, said):
        monkeypatch.chdir(tmp_path)
        assert said in refused(gesso, tmp_path, *words.split())


class TestRuns:
    def test_a_run_folder_that_exists_is_refused(self, gesso, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text("{}")
        line = refused(gesso, tmp_path, "train", *TINY, "--out", tmp_path / "run")
        assert line.startswith(f"{tmp_path}/run: this folder exists already. Go on with its run by --resume")
        line = refused(gesso, tmp_path, "train", *TINY, "--out", tmp_path / "run", "--resume")
        assert line.startswith(f"{tmp_path}/run")
        line = refused(gesso, tmp_path, "train", *TINY, "--out", tmp_path / "other", "--resume")
        assert line.startswith(f"{tmp_path}/other: there is no such run folder")
        for words in (("evaluate", tmp_path / "run", "--data", "x"), ("predict", tmp_path, __file__, "--out", "o")):
            assert refused(gesso, tmp_path, *words).startswith(f"{tmp_path}")


class TestFullDisk:
    @pytest.fixture
    def small_disk(self, tmp_path):
        """A disk of one megabyte."""
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = shutil.which("mount")
        if (
            mount is None
            or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False).returncode
        ):
            pytest.skip("a small file system can be mounted by root alone")
        yield disk
        subprocess.run(["umount", disk], check=True)

    def fill(self, disk, left):
        """Fills the disk but for ``left`` bytes."""
        with (disk / "ballast").open("wb", buffering=0) as file:
            file.write(bytes(shutil.disk_usage(disk).free - left))

    def test_data_commands(self, gesso, index, small_disk):
        gesso("data", "export", index, "--out", small_disk / "earlier")
        self.fill(small_disk, 8192)
        for words in (
            ("import", index.parent / "source", "--out", small_disk / "i"),
            ("split", index, "--out", small_disk / "parts"),
            ("export", index, "--out", small_disk / "e", "--format", "voc"),
            ("export", index, "--out", small_disk / "earlier", "--pictures", "copy", "--overwrite"),
        ):
            line = refused(gesso, small_disk, "data", *words)
            assert line.startswith(f"{small_disk}/") and "the disk is full" in line and "Free some space" in line

    def test_the_rule_holds_without_a_disk_too(self, gesso, index, tmp_path, monkeypatch):
        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        for words in (("split", index, "--out", tmp_path / "parts"), ("export", index, "--out", tmp_path / "e")):
            assert "the disk is full" in refused(gesso, tmp_path, "data", *words)
        line = refused(gesso, tmp_path, "data", "import", tmp_path / "source", "--out", index, "--overwrite")
        assert "the disk is full" in line and len(Index.open(index)) == 3

    @pytest.mark.slow
    def test_training(self, index, small_disk):
        """A disk that is full before the first checkpoint: said in one line, and what was written can be read."""
        done = process("train", *TINY, "--data.train", index, "--out", small_disk / "run", cwd=small_disk)
        assert done.code == 2, done
        line = the_line(done)
        assert line.startswith(f"{small_disk}/run") and "Free some space" in line
        assert not [name for name in tree(small_disk) if ".tmp" in name]
        for row in (small_disk / "run" / "metrics.jsonl").read_text().splitlines():
            json.loads(row)
        json.loads((small_disk / "run" / "config.json").read_text())


@pytest.fixture
def begin(tmp_path):
    """Starts ``gesso ...`` in a process of its own, which ends with the test at the latest."""
    with contextlib.ExitStack() as ends:

        def start(*words):
            call = [sys.executable, "-m", "gesso", *map(str, words)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            running = ends.enter_context(subprocess.Popen(call, cwd=tmp_path, env=environment(), text=True, **pipes))
            ends.callback(running.kill)
            return running

        yield start


def wait_for(holds, running, seconds=300):
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end or running.poll() is not None:
            running.kill()
            pytest.fail(f"this did not come to pass: {running.communicate()}")
        time.sleep(0.02)


@pytest.mark.slow
class TestInterruption:
    def rows(self, run):
        file = run / "metrics.jsonl"
        return [json.loads(row) for row in file.read_text().splitlines()] if file.exists() else []

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_run_saves_and_says_how_to_go_on(self, begin, tmp_path, number):
        run = tmp_path / "a run"
        rare = [
            word for key in ("steps", "checkpoint-every", "evaluate-every") for word in (f"--training.{key}", "400")
        ]
        running = begin("train", *TINY, *rare, "--out", run)
        wait_for(lambda: len(self.rows(run)) >= 2, running)
        running.send_signal(number)
        called = Called(running.wait(300), *running.communicate())
        assert called.code == 128 + number, called
        line = the_line(called)
        assert (
            f"{run}: interrupted at step " in line and "is saved. Go on with: python -m gesso train debug:tiny" in line
        )
        reached = int(line.split("at step ")[1].split(";")[0])
        assert [path.name for path in (run / "checkpoints").iterdir() if path.is_dir()] == [f"{reached:08d}"]
        again = shlex.split(line.split("Go on with: python -m gesso ")[1])
        assert again[-1] == "--resume" and str(run) in again
        resumed = begin(*again)
        wait_for(lambda: self.rows(run)[-1]["step"] > reached, resumed)
        resumed.send_signal(number)
        assert resumed.wait(300) == 128 + number
        assert the_line(Called(128 + number, *resumed.communicate())).count("--resume") == 1
        steps = [row["step"] for row in self.rows(run)]
        assert steps == list(range(1, len(steps) + 1)) and steps[-1] > reached


@pytest.mark.parametrize("command", ["import", "split", "export"])
def test_ctrl_c_while_data_is_written_leaves_nothing(gesso, index, tmp_path, monkeypatch, command):
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.kill(os.getpid(), signal.SIGINT))
    source = tmp_path / "source" if command == "import" else index
    before = tree(tmp_path)
    line = the_line(gesso("data", command, source, "--out", tmp_path / "a new one", code=130))
    assert line.startswith("interrupted. Nothing half-written is left; call it again: ")
    assert shlex.split(line)[-1] == f"{tmp_path}/a new one" and tree(tmp_path) == before
