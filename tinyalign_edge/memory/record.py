"""What an entry says and where it comes from, as one line of JSON, with a small picture after it if there is one."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tinyalign_edge.errors import BundleError, InputError
from tinyalign_edge.memory.layout import MAX_RECORD_BYTES

FIELDS = ("text", "question", "source", "time")
MAX_THUMBNAIL_BYTES = 1 << 14


@dataclass(frozen=True)
class Record:
    """An entry's text, the question it answers if there is one, its source, and when it was added.

    `time` is UTC in ISO 8601 ("2026-01-31T09:30:00Z"), empty for entries that came with the training data.
    """

    text: str
    question: str = ""
    source: str = ""
    time: str = ""
    thumbnail: bytes = b""  # JPEG, see `tinyalign_edge.memory.thumbnail`; empty where there is none

    def encode(self) -> bytes:
        """JSON in UTF-8; after a line feed, which JSON on one line does not hold, the thumbnail.

        Raises:
            InputError: a text is not valid Unicode, or it or the thumbnail is too large.
        """
        if len(self.thumbnail) > MAX_THUMBNAIL_BYTES:
            raise InputError(f"thumbnail: {len(self.thumbnail)} bytes, at most {MAX_THUMBNAIL_BYTES} are kept")
        try:
            text = json.dumps({name: getattr(self, name) for name in FIELDS}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(f"text {self.text!r:.60} of {self.source!r:.60}: is not valid Unicode") from None
        data = text + b"\n" + self.thumbnail if self.thumbnail else text
        if len(data) > MAX_RECORD_BYTES:
            raise InputError(
                f"text {self.text!r:.60}: {len(data)} bytes with its source, at most {MAX_RECORD_BYTES} are kept; "
                "give a shorter text"
            )
        return data


def decode_record(data: bytes, where: str) -> Record:
    """Parse the bytes of one record.

    Raises:
        BundleError: they are not a record.
    """
    text, _, thumbnail = data.partition(b"\n")
    if len(thumbnail) > MAX_THUMBNAIL_BYTES:
        raise BundleError(f"{where}: its thumbnail has {len(thumbnail)} bytes; build the bank again")
    try:
        fields = json.loads(text)
        return Record(**{name: _text(fields[name]) for name in FIELDS}, thumbnail=thumbnail)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BundleError(f"{where}: its record cannot be read; build the bank again") from None


def thumbnail_bytes(data: bytes) -> int:
    """How many bytes of a record are its thumbnail's."""
    at = data.find(b"\n")
    return 0 if at < 0 else len(data) - at


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # half a surrogate pair cannot be: JSON can spell it, but nobody can print or store it
    return value
