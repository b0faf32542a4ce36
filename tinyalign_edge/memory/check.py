"""What no entry may be, whichever file holds it: the files of a bank come from strangers."""

from __future__ import annotations

import math

import numpy as np

from tinyalign_edge.config import WITH_TOKENS
from tinyalign_edge.errors import BundleError
from tinyalign_edge.memory.layout import MAX_ENTRY_BYTES, MAX_RECORD_BYTES, BankSpec
from tinyalign_edge.memory.search import UNIT
from tinyalign_edge.memory.table import Array, Table
from tinyalign_edge.memory.value import Ints

CHECKS = 2  # raised when `check_table` looks for more: what was verified by fewer checks is read again
BLOCK = 4096  # keys in float32 at once
LARGEST_SCALE = np.finfo(np.float32).max / np.float32(128)  # times any int8 it is still finite


def check_table(table: Table, spec: BankSpec, where: str) -> None:
    """Look at every entry of `table`, which the file `where` holds.

    Raises:
        BundleError: ids do not rise, offsets do not fit, an entry is too long, or a key or value is impossible.
    """
    with np.errstate(invalid="ignore"):  # numbers that are none are what is looked for
        _check(table, spec, where)


def in_vocabulary(ids: Ints, spec: BankSpec) -> bool:
    """Whether every token id is one that the language model has."""
    return not ids.size or bool(0 <= ids.min() <= ids.max() < spec.vocab_size)


def rounding(key_dim: int) -> float:
    """How far from 1 the length of a unit key can be once each number is rounded to 1/127 of the greatest, at most 1.

    Each of them is off by 1/254 at most, so the key is by the root of their number times that.
    """
    return min(0.9, math.sqrt(key_dim) / 254 + UNIT)


def _check(table: Table, spec: BankSpec, where: str) -> None:
    if not np.all(table.ids[1:] > table.ids[:-1]):
        raise _impossible(where, "its ids do not rise")
    _check_offsets(table.record_offsets, table.records.size, MAX_RECORD_BYTES, where)
    if spec.kind in WITH_TOKENS:
        _check_offsets(table.value_offsets, table.token_ids.size, MAX_ENTRY_BYTES // table.token_ids.itemsize, where)
    if not np.all(np.abs(table.value_scales) <= LARGEST_SCALE):
        raise _impossible(where, "a value is not finite")
    if not in_vocabulary(table.token_ids, spec):
        raise _impossible(where, "a token id is outside the vocabulary")
    for start in range(0, len(table), BLOCK):
        rows = table.keys[start : start + BLOCK].astype(np.float32)
        squares = np.einsum("ij,ij->i", rows, rows).astype(np.float64)
        lengths = np.sqrt(squares) * table.key_scales[start : start + BLOCK]  # a float64 holds any of these
        if not np.all(np.abs(lengths - 1) <= rounding(spec.key_dim)):
            raise _impossible(where, "a key is not finite or not of length 1")


def _check_offsets(offsets: Array, end: int, longest: int, where: str) -> None:
    if offsets[0] != 0 or int(offsets[-1]) != end or np.any(np.diff(offsets) > longest):  # a fall wraps around
        raise _impossible(where, "its offsets do not fit its sections, or an entry is too long")


def _impossible(where: str, what: str) -> BundleError:
    return BundleError(f"{where}: {what}; build the bank again")
