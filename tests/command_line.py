"""Calls the command line: in this process, which is fast, or in one of its own, where the process matters."""

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from gesso.cli import main


class Called(NamedTuple):
    code: int
    out: str
    err: str


class Command:
    """``gesso ...`` in this process."""

    def __init__(self, capsys):
        self._capsys = capsys

    def __call__(self, *words, code=0):
        """Calls it and checks the exit code."""
        self._capsys.readouterr()
        found = main([str(word) for word in words])
        called = Called(found, *self._capsys.readouterr())
        assert called.code == code, called
        assert "Traceback" not in called.err, called.err
        return called

    def json(self, *words, code=0):
        """The one JSON document on standard output."""
        return json.loads(self(*words, "--json", code=code).out)

    def mistake(self, *words):
        """The one line that a mistake is told in, without the program's name."""
        return the_line(self(*words, code=2))


def process(*words, cwd, **options):
    """``python -m gesso ...`` in a process of its own."""
    call = [sys.executable, "-m", "gesso", *map(str, words)]
    done = subprocess.run(call, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300, **options)
    return Called(done.returncode, done.stdout, done.stderr)


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}


def the_line(called):
    """The line of an error, which stands once and beside which there are at most lines of the log."""
    lines = called.err.splitlines()
    found = [line for line in lines if line.startswith("gesso: ")]
    rest = [line for line in lines if line not in found and line[2:3] != ":"]
    assert len(found) == 1 and not rest, called.err
    assert not called.out, called.out
    return found[0].removeprefix("gesso: ")


def tree(folder):
    """Every file below a folder (hidden ones too) with its bytes, and every folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def picture(path, size=(40, 30), seed=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (seed * 9 % 256, seed * 31 % 256, 70)).save(path)


def coco(folder, pictures=3, *, size=(40, 30), categories=("cat", "dog"), boxes=1):
    """A COCO data set whose boxes are all of the first category; gives its document."""
    folder = Path(folder)
    document = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories, 1)],
    }
    for number in range(1, pictures + 1):
        picture(folder / "images" / f"{number}.png", size, number)
        image = {"id": number, "file_name": f"{number}.png", "width": size[0], "height": size[1]}
        document["images"].append(image)
        for i in range(boxes):
            box = [2 + i, 3, 10 + number, 12]
            row = {"id": len(document["annotations"]) + 1, "image_id": number, "category_id": 1, "bbox": box}
            document["annotations"].append(row | {"area": box[2] * box[3], "iscrowd": 0})
    write(folder, document)
    return document


def write(folder, document):
    (folder / "annotations.json").write_text(json.dumps(document, indent=1))


def huge_png(path, side=20_000):
    """A black picture of ``side`` x ``side`` in a few kilobytes: one bit a pixel."""
    row = b"\0" * (1 + side // 8)
    deflate = zlib.compressobj(9)
    data = b"".join(deflate.compress(row) for _ in range(side)) + deflate.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in chunks
        )
    )
