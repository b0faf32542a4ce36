"""Rows of LLaVA conversations: `{"id", "image", "conversations", "caption"?}`, `image` a file, several, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tinyalign_edge.errors import InputError
from tinyalign_edge.jsonrows import RowFile

IMAGE = "<image>"
MAX_PICTURES = 16  # a row


@dataclass(frozen=True)
class Turn:
    """One question and its reference answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Picture:
    """A picture by its name, relative to the images folder (POSIX), and its place."""

    name: str
    path: Path


@dataclass(frozen=True)
class Row:
    """Pictures, mostly one, and what is asked about them; `where` is file and row for messages."""

    id: str
    pictures: tuple[Picture, ...]
    turns: tuple[Turn, ...]
    caption: str | None
    where: str

    @property
    def image(self) -> str:
        """The name of the first picture; empty where the row is text alone."""
        return self.pictures[0].name if self.pictures else ""

    @property
    def path(self) -> Path:
        """Where the first picture is; not for rows of text alone."""
        return self.pictures[0].path

    @property
    def memory_turns(self) -> tuple[Turn, ...]:
        """What the memory bank keeps of this row: its caption, with an empty question, else its turns. The first
        names the entry."""
        return (Turn("", self.caption),) if self.caption else self.turns


def read_rows(data: Path, images: Path) -> list[Row]:
    """Read a whole conversation file whose rows have one picture each.

    Raises:
        InputError: missing file, malformed JSON (with line and column), a bad row (with its number and id), or a
            missing picture (named, with its row).
    """
    check_images(images)
    file = RowFile(data)
    rows = [parse_row(file[number], f"{data} row {number + 1}", images) for number in range(len(file))]
    if not rows:
        raise InputError(f"{data}: holds no rows")
    return [one_picture(row) for row in rows]


def one_picture(row: Row) -> Row:
    """Refuse a row that has no picture, or several.

    Raises:
        InputError: it is one; the message names it.
    """
    if len(row.pictures) != 1:
        raise InputError(f"{row.where}: key 'image' must name a file, and one only, found {len(row.pictures)}")
    return row


def check_images(images: Path) -> None:
    """Refuse a folder of images that is not there."""
    if not images.is_dir():
        raise InputError(f"{images}: no such folder of images")


def parse_row(item: Any, where: str, images: Path) -> Row:
    """A parsed object as a `Row`.

    Raises:
        InputError: it is not a row, or a picture of it is missing or outside `images`; the message begins with `where`.
    """
    if not isinstance(item, dict):
        raise InputError(f"{where}: need an object, found {type(item).__name__}")
    place = PurePosixPath(where).name.encode(errors="replace").decode()  # of a file whose name is not UTF-8
    name = str(item.get("id", place))  # a bank keeps it: not where the file lay on this machine
    _must_be_unicode(name, "key 'id'", where)
    where = f"{where} (id {name})"
    pictures = tuple(_picture(image, where, images) for image in _images(item.get("image"), where))
    caption = item.get("caption")
    if caption is not None and not (isinstance(caption, str) and caption.strip()):
        raise InputError(f"{where}: key 'caption' must be a text, found {caption!r:.80}")
    _must_be_unicode(caption or "", "key 'caption'", where)
    caption = caption.strip() if caption else None
    return Row(name, pictures, _turns(item.get("conversations"), where, bool(pictures)), caption, where)


def _images(given: Any, where: str) -> Sequence[Any]:
    if given is None:
        return ()
    listed = given if isinstance(given, list) else [given]
    if len(listed) > MAX_PICTURES:
        raise InputError(f"{where}: {len(listed)} pictures, a row may have {MAX_PICTURES}")
    return listed


def _picture(image: Any, where: str, images: Path) -> Picture:
    if not isinstance(image, str) or not image or "\0" in image:
        raise InputError(f"{where}: key 'image' must name a file, found {image!r:.80}")
    _must_be_unicode(image, "key 'image'", where)
    relative = PurePosixPath(image)
    if relative.is_absolute() or ".." in relative.parts:
        raise InputError(f"{where}: image {image!r} leaves the images folder; use a path inside it")
    path = images / relative
    try:
        there = path.is_file()
    except OSError as error:  # a name that is too long
        raise InputError(f"{where}: image {image!r:.80} cannot be opened ({error.strerror})") from None
    if not there:
        raise InputError(f"{where}: image {path} does not exist")
    return Picture(image, path)


def _turns(conversations: Any, where: str, pictures: bool) -> tuple[Turn, ...]:
    if not isinstance(conversations, list) or not conversations or len(conversations) % 2:
        raise InputError(f"{where}: 'conversations' must be human and gpt messages in pairs")
    turns = []
    for human, gpt in zip(conversations[::2], conversations[1::2], strict=True):
        question = _message(human, "human", where)
        if IMAGE in question and not pictures:
            raise InputError(f"{where}: key 'image' must name a file, since a question has {IMAGE}")
        question, answer = question.replace(IMAGE, " ").strip(), _message(gpt, "gpt", where).strip()
        if not question or not answer:
            raise InputError(f"{where}: an empty question or answer")
        turns.append(Turn(question, answer))
    return tuple(turns)


def _message(message: Any, sender: str, where: str) -> str:
    if not isinstance(message, dict) or message.get("from") != sender or not isinstance(message.get("value"), str):
        raise InputError(f"{where}: expected a message {{'from': {sender!r}, 'value': text}}, found {message!r:.80}")
    _must_be_unicode(message["value"], f"the message of {sender!r}", where)
    return str(message["value"])


def _must_be_unicode(text: str, what: str, where: str) -> None:
    """Refuse half a surrogate pair, which JSON can spell and nobody can tokenize, print or store."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {what} is not valid Unicode at character {error.start}: {text!r:.80}") from None
