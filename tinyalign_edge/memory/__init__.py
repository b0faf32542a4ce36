"""The memory bank: a folder of keys, values and texts that is searched, taught and made to forget without torch."""

from tinyalign_edge.memory.bank import Bank, Entry
from tinyalign_edge.memory.copy import copy_bank
from tinyalign_edge.memory.record import Record
from tinyalign_edge.memory.search import Neighbours
from tinyalign_edge.memory.stats import BankStats
from tinyalign_edge.memory.thumbnail import make_thumbnail, open_thumbnail
from tinyalign_edge.memory.value import Hybrid, Value, latents_of, reading_order, token_ids_of, value_of
from tinyalign_edge.memory.write import write_bank

__all__ = [
    "Bank",
    "BankStats",
    "Entry",
    "Hybrid",
    "Neighbours",
    "Record",
    "Value",
    "copy_bank",
    "latents_of",
    "make_thumbnail",
    "open_thumbnail",
    "reading_order",
    "token_ids_of",
    "value_of",
    "write_bank",
]
