"""Which entries a bank of a given size keeps."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from tinyalign_edge.memory.coverage import Integers
from tinyalign_edge.memory.join import BLOCK
from tinyalign_edge.memory.record import decode_record
from tinyalign_edge.memory.table import Table
from tinyalign_edge.memory.value import token_ids_of

SLACK = 2.0  # entries within their answers' quotas, for each that can be kept


def entry_costs(table: Table) -> Integers:
    """Bytes (E,) that each entry takes in a segment: id, key, value, scales, offsets and record."""
    columns = (table.ids, table.key_scales, table.keys, table.value_scales, table.latents)
    fixed = sum(column.nbytes for column in columns) // max(1, len(table)) + table.record_offsets.itemsize
    records = np.diff(table.record_offsets).astype(np.int64)
    if not len(table.value_offsets):
        return fixed + records
    tokens = np.diff(table.value_offsets).astype(np.int64)
    return fixed + table.value_offsets.itemsize + tokens * table.token_ids.itemsize + records


def answer_numbers(table: Table) -> Integers:
    """A number (E,) for each entry's text, the same for texts that differ in case and white space alone."""
    numbers = np.empty(len(table), np.int64)
    for start in range(0, len(table), BLOCK):
        part = table.part(start, min(start + BLOCK, len(table)))
        for row in range(len(part)):
            text = " ".join(decode_record(part.record(row), f"entry {part.ids[row]}").text.lower().split())
            numbers[start + row] = _number(text.encode())
    return numbers


def content_numbers(table: Table) -> Integers:
    """A number (E,) for what the model reads of each entry: of its token ids; where there are latents alone, which
    differ with every picture, of its question and text."""
    numbers = np.empty(len(table), np.int64)
    for row in range(len(table)):
        if len(table.value_offsets):
            content = token_ids_of(table.value(row)).tobytes()
        else:
            record = decode_record(table.record(row), f"entry {table.ids[row]}")
            content = repr((record.question, record.text)).encode()
        numbers[row] = _number(content)
    return numbers


def within_budget(order: Integers, answers: Integers, costs: Integers, budget_bytes: int) -> npt.NDArray[np.bool_]:
    """The entries (E,) that a budget has room for.

    The most worthwhile entry of every answer comes first; then those within the quotas of their answers, which grow
    with the square root of an answer's number of entries; then the rest.

    Args:
        order: numbers of entries, the most worthwhile first; others are not kept.
        answers: (E,), equal for equal answers.
        costs: (E,), bytes.
        budget_bytes: what they may cost together.
    """
    own = answers[order]
    _, which, counts = np.unique(own, return_inverse=True, return_counts=True)
    by_answer = np.argsort(which, kind="stable")
    rank = np.empty(len(order), np.int64)  # among the entries of the same answer
    rank[by_answer] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    room = SLACK * budget_bytes / max(1.0, float(costs[order].mean())) if len(order) else 0.0
    stage = np.where(rank == 0, 0, np.where(rank < _quotas(counts, room)[which], 1, 2))
    order = order[np.argsort(stage, kind="stable")]
    keep = np.zeros(len(answers), np.bool_)
    keep[order[np.cumsum(costs[order]) <= budget_bytes]] = True
    return keep


def _number(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def _quotas(counts: Integers, room: float) -> Integers:
    """The least entries an answer, proportional to the root of `counts` (answers,), that fill `room` together."""
    low, high = 0.0, float(np.sqrt(counts.max(initial=1)))
    for _ in range(40):
        middle = (low + high) / 2
        filled = np.minimum(counts, np.ceil(middle * np.sqrt(counts))).sum()
        low, high = (middle, high) if filled < room else (low, middle)
    return np.ceil(high * np.sqrt(counts)).astype(np.int64)
