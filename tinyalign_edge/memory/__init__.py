"""The memory bank: a folder of keys, values and texts that is searched, taught and made to forget without torch."""

from tinyalign_edge.memory.bank import Bank, BankStats, Entry
from tinyalign_edge.memory.copy import copy_bank
from tinyalign_edge.memory.record import Record
from tinyalign_edge.memory.search import Neighbours
from tinyalign_edge.memory.thumbnail import make_thumbnail, open_thumbnail
from tinyalign_edge.memory.write import write_bank

__all__ = [
    "Bank",
    "BankStats",
    "Entry",
    "Neighbours",
    "Record",
    "copy_bank",
    "make_thumbnail",
    "open_thumbnail",
    "write_bank",
]
