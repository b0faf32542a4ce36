"""What an entry says and where it comes from, as one line of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from tinyalign_edge.errors import BundleError, InputError

FIELDS = ("text", "question", "source", "time")


@dataclass(frozen=True)
class Record:
    """An entry's text, the question it answers if there is one, its source, and when it was added.

    `time` is UTC in ISO 8601 ("2026-01-31T09:30:00Z"), empty for entries that came with the training data.
    """

    text: str
    question: str = ""
    source: str = ""
    time: str = ""

    def encode(self) -> bytes:
        """JSON in UTF-8.

        Raises:
            InputError: a text is not valid Unicode.
        """
        try:
            return json.dumps(asdict(self), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(f"text {self.text!r:.60} of {self.source!r:.60}: is not valid Unicode") from None


def decode_record(data: bytes, where: str) -> Record:
    """Parse the bytes of one record.

    Raises:
        BundleError: they are not a record.
    """
    try:
        fields = json.loads(data)
        return Record(**{name: _text(fields[name]) for name in FIELDS})
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BundleError(f"{where}: its record cannot be read; build the bank again") from None


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value
