"""Long JSON lists and JSON lines, read one row at a time: the file is gone through once, and only places are kept."""

from __future__ import annotations

import json
import mmap
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyalign_edge.errors import InputError

MAX_ROW_BYTES = 2**20
BLANK = b" \t\r\n"
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{},"]', re.DOTALL)
_FIRST = re.compile(rb"[^ \t\r\n]")


class RowFile:
    """The rows of one file, in its order: `file[number]` parses a row anew each time it is asked for.

    Raises:
        InputError: the file is missing, cannot be read, or is not a list of rows; a row, when it is asked for, that
            is not JSON (with line and column) or longer than `MAX_ROW_BYTES`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts, self._ends = array("q"), array("q")
        try:
            if not path.exists():
                raise InputError(f"{path}: no such file")
            if not path.is_file():
                raise InputError(f"{path}: not a file")
            if path.stat().st_size:
                with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                    for start, end in self._lines(text) if path.suffix == ".jsonl" else self._elements(text):
                        self._starts.append(start)
                        self._ends.append(end)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> Any:
        start, end = self._starts[number], self._ends[number]
        if end - start > MAX_ROW_BYTES:
            raise InputError(
                f"{self.path} row {number + 1}: {end - start} bytes, a row may have {MAX_ROW_BYTES}; divide it"
            )
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                text = file.read(end - start).decode("utf-8")
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise self._not_json(start + len(text[: error.pos].encode()), error.msg) from None
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path} row {number + 1}: cannot be read as JSON ({error})") from None

    def _lines(self, text: mmap.mmap) -> Iterator[tuple[int, int]]:
        start = 0
        while start < len(text):
            end = text.find(b"\n", start)
            end = len(text) if end < 0 else end
            if _FIRST.search(text, start, end):
                yield start, end
            start = end + 1

    def _elements(self, text: mmap.mmap) -> Iterator[tuple[int, int]]:
        """Begin and end of every element of the outer list; what stands between is not looked at."""
        first = _FIRST.search(text)
        if first is None:
            return
        if text[first.start()] != ord("["):
            if text[first.start()] != ord("{"):
                raise self._not_json(first.start(), "Expecting a list")
            raise InputError(f"{self.path}: need a list of rows, found an object; JSON lines must end in .jsonl")
        depth, start, found = 0, 0, False
        for token in _TOKEN.finditer(text):
            kind = text[token.start()]
            if kind == ord('"'):
                if token.end() - token.start() == 1:
                    raise self._not_json(token.start(), "Unterminated string")
                continue
            if kind in b"[{":
                depth += 1
                start = token.end() if depth == 1 else start
                continue
            if depth == 1 and (found or kind == ord(",") or _FIRST.search(text, start, token.start())):
                yield start, token.start()
                start, found = token.end(), True
            depth -= kind in b"]}"
            if depth == 0:
                if after := _FIRST.search(text, token.end()):
                    raise self._not_json(after.start(), "Extra data")
                return
        raise self._not_json(len(text), "The list is not closed")

    def _not_json(self, position: int, what: str) -> InputError:
        """The error for a place in the file, which is read up to there to count its lines."""
        line, column, left = 1, 1, position
        with self.path.open("rb") as file:
            while left and (part := file.read(min(left, MAX_ROW_BYTES))):
                left -= len(part)
                last = part.rfind(b"\n")
                line += part.count(b"\n")
                column = column + len(part) if last < 0 else len(part) - last
        return InputError(f"{self.path}:{line}:{column}: not valid JSON ({what})")
