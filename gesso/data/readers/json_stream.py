"""Streams the large arrays of one JSON object, so that a file of gigabytes needs memory for a few megabytes.

Elements are objects. A block is cut at its last ``},{``; since it begins at a true border, it decodes as a list if and
only if the cut is a true border too. Where it does not (the array ends in the block, or the pattern stood in a string
or an inner list), a scanner of tokens finds the border.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from gesso.errors import DataError

BLOCK = 1 << 23
_SPACE = re.compile(rb"[ \t\r\n]*")
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+("?)|[\[\]{}]', re.DOTALL)
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_LITERAL = re.compile(rb"[^,\]}\s]+")
_NEXT_OBJECT = re.compile(rb"[ \t\r\n]*\{")


class Piece(NamedTuple):
    """Some elements of an array.

    Attributes:
        key: the array's key.
        text: the JSON text ``[...]``.
        elements: what the decoder made of it; None where it could not.
        raw: where ``elements`` is None, the elements as plain Python values (NaN and Infinity are read here).
    """

    key: str
    text: bytes
    elements: list[Any] | None
    raw: list[Any]


def stream_arrays(
    path: Path,
    decoders: Mapping[str, Callable[[bytes], list[Any]]],
    *,
    block: int = BLOCK,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Piece]:
    """Yields the elements of the top-level arrays named in ``decoders``; an empty array gives one empty piece.

    Args:
        path: the file.
        decoders: array key -> function of a JSON list; it raises ``msgspec.DecodeError`` where it cannot.
        block: bytes read at once.
        progress: told the number of bytes read.

    Raises:
        DataError: the file cannot be read or is not one JSON object; names the line and the byte.
    """
    try:
        with path.open("rb") as file:
            yield from _Stream(file, path, decoders, block, progress).run()
    except OSError as error:
        raise DataError(error.strerror or str(error), where=path, remedy="Check the path.") from error


class _Stream:
    def __init__(
        self,
        file: BinaryIO,
        path: Path,
        decoders: Mapping[str, Callable[[bytes], list[Any]]],
        block: int,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.file, self.path, self.decoders, self.block, self.progress = file, path, decoders, block, progress
        self.buffer, self.at, self.base, self.ended = b"", 0, 0, False

    def run(self) -> Iterator[Piece]:
        self._fill()
        if self.buffer.startswith(b"\xef\xbb\xbf"):
            self.at = 3
        if self._peek() != b"{":
            raise self._broken("a JSON object should begin here")
        self.at += 1
        if self._peek() == b"}":
            self.at += 1
        else:
            yield from self._members()
        if self._peek():
            raise self._broken("something follows the end of the JSON object")

    def _members(self) -> Iterator[Piece]:
        while True:
            key = self._key()
            if self._peek() != b":":
                raise self._broken("a colon is missing")
            self.at += 1
            if key in self.decoders and self._peek() == b"[":
                self.at += 1
                yield from self._array(key)
            else:
                self._skip_value()
            mark = self._peek()
            if mark not in (b",", b"}"):
                raise self._broken("a comma or the end of the object is missing")
            self.at += 1
            if mark == b"}":
                return

    def _array(self, key: str) -> Iterator[Piece]:
        if self._peek() == b"]":
            self.at += 1
            yield Piece(key, b"[]", [], [])
            return
        while True:
            if self._peek() == b"]":
                raise self._broken("an element is missing")
            if len(self.buffer) - self.at < self.block:
                self._fill()
            piece, end = self._piece(key)
            yield piece
            self.at = end
            mark = self._peek()
            if mark not in (b",", b"]"):
                raise self._broken("a comma or the end of the list is missing")
            self.at += 1
            if mark == b"]":
                return

    def _piece(self, key: str) -> tuple[Piece, int]:
        """The elements from here to a border, and the border's position."""
        end = self._guess()
        if end:
            text = b"[" + self.buffer[self.at : end] + b"]"
            try:
                return Piece(key, text, self.decoders[key](text), []), end
            except (msgspec.DecodeError, UnicodeDecodeError):
                pass
        end = self._scan()
        while not end:
            if not self._fill():
                self.at = len(self.buffer)
                raise self._broken("the file breaks off")
            end = self._scan()
        text = b"[" + self.buffer[self.at : end] + b"]"
        try:
            return Piece(key, text, self.decoders[key](text), []), end
        except (msgspec.DecodeError, UnicodeDecodeError):
            return Piece(key, text, None, self._plain(text)), end

    def _plain(self, text: bytes) -> list[Any]:
        """Decodes with the standard library, which takes NaN and Infinity and says where it fails."""
        try:
            found: list[Any] = json.loads(text.decode("utf-8"))
        except UnicodeDecodeError as error:
            self.at += error.start - 1
            raise self._broken("the text is not UTF-8") from None
        except json.JSONDecodeError as error:
            self.at += len(error.doc[: error.pos].encode("utf-8")) - 1
            raise self._broken(error.msg[0].lower() + error.msg[1:]) from None
        return found

    def _guess(self) -> int:
        """The end of the last element that another seems to follow; 0 where there is none."""
        i = self.buffer.rfind(b"},", self.at)
        while i > self.at:
            if _NEXT_OBJECT.match(self.buffer, i + 2):
                return i + 1
            i = self.buffer.rfind(b"},", self.at, i)
        return 0

    def _scan(self) -> int:
        """The end of the last whole element of the array in the buffer, at most ``block`` further; 0 for none."""
        depth, end = 0, 0
        for token in _TOKEN.finditer(self.buffer, self.at):
            mark = token[0]
            if mark in (b"{", b"["):
                depth += 1
            elif mark in (b"}", b"]"):
                depth -= 1
                if depth < 0:
                    return end or token.start()
                if depth == 0:
                    end = token.end()
                    if end - self.at > self.block:
                        return end
            elif not token[1]:
                break
        return end

    def _skip_value(self) -> None:
        first = self._peek()
        if first not in (b"{", b"["):
            pattern = _STRING if first == b'"' else _LITERAL
            found = pattern.match(self.buffer, self.at)
            while (found is None or found.end() == len(self.buffer)) and self._fill():
                found = pattern.match(self.buffer, self.at)
            if found is None:
                raise self._broken("a value is missing")
            self.at = found.end()
            return
        depth = 0
        while True:
            token = _TOKEN.search(self.buffer, self.at)
            if token is None or token[1] == b"":
                self.at = len(self.buffer) if token is None else token.start()
                if not self._fill():
                    raise self._broken("the file breaks off")
                continue
            self.at = token.end()
            depth += {b"{": 1, b"[": 1, b"}": -1, b"]": -1}.get(token[0], 0)
            if depth == 0:
                return

    def _key(self) -> str:
        self._peek()
        found = _STRING.match(self.buffer, self.at)
        while found is None and self.buffer[self.at : self.at + 1] in (b'"', b"") and self._fill():
            found = _STRING.match(self.buffer, self.at)
        if found is None:
            raise self._broken("a key in quotation marks is missing")
        self.at = found.end()
        try:
            return str(json.loads(found[0]))
        except (UnicodeDecodeError, json.JSONDecodeError):
            raise self._broken("a key cannot be read") from None

    def _peek(self) -> bytes:
        """The next byte that is no white space; b"" at the end of the file."""
        while True:
            space = _SPACE.match(self.buffer, self.at)
            assert space is not None, "the pattern matches nothing too"
            self.at = space.end()
            if self.at < len(self.buffer) or not self._fill():
                return self.buffer[self.at : self.at + 1]

    def _fill(self) -> bool:
        """Drops what was consumed and reads one block more; False at the end of the file."""
        more = b"" if self.ended else self.file.read(self.block)
        if not more:
            self.ended = True
            return False
        self.base += self.at
        self.buffer = self.buffer[self.at :] + more
        self.at = 0
        if self.progress is not None:
            self.progress(self.base + len(self.buffer))
        return True

    def _broken(self, what: str) -> DataError:
        position = self.base + min(self.at, len(self.buffer))
        if self.ended and self.at >= len(self.buffer):
            what = "the file breaks off"
        self.file.seek(0)
        line, remaining = 1, position
        while remaining and (some := self.file.read(min(remaining, BLOCK))):
            line, remaining = line + some.count(b"\n"), remaining - len(some)
        ended = what == "the file breaks off"
        remedy = "Copy or download the whole file again." if ended else "Mend the file there, or get it again."
        return DataError(
            f"this is not valid JSON: {what} at line {line}, byte {position}", where=self.path, remedy=remedy
        )
